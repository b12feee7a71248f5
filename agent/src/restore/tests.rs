//! Restores of backups made by hand, into empty directories and onto what is there, from a store that counts.

mod counting;
mod places;
mod stores;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{MetadataExt, symlink};
use std::time::Duration;

use bytes::Bytes;
use postgres_format::control_file::ControlFile;
use proptest::prelude::*;
use repository::backup::manifest::{
    Database, Directory, File, FileKind, Head, LAYERS, Layer, Line, Link, ManifestWriter, Pack, Tablespace,
};
use repository::backup::origin::BackupType;
use repository::backup::pack::{Extent, FRAME_LIMIT_BYTES, FRAME_LIMIT_PAGES, FileNumber, PackBuilder};
use repository::backup::{entry, put};
use repository::byte_text::{ByteText, RelativePath};
use repository::key::{self, ObjectKey};
use repository::name::{BackupId, StoreName};
use repository::restore_plan::{ArchiveMode, Recovery, Request, TargetTimeline};
use repository::store::{Body, ByteRange, ByteStream, ListPage, Put, Room, StoreError};
use repository::stores::memory::MemoryStore;

use super::*;
use crate::testing::sample;
use counting::Counting;

const PAGE: usize = 8192;
const CONTROL: &str = "global/pg_control";

type Tree = BTreeMap<String, Vec<u8>>;

/// What a backup says about itself, and what its files held.
struct Made {
    entry: RootBackup,
    packs: Vec<Pack>,
    files: Vec<File>,
    tree: Tree,
}

struct History {
    store: Arc<Counting>,
    made: Vec<Made>,
    place: tempfile::TempDir,
    databases: Vec<String>,
    links: LinkChoice,
    /// What the head of the next backup says besides.
    said: Said,
}

/// What a test has the head of a manifest say.
#[derive(Default)]
struct Said {
    databases: Vec<Database>,
    wal_directory: Option<ByteText>,
    tablespaces: Vec<Tablespace>,
    links: Vec<Link>,
}

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

fn id(number: usize) -> BackupId {
    format!("20261123T0102{number:02}Z-00000001").parse().unwrap()
}

fn path(text: &str) -> RelativePath {
    RelativePath::new(text.as_bytes()).unwrap()
}

/// Bytes that do not repeat.
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

pub(super) fn head(number: usize, control: &[u8]) -> Head {
    let control = ControlFile::parse(control).unwrap();
    let json = format!(
        r#"{{"format":1,"tool":"t","backup":"{}","cluster":"main","system_identifier":"{}","node":"n",
        "from_standby":false,"postgres_major":15,"control_version":1300,"catalog_version":1,
        "segment_size_bytes":16777216,"block_size":8192,"relation_segment_blocks":131072,"checksum_version":0,
        "start_timeline":1,"start_lsn":"0/1","start_time":"2026-11-23T01:02:03Z","stop_timeline":1,"stop_lsn":"0/2",
        "stop_time":"2026-11-23T01:02:03Z","min_recovery_point":null,"label":"","backup_label":"LABEL: x",
        "tablespace_map":"","mode":448,"owner":null,"group":null,"page_errors":0}}"#,
        id(number),
        control.system_identifier,
    );
    serde_json::from_str(&json).unwrap()
}

impl History {
    fn new() -> Self {
        Self {
            store: Counting::new(),
            made: Vec::new(),
            place: tempfile::tempdir().unwrap(),
            databases: Vec::new(),
            links: LinkChoice::default(),
            said: Said::default(),
        }
    }

    fn target(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// A backup of a tree on the one before, page by page where there is one.
    async fn back_up(&mut self, mut tree: Tree) {
        tree.insert(CONTROL.to_owned(), sample("pg_control"));
        tree.insert("PG_VERSION".to_owned(), b"15\n".to_vec());
        let parent = self.made.last();
        let mut builder = PackBuilder::new(1, 200_000).unwrap();
        let (mut packs, mut files) = (Vec::new(), Vec::new());
        for (name, bytes) in &tree {
            // Numbers differ from backup to backup.
            let number = FileNumber((files.len() * 2 + self.made.len()) as u32);
            let before = parent.and_then(|made| Some((made.tree.get(name)?, made)));
            let before = before.filter(|_| name.starts_with("base/"));
            let mut solid_from = 0;
            let mut layers = Vec::new();
            if let Some((old, made)) = before {
                let both = bytes.len().min(old.len()) / PAGE;
                let pages = (0..both).filter(|page| {
                    let at = page * PAGE..(page + 1) * PAGE;
                    bytes[at.clone()] != old[at]
                });
                let pages: Vec<u32> = pages.map(|page| page as u32).collect();
                for blocks in pages.chunks(FRAME_LIMIT_PAGES) {
                    let page = |block: &u32| bytes[*block as usize * PAGE..][..PAGE].to_vec();
                    let raw: Vec<u8> = blocks.iter().flat_map(page).collect();
                    builder.add_pages(number, blocks, &raw).unwrap();
                    if builder.is_full() {
                        packs.push(builder.finish(packs.len() as u32));
                    }
                }
                solid_from = if bytes.len() > old.len() { both * PAGE } else { bytes.len() };
                let older = made.files.iter().find(|file| file.path == path(name)).unwrap();
                layers = older
                    .layers
                    .iter()
                    .map(|layer| Layer {
                        backup: layer.backup.or(Some(made.entry.backup)),
                        file: Some(older.number_in(layer)).filter(|carried| *carried != number),
                        extents: layer.extents.clone(),
                    })
                    .collect();
            }
            for (piece, chunk) in bytes[solid_from..].chunks(FRAME_LIMIT_BYTES).enumerate() {
                builder.add(number, (solid_from + piece * FRAME_LIMIT_BYTES) as u64, chunk).unwrap();
                if builder.is_full() {
                    packs.push(builder.finish(packs.len() as u32));
                }
            }
            let kind = if name == CONTROL { FileKind::Control } else { FileKind::Relation };
            let (size, crc32c) = (bytes.len() as u64, Some(crc32c::crc32c(bytes)));
            files.push(File {
                number,
                path: path(name),
                kind,
                mode: 0o600,
                mtime: 1_790_000_000,
                size,
                crc32c,
                layers,
            });
        }
        if !builder.has_no_frames() {
            packs.push(builder.finish(packs.len() as u32));
        }
        for file in &mut files {
            let own = packs.iter().flat_map(|pack| &pack.extents).filter(|(number, _)| *number == file.number);
            let mut extents: Vec<Extent> = own.map(|(_, extent)| *extent).collect();
            extents.sort_by_key(|extent| extent.from);
            if !extents.is_empty() {
                file.layers.insert(0, Layer { backup: None, file: None, extents });
            }
            file.drop_hidden();
            if file.layers.len() > 1 {
                file.crc32c = None;
            }
        }
        let number = self.made.len();
        for pack in &packs {
            let key = key::pack(&cluster(), &id(number), pack.number);
            put(self.store.as_ref(), &key, &pack.body, &pack.sha256).await.unwrap();
        }
        let own: Vec<Pack> = packs
            .iter()
            .map(|pack| Pack { backup: None, number: pack.number, size: pack.size, sha256: pack.sha256 })
            .collect();
        self.publish(number, own, files, tree).await;
    }

    async fn publish(&mut self, number: usize, own: Vec<Pack>, files: Vec<File>, tree: Tree) {
        let used: BTreeSet<(BackupId, u32)> = files
            .iter()
            .flat_map(|file| &file.layers)
            .filter_map(|layer| Some((layer.backup?, layer)))
            .flat_map(|(backup, layer)| layer.extents.iter().map(move |extent| (backup, extent.pack)))
            .collect();
        let mut head = head(number, &tree[CONTROL]);
        let older = self.made.iter().map(|made| made.entry.backup);
        head.references = older.filter(|backup| used.iter().any(|(used, _)| used == backup)).collect();
        head.backup_type = if number == 0 { BackupType::Full } else { BackupType::Incr };
        if files.iter().any(File::is_layered) {
            head.critical = vec![LAYERS.to_owned()];
        }
        let inherited = used.into_iter().map(|(backup, pack)| {
            let made = self.made.iter().find(|made| made.entry.backup == backup).unwrap();
            let pack = made.packs.iter().find(|known| known.number == pack).unwrap();
            Pack { backup: Some(backup), ..pack.clone() }
        });
        (head.databases, head.wal_directory) = (self.said.databases.clone(), self.said.wal_directory.clone());
        let mut manifest = ManifestWriter::new(Vec::new(), head.clone()).unwrap();
        for tablespace in &self.said.tablespaces {
            manifest.add(&Line::Tablespace(tablespace.clone())).unwrap();
        }
        let versions = self.said.tablespaces.iter().map(|tablespace| format!("pg_tblspc/{}/PG_15_1", tablespace.oid));
        for directory in versions {
            manifest.add(&Line::Directory(Directory { path: path(&directory), mode: 0o700 })).unwrap();
        }
        for directory in ["base", "base/16390", "base/16391", "base/5", "global", "pg_wal", "pg_wal/archive_status"] {
            manifest.add(&Line::Directory(Directory { path: path(directory), mode: 0o700 })).unwrap();
        }
        manifest
            .add(&Line::Link(Link { path: path("log"), target: ByteText::new("/nonexistent/log"), directory: false }))
            .unwrap();
        self.said.links.iter().for_each(|link| manifest.add(&Line::Link(link.clone())).unwrap());
        own.iter().cloned().chain(inherited).for_each(|pack| manifest.add(&Line::Pack(pack)).unwrap());
        files.iter().for_each(|file| manifest.add(&Line::File(file.clone())).unwrap());
        let (bytes, summary) = manifest.finish().unwrap();
        let entry = entry(&head, &summary);
        let key = key::manifest(&cluster(), &entry.backup);
        put(self.store.as_ref(), &key, &Body::Memory(Bytes::from(bytes)), &entry.manifest_sha256).await.unwrap();
        self.made.push(Made { entry, packs: own, files, tree });
    }

    fn source(&self, number: usize, stores: Vec<Arc<dyn ObjectStore>>) -> RestoreSource {
        RestoreSource { cluster: cluster(), backup: self.made[number].entry.clone(), stores }
    }

    fn options(&self, target: &Path, place: Place) -> RestoreOptions {
        let request = Request::latest("false".to_owned());
        RestoreOptions {
            target: target.to_owned(),
            place,
            databases: self.databases.clone(),
            tablespace_map: TablespaceMap::new(),
            links: self.links.clone(),
            recovery: Recovery::of(&request, TargetTimeline::Latest, ArchiveMode::Off),
            owner: Some("root".to_owned()),
            parallel: 0,
            bytes_per_second: 0,
            scratch: std::env::temp_dir(),
        }
    }

    async fn restore(&self, number: usize, target: &Path, place: Place) -> Result<Restored, RestoreError> {
        self.store.taken();
        apply(&self.source(number, vec![self.store.clone()]), &self.options(target, place)).await
    }

    /// Whether the directory holds what the backup does, and nothing else.
    fn expect(&self, number: usize, target: &Path) {
        let expected = &self.made[number].tree;
        for (name, bytes) in expected.iter().filter(|(name, _)| *name != CONTROL) {
            assert!(fs::read(target.join(name)).unwrap() == *bytes, "{name} of backup {number}");
            let found = fs::metadata(target.join(name)).unwrap();
            assert_eq!((found.mtime(), found.mode() & 0o777), (1_790_000_000, 0o600), "{name}");
        }
        assert_eq!(fs::read_link(target.join("log")).unwrap(), Path::new("/nonexistent/log"));
        let ours = ["backup_label", "backup_manifest", "postgresql.auto.conf", "recovery.signal", "log", "pg_wal"];
        let mut pending = vec![PathBuf::new()];
        while let Some(directory) = pending.pop() {
            for found in fs::read_dir(target.join(&directory)).unwrap() {
                let found = found.unwrap();
                let path = directory.join(found.file_name());
                let name = path.to_str().unwrap();
                match found.file_type().unwrap().is_dir() {
                    true => pending.push(path),
                    false => assert!(expected.contains_key(name) || ours.contains(&name), "{name} is left"),
                }
            }
        }
        let manifest: serde_json::Value =
            serde_json::from_slice(&fs::read(target.join("backup_manifest")).unwrap()).unwrap();
        let listed = manifest["Files"].as_array().unwrap();
        for (name, bytes) in expected.iter().filter(|(name, _)| *name != CONTROL) {
            let line = listed.iter().find(|line| line["Path"] == **name).unwrap();
            let checksum: String =
                crc32c::crc32c(bytes).to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(line["Checksum"], checksum, "{name}");
        }
    }
}

async fn apply(source: &RestoreSource, options: &RestoreOptions) -> Result<Restored, RestoreError> {
    let (progress, _) = watch::channel(RestoreProgress::default());
    restore(source, options, &progress, &CancellationToken::new()).await
}

fn tree(files: &[(&str, usize)]) -> Tree {
    files.iter().enumerate().map(|(seed, (name, bytes))| ((*name).to_owned(), content(seed as u64, *bytes))).collect()
}

fn change(tree: &mut Tree, name: &str, seed: u64, pages: &[usize]) {
    let bytes = tree.get_mut(name).unwrap();
    for page in pages {
        bytes[page * PAGE..][..PAGE].copy_from_slice(&content(seed + *page as u64, PAGE));
    }
}

const ONE: &str = "base/5/16384";
const TWO: &str = "base/5/16385";
const THREE: &str = "base/5/16386";

/// A full backup and two increments.
async fn three() -> History {
    let mut history = History::new();
    let mut now = tree(&[(ONE, 90 * PAGE), (TWO, 5 * PAGE), (THREE, 40 * PAGE), ("base/5/empty", 0), ("odd", 100)]);
    history.back_up(now.clone()).await;
    change(&mut now, ONE, 1000, &[0, 7, 8, 9, 50]);
    now.get_mut(TWO).unwrap().extend(content(77, 3 * PAGE));
    now.get_mut(THREE).unwrap().truncate(12 * PAGE);
    history.back_up(now.clone()).await;
    change(&mut now, ONE, 2000, &[8, 89]);
    change(&mut now, TWO, 2000, &[1, 6]);
    now.remove("odd");
    now.insert("base/5/new".to_owned(), content(5, 3 * PAGE));
    history.back_up(now).await;
    history
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_is_kept() {
    let history = three().await;
    let scratch = tempfile::tempdir().unwrap();
    history.restore(2, &scratch.path().join("fast"), Place::Free).await.unwrap();
    let (_, bytes) = history.store.taken();
    let target = scratch.path().join("slow");
    let options = RestoreOptions { bytes_per_second: bytes * 2, ..history.options(&target, Place::Free) };
    let begun = process::clock::Monotonic::now();
    apply(&history.source(2, vec![history.store.clone()]), &options).await.unwrap();
    // Increments, which are read last, are a small part of it.
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    history.expect(2, &target);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_backup_is_restored_from_its_layers() {
    let history = three().await;
    for number in 0..3 {
        let target = history.target(&format!("r{number}"));
        let restored = history.restore(number, &target, Place::Free).await.unwrap();
        history.expect(number, &target);
        assert!(restored.warnings.is_empty() && restored.removed == 0 && restored.bytes_kept == 0);
        assert!(!target.join("pgconvoy.restore").exists());
        let again = history.restore(number, &target, Place::Free).await;
        assert!(matches!(again, Err(RestoreError::Target(TargetError::Occupied { .. }))), "{again:?}");
    }
    // Few large requests: what lies near each other is read together.
    history.restore(2, &history.target("r"), Place::Free).await.unwrap();
    let packs: usize = history.made.iter().map(|made| made.packs.len()).sum();
    assert!(history.store.taken().0 <= packs as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identical_directory_is_not_read_from_packs() {
    let history = three().await;
    let target = history.target("data");
    history.restore(0, &target, Place::Existing).await.unwrap();
    let restored = history.restore(0, &target, Place::Existing).await.unwrap();
    history.expect(0, &target);
    // pg_control alone: an interrupted restore must not leave one.
    assert_eq!(history.store.taken().0, 1);
    assert_eq!(restored.bytes_kept, restored.bytes - 8192);

    history.restore(2, &target, Place::Existing).await.unwrap();
    history.expect(2, &target);
    let (_, before) = history.store.taken();
    let restored = history.restore(2, &target, Place::Existing).await.unwrap();
    history.expect(2, &target);
    let (requests, bytes) = history.store.taken();
    assert_eq!(restored.bytes_kept, restored.bytes - 8192);
    // pg_control, and the tables of the packs that files in several layers lie in.
    let packs: usize = history.made.iter().map(|made| made.packs.len()).sum();
    assert!(requests <= 1 + packs as u64, "{requests} requests, {bytes} bytes after {before}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_pages_that_differ_are_read() {
    let history = three().await;
    let target = history.target("data");
    history.restore(1, &target, Place::Free).await.unwrap();
    let page = content(4711, PAGE);
    std::os::unix::fs::FileExt::write_all_at(
        &fs::OpenOptions::new().write(true).open(target.join(ONE)).unwrap(),
        &page,
        (30 * PAGE) as u64,
    )
    .unwrap();
    let restored = history.restore(1, &target, Place::Existing).await.unwrap();
    history.expect(1, &target);
    assert_eq!(restored.bytes_kept, restored.bytes - 8192 - PAGE as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_in_the_backup_is_removed_and_no_link_is_followed() {
    let history = three().await;
    let target = history.target("data");
    history.restore(2, &target, Place::Free).await.unwrap();
    let outside = history.target("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("precious"), "x").unwrap();
    fs::write(target.join("base/5/stale"), "x").unwrap();
    fs::write(target.join("pg_wal/000000010000000000000001"), "x").unwrap();
    fs::create_dir_all(target.join("base/99/deep")).unwrap();
    symlink(&outside, target.join("base/99/way")).unwrap();
    // A file, a directory and a link where other things shall be.
    fs::remove_file(target.join(TWO)).unwrap();
    symlink(outside.join("precious"), target.join(TWO)).unwrap();
    fs::remove_file(target.join(ONE)).unwrap();
    fs::create_dir(target.join(ONE)).unwrap();
    fs::remove_file(target.join("log")).unwrap();
    fs::write(target.join("log"), "x").unwrap();
    // A file with a second name elsewhere is not written through.
    fs::remove_file(target.join(THREE)).unwrap();
    fs::hard_link(outside.join("precious"), target.join(THREE)).unwrap();
    // pg_wal elsewhere stays elsewhere.
    fs::rename(target.join("pg_wal"), history.target("wal")).unwrap();
    symlink(history.target("wal"), target.join("pg_wal")).unwrap();
    let restored = history.restore(2, &target, Place::Existing).await.unwrap();
    history.expect(2, &target);
    assert!(restored.removed >= 7, "{restored:?}");
    assert_eq!(fs::read(outside.join("precious")).unwrap(), b"x");
    assert_eq!(fs::read_link(target.join("pg_wal")).unwrap(), history.target("wal"));
    assert!(!target.join("pg_wal/000000010000000000000001").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_idle_directory_of_the_same_system_is_taken() {
    let history = three().await;
    let refused = async |target: &Path| match history.restore(0, target, Place::Existing).await {
        Err(RestoreError::Target(error)) => error,
        other => panic!("{other:?}"),
    };
    let nobody = history.target("nobody");
    fs::create_dir(&nobody).unwrap();
    fs::write(nobody.join("precious"), "x").unwrap();
    assert!(matches!(refused(&nobody).await, TargetError::NobodyKnows { .. }));
    assert!(nobody.join("precious").exists());

    let target = history.target("data");
    history.restore(0, &target, Place::Free).await.unwrap();
    let mut server = std::process::Command::new("sleep").arg("60").current_dir(&target).spawn().unwrap();
    fs::write(target.join("postmaster.pid"), server.id().to_string()).unwrap();
    assert!(matches!(refused(&target).await, TargetError::Running { .. }));
    server.kill().unwrap();
    server.wait().unwrap();
    // The number belongs to a process that stands elsewhere.
    fs::write(target.join("postmaster.pid"), std::process::id().to_string()).unwrap();
    history.restore(0, &target, Place::Existing).await.unwrap();

    let control = target.join(CONTROL);
    let mut foreign = fs::read(&control).unwrap();
    foreign[0] ^= 1;
    fs::write(&control, &foreign).unwrap();
    assert!(matches!(refused(&target).await, TargetError::Io { .. }), "its checksum is wrong");
    let checksum = crc32c::crc32c(&foreign[..288]).to_le_bytes();
    foreign[288..292].copy_from_slice(&checksum);
    fs::write(&control, &foreign).unwrap();
    assert!(matches!(refused(&target).await, TargetError::Foreign { .. }));
    assert!(target.join(ONE).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_restore_is_gone_on_with() {
    let history = three().await;
    let target = history.target("data");
    history.restore(2, &target, Place::Free).await.unwrap();
    // As it is left by one that ended on its way.
    existing::mark(&target, &head(2, &history.made[2].tree[CONTROL])).unwrap();
    fs::remove_file(target.join(CONTROL)).unwrap();
    fs::remove_file(target.join(TWO)).unwrap();
    let refused = history.restore(2, &target, Place::Free).await;
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::Unfinished { .. }))));
    let restored = history.restore(2, &target, Place::Existing).await.unwrap();
    history.expect(2, &target);
    assert_eq!(restored.bytes_kept, restored.bytes - 8192 - 8 * PAGE as u64);
    assert!(!target.join("pgconvoy.restore").exists());
}

/// What becomes of a file behind our back.
#[derive(Debug, Clone)]
enum Harm {
    Gone,
    Pages(Vec<usize>),
    Length(usize),
}

fn harm() -> impl Strategy<Value = Option<Harm>> {
    prop_oneof![
        Just(None),
        Just(Some(Harm::Gone)),
        prop::collection::vec(0usize..12, 1..4).prop_map(|pages| Some(Harm::Pages(pages))),
        (0usize..14 * PAGE).prop_map(|length| Some(Harm::Length(length))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_is_there_becomes_the_backup(
        sizes in prop::collection::vec(0usize..12, 3),
        changes in prop::collection::vec((0usize..3, prop::collection::vec(0usize..12, 0..4), 0usize..12), 0..5),
        harms in prop::collection::vec(harm(), 3),
        (from, to) in (0usize..6, 0usize..6),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let names = [ONE, TWO, THREE];
            let mut history = History::new();
            let mut now = tree(&[(ONE, sizes[0] * PAGE), (TWO, sizes[1] * PAGE), (THREE, sizes[2] * PAGE)]);
            history.back_up(now.clone()).await;
            for (seed, (name, pages, size)) in changes.into_iter().enumerate() {
                let seed = seed as u64 * 1000 + 500;
                let bytes = now.get_mut(names[name]).unwrap();
                let grown = content(seed, 12 * PAGE);
                bytes.truncate(size * PAGE);
                let from = bytes.len();
                bytes.extend_from_slice(&grown[from..(size * PAGE).max(from)]);
                let inside: Vec<usize> = pages.into_iter().filter(|page| *page < size).collect();
                change(&mut now, names[name], seed, &inside);
                history.back_up(now.clone()).await;
            }
            let (from, to) = (from % history.made.len(), to % history.made.len());
            let target = history.target("data");
            history.restore(from, &target, Place::Free).await.unwrap();
            history.expect(from, &target);
            for (name, harm) in names.into_iter().zip(harms) {
                let path = target.join(name);
                match harm {
                    None => {}
                    Some(Harm::Gone) => fs::remove_file(path).unwrap(),
                    Some(Harm::Pages(pages)) => {
                        let mut bytes = fs::read(&path).unwrap();
                        for page in pages.into_iter().filter(|page| (page + 1) * PAGE <= bytes.len()).collect::<Vec<_>>() {
                            bytes[page * PAGE + 17] ^= 1;
                        }
                        fs::write(path, bytes).unwrap();
                    }
                    Some(Harm::Length(length)) => {
                        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length as u64).unwrap();
                    }
                }
            }
            history.restore(to, &target, Place::Existing).await.unwrap();
            history.expect(to, &target);
        });
    }
}
