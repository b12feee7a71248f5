//! Pins: saying in every store's root that a backup is under way before its first object is sent.
//!
//! A store in which the pin could not be committed gets the backup all the same, if nothing it needs was condemned there
//! meanwhile; that is decided by the publication. A pin is taken away here only when the attempt is known to be dead: its
//! node said so, never got the order, or has finished a later one, for it takes one at a time. Of a node that fell silent
//! nothing is known, and its pin stays.

use jiff::Timestamp;
use process::clock;
use repository::key;
use repository::name::{BackupId, ClusterName, NodeName};
use repository::root::{self, Pin, PinnedWal, Root, RootBackup, RootError};
use repository::store::ObjectStore;

use crate::Coordinator;
use crate::clusters::root_writer;
use crate::stores::chain;

/// Pins a backup that is about to be ordered in every healthy store.
pub async fn begin(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    backup: BackupId,
    node: &NodeName,
    now: Timestamp,
) {
    let pin = Pin::new(backup, None, node.clone(), now);
    in_every_store(coordinator, cluster, |root| root.with_pin(pin.clone())).await;
}

/// Takes the pin of an attempt that is known to be dead away.
pub async fn give_up(coordinator: &Coordinator, cluster: &ClusterName, backup: BackupId) {
    in_every_store(coordinator, cluster, |root| Ok(root.without_pin(&backup))).await;
}

/// Takes away what earlier attempts of a node left, now that it finished another one. What only waits for its WAL stays; what
/// exists in another store stays, for it is to be copied.
pub async fn give_up_older(coordinator: &Coordinator, cluster: &ClusterName, finished: &RootBackup) {
    let running: Vec<BackupId> =
        coordinator.operations.running().into_iter().filter_map(|operation| operation.backup).collect();
    let older =
        |pin: &&Pin| pin.node == finished.node && pin.backup < finished.backup && !running.contains(&pin.backup);
    let mut dead = Vec::new();
    for slot in coordinator.stores.healthy() {
        let reading = root::newest(&*slot.store, cluster);
        // Reconciliation reads the same root, and tells what is wrong with it.
        let Ok(Ok(Some(root))) = tokio::time::timeout(coordinator.stores.patience(), reading).await else { continue };
        for pin in root.pins.iter().filter(older) {
            if !dead.contains(&pin.backup) && !may_come(coordinator, cluster, &pin.backup).await {
                dead.push(pin.backup);
            }
        }
    }
    if !dead.is_empty() {
        let edit = |root: &Root| Ok(dead.iter().fold(root.clone(), |root, dead| root.without_pin(dead)));
        in_every_store(coordinator, cluster, edit).await;
    }
}

/// Whether an attempt got as far as its manifest, in whichever store: then it exists there, or may yet, and comes to the others
/// by a copy, which its pin there must not be taken from. A store that is away cannot say no.
async fn may_come(coordinator: &Coordinator, cluster: &ClusterName, backup: &BackupId) -> bool {
    let manifest = key::manifest(cluster, backup);
    for slot in coordinator.stores.all() {
        if !slot.health().is_readable() {
            return true;
        }
        let asked = tokio::time::timeout(coordinator.stores.patience(), slot.store.head(&manifest)).await;
        if !matches!(asked, Ok(Ok(None))) {
            return true;
        }
    }
    false
}

async fn in_every_store(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    edit: impl Fn(&Root) -> Result<Root, RootError>,
) {
    let writer = root_writer();
    for slot in coordinator.stores.healthy() {
        let commit = root::commit(&*slot.store, cluster, &writer, clock::now(), &edit);
        let reason = match tokio::time::timeout(coordinator.stores.patience(), commit).await {
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => {
                if let RootError::Store(error) = &error
                    && error.is_outage()
                {
                    slot.judge(error);
                }
                chain(&error)
            }
            Err(_) => {
                let silence = crate::clusters::silent(&slot);
                slot.judge(&silence);
                chain(&silence)
            }
        };
        tracing::info!(%cluster, store = %slot.name(), reason, "a pin was not changed");
    }
}

/// Pins a backup that is about to be copied into a store, with all identifiers whose packs it refers to and the WAL it needs.
/// Answers false when it can never be a backup there: something of it was condemned.
///
/// # Errors
/// When the store fails.
pub async fn for_copy(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    parent: Option<BackupId>,
    owners: &[BackupId],
) -> Result<bool, RootError> {
    let now = clock::now();
    let wal = PinnedWal {
        system_identifier: entry.system_identifier,
        timeline: entry.start_timeline,
        start_lsn: entry.start_lsn,
    };
    let pin = Pin { protects: owners.to_vec(), wal: Some(wal), ..Pin::new(entry.backup, parent, root_writer(), now) };
    let edit = |root: &Root| match root.pin(&entry.backup) {
        Some(_) => root.with_pin_widened(&entry.backup, parent, owners, wal),
        None => root.with_pin(pin.clone()),
    };
    match root::commit(store, cluster, &root_writer(), now, edit).await {
        Ok(_) => Ok(true),
        Err(RootError::Refused { reason }) => {
            tracing::debug!(%cluster, backup = %entry.backup, store = %store.name(), reason, "a backup is not copied");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}
