//! Letting go: after backups, by confirmation, against locks and silence, and that nothing comes back.

use std::collections::BTreeSet;

use jiff::SignedDuration;
use process::clock;
use proto::operator::{AddHoldRequest, ExpireRequest, HoldForRestoreRequest, ListHoldsRequest, RemoveHoldRequest};
use repository::backup::{self, VerifyDepth};
use repository::name::{BackupId, ClusterName};
use repository::retention::Policy;
use repository::retention::report::Report;
use repository::root::{self, Root};
use repository::stores::faulty::{Fault, Operation};

use super::backups::{Made, SEGMENT, make_at};
use super::*;
use crate::reconcile::plan::Scope;
use crate::retention::{Round, round};

/// Size of segments; the report takes it from them.
const SEGMENT_BYTES: usize = 1 << 20;
/// Segments between the starts of two backups; each needs two of them.
const APART: u64 = 4;

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

fn newest(count: u32) -> Policy {
    Policy { any: Some(count), ..Policy::default() }
}

/// Rules in both stores, or one.
fn rules(rules: &[(&str, Policy)]) -> Policies {
    Policies::for_tests("main", rules)
}

fn both(policy: &Policy) -> Policies {
    rules(&[("repo1", policy.clone()), ("s3", policy.clone())])
}

impl Rig {
    async fn keeping(retention: Policies) -> Self {
        let rig = Self::start_with(memory(&["repo1", "s3"]), Ack::All, Duration::ZERO, retention).await;
        rig.create("main").await.unwrap();
        rig
    }

    /// Another coordinator with an empty catalog and the same rules.
    async fn reborn_keeping(self, retention: Policies) -> Self {
        let stores = self.stores.clone();
        self.end().await;
        Self::start_with(stores, Ack::All, Duration::ZERO, retention).await
    }

    /// Takes the `number`th backup, which refers to packs of older ones, and the WAL up to the next one.
    async fn take(&self, number: u64, older: &[&Made]) -> Made {
        let made = self.begin(number, older).await;
        let published = self.publish(&made.entry).await.unwrap();
        assert!(!published.stores.is_empty());
        made
    }

    async fn begin(&self, number: u64, older: &[&Made]) -> Made {
        let at = clock::now() - SignedDuration::from_hours(24 * (20 - number as i64));
        let id = BackupId::new(at, number as u32).to_string();
        let first = 3 + number * APART;
        let made = make_at(&id, older, (first, SEGMENT_BYTES as u64), at);
        for number in first..first + APART {
            self.push(&whole(number)).await.unwrap();
        }
        self.send(&made).await;
        made
    }

    async fn newest_root(&self, store: usize) -> Root {
        root::newest(&*self.stores[store], &cluster()).await.unwrap().unwrap()
    }

    async fn ids(&self, store: usize) -> BTreeSet<BackupId> {
        self.newest_root(store).await.backups.iter().map(|entry| entry.backup).collect()
    }

    async fn round(&self) -> Round {
        round(&self.coordinator, clock::now(), false).await
    }

    /// The first segments of a store's WAL.
    async fn first_segment(&self, store: usize) -> String {
        let keys = self.wal_keys(store).await;
        keys.first().unwrap().as_str().rsplit('/').next().unwrap()[..24].to_owned()
    }

    /// Every backup of a store is whole there.
    async fn expect_sound(&self, store: usize) {
        for entry in &self.newest_root(store).await.backups {
            let (store, scratch) = (&*self.stores[store], self.directory.path());
            backup::verify(store, &cluster(), entry, VerifyDepth::Content, scratch).await.unwrap();
            let until = Monotonic::now();
            crate::publish::wait_for_wal(store, &cluster(), entry, until).await.unwrap();
        }
    }

    async fn expire(&self, confirm: &str) -> Result<Report, Status> {
        let request = ExpireRequest { cluster: "main".to_owned(), store: String::new(), confirm: confirm.to_owned() };
        let answer = self.operator().await.expire(request).await?.into_inner();
        Ok(serde_json::from_str(&answer.report_json).unwrap())
    }

    /// WAL objects and backups in the catalog.
    async fn counts(&self) -> (u64, u64) {
        let counting =
            self.coordinator.catalog.call(|c| Ok((crate::catalog::wal::count(c)?, crate::catalog::backups::count(c)?)));
        counting.await.unwrap()
    }

    async fn full_pass(&self) {
        crate::reconcile::pass(&self.coordinator, Scope::Everything).await.unwrap();
    }
}

/// A segment of the size that it says.
fn whole(number: u64) -> EncodedWal {
    let mut encoder = WalEncoder::new(1, Sink::Memory).unwrap();
    let content: Vec<u8> = SEGMENT.bytes().cycle().take(SEGMENT_BYTES).collect();
    encoder.push(&content).unwrap();
    let facts = WalFacts {
        cluster: cluster(),
        system_identifier: SystemIdentifier::new(SYSTEM),
        name: segment(number as u32).parse().unwrap(),
        node: "a".parse().unwrap(),
        in_recovery: false,
        complete: true,
        logical_end: None,
        postgres_major: Some(15),
        first_commit_time: None,
        last_commit_time: None,
        written: now(),
    };
    encoder.finish(facts).unwrap()
}

fn id(made: &Made) -> BackupId {
    made.entry.backup
}

#[tokio::test]
async fn what_the_rules_do_not_keep_goes_and_does_not_come_back() {
    // The second store keeps everything.
    let retention = rules(&[("repo1", newest(2))]);
    let rig = Rig::keeping(retention.clone()).await;
    let full = rig.take(1, &[]).await;
    let mut all = vec![rig.take(2, &[&full]).await];
    for number in 3..=5 {
        let next = rig.take(number, &[&full, all.last().unwrap()]).await;
        all.push(next);
    }
    rig.pass().await;
    assert_eq!(rig.round().await, Round::Complete);
    let left = BTreeSet::from([id(&all[2]), id(&all[3])]);
    assert_eq!((rig.ids(0).await, rig.ids(1).await.len()), (left.clone(), 5));
    // The newest ones refer to packs of older ones, which stay.
    rig.expect_sound(0).await;
    let pack = repository::key::pack(&cluster(), &id(&full), 1);
    assert!(rig.stores[0].head(&pack).await.unwrap().is_some());
    assert!(rig.stores[0].head(&repository::key::manifest(&cluster(), &id(&full))).await.unwrap().is_none());
    assert_eq!((rig.first_segment(0).await, rig.first_segment(1).await), (segment(3 + 4 * 4), segment(3 + 4)));
    let (wal, info) = (rig.wal_keys(0).await, rig.info().await);
    assert_eq!(info["clusters"][0]["at_risk"], serde_json::json!([]), "{info}");
    for _ in 0..2 {
        rig.pass().await;
        rig.full_pass().await;
        assert_eq!(rig.round().await, Round::Complete);
    }
    assert_eq!((rig.missing().await, rig.ids(0).await), (0, left));
    assert_eq!(rig.wal_keys(0).await, wal);
    assert_eq!(rig.info().await, info);
    // A catalog made anew knows the same.
    let counted = rig.coordinator.catalog.call(|c| crate::catalog::wal::count(c)).await.unwrap();
    let rig = rig.reborn_keeping(retention).await;
    rig.full_pass().await;
    rig.round().await;
    assert_eq!((rig.missing().await, rig.wal_keys(0).await), (0, wal));
    assert_eq!(rig.info().await, info);
    let recounted = rig.coordinator.catalog.call(|c| crate::catalog::wal::count(c)).await.unwrap();
    assert_eq!(counted, recounted);
    rig.end().await;
}

#[tokio::test]
async fn what_no_store_keeps_is_forgotten() {
    let rig = Rig::keeping(both(&newest(1))).await;
    for number in 1..=4 {
        rig.take(number, &[]).await;
    }
    rig.full_pass().await;
    assert_eq!(rig.counts().await, (16, 4));
    assert_eq!(rig.round().await, Round::Complete);
    assert_eq!(rig.counts().await, (4, 1));
    rig.pass().await;
    assert_eq!((rig.missing().await, rig.wal_keys(0).await.len()), (0, 4));
    // A node that sends one of them again is told that it is there; it goes with the next sweep.
    rig.push(&whole(7)).await.unwrap();
    rig.full_pass().await;
    assert_eq!(rig.missing().await, 0);
    assert_eq!(round(&rig.coordinator, clock::now(), true).await, Round::Complete);
    rig.full_pass().await;
    assert_eq!((rig.wal_keys(0).await.len(), rig.wal_keys(1).await.len()), (4, 4));
    assert_eq!(rig.counts().await, (4, 1));
    rig.end().await;
}

#[tokio::test]
async fn a_store_lets_go_of_nothing_before_it_has_what_the_others_have() {
    let retention = both(&newest(2));
    let rig = Rig::keeping(retention).await;
    for number in 1..=3 {
        rig.take(number, &[]).await;
    }
    rig.stores[0].fail_everything(Fault::Fail);
    let fourth = rig.take(4, &[]).await;
    rig.stores[0].heal();
    rig.coordinator.stores.check().await;
    assert_eq!((rig.ids(0).await.len(), rig.ids(1).await.len()), (3, 4));
    rig.round().await;
    assert_eq!((rig.ids(0).await.len(), rig.ids(1).await.len()), (3, 2));
    let shown = rig.expire("").await.unwrap();
    let frozen = shown.stores[0].plan.as_ref().unwrap().frozen.clone().unwrap();
    assert_eq!(frozen, format!("store s3 has backup {}, which must be copied here first", id(&fourth)));
    rig.full_pass().await;
    assert_eq!(rig.round().await, Round::Complete);
    assert_eq!((rig.ids(0).await, rig.missing().await), (rig.ids(1).await, 0));
    // What is away counts with what it had; nobody waits for it, and it waits for nobody.
    rig.stores[1].fail_everything(Fault::Fail);
    rig.coordinator.stores.check().await;
    rig.take(5, &[]).await;
    assert_eq!(rig.round().await, Round::Again);
    assert_eq!((rig.ids(0).await.len(), rig.ids(0).await.contains(&id(&fourth))), (2, true));
    rig.end().await;
}

#[tokio::test]
async fn an_increment_is_copied_although_older_packs_are_of_backups_long_gone() {
    let rig = Rig::keeping(both(&newest(1))).await;
    let full = rig.take(1, &[]).await;
    let second = rig.take(2, &[&full]).await;
    rig.full_pass().await;
    rig.round().await;
    assert_eq!(rig.ids(0).await, BTreeSet::from([id(&second)]));
    rig.stores[0].fail_everything(Fault::Fail);
    let third = rig.take(3, &[&full, &second]).await;
    rig.stores[0].heal();
    rig.coordinator.stores.check().await;
    rig.full_pass().await;
    assert_eq!(rig.ids(0).await, BTreeSet::from([id(&second), id(&third)]));
    rig.expect_sound(0).await;
    assert_eq!(rig.round().await, Round::Complete);
    assert_eq!((rig.ids(0).await, rig.ids(1).await), (BTreeSet::from([id(&third)]), BTreeSet::from([id(&third)])));
    rig.expect_sound(0).await;
    rig.expect_sound(1).await;
    rig.end().await;
}

#[tokio::test]
async fn only_the_plan_that_was_shown_is_carried_out() {
    let rig = Rig::keeping(both(&newest(1))).await;
    for number in 1..=3 {
        rig.take(number, &[]).await;
    }
    rig.full_pass().await;
    let shown = rig.expire("").await.unwrap();
    assert!(shown.removes_anything() && !shown.applied && shown.is_complete());
    assert_eq!((rig.ids(0).await.len(), shown.stores[0].frees.unwrap().objects > 4), (3, true));
    // A backup begins: its pin moves the root.
    let pin = root::Pin::new(BackupId::new(clock::now(), 99), None, "a".parse().unwrap(), clock::now());
    let edit = |root: &Root| root.with_pin(pin.clone());
    root::commit(&*rig.stores[0], &cluster(), &"a".parse().unwrap(), clock::now(), edit).await.unwrap();
    let refused = rig.expire(&shown.plan).await.unwrap_err();
    assert_eq!((reason(&refused), rig.ids(0).await.len()), ("PLAN_MOVED".to_owned(), 3));
    let again = rig.expire("").await.unwrap();
    assert_ne!(again.plan, shown.plan);
    let done = rig.expire(&again.plan).await.unwrap();
    assert!(done.applied && done.is_complete(), "{done:?}");
    assert_eq!(done.stores[1].frees, again.stores[1].frees);
    assert_eq!((rig.ids(0).await.len(), rig.ids(1).await.len()), (1, 1));
    rig.expect_sound(0).await;
    assert!(!rig.expire("").await.unwrap().removes_anything());
    rig.end().await;
}

#[tokio::test]
async fn what_is_held_stays_with_its_wal_and_in_copies() {
    // With a window older backups keep no more WAL than they need themselves.
    let window = Some(Duration::from_secs(1));
    let rig = Rig::keeping(both(&Policy { window, ..newest(1) })).await;
    let first = rig.take(1, &[]).await;
    rig.stores[1].fail_everything(Fault::Fail);
    let second = rig.take(2, &[]).await;
    let mut operator = rig.operator().await;
    let hold = |made: &Made, reason: &str| AddHoldRequest {
        cluster: "main".to_owned(),
        backup: id(made).to_string(),
        reason: reason.to_owned(),
        by: "ann".to_owned(),
        until: String::new(),
    };
    assert_eq!(reason(&operator.add_hold(hold(&first, " ")).await.unwrap_err()), "PRECONDITION");
    let held = operator.add_hold(hold(&second, "before the upgrade")).await.unwrap().into_inner();
    assert_eq!((held.stores, held.others.len()), (vec!["repo1".to_owned()], 1));
    rig.stores[1].heal();
    rig.coordinator.stores.check().await;
    rig.full_pass().await;
    for number in 3..=5 {
        rig.take(number, &[]).await;
    }
    rig.full_pass().await;
    assert_eq!(rig.round().await, Round::Complete);
    // The copy is held as its origin.
    for store in [0, 1] {
        // The window begins with the last one but one.
        assert_eq!(rig.ids(store).await.len(), 3);
        assert!(rig.ids(store).await.contains(&id(&second)));
        rig.expect_sound(store).await;
    }
    let info = rig.info().await;
    assert_eq!(info["clusters"][0]["stores"][1]["holds"][0]["reason"], "before the upgrade");
    let timeline = &info["clusters"][0]["timelines"][0];
    assert_eq!((timeline["gaps"].as_array().unwrap().len(), &timeline["gaps"][0]["expired"]), (1, &true.into()));
    let newest = &info["clusters"][0]["backups"][1]["stop_time"];
    assert_eq!(&info["clusters"][0]["recovery"]["earliest_time"], newest, "{info}");
    let list = ListHoldsRequest { cluster: "main".to_owned() };
    let holds = operator.list_holds(list).await.unwrap().into_inner().holds;
    assert_eq!((holds.len(), holds[0].by.as_str(), holds[0].stores.len()), (1, "ann", 2));
    let release = RemoveHoldRequest { cluster: "main".to_owned(), backup: id(&second).to_string() };
    let released = operator.remove_hold(release.clone()).await.unwrap().into_inner();
    assert_eq!(released.stores.len(), 2);
    assert_eq!(reason(&operator.remove_hold(release).await.unwrap_err()), "PRECONDITION");
    rig.round().await;
    assert_eq!((rig.ids(0).await.len(), rig.ids(1).await.len()), (2, 2));
    drop(operator);
    rig.end().await;
}

#[tokio::test]
async fn what_a_restore_reads_stays_until_it_is_let_go() {
    let rig = Rig::keeping(both(&newest(1))).await;
    let first = rig.take(1, &[]).await;
    let mut operator = rig.operator().await;
    let hold = |backup: &str| HoldForRestoreRequest {
        cluster: "main".to_owned(),
        backup: backup.to_owned(),
        place: "db9:/data".to_owned(),
    };
    assert_eq!(
        reason(&operator.hold_for_restore(hold("20200101T000000Z-7f3a9c21")).await.unwrap_err()),
        "PRECONDITION"
    );
    let held = operator.hold_for_restore(hold(&id(&first).to_string())).await.unwrap().into_inner();
    assert_eq!((held.stores.len(), held.others.len()), (2, 0));
    for number in 2..=3 {
        rig.take(number, &[]).await;
    }
    assert_eq!(rig.round().await, Round::Complete);
    for store in [0, 1] {
        assert_eq!(rig.ids(store).await.len(), 2);
        assert!(rig.ids(store).await.contains(&id(&first)));
        rig.expect_sound(store).await;
    }
    let info = rig.info().await;
    assert_eq!(info["clusters"][0]["timelines"][0]["gaps"].as_array().map(Vec::len), Some(0), "{info}");
    let list = ListHoldsRequest { cluster: "main".to_owned() };
    let holds = operator.list_holds(list).await.unwrap().into_inner().holds;
    assert_eq!((holds.len(), holds[0].by.as_str(), holds[0].reason.as_str()), (1, "db9:/data", "restore"));
    let release = RemoveHoldRequest { cluster: "main".to_owned(), backup: id(&first).to_string() };
    operator.remove_hold(release).await.unwrap();
    rig.round().await;
    assert_eq!((rig.ids(0).await.len(), rig.ids(1).await.len()), (1, 1));
    drop(operator);
    rig.end().await;
}

#[tokio::test]
async fn a_clock_that_is_a_day_off_expires_nothing_early() {
    let age = Policy { age: Some(Duration::from_secs(36 * 3600)), ..Policy::default() };
    let rig = Rig::keeping(both(&age)).await;
    for number in 17..=19 {
        rig.take(number, &[]).await;
    }
    rig.full_pass().await;
    let day = SignedDuration::from_hours(24);
    // Ages count from the newest that a server was heard of: the third is of a day before now, and so old is the second.
    round(&rig.coordinator, clock::now() + day, false).await;
    assert_eq!(rig.ids(0).await.len(), 2);
    round(&rig.coordinator, clock::now() + day + day, false).await;
    assert_eq!(rig.ids(0).await.len(), 2);
    round(&rig.coordinator, clock::now() - day, false).await;
    let info = rig.coordinator.retention.info(&cluster(), &"repo1".parse().unwrap());
    assert!(info.frozen.unwrap().contains("a clock is wrong"));
    assert_eq!(rig.ids(0).await.len(), 2);
    rig.end().await;
}

#[tokio::test]
async fn a_store_that_locks_objects_is_told_of_and_stays_in_use() {
    let rig = Rig::keeping(both(&newest(1))).await;
    for number in 1..=3 {
        rig.take(number, &[]).await;
    }
    rig.full_pass().await;
    rig.stores[1].fail_all(Operation::Delete, Fault::Retain);
    assert_eq!(rig.round().await, Round::Complete);
    assert_eq!((rig.ids(1).await.len(), rig.wal_keys(1).await.len(), rig.wal_keys(0).await.len()), (1, 12, 4));
    let info = rig.coordinator.retention.info(&cluster(), &"s3".parse().unwrap());
    assert!(info.locked_objects > 8 && info.problem.is_none(), "{info:?}");
    // What is locked counts as gone: nothing is copied, nothing is missing.
    rig.full_pass().await;
    assert_eq!((rig.missing().await, rig.wal_keys(0).await.len(), rig.health(1)), (0, 4, Health::Healthy));
    rig.take(4, &[]).await;
    rig.stores[1].heal();
    assert_eq!(rig.round().await, Round::Complete);
    assert_eq!((rig.wal_keys(1).await.len(), rig.ids(1).await.len()), (4, 1));
    // Nor does one that refuses to remove anything fall out of use.
    rig.take(5, &[]).await;
    rig.stores[1].fail_all(Operation::Delete, Fault::Refuse);
    assert_eq!(rig.round().await, Round::Again);
    assert_eq!((rig.health(1), rig.ids(1).await.len()), (Health::Healthy, 1));
    rig.push(&whole(100)).await.unwrap();
    rig.stores[1].heal();
    assert_eq!(rig.round().await, Round::Complete);
    rig.expect_sound(1).await;
    rig.end().await;
}

#[tokio::test]
async fn a_backup_under_way_keeps_what_it_may_build_on_and_a_late_one_is_refused() {
    let rig = Rig::keeping(both(&newest(1))).await;
    let full = rig.take(1, &[]).await;
    rig.take(2, &[&full]).await;
    let third = rig.take(3, &[]).await;
    let next = BackupId::new(clock::now(), 4);
    let pin = root::Pin::new(next, None, "a".parse().unwrap(), clock::now());
    for store in &rig.stores {
        let edit = |root: &Root| root.with_pin(pin.clone());
        root::commit(&**store, &cluster(), &"a".parse().unwrap(), clock::now(), edit).await.unwrap();
    }
    rig.full_pass().await;
    rig.round().await;
    assert_eq!(rig.ids(0).await, BTreeSet::from([id(&third)]));
    // Its node counts as dead, wrongly; it had sent everything.
    let late = rig.begin(4, &[]).await;
    for store in &rig.stores {
        let pin = root::Pin::new(id(&late), None, "a".parse().unwrap(), clock::now());
        let edit = |root: &Root| Ok(root.with_pin(pin.clone())?.without_pin(&id(&late)));
        root::commit(&**store, &cluster(), &"a".parse().unwrap(), clock::now(), edit).await.unwrap();
    }
    let refused = rig.publish(&late.entry).await.unwrap_err();
    assert!(refused.message().contains("was given up meanwhile"), "{refused}");
    assert_eq!(rig.ids(0).await, BTreeSet::from([id(&third)]));
    rig.end().await;
}
