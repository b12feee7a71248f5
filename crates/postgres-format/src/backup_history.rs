//! The backup history file, `<segment>.<offset>.backup`: a note about a base backup of a primary, in which WAL it began and ended.
//!
//! ```text
//! START WAL LOCATION: 0/700028 (file 000000010000000000000007)
//! STOP WAL LOCATION: 0/700100 (file 000000010000000000000007)
//! CHECKPOINT LOCATION: 0/700060
//! BACKUP METHOD: streamed
//! BACKUP FROM: primary
//! START TIME: 2026-11-23 19:08:41 UTC
//! LABEL: nightly
//! START TIMELINE: 1
//! STOP TIME: 2026-11-23 19:09:12 UTC
//! STOP TIMELINE: 1
//! ```
//!
//! Nothing recovers from it; it is archived for people (`do_pg_backup_stop` in `xlog.c`, `build_backup_content` in `xlogbackup.c`). It is the
//! one file handed to the archiver that the server does not flush to disk, so after a power cut it may be there, flagged, and blank.

use crate::backup_label::BackupFrom;
use crate::label_lines::{Lines, NoLine};
use crate::lsn::Lsn;
use crate::segment::{SegmentName, SegmentSize};
use crate::timeline::Timeline;

/// The longest backup history file that is read; the label text in it is at most 1024 bytes.
pub const MAX_BYTES: usize = 8192;

/// The content of a backup history file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupHistory {
    /// The redo point of the backup's checkpoint.
    pub start_lsn: Lsn,
    /// Where the backup ended.
    pub stop_lsn: Lsn,
    /// The role of the server it was taken from.
    pub from: BackupFrom,
    /// The text that the operator gave it; it may have several lines.
    pub label: String,
    /// The timeline of `start_lsn`.
    pub start_timeline: Timeline,
    /// The timeline of `stop_lsn`.
    pub stop_timeline: Timeline,
}

/// Why a backup history file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupHistoryError {
    /// Too long to be one.
    #[error("a backup history file of {bytes} bytes is longer than any server writes")]
    TooLong { bytes: usize },
    /// Empty, or nothing but zero bytes: what a power cut leaves of one.
    #[error("the backup history file is blank")]
    Blank,
    /// A line is missing, out of order or not of its format.
    #[error("a backup history file has a line \"{line}\", and here is no valid one where it is expected")]
    Line { line: &'static str },
    /// Values that do not go together, or not with the name of the file.
    #[error("the backup history file contradicts itself: {reason}")]
    Contradiction { reason: &'static str },
}

impl From<NoLine> for BackupHistoryError {
    fn from(NoLine(line): NoLine) -> Self {
        Self::Line { line }
    }
}

impl BackupHistory {
    /// Reads the file of this name, of at most [`MAX_BYTES`].
    pub fn parse(segment: SegmentName, offset: u32, file: &[u8]) -> Result<Self, BackupHistoryError> {
        if file.len() > MAX_BYTES {
            return Err(BackupHistoryError::TooLong { bytes: file.len() });
        }
        if file.iter().all(|byte| *byte == 0) {
            return Err(BackupHistoryError::Blank);
        }
        let mut lines = Lines::of(file);
        let (start_lsn, start_segment) = lines.location("START WAL LOCATION")?;
        let (stop_lsn, _) = lines.location("STOP WAL LOCATION")?;
        lines.value::<Lsn>("CHECKPOINT LOCATION")?;
        lines.take("BACKUP METHOD")?;
        let from = lines.value("BACKUP FROM")?;
        lines.take("START TIME")?;
        let label = lines.take_text("LABEL", "START TIMELINE")?;
        let start_timeline = lines.value("START TIMELINE")?;
        lines.take("STOP TIME")?;
        let stop_timeline = lines.value("STOP TIMELINE")?;
        if !lines.are_read() {
            lines.value::<Lsn>("INCREMENTAL FROM LSN")?;
            lines.value::<Timeline>("INCREMENTAL FROM TLI")?;
        }
        let history = Self { start_lsn, stop_lsn, from, label, start_timeline, stop_timeline };
        match history.contradiction(start_segment, segment, offset) {
            _ if !lines.are_read() => {
                Err(BackupHistoryError::Contradiction { reason: "there is more behind its last line" })
            }
            Some(reason) => Err(BackupHistoryError::Contradiction { reason }),
            None => Ok(history),
        }
    }

    fn contradiction(&self, start_segment: SegmentName, segment: SegmentName, offset: u32) -> Option<&'static str> {
        if self.stop_lsn < self.start_lsn {
            return Some("it stops before it starts");
        }
        if start_segment.timeline() != self.start_timeline || self.stop_timeline < self.start_timeline {
            return Some("its timelines do not go together");
        }
        let in_name = (segment.timeline(), segment.log(), segment.segment());
        if in_name != (self.stop_timeline, start_segment.log(), start_segment.segment())
            || !is_place(segment, offset, self.start_lsn)
        {
            return Some("it starts elsewhere than its name says");
        }
        None
    }
}

/// Whether a position lies at this offset of a segment, for a size of segments that makes it so.
fn is_place(segment: SegmentName, offset: u32, lsn: Lsn) -> bool {
    let start = (u64::from(segment.log()) << 32).checked_add(u64::from(offset)).map(Lsn::new);
    let Some(before) = start.and_then(|start| lsn.bytes_since(start)) else { return false };
    let mut sizes = (20..=30).filter_map(|power| SegmentSize::from_bytes(1 << power).ok());
    sizes.any(|size| u64::from(offset) < size.bytes() && before == u64::from(segment.segment()) * size.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    const NAME: &str = "0000000200000000000000C5";
    const GOOD: &str = "START WAL LOCATION: 0/C500028 (file 0000000200000000000000C5)\n\
        STOP WAL LOCATION: 0/C600100 (file 0000000200000000000000C6)\nCHECKPOINT LOCATION: 0/0C500060\n\
        BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-23 04:13:15 UTC\nLABEL: a: b (c)\nSTART TIMELINE: 2\n\
        STOP TIME: 2026-11-23 04:14:15 UTC\nSTOP TIMELINE: 2\n";

    fn parse(text: &str) -> Result<BackupHistory, BackupHistoryError> {
        BackupHistory::parse(NAME.parse().unwrap(), 0x28, text.as_bytes())
    }

    #[test]
    fn live_sample() {
        let segment = "000000010000000000000007".parse().unwrap();
        let file = samples::named("15-backup_history");
        let history = BackupHistory::parse(segment, 0x28, &file).unwrap();
        assert_eq!((history.start_lsn, history.stop_lsn), (Lsn::new(0x70_0028), Lsn::new(0x70_0100)));
        // The server lets a label have several lines, and begin one with a key.
        assert_eq!(history.label, "nightly\nof START TIMELINE: 7");
        assert_eq!((history.from, history.stop_timeline), (BackupFrom::Primary, Timeline::FIRST));
    }

    #[test]
    fn texts() {
        let history = parse(GOOD).unwrap();
        assert_eq!((history.label.as_str(), history.start_timeline.get()), ("a: b (c)", 2));
        assert_eq!(
            parse(&GOOD.replace("a: b", "x\nSTART TIMELINE: 9\ny")).unwrap().label,
            "x\nSTART TIMELINE: 9\ny (c)"
        );
        assert!(parse(&format!("{GOOD}INCREMENTAL FROM LSN: 0/2000028\nINCREMENTAL FROM TLI: 1\n")).is_ok());
        // Of 16 MiB, 64 MiB, in a later log; the digits alone do not tell the size.
        for (name, start) in [("0000000200000000000000C5", "0/C5000028"), ("000000020000000100000003", "1/C000028")] {
            let text = GOOD.replace("0/C500028 (file 0000000200000000000000C5)", &format!("{start} (file {name})"));
            let text = text.replace("0/C600100", "2/0");
            assert!(BackupHistory::parse(name.parse().unwrap(), 0x28, text.as_bytes()).is_ok(), "{name}");
        }
    }

    #[test]
    fn refusals() {
        let error = |text: &str| parse(text).unwrap_err();
        for blank in ["", "\0\0\0"] {
            assert_eq!(error(blank), BackupHistoryError::Blank);
        }
        for (text, line) in [
            ("garbage\n".to_owned(), "START WAL LOCATION"),
            (GOOD.replace("STOP WAL", "STOPP WAL"), "STOP WAL LOCATION"),
            (GOOD.replace("primary", "elsewhere"), "BACKUP FROM"),
            (GOOD.replace("LABEL", "LABLE"), "LABEL"),
            (GOOD.replace("START TIMELINE: 2", "START TIMELINE 2"), "START TIMELINE"),
            (GOOD.trim_end().to_owned(), "STOP TIMELINE"),
            (GOOD[..GOOD.len() / 2].to_owned(), "BACKUP METHOD"),
            (format!("{GOOD}x\n"), "INCREMENTAL FROM LSN"),
        ] {
            assert_eq!(error(&text), BackupHistoryError::Line { line }, "{text}");
        }
        assert_eq!(error(&GOOD.repeat(40)), BackupHistoryError::TooLong { bytes: GOOD.len() * 40 });
        for text in [
            GOOD.replace("0/C600100", "0/C500020"),
            GOOD.replace("START TIMELINE: 2", "START TIMELINE: 1"),
            GOOD.replace("STOP TIMELINE: 2", "STOP TIMELINE: 3"),
            GOOD.replace("0/C500028", "0/C500030"),
            GOOD.replace("0/C500028", "0/C400028"),
            GOOD.replace("file 0000000200000000000000C5", "file 0000000200000000000000C4"),
        ] {
            assert!(matches!(error(&text), BackupHistoryError::Contradiction { .. }), "{text}");
        }
    }
}
