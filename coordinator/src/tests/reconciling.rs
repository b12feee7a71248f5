//! What came by the direct road, what stores lack, and the catalog made anew.

use repository::stores::faulty::{Fault, Operation};

use super::*;

#[tokio::test]
async fn direct_writes_are_adopted_once_and_copied() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    // Out of order, as parallel uploads come.
    for number in [4, 2, 3] {
        put_directly(&rig.stores[1], &wal(&segment(number), "a", "direct")).await;
    }
    put_directly(&rig.stores[1], &history(2, "b")).await;
    put_directly(&rig.stores[1], &wal("000000020000000000000004", "b", "new line")).await;
    rig.pass().await;
    assert_eq!(rig.wal_keys(0).await, rig.wal_keys(1).await);
    assert_eq!(rig.wal_keys(0).await.len(), 6);
    assert_eq!(rig.coordinator.metrics.reconcile_adopted.get(), 5);
    rig.pass().await;
    assert_eq!(rig.coordinator.metrics.reconcile_adopted.get(), 5);
    assert_eq!(rig.missing().await, 0);
    // The writer of the new timeline is known from what was adopted.
    assert_eq!(reason(&rig.push(&wal("000000020000000000000005", "a", "x")).await.unwrap_err()), "FOREIGN_WRITER");
    rig.push(&wal("000000020000000000000005", "b", "x")).await.unwrap();
    rig.end().await;
}

#[tokio::test]
async fn a_store_that_comes_back_is_filled_and_nodes_are_told() {
    let rig = Rig::with_cluster(Ack::All).await;
    let mut agent = rig.connect("a", primary(1)).await;
    rig.stores[0].fail_everything(Fault::Fail);
    for number in 1..=5 {
        rig.push(&wal(&segment(number), "a", "content")).await.unwrap();
    }
    assert_eq!(rig.missing().await, 5);
    rig.stores[0].heal();
    rig.coordinator.stores.check().await;
    assert_eq!(rig.health(0), Health::Healthy);
    rig.pass().await;
    assert_eq!(rig.missing().await, 0);
    assert_eq!(rig.wal_keys(0).await, rig.wal_keys(1).await);
    let mut told = Vec::new();
    while told.len() < 5 {
        let spread = agent.hear(|message| match message {
            session_response::Message::WalSpread(spread) => Some(spread.objects),
            _ => None,
        });
        told.extend(spread.await);
    }
    // Copies run side by side and end in any order.
    told.sort();
    let files: Vec<&str> = told.iter().filter_map(|object| object.split('.').next()).collect();
    assert_eq!(files, (1..=5).map(segment).collect::<Vec<_>>());
    drop(agent);
    rig.end().await;
}

#[tokio::test]
async fn a_deleted_catalog_is_rebuilt_to_the_same_report() {
    let rig = Rig::with_cluster(Ack::All).await;
    for number in 1..=3 {
        rig.push(&wal(&segment(number), "a", "content")).await.unwrap();
    }
    rig.push(&history(2, "b")).await.unwrap();
    put_directly(&rig.stores[1], &wal("000000020000000000000004", "b", "direct")).await;
    rig.pass().await;
    let before = rig.info().await;
    let mut operator = rig.operator().await;
    let rebuilt = operator.rebuild_catalog(proto::operator::RebuildCatalogRequest {}).await.unwrap().into_inner();
    assert_eq!((rebuilt.wal_objects, rebuilt.backups), (5, 0));
    // Archiving goes on from the catalog alone when the next start finds every store away.
    let rows = rig.coordinator.catalog.call(|connection| crate::catalog::clusters::all(connection)).await.unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rig.info().await, before);
    let rig = rig.reborn(Ack::All).await;
    assert_eq!(rig.info().await, before);
    assert_eq!(before["clusters"][0]["stores"][0]["wal_objects"], 4);
    rig.push(&wal(&segment(4), "a", "content")).await.unwrap();
    rig.end().await;
}

#[tokio::test]
async fn what_came_while_there_was_no_coordinator_is_copied_after_a_rebuild() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    let stores = rig.stores.clone();
    rig.end().await;
    put_directly(&stores[1], &wal(&segment(2), "a", "two")).await;
    put_directly(&stores[0], &wal(&segment(3), "a", "three")).await;
    let rig = Rig::start(stores, Ack::All).await;
    assert_eq!(rig.missing().await, 2);
    rig.pass().await;
    assert_eq!(rig.missing().await, 0);
    assert_eq!(rig.wal_keys(0).await.len(), 3);
    assert_eq!(rig.wal_keys(0).await, rig.wal_keys(1).await);
    rig.end().await;
}

#[tokio::test]
async fn a_damaged_copy_is_not_spread() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    put_directly(&rig.stores[1], &wal(&segment(2), "a", "two")).await;
    rig.stores[1].fail_all(Operation::Get, Fault::FlippedBit);
    rig.pass().await;
    assert_eq!(rig.wal_keys(0).await.len(), 1);
    assert_eq!(rig.coordinator.metrics.reconcile_damaged.get(), 1);
    rig.pass().await;
    assert_eq!(rig.coordinator.metrics.reconcile_damaged.get(), 1, "said once");
    rig.stores[1].heal();
    rig.pass().await;
    assert_eq!(rig.wal_keys(0).await.len(), 2);
    rig.end().await;
}

#[tokio::test]
async fn two_contents_of_the_direct_road_and_ours_are_a_conflict_in_both_stores() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    // A stranger writes beside the coordinator.
    let stranger = wal(&segment(1), "b", "two");
    wal::put(&*rig.stores[1], &stranger, VariantCheck::Skip).await.unwrap();
    rig.pass().await;
    assert!(rig.coordinator.metrics.wal_conflicts.get() > 0);
    assert_eq!(rig.wal_keys(0).await.len(), 2);
    assert_eq!(rig.info().await["clusters"][0]["conflicts"].as_array().unwrap().len(), 2);
    rig.end().await;
}

#[tokio::test]
async fn of_two_that_wrote_a_timeline_by_the_direct_road_the_newest_object_says_who_writes() {
    let rig = Rig::with_cluster(Ack::All).await;
    put_directly(&rig.stores[1], &history(2, "b")).await;
    // The loser got one file in, whatever its fingerprint sorts like.
    for content in ["loser", "another", "third"] {
        let stranger = wal("000000020000000000000004", "c", content);
        wal::put(&*rig.stores[1], &stranger, VariantCheck::Skip).await.unwrap();
    }
    for number in 4..=7 {
        let own = wal(&format!("00000002000000000000000{number}"), "b", "right");
        wal::put(&*rig.stores[1], &own, VariantCheck::Skip).await.unwrap();
    }
    rig.pass().await;
    assert_eq!(reason(&rig.push(&wal("000000020000000000000008", "c", "x")).await.unwrap_err()), "FOREIGN_WRITER");
    rig.push(&wal("000000020000000000000008", "b", "x")).await.unwrap();
    rig.end().await;
}

#[tokio::test]
async fn a_rebuild_is_seen_by_nobody_before_it_is_whole() {
    let rig = Rig::with_cluster(Ack::All).await;
    for number in 1..=5 {
        rig.push(&wal(&segment(number), "a", "content")).await.unwrap();
    }
    // Objects that vanished from both stores are known until the end.
    let vanished = wal(&segment(9), "a", "vanished");
    let row = crate::archive_service::row(&vanished.header, 7);
    rig.coordinator
        .catalog
        .call(move |connection| crate::catalog::wal::note_stored(connection, &row, &[], &[]))
        .await
        .unwrap();
    rig.stores[0].fail_all(Operation::List, Fault::Delay(Duration::from_millis(50)));
    let count =
        async || rig.coordinator.catalog.call(|connection| crate::catalog::wal::count(connection)).await.unwrap();
    let rebuilding = tokio::spawn({
        let mut operator = rig.operator().await;
        async move { operator.rebuild_catalog(proto::operator::RebuildCatalogRequest {}).await.unwrap().into_inner() }
    });
    let mut seen = Vec::new();
    let mut number = 6;
    while !rebuilding.is_finished() {
        // A stranger finds the writer at any moment, and who writes finds itself.
        let stranger = rig.push(&wal(&segment(20), "b", "stranger")).await.unwrap_err();
        assert_eq!(reason(&stranger), "FOREIGN_WRITER");
        rig.push(&wal(&segment(number), "a", "content")).await.unwrap();
        seen.push(count().await);
        number += 1;
    }
    let rebuilt = rebuilding.await.unwrap();
    assert!(seen.len() > 1 && seen.iter().all(|count| *count >= 5), "{seen:?}");
    wait_until("what came meanwhile is known, what vanished is not", async || count().await == u64::from(number) - 1)
        .await;
    assert!(rebuilt.wal_objects >= 5);
    rig.pass().await;
    assert_eq!(rig.missing().await, 0);
    rig.end().await;
}

#[tokio::test]
async fn a_rebuild_replaces_nothing_when_a_store_is_away_or_fails_while_it_is_listed() {
    let rig = Rig::start(memory(&["s3"]), Ack::All).await;
    rig.create("main").await.unwrap();
    for number in 1..=3 {
        rig.push(&wal(&segment(number), "a", "content")).await.unwrap();
    }
    let store = &rig.stores[0];
    let everything = crate::reconcile::plan::Scope::Everything;
    let count =
        async || rig.coordinator.catalog.call(|connection| crate::catalog::wal::count(connection)).await.unwrap();
    let rebuild = async || rig.operator().await.rebuild_catalog(proto::operator::RebuildCatalogRequest {}).await;
    let before = store.calls(Operation::List);
    rebuild().await.unwrap();
    let calls = store.calls(Operation::List) - before;
    let mut refused = 0;
    for call in 1..=calls {
        store.fail_nth(Operation::List, call, Fault::Fail);
        if let Err(status) = rebuild().await {
            assert_eq!(reason(&status), "STORE_FAILED");
            assert!(status.message().contains("s3"), "{status}");
            refused += 1;
        }
        assert_eq!(count().await, 3, "failed at listing {call} of {calls}");
        store.heal();
        rig.coordinator.stores.check().await;
    }
    assert!(refused >= 2, "{refused} of {calls}");
    // What a rebuild did not see after all, the loop's next pass does; and a pass tells who failed.
    assert!(rig.coordinator.list_all.load(std::sync::atomic::Ordering::Relaxed));
    store.fail_all(Operation::List, Fault::Fail);
    let failed = crate::reconcile::pass(&rig.coordinator, everything).await.unwrap();
    assert!(!rig.health(0).is_readable() && failed.iter().all(|store| store.as_str() == "s3"));
    assert_eq!(reason(&rebuild().await.unwrap_err()), "STORE_FAILED");
    assert_eq!(count().await, 3);
    rig.end().await;
}

#[tokio::test]
async fn a_loss_among_the_newest_has_everything_listed() {
    let rig = Rig::start(memory(&["repo1"]), Ack::All).await;
    // Its segments' size, without which there is no newest part, is its server's.
    let agent = rig.connect("a", primary(1)).await;
    rig.create("main").await.unwrap();
    for number in 1..=300_u32 {
        let name = format!("00000001{:08X}{:08X}", number / 256, number % 256);
        rig.push(&wal(&name, "a", "content")).await.unwrap();
    }
    let list_all = || rig.coordinator.list_all.swap(false, std::sync::atomic::Ordering::Relaxed);
    rig.pass().await;
    // A cluster that was not there before has all listed, too.
    let _ = list_all();
    rig.pass().await;
    assert!(!list_all(), "nothing is lost");
    for key in rig.wal_keys(0).await.iter().skip(2) {
        let _ = rig.stores[0].delete(key).await.unwrap();
    }
    let lost = async |scope| {
        crate::reconcile::pass(&rig.coordinator, scope).await.unwrap();
        rig.coordinator.lost.line(&"main".parse().unwrap()).unwrap()
    };
    let first = lost(crate::reconcile::plan::Scope::Newest).await;
    assert!(first.starts_with("257 WAL files"), "{first}");
    assert!(list_all());
    let all = lost(crate::reconcile::plan::Scope::Everything).await;
    assert!(all.starts_with("298 WAL files"), "{all}");
    rig.pass().await;
    assert!(!list_all(), "what is known to be lost is no news");
    drop(agent);
    rig.end().await;
}
