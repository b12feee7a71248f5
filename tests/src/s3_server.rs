//! The project's own S3 server for tests, demo and bench, on the `s3s` adapter.
//!
//! It verifies signatures (SigV4, payload hashes included), keeps conditional creation atomic, lists in order, takes
//! multipart uploads (ours makes none, the bench's peer does), and goes wrong when told to: see [`Faults`]. ETags say
//! which write an object came from and nothing about its content. One bucket, one pair of keys, path style, no TLS,
//! loopback.
//!
//! It is a test double with honest semantics, not a store to keep anything in: what is on disk with
//! [`Options::directory`] is there so that a bench need not hold gigabytes in memory, and survives a restart, but is
//! never synced.

mod backend;
mod control;
mod faults;
mod listener;
mod objects;
mod uploads;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::task::JoinHandle;

use crate::runtime::runtime;
use backend::Backend;
pub use faults::{Counts, Fault, FaultPlan, Faults, Operation, Rule};
use objects::Objects;

/// How a server is started.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where to take commands about faults, if anywhere.
    pub control: Option<SocketAddr>,
    /// The public part of the only credential.
    pub access_key: String,
    /// Its secret part.
    pub secret_key: String,
    /// The only bucket.
    pub bucket: String,
    /// Keeps objects as files here instead of in memory.
    pub directory: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            control: None,
            access_key: "pgconvoy-test".to_owned(),
            secret_key: "pgconvoy-test-secret".to_owned(),
            bucket: "backups".to_owned(),
            directory: None,
        }
    }
}

/// A running server; ends when dropped.
#[derive(Debug)]
pub struct S3Server {
    /// `http://` and the address.
    pub endpoint: String,
    /// The address itself.
    pub address: SocketAddr,
    /// Where commands about faults are taken, if anywhere: `http://` and the address.
    pub control: Option<String>,
    /// The public part of the only credential.
    pub access_key: String,
    /// Its secret part.
    pub secret_key: String,
    /// The only bucket.
    pub bucket: String,
    /// What goes wrong, and what was asked.
    pub faults: Faults,
    objects: Arc<Objects>,
    tasks: Vec<JoinHandle<()>>,
}

impl S3Server {
    /// Starts a server with an empty bucket in memory on a free port.
    pub fn start() -> Result<Self> {
        Self::start_with(Options::default())
    }

    /// Starts a server.
    pub fn start_with(options: Options) -> Result<Self> {
        let objects = Arc::new(match &options.directory {
            Some(directory) => Objects::open(directory).context("the directory of objects cannot be read")?,
            None => Objects::in_memory(),
        });
        let faults = Faults::default();
        let mut builder = S3ServiceBuilder::new(Backend::new(options.bucket.clone(), objects.clone(), faults.clone()));
        builder.set_auth(SimpleAuth::from_single(options.access_key.as_str(), options.secret_key.as_str()));
        let listener = bind(options.listen)?;
        let address = listener.local_addr()?;
        let mut tasks = vec![runtime().spawn(listener::serve(listener, builder.build(), faults.clone()))];
        let mut control = None;
        if let Some(listen) = options.control {
            let listener = bind(listen)?;
            control = Some(format!("http://{}", listener.local_addr()?));
            tasks.push(runtime().spawn(control::serve(listener, faults.clone(), objects.clone())));
        }
        Ok(Self {
            endpoint: format!("http://{address}"),
            address,
            control,
            access_key: options.access_key,
            secret_key: options.secret_key,
            bucket: options.bucket,
            faults,
            objects,
            tasks,
        })
    }

    /// Flips one bit in the middle of a stored object, behind everybody's back.
    pub fn flip_bit(&self, key: &str) -> Result<()> {
        self.objects.flip_bit(key)
    }

    /// Takes an object away, behind everybody's back.
    pub fn remove(&self, key: &str) -> Result<()> {
        self.objects.remove(key).map(drop).with_context(|| format!("there is no object {key}"))
    }

    /// The keys of all objects, in order.
    pub fn keys(&self) -> Vec<String> {
        self.objects.keys()
    }

    /// Takes all objects away, as a bucket that was lost.
    pub fn clear(&self) {
        for key in self.keys() {
            let _ = self.objects.remove(&key);
        }
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
