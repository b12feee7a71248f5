//! What every program of ours lives on: exit codes, clock, shutdown, telemetry, TLS, configuration files, units.
//!
//! This room knows neither PostgreSQL nor the repository nor the wire. The wall clock, the environment variables that
//! concern the process itself and the exit codes are touched here and nowhere else.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod clock;
pub mod config;
pub mod crash;
pub mod exit;
pub mod notify;
pub mod patience;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod units;

pub use crash::passage as crash_point;
pub use patience::patience;
