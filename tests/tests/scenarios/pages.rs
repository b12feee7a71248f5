//! The proof that increments lose nothing: after random work, and each kind of record that changes relations otherwise than
//! block by block, every page of a restored increment equals that of the full backup before it, both recovered to the moment
//! at which the increment ended. What may differ is blanked as PostgreSQL blanks it when it checks its own recovery
//! (`tests::mask`). With and without data checksums and `wal_log_hints`, which decide what reaches WAL.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use postgres_format::relation::TablespaceVersion;
use tests::account::environment;
use tests::mask::PAGE_BYTES;
use tests::pages::{Compared, compare};
use tests::postgres::installation::CHOICE;
use tests::postgres::{Checksums, InitOptions, Server, Stop};
use tests::scenario::Stage;
use tests::work::Work;
use tests::world::{CLUSTER, Node, Stores, World};
use tests::{scenario, special, wait};

use crate::SMALL;
use crate::increment::{expect, expect_sound};

/// Random statements before each increment.
const STEPS: usize = 20;
/// Longest recovery.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(120);
/// Pages in a full file of a relation.
const SEGMENT_BLOCKS: i64 = 131_072;
/// Differences that are shown.
const SHOWN: usize = 20;

#[test]
fn every_page_is_right_with_checksums() {
    prove("pages-checksums", 1, Checksums::On, "off", Files::Short);
}

#[test]
fn every_page_is_right_with_checksums_and_logged_hints() {
    // A gibibyte takes its time: only where a run is for one version, which is the long form.
    let files = if environment(CHOICE).is_some() { Files::Several } else { Files::Short };
    prove("pages-both", 2, Checksums::On, "on", files);
}

#[test]
fn every_page_is_right_with_logged_hints() {
    prove("pages-hints", 3, Checksums::Off, "on", Files::Short);
}

#[test]
fn every_page_is_right_without_checksums_and_logged_hints() {
    prove("pages-plain", 4, Checksums::Off, "off", Files::Short);
}

/// Whether there is a table of more than one file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Files {
    Short,
    Several,
}

fn prove(name: &str, seed: u64, checksums: Checksums, log_hints: &str, files: Files) {
    scenario::play(name, |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = started(stage, &world, checksums, log_hints, files)?;
        prove_on(stage, &world, &primary, (seed, files)).with_context(|| format!("seed {seed}"))
    });
}

fn prove_on(stage: &Stage, world: &World, primary: &Node, (seed, files): (u64, Files)) -> Result<()> {
    let scratch = &stage.scratch;
    let server = &primary.server;
    let mut work = Work::new(seed, server);
    work.prepare(&[scratch.directory("space0")?, scratch.directory("space1")?])?;
    let directory = scratch.directory("space2")?;
    special::known(server).try_for_each(|special| special::play(server, special.before, &directory))?;
    server.pgbench_init(1)?;
    let full = world.back_up(&[])?.trim().to_owned();
    let load = server.pgbench(50)?;
    work.play(STEPS)?;
    if files == Files::Several {
        // The last page of the first file, and a second file.
        server.sql("insert into long select i, repeat('x', 400) from generate_series(1, 25000) i")?;
    }
    let first = world.back_up(&[])?.trim().to_owned();
    work.play(STEPS)?;
    special::known(server).try_for_each(|special| special::play(server, special.act, &directory))?;
    if files == Files::Several {
        server.sql(&format!("delete from long where ctid >= '({SEGMENT_BLOCKS},0)'"))?;
        server.sql("vacuum long")?;
        ensure!(server.number("select pg_relation_size('long') / 8192")? == SEGMENT_BLOCKS, "it was not cut short");
    }
    // Under load, so that pages are caught in the middle of their changes.
    let second = world.back_up(&[])?.trim().to_owned();
    drop(load);
    primary.archive_now()?;
    expect(world, &first, "incr", Some(&full), "change_maps")?;
    let told = expect(world, &second, "incr", Some(&first), "change_maps")?;
    let stop = told["stop_lsn"]["text"].as_str().context("no stop")?.to_owned();
    let moved = Moved { spaces: spaces(server)?, version: version(server)? };
    let replayed = moved.recover(stage, world, "replayed", &full, &stop)?;
    let mut restored = moved.recover(stage, world, "restored", &second, &stop)?;
    let compared = moved.compare(&replayed, &restored)?;
    eprintln!("{} pages of {} files, {} of them masked", compared.pages, compared.files, compared.masked);
    if !compared.differing.is_empty() {
        let shown: Vec<String> = compared.differing.iter().take(SHOWN).map(ToString::to_string).collect();
        bail!("{} of {} pages differ:\n{}", compared.differing.len(), compared.pages, shown.join("\n"));
    }
    ensure!(compared.masked > 0 && compared.pages > 5000, "{compared:?}");
    moved.expect_bite(server, &replayed, &restored)?;
    restored.start()?;
    expect_sound(&restored)?;
    expect_visible(&restored)
}

/// In every database no visibility map calls a page visible to all, or frozen, that is not.
fn expect_visible(server: &Server) -> Result<()> {
    for database in server.sql("select datname from pg_database where datallowconn")?.into_iter().flatten() {
        let statement = "select coalesce(sum((select count(*) from pg_check_visible(oid)) +
             (select count(*) from pg_check_frozen(oid))), 0) from pg_class where relkind in ('r', 'm', 't')";
        let extension = "create extension if not exists pg_visibility";
        let said = server.tool("psql", &["-qAt", "-d", &database, "-c", extension, "-c", statement])?.ok()?;
        ensure!(said.trim() == "0", "{said} rows of {database} contradict a visibility map");
    }
    Ok(())
}

/// A primary with an agent, set up as the proof wants it.
fn started(stage: &Stage, world: &World, checksums: Checksums, log_hints: &str, files: Files) -> Result<Node> {
    let mut server = Server::init(&stage.scratch, "db1", InitOptions { checksums, ..SMALL })?;
    server.configure(&[
        ("wal_log_hints", log_hints),
        ("max_prepared_transactions", "10"),
        ("autovacuum_naptime", "'1s'"),
        ("max_wal_size", "'64MB'"),
    ])?;
    if files == Files::Several {
        // Pages of zeros are how relations grow; a file of nothing else takes no room.
        server.start()?;
        server.sql("create table long (i int, t text)")?;
        let path = server.data().join(server.text("select pg_relation_filepath('long')")?);
        server.stop(Stop::Fast)?;
        fs::File::options().write(true).open(path)?.set_len(SEGMENT_BLOCKS as u64 * PAGE_BYTES as u64)?;
    }
    let mut node = world.node(&stage.scratch, server, &Default::default())?;
    node.server.start()?;
    let system = node.server.system_identifier()?.to_string();
    world.operator.ok(&["cluster", "create", CLUSTER, "--system-identifier", &system])?;
    node.agent.start()?;
    world.wait_reported("db1")?;
    Ok(node)
}

fn spaces(server: &Server) -> Result<Vec<String>> {
    let rows = server.sql("select oid from pg_tablespace where spcname like 'space%' order by 1")?;
    Ok(rows.into_iter().flatten().collect())
}

fn version(server: &Server) -> Result<TablespaceVersion> {
    let catalog_version = server.number("select catalog_version_no from pg_control_system()")?;
    Ok(TablespaceVersion {
        postgres_major: server.installation().major,
        catalog_version: u32::try_from(catalog_version)?,
    })
}

/// What restores beside their origin need.
struct Moved {
    /// Tablespaces, which must lie elsewhere.
    spaces: Vec<String>,
    version: TablespaceVersion,
}

impl Moved {
    /// Restores a backup, recovers it to a position, and stops it with everything written out. Nobody connects meanwhile:
    /// even reading would change pages.
    fn recover(&self, stage: &Stage, world: &World, name: &str, backup: &str, lsn: &str) -> Result<Server> {
        let mut arguments = vec!["--backup".to_owned(), backup.to_owned(), "--target-lsn".to_owned(), lsn.to_owned()];
        for space in &self.spaces {
            let place = stage.scratch.directory(&format!("{name}-{space}"))?;
            arguments.extend(["--tablespace-map".to_owned(), format!("{space}={}", place.display())]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (data, said) = world.restore(&stage.scratch, name, &arguments)?;
        said.ok().with_context(|| format!("restore of {backup}"))?;
        let mut server = Server::at(&stage.scratch, name, data)?;
        server.own_socket()?;
        server.configure(&[("autovacuum", "off"), ("max_logical_replication_workers", "0")])?;
        server.launch()?;
        wait::until(&format!("{name} is recovered"), RECOVERY_PATIENCE, || {
            ensure!(server.is_running(), "{name} ended");
            Ok(server.log().contains("database system is ready to accept connections"))
        })?;
        server.stop(Stop::Fast)?;
        Ok(server)
    }

    fn compare(&self, one: &Server, other: &Server) -> Result<Compared> {
        compare(one.data(), other.data(), self.version)
    }

    /// One byte of one row is enough to be noticed.
    fn expect_bite(&self, origin: &Server, one: &Server, other: &Server) -> Result<()> {
        let path = PathBuf::from(origin.text("select pg_relation_filepath('pgbench_accounts')")?);
        let file = fs::File::options().read(true).write(true).open(other.data().join(&path))?;
        let (block, mut byte) = (3, [0]);
        // Rows are packed from the end of a page; these end in padding.
        let at = (block + 1) * PAGE_BYTES as u64 - 16;
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 1], at)?;
        let compared = self.compare(one, other)?;
        let named: Vec<(PathBuf, u32)> =
            compared.differing.iter().map(|page| (page.path.clone(), page.block)).collect();
        ensure!(named == [(path, u32::try_from(block)?)], "a changed byte was told as {named:?}");
        file.write_all_at(&byte, at)?;
        Ok(())
    }
}
