//! What changed as the server's own WAL summaries tell it, from PostgreSQL 17 on with `summarize_wal`: read where it puts
//! them, in `pg_wal/summaries`.
//!
//! Invariants: summaries count only if their names prove that they cover the whole range, on the timelines that lead to the
//! server's; else there is no map, for the reason that is told. Summaries are written behind WAL, so that those of a backup's
//! start may come a little later: they are waited for as PostgreSQL's own increment does (`WaitForWalSummarization`), as long
//! as they get nearer, and never longer than [`PATIENCE`]. Nothing in the directory is touched.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use postgres_format::Lsn;
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::wal_changes::ChangeMap;
use postgres_format::wal_summary::{self, Outlook, SUMMARY_BYTES_MAX, SummaryName, cover};
use process::clock::Monotonic;

use super::MapBytes;

/// The first major version that writes summaries.
pub const FIRST_MAJOR: u32 = 17;
/// Longest wait for summaries that come.
const PATIENCE: Duration = Duration::from_secs(300);
/// Longest wait for the next one, the same as the server's own (`backup/basebackup_incremental.c`).
const SILENCE: Duration = Duration::from_secs(60);
/// How often the directory is looked at meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Most summaries that are looked at: ten days of one every few seconds.
const SUMMARIES_MAX: usize = 200_000;

/// Whether the server writes summaries now (`summarize_wal`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Summarizer {
    /// It does.
    On,
    /// It does not; older ones may be there.
    Off,
}

/// Changes in a range of WAL.
///
/// # Errors
/// Why they are not known; a line for people.
pub async fn changes(
    data_directory: &Path,
    history: &TimelineHistory,
    range: &Range<Lsn>,
    summarizer: Summarizer,
) -> Result<ChangeMap, String> {
    let directory = data_directory.join("pg_wal/summaries");
    let names = covering(&directory, history, range, summarizer).await?;
    let read = tokio::task::spawn_blocking(move || read_all(&directory, &names));
    read.await.map_err(|_| "a WAL summary could not be read".to_owned())?
}

/// Names of summaries that cover the range, waited for as long as there is hope.
async fn covering(
    directory: &Path,
    history: &TimelineHistory,
    range: &Range<Lsn>,
    summarizer: Summarizer,
) -> Result<Vec<SummaryName>, String> {
    let began = Monotonic::now();
    let (mut reached, mut heard) = (None, Monotonic::now());
    loop {
        let looked = directory.to_owned();
        let known = tokio::task::spawn_blocking(move || list(&looked)).await;
        let known = known.map_err(|_| "the WAL summaries could not be listed".to_owned())??;
        let uncovered = match cover(history, range, &known) {
            Ok(names) => return Ok(names),
            Err(uncovered) => uncovered,
        };
        if summarizer == Summarizer::Off {
            return Err(format!("{uncovered}, and summarize_wal is off"));
        }
        if uncovered.outlook == Outlook::Missed {
            return Err(uncovered.to_string());
        }
        if reached.replace(uncovered.from).is_none_or(|reached| reached < uncovered.from) {
            heard = Monotonic::now();
        }
        if heard.elapsed() >= SILENCE || began.elapsed() >= PATIENCE {
            return Err(format!("{uncovered} after {} s", began.elapsed().as_secs()));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Names of all summaries that are there; others than summaries are passed over, and a directory that is not there has none.
fn list(directory: &Path) -> Result<Vec<SummaryName>, String> {
    let unread = |error: io::Error| format!("the WAL summaries cannot be listed: {error}");
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unread(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(unread)?.file_name();
        let Some(name) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        if names.len() >= SUMMARIES_MAX {
            return Err(format!("there are more than {SUMMARIES_MAX} WAL summaries"));
        }
        names.push(name);
    }
    Ok(names)
}

/// All that some summaries tell. One of them may be removed meanwhile, as they are once their time is over.
fn read_all(directory: &Path, names: &[SummaryName]) -> Result<ChangeMap, String> {
    let mut map = ChangeMap::empty();
    for name in names {
        let path = directory.join(name.to_string());
        let told = read(&path).map_err(|reason| format!("WAL summary {name} cannot be read: {reason}"))?;
        map.union(&told);
        MapBytes::default().admit(&map)?;
    }
    Ok(map)
}

fn read(path: &PathBuf) -> Result<ChangeMap, String> {
    let bytes = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if bytes > SUMMARY_BYTES_MAX as u64 {
        return Err(format!("it has {bytes} bytes, more than {SUMMARY_BYTES_MAX}"));
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    wal_summary::parse(&bytes).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use postgres_format::Timeline;

    use super::*;

    /// An empty summary, as the server writes it.
    fn write(directory: &Path, name: &str) {
        let mut bytes = 0x652B_137B_u32.to_le_bytes().to_vec();
        bytes.extend([0; 24]);
        let checksum = crc32c::crc32c(&bytes);
        bytes.extend(checksum.to_le_bytes());
        fs::write(directory.join(name), bytes).unwrap();
    }

    async fn found(data: &Path, range: Range<u64>, summarizer: Summarizer) -> Result<ChangeMap, String> {
        let range = Lsn::new(range.start)..Lsn::new(range.end);
        changes(data, &TimelineHistory::root(Timeline::FIRST), &range, summarizer).await
    }

    #[tokio::test]
    async fn summaries_count_where_they_cover_everything() {
        let data = tempfile::tempdir().unwrap();
        let none = found(data.path(), 0x28..0x80, Summarizer::Off).await;
        assert_eq!(none, Err("no WAL summary of timeline 1 covers 0/28, and summarize_wal is off".to_owned()));
        let directory = data.path().join("pg_wal/summaries");
        fs::create_dir_all(&directory).unwrap();
        write(&directory, "0000000100000000000000280000000000000040.summary");
        write(&directory, "0000000100000000000000600000000000000080.summary");
        write(&directory, "temp.summary");
        let gap = found(data.path(), 0x28..0x80, Summarizer::On).await;
        assert_eq!(gap, Err("no WAL summary of timeline 1 covers 0/40".to_owned()));
        write(&directory, "0000000100000000000000400000000000000060.summary");
        for summarizer in [Summarizer::On, Summarizer::Off] {
            assert_eq!(found(data.path(), 0x30..0x80, summarizer).await, Ok(ChangeMap::empty()));
        }
        fs::write(directory.join("0000000100000000000000400000000000000060.summary"), b"cut off").unwrap();
        let damaged = found(data.path(), 0x30..0x80, Summarizer::On).await.unwrap_err();
        assert!(damaged.ends_with("cannot be read: the file is not a WAL summary"), "{damaged}");
    }

    #[tokio::test]
    async fn a_late_summary_is_waited_for() {
        let data = tempfile::tempdir().unwrap();
        let directory = data.path().join("pg_wal/summaries");
        fs::create_dir_all(&directory).unwrap();
        let late = async {
            tokio::time::sleep(LOOK_EVERY * 2).await;
            write(&directory, "0000000100000000000000280000000000000080.summary");
        };
        let (found, ()) = tokio::join!(found(data.path(), 0x28..0x80, Summarizer::On), late);
        assert_eq!(found, Ok(ChangeMap::empty()));
    }
}
