//! What a backup holds in memory does not grow with the number of files. Alone in its process, because peaks are the
//! process's.
//!
//! `PGCONVOY_MEMORY_FILES` asks for another number of files than the ordinary one.
#![allow(clippy::unwrap_used, clippy::result_large_err)]

#[expect(dead_code, reason = "other tests need more of it")]
mod server;

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent::backup::road::Roads;
use agent::backup::{BackupLines, BackupNode, BackupOutcome, BackupRequest, Backups, Progress};
use agent::postgres::StartCheckpoint;
use repository::backup::origin::BackupType;
use repository::name::{BackupId, ClusterName};
use repository::root::{self, System};
use repository::store::ObjectStore;
use repository::stores::directory::DirectoryStore;
use server::{Server, make_directory, scratch, ship};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Relations of one page, and how many times as many the second backup has.
const FILES: u64 = 30_000;
const TIMES: u64 = 4;
/// What the others may cost, in bytes. Each of them, remembered, would take some 500, together 43 MiB; what threads
/// happen to hold at the same time differs by some 10 MiB from run to run.
const GROWTH_MAX: u64 = 28 << 20;
/// What the agent may take, with any number of files.
const PEAK_MAX: u64 = 128 << 20;
/// Number of the first made-up relation.
const FIRST: u64 = 10_000_000;

fn cluster() -> ClusterName {
    "shop".parse().unwrap()
}

fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

/// Pages that were allocated and not written yet, in relations that nobody knows.
fn make_relations(directory: &Path, numbers: std::ops::Range<u64>) {
    for number in numbers {
        File::create(directory.join((FIRST + number).to_string())).unwrap().set_len(8192).unwrap();
    }
}

async fn store(path: &Path, server: &Server) -> Arc<dyn ObjectStore> {
    make_directory(path);
    let config = repository::config::DirectoryConfig { path: path.to_owned(), full_percent: 100 };
    let store = DirectoryStore::new("repo".parse().unwrap(), config).unwrap();
    let now = jiff::Timestamp::UNIX_EPOCH;
    let identity = repository::identity::RepositoryIdentity::new(uuid::Uuid::nil(), now);
    let _ = repository::identity::create(&store, &identity).await.unwrap();
    let known = System::new(server.system().await, None, None, now);
    let writer = "coordinator".parse().unwrap();
    root::commit(&store, &cluster(), &writer, now, |root| root.with_system(known.clone())).await.unwrap();
    Arc::new(store)
}

async fn take(server: &Server, store: &Arc<dyn ObjectStore>, number: u32, backup_type: BackupType) -> BackupOutcome {
    let node = BackupNode {
        server: server.live(),
        cluster: cluster(),
        node: "n1".parse().unwrap(),
        data_directory: server.data.clone(),
        parallel: 2,
        bytes_per_second: 0,
        pace: Arc::default(),
        compression_level: 3,
        scratch: std::env::temp_dir(),
    };
    let request = BackupRequest {
        backup: BackupId::new("2026-11-23T03:41:38Z".parse().unwrap(), number),
        backup_type,
        label: String::new(),
        checkpoint: StartCheckpoint::Fast,
        parallel: 0,
        bytes_per_second: None,
        primary: None,
        wal_wait: Duration::from_secs(30),
    };
    let ((progress, _), (built_on, _)) = (watch::channel(Progress::default()), watch::channel(String::new()));
    let cancel = CancellationToken::new();
    let lines =
        BackupLines { progress: &progress, built_on: &built_on, switch_wal: None, cancel: &cancel, stopping: &cancel };
    let roads = Roads { direct: Some(store.clone()), ..Roads::default() };
    Backups::new(node).take(&request, roads, &lines).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::disallowed_methods, reason = "whoever wants the figure of ten million files says so by a variable")]
async fn memory_does_not_grow_with_the_number_of_files() {
    let all = std::env::var("PGCONVOY_MEMORY_FILES").map_or(FILES * TIMES, |files| files.parse().unwrap());
    let folder = scratch();
    let primary = Server::new(folder.path(), "primary");
    primary.start();
    let store = store(&folder.path().join("repo"), &primary).await;
    let _shipping = ship(&primary.archive.clone(), vec![Arc::clone(&store)], cluster(), primary.system().await);
    let database =
        primary.data.join("base").join(primary.sql("SELECT oid FROM pg_database WHERE datname = 'postgres'"));
    make_relations(&database, 0..FILES);
    // Twice, so that what the first one leaves behind counts for both.
    take(&primary, &store, 1, BackupType::Full).await;
    let first = take(&primary, &store, 2, BackupType::Incr).await;
    let before = peak_bytes();
    make_relations(&database, FILES..all);
    let second = take(&primary, &store, 3, BackupType::Full).await;
    let after_full = peak_bytes();
    let third = take(&primary, &store, 4, BackupType::Incr).await;
    let after = peak_bytes();
    eprintln!(
        "{} files: peak {before}, of a full backup {after_full}, of an increment {after} bytes",
        third.entry.files
    );
    assert_eq!(second.entry.files - first.entry.files, all - FILES);
    assert_eq!((third.entry.files, third.entry.parent), (second.entry.files, Some(second.entry.backup)));
    assert!(after <= PEAK_MAX, "{after} bytes");
    if all == FILES * TIMES {
        assert!(after - before < GROWTH_MAX, "{} bytes more for {} files more", after - before, all - FILES);
    }
}
