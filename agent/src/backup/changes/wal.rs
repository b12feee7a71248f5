//! The change map of a range of WAL, put together segment by segment: from `pg_wal` as long as the files are there, else
//! from the repository.
//!
//! Invariants: a map is complete or there is none, for the reason that is told; as many segments as [`AT_ONCE`] are in
//! memory as maps, none as bytes. A file in `pg_wal` may be recycled while it is read: then its records end early, and the
//! repository is asked.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::wal_changes::{ChangeMap, ChangeScan, Joiner, SegmentChanges};
use postgres_format::wal_segment::Expected;
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, WalFileName};
use repository::wal::{self, Fetched};

use crate::backup::parent::find::Library;
use crate::backup::reader::read_at_most;

/// Segments looked at at the same time.
const AT_ONCE: usize = 4;
/// Bytes of a segment read at once; whole WAL pages.
const CHUNK_BYTES: usize = 256 << 10;
/// Longest wait for one segment from the repository.
const SEGMENT_PATIENCE: Duration = Duration::from_secs(120);
/// WAL that is fetched whatever the size of the data directory, in bytes.
const FETCHED_BYTES_MIN: u64 = 1 << 30;
/// Bytes of the header of a segment's first page, in which no record begins.
const FIRST_HEADER_BYTES: u64 = 40;

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

/// Changes between two positions, and from how many segments they are known.
///
/// # Errors
/// Why they are not known; a line for people.
pub async fn changes(path: &WalPath<'_>, range: Range<Lsn>) -> Result<(ChangeMap, u64), String> {
    let fetched_bytes = AtomicU64::new(0);
    let mut joiner = Joiner::new(range.clone());
    let names = segments(path.history, path.size, &range);
    let count = names.len() as u64;
    let found = names.into_iter().map(|name| segment(path, name, range.end, &fetched_bytes));
    let mut found = futures_util::stream::iter(found).buffered(AT_ONCE);
    while let Some(changes) = found.next().await {
        joiner.push(&changes?).map_err(|doubt| doubt.to_string())?;
    }
    Ok((joiner.finish().map_err(|doubt| doubt.to_string())?, count))
}

/// The segments from the one that holds the start to the one that holds the last byte, each of the newest timeline on the
/// way that had begun by its end.
fn segments(history: &TimelineHistory, size: SegmentSize, range: &Range<Lsn>) -> Vec<SegmentName> {
    if range.start >= range.end {
        return Vec::new();
    }
    let first = SegmentNumber::containing(range.start, size).as_u64();
    let last = SegmentNumber::last_before(range.end, size);
    // Of a segment that has no more than a page header before the end nothing is needed, and perhaps it does not exist.
    let needed = range.end.as_u64().saturating_sub(last.start(size).as_u64()) > FIRST_HEADER_BYTES;
    let end = last.as_u64() + u64::from(needed);
    let name = |number| {
        let number = SegmentNumber::new(number);
        let last_byte = Lsn::new(number.start(size).as_u64() + (size.bytes() - 1));
        SegmentName::new(history.timeline_at(last_byte), number, size)
    };
    (first..end.max(first + 1)).map(name).collect()
}

/// What one segment tells, as far as it is needed: to its end, or to the end of the range.
async fn segment(
    path: &WalPath<'_>,
    name: SegmentName,
    until: Lsn,
    fetched_bytes: &AtomicU64,
) -> Result<SegmentChanges, String> {
    let expected = Expected { name, size: path.size, system_identifier: path.system, partial: false };
    let enough = |changes: &SegmentChanges| changes.told_until() >= until || changes.end.is_complete();
    let local = path.data_directory.join("pg_wal").join(name.to_string());
    if let Ok(changes) = scan(local, expected).await
        && enough(&changes)
    {
        return Ok(changes);
    }
    if let Some(changes) = stored(path, name).await.filter(enough) {
        return Ok(changes);
    }
    let limit = path.data_bytes.max(FETCHED_BYTES_MIN);
    if fetched_bytes.fetch_add(path.size.bytes(), Ordering::Relaxed) >= limit {
        return Err(format!("more WAL than there is data would have to be fetched, {name} and others"));
    }
    fetch(path, name, expected).await
}

/// What is stored beside the WAL of a segment, where the one who archived it wrote down what it changes.
async fn stored(_path: &WalPath<'_>, _name: SegmentName) -> Option<SegmentChanges> {
    None
}

/// From the WAL itself, as the repository has it.
async fn fetch(path: &WalPath<'_>, name: SegmentName, expected: Expected) -> Result<SegmentChanges, String> {
    let Library { stores, cluster, scratch } = path.library;
    let place = tempfile::Builder::new().prefix("wal-").tempfile_in(scratch).map_err(|error| error.to_string())?;
    let wanted = WalFileName::Segment(name);
    let fetching = wal::fetch(stores, cluster, path.system, &wanted, place.path());
    match tokio::time::timeout(SEGMENT_PATIENCE, fetching).await {
        Ok(Fetched::Written { .. }) => {}
        Ok(Fetched::Absent) => return Err(format!("WAL {name} is neither in pg_wal nor in the repository")),
        Ok(Fetched::Unknown { reasons }) => {
            return Err(format!("WAL {name} could not be fetched: {}", reasons.join("; ")));
        }
        Err(_) => return Err(format!("WAL {name} could not be fetched in {} s", SEGMENT_PATIENCE.as_secs())),
    }
    scan(place.path().to_owned(), expected).await.map_err(|error| format!("WAL {name} is not understood: {error}"))
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

#[cfg(test)]
mod tests {
    use postgres_format::Timeline;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn names(range: Range<u64>) -> Vec<String> {
        let history = TimelineHistory::parse(Timeline::new(2).unwrap(), b"1\t0/380000\tx\n").unwrap();
        let size = SegmentSize::from_bytes(MIB).unwrap();
        let found = segments(&history, size, &(Lsn::new(range.start)..Lsn::new(range.end)));
        found.into_iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn segments_are_those_of_the_way_to_the_timeline() {
        let one = |name: &str| vec![name.to_owned()];
        assert_eq!(names(2 * MIB + 40..2 * MIB + 80), one("000000010000000000000002"));
        assert_eq!(
            names(2 * MIB + 40..5 * MIB + 41),
            [
                "000000010000000000000002",
                "000000020000000000000003",
                "000000020000000000000004",
                "000000020000000000000005"
            ]
        );
        assert_eq!(names(2 * MIB + 40..3 * MIB + 40), one("000000010000000000000002"));
        assert_eq!(names(2 * MIB + 40..3 * MIB), one("000000010000000000000002"));
        assert_eq!(names(2 * MIB..2 * MIB), Vec::<String>::new());
    }
}
