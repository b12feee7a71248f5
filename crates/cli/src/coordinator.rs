//! A connection to the coordinator.

use std::{error::Error, time::Duration};

use agent::coordinator_link::CoordinatorChannel;
use process::{exit::Exit, tls};
use proto::operator::operator_service_client::OperatorServiceClient;
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{config::Coordinator, error::CliError};

/// Longest time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a silent connection is asked whether it lives, and how long the answer may take.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Windows large enough for a restore through the coordinator.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Largest message accepted; an `info` of a large fleet is the largest.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// The coordinator's face to people.
pub(crate) type Operator = OperatorServiceClient<CoordinatorChannel>;

/// Connects, and makes sure that what answers speaks gRPC: a proxy in front of a coordinator that is down does not.
pub(crate) async fn connect(coordinator: &Coordinator) -> Result<CoordinatorChannel, CliError> {
    let address = &coordinator.address;
    let wrong = |source: tonic::transport::Error| {
        CliError::new(Exit::Config, format!("\"{address}\" is not an address of a coordinator"))
            .caused_by(source)
            .hint("write it as http://127.0.0.1:8432 or https://repo1:8432")
    };
    let mut endpoint = Endpoint::from_shared(address.clone())
        .map_err(wrong)?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    if let Some(tls) = coordinator.tls.as_ref().filter(|_| address.starts_with("https://")) {
        tls::install_provider();
        endpoint = endpoint.tls_config(tls.load(None).map_err(CliError::from_config)?).map_err(wrong)?;
    }
    let channel = endpoint.connect().await.map_err(|error| unreachable(coordinator, &error))?;
    let channel = CoordinatorChannel::from(channel);
    let answer = HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await;
    match answer {
        Err(status) if status.code() == Code::Unavailable => {
            let told = format!("cannot reach the coordinator at {address}: {}", status.message());
            Err(CliError::new(Exit::Unreachable, told))
        }
        // Whatever else it says, somebody said it who speaks gRPC.
        _ => Ok(channel),
    }
}

/// Connects for calls of `OperatorService`.
pub(crate) async fn operator(coordinator: &Coordinator) -> Result<Operator, CliError> {
    let channel = connect(coordinator).await?;
    Ok(OperatorServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

fn unreachable(coordinator: &Coordinator, error: &tonic::transport::Error) -> CliError {
    let explained = coordinator.tls.as_ref().and_then(|tls| tls.explain(&coordinator.address, error));
    let cause = error.source().map_or_else(|| error.to_string(), crate::error::chain);
    let told =
        CliError::new(Exit::Unreachable, format!("cannot reach the coordinator at {}: {cause}", coordinator.address));
    if let Some(explained) = explained {
        told.hint(explained)
    } else if coordinator.named {
        told.hint("is pgconvoy-coordinator running there, and does it listen on that address?")
    } else {
        told.hint("name it with --coordinator URL or in the [coordinator] section of /etc/pgconvoy/pgconvoy.toml")
    }
}
