//! Segments of live servers, and segments built to order for what is too rare to catch.

use super::*;
use crate::samples::{scan, wal};

const MIB: usize = 1 << 20;

/// Every sample is scanned in several chunk sizes, which must not change the answer.
#[track_caller]
fn report(sample: &str) -> SegmentReport {
    let (expected, bytes) = wal(sample);
    let whole = scan(expected, &bytes, MIB).unwrap();
    for chunk_bytes in [PAGE_BYTES, 3 * PAGE_BYTES, 16 * PAGE_BYTES] {
        assert_eq!(scan(expected, &bytes, chunk_bytes).unwrap(), whole);
    }
    whole
}

#[test]
fn live_full() {
    let report = report("15-full");
    let (expected, _) = wal("15-full");
    assert_eq!((report.end, report.postgres_major, report.damage), (SegmentEnd::Full, Some(15), None));
    assert_eq!(report.logical_end, expected.name.number(expected.size).unwrap().end(expected.size));
    assert_eq!(report.first_page_timeline, Timeline::FIRST);
}

#[test]
fn live_switch() {
    for major in [14, 15, 16, 17, 18] {
        let report = report(&format!("{major}-switch"));
        assert_eq!((report.end, report.postgres_major, report.damage), (SegmentEnd::Switch, Some(major), None));
        assert!((40..PAGE_BYTES as u64).contains(&SegmentSize::MIN.offset_of(report.logical_end)));
        let commit = report.last_commit_time.unwrap().unix_micros();
        assert!((1_700_000_000_000_000..2_500_000_000_000_000).contains(&commit), "{commit}");
    }
}

#[test]
fn live_incomplete() {
    for major in [15, 18] {
        let report = report(&format!("{major}-incomplete"));
        assert_eq!((report.end, report.damage), (SegmentEnd::Incomplete, None));
        let offset = SegmentSize::MIN.offset_of(report.logical_end);
        assert!((20_000..100_000).contains(&offset), "{offset}");
        assert!(report.first_commit_time.unwrap() <= report.last_commit_time.unwrap());
    }
}

#[test]
fn live_recycled() {
    let (expected, bytes) = wal("15-recycled");
    let error = scan(expected, &bytes, MIB).unwrap_err();
    assert!(matches!(error, SegmentError::Recycled { found: Some(_), .. }), "{error}");
}

#[test]
fn live_promotion() {
    let partial = report("15-00000001");
    assert_eq!((partial.end, partial.damage), (SegmentEnd::Incomplete, None));
    let first = report("15-first");
    let (expected, _) = wal("15-first");
    assert_eq!(expected.name.timeline().get(), 2);
    assert_eq!(
        first.first_page_timeline,
        Timeline::FIRST,
        "the first segment of a timeline begins with the parent's pages"
    );
    assert!(first.end.is_complete());
    let history = crate::timeline_history::TimelineHistory::parse(
        Timeline::new(2).unwrap(),
        &crate::samples::named("15-00000002.history"),
    );
    assert_eq!(
        history.unwrap().end_of(Timeline::FIRST),
        Some(partial.logical_end),
        "the parent's tail is valid up to the fork"
    );
}

#[test]
fn every_flipped_bit_is_seen() {
    // Within the records of a full segment no bit can change unseen; sampled, because each is a scan.
    let (expected, bytes) = wal("15-full");
    for at in (0..MIB).step_by(7919) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        match scan(expected, &changed, MIB) {
            Ok(report) if report.end == SegmentEnd::Incomplete => {
                assert!(report.logical_end.as_u64() % (1 << 20) <= at as u64)
            }
            Ok(report) => assert!(unchecked(&bytes, at), "a change at {at} went unseen: {report:?}"),
            Err(_) => assert!(at < 40, "a change at {at} is not of the first header"),
        }
    }
}

/// Padding is not covered by any checksum, nor is the tail of a record from or into another segment.
fn unchecked(bytes: &[u8], at: usize) -> bool {
    let in_header_padding = (20..24).contains(&(at % PAGE_BYTES));
    in_header_padding || bytes[at] == 0 || !(PAGE_BYTES..=MIB - PAGE_BYTES).contains(&at)
}

#[test]
fn damage_in_the_middle_is_told_from_an_end() {
    let (expected, mut bytes) = wal("15-full");
    bytes[40 * PAGE_BYTES + 4000] ^= 1;
    let report = scan(expected, &bytes, MIB).unwrap();
    assert_eq!(report.end, SegmentEnd::Incomplete);
    let at = report.damage.unwrap().at;
    assert!(report.logical_end <= at && (39..=40).contains(&(at.as_u64() % (1 << 20) / 8192)), "{report:?}");
    assert_eq!(scan(Expected { partial: true, ..expected }, &bytes, MIB).unwrap().damage, None);
}

#[test]
fn wrong_files_are_refused() {
    let (expected, bytes) = wal("15-switch");
    let refused = |expected, bytes: &[u8]| scan(expected, bytes, MIB).unwrap_err();
    let with = |at: usize, field: &[u8]| {
        let mut changed = bytes.clone();
        changed[at..at + field.len()].copy_from_slice(field);
        refused(expected, &changed)
    };
    let foreign = Expected { system_identifier: SystemIdentifier::new(7), ..expected };
    assert!(matches!(refused(foreign, &bytes), SegmentError::ForeignSystem { .. }));
    let other_size = Expected { size: SegmentSize::from_bytes(2 << 20).unwrap(), ..expected };
    assert!(matches!(refused(other_size, &bytes), SegmentError::Geometry { what: "segments", .. }));
    assert!(matches!(with(36, &[0, 0x40]), SegmentError::Geometry { what: "pages", .. }));
    assert!(matches!(refused(expected, &vec![0; MIB]), SegmentError::Recycled { found: None, .. }));
    assert!(matches!(refused(expected, &bytes[..MIB - PAGE_BYTES]), SegmentError::Size { .. }));
    assert!(matches!(refused(expected, &[&bytes[..], &bytes[..]].concat()), SegmentError::Size { .. }));
    assert!(matches!(refused(expected, &[]), SegmentError::Size { found_bytes: 0, .. }));
    assert!(matches!(refused(expected, &bytes[..100]), SegmentError::Chunk { bytes: 100, .. }));
    assert!(matches!(with(0, b"PK"), SegmentError::NotWal { .. }));
    assert!(matches!(with(0, &[0x06, 0xD1]), SegmentError::Version { magic: 0xD106, .. }));
    assert!(matches!(with(2, &[0x04]), SegmentError::Header { .. }));
    assert!(matches!(with(2, &[0x16]), SegmentError::Header { .. }));
    assert!(matches!(with(4, &[2]), SegmentError::Timeline { found: 2, .. }));
    assert!(matches!(with(4, &[0]), SegmentError::Timeline { found: 0, .. }));
    let beyond = Expected { name: "000000010000000000001000".parse().unwrap(), ..expected };
    assert!(matches!(refused(beyond, &bytes), SegmentError::Name(_)));
}

#[test]
fn an_error_is_final() {
    let (expected, bytes) = wal("15-switch");
    let mut scan = SegmentScan::new(Expected { system_identifier: SystemIdentifier::new(7), ..expected });
    let error = scan.push(&bytes[..PAGE_BYTES]).unwrap_err();
    assert_eq!(scan.push(&bytes[PAGE_BYTES..]).unwrap_err(), error);
    assert_eq!(scan.finish().unwrap_err(), error);
}

#[test]
fn a_newer_version_is_accepted_unread() {
    let (expected, mut bytes) = wal("15-switch");
    for magic in [0xD119u16, 0xD121, 0xD1FF] {
        bytes[..2].copy_from_slice(&magic.to_le_bytes());
        let report = scan(expected, &bytes, 4 * PAGE_BYTES).unwrap();
        assert_eq!((report.postgres_major, report.end), (None, SegmentEnd::Full));
        assert!(matches!(
            scan(expected, &bytes[PAGE_BYTES..], MIB).unwrap_err(),
            SegmentError::Recycled { .. } | SegmentError::Size { .. }
        ));
    }
}

/// Writes a segment record by record, as a server would.
struct Builder {
    expected: Expected,
    magic: u16,
    start: u64,
    previous: u64,
    bytes: Vec<u8>,
    /// Bytes that the next page header must announce.
    remaining: usize,
}

impl Builder {
    fn new(magic: u16) -> Self {
        let expected = Expected {
            name: "000000030000000000000005".parse().unwrap(),
            size: SegmentSize::MIN,
            system_identifier: SystemIdentifier::new(99),
            partial: false,
        };
        Self { expected, magic, start: 5 << 20, previous: 0, bytes: Vec::new(), remaining: 0 }
    }

    fn header(&mut self, given_up: u16) {
        let first = self.bytes.is_empty();
        let info = u16::from(self.remaining > 0) | if first { 2 } else { 0 } | given_up;
        let address = self.start + self.bytes.len() as u64;
        self.bytes.extend(self.magic.to_le_bytes());
        self.bytes.extend(info.to_le_bytes());
        self.bytes.extend(2u32.to_le_bytes());
        self.bytes.extend(address.to_le_bytes());
        self.bytes.extend((self.remaining as u32).to_le_bytes());
        self.bytes.extend([0; 4]);
        if first {
            self.bytes.extend(99u64.to_le_bytes());
            self.bytes.extend((MIB as u32).to_le_bytes());
            self.bytes.extend((PAGE_BYTES as u32).to_le_bytes());
        }
    }

    fn raw(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.bytes.len() < MIB {
            if self.bytes.len().is_multiple_of(PAGE_BYTES) {
                self.header(0);
            }
            let room = PAGE_BYTES - self.bytes.len() % PAGE_BYTES;
            let here = room.min(bytes.len());
            self.bytes.extend(&bytes[..here]);
            bytes = &bytes[here..];
            self.remaining = bytes.len();
        }
        self.remaining = 0;
        while !self.bytes.len().is_multiple_of(8) {
            self.bytes.push(0);
        }
    }

    fn record(&mut self, manager: u8, info: u8, body: &[u8]) -> u64 {
        if self.bytes.len().is_multiple_of(PAGE_BYTES) && self.bytes.len() < MIB {
            self.header(0);
        }
        let start = self.start + self.bytes.len() as u64;
        let record = record(self.previous, manager, info, body);
        self.previous = start;
        self.raw(&record);
        start
    }

    fn fill(&mut self, until: usize) {
        while self.bytes.len() < until {
            let body = (until - self.bytes.len()).saturating_sub(24).clamp(1, 1000);
            self.record(10, 0, &vec![7; body]);
        }
    }

    fn scan(&mut self) -> SegmentReport {
        self.bytes.resize(MIB, 0);
        let whole = scan(self.expected, &self.bytes, MIB).unwrap();
        assert_eq!(scan(self.expected, &self.bytes, PAGE_BYTES).unwrap(), whole);
        whole
    }
}

fn record(previous: u64, manager: u8, info: u8, body: &[u8]) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend((24 + body.len() as u32).to_le_bytes());
    header.extend(777u32.to_le_bytes());
    header.extend(previous.to_le_bytes());
    header.extend([info, manager, 0, 0]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(body), &header);
    [&header[..], &crc.to_le_bytes(), body].concat()
}

fn commit_body(lead: &[u8], micros: i64) -> Vec<u8> {
    [lead, &[255, 8], &micros.to_le_bytes()].concat()
}

#[test]
fn built_full_with_long_records() {
    let mut builder = Builder::new(0xD116);
    builder.record(10, 0, &[1; 100]);
    builder.record(10, 0, &[2; 100_000]);
    builder.record(10, 0, &[]);
    builder.record(10, 0, &[3; 2 * MIB]);
    let report = builder.scan();
    assert_eq!((report.end, report.logical_end), (SegmentEnd::Full, Lsn::new(6 << 20)));
    assert_eq!((report.first_page_timeline.get(), report.postgres_major), (2, Some(17)));
}

#[test]
fn built_within_one_huge_record() {
    // All of the segment is the inside of a record that began before it.
    let mut builder = Builder::new(0xD110);
    builder.remaining = 3 * MIB;
    builder.header(0);
    builder.raw(&vec![9; 3 * MIB - 8]);
    assert_eq!(builder.scan().end, SegmentEnd::Incomplete, "the announced lengths do not add up");
    let mut builder = Builder::new(0xD110);
    builder.remaining = 3 * MIB;
    builder.header(0);
    builder.raw(&vec![9; 3 * MIB]);
    assert_eq!(builder.scan().end, SegmentEnd::Full);
}

#[test]
fn built_headers_split_over_pages() {
    // A record header may be cut after 8 or 16 of its bytes by the end of a page.
    for cut in [8, 16] {
        let mut builder = Builder::new(0xD118);
        builder.fill(PAGE_BYTES - cut - 64);
        builder.record(10, 0, &[4; 40]);
        let at = builder.record(1, 0, &commit_body(&[], 1234));
        assert_eq!(PAGE_BYTES as u64 - at % PAGE_BYTES as u64, cut as u64);
        builder.record(10, 0, &[5; 40]);
        let end = builder.bytes.len() as u64;
        let report = builder.scan();
        assert_eq!((report.end, report.logical_end), (SegmentEnd::Incomplete, Lsn::new((5 << 20) + end)));
        assert_eq!(report.last_commit_time, Some(PgTimestamp::from_micros(1234)));
    }
}

#[test]
fn built_switch_at_the_end_of_a_page_and_of_the_segment() {
    for until in [PAGE_BYTES, 3 * PAGE_BYTES, MIB] {
        for cut in [24, 48, 8, 16] {
            if until == MIB && cut < 24 {
                continue;
            }
            let mut builder = Builder::new(0xD113);
            builder.fill(until - cut - 64);
            builder.record(10, 0, &[4; 40]);
            builder.record(0, 0x40, &[]);
            let end = builder.bytes.len() as u64;
            let report = builder.scan();
            assert_eq!(
                (report.end, report.logical_end),
                (SegmentEnd::Switch, Lsn::new((5 << 20) + end)),
                "{until} {cut}"
            );
        }
    }
}

#[test]
fn built_switch_that_began_in_the_segment_before() {
    for missing in [8, 16] {
        let mut builder = Builder::new(0xD110);
        let switch = record((5 << 20) - 500, 0, 0x40, &[]);
        builder.remaining = 24 - missing;
        builder.header(0);
        builder.bytes.extend(&switch[missing..]);
        let report = builder.scan();
        assert_eq!((report.end, report.logical_end.as_u64()), (SegmentEnd::Switch, (5 << 20) + 64 - missing as u64));
    }
}

#[test]
fn built_switch_with_something_behind_it() {
    let mut builder = Builder::new(0xD110);
    builder.record(0, 0x40, &[]);
    builder.bytes.resize(MIB, 0);
    builder.bytes[MIB - 1] = 1;
    let report = builder.scan();
    assert_eq!((report.end, report.logical_end), (SegmentEnd::Incomplete, Lsn::new((5 << 20) + 64)));
}

#[test]
fn built_record_given_up_in_crash_recovery() {
    for (magic, given_up) in [(0xD10D, 8), (0xD118, 8), (0xD120, 4)] {
        let mut builder = Builder::new(magic);
        builder.record(10, 0, &[1; 100]);
        let last = builder.previous;
        builder.record(10, 0, &[2; 20_000]);
        // The second page of that record was never written: recovery goes on there with another record.
        builder.bytes.truncate(2 * PAGE_BYTES);
        builder.remaining = 0;
        builder.header(given_up);
        builder.previous = last;
        builder.record(0, 0xD0, &[0; 16]);
        builder.fill(MIB);
        assert_eq!(builder.scan().end, SegmentEnd::Full, "{magic:X}");
        // Without the flag the same bytes are broken.
        builder.bytes[2 * PAGE_BYTES + 2] = 0;
        let report = builder.scan();
        assert_eq!(report.end, SegmentEnd::Incomplete);
        assert!(report.damage.is_some());
    }
}

#[test]
fn built_old_records_behind_the_end_are_not_taken() {
    // A recycled file: the bytes behind the new end are records with good checksums, but of the segment the file once was.
    let mut builder = Builder::new(0xD110);
    builder.record(10, 0, &[1; 100]);
    let end = builder.bytes.len() as u64;
    builder.previous = 12345;
    builder.record(10, 0, &[2; 100]);
    builder.record(10, 0, &[2; 100]);
    let report = builder.scan();
    assert_eq!(
        (report.end, report.logical_end, report.damage),
        (SegmentEnd::Incomplete, Lsn::new((5 << 20) + end), None)
    );
    // The same at the end of the page, where the old record goes on into the next.
    let mut builder = Builder::new(0xD110);
    builder.record(10, 0, &[1; 100]);
    builder.previous = 12345;
    builder.record(10, 0, &vec![2; 2 * MIB]);
    assert_eq!(builder.scan().logical_end, Lsn::new((5 << 20) + end));
}

#[test]
fn built_timelines_never_go_back() {
    let mut builder = Builder::new(0xD110);
    builder.fill(MIB);
    let timeline_of_page =
        |builder: &mut Builder, page: usize, timeline: u8| builder.bytes[page * PAGE_BYTES + 4] = timeline;
    for page in 10..128 {
        timeline_of_page(&mut builder, page, 3);
    }
    assert_eq!(builder.scan().end, SegmentEnd::Full);
    for (page, timeline) in [(20, 2), (20, 4), (20, 0)] {
        let before = builder.bytes.clone();
        timeline_of_page(&mut builder, page, timeline);
        assert_eq!(builder.scan().end, SegmentEnd::Incomplete, "page {page} on timeline {timeline}");
        builder.bytes = before;
    }
}

#[test]
fn built_commit_times() {
    let mut builder = Builder::new(0xD110);
    builder.record(1, 0x00, &commit_body(&[], 500));
    builder.record(1, 0x80 | 0x20, &commit_body(&[253, 1, 2], 900));
    builder.record(1, 0x30, &commit_body(&[252, 1, 2, 3, 4], 100));
    builder.record(1, 0x40, &[&[253, 1, 2, 252, 1, 2, 3, 4, 254, 8, 0, 0, 0][..], &700i64.to_le_bytes()].concat());
    builder.record(1, 0x10, &commit_body(&[], 1));
    builder.record(2, 0x00, &commit_body(&[], 9999));
    builder.record(1, 0x00, &[255, 3, 1, 2, 3]);
    builder.record(1, 0x00, &[]);
    let report = builder.scan();
    assert_eq!(report.first_commit_time, Some(PgTimestamp::from_micros(100)));
    assert_eq!(report.last_commit_time, Some(PgTimestamp::from_micros(900)));
}

#[test]
fn built_page_of_zeros_in_the_middle() {
    let mut builder = Builder::new(0xD110);
    builder.fill(MIB);
    builder.bytes[50 * PAGE_BYTES..51 * PAGE_BYTES].fill(0);
    let report = builder.scan();
    assert_eq!(report.end, SegmentEnd::Incomplete);
    assert!(report.damage.is_some(), "zeros are legal behind a switch only");
    builder.bytes[50 * PAGE_BYTES..].fill(0);
    assert_eq!(builder.scan().damage, None, "an end is no damage");
}
