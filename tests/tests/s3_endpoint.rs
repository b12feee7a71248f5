//! The suite of stores and the probe on the S3 service that scenarios use: the one that the environment names, or the
//! project's own server without one.
//!
//! `PGCONVOY_TEST_S3_ENDPOINT`, `…_BUCKET`, `…_ACCESS_KEY`, `…_SECRET_KEY`; `…_REGION` is `us-east-1` unless set, and
//! `…_CA_FILE` says whom an https endpoint is signed by. What is written to a named service stays there, under a prefix
//! of its own. Which service it was is printed, so that nobody takes one for the other.

use std::sync::Arc;

use repository::config::{Checksums, S3Config, Secret, SecretSource};
use repository::store::ObjectStore;
use repository::stores::s3::S3Store;
use repository::{conformance, probe};
use tests::account::environment;
use tests::s3_server::S3Server;

fn named(endpoint: String) -> S3Config {
    let optional = |name: &str| environment(&format!("PGCONVOY_TEST_S3_{name}"));
    let variable = |name: &str| {
        optional(name).unwrap_or_else(|| panic!("PGCONVOY_TEST_S3_{name} is not set, and the endpoint needs it"))
    };
    S3Config {
        endpoint: Some(endpoint),
        region: optional("REGION").unwrap_or_else(|| "us-east-1".to_owned()),
        bucket: variable("BUCKET"),
        prefix: format!("endpoint-test/{:016x}", rand::random::<u64>()),
        path_style: true,
        access_key_id: variable("ACCESS_KEY"),
        secret_access_key: SecretSource::Given(Secret::new(variable("SECRET_KEY"))),
        ca_file: optional("CA_FILE").map(Into::into),
        checksums: Checksums::Compat,
    }
}

fn own(server: &S3Server) -> S3Config {
    S3Config {
        endpoint: Some(server.endpoint.clone()),
        region: "us-east-1".to_owned(),
        bucket: server.bucket.clone(),
        prefix: String::new(),
        path_style: true,
        access_key_id: server.access_key.clone(),
        secret_access_key: SecretSource::Given(Secret::new(&server.secret_key)),
        ca_file: None,
        checksums: Checksums::Compat,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conformance_and_probe() {
    let mut server = None;
    let config = match environment("PGCONVOY_TEST_S3_ENDPOINT") {
        Some(endpoint) => named(endpoint),
        None => own(server.insert(S3Server::start().unwrap())),
    };
    let service = if server.is_some() { "the project's own server" } else { "the service that the environment names" };
    let store: Arc<dyn ObjectStore> = Arc::new(S3Store::new("endpoint".parse().unwrap(), &config).unwrap());
    let rules = conformance::run(store.clone()).await;
    let report = probe::probe(&*store, process::clock::now()).await.unwrap();
    println!("{service}: {rules} rules kept, {report:?}");
}
