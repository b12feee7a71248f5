//! Archiving over a scripted coordinator and memory stores, with files of real servers.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::TryStreamExt;
use repository::key::ObjectKey;
use repository::name::StoreName;
use repository::store::{Body, ByteRange, ByteStream, ListPage, ObjectStore, Put, Room, StoreError};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::resend::{follow_road, offer_to_coordinator};
use super::*;
use crate::road::{Road, Seen};
use crate::testing::{
    FULL, FakeNode, HISTORY, INCOMPLETE, RECYCLED, SWITCH, Scripted, Step, memory, metrics, names_in, roads, sample,
    until,
};

const WAIT: Duration = Duration::from_secs(20);

fn refused(pushed: &Pushed, part: &str) {
    match pushed {
        Pushed::Not(reason) => assert!(reason.contains(part), "{part:?} not in {reason:?}"),
        Pushed::Durable => panic!("acknowledged"),
    }
}

#[tokio::test]
async fn a_pushed_file_is_in_the_store_and_is_answered_from_the_ledger_afterwards() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    let path = node.wal(FULL);
    assert_eq!(archive.push(&path, WAIT).await, Pushed::Durable);
    assert_eq!(names_in(&scripted.stores[0]).await, [FULL]);
    drop(server);
    assert_eq!(archive.push(&path, WAIT).await, Pushed::Durable, "known without the coordinator");
    assert_eq!(archive.last_acked().unwrap().to_string(), FULL);
    assert_eq!(scripted.received().len(), 1);
    let ledger = Ledger::open(&node.spool.ledger_path()).unwrap();
    assert!(ledger.contains(&FULL.parse().unwrap()));
}

#[tokio::test]
async fn what_outgrew_its_memory_is_read_once_more_when_the_spool_has_no_room_for_it() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    // The next files that bodies go on to are on a full disk.
    let last = node.spool.overflow_path();
    let folder = last.parent().unwrap().to_owned();
    for number in 1..9 {
        std::os::unix::fs::symlink("/dev/full", folder.join(format!("{number:016x}"))).unwrap();
    }
    let left = || std::fs::read_dir(&folder).unwrap().count();
    let all = archive.budget.take(u64::MAX).await;
    let path = node.wal(FULL);
    let push = tokio::spawn({
        let archive = Arc::clone(&archive);
        async move { archive.push(&path, WAIT).await }
    });
    until(async || (left() == 7).then_some(())).await;
    assert!(!push.is_finished());
    drop(all);
    assert_eq!(push.await.unwrap(), Pushed::Durable);
    assert_eq!(names_in(&scripted.stores[0]).await, [FULL]);
    assert_eq!(left(), 6, "what the two attempts left is removed");
}

#[tokio::test]
async fn what_another_repository_took_is_archived_anew() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    let (path, home) = (node.wal(FULL), node.spool.home());
    let mut sent = 0;
    let mut check = async |what: &str, expected: usize| {
        for _ in 0..2 {
            assert_eq!(archive.push(&path, WAIT).await, Pushed::Durable, "{what}");
        }
        let before = std::mem::replace(&mut sent, scripted.received().len());
        assert_eq!(sent - before, expected, "{what}");
    };
    check("before any coordinator named its repository", 1).await;
    home.told(Uuid::from_u128(1)).unwrap();
    check("it is named", 1).await;
    check("nothing has changed", 0).await;
    home.told_absent();
    check("the coordinator has none, so every question is asked anew", 2).await;
    home.told(Uuid::from_u128(1)).unwrap();
    check("it has the same one again", 0).await;
    home.told(Uuid::from_u128(2)).unwrap();
    check("it has another one", 1).await;
    check("nothing has changed since", 0).await;
}

#[tokio::test]
async fn another_file_under_the_same_name_is_read_again() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    let path = node.wal(FULL);
    assert_eq!(archive.push(&path, WAIT).await, Pushed::Durable);
    // The same bytes in another inode: sent again, and stored once.
    std::fs::remove_file(&path).unwrap();
    node.wal(SWITCH);
    node.wal(FULL);
    assert_eq!(archive.push(&path, WAIT).await, Pushed::Durable);
    assert_eq!(scripted.received().len(), 2);
    assert_eq!(names_in(&scripted.stores[0]).await, [FULL]);
}

#[tokio::test]
async fn ready_files_are_shipped_before_postgresql_asks() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    let running = tokio::spawn(Arc::clone(&archive).run(stop.clone(), |_| ()));
    for name in [SWITCH, FULL, HISTORY] {
        node.wal(name);
        node.ready(name);
    }
    until(async || (archive.answers() == 3).then_some(())).await;
    assert_eq!(archive.last_acked(), None);
    let received = scripted.received().len();
    assert_eq!(archive.push(&node.data.pg_wal().join(FULL), WAIT).await, Pushed::Durable);
    assert_eq!(scripted.received().len(), received);
    assert_eq!(
        node.spool.history("00000002".parse::<u32>().ok().and_then(postgres_format::Timeline::new).unwrap()).unwrap(),
        sample(HISTORY)
    );
    // A file flagged later is noticed by notification or rescan.
    let later = "000000010000000000000019.partial";
    node.wal(later);
    node.ready(later);
    until(async || (archive.answers() == 4).then_some(())).await;
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn segments_that_lost_their_flag_are_shipped_and_not_acknowledged() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    node.wal(FULL);
    node.wal(SWITCH);
    node.ready(SWITCH);
    let running = tokio::spawn(Arc::clone(&archive).run(stop.clone(), |_| ()));
    until(async || (names_in(&scripted.stores[0]).await == [FULL, SWITCH]).then_some(())).await;
    assert_eq!(archive.last_acked(), None);
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn what_is_no_finished_segment_of_this_cluster_is_refused() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    let put = |name: &str, content: &[u8]| {
        let path = node.data.pg_wal().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    refused(&archive.push(&node.wal(RECYCLED), WAIT).await, "recycled");
    refused(&archive.push(&put(SWITCH, &sample(FULL)), WAIT).await, "recycled");
    refused(&archive.push(&put(FULL, &sample(FULL)[..8192]), WAIT).await, "expected 1048576");
    let mut foreign = sample(FULL);
    foreign[24] ^= 1;
    refused(&archive.push(&put(FULL, &foreign), WAIT).await, "another cluster");
    let mut damaged = sample(FULL);
    damaged[300_000] ^= 0xff;
    refused(&archive.push(&put(FULL, &damaged), WAIT).await, "damaged");
    refused(&archive.push(&node.data.pg_wal().join("00000001000000000000000C"), WAIT).await, "cannot be looked at");
    refused(&archive.push(&node.data.pg_wal().join("RECOVERYXLOG"), WAIT).await, "no name of a WAL file");
    assert!(scripted.received().is_empty());
    // The same file, whole again, is taken: the refusal was about the other one.
    assert_eq!(archive.push(&put(FULL, &sample(FULL)), WAIT).await, Pushed::Durable);
}

#[tokio::test]
async fn an_incomplete_segment_goes_out_from_a_standby_only() {
    let stop = CancellationToken::new();
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let primary = FakeNode::new();
    let archive = primary.archive(roads(&primary, &address, None, &stop), &stop);
    refused(&archive.push(&primary.wal(INCOMPLETE), WAIT).await, "not finished");
    let standby = FakeNode::standby();
    let archive = standby.archive(roads(&standby, &address, None, &stop), &stop);
    let path = standby.wal(INCOMPLETE);
    assert_eq!(archive.push(&path, WAIT).await, Pushed::Durable);
}

#[tokio::test]
async fn a_standby_ships_nothing_ahead() {
    let (node, stop) = (FakeNode::standby(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    node.wal(FULL);
    node.ready(FULL);
    let (seen, mut looks) = tokio::sync::mpsc::channel(16);
    let running = tokio::spawn(Arc::clone(&archive).run(stop.clone(), move |backlog| {
        let _ = seen.try_send(backlog.ready_files);
    }));
    assert_eq!(looks.recv().await, Some(1));
    archive.wake.notify_one();
    assert_eq!(looks.recv().await, Some(1));
    assert!(scripted.received().is_empty());
    assert_eq!(archive.push(&node.data.pg_wal().join(FULL), WAIT).await, Pushed::Durable);
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_lost_answer_is_healed_by_sending_again() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    scripted.then(Step::StoreAndLose);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    assert_eq!(archive.push(&node.wal(FULL), WAIT).await, Pushed::Durable);
    assert_eq!(scripted.received(), [FULL, FULL]);
    assert_eq!(names_in(&scripted.stores[0]).await, [FULL]);
}

#[tokio::test]
async fn a_conflict_is_said_and_never_acknowledged() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let details = ErrorDetails::with_error_info("WAL_CONFLICT", proto::ERROR_DOMAIN, std::collections::HashMap::new());
    scripted.then(Step::Refuse(Status::with_error_details(Code::AlreadyExists, "stored with other content", details)));
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, Some(memory("s3")), &stop), &stop);
    let path = node.wal(FULL);
    refused(&archive.push(&path, WAIT).await, "WAL_CONFLICT");
    refused(&archive.push(&path, WAIT).await, "WAL_CONFLICT");
    assert_eq!(scripted.received().len(), 1, "a fresh refusal is remembered");
}

#[tokio::test]
async fn without_any_road_a_push_waits_and_says_so() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let archive = node.archive(roads(&node, "127.0.0.1:9", None, &stop), &stop);
    let path = node.wal(FULL);
    refused(&archive.push(&path, Duration::from_millis(700)).await, "no way off this host");
    assert_eq!(archive.answers(), 0);
    stop.cancel();
    tokio::time::timeout(WAIT, archive.finish()).await.unwrap();
}

#[tokio::test]
async fn a_dead_coordinator_diverts_to_the_direct_store_and_back() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let direct = memory("s3");
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, server) = scripted.serve("127.0.0.1:0").await;
    let roads = roads(&node, &address, Some(Arc::clone(&direct)), &stop);
    let archive = node.archive(roads.clone(), &stop);
    let resending = tokio::spawn(follow_road(roads.clone(), metrics(), stop.clone()));
    // repo1 alone has the first one, so a copy is kept.
    assert_eq!(archive.push(&node.wal(FULL), WAIT).await, Pushed::Durable);
    assert_eq!(node.spool.retained_keys().len(), 1);
    assert!(names_in(&direct).await.is_empty());
    drop(server);
    assert_eq!(archive.push(&node.wal(SWITCH), WAIT).await, Pushed::Durable);
    assert_eq!(roads.watch.road(), Road::Direct);
    until(async || (names_in(&direct).await == [FULL, SWITCH]).then_some(())).await;
    until(async || node.spool.retained_keys().is_empty().then_some(())).await;
    let (_, _server) = scripted.serve(&address).await;
    let link = roads.link.clone().unwrap();
    until(async || {
        link.probe().await;
        (roads.watch.road() == Road::Coordinator).then_some(())
    })
    .await;
    assert_eq!(archive.push(&node.wal(HISTORY), WAIT).await, Pushed::Durable);
    assert_eq!(scripted.received().last().unwrap(), HISTORY);
    stop.cancel();
    resending.await.unwrap();
}

#[tokio::test]
async fn a_silent_coordinator_and_a_full_one_divert_too() {
    for step in [Step::Silence, Step::Refuse(full())] {
        let (node, stop) = (FakeNode::new(), CancellationToken::new());
        let direct = memory("s3");
        let scripted = Scripted::new(vec![memory("repo1")]);
        scripted.then(step);
        let (address, _server) = scripted.serve("127.0.0.1:0").await;
        let roads = roads(&node, &address, Some(Arc::clone(&direct)), &stop);
        let archive = node.archive(roads.clone(), &stop);
        assert_eq!(archive.push(&node.wal(FULL), WAIT).await, Pushed::Durable);
        assert_eq!(roads.watch.road(), Road::Direct);
        assert_eq!(names_in(&direct).await, [FULL]);
        stop.cancel();
    }
}

fn full() -> Status {
    let details = ErrorDetails::with_error_info("STORE_FULL", proto::ERROR_DOMAIN, std::collections::HashMap::new());
    Status::with_error_details(Code::ResourceExhausted, "use the direct road", details)
}

#[tokio::test]
async fn copies_are_kept_exactly_while_a_store_lacks_them() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let direct = memory("s3");
    let scripted = Scripted::new(vec![memory("repo1"), Arc::clone(&direct)]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let roads = roads(&node, &address, Some(direct), &stop);
    let archive = node.archive(roads.clone(), &stop);
    assert_eq!(archive.push(&node.wal(FULL), WAIT).await, Pushed::Durable);
    assert!(node.spool.retained_keys().is_empty(), "both stores had it");
    scripted.lagging.lock().unwrap().push("s3".to_owned());
    assert_eq!(archive.push(&node.wal(SWITCH), WAIT).await, Pushed::Durable);
    assert_eq!(node.spool.retained_keys().len(), 1);
    let link = roads.link.clone().unwrap();
    offer_to_coordinator(&roads, &link).await;
    assert_eq!(node.spool.retained_keys().len(), 1, "still lagging");
    scripted.lagging.lock().unwrap().clear();
    offer_to_coordinator(&roads, &link).await;
    assert!(node.spool.retained_keys().is_empty(), "every store has it now");
}

#[tokio::test]
async fn an_unknown_cluster_is_asked_about_again_soon() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let details =
        ErrorDetails::with_error_info("CLUSTER_UNKNOWN", proto::ERROR_DOMAIN, std::collections::HashMap::new());
    scripted.then(Step::Refuse(Status::with_error_details(Code::FailedPrecondition, "run cluster create", details)));
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    let path = node.wal(FULL);
    refused(&archive.push(&path, WAIT).await, "cluster create");
    assert_eq!(archive.push(&path, WAIT).await, Pushed::Durable);
}

#[tokio::test]
async fn a_road_that_turns_away_ends_uploads_under_way() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let direct = memory("s3");
    let scripted = Scripted::new(vec![memory("repo1")]);
    scripted.then(Step::Silence);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let roads = roads(&node, &address, Some(Arc::clone(&direct)), &stop);
    let archive = node.archive(roads.clone(), &stop);
    let path = node.wal(FULL);
    let push = tokio::spawn({
        let archive = Arc::clone(&archive);
        async move { archive.push(&path, WAIT).await }
    });
    until(async || (scripted.received().len() == 1).then_some(())).await;
    roads.watch.see(Seen::Full);
    assert_eq!(push.await.unwrap(), Pushed::Durable);
    assert_eq!(names_in(&direct).await, [FULL]);
}

#[tokio::test]
async fn nothing_goes_ahead_past_a_conflict() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    for _ in 0..2 {
        let details =
            ErrorDetails::with_error_info("WAL_CONFLICT", proto::ERROR_DOMAIN, std::collections::HashMap::new());
        scripted.then(Step::Refuse(Status::with_error_details(Code::AlreadyExists, "other content", details)));
    }
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    for name in [FULL, SWITCH] {
        node.wal(name);
        node.ready(name);
    }
    let running = tokio::spawn(Arc::clone(&archive).run(stop.clone(), |_| ()));
    until(async || (!scripted.received().is_empty()).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(scripted.received(), [FULL], "the file behind the refused one stays here");
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_panicking_job_gives_its_name_back() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let store = Troubled::store(Trouble::PanicsOnce);
    let archive = node.archive(direct_only(&node, store, &stop), &stop);
    let path = node.wal(FULL);
    assert_ne!(archive.push(&path, WAIT).await, Pushed::Durable);
    assert_eq!(archive.push(&path, WAIT).await, Pushed::Durable);
}

#[tokio::test]
async fn a_node_that_may_only_put_archives_by_the_direct_road() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let store = Troubled::store(Trouble::PutAlone);
    let archive = node.archive(direct_only(&node, Arc::clone(&store) as _, &stop), &stop);
    assert_eq!(archive.push(&node.wal(FULL), WAIT).await, Pushed::Durable);
    assert_eq!(names_in(&store.inner).await, [FULL]);
}

#[tokio::test]
async fn a_damaged_copy_in_the_direct_store_is_refused_with_what_to_do() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let store = Troubled::store(Trouble::FlipsBits);
    let archive = node.archive(direct_only(&node, store, &stop), &stop);
    let path = node.wal(FULL);
    assert_eq!(archive.push(&path, WAIT).await, Pushed::Durable);
    // A touched file is not answered from the ledger.
    std::fs::File::options().append(true).open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let pushed = archive.push(&path, WAIT).await;
    refused(&pushed, "is damaged");
    refused(&pushed, "delete c/main/");
}

fn direct_only(node: &FakeNode, direct: Arc<Troubled>, stop: &CancellationToken) -> Roads {
    let mut roads = roads(node, "127.0.0.1:9", Some(direct), stop);
    roads.link = None;
    roads
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    /// The first put panics.
    PanicsOnce,
    /// Everything but a put is denied.
    PutAlone,
    /// What is read differs from what was put.
    FlipsBits,
}

#[derive(Debug)]
struct Troubled {
    inner: Arc<dyn ObjectStore>,
    trouble: Mutex<Trouble>,
}

impl Troubled {
    fn store(trouble: Trouble) -> Arc<Self> {
        Arc::new(Self { inner: memory("s3"), trouble: Mutex::new(trouble) })
    }

    fn trouble(&self) -> Trouble {
        *self.trouble.lock().unwrap()
    }

    fn allowed(&self) -> Result<(), StoreError> {
        match self.trouble() {
            Trouble::PutAlone => {
                Err(StoreError::Denied { store: self.inner.name().clone(), source: "AccessDenied".into() })
            }
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl ObjectStore for Troubled {
    fn name(&self) -> &StoreName {
        self.inner.name()
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        if self.trouble() == Trouble::PanicsOnce {
            *self.trouble.lock().unwrap() = Trouble::None;
            panic!("a planned panic");
        }
        self.inner.put_new(key, body).await
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        self.allowed()?;
        let stream = self.inner.get(key, range).await?;
        if self.trouble() != Trouble::FlipsBits {
            return Ok(stream);
        }
        Ok(Box::pin(stream.map_ok(|piece| piece.iter().map(|byte| byte ^ 1).collect())))
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        self.allowed()?;
        self.inner.head(key).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        self.allowed()?;
        self.inner.list(prefix, start_after, limit).await
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        self.inner.room().await
    }
}

#[tokio::test]
async fn a_text_that_is_not_what_its_name_says_is_refused_and_shown() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let scripted = Scripted::new(vec![memory("repo1")]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let archive = node.archive(roads(&node, &address, None, &stop), &stop);
    let path = |name: &str| node.data.pg_wal().join(name);
    let (history, backup) = ("00000003.history", "000000010000000000000007.00000028.backup");
    for (name, content, part) in [
        (history, "", "names no timeline that it came from"),
        (history, "garbage\n", "is not a timeline, a tab and an LSN"),
        (backup, "garbage\n", "START WAL LOCATION"),
        (backup, "", "is blank"),
    ] {
        std::fs::write(path(name), content).unwrap();
        refused(&archive.push(&path(name), WAIT).await, part);
    }
    assert_eq!((archive.held_up_by(), scripted.received().len()), (None, 0));
    // The server does not flush it, so a power cut has left it blank, and the server wants it archived all the same.
    node.ready(backup);
    archive.state().refused.clear();
    assert_eq!(archive.push(&path(backup), WAIT).await, Pushed::Durable);
    assert_eq!(scripted.received(), [backup]);
    node.ready(history);
    let running = tokio::spawn(Arc::clone(&archive).run(stop.clone(), |_| {}));
    let why = until(async || archive.held_up_by()).await;
    assert!(why.starts_with("00000003.history: 00000003.history is not what its name says: "), "{why}");
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn what_is_no_regular_file_is_refused_at_once() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let archive = node.archive(roads(&node, "127.0.0.1:1", None, &stop), &stop);
    let (pipe, folder) = (node.data.pg_wal().join(FULL), node.data.pg_wal().join(SWITCH));
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    std::fs::create_dir(&folder).unwrap();
    refused(&archive.push(&pipe, WAIT).await, "it is a FIFO, not a regular file");
    refused(&archive.push(&folder, WAIT).await, "it is a directory, not a regular file");
}
