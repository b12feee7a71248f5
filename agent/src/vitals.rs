//! How this node is: what waits, how pressed archiving is, where the server stands. Measured every few seconds, told to the
//! coordinator, to the metrics and to whoever asks on the local socket. How hard archiving works follows from it.
//!
//! Invariant: nothing here blocks archiving; a server that does not answer is reported as such and asked again.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use process::clock::Monotonic;
use proto::fleet::Report;
use serde_json::json;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::archive::Archive;
use crate::archive::ship::Roads;
use crate::archive::watch::Backlog;
use crate::lag::Lag;
use crate::metrics::{ArchiveMetrics, Measures};
use crate::node::{DataDirectory, NodeError, Recovery};
use crate::postgres::{ArchiverState, Position, Role, Server, ServerError};
use crate::pressure::{Gauge, Measured, Pressure, Stage, WayOut};

/// Time between two measurements.
const MEASURE_EVERY: Duration = Duration::from_secs(2);
/// Longest text about what is wrong, in bytes.
const PROBLEM_BYTES_MAX: usize = 500;
/// How long an agent waits for its data directory before it says that there is none.
const DATA_DIRECTORY_PATIENCE: Duration = Duration::from_secs(300);
/// Time between two questions to the server.
const SERVER_EVERY: Duration = Duration::from_secs(5);

/// Whether there is a data directory where the configuration says.
#[derive(Debug, Default)]
struct Place {
    missing_since: Option<Monotonic>,
    is_told: bool,
}

/// What is worth saying about the place.
#[derive(Debug, PartialEq, Eq)]
enum PlaceNews {
    Missing,
    Found,
}

impl Place {
    /// Takes note of a look; something is said once when it has been missing for long, and once when it comes after that.
    fn look(&mut self, is_there: bool, now: Monotonic) -> Option<PlaceNews> {
        if is_there {
            let was_told = std::mem::take(self).is_told;
            return was_told.then_some(PlaceNews::Found);
        }
        let since = *self.missing_since.get_or_insert(now);
        if self.is_told || now < since + DATA_DIRECTORY_PATIENCE {
            return None;
        }
        self.is_told = true;
        Some(PlaceNews::Missing)
    }
}

#[derive(Debug, Default)]
struct State {
    place: Place,
    backlog: Backlog,
    gauge: Gauge,
    pressure: Pressure,
    free_bytes: u64,
    position: Option<Position>,
    lag: Lag,
    /// Why there is no position; empty before the first question.
    server_problem: String,
    archiver_failed_count: u64,
}

/// The measurements.
pub struct Vitals {
    /// The data directory.
    pub data: Arc<DataDirectory>,
    /// Archiving.
    pub archive: Arc<Archive>,
    /// Ways off this host.
    pub roads: Roads,
    /// Numbers for people.
    pub metrics: ArchiveMetrics,
    state: Mutex<State>,
    /// A backlog that changes what archiving should do is measured at once.
    news: Notify,
}

impl Vitals {
    /// Nothing measured yet.
    pub fn new(data: Arc<DataDirectory>, archive: Arc<Archive>, roads: Roads, metrics: ArchiveMetrics) -> Arc<Self> {
        Arc::new(Self { data, archive, roads, metrics, state: Mutex::default(), news: Notify::new() })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the last look at `archive_status` found.
    pub fn set_backlog(&self, backlog: Backlog) {
        let mut state = self.state();
        state.backlog = backlog;
        let strain = state.pressure.strain;
        if strain.after(backlog.ready_files, backlog.oldest_ready) != strain {
            self.news.notify_one();
        }
    }

    /// Measures until `stop`.
    pub async fn measure(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(MEASURE_EVERY);
        let mut changes = self.roads.watch.subscribe();
        loop {
            self.measure_once();
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
                _ = changes.changed() => {}
                () = self.news.notified() => {}
            }
        }
    }

    fn measure_once(&self) {
        let (free_bytes, total_bytes) = space(self.data.pg_wal()).unwrap_or_default();
        let way_out = if self.roads.are_open() { WayOut::Open } else { WayOut::Closed };
        let facts = self.data.facts();
        self.look_at_place(facts.as_ref().err());
        let segment_size = facts.ok().map(|facts| facts.segment_size);
        let mut state = self.state();
        let written = state.position.filter(|position| position.role == Role::Primary).map(|at| at.lsn.as_u64());
        let finished = state
            .backlog
            .newest
            .zip(segment_size)
            .and_then(|(newest, size)| Some(newest.number(size).ok()?.next().start(size).as_u64()));
        let measured = Measured {
            ready_files: state.backlog.ready_files,
            oldest_ready: state.backlog.oldest_ready,
            wal_position_bytes: written.or(finished),
            free_bytes,
            total_bytes,
            way_out,
        };
        let before = state.pressure.stage;
        state.pressure = state.gauge.measure(measured, Monotonic::now());
        state.free_bytes = free_bytes;
        if let Some(settled) = segment_size.and_then(|size| state.backlog.settled.lsn(size)) {
            state.lag.durable_to(settled);
        }
        let (pressure, backlog) = (state.pressure, state.backlog);
        let behind =
            segment_size.and_then(|size| state.lag.behind(size.bytes(), backlog.oldest_ready, Monotonic::now()));
        let role = state.position.map(|position| position.role);
        drop(state);
        self.archive.work_under(pressure.strain);
        let effort = self.archive.effort();
        self.tell(before, &pressure);
        self.metrics.set_road(self.roads.are_open().then(|| self.roads.watch.road()));
        self.metrics.measure(&Measures {
            ready_files: backlog.ready_files,
            oldest_ready: backlog.oldest_ready,
            answers: self.archive.answers(),
            spool_bytes: self.roads.spool.retained_bytes(),
            spool_limit_bytes: self.roads.spool.retained_bytes_max(),
            copies_refused: self.roads.spool.refused_count(),
            role,
            behind,
            stage: pressure.stage.number(),
            effort,
            time_to_full: pressure.time_to_full,
            pg_wal_free_bytes: free_bytes,
            wal_rate_bytes: pressure.wal_rate_bytes,
        });
    }

    fn look_at_place(&self, missing: Option<&NodeError>) {
        let news = self.state().place.look(missing.is_none(), Monotonic::now());
        let data_directory = self.data.path().display();
        match (news, missing) {
            (Some(PlaceNews::Missing), Some(error)) => tracing::warn!(
                %data_directory,
                error = %crate::archive::ship::chain(error),
                "there is no data directory to archive from; is data_directory right, and may this user read it?"
            ),
            (Some(PlaceNews::Found), _) => tracing::info!(%data_directory, "the data directory is there now"),
            _ => {}
        }
    }

    fn tell(&self, before: Stage, pressure: &Pressure) {
        if pressure.stage == before {
            return;
        }
        let time_to_full_seconds = pressure.time_to_full.map(|time| time.as_secs());
        let stage = pressure.stage.number();
        let effort = self.archive.effort();
        match pressure.stage {
            Stage::Critical => tracing::error!(
                stage,
                time_to_full_seconds,
                "pg_wal is nearly full and WAL cannot leave this host; PostgreSQL will stop when it is full"
            ),
            Stage::Isolated => tracing::warn!(
                stage,
                time_to_full_seconds,
                "WAL cannot leave this host; it gathers in pg_wal until a road is open again"
            ),
            Stage::Strained => tracing::info!(
                stage,
                compression_level = effort.compression_level,
                readers = effort.readers,
                "archiving is behind and works harder until it has caught up"
            ),
            Stage::Normal => tracing::info!(stage, compression_level = effort.compression_level, "archiving keeps up"),
        }
    }

    /// Asks the server until `stop`.
    pub async fn follow_server(self: Arc<Self>, server: Arc<dyn Server>, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(SERVER_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let asked = async {
                let position = server.position().await?;
                Ok::<_, ServerError>((position, server.archiver_state().await?))
            };
            let asked = tokio::select! {
                () = stop.cancelled() => return,
                asked = asked => asked,
            };
            self.set_server(asked);
        }
    }

    fn set_server(&self, asked: Result<(Position, ArchiverState), ServerError>) {
        let mut state = self.state();
        match asked {
            Ok((position, archiver)) => {
                match position.role {
                    Role::Primary => state.lag.at(&position, Monotonic::now()),
                    Role::Standby => state.lag.forget(),
                }
                state.position = Some(position);
                state.server_problem.clear();
                state.archiver_failed_count = archiver.failed_count;
            }
            Err(error) => {
                state.position = None;
                state.lag.silent();
                let problem = problem_line(crate::archive::ship::chain(&error));
                if problem == state.server_problem {
                    return;
                }
                // A server that is down is for whoever stopped it; one that does not let us in stays so until somebody acts.
                match error {
                    ServerError::LoginRefused { .. } => {
                        tracing::warn!(error = %problem, "the server refuses our login")
                    }
                    _ => tracing::debug!(error = %problem, "the server cannot be asked"),
                }
                state.server_problem = problem;
            }
        }
    }

    /// For the coordinator.
    pub fn report(&self) -> Report {
        let facts = self.data.facts().ok();
        let state = self.state();
        let position = state.position;
        let in_recovery = position.map_or_else(
            || facts.as_ref().is_some_and(|facts| facts.recovery == Recovery::Following),
            |position| position.role == Role::Standby,
        );
        let timeline = position.map(|at| at.timeline).or(facts.as_ref().map(|facts| facts.timeline));
        let lsn = position.map(|at| at.lsn).or(facts.as_ref().map(|facts| facts.checkpoint));
        Report {
            in_recovery,
            timeline: timeline.map_or(0, |timeline| timeline.get()),
            lsn: lsn.map_or(0, |lsn| lsn.as_u64()),
            ready_files: state.backlog.ready_files,
            oldest_ready_seconds: state.backlog.oldest_ready.as_secs(),
            road: self.roads.watch.road().to_string(),
            last_acked: self.archive.last_acked().map(|name| name.to_string()).unwrap_or_default(),
            spool_bytes: self.roads.spool.retained_bytes(),
            pg_wal_free_bytes: state.free_bytes,
            time_to_full_seconds: state.pressure.time_to_full.map_or(0, |time| time.as_secs().max(1)),
            stage: state.pressure.stage.number(),
            server_reachable: position.is_some(),
            archiver_failed_count: state.archiver_failed_count,
            compression_level: u32::try_from(self.archive.effort().compression_level).unwrap_or(0),
            server_problem: state.server_problem.clone(),
            full_page_writes: position.filter(|at| at.role == Role::Primary).map(|at| at.full_page_writes),
            archive_problem: self.archive.held_up_by().map(problem_line).unwrap_or_default(),
        }
    }

    /// For people on this host; schema `pgconvoy.agent-status/v1`.
    pub fn status(&self) -> serde_json::Value {
        let report = self.report();
        let view = self.roads.watch.view();
        json!({
            "schema": "pgconvoy.agent-status/v1",
            "data_directory": self.data.path(),
            "system_identifier": self.data.facts().ok().map(|facts| facts.system_identifier.to_string()),
            "in_recovery": report.in_recovery,
            "timeline": report.timeline,
            "lsn": postgres_format::Lsn::new(report.lsn).to_string(),
            "road": view.road.as_str(),
            "road_reason": view.reason.as_str(),
            "direct_store": self.roads.direct.as_ref().map(|direct| direct.name().to_string()),
            "ready_files": report.ready_files,
            "oldest_ready_seconds": report.oldest_ready_seconds,
            "last_acked": report.last_acked,
            "answers": self.archive.answers(),
            "spool_bytes": report.spool_bytes,
            "copies_refused": self.roads.spool.refused_count(),
            "stage": report.stage,
            "compression_level": report.compression_level,
            "readers": self.archive.effort().readers,
            "time_to_full_seconds": report.time_to_full_seconds,
            "pg_wal_free_bytes": report.pg_wal_free_bytes,
            "server_reachable": report.server_reachable,
            "server_problem": report.server_problem,
            "archive_problem": report.archive_problem,
            "archiver_failed_count": report.archiver_failed_count,
        })
    }
}

/// What is wrong, in one line, cut to what a report takes.
fn problem_line(text: String) -> String {
    let mut text = text.replace('\n', "; ");
    let end = (0..=PROBLEM_BYTES_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or_default());
    text
}

/// Free and all bytes of a file system.
fn space(path: PathBuf) -> Option<(u64, u64)> {
    let status = rustix::fs::statvfs(&path).ok()?;
    Some((status.f_bavail.saturating_mul(status.f_frsize), status.f_blocks.saturating_mul(status.f_frsize)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_directory_that_stays_away_is_told_once() {
        let mut place = Place::default();
        let begun = Monotonic::now();
        let mut look =
            |is_there: bool, after_seconds: u64| place.look(is_there, begun + Duration::from_secs(after_seconds));
        assert_eq!([look(false, 0), look(false, 299), look(true, 299), look(false, 300)], [None, None, None, None]);
        assert_eq!([look(false, 599), look(false, 600), look(false, 900)], [None, Some(PlaceNews::Missing), None]);
        assert_eq!([look(true, 901), look(true, 902)], [Some(PlaceNews::Found), None]);
    }
}
