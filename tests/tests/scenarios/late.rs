//! What comes late: a publication of an agent that stood still while its backup came to be and expired, and listings that
//! lag behind what a bucket holds.

use std::time::Duration;

use anyhow::{Context, ensure};
use tests::fleet::Operator;
use tests::ledger::{self, Ledger};
use tests::program::{Farewell, Running};
use tests::repository_check::{published, wal_and_backup_keys};
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Stores, World};
use tests::{scenario, wait};

use crate::SMALL;
use crate::expire::{expect_left, keeping, take_after, wait_left, wait_settled, wait_swept};
use crate::increment::{Taken, change, expect_restorable, fill, take};

/// Longest wait for what goes on by itself.
const PATIENCE: Duration = Duration::from_secs(90);
/// By how much listings lag: several commits and many objects.
const LAG_MILLISECONDS: u64 = 1500;

#[test]
fn an_agent_that_stood_still_publishes_nothing_that_was_swept() {
    scenario::play("late-agent", |stage| {
        for part in ["session", "agent", "road", "unavailable", "coordinator", "lagging", "silent", "backup", "direct"]
        {
            stage.announce(part, "the coordinator dies, and a standby's agent is frozen for a while");
        }
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        let first = take(&world, &primary, &[])?;
        let mut standby = world.standby(&stage.scratch, &primary, "db2")?;
        // Alone with the bucket, the standby's agent stops itself right before it says that its backup exists.
        world.coordinator.kill()?;
        standby.agent.kill()?;
        standby.agent.start_stopping_at("agent/after-parts-before-backup-root")?;
        change(&primary.server, 4)?;
        primary.server.sql("checkpoint")?;
        primary.archive_now()?;
        let address = Some(world.coordinator.address());
        let seat = Operator::set_up(&stage.scratch, "seat", address, &[], Some(&standby.agent))?;
        let command = seat.command(&["backup", CLUSTER, "--here", "--start-fast"])?;
        let log = stage.scratch.path().join("here.out");
        let mut here = Running::start("backup", command, &log, Farewell::Kill)?;
        wait::until("the agent has stopped itself", PATIENCE, || {
            primary.server.switch_wal()?;
            wait::pause(Duration::from_millis(500));
            standby.agent.process()?.is_frozen()
        })?;
        ensure!(published(&world.stores[1], CLUSTER)? == [first.backup.clone()], "it exists already");
        // The coordinator comes back, says in its stead that the backup exists, and lets go of it for a newer one.
        world.setup.tables = format!("[[cluster]]\nname = \"{CLUSTER}\"\n[cluster.retention]\nbackups = 1\n");
        world.coordinator.configure(&world.setup)?;
        world.coordinator.start()?;
        world.wait_reported("db1")?;
        let late = wait::value("its backup exists", PATIENCE, || {
            let found = published(&world.stores[1], CLUSTER)?;
            Ok(found.into_iter().find(|backup| *backup != first.backup))
        })?;
        let late = Taken { backup: late, dump: String::new() };
        let newer = take_after(&world, &primary, 5)?;
        wait_left(&world, &[&newer])?;
        wait_swept(&world, BUCKET, &late)?;
        wait_settled(&world, &[DIRECTORY, BUCKET])?;
        standby.agent.process()?.thaw()?;
        let status = here.wait_ended(PATIENCE)?;
        ensure!(!status.success(), "it said that the backup exists: {}", here.log());
        world.wait_reported("db2")?;
        // Nothing of it comes back, and the newest backup, built on it or not, is whole.
        change(&primary.server, 6)?;
        let newest = take(&world, &primary, &["--from", "primary"])?;
        wait_left(&world, &[&newest])?;
        wait_settled(&world, &[DIRECTORY, BUCKET])?;
        expect_left(&world, &[&newest])?;
        for store in &world.stores {
            let keys = wal_and_backup_keys(store, CLUSTER)?;
            let of_it = format!("/b/{}/manifest", late.backup);
            ensure!(!keys.iter().any(|key| key.ends_with(&of_it)), "{} has it again: {keys:?}", store.name);
        }
        expect_restorable(&stage.scratch, &world, &newest)
    });
}

#[test]
fn listings_that_lag_lose_nothing_and_raise_no_alarm() {
    scenario::play("late-listings", |stage| {
        let mut world = keeping(&stage.scratch, "[cluster.retention]\nbackups = 2\n")?;
        let Some(faults) = world.s3.as_ref().and_then(|s3| s3.own()).map(|own| own.faults.clone()) else {
            return Ok(());
        };
        world.coordinator.start()?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        ledger::create(&primary.server)?;
        faults.change(|plan| plan.stale_listing_ms = LAG_MILLISECONDS);
        let ledger = Ledger::start(&primary.server, 50)?;
        let mut taken = Vec::new();
        for round in 1..=4 {
            change(&primary.server, round)?;
            taken.push(world.back_up(&[])?.trim().to_owned());
            ledger.advance(10)?;
            primary.archive_now()?;
        }
        let moment = ledger.advance(10)?;
        ledger.stop();
        primary.archive_now()?;
        let kept = &taken[2..];
        wait::until("the newest two are left in every store", PATIENCE, || {
            let left = |store| Ok(published(store, CLUSTER)? == kept);
            let left = world.stores.iter().map(left).collect::<anyhow::Result<Vec<_>>>()?;
            Ok(left.into_iter().all(|same| same))
        })?;
        let check = world.operator.run(&["check", CLUSTER])?;
        ensure!(check.code == Some(0), "{check:?}");
        faults.heal();
        wait_settled(&world, &[DIRECTORY, BUCKET])?;
        ensure!(world.backups(1 << 20)? == kept, "the stores name other backups");
        let first = world.look(BUCKET)?.undamaged()?.segments(1).into_iter().next().context("no WAL")?;
        world.expect_whole_since(&[&primary], 1, &first)?;
        for (number, backup) in kept.iter().enumerate() {
            let target = ["--backup", backup.as_str(), "--target-lsn", &moment.lsn, "--without-store", DIRECTORY];
            let restored = world.restored(&stage.scratch, &format!("r{number}"), &target)?;
            ledger::expect_moment(&restored, &moment)?;
            crate::increment::expect_sound(&restored)?;
        }
        Ok(())
    });
}
