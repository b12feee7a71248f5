//! The report on stores in memory, as JSON and as text.

use std::sync::Arc;

use postgres_format::PgTimestamp;

use super::*;
use crate::root::RootBackup;
use crate::root::{self, System};
use crate::store::ObjectStore;
use crate::stores::memory::MemoryStore;
use crate::wal::{Decision, Fingerprint, Sink, VariantCheck, WalEncoder, WalFacts, decide, put};
use sha2::{Digest, Sha256};

const MIB: u64 = 1 << 20;
const SYSTEM: SystemIdentifier = SystemIdentifier::new(7_300_000_000_000_000_001);

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

fn now() -> Timestamp {
    "2026-11-23T05:00:00Z".parse().unwrap()
}

async fn create(name: &str) -> Arc<MemoryStore> {
    let store = Arc::new(MemoryStore::new(name.parse().unwrap()));
    let system = System::new(SYSTEM, Some(15), Some(MIB), now());
    let writer = "coordinator".parse().unwrap();
    root::commit(store.as_ref(), &cluster(), &writer, now(), |root| root.with_system(system.clone())).await.unwrap();
    store
}

/// Archives a file whose content is this byte all over.
async fn archive(store: &MemoryStore, name: &str, byte: u8, end: Option<u64>) {
    archive_at(store, name, byte, end, now()).await;
}

/// A history whose fork lies as many segments on as the byte says.
fn history_text(byte: u8) -> Vec<u8> {
    format!("1\t0/{:X}\tno recovery target\n", 0x0048_0000 + u64::from(byte) * MIB).into_bytes()
}

async fn archive_at(store: &MemoryStore, name: &str, byte: u8, end: Option<u64>, written: Timestamp) {
    let segment = name.len() == 24;
    let file = if segment { vec![byte; MIB as usize] } else { history_text(byte) };
    let mut encoder = WalEncoder::new(1, Sink::Memory).unwrap();
    encoder.push(&file).unwrap();
    // A commit at 01:00:00 and as many seconds as the byte says.
    let commit = PgTimestamp::from_unix_micros(1_795_395_600_000_000 + i64::from(byte) * 1_000_000);
    let facts = WalFacts {
        cluster: cluster(),
        system_identifier: SYSTEM,
        name: name.parse().unwrap(),
        node: "db1".parse().unwrap(),
        in_recovery: false,
        complete: end.is_none(),
        logical_end: end.map(Lsn::new),
        postgres_major: Some(15),
        first_commit_time: segment.then_some(commit),
        last_commit_time: segment.then_some(commit),
        written,
    };
    // Conflicts are among what is tested.
    let _ = put(store, &encoder.finish(facts).unwrap(), VariantCheck::List).await;
}

fn segment(timeline: u32, number: u64) -> String {
    format!("{timeline:08X}00000000{number:08X}")
}

async fn publish(store: &MemoryStore, random: u32) {
    let text = format!(
        r#"{{"backup":"20261123T010100Z-{random:08x}","manifest_sha256":"{}","manifest_size":1000,
        "system_identifier":"{SYSTEM}","postgres_major":15,"segment_size_bytes":1048576,
        "start_timeline":1,"start_lsn":"0/200028","start_time":"2026-11-23T01:01:00Z",
        "stop_timeline":1,"stop_lsn":"0/280000","stop_time":"2026-11-23T01:01:30Z","min_recovery_point":null,
        "node":"db2","from_standby":true,"label":"nightly","files":900,"data_bytes":31457280,
        "stored_bytes":9437184,"packs":1,"page_errors":2}}"#,
        "07".repeat(32)
    );
    let entry = RootBackup::from_json(&text).unwrap();
    let writer = "db2".parse().unwrap();
    root::commit(store, &cluster(), &writer, now(), |root| root.with_backup(entry.clone())).await.unwrap();
}

/// Two stores of a cluster that was promoted, one of them behind, with everything that needs attention.
async fn troubled() -> Info {
    let (repo1, s3) = (create("repo1").await, create("s3").await);
    for number in 1..=3 {
        archive(&repo1, &segment(1, number), number as u8, None).await;
    }
    for number in [2, 3] {
        archive(&s3, &segment(1, number), number as u8, None).await;
    }
    archive(&repo1, "00000002.history", 0, None).await;
    archive(&repo1, &segment(2, 6), 60, None).await;
    archive(&repo1, &segment(2, 7), 70, None).await;
    archive(&repo1, &segment(2, 9), 90, Some(9 * MIB + 1000)).await;
    archive(&s3, &segment(1, 4), 40, None).await;
    archive(&s3, &segment(1, 4), 41, None).await;
    publish(&s3, 7).await;
    let stores: Vec<Arc<dyn ObjectStore>> = vec![repo1, s3];
    Info::new(now(), vec![collect(&stores, &cluster(), now()).await])
}

#[tokio::test]
async fn a_troubled_cluster_as_text() {
    insta::assert_snapshot!(render_text(&troubled().await));
}

#[tokio::test]
async fn lines_are_alike_before_the_first_commit_in_the_segments_of_their_fork() {
    let store = create("repo1").await;
    for number in 2..=6 {
        archive(&store, &segment(1, number), number as u8, None).await;
    }
    archive(&store, "00000002.history", 0, None).await;
    let apart = || async { crate::observe::observe(&*store, &cluster()).await.unwrap().forks[0].1.apart_from };
    archive(&store, &segment(2, 5), 31, None).await;
    assert_eq!(apart().await, None, "the child's copy of the segment may hold earlier commits");
    archive(&store, &segment(2, 4), 30, None).await;
    assert_eq!(apart().await, Some("2026-11-23T01:00:04Z".parse().unwrap()));
}

/// Two stores that hold one segment in unlike contents; the second may hold both.
async fn divided(both: bool) -> [Arc<MemoryStore>; 2] {
    let stores = [create("repo1").await, create("s3").await];
    for store in &stores {
        for number in [2, 3, 5] {
            archive(store, &segment(1, number), number as u8, None).await;
        }
        publish(store, 7).await;
    }
    archive(&stores[0], &segment(1, 4), 40, None).await;
    archive(&stores[1], &segment(1, 4), 41, None).await;
    if both {
        archive(&stores[1], &segment(1, 4), 40, None).await;
    }
    stores
}

#[tokio::test]
async fn contents_that_exclude_each_other_over_stores_are_a_conflict_until_one_is_chosen() {
    for (both, decided_in) in [(false, 0), (false, 1), (true, 0), (true, 1)] {
        let [repo1, s3] = divided(both).await;
        let stores: Vec<Arc<dyn ObjectStore>> = vec![repo1, s3];
        let info = collect(&stores, &cluster(), now()).await;
        let conflicts: Vec<_> =
            info.conflicts.iter().map(|conflict| (conflict.store.as_str(), conflict.contents.len())).collect();
        assert_eq!(conflicts, [("repo1", 2), ("s3", 2)], "{both}");
        let reason = info.recovery.reason.unwrap();
        assert!(!info.recovery.possible && reason.contains("conflicting contents"), "{both}: {reason}");

        let decision = Decision {
            format: 1,
            fingerprint: Fingerprint::of_sha256(&Sha256::digest(vec![40; MIB as usize]).into()),
            reason: "checked".to_owned(),
            written: now(),
        };
        let name = segment(1, 4).parse().unwrap();
        decide(&*stores[decided_in], &cluster(), SYSTEM, &name, &decision).await.unwrap();
        let info = collect(&stores, &cluster(), now()).await;
        assert!(info.recovery.possible && info.conflicts.is_empty() && info.problems.is_empty(), "{info:?}");
        assert_eq!(info.recovery.latest_lsn, Some(Lsn::new(6 * MIB).into()));
        // The store without the chosen content lacks the segment.
        let lacking: Vec<_> = info.at_risk.iter().map(|risk| risk.missing_in.as_str()).collect();
        assert_eq!(lacking, if both { vec![] } else { vec!["s3"] });
    }
}

#[tokio::test]
async fn histories_that_differ_over_stores_are_a_conflict_until_one_is_chosen() {
    let stores = [create("repo1").await, create("s3").await];
    for store in &stores {
        for number in 2..=4 {
            archive(store, &segment(1, number), number as u8, None).await;
        }
        archive(store, &segment(2, 4), 44, None).await;
        publish(store, 7).await;
    }
    archive(&stores[0], "00000002.history", 0, None).await;
    archive(&stores[1], "00000002.history", 1, None).await;
    let [repo1, s3] = stores;
    let stores: Vec<Arc<dyn ObjectStore>> = vec![repo1, s3];
    let info = collect(&stores, &cluster(), now()).await;
    let conflicts: Vec<_> =
        info.conflicts.iter().map(|conflict| (conflict.store.as_str(), conflict.contents.len())).collect();
    assert_eq!(conflicts, [("repo1", 2), ("s3", 2)], "{info:?}");
    let newest = |info: &ClusterInfo| info.timelines.iter().find(|of| of.timeline.get() == 2).cloned().unwrap();
    assert!(!newest(&info).history_present);
    let reason = info.recovery.reason.unwrap_or_default();
    assert!(!info.recovery.possible && reason.contains("history of timeline 2"), "{reason}");

    let fingerprint = Fingerprint::of_sha256(&Sha256::digest(history_text(1)).into());
    let decision = Decision { format: 1, fingerprint, reason: "checked".to_owned(), written: now() };
    let name = "00000002.history".parse().unwrap();
    decide(&*stores[1], &cluster(), SYSTEM, &name, &decision).await.unwrap();
    let info = collect(&stores, &cluster(), now()).await;
    assert!(info.conflicts.is_empty() && info.problems.is_empty(), "{info:?}");
    assert!(newest(&info).history_present);
}

#[tokio::test]
async fn a_complete_segment_and_the_beginning_of_it_in_another_store_are_no_conflict() {
    let stores = [create("repo1").await, create("s3").await];
    for store in &stores {
        for number in [2, 3] {
            archive(store, &segment(1, number), number as u8, None).await;
        }
        publish(store, 7).await;
    }
    archive(&stores[0], &segment(1, 4), 40, Some(4 * MIB + 1000)).await;
    archive(&stores[1], &segment(1, 4), 40, None).await;
    let stores: Vec<Arc<dyn ObjectStore>> = stores.into_iter().map(|store| store as Arc<dyn ObjectStore>).collect();
    let info = collect(&stores, &cluster(), now()).await;
    assert!(info.recovery.possible && info.conflicts.is_empty(), "{info:?}");
    assert_eq!(info.recovery.latest_lsn, Some(Lsn::new(5 * MIB).into()));
}

#[tokio::test]
async fn a_troubled_cluster_as_json() {
    let info = troubled().await;
    insta::assert_json_snapshot!(info);
    let text = serde_json::to_string(&info).unwrap();
    assert_eq!(serde_json::from_str::<Info>(&text).unwrap(), info);
}

#[tokio::test]
async fn a_sound_cluster_as_text() {
    let (repo1, s3) = (create("repo1").await, create("s3").await);
    for store in [&repo1, &s3] {
        for number in 1..=5 {
            archive(store, &segment(1, number), number as u8, None).await;
        }
        publish(store, 7).await;
    }
    let stores: Vec<Arc<dyn ObjectStore>> = vec![repo1, s3];
    let mut cluster = collect(&stores, &cluster(), now()).await;
    cluster.fleet = Some(FleetInfo {
        nodes: vec![NodeInfo {
            node: "db1".parse().unwrap(),
            connected: true,
            last_seen: Some(now()),
            role: Some("primary".to_owned()),
            timeline: Some(Timeline::FIRST),
            lsn: Some(Lsn::new(6 * MIB + 77).into()),
            archived_lsn: Some(Lsn::new(6 * MIB).into()),
            ready_files: Some(70),
            ready_oldest_seconds: None,
            road: Some("coordinator".to_owned()),
            stage: Some(1),
            compression_level: Some(1),
            agent_version: None,
            postgres_version: None,
            full_in_seconds: None,
            problems: Vec::new(),
        }],
        schedules: vec![ScheduleInfo {
            cron: "0 1 * * *".to_owned(),
            zone: "Europe/Berlin".to_owned(),
            source: "standby".to_owned(),
            backup_type: BackupType::Incr,
            next_run: Some("2026-11-24T00:00:00Z".parse().unwrap()),
            last_run: None,
        }],
        operations: Vec::new(),
    });
    insta::assert_snapshot!(render_text(&Info::new(now(), vec![cluster])));
}

/// Whether the old primary commits after the new timeline began at 01:00:`second`, or not any more.
async fn forked(second: u8) -> ClusterInfo {
    let (repo1, s3) = (create("repo1").await, create("s3").await);
    for number in 1..=6 {
        archive(&repo1, &segment(1, number), number as u8, None).await;
    }
    let begun = format!("2026-11-23T01:00:{second:02}Z").parse().unwrap();
    for store in [&repo1, &s3] {
        archive_at(store, "00000002.history", 0, None, begun).await;
        archive(store, &segment(2, 4), 4, None).await;
    }
    let stores: Vec<Arc<dyn ObjectStore>> = vec![repo1, s3];
    collect(&stores, &cluster(), now()).await
}

#[tokio::test]
async fn what_a_failover_lost_and_an_old_primary_that_still_runs_are_told() {
    let text = render_text(&Info::new(now(), vec![forked(30).await]));
    let lost = "  LEFT BEHIND 2.5 MiB (2621440 bytes) of timeline 1 from 0/480000, where 2 began, to 0/700000";
    assert!(text.lines().any(|line| line == lost), "{text}");
    assert!(!text.contains("OLD PRIMARY"), "{text}");
    let goes_on = forked(5).await;
    let left = &goes_on.left_behind[0];
    assert_eq!((left.bytes, left.last_segment.as_str()), (5 * MIB / 2, segment(1, 6).as_str()));
    assert_eq!(left.parent_written.map(|time| time.to_string()).as_deref(), Some("2026-11-23T01:00:06Z"));
    let text = render_text(&Info::new(now(), vec![goes_on]));
    let runs =
        "  OLD PRIMARY db1 still wrote timeline 1 at 2026-11-23 01:00:06+00; 2 began before 2026-11-23 01:00:05+00";
    assert!(text.lines().any(|line| line == runs), "{text}");
}

#[tokio::test]
async fn what_is_unknown_is_said() {
    let stores: Vec<Arc<dyn ObjectStore>> = vec![create("repo1").await];
    let empty = collect(&stores, &cluster(), now()).await;
    assert!(!empty.recovery.possible);
    assert!(empty.recovery.reason.as_deref().unwrap().starts_with("store repo1 holds no backup"));
    assert!(render_text(&Info::new(now(), Vec::new())).contains("no cluster"));
    let unknown = collect(&stores, &"other".parse().unwrap(), now()).await;
    assert!(unknown.systems.is_empty() && !unknown.recovery.possible);
}
