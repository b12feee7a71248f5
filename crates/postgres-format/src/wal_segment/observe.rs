//! What else may be learnt from the records while they are walked.
//!
//! A scan may carry an observer, which sees every record of the segment in the one pass that checks them. A scan without one is compiled
//! as if there were none.

use crate::lsn::Lsn;

/// Sees the records of one segment, in order. Every method may be left out.
///
/// ```text
/// begin   [given_up | continued rest* [forgotten]]   ( whole | opened piece* (closed | forgotten) )*   [opened piece*]
/// ```
///
/// Nothing is told of a segment of a version newer than known. What is behind the last valid record is told by nobody: an `opened` that is
/// never `closed` is a record that goes on in the next segment if the report says that the segment is full, else it is worth nothing.
pub trait RecordObserver {
    /// The first page is of this segment, and of a server of this major version.
    fn begin(&mut self, _postgres_major: u32, _start: Lsn) {}

    /// The segment's first page says that the record begun before it was given up in crash recovery.
    fn given_up(&mut self) {}

    /// The segment begins with the rest of a record begun before it: so many bytes, here and perhaps in later segments.
    fn continued(&mut self, _remaining_bytes: u32) {}

    /// More bytes of that rest. Nothing proves them here: their checksum is in the record's beginning.
    fn rest(&mut self, _bytes: &[u8]) {}

    /// A valid record that lies on one page, all of it.
    fn whole(&mut self, _start: Lsn, _record: &[u8]) {}

    /// A record begins that goes on behind its page.
    fn opened(&mut self, _start: Lsn, _total_bytes: u32) {}

    /// More bytes of the record that was opened, from its first on.
    fn piece(&mut self, _bytes: &[u8]) {}

    /// The record that was opened is complete and valid.
    fn closed(&mut self) {}

    /// The record that was opened, or else the one whose rest the segment began with, was given up in crash recovery: it is no part of the WAL.
    fn forgotten(&mut self) {}
}

/// No observer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl RecordObserver for Unobserved {}
