//! Backups and WAL that retention lets go of: what stays is restored alone, whoever died or slept meanwhile, and nothing
//! comes back.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::account::Scratch;
use tests::fleet::{Coordinator, Operator};
use tests::program::{Farewell, Running, read_log};
use tests::repository_check::{published, wal_and_backup_keys};
use tests::s3_server::{Fault, Operation};
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Node, Stores, World, start_restored};
use tests::{ledger, scenario, wait};

use crate::SMALL;
use crate::increment::{Taken, change, expect_restorable, expect_sound, fill, take};

const SEGMENT_BYTES: u64 = 1 << 20;
/// Longest wait for what the coordinator does by itself.
const PATIENCE: Duration = Duration::from_secs(90);

/// A world whose coordinator keeps so much of the cluster, started.
pub(crate) fn keeping(scratch: &Scratch, rules: &str) -> Result<World> {
    let mut world = World::set_up(scratch, Stores::Both)?;
    world.setup.tables = format!("[[cluster]]\nname = \"{CLUSTER}\"\n{rules}");
    world.coordinator.configure(&world.setup)?;
    Ok(world)
}

fn ids<'a>(taken: &[&'a Taken]) -> Vec<&'a str> {
    taken.iter().map(|taken| taken.backup.as_str()).collect()
}

/// Waits until every store names exactly these backups.
pub(crate) fn wait_left(world: &World, left: &[&Taken]) -> Result<()> {
    let what = format!("{:?} are left in every store", ids(left));
    wait::until(&what, PATIENCE, || {
        let same = |store| Ok(published(store, CLUSTER)? == ids(left));
        Ok(world.stores.iter().map(same).collect::<Result<Vec<bool>>>()?.into_iter().all(|same| same))
    })
    .map(|_| ())
}

/// Waits until nothing of a backup is left in a store but packs that others refer to.
pub(crate) fn wait_swept(world: &World, store: &str, gone: &Taken) -> Result<()> {
    let store = world.stores.iter().find(|one| one.name == store).context("no such store")?;
    let manifest = format!("/b/{}/manifest", gone.backup);
    wait::until(&format!("{} is swept from {}", gone.backup, store.name), PATIENCE, || {
        Ok(!wal_and_backup_keys(store, CLUSTER)?.iter().any(|key| key.ends_with(&manifest)))
    })
    .map(|_| ())
}

/// Waits until a store holds nothing any more that is condemned or would be.
pub(crate) fn wait_settled(world: &World, stores: &[&str]) -> Result<()> {
    wait::until(&format!("nothing is left to be removed from {stores:?}"), PATIENCE, || {
        let report = world.operator.json(&["expire", CLUSTER])?;
        let all = report["stores"].as_array().context("no stores")?;
        let mut asked = all.iter().filter(|store| stores.iter().any(|name| store["store"] == *name));
        Ok(asked.all(|store| store["frees"]["objects"] == 0))
    })
    .map(|_| ())
}

/// The first segment that a store holds.
fn first_segment(world: &World, store: &str) -> Result<String> {
    world.look(store)?.undamaged()?.segments(1).into_iter().next().context("no WAL")
}

/// What `info` says of backups, WAL and the way back, which no catalog may change.
fn told(world: &World) -> Result<Value> {
    let info = world.operator.json(&["info", CLUSTER])?;
    let cluster = &info["clusters"][0];
    let of = |store: &Value| serde_json::json!({ "holds": store["holds"], "kept": store["wal_kept"] });
    let stores: Vec<Value> = cluster["stores"].as_array().context("no stores")?.iter().map(of).collect();
    Ok(serde_json::json!({
        "backups": cluster["backups"], "timelines": cluster["timelines"], "recovery": cluster["recovery"],
        "at_risk": cluster["at_risk"], "problems": cluster["problems"], "stores": stores,
    }))
}

/// What stays is whole in every store.
pub(crate) fn expect_left(world: &World, left: &[&Taken]) -> Result<()> {
    let found = world.backups(SEGMENT_BYTES)?;
    ensure!(found == ids(left), "the stores name {found:?}");
    Ok(())
}

pub(crate) fn take_after(world: &World, primary: &Node, round: u32) -> Result<Taken> {
    change(&primary.server, round)?;
    take(world, primary, &[])
}

#[test]
fn restore_after_parent_expired() {
    scenario::play("restore-after-parent-expired", |stage| {
        stage.announce("unavailable", "the coordinator is stopped to rebuild its catalog");
        stage.announce("road", "the coordinator is stopped to rebuild its catalog");
        stage.announce("coordinator", "the coordinator is stopped to rebuild its catalog");
        let mut world = keeping(&stage.scratch, "[cluster.retention]\nbackups = 2\n")?;
        world.coordinator.start()?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        let full = take(&world, &primary, &[])?;
        let second = take_after(&world, &primary, 1)?;
        let held = ["hold", "add", CLUSTER, &second.backup, "--reason", "before the upgrade"];
        ensure!(world.operator.ok(&held)?.contains(&format!("held in {DIRECTORY} and {BUCKET}")), "it is not held");
        let third = take_after(&world, &primary, 2)?;
        let fourth = take_after(&world, &primary, 3)?;
        wait_left(&world, &[&second, &third, &fourth])?;
        wait_settled(&world, &[DIRECTORY, BUCKET])?;
        wait_swept(&world, DIRECTORY, &full)?;
        wait_swept(&world, BUCKET, &full)?;
        let gone =
            world.operator.alone(&["restore", CLUSTER, "--to", "/nowhere", "--backup", &full.backup])?.exits(5)?;
        ensure!(gone.contains("it expired at ") && gone.contains("which coordinator committed"), "{gone}");
        // All three were built, one on the other, on the one that is gone.
        let text = world.operator.ok(&["info", CLUSTER])?;
        ensure!(text.contains(&format!("incr on {}", full.backup)) && text.contains("before the upgrade"), "{text}");
        ensure!(text.contains("keeps newest 2"), "{text}");
        expect_left(&world, &[&second, &third, &fourth])?;
        for taken in [&second, &third, &fourth] {
            expect_restorable(&stage.scratch, &world, taken)?;
        }
        // A plan is shown, and refused once anything has moved.
        let hold = world.operator.json(&["hold", "list", CLUSTER])?;
        ensure!(hold["schema"] == "pgconvoy.holds/v1" && hold["holds"][0]["reason"] == "before the upgrade", "{hold}");
        let before = world.operator.json(&["expire", CLUSTER])?;
        ensure!(before["schema"] == "pgconvoy.expire/v1" && before["applied"] == false, "{before}");
        world.operator.ok(&["hold", "remove", CLUSTER, &second.backup])?;
        let moved = format!("--confirm={}", before["plan"].as_str().context("no plan")?);
        let refused = world.operator.run(&["expire", CLUSTER, &moved])?.exits(5)?;
        ensure!(refused.contains("PLAN_MOVED"), "{refused}");
        let shown = world.operator.ok(&["expire", CLUSTER])?;
        ensure!(shown.contains(&format!("remove backup {}", second.backup)) && shown.contains("frees"), "{shown}");
        let done = world.operator.ok(&["expire", CLUSTER, "--confirm"])?;
        ensure!(done.ends_with("done\n") && done.contains("freed"), "{done}");
        wait_left(&world, &[&third, &fourth])?;
        expect_left(&world, &[&third, &fourth])?;
        expect_restorable(&stage.scratch, &world, &third)?;
        // The WAL before the oldest is gone from both, and nothing brings it back, not even a new catalog.
        let first = first_segment(&world, DIRECTORY)?;
        ensure!(first == first_segment(&world, BUCKET)? && !first.ends_with("000001"), "WAL begins with {first}");
        world.expect_whole_since(&[&primary], 1, &first)?;
        let before = told(&world)?;
        world.rebuild_catalog()?;
        world.wait_reported("db1")?;
        let after = wait::value("every store is asked again", PATIENCE, || {
            let info = world.operator.json(&["info", CLUSTER])?;
            let stores = info["clusters"][0]["stores"].as_array().cloned().unwrap_or_default();
            stores.iter().all(|store| store["state"] == "available").then(|| told(&world)).transpose()
        })?;
        ensure!(before == after, "before\n{before:#}\nafter\n{after:#}");
        let check = world.operator.ok(&["check", CLUSTER])?;
        ensure!(check.contains("retention in bucket") && check.contains("newest 2"), "{check}");
        let fifth = take_after(&world, &primary, 4)?;
        wait_left(&world, &[&fourth, &fifth])?;
        wait_settled(&world, &[DIRECTORY, BUCKET])?;
        expect_left(&world, &[&fourth, &fifth])?;
        expect_restorable(&stage.scratch, &world, &fifth)
    });
}

/// The steps between two effects of an expiry.
pub(crate) const STEPS: [&str; 3] = [
    "coordinator/after-expiry-plan-before-root",
    "coordinator/after-expiry-root-before-sweep",
    "coordinator/after-sweep",
];

#[test]
fn an_expiry_that_was_cut_off_at_any_step_is_finished_by_the_next_coordinator() {
    scenario::play("expire-steps", |stage| {
        for part in ["session", "agent", "road", "unavailable", "coordinator", "lagging", "operation", "backup"] {
            stage.announce(part, "the coordinator dies at each step of an expiry");
        }
        let mut world = keeping(&stage.scratch, "")?;
        world.coordinator.start()?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        let mut all = vec![take(&world, &primary, &[])?];
        for round in 1..=3 {
            all.push(take_after(&world, &primary, round)?);
        }
        let without_rules = world.setup.tables.clone();
        for (kept, point) in [3, 2, 1].into_iter().zip(STEPS) {
            world.coordinator.stop()?;
            world.setup.tables = format!("{without_rules}[cluster.retention]\nbackups = {kept}\n");
            world.coordinator.configure(&world.setup)?;
            let log = world.coordinator.log_path().to_owned();
            let died = || read_log(&log).contains(point);
            // It may die before it was seen to be up.
            world.coordinator.start_crashing_at(point).or_else(|error| if died() { Ok(()) } else { Err(error) })?;
            wait::until(&format!("the coordinator died {point}"), PATIENCE, || Ok(died()))?;
            wait::until("it is gone", PATIENCE, || Ok(!world.coordinator.is_running()))?;
            world.coordinator.start()?;
            let left: Vec<&Taken> = all[all.len() - kept..].iter().collect();
            wait_left(&world, &left)?;
            wait_settled(&world, &[DIRECTORY, BUCKET])?;
            expect_left(&world, &left)?;
        }
        expect_restorable(&stage.scratch, &world, &all[3])
    });
}

#[test]
fn a_coordinator_that_slept_between_plan_and_commit_does_no_harm() {
    scenario::play("expire-asleep", |stage| {
        for part in ["session", "agent", "road", "unavailable", "coordinator", "lagging", "silent"] {
            stage.announce(part, "the coordinator is frozen for a while");
        }
        let mut world = keeping(&stage.scratch, "")?;
        world.coordinator.start()?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        take(&world, &primary, &[])?;
        take_after(&world, &primary, 1)?;
        let both = world.backups(SEGMENT_BYTES)?;
        // From now on only the newest is to be kept, and the coordinator stops itself when it is about to say so.
        world.coordinator.stop()?;
        world.setup.tables.push_str("[cluster.retention]\nbackups = 1\n");
        world.coordinator.configure(&world.setup)?;
        world.coordinator.start_stopping_at("coordinator/after-expiry-plan-before-root")?;
        wait::until("the coordinator has stopped itself", PATIENCE, || world.coordinator.process()?.is_frozen())?;
        ensure!(published(&world.stores[0], CLUSTER)? == both && both.len() == 2, "{both:?}");
        // Another one takes its place and does what the first was about to, and more.
        let mut other = Coordinator::set_up(&stage.scratch, "other", &world.setup)?;
        other.start()?;
        let seat = Operator::set_up(&stage.scratch, "seat", Some(other.address()), &world.stores, None)?;
        primary.setup.coordinator = other.address();
        primary.agent.stop()?;
        primary.agent.configure(&primary.server, &primary.setup)?;
        primary.agent.start()?;
        wait::until("the first backup is gone", PATIENCE, || {
            Ok(world.stores.iter().map(|store| published(store, CLUSTER)).collect::<Result<Vec<_>>>()?
                == [&both[1..], &both[1..]])
        })?;
        let second = both[1].clone();
        seat.ok(&["hold", "add", CLUSTER, &second, "--reason", "the other one said so"])?;
        wait::until("the node is with the other one", PATIENCE, || {
            let info = seat.json(&["info", CLUSTER])?;
            Ok(info["clusters"][0]["fleet"]["nodes"][0]["role"] == "primary")
        })?;
        change(&primary.server, 2)?;
        seat.ok(&["backup", CLUSTER, "--start-fast"])?;
        // The first one wakes up in the middle of its commit.
        world.coordinator.process()?.thaw()?;
        let log = world.coordinator.log_path().to_owned();
        wait::until("it has found that it is late", PATIENCE, || {
            Ok(std::fs::read_to_string(&log)?.contains("retention plans again"))
        })?;
        let shown = world.operator.json(&["expire", CLUSTER])?;
        ensure!(shown["stores"][0]["plan"]["backups"].as_array().is_some_and(|lines| lines.len() == 2), "{shown}");
        let left = published(&world.stores[0], CLUSTER)?;
        ensure!(left.len() == 2 && left[0] == second, "{left:?}");
        ensure!(world.backups(SEGMENT_BYTES)? == left, "the stores name other backups");
        for backup in &left {
            let name = format!("r{}", &backup[backup.len() - 8..]);
            world.restored(&stage.scratch, &name, &["--backup", backup, "--immediate"])?;
        }
        Ok(())
    });
}

#[test]
fn a_bucket_that_locks_objects_is_told_of_and_all_else_goes_on() {
    scenario::play("expire-locked", |stage| {
        let mut world = keeping(&stage.scratch, "[cluster.retention]\nbackups = 1\n")?;
        let Some(faults) = world.s3.as_ref().and_then(|s3| s3.own()).map(|own| own.faults.clone()) else {
            return Ok(());
        };
        world.coordinator.start()?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        fill(&primary.server)?;
        let first = take(&world, &primary, &[])?;
        faults.add(Some(Operation::Delete), Fault::Locked, None);
        let second = take_after(&world, &primary, 1)?;
        wait_left(&world, &[&second])?;
        wait_swept(&world, DIRECTORY, &first)?;
        let told = wait::value("info tells of the lock", PATIENCE, || {
            let info = world.operator.json(&["info", CLUSTER])?;
            let locked = info["clusters"][0]["stores"][1]["retention"]["locked_objects"].as_u64();
            Ok(locked.filter(|locked| *locked > 0))
        })?;
        let keys = wal_and_backup_keys(&world.stores[1], CLUSTER)?;
        ensure!(told > 0 && keys.iter().any(|key| key.ends_with(&format!("{}/manifest", first.backup))), "{keys:?}");
        // All else goes on: WAL flows, backups are taken and restored.
        let third = take_after(&world, &primary, 2)?;
        wait_left(&world, &[&third])?;
        primary.archive_now()?;
        wait_settled(&world, &[DIRECTORY])?;
        expect_left(&world, &[&third])?;
        expect_restorable(&stage.scratch, &world, &third)?;
        faults.heal();
        let fourth = take_after(&world, &primary, 3)?;
        wait_left(&world, &[&fourth])?;
        wait_settled(&world, &[DIRECTORY, BUCKET])?;
        for gone in [&first, &second, &third] {
            wait_swept(&world, BUCKET, gone)?;
        }
        expect_left(&world, &[&fourth])
    });
}

#[test]
fn what_is_being_restored_stays_with_its_wal() {
    scenario::play("expire-restored", |stage| {
        let mut world = keeping(&stage.scratch, "[cluster.retention]\nbackups = 1\n")?;
        world.coordinator.start()?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        let first = take(&world, &primary, &[])?;
        let data = stage.scratch.path().join("restored-data");
        let to = data.display().to_string();
        let command = world.operator.command(&["restore", CLUSTER, "--to", &to, "--rate", "200KiB", "--latest"])?;
        let log = stage.scratch.path().join("restore.out");
        let mut restore = Running::start("restore", command, &log, Farewell::Kill)?;
        wait::until("the restore is held", Duration::from_secs(30), || {
            let held = world.operator.json(&["hold", "list", CLUSTER])?;
            Ok(held["holds"][0]["backup"] == *first.backup
                && held["holds"][0]["stores"].as_array().is_some_and(|stores| stores.len() == 2))
        })?;
        take_after(&world, &primary, 1)?;
        let third = take_after(&world, &primary, 2)?;
        wait_left(&world, &[&first, &third])?;
        let shown = world.operator.ok(&["expire", CLUSTER])?;
        ensure!(shown.contains(&first.backup) && shown.contains("restore"), "it is not told why it stays:\n{shown}");
        ensure!(restore.is_running(), "it was too fast to prove anything:\n{}", restore.log());
        let ended = restore.wait_ended(Duration::from_secs(120))?;
        ensure!(ended.success(), "{}", restore.log());
        // Recovery reads WAL from the backup on that nothing else needs any more.
        let restored = start_restored(&stage.scratch, "restored", &data)?;
        expect_sound(&restored)?;
        drop(restored);
        world.operator.ok(&["hold", "remove", CLUSTER, &first.backup])?;
        world.operator.ok(&["expire", CLUSTER, "--confirm"])?;
        wait_left(&world, &[&third])?;
        expect_left(&world, &[&third])
    });
}
