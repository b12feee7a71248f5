//! Increments: each restored alone and compared with what the server held when it was taken; what they build on and how
//! it was found what changed; and that they cost what changed.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::wal_changes::ChangeMap;
use postgres_format::wal_summary::{self, SummaryName, cover};
use postgres_format::{Lsn, SegmentSize, SystemIdentifier, Timeline};
use repository::config::DirectoryConfig;
use repository::store::ObjectStore;
use repository::stores::directory::DirectoryStore;
use repository::wal::ArchivedChanges;
use serde_json::Value;
use tests::account::{Scratch, environment};
use tests::fleet::Operator;
use tests::ledger::{self, Ledger};
use tests::postgres::{Checksums, InitOptions, Server, installation};
use tests::runtime::block_on;
use tests::scenario::Stage;
use tests::work::strategy;
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Node, Stores, World, start_restored};
use tests::{account, program, scenario, wait};

use crate::SMALL;

const SEGMENT_BYTES: u64 = 1 << 20;
const PLAIN: InitOptions = InitOptions { checksums: Checksums::Off, ..SMALL };

/// A backup and all that the server held then, as pg_dumpall tells it.
pub(crate) struct Taken {
    pub(crate) backup: String,
    pub(crate) dump: String,
}

/// What `info` says of a backup.
fn told_of(world: &World, backup: &str) -> Result<Value> {
    let info = world.operator.json(&["info", CLUSTER])?;
    let backups = info["clusters"][0]["backups"].as_array().cloned().unwrap_or_default();
    backups.into_iter().find(|one| one["backup"] == *backup).with_context(|| format!("info does not tell of {backup}"))
}

/// Fails unless a backup is of this type, was built on that one, and its changes were found in this way.
pub(crate) fn expect(world: &World, backup: &str, kind: &str, parent: Option<&str>, method: &str) -> Result<Value> {
    let told = told_of(world, backup)?;
    let found = (told["type"].as_str(), told["parent"].as_str(), told["changes"]["method"].as_str());
    ensure!(found == (Some(kind), parent, Some(method)), "expected {kind} on {parent:?} by {method}: {told}");
    Ok(told)
}

/// All databases as text, but for what a restore empties. The keys that pg_dump draws anew each time are left out.
pub(crate) fn dump(server: &Server) -> Result<String> {
    let text = server.tool("pg_dumpall", &["--no-unlogged-table-data"])?.ok().context("pg_dumpall")?;
    Ok(text.lines().filter(|line| !line.contains("restrict")).map(|line| format!("{line}\n")).collect())
}

/// A backup of a server at rest.
pub(crate) fn take(world: &World, primary: &Node, arguments: &[&str]) -> Result<Taken> {
    let dump = dump(&primary.server)?;
    let backup = world.back_up(arguments)?.trim().to_owned();
    Ok(Taken { backup, dump })
}

/// Restores a backup, starts a server over it, and compares and checks all it holds.
pub(crate) fn expect_restorable(scratch: &Scratch, world: &World, taken: &Taken) -> Result<()> {
    expect_restorable_to(scratch, world, taken, &["--immediate"])
}

/// As [`expect_restorable`], with WAL that came after the backup, up to a target.
pub(crate) fn expect_restorable_to(scratch: &Scratch, world: &World, taken: &Taken, target: &[&str]) -> Result<()> {
    let name = format!("r{}", &taken.backup[taken.backup.len() - 8..]);
    let (data, said) = world.restore(scratch, &name, &[&["--backup", &taken.backup], target].concat())?;
    said.ok().with_context(|| format!("restore of {}", taken.backup))?;
    let restored = Server::at(scratch, &format!("{name}-verify"), data.clone())?;
    let mut verify = account::command(restored.installation().program("pg_verifybackup"));
    verify.arg("--no-parse-wal").arg(&data);
    program::run(verify, Duration::from_secs(60))?.ok().context("pg_verifybackup")?;
    drop(restored);
    let restored = start_restored(scratch, &name, &data)?;
    let dump = dump(&restored)?;
    if dump != taken.dump {
        let differing = dump.lines().zip(taken.dump.lines()).find(|(found, wanted)| found != wanted);
        anyhow::bail!("{} came back with other contents: {differing:?}", taken.backup);
    }
    expect_sound(&restored)?;
    drop(restored);
    fs::remove_dir_all(data)?;
    Ok(())
}

/// Every index and heap is as PostgreSQL's own checks want it, and visibility maps agree with their heaps.
pub(crate) fn expect_sound(server: &Server) -> Result<()> {
    let all = ["--all", "--install-missing", "--heapallindexed", "--parent-check", "--rootdescend"];
    server.tool("pg_amcheck", &all)?.ok().context("pg_amcheck")?;
    server.sql("create extension if not exists pg_visibility")?;
    let odd = server.number(
        "select coalesce(sum((select count(*) from pg_check_visible(oid)) + (select count(*) from pg_check_frozen(oid))), 0)
         from pg_class where relkind in ('r', 'm', 't')",
    )?;
    ensure!(odd == 0, "{odd} rows contradict a visibility map");
    Ok(())
}

/// Tables of several kinds, all vacuumed.
pub(crate) fn fill(server: &Server) -> Result<()> {
    server.sql(
        "create table wide (id int primary key, note text, noise text);
         create index on wide (noise);
         insert into wide select i, 'x', md5(i::text) from generate_series(1, 40000) i;
         create table shrinking as select i, repeat('y', 200) filler from generate_series(1, 20000) i;
         create table emptied as select i from generate_series(1, 5000) i;
         create table dropped as select i from generate_series(1, 5000) i;
         create table rewritten as select i, md5(i::text) m from generate_series(1, 9000) i;
         create table toasted as select i, (select string_agg(md5(j::text), '') from generate_series(1, 300) j) t
             from generate_series(1, 60) i;
         create unlogged table passing as select i from generate_series(1, 100) i;
         create sequence counter",
    )?;
    server.sql("create database shop")?;
    server.sql("vacuum (freeze, analyze)")?;
    Ok(())
}

/// Changes of all kinds; each round is unlike the others.
pub(crate) fn change(server: &Server, round: u32) -> Result<()> {
    let statements: &[&str] = match round {
        1 => &[
            "update wide set note = 'first' where id % 500 = 7",
            "insert into wide select i, 'new', md5(i::text) from generate_series(40001, 52000) i",
            "delete from shrinking where i > 4000",
            "vacuum shrinking",
            "truncate emptied",
            "create table later as select i from generate_series(1, 3000) i",
            "create database copied template shop STRATEGY_FILE",
            "select nextval('counter') from generate_series(1, 40)",
        ],
        2 => &[
            "drop table dropped",
            "create table dropped as select i + 1 as i from generate_series(1, 6000) i",
            "insert into shrinking select i, 'again' from generate_series(1, 30000) i",
            "insert into emptied select i from generate_series(1, 700) i",
            "vacuum full rewritten",
            "delete from wide where id % 3 = 0",
            "vacuum wide",
            "drop database copied",
            "create database copied template shop STRATEGY_WAL",
            "reindex table later",
        ],
        3 => &[
            "update toasted set t = t || 'z' where i % 7 = 0",
            "alter table later add column more int default 7",
            "update later set more = i where i < 100",
            "create index on later (more)",
            "vacuum (freeze) wide",
            "cluster wide using wide_pkey",
        ],
        _ => &["update wide set note = 'last' where id = 10001", "vacuum wide"],
    };
    for statement in statements {
        let words = [("STRATEGY_FILE", strategy(server, "file_copy")), ("STRATEGY_WAL", strategy(server, "wal_log"))];
        let statement = words.iter().fold((*statement).to_owned(), |text, (word, clause)| text.replace(word, clause));
        server.sql(&statement)?;
    }
    Ok(())
}

#[test]
fn every_backup_of_a_chain_is_restored_alone() {
    scenario::play("increment-chain", |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        let mut all = vec![take(&world, &primary, &[])?];
        for round in 1..=4 {
            change(&primary.server, round)?;
            all.push(take(&world, &primary, &[])?);
        }
        change(&primary.server, 5)?;
        all.push(take(&world, &primary, &["--type", "diff"])?);
        all.push(take(&world, &primary, &["--type", "full"])?);
        all.push(take(&world, &primary, &[])?);
        let ids: Vec<&str> = all.iter().map(|taken| taken.backup.as_str()).collect();
        let first = expect(&world, ids[0], "full", None, "full_copy")?;
        ensure!(first["changes"]["reason"] == "there is no backup that it could build on", "{first}");
        for number in 1..5 {
            expect(&world, ids[number], "incr", Some(ids[number - 1]), "change_maps")?;
        }
        expect(&world, ids[5], "diff", Some(ids[0]), "change_maps")?;
        expect(&world, ids[6], "full", None, "full_copy")?;
        let last = expect(&world, ids[7], "incr", Some(ids[6]), "change_maps")?;
        let (own, inherited) = (last["stored_bytes"].as_u64(), last["inherited_bytes"].as_u64());
        ensure!(own.zip(inherited).is_some_and(|(own, inherited)| own * 3 < inherited), "{last}");
        let text = world.operator.ok(&["info", CLUSTER])?;
        ensure!(text.contains(&format!("diff on {}", ids[0])), "info does not say what a diff builds on:\n{text}");
        for taken in &all {
            expect_restorable(&stage.scratch, &world, taken)?;
        }
        world.backups(SEGMENT_BYTES).map(|_| ())
    });
}

#[test]
fn increments_under_load_are_restored_to_any_moment_after_them() {
    scenario::play("increment-load", |stage| {
        let world = World::started(&stage.scratch, Stores::Both)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        primary.server.pgbench_init(2)?;
        let standby = world.standby(&stage.scratch, &primary, "db2")?;
        let ledger = Ledger::start(&primary.server, 50)?;
        let load = primary.server.pgbench(150)?;
        let mut ids = Vec::new();
        // From one node and the other in turn: both hold the same pages.
        for from in ["primary", "standby", "primary", "standby"] {
            // A standby starts where the last checkpoint that it replayed began, which must be after the parent's end.
            primary.server.sql("checkpoint")?;
            ledger.advance(20)?;
            ids.push(world.back_up(&["--from", from])?.trim().to_owned());
            ledger.advance(30)?;
        }
        let moment = ledger.advance(30)?;
        ledger.advance(10)?;
        drop(load);
        ledger.stop();
        primary.archive_now()?;
        for (number, id) in ids.iter().enumerate() {
            let parent = number.checked_sub(1).map(|before| ids[before].as_str());
            let kind = if parent.is_some() { "incr" } else { "full" };
            let method = if parent.is_some() { "change_maps" } else { "full_copy" };
            expect(&world, id, kind, parent, method)?;
            let name = format!("r{number}");
            let restored = world.restored(&stage.scratch, &name, &["--backup", id, "--target-lsn", &moment.lsn])?;
            ledger::expect_moment(&restored, &moment)?;
            expect_sound(&restored)?;
        }
        ensure!(standby.agent.name() == "db2");
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}

/// Takes away a segment between two backups from the store, as a gap in the archive would.
fn lose_wal(stage: &mut Stage, world: &World, primary: &Node) -> Result<()> {
    stage.announce("WAL", "this scenario takes a segment out of the store");
    let lost = primary.archive_now()?;
    primary.archive_now()?;
    let directory = world.directory.as_ref().context("no directory")?;
    let key = world.look(DIRECTORY)?.objects.into_keys().find(|key| key.contains(&lost)).context("no such WAL")?;
    fs::remove_file(directory.join(key))?;
    // PostgreSQL would keep it as long as it has room.
    let local = primary.wal_path(&lost);
    primary.server.sql("checkpoint")?;
    if local.exists() {
        fs::remove_file(local)?;
    }
    Ok(())
}

/// Without WAL the pages tell, where they tell everything; else all is copied.
fn without_wal(stage: &mut Stage, init: InitOptions, settings: &[(&str, &str)], expected: &str) -> Result<()> {
    let world = World::started(&stage.scratch, Stores::Directory)?;
    let mut primary = world.primary(&stage.scratch, "db1", init)?;
    if !settings.is_empty() {
        primary.server.configure(settings)?;
        primary.server.stop(tests::postgres::Stop::Fast)?;
        primary.server.start()?;
        world.wait_reported("db1")?;
    }
    fill(&primary.server)?;
    let mut all = vec![take(&world, &primary, &[])?];
    for round in 1..=3 {
        change(&primary.server, round)?;
        lose_wal(stage, &world, &primary)?;
        all.push(take(&world, &primary, &[])?);
        let (last, before) = (&all[all.len() - 1].backup, &all[all.len() - 2].backup);
        let told = match expected {
            "full_copy" => expect(&world, last, "full", None, expected)?,
            method => expect(&world, last, "incr", Some(before), method)?,
        };
        let reason = told["changes"]["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("is in no store"), "the reason is not told: {told}");
    }
    all.iter().try_for_each(|taken| expect_restorable(&stage.scratch, &world, taken))
}

#[test]
fn pages_tell_what_changed_where_wal_is_missing_and_checksums_are_on() {
    scenario::play("increment-lsn", |stage| without_wal(stage, SMALL, &[], "page_lsn"));
}

#[test]
fn pages_tell_what_changed_where_wal_is_missing_and_hints_are_logged() {
    scenario::play("increment-hints", |stage| without_wal(stage, PLAIN, &[("wal_log_hints", "on")], "page_lsn"));
}

#[test]
fn everything_is_copied_where_neither_wal_nor_pages_tell() {
    scenario::play("increment-plain", |stage| without_wal(stage, PLAIN, &[], "full_copy"));
}

/// Where archived WAL has a gap, the summaries of servers that write them tell the same.
fn summaries_tell(major: u32) {
    scenario::play(&format!("increment-summaries{major}"), |stage| {
        if installation::of_major(major).is_none() {
            ensure!(environment("CI").is_none(), "there is no PostgreSQL {major} here; tests/servers.sh fetches it");
            stage.leave_out(&format!("PostgreSQL {major}"), "a server of that version (make servers fetches it)");
            return Ok(());
        }
        stage.announce("WAL", "this scenario takes a segment out of the store for a while");
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", InitOptions { major: Some(major), ..PLAIN })?;
        primary.server.sql("alter system set summarize_wal = on")?;
        primary.server.reload()?;
        fill(&primary.server)?;
        let full = take(&world, &primary, &[])?;
        change(&primary.server, 1)?;
        change(&primary.server, 2)?;
        let lost = LostWal::take_away(&world, &primary)?;
        let increment = take(&world, &primary, &[])?;
        let told = expect(&world, &increment.backup, "incr", Some(&full.backup), "wal_summaries")?;
        let reason = told["changes"]["reason"].as_str().unwrap_or_default();
        ensure!(reason.ends_with("is in no store"), "the reason is not told: {told}");
        lost.put_back()?;
        primary.archive_now()?;
        summaries_agree(&world, &primary, &told_of(&world, &full.backup)?, &told)?;
        primary.server.sql("alter system set summarize_wal = off")?;
        primary.server.reload()?;
        change(&primary.server, 3)?;
        let lost = LostWal::take_away(&world, &primary)?;
        let without = take(&world, &primary, &[])?;
        let told = expect(&world, &without.backup, "full", None, "full_copy")?;
        let reason = told["changes"]["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("summarize_wal is off"), "the reason is not told: {told}");
        lost.put_back()?;
        expect_restorable(&stage.scratch, &world, &increment)
    });
}

#[test]
fn summaries_of_17_tell_what_changed_where_wal_is_missing() {
    summaries_tell(17);
}

#[test]
fn summaries_of_18_tell_what_changed_where_wal_is_missing() {
    summaries_tell(18);
}

/// A segment that is gone from the store and from `pg_wal` for a while.
struct LostWal {
    objects: Vec<(PathBuf, Vec<u8>)>,
}

impl LostWal {
    fn take_away(world: &World, primary: &Node) -> Result<Self> {
        let lost = primary.archive_now()?;
        primary.archive_now()?;
        let directory = world.directory.as_ref().context("no directory")?;
        let keys = world.look(DIRECTORY)?.objects.into_keys().filter(|key| key.contains(&lost));
        let paths: Vec<PathBuf> = keys.map(|key| directory.join(key)).collect();
        ensure!(!paths.is_empty(), "no object of {lost}");
        let objects = paths.into_iter().map(|path| Ok((path.clone(), fs::read(&path)?))).collect::<Result<Vec<_>>>()?;
        objects.iter().try_for_each(|(path, _)| fs::remove_file(path))?;
        primary.server.sql("checkpoint")?;
        let local = primary.wal_path(&lost);
        if local.exists() {
            fs::remove_file(local)?;
        }
        Ok(Self { objects })
    }

    fn put_back(self) -> Result<()> {
        self.objects.into_iter().try_for_each(|(path, content)| account::write_owned(&path, content))
    }
}

/// What the server's summaries tell between the starts of two backups is in what the archived WAL tells, and not much less.
fn summaries_agree(world: &World, primary: &Node, from: &Value, to: &Value) -> Result<()> {
    let start =
        |told: &Value| Ok::<Lsn, anyhow::Error>(told["start_lsn"]["text"].as_str().context("no start")?.parse()?);
    let range = start(from)?..start(to)?;
    let summaries = primary.server.data().join("pg_wal/summaries");
    let known = fs::read_dir(&summaries)?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let history = TimelineHistory::root(Timeline::FIRST);
    let mut told = ChangeMap::empty();
    for name in cover(&history, &range, &known.collect::<Vec<SummaryName>>())? {
        told.union(&wal_summary::parse(&fs::read(summaries.join(name.to_string()))?)?);
    }
    let path = world.directory.clone().context("no directory store")?;
    let store = DirectoryStore::new(DIRECTORY.parse()?, DirectoryConfig { path, full_percent: 100 })?;
    let (stores, cluster) = ([Arc::new(store) as Arc<dyn ObjectStore>], CLUSTER.parse()?);
    let system = SystemIdentifier::new(primary.server.system_identifier()?);
    let archived = ArchivedChanges::new(&stores, &cluster, system, SegmentSize::from_bytes(SEGMENT_BYTES)?);
    let maps = block_on(archived.between(&history, range, 0))?.map;
    let mut both = maps.clone();
    both.union(&told);
    ensure!(both == maps, "the summaries tell more than the maps");
    let (ours, theirs) = (maps.block_count(), told.block_count());
    ensure!(theirs > 0 && theirs * 10 >= ours * 9, "maps name {ours} blocks, summaries {theirs}");
    Ok(())
}

#[test]
fn what_was_given_up_in_a_restore_is_not_built_on() {
    scenario::play("increment-timeline", |stage| {
        for part in ["session", "agent", "operation", "coordinator", "server", "foreign", "writer", "writes", "node"] {
            stage.announce(part, "the primary is replaced by a restored one in this scenario");
        }
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        let first = take(&world, &primary, &[])?;
        change(&primary.server, 1)?;
        let moment = primary.server.text("select pg_create_restore_point('before')::text")?;
        primary.archive_now()?;
        change(&primary.server, 2)?;
        let given_up = take(&world, &primary, &[])?;
        expect(&world, &given_up.backup, "incr", Some(&first.backup), "change_maps")?;
        primary.archive_now()?;
        primary.agent.stop()?;
        primary.server.stop(tests::postgres::Stop::Fast)?;
        let (data, said) = world.restore(
            &stage.scratch,
            "db2",
            &["--target-lsn", &moment, "--backup", &first.backup, "--archive-mode", "keep"],
        )?;
        said.ok()?;
        let mut second = world.node(&stage.scratch, Server::at(&stage.scratch, "db2", data)?, &Default::default())?;
        second.server.own_socket()?;
        second.agent.start()?;
        second.server.start()?;
        second.server.wait_promoted(Duration::from_secs(60))?;
        world.wait_reported("db2")?;
        change(&second.server, 3)?;
        let after = take(&world, &second, &["--node", "db2"])?;
        let told = expect(&world, &after.backup, "incr", Some(&first.backup), "change_maps")?;
        let operations = world.operator.ok(&["operations", CLUSTER])?;
        ensure!(told["start_timeline"] == 2, "{told}\n{operations}");
        // What the first primary had written behind the target was given up on purpose, and nobody has to say so again.
        let info = world.operator.json(&["info", CLUSTER])?;
        let recovery = &info["clusters"][0]["recovery"];
        ensure!(recovery["possible"] == true && recovery["timeline"] == 2, "{recovery}");
        for taken in [&first, &given_up, &after] {
            expect_restorable(&stage.scratch, &world, taken)?;
        }
        Ok(())
    });
}

#[test]
fn an_increment_taken_while_the_coordinator_is_away_is_adopted_and_built_on() {
    scenario::play("increment-here", |stage| {
        for part in
            ["coordinator", "unavailable", "lagging", "road", "store", "direct", "session", "backup", "operation"]
        {
            stage.announce(part, "the coordinator is away in this scenario");
        }
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        fill(&primary.server)?;
        let mut all = vec![take(&world, &primary, &[])?];
        world.coordinator.kill()?;
        let address = world.coordinator.address();
        let seat = Operator::set_up(&stage.scratch, "seat", Some(address), &[], Some(&primary.agent))?;
        change(&primary.server, 1)?;
        let held = dump(&primary.server)?;
        // The coordinator may have died before the agent had its answer: then the backup before ends on the direct road first.
        let said = wait::value("the agent is free for a backup", Duration::from_secs(90), || {
            let said = seat.run(&["backup", CLUSTER, "--here", "--start-fast"])?;
            Ok((!said.err.contains("is running already")).then_some(said))
        })?;
        ensure!(said.err.contains(&format!("incr on {}", all[0].backup)), "{said:?}");
        all.push(Taken { backup: said.ok()?.trim().to_owned(), dump: held });
        let there = world.look(BUCKET)?.undamaged()?.backups(SEGMENT_BYTES)?;
        ensure!(there.len() == 2, "the bucket names {} backups", there.len());
        world.coordinator.start()?;
        wait::until("the directory has the increment too", Duration::from_secs(90), || {
            Ok(world.look(DIRECTORY)?.undamaged()?.backups(SEGMENT_BYTES)?.len() == 2)
        })?;
        world.wait_reported("db1")?;
        change(&primary.server, 2)?;
        all.push(take(&world, &primary, &[])?);
        expect(&world, &all[1].backup, "incr", Some(&all[0].backup), "change_maps")?;
        expect(&world, &all[2].backup, "incr", Some(&all[1].backup), "change_maps")?;
        // The agent may not have been back on the coordinator's road when the last one began.
        wait::until("the directory has the last increment too", Duration::from_secs(90), || {
            Ok(world.look(DIRECTORY)?.undamaged()?.backups(SEGMENT_BYTES)?.len() == all.len())
        })?;
        world.backups(SEGMENT_BYTES)?;
        all.iter().try_for_each(|taken| expect_restorable(&stage.scratch, &world, taken))
    });
}

#[test]
fn two_readers_share_the_changes_of_one_large_file() {
    scenario::play("increment-large", |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", InitOptions::default())?;
        primary.server.configure(&[("max_wal_size", "'1GB'"), ("autovacuum", "off")])?;
        primary.server.reload()?;
        primary.server.sql(
            "create table large as select i, repeat(md5(i::text), 30) as noise from generate_series(1, 160000) i",
        )?;
        world.back_up(&["--parallel", "2"])?;
        // Changes some 80 MB of its pages, far apart from each other, which are more parts than there are readers.
        primary.server.sql("update large set noise = repeat(md5(noise), 30) where i % 16 = 3")?;
        let sum = "select md5(string_agg(md5(noise), '' order by i)) from large";
        let expected = primary.server.text(sum)?;
        let backup = world.back_up(&["--parallel", "2"])?.trim().to_owned();
        let told = told_of(&world, &backup)?;
        ensure!(told["type"] == "incr" && told["changes"]["method"] == "change_maps", "{told}");
        let restored = world.restored(&stage.scratch, "db2", &["--backup", &backup, "--immediate"])?;
        ensure!(restored.text(sum)? == expected, "the increment came back with other contents");
        expect_sound(&restored)
    });
}
