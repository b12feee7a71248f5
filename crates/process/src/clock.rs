//! The clocks. [`now`] is the only caller of the wall clock; planners take the time as an argument.
//!
//! [`Monotonic`] measures waiting and silence; it never jumps and says nothing about the date. It follows tokio's clock,
//! so a test that pauses tokio's time pauses this too.
//!
//! With the feature `crash-points` the wall clock of a process is wrong by as many seconds as `PGCONVOY_CLOCK_SHIFT` says,
//! ahead or, below zero, behind.

use std::{
    ops::{Add, Sub},
    sync::OnceLock,
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;

/// The wall clock, UTC.
pub fn now() -> Timestamp {
    #[expect(clippy::disallowed_methods, reason = "the one caller of the wall clock")]
    let now = Timestamp::now();
    #[cfg(feature = "crash-points")]
    let now = now + shift();
    now
}

#[cfg(feature = "crash-points")]
fn shift() -> jiff::SignedDuration {
    static SECONDS: OnceLock<i64> = OnceLock::new();
    let said = || std::env::var_os("PGCONVOY_CLOCK_SHIFT")?.into_string().ok()?.parse().ok();
    jiff::SignedDuration::from_secs(*SECONDS.get_or_init(|| said().unwrap_or(0)))
}

/// A moment on a clock that never jumps, as time since the first look at it in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Monotonic(Duration);

impl Monotonic {
    /// This moment.
    pub fn now() -> Self {
        static ANCHOR: OnceLock<Instant> = OnceLock::new();
        let now = Instant::now();
        Self(now.saturating_duration_since(*ANCHOR.get_or_init(|| now)))
    }

    /// A moment at a given distance from the origin; for planners under test.
    pub const fn from_origin(since: Duration) -> Self {
        Self(since)
    }

    /// Distance from the origin.
    pub const fn since_origin(self) -> Duration {
        self.0
    }

    /// Time from `earlier` to this moment; zero when `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Time from this moment to now.
    pub fn elapsed(self) -> Duration {
        Self::now().since(self)
    }
}

impl Add<Duration> for Monotonic {
    type Output = Self;
    fn add(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later))
    }
}

impl Sub<Duration> for Monotonic {
    type Output = Self;
    fn sub(self, earlier: Duration) -> Self {
        Self(self.0.saturating_sub(earlier))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monotonic_time_does_not_go_back() {
        let first = Monotonic::now();
        let second = Monotonic::now();
        assert!(second >= first);
        assert_eq!(first.since(second + Duration::from_secs(1)), Duration::ZERO);
        let origin = Monotonic::from_origin(Duration::from_secs(5));
        assert_eq!((origin + Duration::from_secs(2)).since(origin), Duration::from_secs(2));
        assert_eq!((origin - Duration::from_secs(9)).since_origin(), Duration::ZERO);
    }

    #[test]
    fn the_wall_clock_runs_after_this_was_written() {
        assert!(now() > "2026-01-01T00:00:00Z".parse::<Timestamp>().unwrap());
    }
}
