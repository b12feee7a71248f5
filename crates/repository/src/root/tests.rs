//! Tests of root commits: the history, races, lost answers, and a museum of damaged roots.

mod edits;
mod lag;
mod marks;
mod takeover;

use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::history::newest_generation;
use super::*;
use crate::key::{self, ObjectKey};
use crate::name::StoreName;
use crate::store::{Body, ByteRange, ByteStream, ListPage, ObjectStore, Put, Room, StoreError};
use crate::stores::memory::MemoryStore;

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

fn writer() -> NodeName {
    "coordinator".parse().unwrap()
}

fn now() -> Timestamp {
    "2026-11-23T04:00:00Z".parse().unwrap()
}

fn store() -> MemoryStore {
    MemoryStore::new("repo1".parse().unwrap())
}

fn backup(random: u32) -> RootBackup {
    let text = format!(
        r#"{{"backup":"20261123T010203Z-{random:08x}","manifest_sha256":"{}","manifest_size":1000,
        "system_identifier":"7300000000000000001","postgres_major":15,"segment_size_bytes":16777216,
        "start_timeline":1,"start_lsn":"0/2000028","start_time":"2026-11-23T01:02:03Z",
        "stop_timeline":1,"stop_lsn":"0/2000138","stop_time":"2026-11-23T01:03:00Z","min_recovery_point":null,
        "node":"db2","from_standby":false,"label":"nightly","files":900,"data_bytes":31457280,
        "stored_bytes":9437184,"packs":1,"page_errors":0}}"#,
        "07".repeat(32)
    );
    RootBackup::from_json(&text).unwrap()
}

async fn publish(store: &dyn ObjectStore, backup: RootBackup) -> Result<Root, RootError> {
    commit(store, &cluster(), &writer(), now(), |root| root.with_backup(backup.clone())).await
}

#[tokio::test]
async fn generations_follow_each_other() {
    let store = store();
    assert_eq!(newest(&store, &cluster()).await.unwrap(), None);
    assert_eq!(verify_history(&store, &cluster()).await.unwrap(), None);
    for random in [3, 1, 2] {
        publish(&store, backup(random)).await.unwrap();
    }
    let root = newest(&store, &cluster()).await.unwrap().unwrap();
    assert_eq!(root.generation.get(), 3);
    let order: Vec<BackupId> = root.backups.iter().map(|backup| backup.backup).collect();
    assert!(order.is_sorted() && order.len() == 3);
    assert_eq!(verify_history(&store, &cluster()).await.unwrap(), Some(root.generation));
}

#[tokio::test]
async fn what_changes_nothing_commits_nothing() {
    let store = store();
    publish(&store, backup(1)).await.unwrap();
    assert_eq!(publish(&store, backup(1)).await.unwrap().generation, Generation::FIRST);
    let mut other = backup(1);
    other.files += 1;
    assert!(matches!(publish(&store, other).await, Err(RootError::Refused { .. })));
}

#[tokio::test]
async fn a_cluster_may_be_created_with_nothing_else() {
    let store = store();
    let system = System::new(SystemIdentifier::new(7), None, None, now());
    let with = |system: System| {
        let store = &store;
        async move { commit(store, &cluster(), &writer(), now(), |root| root.with_system(system.clone())).await }
    };
    assert_eq!(with(system.clone()).await.unwrap().generation.get(), 1);
    assert_eq!(with(system.clone()).await.unwrap().generation.get(), 1);
    let sized = System { segment_size_bytes: Some(1 << 20), postgres_major: Some(15), ..system.clone() };
    let root = with(sized.clone()).await.unwrap();
    assert_eq!((root.generation.get(), root.systems.len()), (2, 1));
    let other = System { segment_size_bytes: Some(1 << 24), ..sized };
    assert!(matches!(with(other).await, Err(RootError::Refused { .. })));
}

#[tokio::test]
async fn long_histories_are_searched() {
    for length in [1u64, 2, 999, 1000, 1001, 1002, 2001, 4099] {
        let store = store();
        for generation in 1..=length {
            let key = key::root(&cluster(), Generation::new(generation).unwrap());
            let _ = store.put_new(&key, Bytes::new().into()).await.unwrap();
        }
        let found = newest_generation(&store, &cluster()).await.unwrap();
        assert_eq!(found.map(Generation::get), Some(length));
    }
}

#[tokio::test]
async fn racing_writers_all_get_in() {
    let store = std::sync::Arc::new(store());
    let racers = (0..8).map(|random| {
        let store = store.clone();
        tokio::spawn(async move { publish(store.as_ref(), backup(random)).await.map(|_| ()) })
    });
    for racer in racers.collect::<Vec<_>>() {
        racer.await.unwrap().unwrap();
    }
    let root = newest(store.as_ref(), &cluster()).await.unwrap().unwrap();
    assert_eq!((root.backups.len(), root.generation.get()), (8, 8));
}

/// A store that does what it is asked and then says it did not answer, or does nothing and says so.
#[derive(Debug)]
struct LostAnswers {
    store: MemoryStore,
    puts: AtomicU32,
    lost_after: u32,
    lost_before: u32,
}

#[async_trait]
impl ObjectStore for LostAnswers {
    fn name(&self) -> &StoreName {
        self.store.name()
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        let number = self.puts.fetch_add(1, Ordering::Relaxed);
        let lost = || StoreError::Timeout { store: self.name().clone(), operation: "put" };
        if number < self.lost_before {
            return Err(lost());
        }
        let put = self.store.put_new(key, body).await;
        if number < self.lost_before + self.lost_after { Err(lost()) } else { put }
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        self.store.get(key, range).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        self.store.head(key).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        self.store.list(prefix, start_after, limit).await
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        self.store.room().await
    }
}

#[tokio::test]
async fn a_lost_answer_is_found_out() {
    let check = async |lost_before: u32, lost_after: u32| {
        let store = LostAnswers { store: store(), puts: AtomicU32::new(0), lost_after, lost_before };
        let committed = publish(&store, backup(1)).await;
        let root = newest(&store, &cluster()).await.unwrap();
        (committed.map(|root| root.nonce), root)
    };
    for (before, after) in [(0, 1), (1, 0), (2, 0), (1, 1)] {
        let (committed, root) = check(before, after).await;
        let root = root.unwrap();
        assert_eq!((committed.unwrap(), root.generation.get()), (root.nonce, 1), "{before} {after}");
    }
    let (committed, root) = check(9, 0).await;
    assert!(matches!(committed, Err(RootError::Unknown { .. })) && root.is_none());
}

#[tokio::test]
async fn what_newer_versions_added_is_kept() {
    let store = store();
    let root = publish(&store, backup(1)).await.unwrap();
    let mut newer = root.clone();
    newer.generation = newer.generation.next().unwrap();
    newer.unknown.insert("grants".to_owned(), serde_json::json!([{"b": 1, "a": 2}]));
    newer.backups[0].unknown.insert("pinned".to_owned(), serde_json::json!(true));
    let _ =
        store.put_new(&key::root(&cluster(), newer.generation), Bytes::from(newer.to_bytes().0).into()).await.unwrap();
    let root = publish(&store, backup(2)).await.unwrap();
    assert_eq!(root.unknown, newer.unknown);
    assert_eq!(root.backups[0].unknown, newer.backups[0].unknown);
    let text = String::from_utf8(root.to_bytes().0).unwrap();
    assert!(text.contains(r#""grants":[{"a":2,"b":1}]"#), "{text}");
}

#[test]
fn entries_travel_as_canonical_text() {
    let entry = backup(1);
    let text = entry.to_json();
    assert_eq!(RootBackup::from_json(&text).unwrap(), entry);
    assert!(text.starts_with(r#"{"backup":"20261123T010203Z-00000001","data_bytes":31457280,"#), "{text}");
}

/// What the reader says about roots that somebody damaged.
#[test]
fn museum() {
    let mut root = Root::empty(cluster(), writer(), now());
    root.backups.push(backup(1));
    let whole = root.to_bytes().0;
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x04;
        bytes
    };
    let written = |change: fn(&mut Root)| {
        let mut root = root.clone();
        change(&mut root);
        root.to_bytes().0
    };
    let text = br#"{"format":1,"generation":0}"#;
    let digest = crate::digest::to_hex(&crate::digest::sha256(text));
    let foreign = [PREFIX, text, MIDDLE, digest.as_bytes(), SUFFIX].concat();
    let exhibits: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("cut", whole[..whole.len() - 1].to_vec()),
        ("more after the end", [&whole[..], b"\n"].concat()),
        ("bit flipped in the text", flipped(100)),
        ("bit flipped in the digest", flipped(whole.len() - 10)),
        ("bit flipped in the frame", flipped(3)),
        ("unknown format", written(|root| root.format = 2)),
        ("unknown critical field", written(|root| root.critical = vec!["grants".to_owned()])),
        ("whole and no root", foreign),
    ];
    let mut diagnoses = String::new();
    for (name, bytes) in exhibits {
        let diagnosis = match Root::from_bytes(&bytes) {
            Ok(_) => "WHOLE".to_owned(),
            Err(error) => error.to_string(),
        };
        diagnoses.push_str(&format!("{name}: {diagnosis}\n"));
    }
    insta::assert_snapshot!(diagnoses);
    assert_eq!(Root::from_bytes(&whole).unwrap().0, root);
}

#[tokio::test]
async fn a_root_under_another_key_is_refused() {
    let store = store();
    let root = Root::empty("other".parse().unwrap(), writer(), now());
    let key = key::root(&cluster(), Generation::FIRST);
    let _ = store.put_new(&key, Bytes::from(root.to_bytes().0).into()).await.unwrap();
    assert!(matches!(newest(&store, &cluster()).await, Err(RootError::Damaged { .. })));
}

#[tokio::test]
async fn a_rewritten_history_is_noticed() {
    let store = store();
    let first = publish(&store, backup(1)).await.unwrap();
    let mut second = Root { generation: first.generation.next().unwrap(), ..first.clone() };
    second.previous_sha256 = Some([1; 32]);
    let key = key::root(&cluster(), second.generation);
    let _ = store.put_new(&key, Bytes::from(second.to_bytes().0).into()).await.unwrap();
    assert!(matches!(verify_history(&store, &cluster()).await, Err(RootError::Damaged { .. })));
}
