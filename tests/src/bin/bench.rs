//! `make bench`: figures against the peers, one line of TSV each; see `tests::bench`.
//!
//! ```text
//! make bench                          everything
//! make bench ARGS="shim drain"        these measures: shim drain text changes s3 backlog fetch backup s3-backup increment
//!                                     relations delta-restore restore-memory
//! make bench ARGS="--material DIR"    keeps what is measured on in DIR, or takes it from there
//! make bench ARGS="--as-built"        measures the programs as they lie in the release directory, without building them
//! ```
//!
//! Builds our programs as they are installed and runs those, against the pgbackrest that `PATH` has first; put a newer one
//! than Debian's there, and its version is printed. Exit code 1 when a bound is missed.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use tests::account::{self, Build, Scratch};
use tests::bench::bucket::SharedBucket;
use tests::bench::calls::{self, Calls};
use tests::bench::figure::Figure;
use tests::bench::material::Material;
use tests::bench::{archiving, backups, changes, fetching, increments, pgbackrest, relations, restores};
use tests::postgres::installation;

/// Segments in a set.
const SEGMENTS: usize = 64;
/// Rounds of measures that take a second or two each.
const ROUNDS: usize = 5;
/// Rounds of the longer ones.
const LONG_ROUNDS: usize = 3;

/// Every measure.
const MEASURES: [&str; 13] = [
    "shim",
    "drain",
    "text",
    "changes",
    "s3",
    "backlog",
    "fetch",
    "backup",
    "s3-backup",
    "increment",
    "relations",
    "delta-restore",
    "restore-memory",
];

struct Options {
    measures: Vec<String>,
    material: Option<PathBuf>,
    programs: Programs,
}

#[derive(PartialEq, Eq)]
enum Programs {
    Fresh,
    AsBuilt,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [verb, specification] = arguments.as_slice()
        && verb == calls::VERB
    {
        Calls::play(specification)?;
        return Ok(true);
    }
    if let [verb, directory, entry] = arguments.as_slice()
        && verb == restores::VERB
    {
        restores::look(directory, entry)?;
        return Ok(true);
    }
    let options = parse(&arguments)?;
    if options.programs == Programs::Fresh {
        build()?;
    }
    account::choose_build(Build::Installed);
    versions()?;
    let scratch = Scratch::new("bench")?;
    let mut material = Material::take_or_make(&scratch, options.material.as_deref(), SEGMENTS)?;
    for set in [&material.pgbench, &material.text] {
        println!(
            "# {}: {} segments, zstd -3 makes them {:.1}:1",
            set.name,
            set.files.len(),
            archiving::compression_ratio(set)?
        );
    }
    println!("measure\tours\tpeer\tratio\tbound\tverdict");
    let mut kept = true;
    for measure in &options.measures {
        let figures = take(measure, &mut material).with_context(|| format!("measure {measure}"))?;
        for figure in figures {
            println!("{figure}");
            kept &= figure.verdict() != Some(false);
        }
    }
    Ok(kept)
}

fn parse(arguments: &[String]) -> Result<Options> {
    let mut options = Options { measures: Vec::new(), material: None, programs: Programs::Fresh };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--material" => options.material = Some(rest.next().context("--material needs a directory")?.into()),
            "--as-built" => options.programs = Programs::AsBuilt,
            measure if MEASURES.contains(&measure) => options.measures.push(measure.to_owned()),
            other => bail!("{other} is no measure; there are {}", MEASURES.join(" ")),
        }
    }
    if options.measures.is_empty() {
        options.measures = MEASURES.map(str::to_owned).to_vec();
    }
    Ok(options)
}

/// The programs as they are installed: built by their own packages alone, so that no feature of the tests leaks in.
fn build() -> Result<()> {
    let arguments = ["build", "--release", "--locked", "--quiet", "-p", "agent", "-p", "coordinator", "-p", "cli"];
    let status = Command::new("cargo").args(arguments).status().context("cannot run cargo")?;
    ensure!(status.success(), "the programs do not build");
    Ok(())
}

fn versions() -> Result<()> {
    let server = installation::newest()?.program("postgres");
    let server = server.to_str().context("PostgreSQL lies in an odd place")?.to_owned();
    for (program, argument) in [(server.as_str(), "--version"), ("pgbackrest", "version"), ("zstd", "--version")] {
        println!("# {}", pgbackrest::version_line(program, argument)?);
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("# load before: {}; processors: {}", load.trim(), std::thread::available_parallelism()?);
    Ok(())
}

fn take(measure: &str, material: &mut Material) -> Result<Vec<Figure>> {
    match measure {
        "shim" => archiving::shim(material),
        "drain" => archiving::drain(material, &material.pgbench, ROUNDS),
        "text" => archiving::drain(material, &material.text, LONG_ROUNDS),
        "changes" => Ok([changes::maps(&material.pgbench, ROUNDS)?, changes::maps(&material.text, ROUNDS)?].concat()),
        "s3" => archiving::to_bucket(material, LONG_ROUNDS, &SharedBucket::start()?),
        "backlog" => archiving::backlog(SEGMENTS),
        "fetch" => fetching::fetch(material, LONG_ROUNDS),
        "backup" => backups::to_place(material, LONG_ROUNDS, backups::Place::Directory),
        "s3-backup" => backups::to_place(material, LONG_ROUNDS, backups::Place::Bucket(&SharedBucket::start()?)),
        "increment" => increments::all(material, LONG_ROUNDS),
        "relations" => relations::one_page_each(&SharedBucket::start()?),
        "delta-restore" => restores::onto_what_is_there(material, LONG_ROUNDS),
        "restore-memory" => restores::memory(),
        other => bail!("{other} is no measure"),
    }
}
