//! The coordinator's configuration: file, then checked settings.
//!
//! Without `[tls]` the coordinator listens on loopback only and refuses to start on anything else, because then whoever
//! reaches the port may archive and read everything. Nothing is read from the environment. A new option needs a reason
//! why a constant will not do; the constants stand at the rooms they govern.

mod retention;
mod scrub;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use process::config::ConfigError;
use process::telemetry::LogFormat;
use process::tls::ServerTls;
use process::units::{Size, Span};
use repository::backup::origin::BackupType;
use repository::config::{StoreConfig, StoreKind};
use repository::name::ClusterName;
use serde::Deserialize;

use crate::fleet::{ShapeWish, Source};
use crate::pace::{Pace, Paces};
use crate::schedule::Schedule;
use crate::stores::{Ack, Kind};

use retention::RawRetention;
use scrub::RawScrub;

pub use retention::Policies;

/// Where the packages put the file.
pub const DEFAULT_PATH: &str = "/etc/pgconvoy/coordinator.toml";

/// Most stores that may be configured.
const STORES_MAX: usize = 16;
/// Shortest and longest patience with a store.
const PATIENCE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(300);

/// The file as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default = "default_listen")]
    listen: SocketAddr,
    state_directory: PathBuf,
    #[serde(default = "default_patience")]
    store_patience: Span,
    #[serde(default)]
    ack: Ack,
    #[serde(default)]
    log: LogFormat,
    tls: Option<ServerTls>,
    #[serde(default)]
    store: Vec<StoreConfig>,
    #[serde(default)]
    cluster: Vec<RawCluster>,
    #[serde(default)]
    scrub: RawScrub,
    #[serde(default)]
    metrics: RawMetrics,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCluster {
    name: ClusterName,
    #[serde(default)]
    schedule: Vec<RawSchedule>,
    #[serde(default)]
    backup: RawBackup,
    retention: Option<RawRetention>,
}

/// The pace of a cluster's backups.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBackup {
    rate: Option<Size>,
    #[serde(default)]
    parallel: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSchedule {
    cron: String,
    #[serde(default = "default_zone")]
    zone: String,
    #[serde(default)]
    source: Source,
    #[serde(default)]
    shape: ShapeWish,
    #[serde(default = "default_type", rename = "type")]
    backup_type: BackupType,
    #[serde(default)]
    start_fast: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMetrics {
    listen: Option<SocketAddr>,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8432))
}

fn default_patience() -> Span {
    Span::from_seconds(10)
}

fn default_type() -> BackupType {
    BackupType::Incr
}

fn default_zone() -> String {
    "UTC".to_owned()
}

/// Checked settings.
#[derive(Debug)]
pub struct Settings {
    /// Where gRPC is served.
    pub listen: SocketAddr,
    /// Where catalog and temporary files lie.
    pub state_directory: PathBuf,
    /// How long a store may be silent.
    pub store_patience: Duration,
    /// When an object counts as archived.
    pub ack: Ack,
    /// How log lines look.
    pub log: LogFormat,
    /// Files for TLS; without them `listen` is loopback.
    pub tls: Option<ServerTls>,
    /// The stores, at least one.
    pub stores: Vec<StoreConfig>,
    /// Names of the clusters that the file names, in its order.
    pub clusters: Vec<ClusterName>,
    /// Schedules by cluster.
    pub schedules: Vec<ClusterSchedule>,
    /// How fast backups read that nothing else is said of, by cluster.
    pub paces: Paces,
    /// What is kept, by cluster and store.
    pub retention: Policies,
    /// When and how fast the repository is read part by part; never if absent.
    pub scrub: crate::scrub::Settings,
    /// Where `/metrics` is served, if anywhere.
    pub metrics_listen: Option<SocketAddr>,
}

/// One schedule of one cluster.
#[derive(Debug, Clone)]
pub struct ClusterSchedule {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// When.
    pub schedule: Schedule,
    /// Where.
    pub source: Source,
    /// How a standby's files are copied.
    pub shape: ShapeWish,
    /// What its backups may build on.
    pub backup_type: BackupType,
    /// Whether to request an immediate checkpoint.
    pub start_fast: bool,
}

/// Reads and checks a configuration file.
///
/// # Errors
/// See [`ConfigError`]; the message names the file and what to do.
pub fn load(path: &Path, now: Timestamp) -> Result<Settings, ConfigError> {
    resolve(process::config::load(path)?, path, now)
}

fn resolve(raw: Raw, path: &Path, now: Timestamp) -> Result<Settings, ConfigError> {
    let invalid = |text: String| ConfigError::invalid(path, text);
    if raw.tls.is_none() && !raw.listen.ip().is_loopback() {
        return Err(invalid(format!(
            "listen = \"{}\" is not a loopback address and there is no [tls]; give certificate, key and client_ca, or \
             listen on 127.0.0.1",
            raw.listen
        )));
    }
    if !raw.state_directory.is_absolute() {
        return Err(invalid("state_directory must be an absolute path".to_owned()));
    }
    if raw.store.is_empty() || raw.store.len() > STORES_MAX {
        return Err(invalid(format!("expected 1 to {STORES_MAX} [[store]] tables, found {}", raw.store.len())));
    }
    let mut names = BTreeSet::new();
    if let Some(twice) = raw.store.iter().find(|store| !names.insert(store.name.as_str())) {
        return Err(invalid(format!("store \"{}\" is given twice", twice.name)));
    }
    let patience = raw.store_patience.duration();
    if !PATIENCE.contains(&patience) {
        return Err(invalid(format!("store_patience is {} but must be from 1s to 300s", raw.store_patience)));
    }
    let OfClusters { names: clusters, schedules, paces, retention } = clusters(raw.cluster, &raw.store, path, now)?;
    Ok(Settings {
        listen: raw.listen,
        state_directory: raw.state_directory,
        store_patience: patience,
        ack: raw.ack,
        log: raw.log,
        tls: raw.tls,
        stores: raw.store,
        clusters,
        schedules,
        paces,
        retention,
        scrub: raw.scrub.resolve(now).map_err(invalid)?,
        metrics_listen: raw.metrics.listen,
    })
}

/// What the file says of clusters: their names, when and how fast their backups are taken, and what of those is kept.
#[derive(Default)]
struct OfClusters {
    names: Vec<ClusterName>,
    schedules: Vec<ClusterSchedule>,
    paces: Paces,
    retention: Policies,
}

fn clusters(
    clusters: Vec<RawCluster>,
    stores: &[StoreConfig],
    path: &Path,
    now: Timestamp,
) -> Result<OfClusters, ConfigError> {
    let OfClusters { mut names, schedules: mut found, mut paces, mut retention } = OfClusters::default();
    for cluster in clusters {
        if names.contains(&cluster.name) {
            return Err(ConfigError::invalid(path, format!("cluster \"{}\" is given twice", cluster.name)));
        }
        names.push(cluster.name.clone());
        let RawBackup { rate, parallel } = cluster.backup;
        paces.insert(cluster.name.clone(), Pace { bytes_per_second: rate.map(Size::bytes), parallel });
        if let Some(raw) = cluster.retention {
            retention.add(&cluster.name, raw, stores).map_err(|text| ConfigError::invalid(path, text))?;
        }
        for raw in cluster.schedule {
            let schedule = Schedule::new(&raw.cron, &raw.zone, now)
                .map_err(|error| ConfigError::invalid(path, format!("cluster \"{}\": {error}", cluster.name)))?;
            let RawSchedule { source, shape, backup_type, start_fast, .. } = raw;
            found.push(ClusterSchedule {
                cluster: cluster.name.clone(),
                schedule,
                source,
                shape,
                backup_type,
                start_fast,
            });
        }
    }
    Ok(OfClusters { names, schedules: found, paces, retention })
}

/// What a configured store is.
pub fn kind(store: &StoreConfig) -> Kind {
    match &store.kind {
        StoreKind::Directory(directory) => Kind::Directory { full_percent: directory.full_percent },
        StoreKind::S3(_) => Kind::S3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "state_directory = \"/var/lib/pgconvoy\"\n";
    const STORE: &str = "[[store]]\nname = \"repo1\"\nkind = \"directory\"\npath = \"/srv/repo1\"\n";

    pub(super) fn read(text: &str) -> Result<Settings, String> {
        let path = Path::new("/etc/pgconvoy/coordinator.toml");
        let now = "2026-11-23T00:00:00Z".parse().unwrap();
        process::config::parse(path, text).and_then(|raw| resolve(raw, path, now)).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_loopback_and_all_stores() {
        let settings = read(&format!("{MINIMAL}{STORE}")).unwrap();
        assert_eq!(settings.listen.to_string(), "127.0.0.1:8432");
        assert_eq!((settings.ack, settings.store_patience), (Ack::All, Duration::from_secs(10)));
        assert_eq!(kind(&settings.stores[0]), Kind::Directory { full_percent: 85 });
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_what_to_do() {
        let check = |head: &str, tail: &str, part: &str| {
            let error = read(&format!("{MINIMAL}{head}\n{STORE}{tail}")).unwrap_err();
            assert!(error.contains(part), "{part} in {error}");
        };
        check("listen = \"0.0.0.0:8432\"", "", "[tls]");
        check("listen = \"[::]:8432\"", "", "client_ca");
        check("store_patiense = \"1s\"", "", "did you mean `store_patience`");
        check("store_patience = \"0\"", "", "store_patience");
        check("ack = \"most\"", "", "ack");
        check("", STORE, "repo1\" is given twice");
        check("", "[[cluster]]\nname = \"a\"\n[[cluster]]\nname = \"a\"\n", "given twice");
        check("", "[[cluster]]\nname = \"a\"\n[[cluster.schedule]]\ncron = \"x\"\n", "cron expression");
        check("", "[[cluster]]\nname = \"A B\"\n", "cluster name");
        assert!(read(MINIMAL).unwrap_err().contains("[[store]]"));
    }

    #[test]
    fn with_certificates_any_address_is_taken() {
        let tls = "[tls]\ncertificate = \"/a\"\nkey = \"/b\"\nclient_ca = \"/c\"\n";
        let settings = read(&format!("{MINIMAL}listen = \"0.0.0.0:8432\"\n{tls}{STORE}")).unwrap();
        assert!(settings.tls.is_some());
    }

    #[test]
    fn the_sample_is_accepted_and_shows_every_key() {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/etc/coordinator.toml"));
        let text = std::fs::read_to_string(path).unwrap();
        let settings = read(&text).unwrap();
        assert_eq!(settings.stores.len(), 1);
        // With every commented setting switched on it must still be a configuration.
        let switched_on: String =
            text.lines().map(|line| format!("{}\n", line.strip_prefix("#! ").unwrap_or(line))).collect();
        let settings = read(&switched_on).unwrap();
        assert!(settings.tls.is_some() && settings.metrics_listen.is_some());
        assert_eq!((settings.stores.len(), settings.schedules.len()), (2, 1));
        let keys = [
            "listen",
            "state_directory",
            "store_patience",
            "ack",
            "log",
            "certificate",
            "key",
            "client_ca",
            "full_percent",
            "endpoint",
            "region",
            "bucket",
            "prefix",
            "path_style",
            "access_key_id",
            "secret_access_key_file",
            "ca_file",
            "checksums",
            "cron",
            "zone",
            "source",
            "shape",
            "type",
            "start_fast",
            "rate",
            "everything",
            "full",
            "backups",
            "age",
            "daily",
            "weekly",
            "monthly",
            "yearly",
            "window",
        ];
        for key in keys {
            assert!(text.contains(&format!("{key} = ")), "the sample does not show {key}");
        }
    }
}
