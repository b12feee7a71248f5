//! What the metrics of running daemons say.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use process::telemetry::exposition::{self, Exposition};
use tests::fleet::scrape;
use tests::postgres::Stop;
use tests::world::{Stores, World};
use tests::{scenario, wait};

use crate::SMALL;

/// Longest until a daemon has measured what just changed.
const PATIENCE: Duration = Duration::from_secs(30);
/// The page that tells all metrics.
const PAGE: &str = include_str!("../../../packaging/prometheus/METRICS.md");

fn read(address: SocketAddr) -> Result<Exposition> {
    exposition::read(&scrape(address)?).map_err(anyhow::Error::msg)
}

fn plain(read: &Exposition, name: &str) -> Result<f64> {
    read.value(name, &[]).with_context(|| format!("no {name}"))
}

#[test]
fn the_age_of_what_is_not_durable_follows_the_servers_own_position() {
    scenario::play("seen-rpo", |stage| {
        let world = World::started(&stage.scratch, Stores::Both)?;
        let mut primary = world.primary(&stage.scratch, "db1", SMALL)?;
        let agent = primary.agent.metrics_address();
        primary.server.sql("create table t (a int)")?;
        primary.archive_now()?;
        let age = || plain(&read(agent)?, "pgconvoy_rpo_seconds");
        wait::until("all is durable", PATIENCE, || Ok(age()? == 0.0))?;

        primary.server.sql("checkpoint")?;
        wait::until("the checkpoint's WAL is seen and not waited for", PATIENCE, || {
            let read = read(agent)?;
            Ok(plain(&read, "pgconvoy_wal_lag_bytes")? > 100.0 && plain(&read, "pgconvoy_rpo_seconds")? == 0.0)
        })?;

        primary.server.sql("insert into t values (1)")?;
        wait::until("a commit waits for the end of its segment", PATIENCE, || Ok(age()? > 0.0))?;
        let busy = read(agent)?;
        let told = exposition::documented(PAGE, "## Agent");
        ensure!(busy.names().is_subset(&told), "not told: {:?}", busy.names().difference(&told));
        ensure!(busy.value("pgconvoy_agent_road", &[("road", "coordinator")]) == Some(1.0), "{busy:?}");

        let coordinator = world.coordinator.metrics_address();
        wait::until("the coordinator tells of the node", PATIENCE, || {
            let read = read(coordinator)?;
            let told = exposition::documented(PAGE, "## Coordinator");
            ensure!(read.names().is_subset(&told), "not told: {:?}", read.names().difference(&told));
            Ok(read.value("pgconvoy_node_connected", &[("cluster", "main"), ("node", "db1")]) == Some(1.0))
        })?;

        primary.server.stop(Stop::Fast)?;
        wait::until("a server that does not answer may have gone on", PATIENCE, || {
            let read = read(agent)?;
            Ok(plain(&read, "pgconvoy_agent_server_up")? == 0.0 && plain(&read, "pgconvoy_rpo_seconds")? > 0.0)
        })
        .map(|_| ())
    });
}
