//! Hybrid backups of a standby that follows the archive alone, with tablespaces that lie elsewhere than the primary's: it
//! comes to the start by itself, or the backup ends with the reason why it did not.

use anyhow::{Context, Result, ensure};
use tests::account;
use tests::scenario::{self, Stage};
use tests::wait;
use tests::world::{CLUSTER, Node, NodePlan, Stores, World};

use super::{PATIENCE, SEGMENT_BYTES, announce_trouble, end_of, holds_nothing};
use crate::SMALL;
use crate::increment::{Taken, dump, expect_restorable_to};

/// How long such a standby may replay nothing here: longer than the 5 s after which the primary is asked for a segment.
const STALLED_SECONDS: u64 = 7;

/// A standby without a connection to its primary, its tablespace in another place.
fn archive_standby(stage: &Stage, world: &World, primary: &Node, place: &str, other: &str) -> Result<Node> {
    let mapping = format!("--tablespace-mapping={place}={other}");
    let server = primary.server.copy_with(&stage.scratch, "db2", &[&mapping])?;
    server.configure(&[("wal_retrieve_retry_interval", "'500ms'")])?;
    account::write_owned(&server.data().join("standby.signal"), "")?;
    let mut standby = world.node(&stage.scratch, server, &NodePlan::default())?;
    standby.agent.start()?;
    standby.server.start()?;
    world.wait_reported("db2")?;
    Ok(standby)
}

/// Starts the standby's agent again, with another patience for replay that stands still.
fn restart(world: &World, standby: &mut Node, patience: &str) -> Result<()> {
    standby.agent.kill()?;
    standby.agent.shorten(patience);
    standby.agent.start()?;
    world.wait_reported("db2")
}

/// Begins a hybrid backup that must fail, and gives its reason.
fn reason_of_failure(world: &World, primary: &Node) -> Result<String> {
    world.operator.ok(&["backup", CLUSTER, "--shape", "hybrid", "--start-fast", "--no-wait"])?;
    let (state, error) = end_of(world)?;
    ensure!(state == "failed", "{state}: {error}");
    wait::until("the primary holds nothing", PATIENCE, || holds_nothing(&primary.server))?;
    Ok(error)
}

#[test]
fn a_standby_that_follows_the_archive_alone_comes_to_the_start_or_tells_why_not() {
    scenario::play("hybrid-archive", |stage| {
        announce_trouble(stage);
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        let directory = |name: &str| Ok::<_, anyhow::Error>(stage.scratch.directory(name)?.display().to_string());
        let (place, other, restored_to) = (directory("space1")?, directory("space2")?, directory("space3")?);
        primary.server.sql(&format!("create tablespace far location '{place}'"))?;
        primary.server.sql("create table far_away tablespace far as select i from generate_series(1, 20000) i")?;
        primary.server.sql("create index on far_away (i) tablespace far")?;
        let oid = primary.server.text("select oid from pg_tablespace where spcname = 'far'")?;
        let mut standby = archive_standby(stage, &world, &primary, &place, &other)?;
        world.back_up(&["--shape", "hybrid"])?;

        standby.server.sql("select pg_wal_replay_pause()")?;
        let reason = reason_of_failure(&world, &primary)?;
        ensure!(reason.contains("replay is paused; it has replayed up to"), "{reason}");
        standby.server.sql("select pg_wal_replay_resume()")?;

        restart(&world, &mut standby, &format!("agent/replay-stalled={STALLED_SECONDS}"))?;
        standby.server.sql("alter system set restore_command = 'false'")?;
        standby.server.reload()?;
        let reason = reason_of_failure(&world, &primary)?;
        ensure!(reason.contains(&format!("it replayed nothing for {STALLED_SECONDS} s; ")), "{reason}");
        standby.server.sql("alter system reset restore_command")?;
        standby.server.reload()?;
        restart(&world, &mut standby, "")?;
        ensure!(world.backups(SEGMENT_BYTES)?.len() == 1, "a backup that failed is published");

        primary.server.sql("update far_away set i = i + 100000 where i % 500 = 3")?;
        let held = dump(&primary.server)?;
        world.back_up(&["--shape", "hybrid"])?;
        let newest = world.backups(SEGMENT_BYTES)?.pop().context("no backup")?;
        let map = format!("{oid}={restored_to}");
        let taken = Taken { backup: newest, dump: held.replace(&place, &restored_to) };
        expect_restorable_to(&stage.scratch, &world, &taken, &["--immediate", "--tablespace-map", &map])
    });
}
