//! Packs: frames of files, compressed and digested one by one, gathered into objects of some MiB.
//!
//! ```text
//! "PGCVPAK1" | frame … | table entry … | trailer
//!
//! frame   stored u32 | raw u32 | file u32 | encoding u8 | pages u8 | zero u16 | offset u64 | digest 16 | stored bytes
//! entry   file u32 | raw u32 | offset u64 | position u64 | stored u32 | zero u32
//! trailer position of the table u64 | frames u32 | zero u32 | SHA-256 of all entries and the trailer so far | "PGCVPEND"
//! ```
//!
//! Numbers are little-endian. A frame holds `raw` bytes of file number `file` from byte `offset`, at most 64 KiB; it is
//! stored as it is (encoding 0) or as one Zstandard frame (1), never longer than raw. Its digest is the first half of
//! SHA-256 over the 24 bytes before it and the stored bytes, so that a frame cannot pass for another's. `pages` is 0:
//! the bytes are contiguous. Frames are in order of (file, offset), so that one file's share of a pack is one range.

use std::io;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::store::Body;

pub(super) const MAGIC: &[u8; 8] = b"PGCVPAK1";
const END_MAGIC: &[u8; 8] = b"PGCVPEND";
/// Most bytes of a file in one frame.
pub const FRAME_LIMIT_BYTES: usize = 64 * 1024;
/// Length of what stands before the stored bytes of a frame, in bytes.
pub const FRAME_HEADER_BYTES: usize = 40;
const DIGESTED_BYTES: usize = 24;
const ENTRY_BYTES: usize = 32;
const TRAILER_BYTES: usize = 56;
/// Size at which a pack counts as full if nothing else is said, in bytes.
pub const PACK_TARGET_BYTES: u64 = 16 * 1024 * 1024;

/// Number of a file within a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FileNumber(pub u32);

/// A range of a pack that holds a range of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Number of the pack.
    pub pack: u32,
    /// Where its first frame begins in the pack, in bytes.
    pub offset: u64,
    /// Length of its frames in the pack, in bytes.
    pub length: u64,
    /// First byte of the file that they hold.
    pub from: u64,
    /// The byte of the file after the last one that they hold.
    pub to: u64,
}

/// Why a piece could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Pieces must come in order of file number and offset, without overlap.
    #[error("file {} from byte {offset} comes after file {} from byte {}", file.0, last_file.0, last_end)]
    Order {
        /// File of the piece.
        file: FileNumber,
        /// Its first byte.
        offset: u64,
        /// File of the piece before.
        last_file: FileNumber,
        /// The byte after its last one.
        last_end: u64,
    },
    /// A piece must have 1 byte to [`FRAME_LIMIT_BYTES`].
    #[error("a piece of {bytes} bytes cannot be packed, expected 1 to 65536")]
    PieceLength {
        /// Its length in bytes.
        bytes: usize,
    },
    /// Compression failed, which only a lack of memory explains.
    #[error("compressing a frame failed")]
    Compress(#[source] io::Error),
}

/// A pack that is complete.
#[derive(Debug, Clone)]
pub struct FinishedPack {
    /// Its number within the backup.
    pub number: u32,
    /// The object.
    pub body: Body,
    /// Size of the object in bytes.
    pub size: u64,
    /// SHA-256 of the object.
    pub sha256: [u8; 32],
    /// Bytes of files in it.
    pub raw_bytes: u64,
    /// Which ranges of which files it holds, in order.
    pub extents: Vec<(FileNumber, Extent)>,
}

/// Makes packs, one after the other; the compressor's memory is kept between them.
pub struct PackBuilder {
    compressor: zstd::bulk::Compressor<'static>,
    target_bytes: u64,
    object: Vec<u8>,
    table: Vec<u8>,
    frames: u32,
    raw_bytes: u64,
    /// Pack numbers are set when the pack is finished.
    extents: Vec<(FileNumber, Extent)>,
}

impl PackBuilder {
    /// A builder that compresses with this Zstandard level and calls a pack full at about `target_bytes`.
    pub fn new(level: i32, target_bytes: u64) -> Result<Self, PackError> {
        Ok(Self {
            compressor: zstd::bulk::Compressor::new(level).map_err(PackError::Compress)?,
            target_bytes,
            object: MAGIC.to_vec(),
            table: Vec::new(),
            frames: 0,
            raw_bytes: 0,
            extents: Vec::new(),
        })
    }

    /// Adds bytes of a file as one frame.
    pub fn add(&mut self, file: FileNumber, offset: u64, piece: &[u8]) -> Result<(), PackError> {
        if piece.is_empty() || piece.len() > FRAME_LIMIT_BYTES {
            return Err(PackError::PieceLength { bytes: piece.len() });
        }
        if let Some((last_file, last)) = self.extents.last()
            && (file, offset) < (*last_file, last.to)
        {
            return Err(PackError::Order { file, offset, last_file: *last_file, last_end: last.to });
        }
        if self.frames == 0 {
            let spare = FRAME_HEADER_BYTES + FRAME_LIMIT_BYTES;
            self.object.reserve(usize::try_from(self.target_bytes).unwrap_or(0).saturating_add(spare));
        }
        let position = self.object.len();
        let (encoding, stored) = self.append_stored(position + FRAME_HEADER_BYTES, piece)?;
        let header = FrameHeader { stored: stored as u32, raw: piece.len() as u32, file, encoding, pages: 0, offset };
        let header_bytes = header.to_bytes();
        let digest = frame_digest(&header_bytes, &self.object[position + FRAME_HEADER_BYTES..]);
        self.object[position..position + DIGESTED_BYTES].copy_from_slice(&header_bytes);
        self.object[position + DIGESTED_BYTES..position + FRAME_HEADER_BYTES].copy_from_slice(&digest);
        self.table.extend_from_slice(&header.entry(position as u64));
        self.frames += 1;
        self.raw_bytes += piece.len() as u64;
        self.extend(file, offset, piece.len() as u64, position as u64);
        Ok(())
    }

    /// Size in bytes that the pack would have if it were finished now.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        (self.object.len() + self.table.len() + TRAILER_BYTES) as u64
    }

    /// Whether nothing was added.
    pub fn has_no_frames(&self) -> bool {
        self.frames == 0
    }

    /// Whether it has reached its target size. Adding more is still possible.
    pub fn is_full(&self) -> bool {
        self.len() >= self.target_bytes
    }

    /// Ends the pack and begins the next one.
    pub fn finish(&mut self, number: u32) -> FinishedPack {
        let table_position = self.object.len() as u64;
        let mut object = std::mem::replace(&mut self.object, MAGIC.to_vec());
        let mut trailer = Vec::with_capacity(TRAILER_BYTES);
        trailer.extend_from_slice(&table_position.to_le_bytes());
        trailer.extend_from_slice(&self.frames.to_le_bytes());
        trailer.extend_from_slice(&[0; 4]);
        trailer.extend_from_slice(&table_digest(&self.table, &trailer));
        trailer.extend_from_slice(END_MAGIC);
        object.extend_from_slice(&self.table);
        object.extend_from_slice(&trailer);
        self.table.clear();
        self.frames = 0;
        let mut extents = std::mem::take(&mut self.extents);
        extents.iter_mut().for_each(|(_, extent)| extent.pack = number);
        FinishedPack {
            number,
            size: object.len() as u64,
            sha256: crate::digest::sha256(&object),
            raw_bytes: std::mem::take(&mut self.raw_bytes),
            extents,
            body: Body::Memory(Bytes::from(object)),
        }
    }

    /// Appends the stored form of a piece, whose header goes before `start`. Gives encoding and length.
    fn append_stored(&mut self, start: usize, piece: &[u8]) -> Result<(FrameEncoding, usize), PackError> {
        self.object.resize(start + zstd::zstd_safe::compress_bound(piece.len()), 0);
        let compressed = self.compressor.compress_to_buffer(piece, &mut self.object[start..]);
        let compressed = compressed.map_err(PackError::Compress)?;
        if compressed < piece.len() {
            self.object.truncate(start + compressed);
            return Ok((FrameEncoding::Zstd, compressed));
        }
        self.object.truncate(start);
        self.object.extend_from_slice(piece);
        Ok((FrameEncoding::Plain, piece.len()))
    }

    /// Adds the newest frame to the extent before it, or begins another one.
    fn extend(&mut self, file: FileNumber, from: u64, raw: u64, position: u64) {
        let end = self.object.len() as u64;
        match self.extents.last_mut() {
            Some((last_file, last)) if *last_file == file && last.to == from => {
                last.length = end - last.offset;
                last.to = from + raw;
            }
            _ => {
                let extent = Extent { pack: 0, offset: position, length: end - position, from, to: from + raw };
                self.extents.push((file, extent));
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FrameEncoding {
    Plain = 0,
    Zstd = 1,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FrameHeader {
    stored: u32,
    raw: u32,
    file: FileNumber,
    encoding: FrameEncoding,
    pages: u8,
    offset: u64,
}

impl FrameHeader {
    fn to_bytes(self) -> [u8; DIGESTED_BYTES] {
        let mut bytes = [0; DIGESTED_BYTES];
        bytes[0..4].copy_from_slice(&self.stored.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.raw.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.file.0.to_le_bytes());
        bytes[12] = self.encoding as u8;
        bytes[13] = self.pages;
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    fn read(bytes: &[u8], position: u64) -> Result<Self, PackDamage> {
        let malformed = |what| PackDamage::FrameHeader { position, what };
        let encoding = match bytes[12] {
            0 => FrameEncoding::Plain,
            1 => FrameEncoding::Zstd,
            _ => return Err(malformed("an unknown encoding")),
        };
        let header = Self {
            stored: u32_at(bytes, 0),
            raw: u32_at(bytes, 4),
            file: FileNumber(u32_at(bytes, 8)),
            encoding,
            pages: bytes[13],
            offset: u64_at(bytes, 16),
        };
        if header.raw == 0 || header.raw as usize > FRAME_LIMIT_BYTES || header.stored > header.raw {
            return Err(malformed("impossible lengths"));
        }
        if encoding == FrameEncoding::Plain && header.stored != header.raw {
            return Err(malformed("lengths that differ without compression"));
        }
        if header.pages != 0 || bytes[14..16] != [0, 0] {
            return Err(malformed("a layout that this version does not know"));
        }
        if header.offset.checked_add(u64::from(header.raw)).is_none() {
            return Err(malformed("an impossible offset"));
        }
        Ok(header)
    }

    fn entry(self, position: u64) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[0..4].copy_from_slice(&self.file.0.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.raw.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&position.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.stored.to_le_bytes());
        bytes
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn frame_digest(header: &[u8], stored: &[u8]) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(header);
    hash.update(stored);
    let digest: [u8; 32] = hash.finalize().into();
    digest[..16].try_into().expect("half of 32 bytes")
}

fn table_digest(table: &[u8], trailer: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(table);
    hash.update(trailer);
    hash.finalize().into()
}

/// What is wrong with the bytes of a pack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackDamage {
    /// It does not begin as packs do.
    #[error("it does not begin with PGCVPAK1")]
    Magic,
    /// It does not end as packs do.
    #[error("it does not end with a trailer: it is cut off or changed")]
    Trailer,
    /// Its frame table was changed.
    #[error("its frame table does not match its SHA-256")]
    TableDigest,
    /// The frame table says something else than the frames.
    #[error("its frame table differs from the frame at byte {position}")]
    TableEntry {
        /// Where in the pack, in bytes.
        position: u64,
    },
    /// A frame's header makes no sense.
    #[error("the frame at byte {position} has {what}")]
    FrameHeader {
        /// Where in the pack, in bytes.
        position: u64,
        /// What it has.
        what: &'static str,
    },
    /// A frame was changed.
    #[error("the frame at byte {position} does not match its digest")]
    FrameDigest {
        /// Where in the pack, in bytes.
        position: u64,
    },
    /// A frame matches its digest and still does not decompress.
    #[error("the frame at byte {position} cannot be decompressed")]
    Frame {
        /// Where in the pack, in bytes.
        position: u64,
    },
    /// A frame is out of order.
    #[error("the frame at byte {position} is not in order of file and offset")]
    Order {
        /// Where in the pack, in bytes.
        position: u64,
    },
    /// A range ends within a frame.
    #[error("it ends within the frame at byte {position}")]
    Truncated {
        /// Where in the pack, in bytes.
        position: u64,
    },
    /// The whole object was changed.
    #[error("it does not match its SHA-256 in the manifest")]
    Digest,
    /// It has another size than it was published with.
    #[error("it has {found} bytes, and the manifest says {expected}")]
    Size {
        /// What it has, in bytes.
        found: u64,
        /// What it should have, in bytes.
        expected: u64,
    },
    /// A range does not hold what the manifest says.
    #[error("the range at byte {position} does not hold bytes {from} to {to} of file {}", file.0)]
    Extent {
        /// Where in the pack, in bytes.
        position: u64,
        /// Which file it should hold.
        file: FileNumber,
        /// From which byte.
        from: u64,
        /// To which byte, exclusive.
        to: u64,
    },
}

/// One verified frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Which file it belongs to.
    pub file: FileNumber,
    /// Its first byte there.
    pub offset: u64,
    /// What the file holds there.
    pub bytes: &'a [u8],
}

/// Reads frames out of a range of a pack that begins with a frame and ends after one.
///
/// Memory: one frame. Every frame is verified before it is handed on.
pub struct FrameReader {
    decompressor: zstd::bulk::Decompressor<'static>,
    position: u64,
    /// The beginning of a frame that has not come whole.
    waiting: Vec<u8>,
    raw: Vec<u8>,
    last: Option<(FileNumber, u64)>,
}

impl FrameReader {
    /// A reader of a range that begins `position` bytes into its pack; the first frame of a pack is at byte 8.
    pub fn new(position: u64) -> io::Result<Self> {
        let decompressor = zstd::bulk::Decompressor::new()?;
        Ok(Self { decompressor, position, waiting: Vec::new(), raw: vec![0; FRAME_LIMIT_BYTES], last: None })
    }

    /// Takes the next bytes of the range and hands on the frames that are whole now. An error of `sink` ends it.
    pub fn push<E: From<PackDamage>>(
        &mut self,
        mut bytes: &[u8],
        sink: &mut impl FnMut(Frame<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            if self.waiting.is_empty() {
                match self.frame_length(bytes)? {
                    Some(length) if length <= bytes.len() => {
                        let (frame, rest) = bytes.split_at(length);
                        self.hand_on(frame, sink)?;
                        bytes = rest;
                    }
                    _ => {
                        self.waiting.extend_from_slice(bytes);
                        return Ok(());
                    }
                }
                continue;
            }
            let wanted = self.frame_length(&self.waiting)?.unwrap_or(FRAME_HEADER_BYTES) - self.waiting.len();
            let (piece, rest) = bytes.split_at(wanted.min(bytes.len()));
            self.waiting.extend_from_slice(piece);
            bytes = rest;
            if self.frame_length(&self.waiting)? == Some(self.waiting.len()) {
                let frame = std::mem::take(&mut self.waiting);
                self.hand_on(&frame, sink)?;
            }
        }
        Ok(())
    }

    /// Ends the range.
    pub fn finish(self) -> Result<(), PackDamage> {
        match self.waiting.is_empty() {
            true => Ok(()),
            false => Err(PackDamage::Truncated { position: self.position }),
        }
    }

    fn frame_length(&self, bytes: &[u8]) -> Result<Option<usize>, PackDamage> {
        if bytes.len() < FRAME_HEADER_BYTES {
            return Ok(None);
        }
        let header = FrameHeader::read(bytes, self.position)?;
        Ok(Some(FRAME_HEADER_BYTES + header.stored as usize))
    }

    fn hand_on<E: From<PackDamage>>(
        &mut self,
        frame: &[u8],
        sink: &mut impl FnMut(Frame<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let position = self.position;
        let header = FrameHeader::read(frame, position)?;
        let stored = &frame[FRAME_HEADER_BYTES..];
        if frame_digest(&frame[..DIGESTED_BYTES], stored) != frame[DIGESTED_BYTES..FRAME_HEADER_BYTES] {
            return Err(PackDamage::FrameDigest { position }.into());
        }
        if self.last.is_some_and(|last| (header.file, header.offset) < last) {
            return Err(PackDamage::Order { position }.into());
        }
        let bytes = match header.encoding {
            FrameEncoding::Plain => stored,
            FrameEncoding::Zstd => {
                let raw = &mut self.raw[..header.raw as usize];
                match self.decompressor.decompress_to_buffer(stored, raw) {
                    Ok(length) if length == header.raw as usize => &self.raw[..length],
                    _ => return Err(PackDamage::Frame { position }.into()),
                }
            }
        };
        sink(Frame { file: header.file, offset: header.offset, bytes })?;
        self.last = Some((header.file, header.offset + u64::from(header.raw)));
        self.position += frame.len() as u64;
        Ok(())
    }
}

/// Checks a whole pack: every frame, the frame table, and that they agree.
pub fn verify_pack(pack: &[u8], sink: &mut impl FnMut(Frame<'_>) -> Result<(), PackDamage>) -> Result<(), PackDamage> {
    if !pack.starts_with(MAGIC) {
        return Err(PackDamage::Magic);
    }
    let trailer_start = pack.len().checked_sub(TRAILER_BYTES).ok_or(PackDamage::Trailer)?;
    let trailer = &pack[trailer_start..];
    let table_start = usize::try_from(u64_at(trailer, 0)).map_err(|_| PackDamage::Trailer)?;
    let frames = u32_at(trailer, 8) as usize;
    let table = pack.get(table_start..trailer_start).ok_or(PackDamage::Trailer)?;
    if trailer[48..] != *END_MAGIC || table_start < MAGIC.len() || table.len() != frames * ENTRY_BYTES {
        return Err(PackDamage::Trailer);
    }
    if table_digest(table, &trailer[..16]) != trailer[16..48] {
        return Err(PackDamage::TableDigest);
    }
    let mut reader = FrameReader::new(MAGIC.len() as u64).map_err(|_| PackDamage::Frame { position: 0 })?;
    let mut position = MAGIC.len();
    for entry in table.chunks_exact(ENTRY_BYTES) {
        let damaged = PackDamage::TableEntry { position: position as u64 };
        let bytes = &pack[position..table_start];
        let length = reader.frame_length(bytes)?.filter(|length| *length <= bytes.len()).ok_or(damaged.clone())?;
        reader.push(&bytes[..length], sink)?;
        if FrameHeader::read(bytes, position as u64)?.entry(position as u64) != *entry {
            return Err(damaged);
        }
        position += length;
    }
    match position == table_start {
        true => reader.finish(),
        false => Err(PackDamage::TableEntry { position: position as u64 }),
    }
}
