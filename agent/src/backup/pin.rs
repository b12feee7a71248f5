//! On the direct road: saying in the store's root that a backup is under way, so that nothing it sends or builds on is
//! removed meanwhile. On the coordinator's road the coordinator does.
//!
//! Without a pin a backup is as safe and may be refused in the end, so a store that does not take one stops nothing. A store
//! whose root does not know the cluster is not begun here.

use std::time::Duration;

use process::clock;
use repository::name::{BackupId, ClusterName, NodeName};
use repository::root::{self, Pin, Root, RootError};
use repository::store::ObjectStore;

use super::road::{BackupRoad, Road};

/// How long a pin may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pins a backup that goes by the direct road.
pub(super) async fn begin(
    road: &BackupRoad,
    cluster: &ClusterName,
    node: &NodeName,
    backup: BackupId,
    parent: Option<BackupId>,
) {
    let pin = Pin::new(backup, parent, node.clone(), clock::now());
    commit(road, cluster, node, backup, |root| root.with_pin(pin.clone())).await;
}

/// Takes the pin of a backup that failed away.
pub(super) async fn give_up(road: &BackupRoad, cluster: &ClusterName, node: &NodeName, backup: BackupId) {
    commit(road, cluster, node, backup, |root| Ok(root.without_pin(&backup))).await;
}

async fn commit(
    road: &BackupRoad,
    cluster: &ClusterName,
    node: &NodeName,
    backup: BackupId,
    edit: impl Fn(&Root) -> Result<Root, RootError>,
) {
    let Some(store) = road.direct().ok().filter(|_| road.road() == Road::Direct) else { return };
    let committing = known_and_committed(store.as_ref(), cluster, node, edit);
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
