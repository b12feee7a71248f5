//! Sparse frames and the tables of packs.

use super::*;

const PAGE: usize = 1024;

fn pages(seed: u64, blocks: &[u32]) -> Vec<u8> {
    blocks.iter().flat_map(|block| content(seed + u64::from(*block), PAGE)).collect()
}

#[test]
fn pages_come_back_as_runs() {
    let mut builder = PackBuilder::new(3, 1 << 20).unwrap();
    let (one, two) = ([3, 4, 9, 10, 11, 20, 30, 31], [40, 42]);
    builder.add(FileNumber(1), 0, b"before").unwrap();
    builder.add_pages(FileNumber(2), &one, &pages(0, &one)).unwrap();
    builder.add_pages(FileNumber(2), &two, &pages(0, &two)).unwrap();
    builder.add(FileNumber(2), 64 * 1024, b"behind").unwrap();
    let pack = builder.finish(7);
    let bytes = pack_bytes(&pack);
    let mut found = Vec::new();
    verify_pack(&bytes, &mut |frame| {
        found.push((frame.offset / PAGE as u64, frame.bytes.len() / PAGE, frame.first_unit));
        if frame.sparse {
            let blocks: Vec<u32> =
                (0..frame.bytes.len() / PAGE).map(|n| (frame.offset / 1024) as u32 + n as u32).collect();
            assert!(frame.bytes == pages(0, &blocks));
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(found, [(0, 0, 0), (3, 2, 0), (9, 3, 2), (20, 1, 5), (30, 2, 6), (40, 1, 0), (42, 1, 1), (64, 0, 0)]);
    let extents: Vec<_> = pack
        .extents
        .iter()
        .map(|(file, extent)| (file.0, extent.from / 1024, extent.to.div_ceil(1024), extent.pages))
        .collect();
    assert_eq!(extents, [(1, 0, 1, None), (2, 3, 43, Some(10)), (2, 64, 65, None)]);
    assert!(pack.extents.windows(2).all(|pair| pair[0].1.end() == pair[1].1.offset));

    let table = read_table(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(table.len(), 4);
    let blocks: Vec<u64> = table[1].units.iter().map(|unit| unit.from / 1024).collect();
    assert_eq!(blocks, one.map(u64::from));
    for (block, unit) in one.iter().zip(&table[1].units) {
        assert_eq!(unit.sum, unit_sum(&pages(0, &[*block])));
        assert_eq!(unit.to - unit.from, 1024);
    }
    assert_eq!(table[3].units, [Unit { from: 65_536, to: 65_542, sum: unit_sum(b"behind") }]);
    assert!(table.windows(2).all(|pair| pair[0].position + pair[0].length == pair[1].position));
}

#[test]
fn parts_of_a_file_have_extents_of_their_own() {
    let ranges = |parts: bool| {
        let mut builder = PackBuilder::new(3, 1 << 20).unwrap();
        for blocks in [[1, 4], [6, 7], [30, 31]] {
            builder.add_pages(FileNumber(0), &blocks, &pages(0, &blocks)).unwrap();
            if parts && blocks[0] == 6 {
                builder.part();
            }
        }
        let pack = builder.finish(0);
        pack.extents.iter().map(|(_, extent)| (extent.from / 1024, extent.to / 1024)).collect::<Vec<_>>()
    };
    assert_eq!(ranges(false), [(1, 32)]);
    assert_eq!(ranges(true), [(1, 8), (30, 32)]);
}

/// The catalogue of CRC algorithms gives this as the check value of CRC-64/NVME.
#[test]
fn sums_are_the_published_algorithm() {
    assert_eq!(unit_sum(b"123456789"), 0xae8b_1486_0a79_9888);
}

#[test]
fn pages_that_cannot_be_a_frame_are_refused() {
    let mut builder = PackBuilder::new(3, 1 << 20).unwrap();
    let nine: Vec<u32> = (0..9).collect();
    let cases: [(&[u32], usize); 7] =
        [(&[], 0), (&[], 8), (&[1], 0), (&[1, 1], 16), (&[2, 1], 16), (&[1, 2], 15), (&nine, 9 * 16)];
    for (blocks, bytes) in cases {
        let added = builder.add_pages(FileNumber(0), blocks, &vec![1; bytes]);
        assert!(matches!(added, Err(PackError::Pages { .. })), "{blocks:?} in {bytes}");
    }
    assert!(builder.add_pages(FileNumber(0), &[1, 2], &vec![1; FRAME_LIMIT_BYTES + 2]).is_err());
    builder.add_pages(FileNumber(1), &[5, 7], &[1; 16]).unwrap();
    for (file, block) in [(0, 9), (1, 7), (1, 2)] {
        let added = builder.add_pages(FileNumber(file), &[block], &[1; 8]);
        assert!(matches!(added, Err(PackError::Order { .. })), "{file} {block}");
    }
    // The other shape begins another extent, wherever it lies.
    builder.add(FileNumber(1), 0, b"abc").unwrap();
    builder.add_pages(FileNumber(1), &[8], &[1; 8]).unwrap();
    assert_eq!(builder.finish(0).extents.len(), 3);
}

#[test]
fn any_changed_byte_of_a_sparse_pack_is_found() {
    let mut builder = PackBuilder::new(3, 1 << 20).unwrap();
    builder.add_pages(FileNumber(3), &[1, 2, 50], &pages(1, &[1, 2, 50])).unwrap();
    builder.add(FileNumber(4), 0, &content(9, 9000)).unwrap();
    let whole = pack_bytes(&builder.finish(0));
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x20;
        assert!(verify_pack(&bytes, &mut |_| Ok(())).is_err(), "byte {at}");
    }
    for length in 0..whole.len() {
        assert!(verify_pack(&whole[..length], &mut |_| Ok(())).is_err(), "cut to {length}");
    }
}

#[tokio::test]
async fn a_table_is_read_from_the_end_of_its_pack() {
    let mut builder = PackBuilder::new(1, 1 << 20).unwrap();
    // A table longer than what is asked for at first.
    for number in 0..4000 {
        builder.add(FileNumber(number), 0, &content(u64::from(number), 40)).unwrap();
    }
    let (long, short) = (builder.finish(0), {
        builder.add(FileNumber(1), 0, &content(1, 50_000)).unwrap();
        builder.finish(1)
    });
    let store = MemoryStore::new("repo1".parse().unwrap());
    for pack in [&long, &short] {
        let key = key::pack(&cluster(), &id(), pack.number);
        put(&store, &key, &pack.body, &pack.sha256).await.unwrap();
        let table = fetch_table(&store, &key, pack.size).await.unwrap();
        assert_eq!(table, read_table(&pack_bytes(pack), pack.size).unwrap());
        assert_eq!(table.len(), if pack.number == 0 { 4000 } else { 1 });
        assert!(fetch_table(&store, &key, pack.size - 1).await.is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sparse_frames_come_back_however_the_pack_is_cut(
        frames in prop::collection::vec((any::<bool>(), prop::collection::vec(1u32..4, 1..8)), 1..12),
        cut in 1usize..3000,
    ) {
        let mut builder = PackBuilder::new(1, 1 << 20).unwrap();
        let mut expected: BTreeMap<(u32, u64), u8> = BTreeMap::new();
        let (mut number, mut block) = (0, 0);
        for (another, steps) in frames {
            if another {
                (number, block) = (number + 1, 0);
            }
            let blocks: Vec<u32> = steps.iter().map(|step| { block += step; block }).collect();
            let bytes = pages(u64::from(number) * 1000, &blocks);
            builder.add_pages(FileNumber(number), &blocks, &bytes).unwrap();
            for (index, page) in bytes.chunks(PAGE).enumerate() {
                let at = u64::from(blocks[index]) * PAGE as u64;
                expected.extend((at..).zip(page.iter().copied()).map(|(at, byte)| ((number, at), byte)));
            }
        }
        let pack = builder.finish(0);
        let bytes = pack_bytes(&pack);
        let mut found = BTreeMap::new();
        for (number, extent) in &pack.extents {
            let mut reader = FrameReader::new(extent.offset).unwrap();
            for piece in bytes[extent.offset as usize..extent.end() as usize].chunks(cut) {
                reader.push::<PackDamage>(piece, &mut |frame| {
                    assert_eq!(frame.file, *number);
                    assert!(frame.offset >= extent.from && frame.offset + frame.bytes.len() as u64 <= extent.to);
                    found.extend((frame.offset..).zip(frame.bytes.iter()).map(|(at, byte)| ((number.0, at), *byte)));
                    Ok(())
                }).unwrap();
            }
            reader.finish().unwrap();
        }
        prop_assert!(found == expected);
    }
}
