//! What can be wrong with the bytes of a pack.

use super::FileNumber;

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
