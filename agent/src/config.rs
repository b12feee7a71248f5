//! `agent.toml`: read once, checked, and resolved into settings.
//!
//! Invariants: unknown keys are refused with the line shown; every default is in this file; what cannot work together is
//! refused here, so that the other rooms never ask. The environment is not read: libpq's variables have their own room.
//! The sample in `packaging/etc/agent.toml` names every key with its default and is held against this file by a test.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use process::config::ConfigError;
use process::telemetry::LogFormat;
use process::tls::ClientTls;
use process::units::{Size, Span};
use repository::config::StoreConfig;
use repository::name::{ClusterName, NodeName};
use serde::Deserialize;

use crate::postgres::libpq::Overrides;
use crate::pressure::{Efforts, Means};
use crate::road::Patience;

/// Where the configuration lies unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/pgconvoy/agent.toml";
/// What `push_wait` must exceed the silence patience by: time to send a file by the direct road after diverting.
pub const FALLBACK_MARGIN: Duration = Duration::from_secs(30);
/// Most threads anybody may ask for.
const PARALLEL_MAX: usize = 64;
/// Range of zstd levels accepted.
const COMPRESSION_LEVELS: std::ops::RangeInclusive<i32> = 1..=19;
/// Smallest budget for compressed bodies: one incompressible 16 MiB segment does not fit, and goes to the spool.
const MEMORY_MIN: Size = Size::from_mib(4);
/// Most segments fetched ahead.
const PREFETCH_MAX: usize = 256;

/// Resolved settings of one agent.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of this node.
    pub node: NodeName,
    /// Fleet name of its cluster.
    pub cluster: ClusterName,
    /// PostgreSQL's data directory.
    pub data_directory: PathBuf,
    /// Where `pgconvoy-wal` and `pgconvoy` find us.
    pub socket: PathBuf,
    /// Way to the coordinator, when there is one.
    pub coordinator: Option<CoordinatorSettings>,
    /// How to reach the server, where libpq's own rules do not suffice.
    pub postgres: Overrides,
    /// The store of the direct road, when this node was given one.
    pub direct: Option<StoreConfig>,
    /// Patience of the road.
    pub road: Patience,
    /// Archiving.
    pub archive: ArchiveSettings,
    /// `restore_command`.
    pub fetch: FetchSettings,
    /// Files of our own.
    pub spool: SpoolSettings,
    /// Workers of a base backup; 0 leaves it to the backup.
    pub backup_parallel: usize,
    /// Bytes that a base backup reads a second at most; 0 is no limit.
    pub backup_bytes_per_second: u64,
    /// Where `/metrics` is served.
    pub metrics_listen: Option<SocketAddr>,
    /// Form of log lines.
    pub log_format: LogFormat,
}

/// Way to the coordinator.
#[derive(Debug, Clone)]
pub struct CoordinatorSettings {
    /// `https://host:port`, or `http://` on loopback.
    pub address: String,
    /// Certificates; always there for `https`.
    pub tls: Option<ClientTls>,
}

/// How WAL is archived.
#[derive(Debug, Clone)]
pub struct ArchiveSettings {
    /// Longest time one `push` waits.
    pub push_wait: Duration,
    /// How hard it works: zstd level and threads that read and compress.
    pub efforts: Efforts,
    /// Budget for compressed bodies in memory, in bytes.
    pub memory_bytes: u64,
}

/// How WAL is fetched.
#[derive(Debug, Clone)]
pub struct FetchSettings {
    /// Segments fetched ahead.
    pub prefetch: usize,
    /// How long an unknown answer is retried in archive recovery.
    pub wait: Duration,
}

/// Where our own files are.
#[derive(Debug, Clone)]
pub struct SpoolSettings {
    /// The directory; belongs to one agent.
    pub directory: PathBuf,
    /// Bound for retained copies, in bytes.
    pub max_size_bytes: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSettings {
    node: NodeName,
    cluster: ClusterName,
    data_directory: PathBuf,
    #[serde(default = "default_socket")]
    socket: PathBuf,
    #[serde(default)]
    log_format: LogFormat,
    coordinator: Option<RawCoordinator>,
    #[serde(default)]
    postgres: RawPostgres,
    direct: Option<StoreConfig>,
    #[serde(default)]
    road: RawRoad,
    #[serde(default)]
    archive: RawArchive,
    #[serde(default)]
    fetch: RawFetch,
    #[serde(default)]
    spool: RawSpool,
    #[serde(default)]
    backup: RawBackup,
    #[serde(default)]
    metrics: RawMetrics,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCoordinator {
    address: String,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPostgres {
    host: Option<String>,
    port: Option<u16>,
    user: Option<String>,
    dbname: Option<String>,
    service: Option<String>,
    passfile: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRoad {
    connect_patience: Span,
    silence_patience: Span,
    return_after: Span,
}

impl Default for RawRoad {
    fn default() -> Self {
        Self {
            connect_patience: Span::from_seconds(2),
            silence_patience: Span::from_seconds(20),
            return_after: Span::from_seconds(10),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawArchive {
    push_wait: Span,
    compression_level: Option<i32>,
    parallel: usize,
    memory: Size,
}

impl Default for RawArchive {
    fn default() -> Self {
        Self { push_wait: Span::from_seconds(60), compression_level: None, parallel: 0, memory: Size::from_mib(24) }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawFetch {
    prefetch: usize,
    wait: Span,
}

impl Default for RawFetch {
    fn default() -> Self {
        Self { prefetch: 8, wait: Span::from_seconds(300) }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawSpool {
    directory: PathBuf,
    max_size: Size,
}

impl Default for RawSpool {
    fn default() -> Self {
        Self { directory: "/var/lib/pgconvoy/agent".into(), max_size: Size::from_mib(4096) }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawBackup {
    parallel: usize,
    rate: Size,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawMetrics {
    listen: Option<SocketAddr>,
}

fn default_socket() -> PathBuf {
    crate::local::DEFAULT_SOCKET.into()
}

/// Reads and checks a configuration file.
///
/// # Errors
/// [`ConfigError`] with file and line, or with the keys that cannot work together.
pub fn load(path: &Path) -> Result<Settings, ConfigError> {
    resolve(process::config::load(path)?).map_err(|detail| ConfigError::invalid(path, detail))
}

/// As [`load`], from text; `path` only names it in errors.
///
/// # Errors
/// As [`load`].
pub fn parse(path: &Path, text: &str) -> Result<Settings, ConfigError> {
    resolve(process::config::parse(path, text)?).map_err(|detail| ConfigError::invalid(path, detail))
}

fn resolve(raw: RawSettings) -> Result<Settings, String> {
    for (key, path) in
        [("data_directory", &raw.data_directory), ("socket", &raw.socket), ("spool.directory", &raw.spool.directory)]
    {
        if !path.is_absolute() {
            return Err(format!("{key} must be an absolute path"));
        }
    }
    if raw.spool.directory.starts_with(&raw.data_directory) {
        return Err("spool.directory must not lie in data_directory, where base backups would copy it".into());
    }
    if raw.coordinator.is_none() && raw.direct.is_none() {
        return Err("neither [coordinator] nor [direct] is given; WAL would have nowhere to go".into());
    }
    let patience = Patience {
        connect: raw.road.connect_patience.duration(),
        silence: raw.road.silence_patience.duration(),
        return_after: raw.road.return_after.duration(),
    };
    Ok(Settings {
        archive: archive_settings(&raw.archive, patience)?,
        fetch: fetch_settings(&raw.fetch)?,
        coordinator: raw.coordinator.map(coordinator_settings).transpose()?,
        node: raw.node,
        cluster: raw.cluster,
        data_directory: raw.data_directory,
        socket: raw.socket,
        postgres: Overrides {
            host: raw.postgres.host,
            port: raw.postgres.port,
            user: raw.postgres.user,
            dbname: raw.postgres.dbname,
            service: raw.postgres.service,
            passfile: raw.postgres.passfile,
        },
        direct: raw.direct,
        road: patience,
        spool: SpoolSettings { directory: raw.spool.directory, max_size_bytes: raw.spool.max_size.bytes() },
        backup_parallel: raw.backup.parallel.min(PARALLEL_MAX),
        backup_bytes_per_second: raw.backup.rate.bytes(),
        metrics_listen: raw.metrics.listen,
        log_format: raw.log_format,
    })
}

fn archive_settings(raw: &RawArchive, patience: Patience) -> Result<ArchiveSettings, String> {
    let push_wait = raw.push_wait.duration();
    let needed = patience.silence + FALLBACK_MARGIN;
    if push_wait < needed {
        return Err(format!(
            "archive.push_wait is {} but must be at least road.silence_patience + {} s = {}, or archive_command fails \
             before the direct road had its chance",
            raw.push_wait,
            FALLBACK_MARGIN.as_secs(),
            Span::from_duration(needed)
        ));
    }
    if let Some(level) = raw.compression_level.filter(|level| !COMPRESSION_LEVELS.contains(level)) {
        return Err(format!(
            "archive.compression_level is {level} but must be {} to {}",
            COMPRESSION_LEVELS.start(),
            COMPRESSION_LEVELS.end()
        ));
    }
    if raw.parallel > PARALLEL_MAX {
        return Err(format!("archive.parallel is {} but must be at most {PARALLEL_MAX}", raw.parallel));
    }
    if raw.memory < MEMORY_MIN {
        return Err(format!("archive.memory is {} but must be at least {MEMORY_MIN}", raw.memory));
    }
    let efforts = Efforts::of(Means {
        compression_level: raw.compression_level,
        readers: Some(raw.parallel).filter(|parallel| *parallel > 0),
        memory_bytes: raw.memory.bytes(),
        cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
    });
    Ok(ArchiveSettings { push_wait, efforts, memory_bytes: raw.memory.bytes() })
}

fn fetch_settings(raw: &RawFetch) -> Result<FetchSettings, String> {
    if raw.prefetch > PREFETCH_MAX {
        return Err(format!("fetch.prefetch is {} but must be at most {PREFETCH_MAX}", raw.prefetch));
    }
    Ok(FetchSettings { prefetch: raw.prefetch, wait: raw.wait.duration() })
}

fn coordinator_settings(raw: RawCoordinator) -> Result<CoordinatorSettings, String> {
    let tls = match (raw.certificate, raw.key, raw.ca) {
        (Some(certificate), Some(key), Some(ca)) => Some(ClientTls { certificate, key, ca }),
        (None, None, None) => None,
        _ => return Err("coordinator.certificate, key and ca belong together; give all three or none".into()),
    };
    let plain = raw.address.strip_prefix("http://");
    match (plain, raw.address.starts_with("https://"), &tls) {
        (Some(authority), _, None) if is_loopback(authority) => {}
        (Some(_), _, None) => {
            return Err(
                "coordinator.address without TLS is for loopback only; use https:// with certificate, key and \
                        ca"
                .into(),
            );
        }
        (Some(_), _, Some(_)) => {
            return Err("coordinator.address must start with https:// when certificates are given".into());
        }
        (None, true, Some(_)) => {}
        (None, true, None) => {
            return Err("coordinator.address is https://, so certificate, key and ca are needed".into());
        }
        (None, false, _) => return Err("coordinator.address must look like https://repo1:8432".into()),
    }
    Ok(CoordinatorSettings { address: raw.address, tls })
}

/// Whether an authority (`host` or `host:port`) is this machine itself, where a connection without TLS is seen by nobody else.
pub fn is_loopback(authority: &str) -> bool {
    let authority = authority.trim_end_matches('/');
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = include_str!("../../packaging/etc/agent.toml");
    const SMALL: &str = "node = \"db1\"\ncluster = \"main\"\ndata_directory = \"/data\"\n\
                         [coordinator]\naddress = \"http://127.0.0.1:8432\"\n";

    fn read(text: &str) -> Result<Settings, String> {
        parse(Path::new("agent.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn three_lines_and_an_address_are_enough() {
        let settings = read(SMALL).unwrap();
        assert_eq!(settings.socket, Path::new("/run/pgconvoy/agent.sock"));
        assert_eq!(settings.archive.push_wait, Duration::from_secs(60));
        assert_eq!(settings.archive.memory_bytes, 24 << 20);
        assert_eq!(settings.road.silence, Duration::from_secs(20));
        assert_eq!(settings.fetch.prefetch, 8);
        assert!((1..=4).contains(&settings.archive.efforts.calm.readers));
        assert!(settings.direct.is_none());
    }

    #[test]
    fn the_sample_is_accepted_and_its_comments_are_the_defaults() {
        read(SAMPLE).unwrap();
        let uncommented: String = SAMPLE
            .lines()
            .map(|line| {
                line.strip_prefix("#").filter(|rest| rest.starts_with(|c: char| c == '[' || c.is_ascii_lowercase()))
            })
            .zip(SAMPLE.lines())
            .map(|(uncommented, line)| format!("{}\n", uncommented.unwrap_or(line)))
            .collect();
        let uncommented = uncommented.replace("http://127", "https://127");
        let all = read(&uncommented).unwrap_or_else(|error| panic!("{error}\n{uncommented}"));
        let few = read(SMALL).unwrap();
        // The sample's level is an example: without one it follows the backlog.
        assert_eq!(all.archive.efforts.calm, few.archive.efforts.calm);
        let without_level = uncommented.replace("compression_level = 3", "");
        assert_eq!(format!("{:?}", read(&without_level).unwrap().archive), format!("{:?}", few.archive));
        assert_eq!(format!("{:?}", all.road), format!("{:?}", few.road));
        assert_eq!(format!("{:?}", all.fetch), format!("{:?}", few.fetch));
        assert_eq!(format!("{:?}", all.spool), format!("{:?}", few.spool));
        assert_eq!(all.socket, few.socket);
        assert!(all.direct.is_some() && all.coordinator.unwrap().tls.is_some() && all.metrics_listen.is_some());
    }

    #[test]
    fn a_level_that_is_given_never_changes() {
        let levels = |more: &str| {
            let efforts = read(&format!("{SMALL}{more}")).unwrap().archive.efforts;
            (efforts.calm.compression_level, efforts.strained.compression_level)
        };
        assert_eq!(levels(""), (3, 1));
        assert_eq!(levels("[archive]\ncompression_level = 3\n"), (3, 3));
        assert_eq!(levels("[archive]\ncompression_level = 9\n"), (9, 9));
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let check = |text: String, part: &str| {
            let error = read(&text).unwrap_err();
            assert!(error.contains(part), "{part:?} not in {error}");
        };
        let with = |more: &str| format!("{SMALL}{more}");
        check(with("[archive]\npush_wait = \"49s\"\n"), "at least road.silence_patience");
        check(with("[road]\nsilence_patience = \"40s\"\n"), "70s");
        check(with("[archive]\ncompression_level = 22\n"), "1 to 19");
        check(with("[archive]\nmemory = \"1MiB\"\n"), "at least 4MiB");
        check(with("[archive]\nmemery = \"24MiB\"\n"), "did you mean `memory`?");
        check(with("[spool]\ndirectory = \"/data/spool\"\n"), "must not lie in data_directory");
        check(with("[spool]\ndirectory = \"spool\"\n"), "absolute path");
        check(with("certificate = \"/c.pem\"\n"), "belong together");
        check(SMALL.replace("127.0.0.1", "10.0.0.1"), "loopback only");
        check(SMALL.replace("http://127.0.0.1", "https://repo1"), "certificate, key and ca are needed");
        check(SMALL.replace("http://", ""), "must look like");
        check(SMALL.replace("\"main\"", "\"Main cluster\""), "line 2");
        check(SMALL.split("[coordinator]").next().unwrap().to_owned(), "nowhere to go");
        assert!(read(&SMALL.replace("127.0.0.1", "[::1]")).is_ok());
    }
}
