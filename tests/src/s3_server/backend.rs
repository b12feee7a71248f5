//! The S3 operations over [`Objects`] and [`Uploads`], as the `s3s` adapter calls them: signatures are already verified.

use std::collections::BTreeSet;
use std::io::SeekFrom;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, CommonPrefix, CompleteMultipartUploadInput,
    CompleteMultipartUploadOutput, CreateMultipartUploadInput, CreateMultipartUploadOutput, DeleteObjectInput,
    DeleteObjectOutput, DeleteObjectsInput, DeleteObjectsOutput, DeletedObject, ETag, ETagCondition, GetObjectInput,
    GetObjectOutput, HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput, ListObjectsV2Input,
    ListObjectsV2Output, PutObjectInput, PutObjectOutput, StreamingBlob, Timestamp, UploadPartInput, UploadPartOutput,
};
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use super::faults::Faults;
use super::objects::{Condition, Content, Object, Objects, Outcome};
use super::uploads::{Part, Unfit, Upload, Uploads};

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
    uploads: Uploads,
    faults: Faults,
}

impl Backend {
    pub(super) fn new(bucket: String, objects: Arc<Objects>, faults: Faults) -> Self {
        Self { bucket, objects, uploads: Uploads::default(), faults }
    }

    fn check_bucket(&self, bucket: &str) -> S3Result<()> {
        if bucket == self.bucket { Ok(()) } else { Err(s3_error!(NoSuchBucket, "there is no bucket {bucket}")) }
    }

    fn object(&self, bucket: &str, key: &str) -> S3Result<Object> {
        self.check_bucket(bucket)?;
        self.objects.get(key).ok_or_else(|| s3_error!(NoSuchKey, "there is no object {key}"))
    }

    fn condition(&self, none_match: Option<&ETagCondition>, matches: Option<&ETagCondition>) -> S3Result<Condition> {
        let plan = self.faults.plan();
        let asked = match (none_match, matches) {
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

    /// Takes a body in, which must be as long as was announced.
    async fn receive(&self, body: Option<StreamingBlob>, announced: Option<i64>) -> S3Result<Content> {
        let content = match body {
            Some(body) => {
                self.objects.receive(body_of(body)).await.map_err(|error| s3_error!(IncompleteBody, "{error}"))?
            }
            None => Content::Memory(Bytes::new()),
        };
        if announced.is_some_and(|length| length as u64 != content.len()) {
            content.discard();
            return Err(s3_error!(IncompleteBody));
        }
        Ok(content)
    }

    /// Gives an object its key, if the condition holds; gives its ETag.
    async fn store(&self, key: &str, content: Content, condition: Condition) -> S3Result<String> {
        let condition = self.race(key, condition).await?;
        match self.objects.put(key, content, &condition).map_err(|error| s3_error!(InvalidArgument, "{error}"))? {
            Outcome::Stored(etag) => Ok(etag),
            Outcome::Failed => Err(s3_error!(PreconditionFailed)),
            Outcome::Missing => Err(s3_error!(NoSuchKey)),
        }
    }

    /// Makes one object of the parts that are named.
    async fn complete(&self, upload: &Upload, input: &CompleteMultipartUploadInput) -> S3Result<String> {
        let condition = self.condition(input.if_none_match.as_ref(), input.if_match.as_ref())?;
        let parts = input.multipart_upload.as_ref().and_then(|named| named.parts.as_deref()).unwrap_or_default();
        let named: Vec<(i32, Option<String>)> = parts
            .iter()
            .map(|part| (part.part_number.unwrap_or_default(), part.e_tag.clone().map(ETag::into_value)))
            .collect();
        let contents = upload.contents(&named).map_err(|unfit| match unfit {
            Unfit::Empty => s3_error!(MalformedXML, "no parts are named"),
            Unfit::Order => s3_error!(InvalidPartOrder),
            Unfit::Unknown(number) => s3_error!(InvalidPart, "part {number} was not received with this ETag"),
            Unfit::Small(number) => s3_error!(EntityTooSmall, "part {number} is too small"),
        })?;
        let pieces = stream::iter(contents).then(|content| async move { send(&content, 0..content.len()).await });
        let pieces = pieces.map_err(anyhow::Error::from).map_ok(body_of).try_flatten();
        let whole = self.objects.receive(Box::pin(pieces)).await;
        self.store(&input.key, whole.map_err(|error| s3_error!(InternalError, "{error}"))?, condition).await
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
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        let condition = self.condition(input.if_none_match.as_ref(), input.if_match.as_ref())?;
        let content = self.receive(input.body, input.content_length).await?;
        let etag = self.store(&input.key, content, condition).await?;
        Ok(S3Response::new(PutObjectOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() }))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        let id = self.objects.new_etag();
        self.uploads.begin(&id, &input.key);
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..Default::default()
        }))
    }

    async fn upload_part(&self, request: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        let content = self.receive(input.body, input.content_length).await?;
        let etag = self.objects.new_etag();
        let part = Part { etag: etag.clone(), content };
        if let Err(part) = self.uploads.add(&input.upload_id, &input.key, input.part_number, part) {
            part.content.discard();
            return Err(s3_error!(NoSuchUpload));
        }
        Ok(S3Response::new(UploadPartOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        let upload = self.uploads.take(&input.upload_id, &input.key).ok_or_else(|| s3_error!(NoSuchUpload))?;
        let completed = self.complete(&upload, &input).await;
        match &completed {
            Ok(_) => upload.discard(),
            Err(_) => self.uploads.put_back(&input.upload_id, upload),
        }
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            e_tag: Some(ETag::Strong(completed?)),
            bucket: Some(input.bucket),
            key: Some(input.key),
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        let upload = self.uploads.take(&input.upload_id, &input.key).ok_or_else(|| s3_error!(NoSuchUpload))?;
        upload.discard();
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
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
        self.objects.remove_for(self.faults.plan().stale_listing(), &request.input.key);
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        let keys: Vec<String> = input.delete.objects.into_iter().map(|object| object.key).collect();
        let lag = self.faults.plan().stale_listing();
        for key in &keys {
            self.objects.remove_for(lag, key);
        }
        let told = keys.into_iter().map(|key| DeletedObject { key: Some(key), ..Default::default() });
        let deleted = Some(told.collect()).filter(|_| !input.delete.quiet.unwrap_or(false));
        Ok(S3Response::new(DeleteObjectsOutput { deleted, ..Default::default() }))
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
        let lag = self.faults.plan().stale_listing();
        let mut page = Page { contents: Vec::new(), prefixes: BTreeSet::new(), next: None };
        let mut last = String::new();
        for (key, object) in self.objects.list(prefix, after, lag) {
            let group = delimiter.filter(|delimiter| !delimiter.is_empty()).and_then(|delimiter| {
                let rest = &key[prefix.len()..];
                rest.find(delimiter).map(|at| format!("{prefix}{}", &rest[..at + delimiter.len()]))
            });
            // A page that ended with a group goes on behind all of it.
            let seen = group.as_ref().is_some_and(|group| page.prefixes.contains(group) || group.as_str() == after);
            if seen {
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
