//! What is known about a cluster, for scripts (JSON, schema `pgconvoy.info/v1`) and for people (text).
//!
//! Rules of the schema: names are snake case, times RFC 3339 in UTC, amounts are integers of bytes, positions stand as
//! text and as number. Fields are added, never changed or removed, within `v1`.
//!
//! [`collect`] needs the stores only; a coordinator adds what it knows about its fleet.

mod text;

use std::sync::Arc;

use jiff::Timestamp;
use postgres_format::{Lsn, SegmentSize, SystemIdentifier, Timeline};
use serde::{Deserialize, Serialize};

use crate::coverage::{ArchivedWal, Coverage, Fork, LsnRange, SegmentSpan, TimelineCoverage};
use crate::name::{BackupId, ClusterName, NodeName, StoreName};
use crate::observe::{Holding, observe_all, view};
use crate::restore_plan::{Request, plan};
use crate::root::RootBackup;
use crate::store::ObjectStore;
use crate::wal_index::WalIndex;

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
}

/// Whether the cluster can be restored, and to when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryInfo {
    /// Whether it can, to the latest.
    pub possible: bool,
    /// Why not, or what was left out of account.
    pub reason: Option<String>,
    /// From when on: the end of the oldest backup.
    pub earliest_time: Option<Timestamp>,
    /// Time of the last commit known to be recovered.
    pub latest_time: Option<Timestamp>,
    /// How far WAL goes without a gap.
    pub latest_lsn: Option<LsnInfo>,
    /// Along which timeline.
    pub timeline: Option<Timeline>,
    /// From which backup the latest would be restored.
    pub backup: Option<BackupId>,
}

/// One backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupInfo {
    /// Its identifier.
    pub backup: BackupId,
    /// The label that was asked for.
    pub label: String,
    /// Whose files were read.
    pub node: NodeName,
    /// Whether that was a standby.
    pub from_standby: bool,
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
    /// Pages found corrupt.
    pub page_errors: u64,
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

/// WAL that is missing between WAL that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapInfo {
    /// What is missing.
    pub range: RangeInfo,
    /// In which segments it would be.
    pub segments: Vec<SpanInfo>,
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
    /// `running`, `done` or `failed`.
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

/// Gathers what the stores hold of a cluster. A store that does not answer is shown so, and the rest is of the others.
pub async fn collect(stores: &[Arc<dyn ObjectStore>], cluster: &ClusterName, now: Timestamp) -> ClusterInfo {
    let held = observe_all(stores, cluster).await;
    let answered: Vec<(&StoreName, &Holding)> =
        stores.iter().zip(&held).filter_map(|(store, held)| Some((store.name(), held.as_ref().ok()?))).collect();
    let mut info = ClusterInfo {
        cluster: cluster.clone(),
        systems: systems(&answered),
        stores: stores.iter().zip(&held).map(|(store, held)| store_info(store.name(), held)).collect(),
        recovery: RecoveryInfo {
            possible: false,
            reason: None,
            earliest_time: None,
            latest_time: None,
            latest_lsn: None,
            timeline: None,
            backup: None,
        },
        backups: backups(&answered),
        timelines: Vec::new(),
        at_risk: Vec::new(),
        conflicts: Vec::new(),
        incomplete: Vec::new(),
        problems: Vec::new(),
        fleet: None,
    };
    for system in info.systems.iter().map(|system| system.system_identifier).collect::<Vec<_>>() {
        add_system(&mut info, system, &answered);
    }
    let views: Vec<_> = stores.iter().zip(&held).map(|(store, held)| view(store.as_ref(), held)).collect();
    info.recovery = recovery(cluster, &views, &info, &answered, now);
    info
}

fn systems(answered: &[(&StoreName, &Holding)]) -> Vec<SystemInfo> {
    let mut systems: Vec<SystemInfo> = Vec::new();
    for system in answered.iter().filter_map(|(_, held)| held.root.as_ref()).flat_map(|root| &root.systems) {
        let known = systems.iter_mut().find(|known| known.system_identifier == system.system_identifier);
        match known {
            Some(known) => {
                known.postgres_major = known.postgres_major.or(system.postgres_major);
                known.segment_size_bytes = known.segment_size_bytes.or(system.segment_size_bytes);
            }
            None => systems.push(SystemInfo {
                system_identifier: system.system_identifier,
                postgres_major: system.postgres_major,
                segment_size_bytes: system.segment_size_bytes,
                since: system.since,
            }),
        }
    }
    systems
}

fn store_info(store: &StoreName, held: &Result<Holding, String>) -> StoreInfo {
    let (state, detail) = match held {
        Ok(_) => (StoreState::Available, None),
        Err(reason) => (StoreState::Unreachable, Some(reason.clone())),
    };
    let held = held.as_ref().ok();
    let sum = |count: fn(&WalIndex) -> u64| {
        held.map(|held| held.wal.iter().map(|(_, index)| count(index)).sum()).unwrap_or_default()
    };
    let root = held.and_then(|held| held.root.as_ref());
    let room = held.and_then(|held| held.room);
    StoreInfo {
        store: store.clone(),
        state,
        detail,
        backups: root.map_or(0, |root| root.backups.len() as u64),
        wal_objects: sum(|index| index.objects),
        wal_bytes: sum(|index| index.bytes),
        free_bytes: room.map(|room| room.free_bytes),
        total_bytes: room.map(|room| room.total_bytes),
        root_generation: root.map(|root| root.generation.get()),
    }
}

fn backups(answered: &[(&StoreName, &Holding)]) -> Vec<BackupInfo> {
    let mut backups: Vec<BackupInfo> = Vec::new();
    for (store, root) in answered.iter().filter_map(|(store, held)| Some((*store, held.root.as_ref()?))) {
        for backup in &root.backups {
            match backups.iter_mut().find(|known| known.backup == backup.backup) {
                Some(known) => known.stores.push(store.clone()),
                None => backups.push(backup_info(backup, store.clone())),
            }
        }
    }
    backups.sort_by_key(|backup| backup.backup);
    backups
}

fn backup_info(backup: &RootBackup, store: StoreName) -> BackupInfo {
    BackupInfo {
        backup: backup.backup,
        label: backup.label.clone(),
        node: backup.node.clone(),
        from_standby: backup.from_standby,
        system_identifier: backup.system_identifier,
        postgres_major: backup.postgres_major,
        start_timeline: backup.start_timeline,
        stop_timeline: backup.stop_timeline,
        start_lsn: backup.start_lsn.into(),
        stop_lsn: backup.stop_lsn.into(),
        start_time: backup.start_time,
        stop_time: backup.stop_time,
        files: backup.files,
        data_bytes: backup.data_bytes,
        stored_bytes: backup.stored_bytes,
        page_errors: backup.page_errors,
        stores: vec![store],
    }
}

/// Coverage of all stores together, and what each lacks of it.
fn add_system(info: &mut ClusterInfo, system: SystemIdentifier, answered: &[(&StoreName, &Holding)]) {
    let mut all: Option<ArchivedWal> = None;
    let mut each = Vec::new();
    for (store, held) in answered {
        let index = held.wal.iter().find(|(found, _)| *found == system).map(|(_, index)| index);
        if let Some(index) = index {
            add_oddities(info, store, index);
            if let Some(wal) = &index.wal {
                all.get_or_insert_with(|| ArchivedWal::new(wal.segment_size())).add_all(wal);
            }
        }
        each.push((*store, index.and_then(|index| index.wal.as_ref())));
    }
    let Some(all) = all else {
        return;
    };
    let size = all.segment_size();
    for (store, wal) in each {
        let nothing = ArchivedWal::new(size);
        for span in all.without(wal.unwrap_or(&nothing)) {
            info.at_risk.push(AtRiskInfo {
                system_identifier: system,
                missing_in: store.clone(),
                span: span_info(span, size),
                bytes: span.count().saturating_mul(size.bytes()),
            });
        }
    }
    let timelines = Coverage::of(&all).timelines;
    info.timelines.extend(timelines.into_iter().map(|coverage| timeline_info(system, size, coverage)));
}

fn add_oddities(info: &mut ClusterInfo, store: &StoreName, index: &WalIndex) {
    for conflict in &index.conflicts {
        info.conflicts.push(ConflictInfo {
            store: store.clone(),
            wal_file: conflict.name.to_string(),
            contents: conflict.variants.iter().map(|variant| variant.content_name().to_owned()).collect(),
        });
    }
    for incomplete in &index.incomplete {
        info.incomplete.push(IncompleteInfo {
            store: store.clone(),
            wal_file: incomplete.name.to_string(),
            logical_end: incomplete.logical_end.map(LsnInfo::from),
            node: incomplete.node.clone(),
        });
    }
    info.problems.extend(index.problems.iter().map(|problem| format!("store {store}: {problem}")));
}

fn timeline_info(system: SystemIdentifier, size: SegmentSize, coverage: TimelineCoverage) -> TimelineInfo {
    let gaps = coverage.gaps.into_iter().map(|gap| GapInfo {
        range: gap.range.into(),
        segments: gap.segments.into_iter().map(|span| span_info(span, size)).collect(),
    });
    TimelineInfo {
        system_identifier: system,
        timeline: coverage.timeline,
        parent: coverage.parent,
        history_present: coverage.history_present,
        own: coverage.own.into_iter().map(RangeInfo::from).collect(),
        ranges: coverage.ranges.into_iter().map(RangeInfo::from).collect(),
        gaps: gaps.collect(),
        tip: coverage.tip.map(LsnInfo::from),
    }
}

fn span_info(span: SegmentSpan, size: SegmentSize) -> SpanInfo {
    let name = |number| postgres_format::SegmentName::new(span.timeline, number, size).to_string();
    SpanInfo { first: name(span.first), last: name(span.last), segments: span.count() }
}

/// What a restore to the latest would do now, without stores that do not answer.
fn recovery(
    cluster: &ClusterName,
    views: &[crate::restore_plan::StoreView],
    info: &ClusterInfo,
    answered: &[(&StoreName, &Holding)],
    now: Timestamp,
) -> RecoveryInfo {
    let silent = info.stores.iter().filter(|store| store.state == StoreState::Unreachable);
    let request = Request { without_stores: silent.map(|store| store.store.clone()).collect(), ..Request::latest("") };
    let without: Vec<String> = request.without_stores.iter().map(ToString::to_string).collect();
    let planned = match plan(cluster, views, &request, now) {
        Ok(planned) => planned,
        Err(impossible) => {
            return RecoveryInfo {
                possible: false,
                reason: Some(format!("{}; {}", impossible.reason, impossible.hint)),
                earliest_time: None,
                latest_time: None,
                latest_lsn: None,
                timeline: None,
                backup: None,
            };
        }
    };
    let timeline = match planned.timeline {
        crate::restore_plan::TargetTimeline::Number(timeline) => timeline,
        _ => planned.backup.stop_timeline,
    };
    let commits = answered.iter().flat_map(|(_, held)| &held.wal).flat_map(|(_, index)| &index.commits);
    let latest = commits.filter(|sample| sample.timeline <= timeline && sample.before <= planned.wal.end);
    RecoveryInfo {
        possible: true,
        reason: (!without.is_empty()).then(|| format!("not counting what {} may hold", without.join(", "))),
        earliest_time: info.backups.iter().map(|backup| backup.stop_time).min(),
        latest_time: latest.map(|sample| sample.time).max(),
        latest_lsn: Some(planned.wal.end.into()),
        timeline: Some(timeline),
        backup: Some(planned.backup.backup),
    }
}

#[cfg(test)]
mod tests;
