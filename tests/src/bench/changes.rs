//! Change maps: what it costs, in CPU time, that the agent also learns and writes down what WAL changed.
//!
//! The pass over a segment that only checks it is compared with the one that also gathers its changes and makes the bytes
//! that go behind the WAL; in one process, segment by segment in turn, each after a pass that brings it near the processor
//! for both alike.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use postgres_format::wal_changes::ChangeScan;
use postgres_format::wal_segment::{Expected, SegmentScan};
use postgres_format::{SegmentName, SegmentSize, SystemIdentifier};
use repository::wal::{Sink, WalEncoder, WalFacts};

use super::figure::{Bound, Figure, median};
use super::material::WalSet;

/// Bytes pushed at once, as the agent does.
const PIECE_BYTES: usize = 1 << 20;
/// Where the system identifier stands in a segment.
const SYSTEM_AT: usize = 24;
/// Most CPU seconds a GiB of WAL.
const CPU_SECONDS_PER_GIB_MAX: f64 = 0.5;
/// Bytes in a GiB.
const GIB: f64 = (1u64 << 30) as f64;

/// `changes`: CPU seconds for each GiB of a set, and how large the maps become.
pub fn maps(set: &WalSet, rounds: usize) -> Result<Vec<Figure>> {
    let mut seconds = Vec::new();
    let mut hundredths = 0.0;
    let mut encoder = WalEncoder::new(3, Sink::Memory)?;
    for _ in 0..rounds {
        let (mut more, mut bytes, mut told_bytes) = (0.0, 0, 0);
        for file in &set.files {
            let segment = Segment::read(set, file)?;
            segment.check()?;
            let start = cpu_time()?;
            segment.check()?;
            let checked = cpu_time()?;
            told_bytes += segment.check_and_tell(&mut encoder)?;
            let told = cpu_time()?;
            more += (told - checked).as_secs_f64() - (checked - start).as_secs_f64();
            bytes += segment.bytes.len();
        }
        seconds.push(more / (bytes as f64 / GIB));
        hundredths = 100.0 * told_bytes as f64 / bytes as f64;
    }
    let name = set.name;
    Ok(vec![
        Figure::alone(
            format!("change maps of {name}, CPU s/GiB of WAL"),
            median(&seconds),
            Bound::AtMost(CPU_SECONDS_PER_GIB_MAX),
        ),
        Figure::alone(format!("change maps of {name}, bytes in hundredths of the WAL"), hundredths, Bound::None),
    ])
}

/// A segment in memory.
struct Segment {
    expected: Expected,
    bytes: Vec<u8>,
}

impl Segment {
    fn read(set: &WalSet, file: &str) -> Result<Self> {
        let bytes = fs::read(set.directory.join(file)).context("a segment of the set")?;
        let system = bytes.get(SYSTEM_AT..).and_then(|rest| rest.first_chunk()).context("an empty segment")?;
        let expected = Expected {
            name: file.parse::<SegmentName>()?,
            size: SegmentSize::from_bytes(bytes.len() as u64)?,
            system_identifier: SystemIdentifier::new(u64::from_le_bytes(*system)),
            partial: false,
        };
        Ok(Self { expected, bytes })
    }

    fn check(&self) -> Result<()> {
        let mut scan = SegmentScan::new(self.expected);
        self.bytes.chunks(PIECE_BYTES).try_for_each(|piece| scan.push(piece))?;
        scan.finish()?;
        Ok(())
    }

    /// Gives the length of what goes behind the WAL, in bytes. The WAL itself is not compressed here.
    fn check_and_tell(&self, encoder: &mut WalEncoder) -> Result<u64> {
        let mut scan = ChangeScan::new(self.expected);
        self.bytes.chunks(PIECE_BYTES).try_for_each(|piece| scan.push(piece))?;
        let (report, changes) = scan.finish()?;
        encoder.restart(3, Sink::Memory)?;
        let facts = WalFacts {
            cluster: "main".parse()?,
            system_identifier: self.expected.system_identifier,
            name: postgres_format::WalFileName::Segment(self.expected.name),
            node: "bench".parse()?,
            in_recovery: false,
            complete: report.end.is_complete(),
            logical_end: Some(report.logical_end),
            postgres_major: report.postgres_major,
            first_commit_time: None,
            last_commit_time: None,
            written: process::clock::now(),
        };
        let told = encoder.finish_with_changes(facts, &changes)?;
        Ok(told.header.changes.context("a segment tells nothing")?.size)
    }
}

/// CPU time of this thread so far.
fn cpu_time() -> Result<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").context("this kernel does not count CPU time")?;
    let nanoseconds = text.split_whitespace().next().context("an empty schedstat")?.parse()?;
    Ok(Duration::from_nanos(nanoseconds))
}
