//! Backups whose WAL an operator may have decided away: their witnesses are asked again.
//!
//! When a backup was published, its witnesses agreed. What is served under a name changes only by a choice among contents
//! that exclude each other, so segments are read of those backups alone that such a choice concerns, and a report costs no
//! more without one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{Timeline, WalFileName};

use crate::name::{ClusterName, StoreName};
use crate::observe::Holding;
use crate::restore_plan::Testimonies;
use crate::root::RootBackup;
use crate::store::ObjectStore;
use crate::witness::{hear, may_be_decided_away};

/// What the stores that answered say to the witnesses of such backups.
pub(super) async fn testimonies(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    answered: &[(&StoreName, &Holding)],
) -> Testimonies {
    let asked: Vec<Arc<dyn ObjectStore>> =
        stores.iter().filter(|store| answered.iter().any(|(name, _)| *name == store.name())).cloned().collect();
    let indexes = || answered.iter().flat_map(|(_, held)| &held.wal);
    let mut testimonies = Testimonies::new();
    for entry in answered.iter().filter_map(|(_, held)| held.root.as_ref()).flat_map(|root| &root.backups) {
        let of_system = || indexes().filter(|(system, _)| *system == entry.system_identifier).map(|(_, index)| index);
        let decided: BTreeSet<WalFileName> = of_system().flat_map(|index| index.decided.iter().copied()).collect();
        if may_be_decided_away(entry, &decided) && !testimonies.contains_key(&entry.backup) {
            let heard = hear(&asked, cluster, entry, &history(entry, of_system().map(|index| &index.histories))).await;
            testimonies.insert(entry.backup, heard);
        }
    }
    testimonies
}

/// The history along which a backup was taken.
fn history<'a>(
    entry: &RootBackup,
    mut histories: impl Iterator<Item = &'a BTreeMap<Timeline, TimelineHistory>>,
) -> TimelineHistory {
    let known = histories.find_map(|histories| histories.get(&entry.stop_timeline));
    known.cloned().unwrap_or_else(|| TimelineHistory::root(entry.stop_timeline))
}
