//! The bytes of a restore: ranges of packs, many at a time, each from the first store that serves it whole.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use repository::key;
use repository::store::{ByteRange, ObjectStore, StoreError};
use thiserror::Error;
use tokio::sync::mpsc;

use super::layout::{Layout, PackRange};
use super::sources::Sources;
use super::writer::{Target, WriteError};
use super::{RestoreError, RestoreSource};

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

/// Reads all ranges into the target. `parallel` of them at the same time; 0 takes one a core.
pub(super) async fn read_ranges(
    source: &RestoreSource,
    parallel: usize,
    sources: &Sources,
    layout: &Layout,
    target: &Arc<Target>,
) -> Result<(), RestoreError> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let parallel = if parallel == 0 { cores.max(PARALLEL_MIN) } else { parallel }.min(PARALLEL_MAX);
    let reads = layout.ranges.iter().map(|range| read_range(source, sources, range, target));
    futures_util::stream::iter(reads).buffer_unordered(parallel).try_collect::<()>().await
}

/// Why one store did not serve a range.
#[derive(Debug, Error)]
enum RangeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Write(WriteError),
}

async fn read_range(
    source: &RestoreSource,
    sources: &Sources,
    range: &PackRange,
    target: &Arc<Target>,
) -> Result<(), RestoreError> {
    let key = key::pack(&source.cluster, &range.backup, range.pack);
    let mut last: Option<RangeError> = None;
    for round in 0..ROUNDS {
        for index in sources.in_order() {
            let store = sources.store(index);
            match read_range_from(store, &key, range, target).await {
                Ok(()) => return Ok(()),
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
