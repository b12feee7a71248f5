//! The header of a frame and of its entry in the table: bytes to values and back, and what is possible.

use sha2::{Digest, Sha256};

use super::{
    DIGESTED_BYTES, ENTRY_BYTES, FRAME_HEADER_BYTES, FRAME_LIMIT_BYTES, FRAME_LIMIT_PAGES, FileNumber, PackDamage,
    SUM_UNIT_BYTES, u32_at, u64_at,
};

/// Bytes of one block number.
pub(super) const BLOCK_BYTES: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FrameEncoding {
    Plain = 0,
    Zstd = 1,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHeader {
    pub(super) stored: u32,
    pub(super) raw: u32,
    pub(super) file: FileNumber,
    pub(super) encoding: FrameEncoding,
    /// 0: contiguous.
    pub(super) pages: u8,
    pub(super) offset: u64,
}

impl FrameHeader {
    pub(super) fn to_bytes(self) -> [u8; DIGESTED_BYTES] {
        let mut bytes = [0; DIGESTED_BYTES];
        bytes[0..4].copy_from_slice(&self.stored.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.raw.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.file.0.to_le_bytes());
        bytes[12] = self.encoding as u8;
        bytes[13] = self.pages;
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    pub(super) fn read(bytes: &[u8], position: u64) -> Result<Self, PackDamage> {
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
        if encoding == FrameEncoding::Plain && header.stored != header.raw {
            return Err(malformed("lengths that differ without compression"));
        }
        if bytes[14..16] != [0, 0] {
            return Err(malformed("a layout that this version does not know"));
        }
        header.check().map_err(malformed)?;
        Ok(header)
    }

    /// What holds in the frame and in the table.
    fn check(&self) -> Result<(), &'static str> {
        if self.raw == 0 || self.raw as usize > FRAME_LIMIT_BYTES || self.stored > self.raw {
            return Err("impossible lengths");
        }
        if self.pages as usize > FRAME_LIMIT_PAGES {
            return Err("a layout that this version does not know");
        }
        if self.pages > 0 && !self.raw.is_multiple_of(u32::from(self.pages)) {
            return Err("pages of unequal size");
        }
        if self.offset.checked_add(u64::from(self.raw)).is_none() {
            return Err("an impossible offset");
        }
        Ok(())
    }

    pub(super) fn is_sparse(&self) -> bool {
        self.pages > 0
    }

    /// Length of the block list in bytes.
    pub(super) fn blocks_bytes(&self) -> usize {
        usize::from(self.pages) * BLOCK_BYTES
    }

    /// Length of the whole frame in bytes.
    pub(super) fn frame_bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.blocks_bytes() + self.stored as usize
    }

    /// Bytes that one sum is of; the last unit of a contiguous frame may be shorter.
    pub(super) fn unit_bytes(&self) -> usize {
        match self.pages {
            0 => SUM_UNIT_BYTES,
            pages => self.raw as usize / usize::from(pages),
        }
    }

    /// How many sums a frame has.
    pub(super) fn units(&self) -> usize {
        (self.raw as usize).div_ceil(self.unit_bytes())
    }

    /// Reads the numbers of a sparse frame's pages, which must ascend from the page that lies at `offset`.
    pub(super) fn blocks(&self, list: &[u8], position: u64) -> Result<Vec<u32>, PackDamage> {
        let malformed = |what| PackDamage::FrameHeader { position, what };
        let blocks: Vec<u32> = list.chunks_exact(BLOCK_BYTES).map(|block| u32_at(block, 0)).collect();
        if blocks.first().is_some_and(|first| u64::from(*first) * self.unit_bytes() as u64 != self.offset) {
            return Err(malformed("an offset that is not its first page's"));
        }
        match blocks.is_sorted_by(|one, next| one < next) {
            true => Ok(blocks),
            false => Err(malformed("pages that are not in order")),
        }
    }

    pub(super) fn entry(self, position: u64) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[0..4].copy_from_slice(&self.file.0.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.raw.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&position.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.stored.to_le_bytes());
        bytes[28] = self.pages;
        bytes
    }

    /// Reads an entry of the table: the header, but for its encoding, and where the frame lies.
    pub(super) fn from_entry(entry: &[u8]) -> Result<(Self, u64), PackDamage> {
        let position = u64_at(entry, 16);
        let header = Self {
            stored: u32_at(entry, 24),
            raw: u32_at(entry, 4),
            file: FileNumber(u32_at(entry, 0)),
            encoding: FrameEncoding::Zstd,
            pages: entry[28],
            offset: u64_at(entry, 8),
        };
        header.check().map_err(|what| PackDamage::FrameHeader { position, what })?;
        Ok((header, position))
    }
}

/// `rest` is what stands behind the header: blocks and stored bytes.
pub(super) fn frame_digest(header: &[u8], rest: &[u8]) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(header);
    hash.update(rest);
    let digest: [u8; 32] = hash.finalize().into();
    digest[..16].try_into().expect("half of 32 bytes")
}

/// Where a frame stands in the order of frames.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) file: FileNumber,
    pub(super) sparse: bool,
    pub(super) from: u64,
    /// The byte of the file after the last one that it holds.
    pub(super) to: u64,
}

impl Place {
    /// Whether a frame may stand behind this one.
    pub(super) fn allows(&self, next: &Self) -> bool {
        match self.file.cmp(&next.file) {
            std::cmp::Ordering::Less => true,
            std::cmp::Ordering::Equal => self.sparse != next.sparse || self.to <= next.from,
            std::cmp::Ordering::Greater => false,
        }
    }
}
