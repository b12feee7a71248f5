//! What an operator decides: which content of a conflicting WAL file is served, and which node writes a timeline.
//!
//! A decision is a new object in every store that is there, under one number in all of them; reconciliation brings it to the
//! others. Nothing is removed. A store that has the chosen content nowhere serves nothing under the name from then on, except that
//! it is given a chosen history, which it keeps apart from the one that it has.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use postgres_format::timeline_history::MAX_BYTES as HISTORY_BYTES_MAX;
use postgres_format::{SystemIdentifier, Timeline, WalFileName};
use repository::adoption::{self, Adoption, Numbered};
use repository::fingerprint::Fingerprint;
use repository::key::{self, ObjectKey};
use repository::name::{ClusterName, NodeName};
use repository::store::{self, ObjectStore, Put};
use repository::wal::{self, Decision, Together, WalError};

use crate::Coordinator;
use crate::refusal::Refusal;
use crate::stores::{Slot, chain};
use crate::writer::Line;

/// Longest object that holds a history file, in bytes: its header and its frames besides the file.
const HISTORY_OBJECT_BYTES_MAX: u64 = HISTORY_BYTES_MAX as u64 + (1 << 20);

/// Chooses the content of a WAL file that is served from now on.
///
/// # Errors
/// When the file is in no conflict, no store has that content, or no store takes the decision.
pub async fn resolve(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    name: WalFileName,
    fingerprint: Fingerprint,
    now: Timestamp,
) -> Result<(), Refusal> {
    let system = newest_system(coordinator, cluster)?;
    let slots = coordinator.stores.healthy();
    let mut contents = BTreeSet::new();
    let (mut holders, mut lacking) = (Vec::new(), Vec::new());
    for slot in &slots {
        let variants = contents_in(slot, cluster, system, &name).await.map_err(|error| failed(slot, &error))?;
        match variants.iter().find(|variant| variant.fingerprint == Some(fingerprint)) {
            Some(chosen) => holders.push((slot, chosen.clone())),
            None => lacking.push(slot),
        }
        contents.extend(variants.iter().map(wal::Variant::content_name));
    }
    let Some((source, chosen)) = holders.first() else {
        return Err(Refusal::Precondition(format!("no store has {name} with fingerprint {fingerprint}")));
    };
    if !is_to_be_decided(&slots, cluster, system, &name, contents.len()).await? {
        let stores = slots.iter().map(|slot| slot.name().to_string()).collect();
        return Err(Refusal::NoConflict { cluster: cluster.clone(), name, stores });
    }
    if matches!(name, WalFileName::History(_)) {
        let key = key::conflict(cluster, system, &name, &fingerprint);
        bring_history(source, chosen, &lacking, &key).await?;
    }
    let decision = Decision { format: 1, fingerprint, reason: "chosen by ResolveConflict".to_owned(), written: now };
    let stores: Vec<&dyn ObjectStore> = slots.iter().map(|slot| &*slot.store).collect();
    let decided = wal::decide_in(&stores, cluster, system, &name, &decision).await;
    decided.map_err(|error| Refusal::NoStore(chain(&error)))?;
    tracing::info!(%cluster, %name, %fingerprint, "an operator chose the content that is served");
    Ok(())
}

/// What a store holds under a name, histories with the fingerprints that their keys do not have.
async fn contents_in(
    slot: &Slot,
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
) -> Result<Vec<wal::Variant>, WalError> {
    match name {
        WalFileName::History(timeline) => wal::history_contents(&*slot.store, cluster, system, *timeline).await,
        _ => wal::variants(&*slot.store, cluster, system, name).await,
    }
}

/// Puts a chosen history beside the one that other stores have: there is no place for it under the history's own key.
async fn bring_history(
    source: &Slot,
    chosen: &wal::Variant,
    lacking: &[&Arc<Slot>],
    key: &ObjectKey,
) -> Result<(), Refusal> {
    if lacking.is_empty() {
        return Ok(());
    }
    // Read and verified, before its bytes are taken as they are.
    let read = wal::read_history(&*source.store, &chosen.key, HISTORY_BYTES_MAX).await;
    read.map_err(|error| failed(source, &error))?;
    let bytes = store::read(&*source.store, &chosen.key, HISTORY_OBJECT_BYTES_MAX).await;
    let bytes = bytes.map_err(|error| failed(source, &error))?.unwrap_or_default();
    for slot in lacking {
        let put = slot.store.put_new(key, bytes.clone().into()).await;
        let (Put::Created | Put::Exists) = put.map_err(|error| failed(slot, &error))?;
    }
    Ok(())
}

/// Whether there is anything to choose: contents that exclude each other, or a choice made before that may be made anew.
/// A content that cannot be read may well be the other one, so it does not stand in the way of a choice.
async fn is_to_be_decided(
    slots: &[Arc<Slot>],
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
    contents: usize,
) -> Result<bool, Refusal> {
    let stores: Vec<Arc<dyn ObjectStore>> = slots.iter().map(|slot| Arc::clone(&slot.store)).collect();
    match wal::together(&stores, cluster, system, name).await {
        Ok(Together::Conflict(_)) => return Ok(true),
        // What a store refused once, and keeps, may be the right one.
        Ok(Together::Served(_)) if matches!(name, WalFileName::History(_)) => return Ok(contents > 1),
        Ok(Together::Served(_) | Together::Nothing) => {}
        Ok(Together::Unknown(_)) | Err(_) => return Ok(contents > 1),
    }
    let prefix = key::decision_prefix(cluster, system, name);
    for slot in slots {
        let decisions = slot.store.list(&prefix, None, 1).await.map_err(|error| failed(slot, &error))?;
        if contents > 1 && !decisions.objects.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Makes a node the writer of its current timeline.
///
/// # Errors
/// When the node is not connected and out of recovery, or no store takes the decision.
pub async fn adopt_writer(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    node: &NodeName,
    now: Timestamp,
) -> Result<Vec<Timeline>, Refusal> {
    let system = newest_system(coordinator, cluster)?;
    let state = coordinator.sessions.state(cluster, node);
    let timeline = state.filter(|state| !state.in_recovery).and_then(|state| state.timeline).ok_or_else(|| {
        Refusal::Precondition(format!("node {node} is not connected and out of recovery, so it writes no timeline"))
    })?;
    let healthy = coordinator.stores.healthy();
    if healthy.is_empty() {
        return Err(Refusal::NoStore("no store is healthy".to_owned()));
    }
    let line = Line { cluster: cluster.clone(), system, timeline };
    // One number in all stores, above every one that is known of any timeline: of two the higher counts, wherever it lies.
    let mut last = coordinator.writers.adopted(&line).map_or(0, |known| known.number);
    let mut known = BTreeSet::from([timeline]);
    for slot in &healthy {
        let number = adoption::last_number(&*slot.store, cluster, system).await;
        last = last.max(number.map_err(|error| failed(slot, &error))?);
        let timelines = adoption::known_timelines(&*slot.store, cluster, system).await;
        known.extend(timelines.map_err(|error| failed(slot, &error))?);
    }
    let number = last.saturating_add(1);
    let adoption = Adoption::new(node.clone(), now, known);
    let body = bytes::Bytes::from(adoption.to_bytes());
    let key = key::writer(cluster, system, timeline, number);
    for slot in &healthy {
        match slot.store.put_new(&key, body.clone().into()).await.map_err(|error| failed(slot, &error))? {
            Put::Created => {}
            Put::Exists => {
                return Err(Refusal::Precondition(
                    "another adoption was made at this moment; look and repeat".to_owned(),
                ));
            }
        }
    }
    coordinator.writers.adopt(line, Numbered { number, adoption });
    tracing::info!(%cluster, %node, %timeline, "an operator made the node the writer of its timeline");
    Ok(vec![timeline])
}

fn newest_system(coordinator: &Coordinator, cluster: &ClusterName) -> Result<SystemIdentifier, Refusal> {
    let systems = coordinator.clusters.systems_of(cluster);
    systems.last().map(|row| row.system_identifier).ok_or_else(|| Refusal::ClusterUnknown { cluster: cluster.clone() })
}

fn failed(slot: &Slot, error: &dyn std::error::Error) -> Refusal {
    Refusal::StoreFailed { store: slot.name().to_string(), detail: chain(error) }
}
