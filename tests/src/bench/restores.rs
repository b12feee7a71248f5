//! Restores onto what is there, against pgbackrest's, and what a look at a very large backup takes in memory.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use agent::restore::{LinkChoice, Place, RestoreOptions, RestoreSource, survey};
use anyhow::{Context, Result, ensure};
use repository::restore_plan::{ArchiveMode, Recovery, Request, TargetTimeline};
use repository::root::RootBackup;

use super::figure::{Bound, Figure, median};
use super::material::Material;
use super::ours::{ARCHIVE_NOWHERE, CLUSTER, Ours, Road, archive_by};
use super::pgbackrest::{Pgbackrest, Repository, ServerState};
use crate::account::{self, Scratch};
use crate::fleet::Store;
use crate::postgres::Stop;
use crate::program;
use crate::runtime::block_on;
use crate::synthetic::{self, Shape};

/// Largest peak of a restore, in MiB.
const PEAK_MAX: f64 = 128.0;
/// One mebibyte.
const MEBIBYTE: f64 = 1048576.0;
/// Longest copy of a data directory.
const COPY_PATIENCE: Duration = Duration::from_secs(300);
/// Longest look at a made-up backup.
const LOOK_PATIENCE: Duration = Duration::from_secs(900);
/// The verb with which this program looks at one.
pub const VERB: &str = "look-at-backup";

/// One tool's side of a measure.
struct Side<'a> {
    name: &'static str,
    restore: &'a dyn Fn(&Path) -> Result<()>,
}

impl Side<'_> {
    fn restored(&self, scratch: &Scratch, day: &str) -> Result<std::path::PathBuf> {
        let target = scratch.directory(&format!("{}-{day}", self.name))?;
        (self.restore)(&target)?;
        ensure!(target.join("PG_VERSION").is_file(), "nothing was restored");
        Ok(target)
    }

    /// Restores onto a copy of a directory, and gives the seconds.
    fn onto_copy(&self, scratch: &Scratch, of: &Path) -> Result<f64> {
        let target = scratch.path().join(format!("{}-onto", self.name));
        let mut copy = account::command("/bin/cp");
        copy.arg("-a").arg(of).arg(&target);
        program::run(copy, COPY_PATIENCE)?.ok().context("copy")?;
        let start = std::time::Instant::now();
        (self.restore)(&target)?;
        let took = start.elapsed().as_secs_f64();
        fs::remove_dir_all(&target).context("the restored directory")?;
        Ok(took)
    }
}

/// `delta-restore`: onto an identical directory, and onto one that is a day old: 1 % of the rows changed since.
pub fn onto_what_is_there(material: &mut Material, rounds: usize) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("delta")?;
    let store = Store::directory("repo1", &scratch.directory("repo1")?);
    // On a copy: what is measured on stays as it is.
    let mut server = material.server.twin(&scratch, "delta")?;
    server.configure(&[("archive_command", "'/bin/true'"), ("archive_mode", "on")])?;
    server.start()?;
    let ours = Ours::start(&scratch, "ours", &server, &store, Road::Coordinator)?;
    ours.wait_reported(server.name())?;
    let peer = Pgbackrest::set_up(&scratch, "pgbackrest", &server, ServerState::Running, Repository::Directory)?;
    let back_up = |kind: &str| {
        archive_by(&server, &ours.archive_command()?)?;
        ours.operator.ok(&["backup", CLUSTER, "--start-fast", "--type", kind])?;
        archive_by(&server, &peer.archive_command())?;
        peer.run(&[&format!("--type={kind}"), "backup"])?.ok().map(|_| ())
    };
    let our_restore = |target: &Path| {
        let to = target.display().to_string();
        ours.operator.alone(&["restore", CLUSTER, "--to", &to, "--delta", "--confirm"])?.ok().map(|_| ())
    };
    let their_restore = |target: &Path| {
        let to = format!("--pg1-path={}", target.display());
        let delta = if target.join("PG_VERSION").exists() { "--delta" } else { "--no-delta" };
        peer.run(&[&to, delta, "restore"])?.ok().map(|_| ())
    };
    let sides = [Side { name: "ours", restore: &our_restore }, Side { name: "theirs", restore: &their_restore }];
    back_up("full")?;
    let old = [sides[0].restored(&scratch, "old")?, sides[1].restored(&scratch, "old")?];
    server.sql("update pgbench_accounts set abalance = abalance + 1 where aid % 100 = 7")?;
    back_up("incr")?;
    let new = [sides[0].restored(&scratch, "new")?, sides[1].restored(&scratch, "new")?];
    let (mut identical, mut day_old) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for _ in 0..rounds {
        for (number, side) in sides.iter().enumerate() {
            identical[number].push(side.onto_copy(&scratch, &new[number])?);
            day_old[number].push(side.onto_copy(&scratch, &old[number])?);
        }
    }
    archive_by(&server, ARCHIVE_NOWHERE)?;
    ours.end()?;
    server.stop(Stop::Fast)?;
    let against = |what: &str, took: &[Vec<f64>; 2]| {
        Figure::against(what, median(&took[0]), median(&took[1]), Bound::RatioAtMost(1.0))
    };
    Ok(vec![
        against("delta restore of 1.5 GB onto an identical directory, s", &identical),
        against("delta restore of 1.5 GB onto a day-old directory, s", &day_old),
    ])
}

/// `restore-memory`: the peak of a process that plans the restore of ten million files, and of one that plans that of 32 TiB
/// in 32,768 files with the layers of 30 increments.
pub fn memory() -> Result<Vec<Figure>> {
    let shapes = [("10,000,000 files", Shape::Small(10_000_000)), ("32 TiB in 31 layers", Shape::Large(32_768))];
    shapes.into_iter().map(|(name, shape)| peak_of(name, shape)).collect()
}

fn peak_of(name: &str, shape: Shape) -> Result<Figure> {
    let scratch = Scratch::new("memory")?;
    let directory = scratch.directory("repo1")?;
    let store = repository::config::open(&synthetic::store_at(&directory))?;
    let entry = block_on(synthetic::publish(store.as_ref(), shape, scratch.path()))?;
    let entry_file = scratch.write("entry.json", serde_json::to_vec(&entry)?)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(VERB).arg(&directory).arg(&entry_file);
    let said = program::run(command, LOOK_PATIENCE)?.ok()?;
    let peak: f64 = said.trim().parse().with_context(|| format!("no number: {said}"))?;
    Ok(Figure::alone(format!("restore plan of {name}, peak memory, MiB"), peak / MEBIBYTE, Bound::AtMost(PEAK_MAX)))
}

/// Plans the restore of a backup that lies in a directory, and prints this process's peak memory in bytes.
pub fn look(directory: &str, entry: &str) -> Result<()> {
    let backup: RootBackup = serde_json::from_slice(&fs::read(entry)?)?;
    let files = backup.files;
    let store = repository::config::open(&synthetic::store_at(Path::new(directory)))?;
    let source = RestoreSource { cluster: synthetic::cluster()?, backup, stores: vec![store] };
    let options = RestoreOptions {
        target: "/nonexistent/data".into(),
        place: Place::Free,
        databases: Vec::new(),
        tablespace_map: Default::default(),
        links: LinkChoice::default(),
        recovery: Recovery::of(&Request::latest("false"), TargetTimeline::Latest, ArchiveMode::Off),
        owner: Some(account::user_name()),
        parallel: 0,
        bytes_per_second: 0,
        scratch: std::env::temp_dir(),
    };
    let survey = block_on(survey(&source, &options))?;
    ensure!(survey.files == files, "{survey:?}");
    println!("{}", program::peak_bytes_of(std::process::id())?);
    Ok(())
}
