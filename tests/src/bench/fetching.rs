//! Fetching: recovery asks for the archived segments one after the other.

use anyhow::Result;

use super::calls::{Calls, Part, Timing};
use super::figure::{Bound, Figure, median};
use super::material::{Material, data_directory};
use super::ours::{Ours, Road};
use super::pgbackrest::{Pgbackrest, Repository, ServerState};
use crate::account::{self, Scratch};
use crate::fleet::Store;
use crate::postgres::Server;

/// Time that replay of a segment takes where it is played, in milliseconds: fast for PostgreSQL.
const REPLAY_MS: u64 = 60;

/// What the rounds took.
#[derive(Debug, Default)]
struct Fetched {
    call_ms: Vec<f64>,
    total_ms_per_segment: Vec<f64>,
}

impl Fetched {
    fn note(&mut self, timing: &Timing) {
        self.call_ms.push(median(&timing.calls_ms));
        self.total_ms_per_segment.push(timing.wall_seconds * 1e3 / timing.calls_ms.len() as f64);
    }
}

/// `fetch`: all segments of a set out of a directory, with nothing between the calls and with the time of replay.
pub fn fetch(material: &Material, rounds: usize) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("fetch")?;
    let set = &material.pgbench;
    let data = data_directory(&scratch, &material.server, "primary-data", Some(set))?;
    let primary = Server::at(&scratch, "primary", data)?;
    let store = Store::directory("repo1", &scratch.directory("repo1")?);
    let mut ours = Ours::start(&scratch, "ours", &primary, &store, Road::Coordinator)?;
    ours.archive(primary.data(), &set.files)?.run(&scratch)?;
    let peer = Pgbackrest::set_up(&scratch, "pgbackrest", &primary, ServerState::Stopped, Repository::Directory)?;
    peer.archive(primary.data(), &set.files).run(&scratch)?;
    let mut figures = Vec::new();
    for (replay_ms, name) in [(0, "without a pause"), (REPLAY_MS, "with 60 ms of replay a segment")] {
        let (mut own, mut theirs) = (Fetched::default(), Fetched::default());
        for round in 0..rounds {
            let name = format!("restored{replay_ms}-{round}");
            own.note(&our_round(&scratch, material, &mut ours, &name, replay_ms)?);
            theirs.note(&pgbackrest_round(&scratch, material, &peer, &name, replay_ms)?);
        }
        let (call, total) = (median(&own.call_ms), median(&own.total_ms_per_segment));
        let line = |what: &str| format!("fetch of the set {name}, {what}");
        // The call is what recovery waits for while files lie ready; the total is bounded by work alone.
        let (call_bound, total_bound) = match replay_ms {
            0 => (Bound::None, Bound::RatioAtMost(0.7)),
            _ => (Bound::RatioAtMost(0.3), Bound::None),
        };
        figures.push(Figure::against(line("median call, ms"), call, median(&theirs.call_ms), call_bound));
        let peers_total = median(&theirs.total_ms_per_segment);
        figures.push(Figure::against(line("total, ms/segment"), total, peers_total, total_bound));
    }
    let peak = ours.peaks()?.agent;
    figures.push(Figure::alone("fetch of the set, peak memory of the agent, MiB", peak, Bound::AtMost(64.0)));
    ours.end()?;
    Ok(figures)
}

/// A data directory in archive recovery.
fn restored(scratch: &Scratch, material: &Material, name: &str) -> Result<Server> {
    let data = data_directory(scratch, &material.server, name, None)?;
    account::write_owned(&data.join("recovery.signal"), "")?;
    Server::at(scratch, name, data)
}

fn our_round(scratch: &Scratch, material: &Material, ours: &mut Ours, name: &str, replay_ms: u64) -> Result<Timing> {
    let server = restored(scratch, material, &format!("{name}-ours"))?;
    ours.move_agent(scratch, &server)?;
    let calls = Calls {
        directory: server.data().to_owned(),
        command: ours.restore_command()?,
        files: material.pgbench.files.clone(),
        part: Part::Startup,
        replay_ms,
    };
    calls.run(scratch)
}

fn pgbackrest_round(
    scratch: &Scratch,
    material: &Material,
    peer: &Pgbackrest,
    name: &str,
    replay_ms: u64,
) -> Result<Timing> {
    let server = restored(scratch, material, &format!("{name}-pgbackrest"))?;
    let calls = Calls {
        directory: server.data().to_owned(),
        command: peer.restore_command(scratch, name, &server)?,
        files: material.pgbench.files.clone(),
        part: Part::Startup,
        replay_ms,
    };
    calls.run(scratch)
}
