//! Listing all readable stores side by side and telling the catalog what each holds.
//!
//! The listings are merged in key order a page at a time, so memory does not grow with the archive. A store that fails
//! in the middle is judged and left out from there on: nothing is concluded from what it did not say, and it is named to
//! the caller. What the catalog knows and nobody showed is looked for by `lost`.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use repository::key::ParsedKey;
use repository::name::StoreName;
use repository::store::{LIST_LIMIT, ObjectEntry};

use super::fill::Adoption;
use super::lost;
use super::plan::{END, Scope, Window, windows};
use crate::Coordinator;
use crate::catalog::clusters::ClusterRow;
use crate::catalog::lost::Listed;
use crate::catalog::wal::{self as rows, ListedWal, WalObject};
use crate::catalog::{Catalog, CatalogError};
use crate::clusters::silent;
use crate::stores::Slot;

/// Objects told to the catalog at one time.
const BATCH: usize = 500;
/// Longer than a page may take, in multiples of the stores' patience: a directory looks at every file it names.
const PAGE_PATIENCE: u32 = 6;

/// Objects that the catalog did not know and that are adopted together, some 300 bytes each.
const UNKNOWN_MAX: usize = 50_000;

/// What becomes of objects that the catalog did not know, besides being known now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unknown {
    /// They are adopted.
    Adopted,
    /// Nothing.
    Noted,
}

/// What a listing found so far.
#[derive(Debug)]
struct Compared {
    scope: Scope,
    becomes: Unknown,
    /// Objects that the catalog did not know and that are to be adopted.
    unknown: Vec<ListedWal>,
    adoption: Adoption,
    /// Stores that failed before they had said everything.
    failed: BTreeSet<StoreName>,
}

impl Compared {
    async fn take(&mut self, coordinator: &Coordinator, unknown: Vec<ListedWal>) -> Result<(), CatalogError> {
        if self.becomes == Unknown::Noted {
            return Ok(());
        }
        self.unknown.extend(unknown);
        match self.unknown.len() < UNKNOWN_MAX {
            true => Ok(()),
            false => self.adoption.take(coordinator, std::mem::take(&mut self.unknown)).await,
        }
    }
}

/// Lists one system in all readable stores and updates a catalog. Answers the stores that failed before they had said
/// everything.
///
/// # Errors
/// When the catalog fails.
pub(super) async fn compare(
    coordinator: &Coordinator,
    catalog: &Catalog,
    system: &ClusterRow,
    scope: Scope,
    becomes: Unknown,
) -> Result<BTreeSet<StoreName>, CatalogError> {
    let (cluster, identifier) = (system.cluster.clone(), system.system_identifier);
    let newest = catalog.call(move |connection| rows::timelines(connection, &cluster, identifier)).await?;
    let size = system.segment_size;
    let (unknown, adoption) = (Vec::new(), Adoption::default());
    let mut compared = Compared { scope, becomes, unknown, adoption, failed: BTreeSet::new() };
    for window in windows(&system.cluster, system.system_identifier, &newest, size, scope) {
        walk(coordinator, catalog, system, &window, &mut compared).await?;
    }
    if scope == Scope::Everything {
        let (cluster, identifier) = (&system.cluster, system.system_identifier);
        coordinator.kept.tell(catalog, cluster, identifier, &coordinator.stores.names()).await?;
    }
    let Compared { unknown, mut adoption, failed, .. } = compared;
    adoption.take(coordinator, unknown).await?;
    adoption.end(coordinator).await?;
    Ok(failed)
}

/// One store's place in a listing.
struct Cursor {
    slot: Arc<Slot>,
    page: VecDeque<ObjectEntry>,
    after: Option<String>,
    more: bool,
    failed: bool,
}

impl Cursor {
    /// Makes sure that the next object is there, or that there is none.
    async fn advance(&mut self, coordinator: &Coordinator, prefix: &str) {
        while self.page.is_empty() && self.more && !self.failed {
            let listing = self.slot.store.list(prefix, self.after.as_deref(), LIST_LIMIT);
            match tokio::time::timeout(coordinator.stores.patience() * PAGE_PATIENCE, listing).await {
                Ok(Ok(page)) => {
                    self.more = page.more;
                    if let Some(last) = page.objects.last() {
                        self.after = Some(last.key.as_str().to_owned());
                    }
                    self.page = page.objects.into();
                }
                Ok(Err(error)) => {
                    self.slot.judge(&error);
                    self.failed = true;
                }
                Err(_) => {
                    self.slot.judge(&silent(&self.slot));
                    self.failed = true;
                }
            }
        }
    }
}

async fn walk(
    coordinator: &Coordinator,
    catalog: &Catalog,
    system: &ClusterRow,
    window: &Window,
    compared: &mut Compared,
) -> Result<(), CatalogError> {
    let cursor = |slot| Cursor { slot, page: VecDeque::new(), after: window.after.clone(), more: true, failed: false };
    let mut cursors: Vec<Cursor> = coordinator.stores.readable().into_iter().map(cursor).collect();
    let all = coordinator.stores.names();
    let mut batch = Vec::new();
    let (mut from, mut last) = (window.names.0.clone(), None);
    loop {
        for cursor in &mut cursors {
            let before = cursor.failed;
            cursor.advance(coordinator, &window.prefix).await;
            if cursor.failed && !before {
                compared.failed.insert(cursor.slot.name().clone());
                // What was merged so far is told while it is known who said it.
                compared.take(coordinator, tell(catalog, &mut batch, &[], &all).await?).await?;
                from = behind(last.as_ref()).unwrap_or(from);
            }
        }
        let next = cursors.iter().filter_map(|cursor| cursor.page.front()).map(|entry| &entry.key).min().cloned();
        let listed: Vec<StoreName> =
            cursors.iter().filter(|cursor| !cursor.failed).map(|cursor| cursor.slot.name().clone()).collect();
        let Some(key) = next else {
            let part = part(system, window, &listed, (from, window.names.1.clone()), &batch);
            compared.take(coordinator, tell(catalog, &mut batch, &listed, &all).await?).await?;
            return lost::look_for(coordinator, catalog, part, compared.scope).await;
        };
        let object = object_of(key.parsed().ok());
        // Contents of one name are told together, so that what lies between is known to be there or not.
        if batch.len() >= BATCH && object.as_ref().is_some_and(|object| Some(stem(object)) != last) {
            let to = behind(last.as_ref()).unwrap_or_else(|| from.clone());
            let part = part(system, window, &listed, (from, to.clone()), &batch);
            compared.take(coordinator, tell(catalog, &mut batch, &listed, &all).await?).await?;
            lost::look_for(coordinator, catalog, part, compared.scope).await?;
            from = to;
        }
        last = object.as_ref().map(stem).or(last);
        let mut present = Vec::new();
        let mut size_bytes = 0;
        for cursor in cursors.iter_mut().filter(|cursor| cursor.page.front().is_some_and(|entry| entry.key == key)) {
            if let Some(entry) = cursor.page.pop_front() {
                size_bytes = entry.size;
                present.push(cursor.slot.name().clone());
            }
        }
        if let Some(object) = object {
            let expired: Vec<StoreName> =
                all.iter().filter(|store| !coordinator.kept.keeps(store, &object)).cloned().collect();
            present.retain(|store| !expired.contains(store));
            // What its stores do not keep may be gone when it is looked at again.
            if !present.is_empty() {
                batch.push(ListedWal { object, size_bytes, present, expired });
            }
        }
    }
}

/// What the names of a file's contents, and of what belongs to it, have in common.
fn stem(object: &WalObject) -> String {
    let name = object.name.to_string();
    object.name.segment().map_or(name, |segment| segment.to_string())
}

/// Sorts behind all of those.
fn behind(stem: Option<&String>) -> Option<String> {
    stem.map(|stem| format!("{stem}{END}"))
}

/// A part of the names that was listed as a whole, with what was shown of them.
fn part(
    system: &ClusterRow,
    window: &Window,
    listed: &[StoreName],
    (from, to): (String, String),
    batch: &[ListedWal],
) -> Listed {
    Listed {
        cluster: system.cluster.clone(),
        system_identifier: system.system_identifier,
        histories: window.histories,
        from,
        to,
        stores: listed.to_vec(),
        shown: batch.iter().map(|entry| entry.object.clone()).collect(),
    }
}

async fn tell(
    catalog: &Catalog,
    batch: &mut Vec<ListedWal>,
    listed: &[StoreName],
    all: &[StoreName],
) -> Result<Vec<ListedWal>, CatalogError> {
    if batch.is_empty() {
        return Ok(Vec::new());
    }
    let (batch, listed, all) = (std::mem::take(batch), listed.to_vec(), all.to_vec());
    catalog.call(move |connection| rows::record_listing(connection, &batch, &listed, &all)).await
}

/// The WAL object that a key names; other keys, and those of later versions, are not ours to index.
fn object_of(key: Option<ParsedKey>) -> Option<WalObject> {
    match key? {
        ParsedKey::Wal { cluster, system_identifier, name, fingerprint } => {
            Some(WalObject { cluster, system_identifier, name, fingerprint: Some(fingerprint) })
        }
        ParsedKey::History { cluster, system_identifier, timeline } => Some(WalObject {
            cluster,
            system_identifier,
            name: postgres_format::WalFileName::History(timeline),
            fingerprint: None,
        }),
        _ => None,
    }
}
