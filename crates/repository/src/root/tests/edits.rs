//! Tests of what may become of a root: pins, publications, holds, and what retention takes away.

use uuid::Uuid;

use super::*;

pub(super) fn pin(random: u32, parent: Option<u32>) -> Pin {
    Pin::new(backup(random).backup, parent.map(|parent| backup(parent).backup), writer(), now())
}

fn child(random: u32, parent: u32) -> RootBackup {
    RootBackup { parent: Some(backup(parent).backup), ..backup(random) }
}

pub(super) fn empty() -> Root {
    let root = Root::empty(cluster(), writer(), now());
    root.with_system(System::new(backup(1).system_identifier, Some(15), Some(1 << 24), now())).unwrap()
}

pub(super) fn with(backups: &[u32]) -> Root {
    backups.iter().fold(empty(), |root, random| root.with_backup(backup(*random)).unwrap())
}

pub(super) fn retired(root: &Root, backups: &[u32]) -> Retired {
    let backups: Vec<BackupId> = backups.iter().map(|random| backup(*random).backup).collect();
    let condemned = backups.iter().map(|id| CondemnedBackup { backup: *id, packs: None }).collect();
    Retired { generation: root.generation, nonce: root.nonce, backups, condemned, wal_kept: Vec::new() }
}

pub(super) fn refused(result: Result<Root, RootError>, part: &str) {
    match result {
        Err(RootError::Refused { reason }) => assert!(reason.contains(part), "{part} in {reason}"),
        other => panic!("{part}: {other:?}"),
    }
}

#[test]
fn a_pin_becomes_a_backup_once() {
    let root = with(&[1]);
    let pinned = root.with_pin(pin(2, Some(1))).unwrap();
    assert_eq!((pinned.backups.len(), pinned.pins.len()), (1, 1));
    let again = pinned.with_pin(pinned.pins[0].clone()).unwrap();
    assert_eq!(again, pinned);
    refused(pinned.with_pin(pin(2, Some(1))), "used before");
    let published = pinned.with_published(child(2, 1)).unwrap();
    assert_eq!((published.backups.len(), published.pins.len()), (2, 0));
    assert_eq!(published.with_published(child(2, 1)).unwrap(), published);
    refused(published.with_pin(pin(2, None)), "used before");
    // A late revocation finds nothing to revoke.
    assert_eq!(published.without_pin(&child(2, 1).backup), published);
}

#[test]
fn a_zombie_cannot_publish() {
    let root = with(&[1]).with_pin(pin(2, Some(1))).unwrap();
    let revoked = root.without_pin(&backup(2).backup);
    assert!(revoked.is_gone(&backup(2).backup) && !revoked.is_gone(&backup(1).backup));
    for result in [revoked.with_published(child(2, 1)), revoked.with_backup(child(2, 1))] {
        assert!(matches!(result, Err(RootError::PinGone { .. })), "{result:?}");
    }
    refused(revoked.with_pin(pin(2, Some(1))), "used before");
    assert!(matches!(with(&[1]).with_published(backup(2)), Err(RootError::PinGone { .. })), "was never pinned");
}

#[test]
fn a_pin_builds_on_what_exists() {
    refused(with(&[1]).with_pin(pin(3, Some(2))), "does not exist");
    let root = with(&[1, 2]).with_pin(pin(3, Some(1))).unwrap();
    // Another parent than the pin's is as good while it exists.
    assert!(root.with_published(child(3, 2)).is_ok());
    let without = root.with_retired(&retired(&root, &[2])).unwrap();
    refused(without.with_published(child(3, 2)), "does not exist here any more");
    refused(without.with_backup(child(4, 2)), "does not exist here any more");
    assert!(without.with_backup(child(4, 1)).is_ok());
    // What fell back to a full copy has no parent any more.
    assert!(root.with_published(backup(3)).is_ok());
    let full = (10..10 + PIN_LIMIT as u32).try_fold(with(&[1]), |root, random| root.with_pin(pin(random, None)));
    refused(full.unwrap().with_pin(pin(3, Some(1))), "wait for one");
}

#[test]
fn a_pin_is_widened_by_what_was_not_condemned() {
    let root = with(&[1, 2]).with_pin(pin(3, None)).unwrap();
    let wal = PinnedWal {
        system_identifier: backup(1).system_identifier,
        timeline: backup(1).start_timeline,
        start_lsn: backup(1).start_lsn,
    };
    let (id, other) = (backup(3).backup, backup(1).backup);
    let widened = root.with_pin_widened(&id, None, &[other], wal).unwrap();
    assert_eq!((widened.pins[0].protects.as_slice(), widened.pins[0].wal), (&[other][..], Some(wal)));
    assert_eq!(widened.with_pin_widened(&id, None, &[other], wal).unwrap(), widened);
    refused(widened.with_retired(&retired(&widened, &[1])), "under way");
    let without = root.with_retired(&retired(&root, &[1])).unwrap();
    refused(without.with_pin_widened(&id, None, &[other], wal), "condemned here");
    let gone = with(&[1]).with_pin_widened(&id, None, &[other], wal);
    assert!(matches!(gone, Err(RootError::PinGone { .. })));
}

#[test]
fn retention_takes_away_what_nobody_needs() {
    let root = with(&[1, 2, 3]);
    let after = root.with_retired(&retired(&root, &[1])).unwrap();
    assert_eq!(after.backups.len(), 2);
    assert_eq!(after.condemned.as_ref().unwrap().generation, root.generation.next().unwrap());
    assert!(after.is_gone(&backup(1).backup));
    assert!(matches!(after.with_backup(backup(1)), Err(RootError::PinGone { .. })), "what was removed comes back");
    let copy = Pin { protects: vec![backup(1).backup], ..pin(4, None) };
    refused(after.with_pin(copy), "condemned here");
    // The next one condemns what it finds; nothing is carried over.
    let retired = Retired { condemned: Vec::new(), ..retired(&after, &[]) };
    assert_eq!(after.with_retired(&retired).unwrap().condemned, None);
}

#[test]
fn retention_is_bound_to_the_root_it_looked_at() {
    let root = with(&[1, 2]);
    let planned = retired(&root, &[1]);
    let next = Root { generation: root.generation.next().unwrap(), ..root.clone() };
    let other = Root { nonce: Uuid::now_v7(), ..root.clone() };
    for moved in [next, other] {
        assert!(matches!(moved.with_retired(&planned), Err(RootError::Moved { .. })));
    }
    let pinned = root.with_pin(pin(3, Some(1))).unwrap();
    refused(pinned.with_retired(&planned), "under way");
    let orphans = Retired { backups: Vec::new(), ..retired(&pinned, &[3]) };
    refused(pinned.with_retired(&orphans), "under way");
    let live = Retired { backups: Vec::new(), ..retired(&root, &[2]) };
    refused(root.with_retired(&live), "it exists");
}

#[test]
fn kept_wal_never_goes_back_and_backups_need_what_is_kept() {
    let root = with(&[1]);
    let system = backup(1).system_identifier;
    let kept = |from: &str| WalKept { from: from.parse().unwrap(), also: Vec::new() };
    let keep = |root: &Root, from: &str| {
        let wal_kept = vec![(system, kept(from))];
        root.with_retired(&Retired { wal_kept, ..retired(root, &[]) })
    };
    let root = keep(&root, "000000010000000000000002").unwrap();
    refused(keep(&root, "000000010000000000000001"), "already");
    assert!(root.with_backup(backup(2)).is_ok(), "it starts in the first segment that is kept");
    let root = keep(&root, "000000010000000000000003").unwrap();
    refused(root.with_backup(backup(2)), "needs WAL");
    let lsn = backup(2).start_lsn;
    let wal = Some(PinnedWal { system_identifier: system, timeline: backup(2).start_timeline, start_lsn: lsn });
    refused(root.with_pin(Pin { wal, ..pin(2, None) }), "needs WAL");
    assert!(root.with_backup(backup(1)).is_ok(), "what exists is not asked again");
    let other =
        RootBackup { start_timeline: Timeline::new(2).unwrap(), stop_timeline: Timeline::new(2).unwrap(), ..backup(2) };
    assert!(root.with_backup(other).is_ok(), "another timeline is kept whole");
}

#[test]
fn holds_are_on_what_exists() {
    let hold = |random: u32| Hold::new(backup(random).backup, "audit".to_owned(), "ann".to_owned(), now());
    refused(with(&[1]).with_hold(hold(2)), "no backup");
    refused(with(&[1]).with_hold(Hold { reason: "x".repeat(1001), ..hold(1) }), "1000 bytes");
    let root = with(&[1, 2]).with_hold(hold(2)).unwrap().with_hold(hold(1)).unwrap();
    let again = root.with_hold(Hold { by: "bob".to_owned(), ..hold(2) }).unwrap();
    assert_eq!((again.holds.len(), again.holds[1].by.as_str()), (2, "bob"));
    let after = root.with_retired(&retired(&root, &[1])).unwrap();
    assert_eq!(after.holds.len(), 1, "a hold goes with its backup");
    assert_eq!(after.without_hold(&backup(2).backup).holds, []);
}

#[test]
fn a_restore_holds_beside_an_operator_for_a_day_after_its_last_word() {
    let hours = |hours: i64| now() + jiff::SignedDuration::from_hours(hours);
    let audit = Hold::new(backup(1).backup, "audit".to_owned(), "ann".to_owned(), now());
    let root = with(&[1, 2]).with_hold(audit).unwrap();
    refused(root.with_restore(backup(3).backup, "db9", now()), "no backup");
    let held = root.with_restore(backup(1).backup, "db9", hours(1)).unwrap();
    assert_eq!((held.holds.len(), held.holds[0].reason.as_str(), held.holds[1].restore), (2, "audit", true));
    let of = |root: &Root| root.restore_of(&backup(1).backup).map(|hold| (hold.since, hold.until.unwrap()));
    assert_eq!(of(&held), Some((hours(1), hours(25))));
    let longer = held.with_restore(backup(1).backup, "db9", hours(5)).unwrap();
    assert_eq!((longer.holds.len(), of(&longer)), (2, Some((hours(1), hours(29)))));
    // A clock that is behind counts from what the store shows, and one that shows nonsense makes nothing stay for ever.
    assert_eq!(of(&root.with_restore(backup(1).backup, "db9", hours(-20)).unwrap()), Some((hours(-20), hours(24))));
    assert_eq!(of(&root.with_restore(backup(1).backup, "db9", hours(-90)).unwrap()), Some((hours(-90), hours(-42))));
    // What ran out a day ago goes with the next one's word.
    let other = longer.with_restore(backup(2).backup, "db8", hours(54)).unwrap();
    assert_eq!((of(&other), other.holds.len()), (None, 2));
    assert_eq!(longer.with_restore(backup(2).backup, "db8", hours(53)).unwrap().holds.len(), 3);
    assert_eq!(longer.without_hold(&backup(1).backup).holds, []);
}

#[tokio::test]
async fn names_are_critical_while_their_fields_are_used() {
    let store = store();
    let step = async |edit: &dyn Fn(&Root) -> Result<Root, RootError>| {
        commit(&store, &cluster(), &writer(), now(), edit).await.unwrap().critical
    };
    let none = [""; 0];
    assert_eq!(step(&|_| Ok(with(&[1, 2]))).await, none);
    let pin = pin(3, Some(1));
    assert_eq!(step(&|root| root.with_pin(pin.clone())).await, ["pins"]);
    assert_eq!(step(&|root| root.with_published(child(3, 1))).await, none);
    assert_eq!(step(&|root| root.with_retired(&retired(root, &[1]))).await, ["condemned", "gone"]);
    let root = newest(&store, &cluster()).await.unwrap().unwrap();
    assert_eq!(Root::from_bytes(&root.to_bytes().0).unwrap().0, root, "and read back");
    let nothing = |root: &Root| root.with_retired(&Retired { condemned: Vec::new(), ..retired(root, &[]) });
    assert_eq!(step(&nothing).await, ["gone"]);
}
