//! A small sound repository in two stores, built in code: a full backup, an increment on it, WAL of two timelines.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use postgres_format::page;
use postgres_format::relation::{Fork, RelationFork};
use postgres_format::wal_changes::{ChangeMap, Lead, SegmentChanges, Tail};
use postgres_format::wal_segment::SegmentEnd;
use postgres_format::{PgTimestamp, SegmentNumber, SegmentSize, SystemIdentifier};
use repository::backup;
use repository::backup::manifest::{File, FileKind, Head, LAYERS, Layer, Line, ManifestWriter, Pack as PackLine};
use repository::backup::origin::BackupType;
use repository::backup::pack::{FRAME_LIMIT_BYTES, FileNumber, FinishedPack, PackBuilder};
use repository::byte_text::RelativePath;
use repository::key::{self, ObjectKey};
use repository::name::{BackupId, ClusterName};
use repository::root::{self, RootBackup, System};
use repository::store::{self, Body, ObjectStore};
use repository::stores::memory::MemoryStore;
use repository::wal::{self, Sink, VariantCheck, WalEncoder, WalFacts};

pub(crate) const SYSTEM: SystemIdentifier = SystemIdentifier::new(7_300_000_000_000_000_001);
const MIB: u64 = 1 << 20;
const PAGE: usize = 8192;
const PAGES: u32 = 40;

pub(crate) fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

pub(crate) fn now() -> Timestamp {
    "2026-11-23T05:00:00Z".parse().unwrap()
}

pub(crate) fn full() -> BackupId {
    "20261123T010100Z-00000001".parse().unwrap()
}

pub(crate) fn increment() -> BackupId {
    "20261123T020100Z-00000002".parse().unwrap()
}

/// What lies wrong in a backup that is published all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// Nothing.
    None,
    /// The manifest gives two files each other's extents.
    Extents,
    /// A page has a wrong checksum.
    Page,
}

/// Two stores that hold the same.
pub(crate) struct Sound {
    pub(crate) stores: Vec<Arc<MemoryStore>>,
}

impl Sound {
    pub(crate) async fn build() -> Self {
        Self::with(Flaw::None).await
    }

    pub(crate) async fn with(flaw: Flaw) -> Self {
        let mut stores = Vec::new();
        for name in ["repo1", "bucket"] {
            let store = Arc::new(MemoryStore::new(name.parse().unwrap()));
            fill(&store, flaw).await;
            stores.push(store);
        }
        Self { stores }
    }

    pub(crate) fn all(&self) -> Vec<Arc<dyn ObjectStore>> {
        self.stores.iter().map(|store| Arc::clone(store) as Arc<dyn ObjectStore>).collect()
    }
}

async fn fill(store: &MemoryStore, flaw: Flaw) {
    let writer = "coordinator".parse().unwrap();
    let system = System::new(SYSTEM, Some(15), Some(MIB), now());
    root::commit(store, &cluster(), &writer, now(), |root| root.with_system(system.clone())).await.unwrap();
    for number in 2..=7 {
        archive(store, 1, number, number as u8).await;
    }
    archive_file(store, "00000002.history", b"1\t0/700800\tno recovery target\n").await;
    for number in 7..=9 {
        archive(store, 2, number, 20 + number as u8).await;
    }
    let (first, packs, files) = full_backup(store, flaw).await;
    root::commit(store, &cluster(), &writer, now(), |root| root.with_backup(first.clone())).await.unwrap();
    let second = increment_on(store, &packs, &files).await;
    root::commit(store, &cluster(), &writer, now(), |root| root.with_backup(second.clone())).await.unwrap();
}

/// A segment all of one byte, with a commit of its own; the fifth tells what it changed.
async fn archive(store: &MemoryStore, timeline: u32, number: u64, byte: u8) {
    archive_as(store, timeline, number, byte, number == 5).await;
}

async fn archive_as(store: &MemoryStore, timeline: u32, number: u64, byte: u8, with_map: bool) {
    let (number, size) = (SegmentNumber::new(number), SegmentSize::from_bytes(MIB).unwrap());
    let name = format!("{timeline:08X}{:016X}", number.as_u64());
    let commit = PgTimestamp::from_unix_micros(1_795_395_600_000_000 + i64::from(byte) * 60_000_000);
    let facts = WalFacts { first_commit_time: Some(commit), last_commit_time: Some(commit), ..facts(&name) };
    let facts = WalFacts { logical_end: Some(number.end(size)), ..facts };
    let mut encoder = WalEncoder::new(1, Sink::Memory).unwrap();
    encoder.push(&vec![byte; MIB as usize]).unwrap();
    let mut map = ChangeMap::empty();
    map.mark(RelationFork { tablespace: 1663, database: 5, relation: 16384, fork: Fork::Main }, 7);
    let changes = SegmentChanges {
        start: number.start(size),
        size,
        end: SegmentEnd::Full,
        logical_end: number.end(size),
        postgres_major: 15,
        map,
        lead: Lead::Fresh,
        tail: Tail::Closed,
        doubt: None,
    };
    let encoded = match with_map {
        true => encoder.finish_with_changes(facts, &changes).unwrap(),
        false => encoder.finish(facts).unwrap(),
    };
    wal::put(store, &encoded, VariantCheck::List).await.unwrap();
}

async fn archive_file(store: &MemoryStore, name: &str, content: &[u8]) {
    let mut encoder = WalEncoder::new(1, Sink::Memory).unwrap();
    encoder.push(content).unwrap();
    wal::put(store, &encoder.finish(facts(name)).unwrap(), VariantCheck::List).await.unwrap();
}

fn facts(name: &str) -> WalFacts {
    WalFacts {
        cluster: cluster(),
        system_identifier: SYSTEM,
        name: name.parse().unwrap(),
        node: "db1".parse().unwrap(),
        in_recovery: false,
        complete: true,
        logical_end: None,
        postgres_major: Some(15),
        first_commit_time: None,
        last_commit_time: None,
        written: now(),
    }
}

/// A page that no two blocks and no two seeds have alike, with its checksum.
fn page_of(seed: u64, block: u32) -> Vec<u8> {
    let mut state = (seed << 32 | u64::from(block)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let mut bytes: Vec<u8> = (0..PAGE).map(|_| next()).collect();
    bytes[..24].fill(0);
    bytes[4..8].copy_from_slice(&100u32.to_le_bytes());
    for (at, value) in [(12, 40u16), (14, 8000), (16, 8192), (18, 8196)] {
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    let sum = page::checksum(&bytes, block);
    bytes[8..10].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn head(backup: BackupId, start: &str, stop: &str) -> Head {
    let text = format!(
        r#"{{"line":"head","format":1,"tool":"pgconvoy 0.1.0","backup":"{backup}","cluster":"main",
        "system_identifier":"{SYSTEM}","node":"db1","from_standby":false,"postgres_major":15,"control_version":1300,
        "catalog_version":202209061,"segment_size_bytes":{MIB},"block_size":8192,"relation_segment_blocks":131072,
        "checksum_version":1,"start_timeline":1,"start_lsn":"{start}","start_time":"{time}","stop_timeline":1,
        "stop_lsn":"{stop}","stop_time":"{time}","min_recovery_point":null,"label":"nightly",
        "backup_label":"START WAL LOCATION","tablespace_map":"","mode":448,"owner":null,"group":null,"page_errors":0}}"#,
        time = backup.time()
    );
    match serde_json::from_str(&text).unwrap() {
        Line::Head(head) => *head,
        other => panic!("{other:?}"),
    }
}

fn file(number: u32, path: &str, kind: FileKind, size: u64, layers: Vec<Layer>) -> Line {
    Line::File(File {
        number: FileNumber(number),
        path: RelativePath::new(path).unwrap(),
        kind,
        mode: 0o600,
        mtime: 1_790_000_000,
        size,
        crc32c: None,
        layers,
    })
}

async fn put_pack(store: &MemoryStore, backup: &BackupId, pack: &FinishedPack) {
    let key = key::pack(&cluster(), backup, pack.number);
    backup::put(store, &key, &pack.body, &pack.sha256).await.unwrap();
}

async fn put_manifest(store: &MemoryStore, head: &Head, lines: &[Line]) -> RootBackup {
    let mut writer = ManifestWriter::new(Vec::new(), head.clone()).unwrap();
    lines.iter().for_each(|line| writer.add(line).unwrap());
    let (manifest, summary) = writer.finish().unwrap();
    let entry = backup::entry(head, &summary);
    let body = Body::Memory(Bytes::from(manifest));
    backup::put(store, &key::manifest(&cluster(), &head.backup), &body, &entry.manifest_sha256).await.unwrap();
    entry
}

/// Two relations and a file, in packs of about 200 KB.
async fn full_backup(store: &MemoryStore, flaw: Flaw) -> (RootBackup, Vec<FinishedPack>, BTreeMap<u32, Layer>) {
    let mut builder = PackBuilder::new(3, 200_000).unwrap();
    let mut packs: Vec<FinishedPack> = Vec::new();
    for number in 0..2u32 {
        let mut pages: Vec<Vec<u8>> = (0..PAGES).map(|block| page_of(number.into(), block)).collect();
        if flaw == Flaw::Page {
            pages[11][4000] ^= 1;
        }
        for (piece, bytes) in pages.concat().chunks(FRAME_LIMIT_BYTES).enumerate() {
            builder.add(FileNumber(number), (piece * FRAME_LIMIT_BYTES) as u64, bytes).unwrap();
            if builder.is_full() {
                packs.push(builder.finish(packs.len() as u32));
            }
        }
    }
    builder.add(FileNumber(2), 0, b"port = 5432\n").unwrap();
    packs.push(builder.finish(packs.len() as u32));
    let mut layers: BTreeMap<u32, Layer> = BTreeMap::new();
    for (number, extent) in packs.iter().flat_map(|pack| &pack.extents) {
        let layer = Layer { backup: None, file: None, extents: Vec::new() };
        layers.entry(number.0).or_insert(layer).extents.push(*extent);
    }
    for pack in &packs {
        put_pack(store, &full(), pack).await;
    }
    let mut told = layers.clone();
    if flaw == Flaw::Extents {
        told.insert(0, layers[&1].clone());
        told.insert(1, layers[&0].clone());
    }
    let mut lines: Vec<Line> = packs.iter().map(|pack| Line::Pack(line_of(pack, None))).collect();
    let bytes = u64::from(PAGES) * PAGE as u64;
    lines.push(file(0, "base/5/16384", FileKind::Relation, bytes, vec![told[&0].clone()]));
    lines.push(file(1, "base/5/16385", FileKind::Relation, bytes, vec![told[&1].clone()]));
    lines.push(file(2, "postgresql.conf", FileKind::Other, 12, vec![told[&2].clone()]));
    let entry = put_manifest(store, &head(full(), "0/200028", "0/280000"), &lines).await;
    (entry, packs, layers)
}

fn line_of(pack: &FinishedPack, backup: Option<BackupId>) -> PackLine {
    PackLine { backup, number: pack.number, size: pack.size, sha256: pack.sha256 }
}

/// Three changed pages of the first relation, upon the full backup.
async fn increment_on(store: &MemoryStore, packs: &[FinishedPack], layers: &BTreeMap<u32, Layer>) -> RootBackup {
    let mut builder = PackBuilder::new(3, 200_000).unwrap();
    let blocks = [3, 4, 17];
    let pages: Vec<u8> = blocks.iter().flat_map(|block| page_of(9, *block)).collect();
    builder.add_pages(FileNumber(0), &blocks, &pages).unwrap();
    let own = builder.finish(0);
    put_pack(store, &increment(), &own).await;
    let older = |number: u32| Layer { backup: Some(full()), ..layers[&number].clone() };
    let newest = Layer { backup: None, file: None, extents: own.extents.iter().map(|(_, extent)| *extent).collect() };
    let mut head = head(increment(), "0/400028", "0/500100");
    head.backup_type = BackupType::Incr;
    head.parent = Some(full());
    head.references = vec![full()];
    head.critical = vec![LAYERS.to_owned()];
    let mut lines = vec![Line::Pack(line_of(&own, None))];
    lines.extend(packs.iter().map(|pack| Line::Pack(line_of(pack, Some(full())))));
    let bytes = u64::from(PAGES) * PAGE as u64;
    lines.push(file(0, "base/5/16384", FileKind::Relation, bytes, vec![newest, older(0)]));
    lines.push(file(1, "base/5/16385", FileKind::Relation, bytes, vec![older(1)]));
    lines.push(file(2, "postgresql.conf", FileKind::Other, 12, vec![older(2)]));
    put_manifest(store, &head, &lines).await
}

/// The key of a segment.
pub(crate) async fn segment(store: &MemoryStore, name: &str) -> ObjectKey {
    let name = name.parse().unwrap();
    wal::variants(store, &cluster(), SYSTEM, &name).await.unwrap().pop().unwrap().key
}

/// A segment as it would be if it told what it changed.
pub(crate) async fn segment_with_map(number: u64) -> Vec<u8> {
    let aside = MemoryStore::new("aside".parse().unwrap());
    archive_as(&aside, 1, number, 1, true).await;
    bytes_of(&aside, &segment(&aside, &format!("{:08X}{number:016X}", 1)).await).await
}

/// The bytes of an object.
pub(crate) async fn bytes_of(store: &MemoryStore, key: &ObjectKey) -> Vec<u8> {
    store::read(store, key, u64::MAX).await.unwrap().unwrap().to_vec()
}

/// Puts other bytes in an object's place.
pub(crate) async fn put_in_place(store: &MemoryStore, key: &ObjectKey, bytes: Vec<u8>) {
    let _ = store.delete(key).await.unwrap();
    let _ = store.put_new(key, Body::Memory(Bytes::from(bytes))).await.unwrap();
}

pub(crate) fn scratch() -> &'static Path {
    Path::new("/tmp")
}
