//! Objects of backups in and out of stores.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use futures_util::TryStreamExt;
use sha2::{Digest, Sha256};

use super::BackupError;
use super::manifest::{Head, Line, ManifestDamage, ManifestReader, ManifestSummary};
use super::pack::{Frame, FrameReader, PackDamage, TableFrame, read_table, table_length};
use crate::key::{self, ObjectKey};
use crate::name::{BackupId, ClusterName};
use crate::root::RootBackup;
use crate::store::{self, Body, ByteRange, ObjectStore, Put};
use crate::wal::Stored;

/// Largest pack that is read as a whole, in bytes.
pub const PACK_LIMIT_BYTES: u64 = 256 * 1024 * 1024;

/// How much of a pack's end is asked for at first when its table is sought, in bytes. Tables of most packs are shorter.
const TAIL_BYTES: u64 = 128 * 1024;

/// Makes a pack or a manifest durable in a store. Repeating it is harmless, and right after an unknown outcome.
///
/// `sha256` is that of the body. An existing object is read and compared.
pub async fn put(
    store: &dyn ObjectStore,
    key: &ObjectKey,
    body: &Body,
    sha256: &[u8; 32],
) -> Result<Stored, BackupError> {
    if store.put_new(key, body.clone()).await? == Put::Created {
        return Ok(Stored::New);
    }
    let mut hash = Sha256::new();
    let mut stream = store.get(key, ByteRange::All).await?;
    while let Some(piece) = stream.try_next().await? {
        hash.update(&piece);
    }
    match <[u8; 32]>::from(hash.finalize()) == *sha256 {
        true => Ok(Stored::AlreadyStored),
        false => Err(BackupError::Conflict { store: store.name().clone(), key: key.clone() }),
    }
}

/// Fetches a backup's manifest, compares it with what the root says, and begins to read it.
///
/// It lies in an unnamed file in `scratch` meanwhile. An error of the reader is a [`ManifestDamage`] and cannot
/// happen unless a broken manifest was published.
pub async fn fetch_manifest(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    backup: &RootBackup,
    scratch: &Path,
) -> Result<ManifestReader<File>, BackupError> {
    let file = fetch_manifest_file(store, cluster, backup, scratch).await?;
    open_manifest(file, cluster, backup).map_err(|damage| damaged_manifest(store, cluster, backup, damage))
}

/// As [`fetch_manifest`], for callers who read it more than once: gives the file, at its beginning.
pub async fn fetch_manifest_file(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    backup: &RootBackup,
    scratch: &Path,
) -> Result<File, BackupError> {
    let key = key::manifest(cluster, &backup.backup);
    let damaged = |damage| damaged_manifest(store, cluster, backup, damage);
    let mut file = tempfile::tempfile_in(scratch).map_err(BackupError::Local)?;
    let (mut hash, mut size) = (Sha256::new(), 0u64);
    let mut stream = store.get(&key, ByteRange::All).await?;
    while let Some(piece) = stream.try_next().await? {
        hash.update(&piece);
        size += piece.len() as u64;
        if size > backup.manifest_size {
            return Err(damaged(ManifestDamage::Digest));
        }
        file.write_all(&piece).map_err(BackupError::Local)?;
    }
    if size != backup.manifest_size || <[u8; 32]>::from(hash.finalize()) != backup.manifest_sha256 {
        return Err(damaged(ManifestDamage::Digest));
    }
    file.seek(SeekFrom::Start(0)).map_err(BackupError::Local)?;
    open_manifest(file.try_clone().map_err(BackupError::Local)?, cluster, backup).map_err(damaged)?;
    file.seek(SeekFrom::Start(0)).map_err(BackupError::Local)?;
    Ok(file)
}

/// Reads the manifest of a backup that no root names yet, to its end: what it says of itself, and what it is as an object.
pub(super) async fn fetch_manifest_unnamed(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    id: &BackupId,
    scratch: &Path,
) -> Result<(Head, ManifestSummary), BackupError> {
    let key = key::manifest(cluster, id);
    let damaged = |damage| BackupError::Manifest { store: store.name().clone(), key: key.clone(), damage };
    let mut file = tempfile::tempfile_in(scratch).map_err(BackupError::Local)?;
    let (mut hash, mut size) = (Sha256::new(), 0u64);
    let mut stream = store.get(&key, ByteRange::All).await?;
    while let Some(piece) = stream.try_next().await? {
        hash.update(&piece);
        size += piece.len() as u64;
        file.write_all(&piece).map_err(BackupError::Local)?;
    }
    file.seek(SeekFrom::Start(0)).map_err(BackupError::Local)?;
    let mut lines = ManifestReader::new(file).map_err(damaged)?;
    let head = lines.head().clone();
    if head.backup != *id || head.cluster != *cluster {
        return Err(damaged(ManifestDamage::Newer { what: "a head about another backup".to_owned() }));
    }
    let mut counts = None;
    for line in &mut lines {
        if let Line::End(end) = line.map_err(damaged)? {
            counts = Some(end);
        }
    }
    let counts = counts.ok_or_else(|| damaged(ManifestDamage::Digest))?;
    Ok((head, ManifestSummary { size, sha256: hash.finalize().into(), counts }))
}

/// Begins to read a manifest, which must be about that backup.
fn open_manifest(
    file: File,
    cluster: &ClusterName,
    backup: &RootBackup,
) -> Result<ManifestReader<File>, ManifestDamage> {
    let reader = ManifestReader::new(file)?;
    let head = reader.head();
    if head.backup != backup.backup || head.cluster != *cluster || head.system_identifier != backup.system_identifier {
        return Err(ManifestDamage::Newer { what: "a head about another backup".to_owned() });
    }
    Ok(reader)
}

fn damaged_manifest(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    backup: &RootBackup,
    damage: ManifestDamage,
) -> BackupError {
    let key = key::manifest(cluster, &backup.backup);
    BackupError::Manifest { store: store.name().clone(), key, damage }
}

/// Reads the frames in a range of a pack and hands on each one verified, in order.
///
/// The range begins with a frame and ends after one: an [`super::pack::Extent`], or several that follow each other.
/// The sink's own failures are I/O errors and come back as [`BackupError::Local`].
pub async fn read_frames(
    store: &dyn ObjectStore,
    key: &ObjectKey,
    offset: u64,
    length: u64,
    sink: &mut (dyn FnMut(Frame<'_>) -> std::io::Result<()> + Send),
) -> Result<(), BackupError> {
    let failed = |failure| match failure {
        Failure::Damage(damage) => BackupError::Pack { store: store.name().clone(), key: key.clone(), damage },
        Failure::Sink(source) => BackupError::Local(source),
    };
    let mut reader = FrameReader::new(offset).map_err(BackupError::Local)?;
    let mut read = 0;
    let mut stream = store.get(key, ByteRange::Slice { offset, length }).await?;
    while let Some(piece) = stream.try_next().await? {
        read += piece.len() as u64;
        reader.push(&piece, &mut |frame| sink(frame).map_err(Failure::Sink)).map_err(failed)?;
    }
    if read != length {
        return Err(failed(Failure::Damage(PackDamage::Truncated { position: offset + read })));
    }
    reader.finish().map_err(|damage| failed(Failure::Damage(damage)))
}

/// Reads the table of a pack of that size: which frames it has, and the checksums of what they hold. One small request,
/// seldom two.
pub async fn fetch_table(
    store: &dyn ObjectStore,
    key: &ObjectKey,
    pack_bytes: u64,
) -> Result<Vec<TableFrame>, BackupError> {
    let damaged = |damage| BackupError::Pack { store: store.name().clone(), key: key.clone(), damage };
    let mut wanted = TAIL_BYTES.min(pack_bytes);
    loop {
        let range = ByteRange::Slice { offset: pack_bytes - wanted, length: wanted };
        let tail = store::collect(store.get(key, range).await?, wanted).await?;
        if tail.len() as u64 != wanted {
            return Err(damaged(PackDamage::Truncated { position: pack_bytes - wanted + tail.len() as u64 }));
        }
        match table_length(&tail, pack_bytes).map_err(damaged)? {
            length if length > wanted => wanted = length,
            _ => return read_table(&tail, pack_bytes).map_err(damaged),
        }
    }
}

enum Failure {
    Damage(PackDamage),
    Sink(std::io::Error),
}

impl From<PackDamage> for Failure {
    fn from(damage: PackDamage) -> Self {
        Self::Damage(damage)
    }
}
