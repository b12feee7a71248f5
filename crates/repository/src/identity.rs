//! `repo.json`: what makes a place a store of this repository.
//!
//! The same small object is in every store of a repository. It is created once, by whoever creates the repository or
//! adds a store to it, and read before anything else is done with the store. A store without it is refused, never
//! initialised on the way: an unmounted directory must not become a new repository.

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::key;
use crate::store::{self, ObjectStore, Put, Remedy, StoreError};

/// The layout of a repository that this version reads and writes.
pub const FORMAT: u32 = 1;

/// Longest `repo.json`, in bytes.
pub const LIMIT_BYTES: u64 = 64 * 1024;

/// Which repository a store belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryIdentity {
    /// Identifies the repository; the same in all its stores.
    pub repository: Uuid,
    /// The version of the repository's layout, see [`FORMAT`].
    pub format: u32,
    /// When the repository was created.
    pub created: Timestamp,
}

/// Why a store's identity is not known or not right.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The store did not do what was asked.
    #[error("the identity of the repository could not be read or written")]
    Store(#[from] StoreError),
    /// There is an identity, and it is another repository's.
    #[error("the store belongs to repository {found}, expected {expected}: check which store is configured or mounted")]
    Foreign {
        /// What the store holds.
        found: Uuid,
        /// What it should hold.
        expected: Uuid,
    },
    /// The repository was written by a later version.
    #[error("the repository needs a newer version of this program: it has format {found}, known is {FORMAT}{critical}")]
    Newer {
        /// Its format.
        found: u32,
        /// Its critical fields that are not known here, as the end of a sentence.
        critical: String,
    },
    /// `repo.json` is not what it should be.
    #[error("repo.json is damaged: expected a JSON object with format, repository and created")]
    Damaged {
        /// What reading it said.
        source: serde_json::Error,
    },
}

impl IdentityError {
    /// What helps.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Store(error) => error.remedy(),
            Self::Foreign { .. } | Self::Newer { .. } => Remedy::Operator,
            Self::Damaged { .. } => Remedy::Corrupt,
        }
    }
}

/// The fields of `repo.json`. Unknown fields are ignored unless `critical` names them.
#[derive(Debug, Serialize, Deserialize)]
struct IdentityObject {
    format: u32,
    repository: String,
    created: Timestamp,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    critical: Vec<String>,
}

impl RepositoryIdentity {
    /// The identity of a new repository.
    pub fn new(repository: Uuid, created: Timestamp) -> Self {
        Self { repository, format: FORMAT, created }
    }

    /// The content of `repo.json`; the same text in every store.
    pub fn to_bytes(&self) -> Bytes {
        let object = IdentityObject {
            format: self.format,
            repository: self.repository.to_string(),
            created: self.created,
            critical: Vec::new(),
        };
        let mut text = serde_json::to_vec_pretty(&object).expect("strings and numbers always become JSON");
        text.push(b'\n');
        text.into()
    }

    /// Reads `repo.json`; refuses what only a newer version understands.
    pub fn from_bytes(text: &[u8]) -> Result<Self, IdentityError> {
        let damaged = |source| IdentityError::Damaged { source };
        // The version decides first, because a later format may lack today's fields.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let Version { format } = serde_json::from_slice(text).map_err(damaged)?;
        if format != FORMAT {
            return Err(IdentityError::Newer { found: format, critical: String::new() });
        }
        let object: IdentityObject = serde_json::from_slice(text).map_err(damaged)?;
        if !object.critical.is_empty() {
            let critical = format!(", and critical fields {}", object.critical.join(", "));
            return Err(IdentityError::Newer { found: format, critical });
        }
        let repository =
            object.repository.parse().map_err(|error: uuid::Error| damaged(serde::de::Error::custom(error)))?;
        Ok(Self { repository, format, created: object.created })
    }
}

/// The identity a store holds; `None` if the store itself says that it has none.
pub async fn read(store: &dyn ObjectStore) -> Result<Option<RepositoryIdentity>, IdentityError> {
    match store::read(store, &key::repository_identity(), LIMIT_BYTES).await? {
        Some(text) => RepositoryIdentity::from_bytes(&text).map(Some),
        None => Ok(None),
    }
}

/// Makes the store one of this repository. Doing it again is success; another repository's store is
/// [`IdentityError::Foreign`] and stays what it was.
pub async fn create(store: &dyn ObjectStore, identity: &RepositoryIdentity) -> Result<Put, IdentityError> {
    let put = store.put_new(&key::repository_identity(), identity.to_bytes().into()).await?;
    if put == Put::Exists {
        expect(store, identity.repository).await?;
    }
    Ok(put)
}

/// Reads the identity and refuses a store that has none or another repository's.
pub async fn expect(store: &dyn ObjectStore, repository: Uuid) -> Result<RepositoryIdentity, IdentityError> {
    match read(store).await? {
        Some(identity) if identity.repository == repository => Ok(identity),
        Some(identity) => Err(IdentityError::Foreign { found: identity.repository, expected: repository }),
        None => Err(IdentityError::Store(StoreError::Refused {
            store: store.name().clone(),
            reason: "it has no repo.json: expected a store of this repository; check what is mounted or configured"
                .to_owned(),
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::memory::MemoryStore;

    fn identity(repository: u128) -> RepositoryIdentity {
        RepositoryIdentity::new(Uuid::from_u128(repository), "2026-11-23T03:41:38Z".parse().unwrap())
    }

    #[tokio::test]
    async fn a_store_gets_its_identity_once() {
        let store = MemoryStore::new("repo1".parse().unwrap());
        assert_eq!(read(&store).await.unwrap(), None);
        assert!(matches!(
            expect(&store, Uuid::from_u128(1)).await,
            Err(IdentityError::Store(StoreError::Refused { .. }))
        ));
        assert_eq!(create(&store, &identity(1)).await.unwrap(), Put::Created);
        assert_eq!(create(&store, &identity(1)).await.unwrap(), Put::Exists);
        assert!(matches!(create(&store, &identity(2)).await, Err(IdentityError::Foreign { .. })));
        assert_eq!(read(&store).await.unwrap(), Some(identity(1)));
        assert_eq!(expect(&store, Uuid::from_u128(1)).await.unwrap(), identity(1));
    }

    #[test]
    fn only_what_is_understood_is_read() {
        let text = |more: &str, format: u32| {
            format!(
                "{{\"format\":{format},\"repository\":\"00000000-0000-0000-0000-000000000001\",\
                 \"created\":\"2026-11-23T03:41:38Z\"{more}}}"
            )
        };
        let read = |text: &str| RepositoryIdentity::from_bytes(text.as_bytes());
        assert_eq!(read(&text("", 1)).unwrap(), identity(1));
        assert_eq!(read(&text(",\"later\":1", 1)).unwrap(), identity(1));
        assert!(matches!(read(&text(",\"critical\":[\"later\"]", 1)), Err(IdentityError::Newer { .. })));
        assert!(matches!(read(&text("", 2)), Err(IdentityError::Newer { found: 2, .. })));
        assert!(matches!(read("{\"format\":7}"), Err(IdentityError::Newer { found: 7, .. })));
        for damaged in ["", "{}", "{\"format\":1}", "[]", "{\"format\":1,\"repository\":\"x\",\"created\":\"y\"}"] {
            assert!(matches!(read(damaged), Err(IdentityError::Damaged { .. })), "{damaged}");
        }
    }
}
