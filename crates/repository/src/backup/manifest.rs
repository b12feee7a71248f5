//! The manifest: everything a restore needs to know about a backup, one JSON object a line.
//!
//! ```text
//! "PGCVMAN1" | one Zstandard frame, with checksum, of lines
//!
//! {"line":"head",…}  {"line":"tablespace",…}  {"line":"directory",…}  {"line":"link",…}  {"line":"pack",…}
//! {"line":"file",…}  {"line":"end",…}          kinds come in this order
//! ```
//!
//! Writing and reading stream: memory does not grow with the number of files, only with that of packs (16 bytes each).
//! A reader must have compared the object with the SHA-256 in the root entry before it believes a line; the frame's
//! checksum and the counts at the end serve those who read a manifest without a root.
//!
//! A file's content is a list of layers, newest first: the state of a byte is in the newest layer that holds it. A layer
//! lies in the packs of one backup, this one or an older one. All layers are listed, so a backup is restored and deleted
//! alone, whatever became of those it was built on.
//!
//! Writer and reader refuse the same things: what is written can be read.

mod damage;
mod layers;
mod lines;
mod reader;
mod sequence;
mod writer;

pub use damage::ManifestDamage;
pub use lines::{Database, Directory, End, File, FileKind, Head, Layer, Line, Link, Pack, PageError, Tablespace};
pub use reader::ManifestReader;
pub use writer::{ManifestSummary, ManifestWriter};

const MAGIC: &[u8; 8] = b"PGCVMAN1";
/// Longest line, in bytes; enough for the extents of a file of many TiB.
pub const LINE_LIMIT_BYTES: u64 = 64 * 1024 * 1024;
/// Most corrupt pages that are named in the head; all are counted.
pub const PAGE_ERROR_LIMIT: usize = 1000;
/// Most databases that are named in the head.
pub const DATABASE_LIMIT: usize = 65_536;
/// The name in `critical` of a manifest with files that are more than one layer of contiguous extents of its own.
pub const LAYERS: &str = "layers";
/// Compression level of manifests.
const LEVEL: i32 = 3;
/// Largest window of the frame: 2 to this power in bytes.
const WINDOW_LOG_MAX: u32 = 23;
const FORMAT: u32 = 1;
/// Names that may stand in `critical`.
const UNDERSTOOD: &[&str] = &[LAYERS];
