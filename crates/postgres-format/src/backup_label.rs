//! `backup_label`: where recovery of a base backup begins.
//!
//! The server reads it with fixed formats in a fixed order (`read_backup_label` in `xlogrecovery.c`) and believes it over `pg_control`, so
//! it is stored and restored byte for byte; this only reads it. All lines up to the start timeline are written by every supported version;
//! 17 adds two lines to the label of an incremental backup, with which a server refuses to start before `pg_combinebackup` was run.

use std::str::FromStr;

use crate::label_lines::{Lines, NoLine};
use crate::lsn::Lsn;
use crate::segment::SegmentName;
use crate::timeline::Timeline;

/// The longest label file that is read; the label text itself is at most 1024 bytes.
pub const MAX_BYTES: usize = 8192;

/// The content of a label file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// The redo point of the backup's checkpoint: the first WAL that recovery reads.
    pub start_lsn: Lsn,
    /// The segment of that position.
    pub start_segment: SegmentName,
    /// The backup's checkpoint record, at or after `start_lsn`.
    pub checkpoint: Lsn,
    /// How it was taken: `streamed` from 15 on.
    pub method: String,
    /// Whether the server it was taken from was in recovery, which decides where recovery may end.
    pub from: BackupFrom,
    /// When it was started, in the server's own words and time zone.
    pub start_time: String,
    /// The text that the operator gave it.
    pub label: String,
    /// The timeline of `start_lsn`.
    pub start_timeline: Timeline,
    /// True for the label of an incremental backup, which no server starts from.
    pub has_incremental_from: bool,
}

/// The role of the server that a backup was taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupFrom {
    /// Out of recovery: consistent at the backup-end record.
    Primary,
    /// In recovery: consistent at the minimum recovery point of the copied control file.
    Standby,
}

impl FromStr for BackupFrom {
    type Err = ();

    /// The word in a label file.
    fn from_str(word: &str) -> Result<Self, ()> {
        match word {
            "primary" => Ok(Self::Primary),
            "standby" => Ok(Self::Standby),
            _ => Err(()),
        }
    }
}

/// Why a label file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupLabelError {
    /// Too long to be a label file.
    #[error("backup_label has {bytes} bytes, more than any server writes")]
    TooLong { bytes: usize },
    /// A line is missing, out of order or not of its format.
    #[error("backup_label has no valid line \"{line}\" where it is expected")]
    Line { line: &'static str },
    /// Values that do not go together.
    #[error("backup_label contradicts itself: {reason}")]
    Contradiction { reason: &'static str },
}

impl From<NoLine> for BackupLabelError {
    fn from(NoLine(line): NoLine) -> Self {
        Self::Line { line }
    }
}

impl BackupLabel {
    /// Reads a label file of at most [`MAX_BYTES`].
    pub fn parse(file: &[u8]) -> Result<Self, BackupLabelError> {
        if file.len() > MAX_BYTES {
            return Err(BackupLabelError::TooLong { bytes: file.len() });
        }
        let mut lines = Lines::of(file);
        let (start_lsn, start_segment) = lines.location("START WAL LOCATION")?;
        let label = Self {
            start_lsn,
            start_segment,
            checkpoint: lines.value("CHECKPOINT LOCATION")?,
            method: lines.take("BACKUP METHOD")?,
            from: lines.value("BACKUP FROM")?,
            start_time: lines.take("START TIME")?,
            label: lines.take("LABEL")?,
            start_timeline: lines.value("START TIMELINE")?,
            has_incremental_from: !lines.are_read(),
        };
        if label.has_incremental_from {
            lines.value::<Lsn>("INCREMENTAL FROM LSN")?;
            lines.value::<Timeline>("INCREMENTAL FROM TLI")?;
        }
        match label {
            _ if !lines.are_read() => {
                Err(BackupLabelError::Contradiction { reason: "there is more behind its last line" })
            }
            _ if label.checkpoint < label.start_lsn => {
                Err(BackupLabelError::Contradiction { reason: "the checkpoint is before the start" })
            }
            _ if label.start_segment.timeline() != label.start_timeline => {
                Err(BackupLabelError::Contradiction { reason: "the start segment is of another timeline" })
            }
            label => Ok(label),
        }
    }

    /// True if the server it was taken from was in recovery.
    pub fn from_standby(&self) -> bool {
        self.from == BackupFrom::Standby
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    const GOOD: &str = "START WAL LOCATION: 0/3000028 (file 000000020000000000000003)\nCHECKPOINT LOCATION: 0/03000060\n\
        BACKUP METHOD: streamed\nBACKUP FROM: standby\nSTART TIME: 2026-11-23 04:13:15 UTC\nLABEL: a: b (c)\nSTART TIMELINE: 2\n";

    #[test]
    fn live_sample() {
        let label = BackupLabel::parse(&samples::named("15-backup_label")).unwrap();
        assert_eq!((label.from, label.from_standby(), label.method.as_str()), (BackupFrom::Primary, false, "streamed"));
        assert_eq!((label.label.as_str(), label.start_timeline), ("pg_basebackup base backup", Timeline::FIRST));
        assert!(label.start_lsn < label.checkpoint && !label.has_incremental_from);
    }

    #[test]
    fn texts() {
        let label = BackupLabel::parse(GOOD.as_bytes()).unwrap();
        assert_eq!((label.start_lsn, label.checkpoint), (Lsn::new(0x300_0028), Lsn::new(0x300_0060)));
        assert_eq!((label.label.as_str(), label.start_time.as_str()), ("a: b (c)", "2026-11-23 04:13:15 UTC"));
        assert!(label.from_standby());
        let incremental = format!("{GOOD}INCREMENTAL FROM LSN: 0/2000028\nINCREMENTAL FROM TLI: 1\n");
        assert!(BackupLabel::parse(incremental.as_bytes()).unwrap().has_incremental_from);
        assert!(BackupLabel::parse(&GOOD.replace("LABEL: a", "LABEL: ").into_bytes()).is_ok());
    }

    #[test]
    fn refusals() {
        let error = |text: String| BackupLabel::parse(text.as_bytes()).unwrap_err();
        assert_eq!(error(String::new()), BackupLabelError::Line { line: "START WAL LOCATION" });
        assert_eq!(error(GOOD.replace('\n', "\r\n")), BackupLabelError::Line { line: "START WAL LOCATION" });
        assert_eq!(error(GOOD.trim_end().to_owned()), BackupLabelError::Line { line: "START TIMELINE" });
        assert_eq!(error(GOOD.replace("standby", "elsewhere")), BackupLabelError::Line { line: "BACKUP FROM" });
        assert_eq!(error(GOOD.replace("0/03000060", "0/G")), BackupLabelError::Line { line: "CHECKPOINT LOCATION" });
        assert_eq!(error(format!("{GOOD}x\n")), BackupLabelError::Line { line: "INCREMENTAL FROM LSN" });
        assert_eq!(error(GOOD.repeat(60)), BackupLabelError::TooLong { bytes: GOOD.len() * 60 });
        assert!(matches!(error(GOOD.replace("0/03000060", "0/20")), BackupLabelError::Contradiction { .. }));
        assert!(matches!(error(GOOD.replace("TIMELINE: 2", "TIMELINE: 3")), BackupLabelError::Contradiction { .. }));
    }
}
