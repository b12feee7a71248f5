//! What the WAL in a segment changed, as it lies behind the frames of the WAL object.
//!
//! ```text
//! u32 LE 0x184D2A5C | u32 LE length of what follows | the encoded changes, as they are or as one Zstandard frame
//! ```
//!
//! To Zstandard programs that is a frame to be skipped, so all that follows an object's header still decompresses to the
//! file. The encoding of the changes is normative in `postgres_format::wal_changes`.
//!
//! Decision: the changes lie in the WAL object. Reason: they are durable, copied, adopted and deleted with it, by the same
//! requests and at the same moment. Rejected: objects of their own, of which each store would have another subset.
//!
//! Invariants: changes are given only if the header's SHA-256 says that they are what the sender wrote, and if they are of this
//! very segment; otherwise there is an error, never less than the truth. Changes of an unknown version, or none, are `None`:
//! whoever needs them reads the WAL. Memory: what is read and what it decompresses to are bounded by the segment's size.

use std::io;

use postgres_format::SegmentNumber;
use postgres_format::wal_changes::{self, ENCODED_BYTES_MAX, SegmentChanges};

use super::WalError;
use super::fetch::read_header;
use super::header::{ChangesPart, Damage, WalHeader};
use crate::key::ObjectKey;
use crate::store::{self, ByteRange, ObjectStore};

/// First four bytes: a frame that Zstandard programs skip.
const SKIPPED_MAGIC: u32 = 0x184D_2A5C;
/// That, and the length, in bytes.
const BEFORE_CHANGES_BYTES: usize = 8;
/// First bytes of a Zstandard frame.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xB5, 0x2F, 0xFD];
/// Longest doubt in a header, in bytes.
pub(super) const DOUBT_TEXT_BYTES_MAX: usize = 96;

/// What an object tells of changes.
pub(super) enum Told {
    /// These bytes.
    Part(Vec<u8>),
    /// Nothing, for this reason.
    Doubt(String),
}

/// What to write about the changes of a segment.
pub(super) fn tell(changes: &SegmentChanges, compressor: &mut zstd::bulk::Compressor<'_>) -> io::Result<Told> {
    if let Some(doubt) = &changes.doubt {
        return Ok(Told::Doubt(header_text(doubt)));
    }
    let plain = changes.encode();
    if plain.len() > encoded_bytes_max(changes.size.bytes()) {
        return Ok(Told::Doubt("its changes take more room than the segment".to_owned()));
    }
    let compressed = compressor.compress(&plain)?;
    let content = if compressed.len() < plain.len() { compressed } else { plain };
    let mut part = Vec::with_capacity(BEFORE_CHANGES_BYTES + content.len());
    part.extend(SKIPPED_MAGIC.to_le_bytes());
    part.extend((content.len() as u32).to_le_bytes());
    part.extend(content);
    Ok(Told::Part(part))
}

/// Bytes of the longest part with changes of a segment of this size.
pub(super) fn longest_part(segment_bytes: u64) -> usize {
    BEFORE_CHANGES_BYTES + encoded_bytes_max(segment_bytes)
}

/// Longest encoding of the changes of a segment of this size, in bytes.
fn encoded_bytes_max(segment_bytes: u64) -> usize {
    usize::try_from(segment_bytes).map_or(ENCODED_BYTES_MAX, |bytes| bytes.min(ENCODED_BYTES_MAX))
}

/// A doubt as a header has room for it: short, and with nothing in it that JSON writes as more than one byte.
fn header_text(doubt: &str) -> String {
    let plain = |letter: &char| matches!(letter, ' '..='~') && !matches!(letter, '"' | '\\');
    doubt.chars().filter(plain).take(DOUBT_TEXT_BYTES_MAX).collect()
}

/// What the WAL in the object of `size` bytes under a key changed; `None` if the object does not say, or not in a way
/// that this version understands. Two small reads.
///
/// # Errors
/// [`WalError::Damaged`] if what it says must not be believed; the WAL in it may be whole all the same.
/// [`WalError::Store`].
pub async fn read_changes(
    store: &dyn ObjectStore,
    key: &ObjectKey,
    size: u64,
) -> Result<Option<SegmentChanges>, WalError> {
    let damaged = |damage| WalError::Damaged { store: store.name().clone(), key: key.clone(), damage };
    let header = read_header(store, key, size).await?;
    let Some(part) = header.changes else { return Ok(None) };
    let length = checked_length(&header, part).map_err(damaged)?;
    if size < length {
        return Err(damaged(unusable("they are cut off")));
    }
    let range = ByteRange::Slice { offset: size - length, length };
    let bytes = store::collect(store.get(key, range).await?, length).await?;
    changes_in(&header, &bytes).map_err(damaged)
}

/// The length of the part that a header promises, if it can be so long.
fn checked_length(header: &WalHeader, part: ChangesPart) -> Result<u64, Damage> {
    let most = (encoded_bytes_max(header.size) + BEFORE_CHANGES_BYTES) as u64;
    match part.size {
        size if (BEFORE_CHANGES_BYTES as u64..=most).contains(&size) => Ok(size),
        size => Err(unusable(format!("its header promises {size} bytes of them, and {most} are the limit"))),
    }
}

/// What the bytes behind the frames of an object say; see [`read_changes`].
pub(super) fn changes_in(header: &WalHeader, bytes: &[u8]) -> Result<Option<SegmentChanges>, Damage> {
    let Some(part) = header.changes else { return Ok(None) };
    checked_length(header, part)?;
    if bytes.len() as u64 != part.size || crate::digest::sha256(bytes) != part.sha256 {
        return Err(unusable("they do not match their SHA-256"));
    }
    let (before, content) = bytes.split_at(BEFORE_CHANGES_BYTES);
    let expected = [SKIPPED_MAGIC.to_le_bytes(), (content.len() as u32).to_le_bytes()].concat();
    if before != expected {
        return Err(unusable("they are in no frame that is skipped"));
    }
    let limit = encoded_bytes_max(header.size);
    let decoded = match content.starts_with(&ZSTD_MAGIC) {
        true => SegmentChanges::decode(&decompressed(content, limit)?),
        false => SegmentChanges::decode(content),
    };
    match decoded {
        Ok(changes) => check_identity(header, &changes).map(|()| Some(changes)),
        // Of a version to come.
        Err(wal_changes::DecodeError::NotChanges) => Ok(None),
        Err(error) => Err(unusable(error.to_string())),
    }
}

fn decompressed(content: &[u8], limit: usize) -> Result<Vec<u8>, Damage> {
    let size = zstd::zstd_safe::get_frame_content_size(content).ok().flatten();
    let size = size.and_then(|size| usize::try_from(size).ok()).filter(|size| *size <= limit);
    let size = size.ok_or_else(|| unusable("they decompress to more than they may have"))?;
    zstd::bulk::decompress(content, size).map_err(|_| unusable("they cannot be decompressed"))
}

/// The changes are those of the segment that the header names, as far as the header tells.
fn check_identity(header: &WalHeader, changes: &SegmentChanges) -> Result<(), Damage> {
    let number = header.name.segment().and_then(|segment| segment.number(changes.size).ok());
    let same = header.size == changes.size.bytes()
        && number.map(|number: SegmentNumber| number.start(changes.size)) == Some(changes.start)
        && header.complete == changes.end.is_complete()
        && header.logical_end == Some(changes.logical_end);
    if same { Ok(()) } else { Err(unusable("they are those of another segment")) }
}

fn unusable(reason: impl Into<String>) -> Damage {
    Damage::Changes { reason: reason.into() }
}
