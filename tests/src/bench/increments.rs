//! Increments after a share of the rows changed at random, against pgbackrest's and against the changed pages themselves,
//! and what a long chain of them costs a restore.
//!
//! Both tools see the same server: its WAL is archived by ours, and pgbackrest is told not to look for it, which saves it
//! the wait. Ours goes first; the checkpoint that begins a backup has then little left to write for the second.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use postgres_format::Lsn;
use postgres_format::relation::TablespaceVersion;

use super::application;
use super::changed::{self, Changed};
use super::figure::{Bound, Figure, median};
use super::material::Material;
use super::model::Measured;
use super::ours::{ARCHIVE_NOWHERE, CLUSTER, Ours, Road, archive_by};
use super::pgbackrest::{Pgbackrest, Repository, ServerState};
use super::stopwatch::lap;
use crate::account::Scratch;
use crate::fleet::Store;
use crate::postgres::{Server, Stop};

/// Rows of `pgbench_accounts`.
const ACCOUNTS: u32 = 10_000_000;
/// Increments in the long chain.
const CHAIN: usize = 30;
/// Shares of the rows that change between two increments of the chain: a row in so many.
const CHAIN_SHARE: u32 = 10_000;

/// Shares of the rows, a row in so many, with their names and the longest time beside pgbackrest's.
const SHARES: [(u32, &str, Bound); 2] =
    [(1000, "0.1 % of the rows", Bound::RatioAtMost(0.3)), (100, "1 % of the rows", Bound::RatioAtMost(0.5))];
/// About as many rows of `pgbench_accounts`, one in so many, as change [`model::CHANGED_A_DAY`] of its pages.
const SHARE_OF_MODEL: (u32, &str, Bound) = (6_000, "1 % of the pages", Bound::None);
/// Bytes stored and read beside those of the changed pages.
const BYTES_MAX: f64 = 1.1;
/// Longest increment with nothing changed, in seconds.
const NOTHING_MAX_SECONDS: f64 = 1.0;
/// Longest restore of a chain's end beside that of a full backup.
const CHAIN_RATIO_MAX: f64 = 1.3;

/// A cluster whose rows can be changed at random.
struct Subject<'a> {
    name: &'static str,
    server: &'a Server,
    rows: u32,
    /// SQL that changes as many rows as `$count`.
    change: &'static str,
}

impl Subject<'_> {
    fn change(&self, one_in: u32) -> Result<()> {
        let count = (self.rows / one_in).to_string();
        self.server.sql(&self.change.replace("$count", &count))?;
        self.server.sql("checkpoint").map(drop)
    }

    fn version(&self) -> Result<TablespaceVersion> {
        let catalog_version = self.server.number("select catalog_version_no from pg_control_system()")?;
        let postgres_major = self.server.installation().major;
        Ok(TablespaceVersion { postgres_major, catalog_version: u32::try_from(catalog_version)? })
    }
}

const CHANGE_ACCOUNTS: &str = "update pgbench_accounts set abalance = abalance + 1
    where aid in (select 1 + floor(random() * 10000000)::int from generate_series(1, $count))";
/// Both indexes on what is changed get a new entry for each row, in a random place.
const CHANGE_DOCUMENTS: &str = "update documents
    set changed = now(), owner = gen_random_uuid(), body = jsonb_set(body, '{visits}', to_jsonb(floor(random() * 1000)))
    where number in (select 1 + floor(random() * 500000)::int from generate_series(1, $count))";

/// `increment`: the pgbench cluster and the application's.
pub fn all(material: &mut Material, rounds: usize) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    material.server.configure(&[("archive_command", "'/bin/true'")])?;
    material.server.start()?;
    let subject = Subject { name: "pgbench", server: &material.server, rows: ACCOUNTS, change: CHANGE_ACCOUNTS };
    let (found, took) = of_subject(&subject, &[SHARES[0], SHARES[1], SHARE_OF_MODEL], rounds)?;
    figures.extend(found);
    figures.extend(took.last().map(reckoned).into_iter().flatten());
    figures.extend(chain(&subject)?);
    material.server.stop(Stop::Fast)?;
    let scratch = Scratch::new("increment")?;
    let mut server = application::start(&scratch)?;
    let subject =
        Subject { name: "application", server: &server, rows: application::DOCUMENTS, change: CHANGE_DOCUMENTS };
    figures.extend(of_subject(&subject, &SHARES, rounds)?.0);
    server.stop(Stop::Fast)?;
    Ok(figures)
}

/// What rounds took, in seconds, and moved, in bytes.
#[derive(Debug, Default)]
struct Took {
    ours: Vec<f64>,
    theirs: Vec<f64>,
    stored: Vec<f64>,
    stored_at_least: Vec<f64>,
    read: Vec<f64>,
    read_at_least: Vec<f64>,
    /// What the peer's repository grew by.
    stored_by_peer: Vec<f64>,
    share_of_pages: Vec<f64>,
    /// Of full backups: ours, the peer's, and the pages in them.
    full: [Vec<f64>; 3],
    /// Changed pages as they are, and files that are always whole as they are stored.
    pages: Vec<f64>,
    whole_stored: Vec<f64>,
}

/// Everything of ours and of the peer over one server.
struct Pair {
    ours: Ours,
    peer: Pgbackrest,
    repository: PathBuf,
    repository_of_peer: PathBuf,
    scratch: Scratch,
}

/// Both over new repositories.
fn pair(subject: &Subject<'_>, name: &str) -> Result<Pair> {
    let scratch = Scratch::new(name)?;
    let repository = scratch.directory(&format!("{name}-repo1"))?;
    let store = Store::directory("repo1", &repository);
    let ours = Ours::start(&scratch, name, subject.server, &store, Road::Coordinator)?;
    archive_by(subject.server, &ours.archive_command()?)?;
    ours.wait_reported(subject.server.name())?;
    let name = format!("{name}-pgbackrest");
    let peer = Pgbackrest::set_up(&scratch, &name, subject.server, ServerState::Running, Repository::Directory)?;
    let repository_of_peer = scratch.path().join(format!("{name}-repo"));
    Ok(Pair { ours, peer, repository, repository_of_peer, scratch })
}

impl Pair {
    fn ours(&self, backup_type: &str) -> Result<(String, f64)> {
        let command = self.ours.operator.command(&["backup", CLUSTER, "--start-fast", "--type", backup_type])?;
        let took = lap(command)?;
        Ok((took.answer, took.seconds))
    }

    fn theirs(&self, backup_type: &str) -> Result<f64> {
        let command = self.peer.command(&[&format!("--type={backup_type}"), "--no-archive-check", "backup"]);
        Ok(lap(command)?.seconds)
    }

    /// Bytes of the data directory that a backup read.
    fn read_bytes(&self, backup: &str) -> Result<f64> {
        let told = self.ours.operator.json(&["operations", CLUSTER])?;
        let operations = told["operations"].as_array().cloned().unwrap_or_default();
        let operation = operations.iter().find(|one| one["backup"] == *backup).context("no such operation")?;
        operation["bytes_done"].as_f64().context("an operation without bytes")
    }

    /// Bytes of a backup's own objects.
    fn stored_bytes(&self, backup: &str) -> Result<f64> {
        Ok(bytes_below(&self.repository.join(format!("c/{CLUSTER}/b/{backup}")))? as f64)
    }
}

fn bytes_below(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        // Links are not followed: pgbackrest has one to its newest backup.
        let found = entry.metadata()?;
        bytes += if found.is_dir() { bytes_below(&entry.path())? } else { found.len() };
    }
    Ok(bytes)
}

fn of_subject(subject: &Subject<'_>, shares: &[(u32, &str, Bound)], rounds: usize) -> Result<(Vec<Figure>, Vec<Took>)> {
    let pair = pair(subject, subject.name)?;
    let name = subject.name;
    let (mut figures, mut all, mut nothing) = (Vec::new(), Vec::new(), Took::default());
    for (one_in, share, longest) in shares {
        let mut took = Took::default();
        for _ in 0..rounds {
            round(&pair, subject, *one_in, &mut took)?;
            let (_, seconds) = pair.ours("incr")?;
            nothing.ours.push(seconds);
            nothing.theirs.push(pair.theirs("incr")?);
        }
        let after = |what: &str| format!("{name}, increment after {share} changed, {what}");
        let bound = if *longest == Bound::None { Bound::None } else { Bound::RatioAtMost(BYTES_MAX) };
        figures.extend([
            Figure::against(after("s"), median(&took.ours), median(&took.theirs), *longest),
            megabytes(after("stored against the changed pages, MB"), &took.stored, &took.stored_at_least, bound),
            megabytes(after("stored against pgbackrest, MB"), &took.stored, &took.stored_by_peer, Bound::None),
            megabytes(after("read against the changed pages, MB"), &took.read, &took.read_at_least, bound),
            Figure::alone(after("share of the pages, %"), median(&took.share_of_pages) * 100.0, Bound::None),
        ]);
        all.push(took);
    }
    let what = format!("{name}, increment with nothing changed, s");
    figures.push(Figure {
        peer: Some(median(&nothing.theirs)),
        ..Figure::alone(what, median(&nothing.ours), Bound::AtMost(NOTHING_MAX_SECONDS))
    });
    archive_by(subject.server, ARCHIVE_NOWHERE)?;
    pair.ours.end()?;
    Ok((figures, all))
}

/// A full backup of each tool, the change, an increment of each.
fn round(pair: &Pair, subject: &Subject<'_>, one_in: u32, took: &mut Took) -> Result<()> {
    let (full, _) = pair.ours("full")?;
    let before = bytes_below(&pair.repository_of_peer)?;
    pair.theirs("full")?;
    let with_full = bytes_below(&pair.repository_of_peer)?;
    subject.change(one_in)?;
    let (backup, seconds) = pair.ours("incr")?;
    took.ours.push(seconds);
    took.theirs.push(pair.theirs("incr")?);
    took.stored_by_peer.push((bytes_below(&pair.repository_of_peer)? - with_full) as f64);
    took.full[0].push(pair.stored_bytes(&full)?);
    took.full[1].push((with_full - before) as f64);
    note(pair, subject, &full, &backup, took)
}

/// The large cluster, with what was measured at the share of the pages that it is reckoned with.
fn reckoned(took: &Took) -> Vec<Figure> {
    let pages = median(&took.full[2]);
    let whole = median(&took.whole_stored);
    let of = |full: &[f64], increment: &[f64]| Measured {
        full: median(full) / pages,
        changed: (median(increment) - whole).max(0.0) / median(&took.pages),
    };
    let (ours, theirs) =
        (of(&took.full[0], &took.stored).layered(), of(&took.full[1], &took.stored_by_peer).weekly_full());
    let line = |what: &str, ours: f64, theirs: f64| {
        let measure = format!("reckoned: 10 TB, 1 % of the pages a day, kept 30 days, against weekly full: {what}, GB");
        Figure::against(measure, ours / 1e9, theirs / 1e9, Bound::None)
    };
    vec![line("sent a day", ours.sent_a_day, theirs.sent_a_day), line("stored", ours.held, theirs.held)]
}

fn megabytes(measure: String, ours: &[f64], against: &[f64], bound: Bound) -> Figure {
    Figure::against(measure, median(ours) / 1e6, median(against) / 1e6, bound)
}

fn note(pair: &Pair, subject: &Subject<'_>, full: &str, backup: &str, took: &mut Took) -> Result<()> {
    let told = pair.ours.told(backup)?;
    ensure!(told["parent"] == *full, "not built on {full}: {told}");
    let start = pair.ours.told(full)?["start_lsn"]["text"].as_str().context("a backup without start")?.to_owned();
    let least: Changed = changed::since(subject.server.data(), subject.version()?, start.parse::<Lsn>()?)?;
    took.stored.push(pair.stored_bytes(backup)?);
    took.stored_at_least.push(least.stored_bytes());
    took.read.push(pair.read_bytes(backup)?);
    took.read_at_least.push(least.read_bytes());
    took.full[2].push(least.all_bytes as f64);
    took.pages.push(least.pages_bytes as f64);
    took.whole_stored.push(least.whole_stored_bytes as f64);
    took.share_of_pages.push(least.pages_bytes as f64 / least.all_bytes as f64);
    Ok(())
}

/// A full backup and many increments on it: what a restore of the last one costs beside one of the first.
fn chain(subject: &Subject<'_>) -> Result<Vec<Figure>> {
    let pair = pair(subject, "chain")?;
    let (full, _) = pair.ours("full")?;
    let mut last = full.clone();
    for _ in 0..CHAIN {
        subject.change(CHAIN_SHARE)?;
        let (backup, _) = pair.ours("incr")?;
        last = backup;
    }
    let (mut of_full, mut of_last) = (Vec::new(), Vec::new());
    for round in 0..3 {
        of_full.push(restore(&pair, &full, round)?);
        of_last.push(restore(&pair, &last, round)?);
    }
    archive_by(subject.server, ARCHIVE_NOWHERE)?;
    pair.ours.end()?;
    Ok(vec![Figure::against(
        format!("restore of a full backup and {CHAIN} increments, against the full backup, s"),
        median(&of_last),
        median(&of_full),
        Bound::RatioAtMost(CHAIN_RATIO_MAX),
    )])
}

fn restore(pair: &Pair, backup: &str, round: usize) -> Result<f64> {
    let target = pair.scratch.path().join(format!("{backup}-{round}"));
    let to = target.display().to_string();
    rustix::fs::sync();
    let arguments = ["restore", CLUSTER, "--backup", backup, "--immediate", "--to", &to];
    let seconds = lap(pair.ours.operator.command_alone(&arguments)?)?.seconds;
    ensure!(target.join("PG_VERSION").is_file(), "nothing was restored");
    fs::remove_dir_all(&target).context("the restored directory")?;
    Ok(seconds)
}
