//! Full backups of the 1.5 GB cluster while its server runs, and restores of them.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::figure::{Bound, Figure, largest, median};
use super::material::Material;
use super::ours::{CLUSTER, Ours, Road};
use super::pgbackrest::{Pgbackrest, ServerState};
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

/// `backup`: into a directory and back, against pgbackrest.
pub fn to_directory(material: &mut Material, rounds: usize) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("backup")?;
    let store = Store::directory("repo1", &scratch.directory("repo1")?);
    let (mut own, mut theirs) = (Took::default(), Took::default());
    material.server.configure(&[("archive_command", "'/bin/true'")])?;
    material.server.start()?;
    let mut ours = Ours::start(&scratch, "ours", &material.server, &store, Road::Coordinator)?;
    ours.wait_reported(material.server.name())?;
    let peer = Pgbackrest::set_up(&scratch, "pgbackrest", &material.server, ServerState::Running)?;
    let mut peaks = Vec::new();
    for round in 0..rounds {
        our_backup(material, &ours, &mut own)?;
        archive_by(material, &peer.archive_command())?;
        theirs.backup.push(timed(|| peer.run(&["--type=full", "backup"])?.ok())?);
        our_restore(&scratch, &ours, round, &mut own)?;
        let target = scratch.directory(&format!("pgbackrest-restored-{round}"))?;
        let place = format!("--pg1-path={}", target.display());
        theirs.restore.push(timed(|| peer.run(&[&place, "restore"])?.ok())?);
        fs::remove_dir_all(target)?;
        peaks.push(ours.peaks()?.agent);
    }
    ours.end()?;
    material.server.stop(Stop::Fast)?;
    let at_most = Bound::RatioAtMost(1.0);
    Ok(vec![
        Figure::against(
            "full backup of 1.5 GB to a directory, s",
            median(&own.backup),
            median(&theirs.backup),
            at_most,
        ),
        Figure::against(
            "restore of 1.5 GB from a directory, s",
            median(&own.restore),
            median(&theirs.restore),
            at_most,
        ),
        Figure::alone("full backup, peak memory of the agent, MiB", largest(&peaks), Bound::AtMost(AGENT_PEAK_MAX)),
    ])
}

/// `s3`: into a bucket and back, for information: pgbackrest wants TLS there.
pub fn to_bucket(material: &mut Material, rounds: usize, store: &Store) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("backup-s3")?;
    let mut own = Took::default();
    material.server.configure(&[("archive_command", "'/bin/true'")])?;
    material.server.start()?;
    let mut ours = Ours::start(&scratch, "ours", &material.server, store, Road::Coordinator)?;
    ours.wait_reported(material.server.name())?;
    for round in 0..rounds {
        our_backup(material, &ours, &mut own)?;
        our_restore(&scratch, &ours, round, &mut own)?;
    }
    let peak = ours.peaks()?.agent;
    ours.end()?;
    material.server.stop(Stop::Fast)?;
    Ok(vec![
        Figure::alone("full backup of 1.5 GB to S3, s", median(&own.backup), Bound::None),
        Figure::alone("restore of 1.5 GB from S3, s", median(&own.restore), Bound::None),
        Figure::alone("full backup to S3, peak memory of the agent, MiB", peak, Bound::AtMost(AGENT_PEAK_MAX)),
    ])
}

fn archive_by(material: &Material, command: &str) -> Result<()> {
    material.server.configure(&[("archive_command", &format!("'{command}'"))])?;
    material.server.reload()
}

fn our_backup(material: &Material, ours: &Ours, into: &mut Took) -> Result<()> {
    archive_by(material, &ours.archive_command()?)?;
    into.backup.push(timed(|| ours.operator.ok(&["backup", CLUSTER, "--start-fast"]))?);
    Ok(())
}

fn our_restore(scratch: &Scratch, ours: &Ours, round: usize, into: &mut Took) -> Result<()> {
    let target = scratch.path().join(format!("restored-{round}"));
    let to = target.display().to_string();
    into.restore.push(timed(|| ours.operator.alone(&["restore", CLUSTER, "--to", &to])?.ok())?);
    ensure!(target.join("PG_VERSION").is_file(), "nothing was restored");
    fs::remove_dir_all(&target).context("the restored directory")
}

fn timed(work: impl FnOnce() -> Result<String>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}
