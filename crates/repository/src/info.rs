//! What is known about a cluster, for scripts (JSON, schema `pgconvoy.info/v1`) and for people (text).
//!
//! Rules of the schema: names are snake case, times RFC 3339 in UTC, amounts are integers of bytes, positions stand as
//! text and as number. Fields are added, never changed or removed, within `v1`.
//!
//! [`collect`] needs the stores only; a coordinator adds what it knows about its fleet.

mod collect;
mod decided;
mod recovery;
mod text;

use jiff::Timestamp;
use postgres_format::{Lsn, SystemIdentifier, Timeline};
use serde::{Deserialize, Serialize};

use crate::backup::origin::{BackupType, ChangeSource};
use crate::coverage::{Fork, LsnRange};
use crate::name::{BackupId, ClusterName, NodeName, StoreName};

pub use collect::collect;
pub use text::render_text;

/// Name and version of the JSON.
pub const SCHEMA: &str = "pgconvoy.info/v1";

/// What is known about some clusters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Info {
    /// [`SCHEMA`].
    pub schema: String,
    /// When it was gathered.
    pub generated: Timestamp,
    /// By cluster.
    pub clusters: Vec<ClusterInfo>,
}

impl Info {
    /// What is known now.
    pub fn new(generated: Timestamp, clusters: Vec<ClusterInfo>) -> Self {
        Self { schema: SCHEMA.to_owned(), generated, clusters }
    }
}

/// What is known about one cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Its name.
    pub cluster: ClusterName,
    /// Its system identifiers, oldest first.
    pub systems: Vec<SystemInfo>,
    /// The stores, in their configured order.
    pub stores: Vec<StoreInfo>,
    /// Whether it can be restored, and to when.
    pub recovery: RecoveryInfo,
    /// Its backups, oldest first.
    pub backups: Vec<BackupInfo>,
    /// Its WAL, by system and timeline.
    pub timelines: Vec<TimelineInfo>,
    /// Forks with archived WAL of the parent beyond them: lost in a failover, or given up on purpose.
    #[serde(default)]
    pub left_behind: Vec<LeftBehindInfo>,
    /// WAL that some stores lack.
    pub at_risk: Vec<AtRiskInfo>,
    /// Names with contents that exclude each other.
    pub conflicts: Vec<ConflictInfo>,
    /// Segments of which only an incomplete content is stored.
    pub incomplete: Vec<IncompleteInfo>,
    /// What could not be understood, a line each.
    pub problems: Vec<String>,
    /// What the coordinator knows; absent when only the stores were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fleet: Option<FleetInfo>,
}

/// A position in WAL, in both spellings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LsnInfo {
    /// As PostgreSQL writes it.
    pub text: Lsn,
    /// In bytes since the beginning.
    pub number: u64,
}

impl From<Lsn> for LsnInfo {
    fn from(lsn: Lsn) -> Self {
        Self { text: lsn, number: lsn.as_u64() }
    }
}

/// A range of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeInfo {
    /// First position.
    pub start: LsnInfo,
    /// The position after the last.
    pub end: LsnInfo,
    /// How much that is.
    pub bytes: u64,
}

impl From<LsnRange> for RangeInfo {
    fn from(range: LsnRange) -> Self {
        Self { start: range.start.into(), end: range.end.into(), bytes: range.bytes() }
    }
}

/// One life of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemInfo {
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// PostgreSQL's major version.
    pub postgres_major: Option<u32>,
    /// Size of a WAL segment.
    pub segment_size_bytes: Option<u64>,
    /// Since when it is known.
    pub since: Timestamp,
}

/// Whether a store answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreState {
    /// It answers.
    Available,
    /// It does not.
    Unreachable,
}

/// One store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreInfo {
    /// Its name.
    pub store: StoreName,
    /// Whether it answers.
    pub state: StoreState,
    /// Why not.
    pub detail: Option<String>,
    /// Backups of this cluster in it.
    pub backups: u64,
    /// WAL files of this cluster in it.
    pub wal_objects: u64,
    /// Bytes of those, as stored.
    pub wal_bytes: u64,
    /// What may still be stored, if the store knows.
    pub free_bytes: Option<u64>,
    /// Size of the whole store, if it knows.
    pub total_bytes: Option<u64>,
    /// Number of its newest root commit.
    pub root_generation: Option<u64>,
    /// Any moment from here on can be restored from this store alone, as far as its WAL goes.
    #[serde(default)]
    pub earliest_time: Option<Timestamp>,
    /// What operators hold here, so that retention does not remove it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<HoldInfo>,
    /// From where WAL is kept, by timeline. All of it where a timeline is not named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wal_kept: Vec<WalKeptInfo>,
    /// What its coordinator keeps here, and why; absent when only the stores were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionInfo>,
}

impl StoreInfo {
    /// A store of which nothing is known but why it does not answer.
    pub fn unreachable(store: StoreName, detail: String) -> Self {
        Self {
            store,
            state: StoreState::Unreachable,
            detail: Some(detail),
            backups: 0,
            wal_objects: 0,
            wal_bytes: 0,
            free_bytes: None,
            total_bytes: None,
            root_generation: None,
            earliest_time: None,
            holds: Vec::new(),
            wal_kept: Vec::new(),
            retention: None,
        }
    }
}

/// What keeps a backup in a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldInfo {
    /// Which backup.
    pub backup: BackupId,
    /// Why.
    pub reason: String,
    /// Who said so.
    pub by: String,
    /// Since when.
    pub since: Timestamp,
    /// Until when; for good if absent.
    pub until: Option<Timestamp>,
}

/// From where a store keeps the WAL of a timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalKeptInfo {
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The timeline.
    pub timeline: Timeline,
    /// The first segment that is kept with all that follow.
    pub from: String,
    /// Older ones that are kept because a backup is consistent with them.
    pub also: Vec<SpanInfo>,
}

/// What a coordinator keeps in a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetentionInfo {
    /// The rules, in a few words; "everything" without any.
    pub rules: String,
    /// Why nothing is removed now, if so.
    pub frozen: Option<String>,
    /// What went wrong last, if anything.
    pub problem: Option<String>,
    /// Objects that were to be removed and that the store keeps by a lock of its own.
    #[serde(default)]
    pub locked_objects: u64,
    /// Until when, as far as the store says.
    #[serde(default)]
    pub locked_until: Option<Timestamp>,
    /// Why each backup stays, newest first; empty before it was looked at.
    pub kept: Vec<KeptInfo>,
}

/// Why a backup stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptInfo {
    /// Which backup.
    pub backup: BackupId,
    /// Every reason.
    pub reasons: Vec<String>,
}

/// Whether the cluster can be restored, and to when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryInfo {
    /// Whether it can, to the latest.
    pub possible: bool,
    /// Why not, or what was left out of account.
    pub reason: Option<String>,
    /// From when on any moment can be restored: the end of the oldest backup from which WAL leads to the latest.
    pub earliest_time: Option<Timestamp>,
    /// Time of the last commit known to be recovered behind that; before `earliest_time`, or absent, where nothing was
    /// committed since.
    pub latest_time: Option<Timestamp>,
    /// How far WAL goes without a gap.
    pub latest_lsn: Option<LsnInfo>,
    /// Along which timeline.
    pub timeline: Option<Timeline>,
    /// From which backup the latest would be restored.
    pub backup: Option<BackupId>,
    /// Every stretch of time to any moment of which can be restored, in the order of their oldest backups. No moment between
    /// two of them can be.
    #[serde(default)]
    pub windows: Vec<WindowInfo>,
}

/// A stretch of time to any moment of which can be restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowInfo {
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// Along which timeline.
    pub timeline: Timeline,
    /// The end of its oldest backup.
    pub earliest_time: Timestamp,
    /// Time of the last commit known to be recovered; before `earliest_time`, or absent, where nothing was committed since.
    pub latest_time: Option<Timestamp>,
    /// Where its oldest backup is consistent.
    pub earliest_lsn: LsnInfo,
    /// How far WAL goes without a gap.
    pub latest_lsn: LsnInfo,
    /// Its backups, oldest first.
    pub backups: Vec<BackupId>,
}

/// One backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupInfo {
    /// Its identifier.
    pub backup: BackupId,
    /// How much was read and stored anew. All types are restored alike.
    #[serde(rename = "type", default)]
    pub backup_type: BackupType,
    /// The backup it was built on, which need not exist any more.
    #[serde(default)]
    pub parent: Option<BackupId>,
    /// How it was found what had changed, and why in this way.
    #[serde(default)]
    pub changes: Option<ChangeSource>,
    /// The label that was asked for.
    pub label: String,
    /// Whose files were read.
    pub node: NodeName,
    /// Whether that was a standby that started and stopped the backup itself.
    pub from_standby: bool,
    /// Of a hybrid backup, for which a standby's files were read: the primary that started and stopped it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<NodeName>,
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// PostgreSQL's major version.
    pub postgres_major: u32,
    /// Timeline at the start.
    pub start_timeline: Timeline,
    /// Timeline at the stop.
    pub stop_timeline: Timeline,
    /// Where its recovery begins.
    pub start_lsn: LsnInfo,
    /// Where it is consistent at the latest.
    pub stop_lsn: LsnInfo,
    /// When it was started.
    pub start_time: Timestamp,
    /// When it was stopped.
    pub stop_time: Timestamp,
    /// How many files it has.
    pub files: u64,
    /// Bytes in those.
    pub data_bytes: u64,
    /// Bytes of its packs and manifest.
    pub stored_bytes: u64,
    /// Bytes of older backups' packs that it refers to.
    #[serde(default)]
    pub inherited_bytes: u64,
    /// Pages found corrupt.
    pub page_errors: u64,
    /// What deserves a look though the backup is good, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Why it cannot be restored though it is there: its WAL was decided away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_restorable: Option<String>,
    /// Which stores have it.
    pub stores: Vec<StoreName>,
}

/// WAL along the path to one timeline, in all stores together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineInfo {
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The timeline.
    pub timeline: Timeline,
    /// Where it forked off.
    pub parent: Option<Fork>,
    /// Whether its history file is there; true for the first, which has none.
    pub history_present: bool,
    /// What the timeline itself has.
    pub own: Vec<RangeInfo>,
    /// What its path has, ancestors included.
    pub ranges: Vec<RangeInfo>,
    /// What is missing between those.
    pub gaps: Vec<GapInfo>,
    /// The end of the last range.
    pub tip: Option<LsnInfo>,
}

/// A fork with archived WAL of the parent beyond it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftBehindInfo {
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The timeline that began at the fork.
    pub timeline: Timeline,
    /// The parent, and where the fork is.
    pub fork: Fork,
    /// How far the parent's archived WAL goes: exactly, or to the end of its last segment.
    pub end: LsnInfo,
    /// How much of it lies beyond the fork.
    pub bytes: u64,
    /// The parent's last segment.
    pub last_segment: String,
    /// Who sent that one.
    pub node: Option<NodeName>,
    /// When the new timeline's history was sent, right after the promotion.
    pub begun: Option<Timestamp>,
    /// Set if the parent was written after that, so an old primary still runs: when it was last seen to be.
    pub parent_written: Option<Timestamp>,
}

/// WAL that is missing between WAL that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapInfo {
    /// What is missing.
    pub range: RangeInfo,
    /// In which segments it would be.
    pub segments: Vec<SpanInfo>,
    /// Whether it is no loss: no store keeps WAL of there, because retention removed it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub expired: bool,
}

/// Segments of one timeline that follow each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpanInfo {
    /// Name of the first.
    pub first: String,
    /// Name of the last.
    pub last: String,
    /// How many.
    pub segments: u64,
}

/// WAL that a store lacks while another has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtRiskInfo {
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// Which store lacks it.
    pub missing_in: StoreName,
    /// Which segments.
    pub span: SpanInfo,
    /// How much WAL that is.
    pub bytes: u64,
}

/// A name with contents that exclude each other; it is served to nobody until an operator chooses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictInfo {
    /// In which store.
    pub store: StoreName,
    /// Which WAL file.
    pub wal_file: String,
    /// The stored contents: the last components of their keys.
    pub contents: Vec<String>,
}

/// A segment of which only an incomplete content is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncompleteInfo {
    /// In which store.
    pub store: StoreName,
    /// Which segment.
    pub wal_file: String,
    /// How far its WAL goes.
    pub logical_end: Option<LsnInfo>,
    /// Who sent it.
    pub node: NodeName,
}

/// What a coordinator knows about the fleet around a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FleetInfo {
    /// Its nodes.
    pub nodes: Vec<NodeInfo>,
    /// Its schedules.
    pub schedules: Vec<ScheduleInfo>,
    /// Operations under way and the newest that ended.
    pub operations: Vec<OperationInfo>,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its name.
    pub node: NodeName,
    /// Whether its agent is connected.
    pub connected: bool,
    /// When it was last heard of.
    pub last_seen: Option<Timestamp>,
    /// `primary`, `standby` or `down`.
    pub role: Option<String>,
    /// Its timeline.
    pub timeline: Option<Timeline>,
    /// Where its WAL is: written on a primary, received on a standby.
    pub lsn: Option<LsnInfo>,
    /// The end of the last WAL it archived.
    pub archived_lsn: Option<LsnInfo>,
    /// WAL files waiting to be archived.
    pub ready_files: Option<u64>,
    /// Age of the oldest of those.
    pub ready_oldest_seconds: Option<u64>,
    /// `coordinator` or `direct`.
    pub road: Option<String>,
    /// How pressed archiving is there: 0 normal, 1 strained, 2 isolated, 4 critical.
    #[serde(default)]
    pub stage: Option<u32>,
    /// zstd level of the WAL it sends.
    #[serde(default)]
    pub compression_level: Option<u32>,
    /// Version of its agent.
    pub agent_version: Option<String>,
    /// PostgreSQL's version there, as it says itself.
    pub postgres_version: Option<String>,
    /// Seconds until its `pg_wal` is full, while nothing can be archived.
    pub full_in_seconds: Option<u64>,
    /// What is wrong with it, a line each.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// When backups are taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScheduleInfo {
    /// The rule, in cron's syntax.
    pub cron: String,
    /// In which time zone.
    pub zone: String,
    /// `standby` or `primary`.
    pub source: String,
    /// What its backups may build on.
    #[serde(rename = "type", default)]
    pub backup_type: BackupType,
    /// When next.
    pub next_run: Option<Timestamp>,
    /// When last.
    pub last_run: Option<Timestamp>,
}

/// A backup or another long work of the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationInfo {
    /// Its identifier.
    pub operation: String,
    /// What it is, as in `backup`.
    pub kind: String,
    /// On which node.
    pub node: Option<NodeName>,
    /// `running`, `waiting for WAL`, `done` or `failed`.
    pub state: String,
    /// What it is doing.
    pub step: Option<String>,
    /// Bytes done.
    pub bytes_done: Option<u64>,
    /// Bytes to do.
    pub bytes_total: Option<u64>,
    /// When it began.
    pub started: Option<Timestamp>,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// Why it failed.
    pub error: Option<String>,
    /// The backup it made.
    pub backup: Option<BackupId>,
}

#[cfg(test)]
mod tests;
