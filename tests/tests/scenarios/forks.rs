//! Right after a failover the old primary's WAL goes on past the fork, and the new one's is not all archived yet.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::postgres::Server;
use tests::world::{CLUSTER, Node, Stores, World};
use tests::{scenario, wait};

use crate::SMALL;

/// What both lines know, and what each alone does.
const TOLD: &str = "select string_agg(who, ' ' order by who) from told";

struct Parted {
    world: World,
    old: Node,
    new: Node,
}

/// A standby was promoted beside its primary, which committed and archived once more; the new one has archived its history.
fn parted(stage: &scenario::Stage) -> Result<Parted> {
    let world = World::started(&stage.scratch, Stores::Any)?;
    let old = world.primary(&stage.scratch, "db1", SMALL)?;
    old.server.sql("create table told (who text)")?;
    world.back_up(&[])?;
    let new = world.standby(&stage.scratch, &old, "db2")?;
    old.server.sql("insert into told values ('both')")?;
    wait::until("the standby has it", Duration::from_secs(30), || Ok(new.server.text(TOLD)? == "both"))?;
    new.server.ask_promotion()?;
    new.server.wait_promoted(Duration::from_secs(10))?;
    old.server.sql("insert into told values ('old')")?;
    old.archive_now()?;
    wait::until("the new timeline's history is stored", Duration::from_secs(60), || {
        let held: Result<Vec<_>> = world.stores.iter().map(|store| world.look(&store.name)).collect();
        Ok(held?.iter().all(|holdings| holdings.histories.contains_key("00000002.history")))
    })?;
    Ok(Parted { world, old, new })
}

#[test]
fn without_the_new_timelines_segment_a_restore_ends_at_the_fork_and_a_standby_waits() {
    scenario::play("fork-restore", |stage| {
        let Parted { world, mut old, new } = parted(stage)?;
        old.server.kill()?;
        old.agent.kill()?;
        new.server.sql("insert into told values ('young')")?;

        let at_fork = world.restored(&stage.scratch, "at-fork", &[])?;
        ensure!(at_fork.text(TOLD)? == "both", "past the fork: {}", at_fork.text(TOLD)?);
        let named = world.restored(&stage.scratch, "named", &["--target-timeline", "2"])?;
        ensure!(named.text(TOLD)? == "both", "past the fork: {}", named.text(TOLD)?);
        let parent = world.restored(&stage.scratch, "parent", &["--target-timeline", "1"])?;
        ensure!(parent.text(TOLD)? == "both old", "{}", parent.text(TOLD)?);

        // By the archive alone it waits before the fork, by streaming it gets past it.
        let waiting = standby(stage, &world, "waiting", &[])?;
        wait::pause(Duration::from_secs(8));
        ensure!(!waiting.text(TOLD)?.contains("old"), "the standby follows the dead line");
        let conninfo = format!("primary_conninfo={}", new.server.conninfo());
        let streaming = standby(stage, &world, "streaming", &["--recovery-option", &conninfo])?;
        let both = |server: &Server| Ok(server.text(TOLD)? == "both young");
        wait::until("the streaming standby has the new row", Duration::from_secs(60), || both(&streaming))?;
        new.archive_now()?;
        wait::until("the waiting standby has the new row", Duration::from_secs(60), || both(&waiting))?;
        Ok(())
    });
}

fn standby(stage: &scenario::Stage, world: &World, name: &str, options: &[&str]) -> Result<Server> {
    let (data, said) = world.restore(&stage.scratch, name, &[&["--standby"], options].concat())?;
    said.ok()?;
    let mut server = Server::at(&stage.scratch, name, data)?;
    server.own_socket()?;
    server.start()?;
    Ok(server)
}

#[test]
fn a_standby_of_the_dead_line_is_fit_for_no_backup() {
    scenario::play("fork-standby", |stage| {
        let Parted { world, mut old, new } = parted(stage)?;
        // It reads the old line on purpose, and nobody else does.
        let diverged = old.server.copy(&stage.scratch, "db3")?;
        diverged.configure(&[("recovery_target_timeline", "'1'"), ("primary_conninfo", "''")])?;
        tests::account::write_owned(&diverged.data().join("standby.signal"), "")?;
        let mut node = world.node(&stage.scratch, diverged, &Default::default())?;
        node.agent.start()?;
        node.server.start()?;
        old.server.kill()?;
        old.agent.kill()?;
        new.server.sql("insert into told values ('young')")?;
        new.archive_now()?;
        world.wait_reported("db3")?;
        let checked = world.operator.run(&["check", CLUSTER])?;
        ensure!(checked.code == Some(1), "the check is content: {checked:?}");
        ensure!(checked.out.contains("which timeline 2 of the primary db2 left at"), "{}", checked.out);
        let said = world.operator.run(&["backup", CLUSTER, "--node", "db3"])?;
        ensure!(said.code != Some(0) && said.err.contains("what follows there is lost"), "{said:?}");
        world.back_up(&[])?;
        let restored = world.restored(&stage.scratch, "restored", &[])?;
        ensure!(restored.text(TOLD)? == "both young", "{}", restored.text(TOLD)?);
        Ok(())
    });
}

#[test]
fn wal_that_was_lost_after_the_plan_opens_no_server_short() {
    scenario::play("fork-gap", |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.server.sql("create table told (who text)")?;
        world.back_up(&[])?;
        let mut archived = Vec::new();
        for who in ["1", "2", "3", "4"] {
            primary.server.sql(&format!("insert into told values ('{who}')"))?;
            archived.push(primary.archive_now()?);
        }
        let (data, said) = world.restore(&stage.scratch, "short", &[])?;
        said.ok()?;
        // The last but one is a gap, the last one is an end that comes too early.
        for lost in [&archived[2..3], &archived[3..]] {
            for name in lost {
                let directory = world.directory.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
                let removed = std::process::Command::new("find")
                    .args([directory.as_str(), "-name", &format!("{name}.*"), "-delete"])
                    .status()?;
                ensure!(removed.success());
            }
            let auto = data.join("postgresql.auto.conf");
            let text = std::fs::read_to_string(&auto)?.replace(" --cluster", " --wait 2s --cluster");
            tests::account::write_owned(&auto, &text)?;
            let mut server = Server::at(&stage.scratch, "short", data.clone())?;
            server.own_socket()?;
            server.launch()?;
            server.wait_ended(Duration::from_secs(60))?;
            ensure!(!data.join("pg_wal/00000002.history").exists(), "it was promoted short");
            ensure!(server.log().contains("in no store any more"), "{}", server.log());
        }
        Ok(())
    });
}
