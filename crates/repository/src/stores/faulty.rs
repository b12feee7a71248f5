//! A store that fails as told, around any other store. For tests.
//!
//! Faults are planned per operation: the n-th call from now, or every call until healed. Whatever is not planned is
//! forwarded unchanged.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, StreamExt};

use crate::key::ObjectKey;
use crate::name::StoreName;
use crate::store::{Body, ByteRange, ByteStream, Deleted, ListPage, ObjectStore, Put, Room, StoreError};

/// The operations of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// `put_new`
    Put,
    /// `get`
    Get,
    /// `head`
    Head,
    /// `list`
    List,
    /// `room`
    Room,
    /// `delete`
    Delete,
}

impl Operation {
    const ALL: [Self; 6] = [Self::Put, Self::Get, Self::Head, Self::List, Self::Room, Self::Delete];

    fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::Head => "head",
            Self::List => "list",
            Self::Room => "room",
            Self::Delete => "delete",
        }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The call does nothing and fails as unavailable.
    Fail,
    /// The call does nothing and the store says that it is full.
    Full,
    /// The call does nothing and the store is refused, as an unmounted directory is.
    Refuse,
    /// The call is carried out and fails as timed out.
    LostReply,
    /// A get breaks off after so many bytes. Other operations fail as unavailable.
    TornRead {
        /// Bytes that come before the fault.
        after_bytes: u64,
    },
    /// A get delivers its first byte flipped. Other operations are carried out.
    FlippedBit,
    /// A delete finds the object locked. Other operations are carried out.
    Retain,
    /// The call is carried out after a while.
    Delay(Duration),
    /// The call does nothing and times out after a while.
    Hang(Duration),
}

#[derive(Debug)]
struct Planned {
    operation: Operation,
    /// The call it happens to, counted over the life of the store from 1; `None`: every call.
    call: Option<u64>,
    fault: Fault,
}

/// See the head of this file.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    plan: Mutex<Vec<Planned>>,
    calls: [AtomicU64; Operation::ALL.len()],
}

impl FaultyStore {
    /// A store that does not fail yet.
    pub fn new(inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner, plan: Mutex::default(), calls: Default::default() }
    }

    /// The `nth` call of the operation from now, counted from 1, suffers the fault.
    pub fn fail_nth(&self, operation: Operation, nth: u64, fault: Fault) {
        let call = Some(self.calls(operation) + nth);
        self.plan().push(Planned { operation, call, fault });
    }

    /// Every call of the operation suffers the fault until [`FaultyStore::heal`].
    pub fn fail_all(&self, operation: Operation, fault: Fault) {
        self.plan().push(Planned { operation, call: None, fault });
    }

    /// Every operation suffers the fault until [`FaultyStore::heal`].
    pub fn fail_everything(&self, fault: Fault) {
        for operation in Operation::ALL {
            self.fail_all(operation, fault);
        }
    }

    /// Forgets all faults.
    pub fn heal(&self) {
        self.plan().clear();
    }

    /// How often the operation was called so far.
    pub fn calls(&self, operation: Operation) -> u64 {
        self.calls[operation as usize].load(Ordering::SeqCst)
    }

    fn plan(&self) -> MutexGuard<'_, Vec<Planned>> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call and says what befalls it.
    fn next(&self, operation: Operation) -> Option<Fault> {
        let call = self.calls[operation as usize].fetch_add(1, Ordering::SeqCst) + 1;
        let mut plan = self.plan();
        let index = plan.iter().position(|planned| {
            planned.operation == operation && planned.call.is_none_or(|planned_call| planned_call == call)
        })?;
        let fault = plan[index].fault;
        if plan[index].call.is_some() {
            plan.remove(index);
        }
        Some(fault)
    }

    /// Lets a call happen or not.
    async fn befall(&self, operation: Operation) -> Result<Option<Fault>, StoreError> {
        let store = self.inner.name().clone();
        match self.next(operation) {
            Some(Fault::Fail) => Err(StoreError::Unavailable { store, source: "a planned fault".into() }),
            Some(Fault::TornRead { .. }) if operation != Operation::Get => {
                Err(StoreError::Unavailable { store, source: "a planned fault".into() })
            }
            Some(Fault::Full) => Err(StoreError::Full { store }),
            Some(Fault::Refuse) => Err(StoreError::Refused { store, reason: "a planned fault".to_owned() }),
            Some(Fault::Hang(duration)) => {
                tokio::time::sleep(duration).await;
                Err(StoreError::Timeout { store, operation: operation.name() })
            }
            Some(Fault::Delay(duration)) => {
                tokio::time::sleep(duration).await;
                Ok(None)
            }
            other => Ok(other),
        }
    }

    fn reply<T>(&self, operation: Operation, fault: Option<Fault>, reply: T) -> Result<T, StoreError> {
        match fault {
            Some(Fault::LostReply) => {
                Err(StoreError::Timeout { store: self.inner.name().clone(), operation: operation.name() })
            }
            _ => Ok(reply),
        }
    }
}

// A wrapper that forgot to forward a method with a default would bypass the faults.
#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl ObjectStore for FaultyStore {
    fn name(&self) -> &StoreName {
        self.inner.name()
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        let fault = self.befall(Operation::Put).await?;
        let put = self.inner.put_new(key, body).await?;
        self.reply(Operation::Put, fault, put)
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        let fault = self.befall(Operation::Get).await?;
        let stream = self.inner.get(key, range).await?;
        match fault {
            Some(Fault::TornRead { after_bytes }) => Ok(torn(self.inner.name().clone(), stream, after_bytes)),
            Some(Fault::FlippedBit) => Ok(flipped(stream)),
            fault => self.reply(Operation::Get, fault, stream),
        }
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        let fault = self.befall(Operation::Head).await?;
        let size = self.inner.head(key).await?;
        self.reply(Operation::Head, fault, size)
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        let fault = self.befall(Operation::List).await?;
        let page = self.inner.list(prefix, start_after, limit).await?;
        self.reply(Operation::List, fault, page)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<Deleted, StoreError> {
        let fault = self.befall(Operation::Delete).await?;
        if fault == Some(Fault::Retain) {
            return Ok(Deleted::Retained { until: None });
        }
        let deleted = self.inner.delete(key).await?;
        self.reply(Operation::Delete, fault, deleted)
    }

    fn expect_repository(&self, repository: uuid::Uuid) {
        self.inner.expect_repository(repository);
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        let fault = self.befall(Operation::Room).await?;
        let room = self.inner.room().await?;
        self.reply(Operation::Room, fault, room)
    }
}

fn torn(store: StoreName, stream: ByteStream, after_bytes: u64) -> ByteStream {
    let mut left = after_bytes;
    let before = stream
        .map(move |piece| {
            let mut piece = piece?;
            piece.truncate(left.min(piece.len() as u64) as usize);
            left -= piece.len() as u64;
            Ok(piece)
        })
        .take_while(|piece| std::future::ready(piece.as_ref().is_ok_and(|piece| !piece.is_empty())));
    let fault = StoreError::Unavailable { store, source: "a planned fault".into() };
    before.chain(stream::once(async { Err(fault) })).boxed()
}

fn flipped(stream: ByteStream) -> ByteStream {
    let mut first = true;
    stream
        .map(move |piece| {
            let piece = piece?;
            if !std::mem::take(&mut first) || piece.is_empty() {
                return Ok(piece);
            }
            let mut bytes = piece.to_vec();
            bytes[0] ^= 1;
            Ok(bytes.into())
        })
        .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{self, collect};
    use crate::stores::memory::MemoryStore;

    fn store() -> (FaultyStore, ObjectKey) {
        let memory = MemoryStore::new("memory".parse().unwrap());
        (FaultyStore::new(Arc::new(memory)), ObjectKey::parse("a/b").unwrap())
    }

    fn body() -> Body {
        bytes::Bytes::from_static(b"content").into()
    }

    #[tokio::test]
    async fn the_planned_call_fails_and_no_other() {
        let (store, key) = store();
        store.fail_nth(Operation::Head, 2, Fault::Fail);
        assert_eq!(store.head(&key).await.unwrap(), None);
        assert!(matches!(store.head(&key).await, Err(StoreError::Unavailable { .. })));
        assert_eq!(store.head(&key).await.unwrap(), None);
        assert_eq!(store.calls(Operation::Head), 3);
        store.fail_everything(Fault::Refuse);
        assert!(matches!(store.list("", None, 1).await, Err(StoreError::Refused { .. })));
        assert!(matches!(store.list("", None, 1).await, Err(StoreError::Refused { .. })));
        store.heal();
        assert!(store.list("", None, 1).await.is_ok());
    }

    #[tokio::test]
    async fn a_lost_reply_leaves_the_object() {
        let (store, key) = store();
        store.fail_nth(Operation::Put, 1, Fault::LostReply);
        assert!(matches!(store.put_new(&key, body()).await, Err(StoreError::Timeout { operation: "put", .. })));
        assert_eq!(store.put_new(&key, body()).await.unwrap(), Put::Exists);
    }

    #[tokio::test]
    async fn reads_are_torn_and_flipped() {
        let (store, key) = store();
        assert_eq!(store.put_new(&key, body()).await.unwrap(), Put::Created);
        store.fail_nth(Operation::Get, 1, Fault::TornRead { after_bytes: 3 });
        let mut stream = store.get(&key, ByteRange::All).await.unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap(), "con");
        assert!(stream.next().await.unwrap().is_err());
        store.fail_nth(Operation::Get, 1, Fault::FlippedBit);
        let read = collect(store.get(&key, ByteRange::All).await.unwrap(), 100).await.unwrap();
        assert_eq!(read, "bontent");
        assert_eq!(store::read(&store, &key, 100).await.unwrap().unwrap(), "content");
    }
}
