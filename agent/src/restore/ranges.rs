//! The bytes of a restore: ranges of packs, many at a time, each from the first store that serves it whole.
//!
//! Groups of files go on side by side. Within a group the passes follow each other, so that newer layers are written over
//! older ones; at its end files that were written in parts are read back for their checksum.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use repository::backup::manifest::Pack;
use repository::backup::pack::TableFrame;
use repository::backup::{BackupError, fetch_table};
use repository::key;
use repository::name::BackupId;
use repository::store::{ByteRange, ObjectStore, StoreError};
use thiserror::Error;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};

use super::layout::{self, PackRange};
use super::sources::Sources;
use super::writer::{Target, WriteError};
use super::{Place, RestoreError, RestoreSource};

/// Longest silence of a store within one range.
const STORE_SILENCE: Duration = Duration::from_secs(60);
/// How often all stores are tried for one range when they are away.
const ROUNDS: u32 = 4;
/// Wait between those rounds.
const ROUND_WAIT: Duration = Duration::from_secs(3);
/// Pieces of a range in memory, each at most 1 MiB.
const CHUNKS_IN_MEMORY: usize = 4;
/// Fewest ranges read at the same time, for stores answer slower than disks.
const PARALLEL_MIN: usize = 4;
/// Most ranges read at the same time.
const PARALLEL_MAX: usize = 64;

/// What reads the packs of one restore.
pub(super) struct Reading<'a> {
    pub(super) source: &'a RestoreSource,
    pub(super) sources: &'a Sources,
    pub(super) target: &'a Arc<Target>,
    /// One permit a request; all groups share them.
    permits: Semaphore,
    parallel: usize,
}

impl<'a> Reading<'a> {
    /// `parallel` requests at the same time; 0 takes one a core.
    pub(super) fn new(
        source: &'a RestoreSource,
        sources: &'a Sources,
        target: &'a Arc<Target>,
        parallel: usize,
    ) -> Reading<'a> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let parallel = if parallel == 0 { cores.max(PARALLEL_MIN) } else { parallel }.min(PARALLEL_MAX);
        Self { source, sources, target, permits: Semaphore::new(parallel), parallel }
    }

    /// Makes all files, group by group. With [`Place::Existing`] what a file holds already is not read again.
    pub(super) async fn read_all(&self, place: Place) -> Result<(), RestoreError> {
        let groups = self.target.layout.groups.iter().map(|files| self.read_group(files.clone(), place));
        futures_util::stream::iter(groups).buffer_unordered(self.parallel).try_collect::<()>().await
    }

    async fn read_group(&self, files: Range<usize>, place: Place) -> Result<(), RestoreError> {
        let layout = &self.target.layout;
        let contents = &self.target.contents;
        let (wanted, written) = match place {
            Place::Free => {
                let in_parts =
                    |index: &usize| layout.zeroed.contains(index) || !layout::is_plain(&contents.files[*index]);
                (layout.wanted(contents, files.clone()), files.filter(in_parts).collect())
            }
            Place::Existing => self.missing(files).await?,
        };
        for pass in layout.passes(wanted) {
            let reads = pass.iter().map(|range| self.read_range(range));
            futures_util::stream::iter(reads).buffer_unordered(self.parallel).try_collect::<()>().await?;
        }
        self.on_files(written, |target, index| target.complete(index)).await
    }

    /// Does something with each of some files, on a blocking thread.
    pub(super) async fn on_files(
        &self,
        files: Vec<usize>,
        work: impl Fn(&Target, usize) -> Result<(), WriteError> + Send + 'static,
    ) -> Result<(), RestoreError> {
        if files.is_empty() {
            return Ok(());
        }
        let _permit = self.permit().await;
        let target = self.target.clone();
        super::blocking(move || {
            let done = files.into_iter().try_for_each(|index| work(&target, index));
            done.map_err(RestoreError::of_writing)
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

    async fn read_range(&self, range: &PackRange) -> Result<(), RestoreError> {
        let _permit = self.permit().await;
        let key = key::pack(&self.source.cluster, &range.backup, range.pack);
        self.any_store(&key, async |store| read_range_from(store, &key, range, self.target).await).await
    }

    /// Reads the table of a pack from the first store that serves it.
    pub(super) async fn table(&self, backup: &BackupId, pack: &Pack) -> Result<Vec<TableFrame>, RestoreError> {
        let _permit = self.permit().await;
        let key = key::pack(&self.source.cluster, backup, pack.number);
        let read = async |store: &Arc<dyn ObjectStore>| {
            let silent = || StoreError::Timeout { store: store.name().clone(), operation: "get" };
            let table = tokio::time::timeout(STORE_SILENCE, fetch_table(store.as_ref(), &key, pack.size));
            table.await.map_err(|_| silent())?.map_err(RangeError::from)
        };
        self.any_store(&key, read).await
    }

    /// Tries one store after the other, and all again for a while when they are away.
    async fn any_store<T>(
        &self,
        key: &key::ObjectKey,
        read: impl AsyncFn(&Arc<dyn ObjectStore>) -> Result<T, RangeError>,
    ) -> Result<T, RestoreError> {
        let sources = self.sources;
        let mut last: Option<RangeError> = None;
        for round in 0..ROUNDS {
            for index in sources.in_order() {
                let store = sources.store(index);
                match read(store).await {
                    Ok(value) => return Ok(value),
                    Err(RangeError::Write(WriteError::Target { path, source })) => {
                        return Err(RestoreError::Write { path, source });
                    }
                    Err(error) => {
                        if matches!(&error, RangeError::Store(error) if error.is_outage()) {
                            sources.failed(index);
                        } else {
                            sources.warn(format!("store {}: {key} is damaged or missing there", store.name()));
                        }
                        tracing::warn!(store = %store.name(), %key, error = %chain(&error), "a range of a pack could not be used");
                        last = Some(error);
                    }
                }
            }
            let away = matches!(&last, Some(RangeError::Store(error)) if error.is_outage());
            if !away || round + 1 == ROUNDS {
                break;
            }
            tokio::time::sleep(ROUND_WAIT).await;
        }
        let error = last.ok_or(RestoreError::NoStore)?;
        Err(RestoreError::Pack { pack: key.to_string(), source: Box::new(error) })
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

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// Moves pieces from the store to a writer's thread.
async fn read_range_from(
    store: &Arc<dyn ObjectStore>,
    key: &key::ObjectKey,
    range: &PackRange,
    target: &Arc<Target>,
) -> Result<(), RangeError> {
    let silent = || StoreError::Timeout { store: store.name().clone(), operation: "get" };
    let wanted = ByteRange::Slice { offset: range.offset, length: range.length };
    let mut stream = tokio::time::timeout(STORE_SILENCE, store.get(key, wanted)).await.map_err(|_| silent())??;
    let (chunks, incoming) = mpsc::channel(CHUNKS_IN_MEMORY);
    let (writer_target, writer_range) = (target.clone(), range.clone());
    let writing = tokio::task::spawn_blocking(move || writer_target.write_range(&writer_range, incoming));
    let fed = loop {
        match tokio::time::timeout(STORE_SILENCE, stream.try_next()).await {
            Ok(Ok(Some(chunk))) => {
                // The writer hangs up when it has seen enough; then its own error counts.
                if chunks.send(chunk).await.is_err() {
                    break Ok(());
                }
            }
            Ok(Ok(None)) => break Ok(()),
            Ok(Err(error)) => break Err(error),
            Err(_) => break Err(silent()),
        }
    };
    drop(chunks);
    let written = writing.await.unwrap_or_else(|_| {
        let source = io::Error::other("the writer's thread panicked");
        Err(WriteError::Target { path: target.data_directory.clone(), source })
    });
    fed?;
    written.map_err(RangeError::Write)
}
