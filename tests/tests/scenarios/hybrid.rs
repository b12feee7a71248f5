//! Backups of the hybrid shape: a standby's files, started and stopped by its primary, with what must come from there.

mod deaths;
mod laggards;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::ledger::{self, Ledger, Moment};
use tests::postgres::Server;
use tests::scenario::{self, Stage};
use tests::world::{CLUSTER, DIRECTORY, Node, Stores, World, start_restored};
use tests::{account, program, wait};

use crate::SMALL;

const SEGMENT_BYTES: u64 = 1 << 20;
/// Longest run of a backup, or until it has failed.
const PATIENCE: Duration = Duration::from_secs(100);

/// The crash points of the primary's agent while it holds a backup.
pub(crate) const STEPS: &[&str] =
    &["agent/after-held-start-before-part", "agent/after-part-before-held-stop", "agent/after-held-stop-before-answer"];

/// Starts a hybrid backup of db2 that nobody waits for.
const BEGIN: [&str; 8] = ["backup", CLUSTER, "--shape", "hybrid", "--type", "full", "--start-fast", "--no-wait"];

fn announce_trouble(stage: &mut Stage) {
    for part in ["coordinator", "unavailable", "direct", "road", "session", "backup", "operation"] {
        stage.announce(part, "a hybrid backup is interrupted in this scenario");
    }
}

#[test]
fn hybrid_backups_hold_both_servers_parts_and_restore_to_any_moment() {
    scenario::play("hybrid", |stage| {
        stage.announce("session", "an agent is started again in this scenario");
        let world = World::started(&stage.scratch, Stores::Both)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        primary.server.pgbench_init(2)?;
        // What only the primary says of itself.
        primary.server.sql("alter system set vacuum_cost_limit = 1234")?;
        let standby = world.standby(&stage.scratch, &primary, "db2")?;
        standby.server.sql("alter system set vacuum_cost_limit = 4321")?;
        // Only a backup of the primary's own overrides that.
        primary.server.sql("alter system set full_page_writes = off")?;
        primary.server.reload()?;
        primary.agent.kill()?;
        primary.agent.start()?;
        world.wait_reported("db1")?;
        let refused = world.operator.run(&["backup", CLUSTER, "--shape", "standby"])?;
        ensure!(refused.code != Some(0) && refused.err.contains("only the hybrid shape is possible"), "{refused:?}");
        let ledger = Ledger::start(&primary.server, 50)?;
        let load = primary.server.pgbench(100)?;
        ledger.advance(10)?;
        world.back_up(&["--type", "full", "--label", "both"])?;
        let between = ledger.advance(30)?;
        world.back_up(&["--shape", "hybrid"])?;
        let after = ledger.advance(30)?;
        ledger.advance(10)?;
        drop(load);
        ledger.stop();
        primary.archive_now()?;
        let holdings = world.expect_whole(&[&primary], 1)?;
        drop(holdings);

        let info = world.operator.json(&["info", CLUSTER])?;
        let told = info["clusters"][0]["backups"].as_array().cloned().unwrap_or_default();
        ensure!(told.len() == 2, "{told:?}");
        for backup in &told {
            let who = (backup["node"].as_str(), backup["primary"].as_str(), backup["from_standby"].as_bool());
            ensure!(who == (Some("db2"), Some("db1"), Some(false)), "{backup}");
        }
        let method = |at: usize| (told[at]["type"].as_str(), told[at]["changes"]["method"].as_str());
        let increment = (0..2).find(|at| told[*at]["type"] == "incr").context("no increment")?;
        ensure!(method(increment) == (Some("incr"), Some("change_maps")), "{told:?}");
        let full = told[1 - increment]["backup"].as_str().context("no name")?.to_owned();
        let increment = told[increment]["backup"].as_str().context("no name")?.to_owned();
        let text = world.operator.ok(&["info", CLUSTER])?;
        ensure!(text.contains("from standby db2, started and stopped by primary db1"), "{text}");
        let operations = world.operator.json(&["operations", CLUSTER])?.to_string();
        for part in ["\"primary\":\"db1\"", "because full_page_writes is off there", "starts and stops it, as asked"] {
            ensure!(operations.contains(part), "{part} in {operations}");
        }
        expect_restored(stage, &world, "first", &full, &between)?;
        expect_restored(stage, &world, "second", &increment, &after)?;
        let latest = world.restored(&stage.scratch, "latest", &["--backup", &increment, "--latest"])?;
        ensure!(latest.text("show vacuum_cost_limit")? == "1234", "the configuration is not its");
        expect_sums(&latest)
    });
}

/// What pgbench does leaves all sums equal.
fn expect_sums(server: &Server) -> Result<()> {
    let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(bbalance) from pgbench_branches) \
                and (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history)";
    ensure!(server.text(sums)? == "t", "the sums differ");
    Ok(())
}

fn expect_restored(stage: &Stage, world: &World, name: &str, backup: &str, moment: &Moment) -> Result<()> {
    let (data, said) = world.restore(&stage.scratch, name, &["--backup", backup, "--target-lsn", &moment.lsn])?;
    said.ok().with_context(|| format!("restore of {backup}"))?;
    let bin = Server::at(&stage.scratch, name, data.clone())?;
    let mut verify = account::command(bin.installation().program("pg_verifybackup"));
    verify.arg("--no-parse-wal").arg(&data);
    program::run(verify, Duration::from_secs(60))?.ok().context("pg_verifybackup")?;
    let restored = start_restored(&stage.scratch, name, &data)?;
    ledger::expect_moment(&restored, moment)?;
    expect_sums(&restored)
}

/// A world with a hybrid backup under way: all of the standby's files are sent, and its agent stands still.
fn under_way(stage: &mut Stage, fill: impl FnOnce(&Server) -> Result<()>) -> Result<(World, Node, Node)> {
    announce_trouble(stage);
    let world = World::started(&stage.scratch, Stores::Directory)?;
    let primary = world.primary(&stage.scratch, "db1", SMALL)?;
    fill(&primary.server)?;
    let mut standby = world.standby(&stage.scratch, &primary, "db2")?;
    begin_and_stop(&world, &primary, &mut standby)?;
    Ok((world, primary, standby))
}

/// Begins a hybrid backup, and has the standby's agent stand still once all of its files are sent.
fn begin_and_stop(world: &World, primary: &Node, standby: &mut Node) -> Result<()> {
    standby.agent.kill()?;
    standby.agent.start_stopping_at("agent/after-packs-before-backup-stop")?;
    world.wait_reported("db2")?;
    world.operator.ok(&BEGIN)?;
    wait::until("the standby's part is sent", PATIENCE, || standby.agent.process()?.is_frozen())?;
    ensure!(!holds_nothing(&primary.server)?, "the primary does not hold the backup");
    Ok(())
}

/// The newest operation, once it has ended, with its error.
fn end_of(world: &World) -> Result<(String, String)> {
    let mut end = (String::new(), String::new());
    wait::until("the backup has ended", PATIENCE, || {
        let told = world.operator.json(&["operations", CLUSTER])?;
        let newest = &told["operations"][0];
        let text = |name: &str| newest[name].as_str().unwrap_or_default().to_owned();
        end = (text("state"), text("error"));
        Ok(end.0 == "done" || end.0 == "failed")
    })?;
    Ok(end)
}

/// Whether a server runs no backup: its agent has no session but the one that it asks questions on.
fn holds_nothing(server: &Server) -> Result<bool> {
    let sessions =
        "select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()";
    Ok(server.number(sessions)? <= 1)
}

#[test]
fn a_hybrid_backup_ends_with_its_reason_wherever_the_primarys_agent_dies() {
    scenario::play("hybrid-steps", |stage| {
        announce_trouble(stage);
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.server.pgbench_init(1)?;
        let _standby = world.standby(&stage.scratch, &primary, "db2")?;
        for (number, point) in STEPS.iter().enumerate() {
            primary.agent.kill()?;
            primary.agent.start_crashing_at(point)?;
            world.wait_reported("db1")?;
            world.operator.ok(&BEGIN)?;
            wait::until("the primary's agent has died", PATIENCE, || Ok(!primary.agent.is_running()))?;
            primary.agent.start()?;
            let (state, error) = end_of(&world)?;
            let published = world.look(DIRECTORY)?.backups(SEGMENT_BYTES)?.len();
            // Of the first start the standby heard nothing: it was made again.
            match number {
                0 => ensure!(state == "done" && published == 1, "{point}: {state}: {error}"),
                _ => ensure!(
                    state == "failed" && error.contains("primary db1") && published == 1,
                    "{point}: {state}: {error}, {published} backups"
                ),
            }
            wait::until("the primary holds nothing", PATIENCE, || holds_nothing(&primary.server))?;
        }
        world.wait_reported("db1")?;
        world.back_up(&["--shape", "hybrid"])?;
        let restored = world.restored(&stage.scratch, "restored", &["--latest"])?;
        ensure!(restored.number("select count(*) from pgbench_accounts")? == 100_000);
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}

#[test]
fn a_promotion_aborts_a_hybrid_backup() {
    scenario::play("hybrid-promoted", |stage| {
        stage.announce("promot", "the standby is promoted in the middle of a backup");
        let (world, primary, mut standby) = under_way(stage, |server| server.pgbench_init(1))?;
        // Else the server asks the agent that stands still about histories.
        standby.server.sql("alter system set restore_command = ''")?;
        standby.server.reload()?;
        standby.server.ask_promotion()?;
        standby.server.wait_promoted(Duration::from_secs(30))?;
        standby.agent.process()?.thaw()?;
        let (state, error) = end_of(&world)?;
        ensure!(state == "failed" && error.contains("promot"), "{state}: {error}");
        ensure!(world.look(DIRECTORY)?.backups(SEGMENT_BYTES)?.is_empty(), "a backup of two histories was published");
        wait::until("the primary holds nothing", PATIENCE, || holds_nothing(&primary.server))?;
        Ok(())
    });
}
