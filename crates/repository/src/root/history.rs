//! The history of roots in a store: finding the newest, committing the next, checking all.

use bytes::Bytes;
use jiff::Timestamp;
use uuid::Uuid;

use super::{ROOT_LIMIT_BYTES, Root, RootDamage, RootError};
use crate::key::{self, ObjectKey, ParsedKey};
use crate::name::{ClusterName, Generation, NodeName};
use crate::store::{self, LIST_LIMIT, ObjectStore, Put, StoreError};

/// How often a commit that lost to another writer starts again from the newer root.
pub(super) const COMMIT_ATTEMPTS: u32 = 16;
/// How often a create of unknown outcome is repeated.
const CREATE_ATTEMPTS: u32 = 3;

/// The newest root of a cluster; `None` if the store says that there is none.
pub async fn newest(store: &dyn ObjectStore, cluster: &ClusterName) -> Result<Option<Root>, RootError> {
    Ok(newest_committed(store, cluster).await?.map(|(root, _)| root))
}

/// Changes what exists, and gives the committed root. An edit that changes nothing commits nothing.
///
/// `edit` gets the newest root, or an empty one, and gives the changed one; it is called again whenever another writer
/// was faster. Generation, previous digest, nonce, writer and time are set here.
pub async fn commit(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    writer: &NodeName,
    now: Timestamp,
    edit: impl Fn(&Root) -> Result<Root, RootError>,
) -> Result<Root, RootError> {
    for _ in 0..COMMIT_ATTEMPTS {
        let newest = newest_committed(store, cluster).await?;
        let previous = newest.as_ref().map(|(root, sha256)| (root.generation, *sha256));
        let exists = newest.is_some();
        let base = newest.map_or_else(|| Root::empty(cluster.clone(), writer.clone(), now), |(root, _)| root);
        let edited = edit(&base)?;
        if exists && edited == base {
            return Ok(base);
        }
        let generation = match previous {
            None => Generation::FIRST,
            Some((generation, _)) => generation.next().ok_or_else(|| RootError::Refused {
                reason: format!("cluster {cluster} has used up all root generations"),
            })?,
        };
        let root = Root {
            generation,
            previous_sha256: previous.map(|(_, sha256)| sha256),
            cluster: cluster.clone(),
            nonce: Uuid::now_v7(),
            writer: writer.clone(),
            written: now,
            critical: edited.critical_names(),
            ..edited
        };
        if create(store, &root).await? == Created::Ours {
            return Ok(root);
        }
    }
    Err(RootError::Contended { store: store.name().clone(), cluster: cluster.clone() })
}

#[derive(PartialEq, Eq)]
enum Created {
    Ours,
    AnotherWriters,
}

/// Creates a generation and finds out who did if the answer does not say so.
async fn create(store: &dyn ObjectStore, root: &Root) -> Result<Created, RootError> {
    let key = key::root(&root.cluster, root.generation);
    let bytes = Bytes::from(root.to_bytes().0);
    let mut unknown = None;
    for _ in 0..CREATE_ATTEMPTS {
        match store.put_new(&key, bytes.clone().into()).await {
            Ok(Put::Created) => return Ok(Created::Ours),
            Ok(Put::Exists) => {}
            Err(error) if error.outcome_unknown() => unknown = Some(error),
            Err(error) => return Err(error.into()),
        }
        match read_generation(store, &root.cluster, root.generation).await {
            Ok(Some((there, _))) if there.nonce == root.nonce => return Ok(Created::Ours),
            Ok(Some(_)) => return Ok(Created::AnotherWriters),
            Ok(None) => {}
            Err(RootError::Store(error)) if error.is_outage() => unknown = Some(error),
            Err(error) => return Err(error),
        }
    }
    let source = unknown.unwrap_or_else(|| StoreError::NotFound { store: store.name().clone(), key });
    let (cluster, generation) = (root.cluster.clone(), root.generation);
    Err(RootError::Unknown { store: store.name().clone(), cluster, generation, source: Box::new(source) })
}

async fn newest_committed(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
) -> Result<Option<(Root, [u8; 32])>, RootError> {
    let Some(generation) = newest_generation(store, cluster).await? else {
        return Ok(None);
    };
    let found = read_generation(store, cluster, generation).await?;
    // It was just listed, and roots are never removed.
    found.map(Some).ok_or_else(|| {
        let key = key::root(cluster, generation);
        StoreError::NotFound { store: store.name().clone(), key }.into()
    })
}

/// The newest generation. Generations have no gaps, so a long history is searched by leaps, not listed.
pub(super) async fn newest_generation(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
) -> Result<Option<Generation>, RootError> {
    let (mut newest, more) = page_end(store, cluster, None, LIST_LIMIT).await?;
    let mut leap = if more { LIST_LIMIT as u64 } else { 0 };
    // A probe finds whether anything is newer than `newest + leap`; leaps double while it does, then halve.
    let mut growing = true;
    while leap > 0 {
        let at = newest.and_then(|newest| Generation::new(newest.get().saturating_add(leap)));
        let (found, _) = page_end(store, cluster, at, 1).await?;
        match found {
            Some(found) => {
                newest = Some(found);
                leap = if growing { leap.saturating_mul(2) } else { leap / 2 };
            }
            None => {
                growing = false;
                leap /= 2;
            }
        }
    }
    // The last leaps of one may stop short by the entries that came meanwhile or by rounding.
    while newest.is_some() && more {
        match page_end(store, cluster, newest, LIST_LIMIT).await? {
            (Some(found), again) => {
                newest = Some(found);
                if !again {
                    break;
                }
            }
            (None, _) => break,
        }
    }
    Ok(newest)
}

/// The last generation of the listing that starts after `after`, and whether there are more.
async fn page_end(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    after: Option<Generation>,
    limit: usize,
) -> Result<(Option<Generation>, bool), RootError> {
    let prefix = key::root_prefix(cluster);
    let after = after.map(|after| key::root(cluster, after));
    let page = store.list(&prefix, after.as_ref().map(ObjectKey::as_str), limit).await?;
    let Some(last) = page.objects.last() else {
        return Ok((None, false));
    };
    match last.key.parsed() {
        Ok(ParsedKey::Root { generation, .. }) => Ok((Some(generation), page.more)),
        _ => Err(RootError::Damaged {
            store: store.name().clone(),
            key: last.key.clone(),
            reason: "no root has such a key: something else writes into this repository".to_owned(),
        }),
    }
}

/// One root with its digest; `None` if the store says that it does not exist.
pub async fn read_generation(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    generation: Generation,
) -> Result<Option<(Root, [u8; 32])>, RootError> {
    let key = key::root(cluster, generation);
    let Some(bytes) = store::read(store, &key, ROOT_LIMIT_BYTES).await? else {
        return Ok(None);
    };
    let damaged = |reason: String| RootError::Damaged { store: store.name().clone(), key: key.clone(), reason };
    let (root, sha256) = match Root::from_bytes(&bytes) {
        Ok(read) => read,
        Err(RootDamage::Newer { what }) => {
            return Err(RootError::Newer { store: store.name().clone(), key: key.clone(), reason: what });
        }
        Err(damage) => return Err(damaged(damage.to_string())),
    };
    if root.cluster != *cluster || root.generation != generation {
        let found = format!("it says cluster {} and generation {}", root.cluster, root.generation);
        return Err(damaged(found));
    }
    Ok(Some((root, sha256)))
}

/// Reads the whole history and checks that no generation is missing and that each holds the digest of the one
/// before. Gives the newest.
pub async fn verify_history(store: &dyn ObjectStore, cluster: &ClusterName) -> Result<Option<Generation>, RootError> {
    let Some(newest) = newest_generation(store, cluster).await? else {
        return Ok(None);
    };
    let mut previous = None;
    let mut generation = Generation::FIRST;
    loop {
        let key = key::root(cluster, generation);
        let Some((root, sha256)) = read_generation(store, cluster, generation).await? else {
            return Err(StoreError::NotFound { store: store.name().clone(), key }.into());
        };
        if root.previous_sha256 != previous {
            let reason = "it does not hold the digest of the root before it".to_owned();
            return Err(RootError::Damaged { store: store.name().clone(), key, reason });
        }
        previous = Some(sha256);
        match generation.next().filter(|next| *next <= newest) {
            Some(next) => generation = next,
            None => return Ok(Some(newest)),
        }
    }
}
