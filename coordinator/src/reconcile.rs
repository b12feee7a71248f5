//! Bringing all stores to the same content, and the catalog to theirs.
//!
//! Whatever came by the direct road, or while a store was away, is found by listing, read and verified whole, given its
//! row in the catalog and copied to the stores that lack it: history files first, then the oldest. Backups follow once
//! their WAL is there: packs and manifest first, the commit in the target's own root last. Roots are never compared.
//!
//! Every step can be repeated, so a crash between any two costs nothing but the step: an object that is copied but not
//! noted is found present, a manifest without a root is no backup yet. Each copy goes by [`repository::wal::put`], the
//! same as a push, so that equal content collapses and other content becomes a conflict, never an overwrite. What a store's
//! retention condemned counts as absent there and is not brought back.
//!
//! Listing is incremental: every few seconds the newest part of each timeline, from a margin below the newest segment so
//! that files sent out of order are seen; the whole at start, daily, when a store has come back, when one failed before it had
//! said everything, and after a rebuild. A listing with such a failure is never put in the place of what the catalog knows.

pub(crate) mod backups;
mod fill;
mod listing;
pub mod lost;
pub mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use postgres_format::{Timeline, WalFileName};
use process::clock::{self, Monotonic};
use repository::adoption::{self, Numbered};
use repository::name::{ClusterName, StoreName};

use crate::Coordinator;
use crate::catalog::wal::{ListedWal, WalObject};
use crate::catalog::{
    Catalog, CatalogError, Renewal, backups as backup_rows, clusters as cluster_rows, wal as wal_rows,
};
use crate::clusters::{self, NewCluster};
use crate::refusal::Refusal;
use crate::stores::Slot;
use crate::writer::{Decided, Line};
use listing::Unknown;
use plan::Scope;

/// How often the newest part of each timeline is listed.
const INTERVAL: Duration = Duration::from_secs(10);
/// Between two passes at least, however often one is asked for.
const INTERVAL_MIN: Duration = Duration::from_millis(500);
/// How often everything is listed.
const FULL_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// Objects that a node is told about when it connects.
const SPREAD_ON_CONNECT: u32 = 2048;
/// Headers read per timeline after a rebuild, to find its writer.
const WRITER_SEARCH: u32 = 16;

/// What a rebuild found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// WAL objects indexed.
    pub wal_objects: u64,
    /// Backups indexed.
    pub backups: u64,
}

/// Runs passes until the coordinator stops.
pub async fn run(coordinator: Arc<Coordinator>) {
    let mut readable_before = BTreeSet::new();
    let mut full_at: Option<Monotonic> = None;
    loop {
        let readable: BTreeSet<StoreName> =
            coordinator.stores.readable().iter().map(|slot| slot.name().clone()).collect();
        let anew = coordinator.list_all.swap(false, Ordering::Relaxed);
        let due = anew || full_at.is_none_or(|last| last.elapsed() >= FULL_INTERVAL);
        let scope = if due || !readable.is_subset(&readable_before) { Scope::Everything } else { Scope::Newest };
        let passed = tokio::select! {
            () = coordinator.stop.cancelled() => return,
            passed = pass(&coordinator, scope) => passed,
        };
        match passed {
            Ok(failed) if scope == Scope::Everything => {
                // Whoever failed is away now and counts as come back when it answers; if it answers at once, all is due.
                full_at = failed.is_empty().then(Monotonic::now);
                readable_before = readable;
            }
            Ok(_) => readable_before.retain(|store| readable.contains(store)),
            Err(error) => tracing::error!(%error, "a pass over the stores failed"),
        }
        tokio::select! {
            () = coordinator.stop.cancelled() => return,
            () = coordinator.kick.notified() => tokio::time::sleep(INTERVAL_MIN).await,
            () = wait_for_work(&coordinator, &readable_before) => {}
        }
    }
}

/// Ends after the interval, or sooner when a store has come back.
async fn wait_for_work(coordinator: &Coordinator, readable_before: &BTreeSet<StoreName>) {
    let begun = Monotonic::now();
    while begun.elapsed() < INTERVAL {
        tokio::time::sleep(INTERVAL_MIN).await;
        if coordinator.stores.readable().iter().any(|slot| !readable_before.contains(slot.name())) {
            return;
        }
    }
}

/// One pass over all clusters: list, adopt, fill, then backups. Answers the stores that failed before they had said
/// everything; they are judged and left out.
///
/// # Errors
/// When the catalog fails.
pub async fn pass(coordinator: &Coordinator, scope: Scope) -> Result<BTreeSet<StoreName>, CatalogError> {
    // One pass at a time; the semaphore is never closed.
    let _turn = coordinator.pass.acquire().await;
    if scope == Scope::Everything {
        coordinator.clusters.refresh(&coordinator.stores).await?;
        for cluster in coordinator.clusters.names() {
            backups::roots(coordinator, &cluster).await;
        }
    }
    let mut failed = BTreeSet::new();
    if coordinator.stores.readable().is_empty() {
        return Ok(failed);
    }
    for system in coordinator.clusters.systems() {
        place_in_stores(coordinator, &system).await;
        let catalog = &coordinator.catalog;
        failed.extend(listing::compare(coordinator, catalog, &system, scope, Unknown::Adopted).await?);
        if scope == Scope::Everything {
            fill::look_at_histories(coordinator, &system).await;
        }
        backups::copy_decisions(coordinator, &system).await;
    }
    fill::fill_stores(coordinator).await?;
    lost::look(coordinator).await?;
    for cluster in coordinator.clusters.names() {
        backups::compare(coordinator, &cluster).await?;
    }
    coordinator.metrics.reconcile_last_pass.set(clock::now().as_second());
    Ok(failed)
}

/// A store that belongs to the repository but missed a cluster's creation gets the cluster's root.
async fn place_in_stores(coordinator: &Coordinator, system: &cluster_rows::ClusterRow) {
    let server = coordinator.sessions.nodes(Some(&system.cluster)).into_iter().map(|node| node.server);
    let server = server.into_iter().find(|server| server.system_identifier == system.system_identifier);
    let new = NewCluster {
        cluster: system.cluster.clone(),
        system_identifier: system.system_identifier,
        postgres_major: server.and_then(|server| server.postgres_major).or(system.postgres_major),
        segment_size: server.map(|server| server.segment_size).or(system.segment_size),
    };
    for slot in coordinator.stores.healthy() {
        if coordinator.roots.set_back(slot.name(), &system.cluster).is_some() {
            continue;
        }
        let commit = clusters::commit_system(&coordinator.roots, &*slot.store, &new, clock::now());
        match tokio::time::timeout(coordinator.stores.patience(), commit).await {
            Ok(Ok(_)) => {}
            // That was said already.
            Ok(Err(_)) if coordinator.roots.set_back(slot.name(), &system.cluster).is_some() => {}
            Ok(Err(reason)) => tracing::warn!(store = %slot.name(), reason, "a cluster's root was not committed"),
            Err(_) => slot.judge(&clusters::silent(&slot)),
        }
    }
}

/// Reads anew what the stores hold and puts it in the place of what the catalog knew, all at once. Nothing is copied here;
/// the next pass does.
///
/// # Errors
/// [`Refusal::StoreFailed`] when a store is away or failed before it had said everything, or when the catalog fails; what
/// the catalog knew then stays.
pub async fn rebuild(coordinator: &Coordinator) -> Result<Rebuilt, Refusal> {
    let _turn = coordinator.pass.acquire().await;
    let (renewal, failed) = gathered(coordinator).await?;
    if let Some(store) = failed.first() {
        coordinator.catalog.abandon(renewal).await;
        let detail =
            "it is away or failed while it was listed; the catalog stays as it is, repeat this when the store answers";
        return Err(Refusal::StoreFailed { store: store.to_string(), detail: detail.to_owned() });
    }
    Ok(replace(coordinator, renewal).await?)
}

/// Makes a catalog that knows nothing yet, from whatever the stores say: that is better than nothing, and the first pass
/// lists everything once more.
///
/// # Errors
/// When the catalog fails.
pub async fn fill_new(coordinator: &Coordinator) -> Result<Rebuilt, CatalogError> {
    let _turn = coordinator.pass.acquire().await;
    let (renewal, _) = gathered(coordinator).await?;
    replace(coordinator, renewal).await
}

/// A catalog gathered from the stores, and which of them were away or failed on the way.
async fn gathered(coordinator: &Coordinator) -> Result<(Renewal, BTreeSet<StoreName>), CatalogError> {
    let mut lacking = away(coordinator);
    let renewal = coordinator.catalog.begin_renewal(&coordinator.scratch).await?;
    match gather(coordinator, renewal.gathered()).await {
        Ok(failed) => {
            lacking.extend(failed);
            lacking.extend(away(coordinator));
            Ok((renewal, lacking))
        }
        Err(error) => {
            coordinator.catalog.abandon(renewal).await;
            Err(error)
        }
    }
}

fn away(coordinator: &Coordinator) -> BTreeSet<StoreName> {
    let unreadable = coordinator.stores.all().iter().filter(|slot| !slot.health().is_readable());
    unreadable.map(|slot| slot.name().clone()).collect()
}

async fn replace(coordinator: &Coordinator, renewal: Renewal) -> Result<Rebuilt, CatalogError> {
    process::crash_point!("coordinator/after-gathering-before-catalog");
    coordinator.catalog.take_over(renewal).await?;
    coordinator.clusters.reload().await?;
    if let Some(repository) = coordinator.stores.repository() {
        coordinator.catalog.call(move |connection| cluster_rows::put_repository(connection, repository)).await?;
    }
    let before = coordinator.writers.known();
    let found = adoptions(coordinator).await;
    coordinator.writers.renew(&before, found).await?;
    let rebuilt = coordinator
        .catalog
        .call(|connection| {
            Ok(Rebuilt { wal_objects: wal_rows::count(connection)?, backups: backup_rows::count(connection)? })
        })
        .await?;
    coordinator.list_all.store(true, Ordering::Relaxed);
    coordinator.kick.notify_one();
    tracing::info!(wal_objects = rebuilt.wal_objects, backups = rebuilt.backups, "the catalog was rebuilt");
    Ok(rebuilt)
}

/// Fills an empty catalog from the stores that can be read. Answers those that failed before they had said everything.
async fn gather(coordinator: &Coordinator, gathered: &Catalog) -> Result<BTreeSet<StoreName>, CatalogError> {
    let clusters::Named { mut rows, in_part } = clusters::named_by(&coordinator.stores).await;
    if in_part {
        // Who cannot be asked may be the one that knows the cluster.
        rows.extend(coordinator.clusters.systems());
    }
    let systems = gathered
        .call(move |connection| {
            rows.iter().try_for_each(|row| cluster_rows::put(connection, row))?;
            cluster_rows::all(connection)
        })
        .await?;
    let clusters: BTreeSet<&ClusterName> = systems.iter().map(|system| &system.cluster).collect();
    for cluster in &clusters {
        // What a store does not keep any more is not listed.
        backups::roots(coordinator, cluster).await;
    }
    let mut failed = BTreeSet::new();
    for system in &systems {
        failed.extend(listing::compare(coordinator, gathered, system, Scope::Everything, Unknown::Noted).await?);
        read_newest_headers(coordinator, gathered, system).await?;
    }
    for cluster in clusters {
        backups::index(coordinator, gathered, cluster).await?;
    }
    Ok(failed)
}

/// Reads the headers that tell who writes each timeline.
async fn read_newest_headers(
    coordinator: &Coordinator,
    catalog: &Catalog,
    system: &cluster_rows::ClusterRow,
) -> Result<(), CatalogError> {
    let (cluster, identifier) = (system.cluster.clone(), system.system_identifier);
    let unread = catalog
        .call(move |connection| {
            let mut unread = Vec::new();
            for timeline in wal_rows::all_timelines(connection, &cluster, identifier)? {
                unread.extend(wal_rows::newest_unread(connection, &cluster, identifier, timeline, WRITER_SEARCH)?);
            }
            unread.extend(wal_rows::unread_histories(connection, &cluster, identifier)?);
            Ok(unread)
        })
        .await?;
    for row in unread {
        fill::read_facts(coordinator, catalog, &row).await?;
    }
    Ok(())
}

/// Takes up what operators decided about writers, from stores that could not say so before. Without any it does nothing.
pub async fn take_up_adoptions(coordinator: &Coordinator) {
    for system in coordinator.clusters.systems() {
        let readable = coordinator.stores.readable().into_iter().map(|slot| slot.name().clone());
        if !coordinator.writers.unheard(&system.cluster, system.system_identifier, readable).is_empty() {
            let Said { newest, answered, .. } = adoptions_of(coordinator, &system).await;
            coordinator.writers.hear(&system.cluster, system.system_identifier, newest, answered);
        }
    }
}

/// Takes up adoptions from stores as they come, until the coordinator stops: a store may be away for longer than it is waited for
/// at the start, and a pass over the others may take hours.
pub async fn follow_adoptions(coordinator: Arc<Coordinator>) {
    loop {
        tokio::select! {
            () = coordinator.stop.cancelled() => return,
            () = tokio::time::sleep(INTERVAL_MIN) => take_up_adoptions(&coordinator).await,
        }
    }
}

/// Reads what operators decided about writers.
async fn adoptions(coordinator: &Coordinator) -> Decided {
    let mut decided = Decided::default();
    for system in coordinator.clusters.systems() {
        let (cluster, identifier) = (system.cluster.clone(), system.system_identifier);
        let timelines = coordinator
            .catalog
            .call(move |connection| wal_rows::all_timelines(connection, &cluster, identifier))
            .await
            .unwrap_or_default();
        let said = adoptions_of(coordinator, &system).await;
        let line = |timeline| Line { cluster: system.cluster.clone(), system: identifier, timeline };
        if said.whole && said.answered.len() == coordinator.stores.all().len() {
            decided.certain.extend(timelines.into_iter().chain(said.newest.keys().copied()).map(line));
        }
        decided.adopted.extend(said.newest.into_iter().map(|(timeline, word)| (line(timeline), word)));
    }
    decided
}

/// What stores say of the adoptions of one system.
struct Said {
    newest: BTreeMap<Timeline, Numbered>,
    answered: BTreeSet<StoreName>,
    /// Whether all of it could be read.
    whole: bool,
}

async fn adoptions_of(coordinator: &Coordinator, system: &cluster_rows::ClusterRow) -> Said {
    let mut said = Said { newest: BTreeMap::new(), answered: BTreeSet::new(), whole: true };
    for slot in coordinator.stores.readable() {
        let read = adoption::newest_readable(&*slot.store, &system.cluster, system.system_identifier);
        match tokio::time::timeout(coordinator.stores.patience(), read).await {
            Ok(Ok((newest, damage))) => {
                said.answered.insert(slot.name().clone());
                for (timeline, word) in newest {
                    if said.newest.get(&timeline).is_none_or(|newest| word.counts_over(newest)) {
                        said.newest.insert(timeline, word);
                    }
                }
                for error in damage {
                    said.whole = false;
                    tracing::error!(store = %slot.name(), %error, "an adoption of a writer cannot be read");
                }
            }
            Ok(Err(error)) => slot.judge(&error),
            Err(_) => slot.judge(&clusters::silent(&slot)),
        }
    }
    said
}

/// Looks which backups of a cluster the stores name, and ends the operations that made them.
///
/// # Errors
/// When the catalog fails.
pub async fn note_backups(coordinator: &Coordinator, cluster: &ClusterName) -> Result<(), CatalogError> {
    backups::index(coordinator, &coordinator.catalog, cluster).await.map(|_| ())
}

/// Tells a cluster's nodes which of the newest objects are in every store.
///
/// # Errors
/// When the catalog fails.
pub async fn tell_newest_spread(coordinator: &Coordinator, cluster: &ClusterName) -> Result<(), CatalogError> {
    let named = cluster.clone();
    let objects = coordinator
        .catalog
        .call(move |connection| wal_rows::newest_everywhere(connection, &named, SPREAD_ON_CONNECT))
        .await?;
    if !objects.is_empty() {
        coordinator.sessions.spread(cluster, &objects.iter().map(spread_name).collect::<Vec<_>>());
    }
    Ok(())
}

/// How an object is called in `WalSpread`.
fn spread_name(object: &WalObject) -> String {
    match (&object.name, &object.fingerprint) {
        (WalFileName::History(_), _) | (_, None) => object.name.to_string(),
        (name, Some(fingerprint)) => format!("{name}.{fingerprint}"),
    }
}

/// The key of an object.
fn key_of(object: &WalObject) -> repository::key::ObjectKey {
    match object.fingerprint {
        Some(fingerprint) => {
            repository::key::wal(&object.cluster, object.system_identifier, &object.name, &fingerprint)
        }
        None => repository::key::history(&object.cluster, object.system_identifier, object.name.timeline()),
    }
}

/// Stores by name, of those that are given.
fn named<'a>(slots: &'a [Arc<Slot>], entry: &ListedWal) -> Vec<&'a Arc<Slot>> {
    slots.iter().filter(|slot| entry.present.contains(slot.name())).collect()
}
