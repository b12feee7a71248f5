//! Listing and reading a store, nothing else: a directory through the file system, a bucket through its service.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use repository::key::ObjectKey;
use repository::store::{ByteRange, ObjectStore, collect};

use crate::fleet::{Bucket, Place, Store};
use crate::runtime;

/// Largest object read.
const OBJECT_BYTES_MAX: u64 = 2 << 30;
/// Keys a page.
const PAGE: usize = 1000;

/// A store to look into.
#[derive(Debug)]
pub enum Shelf {
    /// Its directory.
    Directory(PathBuf),
    /// Its bucket.
    S3(Arc<dyn ObjectStore>),
}

impl Shelf {
    /// Opens a store for looking.
    pub fn open(store: &Store) -> Result<Self> {
        match &store.place {
            Place::Directory(path) => Ok(Self::Directory(path.clone())),
            Place::S3(bucket) => Ok(Self::S3(open_bucket(&store.name, bucket)?)),
        }
    }

    /// Keys that start with `prefix`, in order.
    pub fn list(&self, prefix: &str) -> Result<Vec<String>> {
        match self {
            Self::Directory(root) => {
                let mut keys = Vec::new();
                walk(root, root, &mut keys)?;
                keys.retain(|key| key.starts_with(prefix));
                keys.sort();
                Ok(keys)
            }
            Self::S3(store) => {
                let mut keys: Vec<String> = Vec::new();
                loop {
                    let after = keys.last().cloned();
                    let page = runtime::block_on(store.list(prefix, after.as_deref(), PAGE))?;
                    keys.extend(page.objects.iter().map(|object| object.key.to_string()));
                    if !page.more {
                        return Ok(keys);
                    }
                }
            }
        }
    }

    /// The bytes of an object.
    pub fn read(&self, key: &str) -> Result<Vec<u8>> {
        match self {
            Self::Directory(root) => fs::read(root.join(key)).with_context(|| key.to_owned()),
            Self::S3(store) => {
                let key = ObjectKey::parse(key)?;
                let bytes = runtime::block_on(async {
                    let stream = store.get(&key, ByteRange::All).await?;
                    collect(stream, OBJECT_BYTES_MAX).await
                })
                .with_context(|| key.to_string())?;
                Ok(bytes.to_vec())
            }
        }
    }

    /// Changes one byte of an object, as a bad disk would; directories only.
    pub fn flip_byte(&self, key: &str, position: usize) -> Result<()> {
        let Self::Directory(root) = self else { anyhow::bail!("only a directory's objects can be damaged") };
        let path = root.join(key);
        let mut bytes = fs::read(&path)?;
        let length = bytes.len();
        *bytes.get_mut(position).with_context(|| format!("{key} has only {length} bytes"))? ^= 0x10;
        fs::write(&path, bytes)?;
        Ok(())
    }
}

/// Objects are the files below the root; names that start with a dot are the store's own working files.
fn walk(root: &Path, directory: &Path, keys: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            walk(root, &path, keys)?;
        } else {
            keys.push(path.strip_prefix(root)?.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

fn open_bucket(name: &str, bucket: &Bucket) -> Result<Arc<dyn ObjectStore>> {
    let config: repository::config::StoreConfig =
        toml::from_str(&Store::s3(name, bucket.clone()).toml_body()).context("store configuration")?;
    Ok(repository::config::open(&config)?)
}
