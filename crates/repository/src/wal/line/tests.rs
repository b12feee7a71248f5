//! Tables of what is held back, and what listings tell of gaps.

use super::*;
use crate::store::Body;
use crate::stores::memory::MemoryStore;
use crate::wal::{Sink, VariantCheck, WalEncoder, WalFacts};

const MIB: u64 = 1 << 20;

fn timeline(number: u32) -> Timeline {
    Timeline::new(number).unwrap()
}

fn segment(on: u32, number: u64) -> SegmentName {
    SegmentName::new(timeline(on), SegmentNumber::new(number), SegmentSize::from_bytes(MIB).unwrap())
}

fn history(of: u32, text: &str) -> TimelineHistory {
    TimelineHistory::parse(timeline(of), text.as_bytes()).unwrap()
}

#[test]
fn the_segment_of_a_fork_is_held_back_from_who_follows_the_newer_timeline() {
    let size = SegmentSize::from_bytes(MIB).unwrap();
    let check = |of: &TimelineHistory, following, asked: (u32, u64), expected: Option<(u32, u64)>| {
        let found = past_fork(segment(asked.0, asked.1), size, following, of);
        let wanted = expected.map(|(on, number)| segment(on, number));
        assert_eq!(found.map(|found| found.wanted), wanted, "{asked:?} {following:?}");
    };
    let number = |on| Following::Timeline(timeline(on));
    let two = history(2, "1\t0/580000\tx\n");
    for following in [Following::Latest, number(2)] {
        check(&two, following, (1, 4), None);
        check(&two, following, (1, 5), Some((2, 5)));
        // It is past the fork already.
        check(&two, following, (1, 6), None);
        check(&two, following, (2, 5), None);
    }
    check(&two, number(1), (1, 5), None);
    check(&history(2, "1\t0/500000\tx\n"), Following::Latest, (1, 5), Some((2, 5)));
    check(&history(2, "1\t0/500000\tx\n"), Following::Latest, (1, 4), None);
    // Two forks in one segment: the newest timeline has it.
    let three = history(3, "1\t0/540000\tx\n2\t0/580000\tx\n");
    check(&three, Following::Latest, (1, 5), Some((3, 5)));
    check(&three, Following::Latest, (2, 5), Some((3, 5)));
    let apart = history(3, "1\t0/540000\tx\n2\t0/780000\tx\n");
    check(&apart, Following::Latest, (1, 5), Some((2, 5)));
    check(&apart, Following::Latest, (2, 7), Some((3, 7)));
    check(&apart, Following::Latest, (2, 5), None);
}

/// Stores that hold names without content.
struct Held {
    stores: Vec<Arc<dyn ObjectStore>>,
}

const SYSTEM: SystemIdentifier = SystemIdentifier::new(7);

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

impl Held {
    fn new() -> Self {
        let memory = |name: &str| Arc::new(MemoryStore::new(name.parse().unwrap())) as Arc<dyn ObjectStore>;
        Self { stores: ["a", "b"].map(memory).to_vec() }
    }

    async fn put(&self, store: usize, name: &str) {
        let fingerprint = format!("s{}", "0".repeat(32)).parse().unwrap();
        let key = key::wal(&cluster(), SYSTEM, &name.parse().unwrap(), &fingerprint);
        let _ = self.stores[store].put_new(&key, Body::Memory(Vec::new().into())).await.unwrap();
    }

    async fn put_history(&self, store: usize, name: &str, text: &str) {
        let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
        encoder.push(text.as_bytes()).unwrap();
        let facts = WalFacts {
            cluster: cluster(),
            system_identifier: SYSTEM,
            name: name.parse().unwrap(),
            node: "db1".parse().unwrap(),
            in_recovery: false,
            complete: true,
            logical_end: None,
            postgres_major: None,
            first_commit_time: None,
            last_commit_time: None,
            written: jiff::Timestamp::UNIX_EPOCH,
        };
        let wal = encoder.finish(facts).unwrap();
        let _ = crate::wal::put(&*self.stores[store], &wal, VariantCheck::Skip).await.unwrap();
    }

    async fn later(&self, on: u32, number: u64, following: Following) -> Result<Option<String>, Vec<String>> {
        let size = SegmentSize::from_bytes(MIB).unwrap();
        let later = later_wal(&self.stores, &cluster(), SYSTEM, segment(on, number), size, following).await;
        later.map(|found| found.map(|found| found.to_string()))
    }

    async fn expect(&self, (on, number): (u32, u64), following: Following, expected: Option<&str>) {
        let found = self.later(on, number, following).await.unwrap();
        assert_eq!(found.as_deref(), expected, "{on} {number} {following:?}");
    }
}

#[tokio::test]
async fn later_wal_of_the_timeline_is_found_in_any_store() {
    let held = Held::new();
    held.put(0, "000000010000000000000004").await;
    held.put(0, "000000010000000000000005.00000028.backup").await;
    held.put(0, "000000010000000000000006.partial").await;
    // Nothing tells that its line is theirs.
    held.put(1, "000000020000000000000009").await;
    held.expect((1, 3), Following::Latest, Some("000000010000000000000004")).await;
    held.expect((1, 4), Following::Latest, Some("000000010000000000000006.partial")).await;
    held.expect((1, 6), Following::Latest, None).await;
    held.put(1, "000000010000000000000007").await;
    held.expect((1, 6), Following::Latest, Some("000000010000000000000007")).await;
    held.expect((1, 7), Following::Latest, None).await;
    let (none, reasons) = followed_history(&held.stores, &cluster(), SYSTEM, Following::Latest).await;
    assert!(none.is_none() && reasons.is_empty(), "{reasons:?}");
}

#[tokio::test]
async fn the_hole_that_a_failover_left_is_a_gap_on_the_line_that_goes_on_behind_it() {
    let (held, two) = (Held::new(), Following::Timeline(timeline(2)));
    let beyond = Some("00000002000000000000001A");
    // The old primary archived 16 and died, with 17 to 19 received by the standby that was promoted in 1A.
    held.put(0, "000000010000000000000016").await;
    held.put_history(1, "00000002.history", "1\t0/1A80000\tx\n").await;
    held.expect((1, 0x17), Following::Latest, None).await;
    held.put(1, "00000002000000000000001A").await;
    for following in [Following::Latest, two] {
        for number in 0x17..=0x1A {
            held.expect((1, number), following, beyond).await;
        }
        held.expect((1, 0x1B), following, None).await;
        held.expect((2, 0x1A), following, None).await;
        // Its ancestor is asked for next.
        held.expect((2, 0x17), following, None).await;
    }
    let one = Following::Timeline(Timeline::FIRST);
    held.expect((1, 0x17), one, None).await;
    held.put(0, "00000001000000000000001A.partial").await;
    held.expect((1, 0x17), one, Some("00000001000000000000001A.partial")).await;
    held.expect((1, 0x1A), one, None).await;
    // A line that left timeline 1 earlier says nothing of what is behind that place.
    held.put_history(0, "00000003.history", "1\t0/1580000\tx\n").await;
    held.put(0, "000000030000000000000018").await;
    held.expect((1, 0x16), Following::Latest, Some("00000001000000000000001A.partial")).await;
    held.expect((1, 0x1A), Following::Latest, None).await;
    held.expect((1, 0x15), Following::Timeline(timeline(3)), Some("000000010000000000000016")).await;
}

#[tokio::test]
async fn of_several_ends_in_one_segment_the_pieces_are_no_later_wal() {
    let held = Held::new();
    held.put_history(0, "00000003.history", "1\t0/1740000\tx\n2\t0/1780000\tx\n").await;
    held.put(0, "000000010000000000000017.partial").await;
    held.put(0, "000000020000000000000017.partial").await;
    for on in 1..=3 {
        held.expect((on, 0x17), Following::Latest, None).await;
    }
    held.put(0, "000000030000000000000018").await;
    held.expect((1, 0x17), Following::Latest, Some("000000030000000000000018")).await;
}

#[cfg(feature = "testing")]
#[tokio::test]
async fn without_a_stores_answer_nothing_is_the_end() {
    use crate::stores::faulty::{Fault, FaultyStore, Operation};
    let mut held = Held::new();
    let faulty = Arc::new(FaultyStore::new(Arc::clone(&held.stores[1])));
    held.stores[1] = Arc::clone(&faulty) as Arc<dyn ObjectStore>;
    held.put(0, "000000010000000000000004").await;
    faulty.fail_all(Operation::List, Fault::Fail);
    held.expect((1, 3), Following::Latest, Some("000000010000000000000004")).await;
    assert!(held.later(1, 4, Following::Latest).await.is_err());
    faulty.heal();
    // A history that cannot be read may be that of the line.
    held.put_history(1, "00000002.history", "1\t0/1A80000\tx\n").await;
    faulty.fail_all(Operation::Get, Fault::Fail);
    assert!(held.later(1, 4, Following::Latest).await.is_err());
    held.expect((1, 4), Following::Timeline(Timeline::FIRST), None).await;
}
