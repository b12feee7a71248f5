//! What each store holds of a cluster now: its newest root and its WAL, as plans and reports need it.
//!
//! A store that fails in any part counts as not answering: half an answer would read as an archive that ends early.

mod across;

use futures_util::future::join_all;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::adoption::{self, Numbered};
use crate::coverage::forks::{ForkFacts, LeftBehind};
use crate::name::ClusterName;
use crate::restore_plan::{StoreView, SystemView};
use crate::root::{self, Root};
use crate::store::{ObjectStore, Room, StoreError};
use crate::wal::{Located, WalError, locate, read_header, read_history};
use crate::wal_index::{self, COMMIT_SEARCH_LIMIT, WalIndex};
use jiff::Timestamp;
use postgres_format::timeline_history::{MAX_BYTES as HISTORY_BYTES_MAX, names_target};
use postgres_format::{SegmentName, SegmentNumber, SystemIdentifier, Timeline, WalFileName};

/// Most forks of one system around which headers are read, counted from the newest.
const FORKS_MAX: usize = 64;

/// What one store holds of one cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct Holding {
    /// Its newest root; `None` if the cluster was never created there.
    pub root: Option<Root>,
    /// Its WAL, by system, in the order of the root.
    pub wal: Vec<(SystemIdentifier, WalIndex)>,
    /// What the headers say around forks that left WAL of the parent behind.
    pub forks: Vec<(SystemIdentifier, ForkFacts)>,
    /// The newest adoption of each timeline, of systems with more than one.
    pub adoptions: Vec<(SystemIdentifier, BTreeMap<Timeline, Numbered>)>,
    /// How full the store is, if it knows.
    pub room: Option<Room>,
}

/// Looks at one store. The error is a line for people.
pub async fn observe(store: &dyn ObjectStore, cluster: &ClusterName) -> Result<Holding, String> {
    let root = root::newest(store, cluster).await.map_err(|error| chain(&error))?;
    let (mut wal, mut forks, mut adoptions) = (Vec::new(), Vec::new(), Vec::new());
    for known in root.iter().flat_map(|root| &root.systems) {
        let system = known.system_identifier;
        let mut index = wal_index::load(store, cluster, system).await.map_err(|error| chain(&error))?;
        index.trim(&known.wal_kept);
        let left = index.wal.as_ref().map(|wal| wal.left_behind()).unwrap_or_default();
        if !index.histories.is_empty() {
            match adoption::newest_of_all(store, cluster, system).await {
                Ok(newest) => adoptions.push((system, newest)),
                Err(error @ StoreError::Damaged { .. }) => index.problems.push(error.to_string()),
                Err(error) => return Err(chain(&error)),
            }
        }
        for left in left.into_iter().rev().take(FORKS_MAX) {
            let facts = fork_facts(store, cluster, system, left).await.map_err(|error| chain(&error))?;
            forks.extend(facts.map(|facts| (system, facts)));
        }
        wal.push((system, index));
    }
    let room = store.room().await.map_err(|error| chain(&error))?;
    Ok(Holding { root, wal, forks, adoptions, room })
}

/// Reads the headers of the child's history and of the parent's last segment; nothing if either is not to be had.
async fn fork_facts(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
    left: LeftBehind,
) -> Result<Option<ForkFacts>, WalError> {
    let located = whole(locate(store, cluster, system, &WalFileName::History(left.timeline)).await)?;
    let Some(Located::Object { key: history, size, .. }) = located else { return Ok(None) };
    let Some(begun) = whole(read_header(store, &history, size).await)? else { return Ok(None) };
    let Some(text) = whole(read_history(store, &history, HISTORY_BYTES_MAX).await)? else { return Ok(None) };
    let Some(located) = whole(locate(store, cluster, system, &WalFileName::Segment(left.last)).await)? else {
        return Ok(None);
    };
    let Located::Object { key, size, .. } = located else { return Ok(None) };
    let Some(last) = whole(read_header(store, &key, size).await)? else { return Ok(None) };
    Ok(Some(ForkFacts {
        left,
        begun: begun.written,
        to_target: names_target(&text),
        node: last.node,
        in_recovery: last.in_recovery,
        sent: last.written,
        last_commit: last.last_commit_time,
        logical_end: last.logical_end,
        apart_from: apart_from(store, cluster, system, left).await?,
    }))
}

/// As in [`ForkFacts`].
async fn apart_from(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
    left: LeftBehind,
) -> Result<Option<Timestamp>, WalError> {
    let mut earliest: Option<Timestamp> = None;
    for line in [left.fork.timeline, left.timeline] {
        let mut first = None;
        let mut number = SegmentNumber::containing(left.fork.lsn, left.size);
        for _ in 0..COMMIT_SEARCH_LIMIT {
            let name = WalFileName::Segment(SegmentName::new(line, number, left.size));
            let located = whole(locate(store, cluster, system, &name).await)?;
            let Some(Located::Object { key, size, .. }) = located else { break };
            let Some(header) = whole(read_header(store, &key, size).await)? else { break };
            first = header.first_commit_time;
            if first.is_some() {
                break;
            }
            number = number.next();
        }
        let Some(first) = first else { return Ok(None) };
        earliest = Some(earliest.map_or(first, |earliest| earliest.min(first)));
    }
    Ok(earliest)
}

/// A damaged object counts as absent here: it is told of elsewhere.
fn whole<T>(read: Result<T, WalError>) -> Result<Option<T>, WalError> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(WalError::Damaged { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Looks at several stores at once. What they hold in unlike contents is judged as a fetch from all of them would.
pub async fn observe_all(stores: &[Arc<dyn ObjectStore>], cluster: &ClusterName) -> Vec<Result<Holding, String>> {
    let mut held = join_all(stores.iter().map(|store| observe(store.as_ref(), cluster))).await;
    across::judge(stores, cluster, &mut held).await;
    held
}

/// What [`crate::restore_plan::plan`] needs of several stores, in their order.
pub async fn views(stores: &[Arc<dyn ObjectStore>], cluster: &ClusterName) -> Vec<StoreView> {
    let held = observe_all(stores, cluster).await;
    stores.iter().zip(held).map(|(store, held)| view(store.as_ref(), &held)).collect()
}

/// What a plan needs of one store.
pub fn view(store: &dyn ObjectStore, held: &Result<Holding, String>) -> StoreView {
    let store = store.name().clone();
    match held {
        Err(reason) => StoreView::Unreachable { store, reason: reason.clone() },
        Ok(holding) => {
            let backups = holding.root.as_ref().map(|root| root.backups.clone()).unwrap_or_default();
            let systems = holding.wal.iter().map(|(system, wal)| (*system, system_view(holding, *system, wal)));
            StoreView::Holds { store, backups, systems: systems.collect() }
        }
    }
}

fn system_view(holding: &Holding, system: SystemIdentifier, wal: &WalIndex) -> SystemView {
    let forks = holding.forks.iter().filter(|(of, _)| *of == system).map(|(_, facts)| facts.clone());
    let adoptions = holding.adoptions.iter().find(|(of, _)| *of == system).map(|(_, newest)| newest.clone());
    SystemView { wal: wal.clone(), forks: forks.collect(), adoptions: adoptions.unwrap_or_default() }
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
