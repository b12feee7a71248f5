//! WAL segments: their size, their number and their name.
//!
//! PostgreSQL cuts the WAL stream into segments of one size per cluster (`initdb --wal-segsize`, 1 MiB to 1 GiB), so the size is a value
//! that travels with the cluster, never a constant. A name is `%08X%08X%08X` of timeline, log and segment within the log, where a log is
//! 4 GiB of WAL (`XLogFileName` in `xlog_internal.h`). `pg_walfile_name()` is not asked: its answer on a boundary changed in 17.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::hex;
use crate::lsn::Lsn;
use crate::timeline::Timeline;

/// The WAL segment size of a cluster: a power of two from 1 MiB to 1 GiB. A number of bytes in serde formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct SegmentSize(u32);

/// The number of a segment in the WAL stream: its start divided by the segment size. The first real segment is number 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SegmentNumber(u64);

/// The name of a segment: 24 upper-case hexadecimal digits. Orders like the text. The text in serde formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SegmentName {
    timeline: Timeline,
    log: u32,
    segment: u32,
}

/// Why a segment size or name is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentNameError {
    /// Not a size that PostgreSQL supports.
    #[error("{bytes} bytes is no WAL segment size, expected a power of two from 1 MiB to 1 GiB")]
    Size { bytes: u64 },
    /// Not the 24 digits of a segment name, or timeline zero.
    #[error("not a WAL segment name, expected 24 upper-case hexadecimal digits that begin with a timeline")]
    Name,
    /// The last eight digits are beyond the segments of a log of this size: the name belongs to a cluster of another segment size.
    #[error("no WAL segment {name} in a cluster with segments of {size_bytes} bytes, check the segment size")]
    BeyondLog { name: SegmentName, size_bytes: u64 },
}

impl SegmentSize {
    /// 16 MiB, what `initdb` chooses unless told otherwise.
    pub const DEFAULT: Self = Self(16 << 20);
    /// The smallest size, 1 MiB.
    pub const MIN: Self = Self(1 << 20);
    /// The largest size, 1 GiB.
    pub const MAX: Self = Self(1 << 30);

    /// The size of `bytes` bytes, if PostgreSQL supports it (`IsValidWalSegSize`).
    pub fn from_bytes(bytes: u64) -> Result<Self, SegmentNameError> {
        let supported = bytes.is_power_of_two() && (Self::MIN.bytes()..=Self::MAX.bytes()).contains(&bytes);
        match u32::try_from(bytes) {
            Ok(size) if supported => Ok(Self(size)),
            _ => Err(SegmentNameError::Size { bytes }),
        }
    }

    /// Bytes in a segment.
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }

    /// Segments in one log, that is in 4 GiB of WAL.
    pub const fn segments_per_log(self) -> u64 {
        (1 << 32) / self.bytes()
    }

    /// The offset of a position within its segment, in bytes.
    pub const fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.as_u64() % self.bytes()
    }
}

impl SegmentNumber {
    /// The segment of this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The segment that holds the byte at `lsn`.
    pub const fn containing(lsn: Lsn, size: SegmentSize) -> Self {
        Self(lsn.as_u64() / size.bytes())
    }

    /// The last segment with a byte before `end`: what a range that ends at `end` needs at most. Zero for `Lsn::ZERO`.
    pub const fn last_before(end: Lsn, size: SegmentSize) -> Self {
        Self(end.as_u64().saturating_sub(1) / size.bytes())
    }

    /// The following segment.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The preceding segment, or `None` for number zero.
    pub const fn previous(self) -> Option<Self> {
        match self.0.checked_sub(1) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The position of its first byte, clamped to the LSN space (no number taken from an LSN or a name is beyond it).
    pub const fn start(self, size: SegmentSize) -> Lsn {
        Lsn::new(self.0.saturating_mul(size.bytes()))
    }

    /// The position after its last byte, clamped to the LSN space.
    pub const fn end(self, size: SegmentSize) -> Lsn {
        self.next().start(size)
    }
}

impl fmt::Display for SegmentNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl SegmentName {
    /// The name of a segment on a timeline. A number beyond the LSN space (none taken from an LSN is) gives the last possible name.
    pub fn new(timeline: Timeline, number: SegmentNumber, size: SegmentSize) -> Self {
        let per_log = size.segments_per_log();
        let last = (1 << 32) * per_log - 1;
        let number = number.as_u64().min(last);
        let fits = "a number within the LSN space has 32 bits of log and at most 4096 segments per log";
        Self {
            timeline,
            log: u32::try_from(number / per_log).expect(fits),
            segment: u32::try_from(number % per_log).expect(fits),
        }
    }

    /// The timeline in the name. The pages within may still be of an ancestor.
    pub const fn timeline(self) -> Timeline {
        self.timeline
    }

    /// The middle eight digits: which 4 GiB of WAL.
    pub const fn log(self) -> u32 {
        self.log
    }

    /// The last eight digits: which segment within the log.
    pub const fn segment(self) -> u32 {
        self.segment
    }

    /// The number of the segment in a cluster of this segment size; refuses a name that such a cluster cannot have.
    pub fn number(self, size: SegmentSize) -> Result<SegmentNumber, SegmentNameError> {
        let per_log = size.segments_per_log();
        if u64::from(self.segment) >= per_log {
            return Err(SegmentNameError::BeyondLog { name: self, size_bytes: size.bytes() });
        }
        Ok(SegmentNumber(u64::from(self.log) * per_log + u64::from(self.segment)))
    }

    /// Reads 24 upper-case hexadecimal digits.
    pub(crate) fn from_digits(digits: &[u8]) -> Option<Self> {
        if digits.len() != 24 {
            return None;
        }
        Some(Self {
            timeline: Timeline::new(hex::upper8(&digits[..8])?)?,
            log: hex::upper8(&digits[8..16])?,
            segment: hex::upper8(&digits[16..])?,
        })
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.get(), self.log, self.segment)
    }
}

impl FromStr for SegmentName {
    type Err = SegmentNameError;

    fn from_str(text: &str) -> Result<Self, SegmentNameError> {
        Self::from_digits(text.as_bytes()).ok_or(SegmentNameError::Name)
    }
}

impl TryFrom<String> for SegmentName {
    type Error = SegmentNameError;

    fn try_from(text: String) -> Result<Self, SegmentNameError> {
        text.parse()
    }
}

impl From<SegmentName> for String {
    fn from(name: SegmentName) -> Self {
        name.to_string()
    }
}

impl TryFrom<u64> for SegmentSize {
    type Error = SegmentNameError;

    fn try_from(bytes: u64) -> Result<Self, SegmentNameError> {
        Self::from_bytes(bytes)
    }
}

impl From<SegmentSize> for u64 {
    fn from(size: SegmentSize) -> Self {
        size.bytes()
    }
}

#[cfg(test)]
mod tests;
