//! The names of the files that PostgreSQL archives, and their order of need.
//!
//! | name | file |
//! |---|---|
//! | 24 hex | a segment |
//! | 24 hex `.partial` | the tail of the parent timeline, cut off by a promotion |
//! | 8 hex `.history` | the ancestry of a timeline |
//! | 24 hex `.` 8 hex `.backup` | a note about a base backup: where it began |
//!
//! Everything else in `pg_wal` (`RECOVERYXLOG`, `xlogtemp.*`, `*.deleted`, …) is never archived and is refused here. Digits are upper case
//! (`IsXLogFileName` and its siblings in `xlog_internal.h`).

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::hex;
use crate::segment::SegmentName;
use crate::timeline::Timeline;

/// The name of a file that PostgreSQL's archiver hands over. The text in serde formats.
///
/// Orders as the archiver needs them (`ready_file_comparator` in `pgarch.c`): history files first, then by the text of the name, so the
/// older timeline first, and a segment before the `.backup` and `.partial` files of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum WalFileName {
    /// A whole segment.
    Segment(SegmentName),
    /// The last segment of a timeline that another one was promoted from, valid up to the fork.
    Partial(SegmentName),
    /// The history file of a timeline.
    History(Timeline),
    /// The backup history file of a base backup that began in `segment`, `offset` bytes into it.
    BackupHistory {
        /// The segment of the backup's start; its timeline is that of the backup's end.
        segment: SegmentName,
        /// The start within the segment, in bytes.
        offset: u32,
    },
}

/// A text that is no name of an archived file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not the name of an archived WAL file, expected a segment, .partial, .history or .backup name in upper-case hexadecimal"
)]
pub struct WalFileNameError;

impl WalFileName {
    /// The timeline in the name.
    pub const fn timeline(self) -> Timeline {
        match self {
            Self::Segment(name) | Self::Partial(name) | Self::BackupHistory { segment: name, .. } => name.timeline(),
            Self::History(timeline) => timeline,
        }
    }

    /// The segment in the name; a history file has none.
    pub const fn segment(self) -> Option<SegmentName> {
        match self {
            Self::Segment(name) | Self::Partial(name) | Self::BackupHistory { segment: name, .. } => Some(name),
            Self::History(_) => None,
        }
    }

    /// True for the two kinds that hold WAL, `Segment` and `Partial`.
    pub const fn holds_wal(self) -> bool {
        matches!(self, Self::Segment(_) | Self::Partial(_))
    }

    /// Fields in comparison order. In ASCII `.backup` names (a digit after the dot) sort before `.partial`.
    fn need(self) -> (bool, Timeline, Option<SegmentName>, u8, u32) {
        let (rank, offset) = match self {
            Self::History(_) => (0, 0),
            Self::Segment(_) => (1, 0),
            Self::BackupHistory { offset, .. } => (2, offset),
            Self::Partial(_) => (3, 0),
        };
        (!matches!(self, Self::History(_)), self.timeline(), self.segment(), rank, offset)
    }
}

impl Ord for WalFileName {
    fn cmp(&self, other: &Self) -> Ordering {
        self.need().cmp(&other.need())
    }
}

impl PartialOrd for WalFileName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for WalFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(name) => name.fmt(f),
            Self::Partial(name) => write!(f, "{name}.partial"),
            Self::History(timeline) => write!(f, "{:08X}.history", timeline.get()),
            Self::BackupHistory { segment, offset } => write!(f, "{segment}.{offset:08X}.backup"),
        }
    }
}

impl FromStr for WalFileName {
    type Err = WalFileNameError;

    fn from_str(text: &str) -> Result<Self, WalFileNameError> {
        parse(text.as_bytes()).ok_or(WalFileNameError)
    }
}

fn parse(text: &[u8]) -> Option<WalFileName> {
    if let Some(digits) = text.strip_suffix(b".history") {
        return Some(WalFileName::History(Timeline::new(hex::upper8(digits)?)?));
    }
    let (digits, rest) = text.split_at_checked(24)?;
    let segment = SegmentName::from_digits(digits)?;
    match rest {
        b"" => Some(WalFileName::Segment(segment)),
        b".partial" => Some(WalFileName::Partial(segment)),
        _ => {
            let offset = rest.strip_prefix(b".")?.strip_suffix(b".backup")?;
            Some(WalFileName::BackupHistory { segment, offset: hex::upper8(offset)? })
        }
    }
}

impl TryFrom<String> for WalFileName {
    type Error = WalFileNameError;

    fn try_from(text: String) -> Result<Self, WalFileNameError> {
        text.parse()
    }
}

impl From<WalFileName> for String {
    fn from(name: WalFileName) -> Self {
        name.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_read_and_written() {
        let segment: SegmentName = "0000000A00000016000000B3".parse().unwrap();
        let cases = [
            ("0000000A00000016000000B3", WalFileName::Segment(segment)),
            ("0000000A00000016000000B3.partial", WalFileName::Partial(segment)),
            ("0000000A00000016000000B3.00000028.backup", WalFileName::BackupHistory { segment, offset: 0x28 }),
            ("0000000A.history", WalFileName::History(Timeline::new(10).unwrap())),
        ];
        for (text, name) in cases {
            assert_eq!(text.parse(), Ok(name));
            assert_eq!(name.to_string(), text);
        }
    }

    #[test]
    fn names_refused() {
        for text in [
            "",
            ".history",
            "0000000A.History",
            "00000000.history",
            "0000000a.history",
            "A.history",
            "0000000A00000016000000B3.history",
            "0000000A00000016000000B3.",
            "0000000A00000016000000B3.Partial",
            "0000000A00000016000000B3.partial.partial",
            "0000000A00000016000000B3.28.backup",
            "0000000A00000016000000B3.0000002g.backup",
            "0000000A00000016000000B3..backup",
            "0000000A00000016000000B3.ready",
            "RECOVERYXLOG",
            "RECOVERYHISTORY",
            "../000000010000000000000001",
            "000000010000000000000001\n",
            "000000010000000000000001.deleted",
        ] {
            assert_eq!(text.parse::<WalFileName>(), Err(WalFileNameError), "{text}");
        }
    }

    fn any_name() -> impl Strategy<Value = WalFileName> {
        // A small space, so that pairs often share a segment.
        let segment = (1u32..4, 0u32..3, 0u32..3).prop_map(|(timeline, log, segment)| {
            format!("{timeline:08X}{log:08X}{segment:08X}").parse::<SegmentName>().unwrap()
        });
        (segment, 0u32..4, 0u32..300).prop_map(|(segment, kind, offset)| match kind {
            0 => WalFileName::Segment(segment),
            1 => WalFileName::Partial(segment),
            2 => WalFileName::History(segment.timeline()),
            _ => WalFileName::BackupHistory { segment, offset },
        })
    }

    proptest! {
        #[test]
        fn names_round_trip(name in any_name()) {
            prop_assert_eq!(name.to_string().parse(), Ok(name));
        }

        #[test]
        fn order_is_the_archivers(a in any_name(), b in any_name()) {
            let history = |name: &str| name.ends_with(".history");
            let (x, y) = (a.to_string(), b.to_string());
            let archiver = history(&y).cmp(&history(&x)).then_with(|| x.as_bytes().cmp(y.as_bytes()));
            prop_assert_eq!(a.cmp(&b), archiver);
        }

        #[test]
        fn any_text_is_answered(text in "[0-9A-F.]{0,30}(history|backup|partial)?") {
            let _ = text.parse::<WalFileName>();
        }
    }
}
