//! Why the coordinator says no, and the one map from that to gRPC.
//!
//! Each refusal has a canonical code and a stable reason in `google.rpc.ErrorInfo` (domain `pgconvoy`), so that agents
//! and scripts decide by reason and people read the message. Nothing else in this crate makes a `tonic::Status`.

use postgres_format::{SystemIdentifier, Timeline, WalFileName};
use proto::convert::FieldError;
use repository::name::{ClusterName, NodeName};
use repository::root::SetBack;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::catalog::CatalogError;
use crate::fleet::NoFitNode;

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A field holds what the domain cannot.
    #[error("{0}")]
    Field(#[from] FieldError),
    /// The stream did not follow the protocol.
    #[error("{0}")]
    Protocol(&'static str),
    /// The client certificate names another node.
    #[error("the client certificate names {}, and the call is about node {node}", named.join(", "))]
    NodeMismatch {
        /// The node in the call.
        node: NodeName,
        /// Names in the certificate.
        named: Vec<String>,
    },
    /// Another agent is connected under the node's name.
    #[error(
        "another agent is connected as node {node} (data directory {data_directory}); each data directory needs a node \
         name and a spool of its own, also that of a cloned host"
    )]
    NodeTaken {
        /// The node.
        node: NodeName,
        /// What the connected agent says where its data directory is.
        data_directory: String,
    },
    /// The node's name is kept for the agent that had it last.
    #[error(
        "the name of node {node} is kept for the agent that was connected last (data directory {data_directory}); if that \
         one is gone for good, this agent gets in by itself in {} s, else it needs a node name and a spool of its own",
        left.as_secs_f64().ceil()
    )]
    NodeKept {
        /// The node.
        node: NodeName,
        /// What the last agent said where its data directory is.
        data_directory: String,
        /// For how long it is kept.
        left: std::time::Duration,
    },
    /// The cluster was never created.
    #[error("cluster {cluster} is not known here; run: pgconvoy cluster create {cluster}")]
    ClusterUnknown {
        /// The cluster.
        cluster: ClusterName,
    },
    /// The cluster has another system identifier.
    #[error(
        "cluster {cluster} has system identifier {expected}, and the node's data directory has {found}; it belongs to \
         another cluster, or was made anew and needs a cluster name of its own"
    )]
    SystemIdentifierMismatch {
        /// The cluster.
        cluster: ClusterName,
        /// What the stores say.
        expected: SystemIdentifier,
        /// What the caller has.
        found: SystemIdentifier,
    },
    /// Another node writes this timeline.
    #[error(
        "timeline {timeline} of cluster {cluster} is written by node {writer}, and node {node} is out of recovery on it as \
         well; shut one of them down, or run: pgconvoy node adopt {cluster} {node}"
    )]
    ForeignWriter {
        /// The cluster.
        cluster: ClusterName,
        /// The timeline.
        timeline: Timeline,
        /// The node that writes it.
        writer: NodeName,
        /// The refused node.
        node: NodeName,
    },
    /// Another content has the file's name.
    #[error(
        "{name} of cluster {cluster} is stored with other content; both are kept, an operator must choose ({detail})"
    )]
    WalConflict {
        /// The cluster.
        cluster: ClusterName,
        /// The file.
        name: WalFileName,
        /// What was found, for people.
        detail: String,
    },
    /// There is nothing to choose.
    #[error("{name} of cluster {cluster} is in no conflict in {}; nothing was decided", stores.join(", "))]
    NoConflict {
        /// The cluster.
        cluster: ClusterName,
        /// The file.
        name: WalFileName,
        /// The stores that were asked.
        stores: Vec<String>,
    },
    /// Another content has the object's key.
    #[error("object {key} exists with other content")]
    ObjectConflict {
        /// The key.
        key: String,
    },
    /// The bytes are not what was announced.
    #[error("the object is damaged: {0}; send it again")]
    BodyDamaged(String),
    /// A history file, or backup history file, is none.
    #[error("{name} is not what its name says: {problem}")]
    TextInvalid {
        /// The file.
        name: WalFileName,
        /// What is wrong with it.
        problem: String,
    },
    /// The stores hold a damaged copy of it and no whole one.
    #[error(
        "the stored copy is damaged and no other store is healthy: {0}; keep the damaged object elsewhere for inspection and \
         delete it from its store, then the file is archived by itself"
    )]
    StoredCopyDamaged(String),
    /// Every store that could take it is nearly full.
    #[error("no store takes new objects: {0}; use the direct road and make room")]
    StoreFull(String),
    /// No store took it.
    #[error("no store took the object: {0}")]
    NoStore(String),
    /// There is no such store.
    #[error("there is no store named {0}")]
    StoreUnknown(String),
    /// A store lost roots that were there; nothing is committed in it until an operator accepts that.
    #[error(transparent)]
    StoreSetBack(#[from] SetBack),
    /// What was shown of a store that was set back is not what there is now.
    #[error(
        "what store {store} lost is not what was shown as {shown} (that is {now} now): nothing was accepted; look again with: \
         pgconvoy store accept {store}"
    )]
    AcceptanceMoved {
        /// The store.
        store: String,
        /// The plan that was confirmed.
        shown: String,
        /// The plan as it would be now.
        now: String,
    },
    /// A store failed in a read.
    #[error("store {store} cannot be read: {detail}")]
    StoreFailed {
        /// The store.
        store: String,
        /// What it said.
        detail: String,
    },
    /// The object does not exist, and the store itself said so.
    #[error("store {store} has no object {key}")]
    ObjectAbsent {
        /// The store.
        store: String,
        /// The key.
        key: String,
    },
    /// No node can take a backup.
    #[error("{0}")]
    NoFitNode(#[from] NoFitNode),
    /// A backup of the cluster is running.
    #[error(
        "a backup of cluster {cluster} is running on node {node} (operation {operation}); wait for it or cancel it"
    )]
    BackupRunning {
        /// The cluster.
        cluster: ClusterName,
        /// The node.
        node: NodeName,
        /// The running operation.
        operation: String,
    },
    /// A backup cannot be published.
    #[error("backup {backup} is not published: {detail}")]
    NotPublished {
        /// The backup.
        backup: String,
        /// Why, and what to do.
        detail: String,
    },
    /// There is no such operation.
    #[error("there is no operation {0}")]
    OperationUnknown(String),
    /// The cluster cannot be created.
    #[error("cluster {cluster} is not created: {detail}")]
    NotCreated {
        /// The cluster.
        cluster: ClusterName,
        /// Why, and what to do.
        detail: String,
    },
    /// What was shown before a confirmation is not what would be done now.
    #[error(
        "plan {shown} of cluster {cluster} is not what would be done now (that is {now}): nothing was removed; look again \
         with: pgconvoy expire {cluster}"
    )]
    PlanMoved {
        /// The cluster.
        cluster: ClusterName,
        /// The plan that was confirmed.
        shown: String,
        /// The plan as it would be now.
        now: String,
    },
    /// What was asked cannot be done now.
    #[error("{0}")]
    Precondition(String),
    /// The caller sent nothing for too long.
    #[error("nothing was received for {0} s")]
    Silence(u64),
    /// The catalog failed.
    #[error("the catalog failed: {0}")]
    Catalog(#[from] CatalogError),
    /// The coordinator is on its way out.
    #[error("the coordinator is shutting down")]
    ShuttingDown,
    /// The caller went away or broke the stream.
    #[error("the stream broke: {0}")]
    Stream(String),
    /// The state directory failed.
    #[error("the state directory cannot be written: {0}")]
    StateDirectory(#[source] std::io::Error),
}

impl Refusal {
    /// Canonical code and stable reason.
    fn meaning(&self) -> (Code, &'static str) {
        match self {
            Self::Field(_) => (Code::InvalidArgument, "FIELD_INVALID"),
            Self::Protocol(_) => (Code::InvalidArgument, "PROTOCOL"),
            Self::NodeMismatch { .. } => (Code::PermissionDenied, "NODE_MISMATCH"),
            Self::NodeTaken { .. } | Self::NodeKept { .. } => (Code::AlreadyExists, "NODE_TAKEN"),
            Self::ClusterUnknown { .. } => (Code::FailedPrecondition, "CLUSTER_UNKNOWN"),
            Self::SystemIdentifierMismatch { .. } => (Code::FailedPrecondition, "SYSTEM_IDENTIFIER_MISMATCH"),
            Self::ForeignWriter { .. } => (Code::FailedPrecondition, "FOREIGN_WRITER"),
            Self::WalConflict { .. } => (Code::AlreadyExists, "WAL_CONFLICT"),
            Self::NoConflict { .. } => (Code::FailedPrecondition, "NO_CONFLICT"),
            Self::ObjectConflict { .. } => (Code::AlreadyExists, "OBJECT_CONFLICT"),
            Self::BodyDamaged(_) => (Code::DataLoss, "BODY_DAMAGED"),
            Self::TextInvalid { .. } => (Code::InvalidArgument, "TEXT_INVALID"),
            Self::StoredCopyDamaged(_) => (Code::FailedPrecondition, "STORED_COPY_DAMAGED"),
            Self::StoreFull(_) => (Code::ResourceExhausted, "STORE_FULL"),
            Self::NoStore(_) => (Code::Unavailable, "NO_STORE"),
            // Not NOT_FOUND, which says that a store has no such object.
            Self::StoreUnknown(_) => (Code::FailedPrecondition, "STORE_UNKNOWN"),
            Self::StoreSetBack(_) => (Code::FailedPrecondition, "STORE_SET_BACK"),
            Self::StoreFailed { .. } => (Code::Unavailable, "STORE_FAILED"),
            Self::ObjectAbsent { .. } => (Code::NotFound, "OBJECT_ABSENT"),
            Self::NoFitNode(_) => (Code::FailedPrecondition, "NO_FIT_NODE"),
            Self::BackupRunning { .. } => (Code::FailedPrecondition, "BACKUP_RUNNING"),
            Self::NotPublished { .. } => (Code::FailedPrecondition, "NOT_PUBLISHED"),
            Self::OperationUnknown(_) => (Code::NotFound, "OPERATION_UNKNOWN"),
            Self::NotCreated { .. } => (Code::FailedPrecondition, "NOT_CREATED"),
            Self::PlanMoved { .. } | Self::AcceptanceMoved { .. } => (Code::FailedPrecondition, "PLAN_MOVED"),
            Self::Precondition(_) => (Code::FailedPrecondition, "PRECONDITION"),
            Self::Silence(_) => (Code::DeadlineExceeded, "SILENCE"),
            Self::Catalog(_) => (Code::Internal, "CATALOG"),
            Self::ShuttingDown => (Code::Unavailable, "SHUTTING_DOWN"),
            Self::Stream(_) => (Code::Cancelled, "STREAM_BROKEN"),
            Self::StateDirectory(_) => (Code::Internal, "STATE_DIRECTORY"),
        }
    }

    /// The reason in `ErrorInfo`.
    pub fn reason(&self) -> &'static str {
        self.meaning().1
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let (code, reason) = refusal.meaning();
        let mut details = ErrorDetails::with_error_info(reason, proto::ERROR_DOMAIN, []);
        if let Refusal::Field(error) = &refusal {
            details.add_bad_request_violation(error.field, error.problem.clone());
        }
        if code == Code::Internal {
            tracing::error!(error = %refusal, "a call failed inside the coordinator");
        }
        Self::with_error_details(code, refusal.to_string(), details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_code_reason_and_what_to_do() {
        let status = Status::from(Refusal::ClusterUnknown { cluster: "main".parse().unwrap() });
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("pgconvoy cluster create main"));
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("CLUSTER_UNKNOWN", "pgconvoy"));
        let status = Status::from(Refusal::from(FieldError::new("wal_file", "is nothing")));
        assert_eq!(status.get_error_details().bad_request().unwrap().field_violations[0].field, "wal_file");
    }
}
