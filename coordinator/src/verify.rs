//! Verifications that somebody asked for: operations with progress, whose report is kept for who asked.
//!
//! What is looked at and how it is judged is [`repository::verify`]'s; here it is run beside everything else. A coordinator
//! that stops ends it, and the next start says so.

use std::sync::Arc;
use std::time::Duration;

use process::clock;
use repository::name::{BackupId, ClusterName, StoreName};
use repository::store::ObjectStore;
use repository::verify::{self, Depth, Progress, Report, Request, StoreVerdict, VerifyError, Watch};
use tokio::sync::watch;

use crate::Coordinator;
use crate::operations::{Begun, NewWork, Operation, State};
use crate::refusal::Refusal;

/// Kind of these operations.
pub const KIND: &str = "verify";
/// How often progress is told.
const TOLD_EVERY: Duration = Duration::from_secs(1);

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Of which cluster.
    pub cluster: ClusterName,
    /// Only these stores; all if none.
    pub stores: Vec<StoreName>,
    /// Only this backup.
    pub backup: Option<BackupId>,
    /// How thoroughly.
    pub depth: Depth,
    /// The caller's identifier of the request.
    pub request_id: Option<String>,
}

/// Starts a verification, or finds the one that the same request started before.
///
/// # Errors
/// [`Refusal::ClusterUnknown`], [`Refusal::StoreUnknown`], [`Refusal::Precondition`] while another one of the cluster runs.
pub async fn start(coordinator: &Arc<Coordinator>, asked: Asked) -> Result<Operation, Refusal> {
    if coordinator.clusters.systems_of(&asked.cluster).is_empty() {
        return Err(Refusal::ClusterUnknown { cluster: asked.cluster });
    }
    if let Some(unknown) = asked.stores.iter().find(|store| coordinator.stores.get(store.as_str()).is_none()) {
        return Err(Refusal::StoreUnknown(unknown.to_string()));
    }
    let new = NewWork {
        kind: KIND,
        cluster: asked.cluster.clone(),
        node: None,
        reason: "asked for".to_owned(),
        request_id: asked.request_id.clone(),
    };
    let (operation, begun) = coordinator.operations.begin_work(new, clock::now()).await?;
    if begun == Begun::Now {
        let (coordinator, id) = (Arc::clone(coordinator), operation.id.clone());
        let tracker = coordinator.tracker.clone();
        tracker.spawn(async move { run(&coordinator, &id, asked).await });
    }
    Ok(operation)
}

async fn run(coordinator: &Coordinator, id: &str, asked: Asked) {
    let (told, progress) = watch::channel(Progress::default());
    let watch = Watch::default().telling(move |now| drop(told.send(now.clone())));
    let request = Request { backup: asked.backup, ..Request::all(asked.depth) };
    let looking = look(coordinator, &asked.cluster, &asked.stores, &request, &watch);
    let Some(looked) = beside(coordinator, id, looking, progress).await else { return };
    let report = match looked {
        Ok(report) => report,
        Err(error) => {
            coordinator.metrics.count_ended("failed");
            coordinator.operations.fail(id, crate::stores::chain(&error), clock::now()).await;
            return;
        }
    };
    if asked.stores.is_empty()
        && let Err(error) = coordinator.soundness.take(&report, asked.backup.is_some()).await
    {
        tracing::error!(%error, cluster = %asked.cluster, "the catalog did not take what a verification found");
    }
    let json = serde_json::to_string(&report).expect("a report has only text keys and plain values");
    coordinator.soundness.keep_report(id, json);
    coordinator.metrics.count_ended("done");
    end_well(coordinator, id, report.summary()).await;
}

/// Ends an operation with a last word.
pub(crate) async fn end_well(coordinator: &Coordinator, id: &str, last_word: String) {
    coordinator
        .operations
        .update(id, |operation| {
            if operation.state == State::Running {
                operation.state = State::Done;
                operation.step = last_word;
                operation.ended = Some(clock::now());
            }
        })
        .await;
}

/// Works until it is done, and tells how far it has come. `None` if the operation was ended from outside, or the coordinator
/// stops.
pub(crate) async fn beside<T>(
    coordinator: &Coordinator,
    id: &str,
    work: impl Future<Output = T>,
    progress: watch::Receiver<Progress>,
) -> Option<T> {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return Some(done),
            () = coordinator.stop.cancelled() => {
                coordinator.operations.fail(id, "the coordinator was stopped", clock::now()).await;
                return None;
            }
            () = tokio::time::sleep(TOLD_EVERY) => {}
        }
        let now = progress.borrow().clone();
        let operation = coordinator
            .operations
            .update(id, |operation| {
                if operation.state == State::Running {
                    operation.step = now.step;
                    operation.bytes_done = now.bytes_done;
                    operation.bytes_total = now.bytes_total;
                }
            })
            .await;
        if operation.is_none_or(|operation| operation.state != State::Running) {
            return None;
        }
    }
}

/// Looks at the stores that can be read; those that cannot are told as such.
///
/// # Errors
/// [`VerifyError`].
pub(crate) async fn look(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    only: &[StoreName],
    request: &Request,
    watch: &Watch,
) -> Result<Report, VerifyError> {
    let wanted = |name: &StoreName| only.is_empty() || only.contains(name);
    let slots: Vec<_> = coordinator.stores.all().iter().filter(|slot| wanted(slot.name())).collect();
    let readable: Vec<Arc<dyn ObjectStore>> =
        slots.iter().filter(|slot| slot.health().is_readable()).map(|slot| Arc::clone(&slot.store)).collect();
    let away: Vec<StoreVerdict> = slots
        .iter()
        .filter(|slot| !slot.health().is_readable())
        .map(|slot| StoreVerdict {
            store: slot.name().clone(),
            failed: Some(slot.health().to_string()),
            objects: 0,
            bytes: 0,
            left_out: 0,
        })
        .collect();
    let mut report = verify::verify(&readable, cluster, request, watch, &coordinator.scratch, clock::now()).await?;
    report.complete &= away.is_empty();
    report.stores.extend(away);
    Ok(report)
}

/// Ends verifications and repairs that a coordinator before this one left running.
pub async fn end_orphans(coordinator: &Coordinator) {
    for operation in coordinator.operations.running() {
        if operation.kind == KIND || operation.kind == crate::repair::KIND {
            coordinator.operations.fail(&operation.id, "the coordinator was stopped", clock::now()).await;
        }
    }
}
