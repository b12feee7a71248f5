//! What a plan for one store is made from, gathered from the store and from what is known of the others.
//!
//! Nothing is concluded from silence: a store that does not answer counts with what it had when its root was read last, and
//! one of which nothing is known holds everything back.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use repository::name::{BackupId, ClusterName};
use repository::retention::{self, Facts, References};
use repository::root::{Root, RootBackup};
use repository::store::ObjectStore;

use crate::Coordinator;
use crate::catalog::backups as rows;
use crate::stores::{Slot, chain};

/// How long listing a store's WAL, or its backups, may take.
const LISTING_PATIENCE: Duration = Duration::from_secs(600);
/// How long reading one manifest may take.
const MANIFEST_PATIENCE: Duration = Duration::from_secs(300);

/// The packs of older backups that a backup refers to: from the catalog, else from its manifest, which never changes.
///
/// # Errors
/// The reason, for people.
pub async fn references(
    coordinator: &Coordinator,
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
) -> Result<References, String> {
    let manifest = repository::digest::to_hex(&entry.manifest_sha256);
    let wanted = manifest.clone();
    let known = coordinator.catalog.call(move |connection| rows::references(connection, &wanted)).await;
    if let Some(known) = known.map_err(|error| chain(&error))?
        && let Ok(references) = serde_json::from_str(&known)
    {
        return Ok(references);
    }
    let reading = retention::gather_references(store, cluster, entry, &coordinator.scratch);
    let read = in_time(MANIFEST_PATIENCE, "its manifest", reading).await?;
    let (named, backup) = (cluster.clone(), entry.backup);
    let json = serde_json::to_string(&read).expect("identifiers are text and ranges are numbers");
    coordinator
        .catalog
        .note(move |connection| rows::put_references(connection, &named, backup, &manifest, &json))
        .await;
    Ok(read)
}

/// Looks at one store. `roots` are those of all stores that answered, this one's among them.
///
/// # Errors
/// The reason, for people: then nothing is planned.
pub(super) async fn facts<'a>(
    coordinator: &Coordinator,
    slot: &'a Slot,
    root: &'a Root,
    roots: &[(Arc<Slot>, Root)],
) -> Result<Facts<'a>, String> {
    let store = &*slot.store;
    let cluster = &root.cluster;
    let (wal, last_commit) = in_time(LISTING_PATIENCE, "its WAL", retention::gather_wal(store, root)).await?;
    let leftovers = in_time(LISTING_PATIENCE, "its backups", retention::prefixes(store, cluster)).await?;
    let mut known = BTreeMap::new();
    for entry in &root.backups {
        match references(coordinator, store, cluster, entry).await {
            Ok(found) => drop(known.insert(entry.backup, found)),
            // The plan then keeps every pack, and says so.
            Err(reason) => {
                tracing::info!(%cluster, store = %slot.name(), backup = %entry.backup, reason,
                    "it is not known which packs a backup refers to");
            }
        }
    }
    Ok(Facts {
        store: slot.name(),
        root,
        wal,
        last_commit,
        references: known,
        leftovers,
        running: running(coordinator, cluster, roots),
        held_back: held_back(coordinator, slot, root, roots).await?,
    })
}

/// Backups under way: those that the coordinator ordered, and whatever any store's root pins.
fn running(coordinator: &Coordinator, cluster: &ClusterName, roots: &[(Arc<Slot>, Root)]) -> BTreeSet<BackupId> {
    let operations = coordinator.operations.running().into_iter().filter(|operation| operation.cluster == *cluster);
    let pinned = roots.iter().flat_map(|(_, root)| &root.pins).map(|pin| pin.backup);
    operations.filter_map(|operation| operation.backup).chain(pinned).collect()
}

/// Why a store may let go of nothing yet: another one has a backup that it still lacks, or may have.
async fn held_back(
    coordinator: &Coordinator,
    slot: &Slot,
    root: &Root,
    roots: &[(Arc<Slot>, Root)],
) -> Result<Option<String>, String> {
    if coordinator.retention.policy(&root.cluster, slot.name()).keeps_everything() {
        return Ok(Some("no retention is configured for it".to_owned()));
    }
    for other in coordinator.stores.all().iter().filter(|other| other.name() != slot.name()) {
        let there = match roots.iter().find(|(answered, _)| answered.name() == other.name()) {
            Some((_, root)) => root.backups.clone(),
            None => {
                let known = remembered(coordinator, &root.cluster, other).await?;
                if known.is_empty() && !root.backups.is_empty() {
                    let text =
                        format!("store {} does not answer, and it is not known which backups it has", other.name());
                    return Ok(Some(text));
                }
                known
            }
        };
        let lacking = |entry: &&RootBackup| root.backup(&entry.backup).is_none() && root.may_take(entry);
        if let Some(entry) = there.iter().find(lacking) {
            let text = format!("store {} has backup {}, which must be copied here first", other.name(), entry.backup);
            return Ok(Some(text));
        }
    }
    Ok(None)
}

/// What a store had when its root was read last.
async fn remembered(coordinator: &Coordinator, cluster: &ClusterName, slot: &Slot) -> Result<Vec<RootBackup>, String> {
    let (cluster, store) = (cluster.clone(), slot.name().clone());
    let entries = coordinator.catalog.call(move |connection| rows::of_store(connection, &cluster, &store)).await;
    let entries = entries.map_err(|error| chain(&error))?;
    entries.iter().map(|json| RootBackup::from_json(json).map_err(|error| error.to_string())).collect()
}

async fn in_time<T, E: std::error::Error>(
    patience: Duration,
    what: &str,
    looking: impl Future<Output = Result<T, E>>,
) -> Result<T, String> {
    match tokio::time::timeout(patience, looking).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!("{what} could not be looked at within {} s", patience.as_secs())),
    }
}
