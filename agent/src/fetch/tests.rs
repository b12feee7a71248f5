//! The rules of `restore_command`, over stores in memory and through a scripted coordinator.

use std::sync::Arc;
use std::time::Duration;

use repository::store::ObjectStore;
use repository::stores::faulty::{Fault, FaultyStore, Operation};
use repository::wal::{EncodedWal, Sink, VariantCheck, WalEncoder, WalFacts};

use super::*;
use crate::road::DirectRoad;
use crate::road_watch::RoadWatch;
use crate::testing::PATIENCE;
use crate::testing::{FULL, FakeNode, HISTORY, SWITCH, Scripted, link, memory, sample, until};

fn encoded(node: &FakeNode, name: &str, content: &[u8]) -> EncodedWal {
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    encoder.push(content).unwrap();
    encoder
        .finish(WalFacts {
            cluster: "main".parse().unwrap(),
            system_identifier: node.data.facts().unwrap().system_identifier,
            name: name.parse().unwrap(),
            node: "db1".parse().unwrap(),
            in_recovery: false,
            complete: true,
            logical_end: None,
            postgres_major: Some(15),
            first_commit_time: None,
            last_commit_time: None,
            written: jiff::Timestamp::UNIX_EPOCH,
        })
        .unwrap()
}

async fn put(node: &FakeNode, store: &Arc<dyn ObjectStore>, name: &str, content: &[u8]) {
    let _ = repository::wal::put(store.as_ref(), &encoded(node, name, content), VariantCheck::Skip).await.unwrap();
}

fn segment(number: u32) -> String {
    format!("0000000100000000{number:08X}")
}

fn content(number: u32) -> Vec<u8> {
    vec![u8::try_from(number % 251).unwrap(); 1 << 20]
}

fn fetcher(node: &FakeNode, sources: Sources, wait: Duration) -> Arc<Fetcher> {
    let settings = FetchSettings { prefetch: 4, wait };
    Fetcher::new("main".parse().unwrap(), Arc::clone(&node.data), Arc::clone(&node.spool), Arc::new(sources), settings)
}

const WAIT: Duration = Duration::from_millis(1_500);

#[tokio::test]
async fn segments_come_verified_and_the_next_ones_lie_ready() {
    let node = FakeNode::new();
    let store = memory("s3");
    for number in 1..=10 {
        put(&node, &store, &segment(number), &content(number)).await;
    }
    let fetcher = fetcher(&node, Sources::new(Some(store), None), WAIT);
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    for number in 1..=10 {
        let answer = fetcher.fetch(&segment(number), &target, FetchMode::Recovery).await;
        assert_eq!(answer, Answer::Written, "{number}");
        assert_eq!(std::fs::read(&target).unwrap(), content(number));
        let files = std::fs::read_dir(node.spool.prefetch_directory()).unwrap().count();
        assert!(files <= 8, "{files} files ahead");
    }
    assert_eq!(fetcher.fetch(&segment(11), &target, FetchMode::Recovery).await, Answer::No(String::new()));
    // PostgreSQL asks for the last one again at the end of recovery.
    assert_eq!(fetcher.fetch(&segment(10), &target, FetchMode::Recovery).await, Answer::Written);
}

#[tokio::test]
async fn nothing_is_written_where_something_else_than_a_file_is() {
    let node = FakeNode::new();
    let store = memory("s3");
    put(&node, &store, &segment(1), &content(1)).await;
    let fetcher = fetcher(&node, Sources::new(Some(store), None), Duration::from_secs(60));
    let target = node.data.pg_wal().join("target");
    rustix::fs::mkfifoat(rustix::fs::CWD, &target, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let reason = format!("cannot write {}: it is a FIFO, not a regular file", target.display());
    for (mode, answer) in [
        (FetchMode::Recovery, Answer::Refused(reason.clone())),
        (FetchMode::Standby, Answer::No(reason.clone())),
        (FetchMode::Other, Answer::No(reason)),
    ] {
        assert_eq!(fetcher.fetch(&segment(1), &target, mode).await, answer);
    }
}

#[tokio::test]
async fn a_no_is_never_remembered() {
    let node = FakeNode::new();
    let store = memory("s3");
    let fetcher = fetcher(&node, Sources::new(Some(Arc::clone(&store)), None), WAIT);
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    assert_eq!(fetcher.fetch(HISTORY, &target, FetchMode::Recovery).await, Answer::No(String::new()));
    assert_eq!(fetcher.fetch(&segment(1), &target, FetchMode::Recovery).await, Answer::No(String::new()));
    put(&node, &store, HISTORY, &sample(HISTORY)).await;
    put(&node, &store, &segment(1), &content(1)).await;
    assert_eq!(fetcher.fetch(HISTORY, &target, FetchMode::Recovery).await, Answer::Written);
    assert_eq!(fetcher.fetch(&segment(1), &target, FetchMode::Recovery).await, Answer::Written);
    for never in ["00000001.history", "000000010000000000000001.partial", "RECOVERYXLOG", "../../etc/passwd"] {
        assert_eq!(fetcher.fetch(never, &target, FetchMode::Recovery).await, Answer::No(String::new()), "{never}");
    }
}

#[tokio::test]
async fn what_is_unknown_stops_recovery_and_never_a_standby() {
    let node = FakeNode::new();
    let watch = RoadWatch::new(PATIENCE, DirectRoad::Absent);
    // The direct store says no, the coordinator's stores cannot be asked.
    let sources = || Sources::new(Some(memory("s3")), Some(link("127.0.0.1:9", &watch)));
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    let answer = fetcher(&node, sources(), WAIT).fetch(FULL, &target, FetchMode::Recovery).await;
    assert!(matches!(&answer, Answer::Unknown(reason) if reason.contains("coordinator")), "{answer:?}");
    for mode in [FetchMode::Standby, FetchMode::Other] {
        let start = Instant::now();
        let answer = fetcher(&node, sources(), WAIT).fetch(FULL, &target, mode).await;
        assert!(matches!(&answer, Answer::No(reason) if reason.contains("not known")), "{answer:?}");
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    assert!(!target.exists());
}

#[tokio::test]
async fn an_unknown_answer_is_asked_for_again_until_the_coordinator_is_back() {
    let node = FakeNode::new();
    let scripted = Scripted::new(vec![memory("repo1")]);
    put(&node, &scripted.stores[0], FULL, &sample(FULL)).await;
    let (address, server) = scripted.serve("127.0.0.1:0").await;
    drop(server);
    let watch = RoadWatch::new(PATIENCE, DirectRoad::Absent);
    let fetcher = fetcher(&node, Sources::new(None, Some(link(&address, &watch))), Duration::from_secs(20));
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    let asked = tokio::spawn({
        let (fetcher, target) = (Arc::clone(&fetcher), target.clone());
        async move { fetcher.fetch(FULL, &target, FetchMode::Recovery).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!asked.is_finished());
    let (_, _server) = scripted.serve(&address).await;
    assert_eq!(asked.await.unwrap(), Answer::Written);
    assert_eq!(std::fs::read(&target).unwrap(), sample(FULL));
    assert_eq!(fetcher.fetch(SWITCH, &target, FetchMode::Recovery).await, Answer::No(String::new()));
}

#[tokio::test]
async fn histories_are_served_when_no_store_is_there() {
    let node = FakeNode::new();
    let store = memory("s3");
    put(&node, &store, HISTORY, &sample(HISTORY)).await;
    let target = node.data.pg_wal().join("RECOVERYHISTORY");
    let with_store = fetcher(&node, Sources::new(Some(store), None), WAIT);
    assert_eq!(with_store.fetch(HISTORY, &target, FetchMode::Standby).await, Answer::Written);
    std::fs::remove_file(&target).unwrap();
    let watch = RoadWatch::new(PATIENCE, DirectRoad::Absent);
    let alone = fetcher(&node, Sources::new(None, Some(link("127.0.0.1:9", &watch))), WAIT);
    for mode in [FetchMode::Standby, FetchMode::Recovery] {
        assert_eq!(alone.fetch(HISTORY, &target, mode).await, Answer::Written);
        assert_eq!(std::fs::read(&target).unwrap(), sample(HISTORY));
    }
    assert!(matches!(alone.fetch("00000003.history", &target, FetchMode::Standby).await, Answer::No(_)));
    assert!(matches!(alone.fetch("00000003.history", &target, FetchMode::Recovery).await, Answer::Unknown(_)));
}

#[tokio::test]
async fn a_damaged_object_is_never_handed_over_and_the_other_store_serves() {
    let node = FakeNode::new();
    let (bad, good) = (memory("bad"), memory("good"));
    put(&node, &good, FULL, &sample(FULL)).await;
    let wal = encoded(&node, FULL, &sample(FULL));
    let repository::store::Body::Memory(bytes) = &wal.body else { panic!("in memory") };
    let mut damaged = bytes.to_vec();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    let _ = bad.put_new(&wal.key(), bytes::Bytes::from(damaged).into()).await.unwrap();
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    let alone = fetcher(&node, Sources::new(Some(Arc::clone(&bad)), None), WAIT);
    assert!(matches!(alone.fetch(FULL, &target, FetchMode::Recovery).await, Answer::Unknown(_)));
    assert!(!target.exists());
    let scripted = Scripted::new(vec![bad]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let watch = RoadWatch::new(PATIENCE, DirectRoad::Absent);
    let both = fetcher(&node, Sources::new(Some(good), Some(link(&address, &watch))), WAIT);
    assert_eq!(both.fetch(FULL, &target, FetchMode::Recovery).await, Answer::Written);
    assert_eq!(std::fs::read(&target).unwrap(), sample(FULL));
}

#[tokio::test]
async fn parent_segments_fetched_ahead_go_when_the_timeline_changes() {
    let node = FakeNode::new();
    let store = memory("s3");
    for number in 1..=6 {
        put(&node, &store, &segment(number), &content(number)).await;
    }
    let child = "000000020000000000000003";
    put(&node, &store, child, &content(99)).await;
    let fetcher = fetcher(&node, Sources::new(Some(store), None), WAIT);
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    assert_eq!(fetcher.fetch(&segment(2), &target, FetchMode::Recovery).await, Answer::Written);
    let ahead = || {
        let mut names: Vec<String> = std::fs::read_dir(node.spool.prefetch_directory())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy()[..24].to_owned())
            .collect();
        names.sort();
        names
    };
    until(async || (ahead().len() == 4).then_some(())).await;
    assert_eq!(fetcher.fetch(child, &target, FetchMode::Recovery).await, Answer::Written);
    assert_eq!(std::fs::read(&target).unwrap(), content(99));
    until(async || ahead().iter().all(|name| name.starts_with("00000002")).then_some(())).await;
}

#[tokio::test]
async fn at_the_end_of_recovery_the_mode_is_remembered() {
    let node = FakeNode::standby();
    let watch = RoadWatch::new(PATIENCE, DirectRoad::Absent);
    let fetcher = fetcher(&node, Sources::new(None, Some(link("127.0.0.1:9", &watch))), WAIT);
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    assert!(matches!(fetcher.fetch(HISTORY, &target, FetchMode::Other).await, Answer::No(_)));
    assert!(matches!(fetcher.fetch(HISTORY, &target, FetchMode::Recovery).await, Answer::Unknown(_)));
    assert!(matches!(fetcher.fetch(HISTORY, &target, FetchMode::Other).await, Answer::Unknown(_)));
    assert!(matches!(fetcher.fetch(HISTORY, &target, FetchMode::Standby).await, Answer::No(_)));
    assert!(matches!(fetcher.fetch(HISTORY, &target, FetchMode::Other).await, Answer::No(_)));
}

#[tokio::test]
async fn the_segment_of_a_fork_is_held_back_from_who_follows_the_newer_timeline() {
    let node = FakeNode::new();
    let store = memory("s3");
    for number in 4..=6 {
        put(&node, &store, &segment(number), &content(number)).await;
    }
    put(&node, &store, HISTORY, b"1\t0/580000\tno recovery target specified\n").await;
    let fetcher = fetcher(&node, Sources::new(Some(store), None), WAIT);
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    let fetch = async |number, mode| fetcher.fetch(&segment(number), &target, mode).await;
    assert_eq!(fetch(4, FetchMode::Standby).await, Answer::Written);
    std::fs::remove_file(&target).unwrap();
    let held = fetch(5, FetchMode::Standby).await;
    assert!(matches!(&held, Answer::No(reason) if reason.contains("timeline 2's line left it")), "{held:?}");
    let stopped = fetch(5, FetchMode::Recovery).await;
    assert!(matches!(&stopped, Answer::Refused(_)) && !target.exists(), "{stopped:?}");
    // pg_rewind reads what the old line wrote; who is past the fork is on that line already.
    assert_eq!(fetch(5, FetchMode::Other).await, Answer::Written);
    assert_eq!(fetch(6, FetchMode::Standby).await, Answer::Written);
    let settings = node.data.path().join("postgresql.auto.conf");
    std::fs::write(&settings, "recovery_target_timeline = '1'\n").unwrap();
    assert_eq!(fetch(5, FetchMode::Recovery).await, Answer::Written);
    std::fs::write(&settings, "recovery_target_timeline = '2'\n").unwrap();
    assert!(matches!(fetch(5, FetchMode::Standby).await, Answer::No(_)));
}

#[tokio::test]
async fn what_is_absent_before_a_later_segment_is_a_gap_and_not_the_end() {
    let node = FakeNode::new();
    let store = memory("s3");
    for number in [1, 2, 4] {
        put(&node, &store, &segment(number), &content(number)).await;
    }
    let fetcher = fetcher(&node, Sources::new(Some(Arc::clone(&store)), None), WAIT);
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    let gap = fetcher.fetch(&segment(3), &target, FetchMode::Recovery).await;
    assert!(
        matches!(&gap, Answer::Unknown(reason) if reason.contains("000000010000000000000004 is: WAL has a gap")),
        "{gap:?}"
    );
    assert_eq!(fetcher.fetch(&segment(3), &target, FetchMode::Standby).await, Answer::No(String::new()));
    assert_eq!(fetcher.fetch(&segment(5), &target, FetchMode::Recovery).await, Answer::No(String::new()));
    put(&node, &store, &segment(3), &content(3)).await;
    assert_eq!(fetcher.fetch(&segment(3), &target, FetchMode::Recovery).await, Answer::Written);
}

/// Names that lie in the directory of fetched files.
fn lying(node: &FakeNode) -> Vec<String> {
    let name =
        |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().to_string_lossy()[..24].to_owned();
    std::fs::read_dir(node.spool.prefetch_directory()).unwrap().map(name).collect()
}

/// A store that gives an object after a while and says at once what it has, and the store that it is made of.
fn slow(takes: Duration) -> (Arc<dyn ObjectStore>, Arc<dyn ObjectStore>) {
    let inner = memory("s3");
    let store = FaultyStore::new(Arc::clone(&inner));
    store.fail_all(Operation::Get, Fault::Delay(takes));
    (inner, Arc::new(store))
}

#[tokio::test]
async fn a_standby_gets_on_with_a_store_that_takes_longer_than_it_is_held() {
    let node = FakeNode::standby();
    let (inner, store) = slow(HOLD_MAX + Duration::from_millis(700));
    for number in 1..=3 {
        put(&node, &inner, &segment(number), &content(number)).await;
    }
    let fetcher = fetcher(&node, Sources::new(Some(store), None), WAIT);
    // A store was silent a moment ago, so that the standby is not held for long.
    *fetcher.silent_since.lock().unwrap() = Some(Instant::now());
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    for number in 1..=3 {
        let mut answers = Vec::new();
        while answers.last() != Some(&Answer::Written) && answers.len() < 4 {
            let start = Instant::now();
            answers.push(fetcher.fetch(&segment(number), &target, FetchMode::Standby).await);
            assert!(start.elapsed() < Duration::from_millis(4_800), "held for {:?}", start.elapsed());
        }
        assert_eq!(answers.last(), Some(&Answer::Written), "{answers:?}");
        assert!(std::fs::read(&target).unwrap() == content(number));
    }
    assert_eq!(lying(&node), Vec::<String>::new());
}

#[tokio::test]
async fn little_waits_to_be_asked_for_again_and_the_rest_leaves_nothing() {
    let node = FakeNode::standby();
    let (inner, store) = slow(Duration::from_secs(3600));
    let asked = [1, 2, 3, 4].map(|timeline| format!("{timeline:08X}0000000000000009"));
    for name in &asked {
        put(&node, &inner, name, &content(9)).await;
    }
    let fetcher = fetcher(&node, Sources::new(Some(store), None), WAIT);
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    for name in &asked {
        let fetch = fetcher.fetch(name, &target, FetchMode::Standby);
        assert!(tokio::time::timeout(Duration::from_millis(200), fetch).await.is_err());
    }
    until(async || (lying(&node).len() == 2).then_some(())).await;
    assert!(lying(&node).iter().all(|name| asked[2..].contains(name)), "{:?}", lying(&node));
    fetcher.ahead.forget(asked[2].parse().unwrap());
    until(async || (lying(&node) == asked[3..]).then_some(())).await;
}

#[tokio::test]
async fn nobody_waits_long_for_stores_that_are_silent() {
    let node = FakeNode::standby();
    let store = FaultyStore::new(memory("s3"));
    store.fail_everything(Fault::Hang(Duration::from_secs(3600)));
    let fetcher = fetcher(&node, Sources::new(Some(Arc::new(store)), None), WAIT);
    let target = node.data.pg_wal().join("RECOVERYXLOG");
    for (longest, number) in [(HOLD_MAX, 1), (HOLD_IN_SILENCE, 1), (HOLD_IN_SILENCE, 2)] {
        let start = Instant::now();
        let answer = fetcher.fetch(&segment(number), &target, FetchMode::Standby).await;
        assert!(matches!(&answer, Answer::No(reason) if reason.contains("no store answered in time")), "{answer:?}");
        assert!(start.elapsed() < longest + Duration::from_millis(300), "held for {:?}", start.elapsed());
    }
}
