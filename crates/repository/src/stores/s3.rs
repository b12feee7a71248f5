//! Objects in a bucket of an S3 service.
//!
//! Every object is one PUT with `If-None-Match: *`, which the service refuses with 412 if the object is there. What
//! an answer means is decided per operation: 412 to a put is *exists*, 409 to a put is *ask again*, 404 is *absent*
//! only for a key and never for a bucket.
//!
//! Invariants:
//! * region, endpoint and credentials are those of the configuration; nothing is looked up;
//! * the SDK makes one attempt; this file makes a few quick ones within a deadline, and callers own long waits;
//! * after an attempt of which the outcome is unknown, a put reads back what is there before it answers.
//!
//! A service that ignores `If-None-Match` would overwrite. That cannot be seen here; the probe sees it, and stores
//! are probed before they are used.

mod client;
mod fault;

use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::{ByteStream as SdkStream, Length};
use aws_sdk_s3::types::ObjectLockLegalHoldStatus;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::config::S3Config;
use crate::key::ObjectKey;
use crate::name::StoreName;
use crate::retry::{self, RetryPolicy};
use crate::store::{
    Body, ByteRange, ByteStream, Deleted, LIST_LIMIT, ListPage, ObjectEntry, ObjectStore, PIECE_LIMIT_BYTES, Put, Room,
    StoreError,
};
use fault::Fault;

/// How long an operation may take, all its attempts included.
const OPERATION_DEADLINE: Duration = Duration::from_secs(20);
/// How much longer a put may take for each MiB of its body: bodies move, if slowly, at 256 KiB/s.
const DEADLINE_PER_MIB: Duration = Duration::from_secs(4);
/// How long the next piece of an object being read may take.
const PIECE_DEADLINE: Duration = Duration::from_secs(20);
/// How long reading back after an unknown outcome may take.
const READ_BACK_DEADLINE: Duration = Duration::from_secs(10);
/// Attempts of one operation.
const ATTEMPTS: usize = 3;
/// The greatest offset put into a request; services read it into a signed number.
const OFFSET_LIMIT: u64 = i64::MAX as u64 - 1;

/// An S3 store.
#[derive(Debug)]
pub struct S3Store {
    name: StoreName,
    client: Client,
    bucket: String,
    /// Empty, or ends in a slash.
    prefix: String,
}

impl S3Store {
    /// Builds a client; reads the secret and the CA bundle from their files, and does not speak to the service.
    pub fn new(name: StoreName, config: &S3Config) -> Result<Self, StoreError> {
        let client = client::build(&name, config)?;
        let prefix = if config.prefix.is_empty() { String::new() } else { format!("{}/", config.prefix) };
        Ok(Self { name, client, bucket: config.bucket.clone(), prefix })
    }

    fn path(&self, key: &ObjectKey) -> String {
        format!("{}{key}", self.prefix)
    }

    fn timeout(&self, operation: &'static str) -> StoreError {
        StoreError::Timeout { store: self.name.clone(), operation }
    }

    fn not_found(&self, key: &ObjectKey) -> StoreError {
        StoreError::NotFound { store: self.name.clone(), key: key.clone() }
    }

    /// Repeats what asks nothing but an answer, while the service is unavailable, within the deadline.
    async fn attempts<T, F>(&self, operation: &'static str, mut attempt: impl FnMut() -> F) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, Fault>> + Send,
    {
        let deadline = Instant::now() + OPERATION_DEADLINE;
        let mut delays = retry::delays(RetryPolicy::QUICK).take(ATTEMPTS - 1);
        loop {
            let fault = match timeout_at(deadline, attempt()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(fault)) => fault,
                Err(_) => return Err(Fault::of(self.timeout(operation))),
            };
            match delays.next() {
                Some(delay) if fault.is_passing() => sleep(delay).await,
                _ => return Err(fault),
            }
        }
    }

    async fn put_once(&self, key: &ObjectKey, body: &Body) -> Result<(), Fault> {
        let content = match body {
            Body::Memory(bytes) => SdkStream::from(bytes.clone()),
            Body::File { path, len } => {
                SdkStream::read_from().path(path).length(Length::Exact(*len)).build().await.map_err(|error| {
                    Fault::of(StoreError::Body { key: key.clone(), source: std::io::Error::other(error) })
                })?
            }
        };
        let length = i64::try_from(body.len()).unwrap_or(i64::MAX);
        let request = self.client.put_object().bucket(&self.bucket).key(self.path(key));
        let request = request.if_none_match("*").content_length(length).body(content);
        request.send().await.map(drop).map_err(|error| Fault::classify(&self.name, "put", error))
    }

    async fn put_attempts(&self, key: &ObjectKey, body: &Body) -> Result<Put, StoreError> {
        let mib = u32::try_from(body.len() >> 20).unwrap_or(u32::MAX);
        let deadline = Instant::now() + OPERATION_DEADLINE.saturating_add(DEADLINE_PER_MIB.saturating_mul(mib));
        let mut delays = retry::delays(RetryPolicy::QUICK).take(ATTEMPTS - 1);
        // Whether an earlier attempt may have made the object that a later one finds.
        let mut maybe_ours = false;
        loop {
            let fault = match timeout_at(deadline, self.put_once(key, body)).await {
                Ok(Ok(())) => return Ok(Put::Created),
                Ok(Err(fault)) => fault,
                Err(_) => Fault::of(self.timeout("put")),
            };
            match fault.status {
                Some(412) if !maybe_ours => return Ok(Put::Exists),
                Some(412) => return Ok(if self.holds(key, body).await? { Put::Created } else { Put::Exists }),
                // Another conditional request for this key was under way, and neither is known to have won.
                Some(409) => {}
                _ => maybe_ours |= fault.error.outcome_unknown(),
            }
            match delays.next() {
                Some(delay) if fault.is_passing() => sleep(delay).await,
                _ if maybe_ours => return self.read_back(key, body, fault.error).await,
                _ => return Err(fault.error),
            }
        }
    }

    /// After the last attempt: if the object is there with our content, the put has happened.
    async fn read_back(&self, key: &ObjectKey, body: &Body, error: StoreError) -> Result<Put, StoreError> {
        match timeout(READ_BACK_DEADLINE, self.holds(key, body)).await {
            Ok(Ok(true)) => Ok(Put::Created),
            _ => Err(error),
        }
    }

    async fn holds(&self, key: &ObjectKey, body: &Body) -> Result<bool, StoreError> {
        if self.head(key).await? != Some(body.len()) {
            return Ok(false);
        }
        let mut stored = self.get(key, ByteRange::All).await?;
        let mut hash = Sha256::new();
        while let Some(piece) = stored.try_next().await? {
            hash.update(&piece);
        }
        let ours = body.sha256().await.map_err(|source| StoreError::Body { key: key.clone(), source })?;
        Ok(hash.finalize()[..] == ours)
    }

    async fn get_once(&self, key: &ObjectKey, range: Option<String>) -> Result<GetObjectOutput, Fault> {
        let request = self.client.get_object().bucket(&self.bucket).key(self.path(key)).set_range(range);
        request.send().await.map_err(|error| Fault::classify(&self.name, "get", error))
    }

    async fn head_once(&self, key: &ObjectKey) -> Result<Option<u64>, Fault> {
        let request = self.client.head_object().bucket(&self.bucket).key(self.path(key));
        let fault = match request.send().await {
            Ok(answer) => return Ok(Some(answer.content_length().unwrap_or(0).max(0) as u64)),
            Err(error) => Fault::classify(&self.name, "head", error),
        };
        if fault.status != Some(404) {
            return Err(fault);
        }
        // An answer to HEAD has no body that could say whether the key or the whole bucket is missing; a listing has.
        let page = self.list_once(key.as_str(), None, 1).await?;
        Ok(page.objects.into_iter().find(|entry| entry.key == *key).map(|entry| entry.size))
    }

    async fn delete_once(&self, key: &ObjectKey) -> Result<Deleted, Fault> {
        let request = self.client.delete_object().bucket(&self.bucket).key(self.path(key));
        let fault = match request.send().await {
            Ok(_) => return Ok(Deleted::Removed),
            Err(error) => Fault::classify(&self.name, "delete", error),
        };
        if fault.is_missing_key() {
            return Ok(Deleted::Absent);
        }
        if !fault.may_be_a_lock() {
            return Err(fault);
        }
        match self.locked_until(key).await {
            Some(until) => Ok(Deleted::Retained { until }),
            None if fault.names_a_lock() => Ok(Deleted::Retained { until: None }),
            None => Err(fault),
        }
    }

    /// Until when an object is locked; `None` if the service does not say that it is.
    async fn locked_until(&self, key: &ObjectKey) -> Option<Option<Timestamp>> {
        let about = self.client.head_object().bucket(&self.bucket).key(self.path(key)).send().await.ok()?;
        let until = about.object_lock_retain_until_date().map(|until| Timestamp::from_second(until.secs()).ok());
        let held = about.object_lock_legal_hold_status() == Some(&ObjectLockLegalHoldStatus::On);
        until.or(held.then_some(None))
    }

    async fn list_once(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, Fault> {
        let mut after = start_after.map(|after| format!("{}{after}", self.prefix));
        loop {
            let request = self.client.list_objects_v2().bucket(&self.bucket).max_keys(limit as i32);
            let request = request.prefix(format!("{}{prefix}", self.prefix)).set_start_after(after.clone());
            let answer = request.send().await.map_err(|error| Fault::classify(&self.name, "list", error))?;
            let found: Vec<(&str, u64)> = answer
                .contents()
                .iter()
                .filter_map(|object| Some((object.key()?, object.size().unwrap_or(0).max(0) as u64)))
                .collect();
            let ascending = found.windows(2).all(|pair| pair[0].0 < pair[1].0);
            if !ascending || found.first().is_some_and(|(key, _)| Some(*key) <= after.as_deref()) {
                return Err(Fault::of(StoreError::Unsupported {
                    store: self.name.clone(),
                    reason: "it does not list objects in order after a given key".to_owned(),
                }));
            }
            let objects: Vec<ObjectEntry> = found.iter().filter_map(|(key, size)| self.entry(key, *size)).collect();
            let more = answer.is_truncated().unwrap_or(false) && !found.is_empty();
            if !more || !objects.is_empty() {
                return Ok(ListPage { objects, more });
            }
            // A page of nothing but foreign names: the caller could not go on from it.
            after = found.last().map(|(key, _)| (*key).to_owned());
        }
    }

    fn entry(&self, path: &str, size: u64) -> Option<ObjectEntry> {
        let key = ObjectKey::parse(path.strip_prefix(&self.prefix)?).ok()?;
        Some(ObjectEntry { key, size })
    }

    /// The body of an answer as our stream: each piece with a deadline, the whole as long as announced.
    fn pieces(&self, answer: GetObjectOutput) -> ByteStream {
        let announced = answer.content_length().map(|length| length.max(0) as u64);
        let reading = Reading { store: self.name.clone(), body: answer.body, rest: Bytes::new(), left: announced };
        stream::try_unfold(
            reading,
            |mut reading| async move { Ok(reading.next().await?.map(|piece| (piece, reading))) },
        )
        .boxed()
    }
}

/// A body on its way.
struct Reading {
    store: StoreName,
    body: SdkStream,
    rest: Bytes,
    /// What is still to come, if it was announced.
    left: Option<u64>,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        while self.rest.is_empty() {
            let piece = timeout(PIECE_DEADLINE, self.body.next()).await;
            let piece = piece.map_err(|_| StoreError::Timeout { store: self.store.clone(), operation: "get" })?;
            match piece {
                Some(Ok(piece)) => self.rest = piece,
                Some(Err(error)) => return Err(self.broken(error)),
                None if self.left.is_none_or(|left| left == 0) => return Ok(None),
                None => return Err(self.broken("the body ended before its announced length")),
            }
        }
        let piece = self.rest.split_to(self.rest.len().min(PIECE_LIMIT_BYTES));
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(piece.len() as u64).unwrap_or(u64::MAX);
        }
        Ok(Some(piece))
    }

    fn broken(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
        StoreError::Unavailable { store: self.store.clone(), source: error.into() }
    }
}

#[async_trait]
impl ObjectStore for S3Store {
    fn name(&self) -> &StoreName {
        &self.name
    }

    async fn put_new(&self, key: &ObjectKey, body: Body) -> Result<Put, StoreError> {
        self.put_attempts(key, &body).await
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<ByteStream, StoreError> {
        let (header, offset) = match range {
            ByteRange::All => (None, 0),
            ByteRange::From { offset } => (Some(format!("bytes={offset}-")), offset),
            ByteRange::Slice { offset, length } => {
                let last = offset.saturating_add(length.saturating_sub(1)).min(OFFSET_LIMIT);
                (Some(format!("bytes={offset}-{last}")), offset)
            }
        };
        if offset > OFFSET_LIMIT || matches!(range, ByteRange::Slice { length: 0, .. }) {
            let size = self.head(key).await?;
            return size.map(|_| stream::empty().boxed()).ok_or_else(|| self.not_found(key));
        }
        let answer = match self.attempts("get", || self.get_once(key, header.clone())).await {
            Ok(answer) => answer,
            Err(fault) if fault.is_missing_key() => return Err(self.not_found(key)),
            // The range lies behind the end of an object that is there.
            Err(fault) if fault.status == Some(416) => return Ok(stream::empty().boxed()),
            Err(fault) => return Err(fault.error),
        };
        if header.is_some() && !answer.content_range().is_some_and(|range| starts_at(range, offset)) {
            return Err(StoreError::Unsupported {
                store: self.name.clone(),
                reason: "it does not answer a request for a range with that range".to_owned(),
            });
        }
        Ok(self.pieces(answer))
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        self.attempts("head", || self.head_once(key)).await.map_err(|fault| fault.error)
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        let limit = limit.clamp(1, LIST_LIMIT);
        let page = self.attempts("list", || self.list_once(prefix, start_after, limit)).await;
        page.map_err(|fault| fault.error)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<Deleted, StoreError> {
        self.attempts("delete", || self.delete_once(key)).await.map_err(|fault| fault.error)
    }

    async fn room(&self) -> Result<Option<Room>, StoreError> {
        Ok(None)
    }
}

/// Whether a Content-Range begins at `offset`, as in `bytes 10-19/100`.
fn starts_at(content_range: &str, offset: u64) -> bool {
    let start = content_range.trim_start_matches("bytes").trim_start().split('-').next();
    start.and_then(|start| start.parse().ok()) == Some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_range_names_its_start() {
        assert!(starts_at("bytes 10-19/100", 10));
        assert!(!starts_at("bytes 0-99/100", 10));
        assert!(!starts_at("", 0));
        assert!(!starts_at("bytes */100", 0));
    }
}
