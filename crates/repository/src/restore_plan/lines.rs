//! Which timeline a restore follows if nobody says so.
//!
//! A timeline and its ancestors are a line. Two lines are one until they part. Which of them go on, and which of several is
//! the cluster's by an operator's word, is judged in [`super::beside`]; here that becomes a choice, or a refusal: where
//! several lines go on and nobody said which is the cluster's, nothing is guessed. A target before the first commit behind
//! the parting is the same on both and needs no choice.
//!
//! A backup may lie on a line that was left: a standby goes on following a dead primary's WAL. Such a backup is newer than
//! others and leads nowhere; it is passed over, with a warning. It says nothing about its line being alive, unless its server
//! was out of recovery.

use jiff::Timestamp;
use postgres_format::{Lsn, Timeline};

use super::beside::{Living, Word};
use super::held::SystemHeld;
use super::{Refusal, RefusalKind, Request, Role, Target, TargetTimeline, TimelineChoice, consistent, join, refuse};
use crate::root::RootBackup;

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
    Err(Refusal { reason, hint, kind: RefusalKind::PassedOver })
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
    let Some(Word { timeline, adopted, adoption }) = held.adopted(&living) else {
        return Err(several(backup, held, &living, request));
    };
    let came = if adopted == timeline { String::new() } else { format!(", of which timeline {timeline} came") };
    let said =
        format!("node {} was adopted as the writer of timeline {adopted} at {}{came}", adoption.node, adoption.written);
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
            "timelines {} were written side by side after they parted, or a failover lost archived WAL, and nothing says \
             which one is the cluster's: {}",
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
