//! The S3 service that scenarios use: the project's own server in this process, or one named by the environment.
//!
//! `PGCONVOY_TEST_S3_ENDPOINT` (with `…_REGION`, `…_BUCKET`, `…_ACCESS_KEY`, `…_SECRET_KEY`) names another one, such as
//! a RADOS gateway; every scenario then uses a prefix of its own in that bucket.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use rand::Rng;

use crate::account::{Scratch, environment};
use crate::fleet::Bucket;

/// A bucket behind a service.
#[derive(Debug)]
pub struct S3Service {
    bucket: Bucket,
    address: SocketAddr,
}

impl S3Service {
    /// Starts the project's own server, or takes the one that the environment names.
    pub fn start(scratch: &Scratch) -> Result<Self> {
        match external()? {
            Some(service) => Ok(service),
            None => own(scratch),
        }
    }

    /// The bucket, with an address that no scenario breaks.
    pub fn bucket(&self) -> &Bucket {
        &self.bucket
    }

    /// Where the service listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn external() -> Result<Option<S3Service>> {
    let variable = |name: &str| environment(&format!("PGCONVOY_TEST_S3_{name}"));
    let Some(endpoint) = variable("ENDPOINT") else { return Ok(None) };
    let address = endpoint.strip_prefix("http://").context("the endpoint must start with http://")?;
    let wanted = |name: &str| variable(name).with_context(|| format!("PGCONVOY_TEST_S3_{name} is not set"));
    Ok(Some(S3Service {
        address: address.trim_end_matches('/').parse().context("the endpoint must be http://ADDRESS:PORT")?,
        bucket: Bucket {
            endpoint: endpoint.clone(),
            region: variable("REGION").unwrap_or_else(|| "us-east-1".to_owned()),
            bucket: wanted("BUCKET")?,
            prefix: format!("t{:016x}", rand::rng().random::<u64>()),
            access_key_id: wanted("ACCESS_KEY")?,
            secret_access_key: wanted("SECRET_KEY")?,
        },
    }))
}

fn own(_scratch: &Scratch) -> Result<S3Service> {
    anyhow::bail!("the project's own S3 server is not wired yet; name one by PGCONVOY_TEST_S3_ENDPOINT")
}
