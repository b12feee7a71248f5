//! Clocks that are a day ahead or a day behind: the coordinator's, and a node's.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::ledger::{self, Ledger};
use tests::repository_check::published;
use tests::world::{CLUSTER, Node, World};
use tests::{scenario, wait};

use crate::SMALL;
use crate::expire::keeping;
use crate::increment::{Taken, change, expect_restorable, fill, take};

const SEGMENT_BYTES: u64 = 1 << 20;
const DAY_SECONDS: i64 = 24 * 60 * 60;
/// Longest wait for what the coordinator does by itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// By any clock that is right all of it is younger than this; by one that is a day ahead none of it.
const RULES: &str = "[cluster.retention]\nwindow = \"6h\"\n";
/// Once a day: only a clock that jumped finds it due while this is played.
const SCHEDULE: &str = "[[cluster.schedule]]\ncron = \"17 3 * * *\"\nzone = \"UTC\"\nstart_fast = true\n";

fn restart_coordinator(world: &mut World, shift_seconds: i64) -> Result<()> {
    world.coordinator.stop()?;
    world.coordinator.shift_clock(shift_seconds);
    world.coordinator.start()?;
    world.wait_reported("db1")
}

fn restart_agent(world: &World, primary: &mut Node, shift_seconds: i64) -> Result<()> {
    primary.agent.stop()?;
    primary.agent.shift_clock(shift_seconds);
    primary.agent.start()?;
    world.wait_reported("db1")
}

/// Fails if a store lacks one of these; whatever else there is.
fn expect_kept(world: &World, all: &[Taken]) -> Result<()> {
    for store in &world.stores {
        let there = published(store, CLUSTER)?;
        for taken in all {
            ensure!(there.contains(&taken.backup), "{} is gone from {}: {there:?}", taken.backup, store.name);
        }
    }
    Ok(())
}

/// What `expire` says, once every store has been asked.
fn expire(world: &World, arguments: &[&str]) -> Result<String> {
    let said = wait::value("every store is planned for", PATIENCE, || {
        let said = world.operator.run(&[&["expire", CLUSTER], arguments].concat())?;
        Ok((said.code != Some(10)).then_some(said))
    });
    said?.ok()
}

#[test]
fn clocks_that_are_a_day_ahead_or_behind_remove_nothing_that_is_needed() {
    scenario::play("clocks", |stage| {
        for part in ["session", "unavailable", "road", "coordinator", "clock", "operation"] {
            stage.announce(part, "daemons are started again with clocks that are wrong");
        }
        let scratch = &stage.scratch;
        let mut world = keeping(scratch, RULES)?;
        world.setup.tables.push_str(SCHEDULE);
        world.coordinator.configure(&world.setup)?;
        world.coordinator.start()?;
        let mut primary = world.primary(scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        ledger::create(&primary.server)?;
        let mut all = vec![take(&world, &primary, &[])?];
        let first = primary.server.text("select pg_walfile_name(pg_current_wal_lsn())")?;

        // A day ahead: what is due by that clock is taken at once, and nothing is too old.
        restart_coordinator(&mut world, DAY_SECONDS)?;
        wait::until("the schedule of a day is made up for", PATIENCE, || Ok(world.backups(SEGMENT_BYTES)?.len() == 2))?;
        change(&primary.server, 1)?;
        all.push(take(&world, &primary, &[])?);
        expire(&world, &["--confirm"])?;
        expect_kept(&world, &all)?;

        // Right again, before what is written there; then a day behind.
        restart_coordinator(&mut world, 0)?;
        let shown = expire(&world, &[])?;
        ensure!(shown.contains("a clock is wrong, nothing is removed"), "{shown}");
        change(&primary.server, 2)?;
        all.push(take(&world, &primary, &[])?);
        restart_coordinator(&mut world, -DAY_SECONDS)?;
        let shown = expire(&world, &["--confirm"])?;
        ensure!(shown.contains("a clock is wrong, nothing is removed"), "{shown}");
        change(&primary.server, 3)?;
        all.push(take(&world, &primary, &[])?);
        expect_kept(&world, &all)?;
        restart_coordinator(&mut world, 0)?;

        // The node's: moments are the server's, and what is archived is not older or younger for it.
        let ledger = Ledger::start(&primary.server, 50)?;
        let mut moments = Vec::new();
        for shift in [DAY_SECONDS, -DAY_SECONDS] {
            restart_agent(&world, &mut primary, shift)?;
            let backup = world.back_up(&[])?.trim().to_owned();
            ledger.advance(10)?;
            moments.push((backup, ledger.advance(10)?));
            ledger.advance(10)?;
            primary.archive_now()?;
            expire(&world, &["--confirm"])?;
        }
        ledger.stop();
        restart_agent(&world, &mut primary, 0)?;
        for (number, (_, moment)) in moments.iter().enumerate() {
            let restored = world.restored(scratch, &format!("m{number}"), &["--target-time", &moment.time])?;
            ledger::expect_moment(&restored, moment)?;
        }
        expect_kept(&world, &all)?;
        world.expect_whole_since(&[&primary], 1, &first)?;

        // The newest are the last that were taken, whatever clocks named them.
        world.coordinator.stop()?;
        world.setup.tables = world.setup.tables.replace("window = \"6h\"", "backups = 3");
        world.coordinator.configure(&world.setup)?;
        world.coordinator.start()?;
        world.wait_reported("db1")?;
        change(&primary.server, 4)?;
        let last = take(&world, &primary, &[])?;
        let wanted: BTreeSet<String> =
            moments.iter().map(|(backup, _)| backup.clone()).chain([last.backup.clone()]).collect();
        wait::until("the newest three are left", PATIENCE, || {
            let left = |store| Ok(published(store, CLUSTER)?.into_iter().collect::<BTreeSet<_>>() == wanted);
            world.stores.iter().map(left).collect::<Result<Vec<_>>>().map(|all| all.into_iter().all(|same| same))
        })
        .with_context(|| format!("{wanted:?}, and there are {:?}", world.backups(SEGMENT_BYTES)))?;
        expect_restorable(scratch, &world, &last)
    });
}
