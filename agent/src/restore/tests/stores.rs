//! Several stores: the first is preferred, and left in the middle when it fails, is damaged, silent or slow. And what a
//! survey says of them.

use std::time::Duration;

use async_trait::async_trait;
use repository::stores::faulty::{Fault, FaultyStore, Operation};

use super::*;

/// A near store that can fail, and a far one that counts what is read of it.
struct Two {
    history: History,
    near: Arc<FaultyStore>,
}

impl Two {
    async fn set_up() -> Self {
        let history = three().await;
        let near = MemoryStore::new("near".parse().unwrap());
        let mut after: Option<String> = None;
        loop {
            let page = history.store.list("", after.as_deref(), 1000).await.unwrap();
            for entry in &page.objects {
                let bytes = history.store.inner.get(&entry.key, ByteRange::All).await.unwrap();
                let bytes = repository::store::collect(bytes, entry.size).await.unwrap();
                let _ = near.put_new(&entry.key, Body::Memory(bytes)).await.unwrap();
            }
            after = page.objects.last().map(|entry| entry.key.as_str().to_owned());
            if !page.more {
                break;
            }
        }
        Self { history, near: Arc::new(FaultyStore::new(Arc::new(near))) }
    }

    fn source(&self) -> RestoreSource {
        self.history.source(2, vec![self.near.clone(), self.history.store.clone()])
    }

    /// Restores, and gives how many requests the far store got.
    async fn restore(&self, name: &str) -> (Restored, u64) {
        let patience = Patience {
            silence_beside_others: Duration::from_millis(300),
            slowness: Duration::from_millis(100),
            ..Patience::default()
        };
        let target = self.history.target(name);
        let options = self.history.options(&target, Place::Free);
        let (progress, _) = watch::channel(RestoreProgress::default());
        self.history.store.taken();
        let restored =
            restore_with(patience, &self.source(), &options, &progress, &CancellationToken::new()).await.unwrap();
        self.history.expect(2, &target);
        (restored, self.history.store.taken().0)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_store_serves_all_that_it_can() {
    let two = Two::set_up().await;
    let (restored, far) = two.restore("sound").await;
    assert_eq!((far, restored.warnings.len()), (0, 0));
    let ranges = two.near.calls(Operation::Get) - 1;
    // One request is cut off in the middle: its range is read from the other store, and so is what follows.
    two.near.fail_nth(Operation::Get, 3, Fault::TornRead { after_bytes: 1000 });
    let (_, far) = two.restore("torn").await;
    assert!(0 < far && far < ranges, "{far} of {ranges}");
    // A damaged range is no reason to leave the store.
    two.near.heal();
    two.near.fail_nth(Operation::Get, 3, Fault::FlippedBit);
    let two = Two { near: two.near.clone(), ..two };
    let (restored, far) = two.restore("flipped").await;
    assert_eq!((far, restored.warnings.len()), (1, 1), "{restored:?}");
    two.near.fail_everything(Fault::Fail);
    let (restored, far) = two.restore("away").await;
    assert_eq!((far, restored.warnings.len()), (ranges, 1), "{restored:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_store_is_left_for_the_other_one() {
    let two = Two::set_up().await;
    two.near.fail_nth(Operation::Get, 2, Fault::Hang(Duration::from_secs(3600)));
    let began = process::clock::Monotonic::now();
    let (_, far) = two.restore("silent").await;
    assert!(far > 0 && began.elapsed() < Duration::from_secs(30));
}

/// A store that gives a few bytes at a time.
#[derive(Debug)]
struct Trickle(Arc<FaultyStore>);

#[async_trait]
impl ObjectStore for Trickle {
    fn name(&self) -> &StoreName {
        self.0.name()
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        self.0.put_new(key, body).await
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        use futures_util::{StreamExt, TryStreamExt};

        let stream = self.0.get(key, range).await?;
        if !key.as_str().contains("/p/") {
            return Ok(stream);
        }
        let drops = stream.map_ok(|piece| {
            let drops: Vec<Bytes> = piece.chunks(64).map(Bytes::copy_from_slice).collect();
            futures_util::stream::iter(drops.into_iter().map(Ok))
        });
        let slowly = drops.try_flatten().then(async |drop| {
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop
        });
        Ok(slowly.boxed())
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        self.0.head(key).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        self.0.list(prefix, after, limit).await
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        self.0.room().await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_store_is_left_in_the_middle_of_a_range() {
    let two = Two::set_up().await;
    let source = two.history.source(2, vec![Arc::new(Trickle(two.near.clone())), two.history.store.clone()]);
    let patience = Patience { slowness: Duration::from_millis(100), ..Patience::default() };
    let target = two.history.target("slow");
    let options = two.history.options(&target, Place::Free);
    let (progress, seen) = watch::channel(RestoreProgress::default());
    restore_with(patience, &source, &options, &progress, &CancellationToken::new()).await.unwrap();
    two.history.expect(2, &target);
    assert!(two.history.store.taken().0 > 0);
    // What was written twice counts once.
    let told = *seen.borrow();
    assert_eq!(told.bytes_done, told.bytes_total);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survey_tells_what_a_restore_then_reads() {
    let two = Two::set_up().await;
    let target = two.history.target("surveyed");
    let options = two.history.options(&target, Place::Free);
    let survey = survey(&two.source(), &options).await.unwrap();
    assert!(!target.exists());
    assert_eq!((survey.store.as_ref(), survey.then.len()), ("near", 1));
    assert_eq!(survey.files, two.history.made[2].tree.len() as u64);
    let source = two.history.source(2, vec![two.history.store.clone()]);
    two.history.store.taken();
    let restored = apply(&source, &options).await.unwrap();
    assert_eq!((survey.requests, survey.read_bytes), two.history.store.taken());
    assert_eq!((survey.files, survey.file_bytes), (restored.files, restored.bytes));
    let measured = survey.measured.unwrap();
    assert_eq!(measured.bytes, survey.read_bytes);
    assert_eq!(survey.estimated_seconds, Some(survey.read_bytes / measured.bytes_per_second()));
}
