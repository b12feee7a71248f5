//! Repairs between stores: what is known to be damaged in one store is put right from another, after it was shown.
//!
//! What can be done is planned from what verifications and scrubs found; each step proves both copies anew, so that nothing
//! depends on how old a finding is. WAL that a store lacks is copied by the next comparison of all stores.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use process::clock;
use repository::name::ClusterName;
use repository::store::ObjectStore;
use repository::verify::repair::{self, RepairPlan, Repaired, Step};
use repository::verify::{Finding, Progress};
use tokio::sync::watch;

use crate::Coordinator;
use crate::operations::{Begun, NewWork, Operation};
use crate::refusal::Refusal;
use crate::verify::{beside, end_well};

/// Kind of these operations.
pub const KIND: &str = "repair";
/// Reasons that a failed repair tells.
const REASONS_TOLD: usize = 5;

/// What can be put right of what is known.
///
/// # Errors
/// [`Refusal::ClusterUnknown`].
pub fn plan(coordinator: &Coordinator, cluster: &ClusterName) -> Result<RepairPlan, Refusal> {
    if coordinator.clusters.systems_of(cluster).is_empty() {
        return Err(Refusal::ClusterUnknown { cluster: cluster.clone() });
    }
    Ok(repair::plan(cluster, &coordinator.soundness.of(cluster).findings))
}

/// Starts a repair of all that can be put right, or finds the one that the same request started before.
///
/// # Errors
/// [`Refusal::ClusterUnknown`], [`Refusal::Precondition`] while another one of the cluster runs.
pub async fn start(
    coordinator: &Arc<Coordinator>,
    cluster: &ClusterName,
    request_id: Option<String>,
) -> Result<Operation, Refusal> {
    let plan = plan(coordinator, cluster)?;
    let reason = format!("asked for, {} objects", plan.steps.len());
    let new = NewWork { kind: KIND, cluster: cluster.clone(), node: None, reason, request_id };
    let (operation, begun) = coordinator.operations.begin_work(new, clock::now()).await?;
    if begun == Begun::Now {
        let (coordinator, cluster, id) = (Arc::clone(coordinator), cluster.clone(), operation.id.clone());
        let tracker = coordinator.tracker.clone();
        tracker.spawn(async move { run(&coordinator, &cluster, &id, plan).await });
    }
    Ok(operation)
}

/// What came of the steps.
#[derive(Debug, Default)]
struct Done {
    objects: u64,
    bytes: u64,
    retained: u64,
    failed: Vec<String>,
}

async fn run(coordinator: &Coordinator, cluster: &ClusterName, id: &str, plan: RepairPlan) {
    let (told, progress) = watch::channel(Progress::default());
    let working = async {
        let mut done = Done::default();
        for (count, step) in (1..).zip(&plan.steps) {
            let text = format!("{count} of {}: {} in {}", plan.steps.len(), step.key, step.store);
            let _ = told.send(Progress { step: text, bytes_done: done.bytes, bytes_total: 0 });
            one(coordinator, cluster, step, &mut done).await;
        }
        done
    };
    let Some(done) = beside(coordinator, id, working, progress).await else { return };
    if plan.compare_stores {
        coordinator.list_all.store(true, Ordering::Relaxed);
        coordinator.kick.notify_one();
    }
    let mut word = format!("{} objects put right, {} bytes", done.objects, done.bytes);
    if plan.compare_stores {
        word.push_str("; stores are compared, and get the WAL they lack");
    }
    if done.retained > 0 {
        word.push_str(&format!("; {} are kept by a lock of their store", done.retained));
    }
    tracing::info!(%cluster, objects = done.objects, bytes = done.bytes, failed = done.failed.len(), "a repair ended");
    if done.failed.is_empty() {
        coordinator.metrics.count_ended("done");
        end_well(coordinator, id, word).await;
    } else {
        coordinator.metrics.count_ended("failed");
        let told = done.failed.iter().take(REASONS_TOLD).cloned().collect::<Vec<_>>().join("; ");
        let error = format!("{word}; {} were not: {told}", done.failed.len());
        coordinator.operations.fail(id, error, clock::now()).await;
    }
}

async fn one(coordinator: &Coordinator, cluster: &ClusterName, step: &Step, done: &mut Done) {
    let stores: Vec<Arc<dyn ObjectStore>> =
        coordinator.stores.readable().iter().map(|slot| Arc::clone(&slot.store)).collect();
    match repair::apply(&stores, step, &coordinator.scratch).await {
        Ok(Repaired::PutRight { from, bytes }) => {
            done.objects += 1;
            done.bytes += bytes;
            tracing::info!(%cluster, store = %step.store, key = %step.key, %from, bytes, found = step.found,
                "a damaged object was put right");
            settle(coordinator, cluster, step).await;
        }
        Ok(Repaired::WasSound) => settle(coordinator, cluster, step).await,
        Ok(Repaired::Retained) => done.retained += 1,
        Err(error) => done.failed.push(format!("{}: {}", step.key, crate::stores::chain(&error))),
    }
}

/// What was put right is not wrong any more.
async fn settle(coordinator: &Coordinator, cluster: &ClusterName, step: &Step) {
    coordinator.stores.complaints().settle(&step.store, &step.key);
    let is_it = |finding: &Finding| {
        finding.store.as_ref() == Some(&step.store) && finding.object.as_deref() == Some(step.key.as_str())
    };
    let change = |known: &mut crate::soundness::Known| {
        known.findings.retain(|finding| !is_it(finding));
        let needed: Vec<_> = known.findings.iter().flat_map(|finding| finding.backups.clone()).collect();
        known.not_restorable.retain(|backup| needed.contains(backup));
    };
    if let Err(error) = coordinator.soundness.change(cluster, change).await {
        tracing::error!(%error, %cluster, "the catalog did not take that an object was put right");
    }
}
