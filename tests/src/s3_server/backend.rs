//! The S3 operations over [`Objects`], as the `s3s` adapter calls them: signatures are already verified.

use std::collections::BTreeSet;
use std::io::SeekFrom;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream;
use s3s::dto::{
    CommonPrefix, DeleteObjectInput, DeleteObjectOutput, ETag, ETagCondition, GetObjectInput, GetObjectOutput,
    HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput, ListObjectsV2Input, ListObjectsV2Output,
    PutObjectInput, PutObjectOutput, StreamingBlob, Timestamp,
};
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use super::faults::Faults;
use super::objects::{Condition, Content, Object, Objects, Outcome};

/// Most keys of one listing, as in S3.
const LIST_LIMIT: i32 = 1000;
/// Pieces in which a body is sent.
const PIECE_BYTES: usize = 256 * 1024;
/// Between looking up and creating, if that is to race.
const RACE_PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct Backend {
    bucket: String,
    objects: Arc<Objects>,
    faults: Faults,
}

impl Backend {
    pub(super) fn new(bucket: String, objects: Arc<Objects>, faults: Faults) -> Self {
        Self { bucket, objects, faults }
    }

    fn check_bucket(&self, bucket: &str) -> S3Result<()> {
        if bucket == self.bucket { Ok(()) } else { Err(s3_error!(NoSuchBucket, "there is no bucket {bucket}")) }
    }

    fn object(&self, bucket: &str, key: &str) -> S3Result<Object> {
        self.check_bucket(bucket)?;
        self.objects.get(key).ok_or_else(|| s3_error!(NoSuchKey, "there is no object {key}"))
    }

    fn condition(&self, input: &PutObjectInput) -> S3Result<Condition> {
        let plan = self.faults.plan();
        let asked = match (&input.if_none_match, &input.if_match) {
            (None, None) => return Ok(Condition::None),
            (Some(ETagCondition::Any), None) => Condition::Absent,
            (None, Some(ETagCondition::ETag(etag))) => Condition::Matches(etag.value().to_owned()),
            _ => return Err(s3_error!(NotImplemented, "only If-None-Match: * and If-Match with an ETag are known")),
        };
        if plan.refuse_conditions {
            return Err(s3_error!(NotImplemented, "conditions are not implemented"));
        }
        Ok(if plan.ignore_conditions { Condition::None } else { asked })
    }

    /// A server whose conditions are no more than a look before the jump.
    async fn race(&self, key: &str, condition: Condition) -> S3Result<Condition> {
        if !self.faults.plan().racy_conditions || condition != Condition::Absent {
            return Ok(condition);
        }
        if self.objects.get(key).is_some() {
            return Err(s3_error!(PreconditionFailed));
        }
        tokio::time::sleep(RACE_PAUSE).await;
        Ok(Condition::None)
    }
}

fn etag(object: &Object) -> ETag {
    ETag::Strong(object.etag.clone())
}

fn modified(object: &Object) -> Timestamp {
    object.modified.into()
}

#[async_trait]
impl S3 for Backend {
    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let mut input = request.input;
        self.check_bucket(&input.bucket)?;
        let condition = self.condition(&input)?;
        let announced = input.content_length;
        let content = match input.body.take() {
            Some(body) => {
                self.objects.receive(body_of(body)).await.map_err(|error| s3_error!(IncompleteBody, "{error}"))?
            }
            None => Content::Memory(Bytes::new()),
        };
        if announced.is_some_and(|length| length as u64 != content.len()) {
            return Err(s3_error!(IncompleteBody));
        }
        let condition = self.race(&input.key, condition).await?;
        let outcome = self.objects.put(&input.key, content, &condition);
        match outcome.map_err(|error| s3_error!(InvalidArgument, "{error}"))? {
            Outcome::Stored(etag) => {
                Ok(S3Response::new(PutObjectOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() }))
            }
            Outcome::Failed => Err(s3_error!(PreconditionFailed)),
            Outcome::Missing => Err(s3_error!(NoSuchKey)),
        }
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        let object = self.object(&input.bucket, &input.key)?;
        let size = object.content.len();
        let range = match input.range {
            Some(range) => range.check(size)?,
            None => 0..size,
        };
        let content_range =
            input.range.map(|_| format!("bytes {}-{}/{size}", range.start, range.end.saturating_sub(1)));
        let length = range.end - range.start;
        Ok(S3Response::new(GetObjectOutput {
            body: Some(send(&object.content, range).await.map_err(|error| s3_error!(InternalError, "{error}"))?),
            content_length: Some(length as i64),
            content_range,
            accept_ranges: Some("bytes".to_owned()),
            e_tag: Some(etag(&object)),
            last_modified: Some(modified(&object)),
            ..Default::default()
        }))
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let object = self.object(&request.input.bucket, &request.input.key)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(object.content.len() as i64),
            e_tag: Some(etag(&object)),
            last_modified: Some(modified(&object)),
            ..Default::default()
        }))
    }

    async fn head_bucket(&self, request: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.check_bucket(&request.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.check_bucket(&request.input.bucket)?;
        let _ = self.objects.remove(&request.input.key);
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        let limit = input.max_keys.unwrap_or(LIST_LIMIT).clamp(0, LIST_LIMIT);
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = input.continuation_token.clone().or(input.start_after.clone()).unwrap_or_default();
        let page = self.page(&prefix, &after, input.delimiter.as_deref(), limit as usize);
        let count = page.contents.len() + page.prefixes.len();
        let prefixes = page.prefixes.into_iter().map(|prefix| CommonPrefix { prefix: Some(prefix) });
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: input.prefix,
            start_after: input.start_after,
            continuation_token: input.continuation_token,
            delimiter: input.delimiter,
            max_keys: Some(limit),
            key_count: Some(count as i32),
            is_truncated: Some(page.next.is_some()),
            next_continuation_token: page.next,
            contents: Some(page.contents),
            common_prefixes: Some(prefixes.collect()),
            ..Default::default()
        }))
    }
}

struct Page {
    contents: Vec<s3s::dto::Object>,
    prefixes: BTreeSet<String>,
    /// The last key or prefix of this page, if there is more.
    next: Option<String>,
}

impl Backend {
    fn page(&self, prefix: &str, after: &str, delimiter: Option<&str>, limit: usize) -> Page {
        let stale = self.faults.plan().stale_listing();
        let mut page = Page { contents: Vec::new(), prefixes: BTreeSet::new(), next: None };
        let mut last = String::new();
        for (key, object) in self.objects.list(prefix, after) {
            let group = delimiter.filter(|delimiter| !delimiter.is_empty()).and_then(|delimiter| {
                let rest = &key[prefix.len()..];
                rest.find(delimiter).map(|at| format!("{prefix}{}", &rest[..at + delimiter.len()]))
            });
            // A page that ended with a group goes on behind all of it.
            let seen = group.as_ref().is_some_and(|group| page.prefixes.contains(group) || group.as_str() == after);
            if seen || object.created.elapsed() < stale {
                continue;
            }
            if page.contents.len() + page.prefixes.len() == limit {
                page.next = Some(last);
                break;
            }
            last = group.clone().unwrap_or_else(|| key.clone());
            match group {
                Some(group) => drop(page.prefixes.insert(group)),
                None => page.contents.push(s3s::dto::Object {
                    size: Some(object.content.len() as i64),
                    e_tag: Some(etag(&object)),
                    last_modified: Some(modified(&object)),
                    key: Some(key),
                    ..Default::default()
                }),
            }
        }
        page
    }
}

fn body_of(body: StreamingBlob) -> impl futures_util::Stream<Item = Result<Bytes, anyhow::Error>> + Unpin {
    use futures_util::TryStreamExt;
    body.map_err(|error| anyhow::anyhow!("{error}"))
}

async fn send(content: &Content, range: std::ops::Range<u64>) -> std::io::Result<StreamingBlob> {
    match content {
        Content::Memory(bytes) => {
            let wanted = bytes.slice(range.start as usize..range.end as usize);
            let pieces: Vec<std::io::Result<Bytes>> = (0..wanted.len())
                .step_by(PIECE_BYTES)
                .map(|at| Ok(wanted.slice(at..wanted.len().min(at + PIECE_BYTES))))
                .collect();
            Ok(StreamingBlob::wrap(stream::iter(pieces)))
        }
        Content::File { path, .. } => {
            let mut file = tokio::fs::File::open(path).await?;
            file.seek(SeekFrom::Start(range.start)).await?;
            let wanted = file.take(range.end - range.start);
            Ok(StreamingBlob::wrap(ReaderStream::with_capacity(wanted, PIECE_BYTES)))
        }
    }
}
