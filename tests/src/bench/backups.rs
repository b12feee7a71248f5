//! Full backups of running servers, and restores of them: the 1.5 GB of pgbench and a cluster as applications have them.
//!
//! ```text
//! full backup   ours ─ pgbackrest ─ tar | zstd        restore   ours ─ pgbackrest ─ dd conv=fsync
//! ```
//!
//! Before each of them what others wrote is written back, so that nobody pays for anybody else's.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::application;
use super::bucket::SharedBucket;
use super::figure::{Bound, Figure, median};
use super::material::Material;
use super::ours::{ARCHIVE_NOWHERE, CLUSTER, Ours, Road, archive_by};
use super::pgbackrest::{Pgbackrest, Repository, ServerState};
use super::phases::{self, Phases};
use super::plain::Plain;
use super::stopwatch::{Lap, lap};
use crate::account::Scratch;
use crate::fleet::Store;
use crate::postgres::{Server, Stop};

/// Largest peak of the agent during a backup, in MiB.
const AGENT_PEAK_MAX: f64 = 128.0;
/// Longest backup beside pgbackrest's, and most CPU time.
const BACKUP_RATIO_MAX: f64 = 1.0 / 1.5;
const CPU_RATIO_MAX: f64 = 1.0;
/// Longest restore from a directory beside pgbackrest's, and beside a durable copy.
const RESTORE_RATIO_MAX: f64 = 1.0 / 1.4;
const COPY_RATIO_MAX: f64 = 1.2;
/// Longest restore from a bucket beside pgbackrest's.
const RESTORE_FROM_BUCKET_RATIO_MAX: f64 = 1.0 / 5.0;

/// What rounds of one tool took, in seconds.
#[derive(Debug, Default)]
struct Took {
    backup: Vec<f64>,
    backup_cpu: Vec<f64>,
    phases: Vec<Phases>,
    restore: Vec<f64>,
    restore_cpu: Vec<f64>,
}

impl Took {
    fn note_backup(&mut self, lap: &Lap, cpu_seconds: f64, phases: Phases) {
        self.backup.push(lap.seconds);
        self.backup_cpu.push(cpu_seconds);
        self.phases.push(phases);
    }

    fn note_restore(&mut self, lap: &Lap) {
        self.restore.push(lap.seconds);
        self.restore_cpu.push(lap.cpu_seconds);
    }
}

/// Where backups go, and the place's name in measures.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// New directories.
    Directory,
    /// A bucket, below prefixes of their own.
    Bucket(&'a SharedBucket),
}

impl Place<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::Directory => "a directory",
            Self::Bucket(_) => "S3",
        }
    }

    fn restore_ratio_max(&self) -> f64 {
        match self {
            Self::Directory => RESTORE_RATIO_MAX,
            Self::Bucket(_) => RESTORE_FROM_BUCKET_RATIO_MAX,
        }
    }
}

/// `backup` and `s3-backup`: into a place and back.
pub fn to_place(material: &mut Material, rounds: usize, place: Place<'_>) -> Result<Vec<Figure>> {
    material.server.configure(&[("archive_command", "'/bin/true'")])?;
    material.server.start()?;
    let mut figures = of_server("pgbench", &material.server, rounds, place)?;
    material.server.stop(Stop::Fast)?;
    let scratch = Scratch::new("application")?;
    let mut server = application::start(&scratch)?;
    figures.extend(of_server("application", &server, rounds, place)?);
    server.stop(Stop::Fast)?;
    Ok(figures)
}

fn of_server(cluster: &str, server: &Server, rounds: usize, place: Place<'_>) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("backup")?;
    let (store, repository) = match place {
        Place::Directory => (Store::directory("repo1", &scratch.directory("repo1")?), Repository::Directory),
        Place::Bucket(bucket) => (bucket.store(), Repository::Bucket(bucket)),
    };
    let mut ours = Ours::start(&scratch, "ours", server, &store, Road::Coordinator)?;
    ours.wait_reported(server.name())?;
    let peer = Pgbackrest::set_up(&scratch, "pgbackrest", server, ServerState::Running, repository)?;
    let plain = Plain::of(&scratch, server.data())?;
    let (mut own, mut theirs, mut packed, mut copied) = (Took::default(), Took::default(), Vec::new(), Vec::new());
    for round in 0..rounds {
        our_backup(server, &mut ours, &mut own)?;
        their_backup(server, &peer, &mut theirs)?;
        let target = scratch.path().join(format!("restored-{round}"));
        own.note_restore(&our_restore(&ours, &target)?);
        let target = scratch.directory(&format!("pgbackrest-restored-{round}"))?;
        theirs.note_restore(&their_restore(&peer, &target)?);
        if let Place::Directory = place {
            rustix::fs::sync();
            packed.push(plain.packed()?);
            rustix::fs::sync();
            copied.push(plain.copied()?.seconds);
        }
    }
    let peak = ours.peaks()?.agent;
    archive_by(server, ARCHIVE_NOWHERE)?;
    ours.end()?;
    let place_name = place.name();
    let (backup, restore) =
        (format!("{cluster}, full backup to {place_name}"), format!("{cluster}, restore from {place_name}"));
    let mut figures = vec![
        line(format!("{backup}, s"), &own.backup, &theirs.backup, Bound::RatioAtMost(BACKUP_RATIO_MAX)),
        line(format!("{backup}, CPU s"), &own.backup_cpu, &theirs.backup_cpu, Bound::RatioAtMost(CPU_RATIO_MAX)),
    ];
    figures.extend(phases::figures(&backup, &own.phases, &theirs.phases));
    figures.push(Figure::alone(
        format!("{backup}, peak memory of the agent, MiB"),
        peak,
        Bound::AtMost(AGENT_PEAK_MAX),
    ));
    let longest = Bound::RatioAtMost(place.restore_ratio_max());
    figures.extend([
        line(format!("{restore}, s"), &own.restore, &theirs.restore, longest),
        line(format!("{restore}, CPU s"), &own.restore_cpu, &theirs.restore_cpu, Bound::None),
    ]);
    if let Place::Directory = place {
        let of = |what: fn(&Lap) -> f64| packed.iter().map(what).collect::<Vec<_>>();
        let (seconds, cpu_seconds) = (of(|lap| lap.seconds), of(|lap| lap.cpu_seconds));
        figures.extend([
            line(format!("{backup}, against tar | zstd -3 -T2, s"), &own.backup, &seconds, Bound::None),
            line(format!("{backup}, against tar | zstd -3 -T2, CPU s"), &own.backup_cpu, &cpu_seconds, Bound::None),
            line(
                format!("{restore}, against dd conv=fsync, s"),
                &own.restore,
                &copied,
                Bound::RatioAtMost(COPY_RATIO_MAX),
            ),
        ]);
    }
    Ok(figures)
}

fn line(measure: String, ours: &[f64], against: &[f64], bound: Bound) -> Figure {
    Figure::against(measure, median(ours), median(against), bound)
}

fn our_backup(server: &Server, ours: &mut Ours, into: &mut Took) -> Result<()> {
    archive_by(server, &ours.archive_command()?)?;
    rustix::fs::sync();
    let (before, began) = (ours.cpu_seconds()?, process::clock::now());
    let lap = lap(ours.operator.command(&["backup", CLUSTER, "--start-fast", "--type", "full"])?)?;
    let cpu_seconds = lap.cpu_seconds + ours.cpu_seconds()? - before;
    into.note_backup(&lap, cpu_seconds, Phases::of_ours(&lap, began, &ours.told(&lap.answer)?, server.data())?);
    Ok(())
}

/// What its asynchronous archiving uses in the background is not counted.
fn their_backup(server: &Server, peer: &Pgbackrest, into: &mut Took) -> Result<()> {
    archive_by(server, &peer.archive_command())?;
    rustix::fs::sync();
    let lap = lap(peer.command(&["--type=full", "--log-level-console=info", "backup"]))?;
    into.note_backup(&lap, lap.cpu_seconds, Phases::of_pgbackrest(&lap)?);
    Ok(())
}

fn our_restore(ours: &Ours, target: &Path) -> Result<Lap> {
    rustix::fs::sync();
    let lap = lap(ours.operator.command_alone(&["restore", CLUSTER, "--to", &target.display().to_string()])?)?;
    remove(target)?;
    Ok(lap)
}

fn their_restore(peer: &Pgbackrest, target: &Path) -> Result<Lap> {
    rustix::fs::sync();
    let lap = lap(peer.command(&[&format!("--pg1-path={}", target.display()), "restore"]))?;
    remove(target)?;
    Ok(lap)
}

fn remove(target: &Path) -> Result<()> {
    ensure!(target.join("PG_VERSION").is_file(), "nothing was restored");
    fs::remove_dir_all(target).context("the restored directory")
}
