//! Rules about backups and the archive that a check holds against limits of its caller, as check_pgbackrest's services
//! `retention` and `archives` do. Pure: a report, limits and `now` come in, lines go out.
//!
//! A limit that was not given makes no line.

use std::time::Duration;

use jiff::Timestamp;
use process::units::Span;
use proto::operator::{CheckLine, CheckState};
use repository::backup::origin::BackupType;
use repository::info::{BackupInfo, ClusterInfo};

/// What the caller wants to hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::Args)]
pub(crate) struct Limits {
    /// Least number of full backups.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) retention_full: Option<usize>,
    /// Greatest age of the newest backup of any type.
    #[arg(long, value_name = "SPAN")]
    pub(crate) retention_age: Option<Span>,
    /// Greatest age of the newest full backup.
    #[arg(long, value_name = "SPAN")]
    pub(crate) retention_age_to_full: Option<Span>,
    /// WAL is there without a gap, as far as it is kept, and leads from a backup to its end.
    #[arg(long)]
    pub(crate) archives: bool,
    /// Longest that a WAL file may wait to be archived.
    #[arg(long, value_name = "SPAN")]
    pub(crate) archive_age: Option<Span>,
}

impl Limits {
    /// Whether there is none, so that no report is needed.
    pub(crate) fn are_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A number of a check, for graphs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Figure {
    /// Its name.
    pub(crate) name: &'static str,
    /// Its value; seconds where the unit says so.
    pub(crate) value: u64,
    /// `s`, or empty for a count.
    pub(crate) unit: &'static str,
    /// The limit it is held against.
    pub(crate) limit: String,
}

/// The lines for the limits that were given, and the figures behind them.
pub(crate) fn lines(info: &ClusterInfo, limits: &Limits, now: Timestamp) -> (Vec<CheckLine>, Vec<Figure>) {
    let sound: Vec<&BackupInfo> = info.backups.iter().filter(|backup| backup.not_restorable.is_none()).collect();
    let full = || sound.iter().copied().filter(|backup| backup.backup_type == BackupType::Full);
    let mut found = Found::default();
    if let Some(least) = limits.retention_full {
        let count = full().count();
        let text = format!("{count} full backups, expected at least {least}");
        found.count("retention", "full_backups", count as u64, format!("{least}:"), count >= least, text);
    }
    if let Some(most) = limits.retention_age {
        found.age("backup age", "backup_age", "backup", newest(sound.iter().copied()), most, now);
    }
    if let Some(most) = limits.retention_age_to_full {
        found.age("full backup age", "full_backup_age", "full backup", newest(full()), most, now);
    }
    if limits.archives {
        found.archives(info);
    }
    if let Some(most) = limits.archive_age {
        found.waiting(info, most);
    }
    (found.lines, found.figures)
}

fn newest<'a>(backups: impl Iterator<Item = &'a BackupInfo>) -> Option<&'a BackupInfo> {
    backups.max_by_key(|backup| backup.stop_time)
}

#[derive(Default)]
struct Found {
    lines: Vec<CheckLine>,
    figures: Vec<Figure>,
}

impl Found {
    fn line(&mut self, rule: &str, holds: bool, text: String) {
        let state = if holds { CheckState::Ok } else { CheckState::Failed };
        self.lines.push(CheckLine { rule: rule.to_owned(), state: state.into(), text });
    }

    fn count(&mut self, rule: &str, name: &'static str, value: u64, limit: String, holds: bool, text: String) {
        self.figures.push(Figure { name, value, unit: "", limit });
        self.line(rule, holds, text);
    }

    fn seconds(&mut self, name: &'static str, age: Duration, most: Span) {
        let limit = most.duration().as_secs().to_string();
        self.figures.push(Figure { name, value: age.as_secs(), unit: "s", limit });
    }

    fn age(
        &mut self,
        rule: &str,
        figure: &'static str,
        what: &str,
        newest: Option<&BackupInfo>,
        most: Span,
        now: Timestamp,
    ) {
        let Some(newest) = newest else { return self.line(rule, false, format!("there is no {what}")) };
        let age: Duration = now.duration_since(newest.stop_time).try_into().unwrap_or_default();
        self.seconds(figure, age, most);
        let told = Span::from_seconds(age.as_secs());
        let text = format!("the newest {what}, {}, is {told} old, expected at most {most}", newest.backup);
        self.line(rule, age <= most.duration(), text);
    }

    fn archives(&mut self, info: &ClusterInfo) {
        let gaps =
            info.timelines.iter().flat_map(|timeline| timeline.gaps.iter().map(move |gap| (timeline.timeline, gap)));
        let lost: Vec<_> = gaps.filter(|(_, gap)| !gap.expired).collect();
        let first = lost.first().map(|(timeline, gap)| {
            format!(
                "{} gaps, the first on timeline {timeline} from {} to {}",
                lost.len(),
                gap.range.start.text,
                gap.range.end.text
            )
        });
        let holds = first.is_none();
        let text = first.unwrap_or_else(|| "WAL is there without a gap, as far as it is kept".to_owned());
        self.count("archives", "wal_gaps", lost.len() as u64, "0".to_owned(), holds, text);
        let recovery = &info.recovery;
        let text = match (&recovery.latest_lsn, &recovery.reason) {
            (Some(end), _) if recovery.possible => format!("a backup and its WAL lead to {}", end.text),
            (_, Some(reason)) => reason.clone(),
            (_, None) => "no backup's WAL leads to the latest".to_owned(),
        };
        self.line("restorable", recovery.possible, text);
    }

    fn waiting(&mut self, info: &ClusterInfo, most: Span) {
        let nodes = info.fleet.iter().flat_map(|fleet| &fleet.nodes);
        let waits = nodes.filter_map(|node| Some((node.ready_oldest_seconds?, &node.node)));
        let Some((seconds, node)) = waits.max() else {
            return self.line("archive age", false, "no node tells how long its WAL waits".to_owned());
        };
        let age = Duration::from_secs(seconds);
        self.seconds("archive_age", age, most);
        let text = format!("the oldest WAL file of {node} waits for {seconds} s, expected at most {most}");
        self.line("archive age", age <= most.duration(), text);
    }
}

#[cfg(test)]
mod tests {
    use repository::info::Info;

    use super::*;

    fn cluster() -> ClusterInfo {
        let info: Info = serde_json::from_str(include_str!("../pgbackrest/sample.json")).unwrap();
        info.clusters.into_iter().next().unwrap()
    }

    fn span(text: &str) -> Option<Span> {
        Some(text.parse().unwrap())
    }

    fn told(limits: Limits) -> Vec<(String, CheckState, String)> {
        let (lines, _) = lines(&cluster(), &limits, "2026-11-24T04:08:08Z".parse().unwrap());
        lines.into_iter().map(|line| (line.rule.clone(), line.state(), line.text)).collect()
    }

    fn states(limits: Limits) -> Vec<CheckState> {
        told(limits).into_iter().map(|(_, state, _)| state).collect()
    }

    #[test]
    fn limits_that_are_not_given_make_no_line() {
        assert!(Limits::default().are_none());
        assert_eq!(told(Limits::default()), []);
    }

    #[test]
    fn backups_are_counted_and_their_age_is_told() {
        let of = |full, age, to_full| {
            states(Limits {
                retention_full: full,
                retention_age: age,
                retention_age_to_full: to_full,
                ..Limits::default()
            })
        };
        assert_eq!(of(Some(1), span("1h"), span("2h")), [CheckState::Ok; 3]);
        assert_eq!(of(Some(2), span("59min"), span("1h")), [CheckState::Failed; 3]);
        let lines = told(Limits { retention_age: span("1h"), ..Limits::default() });
        assert_eq!(lines[0].2, "the newest backup, 20261124T030807Z-00000003, is 1h old, expected at most 1h");
    }

    #[test]
    fn a_gap_that_is_a_loss_fails_and_one_that_expired_does_not() {
        let archives = Limits { archives: true, ..Limits::default() };
        assert_eq!(states(archives), [CheckState::Ok; 2]);
        let mut info = cluster();
        let range = info.timelines[0].own[0];
        for (expired, state) in [(true, CheckState::Ok), (false, CheckState::Failed)] {
            info.timelines[0].gaps = vec![repository::info::GapInfo { range, segments: Vec::new(), expired }];
            let (lines, figures) = lines(&info, &archives, Timestamp::UNIX_EPOCH);
            assert_eq!((lines[0].state(), figures[0].value), (state, u64::from(!expired)));
        }
    }

    #[test]
    fn nobody_to_tell_how_long_wal_waits_is_no_success() {
        let limits = Limits { archive_age: span("5min"), ..Limits::default() };
        assert_eq!(states(limits), [CheckState::Failed]);
    }
}
