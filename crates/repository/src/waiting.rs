//! Backups that are finished but for WAL, as the stores alone tell: pinned, with a manifest, and named by no root.
//!
//! Whoever publishes them asks more (whether the WAL is their own server's); here is only told that they are there and which
//! segment is missing, for people. No plan of a restore counts on them.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use postgres_format::WalFileName;

use crate::backup::note;
use crate::coverage::LsnRange;
use crate::name::{BackupId, ClusterName, NodeName, StoreName};
use crate::root::{self, RootBackup};
use crate::store::ObjectStore;
use crate::wal_index::{self, WalIndex};

/// A backup that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub backup: BackupId,
    /// Who took it.
    pub node: NodeName,
    /// Where.
    pub store: StoreName,
    /// The first WAL file that is missing there; none if all is there, and it is about to be published.
    pub missing: Option<String>,
}

impl fmt::Display for Waiting {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backup, node, store, missing } = self;
        match missing {
            Some(missing) => write!(
                formatter,
                "backup {backup} of node {node} is waiting for WAL {missing} in store {store}; it counts once that has come"
            ),
            None => write!(
                formatter,
                "backup {backup} of node {node} lacks nothing in store {store} but its place in the root; a coordinator or \
                 its agent gives it that"
            ),
        }
    }
}

/// Looks for backups of a cluster that wait. A store or a manifest that cannot be read tells of none; `scratch` is a directory
/// for one manifest at a time.
pub async fn waiting(stores: &[Arc<dyn ObjectStore>], cluster: &ClusterName, scratch: &Path) -> Vec<Waiting> {
    let mut found = Vec::new();
    for store in stores {
        let Ok(Some(root)) = root::newest(store.as_ref(), cluster).await else { continue };
        for pin in root.pins.iter().filter(|pin| !pin.is_copy()) {
            let Ok(Some(entry)) = note::unpublished(store.as_ref(), cluster, &pin.backup, scratch).await else {
                continue;
            };
            let Ok(index) = wal_index::load(store.as_ref(), cluster, entry.system_identifier).await else { continue };
            let missing = first_missing(&entry, &index);
            let (backup, node, store) = (entry.backup, entry.node, store.name().clone());
            found.push(Waiting { backup, node, store, missing });
        }
    }
    found
}

/// PURE: the first WAL file between a backup's start and stop that a store lacks.
fn first_missing(entry: &RootBackup, index: &WalIndex) -> Option<String> {
    let Some(wal) = &index.wal else { return Some("of the whole backup".to_owned()) };
    let range = LsnRange { start: entry.start_lsn, end: entry.stop_lsn };
    let segment =
        wal.missing(entry.stop_timeline, range).first().and_then(|span| span.names(wal.segment_size()).next());
    segment.map(|name| name.to_string()).or_else(|| {
        let first = entry.stop_timeline == postgres_format::Timeline::FIRST;
        let known = first || wal.histories().contains_key(&entry.stop_timeline);
        (!known).then(|| WalFileName::History(entry.stop_timeline).to_string())
    })
}
