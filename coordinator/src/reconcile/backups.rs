//! Backups from store to store, and operators' decisions.
//!
//! A backup is copied into a store that lacks it once the WAL it needs is there: a pin in that store's root, packs of older backups that it refers to
//! and that are not there, its own packs, then the manifest, then what is its own is read back and verified, then the store's
//! own root is committed. A crash in between leaves objects that no root names, and the next pass goes on from them.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::TryStreamExt;
use process::clock;
use repository::backup::manifest::Line;
use repository::backup::{self, VerifyDepth};
use repository::key::{self, ObjectKey, ParsedKey};
use repository::name::{BackupId, ClusterName, StoreName};
use repository::root::{Hold, Root, RootBackup, RootError};
use repository::store::{self, ByteRange, LONG_LIST_LIMIT, ObjectStore};

use crate::Coordinator;
use crate::catalog::clusters::ClusterRow;
use crate::catalog::wal::WalObject;
use crate::catalog::{Catalog, CatalogResult, backups as rows, wal as wal_rows};
use crate::clusters::silent;
use crate::intake::Announced;
use crate::metrics::by;
use crate::pins;
use crate::publish;
use crate::refusal::Refusal;
use crate::retention::gather;
use crate::stores::{Slot, chain};

/// Objects of one backup at most.
const OBJECTS_LIMIT: usize = 1_000_000;
/// Decisions of one system at most.
const DECISIONS_LIMIT: usize = 100_000;
/// Longest decision, in bytes.
const DECISION_BYTES_MAX: u64 = 1 << 20;
/// How long one object of a backup may take on its way.
const OBJECT_PATIENCE: Duration = Duration::from_secs(300);

/// What each readable store's root names. Takes up from where each keeps WAL.
pub(crate) async fn roots(coordinator: &Coordinator, cluster: &ClusterName) -> Vec<(Arc<Slot>, Root)> {
    read_roots(coordinator, cluster).await.0
}

/// The same, and whether any store keeps less WAL than was known.
async fn read_roots(coordinator: &Coordinator, cluster: &ClusterName) -> (Vec<(Arc<Slot>, Root)>, bool) {
    let (mut found, mut news) = (Vec::new(), false);
    for slot in coordinator.stores.readable() {
        let reading = coordinator.roots.newest(&*slot.store, cluster);
        match tokio::time::timeout(coordinator.stores.patience(), reading).await {
            Ok(Ok(Some(root))) => {
                news |= coordinator.kept.note(slot.name(), &root);
                found.push((slot, root));
            }
            Ok(Ok(None)) => {}
            Ok(Err(error)) => {
                tracing::error!(store = %slot.name(), %cluster, error = chain(&error), "a root cannot be read");
            }
            Err(_) => slot.judge(&silent(&slot)),
        }
    }
    if coordinator.roots.take_news() {
        // Whatever else it lost, WAL before all, shows when everything is listed.
        coordinator.list_all.store(true, Ordering::Relaxed);
        coordinator.kick.notify_one();
    }
    (found, news)
}

/// Whether a store keeps a WAL object, by its newest root.
pub(super) async fn still_keeps(coordinator: &Coordinator, slot: &Slot, object: &WalObject) -> bool {
    let reading = coordinator.roots.newest(&*slot.store, &object.cluster);
    if let Ok(Ok(Some(root))) = tokio::time::timeout(coordinator.stores.patience(), reading).await {
        coordinator.kept.note(slot.name(), &root);
    }
    coordinator.kept.keeps(slot.name(), object)
}

/// Writes down in a catalog which store has which backup and what WAL each keeps, and ends the operations that made them,
/// unless they are still at naming them in further stores.
pub(super) async fn index(
    coordinator: &Coordinator,
    catalog: &Catalog,
    cluster: &ClusterName,
) -> CatalogResult<Vec<(Arc<Slot>, Root)>> {
    let (roots, news) = read_roots(coordinator, cluster).await;
    let mut noted: Vec<(RootBackup, Vec<StoreName>)> = Vec::new();
    for (slot, root) in &roots {
        for entry in &root.backups {
            match noted.iter_mut().find(|(known, _)| known.backup == entry.backup) {
                Some((_, stores)) => stores.push(slot.name().clone()),
                None => noted.push((entry.clone(), vec![slot.name().clone()])),
            }
        }
    }
    let ended = |backup| !coordinator.operations.is_publishing(cluster, backup);
    for (entry, _) in noted.iter().filter(|(entry, _)| ended(entry.backup)) {
        coordinator.operations.complete_backup(cluster, entry.backup, entry.done(), clock::now()).await;
    }
    let named = cluster.clone();
    let ids = |root: &Root| root.backups.iter().map(|entry| entry.backup).collect::<Vec<_>>();
    // What a store had that was set back is not forgotten: it is what is to come there again.
    let has_all = |slot: &Slot| coordinator.roots.set_back(slot.name(), cluster).is_none();
    let held: Vec<(StoreName, Vec<BackupId>)> =
        roots.iter().filter(|(slot, _)| has_all(slot)).map(|(slot, root)| (slot.name().clone(), ids(root))).collect();
    catalog
        .call(move |connection| {
            for (entry, stores) in &noted {
                rows::put(connection, &named, entry.backup, &entry.to_json(), stores)?;
            }
            held.iter().try_for_each(|(store, ids)| rows::keep(connection, &named, store, ids))
        })
        .await?;
    if news {
        for system in coordinator.clusters.systems_of(cluster) {
            coordinator.kept.tell(catalog, cluster, system.system_identifier, &coordinator.stores.names()).await?;
        }
    }
    Ok(roots)
}

/// Copies backups into healthy stores that lack them, the oldest first, and takes away what earlier attempts left.
pub(super) async fn compare(coordinator: &Coordinator, cluster: &ClusterName) -> CatalogResult<()> {
    let roots = index(coordinator, &coordinator.catalog, cluster).await?;
    coordinator.retention.look(&roots);
    let healthy = coordinator.stores.healthy();
    let mut all: Vec<(&RootBackup, &Arc<Slot>, &Root)> =
        roots.iter().flat_map(|(slot, root)| root.backups.iter().map(move |entry| (entry, slot, root))).collect();
    all.sort_by_key(|(entry, ..)| entry.backup);
    all.dedup_by_key(|(entry, ..)| entry.backup);
    let takes = |slot: &Slot| {
        coordinator.roots.set_back(slot.name(), cluster).is_none()
            && healthy.iter().any(|other| other.name() == slot.name())
    };
    for (target, held) in roots.iter().filter(|(slot, _)| takes(slot)) {
        // What was removed from a store on purpose is not brought back.
        let lacks = |entry: &RootBackup| held.backup(&entry.backup).is_none() && held.may_take(entry);
        for (entry, source, from) in all.iter().filter(|(entry, ..)| lacks(entry)) {
            let hold = from.holds.iter().find(|hold| hold.backup == entry.backup);
            match copy(coordinator, cluster, entry, source, (target, held), hold).await {
                Ok(true) => {
                    let (json, stores) = (entry.to_json(), vec![target.name().clone()]);
                    let (named, id) = (cluster.clone(), entry.backup);
                    coordinator.metrics.reconcile_backups_copied.get_or_create(&by(target.name())).inc();
                    tracing::info!(%cluster, backup = %id, from = %source.name(), to = %target.name(), "a backup was copied");
                    coordinator
                        .catalog
                        .call(move |connection| rows::put(connection, &named, id, &json, &stores))
                        .await?;
                }
                Ok(false) => {}
                Err(reason) => {
                    tracing::warn!(%cluster, backup = %entry.backup, to = %target.name(), reason,
                        "a backup could not be copied; it is tried again");
                }
            }
        }
    }
    for finished in pins::leave_older(&roots.iter().map(|(_, root)| root).collect::<Vec<_>>()) {
        pins::give_up_older(coordinator, cluster, finished).await;
    }
    Ok(())
}

/// Copies one backup. Answers false when its WAL is not there yet.
async fn copy(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    entry: &RootBackup,
    source: &Slot,
    (target, held): (&Slot, &Root),
    hold: Option<&Hold>,
) -> Result<bool, String> {
    match publish::missing_wal(&*target.store, cluster, entry, &mut None).await? {
        // One without witnesses was published by an older version, where it exists already.
        None | Some(publish::Lack::Unwitnessed) => {}
        Some(publish::Lack::Missing(_)) => return Ok(false),
        Some(lack) => return Err(lack.to_string()),
    }
    let inherited = inherited_packs(coordinator, cluster, entry, source).await?;
    let parent = entry.parent.and_then(|parent| held.backup(&parent));
    let owners = owners_besides(coordinator, cluster, &inherited, parent, source).await?;
    let parent = parent.map(|parent| parent.backup);
    if !pins::for_copy(coordinator, &*target.store, cluster, entry, parent, &owners)
        .await
        .map_err(|error| chain(&error))?
    {
        return Ok(false);
    }
    for (owner, number, size_bytes) in missing_packs(cluster, inherited, target).await? {
        let pack = key::pack(cluster, &owner, number);
        let copying = copy_object(coordinator, &pack, size_bytes, &*source.store, &*target.store);
        tokio::time::timeout(OBJECT_PATIENCE, copying).await.map_err(|_| format!("{pack} took too long"))??;
    }
    copy_own(coordinator, cluster, entry, source, target).await?;
    process::crash_point!("coordinator/after-manifest-copy-before-root");
    backup::verify(&*target.store, cluster, entry, VerifyDepth::OwnContent, &coordinator.scratch)
        .await
        .map_err(|error| chain(&error))?;
    commit(coordinator, &*target.store, cluster, entry, hold).await.map_err(|error| chain(&error))?;
    Ok(true)
}

/// Copies a backup's own objects, page after page of their listing; its manifest comes last.
async fn copy_own(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    entry: &RootBackup,
    source: &Slot,
    target: &Slot,
) -> Result<(), String> {
    let (prefix, manifest) = (key::backup_prefix(cluster, &entry.backup), key::manifest(cluster, &entry.backup));
    let copied = async |key: &ObjectKey, size_bytes| {
        let copying = copy_object(coordinator, key, size_bytes, &*source.store, &*target.store);
        tokio::time::timeout(OBJECT_PATIENCE, copying).await.map_err(|_| format!("{key} took too long"))?
    };
    let (mut after, mut more) = (None, true);
    while more {
        let page =
            source.store.list(&prefix, after.as_deref(), LONG_LIST_LIMIT).await.map_err(|error| chain(&error))?;
        (after, more) = (page.objects.last().map(|object| object.key.to_string()), page.more);
        for object in page.objects.iter().filter(|object| object.key != manifest) {
            copied(&object.key, object.size).await?;
        }
    }
    copied(&manifest, entry.manifest_size).await
}

/// Names the copied backup in the target's root, held there as it is where it came from.
async fn commit(
    coordinator: &Coordinator,
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    hold: Option<&Hold>,
) -> Result<(), RootError> {
    let edit = |root: &Root| {
        let root = root.with_backup(entry.clone())?;
        let held = root.holds.iter().any(|held| held.backup == entry.backup);
        hold.filter(|_| !held).map_or_else(|| Ok(root.clone()), |hold| root.with_hold(hold.clone()))
    };
    coordinator.roots.commit(store, cluster, clock::now(), edit).await.map(drop)
}

/// The numbers and sizes of packs, by the older backup they belong to.
type Inherited = BTreeMap<BackupId, Vec<(u32, u64)>>;

/// The older backups whose packs must not be condemned while a copy is under way, besides those that its parent, if the target
/// has that one, keeps there by itself.
async fn owners_besides(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    inherited: &Inherited,
    parent: Option<&RootBackup>,
    source: &Slot,
) -> Result<Vec<BackupId>, String> {
    let Some(parent) = parent.filter(|_| !inherited.is_empty()) else { return Ok(inherited.keys().copied().collect()) };
    let known = gather::references(coordinator, &*source.store, cluster, parent).await?;
    let kept = |owner: BackupId, pack: u32| {
        let ranges = known.get(&owner).into_iter().flatten();
        owner == parent.backup || ranges.into_iter().any(|range| (range.first..=range.last).contains(&pack))
    };
    let besides = inherited.iter().filter(|(owner, packs)| !packs.iter().all(|(pack, _)| kept(**owner, *pack)));
    Ok(besides.map(|(owner, _)| *owner).collect())
}

/// Packs of older backups that a backup refers to.
async fn inherited_packs(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    entry: &RootBackup,
    source: &Slot,
) -> Result<Inherited, String> {
    if entry.inherited_bytes == 0 {
        return Ok(Inherited::new());
    }
    let mut wanted = Inherited::new();
    let lines = backup::fetch_manifest(&*source.store, cluster, entry, &coordinator.scratch).await;
    for line in lines.map_err(|error| chain(&error))? {
        match line.map_err(|damage| damage.to_string())? {
            Line::Pack(pack) => {
                let Some(owner) = pack.backup else { continue };
                wanted.entry(owner).or_default().push((pack.number, pack.size));
            }
            Line::File(_) => break,
            _ => {}
        }
    }
    Ok(wanted)
}

/// Those of them that the target lacks.
async fn missing_packs(
    cluster: &ClusterName,
    inherited: Inherited,
    target: &Slot,
) -> Result<Vec<(BackupId, u32, u64)>, String> {
    let mut missing = Vec::new();
    for (owner, packs) in inherited {
        let prefix = key::backup_prefix(cluster, &owner);
        let mut there: HashSet<(u32, u64)> = HashSet::new();
        let note = |object: store::ObjectEntry| {
            if let Ok(ParsedKey::Pack { number, .. }) = object.key.parsed() {
                there.insert((number, object.size));
            }
        };
        let listed = store::list_each(&*target.store, &prefix, OBJECTS_LIMIT, note).await;
        listed.map_err(|error| chain(&error))?;
        let lacking = packs.into_iter().filter(|pack| !there.contains(pack));
        missing.extend(lacking.map(|(number, size)| (owner, number, size)));
    }
    Ok(missing)
}

async fn copy_object(
    coordinator: &Coordinator,
    key: &ObjectKey,
    size_bytes: u64,
    source: &dyn ObjectStore,
    target: &dyn ObjectStore,
) -> Result<(), String> {
    if target.head(key).await.map_err(|error| chain(&error))? == Some(size_bytes) {
        // Verified with all the others before the commit.
        return Ok(());
    }
    let pieces = source.get(key, ByteRange::All).await.map_err(|error| chain(&error))?;
    let pieces = pieces.map_err(|error| Refusal::Stream(chain(&error)));
    let received = coordinator.intake.receive_object(size_bytes, Announced::Nothing, pieces).await;
    let (sha256, received) = received.map_err(|error| error.to_string())?;
    backup::put(target, key, &received.body(), &sha256).await.map_err(|error| chain(&error))?;
    Ok(())
}

/// Brings decisions, adoptions and evidence of conflicts to every healthy store. Each is a small object that is never
/// overwritten; the same number with other content in two stores stays as it is, and each store keeps its own.
pub(super) async fn copy_decisions(coordinator: &Coordinator, system: &ClusterRow) {
    let (cluster, identifier) = (system.cluster.clone(), system.system_identifier);
    let timelines = coordinator
        .catalog
        .call(move |connection| wal_rows::all_timelines(connection, &cluster, identifier))
        .await
        .unwrap_or_default();
    let mut prefixes =
        vec![key::decisions_prefix(&system.cluster, identifier), key::conflict_prefix(&system.cluster, identifier)];
    prefixes.extend(timelines.iter().map(|timeline| key::writer_prefix(&system.cluster, identifier, *timeline)));
    for prefix in prefixes {
        let copying = copy_small(coordinator, &prefix);
        match tokio::time::timeout(coordinator.stores.patience(), copying).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(reason)) => tracing::info!(prefix, reason, "decisions could not be compared; it is tried again"),
        }
    }
}

async fn copy_small(coordinator: &Coordinator, prefix: &str) -> Result<(), String> {
    let healthy = coordinator.stores.healthy();
    let mut held = Vec::new();
    for slot in &healthy {
        let objects = store::list_all(&*slot.store, prefix, DECISIONS_LIMIT).await.map_err(|error| chain(&error))?;
        held.push(objects);
    }
    for (index, target) in healthy.iter().enumerate() {
        for (source, objects) in healthy.iter().zip(&held) {
            for object in objects.iter().filter(|object| held[index].iter().all(|own| own.key != object.key)) {
                let bytes = store::read(&*source.store, &object.key, DECISION_BYTES_MAX).await;
                let Some(bytes) = bytes.map_err(|error| chain(&error))? else { continue };
                let put = target.store.put_new(&object.key, bytes.into()).await;
                let (store::Put::Created | store::Put::Exists) = put.map_err(|error| chain(&error))?;
            }
        }
    }
    Ok(())
}
