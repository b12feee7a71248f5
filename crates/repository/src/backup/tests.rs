//! Tests of packs and manifests: round trips, verification, and a museum of damaged objects.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use postgres_format::FullTransactionId;
use proptest::prelude::*;

use super::manifest::*;
use super::pack::*;
use super::*;
use crate::byte_text::{ByteText, RelativePath};
use crate::key;
use crate::name::{BackupId, ClusterName};
use crate::root::RootBackup;
use crate::store::{Body, ObjectStore};
use crate::stores::memory::MemoryStore;
use crate::wal::Stored;

mod layers;
mod sparse;

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

fn id() -> BackupId {
    "20261123T010203Z-00000001".parse().unwrap()
}

/// Half noise, half the same.
fn content(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(|index| if index % 2 == 0 { next() } else { 7 }).collect()
}

fn pack_bytes(pack: &FinishedPack) -> Vec<u8> {
    let Body::Memory(bytes) = &pack.body else { panic!("packs are in memory") };
    bytes.to_vec()
}

fn head() -> Head {
    Head {
        format: Head::FORMAT,
        critical: Vec::new(),
        tool: "pgconvoy 0.1.0".to_owned(),
        backup: id(),
        backup_type: Default::default(),
        parent: None,
        changes: None,
        cluster: cluster(),
        system_identifier: "7300000000000000001".parse().unwrap(),
        node: "db2".parse().unwrap(),
        from_standby: false,
        primary: None,
        postgres_major: 15,
        control_version: 1300,
        catalog_version: 202_209_061,
        segment_size_bytes: 16 << 20,
        block_size: 8192,
        relation_segment_blocks: 131_072,
        checksum_version: 1,
        wal_log_hints: false,
        start_timeline: postgres_format::Timeline::FIRST,
        start_lsn: "0/2000028".parse().unwrap(),
        start_time: "2026-11-23T01:02:03Z".parse().unwrap(),
        stop_timeline: postgres_format::Timeline::FIRST,
        stop_lsn: "0/2000138".parse().unwrap(),
        stop_time: "2026-11-23T01:03:00Z".parse().unwrap(),
        min_recovery_point: None,
        start_next_xid: Some(FullTransactionId::new(740)),
        stop_next_xid: Some(FullTransactionId::new(4_294_967_296)),
        last_commit_time: None,
        label: "nightly".to_owned(),
        backup_label: ByteText::new(&b"START WAL LOCATION: 0/2000028\nLABEL: \xff\n"[..]),
        tablespace_map: ByteText::default(),
        mode: 0o700,
        owner: Some("postgres".to_owned()),
        group: Some("postgres".to_owned()),
        references: Vec::new(),
        attempts: Vec::new(),
        page_errors: 0,
        wal_witnesses: Vec::new(),
        warnings: Vec::new(),
        page_error_list: Vec::new(),
        databases: Vec::new(),
        wal_directory: None,
        unknown: BTreeMap::new(),
    }
}

fn path(text: &str) -> RelativePath {
    RelativePath::new(text).unwrap()
}

fn file(number: u32, name: &str, content: &[u8], extents: Vec<Extent>) -> File {
    let layers = if extents.is_empty() { Vec::new() } else { vec![Layer { backup: None, file: None, extents }] };
    File {
        number: FileNumber(number),
        path: path(name),
        kind: FileKind::Relation,
        mode: 0o600,
        mtime: 1_790_000_000,
        size: content.len() as u64,
        crc32c: Some(crc32c::crc32c(content)),
        layers,
    }
}

/// A backup of some files in packs of about 100 KB.
struct Sample {
    files: Vec<(File, Vec<u8>)>,
    packs: Vec<FinishedPack>,
    manifest: Vec<u8>,
    entry: RootBackup,
}

fn sample() -> Sample {
    let sizes = [8192, 0, 1, 300_000, 65_536, 65_537, 200_000];
    let contents: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(n, size)| content(n as u64, *size)).collect();
    let mut builder = PackBuilder::new(3, 100_000).unwrap();
    let mut packs = Vec::new();
    for (number, content) in contents.iter().enumerate() {
        for (piece, bytes) in content.chunks(FRAME_LIMIT_BYTES).enumerate() {
            let offset = (piece * FRAME_LIMIT_BYTES) as u64;
            builder.add(FileNumber(number as u32), offset, bytes).unwrap();
            if builder.is_full() {
                packs.push(builder.finish(packs.len() as u32));
            }
        }
    }
    packs.push(builder.finish(packs.len() as u32));
    let mut extents: BTreeMap<u32, Vec<Extent>> = BTreeMap::new();
    for (number, extent) in packs.iter().flat_map(|pack| &pack.extents) {
        extents.entry(number.0).or_default().push(*extent);
    }
    let name = |number: usize| format!("base/5/{}", 16_384 + number);
    let files: Vec<(File, Vec<u8>)> = contents
        .into_iter()
        .enumerate()
        .map(|(number, content)| {
            let extents = extents.remove(&(number as u32)).unwrap_or_default();
            (file(number as u32, &name(number), &content, extents), content)
        })
        .collect();
    let (manifest, summary) = write_manifest(&files, &packs);
    let entry = entry(&head(), &summary);
    Sample { files, packs, manifest, entry }
}

fn write_manifest(files: &[(File, Vec<u8>)], packs: &[FinishedPack]) -> (Vec<u8>, ManifestSummary) {
    let mut writer = ManifestWriter::new(Vec::new(), head()).unwrap();
    let tablespace = Tablespace { oid: 16_500, location: ByteText::new("/srv/fast"), mode: 0o700 };
    writer.add(&Line::Tablespace(tablespace)).unwrap();
    writer.add(&Line::Directory(Directory { path: path("base/5"), mode: 0o700 })).unwrap();
    writer.add(&Line::Link(Link { path: path("log"), target: ByteText::new("/var/log/pg"), directory: true })).unwrap();
    for pack in packs {
        let line = Pack { backup: None, number: pack.number, size: pack.size, sha256: pack.sha256 };
        writer.add(&Line::Pack(line)).unwrap();
    }
    let mut spool = EntrySpool::create_in(&std::env::temp_dir()).unwrap();
    files.iter().for_each(|(file, _)| spool.push(file).unwrap());
    spool.append_to(&mut writer).unwrap();
    writer.finish().unwrap()
}

async fn stored(sample: &Sample) -> Arc<MemoryStore> {
    let store = Arc::new(MemoryStore::new("repo1".parse().unwrap()));
    for pack in &sample.packs {
        let key = key::pack(&cluster(), &id(), pack.number);
        assert_eq!(put(store.as_ref(), &key, &pack.body, &pack.sha256).await.unwrap(), Stored::New);
        assert_eq!(put(store.as_ref(), &key, &pack.body, &pack.sha256).await.unwrap(), Stored::AlreadyStored);
    }
    let body = Body::Memory(Bytes::from(sample.manifest.clone()));
    let key = key::manifest(&cluster(), &id());
    put(store.as_ref(), &key, &body, &sample.entry.manifest_sha256).await.unwrap();
    store
}

#[tokio::test]
async fn a_backup_comes_back() {
    let sample = sample();
    let store = stored(&sample).await;
    let scratch = std::env::temp_dir();
    let reader = fetch_manifest(store.as_ref(), &cluster(), &sample.entry, &scratch).await.unwrap();
    assert_eq!(*reader.head(), head());
    let mut files = Vec::new();
    for line in reader {
        if let Line::File(file) = line.unwrap() {
            let mut content = Vec::new();
            for extent in file.layers.iter().flat_map(|layer| &layer.extents) {
                let key = key::pack(&cluster(), &id(), extent.pack);
                let mut sink = |frame: Frame<'_>| {
                    assert_eq!((frame.file, frame.offset), (file.number, content.len() as u64));
                    content.extend_from_slice(frame.bytes);
                    Ok(())
                };
                read_frames(store.as_ref(), &key, extent.offset, extent.length, &mut sink).await.unwrap();
                assert_eq!(content.len() as u64, extent.to);
            }
            files.push((file, content));
        }
    }
    assert!(files == sample.files);
    for depth in [VerifyDepth::Presence, VerifyDepth::Content] {
        let report = verify(store.as_ref(), &cluster(), &sample.entry, depth, &scratch).await.unwrap();
        assert_eq!((report.files, report.packs), (7, sample.packs.len() as u64));
    }
    assert!(sample.packs.len() > 2);
}

#[tokio::test]
async fn a_backup_that_lacks_something_is_not_whole() {
    let sample = sample();
    let whole = stored(&sample).await;
    let scratch = std::env::temp_dir();
    let last = sample.packs.last().unwrap();
    let copy = async |pack: Option<Vec<u8>>| {
        let store = MemoryStore::new("s3".parse().unwrap());
        let listed = whole.list("c/", None, 100).await.unwrap().objects;
        for entry in listed.into_iter().filter(|entry| entry.key != key::pack(&cluster(), &id(), last.number)) {
            let bytes = crate::store::read(whole.as_ref(), &entry.key, u64::MAX).await.unwrap().unwrap();
            let _ = store.put_new(&entry.key, bytes.into()).await.unwrap();
        }
        if let Some(bytes) = pack {
            let key = key::pack(&cluster(), &id(), last.number);
            let _ = store.put_new(&key, Bytes::from(bytes).into()).await.unwrap();
        }
        let presence = verify(&store, &cluster(), &sample.entry, VerifyDepth::Presence, &scratch).await;
        (presence, verify(&store, &cluster(), &sample.entry, VerifyDepth::Content, &scratch).await)
    };
    assert!(matches!(copy(None).await, (Err(BackupError::Store(_)), Err(BackupError::Store(_)))));
    let bytes = pack_bytes(last);
    let short = bytes[..bytes.len() - 1].to_vec();
    assert!(matches!(copy(Some(short)).await.0, Err(BackupError::Pack { damage: PackDamage::Size { .. }, .. })));
    let mut flipped = bytes.clone();
    flipped[100] ^= 1;
    let (presence, content) = copy(Some(flipped)).await;
    assert!(presence.is_ok() && matches!(content, Err(BackupError::Pack { .. })));
}

#[tokio::test]
async fn other_content_under_a_pack_is_a_conflict() {
    let sample = sample();
    let store = stored(&sample).await;
    let key = key::pack(&cluster(), &id(), 0);
    let other = &sample.packs[1];
    let put = put(store.as_ref(), &key, &other.body, &other.sha256).await;
    assert!(matches!(put, Err(BackupError::Conflict { .. })));
}

#[test]
fn a_builder_makes_the_same_packs_again() {
    let build = |builder: &mut PackBuilder| {
        builder.add(FileNumber(1), 0, &content(1, 5000)).unwrap();
        builder.add(FileNumber(2), 8192, &content(2, 65_536)).unwrap();
        let len = builder.len();
        let pack = builder.finish(4);
        assert_eq!(len, pack.size);
        assert_eq!(pack.raw_bytes, 70_536);
        pack_bytes(&pack)
    };
    let mut builder = PackBuilder::new(3, 1 << 20).unwrap();
    assert!(build(&mut builder) == build(&mut builder));
    assert!(builder.has_no_frames());
    verify_pack(&pack_bytes(&builder.finish(5)), &mut |_| Ok(())).unwrap();
}

#[test]
fn pieces_out_of_order_are_refused() {
    let mut builder = PackBuilder::new(3, 1 << 20).unwrap();
    builder.add(FileNumber(1), 10, b"abc").unwrap();
    for (number, offset) in [(1, 12), (1, 0), (0, 100)] {
        assert!(matches!(builder.add(FileNumber(number), offset, b"x"), Err(PackError::Order { .. })));
    }
    builder.add(FileNumber(1), 13, b"d").unwrap();
    builder.add(FileNumber(1), 20, b"e").unwrap();
    builder.add(FileNumber(3), 0, b"f").unwrap();
    for piece in [&b""[..], &vec![0; FRAME_LIMIT_BYTES + 1]] {
        assert!(matches!(builder.add(FileNumber(4), 0, piece), Err(PackError::PieceLength { .. })));
    }
    let pack = builder.finish(0);
    let extents: Vec<(u32, u64, u64)> =
        pack.extents.iter().map(|(file, extent)| (file.0, extent.from, extent.to)).collect();
    assert_eq!(extents, [(1, 10, 14), (1, 20, 21), (3, 0, 1)]);
}

/// What the reader says about packs that somebody damaged.
#[test]
fn pack_museum() {
    let mut builder = PackBuilder::new(3, 1 << 20).unwrap();
    for number in 0..4 {
        builder.add(FileNumber(number), 0, &content(u64::from(number), 9000)).unwrap();
    }
    let pack = builder.finish(0);
    let whole = pack_bytes(&pack);
    let second = pack.extents[1].1.offset as usize;
    let third = pack.extents[2].1.offset as usize;
    let table = whole.len() - 56 - 4 * 32;
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let length = third - second;
    let mut swapped = whole.clone();
    let fourth = pack.extents[3].1.offset as usize;
    if fourth - third == length {
        let (one, two) = (whole[second..third].to_vec(), whole[third..fourth].to_vec());
        swapped[second..third].copy_from_slice(&two);
        swapped[third..fourth].copy_from_slice(&one);
    } else {
        let (one, two) = (&whole[second..third], &whole[third..fourth]);
        let both = [two, one].concat();
        swapped[second..fourth].copy_from_slice(&both);
    }
    let exhibits: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("no pack", vec![0; 100]),
        ("cut", whole[..whole.len() - 1].to_vec()),
        ("bit flipped in the magic", flipped(2)),
        ("bit flipped in a frame's length", flipped(second)),
        ("bit flipped in a frame's raw length", flipped(second + 5)),
        ("bit flipped in a frame's file", flipped(second + 8)),
        ("bit flipped in a frame's encoding", flipped(second + 12)),
        ("bit flipped in a frame's offset", flipped(second + 17)),
        ("bit flipped in a frame's digest", flipped(second + 30)),
        ("bit flipped in a frame's bytes", flipped(second + 100)),
        ("frames swapped", swapped),
        ("bit flipped in the table", flipped(table + 40)),
        ("bit flipped in the table's position", flipped(whole.len() - 55)),
        ("bit flipped in the number of frames", flipped(whole.len() - 47)),
        ("bit flipped in the trailer's digest", flipped(whole.len() - 30)),
        ("bit flipped in the last byte", flipped(whole.len() - 1)),
    ];
    let mut diagnoses = String::new();
    for (name, bytes) in exhibits {
        let diagnosis = match verify_pack(&bytes, &mut |_| Ok(())) {
            Ok(()) => "WHOLE".to_owned(),
            Err(error) => error.to_string(),
        };
        diagnoses.push_str(&format!("{name}: {diagnosis}\n"));
    }
    insta::assert_snapshot!(diagnoses);
    verify_pack(&whole, &mut |_| Ok(())).unwrap();
}

#[test]
fn any_changed_byte_of_a_pack_is_found() {
    let mut builder = PackBuilder::new(3, 1 << 20).unwrap();
    builder.add(FileNumber(0), 0, &content(1, 3000)).unwrap();
    builder.add(FileNumber(1), 8192, &[0; 8192]).unwrap();
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

fn read_all(bytes: &[u8]) -> Result<Vec<Line>, ManifestDamage> {
    ManifestReader::new(bytes)?.collect()
}

/// A manifest of these lines, whatever they are.
fn manifest_of(lines: &str) -> Vec<u8> {
    [&b"PGCVMAN1"[..], &zstd::stream::encode_all(lines.as_bytes(), 3).unwrap()].concat()
}

/// What the reader says about manifests that somebody damaged.
#[test]
fn manifest_museum() {
    let sample = sample();
    let whole = sample.manifest.clone();
    let text = String::from_utf8(zstd::stream::decode_all(&whole[8..]).unwrap()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let joined = |lines: &[&str]| manifest_of(&(lines.join("\n") + "\n"));
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        manifest_of(&text.replacen(from, to, 1))
    };
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let mut reordered = lines.clone();
    reordered.swap(1, 2);
    let exhibits: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("no manifest", b"SELECT 1; SELECT 2;".to_vec()),
        ("bit flipped in the magic", flipped(1)),
        ("bit flipped in the frame", flipped(whole.len() / 2)),
        ("bit flipped in the checksum", flipped(whole.len() - 1)),
        ("cut", whole[..whole.len() - 20].to_vec()),
        ("no lines", manifest_of("")),
        ("head missing", joined(&lines[1..])),
        ("end missing", joined(&lines[..lines.len() - 1])),
        ("a file missing", joined(&[&lines[..lines.len() - 2], &lines[lines.len() - 1..]].concat())),
        ("two heads", joined(&[&lines[..1], &lines[..]].concat())),
        ("kinds out of order", joined(&reordered)),
        ("more after the end", joined(&[&lines[..], &lines[1..2]].concat())),
        ("unknown format", with(r#""format":1"#, r#""format":2"#)),
        ("unknown critical field", with(r#""format":1"#, r#""format":1,"critical":["encryption"]"#)),
        ("a path that climbs out", with(r#""path":"base/5/16384""#, r#""path":"../16384""#)),
        ("a hole in a file", with(r#""from":0"#, r#""from":1"#)),
        ("an empty layer", with(r#""layers":[{"#, r#""layers":[{"extents":[]},{"#)),
        (
            "two layers that nobody announced",
            with(
                r#""layers":[{"extents":[{"#,
                r#""layers":[{"extents":[{"pack":0,"offset":8,"length":1,"from":0,"to":1}]},{"extents":[{"#,
            ),
        ),
        ("a sparse extent alone", with(r#""to":8192"#, r#""to":8192,"pages":1"#)),
        ("a sparse extent of half pages", with(r#""to":8192"#, r#""to":8000,"pages":1"#)),
        ("a pack that is not listed", with(r#""pack":0"#, r#""pack":77"#)),
        ("a range behind a pack's end", with(r#""offset":8,"#, r#""offset":800000,"#)),
        (
            "an inherited layer that nobody announced",
            with(r#""layers":[{"#, r#""layers":[{"backup":"20261122T010203Z-00000001","#),
        ),
        ("its own backup by name", with(r#""layers":[{"#, r#""layers":[{"backup":"20261123T010203Z-00000001","#)),
        ("a reference to itself", with(r#""references":[]"#, r#""references":["20261123T010203Z-00000001"]"#)),
        (
            "an inherited pack of an unnamed backup",
            with(r#""line":"pack","#, r#""line":"pack","backup":"20261122T010203Z-00000001","#),
        ),
        ("packs out of order", with(r#""line":"pack","number":0"#, r#""line":"pack","number":1"#)),
        ("files out of order", with(r#""line":"file","number":0"#, r#""line":"file","number":1"#)),
        ("no JSON", with(r#""size":8192"#, r#""size":"#)),
    ];
    let mut diagnoses = String::new();
    for (name, bytes) in exhibits {
        let diagnosis = match read_all(&bytes) {
            Ok(_) => "WHOLE".to_owned(),
            Err(error) => error.to_string(),
        };
        diagnoses.push_str(&format!("{name}: {diagnosis}\n"));
    }
    insta::assert_snapshot!(diagnoses);
    assert_eq!(read_all(&whole).unwrap().len(), lines.len() - 1);
}

#[test]
fn unknown_fields_of_a_manifest_are_ignored() {
    let sample = sample();
    let text = String::from_utf8(zstd::stream::decode_all(&sample.manifest[8..]).unwrap()).unwrap();
    let newer = text.replace(r#"{"line":""#, r#"{"newer":[1,{"a":null}],"line":""#);
    assert_eq!(read_all(&manifest_of(&newer)).unwrap(), read_all(&sample.manifest).unwrap());
}

#[tokio::test]
async fn a_manifest_must_be_the_published_one() {
    let sample = sample();
    let store = stored(&sample).await;
    let mut entry = sample.entry.clone();
    entry.manifest_sha256[0] ^= 1;
    let fetched = fetch_manifest(store.as_ref(), &cluster(), &entry, &std::env::temp_dir()).await;
    assert!(matches!(fetched, Err(BackupError::Manifest { damage: ManifestDamage::Digest, .. })));
    let mut entry = sample.entry.clone();
    entry.manifest_size -= 1;
    let fetched = fetch_manifest(store.as_ref(), &cluster(), &entry, &std::env::temp_dir()).await;
    assert!(matches!(fetched, Err(BackupError::Manifest { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_come_back_however_the_pack_is_cut(
        pieces in prop::collection::vec((0u32..3, 0u64..3, 1usize..20_000, any::<u8>()), 1..12),
        cut in 1usize..5000,
    ) {
        let mut builder = PackBuilder::new(1, 1 << 20).unwrap();
        let mut expected = Vec::new();
        let (mut number, mut offset) = (0, 0);
        for (step, hole, length, seed) in pieces {
            if step > 0 {
                (number, offset) = (number + step, 0);
            }
            offset += hole;
            // Some compress and some do not.
            let bytes = if seed % 2 == 0 { content(u64::from(seed), length) } else { vec![seed; length] };
            builder.add(FileNumber(number), offset, &bytes).unwrap();
            expected.push((FileNumber(number), offset, bytes.clone()));
            offset += length as u64;
        }
        let pack = builder.finish(0);
        let bytes = pack_bytes(&pack);
        let mut found = Vec::new();
        verify_pack(&bytes, &mut |frame| {
            found.push((frame.file, frame.offset, frame.bytes.to_vec()));
            Ok(())
        }).unwrap();
        prop_assert!(found == expected);
        // Each extent alone holds what it says.
        for (number, extent) in &pack.extents {
            let range = &bytes[extent.offset as usize..(extent.offset + extent.length) as usize];
            let mut reader = FrameReader::new(extent.offset).unwrap();
            let mut at = extent.from;
            for piece in range.chunks(cut) {
                reader.push::<PackDamage>(piece, &mut |frame| {
                    assert_eq!((frame.file, frame.offset), (*number, at));
                    at += frame.bytes.len() as u64;
                    Ok(())
                }).unwrap();
            }
            reader.finish().unwrap();
            prop_assert_eq!(at, extent.to);
        }
    }
}
