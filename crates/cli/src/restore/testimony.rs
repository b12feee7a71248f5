//! Whether the WAL that would be replayed is of the server whose files would be restored.
//!
//! After a clone and its original had met, and an operator had decided whose WAL counts, a backup of the other one still
//! has all its segments by name. Recovery would end without a checkpoint, or in a mixture of both.

use std::collections::BTreeMap;

use postgres_format::{SegmentNumber, SegmentSize};
use repository::{
    coverage::SegmentSpan,
    name::{BackupId, ClusterName},
    restore_plan::{RestorePlan, StoreView},
    root::RootBackup,
    witness::{self, Testimony},
};

use crate::{error::chain, stores::Opened};

/// What came of asking the stores.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Why the backup is not to be restored with this WAL.
    pub(super) contradiction: Option<String>,
    /// What could not be compared, a line a store.
    pub(super) unknown: Vec<String>,
}

/// Asks all stores whose WAL the plan uses.
pub(super) async fn ask(opened: &Opened, cluster: &ClusterName, plan: &RestorePlan) -> Heard {
    let (mut heard, backup) = (Heard::default(), &plan.backup);
    let Ok(size) = SegmentSize::from_bytes(backup.segment_size_bytes) else { return heard };
    let needed = spans(backup, size);
    for store in opened.stores.iter().filter(|store| plan.wal_stores.contains(store.name())) {
        match witness::ask(store.as_ref(), cluster, backup, &needed, size).await {
            Ok(Testimony::Differs(name)) => {
                let reason = format!(
                    "backup {} was taken of another server than the one whose WAL counts: WAL {name} in store {} is not \
                     what its own server had",
                    backup.backup,
                    store.name()
                );
                heard.contradiction = Some(reason);
            }
            // The plan itself sees to what is not there, and to contents that exclude each other.
            Ok(Testimony::Agrees | Testimony::Silent | Testimony::Missing(_) | Testimony::Contested(_)) => {}
            Err(error) => {
                let (id, store) = (backup.backup, store.name());
                heard.unknown.push(format!(
                    "the WAL of backup {id} in store {store} could not be compared with its server's: {}",
                    chain(&error)
                ));
            }
        }
    }
    heard
}

/// The segments of a backup's witnesses: that of its checkpoint on its first timeline, that of its end on its last.
fn spans(backup: &RootBackup, size: SegmentSize) -> Vec<SegmentSpan> {
    let mut spans = BTreeMap::new();
    for (place, witness) in backup.wal_witnesses.iter().enumerate() {
        let number = SegmentNumber::last_before(witness.to, size);
        let timeline = if place == 0 { backup.start_timeline } else { backup.stop_timeline };
        spans.insert(number, SegmentSpan { timeline, first: number, last: number });
    }
    spans.into_values().collect()
}

/// Takes a backup out of what the stores hold, so that the next plan does without it.
pub(super) fn leave_out(views: &mut [StoreView], backup: BackupId) {
    for view in views {
        if let StoreView::Holds { backups, .. } = view {
            backups.retain(|one| one.backup != backup);
        }
    }
}
