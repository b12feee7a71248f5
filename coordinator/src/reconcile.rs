//! Reconciliation.
use std::sync::Arc;

use repository::name::ClusterName;

use crate::Coordinator;
use crate::catalog::CatalogError;

/// What a rebuild found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// WAL objects indexed.
    pub wal_objects: u64,
    /// Backups indexed.
    pub backups: u64,
}

/// Recreates the catalog.
pub async fn rebuild(_coordinator: &Coordinator) -> Result<Rebuilt, CatalogError> {
    Ok(Rebuilt::default())
}

/// Loop.
pub async fn run(coordinator: Arc<Coordinator>) {
    coordinator.stop.cancelled().await;
}

/// Adoptions.
pub async fn load_adoptions(_coordinator: &Coordinator) {}

/// Spread.
pub async fn tell_newest_spread(_coordinator: &Coordinator, _cluster: &ClusterName) -> Result<(), CatalogError> {
    Ok(())
}
