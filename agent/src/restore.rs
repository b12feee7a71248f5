//! Restores one backup into an empty place: packs are read in large ranges and in parallel, every byte is checked, and
//! `pg_control` comes last, so that an aborted restore cannot be started.
//!
//! ```text
//! check place ─ manifest ─ directories, links ─ ranges ═▶ files ─ checksums ─ label, settings, signal ─ sync ─ pg_control
//! ```
//!
//! Invariants:
//! * nothing that exists is removed or overwritten;
//! * a range that is damaged or away in one store is read from the next one;
//! * `backup_label` is written byte for byte. Should somebody remove it, recovery would begin at the wrong checkpoint and
//!   the damage would be silent; therefore the checkpoint in the restored `pg_control` is made impossible, which the
//!   label overrides. `backup_manifest` lists `pg_control` as it lies there, so `pg_verifybackup` agrees;
//! * tablespaces are links made by us, so no `tablespace_map` is written: the server would make the links anew from it.
//!
//! Which backup, which timeline and which target is decided elsewhere, before. This room fetches no WAL.

mod finish;
pub mod layout;
pub mod settings;
pub mod target;
mod writer;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use postgres_format::control_file::ControlError;
use repository::backup::{BackupError, fetch_manifest};
use repository::key;
use repository::name::ClusterName;
use repository::root::RootBackup;
use repository::store::{ByteRange, ObjectStore, StoreError};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use layout::{Contents, Layout, PackRange};
use settings::RecoverySettings;
use target::{Owner, TablespaceMap, TablespaceTarget, TargetError};
use writer::{Target, WriteError};

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
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Why a restore was refused or failed.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The place is not fit.
    #[error("the target cannot be restored to")]
    Target(#[from] TargetError),
    /// No store gave the manifest.
    #[error("the manifest of backup {backup} could not be read from any store")]
    Manifest {
        /// The backup.
        backup: String,
        /// What the last store said.
        #[source]
        source: BackupError,
    },
    /// No store gave a range.
    #[error("pack {pack} could not be read from any store")]
    Pack {
        /// Key of the pack.
        pack: String,
        /// What the last store said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No store was given.
    #[error("no store to restore from")]
    NoStore,
    /// A file came together from good frames and still differs.
    #[error(
        "{path} has the checksum {found:08X}, the manifest says {expected:08X}: the restored directory must not be used"
    )]
    Checksum {
        /// The file.
        path: PathBuf,
        /// What was written.
        found: u32,
        /// What was backed up.
        expected: u32,
    },
    /// The manifest would write outside of the target.
    #[error("{path} would be written through a link of the manifest: it was not made by a backup, nothing is restored")]
    ThroughLink {
        /// The file or directory.
        path: PathBuf,
    },
    /// The backup has no `pg_control`.
    #[error("the backup has no global/pg_control")]
    NoControl,
    /// `pg_control` cannot be interpreted.
    #[error("pg_control of the backup is damaged")]
    Control(#[source] ControlError),
    /// A file could not be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was told to stop.
    #[error("the restore was cancelled; what it wrote cannot be started and may be removed")]
    Cancelled,
    /// A writer ended in a way that is a mistake of ours.
    #[error("a writer of the restore ended unexpectedly")]
    Writer,
}

/// What to restore, and from where.
#[derive(Clone, Debug)]
pub struct RestoreSource {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// The backup, as a root names it.
    pub backup: RootBackup,
    /// Stores that have it, healthy and near ones first.
    pub stores: Vec<Arc<dyn ObjectStore>>,
}

/// Where to, and how the server shall recover.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The new data directory, absolute.
    pub target: PathBuf,
    /// New places of tablespaces.
    pub tablespace_map: TablespaceMap,
    /// Recovery settings.
    pub recovery: RecoverySettings,
    /// User who shall own the files when we are root; none takes the target's owner or `postgres`.
    pub owner: Option<String>,
    /// Ranges read at the same time; 0 takes one a core.
    pub parallel: usize,
    /// Directory for the manifest meanwhile.
    pub scratch: PathBuf,
}

/// How far a restore is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreProgress {
    /// Bytes written.
    pub bytes_done: u64,
    /// Bytes in all, 0 while unknown.
    pub bytes_total: u64,
}

/// A restore that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Files written.
    pub files: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Where each tablespace went.
    pub tablespaces: Vec<TablespaceTarget>,
    /// What deserves a human's look though the restore is good; one line each.
    pub warnings: Vec<String>,
}

/// Refuses a place that cannot be restored to, as far as that shows without the manifest.
pub fn check_target(options: &RestoreOptions) -> Result<Option<Owner>, RestoreError> {
    target::check_free(&options.target)?;
    Ok(target::owner_for(&options.target, options.owner.as_deref())?)
}

/// Restores. On failure the target holds no `pg_control` and cannot be started.
pub async fn restore(
    source: &RestoreSource,
    options: &RestoreOptions,
    progress: &watch::Sender<RestoreProgress>,
    cancel: &CancellationToken,
) -> Result<Restored, RestoreError> {
    let owner = check_target(options)?;
    let stores = Stores::new(&source.stores)?;
    let contents = manifest(source, &stores, &options.scratch).await?;
    let located: Vec<(u32, PathBuf)> =
        contents.tablespaces.iter().map(|tablespace| (tablespace.oid, finish::location(tablespace))).collect();
    let tablespaces = target::place_tablespaces(&options.target, &located, &options.tablespace_map)?;
    for tablespace in &tablespaces {
        target::check_free(&tablespace.location)?;
    }
    let layout = Arc::new(layout::lay_out(source.backup.backup, &contents.files));
    let total = contents.data_bytes();
    progress.send_replace(RestoreProgress { bytes_done: 0, bytes_total: total });
    let plan = Arc::new(finish::Work { options: options.clone(), contents, tablespaces, owner });
    let shared = plan.clone();
    blocking(move || finish::make_directories(&shared)).await?;
    let target = Arc::new(Target::new(options.target.clone(), plan.contents.files.clone(), layout.extents));
    tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(RestoreError::Cancelled),
        () = tell(progress, &target, total) => {}
        read = read_ranges(source, options, &stores, &layout, &target) => read?,
    }
    progress.send_replace(RestoreProgress { bytes_done: total, bytes_total: total });
    let (shared, finished) = (plan.clone(), target.clone());
    blocking(move || finish::finish(&shared, &layout, &finished)).await?;
    let mut warnings = stores.warnings();
    if source.backup.page_errors > 0 {
        warnings.push(format!(
            "the backup recorded {} corrupt pages, they were restored as they were",
            source.backup.page_errors
        ));
    }
    let files = plan.contents.files.len() as u64;
    Ok(Restored { files, bytes: total, tablespaces: plan.tablespaces.clone(), warnings })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RestoreError> + Send + 'static,
) -> Result<T, RestoreError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| RestoreError::Writer)?
}

/// Never ends by itself.
async fn tell(progress: &watch::Sender<RestoreProgress>, target: &Target, bytes_total: u64) {
    let mut ticks = tokio::time::interval(PROGRESS_EVERY);
    loop {
        ticks.tick().await;
        let bytes_done = target.bytes_done().min(bytes_total);
        progress.send_replace(RestoreProgress { bytes_done, bytes_total });
    }
}

/// Stores in order of preference; one that failed is asked after the others.
struct Stores {
    stores: Vec<(Arc<dyn ObjectStore>, AtomicBool)>,
    warnings: Mutex<BTreeSet<String>>,
}

impl Stores {
    fn new(stores: &[Arc<dyn ObjectStore>]) -> Result<Self, RestoreError> {
        if stores.is_empty() {
            return Err(RestoreError::NoStore);
        }
        let stores = stores.iter().map(|store| (store.clone(), AtomicBool::new(false))).collect();
        Ok(Self { stores, warnings: Mutex::default() })
    }

    fn in_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.stores.len()).collect();
        order.sort_by_key(|index| self.stores[*index].1.load(Ordering::Relaxed));
        order
    }

    fn store(&self, index: usize) -> &Arc<dyn ObjectStore> {
        &self.stores[index].0
    }

    /// Asks it later from now on, for it is away.
    fn failed(&self, index: usize) {
        self.stores[index].1.store(true, Ordering::Relaxed);
    }

    fn warn(&self, text: String) {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).insert(text);
    }

    fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

async fn manifest(source: &RestoreSource, stores: &Stores, scratch: &Path) -> Result<Contents, RestoreError> {
    let mut last = None;
    for index in stores.in_order() {
        let store = stores.store(index);
        match read_manifest(source, store.as_ref(), scratch).await {
            Ok(contents) => return Ok(contents),
            Err(error) => {
                stores.warn(format!("store {}: the manifest could not be read: {error}", store.name()));
                stores.failed(index);
                last = Some(error);
            }
        }
    }
    let source_error = last.ok_or(RestoreError::NoStore)?;
    Err(RestoreError::Manifest { backup: source.backup.backup.to_string(), source: source_error })
}

async fn read_manifest(
    source: &RestoreSource,
    store: &dyn ObjectStore,
    scratch: &Path,
) -> Result<Contents, BackupError> {
    let reader = fetch_manifest(store, &source.cluster, &source.backup, scratch).await?;
    let head = reader.head().clone();
    let key = key::manifest(&source.cluster, &source.backup.backup);
    let damaged = |damage| BackupError::Manifest { store: store.name().clone(), key: key.clone(), damage };
    Contents::gather(head, reader).map_err(damaged)
}

async fn read_ranges(
    source: &RestoreSource,
    options: &RestoreOptions,
    stores: &Stores,
    layout: &Layout,
    target: &Arc<Target>,
) -> Result<(), RestoreError> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let parallel = if options.parallel == 0 { cores.max(PARALLEL_MIN) } else { options.parallel }.min(PARALLEL_MAX);
    let reads = layout.ranges.iter().map(|range| read_range(source, stores, range, target));
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
    stores: &Stores,
    range: &PackRange,
    target: &Arc<Target>,
) -> Result<(), RestoreError> {
    let key = key::pack(&source.cluster, &range.backup, range.pack);
    let mut last: Option<RangeError> = None;
    for round in 0..ROUNDS {
        for index in stores.in_order() {
            let store = stores.store(index);
            match read_range_from(store, &key, range, target).await {
                Ok(()) => return Ok(()),
                Err(RangeError::Write(WriteError::Target { path, source })) => {
                    return Err(RestoreError::Write { path, source });
                }
                Err(error) => {
                    if matches!(&error, RangeError::Store(error) if error.is_outage()) {
                        stores.failed(index);
                    } else {
                        stores.warn(format!("store {}: {key} is damaged or missing there", store.name()));
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

/// Reads a file of the restored directory that may be absent.
fn read_optional(path: &Path) -> Result<String, RestoreError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(RestoreError::Write { path: path.to_owned(), source }),
    }
}
