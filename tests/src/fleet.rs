//! Our own processes as an installation has them: a coordinator with its stores, agents with their sockets, the
//! operator's command, each with a configuration file in the scratch directory.
//!
//! Ports lie below the kernel's range for outgoing connections, so that nobody takes a killed coordinator's port before
//! it is started again.

mod daemon;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rand::Rng;

use crate::account::{self, Program, Scratch};
use crate::certificates::Papers;
use crate::postgres::{self, Server};
use crate::program::{self, Running, Said};
use daemon::{CrashPoint, Daemon};

/// Ports to choose from.
const PORTS: std::ops::Range<u16> = 15_000..32_000;
/// Longest run of one operator's command.
const COMMAND_PATIENCE: Duration = Duration::from_secs(180);

/// What a daemon shows at `/metrics`.
pub fn scrape(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, text) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    Ok(text.to_owned())
}

/// A free TCP port on loopback.
pub fn free_address() -> Result<SocketAddr> {
    for _ in 0..100 {
        let address = SocketAddr::from(([127, 0, 0, 1], rand::rng().random_range(PORTS)));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no free port in {PORTS:?}")
}

/// An S3 bucket, or a prefix in one, as configurations name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Where the service listens; a proxy's address when the link can be broken.
    pub endpoint: String,
    /// Region of signatures.
    pub region: String,
    /// Its name.
    pub bucket: String,
    /// Keys of this repository start with it; no slash at its ends.
    pub prefix: String,
    /// Access key.
    pub access_key_id: String,
    /// Secret key.
    pub secret_access_key: String,
}

impl Bucket {
    /// The same bucket by another way, such as a proxy.
    pub fn through(&self, address: SocketAddr) -> Self {
        Self { endpoint: format!("http://{address}"), ..self.clone() }
    }

    fn toml(&self) -> String {
        format!(
            "kind = \"s3\"\nendpoint = \"{}\"\nregion = \"{}\"\nbucket = \"{}\"\nprefix = \"{}\"\npath_style = true\n\
             access_key_id = \"{}\"\nsecret_access_key = \"{}\"\n",
            self.endpoint, self.region, self.bucket, self.prefix, self.access_key_id, self.secret_access_key
        )
    }
}

/// A store as a configuration lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// Further lines of its table.
    pub settings: String,
}

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A directory.
    Directory(PathBuf),
    /// A bucket.
    S3(Bucket),
}

impl Store {
    /// A directory store that is full when its file system is: how full the machine that runs tests is, proves nothing.
    pub fn directory(name: &str, path: &Path) -> Self {
        let settings = "full_percent = 100\n".to_owned();
        Self { name: name.to_owned(), place: Place::Directory(path.to_owned()), settings }
    }

    /// A bucket store.
    pub fn s3(name: &str, bucket: Bucket) -> Self {
        Self { name: name.to_owned(), place: Place::S3(bucket), settings: String::new() }
    }

    pub(crate) fn toml_body(&self) -> String {
        let place = match &self.place {
            Place::Directory(path) => format!("kind = \"directory\"\npath = \"{}\"\n", path.display()),
            Place::S3(bucket) => bucket.toml(),
        };
        format!("name = \"{}\"\n{place}{}", self.name, self.settings)
    }

    /// As an entry of `[[store]]`.
    pub fn toml(&self) -> String {
        format!("[[store]]\n{}", self.toml_body())
    }
}

/// How a coordinator is set up.
#[derive(Debug, Clone)]
pub struct CoordinatorSetup {
    /// Its stores, in order.
    pub stores: Vec<Store>,
    /// Silence after which a store is lagging, in seconds.
    pub store_patience_seconds: u32,
    /// Further lines for the top of the file.
    pub settings: String,
    /// Further tables for the end of the file.
    pub tables: String,
}

impl CoordinatorSetup {
    /// A coordinator over these stores with defaults, except that stores are given up on after three seconds.
    pub fn over(stores: &[Store]) -> Self {
        Self { stores: stores.to_vec(), store_patience_seconds: 3, settings: String::new(), tables: String::new() }
    }
}

/// A coordinator that may be running.
#[derive(Debug)]
pub struct Coordinator {
    address: SocketAddr,
    metrics: SocketAddr,
    state: PathBuf,
    daemon: Daemon,
}

impl Coordinator {
    /// Writes its configuration; does not start it.
    pub fn set_up(scratch: &Scratch, name: &str, setup: &CoordinatorSetup) -> Result<Self> {
        let file = |end: &str| scratch.path().join(format!("{name}.{end}"));
        let coordinator = Self {
            address: free_address()?,
            metrics: free_address()?,
            state: scratch.directory(&format!("{name}-state"))?,
            daemon: Daemon::new(name.to_owned(), Program::Coordinator, file("toml"), file("log")),
        };
        coordinator.configure(setup)?;
        Ok(coordinator)
    }

    /// Rewrites its configuration; takes effect at the next start.
    pub fn configure(&self, setup: &CoordinatorSetup) -> Result<()> {
        let mut text = format!(
            "listen = \"{}\"\nstate_directory = \"{}\"\nstore_patience = \"{}s\"\n{}\n",
            self.address,
            self.state.display(),
            setup.store_patience_seconds,
            setup.settings
        );
        for store in &setup.stores {
            text.push_str(&store.toml());
            text.push('\n');
        }
        text.push_str(&setup.tables);
        text.push_str(&format!("\n[metrics]\nlisten = \"{}\"\n", self.metrics));
        account::write_owned(self.config(), text)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where its metrics are.
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics
    }

    /// Its state directory, which holds the catalog.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.daemon.config
    }

    /// Its log file.
    pub fn log_path(&self) -> &Path {
        &self.daemon.log
    }

    /// Starts it and waits until it listens.
    pub fn start(&mut self) -> Result<()> {
        self.start_with(CrashPoint::None)
    }

    /// Starts it with an armed crash point, `NAME` or `NAME:N`.
    pub fn start_crashing_at(&mut self, point: &str) -> Result<()> {
        self.start_with(CrashPoint::At(point))
    }

    /// Starts it so that it stops itself at a point, `NAME` or `NAME:N`, until it is let go on.
    pub fn start_stopping_at(&mut self, point: &str) -> Result<()> {
        self.start_with(CrashPoint::StopAt(point))
    }

    fn start_with(&mut self, crash: CrashPoint<'_>) -> Result<()> {
        let address = self.address;
        self.daemon.start(crash, || TcpStream::connect(address).is_ok())
    }

    /// Starts it and waits until it has ended by itself, for configurations it must refuse; gives exit code and log.
    pub fn start_refused(&mut self, deadline: Duration) -> Result<Said> {
        program::run(self.daemon.command()?, deadline)
    }

    /// Has its clock run so many seconds ahead of the host's from the next start on; below zero, behind.
    pub fn shift_clock(&mut self, seconds: i64) {
        self.daemon.clock_shift = seconds;
    }

    /// The running process.
    pub fn process(&mut self) -> Result<&mut Running> {
        self.daemon.process()
    }

    /// Whether it is there.
    pub fn is_running(&mut self) -> bool {
        self.daemon.is_running()
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill()
    }

    /// SIGTERM and a clean end.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.stop()
    }

    /// Throws its whole state away; it must be stopped.
    pub fn delete_state(&mut self) -> Result<()> {
        if self.is_running() {
            bail!("{} runs", self.daemon.name);
        }
        fs::remove_dir_all(&self.state)?;
        fs::create_dir(&self.state)?;
        account::give(&self.state)
    }
}

/// The `[coordinator]` table of a caller.
fn coordinator_table(address: SocketAddr, papers: Option<&Papers>) -> String {
    match papers {
        None => format!("[coordinator]\naddress = \"http://{address}\"\n"),
        Some(papers) => format!("[coordinator]\naddress = \"https://{address}\"\n{}", papers.caller_toml()),
    }
}

/// How an agent is set up.
#[derive(Debug, Clone)]
pub struct AgentSetup {
    /// Fleet name of its cluster.
    pub cluster: String,
    /// Where it finds the coordinator.
    pub coordinator: SocketAddr,
    /// Its direct road, if it has one: the store as the coordinator calls it too.
    pub direct: Option<Store>,
    /// Tables for the end of the file, such as `[road]` or `[archive]`.
    pub tables: String,
    /// Further lines for the top of the file.
    pub settings: String,
    /// What it shows a coordinator that speaks TLS; without it, it speaks none.
    pub papers: Option<Papers>,
}

impl AgentSetup {
    /// An agent of `cluster` with defaults and no direct road.
    pub fn of(cluster: &str, coordinator: SocketAddr) -> Self {
        Self {
            cluster: cluster.to_owned(),
            coordinator,
            direct: None,
            tables: String::new(),
            settings: String::new(),
            papers: None,
        }
    }
}

/// An agent that may be running.
#[derive(Debug)]
pub struct Agent {
    node: String,
    metrics: SocketAddr,
    socket: PathBuf,
    spool: PathBuf,
    daemon: Daemon,
}

impl Agent {
    /// Writes the configuration of the agent of `server`; does not start it.
    pub fn set_up(scratch: &Scratch, server: &Server, setup: &AgentSetup) -> Result<Self> {
        let node = server.name().to_owned();
        let file = |end: &str| scratch.path().join(format!("{node}-agent.{end}"));
        let agent = Self {
            metrics: free_address()?,
            socket: scratch.directory(&format!("{node}-agent"))?.join("agent.sock"),
            spool: scratch.directory(&format!("{node}-spool"))?,
            daemon: Daemon::new(format!("agent of {node}"), Program::Agent, file("toml"), file("log")),
            node,
        };
        agent.configure(server, setup)?;
        Ok(agent)
    }

    /// Rewrites its configuration; takes effect at the next start.
    pub fn configure(&self, server: &Server, setup: &AgentSetup) -> Result<()> {
        let mut text = format!(
            "node = \"{}\"\ncluster = \"{}\"\ndata_directory = \"{}\"\nsocket = \"{}\"\n{}\n\
             {}\n\
             [postgres]\nhost = \"{}\"\nport = {}\nuser = \"postgres\"\ndbname = \"postgres\"\n\n\
             [spool]\ndirectory = \"{}\"\n\n[metrics]\nlisten = \"{}\"\n\n",
            self.node,
            setup.cluster,
            server.data().display(),
            self.socket.display(),
            setup.settings,
            coordinator_table(setup.coordinator, setup.papers.as_ref()),
            server.host().display(),
            postgres::PORT,
            self.spool.display(),
            self.metrics
        );
        if let Some(direct) = &setup.direct {
            text.push_str(&format!("[direct]\n{}\n", direct.toml_body()));
        }
        text.push_str(&setup.tables);
        account::write_owned(self.config(), text)
    }

    /// Its name, which is its server's.
    pub fn name(&self) -> &str {
        &self.node
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.daemon.config
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its spool directory.
    pub fn spool(&self) -> &Path {
        &self.spool
    }

    /// Its log file.
    pub fn log_path(&self) -> &Path {
        &self.daemon.log
    }

    /// Where its metrics are.
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics
    }

    /// Starts it and waits until its socket answers.
    pub fn start(&mut self) -> Result<()> {
        self.start_with(CrashPoint::None)
    }

    /// Starts it with an armed crash point, `NAME` or `NAME:N`.
    pub fn start_crashing_at(&mut self, point: &str) -> Result<()> {
        self.start_with(CrashPoint::At(point))
    }

    /// Starts it so that it stops itself at a point, `NAME` or `NAME:N`, until it is let go on.
    pub fn start_stopping_at(&mut self, point: &str) -> Result<()> {
        self.start_with(CrashPoint::StopAt(point))
    }

    fn start_with(&mut self, crash: CrashPoint<'_>) -> Result<()> {
        let socket = self.socket.clone();
        self.daemon.start(crash, || UnixStream::connect(&socket).is_ok())
    }

    /// Has it wait less long than installed ones do from the next start on: `NAME=SECONDS`, separated by commas; empty
    /// for as long as they do.
    pub fn shorten(&mut self, patience: &str) {
        patience.clone_into(&mut self.daemon.patience);
    }

    /// Has its clock run so many seconds ahead of the host's from the next start on; below zero, behind.
    pub fn shift_clock(&mut self, seconds: i64) {
        self.daemon.clock_shift = seconds;
    }

    /// The running process.
    pub fn process(&mut self) -> Result<&mut Running> {
        self.daemon.process()
    }

    /// Whether it is there.
    pub fn is_running(&mut self) -> bool {
        self.daemon.is_running()
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill()
    }

    /// SIGTERM and a clean end.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.stop()
    }

    /// Value of `archive_command` for its server, quoted for postgresql.conf. After each acknowledged file a copy goes
    /// to `witness`, so that the judge knows what was acknowledged and with which bytes. It gets its name when it is whole.
    pub fn archive_command(&self, witness: &Path) -> Result<String> {
        let (push, socket, witness) = (Program::Wal.path()?, self.socket.display(), witness.display());
        let push = format!("{} push \"%p\" --socket \"{socket}\"", push.display());
        let copy = format!("cp \"%p\" \"{witness}/.%f\" && mv \"{witness}/.%f\" \"{witness}/%f\"");
        Ok(format!("'{push} && {copy}'"))
    }

    /// Value of `restore_command` for its server, quoted for postgresql.conf.
    pub fn restore_command(&self) -> Result<String> {
        Ok(format!("'{} fetch \"%f\" \"%p\" --socket \"{}\"'", Program::Wal.path()?.display(), self.socket.display()))
    }

    /// The tiny command, run in `directory`.
    pub fn wal_command(&self, directory: &Path, arguments: &[&str]) -> Result<Command> {
        let mut command = account::command(Program::Wal.path()?);
        command.args(arguments).arg("--socket").arg(&self.socket).current_dir(directory);
        Ok(command)
    }
}

/// An operator's seat: the command `pgconvoy` with a repository file.
#[derive(Debug, Clone)]
pub struct Operator {
    config: PathBuf,
}

impl Operator {
    /// A seat that reaches the coordinator, the stores, an agent's socket, or only some of them.
    pub fn set_up(
        scratch: &Scratch,
        name: &str,
        coordinator: Option<SocketAddr>,
        stores: &[Store],
        agent: Option<&Agent>,
    ) -> Result<Self> {
        Self::set_up_with(scratch, name, coordinator.map(|address| coordinator_table(address, None)), stores, agent)
    }

    /// A seat that reaches a coordinator that speaks TLS.
    pub fn set_up_over_tls(
        scratch: &Scratch,
        name: &str,
        coordinator: SocketAddr,
        papers: &Papers,
        stores: &[Store],
    ) -> Result<Self> {
        Self::set_up_with(scratch, name, Some(coordinator_table(coordinator, Some(papers))), stores, None)
    }

    fn set_up_with(
        scratch: &Scratch,
        name: &str,
        coordinator: Option<String>,
        stores: &[Store],
        agent: Option<&Agent>,
    ) -> Result<Self> {
        let mut text = String::new();
        if let Some(agent) = agent {
            text.push_str(&format!("agent_socket = \"{}\"\n", agent.socket().display()));
        }
        if let Some(table) = coordinator {
            text.push_str(&table);
            text.push('\n');
        }
        for store in stores {
            text.push_str(&store.toml());
            text.push('\n');
        }
        Ok(Self { config: scratch.write(&format!("{name}.toml"), text)? })
    }

    /// Its repository file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// The command with these arguments, to be started in the background.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = account::command(Program::Pgconvoy.path()?);
        command.arg("--config").arg(&self.config).args(arguments);
        Ok(command)
    }

    /// Runs the command to its end.
    pub fn run(&self, arguments: &[&str]) -> Result<Said> {
        program::run(self.command(arguments)?, COMMAND_PATIENCE)
    }

    /// Runs the command, which must exit 0; gives its output.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.run(arguments)?.ok().with_context(|| format!("pgconvoy {}", arguments.join(" ")))
    }

    /// Runs the command with `--output json`, which must exit 0; gives the value.
    pub fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let text = self.ok(&[arguments, &["--output", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// Runs `info`, `restore` or `fetch` from the stores of the repository file alone.
    pub fn alone(&self, arguments: &[&str]) -> Result<Said> {
        self.alone_in(Path::new("/"), arguments)
    }

    /// As [`Operator::alone`], in this working directory; `fetch` wants a data directory.
    pub fn alone_in(&self, directory: &Path, arguments: &[&str]) -> Result<Said> {
        let mut command = self.command_alone(arguments)?;
        command.current_dir(directory);
        program::run(command, COMMAND_PATIENCE)
    }

    /// The command of [`Operator::alone`], to be run.
    pub fn command_alone(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = account::command(Program::Pgconvoy.path()?);
        command.args(arguments).arg("--repository").arg(&self.config);
        Ok(command)
    }
}
