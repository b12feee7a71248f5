//! A coordinator's store, read over the wire as if it were at hand: restore, fetch and info run the same code on it as on a
//! store they reach themselves.
//!
//! Invariants: read-only; a put is refused. Absence is said only when the coordinator gave the reason OBJECT_ABSENT, which it
//! does only when the store itself said so: NOT_FOUND alone is said of a store that is not known, too. Every call, and every
//! wait for the next piece, has a deadline.

use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt, TryStreamExt, stream};
use proto::store::store_service_client::StoreServiceClient;
use proto::store::{GetObjectRequest, HeadObjectRequest, ListObjectsRequest};
use repository::key::ObjectKey;
use repository::name::StoreName;
use repository::store::{
    Body, ByteRange, ByteStream, LIST_LIMIT, ListPage, ObjectEntry, ObjectStore, Put, Room, StoreError,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::coordinator_link::CoordinatorChannel;

/// Time for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// One store of a coordinator.
#[derive(Debug, Clone)]
pub struct RemoteStore {
    name: StoreName,
    client: StoreServiceClient<CoordinatorChannel>,
}

impl RemoteStore {
    /// The store of this name behind a coordinator.
    pub fn new(name: StoreName, client: StoreServiceClient<CoordinatorChannel>) -> Self {
        Self { name, client }
    }

    fn error(&self, status: Status, key: Option<&ObjectKey>) -> StoreError {
        let store = self.name.clone();
        match (status.code(), key) {
            (Code::NotFound, Some(key)) if is_object_absent(&status) => {
                StoreError::NotFound { store, key: key.clone() }
            }
            (Code::DataLoss, Some(key)) => {
                StoreError::Damaged { store, key: key.clone(), reason: status.message().to_owned() }
            }
            (Code::PermissionDenied | Code::Unauthenticated, _) => {
                StoreError::Denied { store, source: Box::new(status) }
            }
            (Code::FailedPrecondition | Code::NotFound, _) => {
                StoreError::Refused { store, reason: status.message().to_owned() }
            }
            (Code::Unimplemented | Code::InvalidArgument, _) => {
                StoreError::Unsupported { store, reason: status.message().to_owned() }
            }
            _ => StoreError::Unavailable { store, source: Box::new(status) },
        }
    }

    async fn in_time<T>(
        &self,
        operation: &'static str,
        key: Option<&ObjectKey>,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, StoreError> {
        match tokio::time::timeout(ANSWER_TIMEOUT, call).await {
            Ok(result) => result.map_err(|status| self.error(status, key)),
            Err(_) => Err(StoreError::Timeout { store: self.name.clone(), operation }),
        }
    }
}

fn is_object_absent(status: &Status) -> bool {
    status.get_details_error_info().is_some_and(|info| info.reason == "OBJECT_ABSENT")
}

#[async_trait]
impl ObjectStore for RemoteStore {
    fn name(&self) -> &StoreName {
        &self.name
    }

    async fn put_new(&self, _key: &ObjectKey, _body: Body) -> Result<Put, StoreError> {
        let reason = "a coordinator's store can only be read from here".to_owned();
        Err(StoreError::Unsupported { store: self.name.clone(), reason })
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        let (offset, length) = match range {
            ByteRange::All => (0, 0),
            ByteRange::From { offset } => (offset, 0),
            ByteRange::Slice { length: 0, .. } => return Ok(stream::empty().boxed()),
            ByteRange::Slice { offset, length } => (offset, length),
        };
        let request = GetObjectRequest { store: self.name.to_string(), key: key.as_str().to_owned(), offset, length };
        let mut client = self.client.clone();
        let response = self.in_time("get", Some(key), client.get_object(request)).await?.into_inner();
        let (store, key) = (self.clone(), key.clone());
        let pieces = stream::try_unfold(response, move |mut response| {
            let (store, key) = (store.clone(), key.clone());
            async move {
                let piece = store.in_time("get", Some(&key), response.message()).await?;
                Ok(piece.map(|piece| (piece.chunk, response)))
            }
        });
        Ok(pieces.try_filter(|piece| std::future::ready(!piece.is_empty())).boxed())
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        let request = HeadObjectRequest { store: self.name.to_string(), key: key.as_str().to_owned() };
        let mut client = self.client.clone();
        match self.in_time("head", Some(key), client.head_object(request)).await {
            Ok(response) => Ok(Some(response.into_inner().size)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        let request = ListObjectsRequest {
            store: self.name.to_string(),
            prefix: prefix.to_owned(),
            start_after: start_after.unwrap_or_default().to_owned(),
            page_size: u32::try_from(limit.clamp(1, LIST_LIMIT)).unwrap_or(1),
        };
        let mut client = self.client.clone();
        let page = self.in_time("list", None, client.list_objects(request)).await?.into_inner();
        let objects = page
            .objects
            .into_iter()
            .filter_map(|object| Some(ObjectEntry { key: ObjectKey::parse(&object.key).ok()?, size: object.size }))
            .collect();
        Ok(ListPage { objects, more: page.more })
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    #[tokio::test]
    async fn only_a_store_that_said_so_has_no_object() {
        let channel = tonic::transport::Channel::from_static("http://127.0.0.1:9").connect_lazy().into();
        let store = RemoteStore::new("repo1".parse().unwrap(), StoreServiceClient::new(channel));
        let key = ObjectKey::parse("c/main/x").unwrap();
        let said = |reason: &str| {
            let details = ErrorDetails::with_error_info(reason, proto::ERROR_DOMAIN, HashMap::new());
            store.error(Status::with_error_details(Code::NotFound, "no", details), Some(&key))
        };
        assert!(matches!(said("OBJECT_ABSENT"), StoreError::NotFound { .. }));
        assert!(matches!(said("STORE_UNKNOWN"), StoreError::Refused { .. }));
        assert!(matches!(store.error(Status::not_found("no route"), Some(&key)), StoreError::Refused { .. }));
    }
}
