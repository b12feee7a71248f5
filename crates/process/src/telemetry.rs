//! Logs and metrics of a daemon.
//!
//! Logs go to standard error, as text or as one JSON object a line; `PGCONVOY_LOG` holds a filter such as
//! `info,agent::archive=debug`. Metrics are OpenMetrics text at `/metrics`; names start with `pgconvoy_`, base units,
//! and their labels are bounded: no segment, LSN or backup ever becomes a label.

pub mod exposition;

use std::{
    io::{self, IsTerminal},
    sync::{Arc, Mutex, PoisonError},
};

use axum::{Router, http::header, routing::get};
use prometheus_client::{
    encoding::text::encode,
    metrics::{gauge::ConstGauge, info::Info},
    registry::Registry,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{EnvFilter, filter::ParseError, util::SubscriberInitExt};

/// Environment variable with the log filter.
pub const LOG_FILTER_VARIABLE: &str = "PGCONVOY_LOG";

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Why logging did not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not one.
    #[error("{LOG_FILTER_VARIABLE} is not a log filter such as \"info\" or \"info,agent::archive=debug\"")]
    Filter(#[source] ParseError),
    /// Logging was started before.
    #[error("logging was already started")]
    Started,
}

/// Libraries that warn of what any stranger may send: rustls of a greeting with an odd server name, which it ignores.
const QUIET: &str = "rustls::msgs=error";

/// Starts logging to standard error at `info` unless `PGCONVOY_LOG` says otherwise.
///
/// # Errors
/// When the filter is not one, or logging runs already.
pub fn init(format: LogFormat) -> Result<(), TelemetryError> {
    init_with_default(format, "info")
}

/// As [`init`], with another filter for when `PGCONVOY_LOG` is absent; the operator's command uses `warn`.
///
/// # Errors
/// As [`init`].
pub fn init_with_default(format: LogFormat, default_filter: &str) -> Result<(), TelemetryError> {
    let wanted = std::env::var_os(LOG_FILTER_VARIABLE).and_then(|text| text.into_string().ok());
    let default_filter = format!("{default_filter},{QUIET}");
    let text = wanted.as_deref().filter(|text| !text.is_empty()).unwrap_or(&default_filter);
    let filter = EnvFilter::builder().parse(text).map_err(TelemetryError::Filter)?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).finish().try_init(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(true).finish().try_init(),
    };
    started.map_err(|_| TelemetryError::Started)
}

/// The metrics of one daemon. Clones share one registry.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Metrics {
    /// A registry whose names start with `pgconvoy_` and which already says what runs (`pgconvoy_build_info`) and
    /// since when (`pgconvoy_start_timestamp_seconds`).
    pub fn new(program: &str, version: &str) -> Self {
        let mut registry = Registry::with_prefix("pgconvoy");
        registry.register(
            "build",
            "What runs here",
            Info::new(vec![("program".to_owned(), program.to_owned()), ("version".to_owned(), version.to_owned())]),
        );
        registry.register(
            "start_timestamp_seconds",
            "When this process started",
            ConstGauge::new(crate::clock::now().as_second()),
        );
        Self { registry: Arc::new(Mutex::new(registry)) }
    }

    /// Registers metrics or collectors. Keep the metric values themselves; cloning them is cheap.
    pub fn register<T>(&self, add: impl FnOnce(&mut Registry) -> T) -> T {
        add(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// OpenMetrics text of all metrics as they are now.
    pub fn text(&self) -> String {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        encode(&mut text, &registry).expect("writing to a string cannot fail");
        text
    }

    /// A router with `/metrics`, for daemons that serve more over HTTP.
    pub fn router(&self) -> Router {
        let metrics = self.clone();
        Router::new()
            .route("/metrics", get(move || async move { ([(header::CONTENT_TYPE, CONTENT_TYPE)], metrics.text()) }))
    }

    /// Serves `/metrics` until `stop`.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) -> io::Result<()> {
        axum::serve(listener, self.router()).with_graceful_shutdown(stop.cancelled_owned()).await
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn the_endpoint_shows_what_was_registered() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let metrics = Metrics::new("pgconvoy-test", "1.2.3");
            let pushed: Counter = Counter::default();
            metrics.register(|registry| registry.register("wal_pushed", "Pushed", pushed.clone()));
            pushed.inc_by(7);
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let stop = CancellationToken::new();
            let server = tokio::spawn(metrics.serve(listener, stop.clone()));
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            for part in ["200 OK", "pgconvoy_wal_pushed_total 7", "pgconvoy_build_info", "version=\"1.2.3\"", "# EOF"] {
                assert!(answer.contains(part), "{part} in {answer}");
            }
            stop.cancel();
            server.await.unwrap().unwrap();
        });
    }
}
