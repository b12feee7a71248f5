//! Backups that are interrupted and go on: from what they stored, or from their manifest when WAL has come.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::fleet::Operator;
use tests::postgres::Server;
use tests::program::read_log;
use tests::repository_check::Holdings;
use tests::scenario::Stage;
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Node, Stores, World};
use tests::{repository_check, scenario, wait};

use crate::SMALL;
use crate::increment::{dump, expect_restorable, take};

const SEGMENT_BYTES: u64 = 1 << 20;
/// The ninth pack arrives after the first note, which tells of four.
const MIDST: &str = "agent/after-pack-before-next:9";

fn announce(stage: &mut Stage) {
    for part in ["agent", "coordinator", "session", "operation", "backup", "server", "node", "connection", "WAL"] {
        stage.announce(part, "agents, coordinators and servers are killed in this scenario");
    }
}

/// Some tens of MiB that do not compress away, in many tables, so that readers fill packs evenly.
pub(crate) fn fill(server: &Server) -> Result<()> {
    server.sql(
        "do $$ begin
             for n in 1..40 loop
                 execute format('create table noise%s as select i, md5((i * %s)::text) || md5((i * 7)::text) as text
                                 from generate_series(1, 25000) i', n, n);
             end loop;
         end $$",
    )?;
    server.sql("create index on noise1 (i)")?;
    server.sql("vacuum (freeze, analyze)").map(|_| ())
}

/// Objects under a prefix with their sizes.
fn objects(world: &World, part: &str) -> Result<BTreeMap<String, u64>> {
    let directory = world.directory.as_ref().context("no directory")?;
    let keys = world.look(DIRECTORY)?.objects.into_keys().filter(|key| key.contains(part));
    keys.map(|key| Ok((key.clone(), std::fs::metadata(directory.join(&key))?.len()))).collect()
}

fn packs(world: &World, backup: &str) -> Result<BTreeMap<String, u64>> {
    objects(world, &format!("/b/{backup}/p/"))
}

/// Begins a backup and waits until the agent dies of a crash point. Gives the backup's identifier.
fn interrupt(world: &World, primary: &mut Node, point: &str) -> Result<String> {
    primary.agent.kill()?;
    primary.agent.start_crashing_at(point)?;
    world.wait_reported(primary.agent.name())?;
    let begun = ["backup", CLUSTER, "--start-fast", "--parallel", "16", "--no-wait"];
    let operation = world.operator.ok(&begun)?.trim().to_owned();
    let log = primary.agent.log_path().to_owned();
    let name = point.split(':').next().unwrap_or(point).to_owned();
    let crashed =
        || Ok(read_log(&log).lines().any(|line| line.contains("crash point reached") && line.contains(&name)));
    wait::until("the agent dies in the midst of a backup", Duration::from_secs(90), crashed)?;
    primary.agent.process()?.wait_ended(Duration::from_secs(10))?;
    let listed = world.operator.json(&["operations", CLUSTER])?;
    let operations = listed["operations"].as_array().cloned().unwrap_or_default();
    let ours = operations.iter().find(|one| one["operation"] == *operation).context("the operation is not listed")?;
    Ok(ours["backup"].as_str().context("no backup")?.to_owned())
}

/// A backup, as soon as the coordinator knows that the one before is dead.
pub(crate) fn next_backup(world: &World, arguments: &[&str]) -> Result<String> {
    let mut backup = String::new();
    wait::until("the next backup is taken", Duration::from_secs(120), || {
        let said = world.operator.run(&[&["backup", CLUSTER, "--start-fast"], arguments].concat())?;
        if said.code != Some(0) && said.err.contains("BACKUP_RUNNING") {
            return Ok(false);
        }
        backup = said.ok()?.trim().to_owned();
        Ok(true)
    })?;
    Ok(backup)
}

/// The entry of a backup in the newest root.
pub(crate) fn entry(holdings: &Holdings, backup: &str) -> Result<serde_json::Value> {
    let root = holdings.root()?.context("no root")?;
    let backups = root["backups"].as_array().cloned().unwrap_or_default();
    backups.into_iter().find(|one| one["backup"] == *backup).with_context(|| format!("no root names {backup}"))
}

/// The newest segment in the store and its key.
fn last_segment(world: &World) -> Result<(String, String)> {
    let holdings = world.look(DIRECTORY)?;
    let segment = holdings.segments(1).pop().context("no segments")?;
    let key = holdings.objects.into_keys().find(|key| key.contains(&format!("/{segment}.s"))).context("no such key")?;
    Ok((segment, key))
}

#[test]
fn an_interrupted_first_backup_goes_on_from_what_it_stored() {
    scenario::play("resume-first", |stage| {
        announce(stage);
        let mut world = World::started(&stage.scratch, Stores::Directory)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        let first = interrupt(&world, &mut primary, MIDST)?;
        let left = packs(&world, &first)?;
        ensure!(left.len() >= 8 && !objects(&world, &format!("/b/{first}/n/"))?.is_empty(), "{left:?}");
        // The second one dies as well, after the server and the coordinator did, and some pages were changed.
        primary.server.sql("update noise1 set text = 'first ' || text where i % 1000 = 7")?;
        primary.server.kill()?;
        primary.server.start()?;
        world.coordinator.kill()?;
        world.coordinator.start()?;
        primary.agent.start()?;
        world.wait_reported("db1")?;
        wait::until("the first one counts as dead", Duration::from_secs(120), || {
            let listed = world.operator.json(&["operations", CLUSTER])?;
            Ok(listed["operations"].as_array().is_some_and(|all| all.iter().all(|one| one["state"] != "running")))
        })?;
        let second = interrupt(&world, &mut primary, MIDST)?;
        primary.server.sql("update noise2 set text = 'second ' || text where i % 1000 = 13")?;
        primary.server.sql("create table later as select i from generate_series(1, 3000) i")?;
        primary.agent.start()?;
        world.wait_reported("db1")?;
        let held = dump(&primary.server)?;
        let third = next_backup(&world, &["--parallel", "16"])?;

        let holdings = world.look(DIRECTORY)?;
        let taken = entry(&holdings, &third)?;
        let reason = taken["changes"]["reason"].as_str().unwrap_or_default().to_owned();
        ensure!(reason.contains(&format!("resuming attempt {second}: ")), "{reason}");
        ensure!(taken["attempts"] == serde_json::json!([first, second]), "{taken}");
        ensure!(taken["type"] == "full" && holdings.root()?.context("no root")?["pins"].is_null(), "{taken}");
        let listed = world.operator.ok(&["info", CLUSTER])?;
        ensure!(listed.contains("are there already"), "info does not tell what it went on from:\n{listed}");
        // Nothing was sent twice, and nothing that was stored is gone.
        let whole = next_backup(&world, &["--parallel", "16", "--type", "full"])?;
        let whole_bytes = entry(&world.look(DIRECTORY)?, &whole)?["stored_bytes"].as_u64().context("no bytes")?;
        let (own, inherited) = (taken["stored_bytes"].as_u64(), taken["inherited_bytes"].as_u64());
        let (own, inherited) = own.zip(inherited).context("no bytes")?;
        ensure!(own + inherited < whole_bytes * 11 / 10, "{own} and {inherited} bytes, a whole one has {whole_bytes}");
        ensure!(own < whole_bytes * 6 / 10, "{own} bytes were sent of {whole_bytes}");
        ensure!(left.iter().all(|(key, _)| holdings.objects.contains_key(key)), "packs of the first one are gone");

        let mut all = vec![crate::increment::Taken { backup: third, dump: held }];
        primary.server.sql("update noise1 set text = 'third ' || text where i % 1000 = 21")?;
        all.push(take(&world, &primary, &[])?);
        for taken in &all {
            expect_restorable(&stage.scratch, &world, taken)?;
        }
        world.backups(SEGMENT_BYTES).map(|_| ())
    });
}

#[test]
fn an_interrupted_backup_goes_on_while_the_coordinator_is_away() {
    scenario::play("resume-direct", |stage| {
        announce(stage);
        for part in ["unavailable", "lagging", "road", "store", "direct"] {
            stage.announce(part, "the coordinator is away in this scenario");
        }
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        primary.archive_now()?;
        world.coordinator.kill()?;
        primary.agent.kill()?;
        primary.agent.start_crashing_at(MIDST)?;
        let address = Some(world.coordinator.address());
        let seat = Operator::set_up(&stage.scratch, "seat", address, &[], Some(&primary.agent))?;
        let here = ["backup", CLUSTER, "--here", "--start-fast", "--parallel", "16"];
        // WAL that is archived now tells that the agent knows that the coordinator is gone.
        primary.archive_now()?;
        let log = primary.agent.log_path().to_owned();
        wait::until("the agent dies in the midst of its own backup", Duration::from_secs(120), || {
            seat.run(&here)?;
            Ok(read_log(&log).lines().any(|line| line.contains("crash point reached")))
        })?;
        primary.agent.process()?.wait_ended(Duration::from_secs(10))?;
        let notes = world.look(BUCKET)?.objects.into_keys().find(|key| key.contains("/n/")).context("no notes")?;
        let first = notes.split("/b/").nth(1).and_then(|rest| rest.split('/').next()).context("no backup")?.to_owned();
        primary.server.sql("update noise1 set text = 'first ' || text where i % 1000 = 7")?;
        let held = dump(&primary.server)?;
        primary.agent.start()?;
        primary.archive_now()?;
        let said = wait::value("the agent takes the next one", Duration::from_secs(120), || {
            let said = seat.run(&here)?;
            Ok((said.code == Some(0)).then_some(said))
        })?;
        ensure!(said.err.contains(&format!("resuming attempt {first}: ")), "{said:?}");
        let taken = crate::increment::Taken { backup: said.out.trim().to_owned(), dump: held };
        let entry = entry(&world.look(BUCKET)?, &taken.backup)?;
        ensure!(entry["attempts"] == serde_json::json!([first]) && entry["inherited_bytes"] != 0, "{entry}");
        // What was taken over and what went on are one backup, which the coordinator adopts and copies.
        world.coordinator.start()?;
        let directory = &world.stores[0];
        wait::until("the directory has it too", Duration::from_secs(90), || {
            Ok(repository_check::published(directory, CLUSTER)? == [taken.backup.clone()])
        })?;
        world.backups(SEGMENT_BYTES)?;
        expect_restorable(&stage.scratch, &world, &taken)
    });
}

#[test]
fn a_backup_whose_wal_has_not_come_waits_for_it() {
    scenario::play("resume-waiting", |stage| {
        announce(stage);
        let mut world = World::started(&stage.scratch, Stores::Directory)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.server.sql("create table quiet as select i from generate_series(1, 5000) i")?;
        let held = dump(&primary.server)?;
        // The coordinator dies before it names the backup, which it would by itself; then WAL is taken away.
        let point = "coordinator/after-parts-before-backup-root";
        world.coordinator.kill()?;
        world.coordinator.start_crashing_at(point)?;
        let backup = interrupt(&world, &mut primary, "agent/after-manifest-before-publication")?;
        let log = world.coordinator.log_path().to_owned();
        let crashed =
            || Ok(read_log(&log).lines().any(|line| line.contains("crash point reached") && line.contains(point)));
        wait::until("the coordinator dies", Duration::from_secs(90), crashed)?;
        world.coordinator.process()?.wait_ended(Duration::from_secs(10))?;
        let (segment, key) = last_segment(&world)?;
        let (place, aside) =
            (world.directory.as_ref().context("no directory")?.join(key), stage.scratch.path().join("aside"));
        std::fs::rename(&place, &aside)?;
        world.coordinator.delete_state()?;
        let waits = |world: &World| -> Result<bool> {
            let listed = world.operator.json(&["operations", CLUSTER])?;
            let operations = listed["operations"].as_array().cloned().unwrap_or_default();
            let step = format!("waiting for WAL {segment}");
            let ours = |one: &serde_json::Value| {
                one["backup"] == *backup && one["state"] == "waiting for WAL" && one["step"] == step
            };
            Ok(operations.iter().any(ours))
        };
        for _ in 0..2 {
            world.coordinator.start()?;
            wait::until("it waits for WAL", Duration::from_secs(90), || waits(&world))?;
            let text = world.operator.ok(&["info", CLUSTER])?;
            ensure!(text.contains(&segment), "info does not tell of {segment}:\n{text}");
            world.coordinator.kill()?;
            let alone = world.operator.alone(&["info", CLUSTER])?.exits(0)?;
            let told = format!("backup {backup} of node db1 is waiting for WAL {segment} in store {DIRECTORY}");
            ensure!(alone.contains(&told), "info from the stores alone does not tell of it:\n{alone}");
        }
        world.coordinator.start()?;
        ensure!(repository_check::published(&world.stores[0], CLUSTER)?.is_empty(), "it was published without its WAL");
        std::fs::rename(&aside, &place)?;
        let store = &world.stores[0];
        wait::until("it is published", Duration::from_secs(90), || {
            Ok(repository_check::published(store, CLUSTER)? == [backup.clone()])
        })?;
        let taken = crate::increment::Taken { backup: backup.clone(), dump: held };
        expect_restorable(&stage.scratch, &world, &taken)?;
        wait::until("its operation is done", Duration::from_secs(30), || {
            let listed = world.operator.json(&["operations", CLUSTER])?;
            let operations = listed["operations"].as_array().cloned().unwrap_or_default();
            Ok(operations.iter().any(|one| one["backup"] == *backup && one["state"] == "done"))
        })
        .map(|_| ())
    });
}
