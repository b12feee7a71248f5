//! Adopting objects that came by the direct road, and filling stores that lack some.
//!
//! Both are one thing: read the object from a store that has it, verify every byte by decoding it, put it into each
//! healthy store that lacks it, note it in the catalog. A damaged copy is left where it is and another store is asked.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use postgres_format::WalFileName;
use repository::key::{self, ObjectKey, ParsedKey};
use repository::name::{NodeName, StoreName};
use repository::store::{self, ByteRange, ObjectStore, StoreError};
use repository::wal::{self, EncodedWal, Expected, Together, VariantCheck, WalDecoder, WalError, WalHeader};

use super::{key_of, named, spread_name};
use crate::Coordinator;
use crate::archive_service::row;
use crate::catalog::clusters::ClusterRow;
use crate::catalog::wal::{self as rows, ListedWal, WalObject, WalRow};
use crate::catalog::{Catalog, CatalogError, CatalogResult, expired, senders};
use crate::clusters::silent;
use crate::intake::{Announced, Received};
use crate::metrics::by;
use crate::refusal::Refusal;
use crate::stores::{Slot, chain};
use crate::writer::Line;

/// Objects copied at the same time.
const COPIES: usize = 4;
/// Objects that are looked up at one time.
const BATCH: u32 = 64;
/// Histories of one system at most.
const HISTORIES_MAX: usize = 100_000;
/// Bytes a second that a copy is given time for.
const BYTES_PER_SECOND_MIN: u64 = 1 << 20;

/// Objects of one system that the catalog did not know, adopted as they are found.
#[derive(Debug, Default)]
pub(super) struct Adoption {
    found: usize,
    adopted: u64,
    /// Timelines that nobody had written before.
    unwritten: HashSet<Line>,
    seen: HashSet<Line>,
    /// The newest segment that each node sent out of recovery for each timeline: bounded by nodes and timelines, however many
    /// objects there are.
    newest: HashMap<(Line, NodeName), WalFileName>,
}

impl Adoption {
    /// Reads, verifies, notes and copies some.
    ///
    /// # Errors
    /// When the catalog fails.
    pub(super) async fn take(&mut self, coordinator: &Coordinator, new: Vec<ListedWal>) -> CatalogResult<()> {
        let mut in_order = new;
        // History files first: without them nobody can follow a promotion.
        in_order.sort_by_key(|entry| (!matches!(entry.object.name, WalFileName::History(_)), entry.object.clone()));
        self.found += in_order.len();
        for line in in_order.iter().map(|entry| line_of(&entry.object)) {
            if self.seen.insert(line.clone()) && coordinator.writers.of(&line).await?.is_none() {
                self.unwritten.insert(line);
            }
        }
        let mut adopted =
            stream::iter(in_order).map(|entry| async move { adopt_one(coordinator, &entry).await }).buffered(COPIES);
        while let Some(header) = adopted.try_next().await? {
            self.note(header);
        }
        Ok(())
    }

    fn note(&mut self, header: Option<WalHeader>) {
        let Some(header) = header else { return };
        self.adopted += 1;
        if header.in_recovery || !matches!(header.name, WalFileName::Segment(_)) {
            return;
        }
        let line = Line { cluster: header.cluster, system: header.system_identifier, timeline: header.name.timeline() };
        let newest = self.newest.entry((line, header.node)).or_insert(header.name);
        *newest = (*newest).max(header.name);
    }

    /// Sees who writes each timeline, once all have been taken: that shows in the newest of what came, not in what happened to
    /// be looked at first.
    ///
    /// # Errors
    /// When the catalog fails.
    pub(super) async fn end(self, coordinator: &Coordinator) -> CatalogResult<()> {
        if self.found == 0 {
            return Ok(());
        }
        for line in &self.unwritten {
            coordinator.writers.release(line);
        }
        for ((line, node), name) in &self.newest {
            look_for_strangers(coordinator, line, node, name).await?;
        }
        coordinator.metrics.reconcile_adopted.inc_by(self.adopted);
        tracing::info!(found = self.found, adopted = self.adopted, "objects that came by the direct road were adopted");
        Ok(())
    }
}

fn line_of(object: &WalObject) -> Line {
    Line { cluster: object.cluster.clone(), system: object.system_identifier, timeline: object.name.timeline() }
}

async fn adopt_one(coordinator: &Coordinator, entry: &ListedWal) -> CatalogResult<Option<WalHeader>> {
    let sources = coordinator.stores.readable();
    let sources = named(&sources, entry);
    let Some((encoded, received)) = fetch(coordinator, &entry.object, entry.size_bytes, &sources).await else {
        return Ok(None);
    };
    copy(coordinator, &encoded, &received, &entry.present).await?;
    look_for_conflict(coordinator, &entry.object).await?;
    Ok(Some(encoded.header))
}

/// Fills every healthy store with what it lacks, the oldest first, until nothing can be done any more.
pub(super) async fn fill_stores(coordinator: &Coordinator) -> CatalogResult<()> {
    let mut given_up: HashSet<WalObject> = HashSet::new();
    for slot in coordinator.stores.healthy() {
        while coordinator.stores.healthy().iter().any(|healthy| healthy.name() == slot.name()) {
            let (store, limit) = (slot.name().clone(), BATCH + given_up.len() as u32);
            let stores = coordinator.stores.all().len();
            let oldest = coordinator
                .catalog
                .call(move |connection| rows::oldest_missing(connection, &store, stores, limit))
                .await?;
            let batch: Vec<WalRow> = oldest.into_iter().filter(|row| !given_up.contains(&row.object)).collect();
            if batch.is_empty() {
                break;
            }
            let filled: Vec<(WalObject, bool)> = stream::iter(batch)
                .map(|row| async move { fill_one(coordinator, &row).await.map(|filled| (row.object, filled)) })
                .buffered(COPIES)
                .try_collect()
                .await?;
            given_up.extend(filled.into_iter().filter(|(_, filled)| !filled).map(|(object, _)| object));
        }
    }
    Ok(())
}

async fn fill_one(coordinator: &Coordinator, row: &WalRow) -> CatalogResult<bool> {
    let object = row.object.clone();
    let lacking = coordinator.catalog.call(move |connection| rows::stores_lacking(connection, &object)).await?;
    let readable = coordinator.stores.readable();
    let sources: Vec<&Arc<Slot>> = readable.iter().filter(|slot| !lacking.contains(slot.name())).collect();
    let Some((encoded, received)) = fetch(coordinator, &row.object, row.size_bytes, &sources).await else {
        return Ok(false);
    };
    let present: Vec<StoreName> =
        coordinator.stores.names().into_iter().filter(|name| !lacking.contains(name)).collect();
    copy(coordinator, &encoded, &received, &present).await
}

/// Reads an object whole from the first store that has it undamaged.
async fn fetch(
    coordinator: &Coordinator,
    object: &WalObject,
    size_bytes: u64,
    sources: &[&Arc<Slot>],
) -> Option<(EncodedWal, Received)> {
    let key = key_of(object);
    let patience = coordinator.stores.patience() + Duration::from_secs(size_bytes / BYTES_PER_SECOND_MIN);
    for slot in sources {
        let reading = read_verified(coordinator, slot, &key, size_bytes);
        match tokio::time::timeout(patience, reading).await {
            Ok(Ok(found)) => {
                coordinator.stores.complaints().settle(slot.name(), &key);
                return Some(found);
            }
            // The store went away while it was read; that was said already.
            Ok(Err(_)) if !slot.health().is_readable() => {}
            // Its retention removed it just now.
            Ok(Err(_)) if !super::backups::still_keeps(coordinator, slot, object).await => {}
            Ok(Err(reason)) => {
                if coordinator.stores.complaints().is_new(slot.name(), &key, &reason) {
                    tracing::error!(store = %slot.name(), key = %key, reason, "a stored object cannot be read whole");
                    coordinator.metrics.reconcile_damaged.inc();
                }
            }
            Err(_) => slot.judge(&silent(slot)),
        }
    }
    None
}

async fn read_verified(
    coordinator: &Coordinator,
    slot: &Slot,
    key: &repository::key::ObjectKey,
    size_bytes: u64,
) -> Result<(EncodedWal, Received), String> {
    let judged = |error: StoreError| {
        slot.judge(&error);
        Refusal::Stream(chain(&error))
    };
    let pieces = slot.store.get(key, ByteRange::All).await.map_err(judged).map_err(|error| error.to_string())?;
    let coming = pieces.map_err(judged);
    let received = coordinator.intake.receive_wal(size_bytes, Announced::Nothing, coming).await;
    let (encoded, received) = received.map_err(|error| error.to_string())?;
    let mut decoder = WalDecoder::new(Expected::under(key)).map_err(|error| chain(&error))?;
    let mut chunks = received.body().chunks();
    while let Some(chunk) = chunks.try_next().await.map_err(|error| error.to_string())? {
        decoder.push(&chunk, &mut std::io::sink()).map_err(|error| chain(&error))?;
    }
    decoder.finish().map_err(|error| chain(&error))?;
    Ok((encoded, received))
}

/// Puts a verified object into every healthy store that lacks it and keeps WAL of there, and notes it. Answers whether all of
/// those have it.
async fn copy(
    coordinator: &Coordinator,
    encoded: &EncodedWal,
    received: &Received,
    present: &[StoreName],
) -> CatalogResult<bool> {
    // The body's memory or file lives as long as this.
    let _hold = received.keep();
    let mut present = present.to_vec();
    let mut all = true;
    let object = row(&encoded.header, encoded.body.len()).object;
    for slot in coordinator.stores.healthy() {
        if present.contains(slot.name()) || !coordinator.kept.keeps(slot.name(), &object) {
            continue;
        }
        match put(coordinator, &slot, encoded).await {
            true => {
                process::crash_point!("coordinator/after-adoption-copy-before-catalog");
                coordinator.metrics.reconcile_copied.get_or_create(&by(slot.name())).inc();
                present.push(slot.name().clone());
            }
            false => all = false,
        }
    }
    let row = row(&encoded.header, encoded.body.len());
    let missing: Vec<StoreName> =
        coordinator.stores.names().into_iter().filter(|name| !present.contains(name)).collect();
    let (gone, missing): (Vec<_>, Vec<_>) =
        missing.into_iter().partition(|store| !coordinator.kept.keeps(store, &object));
    let everywhere = missing.is_empty();
    coordinator
        .catalog
        .call(move |connection| {
            rows::note_stored(connection, &row, &present, &missing)?;
            gone.iter().try_for_each(|store| expired::mark(connection, store, &row.object))
        })
        .await?;
    if everywhere {
        coordinator.sessions.spread(&object.cluster, &[spread_name(&object)]);
    }
    Ok(all)
}

async fn put(coordinator: &Coordinator, slot: &Slot, encoded: &EncodedWal) -> bool {
    let patience = coordinator.stores.patience() + Duration::from_secs(encoded.body.len() / BYTES_PER_SECOND_MIN);
    match tokio::time::timeout(patience, wal::put(&*slot.store, encoded, VariantCheck::List)).await {
        Ok(Ok(_)) => true,
        Ok(Err(error @ WalError::Conflict { .. })) => {
            // Both contents are in the store now: there is nothing left to copy, and a human must choose.
            coordinator.metrics.wal_conflicts.inc();
            tracing::error!(store = %slot.name(), error = %chain(&error), "one WAL file has two contents");
            true
        }
        Ok(Err(WalError::Store(error))) => {
            slot.judge(&error);
            tracing::info!(store = %slot.name(), error = %chain(&error), "a copy failed and is tried again");
            false
        }
        Ok(Err(error)) => {
            if coordinator.stores.complaints().is_new(slot.name(), &encoded.key(), &error.to_string()) {
                tracing::error!(store = %slot.name(), error = %chain(&error), "a copy failed");
            }
            false
        }
        Err(_) => {
            slot.judge(&silent(slot));
            false
        }
    }
}

/// Somebody may have written a timeline by the direct road that another node writes.
async fn look_for_strangers(
    coordinator: &Coordinator,
    line: &Line,
    node: &NodeName,
    name: &WalFileName,
) -> CatalogResult<()> {
    let Some(writer) = coordinator.writers.of(line).await?.filter(|writer| writer != node) else { return Ok(()) };
    let (cluster, system) = (line.cluster.clone(), line.system);
    let openers = coordinator.catalog.call(move |connection| senders::openers(connection, &cluster, system)).await?;
    let moved_on = |(timeline, opener): &(postgres_format::Timeline, _)| *timeline > line.timeline && opener == node;
    if !openers.iter().any(moved_on) {
        tracing::error!(cluster = %line.cluster, %name, %node, %writer,
            "a node sent WAL by the direct road for a timeline that another node writes");
    }
    Ok(())
}

async fn look_for_conflict(coordinator: &Coordinator, object: &WalObject) -> CatalogResult<()> {
    let (cluster, system, name) = (object.cluster.clone(), object.system_identifier, object.name);
    if matches!(name, WalFileName::Partial(_) | WalFileName::History(_)) {
        return Ok(());
    }
    let variants = coordinator
        .catalog
        .call(move |connection| rows::complete_variants(connection, &cluster, system, &name))
        .await?;
    if variants > 1 {
        coordinator.metrics.wal_conflicts.inc();
        tracing::error!(cluster = %object.cluster, %name, variants,
            "one WAL file has several contents; an operator must choose which is served");
    }
    Ok(())
}

/// Compares the histories that several stores hold: a listing does not tell their contents apart.
pub(super) async fn look_at_histories(coordinator: &Coordinator, system: &ClusterRow) {
    let (cluster, identifier) = (&system.cluster, system.system_identifier);
    let prefix = key::history_prefix(cluster, identifier);
    let readable = coordinator.stores.readable();
    let mut held: BTreeMap<ObjectKey, Vec<&Arc<Slot>>> = BTreeMap::new();
    for slot in &readable {
        let listing = store::list_all(&*slot.store, &prefix, HISTORIES_MAX);
        match tokio::time::timeout(coordinator.stores.patience(), listing).await {
            Ok(Ok(listed)) => listed.into_iter().for_each(|entry| held.entry(entry.key).or_default().push(slot)),
            Ok(Err(error)) => slot.judge(&error),
            Err(_) => slot.judge(&silent(slot)),
        }
    }
    for (key, slots) in held.into_iter().filter(|(_, slots)| slots.len() > 1) {
        let Ok(ParsedKey::History { timeline, .. }) = key.parsed() else { continue };
        let name = WalFileName::History(timeline);
        let stores: Vec<Arc<dyn ObjectStore>> = slots.iter().map(|slot| Arc::clone(&slot.store)).collect();
        let asked = wal::together(&stores, cluster, identifier, &name);
        if let Ok(Ok(Together::Conflict(variants))) = tokio::time::timeout(coordinator.stores.patience(), asked).await {
            let contents: Vec<String> = variants.iter().map(wal::Variant::content_name).collect();
            let contents = contents.join(", ");
            if coordinator.stores.complaints().is_new(slots[0].name(), &key, &contents) {
                coordinator.metrics.wal_conflicts.inc();
                tracing::error!(%cluster, %name, contents,
                    "stores hold one WAL file in several contents; an operator must choose which is served");
            }
        }
    }
}

/// Reads the header of an object and notes what it says about its sender.
pub(super) async fn read_facts(
    coordinator: &Coordinator,
    catalog: &Catalog,
    unread: &WalRow,
) -> Result<(), CatalogError> {
    let key = key_of(&unread.object);
    for slot in coordinator.stores.readable() {
        let reading = wal::read_header(&*slot.store, &key, unread.size_bytes);
        if let Ok(Ok(header)) = tokio::time::timeout(coordinator.stores.patience(), reading).await {
            let row = row(&header, unread.size_bytes);
            return catalog.call(move |connection| rows::note_stored(connection, &row, &[], &[])).await;
        }
    }
    Ok(())
}
