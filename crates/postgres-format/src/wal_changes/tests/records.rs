//! One record of each kind, alone in its stream.

use super::stream::{Plain, Reference, Stream, body, main_data};
use super::*;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[track_caller]
fn map_of(postgres_major: u32, manager: u8, info: u8, body: &[u8]) -> ChangeMap {
    told(postgres_major, manager, info, body).unwrap()
}

#[track_caller]
fn told(postgres_major: u32, manager: u8, info: u8, body: &[u8]) -> Result<ChangeMap, Doubt> {
    let plain = Plain { manager, info, body: body.to_vec() };
    let mut stream = Stream::new(postgres_major);
    stream.push(&plain);
    let alone = stream.map();
    // The same where the record is cut by a page and where it is cut by a segment.
    for before_end in [8, 16, 24, 40, 64] {
        let mut stream = Stream::new(postgres_major);
        stream.fill_until(before_end);
        stream.push(&plain);
        let crossing = stream.map();
        assert_eq!(crossing.as_ref().ok(), alone.as_ref().ok(), "cut {before_end} bytes before the end of a segment");
    }
    alone
}

#[track_caller]
fn check_doubt(postgres_major: u32, manager: u8, info: u8, body: &[u8], reason: &str) {
    let doubt = told(postgres_major, manager, info, body).unwrap_err();
    assert!(doubt.reason.contains(reason), "{doubt}");
}

fn cut(forks: &[(RelationFork, u32)]) -> ChangeMap {
    let mut map = ChangeMap::empty();
    forks.iter().for_each(|(fork, limit)| map.cut(*fork, *limit));
    map
}

fn reset(directories: &[(u32, u32)]) -> ChangeMap {
    let mut map = ChangeMap::empty();
    directories.iter().for_each(|&(tablespace, database)| map.reset(DatabaseDirectory { tablespace, database }));
    map
}

#[test]
fn references() {
    let reference = |relation, fork, block, image_bytes, data_bytes| Reference {
        fork: RelationFork { fork, ..main_fork(5, relation) },
        block,
        image_bytes,
        data_bytes,
    };
    let references = [
        reference(100, Fork::Main, 7, 0, 20),
        reference(100, Fork::Main, 8, 800, 0),
        reference(100, Fork::VisibilityMap, 1, 0, 0),
        reference(101, Fork::FreeSpaceMap, 2, 90, 0),
        reference(102, Fork::Init, 3, 700, 12),
        reference(102, Fork::Main, u32::MAX - 1, 0, 0),
    ];
    let mut expected = ChangeMap::empty();
    references.iter().for_each(|reference| expected.mark(reference.fork, reference.block));
    assert_eq!(expected.block_count(), 4);
    for (postgres_major, compressed) in [(14, 0x02), (15, 0x04), (16, 0x08), (17, 0x10), (18, 0x04)] {
        for main in [&[][..], &[1; 100], &[2; 70_000]] {
            for compressed in [None, Some(compressed)] {
                assert_eq!(map_of(postgres_major, 10, 0x00, &body(&references, compressed, main)), expected);
                assert_eq!(map_of(postgres_major, 200, 0x30, &body(&references, compressed, main)), expected);
            }
        }
    }
    // The flag that says "compressed" in 14 says "apply" later, and the other way round.
    check_doubt(15, 10, 0, &body(&references[1..2], Some(0x02), &[]), "is not understood");
    check_doubt(14, 10, 0, &body(&references[1..2], Some(0x04), &[]), "is not understood");
}

#[test]
fn thirty_three_references_of_the_largest_kind() {
    let references: Vec<Reference> = (0..33)
        .map(|number| Reference { fork: main_fork(5, 100 + number), block: number, image_bytes: 8000, data_bytes: 9 })
        .collect();
    let map = map_of(15, 0, 0xB0, &body(&references, Some(4), &[7; 1000]));
    assert_eq!(map.forks().len(), 33);
}

#[test]
fn storage() {
    for major in [14, 15, 16, 17, 18] {
        let create = |fork| main_data(&words(&[SPACE, 5, 100, fork]));
        assert_eq!(map_of(major, 2, 0x11, &create(0)), cut(&[(main_fork(5, 100), 0)]));
        let init = RelationFork { fork: Fork::Init, ..main_fork(5, 100) };
        assert_eq!(map_of(major, 2, 0x11, &create(3)), cut(&[(init, 0)]));
        for unmapped in [1, 2] {
            assert!(map_of(major, 2, 0x11, &create(unmapped)).is_empty());
        }
        check_doubt(major, 2, 0x11, &create(4), "fork");
        let truncate = |flags| main_data(&words(&[33, SPACE, 5, 100, flags]));
        for (flags, map) in [(7, cut(&[(main_fork(5, 100), 33)])), (1, cut(&[(main_fork(5, 100), 33)])), (6, cut(&[]))]
        {
            assert_eq!(map_of(major, 2, 0x21, &truncate(flags)), map, "flags {flags}");
        }
        check_doubt(major, 2, 0x31, &truncate(1), "storage");
        check_doubt(major, 2, 0x11, &main_data(&words(&[SPACE, 5])), "too short");
    }
}

#[test]
fn databases() {
    let copied = main_data(&words(&[77, 16500, 1, SPACE]));
    let dropped = main_data(&words(&[77, 2, SPACE, 16500]));
    for major in [14, 15, 16, 17, 18] {
        assert_eq!(map_of(major, 4, 0x01, &copied), reset(&[(16500, 77)]));
    }
    assert_eq!(map_of(14, 4, 0x11, &dropped), reset(&[(SPACE, 77), (16500, 77)]));
    check_doubt(14, 4, 0x21, &dropped, "databases");
    for major in [15, 16, 17, 18] {
        assert_eq!(map_of(major, 4, 0x11, &main_data(&words(&[77, SPACE]))), reset(&[(SPACE, 77)]));
        assert_eq!(map_of(major, 4, 0x21, &dropped), reset(&[(SPACE, 77), (16500, 77)]));
        check_doubt(major, 4, 0x31, &dropped, "databases");
        check_doubt(major, 4, 0x21, &main_data(&words(&[77, 3, 1, 2])), "too short");
    }
}

fn ended(parts: u32, dropped: &[u32]) -> Vec<u8> {
    let mut data = [&500u64.to_le_bytes()[..], &words(&[parts])].concat();
    if parts & 1 != 0 {
        data.extend(words(&[5, SPACE]));
    }
    if parts & 2 != 0 {
        data.extend(words(&[3, 801, 802, 803]));
    }
    if parts & 4 != 0 {
        data.extend(words(&[dropped.len() as u32]));
        dropped.iter().for_each(|relation| data.extend(words(&[SPACE, 5, *relation])));
    }
    if parts & 8 != 0 {
        data.extend(words(&[1, 0, 0, 0, 0]));
    }
    main_data(&data)
}

#[test]
fn transactions() {
    let gone = |relations: &[u32]| {
        let both = |relation: &u32| {
            let main = main_fork(5, *relation);
            [(main, 0), (RelationFork { fork: Fork::Init, ..main }, 0)]
        };
        cut(&relations.iter().flat_map(both).collect::<Vec<_>>())
    };
    for operation in [0x00, 0x20, 0x30, 0x40] {
        for parts in 0..16 {
            let dropped: &[u32] = if parts & 4 != 0 { &[100, 101, 4_000_000_000] } else { &[] };
            assert_eq!(map_of(15, 1, 0x80 | operation | 1, &ended(parts, dropped)), gone(dropped));
        }
        assert!(map_of(15, 1, operation, &main_data(&500u64.to_le_bytes())).is_empty());
    }
    for other in [0x10, 0x50, 0x60] {
        assert!(map_of(18, 1, 0x80 | other, &ended(4, &[100])).is_empty());
    }
    check_doubt(15, 1, 0x80, &main_data(&[&500u64.to_le_bytes()[..], &words(&[4, 2, 1, 1, 1])].concat()), "too short");
    // So many that they are not kept whole: on one page all are there, else as many as were kept.
    let many: Vec<u32> = (1..20_000).collect();
    let mut stream = Stream::new(15);
    stream.push(&Plain { manager: 1, info: 0x81, body: ended(5, &many) });
    let map = stream.map().unwrap();
    assert!((1000..2000).contains(&map.forks().len()), "{}", map.forks().len());
}

#[test]
fn levels() {
    let at = |offset: usize, level: u32| {
        let mut data = vec![0xEE; 88];
        data[offset..offset + 4].copy_from_slice(&level.to_le_bytes());
        main_data(&data)
    };
    for (majors, operation, offset) in
        [(14..=18, 0x60, 20), (17..=18, 0x00, 20), (17..=18, 0x90, 16), (17..=18, 0xE0, 0)]
    {
        for major in majors {
            check_doubt(major, 0, operation, &at(offset, 0), "minimal");
            for level in [1, 2] {
                assert!(map_of(major, 0, operation, &at(offset, level)).is_empty());
            }
        }
    }
    for (major, operation) in [(14, 0x00), (16, 0x00), (16, 0x90), (18, 0x10), (18, 0x30), (18, 0x50), (18, 0x80)] {
        assert!(map_of(major, 0, operation, &main_data(&[0; 88])).is_empty());
    }
}

#[test]
fn others() {
    let data = main_data(&[7; 40]);
    for manager in [3, 5, 6, 7, 8, 18, 19, 21, 22, 128, 255] {
        assert!(map_of(18, manager, 0x00, &data).is_empty());
    }
    assert!(map_of(18, 5, 0x10, &data).is_empty(), "a tablespace is dropped empty");
    for manager in [7, 22, 128] {
        check_doubt(18, manager, 0x01, &data, "not known");
    }
    for (broken, reason) in [
        (&[33, 0, 0, 0][..], "unknown kind"),
        (&[0, 0x80, 0, 0, 1, 0, 0, 0], "no relation"),
        (&[0, 0x20, 0, 0, 1, 0, 0, 0], "as announced"),
        (&[0, 0x00, 1, 0, 1, 0, 0, 0], "as announced"),
        (&[255, 9, 1, 2], "parts"),
        (&[254, 255, 255, 255, 255, 2], "parts"),
        (&[253, 1], "parts"),
    ] {
        check_doubt(15, 10, 0, broken, reason);
    }
    let reference = [&[0, 0x04, 0, 0][..], &words(&[1, 2, 3, 4])].concat();
    check_doubt(15, 10, 0, &reference, "unknown fork");
    let reference = [&[0, 0x00, 0, 0][..], &words(&[1, 2, 3, u32::MAX])].concat();
    check_doubt(15, 10, 0, &reference, "impossible number");
}
