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
mod checksums;
mod databases;
mod delta;
mod draft;
mod existing;
mod finish;
mod groups;
mod layout;
mod links;
mod manifest;
mod outline;
mod paths;
mod ranges;
mod sources;
mod survey;
pub mod target;
mod writer;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use postgres_format::SystemIdentifier;
use postgres_format::control_file::ControlError;
use repository::backup::BackupError;
use repository::name::ClusterName;
use repository::restore_plan::Recovery;
use repository::root::RootBackup;
use repository::store::ObjectStore;
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use checksums::Checksums;
use draft::Draft;
use finish::Work;
use groups::{Groups, PackSizes};
use layout::Ages;
use paths::PathSet;
use ranges::Reading;
use sources::{Patience, Sources};
use target::{TablespaceMap, TablespaceTarget, TargetError};
use writer::{Target, WriteError};

pub use access::{Access, Reader};
pub use links::{LinkChoice, OtherLinks};
pub use survey::{Measured, Survey, survey};
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
    /// What is held on disk meanwhile could not be.
    #[error("files in the scratch directory fail")]
    Scratch(#[source] io::Error),
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
    /// The databases that are wanted, by name or object identifier; all if it is empty. Those of others get files of the
    /// right length that hold zeros; they can be dropped after recovery, and are good for nothing else.
    pub databases: Vec<String>,
    /// New places of tablespaces.
    pub tablespace_map: TablespaceMap,
    /// What becomes of other links.
    pub links: LinkChoice,
    /// What the server is told about its recovery, as it was planned.
    pub recovery: Recovery,
    /// User who shall own the files when we are root; none takes the target's owner or `postgres`.
    pub owner: Option<String>,
    /// Ranges read at the same time; 0 takes one a core.
    pub parallel: usize,
    /// Bytes of packs read a second at most; 0 is no limit.
    pub bytes_per_second: u64,
    /// Directory for the manifest meanwhile, and up to 36 bytes a file.
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

/// Restores. On failure the target holds no `pg_control` and cannot be started.
pub async fn restore(
    source: &RestoreSource,
    options: &RestoreOptions,
    progress: &watch::Sender<RestoreProgress>,
    cancel: &CancellationToken,
) -> Result<Restored, RestoreError> {
    restore_with(Patience::default(), source, options, progress, cancel).await
}

async fn restore_with(
    patience: Patience,
    source: &RestoreSource,
    options: &RestoreOptions,
    progress: &watch::Sender<RestoreProgress>,
    cancel: &CancellationToken,
) -> Result<Restored, RestoreError> {
    let owner = match options.place {
        Place::Free => check_target(&options.target, options.owner.as_deref())?,
        Place::Existing => check_existing(&options.target, source.backup.system_identifier, options.owner.as_deref())?,
    };
    let sources = Sources::new(&source.stores, patience)?;
    let Draft { manifest, outline, paths, databases, tablespaces, links, notes } =
        Draft::make(source, &sources, options).await?;
    let share = outline.share(databases.as_deref());
    let (file_count, total) = match options.place {
        Place::Free => (outline.files, share.layer_bytes),
        Place::Existing => (outline.files, share.file_bytes),
    };
    progress.send_replace(RestoreProgress { bytes_done: 0, bytes_total: total });
    let ages = Arc::new(Ages::of(&outline.head));
    let target = Arc::new(Target::new(options.target.clone(), outline.head.block_size));
    let checksums = Checksums::create_in(&options.scratch).map_err(RestoreError::Scratch)?;
    let work = Arc::new(Work { options: options.clone(), outline, tablespaces, links, owner, checksums });
    let prepared = work.clone();
    let removed = blocking(move || prepare(&prepared, paths.as_ref())).await?;
    let sizes = if options.place == Place::Existing { PackSizes::Kept } else { PackSizes::LeftOut };
    let groups = Groups::of(&manifest, databases, sizes)?;
    let reading = Reading::new(source, &sources, &target, &work, ages);
    tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(RestoreError::Cancelled),
        () = tell(progress, &target, total) => {}
        read = reading.read_all(groups) => read?,
    }
    progress.send_replace(RestoreProgress { bytes_done: total, bytes_total: total });
    let (finished, written) = (work.clone(), target.clone());
    blocking(move || finish::finish(&finished, &written, &manifest)).await?;
    let mut warnings = sources.warnings();
    if source.backup.page_errors > 0 {
        warnings.push(format!(
            "the backup recorded {} corrupt pages, they were restored as they were",
            source.backup.page_errors
        ));
    }
    warnings.extend(notes);
    Ok(Restored {
        files: file_count,
        bytes: share.file_bytes,
        bytes_kept: target.bytes_kept(),
        removed,
        tablespaces: work.tablespaces.clone(),
        warnings,
    })
}

/// Makes the place ready for the files' bytes. Gives the number of entries that were removed.
fn prepare(work: &Work, paths: Option<&PathSet>) -> Result<u64, RestoreError> {
    finish::make_root(work)?;
    existing::mark(&work.options.target, &work.outline.head)?;
    let removed = paths.map(|paths| existing::clear(work, paths)).transpose()?;
    finish::make_directories(work)?;
    Ok(removed.unwrap_or(0))
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
