//! Bad input: every refusal names the thing, what was expected and what to do, with the exit code of the table.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::account::{self, Program, Scratch};
use tests::fleet::Operator;
use tests::postgres::Server;
use tests::world::{CLUSTER, Node, NodePlan, Stores, World};
use tests::{program, scenario, wait};

use super::{SMALL, stable};

/// What is wrong, lines for the top of a file, lines for its end.
type Case = (&'static str, &'static str, &'static str);

const COORDINATOR_CASES: [Case; 10] = [
    ("a misspelt key", "store_patiense = \"5s\"", ""),
    ("a misspelt key of a store", "", "full_percnt = 90"),
    ("an address that others reach, without TLS", "listen = \"0.0.0.0:8432\"", ""),
    ("a store over its brim", "", "full_percent = 150"),
    ("no patience", "store_patience = \"0s\"", ""),
    ("a span without a unit", "store_patience = \"10\"", ""),
    ("an unknown way to acknowledge", "ack = \"most\"", ""),
    (
        "certificates that are not there",
        "",
        "[tls]\ncertificate = \"/nowhere/c\"\nkey = \"/nowhere/k\"\nclient_ca = \"/nowhere/a\"",
    ),
    (
        "a cron expression with four fields",
        "",
        "[[cluster]]\nname = \"main\"\n[[cluster.schedule]]\ncron = \"0 1 * *\"",
    ),
    (
        "a bucket without a region",
        "",
        "[[store]]\nname = \"cloud\"\nkind = \"s3\"\nendpoint = \"http://127.0.0.1:1\"\nbucket = \"b\"\n\
         access_key_id = \"a\"\nsecret_access_key = \"s\"",
    ),
];

const AGENT_CASES: [Case; 13] = [
    ("a misspelt key", "", "[archive]\nmemery = \"24MiB\""),
    ("a cluster name with a space", "cluster = \"Main cluster\"", ""),
    ("push_wait below its bound", "", "[archive]\npush_wait = \"49s\""),
    ("patience that push_wait does not cover", "", "[road]\nsilence_patience = \"40s\""),
    ("too little memory", "", "[archive]\nmemory = \"1MiB\""),
    ("a size that is none", "", "[archive]\nmemory = \"lots\""),
    ("a size beyond all numbers", "", "[spool]\nmax_size = \"99999999999999TiB\""),
    ("a negative size", "", "[spool]\nmax_size = \"-1GiB\""),
    ("a compression level that zstd lacks", "", "[archive]\ncompression_level = 40"),
    ("a thousand readers", "", "[archive]\nparallel = 1000"),
    ("a coordinator elsewhere, without TLS", "", "[coordinator]\naddress = \"http://192.0.2.7:8432\""),
    ("https without certificates", "", "[coordinator]\naddress = \"https://repo1:8432\""),
    ("a spool that a backup would copy", "", "[spool]\ndirectory = \"SCRATCH/data/spool\""),
];

const SEAT_CASES: [Case; 4] = [
    ("a misspelt key", "", "[coordinator]\nadress = \"http://127.0.0.1:8432\""),
    ("https without certificates", "", "[coordinator]\naddress = \"https://repo1:8432\""),
    ("an address that is none", "", "[coordinator]\naddress = \"not an address\""),
    ("a store of an unknown kind", "", "[[store]]\nname = \"tape\"\nkind = \"tape\""),
];

fn coordinator_file(scratch: &str, top: &str, end: &str) -> String {
    format!(
        "{top}\nstate_directory = \"{scratch}/state\"\n\
         [[store]]\nname = \"repo1\"\nkind = \"directory\"\npath = \"{scratch}/repo1\"\n{end}\n"
    )
}

fn agent_file(scratch: &str, top: &str, end: &str) -> String {
    let cluster = if top.contains("cluster = ") { "" } else { "cluster = \"main\"\n" };
    let coordinator =
        if end.contains("[coordinator]") { "" } else { "[coordinator]\naddress = \"http://127.0.0.1:8432\"\n" };
    format!(
        "node = \"db1\"\n{cluster}{top}\ndata_directory = \"{scratch}/data\"\nsocket = \"{scratch}/agent.sock\"\n\
         {coordinator}{end}\n"
    )
}

fn seat_file(_: &str, top: &str, end: &str) -> String {
    format!("{top}\n{end}\n")
}

/// Plays every case and gives what was said, with exit codes, in a form that is the same in every run.
fn refusals(
    scratch: &Scratch,
    program: Program,
    arguments: &[&str],
    cases: &[Case],
    file: impl Fn(&str, &str, &str) -> String,
) -> Result<String> {
    let place = scratch.path().display().to_string();
    let mut told = String::new();
    for (number, (what, top, end)) in cases.iter().enumerate() {
        let text = file(&place, top, &end.replace("SCRATCH", &place));
        let path = scratch.write(&format!("{}-{number}.toml", program.installed_name()), text)?;
        let mut command = account::command(program.path()?);
        command.arg("--config").arg(&path).args(arguments);
        let said = program::run(command, Duration::from_secs(20))?;
        ensure!(said.code == Some(3), "{what}: exit {:?} instead of 3\n{}\n{}", said.code, said.out, said.err);
        ensure!(said.err.contains(&path.display().to_string()) || !said.err.trim().is_empty(), "{what}: nothing said");
        told.push_str(&format!("## {what}\n{}\n", stable(said.err.trim_end(), scratch.path())));
    }
    Ok(told)
}

#[test]
fn a_coordinator_that_cannot_work_says_why_and_ends() {
    scenario::play("operator-bad-coordinator", |stage| {
        let cases = &COORDINATOR_CASES;
        let told = refusals(&stage.scratch, Program::Coordinator, &["--check-config"], cases, coordinator_file)?;
        insta::assert_snapshot!("coordinator", told);
        // What a check refuses is refused by a start as well.
        refusals(&stage.scratch, Program::Coordinator, &[], cases, coordinator_file).map(|_| ())
    });
}

#[test]
fn an_agent_that_cannot_work_says_why_and_ends() {
    scenario::play("operator-bad-agent", |stage| {
        let told = refusals(&stage.scratch, Program::Agent, &[], &AGENT_CASES, agent_file)?;
        insta::assert_snapshot!("agent", told);
        Ok(())
    });
}

#[test]
fn an_operators_command_that_cannot_work_says_why() {
    scenario::play("operator-bad-seat", |stage| {
        let told = refusals(&stage.scratch, Program::Pgconvoy, &["rpc"], &SEAT_CASES, seat_file)?;
        insta::assert_snapshot!("seat", told);
        let nobody = Operator::set_up(&stage.scratch, "nobody", Some(tests::fleet::free_address()?), &[], None)?;
        let text = nobody.run(&["rpc"])?.exits(4)?;
        ensure!(text.contains("cannot reach the coordinator at http://127.0.0.1:"), "{text}");
        for arguments in [&["frobnicate"][..], &["info", "--output", "xml"], &["backup", "Not A Name"], &["restore"]] {
            let text = nobody.run(arguments)?.exits(2)?;
            ensure!(text.contains("--help"), "{arguments:?}: {text}");
        }
        Ok(())
    });
}

#[test]
fn an_agent_beside_another_data_directory_refuses_its_server() {
    scenario::play("operator-wrong-data", |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut node = world.node(&stage.scratch, Server::init(&stage.scratch, "db1", SMALL)?, &NodePlan::default())?;
        let elsewhere = stage.scratch.directory("elsewhere")?;
        let text = std::fs::read_to_string(node.agent.config())?;
        let own = node.server.data().display().to_string();
        account::write_owned(node.agent.config(), text.replace(&own, &elsewhere.display().to_string()))?;
        let mut check = account::command(Program::Agent.path()?);
        check.arg("--check-config").arg("--config").arg(node.agent.config());
        let said = program::run(check, Duration::from_secs(30))?.exits(3)?;
        ensure!(said.contains("missing: ") && said.contains("elsewhere/global/pg_control"), "{said}");
        node.agent.start()?;
        node.server.start()?;
        let segment = node.server.switch_wal()?;
        expect_refused(&node, &segment, &[&format!("this agent belongs to {}, not to {own}", elsewhere.display())])?;
        ensure!(world.look(&world.stores[0].name)?.wal.is_empty(), "something was stored");
        Ok(())
    });
}

#[test]
fn a_node_of_another_system_is_refused_by_name_and_number() {
    scenario::play("operator-wrong-system", |stage| {
        for part in ["SYSTEM_IDENTIFIER_MISMATCH", "refuse"] {
            stage.announce(part, "the cluster was created for another system");
        }
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let mut node = world.node(&stage.scratch, Server::init(&stage.scratch, "db1", SMALL)?, &NodePlan::default())?;
        node.server.start()?;
        let system = node.server.system_identifier()?.to_string();
        world.operator.ok(&["cluster", "create", CLUSTER, "--system-identifier", "4242"])?;
        node.agent.start()?;
        let segment = node.server.switch_wal()?;
        expect_refused(&node, &segment, &["SYSTEM_IDENTIFIER_MISMATCH", "4242", &system])?;
        ensure!(world.look(&world.stores[0].name)?.wal.is_empty(), "something was stored");
        let again = world.operator.run(&["cluster", "create", CLUSTER, "--system-identifier", &system])?.exits(5)?;
        ensure!(again.contains("4242") && again.contains("choose another cluster name"), "{again}");
        let check = world.operator.run(&["check", CLUSTER, "--timeout", "2s"])?.exits(1)?;
        ensure!(check.contains("no agent of this cluster is connected"), "{check}");
        Ok(())
    });
}

/// PostgreSQL's `archive_command` fails on a segment, which still waits; run by hand it tells why.
pub(super) fn expect_refused(node: &Node, segment: &str, parts: &[&str]) -> Result<()> {
    wait::until("PostgreSQL is refused", Duration::from_secs(60), || Ok(node.server.failed_count()? > 0))?;
    let push = node.agent.wal_command(node.server.data(), &["push", &format!("pg_wal/{segment}")])?;
    let said = program::run(push, Duration::from_secs(60))?.exits(1)?;
    ensure!(parts.iter().all(|part| said.contains(part)), "{parts:?}: {said}");
    ensure!(node.server.ready_files()?.contains(&segment.to_owned()), "{segment} does not wait");
    ensure!(!node.witness.join(segment).exists(), "{segment} was acknowledged");
    Ok(())
}
