//! A real PostgreSQL server in a temporary directory, for tests of this crate only; the scenarios have a richer one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use agent::postgres::libpq::{Environment, Overrides};
use agent::postgres::{LocalServer, Server as _};
use postgres_format::{SystemIdentifier, WalFileName};
use repository::name::{ClusterName, NodeName};
use repository::store::ObjectStore;
use repository::wal::{Sink, VariantCheck, WalEncoder, WalFacts};

/// Major version and programs of the newest server that is installed, in Debian's layout or PGDG's.
fn installed() -> (u32, PathBuf) {
    let found = ["/usr/lib/postgresql/", "/usr/pgsql-"]
        .into_iter()
        .flat_map(|prefix| (14..100).map(move |major| (major, PathBuf::from(format!("{prefix}{major}/bin")))));
    found.filter(|(_, bin)| bin.join("postgres").exists()).max().expect("a PostgreSQL server is installed")
}

/// User and group that servers run as: `postgres` when we are root.
fn account() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|line| line.starts_with("postgres:")).expect("user postgres exists");
    let fields: Vec<&str> = line.split(':').collect();
    Some((fields[2].parse().unwrap(), fields[3].parse().unwrap()))
}

/// A directory that servers may use, removed at the end.
pub(crate) fn scratch() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("pgconvoy-agent-").tempdir_in("/tmp").unwrap();
    own(folder.path());
    folder
}

/// Gives a path to the server's user.
pub(crate) fn own(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(if path.is_dir() { 0o755 } else { 0o644 })).unwrap();
    if let Some((user, group)) = account() {
        std::os::unix::fs::chown(path, Some(user), Some(group)).unwrap();
    }
}

pub(crate) fn make_directory(path: &Path) {
    fs::create_dir_all(path).unwrap();
    own(path);
}

fn command(program: &str) -> Command {
    let mut command = Command::new(installed().1.join(program));
    if let Some((user, group)) = account() {
        command.uid(user).gid(group);
    }
    command.current_dir("/tmp").env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C");
    command
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> Output {
    command(program).args(arguments).output().unwrap()
}

fn run_well(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A running server; stopped at the end.
pub(crate) struct Server {
    pub(crate) data: PathBuf,
    pub(crate) archive: PathBuf,
    folder: PathBuf,
    port: u16,
}

impl Server {
    /// A new cluster that archives by copying into a directory.
    pub(crate) fn new(scratch: &Path, name: &str) -> Self {
        let server = Self::place(scratch, name);
        make_directory(&server.archive);
        run_well(
            "initdb",
            &["-D", server.data.to_str().unwrap(), "-U", "postgres", "-k", "-A", "trust", "--wal-segsize=1", "-N"],
        );
        let archive = server.archive.display();
        server.configure(&format!("archive_mode = on\narchive_command = 'cp %p {archive}/.t && mv {archive}/.t {archive}/%f'\nmax_wal_size = 64MB"));
        server
    }

    /// A data directory that exists or will.
    pub(crate) fn place(scratch: &Path, name: &str) -> Self {
        let folder = scratch.join(name);
        make_directory(&folder);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        Self { data: folder.join("data"), archive: scratch.join("archive"), folder, port }
    }

    pub(crate) fn configure(&self, text: &str) {
        let path = self.data.join("postgresql.conf");
        let mut conf = fs::read_to_string(&path).unwrap();
        conf.push_str(&format!(
            "\nlisten_addresses = ''\nunix_socket_directories = '{}'\nport = {}\nfsync = off\n",
            self.folder.display(),
            self.port
        ));
        conf.push_str(&format!("{text}\n"));
        fs::write(&path, conf).unwrap();
    }

    pub(crate) fn start(&self) {
        let log = self.folder.join("log");
        let data = self.data.to_str().unwrap();
        let output = command("pg_ctl")
            .args(["-D", data, "-l", log.to_str().unwrap(), "-w", "-t", "60", "start"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(output.success(), "{}", fs::read_to_string(&log).unwrap_or_default());
    }

    pub(crate) fn stop(&self) {
        run("pg_ctl", &["-D", self.data.to_str().unwrap(), "-m", "immediate", "stop"]);
    }

    fn connection(&self) -> [String; 6] {
        ["-h", self.folder.to_str().unwrap(), "-p", &self.port.to_string(), "-U", "postgres"].map(str::to_owned)
    }

    pub(crate) fn sql(&self, statement: &str) -> String {
        let connection = self.connection();
        let mut arguments: Vec<&str> = connection.iter().map(String::as_str).collect();
        arguments.extend(["-At", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", statement]);
        run_well("psql", &arguments)
    }

    /// A statement that is not waited for.
    pub(crate) fn begin_sql(&self, statement: &str) -> std::process::Child {
        let mut psql = command("psql");
        psql.args(self.connection()).args(["-d", "postgres", "-c", statement]);
        psql.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    pub(crate) fn pgbench(&self, arguments: &[&str]) -> std::process::Child {
        let mut pgbench = command("pgbench");
        pgbench.args(self.connection()).args(arguments).arg("postgres");
        pgbench.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// A streaming standby of this server.
    pub(crate) fn standby(&self, scratch: &Path, name: &str) -> Self {
        let standby = Self::place(scratch, name);
        let connection = self.connection();
        let mut arguments: Vec<&str> = connection.iter().map(String::as_str).collect();
        arguments.extend(["-D", standby.data.to_str().unwrap(), "-R", "-X", "stream", "-c", "fast"]);
        run_well("pg_basebackup", &arguments);
        standby.configure("hot_standby = on");
        standby
    }

    /// The agent's view of this server.
    pub(crate) fn live(&self) -> Arc<LocalServer> {
        let overrides = Overrides { user: Some("postgres".to_owned()), ..Overrides::default() };
        Arc::new(LocalServer::new(self.data.clone(), overrides, Environment::default()))
    }

    pub(crate) async fn system(&self) -> SystemIdentifier {
        self.live().identity().await.unwrap().system_identifier
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Ships what `archive_command` copied into a store, until dropped.
pub(crate) struct Shipping(tokio::task::JoinHandle<()>);

impl Drop for Shipping {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub(crate) fn ship(
    archive: &Path,
    stores: Vec<Arc<dyn ObjectStore>>,
    cluster: ClusterName,
    system: SystemIdentifier,
) -> Shipping {
    let archive = archive.to_owned();
    Shipping(tokio::spawn(async move {
        let mut shipped = std::collections::BTreeSet::new();
        loop {
            for entry in fs::read_dir(&archive).unwrap() {
                let entry = entry.unwrap();
                let Ok(name) = entry.file_name().to_string_lossy().parse::<WalFileName>() else { continue };
                if !shipped.insert(name) {
                    continue;
                }
                let wal = encode(&fs::read(entry.path()).unwrap(), name, &cluster, system);
                for store in &stores {
                    repository::wal::put(store.as_ref(), &wal, VariantCheck::List).await.unwrap();
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }))
}

fn encode(
    bytes: &[u8],
    name: WalFileName,
    cluster: &ClusterName,
    system: SystemIdentifier,
) -> repository::wal::EncodedWal {
    let mut encoder = WalEncoder::new(1, Sink::Memory).unwrap();
    encoder.push(bytes).unwrap();
    let node: NodeName = "n1".parse().unwrap();
    let facts = WalFacts {
        cluster: cluster.clone(),
        system_identifier: system,
        name,
        node,
        in_recovery: false,
        complete: true,
        logical_end: None,
        postgres_major: Some(installed().0),
        first_commit_time: None,
        last_commit_time: None,
        written: jiff::Timestamp::UNIX_EPOCH,
    };
    encoder.finish(facts).unwrap()
}
