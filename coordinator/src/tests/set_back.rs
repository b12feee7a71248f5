//! A store that is set back to an older copy of itself, and WAL that is in a store no more.

use proto::operator::{AcceptStoreRequest, CheckClusterRequest, CheckState, ExpireRequest, StartBackupRequest};
use repository::acceptance::{Fate, Report as Acceptance};
use repository::name::{BackupId, ClusterName, StoreName};
use repository::root::{self, Root};
use repository::stores::faulty::{Fault, Operation};

use super::*;

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

impl Rig {
    /// The numbers of the roots in a store.
    async fn roots_in(&self, store: usize) -> Vec<u64> {
        let objects = list_all(&*self.stores[store], "c/main/root/", LIST_LIMIT).await.unwrap();
        let number = |key: &ObjectKey| u64::from_str_radix(key.as_str().rsplit('/').next().unwrap(), 16).unwrap();
        objects.iter().map(|entry| number(&entry.key)).collect()
    }

    async fn newest_in(&self, store: usize) -> Root {
        root::newest(&*self.stores[store], &cluster()).await.unwrap().unwrap()
    }

    /// Removes what a store came to hold since then, as putting an older copy back does.
    async fn set_back(&self, store: usize, then: &[ObjectKey]) {
        for key in self.objects_in(store).await.iter().filter(|key| !then.contains(key)) {
            let _ = self.stores[store].delete(key).await.unwrap();
        }
    }

    async fn objects_in(&self, store: usize) -> Vec<ObjectKey> {
        let objects = list_all(&*self.stores[store], "c/", 10 * LIST_LIMIT).await.unwrap();
        objects.into_iter().map(|entry| entry.key).collect()
    }

    /// Makes the history longer: a pin comes and goes in every store.
    async fn lengthen(&self, number: u32) {
        let (backup, node) = (BackupId::new(now(), number), "a".parse().unwrap());
        crate::pins::begin(&self.coordinator, &cluster(), backup, &node, now()).await;
        crate::pins::give_up(&self.coordinator, &cluster(), backup).await;
    }

    async fn accept(&self, store: &str, confirm: &str) -> Result<Acceptance, Status> {
        let (store, confirm) = (store.to_owned(), confirm.to_owned());
        let request = AcceptStoreRequest { store, cluster: String::new(), confirm };
        let answer = self.operator().await.accept_store(request).await?;
        Ok(serde_json::from_str(&answer.into_inner().report_json).unwrap())
    }

    /// What `info` says is wrong.
    async fn problems(&self) -> String {
        self.info().await["clusters"][0]["problems"].to_string()
    }

    fn is_set_back(&self, store: &str) -> bool {
        let store: StoreName = store.parse().unwrap();
        self.coordinator.roots.set_back(&store, &cluster()).is_some()
    }

    /// A backup in every store, with its WAL.
    async fn backed_up(&self) -> BackupId {
        let made = super::backups::make("20261123T034138Z-7f3a9c21");
        for number in [3, 4] {
            self.push(&wal(&segment(number), "a", super::backups::SEGMENT)).await.unwrap();
        }
        self.send(&made).await;
        assert_eq!(self.publish(&made.entry).await.unwrap().stores.len(), 2);
        made.entry.backup
    }
}

#[tokio::test]
async fn nothing_is_committed_to_a_store_that_was_set_back_until_that_is_accepted() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.lengthen(1).await;
    rig.pass().await;
    let then = rig.objects_in(0).await;
    let older = rig.newest_in(0).await.generation.get();
    let backup = rig.backed_up().await;
    rig.lengthen(2).await;
    let seen = rig.newest_in(0).await.generation.get();
    rig.set_back(0, &then).await;
    // Whatever asks first finds out; nothing is committed, and the other store goes on.
    rig.lengthen(3).await;
    rig.pass().await;
    assert!(rig.is_set_back("repo1") && !rig.is_set_back("s3"));
    assert_eq!(rig.roots_in(0).await, (1..=older).collect::<Vec<_>>());
    assert!(rig.newest_in(1).await.generation.get() > seen);
    // WAL is only ever added, so it comes back at once; the backup does not.
    assert_eq!(rig.wal_keys(0).await, rig.wal_keys(1).await);
    let problems = rig.problems().await;
    assert!(problems.contains(&format!("root {seen} of cluster main was seen there, and now the newest is {older}")));
    let request = CheckClusterRequest { cluster: "main".to_owned(), timeout_seconds: 1 };
    let lines = rig.operator().await.check_cluster(request).await.unwrap().into_inner().lines;
    let line = lines.iter().find(|line| line.rule == "store repo1").unwrap();
    assert!(line.state() == CheckState::Failed && line.text.contains("set back"), "{}", line.text);
    let expire = ExpireRequest { cluster: "main".to_owned(), store: "repo1".to_owned(), confirm: String::new() };
    let refused = rig.operator().await.expire(expire).await.unwrap_err();
    assert_eq!(reason(&refused), "STORE_SET_BACK");
    // What is shown, and no other loss, is accepted; then the store is filled.
    let shown = rig.accept("repo1", "").await.unwrap();
    assert!(!shown.applied && rig.is_set_back("repo1"));
    let loss = &shown.clusters[0];
    assert_eq!((loss.seen.get(), loss.found.map(|found| found.get())), (seen, Some(older)));
    assert_eq!(loss.backups.iter().map(|line| (line.backup, line.fate)).collect::<Vec<_>>(), [(backup, Fate::Copied)]);
    assert_eq!(reason(&rig.accept("repo1", "0123").await.unwrap_err()), "PLAN_MOVED");
    let done = rig.accept("repo1", &shown.plan).await.unwrap();
    assert!(done.applied && done.clusters[0].next.map(|next| next.get()) == Some(seen + 1));
    assert!(!rig.is_set_back("repo1"));
    rig.pass().await;
    assert!(rig.newest_in(0).await.backup(&backup).is_some());
    root::verify_history(&*rig.stores[0], &cluster()).await.unwrap();
    assert!(rig.accept("repo1", "").await.unwrap().clusters.is_empty());
    assert!(!rig.problems().await.contains("set back"));
    rig.end().await;
}

#[tokio::test]
async fn a_history_that_is_gone_is_not_begun_anew() {
    let rig = Rig::with_cluster(Ack::All).await;
    let backup = rig.backed_up().await;
    let seen = rig.newest_in(0).await.generation.get();
    let parts: Vec<ObjectKey> =
        rig.objects_in(0).await.into_iter().filter(|key| !key.as_str().contains("/root/")).collect();
    rig.set_back(0, &parts).await;
    rig.pass().await;
    rig.pass().await;
    assert!(rig.is_set_back("repo1") && rig.roots_in(0).await.is_empty());
    assert_eq!(reason(&rig.create("main").await.unwrap_err()), "NOT_CREATED");
    assert!(rig.roots_in(0).await.is_empty());
    let shown = rig.accept("repo1", "").await.unwrap();
    assert_eq!((shown.clusters[0].seen.get(), shown.clusters[0].found), (seen, None));
    rig.accept("repo1", &shown.plan).await.unwrap();
    rig.pass().await;
    let root = rig.newest_in(0).await;
    assert!(root.backup(&backup).is_some() && root.systems.len() == 1);
    assert_eq!(rig.roots_in(0).await[0], seen + 1);
    rig.end().await;
}

#[tokio::test]
async fn without_another_store_backups_are_named_again_by_their_manifests() {
    let rig = Rig::start(memory(&["repo1"]), Ack::All).await;
    rig.create("main").await.unwrap();
    let made = super::backups::make("20261123T034138Z-7f3a9c21");
    for number in [3, 4] {
        rig.push(&wal(&segment(number), "a", super::backups::SEGMENT)).await.unwrap();
    }
    rig.send(&made).await;
    rig.publish(&made.entry).await.unwrap();
    let before = rig.newest_in(0).await;
    for key in rig.objects_in(0).await.iter().filter(|key| key.as_str().contains("/root/")) {
        let _ = rig.stores[0].delete(key).await.unwrap();
    }
    rig.pass().await;
    let request = StartBackupRequest { cluster: "main".to_owned(), ..Default::default() };
    assert_eq!(reason(&rig.operator().await.start_backup(request).await.unwrap_err()), "STORE_SET_BACK");
    let shown = rig.accept("repo1", "").await.unwrap();
    assert_eq!(shown.clusters[0].backups[0].fate, Fate::Named, "{shown:?}");
    rig.accept("repo1", &shown.plan).await.unwrap();
    let root = rig.newest_in(0).await;
    assert_eq!(root.backups, before.backups);
    assert!(root.pins.is_empty() && root.generation > before.generation);
    rig.end().await;
}

#[tokio::test]
async fn what_fails_before_the_root_leaves_the_store_set_back_and_is_accepted_again() {
    let rig = Rig::with_cluster(Ack::All).await;
    let backup = rig.backed_up().await;
    let then = rig.objects_in(0).await;
    rig.lengthen(1).await;
    rig.set_back(0, &then).await;
    let manifest = repository::key::manifest(&cluster(), &backup);
    let _ = rig.stores[0].delete(&manifest).await.unwrap();
    rig.pass().await;
    let (before, shown) = (rig.roots_in(0).await, rig.accept("repo1", "").await.unwrap());
    assert_eq!(shown.clusters[0].backups[0].fate, Fate::Copied, "{shown:?}");
    rig.stores[0].fail_all(Operation::Put, Fault::Refuse);
    let failed = rig.accept("repo1", &shown.plan).await.unwrap();
    assert!(failed.clusters[0].problem.is_some() && failed.clusters[0].next.is_none(), "{failed:?}");
    rig.stores[0].heal();
    rig.lengthen(2).await;
    rig.pass().await;
    assert!(rig.is_set_back("repo1"));
    assert_eq!(rig.roots_in(0).await, before, "the root of before was committed as it is");
    let again = rig.accept("repo1", "").await.unwrap();
    rig.accept("repo1", &again.plan).await.unwrap();
    // It was not named, so it came back from the other store.
    rig.pass().await;
    assert!(!rig.is_set_back("repo1") && rig.newest_in(0).await.backup(&backup).is_some());
    assert_eq!(rig.stores[0].head(&manifest).await.unwrap(), rig.stores[1].head(&manifest).await.unwrap());
    rig.end().await;
}

#[tokio::test]
async fn lost_wal_is_filled_from_another_store_or_asked_for() {
    let rig = Rig::with_cluster(Ack::All).await;
    let knows = Hello { knows_lost_wal: true, ..hello("a") };
    let mut agent = rig.say_hello(knows).await.unwrap();
    for number in 1..=3 {
        rig.push(&wal(&segment(number), "a", "content")).await.unwrap();
    }
    rig.pass().await;
    let key = |number: u32| {
        let object = wal(&segment(number), "a", "content");
        repository::key::wal(&cluster(), SystemIdentifier::new(SYSTEM), &object.header.name, &object.fingerprint)
    };
    let _ = rig.stores[0].delete(&key(1)).await.unwrap();
    rig.pass().await;
    assert_eq!((rig.wal_keys(0).await, rig.missing().await), (rig.wal_keys(1).await, 0));
    for store in &rig.stores {
        let _ = store.delete(&key(3)).await.unwrap();
    }
    rig.pass().await;
    let asked = agent.hear(|message| match message {
        session_response::Message::WalLost(lost) => Some(lost.objects),
        _ => None,
    });
    let object = wal(&segment(3), "a", "content");
    assert_eq!(asked.await, [format!("{}.{}", segment(3), object.fingerprint)]);
    let problem = format!("WAL file {} was archived and is in no store any more", segment(3));
    assert!(rig.problems().await.contains(&problem));
    assert_eq!(rig.coordinator.metrics.wal_lost.get(), 1);
    rig.push(&object).await.unwrap();
    rig.pass().await;
    assert_eq!((rig.wal_keys(0).await.len(), rig.coordinator.metrics.wal_lost.get()), (3, 0));
    drop(agent);
    rig.end().await;
}
