//! A hybrid backup is under way, all of the standby's files are sent, and somebody goes away: the coordinator, the
//! standby's agent, the primary's server. Either it is finished as if nothing had been, or it ends with its reason, the
//! primary runs no backup any more, and the next one is good.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::postgres::{Server, Stop};
use tests::scenario::{self, Stage};
use tests::world::{CLUSTER, DIRECTORY, World};
use tests::{program, wait};

use super::{PATIENCE, SEGMENT_BYTES, begin_and_stop, end_of, holds_nothing, under_way};
use crate::increment::{Taken, dump, expect_restorable};
use crate::resume;

/// Longer than a question is repeated, and than pings are apart, which are 10 s.
const LEASE_SECONDS: u64 = 15;
/// What a primary grants whom it hears nothing of.
const LEASE: Duration = Duration::from_secs(90);

fn announce_death(stage: &mut Stage) {
    for part in ["agent", "server", "node", "connection", "WAL"] {
        stage.announce(part, "coordinators, agents and servers are killed in this scenario");
    }
}

/// The only backup that is published, whole.
fn only_backup(world: &World) -> Result<String> {
    let mut published = world.backups(SEGMENT_BYTES)?;
    let only = published.pop().context("no backup is published")?;
    ensure!(published.is_empty(), "{published:?} are published too");
    Ok(only)
}

#[test]
fn a_hybrid_backup_outlives_the_coordinator_and_not_its_absence() {
    scenario::play("hybrid-coordinator", |stage| {
        announce_death(stage);
        let (mut world, mut primary, mut standby) = under_way(stage, |server| server.pgbench_init(1))?;
        world.coordinator.kill()?;
        world.coordinator.start()?;
        standby.agent.process()?.thaw()?;
        let (state, error) = end_of(&world)?;
        ensure!(state == "done", "{state}: {error}");
        wait::until("the primary holds nothing", PATIENCE, || holds_nothing(&primary.server))?;
        let first = only_backup(&world)?;

        // It stays away: the standby gives up, and then the primary, each by itself.
        for (node, patience) in [
            (&mut primary, format!("agent/held-lease={LEASE_SECONDS}")),
            (&mut standby, "agent/primary-asked=3".to_owned()),
        ] {
            node.agent.kill()?;
            node.agent.shorten(&patience);
            node.agent.start()?;
        }
        world.wait_reported("db1")?;
        begin_and_stop(&world, &primary, &mut standby)?;
        world.coordinator.kill()?;
        standby.agent.process()?.thaw()?;
        wait::until("the primary holds nothing", PATIENCE, || holds_nothing(&primary.server))?;
        let said = program::read_log(primary.agent.log_path());
        ensure!(said.contains(&format!("the standby was silent for {LEASE_SECONDS} s")), "{said}");
        world.coordinator.start()?;
        let (state, error) = end_of(&world)?;
        let reason = "primary db1, which holds the backup, cannot be asked about it";
        ensure!(state == "failed" && error.contains(reason), "{state}: {error}");
        ensure!(only_backup(&world)? == first, "a backup that failed is published");
        primary.server.sql("update pgbench_accounts set abalance = aid where aid % 100 = 7")?;
        let held = dump(&primary.server)?;
        world.wait_reported("db1")?;
        world.wait_reported("db2")?;
        // What it did not send again lies in the first one.
        let backup = resume::next_backup(&world, &["--shape", "hybrid"])?;
        let taken = resume::entry(&world.look(DIRECTORY)?, &backup)?;
        ensure!(taken["parent"] == *first, "it is not built on the first one: {taken}");
        expect_restorable(&stage.scratch, &world, &Taken { backup, dump: held })?;
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}

#[test]
fn a_standby_whose_agent_died_goes_on_at_once() {
    scenario::play("hybrid-agent", |stage| {
        announce_death(stage);
        let (world, primary, mut standby) = under_way(stage, resume::fill)?;
        let held = dump(&primary.server)?;
        standby.agent.kill()?;
        ensure!(!holds_nothing(&primary.server)?, "the primary gave up what the standby may still want");
        let died = Instant::now();
        standby.agent.start()?;
        world.wait_reported("db2")?;
        let backup = resume::next_backup(&world, &["--shape", "hybrid"])?;
        ensure!(died.elapsed() < LEASE, "the next one waited until the lease was over");
        let taken = resume::entry(&world.look(DIRECTORY)?, &backup)?;
        let attempts = taken["attempts"].as_array().map_or(0, Vec::len);
        ensure!(attempts == 1 && taken["inherited_bytes"] != 0, "it did not go on from the first one: {taken}");
        wait::until("the primary holds nothing", PATIENCE, || holds_nothing(&primary.server))?;
        ensure!(only_backup(&world)? == backup, "another one is published");
        expect_restorable(&stage.scratch, &world, &Taken { backup, dump: held })?;
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}

#[test]
fn a_failover_ends_a_hybrid_backup_and_the_next_is_of_the_new_line() {
    scenario::play("hybrid-failover", |stage| {
        announce_death(stage);
        for part in ["promot", "timeline", "archive"] {
            stage.announce(part, "the primary fails over to another standby in this scenario");
        }
        let (world, mut primary, mut standby) = under_way(stage, |server| server.pgbench_init(1))?;
        let heir = world.standby(&stage.scratch, &primary, "db3")?;
        // Else the server asks the agent that stands still about histories.
        standby.server.sql("alter system set restore_command = ''")?;
        standby.server.reload()?;
        primary.server.sql("create table before as select i from generate_series(1, 1000) i")?;
        let last = primary.server.text("select pg_current_wal_flush_lsn()")?;
        for server in [&standby.server, &heir.server] {
            wait::until("the standbys have all", PATIENCE, || {
                Ok(server.text(&format!("select pg_last_wal_replay_lsn() >= '{last}'"))? == "t")
            })?;
        }
        primary.server.stop(Stop::Immediate)?;
        heir.server.ask_promotion()?;
        heir.server.wait_promoted(Duration::from_secs(30))?;
        follow(&standby.server, &heir.server)?;
        heir.server.sql("create table after as select i from generate_series(1, 2000) i")?;
        standby.agent.process()?.thaw()?;
        let (state, error) = end_of(&world)?;
        let told = error.contains("primary db1 has given the backup up") || error.contains("changed its timeline");
        ensure!(state == "failed" && told, "{state}: {error}");
        ensure!(world.backups(SEGMENT_BYTES)?.is_empty(), "a backup of a primary that died was published");

        standby.server.sql("alter system reset restore_command")?;
        standby.server.reload()?;
        world.wait_reported("db3")?;
        heir.archive_now()?;
        let hybrid = ["backup", CLUSTER, "--shape", "hybrid", "--node", "db2", "--start-fast"];
        wait::until("db2 is backed up with its new primary", PATIENCE, || world.operator.ok(&hybrid).map(|_| true))?;
        let info = world.operator.json(&["info", CLUSTER])?;
        let told = &info["clusters"][0]["backups"][0];
        ensure!((told["node"].as_str(), told["primary"].as_str()) == (Some("db2"), Some("db3")), "{told}");
        let held = dump(&heir.server)?;
        expect_restorable(&stage.scratch, &world, &Taken { backup: only_backup(&world)?, dump: held })
    });
}

/// Has a standby stream from another primary, and waits until it is on its timeline.
fn follow(standby: &Server, primary: &Server) -> Result<()> {
    standby.sql(&format!("alter system set primary_conninfo = '{}'", primary.conninfo()))?;
    standby.reload()?;
    wait::until("the standby follows the new primary", PATIENCE, || {
        Ok(standby.number("select received_tli from pg_stat_wal_receiver")? == 2)
    })
    .map(|_| ())
}
