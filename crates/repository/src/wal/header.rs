//! The header of a WAL object.
//!
//! ```text
//! "PGCVWAL1" | u32 LE length of the JSON | JSON, padded with spaces | u32 LE CRC-32C of all before | zstd frames | changes
//! ```
//!
//! The JSON is padded so that the header of today's objects is exactly [`HEADER_BYTES`] long: the frames can then be
//! written before the digests that go into the header are known, and nothing is copied to make room. A reader takes
//! any length up to [`HEADER_LIMIT_BYTES`].

use jiff::Timestamp;
use postgres_format::{Lsn, SegmentSize, SystemIdentifier, WalFileName};
use serde::{Deserialize, Serialize};

use crate::fingerprint::Fingerprint;
use crate::key::{self, ObjectKey, ParsedKey};
use crate::name::{ClusterName, NodeName};

/// First bytes of every WAL object.
pub(super) const MAGIC: &[u8; 8] = b"PGCVWAL1";
/// Magic and length before the JSON, in bytes.
const BEFORE_JSON_BYTES: usize = 12;
/// Checksum after the JSON, in bytes.
const AFTER_JSON_BYTES: usize = 4;
/// Length of the header that this version writes, in bytes.
pub const HEADER_BYTES: usize = 1024;
/// Longest header that is read, in bytes.
pub const HEADER_LIMIT_BYTES: usize = 16 * 1024;
/// The format that this version writes and reads.
const FORMAT: u32 = 1;
/// Names that may stand in `critical`; all other names there are refused.
const UNDERSTOOD: &[&str] = &[];

/// How the content follows the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Encoding {
    /// Zstandard frames, each of at most 1 MiB of content and with its content size in the frame header.
    #[serde(rename = "zstd")]
    Zstd,
}

/// What a WAL object says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalHeader {
    /// Version of the object's layout; 1.
    pub format: u32,
    /// Names of fields without which the object must not be interpreted; a reader refuses names it does not know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub critical: Vec<String>,
    /// The cluster's name in the fleet.
    pub cluster: ClusterName,
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The file's name in `pg_wal`.
    pub name: WalFileName,
    /// The node that sent it.
    pub node: NodeName,
    /// Whether the node was in recovery when it read the file.
    pub in_recovery: bool,
    /// Whether the file is complete: a segment that is full or ended by a switch, or a file of another kind.
    pub complete: bool,
    /// Where the WAL in it ends; absent for files without WAL and for versions that cannot be interpreted.
    pub logical_end: Option<Lsn>,
    /// Length of the file in bytes.
    pub size: u64,
    /// SHA-256 of the file.
    #[serde(with = "crate::digest::hex")]
    pub sha256: [u8; 32],
    /// How the content follows.
    pub encoding: Encoding,
    /// Length of the frames that follow the header, in bytes.
    pub frames_size: u64,
    /// SHA-256 of those frames.
    #[serde(with = "crate::digest::hex")]
    pub frames_sha256: [u8; 32],
    /// What follows the frames: what the WAL in the file changed. Absent if nothing follows them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<ChangesPart>,
    /// Why it is not told what the WAL in a segment changed, if its sender could not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes_doubt: Option<String>,
    /// PostgreSQL's major version, if it is known.
    pub postgres_major: Option<u32>,
    /// Time of the first commit or abort in it.
    pub first_commit_time: Option<Timestamp>,
    /// Time of the last commit or abort in it.
    pub last_commit_time: Option<Timestamp>,
    /// When it was encoded, by the sending node's clock.
    pub written: Timestamp,
}

/// The part of an object that tells what the WAL in it changed; see [`super::read_changes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangesPart {
    /// Its length in bytes.
    pub size: u64,
    /// Its SHA-256.
    #[serde(with = "crate::digest::hex")]
    pub sha256: [u8; 32],
}

impl WalHeader {
    /// The format of headers this version makes.
    pub(super) const FORMAT: u32 = FORMAT;

    /// Reads the header at the start of an object. Gives it and its length in bytes, where the frames begin.
    ///
    /// [`Damage::HeaderShort`] says that more bytes are needed, which never happens with [`HEADER_LIMIT_BYTES`] of
    /// them or with the whole object, unless it is damaged.
    pub fn read(bytes: &[u8]) -> Result<(Self, usize), Damage> {
        let length = Self::length(bytes)?.ok_or(Damage::HeaderShort)?;
        let header = bytes.get(..length).ok_or(Damage::HeaderShort)?;
        let (checked, checksum) = header.split_at(length - AFTER_JSON_BYTES);
        if crc32c::crc32c(checked).to_le_bytes() != checksum {
            return Err(Damage::HeaderChecksum);
        }
        let header: Self = serde_json::from_slice(&checked[BEFORE_JSON_BYTES..])
            .map_err(|error| Damage::HeaderText { reason: error.to_string() })?;
        if header.format != FORMAT {
            return Err(Damage::UnknownFormat { found: header.format });
        }
        if let Some(field) = header.critical.iter().find(|field| !UNDERSTOOD.contains(&field.as_str())) {
            return Err(Damage::UnknownCritical { field: field.clone() });
        }
        Ok((header, length))
    }

    /// Length of the header that starts with these bytes; `None` if it takes more of them to tell.
    pub(super) fn length(bytes: &[u8]) -> Result<Option<usize>, Damage> {
        let seen = bytes.len().min(MAGIC.len());
        if bytes[..seen] != MAGIC[..seen] {
            return Err(Damage::Magic);
        }
        let Some(length) = bytes.get(MAGIC.len()..BEFORE_JSON_BYTES) else {
            return Ok(None);
        };
        let json = u32::from_le_bytes(length.try_into().expect("the slice has four bytes")) as usize;
        let whole = json.saturating_add(BEFORE_JSON_BYTES + AFTER_JSON_BYTES);
        if whole > HEADER_LIMIT_BYTES {
            return Err(Damage::HeaderLength { found: whole as u64 });
        }
        Ok(Some(whole))
    }

    /// The header as [`HEADER_BYTES`] bytes.
    pub(super) fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        const JSON_BYTES: usize = HEADER_BYTES - BEFORE_JSON_BYTES - AFTER_JSON_BYTES;
        let json = serde_json::to_vec(self).expect("a header has only text keys and plain values");
        assert!(json.len() <= JSON_BYTES, "names are bounded, so a header cannot outgrow its room");
        let mut bytes = [b' '; HEADER_BYTES];
        bytes[..MAGIC.len()].copy_from_slice(MAGIC);
        bytes[MAGIC.len()..BEFORE_JSON_BYTES].copy_from_slice(&(JSON_BYTES as u32).to_le_bytes());
        bytes[BEFORE_JSON_BYTES..BEFORE_JSON_BYTES + json.len()].copy_from_slice(&json);
        let checked = HEADER_BYTES - AFTER_JSON_BYTES;
        let checksum = crc32c::crc32c(&bytes[..checked]);
        bytes[checked..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The key under which the object lies.
    pub fn key(&self) -> ObjectKey {
        key::wal(&self.cluster, self.system_identifier, &self.name, &self.fingerprint())
    }

    /// What tells this content from others of the same name.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of_sha256(&self.sha256)
    }

    /// Length of what follows the frames, in bytes.
    pub(super) fn changes_size(&self) -> u64 {
        self.changes.map_or(0, |changes| changes.size)
    }

    /// Whether an object with this header can have so many bytes behind it. What is missing at its very end is
    /// missed by those who want to know what the WAL changed, and by nobody else.
    pub(super) fn check_rest(&self, found: u64) -> Result<(), Damage> {
        let expected = self.frames_size.saturating_add(self.changes_size());
        match found {
            _ if found < self.frames_size => Err(Damage::Truncated { found, expected: self.frames_size }),
            _ if found > expected => Err(Damage::Trailing { expected }),
            _ => Ok(()),
        }
    }

    /// How many bytes of the file are WAL. `None` if it is no segment, or if its end lies outside of it.
    pub(super) fn wal_bytes(&self) -> Option<u64> {
        let size = SegmentSize::from_bytes(self.size).ok()?;
        let start = self.name.segment()?.number(size).ok()?.start(size);
        let bytes = self.logical_end?.as_u64().checked_sub(start.as_u64())?;
        (bytes <= self.size).then_some(bytes)
    }
}

/// What an object must say about itself to be taken for what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// The cluster's name in the fleet.
    pub cluster: ClusterName,
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The file's name.
    pub name: WalFileName,
    /// What the key says about the content; a history file's key says nothing.
    pub fingerprint: Option<Fingerprint>,
}

impl Expected {
    /// What the key of an object promises. `None` if no WAL object lies under such a key.
    pub fn under(key: &ObjectKey) -> Option<Self> {
        match key.parsed().ok()? {
            ParsedKey::Wal { cluster, system_identifier, name, fingerprint }
            | ParsedKey::Conflict { cluster, system_identifier, name, fingerprint } => {
                Some(Self { cluster, system_identifier, name, fingerprint: Some(fingerprint) })
            }
            ParsedKey::History { cluster, system_identifier, timeline } => {
                let name = WalFileName::History(timeline);
                Some(Self { cluster, system_identifier, name, fingerprint: None })
            }
            _ => None,
        }
    }

    /// Compares.
    pub fn check(&self, header: &WalHeader) -> Result<(), Damage> {
        let differ = |field, found: String, expected: String| Err(Damage::Identity { field, found, expected });
        if header.cluster != self.cluster {
            return differ("cluster", header.cluster.to_string(), self.cluster.to_string());
        }
        if header.system_identifier != self.system_identifier {
            let (found, expected) = (header.system_identifier.to_string(), self.system_identifier.to_string());
            return differ("system identifier", found, expected);
        }
        if header.name != self.name {
            return differ("name", header.name.to_string(), self.name.to_string());
        }
        match self.fingerprint {
            Some(expected) if header.fingerprint() != expected => {
                differ("fingerprint", header.fingerprint().to_string(), expected.to_string())
            }
            _ => Ok(()),
        }
    }
}

/// What is wrong with the bytes of a WAL object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// It does not begin as WAL objects do.
    #[error("it does not begin with PGCVWAL1")]
    Magic,
    /// It ends within its header.
    #[error("it ends within its header")]
    HeaderShort,
    /// The header claims an impossible length.
    #[error("its header claims {found} bytes, and {HEADER_LIMIT_BYTES} are the limit")]
    HeaderLength {
        /// The claim, in bytes.
        found: u64,
    },
    /// The header was changed.
    #[error("its header does not match its checksum")]
    HeaderChecksum,
    /// The header is whole, but no header of ours.
    #[error("its header cannot be read: {reason}")]
    HeaderText {
        /// What the JSON reader said.
        reason: String,
    },
    /// A newer version wrote it.
    #[error("its format is {found}, and this version reads 1: a newer pgconvoy is needed")]
    UnknownFormat {
        /// The format it has.
        found: u32,
    },
    /// A newer version wrote it.
    #[error("it cannot be read without understanding {field:?}: a newer pgconvoy is needed")]
    UnknownCritical {
        /// The unknown name.
        field: String,
    },
    /// It is not the object that its key promises.
    #[error("its {field} is {found}, expected {expected}")]
    Identity {
        /// What differs.
        field: &'static str,
        /// What the object says.
        found: String,
        /// What was asked for.
        expected: String,
    },
    /// Bytes are missing at the end.
    #[error("it ends after {found} of {expected} bytes of frames")]
    Truncated {
        /// Bytes of frames it has.
        found: u64,
        /// Bytes of frames its header promises.
        expected: u64,
    },
    /// There are bytes after what the header promises.
    #[error("it has more than the {expected} bytes that its header promises behind itself")]
    Trailing {
        /// Bytes its header promises behind itself.
        expected: u64,
    },
    /// A frame does not decompress.
    #[error("the frame that begins with byte {content_offset} of the content cannot be decompressed")]
    Frame {
        /// Where in the decoded file, in bytes.
        content_offset: u64,
    },
    /// The frames hold more or less than the header promises.
    #[error("it holds {found} bytes of content, and its header promises {expected}")]
    ContentSize {
        /// Decoded bytes, as far as decoding went.
        found: u64,
        /// What the header promises.
        expected: u64,
    },
    /// The frames were changed.
    #[error("its frames do not match their SHA-256")]
    FramesDigest,
    /// What it tells of changes cannot be used; the file in it can.
    #[error("what it tells of changes cannot be used, the WAL itself is not concerned: {reason}")]
    Changes {
        /// Why.
        reason: String,
    },
    /// The decoded content is not what was encoded.
    #[error("its content does not match its SHA-256")]
    ContentDigest,
}
