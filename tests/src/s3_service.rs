//! The S3 service that scenarios use: the project's own server in this process, or one named by the environment.
//!
//! `PGCONVOY_TEST_S3_ENDPOINT` (with `…_BUCKET`, `…_ACCESS_KEY`, `…_SECRET_KEY`, and `…_REGION`, which is `us-east-1`
//! unless set) names another one, such as a RADOS gateway; every scenario then uses a prefix of its own in that bucket.
//! The endpoint is plain http: scenarios reach it through links that they cut, under which no certificate would fit.

use std::net::{SocketAddr, ToSocketAddrs};

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
    /// Whether the environment names a service.
    pub fn is_named() -> bool {
        environment("PGCONVOY_TEST_S3_ENDPOINT").is_some()
    }

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
    let authority = endpoint.strip_prefix("http://").context("the endpoint must start with http://")?;
    let addresses = authority.trim_end_matches('/').to_socket_addrs();
    let addresses = addresses.context("the endpoint must be http://HOST:PORT, with a host that is known")?;
    let wanted = |name: &str| variable(name).with_context(|| format!("PGCONVOY_TEST_S3_{name} is not set"));
    Ok(Some(S3Service {
        own: None,
        address: addresses.into_iter().next().context("the endpoint's host has no address")?,
        bucket: Bucket {
            region: variable("REGION").unwrap_or_else(|| "us-east-1".to_owned()),
            bucket: wanted("BUCKET")?,
            prefix: format!("t{:016x}", rand::rng().random::<u64>()),
            access_key_id: wanted("ACCESS_KEY")?,
            secret_access_key: wanted("SECRET_KEY")?,
            endpoint,
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
