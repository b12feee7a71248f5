//! Restores: to any moment, from the repository alone, onto other places, refused when impossible, never cut short.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tests::account::{self, Scratch, environment};
use tests::fleet::{Operator, Store};
use tests::ledger::{self, Ledger, Moment};
use tests::postgres::{Server, Started, Stop};
use tests::proxy::Proxy;
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Node, Stores, World, start_restored};
use tests::{program, scenario, wait};

use crate::SMALL;

/// Moments restored to in the check of A3.
const MOMENTS: usize = 20;

/// A world with a backup and a ledger that went on after it.
struct Written {
    world: World,
    primary: Node,
    moments: Vec<Moment>,
    /// The restore point `here` lies between this moment and the next.
    named: Moment,
}

impl Written {
    fn set_up(scratch: &Scratch, stores: Stores, commits: u64) -> Result<Self> {
        let world = World::started(scratch, stores)?;
        let primary = world.primary(scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        primary.server.pgbench_init(1)?;
        let ledger = Ledger::start(&primary.server, 100)?;
        let load = primary.server.pgbench(200)?;
        ledger.advance(20)?;
        world.back_up(&[])?;
        // Only what was committed after the backup ended can be a target.
        let first = ledger.next()?.commits;
        ledger.advance(commits)?;
        drop(load);
        let mut moments = ledger.stop();
        let named = moments.last().cloned().context("the ledger did not move")?;
        primary.server.sql("select pg_create_restore_point('here')")?;
        let ledger = Ledger::start(&primary.server, 100)?;
        ledger.advance(20)?;
        moments.extend(ledger.stop());
        primary.archive_now()?;
        moments.retain(|moment| moment.commits > first);
        Ok(Self { world, primary, moments, named })
    }

    fn last(&self) -> Result<&Moment> {
        self.moments.last().context("the ledger did not move")
    }
}

/// The steps of a restore.
pub(crate) const STEPS: [&str; 3] =
    ["restore/after-mark-before-clear", "restore/after-range-before-next", "restore/after-files-before-control"];

#[test]
fn twenty_random_moments_under_load_have_the_right_sums() {
    let seed =
        environment("PGCONVOY_TEST_SEED").and_then(|text| text.parse().ok()).unwrap_or_else(|| rand::rng().random());
    println!("restore-moments: PGCONVOY_TEST_SEED={seed}");
    scenario::play("restore-moments", |stage| {
        let mut random = StdRng::seed_from_u64(seed);
        let written = Written::set_up(&stage.scratch, Stores::Any, 600)?;
        // The very last moment is no target by time: nothing was committed after it.
        let candidates = &written.moments[..written.moments.len() - 1];
        for number in 0..MOMENTS {
            let moment = &candidates[random.random_range(0..candidates.len())];
            let target = match number % 3 {
                0 => ["--target-time", &moment.time],
                1 => ["--target-lsn", &moment.lsn],
                _ => ["--target-xid", &moment.xid],
            };
            let name = format!("r{number}");
            let restored = written.world.restored(&stage.scratch, &name, &target)?;
            ledger::expect_moment(&restored, moment).with_context(|| format!("{target:?}, seed {seed}"))?;
            expect_pgbench_sums(&restored)?;
            let data = restored.data().to_owned();
            drop(restored);
            fs::remove_dir_all(data)?;
        }
        Ok(())
    });
}

/// pgbench's own invariant: every consistent state has equal sums.
pub(crate) fn expect_pgbench_sums(server: &Server) -> Result<()> {
    let equal = server.text(
        "select (select sum(abalance) from pgbench_accounts) = (select sum(tbalance) from pgbench_tellers)
            and (select sum(tbalance) from pgbench_tellers) = (select sum(bbalance) from pgbench_branches)",
    )?;
    ensure!(equal == "t", "pgbench's sums differ");
    Ok(())
}

#[test]
fn every_kind_of_target_is_reached() {
    scenario::play("restore-targets", |stage| {
        let written = Written::set_up(&stage.scratch, Stores::Any, 100)?;
        let world = &written.world;
        let named = world.restored(&stage.scratch, "named", &["--target-name", "here"])?;
        ledger::expect_moment(&named, &written.named)?;
        let latest = world.restored(&stage.scratch, "latest", &["--latest"])?;
        ledger::expect_moment(&latest, written.last()?)?;
        let at_once = world.restored(&stage.scratch, "immediate", &["--immediate"])?;
        let held = ledger::holding(&at_once)?;
        ensure!(held.commits <= written.moments[0].commits, "immediate went on to {held:?}");
        let moment = &written.moments[written.moments.len() / 2];
        let before = world.restored(&stage.scratch, "before", &["--target-xid", &moment.xid, "--exclusive"])?;
        ensure!(ledger::holding(&before)?.commits == moment.commits - 1, "--exclusive included the target");
        // A clone must not archive into its origin's archive.
        ensure!(latest.text("show archive_mode")? == "off", "a clone archives");
        Ok(())
    });
}

#[test]
fn a_restore_needs_nothing_but_the_repository() {
    scenario::play("restore-alone", |stage| {
        stage.announce("the store is refused", "the directory is carried away in this scenario");
        let mut written = Written::set_up(&stage.scratch, Stores::Any, 100)?;
        let last = written.last()?.clone();
        written.primary.agent.kill()?;
        written.primary.server.kill()?;
        written.world.coordinator.kill()?;
        written.world.coordinator.delete_state()?;
        let mut stores = written.world.stores.clone();
        if let Some(directory) = &written.world.directory {
            // Somebody carries a copy of the directory elsewhere.
            let elsewhere = stage.scratch.path().join("elsewhere");
            fs::rename(directory, &elsewhere)?;
            stores = vec![Store::directory(DIRECTORY, &elsewhere)];
        }
        let seat = Operator::set_up(&stage.scratch, "seat", None, &stores, None)?;
        let info = seat.alone(&["info", CLUSTER])?.ok()?;
        ensure!(info.contains(CLUSTER), "{info}");
        let data = stage.scratch.path().join("restored-data");
        seat.alone(&["restore", CLUSTER, "--to", &data.display().to_string()])?.ok()?;
        let mut verify = account::command(written.primary.server.installation().program("pg_verifybackup"));
        verify.arg("--no-parse-wal").arg(&data);
        program::run(verify, Duration::from_secs(60))?.ok().context("pg_verifybackup")?;
        let restored = start_restored(&stage.scratch, "restored", &data)?;
        ledger::expect_moment(&restored, &last)?;
        expect_pgbench_sums(&restored)
    });
}

#[test]
fn impossible_restores_are_refused_before_the_disk_is_touched() {
    scenario::play("restore-refused", |stage| {
        stage.announce("the store is refused", "the directory is away in this scenario");
        let written = Written::set_up(&stage.scratch, Stores::Both, 60)?;
        let refused: [(&str, &[&str]); 6] = [
            ("later than the archive", &["--target-time", "2199-01-01 00:00:00+00"]),
            ("earlier than the backup", &["--target-time", "2001-01-01 00:00:00+00"]),
            ("an LSN before the backup", &["--target-lsn", "0/1"]),
            ("an LSN after the archive", &["--target-lsn", "FFF/0"]),
            ("a timeline that is not", &["--target-timeline", "77"]),
            ("a backup that is not", &["--backup", "20200101T000000Z-00000000"]),
        ];
        for (number, (what, arguments)) in refused.into_iter().enumerate() {
            let (data, said) = written.world.restore(&stage.scratch, &format!("refused{number}"), arguments)?;
            ensure!(!matches!(said.code, Some(0) | None), "{what} was restored: {said:?}");
            ensure!(!said.err.trim().is_empty(), "{what}: no reason was given");
            ensure!(!data.exists(), "{what}: the disk was touched");
        }
        // A directory that holds something is not ours to fill.
        let full = stage.scratch.directory("full-data")?;
        account::write_owned(&full.join("precious"), "x")?;
        let (data, said) = written.world.restore(&stage.scratch, "full", &[])?;
        ensure!(said.code != Some(0) && fs::read_dir(&data)?.count() == 1, "{said:?}");
        // A store that cannot be read makes the end of the archive unknown, until it is left out by name.
        let directory = written.world.directory.clone().context("no directory")?;
        let away = directory.with_extension("away");
        fs::rename(&directory, &away)?;
        let (data, said) = written.world.restore(&stage.scratch, "away", &[])?;
        ensure!(said.code != Some(0) && !data.exists(), "restored with a store unknown: {said:?}");
        ensure!(said.err.contains("--without-store"), "the way out is not told: {}", said.err);
        let without = written.world.restored(&stage.scratch, "without", &["--without-store", DIRECTORY])?;
        fs::rename(&away, &directory)?;
        ledger::expect_moment(&without, written.last()?)
    });
}

/// What becomes of the only store during a recovery.
enum Outage {
    Begins,
    Ends,
}

#[test]
fn an_outage_during_recovery_never_promotes_short() {
    scenario::play("restore-outage", |stage| {
        stage.announce("refused", "the directory is away in this scenario");
        let written = Written::set_up(&stage.scratch, Stores::Directory, 400)?;
        let directory = written.world.directory.clone().context("no directory")?;
        let away = directory.with_extension("away");
        recovers_whole(&stage.scratch, &written, &written.world.operator, |outage| match outage {
            Outage::Begins => Ok(fs::rename(&directory, &away)?),
            Outage::Ends => Ok(fs::rename(&away, &directory)?),
        })
    });
}

#[test]
fn an_outage_of_the_bucket_during_recovery_never_promotes_short() {
    scenario::play("restore-outage-s3", |stage| {
        stage.announce("unavailable", "the bucket is away in this scenario");
        let written = Written::set_up(&stage.scratch, Stores::Bucket, 400)?;
        let service = written.world.s3.as_ref().context("no S3 service")?;
        let mut link = Proxy::start(service.address())?;
        let stores = [Store::s3(BUCKET, service.bucket().through(link.address()))];
        let seat = Operator::set_up(&stage.scratch, "seat", None, &stores, None)?;
        recovers_whole(&stage.scratch, &written, &seat, |outage| match outage {
            Outage::Begins => {
                link.refuse();
                Ok(())
            }
            Outage::Ends => link.open(),
        })
    });
}

/// Restores from the seat's only store, which is away from the first request of the recovery on: the server must
/// neither open nor believe that the archive ends.
fn recovers_whole(
    scratch: &Scratch,
    written: &Written,
    seat: &Operator,
    mut store: impl FnMut(Outage) -> Result<()>,
) -> Result<()> {
    let data = scratch.path().join("restored-data");
    seat.alone(&["restore", CLUSTER, "--to", &data.display().to_string()])?.ok()?;
    let mut server = Server::at(scratch, "restored", data)?;
    server.own_socket()?;
    server.configure(&[("recovery_min_apply_delay", "0")])?;
    store(Outage::Begins)?;
    server.launch()?;
    wait::holds("not promoted", Duration::from_secs(8), || {
        Ok(!server.log().contains("database system is ready to accept connections"))
    })?;
    store(Outage::Ends)?;
    if !server.is_running() {
        // It gave up with FATAL, which a restart heals.
        ensure!(server.try_start(Duration::from_secs(60))? == Started::Ready, "{}", server.log());
    }
    wait::until("the server answers", Duration::from_secs(120), || {
        Ok(server.text("select pg_is_in_recovery()").is_ok_and(|answer| answer == "f"))
    })?;
    ledger::expect_moment(&server, written.last()?)
}

#[test]
fn a_data_directory_becomes_a_backup_again() {
    scenario::play("restore-delta", |stage| {
        let written = Written::set_up(&stage.scratch, Stores::Any, 60)?;
        let world = &written.world;
        let mut server = world.restored(&stage.scratch, "again", &["--target-lsn", &written.moments[0].lsn])?;
        server.sql("create table stray as select generate_series(1, 100000) i; delete from pgbench_accounts")?;
        let data = server.data().to_owned();
        let again = |arguments: &[&str]| world.restore(&stage.scratch, "again", arguments).map(|(_, said)| said);
        let said = again(&["--delta", "--confirm"])?;
        ensure!(said.code == Some(5) && said.err.contains("running server"), "{said:?}");
        server.stop(Stop::Fast)?;
        drop(server);
        for arguments in [&[][..], &["--delta"]] {
            let said = again(arguments)?;
            ensure!(said.code == Some(5) && data.join("global/pg_control").exists(), "{said:?}");
        }
        again(&["--delta", "--confirm"])?.ok()?;
        let mut verify = account::command(written.primary.server.installation().program("pg_verifybackup"));
        verify.arg("--no-parse-wal").arg(&data);
        program::run(verify, Duration::from_secs(60))?.ok().context("pg_verifybackup")?;
        let said = again(&["--delta", "--confirm"])?.ok()?;
        ensure!(!said.is_empty(), "the plan is printed");
        let restored = start_restored(&stage.scratch, "again", &data)?;
        ledger::expect_moment(&restored, written.last()?)?;
        expect_pgbench_sums(&restored)?;
        // Nobody's and another cluster's directories stay as they are.
        let other = stage.scratch.directory("other-data")?;
        account::write_owned(&other.join("precious"), "x")?;
        let (_, said) = world.restore(&stage.scratch, "other", &["--delta", "--confirm"])?;
        ensure!(said.code == Some(5) && other.join("precious").exists(), "{said:?}");
        Ok(())
    });
}

#[test]
fn a_restored_standby_follows_its_primary() {
    scenario::play("restore-standby", |stage| {
        let written = Written::set_up(&stage.scratch, Stores::Any, 60)?;
        let conninfo = format!("primary_conninfo={}", written.primary.server.conninfo());
        let (data, said) =
            written.world.restore(&stage.scratch, "standby", &["--standby", "--recovery-option", &conninfo])?;
        said.ok()?;
        let mut standby = Server::at(&stage.scratch, "standby", data)?;
        standby.own_socket()?;
        standby.start()?;
        let ledger = Ledger::start(&written.primary.server, 50)?;
        ledger.advance(20)?;
        ledger.stop();
        let held = ledger::holding(&written.primary.server)?;
        wait::until("the standby follows", Duration::from_secs(60), || Ok(ledger::holding(&standby)? == held))?;
        ensure!(standby.text("select pg_is_in_recovery()")? == "t", "the standby was promoted");
        Ok(())
    });
}

#[test]
fn tablespaces_come_back_where_they_are_wanted() {
    scenario::play("restore-tablespaces", |stage| {
        let world = World::started(&stage.scratch, Stores::Any)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        let place = stage.scratch.directory("space")?;
        primary.server.sql(&format!("create tablespace far location '{}'", place.display()))?;
        primary.server.sql("create table far_away tablespace far as select generate_series(1, 1000) i")?;
        let oid = primary.server.text("select oid from pg_tablespace where spcname = 'far'")?;
        world.back_up(&[])?;
        primary.archive_now()?;
        let nowhere = stage.scratch.path().join("nowhere").display().to_string();
        let unknown = ["restore", CLUSTER, "--to", &nowhere, "--tablespace-map", "1=/other", "--dry-run"];
        let text = world.operator.run(&unknown)?.exits(5)?;
        ensure!(text.contains(&format!("expected {oid} ({})", place.display())), "{text}");
        let other = stage.scratch.path().join("other-space");
        let map = format!("{oid}={}", other.display());
        let restored = world.restored(&stage.scratch, "restored", &["--tablespace-map", &map])?;
        ensure!(restored.number("select count(*) from far_away")? == 1000);
        let shown = restored.text(&format!("select pg_tablespace_location({oid})"))?;
        ensure!(shown == other.display().to_string(), "the tablespace lies in {shown}");
        Ok(())
    });
}

/// What a statement gives in a database, or what psql says.
fn in_database(server: &Server, database: &str, statement: &str) -> Result<program::Said> {
    server.tool("psql", &["-X", "-At", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", statement])
}

#[test]
fn one_database_of_three_is_restored_by_its_name() {
    scenario::play("restore-database", |stage| {
        let world = World::started(&stage.scratch, Stores::Any)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        for database in ["one", "two", "three"] {
            primary.server.sql(&format!("create database {database}"))?;
            let table = "create table t as select i, md5(i::text) from generate_series(1, 20000) i";
            in_database(&primary.server, database, table)?.ok()?;
        }
        world.back_up(&[])?;
        for database in ["one", "two"] {
            in_database(&primary.server, database, "update t set i = -i where i % 3 = 0; create index on t (i)")?
                .ok()?;
        }
        primary.archive_now()?;
        let sum = "select count(*), sum(i) from t";
        let expected = in_database(&primary.server, "two", sum)?.ok()?;

        let (data, said) = world.restore(&stage.scratch, "unknown", &["--database", "four"])?;
        let names = ["four", "postgres (", "one (", "two (", "three ("];
        ensure!(said.code == Some(5) && names.iter().all(|name| said.err.contains(name)), "{said:?}");
        ensure!(!data.exists(), "the disk was touched");
        let (data, said) = world.restore(&stage.scratch, "dry", &["--database", "two", "--dry-run"])?;
        let forecast = said.ok()?;
        for part in ["files ", "reads ", "takes ", "hold zeros"] {
            ensure!(forecast.contains(part) && !data.exists(), "{part}: {forecast}");
        }

        let (data, said) = world.restore(&stage.scratch, "two", &["--database", "two"])?;
        ensure!(said.err.contains("one (") && said.err.contains("drop these databases"), "{said:?}");
        said.ok()?;
        let restored = start_restored(&stage.scratch, "two", &data)?;
        let found = in_database(&restored, "two", &format!("set enable_indexscan = on; {sum}"))?.ok()?;
        ensure!(found.ends_with(&expected), "{found} instead of {expected}");
        in_database(&restored, "two", "insert into t values (0, 'new'); create table more as select * from t")?.ok()?;
        for database in ["one", "three"] {
            let said = in_database(&restored, database, "select count(*) from t")?;
            ensure!(said.code != Some(0), "database {database} of zeros answers: {said:?}");
            restored.sql(&format!("drop database {database}"))?;
        }
        ensure!(!restored.log().contains("PANIC"), "a database of zeros took the server down");
        ensure!(restored.number("select count(*) from pg_database where datname in ('one', 'three')")? == 0);
        restored.sql("checkpoint")?;
        Ok(())
    });
}

#[test]
fn a_killed_restore_is_gone_on_with_and_pg_wal_lies_elsewhere() {
    scenario::play("restore-killed", |stage| {
        let mut written = Written::set_up(&stage.scratch, Stores::Any, 60)?;
        // pg_wal of the primary is moved to another disk, and so is that of what is restored.
        written.primary.server.stop(Stop::Fast)?;
        let (own, moved) = (written.primary.server.data().join("pg_wal"), stage.scratch.path().join("primary-wal"));
        fs::rename(&own, &moved)?;
        std::os::unix::fs::symlink(&moved, &own)?;
        written.primary.server.start()?;
        written.world.back_up(&["--type", "full"])?;
        written.primary.archive_now()?;
        let world = &written.world;
        let (data, wal) = (stage.scratch.path().join("killed-data"), stage.scratch.path().join("fast/wal"));
        let (to, map) = (data.display().to_string(), format!("pg_wal={}", wal.display()));
        let fixed = ["restore", CLUSTER, "--to", &to, "--link-map", &map];
        let [mark, range, files] = STEPS;
        let again = &["--delta", "--confirm"][..];
        let deaths = [(range, &[][..]), (mark, again), (range, again), (files, again)];
        for (point, arguments) in deaths {
            let mut command = world.operator.command(&[&fixed, arguments].concat())?;
            command.env("PGCONVOY_CRASH_AT", point);
            let said = program::run(command, Duration::from_secs(120))?;
            ensure!(said.code.is_none(), "it lived on at {point}: {said:?}");
            ensure!(!data.join("global/pg_control").exists(), "{point}: what is left can be started");
            let said = world.operator.alone(&fixed)?;
            ensure!(said.code == Some(5) && said.err.contains("--delta --confirm"), "{point}: {said:?}");
        }
        let said = world.operator.alone(&[&fixed, &["--delta", "--confirm"][..]].concat())?;
        ensure!(said.err.contains("were there already"), "{said:?}");
        said.ok()?;
        let mut verify = account::command(written.primary.server.installation().program("pg_verifybackup"));
        verify.arg("--no-parse-wal").arg(&data);
        program::run(verify, Duration::from_secs(60))?.ok().context("pg_verifybackup")?;
        ensure!(fs::read_link(data.join("pg_wal"))? == wal, "pg_wal does not lead to {}", wal.display());
        let restored = start_restored(&stage.scratch, "killed", &data)?;
        ledger::expect_moment(&restored, written.last()?)?;
        expect_pgbench_sums(&restored)?;
        let segment = restored.switch_wal()?;
        ensure!(wal.join(&segment).exists(), "{segment} is not where WAL was wanted");
        let (_, said) = world.restore(&stage.scratch, "plain", &[])?;
        ensure!(said.code == Some(0) && said.err.contains("pg_wal was a link to"), "{said:?}");
        Ok(())
    });
}
