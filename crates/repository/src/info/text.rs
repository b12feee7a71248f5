//! The report for people.

use std::fmt::Write;

use jiff::{SignedDuration, Timestamp};

use super::{ClusterInfo, FleetInfo, Info, LsnInfo, NodeInfo, OperationInfo, RetentionInfo, StoreState, WindowInfo};
use crate::backup::origin::describe;
use crate::name::BackupId;
use crate::restore_plan::size;

/// Most windows besides the newest that are told of.
const WINDOWS_SHOWN: usize = 5;

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

/// A moment as PostgreSQL writes it, in whole seconds, so that it can be given to `restore --target-time`.
fn moment(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S+00").to_string()
}

/// The same, never earlier than it is.
fn moment_after(time: Timestamp) -> String {
    let whole = time.subsec_nanosecond() == 0;
    moment(if whole { time } else { time.checked_add(SignedDuration::from_secs(1)).unwrap_or(time) })
}

/// From where to where, as whole seconds lead; in microseconds, as PostgreSQL counts, where no two whole seconds lie between.
fn stretch(first: Timestamp, last: Timestamp) -> (String, String) {
    let (from, to) = (moment_after(first), moment(last));
    if from < to {
        return (from, to);
    }
    let exact = |time: Timestamp| time.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string();
    (exact(first.checked_add(SignedDuration::from_nanos(999)).unwrap_or(first)), exact(last))
}

fn count(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn render_cluster(text: &mut String, cluster: &ClusterInfo) {
    line!(text, "cluster {}", cluster.cluster);
    for system in &cluster.systems {
        let major = system.postgres_major.map(|major| format!(", PostgreSQL {major}")).unwrap_or_default();
        let bytes = system.segment_size_bytes.map(|bytes| format!(", WAL segments of {}", size(bytes)));
        line!(text, "  system      identifier {}{major}{}", system.system_identifier, bytes.unwrap_or_default());
    }
    render_recovery(text, cluster);
    render_stores(text, cluster);
    render_backups(text, cluster);
    render_timelines(text, cluster);
    render_left_behind(text, cluster);
    for risk in &cluster.at_risk {
        let span = &risk.span;
        let names =
            if span.first == span.last { span.first.clone() } else { format!("{} to {}", span.first, span.last) };
        line!(text, "  AT RISK     WAL {names} ({}) is not in store {}", size(risk.bytes), risk.missing_in);
    }
    for conflict in &cluster.conflicts {
        let fingerprints = conflict.contents.iter().map(|content| content.rsplit('.').next().unwrap_or(content));
        let fingerprints = fingerprints.collect::<Vec<_>>().join(" and ");
        let (cluster, file) = (&cluster.cluster, &conflict.wal_file);
        line!(text, "  CONFLICT    {file} has several contents in store {}: {fingerprints}", conflict.store);
        line!(text, "              to choose one, run: pgconvoy conflict resolve {cluster} {file} FINGERPRINT");
    }
    for incomplete in &cluster.incomplete {
        let end = incomplete.logical_end.map(|end| format!(", up to {}", end.text)).unwrap_or_default();
        let (file, store, node) = (&incomplete.wal_file, &incomplete.store, &incomplete.node);
        line!(text, "  incomplete  {file} in store {store} is only the beginning of a segment{end}, from node {node}");
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
        render_windows(text, "possible is", recovery.windows.iter());
        return;
    }
    let is_own = |window: &&WindowInfo| recovery.backup.is_some_and(|backup| window.backups.contains(&backup));
    let earliest = recovery.earliest_time.map(moment_after);
    let oldest = match cluster.backups.first() {
        Some(first) if recovery.windows.iter().any(|window| is_own(&window) && window.backups[0] == first.backup) => {
            "the oldest backup"
        }
        _ => "the oldest backup that all later WAL is kept of",
    };
    match (recovery.earliest_time, recovery.latest_time) {
        (Some(first), Some(last)) if last >= first => {
            let (from, to) = stretch(first, last);
            line!(text, "  restore     to any moment from {from} on, the end of {oldest},");
            line!(text, "              up to {to}, the last commit in archived WAL");
        }
        // The last commit is older than the backup itself: there is one place to go, and not a window.
        _ => {
            let end = earliest.map(|end| format!(", {end}")).unwrap_or_default();
            line!(text, "  restore     to the end of {oldest}{end}; no later commit is archived yet");
        }
    }
    let lsn = recovery.latest_lsn.map(|lsn| format!("LSN {}", lsn.text)).unwrap_or_default();
    let timeline = recovery.timeline.map(|timeline| format!(" on timeline {timeline}")).unwrap_or_default();
    let backup = recovery.backup.map(|backup| format!(", from backup {backup}")).unwrap_or_default();
    line!(text, "              the latest is {lsn}{timeline}{backup}");
    if let Some(since) = written_since(cluster) {
        line!(text, "              {since}");
    }
    render_windows(text, "before that", recovery.windows.iter().filter(|window| !is_own(window)));
    if let Some(reason) = &recovery.reason {
        line!(text, "              {reason}");
    }
}

/// What the primary wrote behind the archived WAL, if it is connected: until now nothing, or how much is not archived.
fn written_since(cluster: &ClusterInfo) -> Option<String> {
    let (nodes, latest) = (&cluster.fleet.as_ref()?.nodes, cluster.recovery.latest_lsn?);
    let writes = |node: &&NodeInfo| node.connected && node.role.as_deref() == Some("primary");
    let mut primaries = nodes.iter().filter(writes);
    let (primary, None) = (primaries.next()?, primaries.next()) else { return None };
    if primary.timeline != cluster.recovery.timeline {
        return None;
    }
    let (node, lsn) = (&primary.node, primary.lsn?);
    match lsn.number.checked_sub(latest.number) {
        None | Some(0) => {
            let seen = primary.last_seen.map(|seen| format!(" at {}", moment(seen))).unwrap_or_default();
            Some(format!("which is all there was{seen}: {node} has written nothing since"))
        }
        Some(bytes) => Some(format!("{node} has written {} since, which is not archived yet", size(bytes))),
    }
}

/// Windows a line each, the newest first.
fn render_windows<'a>(text: &mut String, how: &str, windows: impl DoubleEndedIterator<Item = &'a WindowInfo>) {
    let windows: Vec<&WindowInfo> = windows.rev().collect();
    for window in windows.iter().take(WINDOWS_SHOWN) {
        let backups = count(window.backups.len() as u64, "backup");
        let where_to = match window.latest_time.filter(|last| *last >= window.earliest_time) {
            Some(last) => {
                let (from, to) = stretch(window.earliest_time, last);
                format!("any moment from {from} up to {to}, of {backups} on timeline {}", window.timeline)
            }
            None => format!("{}, the end of {}", moment_after(window.earliest_time), window.backups[0]),
        };
        line!(text, "              {how}: to {where_to}");
    }
    if windows.len() > WINDOWS_SHOWN {
        line!(text, "              and {} such stretches more", windows.len() - WINDOWS_SHOWN);
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
        let (backups, files) = (count(store.backups, "backup"), count(store.wal_objects, "WAL file"));
        line!(text, "  store       {}: {backups}, {files} in {}{free}", store.store, size(store.wal_bytes));
        if let Some(retention) = &store.retention {
            render_retention(text, retention);
        }
        let recovery = &cluster.recovery;
        let earliest = store.earliest_time.filter(|earliest| Some(*earliest) != recovery.earliest_time);
        if let Some(earliest) = earliest.filter(|_| recovery.possible) {
            line!(text, "              from it alone any moment from {} on can be restored", moment_after(earliest));
        }
    }
}

fn render_retention(text: &mut String, retention: &RetentionInfo) {
    line!(text, "              keeps {}", retention.rules);
    if let Some(problem) = &retention.problem {
        line!(text, "              RETENTION FAILED: {problem}");
    }
    if let Some(frozen) = &retention.frozen {
        line!(text, "              nothing is removed now: {frozen}");
    }
    if retention.locked_objects > 0 {
        let until = retention.locked_until.map(|until| format!(" until {}", moment_after(until))).unwrap_or_default();
        let objects = count(retention.locked_objects, "expired object");
        line!(text, "              {objects} kept by a lock of the store's own{until}");
    }
}

/// What holds a backup, and why the stores keep it.
fn render_kept(text: &mut String, cluster: &ClusterInfo, backup: BackupId) {
    for store in &cluster.stores {
        for hold in store.holds.iter().filter(|hold| hold.backup == backup) {
            let until = hold.until.map(|until| format!(" until {}", moment_after(until))).unwrap_or_default();
            line!(text, "              held in {} by {}{until}: {}", store.store, hold.by, hold.reason);
        }
        let kept = store.retention.iter().flat_map(|retention| &retention.kept).find(|kept| kept.backup == backup);
        if let Some(kept) = kept.filter(|kept| !kept.reasons.is_empty()) {
            line!(text, "              stays in {}: {}", store.store, kept.reasons.join("; "));
        }
    }
}

fn render_backups(text: &mut String, cluster: &ClusterInfo) {
    for backup in &cluster.backups {
        let stores: Vec<&str> = backup.stores.iter().map(AsRef::as_ref).collect();
        let label = if backup.label.is_empty() { String::new() } else { format!(", labelled \"{}\"", backup.label) };
        let (source, by) = match &backup.primary {
            Some(primary) => ("standby", format!(", started and stopped by primary {primary}")),
            None if backup.from_standby => ("standby", String::new()),
            None => ("primary", String::new()),
        };
        line!(text, "  backup      {}{label}", backup.backup);
        line!(
            text,
            "              taken {} to {} from {source} {}{by}",
            moment(backup.start_time),
            moment(backup.stop_time),
            backup.node
        );
        line!(text, "              {}", describe(backup.backup_type, backup.parent, backup.changes.as_ref()));
        let (start, stop) = (backup.start_lsn.text, backup.stop_lsn.text);
        line!(text, "              needs WAL {start} to {stop} of timeline {}", backup.stop_timeline);
        let (data, stored) = (size(backup.data_bytes), size(backup.stored_bytes));
        let files = count(backup.files, "file");
        let inherited = match backup.inherited_bytes {
            0 => String::new(),
            bytes => format!(" beside {} of older ones", size(bytes)),
        };
        line!(text, "              {data} in {files}, stored as {stored}{inherited} in {}", stores.join(" and "));
        render_kept(text, cluster, backup.backup);
        if backup.page_errors > 0 {
            line!(text, "              CORRUPT PAGES: {}", backup.page_errors);
        }
        if let Some(reason) = &backup.not_restorable {
            line!(text, "              NOT RESTORABLE: {reason}");
        }
        for warning in &backup.warnings {
            line!(text, "              WARNING: {warning}");
        }
    }
}

fn render_timelines(text: &mut String, cluster: &ClusterInfo) {
    for timeline in &cluster.timelines {
        let fork = timeline.parent.map(|fork| format!(", which left {} at {}", fork.timeline, fork.lsn));
        let ranges: Vec<String> =
            timeline.ranges.iter().map(|range| format!("{} to {}", range.start.text, range.end.text)).collect();
        let held = match &ranges[..] {
            [] => "nothing".to_owned(),
            [whole] => format!("{whole} without a gap"),
            several => several.join(", then "),
        };
        line!(text, "  WAL         of timeline {}{}: {held}", timeline.timeline, fork.unwrap_or_default());
        if !timeline.history_present {
            line!(text, "              HISTORY FILE MISSING");
        }
        for gap in &timeline.gaps {
            let spans: Vec<String> =
                gap.segments.iter().map(|span| format!("{} to {}", span.first, span.last)).collect();
            let (from, to) = (gap.range.start.text, gap.range.end.text);
            let word = if gap.expired { "expired" } else { "GAP" };
            line!(text, "              {word} {from} to {to} ({}): {}", size(gap.range.bytes), spans.join("; "));
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
            let (written, begun) = (moment(written), moment(begun));
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
    for node in &fleet.nodes {
        render_node(text, node);
    }
    for schedule in &fleet.schedules {
        let next = schedule.next_run.map(|time| format!(", next at {}", moment(time))).unwrap_or_default();
        let (cron, zone, source) = (&schedule.cron, &schedule.zone, &schedule.source);
        line!(text, "  schedule    backup at cron \"{cron}\" in {zone}, source {source}{next}");
    }
    for operation in &fleet.operations {
        render_operation(text, operation);
    }
}

fn render_node(text: &mut String, node: &NodeInfo) {
    let role = node.role.as_deref().unwrap_or("role unknown");
    let at = node.lsn.map(|lsn: LsnInfo| format!(" at LSN {}", lsn.text)).unwrap_or_default();
    let road = node.road.as_deref().map(|road| format!(", archives by the road {road}")).unwrap_or_default();
    let ready = node.ready_files.map(|files| format!(", {} waiting", count(files, "WAL file"))).unwrap_or_default();
    let pressed = match node.stage.unwrap_or_default() {
        0 => String::new(),
        stage => format!(", {}{}", stage_word(stage), level(node.compression_level)),
    };
    let silent = match (node.connected, node.last_seen) {
        (true, _) => String::new(),
        (false, Some(time)) => format!(", SILENT since {}", moment(time)),
        (false, None) => ", NEVER SEEN".to_owned(),
    };
    line!(text, "  node        {}: {role}{at}{road}{ready}{pressed}{silent}", node.node);
    for problem in &node.problems {
        line!(text, "              PROBLEM {problem}");
    }
}

fn render_operation(text: &mut String, operation: &OperationInfo) {
    let state = if operation.state == "failed" { "FAILED" } else { operation.state.as_str() };
    let on = operation.node.as_ref().map(|node| format!(" of node {node}")).unwrap_or_default();
    let when = match (operation.ended, operation.started) {
        (Some(ended), _) => format!(" at {}", moment(ended)),
        (None, Some(started)) => format!(" since {}", moment(started)),
        (None, None) => String::new(),
    };
    // The last step of what ended is called as its state is.
    let step = operation.step.as_deref().filter(|step| *step != operation.state && !step.is_empty());
    let step = step.map(|step| format!(", {step}")).unwrap_or_default();
    let error = operation.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
    line!(text, "  operation   {}{on} {state}{when}{step}{error} ({})", operation.kind, operation.operation);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_says_once_that_it_is_done() {
        let mut operation = OperationInfo {
            operation: "o-1".to_owned(),
            kind: "backup".to_owned(),
            node: Some("db2".parse().unwrap()),
            state: "done".to_owned(),
            step: Some("done".to_owned()),
            bytes_done: None,
            bytes_total: None,
            started: Some("2026-11-23T01:00:00.5Z".parse().unwrap()),
            ended: Some("2026-11-23T01:00:09.5Z".parse().unwrap()),
            error: None,
            backup: None,
        };
        let text = |operation: &OperationInfo| {
            let mut text = String::new();
            render_operation(&mut text, operation);
            text
        };
        assert_eq!(text(&operation), "  operation   backup of node db2 done at 2026-11-23 01:00:09+00 (o-1)\n");
        (operation.state, operation.step, operation.ended) = ("running".to_owned(), Some("copying".to_owned()), None);
        let running = "  operation   backup of node db2 running since 2026-11-23 01:00:00+00, copying (o-1)\n";
        assert_eq!(text(&operation), running);
    }

    #[test]
    fn a_moment_can_be_restored_to() {
        let time: Timestamp = "2026-11-23T01:00:00.5Z".parse().unwrap();
        assert_eq!(
            (moment(time), moment_after(time)),
            ("2026-11-23 01:00:00+00".into(), "2026-11-23 01:00:01+00".into())
        );
        let whole: Timestamp = "2026-11-23T01:00:00Z".parse().unwrap();
        assert_eq!(moment(whole), moment_after(whole));
    }

    #[test]
    fn no_stretch_ends_before_it_begins() {
        let at = |seconds: &str| format!("2026-11-23T01:00:{seconds}Z").parse().unwrap();
        let told = |first: &str, last: &str| {
            let (from, to) = stretch(at(first), at(last));
            (from.replace("2026-11-23 01:00:", ""), to.replace("2026-11-23 01:00:", ""))
        };
        let expect = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        assert_eq!(told("01.5", "03.5"), expect("02+00", "03+00"));
        assert_eq!(told("01.2", "01.9"), expect("01.200000+00", "01.900000+00"));
        assert_eq!(told("01.2000001", "02.9"), expect("01.200001+00", "02.900000+00"));
        assert_eq!(told("01", "01"), expect("01.000000+00", "01.000000+00"));
    }
}
