//! Backups under way are pinned in every store, until they exist or are known to be dead.

use proto::fleet::{OrderState, OrderUpdate, order};
use proto::operator::StartBackupRequest;
use repository::name::{BackupId, Generation};
use repository::root::{self, Lost, Pin, Root};
use repository::stores::faulty::{Fault, Operation};

use super::*;
use crate::pins::{before, had_ended, is_older};

impl Rig {
    async fn root_in(&self, store: usize) -> Root {
        root::newest(&*self.stores[store], &"main".parse().unwrap()).await.unwrap().unwrap()
    }

    async fn pins_in(&self, store: usize) -> Vec<BackupId> {
        self.root_in(store).await.pins.iter().map(|pin| pin.backup).collect()
    }
}

#[tokio::test]
async fn an_ordered_backup_is_pinned_until_its_node_gives_up() {
    let rig = Rig::with_cluster(Ack::All).await;
    let mut operator = rig.operator().await;
    let mut agent = rig.connect("a", primary(1)).await;
    let request = StartBackupRequest { cluster: "main".to_owned(), ..Default::default() };
    let operation = operator.start_backup(request).await.unwrap().into_inner().operation.unwrap();
    let backup: BackupId = operation.backup.parse().unwrap();
    assert_eq!((rig.pins_in(0).await, rig.pins_in(1).await), (vec![backup], vec![backup]));
    let order = agent.hear(|message| match message {
        session_response::Message::Order(order) => order.what,
        _ => None,
    });
    assert!(matches!(order.await, order::What::TakeBackup(_)));
    let (state, error) = (OrderState::Failed.into(), "the disk is gone".to_owned());
    let failed = OrderUpdate { operation: operation.operation, state, error, ..Default::default() };
    agent.say(session_request::Message::OrderUpdate(failed)).await;
    let begun = Monotonic::now();
    while !(rig.pins_in(0).await.is_empty() && rig.pins_in(1).await.is_empty()) {
        assert!(begun.elapsed() < DEADLINE, "the pins stand");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(rig.root_in(0).await.is_gone(&backup));
    drop((agent, operator));
    rig.end().await;
}

#[tokio::test]
async fn what_was_removed_from_a_store_is_not_copied_back() {
    let rig = Rig::with_cluster(Ack::All).await;
    let made = super::backups::make("20261123T034138Z-7f3a9c21");
    for number in [3, 4] {
        rig.push(&wal(&segment(number), "a", super::backups::SEGMENT)).await.unwrap();
    }
    rig.send(&made).await;
    let (cluster, id) = ("main".parse().unwrap(), made.entry.backup);
    let pin = root::Pin::new(id, None, "a".parse().unwrap(), now());
    let edit = |root: &Root| Ok(root.with_pin(pin.clone())?.without_pin(&id));
    root::commit(&*rig.stores[0], &cluster, &"a".parse().unwrap(), now(), edit).await.unwrap();
    let published = rig.publish(&made.entry).await.unwrap();
    assert_eq!((published.stores, published.lagging), (vec!["s3".to_owned()], vec!["repo1".to_owned()]));
    rig.pass().await;
    assert!(rig.root_in(0).await.backups.is_empty());
    rig.end().await;
}

#[tokio::test]
async fn a_copy_is_pinned_and_a_store_that_is_away_stops_no_backup() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.stores[0].fail_everything(Fault::Fail);
    let mut operator = rig.operator().await;
    let agent = rig.connect("a", primary(1)).await;
    let request = StartBackupRequest { cluster: "main".to_owned(), ..Default::default() };
    let operation = operator.start_backup(request).await.unwrap().into_inner().operation.unwrap();
    let backup: BackupId = operation.backup.parse().unwrap();
    assert_eq!(rig.pins_in(1).await, [backup]);
    let made = super::backups::make(&operation.backup);
    for number in [3, 4] {
        rig.push(&wal(&segment(number), "a", super::backups::SEGMENT)).await.unwrap();
    }
    rig.send(&made).await;
    assert_eq!(rig.publish(&made.entry).await.unwrap().stores, ["s3"]);
    assert_eq!(rig.pins_in(1).await, []);
    rig.stores[0].heal();
    rig.coordinator.stores.check().await;
    rig.pass().await;
    let copied = rig.root_in(0).await;
    assert_eq!((copied.backups.len(), copied.pins.len()), (1, 0));
    drop((agent, operator));
    rig.end().await;
}

/// A node takes backups straight into a store while the coordinator is away. What its attempts left there is dead, unless
/// one of them exists elsewhere.
#[tokio::test]
async fn what_earlier_attempts_left_beside_a_backup_that_went_straight_into_a_store_is_given_up() {
    let rig = Rig::with_cluster(Ack::All).await;
    let (cluster, node): (_, repository::name::NodeName) = ("main".parse().unwrap(), "a".parse().unwrap());
    let direct = super::backups::make("20261123T044138Z-7f3a9c21");
    let attempt = |seconds| BackupId::new(Timestamp::from_second(seconds).unwrap(), 1);
    let (dead, elsewhere) = (attempt(1_700_000_000), attempt(1_700_000_001));
    for number in [3, 4] {
        rig.push(&wal(&segment(number), "a", super::backups::SEGMENT)).await.unwrap();
    }
    let manifest = repository::key::manifest(&cluster, &elsewhere);
    let _ = rig.stores[0].put_new(&manifest, bytes::Bytes::from_static(b"of a backup").into()).await.unwrap();
    let store = &*rig.stores[1];
    for (key, bytes, _) in &direct.parts {
        let _ = store.put_new(key, bytes.clone().into()).await.unwrap();
    }
    let later = attempt(1_700_000_002);
    for id in [dead, elsewhere, direct.entry.backup] {
        let pin = Pin::new(id, None, node.clone(), now());
        root::commit(store, &cluster, &node, now(), |root| root.with_pin(pin.clone())).await.unwrap();
    }
    // By a clock that was set back it is older, too, and the node is at it.
    let pin = Pin::new(later, None, node.clone(), now());
    root::commit(store, &cluster, &node, now(), |root| root.with_pin(pin.clone())).await.unwrap();
    root::commit(store, &cluster, &node, now(), |root| root.with_published(direct.entry.clone())).await.unwrap();
    rig.pass().await;
    assert_eq!(rig.pins_in(1).await, [elsewhere, later]);
    // Where the node pinned the finished one was found; as long as others stay, only the newest root is read.
    let before = rig.stores[1].calls(Operation::Get);
    crate::pins::give_up_older(&rig.coordinator, &cluster, &direct.entry).await;
    assert_eq!((rig.stores[1].calls(Operation::Get) - before, rig.pins_in(1).await.len()), (1, 2));
    rig.end().await;
}

/// A backup exists in one store, and the other is back and does not have it yet when its node finishes a later one: whatever
/// the first store says of it then, the copy is still to come.
#[tokio::test]
async fn a_later_backup_does_not_take_the_pin_of_one_that_is_still_to_be_copied() {
    for away_meanwhile in [false, true] {
        let rig = Rig::with_cluster(Ack::All).await;
        let cluster: repository::name::ClusterName = "main".parse().unwrap();
        let earlier = super::backups::make("20261123T034138Z-7f3a9c21");
        let later = super::backups::make("20261123T044138Z-7f3a9c21");
        let lost = BackupId::new(Timestamp::from_second(1_700_000_000).unwrap(), 1);
        for id in [lost, earlier.entry.backup, later.entry.backup] {
            crate::pins::begin(&rig.coordinator, &cluster, id, &"a".parse().unwrap(), now()).await;
        }
        for number in [3, 4] {
            rig.push(&wal(&segment(number), "a", super::backups::SEGMENT)).await.unwrap();
        }
        rig.stores[0].fail_everything(Fault::Fail);
        rig.coordinator.stores.check().await;
        rig.send(&earlier).await;
        assert_eq!(rig.publish(&earlier.entry).await.unwrap().stores, ["s3"]);
        rig.stores[0].heal();
        rig.coordinator.stores.check().await;
        // The one that has it may be away itself, and then nobody says that it exists.
        if away_meanwhile {
            rig.stores[1].fail_everything(Fault::Fail);
            rig.coordinator.stores.check().await;
        }
        rig.send(&later).await;
        rig.publish(&later.entry).await.unwrap();
        assert_eq!(rig.pins_in(0).await.contains(&lost), away_meanwhile, "only what is known to be dead is given up");
        rig.stores[1].heal();
        rig.coordinator.stores.check().await;
        rig.pass().await;
        let backups: Vec<BackupId> = rig.root_in(0).await.backups.iter().map(|backup| backup.backup).collect();
        assert_eq!(backups, [earlier.entry.backup, later.entry.backup]);
        rig.end().await;
    }
}

const FINISHED: &str = "20261123T044138Z-7f3a9c21";

fn pin(backup: &str, node: &str) -> Pin {
    Pin::new(backup.parse().unwrap(), None, node.parse().unwrap(), now())
}

fn with_pins(pins: &[&Pin]) -> Root {
    let root = Root::empty("main".parse().unwrap(), "coordinator".parse().unwrap(), now());
    pins.iter().fold(root, |root, pin| root.with_pin((*pin).clone()).unwrap())
}

#[test]
fn an_attempt_had_ended_that_stood_where_its_node_pinned_the_finished_one() {
    let finished = super::backups::make(FINISHED).entry;
    let (own, copied) = (pin(FINISHED, "a"), pin(FINISHED, "coordinator"));
    let earlier = pin("20261123T034138Z-7f3a9c21", "a");
    let first = |pins: &[&Pin]| Arc::new(with_pins(pins));
    assert!(is_older(&earlier, &finished) && !is_older(&pin("20261123T034138Z-7f3a9c21", "b"), &finished));
    assert!(had_ended(&earlier, &finished, &[first(&[]), first(&[&earlier, &own])]));
    // By its clock only it is older: it was not there when the finished one was pinned.
    assert!(!had_ended(&earlier, &finished, &[first(&[&own])]));
    // A copy comes at any time.
    assert!(!had_ended(&earlier, &finished, &[first(&[&earlier, &copied]), first(&[&earlier])]));
}

#[test]
fn before_a_root_that_names_lost_ones_comes_the_one_before_those() {
    let number = |number| Generation::new(number).unwrap();
    let at = |generation, lost| Root {
        generation: number(generation),
        previous_sha256: Some([0; 32]),
        lost,
        ..with_pins(&[])
    };
    assert_eq!(before(&at(7, None)), Some(number(6)));
    assert_eq!(before(&at(7, Some(Lost { first: number(4), last: number(6) }))), Some(number(3)));
    // Those of long ago have no meaning.
    assert_eq!(before(&at(7, Some(Lost { first: number(2), last: number(3) }))), Some(number(6)));
    assert_eq!(before(&Root { previous_sha256: None, ..at(1, None) }), None);
}
