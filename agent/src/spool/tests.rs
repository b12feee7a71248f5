//! What a spool keeps, what it lets go, and what a crash in between leaves.

use jiff::Timestamp;
use repository::wal::{Sink, WalEncoder, WalFacts};

use super::*;

fn wal(name: &str, content: &[u8]) -> EncodedWal {
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    encoder.push(content).unwrap();
    encoder
        .finish(WalFacts {
            cluster: "main".parse().unwrap(),
            system_identifier: SystemIdentifier::new(7),
            name: name.parse().unwrap(),
            node: "db1".parse().unwrap(),
            in_recovery: false,
            complete: true,
            logical_end: None,
            postgres_major: Some(15),
            first_commit_time: None,
            last_commit_time: None,
            written: Timestamp::UNIX_EPOCH,
        })
        .unwrap()
}

const FIRST: &str = "000000010000000000000001";
const SECOND: &str = "000000010000000000000002";

fn key(wal: &EncodedWal) -> RetainedKey {
    (wal.header.name, wal.fingerprint)
}

#[tokio::test]
async fn copies_survive_a_restart_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (first, history) = (wal(FIRST, b"one"), wal("00000002.history", b"1\t0/1000000\tno reason\n"));
    let spool = Spool::open(folder.path(), 1 << 20).unwrap();
    let instance = spool.instance().to_owned();
    assert_eq!(spool.retain(&first).unwrap(), Retention::Kept);
    assert_eq!(spool.retain(&history).unwrap(), Retention::Kept);
    drop(spool);
    let spool = Spool::open(folder.path(), 1 << 20).unwrap();
    assert_eq!(spool.instance(), instance);
    assert_eq!(spool.retained_keys(), [key(&history), key(&first)]);
    let again = spool.read_retained(&key(&first)).await.unwrap().unwrap();
    assert_eq!((again.header, again.header_sha256), (first.header.clone(), first.header_sha256));
    spool.release(&key(&first)).unwrap();
    spool.release(&key(&first)).unwrap();
    assert!(spool.read_retained(&key(&first)).await.unwrap().is_none());
    spool.release_spread(&["00000002.history".to_owned(), format!("{SECOND}.x")]).unwrap();
    assert_eq!(spool.retained_bytes(), 0);
    assert_eq!(fs::read_dir(folder.path().join("retained")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_a_crash_left_is_cleaned_and_damage_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let first = wal(FIRST, b"one");
    {
        let spool = Spool::open(folder.path(), 1 << 20).unwrap();
        spool.retain(&first).unwrap();
    }
    let half = folder.path().join("retained").join(format!("{SECOND}.{}.pgconvoy.tmp", first.fingerprint));
    fs::write(&half, b"half").unwrap();
    fs::write(folder.path().join("overflow/0000000000000001"), b"x").unwrap();
    fs::write(folder.path().join("prefetch/x"), b"x").unwrap();
    let copy = folder.path().join("retained").join(format!("{FIRST}.{}", first.fingerprint));
    fs::write(&copy, b"damaged").unwrap();
    let spool = Spool::open(folder.path(), 1 << 20).unwrap();
    assert!(!half.exists());
    assert_eq!(fs::read_dir(folder.path().join("overflow")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(folder.path().join("prefetch")).unwrap().count(), 0);
    assert!(matches!(spool.read_retained(&key(&first)).await, Err(SpoolError::Damaged { .. })));
}

#[test]
fn the_bound_refuses_copies_and_counts_them() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (wal(FIRST, b"one"), wal(SECOND, b"two"));
    let spool = Spool::open(folder.path(), first.body.len() + 10).unwrap();
    assert_eq!(spool.retain(&first).unwrap(), Retention::Kept);
    assert_eq!(spool.retain(&first).unwrap(), Retention::Kept);
    assert_eq!(spool.retain(&second).unwrap(), Retention::NoRoom);
    assert_eq!(spool.refused_count(), 1);
    spool.release(&key(&first)).unwrap();
    assert_eq!(spool.retain(&second).unwrap(), Retention::Kept);
}

#[test]
fn two_agents_never_share_a_spool() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), 1).unwrap();
    assert!(matches!(Spool::open(folder.path(), 1), Err(SpoolError::Taken { .. })));
    drop(spool);
    Spool::open(folder.path(), 1).unwrap();
}

#[test]
fn another_cluster_starts_over_but_keeps_copies() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), 1 << 20).unwrap();
    let (old, new) = (SystemIdentifier::new(7), SystemIdentifier::new(8));
    let timeline = Timeline::FIRST;
    assert!(!spool.belong_to(old, Path::new("/data")).unwrap());
    spool.keep_history(timeline, b"text").unwrap();
    spool.retain(&wal(FIRST, b"one")).unwrap();
    fs::write(spool.ledger_path(), b"x").unwrap();
    assert!(!spool.belong_to(old, Path::new("/data")).unwrap());
    assert_eq!(spool.history(timeline).unwrap(), b"text");
    assert!(spool.belong_to(new, Path::new("/data")).unwrap());
    assert_eq!(spool.history(timeline), None);
    assert!(!spool.ledger_path().exists());
    assert_eq!(spool.retained_keys().len(), 1);
    assert!(spool.belong_to(new, Path::new("/other")).unwrap());
}
