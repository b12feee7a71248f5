//! The independent reader (`tests/reader/pgconvoy_read.py`, written from FORMAT.md) reads what this crate writes, and
//! refuses what somebody damaged. Needs Python 3 with a Zstandard module.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bytes::Bytes;
use jiff::Timestamp;
use postgres_format::relation::{Fork, RelationFork};
use postgres_format::wal_changes::{ChangeMap, Lead, SegmentChanges, Tail};
use postgres_format::wal_segment::SegmentEnd;
use postgres_format::{FullTransactionId, Lsn, PgTimestamp, SegmentSize, SystemIdentifier, Timeline};
use repository::backup;
use repository::backup::manifest::{
    Database, Directory, File, FileKind, Head, LAYERS, Layer, Line, Link, ManifestWriter, Pack, Tablespace,
};
use repository::backup::origin::{BackupType, ChangeMethod, ChangeSource};
use repository::backup::pack::{FRAME_LIMIT_BYTES, FileNumber, PackBuilder};
use repository::byte_text::{ByteText, RelativePath};
use repository::config::DirectoryConfig;
use repository::identity::{self, RepositoryIdentity};
use repository::key;
use repository::name::{BackupId, ClusterName, Generation, NodeName};
use repository::root::{self, Mark, Past, Root, System};
use repository::store::Body;
use repository::stores::directory::DirectoryStore;
use repository::wal::{self, Sink, VariantCheck, WalEncoder, WalFacts};

#[path = "reader/released.rs"]
mod released;

const SYSTEM: SystemIdentifier = SystemIdentifier::new(7_300_000_000_000_000_001);
const BACKUP: &str = "20261123T010203Z-00000001";
const INCREMENT: &str = "20261124T010203Z-00000001";
const SEGMENT: &str = "000000010000000000000002";
const START: u64 = 2 << 20;

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

fn writer() -> NodeName {
    "db1".parse().unwrap()
}

fn now() -> Timestamp {
    "2026-11-23T04:00:00Z".parse().unwrap()
}

fn content(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(|index| if index % 2 == 0 { next() } else { 7 }).collect()
}

/// What the whole segment tells.
fn changes() -> SegmentChanges {
    let mut map = ChangeMap::empty();
    let fork = RelationFork { tablespace: 1663, database: 5, relation: 16384, fork: Fork::Main };
    (0..900).step_by(3).for_each(|block| map.mark(fork, block));
    SegmentChanges {
        start: Lsn::new(START),
        size: SegmentSize::MIN,
        end: SegmentEnd::Full,
        logical_end: Lsn::new(START + (1 << 20)),
        postgres_major: 15,
        map,
        lead: Lead::Fresh,
        tail: Tail::Closed,
        doubt: None,
    }
}

struct Repository {
    place: tempfile::TempDir,
    store: DirectoryStore,
}

impl Repository {
    async fn create() -> Self {
        let place = tempfile::tempdir().unwrap();
        let config = DirectoryConfig { path: place.path().to_owned(), full_percent: 100 };
        let store = DirectoryStore::new("repo1".parse().unwrap(), config).unwrap();
        let identity = RepositoryIdentity { repository: uuid::Uuid::now_v7(), format: 1, created: now() };
        let _ = identity::create(&store, &identity).await.unwrap();
        let system = System::new(SYSTEM, Some(15), Some(1 << 20), now());
        root::commit(&store, &cluster(), &writer(), now(), |root| root.with_system(system.clone())).await.unwrap();
        Self { place, store }
    }

    fn path(&self) -> &Path {
        self.place.path()
    }

    async fn archive(&self, name: &str, file: &[u8], end: Option<u64>) {
        let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
        encoder.push(file).unwrap();
        let facts = WalFacts {
            cluster: cluster(),
            system_identifier: SYSTEM,
            name: name.parse().unwrap(),
            node: writer(),
            in_recovery: false,
            complete: end.is_none(),
            logical_end: Some(Lsn::new(end.unwrap_or(START + (1 << 20)))),
            postgres_major: Some(15),
            first_commit_time: None,
            last_commit_time: Some(PgTimestamp::from_micros(848_000_000_123_456)),
            written: now(),
        };
        let tells = name == SEGMENT && end.is_none();
        let wal = if tells { encoder.finish_with_changes(facts, &changes()) } else { encoder.finish(facts) }.unwrap();
        assert_eq!(wal.header.changes.is_some(), tells);
        wal::put(&self.store, &wal, VariantCheck::List).await.unwrap();
    }

    fn read(&self, arguments: &[&str]) -> Output {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests");
        let mut command = Command::new(tests.join("python.sh"));
        command.arg("-B").arg(tests.join("reader/pgconvoy_read.py")).arg(self.path()).args(arguments).output().unwrap()
    }

    #[track_caller]
    fn read_well(&self, arguments: &[&str]) -> String {
        let output = self.read(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn refuse(&self, arguments: &[&str]) -> String {
        let output = self.read(arguments);
        assert!(!output.status.success(), "{arguments:?} was read");
        String::from_utf8(output.stderr).unwrap()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn wal_is_read() {
    let repository = Repository::create().await;
    let out = tempfile::tempdir().unwrap();
    let file = content(1, 1 << 20);
    let mut tail = file.clone();
    tail[5000..].fill(0);
    repository.archive(SEGMENT, &tail, Some(START + 5000)).await;
    repository.archive(SEGMENT, &file, None).await;
    repository.archive("000000010000000000000002.partial", &tail, Some(START + 5000)).await;
    repository.archive("000000010000000000000002.00000028.backup", b"START WAL LOCATION", None).await;
    let history = b"1\t0/3000000\tno recovery target specified\n";
    repository.archive("00000002.history", history, None).await;

    let listed = repository.read_well(&["list"]);
    assert_eq!(listed.lines().count(), 5, "{listed}");
    assert_eq!(repository.read_well(&["verify"]), "verified 5 WAL objects and 0 backups\n");
    let system = SYSTEM.to_string();
    let read = |name: &str| {
        let target = out.path().join(name);
        repository.read_well(&["wal", "main", &system, name, text(&target)]);
        std::fs::read(target).unwrap()
    };
    assert!(read(SEGMENT) == file);
    assert!(read("000000010000000000000002.partial") == tail);
    assert_eq!(read("00000002.history"), history);
    let missing = repository.refuse(&["wal", "main", &system, "000000010000000000000003", text(&out.path().join("x"))]);
    assert!(missing.contains("is not archived"), "{missing}");
}

/// Everything a data directory can hold, in one backup.
async fn publish(repository: &Repository) -> Vec<(Vec<u8>, Vec<u8>)> {
    let files: Vec<(&[u8], Vec<u8>)> = vec![
        (b"PG_VERSION", b"15\n".to_vec()),
        (b"base/5/16384", content(1, 160_000)),
        (b"base/5/16385", Vec::new()),
        (b"pg_tblspc/16500/PG_15_202209061/5/16400", content(2, 40_000)),
        (b"odd \xff name", b"x".to_vec()),
        (b"global/pg_control", content(3, 8192)),
    ];
    let backup: BackupId = BACKUP.parse().unwrap();
    let mut builder = PackBuilder::new(3, 100_000).unwrap();
    let mut packs = Vec::new();
    for (number, (_, content)) in files.iter().enumerate() {
        for (piece, bytes) in content.chunks(FRAME_LIMIT_BYTES).enumerate() {
            builder.add(FileNumber(number as u32), (piece * FRAME_LIMIT_BYTES) as u64, bytes).unwrap();
            if builder.is_full() {
                packs.push(builder.finish(packs.len() as u32));
            }
        }
    }
    packs.push(builder.finish(packs.len() as u32));
    for pack in &packs {
        let key = key::pack(&cluster(), &backup, pack.number);
        backup::put(&repository.store, &key, &pack.body, &pack.sha256).await.unwrap();
    }
    let mut manifest = ManifestWriter::new(Vec::new(), head(backup)).unwrap();
    let mut add = |line: Line| manifest.add(&line).unwrap();
    add(Line::Tablespace(Tablespace { oid: 16_500, location: ByteText::new("/srv/fast"), mode: 0o700 }));
    for directory in ["base", "base/5", "global", "pg_wal", "pg_tblspc/16500/PG_15_202209061"] {
        add(Line::Directory(Directory { path: RelativePath::new(directory).unwrap(), mode: 0o700 }));
    }
    add(Line::Link(Link {
        path: RelativePath::new("log").unwrap(),
        target: ByteText::new("/var/log/pg"),
        directory: true,
    }));
    for pack in &packs {
        add(Line::Pack(Pack { backup: None, number: pack.number, size: pack.size, sha256: pack.sha256 }));
    }
    for (number, (path, content)) in files.iter().enumerate() {
        let own = packs.iter().flat_map(|pack| &pack.extents).filter(|(file, _)| file.0 == number as u32);
        let extents: Vec<_> = own.map(|(_, extent)| *extent).collect();
        add(Line::File(File {
            number: FileNumber(number as u32),
            path: RelativePath::new(*path).unwrap(),
            kind: FileKind::Other,
            mode: 0o600,
            mtime: 1_790_000_000,
            size: content.len() as u64,
            crc32c: Some(crc32c::crc32c(content)),
            layers: if extents.is_empty() { Vec::new() } else { vec![Layer { backup: None, file: None, extents }] },
        }));
    }
    let (bytes, summary) = manifest.finish().unwrap();
    let body = Body::Memory(Bytes::from(bytes));
    backup::put(&repository.store, &key::manifest(&cluster(), &backup), &body, &summary.sha256).await.unwrap();
    let entry = backup::entry(&head(backup), &summary);
    root::commit(&repository.store, &cluster(), &writer(), now(), |root| root.with_backup(entry.clone()))
        .await
        .unwrap();
    let depth = backup::VerifyDepth::Content;
    backup::verify(&repository.store, &cluster(), &entry, depth, &std::env::temp_dir()).await.unwrap();
    files.into_iter().map(|(path, content)| (path.to_vec(), content)).collect()
}

fn head(backup: BackupId) -> Head {
    Head {
        format: Head::FORMAT,
        critical: Vec::new(),
        tool: "pgconvoy 0.1.0".to_owned(),
        backup,
        backup_type: Default::default(),
        parent: None,
        changes: None,
        cluster: cluster(),
        system_identifier: SYSTEM,
        node: writer(),
        from_standby: false,
        primary: None,
        postgres_major: 15,
        control_version: 1300,
        catalog_version: 202_209_061,
        segment_size_bytes: 1 << 20,
        block_size: 8192,
        relation_segment_blocks: 131_072,
        checksum_version: 1,
        wal_log_hints: false,
        start_timeline: Timeline::FIRST,
        start_lsn: "0/200028".parse().unwrap(),
        start_time: "2026-11-23T01:02:03Z".parse().unwrap(),
        stop_timeline: Timeline::FIRST,
        stop_lsn: "0/200138".parse().unwrap(),
        stop_time: "2026-11-23T01:03:00Z".parse().unwrap(),
        min_recovery_point: None,
        start_next_xid: None,
        stop_next_xid: Some(FullTransactionId::new(740)),
        last_commit_time: None,
        label: "täglich \"1\"\n".to_owned(),
        backup_label: ByteText::new(&b"START WAL LOCATION: 0/200028\nLABEL: \xff\n"[..]),
        tablespace_map: ByteText::new("16500 /srv/fast\n"),
        mode: 0o700,
        owner: Some("postgres".to_owned()),
        group: Some("postgres".to_owned()),
        references: Vec::new(),
        attempts: Vec::new(),
        page_errors: 0,
        wal_witnesses: Vec::new(),
        warnings: Vec::new(),
        page_error_list: Vec::new(),
        databases: vec![
            Database { oid: 5, name: ByteText::new("postgres") },
            Database { oid: 16_390, name: ByteText::new(&b"caf\xe9"[..]) },
        ],
        wal_directory: Some(ByteText::new("/srv/wal")),
        unknown: BTreeMap::new(),
    }
}

#[tokio::test]
async fn a_backup_is_read() {
    use std::os::unix::ffi::OsStrExt;

    let repository = Repository::create().await;
    let files = publish(&repository).await;
    assert_eq!(repository.read_well(&["verify"]), "verified 0 WAL objects and 1 backups\n");
    assert!(repository.read_well(&["list"]).contains(BACKUP));
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("data");
    repository.read_well(&["backup", "main", BACKUP, text(&target)]);
    for (path, content) in files {
        let restored = std::fs::read(target.join(std::ffi::OsStr::from_bytes(&path))).unwrap();
        assert!(restored == content, "{}", String::from_utf8_lossy(&path));
    }
    assert_eq!(
        std::fs::read(target.join("backup_label")).unwrap(),
        head(BACKUP.parse().unwrap()).backup_label.as_bytes()
    );
    assert_eq!(std::fs::read(target.join("tablespace_map")).unwrap(), b"16500 /srv/fast\n");
    assert_eq!(std::fs::read_link(target.join("log")).unwrap(), PathBuf::from("/var/log/pg"));
    assert!(target.join("pg_wal").is_dir());
}

/// An increment on the backup of [`publish`]: changed pages, a file that grew, one cut short, one as it was, one gone.
async fn publish_increment(repository: &Repository, before: &[(Vec<u8>, Vec<u8>)]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let (parent, id): (BackupId, BackupId) = (BACKUP.parse().unwrap(), INCREMENT.parse().unwrap());
    let entry = root::newest(&repository.store, &cluster()).await.unwrap().unwrap().backups[0].clone();
    let manifest = backup::fetch_manifest(&repository.store, &cluster(), &entry, &std::env::temp_dir()).await.unwrap();
    let lines: Vec<Line> = manifest.map(Result::unwrap).collect();
    let mut files: Vec<File> =
        lines.iter().filter_map(|line| if let Line::File(file) = line { Some(file.clone()) } else { None }).collect();
    let mut contents = before.to_vec();
    files.remove(2);
    contents.remove(2);
    let mut builder = PackBuilder::new(3, 100_000).unwrap();
    let page = 8192;
    // Pages 1, 2 and 9 of the relation, and two more pages at its end.
    let changed = content(77, 3 * page);
    for (number, block) in [1, 2, 9].into_iter().enumerate() {
        contents[1].1[block * page..][..page].copy_from_slice(&changed[number * page..][..page]);
    }
    let whole = contents[1].1.len() / page * page;
    contents[1].1.truncate(whole);
    contents[1].1.extend(content(78, 2 * page));
    builder.add_pages(FileNumber(1), &[1, 2, 9], &changed).unwrap();
    builder.add(FileNumber(1), whole as u64, &content(78, 2 * page)).unwrap();
    contents[2].1.truncate(10_000);
    let pack = builder.finish(0);
    backup::put(&repository.store, &key::pack(&cluster(), &id, 0), &pack.body, &pack.sha256).await.unwrap();
    for (number, (file, (_, content))) in files.iter_mut().zip(&contents).enumerate() {
        let carried = (file.number.0 != number as u32).then_some(file.number);
        file.layers.iter_mut().for_each(|layer| (layer.backup, layer.file) = (Some(parent), carried));
        (file.number, file.size) = (FileNumber(number as u32), content.len() as u64);
        let own = pack.extents.iter().filter(|(owner, _)| *owner == file.number);
        let extents: Vec<_> = own.map(|(_, extent)| *extent).collect();
        if !extents.is_empty() {
            file.layers.insert(0, Layer { backup: None, file: None, extents });
        }
        file.crc32c = file.crc32c.filter(|sum| *sum == crc32c::crc32c(content));
    }
    let mut head = head(id);
    (head.backup_type, head.parent) = (BackupType::Incr, Some(parent));
    head.changes = Some(ChangeSource { method: ChangeMethod::ChangeMaps, reason: "preferred".to_owned() });
    (head.references, head.critical) = (vec![parent], vec![LAYERS.to_owned()]);
    let mut manifest = ManifestWriter::new(Vec::new(), head.clone()).unwrap();
    let own = Pack { backup: None, number: 0, size: pack.size, sha256: pack.sha256 };
    manifest.add(&Line::Pack(own)).unwrap();
    for line in lines {
        if let Line::Pack(inherited) = line {
            manifest.add(&Line::Pack(Pack { backup: Some(parent), ..inherited })).unwrap();
        }
    }
    files.into_iter().for_each(|file| manifest.add(&Line::File(file)).unwrap());
    let (bytes, summary) = manifest.finish().unwrap();
    let body = Body::Memory(Bytes::from(bytes));
    backup::put(&repository.store, &key::manifest(&cluster(), &id), &body, &summary.sha256).await.unwrap();
    let entry = backup::entry(&head, &summary);
    root::commit(&repository.store, &cluster(), &writer(), now(), |root| root.with_backup(entry.clone()))
        .await
        .unwrap();
    backup::verify(&repository.store, &cluster(), &entry, backup::VerifyDepth::Content, &std::env::temp_dir())
        .await
        .unwrap();
    contents
}

#[tokio::test]
async fn an_increment_is_read() {
    use std::os::unix::ffi::OsStrExt;

    let repository = Repository::create().await;
    let full = publish(&repository).await;
    let files = publish_increment(&repository, &full).await;
    assert_eq!(repository.read_well(&["verify"]), "verified 0 WAL objects and 2 backups\n");
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("data");
    repository.read_well(&["backup", "main", INCREMENT, text(&target)]);
    assert_eq!(files.len(), full.len() - 1);
    for (path, content) in files {
        let restored = std::fs::read(target.join(std::ffi::OsStr::from_bytes(&path))).unwrap();
        assert!(restored == content, "{}", String::from_utf8_lossy(&path));
    }
    let pack = repository.path().join(key::pack(&cluster(), &BACKUP.parse().unwrap(), 0).as_str());
    std::fs::remove_file(pack).unwrap();
    repository.refuse(&["backup", "main", INCREMENT, text(&out.path().join("again"))]);
}

#[tokio::test]
async fn damage_is_refused() {
    let repository = Repository::create().await;
    repository.archive(SEGMENT, &content(1, 1 << 20), None).await;
    let full = publish(&repository).await;
    publish_increment(&repository, &full).await;
    repository.read_well(&["verify"]);
    let mut objects = Vec::new();
    let mut directories = vec![repository.path().join("c")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { directories.push(path) } else { objects.push(path) }
        }
    }
    assert!(objects.len() >= 6, "{objects:?}");
    for object in objects {
        let whole = std::fs::read(&object).unwrap();
        let damage = |at: usize, bits: u8| {
            let mut damaged = whole.clone();
            damaged[at] ^= bits;
            // Stored objects are read-only: the file is replaced.
            std::fs::remove_file(&object).unwrap();
            std::fs::write(&object, damaged).unwrap();
            let said = repository.refuse(&["verify"]);
            assert!(said.contains("damaged"), "{} byte {at}: {said}", object.display());
        };
        damage(whole.len() / 2, 1);
        damage(whole.len() - 2, 4);
        std::fs::write(&object, &whole[..whole.len() - 1]).unwrap();
        repository.refuse(&["verify"]);
        std::fs::write(&object, &whole).unwrap();
        repository.read_well(&["verify"]);
    }
}

/// A store that was set back, went on above the gap, and has what somebody created who had read the root before it.
#[tokio::test]
async fn a_history_with_a_gap_is_read_and_what_lies_in_the_gap_is_not() {
    let repository = Repository::create().await;
    let (store, name) = (&repository.store, cluster());
    let with = |node: &str| System::new(SystemIdentifier::new(node.len() as u64), None, None, now());
    let commit = async |past: Past, system: System| {
        let edit = |root: &Root| root.with_system(system.clone());
        root::commit_upon(store, &name, &writer(), now(), past, edit).await.unwrap()
    };
    let (_, second) = commit(Past::Unknown, with("b")).await;
    let (_, third) = commit(Past::Unknown, with("cc")).await;
    let file = |mark: &Mark| repository.path().join(key::root(&name, mark.generation).as_str());
    let orphan = std::fs::read(file(&second)).unwrap();
    for mark in [second, third] {
        std::fs::remove_file(file(&mark)).unwrap();
    }
    let (over, _) = commit(Past::Forgone(third), with("ddd")).await;
    assert_eq!(over.generation.get(), 4);
    let count = "verified 0 WAL objects and 0 backups\n";
    assert_eq!(repository.read_well(&["verify"]), count);
    std::fs::write(file(&second), &orphan).unwrap();
    assert_eq!(repository.read_well(&["verify"]), count);
    assert_eq!(root::verify_history(store, &name).await.unwrap(), Some(over.generation));
    let first = Mark { generation: Generation::FIRST, ..second };
    std::fs::remove_file(file(&first)).unwrap();
    let said = repository.refuse(&["verify"]);
    assert!(said.contains("root 1 is missing"), "{said}");
}
