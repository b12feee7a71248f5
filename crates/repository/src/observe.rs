//! What each store holds of a cluster now: its newest root and its WAL, as plans and reports need it.
//!
//! A store that fails in any part counts as not answering: half an answer would read as an archive that ends early.

use futures_util::future::join_all;
use std::sync::Arc;

use crate::name::ClusterName;
use crate::restore_plan::StoreView;
use crate::root::{self, Root};
use crate::store::{ObjectStore, Room};
use crate::wal_index::{self, WalIndex};
use postgres_format::SystemIdentifier;

/// What one store holds of one cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct Holding {
    /// Its newest root; `None` if the cluster was never created there.
    pub root: Option<Root>,
    /// Its WAL, by system, in the order of the root.
    pub wal: Vec<(SystemIdentifier, WalIndex)>,
    /// How full the store is, if it knows.
    pub room: Option<Room>,
}

/// Looks at one store. The error is a line for people.
pub async fn observe(store: &dyn ObjectStore, cluster: &ClusterName) -> Result<Holding, String> {
    let root = root::newest(store, cluster).await.map_err(|error| chain(&error))?;
    let mut wal = Vec::new();
    for system in root.iter().flat_map(|root| &root.systems) {
        let system = system.system_identifier;
        let index = wal_index::load(store, cluster, system).await.map_err(|error| chain(&error))?;
        wal.push((system, index));
    }
    let room = store.room().await.map_err(|error| chain(&error))?;
    Ok(Holding { root, wal, room })
}

/// Looks at several stores at once.
pub async fn observe_all(stores: &[Arc<dyn ObjectStore>], cluster: &ClusterName) -> Vec<Result<Holding, String>> {
    join_all(stores.iter().map(|store| observe(store.as_ref(), cluster))).await
}

/// What [`crate::restore_plan::plan`] needs of several stores, in their order.
pub async fn views(stores: &[Arc<dyn ObjectStore>], cluster: &ClusterName) -> Vec<StoreView> {
    let held = observe_all(stores, cluster).await;
    stores.iter().zip(held).map(|(store, held)| view(store.as_ref(), &held)).collect()
}

/// What a plan needs of one store.
pub fn view(store: &dyn ObjectStore, held: &Result<Holding, String>) -> StoreView {
    let store = store.name().clone();
    match held {
        Err(reason) => StoreView::Unreachable { store, reason: reason.clone() },
        Ok(holding) => {
            let backups = holding.root.as_ref().map(|root| root.backups.clone()).unwrap_or_default();
            StoreView::Holds { store, backups, wal: holding.wal.clone() }
        }
    }
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
