//! PURE: whether WAL goes on without a gap, for each backup from its start to its end and from there on.

use std::collections::BTreeMap;

use jiff::Timestamp;
use postgres_format::{Lsn, SegmentName, SegmentSize, SystemIdentifier, Timeline};

use super::facts::StoreFacts;
use crate::coverage::{ArchivedWal, Coverage, LsnRange, SegmentSpan};
use crate::name::StoreName;
use crate::observe::Holding;
use crate::root::{RootBackup, System};
use crate::wal_index::CommitSample;

/// Most spans of segments that one text lists.
const SPANS_TOLD_MAX: usize = 4;

/// The WAL of one store that can be read.
#[derive(Debug)]
pub(super) struct StoreWal {
    pub(super) store: StoreName,
    /// Why it is not known.
    pub(super) failed: Option<String>,
    pub(super) systems: BTreeMap<SystemIdentifier, SystemWal>,
}

/// The WAL of one system in one store, or in all together.
#[derive(Debug, Clone)]
pub(super) struct SystemWal {
    pub(super) wal: ArchivedWal,
    pub(super) commits: Vec<CommitSample>,
}

impl StoreWal {
    /// What a store lists, without what was found to be damaged.
    pub(super) fn of(facts: &StoreFacts, held: Result<Holding, String>) -> Self {
        let mut of = Self { store: facts.store.clone(), failed: None, systems: BTreeMap::new() };
        let held = match held {
            Ok(held) => held,
            Err(reason) => {
                of.failed = Some(reason);
                return of;
            }
        };
        for (system, index) in held.wal {
            let Some(mut wal) = index.wal else { continue };
            facts.lost.get(&system).into_iter().flatten().for_each(|name| wal.remove(*name));
            of.systems.insert(system, SystemWal { wal, commits: index.commits });
        }
        of
    }

    /// Adds what a later listing shows: what was on its way is no gap.
    pub(super) fn add(&mut self, later: Self) {
        self.failed = self.failed.take().and(later.failed);
        for (system, more) in later.systems {
            match self.systems.get_mut(&system) {
                Some(known) => known.add(&more),
                None => drop(self.systems.insert(system, more)),
            }
        }
    }
}

impl SystemWal {
    fn add(&mut self, other: &Self) {
        self.wal.add_all(&other.wal);
        self.commits.extend(&other.commits);
    }

    /// The time of the last commit before a position, if a range ends there.
    pub(super) fn commit_before(&self, timeline: Timeline, lsn: Lsn) -> Option<Timestamp> {
        let path = self.wal.path(timeline);
        let on_path = |sample: &&CommitSample| path.iter().any(|leg| leg.timeline == sample.timeline);
        self.commits.iter().filter(on_path).filter(|sample| sample.before <= lsn).map(|sample| sample.time).max()
    }
}

/// What all stores hold of each system.
pub(super) fn together(stores: &[StoreWal]) -> BTreeMap<SystemIdentifier, SystemWal> {
    let mut all: BTreeMap<SystemIdentifier, SystemWal> = BTreeMap::new();
    for (system, wal) in stores.iter().flat_map(|store| &store.systems) {
        match all.get_mut(system) {
            Some(known) => known.add(wal),
            None => drop(all.insert(*system, wal.clone())),
        }
    }
    all
}

/// What recovery of a backup reads before it is consistent.
pub(super) fn own_range(backup: &RootBackup) -> LsnRange {
    LsnRange { start: backup.start_lsn, end: backup.consistent_lsn() }
}

/// Segments that recovery of a backup needs and that are not there.
pub(super) fn lacking(wal: Option<&SystemWal>, backup: &RootBackup) -> Vec<SegmentSpan> {
    match wal {
        Some(held) => held.wal.missing(backup.stop_timeline, own_range(backup)),
        None => {
            let size = SegmentSize::from_bytes(backup.segment_size_bytes).unwrap_or(SegmentSize::DEFAULT);
            ArchivedWal::new(size).needed(backup.stop_timeline, own_range(backup))
        }
    }
}

/// Whether recovery of a backup reads a segment before it is consistent.
pub(super) fn needs(wal: &ArchivedWal, backup: &RootBackup, name: SegmentName) -> bool {
    let Ok(number) = name.number(wal.segment_size()) else { return false };
    let needed = wal.needed(backup.stop_timeline, own_range(backup));
    needed.iter().any(|span| span.timeline == name.timeline() && (span.first..=span.last).contains(&number))
}

/// How far recovery of a backup can go without a gap, and on which timeline: the furthest, and of equals the newest.
pub(super) fn reach(wal: &ArchivedWal, backup: &RootBackup) -> Option<(Lsn, Timeline)> {
    let on_path = |timeline: &Timeline| wal.on_path(*timeline, backup.stop_timeline, backup.consistent_lsn());
    let reaches = wal.timelines().into_iter().filter(on_path);
    let reaches = reaches.filter_map(|timeline| Some((wal.reach(timeline, backup.start_lsn)?, timeline)));
    reaches.max().filter(|(lsn, _)| *lsn >= backup.consistent_lsn())
}

/// WAL that is missing behind backups, and between WAL that is kept.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub(super) range: LsnRange,
    /// The newest timeline on whose path it lies first.
    pub(super) timeline: Timeline,
    pub(super) segments: Vec<SegmentSpan>,
    /// Backups whose WAL goes on up to it: places among those that were given.
    pub(super) behind: Vec<usize>,
}

/// The gaps that limit backups. What all of `kept` condemned is not missing.
pub(super) fn gaps(wal: &ArchivedWal, backups: &[&RootBackup], kept: &[&System]) -> Vec<Gap> {
    let size = wal.segment_size();
    let condemned = |span: &SegmentSpan| {
        let ends = [span.first, span.last].map(|number| SegmentName::new(span.timeline, number, size));
        !kept.is_empty() && kept.iter().all(|system| ends.iter().all(|name| !system.keeps_wal(*name)))
    };
    let mut found: Vec<Gap> = Vec::new();
    for coverage in Coverage::of(wal).timelines {
        for gap in coverage.gaps {
            if found.iter().any(|known| known.range == gap.range && known.segments == gap.segments)
                || gap.segments.iter().all(condemned)
            {
                continue;
            }
            let limited = |backup: &&RootBackup| {
                wal.on_path(coverage.timeline, backup.stop_timeline, backup.consistent_lsn())
                    && backup.consistent_lsn() <= gap.range.start
                    && wal.reach(coverage.timeline, backup.start_lsn) == Some(gap.range.start)
            };
            let behind: Vec<usize> =
                backups.iter().enumerate().filter(|(_, backup)| limited(backup)).map(|(place, _)| place).collect();
            if !behind.is_empty() {
                let (range, timeline, segments) = (gap.range, coverage.timeline, gap.segments);
                found.push(Gap { range, timeline, segments, behind });
            }
        }
    }
    found
}

/// Spans as text.
pub(super) fn spans_text(spans: &[SegmentSpan], size: SegmentSize) -> String {
    let name = |span: &SegmentSpan, number| SegmentName::new(span.timeline, number, size);
    let mut texts: Vec<String> = spans
        .iter()
        .take(SPANS_TOLD_MAX)
        .map(|span| match span.count() {
            1 => name(span, span.first).to_string(),
            count => format!("{} to {} ({count} segments)", name(span, span.first), name(span, span.last)),
        })
        .collect();
    if spans.len() > SPANS_TOLD_MAX {
        texts.push(format!("and {} more", spans.len() - SPANS_TOLD_MAX));
    }
    texts.join(", ")
}
