//! Whether a backup and the WAL behind it reach a target, told before anything is restored.

use jiff::Timestamp;
use postgres_format::{FullTransactionId, Lsn, Timeline};

use super::held::SystemHeld;
use super::target::TargetXid;
use super::{AtGap, Refusal, RefusalKind, Request, Role, Target, TargetBound, consistent, refuse};
use crate::coverage::LsnRange;
use crate::root::RootBackup;

/// How far apart two transactions of the same short id are.
const SHORT_IDS: u64 = 1 << 32;

/// Length of the record that ends a segment early, on one page (`XLogRecord` alone).
const SWITCH_RECORD_BYTES: u64 = 24;
/// So close to the end of WAL the last record may have begun without being whole.
const LAST_RECORD_BYTES: u64 = 32 * 1024;

/// Where a transaction's end lies, as seen from a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Behind the end of the backup, for certain.
    After,
    /// Perhaps within the backup: it began while the backup ran.
    Within(FullTransactionId),
    /// Perhaps before the backup: it began before the backup did.
    Before(FullTransactionId),
    /// So far behind that another transaction of the same short id comes first.
    Beyond(FullTransactionId),
    /// The backup does not say for certain which transactions had ended when it did.
    Unknown,
}

/// A transaction that had no id yet at some moment ends after that moment; one that had may end at any time.
fn standing(backup: &RootBackup, xid: TargetXid, newest: Option<FullTransactionId>) -> Standing {
    let Some(next) = backup.stop_next_xid.or(backup.start_next_xid) else { return Standing::Unknown };
    let xid = xid.near(newest.unwrap_or(next));
    match (backup.start_next_xid, backup.stop_next_xid) {
        _ if xid.as_u64().checked_sub(next.as_u64()).is_some_and(|ahead| ahead >= SHORT_IDS) => Standing::Beyond(next),
        // A standby's snapshot does not tell whether what it did not know had ended.
        (_, Some(stop)) if xid >= stop && backup.from_standby => Standing::Unknown,
        (_, Some(stop)) if xid >= stop => Standing::After,
        (Some(start), _) if xid < start => Standing::Before(start),
        (_, Some(stop)) => Standing::Within(stop),
        // What had no id when the backup began may have ended while it ran.
        (_, None) => Standing::Unknown,
    }
}

/// Refuses a backup that the target lies before, as far as that shows without WAL. Gives what the operator should know.
pub(super) fn check_after(
    backup: &RootBackup,
    request: &Request,
    newest: Option<FullTransactionId>,
) -> Result<Vec<String>, Refusal> {
    let id = backup.backup;
    let before = |reason| Err(Refusal { reason, hint: String::new(), kind: RefusalKind::BeforeBackup });
    match &request.target {
        Target::Time(time) if *time <= backup.stop_time => {
            let stop = backup.stop_time;
            before(format!("time {time} is before the end of backup {id} ({stop}), where it is first consistent"))
        }
        Target::Lsn(lsn) if *lsn < consistent(backup) => {
            let stop = consistent(backup);
            before(format!("position {lsn} is before the end of backup {id} ({stop}), where it is first consistent"))
        }
        Target::Xid(xid) => check_xid(backup, request, *xid, newest),
        Target::Name(name) => {
            let older = if request.backup.is_none() { "; --backup names an older one" } else { "" };
            Ok(vec![format!(
                "restore point {:?} is searched for while recovering, and may lie before this backup{older}",
                name.as_ref()
            )])
        }
        Target::Latest | Target::Immediate | Target::Time(_) | Target::Lsn(_) => Ok(Vec::new()),
    }
}

/// Refuses a backup that holds a commit from after the target time, by the clock of the server that wrote it: when a
/// backup ended is told by the clock of the node it was taken from, which may be another one.
///
/// `held_commit` is the last commit that is known to lie in the WAL before the backup is consistent. That tells nothing of
/// the segment in which it is; a standby itself tells the newest commit that it had replayed.
pub(super) fn check_commits(
    backup: &RootBackup,
    held_commit: Option<Timestamp>,
    request: &Request,
) -> Result<(), Refusal> {
    let Target::Time(time) = &request.target else { return Ok(()) };
    let held = held_commit.max(backup.last_commit_time);
    let Some(commit) = held.filter(|commit| time < commit) else { return Ok(()) };
    let reason =
        format!("time {time} is before {commit}, when a transaction ended that backup {} holds", backup.backup);
    Err(Refusal { reason, hint: String::new(), kind: RefusalKind::BeforeBackup })
}

fn check_xid(
    backup: &RootBackup,
    request: &Request,
    xid: TargetXid,
    newest: Option<FullTransactionId>,
) -> Result<Vec<String>, Refusal> {
    let id = backup.backup;
    let searched = format!("transaction {xid} is searched for while recovering");
    let doubt = match standing(backup, xid, newest) {
        Standing::After => return Ok(vec![format!("{searched}; without its end in the WAL PostgreSQL does not open")]),
        Standing::Unknown => return Ok(vec![format!("{searched}, and may lie before this backup")]),
        Standing::Beyond(next) => {
            let reason = format!(
                "transaction {xid} is more than {SHORT_IDS} behind backup {id}, whose next one was {next}: PostgreSQL \
                 compares the low 32 bits and would end with an earlier one"
            );
            return refuse(reason, "give the transaction as the server that ran it told it");
        }
        Standing::Within(next) => {
            format!("transaction {xid} may have ended before backup {id} did, whose next one at the end was {next}")
        }
        Standing::Before(next) => {
            format!("transaction {xid} may have ended before backup {id} began, whose next one at the start was {next}")
        }
    };
    if request.backup.is_some() {
        return Ok(vec![format!("{doubt}; PostgreSQL stops if it has")]);
    }
    Err(Refusal {
        reason: doubt,
        hint: format!(
            "--backup {id} restores from it all the same; PostgreSQL stops if the transaction lies before it"
        ),
        kind: RefusalKind::BeforeBackup,
    })
}

/// Where the WAL that recovery reads on a timeline ends, where `reach` is how far it goes without a gap.
pub(super) fn check_reached(
    backup: &RootBackup,
    held: &SystemHeld,
    on: Timeline,
    reach: Lsn,
    request: &Request,
    warnings: &mut Vec<String>,
) -> Result<Lsn, Refusal> {
    match &request.target {
        Target::Latest => {
            let end = check_gap(held, on, reach, request.at_gap, warnings)?;
            check_conflict(held, on, end, request, warnings)?;
            Ok(end)
        }
        Target::Immediate => Ok(consistent(backup)),
        Target::Lsn(lsn) => check_position(held, on, reach, *lsn, warnings),
        Target::Time(time) => {
            check_time(*time, request.bound, held.last_commit(on, reach), warnings)?;
            Ok(reach)
        }
        Target::Xid(_) | Target::Name(_) => Ok(reach),
    }
}

/// PostgreSQL stops at a record that begins at the position or later. In a segment that was switched away from, the last
/// one is the switch.
fn check_position(
    held: &SystemHeld,
    on: Timeline,
    reach: Lsn,
    lsn: Lsn,
    warnings: &mut Vec<String>,
) -> Result<Lsn, Refusal> {
    if lsn >= reach {
        return refuse(format!("WAL reaches only {reach} without a gap, and the target is {lsn}"), "");
    }
    let end = held.records_end(on, reach);
    if let Some(end) = end
        && end.checked_sub(SWITCH_RECORD_BYTES).is_some_and(|last| lsn > last)
    {
        let reason = format!(
            "no record begins at {lsn} or behind it: the WAL up to {reach} ends with a switch that ends at {end}, and \
             PostgreSQL would fail at its end"
        );
        return refuse(reason, "leave out the target to recover all of it, or give an earlier position");
    }
    if end.is_none() && reach.bytes_since(lsn).is_some_and(|bytes| bytes < LAST_RECORD_BYTES) {
        warnings.push(format!(
            "if no whole record begins between {lsn} and {reach}, where WAL ends, PostgreSQL fails there"
        ));
    }
    Ok(lsn)
}

/// A segment whose contents exclude each other is given to nobody, and is not absent either: recovery that asks for it can
/// neither go on nor end.
fn check_conflict(
    held: &SystemHeld,
    on: Timeline,
    end: Lsn,
    request: &Request,
    warnings: &mut Vec<String>,
) -> Result<(), Refusal> {
    let Some(name) = held.conflict_at(on, end) else { return Ok(()) };
    let what = format!("{name}, which follows at {end}, is stored with contents that exclude each other");
    match (request.role, request.at_gap) {
        (Role::Standby, _) => {
            warnings.push(format!("{what}: from the archive the standby gets no further until it is resolved"));
            Ok(())
        }
        (Role::Primary, AtGap::StopBefore) => {
            warnings.push(format!("{what}, and will not be recovered"));
            Ok(())
        }
        (Role::Primary, AtGap::Refuse) => refuse(
            format!("{what}: recovery could neither read it nor end before it"),
            format!(
                "`pgconvoy conflict resolve` says which content counts; --stop-at-gap recovers up to {end}; a target before \
                 that needs neither"
            ),
        ),
    }
}

pub(super) fn check_gap(
    held: &SystemHeld,
    on: Timeline,
    reach: Lsn,
    at_gap: AtGap,
    warnings: &mut Vec<String>,
) -> Result<Lsn, Refusal> {
    let after = held.wal.ranges(on).iter().map(|range| range.start).find(|start| *start > reach);
    match (after, at_gap) {
        (None, _) => Ok(reach),
        (Some(after), AtGap::StopBefore) => {
            warnings.push(format!("WAL from {after} on is archived and will not be recovered: it follows a gap"));
            Ok(reach)
        }
        (Some(after), AtGap::Refuse) => {
            let lacking = LsnRange { start: reach, end: after };
            let spans = held.spans_text(&held.wal.missing(on, lacking));
            let reason = format!("WAL from {lacking} is missing on the way to the latest: {spans}");
            let until = held.last_commit(on, reach).map(|time| format!(", the last commit before it is of {time}"));
            let hint = format!(
                "--stop-at-gap recovers up to {reach}{}; a backup taken after the gap would reach further",
                until.unwrap_or_default()
            );
            refuse(reason, hint)
        }
    }
}

fn check_time(
    time: Timestamp,
    bound: TargetBound,
    last_commit: Option<Timestamp>,
    warnings: &mut Vec<String>,
) -> Result<(), Refusal> {
    match last_commit {
        Some(last) if time > last || (time == last && bound == TargetBound::Inclusive) => {
            let reason = format!(
                "the last commit in the WAL that can be reached is of {last}: PostgreSQL would fail to find one after \
                 {time}"
            );
            refuse(reason, "recover to the latest, or to an earlier time")
        }
        Some(_) => Ok(()),
        None => {
            warnings.push("no commit time is known: whether the target is reached shows at the end".to_owned());
            Ok(())
        }
    }
}
