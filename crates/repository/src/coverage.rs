//! Which WAL an archive holds without a gap. Pure: names and histories in, ranges out.
//!
//! Rules, all from how recovery reads (`XLogFileReadAnyTLI` in `xlogrecovery.c`):
//! * the path of a timeline is its ancestors and itself, each from where it forked off to where the next one did;
//! * a segment is read from the newest timeline on the path that had begun by then, so the segment in which a fork
//!   lies is read from the child, whose copy begins with the parent's bytes;
//! * where that one is missing, the parent's has the bytes up to the fork, and PostgreSQL takes it without stopping
//!   there: ranges count those bytes, and whoever recovers must set an end himself ([`StandIn`]);
//! * what a parent has after the fork belongs to no path but its own;
//! * a gap lies between known WAL on one path. What a dead primary never archived before the fork is therefore a gap
//!   of the child, and what a timeline has not archived yet is none.
//!
//! The last segment of a range that ends at `e` is `(e - 1) / S`.

pub mod forks;

use std::collections::BTreeMap;

use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, Timeline};
use serde::{Deserialize, Serialize};

/// WAL from `start` up to and without `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LsnRange {
    /// First position.
    pub start: Lsn,
    /// The position after the last.
    pub end: Lsn,
}

impl LsnRange {
    /// Whether `other` lies in it as a whole.
    pub fn includes(&self, other: &LsnRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.end.as_u64().saturating_sub(self.start.as_u64())
    }
}

impl std::fmt::Display for LsnRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", self.start, self.end)
    }
}

/// Segments of one timeline without a gap between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentSpan {
    /// Their timeline.
    pub timeline: Timeline,
    /// The first.
    pub first: SegmentNumber,
    /// The last, which belongs to it.
    pub last: SegmentNumber,
}

impl SegmentSpan {
    /// How many segments.
    pub fn count(&self) -> u64 {
        self.last.as_u64() - self.first.as_u64() + 1
    }

    /// Their names, in order.
    pub fn names(self, size: SegmentSize) -> impl Iterator<Item = SegmentName> {
        let numbers = self.first.as_u64()..=self.last.as_u64();
        numbers.map(move |number| SegmentName::new(self.timeline, SegmentNumber::new(number), size))
    }
}

/// The complete segments and the histories that an archive, or several together, hold of one system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedWal {
    size: SegmentSize,
    /// Spans of each timeline as (first, last), in order, neither touching nor overlapping.
    spans: BTreeMap<Timeline, Vec<(u64, u64)>>,
    histories: BTreeMap<Timeline, TimelineHistory>,
}

/// A stretch of a path: what one timeline contributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leg {
    /// The timeline.
    pub timeline: Timeline,
    /// Where it forked off; [`Lsn::ZERO`] for the first, whose beginning is not known.
    pub begin: Lsn,
    /// Where the next one forked off; `None` for the last.
    pub end: Option<Lsn>,
}

impl ArchivedWal {
    /// Nothing yet.
    pub fn new(size: SegmentSize) -> Self {
        Self { size, spans: BTreeMap::new(), histories: BTreeMap::new() }
    }

    /// The size of its segments.
    pub fn segment_size(&self) -> SegmentSize {
        self.size
    }

    /// Adds a segment; cheapest in order. False if there is no such segment with this segment size.
    pub fn add(&mut self, name: SegmentName) -> bool {
        let Ok(number) = name.number(self.size) else {
            return false;
        };
        self.add_span(SegmentSpan { timeline: name.timeline(), first: number, last: number });
        true
    }

    /// Adds segments.
    pub fn add_span(&mut self, span: SegmentSpan) {
        let spans = self.spans.entry(span.timeline).or_default();
        let (mut first, mut last) = (span.first.as_u64(), span.last.as_u64());
        // Everything that overlaps or touches becomes one.
        let from = spans.partition_point(|(_, end)| end.saturating_add(1) < first);
        let to = spans.partition_point(|(begin, _)| *begin <= last.saturating_add(1));
        if from < to {
            first = first.min(spans[from].0);
            last = last.max(spans[to - 1].1);
        }
        spans.splice(from..to, [(first, last)]);
    }

    /// Takes a segment out, because it turned out to be incomplete or in conflict.
    pub fn remove(&mut self, name: SegmentName) {
        let Ok(number) = name.number(self.size).map(SegmentNumber::as_u64) else {
            return;
        };
        let Some(spans) = self.spans.get_mut(&name.timeline()) else {
            return;
        };
        let Some(index) = spans.iter().position(|(first, last)| (*first..=*last).contains(&number)) else {
            return;
        };
        let (first, last) = spans[index];
        let mut rest = Vec::new();
        if first < number {
            rest.push((first, number - 1));
        }
        if number < last {
            rest.push((number + 1, last));
        }
        spans.splice(index..=index, rest);
        if spans.is_empty() {
            self.spans.remove(&name.timeline());
        }
    }

    /// Leaves of each span of a timeline what `part` gives of it.
    pub fn cut(&mut self, timeline: Timeline, part: impl Fn(SegmentSpan) -> Vec<SegmentSpan>) {
        for span in self.spans.remove(&timeline).unwrap_or_default() {
            part(to_span(timeline, span)).into_iter().for_each(|part| self.add_span(part));
        }
    }

    /// Adds a timeline's history.
    pub fn add_history(&mut self, timeline: Timeline, history: TimelineHistory) {
        self.histories.insert(timeline, history);
    }

    /// Takes a timeline's history out, because nobody knows which of several counts.
    pub fn remove_history(&mut self, timeline: Timeline) {
        self.histories.remove(&timeline);
    }

    /// Adds all that another archive of the same system holds.
    pub fn add_all(&mut self, other: &Self) {
        for span in other.spans() {
            self.add_span(span);
        }
        for (timeline, history) in &other.histories {
            self.histories.entry(*timeline).or_insert_with(|| history.clone());
        }
    }

    /// Whether it holds a segment.
    pub fn holds(&self, timeline: Timeline, number: SegmentNumber) -> bool {
        let number = number.as_u64();
        let spans = self.spans.get(&timeline).map(Vec::as_slice).unwrap_or_default();
        let at = spans.partition_point(|(_, last)| *last < number);
        spans.get(at).is_some_and(|(first, _)| *first <= number)
    }

    /// All segments, by timeline and position.
    pub fn spans(&self) -> impl Iterator<Item = SegmentSpan> + '_ {
        self.spans.iter().flat_map(|(timeline, spans)| spans.iter().map(|span| to_span(*timeline, *span)))
    }

    /// What of this another archive lacks.
    pub fn without(&self, other: &Self) -> Vec<SegmentSpan> {
        let mut lacking = Vec::new();
        for span in self.spans() {
            let (mut next, last) = (span.first.as_u64(), span.last.as_u64());
            for (first, end) in other.spans.get(&span.timeline).map(Vec::as_slice).unwrap_or_default() {
                if *end < next || *first > last {
                    continue;
                }
                if *first > next {
                    lacking.push(to_span(span.timeline, (next, first - 1)));
                }
                next = end.saturating_add(1);
            }
            if next <= last {
                lacking.push(to_span(span.timeline, (next, last)));
            }
        }
        lacking
    }

    /// Histories by timeline.
    pub fn histories(&self) -> &BTreeMap<Timeline, TimelineHistory> {
        &self.histories
    }

    /// All timelines of which there is a segment or a history, oldest first.
    pub fn timelines(&self) -> Vec<Timeline> {
        let mut timelines: Vec<Timeline> = self.spans.keys().chain(self.histories.keys()).copied().collect();
        timelines.sort_unstable();
        timelines.dedup();
        timelines
    }

    /// Whether the ancestry of a timeline is known; the first one has none.
    pub fn knows_history(&self, timeline: Timeline) -> bool {
        timeline == Timeline::FIRST || self.histories.contains_key(&timeline)
    }

    /// The path to a timeline, oldest leg first. Without its history the timeline is all there is.
    pub fn path(&self, timeline: Timeline) -> Vec<Leg> {
        let mut legs = Vec::new();
        let mut begin = Lsn::ZERO;
        for ended in self.histories.get(&timeline).map(TimelineHistory::entries).unwrap_or_default() {
            legs.push(Leg { timeline: ended.timeline, begin, end: Some(ended.end) });
            begin = ended.end;
        }
        legs.push(Leg { timeline, begin, end: None });
        legs
    }

    /// Whether a position on a timeline lies on the path to another timeline.
    pub fn on_path(&self, target: Timeline, timeline: Timeline, lsn: Lsn) -> bool {
        self.path(target).iter().any(|leg| leg.timeline == timeline && leg.end.is_none_or(|end| lsn <= end))
    }

    /// WAL along the path to a timeline, without gaps inside each range.
    pub fn ranges(&self, timeline: Timeline) -> Vec<LsnRange> {
        let mut pieces: Vec<LsnRange> = Vec::new();
        for leg in self.path(timeline) {
            let from = SegmentNumber::containing(leg.begin, self.size).as_u64();
            for (first, last) in self.spans.get(&leg.timeline).map(Vec::as_slice).unwrap_or_default() {
                if *last < from {
                    continue;
                }
                let start = SegmentNumber::new((*first).max(from)).start(self.size);
                let end = SegmentNumber::new(*last).end(self.size);
                let end = leg.end.map_or(end, |fork| fork.min(end));
                if start < end {
                    pieces.push(LsnRange { start, end });
                }
            }
        }
        pieces.sort_unstable();
        let mut ranges: Vec<LsnRange> = Vec::new();
        for piece in pieces {
            match ranges.last_mut() {
                Some(last) if piece.start <= last.end => last.end = last.end.max(piece.end),
                _ => ranges.push(piece),
            }
        }
        ranges
    }

    /// How far WAL goes on without a gap from a position on the path to a timeline. `None` if it is not there at all.
    pub fn reach(&self, timeline: Timeline, from: Lsn) -> Option<Lsn> {
        let holding = self.ranges(timeline).into_iter().find(|range| range.start <= from && from < range.end);
        holding.map(|range| range.end)
    }

    /// The segments that recovery reads for a range on the path to a timeline, oldest first.
    pub fn needed(&self, timeline: Timeline, range: LsnRange) -> Vec<SegmentSpan> {
        if range.start >= range.end {
            return Vec::new();
        }
        let first = SegmentNumber::containing(range.start, self.size).as_u64();
        let last = SegmentNumber::last_before(range.end, self.size).as_u64();
        let legs = self.path(timeline);
        let begins = |leg: &Leg| SegmentNumber::containing(leg.begin, self.size).as_u64();
        let mut needed = Vec::new();
        for (index, leg) in legs.iter().enumerate() {
            // A leg is read until the segment in which the next one begins.
            let until = legs.get(index + 1).map(|next| begins(next).checked_sub(1));
            let until = match until {
                None => last,
                Some(Some(until)) => until.min(last),
                Some(None) => continue,
            };
            let from = begins(leg).max(first);
            if from <= until {
                needed.push(to_span(leg.timeline, (from, until)));
            }
        }
        needed
    }

    /// The segments that are lacking for a range on the path to a timeline, oldest first.
    pub fn missing(&self, timeline: Timeline, range: LsnRange) -> Vec<SegmentSpan> {
        let mut missing = Vec::new();
        let mut next = range.start;
        for held in self.ranges(timeline) {
            if held.end <= next {
                continue;
            }
            if held.start >= range.end {
                break;
            }
            if held.start > next {
                missing.extend(self.needed(timeline, LsnRange { start: next, end: held.start }));
            }
            next = held.end;
        }
        if next < range.end {
            missing.extend(self.needed(timeline, LsnRange { start: next, end: range.end }));
        }
        missing
    }

    /// Where an older timeline's segment lies in place of the child's own on the path to a timeline, oldest first.
    pub fn stand_ins(&self, timeline: Timeline) -> Vec<StandIn> {
        let legs = self.path(timeline);
        let begins = |leg: &Leg| SegmentNumber::containing(leg.begin, self.size);
        let mut numbers: Vec<SegmentNumber> = legs.iter().skip(1).map(begins).collect();
        numbers.dedup();
        let at = |number: SegmentNumber| {
            // Newest first, as recovery looks for it.
            let mut candidates = legs.iter().rev().filter(|leg| begins(leg) <= number);
            let child = candidates.next()?;
            if self.holds(child.timeline, number) {
                return None;
            }
            let parent = candidates.find(|leg| self.holds(leg.timeline, number))?;
            Some(StandIn {
                segment: SegmentName::new(parent.timeline, number, self.size),
                wanted: SegmentName::new(child.timeline, number, self.size),
                fork: parent.end?,
                begin: number.start(self.size),
            })
        };
        // Legs without length may end before the segment in which they are listed.
        numbers.into_iter().filter_map(at).filter(|found| found.begin <= found.fork).collect()
    }
}

/// A segment of an older timeline that recovery to a newer one reads because the newer one's own is missing.
///
/// PostgreSQL does not stop in it where the timelines part: it replays the older one beyond, and goes on with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StandIn {
    /// The older timeline's.
    pub segment: SegmentName,
    /// The one that is missing.
    pub wanted: SegmentName,
    /// Up to where the older one is good.
    pub fork: Lsn,
    /// Where both begin; at the fork if that lies on the boundary, and then nothing of the older one is good.
    pub begin: Lsn,
}

fn to_span(timeline: Timeline, (first, last): (u64, u64)) -> SegmentSpan {
    SegmentSpan { timeline, first: SegmentNumber::new(first), last: SegmentNumber::new(last) }
}

/// What an archive holds of all timelines of one system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    /// By timeline, oldest first.
    pub timelines: Vec<TimelineCoverage>,
}

/// What an archive holds along the path to one timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineCoverage {
    /// The timeline.
    pub timeline: Timeline,
    /// Where it forked off; `None` for the first, and if the history is missing.
    pub parent: Option<Fork>,
    /// Whether its history is there; true for the first, which has none.
    pub history_present: bool,
    /// What the timeline itself has, from its fork on.
    pub own: Vec<LsnRange>,
    /// What its path has, ancestors included.
    pub ranges: Vec<LsnRange>,
    /// What lies between those ranges.
    pub gaps: Vec<Gap>,
    /// The end of the last range.
    pub tip: Option<Lsn>,
    /// Segments of older timelines in place of missing ones, which recovery would follow past the fork.
    pub stand_ins: Vec<StandIn>,
}

/// Where a timeline forked off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fork {
    /// From which timeline.
    pub timeline: Timeline,
    /// Where that one ended for this one.
    pub lsn: Lsn,
}

/// WAL that is missing between WAL that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// What is missing.
    pub range: LsnRange,
    /// In which segments it would be.
    pub segments: Vec<SegmentSpan>,
}

impl Coverage {
    /// Works it out.
    pub fn of(wal: &ArchivedWal) -> Self {
        let timelines = wal.timelines().into_iter().map(|timeline| TimelineCoverage::of(wal, timeline));
        Self { timelines: timelines.collect() }
    }

    /// One timeline's.
    pub fn timeline(&self, timeline: Timeline) -> Option<&TimelineCoverage> {
        self.timelines.iter().find(|coverage| coverage.timeline == timeline)
    }
}

impl TimelineCoverage {
    fn of(wal: &ArchivedWal, timeline: Timeline) -> Self {
        let ranges = wal.ranges(timeline);
        let path = wal.path(timeline);
        let fork = path.last().map_or(Lsn::ZERO, |leg| leg.begin);
        let parent = path.len().checked_sub(2).map(|index| Fork { timeline: path[index].timeline, lsn: fork });
        let gap = |pair: &[LsnRange]| {
            let range = LsnRange { start: pair[0].end, end: pair[1].start };
            Gap { segments: wal.needed(timeline, range), range }
        };
        let own = wal.spans.get(&timeline).map(Vec::as_slice).unwrap_or_default();
        let own = own.iter().filter_map(|(first, last)| {
            let start = SegmentNumber::new(*first).start(wal.size).max(fork);
            let end = SegmentNumber::new(*last).end(wal.size);
            (start < end).then_some(LsnRange { start, end })
        });
        Self {
            timeline,
            parent,
            history_present: wal.knows_history(timeline),
            own: own.collect(),
            gaps: ranges.windows(2).map(gap).collect(),
            tip: ranges.last().map(|range| range.end),
            ranges,
            stand_ins: wal.stand_ins(timeline),
        }
    }
}

#[cfg(test)]
mod tests;
