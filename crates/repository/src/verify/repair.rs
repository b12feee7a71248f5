//! Putting an object right in one store from a sound copy in another.
//!
//! An object is created once and never changed; what lies damaged under its key is not that object any more. So a repair
//! is the removal of bytes that are proven not to be the object, and the creation of the object from a copy that is proven
//! to be it. That is the only removal besides the sweep's, and this is the only place of it. Rules:
//! * only packs, manifests, WAL files and histories: whatever tells by a digest of its own, or of the manifest or root that
//!   names it, what it must be. Roots are each store's own and are never touched;
//! * the sound copy is read whole and proven first, and kept in a file until the object is there again;
//! * right before its removal the damaged object is read once more and must still be proven damaged;
//! * a store that keeps it by a lock of its own is told so, and nothing is lost.
//!
//! A crash in between leaves the object missing where it was damaged, and sound where it was copied from: the same repair
//! again creates it. Two repairs at the same time may do the work twice and do no harm.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use futures_util::TryStreamExt;

use super::content::{self, Unproven};
use super::finding::{Finding, Proof, What};
use crate::key::{self, ObjectKey};
use crate::name::{ClusterName, StoreName};
use crate::store::{Body, ByteRange, Deleted, ObjectStore, Put, StoreError};

/// One object that is to be put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Where it is damaged or missing.
    pub store: StoreName,
    /// Which.
    pub key: ObjectKey,
    /// What is wrong with it.
    pub found: String,
    /// Stores that had a sound copy, in the order to ask them.
    pub from: Vec<StoreName>,
    /// By what a sound copy is known, unless it tells itself.
    pub proof: Option<Proof>,
}

/// What can be put right, and what cannot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RepairPlan {
    /// What would be done.
    pub steps: Vec<Step>,
    /// WAL that a store lacks is copied by comparing the stores anew.
    pub compare_stores: bool,
    /// What nobody can put right, a line each.
    pub beyond: Vec<String>,
}

/// PURE: what can be put right of what was found.
pub fn plan<'a>(cluster: &ClusterName, findings: impl IntoIterator<Item = &'a Finding>) -> RepairPlan {
    let mut plan = RepairPlan::default();
    let prefix = key::cluster_prefix(cluster);
    for finding in findings {
        let object = finding.object.as_deref().and_then(|object| ObjectKey::parse(object).ok());
        let repairable = matches!(
            finding.what,
            What::Manifest | What::Pack | What::Wal | What::ChangeMap | What::History | What::Evidence
        );
        match (&finding.store, object) {
            (Some(store), Some(key))
                if repairable && !finding.sound_in.is_empty() && key.as_str().starts_with(&prefix) =>
            {
                plan.steps.push(Step {
                    store: store.clone(),
                    key,
                    found: finding.found.clone(),
                    from: finding.sound_in.clone(),
                    proof: finding.proof,
                });
            }
            (Some(_), None) if matches!(finding.what, What::Gap | What::BackupWal) => plan.compare_stores = true,
            (store, object) => {
                let place = store.as_ref().map_or("all stores".to_owned(), |store| format!("store {store}"));
                let object = object.map(|key| format!("{key}: ")).unwrap_or_default();
                plan.beyond.push(format!("{place}: {object}{}; {}", finding.found, finding.remedy));
            }
        }
    }
    plan
}

/// What came of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repaired {
    /// The object is sound now, from that store; so many bytes were written.
    PutRight {
        /// From where.
        from: StoreName,
        /// Its size.
        bytes: u64,
    },
    /// It was sound already.
    WasSound,
    /// The store keeps the damaged object by a lock of its own.
    Retained,
}

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// A store is not among those that were given.
    #[error("store {0} is away")]
    Away(StoreName),
    /// No store has a sound copy any more.
    #[error("no sound copy of {key} was found: {}", reasons.join("; "))]
    NoCopy {
        /// Of what.
        key: ObjectKey,
        /// A line a store.
        reasons: Vec<String>,
    },
    /// The store failed, or does not let objects be removed. The object is as it was, or missing.
    #[error("store {store}: object {key} was not put right; ask again")]
    Store {
        /// Which store.
        store: StoreName,
        /// Which object.
        key: ObjectKey,
        /// What it said.
        source: StoreError,
    },
    /// Somebody else put something under the key, and it is not sound.
    #[error("store {store}: object {key} is damaged again")]
    Again {
        /// Which store.
        store: StoreName,
        /// Which object.
        key: ObjectKey,
    },
    /// The copy could not be laid down.
    #[error("a copy could not be laid down to be written")]
    Scratch(#[source] std::io::Error),
}

/// Does one step.
///
/// # Errors
/// [`RepairError`]; asking again is safe.
pub async fn apply(stores: &[Arc<dyn ObjectStore>], step: &Step, scratch: &Path) -> Result<Repaired, RepairError> {
    let find = |name: &StoreName| stores.iter().find(|store| store.name() == name);
    let target = find(&step.store).ok_or_else(|| RepairError::Away(step.store.clone()))?;
    let mut reasons = Vec::new();
    for name in &step.from {
        let Some(source) = find(name) else {
            reasons.push(format!("store {name} is away"));
            continue;
        };
        match laid_down(&**source, &step.key, step.proof.as_ref(), scratch).await? {
            Ok(copy) => return replace_damaged(&**target, step, name, copy).await,
            Err(reason) => reasons.push(format!("store {name}: {reason}")),
        }
    }
    Err(RepairError::NoCopy { key: step.key.clone(), reasons })
}

/// A proven copy in a file.
struct Copy {
    file: tempfile::NamedTempFile,
    bytes: u64,
}

/// Reads a copy into a file and proves it. The proof is of what was read from the store right before, and the file is
/// compared with it by length and digest.
async fn laid_down(
    source: &dyn ObjectStore,
    key: &ObjectKey,
    proof: Option<&Proof>,
    scratch: &Path,
) -> Result<Result<Copy, String>, RepairError> {
    let proven = match content::prove(source, key, proof).await {
        Ok(proven) => proven,
        Err(error) => return Ok(Err(crate::observe::chain(&error))),
    };
    let mut file = tempfile::NamedTempFile::new_in(scratch).map_err(RepairError::Scratch)?;
    let mut stream = match source.get(key, ByteRange::All).await {
        Ok(stream) => stream,
        Err(error) => return Ok(Err(crate::observe::chain(&error))),
    };
    let mut written = 0;
    loop {
        match stream.try_next().await {
            Ok(Some(piece)) => {
                file.write_all(&piece).map_err(RepairError::Scratch)?;
                written += piece.len() as u64;
            }
            Ok(None) => break,
            Err(error) => return Ok(Err(crate::observe::chain(&error))),
        }
    }
    file.flush().map_err(RepairError::Scratch)?;
    let body = Body::File { path: file.path().to_owned(), len: written };
    let sha256 = body.sha256().await.map_err(RepairError::Scratch)?;
    match (written, sha256) == (proven.size, proven.sha256) {
        true => Ok(Ok(Copy { file, bytes: written })),
        false => Ok(Err("it was read twice and differed".to_owned())),
    }
}

/// Removes what is proven not to be the object, and creates the object.
async fn replace_damaged(
    target: &dyn ObjectStore,
    step: &Step,
    from: &StoreName,
    copy: Copy,
) -> Result<Repaired, RepairError> {
    let failed = |source| RepairError::Store { store: step.store.clone(), key: step.key.clone(), source };
    match content::prove(target, &step.key, step.proof.as_ref()).await {
        Ok(_) => return Ok(Repaired::WasSound),
        Err(Unproven::Store(StoreError::NotFound { .. })) => {}
        Err(Unproven::Damaged(_)) => match target.delete(&step.key).await.map_err(failed)? {
            Deleted::Removed | Deleted::Absent => {}
            Deleted::Retained { .. } => return Ok(Repaired::Retained),
        },
        // A store that fails, and an object that nobody can judge, prove nothing.
        Err(Unproven::Store(source)) => return Err(failed(source)),
        Err(Unproven::NoProof) => return Ok(Repaired::WasSound),
    }
    let body = Body::File { path: copy.file.path().to_owned(), len: copy.bytes };
    let put = target.put_new(&step.key, body).await.map_err(failed)?;
    let bytes = copy.bytes;
    match (put, content::prove(target, &step.key, step.proof.as_ref()).await) {
        (_, Err(Unproven::Store(source))) => Err(failed(source)),
        (_, Err(_)) => Err(RepairError::Again { store: step.store.clone(), key: step.key.clone() }),
        (Put::Created, Ok(_)) => Ok(Repaired::PutRight { from: from.clone(), bytes }),
        (Put::Exists, Ok(_)) => Ok(Repaired::WasSound),
    }
}
