//! `StoreService`: reading the coordinator's stores, for nodes and operators without a mount or keys of their own.
//!
//! It writes nothing. *Absent* is answered only when the store itself said so; a silent store is an error, and so is one that has
//! not shown yet that it is of this repository: what lies under a mistyped path or bucket says nothing about ours.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use proto::convert::{FieldError, parsed};
use proto::store::store_service_server::StoreService;
use proto::store::{
    GetObjectRequest, GetObjectResponse, HeadObjectRequest, HeadObjectResponse, Health as WireHealth,
    ListObjectsRequest, ListObjectsResponse, ListStoresRequest, ListStoresResponse, ObjectEntry, Store,
};
use repository::key::ObjectKey;
use repository::store::{ByteRange, LIST_LIMIT, StoreError};
use tonic::{Request, Response, Status};

use crate::Coordinator;
use crate::refusal::Refusal;
use crate::stores::{Health, Slot, chain};

/// The service on its coordinator.
#[derive(Debug, Clone)]
pub struct StoreReader(pub Arc<Coordinator>);

impl StoreReader {
    fn slot(&self, name: &str) -> Result<Arc<Slot>, Refusal> {
        let slot = self.0.stores.get(name).ok_or_else(|| Refusal::StoreUnknown(name.to_owned()))?;
        match slot.health() {
            // A lagging store may answer by now; a refused one must not, because it is not ours, and what it lacks is not
            // absent from the archive.
            health @ (Health::Refused { .. } | Health::Empty { .. }) => {
                Err(Refusal::StoreFailed { store: name.to_owned(), detail: health.reason() })
            }
            health if !slot.is_identified() => {
                let detail = format!("it has not said yet which repository it belongs to: {}", health.reason());
                Err(Refusal::StoreFailed { store: name.to_owned(), detail })
            }
            _ => Ok(Arc::clone(slot)),
        }
    }

    async fn in_time<T>(
        &self,
        slot: &Slot,
        reading: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, Refusal> {
        match tokio::time::timeout(self.0.stores.patience(), reading).await {
            Ok(result) => result.map_err(|error| failed(slot, &error)),
            Err(_) => Err(failed(slot, &crate::clusters::silent(slot))),
        }
    }
}

fn failed(slot: &Slot, error: &StoreError) -> Refusal {
    let store = slot.name().to_string();
    match error {
        StoreError::NotFound { key, .. } => Refusal::ObjectAbsent { store, key: key.to_string() },
        error => Refusal::StoreFailed { store, detail: chain(error) },
    }
}

fn wire(health: &Health) -> WireHealth {
    match health {
        Health::Healthy => WireHealth::Healthy,
        Health::Unknown | Health::Lagging { .. } => WireHealth::Lagging,
        Health::Empty { .. } | Health::Refused { .. } => WireHealth::Refused,
        Health::Full { .. } => WireHealth::Full,
    }
}

#[tonic::async_trait]
impl StoreService for StoreReader {
    async fn list_stores(&self, _: Request<ListStoresRequest>) -> Result<Response<ListStoresResponse>, Status> {
        let store = |slot: &Arc<Slot>| Store {
            name: slot.name().to_string(),
            kind: slot.kind.word().to_owned(),
            health: wire(&slot.health()).into(),
            reason: slot.health().reason(),
        };
        Ok(Response::new(ListStoresResponse { stores: self.0.stores.all().iter().map(store).collect() }))
    }

    async fn list_objects(
        &self,
        request: Request<ListObjectsRequest>,
    ) -> Result<Response<ListObjectsResponse>, Status> {
        let request = request.into_inner();
        let limit = match request.page_size as usize {
            0 => LIST_LIMIT,
            size if size <= LIST_LIMIT => size,
            _ => return Err(Refusal::from(FieldError::new("page_size", "must be from 1 to 1000")).into()),
        };
        let slot = self.slot(&request.store)?;
        let after = Some(request.start_after.as_str()).filter(|after| !after.is_empty());
        let page = self.in_time(&slot, slot.store.list(&request.prefix, after, limit)).await?;
        let entry =
            |entry: repository::store::ObjectEntry| ObjectEntry { key: entry.key.to_string(), size: entry.size };
        let objects = page.objects.into_iter().map(entry).collect();
        Ok(Response::new(ListObjectsResponse { objects, more: page.more }))
    }

    async fn head_object(&self, request: Request<HeadObjectRequest>) -> Result<Response<HeadObjectResponse>, Status> {
        let request = request.into_inner();
        let slot = self.slot(&request.store)?;
        let key: ObjectKey = parsed("key", &request.key).map_err(Refusal::from)?;
        match self.in_time(&slot, slot.store.head(&key)).await? {
            Some(size) => Ok(Response::new(HeadObjectResponse { size })),
            None => Err(Refusal::ObjectAbsent { store: request.store, key: request.key }.into()),
        }
    }

    type GetObjectStream = Pin<Box<dyn Stream<Item = Result<GetObjectResponse, Status>> + Send>>;

    async fn get_object(&self, request: Request<GetObjectRequest>) -> Result<Response<Self::GetObjectStream>, Status> {
        let request = request.into_inner();
        let slot = self.slot(&request.store)?;
        let key: ObjectKey = parsed("key", &request.key).map_err(Refusal::from)?;
        let range = match (request.offset, request.length) {
            (0, 0) => ByteRange::All,
            (offset, 0) => ByteRange::From { offset },
            (offset, length) => ByteRange::Slice { offset, length },
        };
        let pieces = self.in_time(&slot, slot.store.get(&key, range)).await?;
        let answers = pieces.map(move |piece| match piece {
            Ok(chunk) => Ok(GetObjectResponse { chunk }),
            Err(error) => Err(failed(&slot, &error).into()),
        });
        Ok(Response::new(answers.boxed()))
    }
}
