//! The project's S3 server is a good store, its faults bite, and our S3 store takes them as it should.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier};
use bytes::Bytes;
use repository::config::{Checksums, S3Config, Secret, SecretSource};
use repository::conformance;
use repository::identity;
use repository::key::ObjectKey;
use repository::probe::probe;
use repository::store::{ByteRange, Deleted, ObjectStore, Put, StoreError, collect};
use repository::stores::s3::S3Store;
use tests::s3_server::{Fault, FaultPlan, Operation, Options, Rule, S3Server};

fn config(server: &S3Server) -> S3Config {
    S3Config {
        endpoint: Some(server.endpoint.clone()),
        region: "us-east-1".to_owned(),
        bucket: server.bucket.clone(),
        prefix: "a/prefix".to_owned(),
        path_style: true,
        access_key_id: server.access_key.clone(),
        secret_access_key: SecretSource::Given(Secret::new(&server.secret_key)),
        ca_file: None,
        checksums: Checksums::Auto,
    }
}

fn open(config: &S3Config) -> Arc<S3Store> {
    Arc::new(S3Store::new("bucket".parse().unwrap(), config).unwrap())
}

fn start() -> (S3Server, Arc<S3Store>) {
    let server = S3Server::start().unwrap();
    let store = open(&config(&server));
    (server, store)
}

fn key(text: &str) -> ObjectKey {
    ObjectKey::parse(text).unwrap()
}

async fn put(store: &S3Store, text: &str, content: &'static str) -> Result<Put, StoreError> {
    store.put_new(&key(text), Bytes::from_static(content.as_bytes()).into()).await
}

async fn read(store: &S3Store, text: &str) -> Result<Bytes, StoreError> {
    collect(store.get(&key(text), ByteRange::All).await?, 1 << 20).await
}

fn now() -> jiff::Timestamp {
    process::clock::now()
}

#[tokio::test(flavor = "multi_thread")]
async fn conformance_in_memory() {
    let (server, store) = start();
    assert!(conformance::run(store.clone()).await > 0);
    probe(&*store, now()).await.unwrap();
    assert!(server.keys().iter().all(|key| key.starts_with("a/prefix/")));
    assert!(server.faults.counts().delete > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn conformance_on_disk_and_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options { directory: Some(directory.path().to_owned()), ..Options::default() };
    let server = S3Server::start_with(options.clone()).unwrap();
    assert!(conformance::run(open(&config(&server))).await > 0);
    let keys = server.keys();
    drop(server);
    let server = S3Server::start_with(options).unwrap();
    assert_eq!(server.keys(), keys);
    let store = open(&config(&server));
    assert!(identity::read(&*store).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn conformance_with_the_checksums_of_aws_and_without_a_prefix() {
    let server = S3Server::start().unwrap();
    let store = open(&S3Config { checksums: Checksums::Aws, prefix: String::new(), ..config(&server) });
    assert!(conformance::run(store).await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_a_lock_refuses_is_told_as_that() {
    let (server, store) = start();
    assert_eq!(put(&store, "c/object", "x").await.unwrap(), Put::Created);
    server.faults.add(Some(Operation::Delete), Fault::Locked, None);
    assert_eq!(store.delete(&key("c/object")).await.unwrap(), Deleted::Retained { until: None });
    server.faults.heal();
    assert_eq!(store.delete(&key("c/object")).await.unwrap(), Deleted::Removed);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_and_the_bucket_are_checked() {
    let server = S3Server::start().unwrap();
    let check = async |config: S3Config, expected: fn(&StoreError) -> bool| {
        let store = open(&config);
        let errors = [
            put(&store, "c/object", "x").await.err(),
            store.get(&key("c/object"), ByteRange::All).await.err(),
            store.head(&key("c/object")).await.err(),
            store.list("", None, 1).await.err(),
        ];
        assert!(errors.iter().all(|error| error.as_ref().is_some_and(expected)), "{errors:?}");
    };
    let denied = |error: &StoreError| matches!(error, StoreError::Denied { .. });
    let wrong = SecretSource::Given(Secret::new("wrong"));
    check(S3Config { secret_access_key: wrong, ..config(&server) }, denied).await;
    check(S3Config { access_key_id: "unknown".to_owned(), ..config(&server) }, denied).await;
    let refused = |error: &StoreError| matches!(error, StoreError::Refused { .. });
    check(S3Config { bucket: "elsewhere".to_owned(), ..config(&server) }, refused).await;
    assert!(server.keys().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_that_do_not_mean_their_conditions_are_found_out() {
    let check = async |change: fn(&mut FaultPlan), part: &str| {
        let (server, store) = start();
        server.faults.change(change);
        match probe(&*store, now()).await {
            Err(StoreError::Unsupported { reason, .. }) => assert!(reason.contains(part), "{reason}"),
            other => panic!("{other:?}"),
        }
    };
    check(|plan| plan.ignore_conditions = true, "it overwrites").await;
    check(|plan| plan.racy_conditions = true, "racing creators").await;
    check(|plan| plan.refuse_conditions = true, "501").await;
    check(|plan| plan.stale_listing_ms = 60_000, "does not show").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_reply_is_found_to_be_our_own_work() {
    let (server, store) = start();
    server.faults.add(Some(Operation::Put), Fault::LostReply, Some(1));
    assert_eq!(put(&store, "c/once", "x").await.unwrap(), Put::Created);
    server.faults.add(Some(Operation::Put), Fault::LostReply, Some(3));
    assert_eq!(put(&store, "c/thrice", "x").await.unwrap(), Put::Created, "read back after the last attempt");
    assert_eq!(put(&store, "c/thrice", "y").await.unwrap(), Put::Exists);
    server.faults.add(Some(Operation::Put), Fault::LostReply, Some(1));
    assert_eq!(put(&store, "c/thrice", "y").await.unwrap(), Put::Exists, "another's content is not ours");
    assert_eq!(read(&store, "c/thrice").await.unwrap(), "x");
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_that_pass_are_waited_for_and_others_reported() {
    let (server, store) = start();
    server.faults.add(None, Fault::SlowDown, Some(2));
    assert_eq!(put(&store, "c/object", "content").await.unwrap(), Put::Created);
    server.faults.add(None, Fault::ResetBeforeCommit, Some(2));
    assert_eq!(store.head(&key("c/object")).await.unwrap(), Some(7));
    server.faults.add(Some(Operation::Put), Fault::ResetBeforeCommit, None);
    assert!(matches!(put(&store, "c/other", "x").await, Err(StoreError::Unavailable { .. })));
    server.faults.heal();
    assert_eq!(store.head(&key("c/other")).await.unwrap(), None);
    server.faults.add(Some(Operation::Get), Fault::TruncatedRead(3), Some(1));
    assert!(matches!(read(&store, "c/object").await, Err(StoreError::Unavailable { .. })));
    server.faults.add(None, Fault::Latency(50), Some(1));
    assert_eq!(read(&store, "c/object").await.unwrap(), "content");
    server.flip_bit("a/prefix/c/object").unwrap();
    assert_ne!(read(&store, "c/object").await.unwrap(), "content");
    let begun = Instant::now();
    server.faults.add(None, Fault::SlowDown, None);
    assert!(store.list("", None, 1).await.unwrap_err().is_outage());
    assert!(begun.elapsed() < Duration::from_secs(5), "quick attempts only");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_service_times_out_and_a_missing_one_is_known_at_once() {
    let (server, store) = start();
    assert_eq!(put(&store, "c/object", "x").await.unwrap(), Put::Created);
    server.faults.refuse_connections(true);
    let begun = Instant::now();
    assert!(matches!(store.head(&key("c/object")).await, Err(StoreError::Unavailable { .. })));
    assert!(begun.elapsed() < Duration::from_secs(5));
    server.faults.set(FaultPlan {
        rules: vec![Rule { fault: Fault::Hang, operation: None, key_contains: String::new(), times: None }],
        ..FaultPlan::default()
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.faults.counts().head == 0 {
        assert!(Instant::now() < deadline, "the server listens again");
        let _ = tokio::time::timeout(Duration::from_millis(200), store.head(&key("c/object"))).await;
    }
    let error = store.head(&key("c/object")).await.unwrap_err();
    assert!(matches!(error, StoreError::Timeout { operation: "head", .. }), "{error:?}");
    server.faults.heal();
    assert_eq!(store.head(&key("c/object")).await.unwrap(), Some(1));
}

/// A client that asks for more than our store does.
fn client(server: &S3Server) -> Client {
    let credentials = Credentials::new(&server.access_key, &server.secret_key, None, None, "test");
    let config = aws_sdk_s3::config::Builder::new()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("us-east-1"))
        .credentials_provider(credentials)
        .force_path_style(true)
        .endpoint_url(&server.endpoint)
        .http_client(aws_smithy_http_client::Builder::new().build_http());
    Client::from_conf(config.build())
}

fn code<T, E: ProvideErrorMetadata, R>(result: Result<T, SdkError<E, R>>) -> String {
    let error = result.err().expect("it is refused");
    error.as_service_error().and_then(|error| error.code().map(str::to_owned)).unwrap_or_default()
}

/// Least size of a part that is not the last.
const PART: usize = 5 << 20;

async fn multipart(server: &S3Server) {
    let client = client(server);
    let bucket = server.bucket.as_str();
    let begin = async || {
        let begun = client.create_multipart_upload().bucket(bucket).key("c/parts").send().await.unwrap();
        begun.upload_id().unwrap().to_owned()
    };
    let send = async |id: &str, number: i32, byte: u8, length: usize| {
        let request = client.upload_part().bucket(bucket).key("c/parts").upload_id(id).part_number(number);
        let sent = request.body(vec![byte; length].into()).send().await.unwrap();
        CompletedPart::builder().part_number(number).e_tag(sent.e_tag().unwrap()).build()
    };
    let complete = async |id: &str, parts: &[CompletedPart]| {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts.to_vec())).build();
        let request = client.complete_multipart_upload().bucket(bucket).key("c/parts").upload_id(id);
        request.if_none_match("*").multipart_upload(parts).send().await
    };
    let (first, second) = (begin().await, begin().await);
    let parts = [send(&first, 1, b'a', PART).await, send(&first, 2, b'b', 3).await];
    let others = [send(&second, 1, b'x', 1).await, send(&second, 2, b'y', 1).await];
    assert_eq!(code(complete(&first, &[parts[1].clone(), parts[0].clone()]).await), "InvalidPartOrder");
    assert_eq!(code(complete(&first, &[parts[0].clone(), others[1].clone()]).await), "InvalidPart");
    assert_eq!(code(complete(&second, &others).await), "EntityTooSmall");
    assert!(server.keys().is_empty(), "parts are no objects");
    let completed = complete(&first, &parts).await.unwrap();
    let got = client.get_object().bucket(bucket).key("c/parts").send().await.unwrap();
    assert_eq!(got.e_tag(), completed.e_tag());
    let content = got.body.collect().await.unwrap().into_bytes();
    assert!(content.len() == PART + 3 && content[..PART].iter().all(|byte| *byte == b'a') && content.ends_with(b"bbb"));
    // What exists is kept, and the upload that failed is still there to be given up.
    assert_eq!(code(complete(&second, &others[..1]).await), "PreconditionFailed");
    assert_eq!(code(complete(&first, &parts).await), "NoSuchUpload");
    let abort = async || client.abort_multipart_upload().bucket(bucket).key("c/parts").upload_id(&second).send().await;
    abort().await.unwrap();
    assert_eq!(code(abort().await), "NoSuchUpload");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_multipart_upload_becomes_one_object_or_none() {
    multipart(&S3Server::start().unwrap()).await;
    let directory = tempfile::tempdir().unwrap();
    let options = Options { directory: Some(directory.path().to_owned()), ..Options::default() };
    multipart(&S3Server::start_with(options).unwrap()).await;
    let left = std::fs::read_dir(directory.path().join("incoming")).unwrap().count();
    assert_eq!(left, 0, "no part outlives its upload");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_listed_by_groups_and_deleted_at_once() {
    let server = S3Server::start().unwrap();
    let (client, bucket) = (client(&server), server.bucket.as_str());
    for name in ["a/1", "a/2", "b/1", "c"] {
        client.put_object().bucket(bucket).key(name).body(Bytes::from_static(b"x").into()).send().await.unwrap();
    }
    let page = client.list_objects_v2().bucket(bucket).delimiter("/").max_keys(2).send().await.unwrap();
    let groups: Vec<_> = page.common_prefixes().iter().filter_map(|group| group.prefix()).collect();
    assert_eq!((groups, page.contents().len(), page.is_truncated()), (vec!["a/", "b/"], 0, Some(true)));
    let next = page.next_continuation_token().unwrap();
    let rest = client.list_objects_v2().bucket(bucket).delimiter("/").continuation_token(next).send().await.unwrap();
    let keys: Vec<_> = rest.contents().iter().filter_map(|object| object.key()).collect();
    assert_eq!((keys, rest.common_prefixes().len(), rest.is_truncated()), (vec!["c"], 0, Some(false)));
    let named = ["a/1", "b/1", "absent"].map(|name| ObjectIdentifier::builder().key(name).build().unwrap());
    let delete = Delete::builder().set_objects(Some(named.to_vec())).quiet(true).build().unwrap();
    let deleted = client.delete_objects().bucket(bucket).delete(delete).send().await.unwrap();
    assert!(deleted.errors().is_empty());
    assert_eq!(server.keys(), ["a/2", "c"]);
}
