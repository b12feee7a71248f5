//! Gathering the report from stores.

use std::sync::Arc;

use jiff::Timestamp;
use postgres_format::{SegmentName, SegmentSize, SystemIdentifier};

use super::{
    AtRiskInfo, BackupInfo, ClusterInfo, ConflictInfo, GapInfo, HoldInfo, IncompleteInfo, LeftBehindInfo, LsnInfo,
    RangeInfo, SpanInfo, StoreInfo, StoreState, SystemInfo, TimelineInfo, WalKeptInfo, decided, recovery,
};
use crate::coverage::forks::{ForkFacts, GoesOn, LeftBehind};
use crate::coverage::{ArchivedWal, Coverage, SegmentSpan, TimelineCoverage};
use crate::name::{ClusterName, StoreName};
use crate::observe::{Holding, observe_all, view};
use crate::restore_plan::{Testimonies, contradicted};
use crate::root::{Hold, Root, RootBackup, WalSpan};
use crate::store::ObjectStore;
use crate::wal_index::WalIndex;
use crate::witness::Heard;

/// Gathers what the stores hold of a cluster. A store that does not answer is shown so, and the rest is of the others.
pub async fn collect(stores: &[Arc<dyn ObjectStore>], cluster: &ClusterName, now: Timestamp) -> ClusterInfo {
    let held = observe_all(stores, cluster).await;
    let answered: Vec<(&StoreName, &Holding)> =
        stores.iter().zip(&held).filter_map(|(store, held)| Some((store.name(), held.as_ref().ok()?))).collect();
    let testimonies = decided::testimonies(stores, cluster, &answered).await;
    let views: Vec<_> = stores.iter().zip(&held).map(|(store, held)| view(store.as_ref(), held)).collect();
    let mut info = ClusterInfo {
        cluster: cluster.clone(),
        systems: systems(&answered),
        stores: stores.iter().zip(&held).map(|(store, held)| store_info(store.name(), held)).collect(),
        recovery: recovery::impossible(None),
        backups: backups(&answered, &testimonies),
        timelines: Vec::new(),
        left_behind: Vec::new(),
        at_risk: Vec::new(),
        conflicts: Vec::new(),
        incomplete: Vec::new(),
        problems: Vec::new(),
        fleet: None,
    };
    for system in info.systems.iter().map(|system| system.system_identifier).collect::<Vec<_>>() {
        add_system(&mut info, system, &answered);
    }
    info.recovery = recovery::of(cluster, &views, &testimonies, now);
    for (info, view) in info.stores.iter_mut().zip(&views) {
        info.earliest_time = recovery::earliest_in(view, &testimonies);
    }
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
        earliest_time: None,
        holds: root.map(holds).unwrap_or_default(),
        wal_kept: root.map(wal_kept).unwrap_or_default(),
        retention: None,
    }
}

fn holds(root: &Root) -> Vec<HoldInfo> {
    let hold = |hold: &Hold| {
        let Hold { backup, reason, by, since, until, .. } = hold.clone();
        HoldInfo { backup, reason, by, since, until }
    };
    root.holds.iter().map(hold).collect()
}

fn wal_kept(root: &Root) -> Vec<WalKeptInfo> {
    let mut all = Vec::new();
    for system in &root.systems {
        let size = system.segment_size_bytes.and_then(|bytes| SegmentSize::from_bytes(bytes).ok());
        for kept in &system.wal_kept {
            let span = |span: &WalSpan| {
                let number = |name: SegmentName| name.number(size?).ok();
                let segments = number(span.first)
                    .zip(number(span.last))
                    .map(|(first, last)| last.as_u64().saturating_sub(first.as_u64()) + 1);
                let (first, last) = (span.first.to_string(), span.last.to_string());
                SpanInfo { first, last, segments: segments.unwrap_or_default() }
            };
            all.push(WalKeptInfo {
                system_identifier: system.system_identifier,
                timeline: kept.timeline(),
                from: kept.from.to_string(),
                also: kept.also.iter().map(span).collect(),
            });
        }
    }
    all
}

fn backups(answered: &[(&StoreName, &Holding)], testimonies: &Testimonies) -> Vec<BackupInfo> {
    let mut backups: Vec<BackupInfo> = Vec::new();
    for (store, root) in answered.iter().filter_map(|(store, held)| Some((*store, held.root.as_ref()?))) {
        for backup in &root.backups {
            match backups.iter_mut().find(|known| known.backup == backup.backup) {
                Some(known) => known.stores.push(store.clone()),
                None => backups.push(backup_info(backup, testimonies, store.clone())),
            }
        }
    }
    backups.sort_by_key(|backup| backup.backup);
    backups
}

fn backup_info(backup: &RootBackup, testimonies: &Testimonies, store: StoreName) -> BackupInfo {
    let contradiction = testimonies.get(&backup.backup).and_then(Heard::contradiction);
    BackupInfo {
        backup: backup.backup,
        backup_type: backup.backup_type,
        parent: backup.parent,
        changes: backup.changes.clone(),
        label: backup.label.clone(),
        node: backup.node.clone(),
        from_standby: backup.from_standby,
        primary: backup.primary.clone(),
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
        inherited_bytes: backup.inherited_bytes,
        page_errors: backup.page_errors,
        warnings: backup.warnings.clone(),
        not_restorable: contradiction.map(|(store, name)| contradicted(backup, store, name)),
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
        each.push((*store, index));
    }
    let Some(all) = all else { return };
    let size = all.segment_size();
    for (store, index) in &each {
        let nothing = ArchivedWal::new(size);
        let lacking = all.without(index.and_then(|index| index.wal.as_ref()).unwrap_or(&nothing));
        // What it removed on purpose it does not lack.
        for span in lacking.into_iter().flat_map(|span| kept_part(*index, span, size)) {
            info.at_risk.push(AtRiskInfo {
                system_identifier: system,
                missing_in: (*store).clone(),
                span: span_info(span, size),
                bytes: span.count().saturating_mul(size.bytes()),
            });
        }
    }
    let facts: Vec<&ForkFacts> = answered
        .iter()
        .flat_map(|(_, held)| &held.forks)
        .filter(|(found, _)| *found == system)
        .map(|(_, facts)| facts)
        .collect();
    info.left_behind.extend(all.left_behind().into_iter().filter_map(|left| left_behind_info(system, left, &facts)));
    let timelines = Coverage::of(&all).timelines;
    let lost = |span: SegmentSpan| each.iter().any(|(_, index)| !kept_part(*index, span, size).is_empty());
    info.timelines.extend(timelines.into_iter().map(|coverage| timeline_info(system, size, coverage, &lost)));
}

/// What of a span a store would keep.
fn kept_part(index: Option<&WalIndex>, span: SegmentSpan, size: SegmentSize) -> Vec<SegmentSpan> {
    let kept = index.and_then(|index| index.kept.iter().find(|kept| kept.timeline() == span.timeline));
    kept.map_or_else(|| vec![span], |kept| kept.part_of(span, size))
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

fn timeline_info(
    system: SystemIdentifier,
    size: SegmentSize,
    coverage: TimelineCoverage,
    lost: &dyn Fn(SegmentSpan) -> bool,
) -> TimelineInfo {
    let gaps = coverage.gaps.into_iter().map(|gap| GapInfo {
        range: gap.range.into(),
        expired: !gap.segments.iter().any(|span| lost(*span)),
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

/// What was left behind at a fork; nothing if the parent's last segment turns out to end before it.
fn left_behind_info(system: SystemIdentifier, left: LeftBehind, facts: &[&ForkFacts]) -> Option<LeftBehindInfo> {
    let facts = facts.iter().copied().find(|facts| facts.left == left);
    let bytes = left.bytes(facts);
    (bytes > 0).then(|| LeftBehindInfo {
        system_identifier: system,
        timeline: left.timeline,
        fork: left.fork,
        end: left.end(facts).into(),
        bytes,
        last_segment: left.last.to_string(),
        node: facts.map(|facts| facts.node.clone()),
        begun: facts.map(|facts| facts.begun),
        parent_written: facts.and_then(ForkFacts::goes_on).as_ref().map(GoesOn::at),
    })
}

fn span_info(span: SegmentSpan, size: SegmentSize) -> SpanInfo {
    let name = |number| SegmentName::new(span.timeline, number, size).to_string();
    SpanInfo { first: name(span.first), last: name(span.last), segments: span.count() }
}
