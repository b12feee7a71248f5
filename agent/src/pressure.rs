//! How much room archiving has left: stages, and the time until `pg_wal` is full. Pure; measurements and time go in.
//!
//! ```text
//! 0 normal     archiving keeps up
//! 1 strained   more than QUEUE_FILES_MAX files wait, or the oldest waits longer than QUEUE_AGE_MAX
//! 2 isolated   no road off this host; pg_wal is the queue, and the time until it is full is what matters
//! 4 critical   less free space than the reserve; the policy is to stall: PostgreSQL stops rather than lose WAL
//! ```
//!
//! Invariant: no stage acknowledges or drops anything. Stages 3 (overflow) and 5 (gap) do not exist yet.

use std::time::Duration;

use process::clock::Monotonic;

/// Waiting files up to which archiving counts as keeping up.
pub const QUEUE_FILES_MAX: u64 = 64;
/// Age of the oldest waiting file up to which archiving counts as keeping up.
pub const QUEUE_AGE_MAX: Duration = Duration::from_secs(120);
/// Part of the file system kept in reserve: one in this many bytes.
const RESERVE_PART: u64 = 20;
/// WAL of this time belongs to the reserve, too.
const RESERVE_TIME: Duration = Duration::from_secs(600);
/// Half of what the rate remembers is younger than this.
const RATE_HALF_LIFE: Duration = Duration::from_secs(60);

/// How pressed archiving is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Keeping up.
    #[default]
    Normal,
    /// Behind.
    Strained,
    /// No road off this host.
    Isolated,
    /// Nearly no room for WAL.
    Critical,
}

impl Stage {
    /// The number in reports and metrics.
    pub fn number(self) -> u32 {
        match self {
            Self::Normal => 0,
            Self::Strained => 1,
            Self::Isolated => 2,
            Self::Critical => 4,
        }
    }
}

/// Whether WAL can leave this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WayOut {
    /// A road works.
    Open,
    /// None does.
    Closed,
}

/// One round of measurements.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Files waiting to be archived.
    pub ready_files: u64,
    /// Age of the oldest of them.
    pub oldest_ready: Duration,
    /// Newest WAL position known, in bytes since the beginning of WAL.
    pub wal_position_bytes: Option<u64>,
    /// Free bytes on the file system of `pg_wal`.
    pub free_bytes: u64,
    /// Its size in bytes.
    pub total_bytes: u64,
    /// Whether WAL can leave this host.
    pub way_out: WayOut,
}

/// What a round of measurements amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// The stage.
    pub stage: Stage,
    /// Time until `pg_wal` is full at the present rate, when nothing leaves this host and WAL is being written.
    pub time_to_full: Option<Duration>,
    /// WAL written, bytes a second.
    pub wal_rate_bytes: f64,
}

/// Remembers how fast WAL grows.
#[derive(Clone, Debug, Default)]
pub struct Gauge {
    last: Option<(Monotonic, u64)>,
    rate_bytes: f64,
}

impl Gauge {
    /// Takes in one round.
    pub fn measure(&mut self, measured: Measured, now: Monotonic) -> Pressure {
        self.follow(measured.wal_position_bytes, now);
        let reserve = (measured.total_bytes / RESERVE_PART).max((self.rate_bytes * RESERVE_TIME.as_secs_f64()) as u64);
        let closed = measured.way_out == WayOut::Closed;
        let stage = if closed && measured.free_bytes < reserve {
            Stage::Critical
        } else if closed {
            Stage::Isolated
        } else if measured.ready_files > QUEUE_FILES_MAX || measured.oldest_ready > QUEUE_AGE_MAX {
            Stage::Strained
        } else {
            Stage::Normal
        };
        let seconds = measured.free_bytes as f64 / self.rate_bytes;
        let time_to_full = (closed && self.rate_bytes >= 1.0).then(|| Duration::from_secs_f64(seconds.min(1e9)));
        Pressure { stage, time_to_full, wal_rate_bytes: self.rate_bytes }
    }

    fn follow(&mut self, position: Option<u64>, now: Monotonic) {
        let Some(position) = position else { return };
        let Some((then, before)) = self.last.replace((now, position)) else { return };
        let seconds = now.since(then).as_secs_f64();
        if seconds <= 0.0 || position < before {
            return;
        }
        let fresh = (position - before) as f64 / seconds;
        let kept = 0.5_f64.powf(seconds / RATE_HALF_LIFE.as_secs_f64());
        self.rate_bytes = self.rate_bytes * kept + fresh * (1.0 - kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALM: Measured = Measured {
        ready_files: 0,
        oldest_ready: Duration::ZERO,
        wal_position_bytes: None,
        free_bytes: 50 << 30,
        total_bytes: 100 << 30,
        way_out: WayOut::Open,
    };

    #[test]
    fn stages_follow_the_table() {
        let check = |measured: Measured, stage: Stage| {
            assert_eq!(Gauge::default().measure(measured, Monotonic::default()).stage, stage, "{measured:?}");
        };
        check(CALM, Stage::Normal);
        check(Measured { ready_files: 64, ..CALM }, Stage::Normal);
        check(Measured { ready_files: 65, ..CALM }, Stage::Strained);
        check(Measured { oldest_ready: Duration::from_secs(121), ..CALM }, Stage::Strained);
        check(Measured { way_out: WayOut::Closed, ..CALM }, Stage::Isolated);
        check(Measured { way_out: WayOut::Closed, free_bytes: 4 << 30, ..CALM }, Stage::Critical);
        check(Measured { free_bytes: 4 << 30, ..CALM }, Stage::Normal);
    }

    #[test]
    fn time_to_full_comes_from_the_rate() {
        let mut gauge = Gauge::default();
        let mut pressure = Pressure::default();
        for second in 0..1_200 {
            let measured = Measured { wal_position_bytes: Some(second * (10 << 20)), way_out: WayOut::Closed, ..CALM };
            pressure = gauge.measure(measured, Monotonic::from_origin(Duration::from_secs(second)));
        }
        let seconds = pressure.time_to_full.unwrap().as_secs();
        assert!((5_100..5_150).contains(&seconds), "{seconds}");
        let open = Measured { wal_position_bytes: Some(1_200 * (10 << 20)), ..CALM };
        assert_eq!(gauge.measure(open, Monotonic::from_origin(Duration::from_secs(1_200))).time_to_full, None);
    }

    #[test]
    fn a_position_that_went_back_is_no_rate() {
        let mut gauge = Gauge::default();
        for (second, position) in [(0, 1 << 30), (5, 0), (10, 0)] {
            let measured = Measured { wal_position_bytes: Some(position), ..CALM };
            let pressure = gauge.measure(measured, Monotonic::from_origin(Duration::from_secs(second)));
            assert!(pressure.wal_rate_bytes.abs() < f64::EPSILON);
        }
    }
}
