//! Finds what earlier attempts of this node left in the stores, reads what their notes tell, and has their pins taken over.
//!
//! An attempt counts only in a store in whose root its pin stands, and only until then: after the one commit that hands the
//! pin on, everything it covered is safe under this backup's pin. A store in which that commit was refused is none of this
//! backup's. Nothing here can fail a backup: whatever cannot be found out makes it send more, and the reason is told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use postgres_format::timeline_history::TimelineHistory;
use repository::backup::fetch_table;
use repository::backup::manifest::Pack;
use repository::backup::note::{self, Attempt, Note, NotedPack};
use repository::backup::pack::Extent;
use repository::key::{self, ObjectKey};
use repository::name::{BackupId, NodeName};
use repository::root::{self, Pin, Root};
use repository::store::ObjectStore;
use roaring::RoaringBitmap;

use super::{AllLeft, HeldFile, HeldKey, Laid, Left, Ours, Resume, described, lay, unfit};
use crate::archive::ship::chain;
use crate::backup::changes::wal::{self, WalPath};
use crate::backup::changes::{Geometry, MapBytes};
use crate::backup::parent::find::Library;
use crate::backup::plan::{CopyPlan, InOrder};
use crate::backup::road::BackupRoad;
use crate::backup::rows::Runs;
use crate::backup::{BackupError, pin};

/// Attempts that are looked at; the newest ones.
const ATTEMPTS_MAX: usize = 8;
/// How long a store may take to give its root, or to list what an attempt left.
const STORE_PATIENCE: Duration = Duration::from_secs(60);
/// Memory that a block of a sparse frame takes until it is written down, in bytes.
const BLOCK_BYTES: usize = 2;
/// Notes and tables of packs that are read at the same time.
const AT_ONCE: usize = 8;

/// What is needed to look.
#[derive(Clone, Copy, Debug)]
pub(in crate::backup) struct Search<'a> {
    /// The stores.
    pub(in crate::backup) library: Library<'a>,
    /// This node.
    pub(in crate::backup) node: &'a NodeName,
    /// Its data directory, in which WAL is looked for first.
    pub(in crate::backup) data_directory: &'a Path,
    /// How the server's timeline came about.
    pub(in crate::backup) history: &'a TimelineHistory,
    /// What this backup is.
    pub(in crate::backup) ours: &'a Ours,
    /// What would be read without attempts.
    pub(in crate::backup) plan: &'a CopyPlan,
    /// Sizes by which pages are counted.
    pub(in crate::backup) geometry: &'a Geometry,
}

/// What came of it.
#[derive(Debug, Default)]
pub(in crate::backup) struct GoneOn {
    /// The plan with what is left to be sent, and what is referred to; none if nothing is.
    pub(in crate::backup) laid: Option<Laid>,
    /// Lines for people: what is gone on from, or why not.
    pub(in crate::backup) told: Vec<String>,
}

/// Attempts in one store: their pins, and what lies there.
struct Shelf {
    store: Arc<dyn ObjectStore>,
    /// By the attempt, the identifier whose pin covers it.
    covered_by: BTreeMap<BackupId, BackupId>,
    left: BTreeMap<BackupId, note::Left>,
}

/// Finds attempts to go on from and takes over their pins.
pub(in crate::backup) async fn go_on(search: Search<'_>, road: &BackupRoad) -> GoneOn {
    let shelves = shelves(&search).await;
    // The store with the most packs tells; the others need only have them too.
    let weigh = |shelf: &&Shelf| shelf.left.values().map(|left| left.packs.len()).sum::<usize>();
    let Some(best) = shelves.iter().max_by_key(weigh) else { return GoneOn::default() };
    let mut told = Vec::new();
    let laid = match examine_all(&search, best, &mut told).await {
        Ok(laid) => laid,
        Err(error) => {
            told.push(format!("attempts are not gone on from: {}", chain(&error)));
            return GoneOn { told, ..GoneOn::default() };
        }
    };
    let (resume, share) = (&laid.resume, laid.share);
    let Some(newest) = resume.attempts().next() else { return GoneOn { told, ..GoneOn::default() } };
    let pins: BTreeSet<BackupId> = resume.attempts().filter_map(|id| best.covered_by.get(&id).copied()).collect();
    let holders: BTreeSet<String> = shelves
        .iter()
        .filter(|shelf| holds_all(shelf, resume, &pins))
        .map(|shelf| shelf.store.name().to_string())
        .collect();
    let taken = match pin::take_over(road, search.library.cluster, search.node, search.ours.facts.backup, &pins).await {
        Ok(taken) => taken,
        Err(reason) => {
            told.push(format!("attempt {newest} is not gone on from: {reason}"));
            return GoneOn { told, ..GoneOn::default() };
        }
    };
    let usable: BTreeSet<String> = holders.intersection(&taken).cloned().collect();
    if usable.is_empty() {
        told.push(format!("attempt {newest} is not gone on from: its pin does not stand any more where its packs are"));
        return GoneOn { told, ..GoneOn::default() };
    }
    road.builds_on(&usable);
    told.insert(0, described(newest, &share));
    GoneOn { laid: Some(laid), told }
}

/// Whether the packs that are referred to are all in a store, under the same pins.
fn holds_all(shelf: &Shelf, resume: &Resume, pins: &BTreeSet<BackupId>) -> bool {
    let standing: BTreeSet<BackupId> = shelf.covered_by.values().copied().collect();
    let has = |pack: io::Result<Pack>| {
        let Ok(pack) = pack else { return false };
        let left = pack.backup.and_then(|id| shelf.left.get(&id));
        left.is_some_and(|left| left.packs.get(&pack.number) == Some(&pack.size))
    };
    pins.is_subset(&standing) && resume.packs().all(has)
}

/// What each store has of this node's attempts. Stores that do not answer are left out.
async fn shelves(search: &Search<'_>) -> Vec<Shelf> {
    let Library { stores, cluster, .. } = search.library;
    let mut shelves = Vec::new();
    for store in stores {
        let looking = async {
            let Some(root) = root::newest(store.as_ref(), cluster).await.map_err(|error| chain(&error))? else {
                return Ok(None);
            };
            let covered_by = attempts(&root, search.node, search.ours.facts.backup);
            let mut shelf = Shelf { store: Arc::clone(store), covered_by, left: BTreeMap::new() };
            for id in shelf.covered_by.keys() {
                let left = note::left_of(store.as_ref(), cluster, id).await.map_err(|error| chain(&error))?;
                shelf.left.insert(*id, left);
            }
            // What only waits for its WAL comes to its end by itself; it and what it went on from are no attempts.
            let waits = |pin: &BackupId| shelf.left.get(pin).is_some_and(|left| left.manifest);
            let waiting: Vec<BackupId> =
                shelf.covered_by.iter().filter(|(id, pin)| waits(pin) || waits(id)).map(|(id, _)| *id).collect();
            for id in waiting {
                shelf.covered_by.remove(&id);
                shelf.left.remove(&id);
            }
            Ok::<_, String>(Some(shelf).filter(|shelf| !shelf.covered_by.is_empty()))
        };
        match tokio::time::timeout(STORE_PATIENCE, looking).await {
            Ok(Ok(Some(shelf))) => shelves.push(shelf),
            Ok(Ok(None)) => {}
            Ok(Err(reason)) => tracing::info!(store = %store.name(), reason, "attempts were not looked for"),
            Err(_) => tracing::info!(store = %store.name(), reason = "it is silent", "attempts were not looked for"),
        }
    }
    shelves
}

/// Unfinished backups of a node with the identifier whose pin covers each. Whoever asks is under way, and a node takes one at
/// a time: all its other pins are of dead ones.
fn attempts(root: &Root, node: &NodeName, ours: BackupId) -> BTreeMap<BackupId, BackupId> {
    let dead = |pin: &&Pin| pin.node == *node && pin.backup != ours && !pin.is_copy();
    let mut covered_by = BTreeMap::new();
    for pin in root.pins.iter().filter(dead) {
        for id in [pin.backup].into_iter().chain(pin.protects.iter().copied()) {
            let finished = root.backups.iter().any(|backup| backup.backup == id || backup.attempts.contains(&id));
            if !finished {
                covered_by.insert(id, pin.backup);
            }
        }
    }
    covered_by
}

/// What all attempts in a store left, laid under the plan; why others are not gone on from is added to `told`.
async fn examine_all(search: &Search<'_>, shelf: &Shelf, told: &mut Vec<String>) -> Result<Laid, BackupError> {
    let scratch = search.library.scratch;
    let mut held = Runs::create_in(scratch).map_err(BackupError::Scratch)?;
    let (mut attempts, mut packs, mut map_bytes) = (BTreeMap::new(), Vec::new(), MapBytes::default());
    for (number, id) in (0..).zip(shelf.covered_by.keys().rev().take(ATTEMPTS_MAX)) {
        let mut examined = Examined { number, held: &mut held, packs: BTreeMap::new(), failed: None };
        let found = examine(search, shelf, id, &mut examined, &mut map_bytes).await;
        let Examined { packs: of_attempt, failed, .. } = examined;
        if let Some(error) = failed {
            return Err(BackupError::Scratch(error));
        }
        match found {
            Ok(Some(left)) => {
                attempts.insert(number, left);
                packs.extend(of_attempt.into_values());
            }
            Ok(None) => {}
            Err(reason) => told.push(format!("attempt {id} is not gone on from: {reason}")),
        }
    }
    let held = held.finish().map_err(BackupError::Scratch)?;
    let (plan, geometry, scratch) = (search.plan.clone(), *search.geometry, scratch.to_owned());
    let laying = move || lay(&AllLeft { attempts, packs, held }, plan, &geometry, &scratch);
    tokio::task::spawn_blocking(laying).await.map_err(|_| BackupError::Reader)?
}

/// What the notes of one attempt tell.
struct Examined<'a> {
    number: u32,
    held: &'a mut Runs<HeldKey, HeldFile>,
    packs: BTreeMap<u32, Pack>,
    failed: Option<io::Error>,
}

/// What an attempt left, if it fits and it can be told what changed since; nothing if it stored nothing.
async fn examine(
    search: &Search<'_>,
    shelf: &Shelf,
    id: &BackupId,
    examined: &mut Examined<'_>,
    map_bytes: &mut MapBytes,
) -> Result<Option<Left>, String> {
    let Some(left) = shelf.left.get(id).filter(|left| !left.notes.is_empty()) else { return Ok(None) };
    let mut attempt: Option<Attempt> = None;
    let notes = left.notes.clone().into_iter().map(|key| read(Arc::clone(&shelf.store), key));
    let mut notes = futures_util::stream::iter(notes).buffered(AT_ONCE);
    while let Some(note) = notes.next().await {
        let Note { attempt: told, packs: noted, .. } = match note {
            Ok(note) => note,
            Err(error) => {
                // Only the packs that it tells of are lost.
                tracing::info!(attempt = %id, error, "a note cannot be read");
                continue;
            }
        };
        if attempt.is_none() {
            if let Some(reason) = unfit(&told, search.ours) {
                return Err(reason);
            }
            attempt = Some(told.clone());
        }
        if attempt.as_ref() != Some(&told) {
            return Err("its notes contradict each other".to_owned());
        }
        for pack in noted {
            take(search, shelf, left, &told, pack, examined).await;
        }
    }
    let Some(attempt) = attempt.filter(|_| !examined.packs.is_empty()) else { return Ok(None) };
    let path = WalPath {
        library: search.library,
        data_directory: search.data_directory,
        system: attempt.system_identifier,
        size: postgres_format::SegmentSize::from_bytes(attempt.segment_size_bytes)
            .map_err(|error| error.to_string())?,
        history: search.history,
        data_bytes: search.plan.bytes,
    };
    let since = attempt.start_lsn..search.ours.facts.start_lsn;
    let (changes, _) = wal::changes(&path, since, map_bytes).await?;
    Ok(Some(Left { attempt, changes }))
}

async fn read(store: Arc<dyn ObjectStore>, key: ObjectKey) -> Result<Note, String> {
    match tokio::time::timeout(STORE_PATIENCE, note::read(store.as_ref(), &key)).await {
        Ok(read) => read.map_err(|error| chain(&error)),
        Err(_) => Err(format!("store {} is silent", store.name())),
    }
}

/// Takes a noted pack into account if it is there and can be believed.
async fn take(
    search: &Search<'_>,
    shelf: &Shelf,
    left: &note::Left,
    attempt: &Attempt,
    pack: NotedPack,
    examined: &mut Examined<'_>,
) {
    // No server had written so far when the attempt was given up: the LSN is garbage, and so may be the page.
    let beyond = !attempt.from_standby && pack.newest_lsn.is_some_and(|lsn| lsn > search.ours.facts.start_lsn);
    if left.packs.get(&pack.number) != Some(&pack.size) || beyond {
        return;
    }
    let is_sparse = |extent: &Extent| extent.pages.is_some();
    let sparse = match pack.files.iter().any(|file| file.extents.iter().any(is_sparse)) {
        false => HashMap::new(),
        true => match sparse_blocks(search, shelf, attempt, &pack).await {
            Ok(blocks) => blocks,
            Err(reason) => {
                tracing::info!(attempt = %attempt.backup, pack = pack.number, reason, "a pack's table cannot be read");
                return;
            }
        },
    };
    for file in pack.files {
        if file.extents.iter().any(|extent| extent.pack != pack.number) {
            continue;
        }
        let sparse = sparse.get(&file.number.0).cloned().unwrap_or_default();
        let held_bytes =
            file.path.as_bytes().len() + size_of_val(&file.extents[..]) + BLOCK_BYTES * sparse.len() as usize;
        let key = (InOrder(file.path.as_path().to_owned()), examined.number);
        let held = HeldFile { number: file.number, extents: file.extents, sparse };
        if let Err(error) = examined.held.push(key, held, held_bytes) {
            examined.failed.get_or_insert(error);
        }
    }
    let NotedPack { number, size, sha256, .. } = pack;
    examined.packs.insert(number, Pack { backup: Some(attempt.backup), number, size, sha256 });
}

/// By file number, the blocks that lie in a pack's sparse frames, as its table tells.
async fn sparse_blocks(
    search: &Search<'_>,
    shelf: &Shelf,
    attempt: &Attempt,
    pack: &NotedPack,
) -> Result<HashMap<u32, RoaringBitmap>, String> {
    let key = key::pack(search.library.cluster, &attempt.backup, pack.number);
    let reading = fetch_table(shelf.store.as_ref(), &key, pack.size);
    let table = tokio::time::timeout(STORE_PATIENCE, reading).await.map_err(|_| "the store is silent".to_owned())?;
    let table = table.map_err(|error| chain(&error))?;
    let extents = pack.files.iter().flat_map(|file| file.extents.iter().map(move |extent| (file.number, extent)));
    let sparse: Vec<_> = extents.filter(|(_, extent)| extent.pages.is_some()).collect();
    let mut blocks: HashMap<u32, RoaringBitmap> = HashMap::new();
    for frame in &table {
        let inside = |(number, extent): &&(_, &Extent)| {
            *number == frame.file && (extent.offset..extent.end()).contains(&frame.position)
        };
        if sparse.iter().find(inside).is_none() {
            continue;
        }
        let of_file = blocks.entry(frame.file.0).or_default();
        let page_bytes = search.geometry.page_bytes;
        of_file.extend(frame.units.iter().filter_map(|unit| u32::try_from(unit.from / page_bytes).ok()));
    }
    Ok(blocks)
}
