//! `GetInfo`: what the stores hold, and the fleet around it.
//!
//! The stores' part is [`repository::info`], the same that anybody gets who reads the repository alone. The stores are
//! asked directly, so the report is right whatever the catalog knows; a store that is away is shown so.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use jiff::Timestamp;
use repository::info::{FleetInfo, Info, LsnInfo, NodeInfo, OperationInfo, ScheduleInfo, StoreInfo};
use repository::name::ClusterName;
use repository::store::ObjectStore;

use crate::Coordinator;
use crate::backups;
use crate::config::ClusterSchedule;
use crate::fleet::{self, Role, Source};
use crate::operations::{Operation, State};
use crate::refusal::Refusal;
use crate::sessions::NodeView;
use crate::stores::{Slot, Stores};

/// How long the stores may take for one cluster.
const COLLECT_WAIT: Duration = Duration::from_secs(60);
/// How long a refused second agent under a node's name is shown; it tries every few seconds.
const RIVAL_SHOWN: Duration = Duration::from_secs(60);
/// Operations shown of each cluster.
const OPERATIONS_SHOWN: u32 = 10;

/// Collects the report about one cluster or all, as JSON.
///
/// # Errors
/// [`Refusal::ClusterUnknown`], or when the catalog fails.
pub async fn collect(
    coordinator: &Coordinator,
    cluster: Option<&ClusterName>,
    now: Timestamp,
) -> Result<String, Refusal> {
    let known = coordinator.clusters.names();
    let wanted = match cluster {
        Some(cluster) if !known.contains(cluster) => {
            return Err(Refusal::ClusterUnknown { cluster: cluster.clone() });
        }
        Some(cluster) => vec![cluster.clone()],
        None => known,
    };
    let readable: Vec<Arc<dyn ObjectStore>> =
        coordinator.stores.readable().iter().map(|slot| Arc::clone(&slot.store)).collect();
    let mut clusters = Vec::new();
    for cluster in wanted {
        let collecting = repository::info::collect(&readable, &cluster, now);
        let mut info = tokio::time::timeout(COLLECT_WAIT, collecting)
            .await
            .map_err(|_| Refusal::NoStore(format!("the stores did not answer within {} s", COLLECT_WAIT.as_secs())))?;
        info.stores = every_store(&coordinator.stores, info.stores);
        for store in &mut info.stores {
            store.retention = Some(coordinator.retention.info(&cluster, &store.store));
        }
        let set_back =
            coordinator.stores.all().iter().filter_map(|slot| coordinator.roots.set_back(slot.name(), &cluster));
        info.problems.extend(set_back.map(|set_back| set_back.to_string()));
        info.problems.extend(coordinator.lost.line(&cluster));
        info.problems.extend(coordinator.soundness.of(&cluster).lines());
        info.fleet = Some(fleet_of(coordinator, &cluster, now).await?);
        clusters.push(info);
    }
    let info = Info::new(now, clusters);
    Ok(serde_json::to_string(&info).expect("a report has only text keys and plain values"))
}

/// What was found of the readable stores, and the others with what the coordinator knows of them: a hung store is not
/// asked, so that the report does not hang with it.
fn every_store(stores: &Stores, mut found: Vec<StoreInfo>) -> Vec<StoreInfo> {
    let one = |slot: &Arc<Slot>| {
        let place = found.iter().position(|info| info.store == *slot.name());
        let away = || StoreInfo::unreachable(slot.name().clone(), slot.health().to_string());
        place.map(|place| found.swap_remove(place)).unwrap_or_else(away)
    };
    stores.all().iter().map(one).collect()
}

async fn fleet_of(coordinator: &Coordinator, cluster: &ClusterName, now: Timestamp) -> Result<FleetInfo, Refusal> {
    let own = coordinator.schedules.iter().filter(|schedule| schedule.cluster == *cluster);
    let schedules = join_all(own.map(|schedule| schedule_info(coordinator, schedule, now))).await;
    let operations = coordinator.operations.list(Some(cluster.clone()), OPERATIONS_SHOWN).await?;
    Ok(FleetInfo {
        nodes: coordinator.sessions.nodes(Some(cluster)).iter().map(node_info).collect(),
        schedules: schedules.into_iter().collect::<Result<_, _>>()?,
        operations: operations.into_iter().map(operation_info).collect(),
    })
}

fn node_info(view: &NodeView) -> NodeInfo {
    let report = view.report.as_ref();
    let state = view.state();
    let problems = [
        report.filter(|report| !report.server_reachable).map(|report| fleet::server_trouble(&report.server_problem)),
        report.filter(|report| !report.archive_problem.is_empty()).map(|report| held_up(&report.archive_problem)),
        report.filter(|report| report.stage >= 2).map(|report| format!("archiving is at stage {}", report.stage)),
        view.rival
            .filter(|refused| *refused <= RIVAL_SHOWN)
            .map(|_| "another agent comes under its name and is refused".to_owned()),
    ];
    NodeInfo {
        node: view.node.clone(),
        connected: view.connected,
        last_seen: Some(view.seen),
        role: match (fleet::role(&state), view.connected) {
            (Role::Unknown, false) => None,
            (Role::Unknown, true) => Some("down".to_owned()),
            (role, _) => Some(role.word().to_owned()),
        },
        timeline: state.timeline,
        lsn: report.map(|_| LsnInfo::from(state.lsn)),
        archived_lsn: None,
        ready_files: report.map(|report| report.ready_files),
        ready_oldest_seconds: report.map(|report| report.oldest_ready_seconds),
        road: report.map(|report| report.road.clone()).filter(|road| !road.is_empty()),
        stage: report.map(|report| report.stage),
        compression_level: report.map(|report| report.compression_level).filter(|level| *level > 0),
        agent_version: Some(view.hello.agent_version.clone()).filter(|version| !version.is_empty()),
        postgres_version: view.server.postgres_major.map(|major| major.to_string()),
        full_in_seconds: report.map(|report| report.time_to_full_seconds).filter(|seconds| *seconds > 0),
        problems: problems.into_iter().flatten().collect(),
    }
}

/// What a file means that is refused while PostgreSQL wants it archived before all others.
pub(crate) fn held_up(problem: &str) -> String {
    format!("PostgreSQL archives nothing until it is rid of a file that is refused: {problem}")
}

async fn schedule_info(
    coordinator: &Coordinator,
    schedule: &ClusterSchedule,
    now: Timestamp,
) -> Result<ScheduleInfo, Refusal> {
    let source = match schedule.source {
        Source::PreferStandby => "prefer-standby",
        Source::Standby => "standby",
        Source::Primary => "primary",
    };
    Ok(ScheduleInfo {
        cron: schedule.schedule.expression().to_owned(),
        zone: schedule.schedule.zone().to_owned(),
        source: source.to_owned(),
        backup_type: schedule.backup_type,
        next_run: schedule.schedule.next_after(now),
        last_run: backups::anchor(coordinator, schedule).await?,
    })
}

fn operation_info(operation: Operation) -> OperationInfo {
    let text = |text: String| Some(text).filter(|text| !text.is_empty());
    let state = match operation.state {
        State::Running => "running",
        State::Done => "done",
        State::Failed => "failed",
        State::WaitingForWal => "waiting for WAL",
    };
    OperationInfo {
        operation: operation.id,
        kind: operation.kind,
        node: Some(operation.node),
        state: state.to_owned(),
        step: text(operation.step),
        bytes_done: Some(operation.bytes_done),
        bytes_total: Some(operation.bytes_total).filter(|bytes| *bytes > 0),
        started: Some(operation.started),
        ended: operation.ended,
        error: text(operation.error),
        backup: operation.backup,
    }
}
