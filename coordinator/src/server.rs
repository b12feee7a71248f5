//! The gRPC server: who may listen where, limits, health, reflection, and an end that drains.
//!
//! With certificates every caller shows one signed by `client_ca`. Without them the listener must be loopback; the
//! configuration refuses anything else, and so does [`bind`]. The archive service is SERVING while a store is healthy,
//! the others while the coordinator runs.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use process::tls::{ServerTls, TlsError};
use proto::archive::archive_service_server::ArchiveServiceServer;
use proto::fleet::fleet_service_server::FleetServiceServer;
use proto::operator::operator_service_server::OperatorServiceServer;
use proto::store::store_service_server::StoreServiceServer;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::Coordinator;
use crate::archive_service::Archive;
use crate::fleet_service::Fleet;
use crate::operator_service::Operator;
use crate::store_service::StoreReader;

/// Largest message either way, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// HTTP/2 flow control: bytes one stream and one connection may have under way.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Streams of one connection.
const STREAMS_MAX: u32 = 256;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the health answer is renewed.
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);

/// Why the server does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No certificates, and an address that others reach.
    #[error("{address} is not a loopback address and there are no certificates; give [tls] or listen on 127.0.0.1")]
    Exposed {
        /// The address.
        address: SocketAddr,
    },
    /// The certificates cannot be used.
    #[error("the certificates cannot be used")]
    Tls(#[source] TlsError),
    /// The transport failed.
    #[error("the gRPC transport failed")]
    Transport(#[source] tonic::transport::Error),
    /// The descriptors of the protos cannot be served.
    #[error("reflection cannot be built")]
    Reflection(#[source] tonic_reflection::server::Error),
}

/// Listens; refuses an address that others reach unless there are certificates.
///
/// # Errors
/// [`ServerError::Exposed`] and [`ServerError::Bind`].
pub async fn bind(address: SocketAddr, tls: Option<&ServerTls>) -> Result<TcpListener, ServerError> {
    if tls.is_none() && !address.ip().is_loopback() {
        return Err(ServerError::Exposed { address });
    }
    TcpListener::bind(address).await.map_err(|source| ServerError::Bind { address, source })
}

/// Serves until `stop`, then lets calls under way end.
///
/// # Errors
/// See [`ServerError`].
pub async fn serve(
    coordinator: Arc<Coordinator>,
    listener: TcpListener,
    tls: Option<&ServerTls>,
    stop: CancellationToken,
) -> Result<(), ServerError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let mut server = Server::builder();
    if let Some(tls) = tls {
        let config = tls.load().map_err(ServerError::Tls)?;
        server = server.tls_config(config).map_err(ServerError::Transport)?;
    }
    let router = services(&mut limits(server), &coordinator)?.add_service(health);
    coordinator.tracker.spawn(report_health(Arc::clone(&coordinator), reporter, stop.clone()));
    let incoming = TcpListenerStream::new(listener);
    router.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await.map_err(ServerError::Transport)
}

fn limits(server: Server) -> Server {
    server
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .tcp_nodelay(true)
}

fn services(server: &mut Server, coordinator: &Arc<Coordinator>) -> Result<Router, ServerError> {
    let limit = MESSAGE_BYTES_MAX;
    let archive = ArchiveServiceServer::new(Archive(Arc::clone(coordinator)));
    let fleet = FleetServiceServer::new(Fleet(Arc::clone(coordinator)));
    let operator = OperatorServiceServer::new(Operator(Arc::clone(coordinator)));
    let store = StoreServiceServer::new(StoreReader(Arc::clone(coordinator)));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    Ok(server
        .add_service(archive.max_decoding_message_size(limit).max_encoding_message_size(limit))
        .add_service(fleet.max_decoding_message_size(limit).max_encoding_message_size(limit))
        .add_service(operator.max_decoding_message_size(limit).max_encoding_message_size(limit))
        .add_service(store.max_decoding_message_size(limit).max_encoding_message_size(limit))
        .add_service(reflection().build_v1().map_err(ServerError::Reflection)?)
        .add_service(reflection().build_v1alpha().map_err(ServerError::Reflection)?))
}

async fn report_health(coordinator: Arc<Coordinator>, reporter: HealthReporter, stop: CancellationToken) {
    const SERVICES: [&str; 5] = [
        "",
        "pgconvoy.archive.v1.ArchiveService",
        "pgconvoy.fleet.v1.FleetService",
        "pgconvoy.operator.v1.OperatorService",
        "pgconvoy.store.v1.StoreService",
    ];
    let set = async |archive: ServingStatus, others: ServingStatus| {
        for service in SERVICES {
            let status = if service.contains("archive") { archive } else { others };
            reporter.set_service_status(service, status).await;
        }
    };
    loop {
        let archive = match coordinator.stores.healthy().is_empty() {
            true => ServingStatus::NotServing,
            false => ServingStatus::Serving,
        };
        set(archive, ServingStatus::Serving).await;
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(HEALTH_INTERVAL) => {}
        }
    }
    set(ServingStatus::NotServing, ServingStatus::NotServing).await;
}
