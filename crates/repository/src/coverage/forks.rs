//! Where a timeline left its parent behind: what the archive holds of the parent beyond the fork. Pure.
//!
//! ```text
//! parent  ───────────────┬──────▶ end         bytes = end - fork: no path but the parent's own has them
//! child                  └────────────▶       the parent goes on: it was written or sent after the child began
//! ```
//!
//! After a failover these are the bytes that were lost with the old primary; if the parent goes on, that one still runs.
//! After a recovery to a point in time they are what was given up on purpose. Which it was, only people know.

use jiff::Timestamp;
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, Timeline};

use super::{ArchivedWal, Fork, to_span};
use crate::name::NodeName;

/// A fork with WAL of the parent beyond it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeftBehind {
    /// The child.
    pub timeline: Timeline,
    /// Where it forked off its parent.
    pub fork: Fork,
    /// The last complete segment of the parent.
    pub last: SegmentName,
    /// The end of that segment, beyond the fork.
    pub end: Lsn,
    /// The size of segments.
    pub size: SegmentSize,
}

/// What the headers say around such a fork.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForkFacts {
    /// Which fork.
    pub left: LeftBehind,
    /// When the child's history was sent, right after the promotion.
    pub begun: Timestamp,
    /// Whether the child's server recovered to a target that somebody had named: what the parent holds beyond the fork was
    /// then given up on purpose.
    pub to_target: bool,
    /// Who sent the parent's last segment.
    pub node: NodeName,
    /// Whether that node was in recovery then: it passed on what it had received.
    pub in_recovery: bool,
    /// When it was sent.
    pub sent: Timestamp,
    /// The last commit or abort in it.
    pub last_commit: Option<Timestamp>,
    /// Where the WAL in it ends, if that is known.
    pub logical_end: Option<Lsn>,
    /// Recovery to an earlier time than this ends with the same commits on both lines: the first commit in either's WAL from
    /// the segment of the fork on is no older. `None` if that is not known of both.
    pub apart_from: Option<Timestamp>,
}

/// What keeps a parent alive after its child began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GoesOn {
    /// It had a commit or an abort at this time.
    Committed(Timestamp),
    /// It holds no commit, and came at this time from a server out of recovery.
    Sent(Timestamp),
}

impl GoesOn {
    /// When.
    pub fn at(&self) -> Timestamp {
        let (Self::Committed(at) | Self::Sent(at)) = self;
        *at
    }
}

impl ArchivedWal {
    /// The forks with WAL of the parent beyond them, by child.
    pub fn left_behind(&self) -> Vec<LeftBehind> {
        let of = |(timeline, history): (&Timeline, &postgres_format::timeline_history::TimelineHistory)| {
            let ended = history.entries().last()?;
            let (_, last) = self.spans.get(&ended.timeline)?.last()?;
            let span = to_span(ended.timeline, (*last, *last));
            let end = SegmentNumber::new(*last).end(self.size);
            let fork = Fork { timeline: ended.timeline, lsn: ended.end };
            let last = SegmentName::new(span.timeline, span.last, self.size);
            (end > fork.lsn).then_some(LeftBehind { timeline: *timeline, fork, last, end, size: self.size })
        };
        self.histories.iter().filter_map(of).collect()
    }
}

impl LeftBehind {
    /// The end of the parent's WAL, as exactly as it is known.
    pub fn end(&self, facts: Option<&ForkFacts>) -> Lsn {
        let within = |end: &Lsn| *end <= self.end;
        facts.and_then(|facts| facts.logical_end).filter(within).unwrap_or(self.end)
    }

    /// How much of the parent's WAL lies beyond the fork, in bytes; 0 if its last segment ends with a switch before it.
    pub fn bytes(&self, facts: Option<&ForkFacts>) -> u64 {
        self.end(facts).as_u64().saturating_sub(self.fork.lsn.as_u64())
    }
}

impl ForkFacts {
    /// Whether the parent goes on although the child began. A commit tells it for certain, up to how well clocks agree;
    /// without one, what a server out of recovery sent. WAL of before that arrives late is no sign.
    pub fn goes_on(&self) -> Option<GoesOn> {
        let sign = match self.last_commit {
            Some(last_commit) => GoesOn::Committed(last_commit),
            None if self.in_recovery => return None,
            None => GoesOn::Sent(self.sent),
        };
        (sign.at() > self.begun).then_some(sign)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coverage::tests::{archive, lsn, timeline};

    #[test]
    fn what_lies_beyond_a_fork_is_found_per_child() {
        let check = |spans: &[(u32, u64, u64)], histories: &[(u32, &str)], expected: &[(u32, u32, u64)]| {
            let wal = archive(spans, histories);
            let found: Vec<_> = wal
                .left_behind()
                .iter()
                .map(|left| (left.timeline.get(), left.fork.timeline.get(), left.bytes(None)))
                .collect();
            assert_eq!(found, expected, "{spans:?} {histories:?}");
        };
        const MIB: u64 = 1 << 20;
        let two = (2, "1\t0/480000\tno recovery target specified\n");
        let three = (3, "1\t0/480000\tx\n2\t0/700000\tx\n");
        check(&[(1, 1, 3), (2, 4, 6)], &[two], &[]);
        // The segment in which the fork lies, archived whole by the old primary.
        check(&[(1, 1, 4), (2, 4, 6)], &[two], &[(2, 1, MIB / 2)]);
        check(&[(1, 1, 3), (1, 5, 8), (2, 4, 6)], &[two], &[(2, 1, 4 * MIB + MIB / 2)]);
        // Exactly on a boundary nothing is lost.
        check(&[(1, 1, 3), (2, 4, 6)], &[(2, "1\t0/400000\tx\n")], &[]);
        check(&[(1, 1, 4), (2, 4, 8)], &[two, three], &[(2, 1, MIB / 2), (3, 2, 2 * MIB)]);
        check(&[(1, 1, 4)], &[two, (3, "1\t0/300000\tx\n")], &[(2, 1, MIB / 2), (3, 1, 2 * MIB)]);
        check(&[(2, 4, 8)], &[two], &[]);
        check(&[(1, 1, 9)], &[], &[]);
    }

    fn facts(last_commit: Option<&str>, sent: &str) -> ForkFacts {
        let time = |text: &str| format!("2026-11-23T{text}Z").parse().unwrap();
        let left = archive(&[(1, 1, 4)], &[(2, "1\t0/440000\tx\n")]).left_behind()[0];
        assert_eq!((left.timeline, left.fork.timeline), (timeline(2), timeline(1)));
        ForkFacts {
            left,
            begun: time("05:00:00"),
            to_target: false,
            node: "db1".parse().unwrap(),
            in_recovery: false,
            sent: time(sent),
            last_commit: last_commit.map(time),
            logical_end: None,
            apart_from: None,
        }
    }

    #[test]
    fn a_parent_goes_on_when_it_commits_or_sends_after_the_child_began() {
        let check = |facts: &ForkFacts, expected: Option<GoesOn>| assert_eq!(facts.goes_on(), expected, "{facts:?}");
        let after: Timestamp = "2026-11-23T05:00:01Z".parse().unwrap();
        check(&facts(Some("04:59:59"), "04:59:59"), None);
        // The dead primary's host came back and its agent sent what had waited.
        check(&facts(Some("04:59:59"), "06:00:00"), None);
        check(&facts(Some("05:00:01"), "06:00:00"), Some(GoesOn::Committed(after)));
        check(&facts(None, "05:00:00"), None);
        check(&facts(None, "05:00:01"), Some(GoesOn::Sent(after)));
        check(&ForkFacts { in_recovery: true, ..facts(None, "05:00:01") }, None);
        check(&ForkFacts { in_recovery: true, ..facts(Some("05:00:01"), "06:00:00") }, Some(GoesOn::Committed(after)));
    }

    #[test]
    fn the_end_is_as_exact_as_the_header() {
        let mut facts = facts(None, "05:00:00");
        let left = facts.left;
        assert_eq!((left.end(Some(&facts)), left.bytes(Some(&facts))), (lsn(5.0), 0xC_0000));
        facts.logical_end = Some(lsn(4.5));
        assert_eq!((left.end(Some(&facts)), left.bytes(Some(&facts))), (lsn(4.5), 0x4_0000));
        // A switch before the fork: the rest of the segment was never written.
        facts.logical_end = Some(lsn(4.0));
        assert_eq!(left.bytes(Some(&facts)), 0);
    }
}
