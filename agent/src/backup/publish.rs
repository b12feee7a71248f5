//! Makes a sent backup exist: through the coordinator, or by a root commit of our own once every pack and all WAL from
//! start to stop are durable in the direct store.
//!
//! Only a store that knows the cluster and its system identifier is committed to: making a repository is the
//! coordinator's, so that an unmounted or foreign store is never begun anew.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline, WalFileName};
use repository::backup::{VerifyDepth, note};
use repository::coverage::{ArchivedWal, LsnRange};
use repository::key::{self, ParsedKey};
use repository::name::{ClusterName, NodeName};
use repository::root::{self, RootBackup, RootError, System};
use repository::store::{self, LIST_LIMIT, ObjectEntry, ObjectStore};
use repository::wal::{Located, WalError, history_text, locate, read_header};
use repository::witness::{self, Testimony};

use super::BackupError;
use super::road::BackupRoad;

/// Pause after which the store is asked again for WAL that is not there yet, the first time and at most; each is twice the one
/// before. The last segment was just switched, and is mostly there in a moment.
const WAL_POLLS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Pause before a commit is tried again.
const COMMIT_PAUSE: Duration = Duration::from_secs(1);
/// Segments looked at at the same time.
const LOOKED_AT_ONCE: usize = 8;
/// Attempts of a commit whose outcome is unknown or that lost to others.
const COMMIT_ATTEMPTS: u32 = 5;

/// Where a backup exists.
#[derive(Debug, Default)]
pub(super) struct Published {
    pub(super) stores: Vec<String>,
    pub(super) lagging: Vec<String>,
    /// The WAL it waits for, if it exists nowhere yet; all else is durable and pinned.
    pub(super) waiting_for: Option<String>,
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
        let waiting_for = Some(answer.waiting_for).filter(|missing| !missing.is_empty());
        return Ok(Published { stores: answer.stores, lagging: answer.lagging, waiting_for });
    }
    let store = road.direct()?.as_ref();
    let verified = repository::backup::verify(store, cluster, entry, VerifyDepth::Presence, scratch).await;
    verified.map_err(|source| failed("its objects are not whole in the store", source))?;
    match wait_for_wal(store, cluster, entry, wal_wait).await {
        Ok(()) => {}
        Err(BackupError::WalMissing { first, .. }) if is_pinned(store, cluster, entry).await => {
            return Ok(Published { waiting_for: Some(format!("WAL {first}")), ..Published::default() });
        }
        Err(error) => return Err(error),
    }
    process::crash_point!("agent/after-parts-before-backup-root");
    commit(store, cluster, node, entry).await?;
    Ok(Published { stores: vec![store.name().to_string()], ..Published::default() })
}

async fn is_pinned(store: &dyn ObjectStore, cluster: &ClusterName, entry: &RootBackup) -> bool {
    let root = root::newest(store, cluster).await.ok().flatten();
    root.is_some_and(|root| root.pin(&entry.backup).is_some())
}

/// Publishes in the direct store what this node finished there but for its WAL, as far as that has come. Gives the backups
/// that exist now.
///
/// # Errors
/// When the store fails; the next call goes on.
pub(super) async fn publish_left(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    node: &NodeName,
    scratch: &Path,
) -> Result<Vec<RootBackup>, BackupError> {
    let looked = |source| failed("it could not be looked at what waits for its WAL", source);
    let mut published = Vec::new();
    let Some(root) = root::newest(store, cluster).await.map_err(looked)? else { return Ok(published) };
    for pin in root.pins.iter().filter(|pin| pin.node == *node && !pin.is_copy()) {
        let entry = note::unpublished(store, cluster, &pin.backup, scratch).await;
        let Some(entry) = entry.map_err(|source| failed("its manifest could not be read", source))? else { continue };
        if !missing_wal(store, cluster, &entry, &mut BTreeSet::new()).await?.is_empty() {
            continue;
        }
        let verified = repository::backup::verify(store, cluster, &entry, VerifyDepth::Presence, scratch).await;
        verified.map_err(|source| failed("its objects are not whole in the store", source))?;
        commit(store, cluster, node, &entry).await?;
        published.push(entry);
    }
    Ok(published)
}

fn failed(what: &'static str, source: impl std::error::Error + Send + Sync + 'static) -> BackupError {
    BackupError::Publish { what, source: Box::new(source) }
}

/// Commits a backup of which all is durable.
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
                tokio::time::sleep(COMMIT_PAUSE).await;
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
    let (mut whole, (mut pause, longest)) = (BTreeSet::new(), WAL_POLLS);
    loop {
        let missing = missing_wal(store, cluster, entry, &mut whole).await;
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
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(longest);
    }
}

/// The files still missing. `whole` remembers segments that were found whole.
async fn missing_wal(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    whole: &mut BTreeSet<SegmentName>,
) -> Result<Vec<WalFileName>, BackupError> {
    let looked = |source| failed("its WAL could not be looked up", source);
    let size = SegmentSize::from_bytes(entry.segment_size_bytes)
        .map_err(|source| failed("its segment size makes no sense", source))?;
    let mut wal = ArchivedWal::new(size);
    if entry.stop_timeline != Timeline::FIRST {
        let reading = history_text(store, cluster, entry.system_identifier, entry.stop_timeline).await;
        match reading.map_err(|source| failed("a timeline history could not be read", source))? {
            None => return Ok(vec![WalFileName::History(entry.stop_timeline)]),
            Some(text) => {
                let history = TimelineHistory::parse(entry.stop_timeline, &text);
                wal.add_history(
                    entry.stop_timeline,
                    history.map_err(|source| failed("a timeline history makes no sense", source))?,
                );
            }
        }
    }
    let range = LsnRange { start: entry.start_lsn, end: entry.stop_lsn };
    let mut listed = Listed::new();
    for span in wal.needed(entry.stop_timeline, range) {
        list_segments(store, cluster, entry, span.timeline, size, &mut wal, &mut listed).await.map_err(looked)?;
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
    let needed = wal.needed(entry.stop_timeline, range);
    let names = needed.iter().flat_map(|span| span.names(size)).filter(|name| !whole.contains(name));
    let looked_at = unserved(store, cluster, entry.system_identifier, &listed, names.collect()).await;
    let (found, mut incomplete) = looked_at.map_err(|source| failed("its WAL could not be looked up", source))?;
    whole.extend(found);
    if incomplete.is_empty() {
        let history = wal.histories().get(&entry.stop_timeline).cloned();
        let history = history.unwrap_or_else(|| TimelineHistory::root(entry.stop_timeline));
        let testimony = witness::ask(store, cluster, entry, &history).await;
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

/// What a store lists under the names of segments.
type Listed = BTreeMap<SegmentName, Vec<ObjectEntry>>;

/// Of segments that are listed: those of which a whole one is served, and those of which none is. A listing tells neither an
/// incomplete segment from a whole one, nor a conflict.
async fn unserved(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
    listed: &Listed,
    names: Vec<SegmentName>,
) -> Result<(Vec<SegmentName>, Vec<WalFileName>), WalError> {
    let looked = names.into_iter().map(|name| async move {
        let whole = match listed.get(&name).map(Vec::as_slice) {
            Some([only]) => read_header(store, &only.key, only.size).await?.complete,
            _ => {
                let located = locate(store, cluster, system, &WalFileName::Segment(name)).await?;
                matches!(located, Located::Object { .. })
            }
        };
        Ok::<_, WalError>((name, whole))
    });
    let looked: Vec<_> = stream::iter(looked).buffered(LOOKED_AT_ONCE).try_collect().await?;
    let (whole, unserved): (Vec<_>, Vec<_>) = looked.into_iter().partition(|(_, whole)| *whole);
    let names = |looked: Vec<(SegmentName, bool)>| looked.into_iter().map(|(name, _)| name);
    Ok((names(whole).collect(), names(unserved).map(WalFileName::Segment).collect()))
}

/// Adds what a timeline holds from the backup's start to its stop.
async fn list_segments(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    timeline: Timeline,
    size: SegmentSize,
    wal: &mut ArchivedWal,
    listed: &mut Listed,
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
                Ok(ParsedKey::Wal { name: WalFileName::Segment(name), .. }) if name <= last => {
                    wal.add(name);
                    listed.entry(name).or_default().push(object.clone());
                }
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

#[cfg(test)]
mod tests {
    use repository::wal::{Sink, VariantCheck, WalEncoder, WalFacts};

    use super::*;
    use crate::testing::memory;

    #[tokio::test]
    async fn a_segment_in_the_middle_must_be_served_whole_like_the_last_one() {
        let (store, cluster) = (memory("s3"), "main".parse::<ClusterName>().unwrap());
        let (system, size) = (SystemIdentifier::new(7), SegmentSize::from_bytes(1 << 20).unwrap());
        let name = |number| SegmentName::new(Timeline::FIRST, SegmentNumber::new(number), size);
        let put = async |number: u64, content: u8, complete: bool| {
            let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
            encoder.push(&vec![content; 1 << 20]).unwrap();
            let facts = WalFacts {
                cluster: cluster.clone(),
                system_identifier: system,
                name: WalFileName::Segment(name(number)),
                node: "db1".parse().unwrap(),
                in_recovery: !complete,
                complete,
                logical_end: None,
                postgres_major: Some(15),
                first_commit_time: None,
                last_commit_time: None,
                written: jiff::Timestamp::UNIX_EPOCH,
            };
            let wal = encoder.finish(facts).unwrap();
            let _ = repository::wal::put(store.as_ref(), &wal, VariantCheck::Skip).await.unwrap();
        };
        for number in 1..=5 {
            put(number, 1, number != 3).await;
        }
        put(2, 2, true).await;
        let mut listed = Listed::new();
        let prefix = key::wal_timeline_prefix(&cluster, system, Timeline::FIRST);
        for object in store.list(&prefix, None, LIST_LIMIT).await.unwrap().objects {
            let Ok(ParsedKey::Wal { name: WalFileName::Segment(name), .. }) = object.key.parsed() else { panic!() };
            listed.entry(name).or_default().push(object);
        }
        let names = (1..=5).map(name).collect();
        let (whole, unserved) = unserved(store.as_ref(), &cluster, system, &listed, names).await.unwrap();
        assert_eq!(whole, [1, 4, 5].map(name));
        assert_eq!(unserved, [2, 3].map(|number| WalFileName::Segment(name(number))));
    }
}
