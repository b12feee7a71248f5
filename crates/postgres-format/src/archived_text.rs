//! The two kinds of text among the files that are archived, and what one of them must be before it is taken.
//!
//! A reader of history files takes what it finds (`timeline_history`); whoever archives one is stricter, because nothing
//! can take its place afterwards: the key of a timeline's history is taken once, and an empty file would hide the line
//! that WAL came from.

use crate::backup_history::{self, BackupHistory, BackupHistoryError};
use crate::timeline::Timeline;
use crate::timeline_history::{self, HistoryError, TimelineHistory};
use crate::wal_name::WalFileName;

/// The longest file of either kind, in bytes.
pub const MAX_BYTES: usize = if timeline_history::MAX_BYTES > backup_history::MAX_BYTES {
    timeline_history::MAX_BYTES
} else {
    backup_history::MAX_BYTES
};

/// Why a text is not what its name says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArchivedTextError {
    /// No timeline history.
    #[error(transparent)]
    History(HistoryError),
    /// A timeline history without a line. PostgreSQL writes one only for a timeline that came from another.
    #[error("the history file of timeline {timeline} names no timeline that it came from")]
    Orphan { timeline: Timeline },
    /// No backup history.
    #[error(transparent)]
    BackupHistory(BackupHistoryError),
}

impl ArchivedTextError {
    /// Whether it is what a power cut can leave of a backup history file, which is not flushed to disk and is handed over
    /// all the same. Nothing is lost with it, and PostgreSQL archives nothing behind it until it is taken.
    pub fn is_left_blank(&self) -> bool {
        *self == Self::BackupHistory(BackupHistoryError::Blank)
    }
}

/// Reads a text of at most [`MAX_BYTES`] by its name; the names of WAL pass.
pub fn check(name: WalFileName, text: &[u8]) -> Result<(), ArchivedTextError> {
    match name {
        WalFileName::Segment(_) | WalFileName::Partial(_) => Ok(()),
        WalFileName::History(timeline) => {
            let history = TimelineHistory::parse(timeline, text).map_err(ArchivedTextError::History)?;
            history.parent().map(|_| ()).ok_or(ArchivedTextError::Orphan { timeline })
        }
        WalFileName::BackupHistory { segment, offset } => match BackupHistory::parse(segment, offset, text) {
            Ok(_) => Ok(()),
            Err(error) => Err(ArchivedTextError::BackupHistory(error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn what_is_archived_says_something() {
        let check = |name: &str, text: &[u8]| check(name.parse().unwrap(), text);
        let backup = "000000010000000000000007.00000028.backup";
        assert_eq!(check("00000002.history", &samples::named("15-00000002.history")), Ok(()));
        assert_eq!(check(backup, &samples::named("15-backup_history")), Ok(()));
        for empty in ["", "\n\n", "# by hand\n"] {
            let timeline = Timeline::new(2).unwrap();
            assert_eq!(check("00000002.history", empty.as_bytes()), Err(ArchivedTextError::Orphan { timeline }));
        }
        assert!(matches!(check("00000002.history", b"garbage"), Err(ArchivedTextError::History(_))));
        let blank = check(backup, b"").unwrap_err();
        assert!(blank.is_left_blank());
        assert!(!check(backup, b"garbage\n").unwrap_err().is_left_blank());
        assert!(!check("00000002.history", b"").unwrap_err().is_left_blank());
    }
}
