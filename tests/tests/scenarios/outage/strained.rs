//! Archiving that has fallen behind compresses less until it has caught up.

use std::time::{Duration, Instant};

use agent::local::{Request, ask};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::repository_check::Holdings;
use tests::world::{CLUSTER, DIRECTORY, DirectRoad, Node, NodePlan, Stores};
use tests::{scenario, wait};

use super::{Loaded, announce_outage};

/// Files that wait when the coordinator returns; 64 are still no strain.
const BACKLOG_FILES: usize = 100;
/// Files that may have been read before archiving was seen to be behind, or when it had nearly caught up.
const READ_OTHERWISE: usize = 48;

/// What the agent says of itself.
fn status(node: &Node) -> Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let (code, json) = ask(node.agent.socket(), &Request::Status, deadline, |_| {})?;
    ensure!(code == 0, "status: {code} {json}");
    Ok(serde_json::from_str(&json)?)
}

fn wait_level(node: &Node, level: u64) -> Result<()> {
    wait::until(&format!("the agent compresses with level {level}"), Duration::from_secs(30), || {
        Ok(status(node)?["compression_level"] == level)
    })
    .map(|_| ())
}

/// How many of these segments were compressed with level 1, and how many were not. A segment of 1 MiB is one frame, and
/// that level gives the same frame every time.
fn levels(holdings: &Holdings, names: &[String]) -> Result<(usize, usize)> {
    let (mut one, mut others) = (0, 0);
    for wal in names.iter().filter(|name| name.len() == 24).filter_map(|name| holdings.wal.get(name)).flatten() {
        let stored = wal.header["frames_size"].as_u64().context("no frames_size")?;
        match zstd::bulk::compress(&wal.plain, 1)?.len() as u64 == stored {
            true => one += 1,
            false => others += 1,
        }
    }
    Ok((one, others))
}

#[test]
fn a_long_backlog_is_drained_with_less_compression() {
    scenario::play("outage-strained", |stage| {
        announce_outage(stage);
        let plan = NodePlan { direct: DirectRoad::None, ..NodePlan::default() };
        let mut loaded = Loaded::set_up(&stage.scratch, Stores::Directory, &plan)?;
        loaded.go_on(20)?;
        let before = loaded.primary.acknowledged()?;
        loaded.world.coordinator.kill()?;
        while loaded.primary.server.ready_files()?.len() < BACKLOG_FILES {
            loaded.primary.write_wal(8)?;
        }
        // What waits is known although nothing can leave; then info says it, too.
        wait_level(&loaded.primary, 1)?;
        loaded.world.coordinator.start()?;
        loaded.primary.server.wait_archived(2, Duration::from_secs(60))?;
        let drained: Vec<String> =
            loaded.primary.acknowledged()?.into_iter().filter(|name| !before.contains(name)).collect();
        wait_level(&loaded.primary, 3)?;
        wait::until("info says that archiving keeps up", Duration::from_secs(30), || {
            let info = loaded.world.operator.json(&["info", CLUSTER])?;
            let node = &info["clusters"][0]["fleet"]["nodes"][0];
            Ok(node["stage"] == 0 && node["compression_level"] == 3)
        })?;
        let between = loaded.primary.acknowledged()?;
        loaded.primary.write_wal(2)?;
        loaded.go_on(20)?;
        let after: Vec<String> =
            loaded.primary.acknowledged()?.into_iter().filter(|name| !between.contains(name)).collect();
        let holdings = loaded.world.look(DIRECTORY)?;
        let (one, others) = levels(&holdings, &before)?;
        ensure!(one == 0 && others > 0, "before: {one} segments with level 1, {others} with another");
        let (one, others) = levels(&holdings, &drained)?;
        println!("outage-strained: {one} segments with level 1, {others} with another");
        ensure!(one >= BACKLOG_FILES - READ_OTHERWISE, "drained: {one} with level 1, {others} with another");
        let (one, others) = levels(&holdings, &after)?;
        ensure!(one == 0 && others > 0, "after: {one} segments with level 1, {others} with another");
        loaded.end().map(|_| ())
    });
}
