//! Letting go of what the rules do not keep: after each backup, once a day and when an operator says so.
//!
//! What goes is decided by [`repository::retention`], store by store, from the store's own root and the rules for it. Here
//! that is looked at, committed as one root commit, and swept. Invariants:
//! * a plan is committed upon the very root that it was made from, or not at all; so it does not matter who else is at work,
//!   and a coordinator that was stopped in between does no harm when it goes on;
//! * only what a committed root condemned is removed, while that root is there. A sweep takes up where any other one ended: it
//!   is repeated at start and once a day, and a crash anywhere costs nothing but time;
//! * nothing is planned, committed or removed in a store that was set back to an older copy of itself;
//! * without rules for a cluster nothing is planned for it, and everything stays.
//!
//! A store that keeps an object by a lock of its own is asked again with every sweep. One that does not let us remove
//! anything stays in use: archiving goes on.

pub mod gather;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use process::clock;
use repository::info::{KeptInfo, RetentionInfo};
use repository::name::{BackupId, ClusterName, Generation, StoreName};
use repository::retention::report::{Report, SCHEMA, StoreReport};
use repository::retention::{self, Plan, Policy, Verdict};
use repository::root::{Root, RootError};
use repository::store::{ObjectStore, StoreError};
use repository::sweep::{self, SWEEP_LIMIT, Swept};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};

use crate::Coordinator;
use crate::config::Policies;
use crate::metrics::by;
use crate::reconcile;
use crate::refusal::Refusal;
use crate::stores::{Slot, chain};

/// How often everything is looked at, whether or not a backup came.
const INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// When it is tried again if a store failed, or still lacks a backup of another one.
const RETRY: Duration = Duration::from_secs(300);
/// Most objects that are counted for people; more are "and more".
const WEIGH_LIMIT: u64 = 100_000;

/// The rules, and what came of them last.
#[derive(Debug, Default)]
pub struct Retention {
    policies: Policies,
    wanted: Notify,
    looked: Mutex<BTreeMap<(ClusterName, StoreName), Looked>>,
    /// One at a time: they would not harm but hinder each other.
    turn: Turn,
}

#[derive(Debug)]
struct Turn(Semaphore);

impl Default for Turn {
    fn default() -> Self {
        Self(Semaphore::new(1))
    }
}

/// What is known of one cluster in one store.
#[derive(Debug, Clone, Default)]
struct Looked {
    /// Backups of the newest root that was seen.
    backups: Option<Vec<BackupId>>,
    plan: Option<Plan>,
    problem: Option<String>,
    /// Rounds in a row that failed.
    failed: u32,
    swept: Swept,
    /// The root whose condemned objects were all swept.
    swept_up_to: Option<Generation>,
}

/// Why a plan was not carried out.
#[derive(Debug, thiserror::Error)]
enum NotDone {
    /// Somebody committed meanwhile; a new plan takes account of that.
    #[error("{0}")]
    Moved(String),
    /// Something failed.
    #[error("{0}")]
    Failed(String),
}

impl From<String> for NotDone {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

/// A store that was planned for.
struct Planned {
    slot: Arc<Slot>,
    root: Root,
    plan: Plan,
}

impl Retention {
    /// With the rules of the configuration.
    pub fn new(policies: Policies) -> Self {
        Self { policies, ..Self::default() }
    }

    /// The rules of a cluster in a store.
    pub fn policy(&self, cluster: &ClusterName, store: &StoreName) -> Policy {
        self.policies.of(cluster, store)
    }

    /// Whether anything is ever removed of a cluster.
    pub fn removes_anything(&self, cluster: &ClusterName) -> bool {
        self.policies.removes_anything(cluster)
    }

    /// Keeps retention from planning and removing anything until what is given is dropped. The semaphore is never closed.
    pub async fn pause(&self) -> Option<SemaphorePermit<'_>> {
        self.turn.0.acquire().await.ok()
    }

    /// Everything is looked at again soon.
    pub fn wake(&self) {
        self.wanted.notify_one();
    }

    /// Takes a look at roots that were just read: a backup that came or went is a reason to plan.
    pub fn look(&self, roots: &[(Arc<Slot>, Root)]) {
        for (slot, root) in roots {
            let backups = root.backups.iter().map(|backup| backup.backup).collect();
            let mut all = self.lock();
            let looked = all.entry((root.cluster.clone(), slot.name().clone())).or_default();
            if looked.backups.as_ref() != Some(&backups) {
                looked.backups = Some(backups);
                self.wanted.notify_one();
            }
        }
    }

    /// What `info` shows of a cluster in a store.
    pub fn info(&self, cluster: &ClusterName, store: &StoreName) -> RetentionInfo {
        let policy = self.policy(cluster, store);
        let looked = self.lock().get(&(cluster.clone(), store.clone())).cloned().unwrap_or_default();
        let plan = looked.plan.as_ref();
        let kept = plan.map(|plan| plan.backups.iter().filter(|line| line.verdict == Verdict::Keep));
        RetentionInfo {
            rules: policy.summary(),
            frozen: plan.filter(|_| !policy.keeps_everything()).and_then(|plan| plan.frozen.clone()),
            problem: looked.problem,
            locked_objects: looked.swept.retained,
            locked_until: looked.swept.retained_until,
            kept: kept
                .into_iter()
                .flatten()
                .map(|line| KeptInfo { backup: line.backup, reasons: line.reasons.clone() })
                .collect(),
        }
    }

    fn note(&self, cluster: &ClusterName, store: &StoreName, change: impl FnOnce(&mut Looked)) {
        change(self.lock().entry((cluster.clone(), store.clone())).or_default());
    }

    fn swept_up_to(&self, cluster: &ClusterName, store: &StoreName) -> Option<Generation> {
        self.lock().get(&(cluster.clone(), store.clone())).and_then(|looked| looked.swept_up_to)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(ClusterName, StoreName), Looked>> {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a round came to its end everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// It did.
    Complete,
    /// A store failed or holds back; it is worth trying again.
    Again,
}

/// Plans, commits and sweeps until the coordinator stops. The first pass over the stores wakes it.
pub async fn run(coordinator: Arc<Coordinator>) {
    let (mut pause, mut everything) = (RETRY, true);
    loop {
        tokio::select! {
            () = coordinator.stop.cancelled() => return,
            () = coordinator.retention.wanted.notified() => {}
            () = tokio::time::sleep(pause) => everything |= pause == INTERVAL,
        }
        let round = tokio::select! {
            () = coordinator.stop.cancelled() => return,
            round = round(&coordinator, clock::now(), everything) => round,
        };
        pause = if round == Round::Complete { INTERVAL } else { RETRY };
        everything = false;
    }
}

/// One round over all clusters and stores. With `everything`, what was swept before is looked at again.
pub async fn round(coordinator: &Coordinator, now: Timestamp, everything: bool) -> Round {
    let _turn = coordinator.retention.turn.0.acquire().await;
    let mut outcome = Round::Complete;
    for cluster in coordinator.clusters.names() {
        let roots = reconcile::backups::roots(coordinator, &cluster).await;
        if roots.len() < coordinator.stores.all().len() {
            outcome = Round::Again;
        }
        for (slot, root) in &roots {
            if let Some(set_back) = coordinator.roots.set_back(slot.name(), &cluster) {
                outcome = Round::Again;
                let problem = Some(set_back.to_string());
                coordinator.retention.note(&cluster, slot.name(), |looked| looked.problem = problem);
                continue;
            }
            if let Err(error) = apply_rules(coordinator, slot, root, &roots, now, everything).await {
                outcome = Round::Again;
                note_failure(coordinator, &cluster, slot, &error);
            }
        }
    }
    outcome
}

/// Says so once, and not before it failed twice: a store may be away for a moment.
fn note_failure(coordinator: &Coordinator, cluster: &ClusterName, slot: &Slot, error: &NotDone) {
    let store = slot.name();
    let NotDone::Failed(reason) = error else {
        tracing::info!(%cluster, %store, reason = %error, "retention plans again");
        coordinator.retention.wanted.notify_one();
        return;
    };
    let mut failed = 0;
    coordinator.retention.note(cluster, store, |looked| {
        looked.failed += 1;
        failed = looked.failed;
        looked.problem = Some(reason.clone());
    });
    match failed {
        1 => tracing::info!(%cluster, %store, reason, "retention was not applied; it is tried again"),
        2 => tracing::warn!(%cluster, %store, reason, "retention was not applied again; it stays to be done"),
        _ => {}
    }
}

/// What the schedule does in one store.
async fn apply_rules(
    coordinator: &Coordinator,
    slot: &Arc<Slot>,
    root: &Root,
    roots: &[(Arc<Slot>, Root)],
    now: Timestamp,
    everything: bool,
) -> Result<(), NotDone> {
    let (cluster, store) = (&root.cluster, slot.name());
    let mut newest = root.clone();
    if !coordinator.retention.policy(cluster, store).keeps_everything() {
        let planned = plan_for(coordinator, slot, root, roots, now).await?;
        if let Some(committed) = commit(coordinator, &planned, now).await? {
            newest = committed;
        }
    }
    let swept_before = coordinator.retention.swept_up_to(cluster, store);
    if everything || swept_before != Some(newest.generation) {
        sweep_by(coordinator, slot, &newest).await?;
    }
    coordinator.retention.note(cluster, store, |looked| (looked.problem, looked.failed) = (None, 0));
    Ok(())
}

async fn plan_for(
    coordinator: &Coordinator,
    slot: &Arc<Slot>,
    root: &Root,
    roots: &[(Arc<Slot>, Root)],
    now: Timestamp,
) -> Result<Planned, String> {
    let (cluster, store) = (&root.cluster, slot.name());
    let facts = gather::facts(coordinator, slot, root, roots).await?;
    let plan = retention::plan(&facts, &coordinator.retention.policy(cluster, store), now);
    let mut news = false;
    coordinator.retention.note(cluster, store, |looked| {
        let before = looked.plan.as_ref().and_then(|plan| plan.frozen.clone());
        news = plan.frozen.is_some() && before != plan.frozen;
        looked.plan = Some(plan.clone());
    });
    if let (true, Some(reason)) = (news, &plan.frozen) {
        tracing::info!(%cluster, %store, reason, "retention removes nothing");
    }
    Ok(Planned { slot: Arc::clone(slot), root: root.clone(), plan })
}

/// Commits a plan; the root then, or nothing if there is nothing to take away.
async fn commit(coordinator: &Coordinator, planned: &Planned, now: Timestamp) -> Result<Option<Root>, NotDone> {
    let Planned { slot, root, plan } = planned;
    if plan.frozen.is_some() || !plan.takes_anything(root) {
        return Ok(None);
    }
    process::crash_point!("coordinator/after-expiry-plan-before-root");
    let (cluster, store, retired) = (&root.cluster, slot.name(), plan.retired());
    let committing = coordinator.roots.commit(&*slot.store, cluster, now, |newest| newest.with_retired(&retired));
    let committed = tokio::time::timeout(coordinator.stores.patience(), committing).await;
    let committed = committed.map_err(|_| "the store did not answer in time".to_owned())?;
    let committed = committed.map_err(|error| match error {
        RootError::Moved { .. } => NotDone::Moved(chain(&error)),
        error => NotDone::Failed(chain(&error)),
    })?;
    process::crash_point!("coordinator/after-expiry-root-before-sweep");
    let backups: Vec<String> = retired.backups.iter().map(ToString::to_string).collect();
    let segments: u64 = plan.wal.iter().map(|line| line.removed_segments).sum();
    coordinator.metrics.retention_removed_backups.get_or_create(&by(store)).inc_by(backups.len() as u64);
    tracing::info!(%cluster, %store, backups = backups.join(" "), segments, generation = committed.generation.get(),
        "retention let go of backups and WAL");
    for line in plan.backups.iter().filter(|line| line.verdict == Verdict::Remove) {
        tracing::info!(%cluster, %store, backup = %line.backup, reason = line.reasons.join("; "), "a backup has expired");
    }
    // What went by our own hand is no reason to look again.
    let left = committed.backups.iter().map(|backup| backup.backup).collect();
    coordinator.retention.note(cluster, store, |looked| looked.backups = Some(left));
    reconcile::note_backups(coordinator, cluster).await.map_err(|error| chain(&error))?;
    Ok(Some(committed))
}

/// Removes what a root condemned, all of it.
async fn sweep_by(coordinator: &Coordinator, slot: &Slot, root: &Root) -> Result<Swept, String> {
    let (cluster, store) = (&root.cluster, slot.name());
    let mut total = Swept::default();
    loop {
        let swept = sweep::sweep(&*slot.store, root, SWEEP_LIMIT).await.map_err(|error| {
            // A store that does not let us remove anything is as good as before for everything else.
            if let RootError::Store(error @ StoreError::Unavailable { .. }) = &error {
                slot.judge(error);
            }
            chain(&error)
        })?;
        process::crash_point!("coordinator/after-sweep");
        total.objects += swept.objects;
        total.bytes += swept.bytes;
        (total.retained, total.retained_until) = (swept.retained, swept.retained_until);
        // What is locked is looked at again and again: without progress this is the end.
        if !swept.more || swept.objects == 0 {
            break;
        }
    }
    let metrics = &coordinator.metrics;
    metrics.retention_swept.get_or_create(&by(store)).inc_by(total.objects);
    metrics.retention_swept_bytes.get_or_create(&by(store)).inc_by(total.bytes);
    metrics.retention_locked.get_or_create(&by(store)).set(total.retained.cast_signed());
    if total.objects > 0 || total.retained > 0 {
        tracing::info!(%cluster, %store, objects = total.objects, bytes = total.bytes, locked = total.retained,
            "what was condemned was removed");
    }
    coordinator.retention.note(cluster, store, |looked| {
        looked.swept = total;
        looked.swept_up_to = (total.retained == 0).then_some(root.generation);
    });
    Ok(total)
}

/// What each store of a cluster, or one of them, would let go of now.
///
/// # Errors
/// [`Refusal::ClusterUnknown`], [`Refusal::StoreUnknown`].
pub async fn show(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    only: Option<&StoreName>,
    now: Timestamp,
) -> Result<Report, Refusal> {
    let _turn = coordinator.retention.turn.0.acquire().await;
    Ok(planned(coordinator, cluster, only, now).await?.0)
}

/// Carries out what was shown, unless anything would come out differently by now.
///
/// # Errors
/// As [`show`], and [`Refusal::PlanMoved`].
pub async fn confirm(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    only: Option<&StoreName>,
    shown: &str,
    now: Timestamp,
) -> Result<Report, Refusal> {
    let _turn = coordinator.retention.turn.0.acquire().await;
    let (mut report, planned) = planned(coordinator, cluster, only, now).await?;
    if report.plan != shown {
        return Err(Refusal::PlanMoved { cluster: cluster.clone(), shown: shown.to_owned(), now: report.plan });
    }
    for planned in planned {
        let store = report.stores.iter_mut().find(|store| store.store == *planned.slot.name());
        let done = carry_out(coordinator, &planned, now).await;
        if let Some(store) = store {
            match done {
                Ok(swept) => store.frees = Some(swept),
                Err(reason) => (store.frees, store.problem) = (None, Some(reason)),
            }
        }
    }
    report.applied = true;
    Ok(report)
}

async fn carry_out(coordinator: &Coordinator, planned: &Planned, now: Timestamp) -> Result<Swept, String> {
    let newest = commit(coordinator, planned, now).await.map_err(|error| error.to_string())?;
    sweep_by(coordinator, &planned.slot, newest.as_ref().unwrap_or(&planned.root)).await
}

async fn planned(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    only: Option<&StoreName>,
    now: Timestamp,
) -> Result<(Report, Vec<Planned>), Refusal> {
    if coordinator.clusters.systems_of(cluster).is_empty() {
        return Err(Refusal::ClusterUnknown { cluster: cluster.clone() });
    }
    if let Some(unknown) = only.filter(|only| coordinator.stores.get(only.as_str()).is_none()) {
        return Err(Refusal::StoreUnknown(unknown.to_string()));
    }
    let roots = reconcile::backups::roots(coordinator, cluster).await;
    if let Some(set_back) = only.and_then(|only| coordinator.roots.set_back(only, cluster)) {
        return Err(set_back.into());
    }
    let (mut stores, mut all) = (Vec::new(), Vec::new());
    for slot in coordinator.stores.all().iter().filter(|slot| only.is_none_or(|only| only == slot.name())) {
        let rules = coordinator.retention.policy(cluster, slot.name()).summary();
        let mut report = StoreReport { store: slot.name().clone(), rules, plan: None, problem: None, frees: None };
        let looked = match roots.iter().find(|(answered, _)| answered.name() == slot.name()) {
            None => Err(format!("it is {}", slot.health())),
            Some((slot, root)) => match coordinator.roots.set_back(slot.name(), cluster) {
                Some(set_back) => Err(set_back.to_string()),
                None => look_at(coordinator, slot, root, &roots, now).await,
            },
        };
        match looked {
            Err(reason) => report.problem = Some(reason),
            Ok((planned, frees)) => {
                (report.plan, report.frees) = (Some(planned.plan.clone()), frees);
                all.push(planned);
            }
        }
        stores.push(report);
    }
    let plan = retention::digest(all.iter().map(|planned| &planned.plan));
    Ok((Report { schema: SCHEMA.to_owned(), cluster: cluster.clone(), plan, applied: false, stores }, all))
}

/// Plans, and counts what that would free.
async fn look_at(
    coordinator: &Coordinator,
    slot: &Arc<Slot>,
    root: &Root,
    roots: &[(Arc<Slot>, Root)],
    now: Timestamp,
) -> Result<(Planned, Option<Swept>), String> {
    let planned = plan_for(coordinator, slot, root, roots, now).await?;
    let after = match planned.plan.frozen {
        Some(_) => root.clone(),
        None => root.with_retired(&planned.plan.retired()).map_err(|error| chain(&error))?,
    };
    let weighed = sweep::weigh(&*slot.store as &dyn ObjectStore, &after, WEIGH_LIMIT).await;
    let weighed = weighed.map_err(|error| chain(&error))?;
    Ok((planned, Some(weighed)))
}
