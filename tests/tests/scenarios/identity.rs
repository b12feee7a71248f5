//! Nodes that are not who they seem: a clone under its original's name, and a second primary that an operator adopts.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::account::{self, Scratch};
use tests::fleet::Operator;
use tests::ledger::{self, Ledger};
use tests::postgres::Stop;
use tests::scenario::Stage;
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Node, NodePlan, Stores, World};
use tests::{repository_check, scenario, wait};

use crate::{SMALL, recovering_copy};

/// A copy of the stopped primary's files with an agent of its own that calls itself `node`; both stopped.
fn copied(scratch: &Scratch, world: &World, primary: &mut Node, name: &str, node: &str) -> Result<Node> {
    primary.server.stop(Stop::Fast)?;
    let twin = primary.server.twin(scratch, name)?;
    primary.server.start()?;
    let copy = world.node(scratch, twin, &NodePlan::default())?;
    let config = fs::read_to_string(copy.agent.config())?;
    let named = config.replacen(&format!("node = \"{name}\""), &format!("node = \"{node}\""), 1);
    account::write_owned(copy.agent.config(), named)?;
    Ok(copy)
}

/// How often an archiver is woken that is waited for.
const WAKE_EVERY: Duration = Duration::from_secs(3);

/// Waits for a state that the archiver brings about. It pauses for a minute after a few failures; a reload wakes it.
fn wait_for_archiver(node: &Node, what: &str, reached: impl Fn() -> Result<bool>) -> Result<()> {
    let mut woken: Option<Instant> = None;
    wait::until(what, Duration::from_secs(120), || {
        if woken.is_none_or(|woken| woken.elapsed() > WAKE_EVERY) {
            node.server.reload()?;
            woken = Some(Instant::now());
        }
        reached()
    })
    .map(|_| ())
}

/// Waits for one more failure of the archiver.
fn wait_failing(node: &Node, what: &str) -> Result<()> {
    let before = node.server.failed_count()?;
    wait_for_archiver(node, what, || Ok(node.server.failed_count()? > before))
}

/// What the original and its clone wrote under one name.
struct Contested {
    name: String,
    original: Vec<u8>,
    clone: Vec<u8>,
}

impl Contested {
    fn of(name: String, original: &Node, clone: &Node) -> Result<Self> {
        // The clone's file may be recycled by now; what was acknowledged of it is kept.
        let (ours, theirs) = (fs::read(original.wal_path(&name))?, fs::read(clone.witness.join(&name))?);
        ensure!(ours != theirs, "both wrote the same {name}");
        Ok(Self { name, original: ours, clone: theirs })
    }

    /// Whether a store keeps both contents.
    fn are_kept_in(&self, world: &World, store: &str) -> Result<bool> {
        let holdings = world.look(store)?;
        let Some(contents) = holdings.wal.get(&self.name) else { return Ok(false) };
        let has = |wanted: &[u8]| contents.iter().any(|one| one.plain == wanted);
        Ok(has(&self.original) && has(&self.clone))
    }

    /// What the repository serves under the name; nothing when it refuses.
    fn served(&self, world: &World, scratch: &Scratch, seat: &Node) -> Result<Option<Vec<u8>>> {
        let target = scratch.path().join("fetched");
        let text = target.display().to_string();
        let arguments = ["fetch", "--cluster", CLUSTER, "--wait", "3s", &self.name, &text];
        let said = world.operator.alone_in(seat.server.data(), &arguments)?;
        ensure!(said.code == Some(0) || !target.exists(), "a refused fetch wrote its target: {said:?}");
        if said.code != Some(0) {
            return Ok(None);
        }
        let bytes = fs::read(&target)?;
        fs::remove_file(&target)?;
        Ok(Some(bytes))
    }
}

fn announce_clone(stage: &mut Stage) {
    for part in ["node name", "NODE_TAKEN", "another agent is connected"] {
        stage.announce(part, "two agents come under one name in this scenario");
    }
    for part in ["content", "conflict", "is not archived"] {
        stage.announce(part, "two servers write one timeline in this scenario");
    }
    for part in ["coordinator", "unavailable", "road", "direct", "session", "lagging"] {
        stage.announce(part, "the coordinator is killed in this scenario");
    }
}

#[test]
fn two_servers_with_one_node_name() {
    scenario::play("identity-clone", |stage| {
        announce_clone(stage);
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        let mut copy = recovering_copy(&stage.scratch, &world, &primary, "copy")?;
        primary.archive_now()?;
        let mut clone = copied(&stage.scratch, &world, &mut primary, "clone", "db1")?;
        let before = world.expect_whole(&[&primary], 1)?;
        clone.server.start()?;
        clone.agent.start()?;
        primary.server.sql("create table only_in_the_original (t text)")?;
        let name = refused_by_the_coordinator(&world, &clone)?;
        for earlier in &before {
            let now = world.look(&earlier.store)?;
            now.unchanged_since(earlier)?;
            ensure!(now.segments(1) == earlier.segments(1), "a file of the clone got into {}", earlier.store);
        }
        let contested = both_without_the_coordinator(&mut world, &primary, &clone, name)?;
        // Both are there when the host comes back; whoever gets the session, nothing is decided by that.
        world.coordinator.start()?;
        wait::until("both contents are in both stores", Duration::from_secs(90), || {
            Ok(contested.are_kept_in(&world, DIRECTORY)? && contested.are_kept_in(&world, BUCKET)?)
        })?;
        wait::until("info shows the conflict", Duration::from_secs(30), || {
            let info = world.operator.json(&["info", CLUSTER])?;
            Ok(info["clusters"][0]["conflicts"].to_string().contains(&contested.name))
        })?;
        ensure!(contested.served(&world, &stage.scratch, &primary)?.is_none(), "a contested file was served");
        let chosen = repository_check::fingerprint(&contested.original);
        world.operator.ok(&["conflict", "resolve", CLUSTER, &contested.name, &chosen])?;
        let served = contested.served(&world, &stage.scratch, &primary)?;
        ensure!(served.as_ref() == Some(&contested.original), "not the chosen content is served");
        // The clone is shut down, and the original goes on.
        clone.agent.kill()?;
        clone.server.stop(Stop::Immediate)?;
        wait_for_archiver(&primary, "the original archives again", || Ok(primary.server.ready_files()?.is_empty()))?;
        primary.server.sql("insert into only_in_the_original values ('last')")?;
        primary.archive_now()?;
        for holdings in [world.look(DIRECTORY)?, world.look(BUCKET)?] {
            holdings.undamaged()?.nothing_twice(&[&contested.name])?.no_gap(1, primary.segment_bytes()?)?;
            holdings.every_acknowledged(&primary.witness)?;
            holdings.every_acknowledged(&clone.witness)?;
        }
        copy.start()?;
        copy.wait_promoted(Duration::from_secs(120))?;
        ensure!(copy.text("select t from only_in_the_original")? == "last", "the recovery followed the clone");
        Ok(())
    });
}

/// While the original's session lives, its clone gets neither a session nor a file in, and people see why. Gives the name
/// of the clone's first file.
fn refused_by_the_coordinator(world: &World, clone: &Node) -> Result<String> {
    clone.server.sql("create table only_in_the_clone (i int)")?;
    let name = clone.server.switch_wal()?;
    wait::until("the clone's archiver fails", Duration::from_secs(90), || Ok(clone.server.failed_count()? > 0))?;
    ensure!(!clone.has_acknowledged()?, "a file of the clone was acknowledged");
    let info = world.operator.ok(&["info", CLUSTER])?;
    ensure!(info.contains("another agent comes under its name"), "info does not tell:\n{info}");
    let log = fs::read_to_string(clone.agent.log_path())?;
    ensure!(log.contains("another agent is connected as node db1"), "the clone's agent is not told why");
    Ok(name)
}

/// Without the coordinator both write to the bucket under one name, the clone first.
fn both_without_the_coordinator(world: &mut World, primary: &Node, clone: &Node, name: String) -> Result<Contested> {
    world.coordinator.kill()?;
    wait_for_archiver(clone, "the clone's file is archived", || Ok(clone.acknowledged()?.contains(&name)))?;
    let switched = primary.server.switch_wal()?;
    ensure!(switched == name, "the original finished {switched}, not {name}");
    wait_failing(primary, "the original's archiver fails")?;
    ensure!(!primary.acknowledged()?.contains(&name), "a contested file was acknowledged");
    let contested = Contested::of(name, primary, clone)?;
    ensure!(contested.are_kept_in(world, BUCKET)?, "not both contents are kept");
    let holdings = world.look(BUCKET)?;
    holdings.every_acknowledged(&primary.witness)?;
    holdings.every_acknowledged(&clone.witness)?;
    Ok(contested)
}

#[test]
fn adopting_a_second_primary() {
    scenario::play("identity-adopt", |stage| {
        for part in ["FOREIGN_WRITER", "writer", "write one timeline", "refused"] {
            stage.announce(part, "two servers write one timeline in this scenario");
        }
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut first = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&first.server)?;
        let mut copy = recovering_copy(&stage.scratch, &world, &first, "copy")?;
        first.archive_now()?;
        let mut second = copied(&stage.scratch, &world, &mut first, "db2", "db2")?;
        second.server.start()?;
        second.agent.start()?;
        world.wait_reported("db2")?;
        let ledger = Ledger::start(&second.server, 100)?;
        ledger.advance(50)?;
        second.server.switch_wal()?;
        wait::until("the second one's archiver fails", Duration::from_secs(90), || {
            Ok(second.server.failed_count()? > 0)
        })?;
        ensure!(!second.has_acknowledged()?, "a second primary's file was acknowledged");
        // The operator decides that the second one goes on.
        first.agent.kill()?;
        first.server.stop(Stop::Immediate)?;
        world.operator.ok(&["node", "adopt", CLUSTER, "db2"])?;
        ledger.advance(50)?;
        let last = ledger.stop().pop().context("the ledger did not move")?;
        second.server.switch_wal()?;
        wait_for_archiver(&second, "the second one has archived all", || Ok(second.server.ready_files()?.is_empty()))?;
        let before = world.expect_whole(&[&second], 1)?.remove(0);
        copy.start()?;
        copy.wait_promoted(Duration::from_secs(120))?;
        ledger::expect_moment(&copy, &last)?;
        // The first one comes back and is a stranger now.
        let acknowledged = first.acknowledged()?;
        first.server.start()?;
        first.agent.start()?;
        first.server.sql("create table only_in_the_first (i int)")?;
        first.server.switch_wal()?;
        wait_failing(&first, "the first one's archiver fails")?;
        ensure!(first.acknowledged()? == acknowledged, "a file of the old primary was acknowledged");
        let after = world.look(DIRECTORY)?;
        after.unchanged_since(&before)?;
        ensure!(after.segments(1) == before.segments(1), "a segment of the old primary got a place");
        after.nothing_twice(&[])?;
        Ok(())
    });
}

#[test]
fn a_clones_files_are_not_published_with_the_originals_wal() {
    scenario::play("identity-clone-backup", |stage| {
        for part in ["FOREIGN_WRITER", "writer", "write one timeline", "refused", "backup", "another server's"] {
            stage.announce(part, "a clone writes its original's timeline and is backed up in this scenario");
        }
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut first = world.primary(&stage.scratch, "db1", SMALL)?;
        first.archive_now()?;
        let mut clone = copied(&stage.scratch, &world, &mut first, "db9", "db9")?;
        // What the clone's backup needs is archived by name, before it is taken.
        for _ in 0..6 {
            first.write_wal(1)?;
            first.archive_now()?;
        }
        clone.server.start()?;
        clone.agent.start()?;
        world.wait_reported("db9")?;
        clone.server.sql("create table only_in_the_clone as select 1 as x")?;
        let coordinator = Some(world.coordinator.address());
        let seat = Operator::set_up(&stage.scratch, "seat", coordinator, &[], Some(&clone.agent))?;
        let said = seat.run(&["backup", CLUSTER, "--here", "--start-fast"])?;
        ensure!(said.code != Some(0) && said.err.contains("is another server's"), "{said:?}");
        // Left alone with the clone the coordinator does not take its files either.
        first.agent.kill()?;
        wait::until("the clone is refused", Duration::from_secs(60), || {
            let said = world.operator.run(&["backup", CLUSTER, "--start-fast"])?;
            ensure!(said.code != Some(0), "{said:?}");
            Ok(said.err.contains("its WAL is refused"))
        })?;
        first.agent.start()?;
        clone.agent.kill()?;
        world.wait_reported("db1")?;
        let published = world.look(DIRECTORY)?.backups(first.segment_bytes()?)?;
        ensure!(published.is_empty(), "{published:?}");
        world.back_up(&[])?;
        let restored = world.restored(&stage.scratch, "restored", &[])?;
        ensure!(restored.text("select to_regclass('only_in_the_clone') is null")? == "t", "the clone was restored");
        Ok(())
    });
}
