//! Making a backup exist: in each store that has all its parts and the WAL it needs, one root commit.
//!
//! A root must never name a backup that cannot be restored from that store alone. So per store, in this order: manifest
//! and every pack are there with their sizes; the WAL from start to stop is there, waited for with a deadline, and is that of
//! the server whose files were read, by the backup's witnesses (a clone writes WAL of the same names); then the commit. Stores that lack something are named as lagging and filled by reconciliation. Repeating all of it is harmless.
//!
//! A store that fails or falls silent on the way is lagging like any other: the others publish without waiting for it. Only
//! when none could, and one of them was away, is everything tried again for [`OUTAGE_PATIENCE`].

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{SegmentName, SegmentNumber, SegmentSize, Timeline, WalFileName};
use process::clock::{self, Monotonic};
use proto::archive::{PublishBackupRequest, PublishBackupResponse};
use proto::convert::{FieldError, parsed};
use repository::backup::pack::PACK_TARGET_BYTES;
use repository::backup::{self, VerifyDepth};
use repository::coverage::LsnRange;
use repository::key;
use repository::name::{BackupId, ClusterName, StoreName};
use repository::root::{self, Root, RootBackup, RootError};
use repository::store::{LIST_LIMIT, ObjectStore, StoreError};
use repository::wal::{self, Located};
use repository::wal_index;
use repository::witness::{self, Testimony};

use crate::Coordinator;
use crate::catalog::backups as rows;
use crate::clusters::silent;
use crate::operations::WaitingBackup;
use crate::refusal::Refusal;
use crate::stores::{AboutStore, Slot, chain};

/// How long WAL is waited for when the caller does not say.
const WAL_WAIT_DEFAULT: Duration = Duration::from_secs(120);
/// The longest that a caller may ask for.
const WAL_WAIT_MAX: Duration = Duration::from_secs(3600);
/// How long a store is waited for when all of them are away.
const OUTAGE_PATIENCE: Duration = Duration::from_secs(60);
/// How long WAL is waited for before a backup is kept that may be.
const KEPT_AFTER: Duration = Duration::from_secs(20);
/// Time between two attempts during an outage.
const OUTAGE_PAUSE: Duration = Duration::from_secs(1);
/// Bytes a second that reading a manifest is given time for.
const BYTES_PER_SECOND_MIN: u64 = 1 << 20;
/// Pause after which a store is asked again for WAL that is not there yet, the first time and at most; each is twice the one
/// before. The last segment was just switched, and is mostly there in a moment.
const WAL_POLLS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Publishes a backup in every store that can have it.
///
/// # Errors
/// [`Refusal::NotPublished`] when no store can, with the reason of each.
pub async fn publish(
    coordinator: &Coordinator,
    request: PublishBackupRequest,
) -> Result<PublishBackupResponse, Refusal> {
    let cluster: ClusterName = parsed("cluster", &request.cluster)?;
    let id: BackupId = parsed("backup", &request.backup)?;
    let entry = RootBackup::from_json(&request.root_entry_json)
        .map_err(|error| FieldError::new("root_entry_json", error.to_string()))?;
    if entry.backup != id {
        return Err(FieldError::new("root_entry_json", format!("is about backup {}", entry.backup)).into());
    }
    coordinator.clusters.expect(&cluster, entry.system_identifier)?;
    if let Some(detail) = crate::lines::left_by(coordinator, &cluster, &entry).await {
        return Err(Refusal::NotPublished { backup: id.to_string(), detail });
    }
    let wait = match request.wal_wait_seconds {
        0 => WAL_WAIT_DEFAULT,
        seconds => Duration::from_secs(seconds.into()).min(WAL_WAIT_MAX),
    };
    let wait = if request.may_be_kept { wait.min(KEPT_AFTER) } else { wait };
    let until = Monotonic::now() + wait;
    let Attempted { published, reasons, waiting, .. } = publish_somewhere(coordinator, &cluster, &entry, until).await;
    if published.is_empty() {
        if let Some(missing) = waiting.filter(|_| request.may_be_kept) {
            return Ok(keep(coordinator, &cluster, &entry, missing).await);
        }
        let detail = if reasons.is_empty() { "no store is healthy".to_owned() } else { reasons.join("; ") };
        return Err(Refusal::NotPublished { backup: id.to_string(), detail });
    }
    for reason in reasons {
        tracing::info!(%cluster, backup = %id, reason, "a store does not have the backup yet");
    }
    conclude(coordinator, &cluster, &entry, &published).await;
    let lagging = coordinator.stores.names().into_iter().filter(|name| !published.contains(name));
    Ok(PublishBackupResponse {
        lagging: lagging.map(|name| name.to_string()).collect(),
        stores: published.iter().map(ToString::to_string).collect(),
        waiting_for: String::new(),
    })
}

/// Notes that a backup exists in these stores, and ends what made it.
pub(crate) async fn conclude(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    entry: &RootBackup,
    published: &[StoreName],
) {
    let (json, stores, named, id) = (entry.to_json(), published.to_vec(), cluster.clone(), entry.backup);
    coordinator.catalog.note(move |connection| rows::put(connection, &named, id, &json, &stores)).await;
    coordinator.operations.complete_backup(cluster, id, entry.done(), clock::now()).await;
    crate::pins::give_up_older(coordinator, cluster, entry).await;
    coordinator.kick.notify_one();
    tracing::info!(%cluster, backup = %id, stores = published.len(), "a backup was published");
}

/// Keeps a backup that lacks nothing but WAL: its pin stands, and [`crate::waiting`] publishes it.
async fn keep(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    entry: &RootBackup,
    missing: String,
) -> PublishBackupResponse {
    let waiting = WaitingBackup {
        cluster: cluster.clone(),
        node: entry.node.clone(),
        backup: entry.backup,
        missing: missing.clone(),
    };
    coordinator.operations.wait_for_wal(waiting, clock::now()).await;
    PublishBackupResponse { waiting_for: missing, ..PublishBackupResponse::default() }
}

/// What came of one attempt in all healthy stores.
pub(crate) struct Attempted {
    pub(crate) published: Vec<StoreName>,
    /// A line each for the others.
    pub(crate) reasons: Vec<String>,
    /// Where the backup is pinned and lacks nothing but WAL: what is missing there.
    pub(crate) waiting: Option<String>,
    /// Whether time may help: a store that was asked was away, or there was none.
    outage: bool,
}

/// Publishes in every healthy store; again while none could and an outage may be the reason.
async fn publish_somewhere(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    entry: &RootBackup,
    until: Monotonic,
) -> Attempted {
    let give_up = until.min(Monotonic::now() + OUTAGE_PATIENCE);
    loop {
        let attempted = publish_in_all(coordinator, cluster, entry, until).await;
        if !attempted.published.is_empty() || !attempted.outage || Monotonic::now() >= give_up {
            return attempted;
        }
        tokio::time::sleep(OUTAGE_PAUSE).await;
        coordinator.stores.check().await;
    }
}

pub(crate) async fn publish_in_all(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    entry: &RootBackup,
    until: Monotonic,
) -> Attempted {
    let _publishing = coordinator.operations.publishing(cluster, entry.backup);
    let healthy = coordinator.stores.healthy();
    let attempts = healthy.iter().map(|slot| publish_in(coordinator, slot, cluster, entry, until));
    let (published, reasons, outage) = (Vec::new(), Vec::new(), healthy.is_empty());
    let mut attempted = Attempted { published, reasons, waiting: None, outage };
    for (slot, attempt) in healthy.iter().zip(join_all(attempts).await) {
        let reason = match attempt {
            Ok(()) => {
                attempted.published.push(slot.name().clone());
                continue;
            }
            Err(Unpublished::Away(reason)) => {
                attempted.outage = true;
                reason
            }
            Err(Unpublished::Lacking(reason)) => reason,
            Err(Unpublished::Waiting { missing, reason }) => {
                if attempted.waiting.is_none() && is_pinned(&*slot.store, cluster, entry).await {
                    attempted.waiting = Some(missing);
                }
                reason
            }
        };
        attempted.reasons.push(format!("store {}: {reason}", slot.name()));
    }
    attempted
}

async fn is_pinned(store: &dyn ObjectStore, cluster: &ClusterName, entry: &RootBackup) -> bool {
    let root = root::newest(store, cluster).await.ok().flatten();
    root.is_some_and(|root| root.pin(&entry.backup).is_some())
}

/// Why a store does not name a backup.
enum Unpublished {
    /// WAL is not there that may still come, or be chosen.
    Waiting {
        /// What is waited for.
        missing: String,
        /// The same as a line.
        reason: String,
    },
    /// The store failed or fell silent.
    Away(String),
    /// Something is not there or not whole.
    Lacking(String),
}

/// Publishes in one store, or says why not; ends when the store turns out to be away.
async fn publish_in(
    coordinator: &Coordinator,
    slot: &Arc<Slot>,
    cluster: &ClusterName,
    entry: &RootBackup,
    until: Monotonic,
) -> Result<(), Unpublished> {
    let store = &*slot.store;
    if let Some(set_back) = coordinator.roots.set_back(slot.name(), cluster) {
        return Err(Unpublished::Lacking(set_back.to_string()));
    }
    let publishing = async {
        let verifying = backup::verify(store, cluster, entry, VerifyDepth::Presence, &coordinator.scratch);
        let in_time = tokio::time::timeout(allowance(coordinator.stores.patience(), entry), verifying).await;
        let Ok(verified) = in_time else {
            let silence = silent(slot);
            return Err(unpublished(slot, Some(&silence), &silence));
        };
        verified.map_err(|error| unpublished(slot, error.store_error(), &error))?;
        await_wal(store, cluster, entry, until).await?;
        process::crash_point!("coordinator/after-parts-before-backup-root");
        let committed = commit_entry(coordinator, store, cluster, entry).await;
        committed.map_err(|error| unpublished(slot, store_error(&error), &error))?;
        process::crash_point!("coordinator/after-backup-root-before-catalog");
        Ok(())
    };
    tokio::select! {
        biased;
        published = publishing => published,
        reason = slot.no_longer_healthy() => Err(Unpublished::Away(reason)),
    }
}

/// How long a store may take to show that a backup's parts are there: a listing of its packs and of those that it inherits,
/// and its manifest.
fn allowance(patience: Duration, entry: &RootBackup) -> Duration {
    let packs = u64::from(entry.packs) + entry.inherited_bytes / PACK_TARGET_BYTES;
    let pages = 1 + u32::try_from(packs / LIST_LIMIT as u64).unwrap_or(u32::MAX);
    patience.saturating_mul(pages) + Duration::from_secs(entry.manifest_size / BYTES_PER_SECOND_MIN)
}

fn store_error(error: &RootError) -> Option<&StoreError> {
    match error {
        RootError::Store(error) => Some(error),
        _ => None,
    }
}

/// What an error says about the store, which is judged by it, and about the backup.
fn unpublished(slot: &Slot, about_store: Option<&StoreError>, error: &dyn std::error::Error) -> Unpublished {
    match about_store {
        Some(outage) if outage.is_outage() => {
            slot.judge(outage);
            Unpublished::Away(chain(error))
        }
        _ => Unpublished::Lacking(chain(error)),
    }
}

/// Names the backup in the store's root.
///
/// # Errors
/// The reason, for people.
pub async fn commit(
    coordinator: &Coordinator,
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
) -> Result<(), String> {
    commit_entry(coordinator, store, cluster, entry).await.map_err(|error| chain(&error))
}

async fn commit_entry(
    coordinator: &Coordinator,
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
) -> Result<(), RootError> {
    let entry = entry.clone();
    let edit = move |root: &Root| root.with_backup(entry.clone());
    coordinator.roots.commit(store, cluster, clock::now(), edit).await.map(drop)
}

/// Waits until a store has all WAL that a backup needs.
#[cfg(test)]
pub(crate) async fn wait_for_wal(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    until: Monotonic,
) -> Result<(), String> {
    await_wal(store, cluster, entry, until).await.map_err(|why| match why {
        Unpublished::Away(reason) | Unpublished::Lacking(reason) | Unpublished::Waiting { reason, .. } => reason,
    })
}

/// Waits until a store has all WAL that a backup needs.
async fn await_wal(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    until: Monotonic,
) -> Result<(), Unpublished> {
    let (mut have, (mut pause, longest)) = (None, WAL_POLLS);
    loop {
        let why = match missing_wal(store, cluster, entry, &mut have).await {
            Ok(None) => return Ok(()),
            Ok(Some(lack @ (Lack::Foreign(_) | Lack::Unwitnessed))) => {
                return Err(Unpublished::Lacking(lack.to_string()));
            }
            Ok(Some(lack @ Lack::Contested(_))) => {
                let reason = lack.to_string();
                return Err(Unpublished::Waiting { missing: format!("an operator: {reason}"), reason });
            }
            Ok(Some(Lack::Missing(name))) => {
                let missing = format!("WAL {name}");
                Unpublished::Waiting { missing, reason: Lack::Missing(name).to_string() }
            }
            // A store may fail for a moment; the deadline bounds it.
            Err(reason) => Unpublished::Lacking(reason),
        };
        if Monotonic::now() >= until {
            return Err(why);
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(longest);
    }
}

/// What keeps a backup's WAL from being whole in a store.
#[derive(Debug, thiserror::Error)]
pub enum Lack {
    /// This file is not there yet.
    #[error("WAL {0} is not there, which the backup needs; is archiving under way?")]
    Missing(String),
    /// This file has contents that exclude each other.
    #[error("WAL {0} has two contents; an operator must choose")]
    Contested(String),
    /// This file is not of the server whose files are in the backup.
    #[error(
        "WAL {0} is another server's than the one whose files were read, so that the backup could not be recovered: two \
         servers write one timeline, as a clone and its original do; give the clone a cluster of its own, or adopt it"
    )]
    Foreign(String),
    /// The backup does not say what WAL is its own.
    #[error("the backup names no witnesses of its WAL; the agent that took it must be of this version or a later one")]
    Unwitnessed,
}

/// What a store lacks of the WAL between a backup's start and stop: the first file that is not there, or the proof that they
/// are its own server's. `have` remembers how far it was complete.
///
/// # Errors
/// The reason, for people.
pub async fn missing_wal(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    have: &mut Option<SegmentNumber>,
) -> Result<Option<Lack>, String> {
    if let Some(history) = missing_history(store, cluster, entry).await? {
        return Ok(Some(Lack::Missing(history)));
    }
    let size = SegmentSize::from_bytes(entry.segment_size_bytes).map_err(|error| error.to_string())?;
    if entry.start_timeline != entry.stop_timeline {
        return match whole_path(store, cluster, entry).await? {
            Ok(history) => contradicted(store, cluster, entry, &history).await,
            Err(missing) => Ok(Some(Lack::Missing(missing))),
        };
    }
    let first = SegmentNumber::containing(entry.start_lsn, size);
    let last = SegmentNumber::last_before(entry.stop_lsn, size);
    let mut number = have.map_or(first, SegmentNumber::next);
    while number <= last {
        let name = WalFileName::Segment(SegmentName::new(entry.stop_timeline, number, size));
        let located = wal::locate(store, cluster, entry.system_identifier, &name).await;
        match located.map_err(|error| chain(&error))? {
            Located::Object { key, size, .. } if number == last => {
                let header = wal::read_header(store, &key, size).await.map_err(|error| chain(&error))?;
                if !header.complete {
                    return Ok(Some(Lack::Missing(name.to_string())));
                }
            }
            Located::Object { .. } => {}
            Located::Absent | Located::Incomplete { .. } => return Ok(Some(Lack::Missing(name.to_string()))),
            Located::Conflict { .. } => return Ok(Some(Lack::Contested(name.to_string()))),
        }
        *have = Some(number);
        number = number.next();
    }
    contradicted(store, cluster, entry, &TimelineHistory::root(entry.stop_timeline)).await
}

/// Asks the segments that a backup needs, all of which are there, whether they are of the server whose files were read.
async fn contradicted(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    history: &TimelineHistory,
) -> Result<Option<Lack>, String> {
    let testimony = witness::ask(store, cluster, entry, history).await.map_err(|error| chain(&error))?;
    Ok(match testimony {
        Testimony::Agrees => None,
        Testimony::Silent => Some(Lack::Unwitnessed),
        Testimony::Missing(name) => Some(Lack::Missing(name.to_string())),
        Testimony::Contested(name) => Some(Lack::Contested(name.to_string())),
        Testimony::Differs(name) => Some(Lack::Foreign(name.to_string())),
    })
}

/// The history file of the timeline a backup ended on: a restore names that timeline, and PostgreSQL then asks for it.
async fn missing_history(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
) -> Result<Option<String>, String> {
    if entry.stop_timeline == Timeline::FIRST {
        return Ok(None);
    }
    let key = key::history(cluster, entry.system_identifier, entry.stop_timeline);
    let found = store.head(&key).await.map_err(|error| chain(&error))?;
    Ok(found.is_none().then(|| WalFileName::History(entry.stop_timeline).to_string()))
}

/// The history of the timeline that a backup ended on, having begun on an older one, if all WAL on the way is there; else the
/// first segment that is missing.
async fn whole_path(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
) -> Result<Result<TimelineHistory, String>, String> {
    let index = wal_index::load(store, cluster, entry.system_identifier).await.map_err(|error| chain(&error))?;
    let Some(wal) = index.wal else { return Ok(Err("of the whole backup".to_owned())) };
    let range = LsnRange { start: entry.start_lsn, end: entry.stop_lsn };
    let missing = wal.missing(entry.stop_timeline, range).first().map(|span| span.names(wal.segment_size()).next());
    Ok(match (missing.flatten(), wal.histories().get(&entry.stop_timeline)) {
        (Some(name), _) => Err(name.to_string()),
        (None, Some(history)) => Ok(history.clone()),
        (None, None) => Err(WalFileName::History(entry.stop_timeline).to_string()),
    })
}
