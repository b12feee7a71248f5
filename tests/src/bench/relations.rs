//! A hundred thousand relations of one page each, to S3 and back: what counts is how many requests that takes.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::bucket::SharedBucket;
use super::figure::{Bound, Figure};
use super::ours::{ARCHIVE_NOWHERE, CLUSTER, Ours, Road, archive_by};
use super::pgbackrest::{Pgbackrest, Repository, ServerState};
use crate::account::Scratch;
use crate::postgres::{InitOptions, Server, Stop};

/// Relations of one page.
const RELATIONS: u32 = 100_000;
/// Of those made in one transaction.
const BATCH: u32 = 1_000;
/// Longest time beside pgbackrest's.
const RATIO_MAX: f64 = 0.5;

/// `relations`: one backup and one restore of each tool.
pub fn one_page_each(bucket: &SharedBucket) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("relations")?;
    let mut server = cluster(&scratch)?;
    let mut ours = Ours::start(&scratch, "ours", &server, &bucket.store(), Road::Coordinator)?;
    archive_by(&server, &ours.archive_command()?)?;
    ours.wait_reported(server.name())?;
    let peer = Pgbackrest::set_up(&scratch, "peer", &server, ServerState::Running, Repository::Bucket(bucket))?;
    let own = Both {
        backup: counted(bucket, || ours.operator.ok(&["backup", CLUSTER, "--start-fast", "--type", "full"]))?,
        restore: restored(&scratch, bucket, "ours", |to| ours.operator.alone(&["restore", CLUSTER, "--to", to])?.ok())?,
    };
    let peak = ours.peaks()?.agent;
    let theirs = Both {
        backup: counted(bucket, || peer.run(&["--type=full", "--no-archive-check", "backup"])?.ok())?,
        restore: restored(&scratch, bucket, "peer", |to| peer.run(&[&format!("--pg1-path={to}"), "restore"])?.ok())?,
    };
    archive_by(&server, ARCHIVE_NOWHERE)?;
    ours.end()?;
    server.stop(Stop::Fast)?;
    let mut figures = Vec::new();
    for (what, own, theirs) in [("backup", own.backup, theirs.backup), ("restore", own.restore, theirs.restore)] {
        let name = |unit: &str| format!("{what} of {RELATIONS} relations of one page, S3, {unit}");
        figures.push(Figure::against(name("s"), own.seconds, theirs.seconds, Bound::RatioAtMost(RATIO_MAX)));
        if let (Some(own), Some(theirs)) = (own.requests, theirs.requests) {
            figures.push(Figure::against(name("requests"), own as f64, theirs as f64, Bound::None));
        }
    }
    let measure = format!("backup of {RELATIONS} relations, peak memory of the agent, MiB");
    figures.push(Figure::alone(measure, peak, Bound::AtMost(128.0)));
    Ok(figures)
}

/// Both ways of one tool.
struct Both {
    backup: Counted,
    restore: Counted,
}

/// What one command took.
struct Counted {
    seconds: f64,
    /// Where the server is the project's own, which counts.
    requests: Option<u64>,
}

fn counted(bucket: &SharedBucket, work: impl FnOnce() -> Result<String>) -> Result<Counted> {
    let before = bucket.requests();
    let start = Instant::now();
    work()?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Counted { seconds, requests: bucket.requests().zip(before).map(|(after, before)| after - before) })
}

fn restored(
    scratch: &Scratch,
    bucket: &SharedBucket,
    name: &str,
    work: impl FnOnce(&str) -> Result<String>,
) -> Result<Counted> {
    let target = scratch.directory(&format!("{name}-restored"))?;
    let to = target.display().to_string();
    let counted = counted(bucket, || work(&to))?;
    ensure!(target.join("PG_VERSION").is_file(), "nothing was restored");
    fs::remove_dir_all(&target).context("the restored directory")?;
    Ok(counted)
}

fn cluster(scratch: &Scratch) -> Result<Server> {
    let mut server = Server::init(scratch, "many", InitOptions::default())?;
    server.configure(&[
        ("shared_buffers", "'1GB'"),
        ("max_wal_size", "'4GB'"),
        ("autovacuum", "off"),
        ("max_locks_per_transaction", "1000"),
        ("archive_mode", "on"),
        ("archive_command", "'/bin/true'"),
    ])?;
    server.start()?;
    for batch in 0..RELATIONS / BATCH {
        let (first, last) = (batch * BATCH, (batch + 1) * BATCH - 1);
        server.sql(&format!(
            "do $$ begin for i in {first}..{last} loop
                 execute format('create table t%s (i int)', i);
                 execute format('insert into t%s values (%s)', i, i);
             end loop; end $$"
        ))?;
    }
    server.sql("checkpoint")?;
    Ok(server)
}
