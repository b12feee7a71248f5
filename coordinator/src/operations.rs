//! Long work that people and scripts follow: in memory while it runs, in the catalog for later.
//!
//! A request identifier starts at most one operation. Progress is published in memory at every report and written to the
//! catalog when state or step change, so that a follower costs nothing and the catalog little. An ended operation does
//! not change again, except that one given up may still turn out well: a backup that a store's root names was made.

mod publishing;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use process::clock::Monotonic;
use repository::name::{BackupId, ClusterName, NodeName};
use tokio::sync::watch;
use uuid::{NoContext, Uuid};

use crate::catalog::{Catalog, CatalogError, operations as rows};
use crate::refusal::Refusal;

/// Operations kept in memory; the oldest ended ones go first.
const LIVE_LIMIT: usize = 256;
/// Running operations at one time.
const RUNNING_LIMIT: usize = 64;

/// Why an operation ended that waited for WAL and was cancelled.
const CANCELLED: &str = "it was cancelled while it waited for WAL";

/// Where an operation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Working.
    Running,
    /// Ended well.
    Done,
    /// Ended badly.
    Failed,
    /// All is done but that WAL has not come; nobody works on it, and it ends by itself.
    WaitingForWal,
}

/// A piece of long work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// Its identifier; sorts by start.
    pub id: String,
    /// What it is: `backup`.
    pub kind: String,
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// Node that does it.
    pub node: NodeName,
    /// Of a backup of the hybrid shape: the primary that starts and stops it.
    pub primary: Option<NodeName>,
    /// Where it stands.
    pub state: State,
    /// What it is doing, for people.
    pub step: String,
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes in all; 0 while unknown.
    pub bytes_total: u64,
    /// Why it failed; empty otherwise.
    pub error: String,
    /// When it started.
    pub started: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// The backup it makes.
    pub backup: Option<BackupId>,
    /// Why this node and now, for people.
    pub reason: String,
    /// The caller's identifier of the request.
    pub request_id: Option<String>,
}

/// A backup that is finished but for WAL.
#[derive(Debug, Clone)]
pub struct WaitingBackup {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// Node that took it.
    pub node: NodeName,
    /// The backup.
    pub backup: BackupId,
    /// What is missing, for people.
    pub missing: String,
}

/// What an operation is to be.
#[derive(Debug, Clone)]
pub struct NewBackup {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// Node that takes it.
    pub node: NodeName,
    /// The primary that starts and stops it, if that is another node.
    pub primary: Option<NodeName>,
    /// The new backup.
    pub backup: BackupId,
    /// Why this node and now.
    pub reason: String,
    /// The caller's identifier of the request.
    pub request_id: Option<String>,
}

/// Long work other than backups.
#[derive(Debug, Clone)]
pub struct NewWork {
    /// What it is: `verify`, `repair` or `compare`.
    pub kind: &'static str,
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// Node that does it; the coordinator itself if absent.
    pub node: Option<NodeName>,
    /// Why now.
    pub reason: String,
    /// The caller's identifier of the request.
    pub request_id: Option<String>,
}

/// Kind of operations that take backups, which nodes do.
const BACKUP: &str = "backup";

/// Whether a request started an operation or found the one it had started before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// It was started now.
    Now,
    /// The same request had started it before.
    Before,
}

impl Operation {
    /// Whether somebody ended it while it waited for WAL.
    pub fn was_cancelled(&self) -> bool {
        self.state == State::Failed && self.error == CANCELLED
    }
}

/// All operations.
#[derive(Debug, Clone)]
pub struct Operations {
    catalog: Catalog,
    live: Arc<Mutex<HashMap<String, Live>>>,
    underway: publishing::Underway,
}

/// An operation in memory, and when it was last heard of.
#[derive(Debug)]
struct Live {
    sender: watch::Sender<Operation>,
    heard: Monotonic,
}

impl Live {
    fn new(operation: Operation) -> Self {
        Self { sender: watch::Sender::new(operation), heard: Monotonic::now() }
    }

    fn get(&self) -> Operation {
        self.sender.borrow().clone()
    }

    fn is_running(&self) -> bool {
        self.sender.borrow().state == State::Running
    }
}

impl Operations {
    /// Takes up what the catalog knows to be running, or given up of late.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn load(catalog: Catalog) -> Result<Self, CatalogError> {
        let newest = catalog.call(|connection| rows::newest(connection, None, LIVE_LIMIT as u32)).await?;
        let open = newest.into_iter().filter(|operation| operation.state != State::Done);
        let live = open.map(|operation| (operation.id.clone(), Live::new(operation))).collect();
        Ok(Self { catalog, live: Arc::new(Mutex::new(live)), underway: publishing::Underway::default() })
    }

    /// Starts an operation, or finds the one that the same request started before.
    ///
    /// # Errors
    /// [`Refusal::BackupRunning`] when a backup of the cluster runs, [`Refusal::Precondition`] at the limit.
    pub async fn begin(&self, new: NewBackup, now: Timestamp) -> Result<(Operation, Begun), Refusal> {
        if let Some(before) = self.by_request(new.request_id.as_deref()).await? {
            return Ok((before, Begun::Before));
        }
        let operation = Operation {
            id: identifier(now),
            kind: "backup".to_owned(),
            cluster: new.cluster,
            node: new.node,
            primary: new.primary,
            state: State::Running,
            step: "waiting for the node".to_owned(),
            bytes_done: 0,
            bytes_total: 0,
            error: String::new(),
            started: now,
            ended: None,
            backup: Some(new.backup),
            reason: new.reason,
            request_id: new.request_id,
        };
        if let Some(before) = self.insert(&operation)? {
            return Ok((before, Begun::Before));
        }
        self.save(operation.clone()).await?;
        Ok((operation, Begun::Now))
    }

    /// Starts work other than a backup, or finds what the same request started before.
    ///
    /// # Errors
    /// [`Refusal::Precondition`] when such work of the cluster runs, or at the limit.
    pub async fn begin_work(&self, new: NewWork, now: Timestamp) -> Result<(Operation, Begun), Refusal> {
        if let Some(before) = self.by_request(new.request_id.as_deref()).await? {
            return Ok((before, Begun::Before));
        }
        let operation = Operation {
            id: identifier(now),
            kind: new.kind.to_owned(),
            cluster: new.cluster,
            node: new.node.unwrap_or_else(|| "coordinator".parse().expect("it is a name of a node")),
            primary: None,
            state: State::Running,
            step: "beginning".to_owned(),
            bytes_done: 0,
            bytes_total: 0,
            error: String::new(),
            started: now,
            ended: None,
            backup: None,
            reason: new.reason,
            request_id: new.request_id,
        };
        if let Some(before) = self.insert(&operation)? {
            return Ok((before, Begun::Before));
        }
        self.save(operation.clone()).await?;
        Ok((operation, Begun::Now))
    }

    /// The operation that a request started, if it did.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn by_request(&self, request: Option<&str>) -> Result<Option<Operation>, Refusal> {
        let Some(request) = request.map(str::to_owned) else { return Ok(None) };
        let found = self.catalog.call(move |connection| rows::by_request(connection, &request)).await?;
        Ok(found.map(|operation| self.live(&operation.id).unwrap_or(operation)))
    }

    fn insert(&self, operation: &Operation) -> Result<Option<Operation>, Refusal> {
        let mut live = self.lock();
        let same_request = live
            .values()
            .map(Live::get)
            .find(|other| operation.request_id.is_some() && other.request_id == operation.request_id);
        if same_request.is_some() {
            return Ok(same_request);
        }
        let running: Vec<Operation> =
            live.values().map(Live::get).filter(|other| other.state == State::Running).collect();
        let same = |other: &&Operation| other.cluster == operation.cluster && other.kind == operation.kind;
        let rival = |other: &&Operation| same(other) && !crate::comparison::are_of_two_nodes(other, operation);
        if let Some(other) = running.iter().find(rival) {
            if other.kind != BACKUP {
                let text = format!("operation {} ({}) of cluster {} runs already", other.id, other.kind, other.cluster);
                return Err(Refusal::Precondition(text));
            }
            return Err(Refusal::BackupRunning {
                cluster: other.cluster.clone(),
                node: other.node.clone(),
                operation: other.id.clone(),
            });
        }
        if running.len() >= RUNNING_LIMIT {
            return Err(Refusal::Precondition(format!("{RUNNING_LIMIT} operations are running; wait for one to end")));
        }
        while live.len() >= LIVE_LIMIT {
            let ended = live.iter().filter(|(_, other)| other.get().ended.is_some()).map(|(id, _)| id);
            let Some(oldest) = ended.min().cloned() else { break };
            live.remove(&oldest);
        }
        live.insert(operation.id.clone(), Live::new(operation.clone()));
        Ok(None)
    }

    /// Changes an operation and tells its followers. Answers it, or nothing when it is not known in memory.
    pub async fn update(&self, id: &str, change: impl FnOnce(&mut Operation)) -> Option<Operation> {
        let (before, after) = {
            let mut live = self.lock();
            let entry = live.get_mut(id)?;
            let before = entry.get();
            entry.heard = Monotonic::now();
            entry.sender.send_modify(change);
            (before, entry.get())
        };
        if (before.state, &before.step) != (after.state, &after.step) {
            if let Err(error) = self.save(after.clone()).await {
                tracing::error!(%error, operation = id, "the catalog did not take an operation");
            }
            if after.state == State::WaitingForWal {
                tracing::info!(operation = id, cluster = %after.cluster, node = %after.node, step = after.step,
                    "a backup is finished but for WAL");
            } else if after.state != State::Running {
                tracing::info!(operation = id, cluster = %after.cluster, node = %after.node, state = ?after.state,
                    error = after.error, "an operation ended");
            }
        }
        Some(after)
    }

    /// Ends an operation badly.
    pub async fn fail(&self, id: &str, error: impl Into<String>, now: Timestamp) -> Option<Operation> {
        let error = error.into();
        self.update(id, |operation| {
            if operation.state == State::Running {
                operation.state = State::Failed;
                operation.error = error;
                operation.ended = Some(now);
            }
        })
        .await
    }

    /// Ends an operation badly unless it ended or was heard of since a moment. Answers whether it did.
    pub async fn fail_unless_heard(
        &self,
        id: &str,
        since: Monotonic,
        error: impl Into<String>,
        now: Timestamp,
    ) -> bool {
        let unheard = self.lock().get(id).is_some_and(|entry| entry.heard <= since && entry.is_running());
        if unheard {
            self.fail(id, error, now).await;
        }
        unheard
    }

    /// Ends an operation well.
    pub async fn complete(&self, id: &str, step: String, now: Timestamp) -> Option<Operation> {
        self.update(id, |operation| {
            if operation.state != State::Done {
                operation.state = State::Done;
                operation.error = String::new();
                operation.step = step;
                operation.ended = Some(now);
            }
        })
        .await
    }

    /// Ends the operation that made a backup well, also when it was given up: some store's root names it. `step` is the last
    /// word.
    pub async fn complete_backup(&self, cluster: &ClusterName, backup: BackupId, step: String, now: Timestamp) {
        let makes = |operation: &Operation| {
            operation.state != State::Done && operation.backup == Some(backup) && operation.cluster == *cluster
        };
        let made = self.lock().values().map(Live::get).find(makes);
        if let Some(operation) = made {
            self.complete(&operation.id, step, now).await;
        }
    }

    /// Says that a backup waits for WAL: of the operation that makes it, also when that was given up, or of a new one if none is
    /// known. Answers false if it was cancelled: then it is not to be published.
    pub async fn wait_for_wal(&self, waiting: WaitingBackup, now: Timestamp) -> bool {
        let WaitingBackup { cluster, node, backup, missing } = waiting;
        let makes = |operation: &Operation| operation.backup == Some(backup) && operation.cluster == cluster;
        let known = self.lock().values().map(Live::get).find(makes);
        if known.as_ref().is_some_and(Operation::was_cancelled) {
            return false;
        }
        let id = match known {
            Some(operation) if operation.state == State::Done => return true,
            Some(operation) => operation.id,
            None => {
                let operation = Operation {
                    id: identifier(now),
                    kind: "backup".to_owned(),
                    cluster,
                    node,
                    primary: None,
                    state: State::WaitingForWal,
                    step: String::new(),
                    bytes_done: 0,
                    bytes_total: 0,
                    error: String::new(),
                    started: backup.time(),
                    ended: None,
                    backup: Some(backup),
                    reason: "it was found in a store, finished but for WAL".to_owned(),
                    request_id: None,
                };
                let id = operation.id.clone();
                self.lock().insert(id.clone(), Live::new(operation));
                id
            }
        };
        self.update(&id, |operation| {
            operation.state = State::WaitingForWal;
            operation.step = format!("waiting for {missing}");
            operation.error = String::new();
            operation.ended = None;
        })
        .await;
        true
    }

    /// Whether the operation that makes a backup was cancelled while it waited for WAL.
    pub fn was_cancelled(&self, cluster: &ClusterName, backup: BackupId) -> bool {
        let makes = |operation: &Operation| operation.backup == Some(backup) && operation.cluster == *cluster;
        self.lock().values().map(Live::get).any(|operation| makes(&operation) && operation.was_cancelled())
    }

    /// Ends an operation that waits because somebody wants it to end. Answers whether it did.
    pub async fn cancel_waiting(&self, id: &str, now: Timestamp) -> bool {
        let waited = self.live(id).is_some_and(|operation| operation.state == State::WaitingForWal);
        if waited {
            self.update(id, |operation| {
                operation.state = State::Failed;
                operation.error = CANCELLED.to_owned();
                operation.ended = Some(now);
            })
            .await;
        }
        waited
    }

    /// Operations that run and that a node was given.
    pub fn given_to(&self, cluster: &ClusterName, node: &NodeName) -> Vec<Operation> {
        let mut running = self.running();
        let by_nodes = [BACKUP, crate::comparison::KIND];
        let given = |operation: &Operation| by_nodes.contains(&operation.kind.as_str()) && operation.node == *node;
        running.retain(|operation| operation.cluster == *cluster && given(operation));
        running
    }

    /// Operations that run.
    pub fn running(&self) -> Vec<Operation> {
        self.silent(Duration::ZERO)
    }

    /// Operations that run and were not heard of for this long.
    pub fn silent(&self, longest: Duration) -> Vec<Operation> {
        let live = self.lock();
        let silent = live.values().filter(|entry| entry.heard.elapsed() >= longest).map(Live::get);
        silent.filter(|operation| operation.state == State::Running).collect()
    }

    /// One operation.
    ///
    /// # Errors
    /// [`Refusal::OperationUnknown`].
    pub async fn get(&self, id: &str) -> Result<Operation, Refusal> {
        if let Some(operation) = self.live(id) {
            return Ok(operation);
        }
        let wanted = id.to_owned();
        let found = self.catalog.call(move |connection| rows::get(connection, &wanted)).await?;
        found.ok_or_else(|| Refusal::OperationUnknown(id.to_owned()))
    }

    /// The newest operations first.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn list(&self, cluster: Option<ClusterName>, limit: u32) -> Result<Vec<Operation>, Refusal> {
        let stored = self
            .catalog
            .call(move |connection| rows::newest(connection, cluster.as_ref().map(ClusterName::as_str), limit))
            .await?;
        // Memory is ahead of the catalog in bytes done.
        Ok(stored.into_iter().map(|operation| self.live(&operation.id).unwrap_or(operation)).collect())
    }

    /// Follows an operation; the first value is there at once. An ended operation has a channel that is closed.
    ///
    /// # Errors
    /// [`Refusal::OperationUnknown`].
    pub async fn follow(&self, id: &str) -> Result<watch::Receiver<Operation>, Refusal> {
        let subscribed = self.lock().get(id).map(|entry| entry.sender.subscribe());
        match subscribed {
            Some(receiver) => Ok(receiver),
            None => Ok(watch::Sender::new(self.get(id).await?).subscribe()),
        }
    }

    /// Waits until an operation has ended or the time is over, and answers it as it stands.
    ///
    /// # Errors
    /// [`Refusal::OperationUnknown`].
    pub async fn wait(&self, id: &str, longest: Duration) -> Result<Operation, Refusal> {
        let mut receiver = self.follow(id).await?;
        let ended = receiver.wait_for(|operation| operation.ended.is_some());
        // Elapsed time and a closed channel both mean: answer what is known.
        let _ = tokio::time::timeout(longest, ended).await;
        let operation = receiver.borrow().clone();
        Ok(operation)
    }

    fn live(&self, id: &str) -> Option<Operation> {
        self.lock().get(id).map(Live::get)
    }

    async fn save(&self, operation: Operation) -> Result<(), CatalogError> {
        self.catalog
            .call(move |connection| {
                rows::put(connection, &operation)?;
                rows::prune(connection)
            })
            .await
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A new identifier that sorts by time.
pub fn identifier(now: Timestamp) -> String {
    let seconds = u64::try_from(now.as_second()).unwrap_or_default();
    let nanoseconds = u32::try_from(now.subsec_nanosecond()).unwrap_or_default();
    Uuid::new_v7(uuid::Timestamp::from_unix(NoContext, seconds, nanoseconds)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(cluster: &str, request: Option<&str>) -> NewBackup {
        NewBackup {
            cluster: cluster.parse().unwrap(),
            node: "a".parse().unwrap(),
            primary: None,
            backup: "20261123T034138Z-7f3a9c21".parse().unwrap(),
            reason: "asked".to_owned(),
            request_id: request.map(str::to_owned),
        }
    }

    fn now() -> Timestamp {
        "2026-11-23T03:41:38Z".parse().unwrap()
    }

    #[tokio::test]
    async fn a_request_starts_one_operation() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let operations = Operations::load(catalog.clone()).await.unwrap();
        let (first, begun) = operations.begin(new("main", Some("r1")), now()).await.unwrap();
        assert_eq!(begun, Begun::Now);
        let (again, begun) = operations.begin(new("main", Some("r1")), now()).await.unwrap();
        assert_eq!((again.id.as_str(), begun), (first.id.as_str(), Begun::Before));
        assert_eq!(operations.begin(new("main", Some("r2")), now()).await.unwrap_err().reason(), "BACKUP_RUNNING");
        operations.begin(new("other", None), now()).await.unwrap();
        operations.complete(&first.id, "done".to_owned(), now()).await.unwrap();
        // After a restart the request is still known, and so is what runs.
        let restarted = Operations::load(catalog).await.unwrap();
        let (again, begun) = restarted.begin(new("main", Some("r1")), now()).await.unwrap();
        assert_eq!((again.id, again.state, begun), (first.id, State::Done, Begun::Before));
        assert_eq!(restarted.running().len(), 1);
        assert_eq!(restarted.list(None, 10).await.unwrap().len(), 2);
        assert_eq!(restarted.get("nothing").await.unwrap_err().reason(), "OPERATION_UNKNOWN");
    }

    #[tokio::test]
    async fn followers_see_progress_and_the_end() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let operations = Operations::load(catalog).await.unwrap();
        let (operation, _) = operations.begin(new("main", None), now()).await.unwrap();
        let still = operations.wait(&operation.id, Duration::from_millis(5)).await.unwrap();
        assert_eq!(still.state, State::Running);
        let waiter = tokio::spawn({
            let (operations, id) = (operations.clone(), operation.id.clone());
            async move { operations.wait(&id, Duration::from_secs(60)).await.unwrap() }
        });
        operations.update(&operation.id, |operation| operation.bytes_done = 5).await.unwrap();
        operations.fail(&operation.id, "the node said no", now()).await.unwrap();
        let ended = waiter.await.unwrap();
        assert_eq!((ended.state, ended.bytes_done, ended.error.as_str()), (State::Failed, 5, "the node said no"));
        // What was given up may still turn out well, also after a restart.
        let restarted = Operations::load(operations.catalog.clone()).await.unwrap();
        assert!(restarted.running().is_empty());
        let (cluster, backup) = (ended.cluster, ended.backup.unwrap());
        for operations in [restarted, operations] {
            operations.complete_backup(&cluster, backup, "done, and more".to_owned(), now()).await;
            let ended = operations.get(&operation.id).await.unwrap();
            assert_eq!((ended.state, ended.error.as_str()), (State::Done, ""));
        }
    }
}
