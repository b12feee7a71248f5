//! Whether a cluster can be restored, and to when: what a plan of a restore says. Pure.

use std::collections::BTreeSet;

use jiff::Timestamp;

use super::{RecoveryInfo, WindowInfo};
use crate::name::{ClusterName, StoreName};
use crate::restore_plan::{Request, StoreView, TargetTimeline, Testimonies, Window, plan, windows};

/// What a restore to the latest would do now, and every window, without stores that do not answer.
pub(super) fn of(
    cluster: &ClusterName,
    views: &[StoreView],
    testimonies: &Testimonies,
    now: Timestamp,
) -> RecoveryInfo {
    let silent = |view: &StoreView| match view {
        StoreView::Unreachable { store, .. } => Some(store.clone()),
        StoreView::Holds { .. } => None,
    };
    let without: BTreeSet<StoreName> = views.iter().filter_map(silent).collect();
    let windows = windows(views, &without, testimonies).unwrap_or_default();
    let request = Request { without_stores: without.clone(), ..Request::latest("") };
    let planned = match plan(cluster, views, &request, testimonies, now) {
        Ok(planned) => planned,
        Err(refusal) => {
            let reason = format!("{}; {}", refusal.reason, refusal.hint);
            let windows = windows.into_iter().map(WindowInfo::from).collect();
            return RecoveryInfo { windows, ..impossible(Some(reason)) };
        }
    };
    let timeline = match planned.timeline {
        TargetTimeline::Number(timeline) => timeline,
        _ => planned.backup.stop_timeline,
    };
    let own = windows.iter().find(|window| window.backups.contains(&planned.backup.backup));
    let without: Vec<&str> = without.iter().map(AsRef::as_ref).collect();
    RecoveryInfo {
        possible: true,
        reason: (!without.is_empty()).then(|| format!("not counting what {} may hold", without.join(", "))),
        earliest_time: Some(own.map_or(planned.backup.stop_time, |window| window.from)),
        latest_time: own.map_or(planned.last_commit_time, |window| window.last_commit),
        latest_lsn: Some(planned.wal.end.into()),
        timeline: Some(timeline),
        backup: Some(planned.backup.backup),
        windows: windows.into_iter().map(WindowInfo::from).collect(),
    }
}

/// No restore, for this reason.
pub(super) fn impossible(reason: Option<String>) -> RecoveryInfo {
    RecoveryInfo {
        possible: false,
        reason,
        earliest_time: None,
        latest_time: None,
        latest_lsn: None,
        timeline: None,
        backup: None,
        windows: Vec::new(),
    }
}

/// From when on any moment can be restored from one store alone: where that window begins which goes furthest, of the system
/// with the newest backup.
pub(super) fn earliest_in(view: &StoreView, testimonies: &Testimonies) -> Option<Timestamp> {
    let windows = windows(std::slice::from_ref(view), &BTreeSet::new(), testimonies).ok()?;
    let newest = windows.iter().max_by_key(|window| window.backups.last().copied())?.system_identifier;
    let own = windows.iter().filter(|window| window.system_identifier == newest);
    own.max_by_key(|window| window.wal.end).map(|window| window.from)
}

impl From<Window> for WindowInfo {
    fn from(window: Window) -> Self {
        Self {
            system_identifier: window.system_identifier,
            timeline: window.timeline,
            earliest_time: window.from,
            latest_time: window.last_commit,
            earliest_lsn: window.wal.start.into(),
            latest_lsn: window.wal.end.into(),
            backups: window.backups,
        }
    }
}
