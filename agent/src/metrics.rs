//! The agent's metrics. Names start with `pgconvoy_agent_`; no file, LSN or backup ever becomes a label.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use process::telemetry::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::archive::Pushed;
use crate::pressure::Effort;
use crate::road::Road;

/// Bounds of the push histogram in seconds.
const PUSH_SECONDS: [f64; 10] = [0.000_5, 0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 60.0, 120.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RoadLabel {
    road: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

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
            stage: Gauge::default(),
            compression_level: Gauge::default(),
            readers: Gauge::default(),
            time_to_full_seconds: Gauge::default(),
            pg_wal_free_bytes: Gauge::default(),
            wal_rate_bytes: Gauge::default(),
        };
        metrics.register(|registry| {
            let registry = registry.sub_registry_with_prefix("agent");
            registry.register("road", "1 for the road WAL takes", new.road.clone());
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

    /// The road now.
    pub fn set_road(&self, road: Road) {
        for each in [Road::Coordinator, Road::Direct] {
            self.road.get_or_create(&RoadLabel { road: each.as_str() }).set(i64::from(each == road));
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
        self.stage.set(i64::from(measures.stage));
        self.compression_level.set(i64::from(measures.effort.compression_level));
        self.readers.set(signed(measures.effort.readers as u64));
        self.time_to_full_seconds.set(measures.time_to_full.unwrap_or_default().as_secs_f64());
        self.pg_wal_free_bytes.set(signed(measures.pg_wal_free_bytes));
        self.wal_rate_bytes.set(measures.wal_rate_bytes);
    }
}
