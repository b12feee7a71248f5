//! Whether a backup in a store is whole.

use std::collections::BTreeMap;
use std::path::Path;

use super::manifest::{Line, Pack};
use super::pack::{PackDamage, verify_pack};
use super::{BackupError, PACK_LIMIT_BYTES, fetch_manifest};
use crate::key::{self, ObjectKey, ParsedKey};
use crate::name::{BackupId, ClusterName};
use crate::root::RootBackup;
use crate::store::{self, ObjectStore};

/// Most objects of one backup that are listed: 64 TiB in packs of 16 MiB.
const PACKS_LIMIT: usize = 4 * 1024 * 1024;

/// How thoroughly to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyDepth {
    /// The manifest, and that every pack is there with its size. Costs little; right before publishing.
    Presence,
    /// Also every byte of its own packs, not of older backups'. Right after copying it; memory is one pack.
    OwnContent,
    /// Also every byte of every pack. Reads the whole backup; memory is one pack.
    Content,
}

/// What was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Files in the manifest.
    pub files: u64,
    /// Packs that are there, older backups' included.
    pub packs: u64,
    /// Bytes of packs that are there; all of them were read at [`VerifyDepth::Content`].
    pub pack_bytes: u64,
}

/// Checks a backup in one store, with the packs of older backups that it refers to. The first thing that is wrong is the
/// error.
///
/// `scratch` is a directory for the manifest. That the layers of every file hold all of it is checked at both depths, by
/// what the manifest says. Checksums of whole files are compared by a restore, not here: at [`VerifyDepth::Content`]
/// every frame, every pack and the manifest match their digests.
pub async fn verify(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    backup: &RootBackup,
    depth: VerifyDepth,
    scratch: &Path,
) -> Result<VerifyReport, BackupError> {
    let manifest_key = key::manifest(cluster, &backup.backup);
    let broken = |damage| BackupError::Manifest { store: store.name().clone(), key: manifest_key.clone(), damage };
    let mut report = VerifyReport::default();
    let mut present = Present { store, cluster, backup: None, sizes: BTreeMap::new() };
    for line in fetch_manifest(store, cluster, backup, scratch).await? {
        match line.map_err(broken)? {
            Line::Pack(pack) => {
                let owner = pack.backup.unwrap_or(backup.backup);
                let found = present.size(&owner, pack.number).await?;
                check_pack(store, key::pack(cluster, &owner, pack.number), &pack, found, depth).await?;
                report.packs += 1;
                report.pack_bytes += pack.size;
            }
            Line::File(_) => report.files += 1,
            _ => {}
        }
    }
    Ok(report)
}

/// Sizes of the packs in a store, listed one backup at a time: manifests list packs by backup.
struct Present<'a> {
    store: &'a dyn ObjectStore,
    cluster: &'a ClusterName,
    backup: Option<BackupId>,
    sizes: BTreeMap<u32, u64>,
}

impl Present<'_> {
    async fn size(&mut self, backup: &BackupId, number: u32) -> Result<Option<u64>, BackupError> {
        if self.backup != Some(*backup) {
            let prefix = key::backup_prefix(self.cluster, backup);
            let (mut sizes, store) = (BTreeMap::new(), self.store);
            let note = |entry: store::ObjectEntry| {
                if let Ok(ParsedKey::Pack { number, .. }) = entry.key.parsed() {
                    sizes.insert(number, entry.size);
                }
            };
            store::list_each(store, &prefix, PACKS_LIMIT, note).await?;
            self.sizes = sizes;
            self.backup = Some(*backup);
        }
        Ok(self.sizes.get(&number).copied())
    }
}

async fn check_pack(
    store: &dyn ObjectStore,
    key: ObjectKey,
    pack: &Pack,
    found: Option<u64>,
    depth: VerifyDepth,
) -> Result<(), BackupError> {
    let damaged = |damage| BackupError::Pack { store: store.name().clone(), key: key.clone(), damage };
    match found {
        None => return Err(store::StoreError::NotFound { store: store.name().clone(), key: key.clone() }.into()),
        Some(found) if found != pack.size => {
            return Err(damaged(PackDamage::Size { found, expected: pack.size }));
        }
        Some(_) => {}
    }
    match depth {
        VerifyDepth::Presence => return Ok(()),
        VerifyDepth::OwnContent if pack.backup.is_some() => return Ok(()),
        VerifyDepth::OwnContent | VerifyDepth::Content => {}
    }
    let stream = store.get(&key, store::ByteRange::All).await?;
    let bytes = store::collect(stream, PACK_LIMIT_BYTES).await?;
    verify_pack(&bytes, &mut |_| Ok(())).map_err(damaged)?;
    match crate::digest::sha256(&bytes) == pack.sha256 {
        true => Ok(()),
        false => Err(damaged(PackDamage::Digest)),
    }
}
