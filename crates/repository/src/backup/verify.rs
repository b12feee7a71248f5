//! Whether a backup in a store is whole.

use std::collections::BTreeMap;
use std::path::Path;

use super::manifest::{Line, ManifestDamage};
use super::pack::{PackDamage, verify_pack};
use super::{BackupError, PACK_LIMIT_BYTES, fetch_manifest};
use crate::key;
use crate::name::ClusterName;
use crate::root::RootBackup;
use crate::store::{self, ObjectStore};

/// How thoroughly to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyDepth {
    /// The manifest, and that every pack is there with its size. Costs little; right before publishing.
    Presence,
    /// Also every byte of every pack. Reads the whole backup; memory is one pack.
    Content,
}

/// What was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Files in the manifest.
    pub files: u64,
    /// Packs that are there.
    pub packs: u64,
    /// Bytes of packs that are there; all of them were read at [`VerifyDepth::Content`].
    pub pack_bytes: u64,
}

/// Checks a backup in one store. The first thing that is wrong is the error.
///
/// `scratch` is a directory for the manifest. Checksums of whole files are compared by a restore, not here: at
/// [`VerifyDepth::Content`] every frame, every pack and the manifest match their digests.
pub async fn verify(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    backup: &RootBackup,
    depth: VerifyDepth,
    scratch: &Path,
) -> Result<VerifyReport, BackupError> {
    let manifest_key = key::manifest(cluster, &backup.backup);
    let broken = |damage| BackupError::Manifest { store: store.name().clone(), key: manifest_key.clone(), damage };
    let present = present_packs(store, cluster, backup).await?;
    let mut report = VerifyReport::default();
    let mut packs = BTreeMap::new();
    for line in fetch_manifest(store, cluster, backup, scratch).await? {
        match line.map_err(broken)? {
            Line::Pack(pack) => {
                check_pack(store, cluster, backup, &pack, &present, depth).await?;
                report.packs += 1;
                report.pack_bytes += pack.size;
                packs.insert(pack.number, pack.size);
            }
            Line::File(file) => {
                report.files += 1;
                let own = file.layers.iter().filter(|layer| layer.backup.is_none());
                for extent in own.flat_map(|layer| &layer.extents) {
                    let end = extent.offset.saturating_add(extent.length);
                    if packs.get(&extent.pack).is_none_or(|size| end > *size) {
                        let (path, at) = (file.path.to_string(), extent.from);
                        return Err(broken(ManifestDamage::Extents { path, at }));
                    }
                }
            }
            _ => {}
        }
    }
    Ok(report)
}

async fn present_packs(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    backup: &RootBackup,
) -> Result<BTreeMap<String, u64>, BackupError> {
    let limit = backup.packs as usize + 2 * store::LIST_LIMIT;
    let listed = store::list_all(store, &key::backup_prefix(cluster, &backup.backup), limit).await?;
    Ok(listed.into_iter().map(|entry| (entry.key.to_string(), entry.size)).collect())
}

async fn check_pack(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    backup: &RootBackup,
    pack: &super::manifest::Pack,
    present: &BTreeMap<String, u64>,
    depth: VerifyDepth,
) -> Result<(), BackupError> {
    let key = key::pack(cluster, &backup.backup, pack.number);
    let damaged = |damage| BackupError::Pack { store: store.name().clone(), key: key.clone(), damage };
    match present.get(key.as_str()) {
        None => return Err(store::StoreError::NotFound { store: store.name().clone(), key: key.clone() }.into()),
        Some(found) if *found != pack.size => {
            return Err(damaged(PackDamage::Size { found: *found, expected: pack.size }));
        }
        Some(_) => {}
    }
    if depth == VerifyDepth::Presence {
        return Ok(());
    }
    let stream = store.get(&key, store::ByteRange::All).await?;
    let bytes = store::collect(stream, PACK_LIMIT_BYTES).await?;
    verify_pack(&bytes, &mut |_| Ok(())).map_err(damaged)?;
    match crate::digest::sha256(&bytes) == pack.sha256 {
        true => Ok(()),
        false => Err(damaged(PackDamage::Digest)),
    }
}
