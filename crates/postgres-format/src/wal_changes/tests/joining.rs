//! Segments put together: what they tell is what the whole stream tells, wherever it is cut.

use super::stream::{Plain, Reference, Stream, body, main_data};
use super::*;
use crate::wal_changes::collect::Collector;
use crate::wal_changes::record::{Rules, note};

/// Records of every kind, from empty to longer than two segments.
fn plains() -> impl Strategy<Value = Plain> {
    let fork = (1u32..4, 1u32..9, 0u8..4).prop_map(|(database, relation, fork)| RelationFork {
        fork: Fork::from_number(fork).unwrap(),
        ..main_fork(database, relation)
    });
    let bytes = prop_oneof![3 => Just(0u16), 2 => 1u16..300, 1 => 300u16..8100];
    let reference = (fork, 0u32..2000, bytes.clone(), bytes)
        .prop_map(|(fork, block, image_bytes, data_bytes)| Reference { fork, block, image_bytes, data_bytes });
    let main = prop_oneof![
        200 => 0usize..300,
        20 => 300usize..30_000,
        1 => 900_000usize..2_500_000,
    ];
    let ordinary =
        (proptest::collection::vec(reference, 0..6), main, 5u8..22).prop_map(|(references, main, manager)| Plain {
            manager,
            info: 0x20,
            body: body(&references, None, &vec![1; main]),
        });
    let words = |words: &[u32]| main_data(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
    let special = prop_oneof![
        (1u32..4, 1u32..9).prop_map(move |(database, relation)| Plain {
            manager: 2,
            info: 0x11,
            body: words(&[SPACE, database, relation, 0])
        }),
        (1u32..4, 1u32..9, 0u32..2000).prop_map(move |(database, relation, limit)| Plain {
            manager: 2,
            info: 0x21,
            body: words(&[limit, SPACE, database, relation, 7])
        }),
        (1u32..4).prop_map(move |database| Plain { manager: 4, info: 0x01, body: words(&[database, SPACE, 1, SPACE]) }),
    ];
    prop_oneof![40 => ordinary, 1 => special]
}

/// What the records say, each of them whole.
fn whole(postgres_major: u32, plains: &[Plain]) -> ChangeMap {
    let mut collector = Collector::new();
    for plain in plains {
        let record = plain.record(0);
        note(&mut collector, Rules::of(postgres_major), &record, record.len() as u32).unwrap();
    }
    collector.into_map()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn joined_segments_tell_what_the_stream_tells(
        plains in proptest::collection::vec(plains(), 1..400),
        fill in prop_oneof![Just(None), (1usize..40).prop_map(Some)],
        chunk_pages in prop_oneof![Just(1usize), 2usize..20, Just(128usize)],
    ) {
        let mut stream = Stream::new(15);
        // Begin close to the end of a segment, at each distance that a record can begin at.
        if let Some(eights) = fill {
            stream.fill_until(eights * 8);
        }
        for plain in &plains {
            stream.push(plain);
        }
        let segments = stream.changes(chunk_pages);
        let start = segments[0].start;
        let joined = join(start..Lsn::new(stream.position()), &segments);
        prop_assert_eq!(joined, Ok(whole(15, &plains)));
    }
}

fn reference(block: u32, bytes: usize) -> Plain {
    let reference = Reference { fork: main_fork(5, 100), block, image_bytes: 0, data_bytes: 0 };
    Plain { manager: 10, info: 0, body: body(&[reference], None, &vec![1; bytes]) }
}

fn blocks(map: &ChangeMap) -> Vec<u32> {
    map.fork(&main_fork(5, 100)).map(|changes| changes.blocks().iter().collect()).unwrap_or_default()
}

/// Four segments; from the second to the fourth goes one record.
fn long() -> Stream {
    let mut stream = Stream::new(16);
    stream.push(&reference(1, 0));
    stream.fill_until(200);
    stream.push(&reference(2, 1000));
    stream.fill_until(200);
    stream.push(&reference(3, 1_500_000));
    stream.push(&reference(4, 0));
    stream
}

#[test]
fn a_range_begins_and_ends_within_segments() {
    let stream = long();
    let segments = stream.changes(16);
    assert_eq!(segments.len(), 4);
    assert!(matches!(segments[2].tail, Tail::Through), "{:?}", segments[2].tail);
    let at = |segment: usize, offset: u64| Lsn::new(segments[segment].start.as_u64() + offset);
    let told = |range: std::ops::Range<Lsn>, from: usize, to: usize| join(range, &segments[from..to]);
    let end = Lsn::new(stream.position());
    assert_eq!(blocks(&told(at(0, 0)..end, 0, 4).unwrap()), [1, 2, 3, 4]);
    // The rest of a record that began before the range is not needed, however long.
    assert_eq!(blocks(&told(at(1, 1000)..end, 1, 4).unwrap()), [3, 4]);
    assert_eq!(blocks(&told(at(2, 0)..end, 2, 4).unwrap()), [4]);
    assert_eq!(blocks(&told(at(3, 0)..end, 3, 4).unwrap()), [4]);
    // A range that ends with the header of a segment needs nothing of that segment, unless a record goes on there.
    assert_eq!(blocks(&told(at(0, 0)..at(0, 5000), 0, 1).unwrap()), [1]);
    for end in [0, 40] {
        let doubt = told(at(0, 0)..at(1, end), 0, 1).unwrap_err();
        assert!(doubt.segment == at(1, 0) && doubt.reason.contains("the rest of the record"), "{doubt}");
    }
    let doubt = told(at(0, 0)..at(1, 48), 0, 1).unwrap_err();
    assert!(doubt.reason.contains("needed up to"), "{doubt}");
    let nothing = told(at(0, 64)..at(0, 64), 0, 0);
    assert_eq!(nothing, Ok(ChangeMap::empty()));
    assert!(told(at(0, 0)..end, 0, 0).is_err());
    // Nothing of it is told yet.
    assert!(told(at(0, 0)..Lsn::new(end.as_u64() + 1), 0, 4).unwrap_err().reason.contains("needed up to"));
}

#[test]
fn gaps_and_strangers_are_doubts() {
    let segments = long().changes(16);
    let range = segments[0].start..Lsn::new(segments[3].start.as_u64() + 100);
    let check = |segments: &[&SegmentChanges], segment: usize, reason: &str| {
        let doubt = join(range.clone(), segments.iter().copied()).unwrap_err();
        let start = Lsn::new(5 * MIB + segment as u64 * MIB);
        assert!(doubt.segment == start && doubt.reason.contains(reason), "{doubt}");
    };
    let [first, second, third, fourth] = &segments[..] else { panic!() };
    check(&[second, third, fourth], 1, "where the range starts");
    check(&[first, third, fourth], 1, "the next segment there is");
    check(&[first, second, fourth], 2, "the next segment there is");
    let edited = |segment: &SegmentChanges, edit: fn(&mut SegmentChanges)| {
        let mut edited = segment.clone();
        edit(&mut edited);
        edited
    };
    let other = edited(second, |segment| segment.postgres_major = 17);
    check(&[first, &other, third, fourth], 1, "of PostgreSQL 17");
    let fresh = edited(second, |segment| segment.lead = Lead::Fresh);
    check(&[first, &fresh, third, fourth], 1, "does not go on");
    let closed = edited(first, |segment| segment.tail = Tail::Closed);
    check(&[&closed, second, third, fourth], 1, "does not begin");
    let another = edited(second, |segment| segment.lead = Lead::Rest { remaining_bytes: 9, bytes: vec![0; 9] });
    check(&[first, &another, third, fourth], 1, "another record");
    let ended = edited(third, |segment| segment.tail = Tail::Closed);
    check(&[first, second, &ended, fourth], 2, "does not fit");
    let incomplete = edited(first, |segment| {
        segment.end = SegmentEnd::Incomplete;
        segment.tail = Tail::Closed;
    });
    check(&[&incomplete, second, third, fourth], 1, "the segment before it ends at");
    let doubtful = edited(third, |segment| segment.doubt = Some("a reason".into()));
    check(&[first, second, &doubtful, fourth], 2, "a reason");
    let beheaded = edited(second, |segment| {
        if let Tail::Open { head, .. } = &mut segment.tail {
            head.truncate(30);
        }
    });
    check(&[first, &beheaded, third, fourth], 3, "too little");
}

#[test]
fn a_record_given_up_is_no_part() {
    // The open record's pages are there up to the end of its segment, or go on into the next, or are given up within the first.
    for (before_end, pages) in [(40, 128), (200, 128), (40, 129), (200, 130), (20_000, 127)] {
        let mut stream = Stream::new(15);
        stream.push(&reference(1, 0));
        // Not filled to the byte, since the last record must be known.
        let mut last = stream.push(&reference(1, 0));
        while stream.position() + before_end + 1200 < 6 * MIB {
            last = stream.push(&reference(1, 1000));
        }
        stream.push(&reference(2, 60_000));
        stream.give_up(last, pages);
        stream.push(&Plain { manager: 0, info: 0xD0, body: main_data(&[0; 16]) });
        stream.push(&reference(3, 0));
        stream.fill_until(8);
        let segments = stream.changes(16);
        if pages >= 128 {
            assert_eq!(segments[1].lead, Lead::GivenUp);
            assert!(matches!(segments[0].tail, Tail::Open { .. }));
        }
        assert_eq!(segments.last().unwrap().tail, Tail::Closed);
        assert_eq!(blocks(&stream.map().unwrap()), [1, 3], "{before_end} {pages}");
    }
}

#[test]
fn switched_segments() {
    for before_end in [0, 8, 16, 24, 5000] {
        let mut stream = Stream::new(17);
        stream.push(&reference(1, 0));
        if before_end > 0 {
            stream.fill_until(before_end);
        }
        stream.push(&Plain { manager: 0, info: 0x40, body: Vec::new() });
        stream.close_segment();
        stream.push(&reference(2, 0));
        let segments = stream.changes(16);
        let segment_of_switch = segments.len() - 2;
        assert_eq!(segments[segment_of_switch].end, SegmentEnd::Switch, "{before_end}");
        assert_eq!(blocks(&stream.map().unwrap()), [1, 2], "{before_end}");
    }
}

#[test]
fn a_newer_version_is_a_doubt() {
    let (expected, mut bytes) = crate::samples::wal("15-switch");
    bytes[..2].copy_from_slice(&0xD1FFu16.to_le_bytes());
    let mut scan = ChangeScan::new(expected);
    scan.push(&bytes).unwrap();
    let (report, changes) = scan.finish().unwrap();
    assert_eq!((report.postgres_major, changes.postgres_major), (None, 0));
    assert!(changes.doubt.as_deref().unwrap().contains("newer"));
    assert_eq!(SegmentChanges::decode(&changes.encode()), Ok(changes));
}
