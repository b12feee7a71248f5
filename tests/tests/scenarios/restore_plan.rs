//! What a restore chooses by itself: the backup that lies before a transaction, and the line of timelines that goes on.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postgres_format::SystemIdentifier;
use repository::config::DirectoryConfig;
use repository::key;
use repository::stores::directory::DirectoryStore;
use repository::wal::{Sink, VariantCheck, WalEncoder, WalFacts, put};
use serde_json::Value;
use tests::account;
use tests::ledger::{self, Ledger};
use tests::repository_check::{fingerprint, segment_name};
use tests::runtime::block_on;
use tests::world::{CLUSTER, DIRECTORY, Node, NodePlan, Stores, World};
use tests::{scenario, wait};

use crate::SMALL;

/// Commits a second while two servers live.
const COMMITS_PER_SECOND: u32 = 25;

/// The plan of a restore, not carried out.
fn plan(world: &World, arguments: &[&str]) -> Result<Value> {
    let fixed = ["restore", CLUSTER, "--to", "/nonexistent/restored", "--dry-run", "--output", "json"];
    let text = world.operator.alone(&[&fixed, arguments].concat())?.ok()?;
    serde_json::from_str(&text).with_context(|| text.clone())
}

fn backup_of(plan: &Value) -> Result<&str> {
    plan["backup"]["backup"].as_str().with_context(|| format!("no backup in {plan}"))
}

#[test]
fn a_transaction_is_restored_from_a_backup_that_lies_before_it() {
    scenario::play("restore-transaction", |stage| {
        let world = World::started(&stage.scratch, Stores::Any)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        let ledger = Ledger::start(&primary.server, 100)?;
        let before_all = ledger.advance(20)?;
        world.back_up(&[])?;
        let between = ledger.advance(60)?;
        world.back_up(&[])?;
        let last = ledger.advance(20)?;
        ledger.advance(20)?;
        ledger.stop();
        primary.archive_now()?;

        let latest = plan(&world, &[])?;
        let older = plan(&world, &["--target-xid", &between.xid])?;
        ensure!(backup_of(&older)? < backup_of(&latest)?, "{} for {between:?}", backup_of(&older)?);
        ensure!(backup_of(&plan(&world, &["--target-xid", &last.xid])?)? == backup_of(&latest)?);
        let restored = world.restored(&stage.scratch, "between", &["--target-xid", &between.xid])?;
        ledger::expect_moment(&restored, &between)?;

        let (data, said) = world.restore(&stage.scratch, "early", &["--target-xid", &before_all.xid])?;
        ensure!(said.code == Some(5) && !data.exists(), "restored from a backup that is too new: {said:?}");
        let named = format!("transaction {} may have ended before backup {}", before_all.xid, backup_of(&older)?);
        ensure!(said.err.contains(&named) && said.err.contains("--backup"), "{}", said.err);
        let (_, said) = world.restore(&stage.scratch, "reserved", &["--target-xid", "2"])?;
        ensure!(said.code == Some(2), "a reserved id: {said:?}");
        Ok(())
    });
}

/// A copy of the primary that was opened with its agent and its archiving on, and is quiet: on timeline 2.
fn opened_copy(stage: &scenario::Stage, world: &World, primary: &Node) -> Result<Node> {
    let server = primary.server.copy(&stage.scratch, "db3")?;
    let mut copy = world.node(&stage.scratch, server, &NodePlan::default())?;
    copy.server.configure(&[("autovacuum", "off")])?;
    account::write_owned(&copy.server.data().join("recovery.signal"), "")?;
    copy.agent.start()?;
    copy.server.start()?;
    copy.server.wait_promoted(Duration::from_secs(60))?;
    copy.archive_now()?;
    wait::until("the new timeline's history is stored", Duration::from_secs(60), || {
        let held: Result<Vec<_>> = world.stores.iter().map(|store| world.look(&store.name)).collect();
        Ok(held?.iter().all(|holdings| holdings.histories.contains_key("00000002.history")))
    })?;
    Ok(copy)
}

#[test]
fn a_copy_that_lives_beside_its_origin_captures_no_restore() {
    scenario::play("restore-two-lines", |stage| {
        let world = World::started(&stage.scratch, Stores::Any)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        let ledger = Ledger::start(&primary.server, COMMITS_PER_SECOND)?;
        ledger.advance(10)?;
        world.back_up(&[])?;
        ledger.advance(10)?;
        primary.archive_now()?;
        let copy = opened_copy(stage, &world, &primary)?;
        // Whole segments with commits behind the parting, at once: no clock tells that they are later.
        primary.write_wal(2)?;
        ledger.advance(10)?;
        let last = ledger.stop().pop().context("the ledger did not move")?;
        primary.archive_now()?;

        // The copy was only opened to be looked at.
        let quiet = plan(&world, &[])?;
        ensure!(quiet["timeline"]["number"] == 1, "{quiet}");
        ensure!(quiet["warnings"].to_string().contains("timeline 2 forked off and holds no commits"), "{quiet}");

        copy.server.sql("create table of_the_copy as select generate_series(1, 1000) i")?;
        copy.archive_now()?;
        let (data, said) = world.restore(&stage.scratch, "undecided", &[])?;
        ensure!(said.code == Some(5) && !data.exists(), "a line was guessed: {said:?}");
        for part in ["timelines 1, 2 were written side by side", "timeline 1 reaches", "timeline 2 reaches"] {
            ensure!(said.err.contains(part), "{part:?} is not told: {}", said.err);
        }
        ensure!(said.err.contains("--target-timeline"), "the way out is not told: {}", said.err);
        let info = world.operator.alone(&["info", CLUSTER])?.ok()?;
        ensure!(info.contains("timelines 1, 2 were written side by side"), "{info}");

        let origin = world.restored(&stage.scratch, "origin", &["--target-timeline", "1"])?;
        ledger::expect_moment(&origin, &last)?;
        ensure!(origin.text("select to_regclass('of_the_copy') is null")? == "t", "the copy's table is there");
        let of_copy = world.restored(&stage.scratch, "of-copy", &["--target-timeline", "2"])?;
        ensure!(of_copy.number("select count(*) from of_the_copy")? == 1000);
        ensure!(ledger::holding(&of_copy)?.commits < last.commits, "the copy holds what was committed beside it");

        world.operator.ok(&["node", "adopt", CLUSTER, "db1"])?;
        let adopted = plan(&world, &[])?;
        ensure!(adopted["timeline"]["number"] == 1, "{adopted}");
        ensure!(adopted["reasons"].to_string().contains("node db1 was adopted"), "{adopted}");
        // The word that was said last counts, whichever timeline it is about, and without anything archived since.
        world.operator.ok(&["node", "adopt", CLUSTER, "db3"])?;
        let adopted = plan(&world, &[])?;
        ensure!(adopted["timeline"]["number"] == 2, "{adopted}");
        let info = world.operator.json(&["info", CLUSTER])?;
        let recovery = &info["clusters"][0]["recovery"];
        ensure!(recovery["possible"] == true && recovery["windows"][0]["timeline"] == 2, "{recovery}");
        Ok(())
    });
}

#[test]
fn a_backup_whose_wal_was_decided_away_is_passed_over() {
    scenario::play("plan-decided-away", |stage| {
        for part in ["conflict", "contents", "another node writes"] {
            stage.announce(part, "a second content of one segment is put into the store in this scenario");
        }
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        let before = world.back_up(&[])?.trim().to_owned();
        primary.archive_now()?;
        let backup = world.back_up(&["--type", "full"])?.trim().to_owned();
        primary.archive_now()?;
        let info = world.operator.json(&["info", CLUSTER])?;
        let backups = info["clusters"][0]["backups"].as_array().cloned().unwrap_or_default();
        let told = backups.iter().find(|one| one["backup"] == *backup).context("no such backup")?;
        let (start, size) = (told["start_lsn"]["number"].as_u64().context("no start")?, primary.segment_bytes()?);
        let name = segment_name(1, start / size, size);
        // What another server, a copy from before the backup, would have written there.
        let mut content = fs::read(primary.witness.join(&name))?;
        content[usize::try_from(start % size)?] ^= 1;
        let path = world.directory.clone().context("no directory store")?;
        let config = DirectoryConfig { path: path.clone(), full_percent: 100 };
        let store = DirectoryStore::new(DIRECTORY.parse()?, config)?;
        let mut encoder = WalEncoder::new(3, Sink::Memory)?;
        encoder.push(&content)?;
        let other = encoder.finish(WalFacts {
            cluster: CLUSTER.parse()?,
            system_identifier: SystemIdentifier::new(primary.server.system_identifier()?),
            name: name.parse()?,
            node: "db9".parse()?,
            in_recovery: false,
            complete: true,
            logical_end: None,
            postgres_major: Some(primary.server.installation().major),
            first_commit_time: None,
            last_commit_time: None,
            written: process::clock::now(),
        })?;
        let (cluster, system, file) = (&other.header.cluster, other.header.system_identifier, &other.header.name);
        let key = key::wal(cluster, system, file, &other.fingerprint);
        block_on(put(&store, &other, VariantCheck::Skip))?;
        account::give(&path.join(key.as_str()))?;
        world.operator.ok(&["conflict", "resolve", CLUSTER, &name, &fingerprint(&content)])?;
        let target = stage.scratch.path().join("nothing").display().to_string();
        let planned = plan(&world, &[])?;
        ensure!(backup_of(&planned)? == before, "{planned}");
        let warnings = planned["warnings"].to_string();
        ensure!(warnings.contains(&backup) && warnings.contains("taken of another server"), "{warnings}");
        let named = ["restore", CLUSTER, "--to", &target, "--dry-run", "--backup", &backup];
        let refused = world.operator.alone(&named)?.exits(5)?;
        ensure!(refused.contains("taken of another server"), "{refused}");
        for (who, info) in [
            ("the coordinator", world.operator.ok(&["info", CLUSTER])?),
            ("the stores alone", world.operator.alone(&["info", CLUSTER])?.ok()?),
        ] {
            let told = format!("NOT RESTORABLE: backup {backup} was taken of another server");
            ensure!(info.contains(&told) && info.contains(&format!("from backup {before}")), "{who}: {info}");
        }
        Ok(())
    });
}
