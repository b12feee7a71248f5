//! The S3 service that scenarios use: the project's own server in this process, or one named by the environment.
//!
//! `PGCONVOY_TEST_S3_ENDPOINT` (with `…_REGION`, `…_BUCKET`, `…_ACCESS_KEY`, `…_SECRET_KEY`) names another one, such as
//! a RADOS gateway; every scenario then uses a prefix of its own in that bucket.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use rand::Rng;

use crate::account::environment;
use crate::fleet::Bucket;
use crate::s3_server::S3Server;

/// Region that the project's own server is asked with; it takes any.
const REGION: &str = "us-east-1";

/// A bucket behind a service.
#[derive(Debug)]
pub struct S3Service {
    bucket: Bucket,
    address: SocketAddr,
    own: Option<S3Server>,
}

impl S3Service {
    /// Starts the project's own server, or takes the one that the environment names.
    pub fn start() -> Result<Self> {
        match external()? {
            Some(service) => Ok(service),
            None => own(),
        }
    }

    /// The bucket, with an address that no scenario breaks.
    pub fn bucket(&self) -> &Bucket {
        &self.bucket
    }

    /// The project's own server, for faults behind everybody's back; `None` when the environment names another.
    pub fn own(&self) -> Option<&S3Server> {
        self.own.as_ref()
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
        own: None,
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

fn own() -> Result<S3Service> {
    let server = S3Server::start()?;
    let address = server.endpoint.strip_prefix("http://").context("the server's endpoint is odd")?;
    Ok(S3Service {
        address: address.trim_end_matches('/').parse()?,
        bucket: Bucket {
            endpoint: server.endpoint.clone(),
            region: REGION.to_owned(),
            bucket: server.bucket.clone(),
            prefix: "repository".to_owned(),
            access_key_id: server.access_key.clone(),
            secret_access_key: server.secret_key.clone(),
        },
        own: Some(server),
    })
}
