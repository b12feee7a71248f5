//! Makes packs.

use std::io;

use bytes::Bytes;

use super::frame::{FrameEncoding, FrameHeader, Place, frame_digest};
use super::table::table_digest;
use super::{
    DIGESTED_BYTES, END_MAGIC, Extent, FRAME_HEADER_BYTES, FRAME_LIMIT_BYTES, FRAME_LIMIT_PAGES, FileNumber, MAGIC,
    TRAILER_BYTES, unit_sum,
};
use crate::store::Body;

/// Frames at which a pack is full whatever its size: each is remembered, also by who is told of the pack, with more bytes than
/// a small one has.
const FRAMES_MAX: u32 = 8192;

/// Why a piece could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Pieces must come in order of file number and, for each shape, of offset without overlap.
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
    /// Pages must be 1 to [`FRAME_LIMIT_PAGES`], of equal size, with ascending numbers.
    #[error("{blocks} pages in {bytes} bytes cannot be packed, expected 1 to 8 of equal size in ascending order")]
    Pages {
        /// How many numbers were given.
        blocks: usize,
        /// How many bytes.
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
    sums: Vec<u8>,
    frames: u32,
    raw_bytes: u64,
    /// Pack numbers are set when the pack is finished.
    extents: Vec<(FileNumber, Extent)>,
    /// Whether the next frame begins an extent, whatever lies before it.
    apart: bool,
}

impl PackBuilder {
    /// A builder that compresses with this Zstandard level and calls a pack full at about `target_bytes`.
    pub fn new(level: i32, target_bytes: u64) -> Result<Self, PackError> {
        Ok(Self {
            compressor: zstd::bulk::Compressor::new(level).map_err(PackError::Compress)?,
            target_bytes,
            object: MAGIC.to_vec(),
            table: Vec::new(),
            sums: Vec::new(),
            frames: 0,
            raw_bytes: 0,
            extents: Vec::new(),
            apart: false,
        })
    }

    /// Begins another extent with the next frame. Whoever stores only parts of a file in these packs calls this between
    /// them: a sparse extent over two parts would enclose what others store of the part in between.
    pub fn part(&mut self) {
        self.apart = true;
    }

    /// Adds bytes of a file as one contiguous frame.
    ///
    /// Adjoining frames make one [`Extent`]; so do sparse frames of a file that follow each other. An extent of a layer
    /// must not enclose another: who stores both shapes of one file adds them in order of the file's bytes.
    pub fn add(&mut self, file: FileNumber, offset: u64, piece: &[u8]) -> Result<(), PackError> {
        if piece.is_empty() || piece.len() > FRAME_LIMIT_BYTES {
            return Err(PackError::PieceLength { bytes: piece.len() });
        }
        let place = Place { file, sparse: false, from: offset, to: offset + piece.len() as u64 };
        self.append(place, &[], piece)
    }

    /// Adds whole pages of a file as one sparse frame: the pages with these numbers within the file, one after the other.
    pub fn add_pages(&mut self, file: FileNumber, blocks: &[u32], pages: &[u8]) -> Result<(), PackError> {
        let refused = PackError::Pages { blocks: blocks.len(), bytes: pages.len() };
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else { return Err(refused) };
        if blocks.len() > FRAME_LIMIT_PAGES
            || pages.is_empty()
            || pages.len() > FRAME_LIMIT_BYTES
            || !pages.len().is_multiple_of(blocks.len())
            || !blocks.is_sorted_by(|one, next| one < next)
        {
            return Err(refused);
        }
        let page_bytes = (pages.len() / blocks.len()) as u64;
        let (from, to) = (u64::from(*first) * page_bytes, (u64::from(*last) + 1) * page_bytes);
        self.append(Place { file, sparse: true, from, to }, blocks, pages)
    }

    fn append(&mut self, place: Place, blocks: &[u32], piece: &[u8]) -> Result<(), PackError> {
        let (file, offset) = (place.file, place.from);
        if let Some((last_file, last)) = self.extents.last() {
            let before = Place { file: *last_file, sparse: last.pages.is_some(), from: last.from, to: last.to };
            if !before.allows(&place) {
                return Err(PackError::Order { file, offset, last_file: *last_file, last_end: last.to });
            }
        }
        if self.frames == 0 {
            let spare = FRAME_HEADER_BYTES + FRAME_LIMIT_BYTES;
            self.object.reserve(usize::try_from(self.target_bytes).unwrap_or(0).saturating_add(spare));
        }
        let position = self.object.len();
        let start = position + FRAME_HEADER_BYTES + size_of_val(blocks);
        let (encoding, stored) = self.append_stored(start, piece)?;
        for (block, place) in blocks.iter().zip(self.object[position + FRAME_HEADER_BYTES..].chunks_exact_mut(4)) {
            place.copy_from_slice(&block.to_le_bytes());
        }
        let pages = blocks.len() as u8;
        let header = FrameHeader { stored: stored as u32, raw: piece.len() as u32, file, encoding, pages, offset };
        let header_bytes = header.to_bytes();
        let digest = frame_digest(&header_bytes, &self.object[position + FRAME_HEADER_BYTES..]);
        self.object[position..position + DIGESTED_BYTES].copy_from_slice(&header_bytes);
        self.object[position + DIGESTED_BYTES..position + FRAME_HEADER_BYTES].copy_from_slice(&digest);
        self.table.extend_from_slice(&header.entry(position as u64));
        self.sums.extend(blocks.iter().flat_map(|block| block.to_le_bytes()));
        self.sums.extend(piece.chunks(header.unit_bytes()).flat_map(|unit| unit_sum(unit).to_le_bytes()));
        self.frames += 1;
        self.raw_bytes += piece.len() as u64;
        self.extend(place, blocks.len() as u32, position as u64);
        Ok(())
    }

    /// Size in bytes that the pack would have if it were finished now.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        (self.object.len() + self.table.len() + self.sums.len() + TRAILER_BYTES) as u64
    }

    /// Whether nothing was added.
    pub fn has_no_frames(&self) -> bool {
        self.frames == 0
    }

    /// Whether it has reached its target size, or holds as many frames as are well remembered. Adding more is still possible.
    pub fn is_full(&self) -> bool {
        self.len() >= self.target_bytes || self.frames >= FRAMES_MAX
    }

    /// Ends the pack and begins the next one.
    pub fn finish(&mut self, number: u32) -> FinishedPack {
        let table_position = self.object.len() as u64;
        let mut object = std::mem::replace(&mut self.object, MAGIC.to_vec());
        object.append(&mut self.table);
        object.append(&mut self.sums);
        let mut trailer = Vec::with_capacity(TRAILER_BYTES);
        trailer.extend_from_slice(&table_position.to_le_bytes());
        trailer.extend_from_slice(&self.frames.to_le_bytes());
        trailer.extend_from_slice(&[0; 4]);
        trailer.extend_from_slice(&table_digest(&object[table_position as usize..], &trailer));
        trailer.extend_from_slice(END_MAGIC);
        object.extend_from_slice(&trailer);
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

    /// Appends the stored form of a piece, whose header and blocks go before `start`. Gives encoding and length.
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
    fn extend(&mut self, place: Place, blocks: u32, position: u64) {
        let end = self.object.len() as u64;
        let pages = place.sparse.then_some(blocks);
        match self.extents.last_mut() {
            Some((last_file, last))
                if !self.apart
                    && *last_file == place.file
                    && match last.pages {
                        Some(_) => place.sparse,
                        None => !place.sparse && last.to == place.from,
                    } =>
            {
                last.length = end - last.offset;
                last.to = place.to;
                last.pages = last.pages.zip(pages).map(|(before, more)| before.saturating_add(more));
            }
            _ => {
                let (offset, length) = (position, end - position);
                let extent = Extent { pack: 0, offset, length, from: place.from, to: place.to, pages };
                self.extents.push((place.file, extent));
            }
        }
        self.apart = false;
    }
}
