//! `CheckCluster`: a WAL segment is forced through, and one line says for each rule whether it holds.

use std::time::Duration;

use futures_util::future::join_all;
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, WalFileName};
use process::clock::{self, Monotonic};
use proto::operator::{CheckLine, CheckState};
use repository::info::RetentionInfo;
use repository::name::{ClusterName, NodeName, StoreName};
use repository::root::{RootBackup, SetBack};
use repository::wal::{self, Located};

use crate::Coordinator;
use crate::catalog::backups;
use crate::catalog::lost::Lost;
use crate::fleet::{self, Line, NodeState, Role};
use crate::info::held_up;
use crate::refusal::Refusal;
use crate::sessions::NodeView;
use crate::soundness::Known;
use crate::stores::{Health, Slot, chain};

/// How often a store is asked for the segment.
const POLL: Duration = Duration::from_millis(250);
/// How long PostgreSQL has at least to ask for a segment that is durable already, and the agent to report that it did.
const ASKED_WAIT: Duration = Duration::from_secs(10);

/// Checks a cluster; a broken rule is a line, not an error.
///
/// # Errors
/// [`Refusal::ClusterUnknown`].
pub async fn check(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    longest: Duration,
) -> Result<Vec<CheckLine>, Refusal> {
    let systems = coordinator.clusters.systems_of(cluster);
    let Some(newest) = systems.last() else { return Err(Refusal::ClusterUnknown { cluster: cluster.clone() }) };
    let nodes = coordinator.sessions.nodes(Some(cluster));
    let mut lines = vec![identity(newest.system_identifier, &nodes)];
    let states: Vec<NodeState> = nodes.iter().map(NodeView::state).collect();
    let primarys = crate::lines::of_primary(coordinator, cluster, &states).await;
    lines.extend(nodes.iter().map(|node| road(node, primarys.as_ref())));
    lines.extend(several_primaries(&states));
    lines.extend(coordinator.stores.all().iter().map(|slot| {
        let set_back = coordinator.roots.set_back(slot.name(), cluster);
        store(slot, set_back.as_ref())
    }));
    lines.push(archived(coordinator, cluster, newest.segment_size).await);
    lines.push(contents(&coordinator.soundness.of(cluster)));
    lines.extend(coordinator.stores.all().iter().map(|slot| {
        let retention = coordinator.retention.info(cluster, slot.name());
        retained(slot.name(), &retention)
    }));
    lines.extend(segment(coordinator, cluster, newest.system_identifier, longest).await);
    Ok(lines)
}

fn line(rule: impl Into<String>, state: CheckState, text: impl Into<String>) -> CheckLine {
    CheckLine { rule: rule.into(), state: state.into(), text: text.into() }
}

fn identity(expected: SystemIdentifier, nodes: &[NodeView]) -> CheckLine {
    let rule = "identity";
    let foreign: Vec<String> = nodes
        .iter()
        .filter(|node| node.server.system_identifier != expected)
        .map(|node| format!("{} has {}", node.node, node.server.system_identifier))
        .collect();
    match (nodes.iter().any(|node| node.connected), foreign.is_empty()) {
        (_, false) => line(rule, CheckState::Failed, format!("expected {expected}, {}", foreign.join(", "))),
        (false, _) => line(rule, CheckState::Failed, "no agent of this cluster is connected; start pgconvoy-agent"),
        (true, true) => line(rule, CheckState::Ok, format!("system identifier {expected}")),
    }
}

/// Two servers out of recovery with one system identifier are two histories, whatever else is in order.
fn several_primaries(nodes: &[NodeState]) -> Option<CheckLine> {
    let primaries: Vec<String> = nodes
        .iter()
        .filter(|node| fleet::role(node) == Role::Primary)
        .map(|node| node.timeline.map_or_else(|| node.node.to_string(), |on| format!("{} on timeline {on}", node.node)))
        .collect();
    let text = format!("{} accept writes, expected one server; stop the others", primaries.join(", "));
    (primaries.len() > 1).then(|| line("one primary", CheckState::Failed, text))
}

fn road(node: &NodeView, primarys: Option<&Line>) -> CheckLine {
    let rule = format!("node {}", node.node);
    let Some(report) = node.report.as_ref().filter(|_| node.connected) else {
        return line(rule, CheckState::Warning, format!("not connected, last seen {}", node.seen));
    };
    let role = fleet::role(&node.state()).word();
    let waiting = match report.ready_files {
        0 => String::new(),
        files => format!(", {files} files wait, the oldest for {} s", report.oldest_ready_seconds),
    };
    let text = format!("{role} on timeline {}, road {}{waiting}", report.timeline, report.road);
    let state = node.state();
    let left = primarys.filter(|_| fleet::role(&state) == Role::Standby).and_then(|line| line.left(&state));
    if let Some(left) = left {
        let way_out =
            "unless it is just catching up it follows a dead line: rebuild it from a backup of the primary's line";
        return line(rule, CheckState::Failed, format!("{text}; {left}; {way_out}"));
    }
    match (report.server_reachable, report.road.as_str(), report.stage) {
        (false, _, _) => {
            line(rule, CheckState::Failed, format!("{text}; {}", fleet::server_trouble(&report.server_problem)))
        }
        (true, _, _) if !report.archive_problem.is_empty() => {
            line(rule, CheckState::Failed, format!("{text}; {}", held_up(&report.archive_problem)))
        }
        (true, "coordinator", 0) => line(rule, CheckState::Ok, text),
        (true, _, stage) => line(rule, CheckState::Warning, format!("{text}, stage {stage}")),
    }
}

/// What was archived is in a store, as far as listings tell.
async fn archived(coordinator: &Coordinator, cluster: &ClusterName, size: Option<SegmentSize>) -> CheckLine {
    let rule = "archived WAL";
    let (Some(lost), Some(told)) = (coordinator.lost.of(cluster), coordinator.lost.line(cluster)) else {
        return line(rule, CheckState::Ok, "none is known to be in no store any more");
    };
    let asked = cluster.clone();
    let entry = coordinator.catalog.call(move |connection| backups::newest_entry(connection, &asked)).await;
    let backup = entry.ok().flatten().and_then(|json| RootBackup::from_json(&json).ok());
    match backup.filter(|backup| is_behind(&lost, backup, size)) {
        Some(backup) => {
            let text = format!(
                "{told}; backup {} and what follows it do not need it; it is told until no older backup is kept",
                backup.backup
            );
            line(rule, CheckState::Warning, text)
        }
        None => {
            let text =
                format!("{told}; agents send again what their servers still have; if it stays so, take a backup");
            line(rule, CheckState::Failed, text)
        }
    }
}

/// PURE: whether all that is lost lies before the start of a backup.
fn is_behind(lost: &Lost, backup: &RootBackup, size: Option<SegmentSize>) -> bool {
    let Some(size) = size.filter(|_| !lost.histories) else { return false };
    let first = SegmentName::new(backup.start_timeline, SegmentNumber::containing(backup.start_lsn, size), size);
    lost.newest.and_then(|newest| newest.segment()).is_some_and(|newest| newest < first)
}

/// Nobody can say at once that all is sound; what is known is said.
fn contents(known: &Known) -> CheckLine {
    let rule = "contents";
    let looked = known.verified.into_iter().chain(known.shares.values().copied()).max();
    let looked = looked.map_or("nobody has looked yet".to_owned(), |at| format!("last looked at {at}"));
    match (known.not_restorable.len(), known.findings.len() + known.wrong_pages()) {
        (0, 0) => line(rule, CheckState::Ok, format!("nothing is known to be damaged, {looked}")),
        (lost, wrong) => {
            let text = format!(
                "{wrong} things are wrong, {lost} backups cannot be restored, {looked}; pgconvoy verify tells all, and \
                 pgconvoy repair what another store can put right"
            );
            line(rule, CheckState::Failed, text)
        }
    }
}

fn store(slot: &Slot, set_back: Option<&SetBack>) -> CheckLine {
    let rule = format!("store {}", slot.name());
    if let Some(set_back) = set_back {
        return line(rule, CheckState::Failed, set_back.to_string());
    }
    match slot.health() {
        Health::Healthy => line(rule, CheckState::Ok, "healthy"),
        health @ (Health::Lagging { .. } | Health::Unknown) => line(rule, CheckState::Warning, health.to_string()),
        health => line(rule, CheckState::Failed, health.to_string()),
    }
}

/// Keeping everything is no fault, but a disk ends.
fn retained(store: &StoreName, retention: &RetentionInfo) -> CheckLine {
    let rule = format!("retention in {store}");
    let rules = format!("keeps {}", retention.rules);
    match (&retention.problem, &retention.frozen) {
        (Some(problem), _) => line(rule, CheckState::Warning, format!("{rules}; it was not applied: {problem}")),
        (None, Some(frozen)) => line(rule, CheckState::Ok, format!("{rules}; nothing is removed now: {frozen}")),
        (None, None) => line(rule, CheckState::Ok, rules),
    }
}

/// Has the primary switch WAL and waits for the segment in every healthy store.
async fn segment(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    system: SystemIdentifier,
    longest: Duration,
) -> Vec<CheckLine> {
    let begun = Monotonic::now();
    let switched = coordinator.sessions.switch_wal(cluster, Lsn::ZERO, longest, clock::now()).await;
    let switched = match switched {
        Ok(switched) => switched,
        Err(refusal) => return vec![line("segment", CheckState::Failed, refusal.to_string())],
    };
    let Ok(name) = switched.wal_file.parse::<WalFileName>() else {
        let text = format!("node {} answered with \"{}\", which is no WAL file", switched.node, switched.wal_file);
        return vec![line("segment", CheckState::Failed, text)];
    };
    let until = begun + longest;
    let healthy = coordinator.stores.healthy();
    let waits = healthy.iter().map(|slot| async {
        (slot.name().clone(), wait_for(slot, cluster, system, &name, until).await, begun.elapsed())
    });
    let found = join_all(waits).await;
    let mut lines = Vec::new();
    let arrived = found.iter().filter(|(_, result, _)| result.is_ok()).map(|(_, _, after)| *after).min();
    lines.push(match arrived {
        Some(after) => {
            let text = format!("{name} of node {} was archived in {:.1} s", switched.node, after.as_secs_f64());
            line("segment", CheckState::Ok, text)
        }
        None => {
            let text = format!(
                "{name} of node {} did not arrive within {} s; look at archive_mode, archive_command and the server's log",
                switched.node,
                longest.as_secs()
            );
            line("segment", CheckState::Failed, text)
        }
    });
    lines.extend(found.into_iter().map(|(store, result, after)| match result {
        Ok(()) => line(format!("segment in {store}"), CheckState::Ok, format!("after {:.1} s", after.as_secs_f64())),
        Err(text) => line(format!("segment in {store}"), CheckState::Failed, text),
    }));
    if arrived.is_some() {
        lines.push(archive_command(coordinator, cluster, &switched.node, name, until).await);
    }
    lines
}

/// Agents ship ahead of PostgreSQL, so a segment arrives also where `archive_command` is broken and PostgreSQL keeps it for
/// ever. Whether PostgreSQL asked for it, and was told that it is durable, the node's agent says in its next report.
async fn archive_command(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    node: &NodeName,
    name: WalFileName,
    until: Monotonic,
) -> CheckLine {
    let rule = format!("archive_command of {node}");
    let begun = Monotonic::now();
    let until = until.max(begun + ASKED_WAIT);
    loop {
        let nodes = coordinator.sessions.nodes(Some(cluster));
        let report = nodes.into_iter().find(|view| view.node == *node).and_then(|view| view.report);
        let acked = report.and_then(|report| report.last_acked.parse::<WalFileName>().ok());
        if acked.is_some_and(|acked| acked.segment() >= name.segment()) {
            return line(rule, CheckState::Ok, "PostgreSQL asked for the segment and was told that it is durable");
        }
        if Monotonic::now() >= until {
            let seconds = begun.elapsed().as_secs();
            let text = format!(
                "the segment is durable, but PostgreSQL did not ask for it within {seconds} s; expected archive_mode = on \
                 and archive_command = 'pgconvoy-wal push %p' with this agent's socket; look at the server's log"
            );
            return line(rule, CheckState::Failed, text);
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn wait_for(
    slot: &Slot,
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
    until: Monotonic,
) -> Result<(), String> {
    loop {
        match wal::locate(&*slot.store, cluster, system, name).await {
            Ok(Located::Object { .. }) => return Ok(()),
            Ok(Located::Conflict { .. }) => return Err("it has two contents; an operator must choose".to_owned()),
            Ok(_) if Monotonic::now() >= until => return Err("it is not there".to_owned()),
            Err(error) if Monotonic::now() >= until => return Err(chain(&error)),
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fleet::Heard;

    fn node(name: &str, in_recovery: bool, timeline: u32) -> NodeState {
        NodeState {
            node: name.parse().unwrap(),
            heard: Heard::Ago(Duration::from_secs(1)),
            server_reachable: true,
            server_problem: String::new(),
            in_recovery,
            timeline: postgres_format::Timeline::new(timeline),
            lsn: Lsn::new(900),
            foreign_to: None,
            full_page_writes: None,
            knows_hybrid: true,
        }
    }

    #[test]
    fn only_wal_from_before_the_newest_backup_is_done_without() {
        let size = SegmentSize::from_bytes(1 << 24).ok();
        let json = format!(
            r#"{{"backup":"20261123T010203Z-00000001","manifest_sha256":"{}","manifest_size":1000,
            "system_identifier":"7300000000000000001","postgres_major":15,"segment_size_bytes":16777216,
            "start_timeline":2,"start_lsn":"0/5000028","start_time":"2026-11-23T01:02:03Z",
            "stop_timeline":2,"stop_lsn":"0/5000138","stop_time":"2026-11-23T01:03:00Z","min_recovery_point":null,
            "node":"db2","from_standby":false,"label":"nightly","files":900,"data_bytes":31457280,
            "stored_bytes":9437184,"packs":1,"page_errors":0}}"#,
            "07".repeat(32)
        );
        let backup = RootBackup::from_json(&json).unwrap();
        let lost = |newest: &str, histories| {
            let name: WalFileName = newest.parse().unwrap();
            Lost {
                cluster: "main".parse().unwrap(),
                objects: 2,
                first: name,
                last: name,
                newest: Some(name),
                histories,
            }
        };
        for (newest, behind) in [
            ("000000020000000000000004", true),
            ("000000020000000000000005", false),
            ("000000020000000000000004.00000028.backup", true),
            ("000000010000000000000009", true),
            ("000000030000000000000001", false),
        ] {
            assert_eq!(is_behind(&lost(newest, false), &backup, size), behind, "{newest}");
            assert!(!is_behind(&lost(newest, true), &backup, size));
            assert!(!is_behind(&lost(newest, false), &backup, None));
        }
    }

    #[test]
    fn one_server_accepts_writes() {
        let one = [node("a", false, 1), node("b", true, 1)];
        assert!(several_primaries(&one).is_none() && several_primaries(&[]).is_none());
        let mut away = node("c", false, 2);
        away.heard = Heard::Gone(Duration::from_secs(60));
        assert!(several_primaries(&[node("a", false, 1), away]).is_none());
        let line = several_primaries(&[node("a", false, 1), node("b", false, 2)]).unwrap();
        assert_eq!(line.state(), CheckState::Failed);
        assert!(line.text.contains("a on timeline 1, b on timeline 2"), "{}", line.text);
    }
}
