//! Restores one backup: packs are read in large ranges and in parallel, layer over layer, every byte is checked, and
//! `pg_control` comes last, so that an aborted restore cannot be started.
//!
//! ```text
//! check place ─ manifest ─ directories, links ─ ranges ═▶ files ─ checksums ─ label, settings, signal ─ sync ─ pg_control
//! ```
//!
//! Invariants:
//! * nothing that exists is removed or overwritten, unless a restore onto the cluster's own directory is asked for;
//! * a range that is damaged or away in one store is read from the next one;
//! * `backup_label` is written byte for byte. Should somebody remove it, recovery would begin at the wrong checkpoint and
//!   the damage would be silent; therefore the checkpoint in the restored `pg_control` is made impossible, which the
//!   label overrides. `backup_manifest` lists `pg_control` as it lies there, so `pg_verifybackup` agrees;
//! * tablespaces are links made by us, so no `tablespace_map` is written: the server would make the links anew from it.
//!
//! Which backup, which timeline and which target is decided elsewhere, before. This room fetches no WAL.

mod access;
mod delta;
mod existing;
mod finish;
pub mod layout;
mod ranges;
mod sources;
pub mod target;
mod writer;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use postgres_format::SystemIdentifier;
use postgres_format::control_file::ControlError;
use repository::backup::{BackupError, fetch_manifest};
use repository::key;
use repository::name::ClusterName;
use repository::restore_plan::Recovery;
use repository::root::RootBackup;
use repository::store::ObjectStore;
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use layout::Contents;
use ranges::Reading;
use sources::Sources;
use target::{TablespaceMap, TablespaceTarget, TargetError};
use writer::{Target, WriteError};

pub use access::{Access, Reader};
pub use target::Owner;

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
        source: Box<BackupError>,
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

impl RestoreError {
    /// What a writer's error is when no other store can help.
    fn of_writing(error: WriteError) -> Self {
        match error {
            WriteError::Target { path, source } => Self::Write { path, source },
            WriteError::Damage(damage) => Self::Pack { pack: String::new(), source: Box::new(damage) },
        }
    }
}

/// What may be in the place that is restored to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nothing.
    Free,
    /// Nothing, or a data directory of the same system on which no server runs. What it has and the backup has not is
    /// removed; what it has as the backup has it is kept.
    Existing,
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
    /// What may be there.
    pub place: Place,
    /// The databases that are wanted, by object identifier; none for all. Those of others get files of the right length that
    /// hold zeros; they can be dropped after recovery, and are good for nothing else.
    pub databases: Option<BTreeSet<u32>>,
    /// New places of tablespaces.
    pub tablespace_map: TablespaceMap,
    /// What the server is told about its recovery, as it was planned.
    pub recovery: Recovery,
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
    /// How many of those were there already.
    pub bytes_kept: u64,
    /// Files, directories and links that were removed because the backup does not have them.
    pub removed: u64,
    /// Where each tablespace went.
    pub tablespaces: Vec<TablespaceTarget>,
    /// What deserves a human's look though the restore is good; one line each.
    pub warnings: Vec<String>,
}

/// Refuses a place that cannot be restored to, as far as that shows without the manifest. Gives who shall own the files:
/// `owner`, if we are root.
pub fn check_target(data_directory: &Path, owner: Option<&str>) -> Result<Option<Owner>, RestoreError> {
    target::check_free(data_directory)?;
    Ok(target::owner_for(data_directory, owner)?)
}

/// The same for a place that may be a data directory of the same system.
pub fn check_existing(
    data_directory: &Path,
    system_identifier: SystemIdentifier,
    owner: Option<&str>,
) -> Result<Option<Owner>, RestoreError> {
    existing::check(data_directory, system_identifier)?;
    Ok(target::owner_for(data_directory, owner)?)
}

/// Refuses places of tablespaces that cannot be restored to, and maps of tablespaces that the backup does not have. Reads the
/// manifest; writes nothing but that into the scratch directory.
pub async fn check_tablespaces(source: &RestoreSource, options: &RestoreOptions) -> Result<(), RestoreError> {
    let contents = manifest(source, &Sources::new(&source.stores)?, &options.scratch).await?;
    tablespaces(&contents, options).map(|_| ())
}

/// Restores. On failure the target holds no `pg_control` and cannot be started.
pub async fn restore(
    source: &RestoreSource,
    options: &RestoreOptions,
    progress: &watch::Sender<RestoreProgress>,
    cancel: &CancellationToken,
) -> Result<Restored, RestoreError> {
    let owner = match options.place {
        Place::Free => check_target(&options.target, options.owner.as_deref())?,
        Place::Existing => check_existing(&options.target, source.backup.system_identifier, options.owner.as_deref())?,
    };
    let sources = Sources::new(&source.stores)?;
    let mut contents = manifest(source, &sources, &options.scratch).await?;
    if let Some(path) = contents.through_a_link() {
        return Err(RestoreError::ThroughLink { path: options.target.join(path) });
    }
    let links_left_out = finish::leave_out_links(&options.target, &mut contents);
    let tablespaces = tablespaces(&contents, options)?;
    let left_out = left_out(&contents, options.databases.as_ref())?;
    let target = Arc::new(Target::new(options.target.clone(), contents, options.databases.as_ref()));
    let total = match options.place {
        Place::Free => target.layout.bytes,
        Place::Existing => target.layout.file_bytes,
    };
    progress.send_replace(RestoreProgress { bytes_done: 0, bytes_total: total });
    let work = Arc::new(finish::Work { options: options.clone(), tablespaces, owner });
    let (shared, written) = (work.clone(), target.clone());
    let removed = blocking(move || prepare(&shared, &written)).await?;
    let reading = Reading::new(source, &sources, &target, options.parallel);
    tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(RestoreError::Cancelled),
        () = tell(progress, &target, total) => {}
        read = reading.read_all(options.place) => read?,
    }
    progress.send_replace(RestoreProgress { bytes_done: total, bytes_total: total });
    let (shared, written) = (work.clone(), target.clone());
    blocking(move || finish::finish(&shared, &written)).await?;
    let mut warnings = sources.warnings();
    if source.backup.page_errors > 0 {
        warnings.push(format!(
            "the backup recorded {} corrupt pages, they were restored as they were",
            source.backup.page_errors
        ));
    }
    warnings.extend(links_left_out);
    warnings.extend(left_out.map(|databases| {
        format!("the files of databases {databases} hold zeros: drop these databases after recovery")
    }));
    Ok(Restored {
        files: target.contents.files.len() as u64,
        bytes: target.layout.file_bytes,
        bytes_kept: target.bytes_kept(),
        removed,
        tablespaces: work.tablespaces.clone(),
        warnings,
    })
}

/// Names the databases that are left out; refuses to look for one that the backup does not have.
fn left_out(contents: &Contents, wanted: Option<&BTreeSet<u32>>) -> Result<Option<String>, TargetError> {
    let Some(wanted) = wanted else { return Ok(None) };
    let paths = contents.files.iter().map(|file| file.path.as_path());
    let known: BTreeSet<u32> = paths.filter_map(layout::database_of).collect();
    if let Some(database) = wanted.difference(&known).next() {
        return Err(TargetError::DatabaseUnknown { database: *database, known: known.into_iter().collect() });
    }
    let others = known.difference(wanted).filter(|database| **database >= layout::FIRST_OF_USERS);
    let names: Vec<String> = others.map(u32::to_string).collect();
    Ok((!names.is_empty()).then(|| names.join(", ")))
}

/// Where each tablespace goes; refuses places that are taken.
fn tablespaces(contents: &Contents, options: &RestoreOptions) -> Result<Vec<TablespaceTarget>, RestoreError> {
    let located: Vec<(u32, PathBuf)> =
        contents.tablespaces.iter().map(|tablespace| (tablespace.oid, finish::location(tablespace))).collect();
    let tablespaces = target::place_tablespaces(&options.target, &located, &options.tablespace_map)?;
    for tablespace in &tablespaces {
        match options.place {
            Place::Free => target::check_free(&tablespace.location)?,
            Place::Existing => existing::check_tablespace(&options.target, tablespace)?,
        }
    }
    Ok(tablespaces)
}

/// Makes the place ready for the files' bytes. Gives the number of entries that were removed.
fn prepare(work: &finish::Work, written: &Target) -> Result<u64, RestoreError> {
    let removed = match work.options.place {
        Place::Existing if work.options.target.exists() => existing::clear(work, &written.contents)?,
        Place::Existing | Place::Free => 0,
    };
    finish::make_directories(work, &written.contents)?;
    existing::mark(&work.options.target, &written.contents)?;
    Ok(removed)
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

async fn manifest(source: &RestoreSource, sources: &Sources, scratch: &Path) -> Result<Contents, RestoreError> {
    let mut last = None;
    for index in sources.in_order() {
        let store = sources.store(index);
        match read_manifest(source, store.as_ref(), scratch).await {
            Ok(contents) => return Ok(contents),
            Err(error) => {
                sources.warn(format!("store {}: the manifest could not be read: {error}", store.name()));
                sources.failed(index);
                last = Some(error);
            }
        }
    }
    let source_error = last.ok_or(RestoreError::NoStore)?;
    Err(RestoreError::Manifest { backup: source.backup.backup.to_string(), source: Box::new(source_error) })
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

/// Reads a file of the restored directory that may be absent.
fn read_optional(path: &Path) -> Result<String, RestoreError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(RestoreError::Write { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests;
