//! WAL to the repository and back, and everything that must not be taken for the same file.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::account::Scratch;
use tests::ledger::{self, Ledger};
use tests::postgres::{Checksums, InitOptions, Server, Stop};
use tests::repository_check::segment_name;
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Node, NodePlan, Stores, World};
use tests::{account, program, repository_check, scenario, wait};

use crate::{SMALL, recovering_copy};

/// Longest a tiny command may take here.
const COMMAND_PATIENCE: Duration = Duration::from_secs(90);

/// Runs `pgconvoy-wal push` on a file as PostgreSQL would.
fn push(node: &Node, path: &Path) -> Result<program::Said> {
    let path = path.display().to_string();
    program::run(node.agent.wal_command(node.server.data(), &["push", &path])?, COMMAND_PATIENCE)
}

fn load_is_archived_and_replayed(stores: Stores, name: &'static str) {
    scenario::play(name, |stage| {
        stage.announce("WAL cannot leave this host", "without a bucket nothing else takes WAL while the catalog goes");
        let mut world = World::started(&stage.scratch, stores)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        primary.server.pgbench_init(1)?;
        let mut copy = recovering_copy(&stage.scratch, &world, &primary, "copy")?;
        let ledger = Ledger::start(&primary.server, 100)?;
        let load = primary.server.pgbench(300)?;
        ledger.advance(200)?;
        world.rebuild_catalog()?;
        ledger.advance(200)?;
        drop(load);
        let last = ledger.stop().pop().context("the ledger did not move")?;
        primary.archive_now()?;
        let earlier = world.expect_whole(&[&primary], 1)?;
        world.rebuild_catalog()?;
        primary.archive_now()?;
        for (now, earlier) in world.expect_whole(&[&primary], 1)?.iter().zip(&earlier) {
            now.unchanged_since(earlier)?;
        }
        ensure!(primary.server.failed_count()? == 0, "archive_command failed");
        copy.start()?;
        copy.wait_promoted(Duration::from_secs(120))?;
        ledger::expect_moment(&copy, &last)
    });
}

#[test]
fn load_is_archived_to_a_directory_and_replayed() {
    load_is_archived_and_replayed(Stores::Directory, "archive-directory");
}

#[test]
fn load_is_archived_to_a_bucket_and_replayed() {
    load_is_archived_and_replayed(Stores::Bucket, "archive-bucket");
}

#[test]
fn load_is_archived_to_both_and_replayed() {
    load_is_archived_and_replayed(Stores::Both, "archive-both");
}

#[test]
fn a_segment_pushed_again_is_success_and_another_content_a_conflict() {
    scenario::play("archive-again", |stage| {
        stage.announce("other content", "this scenario pushes other content under a stored name");
        stage.announce("several contents", "this scenario pushes other content under a stored name");
        stage.announce("a WAL file is not archived", "this scenario pushes other content under a stored name");
        let mut world = World::started(&stage.scratch, Stores::Directory)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        let (segment, other) = diverged_segment(&stage.scratch, &mut primary)?;
        let path = primary.wal_path(&segment);
        let copy = stage.scratch.path().join(&segment);
        fs::copy(&path, &copy)?;
        account::give(&copy)?;
        let before = world.look(DIRECTORY)?;
        // The same file, from the agent's memory, from its spool, and with the catalog gone.
        push(&primary, &path)?.ok()?;
        primary.agent.kill()?;
        primary.agent.start()?;
        push(&primary, &path)?.ok()?;
        world.rebuild_catalog()?;
        fs::copy(&copy, &path)?;
        push(&primary, &path)?.ok()?;
        let same = world.look(DIRECTORY)?;
        same.undamaged()?.nothing_twice(&[])?.unchanged_since(&before)?;
        // Another valid segment of that name, as a diverged copy of the server writes it.
        fs::copy(&other, &path)?;
        let said = push(&primary, &path)?.exits(1)?;
        ensure!(said.contains(&segment), "{said}");
        let both = world.look(DIRECTORY)?;
        both.unchanged_since(&same)?;
        ensure!(both.wal[&segment].len() == 2, "both contents must be kept");
        // Nobody is served until an operator chooses.
        let target = stage.scratch.path().join("fetched");
        let fetch = |expected: i32| -> Result<()> {
            let target = target.display().to_string();
            let said = world
                .operator
                .alone_in(primary.server.data(), &["fetch", "--cluster", CLUSTER, "--wait", "3s", &segment, &target])?;
            said.exits(expected).map(|_| ())
        };
        ensure!(fetch(0).is_err(), "a conflicting segment was served");
        ensure!(!target.exists(), "a conflicting segment was written");
        let fingerprint = repository_check::fingerprint(&fs::read(&copy)?);
        world.operator.ok(&["conflict", "resolve", CLUSTER, &segment, &fingerprint])?;
        fetch(0)?;
        ensure!(fs::read(&target)? == fs::read(&copy)?, "the chosen content is not what was served");
        expect_refused_for_what_they_are(&stage.scratch, &world, &primary)
    });
}

/// A text that says nothing, and what is no file, are refused at once. One that PostgreSQL itself wants archived is shown, and
/// archiving goes on when it is gone.
fn expect_refused_for_what_they_are(scratch: &Scratch, world: &World, primary: &Node) -> Result<()> {
    let (history, backup) = ("00000009.history", "000000010000000000000002.00000028.backup");
    let (history, backup) = (primary.wal_path(history), primary.wal_path(backup));
    let pipe = scratch.path().join("0000000100000000000000F0");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::from_raw_mode(0o600))?;
    account::give(&pipe)?;
    account::write_owned(&history, "")?;
    account::write_owned(&backup, "garbage\n")?;
    for (path, part) in [(&history, "names no timeline"), (&backup, "START WAL LOCATION"), (&pipe, "it is a FIFO")] {
        let said = push(primary, path)?.exits(1)?;
        ensure!(said.contains(part), "{said}");
    }
    let target = pipe.display().to_string();
    let fetched = primary.agent.wal_command(primary.server.data(), &["fetch", "000000010000000000000001", &target])?;
    let said = program::run(fetched, COMMAND_PATIENCE)?.exits(1)?;
    ensure!(said.contains("it is a FIFO, not a regular file"), "{said}");
    fs::remove_file(&backup)?;
    let flag = primary.wal_path("archive_status").join("00000009.history.ready");
    account::write_owned(&flag, "")?;
    wait::until("info names the file that holds archiving up", Duration::from_secs(60), || {
        let info = world.operator.ok(&["info", CLUSTER])?;
        Ok(info.contains("until it is rid of a file that is refused: 00000009.history: "))
    })?;
    fs::remove_file(&flag)?;
    fs::remove_file(&history)?;
    primary.archive_now().map(|_| ())
}

/// Archives a segment of the primary, and gives its name and a file with what a copy of the server, gone on by itself,
/// wrote under the same name.
fn diverged_segment(scratch: &Scratch, primary: &mut Node) -> Result<(String, PathBuf)> {
    primary.server.stop(Stop::Fast)?;
    let mut twin = primary.server.twin(scratch, "twin")?;
    twin.configure(&[("archive_command", "'/bin/false'")])?;
    primary.server.start()?;
    twin.start()?;
    primary.server.sql("create table only_in_the_primary (t text)")?;
    twin.sql("create table only_in_the_twin (i int)")?;
    let segment = primary.archive_now()?;
    let others = twin.switch_wal()?;
    ensure!(others == segment, "the twin finished {others}, not {segment}");
    let path = scratch.path().join("other-content");
    fs::copy(twin.data().join("pg_wal").join(&others), &path)?;
    account::give(&path)?;
    ensure!(fs::read(&path)? != fs::read(primary.wal_path(&segment))?, "the twin wrote the same");
    Ok((segment, path))
}

#[test]
fn a_foreign_server_and_a_second_primary_are_refused() {
    scenario::play("archive-foreign", |stage| {
        stage.announce("foreign", "this scenario pushes from servers that may not");
        stage.announce("system identifier", "this scenario pushes from servers that may not");
        stage.announce("FOREIGN_WRITER", "this scenario pushes from a second primary");
        stage.announce("writer", "this scenario pushes from a second primary");
        stage.announce("refused", "this scenario pushes from servers that may not");
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.archive_now()?;
        // Another cluster's server under this cluster's name.
        let mut foreign =
            world.node(&stage.scratch, Server::init(&stage.scratch, "db2", SMALL)?, &NodePlan::default())?;
        foreign.server.start()?;
        foreign.agent.start()?;
        let path = foreign.wal_path(&foreign.server.switch_wal()?);
        push(&foreign, &path)?.exits(1)?;
        foreign.agent.kill()?;
        foreign.server.stop(Stop::Immediate)?;
        // A copy of the primary, started beside it.
        primary.server.stop(Stop::Fast)?;
        let twin = primary.server.twin(&stage.scratch, "db3")?;
        primary.server.start()?;
        primary.write_wal(1)?;
        primary.archive_now()?;
        let mut twin = world.node(&stage.scratch, twin, &NodePlan::default())?;
        twin.server.start()?;
        twin.agent.start()?;
        twin.server.sql("create table only_in_the_twin (i int)")?;
        let before = world.expect_whole(&[&primary], 1)?.remove(0);
        // Switched more often than the primary, so that names come up which the primary has not written.
        for _ in 0..4 {
            twin.server.switch_wal()?;
        }
        wait::until("the twin's archiver fails", Duration::from_secs(60), || Ok(twin.server.failed_count()? > 0))?;
        ensure!(!twin.has_acknowledged()?, "a second primary's file was acknowledged");
        let after = world.look(DIRECTORY)?;
        after.unchanged_since(&before)?;
        ensure!(after.segments(1) == before.segments(1), "a second primary's segment got a place");
        // The operator decides that the copy goes on.
        world.wait_asked("db3")?;
        primary.agent.kill()?;
        primary.server.stop(Stop::Immediate)?;
        world.operator.ok(&["node", "adopt", CLUSTER, "db3"])?;
        Ok(())
    });
}

fn segment_size_works(mebibytes: u32, name: &'static str) {
    scenario::play(name, |stage| {
        let options = InitOptions { segment_mebibytes: mebibytes, checksums: Checksums::On, major: None };
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", options)?;
        ledger::create(&primary.server)?;
        let mut copy = recovering_copy(&stage.scratch, &world, &primary, "copy")?;
        let ledger = Ledger::start(&primary.server, 100)?;
        for _ in 0..3 {
            ledger.advance(50)?;
            primary.archive_now()?;
        }
        let last = ledger.stop().pop().context("the ledger did not move")?;
        primary.archive_now()?;
        let bytes = u64::from(mebibytes) << 20;
        let holdings = world.expect_whole(&[&primary], 1)?.remove(0);
        let segments = holdings.segments(1);
        ensure!(holdings.wal[&segments[0]][0].plain.len() as u64 == bytes, "segments have another size");
        ensure!(segments.contains(&segment_name(1, repository_check::segment_number(&segments[0], bytes)?, bytes)));
        copy.start()?;
        copy.wait_promoted(Duration::from_secs(120))?;
        ledger::expect_moment(&copy, &last)
    });
}

#[test]
fn segments_of_one_mebibyte_are_archived() {
    segment_size_works(1, "archive-1MiB");
}

#[test]
fn segments_of_sixty_four_mebibytes_are_archived() {
    segment_size_works(64, "archive-64MiB");
}

#[test]
fn two_clusters_on_one_host_do_not_mix() {
    scenario::play("archive-two", |stage| {
        stage.announce("data directory", "this scenario asks the wrong agent");
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let first = world.primary(&stage.scratch, "db1", SMALL)?;
        let plan = NodePlan { cluster: "other".into(), ..NodePlan::default() };
        let mut second = world.node(&stage.scratch, Server::init(&stage.scratch, "db2", SMALL)?, &plan)?;
        second.server.start()?;
        let system = second.server.system_identifier()?.to_string();
        world.operator.ok(&["cluster", "create", "other", "--system-identifier", &system])?;
        second.agent.start()?;
        let segment = second.archive_now()?;
        first.archive_now()?;
        // The first cluster's agent refuses the second cluster's directory, whatever the file is called.
        let wrong = first.agent.wal_command(second.server.data(), &["push", &format!("pg_wal/{segment}")])?;
        program::run(wrong, COMMAND_PATIENCE)?.exits(1)?;
        let first_holds = world.expect_whole(&[&first], 1)?.remove(0);
        let second_holds = repository_check::look(&world.stores[0], "other")?;
        second_holds.undamaged()?.every_acknowledged(&second.witness)?;
        ensure!(!first_holds.segments(1).is_empty() && !second_holds.segments(1).is_empty());
        Ok(())
    });
}

#[test]
fn the_tiny_command_never_hangs_and_never_says_more_than_one() {
    scenario::play("archive-tiny", |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        let segment = primary.archive_now()?;
        let path = primary.wal_path(&segment);
        push(&primary, &path)?.ok()?;
        // Nonsense, too, must not kill PostgreSQL's archiver.
        for arguments in [&["push"][..], &["push", "a", "b", "c"], &["push", "--nonsense", "x"]] {
            let said = program::run(primary.agent.wal_command(primary.server.data(), arguments)?, COMMAND_PATIENCE)?;
            ensure!(said.code == Some(1), "{arguments:?}: exit {:?}", said.code);
        }
        // A closed pipe for its messages.
        let mut closed = account::command("/bin/sh");
        closed.current_dir(primary.server.data()).arg("-c").arg(format!(
            "{} push pg_wal/nonsense --socket {} 2>&1 | true; exit 0",
            account::Program::Wal.path()?.display(),
            primary.agent.socket().display()
        ));
        program::run(closed, COMMAND_PATIENCE)?.ok()?;
        primary.agent.process()?.freeze()?;
        let hung = push(&primary, &path)?;
        ensure!(hung.code == Some(1), "hung agent: exit {:?}", hung.code);
        ensure!(hung.took < Duration::from_secs(75), "hung agent: {:.1} s", hung.took.as_secs_f64());
        primary.agent.process()?.thaw()?;
        push(&primary, &path)?.ok()?;
        primary.agent.kill()?;
        let absent = push(&primary, &path)?;
        ensure!(absent.code == Some(1), "no agent: exit {:?}", absent.code);
        primary.agent.start()?;
        push(&primary, &path)?.ok().map(|_| ())
    });
}

/// Largest resident memory of the agent, whatever the backlog.
const AGENT_MEMORY_BYTES: u64 = 64 << 20;

#[test]
fn four_gibibytes_of_backlog_are_drained_in_bounded_memory() {
    scenario::play("archive-backlog", |stage| {
        let options = InitOptions { segment_mebibytes: 64, checksums: Checksums::On, major: None };
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut primary = world.primary(&stage.scratch, "db1", options)?;
        primary.agent.kill()?;
        // Finished segments wait while nobody takes them; most of each is the zeros after a switch.
        primary.server.sql("alter system set archive_command = '/bin/false'")?;
        primary.server.reload()?;
        for _ in 0..64 {
            primary.server.switch_wal()?;
        }
        ensure!(primary.server.ready_files()?.len() >= 64, "no backlog");
        primary.agent.start()?;
        primary.server.sql("alter system reset archive_command")?;
        primary.server.reload()?;
        primary.server.wait_archived(0, Duration::from_secs(180))?;
        let peak = primary.agent.process()?.memory_peak_bytes()?;
        ensure!(peak <= AGENT_MEMORY_BYTES, "the agent needed {} MiB", peak >> 20);
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}

#[test]
fn a_flipped_bit_in_a_stored_segment_is_never_served() {
    scenario::play("archive-flipped", |stage| {
        stage.announce("damaged", "this scenario damages an object");
        let world = World::started(&stage.scratch, Stores::Both)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.write_wal(1)?;
        let segment = primary.archive_now()?;
        let wanted = fs::read(primary.witness.join(&segment))?;
        let holdings = world.expect_whole(&[&primary], 1)?.remove(0);
        let key = holdings.objects.keys().find(|key| key.contains(&segment)).context("not stored")?.clone();
        for position in [9, 60, holdings.shelf.read(&key)?.len() / 2] {
            holdings.shelf.flip_byte(&key, position)?;
            let target = stage.scratch.path().join(format!("fetched-{position}"));
            let target_text = target.display().to_string();
            // The other store serves.
            let both = ["fetch", "--cluster", CLUSTER, "--wait", "5s", &segment, &target_text];
            world.operator.alone_in(primary.server.data(), &both)?.ok()?;
            ensure!(fs::read(&target)? == wanted, "other bytes were served");
            fs::remove_file(&target)?;
            // Alone, the damaged one serves nothing and is no "absent".
            let alone = [&both[..], &["--without-store", BUCKET]].concat();
            let said = world.operator.alone_in(primary.server.data(), &alone)?;
            ensure!(said.code != Some(0) && !target.exists(), "damaged bytes were served: {said:?}");
            holdings.shelf.flip_byte(&key, position)?;
        }
        Ok(())
    });
}
