//! What a verification says of damage in a live fleet's store, and a repair that puts it right from the other store; and what
//! comparing a server's pages with a backup says of pages that went bad on either side.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::program::Said;
use tests::scenario;
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Node, Stores, World};

use crate::SMALL;

const SEGMENT_BYTES: u64 = 1 << 20;

/// Runs a command that prints JSON and ends with this code.
fn said(said: Said, code: i32) -> Result<Value> {
    ensure!(said.code == Some(code), "{said:?}");
    serde_json::from_str(&said.out).with_context(|| format!("{said:?}"))
}

fn verify(world: &World, arguments: &[&str], code: i32) -> Result<Value> {
    said(world.operator.run(&[&["verify", CLUSTER, "--output", "json"], arguments].concat())?, code)
}

/// Files of the directory store whose path holds a text, in order.
fn objects(directory: &Path, part: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut left = vec![directory.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(next)? {
            let path = entry?.path();
            if path.is_dir() {
                left.push(path);
            } else if path.to_string_lossy().contains(part) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn first(directory: &Path, part: &str) -> Result<PathBuf> {
    objects(directory, part)?.into_iter().next().with_context(|| format!("no object like {part}"))
}

/// Flips a bit in the middle, or cuts off the half.
fn tear(path: &Path, cut: bool) -> Result<Vec<u8>> {
    let sound = fs::read(path)?;
    let mut torn = sound.clone();
    let middle = torn.len() / 2;
    torn[middle] ^= 1;
    torn.truncate(if cut { middle } else { torn.len() });
    fs::write(path, torn)?;
    Ok(sound)
}

/// The name of the segment in which a position lies.
fn segment_of(lsn: &Value) -> Result<String> {
    let number = lsn["number"].as_u64().context("no position")? / SEGMENT_BYTES;
    Ok(format!("00000001{:08X}{:08X}", number / 4096, number % 4096))
}

#[test]
fn damage_in_one_store_is_told_with_what_it_costs_and_put_right_from_the_other() {
    scenario::play("verify-repair", |stage| {
        stage.announce("what the stores hold is not sound", "objects are damaged on purpose");
        stage.announce("unavailable", "the coordinator is stopped at the end");
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let directory = world.directory.clone().context("no directory")?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.server.pgbench_init(1)?;
        let full = world.back_up(&[])?.trim().to_owned();
        primary.server.sql("update pgbench_accounts set filler = 'x' where aid % 700 = 3")?;
        primary.write_wal(3)?;
        primary.archive_now()?;
        let increment = world.back_up(&[])?.trim().to_owned();
        primary.archive_now()?;
        world.expect_whole(&[&primary], 1)?;
        let sound = verify(&world, &["--full"], 0)?;
        ensure!(sound["schema"] == "pgconvoy.verify/v1" && sound["sound"] == true, "{sound}");
        ensure!(sound["backups"].as_array().is_some_and(|backups| backups.len() == 2), "{sound}");

        let info = world.operator.json(&["info", CLUSTER])?;
        let needed = segment_of(&info["clusters"][0]["backups"][0]["start_lsn"])?;
        let torn = [
            (first(&directory, &format!("/b/{full}/p/"))?, false),
            (first(&directory, &format!("/b/{increment}/manifest"))?, true),
            (first(&directory, &format!("/{needed}.s"))?, false),
        ];
        let originals: Vec<Vec<u8>> = torn.iter().map(|(path, cut)| tear(path, *cut)).collect::<Result<_>>()?;
        let gone = first(&directory, &format!("/b/{increment}/p/"))?;
        let gone_before = fs::read(&gone)?;
        fs::remove_file(&gone)?;
        let keys: Vec<String> =
            torn.iter().map(|(path, _)| path).chain([&gone]).map(|path| key(&directory, path)).collect();

        expect_told(&world, &keys, [&full, &increment])?;
        expect_alone_tells(&world, &keys, &full)?;
        expect_repaired(&world, &keys)?;
        for ((path, _), before) in torn.iter().zip(&originals).chain([(&(gone, false), &gone_before)]) {
            ensure!(fs::read(path)? == *before, "{} came back with other bytes", path.display());
        }
        let clean = verify(&world, &["--full"], 0)?;
        ensure!(clean["findings"] == json!([]), "{clean}");
        world.operator.ok(&["check", CLUSTER])?;
        // A coordinator that is there brings back at once what is missing at the end of the archive.
        world.coordinator.stop()?;
        expect_missing_wal_told(&world, &directory, &needed, [&full, &increment])?;
        Ok(())
    });
}

fn key(directory: &Path, path: &Path) -> String {
    path.strip_prefix(directory).unwrap_or(path).display().to_string()
}

/// Every damaged object is told with the store, the backups that need it, and who has it.
fn expect_told(world: &World, keys: &[String], backups: [&String; 2]) -> Result<()> {
    let report = verify(world, &[], 1)?;
    let findings = report["findings"].as_array().context("no findings")?;
    for key in keys {
        let told = findings.iter().find(|finding| finding["object"] == *key);
        let told = told.with_context(|| format!("{key} is not told of: {report}"))?;
        ensure!(told["store"] == DIRECTORY && told["sound_in"] == json!([BUCKET]), "{told}");
        ensure!(
            told["severity"] == "damaged" && told["backups"].as_array().is_some_and(|all| !all.is_empty()),
            "{told}"
        );
    }
    let pack = findings.iter().find(|finding| finding["object"] == keys[0]).context("no pack")?;
    ensure!(pack["backups"] == json!(backups), "an inherited pack is needed by both: {pack}");
    for backup in report["backups"].as_array().context("no backups")? {
        ensure!(backup["restorable"] == true, "the bucket has everything: {backup}");
    }
    let text = world.operator.ok(&["info", CLUSTER])?;
    ensure!(keys.iter().all(|key| text.contains(key)), "info does not tell of damage:\n{text}");
    let check = world.operator.run(&["check", CLUSTER])?.exits(1)?;
    ensure!(check.contains("contents") && check.contains("pgconvoy repair"), "{check}");
    Ok(())
}

/// The stores alone tell the same; one store alone counts on no other.
fn expect_alone_tells(world: &World, keys: &[String], full: &str) -> Result<()> {
    let alone = said(world.operator.alone(&["verify", CLUSTER, "--output", "json"])?, 1)?;
    let told = alone["findings"].as_array().context("no findings")?;
    ensure!(keys.iter().all(|key| told.iter().any(|finding| finding["object"] == *key)), "{alone}");
    let one = verify(world, &["--store", DIRECTORY, "--backup", full], 1)?;
    ensure!(one["backups"][0]["backup"] == *full && one["backups"][0]["restorable"] == false, "{one}");
    ensure!(one["findings"][0]["severity"] == "not_restorable", "{one}");
    verify(world, &["--store", BUCKET], 0).map(|_| ())
}

/// Shown first, then done.
fn expect_repaired(world: &World, keys: &[String]) -> Result<()> {
    let shown = world.operator.run(&["repair", CLUSTER])?;
    ensure!(shown.code == Some(1) && shown.err.contains("--confirm"), "{shown:?}");
    ensure!(keys.iter().all(|key| shown.out.contains(key)), "{shown:?}");
    verify(world, &[], 1)?;
    let done = world.operator.run(&["repair", CLUSTER, "--confirm"])?;
    ensure!(done.code == Some(0) && done.err.contains("4 objects put right"), "{done:?}");
    let nothing = world.operator.ok(&["repair", CLUSTER])?;
    ensure!(nothing.contains("nothing is known to be damaged"), "{nothing}");
    Ok(())
}

/// A backup whose WAL is missing is not restorable, and only that one.
fn expect_missing_wal_told(
    world: &World,
    directory: &Path,
    needed: &str,
    [full, increment]: [&String; 2],
) -> Result<()> {
    fs::remove_file(first(directory, &format!("/{needed}.s"))?)?;
    let arguments = ["verify", CLUSTER, "--store", DIRECTORY];
    let report = said(world.operator.alone(&[&arguments[..], &["--output", "json"]].concat())?, 1)?;
    let verdict = |id: &str| {
        let backups = report["backups"].as_array().cloned().unwrap_or_default();
        backups.into_iter().find(|backup| backup["backup"] == *id).with_context(|| format!("no verdict on {id}"))
    };
    let (lost, whole) = (verdict(full)?, verdict(increment)?);
    ensure!(lost["restorable"] == false && lost["reasons"].to_string().contains(needed), "{lost}");
    ensure!(whole["restorable"] == true, "{whole}");
    let text = world.operator.alone(&arguments)?.exits(1)?;
    ensure!(text.contains("NOT RESTORABLE") && text.contains("1 of 2 backups CANNOT BE RESTORED"), "{text}");
    Ok(())
}

const PAGE_BYTES: u64 = 8192;
/// The page that goes bad.
const BLOCK: u64 = 2;

/// One page of a table as it lies on the server's disk.
struct Page {
    file: fs::File,
    path: String,
}

impl Page {
    fn of(node: &Node, table: &str) -> Result<Self> {
        let path = node.server.text(&format!("select pg_relation_filepath('{table}')"))?;
        let file = fs::File::options().read(true).write(true).open(node.server.data().join(&path))?;
        Ok(Self { file, path })
    }

    fn read(&self) -> Result<Vec<u8>> {
        let mut page = vec![0; PAGE_BYTES as usize];
        self.file.read_exact_at(&mut page, BLOCK * PAGE_BYTES)?;
        Ok(page)
    }

    /// Behind the server's back, which holds the page in memory and writes it no more.
    fn write(&self, page: &[u8]) -> Result<()> {
        Ok(self.file.write_all_at(page, BLOCK * PAGE_BYTES)?)
    }

    /// Compares all pages of the server, and expects this one alone to be told of, if any.
    fn expect(&self, world: &World, fault: Option<&str>) -> Result<Value> {
        let report = verify(world, &["--source"], i32::from(fault.is_some()))?;
        ensure!(report["schema"] == "pgconvoy.verify-source/v1", "{report}");
        ensure!(report["compared"].as_u64().is_some_and(|compared| compared > 500), "{report}");
        let told: Vec<(&Value, &Value, &Value)> = report["pages"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|one| (&one["path"], &one["block"], &one["fault"]))
            .collect();
        let (path, block) = (json!(self.path), json!(BLOCK));
        match fault.map(|fault| json!(fault)) {
            None => ensure!(told.is_empty() && report["wrong"] == 0, "{report}"),
            Some(fault) => ensure!(told == [(&path, &block, &fault)] && report["wrong"] == 1, "{report}"),
        }
        Ok(report)
    }
}

#[test]
fn a_page_that_went_bad_on_the_server_is_told_from_one_that_is_stored_too_old() {
    scenario::play("verify-source", |stage| {
        stage.announce("pages of a server and what is stored of them do not agree", "pages are changed on purpose");
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        let nothing = world.operator.run(&["verify", CLUSTER, "--source"])?;
        ensure!(nothing.code == Some(1) && nothing.err.contains("there is nothing to compare with"), "{nothing:?}");
        primary.server.sql(
            "create table stocks with (autovacuum_enabled = false, fillfactor = 50) as select i, 0 as n, repeat('x', 90) as text
                            from generate_series(1, 50000) i",
        )?;
        primary.server.sql("vacuum (freeze) stocks")?;
        let row = primary.server.text(&format!("select min(i) from stocks where (ctid::text::point)[0] = {BLOCK}"))?;
        let change = |n: u32| -> Result<Vec<u8>> {
            // On the page itself, with its hint bits set, and on the disk.
            primary.server.sql(&format!("update stocks set n = {n} where i = {row}"))?;
            primary.server.sql("select count(*) from stocks")?;
            primary.server.sql("checkpoint")?;
            Page::of(&primary, "stocks")?.read()
        };
        let (page, first) = (Page::of(&primary, "stocks")?, change(1)?);
        world.back_up(&[])?;
        primary.server.sql("checkpoint")?;
        page.expect(&world, None)?;

        let mut flipped = first.clone();
        flipped[8000] ^= 1;
        page.write(&flipped)?;
        page.expect(&world, Some("server_damaged"))?;
        let text = world.operator.ok(&["info", CLUSTER])?;
        ensure!(text.contains(&format!("block {BLOCK} of {} on node db1 is damaged", page.path)), "{text}");
        ensure!(world.operator.run(&["check", CLUSTER])?.exits(1)?.contains("contents"), "check does not tell");
        page.write(&first)?;
        page.expect(&world, None)?;
        world.operator.ok(&["check", CLUSTER])?;

        // A backup that is given an older page than the server has: sound in itself, and wrong.
        let second = change(2)?;
        ensure!(second != first, "the update did not stay on its page");
        page.write(&first)?;
        world.back_up(&[])?;
        page.write(&second)?;
        primary.server.sql("checkpoint")?;
        let report = page.expect(&world, Some("stored_older"))?;
        ensure!(report["pages"][0]["object"].as_str().is_some_and(|object| object.contains("/p/")), "{report}");
        // All is well with a backup that reads the page anew, until the server loses that write.
        world.back_up(&["--type", "full"])?;
        primary.server.sql("checkpoint")?;
        page.expect(&world, None)?;
        page.write(&first)?;
        page.expect(&world, Some("server_older"))?;
        page.write(&second)?;
        page.expect(&world, None)?;
        Ok(())
    });
}
