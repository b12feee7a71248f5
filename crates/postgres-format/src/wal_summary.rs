//! WAL summaries, which PostgreSQL 17 and later write with `summarize_wal`: what a stretch of WAL changed, found by the server itself.
//!
//! ```text
//! pg_wal/summaries/TTTTTTTTSSSSSSSSSSSSSSSSEEEEEEEEEEEEEEEE.summary     timeline, start and end in hexadecimal
//!
//! u32 magic 0x652B137B
//! per fork, ascending   u32 tablespace   u32 database   u32 relation   i32 fork   u32 limit (2^32 - 1: none)   u32 chunks
//!                       u16 usage per chunk of 65,536 blocks, then per chunk its content:
//!                         usage < 4096: as many u16 offsets within the chunk, in any order     usage 4096: a bitmap of 8192 bytes
//! end                   24 bytes of zeros, u32 CRC-32C of all before
//! ```
//!
//! A relation numbered 0 stands for its whole directory, which was made or dropped. The server maps visibility maps too; they are left out
//! here as in every [`ChangeMap`]. Summaries start and end at redo points and are not made of WAL written with `wal_level` minimal. Whether
//! they cover a range without a gap is told by their names ([`cover`]), as in `WalSummariesAreComplete`. Sources: `blkreftable.c`,
//! `walsummary.c`, `walsummarizer.c`.

use std::fmt;
use std::str::FromStr;

use roaring::RoaringBitmap;

use crate::bytes::{u16_at, u32_at};
use crate::lsn::Lsn;
use crate::relation::{Fork, RelationFork};
use crate::timeline::Timeline;
use crate::wal_changes::{ChangeMap, is_mapped};

mod cover;

pub use cover::{Outlook, Uncovered, cover};

/// Longest summary that is read: the bitmaps of 4 TiB of pages.
pub const SUMMARY_BYTES_MAX: usize = 64 << 20;

const MAGIC: u32 = 0x652B_137B;
const ENTRY_BYTES: usize = 24;
const CHECKSUM_BYTES: usize = 4;
const CHUNK_BLOCKS: u32 = 1 << 16;
const CHUNKS_MAX: u32 = 1 << 16;
/// A chunk of this usage is a bitmap.
const BITMAP_USAGE: u16 = 4096;
const BITMAP_BYTES: usize = CHUNK_BLOCKS as usize / 8;
const NO_LIMIT: u32 = u32::MAX;

/// The name of a summary: what it covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SummaryName {
    /// The timeline it is of.
    pub timeline: Timeline,
    /// Where it starts, inclusive.
    pub start: Lsn,
    /// Where it ends, exclusive.
    pub end: Lsn,
}

/// Why a file is no summary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SummaryError {
    /// Not forty upper-case hexadecimal digits and `.summary`, or an empty stretch.
    #[error("the file name is not that of a WAL summary")]
    Name,
    /// Longer than is read at once.
    #[error("the WAL summary has {bytes} bytes, more than {SUMMARY_BYTES_MAX}")]
    TooLong { bytes: usize },
    /// Something else, or cut off at once.
    #[error("the file is not a WAL summary")]
    NotSummary,
    /// Bytes were changed or cut off.
    #[error("the WAL summary's checksum is wrong")]
    Checksum,
    /// The checksum is right, but no server writes this.
    #[error("the WAL summary is invalid at byte {at}: {reason}")]
    Invalid { at: usize, reason: &'static str },
}

impl fmt::Display for SummaryName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:08X}{:016X}{:016X}.summary", self.timeline.get(), self.start.as_u64(), self.end.as_u64())
    }
}

impl FromStr for SummaryName {
    type Err = SummaryError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let digits = name.strip_suffix(".summary").filter(|digits| digits.len() == 40).ok_or(SummaryError::Name)?;
        if !digits.bytes().all(|byte| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte)) {
            return Err(SummaryError::Name);
        }
        let field = |from: usize, to: usize| {
            digits.get(from..to).and_then(|field| u64::from_str_radix(field, 16).ok()).ok_or(SummaryError::Name)
        };
        let timeline = Timeline::new(field(0, 8)? as u32).ok_or(SummaryError::Name)?;
        let (start, end) = (Lsn::new(field(8, 24)?), Lsn::new(field(24, 40)?));
        if start < end { Ok(Self { timeline, start, end }) } else { Err(SummaryError::Name) }
    }
}

/// Reads a summary file, all of it.
///
/// # Errors
/// Any [`SummaryError`] but `Name`; never panics.
pub fn parse(bytes: &[u8]) -> Result<ChangeMap, SummaryError> {
    if bytes.len() > SUMMARY_BYTES_MAX {
        return Err(SummaryError::TooLong { bytes: bytes.len() });
    }
    if bytes.len() < 4 + ENTRY_BYTES + CHECKSUM_BYTES || u32_at(bytes, 0) != MAGIC {
        return Err(SummaryError::NotSummary);
    }
    let (content, checksum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    if crc32c::crc32c(content) != u32_at(checksum, 0) {
        return Err(SummaryError::Checksum);
    }
    let mut reader = Reader { bytes: content, at: 4 };
    let mut map = ChangeMap::empty();
    let mut previous = None;
    while let Some(entry) = reader.entry()? {
        if previous.replace(entry.key).is_some_and(|previous| previous >= entry.key) {
            return Err(reader.invalid("an entry is out of order"));
        }
        reader.fork(&entry, &mut map)?;
    }
    if reader.at == content.len() { Ok(map) } else { Err(reader.invalid("something follows the end")) }
}

struct Entry {
    /// Tablespace, database, relation, fork.
    key: [u32; 4],
    fork: RelationFork,
    limit: u32,
    chunks: u32,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn invalid(&self, reason: &'static str) -> SummaryError {
        SummaryError::Invalid { at: self.at, reason }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], SummaryError> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.get(..length));
        let taken = taken.ok_or(self.invalid("it ends too early"))?;
        self.at += length;
        Ok(taken)
    }

    /// The head of the next fork, or `None` at the end.
    fn entry(&mut self) -> Result<Option<Entry>, SummaryError> {
        let bytes = self.take(ENTRY_BYTES)?;
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let key @ [tablespace, database, relation, number] = [0, 4, 8, 12].map(|at| u32_at(bytes, at));
        let fork = u8::try_from(number).ok().and_then(Fork::from_number).ok_or(self.invalid("an unknown fork"))?;
        let (limit, chunks) = (u32_at(bytes, 16), u32_at(bytes, 20));
        if chunks > CHUNKS_MAX {
            return Err(self.invalid("more chunks than a relation can have"));
        }
        Ok(Some(Entry { key, fork: RelationFork { tablespace, database, relation, fork }, limit, chunks }))
    }

    fn fork(&mut self, entry: &Entry, map: &mut ChangeMap) -> Result<(), SummaryError> {
        if entry.fork.relation == 0 {
            map.reset(entry.fork.directory());
        } else if entry.limit != NO_LIMIT {
            map.cut(entry.fork, entry.limit);
        }
        let usages = self.take(entry.chunks as usize * 2)?;
        let mut blocks = RoaringBitmap::new();
        for (chunk, usage) in (0..entry.chunks).zip(usages.chunks_exact(2)) {
            self.chunk(chunk * CHUNK_BLOCKS, u16_at(usage, 0), &mut blocks)?;
        }
        if blocks.contains(NO_LIMIT) {
            return Err(self.invalid("an impossible block"));
        }
        if entry.fork.relation != 0 && is_mapped(entry.fork.fork) {
            map.mark_all(entry.fork, &blocks);
        }
        Ok(())
    }

    fn chunk(&mut self, first: u32, usage: u16, blocks: &mut RoaringBitmap) -> Result<(), SummaryError> {
        match usage {
            0..BITMAP_USAGE => {
                let offsets = self.take(usize::from(usage) * 2)?;
                blocks.extend(offsets.chunks_exact(2).map(|offset| first + u32::from(u16_at(offset, 0))));
            }
            BITMAP_USAGE => *blocks |= RoaringBitmap::from_lsb0_bytes(first, self.take(BITMAP_BYTES)?),
            _ => return Err(self.invalid("a chunk of impossible size")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
