//! Starting base backups, by request and by schedule, and giving up on those nobody hears of.
//!
//! Which node is fit is decided in [`crate::fleet`], when a run is due in [`crate::schedule`]; here the order is given. What
//! a backup builds on is the node's choice, which sees the stores and its own history.
//! A due run without a fit node stays due and is tried again; its reason is logged once. Several runs of a cluster that are
//! due at once are one backup, of the fullest type among them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use process::clock;
use proto::fleet::{BackupType as WireType, Cancel, TakeBackup, order};
use repository::backup::origin::BackupType;
use repository::name::{BackupId, ClusterName, NodeName};

use crate::Coordinator;
use crate::catalog::{CatalogError, backups as rows, wal as wal_rows};
use crate::config::ClusterSchedule;
use crate::fleet::{self, NodeState, Shape, ShapeWish, Source};
use crate::lines;
use crate::operations::{Begun, NewBackup, Operation};
use crate::pace::Pace;
use crate::pins;
use crate::refusal::Refusal;
use crate::schedule::Due;
use crate::writer::Line;

/// How often schedules are looked at.
const TICK: Duration = Duration::from_secs(5);
/// A running operation not heard of for this long has failed.
const OPERATION_SILENCE_MAX: Duration = Duration::from_secs(300);
/// Longest label, in bytes.
pub const LABEL_BYTES_MAX: usize = 200;

/// What backup is asked for.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// Node to take it from; the coordinator chooses if absent.
    pub node: Option<NodeName>,
    /// Where it may be taken.
    pub source: Source,
    /// How a standby's files are copied.
    pub shape: ShapeWish,
    /// What it may build on.
    pub backup_type: BackupType,
    /// Request an immediate checkpoint.
    pub start_fast: bool,
    /// How fast; what is not said is the cluster's policy.
    pub pace: Pace,
    /// For people.
    pub label: String,
    /// The caller's identifier of the request.
    pub request_id: Option<String>,
    /// Why now, for people.
    pub why: String,
}

/// The states of a cluster's nodes, with who writes the timelines of those out of recovery.
async fn states(coordinator: &Coordinator, cluster: &ClusterName) -> Result<Vec<NodeState>, CatalogError> {
    let mut states = Vec::new();
    for view in coordinator.sessions.nodes(Some(cluster)) {
        let mut state = view.state();
        if let Some(timeline) = state.timeline.filter(|_| !state.in_recovery) {
            let line = Line { cluster: cluster.clone(), system: view.server.system_identifier, timeline };
            state.foreign_to = coordinator.writers.of(&line).await?.filter(|writer| *writer != state.node);
        }
        states.push(state);
    }
    Ok(states)
}

/// Starts a base backup, or finds the one that the same request started before.
///
/// # Errors
/// [`Refusal::ClusterUnknown`], [`Refusal::NoFitNode`], [`Refusal::BackupRunning`], or that the node is gone.
pub async fn start(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    asked: Asked,
    now: Timestamp,
) -> Result<Operation, Refusal> {
    if coordinator.clusters.systems_of(cluster).is_empty() {
        return Err(Refusal::ClusterUnknown { cluster: cluster.clone() });
    }
    if let Some(before) = coordinator.operations.by_request(asked.request_id.as_deref()).await? {
        return Ok(before);
    }
    coordinator.roots.expect_a_store(&coordinator.stores, cluster)?;
    coordinator.sessions.settled(cluster).await;
    let nodes = states(coordinator, cluster).await?;
    let line = lines::of_primary(coordinator, cluster, &nodes).await;
    let choice = fleet::choose(&nodes, asked.node.as_ref(), (asked.source, asked.shape), line.as_ref())?;
    let primary = match &choice.shape {
        Shape::Hybrid { primary } => Some(primary.clone()),
        Shape::Primary | Shape::Standby => None,
    };
    let backup = BackupId::new(now, random());
    let new = NewBackup {
        cluster: cluster.clone(),
        node: choice.node.clone(),
        primary: primary.clone(),
        backup,
        reason: format!("{}; {}", asked.why, choice.reason),
        request_id: asked.request_id.clone(),
    };
    let (operation, begun) = coordinator.operations.begin(new, now).await?;
    if begun == Begun::Before {
        return Ok(operation);
    }
    pins::begin(coordinator, cluster, backup, &choice.node, now).await;
    let pace = asked.pace.or(coordinator.paces.get(cluster).copied().unwrap_or_default());
    let order = order::What::TakeBackup(TakeBackup {
        backup: backup.to_string(),
        start_fast: asked.start_fast,
        parallel: pace.parallel,
        label: asked.label,
        r#type: to_wire(asked.backup_type).into(),
        primary: primary.map(|primary| primary.to_string()).unwrap_or_default(),
        bytes_per_second: pace.bytes_per_second,
    });
    if let Err(refusal) = coordinator.sessions.order(cluster, &choice.node, &operation.id, order) {
        coordinator.operations.fail(&operation.id, refusal.to_string(), now).await;
        pins::give_up(coordinator, cluster, backup).await;
        return Err(refusal);
    }
    tracing::info!(%cluster, node = %choice.node, %backup, reason = operation.reason, "a backup was ordered");
    Ok(operation)
}

fn to_wire(backup_type: BackupType) -> WireType {
    match backup_type {
        BackupType::Full => WireType::Full,
        BackupType::Diff => WireType::Diff,
        BackupType::Incr => WireType::Incr,
    }
}

/// Asks for an operation to stop. Without the node's session nobody can stop it, and it counts as failed.
///
/// # Errors
/// [`Refusal::OperationUnknown`].
pub async fn cancel(coordinator: &Coordinator, id: &str, now: Timestamp) -> Result<Operation, Refusal> {
    let operation = coordinator.operations.get(id).await?;
    if operation.ended.is_some() {
        return Ok(operation);
    }
    if coordinator.operations.cancel_waiting(id, now).await {
        if let Some(backup) = operation.backup {
            pins::give_up(coordinator, &operation.cluster, backup).await;
        }
        return coordinator.operations.get(id).await;
    }
    let cancel = order::What::Cancel(Cancel { operation: id.to_owned() });
    match coordinator.sessions.order(&operation.cluster, &operation.node, id, cancel) {
        Ok(()) => {
            coordinator.operations.update(id, |operation| operation.step = "being cancelled".to_owned()).await;
        }
        Err(refusal) => {
            coordinator.operations.fail(id, format!("cancelled while {refusal}"), now).await;
        }
    }
    coordinator.operations.get(id).await
}

/// Looks at schedules, silent operations and metrics until the coordinator stops.
pub async fn run(coordinator: Arc<Coordinator>) {
    let mut scheduler = Scheduler { waiting: HashMap::new(), since: clock::now() };
    loop {
        tokio::select! {
            () = coordinator.stop.cancelled() => return,
            () = tokio::time::sleep(TICK) => {}
        }
        let now = clock::now();
        let mut schedules: Vec<&ClusterSchedule> = coordinator.schedules.iter().collect();
        schedules.sort_by(|one, other| one.cluster.cmp(&other.cluster));
        for of_cluster in schedules.chunk_by(|one, other| one.cluster == other.cluster) {
            if let Err(error) = scheduler.look_at(&coordinator, of_cluster, now).await {
                tracing::error!(%error, cluster = %of_cluster[0].cluster, "schedules could not be looked at");
            }
        }
        for operation in coordinator.operations.silent(OPERATION_SILENCE_MAX) {
            let silence = format!("node {} said nothing for {} s", operation.node, OPERATION_SILENCE_MAX.as_secs());
            coordinator.metrics.count_ended("failed");
            coordinator.operations.fail(&operation.id, silence, now).await;
        }
        refresh_metrics(&coordinator).await;
    }
}

struct Scheduler {
    /// Due runs that wait for a fit node, with the reason last logged.
    waiting: HashMap<(ClusterName, String), String>,
    /// A schedule that never ran counts from here.
    since: Timestamp,
}

impl Scheduler {
    /// Starts what is due of one cluster's schedules.
    async fn look_at(
        &mut self,
        coordinator: &Coordinator,
        schedules: &[&ClusterSchedule],
        now: Timestamp,
    ) -> Result<(), CatalogError> {
        let mut due = Vec::new();
        self.since = self.since.min(now);
        for schedule in schedules {
            let anchor = begins(anchor(coordinator, schedule).await?, self.since, now);
            if let Due::Now { reason, .. } = schedule.schedule.due(anchor, now) {
                due.push((*schedule, reason));
            }
        }
        let Some((schedule, reason)) = fullest(&due) else { return Ok(()) };
        let (cluster, place) = (schedule.cluster.clone(), schedule.schedule.expression().to_owned());
        let place = (cluster.clone(), place);
        let asked = Asked {
            source: schedule.source,
            shape: schedule.shape,
            backup_type: schedule.backup_type,
            start_fast: schedule.start_fast,
            why: reason.clone(),
            ..Asked::default()
        };
        match start(coordinator, &cluster, asked, now).await {
            Ok(_) => {
                self.waiting.remove(&place);
                let ran: Vec<String> =
                    due.iter().map(|(schedule, _)| schedule.schedule.expression().to_owned()).collect();
                coordinator
                    .catalog
                    .call(move |connection| {
                        ran.iter().try_for_each(|expression| rows::put_run(connection, &cluster, expression, now))
                    })
                    .await
            }
            Err(refusal) => {
                let text = refusal.to_string();
                if self.waiting.get(&place) != Some(&text) {
                    tracing::info!(%cluster, reason = text, "a scheduled backup is due and waits");
                    self.waiting.insert(place, text);
                }
                Ok(())
            }
        }
    }
}

/// Of runs that are due at once, the one whose backup serves for all.
fn fullest<'a>(due: &'a [(&'a ClusterSchedule, String)]) -> Option<&'a (&'a ClusterSchedule, String)> {
    due.iter().min_by_key(|(schedule, _)| schedule.backup_type)
}

/// When a schedule last ran: what the catalog remembers, else the newest backup, which survives the catalog.
pub async fn anchor(coordinator: &Coordinator, schedule: &ClusterSchedule) -> Result<Option<Timestamp>, CatalogError> {
    let (cluster, expression) = (schedule.cluster.clone(), schedule.schedule.expression().to_owned());
    coordinator
        .catalog
        .call(move |connection| match rows::last_run(connection, &cluster, &expression)? {
            Some(last) => Ok(Some(last)),
            None => rows::newest_start(connection, &cluster),
        })
        .await
}

/// From when on occurrences count. A run of tomorrow was noted by a clock that has been set back since, and would hold up
/// the schedule until then.
fn begins(last: Option<Timestamp>, since: Timestamp, now: Timestamp) -> Timestamp {
    last.filter(|last| *last <= now).unwrap_or(since)
}

async fn refresh_metrics(coordinator: &Coordinator) {
    let metrics = &coordinator.metrics;
    let missing = coordinator.catalog.call(|connection| wal_rows::missing_counts(connection)).await;
    metrics.set_stores(&coordinator.stores, &missing.unwrap_or_default());
    metrics.set_set_back(&coordinator.stores, &coordinator.roots.all_set_back());
    metrics.sessions.set(coordinator.sessions.connected() as i64);
    metrics.operations_running.set(coordinator.operations.running().len() as i64);
    metrics.catalog_bytes.set(coordinator.catalog.size_bytes().cast_signed());
    metrics.set_nodes(coordinator.sessions.nodes(None));
    let running = coordinator.operations.running();
    let of_cluster =
        |name: &ClusterName| running.iter().filter(|one| one.kind == "backup" && one.cluster == *name).count();
    let names = coordinator.clusters.names();
    let clusters: Vec<_> = names.into_iter().map(|name| (name.clone(), of_cluster(&name))).collect();
    if let Ok(newest) = coordinator.catalog.call(|connection| rows::newest_by_type(connection)).await {
        metrics.set_backups(&clusters, &newest);
        metrics.set_measured(clock::now());
    }
    let known: Vec<_> = coordinator.clusters.names().iter().map(|name| coordinator.soundness.of(name)).collect();
    metrics.set_soundness(&coordinator.stores, &known);
}

/// Bits that keep two backups of one second apart.
fn random() -> u32 {
    let bytes = *uuid::Uuid::now_v7().as_bytes();
    u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Schedule;

    #[test]
    fn a_run_of_tomorrow_does_not_hold_up_the_schedule() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let (since, now) = (at("2026-11-23T10:00:00Z"), at("2026-11-23T12:00:00Z"));
        assert_eq!(begins(None, since, now), since);
        assert_eq!(begins(Some(at("2026-11-23T11:30:00Z")), since, now), at("2026-11-23T11:30:00Z"));
        assert_eq!(begins(Some(at("2026-11-24T11:30:00Z")), since, now), since);
    }

    #[test]
    fn of_runs_due_at_once_the_fullest_serves_for_all() {
        let schedule = |expression: &str, backup_type| ClusterSchedule {
            cluster: "main".parse().unwrap(),
            schedule: Schedule::new(expression, "UTC", "2026-01-01T00:00:00Z".parse().unwrap()).unwrap(),
            source: Source::PreferStandby,
            shape: ShapeWish::Auto,
            backup_type,
            start_fast: false,
        };
        let daily = schedule("0 2 * * *", BackupType::Incr);
        let weekly = schedule("0 2 * * SUN", BackupType::Diff);
        let monthly = schedule("0 2 1 * *", BackupType::Full);
        let chosen = |due: &[&ClusterSchedule]| {
            let due: Vec<_> = due.iter().map(|schedule| (*schedule, String::new())).collect();
            fullest(&due).map(|(schedule, _)| schedule.backup_type)
        };
        assert_eq!(chosen(&[&daily, &weekly, &monthly]), Some(BackupType::Full));
        assert_eq!(chosen(&[&daily, &weekly]), Some(BackupType::Diff));
        assert_eq!(chosen(&[&daily]), Some(BackupType::Incr));
        assert_eq!(chosen(&[]), None);
    }
}
