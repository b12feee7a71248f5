//! The bytes of packs, and whether a single object is sound.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;
use sha2::{Digest, Sha256};

use super::finding::{Depth, Proof};
use super::pages::Files;
use super::wal_objects;
use super::watch::Watch;
use crate::backup::PACK_LIMIT_BYTES;
use crate::backup::pack::verify_pack;
use crate::key::{ObjectKey, ParsedKey};
use crate::store::{self, ByteRange, ObjectStore, StoreError};

/// What is wrong with a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is not there.
    Absent,
    /// It is not what the manifest says.
    Damaged(String),
    /// It is, and these many of its pages have wrong checksums; the first is this block of its relation.
    Pages(u64, u32),
}

/// Size and SHA-256 of an object.
async fn digest_of(store: &dyn ObjectStore, key: &ObjectKey, watch: &Watch) -> Result<Proof, StoreError> {
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut stream = store.get(key, ByteRange::All).await?;
    while let Some(piece) = stream.try_next().await? {
        hash.update(&piece);
        size += piece.len() as u64;
        watch.took(piece.len() as u64).await;
    }
    Ok(Proof { size, sha256: hash.finalize().into() })
}

/// Reads a pack whole. `files` are those of the backup it belongs to, if their pages are to be looked at.
///
/// # Errors
/// When the store as a whole does not serve.
pub(super) async fn check_pack(
    store: &Arc<dyn ObjectStore>,
    key: &ObjectKey,
    expected: Proof,
    depth: Depth,
    files: Option<Arc<Files>>,
    watch: &Watch,
) -> Result<Option<Fault>, StoreError> {
    let checked = match depth {
        Depth::Digests => by_digest(&**store, key, expected, watch).await,
        Depth::Full => decoded(&**store, key, expected, files, watch).await,
    };
    match checked {
        Err(StoreError::NotFound { .. }) => Ok(Some(Fault::Absent)),
        Err(error) if !error.is_outage() => Ok(Some(Fault::Damaged(error.to_string()))),
        other => other,
    }
}

async fn by_digest(
    store: &dyn ObjectStore,
    key: &ObjectKey,
    expected: Proof,
    watch: &Watch,
) -> Result<Option<Fault>, StoreError> {
    if digest_of(store, key, watch).await? == expected {
        return Ok(None);
    }
    // Only what is damaged is looked at twice.
    decoded(store, key, expected, None, watch).await
}

async fn decoded(
    store: &dyn ObjectStore,
    key: &ObjectKey,
    expected: Proof,
    files: Option<Arc<Files>>,
    watch: &Watch,
) -> Result<Option<Fault>, StoreError> {
    let bytes = store::collect(store.get(key, ByteRange::All).await?, PACK_LIMIT_BYTES).await?;
    watch.took(bytes.len() as u64).await;
    let judged = tokio::task::spawn_blocking(move || judge(&bytes, expected, files.as_deref()));
    Ok(judged.await.unwrap_or_else(|error| Some(Fault::Damaged(error.to_string()))))
}

fn judge(bytes: &Bytes, expected: Proof, files: Option<&Files>) -> Option<Fault> {
    let (mut wrong, mut first) = (0, None);
    let verified = verify_pack(bytes, &mut |frame| {
        if let Some(files) = files {
            let (more, at) = files.wrong_in(&frame);
            wrong += more;
            first = first.or(at);
        }
        Ok(())
    });
    if let Err(damage) = verified {
        return Some(Fault::Damaged(damage.to_string()));
    }
    if (bytes.len() as u64, crate::digest::sha256(bytes)) != (expected.size, expected.sha256) {
        return Some(Fault::Damaged("it is a whole pack, but another one".to_owned()));
    }
    first.map(|first| Fault::Pages(wrong, first))
}

/// Why an object is not proven to be sound.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unproven {
    /// The store failed, or does not have it.
    #[error("a store failed")]
    Store(#[source] StoreError),
    /// It is damaged.
    #[error("{0}")]
    Damaged(String),
    /// Nothing says what it should be.
    #[error("nothing says what it should be")]
    NoProof,
}

/// Whether an object is what it must be: by the digest that a manifest or root has of it, or by its own.
/// Answers its size and SHA-256.
pub(super) async fn prove(store: &dyn ObjectStore, key: &ObjectKey, proof: Option<&Proof>) -> Result<Proof, Unproven> {
    let watch = Watch::default();
    if let Some(proof) = proof {
        let found = digest_of(store, key, &watch).await.map_err(Unproven::Store)?;
        return match found == *proof {
            true => Ok(found),
            false => Err(Unproven::Damaged("it does not match its size and SHA-256".to_owned())),
        };
    }
    let is_wal =
        matches!(key.parsed(), Ok(ParsedKey::Wal { .. } | ParsedKey::History { .. } | ParsedKey::Conflict { .. }));
    if !is_wal {
        return Err(Unproven::NoProof);
    }
    match wal_objects::by_digests(store, key, &watch).await {
        Ok(wal_objects::Sound { changes: None, proof, .. }) => Ok(proof),
        Ok(wal_objects::Sound { changes: Some(reason), .. }) => Err(Unproven::Damaged(reason)),
        Err(error) => {
            let reason = wal_objects::about_object(error).map_err(Unproven::Store)?;
            Err(Unproven::Damaged(reason))
        }
    }
}
