//! The suite of stores and the probe, run against an S3 service that the environment names.
//!
//! `PGCONVOY_TEST_S3_ENDPOINT`, `…_ACCESS_KEY`, `…_SECRET_KEY`, `…_BUCKET`; `…_REGION` is `us-east-1` unless set.
//! Compiled only with the feature `s3-endpoint`, and failing without the variables: it never passes for having tested
//! nothing. What it writes stays, under a prefix of its own.

use std::sync::Arc;

use repository::config::{Checksums, S3Config, Secret, SecretSource};
use repository::store::ObjectStore;
use repository::stores::s3::S3Store;
use repository::{conformance, probe};
use tests::account::environment;

fn store(checksums: Checksums) -> Arc<dyn ObjectStore> {
    let variable = |name: &str| {
        let name = format!("PGCONVOY_TEST_S3_{name}");
        environment(&name).unwrap_or_else(|| panic!("{name} is not set: name an S3 service to test against"))
    };
    let config = S3Config {
        endpoint: Some(variable("ENDPOINT")),
        region: environment("PGCONVOY_TEST_S3_REGION").unwrap_or_else(|| "us-east-1".to_owned()),
        bucket: variable("BUCKET"),
        prefix: format!("endpoint-test/{:016x}", rand::random::<u64>()),
        path_style: true,
        access_key_id: variable("ACCESS_KEY"),
        secret_access_key: SecretSource::Given(Secret::new(variable("SECRET_KEY"))),
        ca_file: environment("PGCONVOY_TEST_S3_CA_FILE").map(Into::into),
        checksums,
    };
    Arc::new(S3Store::new("endpoint".parse().unwrap(), &config).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn conformance_and_probe() {
    let store = store(Checksums::Compat);
    let rules = conformance::run(store.clone()).await;
    let report = probe::probe(&*store, process::clock::now()).await.unwrap();
    eprintln!("{rules} rules kept, {report:?}");
}
