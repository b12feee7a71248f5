//! Promotion: the new timeline's history, the old one's partial tail, what goes on, what is lost and must show.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::ledger::{self, Ledger};
use tests::proxy::Lane;
use tests::world::{CLUSTER, CoordinatorLink, DIRECTORY, Node, NodePlan, Stores, World};
use tests::{scenario, wait};

use crate::{SMALL, recovering_copy};

/// The promise of the story: a standby takes over in this time, whatever of the repository is away.
const PROMOTION_PATIENCE: Duration = Duration::from_secs(10);

/// Waits until a standby has replayed what the primary has written.
fn wait_caught_up(primary: &Node, standby: &Node) -> Result<()> {
    let lsn = primary.server.text("select pg_current_wal_flush_lsn()")?;
    wait::until("the standby has caught up", Duration::from_secs(30), || {
        Ok(standby.server.text(&format!("select pg_last_wal_replay_lsn() >= '{lsn}'"))? == "t")
    })
    .map(|_| ())
}

#[test]
fn a_promoted_standby_archives_on_and_is_restored_along() {
    scenario::play("failover-promotion", |stage| {
        let world = World::started(&stage.scratch, Stores::Any)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        let mut copy = recovering_copy(&stage.scratch, &world, &primary, "copy")?;
        let standby = world.standby(&stage.scratch, &primary, "db2")?;
        let ledger = Ledger::start(&primary.server, 100)?;
        ledger.advance(100)?;
        primary.archive_now()?;
        ledger.advance(20)?;
        ledger.stop();
        wait_caught_up(&primary, &standby)?;
        primary.server.kill()?;
        primary.agent.kill()?;
        standby.server.ask_promotion()?;
        standby.server.wait_promoted(PROMOTION_PATIENCE)?;
        let ledger = Ledger::start(&standby.server, 100)?;
        ledger.advance(50)?;
        let last = ledger.stop().pop().context("the ledger did not move")?;
        standby.archive_now()?;
        let holdings = world.expect_whole(&[&standby], 2)?.remove(0);
        ensure!(holdings.histories.contains_key("00000002.history"), "the new timeline's history is not stored");
        let partials: Vec<&String> = holdings.wal.keys().filter(|name| name.ends_with(".partial")).collect();
        ensure!(partials.len() == 1, "the old timeline's tail: {partials:?}");
        ensure!(!holdings.segments(2).is_empty(), "no segment of the new timeline");
        copy.start()?;
        copy.wait_promoted(Duration::from_secs(120))?;
        ledger::expect_moment(&copy, &last)
    });
}

#[test]
fn what_a_dead_primary_never_archived_shows_as_a_gap() {
    scenario::play("failover-gap", |stage| {
        stage.announce("gap", "WAL is lost in this scenario");
        let world = World::started(&stage.scratch, Stores::Any)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.archive_now()?;
        let standby = world.standby(&stage.scratch, &primary, "db2")?;
        // From here on nothing of the primary reaches the archive.
        primary.agent.kill()?;
        primary.server.sql("alter system set archive_command = '/bin/false'")?;
        primary.server.reload()?;
        let lost = primary.server.switch_wal()?;
        primary.write_wal(3)?;
        wait_caught_up(&primary, &standby)?;
        primary.server.kill()?;
        standby.server.ask_promotion()?;
        standby.server.wait_promoted(PROMOTION_PATIENCE)?;
        standby.write_wal(2)?;
        standby.archive_now()?;
        let holdings = world.expect_whole(&[&standby], 2)?.remove(0);
        ensure!(!holdings.wal.contains_key(&lost), "{lost} was archived after all; nothing is lost here");
        let info = world.operator.json(&["info", CLUSTER])?;
        ensure!(mentions_gap(&info), "info shows no gap: {info}");
        Ok(())
    });
}

/// Whether any `gaps` list of the report holds something.
fn mentions_gap(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.iter().any(|(name, field)| {
            (name == "gaps" && field.as_array().is_some_and(|list| !list.is_empty())) || mentions_gap(field)
        }),
        Value::Array(list) => list.iter().any(mentions_gap),
        _ => false,
    }
}

#[test]
fn with_host_and_primary_dead_the_standby_promotes_in_time_on_an_unused_timeline() {
    scenario::play("failover-dead", |stage| {
        for part in
            ["coordinator", "unavailable", "direct", "store", "road", "session", "lagging", "isolated", "strained"]
        {
            stage.announce(part, "the repository host is dead in this scenario");
        }
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        let plan = NodePlan { coordinator_link: CoordinatorLink::Breakable, ..NodePlan::default() };
        let mut standby = world.node(&stage.scratch, primary.server.standby(&stage.scratch, "db2")?, &plan)?;
        standby.server.start()?;
        standby.agent.start()?;
        // A test restore was promoted and archived its history: timeline 2 is used.
        let mut clone =
            world.node(&stage.scratch, primary.server.copy(&stage.scratch, "db3")?, &NodePlan::default())?;
        tests::account::write_owned(&clone.server.data().join("recovery.signal"), "")?;
        primary.archive_now()?;
        clone.agent.start()?;
        clone.server.start()?;
        clone.server.wait_promoted(Duration::from_secs(60))?;
        clone.archive_now()?;
        ensure!(world.look(DIRECTORY)?.histories.contains_key("00000002.history"));
        drop(clone);
        let ledger = Ledger::start(&primary.server, 50)?;
        ledger.advance(50)?;
        ledger.stop();
        wait_caught_up(&primary, &standby)?;
        let held = ledger::holding(&standby.server)?;
        wait::pause(HISTORY_SPREAD);
        // Nothing answers any more, and nothing refuses either: the worst kind of away.
        world.coordinator.kill()?;
        standby.to_coordinator.set(Lane::Silent, Lane::Silent);
        if let Some(link) = &standby.to_s3 {
            link.set(Lane::Silent, Lane::Silent);
        }
        primary.server.kill()?;
        primary.agent.kill()?;
        standby.server.ask_promotion()?;
        standby.server.wait_promoted(PROMOTION_PATIENCE)?;
        let timeline = standby.server.text("select timeline_id from pg_control_checkpoint()")?;
        let file = standby.server.text("select pg_walfile_name(pg_current_wal_lsn())")?;
        ensure!(file.starts_with("00000003"), "promoted onto a used timeline: {file} (checkpoint on {timeline})");
        ensure!(ledger::holding(&standby.server)? == held, "commits were lost");
        Ok(())
    });
}

/// How long an agent may take to hear of a new timeline's history.
const HISTORY_SPREAD: Duration = Duration::from_secs(12);
