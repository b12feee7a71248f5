//! Tests of WAL objects: round trips, the rules of putting and fetching, and a museum of damaged objects.

mod changes;
mod decisions;
mod histories;
#[cfg(feature = "testing")]
mod union;

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use postgres_format::{Lsn, PgTimestamp, SystemIdentifier, WalFileName};

use super::*;
use crate::key;
use crate::name::ClusterName;
use crate::store::{Body, ByteRange, ObjectStore, collect};
use crate::stores::memory::MemoryStore;

const SYSTEM: SystemIdentifier = SystemIdentifier::new(7_300_000_000_000_000_001);
const MIB: usize = 1 << 20;
const SEGMENT: &str = "000000010000000000000002";

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

fn store(name: &str) -> Arc<MemoryStore> {
    Arc::new(MemoryStore::new(name.parse().unwrap()))
}

fn now() -> Timestamp {
    "2026-11-23T04:00:00Z".parse().unwrap()
}

/// A file that compresses about as WAL does, and differs by seed.
fn content(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(|index| if index % 4 == 0 { next() } else { (index >> 8) as u8 }).collect()
}

fn facts(name: &str, complete: bool, logical_end: Option<u64>) -> WalFacts {
    WalFacts {
        cluster: cluster(),
        system_identifier: SYSTEM,
        name: name.parse().unwrap(),
        node: "db1".parse().unwrap(),
        in_recovery: false,
        complete,
        logical_end: logical_end.map(Lsn::new),
        postgres_major: Some(15),
        first_commit_time: None,
        last_commit_time: Some(PgTimestamp::from_micros(848_000_000_000_000)),
        written: now(),
    }
}

fn encode_as(file: &[u8], facts: WalFacts) -> EncodedWal {
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    encoder.push(file).unwrap();
    encoder.finish(facts).unwrap()
}

fn encode(name: &str, file: &[u8]) -> EncodedWal {
    encode_as(file, facts(name, true, None))
}

fn incomplete(file: &[u8], logical_end: u64) -> EncodedWal {
    encode_as(file, facts(SEGMENT, false, Some(logical_end)))
}

fn complete(file: &[u8], logical_end: u64) -> EncodedWal {
    encode_as(file, facts(SEGMENT, true, Some(logical_end)))
}

fn object(wal: &EncodedWal) -> Bytes {
    match &wal.body {
        Body::Memory(bytes) => bytes.clone(),
        Body::File { path, .. } => Bytes::from(std::fs::read(path).unwrap()),
    }
}

fn decode(bytes: &[u8], pieces: usize) -> Result<(WalHeader, Vec<u8>), DecodeError> {
    let mut decoder = WalDecoder::new(None)?;
    let mut file = Vec::new();
    for piece in bytes.chunks(pieces) {
        decoder.push(piece, &mut file)?;
    }
    Ok((decoder.finish()?, file))
}

async fn locate_segment(store: &MemoryStore) -> Located {
    locate(store, &cluster(), SYSTEM, &SEGMENT.parse().unwrap()).await.unwrap()
}

async fn put_one(store: &MemoryStore, wal: &EncodedWal) -> Result<Stored, WalError> {
    put(store, wal, VariantCheck::List).await
}

#[test]
fn files_of_any_size_come_back_however_they_are_cut() {
    for size in [0, 1, 100, MIB - 1, MIB, MIB + 1, 3 * MIB + 17] {
        let file = content(size as u64, size);
        let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
        for cut in [MIB, 777_777, 8192 * 3] {
            for piece in file.chunks(cut) {
                encoder.push(piece).unwrap();
            }
            let wal = encoder.finish(facts(SEGMENT, true, None)).unwrap();
            assert_eq!(wal.header.size, size as u64);
            let bytes = object(&wal);
            assert_eq!(crate::digest::sha256(&bytes[..HEADER_BYTES]), wal.header_sha256);
            for pieces in [bytes.len().max(1), 1000, 65_537] {
                let (header, decoded) = decode(&bytes, pieces).unwrap();
                assert!(decoded == file && header == wal.header, "{size} bytes cut at {cut} and {pieces}");
            }
            // Any Zstandard program can read the body.
            assert!(size == 0 || zstd::stream::decode_all(&bytes[HEADER_BYTES..]).unwrap() == file);
            encoder.restart(3, Sink::Memory).unwrap();
        }
    }
}

#[test]
fn an_encoder_that_changes_its_level_writes_what_a_new_one_writes() {
    let file = content(2, 2 * MIB);
    let mut changing = WalEncoder::new(1, Sink::Memory).unwrap();
    for level in [3, 1, 3, 3, 9, 1] {
        changing.restart(level, Sink::Memory).unwrap();
        let mut new = WalEncoder::new(level, Sink::Memory).unwrap();
        let [changed, new] = [&mut changing, &mut new].map(|encoder| {
            encoder.push(&file).unwrap();
            object(&encoder.finish(facts(SEGMENT, true, None)).unwrap())
        });
        assert!(changed == new, "level {level}");
    }
}

#[test]
fn the_object_is_the_same_in_memory_and_in_a_file() {
    let scratch = tempfile::tempdir().unwrap();
    let file = content(1, 4 * MIB);
    let in_memory = encode(SEGMENT, &file);
    for memory_bytes in [0, 500_000, 1_500_000] {
        let overflow = scratch.path().join("overflow");
        let mut encoder = WalEncoder::new(3, Sink::Bounded { memory_bytes, overflow: overflow.clone() }).unwrap();
        encoder.push(&file).unwrap();
        let wal = encoder.finish(facts(SEGMENT, true, None)).unwrap();
        assert!(matches!(&wal.body, Body::File { path, .. } if *path == overflow));
        assert!(object(&wal) == object(&in_memory) && wal.header_sha256 == in_memory.header_sha256);
        assert_eq!(wal.body.len(), object(&wal).len() as u64);
    }
    let roomy = Sink::Bounded { memory_bytes: 16 * MIB, overflow: scratch.path().join("unused") };
    let mut encoder = WalEncoder::new(3, roomy).unwrap();
    encoder.push(&file).unwrap();
    assert!(matches!(encoder.finish(facts(SEGMENT, true, None)).unwrap().body, Body::Memory(_)));
    assert!(!scratch.path().join("unused").exists());
}

#[test]
fn the_longest_header_fits_its_room() {
    let name = "n".repeat(63);
    let mut longest = facts("00000001FFFFFFFF000000FF.FFFFFFFF.backup", false, Some(u64::MAX));
    longest.cluster = name.parse().unwrap();
    longest.node = name.parse().unwrap();
    longest.system_identifier = SystemIdentifier::new(u64::MAX);
    longest.first_commit_time = longest.last_commit_time;
    longest.postgres_major = Some(u32::MAX);
    longest.written = Timestamp::MAX;
    let wal = encode_as(b"x", longest);
    let text = serde_json::to_string(&wal.header).unwrap();
    assert!(text.len() + 16 < HEADER_BYTES - 100, "{} bytes leave no room to grow", text.len());
    assert_eq!(WalHeader::read(&object(&wal)).unwrap(), (wal.header, HEADER_BYTES));
}

fn arrive(bytes: &[u8], pieces: usize) -> Result<Arrived, Damage> {
    let mut arrival = WalArrival::new();
    bytes.chunks(pieces).try_for_each(|piece| arrival.push(piece))?;
    arrival.finish()
}

#[test]
fn an_object_that_arrived_is_what_was_encoded_however_it_is_cut() {
    for size in [0, 1, MIB] {
        let wal = encode(SEGMENT, &content(5, size));
        let bytes = object(&wal);
        for pieces in [1, 700, HEADER_BYTES, HEADER_LIMIT_BYTES, MIB] {
            let arrived = EncodedWal::arrived(arrive(&bytes, pieces).unwrap(), wal.body.clone());
            assert_eq!((&arrived.header, arrived.fingerprint), (&wal.header, wal.fingerprint));
            assert_eq!(arrived.header_sha256, wal.header_sha256);
        }
    }
}

/// Whoever knows the header's digest knows the object: a changed byte is found, or changes that digest.
#[test]
fn no_other_object_has_the_digest_of_the_header() {
    let wal = encode(SEGMENT, &content(6, 70_000));
    let whole = object(&wal).to_vec();
    for at in (0..whole.len()).step_by(37) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        assert!(arrive(&bytes, 5_000).is_err(), "byte {at}");
    }
    for length in (0..whole.len()).step_by(41) {
        assert!(arrive(&whole[..length], 5_000).is_err(), "cut to {length}");
    }
    assert_eq!(arrive(&[&whole[..], b"x"].concat(), 5_000), Err(Damage::Trailing { expected: wal.header.frames_size }));
    let mut other = wal.header.clone();
    other.in_recovery = !other.in_recovery;
    let rewritten = [&other.to_bytes()[..], &whole[HEADER_BYTES..]].concat();
    assert_ne!(arrive(&rewritten, 5_000).unwrap().header_sha256, wal.header_sha256);
}

#[tokio::test]
async fn the_same_again_is_success() {
    let store = store("repo1");
    let wal = encode(SEGMENT, &content(1, MIB));
    assert_eq!(put_one(&store, &wal).await.unwrap(), Stored::New);
    assert_eq!(put_one(&store, &wal).await.unwrap(), Stored::AlreadyStored);
    // Another node's header differs, the content does not.
    let mut from_standby = facts(SEGMENT, true, None);
    from_standby.node = "db2".parse().unwrap();
    from_standby.in_recovery = true;
    let wal = encode_as(&content(1, MIB), from_standby);
    assert_eq!(put_one(&store, &wal).await.unwrap(), Stored::AlreadyStored);
}

#[tokio::test]
async fn other_content_is_kept_and_a_conflict() {
    let store = store("repo1");
    let (first, second) = (encode(SEGMENT, &content(1, MIB)), encode(SEGMENT, &content(2, MIB)));
    put_one(&store, &first).await.unwrap();
    // Whoever offers either of them again is told, and nothing is lost.
    for wal in [&second, &first, &second] {
        let error = put_one(&store, wal).await.unwrap_err();
        let WalError::Conflict { existing, .. } = error else { panic!("{error}") };
        assert_eq!(existing.len(), 2);
    }
    assert!(matches!(locate_segment(&store).await, Located::Conflict { variants } if variants.len() == 2));
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("RECOVERYXLOG");
    let stores: Vec<Arc<dyn ObjectStore>> = vec![store.clone()];
    let fetched = fetch(&stores, &cluster(), SYSTEM, &SEGMENT.parse().unwrap(), &path).await;
    assert!(matches!(fetched, Fetched::Unknown { .. }), "{fetched:?}");
    assert!(!path.exists());

    // An operator's decision ends it, and a newer one replaces it.
    for chosen in [&second, &first] {
        let decision =
            Decision { format: 1, fingerprint: chosen.fingerprint, reason: "checked".to_owned(), written: now() };
        decide(store.as_ref(), &cluster(), SYSTEM, &SEGMENT.parse().unwrap(), &decision).await.unwrap();
        let located = locate_segment(&store).await;
        assert!(matches!(located, Located::Object { key, .. } if key == chosen.key()));
        assert!(put_one(&store, chosen).await.is_ok());
    }
    assert!(matches!(put_one(&store, &second).await, Err(WalError::Conflict { .. })));
}

#[tokio::test]
async fn a_decision_holds_where_only_the_other_content_is() {
    let store = store("s3");
    let (chosen, other) = (encode(SEGMENT, &content(1, MIB)), encode(SEGMENT, &content(2, MIB)));
    put_one(&store, &other).await.unwrap();
    let decision = Decision { format: 1, fingerprint: chosen.fingerprint, reason: String::new(), written: now() };
    decide(store.as_ref(), &cluster(), SYSTEM, &SEGMENT.parse().unwrap(), &decision).await.unwrap();
    assert!(matches!(locate_segment(&store).await, Located::Conflict { .. }));
    let _ = put(store.as_ref(), &chosen, VariantCheck::List).await.unwrap();
    assert!(matches!(locate_segment(&store).await, Located::Object { key, .. } if key == chosen.key()));
}

#[tokio::test]
async fn after_a_conflict_only_the_chosen_content_is_served() {
    let (lacks, has) = (store("repo1"), store("s3"));
    let (chosen, other) = (encode(SEGMENT, &content(1, MIB)), encode(SEGMENT, &content(2, MIB)));
    let name = SEGMENT.parse().unwrap();
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("x");
    put_one(&lacks, &other).await.unwrap();
    put_one(&has, &chosen).await.unwrap();
    let decision = Decision { format: 1, fingerprint: chosen.fingerprint, reason: String::new(), written: now() };
    decide(lacks.as_ref(), &cluster(), SYSTEM, &name, &decision).await.unwrap();
    let stores: Vec<Arc<dyn ObjectStore>> = vec![lacks.clone(), has.clone()];
    let fetched = fetch(&stores, &cluster(), SYSTEM, &name, &path).await;
    assert!(matches!(&fetched, Fetched::Written { store, .. } if store.as_str() == "s3"), "{fetched:?}");
    assert!(std::fs::read(&path).unwrap() == content(1, MIB));

    // An older choice in the other store does not count, and neither does a content that nobody chose.
    let older = Decision { fingerprint: other.fingerprint, ..decision.clone() };
    let third = store("s4");
    put_one(&third, &other).await.unwrap();
    decide(third.as_ref(), &cluster(), SYSTEM, &name, &older).await.unwrap();
    decide(lacks.as_ref(), &cluster(), SYSTEM, &name, &decision).await.unwrap();
    let stores: Vec<Arc<dyn ObjectStore>> = vec![lacks, third];
    let fetched = fetch(&stores, &cluster(), SYSTEM, &name, &path).await;
    assert!(matches!(fetched, Fetched::Unknown { .. }), "{fetched:?}");
    let torn = store("repo2");
    put_one(&torn, &other).await.unwrap();
    let _ = torn.put_new(&chosen.key(), chosen.body.clone()).await.unwrap();
    let stores: Vec<Arc<dyn ObjectStore>> = vec![torn, has];
    let fetched = fetch(&stores, &cluster(), SYSTEM, &name, &path).await;
    assert!(matches!(fetched, Fetched::Unknown { .. }), "{fetched:?}");
}

/// A segment whose WAL is `end` bytes of one stream, and zeros after.
fn tail(end: usize) -> Vec<u8> {
    let mut file = content(9, MIB);
    file[end..].fill(0);
    file
}

const START: u64 = 2 * MIB as u64;

#[tokio::test]
async fn a_complete_segment_rules_over_incomplete_ones_that_agree() {
    let whole = complete(&content(9, MIB), START + MIB as u64);
    let short = incomplete(&tail(1000), START + 1000);
    let longer = incomplete(&tail(5000), START + 5000);
    for order in [[&whole, &short, &longer], [&short, &longer, &whole], [&longer, &whole, &short]] {
        let store = store("repo1");
        for wal in order {
            put_one(&store, wal).await.unwrap();
        }
        assert!(matches!(locate_segment(&store).await, Located::Object { key, .. } if key == whole.key()));
    }
}

#[tokio::test]
async fn incomplete_segments_alone_are_absent_to_recovery() {
    let store = store("repo1");
    let (short, longer) = (incomplete(&tail(1000), START + 1000), incomplete(&tail(5000), START + 5000));
    let target = tempfile::tempdir().unwrap();
    for wal in [&longer, &short] {
        put_one(&store, wal).await.unwrap();
        assert!(matches!(locate_segment(&store).await, Located::Incomplete { key, .. } if key == longer.key()));
        let stores: Vec<Arc<dyn ObjectStore>> = vec![store.clone()];
        let path = target.path().join("x");
        let fetched = fetch(&stores, &cluster(), SYSTEM, &SEGMENT.parse().unwrap(), &path).await;
        assert_eq!(fetched, Fetched::Absent);
        assert!(!path.exists());
    }
}

#[tokio::test]
async fn incomplete_segments_that_disagree_are_a_conflict() {
    let whole = || complete(&content(9, MIB), START + MIB as u64);
    let mut forked = tail(5000);
    forked[4000] ^= 1;
    let beyond_switch = complete(&tail(3000), START + 3000);
    let cases = [
        ("differs before its end", whole(), incomplete(&forked, START + 5000)),
        ("goes on after the switch", beyond_switch, incomplete(&tail(5000), START + 5000)),
        ("does not say where it ends", whole(), encode_as(&tail(5000), facts(SEGMENT, false, None))),
        ("ends outside of the segment", whole(), incomplete(&tail(5000), START + 2 * MIB as u64)),
    ];
    for (case, first, second) in cases {
        let store = store("repo1");
        put_one(&store, &first).await.unwrap();
        let put = put_one(&store, &second).await;
        assert!(matches!(put, Err(WalError::Conflict { .. })), "{case}");
        assert!(matches!(locate_segment(&store).await, Located::Conflict { .. }), "{case}");
    }
    // Bytes after the end of the WAL in it are not WAL: a difference there is none.
    let store = store("repo1");
    let mut noise = tail(1000);
    noise[2000] = 7;
    put_one(&store, &incomplete(&noise, START + 1000)).await.unwrap();
    put_one(&store, &whole()).await.unwrap();
    assert!(matches!(locate_segment(&store).await, Located::Object { .. }));
}

#[tokio::test]
async fn partial_files_may_differ_and_do_not_disturb_the_segment() {
    let store = store("repo1");
    let partial = format!("{SEGMENT}.partial");
    let part = |end: usize| encode_as(&tail(end), facts(&partial, false, Some(START + end as u64)));
    for end in [3000, 1000, 2000] {
        put_one(&store, &part(end)).await.unwrap();
    }
    put_one(&store, &encode(&format!("{SEGMENT}.00000028.backup"), b"START WAL LOCATION")).await.unwrap();
    assert_eq!(locate_segment(&store).await, Located::Absent);
    put_one(&store, &complete(&content(9, MIB), START + MIB as u64)).await.unwrap();
    assert!(matches!(locate_segment(&store).await, Located::Object { .. }));
    let name: WalFileName = partial.parse().unwrap();
    let located = locate(store.as_ref(), &cluster(), SYSTEM, &name).await.unwrap();
    assert!(matches!(located, Located::Object { key, .. } if key == part(3000).key()));
}

#[tokio::test]
async fn a_history_file_is_the_first_ones() {
    let store = store("repo1");
    let put_text = async |text: &str| put_one(&store, &encode("00000002.history", text.as_bytes())).await;
    assert_eq!(put_text("1\t0/3000000\tno recovery target specified\n").await.unwrap(), Stored::New);
    assert_eq!(put_text("# a comment\n1\t0/3000000\tother words\n").await.unwrap(), Stored::AlreadyStored);
    let error = put_text("1\t0/4000000\tno recovery target specified\n").await.unwrap_err();
    assert!(matches!(&error, WalError::Conflict { existing, .. } if existing.len() == 2), "{error}");
    let evidence = store.list(&key::conflict_prefix(&cluster(), SYSTEM), None, 10).await.unwrap();
    assert_eq!(evidence.objects.len(), 1);
    let mut text = Vec::new();
    let key = key::history(&cluster(), SYSTEM, postgres_format::Timeline::new(2).unwrap());
    read_to(store.as_ref(), &key, &mut text).await.unwrap();
    assert!(text.starts_with(b"1\t0/3000000"));
}

#[tokio::test]
async fn a_damaged_object_makes_the_next_store_serve() {
    let (bad, good) = (store("repo1"), store("s3"));
    let file = content(1, MIB);
    let wal = encode(SEGMENT, &file);
    let mut damaged = object(&wal).to_vec();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    let _ = bad.put_new(&wal.key(), Bytes::from(damaged).into()).await.unwrap();
    put_one(&good, &wal).await.unwrap();
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("RECOVERYXLOG");
    let name = SEGMENT.parse().unwrap();
    let both: Vec<Arc<dyn ObjectStore>> = vec![bad.clone(), good];
    let fetched = fetch(&both, &cluster(), SYSTEM, &name, &path).await;
    assert!(matches!(&fetched, Fetched::Written { store, .. } if store.as_str() == "s3"), "{fetched:?}");
    assert!(std::fs::read(&path).unwrap() == file);
    // The damaged one alone is not absence.
    let fetched = fetch(&both[..1], &cluster(), SYSTEM, &name, &path).await;
    assert!(matches!(fetched, Fetched::Unknown { .. }));
    assert!(!path.exists());
    // And it is never taken for the same content again.
    assert!(matches!(put_one(&bad, &wal).await, Err(WalError::Damaged { .. })));
}

#[tokio::test]
async fn absence_takes_every_store() {
    let name = SEGMENT.parse().unwrap();
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("x");
    let stores: Vec<Arc<dyn ObjectStore>> = vec![store("repo1"), store("s3")];
    assert_eq!(fetch(&stores, &cluster(), SYSTEM, &name, &path).await, Fetched::Absent);
    let fetched = fetch(&[], &cluster(), SYSTEM, &name, &path).await;
    assert!(matches!(fetched, Fetched::Unknown { .. }));
    assert!(!path.exists());
}

#[tokio::test]
async fn an_object_under_another_key_is_refused() {
    let store = store("repo1");
    let wal = encode(SEGMENT, &content(1, MIB));
    let other = encode("000000010000000000000003", &content(2, MIB));
    let foreign = key::wal(&"other".parse().unwrap(), SYSTEM, &wal.header.name, &wal.fingerprint);
    let elsewhere = key::wal(&cluster(), SystemIdentifier::new(1), &wal.header.name, &wal.fingerprint);
    for key in [other.key(), foreign, elsewhere] {
        let _ = store.put_new(&key, wal.body.clone()).await.unwrap();
        let read = read_to(store.as_ref(), &key, &mut std::io::sink()).await;
        assert!(matches!(read, Err(WalError::Damaged { damage: Damage::Identity { .. }, .. })), "{key}");
    }
}

/// What the reader says about objects that somebody damaged.
#[test]
fn museum() {
    let file = content(3, 2 * MIB);
    let wal = encode(SEGMENT, &file);
    let whole = object(&wal).to_vec();
    let frames = whole.len() - HEADER_BYTES;
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let mut rewritten = wal.header.clone();
    rewritten.critical = vec!["encryption".to_owned()];
    let newer = [&rewritten.to_bytes()[..], &whole[HEADER_BYTES..]].concat();
    let mut rewritten = wal.header.clone();
    rewritten.format = 2;
    let format = [&rewritten.to_bytes()[..], &whole[HEADER_BYTES..]].concat();
    let mut rewritten = wal.header.clone();
    rewritten.sha256[5] ^= 1;
    let content = [&rewritten.to_bytes()[..], &whole[HEADER_BYTES..]].concat();
    let mut rewritten = wal.header.clone();
    rewritten.size -= 1;
    let size = [&rewritten.to_bytes()[..], &whole[HEADER_BYTES..]].concat();
    let first = zstd::zstd_safe::find_frame_compressed_size(&whole[HEADER_BYTES..]).unwrap();
    let (one, two) = whole[HEADER_BYTES..].split_at(first);
    let swapped = [&whole[..HEADER_BYTES], two, one].concat();
    let mut claims = whole.clone();
    claims[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let exhibits: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("no object of ours", b"-- SQL dump --".to_vec()),
        ("cut in the header", whole[..500].to_vec()),
        ("bit flipped in the magic", flipped(3)),
        ("bit flipped in the header's length", flipped(9)),
        ("impossible header length", claims),
        ("bit flipped in the header's text", flipped(40)),
        ("bit flipped in the header's checksum", flipped(HEADER_BYTES - 1)),
        ("unknown format", format),
        ("unknown critical field", newer),
        ("bit flipped at the start of a frame", flipped(HEADER_BYTES + 1)),
        ("bit flipped in the first frame", flipped(HEADER_BYTES + first / 2)),
        ("bit flipped in the last byte", flipped(whole.len() - 1)),
        ("frames swapped", swapped),
        ("one frame missing", whole[..HEADER_BYTES + first].to_vec()),
        ("cut in the second frame", whole[..whole.len() - 5].to_vec()),
        ("more after the end", [&whole[..], b"x"].concat()),
        ("header promises other content", content),
        ("header promises another size", size),
    ];
    assert!(frames > MIB / 4);
    let mut diagnoses = String::new();
    for (name, bytes) in exhibits {
        let diagnosis = match decode(&bytes, 100_000) {
            Ok(_) => "WHOLE".to_owned(),
            Err(error) => error.to_string(),
        };
        diagnoses.push_str(&format!("{name}: {diagnosis}\n"));
    }
    insta::assert_snapshot!(diagnoses);
}

#[test]
fn any_changed_byte_is_found() {
    let file = content(4, 70_000);
    let whole = object(&encode(SEGMENT, &file)).to_vec();
    for at in (0..whole.len()).step_by(37) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        assert!(decode(&bytes, 50_000).is_err(), "byte {at}");
    }
    for length in (0..whole.len()).step_by(41) {
        assert!(decode(&whole[..length], 50_000).is_err(), "cut to {length}");
    }
}

#[tokio::test]
async fn headers_are_read_alone() {
    let store = store("repo1");
    let wal = encode(SEGMENT, &content(1, MIB));
    put_one(&store, &wal).await.unwrap();
    let header = read_header(store.as_ref(), &wal.key(), wal.body.len()).await.unwrap();
    assert_eq!(header, wal.header);
    assert_eq!(header.last_commit_time.unwrap().to_string(), "2026-11-14T19:33:20Z");
    let stored = store.get(&wal.key(), ByteRange::All).await.unwrap();
    assert!(collect(stored, u64::MAX).await.unwrap() == object(&wal));
    assert!(read_header(store.as_ref(), &wal.key(), wal.body.len() + 1).await.is_err());
}
