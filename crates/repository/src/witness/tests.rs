//! Witnesses against segments in memory.

use postgres_format::{SystemIdentifier, Timeline};

use super::*;
use crate::stores::memory::MemoryStore;
use crate::wal::{Sink, VariantCheck, WalEncoder, WalFacts, put};

const SIZE: SegmentSize = SegmentSize::DEFAULT;
/// Segment 3 begins here.
const BEGIN: u64 = 3 * (16 << 20);

fn entry(witnesses: &[WalWitness]) -> RootBackup {
    let text = format!(
        r#"{{"backup":"20261123T010203Z-00000001","manifest_sha256":"{}","manifest_size":1000,
        "system_identifier":"7","postgres_major":15,"segment_size_bytes":16777216,
        "start_timeline":1,"start_lsn":"0/3000028","start_time":"2026-11-23T01:02:03Z",
        "stop_timeline":1,"stop_lsn":"0/3020000","stop_time":"2026-11-23T01:03:00Z","min_recovery_point":null,
        "node":"db2","from_standby":false,"label":"nightly","files":900,"data_bytes":31457280,
        "stored_bytes":9437184,"packs":1,"page_errors":0}}"#,
        "07".repeat(32)
    );
    RootBackup { wal_witnesses: witnesses.to_vec(), ..RootBackup::from_json(&text).unwrap() }
}

fn segment(seed: u8) -> Vec<u8> {
    (0..16u32 << 20).map(|index| (index >> 12) as u8 ^ seed).collect()
}

async fn archive(store: &MemoryStore, content: &[u8], complete: bool) {
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    encoder.push(content).unwrap();
    let facts = WalFacts {
        cluster: "main".parse().unwrap(),
        system_identifier: SystemIdentifier::new(7),
        name: "000000010000000000000003".parse().unwrap(),
        node: "db1".parse().unwrap(),
        in_recovery: false,
        complete,
        logical_end: None,
        postgres_major: Some(15),
        first_commit_time: None,
        last_commit_time: None,
        written: "2026-11-23T04:00:00Z".parse().unwrap(),
    };
    let wal = encoder.finish(facts).unwrap();
    let _ = put(store, &wal, VariantCheck::Skip).await;
}

fn witness(content: &[u8], end: u64) -> WalWitness {
    let stretch = WalWitness::stretch(Lsn::new(BEGIN + end), SIZE);
    let within = |lsn: Lsn| (lsn.as_u64() - BEGIN) as usize;
    WalWitness::of(stretch, &content[within(stretch.start)..within(stretch.end)])
}

async fn asked(store: &MemoryStore, witnesses: &[WalWitness]) -> Testimony {
    let three = SegmentNumber::new(3);
    let needed = [SegmentSpan { timeline: Timeline::FIRST, first: three, last: three }];
    ask(store, &"main".parse().unwrap(), &entry(witnesses), &needed, SIZE).await.unwrap()
}

fn memory() -> MemoryStore {
    MemoryStore::new("repo1".parse().unwrap())
}

#[test]
fn a_stretch_stays_in_its_segment() {
    let check = |end: u64, from: u64| assert_eq!(WalWitness::stretch(Lsn::new(end), SIZE).start, Lsn::new(from));
    check(BEGIN + 100, BEGIN);
    check(BEGIN + WITNESS_BYTES + 8, BEGIN + 8);
    check(BEGIN, BEGIN - WITNESS_BYTES);
}

#[tokio::test]
async fn witnesses_find_their_bytes_or_say_that_the_segment_is_anothers() {
    let store = memory();
    let (ours, mut theirs) = (segment(1), segment(1));
    // One byte within what the second witness covers.
    theirs[(3 << 20) - 9] ^= 1;
    let witnesses = [witness(&ours, 5000), witness(&ours, 3 << 20), witness(&ours, 16 << 20)];
    let name: WalFileName = "000000010000000000000003".parse().unwrap();
    assert_eq!(asked(&store, &[]).await, Testimony::Silent);
    assert_eq!(asked(&store, &witnesses).await, Testimony::Missing(name));
    archive(&store, &ours, true).await;
    assert_eq!(asked(&store, &witnesses).await, Testimony::Agrees);
    let foreign = memory();
    archive(&foreign, &theirs, true).await;
    assert_eq!(asked(&foreign, &witnesses[..1]).await, Testimony::Agrees);
    assert_eq!(asked(&foreign, &witnesses).await, Testimony::Differs(name));
    // A shorter file has no such bytes.
    let short = memory();
    archive(&short, &ours[..1 << 20], true).await;
    assert_eq!(asked(&short, &witnesses[1..]).await, Testimony::Differs(name));
    // A witness outside of what the backup needs proves nothing.
    let outside = WalWitness { from: Lsn::new(100), to: Lsn::new(200), sha256: [0; 32] };
    assert!(matches!(asked(&store, &[outside]).await, Testimony::Missing(_)));
}

#[tokio::test]
async fn two_contents_are_for_an_operator() {
    let store = memory();
    let (ours, theirs) = (segment(1), segment(2));
    archive(&store, &ours, true).await;
    archive(&store, &theirs, true).await;
    let witnesses = [witness(&ours, 5000)];
    assert!(matches!(asked(&store, &witnesses).await, Testimony::Contested(_)));
}
