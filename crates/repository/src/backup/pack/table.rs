//! The table at the end of a pack, alone and against the frames.

use sha2::{Digest, Sha256};

use super::frame::{BLOCK_BYTES, FrameHeader};
use super::{
    END_MAGIC, ENTRY_BYTES, FRAME_HEADER_BYTES, FileNumber, Frame, FrameReader, MAGIC, PackDamage, TRAILER_BYTES,
    u32_at, u64_at, unit_sum,
};

/// Longest table that is read, trailer included, in bytes. That of a pack of 16 MiB is some tens of KiB.
pub const TABLE_LIMIT_BYTES: u64 = 64 * 1024 * 1024;

/// What the table says about one frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFrame {
    /// Which file it belongs to.
    pub file: FileNumber,
    /// Where it lies in the pack, in bytes.
    pub position: u64,
    /// Its length in the pack, in bytes.
    pub length: u64,
    /// Its units, in order of the file.
    pub units: Vec<Unit>,
}

/// A part of a file whose checksum is known: a page of a sparse frame, or each [`super::SUM_UNIT_BYTES`] of a
/// contiguous one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    /// Its first byte in the file.
    pub from: u64,
    /// The byte after its last one.
    pub to: u64,
    /// Its checksum, see [`super::unit_sum`].
    pub sum: u64,
}

pub(super) fn table_digest(table: &[u8], trailer: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(table);
    hash.update(trailer);
    hash.finalize().into()
}

/// How many bytes at the end of a pack its table and trailer take. `tail` are its last bytes, at least the trailer.
pub fn table_length(tail: &[u8], pack_bytes: u64) -> Result<u64, PackDamage> {
    let trailer_start = tail.len().checked_sub(TRAILER_BYTES).ok_or(PackDamage::Trailer)?;
    let trailer = &tail[trailer_start..];
    if trailer[48..] != *END_MAGIC {
        return Err(PackDamage::Trailer);
    }
    let length = pack_bytes.checked_sub(u64_at(trailer, 0)).ok_or(PackDamage::Trailer)?;
    let least = TRAILER_BYTES as u64 + u64::from(u32_at(trailer, 8)) * ENTRY_BYTES as u64;
    match (least..=TABLE_LIMIT_BYTES).contains(&length) {
        true => Ok(length),
        false => Err(PackDamage::Trailer),
    }
}

/// Reads the table. `tail` are the last bytes of a pack, at least [`table_length`] of them.
pub fn read_table(tail: &[u8], pack_bytes: u64) -> Result<Vec<TableFrame>, PackDamage> {
    let length = usize::try_from(table_length(tail, pack_bytes)?).map_err(|_| PackDamage::Trailer)?;
    let start = tail.len().checked_sub(length).ok_or(PackDamage::Trailer)?;
    let (table, trailer) = tail[start..].split_at(length - TRAILER_BYTES);
    if table_digest(table, &trailer[..16]) != trailer[16..48] {
        return Err(PackDamage::TableDigest);
    }
    let (entries, mut sums) =
        table.split_at_checked(u32_at(trailer, 8) as usize * ENTRY_BYTES).ok_or(PackDamage::Trailer)?;
    let mut frames = Vec::with_capacity(entries.len() / ENTRY_BYTES);
    for entry in entries.chunks_exact(ENTRY_BYTES) {
        let (header, position) = FrameHeader::from_entry(entry)?;
        let (own, rest) = split_sums(&header, sums).ok_or(PackDamage::Trailer)?;
        sums = rest;
        frames.push(table_frame(&header, position, own)?);
    }
    if sums.is_empty() { Ok(frames) } else { Err(PackDamage::Trailer) }
}

/// The blocks and sums of one frame, and those of the frames behind it.
fn split_sums<'a>(header: &FrameHeader, sums: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    sums.split_at_checked(header.blocks_bytes() + header.units() * size_of::<u64>())
}

fn table_frame(header: &FrameHeader, position: u64, own: &[u8]) -> Result<TableFrame, PackDamage> {
    let (list, sums) = own.split_at(header.blocks_bytes());
    let blocks = header.blocks(list, position)?;
    let (unit_bytes, end) = (header.unit_bytes() as u64, header.offset + u64::from(header.raw));
    let unit = |(number, sum): (usize, &[u8])| {
        let (from, limit) = match blocks.get(number) {
            Some(block) => (u64::from(*block) * unit_bytes, u64::MAX),
            None => (header.offset + number as u64 * unit_bytes, end),
        };
        Unit { from, to: (from + unit_bytes).min(limit), sum: u64_at(sum, 0) }
    };
    let units = sums.chunks_exact(size_of::<u64>()).enumerate().map(unit).collect();
    Ok(TableFrame { file: header.file, position, length: header.frame_bytes() as u64, units })
}

/// Checks a whole pack: every frame, the frame table, and that they agree.
pub fn verify_pack(pack: &[u8], sink: &mut impl FnMut(Frame<'_>) -> Result<(), PackDamage>) -> Result<(), PackDamage> {
    if !pack.starts_with(MAGIC) {
        return Err(PackDamage::Magic);
    }
    let length = usize::try_from(table_length(pack, pack.len() as u64)?).map_err(|_| PackDamage::Trailer)?;
    let table_start = pack.len() - length;
    if table_start < MAGIC.len() {
        return Err(PackDamage::Trailer);
    }
    read_table(pack, pack.len() as u64)?;
    let (table, trailer) = pack[table_start..].split_at(length - TRAILER_BYTES);
    let (entries, mut sums) = table.split_at(u32_at(trailer, 8) as usize * ENTRY_BYTES);
    let mut reader = FrameReader::new(MAGIC.len() as u64).map_err(|_| PackDamage::Frame { position: 0 })?;
    let mut position = MAGIC.len();
    for entry in entries.chunks_exact(ENTRY_BYTES) {
        let damaged = PackDamage::TableEntry { position: position as u64 };
        let bytes = &pack[position..table_start];
        let length = reader.frame_length(bytes)?.filter(|length| *length <= bytes.len()).ok_or(damaged.clone())?;
        let frame = &bytes[..length];
        let header = FrameHeader::read(frame, position as u64)?;
        let mut found = frame[FRAME_HEADER_BYTES..][..usize::from(header.pages) * BLOCK_BYTES].to_vec();
        reader.push(frame, &mut |piece| {
            found.extend(piece.bytes.chunks(piece.unit_bytes).flat_map(|unit| unit_sum(unit).to_le_bytes()));
            sink(piece)
        })?;
        let (own, rest) = split_sums(&header, sums).ok_or(damaged.clone())?;
        if header.entry(position as u64) != *entry || own != found {
            return Err(damaged);
        }
        sums = rest;
        position += length;
    }
    match position == table_start {
        true => reader.finish(),
        false => Err(PackDamage::TableEntry { position: position as u64 }),
    }
}
