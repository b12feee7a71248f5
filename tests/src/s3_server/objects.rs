//! The objects of the S3 server, in memory or as files of a directory.
//!
//! Whether an object may be created is looked up and done under one lock, so of racing creators one wins.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use tokio::io::AsyncWriteExt;

/// The bytes of an object.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Memory(Bytes),
    File { path: PathBuf, len: u64 },
}

impl Content {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { len, .. } => *len,
        }
    }

    /// Removes what it occupies on disk.
    pub(super) fn discard(self) {
        if let Self::File { path, .. } = self {
            let _ = fs::remove_file(path);
        }
    }
}

/// A stored object.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) content: Content,
    pub(super) etag: String,
    pub(super) modified: SystemTime,
    /// For listings that lag behind.
    pub(super) created: Instant,
}

/// What a put asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Condition {
    None,
    Absent,
    Matches(String),
}

/// How a put came out.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Stored(String),
    Failed,
    Missing,
}

#[derive(Debug)]
pub(super) struct Objects {
    map: Mutex<BTreeMap<String, Object>>,
    /// What was removed while listings lagged, and when.
    removed: Mutex<BTreeMap<String, (Object, Instant)>>,
    directory: Option<PathBuf>,
    sequence: AtomicU64,
}

impl Objects {
    pub(super) fn in_memory() -> Self {
        Self { map: Mutex::default(), removed: Mutex::default(), directory: None, sequence: AtomicU64::new(1) }
    }

    /// Takes over what an earlier server left.
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let objects = Self { directory: Some(directory.to_owned()), ..Self::in_memory() };
        let _ = fs::remove_dir_all(directory.join("incoming"));
        fs::create_dir_all(directory.join("incoming"))?;
        let top = directory.join("objects");
        fs::create_dir_all(&top)?;
        let mut pending = vec![top.clone()];
        while let Some(path) = pending.pop() {
            for entry in fs::read_dir(&path)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    pending.push(entry.path());
                    continue;
                }
                let metadata = entry.metadata()?;
                let key = entry.path().strip_prefix(&top)?.to_str().context("a key is UTF-8")?.to_owned();
                let content = Content::File { path: entry.path(), len: metadata.len() };
                let object = objects.object(content, metadata.modified()?);
                objects.map().insert(key, object);
            }
        }
        Ok(objects)
    }

    fn map(&self) -> MutexGuard<'_, BTreeMap<String, Object>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An ETag, or another name, that was never given before.
    pub(super) fn new_etag(&self) -> String {
        format!("{:032x}", self.sequence.fetch_add(1, Ordering::Relaxed))
    }

    fn object(&self, content: Content, modified: SystemTime) -> Object {
        Object { content, etag: self.new_etag(), modified, created: Instant::now() }
    }

    /// Takes a body in, without a key yet.
    pub(super) async fn receive<S, E>(&self, mut body: S) -> Result<Content>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: Into<anyhow::Error>,
    {
        let Some(directory) = &self.directory else {
            let mut bytes = Vec::new();
            while let Some(piece) = body.try_next().await.map_err(Into::into)? {
                bytes.extend_from_slice(&piece);
            }
            return Ok(Content::Memory(bytes.into()));
        };
        let number = self.sequence.fetch_add(1, Ordering::Relaxed);
        let path = directory.join("incoming").join(number.to_string());
        let mut file = tokio::fs::File::create(&path).await?;
        let mut len = 0;
        while let Some(piece) = body.try_next().await.map_err(Into::into)? {
            file.write_all(&piece).await?;
            len += piece.len() as u64;
        }
        file.flush().await?;
        Ok(Content::File { path, len })
    }

    pub(super) fn get(&self, key: &str) -> Option<Object> {
        self.map().get(key).cloned()
    }

    pub(super) fn put(&self, key: &str, content: Content, condition: &Condition) -> Result<Outcome> {
        let mut map = self.map();
        let refused = match (condition, map.get(key)) {
            (Condition::Absent, Some(_)) => Some(Outcome::Failed),
            (Condition::Matches(_), None) => Some(Outcome::Missing),
            (Condition::Matches(etag), Some(object)) if *etag != object.etag => Some(Outcome::Failed),
            _ => None,
        };
        if let Some(outcome) = refused {
            content.discard();
            return Ok(outcome);
        }
        let content = self.settle(key, content)?;
        let object = self.object(content, SystemTime::from(process::clock::now()));
        let etag = object.etag.clone();
        map.insert(key.to_owned(), object);
        Ok(Outcome::Stored(etag))
    }

    /// Moves a received file to where its key says.
    fn settle(&self, key: &str, content: Content) -> Result<Content> {
        let (Some(directory), Content::File { path, len }) = (&self.directory, &content) else { return Ok(content) };
        let odd = key.split('/').any(|part| part.is_empty() || part == "." || part == ".." || part.len() > 255);
        ensure!(!odd, "the key {key:?} cannot be a path");
        let target = directory.join("objects").join(key);
        fs::create_dir_all(target.parent().context("a key has a directory")?)?;
        fs::rename(path, &target)?;
        Ok(Content::File { path: target, len: *len })
    }

    pub(super) fn remove(&self, key: &str) -> Option<Object> {
        let removed = self.map().remove(key);
        if let Some(object) = &removed {
            object.content.clone().discard();
        }
        removed
    }

    /// Removes an object which listings that lag go on showing.
    pub(super) fn remove_for(&self, lag: Duration, key: &str) {
        if let Some(object) = self.remove(key).filter(|_| !lag.is_zero()) {
            self.removed().insert(key.to_owned(), (object, Instant::now()));
        }
    }

    fn removed(&self) -> MutexGuard<'_, BTreeMap<String, (Object, Instant)>> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn keys(&self) -> Vec<String> {
        self.map().keys().cloned().collect()
    }

    /// Objects in order, from behind `after`, that start with `prefix`; as they were so long ago.
    pub(super) fn list(&self, prefix: &str, after: &str, lag: Duration) -> Vec<(String, Object)> {
        let range = (if after >= prefix { Bound::Excluded(after) } else { Bound::Included(prefix) }, Bound::Unbounded);
        let (map, removed) = (self.map(), self.removed());
        let there = map.range::<str, _>(range).take_while(|(key, _)| key.starts_with(prefix));
        let there = there.filter(|(_, object)| object.created.elapsed() >= lag);
        let gone = removed.range::<str, _>(range).take_while(|(key, _)| key.starts_with(prefix));
        let gone = gone.filter(|(_, (_, when))| when.elapsed() < lag).map(|(key, (object, _))| (key, object));
        let found: BTreeMap<_, _> = there.chain(gone).map(|(key, object)| (key.clone(), object.clone())).collect();
        found.into_iter().collect()
    }

    pub(super) fn flip_bit(&self, key: &str) -> Result<()> {
        let mut map = self.map();
        let object = map.get_mut(key).with_context(|| format!("there is no object {key}"))?;
        match &mut object.content {
            Content::Memory(bytes) if !bytes.is_empty() => {
                let mut changed = bytes.to_vec();
                let middle = changed.len() / 2;
                changed[middle] ^= 1;
                *bytes = changed.into();
            }
            Content::File { path, len } if *len > 0 => flip_in_file(path, *len / 2)?,
            _ => bail!("{key} is empty"),
        }
        Ok(())
    }
}

fn flip_in_file(path: &Path, offset: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 1], offset)
}
