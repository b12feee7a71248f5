//! The history of roots in a store: finding the newest, committing the next, checking all.
//!
//! Numbers have gaps where a store was set back, so that a number is free says nothing to whoever read a root before the gap.
//! So who created one looks behind it: a root there that does not go on from his own went on from what he read, and
//! his is an *orphan*, of no meaning: the root behind names its number as lost, and the commit is made again upon the newest.
//! Not seen is only what is created between the last read and the create of the very root that names the loss: its writer was told
//! that it is committed, and learns by the next root that he reads that it is not.
//!
//! A listing may lag, but for one of a store that was set back: who finds a number taken goes on from the root that took it,
//! whether that is listed by then or not, and who remembers a root reads no older one.

use bytes::Bytes;
use jiff::Timestamp;
use uuid::Uuid;

use super::mark::look_back;
use super::{Lost, Mark, Past, ROOT_LIMIT_BYTES, Root, RootDamage, RootError, SetBack};
use crate::key::{self, ObjectKey, ParsedKey};
use crate::name::{ClusterName, Generation, NodeName};
use crate::store::{self, LIST_LIMIT, ObjectStore, Put, StoreError};

/// How often a commit that lost to another writer starts again from the newer root.
pub(super) const COMMIT_ATTEMPTS: u32 = 16;
/// How often a create of unknown outcome is repeated.
const CREATE_ATTEMPTS: u32 = 3;

/// The newest root of a cluster; `None` if the store says that there is none.
pub async fn newest(store: &dyn ObjectStore, cluster: &ClusterName) -> Result<Option<Root>, RootError> {
    Ok(newest_committed(store, cluster, None).await?.map(|(root, _)| root))
}

/// The newest root of a cluster with its mark, and whether the store lost a root that was seen there before.
///
/// # Errors
/// When the store fails, or a root is damaged or was written by a newer version. That a store was set back is no error here.
pub async fn newest_upon(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    past: Past,
) -> Result<(Option<(Root, Mark)>, Option<SetBack>), RootError> {
    newest_from(store, cluster, past, None).await
}

async fn newest_from(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    past: Past,
    met: Option<Generation>,
) -> Result<(Option<(Root, Mark)>, Option<SetBack>), RootError> {
    let mut newest = newest_committed(store, cluster, met).await?;
    let mut set_back = None;
    if let Past::Seen(mark) | Past::Forgone(mark) = past {
        set_back = look_back(store, cluster, &mark, newest.as_ref()).await?;
        let older = newest.as_ref().is_none_or(|(root, _)| root.generation < mark.generation);
        if older && set_back.is_none() {
            let seen = read_generation(store, cluster, mark.generation).await?;
            newest = seen.filter(|(_, sha256)| *sha256 == mark.sha256).or(newest);
        }
    }
    let newest = newest.map(|(root, sha256)| {
        let mark = Mark::of(&root, sha256);
        (root, mark)
    });
    Ok((newest, set_back))
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
    Ok(commit_upon(store, cluster, writer, now, Past::Unknown, edit).await?.0)
}

/// As [`commit`], by a writer who remembers what was there; gives the mark of the root, too. Where an operator accepted that
/// the remembered root is gone, a root is committed above it even if the edit changes nothing.
///
/// # Errors
/// [`RootError::SetBack`] if the remembered root is gone and nobody accepted that.
pub async fn commit_upon(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    writer: &NodeName,
    now: Timestamp,
    past: Past,
    edit: impl Fn(&Root) -> Result<Root, RootError>,
) -> Result<(Root, Mark), RootError> {
    let mut met = None;
    for _ in 0..COMMIT_ATTEMPTS {
        let (newest, set_back) = newest_from(store, cluster, past, met).await?;
        let above = match (past, set_back) {
            (Past::Forgone(mark), Some(_)) => Some(mark.generation),
            (_, Some(set_back)) => return Err(set_back.into()),
            (_, None) => None,
        };
        let previous = newest.as_ref().map(|(_, mark)| *mark);
        let base = match &newest {
            Some((root, _)) => root.clone(),
            None => Root::empty(cluster.clone(), writer.clone(), now),
        };
        let edited = edit(&base)?;
        if let (Some(found), None) = (newest, above)
            && edited == base
        {
            return Ok(found);
        }
        let (generation, lost) = place(previous.map(|mark| mark.generation), above).ok_or_else(|| {
            RootError::Refused { reason: format!("cluster {cluster} has used up all root generations") }
        })?;
        let root = Root {
            generation,
            previous_sha256: previous.map(|mark| mark.sha256),
            lost,
            cluster: cluster.clone(),
            nonce: Uuid::now_v7(),
            writer: writer.clone(),
            written: now,
            critical: edited.critical_names(),
            ..edited
        };
        if create(store, &root).await? == Created::AnotherWriters {
            met = Some(generation);
            continue;
        }
        let mark = Mark::of(&root, root.to_bytes().1);
        if counts(store, cluster, &mark).await? {
            return Ok((root, mark));
        }
    }
    Err(RootError::Contended { store: store.name().clone(), cluster: cluster.clone() })
}

/// The number of the next root, above what is there and what was seen, and what is lost between.
fn place(newest: Option<Generation>, above: Option<Generation>) -> Option<(Generation, Option<Lost>)> {
    let next = newest.map_or(Some(Generation::FIRST), Generation::next)?;
    match above.filter(|above| *above >= next) {
        Some(last) => Some((last.next()?, Some(Lost { first: next, last }))),
        None => Some((next, None)),
    }
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

/// Whether the history goes on from a root, if it goes on: else it is an orphan.
///
/// # Errors
/// [`RootError::Unknown`] in an outage, because who just created it does not know then whether it is committed.
pub(crate) async fn counts(store: &dyn ObjectStore, cluster: &ClusterName, created: &Mark) -> Result<bool, RootError> {
    match first_behind(store, cluster, Some(created.generation)).await {
        Ok(behind) => Ok(behind.is_none_or(|(behind, _)| behind.previous_sha256 == Some(created.sha256))),
        Err(RootError::Store(source)) if source.is_outage() => Err(RootError::Unknown {
            store: store.name().clone(),
            cluster: cluster.clone(),
            generation: created.generation,
            source: Box::new(source),
        }),
        Err(error) => Err(error),
    }
}

/// The newest root that is listed, or the one that was `met` if that is newer.
async fn newest_committed(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    met: Option<Generation>,
) -> Result<Option<(Root, [u8; 32])>, RootError> {
    let Some(generation) = newest_generation(store, cluster).await?.max(met) else {
        return Ok(None);
    };
    let found = read_generation(store, cluster, generation).await?;
    // It was just listed, and roots are never removed.
    found.map(Some).ok_or_else(|| {
        let key = key::root(cluster, generation);
        StoreError::NotFound { store: store.name().clone(), key }.into()
    })
}

/// The newest generation. A long history is searched by leaps, not listed: a probe tells whether there is anything behind a
/// number, which holds with gaps as well.
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

/// The first root behind a generation, or of all.
pub(crate) async fn first_behind(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    after: Option<Generation>,
) -> Result<Option<(Root, [u8; 32])>, RootError> {
    match page_end(store, cluster, after, 1).await? {
        (Some(found), _) => read_generation(store, cluster, found).await,
        (None, _) => Ok(None),
    }
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

/// Reads the whole history, from the newest root back, and checks that no generation is missing but those that the root
/// behind them names as lost, and that each holds the digest of the one before. What lies under a lost number is an orphan and
/// not looked at. Gives the newest.
pub async fn verify_history(store: &dyn ObjectStore, cluster: &ClusterName) -> Result<Option<Generation>, RootError> {
    let newest = newest_generation(store, cluster).await?;
    let (mut next, mut behind) = (newest, None::<Root>);
    while let Some(generation) = next {
        let found = read_generation(store, cluster, generation).await?;
        let (root, sha256) = found
            .ok_or_else(|| StoreError::NotFound { store: store.name().clone(), key: key::root(cluster, generation) })?;
        if let Some(behind) = behind.filter(|behind| behind.previous_sha256 != Some(sha256)) {
            return Err(follows_nothing(store, &behind));
        }
        let first = root.lost_before().map_or(generation, |lost| lost.first);
        next = Generation::new(first.get() - 1);
        behind = Some(root);
    }
    match behind.filter(|first| first.previous_sha256.is_some()) {
        Some(first) => Err(follows_nothing(store, &first)),
        None => Ok(newest),
    }
}

fn follows_nothing(store: &dyn ObjectStore, root: &Root) -> RootError {
    let key = key::root(&root.cluster, root.generation);
    let reason = "it does not hold the digest of the root before it".to_owned();
    RootError::Damaged { store: store.name().clone(), key, reason }
}
