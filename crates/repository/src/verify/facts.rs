//! What was found in one store, as values, and what ends a walk through it.

use std::collections::{BTreeMap, BTreeSet};

use postgres_format::{SegmentName, SystemIdentifier};

use super::VerifyError;
use super::finding::{Proof, What};
use crate::backup::BackupError;
use crate::key::ObjectKey;
use crate::name::{BackupId, StoreName};
use crate::observe::{Holding, chain};
use crate::root::Root;
use crate::store::StoreError;

/// An object that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) key: ObjectKey,
    pub(super) what: What,
    pub(super) found: String,
    pub(super) expected: String,
    /// Backups of this store that need it, as far as that is no question of WAL.
    pub(super) backups: Vec<BackupId>,
    pub(super) proof: Option<Proof>,
    pub(super) sound_in: Vec<StoreName>,
}

/// What was found in one store.
#[derive(Debug)]
pub(super) struct StoreFacts {
    pub(super) store: StoreName,
    pub(super) root: Option<Root>,
    pub(super) failed: Option<String>,
    pub(super) broken: Vec<Broken>,
    pub(super) left_out: u64,
    /// Segments of which no content that was looked at is sound and complete.
    pub(super) lost: BTreeMap<SystemIdentifier, BTreeSet<SegmentName>>,
    pub(super) objects: u64,
    pub(super) bytes: u64,
}

impl Broken {
    pub(super) fn new(key: ObjectKey, what: What, found: impl Into<String>, expected: impl Into<String>) -> Self {
        let (found, expected) = (found.into(), expected.into());
        Self { key, what, found, expected, backups: Vec::new(), proof: None, sound_in: Vec::new() }
    }
}

impl StoreFacts {
    pub(super) fn broken_keys(&self) -> BTreeSet<String> {
        self.broken.iter().map(|broken| broken.key.to_string()).collect()
    }

    /// Nothing yet.
    pub(super) fn of(store: StoreName) -> Self {
        let (root, failed, broken, left_out) = (None, None, Vec::new(), 0);
        Self { store, root, failed, broken, left_out, lost: BTreeMap::new(), objects: 0, bytes: 0 }
    }

    /// Whether something that a backup needs besides WAL is broken here.
    pub(super) fn breaks(&self, backup: &BackupId) -> bool {
        self.broken.iter().any(|broken| broken.what != What::Pages && broken.backups.contains(backup))
    }
}

/// Why a walk through a store ends.
pub(super) enum Stop {
    /// The store does not serve.
    Away(String),
    /// Nothing can be said at all.
    Local(VerifyError),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Away(chain(&error))
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Local(VerifyError::Scratch(error))
    }
}

/// How many bytes a walk through a store reads, as far as a root and a listing tell.
pub(super) fn expected_bytes(held: &Holding) -> u64 {
    let backups = held.root.iter().flat_map(|root| &root.backups).map(|backup| backup.stored_bytes);
    backups.chain(held.wal.iter().map(|(_, index)| index.bytes)).sum()
}

/// Tells what is wrong with an object from what is wrong with its store.
pub(super) fn about_object<T>(read: Result<T, BackupError>) -> Result<Result<T, String>, Stop> {
    match read {
        Ok(value) => Ok(Ok(value)),
        Err(BackupError::Local(error)) => Err(Stop::Local(VerifyError::Scratch(error))),
        Err(BackupError::Store(error)) if error.is_outage() => Err(error.into()),
        Err(BackupError::Store(StoreError::NotFound { .. })) => Ok(Err("it is not there".to_owned())),
        Err(BackupError::Pack { damage, .. }) => Ok(Err(damage.to_string())),
        Err(BackupError::Manifest { damage, .. }) => Ok(Err(damage.to_string())),
        Err(error) => Ok(Err(chain(&error))),
    }
}
