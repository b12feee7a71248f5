//! Real PostgreSQL servers: initialised, configured, started, killed, promoted, copied.
//!
//! Each server has its own socket directory and listens on no TCP port, so any number of them live side by side.

pub mod installation;
pub mod sql;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

pub use self::installation::Installation;
use crate::account::{self, Scratch};
use crate::program::{self, Farewell, Running, Said, read_log};
use crate::wait;

/// Port in the socket's name; sockets of different servers lie in different directories.
pub const PORT: u16 = 5432;
/// Longest wait for a server to start or stop.
const SERVER_PATIENCE: Duration = Duration::from_secs(60);
/// Longest run of initdb, pg_basebackup and the like.
const TOOL_PATIENCE: Duration = Duration::from_secs(180);
/// How long a postmaster may take to end its children on drop.
const QUIT_PATIENCE: Duration = Duration::from_secs(5);

/// Settings of every server here: small, quick, and with WAL fit for archiving.
const BASE_SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", "''"),
    ("shared_buffers", "'32MB'"),
    ("max_connections", "30"),
    ("wal_level", "replica"),
    ("max_wal_senders", "6"),
    ("hot_standby", "on"),
    ("fsync", "off"),
    ("max_wal_size", "'256MB'"),
    ("log_min_messages", "'log'"),
    ("log_line_prefix", "'%m [%p] '"),
    ("logging_collector", "off"),
    ("timezone", "'UTC'"),
    ("log_timezone", "'UTC'"),
];

/// How a data directory is initialised.
#[derive(Debug, Clone, Copy)]
pub struct InitOptions {
    /// WAL segment size in MiB, a power of two from 1 to 1024.
    pub segment_mebibytes: u32,
    /// Whether pages carry checksums.
    pub checksums: Checksums,
    /// Major version of the server; `None`: the one that everything runs on that names none.
    pub major: Option<u32>,
}

impl Default for InitOptions {
    fn default() -> Self {
        Self { segment_mebibytes: 16, checksums: Checksums::On, major: None }
    }
}

/// Whether pages carry checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksums {
    /// They do.
    On,
    /// They do not.
    Off,
}

/// How a server is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Fast: clients are disconnected, a shutdown checkpoint is written.
    Fast,
    /// Immediate: as after a crash.
    Immediate,
}

/// How a start went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Started {
    /// The server accepts connections.
    Ready,
    /// The postmaster ended; its log says why.
    Ended,
}

/// A PostgreSQL data directory and, while it runs, its postmaster.
#[derive(Debug)]
pub struct Server {
    installation: Installation,
    name: String,
    data: PathBuf,
    socket_directory: PathBuf,
    log: PathBuf,
    postmaster: Option<Running>,
}

impl Server {
    /// A new, initialised, stopped server.
    pub fn init(scratch: &Scratch, name: &str, options: InitOptions) -> Result<Self> {
        let installation = match options.major {
            Some(major) => installation::of_major(major).with_context(|| format!("no PostgreSQL {major} is here"))?,
            None => installation::newest()?,
        };
        let server = Self::over(scratch, name, scratch.path().join(format!("{name}-data")), installation)?;
        let mut initdb = account::command(server.installation.program("initdb"));
        initdb
            .args(["--no-sync", "--locale=C", "--encoding=UTF8", "--auth=trust", "--username=postgres"])
            .arg(format!("--wal-segsize={}", options.segment_mebibytes))
            .arg("--pgdata")
            .arg(&server.data);
        if options.checksums == Checksums::On {
            initdb.arg("--data-checksums");
        } else if server.installation.major >= 18 {
            initdb.arg("--no-data-checksums");
        }
        program::run(initdb, TOOL_PATIENCE)?.ok().context("initdb")?;
        server.configure_base()?;
        Ok(server)
    }

    /// A server over a data directory that someone else fills (a restore). A directory that is filled says for which
    /// major version.
    pub fn at(scratch: &Scratch, name: &str, data: PathBuf) -> Result<Self> {
        let filled = fs::read_to_string(data.join("PG_VERSION")).ok().and_then(|text| text.trim().parse().ok());
        let installation = match filled {
            Some(major) => installation::of_major(major).with_context(|| format!("no PostgreSQL {major} is here"))?,
            None => installation::newest()?,
        };
        Self::over(scratch, name, data, installation)
    }

    fn over(scratch: &Scratch, name: &str, data: PathBuf, installation: &Installation) -> Result<Self> {
        Ok(Self {
            installation: installation.clone(),
            name: name.to_owned(),
            socket_directory: scratch.directory(&format!("{name}-run"))?,
            log: scratch.path().join(format!("{name}.log")),
            data,
            postmaster: None,
        })
    }

    /// A streaming standby of `self`, stopped, made by pg_basebackup.
    pub fn standby(&self, scratch: &Scratch, name: &str) -> Result<Self> {
        let standby = self.copy(scratch, name)?;
        standby.configure(&[("primary_conninfo", &format!("'{}'", self.conninfo()))])?;
        fs::write(standby.data.join("standby.signal"), "")?;
        account::give(&standby.data.join("standby.signal"))?;
        Ok(standby)
    }

    /// A copy of `self` made by pg_basebackup; started as it is, it recovers and becomes a primary of its own.
    pub fn copy(&self, scratch: &Scratch, name: &str) -> Result<Self> {
        self.copy_with(scratch, name, &[])
    }

    /// As [`Server::copy`], with options for pg_basebackup such as where tablespaces are to lie.
    pub fn copy_with(&self, scratch: &Scratch, name: &str, options: &[&str]) -> Result<Self> {
        let data = scratch.path().join(format!("{name}-data"));
        let copy = Self::over(scratch, name, data, &self.installation)?;
        let mut base = account::command(self.installation.program("pg_basebackup"));
        base.arg("--pgdata")
            .arg(&copy.data)
            .args(["--checkpoint=fast", "--wal-method=stream", "--no-sync"])
            .args(options);
        base.arg("--dbname").arg(self.conninfo());
        program::run(base, TOOL_PATIENCE)?.ok().context("pg_basebackup")?;
        copy.configure(&[("unix_socket_directories", &copy.quoted_socket_directory())])?;
        Ok(copy)
    }

    /// A copy of the stopped server's files: started, a second primary of the same timeline.
    pub fn twin(&self, scratch: &Scratch, name: &str) -> Result<Self> {
        let data = scratch.path().join(format!("{name}-data"));
        let twin = Self::over(scratch, name, data, &self.installation)?;
        let mut cp = account::command("/bin/cp");
        cp.arg("-a").arg(&self.data).arg(&twin.data);
        program::run(cp, TOOL_PATIENCE)?.ok().context("copy")?;
        twin.own_socket()?;
        Ok(twin)
    }

    /// Puts the base settings and the socket directory into the data directory.
    pub fn configure_base(&self) -> Result<()> {
        self.configure(BASE_SETTINGS)?;
        self.configure(&[("unix_socket_directories", &self.quoted_socket_directory()), ("port", &PORT.to_string())])
    }

    /// Makes a restored data directory use its own socket directory; nothing else is changed.
    pub fn own_socket(&self) -> Result<()> {
        self.configure(&[("unix_socket_directories", &self.quoted_socket_directory())])
    }

    /// Appends settings to postgresql.conf, values as they are written there; they win over earlier ones.
    pub fn configure(&self, settings: &[(&str, &str)]) -> Result<()> {
        let path = self.data.join("postgresql.conf");
        let mut text = fs::read_to_string(&path).unwrap_or_default();
        for (name, value) in settings {
            text.push_str(&format!("{name} = {value}\n"));
        }
        account::write_owned(&path, text)
    }

    fn quoted_socket_directory(&self) -> String {
        format!("'{}'", self.socket_directory.display())
    }

    /// Its name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The directory of its socket, to be used as `host`.
    pub fn host(&self) -> &Path {
        &self.socket_directory
    }

    /// The PostgreSQL it runs.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// Connection string for libpq.
    pub fn conninfo(&self) -> String {
        format!("host={} port={PORT} user=postgres dbname=postgres", self.socket_directory.display())
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        read_log(&self.log)
    }

    /// Starts it and waits until it accepts connections; fails with the end of its log when it does not come up.
    pub fn start(&mut self) -> Result<()> {
        match self.try_start(SERVER_PATIENCE)? {
            Started::Ready => Ok(()),
            Started::Ended => bail!("{} did not start:\n{}", self.name, tail(&self.log(), 30)),
        }
    }

    /// Starts it and waits until it accepts connections or has ended.
    pub fn try_start(&mut self, patience: Duration) -> Result<Started> {
        self.launch()?;
        wait::value(&format!("{} accepts connections or ends", self.name), patience, || {
            if !self.is_running() {
                return Ok(Some(Started::Ended));
            }
            Ok(sql::answers(self).then_some(Started::Ready))
        })
        .with_context(|| tail(&self.log(), 30))
    }

    /// Starts the postmaster without waiting for anything.
    pub fn launch(&mut self) -> Result<()> {
        let mut postgres = account::command(self.installation.program("postgres"));
        postgres.arg("-D").arg(&self.data).current_dir(&self.data);
        let farewell = Farewell::QuitThenKill(QUIT_PATIENCE);
        self.postmaster = Some(Running::start(&self.name, postgres, &self.log, farewell)?);
        Ok(())
    }

    /// Whether its postmaster is there.
    pub fn is_running(&mut self) -> bool {
        self.postmaster.as_mut().is_some_and(Running::is_running)
    }

    /// Stops it and waits until it is gone.
    pub fn stop(&mut self, how: Stop) -> Result<()> {
        let Some(mut postmaster) = self.postmaster.take() else { return Ok(()) };
        postmaster.signal(match how {
            Stop::Fast => Signal::INT,
            Stop::Immediate => Signal::QUIT,
        })?;
        postmaster.wait_ended(SERVER_PATIENCE)?;
        Ok(())
    }

    /// kill -9 of the postmaster; its children notice and end.
    pub fn kill(&mut self) -> Result<()> {
        let Some(mut postmaster) = self.postmaster.take() else { return Ok(()) };
        postmaster.kill()
    }

    /// Waits until the postmaster has ended by itself.
    pub fn wait_ended(&mut self, deadline: Duration) -> Result<()> {
        let Some(mut postmaster) = self.postmaster.take() else { return Ok(()) };
        let ended = postmaster.wait_ended(deadline);
        if ended.is_err() {
            self.postmaster = Some(postmaster);
        }
        ended.map(|_| ())
    }

    /// Rereads its settings.
    pub fn reload(&self) -> Result<()> {
        self.sql("select pg_reload_conf()").map(|_| ())
    }

    /// Asks a standby to become primary, without waiting.
    pub fn ask_promotion(&self) -> Result<()> {
        self.sql("select pg_promote(false)").map(|_| ())
    }

    /// Waits until the server is out of recovery.
    pub fn wait_promoted(&self, deadline: Duration) -> Result<Duration> {
        wait::until(&format!("{} is primary", self.name), deadline, || {
            Ok(self.text("select pg_is_in_recovery()")? == "f")
        })
        .with_context(|| tail(&self.log(), 20))
    }

    /// Runs one or several statements; rows of the last one that gave any, NULL as the empty text.
    pub fn sql(&self, statement: &str) -> Result<Vec<Vec<String>>> {
        sql::Session::open(self)?.rows(statement)
    }

    /// The first column of the first row.
    pub fn text(&self, statement: &str) -> Result<String> {
        sql::Session::open(self)?.text(statement)
    }

    /// The first column of the first row as a number.
    pub fn number(&self, statement: &str) -> Result<i64> {
        let text = self.text(statement)?;
        text.parse().with_context(|| format!("{statement}: {text:?} is not a number"))
    }

    /// Runs a program of the installation against this server, connection options added.
    pub fn tool(&self, program: &str, arguments: &[&str]) -> Result<Said> {
        program::run(self.tool_command(program, arguments), TOOL_PATIENCE)
    }

    /// The command that [`Server::tool`] runs, to be started in the background.
    pub fn tool_command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = account::command(self.installation.program(program));
        command.arg("-h").arg(&self.socket_directory).args(["-p", &PORT.to_string(), "-U", "postgres"]).args(arguments);
        command
    }

    /// Fills pgbench's tables.
    pub fn pgbench_init(&self, scale: u32) -> Result<()> {
        self.tool("pgbench", &["-i", "-q", "-s", &scale.to_string(), "postgres"])?
            .ok()
            .context("pgbench -i")
            .map(|_| ())
    }

    /// pgbench in the background until dropped; `rate` in transactions a second, 0 for as many as it can.
    pub fn pgbench(&self, rate: u32) -> Result<Running> {
        let mut arguments = vec!["-n".to_owned(), "-c".into(), "2".into(), "-j".into(), "1".into(), "-T".into()];
        arguments.push("3600".into());
        if rate > 0 {
            arguments.extend(["-R".into(), rate.to_string()]);
        }
        arguments.push("postgres".into());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let log = self.log.with_file_name(format!("{}-pgbench.log", self.name));
        Running::start("pgbench", self.tool_command("pgbench", &arguments), &log, Farewell::Kill)
    }

    /// About this many mebibytes of WAL a second in the background until dropped, without growing any table. Half of it
    /// does not compress.
    pub fn wal_load(&self, mebibytes_per_second: u32) -> Result<Running> {
        let script = self.log.with_file_name(format!("{}-load.sql", self.name));
        account::write_owned(
            &script,
            "select pg_logical_emit_message(true, 'load', repeat(md5(random()::text), 1024)
                 || string_agg(md5(random()::text), '')) from generate_series(1, 1024);\n",
        )?;
        let (rate, script) = ((mebibytes_per_second * 16).to_string(), script.display().to_string());
        let arguments = ["-n", "-c", "2", "-T", "3600", "-R", &rate, "-f", &script, "postgres"];
        let log = self.log.with_file_name(format!("{}-load.log", self.name));
        Running::start("load", self.tool_command("pgbench", &arguments), &log, Farewell::Kill)
    }

    /// Ends the current segment after writing a record into it; gives the name of the segment that became complete.
    pub fn switch_wal(&self) -> Result<String> {
        let name = self.text("select pg_walfile_name(pg_create_restore_point('switch'))")?;
        self.sql("select pg_switch_wal()")?;
        Ok(name)
    }

    /// System identifier.
    pub fn system_identifier(&self) -> Result<u64> {
        Ok(self.text("select system_identifier from pg_control_system()")?.parse()?)
    }

    /// `pg_stat_archiver.failed_count`.
    pub fn failed_count(&self) -> Result<i64> {
        self.number("select failed_count from pg_stat_archiver")
    }

    /// `pg_stat_archiver.archived_count`.
    pub fn archived_count(&self) -> Result<i64> {
        self.number("select archived_count from pg_stat_archiver")
    }

    /// Names waiting to be archived, in no order.
    pub fn ready_files(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.data.join("pg_wal/archive_status"))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some(name) = name.strip_suffix(".ready") {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Waits until at most `left` files wait to be archived.
    pub fn wait_archived(&self, left: usize, deadline: Duration) -> Result<Duration> {
        wait::until(&format!("at most {left} .ready files of {}", self.name), deadline, || {
            Ok(self.ready_files()?.len() <= left)
        })
        .with_context(|| tail(&self.log(), 10))
    }
}

/// The last `lines` lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
