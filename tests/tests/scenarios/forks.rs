//! Right after a failover the old primary's WAL goes on past the fork, and the new one's is not all archived yet.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::postgres::Server;
use tests::world::{CLUSTER, Node, Stores, World};
use tests::{account, program, scenario, wait};

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
        account::write_owned(&diverged.data().join("standby.signal"), "")?;
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

/// WAL files taken out of the directory store, to be put back.
struct Lost {
    places: Vec<(PathBuf, PathBuf)>,
}

impl Lost {
    fn take(stage: &scenario::Stage, world: &World, names: &[String]) -> Result<Self> {
        let aside = stage.scratch.directory(&format!("lost-{}", names.concat()))?;
        let store = world.directory.as_deref().context("no directory store")?;
        let mut places = Vec::new();
        for name in names {
            let command = account::command("find").arg(store).args(["-name", &format!("{name}.s*")]).output()?;
            let found = String::from_utf8(command.stdout)?;
            ensure!(!found.is_empty(), "{name} is not archived");
            for path in found.lines().map(PathBuf::from) {
                let to = aside.join(path.file_name().context("no name")?);
                std::fs::rename(&path, &to)?;
                places.push((path, to));
            }
        }
        Ok(Self { places })
    }

    fn put_back(self) -> Result<()> {
        self.places.into_iter().try_for_each(|(path, to)| Ok(std::fs::rename(to, path)?))
    }
}

/// A data directory that was restored, with its `restore_command`.
struct Waiting {
    data: PathBuf,
    planned: String,
}

impl Waiting {
    fn restored(stage: &scenario::Stage, world: &World, name: &str) -> Result<Self> {
        let (data, said) = world.restore(&stage.scratch, name, &[])?;
        said.ok()?;
        let planned =
            std::fs::read_to_string(data.join("postgresql.auto.conf"))?.replace(" --cluster", " --wait 2s --cluster");
        ensure!(planned.contains(" --until "), "no end in {planned}");
        Ok(Self { data, planned })
    }

    /// The end that the plan counted on, or none as an administrator would write it.
    fn write_command(&self, with_end: bool) -> Result<()> {
        let (before, after) = self.planned.split_once(" --until ").context("no end")?;
        let (_, after) = after.split_once(' ').context("nothing behind the end")?;
        let text = if with_end { self.planned.clone() } else { format!("{before} {after}") };
        account::write_owned(&self.data.join("postgresql.auto.conf"), text)
    }

    /// Starts a server, which must end without having come to the end of recovery, for the answer about `name` is 255.
    fn expect_not_opened(&self, server: &mut Server, name: &str) -> Result<()> {
        server.launch()?;
        server.wait_ended(Duration::from_secs(60))?;
        let opened = !self.data.join("recovery.signal").exists();
        ensure!(!opened, "it was opened short");
        let text = std::fs::read_to_string(self.data.join("postgresql.auto.conf"))?;
        let line = text.lines().rfind(|line| line.starts_with("restore_command")).context("no restore_command")?;
        let command = line.split_once('\'').context("no value")?.1.trim_end_matches('\'');
        let command = command.replace("%f", name).replace("%p", "pg_wal/RECOVERYXLOG");
        let mut fetch = account::command("/bin/sh");
        fetch.args(["-c", &command]).current_dir(&self.data);
        program::run(fetch, Duration::from_secs(30))?.exits(255).map(|_| ())
    }
}

#[test]
fn wal_that_was_lost_after_the_plan_opens_no_server_short() {
    scenario::play("fork-gap", |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.server.sql("create table told (who text)")?;
        world.back_up(&[])?;
        let mut archived = Vec::new();
        for who in ["1", "2", "3", "4"] {
            primary.server.sql(&format!("insert into told values ('{who}')"))?;
            archived.push(primary.archive_now()?);
        }
        let waiting = Waiting::restored(stage, &world, "short")?;
        let mut server = Server::at(&stage.scratch, "short", waiting.data.clone())?;
        server.own_socket()?;
        announce_lost(stage);
        // It would send again what the coordinator misses.
        primary.agent.kill()?;
        // The last but one is a gap for whoever asks, the last one an end that comes too early for this plan.
        for (lost, with_end) in [(2, false), (3, true)] {
            let taken = Lost::take(stage, &world, &archived[lost..=lost])?;
            waiting.write_command(with_end)?;
            waiting.expect_not_opened(&mut server, &archived[lost])?;
            taken.put_back()?;
        }
        expect_opened(&mut server, "1 2 3 4")
    });
}

#[test]
fn the_hole_that_a_failover_left_opens_no_server_short() {
    scenario::play("fork-hole", |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut old = world.primary(&stage.scratch, "db1", SMALL)?;
        old.server.sql("create table told (who text)")?;
        world.back_up(&[])?;
        let new = world.standby(&stage.scratch, &old, "db2")?;
        let mut archived = Vec::new();
        for who in ["1", "2"] {
            old.server.sql(&format!("insert into told values ('{who}')"))?;
            archived.push(old.archive_now()?);
        }
        old.server.sql("insert into told values ('3')")?;
        wait::until("the standby has it", Duration::from_secs(30), || Ok(new.server.text(TOLD)? == "1 2 3"))?;
        old.server.kill()?;
        old.agent.kill()?;
        new.server.ask_promotion()?;
        new.server.wait_promoted(Duration::from_secs(10))?;
        new.server.sql("insert into told values ('young')")?;
        new.archive_now()?;
        let waiting = Waiting::restored(stage, &world, "short")?;
        let mut server = Server::at(&stage.scratch, "short", waiting.data.clone())?;
        server.own_socket()?;
        // As if the old primary had died before it archived them: behind are only its last piece and timeline 2.
        announce_lost(stage);
        let taken = Lost::take(stage, &world, &archived)?;
        waiting.write_command(false)?;
        waiting.expect_not_opened(&mut server, &archived[0])?;
        taken.put_back()?;
        expect_opened(&mut server, "1 2 3 young")
    });
}

/// The coordinator may look while WAL is away, and says so.
fn announce_lost(stage: &mut scenario::Stage) {
    stage.announce("the store does not have WAL any more that was there", "it was taken away");
    stage.announce("WAL files that were archived are in no store any more", "they were taken away");
}

fn expect_opened(server: &mut Server, told: &str) -> Result<()> {
    server.start()?;
    server.wait_promoted(Duration::from_secs(60))?;
    ensure!(server.text(TOLD)? == told, "{}", server.text(TOLD)?);
    Ok(())
}
