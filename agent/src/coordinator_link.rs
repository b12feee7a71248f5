//! The connection to the coordinator: WAL goes up as streams of chunks, probes tell whether it is well.
//!
//! One HTTP/2 connection carries everything; it is opened when first used and again whenever it broke. Bodies are cut into
//! chunks without copying them.
//!
//! Invariants: every call has a deadline. Everything the road state machine needs is reported to it here: calls begun,
//! bytes moved, answers, failures. A status of the wire becomes one of [`PushError`]'s four meanings in one place.
//! This room does not choose the road and does not retry.

mod channel;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use proto::archive::archive_service_client::ArchiveServiceClient;
use proto::archive::{PushWalOpen, PushWalRequest, StoreOutcome, StoreState, push_wal_request};
use proto::fleet::fleet_service_client::FleetServiceClient;
use proto::store::store_service_client::StoreServiceClient;
use proto::store::{Health, ListStoresRequest, Store};
use repository::name::{ClusterName, NodeName};
use repository::store::Body;
use repository::wal::EncodedWal;
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tonic_types::StatusExt;

pub use self::channel::CoordinatorChannel;
use crate::config::CoordinatorSettings;
use crate::road::Seen;
use crate::road_watch::RoadWatch;

/// Time to open a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// HTTP/2 window of one stream, in bytes.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// HTTP/2 window of the connection, in bytes.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Pings on a connection with calls under way.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// Time for the answer to a ping.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(15);
/// Time for one upload, besides what its size takes at [`SLOWEST_BYTES_A_SECOND`].
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(120);
/// Slowest upload that is not given up, in bytes a second.
const SLOWEST_BYTES_A_SECOND: u64 = 64 << 10;
/// Time for a probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Largest message either way, in bytes.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Why the coordinator cannot even be tried.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The address is not one.
    #[error("coordinator.address {address:?} is not an address such as https://repo1:8432")]
    Address {
        /// What was configured.
        address: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// The TLS files cannot be used.
    #[error("the TLS files of the coordinator's connection cannot be used")]
    Tls(#[from] process::tls::TlsError),
    /// The TLS settings were not taken.
    #[error("TLS for the coordinator cannot be set up")]
    TlsSetup(#[source] tonic::transport::Error),
}

/// What became of an upload that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// Not delivered, or no store took it; whether it is there is unknown. Try again.
    #[error("the coordinator did not take it: {}", status.message())]
    Failed {
        /// What was said.
        status: Box<Status>,
    },
    /// The coordinator's stores are full; use the direct road.
    #[error("the coordinator's stores are full")]
    Full,
    /// The coordinator refuses this content on its merits.
    #[error("the coordinator refuses it ({reason}): {message}")]
    Refused {
        /// Reason of the error's detail, such as `WAL_CONFLICT`; empty when there was none.
        reason: String,
        /// For people.
        message: String,
    },
    /// No answer in time.
    #[error("the coordinator did not answer in time")]
    Timeout,
}

impl PushError {
    fn seen(&self) -> Seen {
        match self {
            Self::Failed { .. } | Self::Timeout => Seen::Failed,
            Self::Full => Seen::Full,
            Self::Refused { .. } => Seen::Answered,
        }
    }
}

impl From<Status> for PushError {
    fn from(status: Status) -> Self {
        let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
        match status.code() {
            Code::ResourceExhausted if reason == "STORE_FULL" => Self::Full,
            Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::InvalidArgument
            | Code::Unimplemented
            | Code::NotFound
            | Code::OutOfRange => Self::Refused { reason, message: status.message().to_owned() },
            _ => Self::Failed { status: Box::new(status) },
        }
    }
}

/// Where an object is durable now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    /// Stores that have it.
    pub stored: Vec<String>,
    /// Stores that get it later.
    pub lagging: Vec<String>,
    /// All of the former had it before.
    pub already_stored: bool,
    /// The repository they belong to, as the coordinator spells it; empty if it does not say.
    pub repository: String,
}

impl Spread {
    fn of(outcomes: Vec<StoreOutcome>) -> Self {
        let mut spread = Self::default();
        for outcome in outcomes {
            match outcome.state() {
                StoreState::Stored => spread.stored.push(outcome.store),
                _ => spread.lagging.push(outcome.store),
            }
        }
        spread
    }
}

/// The connection, shared.
#[derive(Debug, Clone)]
pub struct CoordinatorLink {
    channel: CoordinatorChannel,
    cluster: ClusterName,
    node: NodeName,
    instance: String,
    road: Arc<RoadWatch>,
}

/// A channel to a coordinator, opened when first used.
///
/// # Errors
/// When address or TLS files cannot be used.
pub fn channel(settings: &CoordinatorSettings) -> Result<CoordinatorChannel, LinkError> {
    let address = || settings.address.clone();
    let mut endpoint = Endpoint::from_shared(settings.address.clone())
        .map_err(|source| LinkError::Address { address: address(), source })?
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_EVERY)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .tcp_nodelay(true);
    if let Some(tls) = &settings.tls {
        endpoint = endpoint.tls_config(tls.load(None)?).map_err(LinkError::TlsSetup)?;
    }
    Ok(endpoint.connect_lazy().into())
}

impl CoordinatorLink {
    /// A link of one node over a channel.
    pub fn new(channel: CoordinatorChannel, cluster: ClusterName, node: NodeName, road: Arc<RoadWatch>) -> Self {
        Self { channel, cluster, node, instance: String::new(), road }
    }

    /// The same, naming the spool it sends from: by it the coordinator tells two agents with one node name apart.
    #[must_use]
    pub fn of_instance(self, instance: &str) -> Self {
        Self { instance: instance.to_owned(), ..self }
    }

    /// Makes one WAL file durable in the coordinator's stores.
    ///
    /// Dropping the future ends the upload; whether the object was stored is then unknown, and sending it again is safe.
    ///
    /// # Errors
    /// See [`PushError`].
    pub async fn push(&self, wal: &EncodedWal) -> Result<Spread, PushError> {
        let open = PushWalOpen {
            cluster: self.cluster.to_string(),
            node: self.node.to_string(),
            system_identifier: wal.header.system_identifier.as_u64(),
            wal_file: wal.header.name.to_string(),
            fingerprint: wal.fingerprint.to_string(),
            stored_size: wal.body.len(),
            header_sha256: Bytes::copy_from_slice(&wal.header_sha256),
            in_recovery: wal.header.in_recovery,
            complete: wal.header.complete,
            instance: self.instance.clone(),
        };
        let first = PushWalRequest { part: Some(push_wal_request::Part::Open(open)) };
        let chunks =
            self.chunks(&wal.body).map(|chunk| PushWalRequest { part: Some(push_wal_request::Part::Chunk(chunk)) });
        let call = async {
            let requests = stream::once(async move { first }).chain(chunks);
            let response = self.archive().push_wal(requests).await.map_err(PushError::from)?.into_inner();
            let (already_stored, repository) = (response.already_stored, response.repository);
            Ok(Spread { already_stored, repository, ..Spread::of(response.stores) })
        };
        self.upload(wal.body.len(), call).await
    }

    /// Names of the coordinator's stores and what it knows of them.
    ///
    /// # Errors
    /// See [`PushError`].
    pub async fn stores(&self) -> Result<Vec<Store>, PushError> {
        let mut client = self.store_service();
        match tokio::time::timeout(PROBE_TIMEOUT, client.list_stores(ListStoresRequest {})).await {
            Ok(response) => Ok(response?.into_inner().stores),
            Err(_) => Err(PushError::Timeout),
        }
    }

    /// Whether the coordinator answers and has a store that takes WAL; the road is told.
    pub async fn probe(&self) {
        let seen = match self.stores().await {
            Ok(stores) if stores.iter().any(|store| store.health() == Health::Healthy) => Seen::ProbeGood,
            Ok(_) => Seen::ProbeUnfit,
            Err(_) => Seen::ProbeBad,
        };
        self.road.see(seen);
    }

    /// The client of the fleet service, for the session.
    pub fn fleet(&self) -> FleetServiceClient<CoordinatorChannel> {
        FleetServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The client of the store service, for reading.
    pub fn store_service(&self) -> StoreServiceClient<CoordinatorChannel> {
        StoreServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn archive(&self) -> ArchiveServiceClient<CoordinatorChannel> {
        ArchiveServiceClient::new(self.channel.clone()).max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The body in messages of bounded size. A body that cannot be read ends early, and the coordinator then refuses it as
    /// damaged.
    fn chunks(&self, body: &Body) -> impl Stream<Item = Bytes> + Send + 'static {
        let road = Arc::clone(&self.road);
        body.chunks().take_while(|chunk| std::future::ready(chunk.is_ok())).filter_map(move |chunk| {
            road.see(Seen::Moved);
            std::future::ready(chunk.ok())
        })
    }

    async fn upload<T>(
        &self,
        length_bytes: u64,
        call: impl Future<Output = Result<T, PushError>>,
    ) -> Result<T, PushError> {
        let under_way = self.road.begin();
        let limit = UPLOAD_TIMEOUT + Duration::from_secs(length_bytes / SLOWEST_BYTES_A_SECOND);
        let result = tokio::time::timeout(limit, call).await.unwrap_or(Err(PushError::Timeout));
        under_way.end(result.as_ref().map_or_else(PushError::seen, |_| Seen::Answered));
        result
    }
}
