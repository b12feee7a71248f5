//! Comparing servers with backups: whose pages are read when, and what becomes of what was found.
//!
//! An agent reads its server's pages, verifies them, and compares those that were not changed since with what the newest
//! backup holds, by the rules of [`repository::verify::source`]. Here is decided which node is asked and for which part: each
//! night a thirtieth of the files of every node, by the days of [`crate::scrub`]; or all files of one node, when somebody asks.
//! What is found stays known, node by node, until the file is looked at again. Nothing is changed by it.
//!
//! One comparison of a node runs at a time; nodes compare beside each other, each at its own rate. A node whose agent is older
//! is left out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use process::clock;
use proto::fleet::{ComparePages, order};
use repository::name::{ClusterName, NodeName};
use repository::verify::Share;
use repository::verify::source::SourceReport;

use crate::Coordinator;
use crate::operations::{Begun, NewWork, Operation};
use crate::refusal::Refusal;
use crate::schedule::{Due, Schedule};
use crate::scrub::{NIGHTS, due_parts};
use crate::sessions::NodeView;
use crate::verify::end_well;

/// Kind of these operations.
pub const KIND: &str = "compare";
/// How often it is looked whether a night has begun.
const TICK: Duration = Duration::from_secs(30);
/// Most nodes that compare at once, so that there is always room for other operations.
const NODES_AT_ONCE: usize = 16;
/// Longest wait for the comparison of one part.
const PART_PATIENCE: Duration = Duration::from_secs(12 * 3600);

/// What is asked of a node.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Of which cluster.
    pub cluster: ClusterName,
    /// Whose pages; the coordinator chooses if absent.
    pub node: Option<NodeName>,
    /// Which files; all if absent.
    pub share: Option<Share>,
    /// Bytes a second at most; 0 for no limit.
    pub bytes_per_second: u64,
    /// For people.
    pub why: String,
    /// The caller's identifier of the request.
    pub request_id: Option<String>,
}

/// What of a node counts here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    node: NodeName,
    /// Why it cannot be asked.
    unable: Option<&'static str>,
    in_recovery: bool,
}

impl Candidate {
    fn of(view: &NodeView) -> Self {
        let state = view.state();
        let unable = match (view.connected, view.hello.compares_pages, state.server_reachable) {
            (false, _, _) => Some("its agent is not connected"),
            (_, false, _) => Some("its agent is older and does not know how"),
            (_, _, false) => Some("its server gives no answer"),
            (true, true, true) => None,
        };
        Self { node: view.node.clone(), unable, in_recovery: state.in_recovery }
    }
}

/// PURE: the node that is asked for, or the primary, or any other that can be asked.
fn choose(candidates: &[Candidate], asked: Option<&NodeName>) -> Result<NodeName, String> {
    let Some(asked) = asked else {
        let able = candidates.iter().filter(|candidate| candidate.unable.is_none());
        let chosen = able.min_by_key(|candidate| candidate.in_recovery);
        return chosen.map(|candidate| candidate.node.clone()).ok_or_else(|| {
            let why = |candidate: &Candidate| {
                candidate.unable.map(|unable| format!("{}: {unable}", candidate.node)).unwrap_or_default()
            };
            let reasons: Vec<String> = candidates.iter().map(why).collect();
            format!("no node can compare its pages: {}", reasons.join("; "))
        });
    };
    match candidates.iter().find(|candidate| candidate.node == *asked) {
        None => Err(format!("no agent of node {asked} was seen")),
        Some(Candidate { unable: Some(unable), .. }) => Err(format!("node {asked} cannot compare its pages: {unable}")),
        Some(Candidate { unable: None, .. }) => Ok(asked.clone()),
    }
}

/// PURE: whether these are comparisons of two nodes: nothing of one stands in the other's way.
pub fn are_of_two_nodes(one: &Operation, other: &Operation) -> bool {
    one.kind == KIND && other.kind == KIND && one.node != other.node
}

fn candidates(coordinator: &Coordinator, cluster: &ClusterName) -> Vec<Candidate> {
    coordinator.sessions.nodes(Some(cluster)).iter().map(Candidate::of).collect()
}

/// Has a node compare its pages, or finds the operation that the same request started before.
///
/// # Errors
/// [`Refusal::ClusterUnknown`], [`Refusal::Precondition`] if no node can be asked or another comparison of the node runs.
pub async fn start(coordinator: &Coordinator, asked: Asked) -> Result<Operation, Refusal> {
    let Asked { cluster, node, share, bytes_per_second, why, request_id } = asked;
    if coordinator.clusters.systems_of(&cluster).is_empty() {
        return Err(Refusal::ClusterUnknown { cluster });
    }
    if let Some(before) = coordinator.operations.by_request(request_id.as_deref()).await? {
        return Ok(before);
    }
    coordinator.sessions.settled(&cluster).await;
    let node = choose(&candidates(coordinator, &cluster), node.as_ref()).map_err(Refusal::Precondition)?;
    let new = NewWork { kind: KIND, cluster: cluster.clone(), node: Some(node.clone()), reason: why, request_id };
    let (operation, begun) = coordinator.operations.begin_work(new, clock::now()).await?;
    if begun == Begun::Before {
        return Ok(operation);
    }
    let Share { part, of } = share.unwrap_or(Share { part: 0, of: 1 });
    let order = order::What::ComparePages(ComparePages { part, of, bytes_per_second });
    if let Err(refusal) = coordinator.sessions.order(&cluster, &node, &operation.id, order) {
        coordinator.operations.fail(&operation.id, refusal.to_string(), clock::now()).await;
        return Err(refusal);
    }
    Ok(operation)
}

/// Takes up what a node found, and ends its operation.
pub async fn conclude(coordinator: &Coordinator, operation: &str, report_json: String) {
    let report: SourceReport = match serde_json::from_str(&report_json) {
        Ok(report) => report,
        Err(error) => {
            let error = format!("what the node found cannot be read by this version: {error}");
            coordinator.metrics.count_ended("failed");
            coordinator.operations.fail(operation, error, clock::now()).await;
            return;
        }
    };
    if let Err(error) = coordinator.soundness.take_source(&report, clock::now()).await {
        tracing::error!(%error, cluster = %report.cluster, "the catalog did not take what a comparison found");
    }
    tracing::info!(cluster = %report.cluster, node = %report.node, backup = %report.backup, compared = report.compared,
        changed = report.changed, wrong = report.wrong, "a server's pages were compared with a backup");
    coordinator.soundness.keep_report(operation, report_json);
    coordinator.metrics.count_ended("done");
    end_well(coordinator, operation, report.summary()).await;
}

/// Compares a part of every node's files each night until the coordinator stops.
pub async fn run(coordinator: Arc<Coordinator>, schedule: Schedule, bytes_per_second: u64) {
    let since = clock::now();
    let mut nights = BTreeMap::new();
    loop {
        tokio::select! {
            () = coordinator.stop.cancelled() => return,
            () = tokio::time::sleep(TICK) => {}
        }
        nights.retain(|_, night: &mut tokio::task::JoinHandle<()>| !night.is_finished());
        for cluster in coordinator.clusters.names() {
            for candidate in candidates(&coordinator, &cluster) {
                let now = clock::now();
                let known = coordinator.soundness.of(&cluster).servers.remove(&candidate.node).unwrap_or_default();
                let due = matches!(schedule.due(known.last_night.unwrap_or(since), now), Due::Now { .. });
                let place = (cluster.clone(), candidate.node);
                let busy = nights.len() >= NODES_AT_ONCE || nights.contains_key(&place);
                if candidate.unable.is_some() || !due || busy {
                    continue;
                }
                let (coordinator_too, (of, node)) = (Arc::clone(&coordinator), place.clone());
                let night = coordinator.tracker.spawn(async move {
                    tokio::select! {
                        () = coordinator_too.stop.cancelled() => {}
                        () = night(&coordinator_too, &of, &node, bytes_per_second, now) => {}
                    }
                });
                nights.insert(place, night);
            }
        }
    }
}

/// Has a node compare the parts that are due. What does not come about is made up for in later nights.
async fn night(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    node: &NodeName,
    bytes_per_second: u64,
    now: Timestamp,
) {
    let known = coordinator.soundness.of(cluster).servers.remove(node).unwrap_or_default();
    for part in due_parts(&known.shares, now) {
        let asked = Asked {
            cluster: cluster.clone(),
            node: Some(node.clone()),
            share: Some(Share { part, of: NIGHTS }),
            bytes_per_second,
            why: format!("part {} of {NIGHTS} is due", part + 1),
            request_id: None,
        };
        let ended = match start(coordinator, asked).await {
            Ok(operation) => coordinator.operations.wait(&operation.id, PART_PATIENCE).await,
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = ended {
            tracing::info!(%cluster, %node, reason = %refusal, "a server's pages are not compared tonight");
            break;
        }
    }
    let note = |known: &mut crate::soundness::Known| {
        known.servers.entry(node.clone()).or_default().note_night(now);
    };
    if let Err(error) = coordinator.soundness.change(cluster, note).await {
        tracing::error!(%error, %cluster, "the catalog did not take that a night was begun");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_asked_for_or_the_primary_compares() {
        let candidate =
            |node: &str, unable, in_recovery| Candidate { node: node.parse().unwrap(), unable, in_recovery };
        let all = [
            candidate("db1", Some("its agent is not connected"), false),
            candidate("db2", None, true),
            candidate("db3", None, false),
        ];
        let check = |asked: Option<&str>, expected: Result<&str, &str>| {
            let asked: Option<NodeName> = asked.map(|asked| asked.parse().unwrap());
            let chosen = choose(&all, asked.as_ref());
            let chosen = chosen.as_ref().map(NodeName::as_str).map_err(String::as_str);
            assert_eq!(chosen, expected);
        };
        check(None, Ok("db3"));
        check(Some("db2"), Ok("db2"));
        check(Some("db1"), Err("node db1 cannot compare its pages: its agent is not connected"));
        check(Some("db9"), Err("no agent of node db9 was seen"));
        assert_eq!(choose(&all[..2], None).unwrap().as_str(), "db2");
        let none = choose(&all[..1], None).unwrap_err();
        assert_eq!(none, "no node can compare its pages: db1: its agent is not connected");
    }

    #[tokio::test]
    async fn comparisons_of_two_nodes_are_made_beside_each_other() {
        let (catalog, _thread, _) = crate::catalog::Catalog::in_memory().unwrap();
        let operations = crate::operations::Operations::load(catalog).await.unwrap();
        let begins = async |kind: &'static str, node: &str| {
            let (cluster, node) = ("main".parse().unwrap(), Some(node.parse().unwrap()));
            let new = NewWork { kind, cluster, node, reason: "due".to_owned(), request_id: None };
            operations.begin_work(new, clock::now()).await.is_ok()
        };
        assert!(begins(KIND, "db1").await && begins(KIND, "db2").await && !begins(KIND, "db1").await);
        assert!(begins("verify", "db1").await && !begins("verify", "db2").await);
    }
}
