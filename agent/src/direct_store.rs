//! The direct store, used only after it has shown that it is a store of the coordinator's repository.
//!
//! A mistyped bucket or prefix takes every put and lacks every object. WAL acknowledged from there would be found by
//! nobody, and its "absent" would end a recovery short. So nothing is put, and nothing called absent, where there is no
//! `repo.json`, or another repository's than the coordinator's; making one is `pgconvoy cluster create`'s.
//!
//! Invariants: the identity is read again when it was seen longer than [`SHOWN_FOR`] ago. It must be the one that the
//! coordinator named last, now or to an earlier run; while none ever did, it must stay the one first seen by this process.
//! A store that denies reading it is taken at its word, because a node may be given PutObject alone; such a
//! store denies reading anything else, too, and so calls nothing absent.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use process::clock::Monotonic;
use repository::identity::{self, IdentityError};
use repository::key::ObjectKey;
use repository::name::StoreName;
use repository::store::{Body, ByteRange, ByteStream, ListPage, ObjectStore, Put, Room, StoreError};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::repository_home::RepositoryHome;

/// How long a shown identity is believed.
const SHOWN_FOR: Duration = Duration::from_secs(60);

/// A store that must show its identity.
#[derive(Debug)]
pub struct DirectStore {
    inner: Arc<dyn ObjectStore>,
    home: Arc<RepositoryHome>,
    shown: Mutex<Option<Shown>>,
    /// The repository it was refused for, once that was said.
    refused: Mutex<Option<Uuid>>,
}

#[derive(Clone, Copy, Debug)]
struct Shown {
    repository: Uuid,
    at: Monotonic,
}

impl DirectStore {
    /// Watches over a store that must be of the repository that is `home`.
    pub fn new(inner: Arc<dyn ObjectStore>, home: Arc<RepositoryHome>) -> Self {
        Self { inner, home, shown: Mutex::default(), refused: Mutex::default() }
    }

    /// Looks at the store again and again until `stop`, so that a wrong one is told before it is needed.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        loop {
            if let Err(error) = self.identified().await {
                tracing::debug!(%error, "the direct store does not show its identity");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(SHOWN_FOR) => {}
            }
        }
    }

    fn shown(&self) -> Option<Shown> {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn identified(&self) -> Result<(), StoreError> {
        let (before, home) = (self.shown(), self.home.known());
        let is_home = |shown: &Shown| home.is_none_or(|home| home == shown.repository);
        if before.is_some_and(|shown| shown.at.elapsed() < SHOWN_FOR && is_home(&shown)) {
            return Ok(());
        }
        let refused = |reason: String| Err(StoreError::Refused { store: self.inner.name().clone(), reason });
        let found = match identity::read(self.inner.as_ref()).await {
            Ok(Some(identity)) => identity.repository,
            Ok(None) => {
                let reason = "it holds no repo.json: check bucket and prefix, or run pgconvoy cluster create";
                return refused(reason.to_owned());
            }
            Err(IdentityError::Store(StoreError::Denied { .. })) => return Ok(()),
            Err(IdentityError::Store(error)) => return Err(error),
            Err(error) => return refused(error.to_string()),
        };
        if let Some(home) = home.filter(|home| *home != found) {
            self.say_refused(found, home);
            return refused(format!(
                "it belongs to repository {found}, and the coordinator has {home}: check bucket and prefix"
            ));
        }
        let first = before.filter(|shown| home.is_none() && shown.repository != found);
        if let Some(Shown { repository, .. }) = first {
            return refused(format!("it belongs to repository {found}, and belonged to {repository}"));
        }
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let shown = Shown { repository: found, at: Monotonic::now() };
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(shown);
        Ok(())
    }

    /// Says once a repository that the direct road is closed, because somebody must mend it before it is needed.
    fn say_refused(&self, found: Uuid, expected: Uuid) {
        let before = self.refused.lock().unwrap_or_else(PoisonError::into_inner).replace(found);
        if before != Some(found) {
            tracing::error!(store = %self.inner.name(), %found, %expected,
                "the direct store belongs to another repository than the coordinator's and is not used; check bucket and prefix");
        }
    }
}

#[async_trait]
impl ObjectStore for DirectStore {
    fn name(&self) -> &StoreName {
        self.inner.name()
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        self.identified().await?;
        self.inner.put_new(key, body).await
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        self.identified().await?;
        self.inner.get(key, range).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        self.identified().await?;
        self.inner.head(key).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        self.identified().await?;
        self.inner.list(prefix, start_after, limit).await
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        self.identified().await?;
        self.inner.room().await
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use repository::identity::RepositoryIdentity;
    use repository::key;
    use repository::stores::memory::MemoryStore;

    use super::*;

    fn home(folder: &tempfile::TempDir) -> Arc<RepositoryHome> {
        Arc::new(RepositoryHome::open(&folder.path().join("repository")).unwrap())
    }

    #[tokio::test]
    async fn a_store_of_another_repository_than_the_coordinators_is_refused() {
        let (inner, folder) = (Arc::new(MemoryStore::new("s3".parse().unwrap())), tempfile::tempdir().unwrap());
        let (theirs, ours) = (Uuid::from_u128(7), Uuid::from_u128(8));
        let identity = RepositoryIdentity::new(theirs, process::clock::now());
        assert_eq!(identity::create(inner.as_ref(), &identity).await.unwrap(), Put::Created);
        let home = home(&folder);
        let store = DirectStore::new(inner, home.clone());
        let object = key::probe("object").unwrap();
        assert_eq!(store.head(&object).await.unwrap(), None, "no coordinator said yet which it must be");
        home.told(ours).unwrap();
        assert!(matches!(store.head(&object).await, Err(StoreError::Refused { .. })));
        let put = store.put_new(&object, Bytes::from_static(b"content").into()).await;
        assert!(matches!(put, Err(StoreError::Refused { .. })));
        assert!(matches!(store.list("", None, 1).await, Err(StoreError::Refused { .. })));
        home.told(theirs).unwrap();
        assert_eq!(store.head(&object).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_store_without_an_identity_takes_nothing_and_lacks_nothing() {
        let (inner, folder) = (Arc::new(MemoryStore::new("s3".parse().unwrap())), tempfile::tempdir().unwrap());
        let store = DirectStore::new(inner.clone(), home(&folder));
        let object = key::probe("object").unwrap();
        let put = || store.put_new(&object, Bytes::from_static(b"content").into());
        assert!(matches!(put().await, Err(StoreError::Refused { .. })));
        assert!(matches!(store.head(&object).await, Err(StoreError::Refused { .. })));
        assert!(matches!(store.list("", None, 1).await, Err(StoreError::Refused { .. })));
        assert!(inner.list("", None, 1).await.unwrap().objects.is_empty());
        let identity = RepositoryIdentity::new(Uuid::from_u128(7), process::clock::now());
        assert_eq!(identity::create(inner.as_ref(), &identity).await.unwrap(), Put::Created);
        assert_eq!(store.head(&object).await.unwrap(), None);
        assert_eq!(put().await.unwrap(), Put::Created);
        assert_eq!(store.head(&object).await.unwrap(), Some(7));
    }
}
