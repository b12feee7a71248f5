//! Holds of restores: what a restore reads stays while it reads.
//!
//! A restore holds its backup before it reads the first byte, and again every while. Its hold runs out by itself, so that one
//! that died keeps nothing for ever, and it is not taken away at the end: a restored server reads WAL when the restore has ended.
//!
//! Until when it holds is told by the clock of whoever commits it, but counts from the last sign of the store or its server if
//! that is a little later: retention compares it with such signs, and a clock that is behind must not make a hold that has run
//! out.

use std::time::Duration;

use jiff::Timestamp;

use super::{Hold, Root, RootError};
use crate::name::BackupId;

/// How long a restore's hold lasts after its last word: longer than clocks are apart unnoticed, and than most servers take to
/// recover.
pub const RESTORE_HOLD: Duration = Duration::from_secs(24 * 3600);
/// Why a restore holds a backup, in the words of a hold.
pub const RESTORE_REASON: &str = "restore";

impl Root {
    /// With the hold of a restore that is under way, or with that longer: [`RESTORE_HOLD`] from `now`, or from the last sign of
    /// the store, and never more than twice that. Holds of restores that ran out as long ago go. `by` says who restores, and
    /// where.
    ///
    /// # Errors
    /// [`RootError::Refused`] if the backup does not exist, or if too many are held.
    pub fn with_restore(&self, backup: BackupId, by: &str, now: Timestamp) -> Result<Self, RootError> {
        let stopped = self.backups.iter().map(|backup| backup.stop_time).max();
        let heard = stopped.map_or(self.written, |stopped| stopped.max(self.written));
        let until = Some(later(now.max(heard.min(later(now)))));
        let since = self.restore_of(&backup).map_or(now, |standing| standing.since);
        let hold = Hold::new(backup, RESTORE_REASON.to_owned(), by.to_owned(), since);
        let mut root = self.clone();
        let is_over = |hold: &Hold| hold.restore && hold.until.is_some_and(|until| later(until) < now);
        root.holds.retain(|hold| !is_over(hold));
        root.with_hold(Hold { until, restore: true, ..hold })
    }

    /// The hold of restores on a backup.
    pub fn restore_of(&self, backup: &BackupId) -> Option<&Hold> {
        self.holds.iter().find(|hold| hold.restore && hold.backup == *backup)
    }
}

fn later(than: Timestamp) -> Timestamp {
    than.checked_add(RESTORE_HOLD).unwrap_or(Timestamp::MAX)
}
