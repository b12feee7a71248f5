//! Full backups of the 1.5 GB cluster while its server runs, and restores of them.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::bucket::SharedBucket;
use super::figure::{Bound, Figure, largest, median};
use super::material::Material;
use super::ours::{CLUSTER, Ours, Road};
use super::pgbackrest::{Pgbackrest, Repository, ServerState};
use crate::account::Scratch;
use crate::fleet::Store;
use crate::postgres::Stop;

/// Largest peak of the agent during a backup, in MiB.
const AGENT_PEAK_MAX: f64 = 128.0;

/// What rounds of one tool took, in seconds.
#[derive(Debug, Default)]
struct Took {
    backup: Vec<f64>,
    restore: Vec<f64>,
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
}

/// `backup` and `s3-backup`: into a place and back, against pgbackrest.
pub fn to_place(material: &mut Material, rounds: usize, place: Place<'_>) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("backup")?;
    let (store, repository) = match place {
        Place::Directory => (Store::directory("repo1", &scratch.directory("repo1")?), Repository::Directory),
        Place::Bucket(bucket) => (bucket.store(), Repository::Bucket(bucket)),
    };
    let (mut own, mut theirs) = (Took::default(), Took::default());
    material.server.configure(&[("archive_command", "'/bin/true'")])?;
    material.server.start()?;
    let mut ours = Ours::start(&scratch, "ours", &material.server, &store, Road::Coordinator)?;
    ours.wait_reported(material.server.name())?;
    let peer = Pgbackrest::set_up(&scratch, "pgbackrest", &material.server, ServerState::Running, repository)?;
    let mut peaks = Vec::new();
    for round in 0..rounds {
        our_backup(material, &ours, &mut own)?;
        archive_by(material, &peer.archive_command())?;
        theirs.backup.push(timed(|| peer.run(&["--type=full", "backup"])?.ok())?);
        our_restore(&scratch, &ours, round, &mut own)?;
        their_restore(&scratch, &peer, round, &mut theirs)?;
        peaks.push(ours.peaks()?.agent);
    }
    ours.end()?;
    material.server.stop(Stop::Fast)?;
    let name = place.name();
    let against = |what: String, ours: &[f64], peer: &[f64]| {
        Figure::against(what, median(ours), median(peer), Bound::RatioAtMost(1.0))
    };
    Ok(vec![
        against(format!("full backup of 1.5 GB to {name}, s"), &own.backup, &theirs.backup),
        against(format!("restore of 1.5 GB from {name}, s"), &own.restore, &theirs.restore),
        Figure::alone(
            format!("full backup to {name}, peak memory of the agent, MiB"),
            largest(&peaks),
            Bound::AtMost(AGENT_PEAK_MAX),
        ),
    ])
}

fn archive_by(material: &Material, command: &str) -> Result<()> {
    material.server.configure(&[("archive_command", &format!("'{command}'"))])?;
    material.server.reload()
}

fn our_backup(material: &Material, ours: &Ours, into: &mut Took) -> Result<()> {
    archive_by(material, &ours.archive_command()?)?;
    into.backup.push(timed(|| ours.operator.ok(&["backup", CLUSTER, "--start-fast", "--type", "full"]))?);
    Ok(())
}

fn our_restore(scratch: &Scratch, ours: &Ours, round: usize, into: &mut Took) -> Result<()> {
    let target = scratch.path().join(format!("restored-{round}"));
    let to = target.display().to_string();
    into.restore.push(timed(|| ours.operator.alone(&["restore", CLUSTER, "--to", &to])?.ok())?);
    ensure!(target.join("PG_VERSION").is_file(), "nothing was restored");
    fs::remove_dir_all(&target).context("the restored directory")
}

fn their_restore(scratch: &Scratch, peer: &Pgbackrest, round: usize, into: &mut Took) -> Result<()> {
    let target = scratch.directory(&format!("pgbackrest-restored-{round}"))?;
    let to = format!("--pg1-path={}", target.display());
    into.restore.push(timed(|| peer.run(&[&to, "restore"])?.ok())?);
    ensure!(target.join("PG_VERSION").is_file(), "nothing was restored");
    fs::remove_dir_all(&target).context("the restored directory")
}

fn timed(work: impl FnOnce() -> Result<String>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}
