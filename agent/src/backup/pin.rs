//! Saying in a store's root that a backup is under way, so that nothing it sends or builds on is removed meanwhile, and that
//! it takes over what earlier attempts left. On the coordinator's road the coordinator is asked to; where it does not, the pin
//! goes to the store of the direct road, if there is one.
//!
//! Without a pin a backup is as safe and may be refused in the end, so a store that does not take one stops nothing. A store
//! whose root does not know the cluster is not begun here. What earlier attempts of the node left is taken away by the
//! coordinator, which sees whether one of them exists in another store and is still to be copied into this one.

use std::collections::BTreeSet;
use std::time::Duration;

use process::clock;
use repository::name::{BackupId, ClusterName, NodeName};
use repository::root::{self, Pin, Root, RootError};
use repository::store::ObjectStore;

use super::road::{BackupRoad, Road};
use crate::archive::ship::chain;

/// How long a pin may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pins a backup. On the coordinator's road it has done so already if it was the one who ordered it.
pub(super) async fn begin(
    road: &BackupRoad,
    cluster: &ClusterName,
    node: &NodeName,
    backup: BackupId,
    parent: Option<BackupId>,
) {
    if road.road() == Road::Coordinator {
        match road.pin(&backup, &[]).await {
            Ok(_) => return,
            Err(error) => {
                tracing::info!(%backup, reason = chain(&error), "the coordinator did not pin the backup");
            }
        }
    }
    // A coordinator that has just gone away is left with the first object: the pin stands where that will go.
    let Ok(store) = road.direct() else { return };
    let pin = Pin::new(backup, parent, node.clone(), clock::now());
    commit(store.as_ref(), cluster, node, backup, |root| root.with_pin(pin.clone())).await;
}

/// Takes the pin of a backup that failed away.
pub(super) async fn give_up(road: &BackupRoad, cluster: &ClusterName, node: &NodeName, backup: BackupId) {
    let Some(store) = road.direct().ok().filter(|_| road.road() == Road::Direct) else { return };
    commit(store.as_ref(), cluster, node, backup, |root| Ok(root.without_pin(&backup))).await;
}

/// Has the pins of earlier attempts taken over by that of a backup. Gives the stores in which that was committed.
///
/// # Errors
/// Why it was in none; a line for people.
pub(super) async fn take_over(
    road: &BackupRoad,
    cluster: &ClusterName,
    node: &NodeName,
    backup: BackupId,
    attempts: &BTreeSet<BackupId>,
) -> Result<BTreeSet<String>, String> {
    let attempts: Vec<BackupId> = attempts.iter().copied().collect();
    if road.road() == Road::Coordinator {
        return road.pin(&backup, &attempts).await.map_err(|error| chain(&error));
    }
    let store = road.direct().map_err(|error| chain(&error))?.as_ref();
    let edit = |root: &Root| root.with_taken_over(&backup, &attempts);
    let committing = root::commit(store, cluster, node, clock::now(), edit);
    match tokio::time::timeout(PATIENCE, committing).await {
        Ok(Ok(_)) => Ok([store.name().to_string()].into()),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!("store {} did not answer in time", store.name())),
    }
}

async fn commit(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    node: &NodeName,
    backup: BackupId,
    edit: impl Fn(&Root) -> Result<Root, RootError>,
) {
    let committing = known_and_committed(store, cluster, node, edit);
    let reason = match tokio::time::timeout(PATIENCE, committing).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the store did not answer in time".to_owned(),
    };
    tracing::info!(%backup, store = %store.name(), reason, "a pin was not changed");
}

async fn known_and_committed(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    node: &NodeName,
    edit: impl Fn(&Root) -> Result<Root, RootError>,
) -> Result<(), RootError> {
    if root::newest(store, cluster).await?.is_some() {
        root::commit(store, cluster, node, clock::now(), edit).await?;
    }
    Ok(())
}
