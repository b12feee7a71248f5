//! [`LocalServer`]: the server behind [`Server`](super::Server), reached with the PostgreSQL protocol.
//!
//! One shared session for questions, opened when needed and reopened when closed; one session of its own for a backup,
//! with every timeout of the server switched off and TCP keepalives on, because its end aborts the backup
//! (`do_pg_abort_backup` in `src/backend/access/transam/xlog.c`). The backup's session is recognised by its process
//! number and the postmaster's start time.

mod around;

mod position;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use postgres_format::{Lsn, SegmentSize, SystemIdentifier};
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, NoTls, Row};
use tokio_postgres_rustls::MakeRustlsConnect;

use around::{databases, next_xid};

use self::position::position_on;
use super::libpq::{self, ConnectionSettings, Environment, Host, Overrides, ServerPlace, SslMode};
use super::{
    ArchiveSettings, ArchiverState, BackupStart, BackupStop, ConfigurationFile, Identity, MAJOR_MIN, Position, Role,
    Server, ServerError, StartCheckpoint, Tablespace, WalSwitch, last_segment_before, tls,
};

/// How often the session of a running backup is asked for a sign of life.
pub const BACKUP_PING: Duration = Duration::from_secs(10);
/// Longest wait for the answer to a question.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(20);
/// Longest wait for the checkpoint at the start of a backup: the largest `checkpoint_timeout` is a day.
const START_DEADLINE: Duration = Duration::from_secs(25 * 3600);
/// Longest wait for the stop of a backup; it writes and flushes one record and switches WAL.
const STOP_DEADLINE: Duration = Duration::from_secs(300);
/// Longest label taken, in bytes; the server's limit is 1024.
const LABEL_BYTES_MAX: usize = 400;
/// Idle time after which TCP asks whether the other side lives.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);

/// The server of one data directory.
#[derive(Debug)]
pub struct LocalServer {
    data_directory: PathBuf,
    overrides: Overrides,
    environment: Environment,
    shared: Mutex<Option<Arc<Session>>>,
    backup: Mutex<BackupSlot>,
}

/// Whether a backup runs, and on which session.
#[derive(Debug, Default)]
enum BackupSlot {
    #[default]
    Free,
    Starting,
    Running(Arc<PinnedSession>),
}

/// A session and the task that moves its bytes; dropping it closes both.
#[derive(Debug)]
struct Session {
    client: Client,
    role: String,
    connection: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The session of a backup and the marks by which it is recognised.
#[derive(Debug)]
struct PinnedSession {
    session: Session,
    marks: String,
    major: u32,
}

impl LocalServer {
    /// The server of `data_directory`; nothing is connected yet.
    pub fn new(data_directory: PathBuf, overrides: Overrides, environment: Environment) -> Self {
        Self { data_directory, overrides, environment, shared: Mutex::default(), backup: Mutex::default() }
    }

    async fn connect(&self) -> Result<Session, ServerError> {
        let settings = libpq::resolve(&self.overrides, &self.environment, &ServerPlace::of(&self.data_directory))?;
        let place = place_of(&settings);
        open(&settings).await.map_err(|source| not_let_in(&settings, place, source))
    }

    /// The shared session, opened anew when it has been closed.
    async fn session(&self) -> Result<Arc<Session>, ServerError> {
        if let Some(session) = self.lock_shared().as_ref().filter(|session| !session.client.is_closed()) {
            return Ok(session.clone());
        }
        let session = Arc::new(self.connect().await?);
        *self.lock_shared() = Some(session.clone());
        Ok(session)
    }

    fn lock_shared(&self) -> std::sync::MutexGuard<'_, Option<Arc<Session>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_backup(&self) -> std::sync::MutexGuard<'_, BackupSlot> {
        self.backup.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> Result<Arc<PinnedSession>, ServerError> {
        match &*self.lock_backup() {
            BackupSlot::Running(pinned) => Ok(pinned.clone()),
            BackupSlot::Free | BackupSlot::Starting => Err(ServerError::NoBackup),
        }
    }

    async fn identity_on(&self, session: &Session) -> Result<Identity, ServerError> {
        let names = ["server_version_num", "data_directory", "wal_segment_size", "data_checksums"];
        let settings = Settings::read(session, &names).await?;
        let version = settings.number("server_version_num")?;
        if version / 10_000 < MAJOR_MIN {
            return Err(ServerError::TooOld { version });
        }
        let data_directory = PathBuf::from(settings.text("data_directory")?);
        self.check_directory(&data_directory)?;
        let what = "tell its identity";
        let row = ask(session, what, "SELECT system_identifier::text FROM pg_control_system()", &[]).await?;
        let text: String = column(&row, 0, what)?;
        // pg_control_system() shows the unsigned number as a signed one.
        let number = text.parse::<i64>().map_err(|_| ServerError::Answer { what, got: text })?.cast_unsigned();
        let size = u64::from(settings.number("wal_segment_size")?);
        let segment_size =
            SegmentSize::from_bytes(size).map_err(|_| ServerError::Answer { what, got: size.to_string() })?;
        Ok(Identity {
            system_identifier: SystemIdentifier::new(number),
            version,
            data_directory,
            segment_size,
            data_checksums: settings.text("data_checksums")? == "on",
        })
    }

    /// The same directory by device and inode, so that links and bind mounts do not matter.
    fn check_directory(&self, served: &Path) -> Result<(), ServerError> {
        let mark = |path: &Path| std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
        if mark(served).is_some() && mark(served) == mark(&self.data_directory) {
            return Ok(());
        }
        let place = libpq::resolve(&self.overrides, &self.environment, &ServerPlace::of(&self.data_directory));
        Err(ServerError::Foreign {
            place: place.as_ref().map(place_of).unwrap_or_default(),
            found: served.display().to_string(),
            expected: self.data_directory.display().to_string(),
        })
    }

    async fn start_on(
        &self,
        session: Session,
        label: &str,
        checkpoint: StartCheckpoint,
    ) -> Result<(PinnedSession, BackupStart), ServerError> {
        let what = "start a backup";
        let identity = self.identity_on(&session).await?;
        quiet_session(&session, identity.major()).await?;
        let label = clean_label(label);
        let fast = checkpoint == StartCheckpoint::Fast;
        let statement = match identity.major() {
            14 => "SELECT pg_start_backup($1, $2, false)::text, clock_timestamp()::text",
            _ => "SELECT pg_backup_start($1, $2)::text, clock_timestamp()::text",
        };
        let row = ask_within(START_DEADLINE, &session, what, statement, &[&label, &fast]).await?;
        let start_lsn = lsn(&row, 0, what)?;
        let position = position_on(&session).await?;
        let started = time(&row, 1, what)?;
        let marks = marks_of(&session).await?;
        let pinned = PinnedSession { session, marks, major: identity.major() };
        Ok((pinned, BackupStart { start_lsn, role: position.role, timeline: position.timeline, started }))
    }
}

/// Frees the slot when the start of a backup fails or is given up.
struct StartingGuard<'a>(&'a LocalServer);

impl Drop for StartingGuard<'_> {
    fn drop(&mut self) {
        let mut slot = self.0.lock_backup();
        if matches!(*slot, BackupSlot::Starting) {
            *slot = BackupSlot::Free;
        }
    }
}

#[async_trait]
impl Server for LocalServer {
    async fn identity(&self) -> Result<Identity, ServerError> {
        let session = self.session().await?;
        self.identity_on(&session).await
    }

    async fn position(&self) -> Result<Position, ServerError> {
        let session = self.session().await?;
        position_on(&session).await
    }

    async fn archive_settings(&self) -> Result<ArchiveSettings, ServerError> {
        const FILES: [&str; 3] = ["config_file", "hba_file", "ident_file"];
        let session = self.session().await?;
        let names = [
            "archive_mode",
            "archive_command",
            "archive_library",
            "archive_timeout",
            "wal_level",
            "full_page_writes",
            "summarize_wal",
        ];
        let settings = Settings::read(&session, &[&names[..], &FILES[..]].concat()).await?;
        let mut configuration_files: Vec<ConfigurationFile> = Vec::with_capacity(FILES.len());
        for setting in FILES {
            let path = settings.text(setting)?;
            if !path.is_empty() {
                configuration_files.push(ConfigurationFile { setting, path: PathBuf::from(path) });
            }
        }
        let statement = "SELECT DISTINCT sourcefile FROM pg_settings WHERE sourcefile IS NOT NULL ORDER BY 1";
        let what = "list its configuration files";
        for row in within(STATEMENT_DEADLINE, what, session.client.query(statement, &[])).await? {
            let path = PathBuf::from(column::<String>(&row, 0, what)?);
            if configuration_files.iter().all(|known| known.path != path) {
                configuration_files.push(ConfigurationFile { setting: "include", path });
            }
        }
        Ok(ArchiveSettings {
            archive_mode: settings.text("archive_mode")?.to_owned(),
            archive_command: settings.text("archive_command")?.to_owned(),
            archive_library: settings.text("archive_library").unwrap_or_default().to_owned(),
            archive_timeout_seconds: settings.number("archive_timeout")?,
            wal_level: settings.text("wal_level")?.to_owned(),
            full_page_writes: settings.text("full_page_writes")? == "on",
            summarize_wal: settings.text("summarize_wal").is_ok_and(|value| value == "on"),
            configuration_files,
        })
    }

    async fn archiver_state(&self) -> Result<ArchiverState, ServerError> {
        let what = "tell the archiver's state";
        let session = self.session().await?;
        let statement = "SELECT archived_count, failed_count, last_archived_wal, last_failed_wal FROM pg_stat_archiver";
        let row = ask(&session, what, statement, &[]).await?;
        Ok(ArchiverState {
            archived_count: column::<i64>(&row, 0, what)?.cast_unsigned(),
            failed_count: column::<i64>(&row, 1, what)?.cast_unsigned(),
            last_archived: column(&row, 2, what)?,
            last_failed: column(&row, 3, what)?,
        })
    }

    async fn tablespaces(&self) -> Result<Vec<Tablespace>, ServerError> {
        let what = "list tablespaces";
        let session = self.session().await?;
        let statement = "SELECT oid, spcname::text, pg_tablespace_location(oid) FROM pg_tablespace WHERE oid NOT IN (1663, 1664) ORDER BY oid";
        let rows = within(STATEMENT_DEADLINE, what, session.client.query(statement, &[])).await?;
        rows.iter()
            .map(|row| {
                Ok(Tablespace {
                    oid: column(row, 0, what)?,
                    name: column(row, 1, what)?,
                    location: PathBuf::from(column::<String>(row, 2, what)?),
                })
            })
            .collect()
    }

    async fn switch_wal(&self) -> Result<WalSwitch, ServerError> {
        let what = "switch WAL";
        let session = self.session().await?;
        let before = position_on(&session).await?;
        if before.role == Role::Standby {
            return Err(ServerError::InRecovery { what });
        }
        let identity = self.identity_on(&session).await?;
        // Without a record in the current segment pg_switch_wal() does nothing.
        ask(&session, what, "SELECT pg_logical_emit_message(false, 'pgconvoy', 'switch')::text", &[]).await?;
        let row = ask(&session, what, "SELECT pg_switch_wal()::text", &[]).await?;
        let lsn = lsn(&row, 0, what)?;
        Ok(WalSwitch { lsn, segment: last_segment_before(before.timeline, lsn, identity.segment_size) })
    }

    async fn start_backup(&self, label: &str, checkpoint: StartCheckpoint) -> Result<BackupStart, ServerError> {
        {
            let mut slot = self.lock_backup();
            if !matches!(*slot, BackupSlot::Free) {
                return Err(ServerError::BackupRunning);
            }
            *slot = BackupSlot::Starting;
        }
        let _guard = StartingGuard(self);
        let session = self.connect().await?;
        let (pinned, start) = self.start_on(session, label, checkpoint).await?;
        *self.lock_backup() = BackupSlot::Running(Arc::new(pinned));
        Ok(start)
    }

    async fn check_backup(&self) -> Result<Position, ServerError> {
        let pinned = self.running()?;
        match marks_of(&pinned.session).await {
            Ok(marks) if marks == pinned.marks => position_on(&pinned.session).await,
            Ok(_) => Err(ServerError::BackupSessionLost),
            Err(_) if pinned.session.client.is_closed() => Err(ServerError::BackupSessionLost),
            Err(error) => Err(error),
        }
    }

    async fn stop_backup(&self) -> Result<BackupStop, ServerError> {
        let what = "stop the backup";
        let pinned = self.running()?;
        self.check_backup().await?;
        let call = if pinned.major == 14 { "pg_stop_backup(false, false)" } else { "pg_backup_stop(false)" };
        // In the database's own encoding, so that not one byte differs from what the server would write.
        let statement = format!(
            "SELECT lsn::text, convert_to(labelfile, getdatabaseencoding()), convert_to(coalesce(spcmapfile, ''), getdatabaseencoding()), \
             clock_timestamp()::text FROM {call}"
        );
        let databases = databases(&pinned.session).await.unwrap_or_default();
        let answer = ask_within(STOP_DEADLINE, &pinned.session, what, &statement, &[]).await;
        let (next_xid, last_commit) = match &answer {
            Ok(_) => (next_xid(&pinned.session).await, last_replayed_commit(&pinned.session).await),
            Err(_) => (None, None),
        };
        self.abandon_backup();
        let row = answer?;
        Ok(BackupStop {
            stop_lsn: lsn(&row, 0, what)?,
            backup_label: column(&row, 1, what)?,
            tablespace_map: column(&row, 2, what)?,
            stopped: time(&row, 3, what)?,
            next_xid,
            last_commit,
            databases,
        })
    }

    async fn restartpoint(&self) -> Result<(), ServerError> {
        self.make_restartpoint().await
    }

    async fn replay_paused(&self) -> Result<bool, ServerError> {
        self.is_replay_paused().await
    }

    fn abandon_backup(&self) {
        let mut slot = self.lock_backup();
        if matches!(*slot, BackupSlot::Running(_)) {
            *slot = BackupSlot::Free;
        }
    }
}

/// Values of server settings by name, in the unit of `pg_settings`.
struct Settings {
    role: String,
    rows: Vec<(String, String)>,
}

impl Settings {
    async fn read(session: &Session, names: &[&str]) -> Result<Self, ServerError> {
        let what = "show its settings";
        let statement = "SELECT name, setting FROM pg_settings WHERE name = ANY($1)";
        let rows = within(STATEMENT_DEADLINE, what, session.client.query(statement, &[&names])).await?;
        let rows = rows
            .iter()
            .map(|row| Ok((column(row, 0, what)?, column::<Option<String>>(row, 1, what)?.unwrap_or_default())));
        Ok(Self { role: session.role.clone(), rows: rows.collect::<Result<_, ServerError>>()? })
    }

    fn text(&self, name: &'static str) -> Result<&str, ServerError> {
        let found = self.rows.iter().find(|(found, _)| found == name);
        found
            .map(|(_, value)| value.as_str())
            .ok_or_else(|| ServerError::Hidden { setting: name, role: self.role.clone() })
    }

    fn number(&self, name: &'static str) -> Result<u32, ServerError> {
        let text = self.text(name)?;
        text.parse().map_err(|_| ServerError::Answer { what: "show its settings", got: text.to_owned() })
    }
}

/// Time of the newest commit or abort that a standby has replayed; without an answer it is not known.
async fn last_replayed_commit(session: &Session) -> Option<Timestamp> {
    let statement = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_xact_replay_timestamp() END::text";
    let row = ask(session, "tell the newest replayed commit", statement, &[]).await.ok()?;
    column::<Option<String>>(&row, 0, "tell the newest replayed commit").ok()??.parse().ok()
}

async fn marks_of(session: &Session) -> Result<String, ServerError> {
    let what = "prove that the backup's session lives";
    let row =
        ask(session, what, "SELECT pg_backend_pid()::text || ' ' || pg_postmaster_start_time()::text", &[]).await?;
    column(&row, 0, what)
}

/// No timeout of the server may end the session of a backup.
async fn quiet_session(session: &Session, major: u32) -> Result<(), ServerError> {
    let mut statements = "SET statement_timeout = 0; SET lock_timeout = 0; SET idle_session_timeout = 0; \
         SET idle_in_transaction_session_timeout = 0; SET client_encoding = 'UTF8'; SET timezone = 'UTC'; SET datestyle = 'ISO'"
        .to_owned();
    if major >= 17 {
        statements.push_str("; SET transaction_timeout = 0");
    }
    within(STATEMENT_DEADLINE, "switch timeouts off", session.client.batch_execute(&statements)).await
}

async fn ask(
    session: &Session,
    what: &'static str,
    statement: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Row, ServerError> {
    ask_within(STATEMENT_DEADLINE, session, what, statement, parameters).await
}

async fn ask_within(
    deadline: Duration,
    session: &Session,
    what: &'static str,
    statement: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Row, ServerError> {
    within(deadline, what, session.client.query_one(statement, parameters)).await
}

async fn within<T>(
    deadline: Duration,
    what: &'static str,
    answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, ServerError> {
    match tokio::time::timeout(deadline, answer).await {
        Ok(answer) => answer.map_err(|source| ServerError::Statement { what, source }),
        Err(_) => Err(ServerError::Timeout { what, seconds: deadline.as_secs() }),
    }
}

fn column<'row, T: tokio_postgres::types::FromSql<'row>>(
    row: &'row Row,
    index: usize,
    what: &'static str,
) -> Result<T, ServerError> {
    row.try_get(index).map_err(|source| ServerError::Statement { what, source })
}

fn lsn(row: &Row, index: usize, what: &'static str) -> Result<Lsn, ServerError> {
    let text: String = column(row, index, what)?;
    text.parse().map_err(|_| ServerError::Answer { what, got: text })
}

fn time(row: &Row, index: usize, what: &'static str) -> Result<Timestamp, ServerError> {
    let text: String = column(row, index, what)?;
    text.parse().map_err(|_| ServerError::Answer { what, got: text })
}

/// The label becomes one line of `backup_label`, which the server reads back with a fixed pattern.
fn clean_label(label: &str) -> String {
    let mut end = label.len().min(LABEL_BYTES_MAX);
    while !label.is_char_boundary(end) {
        end -= 1;
    }
    let cleaned: String =
        label[..end].chars().map(|character| if character.is_control() { ' ' } else { character }).collect();
    if cleaned.trim().is_empty() { "pgconvoy".to_owned() } else { cleaned }
}

fn place_of(settings: &ConnectionSettings) -> String {
    match &settings.host {
        Host::Socket(directory) => format!("{}, port {}", directory.display(), settings.port),
        Host::Name(name) => format!("{name}, port {}", settings.port),
    }
}

async fn open(settings: &ConnectionSettings) -> Result<Session, Box<dyn std::error::Error + Send + Sync>> {
    let mut config = Config::new();
    match &settings.host {
        Host::Socket(directory) => config.host_path(directory),
        Host::Name(name) => config.host(name),
    };
    config
        .port(settings.port)
        .user(&settings.user)
        .dbname(&settings.dbname)
        .application_name(&settings.application_name)
        .connect_timeout(settings.connect_timeout)
        .keepalives(true)
        .keepalives_idle(KEEPALIVE_IDLE)
        .ssl_mode(match settings.ssl_mode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => tokio_postgres::config::SslMode::Require,
        });
    if let Some(password) = &settings.password {
        config.password(&password.0);
    }
    if let Some(options) = &settings.options {
        config.options(options);
    }
    let (client, connection) = if settings.ssl_mode == SslMode::Disable {
        let (client, connection) = tokio::time::timeout(settings.connect_timeout, config.connect(NoTls)).await??;
        (client, spawn(connection))
    } else {
        let connector = MakeRustlsConnect::new(tls::client_config(settings)?);
        let (client, connection) = tokio::time::timeout(settings.connect_timeout, config.connect(connector)).await??;
        (client, spawn(connection))
    };
    Ok(Session { client, role: settings.user.clone(), connection })
}

/// A refusal in the server's own words is told apart from no answer at all; one that a server gives which starts, stops or
/// recovers, or has no session left, passes by itself.
fn not_let_in(
    settings: &ConnectionSettings,
    place: String,
    source: Box<dyn std::error::Error + Send + Sync>,
) -> ServerError {
    let said = source.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::as_db_error);
    let passing = [
        SqlState::CANNOT_CONNECT_NOW,
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::TOO_MANY_CONNECTIONS,
    ];
    match said {
        Some(said) if !passing.contains(said.code()) => ServerError::LoginRefused {
            place,
            role: settings.user.clone(),
            database: settings.dbname.clone(),
            source: Box::new(said.clone()),
        },
        _ => ServerError::Unreachable { place, source },
    }
}

/// Moves the bytes of a session until it ends; the [`Session`] owns and aborts it. Its error shows in the statement that
/// waits, so it is only traced here.
fn spawn(connection: impl Future<Output = Result<(), tokio_postgres::Error>> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "session with the server ended");
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn labels_become_one_line() {
        assert_eq!(["nightly\nrun\t1", " \n"].map(clean_label), ["nightly run 1", "pgconvoy"]);
        assert_eq!(clean_label(&"é".repeat(300)).len(), 400);
    }
}
