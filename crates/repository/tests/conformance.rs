//! The suite of stores, run against those that need no server.

use std::sync::Arc;

use repository::config::DirectoryConfig;
use repository::conformance;
use repository::stores::directory::DirectoryStore;
use repository::stores::faulty::FaultyStore;
use repository::stores::memory::MemoryStore;

#[tokio::test(flavor = "multi_thread")]
async fn memory() {
    let store = MemoryStore::new("memory".parse().unwrap());
    assert!(conformance::run(Arc::new(store)).await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn directory() {
    let directory = tempfile::tempdir().unwrap();
    let config = DirectoryConfig { path: directory.path().to_owned(), full_percent: 100 };
    let store: Arc<DirectoryStore> = Arc::new(DirectoryStore::new("directory".parse().unwrap(), config).unwrap());
    assert!(conformance::run(store.clone()).await > 0);
    let report = repository::probe::probe(&*store, jiff::Timestamp::UNIX_EPOCH).await.unwrap();
    assert_eq!(report.objects, 9);
    let leftovers = std::fs::read_dir(directory.path().join(".pgconvoy-tmp")).unwrap().count();
    assert_eq!(leftovers, 0, "no temporary file stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decorator_without_faults_changes_nothing() {
    let memory = MemoryStore::new("memory".parse().unwrap());
    assert!(conformance::run(Arc::new(FaultyStore::new(Arc::new(memory)))).await > 0);
}
