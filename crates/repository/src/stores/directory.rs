//! Objects as files of a directory: a local file system, or a mount such as NFS.
//!
//! A key is a relative path. A put writes a file of its own in `.pgconvoy-tmp/` of the same file system, makes it
//! durable, and links it to its key if nothing is there; linking is atomic on every file system with hard links, NFS
//! included, so that a reader sees all of an object or none of it, and of several writers one wins.
//!
//! Invariants:
//! * the directory itself is never created, and nothing but `repo.json` is created in one that lacks it: a mount that
//!   is away is [`StoreError::Refused`], and its objects are not called absent;
//! * a process works on the repository that it was told to expect, else on the one that it found there first; another one
//!   that is mounted in its place is refused;
//! * `Created` and `Exists` are answered after the file and every directory on the way to it are durable;
//! * all blocking work runs on the threads of this store and every wait has a deadline, so that a hung mount costs
//!   those threads and nobody else's. A thread that hangs in the kernel cannot be ended; it is not waited for.
//!
//! What it does not do: it has no lock against other writers and needs none. On NFS, what another client has just
//! written may be listed late (attribute caching); one coordinator writes, so nothing decides on that.

mod files;
mod pool;
mod walk;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use uuid::Uuid;

use crate::config::DirectoryConfig;
use crate::key::ObjectKey;
use crate::name::StoreName;
use crate::store::{
    Body, ByteRange, ByteStream, Deleted, LONG_LIST_LIMIT, ListPage, ObjectStore, PIECE_LIMIT_BYTES, Put, Room,
    StoreError,
};
use files::{Files, OpenObject};
use pool::Pool;

/// How long an operation may take, waiting for a thread included.
const OPERATION_DEADLINE: Duration = Duration::from_secs(20);
/// How much longer a put may take for each MiB of its body.
const DEADLINE_PER_MIB: Duration = Duration::from_secs(1);
/// How long a listing may take; it looks at every file it names.
const LIST_DEADLINE: Duration = Duration::from_secs(60);
/// How many pieces of one object are read ahead.
const READ_AHEAD: usize = 2;

/// A directory store.
#[derive(Debug)]
pub struct DirectoryStore {
    name: StoreName,
    files: Arc<Files>,
    pool: Arc<Pool>,
}

impl DirectoryStore {
    /// Starts the store's threads. The directory is looked at by the operations, not here.
    pub fn new(name: StoreName, config: DirectoryConfig) -> Result<Self, StoreError> {
        let pool = Pool::start(&name)
            .map_err(|error| StoreError::Unavailable { store: name.clone(), source: Box::new(error) })?;
        let files = Arc::new(Files::new(name.clone(), config));
        Ok(Self { name, files, pool: Arc::new(pool) })
    }

    async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        deadline: Duration,
        work: impl FnOnce(&Files) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let files = self.files.clone();
        self.pool.run(operation, deadline, move || work(&files)).await
    }
}

#[async_trait]
impl ObjectStore for DirectoryStore {
    fn name(&self) -> &StoreName {
        &self.name
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        let key = key.clone();
        let mib = u32::try_from(body.len() >> 20).unwrap_or(u32::MAX);
        let deadline = OPERATION_DEADLINE.saturating_add(DEADLINE_PER_MIB.saturating_mul(mib));
        self.run("put", deadline, move |files| files.put_new(&key, &body)).await
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        let wanted = key.clone();
        let first = self.run("get", OPERATION_DEADLINE, move |files| {
            let object = files.open(&wanted)?;
            let range = range.within(object.size());
            let first = read_piece(&object, &range, range.start)?;
            Ok((Arc::new(object), range, first))
        });
        let (object, range, first) = first.await?;
        let first = if first.is_empty() { None } else { Some(Ok(first)) };
        let rest = (range.start + PIECE_LIMIT_BYTES as u64..range.end).step_by(PIECE_LIMIT_BYTES);
        let pool = self.pool.clone();
        let rest = stream::iter(rest).map(move |offset| {
            let (pool, object, range) = (pool.clone(), object.clone(), range.clone());
            async move { pool.run("get", OPERATION_DEADLINE, move || read_piece(&object, &range, offset)).await }
        });
        Ok(stream::iter(first).chain(rest.buffered(READ_AHEAD)).boxed())
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        let key = key.clone();
        self.run("head", OPERATION_DEADLINE, move |files| files.head(&key)).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        let (prefix, start_after) = (prefix.to_owned(), start_after.map(str::to_owned));
        let limit = limit.clamp(1, LONG_LIST_LIMIT);
        self.run("list", LIST_DEADLINE, move |files| files.list(&prefix, start_after.as_deref(), limit)).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<Deleted, StoreError> {
        let key = key.clone();
        self.run("delete", OPERATION_DEADLINE, move |files| files.delete(&key)).await
    }

    fn expect_repository(&self, repository: Uuid) {
        self.files.expect(repository);
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        self.run("room", OPERATION_DEADLINE, |files| files.room()).await.map(Some)
    }
}

/// The piece of `range` that begins at `offset`.
fn read_piece(object: &OpenObject, range: &std::ops::Range<u64>, offset: u64) -> Result<Bytes, StoreError> {
    let length = range.end.saturating_sub(offset).min(PIECE_LIMIT_BYTES as u64);
    object.read(offset, length as usize)
}

#[cfg(test)]
mod tests;
