//! A backup by order: chosen node, parts, publishing, and the other store.

use std::collections::BTreeMap;

use postgres_format::{Lsn, Timeline};
use proto::archive::{PublishBackupRequest, PutBackupObjectOpen, PutBackupObjectRequest, put_backup_object_request};
use proto::fleet::{OrderState, OrderUpdate, order};
use proto::operator::{CheckClusterRequest, CheckState, OperationState, StartBackupRequest, WaitOperationRequest};
use repository::backup::manifest::{Head, LAYERS, Line, ManifestWriter, Pack};
use repository::backup::origin::BackupType;
use repository::backup::pack::{FileNumber, PackBuilder};
use repository::byte_text::ByteText;
use repository::coverage::LsnRange;
use repository::key;
use repository::name::BackupId;
use repository::root::{self, RootBackup};
use repository::store::Body;
use repository::stores::faulty::{Fault, Operation};
use repository::witness::WalWitness;

use super::*;
use crate::publish::wait_for_wal;

/// What the segments hold that the backups of these tests need.
pub(super) const SEGMENT: &str = "content";

/// The witness of the first bytes of a segment that holds [`SEGMENT`].
fn witness(number: u64, size_bytes: u64) -> WalWitness {
    let (begin, length) = (number * size_bytes, 0x100);
    let stretch = LsnRange { start: Lsn::new(begin), end: Lsn::new(begin + length) };
    WalWitness::of(stretch, &SEGMENT.repeat(1000).as_bytes()[..length as usize])
}

/// A backup without files but with one pack, from segment 3.
pub(super) struct Made {
    pub(super) entry: RootBackup,
    pub(super) parts: Vec<(ObjectKey, bytes::Bytes, [u8; 32])>,
}

pub(super) fn make(id: &str) -> Made {
    make_on(id, None)
}

/// The same, with the packs of another one.
fn make_on(id: &str, parent: Option<&Made>) -> Made {
    make_at(id, parent.as_slice(), (3, 16 << 20), now())
}

/// The same from another segment on, of segments of another size, stopped at another time, on the last of some older ones and with packs of all of them.
pub(super) fn make_at(id: &str, older: &[&Made], (first, size_bytes): (u64, u64), at: Timestamp) -> Made {
    let parent = older.last();
    let backup: BackupId = id.parse().unwrap();
    let cluster = "main".parse().unwrap();
    let mut builder = PackBuilder::new(3, 1 << 20).unwrap();
    builder.add(FileNumber(1), 0, &[7; 8192]).unwrap();
    let pack = builder.finish(1);
    let Body::Memory(pack_bytes) = pack.body else { panic!("packs are in memory") };
    let (start_lsn, stop_lsn) = (Lsn::new(first * size_bytes + 0x28), Lsn::new((first + 1) * size_bytes + 0x100));
    let head = Head {
        format: Head::FORMAT,
        critical: parent.map(|_| LAYERS.to_owned()).into_iter().collect(),
        tool: "test".to_owned(),
        backup,
        backup_type: if parent.is_some() { BackupType::Incr } else { BackupType::Full },
        parent: parent.map(|parent| parent.entry.backup),
        changes: None,
        cluster,
        system_identifier: SystemIdentifier::new(SYSTEM),
        node: "a".parse().unwrap(),
        from_standby: false,
        primary: None,
        postgres_major: 15,
        control_version: 1300,
        catalog_version: 1,
        segment_size_bytes: size_bytes,
        block_size: 8192,
        relation_segment_blocks: 131_072,
        checksum_version: 1,
        wal_log_hints: false,
        start_timeline: Timeline::FIRST,
        start_lsn,
        start_time: at,
        stop_timeline: Timeline::FIRST,
        stop_lsn,
        stop_time: at,
        min_recovery_point: None,
        start_next_xid: None,
        stop_next_xid: None,
        last_commit_time: None,
        label: String::new(),
        backup_label: ByteText::new(Vec::new()),
        tablespace_map: ByteText::new(Vec::new()),
        mode: 0o700,
        owner: None,
        group: None,
        references: older.iter().map(|older| older.entry.backup).collect(),
        attempts: Vec::new(),
        page_errors: 0,
        wal_witnesses: vec![witness(first, size_bytes), witness(first + 1, size_bytes)],
        warnings: Vec::new(),
        page_error_list: Vec::new(),
        databases: Vec::new(),
        wal_directory: None,
        unknown: BTreeMap::new(),
    };
    let mut writer = ManifestWriter::new(Vec::new(), head.clone()).unwrap();
    writer.add(&Line::Pack(Pack { backup: None, number: 1, size: pack.size, sha256: pack.sha256 })).unwrap();
    for Made { entry, parts } in older {
        let (_, bytes, sha256) = &parts[0];
        let pack = Pack { backup: Some(entry.backup), number: 1, size: bytes.len() as u64, sha256: *sha256 };
        writer.add(&Line::Pack(pack)).unwrap();
    }
    let (manifest, summary) = writer.finish().unwrap();
    let cluster = "main".parse().unwrap();
    let entry = repository::backup::entry(&head, &summary);
    let parts = vec![
        (key::pack(&cluster, &backup, 1), pack_bytes, pack.sha256),
        (key::manifest(&cluster, &backup), manifest.into(), summary.sha256),
    ];
    Made { entry, parts }
}

impl Rig {
    async fn put_object(&self, key: &ObjectKey, bytes: &bytes::Bytes, sha256: [u8; 32]) -> Result<(), Status> {
        let open = PutBackupObjectOpen {
            cluster: "main".to_owned(),
            node: "a".to_owned(),
            key: key.to_string(),
            stored_size: bytes.len() as u64,
            stored_sha256: sha256.to_vec().into(),
        };
        let parts =
            [put_backup_object_request::Part::Open(open), put_backup_object_request::Part::Chunk(bytes.clone())];
        let messages = parts.into_iter().map(|part| PutBackupObjectRequest { part: Some(part) });
        let mut client = ArchiveServiceClient::new(self.channel().await);
        client.put_backup_object(stream::iter(messages)).await.map(|_| ())
    }

    pub(super) async fn send(&self, made: &Made) {
        for (key, bytes, sha256) in &made.parts {
            self.put_object(key, bytes, *sha256).await.unwrap();
        }
    }

    pub(super) async fn publish(&self, entry: &RootBackup) -> Result<proto::archive::PublishBackupResponse, Status> {
        let request = PublishBackupRequest {
            cluster: "main".to_owned(),
            node: "a".to_owned(),
            backup: entry.backup.to_string(),
            root_entry_json: entry.to_json(),
            wal_wait_seconds: 2,
            may_be_kept: false,
        };
        let mut client = ArchiveServiceClient::new(self.channel().await);
        client.publish_backup(request).await.map(tonic::Response::into_inner)
    }

    async fn backups_in(&self, store: usize) -> usize {
        let root = root::newest(&*self.stores[store], &"main".parse().unwrap()).await.unwrap();
        root.map_or(0, |root| root.backups.len())
    }
}

#[tokio::test]
async fn a_backup_is_ordered_uploaded_published_and_followed() {
    let rig = Rig::with_cluster(Ack::All).await;
    let mut operator = rig.operator().await;
    let request =
        StartBackupRequest { cluster: "main".to_owned(), request_id: "nightly".to_owned(), ..Default::default() };
    assert_eq!(reason(&operator.start_backup(request.clone()).await.unwrap_err()), "NO_FIT_NODE");
    let mut agent = rig.connect("a", primary(1)).await;
    let operation = operator.start_backup(request.clone()).await.unwrap().into_inner().operation.unwrap();
    assert!(operation.reason.contains("primary a"), "{}", operation.reason);
    let again = operator.start_backup(request).await.unwrap().into_inner().operation.unwrap();
    assert_eq!(again.operation, operation.operation);
    let order = agent.hear(|message| match message {
        session_response::Message::Order(order) => Some(order),
        _ => None,
    });
    let order = order.await;
    let Some(order::What::TakeBackup(take)) = order.what else { panic!("another order") };
    assert_eq!(take.backup, operation.backup);
    let made = make(&take.backup);
    let update = |state: OrderState, done: u64| {
        session_request::Message::OrderUpdate(OrderUpdate {
            operation: operation.operation.clone(),
            state: state.into(),
            step: "copying".to_owned(),
            bytes_done: done,
            bytes_total: 10,
            built_on: "incr on another".to_owned(),
            ..Default::default()
        })
    };
    agent.say(update(OrderState::Running, 4)).await;
    assert_eq!(take.r#type(), proto::fleet::BackupType::Incr);
    // Parts and WAL first: nothing is published before.
    assert_eq!(reason(&rig.publish(&made.entry).await.unwrap_err()), "NOT_PUBLISHED");
    for (key, bytes, sha256) in &made.parts {
        rig.put_object(key, bytes, *sha256).await.unwrap();
        rig.put_object(key, bytes, *sha256).await.unwrap();
    }
    let other = bytes::Bytes::from_static(b"other");
    let digest = repository::store::Body::Memory(other.clone()).sha256().await.unwrap();
    assert_eq!(reason(&rig.put_object(&made.parts[0].0, &other, digest).await.unwrap_err()), "OBJECT_CONFLICT");
    let status = rig.publish(&made.entry).await.unwrap_err();
    assert!(status.message().contains(&segment(3)), "{status}");
    rig.push(&wal(&segment(3), "a", SEGMENT)).await.unwrap();
    rig.push(&wal(&segment(4), "a", SEGMENT)).await.unwrap();
    assert_eq!(rig.publish(&made.entry).await.unwrap().stores, ["repo1", "s3"]);
    assert_eq!(rig.publish(&made.entry).await.unwrap().stores, ["repo1", "s3"]);
    agent.say(update(OrderState::Done, 10)).await;
    let wait = WaitOperationRequest { operation: operation.operation.clone(), timeout_seconds: 10 };
    let ended = operator.wait_operation(wait).await.unwrap().into_inner().operation.unwrap();
    assert_eq!(ended.state(), OperationState::Done);
    assert_eq!(ended.reason, format!("{}; incr on another", operation.reason));
    let watch = proto::operator::WatchOperationRequest { operation: operation.operation };
    let mut changes = operator.watch_operation(watch).await.unwrap().into_inner();
    let last = changes.message().await.unwrap().unwrap().operation.unwrap();
    assert_eq!(last.state(), OperationState::Done);
    assert!(changes.message().await.unwrap().is_none());
    let info = rig.info().await;
    assert_eq!(info["clusters"][0]["backups"][0]["backup"], take.backup);
    drop((agent, changes, operator));
    rig.end().await;
}

#[tokio::test]
async fn a_backup_with_another_servers_wal_is_not_published() {
    let rig = Rig::with_cluster(Ack::All).await;
    let made = make("20261123T034138Z-7f3a9c21");
    for (key, bytes, sha256) in &made.parts {
        rig.put_object(key, bytes, *sha256).await.unwrap();
    }
    rig.push(&wal(&segment(3), "a", SEGMENT)).await.unwrap();
    rig.push(&wal(&segment(4), "a", "of the original")).await.unwrap();
    let status = rig.publish(&made.entry).await.unwrap_err();
    assert_eq!(reason(&status), "NOT_PUBLISHED");
    assert!(status.message().contains(&format!("WAL {} is another server's", segment(4))), "{status}");
    let silent = RootBackup { wal_witnesses: Vec::new(), ..made.entry.clone() };
    assert!(rig.publish(&silent).await.unwrap_err().message().contains("no witnesses"));
    assert_eq!((rig.backups_in(0).await, rig.backups_in(1).await), (0, 0));
    rig.end().await;
}

#[tokio::test]
async fn a_store_that_was_away_gets_the_backup_later() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.stores[0].fail_everything(Fault::Fail);
    let made = make("20261123T034138Z-7f3a9c21");
    for number in [3, 4] {
        rig.push(&wal(&segment(number), "a", SEGMENT)).await.unwrap();
    }
    for (key, bytes, sha256) in &made.parts {
        rig.put_object(key, bytes, *sha256).await.unwrap();
    }
    let published = rig.publish(&made.entry).await.unwrap();
    assert_eq!((published.stores, published.lagging), (vec!["s3".to_owned()], vec!["repo1".to_owned()]));
    rig.stores[0].heal();
    rig.coordinator.stores.check().await;
    rig.pass().await;
    assert_eq!((rig.backups_in(0).await, rig.backups_in(1).await), (1, 1));
    let before = rig.info().await;
    rig.pass().await;
    assert_eq!(rig.info().await, before);
    rig.end().await;
}

#[tokio::test]
async fn a_store_without_what_a_backup_builds_on_gets_that_too() {
    let rig = Rig::with_cluster(Ack::All).await;
    let parent = make("20261123T034138Z-7f3a9c21");
    let child = make_on("20261124T034138Z-7f3a9c21", Some(&parent));
    for number in [3, 4] {
        rig.push(&wal(&segment(number), "a", SEGMENT)).await.unwrap();
    }
    // One store has the parent's pack, though no root names the parent any more.
    let (pack, bytes, _) = &parent.parts[0];
    let _ = rig.stores[1].put_new(pack, bytes.clone().into()).await.unwrap();
    let (cluster, owner) = ("main".parse().unwrap(), parent.entry.backup);
    assert!(
        crate::pins::for_copy(&rig.coordinator, &*rig.stores[1], &cluster, &child.entry, None, &[owner]).await.unwrap()
    );
    for (key, bytes, sha256) in &child.parts {
        rig.put_object(key, bytes, *sha256).await.unwrap();
    }
    let published = rig.publish(&child.entry).await.unwrap();
    assert_eq!((published.stores, published.lagging), (vec!["s3".to_owned()], vec!["repo1".to_owned()]));
    rig.pass().await;
    assert_eq!((rig.backups_in(0).await, rig.backups_in(1).await), (1, 1));
    assert_eq!(rig.stores[0].head(pack).await.unwrap(), Some(bytes.len() as u64));
    rig.end().await;
}

#[tokio::test]
async fn a_store_that_fails_while_a_backup_is_published_lags_and_the_others_have_it() {
    for fault in [Fault::Fail, Fault::Hang(Duration::from_secs(60))] {
        let rig = Rig::with_cluster(Ack::All).await;
        let made = make("20261123T034138Z-7f3a9c21");
        for number in [3, 4] {
            rig.push(&wal(&segment(number), "a", SEGMENT)).await.unwrap();
        }
        for (key, bytes, sha256) in &made.parts {
            rig.put_object(key, bytes, *sha256).await.unwrap();
        }
        rig.stores[0].fail_all(Operation::List, fault);
        let begun = Monotonic::now();
        let published = rig.publish(&made.entry).await.unwrap();
        assert_eq!((published.stores, published.lagging), (vec!["s3".to_owned()], vec!["repo1".to_owned()]));
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert!(matches!(rig.health(0), Health::Lagging { .. }));
        rig.stores[0].heal();
        rig.coordinator.stores.check().await;
        rig.pass().await;
        assert_eq!((rig.backups_in(0).await, rig.backups_in(1).await), (1, 1));
        rig.end().await;
    }
}

#[tokio::test]
async fn a_backup_is_published_when_the_only_store_comes_back() {
    let rig = Rig::start(memory(&["repo1"]), Ack::All).await;
    rig.create("main").await.unwrap();
    let made = make("20261123T034138Z-7f3a9c21");
    for number in [3, 4] {
        rig.push(&wal(&segment(number), "a", SEGMENT)).await.unwrap();
    }
    for (key, bytes, sha256) in &made.parts {
        rig.put_object(key, bytes, *sha256).await.unwrap();
    }
    // The first look at its parts fails.
    rig.stores[0].fail_nth(Operation::List, 1, Fault::Fail);
    assert_eq!(rig.publish(&made.entry).await.unwrap().stores, ["repo1"]);
    rig.stores[0].fail_everything(Fault::Fail);
    assert_eq!(reason(&rig.publish(&made.entry).await.unwrap_err()), "NOT_PUBLISHED");
    rig.end().await;
}

#[tokio::test]
async fn a_store_that_fails_for_a_moment_does_not_end_the_wait_for_wal() {
    let (store, made) = (memory(&["repo1"]).remove(0), make("20261123T034138Z-7f3a9c21"));
    for number in [3, 4] {
        put_directly(&store, &wal(&segment(number), "a", SEGMENT)).await;
    }
    let cluster = "main".parse().unwrap();
    let wait = async |patience| wait_for_wal(&*store, &cluster, &made.entry, Monotonic::now() + patience).await;
    store.fail_nth(Operation::List, 1, Fault::Fail);
    wait(DEADLINE).await.unwrap();
    store.fail_all(Operation::List, Fault::Fail);
    assert!(wait(Duration::ZERO).await.unwrap_err().contains("unavailable"));
}

#[tokio::test]
async fn a_check_says_what_came_and_what_did_not() {
    let rig = Rig::with_cluster(Ack::All).await;
    let mut operator = rig.operator().await;
    let request = CheckClusterRequest { cluster: "main".to_owned(), timeout_seconds: 5 };
    let lines = operator.check_cluster(request.clone()).await.unwrap().into_inner().lines;
    assert!(lines.iter().any(|line| line.rule == "segment" && line.state() == CheckState::Failed), "{lines:?}");
    let mut agent = rig.connect("a", primary(1)).await;
    let checking = tokio::spawn(async move { operator.check_cluster(request).await.unwrap().into_inner().lines });
    let order = agent.hear(|message| match message {
        session_response::Message::Order(order) => Some(order),
        _ => None,
    });
    let order = order.await;
    assert!(matches!(order.what, Some(order::What::SwitchWal(_))));
    rig.push(&wal(&segment(9), "a", "nine")).await.unwrap();
    let done = OrderUpdate {
        operation: order.operation,
        state: OrderState::Done.into(),
        wal_file: segment(9),
        lsn: 0x900_0000,
        ..Default::default()
    };
    agent.say(session_request::Message::OrderUpdate(done)).await;
    agent.say(session_request::Message::Report(Report { last_acked: segment(9), ..primary(1) })).await;
    let lines = checking.await.unwrap();
    assert!(lines.iter().all(|line| line.state() == CheckState::Ok), "{lines:#?}");
    let rules: Vec<&str> = lines.iter().map(|line| line.rule.as_str()).collect();
    let expected = [
        "identity",
        "node a",
        "store repo1",
        "store s3",
        "archived WAL",
        "contents",
        "retention in repo1",
        "retention in s3",
    ];
    assert_eq!(rules[..8], expected);
    assert_eq!(rules[8..], ["segment", "segment in repo1", "segment in s3", "archive_command of a"]);
    drop(agent);
    rig.end().await;
}
