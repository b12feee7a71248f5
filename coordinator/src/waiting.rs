//! Backups that are finished but for WAL: publishing them when it has come.
//!
//! Such a backup has its manifest and no place in a root, and its pin stands. Both are in a store, so that nothing is lost with
//! the agent that took it, with this coordinator or with its catalog: whoever looks finds it and goes on. It waits until its
//! WAL is there, an operator cancels it, or its pin is taken away.
//!
//! What its agent still works on is left to the agent. What cannot be published for another reason than WAL is shown as waiting for
//! an operator.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use process::clock::{self, Monotonic};
use repository::backup::note;
use repository::name::{BackupId, ClusterName};
use repository::root::{self, RootBackup};

use crate::operations::{Operation, WaitingBackup};
use crate::publish::{self, Attempted};
use crate::stores::{Slot, chain};
use crate::{Coordinator, lines, pins};

/// How often the stores are looked at.
const TICK: Duration = Duration::from_secs(10);
/// Entries that are remembered, so that a manifest is not read at every look.
const REMEMBERED: usize = 64;
/// How much longer than another answer reading a manifest may take.
const MANIFEST_PATIENCE: u32 = 6;

/// Entries made from manifests. A manifest never changes.
type Entries = HashMap<BackupId, RootBackup>;

/// Looks for backups that wait until the coordinator stops.
pub async fn run(coordinator: Arc<Coordinator>) {
    let mut entries = Entries::new();
    loop {
        tokio::select! {
            () = coordinator.stop.cancelled() => return,
            () = tokio::time::sleep(TICK) => {}
        }
        for cluster in coordinator.clusters.names() {
            look(&coordinator, &cluster, &[], &mut entries).await;
        }
    }
}

/// Looks for backups of one cluster that wait, and publishes those whose WAL has come. Of the operations in `lost` it is known
/// that no agent works on them.
pub async fn look_at(coordinator: &Coordinator, cluster: &ClusterName, lost: &[String]) {
    look(coordinator, cluster, lost, &mut Entries::new()).await;
}

/// Writes down that the backup of an operation waits.
pub async fn note(coordinator: &Coordinator, operation: &Operation, missing: String, now: Timestamp) {
    let Some(backup) = operation.backup else { return };
    let (cluster, node) = (operation.cluster.clone(), operation.node.clone());
    coordinator.operations.wait_for_wal(WaitingBackup { cluster, node, backup, missing }, now).await;
}

async fn look(coordinator: &Coordinator, cluster: &ClusterName, lost: &[String], entries: &mut Entries) {
    let mut found: BTreeMap<BackupId, RootBackup> = BTreeMap::new();
    for slot in coordinator.stores.healthy() {
        for entry in finished_in(coordinator, &slot, cluster, lost, entries).await {
            found.insert(entry.backup, entry);
        }
    }
    for (backup, entry) in found {
        if coordinator.operations.was_cancelled(cluster, backup) {
            pins::give_up(coordinator, cluster, backup).await;
        } else {
            go_on(coordinator, cluster, entry).await;
        }
    }
}

/// Backups that are pinned in a store and have a manifest there, and on which no agent works.
async fn finished_in(
    coordinator: &Coordinator,
    slot: &Arc<Slot>,
    cluster: &ClusterName,
    lost: &[String],
    entries: &mut Entries,
) -> Vec<RootBackup> {
    if coordinator.roots.set_back(slot.name(), cluster).is_some() {
        // Its pins are of a time before it lost what came of them.
        return Vec::new();
    }
    let store = &*slot.store;
    let root = match tokio::time::timeout(coordinator.stores.patience(), root::newest(store, cluster)).await {
        Ok(Ok(Some(root))) => root,
        // Reconciliation reads the same root, and tells what is wrong with it.
        _ => return Vec::new(),
    };
    // An agent that is not there works on nothing that it could not do again.
    let nodes = coordinator.sessions.nodes(Some(cluster));
    let there = |operation: &Operation| nodes.iter().any(|view| view.node == operation.node && view.connected);
    let works = |operation: &Operation| there(operation) && !lost.contains(&operation.id);
    let running = coordinator.operations.running().into_iter().filter(works);
    let running: Vec<BackupId> = running.filter_map(|operation| operation.backup).collect();
    let mut found = Vec::new();
    for pin in root.pins.iter().filter(|pin| !pin.is_copy() && !running.contains(&pin.backup)) {
        if let Some(known) = entries.get(&pin.backup) {
            found.push(known.clone());
            continue;
        }
        let reading = note::unpublished(store, cluster, &pin.backup, &coordinator.scratch);
        match tokio::time::timeout(coordinator.stores.patience() * MANIFEST_PATIENCE, reading).await {
            Ok(Ok(Some(entry))) => {
                if entries.len() >= REMEMBERED {
                    entries.clear();
                }
                entries.insert(entry.backup, entry.clone());
                found.push(entry);
            }
            Ok(Ok(None)) => {}
            Ok(Err(error)) => {
                let error = chain(&error);
                tracing::info!(%cluster, backup = %pin.backup, store = %slot.name(), error, "a manifest could not be read");
            }
            Err(_) => slot.judge(&crate::clusters::silent(slot)),
        }
    }
    found
}

/// Publishes a backup where that is possible now, or says what it waits for.
async fn go_on(coordinator: &Coordinator, cluster: &ClusterName, entry: RootBackup) {
    let missing = match lines::left_by(coordinator, cluster, &entry).await {
        Some(detail) => format!("an operator: {detail}"),
        None => {
            let attempted = publish::publish_in_all(coordinator, cluster, &entry, Monotonic::now()).await;
            let Attempted { published, reasons, waiting, .. } = attempted;
            if !published.is_empty() {
                publish::conclude(coordinator, cluster, &entry, &published).await;
                return;
            }
            waiting.unwrap_or_else(|| format!("an operator: {}", reasons.join("; ")))
        }
    };
    let (cluster, node, backup) = (cluster.clone(), entry.node, entry.backup);
    coordinator.operations.wait_for_wal(WaitingBackup { cluster, node, backup, missing }, clock::now()).await;
}
