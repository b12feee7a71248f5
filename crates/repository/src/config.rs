//! Stores in configuration files, and opening them.
//!
//! ```toml
//! [[store]]
//! name = "repo1"
//! kind = "directory"
//! path = "/srv/pgconvoy"
//! full_percent = 85
//!
//! [[store]]
//! name = "bucket"
//! kind = "s3"
//! endpoint = "https://s3.example.org"     # left out for AWS itself
//! region = "eu-central-1"
//! bucket = "backups"
//! prefix = "pgconvoy"                     # may be left out
//! access_key_id = "…"
//! secret_access_key_file = "/etc/pgconvoy/s3.secret"
//! ```
//!
//! Everything is explicit: no credential, region or endpoint is ever taken from the environment or from a metadata
//! service. Unknown keys, and keys of the other kind, are refused. [`open`] reads the secret and the CA bundle and
//! builds a client; it does not speak to the store.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use crate::name::StoreName;
use crate::store::{ObjectStore, StoreError};
use crate::stores::directory::DirectoryStore;
use crate::stores::s3::S3Store;

/// How full a directory store may get before it refuses new objects, if nothing is configured.
pub const DEFAULT_FULL_PERCENT: u8 = 85;

/// A store as configured.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "StoreTable")]
pub struct StoreConfig {
    /// What it is called in messages, metrics and commands.
    pub name: StoreName,
    /// What it is.
    pub kind: StoreKind,
}

/// What a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreKind {
    /// A directory, local or a mount.
    Directory(DirectoryConfig),
    /// A bucket of an S3 service.
    S3(S3Config),
}

/// A directory store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryConfig {
    /// An absolute path. It must exist; it is never created.
    pub path: PathBuf,
    /// From 1 to 100: at this share of used space new objects are refused.
    pub full_percent: u8,
}

/// An S3 store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Config {
    /// `https://` and a host, or `http://` and a loopback address; `None` is AWS itself.
    pub endpoint: Option<String>,
    /// The region that requests are signed for.
    pub region: String,
    /// The bucket.
    pub bucket: String,
    /// What all keys begin with, without slashes at its ends; may be empty.
    pub prefix: String,
    /// Whether the bucket goes into the path instead of the host name. Default: yes if there is an `endpoint`.
    pub path_style: bool,
    /// The public part of the credential.
    pub access_key_id: String,
    /// The secret part.
    pub secret_access_key: SecretSource,
    /// A PEM file of the only certificate authorities to trust; default: those of the system.
    pub ca_file: Option<PathBuf>,
    /// Which checksums requests carry.
    pub checksums: Checksums,
}

/// Where a secret is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// In the configuration itself.
    Given(Secret),
    /// In a file of its own, whose surrounding white space does not count.
    File(PathBuf),
}

/// Which checksums S3 requests carry. Objects are verified by their own digests whatever is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Checksums {
    /// `aws` for AWS itself, `compat` for an endpoint.
    #[default]
    Auto,
    /// The checksum headers and trailers that AWS understands.
    Aws,
    /// None beyond the signature, which every service accepts.
    Compat,
}

/// A text that never shows in logs.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Hides a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"…\"")
    }
}

/// The table as written, before it is known to make sense.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreTable {
    name: StoreName,
    kind: Option<KindName>,
    path: Option<PathBuf>,
    full_percent: Option<u8>,
    endpoint: Option<String>,
    region: Option<String>,
    bucket: Option<String>,
    prefix: Option<String>,
    path_style: Option<bool>,
    access_key_id: Option<String>,
    secret_access_key: Option<Secret>,
    secret_access_key_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    checksums: Option<Checksums>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum KindName {
    Directory,
    S3,
}

/// Why a store's table makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreConfigError {
    /// Neither `kind` nor a key that only one kind has.
    #[error("store {store}: kind is missing, expected \"directory\" or \"s3\"")]
    NoKind {
        /// Which store.
        store: StoreName,
    },
    /// A key is missing.
    #[error("store {store}: {key} is missing")]
    Missing {
        /// Which store.
        store: StoreName,
        /// Which key.
        key: &'static str,
    },
    /// A key that this kind of store does not have.
    #[error("store {store}: {key} does not belong to a store of this kind")]
    Misplaced {
        /// Which store.
        store: StoreName,
        /// Which key.
        key: &'static str,
    },
    /// A value is out of range or malformed.
    #[error("store {store}: {key} is wrong, expected {expected}")]
    Wrong {
        /// Which store.
        store: StoreName,
        /// Which key.
        key: &'static str,
        /// What was expected.
        expected: &'static str,
    },
}

impl TryFrom<StoreTable> for StoreConfig {
    type Error = StoreConfigError;

    fn try_from(table: StoreTable) -> Result<Self, StoreConfigError> {
        let name = table.name.clone();
        // `[direct]` of an agent is always S3 and need not say so.
        let implied = || match (&table.path, &table.bucket) {
            (Some(_), None) => Some(KindName::Directory),
            (None, Some(_)) => Some(KindName::S3),
            _ => None,
        };
        let kind = table.kind.or_else(implied).ok_or_else(|| StoreConfigError::NoKind { store: name.clone() })?;
        let kind = match kind {
            KindName::Directory => StoreKind::Directory(directory(table)?),
            KindName::S3 => StoreKind::S3(s3(table)?),
        };
        Ok(Self { name, kind })
    }
}

fn directory(table: StoreTable) -> Result<DirectoryConfig, StoreConfigError> {
    let store = table.name;
    let misplaced = [
        ("endpoint", table.endpoint.is_some()),
        ("region", table.region.is_some()),
        ("bucket", table.bucket.is_some()),
        ("prefix", table.prefix.is_some()),
        ("path_style", table.path_style.is_some()),
        ("access_key_id", table.access_key_id.is_some()),
        ("secret_access_key", table.secret_access_key.is_some()),
        ("secret_access_key_file", table.secret_access_key_file.is_some()),
        ("ca_file", table.ca_file.is_some()),
        ("checksums", table.checksums.is_some()),
    ];
    refuse_misplaced(&store, &misplaced)?;
    let path = table.path.ok_or_else(|| StoreConfigError::Missing { store: store.clone(), key: "path" })?;
    let wrong = |key, expected| Err(StoreConfigError::Wrong { store: store.clone(), key, expected });
    if !path.is_absolute() {
        return wrong("path", "an absolute path");
    }
    let full_percent = table.full_percent.unwrap_or(DEFAULT_FULL_PERCENT);
    if !(1..=100).contains(&full_percent) {
        return wrong("full_percent", "a number from 1 to 100");
    }
    Ok(DirectoryConfig { path, full_percent })
}

fn s3(table: StoreTable) -> Result<S3Config, StoreConfigError> {
    let store = table.name;
    refuse_misplaced(&store, &[("path", table.path.is_some()), ("full_percent", table.full_percent.is_some())])?;
    let required = |key, value: Option<String>| match value {
        Some(text) if !text.is_empty() => Ok(text),
        Some(_) => Err(StoreConfigError::Wrong { store: store.clone(), key, expected: "a text that is not empty" }),
        None => Err(StoreConfigError::Missing { store: store.clone(), key }),
    };
    if table.endpoint.as_deref().is_some_and(|endpoint| !is_endpoint(endpoint)) {
        let expected = "an https:// URL, or http:// on the loopback interface";
        return Err(StoreConfigError::Wrong { store, key: "endpoint", expected });
    }
    let secret_access_key = match (table.secret_access_key, table.secret_access_key_file) {
        (Some(secret), None) => SecretSource::Given(secret),
        (None, Some(file)) => SecretSource::File(file),
        (None, None) => return Err(StoreConfigError::Missing { store, key: "secret_access_key_file" }),
        (Some(_), Some(_)) => {
            let expected = "it or secret_access_key_file, not both";
            return Err(StoreConfigError::Wrong { store, key: "secret_access_key", expected });
        }
    };
    let prefix = table.prefix.unwrap_or_default().trim_matches('/').to_owned();
    if !prefix.is_empty() && crate::key::ObjectKey::parse(&prefix).is_err() {
        let expected = "components of A-Z a-z 0-9 _ - . joined by slashes";
        return Err(StoreConfigError::Wrong { store, key: "prefix", expected });
    }
    Ok(S3Config {
        region: required("region", table.region)?,
        bucket: required("bucket", table.bucket)?,
        access_key_id: required("access_key_id", table.access_key_id)?,
        path_style: table.path_style.unwrap_or(table.endpoint.is_some()),
        endpoint: table.endpoint,
        prefix,
        secret_access_key,
        ca_file: table.ca_file,
        checksums: table.checksums.unwrap_or_default(),
    })
}

/// WAL and page images do not travel in the clear, except to a server on this host.
fn is_endpoint(endpoint: &str) -> bool {
    let Some(rest) = endpoint.strip_prefix("http://") else { return endpoint.starts_with("https://") };
    let authority = rest.split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(bracketed) => bracketed.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn refuse_misplaced(store: &StoreName, keys: &[(&'static str, bool)]) -> Result<(), StoreConfigError> {
    match keys.iter().find(|(_, present)| *present) {
        Some((key, _)) => Err(StoreConfigError::Misplaced { store: store.clone(), key }),
        None => Ok(()),
    }
}

/// Builds the store. Reads the secret and the CA bundle, but does not speak to the store.
///
/// An S3 store's client belongs to the tokio runtime in which it is first used.
pub fn open(config: &StoreConfig) -> Result<Arc<dyn ObjectStore>, StoreError> {
    match &config.kind {
        StoreKind::Directory(directory) => Ok(Arc::new(DirectoryStore::new(config.name.clone(), directory.clone())?)),
        StoreKind::S3(s3) => Ok(Arc::new(S3Store::new(config.name.clone(), s3)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<StoreConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn a_directory_has_a_path_and_a_limit() {
        let config = read(r#"{"name":"repo1","kind":"directory","path":"/srv/r"}"#).unwrap();
        let expected = DirectoryConfig { path: "/srv/r".into(), full_percent: DEFAULT_FULL_PERCENT };
        assert_eq!(config.kind, StoreKind::Directory(expected));
        assert!(read(r#"{"name":"repo1","path":"/srv/r","full_percent":100}"#).is_ok());
    }

    #[test]
    fn a_bucket_has_defaults_that_fit_its_endpoint() {
        let json = r#"{"name":"b","bucket":"x","region":"r","access_key_id":"i","secret_access_key":"hush"}"#;
        let StoreKind::S3(aws) = read(json).unwrap().kind else { panic!("expected s3") };
        assert!(!aws.path_style);
        assert!(!format!("{aws:?}").contains("hush"));
        let json = json.replace("\"bucket\"", "\"endpoint\":\"http://127.0.0.1:1\",\"prefix\":\"/a/b/\",\"bucket\"");
        let StoreKind::S3(own) = read(&json).unwrap().kind else { panic!("expected s3") };
        assert!(own.path_style);
        assert_eq!(own.prefix, "a/b");
    }

    #[test]
    fn only_this_host_is_spoken_to_in_the_clear() {
        let good = ["https://s3.example.org", "http://127.0.0.1:9000", "http://[::1]:9000/", "http://localhost"];
        assert!(good.iter().all(|endpoint| is_endpoint(endpoint)));
        let bad = ["", "s3.example.org", "http://s3.example.org", "http://127.0.0.1.example.org", "http://10.0.0.1:1"];
        assert!(!bad.iter().any(|endpoint| is_endpoint(endpoint)));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let check = |json: &str, part: &str| {
            let error = read(json).unwrap_err();
            assert!(error.contains(part), "{json}: {error}");
        };
        check(r#"{"name":"repo1"}"#, "kind is missing");
        check(r#"{"name":"Repo1","path":"/r"}"#, "not a store name");
        check(r#"{"name":"r","kind":"directory"}"#, "path is missing");
        check(r#"{"name":"r","path":"r"}"#, "an absolute path");
        check(r#"{"name":"r","path":"/r","full_percent":0}"#, "from 1 to 100");
        check(r#"{"name":"r","path":"/r","region":"x"}"#, "region does not belong");
        check(r#"{"name":"r","path":"/r","patch":"x"}"#, "unknown field `patch`");
        check(r#"{"name":"r","kind":"ftp"}"#, "unknown variant `ftp`");
        let s3 = r#"{"name":"r","kind":"s3","region":"x","bucket":"b","access_key_id":"i""#;
        check(&format!("{s3}}}"), "secret_access_key_file is missing");
        check(&format!("{s3},\"secret_access_key\":\"a\",\"secret_access_key_file\":\"/f\"}}"), "not both");
        check(&format!("{s3},\"secret_access_key\":\"a\",\"endpoint\":\"s3.example.org\"}}"), "http://");
        check(&format!("{s3},\"secret_access_key\":\"a\",\"path\":\"/r\"}}"), "path does not belong");
        check(&format!("{s3},\"secret_access_key\":\"a\",\"prefix\":\"a b\"}}"), "prefix is wrong");
    }
}
