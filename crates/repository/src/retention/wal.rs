//! From where the WAL of each timeline is kept.
//!
//! ```text
//! timeline 1   ....[==]......[==]....|=====================>      [==] start to consistency of an older backup
//!                                    oldest need                  |==> everything from there on
//! ```
//!
//! With a promised window, WAL is kept without a gap from the backup that the window begins with, and of older backups that
//! stay only what makes them consistent, but for one that is being restored. Without one it is kept from the oldest backup that stays. A timeline on whose path
//! that backup does not lie (a branch that was given up) keeps WAL from the same position on, and so grows shorter too.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, Timeline};

use super::keep::own_wal;
use super::{Facts, Policy, Verdict, WalLine};
use crate::coverage::ArchivedWal;
use crate::name::BackupId;
use crate::root::{RootBackup, System, WalKept, WalSpan};

/// A position from which on WAL must be there.
struct Need {
    timeline: Timeline,
    lsn: Lsn,
    why: String,
}

pub(super) fn lines(
    facts: &Facts<'_>,
    policy: &Policy,
    removed: &BTreeSet<BackupId>,
    window: &[BackupId],
    as_of: Timestamp,
) -> Vec<WalLine> {
    if policy.keeps_everything() {
        return Vec::new();
    }
    let staying: Vec<&RootBackup> =
        facts.root.backups.iter().filter(|backup| !removed.contains(&backup.backup)).collect();
    let of_system = |system: &System| {
        let Some(wal) = facts.wal.get(&system.system_identifier) else { return Vec::new() };
        lines_of(facts, system, wal, &staying, (window, as_of))
    };
    facts.root.systems.iter().flat_map(of_system).collect()
}

fn lines_of(
    facts: &Facts<'_>,
    system: &System,
    wal: &ArchivedWal,
    staying: &[&RootBackup],
    (window, as_of): (&[BackupId], Timestamp),
) -> Vec<WalLine> {
    let identifier = system.system_identifier;
    let own: Vec<&RootBackup> =
        staying.iter().copied().filter(|backup| backup.system_identifier == identifier).collect();
    let begin = window.first().and_then(|first| staying.iter().find(|backup| backup.backup == *first));
    let inside = |backup: &&&RootBackup| {
        let parent = facts.root.pins.iter().any(|pin| pin.identifiers().any(|id| id == backup.backup));
        let restored = facts.root.restore_of(&backup.backup).is_some_and(|hold| hold.holds_at(as_of));
        parent || restored || begin.is_none_or(|begin| backup.stop_time >= begin.stop_time)
    };
    let mut needs: Vec<Need> = own.iter().filter(inside).map(|backup| need_of(backup)).collect();
    needs.extend(facts.root.pins.iter().filter_map(|pin| {
        let wal = pin.wal.filter(|wal| wal.system_identifier == identifier)?;
        let why = format!("backup {}, which is being copied, needs it from there", pin.backup);
        Some(Need { timeline: wal.timeline, lsn: wal.start_lsn, why })
    }));
    if needs.is_empty() && own.is_empty() && !is_over(facts, system, staying) {
        // Its first backup may be under way.
        return Vec::new();
    }
    let spans = spans_of(wal, &own);
    let line = |timeline: Timeline| line_of(system, wal, timeline, &needs, spans.get(&timeline));
    wal.timelines().into_iter().filter_map(line).collect()
}

/// Whether nothing will ever be recovered with WAL of this system: a later one has a backup, and nothing is under way.
fn is_over(facts: &Facts<'_>, system: &System, staying: &[&RootBackup]) -> bool {
    let later = facts.root.systems.last().filter(|last| last.system_identifier != system.system_identifier);
    let taken_over =
        later.is_some_and(|last| staying.iter().any(|backup| backup.system_identifier == last.system_identifier));
    taken_over && facts.root.pins.is_empty() && facts.running.is_empty()
}

fn need_of(backup: &RootBackup) -> Need {
    let why = format!("backup {} is recovered from there", backup.backup);
    Need { timeline: backup.start_timeline, lsn: backup.start_lsn, why }
}

fn line_of(
    system: &System,
    wal: &ArchivedWal,
    timeline: Timeline,
    needs: &[Need],
    spans: Option<&BTreeSet<(u64, u64)>>,
) -> Option<WalLine> {
    let size = wal.segment_size();
    let (from, why) = first_kept(wal, timeline, needs)?;
    let name = |number: u64| SegmentName::new(timeline, SegmentNumber::new(number), size);
    let standing = system.wal_kept.iter().find(|kept| kept.timeline() == timeline);
    let from = name(from.as_u64());
    let (from, reason) = match standing.filter(|standing| standing.from > from) {
        Some(standing) => (standing.from, "it was kept from there before".to_owned()),
        None => (from, why),
    };
    let kept = WalKept { from, also: also(spans, from, size, name) };
    let segments = wal.spans().filter(|span| span.timeline == timeline).flat_map(|span| span.names(size));
    let before = segments.take_while(|segment| *segment < kept.from);
    // What was condemned before and is still there is the sweep's.
    let stood = |segment: &SegmentName| standing.is_none_or(|standing| standing.keeps(*segment));
    let removed_segments = before.filter(|segment| stood(segment) && !kept.keeps(*segment)).count() as u64;
    if removed_segments == 0 && standing.is_none() {
        return None;
    }
    let verdict = if removed_segments > 0 { Verdict::Remove } else { Verdict::Keep };
    Some(WalLine { system_identifier: system.system_identifier, kept, verdict, removed_segments, reason })
}

/// The first segment of a timeline that is kept with all that follow, and why.
fn first_kept(wal: &ArchivedWal, timeline: Timeline, needs: &[Need]) -> Option<(SegmentNumber, String)> {
    let size = wal.segment_size();
    if needs.is_empty() {
        let last = wal.spans().filter(|span| span.timeline == timeline).last()?;
        return Some((last.last.next(), "no backup that stays is recovered with it".to_owned()));
    }
    let on_path = |need: &&Need| {
        !wal.knows_history(timeline)
            || wal.on_path(timeline, need.timeline, need.lsn) && begins_after(wal, timeline, need)
    };
    let related = needs.iter().filter(on_path).min_by_key(|need| need.lsn);
    let (need, why) = match related {
        Some(need) => (need, need.why.clone()),
        None => {
            let oldest = needs.iter().min_by_key(|need| need.lsn)?;
            (oldest, format!("no backup that stays lies on it, and on other timelines {}", oldest.why))
        }
    };
    Some((SegmentNumber::containing(need.lsn, size), why))
}

/// Whether a position lies on its own timeline's leg of a path, not before it began.
fn begins_after(wal: &ArchivedWal, timeline: Timeline, need: &Need) -> bool {
    wal.path(timeline).iter().any(|leg| leg.timeline == need.timeline && leg.begin <= need.lsn)
}

/// What backups need from start to consistency, by timeline.
fn spans_of(wal: &ArchivedWal, backups: &[&RootBackup]) -> BTreeMap<Timeline, BTreeSet<(u64, u64)>> {
    let mut spans: BTreeMap<Timeline, BTreeSet<(u64, u64)>> = BTreeMap::new();
    let size = wal.segment_size();
    for backup in backups {
        let range = own_wal(backup);
        for span in wal.needed(backup.stop_timeline, range) {
            spans.entry(span.timeline).or_default().insert((span.first.as_u64(), span.last.as_u64()));
        }
        // A fork's segment may stand in for the child's own.
        for leg in wal.path(backup.stop_timeline) {
            let Some(fork) = leg.end.filter(|fork| range.start <= *fork && *fork <= range.end) else { continue };
            let number = SegmentNumber::containing(fork, size).as_u64();
            spans.entry(leg.timeline).or_default().insert((number, number));
        }
        // Without its timeline's history the path is not known; what it began with is.
        let first = SegmentNumber::containing(range.start, size).as_u64();
        spans.entry(backup.start_timeline).or_default().insert((first, first));
    }
    spans
}

/// The spans before `from`, joined.
fn also(
    spans: Option<&BTreeSet<(u64, u64)>>,
    from: SegmentName,
    size: SegmentSize,
    name: impl Fn(u64) -> SegmentName,
) -> Vec<WalSpan> {
    let Ok(from) = from.number(size) else { return Vec::new() };
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (first, last) in spans.into_iter().flatten().filter(|(first, _)| *first < from.as_u64()) {
        let last = (*last).min(from.as_u64() - 1);
        match joined.last_mut() {
            Some(before) if *first <= before.1 + 1 => before.1 = before.1.max(last),
            _ => joined.push((*first, last)),
        }
    }
    joined.into_iter().map(|(first, last)| WalSpan { first: name(first), last: name(last) }).collect()
}
