//! The bucket that ours and the peer's rounds share: one server, behind one end of TLS, because pgbackrest speaks to S3
//! in no other way. Both go through it with the same certificate, each round below a prefix of its own.

use std::cell::Cell;

use anyhow::Result;

use crate::account::Scratch;
use crate::certificates::Authority;
use crate::fleet::{Bucket, Store};
use crate::s3_service::S3Service;
use crate::tls_front::TlsFront;

/// What pgbackrest calls the host: it compares certificates with names only, never with addresses.
const HOST: &str = "localhost";

/// A bucket over TLS on loopback.
#[derive(Debug)]
pub struct SharedBucket {
    service: S3Service,
    front: TlsFront,
    authority: Authority,
    prefixes: Cell<u32>,
    _scratch: Scratch,
}

impl SharedBucket {
    /// Starts the project's own server, or takes the service that the environment names, and puts TLS before it.
    pub fn start() -> Result<Self> {
        let scratch = Scratch::new("bucket")?;
        let service = S3Service::start()?;
        let authority = Authority::new(&scratch, "storage")?;
        let front = TlsFront::start(service.address(), &authority.server(&scratch, "s3")?)?;
        Ok(Self { service, front, authority, prefixes: Cell::new(0), _scratch: scratch })
    }

    fn new_prefix(&self) -> String {
        self.prefixes.set(self.prefixes.get() + 1);
        format!("{}-{}", self.service.bucket().prefix, self.prefixes.get())
    }

    /// An empty store of ours.
    pub fn store(&self) -> Store {
        let endpoint = format!("https://{}", self.front.address());
        let bucket = Bucket { endpoint, prefix: self.new_prefix(), ..self.service.bucket().clone() };
        let settings = format!("ca_file = \"{}\"\n", self.authority.file().display());
        Store { settings, ..Store::s3("bucket", bucket) }
    }

    /// An empty repository of pgbackrest, as lines of its configuration.
    pub fn pgbackrest_lines(&self) -> String {
        let bucket = self.service.bucket();
        format!(
            "repo1-type=s3\nrepo1-path=/{}\nrepo1-s3-bucket={}\nrepo1-s3-region={}\nrepo1-s3-endpoint={HOST}\n\
             repo1-s3-uri-style=path\nrepo1-s3-key={}\nrepo1-s3-key-secret={}\nrepo1-storage-host={HOST}\n\
             repo1-storage-port={}\nrepo1-storage-ca-file={}\n",
            self.new_prefix(),
            bucket.bucket,
            bucket.region,
            bucket.access_key_id,
            bucket.secret_access_key,
            self.front.address().port(),
            self.authority.file().display(),
        )
    }

    /// Requests so far, where the server is the project's own, which counts them.
    pub fn requests(&self) -> Option<u64> {
        let counts = self.service.own()?.faults.counts();
        Some(counts.put + counts.get + counts.head + counts.list + counts.delete)
    }

    /// Throws away what the rounds so far left in a server of ours, which holds it in memory.
    pub fn clear(&self) {
        if let Some(server) = self.service.own() {
            server.clear();
        }
    }
}
