//! What the coordinator counts. Names follow `pgconvoy_<room>_<noun>_<unit>`; labels are names of stores, clusters and nodes and
//! words of ours, never a segment, LSN or backup. Of nodes at most [`NODES_MAX`] are shown one by one, those that are away before
//! the others; all are counted.
//!
//! Each is told in `packaging/prometheus/METRICS.md`, which the packages ship; a test compares.

use std::cmp::Reverse;

use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use repository::name::{ClusterName, StoreName};
use repository::root::SetBack;

use crate::catalog::backups::NewestBackup;
use crate::sessions::NodeView;
use crate::soundness::Known;
use crate::stores::Stores;

/// A store's name as a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByStore {
    store: String,
}

/// Nodes shown one by one.
pub const NODES_MAX: usize = 1000;

/// A node as labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByNode {
    cluster: String,
    node: String,
}

/// A cluster as label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByCluster {
    cluster: String,
}

/// Where backups of a type lie, as labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByBackups {
    cluster: String,
    store: String,
    r#type: String,
}

/// A state as label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByState {
    state: &'static str,
}

/// A store and a state as labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByStoreState {
    store: String,
    state: &'static str,
}

/// How a backup or an operation ended, as a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByOutcome {
    outcome: &'static str,
}

/// The metrics. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// WAL files pushed through this coordinator that a store took.
    pub wal_stored: Family<ByStore, Counter>,
    /// Bytes of them as stored.
    pub wal_stored_bytes: Family<ByStore, Counter>,
    /// Pushes refused.
    pub wal_refused: Counter,
    /// Objects a store lacks.
    pub store_missing: Family<ByStore, Gauge>,
    /// 1 for the state a store is in.
    pub store_state: Family<ByStoreState, Gauge>,
    /// Clusters of which a store lost roots that were there.
    pub store_set_back: Family<ByStore, Gauge>,
    /// WAL files that were archived and are in no store any more.
    pub wal_lost: Gauge,
    /// Agents connected.
    pub sessions: Gauge,
    /// Nodes known, by whether they are connected.
    pub nodes: Family<ByState, Gauge>,
    /// 1 while the node's agent is connected.
    pub node_connected: Family<ByNode, Gauge>,
    /// Unix time when the node was last heard.
    pub node_seen: Family<ByNode, Gauge>,
    /// When the newest backup of a type in a store was stopped.
    pub backup_newest: Family<ByBackups, Gauge>,
    /// When the oldest one was.
    pub backup_oldest: Family<ByBackups, Gauge>,
    /// Backups of a type in a store.
    pub backups: Family<ByBackups, Gauge>,
    /// Backups that run.
    pub backups_running: Family<ByCluster, Gauge>,
    /// Unix time when a store last took WAL.
    pub wal_last_stored: Family<ByStore, Gauge>,
    /// Unix time when the gauges were last set.
    pub measured: Gauge,
    /// Operations that run.
    pub operations_running: Gauge,
    /// Operations ended.
    pub operations_ended: Family<ByOutcome, Counter>,
    /// Size of the catalog's files.
    pub catalog_bytes: Gauge,
    /// Objects found that came by the direct road.
    pub reconcile_adopted: Counter,
    /// Objects copied from store to store.
    pub reconcile_copied: Family<ByStore, Counter>,
    /// Backups copied from store to store.
    pub reconcile_backups_copied: Family<ByStore, Counter>,
    /// Objects found damaged.
    pub reconcile_damaged: Counter,
    /// Names found with two complete contents.
    pub wal_conflicts: Counter,
    /// Backups that retention let go of.
    pub retention_removed_backups: Family<ByStore, Counter>,
    /// Objects that were removed, because a root condemned them.
    pub retention_swept: Family<ByStore, Counter>,
    /// Bytes of those.
    pub retention_swept_bytes: Family<ByStore, Counter>,
    /// Condemned objects that a store keeps by a lock of its own.
    pub retention_locked: Family<ByStore, Gauge>,
    /// Unix time of the last complete pass over all stores.
    pub reconcile_last_pass: Gauge,
    /// Things known to be wrong in a store; `all` for what no store has.
    pub verify_findings: Family<ByStore, Gauge>,
    /// Backups known not to be restorable.
    pub verify_not_restorable: Gauge,
    /// Bytes read by the scrub.
    pub scrub_read_bytes: Counter,
    /// Unix time when the scrub last ended.
    pub scrub_last_night: Gauge,
}

impl Metrics {
    /// Registers everything.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("wal_stored_segments", "WAL files taken by a store", self.wal_stored.clone());
        registry.register_with_unit(
            "wal_stored",
            "Bytes of WAL taken by a store",
            Unit::Bytes,
            self.wal_stored_bytes.clone(),
        );
        registry.register("wal_refused_segments", "WAL files refused", self.wal_refused.clone());
        registry.register("wal_conflicts", "WAL names found with two complete contents", self.wal_conflicts.clone());
        registry.register("store_missing_objects", "WAL objects that a store lacks", self.store_missing.clone());
        registry.register("store_state", "1 for the state a store is in", self.store_state.clone());
        registry.register(
            "store_set_back_clusters",
            "Clusters of which a store was set back to an older copy",
            self.store_set_back.clone(),
        );
        registry.register(
            "wal_lost_segments",
            "WAL files that were archived and are in no store any more",
            self.wal_lost.clone(),
        );
        self.register_fleet(registry);
        registry.register("fleet_sessions", "Agents connected", self.sessions.clone());
        registry.register("operation_running", "Operations that run", self.operations_running.clone());
        registry.register("operation_ended", "Operations ended, by outcome", self.operations_ended.clone());
        registry.register_with_unit("catalog_size", "Size of the catalog", Unit::Bytes, self.catalog_bytes.clone());
        registry.register(
            "reconcile_adopted_objects",
            "WAL objects found that came by the direct road",
            self.reconcile_adopted.clone(),
        );
        registry.register("reconcile_copied_objects", "WAL objects copied into a store", self.reconcile_copied.clone());
        registry.register(
            "reconcile_copied_backups",
            "Backups copied into a store",
            self.reconcile_backups_copied.clone(),
        );
        registry.register("reconcile_damaged_objects", "Objects found damaged", self.reconcile_damaged.clone());
        registry.register(
            "retention_removed_backups",
            "Backups that retention let go of",
            self.retention_removed_backups.clone(),
        );
        registry.register("retention_swept_objects", "Condemned objects removed", self.retention_swept.clone());
        registry.register_with_unit(
            "retention_swept",
            "Bytes of condemned objects removed",
            Unit::Bytes,
            self.retention_swept_bytes.clone(),
        );
        registry.register(
            "retention_locked_objects",
            "Condemned objects that a store keeps by a lock of its own",
            self.retention_locked.clone(),
        );
        registry.register(
            "reconcile_last_pass_timestamp_seconds",
            "When all stores were last compared",
            self.reconcile_last_pass.clone(),
        );
        registry.register("verify_findings", "Things known to be wrong in a store", self.verify_findings.clone());
        registry.register(
            "verify_not_restorable_backups",
            "Backups known not to be restorable",
            self.verify_not_restorable.clone(),
        );
        registry.register_with_unit(
            "scrub_read",
            "Bytes read by the scrub",
            Unit::Bytes,
            self.scrub_read_bytes.clone(),
        );
        registry.register(
            "scrub_last_night_timestamp_seconds",
            "When the scrub last ended",
            self.scrub_last_night.clone(),
        );
    }

    fn register_fleet(&self, registry: &mut Registry) {
        registry.register("fleet_nodes", "Nodes known, by whether they are connected", self.nodes.clone());
        registry.register("node_connected", "1 while the node's agent is connected", self.node_connected.clone());
        registry.register("node_last_seen_timestamp_seconds", "When the node was last heard", self.node_seen.clone());
        registry.register(
            "backup_newest_timestamp_seconds",
            "When the newest backup of a type in a store was stopped",
            self.backup_newest.clone(),
        );
        registry.register(
            "backup_oldest_timestamp_seconds",
            "When the oldest backup of a type in a store was stopped",
            self.backup_oldest.clone(),
        );
        registry.register("backup_kept", "Backups of a type in a store", self.backups.clone());
        registry.register("backup_running", "Backups that run", self.backups_running.clone());
        registry.register(
            "wal_last_stored_timestamp_seconds",
            "When a store last took WAL that was pushed here",
            self.wal_last_stored.clone(),
        );
        registry.register(
            "coordinator_measured_timestamp_seconds",
            "When these numbers were last measured",
            self.measured.clone(),
        );
    }

    /// The nodes, those that are away first.
    pub fn set_nodes(&self, mut nodes: Vec<NodeView>) {
        let connected = nodes.iter().filter(|node| node.connected).count();
        for (state, count) in [("connected", connected), ("away", nodes.len() - connected)] {
            self.nodes.get_or_create(&ByState { state }).set(count as i64);
        }
        nodes.sort_by_key(|node| (node.connected, Reverse(node.seen)));
        self.node_connected.clear();
        self.node_seen.clear();
        for node in nodes.into_iter().take(NODES_MAX) {
            let labels = ByNode { cluster: node.cluster.to_string(), node: node.node.to_string() };
            self.node_connected.get_or_create(&labels).set(i64::from(node.connected));
            self.node_seen.get_or_create(&labels).set(node.seen.as_second());
        }
    }

    /// The backups of each cluster, and how many of them run. One that is in no store any more has no sample.
    pub fn set_backups(&self, clusters: &[(ClusterName, usize)], newest: &[NewestBackup]) {
        self.backups_running.clear();
        for (cluster, running) in clusters {
            let labels = ByCluster { cluster: cluster.to_string() };
            self.backups_running.get_or_create(&labels).set(*running as i64);
        }
        for family in [&self.backup_newest, &self.backup_oldest, &self.backups] {
            family.clear();
        }
        for one in newest {
            let labels =
                ByBackups { cluster: one.cluster.clone(), store: one.store.clone(), r#type: one.backup_type.clone() };
            self.backup_newest.get_or_create(&labels).set(one.newest.as_second());
            self.backup_oldest.get_or_create(&labels).set(one.oldest.as_second());
            self.backups.get_or_create(&labels).set(one.count.cast_signed());
        }
    }

    /// The gauges are as of now.
    pub fn set_measured(&self, now: Timestamp) {
        self.measured.set(now.as_second());
    }

    /// What is known to be wrong in the stores.
    pub fn set_soundness(&self, stores: &Stores, known: &[Known]) {
        let findings = || known.iter().flat_map(|known| &known.findings);
        for name in stores.names() {
            let count = findings().filter(|finding| finding.store.as_ref() == Some(&name)).count();
            self.verify_findings.get_or_create(&by(&name)).set(count as i64);
        }
        let pages: usize = known.iter().map(Known::wrong_pages).sum();
        let of_all = findings().filter(|finding| finding.store.is_none()).count() + pages;
        self.verify_findings.get_or_create(&ByStore { store: "all".to_owned() }).set(of_all as i64);
        self.verify_not_restorable.set(known.iter().map(|known| known.not_restorable.len() as i64).sum());
    }

    /// One stored WAL file.
    pub fn count_stored(&self, store: &StoreName, bytes: u64) {
        self.wal_stored.get_or_create(&by(store)).inc();
        self.wal_stored_bytes.get_or_create(&by(store)).inc_by(bytes);
        self.wal_last_stored.get_or_create(&by(store)).set(process::clock::now().as_second());
    }

    /// The state of every store, and what each lacks.
    pub fn set_stores(&self, stores: &Stores, missing: &[(StoreName, u64)]) {
        for slot in stores.all() {
            let now = slot.health().word();
            for state in ["healthy", "lagging", "refused", "full"] {
                let label = ByStoreState { store: slot.name().to_string(), state };
                self.store_state.get_or_create(&label).set(i64::from(state == now));
            }
            let lacks = missing.iter().find(|(store, _)| store == slot.name()).map_or(0, |(_, count)| *count);
            self.store_missing.get_or_create(&by(slot.name())).set(lacks.cast_signed());
        }
    }

    /// Which stores were set back.
    pub fn set_set_back(&self, stores: &Stores, set_back: &[SetBack]) {
        for name in stores.names() {
            let clusters = set_back.iter().filter(|one| one.store == name).count();
            self.store_set_back.get_or_create(&by(&name)).set(clusters as i64);
        }
    }

    /// One ended operation.
    pub fn count_ended(&self, outcome: &'static str) {
        self.operations_ended.get_or_create(&ByOutcome { outcome }).inc();
    }
}

/// The label of a store.
pub fn by(store: &StoreName) -> ByStore {
    ByStore { store: store.to_string() }
}

#[cfg(test)]
mod tests;
