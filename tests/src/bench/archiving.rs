//! Archiving: the price of one call for what is archived already, and how fast a backlog drains, at which price in CPU
//! time and memory.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::bucket::SharedBucket;
use super::calls::{Calls, Part, Timing};
use super::figure::{Bound, Figure, largest, median};
use super::material::{self, Material, PGBENCH, WalSet, data_directory};
use super::ours::{Ours, Peaks, Road};
use super::pgbackrest::{Pgbackrest, Repository, ServerState};
use crate::account::Scratch;
use crate::fleet::Store;
use crate::postgres::Server;

/// A round's own store, and its directory.
const DIRECTORY_STORE: &str = "repo1";
/// Calls of one command in a row; few, so that what else the machine does hits all commands alike.
const CALLS: usize = 10;
/// Rounds of calls.
const CALL_ROUNDS: usize = 20;
/// Largest peak of the agent, in MiB.
const AGENT_PEAK_MAX: f64 = 64.0;
/// Largest peak of the coordinator, in MiB.
const COORDINATOR_PEAK_MAX: f64 = 96.0;

/// How much a peak may differ between two rounds and still count as unchanged.
const PEAK_GROWTH_MAX: f64 = 1.15;

/// One way to empty a backlog, and what each round of it took.
#[derive(Debug, Default)]
struct Drained {
    segments_per_second: Vec<f64>,
    cpu_seconds_per_segment: Vec<f64>,
    call_ms: Vec<f64>,
    /// Of a round into a directory.
    stored_mib_per_segment: Vec<f64>,
}

impl Drained {
    /// Notes what the files under a directory take.
    fn note_stored(&mut self, directory: &Path, segments: usize) -> Result<()> {
        let stored_bytes = bytes_under(directory)?;
        self.stored_mib_per_segment.push(stored_bytes as f64 / segments as f64 / f64::from(1 << 20));
        Ok(())
    }

    fn note(&mut self, timing: &Timing, segments: usize, daemons_cpu_seconds: f64) {
        let segments = segments as f64;
        self.segments_per_second.push(segments / timing.wall_seconds);
        self.cpu_seconds_per_segment.push((timing.cpu_seconds + daemons_cpu_seconds) / segments);
        self.call_ms.push(median(&timing.calls_ms));
    }

    fn speed(&self) -> f64 {
        median(&self.segments_per_second)
    }

    fn cpu(&self) -> f64 {
        median(&self.cpu_seconds_per_segment)
    }

    fn stored(&self) -> f64 {
        median(&self.stored_mib_per_segment)
    }
}

fn bytes_under(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        bytes += if entry.file_type()?.is_dir() { bytes_under(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(bytes)
}

/// A scratch directory that lives as long as one round, with the data directory that is archived.
struct Round {
    scratch: Scratch,
    server: Server,
}

impl Round {
    fn begin(cluster: &Server, set: &WalSet) -> Result<Self> {
        let scratch = Scratch::new("round")?;
        let data = data_directory(&scratch, cluster, "node-data", Some(set))?;
        let server = Server::at(&scratch, "node", data)?;
        // What the round before left to be written back is not this round's to wait for.
        rustix::fs::sync();
        Ok(Self { scratch, server })
    }

    fn data(&self) -> &Path {
        self.server.data()
    }

    fn directory_store(&self) -> Result<Store> {
        Ok(Store::directory(DIRECTORY_STORE, &self.scratch.directory(DIRECTORY_STORE)?))
    }
}

fn repeat(directory: &Path, command: String, file: &str, times: usize) -> Calls {
    let files = vec![file.to_owned(); times];
    Calls { directory: directory.to_owned(), command, files, part: Part::Plain, replay_ms: 0 }
}

/// `shim`: one `archive_command` for a segment that is archived already.
pub fn shim(material: &Material) -> Result<Vec<Figure>> {
    let set = &material.pgbench;
    let round = Round::begin(&material.server, set)?;
    let (scratch, data) = (&round.scratch, round.data());
    let few: Vec<String> = set.files.iter().take(4).cloned().collect();
    let ours = Ours::start(scratch, "ours", &round.server, &round.directory_store()?, Road::Coordinator)?;
    ours.archive(data, &few)?.run(scratch)?;
    let peer = Pgbackrest::set_up(scratch, "pgbackrest", &round.server, ServerState::Stopped, Repository::Directory)?;
    peer.archive(data, &few).run(scratch)?;
    let (mut own, mut nothing, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..CALL_ROUNDS {
        own.extend(repeat(data, ours.archive_command()?, &few[0], CALLS).run(scratch)?.calls_ms);
        nothing.extend(repeat(data, "/bin/true".to_owned(), &few[0], CALLS).run(scratch)?.calls_ms);
        theirs.extend(repeat(data, peer.archive_command(), &few[0], CALLS).run(scratch)?.calls_ms);
    }
    let (own, nothing, theirs) = (median(&own), median(&nothing), median(&theirs));
    ours.end()?;
    Ok(vec![
        Figure::against(
            "archive_command already shipped, against /bin/true, ms",
            own,
            nothing,
            Bound::RatioAtMost(1.6),
        ),
        Figure::against(
            "archive_command already shipped, against pgbackrest, ms",
            own,
            theirs,
            Bound::RatioAtMost(0.25),
        ),
    ])
}

/// `drain` and `text`: a whole set is flagged at once and archived into a directory.
pub fn drain(material: &Material, set: &WalSet, rounds: usize) -> Result<Vec<Figure>> {
    let (mut own, mut theirs, mut zstd) = (Drained::default(), Drained::default(), Drained::default());
    let mut peaks = Vec::new();
    for _ in 0..rounds {
        peaks.push(our_round(&material.server, set, Place::Directory, Road::Coordinator, &mut own)?);
        pgbackrest_round(&material.server, set, Place::Directory, &mut theirs)?;
        zstd_round(&material.server, set, &mut zstd)?;
    }
    let name = set.name;
    let plain = name == PGBENCH;
    let or_none = |bound: Bound| if plain { bound } else { Bound::None };
    let faster = Bound::RatioAtLeast(if plain { 1.4 } else { 1.2 });
    let line = |what: &str| format!("drain {name} to a directory, {what}");
    let mut figures = vec![
        Figure::against(line("against pgbackrest, segments/s"), own.speed(), theirs.speed(), faster),
        Figure::against(
            line("against zstd -3 two at a time, segments/s"),
            own.speed(),
            zstd.speed(),
            or_none(Bound::RatioAtLeast(0.85)),
        ),
        Figure::against(
            line("CPU of all processes against pgbackrest, s/segment"),
            own.cpu(),
            theirs.cpu(),
            Bound::RatioAtMost(0.9),
        ),
        Figure::against(line("CPU against zstd -3, s/segment"), own.cpu(), zstd.cpu(), Bound::None),
        // Our level 3 is not zstd's: what it saves in time is to be seen beside what it takes in room.
        Figure::against(line("stored size against zstd -3, MiB/segment"), own.stored(), zstd.stored(), Bound::None),
        Figure::against(
            line("median call against pgbackrest, ms"),
            median(&own.call_ms),
            median(&theirs.call_ms),
            Bound::None,
        ),
    ];
    figures.extend(peak_figures(&line("peak memory"), &peaks));
    Ok(figures)
}

fn peak_figures(what: &str, peaks: &[Peaks]) -> [Figure; 2] {
    let agent: Vec<f64> = peaks.iter().map(|peaks| peaks.agent).collect();
    let coordinator: Vec<f64> = peaks.iter().map(|peaks| peaks.coordinator).collect();
    [
        Figure::alone(format!("{what} of the agent, MiB"), largest(&agent), Bound::AtMost(AGENT_PEAK_MAX)),
        Figure::alone(
            format!("{what} of the coordinator, MiB"),
            largest(&coordinator),
            Bound::AtMost(COORDINATOR_PEAK_MAX),
        ),
    ]
}

/// Where a backlog goes.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// A new directory.
    Directory,
    /// A bucket, below a prefix of the round's own.
    Bucket(&'a SharedBucket),
}

fn our_round(cluster: &Server, set: &WalSet, place: Place<'_>, road: Road, into: &mut Drained) -> Result<Peaks> {
    let round = Round::begin(cluster, set)?;
    let store = match place {
        Place::Directory => round.directory_store()?,
        Place::Bucket(bucket) => bucket.store(),
    };
    let mut ours = Ours::start(&round.scratch, "ours", &round.server, &store, road)?;
    if road == Road::Direct {
        ours.leave_coordinator()?;
    }
    let before = ours.cpu_seconds()?;
    let timing = ours.archive(round.data(), &set.files)?.run(&round.scratch)?;
    into.note(&timing, set.files.len(), ours.cpu_seconds()? - before);
    let peaks = ours.peaks()?;
    ours.end()?;
    if matches!(place, Place::Directory) {
        into.note_stored(&round.scratch.directory(DIRECTORY_STORE)?.join("c"), set.files.len())?;
    }
    Ok(peaks)
}

fn pgbackrest_round(cluster: &Server, set: &WalSet, place: Place<'_>, into: &mut Drained) -> Result<()> {
    let round = Round::begin(cluster, set)?;
    let repository = match place {
        Place::Directory => Repository::Directory,
        Place::Bucket(bucket) => Repository::Bucket(bucket),
    };
    let peer = Pgbackrest::set_up(&round.scratch, "pgbackrest", &round.server, ServerState::Stopped, repository)?;
    let timing = peer.archive(round.data(), &set.files).run(&round.scratch)?;
    into.note(&timing, set.files.len(), 0.0);
    Ok(())
}

fn zstd_round(cluster: &Server, set: &WalSet, into: &mut Drained) -> Result<()> {
    let round = Round::begin(cluster, set)?;
    let out = round.scratch.directory("zstd")?;
    let paths: Vec<PathBuf> = set.files.iter().map(|file| round.data().join("pg_wal").join(file)).collect();
    let list: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    let list = round.scratch.write("list", list.join("\n"))?;
    let command = format!("xargs -P 2 -n 1 -a {} zstd -3 -q --output-dir-flat {}", list.display(), out.display());
    let timing = repeat(round.data(), command, &set.files[0], 1).run(&round.scratch)?;
    into.note(&timing, set.files.len(), 0.0);
    into.note_stored(&out, set.files.len())
}

/// How far zstd -3 compresses a set.
pub fn compression_ratio(set: &WalSet) -> Result<f64> {
    let (mut plain, mut packed) = (0, 0);
    // Every eighth: a sample is enough for a comment.
    for file in set.files.iter().step_by(8) {
        let bytes = fs::read(set.directory.join(file)).context("a segment of the set")?;
        packed += zstd::bulk::compress(&bytes, 3)?.len();
        plain += bytes.len();
    }
    Ok(plain as f64 / packed as f64)
}

/// `s3`: the same backlog to a bucket by both roads, and by pgbackrest, for information.
pub fn to_bucket(material: &Material, rounds: usize, bucket: &SharedBucket) -> Result<Vec<Figure>> {
    let (cluster, set, place) = (&material.server, &material.pgbench, Place::Bucket(bucket));
    let roads = [(Road::Coordinator, "through the coordinator"), (Road::Direct, "straight")];
    let mut own = [Drained::default(), Drained::default()];
    let mut peaks = [Vec::new(), Vec::new()];
    let mut theirs = Drained::default();
    for _ in 0..rounds {
        for (index, (road, _)) in roads.into_iter().enumerate() {
            peaks[index].push(our_round(cluster, set, place, road, &mut own[index])?.agent);
            bucket.clear();
        }
        pgbackrest_round(cluster, set, place, &mut theirs)?;
        bucket.clear();
    }
    let mut figures = Vec::new();
    for (((_, name), drained), peaks) in roads.into_iter().zip(&own).zip(&peaks) {
        let line = |what: &str| format!("drain pgbench to S3 {name}, {what}");
        let against = |what: &str, ours: f64, peer: f64| Figure::against(line(what), ours, peer, Bound::None);
        figures.extend([
            against("against pgbackrest, segments/s", drained.speed(), theirs.speed()),
            against("CPU of all processes against pgbackrest, s/segment", drained.cpu(), theirs.cpu()),
            Figure::alone(line("peak memory of the agent, MiB"), largest(peaks), Bound::AtMost(AGENT_PEAK_MAX)),
        ]);
    }
    Ok(figures)
}

/// `backlog`: memory with ten times the segments, of one more server.
pub fn backlog(segments: usize) -> Result<Vec<Figure>> {
    let scratch = Scratch::new("backlog")?;
    let (cluster, many) = material::messages(&scratch, 10 * segments)?;
    let few = WalSet { files: many.files[..segments].to_vec(), ..many.clone() };
    let mut drained = Drained::default();
    let little = our_round(&cluster, &few, Place::Directory, Road::Coordinator, &mut Drained::default())?;
    let much = our_round(&cluster, &many, Place::Directory, Road::Coordinator, &mut drained)?;
    let line = |what: &str| format!("backlog of {} segments against {segments}, {what}", many.files.len());
    let mut figures = peak_figures(&line("peak memory"), &[much]).to_vec();
    let unchanged = Bound::RatioAtMost(PEAK_GROWTH_MAX);
    let agent = line("growth of the agent's peak, MiB");
    figures.push(Figure::against(agent, much.agent, little.agent, unchanged));
    let coordinator = line("growth of the coordinator's peak, MiB");
    figures.push(Figure::against(coordinator, much.coordinator, little.coordinator, unchanged));
    figures.push(Figure::alone(line("segments/s"), drained.speed(), Bound::None));
    Ok(figures)
}
