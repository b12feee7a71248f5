//! What people and scripts do with a fleet: a script by reflection, the verbs of the operator's command, TLS, and
//! everything that is refused.

mod refusals;
mod secure;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::ledger;
use tests::program::{self, Said};
use tests::world::{BUCKET, CLUSTER, DIRECTORY, Node, Stores, World};
use tests::{scenario, wait};

use crate::SMALL;

const SEGMENT_BYTES: u64 = 1 << 20;
const OPERATOR: &str = "pgconvoy.operator.v1.OperatorService";

/// Runs the script as whoever runs the tests, because that is whose Python modules preflight has looked for.
fn script(arguments: &[&str]) -> Result<(Said, Vec<Value>)> {
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/python.sh"));
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/take_backup.py")).args(arguments);
    let said = program::run(command, Duration::from_secs(180))?;
    let lines: Result<Vec<Value>, _> = said.out.lines().map(serde_json::from_str).collect();
    let lines = lines.with_context(|| format!("{said:?}"))?;
    Ok((said, lines))
}

/// Checks what the script printed about a backup that was taken; gives the backup's identifier.
fn expect_taken(said: &Said, lines: &[Value]) -> Result<String> {
    ensure!(said.code == Some(0), "{said:?}");
    let told: BTreeMap<&str, &Value> =
        lines.iter().filter_map(|line| Some((line["wrong"].as_str()?, &line["told"]))).collect();
    for (call, reason) in [("StartBackup", "CLUSTER_UNKNOWN"), ("WatchOperation", "OPERATION_UNKNOWN")] {
        let told = told.get(call).with_context(|| format!("{call} was not tried: {lines:?}"))?;
        ensure!(told["reason"] == reason && told["domain"] == "pgconvoy", "{call} was told {told}");
    }
    ensure!(lines.iter().any(|line| line["started"]["operation"].is_string()), "{lines:?}");
    let watched: Vec<&Value> = lines.iter().filter_map(|line| line.get("watched")).collect();
    ensure!(watched.len() > 1, "the progress was not followed: {lines:?}");
    let ended = &lines.last().context("the script said nothing")?["ended"];
    ensure!(ended["state"] == "OPERATION_STATE_DONE" && ended["ended"].is_string(), "{ended}");
    Ok(ended["backup"].as_str().context("no backup in the operation")?.to_owned())
}

#[test]
fn a_script_by_reflection_starts_a_backup_follows_it_and_reads_an_errors_detail() {
    scenario::play("operator-script", |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        primary.server.pgbench_init(1)?;
        let address = world.coordinator.address().to_string();
        let (said, lines) = script(&[&address, CLUSTER])?;
        let backup = expect_taken(&said, &lines)?;
        ensure!(world.backups(SEGMENT_BYTES)? == [backup], "the store names other backups");
        let (said, lines) = script(&[&address, CLUSTER, "--node", "nobody"])?;
        let refused = &lines.last().context("the script said nothing")?["refused"];
        ensure!(said.code == Some(4) && refused["reason"] == "NO_FIT_NODE", "{said:?}");
        Ok(())
    });
}

/// What `pgconvoy.info/v1` promises: the fields of every object, by where it stands.
const INFO_FIELDS: [(&str, &str); 11] = [
    ("", "schema generated clusters"),
    ("/clusters/0", "cluster systems stores recovery backups timelines at_risk conflicts incomplete problems fleet"),
    ("/clusters/0/systems/0", "system_identifier postgres_major segment_size_bytes since"),
    ("/clusters/0/stores/0", "store state detail backups wal_objects wal_bytes free_bytes total_bytes root_generation"),
    ("/clusters/0/recovery", "possible reason earliest_time latest_time latest_lsn timeline backup windows"),
    (
        "/clusters/0/recovery/windows/0",
        "system_identifier timeline earliest_time latest_time earliest_lsn latest_lsn backups",
    ),
    (
        "/clusters/0/backups/0",
        "backup label node from_standby system_identifier postgres_major start_timeline stop_timeline start_lsn \
         stop_lsn start_time stop_time files data_bytes stored_bytes page_errors stores",
    ),
    ("/clusters/0/backups/0/start_lsn", "text number"),
    ("/clusters/0/timelines/0", "system_identifier timeline parent history_present own ranges gaps tip"),
    ("/clusters/0/timelines/0/ranges/0", "start end bytes"),
    (
        "/clusters/0/fleet/nodes/0",
        "node connected last_seen role timeline lsn archived_lsn ready_files ready_oldest_seconds road agent_version \
         postgres_version full_in_seconds problems",
    ),
];

fn expect_info_fields(info: &Value) -> Result<()> {
    ensure!(info["schema"] == "pgconvoy.info/v1", "schema {}", info["schema"]);
    for (place, fields) in INFO_FIELDS {
        let object = info.pointer(place).with_context(|| format!("nothing at {place}"))?;
        for field in fields.split_whitespace() {
            ensure!(object.get(field).is_some(), "{place} has no {field}: {object}");
        }
    }
    Ok(())
}

#[test]
fn the_operators_verbs_say_what_they_promise() {
    scenario::play("operator-verbs", |stage| {
        stage.announce("unavailable", "the coordinator is stopped at the end");
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        world.back_up(&["--label", "for the report"])?;
        primary.archive_now()?;
        let info = world.operator.json(&["info", CLUSTER])?;
        expect_info_fields(&info)?;
        ensure!(info["clusters"][0]["backups"][0]["stores"] == json!([DIRECTORY, BUCKET]), "{info}");
        let alone = world.operator.alone(&["info", CLUSTER, "--output", "json"])?.ok()?;
        let alone: Value = serde_json::from_str(&alone)?;
        ensure!(alone["clusters"][0]["backups"] == info["clusters"][0]["backups"], "two reports of the backups");
        expect_check(&world)?;
        expect_broken_command(&world, &primary)?;
        expect_rpc(&world)?;
        world.coordinator.stop()?;
        world.operator.run(&["rpc"])?.exits(4)?;
        let unknown = world.operator.run(&["check", CLUSTER, "--nagios"])?;
        ensure!(unknown.code == Some(3) && unknown.out.starts_with("PGCONVOY UNKNOWN - "), "{unknown:?}");
        world.operator.run(&["check", CLUSTER])?.exits(4).map(|_| ())
    });
}

/// `check` names the road and each store, in both forms.
fn expect_check(world: &World) -> Result<()> {
    let check = world.operator.json(&["check", CLUSTER])?;
    ensure!(check["schema"] == "pgconvoy.check/v1" && check["ok"] == true, "{check}");
    let rules = check["rules"].as_array().context("no rules")?;
    let rule = |name: &str| rules.iter().find(|rule| rule["rule"] == name).map(|rule| rule["text"].to_string());
    let road = rule("node db1").context("no rule about the node")?;
    ensure!(road.contains("road coordinator"), "{road}");
    for store in [DIRECTORY, BUCKET] {
        for name in [format!("store {store}"), format!("segment in {store}")] {
            ensure!(rule(&name).is_some(), "no rule \"{name}\" in {check}");
        }
    }
    let text = world.operator.ok(&["check", CLUSTER])?;
    ensure!(text.contains("road coordinator") && text.contains(DIRECTORY) && text.contains(BUCKET), "{text}");
    let limits = ["--retention-full", "1", "--retention-age", "1h", "--archives", "--archive-age", "10min"];
    let plugin = |limits: &[&str]| world.operator.run(&[&["check", CLUSTER, "--nagios"], limits].concat());
    let good = plugin(&limits)?.exits(0)?;
    ensure!(good.starts_with("PGCONVOY OK - ") && good.contains("full_backups=1;;1:;0 backup_age="), "{good}");
    let bad = plugin(&["--retention-full", "2"])?.exits(2)?;
    ensure!(bad.starts_with("PGCONVOY CRITICAL - ") && bad.contains("expected at least 2"), "{bad}");
    let theirs = world.operator.ok(&["info", CLUSTER, "--output", "pgbackrest-json"])?;
    let theirs: Value = serde_json::from_str(&theirs)?;
    ensure!(theirs[0]["status"]["code"] == 0 && theirs[0]["backup"][1]["database"]["repo-key"] == 2, "{theirs}");
    let unknown = world.operator.run(&["check", "nothing"])?.exits(5)?;
    ensure!(unknown.contains("nothing") && unknown.contains("pgconvoy cluster create"), "{unknown}");
    Ok(())
}

/// WAL that goes ahead of PostgreSQL does not hide that PostgreSQL's own command is broken.
fn expect_broken_command(world: &World, primary: &Node) -> Result<()> {
    primary.server.sql("alter system set archive_command = '/bin/false'")?;
    primary.server.reload()?;
    let said = world.operator.run(&["check", CLUSTER, "--timeout", "5s"])?.exits(1)?;
    ensure!(said.contains("archive_command of db1") && said.contains("pgconvoy-wal push %p"), "{said}");
    primary.server.sql("alter system reset archive_command")?;
    primary.server.reload()?;
    world.operator.ok(&["check", CLUSTER]).map(|_| ())
}

/// `rpc` lists methods, calls them, streams, and tells errors with their details and the exit codes of the table.
fn expect_rpc(world: &World) -> Result<()> {
    let methods = world.operator.ok(&["rpc"])?;
    for method in ["GetInfo", "StartBackup", "WatchOperation", "RebuildCatalog"] {
        ensure!(methods.lines().any(|line| line == format!("{OPERATOR}/{method}")), "{method} is not in\n{methods}");
    }
    let get_info = format!("{OPERATOR}/GetInfo");
    let answer: Value = serde_json::from_str(&world.operator.ok(&["rpc", &get_info, r#"{"cluster":"main"}"#])?)?;
    expect_info_fields(&serde_json::from_str(answer["info_json"].as_str().context("no info_json")?)?)?;
    let listed: Value = serde_json::from_str(&world.operator.ok(&["rpc", "OperatorService/ListOperations"])?)?;
    let operation = listed["operations"][0]["operation"].as_str().context("no operation")?.to_owned();
    let watch = json!({ "operation": operation }).to_string();
    let watched = world.operator.ok(&["rpc", "OperatorService/WatchOperation", &watch])?;
    let last: Value = serde_json::from_str(watched.lines().last().context("nothing was streamed")?)?;
    ensure!(last["operation"]["state"] == "OPERATION_STATE_DONE", "{watched}");
    let refusals = [
        ("StartBackup", r#"{"cluster":"nothing"}"#, 5, "CLUSTER_UNKNOWN"),
        ("StartBackup", r#"{"cluster":"main","node":"nobody"}"#, 5, "NO_FIT_NODE"),
        ("GetOperation", r#"{"operation":"none"}"#, 1, "OPERATION_UNKNOWN"),
        ("WatchOperation", r#"{"operation":"none"}"#, 1, "OPERATION_UNKNOWN"),
    ];
    for (method, request, code, reason) in refusals {
        let said = world.operator.run(&["rpc", &format!("{OPERATOR}/{method}"), request])?;
        ensure!(said.code == Some(code), "{method} {request}: {said:?}");
        let error: Value = serde_json::from_str(said.err.trim()).with_context(|| said.err.clone())?;
        ensure!(error["reason"] == reason && error["domain"] == "pgconvoy", "{method} {request}: {error}");
        ensure!(error["message"].as_str().is_some_and(|message| message.len() > 10), "{error}");
    }
    let misuses = [
        (["rpc", "GetInfo", "{}"], "SERVICE/METHOD"),
        (["rpc", "OperatorService/Nothing", "{}"], "no method Nothing"),
        (["rpc", "NoService/GetInfo", "{}"], "no service NoService"),
        (["rpc", "OperatorService/GetInfo", r#"{"clutser":"main"}"#], "clutser"),
        (["rpc", "OperatorService/StartBackup", r#"{"cluster":"Not A Name"}"#], "Not A Name"),
    ];
    for (arguments, part) in misuses {
        let text = world.operator.run(&arguments)?.exits(2)?;
        ensure!(text.contains(part), "{part} is not in {text}");
    }
    Ok(())
}

#[test]
fn a_deleted_catalog_is_rebuilt_to_the_same_report_between_all_steps() {
    scenario::play("operator-rebuild", |stage| {
        let mut world = World::started(&stage.scratch, Stores::Both)?;
        stage.announce("unavailable", "the coordinator is stopped between the steps");
        stage.announce("road", "the road turns away while the coordinator is stopped");
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        ledger::create(&primary.server)?;
        // Nothing may be on its way into the stores while two reports are compared.
        primary.archive_now()?;
        expect_same_after_rebuild(&mut world)?;
        primary.write_wal(3)?;
        primary.archive_now()?;
        expect_same_after_rebuild(&mut world)?;
        world.back_up(&[])?;
        expect_same_after_rebuild(&mut world)?;
        primary.write_wal(2)?;
        primary.archive_now()?;
        expect_same_after_rebuild(&mut world)?;
        let restored = world.restored(&stage.scratch, "restored", &["--latest"])?;
        ledger::holding(&restored)?;
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}

fn expect_same_after_rebuild(world: &mut World) -> Result<()> {
    let before = settled(world)?;
    world.rebuild_catalog()?;
    let after = settled(world)?;
    ensure!(before == after, "before the catalog was deleted:\n{before:#}\nafter it was rebuilt:\n{after:#}");
    Ok(())
}

/// The report once every store has been asked and knows what the server is like, which a coordinator that has just started
/// sees to in its own time.
pub(crate) fn settled(world: &World) -> Result<Value> {
    world.wait_reported("db1")?;
    wait::value("every store has been asked", Duration::from_secs(30), || {
        let info = world.operator.json(&["info", CLUSTER])?;
        let stores = info["clusters"][0]["stores"].as_array().context("no stores")?;
        let asked = stores.iter().all(|store| store["state"] == "available");
        let level = stores.iter().all(|store| store["root_generation"] == stores[0]["root_generation"]);
        let systems = info["clusters"][0]["systems"].as_array().context("no systems")?;
        let known = systems.iter().all(|system| !system["segment_size_bytes"].is_null());
        (asked && level && known).then(|| lasting(info)).transpose()
    })
}

/// A report without what is of the moment: when it was made, how nodes are, how much room is left.
fn lasting(mut info: Value) -> Result<Value> {
    let cluster = info["clusters"][0].as_object_mut().context("no cluster")?;
    cluster.remove("fleet");
    let stores = cluster.get_mut("stores").and_then(Value::as_array_mut).context("no stores")?;
    for store in stores.iter_mut().filter_map(Value::as_object_mut) {
        store.remove("free_bytes");
    }
    Ok(info["clusters"][0].take())
}

/// Replaces what differs from run to run.
fn stable(text: &str, scratch: &Path) -> String {
    text.replace(&scratch.display().to_string(), "SCRATCH")
}
