//! Reading WAL objects: from one store by key, or from several by name.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use futures_util::TryStreamExt;
use postgres_format::{SystemIdentifier, WalFileName};

use super::decode::{DecodeError, WalDecoder};
use super::header::{Damage, Expected, HEADER_LIMIT_BYTES, WalHeader};
use super::variants::{Located, Wanted, locate_unread, newest_decision};
use super::{Fingerprint, WalError, list};
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
/// The target is created or overwritten, not flushed to disk, and removed unless the answer is [`Fetched::Written`]. While it runs,
/// and after a crash, it may hold less than the file: a caller that cannot have that gives a temporary name and
/// renames. A damaged object or a store that is away makes the next store serve. After a conflict in one store a later one
/// serves only the content that an operator chose. An incomplete segment counts as absent.
///
/// Decoding runs on the blocking pool, so that a caller may prefetch several files at once on few threads. Dropping
/// the future lets a running decode finish and leaves its target behind.
pub async fn fetch(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
    target: &Path,
) -> Fetched {
    let wanted = Wanted { cluster, system, name };
    let mut reasons = Vec::new();
    let mut contested: Vec<&dyn ObjectStore> = Vec::new();
    for store in stores {
        let key = match locate_unread(store.as_ref(), wanted).await {
            Ok(Located::Object { key, .. }) if contested.is_empty() => key,
            Ok(Located::Object { key, fingerprint, .. }) => {
                let asked = contested.iter().copied().chain([store.as_ref()]);
                match chosen(asked, wanted).await {
                    Ok(chosen) if chosen.is_some() && chosen == fingerprint => key,
                    Ok(_) => {
                        reasons.push(format!("store {}: no operator chose the content it has", store.name()));
                        continue;
                    }
                    Err(error) => {
                        reasons.push(chain(&error));
                        continue;
                    }
                }
            }
            Ok(Located::Absent | Located::Incomplete { .. }) => continue,
            Ok(Located::Conflict { variants }) => {
                let contents = list(&variants);
                reasons.push(format!("store {}: {name} has conflicting contents: {contents}", store.name()));
                contested.push(store.as_ref());
                continue;
            }
            Err(error) => {
                reasons.push(chain(&error));
                continue;
            }
        };
        match read_to_file(Arc::clone(store), key, target).await {
            Ok(Some(header)) => return Fetched::Written { store: store.name().clone(), header: Box::new(header) },
            Ok(None) => continue,
            Err(error) => reasons.push(chain(&error)),
        }
    }
    if stores.is_empty() {
        reasons.push("no store was asked".to_owned());
    }
    if reasons.is_empty() { Fetched::Absent } else { Fetched::Unknown { reasons } }
}

/// What operators chose last, as far as these stores know; `None` if nothing, or if they know unlike choices.
async fn chosen<'a>(
    stores: impl Iterator<Item = &'a dyn ObjectStore>,
    wanted: Wanted<'_>,
) -> Result<Option<Fingerprint>, WalError> {
    let mut decisions = Vec::new();
    for store in stores {
        decisions.extend(newest_decision(store, wanted).await?);
    }
    let Some(newest) = decisions.iter().map(|(number, _)| *number).max() else { return Ok(None) };
    let mut last = decisions.iter().filter(|(number, _)| *number == newest).map(|(_, made)| made.fingerprint);
    let first = last.next();
    Ok(first.filter(|first| last.all(|other| other == *first)))
}

/// `None` if it is an incomplete segment, which recovery must not take for the end of WAL.
async fn read_to_file(
    store: Arc<dyn ObjectStore>,
    key: ObjectKey,
    target: &Path,
) -> Result<Option<WalHeader>, WalError> {
    let runtime = tokio::runtime::Handle::current();
    let target = target.to_owned();
    let decoded = tokio::task::spawn_blocking(move || {
        let read = File::create(&target).map_err(WalError::Write).and_then(|mut file| {
            let header = runtime.block_on(read_to(store.as_ref(), &key, &mut file))?;
            file.flush().map_err(WalError::Write)?;
            let usable = header.complete || !matches!(header.name, WalFileName::Segment(_));
            Ok(usable.then_some(header))
        });
        if !matches!(read, Ok(Some(_))) {
            // If it cannot be removed either, the answer already says that the target is not to be used.
            let _ = std::fs::remove_file(&target);
        }
        read
    });
    decoded.await.unwrap_or_else(|error| Err(WalError::Write(io::Error::other(error))))
}

/// Decodes a whole object into `out`. What was written there may be used only after this has succeeded.
///
/// The object must be what its key promises: cluster, system identifier, file name, fingerprint.
pub async fn read_to(
    store: &dyn ObjectStore,
    key: &ObjectKey,
    out: &mut (dyn Write + Send),
) -> Result<WalHeader, WalError> {
    let damaged = |damage| WalError::Damaged { store: store.name().clone(), key: key.clone(), damage };
    let failed = |error| match error {
        DecodeError::Damaged(damage) => damaged(damage),
        DecodeError::Write(source) | DecodeError::Memory(source) => WalError::Write(source),
    };
    let mut decoder = WalDecoder::new(Expected::under(key)).map_err(failed)?;
    let mut stream = store.get(key, ByteRange::All).await?;
    while let Some(piece) = stream.try_next().await? {
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
    let frames_size = size.saturating_sub(length as u64);
    if frames_size != header.frames_size {
        return Err(damaged(Damage::Truncated { found: frames_size, expected: header.frames_size }));
    }
    Ok(header)
}

async fn slice(store: &dyn ObjectStore, key: &ObjectKey, length: u64) -> Result<bytes::Bytes, WalError> {
    let stream = store.get(key, ByteRange::Slice { offset: 0, length }).await?;
    Ok(store::collect(stream, HEADER_LIMIT_BYTES as u64).await?)
}
