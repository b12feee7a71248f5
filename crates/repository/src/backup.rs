//! Base backups: packs full of compressed frames, and a manifest that says which frames make up which file.
//!
//! A file's content may lie in the packs of several backups, layer over layer: what did not change since an older backup
//! is not stored again. Each manifest lists all of them, so that every backup is restored alone.
//!
//! Promises kept here:
//! * packs and manifests are written once, and their names are never used again;
//! * no byte is handed on that was not verified: frames by their digest, packs and manifests by theirs, files by the
//!   checksum in the manifest (which whoever restores must compare);
//! * memory is bounded by the size of a pack, whatever the size of the cluster.
//!
//! A manifest does not make a backup exist; a root commit that names it does (see `root.rs`). Reading a data directory
//! and writing one are not done here.

pub mod covered;
pub mod manifest;
pub mod note;
pub mod origin;
pub mod pack;
mod spool;
mod transfer;
mod verify;

pub use spool::EntrySpool;
use transfer::fetch_manifest_unnamed;
pub use transfer::{PACK_LIMIT_BYTES, fetch_manifest, fetch_manifest_file, fetch_table, put, read_frames};
pub use verify::{VerifyDepth, VerifyReport, verify};

use std::io;

use crate::key::ObjectKey;
use crate::name::StoreName;
use crate::root::RootBackup;
use crate::store::{Remedy, StoreError};
use manifest::{Head, ManifestDamage, ManifestSummary};
use pack::PackDamage;

/// Why an object of a backup could not be made, stored or read.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A store failed.
    #[error("a store failed")]
    Store(#[source] StoreError),
    /// Another content has the name, which must never happen: names of backups are never used twice.
    #[error("store {store}: object {key} exists with other content: abandon this backup and take a new one")]
    Conflict {
        /// Which store.
        store: StoreName,
        /// Which object.
        key: ObjectKey,
    },
    /// A pack is not what was stored.
    #[error("store {store}: object {key} is damaged: {damage}")]
    Pack {
        /// Which store.
        store: StoreName,
        /// Which pack.
        key: ObjectKey,
        /// What is wrong with it.
        damage: PackDamage,
    },
    /// A manifest is not what was published.
    #[error("store {store}: object {key} is damaged: {damage}")]
    Manifest {
        /// Which store.
        store: StoreName,
        /// Which manifest.
        key: ObjectKey,
        /// What is wrong with it.
        damage: ManifestDamage,
    },
    /// A local file could not be written or read.
    #[error("a local file failed")]
    Local(#[source] io::Error),
}

impl BackupError {
    /// What helps.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Store(error) => error.remedy(),
            Self::Conflict { .. } => Remedy::Conflict,
            Self::Pack { .. } | Self::Manifest { .. } => Remedy::Corrupt,
            Self::Local(_) => Remedy::Operator,
        }
    }
}

impl From<StoreError> for BackupError {
    fn from(error: StoreError) -> Self {
        // A store error says which store and which object; there is nothing to add.
        Self::Store(error)
    }
}

/// The entry by which a root names a backup. It repeats what the manifest's head says, so that a backup can be chosen
/// without reading manifests.
pub fn entry(head: &Head, manifest: &ManifestSummary) -> RootBackup {
    let counts = manifest.counts;
    RootBackup {
        backup: head.backup,
        backup_type: head.backup_type,
        parent: head.parent,
        changes: head.changes.clone(),
        manifest_sha256: manifest.sha256,
        manifest_size: manifest.size,
        system_identifier: head.system_identifier,
        postgres_major: head.postgres_major,
        segment_size_bytes: head.segment_size_bytes,
        start_timeline: head.start_timeline,
        start_lsn: head.start_lsn,
        start_time: head.start_time,
        stop_timeline: head.stop_timeline,
        stop_lsn: head.stop_lsn,
        stop_time: head.stop_time,
        min_recovery_point: head.min_recovery_point,
        start_next_xid: head.start_next_xid,
        stop_next_xid: head.stop_next_xid,
        last_commit_time: head.last_commit_time,
        node: head.node.clone(),
        from_standby: head.from_standby,
        primary: head.primary.clone(),
        label: head.label.clone(),
        files: counts.files,
        data_bytes: counts.data_bytes,
        stored_bytes: counts.pack_bytes.saturating_add(manifest.size),
        inherited_bytes: counts.inherited_pack_bytes,
        attempts: head.attempts.clone(),
        packs: u32::try_from(counts.packs).unwrap_or(u32::MAX),
        page_errors: head.page_errors,
        wal_witnesses: head.wal_witnesses.clone(),
        warnings: head.warnings.clone(),
        unknown: Default::default(),
    }
}

#[cfg(test)]
mod tests;
