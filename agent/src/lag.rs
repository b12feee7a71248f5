//! How old the oldest commit is that is not durable off this host, measured from the server's own position.
//!
//! Pure: positions, how far WAL is durable, and `now` come in. A commit beyond what is durable was made after the last moment
//! at which the server was known to have none there, so the age is never told too small, and by a measurement's distance too
//! large. A server that does not answer may have gone on: from its last answer on the age grows.
//!
//! A quiet server writes WAL, too, of checkpoints and snapshots, and never archives the last of it. That is no loss: WAL
//! written while no transaction began or ended holds no commit.
//!
//! What it does not know: when was committed what was there before the first measurement. Unless the last checkpoint shows
//! that there is nothing, the oldest waiting file tells, and without one the age counts from the first measurement.
//!
//! Invariant: at most [`SAMPLES_MAX`] positions are kept; with more, every second one goes, which only rounds the age up.

use std::time::Duration;

use postgres_format::Lsn;
use process::clock::Monotonic;

use crate::postgres::Position;

/// Positions kept.
const SAMPLES_MAX: usize = 512;
/// Bytes of a page's long header, with which a segment begins: a position not beyond them has no record behind it.
const LONG_HEADER_BYTES: u64 = 40;

/// Until at least `last`, no commit was beyond `committed`.
#[derive(Clone, Copy, Debug)]
struct Sample {
    committed: Lsn,
    transactions: i64,
    last: Monotonic,
}

/// Positions of a primary, and how far they are durable.
#[derive(Debug, Default)]
pub struct Lag {
    samples: Vec<Sample>,
    current: Lsn,
    begun: Option<Monotonic>,
    durable: Option<Lsn>,
    is_answering: bool,
}

/// How far behind the repository is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Behind {
    /// Where the server is, or was when it last answered.
    pub current: Lsn,
    /// How far WAL is durable without a hole.
    pub durable: Lsn,
    /// Bytes of WAL between those.
    pub bytes: u64,
    /// Age of the oldest commit that may not be durable; zero when there is none.
    pub age: Duration,
}

impl Lag {
    /// The server said where it is. A position before the last one is that of another life of the data directory.
    pub fn at(&mut self, position: &Position, now: Monotonic) {
        if position.lsn < self.current {
            *self = Self::default();
        }
        self.current = position.lsn;
        self.begun.get_or_insert(now);
        self.is_answering = true;
        let committed = position.committed_to.map_or(position.lsn, |to| to.min(position.lsn));
        match self.samples.last_mut() {
            Some(last) if last.transactions == position.transactions => {
                last.committed = last.committed.min(committed);
                last.last = now;
            }
            _ => self.samples.push(Sample { committed, transactions: position.transactions, last: now }),
        }
        if self.samples.len() > SAMPLES_MAX {
            let mut place = 0;
            self.samples.retain(|_| {
                place += 1;
                place % 2 == 1
            });
        }
    }

    /// The server did not answer.
    pub fn silent(&mut self) {
        self.is_answering = false;
    }

    /// Nothing is measured any more: the server is in recovery and writes no WAL of its own.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// All finished WAL before this position is durable off this host.
    pub fn durable_to(&mut self, lsn: Lsn) {
        self.durable = self.durable.max(Some(lsn));
    }

    /// How far behind; nothing before the first position of a primary.
    pub fn behind(&self, segment_bytes: u64, oldest_ready: Duration, now: Monotonic) -> Option<Behind> {
        let last = self.samples.last()?;
        let (first, begun) = (self.samples.first()?, self.begun?);
        // Where no segment tells, all before the first position's own segment is taken for durable.
        let durable = self.durable.unwrap_or(Lsn::new(first.committed.as_u64() / segment_bytes * segment_bytes));
        let bytes = self.current.as_u64().saturating_sub(durable.as_u64());
        let has_commits = |committed: Lsn| committed.as_u64() > durable.as_u64().saturating_add(LONG_HEADER_BYTES);
        let known = self.samples.iter().rev().find(|sample| !has_commits(sample.committed));
        let age = match known {
            Some(_) if self.is_answering && !has_commits(last.committed) => Duration::ZERO,
            Some(sample) => now.since(sample.last),
            None => now.since(begun).max(oldest_ready),
        };
        Some(Behind { current: self.current, durable, bytes, age })
    }
}

#[cfg(test)]
mod tests {
    use postgres_format::Timeline;

    use super::*;
    use crate::postgres::Role;

    const SEGMENT: u64 = 1 << 24;

    fn at(seconds: u64) -> Monotonic {
        Monotonic::from_origin(Duration::from_secs(seconds))
    }

    /// Each position another, with commits before it.
    fn busy(lsn: u64) -> Position {
        Position {
            role: Role::Primary,
            timeline: Timeline::FIRST,
            lsn: Lsn::new(lsn),
            full_page_writes: true,
            transactions: lsn.cast_signed(),
            committed_to: None,
        }
    }

    fn age(lag: &Lag, seconds: u64) -> u64 {
        lag.behind(SEGMENT, Duration::ZERO, at(seconds)).unwrap().age.as_secs()
    }

    #[test]
    fn the_age_counts_from_when_the_server_was_last_no_further_than_what_is_durable() {
        let mut lag = Lag::default();
        assert_eq!(lag.behind(SEGMENT, Duration::ZERO, at(0)), None, "nothing is claimed before the first position");
        lag.at(&busy(3 * SEGMENT), at(100));
        lag.durable_to(Lsn::new(3 * SEGMENT));
        assert_eq!(age(&lag, 100), 0);
        lag.at(&busy(3 * SEGMENT + 500), at(105));
        lag.at(&busy(4 * SEGMENT + 500), at(110));
        assert_eq!(age(&lag, 110), 10);
        let behind = lag.behind(SEGMENT, Duration::ZERO, at(110)).unwrap();
        assert_eq!((behind.bytes, behind.durable), (SEGMENT + 500, Lsn::new(3 * SEGMENT)));
        lag.durable_to(Lsn::new(4 * SEGMENT));
        assert_eq!(age(&lag, 112), 7, "what was written since 105 waits");
        lag.durable_to(Lsn::new(3 * SEGMENT));
        assert_eq!(age(&lag, 112), 7, "what was durable stays so");
    }

    #[test]
    fn an_idle_server_with_all_archived_is_not_behind() {
        let mut lag = Lag::default();
        lag.at(&busy(3 * SEGMENT + 40), at(0));
        lag.durable_to(Lsn::new(3 * SEGMENT));
        lag.at(&busy(3 * SEGMENT + 40), at(5000));
        assert_eq!(age(&lag, 5003), 0);
        lag.at(&busy(3 * SEGMENT + 41), at(5005));
        assert_eq!(age(&lag, 9005), 4005, "one commit waits for the end of its segment");
    }

    #[test]
    fn wal_without_a_commit_is_not_waited_for() {
        let mut lag = Lag::default();
        let quiet = |lsn: u64| Position { transactions: 7, ..busy(lsn) };
        lag.durable_to(Lsn::new(3 * SEGMENT));
        lag.at(&quiet(3 * SEGMENT), at(0));
        lag.at(&quiet(3 * SEGMENT + 90), at(5));
        lag.at(&quiet(3 * SEGMENT + 180), at(5000));
        assert_eq!(age(&lag, 5003), 0, "checkpoints and snapshots are no loss");
        assert_eq!(lag.behind(SEGMENT, Duration::ZERO, at(5003)).unwrap().bytes, 180);
        lag.at(&busy(3 * SEGMENT + 300), at(5005));
        assert_eq!(age(&lag, 5010), 10);

        let mut started = Lag::default();
        started.durable_to(Lsn::new(3 * SEGMENT));
        started.at(&Position { committed_to: Some(Lsn::new(2 * SEGMENT + 9)), ..quiet(3 * SEGMENT + 90) }, at(0));
        assert_eq!(age(&started, 3), 0, "the checkpoint shows that nothing was committed since");
        started.at(&quiet(3 * SEGMENT + 90), at(2999));
        assert_eq!(age(&started, 3000), 0, "what the checkpoint showed holds while nothing begins");
    }

    #[test]
    fn a_silent_server_may_have_gone_on_writing() {
        let mut lag = Lag::default();
        lag.at(&busy(SEGMENT), at(0));
        lag.durable_to(Lsn::new(SEGMENT));
        lag.silent();
        assert_eq!(age(&lag, 60), 60);
        lag.at(&busy(SEGMENT), at(70));
        assert_eq!(age(&lag, 71), 0);
    }

    #[test]
    fn what_was_there_before_the_first_measurement_is_as_old_as_the_oldest_waiting_file() {
        let mut lag = Lag::default();
        lag.at(&busy(9 * SEGMENT), at(0));
        lag.durable_to(Lsn::new(5 * SEGMENT));
        let age = |ready: u64| lag.behind(SEGMENT, Duration::from_secs(ready), at(10)).unwrap().age.as_secs();
        assert_eq!((age(0), age(7200)), (10, 7200));
    }

    #[test]
    fn without_archiving_the_age_grows_and_memory_does_not() {
        let mut lag = Lag::default();
        for step in 0..10_000 {
            lag.at(&busy(SEGMENT + step * SEGMENT), at(step * 5));
        }
        assert!(lag.samples.len() <= SAMPLES_MAX);
        assert_eq!(age(&lag, 50_000), 50_000);
    }

    #[test]
    fn another_life_of_the_data_directory_begins_anew() {
        let mut lag = Lag::default();
        lag.at(&busy(9 * SEGMENT), at(0));
        lag.durable_to(Lsn::new(9 * SEGMENT));
        lag.at(&busy(2 * SEGMENT + 100), at(50));
        let behind = lag.behind(SEGMENT, Duration::ZERO, at(60)).unwrap();
        assert_eq!((behind.durable, behind.age.as_secs()), (Lsn::new(2 * SEGMENT), 10));
        lag.forget();
        assert_eq!(lag.behind(SEGMENT, Duration::ZERO, at(60)), None);
    }
}
