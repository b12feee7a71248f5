//! Notes: what a backup that is under way says of the packs it has stored, so that a later attempt can go on from them if
//! this one does not come to its end.
//!
//! ```text
//! "PGCVNOT1" | SHA-256 of all that follows | one Zstandard frame of a JSON object, a Note
//! ```
//!
//! A note tells of packs that are durable already, and all that a later attempt must know to refer to them: what the attempt
//! was, and which pages of which relation files lie where. Each is whole in itself, so that nothing need be known of the
//! others. Packs that no note tells of are lost to later attempts, as are those in which corrupt pages were found, of which
//! none tells.
//!
//! Who only restores needs no notes, and once a root names the backup they have no meaning.

use std::collections::BTreeMap;
use std::io::Read;

use bytes::Bytes;
use jiff::Timestamp;
use postgres_format::{Lsn, SystemIdentifier, Timeline};
use serde::{Deserialize, Serialize};

use super::origin::BackupType;
use super::pack::{Extent, FileNumber};
use super::{BackupError, fetch_manifest_unnamed};
use crate::byte_text::RelativePath;
use crate::digest::sha256;
use crate::key::{self, ObjectKey, ParsedKey};
use crate::name::{BackupId, ClusterName, NodeName};
use crate::root::RootBackup;
use crate::store::{self, ObjectStore, StoreError};

const MAGIC: &[u8; 8] = b"PGCVNOT1";
const HEAD_BYTES: usize = MAGIC.len() + 32;
const FORMAT: u32 = 1;
const LEVEL: i32 = 3;
/// Longest note that is read, in bytes.
pub const NOTE_LIMIT_BYTES: u64 = 32 << 20;
/// Longest text of a note, in bytes.
const TEXT_LIMIT_BYTES: u64 = 256 << 20;
/// Most objects of one attempt that are listed.
const OBJECTS_LIMIT: usize = 4 << 20;

/// What an attempt at a backup was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// The identifier it would have had as a backup.
    pub backup: BackupId,
    /// What it was to be.
    #[serde(rename = "type")]
    pub backup_type: BackupType,
    /// The cluster's name in the fleet.
    pub cluster: ClusterName,
    /// Whose files it read.
    pub node: NodeName,
    /// Whether that was a standby.
    pub from_standby: bool,
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// PostgreSQL's major version.
    pub postgres_major: u32,
    /// Version of `pg_control`.
    pub control_version: u32,
    /// Version of the system catalogs.
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
    /// Where its recovery would have begun: WAL before it is in all its pages.
    pub start_lsn: Lsn,
    /// When it was started, by the server's clock.
    pub start_time: Timestamp,
}

/// A pack that is durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotedPack {
    /// Its number.
    pub number: u32,
    /// Its size in bytes.
    pub size: u64,
    /// SHA-256 of the object.
    #[serde(with = "crate::digest::hex")]
    pub sha256: [u8; 32],
    /// The highest LSN of a page in it that is not below the attempt's start; absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest_lsn: Option<Lsn>,
    /// Files of main forks of relations that it holds pages of. It may hold others.
    pub files: Vec<NotedFile>,
}

/// Pages of a file in a pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotedFile {
    /// Which file, below the data directory.
    pub path: RelativePath,
    /// Its number in the frames.
    pub number: FileNumber,
    /// Where they lie; all in this pack. Which pages a sparse one holds, the pack's table tells.
    pub extents: Vec<Extent>,
}

/// One note.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Version of its layout; 1.
    pub format: u32,
    /// Names of fields without which it must not be interpreted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub critical: Vec<String>,
    /// What the attempt is.
    pub attempt: Attempt,
    /// Packs that are durable.
    pub packs: Vec<NotedPack>,
    /// What newer versions added.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

/// Why a note cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoteDamage {
    /// It is no note, or cut off, or was changed.
    #[error("it is no note, or not whole")]
    Digest,
    /// It is whole, but cannot be read.
    #[error("it cannot be read: {reason}")]
    Text {
        /// What the reader said.
        reason: String,
    },
    /// A newer version wrote it.
    #[error("{what} is not understood")]
    Newer {
        /// What is new.
        what: String,
    },
}

#[derive(Deserialize)]
struct Versions {
    format: u32,
    #[serde(default)]
    critical: Vec<String>,
}

impl Note {
    /// About these packs.
    pub fn new(attempt: Attempt, packs: Vec<NotedPack>) -> Self {
        Self { format: FORMAT, critical: Vec::new(), attempt, packs, unknown: BTreeMap::new() }
    }

    /// The object.
    pub fn to_bytes(&self) -> Bytes {
        let text = serde_json::to_vec(self).expect("a note has only text keys and plain values");
        let frame = zstd::bulk::compress(&text, LEVEL).expect("compressing into memory cannot fail");
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&sha256(&frame));
        bytes.extend_from_slice(&frame);
        bytes.into()
    }

    /// Reads an object.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NoteDamage> {
        let (head, frame) = bytes.split_at_checked(HEAD_BYTES).ok_or(NoteDamage::Digest)?;
        if head[..MAGIC.len()] != *MAGIC || head[MAGIC.len()..] != sha256(frame) {
            return Err(NoteDamage::Digest);
        }
        let malformed = |reason: String| NoteDamage::Text { reason };
        let decoder = zstd::stream::read::Decoder::new(frame).map_err(|error| malformed(error.to_string()))?;
        let mut text = Vec::new();
        let read = decoder.take(TEXT_LIMIT_BYTES + 1).read_to_end(&mut text);
        match read {
            Ok(length) if length as u64 <= TEXT_LIMIT_BYTES => {}
            Ok(_) => return Err(malformed(format!("it has more than {TEXT_LIMIT_BYTES} bytes"))),
            Err(error) => return Err(malformed(error.to_string())),
        }
        let versions: Versions = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if versions.format != FORMAT {
            return Err(NoteDamage::Newer { what: format!("format {}", versions.format) });
        }
        if let Some(field) = versions.critical.first() {
            return Err(NoteDamage::Newer { what: format!("field {field:?}") });
        }
        serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))
    }
}

/// What lies in a store of an attempt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Left {
    /// Its notes, in order.
    pub notes: Vec<ObjectKey>,
    /// Its packs with their sizes.
    pub packs: BTreeMap<u32, u64>,
    /// Whether its manifest is there: then it lacks nothing but WAL, and is no attempt to go on from.
    pub manifest: bool,
}

/// Lists what lies in a store of an attempt.
///
/// # Errors
/// When the store fails.
pub async fn left_of(store: &dyn ObjectStore, cluster: &ClusterName, id: &BackupId) -> Result<Left, StoreError> {
    let mut left = Left::default();
    let take = |entry: store::ObjectEntry| match entry.key.parsed() {
        Ok(ParsedKey::Note { .. }) => left.notes.push(entry.key),
        Ok(ParsedKey::Pack { number, .. }) => drop(left.packs.insert(number, entry.size)),
        Ok(ParsedKey::Manifest { .. }) => left.manifest = true,
        _ => {}
    };
    store::list_each(store, &key::backup_prefix(cluster, id), OBJECTS_LIMIT, take).await?;
    Ok(left)
}

/// Reads one note; its attempt must be the one whose key it has.
///
/// # Errors
/// The store's, or what is wrong with it, as a line for people.
pub async fn read(store: &dyn ObjectStore, key: &ObjectKey) -> Result<Note, NoteError> {
    let bytes = store::read(store, key, NOTE_LIMIT_BYTES).await.map_err(NoteError::Store)?;
    let damaged = |damage| NoteError::Damaged { key: key.clone(), damage };
    let note = Note::from_bytes(&bytes.unwrap_or_default()).map_err(damaged)?;
    match key.parsed() {
        Ok(ParsedKey::Note { cluster, backup, .. })
            if cluster == note.attempt.cluster && backup == note.attempt.backup =>
        {
            Ok(note)
        }
        _ => Err(damaged(NoteDamage::Text { reason: format!("it is about {}", note.attempt.backup) })),
    }
}

/// Why a note was not read.
#[derive(Debug, thiserror::Error)]
pub enum NoteError {
    /// The store failed.
    #[error("a store failed")]
    Store(#[source] StoreError),
    /// It is not what was stored.
    #[error("object {key} is damaged: {damage}")]
    Damaged {
        /// Which note.
        key: ObjectKey,
        /// What is wrong with it.
        damage: NoteDamage,
    },
}

/// The entry of a backup that lacks nothing but its place in a root, made from its manifest in a store; `None` if there is no
/// manifest. Nothing but the manifest is looked at.
///
/// # Errors
/// When the store fails, or the manifest is not whole.
pub async fn unpublished(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    id: &BackupId,
    scratch: &std::path::Path,
) -> Result<Option<RootBackup>, BackupError> {
    if store.head(&key::manifest(cluster, id)).await?.is_none() {
        return Ok(None);
    }
    let (head, summary) = fetch_manifest_unnamed(store, cluster, id, scratch).await?;
    Ok(Some(super::entry(&head, &summary)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::memory::MemoryStore;

    fn note() -> Note {
        let attempt = Attempt {
            backup: "20261123T034138Z-7f3a9c21".parse().unwrap(),
            backup_type: BackupType::Full,
            cluster: "main".parse().unwrap(),
            node: "db1".parse().unwrap(),
            from_standby: false,
            system_identifier: SystemIdentifier::new(7),
            postgres_major: 15,
            control_version: 1300,
            catalog_version: 202_209_061,
            segment_size_bytes: 16 << 20,
            block_size: 8192,
            relation_segment_blocks: 131_072,
            checksum_version: 1,
            start_timeline: Timeline::FIRST,
            start_lsn: Lsn::new(0x28),
            start_time: Timestamp::UNIX_EPOCH,
        };
        let extent = Extent { pack: 4, offset: 8, length: 100, from: 0, to: 16384, pages: None };
        let file = NotedFile {
            path: RelativePath::new("base/5/16384").unwrap(),
            number: FileNumber(7),
            extents: vec![extent],
        };
        let pack = NotedPack { number: 4, size: 500, sha256: [3; 32], newest_lsn: None, files: vec![file] };
        Note::new(attempt, vec![pack])
    }

    #[test]
    fn a_note_comes_back_and_a_changed_one_does_not() {
        let note = note();
        let bytes = note.to_bytes();
        assert_eq!(Note::from_bytes(&bytes), Ok(note.clone()));
        for at in [0, 8, 39, 40, bytes.len() - 1] {
            let mut changed = bytes.to_vec();
            changed[at] ^= 1;
            assert_eq!(Note::from_bytes(&changed), Err(NoteDamage::Digest), "byte {at}");
        }
        assert_eq!(Note::from_bytes(&bytes[..bytes.len() - 1]), Err(NoteDamage::Digest));
        assert_eq!(Note::from_bytes(b""), Err(NoteDamage::Digest));
        let newer = Note { critical: vec!["encryption".to_owned()], ..note.clone() };
        assert!(matches!(Note::from_bytes(&newer.to_bytes()), Err(NoteDamage::Newer { .. })));
        let newer = Note { format: 2, ..note };
        assert!(matches!(Note::from_bytes(&newer.to_bytes()), Err(NoteDamage::Newer { .. })));
    }

    #[tokio::test]
    async fn what_an_attempt_left_is_found_by_its_prefix() {
        let (store, note) = (MemoryStore::new("one".parse().unwrap()), note());
        let (cluster, id) = (note.attempt.cluster.clone(), note.attempt.backup);
        assert_eq!(left_of(&store, &cluster, &id).await.unwrap(), Left::default());
        let key = key::note(&cluster, &id, 0);
        let _ = store.put_new(&key, note.to_bytes().into()).await.unwrap();
        let _ = store.put_new(&key::pack(&cluster, &id, 4), Bytes::from_static(b"pack").into()).await.unwrap();
        let left = left_of(&store, &cluster, &id).await.unwrap();
        assert_eq!(left, Left { notes: vec![key.clone()], packs: BTreeMap::from([(4, 4)]), manifest: false });
        assert_eq!(read(&store, &key).await.unwrap(), note);
        let other = key::note(&"other".parse().unwrap(), &id, 0);
        let _ = store.put_new(&other, note.to_bytes().into()).await.unwrap();
        assert!(matches!(read(&store, &other).await, Err(NoteError::Damaged { .. })));
        assert_eq!(unpublished(&store, &cluster, &id, &std::env::temp_dir()).await.unwrap(), None);
    }
}
