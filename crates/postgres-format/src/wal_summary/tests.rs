//! Summaries built to order, and those of live servers.

use super::*;
use crate::timeline_history::TimelineHistory;

/// Builds summaries as `WriteBlockRefTable` does.
struct Builder(Vec<u8>);

enum Chunk<'a> {
    Offsets(&'a [u16]),
    Bitmap(Box<[u8; BITMAP_BYTES]>),
}

impl Builder {
    fn new() -> Self {
        Self(MAGIC.to_le_bytes().to_vec())
    }

    fn entry(mut self, key: [u32; 4], limit: u32, chunks: &[Chunk<'_>]) -> Self {
        for word in key.into_iter().chain([limit, chunks.len() as u32]) {
            self.0.extend(word.to_le_bytes());
        }
        for chunk in chunks {
            let usage = match chunk {
                Chunk::Offsets(offsets) => offsets.len() as u16,
                Chunk::Bitmap(_) => BITMAP_USAGE,
            };
            self.0.extend(usage.to_le_bytes());
        }
        for chunk in chunks {
            match chunk {
                Chunk::Offsets(offsets) => self.0.extend(offsets.iter().flat_map(|offset| offset.to_le_bytes())),
                Chunk::Bitmap(bitmap) => self.0.extend(bitmap.iter()),
            }
        }
        self
    }

    fn sealed(mut self) -> Vec<u8> {
        self.0.extend([0; ENTRY_BYTES]);
        self.checked()
    }

    fn checked(mut self) -> Vec<u8> {
        let checksum = crc32c::crc32c(&self.0);
        self.0.extend(checksum.to_le_bytes());
        self.0
    }
}

const fn fork(relation: u32, fork: Fork) -> RelationFork {
    RelationFork { tablespace: 1663, database: 5, relation, fork }
}

#[test]
fn every_part() {
    let mut bitmap = Box::new([0; BITMAP_BYTES]);
    bitmap[0] = 0b101;
    bitmap[BITMAP_BYTES - 1] = 0x80;
    let bytes = Builder::new()
        .entry([1663, 4, 0, 0], 0, &[])
        .entry(
            [1663, 5, 100, 0],
            NO_LIMIT,
            &[Chunk::Offsets(&[7, 3, 65535]), Chunk::Offsets(&[]), Chunk::Bitmap(bitmap)],
        )
        .entry([1663, 5, 100, 2], 1, &[Chunk::Offsets(&[0])])
        .entry([1663, 5, 101, 0], 50, &[Chunk::Offsets(&[10, 60])])
        .entry([1663, 5, 102, 3], 0, &[])
        .sealed();
    let map = parse(&bytes).unwrap();
    assert_eq!(map.resets().collect::<Vec<_>>(), [&fork_directory(4)]);
    assert_eq!(
        map.forks().map(|(fork, _)| *fork).collect::<Vec<_>>(),
        [fork(100, Fork::Main), fork(101, Fork::Main), fork(102, Fork::Init)]
    );
    let blocks = |relation| map.fork(&fork(relation, Fork::Main)).unwrap().blocks().iter().collect::<Vec<_>>();
    assert_eq!(blocks(100), [3, 7, 65535, 131_072, 131_074, 196_607]);
    assert_eq!(blocks(101), [10]);
    let limit = |fork| map.fork(&fork).unwrap().limit_block();
    assert_eq!((limit(fork(100, Fork::Main)), limit(fork(101, Fork::Main))), (None, Some(50)));
    assert_eq!(limit(fork(102, Fork::Init)), Some(0));
    assert_eq!(parse(&Builder::new().sealed()), Ok(ChangeMap::empty()));
}

const fn fork_directory(database: u32) -> crate::relation::DatabaseDirectory {
    crate::relation::DatabaseDirectory { tablespace: 1663, database }
}

#[test]
fn damage_is_refused() {
    #[track_caller]
    fn check(builder: Builder, reason: &str) {
        let error = parse(&builder.sealed()).unwrap_err();
        assert!(matches!(error, SummaryError::Invalid { .. }) && error.to_string().contains(reason), "{error}");
    }
    let one = || Builder::new().entry([1663, 5, 100, 0], NO_LIMIT, &[Chunk::Offsets(&[7])]);
    check(one().entry([1663, 5, 100, 0], 1, &[]), "out of order");
    check(one().entry([1663, 5, 99, 0], 1, &[]), "out of order");
    check(Builder::new().entry([1663, 5, 100, 4], 1, &[]), "unknown fork");
    check(Builder::new().entry([1663, 5, 100, u32::MAX], 1, &[]), "unknown fork");
    let with = |at: usize, value: &[u8]| {
        let mut builder = one();
        builder.0[at..at + value.len()].copy_from_slice(value);
        builder
    };
    check(with(24, &[1, 0, 1, 0]), "more chunks");
    check(with(24, &[0xFF, 0xFF, 0, 0]), "too early");
    check(with(28, &[1, 0x10]), "impossible size");
    check(with(28, &[200, 0]), "too early");
    assert!(matches!(parse(&one().checked()), Err(SummaryError::Invalid { .. })), "no end");
    let mut followed = one();
    followed.0.extend([0; ENTRY_BYTES + 1]);
    assert!(matches!(
        parse(&followed.checked()),
        Err(SummaryError::Invalid { reason: "something follows the end", .. })
    ));
    let mut bytes = one().sealed();
    assert_eq!(parse(&bytes[..bytes.len() - 1]), Err(SummaryError::Checksum));
    bytes[9] ^= 1;
    assert_eq!(parse(&bytes), Err(SummaryError::Checksum));
    assert_eq!(parse(&[]), Err(SummaryError::NotSummary));
    assert_eq!(parse(&[0; 100]), Err(SummaryError::NotSummary));
    let long = vec![0; SUMMARY_BYTES_MAX + 1];
    assert_eq!(parse(&long), Err(SummaryError::TooLong { bytes: long.len() }));
}

#[test]
fn the_last_chunk_of_a_relation() {
    let mut chunks: Vec<Chunk<'_>> = (0..CHUNKS_MAX - 1).map(|_| Chunk::Offsets(&[])).collect();
    let mut bitmap = Box::new([0; BITMAP_BYTES]);
    bitmap[0] = 1;
    chunks.push(Chunk::Bitmap(bitmap));
    let map = parse(&Builder::new().entry([1663, 5, 100, 0], NO_LIMIT, &chunks).sealed()).unwrap();
    assert!(map.touches(&fork(100, Fork::Main), 0xFFFF_0000) && map.block_count() == 1);
    chunks.pop();
    chunks.push(Chunk::Offsets(&[u16::MAX]));
    let error = parse(&Builder::new().entry([1663, 5, 100, 0], NO_LIMIT, &chunks).sealed()).unwrap_err();
    assert!(error.to_string().contains("impossible block"), "{error}");
}

#[test]
fn names() {
    let name: SummaryName = "00000001000000000A0000280000000010ABCDEF.summary".parse().unwrap();
    assert_eq!((name.timeline, name.start, name.end), (Timeline::FIRST, Lsn::new(0x0A00_0028), Lsn::new(0x10AB_CDEF)));
    assert_eq!(name.to_string(), "00000001000000000A0000280000000010ABCDEF.summary");
    for wrong in [
        "",
        "temp.summary",
        "00000001000000000A0000280000000010ABCDEF",
        "00000001000000000a0000280000000010ABCDEF.summary",
        "00000000000000000A0000280000000010ABCDEF.summary",
        "000000010000000010ABCDEF000000000A000028.summary",
        "00000001000000000A0000280000000010ABCDEF0.summary",
        "+0000001000000000A0000280000000010ABCDEF.summary",
        "0000000100000000\u{e9}0000280000000010ABCDEF.summary",
    ] {
        assert_eq!(wrong.parse::<SummaryName>(), Err(SummaryError::Name), "{wrong}");
    }
}

#[test]
fn a_range_is_covered_without_a_gap_or_not() {
    let history = TimelineHistory::parse(Timeline::new(3).unwrap(), b"1\t0/30\tx\n2\t0/50\tx\n").unwrap();
    let name = |(timeline, start, end): (u32, u64, u64)| SummaryName {
        timeline: Timeline::new(timeline).unwrap(),
        start: Lsn::new(start),
        end: Lsn::new(end),
    };
    let covered = |known: &[(u32, u64, u64)], start: u64, end: u64| {
        let known: Vec<SummaryName> = known.iter().copied().map(name).collect();
        cover(&history, &(Lsn::new(start)..Lsn::new(end)), &known)
    };
    #[track_caller]
    fn check(found: Result<Vec<SummaryName>, Uncovered>, expected: &[(u64, u64)]) {
        let found: Vec<(u64, u64)> =
            found.unwrap().iter().map(|name| (name.start.as_u64(), name.end.as_u64())).collect();
        assert_eq!(found, expected);
    }
    #[track_caller]
    fn gap(found: Result<Vec<SummaryName>, Uncovered>, timeline: u32, from: u64, outlook: Outlook) {
        let timeline = Timeline::new(timeline).unwrap();
        assert_eq!(found, Err(Uncovered { from: Lsn::new(from), timeline, outlook }));
    }
    let whole = [(1, 0x8, 0x20), (1, 0x20, 0x38), (2, 0x30, 0x50), (3, 0x50, 0x60), (3, 0x60, 0x80)];
    check(covered(&whole, 0x10, 0x70), &[(0x8, 0x20), (0x20, 0x38), (0x30, 0x50), (0x50, 0x60), (0x60, 0x80)]);
    check(covered(&whole, 0x20, 0x28), &[(0x20, 0x38)]);
    check(covered(&whole, 0x60, 0x60), &[]);
    check(covered(&whole, 0x55, 0x80), &[(0x50, 0x60), (0x60, 0x80)]);
    // Longer ones spare shorter ones; what overlaps is no gap.
    check(covered(&[(3, 0x50, 0x60), (3, 0x50, 0x70), (3, 0x58, 0x80)], 0x50, 0x78), &[(0x50, 0x70), (0x58, 0x80)]);
    gap(covered(&whole, 0x70, 0x90), 3, 0x80, Outlook::Awaited);
    gap(covered(&[], 0x10, 0x70), 1, 0x10, Outlook::Awaited);
    gap(covered(&whole, 0x4, 0x70), 1, 0x4, Outlook::Missed);
    gap(covered(&whole[1..], 0x10, 0x28), 1, 0x10, Outlook::Missed);
    for missing in 1..whole.len() - 1 {
        let mut others = whole.to_vec();
        let (timeline, start, _) = others.remove(missing);
        gap(covered(&others, 0x10, 0x70), timeline, start, Outlook::Missed);
    }
    // What a timeline holds behind its end, and what a strange one holds, counts for nothing.
    gap(covered(&[(1, 0x8, 0x60), (4, 0x30, 0x80)], 0x10, 0x70), 2, 0x30, Outlook::Awaited);
    gap(covered(&[(1, 0x8, 0x60), (2, 0x38, 0x50)], 0x10, 0x70), 2, 0x30, Outlook::Missed);
}
