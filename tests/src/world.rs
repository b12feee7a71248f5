//! A whole small installation, put together the way most scenarios want it: a coordinator over a directory, a bucket or
//! both; servers with an agent each; links that can be broken; and what the judge is asked at the end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::account::Scratch;
use crate::fleet::{Agent, AgentSetup, Coordinator, CoordinatorSetup, Operator, Store};
use crate::postgres::{InitOptions, Server};
use crate::proxy::Proxy;
use crate::repository_check::{self, Holdings};
use crate::s3_service::S3Service;
use crate::{program, wait};

/// Name of the directory store.
pub const DIRECTORY: &str = "repo1";
/// Name of the bucket store.
pub const BUCKET: &str = "bucket";
/// Fleet name of the cluster.
pub const CLUSTER: &str = "main";

/// Which stores a world has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stores {
    /// A directory.
    Directory,
    /// A bucket.
    Bucket,
    /// A directory, then a bucket.
    Both,
    /// One, whichever: a bucket when the environment names an S3 service to play on, else a directory.
    Any,
}

impl Stores {
    fn settled(self) -> Self {
        match self {
            Self::Any if S3Service::is_named() => Self::Bucket,
            Self::Any => Self::Directory,
            one => one,
        }
    }
}

/// Coordinator, stores, operator. Servers are added by [`World::node`].
#[derive(Debug)]
pub struct World {
    /// The directory store's path, when there is one.
    pub directory: Option<PathBuf>,
    /// The S3 service, when there is one.
    pub s3: Option<S3Service>,
    /// The coordinator's way to S3.
    pub coordinator_to_s3: Option<Proxy>,
    /// The stores as the judge and a restoring operator reach them, past all proxies.
    pub stores: Vec<Store>,
    /// How the coordinator is set up.
    pub setup: CoordinatorSetup,
    /// The coordinator.
    pub coordinator: Coordinator,
    /// The operator's seat: coordinator and stores.
    pub operator: Operator,
}

impl World {
    /// Sets everything up; starts nothing but the S3 service.
    pub fn set_up(scratch: &Scratch, stores: Stores) -> Result<Self> {
        let mut listed = Vec::new();
        let mut reached = Vec::new();
        let stores = stores.settled();
        let directory = match stores {
            Stores::Bucket | Stores::Any => None,
            Stores::Directory | Stores::Both => Some(scratch.directory(DIRECTORY)?),
        };
        if let Some(path) = &directory {
            listed.push(Store::directory(DIRECTORY, path));
            reached.push(Store::directory(DIRECTORY, path));
        }
        let (mut s3, mut coordinator_to_s3) = (None, None);
        if stores != Stores::Directory {
            let service = S3Service::start()?;
            let proxy = Proxy::start(service.address())?;
            listed.push(Store::s3(BUCKET, service.bucket().through(proxy.address())));
            reached.push(Store::s3(BUCKET, service.bucket().clone()));
            (s3, coordinator_to_s3) = (Some(service), Some(proxy));
        }
        let setup = CoordinatorSetup::over(&listed);
        let coordinator = Coordinator::set_up(scratch, "coordinator", &setup)?;
        let operator = Operator::set_up(scratch, "operator", Some(coordinator.address()), &reached, None)?;
        Ok(Self { directory, s3, coordinator_to_s3, stores: reached, setup, coordinator, operator })
    }

    /// As [`World::set_up`], with the coordinator started.
    pub fn started(scratch: &Scratch, stores: Stores) -> Result<Self> {
        let mut world = Self::set_up(scratch, stores)?;
        world.coordinator.start()?;
        Ok(world)
    }

    /// A started primary with a started agent, its cluster created, archiving.
    pub fn primary(&self, scratch: &Scratch, name: &str, options: InitOptions) -> Result<Node> {
        let server = Server::init(scratch, name, options)?;
        let mut node = self.node(scratch, server, &NodePlan::default())?;
        node.server.start()?;
        let system = node.server.system_identifier()?.to_string();
        self.operator.ok(&["cluster", "create", CLUSTER, "--system-identifier", &system])?;
        node.agent.start()?;
        self.wait_reported(name)?;
        Ok(node)
    }

    /// Waits until the coordinator knows a node's server: a node that has just connected is not fit for a backup yet,
    /// and its role is `down` until its agent has asked the server.
    pub fn wait_reported(&self, node: &str) -> Result<()> {
        self.wait_node(node, |shown| shown["problems"].as_array().is_none_or(Vec::is_empty))
    }

    /// Waits until the coordinator knows a node's server, whatever problems it may have.
    pub fn wait_asked(&self, node: &str) -> Result<()> {
        self.wait_node(node, |_| true)
    }

    fn wait_node(&self, node: &str, is_fine: impl Fn(&Value) -> bool) -> Result<()> {
        wait::until(&format!("the coordinator hears of {node}"), Duration::from_secs(60), || {
            let info = self.operator.json(&["info", CLUSTER])?;
            let nodes = info["clusters"][0]["fleet"]["nodes"].as_array().cloned().unwrap_or_default();
            Ok(nodes.iter().any(|one| {
                let asked = one["role"] == "primary" || one["role"] == "standby";
                one["node"] == *node && one["connected"] == true && asked && is_fine(one)
            }))
        })
        .map(|_| ())
    }

    /// A started streaming standby of `primary` with a started agent.
    pub fn standby(&self, scratch: &Scratch, primary: &Node, name: &str) -> Result<Node> {
        let mut standby = self.node(scratch, primary.server.standby(scratch, name)?, &NodePlan::default())?;
        // The agent first: a standby that starts asks for WAL.
        standby.agent.start()?;
        standby.server.start()?;
        self.wait_reported(name)?;
        Ok(standby)
    }

    /// A server with its agent, both configured and not started.
    pub fn node(&self, scratch: &Scratch, server: Server, plan: &NodePlan) -> Result<Node> {
        let name = server.name().to_owned();
        let to_coordinator = Proxy::start(self.coordinator.address())?;
        let coordinator = match plan.coordinator_link {
            CoordinatorLink::Straight => self.coordinator.address(),
            CoordinatorLink::Breakable => to_coordinator.address(),
        };
        let mut setup = AgentSetup::of(&plan.cluster, coordinator);
        setup.tables = plan.tables.clone();
        setup.settings = plan.settings.clone();
        let mut to_s3 = None;
        if let (Some(service), DirectRoad::Given) = (&self.s3, plan.direct) {
            let proxy = Proxy::start(service.address())?;
            setup.direct = Some(Store::s3(BUCKET, service.bucket().through(proxy.address())));
            to_s3 = Some(proxy);
        }
        let agent = Agent::set_up(scratch, &server, &setup)?;
        let witness = scratch.directory(&format!("{name}-witness"))?;
        server.configure(&[
            ("archive_mode", "on"),
            ("archive_command", &agent.archive_command(&witness)?),
            ("restore_command", &agent.restore_command()?),
        ])?;
        Ok(Node { server, agent, setup, witness, to_coordinator, to_s3 })
    }

    /// What a store holds now, by its name.
    pub fn look(&self, store: &str) -> Result<Holdings> {
        let found = self.stores.iter().find(|one| one.name == store).with_context(|| format!("no store {store}"))?;
        repository_check::look(found, CLUSTER)
    }

    /// Waits until every `.ready` file of the nodes is archived and checks every store: all acknowledged files with
    /// their bytes, nothing damaged, nothing twice, no gap on the timeline. Gives the stores' holdings.
    pub fn expect_whole(&self, nodes: &[&Node], timeline: u32) -> Result<Vec<Holdings>> {
        for node in nodes {
            node.server.wait_archived(0, Duration::from_secs(60))?;
        }
        self.stores.iter().map(|store| self.expect_store_whole(store, nodes, timeline)).collect()
    }

    /// As [`World::expect_whole`], of WAL from a segment on: what came before has expired.
    pub fn expect_whole_since(&self, nodes: &[&Node], timeline: u32, first: &str) -> Result<()> {
        for node in nodes {
            node.server.wait_archived(0, Duration::from_secs(60))?;
        }
        for store in &self.stores {
            let holdings = repository_check::look(store, CLUSTER)?;
            for node in nodes {
                let mut names = node.acknowledged()?;
                names.retain(|name| name.ends_with(".history") || &name[..name.len().min(first.len())] >= first);
                holdings.acknowledged(&node.witness, &names)?;
                holdings.undamaged()?.nothing_twice(&[])?.no_gap(timeline, node.segment_bytes()?)?;
            }
        }
        Ok(())
    }

    fn expect_store_whole(&self, store: &Store, nodes: &[&Node], timeline: u32) -> Result<Holdings> {
        let mut last = None;
        // A store that was away is filled after the fact, so the state is waited for.
        let whole = wait::until(&format!("{} is whole", store.name), Duration::from_secs(60), || {
            // Under load files are acknowledged while the store is read; those are the next look's business.
            let names: Vec<Vec<String>> = nodes.iter().map(|node| node.acknowledged()).collect::<Result<_>>()?;
            let holdings = repository_check::look(store, CLUSTER)?;
            for (node, names) in nodes.iter().zip(&names) {
                if !names.is_empty() {
                    holdings.acknowledged(&node.witness, names)?;
                }
                holdings.undamaged()?.nothing_twice(&[])?.no_gap(timeline, node.segment_bytes()?)?;
            }
            last = Some(holdings);
            Ok(true)
        });
        whole?;
        last.context("not looked")
    }

    /// Throws the coordinator's state away while it is stopped, and has it recreated from the stores. A coordinator that
    /// has just started may still be trying what a store promises; a rebuild that needs that store then says so, and is
    /// repeated as it asks for.
    pub fn rebuild_catalog(&mut self) -> Result<()> {
        self.coordinator.stop()?;
        self.coordinator.delete_state()?;
        self.coordinator.start()?;
        wait::until("the catalog is rebuilt from every store", Duration::from_secs(60), || {
            let said = self.operator.run(&["rebuild"])?;
            let not_yet = said.code == Some(4) && said.err.contains("STORE_FAILED");
            if not_yet { Ok(false) } else { said.ok().map(|_| true) }
        })
        .map(|_| ())
    }
}

/// Whether a node is given keys to the bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectRoad {
    /// It is, when there is a bucket.
    Given,
    /// It is not.
    None,
}

/// How a node reaches the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CoordinatorLink {
    /// Without anything between: a killed coordinator refuses connections.
    Straight,
    /// Through a link that the scenario breaks.
    Breakable,
}

/// What a node is given.
#[derive(Debug, Clone)]
pub struct NodePlan {
    /// Fleet name of its cluster.
    pub cluster: String,
    /// Its direct road.
    pub direct: DirectRoad,
    /// Its way to the coordinator.
    pub coordinator_link: CoordinatorLink,
    /// Tables for the agent's configuration.
    pub tables: String,
    /// Lines for the top of the agent's configuration.
    pub settings: String,
}

impl Default for NodePlan {
    fn default() -> Self {
        Self {
            cluster: CLUSTER.to_owned(),
            direct: DirectRoad::Given,
            coordinator_link: CoordinatorLink::Straight,
            // Scenarios are shorter than the patience that suits an installation.
            tables: "[road]\nsilence_patience = \"5s\"\nreturn_after = \"2s\"\n".to_owned(),
            settings: String::new(),
        }
    }
}

/// A server with its agent.
#[derive(Debug)]
pub struct Node {
    /// The server.
    pub server: Server,
    /// The agent.
    pub agent: Agent,
    /// How the agent is set up.
    pub setup: AgentSetup,
    /// Copies of every file that PostgreSQL was told is archived.
    pub witness: PathBuf,
    /// The breakable link to the coordinator; in use only when the plan said so.
    pub to_coordinator: Proxy,
    /// The breakable link to the bucket, when there is a direct road.
    pub to_s3: Option<Proxy>,
}

impl Node {
    /// WAL segment size in bytes.
    pub fn segment_bytes(&self) -> Result<u64> {
        Ok(self.server.text("select pg_size_bytes(current_setting('wal_segment_size'))")?.parse()?)
    }

    /// Whether PostgreSQL was told at least once that a file is archived.
    pub fn has_acknowledged(&self) -> Result<bool> {
        Ok(!self.acknowledged()?.is_empty())
    }

    /// Names of the files that PostgreSQL was told are archived.
    pub fn acknowledged(&self) -> Result<Vec<String>> {
        repository_check::acknowledged_in(&self.witness)
    }

    /// Switches WAL and waits until the finished segment is archived.
    pub fn archive_now(&self) -> Result<String> {
        let segment = self.server.switch_wal()?;
        let done = self.server.data().join(format!("pg_wal/archive_status/{segment}.done"));
        let witness = self.witness.join(&segment);
        wait::until(&format!("{segment} is archived"), Duration::from_secs(60), || {
            Ok(done.exists() || witness.exists())
        })?;
        Ok(segment)
    }

    /// Writes about this many mebibytes of WAL that does not compress to nothing, without growing any table.
    pub fn write_wal(&self, mebibytes: u32) -> Result<()> {
        self.server
            .sql(&format!(
                "select count(pg_logical_emit_message(true, 'noise', noise)) from (
                     select string_agg(md5(random()::text), '') as noise from generate_series(1, {}) i
                     group by i % {}) as pieces",
                mebibytes * 32_768,
                mebibytes * 16
            ))
            .map(|_| ())
    }

    /// Where the file lies in pg_wal.
    pub fn wal_path(&self, name: &str) -> PathBuf {
        self.server.data().join("pg_wal").join(name)
    }
}

/// A server over a fresh restore: own socket, started, out of recovery.
pub fn start_restored(scratch: &Scratch, name: &str, data: &Path) -> Result<Server> {
    let mut server = Server::at(scratch, name, data.to_owned())?;
    server.own_socket()?;
    server.start()?;
    server.wait_promoted(Duration::from_secs(120))?;
    ensure!(server.is_running(), "{name} ended");
    Ok(server)
}

impl World {
    /// `pgconvoy restore` into a new directory from the stores of the operator's file alone; gives the directory and
    /// what the command said.
    pub fn restore(&self, scratch: &Scratch, name: &str, arguments: &[&str]) -> Result<(PathBuf, program::Said)> {
        let data = scratch.path().join(format!("{name}-data"));
        let to = data.display().to_string();
        let said = self.operator.alone(&[&["restore", CLUSTER, "--to", &to], arguments].concat())?;
        Ok((data, said))
    }

    /// As [`World::restore`], and starts a server over it which must come out of recovery.
    pub fn restored(&self, scratch: &Scratch, name: &str, arguments: &[&str]) -> Result<Server> {
        let (data, said) = self.restore(scratch, name, arguments)?;
        said.ok().with_context(|| format!("restore {}", arguments.join(" ")))?;
        start_restored(scratch, name, &data)
    }

    /// Takes a backup through the coordinator, waits for it, and gives what the newest root of each store says of it.
    pub fn back_up(&self, arguments: &[&str]) -> Result<String> {
        self.operator.ok(&[&["backup", CLUSTER, "--start-fast"], arguments].concat())
    }

    /// Backups in each store, checked; every store must name the same ones.
    pub fn backups(&self, segment_bytes: u64) -> Result<Vec<String>> {
        let mut all: Option<Vec<String>> = None;
        for store in &self.stores {
            let holdings = repository_check::look(store, CLUSTER)?;
            holdings.undamaged()?;
            let names: Vec<String> = holdings.backups(segment_bytes)?.into_iter().map(|one| one.backup).collect();
            if let Some(others) = &all {
                ensure!(*others == names, "{} names {names:?}, another store {others:?}", store.name);
            }
            all = Some(names);
        }
        all.context("no store")
    }
}
