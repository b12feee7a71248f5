//! What a scrape of the coordinator shows, and how large it gets.

use std::time::Duration;

use postgres_format::{SegmentSize, SystemIdentifier};
use process::telemetry::exposition;
use proto::convert::ServerIdentity;
use proto::fleet::Hello;

use super::*;
use crate::fleet::Heard;

const PAGE: &str = include_str!("../../../packaging/prometheus/METRICS.md");

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_795_000_000 + seconds).unwrap()
}

fn node(number: usize, connected: bool) -> NodeView {
    NodeView {
        cluster: format!("c{}", number % 300).parse().unwrap(),
        node: format!("n{number}").parse().unwrap(),
        hello: Hello::default(),
        server: ServerIdentity {
            system_identifier: SystemIdentifier::new(1),
            postgres_major: None,
            segment_size: SegmentSize::DEFAULT,
        },
        report: None,
        silence: Duration::ZERO,
        seen: at(number as i64),
        connected,
        heard: Heard::NotYet,
        rival: None,
    }
}

fn newest(cluster: &str, backup_type: &str) -> NewestBackup {
    NewestBackup {
        cluster: cluster.to_owned(),
        store: "nfs".to_owned(),
        backup_type: backup_type.to_owned(),
        newest: at(100),
        oldest: at(50),
        count: 7,
    }
}

/// Every family with a sample.
fn filled() -> (process::telemetry::Metrics, Metrics) {
    let registry = process::telemetry::Metrics::new("pgconvoy-coordinator", "1");
    let metrics = Metrics::default();
    registry.register(|registry| metrics.register(registry));
    let store: StoreName = "nfs".parse().unwrap();
    metrics.count_stored(&store, 10);
    for family in [
        &metrics.reconcile_copied,
        &metrics.reconcile_backups_copied,
        &metrics.retention_removed_backups,
        &metrics.retention_swept,
        &metrics.retention_swept_bytes,
    ] {
        family.get_or_create(&by(&store)).inc();
    }
    for family in [&metrics.store_missing, &metrics.store_set_back, &metrics.retention_locked, &metrics.verify_findings]
    {
        family.get_or_create(&by(&store)).set(0);
    }
    metrics.store_state.get_or_create(&ByStoreState { store: store.to_string(), state: "healthy" }).set(1);
    metrics.count_ended("done");
    metrics.set_nodes(vec![node(1, true), node(2, false)]);
    let types = ["full", "diff", "incr"].map(|backup_type| newest("main", backup_type));
    metrics.set_backups(&[("main".parse().unwrap(), 1)], &types);
    metrics.set_measured(at(0));
    (registry, metrics)
}

#[test]
fn every_metric_is_well_formed_and_told_on_the_page() {
    let (registry, _) = filled();
    let read = exposition::read(&registry.text()).unwrap();
    assert_eq!(read.names(), exposition::documented(PAGE, "## Coordinator"));
    let of_type = |name: &str| read.value(name, &[("cluster", "main"), ("store", "nfs"), ("type", "incr")]);
    assert_eq!(of_type("pgconvoy_backup_newest_timestamp_seconds"), Some(1_795_000_100.0));
    assert_eq!(of_type("pgconvoy_backup_kept"), Some(7.0));
    assert_eq!(read.value("pgconvoy_backup_running", &[("cluster", "main")]), Some(1.0));
    assert_eq!(read.value("pgconvoy_fleet_nodes", &[("state", "away")]), Some(1.0));
    assert_eq!(read.value("pgconvoy_node_connected", &[("cluster", "c2"), ("node", "n2")]), Some(0.0));
}

#[test]
fn many_nodes_are_counted_and_those_away_shown() {
    let (registry, metrics) = filled();
    let connected = |number: usize| number % 100 != 3;
    metrics.set_nodes((0..5000).map(|number| node(number, connected(number))).collect());
    let began = process::clock::Monotonic::now();
    let text = registry.text();
    let took = began.elapsed();
    let read = exposition::read(&text).unwrap();
    let nodes: Vec<_> = read.samples.iter().filter(|sample| sample.name == "pgconvoy_node_connected").collect();
    assert_eq!(nodes.len(), NODES_MAX);
    assert_eq!(nodes.iter().filter(|sample| sample.value == 0.0).count(), 50, "one that is away is not shown");
    assert_eq!(read.value("pgconvoy_fleet_nodes", &[("state", "connected")]), Some(4950.0));
    assert!(text.len() < 256 << 10, "{} bytes", text.len());
    assert!(took < Duration::from_secs(2), "{took:?} for a scrape");
}

#[test]
fn a_backup_that_is_gone_has_no_sample() {
    let (registry, metrics) = filled();
    metrics.set_backups(&[], &[newest("main", "full")]);
    let read = exposition::read(&registry.text()).unwrap();
    let left = read.samples.iter().filter(|sample| sample.name == "pgconvoy_backup_newest_timestamp_seconds");
    assert_eq!(left.count(), 1);
}
