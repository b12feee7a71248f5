//! Tables of what is held back, and what listings tell of gaps.

use super::*;

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

#[tokio::test]
async fn histories_and_later_segments_are_found_in_any_store() {
    use crate::store::Body;
    use crate::stores::memory::MemoryStore;
    let (cluster, system): (ClusterName, _) = ("main".parse().unwrap(), SystemIdentifier::new(7));
    let store = |name: &str| -> Arc<dyn ObjectStore> { Arc::new(MemoryStore::new(name.parse().unwrap())) };
    let stores = [store("a"), store("b")];
    let fingerprint = format!("s{}", "0".repeat(32)).parse().unwrap();
    let put = async |store: usize, name: &str| {
        let key = key::wal(&cluster, system, &name.parse().unwrap(), &fingerprint);
        let _ = stores[store].put_new(&key, Body::Memory(Vec::new().into())).await.unwrap();
    };
    let later = async |number| later_segment(&stores, &cluster, system, segment(1, number)).await.unwrap();
    put(0, "000000010000000000000004").await;
    put(0, "000000010000000000000005.partial").await;
    put(0, "000000010000000000000005.00000028.backup").await;
    put(1, "000000020000000000000009").await;
    assert_eq!(later(3).await, Some(segment(1, 4)));
    assert_eq!(later(4).await, None);
    put(1, "000000010000000000000007").await;
    assert_eq!(later(4).await, Some(segment(1, 7)));
    assert_eq!(later(7).await, None);
    let (none, reasons) = followed_history(&stores, &cluster, system, Following::Latest).await;
    assert!(none.is_none() && reasons.is_empty(), "{reasons:?}");
}
