//! What a directory does beyond the suite that every store passes: unmounted, foreign, nearly full, leftovers, damage.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::identity::{self, RepositoryIdentity};
use crate::key;
use crate::store::{self, collect};

fn store_at(path: &Path, full_percent: u8) -> DirectoryStore {
    DirectoryStore::new("repo1".parse().unwrap(), DirectoryConfig { path: path.to_owned(), full_percent }).unwrap()
}

fn identity() -> RepositoryIdentity {
    RepositoryIdentity::new(uuid::Uuid::from_u128(1), jiff::Timestamp::UNIX_EPOCH)
}

async fn repository() -> (TempDir, DirectoryStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = store_at(directory.path(), 100);
    assert_eq!(identity::create(&store, &identity()).await.unwrap(), Put::Created);
    (directory, store)
}

fn key(text: &str) -> ObjectKey {
    ObjectKey::parse(text).unwrap()
}

fn body(text: &'static str) -> Body {
    Bytes::from_static(text.as_bytes()).into()
}

/// Asks everything that needs a repository, and says what came.
async fn refusals(store: &DirectoryStore) -> Vec<Option<StoreError>> {
    vec![
        store.put_new(&key("c/main/object"), body("x")).await.err(),
        store.get(&key("c/main/object"), ByteRange::All).await.err(),
        store.head(&key("c/main/object")).await.err(),
        store.list("", None, 1).await.err(),
        store.room().await.err(),
    ]
}

#[tokio::test]
async fn a_mount_that_is_away_is_refused_and_nothing_is_made_in_its_place() {
    let (directory, store) = repository().await;
    assert_eq!(store.put_new(&key("c/main/object"), body("x")).await.unwrap(), Put::Created);
    let top = directory.path().join("top");
    let elsewhere = directory.path().join("elsewhere");
    let mounted = store_at(&top, 100);
    let check = async || {
        for error in refusals(&mounted).await {
            assert!(matches!(&error, Some(StoreError::Refused { .. })), "{error:?}");
        }
    };
    check().await;
    assert!(!top.exists(), "a missing directory is not made");
    std::fs::create_dir(&top).unwrap();
    check().await;
    assert_eq!(std::fs::read_dir(&top).unwrap().count(), 0, "an empty one stays empty");
    assert_eq!(identity::create(&mounted, &identity()).await.unwrap(), Put::Created);
    assert_eq!(mounted.put_new(&key("c/main/object"), body("x")).await.unwrap(), Put::Created);
    std::fs::rename(&top, &elsewhere).unwrap();
    check().await;
    std::fs::rename(&elsewhere, &top).unwrap();
    assert_eq!(mounted.put_new(&key("c/main/object"), body("x")).await.unwrap(), Put::Exists);
}

#[tokio::test]
async fn another_repository_in_its_place_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (top, ours, theirs) = (folder.path().join("top"), folder.path().join("ours"), folder.path().join("theirs"));
    for directory in [&top, &theirs] {
        std::fs::create_dir(directory).unwrap();
    }
    let other = RepositoryIdentity { repository: uuid::Uuid::from_u128(2), ..identity() };
    assert_eq!(identity::create(&store_at(&theirs, 100), &other).await.unwrap(), Put::Created);
    assert_eq!(identity::create(&store_at(&top, 100), &identity()).await.unwrap(), Put::Created);
    let swap = |from: &Path, to: &Path| std::fs::rename(from, to).unwrap();
    // One has worked with the directory, the other has only asked whose it is.
    let (worked, asked) = (store_at(&top, 100), store_at(&top, 100));
    assert_eq!(worked.put_new(&key("c/main/object"), body("x")).await.unwrap(), Put::Created);
    identity::expect(&asked, identity().repository).await.unwrap();
    swap(&top, &ours);
    swap(&theirs, &top);
    for store in [&worked, &asked] {
        for error in refusals(store).await {
            assert!(matches!(&error, Some(StoreError::Refused { .. })), "{error:?}");
        }
        let found = identity::read(store).await.unwrap().unwrap();
        assert_eq!(found, other, "whose it is can still be asked");
    }
    assert_eq!(std::fs::read_dir(&top).unwrap().filter(|entry| !hidden(entry)).count(), 1, "nothing was put");
    swap(&top, &theirs);
    swap(&ours, &top);
    assert_eq!(worked.put_new(&key("c/main/object"), body("x")).await.unwrap(), Put::Exists);
    // The same repository on another disk.
    let copy = folder.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    assert_eq!(identity::create(&store_at(&copy, 100), &identity()).await.unwrap(), Put::Created);
    swap(&top, &ours);
    swap(&copy, &top);
    assert_eq!(worked.head(&key("c/main/object")).await.unwrap(), None);
}

/// What is met first may be the wrong one; who knows which one is meant says so.
#[tokio::test]
async fn the_expected_repository_is_worked_on_whichever_was_met_first() {
    let folder = tempfile::tempdir().unwrap();
    let (top, wrong, right) = (folder.path().join("top"), folder.path().join("wrong"), folder.path().join("right"));
    let other = RepositoryIdentity { repository: uuid::Uuid::from_u128(2), ..identity() };
    for (directory, identity) in [(&top, &other), (&right, &identity())] {
        std::fs::create_dir(directory).unwrap();
        assert_eq!(identity::create(&store_at(directory, 100), identity).await.unwrap(), Put::Created);
    }
    let store = store_at(&top, 100);
    assert_eq!(identity::read(&store).await.unwrap().unwrap(), other);
    store.expect_repository(identity().repository);
    for error in refusals(&store).await {
        assert!(matches!(&error, Some(StoreError::Refused { .. })), "{error:?}");
    }
    std::fs::rename(&top, &wrong).unwrap();
    std::fs::rename(&right, &top).unwrap();
    assert_eq!(store.put_new(&key("c/main/object"), body("x")).await.unwrap(), Put::Created);
    store.expect_repository(identity().repository);
    assert_eq!(store.head(&key("c/main/object")).await.unwrap(), Some(1));
}

fn hidden(entry: &std::io::Result<std::fs::DirEntry>) -> bool {
    entry.as_ref().unwrap().file_name().as_encoded_bytes().starts_with(b".")
}

#[tokio::test]
async fn only_an_empty_directory_becomes_a_repository() {
    let directory = tempfile::tempdir().unwrap();
    let store = store_at(directory.path(), 100);
    assert_eq!(identity::read(&store).await.unwrap(), None, "an empty directory is there and has no identity");
    std::fs::create_dir(directory.path().join("lost+found")).unwrap();
    std::fs::write(directory.path().join("letter.txt"), "dear").unwrap();
    let error = identity::create(&store, &identity()).await.unwrap_err();
    assert!(matches!(error, identity::IdentityError::Store(StoreError::Refused { .. })), "{error:?}");
    std::fs::remove_file(directory.path().join("letter.txt")).unwrap();
    assert_eq!(identity::create(&store, &identity()).await.unwrap(), Put::Created);
}

#[tokio::test]
async fn a_nearly_full_store_takes_nothing_new_and_still_answers() {
    let (directory, store) = repository().await;
    assert_eq!(store.put_new(&key("c/main/object"), body("x")).await.unwrap(), Put::Created);
    let used = store.room().await.unwrap().unwrap().used_percent().max(1);
    let full = store_at(directory.path(), used);
    assert!(matches!(full.put_new(&key("c/main/other"), body("x")).await, Err(StoreError::Full { .. })));
    assert_eq!(full.put_new(&key("c/main/object"), body("x")).await.unwrap(), Put::Exists);
    assert_eq!(full.head(&key("c/main/object")).await.unwrap(), Some(1));
    let huge = Body::File { path: "/nonexistent".into(), len: u64::MAX };
    assert!(matches!(store.put_new(&key("c/main/huge"), huge).await, Err(StoreError::Full { .. })));
}

#[tokio::test]
async fn leftovers_are_swept_when_they_are_old_and_ours() {
    let (directory, _) = repository().await;
    let temporary = directory.path().join(".pgconvoy-tmp");
    let leftover = format!("put-{}.tmp", "0".repeat(32));
    let young = format!("put-{}.tmp", "1".repeat(32));
    for name in [leftover.as_str(), young.as_str(), "put-1.tmp", "note.txt"] {
        let file = std::fs::File::create(temporary.join(name)).unwrap();
        if name != young {
            file.set_modified(std::time::UNIX_EPOCH).unwrap();
        }
    }
    let store = store_at(directory.path(), 100);
    assert_eq!(store.put_new(&key("c/main/object"), body("x")).await.unwrap(), Put::Created);
    let mut names: Vec<String> =
        std::fs::read_dir(&temporary).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["note.txt", "put-1.tmp", young.as_str()]);
}

#[tokio::test]
async fn foreign_files_are_not_listed() {
    let (directory, store) = repository().await;
    assert_eq!(store.put_new(&key("c/main/object"), body("x")).await.unwrap(), Put::Created);
    for foreign in ["c/main/.hidden", "c/main/with space", "c/main/object~"] {
        std::fs::write(directory.path().join(foreign), "x").unwrap();
    }
    std::os::unix::fs::symlink("object", directory.path().join("c/main/link")).unwrap();
    std::fs::create_dir(directory.path().join("c/main/empty")).unwrap();
    let listed = store::list_all(&store, "", 10).await.unwrap();
    let keys: Vec<&str> = listed.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["c/main/object", "repo.json"]);
    assert!(store.head(&key("c/main/link")).await.unwrap().is_none());
    assert!(store.head(&key("c/main/empty")).await.unwrap().is_none());
    assert!(store.head(&key("c/main/object/below")).await.unwrap().is_none());
}

#[tokio::test]
async fn objects_are_read_only_files_and_a_directory_may_disappear_while_empty() {
    let (directory, store) = repository().await;
    assert_eq!(store.put_new(&key("c/main/a/object"), body("x")).await.unwrap(), Put::Created);
    let path = directory.path().join("c/main/a/object");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o440);
    std::fs::remove_dir_all(directory.path().join("c")).unwrap();
    assert_eq!(store.put_new(&key("c/main/a/object"), body("y")).await.unwrap(), Put::Created);
    let read = collect(store.get(&key("c/main/a/object"), ByteRange::All).await.unwrap(), 9).await.unwrap();
    assert_eq!(read, "y");
}

#[tokio::test]
async fn a_truncated_file_is_damage_and_not_a_short_object() {
    let (directory, store) = repository().await;
    let content = Bytes::from(vec![7; 3 * PIECE_LIMIT_BYTES]);
    assert_eq!(store.put_new(&key("c/main/object"), content.into()).await.unwrap(), Put::Created);
    let stream = store.get(&key("c/main/object"), ByteRange::All).await.unwrap();
    let path = directory.path().join("c/main/object");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(10).unwrap();
    assert!(matches!(collect(stream, u64::MAX).await, Err(StoreError::Damaged { .. })));
}

#[tokio::test]
async fn the_identity_is_part_of_every_listing() {
    let (_directory, store) = repository().await;
    let page = store.list("repo", None, 10).await.unwrap();
    assert_eq!(page.objects.len(), 1);
    assert_eq!(page.objects[0].key, key::repository_identity());
}
