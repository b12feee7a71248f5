//! TLS: coordinator, agent, operator's command and scripts with certificates; S3 over https with an authority of one's
//! own; and everybody who is refused.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use proto::operator::GetInfoRequest;
use proto::operator::operator_service_client::OperatorServiceClient;
use tests::account::Scratch;
use tests::certificates::{Authority, Papers, Validity};
use tests::fleet::{Bucket, Operator, Store};
use tests::ledger::{self, Ledger};
use tests::postgres::Server;
use tests::program;
use tests::scenario::{self, Stage};
use tests::tls_front::TlsFront;
use tests::world::{self, BUCKET, CLUSTER, Node, NodePlan, Stores, World};
use tests::{account, runtime};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use super::refusals::expect_refused;
use super::{SMALL, expect_taken, script};

/// A coordinator with TLS over a directory, a seat, and a primary whose agent shows its certificate.
struct Fleet {
    world: World,
    primary: Node,
    authority: Authority,
}

impl Fleet {
    fn start(scratch: &Scratch) -> Result<Self> {
        let mut world = World::set_up(scratch, Stores::Directory)?;
        let authority = Authority::new(scratch, "fleet")?;
        world.setup.tables = authority.server(scratch, "coordinator")?.server_toml();
        world.coordinator.configure(&world.setup)?;
        world.coordinator.start()?;
        let address = world.coordinator.address();
        let papers = authority.caller(scratch, "ops")?;
        // Without stores of its own: whatever it reads comes through the coordinator.
        world.operator = Operator::set_up_over_tls(scratch, "ops", address, &papers, &[])?;
        let mut primary = world.node(scratch, Server::init(scratch, "db1", SMALL)?, &NodePlan::default())?;
        primary.setup.papers = Some(authority.caller(scratch, "db1")?);
        primary.agent.configure(&primary.server, &primary.setup)?;
        primary.server.start()?;
        let system = primary.server.system_identifier()?.to_string();
        world.operator.ok(&["cluster", "create", CLUSTER, "--system-identifier", &system])?;
        primary.agent.start()?;
        world.wait_reported("db1")?;
        Ok(Self { world, primary, authority })
    }

    fn address(&self) -> SocketAddr {
        self.world.coordinator.address()
    }

    /// What a seat with these papers is told, and its exit code.
    fn told(&self, scratch: &Scratch, name: &str, papers: &Papers) -> Result<program::Said> {
        Operator::set_up_over_tls(scratch, name, self.address(), papers, &[])?.run(&["info", CLUSTER])
    }
}

#[test]
fn with_certificates_wal_flows_and_a_backup_is_restored_through_the_coordinator() {
    scenario::play("operator-tls", |stage| {
        let fleet = Fleet::start(&stage.scratch)?;
        let (world, primary) = (&fleet.world, &fleet.primary);
        ledger::create(&primary.server)?;
        let ledger = Ledger::start(&primary.server, 50)?;
        ledger.advance(20)?;
        let papers = fleet.authority.caller(&stage.scratch, "script")?;
        let file = |path: &Path| path.display().to_string();
        let (certificate, key, ca) = (file(&papers.certificate), file(&papers.key), file(&papers.authority));
        let address = fleet.address().to_string();
        let (said, lines) = script(&[&address, CLUSTER, "--certificate", &certificate, "--key", &key, "--ca", &ca])?;
        let backup = expect_taken(&said, &lines)?;
        let moment = ledger.advance(20)?;
        ledger.advance(10)?;
        ledger.stop();
        primary.archive_now()?;
        let data = stage.scratch.path().join("restored-data");
        let to = data.display().to_string();
        let arguments = ["restore", CLUSTER, "--to", &to, "--backup", &backup, "--target-lsn", &moment.lsn];
        world.operator.ok(&arguments)?;
        let restored = world::start_restored(&stage.scratch, "restored", &data)?;
        ledger::expect_moment(&restored, &moment)?;
        world.expect_whole(&[primary], 1).map(|_| ())
    });
}

#[test]
fn callers_without_a_certificate_of_the_fleets_authority_are_refused() {
    scenario::play("operator-strangers", |stage| {
        let fleet = Fleet::start(&stage.scratch)?;
        let foreign = Authority::new(&stage.scratch, "foreign")?;
        let scratch = &stage.scratch;
        expect_no_answer_without_certificate(&fleet)?;
        let plain = Operator::set_up(scratch, "plain", Some(fleet.address()), &[], None)?;
        plain.run(&["info", CLUSTER])?.exits(4)?;
        let refused = [
            ("foreign", foreign.caller(scratch, "ops")?.trusting(&fleet.authority)),
            ("expired", fleet.authority.caller_valid(scratch, "late", Validity::Past)?),
        ];
        for (name, papers) in refused {
            let said = fleet.told(scratch, name, &papers)?;
            // Where the connection is reset before the alert is read, there is only a connection that broke.
            let told = said.code == Some(5) && said.err.contains("client_ca");
            ensure!(told || said.code == Some(4), "{name} is told: {said:?}");
            ensure!(said.out.is_empty() && said.err.contains("the connection to the coordinator broke: "), "{said:?}");
        }
        let distrusting = fleet.authority.caller(scratch, "ops2")?.trusting(&foreign);
        let text = fleet.told(scratch, "distrusting", &distrusting)?.exits(4)?;
        ensure!(text.contains("certificate"), "{text}");
        fleet.told(scratch, "welcome", &fleet.authority.caller(scratch, "ops3")?)?.ok().map(|_| ())
    });
}

/// A caller that trusts the right authority and shows nothing.
fn expect_no_answer_without_certificate(fleet: &Fleet) -> Result<()> {
    let ca = Certificate::from_pem(fs::read(fleet.authority.file())?);
    process::tls::install_provider();
    let endpoint = Endpoint::from_shared(format!("https://{}", fleet.address()))?
        .timeout(Duration::from_secs(10))
        .tls_config(ClientTlsConfig::new().ca_certificate(ca))?;
    let answer = runtime::block_on(async {
        let channel = endpoint.connect().await?;
        let answer = OperatorServiceClient::new(channel).get_info(GetInfoRequest::default()).await?;
        anyhow::Ok(answer)
    });
    if answer.is_ok() {
        bail!("a caller without a certificate was answered")
    }
    Ok(())
}

#[test]
fn a_node_speaks_only_by_the_name_in_its_certificate() {
    scenario::play("operator-mismatch", |stage| {
        announce_refusal(stage);
        let Fleet { world, mut primary, authority } = Fleet::start(&stage.scratch)?;
        primary.archive_now()?;
        primary.agent.stop()?;
        let own = primary.setup.papers.replace(authority.caller(&stage.scratch, "db2")?);
        primary.agent.configure(&primary.server, &primary.setup)?;
        let text = check_config(&primary)?.exits(3)?;
        ensure!(text.contains("names db2") && text.contains("expected db1"), "{text}");
        primary.agent.start()?;
        let segment = primary.server.switch_wal()?;
        expect_refused(&primary, &segment, &["NODE_MISMATCH", "the client certificate names db2"])?;
        let check = world.operator.run(&["check", CLUSTER, "--timeout", "2s"])?.exits(1)?;
        ensure!(check.contains("no agent of this cluster is connected"), "{check}");
        primary.agent.stop()?;
        primary.setup.papers = own;
        primary.agent.configure(&primary.server, &primary.setup)?;
        primary.agent.start()?;
        world.wait_reported("db1")?;
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}

fn announce_refusal(stage: &mut Stage) {
    for part in ["refuse", "NODE_MISMATCH", "certificate names"] {
        stage.announce(part, "the agent shows another node's certificate");
    }
}

#[test]
fn s3_over_tls_with_an_authority_of_ones_own_serves_both_roads() {
    scenario::play("operator-s3-tls", |stage| {
        for part in ["unavailable", "road", "coordinator"] {
            stage.announce(part, "the coordinator is killed, so that the direct road is taken");
        }
        let scratch = &stage.scratch;
        let mut world = World::set_up(scratch, Stores::Bucket)?;
        let authority = Authority::new(scratch, "storage")?;
        let foreign = Authority::new(scratch, "foreign")?;
        let service = world.s3.as_ref().context("no S3 service")?;
        let front = TlsFront::start(service.address(), &authority.server(scratch, "s3")?)?;
        let bucket = Bucket { endpoint: format!("https://{}", front.address()), ..service.bucket().clone() };
        let over_tls = |trusted: &Authority| Store {
            settings: format!("ca_file = \"{}\"\n", trusted.file().display()),
            ..Store::s3(BUCKET, bucket.clone())
        };
        world.setup.stores = vec![over_tls(&authority)];
        world.coordinator.configure(&world.setup)?;
        world.coordinator.start()?;
        let mut primary = world.node(scratch, Server::init(scratch, "db1", SMALL)?, &NodePlan::default())?;
        primary.setup.direct = Some(over_tls(&authority));
        primary.agent.configure(&primary.server, &primary.setup)?;
        primary.server.start()?;
        let system = primary.server.system_identifier()?.to_string();
        world.operator.ok(&["cluster", "create", CLUSTER, "--system-identifier", &system])?;
        primary.agent.start()?;
        world.wait_reported("db1")?;
        primary.archive_now()?;
        check_config(&primary)?.exits(0)?;
        world.coordinator.kill()?;
        for _ in 0..3 {
            primary.archive_now()?;
        }
        let failed = primary.server.number("select failed_count from pg_stat_archiver")?;
        ensure!(failed == 0, "archive_command failed {failed} times");
        let seat = Operator::set_up(scratch, "seat", None, &[over_tls(&authority)], None)?;
        seat.alone(&["info", CLUSTER])?.ok()?;
        world.coordinator.start()?;
        world.wait_reported("db1")?;
        primary.archive_now()?;
        world.expect_whole(&[&primary], 1)?;
        expect_distrust(scratch, &mut primary, &over_tls(&foreign))
    });
}

/// A node and a seat that trust another authority say so, and say which store it is about.
fn expect_distrust(scratch: &Scratch, primary: &mut Node, store: &Store) -> Result<()> {
    let seat = Operator::set_up(scratch, "distrusting", None, std::slice::from_ref(store), None)?;
    let text = seat.alone(&["info", CLUSTER])?.exits(7)?;
    ensure!(text.contains(BUCKET) && text.contains("ertificate"), "{text}");
    primary.agent.stop()?;
    primary.setup.direct = Some(store.clone());
    primary.agent.configure(&primary.server, &primary.setup)?;
    let text = check_config(primary)?.exits(3)?;
    ensure!(text.contains(BUCKET) && text.contains("ertificate"), "{text}");
    Ok(())
}

fn check_config(node: &Node) -> Result<program::Said> {
    let mut command = account::command(account::Program::Agent.path()?);
    command.arg("--check-config").arg("--config").arg(node.agent.config());
    program::run(command, Duration::from_secs(60))
}
