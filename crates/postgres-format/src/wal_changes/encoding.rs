//! The changes as bytes. What is said here is normative: code that differs is a bug.
//!
//! All numbers are unsigned. `u8`, `u32`, `u64` are little-endian. `n` is a number in groups of seven bits, least first, each in a byte whose
//! top bit says that another follows; the last byte is not zero unless it is the only one; at most ten bytes.
//!
//! ```text
//! segment = "PGCVSEG1"
//!           u64 start        LSN, a multiple of the size
//!           u8  size         the segment size is 2^size bytes, 20 to 30
//!           u8  end          0 full   1 ended by a switch   2 incomplete
//!           n   length       records end at start + length; the size if full
//!           n   version      PostgreSQL's major version, 0 if newer than the writer knew
//!           lead             u8 0 fresh   u8 1 in place of a record given up   u8 2, n remaining, n bytes (<= 1024, <= remaining), bytes
//!           tail             u8 0 closed  u8 2 through
//!                            u8 1, n start of the record - start, n total, n seen (< total), n bytes (<= 8192, <= seen), bytes
//!           doubt            n bytes (<= 256), UTF-8; 0 bytes: no doubt; else the map is empty
//!           map
//!           u32 CRC-32C of all before
//! map     = n resets         each: n tablespace, n database
//!           n directories    each: n tablespace, n database, n forks (> 0), fork*
//! fork    = n relation       the first as it is, then each less the one before (0: another fork of the same relation)
//!           u8 fork          number of the fork (0 main, 3 init) | 4 if a limit follows
//!           n limit          if so
//!           n runs           may be 0 if there is a limit
//!           run*             n (gap << 1 | long), n length - 2 if long: `gap` blocks are passed over, then `length` (2 or more, or 1) are listed
//! union   = "PGCVMAP1", map, u32 CRC-32C of all before
//! ```
//!
//! There is one encoding of each value, and readers refuse any other: resets and directories ascend by tablespace and database, forks by
//! relation and fork; no directory is also reset; runs are maximal, so between two of them at least one block is passed over, and that one is
//! not counted in `gap`; all blocks are below the limit and below 2^32 - 1. A segment lists no more blocks, and no more forks together with
//! the 65,536-block stretches of them that have a block, than an eighth of its size in bytes: a reference takes eight bytes of WAL. Readers refuse more than
//! 64 MiB, and more than a million forks and stretches. Nothing may follow the checksum.

use roaring::RoaringBitmap;

use super::map::{ChangeMap, ForkChanges, is_mapped};
use super::{DOUBT_BYTES_MAX, LEAD_BYTES, Lead, SPECIAL_HEAD_BYTES, SegmentChanges, Tail};
use crate::bytes::{u32_at, u64_at};
use crate::lsn::Lsn;
use crate::relation::{DatabaseDirectory, Fork, RelationFork};
use crate::segment::SegmentSize;
use crate::wal_segment::SegmentEnd;

/// Longest encoding that is read.
pub const ENCODED_BYTES_MAX: usize = 64 << 20;

const SEGMENT_MAGIC: &[u8; 8] = b"PGCVSEG1";
const MAP_MAGIC: &[u8; 8] = b"PGCVMAP1";
const CHECKSUM_BYTES: usize = 4;
/// A limit follows.
const HAS_LIMIT: u8 = 4;
/// Bytes of WAL that tell of one block at least.
const WAL_BYTES_OF_BLOCK: u64 = 8;
/// Bounds of a map on its own: 8 TiB of pages; and forks with stretches of 65,536 blocks, each of which takes memory.
const BLOCKS_MAX: u64 = 1 << 30;
const STRETCHES_MAX: u64 = 1 << 20;

/// Why bytes are no changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Longer than any that is written.
    #[error("the change map has {bytes} bytes, more than {ENCODED_BYTES_MAX}")]
    TooLong { bytes: usize },
    /// Something else, or of a later version of the format.
    #[error("the bytes are not a change map of a known version")]
    NotChanges,
    /// Bytes were changed or cut off.
    #[error("the change map's checksum is wrong")]
    Checksum,
    /// The checksum is right, but no writer writes this.
    #[error("the change map is invalid at byte {at}: {reason}")]
    Invalid { at: usize, reason: &'static str },
}

impl SegmentChanges {
    /// The changes as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(SEGMENT_MAGIC.to_vec());
        out.0.extend(self.start.as_u64().to_le_bytes());
        out.0.push(self.size.bytes().trailing_zeros() as u8);
        out.0.push(match self.end {
            SegmentEnd::Full => 0,
            SegmentEnd::Switch => 1,
            SegmentEnd::Incomplete => 2,
        });
        out.number(self.logical_end.as_u64().saturating_sub(self.start.as_u64()));
        out.number(self.postgres_major.into());
        match &self.lead {
            Lead::Fresh => out.0.push(0),
            Lead::GivenUp => out.0.push(1),
            Lead::Rest { remaining_bytes, bytes } => {
                out.0.push(2);
                out.number((*remaining_bytes).into());
                out.bytes(bytes);
            }
        }
        match &self.tail {
            Tail::Closed => out.0.push(0),
            Tail::Open { start, total_bytes, seen_bytes, head } => {
                out.0.push(1);
                out.number(start.as_u64().saturating_sub(self.start.as_u64()));
                out.number((*total_bytes).into());
                out.number((*seen_bytes).into());
                out.bytes(head);
            }
            Tail::Through => out.0.push(2),
        }
        out.bytes(self.doubt.as_deref().unwrap_or_default().as_bytes());
        out.map(&self.map);
        out.sealed()
    }

    /// Reads the changes of a segment.
    ///
    /// # Errors
    /// [`DecodeError`]; never panics, and takes memory in proportion to the segment's size at most.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::open(bytes, SEGMENT_MAGIC)?;
        let start = u64_at(reader.take(8)?, 0);
        let size = match reader.byte()? {
            bits @ 20..=30 => SegmentSize::from_bytes(1 << bits).map_err(|_| reader.invalid("the segment size"))?,
            _ => return Err(reader.invalid("the segment size")),
        };
        let end = match reader.byte()? {
            0 => SegmentEnd::Full,
            1 => SegmentEnd::Switch,
            2 => SegmentEnd::Incomplete,
            _ => return Err(reader.invalid("how the segment ends")),
        };
        let length = reader.number()?;
        let fits = length <= size.bytes() && (end != SegmentEnd::Full || length == size.bytes());
        if !fits || !start.is_multiple_of(size.bytes()) || start.checked_add(size.bytes()).is_none() {
            return Err(reader.invalid("where the segment lies"));
        }
        let postgres_major = reader.number32()?;
        let lead = reader.lead()?;
        let tail = reader.tail(start, length, end)?;
        let doubt = match reader.counted(DOUBT_BYTES_MAX)? {
            [] => None,
            text => Some(str::from_utf8(text).map_err(|_| reader.invalid("a doubt"))?.to_owned()),
        };
        let limits = size.bytes() / WAL_BYTES_OF_BLOCK;
        let map = reader.map(limits, limits.min(STRETCHES_MAX))?;
        if doubt.is_some() && !map.is_empty() {
            return Err(reader.invalid("a doubtful map that says something"));
        }
        reader.close()?;
        let (start, logical_end) = (Lsn::new(start), Lsn::new(start + length));
        Ok(Self { start, size, end, logical_end, postgres_major, map, lead, tail, doubt })
    }
}

impl ChangeMap {
    /// The map as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(MAP_MAGIC.to_vec());
        out.map(self);
        out.sealed()
    }

    /// Reads a map.
    ///
    /// # Errors
    /// [`DecodeError`]; never panics, and takes bounded memory.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::open(bytes, MAP_MAGIC)?;
        let map = reader.map(BLOCKS_MAX, STRETCHES_MAX)?;
        reader.close()?;
        Ok(map)
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn map(&mut self, map: &ChangeMap) {
        self.number(map.resets().len() as u64);
        for directory in map.resets() {
            self.directory(*directory);
        }
        let forks: Vec<(&RelationFork, &ForkChanges)> = map.forks().collect();
        let directories: Vec<_> = forks.chunk_by(|(one, _), (next, _)| one.directory() == next.directory()).collect();
        self.number(directories.len() as u64);
        for forks in directories {
            self.directory(forks[0].0.directory());
            self.number(forks.len() as u64);
            let mut relation = 0;
            for (fork, changes) in forks {
                self.number((fork.relation - relation).into());
                relation = fork.relation;
                self.fork(fork.fork, changes);
            }
        }
    }

    fn directory(&mut self, directory: DatabaseDirectory) {
        self.number(directory.tablespace.into());
        self.number(directory.database.into());
    }

    fn fork(&mut self, fork: Fork, changes: &ForkChanges) {
        let limit = changes.limit_block();
        self.0.push(fork.number() | if limit.is_some() { HAS_LIMIT } else { 0 });
        if let Some(limit) = limit {
            self.number(limit.into());
        }
        let runs: Vec<(u64, u64)> = runs(changes.blocks()).collect();
        self.number(runs.len() as u64);
        let mut next = 0;
        for (first, length) in runs {
            let gap = first - next;
            self.number(gap << 1 | u64::from(length > 1));
            if length > 1 {
                self.number(length - 2);
            }
            // The block behind a run is not listed, so it need not be counted.
            next = first + length + 1;
        }
    }

    fn sealed(mut self) -> Vec<u8> {
        let checksum = crc32c::crc32c(&self.0);
        self.0.extend(checksum.to_le_bytes());
        self.0
    }
}

/// The maximal runs of a set, as first block and length.
fn runs(blocks: &RoaringBitmap) -> impl Iterator<Item = (u64, u64)> + '_ {
    let mut blocks = blocks.iter();
    let mut ahead = None;
    std::iter::from_fn(move || {
        let mut run = ahead.take().or_else(|| blocks.next_range())?;
        // The set is kept in stretches; a run may go on in the next.
        while let Some(next) = blocks.next_range() {
            if u64::from(*next.start()) != u64::from(*run.end()) + 1 {
                ahead = Some(next);
                break;
            }
            run = *run.start()..=*next.end();
        }
        Some((u64::from(*run.start()), u64::from(run.end() - run.start()) + 1))
    })
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn open(bytes: &'a [u8], magic: &[u8; 8]) -> Result<Self, DecodeError> {
        if bytes.len() > ENCODED_BYTES_MAX {
            return Err(DecodeError::TooLong { bytes: bytes.len() });
        }
        if !bytes.starts_with(magic) {
            return Err(DecodeError::NotChanges);
        }
        match bytes.split_at_checked(bytes.len() - CHECKSUM_BYTES) {
            Some((content, checksum)) if crc32c::crc32c(content) == u32_at(checksum, 0) => {
                Ok(Self { bytes: content, at: magic.len() })
            }
            _ => Err(DecodeError::Checksum),
        }
    }

    fn invalid(&self, reason: &'static str) -> DecodeError {
        DecodeError::Invalid { at: self.at, reason }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.get(..length));
        let taken = taken.ok_or(self.invalid("it ends too early"))?;
        self.at += length;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> Result<u64, DecodeError> {
        let mut number = 0u64;
        for place in 0..10 {
            let byte = self.byte()?;
            let group = u64::from(byte & 0x7F);
            if place == 9 && group > 1 {
                break;
            }
            number |= group << (7 * place);
            if byte & 0x80 == 0 {
                return if byte == 0 && place > 0 {
                    Err(self.invalid("a number with a leading zero"))
                } else {
                    Ok(number)
                };
            }
        }
        Err(self.invalid("a number of more than 64 bits"))
    }

    fn number32(&mut self) -> Result<u32, DecodeError> {
        u32::try_from(self.number()?).map_err(|_| self.invalid("a number of more than 32 bits"))
    }

    fn counted(&mut self, most: usize) -> Result<&'a [u8], DecodeError> {
        match usize::try_from(self.number()?) {
            Ok(length) if length <= most => self.take(length),
            _ => Err(self.invalid("too many bytes")),
        }
    }

    fn lead(&mut self) -> Result<Lead, DecodeError> {
        match self.byte()? {
            0 => Ok(Lead::Fresh),
            1 => Ok(Lead::GivenUp),
            2 => {
                let remaining_bytes = self.number32()?;
                let bytes = self.counted(LEAD_BYTES.min(remaining_bytes as usize))?.to_vec();
                Ok(Lead::Rest { remaining_bytes, bytes })
            }
            _ => Err(self.invalid("how the segment begins")),
        }
    }

    fn tail(&mut self, segment_start: u64, length: u64, end: SegmentEnd) -> Result<Tail, DecodeError> {
        match self.byte()? {
            0 => Ok(Tail::Closed),
            2 if end == SegmentEnd::Full => Ok(Tail::Through),
            1 if end == SegmentEnd::Full => {
                let (start, total_bytes, seen_bytes) = (self.number()?, self.number32()?, self.number32()?);
                if start >= length || seen_bytes >= total_bytes {
                    return Err(self.invalid("the record at the end"));
                }
                let head = self.counted(SPECIAL_HEAD_BYTES.min(seen_bytes as usize))?.to_vec();
                Ok(Tail::Open { start: Lsn::new(segment_start + start), total_bytes, seen_bytes, head })
            }
            _ => Err(self.invalid("how the segment goes on")),
        }
    }

    fn map(&mut self, blocks_max: u64, stretches_max: u64) -> Result<ChangeMap, DecodeError> {
        let mut room = Room { blocks: blocks_max, stretches: stretches_max };
        let mut map = ChangeMap::empty();
        let mut previous = None;
        for _ in 0..self.number()? {
            room.stretch(self)?;
            map.reset(self.directory(&mut previous)?);
        }
        previous = None;
        for _ in 0..self.number()? {
            let directory = self.directory(&mut previous)?;
            let forks = self.number()?;
            if forks == 0 || map.is_reset(directory) {
                return Err(self.invalid("a directory that says nothing or is reset"));
            }
            self.forks(directory, forks, &mut map, &mut room)?;
        }
        Ok(map)
    }

    fn directory(&mut self, previous: &mut Option<DatabaseDirectory>) -> Result<DatabaseDirectory, DecodeError> {
        let directory = DatabaseDirectory { tablespace: self.number32()?, database: self.number32()? };
        match previous.replace(directory) {
            Some(previous) if previous >= directory => Err(self.invalid("a directory out of order")),
            _ => Ok(directory),
        }
    }

    fn forks(
        &mut self,
        directory: DatabaseDirectory,
        forks: u64,
        map: &mut ChangeMap,
        room: &mut Room,
    ) -> Result<(), DecodeError> {
        let mut previous: Option<RelationFork> = None;
        for _ in 0..forks {
            room.stretch(self)?;
            let step = self.number32()?;
            let relation = previous.map_or(0, |previous| previous.relation).checked_add(step);
            let relation = relation.ok_or(self.invalid("a relation of more than 32 bits"))?;
            let kind = self.byte()?;
            let fork = Fork::from_number(kind & !HAS_LIMIT).filter(|fork| is_mapped(*fork));
            let fork = fork.ok_or(self.invalid("an unknown fork"))?;
            let DatabaseDirectory { tablespace, database } = directory;
            let fork = RelationFork { tablespace, database, relation, fork };
            if previous.replace(fork).is_some_and(|previous| previous >= fork) {
                return Err(self.invalid("a fork out of order"));
            }
            let limit = if kind & HAS_LIMIT != 0 { Some(self.number32()?) } else { None };
            let blocks = self.blocks(limit.unwrap_or(u32::MAX), room)?;
            if limit == Some(u32::MAX) || limit.is_none() && blocks.is_empty() {
                return Err(self.invalid("a fork that says nothing"));
            }
            map.put(fork, ForkChanges::new(limit, blocks));
        }
        Ok(())
    }

    fn blocks(&mut self, limit: u32, room: &mut Room) -> Result<RoaringBitmap, DecodeError> {
        let mut blocks = RoaringBitmap::new();
        let mut next = 0u64;
        let mut stretch = None;
        for _ in 0..self.number()? {
            let gap = self.number()?;
            let first = next.checked_add(gap >> 1).ok_or(self.invalid("a block of more than 32 bits"))?;
            let length = if gap & 1 == 0 { 1 } else { self.number()?.saturating_add(2) };
            let last = first.saturating_add(length - 1);
            let (Ok(from), Ok(to)) = (u32::try_from(first), u32::try_from(last)) else {
                return Err(self.invalid("a block of more than 32 bits"));
            };
            if to >= limit {
                return Err(self.invalid("a block behind the limit"));
            }
            room.run(self, from, to, &mut stretch)?;
            blocks.insert_range(from..=to);
            next = last + 2;
        }
        Ok(blocks)
    }

    fn close(&self) -> Result<(), DecodeError> {
        if self.at == self.bytes.len() { Ok(()) } else { Err(self.invalid("something follows the map")) }
    }
}

/// What may still come.
struct Room {
    blocks: u64,
    stretches: u64,
}

impl Room {
    fn stretch(&mut self, reader: &Reader<'_>) -> Result<(), DecodeError> {
        self.stretches = self.stretches.checked_sub(1).ok_or(reader.invalid("too many forks"))?;
        Ok(())
    }

    /// Takes room for a run and for the stretches that it is the first to be in.
    fn run(&mut self, reader: &Reader<'_>, from: u32, to: u32, last: &mut Option<u32>) -> Result<(), DecodeError> {
        let (first_stretch, last_stretch) = (from >> 16, to >> 16);
        let known = u64::from(*last == Some(first_stretch));
        *last = Some(last_stretch);
        let stretches = u64::from(last_stretch - first_stretch) + 1 - known;
        let blocks = u64::from(to - from) + 1;
        match (self.blocks.checked_sub(blocks), self.stretches.checked_sub(stretches)) {
            (Some(blocks), Some(stretches)) => {
                (self.blocks, self.stretches) = (blocks, stretches);
                Ok(())
            }
            _ => Err(reader.invalid("too many blocks")),
        }
    }
}
