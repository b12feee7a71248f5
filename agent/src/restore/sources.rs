//! The stores that a restore reads from, and what was strange about them.
//!
//! They are asked in the order given, near ones first. One that failed, fell silent or was slow is left for the others, in
//! the middle of what is being read, and asked again after a while: a network that was away for a minute must not make a
//! long restore go the long way to its end.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use process::clock::Monotonic;
use repository::store::ObjectStore;

use super::RestoreError;

/// How long a store is waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Longest silence when no other store is left to ask.
    pub(super) silence: Duration,
    /// Longest silence when there is another one.
    pub(super) silence_beside_others: Duration,
    /// How long a store may be slow when there is another one.
    pub(super) slowness: Duration,
    /// Least speed at which it does not count as slow, in bytes a second of waiting.
    pub(super) least_bytes_per_second: u64,
    /// After which time a store that was left is asked as if nothing had been.
    pub(super) return_after: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(60),
            silence_beside_others: Duration::from_secs(10),
            slowness: Duration::from_secs(10),
            least_bytes_per_second: 128 << 10,
            return_after: Duration::from_secs(120),
        }
    }
}

/// Stores in order of preference; one that was left is asked after the others.
pub(super) struct Sources {
    stores: Vec<Source>,
    warnings: Mutex<BTreeSet<String>>,
    pub(super) patience: Patience,
}

struct Source {
    store: Arc<dyn ObjectStore>,
    left: Mutex<Option<Monotonic>>,
}

impl Source {
    fn is_left(&self, return_after: Duration) -> bool {
        let left = *self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.is_some_and(|left| left.elapsed() < return_after)
    }
}

impl Sources {
    pub(super) fn new(stores: &[Arc<dyn ObjectStore>], patience: Patience) -> Result<Self, RestoreError> {
        if stores.is_empty() {
            return Err(RestoreError::NoStore);
        }
        let stores = stores.iter().map(|store| Source { store: store.clone(), left: Mutex::default() }).collect();
        Ok(Self { stores, warnings: Mutex::default(), patience })
    }

    pub(super) fn in_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.stores.len()).collect();
        order.sort_by_key(|index| self.stores[*index].is_left(self.patience.return_after));
        order
    }

    pub(super) fn store(&self, index: usize) -> &Arc<dyn ObjectStore> {
        &self.stores[index].store
    }

    /// Asks it after the others for a while.
    pub(super) fn leave(&self, index: usize) {
        *self.stores[index].left.lock().unwrap_or_else(PoisonError::into_inner) = Some(Monotonic::now());
    }

    pub(super) fn warn(&self, text: String) {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).insert(text);
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}
