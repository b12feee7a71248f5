//! What an operator decides: which content of a conflicting WAL file is served, and which node writes a timeline.
//!
//! A decision is a new object in every store that is there, under one number in all of them; reconciliation brings it to the
//! others. Nothing is removed. A store that has the chosen content nowhere serves nothing under the name from then on.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use postgres_format::{SystemIdentifier, Timeline, WalFileName};
use repository::adoption::{self, Adoption, Numbered};
use repository::fingerprint::Fingerprint;
use repository::key;
use repository::name::{ClusterName, NodeName};
use repository::store::{ObjectStore, Put};
use repository::wal::{self, Decision, Together};

use crate::Coordinator;
use crate::refusal::Refusal;
use crate::stores::{Slot, chain};
use crate::writer::Line;

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
    if matches!(name, WalFileName::History(_)) {
        let text = "a history file has one place; the stored one stays, the refused one is kept under conflict/";
        return Err(Refusal::Precondition(text.to_owned()));
    }
    let slots = coordinator.stores.healthy();
    let mut contents = BTreeSet::new();
    let mut is_held = false;
    for slot in &slots {
        let variants =
            wal::variants(&*slot.store, cluster, system, &name).await.map_err(|error| failed(slot, &error))?;
        is_held |= variants.iter().any(|variant| variant.fingerprint == Some(fingerprint));
        contents.extend(variants.into_iter().map(|variant| variant.content_name().to_owned()));
    }
    if !is_held {
        return Err(Refusal::Precondition(format!("no store has {name} with fingerprint {fingerprint}")));
    }
    if !is_to_be_decided(&slots, cluster, system, &name, contents.len()).await? {
        let stores = slots.iter().map(|slot| slot.name().to_string()).collect();
        return Err(Refusal::NoConflict { cluster: cluster.clone(), name, stores });
    }
    let decision = Decision { format: 1, fingerprint, reason: "chosen by ResolveConflict".to_owned(), written: now };
    let stores: Vec<&dyn ObjectStore> = slots.iter().map(|slot| &*slot.store).collect();
    let decided = wal::decide_in(&stores, cluster, system, &name, &decision).await;
    decided.map_err(|error| Refusal::NoStore(chain(&error)))?;
    tracing::info!(%cluster, %name, %fingerprint, "an operator chose the content that is served");
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
    let adoption = Adoption::new(node.clone(), now);
    let body = bytes::Bytes::from(adoption.to_bytes());
    let healthy = coordinator.stores.healthy();
    if healthy.is_empty() {
        return Err(Refusal::NoStore("no store is healthy".to_owned()));
    }
    let line = Line { cluster: cluster.clone(), system, timeline };
    // One number in all stores, above every one that is known: of two the higher counts, wherever it lies.
    let mut last = coordinator.writers.adopted(&line).map_or(0, |known| known.number);
    for slot in &healthy {
        let newest = adoption::newest(&*slot.store, cluster, system, timeline).await;
        last = newest.map_err(|error| failed(slot, &error))?.map_or(last, |newest| last.max(newest.number));
    }
    let number = last.saturating_add(1);
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
