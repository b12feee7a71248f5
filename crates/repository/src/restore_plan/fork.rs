//! Recovery along a timeline whose first segment is missing, because its server has not archived it yet or never will.
//!
//! ```text
//! parent  ═══════╤═══╪════▶     the segment in which the child forks off is there of the parent only: PostgreSQL that
//! child          ╰┄┄┄┄┄┄┄▶      recovers along the child reads it, and does not stop at the fork (`XLogFileReadAnyTLI`)
//! ```
//!
//! So all there is to recover is the parent's WAL up to the fork, and a plan for it sets that end itself, on the parent's
//! timeline. What comes before that segment needs no such care. A standby is not given the parent's segment
//! (`wal::line`): it waits for the child's, or streams it.

use super::held::SystemHeld;
use super::lines::Followed;
use super::reach::check_gap;
use super::{
    AtGap, Refusal, Request, Role, Target, TargetAction, TargetBound, TargetTimeline, TimelineChoice, consistent,
    refuse,
};
use crate::coverage::StandIn;
use crate::root::RootBackup;
use postgres_format::{Lsn, SegmentNumber};

/// What recovery follows in fact.
pub(super) struct Course {
    pub(super) followed: Followed,
    /// What was asked for, with an end that was not asked for but must be set.
    pub(super) request: Request,
    /// WAL behind this must not be counted on.
    pub(super) limit: Option<Lsn>,
}

/// Turns away from a timeline before a segment that another one would stand in for.
pub(super) fn course(
    backup: &RootBackup,
    held: &SystemHeld,
    followed: Followed,
    request: &Request,
) -> Result<Course, Refusal> {
    let plain = |followed| Ok(Course { followed, request: request.clone(), limit: None });
    if request.target == Target::Immediate {
        return plain(followed);
    }
    let ahead = |stand: &StandIn| stand.fork >= backup.start_lsn;
    let Some(stand) = held.wal.stand_ins(followed.on).into_iter().find(ahead) else {
        return plain(followed);
    };
    if !held.wal.on_path(stand.segment.timeline(), backup.stop_timeline, consistent(backup)) {
        let reason = format!("{}; backup {} needs it", missing(&stand), backup.backup);
        return refuse(reason, "wait until the segment is archived, or take another backup");
    }
    if request.role == Role::Standby {
        return Ok(standby(backup, followed, request, stand));
    }
    let size = held.wal.segment_size();
    match request.target {
        Target::Latest => up_to_the_fork(held, followed, request, stand),
        // Behind the fork there is nothing, which is refused as such.
        Target::Lsn(lsn) if lsn > stand.fork => plain(followed),
        Target::Lsn(lsn) if SegmentNumber::containing(lsn, size) < SegmentNumber::last_before(stand.fork, size) => {
            plain(followed)
        }
        Target::Lsn(lsn) if request.bound == TargetBound::Inclusive => refuse(
            format!(
                "{}; the record that an inclusive target {lsn} takes in may be one of timeline {}'s behind the fork",
                missing(&stand),
                stand.segment.timeline()
            ),
            "--exclusive ends at the position without it; or wait until the segment is archived",
        ),
        Target::Lsn(_) => Ok(Course { followed: beside(followed, stand), request: request.clone(), limit: None }),
        Target::Time(_) if held.last_commit(followed.on, stand.begin).is_none() => refuse(
            format!("{}, and no commit before it is known: recovery to a time could pass the fork", missing(&stand)),
            "recover to the latest, which ends at the fork; or wait until the segment is archived",
        ),
        Target::Xid(_) | Target::Name(_) if consistent(backup) > stand.begin => refuse(
            format!("{}, and backup {} ends in it", missing(&stand), backup.backup),
            "recover to the latest, which ends at the fork; or wait until the segment is archived",
        ),
        Target::Time(_) | Target::Xid(_) | Target::Name(_) => {
            let mut followed = followed;
            followed.warnings.push(format!("{}: the target is searched for before it only", missing(&stand)));
            Ok(Course { followed, request: request.clone(), limit: Some(stand.begin) })
        }
        Target::Immediate => plain(followed),
    }
}

fn missing(stand: &StandIn) -> String {
    format!(
        "{}, with which timeline {} begins at {}, is not archived, and timeline {}'s segment of that number goes on past \
         the fork",
        stand.wanted,
        stand.wanted.timeline(),
        stand.fork,
        stand.segment.timeline()
    )
}

fn up_to_the_fork(held: &SystemHeld, followed: Followed, request: &Request, stand: StandIn) -> Result<Course, Refusal> {
    let mut followed = followed;
    check_gap(held, followed.on, stand.fork, request.at_gap, &mut followed.warnings)?;
    let request = Request {
        target: Target::Lsn(stand.fork),
        bound: TargetBound::Exclusive,
        action: TargetAction::Promote,
        at_gap: AtGap::Refuse,
        timeline: TimelineChoice::Number(stand.segment.timeline()),
        ..request.clone()
    };
    Ok(Course { followed: beside(followed, stand), request, limit: None })
}

/// Along the parent, which has the same WAL up to the fork.
fn beside(mut followed: Followed, stand: StandIn) -> Followed {
    let parent = stand.segment.timeline();
    let reason = format!(
        "{}; up to the fork at {} timeline {parent} holds the same, and recovery ends there",
        followed.reason, stand.fork
    );
    followed.warnings.push(format!(
        "{}: what timeline {} wrote is not recovered",
        missing(&stand),
        stand.wanted.timeline()
    ));
    Followed { target: TargetTimeline::Number(parent), on: parent, reason, warnings: followed.warnings }
}

fn standby(backup: &RootBackup, mut followed: Followed, request: &Request, stand: StandIn) -> Course {
    followed.warnings.push(format!(
        "{}: the standby is not given that one, and gets past {} by streaming from timeline {}'s server, or when that has \
         archived its segment{}",
        missing(&stand),
        stand.begin,
        stand.wanted.timeline(),
        if consistent(backup) > stand.begin { "; until then it is not consistent and refuses connections" } else { "" }
    ));
    let limit = stand.begin.max(consistent(backup));
    Course { followed, request: request.clone(), limit: Some(limit) }
}
