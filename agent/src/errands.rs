//! Errands of this node: base backups and WAL switches, ordered by the coordinator or asked for on this host.
//!
//! Invariants: every order gets an end, done or failed, told upwards. A cancelled order ends its work. Progress is told at most
//! every [`TELL_EVERY`], and never holds up the work. What a backup does is decided in `backup`; this room only passes on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use postgres_format::{Lsn, SegmentNumber};
use process::exit::Exit;
use proto::fleet::{BackupType as WireType, ChangePace, HoldBackup, OrderState, OrderUpdate, TakeBackup};
use repository::backup::origin::BackupType;
use repository::name::{BackupId, ClusterName};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::archive::ship::{Roads, chain};
use crate::backup::compare;
use crate::backup::pace::Wish;
use crate::backup::road::Roads as BackupRoads;
use crate::backup::{BackupError, BackupLines, BackupOutcome, BackupRequest, Backups, Progress, Step};
use crate::coordinator_link::CoordinatorChannel;
use crate::fetch::Sources;
use crate::node::DataDirectory;
use crate::orders::{Order, Told, What};
use crate::postgres::{Role, Server, StartCheckpoint, last_segment_before};
use crate::road::Road;

/// Time between two words about progress.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for the WAL of a backup to be durable.
const WAL_WAIT: Duration = Duration::from_secs(15 * 60);
/// How often it is looked whether WAL has come that finished backups wait for, while the coordinator is away.
const LEFT_EVERY: Duration = Duration::from_secs(30);
/// Wishes for a WAL switch waiting to be told.
const WISHES: usize = 4;

/// What executes errands.
pub struct Errands {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// Base backups of this node.
    pub backups: Arc<Backups>,
    /// The live server.
    pub server: Arc<dyn Server>,
    /// The data directory.
    pub data: Arc<DataDirectory>,
    /// Ways off this host.
    pub roads: Roads,
    /// Which stores can be read, for backups to build on.
    pub sources: Arc<Sources>,
    /// Connection to the coordinator, when there is one.
    pub channel: Option<CoordinatorChannel>,
    /// Where words to the coordinator go.
    pub told: mpsc::Sender<Told>,
    /// What runs, by operation.
    pub running: Mutex<HashMap<String, CancellationToken>>,
}

/// Options of a backup asked for on this host.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct HereOptions {
    cluster: String,
    #[serde(rename = "type")]
    backup_type: BackupType,
    label: String,
    start_fast: bool,
    parallel: u32,
    bytes_per_second: Option<u64>,
}

impl Default for HereOptions {
    fn default() -> Self {
        let (cluster, label) = (String::new(), String::new());
        Self { cluster, backup_type: BackupType::Incr, label, start_fast: false, parallel: 0, bytes_per_second: None }
    }
}

impl Errands {
    /// Executes orders until `stop`; then all running ones are cancelled and waited for.
    pub async fn follow(self: Arc<Self>, mut orders: mpsc::Receiver<Order>, stop: CancellationToken) {
        let tasks = TaskTracker::new();
        let mut left = tokio::time::interval(LEFT_EVERY);
        left.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let order = tokio::select! {
                () = stop.cancelled() => break,
                _ = left.tick() => {
                    self.publish_left(&tasks, &stop);
                    continue;
                }
                order = orders.recv() => match order { Some(order) => order, None => break },
            };
            if order.what == What::Cancel {
                if let Some(cancel) = self.running().get(&order.operation) {
                    cancel.cancel();
                }
                continue;
            }
            if let What::ChangePace(pace) = &order.what {
                self.change_pace(&order.operation, pace);
                continue;
            }
            let cancel = stop.child_token();
            self.running().insert(order.operation.clone(), cancel.clone());
            let (errands, stop) = (Arc::clone(&self), stop.clone());
            tasks.spawn(async move {
                errands.execute(&order, &cancel, &stop).await;
                errands.running().remove(&order.operation);
            });
        }
        tasks.close();
        tasks.wait().await;
    }

    /// A backup that is over has no pace any more.
    fn change_pace(&self, operation: &str, asked: &ChangePace) {
        if self.running().contains_key(operation) {
            let wish = Wish {
                bytes_per_second: asked.bytes_per_second,
                readers: asked.parallel.map(|parallel| parallel as usize),
            };
            self.backups.node().pace.change(wish);
            tracing::info!(operation, ?wish, "the pace of a backup was changed");
        }
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<String, CancellationToken>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// While the coordinator is away nobody else publishes what waited for its WAL.
    fn publish_left(self: &Arc<Self>, tasks: &TaskTracker, stop: &CancellationToken) {
        let Some(direct) = self.roads.direct.clone().filter(|_| self.roads.watch.road() == Road::Direct) else {
            return;
        };
        let (errands, stop) = (Arc::clone(self), stop.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = errands.backups.publish_left(direct.as_ref()) => {}
            }
        });
    }

    async fn execute(&self, order: &Order, cancel: &CancellationToken, stop: &CancellationToken) {
        let update = match &order.what {
            What::TakeBackup(wanted) => self.ordered_backup(&order.operation, wanted, cancel, stop).await,
            What::SwitchWal { past_lsn } => {
                let ended = self.switch_wal(&order.operation, Lsn::new(*past_lsn)).await;
                ended.unwrap_or_else(|error| Told::failed(&order.operation, error))
            }
            What::ComparePages(wanted) => {
                let (node, stores) = (self.backups.node(), self.backup_roads().await.readable());
                compare::ordered(node, &stores, &order.operation, wanted, &self.told, cancel).await
            }
            What::HoldBackup(asked) => return self.hold(&order.operation, asked, cancel).await,
            What::Cancel | What::ChangePace(_) => return,
        };
        // The session is gone for good only when the agent stops.
        let _ = self.told.send(update).await;
    }

    /// Answers a standby whose backup is held here, and holds it if that is what it wants.
    async fn hold(&self, operation: &str, asked: &HoldBackup, cancel: &CancellationToken) {
        let (held, begun) = match self.backups.asked_to_hold(asked) {
            Ok(told) => told,
            Err(reason) => {
                let _ = self.told.send(Told::failed(operation, reason)).await;
                return;
            }
        };
        let (operation, state) = (operation.to_owned(), OrderState::Done.into());
        let update = OrderUpdate { operation, state, held: Some(held), ..OrderUpdate::default() };
        let _ = self.told.send(update.into()).await;
        if let Some(begun) = begun {
            // Who asked for our part came through the coordinator, and looks for it where that puts it.
            let roads = BackupRoads { coordinator: self.channel.clone(), ..BackupRoads::default() };
            self.backups.hold(begun, roads, cancel).await;
        }
    }

    async fn ordered_backup(
        &self,
        operation: &str,
        wanted: &TakeBackup,
        cancel: &CancellationToken,
        stop: &CancellationToken,
    ) -> Told {
        let Ok(backup) = wanted.backup.parse::<BackupId>() else {
            return Told::failed(operation, "the backup's identifier is not one");
        };
        let backup_type = match wanted.r#type() {
            // A coordinator that says nothing does not know backups that build on others.
            WireType::Unspecified | WireType::Full => BackupType::Full,
            WireType::Diff => BackupType::Diff,
            WireType::Incr => BackupType::Incr,
        };
        let primary = Some(&wanted.primary).filter(|name| !name.is_empty()).map(|name| name.parse()).transpose();
        let Ok(primary) = primary else { return Told::failed(operation, "the primary's name is not one") };
        let request = request(backup, backup_type, &wanted.label, wanted.start_fast, wanted.parallel);
        let request = BackupRequest { primary, bytes_per_second: wanted.bytes_per_second, ..request };
        let tell = |seen: &Seen| {
            // A word that finds the queue full is followed by a newer one.
            let _ = self.told.try_send(update(operation, OrderState::Running, seen).into());
        };
        let (outcome, seen) = self.backup(&request, (cancel, stop), tell).await;
        match outcome {
            Ok(outcome) => {
                let waiting_for = outcome.waiting_for.unwrap_or_default();
                OrderUpdate { waiting_for, ..update(operation, OrderState::Done, &seen) }
            }
            Err(error) => OrderUpdate {
                operation: operation.to_owned(),
                state: OrderState::Failed.into(),
                error: chain(&error),
                kept: seen.progress.kept,
                ..OrderUpdate::default()
            },
        }
        .into()
    }

    /// A backup asked for on this host; gives exit code and its identifier, or why there is none.
    pub async fn backup_here(&self, json: &str, progress: mpsc::Sender<String>) -> (Exit, String) {
        let options: HereOptions = match serde_json::from_str(json) {
            Ok(options) => options,
            Err(error) => return (Exit::Usage, format!("the options are not understood: {error}")),
        };
        if !options.cluster.is_empty() && options.cluster != self.cluster.as_str() {
            return (
                Exit::Refused,
                format!("this agent belongs to cluster {}, not to {}", self.cluster, options.cluster),
            );
        }
        if let Some(reason) = self.nowhere_to_put_it().await {
            return (Exit::Refused, reason);
        }
        // The last bits of a version 7 identifier are random.
        let random = uuid::Uuid::now_v7().as_u128() as u32;
        let backup = BackupId::new(process::clock::now(), random);
        let HereOptions { backup_type, label, start_fast, parallel, .. } = &options;
        let request = request(backup, *backup_type, label, *start_fast, *parallel);
        let request = BackupRequest { bytes_per_second: options.bytes_per_second, ..request };
        let tell = |seen: &Seen| {
            let json = serde_json::json!({
                "backup": backup.to_string(),
                "built_on": seen.built_on,
                "step": seen.step(),
                "bytes_done": seen.progress.bytes_done,
                "bytes_total": seen.progress.bytes_total,
            });
            let _ = progress.try_send(json.to_string());
        };
        let never = CancellationToken::new();
        let (done, seen) = self.backup(&request, (&never, &never), tell).await;
        match done {
            Ok(BackupOutcome { waiting_for: Some(missing), .. }) => {
                let what =
                    format!("backup {backup} waits for {missing}, and is published by itself when that has come");
                (Exit::Timeout, what)
            }
            Ok(outcome) => {
                // A backup of less than a tick has told nothing yet.
                let json = serde_json::json!({
                    "backup": backup.to_string(),
                    "built_on": seen.built_on,
                    "step": outcome.entry.done(),
                });
                // Its place may be taken by progress that nobody needs any more.
                let _ = tokio::time::timeout(TELL_EVERY, progress.send(json.to_string())).await;
                (Exit::Ok, outcome.entry.backup.to_string())
            }
            Err(error) => (exit_of(&error), chain(&error)),
        }
    }

    /// Why a backup of this node could not reach any store now: without a direct road it needs the coordinator.
    async fn nowhere_to_put_it(&self) -> Option<String> {
        if self.roads.direct.is_some() {
            return None;
        }
        let away = match &self.roads.link {
            Some(link) => chain(&link.stores().await.err()?),
            None => "none is configured".to_owned(),
        };
        Some(format!(
            "the coordinator is away ({away}) and this node was given no store of its own: nothing can take a backup"
        ))
    }

    /// How the repository is reached now.
    async fn backup_roads(&self) -> BackupRoads {
        let by_coordinator = self.roads.watch.road() == Road::Coordinator;
        BackupRoads {
            coordinator: self.channel.clone().filter(|_| by_coordinator),
            direct: self.roads.direct.clone(),
            stores: if by_coordinator { self.sources.ask_whom().await.stores } else { Vec::new() },
        }
    }

    async fn backup(
        &self,
        request: &BackupRequest,
        (cancel, stopping): (&CancellationToken, &CancellationToken),
        tell: impl Fn(&Seen),
    ) -> (Result<BackupOutcome, BackupError>, Seen) {
        let roads = self.backup_roads().await;
        let (progress, built_on) = (watch::Sender::new(Progress::default()), watch::Sender::new(String::new()));
        let pace = &self.backups.node().pace;
        let seen =
            || Seen { progress: *progress.borrow(), pace: pace.to_string(), built_on: built_on.borrow().clone() };
        let (wish, mut wishes) = mpsc::channel(WISHES);
        // Whoever ordered it hears of the wish, also where bytes go straight to S3 when it begins.
        let switch_wal = Some(&wish);
        let lines = BackupLines { progress: &progress, built_on: &built_on, switch_wal, cancel, stopping };
        let work = self.backups.take(request, roads, &lines);
        tokio::pin!(work);
        let mut ticks = tokio::time::interval(TELL_EVERY);
        let outcome = loop {
            tokio::select! {
                outcome = &mut work => break outcome,
                Some(lsn) = wishes.recv() => {
                    let _ = self.told.try_send(Told::SwitchWalAsked { lsn: Lsn::as_u64(lsn) });
                }
                _ = ticks.tick() => tell(&seen()),
            }
        };
        if let Ok(outcome) = &outcome {
            let backup = outcome.entry.backup.to_string();
            tracing::info!(
                backup,
                waiting_for = outcome.waiting_for.as_deref().unwrap_or("nothing"),
                backup_type = %outcome.entry.backup_type,
                bytes_read = outcome.bytes_read,
                bytes_stored = outcome.entry.stored_bytes,
                stores = ?outcome.stores,
                lagging = ?outcome.lagging,
                "backup finished"
            );
            for warning in &outcome.warnings {
                tracing::warn!(backup, warning, "a backup deserves a look");
            }
        }
        (outcome, seen())
    }

    /// Makes a primary finish its segment, unless it is past the wanted position already.
    async fn switch_wal(&self, operation: &str, past: Lsn) -> Result<Told, String> {
        let size = self.data.facts().map_err(|error| chain(&error))?.segment_size;
        let position = self.server.position().await.map_err(|error| chain(&error))?;
        if position.role != Role::Primary {
            return Err("this node is in recovery and cannot switch WAL".to_owned());
        }
        let behind =
            past == Lsn::ZERO || SegmentNumber::containing(position.lsn, size) <= SegmentNumber::containing(past, size);
        let (lsn, segment) = if behind {
            let switched = self.server.switch_wal().await.map_err(|error| chain(&error))?;
            (switched.lsn, switched.segment)
        } else {
            (past, last_segment_before(position.timeline, past, size))
        };
        Ok(OrderUpdate {
            operation: operation.to_owned(),
            state: OrderState::Done.into(),
            lsn: lsn.as_u64(),
            wal_file: segment.to_string(),
            ..OrderUpdate::default()
        }
        .into())
    }
}

/// How far a backup is, and what it builds on.
struct Seen {
    progress: Progress,
    pace: String,
    built_on: String,
}

impl Seen {
    /// For people, with the limits that hold while files are read.
    fn step(&self) -> String {
        let pace = if self.progress.step == Step::Copying { &*self.pace } else { "" };
        format!("{}{pace}", self.progress.step.as_str())
    }
}

fn request(backup: BackupId, backup_type: BackupType, label: &str, start_fast: bool, parallel: u32) -> BackupRequest {
    BackupRequest {
        backup,
        backup_type,
        label: label.to_owned(),
        checkpoint: if start_fast { StartCheckpoint::Fast } else { StartCheckpoint::Spread },
        parallel: parallel as usize,
        bytes_per_second: None,
        wal_wait: WAL_WAIT,
        primary: None,
    }
}

fn update(operation: &str, state: OrderState, seen: &Seen) -> OrderUpdate {
    OrderUpdate {
        operation: operation.to_owned(),
        state: state.into(),
        step: seen.step(),
        bytes_done: seen.progress.bytes_done,
        bytes_total: seen.progress.bytes_total,
        built_on: seen.built_on.clone(),
        ..OrderUpdate::default()
    }
}

fn exit_of(error: &BackupError) -> Exit {
    match error {
        BackupError::Server(_) | BackupError::Promoted | BackupError::ArchivingOff | BackupError::NoFullPageWrites => {
            Exit::Postgres
        }
        BackupError::Road(_) | BackupError::Publish { .. } | BackupError::Roots { .. } => Exit::Store,
        BackupError::WalMissing { .. } => Exit::Timeout,
        BackupError::Running | BackupError::Foreign { .. } | BackupError::Cancelled => Exit::Refused,
        _ => Exit::Negative,
    }
}
