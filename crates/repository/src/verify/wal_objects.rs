//! WAL objects: by their own digests, without decompressing them, or decoded.

use std::io;
use std::sync::Arc;

use futures_util::TryStreamExt;
use sha2::{Digest, Sha256};

use super::finding::Proof;
use super::watch::Watch;
use crate::key::ObjectKey;
use crate::store::{ByteRange, ObjectStore, StoreError};
use crate::wal::{Damage, Expected, HEADER_LIMIT_BYTES, WalError, WalHeader, read_changes, read_to};

/// Compares an object with the digests in its own header, piece by piece.
#[derive(Default)]
pub(super) struct WalDigests {
    /// Bytes of the header, until it is whole.
    start: Vec<u8>,
    header: Option<WalHeader>,
    frames: Sha256,
    frames_size: u64,
    changes: Sha256,
    changes_size: u64,
    whole: Sha256,
    whole_size: u64,
}

/// An object whose file is whole.
#[derive(Debug)]
pub(super) struct Sound {
    pub(super) header: WalHeader,
    /// What is wrong with what lies behind the frames.
    pub(super) changes: Option<String>,
    /// Of the whole object, as it was read.
    pub(super) proof: Proof,
}

impl WalDigests {
    pub(super) fn push(&mut self, expected: Option<&Expected>, bytes: &[u8]) -> Result<(), Damage> {
        self.whole.update(bytes);
        self.whole_size += bytes.len() as u64;
        if self.header.is_some() {
            self.push_rest(bytes);
            return Ok(());
        }
        self.start.extend_from_slice(bytes);
        match WalHeader::read(&self.start) {
            Ok((header, length)) => {
                expected.map_or(Ok(()), |expected| expected.check(&header))?;
                self.header = Some(header);
                let start = std::mem::take(&mut self.start);
                self.push_rest(&start[length..]);
                Ok(())
            }
            Err(Damage::HeaderShort) if self.start.len() < HEADER_LIMIT_BYTES => Ok(()),
            Err(damage) => Err(damage),
        }
    }

    fn push_rest(&mut self, bytes: &[u8]) {
        let promised = self.header.as_ref().map_or(0, |header| header.frames_size);
        let left = promised.saturating_sub(self.frames_size);
        let (frames, behind) = bytes.split_at(usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len())));
        self.frames.update(frames);
        self.frames_size += frames.len() as u64;
        self.changes.update(behind);
        self.changes_size += behind.len() as u64;
    }

    pub(super) fn finish(self) -> Result<Sound, Damage> {
        let header = self.header.ok_or(Damage::HeaderShort)?;
        if self.frames_size < header.frames_size {
            return Err(Damage::Truncated { found: self.frames_size, expected: header.frames_size });
        }
        if <[u8; 32]>::from(self.frames.finalize()) != header.frames_sha256 {
            return Err(Damage::FramesDigest);
        }
        let promised = header.changes.map_or(0, |part| part.size);
        if self.changes_size > promised {
            return Err(Damage::Trailing { expected: header.frames_size.saturating_add(promised) });
        }
        let found = <[u8; 32]>::from(self.changes.finalize());
        let changes = match header.changes {
            Some(part) if self.changes_size < part.size => {
                Some(format!("{} of {} bytes", self.changes_size, part.size))
            }
            Some(part) if found != part.sha256 => Some("bytes that do not match their SHA-256".to_owned()),
            _ => None,
        };
        let proof = Proof { size: self.whole_size, sha256: self.whole.finalize().into() };
        Ok(Sound { header, changes, proof })
    }
}

/// Reads an object and compares it with its digests.
pub(super) async fn by_digests(store: &dyn ObjectStore, key: &ObjectKey, watch: &Watch) -> Result<Sound, WalError> {
    let damaged = |damage| WalError::Damaged { store: store.name().clone(), key: key.clone(), damage };
    let expected = Expected::under(key);
    let mut digests = WalDigests::default();
    let mut stream = store.get(key, ByteRange::All).await?;
    while let Some(piece) = stream.try_next().await? {
        digests.push(expected.as_ref(), &piece).map_err(damaged)?;
        watch.took(piece.len() as u64).await;
    }
    digests.finish().map_err(damaged)
}

/// Decodes an object of `size` bytes, and reads what lies beside the WAL in it. Answers also what is wrong with that.
pub(super) async fn decoded(
    store: &Arc<dyn ObjectStore>,
    key: &ObjectKey,
    size: u64,
    watch: &Watch,
) -> Result<(WalHeader, Option<String>), WalError> {
    let runtime = tokio::runtime::Handle::current();
    let (reader, wanted) = (Arc::clone(store), key.clone());
    let reading = tokio::task::spawn_blocking(move || runtime.block_on(read_to(&*reader, &wanted, &mut io::sink())));
    let header = reading.await.unwrap_or_else(|error| Err(WalError::Write(io::Error::other(error))))?;
    watch.took(size).await;
    let changes = match read_changes(&**store, key, size).await {
        Ok(_) => None,
        Err(WalError::Damaged { damage: Damage::Changes { reason }, .. }) => Some(reason),
        Err(error) => return Err(error),
    };
    Ok((header, changes))
}

/// What a failure says about the object: nothing if it is about the store.
pub(super) fn about_object(error: WalError) -> Result<String, StoreError> {
    match error {
        WalError::Store(error) if error.is_outage() => Err(error),
        WalError::Damaged { damage, .. } => Ok(damage.to_string()),
        error => Ok(crate::observe::chain(&error)),
    }
}
