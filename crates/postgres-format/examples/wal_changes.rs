//! What the change map costs: CPU seconds per GiB of WAL, on top of the scan that every archived segment gets.
//!
//! ```text
//! cargo run --release -p postgres-format --example wal_changes -- /path/to/pg_wal/0000000100000000000000*
//! ```
//!
//! The files are read into memory first, then scanned in turns without and with a map; of each the fastest round counts. Not measured: reading,
//! compressing, and writing the map.

use std::error::Error;
use std::fs;

use postgres_format::wal_changes::{ChangeScan, Joiner};
use postgres_format::wal_segment::{Expected, SegmentScan};
use postgres_format::{Lsn, SegmentName, SegmentSize, SystemIdentifier};

const ROUNDS: usize = 7;
/// As the archiver reads.
const CHUNK_BYTES: usize = 1 << 20;
/// The files together must fit into memory.
const FILES_MAX: usize = 256;

fn main() -> Result<(), Box<dyn Error>> {
    let mut segments = Vec::new();
    for path in std::env::args().skip(1).take(FILES_MAX) {
        let name: SegmentName = path.rsplit('/').next().unwrap_or_default().parse()?;
        let bytes = fs::read(&path)?;
        let system_identifier = bytes.get(24..32).and_then(|field| field.first_chunk()).ok_or("no WAL segment")?;
        let expected = Expected {
            name,
            size: SegmentSize::from_bytes(bytes.len() as u64)?,
            system_identifier: SystemIdentifier::new(u64::from_le_bytes(*system_identifier)),
            partial: false,
        };
        // What is only recycled has nothing to be measured.
        if scan(expected, &bytes).is_ok() {
            segments.push((expected, bytes));
        }
    }
    segments.sort_by_key(|(expected, _)| expected.name);
    let gibibytes = segments.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() as f64 / f64::from(1 << 30);
    let (mut plain, mut mapped) = (f64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        plain = plain.min(cpu_seconds(|| segments.iter().try_for_each(|(expected, bytes)| scan(*expected, bytes)))?);
        mapped = mapped
            .min(cpu_seconds(|| segments.iter().try_for_each(|(expected, bytes)| map(*expected, bytes).map(drop)))?);
    }
    let (mut encoded, mut blocks) = (0, 0);
    let mut changes = Vec::new();
    for (expected, bytes) in &segments {
        let change = map(*expected, bytes)?;
        encoded += change.encode().len();
        blocks += change.map.block_count();
        changes.push(change);
    }
    let join = cpu_seconds(|| {
        let Some((first, last)) = changes.first().zip(changes.last()) else { return Ok(()) };
        let mut joiner = Joiner::new(first.start..Lsn::new(last.start.as_u64() + 1));
        changes.iter().try_for_each(|change| joiner.push(change))?;
        joiner.finish().map(|map| {
            println!("joined: {} forks, {} blocks, {} bytes", map.forks().len(), map.block_count(), map.encode().len())
        })?;
        Ok(())
    })?;
    println!("{} segments, {gibibytes:.2} GiB", segments.len());
    println!("scan alone    {:.3} CPU s/GiB", plain / gibibytes);
    println!("with the map  {:.3} CPU s/GiB", mapped / gibibytes);
    println!("the map       {:.3} CPU s/GiB", (mapped - plain) / gibibytes);
    println!("join          {:.3} CPU s/GiB", join / gibibytes);
    println!("encoded       {} bytes a segment, {blocks} blocks in all", encoded / segments.len().max(1));
    Ok(())
}

fn scan(expected: Expected, bytes: &[u8]) -> Result<(), Box<dyn Error>> {
    let mut scan = SegmentScan::new(expected);
    bytes.chunks(CHUNK_BYTES).try_for_each(|chunk| scan.push(chunk))?;
    scan.finish()?;
    Ok(())
}

fn map(expected: Expected, bytes: &[u8]) -> Result<postgres_format::wal_changes::SegmentChanges, Box<dyn Error>> {
    let mut scan = ChangeScan::new(expected);
    bytes.chunks(CHUNK_BYTES).try_for_each(|chunk| scan.push(chunk))?;
    Ok(scan.finish()?.1)
}

/// CPU time of this thread while `work` runs.
fn cpu_seconds(work: impl FnOnce() -> Result<(), Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    let spent = || -> Result<f64, Box<dyn Error>> {
        let text = fs::read_to_string("/proc/thread-self/schedstat")?;
        Ok(text.split(' ').next().unwrap_or_default().parse::<f64>()? / 1e9)
    };
    let before = spent()?;
    work()?;
    Ok(spent()? - before)
}
