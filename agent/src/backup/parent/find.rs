//! Reads roots and manifests to find the backup that a new one builds on.
//!
//! A backup counts as live in a store whose root names it, and as a parent only if all its objects are there. Which store
//! publishes the new one is not asked here: one that lacks the parent's packs gets them later.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postgres_format::control_file::ControlFile;
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{SystemIdentifier, Timeline, WalFileName};
use repository::backup::manifest::Head;
use repository::backup::origin::BackupType;
use repository::backup::{VerifyDepth, fetch_manifest_file, verify};
use repository::name::ClusterName;
use repository::root::{self, RootBackup};
use repository::store::ObjectStore;
use repository::wal::history_text;

use super::manifest::ParentManifest;
use super::testimony;
use super::{Ours, Refused, Unfit, candidates, geometry_differs, none_reason};
use crate::archive::ship::chain;
use crate::backup::BackupError;

/// Candidates looked at; more than one is needed only if a manifest is damaged or a setting changed.
const LOOKED_AT_MAX: usize = 3;
/// How long a store may take to give its root.
const ROOT_PATIENCE: Duration = Duration::from_secs(30);
/// How often the roots are asked for while no store gives one.
const ROUNDS: u32 = 4;
/// Wait between those rounds.
const ROUND_WAIT: Duration = Duration::from_secs(2);

/// The stores of one cluster, to be read.
#[derive(Clone, Copy, Debug)]
pub struct Library<'a> {
    /// The stores, near ones first.
    pub stores: &'a [Arc<dyn ObjectStore>],
    /// Fleet name of the cluster.
    pub cluster: &'a ClusterName,
    /// Directory for manifests meanwhile.
    pub scratch: &'a Path,
}

/// The backup that a new one builds on.
#[derive(Clone, Debug)]
pub struct Parent {
    /// What the root says of it.
    pub entry: RootBackup,
    /// The head of its manifest.
    pub head: Head,
    /// Its manifest.
    pub manifest: ParentManifest,
    /// Stores that have it.
    pub holders: BTreeSet<String>,
}

/// What came of the search.
#[derive(Debug)]
pub enum Found {
    /// It builds on this one.
    Parent(Box<Parent>),
    /// It builds on none.
    None {
        /// Why.
        reason: String,
    },
}

/// A live backup and the stores whose roots name it.
struct Live {
    entry: RootBackup,
    stores: Vec<Arc<dyn ObjectStore>>,
}

/// Looks for the parent of a backup of type `asked`.
///
/// # Errors
/// [`BackupError::Roots`] if no store gives its root: then nothing is known, and nothing could be published.
pub async fn find(
    library: Library<'_>,
    asked: BackupType,
    ours: &Ours,
    control: &ControlFile,
) -> Result<Found, BackupError> {
    if asked == BackupType::Full {
        return Ok(Found::None { reason: "a full backup was asked for".to_owned() });
    }
    let live = live(library).await?;
    let entries: Vec<RootBackup> = live.iter().map(|live| live.entry.clone()).collect();
    let candidates = candidates(asked, &entries, ours);
    let mut refused = candidates.refused;
    for entry in candidates.fit.into_iter().take(LOOKED_AT_MAX) {
        let Some(live) = live.iter().find(|live| live.entry.backup == entry.backup) else { continue };
        match examine(library, live, ours, control).await {
            Ok(parent) => return Ok(Found::Parent(Box::new(parent))),
            Err(why) => {
                tracing::info!(backup = %entry.backup, reason = %why, "a backup is not fit to build on");
                refused.push(Refused { backup: entry.backup, why });
            }
        }
    }
    refused.sort_by_key(|refused| std::cmp::Reverse(refused.backup));
    Ok(Found::None { reason: none_reason(asked, &refused) })
}

/// All live backups of all stores that give their root.
async fn live(library: Library<'_>) -> Result<Vec<Live>, BackupError> {
    let mut round = 1;
    loop {
        let (mut live, mut answers, mut reasons) = (Vec::<Live>::new(), 0, Vec::new());
        for store in library.stores {
            let root = tokio::time::timeout(ROOT_PATIENCE, root::newest(store.as_ref(), library.cluster)).await;
            let backups = match root {
                Ok(Ok(root)) => root.map(|root| root.backups).unwrap_or_default(),
                Ok(Err(error)) => {
                    reasons.push(chain(&error));
                    continue;
                }
                Err(_) => {
                    reasons.push(format!("store {} did not give its root in time", store.name()));
                    continue;
                }
            };
            answers += 1;
            for entry in backups {
                match live.iter_mut().find(|known| known.entry == entry) {
                    Some(known) => known.stores.push(store.clone()),
                    None => live.push(Live { entry, stores: vec![store.clone()] }),
                }
            }
        }
        if answers > 0 {
            return Ok(live);
        }
        if round == ROUNDS {
            return Err(BackupError::Roots { reasons: reasons.join("; ") });
        }
        round += 1;
        tokio::time::sleep(ROUND_WAIT).await;
    }
}

/// Whether a candidate is of this very server, whole and of our geometry, in the first store where it is.
async fn examine(library: Library<'_>, live: &Live, ours: &Ours, control: &ControlFile) -> Result<Parent, Unfit> {
    if let Some(why) = testimony::contradicts(library, &live.entry, &ours.history).await {
        return Err(why);
    }
    let mut holders = BTreeSet::new();
    let (mut found, mut reasons) = (None, Vec::new());
    for store in &live.stores {
        // Missing packs would show when the new backup is published, after all the work.
        let whole = verify(store.as_ref(), library.cluster, &live.entry, VerifyDepth::Presence, library.scratch).await;
        if let Err(error) = whole {
            reasons.push(chain(&error));
            continue;
        }
        holders.insert(store.name().to_string());
        if found.is_some() {
            continue;
        }
        match fetch_manifest_file(store.as_ref(), library.cluster, &live.entry, library.scratch).await {
            Ok(file) => found = Some(ParentManifest::new(file)),
            Err(error) => reasons.push(chain(&error)),
        }
    }
    let Some(manifest) = found else { return Err(Unfit::Unusable { reason: reasons.join("; ") }) };
    let head = manifest.lines().map_err(|damage| Unfit::Unusable { reason: damage.to_string() })?.head().clone();
    if head.page_errors > head.page_error_list.len() as u64 {
        return Err(Unfit::Unusable {
            reason: format!("it has {} corrupt pages, more than it names", head.page_errors),
        });
    }
    match geometry_differs(&head, control) {
        Some(why) => Err(why),
        None => Ok(Parent { entry: live.entry.clone(), head, manifest, holders }),
    }
}

/// How a timeline came about: as the server's own history file tells, or a store's.
///
/// # Errors
/// A line for people.
pub async fn history(
    library: Library<'_>,
    data_directory: &Path,
    system: SystemIdentifier,
    timeline: Timeline,
) -> Result<TimelineHistory, String> {
    if timeline == Timeline::FIRST {
        return Ok(TimelineHistory::root(timeline));
    }
    let path = data_directory.join("pg_wal").join(WalFileName::History(timeline).to_string());
    if let Ok(text) = tokio::fs::read(&path).await {
        return TimelineHistory::parse(timeline, &text).map_err(|error| error.to_string());
    }
    let mut reasons = Vec::new();
    for store in library.stores {
        let reading = history_text(store.as_ref(), library.cluster, system, timeline);
        match tokio::time::timeout(ROOT_PATIENCE, reading).await {
            Ok(Ok(None)) => reasons.push(format!("store {} has none", store.name())),
            Ok(Ok(Some(text))) => return TimelineHistory::parse(timeline, &text).map_err(|error| error.to_string()),
            Ok(Err(error)) => reasons.push(chain(&error)),
            Err(_) => reasons.push(format!("store {} did not give it in time", store.name())),
        }
    }
    Err(format!("the history of timeline {timeline} cannot be read: {}", reasons.join("; ")))
}
