//! Is this file the WAL segment that its name claims, and is all of it there?
//!
//! A file in `pg_wal` of the right name and size may still hold something else: PostgreSQL recycles old segments under future names, makes
//! zeroed ones in advance, and a standby keeps a tail that its primary never finished. Page headers tell a foreign or recycled file; only a
//! walk over the records tells a complete segment from an incomplete one. [`SegmentScan`] does both in one pass over the bytes as they
//! stream by, with a checksum of every record, and copies nothing but the first bytes of records that cross a page.
//!
//! Decided on the first page, as errors: another cluster, another geometry, recycled or never written, a timeline that cannot be. From then
//! on nothing is an error but the size: where the records stop is the logical end, and the file is complete if that is its last byte
//! or a switch record with only zeros behind it.
//!
//! What else is to be learnt from the records is learnt in the same pass, by an observer ([`SegmentScan::observed`]): see
//! [`crate::wal_changes`].
//!
//! WAL of a version newer than known is accepted unread ([`SegmentReport::postgres_major`] is `None`): archiving must not stop on the day of
//! an upgrade. Not checked here: that the page timeline is an ancestor of the file's (needs its history file).
//!
//! Sources: `XLogReaderValidatePageHeader`, `XLogDecodeNextRecord` and `ValidXLogRecord` in `xlogreader.c`, `CopyXLogRecordToWAL` in `xlog.c`.

use crate::lsn::Lsn;
use crate::segment::{SegmentName, SegmentNameError, SegmentNumber, SegmentSize};
use crate::system_identifier::SystemIdentifier;
use crate::timeline::Timeline;
use crate::timestamp::PgTimestamp;

mod observe;
mod page;
mod walk;

pub use observe::{RecordObserver, Unobserved};
pub use page::{NEWEST_KNOWN_MAJOR, OLDEST_KNOWN_MAJOR};

use page::FirstPage;
use walk::RecordWalk;

/// Bytes in a WAL page (`XLOG_BLCKSZ`). Servers built with another page size are refused.
pub const PAGE_BYTES: usize = 8192;

/// What a file must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// The segment in the file's name.
    pub name: SegmentName,
    /// The cluster's segment size.
    pub size: SegmentSize,
    /// The cluster's system identifier.
    pub system_identifier: SystemIdentifier,
    /// True for a `.partial` file, whose tail belongs to no timeline and is never taken for damage.
    pub partial: bool,
}

/// One pass over the pages of a segment file, in order.
#[derive(Debug)]
pub struct SegmentScan<O = Unobserved> {
    expected: Expected,
    start: Lsn,
    seen_bytes: u64,
    state: State<O>,
}

#[derive(Debug)]
enum State<O> {
    FirstPage(O),
    Walking(Box<Walking<O>>),
    /// A version newer than known: counted, not read.
    Unread(O),
    /// The bytes were refused; kept so that a caller that goes on gets the same answer.
    Refused(SegmentError),
}

#[derive(Debug)]
struct Walking<O> {
    first: FirstPage,
    walk: RecordWalk<O>,
}

/// What a whole segment file turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentReport {
    /// How the records end.
    pub end: SegmentEnd,
    /// Where they end: the end of the segment if full, else the end of the last whole record, at least the start of the segment.
    pub logical_end: Lsn,
    /// The timeline in the first page's header: the file's, or an ancestor's in the first segments of a new timeline.
    pub first_page_timeline: Timeline,
    /// The server's major version, or `None` if it is newer than known and the content was not read (then `end` is `Full` by trust).
    pub postgres_major: Option<u32>,
    /// The earliest commit or abort in the segment: what a recovery target time is compared with.
    pub first_commit_time: Option<PgTimestamp>,
    /// The latest commit or abort in the segment.
    pub last_commit_time: Option<PgTimestamp>,
    /// Set if the records stop in the middle although later pages belong to this segment: bytes were changed after they were written.
    pub damage: Option<Damage>,
}

/// How the records of a segment end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentEnd {
    /// Records fill the file; the last one may go on in the next segment.
    Full,
    /// A switch record, then nothing but zeros.
    Switch,
    /// The records stop earlier: the tail of a standby, of a crash or of a promotion. Never the canonical content of a segment.
    Incomplete,
}

/// A broken place with valid pages behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damage {
    /// The record or page that is broken.
    pub at: Lsn,
    /// What is wrong with it, for people.
    pub reason: &'static str,
}

/// Why a file is not the segment that its name claims.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// The name cannot be of a cluster with this segment size.
    #[error("the segment cannot exist in this cluster")]
    Name(#[from] SegmentNameError),
    /// Not exactly one segment long.
    #[error("{name} has {found_bytes} bytes or more, expected {expected_bytes}")]
    Size { name: SegmentName, expected_bytes: u64, found_bytes: u64 },
    /// A chunk that is no multiple of [`PAGE_BYTES`]: the caller's mistake.
    #[error("a chunk of {bytes} bytes of {name} is not a whole number of WAL pages")]
    Chunk { name: SegmentName, bytes: usize },
    /// No WAL page header of any version.
    #[error("{name} is not a WAL file, its first page begins with {magic:#06X}")]
    NotWal { name: SegmentName, magic: u16 },
    /// WAL of a version older than supported, or of an unreleased one.
    #[error(
        "{name} was written by an unsupported PostgreSQL, page magic {magic:#06X}, expected PostgreSQL 14 or later"
    )]
    Version { name: SegmentName, magic: u16 },
    /// A first page header that no server writes.
    #[error("the first page header of {name} is invalid: {reason}")]
    Header { name: SegmentName, reason: &'static str },
    /// WAL of another cluster.
    #[error("{name} belongs to system identifier {found}, expected {expected}, this is another cluster's WAL")]
    ForeignSystem { name: SegmentName, expected: SystemIdentifier, found: SystemIdentifier },
    /// The cluster's segment or page size is not the file's.
    #[error("{name} was written with {what} of {found_bytes} bytes, expected {expected_bytes}")]
    Geometry { name: SegmentName, what: &'static str, expected_bytes: u64, found_bytes: u64 },
    /// A file made or renamed for future use: its content is not this segment yet.
    #[error("{name} is a recycled or preallocated file: its first page is {}, expected {expected}", found.map_or("empty".to_owned(), |lsn| lsn.to_string()))]
    Recycled { name: SegmentName, expected: Lsn, found: Option<Lsn> },
    /// The first page is of a later timeline than the name.
    #[error("the first page of {name} is on timeline {found}, later than the file's own")]
    Timeline { name: SegmentName, found: u32 },
}

impl SegmentEnd {
    /// True if the file holds all that this segment will ever hold.
    pub const fn is_complete(self) -> bool {
        matches!(self, Self::Full | Self::Switch)
    }
}

impl SegmentScan {
    /// A scan that has seen nothing yet.
    pub fn new(expected: Expected) -> Self {
        Self::observed(expected, Unobserved)
    }

    /// What the file is, once all of it was pushed.
    pub fn finish(self) -> Result<SegmentReport, SegmentError> {
        self.finish_observed().map(|(report, _)| report)
    }
}

impl<O: RecordObserver> SegmentScan<O> {
    /// A scan that has seen nothing yet and shows every record to an observer.
    pub fn observed(expected: Expected, observer: O) -> Self {
        match expected.name.number(expected.size) {
            Ok(number) => Self::at(expected, number, State::FirstPage(observer)),
            Err(error) => Self::at(expected, SegmentNumber::new(0), State::Refused(error.into())),
        }
    }

    fn at(expected: Expected, number: SegmentNumber, state: State<O>) -> Self {
        Self { expected, start: number.start(expected.size), seen_bytes: 0, state }
    }

    /// Takes the next bytes of the file, any whole number of pages. After an error the scan is over.
    pub fn push(&mut self, chunk: &[u8]) -> Result<(), SegmentError> {
        let result = self.push_pages(chunk);
        if let Err(error) = &result {
            self.state = State::Refused(error.clone());
        }
        result
    }

    fn push_pages(&mut self, chunk: &[u8]) -> Result<(), SegmentError> {
        let Expected { name, size, .. } = self.expected;
        if !chunk.len().is_multiple_of(PAGE_BYTES) {
            return Err(SegmentError::Chunk { name, bytes: chunk.len() });
        }
        let (at, mut pages) = (self.seen_bytes, chunk);
        self.seen_bytes = self.seen_bytes.saturating_add(chunk.len() as u64);
        if self.seen_bytes > size.bytes() {
            return Err(SegmentError::Size { name, expected_bytes: size.bytes(), found_bytes: self.seen_bytes });
        }
        if let (State::FirstPage(_), Some((first, rest))) = (&self.state, chunk.split_at_checked(PAGE_BYTES)) {
            self.begin(first)?;
            pages = rest;
        }
        match &mut self.state {
            State::Walking(walking) => {
                let skipped = (chunk.len() - pages.len()) as u64;
                walking.walk.pages(Lsn::new(self.start.as_u64() + at + skipped), pages);
                Ok(())
            }
            State::Refused(error) => Err(error.clone()),
            State::FirstPage(_) | State::Unread(_) => Ok(()),
        }
    }

    fn begin(&mut self, page: &[u8]) -> Result<(), SegmentError> {
        let Expected { name, size, .. } = self.expected;
        let first = FirstPage::read(&self.expected, self.start, page)?;
        // What stands there while the observer moves from one state to the next is seen by nobody.
        let meanwhile = State::Refused(SegmentError::Chunk { name, bytes: page.len() });
        let State::FirstPage(observer) = std::mem::replace(&mut self.state, meanwhile) else { return Ok(()) };
        let Some(first) = first else {
            self.state = State::Unread(observer);
            return Ok(());
        };
        let end = Lsn::new(self.start.as_u64().saturating_add(size.bytes()));
        let mut walk = RecordWalk::new(observer, first, name.timeline(), self.start, end);
        walk.first_page(page);
        self.state = State::Walking(Box::new(Walking { first, walk }));
        Ok(())
    }

    /// What the file is, once all of it was pushed, and the observer.
    pub fn finish_observed(self) -> Result<(SegmentReport, O), SegmentError> {
        let Expected { name, size, partial, .. } = self.expected;
        let size_error = SegmentError::Size { name, expected_bytes: size.bytes(), found_bytes: self.seen_bytes };
        let walking = match self.state {
            State::Refused(error) => return Err(error),
            _ if self.seen_bytes != size.bytes() => return Err(size_error),
            State::Walking(walking) => walking,
            State::Unread(observer) | State::FirstPage(observer) => {
                return Ok((unread_report(&self.expected, self.start), observer));
            }
        };
        let outcome = walking.walk.outcome();
        let report = SegmentReport {
            end: outcome.end,
            logical_end: outcome.logical_end,
            first_page_timeline: walking.first.timeline,
            postgres_major: Some(walking.first.version.major),
            first_commit_time: outcome.commit_times.map(|(first, _)| first),
            last_commit_time: outcome.commit_times.map(|(_, last)| last),
            damage: if partial { None } else { outcome.damage },
        };
        Ok((report, outcome.observer))
    }
}

/// What is said of a segment of a version newer than known: complete, by trust.
fn unread_report(expected: &Expected, start: Lsn) -> SegmentReport {
    SegmentReport {
        end: SegmentEnd::Full,
        logical_end: Lsn::new(start.as_u64().saturating_add(expected.size.bytes())),
        first_page_timeline: expected.name.timeline(),
        postgres_major: None,
        first_commit_time: None,
        last_commit_time: None,
        damage: None,
    }
}

#[cfg(test)]
mod tests;
