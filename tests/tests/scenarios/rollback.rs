//! A store is put back to an older copy of itself: that is noticed and refused by name, nothing is built on it or removed
//! there, what it lost comes back, and an operator's word lets it go on.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::program::read_log;
use tests::repository_check::wal_and_backup_keys;
use tests::scenario::{self, Stage};
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Node, Stores, World};
use tests::{account, ledger, wait};

use crate::SMALL;

const SEGMENT_BYTES: u64 = 1 << 20;
/// Longest wait for what the coordinator does by itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// The crash point of accepting, played by a scenario here.
pub(crate) const STEPS: &[&str] = &[AFTER_ROOT];
const AFTER_ROOT: &str = "coordinator/after-accepted-root";

fn announce(stage: &mut Stage) {
    for part in ["was set back", "the store does not have WAL any more", "are in no store any more"] {
        stage.announce(part, "this scenario puts an older copy of a store back");
    }
    stage.announce("the store is", "the directory is away while its copy is put in its place");
    stage.announce("the road", "the coordinator is killed");
    stage.announce("unavailable", "the coordinator is killed");
}

/// Copies a directory as an administrator would.
fn copied(from: &Path, to: &Path) -> Result<()> {
    let said = account::command("cp").arg("-a").arg(from).arg(to).output()?;
    ensure!(said.status.success(), "cp: {}", String::from_utf8_lossy(&said.stderr));
    Ok(())
}

/// Names of root commits that lie in the directory.
fn roots(world: &World) -> Result<Vec<String>> {
    let directory = world.directory.as_ref().context("no directory")?.join(format!("c/{CLUSTER}/root"));
    let names = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<Result<Vec<String>>>()?;
    names.sort();
    Ok(names)
}

/// Takes a backup; its identifier.
fn taken(world: &World, arguments: &[&str]) -> Result<String> {
    Ok(world.back_up(arguments)?.trim().to_owned())
}

fn number(root: &str) -> Result<u64> {
    Ok(u64::from_str_radix(root, 16)?)
}

/// What is wrong, as `info` says.
fn problems(world: &World) -> Result<String> {
    Ok(world.operator.json(&["info", CLUSTER])?["clusters"][0]["problems"].to_string())
}

fn wait_noticed(world: &World) -> Result<()> {
    let said = format!("store {DIRECTORY} was set back to an older copy of itself");
    let noticed = || Ok(problems(world)?.contains(&said));
    wait::until("info says that the store was set back", PATIENCE, noticed).map(drop)
}

/// Waits until the directory holds all that the bucket does.
fn wait_same(world: &World) -> Result<()> {
    wait::until("both stores hold the same", PATIENCE, || {
        let keys = |store: &str| {
            let store = world.stores.iter().find(|one| one.name == store).context("no such store")?;
            wal_and_backup_keys(store, CLUSTER)
        };
        Ok(keys(DIRECTORY)? == keys(BUCKET)?)
    })
    .map(drop)
}

/// Waits until the directory has every WAL file that the bucket has. It may have more: what later roots condemned there.
fn wait_filled(world: &World) -> Result<()> {
    wait::until("the directory has the bucket's WAL again", PATIENCE, || {
        let (filled, whole) = (world.look(DIRECTORY)?, world.look(BUCKET)?);
        Ok(whole.wal.keys().all(|name| filled.wal.contains_key(name)))
    })
    .map(drop)
}

/// What the store lost, as it is shown before it is accepted.
fn shown(world: &World) -> Result<Value> {
    world.operator.json(&["store", "accept", DIRECTORY])
}

/// Accepts what is shown while the coordinator dies at a point, and starts it again.
fn accept_and_die(world: &mut World, point: &str) -> Result<()> {
    world.coordinator.stop()?;
    world.coordinator.start_crashing_at(point)?;
    wait_noticed(world)?;
    let said = world.operator.run(&["store", "accept", DIRECTORY, "--cluster", CLUSTER, "--confirm"])?;
    ensure!(said.code != Some(0), "it was accepted although the coordinator was to die at {point}");
    wait::until("the coordinator is gone", PATIENCE, || Ok(!world.coordinator.is_running()))?;
    ensure!(read_log(world.coordinator.log_path()).contains(point), "it died elsewhere than at {point}");
    world.coordinator.start()
}

/// Waits until nothing is wrong with the store any more.
fn wait_accepted(world: &World) -> Result<()> {
    wait::until("the store goes on", PATIENCE, || Ok(!problems(world)?.contains("set back"))).map(drop)
}

fn expect_restorable(world: &World, stage: &Stage, primary: &Node, arguments: &[&str]) -> Result<()> {
    let moment = ledger::holding(&primary.server)?;
    primary.archive_now()?;
    let restored = world.restored(&stage.scratch, "restored", arguments)?;
    let holding = ledger::holding(&restored)?;
    ensure!(
        (holding.commits, holding.total) == (moment.commits, moment.total),
        "restored {} commits of {}",
        holding.commits,
        moment.commits
    );
    Ok(())
}

#[test]
fn a_store_put_back_to_an_older_copy_is_refused_by_name_and_filled_again() {
    scenario::play("rollback", |stage| {
        announce(stage);
        let mut world = World::set_up(&stage.scratch, Stores::Both)?;
        world.setup.tables = format!("[[cluster]]\nname = \"{CLUSTER}\"\nretention.full = 1\n");
        world.coordinator.configure(&world.setup)?;
        world.coordinator.start()?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        let mut load = ledger::Ledger::start(&primary.server, 20)?;
        let first = taken(&world, &[])?;
        primary.archive_now()?;
        wait_same(&world)?;
        let directory = world.directory.clone().context("no directory")?;
        let (older, lost) = (directory.with_extension("older"), directory.with_extension("lost"));
        copied(&directory, &older)?;
        let then = roots(&world)?;
        for _ in 0..3 {
            primary.archive_now()?;
        }
        let second = taken(&world, &[])?;
        wait_same(&world)?;
        let seen = number(roots(&world)?.last().context("no root")?)?;
        ensure!(seen > number(then.last().context("no root")?)?, "nothing was committed after the copy");
        // Put back under the feet of the coordinator.
        fs::rename(&directory, &lost)?;
        fs::rename(&older, &directory)?;
        wait_noticed(&world)?;
        wait_filled(&world)?;
        // A full one, so that the rules would let go of the others: in the bucket they do.
        let third = taken(&world, &["--type", "full"])?;
        wait::until("the bucket keeps the newest full backup alone", PATIENCE, || {
            let bucket = world.stores.iter().find(|store| store.name == BUCKET).context("no bucket")?;
            Ok(tests::repository_check::published(bucket, CLUSTER)? == [third.clone()])
        })?;
        ensure!(roots(&world)? == then, "a root was committed to the store that was set back: {:?}", roots(&world)?);
        let refused = world.operator.run(&["expire", CLUSTER, "--store", DIRECTORY, "--confirm"])?;
        ensure!(
            refused.code != Some(0) && refused.err.contains("was set back") && refused.err.contains(DIRECTORY),
            "{refused:?}"
        );
        // The coordinator knows it after a restart, too.
        world.coordinator.stop()?;
        world.coordinator.start()?;
        wait_noticed(&world)?;
        let loss = shown(&world)?;
        let fates: Vec<(&str, &str)> = loss["clusters"][0]["backups"]
            .as_array()
            .context("no backups")?
            .iter()
            .map(|line| (line["backup"].as_str().unwrap_or_default(), line["fate"].as_str().unwrap_or_default()))
            .collect();
        ensure!(fates.contains(&(first.as_str(), "stays")) && fates.contains(&(third.as_str(), "copied")), "{fates:?}");
        ensure!(fates.contains(&(second.as_str(), "lost")), "the bucket let go of it meanwhile: {fates:?}");
        ensure!(loss["clusters"][0]["seen"] == seen, "{loss:#}");
        world.operator.ok(&["store", "accept", DIRECTORY, "--cluster", CLUSTER, "--confirm"])?;
        wait_accepted(&world)?;
        wait::until("the directory keeps the newest full backup alone", PATIENCE, || {
            Ok(world.backups(SEGMENT_BYTES)? == [third.clone()])
        })?;
        let now = roots(&world)?;
        ensure!(now[..then.len()] == then[..], "roots of before are gone");
        ensure!(number(&now[then.len()])? == seen + 1, "{seen} is followed by {:?}", &now[then.len()..]);
        load.end();
        world.operator.ok(&["verify", CLUSTER])?;
        expect_restorable(&world, stage, &primary, &["--latest", "--without-store", BUCKET])
    });
}

#[test]
fn lost_roots_and_lost_wal_of_the_only_store_come_back() {
    scenario::play("rollback-alone", |stage| {
        announce(stage);
        let mut world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.server.configure(&[("wal_keep_size", "'64MB'")])?;
        primary.server.reload()?;
        ledger::create(&primary.server)?;
        let backup = taken(&world, &[])?;
        let kept: Vec<String> = (0..3).map(|_| primary.archive_now()).collect::<Result<_>>()?;
        let seen = number(roots(&world)?.last().context("no root")?)?;
        let directory = world.directory.clone().context("no directory")?;
        fs::remove_dir_all(directory.join(format!("c/{CLUSTER}/root")))?;
        let store = world.stores.first().context("no store")?;
        for key in wal_and_backup_keys(store, CLUSTER)?.iter().filter(|key| key.contains(&kept[1])) {
            fs::remove_file(directory.join(key))?;
        }
        // The server still has that segment, and nobody has to ask it for it.
        wait_noticed(&world)?;
        wait::until("the lost segment is there again", PATIENCE, || {
            Ok(wal_and_backup_keys(store, CLUSTER)?.iter().any(|key| key.contains(&kept[1])))
        })?;
        let refused = world.operator.run(&["backup", CLUSTER])?;
        ensure!(refused.code != Some(0) && refused.err.contains("now there is none"), "{refused:?}");
        ensure!(!directory.join(format!("c/{CLUSTER}/root")).exists() || roots(&world)?.is_empty(), "begun anew");
        let loss = shown(&world)?;
        ensure!(loss["clusters"][0]["backups"][0]["fate"] == "named", "{loss:#}");
        accept_and_die(&mut world, AFTER_ROOT)?;
        wait_accepted(&world)?;
        ensure!(number(&roots(&world)?[0])? == seen + 1, "{seen} is followed by {:?}", roots(&world)?);
        let named = world.backups(SEGMENT_BYTES)?;
        ensure!(named == [backup.clone()], "{named:?} are named, not {backup}; {:?}", roots(&world)?);
        expect_restorable(&world, stage, &primary, &["--latest"])?;
        taken(&world, &[]).map(drop)
    });
}
