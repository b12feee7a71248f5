//! The manifest: everything a restore needs to know about a backup, one JSON object a line.
//!
//! ```text
//! "PGCVMAN1" | one Zstandard frame, with checksum, of lines
//!
//! {"line":"head",…}  {"line":"tablespace",…}  {"line":"directory",…}  {"line":"link",…}  {"line":"pack",…}
//! {"line":"file",…}  {"line":"end",…}          kinds come in this order
//! ```
//!
//! Writing and reading stream: memory does not grow with the number of files. A reader must have compared the object
//! with the SHA-256 in the root entry before it believes a line; the frame's checksum and the counts at the end serve
//! those who read a manifest without a root.
//!
//! A file's content is a list of layers, newest first: the state of a byte is in the newest layer that holds it. Today
//! each file has one layer with all of it.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};

use jiff::Timestamp;
use postgres_format::{FullTransactionId, Lsn, SystemIdentifier, Timeline};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::pack::{Extent, FileNumber};
use crate::byte_text::{ByteText, RelativePath};
use crate::name::{BackupId, ClusterName, NodeName};

pub(super) const MAGIC: &[u8; 8] = b"PGCVMAN1";
/// Longest line, in bytes; enough for the extents of a file of many TiB.
pub const LINE_LIMIT_BYTES: u64 = 64 * 1024 * 1024;
/// Most corrupt pages that are named in the head; all are counted.
pub const PAGE_ERROR_LIMIT: usize = 1000;
/// Compression level of manifests.
const LEVEL: i32 = 3;
/// Largest window of the frame: 2 to this power in bytes.
const WINDOW_LOG_MAX: u32 = 23;
const FORMAT: u32 = 1;
/// Names that may stand in `critical`.
const UNDERSTOOD: &[&str] = &[];

/// One line of a manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum Line {
    /// What holds for the whole backup.
    Head(Box<Head>),
    /// A tablespace outside of the data directory.
    Tablespace(Tablespace),
    /// A directory.
    Directory(Directory),
    /// A symbolic link other than those of tablespaces.
    Link(Link),
    /// A pack that files refer to.
    Pack(Pack),
    /// A file.
    File(File),
    /// What came before.
    End(End),
}

/// What holds for the whole backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// Version of the manifest's layout; 1.
    pub format: u32,
    /// Names of fields without which the manifest must not be interpreted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub critical: Vec<String>,
    /// The program that wrote it, with its version.
    pub tool: String,
    /// The backup.
    pub backup: BackupId,
    /// The cluster's name in the fleet.
    pub cluster: ClusterName,
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The node whose files were read.
    pub node: NodeName,
    /// Whether that node was a standby.
    pub from_standby: bool,
    /// PostgreSQL's major version.
    pub postgres_major: u32,
    /// Version of `pg_control`.
    pub control_version: u32,
    /// Version of the system catalogs, which is in the name of tablespace directories.
    pub catalog_version: u32,
    /// Size of a WAL segment in bytes.
    pub segment_size_bytes: u64,
    /// Size of a page in bytes.
    pub block_size: u32,
    /// Pages in a full file of a relation.
    pub relation_segment_blocks: u32,
    /// Version of page checksums; 0 is off.
    pub checksum_version: u32,
    /// Timeline at the start.
    pub start_timeline: Timeline,
    /// Where recovery begins.
    pub start_lsn: Lsn,
    /// When the backup was started, by the server's clock.
    pub start_time: Timestamp,
    /// Timeline at the stop.
    pub stop_timeline: Timeline,
    /// Where recovery is consistent at the latest.
    pub stop_lsn: Lsn,
    /// When the backup was stopped, by the server's clock.
    pub stop_time: Timestamp,
    /// Of a backup from a standby: the `minRecoveryPoint` of its `pg_control`.
    pub min_recovery_point: Option<Lsn>,
    /// The id that the next transaction was to get at the last checkpoint when the backup began; absent if it was not
    /// known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_next_xid: Option<FullTransactionId>,
    /// The id that the next transaction was to get when the backup had ended; absent if it was not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_next_xid: Option<FullTransactionId>,
    /// The label that was asked for.
    pub label: String,
    /// Content of `backup_label`, byte for byte as the server gave it.
    pub backup_label: ByteText,
    /// Content of `tablespace_map`, byte for byte; empty if there is none.
    pub tablespace_map: ByteText,
    /// Mode of the data directory.
    pub mode: u32,
    /// Name of the user who owns the data directory, if it has one.
    pub owner: Option<String>,
    /// Name of the group that owns the data directory, if it has one.
    pub group: Option<String>,
    /// Backups whose packs are referred to, besides this one.
    #[serde(default)]
    pub references: Vec<BackupId>,
    /// How many pages were found corrupt.
    pub page_errors: u64,
    /// The first of them, at most [`PAGE_ERROR_LIMIT`].
    #[serde(default)]
    pub page_error_list: Vec<PageError>,
    /// What newer versions added.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

impl Head {
    /// The format that this version writes.
    pub const FORMAT: u32 = FORMAT;
}

/// A page that was found corrupt in the data directory and copied as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageError {
    /// In which file.
    pub path: RelativePath,
    /// Number of the page within that file.
    pub block: u32,
    /// What is wrong with it.
    pub problem: String,
}

/// A tablespace outside of the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its object identifier, which is the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Where it lay.
    pub location: ByteText,
    /// Mode of that directory.
    pub mode: u32,
}

/// A directory. Those of tablespaces are named as they are seen through the links in `pg_tblspc`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Its path below the data directory.
    pub path: RelativePath,
    /// Its mode.
    pub mode: u32,
}

/// A symbolic link other than those of tablespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its path below the data directory.
    pub path: RelativePath,
    /// What it points to.
    pub target: ByteText,
}

/// A pack of this backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pack {
    /// Its number, which is in its key.
    pub number: u32,
    /// Its size in bytes.
    pub size: u64,
    /// SHA-256 of the object.
    #[serde(with = "crate::digest::hex")]
    pub sha256: [u8; 32],
}

/// What a file is to PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// Part of a relation: pages.
    Relation,
    /// `global/pg_control`, which is restored last.
    Control,
    /// Anything else.
    Other,
}

/// A file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Its number within the backup, which its frames carry.
    pub number: FileNumber,
    /// Its path below the data directory.
    pub path: RelativePath,
    /// What it is.
    pub kind: FileKind,
    /// Its mode.
    pub mode: u32,
    /// When it was last modified, in seconds since 1970.
    pub mtime: i64,
    /// Its size in bytes.
    pub size: u64,
    /// CRC-32C of its content.
    pub crc32c: u32,
    /// Where its content is, newest layer first. None for an empty file.
    pub layers: Vec<Layer>,
}

/// Part of a file's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The backup whose packs hold it; absent for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupId>,
    /// Where, in order of the file's bytes.
    pub extents: Vec<Extent>,
}

/// What came before the last line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct End {
    /// Tablespace lines.
    pub tablespaces: u64,
    /// Directory lines.
    pub directories: u64,
    /// Link lines.
    pub links: u64,
    /// Pack lines.
    pub packs: u64,
    /// Bytes in those packs.
    pub pack_bytes: u64,
    /// File lines.
    pub files: u64,
    /// Bytes in those files.
    pub data_bytes: u64,
}

impl Line {
    /// Kinds come in ascending rank.
    fn rank(&self) -> u8 {
        match self {
            Self::Head(_) => 0,
            Self::Tablespace(_) => 1,
            Self::Directory(_) => 2,
            Self::Link(_) => 3,
            Self::Pack(_) => 4,
            Self::File(_) => 5,
            Self::End(_) => 6,
        }
    }
}

impl End {
    fn count(&mut self, line: &Line) {
        match line {
            Line::Head(_) | Line::End(_) => {}
            Line::Tablespace(_) => self.tablespaces += 1,
            Line::Directory(_) => self.directories += 1,
            Line::Link(_) => self.links += 1,
            Line::Pack(pack) => {
                self.packs += 1;
                self.pack_bytes = self.pack_bytes.saturating_add(pack.size);
            }
            Line::File(file) => {
                self.files += 1;
                self.data_bytes = self.data_bytes.saturating_add(file.size);
            }
        }
    }
}

impl File {
    /// Whether the layers hold every byte once. Fails with what they lack.
    pub fn check_layers(&self) -> Result<(), ManifestDamage> {
        let lacks = |at| Err(ManifestDamage::Extents { path: self.path.to_string(), at });
        let extents = match self.layers.as_slice() {
            [] => &[][..],
            [layer] => layer.extents.as_slice(),
            _ => return Err(ManifestDamage::Layers { path: self.path.to_string() }),
        };
        let mut at = 0;
        for extent in extents {
            if extent.from != at || extent.to <= extent.from || extent.length == 0 {
                return lacks(at);
            }
            at = extent.to;
        }
        if at == self.size { Ok(()) } else { lacks(at) }
    }
}

/// What is wrong with a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestDamage {
    /// It does not begin as manifests do.
    #[error("it does not begin with PGCVMAN1")]
    Magic,
    /// It is not the one that was published.
    #[error("it does not match the size and SHA-256 in the root")]
    Digest,
    /// It does not decompress.
    #[error("it cannot be decompressed after line {line}: {reason}")]
    Compression {
        /// Number of the last whole line, from 1.
        line: u64,
        /// What the decompressor said.
        reason: String,
    },
    /// A line is longer than [`LINE_LIMIT_BYTES`], or is not one.
    #[error("line {line} cannot be read: {reason}")]
    Line {
        /// Its number, from 1.
        line: u64,
        /// What the JSON reader said.
        reason: String,
    },
    /// Lines are missing or out of order.
    #[error("line {line} is out of order: {reason}")]
    Order {
        /// Its number, from 1.
        line: u64,
        /// What was expected.
        reason: &'static str,
    },
    /// The last line counts something else than what came.
    #[error("it does not have as many lines and bytes as its last line says")]
    Counts,
    /// A file's content is not described.
    #[error("file {path} has no content from byte {at}")]
    Extents {
        /// Which file.
        path: String,
        /// From which byte.
        at: u64,
    },
    /// A file has layers in a way that this version cannot read.
    #[error("file {path} has several layers: a newer pgconvoy is needed")]
    Layers {
        /// Which file.
        path: String,
    },
    /// A newer version wrote it.
    #[error("{what} is not understood: a newer pgconvoy is needed")]
    Newer {
        /// What is new.
        what: String,
    },
}

/// A manifest that is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestSummary {
    /// Size of the object in bytes.
    pub size: u64,
    /// SHA-256 of the object.
    pub sha256: [u8; 32],
    /// What it holds.
    pub counts: End,
}

/// Writes a manifest.
pub struct ManifestWriter<W: Write> {
    frame: zstd::stream::write::Encoder<'static, Hashed<W>>,
    counts: End,
    rank: u8,
}

impl<W: Write> ManifestWriter<W> {
    /// Begins a manifest.
    pub fn new(out: W, head: Head) -> io::Result<Self> {
        let mut out = Hashed { out, hash: Sha256::new(), size: 0 };
        out.write_all(MAGIC)?;
        let mut frame = zstd::stream::write::Encoder::new(out, LEVEL)?;
        frame.include_checksum(true)?;
        let mut writer = Self { frame, counts: End::default(), rank: 0 };
        writer.add(&Line::Head(Box::new(head)))?;
        Ok(writer)
    }

    /// Adds a line. Kinds must come in the order of [`Line`]; head and end are written by `new` and `finish`.
    pub fn add(&mut self, line: &Line) -> io::Result<()> {
        if line.rank() < self.rank {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "lines of a manifest come in order of their kinds",
            ));
        }
        self.rank = line.rank();
        self.counts.count(line);
        serde_json::to_writer(&mut self.frame, line)?;
        self.frame.write_all(b"\n")
    }

    /// Ends the manifest.
    pub fn finish(mut self) -> io::Result<(W, ManifestSummary)> {
        let counts = self.counts;
        self.add(&Line::End(counts))?;
        let Hashed { mut out, hash, size } = self.frame.finish()?;
        out.flush()?;
        Ok((out, ManifestSummary { size, sha256: hash.finalize().into(), counts }))
    }
}

struct Hashed<W> {
    out: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Reads a manifest line by line. After an error there is nothing more to read.
///
/// An iterator over all lines after the head; it ends after [`Line::End`] was checked, and never without.
pub struct ManifestReader<R: Read> {
    lines: BufReader<zstd::stream::read::Decoder<'static, BufReader<R>>>,
    head: Head,
    counts: End,
    rank: u8,
    line: u64,
    done: bool,
}

impl<R: Read> ManifestReader<R> {
    /// Reads the head.
    pub fn new(mut object: R) -> Result<Self, ManifestDamage> {
        let mut magic = [0; 8];
        object.read_exact(&mut magic).map_err(|_| ManifestDamage::Magic)?;
        if magic != *MAGIC {
            return Err(ManifestDamage::Magic);
        }
        let compression = |error: io::Error| ManifestDamage::Compression { line: 0, reason: error.to_string() };
        let mut frame = zstd::stream::read::Decoder::new(object).map_err(compression)?.single_frame();
        frame.window_log_max(WINDOW_LOG_MAX).map_err(compression)?;
        let mut lines = BufReader::new(frame);
        let text = next_line(&mut lines, 0)?;
        let head = read_head(&text)?;
        Ok(Self { lines, head, counts: End::default(), rank: 0, line: 1, done: false })
    }

    /// What holds for the whole backup.
    pub fn head(&self) -> &Head {
        &self.head
    }

    fn read_line(&mut self) -> Result<Line, ManifestDamage> {
        let text = next_line(&mut self.lines, self.line)?;
        self.line += 1;
        let line: Line = serde_json::from_slice(&text)
            .map_err(|error| ManifestDamage::Line { line: self.line, reason: error.to_string() })?;
        let order = |reason| ManifestDamage::Order { line: self.line, reason };
        match &line {
            Line::Head(_) => return Err(order("a second head")),
            Line::File(file) => file.check_layers()?,
            Line::End(end) if *end != self.counts => return Err(ManifestDamage::Counts),
            _ => {}
        }
        if line.rank() < self.rank {
            return Err(order("kinds come as head, tablespace, directory, link, pack, file, end"));
        }
        self.rank = line.rank();
        self.counts.count(&line);
        if matches!(line, Line::End(_)) {
            self.check_end()?;
        }
        Ok(line)
    }

    /// Nothing may come after the last line, and reading on is what compares the frame's checksum.
    fn check_end(&mut self) -> Result<(), ManifestDamage> {
        let (line, mut rest) = (self.line, [0; 1]);
        match self.lines.read(&mut rest) {
            Ok(0) => Ok(()),
            Ok(_) => Err(ManifestDamage::Order { line: line + 1, reason: "the end was before" }),
            Err(error) => Err(ManifestDamage::Compression { line, reason: error.to_string() }),
        }
    }
}

impl<R: Read> Iterator for ManifestReader<R> {
    type Item = Result<Line, ManifestDamage>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let line = self.read_line();
        self.done = matches!(line, Err(_) | Ok(Line::End(_)));
        Some(line)
    }
}

fn next_line(lines: &mut impl BufRead, before: u64) -> Result<Vec<u8>, ManifestDamage> {
    let mut text = Vec::new();
    let read = lines.take(LINE_LIMIT_BYTES).read_until(b'\n', &mut text);
    read.map_err(|error| ManifestDamage::Compression { line: before, reason: error.to_string() })?;
    match text.pop() {
        Some(b'\n') => Ok(text),
        None => Err(ManifestDamage::Order { line: before + 1, reason: "the end is missing" }),
        Some(_) => Err(ManifestDamage::Line { line: before + 1, reason: "it has no end".to_owned() }),
    }
}

fn read_head(text: &[u8]) -> Result<Head, ManifestDamage> {
    #[derive(Deserialize)]
    struct Versions {
        line: String,
        format: u32,
        #[serde(default)]
        critical: Vec<String>,
    }
    let malformed = |error: serde_json::Error| ManifestDamage::Line { line: 1, reason: error.to_string() };
    let versions: Versions = serde_json::from_slice(text).map_err(malformed)?;
    if versions.line != "head" {
        return Err(ManifestDamage::Order { line: 1, reason: "the head comes first" });
    }
    if versions.format != FORMAT {
        return Err(ManifestDamage::Newer { what: format!("format {}", versions.format) });
    }
    if let Some(field) = versions.critical.iter().find(|field| !UNDERSTOOD.contains(&field.as_str())) {
        return Err(ManifestDamage::Newer { what: format!("field {field:?}") });
    }
    match serde_json::from_slice(text).map_err(malformed)? {
        Line::Head(head) => Ok(*head),
        _ => Err(ManifestDamage::Order { line: 1, reason: "the head comes first" }),
    }
}
