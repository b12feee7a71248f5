//! Which timeline a restore follows if nobody says so.
//!
//! A timeline and its ancestors are a line. Two lines are one until they part; what is archived beyond that tells what
//! happened:
//!
//! ```text
//! 1 ──────────┬─────╳              the parent fell silent when the child began: a failover, or a recovery to a point
//! 2           └───────────▶        in time, and the child goes on
//!
//! 1 ──────────┬───────────▶        the child wrote nothing of its own: a copy was opened to look at it
//! 2           └──╳
//!
//! 1 ──────────┬───────────▶        both were written after the child began: two servers lived, and only people know
//! 2           └───────────▶        which one is the cluster's
//! ```
//!
//! In the last case nothing is guessed. An operator's adoption of a node as the writer of one of the lines, made after
//! they parted, settles it. A target before the first commit behind the parting is the same on both. The signs are times
//! of commits, so clocks that disagree can hide a few seconds. Where a long transaction hides the commits, WAL that was
//! sent is a sign too.
//!
//! A backup may lie on a line that was left: a standby goes on following a dead primary's WAL. Such a backup is newer than
//! others and leads nowhere; it is passed over, with a warning. It says nothing about its line being alive, unless its server
//! was out of recovery.

use jiff::{SignedDuration, Timestamp};
use postgres_format::{Lsn, Timeline};

use super::held::SystemHeld;
use super::{Refusal, RefusalKind, Request, Role, Target, TargetTimeline, TimelineChoice, consistent, join, refuse};
use crate::adoption::Adoption;
use crate::root::RootBackup;
use crate::wal_index::CommitSample;

/// How far the clocks of two hosts may be apart: a commit this soon after the other line began is no sign of life.
const CLOCKS_APART: SignedDuration = SignedDuration::from_secs(5);

/// The timeline that recovery follows, and why.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Followed {
    pub(super) target: TargetTimeline,
    /// The timeline at the end of the path.
    pub(super) on: Timeline,
    pub(super) reason: String,
    pub(super) warnings: Vec<String>,
}

impl Followed {
    fn new(target: TargetTimeline, on: Timeline, reason: impl Into<String>) -> Self {
        Self { target, on, reason: reason.into(), warnings: Vec::new() }
    }
}

/// Chooses the timeline for a backup.
pub(super) fn follow(backup: &RootBackup, held: &SystemHeld, request: &Request) -> Result<Followed, Refusal> {
    let own = backup.stop_timeline;
    check_histories(own, held, request)?;
    match (request.timeline, &request.target) {
        (TimelineChoice::Number(wanted), _) => {
            check_number(backup, held, wanted)?;
            Ok(Followed::new(TargetTimeline::Number(wanted), wanted, format!("timeline {wanted} was asked for")))
        }
        (TimelineChoice::Current, _) => {
            Ok(Followed::new(TargetTimeline::Current, own, "the backup's own timeline was asked for"))
        }
        (TimelineChoice::Newest, Target::Immediate) => {
            let reason = "an immediate target lies on the backup's own timeline";
            let mut followed = Followed::new(TargetTimeline::Current, own, reason);
            followed.warnings.extend(check_left(backup, held, request)?);
            Ok(followed)
        }
        (TimelineChoice::Newest, _) => {
            let left = check_left(backup, held, request)?;
            let mut followed = living_line(backup, held, request)?;
            followed.warnings.extend(left);
            Ok(if request.role == Role::Standby { for_standby(followed, held) } else { followed })
        }
    }
}

/// Refuses what depends on a history that nobody is served: recovery would end before it began, or follow another line as if
/// that were the newest.
fn check_histories(own: Timeline, held: &SystemHeld, request: &Request) -> Result<(), Refusal> {
    let matters = |undecided: &Timeline| match (request.timeline, &request.target) {
        (TimelineChoice::Number(wanted), _) => [own, wanted].contains(undecided),
        (TimelineChoice::Current, _) | (TimelineChoice::Newest, Target::Immediate) => own == *undecided,
        (TimelineChoice::Newest, _) => *undecided >= own,
    };
    let Some(undecided) = held.undecided_histories().find(matters) else { return Ok(()) };
    refuse(
        format!(
            "the history of timeline {undecided} is stored with conflicting contents and waits for an operator's choice"
        ),
        "`pgconvoy conflict resolve` says which content counts; --target-timeline chooses a line that does not need it",
    )
}

fn check_number(backup: &RootBackup, held: &SystemHeld, wanted: Timeline) -> Result<(), Refusal> {
    let known = held.lines_of(backup);
    if known.contains(&wanted) {
        return Ok(());
    }
    let (own, end) = (backup.stop_timeline, consistent(backup));
    let reason = if held.wal.knows_history(wanted) {
        format!(
            "timeline {wanted} did not come from timeline {own} at or after {end}, where backup {} ends",
            backup.backup
        )
    } else {
        format!("the history file of timeline {wanted} is not in the archive")
    };
    refuse(reason, format!("backup {} can be recovered along timeline {}", backup.backup, join(&known)))
}

/// Refuses a backup that lies on a line which was left for one that goes on; of one that was asked for it is only told.
fn check_left(backup: &RootBackup, held: &SystemHeld, request: &Request) -> Result<Option<String>, Refusal> {
    let Some((newer, fork)) = held.left_for(backup) else { return Ok(None) };
    let reason = format!(
        "backup {} of node {} ended at {} on timeline {}, which timeline {newer} had left at {fork}: what timeline {newer} \
         wrote cannot be recovered with it",
        backup.backup,
        backup.node,
        consistent(backup),
        backup.stop_timeline
    );
    if request.backup.is_some() {
        return Ok(Some(reason));
    }
    let hint = format!(
        "take a backup of timeline {newer}; --backup {} restores what timeline {} holds",
        backup.backup, backup.stop_timeline
    );
    Err(Refusal { reason, hint, kind: RefusalKind::LeftLine })
}

/// The one line that goes on, or a refusal if there are several.
fn living_line(backup: &RootBackup, held: &SystemHeld, request: &Request) -> Result<Followed, Refusal> {
    let lines = held.lines_of(backup);
    let Living { timelines, silent } = held.living(&lines);
    let newest = timelines.last().copied().unwrap_or(backup.stop_timeline);
    let mut rivals: Vec<Timeline> = timelines.into_iter().filter(|timeline| *timeline != newest).collect();
    if request.backup.is_none() {
        rivals.extend(held.alive_beside(backup, newest));
    }
    // Lines that part behind the target hold the same up to it.
    let alike: Vec<Timeline> = rivals.extract_if(.., |rival| held.are_alike(*rival, newest, &request.target)).collect();
    rivals.sort_unstable();
    if rivals.is_empty() {
        return Ok(match request.target {
            Target::Time(time) if !alike.is_empty() => fullest(backup, held, newest, alike, time),
            _ => alone(newest, &silent),
        });
    }
    let mut living: Vec<Timeline> = rivals.into_iter().chain([newest]).collect();
    living.sort_unstable();
    let Some((timeline, adoption)) = held.adopted(&living) else {
        return Err(several(backup, held, &living, request));
    };
    let said =
        format!("node {} was adopted as the writer of timeline {timeline} at {}", adoption.node, adoption.written);
    if !lines.contains(&timeline) {
        return refuse(format!("{said}, and backup {} is not on the way to it", backup.backup), "");
    }
    let others: Vec<Timeline> = living.into_iter().filter(|other| *other != timeline).collect();
    let mut followed = Followed::new(TargetTimeline::Number(timeline), timeline, said);
    followed.warnings.push(format!("timeline {} is written too and is not followed", join(&others)));
    Ok(followed)
}

fn alone(timeline: Timeline, silent: &[Timeline]) -> Followed {
    let target = TargetTimeline::Number(timeline);
    let newer: Vec<Timeline> = silent.iter().copied().filter(|silent| *silent > timeline).collect();
    if newer.is_empty() {
        return Followed::new(target, timeline, format!("timeline {timeline} is the newest that the backup is on"));
    }
    let reason = format!("timeline {timeline} is the newest that the backup is on and that goes on");
    let mut followed = Followed::new(target, timeline, reason);
    followed.warnings.push(format!(
        "timeline {} forked off and holds no commits of its own, while timeline {timeline} was written on: it is not \
         followed",
        join(&newer)
    ));
    followed
}

/// Of lines that hold the same up to a time, the one with most WAL.
fn fullest(
    backup: &RootBackup,
    held: &SystemHeld,
    newest: Timeline,
    alike: Vec<Timeline>,
    time: Timestamp,
) -> Followed {
    let mut lines: Vec<Timeline> = alike.into_iter().chain([newest]).collect();
    lines.sort_unstable();
    let known = held.lines_of(backup);
    let reached = lines.iter().copied().filter(|line| known.contains(line));
    let on = reached.max_by_key(|line| (held.wal.reach(*line, backup.start_lsn), *line)).unwrap_or(newest);
    let reason = format!("timelines {} hold the same up to {time}, and timeline {on} the most WAL", join(&lines));
    Followed::new(TargetTimeline::Number(on), on, reason)
}

fn several(backup: &RootBackup, held: &SystemHeld, living: &[Timeline], request: &Request) -> Refusal {
    let newest = living.last().copied().unwrap_or(backup.stop_timeline);
    let apart = living.iter().filter(|line| **line != newest).map(|line| held.apart_from(*line, newest));
    let alike = match (&request.target, apart.min().flatten()) {
        (Target::Time(_), Some(apart)) => format!("before {apart} they hold the same; "),
        _ => String::new(),
    };
    let described = living.iter().map(|timeline| {
        let reach = held.wal.ranges(*timeline).last().map(|range| range.end);
        let reach = reach.map_or_else(|| "has no WAL".to_owned(), |end| format!("reaches {end}"));
        let last = held.last_commit(*timeline, Lsn::new(u64::MAX));
        let last = last.map_or_else(|| "no commit known".to_owned(), |time| format!("last commit {time}"));
        format!("timeline {timeline} {reach}, {last}")
    });
    Refusal {
        reason: format!(
            "timelines {} were written side by side after they parted, and nothing says which one is the cluster's: {}",
            join(living),
            described.collect::<Vec<_>>().join("; ")
        ),
        hint: format!(
            "{alike}--target-timeline N follows one of them (backup {} is on {}); `pgconvoy node adopt` says which server is \
             the cluster's from now on",
            backup.backup,
            join(&held.lines_of(backup).into_iter().filter(|line| living.contains(line)).collect::<Vec<_>>())
        ),
        kind: RefusalKind::Own,
    }
}

/// A standby follows every promotion, unless the newest timeline of all is not its own.
fn for_standby(followed: Followed, held: &SystemHeld) -> Followed {
    if held.wal.timelines().last() <= Some(&followed.on) {
        return Followed::new(TargetTimeline::Latest, followed.on, "a standby follows every promotion");
    }
    let mut followed = followed;
    followed.warnings.push(format!(
        "the standby stays on timeline {}: following every promotion would lead it to another line",
        followed.on
    ));
    followed
}

/// Lines that go on.
#[derive(Debug, PartialEq, Eq)]
struct Living {
    /// More than one if servers wrote side by side; oldest first.
    timelines: Vec<Timeline>,
    /// Lines that forked off without any commits of their own while another went on.
    silent: Vec<Timeline>,
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

    /// Each newer line takes the place of those that had fallen silent when it began.
    fn living(&self, lines: &[Timeline]) -> Living {
        let mut living = Living { timelines: Vec::new(), silent: Vec::new() };
        for newer in lines.iter().copied() {
            let begun = self.begun.get(&newer).copied();
            let mut rivals = living.timelines.clone();
            rivals.retain(|older| self.wrote_apart(*older, newer, begun));
            if rivals.is_empty() {
                living.timelines = vec![newer];
            } else if self.wrote_own(newer, begun) {
                rivals.push(newer);
                living.timelines = rivals;
            } else {
                living.silent.push(newer);
            }
        }
        living
    }

    /// The living line for which that of a backup was left, and where they parted. Nothing without knowing when that was.
    fn left_for(&self, backup: &RootBackup) -> Option<(Timeline, Lsn)> {
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
        // Its server wrote when the newer line had begun: both lived.
        let begun = self.begun.get(&child.timeline)?;
        (backup.from_standby || backup.stop_time <= *begun).then_some((newer, child.begin))
    }

    /// Lines that a backup is not on and that were written after it ended; newer ones, also after what is known of its own
    /// line, because the end of a standby's backup is no sign of life.
    fn alive_beside(&self, backup: &RootBackup, line: Timeline) -> Vec<Timeline> {
        let lines = self.lines_of(backup);
        let beside = |other: &Timeline| {
            let parting = self.parting(*other, line);
            let last = self.signs_on(line).filter(|sample| sample.before > parting).map(|sample| sample.time).max();
            let since = last.map_or(backup.stop_time, |last| last.min(backup.stop_time));
            let wrote = match *other > line {
                true => self.signs_on(*other).any(|sample| sample.before > parting && sample.time > since),
                false => self.wrote_apart(*other, line, Some(backup.stop_time)),
            };
            self.wal.knows_history(*other) && !lines.contains(other) && wrote
        };
        self.wal.timelines().into_iter().filter(beside).collect()
    }

    /// Where two lines part: up to there they hold the same.
    fn parting(&self, one: Timeline, other: Timeline) -> Lsn {
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
    fn are_alike(&self, one: Timeline, other: Timeline, target: &Target) -> bool {
        match target {
            Target::Lsn(lsn) => self.parting(one, other) >= *lsn,
            Target::Time(time) => self.apart_from(one, other).is_some_and(|apart| *time < apart),
            Target::Latest | Target::Immediate | Target::Xid(_) | Target::Name(_) => false,
        }
    }

    /// Recovery to an earlier time than this ends with the same commits on two lines. Known only where neither forks again.
    fn apart_from(&self, one: Timeline, other: Timeline) -> Option<Timestamp> {
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

    /// Whether a line was written on where another one had left it, after that one began. Without a time for that, only
    /// segments that lie behind the parting as a whole count.
    fn wrote_apart(&self, line: Timeline, other: Timeline, begun: Option<Timestamp>) -> bool {
        let parting = self.parting(line, other);
        self.signs_on(line).any(|sample| {
            let later = match begun {
                Some(begun) => sample.time.duration_since(begun) > CLOCKS_APART,
                None => self.begins(sample) >= parting,
            };
            sample.before > parting && later
        })
    }

    /// Whether a timeline holds commits of its own, or so much WAL that it must. Its first segment begins with the
    /// parent's.
    fn wrote_own(&self, timeline: Timeline, begun: Option<Timestamp>) -> bool {
        let fork = self.wal.path(timeline).last().map_or(Lsn::ZERO, |leg| leg.begin);
        let end = self.wal.ranges(timeline).last().map_or(fork, |range| range.end);
        if self.is_searched_in_part(fork, end) {
            return true;
        }
        let own = |sample: &&CommitSample| sample.timeline == timeline && sample.before > fork;
        self.commits
            .iter()
            .filter(own)
            .any(|sample| self.begins(sample) >= fork || begun.is_some_and(|begun| sample.time > begun))
    }

    /// Where the segment of a commit begins.
    fn begins(&self, sample: &CommitSample) -> Lsn {
        sample.before.checked_sub(self.wal.segment_size().bytes()).unwrap_or(Lsn::ZERO)
    }

    /// The newest word of an operator about one of these lines, said after the newest of them began.
    fn adopted(&self, living: &[Timeline]) -> Option<(Timeline, &Adoption)> {
        let begun = living.iter().max().and_then(|newest| self.begun.get(newest));
        let of = |timeline: &Timeline| self.adoptions.get(timeline).map(|newest| (*timeline, &newest.adoption));
        let later = |(_, adoption): &(Timeline, &Adoption)| begun.is_none_or(|begun| adoption.written > *begun);
        living.iter().filter_map(of).filter(later).max_by_key(|(_, adoption)| adoption.written)
    }
}
