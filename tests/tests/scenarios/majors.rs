//! Every major version that we support, in short: a primary with a standby under load, a full backup from the one and an
//! increment from the other and one from both together, restores to a point in time that pg_verifybackup checks before this version's server
//! recovers them.
//!
//! The servers are those of `tests/servers.sh`. Where one is missing its scenario is left out, except in continuous
//! integration (`CI` is set), where that is a failure. `make test-majors` plays the long form: other scenarios, each on
//! every version.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tests::account::{self, environment};
use tests::ledger::{self, Ledger, Moment};
use tests::postgres::{InitOptions, Server, installation};
use tests::scenario::Stage;
use tests::world::{CLUSTER, Stores, World, start_restored};
use tests::{program, scenario, wait};

use crate::SMALL;
use crate::restore::expect_pgbench_sums;

/// Segments of [`SMALL`].
const SEGMENT_BYTES: u64 = 1 << 20;
/// Longest run of pg_verifybackup.
const VERIFY_PATIENCE: Duration = Duration::from_secs(60);
/// Longest time a standby may lag.
const FOLLOW_PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn postgresql_14_is_archived_backed_up_and_restored() {
    on_major(14);
}

#[test]
fn postgresql_15_is_archived_backed_up_and_restored() {
    on_major(15);
}

#[test]
fn postgresql_16_is_archived_backed_up_and_restored() {
    on_major(16);
}

#[test]
fn postgresql_17_is_archived_backed_up_and_restored() {
    on_major(17);
}

#[test]
fn postgresql_18_is_archived_backed_up_and_restored() {
    on_major(18);
}

fn on_major(major: u32) {
    scenario::play(&format!("major{major}"), |stage| {
        if installation::of_major(major).is_none() {
            ensure!(environment("CI").is_none(), "there is no PostgreSQL {major} here; tests/servers.sh fetches it");
            stage.leave_out(&format!("PostgreSQL {major}"), "a server of that version (make servers fetches it)");
            return Ok(());
        }
        from_archive_to_restored_server(stage, major)
    });
}

fn from_archive_to_restored_server(stage: &Stage, major: u32) -> Result<()> {
    let scratch = &stage.scratch;
    let world = World::started(scratch, Stores::Directory)?;
    let primary = world.primary(scratch, "db1", InitOptions { major: Some(major), ..SMALL })?;
    ensure!(primary.server.number("select current_setting('server_version_num')::int / 10000")? == i64::from(major));
    if major >= 17 {
        // Its summaries lie in pg_wal, which no backup copies.
        primary.server.sql("alter system set summarize_wal = on")?;
        primary.server.reload()?;
    }
    ledger::create(&primary.server)?;
    primary.server.pgbench_init(1)?;
    let standby = world.standby(scratch, &primary, "db2")?;
    world.operator.ok(&["check", CLUSTER])?;
    let ledger = Ledger::start(&primary.server, 100)?;
    let load = primary.server.pgbench(200)?;
    ledger.advance(50)?;
    world.back_up(&["--from", "primary"])?;
    let between = (ledger.advance(30)?, ledger.advance(1)?).0;
    follow_a_checkpoint(&primary.server, &standby.server)?;
    world.back_up(&["--from", "standby"])?;
    let after = (ledger.advance(30)?, ledger.advance(1)?).0;
    world.back_up(&["--shape", "hybrid"])?;
    let last = (ledger.advance(50)?, ledger.advance(10)?).0;
    drop(load);
    ledger.stop();
    primary.archive_now()?;
    world.expect_whole(&[&primary], 1)?;
    let backups = world.backups(SEGMENT_BYTES)?;
    let [from_primary, from_standby, from_both] = backups.as_slice() else { bail!("{backups:?}") };
    expect_increment(&world, from_standby, from_primary)?;
    expect_increment(&world, from_both, from_standby)?;
    drop(standby);
    expect_restored(stage, &world, "first", from_primary, ["--target-time", &between.time], &between)?;
    expect_restored(stage, &world, "second", from_standby, ["--target-lsn", &after.lsn], &after)?;
    expect_restored(stage, &world, "third", from_both, ["--target-lsn", &last.lsn], &last)
}

/// A standby's backup starts at the last checkpoint that it has replayed, which must lie behind the end of the backup that
/// it builds on.
fn follow_a_checkpoint(primary: &Server, standby: &Server) -> Result<()> {
    primary.sql("checkpoint")?;
    let written = primary.text("select pg_current_wal_lsn()")?;
    let replayed = format!("select pg_last_wal_replay_lsn() >= '{written}'");
    wait::until("the standby has replayed a checkpoint", FOLLOW_PATIENCE, || Ok(standby.text(&replayed)? == "t"))
        .map(|_| ())
}

/// Fails unless a backup holds what changed since another one, as this version's WAL tells it.
fn expect_increment(world: &World, backup: &str, parent: &str) -> Result<()> {
    let info = world.operator.json(&["info", CLUSTER])?;
    let backups = info["clusters"][0]["backups"].as_array().cloned().unwrap_or_default();
    let told = backups.into_iter().find(|one| one["backup"] == backup).context("info does not tell of the backup")?;
    let found = (told["type"].as_str(), told["parent"].as_str(), told["changes"]["method"].as_str());
    ensure!(found == (Some("incr"), Some(parent), Some("change_maps")), "{told}");
    Ok(())
}

fn expect_restored(
    stage: &Stage,
    world: &World,
    name: &str,
    backup: &str,
    target: [&str; 2],
    moment: &Moment,
) -> Result<()> {
    let (data, said) = world.restore(&stage.scratch, name, &[&["--backup", backup], &target[..]].concat())?;
    said.ok().with_context(|| format!("restore of {backup}"))?;
    expect_verified(&Server::at(&stage.scratch, name, data.clone())?, &data)?;
    let restored = start_restored(&stage.scratch, name, &data)?;
    ledger::expect_moment(&restored, moment)?;
    expect_pgbench_sums(&restored)
}

/// Has the server's own pg_verifybackup compare what was restored with the manifest that the restore wrote. A server
/// without client programs has it done by a newer one, which knows its manifest too.
fn expect_verified(server: &Server, data: &Path) -> Result<()> {
    let mut verify = account::command(server.installation().program("pg_verifybackup"));
    verify.arg("--no-parse-wal").arg(data);
    program::run(verify, VERIFY_PATIENCE)?.ok().context("pg_verifybackup").map(|_| ())
}
