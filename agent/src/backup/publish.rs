//! Makes a sent backup exist: through the coordinator, or by a root commit of our own once every pack and all WAL from
//! start to stop are durable in the direct store.
//!
//! Only a store that knows the cluster and its system identifier is committed to: making a repository is the
//! coordinator's, so that an unmounted or foreign store is never begun anew.

use std::path::Path;
use std::time::Duration;

use postgres_format::timeline_history::{MAX_BYTES as HISTORY_BYTES_MAX, TimelineHistory};
use postgres_format::{SegmentName, SegmentNumber, SegmentSize, Timeline, WalFileName};
use repository::backup::VerifyDepth;
use repository::coverage::{ArchivedWal, LsnRange};
use repository::key::{self, ParsedKey};
use repository::name::{ClusterName, NodeName};
use repository::root::{self, RootBackup, RootError, System};
use repository::store::{self, LIST_LIMIT, ObjectStore};
use repository::wal::{Located, locate, read_history};
use repository::witness::{self, Testimony};

use super::BackupError;
use super::road::BackupRoad;

/// How often the store is asked for WAL that is not there yet.
const WAL_POLL: Duration = Duration::from_secs(1);
/// Attempts of a commit whose outcome is unknown or that lost to others.
const COMMIT_ATTEMPTS: u32 = 5;

/// Where a backup exists.
#[derive(Debug, Default)]
pub(super) struct Published {
    pub(super) stores: Vec<String>,
    pub(super) lagging: Vec<String>,
}

pub(super) async fn publish(
    road: &BackupRoad,
    cluster: &ClusterName,
    node: &NodeName,
    entry: &RootBackup,
    wal_wait: Duration,
    scratch: &Path,
) -> Result<Published, BackupError> {
    if let Some(answer) = road.publish(&entry.backup, entry.to_json(), wal_wait).await? {
        return Ok(Published { stores: answer.stores, lagging: answer.lagging });
    }
    let store = road.direct()?.as_ref();
    let verified = repository::backup::verify(store, cluster, entry, VerifyDepth::Presence, scratch).await;
    verified.map_err(|source| failed("its objects are not whole in the store", source))?;
    wait_for_wal(store, cluster, entry, wal_wait).await?;
    process::crash_point!("agent/after-parts-before-backup-root");
    commit(store, cluster, node, entry).await?;
    Ok(Published { stores: vec![store.name().to_string()], lagging: Vec::new() })
}

fn failed(what: &'static str, source: impl std::error::Error + Send + Sync + 'static) -> BackupError {
    BackupError::Publish { what, source: Box::new(source) }
}

async fn commit(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    node: &NodeName,
    entry: &RootBackup,
) -> Result<(), BackupError> {
    let what = "the root was not committed";
    for attempt in 1.. {
        let now = process::clock::now();
        #[allow(clippy::result_large_err, reason = "the error is the repository's own")]
        let edit = |root: &root::Root| {
            if root.systems.iter().all(|system| system.system_identifier != entry.system_identifier) {
                let reason = format!(
                    "store {} does not know system {} of cluster {cluster}: create the cluster there first",
                    store.name(),
                    entry.system_identifier
                );
                return Err(RootError::Refused { reason });
            }
            let (major, bytes) = (Some(entry.postgres_major), Some(entry.segment_size_bytes));
            let system = System::new(entry.system_identifier, major, bytes, now);
            root.with_system(system)?.with_backup(entry.clone())
        };
        match root::commit(store, cluster, node, now, edit).await {
            Ok(_) => return Ok(()),
            Err(error) if error.remedy() == store::Remedy::Retry && attempt < COMMIT_ATTEMPTS => {
                tokio::time::sleep(WAL_POLL).await;
            }
            Err(error) => return Err(failed(what, error)),
        }
    }
    unreachable!("the last attempt returns")
}

/// Waits until the store holds every segment from start to stop, complete, and the history of the timeline.
async fn wait_for_wal(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    wait: Duration,
) -> Result<(), BackupError> {
    let deadline = tokio::time::Instant::now() + wait;
    loop {
        let missing = missing_wal(store, cluster, entry).await;
        match missing {
            Ok(missing) if missing.is_empty() => return Ok(()),
            Ok(missing) if tokio::time::Instant::now() >= deadline => {
                return Err(BackupError::WalMissing {
                    store: store.name().to_string(),
                    missing: missing.len(),
                    first: missing[0].to_string(),
                    start: entry.start_lsn,
                    stop: entry.stop_lsn,
                    seconds: wait.as_secs(),
                });
            }
            Ok(_) => {}
            Err(error @ BackupError::ForeignWal { .. }) => return Err(error),
            Err(error) if tokio::time::Instant::now() >= deadline => return Err(error),
            Err(error) => tracing::debug!(%error, "the WAL of the backup could not be looked up"),
        }
        tokio::time::sleep(WAL_POLL).await;
    }
}

/// The files still missing.
async fn missing_wal(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
) -> Result<Vec<WalFileName>, BackupError> {
    let looked = |source| failed("its WAL could not be looked up", source);
    let size = SegmentSize::from_bytes(entry.segment_size_bytes)
        .map_err(|source| failed("its segment size makes no sense", source))?;
    let mut wal = ArchivedWal::new(size);
    if entry.stop_timeline != Timeline::FIRST {
        let key = key::history(cluster, entry.system_identifier, entry.stop_timeline);
        match store.head(&key).await.map_err(looked)? {
            None => return Ok(vec![WalFileName::History(entry.stop_timeline)]),
            Some(_) => {
                let text = read_history(store, &key, HISTORY_BYTES_MAX)
                    .await
                    .map_err(|source| failed("a timeline history could not be read", source))?;
                let history = TimelineHistory::parse(entry.stop_timeline, &text);
                wal.add_history(
                    entry.stop_timeline,
                    history.map_err(|source| failed("a timeline history makes no sense", source))?,
                );
            }
        }
    }
    let range = LsnRange { start: entry.start_lsn, end: entry.stop_lsn };
    for span in wal.needed(entry.stop_timeline, range) {
        list_segments(store, cluster, entry, span.timeline, size, &mut wal).await.map_err(looked)?;
    }
    let missing: Vec<WalFileName> = wal
        .missing(entry.stop_timeline, range)
        .into_iter()
        .flat_map(|span| span.names(size))
        .map(WalFileName::Segment)
        .collect();
    if !missing.is_empty() {
        return Ok(missing);
    }
    // A listing does not tell an incomplete last segment from a whole one.
    let mut incomplete = Vec::new();
    for span in wal.needed(entry.stop_timeline, range) {
        let last = WalFileName::Segment(SegmentName::new(span.timeline, span.last, size));
        let located = locate(store, cluster, entry.system_identifier, &last).await;
        if !matches!(
            located.map_err(|source| failed("its WAL could not be looked up", source))?,
            Located::Object { .. }
        ) {
            incomplete.push(last);
        }
    }
    if incomplete.is_empty() {
        let needed = wal.needed(entry.stop_timeline, range);
        let testimony = witness::ask(store, cluster, entry, &needed, size).await;
        match testimony.map_err(|source| failed("its WAL could not be compared with the server's own", source))? {
            Testimony::Agrees => {}
            Testimony::Missing(name) | Testimony::Contested(name) => incomplete.push(name),
            Testimony::Differs(name) => {
                return Err(BackupError::ForeignWal { store: store.name().to_string(), name: name.to_string() });
            }
            Testimony::Silent => {
                let (lsn, reason) = (entry.start_lsn, "the backup names no witnesses".to_owned());
                return Err(BackupError::Witness { lsn, reason });
            }
        }
    }
    Ok(incomplete)
}

/// Adds what a timeline holds from the backup's start to its stop.
async fn list_segments(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    timeline: Timeline,
    size: SegmentSize,
    wal: &mut ArchivedWal,
) -> Result<(), store::StoreError> {
    let first = SegmentName::new(timeline, SegmentNumber::containing(entry.start_lsn, size), size);
    let last = SegmentName::new(timeline, SegmentNumber::last_before(entry.stop_lsn, size), size);
    let prefix = key::wal_timeline_prefix(cluster, entry.system_identifier, timeline);
    // The name without a fingerprint sorts right before all of its objects.
    let mut after = key::wal_name_prefix(cluster, entry.system_identifier, &WalFileName::Segment(first));
    loop {
        let page = store.list(&prefix, Some(&after), LIST_LIMIT).await?;
        for object in &page.objects {
            match object.key.parsed() {
                Ok(ParsedKey::Wal { name: WalFileName::Segment(name), .. }) if name <= last => drop(wal.add(name)),
                Ok(ParsedKey::Wal { name: WalFileName::Segment(_), .. }) => return Ok(()),
                _ => {}
            }
        }
        match page.objects.last().filter(|_| page.more) {
            Some(object) => after = object.key.as_str().to_owned(),
            None => return Ok(()),
        }
    }
}
