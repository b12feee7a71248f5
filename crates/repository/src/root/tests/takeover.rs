//! Tests of one backup taking over what unfinished ones left.

use super::edits::{empty, pin, refused, retired, with};
use super::*;

fn id(random: u32) -> BackupId {
    backup(random).backup
}

fn from(random: u32, attempts: &[u32]) -> RootBackup {
    RootBackup { attempts: attempts.iter().map(|attempt| id(*attempt)).collect(), ..backup(random) }
}

fn gone(result: Result<Root, RootError>, expected: u32) {
    assert!(matches!(result, Err(RootError::PinGone { backup }) if backup == id(expected)), "{result:?}");
}

#[test]
fn a_pin_is_handed_on_in_one_commit() {
    let root = with(&[1]).with_pin(pin(2, None)).unwrap().with_pin(pin(3, None)).unwrap();
    let taken = root.with_taken_over(&id(3), &[id(2)]).unwrap();
    assert_eq!((taken.pins.len(), taken.pins[0].protects.as_slice()), (1, &[id(2)][..]));
    assert_eq!(taken.with_taken_over(&id(3), &[id(2)]).unwrap(), taken, "again");
    assert!(taken.is_covered(&id(2)) && !taken.is_gone(&id(2)));
    // The attempt can never be a backup, and nothing of it is condemned while the other one is under way.
    gone(taken.with_published(backup(2)), 2);
    gone(taken.with_backup(backup(2)), 2);
    refused(taken.with_retired(&retired(&taken, &[2])), "under way");
    let published = taken.with_published(from(3, &[2])).unwrap();
    assert!(published.pins.is_empty() && published.is_gone(&id(2)));
    assert!(published.with_retired(&retired(&published, &[2])).is_ok());
}

#[test]
fn what_was_taken_over_is_handed_on_again() {
    let root = empty().with_pin(pin(1, None)).unwrap().with_pin(pin(2, None)).unwrap();
    let root = root.with_taken_over(&id(2), &[id(1)]).unwrap().with_pin(pin(3, None)).unwrap();
    let root = root.with_taken_over(&id(3), &[id(2)]).unwrap();
    assert_eq!(root.pins[0].protects, [id(1), id(2)]);
    assert!(root.with_published(from(3, &[1, 2])).is_ok());
    let given_up = root.without_pin(&id(3));
    assert!([1, 2, 3].iter().all(|attempt| given_up.is_gone(&id(*attempt))));
}

#[test]
fn a_pin_that_does_not_stand_hands_nothing_on() {
    let root = empty().with_pin(pin(2, None)).unwrap().with_pin(pin(3, None)).unwrap();
    let revoked = root.without_pin(&id(2));
    gone(revoked.with_taken_over(&id(3), &[id(2)]), 2);
    gone(root.without_pin(&id(3)).with_taken_over(&id(3), &[id(2)]), 3);
    // Whoever publishes all the same is refused where it is not covered.
    refused(revoked.with_published(from(3, &[2])), "may have been condemned here");
    refused(empty().with_backup(from(3, &[2])), "may have been condemned here");
    let wal = PinnedWal {
        system_identifier: backup(1).system_identifier,
        timeline: backup(1).start_timeline,
        start_lsn: backup(1).start_lsn,
    };
    let copy = Pin { wal: Some(wal), protects: vec![id(2)], ..pin(4, None) };
    let copied = empty().with_pin(copy).unwrap();
    assert!(copied.with_published(from(4, &[2])).is_ok(), "a copy brings what it refers to");
    refused(copied.with_pin(pin(5, None)).unwrap().with_taken_over(&id(5), &[id(4)]), "being copied");
}
