//! Fetching from several stores that hold unlike things.

use std::time::Duration;

use tokio::time::Instant;

use super::*;
use crate::stores::faulty::{Fault, FaultyStore, Operation};

struct Rig {
    stores: Vec<Arc<FaultyStore>>,
    target: tempfile::TempDir,
    silences: Silences,
}

impl Rig {
    fn new(names: &[&str]) -> Self {
        let faulty = |name: &&str| Arc::new(FaultyStore::new(store(name)));
        let (stores, target) = (names.iter().map(faulty).collect(), tempfile::tempdir().unwrap());
        Self { stores, target, silences: Silences::default() }
    }

    async fn put(&self, place: usize, wal: &EncodedWal) {
        // A second content is what these tests are about; it is kept all the same.
        let _ = put(&*self.stores[place], wal, VariantCheck::Skip).await.unwrap();
    }

    async fn decide(&self, place: usize, wal: &EncodedWal) {
        let decision =
            Decision { format: 1, fingerprint: wal.fingerprint, reason: "checked".to_owned(), written: now() };
        decide(&*self.stores[place], &cluster(), SYSTEM, &SEGMENT.parse().unwrap(), &decision).await.unwrap();
    }

    async fn fetch(&self) -> Fetched {
        let stores: Vec<Arc<dyn ObjectStore>> =
            self.stores.iter().map(|store| Arc::clone(store) as Arc<dyn ObjectStore>).collect();
        let (name, path) = (SEGMENT.parse().unwrap(), self.path());
        let fetched = fetch_remembering(&self.silences, &stores, &cluster(), SYSTEM, &name, &path).await;
        assert_eq!(matches!(fetched, Fetched::Written { .. }), path.exists());
        fetched
    }

    fn path(&self) -> std::path::PathBuf {
        self.target.path().join("RECOVERYXLOG")
    }

    async fn expect_from(&self, name: &str, content: &[u8]) {
        let fetched = self.fetch().await;
        assert!(matches!(&fetched, Fetched::Written { store, .. } if store.as_str() == name), "{fetched:?}");
        assert!(std::fs::read(self.path()).unwrap() == content, "other content");
        std::fs::remove_file(self.path()).unwrap();
    }

    async fn expect_unknown(&self, part: &str) {
        let fetched = self.fetch().await;
        let Fetched::Unknown { reasons } = &fetched else { panic!("{fetched:?}") };
        assert!(reasons.iter().any(|reason| reason.contains(part)), "{part} in {reasons:?}");
    }
}

#[tokio::test]
async fn a_conflict_that_only_the_second_store_shows_is_served_to_nobody() {
    let (first, second) = (encode(SEGMENT, &content(1, MIB)), encode(SEGMENT, &content(2, MIB)));
    // Either both contents are in the second store, or each store has one of them.
    for both in [true, false] {
        let rig = Rig::new(&["repo1", "s3"]);
        rig.put(0, &first).await;
        rig.put(1, &second).await;
        if both {
            rig.put(1, &first).await;
        }
        rig.expect_unknown("in conflict").await;
        // A choice written in one store is a choice.
        rig.decide(1, &first).await;
        rig.expect_from("repo1", &content(1, MIB)).await;
        rig.decide(1, &second).await;
        rig.expect_from("s3", &content(2, MIB)).await;
        rig.decide(0, &first).await;
        rig.decide(0, &first).await;
        rig.expect_unknown("unlike choices").await;
        rig.decide(0, &first).await;
        rig.expect_from("repo1", &content(1, MIB)).await;
    }
}

#[tokio::test]
async fn a_complete_segment_in_the_second_store_beats_an_incomplete_one_in_the_first() {
    let whole = complete(&content(9, MIB), START + MIB as u64);
    let rig = Rig::new(&["repo1", "s3"]);
    rig.put(0, &incomplete(&tail(1000), START + 1000)).await;
    assert_eq!(rig.fetch().await, Fetched::Absent);
    rig.put(1, &incomplete(&tail(5000), START + 5000)).await;
    assert_eq!(rig.fetch().await, Fetched::Absent);
    rig.put(1, &whole).await;
    rig.expect_from("s3", &content(9, MIB)).await;
    // A fork of the WAL in the other store excludes it.
    let mut forked = tail(5000);
    forked[4000] ^= 1;
    rig.put(0, &incomplete(&forked, START + 5000)).await;
    rig.expect_unknown("in conflict").await;
}

#[tokio::test]
async fn the_chosen_content_comes_from_the_first_store_that_has_it_whole() {
    let wal = encode(SEGMENT, &content(1, MIB));
    let rig = Rig::new(&["repo1", "s3"]);
    rig.put(0, &wal).await;
    rig.put(1, &wal).await;
    rig.stores[0].fail_all(Operation::Get, Fault::FlippedBit);
    rig.expect_from("s3", &content(1, MIB)).await;
    rig.stores[1].fail_all(Operation::Get, Fault::Fail);
    rig.expect_unknown("repo1").await;
    rig.stores[0].heal();
    rig.stores[1].fail_everything(Fault::Fail);
    rig.expect_from("repo1", &content(1, MIB)).await;
    rig.stores[0].fail_everything(Fault::Refuse);
    rig.stores[1].heal();
    rig.expect_from("s3", &content(1, MIB)).await;
}

#[tokio::test]
async fn absence_takes_an_answer_of_every_store() {
    let rig = Rig::new(&["repo1", "s3"]);
    rig.stores[1].fail_everything(Fault::Fail);
    rig.expect_unknown("s3").await;
    rig.stores[1].heal();
    assert_eq!(rig.fetch().await, Fetched::Absent);
}

#[tokio::test]
async fn a_hung_store_is_waited_for_once_and_not_for_each_file() {
    let file = content(1, 8192);
    let wal = encode(SEGMENT, &file);
    let rig = Rig::new(&["repo1", "s3"]);
    rig.put(1, &wal).await;
    rig.stores[0].fail_everything(Fault::Hang(Duration::from_secs(60)));
    let begun = Instant::now();
    rig.expect_from("s3", &file).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // Far less than the patience each.
    let begun = Instant::now();
    for _ in 0..10 {
        rig.expect_from("s3", &file).await;
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_fetch_waits_for_the_slowest_listing_and_asks_no_more_than_before() {
    let file = content(1, 8192);
    let wal = encode(SEGMENT, &file);
    let alone = Rig::new(&["repo1"]);
    alone.put(0, &wal).await;
    alone.expect_from("repo1", &file).await;
    let calls = |operation| alone.stores[0].calls(operation);
    assert_eq!((calls(Operation::List), calls(Operation::Head), calls(Operation::Get)), (2, 0, 1));
    // All listings of four stores run at the same time.
    let rig = Rig::new(&["repo1", "repo2", "s3", "s4"]);
    for place in 0..4 {
        rig.put(place, &wal).await;
        rig.stores[place].fail_all(Operation::List, Fault::Delay(Duration::from_secs(1)));
    }
    let begun = Instant::now();
    rig.expect_from("repo1", &file).await;
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!(rig.stores[1].calls(Operation::Get), 0);
}

#[tokio::test]
async fn a_fetch_that_nobody_waits_for_ends_and_leaves_nothing() {
    let rig = Rig::new(&["s3"]);
    rig.put(0, &encode(SEGMENT, &content(1, MIB))).await;
    rig.stores[0].fail_all(Operation::Get, Fault::Delay(Duration::from_secs(3600)));
    assert!(!rig.silences.heard_within(Duration::from_secs(60)));
    let begun = async |there: bool| {
        while rig.path().exists() != there {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        fetched = rig.fetch() => panic!("{fetched:?}"),
        () = begun(true) => {}
    }
    tokio::time::timeout(Duration::from_secs(10), begun(false)).await.unwrap();
    // What it listed was an answer.
    assert!(rig.silences.heard_within(Duration::from_secs(60)));
}
