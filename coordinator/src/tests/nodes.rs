//! Nodes that come, go and come again, and two that come under one name.

use proto::fleet::OperationsInHand;
use proto::operator::{Operation, OperationState, StartBackupRequest, WaitOperationRequest};

use super::*;

impl Rig {
    async fn start_backup(&self) -> Result<Operation, Status> {
        let request = StartBackupRequest { cluster: "main".to_owned(), ..Default::default() };
        let started = self.operator().await.start_backup(request).await;
        started.map(|response| response.into_inner().operation.unwrap())
    }

    async fn wait_operation(&self, operation: &Operation, seconds: u32) -> Operation {
        let wait = WaitOperationRequest { operation: operation.operation.clone(), timeout_seconds: seconds };
        self.operator().await.wait_operation(wait).await.unwrap().into_inner().operation.unwrap()
    }
}

/// An agent's hello that says what it has in hand.
fn knowing(operations: &[&Operation]) -> Hello {
    let operations = operations.iter().map(|operation| operation.operation.clone()).collect();
    Hello { in_hand: Some(OperationsInHand { operations }), ..hello("a") }
}

#[tokio::test]
async fn what_a_restarted_agent_does_not_know_ends_soon_and_the_next_backup_starts() {
    let rig = Rig::with_cluster(Ack::All).await;
    let agent = rig.connect("a", primary(1)).await;
    let first = rig.start_backup().await.unwrap();
    drop(agent);
    // It stays away, or its agent is one that does not say: the backup may complete by itself.
    let older = rig.connect("a", primary(1)).await;
    assert_eq!(reason(&rig.start_backup().await.unwrap_err()), "BACKUP_RUNNING");
    drop(older);
    // A session broke, and the agent still has it in hand.
    let same = rig.say_hello(knowing(&[&first])).await.unwrap();
    same.say(session_request::Message::Report(primary(1))).await;
    assert_eq!(rig.wait_operation(&first, 7).await.state(), OperationState::Running);
    drop(same);
    let restarted = rig.say_hello(knowing(&[])).await.unwrap();
    restarted.say(session_request::Message::Report(primary(1))).await;
    let begun = Monotonic::now();
    let ended = rig.wait_operation(&first, 20).await;
    assert_eq!(ended.state(), OperationState::Failed);
    assert!(ended.error.contains("restarted"), "{}", ended.error);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let next = rig.start_backup().await.unwrap();
    assert_ne!(next.operation, first.operation);
    // Of an operation that was ordered after the hello nothing is concluded.
    assert_eq!(rig.wait_operation(&next, 7).await.state(), OperationState::Running);
    drop(restarted);
    rig.end().await;
}

#[tokio::test]
async fn an_operation_that_is_heard_of_again_was_not_lost() {
    let rig = Rig::with_cluster(Ack::All).await;
    let agent = rig.connect("a", primary(1)).await;
    let backup = rig.start_backup().await.unwrap();
    drop(agent);
    let again = rig.say_hello(knowing(&[])).await.unwrap();
    // The order was on its way when the agent said hello.
    let update = proto::fleet::OrderUpdate {
        operation: backup.operation.clone(),
        state: proto::fleet::OrderState::Running.into(),
        ..Default::default()
    };
    again.say(session_request::Message::OrderUpdate(update)).await;
    assert_eq!(rig.wait_operation(&backup, 7).await.state(), OperationState::Running);
    drop(again);
    rig.end().await;
}

#[tokio::test]
async fn a_backup_that_a_store_names_was_not_lost_with_the_last_word_about_it() {
    let rig = Rig::with_cluster(Ack::All).await;
    let agent = rig.connect("a", primary(1)).await;
    let backup = rig.start_backup().await.unwrap();
    drop(agent);
    let cluster = "main".parse().unwrap();
    let entry = super::backups::make(&backup.backup).entry;
    crate::publish::commit(&rig.coordinator, &*rig.stores[1], &cluster, &entry).await.unwrap();
    let again = rig.say_hello(knowing(&[])).await.unwrap();
    let ended = rig.wait_operation(&backup, 20).await;
    assert_eq!((ended.state(), ended.error.as_str()), (OperationState::Done, ""));
    drop(again);
    rig.end().await;
}

#[tokio::test]
async fn a_backup_waits_for_the_first_report_of_a_node() {
    let rig = Rig::with_cluster(Ack::All).await;
    let agent = rig.say_hello(hello("a")).await.unwrap();
    let reporting = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        agent.say(session_request::Message::Report(primary(1))).await;
    };
    let (started, ()) = tokio::join!(rig.start_backup(), reporting);
    assert!(started.unwrap().reason.contains("primary a"));
    drop(agent);
    rig.end().await;
    // One that never reports is named for what it is.
    let rig = Rig::with_cluster(Ack::All).await;
    let agent = rig.say_hello(hello("a")).await.unwrap();
    let status = rig.start_backup().await.unwrap_err();
    assert_eq!(reason(&status), "NO_FIT_NODE");
    assert!(status.message().contains("first report is outstanding"), "{status}");
    drop(agent);
    rig.end().await;
}

#[tokio::test]
async fn a_second_agent_under_one_name_gets_neither_session_nor_wal_in() {
    let rig = Rig::with_cluster(Ack::All).await;
    let first = rig.connect("a", primary(1)).await;
    let own = |open: &mut PushWalOpen| open.instance = "instance of a".to_owned();
    let other = |open: &mut PushWalOpen| open.instance = "instance of a clone".to_owned();
    rig.push_changed(&wal(&segment(1), "a", "one"), own).await.unwrap();
    let clone = || Hello { instance: "instance of a clone".to_owned(), ..hello("a") };
    let status = rig.say_hello(clone()).await.err().unwrap();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::AlreadyExists, "NODE_TAKEN"));
    let status = rig.push_changed(&wal(&segment(2), "a", "two"), other).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::AlreadyExists, "NODE_TAKEN"));
    assert_eq!(rig.wal_keys(0).await.len(), 1);
    // An agent of an older version does not say which one it is.
    rig.push(&wal(&segment(2), "a", "two")).await.unwrap();
    let request = GetInfoRequest { cluster: "main".to_owned() };
    let info = rig.operator().await.get_info(request).await.unwrap().into_inner().info_json;
    assert!(info.contains("another agent comes under its name"), "{info}");
    drop(first);
    wait_until("the first one is gone", async || rig.coordinator.sessions.connected() == 0).await;
    // It may be back in a moment: the name is kept for it.
    let status = rig.push_changed(&wal(&segment(3), "a", "three"), other).await.unwrap_err();
    assert!(reason(&status) == "NODE_TAKEN" && status.message().contains("gets in by itself in"), "{status}");
    let status = rig.say_hello(clone()).await.err().unwrap();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::AlreadyExists, "NODE_TAKEN"));
    // A coordinator that is started with this catalog knows whose name it is.
    let restarted =
        crate::sessions::Sessions::load(&rig.coordinator.catalog, crate::sessions::hold::HOLD).await.unwrap();
    let (cluster, node) = ("main".parse().unwrap(), "a".parse().unwrap());
    assert!(restarted.is_stranger(&cluster, &node, "instance of a clone"));
    assert!(!restarted.is_stranger(&cluster, &node, "instance of a"));
    rig.push_changed(&wal(&segment(3), "a", "three"), own).await.unwrap();
    let first = rig.connect("a", primary(1)).await;
    drop(first);
    rig.end().await;
}

#[tokio::test]
async fn whoever_sent_the_newest_of_a_timeline_goes_on_though_another_one_has_the_session() {
    let rig = Rig::start_keeping_names(memory(&["repo1"]), Ack::All, Duration::ZERO).await;
    rig.create("main").await.unwrap();
    let first = rig.connect("a", primary(1)).await;
    let own = |open: &mut PushWalOpen| open.instance = "instance of a".to_owned();
    let other = |open: &mut PushWalOpen| open.instance = "another instance".to_owned();
    let third = |open: &mut PushWalOpen| open.instance = "a third one".to_owned();
    rig.push_changed(&wal(&segment(1), "a", "one"), own).await.unwrap();
    drop(first);
    wait_until("the first one is gone", async || rig.coordinator.sessions.connected() == 0).await;
    let another = rig.say_hello(Hello { instance: "another instance".to_owned(), ..hello("a") }).await.unwrap();
    // What is stored already changes nothing, whoever sends it.
    rig.push_changed(&wal(&segment(1), "a", "one"), other).await.unwrap();
    rig.push_changed(&wal(&segment(2), "a", "two"), own).await.unwrap();
    assert_eq!(reason(&rig.push_changed(&wal(&segment(3), "a", "x"), third).await.unwrap_err()), "NODE_TAKEN");
    // A data directory with a new spool writes on from here.
    rig.push_changed(&wal(&segment(3), "a", "three"), other).await.unwrap();
    assert_eq!(reason(&rig.push_changed(&wal(&segment(4), "a", "four"), own).await.unwrap_err()), "NODE_TAKEN");
    drop(another);
    rig.end().await;
}
