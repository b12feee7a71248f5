//! Pushing WAL: what is acknowledged, what is refused, and what a bad store costs.

use repository::stores::faulty::{Fault, Operation};

use super::*;

#[tokio::test]
async fn a_segment_lands_in_every_store_and_again_is_no_change() {
    let rig = Rig::with_cluster(Ack::All).await;
    let first = wal(&segment(1), "a", "one");
    let response = rig.push(&first).await.unwrap();
    assert_eq!(states(&response), [StoreState::Stored, StoreState::Stored]);
    assert!(!response.already_stored);
    let keys = rig.wal_keys(0).await;
    assert_eq!(keys, rig.wal_keys(1).await);
    assert_eq!(keys, [first.key()]);
    let again = rig.push(&first).await.unwrap();
    assert!(again.already_stored);
    // A standby that archives always sends the same.
    let standby = wal_with(&segment(1), "b", "one", |facts| facts.in_recovery = true);
    assert!(rig.push(&standby).await.unwrap().already_stored);
    assert_eq!(rig.wal_keys(0).await.len(), 1);
    rig.end().await;
}

#[tokio::test]
async fn other_content_is_a_conflict_and_both_are_kept() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    let status = rig.push(&wal(&segment(1), "a", "two")).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::AlreadyExists, "WAL_CONFLICT"));
    wait_until("both contents are in both stores", async || {
        rig.wal_keys(0).await.len() == 2 && rig.wal_keys(1).await.len() == 2
    })
    .await;
    // Also the first one is no success any more, until an operator chooses.
    let one = wal(&segment(1), "a", "one");
    assert_eq!(reason(&rig.push(&one).await.unwrap_err()), "WAL_CONFLICT");
    let request = proto::operator::ResolveConflictRequest {
        cluster: "main".to_owned(),
        wal_file: segment(1),
        fingerprint: one.fingerprint.to_string(),
    };
    let mut operator = rig.operator().await;
    operator.resolve_conflict(request.clone()).await.unwrap();
    rig.push(&one).await.unwrap();
    // A choice may be changed.
    let two = wal(&segment(1), "a", "two").fingerprint.to_string();
    operator.resolve_conflict(proto::operator::ResolveConflictRequest { fingerprint: two, ..request }).await.unwrap();
    rig.end().await;
}

#[tokio::test]
async fn nothing_is_decided_about_a_file_without_a_conflict() {
    let rig = Rig::with_cluster(Ack::All).await;
    let whole = wal(&segment(1), "a", "one");
    rig.push(&whole).await.unwrap();
    let request = proto::operator::ResolveConflictRequest {
        cluster: "main".to_owned(),
        wal_file: segment(1),
        fingerprint: whole.fingerprint.to_string(),
    };
    let mut operator = rig.operator().await;
    let status = operator.resolve_conflict(request.clone()).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::FailedPrecondition, "NO_CONFLICT"));
    assert!(status.message().contains(&segment(1)), "{status}");
    let other = proto::operator::ResolveConflictRequest { wal_file: segment(2), ..request };
    assert_eq!(reason(&operator.resolve_conflict(other).await.unwrap_err()), "PRECONDITION");
    assert!(
        rig.stores[0]
            .list("c/main/", None, 100)
            .await
            .unwrap()
            .objects
            .iter()
            .all(|entry| !entry.key.as_str().contains("/decision/"))
    );
    rig.end().await;
}

#[tokio::test]
async fn a_damaged_copy_in_one_store_lags_and_in_the_only_one_is_refused() {
    let rig = Rig::with_cluster(Ack::All).await;
    let first = wal(&segment(1), "a", "one");
    rig.push(&first).await.unwrap();
    rig.stores[0].fail_all(Operation::Get, Fault::FlippedBit);
    for _ in 0..2 {
        assert_eq!(states(&rig.push(&first).await.unwrap()), [StoreState::Lagging, StoreState::Stored]);
    }
    assert_eq!(rig.health(0), Health::Healthy);
    rig.push(&wal(&segment(2), "a", "two")).await.unwrap();
    rig.stores[1].fail_all(Operation::Get, Fault::FlippedBit);
    let status = rig.push(&first).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::FailedPrecondition, "STORED_COPY_DAMAGED"));
    assert!(status.message().contains(first.key().as_str()) && status.message().contains("delete it"), "{status}");
    rig.end().await;
}

#[tokio::test]
async fn identity_is_checked_before_a_byte_is_stored() {
    let rig = Rig::with_cluster(Ack::All).await;
    let wal = wal(&segment(1), "a", "one");
    let refused = async |change: fn(&mut PushWalOpen)| {
        let status = rig.push_changed(&wal, change).await.unwrap_err();
        (status.code(), reason(&status))
    };
    let check = |found: (Code, String), code, reason: &str| assert_eq!(found, (code, reason.to_owned()));
    check(refused(|open| open.cluster = "other".to_owned()).await, Code::FailedPrecondition, "CLUSTER_UNKNOWN");
    check(refused(|open| open.system_identifier = 5).await, Code::FailedPrecondition, "SYSTEM_IDENTIFIER_MISMATCH");
    check(refused(|open| open.header_sha256 = vec![0; 32].into()).await, Code::DataLoss, "BODY_DAMAGED");
    check(refused(|open| open.stored_size += 1).await, Code::DataLoss, "BODY_DAMAGED");
    check(refused(|open| open.wal_file = segment(2)).await, Code::DataLoss, "BODY_DAMAGED");
    check(refused(|open| open.fingerprint = "s".to_owned() + &"0".repeat(32)).await, Code::DataLoss, "BODY_DAMAGED");
    check(refused(|open| open.complete = false).await, Code::DataLoss, "BODY_DAMAGED");
    check(refused(|open| open.wal_file = "x".to_owned()).await, Code::InvalidArgument, "FIELD_INVALID");
    assert_eq!(rig.wal_keys(0).await, []);
    // A refused push makes nobody the writer.
    rig.push(&super::wal(&segment(1), "b", "one")).await.unwrap();
    rig.end().await;
}

#[tokio::test]
async fn a_text_that_is_not_what_its_name_says_is_refused() {
    let rig = Rig::with_cluster(Ack::All).await;
    let backup = "000000010000000000000007.00000028.backup";
    for (name, content) in
        [("00000002.history", ""), ("00000002.history", "garbage\n"), (backup, "START WAL LOCATION: here\n")]
    {
        let status = rig.push(&wal(name, "a", content)).await.unwrap_err();
        assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "TEXT_INVALID"), "{name}");
        assert!(status.message().starts_with(&format!("{name} is not what its name says: ")), "{status}");
    }
    assert_eq!(rig.wal_keys(0).await, []);
    // As a power cut leaves one that the server wants archived all the same.
    rig.push(&wal(backup, "a", "")).await.unwrap();
    assert_eq!(rig.wal_keys(0).await.len(), 1);
    rig.end().await;
}

#[tokio::test]
async fn a_second_writer_is_refused_until_it_is_adopted() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    let stranger = wal(&segment(2), "b", "two");
    let status = rig.push(&stranger).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::FailedPrecondition, "FOREIGN_WRITER"));
    // What is stored already is accepted from anyone.
    assert!(rig.push(&wal(&segment(1), "b", "one")).await.unwrap().already_stored);
    // A promotion needs nothing, and what was left of the old timeline is taken too.
    rig.push(&history(2, "b")).await.unwrap();
    rig.push(&wal("000000010000000000000003.partial", "b", "three")).await.unwrap();
    rig.push(&wal("000000020000000000000003", "b", "three")).await.unwrap();
    rig.push(&wal(&segment(2), "b", "two")).await.unwrap();
    // The old primary still writes its own timeline.
    rig.push(&wal(&segment(4), "a", "four")).await.unwrap();
    let mut operator = rig.operator().await;
    let adopt = proto::operator::AdoptWriterRequest { cluster: "main".to_owned(), node: "c".to_owned(), timeline: 0 };
    operator.adopt_writer(adopt.clone()).await.unwrap_err();
    let _agent = rig.connect("c", primary(1)).await;
    assert_eq!(operator.adopt_writer(adopt).await.unwrap().into_inner().timelines, [1]);
    rig.push(&wal(&segment(5), "c", "five")).await.unwrap();
    assert_eq!(reason(&rig.push(&wal(&segment(6), "a", "six")).await.unwrap_err()), "FOREIGN_WRITER");
    // A new catalog learns it all from the stores.
    let rig = rig.reborn(Ack::All).await;
    assert_eq!(reason(&rig.push(&wal(&segment(6), "a", "six")).await.unwrap_err()), "FOREIGN_WRITER");
    rig.push(&wal(&segment(6), "c", "six")).await.unwrap();
    rig.end().await;
}

#[tokio::test]
async fn a_lost_store_does_not_stop_archiving() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.stores[0].fail_everything(Fault::Fail);
    let response = rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    assert_eq!(states(&response), [StoreState::Lagging, StoreState::Stored]);
    assert!(matches!(rig.health(0), Health::Lagging { .. }));
    rig.stores[1].fail_everything(Fault::Fail);
    let status = rig.push(&wal(&segment(2), "a", "two")).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "NO_STORE"));
    rig.end().await;
}

#[tokio::test]
async fn a_hung_store_costs_its_patience_once() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.stores[0].fail_everything(Fault::Hang(Duration::from_secs(60)));
    let begun = Monotonic::now();
    let first_wal = wal(&segment(1), "a", "one");
    let second_wal = wal(&segment(2), "a", "two");
    // The second one started later and goes on with the first.
    let second = async {
        tokio::time::sleep(PATIENCE / 2).await;
        rig.push(&second_wal).await
    };
    let (first, second) = tokio::join!(rig.push(&first_wal), second);
    assert_eq!(states(&first.unwrap()), [StoreState::Lagging, StoreState::Stored]);
    assert_eq!(states(&second.unwrap()), [StoreState::Lagging, StoreState::Stored]);
    assert!(begun.elapsed() < PATIENCE + PATIENCE / 2 + Duration::from_millis(500), "{:?}", begun.elapsed());
    let begun = Monotonic::now();
    rig.push(&wal(&segment(3), "a", "three")).await.unwrap();
    assert!(begun.elapsed() < PATIENCE, "a lagging store is not waited for");
    assert_eq!(rig.missing().await, 3);
    rig.end().await;
}

#[tokio::test]
async fn a_full_store_lags_and_when_all_are_full_the_direct_road_is_named() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.stores[0].fail_all(Operation::Put, Fault::Full);
    let response = rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    assert_eq!(states(&response), [StoreState::Lagging, StoreState::Stored]);
    assert!(matches!(rig.health(0), Health::Full { .. }));
    rig.stores[1].fail_everything(Fault::Fail);
    let lost = rig.push(&wal(&segment(2), "a", "two")).await.unwrap_err();
    assert_eq!(reason(&lost), "NO_STORE");
    let status = rig.push(&wal(&segment(2), "a", "two")).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "STORE_FULL"));
    assert!(status.message().contains("direct road"));
    rig.end().await;
}

#[tokio::test]
async fn one_store_is_enough_when_one_is_asked_for() {
    let rig = Rig::with_cluster(Ack::One).await;
    rig.stores[0].fail_all(Operation::Put, Fault::Delay(Duration::from_millis(200)));
    let begun = Monotonic::now();
    let response = rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    assert_eq!(states(&response), [StoreState::Lagging, StoreState::Stored]);
    assert!(begun.elapsed() < Duration::from_millis(200));
    wait_until("the slow store has it as well", async || rig.wal_keys(0).await.len() == 1).await;
    rig.end().await;
}

#[tokio::test]
async fn a_lost_reply_is_healed_by_content() {
    let rig = Rig::with_cluster(Ack::All).await;
    let object = wal(&segment(1), "a", "one");
    rig.stores[0].fail_nth(Operation::Put, 1, Fault::LostReply);
    rig.push(&object).await.unwrap();
    assert_eq!(rig.wal_keys(0).await.len(), 1);
    assert_eq!(rig.missing().await, 1);
    rig.coordinator.stores.check().await;
    rig.pass().await;
    assert_eq!(rig.missing().await, 0);
    rig.end().await;
}
