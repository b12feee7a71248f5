//! Pins: saying in every store's root that a backup is under way before its first object is sent.
//!
//! A store in which the pin could not be committed gets the backup all the same, if nothing it needs was condemned there
//! meanwhile; that is decided by the publication. A pin is taken away here only when the attempt is known to be dead: its
//! node said so and kept nothing, never got the order, or has finished a later one, for it takes one at a time. Of a node that fell silent
//! nothing is known, and its pin stays; so does that of a failed attempt that the node can go on from.
//!
//! Which of two attempts is the later one is not told by their identifiers, which are of clocks, but by the history of roots: a
//! node pins a backup when none of its others runs, so what stood in the root that first pinned it had ended.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use process::clock;
use repository::key;
use repository::name::{BackupId, ClusterName, Generation, NodeName, StoreName};
use repository::root::{self, Pin, PinnedWal, Root, RootBackup, RootError};
use repository::store::ObjectStore;

use crate::Coordinator;
use crate::clusters::root_writer;
use crate::refusal::Refusal;
use crate::stores::{Slot, chain};

/// How many roots are looked through for the one that first pinned a backup.
const ROOTS_LOOKED_AT: usize = 64;

/// Pins a backup that is about to be ordered in every healthy store.
pub async fn begin(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    backup: BackupId,
    node: &NodeName,
    now: Timestamp,
) {
    let pin = Pin::new(backup, None, node.clone(), now);
    in_every_store(coordinator, cluster, |root| root.with_pin(pin.clone())).await;
}

/// Takes the pin of an attempt that is known to be dead away.
pub async fn give_up(coordinator: &Coordinator, cluster: &ClusterName, backup: BackupId) {
    in_every_store(coordinator, cluster, |root| Ok(root.without_pin(&backup))).await;
}

/// Pins a backup in every healthy store if it is not pinned yet, and has its pin take over those of attempts. Gives the stores
/// in which that is so now.
///
/// # Errors
/// [`Refusal::Precondition`] if an attempt is under way.
pub async fn take_over(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    node: &NodeName,
    backup: BackupId,
    attempts: &[BackupId],
) -> Result<Vec<StoreName>, Refusal> {
    let running = running(coordinator);
    if let Some(attempt) = attempts.iter().find(|attempt| running.contains(attempt)) {
        return Err(Refusal::Precondition(format!("backup {attempt} is under way: nothing can take its place")));
    }
    let pin = Pin::new(backup, None, node.clone(), clock::now());
    let edit = |root: &Root| {
        let standing = root.pin(&backup).is_some() || root.backup(&backup).is_some();
        let pinned = if standing { root.clone() } else { root.with_pin(pin.clone())? };
        let foreign = |id: &&BackupId| root.pin(id).is_some_and(|pin| pin.node != *node);
        if let Some(id) = attempts.iter().find(foreign) {
            return Err(RootError::Refused { reason: format!("{id} is another node's") });
        }
        if attempts.is_empty() { Ok(pinned) } else { pinned.with_taken_over(&backup, attempts) }
    };
    Ok(in_every_store(coordinator, cluster, edit).await)
}

fn running(coordinator: &Coordinator) -> Vec<BackupId> {
    coordinator.operations.running().into_iter().filter_map(|operation| operation.backup).collect()
}

/// Takes away what earlier attempts of a node left, now that it finished another one. What only waits for its WAL stays; what
/// exists in another store stays, for it is to be copied; and so do attempts that the other went on from, in stores that it is
/// still to be copied to. What cannot be told to be earlier stays until the node finishes the next one.
pub async fn give_up_older(coordinator: &Coordinator, cluster: &ClusterName, finished: &RootBackup) {
    let running = running(coordinator);
    let mut roots = Vec::new();
    for slot in coordinator.stores.healthy() {
        let reading = coordinator.roots.newest(&*slot.store, cluster);
        // Reconciliation reads the same root, and tells what is wrong with it.
        if let Ok(Ok(Some(root))) = tokio::time::timeout(coordinator.stores.patience(), reading).await {
            roots.push((slot, root));
        }
    }
    let older = |pin: &Pin| is_older(pin, finished) && !running.contains(&pin.backup);
    let mut left = Vec::new();
    for (slot, root) in &roots {
        let needed = |id: &BackupId| root.backup(&finished.backup).is_none() && finished.attempts.contains(id);
        for pin in root.pins.iter().filter(|pin| older(pin) && !needed(&pin.backup)) {
            if !may_come(coordinator, cluster, &pin.backup).await {
                left.push((slot.name(), pin));
            }
        }
    }
    // What stays anyway costs no search.
    if left.is_empty() {
        return;
    }
    let mut firsts = Vec::new();
    for (slot, root) in &roots {
        firsts.extend(first_with(coordinator, slot, root, finished).await);
    }
    for (slot, _) in &roots {
        let ended = |(store, pin): &&(&StoreName, &Pin)| *store == slot.name() && had_ended(pin, finished, &firsts);
        let dead: Vec<BackupId> = left.iter().filter(ended).map(|(_, pin)| pin.backup).collect();
        if dead.is_empty() {
            continue;
        }
        let edit = |root: &Root| Ok(dead.iter().fold(root.clone(), |root, dead| root.without_pin(dead)));
        let giving_up = async { coordinator.roots.commit(&*slot.store, cluster, clock::now(), edit).await.map(drop) };
        judge(coordinator, cluster, slot, giving_up).await;
    }
}

/// PURE: whether a pin may be that of an attempt before a finished one of its node; by the clocks that named them.
pub(crate) fn is_older(pin: &Pin, finished: &RootBackup) -> bool {
    pin.node == finished.node && pin.backup < finished.backup
}

/// PURE: whether an attempt had ended for certain before a finished one of its node began: it stood where the node pinned that
/// one. `firsts` are the first roots that told of the finished one, of each store; one that came by a copy was pinned by another.
pub(crate) fn had_ended(pin: &Pin, finished: &RootBackup, firsts: &[Arc<Root>]) -> bool {
    let by_node = |root: &&Arc<Root>| root.pin(&finished.backup).is_some_and(|own| own.node == finished.node);
    firsts.iter().filter(by_node).any(|root| root.pin(&pin.backup).is_some_and(|pin| pin.node == finished.node))
}

/// What is known of the roots that first told of finished backups, the newest of each node. Roots never change, so each is looked
/// for once, and a search that takes too long is gone on with later.
#[derive(Debug, Default)]
pub struct Firsts {
    known: Mutex<BTreeMap<(StoreName, ClusterName, NodeName), Search>>,
}

/// A search for the root that first told of a backup, from the newest back.
#[derive(Debug)]
struct Search {
    backup: BackupId,
    /// The first one so far.
    first: Arc<Root>,
    /// How many may still be read.
    left: usize,
    /// Whether it is the first of all.
    found: bool,
}

impl Search {
    /// Begins at the newest root; `None` if it does not tell of the backup.
    fn of(backup: BackupId, newest: &Root) -> Option<Self> {
        let begun = || Self { backup, first: Arc::new(newest.clone()), left: ROOTS_LOOKED_AT, found: false };
        tells(newest, &backup).then(begun)
    }

    async fn go_on(&mut self, store: &dyn ObjectStore) {
        while !self.found && self.left > 0 {
            let before = match before(&self.first) {
                Some(before) => root::read_generation(store, &self.first.cluster, before).await,
                None => return self.found = true,
            };
            match before {
                Ok(Some((root, _))) if tells(&root, &self.backup) => {
                    (self.first, self.left) = (Arc::new(root), self.left - 1);
                }
                Ok(Some(_)) => self.found = true,
                Ok(None) | Err(_) => return,
            }
        }
    }
}

fn tells(root: &Root, backup: &BackupId) -> bool {
    root.pin(backup).is_some() || root.backup(backup).is_some()
}

/// The first root of a store that pinned or named a backup. `None` if it is too far away, or was not found yet.
async fn first_with(coordinator: &Coordinator, slot: &Slot, newest: &Root, finished: &RootBackup) -> Option<Arc<Root>> {
    let known = || coordinator.firsts.known.lock().unwrap_or_else(PoisonError::into_inner);
    let place = (slot.name().clone(), newest.cluster.clone(), finished.node.clone());
    let begun = known().remove(&place).filter(|search| search.backup == finished.backup);
    let mut search = begun.or_else(|| Search::of(finished.backup, newest))?;
    // How far it came counts, not whether it came to its end.
    let _ = tokio::time::timeout(coordinator.stores.patience(), search.go_on(&*slot.store)).await;
    let first = search.found.then(|| Arc::clone(&search.first));
    known().insert(place, search);
    first
}

/// PURE: the number of the root that one was committed upon; none of the first.
pub(crate) fn before(root: &Root) -> Option<Generation> {
    root.previous_sha256?;
    let behind = root.lost_before().map_or(root.generation, |lost| lost.first);
    Generation::new(behind.get() - 1)
}

/// PURE: of each node the newest backup that exists, if an earlier attempt of the node is pinned beside it. One that went
/// straight into a store left it to us to take the pins of such attempts away: it saw that store only.
pub fn leave_older<'a>(roots: &[&'a Root]) -> Vec<&'a RootBackup> {
    let mut newest: Vec<&RootBackup> = Vec::new();
    for backup in roots.iter().flat_map(|root| &root.backups) {
        match newest.iter_mut().find(|known| known.node == backup.node) {
            Some(known) if known.backup < backup.backup => *known = backup,
            Some(_) => {}
            None => newest.push(backup),
        }
    }
    newest.retain(|finished| roots.iter().flat_map(|root| &root.pins).any(|pin| is_older(pin, finished)));
    newest
}

/// Whether an attempt got as far as its manifest, in whichever store: then it exists there, or may yet, and comes to the others
/// by a copy, which its pin there must not be taken from. A store that is away cannot say no.
async fn may_come(coordinator: &Coordinator, cluster: &ClusterName, backup: &BackupId) -> bool {
    let manifest = key::manifest(cluster, backup);
    for slot in coordinator.stores.all() {
        if !slot.health().is_readable() {
            return true;
        }
        let asked = tokio::time::timeout(coordinator.stores.patience(), slot.store.head(&manifest)).await;
        if !matches!(asked, Ok(Ok(None))) {
            return true;
        }
    }
    false
}

/// Edits the root of every healthy store. Gives those in which that was done.
async fn in_every_store(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    edit: impl Fn(&Root) -> Result<Root, RootError>,
) -> Vec<StoreName> {
    let mut done = Vec::new();
    for slot in coordinator.stores.healthy() {
        let commit = async { coordinator.roots.commit(&*slot.store, cluster, clock::now(), &edit).await.map(drop) };
        if judge(coordinator, cluster, &slot, commit).await {
            done.push(slot.name().clone());
        }
    }
    done
}

/// Waits for a commit, and judges the store by it. Answers whether it was made.
async fn judge(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    slot: &Slot,
    commit: impl Future<Output = Result<(), RootError>>,
) -> bool {
    let reason = match tokio::time::timeout(coordinator.stores.patience(), commit).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => {
            if let RootError::Store(error) = &error
                && error.is_outage()
            {
                slot.judge(error);
            }
            chain(&error)
        }
        Err(_) => {
            let silence = crate::clusters::silent(slot);
            slot.judge(&silence);
            chain(&silence)
        }
    };
    tracing::info!(%cluster, store = %slot.name(), reason, "a pin was not changed");
    false
}

/// Pins a backup that is about to be copied into a store, with all identifiers whose packs it refers to and the WAL it needs.
/// `parent` is the backup it was built on, if the store has it: what that one refers to is safe as long as it is pinned.
/// Answers false when it can never be a backup there: something of it was condemned.
///
/// # Errors
/// When the store fails.
pub async fn for_copy(
    coordinator: &Coordinator,
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    parent: Option<BackupId>,
    owners: &[BackupId],
) -> Result<bool, RootError> {
    let now = clock::now();
    let wal = PinnedWal {
        system_identifier: entry.system_identifier,
        timeline: entry.start_timeline,
        start_lsn: entry.start_lsn,
    };
    let pin = Pin { protects: owners.to_vec(), wal: Some(wal), ..Pin::new(entry.backup, parent, root_writer(), now) };
    let edit = |root: &Root| match root.pin(&entry.backup) {
        Some(_) => root.with_pin_widened(&entry.backup, parent, owners, wal),
        None => root.with_pin(pin.clone()),
    };
    match coordinator.roots.commit(store, cluster, now, edit).await {
        Ok(_) => Ok(true),
        Err(RootError::Refused { reason }) => {
            tracing::debug!(%cluster, backup = %entry.backup, store = %store.name(), reason, "a backup is not copied");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}
