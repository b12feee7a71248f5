//! From where each store keeps WAL, as its root said when it was read last.
//!
//! Positions from which WAL is kept never go back, so what is known here may be behind a root but never ahead of it:
//! whatever does not count as kept was condemned for certain. A pass over the stores passes over it, else what retention
//! removed from one store would be copied back from another for ever. A store that was set back to an older copy of itself
//! is the exception: it keeps again what that copy kept, and what it lacks of that comes back from another.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use postgres_format::{SegmentName, SystemIdentifier};
use repository::name::{ClusterName, StoreName};
use repository::root::{Root, WalKept};

use crate::catalog::wal::WalObject;
use crate::catalog::{Catalog, CatalogResult, expired};

type Place = (StoreName, ClusterName, SystemIdentifier);

/// What is known of all stores.
#[derive(Debug, Default)]
pub struct KeptWal {
    known: Mutex<HashMap<Place, Vec<WalKept>>>,
}

impl KeptWal {
    /// Takes up what a store's root says. Answers whether that is news.
    pub fn note(&self, store: &StoreName, root: &Root) -> bool {
        let mut news = false;
        let mut known = self.lock();
        for system in &root.systems {
            let place = (store.clone(), root.cluster.clone(), system.system_identifier);
            let before = known.entry(place).or_default();
            if *before != system.wal_kept {
                before.clone_from(&system.wal_kept);
                news = true;
            }
        }
        news
    }

    /// Whether a store keeps an object, if it has it. History files are always kept.
    pub fn keeps(&self, store: &StoreName, object: &WalObject) -> bool {
        let Some(segment) = object.name.segment() else { return true };
        self.keeps_segment(store, &object.cluster, object.system_identifier, segment)
    }

    fn keeps_segment(
        &self,
        store: &StoreName,
        cluster: &ClusterName,
        system: SystemIdentifier,
        segment: SegmentName,
    ) -> bool {
        let known = self.lock();
        known.get(&(store.clone(), cluster.clone(), system)).is_none_or(|kept| WalKept::all_keep(kept, segment))
    }

    /// Writes into a catalog what the stores keep and do not keep of one system, and has it forget what none of them keeps.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn tell(
        &self,
        catalog: &Catalog,
        cluster: &ClusterName,
        system: SystemIdentifier,
        stores: &[StoreName],
    ) -> CatalogResult<u64> {
        let told: Vec<(StoreName, Vec<WalKept>)> = {
            let known = self.lock();
            let of_store = |store: &StoreName| {
                let kept = known.get(&(store.clone(), cluster.clone(), system))?;
                Some((store.clone(), kept.clone()))
            };
            stores.iter().filter_map(of_store).collect()
        };
        if told.is_empty() {
            return Ok(0);
        }
        let (cluster, stores) = (cluster.clone(), stores.to_vec());
        catalog.call(move |connection| expired::note_all(connection, &cluster, system, &told, &stores)).await
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Place, Vec<WalKept>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use repository::root::System;

    use super::*;

    #[test]
    fn only_what_a_root_condemned_is_not_kept() {
        let (store, cluster): (StoreName, ClusterName) = ("repo1".parse().unwrap(), "main".parse().unwrap());
        let system = SystemIdentifier::new(7);
        let object = |name: &str| WalObject {
            cluster: cluster.clone(),
            system_identifier: system,
            name: name.parse().unwrap(),
            fingerprint: None,
        };
        let kept = KeptWal::default();
        assert!(kept.keeps(&store, &object("000000010000000000000001")));
        let mut root = Root::empty(cluster.clone(), "coordinator".parse().unwrap(), Timestamp::UNIX_EPOCH);
        root.systems.push(System::new(system, None, None, Timestamp::UNIX_EPOCH));
        assert!(!kept.note(&store, &root));
        let from = "000000010000000000000005".parse().unwrap();
        root.systems[0].wal_kept = vec![WalKept { from, also: Vec::new() }];
        assert!(kept.note(&store, &root) && !kept.note(&store, &root));
        let other: StoreName = "s3".parse().unwrap();
        for (name, keeps) in [
            ("000000010000000000000001", false),
            ("000000010000000000000001.00000028.backup", false),
            ("000000010000000000000005", true),
            ("000000020000000000000001", true),
            ("00000001.history", true),
        ] {
            assert_eq!(kept.keeps(&store, &object(name)), keeps, "{name}");
            assert!(kept.keeps(&other, &object(name)));
        }
        // Set back to before its retention removed anything.
        root.systems[0].wal_kept.clear();
        assert!(kept.note(&store, &root) && !kept.note(&store, &root));
        assert!(kept.keeps(&store, &object("000000010000000000000001")));
    }
}
