//! The live PostgreSQL server as the agent sees it: who it is, in which role, where its WAL stands, and the start and
//! stop of a base backup.
//!
//! [`Server`] is one of the project's two traits, so that promotion during a backup, a lost session or a foreign server
//! can be played without one. The real one is [`LocalServer`] in [`live`]. What is asked is small and the same for 14
//! to 18 (and a later server, as far as names stay).
//!
//! Invariants: a backup is started and stopped on one session that nothing else uses; every statement but the start of a
//! backup has a deadline; WAL file names are computed by us, never by the server (the answer on a segment boundary
//! changed in 17). This room decides nothing about backups and reads no file of the data directory but `postmaster.pid`.

pub mod libpq;
pub mod live;
mod tls;

use std::path::PathBuf;

use async_trait::async_trait;
use jiff::Timestamp;
use postgres_format::{FullTransactionId, Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline};
use repository::backup::manifest::Database;
use thiserror::Error;

pub use live::LocalServer;

/// Oldest major version served.
pub const MAJOR_MIN: u32 = 14;

/// What can go wrong between us and the server.
#[derive(Debug, Error)]
pub enum ServerError {
    /// No connection settings could be made.
    #[error("connection settings of the server cannot be resolved")]
    Settings(#[from] libpq::LibpqError),
    /// No session could be opened.
    #[error("no connection to the server at {place}")]
    Unreachable {
        /// Socket directory or host, with port.
        place: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server answered, and does not let us in.
    #[error("the server at {place} refuses the login of role {role} to database {database}")]
    LoginRefused {
        /// Socket directory or host, with port.
        place: String,
        /// Our role.
        role: String,
        /// The database.
        database: String,
        /// The server's own words.
        #[source]
        source: Box<tokio_postgres::error::DbError>,
    },
    /// A statement failed.
    #[error("the server refused to {what}")]
    Statement {
        /// What was asked, such as "start a backup".
        what: &'static str,
        /// Why.
        #[source]
        source: tokio_postgres::Error,
    },
    /// A statement gave no answer in time; whether it ran is unknown.
    #[error("the server did not answer in {seconds} s when asked to {what}")]
    Timeout {
        /// What was asked.
        what: &'static str,
        /// How long we waited.
        seconds: u64,
    },
    /// An answer made no sense.
    #[error("the server answered {got:?} when asked to {what}")]
    Answer {
        /// What was asked.
        what: &'static str,
        /// What came.
        got: String,
    },
    /// A setting is not visible to our role.
    #[error("setting {setting} is not visible to role {role}: grant it pg_read_all_settings")]
    Hidden {
        /// Name of the setting.
        setting: &'static str,
        /// Our role.
        role: String,
    },
    /// The server serves another data directory than the one the agent was given.
    #[error("the server at {place} serves {found}, this agent belongs to {expected}")]
    Foreign {
        /// Where we connected.
        place: String,
        /// Its data directory.
        found: String,
        /// Ours.
        expected: String,
    },
    /// Older than we understand.
    #[error("server version {version} is too old, {MAJOR_MIN} is the oldest supported major version")]
    TooOld {
        /// `server_version_num`.
        version: u32,
    },
    /// The session of a running backup ended, so the server has given the backup up.
    #[error("the session of the running backup was lost, the server has aborted the backup")]
    BackupSessionLost,
    /// A backup is running on this server already.
    #[error("a backup of this node is running already")]
    BackupRunning,
    /// No backup was started.
    #[error("no backup is running")]
    NoBackup,
    /// Only a primary can do this.
    #[error("the server is in recovery and cannot {what}")]
    InRecovery {
        /// What was asked.
        what: &'static str,
    },
}

/// What never changes while a data directory lives, and its versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// `server_version_num`, such as 150020.
    pub version: u32,
    /// Where the data lies, as the server says.
    pub data_directory: PathBuf,
    /// WAL segment size.
    pub segment_size: SegmentSize,
    /// True when pages carry checksums.
    pub data_checksums: bool,
}

impl Identity {
    /// Major version, such as 15.
    pub fn major(&self) -> u32 {
        self.version / 10_000
    }
}

/// Primary or standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Out of recovery, writes WAL.
    Primary,
    /// In recovery.
    Standby,
}

/// Where the server stands now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Primary or standby.
    pub role: Role,
    /// Timeline written (primary) or followed (standby).
    pub timeline: Timeline,
    /// End of WAL written (primary) or replayed (standby).
    pub lsn: Lsn,
    /// `full_page_writes` of this server; on a standby it says nothing about the primary.
    pub full_page_writes: bool,
    /// The same as long as no transaction that writes has begun or ended.
    pub transactions: i64,
    /// Of a primary: no commit lies beyond this position, if its last checkpoint shows that.
    pub committed_to: Option<Lsn>,
}

/// Settings that decide whether and how archiving and backups work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveSettings {
    /// `off`, `on` or `always`.
    pub archive_mode: String,
    /// Command of `archive_command`, may be empty.
    pub archive_command: String,
    /// `archive_library`, empty before 15.
    pub archive_library: String,
    /// `archive_timeout` in seconds, 0 is never.
    pub archive_timeout_seconds: u32,
    /// `wal_level`.
    pub wal_level: String,
    /// `full_page_writes` of this server; on a standby it says nothing about the primary.
    pub full_page_writes: bool,
    /// `summarize_wal`, off before 17.
    pub summarize_wal: bool,
    /// Configuration files, wherever they lie.
    pub configuration_files: Vec<ConfigurationFile>,
}

/// A configuration file the server reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigurationFile {
    /// The setting that names it: `config_file`, `hba_file`, `ident_file`, or `include` for a file that another includes.
    pub setting: &'static str,
    /// Its path.
    pub path: PathBuf,
}

/// One row of `pg_stat_archiver`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArchiverState {
    /// Files archived since the last reset.
    pub archived_count: u64,
    /// Failed attempts since the last reset.
    pub failed_count: u64,
    /// Last file archived.
    pub last_archived: Option<String>,
    /// Last file that failed.
    pub last_failed: Option<String>,
}

/// A tablespace outside the two built-in ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tablespace {
    /// Its object identifier, the name of the link in `pg_tblspc`.
    pub oid: u32,
    /// Its name.
    pub name: String,
    /// Where it lies; empty for one inside the data directory.
    pub location: PathBuf,
}

/// How the checkpoint at the start of a backup is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartCheckpoint {
    /// At once, as fast as the disks allow.
    Fast,
    /// Spread over the usual checkpoint time.
    Spread,
}

/// The server's answer to the start of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupStart {
    /// Redo location from which recovery of the backup begins.
    pub start_lsn: Lsn,
    /// Role when it started.
    pub role: Role,
    /// Timeline when it started.
    pub timeline: Timeline,
    /// Clock of the server's host at the start.
    pub started: Timestamp,
}

/// The server's answer to the stop of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupStop {
    /// WAL up to here makes the backup consistent.
    pub stop_lsn: Lsn,
    /// `backup_label`, byte for byte.
    pub backup_label: Vec<u8>,
    /// `tablespace_map`, byte for byte; empty without tablespaces.
    pub tablespace_map: Vec<u8>,
    /// Clock of the server's host at the stop.
    pub stopped: Timestamp,
    /// Of a primary: the id of a transaction that began after the stop, so that this one and all later ones end after it.
    /// Of a standby: the first id that its snapshot after the stop did not know; says nothing about when that one ended.
    /// `None` if the server did not say.
    pub next_xid: Option<FullTransactionId>,
    /// Of a standby: time of the newest commit or abort that it had replayed after the stop. `None` if it has replayed none
    /// since it was started, or did not say.
    pub last_commit: Option<Timestamp>,
    /// The databases right before the stop; empty if the server did not say, or has more than
    /// [`repository::backup::manifest::DATABASE_LIMIT`].
    pub databases: Vec<Database>,
}

/// Result of making a primary finish its segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalSwitch {
    /// WAL up to here is in segments that are finished now.
    pub lsn: Lsn,
    /// The last segment that must become archived.
    pub segment: SegmentName,
}

/// The live server of this node.
#[async_trait]
pub trait Server: Send + Sync + std::fmt::Debug + 'static {
    /// Who the server is; refuses one that serves another data directory than ours.
    async fn identity(&self) -> Result<Identity, ServerError>;
    /// Role, timeline and position.
    async fn position(&self) -> Result<Position, ServerError>;
    /// Archive settings and configuration files.
    async fn archive_settings(&self) -> Result<ArchiveSettings, ServerError>;
    /// `pg_stat_archiver`.
    async fn archiver_state(&self) -> Result<ArchiverState, ServerError>;
    /// Tablespaces other than `pg_default` and `pg_global`.
    async fn tablespaces(&self) -> Result<Vec<Tablespace>, ServerError>;
    /// Writes a record and finishes the current segment; only on a primary.
    async fn switch_wal(&self) -> Result<WalSwitch, ServerError>;

    /// Has a standby write what is dirty in its memory, as far as it has replayed a checkpoint since the last time
    /// (`CreateRestartPoint` in `src/backend/access/transam/xlog.c`).
    async fn restartpoint(&self) -> Result<(), ServerError>;
    /// Whether somebody has paused replay on a standby.
    async fn replay_paused(&self) -> Result<bool, ServerError>;

    /// Opens a session of its own and starts a backup on it. With [`StartCheckpoint::Spread`] the answer takes as long as
    /// a checkpoint. Dropping the future ends the session and with it the backup.
    async fn start_backup(&self, label: &str, checkpoint: StartCheckpoint) -> Result<BackupStart, ServerError>;
    /// Proves that the session of the running backup still is the one it was; call it every
    /// [`live::BACKUP_PING`].
    async fn check_backup(&self) -> Result<Position, ServerError>;
    /// Stops the backup without waiting for archiving, and closes its session.
    async fn stop_backup(&self) -> Result<BackupStop, ServerError>;
    /// Closes the session of a running backup, whereupon the server forgets it. Harmless without one.
    fn abandon_backup(&self);
}

/// The last segment that holds WAL before `end`, by our own arithmetic.
pub fn last_segment_before(timeline: Timeline, end: Lsn, size: SegmentSize) -> SegmentName {
    SegmentName::new(timeline, SegmentNumber::last_before(end, size), size)
}
