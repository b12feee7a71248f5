//! A store in memory whose every request waits for its turn and may fail.

use std::future::Future;
use std::pin::Pin;
use std::sync::Weak;
use std::task::{Context, Poll};

use async_trait::async_trait;
use repository::key::ObjectKey;
use repository::name::StoreName;
use repository::store::{Body, ByteRange, ByteStream, Deleted, ListPage, ObjectStore, Put, Room, StoreError};
use repository::stores::memory::MemoryStore;

use crate::world::World;

/// How one request fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is done and answered.
    Answered,
    /// It is done, and the answer is lost.
    Unanswered,
    /// It is not done.
    Away,
}

#[derive(Debug)]
pub(crate) struct Scheduled {
    pub(crate) inner: MemoryStore,
    pub(crate) number: usize,
    pub(crate) world: Weak<World>,
}

/// Lets the scheduler choose who goes on.
struct Turn(bool);

impl Future for Turn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        // Whoever has several requests under way asks only those that say so.
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Scheduled {
    async fn turn(&self, operation: &'static str, key: &str) -> Result<Fate, StoreError> {
        Turn(false).await;
        let world = self.world.upgrade().expect("the world outlives its coordinators");
        match world.fate(self.number, operation, key) {
            Fate::Away => Err(StoreError::Unavailable { store: self.name().clone(), source: "an outage".into() }),
            fate => Ok(fate),
        }
    }

    fn answer<T>(&self, operation: &'static str, fate: Fate, answer: T) -> Result<T, StoreError> {
        match fate {
            Fate::Answered => Ok(answer),
            _ => Err(StoreError::Timeout { store: self.name().clone(), operation }),
        }
    }
}

#[async_trait]
impl ObjectStore for Scheduled {
    fn name(&self) -> &StoreName {
        self.inner.name()
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        let fate = self.turn("put", key.as_str()).await?;
        let put = self.inner.put_new(key, body.clone()).await?;
        if let (Some(world), Put::Created, Body::Memory(bytes)) = (self.world.upgrade(), put, &body) {
            world.note_put(self.number, key, bytes);
        }
        self.answer("put", fate, put)
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        let fate = self.turn("get", key.as_str()).await?;
        let stream = self.inner.get(key, range).await?;
        self.answer("get", fate, stream)
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        let fate = self.turn("head", key.as_str()).await?;
        let size = self.inner.head(key).await?;
        self.answer("head", fate, size)
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        let fate = self.turn("list", prefix).await?;
        let mut page = self.inner.list(prefix, start_after, limit).await?;
        if let Some(world) = self.world.upgrade() {
            world.hide_young(&mut page);
        }
        self.answer("list", fate, page)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<Deleted, StoreError> {
        let fate = self.turn("delete", key.as_str()).await?;
        let deleted = self.inner.delete(key).await?;
        if let (Some(world), Deleted::Removed) = (self.world.upgrade(), deleted) {
            world.note_delete(self.number, key);
        }
        self.answer("delete", fate, deleted)
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        Ok(None)
    }
}
