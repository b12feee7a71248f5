//! WAL that was in a store and is not there any more.
//!
//! An object that the catalog knows and that a listing, which came to its end, did not show is asked for by its key; if the
//! store says that it is not there, the store lacks it, and is filled from another one like any store that lacks something.
//! What no store has any more is *lost*: the cluster's agents are told, which forget that it was archived and send it again
//! if they still have it. What nobody has is a gap. Nothing is concluded from a store that does not answer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use process::clock::Monotonic;
use repository::name::{ClusterName, StoreName};

use super::plan::Scope;
use super::{key_of, spread_name};
use crate::Coordinator;
use crate::catalog::lost::{self as rows, Found, Listed, Lost};
use crate::catalog::wal::{self as wal_rows, WalObject};
use crate::catalog::{Catalog, CatalogResult};

/// Objects asked for at the same time.
const ASKED_AT_ONCE: usize = 8;
/// Lost objects of one system that its nodes are asked for at one time: history files, then the newest.
const LOST_LIMIT: u32 = 2048;
/// How often agents are asked again for what is lost.
const ASK_EVERY: Duration = Duration::from_secs(60);

/// What is in no store any more.
#[derive(Debug, Default)]
pub struct LostWal {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// What the agents are asked for.
    objects: BTreeSet<WalObject>,
    /// All that is lost.
    totals: Vec<Lost>,
    asked: Option<Monotonic>,
}

impl LostWal {
    /// What is lost of a cluster; nothing if nothing is.
    pub fn of(&self, cluster: &ClusterName) -> Option<Lost> {
        self.lock().totals.iter().find(|lost| lost.cluster == *cluster).cloned()
    }

    /// The same in words.
    pub fn line(&self, cluster: &ClusterName) -> Option<String> {
        let Lost { objects, first, last, .. } = self.of(cluster)?;
        Some(match objects {
            1 => format!("WAL file {first} was archived and is in no store any more"),
            _ => format!("{objects} WAL files from {first} to {last} were archived and are in no store any more"),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks each listed store for what it did not show, and notes what it lacks. If that may not be all, because more is to be asked
/// for or because only the newest was listed, the next pass lists all and goes on behind what was noted.
///
/// # Errors
/// When the catalog fails.
pub(super) async fn look_for(
    coordinator: &Coordinator,
    catalog: &Catalog,
    listed: Listed,
    scope: Scope,
) -> CatalogResult<()> {
    let not_shown = catalog.call(move |connection| rows::not_shown(connection, &listed)).await?;
    let more = not_shown.len() >= rows::LIMIT;
    let kept = not_shown.into_iter().filter(|(store, object)| coordinator.kept.keeps(store, object));
    let absent: Vec<(StoreName, WalObject)> = stream::iter(kept)
        .map(|(store, object)| async move { is_absent(coordinator, &store, &object).await.then_some((store, object)) })
        .buffer_unordered(ASKED_AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await;
    if absent.is_empty() {
        return Ok(());
    }
    if more || scope == Scope::Newest {
        coordinator.list_all.store(true, Ordering::Relaxed);
    }
    let mut counts: BTreeMap<&StoreName, u64> = BTreeMap::new();
    absent.iter().for_each(|(store, _)| *counts.entry(store).or_default() += 1);
    for (store, objects) in counts {
        tracing::warn!(%store, objects, "the store does not have WAL any more that was there");
    }
    catalog
        .call(move |connection| {
            absent.iter().try_for_each(|(store, object)| wal_rows::mark_missing(connection, store, object))
        })
        .await
}

async fn is_absent(coordinator: &Coordinator, store: &StoreName, object: &WalObject) -> bool {
    let Some(slot) = coordinator.stores.get(store.as_str()) else { return false };
    let key = key_of(object);
    matches!(tokio::time::timeout(coordinator.stores.patience(), slot.store.head(&key)).await, Ok(Ok(None)))
}

/// Looks what is in no store, says what is new, and asks the agents for it.
///
/// # Errors
/// When the catalog fails.
pub(super) async fn look(coordinator: &Coordinator) -> CatalogResult<()> {
    let stores = coordinator.stores.all().len();
    let before = coordinator.lost.lock().objects.clone();
    let found = coordinator.catalog.call(move |connection| rows::look(connection, stores, LOST_LIMIT, &before)).await?;
    let Found { objects, totals, news, back } = found;
    coordinator.metrics.wal_lost.set(totals.iter().map(|lost| lost.objects.cast_signed()).sum());
    if back > 0 {
        tracing::info!(files = back, "WAL files that were in no store are archived again, or not kept any more");
    }
    let ask = {
        let mut known = coordinator.lost.lock();
        (known.objects, known.totals) = (objects, totals);
        let due = known.asked.is_none_or(|asked| asked.elapsed() >= ASK_EVERY);
        let ask = !known.objects.is_empty() && (due || !news.is_empty());
        if ask {
            known.asked = Some(Monotonic::now());
        }
        ask
    };
    let of: BTreeSet<&ClusterName> = news.iter().map(|object| &object.cluster).collect();
    for cluster in of {
        let names: Vec<String> =
            news.iter().filter(|object| object.cluster == *cluster).map(|object| object.name.to_string()).collect();
        tracing::warn!(%cluster, files = names.len(), first = names.first(), last = names.last(),
            "WAL files that were archived are in no store any more; the agents are asked for them");
    }
    if ask {
        for cluster in coordinator.clusters.names() {
            ask_agents(coordinator, &cluster);
        }
    }
    Ok(())
}

/// Asks a cluster's agents for what is in no store any more.
pub fn ask_agents(coordinator: &Coordinator, cluster: &ClusterName) {
    let names: Vec<String> = {
        let known = coordinator.lost.lock();
        known.objects.iter().filter(|object| object.cluster == *cluster).map(spread_name).collect()
    };
    if !names.is_empty() {
        coordinator.sessions.lost(cluster, &names);
    }
}
