//! Which line of timelines the cluster's primary is on, as the stores' histories tell, and who left it.
//!
//! A standby can follow a dead primary's WAL past the place where the new one's timeline began. It goes on as if nothing were,
//! and a backup of it is a backup of what was lost. Whether a position lies on the primary's line is decided in
//! [`crate::fleet::Line`]; here its history is looked up, for at most the stores' patience.

use std::sync::Arc;

use postgres_format::Timeline;
use postgres_format::timeline_history::TimelineHistory;
use repository::name::ClusterName;
use repository::root::RootBackup;
use repository::store::ObjectStore;
use repository::wal::line::{Following, followed_history};

use crate::Coordinator;
use crate::fleet::{self, Line, NodeState};

/// The line of the one primary among `nodes`; `None` without one.
pub async fn of_primary(coordinator: &Coordinator, cluster: &ClusterName, nodes: &[NodeState]) -> Option<Line> {
    let primary = fleet::primary(nodes)?;
    let timeline = primary.timeline?;
    let history = match timeline {
        Timeline::FIRST => None,
        timeline => history(coordinator, cluster, timeline).await,
    };
    Some(Line { primary: primary.node.clone(), timeline, history })
}

async fn history(coordinator: &Coordinator, cluster: &ClusterName, timeline: Timeline) -> Option<TimelineHistory> {
    let system = coordinator.clusters.systems_of(cluster).last()?.system_identifier;
    let stores: Vec<Arc<dyn ObjectStore>> =
        coordinator.stores.readable().iter().map(|slot| Arc::clone(&slot.store)).collect();
    let asked = followed_history(&stores, cluster, system, Following::Timeline(timeline));
    tokio::time::timeout(coordinator.stores.patience(), asked).await.ok()?.0
}

/// Why a backup is not one of the cluster's line, if that is so. Without a primary nothing is said about it.
pub async fn left_by(coordinator: &Coordinator, cluster: &ClusterName, entry: &RootBackup) -> Option<String> {
    let line = of_primary(coordinator, cluster, &coordinator.sessions.states(cluster)).await?;
    let history = line.history.as_ref()?;
    let (timeline, end) = (entry.stop_timeline, entry.consistent_lsn());
    if timeline > line.timeline || history.contains(timeline, end) || history.end_of(timeline) == Some(end) {
        return None;
    }
    Some(format!("node {} ended it at {end} on timeline {timeline}{}", entry.node, line.told_left(timeline)))
}
