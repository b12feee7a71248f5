//! What a released version wrote stays readable: by this version, and by the independent reader.
//!
//! ```text
//! tests/released/VERSION/store      a directory store as that version left it: identity, roots, WAL with what it changed,
//!                                   a full backup and an increment
//! tests/released/VERSION/expected   a line a file: SHA-256 of the content, then BACKUP/PATH or wal/NAME
//! tests/released/VERSION/note       a note of a backup that did not come to its end
//! ```
//!
//! Samples are never changed. `PGCONVOY_BLESS=1 cargo test -p repository --test reader` writes that of this version where
//! there is none yet, which is done once, when it is released.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use repository::backup::note::{Attempt, Note, NotedFile, NotedPack};
use repository::backup::pack::Extent;
use repository::store::ObjectStore;
use repository::wal::{Fetched, Located};
use sha2::{Digest, Sha256};

use super::*;

const PARTIAL: &str = "000000010000000000000002.partial";
const HISTORY: &str = "00000002.history";
/// Blocks that the segment's map lists.
const BLOCKS: u64 = 300;

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/released")
}

fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Files below a directory, relative to it, with their digests.
fn digests(top: &Path, prefix: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut directories = vec![top.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let (entry, kind) = entry.map(|entry| (entry.path(), entry.file_type().unwrap())).unwrap();
            if kind.is_dir() {
                directories.push(entry);
            } else if kind.is_file() {
                let path = entry.strip_prefix(top).unwrap().as_os_str().as_bytes().escape_ascii();
                found.insert(format!("{prefix}/{path}"), sha256(&fs::read(&entry).unwrap()));
            }
        }
    }
    found
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, to) = entry.map(|entry| (entry.path(), to.join(entry.file_name()))).unwrap();
        if entry.is_dir() {
            copy(&entry, &to);
        } else {
            fs::copy(&entry, &to).unwrap();
        }
    }
}

fn open(path: &Path) -> DirectoryStore {
    let config = DirectoryConfig { path: path.to_owned(), full_percent: 100 };
    DirectoryStore::new("repo1".parse().unwrap(), config).unwrap()
}

/// Content of a WAL file, most of it room.
fn wal_file() -> Vec<u8> {
    let mut file = content(5, 30_000);
    file.resize(1 << 20, 0);
    file
}

async fn write(sample: &Path) {
    let repository = Repository::create().await;
    let (file, history) = (wal_file(), b"1\t0/3000000\tno recovery target specified\n");
    repository.archive(SEGMENT, &file, None).await;
    repository.archive(PARTIAL, &file, Some(START + 5000)).await;
    repository.archive(HISTORY, history, None).await;
    let full = publish(&repository).await;
    let increment = publish_increment(&repository, &full).await;
    let mut expected = String::new();
    for (name, content) in [(SEGMENT, &file[..]), (PARTIAL, &file), (HISTORY, history)] {
        expected.push_str(&format!("{} wal/{name}\n", sha256(content)));
    }
    for (backup, files) in [(BACKUP, full), (INCREMENT, increment)] {
        for (path, content) in files {
            expected.push_str(&format!("{} {backup}/{}\n", sha256(&content), path.escape_ascii()));
        }
    }
    copy(repository.path(), &sample.join("store"));
    fs::write(sample.join("expected"), expected).unwrap();
}

fn note() -> Note {
    let attempt = Attempt {
        backup: BACKUP.parse().unwrap(),
        backup_type: BackupType::Incr,
        cluster: cluster(),
        node: "db1".parse().unwrap(),
        from_standby: true,
        system_identifier: SYSTEM,
        postgres_major: 15,
        control_version: 1300,
        catalog_version: 202_209_061,
        segment_size_bytes: 16 << 20,
        block_size: 8192,
        relation_segment_blocks: 131_072,
        checksum_version: 1,
        start_timeline: Timeline::FIRST,
        start_lsn: Lsn::new(0x200_0028),
        start_time: "2026-11-23T01:02:03Z".parse().unwrap(),
    };
    let extent = |pages| Extent { pack: 4, offset: 8, length: 900, from: 8192, to: 3 * 8192, pages };
    let file = |path: &str, number: u32, pages: Option<u32>| NotedFile {
        path: RelativePath::new(path).unwrap(),
        number: FileNumber(number),
        extents: vec![extent(pages)],
    };
    let files = vec![file("base/5/16384", 3, None), file("base/5/16385.1", 9, Some(1))];
    let pack = NotedPack { number: 4, size: 1 << 20, sha256: [7; 32], newest_lsn: Some(Lsn::new(0x200_0100)), files };
    Note::new(attempt, vec![pack])
}

fn expected(sample: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(sample.join("expected")).unwrap();
    let lines = text.lines().map(|line| line.split_once(' ').unwrap());
    lines.map(|(digest, name)| (name.to_owned(), digest.to_owned())).collect()
}

#[tokio::test]
async fn what_was_released_is_read() {
    let own = samples().join(env!("CARGO_PKG_VERSION"));
    let asked = std::env::var_os("PGCONVOY_BLESS").is_some();
    if asked && !own.exists() {
        write(&own).await;
    }
    if asked && !own.join("note").exists() {
        fs::write(own.join("note"), note().to_bytes()).unwrap();
    }
    let mut read_samples = 0;
    for entry in fs::read_dir(samples()).unwrap() {
        let sample = entry.unwrap().path();
        let place = tempfile::tempdir().unwrap();
        copy(&sample.join("store"), place.path());
        let expected = expected(&sample);
        let repository = Repository { store: open(place.path()), place };
        by_us(&repository, &expected).await;
        by_the_reader(&repository, &expected);
        // A backup that the version before left unfinished is gone on from.
        assert_eq!(Note::from_bytes(&fs::read(sample.join("note")).unwrap()).unwrap(), note());
        read_samples += 1;
    }
    assert!(read_samples > 0, "there is no sample");
}

async fn by_us(repository: &Repository, expected: &BTreeMap<String, String>) {
    let store = &repository.store;
    assert!(identity::read(store).await.unwrap().is_some());
    let root = root::newest(store, &cluster()).await.unwrap().unwrap();
    let backups: Vec<String> = root.backups.iter().map(|entry| entry.backup.to_string()).collect();
    assert_eq!(backups, [BACKUP, INCREMENT]);
    assert_eq!(root.backups[1].parent, Some(root.backups[0].backup));
    for entry in &root.backups {
        let depth = backup::VerifyDepth::Content;
        let report = backup::verify(store, &cluster(), entry, depth, &std::env::temp_dir()).await.unwrap();
        let prefix = format!("{}/", entry.backup);
        assert_eq!(report.files, expected.keys().filter(|name| name.starts_with(&prefix)).count() as u64);
    }
    let out = tempfile::tempdir().unwrap();
    let stores = [Arc::new(open(repository.path())) as Arc<dyn ObjectStore>];
    for name in [SEGMENT, PARTIAL, HISTORY] {
        let target = out.path().join(name);
        let fetched = wal::fetch(&stores, &cluster(), SYSTEM, &name.parse().unwrap(), &target).await;
        assert!(matches!(fetched, Fetched::Written { .. }), "{name}: {fetched:?}");
        assert_eq!(sha256(&fs::read(target).unwrap()), expected[&format!("wal/{name}")], "{name}");
    }
    let located = wal::locate(store, &cluster(), SYSTEM, &SEGMENT.parse().unwrap()).await.unwrap();
    let Located::Object { key, size, .. } = located else { panic!("{located:?}") };
    let changes = wal::read_changes(store, &key, size).await.unwrap().unwrap();
    assert_eq!((changes.map.block_count(), changes.doubt), (BLOCKS, None));
}

fn by_the_reader(repository: &Repository, expected: &BTreeMap<String, String>) {
    assert_eq!(repository.read_well(&["verify"]), "verified 3 WAL objects and 2 backups\n");
    let out = tempfile::tempdir().unwrap();
    let mut found = BTreeMap::new();
    fs::create_dir(out.path().join("wal")).unwrap();
    for name in [SEGMENT, PARTIAL, HISTORY] {
        let target = out.path().join("wal").join(name);
        repository.read_well(&["wal", "main", &SYSTEM.to_string(), name, text(&target)]);
    }
    found.extend(digests(&out.path().join("wal"), "wal"));
    for backup in [BACKUP, INCREMENT] {
        let target = out.path().join(backup);
        repository.read_well(&["backup", "main", backup, text(&target)]);
        found.extend(digests(&target, backup));
    }
    for (name, digest) in expected {
        assert_eq!(found.get(name), Some(digest), "{name}");
    }
}
