//! Backups of a real server and their restores.
#![allow(clippy::unwrap_used, clippy::result_large_err)]

mod server;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent::backup::road::Roads;
use agent::backup::{BackupError, BackupLines, BackupNode, BackupOutcome, BackupRequest, Backups, Progress};
use agent::postgres::{Role, Server as _, StartCheckpoint};
use agent::restore::{
    LinkChoice, Place, RestoreError, RestoreOptions, RestoreProgress, RestoreSource, Restored, restore,
};
use postgres_format::{FullTransactionId, Lsn, SystemIdentifier};
use repository::backup::origin::BackupType;
use repository::name::{BackupId, ClusterName};
use repository::restore_plan::{ArchiveMode, Recovery, Request, Target, TargetTimeline};
use repository::root::{self, System};
use repository::store::ObjectStore;
use repository::stores::directory::DirectoryStore;
use server::{Server, make_directory, scratch, ship};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

fn cluster() -> ClusterName {
    "shop".parse().unwrap()
}

/// A directory store that knows the cluster.
async fn store(folder: &Path, name: &str, system: SystemIdentifier) -> Arc<dyn ObjectStore> {
    let path = folder.join(name);
    make_directory(&path);
    let config = repository::config::DirectoryConfig { path, full_percent: 100 };
    let store = DirectoryStore::new(name.parse().unwrap(), config).unwrap();
    let now = jiff::Timestamp::UNIX_EPOCH;
    let identity = repository::identity::RepositoryIdentity::new(uuid::Uuid::nil(), now);
    let _ = repository::identity::create(&store, &identity).await.unwrap();
    let known = System::new(system, None, None, now);
    let writer = "coordinator".parse().unwrap();
    root::commit(&store, &cluster(), &writer, now, |root| root.with_system(known.clone())).await.unwrap();
    Arc::new(store)
}

async fn take(
    server: &Server,
    store: &Arc<dyn ObjectStore>,
    number: u32,
    switch_wal: Option<&mpsc::Sender<Lsn>>,
) -> Result<BackupOutcome, BackupError> {
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
        backup_type: BackupType::Full,
        label: "a test".to_owned(),
        checkpoint: StartCheckpoint::Fast,
        parallel: 0,
        bytes_per_second: None,
        primary: None,
        wal_wait: Duration::from_secs(30),
    };
    let ((progress, _), (built_on, _)) = (watch::channel(Progress::default()), watch::channel(String::new()));
    let cancel = CancellationToken::new();
    let lines =
        BackupLines { progress: &progress, built_on: &built_on, switch_wal, cancel: &cancel, stopping: &cancel };
    let roads = Roads { direct: Some(store.clone()), ..Roads::default() };
    Backups::new(node).take(&request, roads, &lines).await
}

/// Where a restored server stops.
enum Stop {
    End,
    Immediate,
    Named(&'static str),
}

async fn restore_to(
    target: &Path,
    outcome: &BackupOutcome,
    stores: &[Arc<dyn ObjectStore>],
    archive: &Path,
    stop_at: Stop,
    map: &[(&str, PathBuf)],
) -> Result<Restored, RestoreError> {
    let source = RestoreSource { cluster: cluster(), backup: outcome.entry.clone(), stores: stores.to_vec() };
    let (wanted, timeline) = match stop_at {
        Stop::End => (Target::Latest, TargetTimeline::Latest),
        Stop::Immediate => (Target::Immediate, TargetTimeline::Current),
        Stop::Named(name) => (Target::Name(name.parse().unwrap()), TargetTimeline::Latest),
    };
    let request = Request { target: wanted, ..Request::latest(format!("cp {}/%f \"%p\"", archive.display())) };
    let options = RestoreOptions {
        target: target.to_owned(),
        place: Place::Free,
        databases: Vec::new(),
        tablespace_map: map.iter().map(|(from, to)| ((*from).to_owned(), to.clone())).collect(),
        links: LinkChoice::default(),
        recovery: Recovery::of(&request, timeline, ArchiveMode::Off),
        owner: None,
        parallel: 0,
        bytes_per_second: 0,
        scratch: std::env::temp_dir(),
    };
    let (progress, _) = watch::channel(RestoreProgress::default());
    restore(&source, &options, &progress, &CancellationToken::new()).await
}

fn assert_verified(data: &Path) {
    let output = server::run("pg_verifybackup", &["-n", data.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Under load: transactions began while the backup ran, and none of those it says were to come had ended by then.
fn assert_transactions_known(outcome: &BackupOutcome, primary: &Server) {
    assert_eq!(outcome.entry.last_commit_time.is_some(), outcome.entry.from_standby);
    let (start, stop) = (outcome.entry.start_next_xid.unwrap(), outcome.entry.stop_next_xid.unwrap());
    let now: FullTransactionId = primary.sql("SELECT txid_current()").parse().unwrap();
    assert!(start.is_normal() && start < stop && stop <= now, "{start} {stop} {now}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_transaction_of_a_backup_is_behind_one_that_waits_for_a_standby() {
    let folder = scratch();
    let primary = Server::new(folder.path(), "primary");
    primary.start();
    primary.sql("CREATE TABLE waiting (xid bigint)");
    primary.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
    primary.sql("SELECT pg_reload_conf()");
    let mut waiting = primary.begin_sql("INSERT INTO waiting SELECT txid_current()");
    wait_until(&primary, "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'").await;
    let waiting_xid = primary.sql("SELECT backend_xid FROM pg_stat_activity WHERE wait_event = 'SyncRep'");
    let waiting_xid: FullTransactionId = waiting_xid.parse().unwrap();

    let live = primary.live();
    live.start_backup("a test", StartCheckpoint::Fast).await.unwrap();
    let stop = live.stop_backup().await.unwrap();
    assert!(stop.next_xid.unwrap() > waiting_xid, "{stop:?} {waiting_xid}");
    primary.sql("ALTER SYSTEM RESET synchronous_standby_names");
    primary.sql("SELECT pg_reload_conf()");
    assert!(waiting.wait().unwrap().success());
}

const SUMS: &str = "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT count(*) FROM pgbench_history), (SELECT sum(v) FROM spaced)";

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_is_restored_to_a_named_point() {
    let folder = scratch();
    let primary = Server::new(folder.path(), "primary");
    primary.start();
    let place = folder.path().join("space");
    make_directory(&place);
    primary.sql(&format!("CREATE TABLESPACE far LOCATION '{}'", place.display()));
    primary.sql("CREATE TABLE spaced TABLESPACE far AS SELECT generate_series(1, 20000) AS v");
    primary.sql("CREATE UNLOGGED TABLE passing AS SELECT 1 AS v");
    assert!(primary.pgbench(&["-i", "-s", "8", "-q"]).wait().unwrap().success());
    let outside = folder.path().join("pg_ident.conf");
    fs::copy(primary.data.join("pg_ident.conf"), &outside).unwrap();
    server::own(&outside);
    fs::remove_file(primary.data.join("pg_ident.conf")).unwrap();
    std::os::unix::fs::symlink(&outside, primary.data.join("pg_ident.conf")).unwrap();
    let mut load = primary.pgbench(&["-c", "2", "-T", "60"]);
    let churn = churn(&primary);

    let store = store(folder.path(), "repo1", primary.system().await).await;
    let _shipping = ship(&primary.archive, vec![store.clone()], cluster(), primary.system().await);
    let outcome = take(&primary, &store, 1, None).await.unwrap();
    churn.abort();
    assert_eq!(outcome.entry.page_errors, 0);
    assert!(outcome.warnings.is_empty(), "{:?}", outcome.warnings);
    assert_eq!(outcome.stores, ["repo1"]);
    assert_transactions_known(&outcome, &primary);
    load.kill().unwrap();
    load.wait().unwrap();
    primary.sql("SELECT pg_create_restore_point('here')");
    let sums = primary.sql(SUMS);
    primary.sql("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid < 100");
    let switched = primary.live().switch_wal().await.unwrap();
    wait_for(&primary.archive.join(switched.segment.to_string())).await;

    let clone = Server::place(folder.path(), "clone");
    let map = [("far", folder.path().join("space2"))];
    let by_name =
        restore_to(&clone.data, &outcome, std::slice::from_ref(&store), &primary.archive, Stop::Named("here"), &map)
            .await;
    assert!(matches!(by_name, Err(RestoreError::Target(_))), "tablespaces are mapped by place or number");
    let map = [(place.to_str().unwrap(), folder.path().join("space2"))];
    let restored =
        restore_to(&clone.data, &outcome, std::slice::from_ref(&store), &primary.archive, Stop::Named("here"), &map)
            .await
            .unwrap();
    assert!(restored.warnings.is_empty(), "{:?}", restored.warnings);
    assert_eq!(restored.files, outcome.entry.files);
    let captured = clone.data.join("pgconvoy_configuration").join(outside.strip_prefix("/").unwrap());
    assert_eq!(fs::read(captured).unwrap(), fs::read(&outside).unwrap());
    assert_verified(&clone.data);
    clone.configure("");
    clone.start();
    wait_until_promoted(&clone).await;
    assert_eq!(clone.sql(SUMS), sums);
    assert_eq!(clone.sql("SHOW archive_mode"), "off");
    assert_eq!(clone.sql("SELECT count(*) FROM passing"), "0");
    assert_eq!(clone.sql("SELECT count(*) FROM pg_tablespace WHERE pg_tablespace_location(oid) LIKE '%/space2'"), "1");

    let again = restore_to(&clone.data, &outcome, &[store], &primary.archive, Stop::End, &map).await;
    assert!(matches!(again, Err(RestoreError::Target(_))), "{again:?}");
}

/// Makes files come and go.
fn churn(server: &Server) -> tokio::task::JoinHandle<()> {
    let live = server.live();
    let socket = server.data.parent().unwrap().to_owned();
    let port: u16 =
        fs::read_to_string(server.data.join("postmaster.pid")).unwrap().lines().nth(3).unwrap().parse().unwrap();
    drop(live);
    tokio::spawn(async move {
        let mut config = tokio_postgres::Config::new();
        config.host_path(socket).port(port).user("postgres").dbname("postgres");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        let moving = tokio::spawn(connection);
        loop {
            let statement = "DROP TABLE IF EXISTS coming; CREATE TABLE coming AS SELECT generate_series(1, 2000) AS v";
            if client.batch_execute(statement).await.is_err() {
                break;
            }
        }
        moving.abort();
    })
}

async fn wait_for(path: &Path) {
    let found = async {
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), found)
        .await
        .unwrap_or_else(|_| panic!("{} did not come", path.display()));
}

async fn wait_until(server: &Server, question: &str) {
    let yes = async {
        while server.sql(question) != "t" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), yes).await.expect("the server says yes in the end");
}

async fn wait_until_promoted(server: &Server) {
    wait_until(server, "SELECT NOT pg_is_in_recovery()").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_pages_are_recorded_and_damaged_packs_are_read_elsewhere() {
    let folder = scratch();
    let primary = Server::new(folder.path(), "primary");
    primary.start();
    primary.sql("CREATE TABLE t AS SELECT v, md5(v::text) AS m FROM generate_series(1, 200000) AS v");
    primary.sql("CREATE TABLE damaged AS SELECT generate_series(1, 10000) AS v");
    let file = primary.sql("CHECKPOINT; SELECT pg_relation_filepath('damaged')");
    let path = primary.data.join(file.lines().last().unwrap());
    fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"rot", 3 * 8192 + 5000).unwrap();
    let system = primary.system().await;
    let near = store(folder.path(), "near", system).await;
    let shipping = ship(&primary.archive, vec![near.clone()], cluster(), system);
    let outcome = take(&primary, &near, 2, None).await.unwrap();
    drop(shipping);
    assert_eq!(outcome.entry.page_errors, 1);
    assert_eq!(outcome.warnings.len(), 1);
    assert!(outcome.warnings[0].ends_with("1 corrupt pages, the first is block 3"), "{:?}", outcome.warnings);

    let far_path = folder.path().join("far");
    let copied =
        std::process::Command::new("cp").arg("-r").arg(folder.path().join("near")).arg(&far_path).status().unwrap();
    assert!(copied.success());
    let config = repository::config::DirectoryConfig { path: far_path, full_percent: 100 };
    let far: Arc<dyn ObjectStore> = Arc::new(DirectoryStore::new("far".parse().unwrap(), config).unwrap());
    let pack = folder.path().join("near").join(repository::key::pack(&cluster(), &outcome.entry.backup, 0).as_str());
    let pack = fs::OpenOptions::new().read(true).write(true).open(&pack).unwrap();
    let mut byte = [0];
    pack.read_exact_at(&mut byte, 70_000).unwrap();
    pack.write_all_at(&[byte[0] ^ 1], 70_000).unwrap();

    let alone = Server::place(folder.path(), "alone");
    let refused =
        restore_to(&alone.data, &outcome, std::slice::from_ref(&near), &primary.archive, Stop::Immediate, &[]).await;
    assert!(matches!(refused, Err(RestoreError::Pack { .. })), "{refused:?}");
    assert!(!alone.data.join("global/pg_control").exists());

    let clone = Server::place(folder.path(), "clone");
    let restored =
        restore_to(&clone.data, &outcome, &[near, far], &primary.archive, Stop::Immediate, &[]).await.unwrap();
    assert_eq!(restored.warnings.len(), 2, "{:?}", restored.warnings);
    assert_verified(&clone.data);
    clone.configure("");
    clone.start();
    wait_until_promoted(&clone).await;
    assert_eq!(clone.sql("SELECT count(*), max(m) FROM t"), primary.sql("SELECT count(*), max(m) FROM t"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_backed_up_by_itself() {
    let folder = scratch();
    let primary = Server::new(folder.path(), "primary");
    primary.start();
    assert!(primary.pgbench(&["-i", "-s", "3", "-q"]).wait().unwrap().success());
    primary.sql("CREATE TABLE spaced AS SELECT 1 AS v");
    let standby = primary.standby(folder.path(), "standby");
    standby.start();
    let mut load = primary.pgbench(&["-c", "2", "-T", "60"]);
    let system = primary.system().await;
    let store = store(folder.path(), "repo1", system).await;
    let _shipping = ship(&primary.archive, vec![store.clone()], cluster(), system);
    let (wish, mut wishes) = mpsc::channel(1);
    let switcher = primary.live();
    // Where the load fills segments fast enough nothing is wished for.
    let switching = tokio::spawn(async move {
        let wished: Lsn = wishes.recv().await?;
        Some((wished, switcher.switch_wal().await.unwrap()))
    });
    let outcome = take(&standby, &store, 3, Some(&wish)).await.unwrap();
    drop(wish);
    if let Some((wished, switched)) = switching.await.unwrap() {
        assert!(switched.lsn > wished);
    }
    assert!(outcome.entry.from_standby);
    assert_eq!(outcome.entry.min_recovery_point, Some(outcome.entry.stop_lsn));
    let replayed = outcome.entry.last_commit_time.unwrap();
    assert!(outcome.entry.start_time < replayed, "under load something was committed while it ran: {replayed}");
    assert_transactions_known(&outcome, &primary);
    load.kill().unwrap();
    load.wait().unwrap();
    primary.sql("SELECT pg_create_restore_point('here')");
    let sums = primary.sql(SUMS);
    let switched = primary.live().switch_wal().await.unwrap();
    wait_for(&primary.archive.join(switched.segment.to_string())).await;
    let clone = Server::place(folder.path(), "clone");
    restore_to(&clone.data, &outcome, &[store], &primary.archive, Stop::Named("here"), &[]).await.unwrap();
    assert_verified(&clone.data);
    clone.configure("");
    clone.start();
    wait_until_promoted(&clone).await;
    assert_eq!(clone.sql(SUMS), sums);

    let live = standby.live();
    live.start_backup("promoted meanwhile", StartCheckpoint::Fast).await.unwrap();
    assert_eq!(standby.sql("SELECT pg_promote()"), "t");
    assert_eq!(live.check_backup().await.unwrap().role, Role::Primary);
    assert!(live.stop_backup().await.is_err(), "promotion aborts a standby's backup");
    assert_eq!(live.position().await.unwrap().timeline.get(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_session_fails_the_backup_and_one_without_its_wal_is_in_no_root() {
    let folder = scratch();
    let primary = Server::new(folder.path(), "primary");
    primary.start();
    let live = primary.live();
    let start = live.start_backup("x", StartCheckpoint::Fast).await.unwrap();
    assert!(start.start_lsn > Lsn::ZERO);
    live.check_backup().await.unwrap();
    assert!(live.start_backup("y", StartCheckpoint::Fast).await.is_err(), "one at a time");
    primary.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgconvoy-agent' AND query LIKE '%pg_is_in_recovery%' AND pid <> pg_backend_pid()");
    assert!(live.check_backup().await.is_err());
    assert!(live.stop_backup().await.is_err());
    live.abandon_backup();
    live.start_backup("z", StartCheckpoint::Fast).await.unwrap();
    let stop = live.stop_backup().await.unwrap();
    assert!(stop.backup_label.starts_with(b"START WAL LOCATION: "));
    assert!(live.stop_backup().await.is_err(), "it was stopped");

    let settings = live.archive_settings().await.unwrap();
    assert_eq!(settings.archive_mode, "on");
    assert!(settings.configuration_files.iter().any(|file| file.setting == "hba_file"));
    assert!(live.archiver_state().await.unwrap().archived_count > 0);
    let nobody = store(folder.path(), "empty", SystemIdentifier::new(7)).await;
    let kept = tokio::time::timeout(Duration::from_secs(60), take(&primary, &nobody, 4, None)).await.unwrap().unwrap();
    assert!(kept.waiting_for.is_some() && kept.stores.is_empty(), "{kept:?}");
    let root = root::newest(nobody.as_ref(), &cluster()).await.unwrap().unwrap();
    assert!(root.backups.is_empty(), "nothing was published");
}
