//! What a restore would do, and why, or why it cannot be done. Pure: what the stores hold and a request in, a plan out.
//!
//! The plan refuses, before a byte is written, what PostgreSQL would refuse after hours: a target before the backup is
//! consistent, a target that WAL does not reach, a time after the last commit, a timeline the backup is not on. It
//! refuses while a listed store does not answer, because that store may hold newer WAL; leaving the store out by name
//! is the operator's word that the archive ends where the others end. PostgreSQL does not stop where timelines part if
//! the newer one's first segment is missing, so the plan then sets an end itself.
//!
//! The timeline is always written as a number (or `current`, or `latest` for a standby): `latest` would follow any
//! timeline that somebody's test restore has archived.

mod beside;
mod choose;
mod fork;
mod held;
mod lines;
mod reach;
mod settings;
mod target;
mod window;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};

use jiff::Timestamp;
use postgres_format::{Lsn, SystemIdentifier, Timeline, WalFileName};
use serde::{Deserialize, Serialize};

use crate::adoption::Numbered;
use crate::coverage::forks::ForkFacts;
use crate::coverage::{Fork, LsnRange};
use crate::name::{BackupId, ClusterName, StoreName};
use crate::root::RootBackup;
use crate::wal_index::WalIndex;
use crate::witness::Heard;

pub use choose::{Step, next_step, plan};
pub use settings::{Recovery, Setting, Signal, recovery_options};
pub use target::{RestorePointName, RestorePointNameError, Target, TargetXid, TargetXidError};
pub use window::{Window, windows};

/// Along which timeline to recover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimelineChoice {
    /// The newest one that the backup is on and that goes on, if only one does; the backup's own for an immediate target.
    #[default]
    Newest,
    /// The backup's own.
    Current,
    /// This one.
    Number(Timeline),
}

/// What becomes of the restored server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It recovers to the target and then opens.
    #[default]
    Primary,
    /// It follows the archive, and a primary if one is configured, until it is promoted.
    Standby,
}

/// What PostgreSQL does at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetAction {
    /// Opens for writing on a new timeline.
    #[default]
    Promote,
    /// Waits, readable.
    Pause,
    /// Shuts down.
    Shutdown,
}

/// Whether what is exactly at the target is recovered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetBound {
    /// It is.
    #[default]
    Inclusive,
    /// It is not.
    Exclusive,
}

/// Whether the restored server archives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArchiveMode {
    /// `archive_mode = off`: a clone cannot write into the archive of its origin.
    Off,
    /// As the backup has it: the restored server takes its origin's place.
    Keep,
}

/// What to do if WAL has a gap before the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtGap {
    /// Refuse.
    #[default]
    Refuse,
    /// Recover up to the gap; only for the latest target.
    StopBefore,
}

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Where recovery is to end.
    pub target: Target,
    /// Whether what is exactly at the target is recovered.
    pub bound: TargetBound,
    /// What PostgreSQL does at the target.
    pub action: TargetAction,
    /// Along which timeline.
    pub timeline: TimelineChoice,
    /// From which backup; the newest suitable one if it is not said.
    pub backup: Option<BackupId>,
    /// What becomes of the restored server.
    pub role: Role,
    /// Whether it archives; off for a primary and kept for a standby if it is not said.
    pub archive_mode: Option<ArchiveMode>,
    /// What to do if WAL has a gap.
    pub at_gap: AtGap,
    /// Stores left out by name.
    pub without_stores: BTreeSet<StoreName>,
    /// `restore_command`.
    pub restore_command: String,
}

impl Request {
    /// The request for all there is, with every other choice left to its default.
    pub fn latest(restore_command: impl Into<String>) -> Self {
        Self {
            target: Target::Latest,
            bound: TargetBound::default(),
            action: TargetAction::default(),
            timeline: TimelineChoice::default(),
            backup: None,
            role: Role::default(),
            archive_mode: None,
            at_gap: AtGap::default(),
            without_stores: BTreeSet::new(),
            restore_command: restore_command.into(),
        }
    }
}

/// What one store holds of the cluster, or why that is not known. In the order in which stores are to be asked.
#[derive(Debug, Clone, PartialEq)]
pub enum StoreView {
    /// It answered.
    Holds {
        /// Which store.
        store: StoreName,
        /// The backups its newest root names.
        backups: Vec<RootBackup>,
        /// Its WAL, by system.
        systems: Vec<(SystemIdentifier, SystemView)>,
    },
    /// It did not.
    Unreachable {
        /// Which store.
        store: StoreName,
        /// What happened.
        reason: String,
    },
}

/// What one store holds of one system.
#[derive(Debug, Clone, PartialEq)]
pub struct SystemView {
    /// Its WAL.
    pub wal: WalIndex,
    /// What the headers say around forks that left WAL of the parent behind.
    pub forks: Vec<ForkFacts>,
    /// The newest adoption of each timeline; may be left empty where there is only one.
    pub adoptions: BTreeMap<Timeline, Numbered>,
}

impl StoreView {
    /// Which store.
    pub fn store(&self) -> &StoreName {
        match self {
            Self::Holds { store, .. } | Self::Unreachable { store, .. } => store,
        }
    }
}

/// What the stores' WAL said to the witnesses of backups, of those that were asked about.
pub type Testimonies = BTreeMap<BackupId, Heard>;

/// `recovery_target_timeline`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetTimeline {
    /// This one.
    Number(Timeline),
    /// The backup's own.
    Current,
    /// Whatever the newest is at any time: for standbys.
    Latest,
}

/// Whether it is certain where the archive ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArchiveEnd {
    /// Every listed store said what it has.
    Known,
    /// An operator left stores out: the archive ends where the others end.
    Fixed {
        /// Which stores.
        without_stores: Vec<StoreName>,
    },
}

/// PostgreSQL's own hazard: section 25.3.6 of its manual.
const TABLESPACES: &str = "a tablespace that was created after the backup is created again at its original location, \
                           whatever is mapped: on its origin's host that is the origin's own";

/// What a restore will do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestorePlan {
    /// Version of this value's layout; 1.
    pub format: u32,
    /// When it was made.
    pub planned: Timestamp,
    /// The cluster.
    pub cluster: ClusterName,
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The backup to lay out.
    pub backup: RootBackup,
    /// Stores that have it, in the order to ask them.
    pub backup_stores: Vec<StoreName>,
    /// Stores to fetch WAL from, in the order to ask them.
    pub wal_stores: Vec<StoreName>,
    /// Whether it is certain where the archive ends.
    pub archive_end: ArchiveEnd,
    /// Where recovery ends.
    pub target: Target,
    /// `recovery_target_timeline`.
    pub timeline: TargetTimeline,
    /// The timelines that recovery passes through, by where each forks off; the backup's own first.
    pub forks: Vec<Fork>,
    /// The WAL that recovery reads: from the backup's start to the target if that is a position, else to the last
    /// that is archived without a gap.
    pub wal: LsnRange,
    /// Time of the last commit known to be in that WAL behind the end of the backup.
    pub last_commit_time: Option<Timestamp>,
    /// What becomes of the restored server.
    pub role: Role,
    /// Whether it archives.
    pub archive_mode: ArchiveMode,
    /// What the server is told.
    #[serde(flatten)]
    pub recovery: Recovery,
    /// Why it is so, a line each.
    pub reasons: Vec<String>,
    /// What the operator should know, a line each.
    pub warnings: Vec<String>,
}

impl fmt::Display for RestorePlan {
    /// The plan as text for people, with a line break after every line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = vec![
            ("cluster", format!("{} (system {})", self.cluster, self.system_identifier)),
            ("backup", format!("{} of node {}", self.backup.backup, self.backup.node)),
            ("backup from", join(&self.backup_stores)),
            ("WAL from", join(&self.wal_stores)),
            ("WAL", format!("{} ({})", self.wal, size(self.wal.bytes()))),
            ("timeline", self.timeline_text()),
            ("target", self.target.to_string()),
        ];
        if let ArchiveEnd::Fixed { without_stores } = &self.archive_end {
            lines.push(("end of archive", format!("fixed at {}, without {}", self.wal.end, join(without_stores))));
        }
        lines.push(("then", self.then_text().to_owned()));
        for (name, value) in lines {
            writeln!(f, "{name:<15} {value}")?;
        }
        for setting in self.recovery.settings.iter().filter(|setting| !setting.value.is_empty()) {
            writeln!(f, "{:<15} {} = '{}'", "setting", setting.name, setting.value)?;
        }
        let because = self.reasons.iter().map(|reason| ("because", reason));
        for (name, text) in because.chain(self.warnings.iter().map(|warning| ("WARNING", warning))) {
            writeln!(f, "{name:<15} {text}")?;
        }
        if self.wal.end > consistent(&self.backup) {
            writeln!(f, "{:<15} {TABLESPACES}", "note")?;
        }
        Ok(())
    }
}

impl RestorePlan {
    fn timeline_text(&self) -> String {
        let mut text = match self.timeline {
            TargetTimeline::Number(timeline) => timeline.to_string(),
            TargetTimeline::Current => format!("{}, the backup's own", self.backup.stop_timeline),
            TargetTimeline::Latest => "latest, followed as it changes".to_owned(),
        };
        for fork in &self.forks {
            // Writing to a string cannot fail.
            let _ = write!(text, ", off {} at {}", fork.timeline, fork.lsn);
        }
        text
    }

    fn then_text(&self) -> &'static str {
        match (self.role, self.archive_mode) {
            (Role::Primary, ArchiveMode::Off) => "it opens and does not archive",
            (Role::Primary, ArchiveMode::Keep) => "it opens and archives in place of its origin",
            (Role::Standby, ArchiveMode::Off) => "it stays a standby and will not archive",
            (Role::Standby, ArchiveMode::Keep) => "it stays a standby and archives once it is promoted",
        }
    }
}

/// Why a restore cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Impossible {
    /// What stands against it.
    pub reason: String,
    /// What can be done instead.
    pub hint: String,
}

/// Why one backup does not do.
struct Refusal {
    reason: String,
    /// Empty: tell what can be reached.
    hint: String,
    kind: RefusalKind,
}

/// What a refusal says about other backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RefusalKind {
    /// Nothing.
    Own,
    /// The target lies before this one, or may.
    BeforeBackup,
    /// This one lies on a line that was left, or its WAL is another server's; older ones need not.
    PassedOver,
}

fn refuse<T>(reason: String, hint: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason, hint: hint.into(), kind: RefusalKind::Own })
}

/// Why a backup cannot be restored whose WAL was decided away: this store serves that segment of another server.
pub(crate) fn contradicted(backup: &RootBackup, store: &StoreName, name: &WalFileName) -> String {
    format!(
        "backup {} was taken of another server than the one whose WAL counts: WAL {name} in store {store} is not what its own \
         server had",
        backup.backup
    )
}

/// From where on the backup is consistent.
fn consistent(backup: &RootBackup) -> Lsn {
    backup.consistent_lsn()
}

fn join<T: ToString>(names: &[T]) -> String {
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A number of bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests;
