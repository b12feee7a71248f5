//! What objects tell of changes: round trips, damage, and ranges gathered from several stores.

use std::path::Path;

use postgres_format::control_file::ControlFile;
use postgres_format::relation::{Fork, RelationFork};
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::wal_changes::{ChangeMap, ChangeScan, Lead, SegmentChanges, Tail, join};
use postgres_format::wal_segment::SegmentEnd;
use postgres_format::{SegmentName, SegmentNumber, SegmentSize, Timeline, wal_segment};

use super::super::changes::{DOUBT_TEXT_BYTES_MAX, changes_in};
use super::*;

/// A segment that ends with a switch, and the next, which is not finished.
const SWITCH: &str = "000000010000000000000014";
const INCOMPLETE: &str = "000000010000000000000015";

fn fork(relation: u32) -> RelationFork {
    RelationFork { tablespace: 1663, database: 5, relation, fork: Fork::Main }
}

/// What a segment of one relation's changes would tell.
fn told_of(number: u64, blocks: impl IntoIterator<Item = u32>) -> SegmentChanges {
    let (size, number) = (SegmentSize::MIN, SegmentNumber::new(number));
    let mut map = ChangeMap::empty();
    blocks.into_iter().for_each(|block| map.mark(fork(16384), block));
    SegmentChanges {
        start: number.start(size),
        size,
        end: SegmentEnd::Full,
        logical_end: number.end(size),
        postgres_major: 15,
        map,
        lead: Lead::Fresh,
        tail: Tail::Closed,
        doubt: None,
    }
}

fn with_changes(file: &[u8], changes: &SegmentChanges) -> EncodedWal {
    let number = SegmentNumber::containing(changes.start, changes.size);
    let name = SegmentName::new(Timeline::FIRST, number, changes.size).to_string();
    let facts = facts(&name, changes.end.is_complete(), Some(changes.logical_end.as_u64()));
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    encoder.push(file).unwrap();
    encoder.finish_with_changes(facts, changes).unwrap()
}

fn history() -> TimelineHistory {
    TimelineHistory::root(Timeline::FIRST)
}

fn range(from: u64, to: u64) -> std::ops::Range<Lsn> {
    Lsn::new(from * MIB as u64 + 40)..Lsn::new(to * MIB as u64)
}

fn part_of(wal: &EncodedWal) -> Vec<u8> {
    object(wal)[HEADER_BYTES + wal.header.frames_size as usize..].to_vec()
}

async fn read(store: &MemoryStore, wal: &EncodedWal) -> Result<Option<SegmentChanges>, WalError> {
    read_changes(store, &wal.key(), wal.body.len()).await
}

#[tokio::test]
async fn what_was_told_comes_back_and_the_file_too() {
    let file = content(1, MIB);
    // Few blocks are shorter as they are, many are compressed.
    for (blocks, compressed) in [(vec![7], false), ((0..20_000).step_by(3).collect(), true)] {
        let changes = told_of(2, blocks);
        let wal = with_changes(&file, &changes);
        let part = part_of(&wal);
        assert_eq!(part[8..].starts_with(b"PGCVSEG1"), !compressed);
        assert_eq!(wal.header.changes.unwrap().size, part.len() as u64);
        let store = store("repo1");
        put_one(&store, &wal).await.unwrap();
        assert_eq!(read(&store, &wal).await.unwrap(), Some(changes));
        let header = read_header(store.as_ref(), &wal.key(), wal.body.len()).await.unwrap();
        assert_eq!(header, wal.header);
        let bytes = object(&wal);
        for pieces in [bytes.len(), 1000, 65_537] {
            assert!(decode(&bytes, pieces).unwrap() == (wal.header.clone(), file.clone()));
            assert_eq!(arrive(&bytes, pieces).unwrap().header_sha256, wal.header_sha256);
        }
        // Any Zstandard program reads all that follows the header, and finds the file.
        assert!(zstd::stream::decode_all(&bytes[HEADER_BYTES..]).unwrap() == file);
    }
}

#[tokio::test]
async fn what_overflows_memory_tells_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    let (file, changes) = (content(1, MIB), told_of(2, (0..9000).step_by(2)));
    let in_memory = with_changes(&file, &changes);
    let frames_end = HEADER_BYTES as u64 + in_memory.header.frames_size;
    // The last of these has room for the frames, and none for what follows them.
    for memory_bytes in [0, frames_end as usize - 1, frames_end as usize] {
        let overflow = scratch.path().join("overflow");
        let mut encoder = WalEncoder::new(3, Sink::Bounded { memory_bytes, overflow }).unwrap();
        encoder.push(&file).unwrap();
        let wal = encoder.finish_with_changes(facts(SEGMENT, true, Some(3 * MIB as u64)), &changes).unwrap();
        assert!(matches!(wal.body, Body::File { .. }));
        assert!(object(&wal) == object(&in_memory));
    }
}

#[test]
fn a_doubt_is_told_in_short() {
    let mut changes = told_of(2, []);
    let doubt = "the record at 0/200028 is \"not\\\u{1F418}understood\": ".repeat(5);
    changes.doubt = Some(doubt);
    let wal = with_changes(&content(1, 1000), &changes);
    assert_eq!(wal.header.changes, None);
    let doubt = wal.header.changes_doubt.clone().unwrap();
    assert!(doubt.starts_with("the record at 0/200028 is notunderstood: the"), "{doubt}");
    assert_eq!(doubt.len(), DOUBT_TEXT_BYTES_MAX);
    assert!(part_of(&wal).is_empty());
    assert!(decode(&object(&wal), 700).is_ok());
}

#[test]
fn the_longest_header_of_a_segment_fits_its_room() {
    let name = "n".repeat(63);
    let mut longest = facts("00000001FFFFFFFF000000FF", false, Some(u64::MAX));
    longest.cluster = name.parse().unwrap();
    longest.node = name.parse().unwrap();
    longest.system_identifier = SystemIdentifier::new(u64::MAX);
    longest.first_commit_time = longest.last_commit_time;
    longest.postgres_major = Some(u32::MAX);
    longest.written = Timestamp::MAX;
    let mut doubtful = told_of(2, []);
    doubtful.doubt = Some("x".repeat(256));
    for changes in [told_of(2, [1]), doubtful] {
        let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
        let mut header = encoder.finish_with_changes(longest.clone(), &changes).unwrap().header;
        header.size = 1 << 30;
        header.frames_size = 1 << 31;
        if let Some(part) = &mut header.changes {
            part.size = 64 << 20;
        }
        assert!(serde_json::to_string(&header).unwrap().len() + 16 <= HEADER_BYTES);
        assert_eq!(WalHeader::read(&header.to_bytes()).unwrap(), (header, HEADER_BYTES));
    }
}

#[tokio::test]
async fn the_same_content_with_other_changes_is_the_same() {
    let file = content(1, MIB);
    let old = encode_as(&file, facts(SEGMENT, true, Some(3 * MIB as u64)));
    let [few, many] = [1, 2000].map(|blocks| with_changes(&file, &told_of(2, (0..blocks).step_by(2))));
    for (first, second) in [(&old, &few), (&few, &old), (&many, &few)] {
        let store = store("repo1");
        assert_eq!(put_one(&store, first).await.unwrap(), Stored::New);
        assert_eq!(put_one(&store, second).await.unwrap(), Stored::AlreadyStored);
        assert_eq!(read(&store, first).await.unwrap().is_some(), first.header.changes.is_some());
    }
    // Stores that hold objects of unlike lengths: the first copy's header cannot be read, the other's can.
    let (torn, whole) = (store("repo1"), store("s3"));
    let rival = incomplete(&content(1, MIB)[..], 2 * MIB as u64 + 1000);
    let mut cut = object(&few).to_vec();
    cut[20] ^= 1;
    let _ = torn.put_new(&few.key(), Bytes::from(cut).into()).await.unwrap();
    put_one(&whole, &many).await.unwrap();
    let _ = put(whole.as_ref(), &rival, VariantCheck::Skip).await.unwrap();
    let stores: Vec<Arc<dyn ObjectStore>> = vec![torn, whole];
    let together = together(&stores, &cluster(), SYSTEM, &SEGMENT.parse().unwrap()).await.unwrap();
    assert!(matches!(&together, Together::Served(_)), "{together:?}");
}

/// What is said about objects of which what follows the frames was damaged: of the file, on arrival, of the changes.
#[tokio::test]
async fn museum_of_changes() {
    let (file, changes) = (content(3, MIB), told_of(2, (0..9000).step_by(2)));
    let wal = with_changes(&file, &changes);
    let whole = object(&wal).to_vec();
    let part_at = HEADER_BYTES + wal.header.frames_size as usize;
    let part = &whole[part_at..];
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    // What a sender would write that makes other parts, and the header to it.
    let sent = |part: &[u8]| {
        let mut header = wal.header.clone();
        header.changes = Some(ChangesPart { size: part.len() as u64, sha256: crate::digest::sha256(part) });
        [&header.to_bytes()[..], &whole[HEADER_BYTES..part_at], part].concat()
    };
    let skipped = |content: &[u8]| [&part[..4], &(content.len() as u32).to_le_bytes(), content].concat();
    let other = part_of(&with_changes(&content(4, MIB), &told_of(3, [1])));
    let bomb = zstd::bulk::compress(&vec![0; 2 * MIB], 3).unwrap();
    let mut invalid = told_of(2, [1]).encode();
    invalid[30] ^= 1;
    let mut claims = wal.header.clone();
    claims.changes.as_mut().unwrap().size = 9 * MIB as u64;
    let exhibits: Vec<(&str, Vec<u8>)> = vec![
        ("whole", whole.clone()),
        ("bit flipped at its start", flipped(part_at)),
        ("bit flipped in its middle", flipped(part_at + part.len() / 2)),
        ("last byte missing", whole[..whole.len() - 1].to_vec()),
        ("all of it missing", whole[..part_at].to_vec()),
        ("cut in the frames", whole[..part_at - 1].to_vec()),
        ("more after the end", [&whole[..], b"x"].concat()),
        ("longer than it can be", [&claims.to_bytes()[..], &whole[HEADER_BYTES..]].concat()),
        ("of a later version", sent(&skipped(b"PGCVSEG2 and what it may say"))),
        ("of a later version, compressed", sent(&skipped(&zstd::bulk::compress(b"PGCVSEG2", 3).unwrap()))),
        ("of another segment", sent(&other)),
        ("in another frame", sent(&[b"ABCD", &part[4..]].concat())),
        ("of another length", sent(&[&part[..4], &[9, 0, 0, 0], &part[8..]].concat())),
        ("with nothing in it", sent(&skipped(b""))),
        ("growing without end", sent(&skipped(&bomb))),
        ("not to be decompressed", sent(&skipped(&part[8..part.len() - 3]))),
        ("invalid", sent(&skipped(&invalid))),
    ];
    let mut diagnoses = String::new();
    for (name, bytes) in exhibits {
        let said = |result: Result<&str, String>| result.map_or_else(|error| error, str::to_owned);
        let store = store("repo1");
        let (key, size) = (wal.key(), bytes.len() as u64);
        let _ = store.put_new(&key, Bytes::from(bytes.clone()).into()).await.unwrap();
        let decoded = said(decode(&bytes, 100_000).map(|_| "whole").map_err(|error| error.to_string()));
        let arrived = said(arrive(&bytes, 100_000).map(|_| "whole").map_err(|error| error.to_string()));
        let read = read_changes(store.as_ref(), &key, size).await;
        let read =
            said(read.map(|found| if found.is_some() { "there" } else { "none" }).map_err(|error| match error {
                WalError::Damaged { damage, .. } => damage.to_string(),
                other => panic!("{other}"),
            }));
        diagnoses.push_str(&format!("{name}\n  file: {decoded}\n  arrival: {arrived}\n  changes: {read}\n"));
    }
    insta::assert_snapshot!(diagnoses);
}

#[tokio::test]
async fn a_damaged_part_is_found_wherever_it_is_damaged() {
    let wal = with_changes(&content(3, 100_000), &told_of(2, (0..900).step_by(2)));
    let whole = object(&wal).to_vec();
    let part_at = HEADER_BYTES + wal.header.frames_size as usize;
    for at in part_at..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x04;
        assert!(changes_in(&wal.header, &bytes[part_at..]).is_err(), "byte {at}");
        assert!(decode(&bytes, 50_000).is_ok() && arrive(&bytes, 50_000).is_err(), "byte {at}");
        let mut arrival = WalArrival::new();
        arrival.push(&bytes).unwrap();
        assert!(arrival.finish_file().is_ok());
    }
}

/// A sample of a real server's WAL, its system, and what it tells.
fn sample(name: &str, prefix: &str) -> (Vec<u8>, SystemIdentifier, SegmentChanges) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../postgres-format/samples");
    let read = |name: String| zstd::decode_all(&std::fs::read(directory.join(name)).unwrap()[..]).unwrap();
    let system = ControlFile::parse(&read("15-pg_control.zst".to_owned())).unwrap().system_identifier;
    let file = read(format!("15-{prefix}-{name}.zst"));
    let expected = wal_segment::Expected {
        name: name.parse().unwrap(),
        size: SegmentSize::MIN,
        system_identifier: system,
        partial: false,
    };
    let mut scan = ChangeScan::new(expected);
    scan.push(&file).unwrap();
    (file, system, scan.finish().unwrap().1)
}

#[tokio::test]
async fn a_range_is_told_by_whoever_knows_and_else_read() {
    let (first, system, first_changes) = sample(SWITCH, "switch");
    let (second, _, second_changes) = sample(INCOMPLETE, "incomplete");
    let range = Lsn::new(first_changes.start.as_u64() + 40)..second_changes.logical_end;
    let expected = join(range.clone(), [&first_changes, &second_changes]).unwrap();
    assert!(expected.block_count() > 0);
    let object_of = |file: &[u8], name: &str, changes: &SegmentChanges, tell: bool| {
        let mut facts = facts(name, changes.end.is_complete(), Some(changes.logical_end.as_u64()));
        facts.system_identifier = system;
        let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
        encoder.push(file).unwrap();
        if tell { encoder.finish_with_changes(facts, changes) } else { encoder.finish(facts) }.unwrap()
    };
    // By place of the store and segment: nothing, a silent object, one that tells, one that was damaged where it tells.
    for (case, told, read) in
        [("22", 2, 0), ("21", 1, 1), ("11", 0, 2), ("31", 0, 2), ("21 12", 2, 0), ("31 20", 1, 1), ("00 12", 1, 1)]
    {
        let mut stores: Vec<Arc<dyn ObjectStore>> = Vec::new();
        for (place, kinds) in case.split(' ').enumerate() {
            let store = store(&format!("repo{place}"));
            let files = [(&first, SWITCH, &first_changes), (&second, INCOMPLETE, &second_changes)];
            for (kind, (file, name, changes)) in kinds.chars().zip(files) {
                let wal = object_of(file, name, changes, kind != '1');
                let mut bytes = object(&wal).to_vec();
                if kind == '3' {
                    *bytes.last_mut().unwrap() ^= 1;
                }
                if kind != '0' {
                    let _ = store.put_new(&wal.key(), Bytes::from(bytes).into()).await.unwrap();
                }
            }
            stores.push(store);
        }
        let cluster = cluster();
        let archived = ArchivedChanges::new(&stores, &cluster, system, SegmentSize::MIN);
        let gathered = archived.between(&history(), range.clone(), u64::MAX).await.unwrap();
        assert_eq!((gathered.told, gathered.read), (told, read), "{case}");
        assert!(gathered.map == expected, "{case}");
        let limited = archived.between(&history(), range.clone(), 0).await;
        assert_eq!(matches!(limited, Err(Untold::TooMuch { .. })), read > 0, "{case}");
        // Of the incomplete one nothing is told beyond its end.
        let beyond = range.start..Lsn::new(range.end.as_u64() + 8);
        assert!(matches!(archived.between(&history(), beyond, u64::MAX).await, Err(Untold::Doubt(_))));
    }
}

#[tokio::test]
async fn a_hole_a_conflict_and_a_store_that_is_away_are_told_apart() {
    let cluster = cluster();
    let [two, three, five] =
        [2, 3, 5].map(|number| with_changes(&content(number, MIB), &told_of(number, [number as u32])));
    let store = store("repo1");
    for wal in [&two, &three, &five] {
        put_one(&store, wal).await.unwrap();
    }
    let stores: Vec<Arc<dyn ObjectStore>> = vec![store.clone()];
    let between = async |from, to| {
        ArchivedChanges::new(&stores, &cluster, SYSTEM, SegmentSize::MIN)
            .between(&history(), range(from, to), 0)
            .await
            .map(|gathered| gathered.map.block_count())
            .map_err(|error| error.to_string())
    };
    assert_eq!(between(2, 4).await, Ok(2));
    assert_eq!(between(3, 3).await, Ok(0));
    assert_eq!(between(2, 6).await, Err("WAL 000000010000000000000004 is in no store".to_owned()));
    let rival = with_changes(&content(9, MIB), &told_of(3, [9]));
    assert!(put_one(&store, &rival).await.is_err());
    let error = between(2, 4).await.unwrap_err();
    assert!(error.contains("000000010000000000000003 could not be read: it is in conflict"), "{error}");
    // What an operator chose counts, here and whoever else is asked.
    let name = three.header.name;
    let decision = Decision { format: 1, fingerprint: rival.fingerprint, reason: "checked".to_owned(), written: now() };
    decide(store.as_ref(), &cluster, SYSTEM, &name, &decision).await.unwrap();
    let archived = ArchivedChanges::new(&stores, &cluster, SYSTEM, SegmentSize::MIN);
    let map = archived.between(&history(), range(2, 4), 0).await.unwrap().map;
    assert!(map.touches(&fork(16384), 9) && !map.touches(&fork(16384), 3));
    let none: Vec<Arc<dyn ObjectStore>> = Vec::new();
    let archived = ArchivedChanges::new(&none, &cluster, SYSTEM, SegmentSize::MIN);
    assert!(matches!(archived.told(SEGMENT.parse().unwrap()).await, Err(Untold::Unread { .. })));
}

#[test]
fn segments_of_a_range_are_those_of_the_way_to_the_timeline() {
    let mib = MIB as u64;
    let history = TimelineHistory::parse(Timeline::new(2).unwrap(), b"1\t0/380000\tx\n").unwrap();
    let check = |range: std::ops::Range<u64>, expected: &[&str]| {
        let found = segments(&history, SegmentSize::MIN, &(Lsn::new(range.start)..Lsn::new(range.end)));
        assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
    };
    check(2 * mib + 40..2 * mib + 80, &["000000010000000000000002"]);
    check(2 * mib + 40..3 * mib + 40, &["000000010000000000000002"]);
    let both = ["000000010000000000000002", "000000020000000000000003", "000000020000000000000004"];
    check(2 * mib + 40..4 * mib + 41, &both);
    check(2 * mib..2 * mib, &[]);
}

#[cfg(feature = "testing")]
#[tokio::test]
async fn a_range_costs_two_reads_a_segment_and_a_listing_a_log() {
    use crate::stores::faulty::{Fault, FaultyStore, Operation};

    let cluster = cluster();
    let counted = Arc::new(FaultyStore::new(store("repo1")));
    for number in 2..32 {
        put(&*counted, &with_changes(&content(number, MIB), &told_of(number, [1])), VariantCheck::Skip).await.unwrap();
    }
    let before = [Operation::Get, Operation::List].map(|operation| counted.calls(operation));
    let away = Arc::new(FaultyStore::new(store("s3")));
    away.fail_everything(Fault::Fail);
    let stores: Vec<Arc<dyn ObjectStore>> = vec![away.clone(), counted.clone()];
    let archived = ArchivedChanges::new(&stores, &cluster, SYSTEM, SegmentSize::MIN);
    assert_eq!(archived.between(&history(), range(2, 32), 0).await.unwrap().told, 30);
    let after = [Operation::Get, Operation::List].map(|operation| counted.calls(operation));
    assert_eq!([after[0] - before[0], after[1] - before[1]], [60, 2]);
    // Nobody knows of a segment that the store may have that is away.
    let error = archived.between(&history(), range(31, 33), 0).await.unwrap_err();
    assert!(matches!(error, Untold::Unread { .. }), "{error}");
    counted.fail_all(Operation::Get, Fault::Fail);
    assert!(matches!(archived.between(&history(), range(2, 3), u64::MAX).await, Err(Untold::Unread { .. })));
}
