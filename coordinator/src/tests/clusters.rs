//! Creating clusters: the only thing that starts in an empty store.

use repository::identity::{self, RepositoryIdentity};
use repository::name::Generation;
use repository::stores::faulty::{Fault, Operation};
use repository::{key, root};
use uuid::Uuid;

use super::*;

#[tokio::test]
async fn a_cluster_is_created_once_in_every_store() {
    let rig = Rig::start(memory(&["repo1", "s3"]), Ack::All).await;
    assert!(matches!(rig.health(0), Health::Empty { expected: false }));
    assert_eq!(reason(&rig.push(&wal(&segment(1), "a", "one")).await.unwrap_err()), "CLUSTER_UNKNOWN");
    let created = rig.create("main").await.unwrap();
    assert_eq!(created.stores_initialised, ["repo1", "s3"]);
    let again = rig.create("main").await.unwrap();
    assert_eq!((again.stores_initialised.len(), again.stores_known), (0, vec!["repo1".to_owned(), "s3".to_owned()]));
    let mut other = CreateClusterRequest { cluster: "main".to_owned(), system_identifier: 5 };
    let status = rig.operator().await.create_cluster(other.clone()).await.unwrap_err();
    assert_eq!(reason(&status), "NOT_CREATED");
    other.system_identifier = 0;
    other.cluster = "nobody".to_owned();
    assert_eq!(reason(&rig.operator().await.create_cluster(other).await.unwrap_err()), "NOT_CREATED");
    let identities = [
        identity::read(&*rig.stores[0]).await.unwrap().unwrap().repository,
        identity::read(&*rig.stores[1]).await.unwrap().unwrap().repository,
    ];
    assert_eq!(identities[0], identities[1]);
    let root = root::newest(&*rig.stores[1], &"main".parse().unwrap()).await.unwrap().unwrap();
    assert_eq!((root.generation.get(), root.systems.len()), (1, 1));
    rig.end().await;
}

#[tokio::test]
async fn a_crash_between_identity_and_root_is_finished_by_repeating() {
    let stores = memory(&["repo1", "s3"]);
    let identity = RepositoryIdentity::new(Uuid::from_u128(5), now());
    let _ = identity::create(&*stores[1], &identity).await.unwrap();
    let rig = Rig::start(stores, Ack::All).await;
    assert!(matches!(rig.health(0), Health::Empty { expected: true }));
    assert_eq!(rig.health(1), Health::Healthy);
    assert_eq!(rig.create("main").await.unwrap().stores_initialised.len(), 2);
    assert_eq!(identity::read(&*rig.stores[0]).await.unwrap().unwrap().repository, Uuid::from_u128(5));
    rig.end().await;
}

#[tokio::test]
async fn a_store_created_while_it_is_looked_at_is_not_refused() {
    let rig = Rig::start(memory(&["repo1"]), Ack::All).await;
    let asked = rig.stores[0].calls(Operation::List);
    rig.stores[0].fail_nth(Operation::List, 1, Fault::Delay(Duration::from_millis(300)));
    let stores = rig.coordinator.stores.clone();
    let looking = tokio::spawn(async move { stores.check().await });
    wait_until("the look finds no identity", async || rig.stores[0].calls(Operation::List) > asked).await;
    rig.create("main").await.unwrap();
    looking.await.unwrap();
    assert_eq!(rig.health(0), Health::Healthy);
    rig.end().await;
}

#[tokio::test]
async fn a_store_with_nothing_but_probes_becomes_a_repository() {
    let stores = memory(&["repo1", "s3"]);
    for name in ["1-a", "2-b"] {
        let probe = key::probe(name).unwrap();
        let _ = stores[1].put_new(&probe, bytes::Bytes::from_static(b"probe").into()).await.unwrap();
    }
    let rig = Rig::start(stores, Ack::All).await;
    assert!(matches!(rig.health(1), Health::Empty { expected: false }));
    assert_eq!(rig.create("main").await.unwrap().stores_initialised, ["repo1", "s3"]);
    rig.end().await;
    let stores = memory(&["s3"]);
    for key in [key::probe("1-a").unwrap(), key::root(&"main".parse().unwrap(), Generation::FIRST)] {
        let _ = stores[0].put_new(&key, bytes::Bytes::from_static(b"something").into()).await.unwrap();
    }
    let rig = Rig::start(stores, Ack::All).await;
    assert!(matches!(rig.health(0), Health::Refused { .. }));
    rig.end().await;
}

#[tokio::test]
async fn a_new_repository_needs_every_store_there() {
    let stores = memory(&["repo1", "s3"]);
    stores[1].fail_everything(Fault::Fail);
    let rig = Rig::start(stores, Ack::All).await;
    let status = rig.create("main").await.unwrap_err();
    assert_eq!(reason(&status), "NOT_CREATED");
    assert!(status.message().contains("s3"), "{status}");
    assert_eq!(identity::read(&*rig.stores[0]).await.unwrap(), None);
    rig.end().await;
}

#[tokio::test]
async fn a_cluster_is_not_called_unknown_while_stores_are_away() {
    let rig = Rig::with_cluster(Ack::All).await;
    let stores = rig.stores.clone();
    rig.end().await;
    stores.iter().for_each(|store| store.fail_everything(Fault::Fail));
    let rig = Rig::start(stores, Ack::All).await;
    assert_eq!(reason(&rig.push(&wal(&segment(1), "a", "one")).await.unwrap_err()), "NO_STORE");
    rig.end().await;
}

#[tokio::test]
async fn a_foreign_store_is_refused_and_stays_what_it_was() {
    let stores = memory(&["repo1", "s3", "third"]);
    for (store, repository) in [(0, 5), (1, 6), (2, 5)] {
        let identity = RepositoryIdentity::new(Uuid::from_u128(repository), now());
        let _ = identity::create(&*stores[store], &identity).await.unwrap();
    }
    let rig = Rig::start(stores, Ack::All).await;
    assert!(matches!(rig.health(1), Health::Refused { .. }));
    assert_eq!(rig.health(2), Health::Healthy);
    assert_eq!(reason(&rig.create("main").await.unwrap_err()), "NOT_CREATED");
    rig.end().await;
}

#[tokio::test]
async fn a_replaced_disk_joins_and_is_filled() {
    let rig = Rig::with_cluster(Ack::All).await;
    for number in 1..4 {
        rig.push(&wal(&segment(number), "a", "content")).await.unwrap();
    }
    let survivor = rig.stores[1].clone();
    rig.end().await;
    let stores = vec![memory(&["repo1"]).remove(0), survivor];
    let rig = Rig::start(stores, Ack::All).await;
    assert!(matches!(rig.health(0), Health::Empty { expected: true }));
    // Archiving goes on without it, and it is not started in by itself.
    rig.push(&wal(&segment(4), "a", "content")).await.unwrap();
    rig.pass().await;
    assert_eq!(reason(&rig.create("second").await.unwrap_err()), "NOT_CREATED");
    assert_eq!(identity::read(&*rig.stores[0]).await.unwrap(), None);
    assert_eq!(rig.create("main").await.unwrap().stores_initialised, ["repo1"]);
    rig.pass().await;
    assert_eq!(rig.wal_keys(0).await, rig.wal_keys(1).await);
    assert_eq!(rig.wal_keys(0).await.len(), 4);
    assert_eq!(rig.missing().await, 0);
    rig.end().await;
}
