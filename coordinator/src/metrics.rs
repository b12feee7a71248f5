//! What the coordinator counts. Names follow `pgconvoy_<room>_<noun>_<unit>`; labels are store names and words of ours,
//! never a segment, LSN or backup.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use repository::name::StoreName;
use repository::root::SetBack;

use crate::soundness::Known;
use crate::stores::Stores;

/// A store's name as a label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByStore {
    store: String,
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
