//! Gathers the changes of a segment while its bytes are checked.

use super::collect::Collector;
use super::record::{Rules, Unclear, head_bytes, note};
use super::{ChangeMap, DOUBT_BYTES_MAX, LEAD_BYTES, Lead, SPECIAL_HEAD_BYTES, SegmentChanges, Tail};
use crate::lsn::Lsn;
use crate::wal_segment::{Expected, RecordObserver, SegmentEnd, SegmentError, SegmentReport, SegmentScan};

/// A scan of a segment that also gathers what its records change, in the same pass over the bytes.
#[derive(Debug)]
pub struct ChangeScan {
    expected: Expected,
    scan: SegmentScan<ChangeScanner>,
}

/// The observer that gathers changes.
#[derive(Debug)]
pub struct ChangeScanner {
    /// Of the segment's version, once that is known.
    version: Option<(u32, Rules)>,
    collector: Collector,
    lead: Lead,
    /// Bytes of the rest of a foreign record that were not seen yet.
    lead_missing_bytes: u32,
    open: Option<OpenRecord>,
    /// The beginning of the open record.
    head: Vec<u8>,
    doubt: Option<String>,
}

/// A record that goes on behind its page.
#[derive(Debug, Clone, Copy)]
struct OpenRecord {
    start: Lsn,
    total_bytes: u32,
    seen_bytes: u32,
}

impl ChangeScan {
    /// A scan that has seen nothing yet.
    pub fn new(expected: Expected) -> Self {
        Self { expected, scan: SegmentScan::observed(expected, ChangeScanner::new()) }
    }

    /// Takes the next bytes of the file, any whole number of pages. After an error the scan is over.
    ///
    /// # Errors
    /// As [`SegmentScan::push`].
    pub fn push(&mut self, chunk: &[u8]) -> Result<(), SegmentError> {
        self.scan.push(chunk)
    }

    /// What the file is and what it changed, once all of it was pushed.
    ///
    /// # Errors
    /// As [`SegmentScan::finish`].
    pub fn finish(self) -> Result<(SegmentReport, SegmentChanges), SegmentError> {
        let (report, scanner) = self.scan.finish_observed()?;
        let start = self.expected.name.number(self.expected.size)?.start(self.expected.size);
        let changes = scanner.into_changes(&self.expected, start, &report);
        Ok((report, changes))
    }
}

impl ChangeScanner {
    fn new() -> Self {
        Self {
            version: None,
            collector: Collector::new(),
            lead: Lead::Fresh,
            lead_missing_bytes: 0,
            open: None,
            head: Vec::new(),
            doubt: None,
        }
    }

    /// Notes a record; after a doubt nothing matters any more.
    #[inline(always)]
    fn note(&mut self, start: Lsn, head_and_total: (&[u8], u32)) {
        if let (Some((_, rules)), None) = (self.version, &self.doubt)
            && let Err(unclear) = note(&mut self.collector, rules, head_and_total.0, head_and_total.1)
        {
            self.doubt_record(start, unclear);
        }
    }

    #[cold]
    fn doubt_record(&mut self, start: Lsn, unclear: Unclear) {
        self.doubt = Some(match unclear {
            Unclear::Broken(reason) => format!("the record at {start} is not understood: {reason}"),
            Unclear::Short => format!("the record at {start} is too long to be kept until it was understood"),
        });
    }

    fn into_changes(mut self, expected: &Expected, start: Lsn, report: &SegmentReport) -> SegmentChanges {
        if self.collector.overflowed() {
            self.doubt = Some("it changes more relations than fit into a map".to_owned());
        }
        if report.postgres_major.is_none() {
            self.doubt = Some("it was written by a newer PostgreSQL than is known".to_owned());
        }
        let mut doubt = self.doubt.take();
        if let Some(text) = &mut doubt {
            text.truncate(text.floor_char_boundary(DOUBT_BYTES_MAX));
        }
        let map = if doubt.is_some() {
            ChangeMap::empty()
        } else {
            std::mem::replace(&mut self.collector, Collector::new()).into_map()
        };
        SegmentChanges {
            start,
            size: expected.size,
            end: report.end,
            logical_end: report.logical_end,
            postgres_major: self.version.map_or(0, |(major, _)| major),
            map,
            tail: self.tail(report.end),
            lead: self.lead,
            doubt,
        }
    }

    fn tail(&mut self, end: SegmentEnd) -> Tail {
        if end != SegmentEnd::Full {
            return Tail::Closed;
        }
        match self.open {
            _ if self.lead_missing_bytes > 0 => Tail::Through,
            Some(OpenRecord { start, total_bytes, seen_bytes }) => {
                Tail::Open { start, total_bytes, seen_bytes, head: std::mem::take(&mut self.head) }
            }
            None => Tail::Closed,
        }
    }
}

impl RecordObserver for ChangeScanner {
    fn begin(&mut self, postgres_major: u32, _start: Lsn) {
        self.version = Some((postgres_major, Rules::of(postgres_major)));
    }

    fn given_up(&mut self) {
        self.lead = Lead::GivenUp;
    }

    fn continued(&mut self, remaining_bytes: u32) {
        self.lead = Lead::Rest { remaining_bytes, bytes: Vec::new() };
        self.lead_missing_bytes = remaining_bytes;
    }

    fn rest(&mut self, more: &[u8]) {
        self.lead_missing_bytes = self.lead_missing_bytes.saturating_sub(more.len() as u32);
        if let Lead::Rest { bytes, .. } = &mut self.lead {
            let room = LEAD_BYTES - bytes.len();
            bytes.extend_from_slice(&more[..room.min(more.len())]);
        }
    }

    #[inline(always)]
    fn whole(&mut self, start: Lsn, record: &[u8]) {
        self.note(start, (record, record.len() as u32));
    }

    fn opened(&mut self, start: Lsn, total_bytes: u32) {
        self.open = Some(OpenRecord { start, total_bytes, seen_bytes: 0 });
        self.head.clear();
    }

    fn piece(&mut self, bytes: &[u8]) {
        let Some(open) = &mut self.open else { return };
        open.seen_bytes += bytes.len() as u32;
        let mut rest = bytes;
        // A header may be cut too; how much is worth keeping is known once it is there.
        while !rest.is_empty() {
            let keep = if self.head.len() < 24 { 24 } else { head_bytes(&self.head) };
            let here = keep.saturating_sub(self.head.len()).min(rest.len());
            if here == 0 {
                break;
            }
            self.head.extend_from_slice(&rest[..here]);
            rest = &rest[here..];
        }
    }

    fn closed(&mut self) {
        let Some(open) = self.open.take() else { return };
        let head = std::mem::take(&mut self.head);
        self.note(open.start, (&head, open.total_bytes));
        self.head = head;
        debug_assert!(self.head.len() <= SPECIAL_HEAD_BYTES);
    }

    fn forgotten(&mut self) {
        if self.open.take().is_none() {
            self.lead = Lead::GivenUp;
            self.lead_missing_bytes = 0;
        }
    }
}
