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
//! * memory is bounded: a buffer a reader, and at most [`PACKS_IN_MEMORY_BYTES`] of packs. What must be remembered of every
//!   file lies on disk ([`rows`]).
//!
//! This room conducts; what to build on is decided in [`parent`], what to read in [`changes`] and [`plan`], what came of it
//! in [`assembly`], by which road in [`road`].
//! It takes one backup at a time and removes nothing. The packs of a backup that failed stay, pinned, for the next one, as
//! far as notes tell of them ([`notes`], [`resume`]).

pub mod assembly;
pub mod capture;
mod catch_up;
pub mod changes;
pub mod compare;
mod copy;
mod describe;
mod error;
mod held;
mod holder;
mod increment;
pub mod listing;
mod notes;
pub mod pace;
pub mod pages;
pub mod parent;
mod part;
mod pin;
pub mod plan;
mod primary;
mod publish;
mod reader;
pub mod rebase;
mod resume;
pub mod road;
pub mod rows;
mod witness;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postgres_format::backup_label::BackupLabel;
use postgres_format::data_directory;
use postgres_format::{Lsn, Timeline};
use repository::backup::note::Attempt;
use repository::backup::origin::{BackupType, ChangeSource};
use repository::key;
use repository::name::{BackupId, ClusterName, NodeName};
use repository::root::RootBackup;
use repository::store::ObjectStore;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::postgres::{ArchiveSettings, BackupStart, BackupStop, Identity, Role, Server, StartCheckpoint};
pub use error::BackupError;
pub use held::Held;

use capture::Capture;
use copy::{Copied, copy, read_control};
use describe::Facts;
use holder::{Holder, Stopped};
use increment::Increment;
use pace::Pace;
use parent::find::Library;
use part::Side;
use plan::CopyPlan;
use primary::Primary;
use road::{BackupRoad, Road, Roads};
use witness::OwnWal;

/// Most bytes of packs in memory: open, waiting and being sent.
pub const PACKS_IN_MEMORY_BYTES: u64 = 56 << 20;
/// How long a backup waits for the one before, which a coordinator counts as over once it is published.
const FAREWELL: Duration = Duration::from_secs(10);
/// How often a standby repeats its wish that the primary switch WAL.
const WISH_EVERY: Duration = Duration::from_secs(30);

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
    /// Bytes read a second at most unless a request says otherwise; 0 is no limit.
    pub bytes_per_second: u64,
    /// How fast the backup that runs may read.
    pub pace: Arc<Pace>,
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
    /// Bytes read a second at most; 0 is no limit, and absent takes the node's setting.
    pub bytes_per_second: Option<u64>,
    /// Longest wait for the WAL of the backup to be durable.
    pub wal_wait: Duration,
    /// For the hybrid shape: the primary that starts and stops it.
    pub primary: Option<NodeName>,
}

/// What a backup is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Step {
    /// Waiting for the checkpoint.
    #[default]
    Starting,
    /// Waiting for the standby to come to the start.
    CatchingUp,
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
            Self::CatchingUp => "waiting for the standby to replay up to the start",
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
    /// Whether what was stored so far is kept for the next backup to go on from, should this one fail.
    pub kept: bool,
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
    /// The WAL it waits for, if no root names it yet. All else is durable, and it is published when that has come.
    pub waiting_for: Option<String>,
    /// What deserves a human's look though the backup is good; one line each.
    pub warnings: Vec<String>,
}

/// The backups of one node, one at a time.
#[derive(Debug)]
pub struct Backups {
    node: BackupNode,
    running: Semaphore,
    /// What is held for a standby, or was.
    held: Mutex<Option<Arc<Held>>>,
}

/// Lines to the outside while a backup runs.
#[derive(Debug)]
pub struct BackupLines<'a> {
    /// Where progress is told.
    pub progress: &'a watch::Sender<Progress>,
    /// Where it is told, once it is known, what the backup builds on and how it was found what changed.
    pub built_on: &'a watch::Sender<String>,
    /// Where a standby's wish is put that the primary switch WAL past an LSN; none if nobody passes it on.
    pub switch_wal: Option<&'a mpsc::Sender<Lsn>>,
    /// Stops the backup.
    pub cancel: &'a CancellationToken,
    /// Cancelled when the agent stops: then what was stored is kept, which it is not if somebody stops the backup.
    pub stopping: &'a CancellationToken,
}

impl BackupLines<'_> {
    fn tell(&self, step: Step, bytes_done: u64, bytes_total: u64) {
        self.progress.send_modify(|progress| *progress = Progress { step, bytes_done, bytes_total, ..*progress });
    }
}

impl Backups {
    /// No backup runs yet.
    pub fn new(node: BackupNode) -> Self {
        Self { node, running: Semaphore::new(1), held: Mutex::default() }
    }

    /// The node whose backups these are.
    pub fn node(&self) -> &BackupNode {
        &self.node
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
        let _permit = self.begin().await?;
        let stores = roads.readable();
        let holder = holder(&self.node, request, &roads)?;
        let road = BackupRoad::new(roads, self.node.cluster.clone(), self.node.node.clone())?;
        let guard = SessionGuard(self.node.server.as_ref());
        let taken = tokio::select! {
            biased;
            () = lines.cancel.cancelled() => Err(BackupError::Cancelled),
            taken = take(&self.node, request, &holder, &stores, &road, lines) => taken,
        };
        let taken = taken.map_err(|error| error.in_scratch(&self.node.scratch));
        drop(guard);
        holder.release().await;
        if let Err(error) = &taken {
            let given_up = matches!(error, BackupError::Cancelled) && !lines.stopping.is_cancelled();
            lines.progress.send_modify(|progress| progress.kept &= !given_up);
            if !lines.progress.borrow().kept {
                pin::give_up(&road, &self.node.cluster, &self.node.node, request.backup).await;
            }
        }
        taken
    }

    /// The right to run, one at a time.
    async fn begin(&self) -> Result<SemaphorePermit<'_>, BackupError> {
        let permit = tokio::time::timeout(FAREWELL, self.running.acquire()).await;
        permit.ok().and_then(Result::ok).ok_or(BackupError::Running)
    }

    /// Publishes in the direct store what this node finished but for its WAL, as far as that has come. For a node whose
    /// coordinator is away, or that has none.
    pub async fn publish_left(&self, direct: &dyn ObjectStore) {
        if self.is_running() {
            return;
        }
        let BackupNode { cluster, node, scratch, .. } = &self.node;
        match publish::publish_left(direct, cluster, node, scratch).await {
            Ok(published) => {
                for entry in published {
                    tracing::info!(backup = %entry.backup, store = %direct.name(), "a backup whose WAL has come was published");
                }
            }
            Err(error) => {
                let error = crate::archive::ship::chain(&error);
                tracing::info!(store = %direct.name(), error, "what waits for its WAL could not be published");
            }
        }
    }
}

/// Ends the server's side of a backup, however ours ended.
struct SessionGuard<'a>(&'a dyn Server);

impl Drop for SessionGuard<'_> {
    fn drop(&mut self) {
        self.0.abandon_backup();
    }
}

/// Who starts and stops the backup.
fn holder<'a>(node: &'a BackupNode, request: &BackupRequest, roads: &Roads) -> Result<Holder<'a>, BackupError> {
    let server = node.server.as_ref();
    let Some(primary) = &request.primary else { return Ok(Holder::Here(server)) };
    let channel = roads.coordinator.clone().ok_or(road::RoadError::NoRoad)?;
    let primary = Primary::new(channel, &node.cluster, &node.node, primary, request);
    Ok(Holder::Primary(server, Box::new(primary)))
}

/// The label that the server is given.
fn label_of(request: &BackupRequest) -> String {
    match request.label.as_str() {
        "" => format!("pgconvoy {}", request.backup),
        label => format!("pgconvoy {} {label}", request.backup),
    }
}

async fn take(
    node: &BackupNode,
    request: &BackupRequest,
    holder: &Holder<'_>,
    stores: &[Arc<dyn ObjectStore>],
    road: &BackupRoad,
    lines: &BackupLines<'_>,
) -> Result<BackupOutcome, BackupError> {
    let tell = |step, bytes_done, bytes_total| lines.tell(step, bytes_done, bytes_total);
    tell(Step::Starting, 0, 0);
    let (identity, settings) = admit(node, holder.side()).await?;
    let start = holder.start(&label_of(request), request).await?;
    tracing::info!(backup = %request.backup, start_lsn = %start.start_lsn, timeline = %start.timeline, "backup started");
    process::crash_point!("agent/after-backup-start-before-packs");
    if holder.side() == Side::Standby {
        tell(Step::CatchingUp, 0, 0);
        catch_up::catch_up(node, holder, &start, lines).await?;
    }
    let own_wal = OwnWal::of(node, &identity);
    let first_witness = own_wal.at_checkpoint(start.timeline).await?;

    tell(Step::Comparing, 0, 0);
    let library = Library { stores, cluster: &node.cluster, scratch: &node.scratch };
    let comparing = async {
        let looked = look(node, &identity, &settings, holder.side(), 0).await?;
        let increment = increment::prepare(node, request.backup_type, library, &identity, &start, looked).await?;
        if let Some(parent) = &increment.parent {
            road.builds_on(&parent.holders);
        }
        let built_on = increment.parent.as_ref().map(|parent| parent.entry.backup);
        pin::begin(road, &node.cluster, &node.node, request.backup, built_on).await;
        let attempt = attempt(node, request, &identity, &start, &increment);
        let increment = increment::go_on(increment, node, request.backup_type, library, road, attempt.clone()).await;
        Ok((increment, attempt))
    };
    let (increment, attempt) = holder.while_it_runs(&start, comparing).await?;
    lines.built_on.send_replace(increment.describe());
    tracing::info!(backup = %request.backup, built_on = increment.describe(), "it is known what the backup builds on");
    let Increment { work, parent, backup_type, source } = increment;
    // Attempts that were taken over are lost with this one.
    lines.progress.send_modify(|progress| progress.kept |= !work.resume.0.is_empty());
    let total = work.plan.bytes;
    tell(Step::Copying, 0, total);
    let copied = copy(node, request, road, lines, work, (holder, &start, 0), attempt).await?;
    confirm_tablespaces(node, &copied).await?;
    process::crash_point!("agent/after-packs-before-backup-stop");
    tell(Step::Finishing, total, total);
    let free = (copied.shared.free_pack(), copied.shared.plan.count);
    let Stopped { stop, part } = holder.stop(&start, identity.system_identifier, free).await?;
    process::crash_point!("agent/after-backup-stop-before-manifest");
    let facts = facts(node, request, &identity, &start, &stop, &copied, (backup_type, source))?;
    let facts = match &part {
        None => {
            let wal_witnesses = own_wal.of_backup(first_witness, &facts)?;
            Facts { wal_witnesses, warnings: warnings(&copied), ..facts }
        }
        Some(part) => part.joined(first_witness, warnings(&copied), facts),
    };
    let scratch = node.scratch.clone();
    let (described, copied) = tokio::task::spawn_blocking(move || {
        let described = describe::describe(&facts, &copied, parent.as_deref(), part.as_ref(), &scratch);
        let described = described.map_err(BackupError::Manifest)?;
        Ok::<_, BackupError>((described, copied))
    })
    .await
    .map_err(|_| BackupError::Reader)??;
    road.put(&key::manifest(&node.cluster, &request.backup), &described.body(), &described.entry.manifest_sha256)
        .await?;
    process::crash_point!("agent/after-manifest-before-publication");

    tell(Step::Publishing, total, total);
    let published = tokio::select! {
        published = publish::publish(road, &node.cluster, &node.node, &described.entry, request.wal_wait, &node.scratch) => published?,
        never = wish_for_switch(lines, described.entry.from_standby, stop.stop_lsn) => match never {},
    };
    process::crash_point!("agent/after-publication-before-answer");
    Ok(BackupOutcome {
        entry: described.entry,
        bytes_read: copied.shared.bytes_done(),
        road: road.road(),
        stores: published.stores,
        lagging: published.lagging,
        waiting_for: published.waiting_for,
        warnings: described.warnings,
    })
}

/// Refuses what cannot become a good backup before anything is started.
async fn admit(node: &BackupNode, side: Side) -> Result<(Identity, ArchiveSettings), BackupError> {
    let identity = node.server.identity().await?;
    let settings = node.server.archive_settings().await?;
    let position = node.server.position().await?;
    match (side, position.role) {
        (Side::Standby, Role::Primary) => return Err(BackupError::Role { found: "a primary", wanted: "a standby" }),
        (Side::Primary, Role::Standby) => return Err(BackupError::Role { found: "a standby", wanted: "the primary" }),
        _ => {}
    }
    if position.role == Role::Primary && settings.archive_mode == "off" {
        return Err(BackupError::ArchivingOff);
    }
    let (control, _) = read_control(&node.data_directory).await?;
    if control.system_identifier != identity.system_identifier {
        return Err(BackupError::Foreign { found: control.system_identifier, expected: identity.system_identifier });
    }
    if (side, position.role) == (Side::Whole, Role::Standby) && !control.full_page_writes {
        return Err(BackupError::NoFullPageWrites);
    }
    Ok((identity, settings))
}

/// What notes tell of this backup.
fn attempt(
    node: &BackupNode,
    request: &BackupRequest,
    identity: &Identity,
    start: &BackupStart,
    increment: &Increment,
) -> Attempt {
    let control = &increment.work.control;
    Attempt {
        backup: request.backup,
        backup_type: increment.backup_type,
        cluster: node.cluster.clone(),
        node: node.node.clone(),
        from_standby: start.role == Role::Standby,
        system_identifier: identity.system_identifier,
        postgres_major: identity.major(),
        control_version: control.version(),
        catalog_version: control.catalog_version,
        segment_size_bytes: identity.segment_size.bytes(),
        block_size: control.block_size,
        relation_segment_blocks: control.relation_segment_blocks,
        checksum_version: control.checksum_version,
        start_timeline: start.timeline,
        start_lsn: start.start_lsn,
        start_time: start.started,
    }
}

/// Lists a side's files in the data directory and plans the copy.
async fn look(
    node: &BackupNode,
    identity: &Identity,
    settings: &ArchiveSettings,
    side: Side,
    first_file: u32,
) -> Result<(CopyPlan, Capture), BackupError> {
    let (control, _) = read_control(&node.data_directory).await?;
    let version_directory = data_directory::tablespace_version_directory(identity.major(), control.catalog_version);
    let data_directory = node.data_directory.clone();
    let scratch = node.scratch.clone();
    let configuration: Vec<PathBuf> = settings.configuration_files.iter().map(|file| file.path.clone()).collect();
    let looked = tokio::task::spawn_blocking(move || {
        let keep = |path: &Path| side.keeps(path);
        let listing = listing::list(&data_directory, &version_directory, &keep, &scratch)?;
        let plan = plan::plan(listing, first_file, &scratch)?;
        let capture = match side {
            Side::Standby => Capture::default(),
            Side::Whole | Side::Primary => capture::capture(&data_directory, &configuration, &plan.links),
        };
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
        primary: request.primary.clone(),
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

/// What is worth a human's look, besides pages.
fn warnings(copied: &Copied) -> Vec<String> {
    let mut warnings = Vec::new();
    for remark in &copied.shared.plan.remarks {
        warnings.push(remark.to_string());
    }
    for path in &copied.capture.left_out {
        warnings.push(format!("configuration file {} could not be captured", path.display()));
    }
    warnings
}
