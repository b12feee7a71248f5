//! How fast a backup may read, and with how many readers: so much as leaves the server its disks and cores. Either can be
//! changed while it runs. A restore keeps its rate by the same.
//!
//! [`Bucket`] is pure: time and bytes in, permission out. [`Pace`] is what readers ask before they read, and who changes it
//! tells. WAL is archived elsewhere and never asks.
//!
//! Invariants: over any time no more is read than the rate allows, and at most [`BURST`] of it besides; a change holds from the
//! next buffer on.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use process::clock::Monotonic;

/// What may be read at once after a pause, as time at the rate.
const BURST: Duration = Duration::from_millis(250);
/// How often who waits looks again, for the pace may have changed and the backup been stopped.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Bytes that drip in at a rate, to be taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// 0 is no limit.
    bytes_per_second: u64,
    /// When all that was taken has dripped in.
    paid: Duration,
}

impl Bucket {
    /// One from which nothing was taken. A rate of 0 is no limit.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, paid: Duration::ZERO }
    }

    /// Takes bytes out, if what was taken before has dripped in by `now`; else says how long that takes.
    pub fn take(&mut self, now: Duration, bytes: u64) -> Result<(), Duration> {
        if self.bytes_per_second == 0 {
            return Ok(());
        }
        if self.paid > now {
            return Err(self.paid - now);
        }
        self.paid = self.paid.max(now.saturating_sub(BURST)) + self.time(bytes);
        Ok(())
    }

    /// Goes on at another rate; what is not paid yet is paid at that one.
    pub fn change(&mut self, now: Duration, bytes_per_second: u64) {
        let owed = self.paid.saturating_sub(now);
        let owed_bytes = owed.as_nanos().saturating_mul(self.bytes_per_second.into()) / 1_000_000_000;
        self.bytes_per_second = bytes_per_second;
        self.paid = now + self.time(u64::try_from(owed_bytes).unwrap_or(u64::MAX));
    }

    fn time(&self, bytes: u64) -> Duration {
        let rate = u128::from(self.bytes_per_second.max(1));
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / rate;
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// What is asked of a pace; absent leaves it as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Bytes read a second at most; 0 is no limit.
    pub bytes_per_second: Option<u64>,
    /// Readers at most; 0 is as many as there are.
    pub readers: Option<usize>,
}

/// The pace of one node's backups.
#[derive(Debug)]
pub struct Pace {
    began: Monotonic,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    bucket: Bucket,
    /// 0 is as many as there are.
    readers: usize,
}

impl Pace {
    /// No limit, but for the rate; 0 is none.
    pub fn new(bytes_per_second: u64) -> Self {
        let now = Now { bucket: Bucket::new(bytes_per_second), readers: 0 };
        Self { began: Monotonic::now(), now: Mutex::new(now) }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on at another pace.
    pub fn change(&self, wish: Wish) {
        let (mut now, at) = (self.now(), self.began.elapsed());
        if let Some(bytes_per_second) = wish.bytes_per_second {
            now.bucket.change(at, bytes_per_second);
        }
        now.readers = wish.readers.unwrap_or(now.readers);
    }

    /// Whether a reader may go on; they are numbered from 0.
    pub(super) fn lets(&self, reader: usize) -> bool {
        let readers = self.now().readers;
        readers == 0 || reader < readers
    }

    /// Waits on this thread until so many bytes may be read, or it was `stopped`.
    pub(super) fn wait(&self, bytes: u64, stopped: impl Fn() -> bool) {
        while !stopped() {
            let taken = self.now().bucket.take(self.began.elapsed(), bytes);
            match taken {
                Ok(()) => return,
                Err(wait) => rest(wait.min(LOOK_EVERY)),
            }
        }
    }

    /// Waits until so many bytes may be read. Dropped before, it has taken none.
    pub(crate) async fn turn(&self, bytes: u64) {
        loop {
            let taken = self.now().bucket.take(self.began.elapsed(), bytes);
            match taken {
                Ok(()) => return,
                Err(wait) => tokio::time::sleep(wait.min(LOOK_EVERY)).await,
            }
        }
    }

    /// Waits a little on this thread: something else must change first.
    pub(super) fn rest() {
        rest(LOOK_EVERY);
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self::new(0)
    }
}

impl fmt::Display for Pace {
    /// Nothing if there is no limit.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = self.now();
        if now.bucket.bytes_per_second > 0 {
            write!(formatter, ", at most {} bytes a second", now.bucket.bytes_per_second)?;
        }
        if now.readers > 0 {
            write!(formatter, ", at most {} readers", now.readers)?;
        }
        Ok(())
    }
}

#[expect(clippy::disallowed_methods, reason = "readers are threads of their own; bounded by LOOK_EVERY")]
fn rest(time: Duration) {
    std::thread::sleep(time);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Bytes taken in pieces of so many until a moment, by who waits as long as is asked.
    fn taken(bucket: &mut Bucket, from: Duration, until: Duration, piece: u64) -> u64 {
        let (mut now, mut bytes) = (from, 0);
        while now < until {
            match bucket.take(now, piece) {
                Ok(()) => bytes += piece,
                Err(wait) => now += wait,
            }
        }
        bytes
    }

    #[test]
    fn a_rate_is_kept_whatever_the_size_of_pieces() {
        for piece in [1, 999, 100_000, 5_000_000] {
            let bytes = taken(&mut Bucket::new(1_000_000), 10 * SECOND, 20 * SECOND, piece);
            let most = 10_000_000 + 250_000 + piece;
            assert!((10_000_000..=most).contains(&bytes), "{bytes} bytes in pieces of {piece}");
        }
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let mut bucket = Bucket::new(1000);
        bucket.take(SECOND, 1000).unwrap();
        assert_eq!(bucket.take(SECOND, 1), Err(Duration::from_millis(750)));
        let after_an_hour = 3600 * SECOND;
        assert!(taken(&mut bucket, after_an_hour, after_an_hour + SECOND, 10) <= 1260);
    }

    #[test]
    fn another_rate_holds_at_once() {
        let mut bucket = Bucket::new(1000);
        bucket.take(SECOND, 60_000).unwrap();
        assert!(bucket.take(SECOND, 1).unwrap_err() > 59 * SECOND);
        bucket.change(SECOND, 60_000);
        assert!(bucket.take(SECOND, 1).unwrap_err() <= SECOND);
        bucket.change(SECOND, 0);
        bucket.take(SECOND, u64::MAX).unwrap();
        bucket.change(SECOND, 10);
        assert_eq!(bucket.take(SECOND, 10), Ok(()));
        assert!(bucket.take(SECOND, 10).is_err());
    }

    #[tokio::test]
    async fn who_waits_without_a_thread_keeps_the_rate() {
        let pace = Pace::new(100_000);
        let begun = Monotonic::now();
        for _ in 0..4 {
            pace.turn(10_000).await;
        }
        // The last one need not be paid for.
        assert!(begun.elapsed() >= Duration::from_millis(300) - BURST, "{:?}", begun.elapsed());
        let none = Pace::new(0);
        none.turn(u64::MAX).await;
    }

    #[test]
    fn a_wish_leaves_the_rest_as_it_is() {
        let pace = Pace::new(5);
        assert!(pace.lets(7));
        pace.change(Wish { readers: Some(2), ..Wish::default() });
        assert!(pace.lets(1) && !pace.lets(2));
        assert_eq!(pace.to_string(), ", at most 5 bytes a second, at most 2 readers");
        pace.change(Wish { bytes_per_second: Some(0), readers: None });
        assert!(pace.lets(1) && !pace.lets(2));
        pace.change(Wish { readers: Some(0), ..Wish::default() });
        assert_eq!(pace.to_string(), "");
        pace.wait(u64::MAX, || false);
    }
}
