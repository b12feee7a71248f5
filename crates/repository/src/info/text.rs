//! The report for people.

use std::fmt::Write;

use super::{ClusterInfo, FleetInfo, Info, LsnInfo, StoreState};
use crate::restore_plan::size;

/// The report as text. What needs attention stands in capitals.
pub fn render_text(info: &Info) -> String {
    let mut text = String::new();
    for cluster in &info.clusters {
        if !text.is_empty() {
            text.push('\n');
        }
        render_cluster(&mut text, cluster);
    }
    if text.is_empty() {
        text.push_str("no cluster is known\n");
    }
    text
}

/// Writing to a string cannot fail.
macro_rules! line {
    ($text:expr, $($format:tt)*) => {
        let _ = writeln!($text, $($format)*);
    };
}

fn render_cluster(text: &mut String, cluster: &ClusterInfo) {
    line!(text, "cluster {}", cluster.cluster);
    for system in &cluster.systems {
        let major = system.postgres_major.map(|major| format!(", PostgreSQL {major}")).unwrap_or_default();
        let bytes = system.segment_size_bytes.map(|bytes| format!(", segments of {}", size(bytes)));
        line!(text, "  system      {}{major}{}", system.system_identifier, bytes.unwrap_or_default());
    }
    render_recovery(text, cluster);
    render_stores(text, cluster);
    for backup in &cluster.backups {
        let stores: Vec<&str> = backup.stores.iter().map(AsRef::as_ref).collect();
        let (data, stored) = (size(backup.data_bytes), size(backup.stored_bytes));
        let source = if backup.from_standby { "standby" } else { "primary" };
        line!(text, "  backup      {}  {} to {}", backup.backup, backup.start_time, backup.stop_time);
        line!(
            text,
            "              {source} {}, timeline {}, {} to {}",
            backup.node,
            backup.stop_timeline,
            backup.start_lsn.text,
            backup.stop_lsn.text
        );
        line!(text, "              {data} in {} files, {stored} stored in {}", backup.files, stores.join(", "));
        if backup.page_errors > 0 {
            line!(text, "              CORRUPT PAGES: {}", backup.page_errors);
        }
    }
    render_timelines(text, cluster);
    render_left_behind(text, cluster);
    for risk in &cluster.at_risk {
        let span = &risk.span;
        line!(text, "  AT RISK     {} to {} ({}) not in {}", span.first, span.last, size(risk.bytes), risk.missing_in);
    }
    for conflict in &cluster.conflicts {
        let contents = conflict.contents.join(", ");
        line!(text, "  CONFLICT    {} in {}: {contents}", conflict.wal_file, conflict.store);
    }
    for incomplete in &cluster.incomplete {
        let end = incomplete.logical_end.map(|end| format!(" up to {}", end.text)).unwrap_or_default();
        line!(text, "  incomplete  {} in {}{end}, from {}", incomplete.wal_file, incomplete.store, incomplete.node);
    }
    for problem in &cluster.problems {
        line!(text, "  PROBLEM     {problem}");
    }
    if let Some(fleet) = &cluster.fleet {
        render_fleet(text, fleet);
    }
}

fn render_recovery(text: &mut String, cluster: &ClusterInfo) {
    let recovery = &cluster.recovery;
    if !recovery.possible {
        let reason = recovery.reason.as_deref().unwrap_or("the reason is unknown");
        line!(text, "  restore     NOT POSSIBLE: {reason}");
        return;
    }
    let earliest = recovery.earliest_time.map(|time| time.to_string()).unwrap_or_default();
    let latest = recovery.latest_time.map(|time| format!("{time}, ")).unwrap_or_default();
    let lsn = recovery.latest_lsn.map(|lsn| lsn.text.to_string()).unwrap_or_default();
    let timeline = recovery.timeline.map(|timeline| format!(" on timeline {timeline}")).unwrap_or_default();
    line!(text, "  restore     from {earliest} to {latest}{lsn}{timeline}");
    if let Some(reason) = &recovery.reason {
        line!(text, "              {reason}");
    }
}

fn render_stores(text: &mut String, cluster: &ClusterInfo) {
    for store in &cluster.stores {
        if store.state == StoreState::Unreachable {
            let detail = store.detail.as_deref().unwrap_or("it does not answer");
            line!(text, "  store       {}: UNREACHABLE: {detail}", store.store);
            continue;
        }
        let free = store.free_bytes.map(|bytes| format!(", {} free", size(bytes))).unwrap_or_default();
        let (files, bytes) = (store.wal_objects, size(store.wal_bytes));
        line!(text, "  store       {}: {} backups, {files} WAL files of {bytes}{free}", store.store, store.backups);
    }
}

fn render_timelines(text: &mut String, cluster: &ClusterInfo) {
    for timeline in &cluster.timelines {
        let fork = timeline.parent.map(|fork| format!(", off {} at {}", fork.timeline, fork.lsn));
        let ranges: Vec<String> =
            timeline.ranges.iter().map(|range| format!("{} to {}", range.start.text, range.end.text)).collect();
        let held = if ranges.is_empty() { "no WAL".to_owned() } else { ranges.join("; ") };
        line!(text, "  timeline    {}{}: {held}", timeline.timeline, fork.unwrap_or_default());
        if !timeline.history_present {
            line!(text, "              HISTORY FILE MISSING");
        }
        for gap in &timeline.gaps {
            let spans: Vec<String> =
                gap.segments.iter().map(|span| format!("{} to {}", span.first, span.last)).collect();
            let (from, to) = (gap.range.start.text, gap.range.end.text);
            line!(text, "              GAP {from} to {to} ({}): {}", size(gap.range.bytes), spans.join("; "));
        }
    }
}

fn render_left_behind(text: &mut String, cluster: &ClusterInfo) {
    for left in &cluster.left_behind {
        let (parent, fork) = (left.fork.timeline, left.fork.lsn);
        let (amount, bytes, end, child) = (size(left.bytes), left.bytes, left.end.text, left.timeline);
        line!(
            text,
            "  LEFT BEHIND {amount} ({bytes} bytes) of timeline {parent} from {fork}, where {child} began, to {end}"
        );
        if let (Some(written), Some(begun)) = (left.parent_written, left.begun) {
            let node = left.node.as_ref().map(ToString::to_string).unwrap_or_default();
            line!(
                text,
                "  OLD PRIMARY {node} still wrote timeline {parent} at {written}; {child} began before {begun}"
            );
        }
    }
}

fn stage_word(stage: u32) -> &'static str {
    match stage {
        1 => "STRAINED",
        2 => "ISOLATED",
        _ => "CRITICAL",
    }
}

fn level(compression_level: Option<u32>) -> String {
    compression_level.map(|level| format!(", zstd level {level}")).unwrap_or_default()
}

fn render_fleet(text: &mut String, fleet: &FleetInfo) {
    let at = |lsn: Option<LsnInfo>| lsn.map(|lsn| format!(" at {}", lsn.text)).unwrap_or_default();
    for node in &fleet.nodes {
        let role = node.role.as_deref().unwrap_or("role unknown");
        let road = node.road.as_deref().map(|road| format!(", road {road}")).unwrap_or_default();
        let ready = node.ready_files.map(|files| format!(", {files} files waiting")).unwrap_or_default();
        let pressed = match node.stage.unwrap_or_default() {
            0 => String::new(),
            stage => format!(", {}{}", stage_word(stage), level(node.compression_level)),
        };
        let silent = match (node.connected, node.last_seen) {
            (true, _) => String::new(),
            (false, Some(time)) => format!(", SILENT since {time}"),
            (false, None) => ", NEVER SEEN".to_owned(),
        };
        line!(text, "  node        {}: {role}{}{road}{ready}{pressed}{silent}", node.node, at(node.lsn));
        for problem in &node.problems {
            line!(text, "              PROBLEM {problem}");
        }
    }
    for schedule in &fleet.schedules {
        let next = schedule.next_run.map(|time| format!(", next {time}")).unwrap_or_default();
        line!(text, "  schedule    {} {} from a {}{next}", schedule.cron, schedule.zone, schedule.source);
    }
    for operation in &fleet.operations {
        let step = operation.step.as_deref().map(|step| format!(", {step}")).unwrap_or_default();
        let error = operation.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
        let state = if operation.state == "failed" { "FAILED" } else { operation.state.as_str() };
        line!(text, "  operation   {} {} {state}{step}{error}", operation.kind, operation.operation);
    }
}
