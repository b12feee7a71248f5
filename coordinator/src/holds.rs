//! Holds: what operators keep from being removed, with the reason, and what restores read.
//!
//! A hold stands in the root of every store that has the backup, because each store lets go by itself. A store that is away,
//! or gets the backup later, takes it over with the copy; one that has the backup and is away is named to the operator.

use std::collections::BTreeMap;

use jiff::Timestamp;
use process::clock;
use repository::name::{BackupId, ClusterName, StoreName};
use repository::root::{Hold, Root, RootError};

use crate::Coordinator;
use crate::peer::Peer;
use crate::reconcile;
use crate::refusal::Refusal;
use crate::stores::{Slot, chain};

/// Who said so where no certificate tells.
const ANYBODY: &str = "an operator";

/// What came of a change in all stores.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changed {
    /// Stores in which it stands.
    pub stores: Vec<StoreName>,
    /// Stores that could not be asked or did not take it, with the reason, a line each.
    pub others: Vec<String>,
    /// Stores that it does not concern, because they do not have the backup or do not hold it; likewise.
    unconcerned: Vec<String>,
}

impl Changed {
    /// Why it stands nowhere.
    fn nowhere(&self) -> String {
        [self.unconcerned.as_slice(), &self.others].concat().join("; ")
    }
}

/// Who calls, for the record.
pub fn name_of(peer: &Peer, said: &str) -> String {
    match (peer, said.trim()) {
        (Peer::Certified(names), _) if !names.is_empty() => names.join(", "),
        (_, "") => ANYBODY.to_owned(),
        (_, said) => said.to_owned(),
    }
}

/// Who restores, and where, for the record.
pub fn name_of_restore(peer: &Peer, place: &str) -> String {
    match peer {
        Peer::Certified(names) if !names.is_empty() => format!("{} to {place}", names.join(", ")),
        _ => place.to_owned(),
    }
}

/// Holds a backup in every store that has it.
///
/// # Errors
/// [`Refusal::ClusterUnknown`], and [`Refusal::Precondition`] if it stands in none.
pub async fn add(coordinator: &Coordinator, cluster: &ClusterName, hold: Hold) -> Result<Changed, Refusal> {
    if hold.reason.trim().is_empty() {
        return Err(Refusal::Precondition("a hold needs a reason".to_owned()));
    }
    if hold.until.is_some_and(|until| until <= hold.since) {
        return Err(Refusal::Precondition("a hold that ends before it begins holds nothing".to_owned()));
    }
    let backup = hold.backup;
    let changed = in_every_store(coordinator, cluster, |root| root.with_hold(hold.clone())).await?;
    match changed.stores.as_slice() {
        [] => Err(Refusal::Precondition(format!("backup {backup} is held in no store: {}", changed.nowhere()))),
        stores => {
            tracing::info!(%cluster, %backup, by = hold.by, reason = hold.reason, stores = stores.len(), "a backup is held");
            Ok(changed)
        }
    }
}

/// Holds a backup for a restore that is under way, in every store that has it; see [`Root::with_restore`].
///
/// # Errors
/// [`Refusal::ClusterUnknown`], and [`Refusal::Precondition`] if it stands in none.
pub async fn restore(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    backup: BackupId,
    by: &str,
) -> Result<Changed, Refusal> {
    let now = clock::now();
    let changed = in_every_store(coordinator, cluster, |root| root.with_restore(backup, by, now)).await?;
    if changed.stores.is_empty() {
        let reason = format!("backup {backup} is held for the restore in no store: {}", changed.nowhere());
        return Err(Refusal::Precondition(reason));
    }
    tracing::info!(%cluster, %backup, by, stores = changed.stores.len(), "a backup is held for a restore");
    Ok(changed)
}

/// Lets a backup go from every store that can be asked.
///
/// # Errors
/// [`Refusal::ClusterUnknown`], and [`Refusal::Precondition`] if no store holds it.
pub async fn remove(coordinator: &Coordinator, cluster: &ClusterName, backup: BackupId) -> Result<Changed, Refusal> {
    let edit = |root: &Root| match root.holds.iter().any(|hold| hold.backup == backup) {
        true => Ok(root.without_hold(&backup)),
        false => Err(RootError::Refused { reason: format!("{backup} is not held here") }),
    };
    let changed = in_every_store(coordinator, cluster, edit).await?;
    if changed.stores.is_empty() {
        let reason = format!("backup {backup} was released in no store: {}", changed.nowhere());
        return Err(Refusal::Precondition(reason));
    }
    tracing::info!(%cluster, %backup, "a backup is not held any more");
    Ok(changed)
}

/// All holds of a cluster with the stores in which each stands, by backup.
///
/// # Errors
/// [`Refusal::ClusterUnknown`].
pub async fn list(coordinator: &Coordinator, cluster: &ClusterName) -> Result<Vec<(Hold, Vec<StoreName>)>, Refusal> {
    expect(coordinator, cluster)?;
    let mut found: BTreeMap<BackupId, Vec<(Hold, Vec<StoreName>)>> = BTreeMap::new();
    for (slot, root) in reconcile::backups::roots(coordinator, cluster).await {
        for hold in root.holds {
            let of_backup = found.entry(hold.backup).or_default();
            match of_backup.iter_mut().find(|(known, _)| *known == hold) {
                Some((_, stores)) => stores.push(slot.name().clone()),
                None => of_backup.push((hold, vec![slot.name().clone()])),
            }
        }
    }
    Ok(found.into_values().flatten().collect())
}

fn expect(coordinator: &Coordinator, cluster: &ClusterName) -> Result<(), Refusal> {
    match coordinator.clusters.systems_of(cluster).is_empty() {
        true => Err(Refusal::ClusterUnknown { cluster: cluster.clone() }),
        false => Ok(()),
    }
}

async fn in_every_store(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    edit: impl Fn(&Root) -> Result<Root, RootError>,
) -> Result<Changed, Refusal> {
    expect(coordinator, cluster)?;
    let mut changed = Changed::default();
    for slot in coordinator.stores.all() {
        let line = |reason: String| format!("store {}: {reason}", slot.name());
        match in_store(coordinator, slot, cluster, clock::now(), &edit).await {
            Ok(Ok(())) => changed.stores.push(slot.name().clone()),
            Ok(Err(reason)) => changed.unconcerned.push(line(reason)),
            Err(reason) => changed.others.push(line(reason)),
        }
    }
    Ok(changed)
}

/// Commits in one store; a refusal is what its root says against it.
async fn in_store(
    coordinator: &Coordinator,
    slot: &Slot,
    cluster: &ClusterName,
    now: Timestamp,
    edit: &impl Fn(&Root) -> Result<Root, RootError>,
) -> Result<Result<(), String>, String> {
    if !slot.health().is_readable() {
        return Err(format!("it is {}; repeat this when it is back", slot.health()));
    }
    let committing = coordinator.roots.commit(&*slot.store, cluster, now, edit);
    match tokio::time::timeout(coordinator.stores.patience(), committing).await {
        Ok(Ok(_)) => Ok(Ok(())),
        Ok(Err(RootError::Refused { reason })) => Ok(Err(reason)),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err("it did not answer in time; repeat this".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_says_who_it_was() {
        let certified = Peer::Certified(vec!["ann".to_owned()]);
        assert_eq!(name_of(&certified, "bob"), "ann");
        assert_eq!(name_of(&Peer::Loopback, " bob "), "bob");
        assert_eq!(name_of(&Peer::Loopback, ""), ANYBODY);
        assert_eq!(name_of_restore(&certified, "db9:/data"), "ann to db9:/data");
        assert_eq!(name_of_restore(&Peer::Loopback, "db9:/data"), "db9:/data");
    }
}
