//! Base backups: from the primary, from a standby, on schedule, without the coordinator, interrupted, damaged.

use std::time::Duration;

use anyhow::{Context, ensure};
use tests::fleet::Operator;
use tests::ledger::{self, Ledger};
use tests::scenario::Stage;
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Stores, World};
use tests::{repository_check, scenario, wait};

use crate::SMALL;

const SEGMENT_BYTES: u64 = 1 << 20;

fn announce_outage(stage: &mut Stage) {
    for part in ["coordinator", "unavailable", "lagging", "road", "store", "direct", "session", "backup", "operation"] {
        stage.announce(part, "a part of the installation is away in this scenario");
    }
}

#[test]
fn backups_from_primary_and_standby_are_published_in_every_store_and_restore() {
    scenario::play("backup-both", |stage| {
        let world = World::started(&stage.scratch, Stores::Both)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        primary.server.pgbench_init(1)?;
        let standby = world.standby(&stage.scratch, &primary, "db2")?;
        let ledger = Ledger::start(&primary.server, 50)?;
        let load = primary.server.pgbench(100)?;
        world.back_up(&["--from", "primary", "--label", "from the primary"])?;
        ledger.advance(30)?;
        world.back_up(&["--from", "standby"])?;
        let moment = ledger.advance(30)?;
        ledger.advance(10)?;
        drop(load);
        ledger.stop();
        primary.archive_now()?;
        let backups = world.backups(SEGMENT_BYTES)?;
        ensure!(backups.len() == 2, "{backups:?}");
        let info = world.operator.ok(&["info", CLUSTER])?;
        for backup in &backups {
            ensure!(info.contains(backup.as_str()), "info does not name {backup}:\n{info}");
            let name = format!("r{}", &backup[backup.len() - 4..]);
            let restored = world.restored(&stage.scratch, &name, &["--backup", backup, "--target-lsn", &moment.lsn])?;
            ledger::expect_moment(&restored, &moment)?;
        }
        ensure!(standby.agent.name() == "db2");
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}

#[test]
fn a_backup_is_taken_and_restored_while_the_coordinator_is_away() {
    scenario::play("backup-here", |stage| {
        announce_outage(stage);
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        let ledger = Ledger::start(&primary.server, 50)?;
        ledger.advance(20)?;
        primary.archive_now()?;
        world.coordinator.kill()?;
        let address = world.coordinator.address();
        let seat = Operator::set_up(&stage.scratch, "seat", Some(address), &[], Some(&primary.agent))?;
        seat.ok(&["backup", CLUSTER, "--here", "--start-fast"])?;
        let moment = ledger.advance(20)?;
        ledger.advance(5)?;
        primary.archive_now()?;
        let there = world.look(BUCKET)?.undamaged()?.backups(SEGMENT_BYTES)?;
        ensure!(there.len() == 1, "the bucket names {} backups", there.len());
        let restored = world.restored(
            &stage.scratch,
            "restored",
            &["--target-time", &moment.time, "--without-store", DIRECTORY],
        )?;
        ledger::expect_moment(&restored, &moment)?;
        world.coordinator.start()?;
        ledger.advance(20)?;
        ledger.stop();
        world.expect_whole(&[&primary], 1)?;
        wait::until("the directory has the backup too", Duration::from_secs(90), || {
            Ok(world.look(DIRECTORY)?.undamaged()?.backups(SEGMENT_BYTES)?.len() == 1)
        })?;
        // A node without a direct road says why it cannot.
        world.coordinator.kill()?;
        primary.agent.kill()?;
        primary.setup.direct = None;
        primary.agent.configure(&primary.server, &primary.setup)?;
        primary.agent.start()?;
        let said = seat.run(&["backup", CLUSTER, "--here"])?;
        ensure!(said.code != Some(0) && !said.err.trim().is_empty(), "{said:?}");
        Ok(())
    });
}

#[test]
fn the_coordinator_takes_backups_on_schedule_and_makes_up_for_missed_ones() {
    scenario::play("backup-schedule", |stage| {
        let mut world = World::set_up(&stage.scratch, Stores::Directory)?;
        world.setup.tables = format!(
            "[[cluster]]\nname = \"{CLUSTER}\"\n\n[[cluster.schedule]]\ncron = \"* * * * *\"\nzone = \"Europe/Berlin\"\nstart_fast = true\n\n"
        );
        world.coordinator.configure(&world.setup)?;
        world.coordinator.start()?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        let info = world.operator.json(&["info", CLUSTER])?.to_string();
        ensure!(info.contains("next"), "info tells no next run: {info}");
        wait::until("a scheduled backup", Duration::from_secs(100), || {
            Ok(!world.look(DIRECTORY)?.backups(SEGMENT_BYTES)?.is_empty())
        })?;
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}

#[test]
fn a_promotion_aborts_a_standby_backup() {
    scenario::play("backup-promoted", |stage| {
        announce_outage(stage);
        stage.announce("promot", "the standby is promoted in the middle of a backup");
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.server.pgbench_init(5)?;
        let mut standby = world.standby(&stage.scratch, &primary, "db2")?;
        wait::until("the standby has the tables", Duration::from_secs(60), || {
            Ok(standby.server.number("select count(*) from pgbench_accounts").unwrap_or(0) == 500_000)
        })?;
        world.operator.ok(&["backup", CLUSTER, "--node", "db2", "--start-fast", "--no-wait"])?;
        wait::until("packs arrive", Duration::from_secs(60), || {
            Ok(world.look(DIRECTORY)?.objects.keys().any(|key| key.contains("/b/")))
        })?;
        standby.agent.process()?.freeze()?;
        standby.server.ask_promotion()?;
        // The server asks the frozen agent about histories on its way; it must not wait for that for ever either.
        wait::pause(Duration::from_secs(1));
        standby.agent.process()?.thaw()?;
        standby.server.wait_promoted(Duration::from_secs(30))?;
        wait::until("the operation has ended", Duration::from_secs(60), || {
            let operations = world.operator.json(&["operations", CLUSTER])?.to_string().to_lowercase();
            Ok(operations.contains("failed") || operations.contains("done"))
        })?;
        let backups = world.look(DIRECTORY)?.backups(SEGMENT_BYTES)?;
        // Either it had all it needed before the promotion, or it does not exist.
        if backups.is_empty() {
            let operations = world.operator.ok(&["operations", CLUSTER])?;
            ensure!(operations.contains("promot"), "the reason is not told:\n{operations}");
        }
        Ok(())
    });
}

#[test]
fn a_coordinator_killed_during_a_backup_publishes_it_whole_or_not_at_all() {
    scenario::play("backup-killed", |stage| {
        announce_outage(stage);
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.server.pgbench_init(5)?;
        world.operator.ok(&["backup", CLUSTER, "--start-fast", "--no-wait"])?;
        wait::until("packs arrive", Duration::from_secs(60), || {
            Ok(world.look(DIRECTORY)?.objects.keys().any(|key| key.contains("/b/")))
        })?;
        world.coordinator.kill()?;
        wait::pause(Duration::from_secs(2));
        world.coordinator.start()?;
        // Whatever became of that one, the next one works.
        wait::until("another backup", Duration::from_secs(90), || Ok(world.back_up(&[]).is_ok()))?;
        // A backup that went on into the bucket by itself is copied to the directory later.
        wait::until("both stores name the same backups", Duration::from_secs(90), || {
            Ok(!world.backups(SEGMENT_BYTES)?.is_empty())
        })?;
        let restored = world.restored(&stage.scratch, "restored", &["--latest"])?;
        ensure!(restored.number("select count(*) from pgbench_accounts")? == 500_000);
        Ok(())
    });
}

#[test]
fn a_flipped_bit_in_a_pack_is_never_handed_to_postgresql() {
    scenario::play("backup-flipped", |stage| {
        stage.announce("damaged", "this scenario damages an object");
        let world = World::started(&stage.scratch, Stores::Both)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        world.back_up(&[])?;
        primary.archive_now()?;
        let holdings = world.look(DIRECTORY)?;
        let pack = holdings.objects.keys().find(|key| key.contains("/p/")).context("no pack")?.clone();
        let length = holdings.shelf.read(&pack)?.len();
        for (number, position) in [length / 3, length / 2].into_iter().enumerate() {
            holdings.shelf.flip_byte(&pack, position)?;
            let alone = format!("alone{number}");
            let (data, said) = world.restore(&stage.scratch, &alone, &["--without-store", BUCKET])?;
            ensure!(said.code != Some(0), "a damaged pack was restored");
            ensure!(!data.join("global/pg_control").exists(), "what was restored could be started");
            let other = format!("other{number}");
            let restored = world.restored(&stage.scratch, &other, &["--latest"])?;
            ledger::holding(&restored)?;
            holdings.shelf.flip_byte(&pack, position)?;
        }
        ensure!(repository_check::look(&world.stores[0], CLUSTER)?.damaged.is_empty());
        Ok(())
    });
}

#[test]
fn an_agent_killed_during_a_backup_does_not_hold_up_the_next_one() {
    scenario::play("backup-agent-killed", |stage| {
        announce_outage(stage);
        let world = World::started(&stage.scratch, Stores::Both)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.server.pgbench_init(8)?;
        world.operator.ok(&["backup", CLUSTER, "--start-fast", "--no-wait"])?;
        wait::until("packs arrive", Duration::from_secs(60), || {
            let keys = repository_check::wal_and_backup_keys(&world.stores[0], CLUSTER)?;
            Ok(keys.iter().any(|key| key.contains("/b/")))
        })?;
        primary.agent.kill()?;
        primary.agent.start()?;
        // Refused while the coordinator still hopes for the lost one.
        let start = ["backup", CLUSTER, "--start-fast", "--no-wait"];
        wait::until(
            "a new backup starts",
            Duration::from_secs(35),
            || Ok(world.operator.run(&start)?.code == Some(0)),
        )?;
        let operations = world.operator.ok(&["operations", CLUSTER])?;
        ensure!(operations.contains("restarted"), "the reason is not told:\n{operations}");
        wait::until("both stores name the new backup", Duration::from_secs(120), || {
            Ok(world.backups(SEGMENT_BYTES)?.len() == 1)
        })?;
        let restored = world.restored(&stage.scratch, "restored", &["--latest"])?;
        ensure!(restored.number("select count(*) from pgbench_accounts")? == 800_000);
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}
