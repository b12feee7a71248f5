//! Backups that are being published just now: their operations end when that ends, not when the first store names them.
//!
//! Whoever waits for an operation counts on the backup being in every store that could take it. What looks into the stores
//! meanwhile finds it in some of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use repository::name::{BackupId, ClusterName};

use super::Operations;

/// How many publish each backup at this moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Underway(Arc<Mutex<HashMap<(ClusterName, BackupId), usize>>>);

impl Underway {
    fn change(&self, backup: &(ClusterName, BackupId), change: impl FnOnce(usize) -> usize) {
        let mut underway = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match change(underway.get(backup).copied().unwrap_or(0)) {
            0 => underway.remove(backup),
            count => underway.insert(backup.clone(), count),
        };
    }
}

/// A backup is being published until this is dropped.
#[derive(Debug)]
pub struct Publishing {
    underway: Underway,
    backup: (ClusterName, BackupId),
}

impl Drop for Publishing {
    fn drop(&mut self) {
        self.underway.change(&self.backup, |count| count.saturating_sub(1));
    }
}

impl Operations {
    /// Says that a backup is about to be named in stores, one after the other.
    pub fn publishing(&self, cluster: &ClusterName, backup: BackupId) -> Publishing {
        let backup = (cluster.clone(), backup);
        self.underway.change(&backup, |count| count + 1);
        Publishing { underway: self.underway.clone(), backup }
    }

    /// Whether somebody publishes a backup at this moment, and will end its operation.
    pub fn is_publishing(&self, cluster: &ClusterName, backup: BackupId) -> bool {
        let underway = self.underway.0.lock().unwrap_or_else(PoisonError::into_inner);
        underway.contains_key(&(cluster.clone(), backup))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Catalog;

    #[tokio::test]
    async fn a_backup_is_being_published_until_the_last_who_does_ends() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let operations = Operations::load(catalog).await.unwrap();
        let (main, other): (ClusterName, ClusterName) = ("main".parse().unwrap(), "other".parse().unwrap());
        let backup: BackupId = "20261123T040506Z-5a5a5a5a".parse().unwrap();
        let first = operations.publishing(&main, backup);
        let second = operations.clone().publishing(&main, backup);
        assert!(operations.is_publishing(&main, backup) && !operations.is_publishing(&other, backup));
        drop(first);
        assert!(operations.is_publishing(&main, backup));
        drop(second);
        assert!(!operations.is_publishing(&main, backup));
    }
}
