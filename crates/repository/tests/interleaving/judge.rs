//! Says of a store whether everything that its newest root names is there, by reading nothing but the store.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use postgres_format::{Lsn, SegmentNumber, SegmentSize, WalFileName};
use repository::backup::fetch_manifest;
use repository::backup::manifest::Line;
use repository::key::{self, ParsedKey};
use repository::root::{self, RootBackup};
use repository::store::{ObjectStore, list_all};

use crate::world::cluster;

/// Most objects of a store in these tests.
const OBJECTS: usize = 100_000;

/// Every key of a store but its roots', of which each commit adds one.
pub(crate) async fn keys(store: &dyn ObjectStore) -> BTreeSet<String> {
    let all = list_all(store, "", OBJECTS).await.unwrap().into_iter();
    all.filter(|entry| !matches!(entry.key.parsed(), Ok(ParsedKey::Root { .. })))
        .map(|entry| entry.key.to_string())
        .collect()
}

/// Fails unless every backup of the newest root has its manifest with the digest of its entry, every pack that this names,
/// and its WAL from start to stop; and unless no root is missing. Gives how many backups there are.
pub(crate) async fn expect_sound(store: &dyn ObjectStore) -> usize {
    root::verify_history(store, &cluster()).await.unwrap();
    let root = root::newest(store, &cluster()).await.unwrap().unwrap();
    let keys = keys(store).await;
    for entry in &root.backups {
        for line in fetch_manifest(store, &cluster(), entry, &std::env::temp_dir()).await.unwrap() {
            if let Line::Pack(pack) = line.unwrap() {
                let owner = pack.backup.unwrap_or(entry.backup);
                let pack = key::pack(&cluster(), &owner, pack.number);
                assert!(keys.contains(pack.as_str()), "{} needs {pack}", entry.backup);
            }
        }
        let there: BTreeSet<u64> = keys.iter().filter_map(|key| segment_of(key, entry)).collect();
        for number in needed(entry) {
            assert!(there.contains(&number), "{} needs segment {number}", entry.backup);
        }
    }
    root.backups.len()
}

fn size(entry: &RootBackup) -> SegmentSize {
    SegmentSize::from_bytes(entry.segment_size_bytes).unwrap()
}

fn needed(entry: &RootBackup) -> RangeInclusive<u64> {
    let (first, last): (Lsn, Lsn) = (entry.start_lsn, entry.consistent_lsn());
    let first = SegmentNumber::containing(first, size(entry));
    first.as_u64()..=SegmentNumber::last_before(last, size(entry)).as_u64()
}

fn segment_of(key: &str, entry: &RootBackup) -> Option<u64> {
    match key::ObjectKey::parse(key).ok()?.parsed().ok()? {
        ParsedKey::Wal { name: WalFileName::Segment(name), .. } if name.timeline() == entry.start_timeline => {
            Some(name.number(size(entry)).ok()?.as_u64())
        }
        _ => None,
    }
}
