//! Starting base backups, by request and by schedule, and giving up on those nobody hears of.
//!
//! Which node is fit is decided in [`crate::fleet`], when a run is due in [`crate::schedule`]; here the order is given.
//! A due run without a fit node stays due and is tried again; its reason is logged once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use process::clock;
use proto::fleet::{Cancel, TakeBackup, order};
use repository::name::{BackupId, ClusterName, NodeName};

use crate::Coordinator;
use crate::catalog::{CatalogError, backups as rows, wal as wal_rows};
use crate::config::ClusterSchedule;
use crate::fleet::{self, Source};
use crate::operations::{Begun, NewBackup, Operation};
use crate::refusal::Refusal;
use crate::schedule::Due;

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
    /// Request an immediate checkpoint.
    pub start_fast: bool,
    /// Workers; 0 means the agent's default.
    pub parallel: u32,
    /// For people.
    pub label: String,
    /// The caller's identifier of the request.
    pub request_id: Option<String>,
    /// Why now, for people.
    pub why: String,
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
    coordinator.sessions.settled(cluster).await;
    let choice = fleet::choose(&coordinator.sessions.states(cluster), asked.node.as_ref(), asked.source)?;
    let backup = BackupId::new(now, random());
    let new = NewBackup {
        cluster: cluster.clone(),
        node: choice.node.clone(),
        backup,
        reason: format!("{}; {}", asked.why, choice.reason),
        request_id: asked.request_id.clone(),
    };
    let (operation, begun) = coordinator.operations.begin(new, now).await?;
    if begun == Begun::Before {
        return Ok(operation);
    }
    let order = order::What::TakeBackup(TakeBackup {
        backup: backup.to_string(),
        start_fast: asked.start_fast,
        parallel: asked.parallel,
        label: asked.label,
    });
    if let Err(refusal) = coordinator.sessions.order(cluster, &choice.node, &operation.id, order) {
        coordinator.operations.fail(&operation.id, refusal.to_string(), now).await;
        return Err(refusal);
    }
    tracing::info!(%cluster, node = %choice.node, %backup, reason = operation.reason, "a backup was ordered");
    Ok(operation)
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
        for schedule in &coordinator.schedules {
            if let Err(error) = scheduler.look_at(&coordinator, schedule, now).await {
                tracing::error!(%error, cluster = %schedule.cluster, "a schedule could not be looked at");
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
    async fn look_at(
        &mut self,
        coordinator: &Coordinator,
        schedule: &ClusterSchedule,
        now: Timestamp,
    ) -> Result<(), CatalogError> {
        let anchor = anchor(coordinator, schedule).await?.unwrap_or(self.since);
        let Due::Now { reason, .. } = schedule.schedule.due(anchor, now) else { return Ok(()) };
        let place = (schedule.cluster.clone(), schedule.schedule.expression().to_owned());
        let asked = Asked { source: schedule.source, start_fast: schedule.start_fast, why: reason, ..Asked::default() };
        match start(coordinator, &schedule.cluster, asked, now).await {
            Ok(_) => {
                self.waiting.remove(&place);
                let (cluster, expression) = place;
                coordinator.catalog.call(move |connection| rows::put_run(connection, &cluster, &expression, now)).await
            }
            Err(refusal) => {
                let text = refusal.to_string();
                if self.waiting.get(&place) != Some(&text) {
                    tracing::info!(cluster = %schedule.cluster, reason = text, "a scheduled backup is due and waits");
                    self.waiting.insert(place, text);
                }
                Ok(())
            }
        }
    }
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

async fn refresh_metrics(coordinator: &Coordinator) {
    let metrics = &coordinator.metrics;
    let missing = coordinator.catalog.call(|connection| wal_rows::missing_counts(connection)).await;
    metrics.set_stores(&coordinator.stores, &missing.unwrap_or_default());
    metrics.sessions.set(coordinator.sessions.connected() as i64);
    metrics.operations_running.set(coordinator.operations.running().len() as i64);
    metrics.catalog_bytes.set(coordinator.catalog.size_bytes().cast_signed());
}

/// Bits that keep two backups of one second apart.
fn random() -> u32 {
    let bytes = *uuid::Uuid::now_v7().as_bytes();
    u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]])
}
