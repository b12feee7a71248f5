//! The walk from record to record through the pages of one segment.
//!
//! ```text
//! record: 0 u32 total length   4 u32 xid   8 u64 previous record   16 u8 info   17 u8 resource manager   18 padding   20 u32 CRC   24 …
//! ```
//!
//! Records begin on multiples of eight bytes and go on over page headers. The CRC-32C covers bytes 24 to the end, then 0 to 20. The link to
//! the previous record is what unmasks old records that a recycled file still holds behind the end of its new content: they carry
//! valid checksums, but links into the segment the file once was.

use super::observe::RecordObserver;
use super::page::{CONTINUES, FirstPage, LONG_HEADER_BYTES, PageHeader, SHORT_HEADER_BYTES, Version};
use super::{Damage, PAGE_BYTES, SegmentEnd};
use crate::bytes::{i64_at, u32_at, u64_at};
use crate::lsn::Lsn;
use crate::timeline::Timeline;
use crate::timestamp::PgTimestamp;

const RECORD_HEADER_BYTES: usize = 24;
/// The CRC-32C of any bytes followed by their own CRC-32C.
const RESIDUE: u32 = 0x4867_4BC7;
/// Longer records cannot be written (`XLogRecordMaxSize`, and the allocation limit before 16).
const MAX_RECORD_BYTES: u32 = 0x3FFF_FFFF;
/// Records up to this size are laid out anew for their checksum.
const SMALL_BYTES: usize = 256;
/// Bytes of a record that are kept if it crosses pages: header, and as far as a commit time can be (see [`commit_time`]).
const PREFIX_BYTES: usize = 48;

/// `RM_XLOG_ID` and its `XLOG_SWITCH`.
const WAL_MANAGER: u8 = 0;
const SWITCH: u8 = 0x40;
/// `RM_XACT_ID` and the operations that carry a time: commit, abort, and both of prepared transactions (`xact.h`).
const TRANSACTION_MANAGER: u8 = 1;
const TRANSACTION_OPERATION_MASK: u8 = 0x70;
const OPERATIONS_WITH_TIME: [u8; 4] = [0x00, 0x20, 0x30, 0x40];

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// The state between two pages.
#[derive(Debug)]
pub(super) struct RecordWalk<O> {
    observer: O,
    version: Version,
    file_timeline: Timeline,
    /// Of the last valid page: timelines never go back within a file.
    page_timeline: u32,
    segment_start: u64,
    segment_end: u64,
    step: Step,
    /// Start of the last whole record, once one was seen.
    previous_record: Option<u64>,
    logical_end: u64,
    commit_times: Option<(PgTimestamp, PgTimestamp)>,
    damage: Option<Damage>,
    scratch: Scratch,
}

/// Room for one small record in the order of its checksum (see [`intact`]).
#[derive(Debug)]
#[repr(align(8))]
struct Scratch([u8; 8 + SMALL_BYTES]);

#[derive(Debug)]
enum Step {
    /// A record begins where the last one ended.
    Between,
    /// The rest of a record begun in an earlier segment: cannot be checked, is stepped over.
    Skipping { remaining_bytes: u32 },
    /// Within a record begun in this segment.
    Within(SplitRecord),
    /// Behind a switch record: zeros are expected.
    Switched,
    /// Behind the last valid record.
    Stopped(Damage),
}

/// A record that crosses a page, as far as it was seen.
#[derive(Debug)]
struct SplitRecord {
    start: u64,
    total_bytes: u32,
    seen_bytes: u32,
    prefix: [u8; PREFIX_BYTES],
    /// Over the bytes behind the header that were seen.
    crc: u32,
}

/// What the walk found.
#[derive(Debug)]
pub(super) struct Outcome<O> {
    pub(super) observer: O,
    pub(super) end: SegmentEnd,
    pub(super) logical_end: Lsn,
    pub(super) commit_times: Option<(PgTimestamp, PgTimestamp)>,
    pub(super) damage: Option<Damage>,
}

impl<O: RecordObserver> RecordWalk<O> {
    pub(super) fn new(mut observer: O, first: FirstPage, file: Timeline, start: Lsn, end: Lsn) -> Self {
        let FirstPage { version, timeline: first } = first;
        observer.begin(version.major, start);
        Self {
            observer,
            version,
            file_timeline: file,
            page_timeline: first.get(),
            segment_start: start.as_u64(),
            segment_end: end.as_u64(),
            step: Step::Between,
            previous_record: None,
            logical_end: start.as_u64(),
            commit_times: None,
            damage: None,
            scratch: Scratch([0; 8 + SMALL_BYTES]),
        }
    }

    /// Takes the first page, whose header the caller has checked.
    pub(super) fn first_page(&mut self, page: &[u8]) {
        let header = PageHeader::read(page);
        if header.info & CONTINUES != 0 {
            if header.remaining_bytes == 0 || header.remaining_bytes > MAX_RECORD_BYTES {
                return self.stop(self.segment_start, "a continued record has an impossible length");
            }
            self.step = Step::Skipping { remaining_bytes: header.remaining_bytes };
            self.observer.continued(header.remaining_bytes);
        } else if header.info & self.version.given_up != 0 {
            self.observer.given_up();
        }
        if is_switch_tail(page, &header, self.segment_start) {
            self.observer.rest(&page[LONG_HEADER_BYTES..LONG_HEADER_BYTES + header.remaining_bytes as usize]);
            self.logical_end =
                self.segment_start + aligned(LONG_HEADER_BYTES as u64 + u64::from(header.remaining_bytes));
            self.step = Step::Switched;
            let rest = &page[aligned(LONG_HEADER_BYTES as u64 + u64::from(header.remaining_bytes)) as usize..];
            return self.expect_zeros(self.segment_start, rest);
        }
        self.content(self.segment_start, page, LONG_HEADER_BYTES);
    }

    /// Takes more whole pages, the first of them at `address`.
    pub(super) fn pages(&mut self, address: Lsn, pages: &[u8]) {
        let mut address = address.as_u64();
        for page in pages.chunks_exact(PAGE_BYTES) {
            self.page(address, page);
            address = address.saturating_add(PAGE_BYTES as u64);
        }
    }

    #[inline]
    fn page(&mut self, address: u64, page: &[u8]) {
        match &self.step {
            Step::Switched => return self.expect_zeros(address, page),
            Step::Stopped(stopped) => {
                if self.damage.is_none() && self.belongs(address, &PageHeader::read(page)) {
                    self.damage = Some(*stopped);
                }
                return;
            }
            Step::Between | Step::Skipping { .. } | Step::Within(_) => {}
        }
        let header = PageHeader::read(page);
        if !self.belongs(address, &header) {
            return self.stop(address, "a page is empty or of another place or timeline");
        }
        self.page_timeline = header.timeline;
        if let Err(reason) = self.accept_continuation(&header) {
            return self.stop(address, reason);
        }
        self.content(address, page, SHORT_HEADER_BYTES);
    }

    /// Whether a page header is the one that belongs at this address.
    #[inline]
    fn belongs(&self, address: u64, header: &PageHeader) -> bool {
        header.magic == self.version.magic
            && self.version.allows(header.info, false)
            && header.address == address
            && (self.page_timeline..=self.file_timeline.get()).contains(&header.timeline)
    }

    /// Whether the page goes on with what the last one left open. A record given up in crash recovery is forgotten here.
    #[inline]
    fn accept_continuation(&mut self, header: &PageHeader) -> Result<(), &'static str> {
        let open = match &self.step {
            Step::Skipping { remaining_bytes } => Some(*remaining_bytes),
            Step::Within(record) => Some(record.total_bytes - record.seen_bytes),
            Step::Between | Step::Switched | Step::Stopped(_) => None,
        };
        let continued = (header.info & CONTINUES != 0).then_some(header.remaining_bytes);
        match (open, continued) {
            (Some(open), Some(continued)) if open == continued => Ok(()),
            (None, None) => Ok(()),
            (Some(_), None) if header.info & self.version.given_up != 0 => {
                self.observer.forgotten();
                self.step = Step::Between;
                Ok(())
            }
            _ => Err("a page does not go on with the record before it"),
        }
    }

    /// Takes the records of a page whose header is valid and `header_bytes` long.
    #[inline]
    fn content(&mut self, address: u64, page: &[u8], header_bytes: usize) {
        let mut at = match self.finish_open(address, page, header_bytes) {
            Some(at) => at,
            None => return,
        };
        while let Some(rest) = page.get(at..).filter(|rest| !rest.is_empty()) {
            let start = address + at as u64;
            let total_bytes = u32_at(rest, 0);
            if total_bytes < RECORD_HEADER_BYTES as u32 || total_bytes > MAX_RECORD_BYTES {
                return self.stop(start, "a record has an impossible length");
            }
            let Some(record) = rest.get(..total_bytes as usize) else { return self.open(start, rest, total_bytes) };
            if !self.linked(start, record) || !intact(&mut self.scratch, record) {
                return self.stop(start, "a record is broken: its checksum or its link to the one before is wrong");
            }
            at = aligned(at as u64 + u64::from(total_bytes)) as usize;
            self.observer.whole(Lsn::new(start), record);
            if self.whole(start, address + at as u64, record) {
                return self.expect_zeros(start, page.get(at..).unwrap_or_default());
            }
        }
    }

    /// Takes the rest of a record that an earlier page began. Gives the offset behind it, or `None` if the page holds no more.
    #[inline]
    fn finish_open(&mut self, address: u64, page: &[u8], header_bytes: usize) -> Option<usize> {
        let body = &page[header_bytes..];
        let record = match &mut self.step {
            Step::Skipping { remaining_bytes } => {
                let here = body.len().min(*remaining_bytes as usize);
                *remaining_bytes -= here as u32;
                self.observer.rest(&body[..here]);
                if *remaining_bytes > 0 {
                    return None;
                }
                self.step = Step::Between;
                let at = aligned((header_bytes + here) as u64);
                self.logical_end = address + at;
                return Some(at as usize);
            }
            Step::Within(record) => record,
            Step::Between | Step::Switched | Step::Stopped(_) => return Some(header_bytes),
        };
        let here = body.len().min((record.total_bytes - record.seen_bytes) as usize);
        record.take(&body[..here]);
        self.observer.piece(&body[..here]);
        if record.seen_bytes < record.total_bytes {
            return None;
        }
        let (start, prefix, crc) = (record.start, record.prefix, record.crc);
        let prefix = &prefix[..PREFIX_BYTES.min(record.total_bytes as usize)];
        self.step = Step::Between;
        if !self.linked(start, prefix) || !header_closes(crc, prefix) {
            self.stop(start, "a record is broken: its checksum or its link to the one before is wrong");
            return None;
        }
        self.observer.closed();
        let at = aligned((header_bytes + here) as u64) as usize;
        if self.whole(start, address + at as u64, prefix) {
            self.expect_zeros(start, page.get(at..).unwrap_or_default());
            return None;
        }
        Some(at)
    }

    /// Begins a record that does not end on this page.
    fn open(&mut self, start: u64, here: &[u8], total_bytes: u32) {
        // The link is in the first 16 bytes; if the page ends before it, it is checked with the rest of the record.
        if here.len() >= 16 && !self.linked(start, here) {
            return self.stop(start, "a record is broken: its link to the one before is wrong");
        }
        let mut record = SplitRecord { start, total_bytes, seen_bytes: 0, prefix: [0; PREFIX_BYTES], crc: 0 };
        record.take(here);
        self.observer.opened(Lsn::new(start), total_bytes);
        self.observer.piece(here);
        self.step = Step::Within(record);
    }

    #[inline]
    fn linked(&self, start: u64, record: &[u8]) -> bool {
        let previous = u64_at(record, 8);
        self.previous_record.map_or(previous < start, |expected| previous == expected)
    }

    /// Notes a valid record of which `record` holds at least the prefix; true if it is a switch.
    #[inline]
    fn whole(&mut self, start: u64, end: u64, record: &[u8]) -> bool {
        self.previous_record = Some(start);
        self.logical_end = end;
        let (info, manager) = (record[16], record[17]);
        if manager == TRANSACTION_MANAGER && OPERATIONS_WITH_TIME.contains(&(info & TRANSACTION_OPERATION_MASK)) {
            self.note_commit(record);
        }
        let switch = manager == WAL_MANAGER && info & 0xF0 == SWITCH;
        if switch {
            self.step = Step::Switched;
        }
        switch
    }

    fn note_commit(&mut self, record: &[u8]) {
        if let Some(time) = commit_time(record) {
            let (first, last) = self.commit_times.unwrap_or((time, time));
            self.commit_times = Some((first.min(time), last.max(time)));
        }
    }

    fn expect_zeros(&mut self, address: u64, rest: &[u8]) {
        if ZERO_PAGE.get(..rest.len()) != Some(rest) {
            self.stop(address, "something other than zeros is behind a switch record");
        }
    }

    #[cold]
    fn stop(&mut self, at: u64, reason: &'static str) {
        self.step = Step::Stopped(Damage { at: Lsn::new(at), reason });
    }

    /// What was found, after the last page.
    pub(super) fn outcome(self) -> Outcome<O> {
        let (end, logical_end) = match self.step {
            Step::Between | Step::Skipping { .. } | Step::Within(_) => (SegmentEnd::Full, self.segment_end),
            Step::Switched => (SegmentEnd::Switch, self.logical_end),
            Step::Stopped(_) => (SegmentEnd::Incomplete, self.logical_end),
        };
        Outcome {
            observer: self.observer,
            end,
            logical_end: Lsn::new(logical_end),
            commit_times: self.commit_times,
            damage: self.damage,
        }
    }
}

impl SplitRecord {
    /// Takes more bytes of the record, cut at its end.
    fn take(&mut self, bytes: &[u8]) {
        let seen = self.seen_bytes as usize;
        if let Some(room) = self.prefix.get_mut(seen..) {
            let kept = room.len().min(bytes.len());
            room[..kept].copy_from_slice(&bytes[..kept]);
        }
        let body = bytes.get(RECORD_HEADER_BYTES.saturating_sub(seen)..).unwrap_or_default();
        self.crc = crc32c::crc32c_append(self.crc, body);
        self.seen_bytes += bytes.len() as u32;
    }
}

/// The time in a commit or abort record, the first field of its main data.
///
/// Such records refer to no blocks: behind the header come an optional origin and an optional top-level transaction, then the main data with
/// its length (`XLogRecordAssemble` in `xloginsert.c`), so the time ends within the first 45 bytes.
fn commit_time(record: &[u8]) -> Option<PgTimestamp> {
    const ORIGIN: u8 = 253;
    const TOP_LEVEL_TRANSACTION: u8 = 252;
    const SHORT_DATA: u8 = 255;
    const LONG_DATA: u8 = 254;
    let mut at = RECORD_HEADER_BYTES;
    if *record.get(at)? == ORIGIN {
        at += 3;
    }
    if *record.get(at)? == TOP_LEVEL_TRANSACTION {
        at += 5;
    }
    at += match *record.get(at)? {
        SHORT_DATA => 2,
        LONG_DATA => 5,
        _ => return None,
    };
    record.get(at..at + 8).map(|field| PgTimestamp::from_micros(i64_at(field, 0)))
}

/// Whether the segment begins with the last bytes of a switch record that did not fit into the one before, which makes all of it padding.
///
/// A switch record is a bare header of 24 bytes, so 8 or 16 of them can be left over; its checksum cannot be verified from here.
fn is_switch_tail(page: &[u8], header: &PageHeader, start: u64) -> bool {
    let missing = match (header.info & CONTINUES != 0, header.remaining_bytes) {
        (true, 8) => 16,
        (true, 16) => 8,
        _ => return false,
    };
    let mut record = [0; RECORD_HEADER_BYTES];
    record[missing..].copy_from_slice(&page[LONG_HEADER_BYTES..LONG_HEADER_BYTES + RECORD_HEADER_BYTES - missing]);
    let behind = &page[LONG_HEADER_BYTES + RECORD_HEADER_BYTES - missing..];
    record[17] == WAL_MANAGER
        && record[16] & 0xF0 == SWITCH
        && u64_at(&record, 8) < start
        && ZERO_PAGE.get(..behind.len()) == Some(behind)
}

/// Whether the checksum of a whole record is right.
///
/// Most records are small, and for them the cost is in the odd bytes at the ends of two pieces. So a small one is copied, body first, to end
/// on a multiple of eight bytes, with zeros in front. Those are free: a CRC that starts from zero stays zero over zeros, and to start from
/// zero is to invert the first four bytes. Measured: 40 % more records per second than two pieces in place.
#[inline(always)]
fn intact(scratch: &mut Scratch, record: &[u8]) -> bool {
    let (header, body) = record.split_at(RECORD_HEADER_BYTES);
    if record.len() > SMALL_BYTES {
        return header_closes(crc32c::crc32c(body), header);
    }
    let lead = record.len().wrapping_neg() % 8;
    let bytes = &mut scratch.0;
    bytes[..8].fill(0);
    bytes[lead..lead + body.len()].copy_from_slice(body);
    bytes[lead + body.len()..lead + record.len()].copy_from_slice(header);
    for byte in &mut bytes[lead..lead + 4] {
        *byte = !*byte;
    }
    crc32c::crc32c_append(u32::MAX, &bytes[..lead + record.len()]) == RESIDUE
}

/// Whether the checksum in a record's header is that of the record, given the CRC of what is behind the header.
///
/// The field is the last of the header, so the CRC over all of the header comes to a constant: three steps of eight bytes, and none of one.
#[inline(always)]
fn header_closes(crc: u32, record: &[u8]) -> bool {
    crc32c::crc32c_append(crc, &record[..RECORD_HEADER_BYTES]) == RESIDUE
}

/// The next multiple of eight (`MAXALIGN`).
#[inline(always)]
fn aligned(bytes: u64) -> u64 {
    (bytes + 7) & !7
}
