//! What is measured on: a real cluster filled by pgbench, and two sets of WAL segments that its server wrote.
//!
//! Made once a run, or once for several in a directory that is kept. Invariants: segments are never copied, so every round
//! reads the same files from the page cache; they are linked into data directories that hold nothing else, and the server
//! removes old WAL instead of reusing it, so that nobody writes into a linked file.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::account::{self, Scratch};
use crate::postgres::{InitOptions, Server, Stop};
use crate::program::{self, Farewell, Running};
use crate::wait;

/// Rows of the large database: a hundred thousand times this, 1.5 GB.
const SCALE: u32 = 100;
/// Rows of the database whose text is random: a hundred thousand times this.
const TEXT_SCALE: u32 = 10;
/// Database whose text is random.
const TEXT_DATABASE: &str = "random_text";
/// Longest time for a set of segments to be written.
const WAL_PATIENCE: Duration = Duration::from_secs(600);
/// Longest run of one copying or filling command.
const FILL_PATIENCE: Duration = Duration::from_secs(300);

/// Settings of the server while it writes what is measured.
const SETTINGS: &[(&str, &str)] = &[
    ("shared_buffers", "'512MB'"),
    ("max_wal_size", "'1GB'"),
    ("wal_recycle", "off"),
    ("autovacuum", "off"),
    ("synchronous_commit", "off"),
];

/// pgbench's own transaction, with random text where pgbench leaves blanks.
const TEXT_SCRIPT: &str = "\\set aid random(1, 100000 * :scale)
\\set tid random(1, 10 * :scale)
\\set delta random(-5000, 5000)
begin;
update pgbench_accounts set abalance = abalance + :delta, filler = md5(random()::text) where aid = :aid;
update pgbench_tellers set tbalance = tbalance + :delta where tid = :tid;
insert into pgbench_history (tid, bid, aid, delta, mtime, filler)
    values (:tid, 1, :aid, :delta, current_timestamp, substr(md5(random()::text), 1, 22));
end;
";

/// A cluster of nothing but messages.
const MESSAGES: &str = "messages";
/// Two mebibytes of WAL, half of them random hexadecimal digits.
const MESSAGE_SCRIPT: &str = "select pg_logical_emit_message(false, 'load', repeat(md5(i::text), 1024) || noise)
    from generate_series(1, 32) i,
         (select string_agg(md5(random()::text), '') as noise from generate_series(1, 1024)) as made;
";

/// Segments that follow one another.
#[derive(Debug, Clone)]
pub struct WalSet {
    /// Name in measures.
    pub name: &'static str,
    /// Where they lie.
    pub directory: PathBuf,
    /// Their names, in order.
    pub files: Vec<String>,
}

impl WalSet {
    fn read(name: &'static str, directory: PathBuf) -> Result<Self> {
        let mut files: Vec<String> = fs::read_dir(&directory)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        files.sort();
        Ok(Self { name, directory, files })
    }
}

/// The cluster and its WAL.
#[derive(Debug)]
pub struct Material {
    /// The stopped server.
    pub server: Server,
    /// WAL of pgbench's own transactions.
    pub pgbench: WalSet,
    /// WAL of transactions with random text.
    pub text: WalSet,
}

/// The set of pgbench's own transactions.
pub const PGBENCH: &str = "pgbench";
/// The set with random text.
pub const TEXT: &str = "text";

impl Material {
    /// Takes what lies in `kept`, else makes it there (in the scratch directory without one): `segments` in each set.
    pub fn take_or_make(scratch: &Scratch, kept: Option<&Path>, segments: usize) -> Result<Self> {
        let home = kept.unwrap_or(scratch.path());
        let data = home.join("db-data");
        if !home.join("complete").exists() {
            fs::create_dir_all(home)?;
            make(scratch, home, &data, segments)?;
            fs::write(home.join("complete"), "")?;
        }
        let server = Server::at(scratch, "db", data)?;
        server.own_socket()?;
        let pgbench = WalSet::read(PGBENCH, home.join(PGBENCH))?;
        let text = WalSet::read(TEXT, home.join(TEXT))?;
        ensure!(pgbench.files.len() == segments, "{} holds {} segments", home.display(), pgbench.files.len());
        Ok(Self { server, pgbench, text })
    }
}

/// A data directory of a stopped cluster with these segments in `pg_wal` and nothing flagged.
pub fn data_directory(scratch: &Scratch, cluster: &Server, name: &str, set: Option<&WalSet>) -> Result<PathBuf> {
    let data = scratch.directory(name)?;
    for below in ["global", "pg_wal", "pg_wal/archive_status"] {
        scratch.directory(&format!("{name}/{below}"))?;
    }
    for file in ["PG_VERSION", "global/pg_control"] {
        account::write_owned(&data.join(file), fs::read(cluster.data().join(file))?)?;
    }
    for (from, file) in set.iter().flat_map(|set| set.files.iter().map(|file| (set.directory.join(file), file))) {
        fs::hard_link(from, data.join("pg_wal").join(file)).context("segments must be on one file system")?;
    }
    Ok(data)
}

/// A stopped cluster that wrote many segments of messages, half of which does not compress.
pub fn messages(scratch: &Scratch, segments: usize) -> Result<(Server, WalSet)> {
    let mut server = Server::init(scratch, MESSAGES, InitOptions::default())?;
    server.configure(SETTINGS)?;
    server.configure(&[("archive_mode", "on")])?;
    server.start()?;
    let script = scratch.write("messages.sql", MESSAGE_SCRIPT)?.display().to_string();
    let directory = scratch.path().join("messages");
    collect(&server, &["-f", &script], "postgres", segments, &directory)?;
    server.stop(Stop::Immediate)?;
    Ok((server, WalSet::read(MESSAGES, directory)?))
}

fn make(scratch: &Scratch, home: &Path, data: &Path, segments: usize) -> Result<()> {
    let mut server = Server::init(scratch, "db", InitOptions::default())?;
    server.configure(SETTINGS)?;
    server.configure(&[("wal_level", "minimal"), ("max_wal_senders", "0")])?;
    server.start()?;
    server.pgbench_init(SCALE)?;
    server.sql(&format!("create database {TEXT_DATABASE}"))?;
    let scale = TEXT_SCALE.to_string();
    server.tool("pgbench", &["-i", "-q", "-s", &scale, TEXT_DATABASE])?.ok().context("pgbench -i")?;
    fill_with_text(&server)?;
    server.stop(Stop::Fast)?;
    // No command: finished segments stay flagged, and stay.
    server.configure(&[("wal_level", "replica"), ("max_wal_senders", "6"), ("archive_mode", "on")])?;
    server.start()?;
    let (pgbench, text) = (home.join(PGBENCH), home.join(TEXT));
    collect(&server, &[], "postgres", segments, &pgbench)?;
    // The database is small: frequent checkpoints make it write whole pages, as the large one does by itself.
    server.configure(&[("max_wal_size", "'64MB'"), ("checkpoint_completion_target", "0.1")])?;
    server.reload()?;
    let script = scratch.write("random-text.sql", TEXT_SCRIPT)?.display().to_string();
    let scale = format!("scale={TEXT_SCALE}");
    collect(&server, &["-D", &scale, "-f", &script], TEXT_DATABASE, segments, &text)?;
    server.stop(Stop::Fast)?;
    let status = server.data().join("pg_wal/archive_status");
    for name in server.ready_files()? {
        fs::rename(status.join(format!("{name}.ready")), status.join(format!("{name}.done")))?;
    }
    if server.data() != data {
        fs::rename(server.data(), data)
            .context("the directory to keep must be on the scratch directory's file system")?;
    }
    Ok(())
}

fn fill_with_text(server: &Server) -> Result<()> {
    let mut psql = server.tool_command("psql", &[]);
    psql.args(["-q", "-d", TEXT_DATABASE, "-c", "update pgbench_accounts set filler = md5(random()::text)"]);
    psql.args(["-c", "vacuum full pgbench_accounts"]);
    program::run(psql, FILL_PATIENCE)?.ok().context("random text").map(|_| ())
}

/// Runs pgbench until so many segments were finished, and links them into `directory`.
fn collect(server: &Server, arguments: &[&str], database: &str, segments: usize, directory: &Path) -> Result<()> {
    server.sql("checkpoint")?;
    let last = server.switch_wal()?;
    let log = server.data().with_file_name("load.log");
    let mut all = vec!["-n", "-c", "4", "-j", "2", "-T", "3600"];
    all.extend(arguments);
    all.push(database);
    let finished = || -> Result<Vec<String>> {
        let mut names: Vec<String> = server.ready_files()?.into_iter().filter(|name| *name > last).collect();
        names.sort();
        Ok(names)
    };
    let mut load = Running::start("pgbench", server.tool_command("pgbench", &all), &log, Farewell::Kill)?;
    wait::until(&format!("{segments} segments of {database}"), WAL_PATIENCE, || {
        ensure!(load.is_running(), "pgbench ended:\n{}", load.log());
        Ok(finished()?.len() >= segments)
    })?;
    drop(load);
    fs::create_dir_all(directory)?;
    for name in finished()?.iter().take(segments) {
        fs::hard_link(server.data().join("pg_wal").join(name), directory.join(name))?;
    }
    Ok(())
}
