//! A backup's witnesses: short stretches of WAL, digested on the server whose files were read, out of its own `pg_wal`.
//!
//! WAL files of two servers that were one have the same names, timeline and system identifier. A clone's files together
//! with the original's WAL are no backup: at best recovery finds no checkpoint, at worst it ends in a mixture. So before
//! a root names a backup, the archived segments are compared with its witnesses: one ends with the checkpoint record from
//! which recovery starts, one with the last record that it needs.
//!
//! What it does not do: it proves nothing about the WAL between; who may write that is the coordinator's writer rule.

use std::io::{self, Write};

use futures_util::TryStreamExt;
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, WalFileName};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::coverage::{LsnRange, SegmentSpan};
use crate::key::ObjectKey;
use crate::name::ClusterName;
use crate::root::RootBackup;
use crate::store::{ByteRange, ObjectStore};
use crate::wal::{DecodeError, Expected, Located, WalDecoder, WalError, locate};

/// How far a witness reaches back from its last byte, within one segment.
pub const WITNESS_BYTES: u64 = 64 << 10;

/// A stretch of WAL within one segment, as a server has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalWitness {
    /// Its first byte.
    pub from: Lsn,
    /// The byte after its last.
    pub to: Lsn,
    /// SHA-256 of its bytes as they lie in the segment, page headers included.
    #[serde(with = "crate::digest::hex")]
    pub sha256: [u8; 32],
}

impl WalWitness {
    /// The stretch that a witness ending at `end` covers; `end` is greater than zero.
    pub fn stretch(end: Lsn, size: SegmentSize) -> LsnRange {
        let begin = SegmentNumber::last_before(end, size).start(size);
        LsnRange { start: begin.max(Lsn::new(end.as_u64().saturating_sub(WITNESS_BYTES))), end }
    }

    /// The witness of a stretch's bytes.
    pub fn of(stretch: LsnRange, bytes: &[u8]) -> Self {
        Self { from: stretch.start, to: stretch.end, sha256: Sha256::digest(bytes).into() }
    }
}

/// What a store's WAL says to a backup's witnesses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Testimony {
    /// All of them find their bytes.
    Agrees,
    /// The backup names no witness.
    Silent,
    /// This segment is not there, or not complete, or no part of the WAL that the backup needs.
    Missing(WalFileName),
    /// This segment has contents that exclude each other.
    Contested(WalFileName),
    /// This segment is of another server.
    Differs(WalFileName),
}

/// Compares a store's segments with a backup's witnesses. `needed` are the segments that recovery of the backup reads.
///
/// # Errors
/// When a segment cannot be looked up or read, or is damaged.
pub async fn ask(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    needed: &[SegmentSpan],
    size: SegmentSize,
) -> Result<Testimony, WalError> {
    if entry.wal_witnesses.is_empty() {
        return Ok(Testimony::Silent);
    }
    for witness in &entry.wal_witnesses {
        let number = SegmentNumber::last_before(witness.to, size);
        let own = || WalFileName::Segment(SegmentName::new(entry.stop_timeline, number, size));
        let Some(span) = needed.iter().find(|span| (span.first..=span.last).contains(&number)) else {
            return Ok(Testimony::Missing(own()));
        };
        let name = WalFileName::Segment(SegmentName::new(span.timeline, number, size));
        match locate(store, cluster, entry.system_identifier, &name).await? {
            Located::Object { key, .. } => {
                if !has(store, &key, witness, number.start(size)).await? {
                    return Ok(Testimony::Differs(name));
                }
            }
            Located::Absent | Located::Incomplete { .. } => return Ok(Testimony::Missing(name)),
            Located::Conflict { .. } => return Ok(Testimony::Contested(name)),
        }
    }
    Ok(Testimony::Agrees)
}

/// Whether an object's content has the witness's bytes. Only one that does not is read to its end.
async fn has(store: &dyn ObjectStore, key: &ObjectKey, witness: &WalWitness, begin: Lsn) -> Result<bool, WalError> {
    let damaged = |damage| WalError::Damaged { store: store.name().clone(), key: key.clone(), damage };
    let failed = |error| match error {
        DecodeError::Damaged(damage) => damaged(damage),
        DecodeError::Write(source) | DecodeError::Memory(source) => WalError::Write(source),
    };
    let within = |lsn: Lsn| lsn.as_u64().saturating_sub(begin.as_u64());
    let mut cut =
        Cut { skip: within(witness.from), left: within(witness.to) - within(witness.from), sha: Sha256::new() };
    let mut decoder = WalDecoder::new(Expected::under(key)).map_err(failed)?;
    let mut stream = store.get(key, ByteRange::All).await?;
    while let Some(piece) = stream.try_next().await? {
        decoder.push(&piece, &mut cut).map_err(failed)?;
        if cut.left == 0 && cut.digest() == witness.sha256 {
            return Ok(true);
        }
    }
    decoder.finish().map_err(failed)?;
    Ok(cut.left == 0 && cut.digest() == witness.sha256)
}

/// Digests a part of what is written to it.
struct Cut {
    /// Bytes before the part that are still to come.
    skip: u64,
    /// Bytes of the part that are still to come.
    left: u64,
    sha: Sha256,
}

impl Cut {
    fn digest(&self) -> [u8; 32] {
        self.sha.clone().finalize().into()
    }
}

impl Write for Cut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len() as u64;
        let skipped = self.skip.min(length);
        let taken = (length - skipped).min(self.left);
        self.sha.update(&bytes[skipped as usize..(skipped + taken) as usize]);
        self.skip -= skipped;
        self.left -= taken;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
