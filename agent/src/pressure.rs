//! How much room archiving has left: stages, how hard it works in them, and the time until `pg_wal` is full. Pure;
//! measurements and time go in.
//!
//! ```text
//! 0 normal     archiving keeps up
//! 1 strained   more than QUEUE_FILES_MAX files wait, or the oldest waits longer than QUEUE_AGE_MAX; WAL is compressed
//!              less and by more threads until no more than CALM_FILES_MAX wait and none longer than CALM_AGE_MAX
//! 2 isolated   no road off this host; pg_wal is the queue, and the time until it is full is what matters
//! 4 critical   less free space than the reserve; the policy is to stall: PostgreSQL stops rather than lose WAL
//! ```
//!
//! Invariants: no stage acknowledges or drops anything. What an operator fixed (the zstd level, the threads) no stage
//! changes. Stages 3 (overflow) and 5 (gap) do not exist yet.

use std::time::Duration;

use process::clock::Monotonic;

/// Waiting files up to which archiving counts as keeping up.
pub const QUEUE_FILES_MAX: u64 = 64;
/// Age of the oldest waiting file up to which archiving counts as keeping up.
pub const QUEUE_AGE_MAX: Duration = Duration::from_secs(120);
/// Waiting files at which archiving that was behind counts as keeping up again.
const CALM_FILES_MAX: u64 = QUEUE_FILES_MAX / 4;
/// Age of the oldest waiting file at which archiving that was behind counts as keeping up again.
const CALM_AGE_MAX: Duration = Duration::from_secs(30);
/// zstd level while archiving keeps up.
const CALM_LEVEL: i32 = 3;
/// zstd level while it is behind.
const STRAINED_LEVEL: i32 = 1;
/// Most threads that read and compress while archiving keeps up.
const CALM_READERS_MAX: usize = 4;
/// Most of them while it is behind.
const STRAINED_READERS_MAX: usize = 8;
/// Memory for compressed bodies that one more thread is worth, in bytes: with less, threads wait for it.
const READER_BYTES: u64 = 3 << 20;
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

/// Whether archiving keeps up, wherever WAL goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strain {
    /// It does.
    #[default]
    Calm,
    /// It is behind, and has not caught up since.
    Behind,
}

impl Strain {
    /// What follows from what waits now. The way back needs less than the way in, so that it does not swing.
    pub fn after(self, ready_files: u64, oldest_ready: Duration) -> Self {
        let (files_max, age_max) = match self {
            Self::Calm => (QUEUE_FILES_MAX, QUEUE_AGE_MAX),
            Self::Behind => (CALM_FILES_MAX, CALM_AGE_MAX),
        };
        if ready_files > files_max || oldest_ready > age_max { Self::Behind } else { Self::Calm }
    }
}

/// How hard archiving works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// zstd level of WAL.
    pub compression_level: i32,
    /// Threads that read and compress.
    pub readers: usize,
}

/// What decides how hard archiving may work.
#[derive(Clone, Copy, Debug)]
pub struct Means {
    /// The zstd level an operator fixed.
    pub compression_level: Option<i32>,
    /// The number of threads an operator fixed.
    pub readers: Option<usize>,
    /// Budget for compressed bodies in memory, in bytes.
    pub memory_bytes: u64,
    /// Processors of this host: more threads would take turns, and memory.
    pub cores: usize,
}

/// How hard archiving works, by strain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Efforts {
    /// While it keeps up.
    pub calm: Effort,
    /// While it is behind.
    pub strained: Effort,
}

impl Efforts {
    /// Decides it once.
    pub fn of(means: Means) -> Self {
        let cores = means.cores.max(1);
        let calm = means.readers.unwrap_or(cores.min(CALM_READERS_MAX)).max(1);
        let affordable = usize::try_from(means.memory_bytes / READER_BYTES).unwrap_or(usize::MAX);
        let strained = means.readers.unwrap_or(cores.min(STRAINED_READERS_MAX).min(affordable));
        let effort = |level, readers| Effort { compression_level: means.compression_level.unwrap_or(level), readers };
        Self { calm: effort(CALM_LEVEL, calm), strained: effort(STRAINED_LEVEL, strained.max(calm)) }
    }

    /// How hard archiving works now.
    pub fn at(&self, strain: Strain) -> Effort {
        match strain {
            Strain::Calm => self.calm,
            Strain::Behind => self.strained,
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
    /// Whether archiving keeps up; also known while WAL cannot leave this host.
    pub strain: Strain,
    /// Time until `pg_wal` is full at the present rate, when nothing leaves this host and WAL is being written.
    pub time_to_full: Option<Duration>,
    /// WAL written, bytes a second.
    pub wal_rate_bytes: f64,
}

/// Remembers how fast WAL grows and whether archiving was behind.
#[derive(Clone, Debug, Default)]
pub struct Gauge {
    last: Option<(Monotonic, u64)>,
    rate_bytes: f64,
    strain: Strain,
}

impl Gauge {
    /// Takes in one round.
    pub fn measure(&mut self, measured: Measured, now: Monotonic) -> Pressure {
        self.follow(measured.wal_position_bytes, now);
        let reserve = (measured.total_bytes / RESERVE_PART).max((self.rate_bytes * RESERVE_TIME.as_secs_f64()) as u64);
        let closed = measured.way_out == WayOut::Closed;
        self.strain = self.strain.after(measured.ready_files, measured.oldest_ready);
        let stage = if closed && measured.free_bytes < reserve {
            Stage::Critical
        } else if closed {
            Stage::Isolated
        } else if self.strain == Strain::Behind {
            Stage::Strained
        } else {
            Stage::Normal
        };
        let seconds = measured.free_bytes as f64 / self.rate_bytes;
        let time_to_full = (closed && self.rate_bytes >= 1.0).then(|| Duration::from_secs_f64(seconds.min(1e9)));
        Pressure { stage, strain: self.strain, time_to_full, wal_rate_bytes: self.rate_bytes }
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
    fn what_was_behind_is_calm_again_only_when_it_has_caught_up() {
        let mut strain = Strain::Calm;
        let mut check = |ready_files, seconds, expected| {
            strain = strain.after(ready_files, Duration::from_secs(seconds));
            assert_eq!(strain, expected, "{ready_files} files, {seconds} s");
        };
        for (ready_files, seconds, expected) in [
            (64, 120, Strain::Calm),
            (65, 0, Strain::Behind),
            (64, 0, Strain::Behind),
            (17, 0, Strain::Behind),
            (16, 31, Strain::Behind),
            (16, 30, Strain::Calm),
            (17, 31, Strain::Calm),
            (1, 121, Strain::Behind),
            (0, 0, Strain::Calm),
        ] {
            check(ready_files, seconds, expected);
        }
    }

    #[test]
    fn a_closed_way_does_not_hide_that_archiving_is_behind() {
        let mut gauge = Gauge::default();
        let mut stages = |measured| {
            let pressure = gauge.measure(measured, Monotonic::default());
            (pressure.stage, pressure.strain)
        };
        let many = Measured { ready_files: 200, way_out: WayOut::Closed, ..CALM };
        assert_eq!(stages(many), (Stage::Isolated, Strain::Behind));
        assert_eq!(stages(Measured { ready_files: 40, ..CALM }), (Stage::Strained, Strain::Behind));
        assert_eq!(stages(CALM), (Stage::Normal, Strain::Calm));
    }

    #[test]
    fn effort_grows_within_what_is_fixed_and_affordable() {
        const FREE: Means = Means { compression_level: None, readers: None, memory_bytes: 24 << 20, cores: 2 };
        let check = |means: Means, calm: (i32, usize), strained: (i32, usize)| {
            let efforts = Efforts::of(means);
            let pair = |strain| {
                let effort = efforts.at(strain);
                (effort.compression_level, effort.readers)
            };
            assert_eq!((pair(Strain::Calm), pair(Strain::Behind)), (calm, strained), "{means:?}");
        };
        check(FREE, (3, 2), (1, 2));
        check(Means { cores: 0, ..FREE }, (3, 1), (1, 1));
        check(Means { cores: 6, ..FREE }, (3, 4), (1, 6));
        check(Means { cores: 64, ..FREE }, (3, 4), (1, 8));
        check(Means { cores: 64, memory_bytes: 18 << 20, ..FREE }, (3, 4), (1, 6));
        check(Means { cores: 64, memory_bytes: 4 << 20, ..FREE }, (3, 4), (1, 4));
        check(Means { cores: 64, readers: Some(3), ..FREE }, (3, 3), (1, 3));
        check(Means { cores: 2, readers: Some(12), ..FREE }, (3, 12), (1, 12));
        check(Means { cores: 64, compression_level: Some(3), ..FREE }, (3, 4), (3, 8));
        check(Means { compression_level: Some(9), readers: Some(1), ..FREE }, (9, 1), (9, 1));
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
