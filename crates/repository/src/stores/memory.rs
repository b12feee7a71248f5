//! Objects in memory: the reference behaviour of a store, for tests and simulations.
//!
//! It keeps every rule of `store.rs` trivially, with one lock around a sorted map. It holds all content in memory and
//! knows no limit, so no configuration can name it.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{StreamExt, TryStreamExt};

use crate::key::ObjectKey;
use crate::name::StoreName;
use crate::store::{
    Body, ByteRange, ByteStream, Deleted, LONG_LIST_LIMIT, ListPage, ObjectEntry, ObjectStore, Put, Room, StoreError,
};

/// A store that lives as long as the process.
#[derive(Debug)]
pub struct MemoryStore {
    name: StoreName,
    objects: Mutex<BTreeMap<ObjectKey, Bytes>>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new(name: StoreName) -> Self {
        Self { name, objects: Mutex::default() }
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<ObjectKey, Bytes>> {
        // A panic elsewhere cannot leave the map half changed: every change is one insert or one removal.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl ObjectStore for MemoryStore {
    fn name(&self) -> &StoreName {
        &self.name
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        let pieces: Vec<Bytes> =
            body.chunks().try_collect().await.map_err(|source| StoreError::Body { key: key.clone(), source })?;
        let content = Bytes::from(pieces.concat());
        let mut objects = self.objects();
        if objects.contains_key(key) {
            return Ok(Put::Exists);
        }
        objects.insert(key.clone(), content);
        Ok(Put::Created)
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        let content = self.objects().get(key).cloned();
        let content = content.ok_or_else(|| StoreError::NotFound { store: self.name.clone(), key: key.clone() })?;
        let range = range.within(content.len() as u64);
        let wanted = content.slice(range.start as usize..range.end as usize);
        let key = key.clone();
        let pieces = Body::from(wanted).chunks();
        Ok(pieces.map_err(move |source| StoreError::Body { key: key.clone(), source }).boxed())
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        Ok(self.objects().get(key).map(|content| content.len() as u64))
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        let objects = self.objects();
        let from = match start_after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let mut found = objects
            .range::<str, _>((from, Bound::Unbounded))
            .take_while(|(key, _)| key.as_str().starts_with(prefix))
            .map(|(key, content)| ObjectEntry { key: key.clone(), size: content.len() as u64 });
        let objects: Vec<ObjectEntry> = found.by_ref().take(limit.clamp(1, LONG_LIST_LIMIT)).collect();
        Ok(ListPage { objects, more: found.next().is_some() })
    }

    async fn delete(&self, key: &ObjectKey) -> Result<Deleted, StoreError> {
        Ok(if self.objects().remove(key).is_some() { Deleted::Removed } else { Deleted::Absent })
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        Ok(None)
    }
}
