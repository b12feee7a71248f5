//! Contents of one name that lie in unlike stores.
//!
//! A store alone cannot show them. Stores are compared log by log through digests; only logs whose digests differ are
//! listed again, one at a time, so memory does not grow with what they hold. What fetching would serve under
//! the names that differ then takes the place of what each store said alone, so that reports and plans judge as a fetch
//! does. A choice written in one store counts in all. Histories, whose keys tell no contents apart, are compared as they were read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use postgres_format::{SegmentName, SystemIdentifier, Timeline, WalFileName};

use super::{Holding, chain};
use crate::fingerprint::Fingerprint;
use crate::key;
use crate::name::ClusterName;
use crate::store::{ObjectStore, StoreError};
use crate::wal::{Together, together};
use crate::wal_index::{WalConflict, WalIndex, list_page_under};

/// Most names of one system that are judged over all stores; unlike contents of further ones count as conflicts.
const JUDGED_MAX: usize = 1000;

/// The indexes of one system, by place among the stores that answered.
type Indexes<'a> = Vec<(usize, &'a mut WalIndex)>;

/// Judges over all stores what they hold in unlike contents. A store that failed stays out.
pub(super) async fn judge(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    held: &mut [Result<Holding, String>],
) {
    let answered: Vec<Arc<dyn ObjectStore>> =
        stores.iter().zip(&*held).filter(|(_, held)| held.is_ok()).map(|(store, _)| Arc::clone(store)).collect();
    if answered.len() < 2 {
        return;
    }
    let mut systems: BTreeMap<SystemIdentifier, Indexes<'_>> = BTreeMap::new();
    for (place, holding) in held.iter_mut().filter_map(|held| held.as_mut().ok()).enumerate() {
        for (system, index) in &mut holding.wal {
            systems.entry(*system).or_default().push((place, index));
        }
    }
    for (system, mut indexes) in systems {
        if indexes.len() > 1 {
            judge_system(&answered, cluster, system, &mut indexes).await;
        }
    }
}

async fn judge_system(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    system: SystemIdentifier,
    indexes: &mut Indexes<'_>,
) {
    let mut names: BTreeSet<SegmentName> = BTreeSet::new();
    let mut histories = unlike_histories(indexes);
    for (_, index) in &*indexes {
        let odd = index.conflicts.iter().map(|conflict| conflict.name).chain(index.decided.iter().copied());
        for name in odd {
            match name {
                WalFileName::Segment(name) => drop(names.insert(name)),
                WalFileName::History(timeline) if index.decided.contains(&name) => drop(histories.insert(timeline)),
                _ => {}
            }
        }
    }
    for timeline in histories.into_iter().take(JUDGED_MAX) {
        let found = together(stores, cluster, system, &WalFileName::History(timeline)).await;
        let found = found.unwrap_or_else(|error| Together::Unknown(vec![chain(&error)]));
        indexes.iter_mut().for_each(|(_, index)| apply_to_history(index, timeline, &found));
    }
    for (timeline, log) in unlike_logs(indexes) {
        let places: Vec<&dyn ObjectStore> = indexes.iter().map(|(place, _)| &*stores[*place]).collect();
        match unlike_names(&places, &key::wal_log_prefix(cluster, system, timeline, log)).await {
            Ok(unlike) => names.extend(unlike),
            Err(error) => {
                let problem = format!("log {log:08X} of timeline {timeline} was not compared: {}", chain(&error));
                indexes.iter_mut().for_each(|(_, index)| index.problems.push(problem.clone()));
            }
        }
    }
    for (count, name) in names.into_iter().enumerate() {
        let found = match count < JUDGED_MAX {
            true => together(stores, cluster, system, &WalFileName::Segment(name)).await,
            false => Ok(Together::Conflict(Vec::new())),
        };
        let found = found.unwrap_or_else(|error| Together::Unknown(vec![chain(&error)]));
        indexes.iter_mut().for_each(|(_, index)| apply(index, name, &found));
    }
}

/// Timelines to which at least two stores ascribe unlike ancestors.
fn unlike_histories(indexes: &Indexes<'_>) -> BTreeSet<Timeline> {
    let mut seen = BTreeMap::new();
    let mut unlike = BTreeSet::new();
    for (timeline, history) in indexes.iter().flat_map(|(_, index)| &index.histories) {
        if seen.entry(*timeline).or_insert(history).entries() != history.entries() {
            unlike.insert(*timeline);
        }
    }
    unlike
}

/// Logs that at least two stores have and not all in the same contents.
fn unlike_logs(indexes: &Indexes<'_>) -> BTreeSet<(Timeline, u32)> {
    let mut seen: BTreeMap<(Timeline, u32), u64> = BTreeMap::new();
    let mut unlike = BTreeSet::new();
    for (log, digest) in indexes.iter().flat_map(|(_, index)| &index.logs) {
        if *seen.entry(*log).or_insert(*digest) != *digest {
            unlike.insert(*log);
        }
    }
    unlike
}

/// Segments under a prefix of which the stores together hold several contents. A log has at most a few thousand.
async fn unlike_names(stores: &[&dyn ObjectStore], prefix: &str) -> Result<BTreeSet<SegmentName>, StoreError> {
    let mut contents: BTreeMap<SegmentName, Fingerprint> = BTreeMap::new();
    let mut unlike = BTreeSet::new();
    for store in stores {
        let mut after = None;
        loop {
            let page = list_page_under(*store, prefix, after.as_deref()).await?;
            for object in page.objects {
                let WalFileName::Segment(name) = object.name else { continue };
                if *contents.entry(name).or_insert(object.fingerprint) != object.fingerprint {
                    unlike.insert(name);
                }
            }
            after = page.next;
            if after.is_none() {
                break;
            }
        }
    }
    Ok(unlike)
}

/// Makes one store's index say of a history what all stores together serve.
fn apply_to_history(index: &mut WalIndex, timeline: Timeline, found: &Together) {
    let name = WalFileName::History(timeline);
    index.conflicts.retain(|conflict| conflict.name != name);
    if matches!(found, Together::Served(holders) if holders.contains(&index.store)) {
        return;
    }
    let held = index.histories.remove(&timeline).is_some();
    if let Some(wal) = &mut index.wal {
        wal.remove_history(timeline);
    }
    match found {
        Together::Conflict(variants) if held => index.conflicts.push(WalConflict { name, variants: variants.clone() }),
        Together::Unknown(reasons) => {
            index.problems.push(format!("what is served as {name} is not known: {}", reasons.join("; ")));
        }
        Together::Conflict(_) | Together::Served(_) | Together::Nothing => {}
    }
}

/// Makes one store's index say what all stores together serve.
fn apply(index: &mut WalIndex, name: SegmentName, found: &Together) {
    let file = WalFileName::Segment(name);
    let held = index.holds_some(name);
    index.conflicts.retain(|conflict| conflict.name != file);
    let serves = matches!(found, Together::Served(holders) if holders.contains(&index.store)) && index.keeps(name);
    // Without a segment size no coverage is known, and conflicts are shown all the same.
    match &mut index.wal {
        Some(wal) if serves => drop(wal.add(name)),
        Some(wal) => wal.remove(name),
        None => {}
    }
    match found {
        Together::Conflict(variants) if held => {
            index.conflicts.push(WalConflict { name: file, variants: variants.clone() });
        }
        Together::Unknown(reasons) => {
            index.problems.push(format!("what is served as {name} is not known: {}", reasons.join("; ")));
        }
        Together::Conflict(_) | Together::Served(_) | Together::Nothing => {}
    }
}
