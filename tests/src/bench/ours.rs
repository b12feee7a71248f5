//! Our programs over one store, as an installation has them, and what they used.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::calls::{Calls, Part};
use crate::account::{Program, Scratch};
use crate::fleet::{Agent, AgentSetup, Coordinator, CoordinatorSetup, Operator, Store, scrape};
use crate::postgres::Server;
use crate::wait;

/// Fleet name of the cluster.
pub const CLUSTER: &str = "main";
/// Longest wait until the fleet is as it should be.
const PATIENCE: Duration = Duration::from_secs(60);
/// One mebibyte.
const MEBIBYTE: f64 = 1048576.0;

/// Coordinator, agent and operator around one data directory.
#[derive(Debug)]
pub struct Ours {
    /// The coordinator.
    pub coordinator: Coordinator,
    /// The agent.
    pub agent: Agent,
    /// The operator's seat, which reaches the coordinator and the store.
    pub operator: Operator,
    setup: AgentSetup,
}

/// Peak memory, in MiB.
#[derive(Debug, Clone, Copy)]
pub struct Peaks {
    /// Of the agent.
    pub agent: f64,
    /// Of the coordinator.
    pub coordinator: f64,
}

/// Which way WAL takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Road {
    /// Through the coordinator.
    Coordinator,
    /// Straight into the store; the coordinator is stopped.
    Direct,
}

impl Ours {
    /// Starts everything over `store`, with the cluster created and the agent connected.
    pub fn start(scratch: &Scratch, name: &str, server: &Server, store: &Store, road: Road) -> Result<Self> {
        let setup = CoordinatorSetup::over(std::slice::from_ref(store));
        let mut coordinator = Coordinator::set_up(scratch, &format!("{name}-coordinator"), &setup)?;
        coordinator.start()?;
        let operator = Operator::set_up(scratch, name, Some(coordinator.address()), std::slice::from_ref(store), None)?;
        let system = system_identifier(server)?;
        operator.ok(&["cluster", "create", CLUSTER, "--system-identifier", &system])?;
        let mut setup = AgentSetup::of(CLUSTER, coordinator.address());
        // The peers' level; left out, it would fall while the backlog is long.
        setup.tables = "[archive]\ncompression_level = 3\n".to_owned();
        if road == Road::Direct {
            setup.direct = Some(store.clone());
        }
        let mut agent = Agent::set_up(scratch, server, &setup)?;
        agent.start()?;
        let ours = Self { coordinator, agent, operator, setup };
        ours.wait_connected(server.name())?;
        Ok(ours)
    }

    /// Waits until the coordinator knows the node.
    pub fn wait_connected(&self, node: &str) -> Result<()> {
        wait::until(&format!("the coordinator hears of {node}"), PATIENCE, || {
            let info = self.operator.json(&["info", CLUSTER])?;
            let nodes = info["clusters"][0]["fleet"]["nodes"].as_array().cloned().unwrap_or_default();
            Ok(nodes.iter().any(|one| one["node"] == *node && one["connected"] == true))
        })
        .map(|_| ())
    }

    /// Waits until the coordinator knows the node's running server, so that it is fit for a backup.
    pub fn wait_reported(&self, node: &str) -> Result<()> {
        wait::until(&format!("the coordinator hears of the server of {node}"), PATIENCE, || {
            let info = self.operator.json(&["info", CLUSTER])?;
            let nodes = info["clusters"][0]["fleet"]["nodes"].as_array().cloned().unwrap_or_default();
            Ok(nodes.iter().any(|one| {
                let fine = one["problems"].as_array().is_none_or(Vec::is_empty);
                one["node"] == *node && one["connected"] == true && !one["role"].is_null() && fine
            }))
        })
        .map(|_| ())
    }

    /// What `info` says of a backup.
    pub fn told(&self, backup: &str) -> Result<Value> {
        let info = self.operator.json(&["info", CLUSTER])?;
        let backups = info["clusters"][0]["backups"].as_array().cloned().unwrap_or_default();
        backups.into_iter().find(|one| one["backup"] == *backup).with_context(|| format!("no {backup} in info"))
    }

    /// Stops the coordinator and waits until the agent has turned to the direct road.
    pub fn leave_coordinator(&mut self) -> Result<()> {
        self.coordinator.kill()?;
        let metrics = self.agent.metrics_address();
        wait::until("the agent takes the direct road", PATIENCE, || {
            let text = scrape(metrics)?;
            Ok(text.lines().any(|line| line.contains("road{road=\"direct\"} 1")))
        })
        .map(|_| ())
    }

    /// Ends the agent and starts one for another data directory of the same cluster.
    pub fn move_agent(&mut self, scratch: &Scratch, server: &Server) -> Result<()> {
        self.agent.stop()?;
        self.agent = Agent::set_up(scratch, server, &self.setup)?;
        self.agent.start()?;
        self.wait_connected(server.name())
    }

    /// `archive_command`.
    pub fn archive_command(&self) -> Result<String> {
        Ok(format!("{} push %p --socket {}", Program::Wal.path()?.display(), self.agent.socket().display()))
    }

    /// `restore_command`.
    pub fn restore_command(&self) -> Result<String> {
        Ok(format!("{} fetch %f %p --socket {}", Program::Wal.path()?.display(), self.agent.socket().display()))
    }

    /// Archives all of these files in order.
    pub fn archive(&self, data: &Path, files: &[String]) -> Result<Calls> {
        Ok(Calls {
            directory: data.to_owned(),
            command: self.archive_command()?,
            files: files.to_vec(),
            part: Part::Archiver,
            replay_ms: 0,
        })
    }

    /// CPU seconds that agent and coordinator used so far.
    pub fn cpu_seconds(&mut self) -> Result<f64> {
        let mut used = self.agent.process()?.cpu_seconds()?;
        if self.coordinator.is_running() {
            used += self.coordinator.process()?.cpu_seconds()?;
        }
        Ok(used)
    }

    /// Peak memory so far.
    pub fn peaks(&mut self) -> Result<Peaks> {
        let agent = self.agent.process()?.memory_peak_bytes()? as f64 / MEBIBYTE;
        let coordinator = match self.coordinator.is_running() {
            true => self.coordinator.process()?.memory_peak_bytes()? as f64 / MEBIBYTE,
            false => 0.0,
        };
        Ok(Peaks { agent, coordinator })
    }

    /// Ends everything.
    pub fn end(mut self) -> Result<()> {
        self.agent.stop()?;
        if self.coordinator.is_running() {
            self.coordinator.kill()?;
        }
        Ok(())
    }
}

/// An archiver's command that keeps nothing and never fails. A server that stops waits long for one that fails.
pub const ARCHIVE_NOWHERE: &str = "/bin/true";

/// Makes a running server archive by this command from now on.
pub fn archive_by(server: &Server, command: &str) -> Result<()> {
    server.configure(&[("archive_command", &format!("'{command}'"))])?;
    server.reload()
}

/// System identifier of a stopped server: the first eight bytes of `pg_control`, in the byte order of this machine.
fn system_identifier(server: &Server) -> Result<String> {
    let control = fs::read(server.data().join("global/pg_control"))?;
    let first = control.first_chunk::<8>().context("pg_control is too short")?;
    Ok(u64::from_ne_bytes(*first).to_string())
}
