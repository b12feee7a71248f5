//! A backup's witnesses: short stretches of WAL, digested on the server whose files were read, out of its own `pg_wal`.
//!
//! WAL files of two servers that were one have the same names, timeline and system identifier. A clone's files together
//! with the original's WAL are no backup: at best recovery finds no checkpoint, at worst it ends in a mixture. So before
//! a root names a backup, the archived segments are compared with its witnesses: one ends with the checkpoint record from
//! which recovery starts, one with the last record that it needs.
//!
//! What it does not do: it proves nothing about the WAL between; who may write that is the coordinator's writer rule.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use futures_util::future::join_all;
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, Timeline, WalFileName};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::coverage::LsnRange;
use crate::key::ObjectKey;
use crate::name::{ClusterName, StoreName};
use crate::observe::chain;
use crate::root::RootBackup;
use crate::store::{ByteRange, ObjectStore};
use crate::wal::{DecodeError, Expected, Located, WalDecoder, WalError, locate};

/// How far a witness reaches back from its last byte, within one segment.
pub const WITNESS_BYTES: u64 = 64 << 10;
/// How long a store may take to give the segments of a backup's witnesses, where several stores are heard.
const PATIENCE: Duration = Duration::from_secs(120);

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

/// Compares a store's segments with a backup's witnesses. `history` is that of the timeline along which the backup is
/// recovered: its last one, or one that came of it.
///
/// # Errors
/// When a segment cannot be looked up or read, or is damaged.
pub async fn ask(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    entry: &RootBackup,
    history: &TimelineHistory,
) -> Result<Testimony, WalError> {
    let Ok(size) = SegmentSize::from_bytes(entry.segment_size_bytes) else { return Ok(Testimony::Silent) };
    if entry.wal_witnesses.is_empty() {
        return Ok(Testimony::Silent);
    }
    let needed =
        SegmentNumber::containing(entry.start_lsn, size)..=SegmentNumber::last_before(entry.consistent_lsn(), size);
    for witness in &entry.wal_witnesses {
        let number = SegmentNumber::last_before(witness.to, size);
        let name = |timeline| WalFileName::Segment(SegmentName::new(timeline, number, size));
        let timelines = timelines_of(number, history, size);
        let mut found = Testimony::Missing(name(timelines.first().copied().unwrap_or(history.timeline())));
        for timeline in timelines.into_iter().filter(|_| needed.contains(&number)) {
            let name = name(timeline);
            found = match locate(store, cluster, entry.system_identifier, &name).await? {
                Located::Absent | Located::Incomplete { .. } => continue,
                Located::Conflict { .. } => Testimony::Contested(name),
                Located::Object { key, .. } if has(store, &key, witness, number.start(size)).await? => {
                    Testimony::Agrees
                }
                Located::Object { .. } => Testimony::Differs(name),
            };
            break;
        }
        if found != Testimony::Agrees {
            return Ok(found);
        }
    }
    Ok(Testimony::Agrees)
}

/// The timelines in whose segment of this number recovery looks, the newest that had begun by then first. The segment in
/// which a fork lies begins with the same bytes on both, as far as a backup on the way needs it.
fn timelines_of(number: SegmentNumber, history: &TimelineHistory, size: SegmentSize) -> Vec<Timeline> {
    let (start, end) = (number.start(size), number.end(size));
    let mut begin = Lsn::ZERO;
    let mut timelines = Vec::new();
    for ended in history.entries() {
        if begin < end && start < ended.end {
            timelines.push(ended.timeline);
        }
        begin = ended.end;
    }
    if begin < end {
        timelines.push(history.timeline());
    }
    timelines.reverse();
    timelines
}

/// What several stores said to a backup's witnesses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Heard {
    said: Vec<(StoreName, Result<Testimony, String>)>,
}

impl Heard {
    /// What one store said, or why nothing is known of it.
    pub fn add(&mut self, store: StoreName, said: Result<Testimony, String>) {
        self.said.push((store, said));
    }

    /// A segment that is another server's, and a store that serves it.
    pub fn contradiction(&self) -> Option<(&StoreName, &WalFileName)> {
        self.said.iter().find_map(|(store, said)| match said {
            Ok(Testimony::Differs(name)) => Some((store, name)),
            _ => None,
        })
    }

    /// A segment with contents that exclude each other, and a store that has them.
    pub fn contested(&self) -> Option<(&StoreName, &WalFileName)> {
        self.said.iter().find_map(|(store, said)| match said {
            Ok(Testimony::Contested(name)) => Some((store, name)),
            _ => None,
        })
    }

    /// Whether all witnesses found their bytes in some store.
    pub fn agrees(&self) -> bool {
        self.said.iter().any(|(_, said)| *said == Ok(Testimony::Agrees))
    }

    /// The stores of which nothing is known, and why.
    pub fn unknown(&self) -> impl Iterator<Item = (&StoreName, &str)> {
        self.said.iter().filter_map(|(store, said)| Some((store, said.as_ref().err()?.as_str())))
    }

    /// The same of some of the stores.
    pub fn of(&self, stores: &[StoreName]) -> Self {
        Self { said: self.said.iter().filter(|(store, _)| stores.contains(store)).cloned().collect() }
    }
}

/// Asks several stores at once, each for a bounded time.
pub async fn hear(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    entry: &RootBackup,
    history: &TimelineHistory,
) -> Heard {
    let asked = stores.iter().map(|store| async move {
        let asked = tokio::time::timeout(PATIENCE, ask(store.as_ref(), cluster, entry, history)).await;
        let said = match asked {
            Ok(said) => said.map_err(|error| chain(&error)),
            Err(_) => Err(format!("it did not give its WAL within {} s", PATIENCE.as_secs())),
        };
        (store.name().clone(), said)
    });
    Heard { said: join_all(asked).await }
}

/// Whether an operator's choice may have replaced WAL that a backup stands on: `decided` are the names that were chosen for.
pub fn may_be_decided_away(entry: &RootBackup, decided: &BTreeSet<WalFileName>) -> bool {
    let Ok(size) = SegmentSize::from_bytes(entry.segment_size_bytes) else { return false };
    let numbers: BTreeSet<SegmentNumber> =
        entry.wal_witnesses.iter().map(|witness| SegmentNumber::last_before(witness.to, size)).collect();
    decided.iter().any(|name| match name {
        WalFileName::Segment(name) => name.number(size).is_ok_and(|number| numbers.contains(&number)),
        WalFileName::History(timeline) => *timeline == entry.stop_timeline,
        WalFileName::Partial(_) | WalFileName::BackupHistory { .. } => false,
    })
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
