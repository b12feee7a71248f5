//! The bytes of a restore: ranges of packs, many at a time, each from the first store that serves it whole.
//!
//! Groups of files go on side by side. Within a group the passes follow each other, so that newer layers are written over
//! older ones; at its end files that were written in parts are read back for their checksum, and all get their attributes.
//!
//! What is in memory is bounded: a few groups (see `groups.rs`) and [`PIECES_IN_MEMORY`] pieces of ranges, however many
//! ranges are read at the same time.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use process::clock::Monotonic;
use repository::backup::pack::TableFrame;
use repository::backup::{BackupError, fetch_table};
use repository::key::{self, ObjectKey};
use repository::name::BackupId;
use repository::store::{ByteRange, ByteStream, ObjectStore, StoreError};
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc};

use super::finish::{self, Work};
use super::groups::{Group, Groups};
use super::layout::{self, Ages, PackRange};
use super::sources::Sources;
use super::writer::{Piece, Target, WriteError};
use super::{Place, RestoreError, RestoreSource};
use crate::backup::pace::Pace;

/// How often all stores are tried for one range when they are away.
const ROUNDS: u32 = 4;
/// Wait between those rounds.
const ROUND_WAIT: Duration = Duration::from_secs(3);
/// Pieces of one range in memory, each at most 1 MiB.
const PIECES_OF_RANGE: usize = 4;
/// Pieces of all ranges in memory.
const PIECES_IN_MEMORY: usize = 48;
/// Groups that are restored side by side.
const GROUPS_IN_MEMORY: usize = 4;
/// Fewest ranges read at the same time, for stores answer slower than disks.
const PARALLEL_MIN: usize = 4;
/// Most ranges read at the same time.
const PARALLEL_MAX: usize = 64;

/// Requests at the same time; 0 takes one a core.
pub(super) fn parallel(asked: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if asked == 0 { cores.max(PARALLEL_MIN) } else { asked }.min(PARALLEL_MAX)
}

/// What reads the packs of one restore.
pub(super) struct Reading<'a> {
    pub(super) source: &'a RestoreSource,
    pub(super) sources: &'a Sources,
    pub(super) target: &'a Arc<Target>,
    pub(super) ages: Arc<Ages>,
    work: &'a Arc<Work>,
    /// One permit a request; all groups share them.
    permits: Semaphore,
    pieces: Arc<Semaphore>,
    pace: Pace,
    parallel: usize,
}

impl<'a> Reading<'a> {
    /// Of the packs of a backup and of those that it refers to.
    pub(super) fn new(
        source: &'a RestoreSource,
        sources: &'a Sources,
        target: &'a Arc<Target>,
        work: &'a Arc<Work>,
        ages: Arc<Ages>,
    ) -> Reading<'a> {
        let parallel = parallel(work.options.parallel);
        let (permits, pieces) = (Semaphore::new(parallel), Arc::new(Semaphore::new(PIECES_IN_MEMORY)));
        let pace = Pace::new(work.options.bytes_per_second);
        Self { source, sources, target, ages, work, permits, pieces, pace, parallel }
    }

    /// Makes all files, group by group. With [`Place::Existing`] what a file holds already is not read again.
    pub(super) async fn read_all(&self, groups: Groups) -> Result<(), RestoreError> {
        let groups = futures_util::stream::try_unfold(groups, |mut groups| {
            super::blocking(move || Ok(groups.next()?.map(|group| (Arc::new(group), groups))))
        });
        let read = groups.map_ok(|group| self.read_group(group));
        read.try_buffer_unordered(GROUPS_IN_MEMORY).try_collect::<()>().await
    }

    async fn read_group(&self, group: Arc<Group>) -> Result<(), RestoreError> {
        let (wanted, in_parts) = match self.work.options.place {
            Place::Free => {
                let files = 0..group.layout.files.len();
                (group.layout.wanted(&self.ages, files), group.layout.in_parts())
            }
            Place::Existing => self.missing(&group).await?,
        };
        for pass in layout::passes(&self.ages, wanted) {
            let reads = pass.iter().map(|range| self.read_range(&group, range));
            futures_util::stream::iter(reads).buffer_unordered(self.parallel).try_collect::<()>().await?;
        }
        let _permit = self.permit().await;
        let (target, work) = (self.target.clone(), self.work.clone());
        super::blocking(move || {
            let completed = in_parts.into_iter().try_for_each(|index| target.complete(&group, index));
            completed.map_err(RestoreError::of_writing)?;
            finish::finish_group(&work, &target, &group)
        })
        .await
    }

    /// Most requests at the same time.
    pub(super) fn parallel(&self) -> usize {
        self.parallel
    }

    async fn permit(&self) -> Option<SemaphorePermit<'_>> {
        // It is never closed.
        self.permits.acquire().await.ok()
    }

    async fn read_range(&self, group: &Arc<Group>, range: &PackRange) -> Result<(), RestoreError> {
        let _permit = self.permit().await;
        let key = key::pack(&self.source.cluster, &range.backup, range.pack);
        self.any_store(&key, async |store, others| self.read_range_from(store, others, &key, group, range).await)
            .await?;
        process::crash_point!("restore/after-range-before-next");
        Ok(())
    }

    /// Reads the table of a pack of this size from the first store that serves it.
    pub(super) async fn table(
        &self,
        backup: &BackupId,
        pack: u32,
        pack_bytes: u64,
    ) -> Result<Vec<TableFrame>, RestoreError> {
        let _permit = self.permit().await;
        let key = key::pack(&self.source.cluster, backup, pack);
        let read = async |store: &Arc<dyn ObjectStore>, others: Others| {
            let table = tokio::time::timeout(self.silence(others), fetch_table(store.as_ref(), &key, pack_bytes));
            table.await.map_err(|_| silent(store))?.map_err(RangeError::from)
        };
        self.any_store(&key, read).await
    }

    /// Tries one store after the other, and all again for a while when they are away.
    async fn any_store<T>(
        &self,
        key: &ObjectKey,
        read: impl AsyncFn(&Arc<dyn ObjectStore>, Others) -> Result<T, RangeError>,
    ) -> Result<T, RestoreError> {
        let sources = self.sources;
        let mut last: Option<RangeError> = None;
        for round in 0..ROUNDS {
            let order = sources.in_order();
            for (asked, index) in order.iter().copied().enumerate() {
                let store = sources.store(index);
                let others = if asked + 1 < order.len() { Others::Left } else { Others::None };
                match read(store, others).await {
                    Ok(value) => return Ok(value),
                    Err(RangeError::Write(WriteError::Target { path, source })) => {
                        return Err(RestoreError::Write { path, source });
                    }
                    Err(error) => {
                        if error.is_away() {
                            sources.leave(index);
                        } else {
                            sources.warn(format!("store {}: {key} is damaged or missing there", store.name()));
                        }
                        tracing::warn!(store = %store.name(), %key, error = %chain(&error), "a range of a pack could not be used");
                        last = Some(error);
                    }
                }
            }
            if round + 1 == ROUNDS || !last.as_ref().is_some_and(RangeError::is_away) {
                break;
            }
            tokio::time::sleep(ROUND_WAIT).await;
        }
        let error = last.ok_or(RestoreError::NoStore)?;
        Err(RestoreError::Pack { pack: key.to_string(), source: Box::new(error) })
    }

    /// Longest silence of a store.
    fn silence(&self, others: Others) -> Duration {
        match others {
            Others::Left => self.sources.patience.silence_beside_others,
            Others::None => self.sources.patience.silence,
        }
    }

    /// Moves pieces from the store to a writer's thread.
    async fn read_range_from(
        &self,
        store: &Arc<dyn ObjectStore>,
        others: Others,
        key: &ObjectKey,
        group: &Arc<Group>,
        range: &PackRange,
    ) -> Result<(), RangeError> {
        let wanted = ByteRange::Slice { offset: range.offset, length: range.length };
        let opening = tokio::time::timeout(self.silence(others), store.get(key, wanted));
        let stream = opening.await.map_err(|_| silent(store))??;
        let (pieces, incoming) = mpsc::channel(PIECES_OF_RANGE);
        let (target, writer_group, writer_range) = (self.target.clone(), group.clone(), range.clone());
        let writing = tokio::task::spawn_blocking(move || target.write_range(&writer_group, &writer_range, incoming));
        let fed = self.feed(store, others, stream, pieces).await;
        let written = writing.await.unwrap_or_else(|_| {
            let source = io::Error::other("the writer's thread panicked");
            Err(WriteError::Target { path: self.target.data_directory.clone(), source })
        });
        match (fed, written) {
            // What is written is whole, or what is wrong with the disk counts more than what is wrong with the store.
            (_, Ok(())) => Ok(()),
            (Err(_), Err(error @ WriteError::Target { .. })) => Err(RangeError::Write(error)),
            (Err(error), Err(WriteError::Damage(_))) => Err(error),
            (Ok(()), Err(error)) => Err(RangeError::Write(error)),
        }
    }

    /// Hands a stream's pieces to a writer, as long as the store is neither silent nor slow.
    async fn feed(
        &self,
        store: &Arc<dyn ObjectStore>,
        others: Others,
        mut stream: ByteStream,
        pieces: mpsc::Sender<Piece>,
    ) -> Result<(), RangeError> {
        let mut speed = Speed::default();
        loop {
            let room = self.room().await;
            let asked = Monotonic::now();
            let next = tokio::time::timeout(self.silence(others), stream.try_next()).await;
            let Some(bytes) = next.map_err(|_| silent(store))?? else { return Ok(()) };
            speed.add(asked.elapsed(), bytes.len());
            let patience = &self.sources.patience;
            if others == Others::Left && speed.is_slow(patience.slowness, patience.least_bytes_per_second) {
                return Err(RangeError::Slow { bytes_per_second: speed.bytes_per_second() });
            }
            // Its time is nobody's slowness.
            self.pace.turn(bytes.len() as u64).await;
            // The writer hangs up when it has seen enough; then its own error counts.
            if pieces.send(Piece { bytes, _room: room }).await.is_err() {
                return Ok(());
            }
        }
    }

    async fn room(&self) -> OwnedSemaphorePermit {
        self.pieces.clone().acquire_owned().await.expect("this semaphore is never closed")
    }
}

/// Whether other stores are left to ask after one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Others {
    /// At least one.
    Left,
    /// None.
    None,
}

/// How fast a store serves a range: the time that it let us wait, and what came of it.
#[derive(Debug, Clone, Copy, Default)]
struct Speed {
    waited: Duration,
    bytes: u64,
}

impl Speed {
    fn add(&mut self, waited: Duration, bytes: usize) {
        self.waited += waited;
        self.bytes += bytes as u64;
    }

    fn bytes_per_second(&self) -> u64 {
        (self.bytes as f64 / self.waited.as_secs_f64().max(f64::EPSILON)) as u64
    }

    fn is_slow(&self, slowness: Duration, least_bytes_per_second: u64) -> bool {
        self.waited >= slowness && self.bytes_per_second() < least_bytes_per_second
    }
}

/// Why one store did not serve a range.
#[derive(Debug, Error)]
enum RangeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Write(WriteError),
    #[error(transparent)]
    Table(BackupError),
    #[error("the store gives {bytes_per_second} bytes a second, and there is another one")]
    Slow { bytes_per_second: u64 },
}

impl RangeError {
    /// Whether the store is at fault, and not what it holds.
    fn is_away(&self) -> bool {
        match self {
            Self::Store(error) => error.is_outage(),
            Self::Slow { .. } => true,
            Self::Write(_) | Self::Table(_) => false,
        }
    }
}

impl From<BackupError> for RangeError {
    fn from(error: BackupError) -> Self {
        match error {
            BackupError::Store(error) => Self::Store(error),
            BackupError::Pack { damage, .. } => Self::Write(WriteError::Damage(damage)),
            other => Self::Table(other),
        }
    }
}

fn silent(store: &Arc<dyn ObjectStore>) -> RangeError {
    RangeError::Store(StoreError::Timeout { store: store.name().clone(), operation: "get" })
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_slow_after_a_while_of_waiting_for_little() {
        let check = |waits: &[(u64, usize)], expected: bool| {
            let mut speed = Speed::default();
            waits.iter().for_each(|(millis, bytes)| speed.add(Duration::from_millis(*millis), *bytes));
            assert_eq!(speed.is_slow(Duration::from_secs(10), 1000), expected, "{waits:?}");
        };
        check(&[(0, 1 << 20)], false);
        check(&[(9_999, 0)], false);
        check(&[(10_000, 9_999)], true);
        check(&[(10_000, 10_000)], false);
        check(&[(5_000, 100), (6_000, 100)], true);
    }
}
