//! Scenarios: real servers, real processes of ours, faults in the middle; asserted on what the stores hold and on what
//! restored servers hold.
//!
//! Each scenario has its own scratch directory, servers, coordinator and ports, and they are played a few at a time.
//! A warning in our logs that a scenario did not announce fails it. `KEEP=1` leaves the scratch directories.

#![allow(clippy::unwrap_used)]

mod archive;
mod backup;
mod catalog;
mod churn;
mod clocks;
mod expire;
mod failover;
mod forks;
mod full_disk;
mod hybrid;
mod identity;
mod increment;
mod late;
mod majors;
mod memory;
mod operator;
mod outage;
mod pages;
mod plain;
mod restore;
mod restore_plan;
mod resume;
mod rollback;
mod seen;
mod split;
mod verify;

use anyhow::Result;
use tests::account::{self, Scratch};
use tests::postgres::{Checksums, InitOptions, Server};
use tests::world::{CLUSTER, Node, World};

/// Servers with segments of 1 MiB: everything about archiving happens sixteen times as often.
const SMALL: InitOptions = InitOptions { segment_mebibytes: 1, checksums: Checksums::On, major: None };

/// Makes a recovering copy of a primary that reads WAL with `pgconvoy fetch` from the world's stores, stopped.
fn recovering_copy(scratch: &Scratch, world: &World, primary: &Node, name: &str) -> Result<Server> {
    let copy = primary.server.copy(scratch, name)?;
    copy.configure(&[("archive_mode", "off"), ("restore_command", &fetch_command(world)?)])?;
    account::write_owned(&copy.data().join("recovery.signal"), "")?;
    Ok(copy)
}

/// `restore_command` of a server without an agent.
fn fetch_command(world: &World) -> Result<String> {
    Ok(format!(
        "'{} fetch --repository {} --cluster {CLUSTER} %f \"%p\"'",
        account::Program::Pgconvoy.path()?.display(),
        world.operator.config().display()
    ))
}
