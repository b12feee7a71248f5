//! From what is asked to what is copied: finds the parent, finds what changed since, and plans what of each file is read.
//!
//! Whatever cannot be found out makes the backup read more, up to all of it, and the reason is recorded. Only when no store
//! tells which backups exist nothing is taken: then nothing could be published either.

use std::collections::HashSet;
use std::mem;
use std::ops::Range;
use std::path::Path;

use postgres_format::control_file::ControlFile;
use postgres_format::relation::TablespaceVersion;
use postgres_format::{Lsn, wal_changes::ChangeMap};
use repository::backup::note::Attempt;
use repository::backup::origin::{BackupType, ChangeMethod, ChangeSource, describe};

use super::capture::Capture;
use super::changes::source::{covered, decide, full_copy, page_lsn_tells, started_unix};
use super::changes::summaries::{self, Summarizer};
use super::changes::wal::{self, WalPath};
use super::changes::{Changes, Geometry, MapBytes, made_since};
use super::copy::{Work, read_control};
use super::parent::Ours;
use super::parent::find::{self, Found, Library, Parent};
use super::plan::{CopyPlan, Planned};
use super::resume::find::{GoneOn, Search};
use super::resume::{self, Laid};
use super::road::BackupRoad;
use super::{BackupError, BackupNode};
use crate::archive::ship::chain;
use crate::postgres::{BackupStart, Identity};

/// Seconds by which the times of files and the server's clock may differ.
const CLOCK_SLACK_SECONDS: i64 = 60;

/// A backup that knows what it builds on.
pub(super) struct Increment {
    /// What is copied.
    pub(super) work: Work,
    /// What it builds on.
    pub(super) parent: Option<Box<Parent>>,
    /// What it turned out to be.
    pub(super) backup_type: BackupType,
    /// How it was found what changed.
    pub(super) source: ChangeSource,
}

impl Increment {
    /// What it is, for people.
    pub(super) fn describe(&self) -> String {
        let parent = self.parent.as_ref().map(|parent| parent.entry.backup);
        describe(self.backup_type, parent, Some(&self.source))
    }
}

/// Goes on from what earlier attempts of this node left, if that is possible. Why, or why not, goes with the reason of what
/// is copied.
pub(super) async fn go_on(
    mut increment: Increment,
    node: &BackupNode,
    asked: BackupType,
    library: Library<'_>,
    road: &BackupRoad,
    facts: Attempt,
) -> Increment {
    let history = find::history(library, &node.data_directory, facts.system_identifier, facts.start_timeline).await;
    let Ok(history) = history else { return increment };
    let parent_start = increment.parent.as_ref().map(|parent| parent.entry.start_lsn);
    let ours = resume::Ours { asked, facts, parent_start };
    let work = &mut increment.work;
    let search = Search {
        library,
        node: &node.node,
        data_directory: &node.data_directory,
        history: &history,
        ours: &ours,
        plan: &work.plan,
        geometry: &work.geometry,
    };
    let GoneOn { laid, told } = resume::find::go_on(search, road).await;
    if let Some(Laid { plan, resume, share }) = laid {
        (work.plan, work.resume) = (plan, (resume, share.bytes));
    }
    let reasons = [mem::take(&mut increment.source.reason)].into_iter().chain(told);
    increment.source.reason = reasons.collect::<Vec<_>>().join("; ");
    increment
}

/// Finds the parent and what changed since; `plan` is that of a backup that copies everything.
pub(super) async fn prepare(
    node: &BackupNode,
    asked: BackupType,
    library: Library<'_>,
    identity: &Identity,
    start: &BackupStart,
    (plan, capture): (CopyPlan, Capture),
) -> Result<Increment, BackupError> {
    let (control, _) = read_control(&node.data_directory).await?;
    let version = TablespaceVersion { postgres_major: identity.major(), catalog_version: control.catalog_version };
    let geometry =
        Geometry { page_bytes: control.block_size.into(), segment_blocks: control.relation_segment_blocks, version };
    let resume = Default::default;
    let full = |plan, capture, control, reason: String| Increment {
        work: Work { plan, since: None, geometry, resume: resume(), capture, control },
        parent: None,
        backup_type: BackupType::Full,
        source: full_copy(reason),
    };
    if asked == BackupType::Full {
        return Ok(full(plan, capture, control, "a full backup was asked for".to_owned()));
    }
    let system = identity.system_identifier;
    let history = match find::history(library, &node.data_directory, system, start.timeline).await {
        Ok(history) => history,
        Err(reason) => return Ok(full(plan, capture, control, reason)),
    };
    let ours = Ours {
        system_identifier: system,
        postgres_major: identity.major(),
        segment_size_bytes: identity.segment_size.bytes(),
        start_lsn: start.start_lsn,
        history,
    };
    let parent = match find::find(library, asked, &ours, &control).await? {
        Found::Parent(parent) => parent,
        Found::None { reason } => return Ok(full(plan, capture, control, reason)),
    };
    let path = WalPath {
        library,
        data_directory: &node.data_directory,
        system,
        size: identity.segment_size,
        history: &ours.history,
        data_bytes: plan.bytes,
    };
    let (changes, source) = changes(node, &path, &parent, start.start_lsn, &control, &plan).await?;
    let Some(changes) = changes else {
        let reason = format!("what changed since {} cannot be told: {}", parent.entry.backup, source.reason);
        return Ok(full(plan, capture, control, reason));
    };
    let (since, scratch) = (changes.since(), node.scratch.clone());
    let (plan, parent) = tokio::task::spawn_blocking(move || {
        let plan = with_changes(plan, &parent, &changes, &geometry, &scratch)?;
        Ok::<_, BackupError>((plan, parent))
    })
    .await
    .map_err(|_| BackupError::Reader)??;
    let work = Work { plan, since, geometry, resume: resume(), capture, control };
    Ok(Increment { work, parent: Some(parent), backup_type: asked, source })
}

/// What changed since the parent; nothing if that cannot be told.
async fn changes(
    node: &BackupNode,
    path: &WalPath<'_>,
    parent: &Parent,
    start: Lsn,
    control: &ControlFile,
    plan: &CopyPlan,
) -> Result<(Option<Changes>, ChangeSource), BackupError> {
    let since: Range<Lsn> = parent.head.start_lsn..start;
    let (maps, map): (Result<String, String>, Option<ChangeMap>) =
        match wal::changes(path, since.clone(), &mut MapBytes::default()).await {
            Ok((map, segments)) => (Ok(covered(since.start, since.end, segments)), Some(map)),
            Err(reason) => (Err(reason), None),
        };
    let summarised = match &maps {
        Err(_) if parent.entry.postgres_major >= summaries::FIRST_MAJOR => Some(summarised(node, path, &since).await),
        _ => None,
    };
    let summaries = summarised.as_ref().map(|told| told.as_ref().map(drop).map_err(Clone::clone));
    let started = started(path.data_directory).await;
    let source = decide(&maps, summaries.as_ref(), &page_lsn_tells(&parent.head, control, started));
    let changes = match (source.method, map) {
        (ChangeMethod::ChangeMaps, map) => map.map(Changes::Maps),
        (ChangeMethod::WalSummaries, _) => summarised.and_then(Result::ok).map(Changes::Maps),
        (ChangeMethod::PageLsn, _) => {
            let files = plan.files().map(|planned| planned.map(|planned| planned.listed));
            let from = parent.head.start_time.as_second() - CLOCK_SLACK_SECONDS;
            let made_since = made_since(files, from).map_err(BackupError::Scratch)?;
            Some(Changes::PageLsn { since: since.start, made_since })
        }
        (ChangeMethod::FullCopy, _) => None,
    };
    Ok((changes, source))
}

/// What the server's own summaries tell.
async fn summarised(node: &BackupNode, path: &WalPath<'_>, since: &Range<Lsn>) -> Result<ChangeMap, String> {
    let settings = node.server.archive_settings().await.map_err(|error| chain(&error))?;
    let summarizer = if settings.summarize_wal { Summarizer::On } else { Summarizer::Off };
    summaries::changes(path.data_directory, path.history, since, summarizer).await
}

async fn started(data_directory: &Path) -> Option<i64> {
    let text = tokio::fs::read_to_string(data_directory.join("postmaster.pid")).await.ok()?;
    started_unix(&text)
}

/// A plan by which only what changed is read, with the parent's manifest beside it. A file in which the parent found corrupt
/// pages is read whole, so that they are found again, or that they are healed.
fn with_changes(
    plan: CopyPlan,
    parent: &Parent,
    changes: &Changes,
    geometry: &Geometry,
    scratch: &Path,
) -> Result<CopyPlan, BackupError> {
    let mut theirs = parent.manifest.files().map_err(BackupError::Parent)?;
    let corrupt: HashSet<&Path> = parent.head.page_error_list.iter().map(|error| error.path.as_path()).collect();
    plan.redrawn(geometry.page_bytes, scratch, |planned| {
        let listed = &planned.listed;
        let parents = theirs.find(&listed.path).map_err(BackupError::Parent)?;
        let parents = parents.filter(|_| !corrupt.contains(listed.path.as_path()));
        let take = changes.take(listed, parents.as_ref(), geometry);
        Ok(Planned { take, changed: changes.listed(listed, geometry, take), ..planned })
    })
}
