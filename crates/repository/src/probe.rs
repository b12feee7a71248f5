//! Whether a store does what it must, tried and not believed.
//!
//! Stores that ignore `If-None-Match` answer 200 and overwrite; a repository in one would lose its roots to the first
//! race. So a store is probed when a program starts with it: creating what exists must keep the first content, racing
//! creators must have one winner, and listing and reading must show what was written.
//!
//! A probe writes a few small objects under `coord/probe/` and deletes nothing. It needs a store that already has its
//! identity. It cannot prove that several machines behind one endpoint never race; it finds the stores that do not try.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future;
use jiff::Timestamp;
use uuid::Uuid;

use crate::key::{self, ObjectKey};
use crate::store::{self, ByteRange, ObjectStore, Put, StoreError};

/// Races that are run.
pub const RACES: usize = 8;
/// Creators in each race.
pub const RACERS: usize = 16;
/// How long all of it may take.
const PROBE_DEADLINE: Duration = Duration::from_secs(120);
/// More than any probe object holds.
const CONTENT_LIMIT_BYTES: u64 = 4096;

/// What a probe that found nothing wrong did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeReport {
    /// Objects that were created, and stay.
    pub objects: usize,
    /// Puts that were refused because another one had won.
    pub refused_puts: usize,
}

/// Probes a store. `now` goes into the names of the objects, so that people see when they were made.
///
/// A store that fails is [`StoreError::Unsupported`]; one that is away gives the error of that.
pub async fn probe(store: &dyn ObjectStore, now: Timestamp) -> Result<ProbeReport, StoreError> {
    let probe = Probe { store, name: format!("{}-{}", now.as_millisecond(), Uuid::now_v7().simple()) };
    match tokio::time::timeout(PROBE_DEADLINE, probe.run()).await {
        Ok(result) => result,
        Err(_) => Err(StoreError::Timeout { store: store.name().clone(), operation: "probe" }),
    }
}

struct Probe<'a> {
    store: &'a dyn ObjectStore,
    name: String,
}

impl Probe<'_> {
    async fn run(&self) -> Result<ProbeReport, StoreError> {
        let first = self.key("create");
        self.creating_what_exists(&first).await?;
        let mut keys = vec![first];
        for race in 0..RACES {
            let key = self.key(&format!("race-{race}"));
            self.race(&key).await?;
            keys.push(key);
        }
        self.listing(&keys).await?;
        self.absence().await?;
        Ok(ProbeReport { objects: keys.len(), refused_puts: 1 + RACES * (RACERS - 1) })
    }

    fn key(&self, part: &str) -> ObjectKey {
        key::probe(&format!("{}-{part}", self.name)).expect("digits, letters and dashes make a key")
    }

    async fn creating_what_exists(&self, key: &ObjectKey) -> Result<(), StoreError> {
        let content = |text: &'static str| Bytes::from_static(text.as_bytes());
        if self.store.put_new(key, content("the first content").into()).await? != Put::Created {
            return Err(self.unsupported("it says that an object exists which was never made"));
        }
        if self.store.put_new(key, content("another content").into()).await? != Put::Exists {
            return Err(self.unsupported("it overwrites: creating an object that exists was not refused"));
        }
        if self.read(key, ByteRange::All).await? != "the first content" {
            return Err(self.unsupported("a refused creation changed the object that existed"));
        }
        if self.read(key, ByteRange::Slice { offset: 4, length: 5 }).await? != "first" {
            return Err(self.unsupported("it does not answer a request for a range with that range"));
        }
        Ok(())
    }

    async fn race(&self, key: &ObjectKey) -> Result<(), StoreError> {
        let racers = (0..RACERS).map(|racer| async move {
            let put = self.store.put_new(key, Bytes::from(content_of(racer)).into()).await?;
            Ok::<_, StoreError>((racer, put))
        });
        let puts = future::try_join_all(racers).await?;
        let winners: Vec<usize> =
            puts.into_iter().filter(|(_, put)| *put == Put::Created).map(|(racer, _)| racer).collect();
        let [winner] = winners[..] else {
            let count = winners.len();
            return Err(self.unsupported(&format!("of {RACERS} racing creators {count} were told that they won")));
        };
        if self.read(key, ByteRange::All).await? != content_of(winner) {
            return Err(self.unsupported("after a race it holds another content than the winner's"));
        }
        Ok(())
    }

    async fn listing(&self, keys: &[ObjectKey]) -> Result<(), StoreError> {
        let prefix = format!("{}{}", key::probe_prefix(), self.name);
        let listed = store::list_all(self.store, &prefix, 2 * keys.len()).await?;
        if listed.iter().map(|entry| &entry.key).ne(keys) {
            return Err(self.unsupported("a listing does not show in order what has just been written"));
        }
        Ok(())
    }

    async fn absence(&self) -> Result<(), StoreError> {
        match self.store.head(&self.key("never-written")).await? {
            None => Ok(()),
            Some(_) => Err(self.unsupported("it says that an object exists which was never made")),
        }
    }

    async fn read(&self, key: &ObjectKey, range: ByteRange) -> Result<Bytes, StoreError> {
        match self.store.get(key, range).await {
            Ok(stream) => store::collect(stream, CONTENT_LIMIT_BYTES).await,
            Err(StoreError::NotFound { .. }) => Err(self.unsupported("it does not find what has just been written")),
            Err(error) => Err(error),
        }
    }

    fn unsupported(&self, reason: &str) -> StoreError {
        StoreError::Unsupported { store: self.store.name().clone(), reason: reason.to_owned() }
    }
}

fn content_of(racer: usize) -> String {
    format!("the content of creator {racer}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use async_trait::async_trait;
    use futures_util::stream::{StreamExt, TryStreamExt};

    use super::*;
    use crate::name::StoreName;
    use crate::store::{Body, ByteStream, ListPage, ObjectEntry, Room};
    use crate::stores::memory::MemoryStore;

    /// Takes what it is given and answers what it likes.
    #[derive(Debug)]
    struct Overwriting {
        name: StoreName,
        objects: Mutex<BTreeMap<ObjectKey, Bytes>>,
        /// What it says to a put over an object.
        answer: Put,
        ignores_ranges: bool,
    }

    #[async_trait]
    impl ObjectStore for Overwriting {
        fn name(&self) -> &StoreName {
            &self.name
        }

        async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
            let pieces: Vec<Bytes> = body.chunks().try_collect().await.unwrap();
            let before = self.objects.lock().unwrap().insert(key.clone(), pieces.concat().into());
            Ok(if before.is_some() { self.answer } else { Put::Created })
        }

        async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
            let content = self.objects.lock().unwrap()[key].clone();
            let range = if self.ignores_ranges { ByteRange::All } else { range }.within(content.len() as u64);
            let wanted = content.slice(range.start as usize..range.end as usize);
            Ok(Body::from(wanted).chunks().map(|piece| Ok(piece.unwrap())).boxed())
        }

        async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
            Ok(self.objects.lock().unwrap().get(key).map(|content| content.len() as u64))
        }

        async fn list(&self, _: &str, _: Option<&str>, _: usize) -> Result<ListPage, StoreError> {
            let objects = self.objects.lock().unwrap();
            let entries =
                objects.iter().map(|(key, content)| ObjectEntry { key: key.clone(), size: content.len() as u64 });
            Ok(ListPage { objects: entries.collect(), more: false })
        }

        async fn room(&self) -> Result<Option<Room>, StoreError> {
            Ok(None)
        }
    }

    #[tokio::test]
    async fn a_good_store_passes_and_keeps_the_traces() {
        let store = MemoryStore::new("memory".parse().unwrap());
        let report = probe(&store, Timestamp::UNIX_EPOCH).await.unwrap();
        assert_eq!(report, ProbeReport { objects: 9, refused_puts: 121 });
        assert_eq!(store::list_all(&store, "coord/probe/0-", 100).await.unwrap().len(), 9);
        probe(&store, Timestamp::UNIX_EPOCH).await.unwrap();
    }

    #[tokio::test]
    async fn stores_that_do_not_keep_the_first_content_are_refused() {
        let check = async |answer, ignores_ranges, part: &str| {
            let name = "bad".parse().unwrap();
            let store = Overwriting { name, objects: Mutex::default(), answer, ignores_ranges };
            match probe(&store, Timestamp::UNIX_EPOCH).await {
                Err(StoreError::Unsupported { reason, .. }) => assert!(reason.contains(part), "{reason}"),
                other => panic!("{other:?}"),
            }
        };
        check(Put::Created, false, "it overwrites").await;
        check(Put::Exists, false, "changed the object").await;
        check(Put::Exists, true, "changed the object").await;
    }
}
