//! The lines of a manifest.

use std::collections::BTreeMap;

use jiff::Timestamp;
use postgres_format::{FullTransactionId, Lsn, SystemIdentifier, Timeline};
use serde::{Deserialize, Serialize};

use super::FORMAT;
use crate::backup::origin::{BackupType, ChangeSource};
use crate::backup::pack::{Extent, FileNumber};
use crate::byte_text::{ByteText, RelativePath};
use crate::name::{BackupId, ClusterName, NodeName};
use crate::witness::WalWitness;

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
    /// How much was read and stored anew.
    #[serde(rename = "type", default)]
    pub backup_type: BackupType,
    /// The backup it was built on. It need not exist any more: nothing is followed through it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// How it was found what had changed since the parent; absent of a full backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<ChangeSource>,
    /// The cluster's name in the fleet.
    pub cluster: ClusterName,
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The node whose files were read.
    pub node: NodeName,
    /// Whether that node was a standby that started and stopped the backup itself.
    pub from_standby: bool,
    /// Of a hybrid backup, for which nearly all of a standby's files were read: the primary that started and stopped it, and
    /// whose are the other files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<NodeName>,
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
    /// Whether `wal_log_hints` was on: with it, or with checksums, a page's LSN tells of every change.
    #[serde(default)]
    pub wal_log_hints: bool,
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
    /// Of a backup from a standby: time of the newest commit or abort that it had replayed when it had ended; absent if it
    /// was not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_commit_time: Option<Timestamp>,
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
    /// Backups whose packs are referred to, besides this one, in the order in which they were made: the oldest first.
    /// Identifiers do not tell that order, because clocks may be wrong. Layers of every file follow it.
    #[serde(default)]
    pub references: Vec<BackupId>,
    /// Those of them that never were backups: unfinished ones that this one went on from, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<BackupId>,
    /// How many pages were found corrupt.
    pub page_errors: u64,
    /// Stretches of WAL as the server has them whose files were read, see [`crate::witness`]. Without any, nothing proves
    /// that the WAL is its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wal_witnesses: Vec<WalWitness>,
    /// What deserves a look though the backup is good, a line each; at most [`crate::root::WARNING_LIMIT`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The first of them, at most [`super::PAGE_ERROR_LIMIT`].
    #[serde(default)]
    pub page_error_list: Vec<PageError>,
    /// The databases when the backup ended, so that one can be restored by its name; empty if that was not asked, or if
    /// there were more than [`super::DATABASE_LIMIT`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub databases: Vec<Database>,
    /// Where `pg_wal` led if it was a link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_directory: Option<ByteText>,
    /// What newer versions added.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

impl Head {
    /// The format that this version writes.
    pub const FORMAT: u32 = FORMAT;
}

/// A database of the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Database {
    /// Its object identifier, which is the name of its directories.
    pub oid: u32,
    /// Its name.
    pub name: ByteText,
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
    /// Whether it led to a directory, the contents of which are not in the backup.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub directory: bool,
}

/// A pack that files refer to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pack {
    /// The backup it belongs to; absent for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupId>,
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
    /// Its number within the backup, which its frames carry. Files come in the order of their numbers.
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
    /// CRC-32C of its content; absent if that was not read as a whole, which takes several layers or a file cut short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crc32c: Option<u32>,
    /// Where its content is, newest layer first. None for an empty file.
    pub layers: Vec<Layer>,
}

/// Part of a file's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The backup whose packs hold it; absent for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupId>,
    /// The file's number in that backup, which the frames carry; absent if it is [`File::number`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<FileNumber>,
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
    /// Pack lines of this backup's own packs.
    pub packs: u64,
    /// Bytes in those packs.
    pub pack_bytes: u64,
    /// Pack lines of older backups' packs.
    #[serde(default)]
    pub inherited_packs: u64,
    /// Bytes in those packs.
    #[serde(default)]
    pub inherited_pack_bytes: u64,
    /// File lines.
    pub files: u64,
    /// Bytes in those files.
    pub data_bytes: u64,
}

impl Line {
    /// Kinds come in ascending rank.
    pub(super) fn rank(&self) -> u8 {
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
    pub(super) fn count(&mut self, line: &Line) {
        match line {
            Line::Head(_) | Line::End(_) => {}
            Line::Tablespace(_) => self.tablespaces += 1,
            Line::Directory(_) => self.directories += 1,
            Line::Link(_) => self.links += 1,
            Line::Pack(pack) => {
                let (packs, bytes) = match pack.backup {
                    None => (&mut self.packs, &mut self.pack_bytes),
                    Some(_) => (&mut self.inherited_packs, &mut self.inherited_pack_bytes),
                };
                *packs += 1;
                *bytes = bytes.saturating_add(pack.size);
            }
            Line::File(file) => {
                self.files += 1;
                self.data_bytes = self.data_bytes.saturating_add(file.size);
            }
        }
    }
}
