//! Looking at a store for what a plan is made from.
//!
//! Costs: one listing request for each identifier under which objects lie, one manifest for each backup that exists, and
//! the listing of the WAL. Memory is bounded by the number of identifiers and of ranges of packs that are referred to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use jiff::Timestamp;
use postgres_format::SystemIdentifier;

use super::References;
use crate::backup::manifest::{Line, ManifestDamage};
use crate::backup::{BackupError, fetch_manifest};
use crate::coverage::ArchivedWal;
use crate::key::{self, ParsedKey};
use crate::name::{BackupId, ClusterName};
use crate::root::{PackRange, Root, RootBackup};
use crate::store::{ObjectStore, StoreError};
use crate::wal::WalError;
use crate::wal_index;

/// Most identifiers under which objects may lie in one cluster.
const PREFIX_LIMIT: usize = 100_000;

/// Why a store could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// The store failed.
    #[error("a store failed")]
    Store(#[source] StoreError),
    /// Its WAL could not be looked at.
    #[error("the WAL of system {system} could not be looked at")]
    Wal {
        /// Which system.
        system: SystemIdentifier,
        /// Why.
        source: WalError,
    },
}

impl GatherError {
    /// What the store said, if it was the store.
    pub fn store_error(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) | Self::Wal { source: WalError::Store(error), .. } => Some(error),
            Self::Wal { .. } => None,
        }
    }
}

/// Identifiers under which objects lie, whether or not they are backups.
pub async fn prefixes(store: &dyn ObjectStore, cluster: &ClusterName) -> Result<BTreeSet<BackupId>, GatherError> {
    let prefix = key::backups_prefix(cluster);
    let mut found = BTreeSet::new();
    let mut after: Option<String> = None;
    while found.len() < PREFIX_LIMIT {
        let page = store.list(&prefix, after.as_deref(), 1).await.map_err(GatherError::Store)?;
        let Some(entry) = page.objects.first() else { break };
        after = Some(match entry.key.parsed() {
            Ok(
                ParsedKey::Manifest { backup, .. } | ParsedKey::Note { backup, .. } | ParsedKey::Pack { backup, .. },
            ) => {
                found.insert(backup);
                key::skip(&key::backup_prefix(cluster, &backup))
            }
            // Not ours to touch.
            _ => entry.key.to_string(),
        });
    }
    Ok(found)
}

/// What a backup refers to besides its own packs, by its manifest.
///
/// # Errors
/// When the store fails, or the manifest is not what the root says: then nobody knows what may be removed.
pub async fn gather_references(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    backup: &RootBackup,
    scratch: &Path,
) -> Result<References, BackupError> {
    let manifest = fetch_manifest(store, cluster, backup, scratch).await?;
    let key = key::manifest(cluster, &backup.backup);
    let broken =
        |damage: ManifestDamage| BackupError::Manifest { store: store.name().clone(), key: key.clone(), damage };
    let mut references: References = BTreeMap::new();
    for line in manifest {
        match line.map_err(broken)? {
            Line::Pack(pack) => {
                if let Some(other) = pack.backup.filter(|other| *other != backup.backup) {
                    extend(references.entry(other).or_default(), pack.number);
                }
            }
            // Every pack that a file refers to has its line before the files.
            Line::File(_) => break,
            _ => {}
        }
    }
    Ok(references)
}

/// Adds a number; cheapest in order.
fn extend(ranges: &mut Vec<PackRange>, number: u32) {
    match ranges.last_mut() {
        Some(last) if last.last.checked_add(1) == Some(number) => last.last = number,
        _ => ranges.push(PackRange { first: number, last: number }),
    }
}

/// The WAL of every system of a root without what was condemned already, and the newest commit that is known from it.
///
/// # Errors
/// When it cannot be looked at completely.
pub async fn gather_wal(
    store: &dyn ObjectStore,
    root: &Root,
) -> Result<(BTreeMap<SystemIdentifier, ArchivedWal>, Option<Timestamp>), GatherError> {
    let (mut wal, mut last_commit) = (BTreeMap::new(), None);
    for known in &root.systems {
        let system = known.system_identifier;
        let index = wal_index::load(store, &root.cluster, system).await;
        let mut index = index.map_err(|source| GatherError::Wal { system, source })?;
        index.trim(&known.wal_kept);
        last_commit = last_commit.max(index.commits.iter().map(|sample| sample.time).max());
        if let Some(archived) = index.wal {
            wal.insert(system, archived);
        }
    }
    Ok((wal, last_commit))
}
