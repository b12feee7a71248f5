//! By which road a backup's objects reach the repository: through the coordinator, or straight into a store.
//!
//! The coordinator's road says after each object which stores hold it. As long as the direct store is among them for
//! every object so far, and has the backup that this one builds on, a backup whose coordinator dies goes on straight into
//! that store; else it fails, for half a backup in each of two places is none. Every object is sent again until the retries end; repeating is harmless because
//! objects are create-only and compared by content.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use proto::archive::archive_service_client::ArchiveServiceClient;
use proto::archive::{
    PinBackupRequest, PublishBackupRequest, PublishBackupResponse, PutBackupObjectOpen, PutBackupObjectRequest,
    StoreState, put_backup_object_request::Part,
};
use repository::key::ObjectKey;
use repository::name::{BackupId, ClusterName, NodeName};
use repository::store::{Body, ObjectStore, Remedy, StoreError};
use thiserror::Error;
use tokio::time::Instant;
use tonic::Code;

use crate::coordinator_link::CoordinatorChannel;

/// Longest wait for one object of at most 16 MiB on its way, in one attempt.
const OBJECT_DEADLINE: Duration = Duration::from_secs(60);
/// How long a road is tried for one object when there is another road.
const PATIENCE_WITH_CHOICE: Duration = Duration::from_secs(15);
/// How long it is tried when it is the only one: restarts and short outages pass.
const PATIENCE_ALONE: Duration = Duration::from_secs(300);
/// Waits between attempts; the last one repeats.
const RETRY_WAITS: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_millis(500), Duration::from_secs(2), Duration::from_secs(5)];
/// What the coordinator is given beyond our own deadline for waiting on WAL.
const PUBLISH_SLACK: Duration = Duration::from_secs(30);

/// Why an object or a publication did not get through.
#[derive(Debug, Error)]
pub enum RoadError {
    /// Neither a coordinator nor a store of our own.
    #[error("there is no road to the repository: the coordinator is away and no direct store is configured")]
    NoRoad,
    /// The coordinator did not take it.
    #[error("the coordinator did not take {what}")]
    Coordinator {
        /// Key of the object, or the publication.
        what: String,
        /// Its answer.
        #[source]
        source: Box<tonic::Status>,
    },
    /// The direct store did not take it.
    #[error("the store did not take {key}")]
    Store {
        /// Key of the object.
        key: ObjectKey,
        /// Its answer.
        #[source]
        source: Box<repository::backup::BackupError>,
    },
    /// The coordinator is gone and what it has taken is not in the direct store.
    #[error("the coordinator went away and store {store} lacks objects sent before: start the backup again")]
    Split {
        /// The direct store.
        store: String,
    },
}

/// The roads a node has. At least one must be there for a backup to start.
#[derive(Clone, Debug, Default)]
pub struct Roads {
    /// Channel to the coordinator, when it is to be used.
    pub coordinator: Option<CoordinatorChannel>,
    /// The store this node may write itself.
    pub direct: Option<Arc<dyn ObjectStore>>,
    /// The stores that are looked through for a backup to build on, as they are reached by these roads; without any, the
    /// direct one.
    pub stores: Vec<Arc<dyn ObjectStore>>,
}

impl Roads {
    /// The stores to be looked through.
    pub fn readable(&self) -> Vec<Arc<dyn ObjectStore>> {
        match self.stores.is_empty() {
            true => self.direct.iter().cloned().collect(),
            false => self.stores.clone(),
        }
    }
}

/// The road of one backup; counts who holds what.
#[derive(Debug)]
pub(super) struct BackupRoad {
    roads: Roads,
    cluster: ClusterName,
    node: NodeName,
    /// How long the coordinator is tried for one object.
    patience: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The coordinator is out for the rest of this backup.
    diverted: bool,
    /// Stores that hold every object the coordinator took; `None` before the first.
    holders: Option<BTreeSet<String>>,
}

/// By which road something went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Road {
    /// Through the coordinator.
    Coordinator,
    /// Straight into a store.
    Direct,
}

impl BackupRoad {
    pub(super) fn new(roads: Roads, cluster: ClusterName, node: NodeName) -> Result<Self, RoadError> {
        if roads.coordinator.is_none() && roads.direct.is_none() {
            return Err(RoadError::NoRoad);
        }
        let patience = if roads.direct.is_some() { PATIENCE_WITH_CHOICE } else { PATIENCE_ALONE };
        Ok(Self { roads, cluster, node, patience, state: Mutex::default() })
    }

    /// The road that is used now.
    pub(super) fn road(&self) -> Road {
        if self.roads.coordinator.is_none() || self.lock().diverted { Road::Direct } else { Road::Coordinator }
    }

    /// The store of the direct road.
    pub(super) fn direct(&self) -> Result<&Arc<dyn ObjectStore>, RoadError> {
        self.roads.direct.as_ref().ok_or(RoadError::NoRoad)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one object durable.
    pub(super) async fn put(&self, key: &ObjectKey, body: &Body, sha256: &[u8; 32]) -> Result<(), RoadError> {
        if self.road() == Road::Coordinator {
            match self.put_coordinator(key, body, sha256).await {
                Ok(holders) => {
                    self.note(holders);
                    return Ok(());
                }
                Err(error) => self.divert(error)?,
            }
        }
        put_direct(self.direct()?.as_ref(), key, body, sha256).await
    }

    /// Asks for the publication; `None` when it must be done on the direct road.
    pub(super) async fn publish(
        &self,
        backup: &BackupId,
        root_entry_json: String,
        wal_wait: Duration,
    ) -> Result<Option<PublishBackupResponse>, RoadError> {
        if self.road() == Road::Direct {
            return Ok(None);
        }
        let request = PublishBackupRequest {
            cluster: self.cluster.to_string(),
            node: self.node.to_string(),
            backup: backup.to_string(),
            root_entry_json,
            wal_wait_seconds: u32::try_from(wal_wait.as_secs()).unwrap_or(u32::MAX),
            may_be_kept: true,
        };
        let mut attempts = Attempts::new(self.patience);
        loop {
            let mut client = self.client();
            let answer = tokio::time::timeout(wal_wait + PUBLISH_SLACK, client.publish_backup(request.clone())).await;
            let status = match answer {
                Ok(Ok(answer)) => return Ok(Some(answer.into_inner())),
                Ok(Err(status)) => status,
                Err(_) => tonic::Status::deadline_exceeded("no answer in time"),
            };
            let error =
                RoadError::Coordinator { what: format!("the publication of {backup}"), source: Box::new(status) };
            if !attempts.again(&error).await {
                self.divert(error)?;
                return Ok(None);
            }
        }
    }

    /// Asks the coordinator to pin a backup, and to have its pin take over those of attempts. Gives the stores in which that
    /// is so.
    pub(super) async fn pin(&self, backup: &BackupId, attempts: &[BackupId]) -> Result<BTreeSet<String>, RoadError> {
        let request = PinBackupRequest {
            cluster: self.cluster.to_string(),
            node: self.node.to_string(),
            backup: backup.to_string(),
            attempts: attempts.iter().map(ToString::to_string).collect(),
        };
        let mut attempts = Attempts::new(PATIENCE_WITH_CHOICE);
        loop {
            let mut client = self.client();
            let answer = tokio::time::timeout(OBJECT_DEADLINE, client.pin_backup(request.clone())).await;
            let status = match answer {
                Ok(Ok(answer)) => return Ok(answer.into_inner().stores.into_iter().collect()),
                Ok(Err(status)) => status,
                Err(_) => tonic::Status::deadline_exceeded("no answer in time"),
            };
            let what = format!("the pin of {backup}");
            let error = RoadError::Coordinator { what, source: Box::new(status) };
            if !attempts.again(&error).await {
                return Err(error);
            }
        }
    }

    /// Takes note of the stores that have what the backup builds on: it can be whole in these only.
    pub(super) fn builds_on(&self, holders: &BTreeSet<String>) {
        self.note(holders.clone());
    }

    fn note(&self, holders: BTreeSet<String>) {
        let mut state = self.lock();
        state.holders = Some(match state.holders.take() {
            Some(before) => before.intersection(&holders).cloned().collect(),
            None => holders,
        });
    }

    /// Takes the direct road from now on if the coordinator is away and the direct store has all that was sent.
    fn divert(&self, error: RoadError) -> Result<(), RoadError> {
        let Some(direct) = self.roads.direct.as_ref().filter(|_| passes_by_itself(&error)) else { return Err(error) };
        let mut state = self.lock();
        let store = direct.name().to_string();
        if state.holders.as_ref().is_some_and(|holders| !holders.contains(&store)) {
            return Err(RoadError::Split { store });
        }
        if !state.diverted {
            state.diverted = true;
            tracing::info!(store, "coordinator is away, the backup goes on straight into the store");
        }
        Ok(())
    }

    fn client(&self) -> ArchiveServiceClient<CoordinatorChannel> {
        let channel = self.roads.coordinator.clone();
        ArchiveServiceClient::new(channel.expect("only called on the coordinator's road"))
    }

    async fn put_coordinator(
        &self,
        key: &ObjectKey,
        body: &Body,
        sha256: &[u8; 32],
    ) -> Result<BTreeSet<String>, RoadError> {
        let open = PutBackupObjectOpen {
            cluster: self.cluster.to_string(),
            node: self.node.to_string(),
            key: key.as_str().to_owned(),
            stored_size: body.len(),
            stored_sha256: Bytes::copy_from_slice(sha256),
        };
        let mut attempts = Attempts::new(self.patience);
        loop {
            let mut client = self.client();
            let answer =
                tokio::time::timeout(OBJECT_DEADLINE, client.put_backup_object(messages(open.clone(), body))).await;
            let status = match answer {
                Ok(Ok(answer)) => {
                    let stored =
                        answer.into_inner().stores.into_iter().filter(|outcome| outcome.state() == StoreState::Stored);
                    return Ok(stored.map(|outcome| outcome.store).collect());
                }
                Ok(Err(status)) => status,
                Err(_) => tonic::Status::deadline_exceeded("no answer in time"),
            };
            let error = RoadError::Coordinator { what: key.to_string(), source: Box::new(status) };
            if self.lock().diverted || !attempts.again(&error).await {
                return Err(error);
            }
        }
    }
}

/// The attempts at one thing on one road.
struct Attempts {
    until: Instant,
    made: usize,
}

impl Attempts {
    fn new(patience: Duration) -> Self {
        Self { until: Instant::now() + patience, made: 0 }
    }

    /// Waits before another attempt; false when none is to be made.
    async fn again(&mut self, error: &RoadError) -> bool {
        let wait = RETRY_WAITS[self.made.min(RETRY_WAITS.len() - 1)];
        if !passes_by_itself(error) || is_full(error) || Instant::now() + wait > self.until {
            return false;
        }
        self.made += 1;
        tokio::time::sleep(wait).await;
        true
    }
}

/// A full repository stays full for a while: another road is better than waiting.
fn is_full(error: &RoadError) -> bool {
    matches!(error, RoadError::Coordinator { source, .. } if source.code() == Code::ResourceExhausted)
}

/// Whether another attempt, or another road, may help: the coordinator is away, or full.
fn passes_by_itself(error: &RoadError) -> bool {
    match error {
        RoadError::Coordinator { source, .. } => {
            matches!(
                source.code(),
                Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::ResourceExhausted | Code::Unknown
            )
        }
        RoadError::Store { source, .. } => source.remedy() == Remedy::Retry,
        RoadError::NoRoad | RoadError::Split { .. } => false,
    }
}

/// The stream of one upload: what follows, then pieces. When the body cannot be read the stream ends early, and the
/// coordinator refuses it as too short.
fn messages(
    open: PutBackupObjectOpen,
    body: &Body,
) -> impl futures_util::Stream<Item = PutBackupObjectRequest> + use<> {
    let read = body.chunks().take_while(|chunk| std::future::ready(chunk.is_ok()));
    let chunks = read.filter_map(|chunk| std::future::ready(chunk.ok().map(Part::Chunk)));
    let parts = futures_util::stream::once(std::future::ready(Part::Open(open))).chain(chunks);
    parts.map(|part| PutBackupObjectRequest { part: Some(part) })
}

async fn put_direct(store: &dyn ObjectStore, key: &ObjectKey, body: &Body, sha256: &[u8; 32]) -> Result<(), RoadError> {
    let mut attempts = Attempts::new(PATIENCE_ALONE);
    loop {
        let unanswered = || StoreError::Timeout { store: store.name().clone(), operation: "put" };
        let answer = tokio::time::timeout(OBJECT_DEADLINE, repository::backup::put(store, key, body, sha256)).await;
        let Err(source) = answer.unwrap_or_else(|_| Err(unanswered().into())) else { return Ok(()) };
        let error = RoadError::Store { key: key.clone(), source: Box::new(source) };
        if !attempts.again(&error).await {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests;
