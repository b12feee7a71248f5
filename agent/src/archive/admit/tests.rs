//! What is written down of a segment's changes while it is read, and that it stays on every way.

use std::sync::Arc;

use postgres_format::wal_changes::SegmentChanges;
use repository::store::{Body, ByteRange, ObjectStore, collect};
use repository::wal::{self, VariantCheck, read_changes};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::archive::Pushed;
use crate::testing::{FULL, FakeNode, HISTORY, INCOMPLETE, SWITCH, Scripted, memory, roads, sample};

const PARTIAL: &str = "000000010000000000000019.partial";

fn read_file(node: &FakeNode, name: &str, sink: Sink) -> EncodedWal {
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    let admission = Admission {
        name: name.parse().unwrap(),
        path: node.wal(name),
        facts: node.data.facts().unwrap(),
        cluster: "main".parse().unwrap(),
        node: "db1".parse().unwrap(),
        compression_level: 3,
        sink,
        now: process::clock::now(),
    };
    admit(&admission, &mut encoder, &mut Vec::new()).unwrap().wal
}

/// What a scan of its own says of a sample.
fn scanned(node: &FakeNode, name: &str) -> SegmentChanges {
    let facts = node.data.facts().unwrap();
    let mut scan = ChangeScan::new(Expected {
        name: name.parse().unwrap(),
        size: facts.segment_size,
        system_identifier: facts.system_identifier,
        partial: false,
    });
    scan.push(&sample(name)).unwrap();
    scan.finish().unwrap().1
}

async fn told(store: &dyn ObjectStore, wal: &EncodedWal) -> Option<SegmentChanges> {
    let size = store.head(&wal.key()).await.unwrap().unwrap();
    read_changes(store, &wal.key(), size).await.unwrap()
}

#[tokio::test]
async fn segments_tell_what_they_changed_and_other_files_do_not() {
    let node = FakeNode::standby();
    let store = memory("repo1");
    for name in [FULL, SWITCH, INCOMPLETE] {
        let wal = read_file(&node, name, Sink::Memory);
        wal::put(&*store, &wal, VariantCheck::Skip).await.unwrap();
        let expected = scanned(&node, name);
        assert!(expected.map.block_count() > 0 && expected.doubt.is_none(), "{name}");
        assert_eq!(told(&*store, &wal).await, Some(expected), "{name}");
    }
    for name in [PARTIAL, HISTORY] {
        let wal = read_file(&node, name, Sink::Memory);
        assert_eq!((wal.header.changes, wal.header.changes_doubt), (None, None), "{name}");
    }
}

#[tokio::test]
async fn what_is_told_stays_in_a_file_and_in_the_spool() {
    let node = FakeNode::new();
    let overflow = node.spool.overflow_path();
    let wal = read_file(&node, FULL, Sink::Bounded { memory_bytes: 1000, overflow });
    assert!(matches!(wal.body, Body::File { .. }));
    assert!(node.spool.retain(&wal).is_ok());
    let copy = node.spool.read_retained(&(wal.header.name, wal.fingerprint)).await.unwrap().unwrap();
    for wal in [wal, copy] {
        let store = memory("repo1");
        wal::put(&*store, &wal, VariantCheck::Skip).await.unwrap();
        assert_eq!(told(&*store, &wal).await, Some(scanned(&node, FULL)));
    }
}

#[tokio::test]
async fn what_is_told_arrives_by_both_roads() {
    let (node, stop) = (FakeNode::new(), CancellationToken::new());
    let stored = memory("repo1");
    let scripted = Scripted::new(vec![Arc::clone(&stored)]);
    let (address, _server) = scripted.serve("127.0.0.1:0").await;
    let roads = roads(&node, &address, None, &stop);
    let archive = node.archive(roads.clone(), &stop);
    assert_eq!(archive.push(&node.wal(FULL), std::time::Duration::from_secs(20)).await, Pushed::Durable);
    let wal = read_file(&node, FULL, Sink::Memory);
    let direct = memory("s3");
    roads.put_direct(&direct, &wal).await.unwrap();
    for store in [stored, direct] {
        assert_eq!(told(&*store, &wal).await, Some(scanned(&node, FULL)));
        let object = collect(store.get(&wal.key(), ByteRange::All).await.unwrap(), u64::MAX).await.unwrap();
        assert!(zstd::decode_all(&object[repository::wal::HEADER_BYTES..]).unwrap() == sample(FULL));
    }
}
