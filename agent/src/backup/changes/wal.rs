//! The change map of a range of WAL, put together segment by segment: from what lies beside the archived WAL, else from the
//! file in `pg_wal` as long as it is there, else from the archived WAL itself.
//!
//! Invariants: a map is complete or there is none, for the reason that is told; as many segments as [`AT_ONCE`] are in
//! memory as maps, none as bytes. A file in `pg_wal` may be recycled while it is read: then its records end early, and the
//! repository is asked.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::StreamExt;
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::wal_changes::{ChangeMap, ChangeScan, Joiner, SegmentChanges};
use postgres_format::wal_segment::Expected;
use postgres_format::{Lsn, SegmentName, SegmentSize, SystemIdentifier};
use repository::wal::{self, ArchivedChanges};

use crate::backup::changes::MapBytes;
use crate::backup::parent::find::Library;
use crate::backup::reader::read_at_most;

/// Segments looked at at the same time.
const AT_ONCE: usize = 4;
/// Segments after which the size of the map is looked at.
const WEIGHED_EVERY: u64 = 32;
/// Bytes of a segment read at once; whole WAL pages.
const CHUNK_BYTES: usize = 256 << 10;
/// WAL that is fetched whatever the size of the data directory, in bytes.
const FETCHED_BYTES_MIN: u64 = 1 << 30;

/// Where WAL of a range is read.
#[derive(Debug)]
pub struct WalPath<'a> {
    /// Stores of the cluster.
    pub library: Library<'a>,
    /// The server's data directory.
    pub data_directory: &'a Path,
    /// Whose WAL it is.
    pub system: SystemIdentifier,
    /// Size of a segment.
    pub size: SegmentSize,
    /// The way to the server's timeline.
    pub history: &'a TimelineHistory,
    /// Bytes in the data directory: fetching more WAL than that is more work than reading all pages.
    pub data_bytes: u64,
}

/// Changes between two positions, and from how many segments they are known. The map takes of `room`.
///
/// # Errors
/// Why they are not known; a line for people.
pub async fn changes(path: &WalPath<'_>, range: Range<Lsn>, room: &mut MapBytes) -> Result<(ChangeMap, u64), String> {
    let fetched_bytes = AtomicU64::new(0);
    let mut joiner = Joiner::new(range.clone());
    let Library { stores, cluster, .. } = path.library;
    let archived = ArchivedChanges::new(stores, cluster, path.system, path.size);
    let names = wal::segments(path.history, path.size, &range);
    let count = names.len() as u64;
    let found = names.into_iter().map(|name| segment(path, &archived, name, range.end, &fetched_bytes));
    let mut found = futures_util::stream::iter(found).buffered(AT_ONCE);
    let mut joined = 0_u64;
    while let Some(changes) = found.next().await {
        joiner.push(&changes?).map_err(|doubt| doubt.to_string())?;
        joined += 1;
        if joined.is_multiple_of(WEIGHED_EVERY) {
            room.admit(joiner.map())?;
        }
    }
    let map = joiner.finish().map_err(|doubt| doubt.to_string())?;
    room.admit(&map)?;
    room.take(&map);
    Ok((map, count))
}

/// What one segment tells, as far as it is needed: to its end, or to the end of the range.
async fn segment(
    path: &WalPath<'_>,
    archived: &ArchivedChanges<'_>,
    name: SegmentName,
    until: Lsn,
    fetched_bytes: &AtomicU64,
) -> Result<SegmentChanges, String> {
    let expected = Expected { name, size: path.size, system_identifier: path.system, partial: false };
    let enough = |changes: &SegmentChanges| changes.told_until() >= until || changes.end.is_complete();
    if let Some(changes) = archived.told(name).await.ok().flatten().filter(enough) {
        return Ok(changes);
    }
    let local = path.data_directory.join("pg_wal").join(name.to_string());
    if let Ok(changes) = scan(local, expected).await
        && enough(&changes)
    {
        return Ok(changes);
    }
    let limit = path.data_bytes.max(FETCHED_BYTES_MIN);
    if fetched_bytes.fetch_add(path.size.bytes(), Ordering::Relaxed) >= limit {
        return Err(format!("more WAL than there is data would have to be fetched, {name} and others"));
    }
    archived.read(name).await.map_err(|untold| untold.to_string())
}

/// Reads a segment file.
async fn scan(file: PathBuf, expected: Expected) -> Result<SegmentChanges, io::Error> {
    let scanned = tokio::task::spawn_blocking(move || {
        let (file, mut scan, mut at) = (File::open(file)?, ChangeScan::new(expected), 0);
        let mut chunk = vec![0; CHUNK_BYTES];
        while at < expected.size.bytes() {
            let got = read_at_most(&file, &mut chunk, at)?;
            if got == 0 {
                break;
            }
            scan.push(&chunk[..got]).map_err(io::Error::other)?;
            at += got as u64;
        }
        let (_, changes) = scan.finish().map_err(io::Error::other)?;
        Ok(changes)
    });
    scanned.await.map_err(io::Error::other)?
}
