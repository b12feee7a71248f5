//! `pgconvoy info --output pgbackrest-json`: what pgBackRest prints with `info --output=json`, so that its users' exporters and
//! checks can stay.
//!
//! Pure: a report of ours comes in, their array goes out. A cluster is what they call a stanza, a store one of their
//! repositories, numbered in the order of the configuration. A backup in two stores is listed twice, as theirs is.
//!
//! Where our facts are others:
//! * `label` is our identifier, so that it can be given to `pgconvoy restore`; `type` tells full, diff and incr apart;
//! * `info.delta`, the bytes that were copied, is `size` in the proportion in which the backup's own stored bytes stand to all
//!   that it needs, since what was copied is not known uncompressed;
//! * `archive` tells the first and the last segment of a store. It says nothing of gaps, and neither does theirs.
//!
//! Codes and messages are those of `infoRender` in pgBackRest's `src/command/info/info.c`.

use jiff::Timestamp;
use postgres_format::{SegmentName, SegmentNumber, SegmentSize, SystemIdentifier};
use repository::info::{BackupInfo, ClusterInfo, Info, StoreInfo, StoreState, SystemInfo};
use repository::name::{BackupId, StoreName};
use serde_json::{Value, json};

/// A code of theirs and its message.
type Status = (u32, String);

fn ok() -> Status {
    (0, "ok".to_owned())
}

/// The whole report.
pub(crate) fn render(info: &Info) -> Value {
    Value::Array(info.clusters.iter().map(cluster).collect())
}

fn cluster(info: &ClusterInfo) -> Value {
    let repos: Vec<(usize, &StoreInfo)> = (1..).zip(&info.stores).collect();
    let states: Vec<Status> = repos.iter().map(|(_, store)| of_store(info, store)).collect();
    let mut backups: Vec<(&BackupInfo, usize)> = Vec::new();
    for backup in &info.backups {
        let keys = repos.iter().filter(|(_, store)| backup.stores.contains(&store.store));
        backups.extend(keys.map(|(key, _)| (backup, *key)));
    }
    backups.sort_by_key(|(backup, key)| (backup.stop_time, *key));
    let of_systems = |render: fn(&ClusterInfo, &StoreInfo, usize, usize, &SystemInfo) -> Value| -> Vec<Value> {
        let systems = || (1..).zip(&info.systems);
        let pairs = repos.iter().flat_map(|(key, store)| systems().map(move |(id, system)| (*key, store, id, system)));
        pairs.map(|(key, store, id, system)| render(info, store, key, id, system)).collect()
    };
    let repo = repos.iter().zip(&states);
    let repo = repo.map(|((key, _), state)| json!({"cipher": "none", "key": key, "status": status(state)}));
    json!({
        "archive": of_systems(archive),
        "backup": backups.iter().map(|(one, key)| backup(info, one, *key)).collect::<Vec<Value>>(),
        "cipher": "none",
        "db": of_systems(database),
        "name": info.cluster.as_str(),
        "repo": repo.collect::<Vec<Value>>(),
        "status": with_locks(status(&whole(&states)), running(info)),
    })
}

fn status((code, message): &Status) -> Value {
    json!({"code": code, "message": message})
}

fn with_locks(mut status: Value, backup: Value) -> Value {
    status["lock"] = json!({"backup": backup, "restore": {"held": false}});
    status
}

fn of_store(info: &ClusterInfo, store: &StoreInfo) -> Status {
    match store.state {
        StoreState::Unreachable => {
            let why = store.detail.as_deref().unwrap_or("the store does not answer");
            (99, format!("[StoreUnreachable] {why}"))
        }
        StoreState::Available if info.backups.iter().any(|backup| backup.stores.contains(&store.store)) => ok(),
        StoreState::Available if info.systems.is_empty() => unknown(),
        StoreState::Available => (2, "no valid backups".to_owned()),
    }
}

fn unknown() -> Status {
    (1, "missing stanza path".to_owned())
}

/// One status of all stores, or that they differ.
fn whole(states: &[Status]) -> Status {
    match states {
        [] => unknown(),
        [first, rest @ ..] if rest.iter().all(|state| state.0 == first.0) => first.clone(),
        _ => (4, "different across repos".to_owned()),
    }
}

/// Whether a backup runs, and how far it is.
fn running(info: &ClusterInfo) -> Value {
    let operations = info.fleet.iter().flat_map(|fleet| &fleet.operations);
    let mut running = operations.filter(|one| one.kind == "backup" && one.state == "running");
    let Some(operation) = running.next() else { return json!({"held": false}) };
    match (operation.bytes_done, operation.bytes_total) {
        (Some(done), Some(total)) => json!({"held": true, "size": total, "size-cplt": done}),
        _ => json!({"held": true}),
    }
}

fn version(system: &SystemInfo) -> String {
    system.postgres_major.map(|major| major.to_string()).unwrap_or_default()
}

fn database(_: &ClusterInfo, _: &StoreInfo, key: usize, id: usize, system: &SystemInfo) -> Value {
    json!({"id": id, "repo-key": key, "system-id": system.system_identifier.as_u64(), "version": version(system)})
}

fn archive(info: &ClusterInfo, store: &StoreInfo, key: usize, id: usize, system: &SystemInfo) -> Value {
    let ends = (store.wal_objects > 0).then(|| ends(info, &store.store, system)).flatten();
    let (min, max) = ends.map(|(min, max)| (min.to_string(), max.to_string())).unzip();
    json!({
        "database": {"id": id, "repo-key": key},
        "id": format!("{}-{id}", version(system)),
        "max": max,
        "min": min,
    })
}

/// The first and the last segment that a store has of a system.
fn ends(info: &ClusterInfo, store: &StoreName, system: &SystemInfo) -> Option<(SegmentName, SegmentName)> {
    let size = SegmentSize::from_bytes(system.segment_size_bytes?).ok()?;
    let mut all = Vec::new();
    for timeline in info.timelines.iter().filter(|one| one.system_identifier == system.system_identifier) {
        for range in timeline.own.iter().filter(|range| range.bytes > 0) {
            let first = SegmentNumber::containing(range.start.text, size);
            let last = SegmentNumber::last_before(range.end.text, size);
            all.push((
                SegmentName::new(timeline.timeline, first, size),
                SegmentName::new(timeline.timeline, last, size),
            ));
        }
    }
    all.sort();
    let (mut min, mut max) = (all.first()?.0, all.last()?.1);
    let mut lacks = lacked(info, store, system.system_identifier);
    lacks.sort();
    for (first, last) in &lacks {
        if *first <= min && min <= *last {
            min = SegmentName::new(last.timeline(), last.number(size).ok()?.next(), size);
        }
    }
    for (first, last) in lacks.iter().rev() {
        if *first <= max && max <= *last {
            max = SegmentName::new(first.timeline(), first.number(size).ok()?.previous()?, size);
        }
    }
    (min <= max).then_some((min, max))
}

fn lacked(info: &ClusterInfo, store: &StoreName, system: SystemIdentifier) -> Vec<(SegmentName, SegmentName)> {
    let spans = info.at_risk.iter().filter(|one| one.missing_in == *store && one.system_identifier == system);
    spans.filter_map(|one| Some((one.span.first.parse().ok()?, one.span.last.parse().ok()?))).collect()
}

fn backup(info: &ClusterInfo, backup: &BackupInfo, key: usize) -> Value {
    let place = info.systems.iter().position(|system| system.system_identifier == backup.system_identifier);
    let system = place.and_then(|place| info.systems.get(place));
    let needed = backup.stored_bytes.saturating_add(backup.inherited_bytes);
    json!({
        "annotation": {"label": backup.label, "node": backup.node.as_str()},
        "archive": segments(backup, system),
        "backrest": {"format": 5, "version": env!("CARGO_PKG_VERSION")},
        "database": {"id": place.map_or(0, |place| place + 1), "repo-key": key},
        "error": backup.page_errors > 0 || backup.not_restorable.is_some(),
        "info": {
            "delta": share(backup.data_bytes, backup.stored_bytes, needed),
            "repository": {"delta": backup.stored_bytes, "size": needed},
            "size": backup.data_bytes,
        },
        "label": backup.backup.to_string(),
        "lsn": {"start": backup.start_lsn.text.to_string(), "stop": backup.stop_lsn.text.to_string()},
        "prior": backup.parent.map(|parent| parent.to_string()),
        "reference": references(info, backup),
        "timestamp": {"start": seconds(backup.start_time), "stop": seconds(backup.stop_time)},
        "type": backup.backup_type.as_str(),
    })
}

fn seconds(at: Timestamp) -> i64 {
    at.as_second()
}

/// `of` times `part` to `whole`; all of it of a whole of nothing.
fn share(of: u64, part: u64, whole: u64) -> u64 {
    let scaled = (u128::from(of) * u128::from(part)).checked_div(u128::from(whole));
    scaled.map_or(of, |scaled| u64::try_from(scaled).unwrap_or(of))
}

fn segments(backup: &BackupInfo, system: Option<&SystemInfo>) -> Value {
    let size = system.and_then(|system| SegmentSize::from_bytes(system.segment_size_bytes?).ok());
    let Some(size) = size else { return json!({"start": null, "stop": null}) };
    let start = SegmentNumber::containing(backup.start_lsn.text, size);
    let stop = SegmentNumber::last_before(backup.stop_lsn.text, size);
    json!({
        "start": SegmentName::new(backup.start_timeline, start, size).to_string(),
        "stop": SegmentName::new(backup.stop_timeline, stop, size).to_string(),
    })
}

/// The known backups that this one was built on, oldest first.
fn references(info: &ClusterInfo, backup: &BackupInfo) -> Option<Vec<String>> {
    let mut found: Vec<BackupId> = Vec::new();
    let mut parent = backup.parent;
    while let Some(one) = parent.filter(|one| !found.contains(one)) {
        found.push(one);
        parent = info.backups.iter().find(|known| known.backup == one).and_then(|known| known.parent);
    }
    found.reverse();
    (!found.is_empty()).then(|| found.iter().map(ToString::to_string).collect())
}

#[cfg(test)]
mod tests;
