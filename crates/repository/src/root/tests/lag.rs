//! Tests of commits to a store whose listings lag.

use super::*;

/// A store that lists no root behind the second one, whatever it holds.
#[derive(Debug)]
struct Lagging(MemoryStore);

#[async_trait]
impl ObjectStore for Lagging {
    fn name(&self) -> &StoreName {
        self.0.name()
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        self.0.put_new(key, body).await
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        self.0.get(key, range).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        self.0.head(key).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        let mut page = self.0.list(prefix, start_after, limit).await?;
        let last = key::root(&cluster(), Generation::new(2).unwrap());
        page.objects.retain(|object| object.key <= last);
        Ok(page)
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        self.0.room().await
    }
}

#[tokio::test]
async fn a_commit_goes_on_from_roots_that_are_not_listed_yet() {
    let store = Lagging(store());
    for random in 1..=9 {
        let root = publish(&store, backup(random)).await.unwrap();
        assert_eq!((root.generation.get(), root.backups.len()), (random.into(), random as usize));
    }
    let whole = store.0;
    assert_eq!(verify_history(&whole, &cluster()).await.unwrap().map(Generation::get), Some(9));
}
