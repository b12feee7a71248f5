//! One base backup of this node: start on a pinned session, find the parent and what changed since, read files in
//! parallel into packs, stop, describe, publish.
//!
//! ```text
//! start ─ list ─ parent, changes ─ plan ─ copy (readers ═ packs ═▶ road) ─ pg_control ─ stop ─ manifest ─▶ road ─
//! WAL durable ─ root commit
//! ```
//!
//! Invariants:
//! * a backup exists only once a root names it; until then what was sent is unreferenced and harmless;
//! * `global/pg_control` is read after every other file and before the stop: on a standby it says where the copy becomes
//!   consistent;
//! * the session that started the backup stops it; when it is lost, or the node is promoted, the backup fails;
//! * memory is bounded: a buffer a reader, and at most [`PACKS_IN_MEMORY_BYTES`] of packs.
//!
//! This room conducts; what to build on is decided in [`parent`], what to read in [`changes`] and [`plan`], what came of it
//! in [`assembly`], by which road in [`road`].
//! It takes one backup at a time and removes nothing, also not the packs of a backup that failed.

pub mod assembly;
pub mod capture;
pub mod changes;
mod copy;
mod describe;
mod increment;
pub mod listing;
pub mod pages;
pub mod parent;
mod pin;
pub mod plan;
mod publish;
mod reader;
pub mod rebase;
pub mod road;
mod witness;

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use postgres_format::backup_label::{BackupLabel, BackupLabelError};
use postgres_format::control_file::ControlError;
use postgres_format::data_directory;
use postgres_format::{Lsn, SystemIdentifier, Timeline};
use repository::backup::manifest::ManifestDamage;
use repository::backup::origin::{BackupType, ChangeSource};
use repository::key;
use repository::name::{BackupId, ClusterName, NodeName};
use repository::root::RootBackup;
use repository::store::ObjectStore;
use thiserror::Error;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::postgres::{ArchiveSettings, BackupStart, BackupStop, Identity, Role, Server, ServerError, StartCheckpoint};
use capture::Capture;
use copy::{Copied, copy, read_control};
use describe::Facts;
use increment::Increment;
use parent::find::Library;
use plan::CopyPlan;
use road::{BackupRoad, Road, RoadError, Roads};
use witness::OwnWal;

/// Most bytes of packs in memory: open, waiting and being sent.
pub const PACKS_IN_MEMORY_BYTES: u64 = 56 << 20;
/// How often a standby repeats its wish that the primary switch WAL.
const WISH_EVERY: Duration = Duration::from_secs(30);

/// Why there is no backup.
#[derive(Debug, Error)]
pub enum BackupError {
    /// A backup of this node runs already.
    #[error("a backup of this node is running already")]
    Running,
    /// It was told to stop.
    #[error("the backup was cancelled")]
    Cancelled,
    /// The server refused or was lost.
    #[error("the server did not play its part in the backup")]
    Server(#[from] ServerError),
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file without which no server starts is gone.
    #[error("{path} vanished, a server cannot start without it")]
    Vanished {
        /// The file.
        path: PathBuf,
    },
    /// Directories are nested too deeply.
    #[error("{path} is nested too deeply: is there a loop of mounts?")]
    TooDeep {
        /// The directory.
        path: PathBuf,
    },
    /// Data lies behind a link that is no tablespace's.
    #[error(
        "{path} is a link to {target}, and data behind such a link is in no backup: move it back into the data directory, \
         or into a tablespace"
    )]
    LinkedData {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A tablespace has a link and no directory.
    #[error("tablespace {oid} lacks its directory {directory}: is its file system mounted?")]
    TablespaceAway {
        /// Its object identifier.
        oid: u32,
        /// The directory of this server version.
        directory: PathBuf,
    },
    /// A link leads to another link.
    #[error("link {path} leads to another link: let it lead to its end")]
    LinkToLink {
        /// The link.
        path: PathBuf,
    },
    /// `pg_control` makes no sense, or is of a version we do not know.
    #[error("pg_control cannot be interpreted, so no backup is taken")]
    Control(#[from] ControlError),
    /// `pg_control` and the server disagree.
    #[error("the data directory belongs to system {found}, the server says {expected}")]
    Foreign {
        /// From `pg_control`.
        found: SystemIdentifier,
        /// From the server.
        expected: SystemIdentifier,
    },
    /// WAL would never be archived.
    #[error(
        "archive_mode is off on this primary, so the WAL of a backup would never reach the repository: set it to on"
    )]
    ArchivingOff,
    /// A standby's copy would not be consistent.
    #[error("full_page_writes is off on the primary, so a standby's files cannot be backed up: set it to on")]
    NoFullPageWrites,
    /// The role or the timeline of the node changed.
    #[error("the node was promoted or changed its timeline during the backup")]
    Promoted,
    /// The label that the server made makes no sense.
    #[error("the server's backup_label cannot be read")]
    Label(#[from] BackupLabelError),
    /// A pack could not be built.
    #[error("a pack could not be built")]
    Pack(#[source] repository::backup::pack::PackError),
    /// No store says which backups there are to build on.
    #[error("no store tells which backups it has, so it is not known what this one could build on: {reasons}")]
    Roots {
        /// Why, a part a store.
        reasons: String,
    },
    /// The parent's manifest could be read at first, and then not.
    #[error("the manifest of the backup to build on cannot be read")]
    Parent(#[source] ManifestDamage),
    /// The manifest could not be built.
    #[error("the manifest could not be built")]
    Manifest(#[source] io::Error),
    /// An object did not get through.
    #[error("the backup could not be sent")]
    Road(#[from] RoadError),
    /// The repository failed while publishing on the direct road.
    #[error("the backup could not be published: {what}")]
    Publish {
        /// At which step.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// WAL did not arrive in time.
    #[error(
        "{missing} WAL files between {start} and {stop} are not in store {store} after {seconds} s, the first is {first}"
    )]
    WalMissing {
        /// The store.
        store: String,
        /// How many are missing.
        missing: usize,
        /// The first of them.
        first: String,
        /// Start of the backup.
        start: Lsn,
        /// Stop of the backup.
        stop: Lsn,
        /// How long we waited.
        seconds: u64,
    },
    /// This server's own WAL could not be read, so that nothing could prove which WAL belongs to its files.
    #[error("WAL up to {lsn} could not be read from the server's own pg_wal: {reason}")]
    Witness {
        /// Up to where.
        lsn: Lsn,
        /// Why not.
        reason: String,
    },
    /// The WAL of the backup is another server's.
    #[error(
        "WAL {name} in store {store} is another server's than this one's, so that the backup could not be recovered: do a \
         clone and its original write one timeline?"
    )]
    ForeignWal {
        /// The store.
        store: String,
        /// The file.
        name: String,
    },
    /// A reader ended in a way that is a mistake of ours.
    #[error("a reader of the backup ended unexpectedly")]
    Reader,
}

/// The node whose backups these are.
#[derive(Clone, Debug)]
pub struct BackupNode {
    /// The live server.
    pub server: Arc<dyn Server>,
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// Name of this node.
    pub node: NodeName,
    /// Its data directory.
    pub data_directory: PathBuf,
    /// Readers unless a request says otherwise; 0 is one a core.
    pub parallel: usize,
    /// zstd level of the frames.
    pub compression_level: i32,
    /// Directory for the manifest while it is written; a few hundred bytes a file of the cluster.
    pub scratch: PathBuf,
}

/// What is asked.
#[derive(Clone, Debug)]
pub struct BackupRequest {
    /// Identifier of the new backup.
    pub backup: BackupId,
    /// What it may build on; it becomes full if nothing is fit.
    pub backup_type: BackupType,
    /// Label for people.
    pub label: String,
    /// How the first checkpoint is made.
    pub checkpoint: StartCheckpoint,
    /// Readers; 0 takes the node's setting.
    pub parallel: usize,
    /// Longest wait for the WAL of the backup to be durable.
    pub wal_wait: Duration,
}

/// What a backup is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Step {
    /// Waiting for the checkpoint.
    #[default]
    Starting,
    /// Finding the parent and what changed since.
    Comparing,
    /// Reading files.
    Copying,
    /// Stopping and describing.
    Finishing,
    /// Waiting for WAL and the commit.
    Publishing,
}

impl Step {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "waiting for the start checkpoint",
            Self::Comparing => "finding what changed",
            Self::Copying => "copying files",
            Self::Finishing => "writing the manifest",
            Self::Publishing => "waiting for WAL and publishing",
        }
    }
}

/// How far a backup is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub step: Step,
    /// Bytes of files read.
    pub bytes_done: u64,
    /// Bytes of files to be read, 0 while unknown.
    pub bytes_total: u64,
}

/// A backup that exists.
#[derive(Clone, Debug, PartialEq)]
pub struct BackupOutcome {
    /// Its entry in the root.
    pub entry: RootBackup,
    /// Bytes read from the data directory.
    pub bytes_read: u64,
    /// The road that published it.
    pub road: Road,
    /// Stores whose root names it.
    pub stores: Vec<String>,
    /// Stores that get it later.
    pub lagging: Vec<String>,
    /// What deserves a human's look though the backup is good; one line each.
    pub warnings: Vec<String>,
}

/// The backups of one node, one at a time.
#[derive(Debug)]
pub struct Backups {
    node: BackupNode,
    running: Semaphore,
}

/// Lines to the outside while a backup runs.
#[derive(Debug)]
pub struct BackupLines<'a> {
    /// Where progress is told.
    pub progress: &'a watch::Sender<Progress>,
    /// Where it is told, once it is known, what the backup builds on and how it was found what changed.
    pub built_on: &'a watch::Sender<String>,
    /// Where a standby's wish is put that the primary switch WAL past an LSN; none while the coordinator is away.
    pub switch_wal: Option<&'a mpsc::Sender<Lsn>>,
    /// Stops the backup.
    pub cancel: &'a CancellationToken,
}

impl Backups {
    /// No backup runs yet.
    pub fn new(node: BackupNode) -> Self {
        Self { node, running: Semaphore::new(1) }
    }

    /// True while a backup runs.
    pub fn is_running(&self) -> bool {
        self.running.available_permits() == 0
    }

    /// Takes a backup and publishes it. Dropping the future gives the backup up; its readers end within one buffer.
    pub async fn take(
        &self,
        request: &BackupRequest,
        roads: Roads,
        lines: &BackupLines<'_>,
    ) -> Result<BackupOutcome, BackupError> {
        let _permit = self.running.try_acquire().map_err(|_| BackupError::Running)?;
        let stores = roads.readable();
        let road = BackupRoad::new(roads, self.node.cluster.clone(), self.node.node.clone())?;
        let guard = SessionGuard(self.node.server.as_ref());
        let taken = tokio::select! {
            biased;
            () = lines.cancel.cancelled() => Err(BackupError::Cancelled),
            taken = take(&self.node, request, &stores, &road, lines) => taken,
        };
        drop(guard);
        if taken.is_err() {
            pin::give_up(&road, &self.node.cluster, &self.node.node, request.backup).await;
        }
        taken
    }
}

/// Ends the server's side of a backup, however ours ended.
struct SessionGuard<'a>(&'a dyn Server);

impl Drop for SessionGuard<'_> {
    fn drop(&mut self) {
        self.0.abandon_backup();
    }
}

async fn take(
    node: &BackupNode,
    request: &BackupRequest,
    stores: &[Arc<dyn ObjectStore>],
    road: &BackupRoad,
    lines: &BackupLines<'_>,
) -> Result<BackupOutcome, BackupError> {
    let tell = |step, bytes_done, bytes_total| {
        lines.progress.send_replace(Progress { step, bytes_done, bytes_total });
    };
    tell(Step::Starting, 0, 0);
    let (identity, settings) = admit(node).await?;
    let label = if request.label.is_empty() {
        format!("pgconvoy {}", request.backup)
    } else {
        format!("pgconvoy {} {}", request.backup, request.label)
    };
    let start = node.server.start_backup(&label, request.checkpoint).await?;
    tracing::info!(backup = %request.backup, start_lsn = %start.start_lsn, timeline = %start.timeline, "backup started");
    process::crash_point!("agent/after-backup-start-before-packs");
    let own_wal = OwnWal::of(node, &identity);
    let first_witness = own_wal.at_checkpoint(start.timeline).await?;

    tell(Step::Comparing, 0, 0);
    let looked = look(node, &identity, &settings).await?;
    let library = Library { stores, cluster: &node.cluster, scratch: &node.scratch };
    let increment = increment::prepare(node, request.backup_type, library, &identity, &start, looked).await?;
    lines.built_on.send_replace(increment.describe());
    tracing::info!(backup = %request.backup, built_on = increment.describe(), "it is known what the backup builds on");
    let Increment { work, parent, backup_type, source } = increment;
    if let Some(parent) = &parent {
        road.builds_on(&parent.holders);
    }
    let built_on = parent.as_ref().map(|parent| parent.entry.backup);
    pin::begin(road, &node.cluster, &node.node, request.backup, built_on).await;
    let total = work.plan.bytes;
    tell(Step::Copying, 0, total);
    let copied = copy(node, request, road, lines, work, &start).await?;
    confirm_tablespaces(node, &copied).await?;
    process::crash_point!("agent/after-packs-before-backup-stop");
    tell(Step::Finishing, total, total);
    let stop = node.server.stop_backup().await?;
    process::crash_point!("agent/after-backup-stop-before-manifest");
    let facts = facts(node, request, &identity, &start, &stop, &copied, (backup_type, source))?;
    let wal_witnesses = own_wal.of_backup(first_witness, &facts)?;
    let facts = Facts { wal_witnesses, warnings: warnings(&copied, &facts), ..facts };
    let scratch = node.scratch.clone();
    let (described, copied, facts) = tokio::task::spawn_blocking(move || {
        let described = describe::describe(&facts, &copied, parent.as_deref(), &scratch);
        let described = described.map_err(BackupError::Manifest)?;
        Ok::<_, BackupError>((described, copied, facts))
    })
    .await
    .map_err(|_| BackupError::Reader)??;
    road.put(&key::manifest(&node.cluster, &request.backup), &described.body(), &described.entry.manifest_sha256)
        .await?;
    process::crash_point!("agent/after-manifest-before-publication");

    tell(Step::Publishing, total, total);
    let published = tokio::select! {
        published = publish::publish(road, &node.cluster, &node.node, &described.entry, request.wal_wait, &node.scratch) => published?,
        never = wish_for_switch(lines, facts.from_standby, stop.stop_lsn) => match never {},
    };
    process::crash_point!("agent/after-publication-before-answer");
    Ok(BackupOutcome {
        entry: described.entry,
        bytes_read: copied.shared.bytes_done(),
        road: road.road(),
        stores: published.stores,
        lagging: published.lagging,
        warnings: facts.warnings,
    })
}

/// Refuses what cannot become a good backup before anything is started.
async fn admit(node: &BackupNode) -> Result<(Identity, ArchiveSettings), BackupError> {
    let identity = node.server.identity().await?;
    let settings = node.server.archive_settings().await?;
    let position = node.server.position().await?;
    if position.role == Role::Primary && settings.archive_mode == "off" {
        return Err(BackupError::ArchivingOff);
    }
    let (control, _) = read_control(&node.data_directory).await?;
    if control.system_identifier != identity.system_identifier {
        return Err(BackupError::Foreign { found: control.system_identifier, expected: identity.system_identifier });
    }
    if position.role == Role::Standby && !control.full_page_writes {
        return Err(BackupError::NoFullPageWrites);
    }
    Ok((identity, settings))
}

/// Lists the data directory and plans the copy.
async fn look(
    node: &BackupNode,
    identity: &Identity,
    settings: &ArchiveSettings,
) -> Result<(CopyPlan, Capture), BackupError> {
    let (control, _) = read_control(&node.data_directory).await?;
    let version_directory = data_directory::tablespace_version_directory(identity.major(), control.catalog_version);
    let data_directory = node.data_directory.clone();
    let configuration: Vec<PathBuf> = settings.configuration_files.iter().map(|file| file.path.clone()).collect();
    let looked = tokio::task::spawn_blocking(move || {
        let plan = plan::plan(listing::list(&data_directory, &version_directory)?);
        let capture = capture::capture(&data_directory, &configuration, &plan.links);
        Ok((plan, capture))
    });
    looked.await.map_err(|_| BackupError::Reader)?
}

/// See [`listing::confirm`].
async fn confirm_tablespaces(node: &BackupNode, copied: &Copied) -> Result<(), BackupError> {
    let (data_directory, shared) = (node.data_directory.clone(), Arc::clone(&copied.shared));
    let confirming = tokio::task::spawn_blocking(move || listing::confirm(&data_directory, &shared.plan.tablespaces));
    confirming.await.map_err(|_| BackupError::Reader)?
}

/// Puts together what the manifest and the root say about the whole; refuses a copy that changed its timeline.
fn facts(
    node: &BackupNode,
    request: &BackupRequest,
    identity: &Identity,
    start: &BackupStart,
    stop: &BackupStop,
    copied: &Copied,
    (backup_type, changes): (BackupType, ChangeSource),
) -> Result<Facts, BackupError> {
    let label = BackupLabel::parse(&stop.backup_label)?;
    let from_standby = start.role == Role::Standby;
    let min_recovery_point = from_standby.then_some(copied.control.min_recovery_point);
    let stop_timeline: Timeline = match (from_standby, copied.control.min_recovery_point_timeline) {
        (true, Some(timeline)) => timeline,
        (true, None) => return Err(BackupError::Promoted),
        (false, _) => label.start_timeline,
    };
    Ok(Facts {
        backup: request.backup,
        backup_type,
        changes,
        cluster: node.cluster.clone(),
        node: node.node.clone(),
        identity: identity.clone(),
        label_asked: request.label.clone(),
        start_lsn: label.start_lsn,
        start_timeline: label.start_timeline,
        start_time: start.started,
        stop: stop.clone(),
        stop_timeline,
        from_standby,
        min_recovery_point,
        checkpoint: label.checkpoint,
        wal_witnesses: Vec::new(),
        warnings: Vec::new(),
    })
}

/// The end of a standby's backup lies in a segment that only the primary can finish. The wish is repeated, for it can be
/// lost on its way, and granting it twice does nothing. Never ends by itself.
async fn wish_for_switch(lines: &BackupLines<'_>, from_standby: bool, stop: Lsn) -> Infallible {
    let Some(wish) = lines.switch_wal.filter(|_| from_standby) else { return std::future::pending().await };
    let mut ticks = tokio::time::interval(WISH_EVERY);
    loop {
        ticks.tick().await;
        // A full queue holds a wish already.
        let _ = wish.try_send(stop);
    }
}

fn warnings(copied: &Copied, facts: &Facts) -> Vec<String> {
    let mut warnings = Vec::new();
    for remark in &copied.shared.plan.remarks {
        warnings.push(remark.to_string());
    }
    for path in &copied.capture.left_out {
        warnings.push(format!("configuration file {} could not be captured", path.display()));
    }
    for file in &copied.files {
        if let Some(trouble) = file.pages.trouble(facts.stop.stop_lsn) {
            let path = describe::path_of(copied, file.file).display().to_string();
            warnings.push(format!("{path}: {trouble}"));
        }
    }
    warnings
}
