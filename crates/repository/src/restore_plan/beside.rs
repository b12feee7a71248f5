//! Which lines of timelines go on, by what the archive holds of each behind the place where they part.
//!
//! ```text
//! 1 ──────────┬──╳                 the parent holds nothing behind the fork but the rest of that segment: a failover, and
//! 2           └───────────▶        the child takes its place
//!
//! 1 ──────────┬┄┄┄┄┄┄┄╳            the child's server recovered to a target, which its history tells, and the parent holds
//! 2           └───────────▶        nothing that was committed later: that was given up on purpose
//!
//! 1 ──────────┬───────────▶        the child committed nothing of its own: a copy was opened to look at it
//! 2           └──╳
//!
//! 1 ──────────┬───────────▶        both hold commits that the other one does not: two servers lived, or the failover lost
//! 2           └───────────▶        whole segments that had been archived. Only people know which line is the cluster's
//! ```
//!
//! What counts is where commits lie, and not when they were made: clocks of two hosts may be apart, and the one that is
//! behind would hide what its server wrote beside the other. Times are used for this alone:
//! * in the segment in which the lines part nobody looks for where a commit lies. One that is more than [`CLOCKS_APART`] later
//!   than the other line's beginning was made beside it; without such a one that segment is what a failover loses;
//! * what was given up for a named target was so up to the moment of that recovery;
//! * what is older than a line's beginning by [`CLOCKS_NEVER_APART`] was not written beside it.
//!
//! Where a long transaction hides the commits of much WAL, that WAL counts as if it had some.
//!
//! An operator's adoption of a line's writer settles it for good between the lines that were known when it was said, and for
//! what comes of the adopted one ([`crate::adoption`]). It does so too where the adopted node has archived nothing since.

use jiff::{SignedDuration, Timestamp};
use postgres_format::{Lsn, Timeline};

use super::held::SystemHeld;
use super::{Target, consistent};
use crate::adoption::{Adoption, Numbered};
use crate::coverage::Leg;
use crate::root::RootBackup;
use crate::wal_index::CommitSample;

/// How far the clocks of two hosts may be apart for a commit that is later than a beginning to be so in truth.
const CLOCKS_APART: SignedDuration = SignedDuration::from_secs(5);
/// How far they are never apart: what is earlier than a beginning by that much is so in truth.
const CLOCKS_NEVER_APART: SignedDuration = SignedDuration::from_hours(24);

/// How a timeline began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Beginning {
    /// When, at the latest.
    pub(super) at: Timestamp,
    /// Whether its server recovered to a target that somebody had named.
    pub(super) to_target: bool,
}

impl Beginning {
    fn plain(at: Timestamp) -> Self {
        Self { at, to_target: false }
    }

    /// Whether a moment that another host's clock told lies before it.
    fn is_after(&self, moment: Timestamp) -> bool {
        let ahead = self.at.duration_since(moment);
        if self.to_target { ahead >= -CLOCKS_APART } else { ahead >= CLOCKS_NEVER_APART }
    }

    /// Whether a moment that another host's clock told lies behind it.
    fn is_before(&self, moment: Timestamp) -> bool {
        moment.duration_since(self.at) > CLOCKS_APART
    }
}

/// Lines that go on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Living {
    /// More than one if servers wrote side by side; oldest first.
    pub(super) timelines: Vec<Timeline>,
    /// Lines that forked off without any commits of their own while another went on.
    pub(super) silent: Vec<Timeline>,
}

/// An operator's word that settles which of several lines is the cluster's.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Word<'a> {
    /// The line.
    pub(super) timeline: Timeline,
    /// The timeline of which it was said; the line came of it.
    pub(super) adopted: Timeline,
    /// What was said.
    pub(super) adoption: &'a Adoption,
}

impl SystemHeld {
    /// The timelines along which a backup can be recovered, oldest first.
    pub(super) fn lines_of(&self, backup: &RootBackup) -> Vec<Timeline> {
        let own = backup.stop_timeline;
        let leads = |timeline: &Timeline| {
            *timeline == own
                || (self.wal.knows_history(*timeline) && self.wal.on_path(*timeline, own, consistent(backup)))
        };
        let mut lines: Vec<Timeline> = self.wal.timelines().into_iter().filter(leads).collect();
        if !lines.contains(&own) {
            lines.insert(0, own);
        }
        lines
    }

    /// Each newer line takes the place of those that hold nothing beside it.
    pub(super) fn living(&self, lines: &[Timeline]) -> Living {
        let mut living = Living { timelines: Vec::new(), silent: Vec::new() };
        for newer in lines.iter().copied() {
            let mut rivals = living.timelines.clone();
            rivals.retain(|older| self.went_on(*older, newer) || self.is_preferred(*older, newer));
            if rivals.is_empty() {
                living.timelines = vec![newer];
            } else if rivals.iter().all(|older| self.began_anew(newer, *older) || self.is_preferred(newer, *older)) {
                rivals.push(newer);
                living.timelines = rivals;
            } else {
                living.silent.push(newer);
            }
        }
        living
    }

    /// The living line for which that of a backup was left, and where they parted. Nothing without knowing when that was.
    pub(super) fn left_for(&self, backup: &RootBackup) -> Option<(Timeline, Lsn)> {
        let lines = self.lines_of(backup);
        let known: Vec<Timeline> =
            self.wal.timelines().into_iter().filter(|one| self.wal.knows_history(*one)).collect();
        let living = self.living(&known).timelines;
        if lines.iter().any(|line| living.contains(line)) {
            return None;
        }
        let newer = *living.last()?;
        let path = self.wal.path(newer);
        let child = path.windows(2).find(|pair| pair[0].timeline == backup.stop_timeline).map(|pair| pair[1])?;
        // A server out of recovery, unless it ended before: both lived.
        let begun = self.begun.get(&child.timeline)?;
        (backup.from_standby || begun.is_after(backup.stop_time)).then_some((newer, child.begin))
    }

    /// Lines that a backup is not on and that may have been written after it ended; newer ones, also after what is known of
    /// its own line, because the end of a standby's backup is no sign of life.
    pub(super) fn alive_beside(&self, backup: &RootBackup, line: Timeline) -> Vec<Timeline> {
        let lines = self.lines_of(backup);
        let lived = |last: Option<Timestamp>, since| last.is_some_and(|last| !Beginning::plain(since).is_after(last));
        let beside = |other: &Timeline| {
            let parting = self.parting(*other, line);
            let last = |line| self.signs_on(line).filter(|sign| sign.before > parting).map(|sign| sign.time).max();
            let wrote = match *other > line {
                true => {
                    let since = last(line).map_or(backup.stop_time, |last| last.min(backup.stop_time));
                    self.began_anew(*other, line) && lived(last(*other), since)
                }
                false => self.went_on(*other, line) && lived(last(*other), backup.stop_time),
            };
            self.wal.knows_history(*other) && !lines.contains(other) && (wrote || self.is_preferred(*other, line))
        };
        self.wal.timelines().into_iter().filter(beside).collect()
    }

    /// Where two lines part: up to there they hold the same.
    pub(super) fn parting(&self, one: Timeline, other: Timeline) -> Lsn {
        let (one, other) = (self.wal.path(one), self.wal.path(other));
        let mut parting = Lsn::ZERO;
        for (one, other) in one.iter().zip(&other).take_while(|(one, other)| one.timeline == other.timeline) {
            let ends = (one.end.unwrap_or(Lsn::new(u64::MAX)), other.end.unwrap_or(Lsn::new(u64::MAX)));
            parting = ends.0.min(ends.1);
            if ends.0 != ends.1 {
                break;
            }
        }
        parting
    }

    /// Whether two lines hold the same up to a target.
    pub(super) fn are_alike(&self, one: Timeline, other: Timeline, target: &Target) -> bool {
        match target {
            Target::Lsn(lsn) => self.parting(one, other) >= *lsn,
            Target::Time(time) => self.apart_from(one, other).is_some_and(|apart| *time < apart),
            Target::Latest | Target::Immediate | Target::Xid(_) | Target::Name(_) => false,
        }
    }

    /// Recovery to an earlier time than this ends with the same commits on two lines. Known only where neither forks again.
    pub(super) fn apart_from(&self, one: Timeline, other: Timeline) -> Option<Timestamp> {
        let parting = self.parting(one, other);
        let mut apart = None;
        for line in [one, other] {
            let leg = *self.wal.path(line).last()?;
            if leg.begin > parting {
                return None;
            }
            if leg.begin == parting {
                let of_leg = *self.apart_from.get(&line)?;
                apart = Some(apart.map_or(of_leg, |apart: Timestamp| apart.min(of_leg)));
            }
        }
        apart
    }

    /// Whether a line holds commits behind the place where a newer one left it, that were not given up for that one.
    fn went_on(&self, older: Timeline, newer: Timeline) -> bool {
        let parting = self.parting(older, newer);
        let begun = self.beginning(newer, parting);
        self.signs_on(older).filter(|sign| sign.before > parting).any(|sign| match begun {
            Some(begun) => begun.is_before(sign.time) || self.begins(sign) >= parting && !begun.is_after(sign.time),
            None => self.begins(sign) >= parting,
        })
    }

    /// Whether a newer line holds commits that an older one does not, or so much WAL that it must. Its first segment begins
    /// with the older one's.
    fn began_anew(&self, newer: Timeline, older: Timeline) -> bool {
        let parting = self.parting(newer, older);
        let end = self.wal.ranges(newer).last().map_or(parting, |range| range.end);
        if self.is_searched_in_part(parting, end) {
            return true;
        }
        // Of one server's clock: when the history was sent, and when it committed.
        let begun = self.beginning(newer, parting);
        let own = |sign: &CommitSample| self.begins(sign) >= parting || begun.is_some_and(|begun| sign.time > begun.at);
        self.signs_on(newer).any(|sign| sign.before > parting && own(sign))
    }

    /// How the timeline began with which a line went its own way, as far as that is known.
    fn beginning(&self, line: Timeline, parting: Lsn) -> Option<Beginning> {
        let first = self.wal.path(line).into_iter().find(|leg| leg.begin >= parting)?;
        self.begun.get(&first.timeline).copied()
    }

    /// Where the segment of a commit begins.
    fn begins(&self, sample: &CommitSample) -> Lsn {
        sample.before.checked_sub(self.wal.segment_size().bytes()).unwrap_or(Lsn::ZERO)
    }

    /// The newest word of an operator that settles which of these lines goes on.
    pub(super) fn adopted(&self, living: &[Timeline]) -> Option<Word<'_>> {
        let settles = |(adopted, adoption): (Timeline, &'_ Adoption)| {
            let over_all = |line: &Timeline| {
                living.iter().filter(|other| *other != line).all(|other| self.is_over(adopted, adoption, *line, *other))
            };
            living.iter().copied().find(over_all)
        };
        let bound = self
            .words()
            .find_map(|(adopted, adoption)| Some(Word { timeline: settles((adopted, adoption))?, adopted, adoption }));
        bound.or_else(|| self.adopted_by_time(living))
    }

    /// As [`Self::adopted`], of words that do not say what they are about: said after the newest line began.
    fn adopted_by_time(&self, living: &[Timeline]) -> Option<Word<'_>> {
        let begun = living.iter().max().and_then(|newest| self.begun.get(newest));
        let of = |timeline: &Timeline| self.adoptions.get(timeline).map(|newest| (*timeline, &newest.adoption));
        let counts = |(_, adoption): &(Timeline, &Adoption)| {
            adoption.known.is_none() && begun.is_none_or(|begun| adoption.written > begun.at)
        };
        let word = living.iter().filter_map(of).filter(counts).max_by_key(|(_, adoption)| adoption.written);
        word.map(|(timeline, adoption)| Word { timeline, adopted: timeline, adoption })
    }

    /// Whether the newest word about two lines is for this one.
    fn is_preferred(&self, line: Timeline, other: Timeline) -> bool {
        self.words().find_map(|(adopted, adoption)| {
            let over = |one, two| self.is_over(adopted, adoption, one, two);
            if over(line, other) { Some(true) } else { over(other, line).then_some(false) }
        }) == Some(true)
    }

    /// What operators said, the newest first.
    fn words(&self) -> impl Iterator<Item = (Timeline, &Adoption)> {
        let mut words: Vec<(&Timeline, &Numbered)> = self.adoptions.iter().collect();
        words.sort_by_key(|(_, word)| std::cmp::Reverse((word.number, word.adoption.written)));
        words.into_iter().map(|(timeline, word)| (*timeline, &word.adoption))
    }

    /// Whether an adoption is for one line and knew of the other one: behind the parting the adopted timeline is on the way to
    /// the first, and what the other one goes on with was known.
    fn is_over(&self, adopted: Timeline, adoption: &Adoption, line: Timeline, other: Timeline) -> bool {
        let Some(known) = &adoption.known else { return false };
        let parting = self.parting(line, other);
        let is_behind = |leg: &Leg| leg.end.is_none_or(|end| end > parting);
        let goes_on = self.wal.path(other).into_iter().find(is_behind).map(|leg| leg.timeline);
        self.wal.path(line).iter().any(|leg| leg.timeline == adopted && is_behind(leg))
            && goes_on.is_some_and(|timeline| timeline != adopted && known.contains(&timeline))
    }
}
