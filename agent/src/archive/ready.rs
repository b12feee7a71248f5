//! What PostgreSQL wants archived: a look at `pg_wal/archive_status`, and at `pg_wal` for segments that lost their flag.
//!
//! `.ready` files are created without being flushed to disk, so a crash can lose one; a segment with neither status that is
//! older than one of its timeline with a status is finished all the same (`XLogArchiveNotify` in `xlogarchive.c`).
//!
//! Invariants: read-only. However many files wait, at most the asked-for number of names is held; the rest is counted.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use postgres_format::{SegmentName, Timeline, WalFileName};

/// Most timelines looked at for segments that lost their flag.
const TIMELINES_MAX: usize = 16;

/// What a look found.
#[derive(Debug, Default)]
pub struct Ready {
    /// Number of `.ready` files.
    pub count: u64,
    /// The first of those that are wanted, in PostgreSQL's order of need.
    pub wanted: BTreeSet<WalFileName>,
    /// The first of all.
    pub first: Option<WalFileName>,
    /// The newest segment of the highest timeline.
    pub newest: Option<SegmentName>,
    /// The newest segment that PostgreSQL was told is archived.
    pub newest_done: Option<SegmentName>,
}

/// Lists `.ready` files; keeps the first `limit` for which `want` says yes.
///
/// # Errors
/// When the directory cannot be listed.
pub fn scan(archive_status: &Path, limit: usize, mut want: impl FnMut(&WalFileName) -> bool) -> io::Result<Ready> {
    let mut ready = Ready::default();
    for entry in std::fs::read_dir(archive_status)? {
        let file_name = entry?.file_name();
        if let Some(WalFileName::Segment(done)) = status(&file_name, ".done") {
            ready.newest_done = ready.newest_done.max(Some(done));
        }
        let Some(name) = status(&file_name, ".ready") else { continue };
        ready.count += 1;
        ready.first = Some(ready.first.map_or(name, |first| first.min(name)));
        if let WalFileName::Segment(segment) = name {
            ready.newest = Some(ready.newest.map_or(segment, |newest| newest.max(segment)));
        }
        if want(&name) {
            ready.wanted.insert(name);
            if ready.wanted.len() > limit {
                ready.wanted.pop_last();
            }
        }
    }
    Ok(ready)
}

/// Age of a `.ready` file; zero when it went meanwhile.
pub fn age(archive_status: &Path, name: &WalFileName, now: Timestamp) -> Duration {
    let modified = std::fs::metadata(archive_status.join(format!("{name}.ready"))).and_then(|status| status.modified());
    let modified = modified.ok().and_then(|modified| Timestamp::try_from(modified).ok());
    modified.map_or(Duration::ZERO, |modified| now.duration_since(modified).try_into().unwrap_or_default())
}

/// Finished segments that have neither status; at most `limit`, oldest first.
///
/// # Errors
/// When a directory cannot be listed.
pub fn unflagged(pg_wal: &Path, limit: usize) -> io::Result<BTreeSet<SegmentName>> {
    let mut newest: Vec<(Timeline, SegmentName)> = Vec::new();
    for entry in std::fs::read_dir(pg_wal.join("archive_status"))? {
        let file_name = entry?.file_name();
        let flagged = status(&file_name, ".ready").or_else(|| status(&file_name, ".done"));
        let Some(WalFileName::Segment(segment)) = flagged else { continue };
        match newest.iter().position(|(timeline, _)| *timeline == segment.timeline()) {
            Some(known) => newest[known].1 = segment.max(newest[known].1),
            None if newest.len() < TIMELINES_MAX => newest.push((segment.timeline(), segment)),
            None => {}
        }
    }
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(pg_wal)? {
        let file_name = entry?.file_name();
        let Some(WalFileName::Segment(segment)) = file_name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let older = newest.iter().any(|(timeline, newest)| *timeline == segment.timeline() && segment < *newest);
        if older && !has_status(pg_wal, &segment) {
            found.insert(segment);
            if found.len() > limit {
                found.pop_last();
            }
        }
    }
    Ok(found)
}

fn has_status(pg_wal: &Path, segment: &SegmentName) -> bool {
    let exists = |suffix: &str| pg_wal.join("archive_status").join(format!("{segment}{suffix}")).exists();
    // Ready first: the archiver renames from ready to done, so looking in this order misses neither.
    exists(".ready") || exists(".done")
}

fn status(file_name: &OsStr, suffix: &str) -> Option<WalFileName> {
    file_name.to_str()?.strip_suffix(suffix)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("archive_status")).unwrap();
        for file in files {
            std::fs::write(folder.path().join(file), b"").unwrap();
        }
        folder
    }

    fn texts<T: ToString>(names: impl IntoIterator<Item = T>) -> Vec<String> {
        names.into_iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn the_first_files_in_postgresqls_order_are_kept_and_all_are_counted() {
        let folder = folder(&[
            "archive_status/000000010000000000000003.ready",
            "archive_status/000000010000000000000002.ready",
            "archive_status/000000010000000000000001.done",
            "archive_status/000000020000000000000004.ready",
            "archive_status/00000002.history.ready",
            "archive_status/000000010000000000000004.partial.ready",
            "archive_status/RECOVERYXLOG.ready",
            "archive_status/junk",
        ]);
        let status = folder.path().join("archive_status");
        let ready = scan(&status, 3, |name| name.to_string() != "000000010000000000000002").unwrap();
        assert_eq!(ready.count, 5);
        assert_eq!(
            texts(ready.wanted),
            ["00000002.history", "000000010000000000000003", "000000010000000000000004.partial"]
        );
        assert_eq!(ready.first.unwrap().to_string(), "00000002.history");
        assert_eq!(ready.newest.unwrap().to_string(), "000000020000000000000004");
        assert!(scan(Path::new("/nonexistent"), 1, |_| true).is_err());
    }

    #[test]
    fn segments_that_lost_their_flag_are_found_only_behind_a_flagged_one() {
        let folder = folder(&[
            "000000010000000000000001",
            "000000010000000000000002",
            "000000010000000000000003",
            "000000010000000000000004",
            "000000010000000000000005",
            "000000020000000000000001",
            "xlogtemp.12",
            "archive_status/000000010000000000000002.done",
            "archive_status/000000010000000000000004.ready",
        ]);
        let check = |limit, expected: &[&str]| assert_eq!(texts(unflagged(folder.path(), limit).unwrap()), expected);
        check(9, &["000000010000000000000001", "000000010000000000000003"]);
        check(1, &["000000010000000000000001"]);
    }
}
