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
        "stop_timeline":1,"stop_lsn":"0/4000000","stop_time":"2026-11-23T01:03:00Z","min_recovery_point":null,
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
    archive_as(store, "000000010000000000000003", content, complete).await;
}

async fn archive_as(store: &MemoryStore, name: &str, content: &[u8], complete: bool) {
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    encoder.push(content).unwrap();
    let facts = WalFacts {
        cluster: "main".parse().unwrap(),
        system_identifier: SystemIdentifier::new(7),
        name: name.parse().unwrap(),
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
    ask(store, &"main".parse().unwrap(), &entry(witnesses), &TimelineHistory::root(Timeline::FIRST)).await.unwrap()
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

#[test]
fn a_segment_is_looked_for_where_recovery_reads_it() {
    let check = |number: u64, history: &TimelineHistory, expected: &[u32]| {
        let found: Vec<u32> =
            timelines_of(SegmentNumber::new(number), history, SIZE).into_iter().map(Timeline::get).collect();
        assert_eq!(found, expected, "segment {number}");
    };
    let parse = |number, text: &str| TimelineHistory::parse(Timeline::new(number).unwrap(), text.as_bytes()).unwrap();
    check(3, &TimelineHistory::root(Timeline::new(2).unwrap()), &[2]);
    // Forks within segment 3 and on the boundary of segment 5.
    let history = parse(4, "1\t0/3500000\tx\n2\t0/5000000\tx\n");
    check(2, &history, &[1]);
    check(3, &history, &[2, 1]);
    check(4, &history, &[2]);
    check(5, &history, &[4]);
    // Two promotions within one segment.
    check(3, &parse(3, "1\t0/3500000\tx\n2\t0/3600000\tx\n"), &[3, 2, 1]);
}

#[tokio::test]
async fn the_new_timelines_segment_testifies_before_the_old_ones() {
    let (store, cluster) = (memory(), "main".parse().unwrap());
    let (ours, theirs) = (segment(1), segment(2));
    let entry = entry(&[witness(&ours, 5000)]);
    let history = TimelineHistory::parse(Timeline::new(2).unwrap(), b"1\t0/3500000\tx\n").unwrap();
    archive(&store, &ours, true).await;
    assert_eq!(ask(&store, &cluster, &entry, &history).await.unwrap(), Testimony::Agrees);
    archive_as(&store, "000000020000000000000003", &theirs, true).await;
    let name = "000000020000000000000003".parse().unwrap();
    assert_eq!(ask(&store, &cluster, &entry, &history).await.unwrap(), Testimony::Differs(name));
}

#[tokio::test]
async fn one_store_that_serves_anothers_wal_contradicts_and_one_that_fails_is_told() {
    let (cluster, history) = ("main".parse().unwrap(), TimelineHistory::root(Timeline::FIRST));
    let (ours, theirs) = (segment(1), segment(2));
    let entry = entry(&[witness(&ours, 5000)]);
    let stores = [("repo1", Some(&ours)), ("s3", Some(&theirs)), ("empty", None)].map(|(name, content)| {
        let store = MemoryStore::new(name.parse().unwrap());
        (Arc::new(store), content)
    });
    for (store, content) in &stores {
        if let Some(content) = content {
            archive(store, content, true).await;
        }
    }
    let stores: Vec<Arc<dyn ObjectStore>> =
        stores.into_iter().map(|(store, _)| store as Arc<dyn ObjectStore>).collect();
    let mut heard = hear(&stores, &cluster, &entry, &history).await;
    let (store, name) = heard.contradiction().unwrap();
    assert_eq!((store.as_str(), name.to_string().as_str()), ("s3", "000000010000000000000003"));
    assert!(heard.agrees() && heard.contested().is_none() && heard.unknown().next().is_none());
    assert_eq!(heard.of(&["repo1".parse().unwrap()]).contradiction(), None);
    heard.add("bucket".parse().unwrap(), Err("no answer".to_owned()));
    assert_eq!(
        heard.unknown().map(|(store, why)| (store.as_str(), why)).collect::<Vec<_>>(),
        [("bucket", "no answer")]
    );
}

#[test]
fn only_a_choice_among_contents_can_take_a_backups_wal_away() {
    let entry = entry(&[witness(&segment(1), 5000)]);
    let check = |decided: &[&str], expected: bool| {
        let decided = decided.iter().map(|name| name.parse().unwrap()).collect();
        assert_eq!(may_be_decided_away(&entry, &decided), expected, "{decided:?}");
    };
    check(&[], false);
    check(&["000000010000000000000002", "00000002.history"], false);
    check(&["000000010000000000000003"], true);
    check(&["000000020000000000000003"], true);
    check(&["00000001.history"], true);
}
