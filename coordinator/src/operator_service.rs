//! `OperatorService`: what people and scripts ask. Each call is read here and done elsewhere.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use jiff::Timestamp;
use postgres_format::{SystemIdentifier, WalFileName};
use process::clock;
use proto::convert::{FieldError, parsed};
use proto::operator::operator_service_server::OperatorService;
use proto::operator::{
    self as wire, AcceptStoreRequest, AcceptStoreResponse, AddHoldRequest, AddHoldResponse, AdoptWriterRequest,
    AdoptWriterResponse, BackupShape, BackupSource, BackupType as WireType, CancelOperationRequest,
    CancelOperationResponse, ChangePaceRequest, ChangePaceResponse, CheckClusterRequest, CheckClusterResponse,
    CreateClusterRequest, CreateClusterResponse, ExpireRequest, ExpireResponse, GetInfoRequest, GetInfoResponse,
    GetOperationRequest, GetOperationResponse, GetVerificationRequest, GetVerificationResponse, HoldForRestoreRequest,
    HoldForRestoreResponse, ListHoldsRequest, ListHoldsResponse, ListOperationsRequest, ListOperationsResponse,
    OperationState, PlanRepairRequest, PlanRepairResponse, RebuildCatalogRequest, RebuildCatalogResponse,
    RemoveHoldRequest, RemoveHoldResponse, RepairStep, ResolveConflictRequest, ResolveConflictResponse,
    StartBackupRequest, StartBackupResponse, StartComparisonRequest, StartComparisonResponse, StartRepairRequest,
    StartRepairResponse, StartVerificationRequest, StartVerificationResponse, WaitOperationRequest,
    WaitOperationResponse, WatchOperationRequest, WatchOperationResponse,
};
use repository::backup::origin::BackupType;
use repository::fingerprint::Fingerprint;
use repository::name::{BackupId, ClusterName, NodeName, StoreName};
use repository::root::Hold;
use repository::verify::Depth;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::Coordinator;
use crate::backups::{self, Asked, LABEL_BYTES_MAX};
use crate::clusters::NewCluster;
use crate::fleet::{ShapeWish, Source};
use crate::operations::{Operation, State};
use crate::pace::{self, Pace};
use crate::peer::Peer;
use crate::refusal::Refusal;
use crate::{acceptance, check, comparison, holds, info, reconcile, repair, retention, verify};

/// The wait when a caller does not say.
const WAIT_DEFAULT: Duration = Duration::from_secs(60);
/// The longest wait.
const WAIT_MAX: Duration = Duration::from_secs(24 * 3600);
/// Operations listed when a caller does not say, and at most.
const PAGE_DEFAULT: u32 = 50;
const PAGE_MAX: u32 = 1000;
/// Longest request identifier, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 200;

/// The service on its coordinator.
#[derive(Debug, Clone)]
pub struct Operator(pub Arc<Coordinator>);

/// Where a follower of an operation is.
enum Follow {
    /// Nothing told yet.
    First(watch::Receiver<Operation>),
    /// The next change is waited for.
    Next(watch::Receiver<Operation>),
    /// The end was told.
    Ended,
}

fn read<T>(field: &'static str, text: &str) -> Result<T, Refusal>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
{
    Ok(parsed(field, text)?)
}

fn optional<T>(field: &'static str, text: &str) -> Result<Option<T>, Refusal>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
{
    if text.is_empty() { Ok(None) } else { read(field, text).map(Some) }
}

fn names(stores: &[StoreName]) -> Vec<String> {
    stores.iter().map(ToString::to_string).collect()
}

fn wait(seconds: u32) -> Duration {
    match seconds {
        0 => WAIT_DEFAULT,
        seconds => Duration::from_secs(seconds.into()).min(WAIT_MAX),
    }
}

/// A caller's identifier of a request.
fn request_id(text: String) -> Result<Option<String>, Refusal> {
    match text.len() {
        0 => Ok(None),
        1..=REQUEST_ID_BYTES_MAX => Ok(Some(text)),
        _ => Err(FieldError::new("request_id", format!("must have at most {REQUEST_ID_BYTES_MAX} bytes")).into()),
    }
}

/// An operation for the wire.
fn to_wire(operation: Operation) -> wire::Operation {
    wire::Operation {
        operation: operation.id,
        kind: operation.kind,
        cluster: operation.cluster.to_string(),
        node: operation.node.to_string(),
        state: match operation.state {
            State::Running => OperationState::Running,
            State::Done => OperationState::Done,
            State::Failed => OperationState::Failed,
            State::WaitingForWal => OperationState::WaitingForWal,
        }
        .into(),
        step: operation.step,
        bytes_done: operation.bytes_done,
        bytes_total: operation.bytes_total,
        error: operation.error,
        started: operation.started.to_string(),
        ended: operation.ended.map(|ended| ended.to_string()).unwrap_or_default(),
        backup: operation.backup.map(|backup| backup.to_string()).unwrap_or_default(),
        reason: operation.reason,
        primary: operation.primary.map(|primary| primary.to_string()).unwrap_or_default(),
    }
}

impl Operator {
    fn new_cluster(&self, request: &CreateClusterRequest) -> Result<NewCluster, Refusal> {
        let cluster: ClusterName = read("cluster", &request.cluster)?;
        let nodes = self.0.sessions.nodes(Some(&cluster));
        let connected: Vec<_> = nodes.iter().filter(|node| node.connected).collect();
        let asked = (request.system_identifier != 0).then(|| SystemIdentifier::new(request.system_identifier));
        let reported = connected.first().map(|node| node.server.system_identifier);
        if let Some(other) = connected.iter().find(|node| Some(node.server.system_identifier) != asked.or(reported)) {
            let detail = format!("node {} has system identifier {}", other.node, other.server.system_identifier);
            return Err(Refusal::NotCreated { cluster, detail });
        }
        let Some(system_identifier) = asked.or(reported) else {
            let detail = "no agent of it is connected; start one, or give the system identifier".to_owned();
            return Err(Refusal::NotCreated { cluster, detail });
        };
        let server = connected.first().map(|node| node.server);
        Ok(NewCluster {
            cluster,
            system_identifier,
            postgres_major: server.and_then(|server| server.postgres_major),
            segment_size: server.map(|server| server.segment_size),
        })
    }

    async fn start(&self, request: StartBackupRequest) -> Result<Operation, Refusal> {
        let cluster: ClusterName = read("cluster", &request.cluster)?;
        if request.label.len() > LABEL_BYTES_MAX {
            return Err(FieldError::new("label", format!("must have at most {LABEL_BYTES_MAX} bytes")).into());
        }
        if request.request_id.len() > REQUEST_ID_BYTES_MAX {
            let limit = format!("must have at most {REQUEST_ID_BYTES_MAX} bytes");
            return Err(FieldError::new("request_id", limit).into());
        }
        let source = match request.source() {
            BackupSource::Unspecified => Source::PreferStandby,
            BackupSource::Standby => Source::Standby,
            BackupSource::Primary => Source::Primary,
        };
        let shape = match request.shape() {
            BackupShape::Unspecified => ShapeWish::Auto,
            BackupShape::Standby => ShapeWish::Standby,
            BackupShape::Hybrid => ShapeWish::Hybrid,
        };
        let backup_type = match request.r#type() {
            WireType::Unspecified | WireType::Incr => BackupType::Incr,
            WireType::Diff => BackupType::Diff,
            WireType::Full => BackupType::Full,
        };
        let asked = Asked {
            node: optional::<NodeName>("node", &request.node)?,
            source,
            shape,
            backup_type,
            start_fast: request.start_fast,
            pace: Pace { bytes_per_second: request.bytes_per_second, parallel: request.parallel },
            label: request.label,
            request_id: Some(request.request_id).filter(|id| !id.is_empty()),
            why: "asked for".to_owned(),
        };
        backups::start(&self.0, &cluster, asked, clock::now()).await
    }

    fn now(&self) -> Timestamp {
        clock::now()
    }
}

#[tonic::async_trait]
impl OperatorService for Operator {
    async fn create_cluster(
        &self,
        request: Request<CreateClusterRequest>,
    ) -> Result<Response<CreateClusterResponse>, Status> {
        let new = self.new_cluster(request.get_ref())?;
        let cluster = new.cluster.clone();
        let created = self.0.clusters.create(&self.0.stores, new, self.now()).await?;
        tracing::info!(%cluster, system_identifier = %created.system_identifier, "the cluster was created");
        self.0.kick.notify_one();
        Ok(Response::new(CreateClusterResponse {
            system_identifier: created.system_identifier.as_u64(),
            stores_initialised: created.stores_initialised,
            stores_known: created.stores_known,
        }))
    }

    async fn get_info(&self, request: Request<GetInfoRequest>) -> Result<Response<GetInfoResponse>, Status> {
        let cluster = optional::<ClusterName>("cluster", &request.get_ref().cluster)?;
        let info_json = info::collect(&self.0, cluster.as_ref(), self.now()).await?;
        Ok(Response::new(GetInfoResponse { info_json }))
    }

    async fn check_cluster(
        &self,
        request: Request<CheckClusterRequest>,
    ) -> Result<Response<CheckClusterResponse>, Status> {
        let cluster: ClusterName = read("cluster", &request.get_ref().cluster)?;
        let lines = check::check(&self.0, &cluster, wait(request.get_ref().timeout_seconds)).await?;
        Ok(Response::new(CheckClusterResponse { lines }))
    }

    async fn start_backup(
        &self,
        request: Request<StartBackupRequest>,
    ) -> Result<Response<StartBackupResponse>, Status> {
        let operation = self.start(request.into_inner()).await?;
        Ok(Response::new(StartBackupResponse { operation: Some(to_wire(operation)) }))
    }

    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<GetOperationResponse>, Status> {
        let operation = self.0.operations.get(&request.get_ref().operation).await?;
        Ok(Response::new(GetOperationResponse { operation: Some(to_wire(operation)) }))
    }

    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let request = request.into_inner();
        let cluster = optional("cluster", &request.cluster)?;
        let limit = match request.page_size {
            0 => PAGE_DEFAULT,
            size if size <= PAGE_MAX => size,
            _ => return Err(Refusal::from(FieldError::new("page_size", "must be from 1 to 1000")).into()),
        };
        let operations = self.0.operations.list(cluster, limit).await?;
        Ok(Response::new(ListOperationsResponse { operations: operations.into_iter().map(to_wire).collect() }))
    }

    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<WaitOperationResponse>, Status> {
        let request = request.into_inner();
        let waited = self.0.operations.wait(&request.operation, wait(request.timeout_seconds));
        let operation = tokio::select! {
            operation = waited => operation?,
            () = self.0.stop.cancelled() => return Err(Refusal::ShuttingDown.into()),
        };
        Ok(Response::new(WaitOperationResponse { operation: Some(to_wire(operation)) }))
    }

    type WatchOperationStream = Pin<Box<dyn Stream<Item = Result<WatchOperationResponse, Status>> + Send>>;

    async fn watch_operation(
        &self,
        request: Request<WatchOperationRequest>,
    ) -> Result<Response<Self::WatchOperationStream>, Status> {
        let receiver = self.0.operations.follow(&request.get_ref().operation).await?;
        let changes = stream::unfold(Follow::First(receiver), |follow| async {
            let receiver = match follow {
                Follow::First(receiver) => receiver,
                Follow::Next(mut receiver) => {
                    receiver.changed().await.ok()?;
                    receiver
                }
                Follow::Ended => return None,
            };
            let mut receiver = receiver;
            let operation = receiver.borrow_and_update().clone();
            let next = if operation.ended.is_none() { Follow::Next(receiver) } else { Follow::Ended };
            Some((operation, next))
        });
        let stop = self.0.stop.clone();
        let answers = changes.map(|operation| Ok(WatchOperationResponse { operation: Some(to_wire(operation)) }));
        Ok(Response::new(answers.take_until(stop.cancelled_owned()).boxed()))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<CancelOperationResponse>, Status> {
        let operation = backups::cancel(&self.0, &request.get_ref().operation, self.now()).await?;
        Ok(Response::new(CancelOperationResponse { operation: Some(to_wire(operation)) }))
    }

    async fn change_pace(&self, request: Request<ChangePaceRequest>) -> Result<Response<ChangePaceResponse>, Status> {
        let operation = pace::change(&self.0, request.into_inner()).await?;
        Ok(Response::new(ChangePaceResponse { operation: Some(to_wire(operation)) }))
    }

    async fn rebuild_catalog(
        &self,
        _: Request<RebuildCatalogRequest>,
    ) -> Result<Response<RebuildCatalogResponse>, Status> {
        // A task of its own: a caller that goes away leaves no half-made catalog behind.
        let coordinator = Arc::clone(&self.0);
        let rebuilding = self.0.tracker.spawn(async move { reconcile::rebuild(&coordinator).await });
        let rebuilt = rebuilding.await.map_err(|_| Refusal::ShuttingDown)??;
        Ok(Response::new(RebuildCatalogResponse { wal_objects: rebuilt.wal_objects, backups: rebuilt.backups }))
    }

    async fn resolve_conflict(
        &self,
        request: Request<ResolveConflictRequest>,
    ) -> Result<Response<ResolveConflictResponse>, Status> {
        let request = request.into_inner();
        let cluster: ClusterName = read("cluster", &request.cluster)?;
        let name: WalFileName = read("wal_file", &request.wal_file)?;
        let fingerprint: Fingerprint = read("fingerprint", &request.fingerprint)?;
        crate::decisions::resolve(&self.0, &cluster, name, fingerprint, self.now()).await?;
        Ok(Response::new(ResolveConflictResponse {}))
    }

    async fn adopt_writer(
        &self,
        request: Request<AdoptWriterRequest>,
    ) -> Result<Response<AdoptWriterResponse>, Status> {
        let cluster: ClusterName = read("cluster", &request.get_ref().cluster)?;
        let node: NodeName = read("node", &request.get_ref().node)?;
        let named = postgres_format::Timeline::new(request.get_ref().timeline);
        let timelines = crate::decisions::adopt_writer(&self.0, &cluster, &node, named, self.now()).await?;
        Ok(Response::new(AdoptWriterResponse { timelines: timelines.into_iter().map(|line| line.get()).collect() }))
    }

    async fn start_verification(
        &self,
        request: Request<StartVerificationRequest>,
    ) -> Result<Response<StartVerificationResponse>, Status> {
        let request = request.into_inner();
        let stores: Result<Vec<StoreName>, Refusal> = request.stores.iter().map(|name| read("stores", name)).collect();
        let asked = verify::Asked {
            cluster: read("cluster", &request.cluster)?,
            stores: stores?,
            backup: optional::<BackupId>("backup", &request.backup)?,
            depth: if request.full { Depth::Full } else { Depth::Digests },
            request_id: request_id(request.request_id)?,
        };
        let operation = verify::start(&self.0, asked).await?;
        Ok(Response::new(StartVerificationResponse { operation: Some(to_wire(operation)) }))
    }

    async fn get_verification(
        &self,
        request: Request<GetVerificationRequest>,
    ) -> Result<Response<GetVerificationResponse>, Status> {
        let id = &request.get_ref().operation;
        let report = self.0.soundness.report(id).ok_or_else(|| Refusal::OperationUnknown(id.clone()))?;
        Ok(Response::new(GetVerificationResponse { report_json: report }))
    }

    async fn start_comparison(
        &self,
        request: Request<StartComparisonRequest>,
    ) -> Result<Response<StartComparisonResponse>, Status> {
        let request = request.into_inner();
        let asked = comparison::Asked {
            cluster: read("cluster", &request.cluster)?,
            node: optional::<NodeName>("node", &request.node)?,
            share: None,
            bytes_per_second: 0,
            why: "asked for".to_owned(),
            request_id: request_id(request.request_id)?,
        };
        let operation = comparison::start(&self.0, asked).await?;
        Ok(Response::new(StartComparisonResponse { operation: Some(to_wire(operation)) }))
    }

    async fn plan_repair(&self, request: Request<PlanRepairRequest>) -> Result<Response<PlanRepairResponse>, Status> {
        let cluster: ClusterName = read("cluster", &request.get_ref().cluster)?;
        let plan = repair::plan(&self.0, &cluster)?;
        let known = self.0.soundness.of(&cluster);
        let looked = known.verified.into_iter().chain(known.shares.values().copied()).max();
        let steps = plan.steps.into_iter().map(|step| RepairStep {
            store: step.store.to_string(),
            object: step.key.to_string(),
            found: step.found,
            sources: step.from.iter().map(ToString::to_string).collect(),
        });
        Ok(Response::new(PlanRepairResponse {
            steps: steps.collect(),
            compare_stores: plan.compare_stores,
            beyond: plan.beyond,
            looked: looked.map(|at| at.to_string()).unwrap_or_default(),
        }))
    }

    async fn start_repair(
        &self,
        request: Request<StartRepairRequest>,
    ) -> Result<Response<StartRepairResponse>, Status> {
        let request = request.into_inner();
        let cluster: ClusterName = read("cluster", &request.cluster)?;
        let operation = repair::start(&self.0, &cluster, request_id(request.request_id)?).await?;
        Ok(Response::new(StartRepairResponse { operation: Some(to_wire(operation)) }))
    }

    async fn expire(&self, request: Request<ExpireRequest>) -> Result<Response<ExpireResponse>, Status> {
        let request = request.into_inner();
        let cluster: ClusterName = read("cluster", &request.cluster)?;
        let only = optional::<StoreName>("store", &request.store)?;
        // A task of its own: a caller that goes away does not stop it halfway.
        let (coordinator, now) = (Arc::clone(&self.0), self.now());
        let expiring = self.0.tracker.spawn(async move {
            match request.confirm.as_str() {
                "" => retention::show(&coordinator, &cluster, only.as_ref(), now).await,
                shown => retention::confirm(&coordinator, &cluster, only.as_ref(), shown, now).await,
            }
        });
        let report = expiring.await.map_err(|_| Refusal::ShuttingDown)??;
        let report_json = serde_json::to_string(&report).expect("a report has only text keys and plain values");
        Ok(Response::new(ExpireResponse { report_json }))
    }

    async fn accept_store(
        &self,
        request: Request<AcceptStoreRequest>,
    ) -> Result<Response<AcceptStoreResponse>, Status> {
        let request = request.into_inner();
        let cluster = optional::<ClusterName>("cluster", &request.cluster)?;
        let shown = Some(request.confirm).filter(|shown| !shown.is_empty());
        let report = acceptance::accept(&self.0, &request.store, cluster.as_ref(), shown.as_deref()).await?;
        let report_json = serde_json::to_string(&report).expect("a report has only text keys and plain values");
        Ok(Response::new(AcceptStoreResponse { report_json }))
    }

    async fn add_hold(&self, request: Request<AddHoldRequest>) -> Result<Response<AddHoldResponse>, Status> {
        let peer = Peer::of(&request)?;
        let request = request.into_inner();
        let cluster: ClusterName = read("cluster", &request.cluster)?;
        let (backup, by) = (read("backup", &request.backup)?, holds::name_of(&peer, &request.by));
        let until = optional("until", &request.until)?;
        let hold = Hold { until, ..Hold::new(backup, request.reason, by, self.now()) };
        let changed = holds::add(&self.0, &cluster, hold).await?;
        Ok(Response::new(AddHoldResponse { stores: names(&changed.stores), others: changed.others }))
    }

    async fn hold_for_restore(
        &self,
        request: Request<HoldForRestoreRequest>,
    ) -> Result<Response<HoldForRestoreResponse>, Status> {
        let peer = Peer::of(&request)?;
        let request = request.into_inner();
        let cluster: ClusterName = read("cluster", &request.cluster)?;
        let backup: BackupId = read("backup", &request.backup)?;
        let by = holds::name_of_restore(&peer, &request.place);
        let changed = holds::restore(&self.0, &cluster, backup, &by).await?;
        Ok(Response::new(HoldForRestoreResponse { stores: names(&changed.stores), others: changed.others }))
    }

    async fn remove_hold(&self, request: Request<RemoveHoldRequest>) -> Result<Response<RemoveHoldResponse>, Status> {
        let cluster: ClusterName = read("cluster", &request.get_ref().cluster)?;
        let backup: BackupId = read("backup", &request.get_ref().backup)?;
        let changed = holds::remove(&self.0, &cluster, backup).await?;
        Ok(Response::new(RemoveHoldResponse { stores: names(&changed.stores), others: changed.others }))
    }

    async fn list_holds(&self, request: Request<ListHoldsRequest>) -> Result<Response<ListHoldsResponse>, Status> {
        let cluster: ClusterName = read("cluster", &request.get_ref().cluster)?;
        let found = holds::list(&self.0, &cluster).await?;
        let holds = found.into_iter().map(|(hold, stores)| wire::Hold {
            backup: hold.backup.to_string(),
            reason: hold.reason,
            by: hold.by,
            since: hold.since.to_string(),
            until: hold.until.map(|until| until.to_string()).unwrap_or_default(),
            stores: names(&stores),
        });
        Ok(Response::new(ListHoldsResponse { holds: holds.collect() }))
    }
}
