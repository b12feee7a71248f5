//! Two servers that both believe to be the successor.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tests::ledger::{self, Ledger};
use tests::repository_check::{Holdings, WalObject};
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Node, Stores, World};
use tests::{program, scenario, wait};

use crate::SMALL;

/// History of the timeline that both choose.
const HISTORY: &str = "00000002.history";
/// The story's promise for a promotion.
const PROMOTION_PATIENCE: Duration = Duration::from_secs(10);
/// Time in which nothing of the loser's may be acknowledged.
const WATCHED: Duration = Duration::from_secs(5);

/// A standby that follows, and cannot see what another one archives.
fn standby(stage: &scenario::Stage, world: &World, primary: &Node, name: &str) -> Result<Node> {
    let standby = world.standby(&stage.scratch, primary, name)?;
    standby.server.sql("alter system set restore_command = ''")?;
    standby.server.reload()?;
    Ok(standby)
}

/// Waits until a standby has replayed what the primary has written.
fn wait_caught_up(primary: &Node, standby: &Node) -> Result<()> {
    let lsn = primary.server.text("select pg_current_wal_flush_lsn()")?;
    wait::until("the standby has caught up", Duration::from_secs(30), || {
        Ok(standby.server.text(&format!("select pg_last_wal_replay_lsn() >= '{lsn}'"))? == "t")
    })
    .map(|_| ())
}

/// From here on the standby receives nothing more.
fn stop_following(standby: &Node) -> Result<()> {
    standby.server.sql("alter system set primary_conninfo = ''")?;
    standby.server.reload()?;
    wait::until("the standby receives nothing", Duration::from_secs(30), || {
        Ok(standby.server.number("select count(*) from pg_stat_wal_receiver")? == 0)
    })
    .map(|_| ())
}

fn history_of(node: &Node) -> Result<Vec<u8>> {
    Ok(fs::read(node.wal_path(HISTORY))?)
}

/// The history that a store keeps as evidence of a refusal.
fn evidence(holdings: &Holdings) -> Result<Vec<u8>> {
    let mut kept = holdings.objects.keys().filter(|key| key.contains(&format!("/conflict/{HISTORY}.")));
    let (key, more) = (kept.next().context("no evidence")?, kept.next());
    ensure!(more.is_none(), "more evidence than conflicts: {key}, {more:?}");
    let fingerprint = key.rsplit('.').next().unwrap_or_default();
    Ok(WalObject::decode(HISTORY, fingerprint, &holdings.shelf.read(key)?)?.plain)
}

#[test]
fn of_two_standbys_promoted_at_once_one_wins_and_the_other_stops_loudly() {
    scenario::play("split-promoted", |stage| {
        for part in ["coordinator", "unavailable", "direct", "store", "road", "session", "lagging", "strained"] {
            stage.announce(part, "the coordinator is away in this scenario");
        }
        stage.announce(HISTORY, "two histories of one timeline are offered in this scenario");
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        let ahead = standby(stage, &world, &primary, "db2")?;
        let behind = standby(stage, &world, &primary, "db3")?;
        let ledger = Ledger::start(&primary.server, 100)?;
        ledger.advance(30)?;
        primary.archive_now()?;
        wait_caught_up(&primary, &behind)?;
        // Their histories differ: one of them has not received the last commits.
        stop_following(&behind)?;
        ledger.advance(30)?;
        world.coordinator.kill()?;
        primary.archive_now()?;
        ledger.advance(10)?;
        ledger.stop();
        wait_caught_up(&primary, &ahead)?;
        primary.server.kill()?;
        primary.agent.kill()?;
        for node in [&ahead, &behind] {
            node.server.ask_promotion()?;
        }
        for node in [&ahead, &behind] {
            node.server.wait_promoted(PROMOTION_PATIENCE)?;
        }
        ensure!(history_of(&ahead)? != history_of(&behind)?, "they parted at the same place; nothing is in conflict");

        let mut stored = Vec::new();
        wait::until("a history is archived", Duration::from_secs(30), || {
            stored = world.look(BUCKET)?.histories.get(HISTORY).context("none yet")?.clone();
            Ok(true)
        })?;
        let (winner, loser) = if stored == history_of(&ahead)? { (ahead, behind) } else { (behind, ahead) };
        ensure!(stored == history_of(&winner)?, "a history is stored that nobody wrote");
        println!("split-promoted: {} was first", winner.agent.name());
        expect_stopped(&world, &loser)?;
        winner.write_wal(3)?;
        winner.archive_now()?;
        ensure!(winner.server.failed_count()? == 0, "archive_command failed on the one that was first");
        expect_winner_alone(&world, &winner, &loser)?;

        world.coordinator.start()?;
        winner.write_wal(2)?;
        winner.archive_now()?;
        world.expect_whole(&[&winner], 2)?;
        wait::until("info and every store show the conflict", Duration::from_secs(60), || {
            for store in &world.stores {
                let holdings = world.look(&store.name)?;
                ensure!(holdings.histories.get(HISTORY) == Some(&history_of(&winner)?), "{}: history", store.name);
                ensure!(evidence(&holdings)? == history_of(&loser)?, "{}: other evidence", store.name);
            }
            let info = world.operator.json(&["info", CLUSTER])?;
            let conflicts = info["clusters"][0]["conflicts"].as_array().cloned().unwrap_or_default();
            Ok(conflicts.iter().any(|conflict| conflict["wal_file"] == HISTORY))
        })?;
        let text = world.operator.ok(&["info", CLUSTER])?;
        ensure!(text.lines().any(|line| line.contains("CONFLICT") && line.contains(HISTORY)), "not told:\n{text}");
        // The coordinator refuses it as the bucket did.
        expect_stopped(&world, &loser)
    });
}

/// The loser's archiving has stopped at its history, for PostgreSQL and for people to see.
fn expect_stopped(world: &World, loser: &Node) -> Result<()> {
    let before = loser.server.failed_count()?;
    wait::until("archive_command fails on the one that came second", Duration::from_secs(90), || {
        // The archiver tries again when a segment is finished.
        loser.server.switch_wal()?;
        wait::pause(Duration::from_millis(500));
        Ok(loser.server.failed_count()? > before)
    })?;
    ensure!(loser.server.ready_files()?.iter().any(|name| name == HISTORY), "its history does not wait any more");
    let push = loser.agent.wal_command(loser.server.data(), &["push", &format!("pg_wal/{HISTORY}")])?;
    let said = program::run(push, Duration::from_secs(90))?.exits(1)?;
    ensure!(said.contains(HISTORY), "the reason names no file: {said}");
    wait::holds("nothing of its timeline is acknowledged", WATCHED, || {
        Ok(!loser.acknowledged()?.iter().any(|name| name.starts_with("00000002")))
    })?;
    let holdings = world.look(BUCKET)?;
    ensure!(evidence(&holdings)? == history_of(loser)?, "what was refused is not kept");
    Ok(())
}

/// The bucket has all of the winner's and nothing of the loser's on the timeline of both.
fn expect_winner_alone(world: &World, winner: &Node, loser: &Node) -> Result<()> {
    let holdings = world.look(BUCKET)?;
    holdings.undamaged()?.every_acknowledged(&winner.witness)?;
    for name in holdings.segments(2) {
        for wal in &holdings.wal[&name] {
            if wal.header["node"] != winner.agent.name() {
                bail!("{name} came from {}, not from {}", wal.header["node"], winner.agent.name());
            }
        }
    }
    ensure!(!holdings.segments(2).is_empty(), "nothing of the new timeline is archived");
    ensure!(loser.server.failed_count()? > 0, "its failures are not counted");
    Ok(())
}

#[test]
fn an_old_primary_that_writes_on_beyond_the_fork_is_told() {
    scenario::play("split-old-primary", |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        let successor = standby(stage, &world, &primary, "db2")?;
        let ledger = Ledger::start(&primary.server, 100)?;
        ledger.advance(30)?;
        primary.archive_now()?;
        wait_caught_up(&primary, &successor)?;
        stop_following(&successor)?;
        successor.server.ask_promotion()?;
        successor.server.wait_promoted(PROMOTION_PATIENCE)?;
        successor.archive_now()?;
        ledger.advance(50)?;
        primary.archive_now()?;
        let holdings = world.look(DIRECTORY)?;
        ensure!(holdings.histories.contains_key(HISTORY), "the successor's history is not stored");
        let last = holdings.segments(1).pop().context("nothing of the old timeline")?;
        let info = world.operator.json(&["info", CLUSTER])?;
        let left = &info["clusters"][0]["left_behind"][0];
        ensure!(left["timeline"] == 2 && left["fork"]["timeline"] == 1, "another fork: {left}");
        ensure!(
            left["last_segment"].as_str().is_some_and(|name| name >= last.as_str()) && left["node"] == "db1",
            "not up to {last} of db1: {left}"
        );
        ensure!(left["bytes"].as_u64().is_some_and(|bytes| bytes > 0), "nothing was left behind: {left}");
        ensure!(left["parent_written"].is_string(), "the old primary is not seen: {left}");
        let text = world.operator.ok(&["info", CLUSTER])?;
        for line in ["LEFT BEHIND", "OLD PRIMARY db1 still wrote timeline 1"] {
            ensure!(text.contains(line), "{line} is not told:\n{text}");
        }
        Ok(())
    });
}
