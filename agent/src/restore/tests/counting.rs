//! A store that counts what is read of packs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use repository::key::ObjectKey;
use repository::name::StoreName;
use repository::store::{Body, ByteRange, ByteStream, ListPage, ObjectStore, Put, Room, StoreError};
use repository::stores::memory::MemoryStore;

/// Counts what is read of packs.
#[derive(Debug)]
pub(super) struct Counting {
    pub(super) inner: MemoryStore,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Counting {
    pub(super) fn new() -> Arc<Self> {
        let inner = MemoryStore::new("repo1".parse().unwrap());
        Arc::new(Self { inner, requests: AtomicU64::new(0), bytes: AtomicU64::new(0) })
    }

    /// Requests and bytes since it was asked last.
    pub(super) fn taken(&self) -> (u64, u64) {
        (self.requests.swap(0, Ordering::Relaxed), self.bytes.swap(0, Ordering::Relaxed))
    }
}

#[async_trait]
impl ObjectStore for Counting {
    fn name(&self) -> &StoreName {
        self.inner.name()
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        self.inner.put_new(key, body).await
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        if let (true, ByteRange::Slice { length, .. }) = (key.as_str().contains("/p/"), &range) {
            self.requests.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(*length, Ordering::Relaxed);
        }
        self.inner.get(key, range).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        self.inner.head(key).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        self.inner.list(prefix, after, limit).await
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        self.inner.room().await
    }
}
