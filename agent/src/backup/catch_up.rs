//! Brings a standby to where a backup of the hybrid shape begins: recovery of the backup replays from the start, so all
//! changes before it must be in the standby's *files*.
//!
//! Having replayed them is not enough, for they may be in the server's memory only. A restartpoint writes them, and how far it
//! went is told by `pg_control`: it can be made at a checkpoint that was replayed, and the start made one
//! (`CreateRestartPoint` in `src/backend/access/transam/xlog.c`).
//!
//! Invariants: it ends within [`LONGEST`], and within [`STALLED`] of the last progress; the primary that holds the backup is
//! asked to go on all the while. What to do next is decided by [`next`], which is pure.

use std::time::Duration;

use postgres_format::Lsn;
use tokio::time::Instant;

use super::copy::read_control;
use super::holder::Holder;
use super::{BackupError, BackupLines, BackupNode};
use crate::postgres::BackupStart;
use crate::postgres::live::BACKUP_PING;

/// Longest wait for the standby in all.
const LONGEST: Duration = Duration::from_secs(4 * 3600);
/// Longest wait while nothing is replayed.
const STALLED: Duration = Duration::from_secs(120);
/// After how long without progress the primary is asked to switch WAL: a standby that does not stream gets nothing before.
const SWITCH_AFTER: Duration = Duration::from_secs(5);
/// How often the standby is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Where a standby is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Up to where it has replayed.
    replayed: Lsn,
    /// Up to where its files have everything.
    redo: Lsn,
    paused: bool,
    /// For how long it has replayed nothing.
    idle: Duration,
    /// For how long it may.
    patience: Duration,
    /// How long it has been waited for.
    waited: Duration,
    /// Bytes of a WAL segment.
    segment_bytes: u64,
}

impl Place {
    /// A position in the segment behind the last record that was replayed: with that finished, replay goes on.
    fn behind_replayed(&self) -> Lsn {
        let last = self.replayed.checked_sub(1).unwrap_or_default();
        last.checked_add(self.segment_bytes).unwrap_or(last)
    }
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    /// Its files have all that lies before the start.
    Ready,
    /// Wait for replay.
    Wait,
    /// Wait, and have the primary finish its segment if it is not past this position.
    AskForSwitch(Lsn),
    /// Have it write what it has replayed; and ask for a switch first, if what is missing may lie in the primary's segment.
    Restartpoint(Option<Lsn>),
    /// Give up; a line for people.
    GiveUp(String),
}

fn next(place: &Place, start: Lsn) -> Next {
    let Place { replayed, redo, paused, idle, patience, waited, .. } = *place;
    let at = || format!("it has replayed up to {replayed}, its last restartpoint begins at {redo}");
    if redo >= start {
        Next::Ready
    } else if paused {
        Next::GiveUp(format!("replay is paused; {}", at()))
    } else if idle >= patience {
        Next::GiveUp(format!("it replayed nothing for {} s; {}", patience.as_secs(), at()))
    } else if waited >= LONGEST {
        Next::GiveUp(format!("{} s are over; {}", waited.as_secs(), at()))
    } else if replayed > start {
        // Whether the checkpoint of the start is among it shows in what comes of it, and
        // one that does not stream has it only once its segment is finished.
        Next::Restartpoint((idle >= SWITCH_AFTER).then(|| place.behind_replayed()))
    } else if idle >= SWITCH_AFTER {
        Next::AskForSwitch(start)
    } else {
        Next::Wait
    }
}

/// Returns when the standby's files hold all that lies before the start.
///
/// # Errors
/// [`BackupError::Behind`] when it does not come there; as [`Holder::check`].
pub(super) async fn catch_up(
    node: &BackupNode,
    holder: &Holder<'_>,
    start: &BackupStart,
    lines: &BackupLines<'_>,
) -> Result<(), BackupError> {
    let (began, mut moved, mut last) = (Instant::now(), Instant::now(), Lsn::ZERO);
    let mut pings = tokio::time::interval(BACKUP_PING);
    loop {
        tokio::select! {
            biased;
            _ = pings.tick() => holder.check(start).await?,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let (control, _) = read_control(&node.data_directory).await?;
        let (replayed, paused) = (node.server.position().await?.lsn, node.server.replay_paused().await?);
        if replayed > last {
            (last, moved) = (replayed, Instant::now());
        }
        let redo = control.checkpoint_redo;
        let (idle, waited, patience) =
            (moved.elapsed(), began.elapsed(), process::patience("agent/replay-stalled", STALLED));
        let segment_bytes = control.wal_segment_size.bytes();
        let place = Place { replayed, redo, paused, idle, patience, waited, segment_bytes };
        match next(&place, start.start_lsn) {
            Next::Ready => return Ok(()),
            Next::Wait => {}
            Next::AskForSwitch(past) => ask_for_switch(lines, past),
            Next::Restartpoint(past) => {
                if let Some(past) = past {
                    ask_for_switch(lines, past);
                }
                // Writing what it has replayed may take long.
                let made = async { Ok(node.server.restartpoint().await?) };
                holder.while_it_runs(start, made).await?;
            }
            Next::GiveUp(reason) => return Err(BackupError::Behind { start: start.start_lsn, reason }),
        }
    }
}

fn ask_for_switch(lines: &BackupLines<'_>, past: Lsn) {
    if let Some(wish) = lines.switch_wal {
        // A full queue holds a wish already.
        let _ = wish.try_send(past);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_is_waited_for_as_long_as_it_moves_and_not_for_ever() {
        let start = Lsn::new(0x200);
        let place = |replayed, redo| Place {
            replayed: Lsn::new(replayed),
            redo: Lsn::new(redo),
            paused: false,
            idle: Duration::ZERO,
            patience: STALLED,
            waited: Duration::ZERO,
            segment_bytes: 0x1000,
        };
        let check = |place: Place, expected: Next| assert_eq!(next(&place, start), expected, "{place:?}");
        check(place(0x150, 0x100), Next::Wait);
        check(place(0x200, 0x100), Next::Wait);
        check(place(0x201, 0x100), Next::Restartpoint(None));
        check(place(0x201, 0x200), Next::Ready);
        check(Place { paused: true, idle: STALLED, ..place(0x201, 0x200) }, Next::Ready);
        check(Place { idle: SWITCH_AFTER, ..place(0x150, 0x100) }, Next::AskForSwitch(start));
        // Where its last record ends with the segment, what is missing begins right there.
        for (replayed, past) in [(0x250, 0x124f), (0x1000, 0x1fff)] {
            let expected = Next::Restartpoint(Some(Lsn::new(past)));
            check(Place { idle: SWITCH_AFTER, ..place(replayed, 0x100) }, expected);
        }
        let gives_up = |place: Place, part: &str| match next(&place, start) {
            Next::GiveUp(reason) => assert!(reason.contains(part) && reason.contains("0/150"), "{reason}"),
            other => panic!("{other:?}"),
        };
        gives_up(Place { paused: true, ..place(0x150, 0x100) }, "replay is paused");
        gives_up(Place { idle: STALLED, ..place(0x150, 0x100) }, "replayed nothing for 120 s");
        gives_up(Place { waited: LONGEST, ..place(0x150, 0x100) }, "14400 s are over");
    }
}
