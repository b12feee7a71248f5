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
async fn roots_that_are_not_listed_yet_are_gone_on_from_and_not_forgotten() {
    let store = Lagging(store());
    for random in 1..=9 {
        let root = publish(&store, backup(random)).await.unwrap();
        assert_eq!((root.generation.get(), root.backups.len()), (random.into(), random as usize));
    }
    let (root, sha256) = read_generation(&store, &cluster(), Generation::new(8).unwrap()).await.unwrap().unwrap();
    let seen = Mark::of(&root, sha256);
    let (found, set_back) = newest_upon(&store, &cluster(), Past::Seen(seen)).await.unwrap();
    assert_eq!((found.map(|(_, mark)| mark), set_back), (Some(seen), None));
    let whole = store.0;
    assert_eq!(verify_history(&whole, &cluster()).await.unwrap().map(Generation::get), Some(9));
}
