//! Accepting that a store was set back to an older copy of itself.
//!
//! What is there is looked at first and shown: which backups stay, which come from another store, which nobody has any more.
//! Accepting then is one durable step: a root is committed above the newest that was seen, which names what is lost. Whatever
//! fails before it leaves the store set back, and the word can be said again. Invariants:
//! * nothing is accepted but the loss that was shown, upon the very root that was looked at;
//! * the root that is committed names only backups whose parts are all there. What it does not name any more is not *gone*: it
//!   comes back from a store that has it, by [`crate::reconcile`];
//! * nothing is removed here, and retention rests meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use process::clock;
use repository::acceptance::{BackupFate, ClusterLoss, Fate, Report};
use repository::backup::{self, VerifyDepth, note};
use repository::name::{BackupId, ClusterName, Generation};
use repository::retention as rules;
use repository::root::{Pin, PinnedWal, Root, RootBackup, RootError, SetBack, System};

use crate::Coordinator;
use crate::catalog::backups as rows;
use crate::clusters::root_writer;
use crate::publish;
use crate::reconcile;
use crate::refusal::Refusal;
use crate::retention::gather;
use crate::stores::{AboutStore, Health, Slot, chain};

/// What becomes of a backup, and why.
type Judged = (Fate, String);
/// A backup that is named again, with the identifiers whose packs it refers to.
type Named = (RootBackup, Vec<BackupId>);

/// What a store lost of a cluster, and the edit that makes the best of it.
struct Loss {
    shown: ClusterLoss,
    /// What was looked at: the newest root of the store, or an empty one.
    root: Root,
    /// Backups that stay named.
    stays: BTreeSet<BackupId>,
    /// Backups that are named again.
    named: Vec<Named>,
}

/// What a store lost, of one cluster or of all; accepts that if it is what was `shown`.
///
/// # Errors
/// [`Refusal::StoreUnknown`], [`Refusal::ClusterUnknown`], [`Refusal::StoreFailed`], and [`Refusal::AcceptanceMoved`].
pub async fn accept(
    coordinator: &Coordinator,
    store: &str,
    only: Option<&ClusterName>,
    shown: Option<&str>,
) -> Result<Report, Refusal> {
    let slot = coordinator.stores.get(store).ok_or_else(|| Refusal::StoreUnknown(store.to_owned()))?;
    if slot.health() != Health::Healthy {
        let detail = format!("it is {}", slot.health());
        return Err(Refusal::StoreFailed { store: store.to_owned(), detail });
    }
    if let Some(unknown) = only.filter(|only| coordinator.clusters.systems_of(only).is_empty()) {
        return Err(Refusal::ClusterUnknown { cluster: unknown.clone() });
    }
    let _resting = match shown {
        Some(_) => coordinator.retention.pause().await,
        None => None,
    };
    let mut losses = Vec::new();
    for cluster in coordinator.clusters.names().iter().filter(|cluster| only.is_none_or(|only| only == *cluster)) {
        losses.extend(loss(coordinator, slot, cluster).await.map_err(|detail| failed(slot, detail))?);
    }
    let report = Report::new(slot.name().clone(), losses.iter().map(|loss| loss.shown.clone()).collect());
    let Some(shown) = shown else { return Ok(report) };
    if report.plan != shown {
        let (store, shown) = (store.to_owned(), shown.to_owned());
        return Err(Refusal::AcceptanceMoved { store, shown, now: report.plan });
    }
    let mut clusters = Vec::new();
    for loss in losses {
        clusters.push(carry_out(coordinator, slot, loss).await);
    }
    coordinator.list_all.store(true, Ordering::Relaxed);
    coordinator.kick.notify_one();
    coordinator.retention.wake();
    Ok(Report { applied: true, clusters, ..report })
}

fn failed(slot: &Slot, detail: String) -> Refusal {
    Refusal::StoreFailed { store: slot.name().to_string(), detail }
}

/// Accepts one loss.
async fn carry_out(coordinator: &Coordinator, slot: &Slot, loss: Loss) -> ClusterLoss {
    let (store, mut shown) = (slot.name(), loss.shown.clone());
    let cluster = &loss.shown.cluster;
    let systems: Vec<System> = coordinator
        .clusters
        .systems_of(cluster)
        .into_iter()
        .map(|row| {
            let bytes = row.segment_size.map(|size| size.bytes());
            System::new(row.system_identifier, row.postgres_major, bytes, row.since)
        })
        .collect();
    let edit =
        |root: &Root| systems.iter().try_fold(mended(root, &loss)?, |root, system| root.with_system(system.clone()));
    match coordinator.roots.commit_over_loss(&*slot.store, cluster, clock::now(), edit).await {
        Ok(root) => {
            process::crash_point!("coordinator/after-accepted-root");
            shown.next = Some(root.generation);
            tracing::warn!(%store, %cluster, seen = shown.seen.get(), generation = root.generation.get(),
                "an operator accepted that the store was set back");
        }
        Err(error) => (shown.problem, shown.next) = (Some(chain(&error)), None),
    }
    shown
}

/// The root that was looked at with the backups that are whole in its store, and no others.
fn mended(newest: &Root, loss: &Loss) -> Result<Root, RootError> {
    let mut root = loss.root.clone();
    if root.nonce != newest.nonce {
        return Err(RootError::Moved { planned: root.generation, newest: newest.generation });
    }
    root.backups.retain(|backup| loss.stays.contains(&backup.backup));
    root.holds.retain(|hold| loss.stays.contains(&hold.backup));
    // What the root refuses after all comes from another store, or was shown as what it is by the next look.
    Ok(loss.named.iter().fold(root, |root, (entry, owners)| named(&root, entry, owners).unwrap_or(root)))
}

/// With a backup that is there without its place in the root, as if it were copied from elsewhere.
fn named(root: &Root, entry: &RootBackup, owners: &[BackupId]) -> Result<Root, RootError> {
    let wal = PinnedWal {
        system_identifier: entry.system_identifier,
        timeline: entry.start_timeline,
        start_lsn: entry.start_lsn,
    };
    let pin =
        Pin { protects: owners.to_vec(), wal: Some(wal), ..Pin::new(entry.backup, None, root_writer(), clock::now()) };
    match root.pin(&entry.backup) {
        Some(_) => root.with_pin_widened(&entry.backup, None, owners, wal)?,
        None => root.with_pin(pin)?,
    }
    .with_backup(entry.clone())
}

/// What a store lost of a cluster; nothing if it has what was seen.
async fn loss(coordinator: &Coordinator, slot: &Arc<Slot>, cluster: &ClusterName) -> Result<Option<Loss>, String> {
    let reading = coordinator.roots.newest(&*slot.store, cluster);
    let found = tokio::time::timeout(coordinator.stores.patience(), reading).await;
    let found = found.map_err(|_| "it did not answer in time".to_owned())?.map_err(|error| chain(&error))?;
    let Some(SetBack { seen, found: newest, .. }) = coordinator.roots.set_back(slot.name(), cluster) else {
        return Ok(None);
    };
    let root = found.unwrap_or_else(|| Root::empty(cluster.clone(), root_writer(), clock::now()));
    let elsewhere = elsewhere(coordinator, slot, cluster).await;
    let (mut fates, mut stays, mut named) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
    for entry in &root.backups {
        let fate = match is_whole(coordinator, slot, cluster, entry).await? {
            None => {
                stays.insert(entry.backup);
                (Fate::Stays, "all its parts are there".to_owned())
            }
            Some(lack) => from_elsewhere(&elsewhere, &entry.backup, lack),
        };
        fates.insert(entry.backup, fate);
    }
    let prefixes = rules::prefixes(&*slot.store, cluster).await.map_err(|error| chain(&error))?;
    for id in prefixes.iter().filter(|id| root.backup(id).is_none() && !root.is_gone(id)) {
        if let Some((fate, entry)) = unnamed(coordinator, slot, (cluster, &root), id, &elsewhere).await? {
            fates.insert(*id, fate);
            named.extend(entry);
        }
    }
    let (asked, store) = (cluster.clone(), slot.name().clone());
    let known = coordinator.catalog.call(move |connection| rows::of_store(connection, &asked, &store)).await;
    let known = known.map_err(|error| chain(&error))?;
    let known = known.iter().filter_map(|json| RootBackup::from_json(json).ok()).map(|entry| entry.backup);
    let others = elsewhere.iter().filter(|(_, (_, entry))| root.may_take(entry)).map(|(id, _)| *id);
    for id in known.chain(others) {
        let fate = || from_elsewhere(&elsewhere, &id, "nothing of it is there any more".to_owned());
        fates.entry(id).or_insert_with(fate);
    }
    let next = newest.filter(|newest| *newest >= seen).unwrap_or(seen);
    let backups = fates.into_iter().map(|(backup, (fate, reason))| BackupFate { backup, fate, reason }).collect();
    let shown = ClusterLoss {
        cluster: cluster.clone(),
        seen,
        found: newest,
        next: Generation::next(next),
        backups,
        problem: None,
    };
    Ok(Some(Loss { shown, root, stays, named }))
}

/// The backups that other stores' roots name, with one store that has each.
type Elsewhere = BTreeMap<BackupId, (String, RootBackup)>;

async fn elsewhere(coordinator: &Coordinator, slot: &Slot, cluster: &ClusterName) -> Elsewhere {
    let mut found = Elsewhere::new();
    for (other, root) in reconcile::backups::roots(coordinator, cluster).await {
        if other.name() == slot.name() || coordinator.roots.set_back(other.name(), cluster).is_some() {
            continue;
        }
        for entry in root.backups {
            found.entry(entry.backup).or_insert_with(|| (other.name().to_string(), entry));
        }
    }
    found
}

fn from_elsewhere(elsewhere: &Elsewhere, id: &BackupId, lack: String) -> Judged {
    match elsewhere.get(id) {
        Some((store, _)) => (Fate::Copied, format!("store {store} has it")),
        None => (Fate::Lost, format!("{lack}, and no other store has it")),
    }
}

/// What a backup lacks of its parts in a store, as a listing and its manifest tell.
async fn is_whole(
    coordinator: &Coordinator,
    slot: &Slot,
    cluster: &ClusterName,
    entry: &RootBackup,
) -> Result<Option<String>, String> {
    let looking = backup::verify(&*slot.store, cluster, entry, VerifyDepth::Presence, &coordinator.scratch);
    match looking.await {
        Ok(_) => Ok(None),
        Err(error) if error.store_error().is_some_and(repository::store::StoreError::is_outage) => Err(chain(&error)),
        Err(error) => Ok(Some(chain(&error))),
    }
}

/// What becomes of what lies under an identifier that the root does not name: a backup by its manifest, or nothing.
async fn unnamed(
    coordinator: &Coordinator,
    slot: &Slot,
    (cluster, root): (&ClusterName, &Root),
    id: &BackupId,
    elsewhere: &Elsewhere,
) -> Result<Option<(Judged, Option<Named>)>, String> {
    if elsewhere.contains_key(id) {
        return Ok(Some((from_elsewhere(elsewhere, id, String::new()), None)));
    }
    let entry = match note::unpublished(&*slot.store, cluster, id, &coordinator.scratch).await {
        Ok(Some(entry)) => entry,
        // Nothing was ever published of it.
        Ok(None) => return Ok(None),
        Err(error) if error.store_error().is_some_and(repository::store::StoreError::is_outage) => {
            return Err(chain(&error));
        }
        Err(error) => return Ok(Some((from_elsewhere(elsewhere, id, chain(&error)), None))),
    };
    if let Some(lack) = is_whole(coordinator, slot, cluster, &entry).await? {
        return Ok(Some((from_elsewhere(elsewhere, id, lack), None)));
    }
    if let Some(lack) = publish::missing_wal(&*slot.store, cluster, &entry, &mut None).await? {
        return Ok(Some((from_elsewhere(elsewhere, id, lack.to_string()), None)));
    }
    let owners = gather::references(coordinator, &*slot.store, cluster, &entry).await?;
    let owners: Vec<BackupId> =
        owners.into_keys().chain(entry.attempts.iter().copied()).collect::<BTreeSet<_>>().into_iter().collect();
    Ok(Some(match named(root, &entry, &owners) {
        Ok(_) => ((Fate::Named, "all its parts and its WAL are there".to_owned()), Some((entry, owners))),
        Err(error) => (from_elsewhere(elsewhere, id, chain(&error)), None),
    }))
}
