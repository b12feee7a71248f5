//! Backups that are finished but for WAL, and pins that are taken over.

use proto::archive::{PinBackupRequest, PublishBackupRequest, PublishBackupResponse};
use proto::fleet::{OrderState, OrderUpdate};
use proto::operator::{CancelOperationRequest, ListOperationsRequest, OperationState, StartBackupRequest};
use repository::name::{BackupId, NodeName};
use repository::root::{self, Pin, RootBackup};

use super::backups::{Made, SEGMENT, make};
use super::*;
use crate::waiting;

const FIRST: &str = "20261123T034138Z-7f3a9c21";
const SECOND: &str = "20261123T034139Z-7f3a9c21";

impl Rig {
    async fn publish_or_keep(&self, entry: &RootBackup) -> Result<PublishBackupResponse, Status> {
        let request = PublishBackupRequest {
            cluster: "main".to_owned(),
            node: "a".to_owned(),
            backup: entry.backup.to_string(),
            root_entry_json: entry.to_json(),
            wal_wait_seconds: 1,
            may_be_kept: true,
        };
        let mut client = ArchiveServiceClient::new(self.channel().await);
        client.publish_backup(request).await.map(tonic::Response::into_inner)
    }

    async fn pin(&self, backup: &str, attempts: &[&str]) -> Result<Vec<String>, Status> {
        let request = PinBackupRequest {
            cluster: "main".to_owned(),
            node: "a".to_owned(),
            backup: backup.to_owned(),
            attempts: attempts.iter().map(ToString::to_string).collect(),
        };
        let mut client = ArchiveServiceClient::new(self.channel().await);
        client.pin_backup(request).await.map(|answer| answer.into_inner().stores)
    }

    async fn pinned(&self, store: usize) -> Vec<(BackupId, Vec<BackupId>)> {
        let root = root::newest(&*self.stores[store], &"main".parse().unwrap()).await.unwrap().unwrap();
        root.pins.into_iter().map(|pin| (pin.backup, pin.protects)).collect()
    }

    async fn named(&self, store: usize) -> Vec<BackupId> {
        let root = root::newest(&*self.stores[store], &"main".parse().unwrap()).await.unwrap().unwrap();
        root.backups.into_iter().map(|backup| backup.backup).collect()
    }

    async fn operations(&self) -> Vec<proto::operator::Operation> {
        let request = ListOperationsRequest { cluster: "main".to_owned(), page_size: 10 };
        self.operator().await.list_operations(request).await.unwrap().into_inner().operations
    }

    async fn look(&self) {
        waiting::look_at(&self.coordinator, &"main".parse().unwrap(), &[]).await;
    }
}

/// A backup of which all is stored but the last segment, pinned.
async fn finished(rig: &Rig) -> Made {
    let made = make(FIRST);
    assert_eq!(rig.pin(FIRST, &[]).await.unwrap(), ["repo1", "s3"]);
    rig.push(&wal(&segment(3), "a", SEGMENT)).await.unwrap();
    rig.send(&made).await;
    made
}

#[tokio::test]
async fn a_backup_whose_wal_comes_later_is_published_by_itself() {
    let rig = Rig::with_cluster(Ack::All).await;
    let made = finished(&rig).await;
    let kept = rig.publish_or_keep(&made.entry).await.unwrap();
    assert_eq!((kept.waiting_for.as_str(), kept.stores.len()), (format!("WAL {}", segment(4)).as_str(), 0));
    let operation = &rig.operations().await[0];
    assert_eq!(operation.state(), OperationState::WaitingForWal);
    assert_eq!(operation.step, format!("waiting for WAL {}", segment(4)));
    let request = GetInfoRequest { cluster: "main".to_owned() };
    let json = rig.operator().await.get_info(request).await.unwrap().into_inner().info_json;
    let info: serde_json::Value = serde_json::from_str(&json).unwrap();
    let told = &info["clusters"][0]["fleet"]["operations"][0];
    assert_eq!((told["state"].as_str(), told["backup"].as_str()), (Some("waiting for WAL"), Some(FIRST)));
    // Neither another backup of the node nor a new coordinator gives it up.
    let later = make(SECOND);
    crate::pins::give_up_older(&rig.coordinator, &"main".parse().unwrap(), &later.entry).await;
    let rig = rig.reborn(Ack::All).await;
    rig.look().await;
    assert_eq!(rig.named(0).await, []);
    assert_eq!(rig.operations().await[0].state(), OperationState::WaitingForWal);
    rig.push(&wal(&segment(4), "a", SEGMENT)).await.unwrap();
    rig.look().await;
    for store in 0..2 {
        assert_eq!((rig.named(store).await, rig.pinned(store).await), (vec![made.entry.backup], Vec::new()));
    }
    let operation = &rig.operations().await[0];
    assert_eq!((operation.state(), operation.error.as_str()), (OperationState::Done, ""));
    rig.end().await;
}

#[tokio::test]
async fn a_backup_that_waits_is_found_without_a_catalog_and_can_be_cancelled() {
    let rig = Rig::with_cluster(Ack::All).await;
    let made = finished(&rig).await;
    rig.look().await;
    let operation = rig.operations().await.remove(0);
    assert_eq!((operation.state(), operation.backup.as_str()), (OperationState::WaitingForWal, FIRST));
    let cancel = CancelOperationRequest { operation: operation.operation };
    let ended = rig.operator().await.cancel_operation(cancel).await.unwrap().into_inner().operation.unwrap();
    assert_eq!(ended.state(), OperationState::Failed);
    assert!(ended.error.contains("cancelled"), "{}", ended.error);
    rig.push(&wal(&segment(4), "a", SEGMENT)).await.unwrap();
    rig.look().await;
    assert_eq!((rig.named(0).await, rig.pinned(0).await, rig.pinned(1).await), (Vec::new(), Vec::new(), Vec::new()));
    assert_eq!(reason(&rig.publish_or_keep(&made.entry).await.unwrap_err()), "NOT_PUBLISHED");
    rig.end().await;
}

#[tokio::test]
async fn without_a_pin_or_for_an_older_agent_nothing_is_kept() {
    let rig = Rig::with_cluster(Ack::All).await;
    let made = make(FIRST);
    rig.push(&wal(&segment(3), "a", SEGMENT)).await.unwrap();
    rig.send(&made).await;
    assert_eq!(reason(&rig.publish_or_keep(&made.entry).await.unwrap_err()), "NOT_PUBLISHED");
    rig.pin(FIRST, &[]).await.unwrap();
    assert_eq!(reason(&rig.publish(&made.entry).await.unwrap_err()), "NOT_PUBLISHED");
    assert!(rig.operations().await.is_empty());
    rig.end().await;
}

#[tokio::test]
async fn a_pin_is_taken_over_where_it_stands() {
    let rig = Rig::with_cluster(Ack::All).await;
    let (first, second): (BackupId, BackupId) = (FIRST.parse().unwrap(), SECOND.parse().unwrap());
    rig.pin(FIRST, &[]).await.unwrap();
    let cluster = "main".parse().unwrap();
    let revoke = |root: &root::Root| Ok(root.without_pin(&first));
    root::commit(&*rig.stores[1], &cluster, &"a".parse().unwrap(), now(), revoke).await.unwrap();
    assert_eq!(rig.pin(SECOND, &[FIRST]).await.unwrap(), ["repo1"]);
    assert_eq!(rig.pin(SECOND, &[FIRST]).await.unwrap(), ["repo1"], "again");
    assert_eq!(rig.pinned(0).await, [(second, vec![first])]);
    assert_eq!(rig.pinned(1).await, [], "a backup that cannot be whole there is not pinned there");
    let other: NodeName = "b".parse().unwrap();
    let foreign = Pin::new("20261123T034137Z-7f3a9c21".parse().unwrap(), None, other, now());
    let edit = |root: &root::Root| root.with_pin(foreign.clone());
    root::commit(&*rig.stores[0], &cluster, &"b".parse().unwrap(), now(), edit).await.unwrap();
    assert_eq!(rig.pin(SECOND, &["20261123T034137Z-7f3a9c21"]).await.unwrap(), Vec::<String>::new());
    rig.end().await;
}

#[tokio::test]
async fn what_a_failed_backup_kept_stays_pinned_and_nothing_that_runs_is_taken_over() {
    let rig = Rig::with_cluster(Ack::All).await;
    let mut operator = rig.operator().await;
    let agent = rig.connect("a", primary(1)).await;
    let request = StartBackupRequest { cluster: "main".to_owned(), ..Default::default() };
    let operation = operator.start_backup(request).await.unwrap().into_inner().operation.unwrap();
    let backup: BackupId = operation.backup.parse().unwrap();
    let status = rig.pin(FIRST, &[&operation.backup]).await.unwrap_err();
    assert!(status.message().contains("under way"), "{status}");
    let (state, error) = (OrderState::Failed.into(), "the server crashed".to_owned());
    let failed = OrderUpdate { operation: operation.operation.clone(), state, error, kept: true, ..Default::default() };
    agent.say(session_request::Message::OrderUpdate(failed)).await;
    wait_until("it has failed", async || rig.operations().await[0].state() == OperationState::Failed).await;
    assert_eq!(rig.pinned(0).await, [(backup, Vec::new())]);
    assert_eq!(rig.pin(FIRST, &[&operation.backup]).await.unwrap(), ["repo1", "s3"]);
    drop((agent, operator));
    rig.end().await;
}

#[tokio::test]
async fn the_operation_of_a_backup_goes_on_until_it_was_named_in_every_store_that_takes_it() {
    let rig = Rig::with_cluster(Ack::All).await;
    let made = finished(&rig).await;
    rig.look().await;
    assert_eq!(rig.operations().await[0].state(), OperationState::WaitingForWal);
    let cluster = "main".parse().unwrap();
    let publishing = rig.coordinator.operations.publishing(&cluster, made.entry.backup);
    let named = |root: &root::Root| root.with_backup(made.entry.clone());
    root::commit(&*rig.stores[0], &cluster, &"repo1".parse().unwrap(), process::clock::now(), named).await.unwrap();
    rig.pass().await;
    assert_eq!(rig.operations().await[0].state(), OperationState::WaitingForWal);
    drop(publishing);
    rig.pass().await;
    assert_eq!(rig.operations().await[0].state(), OperationState::Done);
    rig.end().await;
}
