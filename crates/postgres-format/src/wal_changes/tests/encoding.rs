//! The encoding: one for each value, read back, refused when damaged.

use super::*;

fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = crc32c::crc32c(&bytes);
    bytes.extend(checksum.to_le_bytes());
    bytes
}

fn map_bytes(content: &[u8]) -> Vec<u8> {
    sealed([b"PGCVMAP1", content].concat())
}

proptest! {
    #[test]
    fn a_map_is_read_back(map in maps()) {
        let bytes = map.encode();
        let read = ChangeMap::decode(&bytes);
        prop_assert_eq!(read.as_ref(), Ok(&map));
        prop_assert_eq!(read.unwrap().encode(), bytes);
    }

    #[test]
    fn whatever_is_accepted_has_one_encoding(map in maps(), at in 0usize..10_000, byte: u8, cut in 0usize..4) {
        let bytes = map.encode();
        let mut content = bytes[..bytes.len() - 4].to_vec();
        let at = 8 + at % (content.len() - 7);
        content.truncate(content.len() - cut.min(content.len() - 8));
        if let Some(place) = content.get_mut(at) {
            *place = byte;
        }
        let bytes = sealed(content);
        if let Ok(map) = ChangeMap::decode(&bytes) {
            prop_assert_eq!(map.encode(), bytes);
        }
    }
}

#[test]
fn by_hand() {
    let mut map = ChangeMap::empty();
    assert_eq!(map.encode(), map_bytes(&[0, 0]));
    map.reset(DatabaseDirectory { tablespace: 1, database: 300 });
    map.cut(main_fork(5, 130), 9);
    map.mark(main_fork(5, 130), 0);
    map.mark(main_fork(5, 131), 3);
    map.mark(main_fork(5, 131), 4);
    map.mark(main_fork(5, 131), 6);
    map.mark(RelationFork { fork: Fork::Init, ..main_fork(5, 131) }, 1000);
    let by_hand = [
        &[1, 1, 0xAC, 2][..],
        &[1, 0xFF, 0x0C, 5, 3],
        &[0x82, 1, 4, 9, 1, 0],
        &[1, 0, 2, 7, 0, 0],
        &[0, 3, 1, 0xD0, 0x0F],
    ];
    assert_eq!(map.encode(), map_bytes(&by_hand.concat()));
}

#[test]
fn runs_go_on_over_stretches() {
    let mut map = ChangeMap::empty();
    for block in 65_000..200_000 {
        map.mark(main_fork(5, 1), block);
    }
    let bytes = map.encode();
    assert!(bytes.len() < 32, "one run is a few bytes, not {}", bytes.len());
    assert_eq!(ChangeMap::decode(&bytes), Ok(map));
}

#[test]
fn damage_is_refused() {
    #[track_caller]
    fn check(content: &[u8], reason: &str) {
        let error = ChangeMap::decode(&map_bytes(content)).unwrap_err();
        assert!(matches!(error, DecodeError::Invalid { .. }) && error.to_string().contains(reason), "{error}");
    }
    check(&[], "too early");
    check(&[0, 0, 0], "follows");
    check(&[0x80, 0, 0], "leading zero");
    check(&[0xFF; 12], "64 bits");
    check(&[1, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 1, 0], "32 bits");
    check(&[2, 1, 1, 1, 1, 0], "out of order");
    check(&[0, 1, 1, 1, 0], "says nothing");
    check(&[1, 1, 1, 1, 1, 1, 1, 5, 4, 0, 0], "is reset");
    check(&[0, 1, 1, 1, 1, 5, 0, 0], "says nothing");
    check(&[0, 1, 1, 1, 1, 5, 1, 1, 0], "unknown fork");
    check(&[0, 1, 1, 1, 1, 5, 8, 1, 0], "unknown fork");
    check(&[0, 1, 1, 1, 2, 5, 0, 1, 0, 0, 0, 1, 0], "out of order");
    check(&[0, 1, 1, 1, 1, 5, 4, 3, 1, 6], "behind the limit");
    check(&[0, 1, 1, 1, 1, 5, 0, 1, 1, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F], "32 bits");
    check(&[0, 1, 1, 1, 1, 5, 0, 1, 1, 0xFE, 0xFF, 0xFF, 0xFF, 0x0F], "behind the limit");
    // Two gigablocks in eleven bytes.
    check(&[0, 1, 1, 1, 1, 5, 0, 1, 1, 0xFD, 0xFF, 0xFF, 0xFF, 0x07], "too many blocks");
    check(&[0xFF, 0xFF, 0xFF, 0xFF, 0x0F], "too early");
    assert_eq!(ChangeMap::decode(b""), Err(DecodeError::NotChanges));
    assert_eq!(ChangeMap::decode(b"PGCVMAP1"), Err(DecodeError::Checksum));
    assert_eq!(ChangeMap::decode(b"PGCVMAP2\0\0\0\0\0\0"), Err(DecodeError::NotChanges));
    assert_eq!(SegmentChanges::decode(&map_bytes(&[0, 0])), Err(DecodeError::NotChanges));
    let mut bytes = map_bytes(&[0, 0]);
    bytes[9] ^= 1;
    assert_eq!(ChangeMap::decode(&bytes), Err(DecodeError::Checksum));
    let long = vec![0; ENCODED_BYTES_MAX + 1];
    assert_eq!(ChangeMap::decode(&long), Err(DecodeError::TooLong { bytes: long.len() }));
}

#[test]
fn a_segment_lists_no_more_than_its_size_can_tell() {
    let changes = |last: u32| {
        let mut map = ChangeMap::empty();
        let mut blocks = roaring::RoaringBitmap::new();
        blocks.insert_range(0..=last);
        map.mark_all(main_fork(5, 1), &blocks);
        SegmentChanges {
            start: Lsn::new(3 * MIB),
            size: SegmentSize::MIN,
            end: SegmentEnd::Incomplete,
            logical_end: Lsn::new(3 * MIB + 5000),
            postgres_major: 15,
            map,
            lead: Lead::Rest { remaining_bytes: 5, bytes: vec![1; 5] },
            tail: Tail::Closed,
            doubt: None,
        }
    };
    let most = MIB as u32 / 8;
    assert_eq!(SegmentChanges::decode(&changes(most - 1).encode()), Ok(changes(most - 1)));
    assert!(SegmentChanges::decode(&changes(most).encode()).is_err());
    let with = |edit: fn(&mut SegmentChanges)| {
        let mut changed = changes(10);
        edit(&mut changed);
        SegmentChanges::decode(&changed.encode())
    };
    assert!(with(|_| ()).is_ok());
    assert!(with(|changes| changes.start = Lsn::new(3 * MIB + 8192)).is_err());
    assert!(with(|changes| changes.logical_end = Lsn::new(5 * MIB)).is_err());
    assert!(with(|changes| changes.end = SegmentEnd::Full).is_err());
    assert!(with(|changes| changes.tail = Tail::Through).is_err());
    assert!(with(|changes| changes.doubt = Some("a reason".into())).is_err());
    assert!(with(|changes| changes.lead = Lead::Rest { remaining_bytes: 3, bytes: vec![1; 5] }).is_err());
    assert!(with(|changes| changes.lead = Lead::Rest { remaining_bytes: 3000, bytes: vec![1; 1025] }).is_err());
}
