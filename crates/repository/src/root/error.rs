//! Why a root could not be read, changed or committed.

use crate::key::ObjectKey;
use crate::name::{BackupId, ClusterName, Generation, StoreName};
use crate::store::{Remedy, StoreError};

use super::history::COMMIT_ATTEMPTS;
use super::mark::SetBack;

/// Why a root could not be read or committed.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A store failed.
    #[error("a store failed")]
    Store(#[source] StoreError),
    /// A root is not what was committed.
    #[error("store {store}: object {key} is damaged: {reason}")]
    Damaged {
        /// Which store.
        store: StoreName,
        /// Which root.
        key: ObjectKey,
        /// What was found and what was expected.
        reason: String,
    },
    /// A newer version wrote it.
    #[error("store {store}: object {key} was written by a newer pgconvoy ({reason}): upgrade this one")]
    Newer {
        /// Which store.
        store: StoreName,
        /// Which root.
        key: ObjectKey,
        /// What is not understood.
        reason: String,
    },
    /// The sought change contradicts what exists.
    #[error("{reason}")]
    Refused {
        /// What exists, what was to be changed, and what to do.
        reason: String,
    },
    /// The backup is not under way any more: its pin was taken away, and what it sent may be removed.
    #[error("backup {backup} was given up meanwhile, and what it sent may be removed: take a new one")]
    PinGone {
        /// Which backup.
        backup: BackupId,
    },
    /// The store lost roots that were there.
    #[error(transparent)]
    SetBack(#[from] SetBack),
    /// A plan was made from a root that is not the newest any more.
    #[error("the plan was made from root {planned} and the newest is {newest}: plan again")]
    Moved {
        /// What the plan was made from.
        planned: Generation,
        /// What there is now.
        newest: Generation,
    },
    /// Other writers were always faster.
    #[error("store {store}: others committed to cluster {cluster} {COMMIT_ATTEMPTS} times in a row: try again")]
    Contended {
        /// Which store.
        store: StoreName,
        /// Which cluster.
        cluster: ClusterName,
    },
    /// The store did not say whether the commit happened. Committing the same change again is safe.
    #[error("store {store}: it is unknown whether root {generation} of cluster {cluster} was committed")]
    Unknown {
        /// Which store.
        store: StoreName,
        /// Which cluster.
        cluster: ClusterName,
        /// Which generation.
        generation: Generation,
        /// What the store said.
        source: Box<StoreError>,
    },
}

impl RootError {
    /// What helps.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Store(error) => error.remedy(),
            Self::Damaged { .. } => Remedy::Corrupt,
            Self::Newer { .. } | Self::SetBack(_) => Remedy::Operator,
            Self::Refused { .. } | Self::PinGone { .. } => Remedy::Conflict,
            Self::Contended { .. } | Self::Unknown { .. } | Self::Moved { .. } => Remedy::Retry,
        }
    }
}

impl From<StoreError> for RootError {
    fn from(error: StoreError) -> Self {
        // A store error says which store and which object; there is nothing to add.
        Self::Store(error)
    }
}

/// What is wrong with the bytes of a root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RootDamage {
    /// It is cut off, or no root.
    #[error("it is not enclosed as roots are")]
    Frame,
    /// It was changed.
    #[error("it does not match its SHA-256")]
    Digest,
    /// It is whole, but no root of ours.
    #[error("it cannot be read: {reason}")]
    Text {
        /// What the JSON reader said.
        reason: String,
    },
    /// A newer version wrote it.
    #[error("{what} is not understood")]
    Newer {
        /// What is new.
        what: String,
    },
}
