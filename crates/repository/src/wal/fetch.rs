//! Reading WAL objects: from one store by key, or from several by name.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::TryStreamExt;
use postgres_format::{SystemIdentifier, WalFileName};
use tokio::sync::oneshot;

use super::WalError;
use super::decode::{DecodeError, WalDecoder};
use super::header::{Damage, Expected, HEADER_LIMIT_BYTES, WalHeader};
use super::union::{self, Heard, Silences};
use super::variants::{Choice, Wanted};
use crate::key::ObjectKey;
use crate::name::{ClusterName, StoreName};
use crate::observe::chain;
use crate::store::{self, ByteRange, ObjectStore};

/// What several stores together say about a WAL file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fetched {
    /// The target holds the file, verified.
    Written {
        /// Where it came from.
        store: StoreName,
        /// What the object says about itself.
        header: Box<WalHeader>,
    },
    /// Every store that was asked said itself that it has no complete file of the name. At least one was asked.
    Absent,
    /// It may exist, and could not be had.
    Unknown {
        /// A line a store, each saying which and why.
        reasons: Vec<String>,
    },
}

/// Fetches a WAL file from the first of several stores that has it whole, into `target`.
///
/// What all of them hold under the name decides together which content is served, by the rules for one store: a conflict or
/// an operator's choice in any of them counts for all. A store that is away is passed over when the others can serve, and
/// keeps the file from being called absent when they cannot.
///
/// The target is created or overwritten, not flushed to disk, and removed unless the answer is [`Fetched::Written`]. While it runs,
/// and after a crash, it may hold less than the file: a caller that cannot have that gives a temporary name and
/// renames. A damaged object makes the next store that holds the content serve. An incomplete segment counts as absent.
///
/// Decoding runs on the blocking pool, so that a caller may prefetch several files at once on few threads. Dropping
/// the future ends the decode, and removes what it wrote, soon afterwards.
pub async fn fetch(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
    target: &Path,
) -> Fetched {
    fetch_remembering(&Silences::default(), stores, cluster, system, name, target).await
}

/// As [`fetch`], for callers that fetch again and again: a store that was silent is not waited for every time.
pub async fn fetch_remembering(
    silences: &Silences,
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
    target: &Path,
) -> Fetched {
    let said = union::ask_all(stores, Wanted { cluster, system, name }, silences).await;
    let mut reasons = said.reasons.clone();
    if stores.is_empty() {
        reasons.push("no store was asked".to_owned());
    }
    match said.choose(name).await {
        Ok(Choice::Serve(variant)) => {
            for store in said.holders(&variant) {
                match read_to_file(Arc::clone(store), variant.key.clone(), target, silences.heard()).await {
                    Ok(Some(header)) => {
                        return Fetched::Written { store: store.name().clone(), header: Box::new(header) };
                    }
                    // The same content is incomplete everywhere.
                    Ok(None) => break,
                    Err(error) => reasons.push(chain(&error)),
                }
            }
        }
        Ok(Choice::Incomplete(_) | Choice::Nothing) => {}
        Ok(Choice::Conflict(variants)) => reasons.push(format!("{name} is in conflict: {}", said.describe(&variants))),
        Err(error) => reasons.push(chain(&error)),
    }
    if reasons.is_empty() { Fetched::Absent } else { Fetched::Unknown { reasons } }
}

/// `None` if it is an incomplete segment, which recovery must not take for the end of WAL.
async fn read_to_file(
    store: Arc<dyn ObjectStore>,
    key: ObjectKey,
    target: &Path,
    heard: &Arc<Heard>,
) -> Result<Option<WalHeader>, WalError> {
    let runtime = tokio::runtime::Handle::current();
    let (target, heard) = (Provisional { path: Some(target.to_owned()) }, Arc::clone(heard));
    // Closed when nobody waits any more.
    let (_waiting, waited_for) = oneshot::channel::<()>();
    let decoded = tokio::task::spawn_blocking(move || {
        let path = target.path.as_deref().expect("it is taken only when the file is kept");
        let mut file = File::create(path).map_err(WalError::Write)?;
        let header = runtime.block_on(async {
            tokio::select! {
                biased;
                _ = waited_for => Err(WalError::Write(io::ErrorKind::Interrupted.into())),
                read = read_noting(store.as_ref(), &key, &mut file, || heard.note()) => read,
            }
        })?;
        file.flush().map_err(WalError::Write)?;
        let usable = header.complete || !matches!(header.name, WalFileName::Segment(_));
        Ok(usable.then_some((header, target)))
    });
    // Where this future was dropped, the file is dropped with what the task gives.
    let kept = decoded.await.unwrap_or_else(|error| Err(WalError::Write(io::Error::other(error))))?;
    Ok(kept.map(|(header, target)| {
        target.keep();
        header
    }))
}

/// A file that is removed unless it is kept.
struct Provisional {
    path: Option<PathBuf>,
}

impl Provisional {
    fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for Provisional {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // If it cannot be removed either, the answer already says that the target is not to be used.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Decodes a whole object into `out`. What was written there may be used only after this has succeeded.
///
/// The object must be what its key promises: cluster, system identifier, file name, fingerprint.
pub async fn read_to(
    store: &dyn ObjectStore,
    key: &ObjectKey,
    out: &mut (dyn Write + Send),
) -> Result<WalHeader, WalError> {
    read_noting(store, key, out, || {}).await
}

/// As [`read_to`], and says of each piece that it came.
async fn read_noting(
    store: &dyn ObjectStore,
    key: &ObjectKey,
    out: &mut (dyn Write + Send),
    came: impl Fn() + Send,
) -> Result<WalHeader, WalError> {
    let damaged = |damage| WalError::Damaged { store: store.name().clone(), key: key.clone(), damage };
    let failed = |error| match error {
        DecodeError::Damaged(damage) => damaged(damage),
        DecodeError::Write(source) | DecodeError::Memory(source) => WalError::Write(source),
    };
    let mut decoder = WalDecoder::new(Expected::under(key)).map_err(failed)?;
    let mut stream = store.get(key, ByteRange::All).await?;
    while let Some(piece) = stream.try_next().await? {
        came();
        decoder.push(&piece, out).map_err(failed)?;
    }
    decoder.finish().map_err(failed)
}

/// Reads a history file, which is of at most `limit_bytes`; a longer one fails as damaged.
pub async fn read_history(store: &dyn ObjectStore, key: &ObjectKey, limit_bytes: usize) -> Result<Vec<u8>, WalError> {
    let mut text = Limited { bytes: Vec::new(), limit_bytes };
    match read_to(store, key, &mut text).await {
        Ok(_) => Ok(text.bytes),
        Err(WalError::Write(_)) => {
            let damage = Damage::ContentSize { found: limit_bytes as u64 + 1, expected: limit_bytes as u64 };
            Err(WalError::Damaged { store: store.name().clone(), key: key.clone(), damage })
        }
        Err(error) => Err(error),
    }
}

/// Bytes in memory, up to a limit.
struct Limited {
    bytes: Vec<u8>,
    limit_bytes: usize,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit_bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads only the header of an object of `size` bytes, and checks that it is what its key promises.
pub async fn read_header(store: &dyn ObjectStore, key: &ObjectKey, size: u64) -> Result<WalHeader, WalError> {
    let damaged = |damage| WalError::Damaged { store: store.name().clone(), key: key.clone(), damage };
    let length = size.min(super::HEADER_BYTES as u64);
    let mut bytes = slice(store, key, length).await?;
    let wanted = WalHeader::length(&bytes).map_err(damaged)?.unwrap_or(HEADER_LIMIT_BYTES) as u64;
    if wanted > length && length < size {
        bytes = slice(store, key, wanted.min(size)).await?;
    }
    let (header, length) = WalHeader::read(&bytes).map_err(damaged)?;
    if let Some(expected) = Expected::under(key) {
        expected.check(&header).map_err(damaged)?;
    }
    header.check_rest(size.saturating_sub(length as u64)).map_err(damaged)?;
    Ok(header)
}

async fn slice(store: &dyn ObjectStore, key: &ObjectKey, length: u64) -> Result<bytes::Bytes, WalError> {
    let stream = store.get(key, ByteRange::Slice { offset: 0, length }).await?;
    Ok(store::collect(stream, HEADER_LIMIT_BYTES as u64).await?)
}
