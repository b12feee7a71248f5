//! Packs: frames of files, compressed and digested one by one, gathered into objects of some MiB.
//!
//! ```text
//! "PGCVPAK1" | frame … | table entry … | sums … | trailer
//!
//! frame   stored u32 | raw u32 | file u32 | encoding u8 | pages u8 | zero u16 | offset u64 | digest 16 |
//!         block u32 … | stored bytes
//! entry   file u32 | raw u32 | offset u64 | position u64 | stored u32 | pages u8 | zero u8 x3
//! sums    of each frame: block u32 … | sum u64 …
//! trailer position of the table u64 | frames u32 | zero u32 | SHA-256 of all entries, sums and the trailer so far |
//!         "PGCVPEND"
//! ```
//!
//! Numbers are little-endian. A frame holds at most 64 KiB of file number `file`, stored as they are (encoding 0) or as
//! one Zstandard frame (1), never longer than raw. It is of one of two shapes:
//! * contiguous, `pages` 0: `raw` bytes from byte `offset`; no blocks are listed;
//! * sparse, `pages` 1 to 8: that many whole pages of equal size, whose numbers within the file are listed in ascending
//!   order; `offset` is where the first one lies in the file.
//!
//! A frame's digest is the first half of SHA-256 over the 24 bytes before it, the blocks and the stored bytes, so that a
//! frame cannot pass for another's. Frames are in order of file; frames of one file and one shape that follow each other
//! are in order of offset. So one file's share of a pack is one range, or one of each shape.
//!
//! A sum is CRC-64/NVME of a unit of the file: a page of a sparse frame, or each 8 KiB (the last may be shorter) of a
//! contiguous one. It tells, without reading a frame, whether what lies on a disk is what the frame holds. That is a
//! comparison of 64 bits, good against chance and not against malice; digests stay what proves a frame.

mod builder;
mod damage;
mod frame;
mod reader;
mod table;

pub use builder::{FinishedPack, PackBuilder, PackError};
pub use damage::PackDamage;
pub use reader::{Frame, FrameReader};
pub use table::{TABLE_LIMIT_BYTES, TableFrame, Unit, read_table, table_length, verify_pack};

use serde::{Deserialize, Serialize};

pub(super) const MAGIC: &[u8; 8] = b"PGCVPAK1";
const END_MAGIC: &[u8; 8] = b"PGCVPEND";
/// Most bytes of a file in one frame.
pub const FRAME_LIMIT_BYTES: usize = 64 * 1024;
/// Most pages in one sparse frame.
pub const FRAME_LIMIT_PAGES: usize = 8;
/// Bytes of a contiguous frame that one sum is of.
pub const SUM_UNIT_BYTES: usize = 8192;
/// Length of what stands before the blocks and the stored bytes of a frame, in bytes.
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

/// A range of a pack that holds a range of one file, or some pages of it.
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
    /// Present if its frames are sparse: they hold this many whole pages between `from` and `to`. Absent: all bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<u32>,
}

impl Extent {
    /// Bytes of the file that its frames hold, of pages of this size. Without overflow on any input.
    pub fn held_bytes(&self, block_size: u32) -> u64 {
        match self.pages {
            Some(pages) => u64::from(pages) * u64::from(block_size),
            None => self.to.saturating_sub(self.from),
        }
    }

    /// The byte of the pack after its last frame.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// The checksum of one unit.
pub fn unit_sum(bytes: &[u8]) -> u64 {
    crc_fast::crc64_nvme(bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
