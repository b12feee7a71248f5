//! The agent's metrics. Names start with `pgconvoy_agent_`, but for those about the cluster's WAL; no file, LSN or backup ever
//! becomes a label. What does not hold of a node, such as how far a standby is behind, has no sample rather than a zero.
//!
//! Each is told in `packaging/prometheus/METRICS.md`, which the packages ship; a test compares.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use process::telemetry::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::archive::Pushed;
use crate::lag::Behind;
use crate::postgres::Role;
use crate::pressure::Effort;
use crate::road::Road;

/// Bounds of the push histogram in seconds.
const PUSH_SECONDS: [f64; 10] = [0.000_5, 0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 60.0, 120.0];

/// The road while none is open.
const BLOCKED: &str = "blocked";

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RoadLabel {
    road: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// The labels of a metric without any.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct NoLabels {}

/// A gauge that need not have a value.
type Perhaps = Family<NoLabels, Gauge<f64, AtomicU64>>;

/// What archiving counts.
#[derive(Clone, Debug)]
pub struct ArchiveMetrics {
    road: Family<RoadLabel, Gauge>,
    pushes: Family<OutcomeLabel, Counter>,
    push_seconds: Histogram,
    shipped_files: Family<RoadLabel, Counter>,
    shipped_bytes: Family<RoadLabel, Counter>,
    stored_bytes: Family<RoadLabel, Counter>,
    last_acked: Gauge,
    ready_files: Gauge,
    oldest_ready_seconds: Gauge<f64, AtomicU64>,
    answers: Gauge,
    spool_bytes: Gauge,
    copies_refused: Gauge,
    resend_pending: Gauge,
    rpo_seconds: Perhaps,
    current_lsn_bytes: Perhaps,
    durable_lsn_bytes: Perhaps,
    lag_bytes: Perhaps,
    server_up: Gauge,
    primary: Gauge,
    spool_limit_bytes: Gauge,
    road_switches: Counter,
    measured: Gauge,
    stage: Gauge,
    compression_level: Gauge,
    readers: Gauge,
    time_to_full_seconds: Gauge<f64, AtomicU64>,
    pg_wal_free_bytes: Gauge,
    wal_rate_bytes: Gauge<f64, AtomicU64>,
}

/// A round of measurements for the gauges.
#[derive(Clone, Copy, Debug)]
pub struct Measures {
    /// Number of `.ready` files.
    pub ready_files: u64,
    /// Age of the oldest.
    pub oldest_ready: Duration,
    /// Answers known.
    pub answers: usize,
    /// Bytes of retained copies.
    pub spool_bytes: u64,
    /// Files acknowledged without a copy for lack of room.
    pub copies_refused: u64,
    /// Most bytes of retained copies.
    pub spool_limit_bytes: u64,
    /// What the server is; absent when it does not answer.
    pub role: Option<Role>,
    /// Of a primary, how far behind the repository is.
    pub behind: Option<Behind>,
    /// Stage number.
    pub stage: u32,
    /// How hard archiving works.
    pub effort: Effort,
    /// Time until `pg_wal` is full, when it fills.
    pub time_to_full: Option<Duration>,
    /// Free bytes on the file system of `pg_wal`.
    pub pg_wal_free_bytes: u64,
    /// WAL written, bytes a second.
    pub wal_rate_bytes: f64,
}

impl ArchiveMetrics {
    /// Registers all metrics.
    pub fn register(metrics: &Metrics) -> Self {
        let new = Self {
            road: Family::default(),
            pushes: Family::default(),
            push_seconds: Histogram::new(PUSH_SECONDS),
            shipped_files: Family::default(),
            shipped_bytes: Family::default(),
            stored_bytes: Family::default(),
            last_acked: Gauge::default(),
            ready_files: Gauge::default(),
            oldest_ready_seconds: Gauge::default(),
            answers: Gauge::default(),
            spool_bytes: Gauge::default(),
            copies_refused: Gauge::default(),
            resend_pending: Gauge::default(),
            rpo_seconds: Family::default(),
            current_lsn_bytes: Family::default(),
            durable_lsn_bytes: Family::default(),
            lag_bytes: Family::default(),
            server_up: Gauge::default(),
            primary: Gauge::default(),
            spool_limit_bytes: Gauge::default(),
            road_switches: Counter::default(),
            measured: Gauge::default(),
            stage: Gauge::default(),
            compression_level: Gauge::default(),
            readers: Gauge::default(),
            time_to_full_seconds: Gauge::default(),
            pg_wal_free_bytes: Gauge::default(),
            wal_rate_bytes: Gauge::default(),
        };
        metrics.register(|registry| {
            registry.register(
                "rpo_seconds",
                "Age of the oldest commit of this primary that may not be durable off this host",
                new.rpo_seconds.clone(),
            );
            let wal = registry.sub_registry_with_prefix("wal");
            wal.register("current_lsn_bytes", "Where the primary writes", new.current_lsn_bytes.clone());
            wal.register(
                "durable_lsn_bytes",
                "How far its WAL is durable without a hole",
                new.durable_lsn_bytes.clone(),
            );
            wal.register("lag_bytes", "WAL between those", new.lag_bytes.clone());
            let registry = registry.sub_registry_with_prefix("agent");
            registry.register("road", "1 for the road WAL takes", new.road.clone());
            registry.register("road_switches", "Changes of the road", new.road_switches.clone());
            registry.register("server_up", "1 while the server answers", new.server_up.clone());
            registry.register("primary", "1 while the server is out of recovery", new.primary.clone());
            registry.register("spool_limit_bytes", "Most bytes of copies that are kept", new.spool_limit_bytes.clone());
            registry.register(
                "measured_timestamp_seconds",
                "When these numbers were last measured",
                new.measured.clone(),
            );
            registry.register("pushes", "Answers to archive_command", new.pushes.clone());
            registry.register("push_seconds", "Time to answer archive_command", new.push_seconds.clone());
            registry.register("shipped_files", "WAL files made durable off this host", new.shipped_files.clone());
            registry.register("shipped_bytes", "Bytes of those files", new.shipped_bytes.clone());
            registry.register("stored_bytes", "Bytes sent for those files", new.stored_bytes.clone());
            registry.register(
                "last_acked_timestamp_seconds",
                "When PostgreSQL was last told that a file is archived",
                new.last_acked.clone(),
            );
            registry.register("ready_files", "Files PostgreSQL wants archived", new.ready_files.clone());
            registry.register("oldest_ready_seconds", "Age of the oldest of them", new.oldest_ready_seconds.clone());
            registry.register("answers", "Answers known before PostgreSQL asks", new.answers.clone());
            registry.register("spool_bytes", "Copies that not every store has", new.spool_bytes.clone());
            registry.register(
                "copies_refused",
                "Files acknowledged without a copy because the spool was full",
                new.copies_refused.clone(),
            );
            registry.register("resend_pending", "Copies being sent to the direct store", new.resend_pending.clone());
            registry.register("stage", "0 normal, 1 strained, 2 isolated, 4 critical", new.stage.clone());
            registry.register("compression_level", "zstd level of WAL", new.compression_level.clone());
            registry.register("readers", "Threads that read and compress WAL", new.readers.clone());
            registry.register(
                "time_to_full_seconds",
                "Time until pg_wal is full at the present rate, 0 when it does not fill",
                new.time_to_full_seconds.clone(),
            );
            registry.register("pg_wal_free_bytes", "Free on the file system of pg_wal", new.pg_wal_free_bytes.clone());
            registry.register("wal_rate_bytes_per_second", "WAL written", new.wal_rate_bytes.clone());
        });
        new
    }

    /// One answer to `archive_command`.
    pub fn pushed(&self, pushed: &Pushed, took: Duration) {
        let outcome = match pushed {
            Pushed::Durable => {
                self.last_acked.set(process::clock::now().as_second());
                "durable"
            }
            Pushed::Not(_) => "failed",
        };
        self.pushes.get_or_create(&OutcomeLabel { outcome }).inc();
        self.push_seconds.observe(took.as_secs_f64());
    }

    /// One file made durable off this host.
    pub fn shipped(&self, road: Road, file_bytes: u64, stored_bytes: u64) {
        let label = RoadLabel { road: road.as_str() };
        self.shipped_files.get_or_create(&label).inc();
        self.shipped_bytes.get_or_create(&label).inc_by(file_bytes);
        self.stored_bytes.get_or_create(&label).inc_by(stored_bytes);
    }

    /// The road now; none is open where it is absent.
    pub fn set_road(&self, road: Option<Road>) {
        let taken = road.map_or(BLOCKED, Road::as_str);
        let mut is_another = false;
        for each in [Road::Coordinator.as_str(), Road::Direct.as_str(), BLOCKED] {
            let gauge = self.road.get_or_create(&RoadLabel { road: each });
            let before = gauge.set(i64::from(each == taken));
            is_another |= before == 1 && each != taken;
        }
        if is_another {
            self.road_switches.inc();
        }
    }

    /// Copies still to be sent to the direct store.
    pub fn set_resend_pending(&self, copies: usize) {
        self.resend_pending.set(i64::try_from(copies).unwrap_or(i64::MAX));
    }

    /// Copies still to be sent to the direct store.
    pub fn resend_pending(&self) -> i64 {
        self.resend_pending.get()
    }

    /// Sets the gauges.
    pub fn measure(&self, measures: &Measures) {
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.ready_files.set(signed(measures.ready_files));
        self.oldest_ready_seconds.set(measures.oldest_ready.as_secs_f64());
        self.answers.set(signed(measures.answers as u64));
        self.spool_bytes.set(signed(measures.spool_bytes));
        self.copies_refused.set(signed(measures.copies_refused));
        self.spool_limit_bytes.set(signed(measures.spool_limit_bytes));
        self.server_up.set(i64::from(measures.role.is_some()));
        self.primary.set(i64::from(measures.role == Some(Role::Primary)));
        self.set_behind(measures.behind);
        self.measured.set(process::clock::now().as_second());
        self.stage.set(i64::from(measures.stage));
        self.compression_level.set(i64::from(measures.effort.compression_level));
        self.readers.set(signed(measures.effort.readers as u64));
        self.time_to_full_seconds.set(measures.time_to_full.unwrap_or_default().as_secs_f64());
        self.pg_wal_free_bytes.set(signed(measures.pg_wal_free_bytes));
        self.wal_rate_bytes.set(measures.wal_rate_bytes);
    }

    /// A sample of each, or none of any.
    fn set_behind(&self, behind: Option<Behind>) {
        let families = [&self.rpo_seconds, &self.current_lsn_bytes, &self.durable_lsn_bytes, &self.lag_bytes];
        let Some(behind) = behind else { return families.iter().for_each(|family| family.clear()) };
        let bytes = [behind.current.as_u64(), behind.durable.as_u64(), behind.bytes].map(|bytes| bytes as f64);
        let values = [behind.age.as_secs_f64(), bytes[0], bytes[1], bytes[2]];
        for (family, value) in families.iter().zip(values) {
            family.get_or_create(&NoLabels {}).set(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use postgres_format::Lsn;
    use process::telemetry::exposition;

    use super::*;

    const PAGE: &str = include_str!("../../packaging/prometheus/METRICS.md");

    fn measures(role: Option<Role>, behind: Option<Behind>) -> Measures {
        Measures {
            ready_files: 3,
            oldest_ready: Duration::from_secs(4),
            answers: 2,
            spool_bytes: 5,
            spool_limit_bytes: 50,
            role,
            behind,
            copies_refused: 0,
            stage: 0,
            effort: crate::testing::EFFORTS.calm,
            time_to_full: None,
            pg_wal_free_bytes: 1,
            wal_rate_bytes: 0.5,
        }
    }

    fn full() -> (process::telemetry::Metrics, ArchiveMetrics) {
        let registry = process::telemetry::Metrics::new("pgconvoy-agent", "1");
        let metrics = ArchiveMetrics::register(&registry);
        let behind =
            Behind { current: Lsn::new(700), durable: Lsn::new(500), bytes: 200, age: Duration::from_millis(1500) };
        metrics.measure(&measures(Some(Role::Primary), Some(behind)));
        for road in [Some(Road::Coordinator), None, Some(Road::Direct), Some(Road::Direct)] {
            metrics.set_road(road);
        }
        metrics.pushed(&Pushed::Durable, Duration::from_millis(3));
        metrics.pushed(&Pushed::Not("away".to_owned()), Duration::from_millis(3));
        metrics.shipped(Road::Direct, 10, 5);
        metrics.shipped(Road::Coordinator, 10, 5);
        (registry, metrics)
    }

    #[test]
    fn every_metric_is_well_formed_and_told_on_the_page() {
        let (registry, _) = full();
        let read = exposition::read(&registry.text()).unwrap();
        assert_eq!(read.names(), exposition::documented(PAGE, "## Agent"));
        assert!(read.samples.len() < 60, "{} samples of one agent", read.samples.len());
        assert_eq!(read.value("pgconvoy_rpo_seconds", &[]), Some(1.5));
        assert_eq!(read.value("pgconvoy_wal_lag_bytes", &[]), Some(200.0));
        assert_eq!(read.value("pgconvoy_agent_road_switches_total", &[]), Some(2.0));
        assert_eq!(read.value("pgconvoy_agent_road", &[("road", "blocked")]), Some(0.0));
    }

    #[test]
    fn a_standby_is_not_told_to_be_nothing_behind() {
        let (registry, metrics) = full();
        metrics.measure(&measures(Some(Role::Standby), None));
        let read = exposition::read(&registry.text()).unwrap();
        assert_eq!(read.value("pgconvoy_rpo_seconds", &[]), None);
        assert_eq!(read.value("pgconvoy_agent_server_up", &[]), Some(1.0));
        metrics.measure(&measures(None, None));
        assert_eq!(exposition::read(&registry.text()).unwrap().value("pgconvoy_agent_server_up", &[]), Some(0.0));
    }
}
