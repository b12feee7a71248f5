//! The stores that a restore reads from, and what was strange about them.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use repository::store::ObjectStore;

use super::RestoreError;

/// Stores in order of preference; one that failed is asked after the others.
pub(super) struct Sources {
    stores: Vec<(Arc<dyn ObjectStore>, AtomicBool)>,
    warnings: Mutex<BTreeSet<String>>,
}

impl Sources {
    pub(super) fn new(stores: &[Arc<dyn ObjectStore>]) -> Result<Self, RestoreError> {
        if stores.is_empty() {
            return Err(RestoreError::NoStore);
        }
        let stores = stores.iter().map(|store| (store.clone(), AtomicBool::new(false))).collect();
        Ok(Self { stores, warnings: Mutex::default() })
    }

    pub(super) fn in_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.stores.len()).collect();
        order.sort_by_key(|index| self.stores[*index].1.load(Ordering::Relaxed));
        order
    }

    pub(super) fn store(&self, index: usize) -> &Arc<dyn ObjectStore> {
        &self.stores[index].0
    }

    /// Asks it later from now on, for it is away.
    pub(super) fn failed(&self, index: usize) {
        self.stores[index].1.store(true, Ordering::Relaxed);
    }

    pub(super) fn warn(&self, text: String) {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).insert(text);
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}
