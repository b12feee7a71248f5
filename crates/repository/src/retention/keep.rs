//! Which backups stay, and why.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::civil::Date;

use super::clock::before;
use super::policy::span;
use super::{BackupLine, Facts, Policy, Verdict};
use crate::backup::origin::BackupType;
use crate::coverage::{ArchivedWal, LsnRange};
use crate::name::BackupId;
use crate::root::RootBackup;

/// What becomes of all backups.
pub(super) struct Judged {
    /// Newest first.
    pub(super) lines: Vec<BackupLine>,
    /// The backups the promised window needs, oldest first; empty without a window.
    pub(super) window: Vec<BackupId>,
    /// Why nothing may be removed: no backup can be restored.
    pub(super) nothing_restorable: Option<String>,
}

type Reasons = BTreeMap<BackupId, Vec<String>>;

pub(super) fn judge(facts: &Facts<'_>, policy: &Policy, as_of: Timestamp, frozen: Option<&str>) -> Judged {
    let mut newest_first: Vec<&RootBackup> = facts.root.backups.iter().collect();
    newest_first.sort_by_key(|backup| std::cmp::Reverse((backup.stop_time, backup.backup)));
    let lacks: BTreeMap<BackupId, String> =
        newest_first.iter().filter_map(|backup| Some((backup.backup, lacking(facts, backup)?))).collect();
    let restorable: Vec<&RootBackup> =
        newest_first.iter().copied().filter(|backup| !lacks.contains_key(&backup.backup)).collect();
    let window = policy.window.map(|window| needed_by_window(facts, &restorable, before(as_of, window)));
    let mut reasons = Reasons::new();
    by_rule(policy, &restorable, &newest_first, as_of, &mut reasons);
    for (backup, why) in window.iter().flatten() {
        add(&mut reasons, *backup, why.clone());
    }
    by_need(facts, as_of, &mut reasons);
    by_possible_need(facts, &newest_first, &mut reasons);
    keep_broken(&newest_first, &lacks, &mut reasons);
    let nothing_restorable = (restorable.is_empty() && !newest_first.is_empty())
        .then(|| "no backup in this store can be restored: nothing is removed".to_owned());
    let frozen = frozen.or(nothing_restorable.as_deref());
    let line = |backup: &&RootBackup| {
        let kept = reasons.remove(&backup.backup);
        let (verdict, reasons) = match (kept, frozen) {
            (Some(reasons), _) => (Verdict::Keep, reasons),
            (None, Some(frozen)) => (Verdict::Keep, vec![frozen.to_owned()]),
            (None, None) => (Verdict::Remove, vec![format!("no rule keeps it: {}", policy.summary())]),
        };
        let (stop_time, stored_bytes) = (backup.stop_time, backup.stored_bytes);
        BackupLine { backup: backup.backup, stop_time, stored_bytes, verdict, reasons }
    };
    let lines = newest_first.iter().map(line).collect();
    let window = window.unwrap_or_default().into_iter().map(|(backup, _)| backup).collect();
    Judged { lines, window, nothing_restorable }
}

fn add(reasons: &mut Reasons, backup: BackupId, reason: String) {
    reasons.entry(backup).or_default().push(reason);
}

/// What a backup lacks to be restored from this store alone.
fn lacking(facts: &Facts<'_>, backup: &RootBackup) -> Option<String> {
    let Some(wal) = facts.wal.get(&backup.system_identifier) else {
        return Some("none of its WAL is known here".to_owned());
    };
    let missing = wal.missing(backup.stop_timeline, own_wal(backup));
    let first = missing.first()?;
    let name = first.names(wal.segment_size()).next()?;
    Some(format!("{name} is missing, without which it cannot be restored"))
}

pub(super) fn own_wal(backup: &RootBackup) -> LsnRange {
    LsnRange { start: backup.start_lsn, end: backup.consistent_lsn() }
}

/// Counts, ages and periods. Only what can be restored counts.
fn by_rule(policy: &Policy, restorable: &[&RootBackup], all: &[&RootBackup], as_of: Timestamp, reasons: &mut Reasons) {
    if policy.keeps_everything() {
        all.iter().for_each(|backup| add(reasons, backup.backup, "no rule removes anything".to_owned()));
    }
    if let Some(newest) = restorable.first() {
        add(reasons, newest.backup, "it is the newest that can be restored".to_owned());
    }
    for backup in restorable.iter().take(policy.any.unwrap_or(0) as usize) {
        add(reasons, backup.backup, format!("it is one of the newest {}", policy.any.unwrap_or(0)));
    }
    if let Some(count) = policy.full {
        by_full(count, restorable, reasons);
    }
    if let Some(age) = policy.age() {
        let since = before(as_of, age);
        for backup in all.iter().filter(|backup| backup.stop_time >= since) {
            add(reasons, backup.backup, format!("it is younger than {}", span(age)));
        }
    }
    type NameOf = fn(Date) -> String;
    let periods: [(u32, NameOf); 4] =
        [(policy.daily, day), (policy.weekly, week), (policy.monthly, month), (policy.yearly, year)];
    for (count, name) in periods {
        let mut seen = BTreeSet::new();
        for backup in restorable {
            let period = name(backup.stop_time.to_zoned(policy.zone.clone()).date());
            if seen.len() < count as usize && seen.insert(period.clone()) {
                add(reasons, backup.backup, format!("it is the newest of {period}"));
            }
        }
    }
}

/// As everywhere else with PostgreSQL: so many full backups, and what was taken since the oldest of them.
fn by_full(count: u32, restorable: &[&RootBackup], reasons: &mut Reasons) {
    let full = |backup: &&&RootBackup| backup.backup_type == BackupType::Full;
    let newest: Vec<&RootBackup> = restorable.iter().filter(full).take(count as usize).copied().collect();
    let oldest = newest.last().filter(|_| newest.len() == count as usize);
    for backup in restorable {
        let reason = match oldest {
            _ if newest.iter().any(|full| full.backup == backup.backup) => {
                format!("it is one of the newest {count} full")
            }
            None => format!("there are fewer than {count} full backups that can be restored"),
            Some(oldest) if backup.stop_time >= oldest.stop_time => {
                format!("it was taken since the oldest of the newest {count} full")
            }
            Some(_) => continue,
        };
        add(reasons, backup.backup, reason);
    }
}

fn day(date: Date) -> String {
    date.to_string()
}

fn week(date: Date) -> String {
    let monday = date.iso_week_date();
    format!("week {:04}-W{:02}", monday.year(), monday.week())
}

fn month(date: Date) -> String {
    format!("{:04}-{:02}", date.year(), date.month())
}

fn year(date: Date) -> String {
    format!("{:04}", date.year())
}

/// Holds, and backups under way.
fn by_need(facts: &Facts<'_>, as_of: Timestamp, reasons: &mut Reasons) {
    for hold in facts.root.holds.iter().filter(|hold| hold.holds_at(as_of)) {
        let until = hold.until.map(|until| format!(" until {until}")).unwrap_or_default();
        add(reasons, hold.backup, format!("{} holds it{until}: {}", hold.by, hold.reason));
    }
    for pin in &facts.root.pins {
        let others = pin.identifiers().filter(|id| *id != pin.backup);
        others.for_each(|id| add(reasons, id, format!("{}, which is under way, builds on it", pin.backup)));
    }
    for backup in facts.running.iter().filter(|id| facts.root.backup(id).is_some()) {
        add(reasons, *backup, "it is under way".to_owned());
    }
}

/// What a backup is built on, its node finds out after it was pinned: until that is known, the newest and the newest full
/// one may be it.
fn by_possible_need(facts: &Facts<'_>, newest_first: &[&RootBackup], reasons: &mut Reasons) {
    let open = |id: &BackupId| facts.root.pin(id).is_none_or(|pin| pin.parent.is_none() && !pin.is_copy());
    let pinned = facts.root.pins.iter().map(|pin| pin.backup);
    let mut under_way = pinned.chain(facts.running.iter().copied()).filter(|id| facts.root.backup(id).is_none());
    let Some(open) = under_way.find(open) else { return };
    let full = newest_first.iter().find(|backup| backup.backup_type == BackupType::Full);
    let candidates: BTreeSet<BackupId> = newest_first.first().into_iter().chain(full).map(|one| one.backup).collect();
    for backup in candidates {
        add(reasons, backup, format!("{open}, which is under way, may build on it"));
    }
}

/// A backup that lacks something stays as long as an older one does: what it lacks may come from another store.
fn keep_broken(newest_first: &[&RootBackup], lacks: &BTreeMap<BackupId, String>, reasons: &mut Reasons) {
    let whole_and_kept =
        |backup: &&&RootBackup| reasons.contains_key(&backup.backup) && !lacks.contains_key(&backup.backup);
    let oldest = newest_first.iter().filter(whole_and_kept).map(|backup| backup.stop_time).min();
    for backup in newest_first {
        let Some(lack) = lacks.get(&backup.backup) else { continue };
        if oldest.is_some_and(|oldest| backup.stop_time >= oldest) {
            add(reasons, backup.backup, format!("{lack}; it is kept as long as older ones are"));
        }
    }
}

/// The backups without which some point since `begin` could not be recovered, oldest first.
fn needed_by_window(
    facts: &Facts<'_>,
    restorable_newest_first: &[&RootBackup],
    begin: Timestamp,
) -> Vec<(BackupId, String)> {
    let base = restorable_newest_first.iter().position(|backup| backup.stop_time <= begin);
    let base = base.or(restorable_newest_first.len().checked_sub(1));
    let Some(base) = base else { return Vec::new() };
    let mut last = restorable_newest_first[base];
    let why = match last.stop_time <= begin {
        true => format!("the promised window from {begin} on begins with it"),
        false => format!("it is the oldest of the promised window from {begin} on"),
    };
    let mut needed = vec![(last.backup, why)];
    for next in restorable_newest_first[..base].iter().rev() {
        if !facts.wal.get(&next.system_identifier).is_some_and(|wal| leads_to(wal, last, next)) {
            let why = format!("the promised window needs it: no WAL without a gap leads from {} to it", last.backup);
            needed.push((next.backup, why));
            last = next;
        }
    }
    needed
}

/// Whether recovery of one backup can go on to where another one is consistent.
fn leads_to(wal: &ArchivedWal, from: &RootBackup, to: &RootBackup) -> bool {
    from.system_identifier == to.system_identifier
        && wal.on_path(to.stop_timeline, from.stop_timeline, from.consistent_lsn())
        && wal.missing(to.stop_timeline, LsnRange { start: from.start_lsn, end: to.consistent_lsn() }).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_have_names() {
        let date = |text: &str| text.parse::<Date>().unwrap();
        assert_eq!(week(date("2026-11-23")), "week 2026-W48");
        // The last days of a year may belong to the first week of the next.
        assert_eq!(
            (week(date("2024-12-30")), year(date("2024-12-30"))),
            ("week 2025-W01".to_owned(), "2024".to_owned())
        );
        assert_eq!(
            (day(date("2026-01-02")), month(date("2026-01-02"))),
            ("2026-01-02".to_owned(), "2026-01".to_owned())
        );
    }
}
