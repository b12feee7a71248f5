//! Tests of commits by a writer who remembers what was there: a store that is set back is noticed, and numbers are used once.

use std::sync::Arc;

use tokio::sync::Notify;

use super::*;

/// What the store held when its newest root was this one; nothing for 0.
async fn copied(store: &MemoryStore, generation: u64) -> MemoryStore {
    let copy = MemoryStore::new(store.name().clone());
    for number in 1..=generation {
        let key = key::root(&cluster(), Generation::new(number).unwrap());
        let bytes = crate::store::read(store, &key, ROOT_LIMIT_BYTES).await.unwrap().unwrap();
        let _ = copy.put_new(&key, bytes.into()).await.unwrap();
    }
    copy
}

async fn commit_after(store: &dyn ObjectStore, past: Past, random: u32) -> Result<(Root, Mark), RootError> {
    let edit = |root: &Root| root.with_backup(backup(random));
    commit_upon(store, &cluster(), &writer(), now(), past, edit).await
}

/// A store with five roots, and the mark of each.
async fn history() -> (MemoryStore, Vec<Mark>) {
    let (store, mut marks) = (store(), Vec::new());
    for random in 1..=5 {
        marks.push(commit_after(&store, Past::Unknown, random).await.unwrap().1);
    }
    (store, marks)
}

fn set_back(result: Result<(Root, Mark), RootError>) -> (u64, Option<u64>) {
    match result {
        Err(RootError::SetBack(found)) => (found.seen.get(), found.found.map(Generation::get)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_was_seen_must_be_there() {
    let (store, marks) = history().await;
    for mark in &marks {
        let (_, set_back) = newest_upon(&store, &cluster(), Past::Seen(*mark)).await.unwrap();
        assert_eq!(set_back, None);
    }
    for (left, found) in [(4, Some(4)), (1, Some(1)), (0, None)] {
        let older = copied(&store, left).await;
        assert_eq!(set_back(commit_after(&older, Past::Seen(marks[4]), 9).await), (5, found));
        // An edit that would change nothing is refused as well, and nothing came of either.
        assert_eq!(set_back(commit_after(&older, Past::Seen(marks[4]), 1).await), (5, found));
        assert_eq!(verify_history(&older, &cluster()).await.unwrap().map(Generation::get), found);
        // Who remembers an older root that is there goes on.
        if left > 0 {
            commit_after(&older, Past::Seen(marks[left as usize - 1]), 9).await.unwrap();
        }
    }
}

#[tokio::test]
async fn another_history_under_the_same_numbers_is_noticed() {
    let (store, marks) = history().await;
    let other = copied(&store, 3).await;
    for random in 11..=14 {
        commit_after(&other, Past::Unknown, random).await.unwrap();
    }
    assert_eq!(set_back(commit_after(&other, Past::Seen(marks[4]), 20).await), (5, Some(7)));
    let (root, _) = commit_after(&other, Past::Forgone(marks[4]), 20).await.unwrap();
    assert_eq!((root.generation.get(), root.lost), (8, None));
}

#[tokio::test]
async fn after_an_operators_word_no_number_has_two_contents() {
    let (store, marks) = history().await;
    for left in [0u64, 1, 4] {
        let older = copied(&store, left).await;
        let (root, mark) = commit_after(&older, Past::Forgone(marks[4]), 1).await.unwrap();
        let lost = root.lost_before().map(|lost| (lost.first.get(), lost.last.get()));
        assert_eq!((root.generation.get(), lost), (6, Some((left + 1, 5))));
        assert_eq!(verify_history(&older, &cluster()).await.unwrap(), Some(root.generation));
        // Whoever remembers any of the lost ones finds them accounted for; the gap is told once.
        for mark in marks.iter().chain([&mark]) {
            let next = commit_after(&older, Past::Seen(*mark), 30 + mark.generation.get() as u32).await.unwrap().0;
            assert_eq!(next.lost_before(), None);
        }
        // What is there is no loss, whatever an operator said.
        let (root, _) = commit_after(&older, Past::Forgone(mark), 50).await.unwrap();
        assert_eq!(root.lost_before(), None);
        assert_eq!(newest_generation(&older, &cluster()).await.unwrap(), Some(root.generation));
        verify_history(&older, &cluster()).await.unwrap();
    }
}

/// A store whose first put waits until it is let go on.
#[derive(Debug)]
struct Paused {
    store: Arc<MemoryStore>,
    puts: AtomicU32,
    reached: Notify,
    go_on: Notify,
}

#[async_trait]
impl ObjectStore for Paused {
    fn name(&self) -> &StoreName {
        self.store.name()
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        if self.puts.fetch_add(1, Ordering::Relaxed) == 0 {
            self.reached.notify_one();
            self.go_on.notified().await;
        }
        self.store.put_new(key, body).await
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        self.store.get(key, range).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        self.store.head(key).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        self.store.list(prefix, start_after, limit).await
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        self.store.room().await
    }
}

#[tokio::test]
async fn a_writer_who_read_a_root_before_a_gap_commits_behind_it() {
    let (store, marks) = history().await;
    let older = Arc::new(copied(&store, 3).await);
    let (puts, reached, go_on) = (AtomicU32::new(0), Notify::new(), Notify::new());
    let slow = Arc::new(Paused { store: Arc::clone(&older), puts, reached, go_on });
    let writer = tokio::spawn({
        let slow = Arc::clone(&slow);
        async move { commit_after(&*slow, Past::Unknown, 9).await.map(|(root, _)| root) }
    });
    slow.reached.notified().await;
    let (over, _) = commit_after(&*older, Past::Forgone(marks[4]), 8).await.unwrap();
    assert_eq!(over.lost_before().map(|lost| (lost.first.get(), lost.last.get())), Some((4, 5)));
    slow.go_on.notify_one();
    let published = writer.await.unwrap().unwrap();
    assert_eq!(published.generation.get(), 7, "root 4 is nobody's");
    assert!([8, 9].iter().all(|random| published.backup(&backup(*random).backup).is_some()));
    let (orphan, _) =
        read_generation(&*older, &cluster(), Generation::new(4).unwrap()).await.unwrap().expect("it was created");
    assert!(orphan.backup(&backup(9).backup).is_some());
    assert_eq!(verify_history(&*older, &cluster()).await.unwrap(), Some(published.generation));
    // Whoever remembers the root whose number the orphan has finds it accounted for, as any other.
    for mark in marks {
        let (_, set_back) = newest_upon(&*older, &cluster(), Past::Seen(mark)).await.unwrap();
        assert_eq!(set_back, None);
    }
}

#[tokio::test]
async fn a_gap_that_nobody_tells_of_is_damage() {
    let (store, _) = history().await;
    let copy = copied(&store, 2).await;
    let key = key::root(&cluster(), Generation::new(4).unwrap());
    let bytes = crate::store::read(&store, &key, ROOT_LIMIT_BYTES).await.unwrap().unwrap();
    let _ = copy.put_new(&key, bytes.into()).await.unwrap();
    assert!(matches!(verify_history(&copy, &cluster()).await, Err(RootError::Store(StoreError::NotFound { .. }))));
}

#[tokio::test]
async fn a_long_history_with_a_gap_is_searched() {
    for (length, gap) in [(1500u64, 700u64), (5, 40_000), (1000, 1), (2100, 100_000)] {
        let store = store();
        for generation in (1..=length).chain([length + gap]) {
            let key = key::root(&cluster(), Generation::new(generation).unwrap());
            let _ = store.put_new(&key, Bytes::new().into()).await.unwrap();
        }
        let found = newest_generation(&store, &cluster()).await.unwrap();
        assert_eq!(found.map(Generation::get), Some(length + gap), "{length} {gap}");
    }
}
