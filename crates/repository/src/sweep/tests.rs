//! What a sweep removes, and what it leaves.

use std::sync::Arc;

use bytes::Bytes;
use postgres_format::WalFileName;

use super::*;
use crate::fingerprint::Fingerprint;
use crate::name::{BackupId, Generation};
use crate::root::{Condemned, PackRange, Pin, System, WalSpan};
use crate::store::{self, Put};
use crate::stores::memory::MemoryStore;

const SYSTEM: SystemIdentifier = SystemIdentifier::new(7);

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

fn id(random: u32) -> BackupId {
    BackupId::new(Timestamp::UNIX_EPOCH, random)
}

fn root() -> Root {
    let mut root = Root::empty(cluster(), "coordinator".parse().unwrap(), Timestamp::UNIX_EPOCH);
    root.systems.push(System::new(SYSTEM, None, Some(1 << 20), Timestamp::UNIX_EPOCH));
    root
}

async fn put(store: &dyn ObjectStore, key: &ObjectKey) {
    assert_eq!(store.put_new(key, Bytes::from_static(b"12345").into()).await.unwrap(), Put::Created);
}

async fn keys(store: &dyn ObjectStore) -> Vec<String> {
    store::list_all(store, "", 10_000).await.unwrap().into_iter().map(|entry| entry.key.to_string()).collect()
}

/// Packs and manifests of three identifiers, WAL of two timelines, and what is never removed.
async fn filled() -> Arc<MemoryStore> {
    let store = Arc::new(MemoryStore::new("memory".parse().unwrap()));
    for random in 1..=3 {
        put(&*store, &key::manifest(&cluster(), &id(random))).await;
        for pack in 0..4 {
            put(&*store, &key::pack(&cluster(), &id(random), pack)).await;
        }
    }
    let fingerprint: Fingerprint = "s00000000000000000000000000000001".parse().unwrap();
    let names = [
        "000000010000000000000001",
        "000000010000000000000002",
        "000000010000000000000002.00000028.backup",
        "000000010000000000000003",
        "000000010000000000000004.partial",
        "000000010000000000000004",
        "000000010000000000000005",
        "000000020000000000000001",
    ];
    for name in names {
        let name: WalFileName = name.parse().unwrap();
        put(&*store, &key::wal(&cluster(), SYSTEM, &name, &fingerprint)).await;
        put(&*store, &key::conflict(&cluster(), SYSTEM, &name, &fingerprint)).await;
        put(&*store, &key::decision(&cluster(), SYSTEM, &name, 0)).await;
    }
    put(&*store, &key::history(&cluster(), SYSTEM, "00000002.history".parse::<WalFileName>().unwrap().timeline()))
        .await;
    let root = Bytes::from(condemning().to_bytes().0);
    assert_eq!(store.put_new(&key::root(&cluster(), Generation::FIRST), root.into()).await.unwrap(), Put::Created);
    put(&*store, &key::repository_identity()).await;
    put(&*store, &ObjectKey::parse(&format!("{}p/later/000001", key::backup_prefix(&cluster(), &id(1)))).unwrap())
        .await;
    store
}

fn condemning() -> Root {
    let mut root = root();
    let some = vec![PackRange { first: 0, last: 1 }, PackRange { first: 3, last: u32::MAX }];
    let backups =
        vec![CondemnedBackup { backup: id(1), packs: None }, CondemnedBackup { backup: id(2), packs: Some(some) }];
    root.condemned = Some(Condemned { generation: Generation::FIRST, backups });
    let name = |text: &str| text.parse().unwrap();
    let also = WalSpan { first: name("000000010000000000000002"), last: name("000000010000000000000002") };
    root.systems[0].wal_kept = vec![WalKept { from: name("000000010000000000000005"), also: vec![also] }];
    root
}

#[tokio::test]
async fn what_was_condemned_goes_and_nothing_else() {
    let store = filled().await;
    let before = keys(&*store).await;
    assert_eq!(sweep(&*store, &root(), SWEEP_LIMIT).await.unwrap(), Swept::default());
    let weighed = weigh(&*store, &condemning(), SWEEP_LIMIT).await.unwrap();
    assert_eq!(keys(&*store).await, before);
    let swept = sweep(&*store, &condemning(), SWEEP_LIMIT).await.unwrap();
    assert_eq!(weighed, swept);
    let after = keys(&*store).await;
    let gone: Vec<&str> = before.iter().filter(|key| !after.contains(key)).map(String::as_str).collect();
    assert_eq!((swept.objects, swept.bytes, swept.retained, swept.more), (gone.len() as u64, 5 * 13, 0, false));
    insta::assert_snapshot!(gone.join("\n"));
    let again = sweep(&*store, &condemning(), SWEEP_LIMIT).await.unwrap();
    assert_eq!((again.objects, keys(&*store).await), (0, after));
}

#[tokio::test]
async fn what_a_root_names_is_not_swept_whatever_it_condemns() {
    let store = filled().await;
    let before = keys(&*store).await;
    let mut root = condemning();
    root.systems[0].wal_kept.clear();
    root.pins = vec![1, 2].into_iter().map(|n| Pin::new(id(n), None, root.writer.clone(), root.written)).collect();
    assert_eq!(sweep(&*store, &root, SWEEP_LIMIT).await.unwrap().objects, 0);
    assert_eq!(keys(&*store).await, before);
}

#[tokio::test]
async fn a_bounded_sweep_is_gone_on_with() {
    let store = filled().await;
    let first = sweep(&*store, &condemning(), 1).await.unwrap();
    assert!(first.more && first.objects > 0, "{first:?}");
    let rest = sweep(&*store, &condemning(), SWEEP_LIMIT).await.unwrap();
    assert_eq!((first.objects + rest.objects, rest.more), (13, false));
}

#[cfg(feature = "testing")]
#[tokio::test]
async fn what_the_store_keeps_is_counted_and_tried_again() {
    use crate::stores::faulty::{Fault, FaultyStore, Operation};
    let store = FaultyStore::new(filled().await);
    store.fail_nth(Operation::Delete, 2, Fault::Retain);
    let swept = sweep(&store, &condemning(), SWEEP_LIMIT).await.unwrap();
    assert_eq!((swept.objects, swept.retained), (12, 1));
    store.fail_nth(Operation::Delete, 1, Fault::LostReply);
    assert!(sweep(&store, &condemning(), SWEEP_LIMIT).await.is_err());
    let swept = sweep(&store, &condemning(), SWEEP_LIMIT).await.unwrap();
    assert_eq!((swept.objects, swept.retained), (0, 0), "it was removed although the answer was lost");
}

#[tokio::test]
async fn a_sweep_stops_when_the_root_it_goes_by_is_gone() {
    let store = filled().await;
    let first = sweep(&*store, &condemning(), 1).await.unwrap();
    assert!(first.more && first.objects > 0, "{first:?}");
    let before = keys(&*store).await;
    // Another root under the same number, and none.
    let other = Root { nonce: uuid::Uuid::from_u128(7), ..condemning() };
    let stopped = sweep(&*store, &other, SWEEP_LIMIT).await;
    assert!(matches!(stopped, Err(RootError::SetBack(SetBack { found: Some(Generation::FIRST), .. }))), "{stopped:?}");
    assert_eq!(keys(&*store).await, before);
    let _ = store.delete(&key::root(&cluster(), Generation::FIRST)).await.unwrap();
    let stopped = sweep(&*store, &condemning(), SWEEP_LIMIT).await;
    assert!(matches!(stopped, Err(RootError::SetBack(SetBack { found: None, .. }))), "{stopped:?}");
    assert_eq!(keys(&*store).await.len(), before.len() - 1);
}

#[cfg(feature = "testing")]
#[tokio::test]
async fn a_sweep_looks_for_its_root_before_each_few_removals() {
    use crate::stores::faulty::{FaultyStore, Operation};
    let store = FaultyStore::new(filled().await);
    for pack in 4..150 {
        put(&store, &key::pack(&cluster(), &id(1), pack)).await;
    }
    assert_eq!(sweep(&store, &condemning(), SWEEP_LIMIT).await.unwrap().objects, 13 + 146);
    // Three times for the first backup, once for the second, once for WAL.
    assert_eq!(store.calls(Operation::Get), 5);
}
