//! PURE: by which way it is found what changed, and why by none better.

use postgres_format::Lsn;
use postgres_format::control_file::ControlFile;
use repository::backup::manifest::Head;
use repository::backup::origin::{ChangeMethod, ChangeSource};

/// Decides on the way. Each says why it cannot be taken, or nothing where the server knows no such way; of maps that are
/// there, what they cover.
pub fn decide(
    maps: &Result<String, String>,
    summaries: Option<&Result<(), String>>,
    page_lsn: &Result<(), String>,
) -> ChangeSource {
    let no_maps = match maps {
        Ok(covered) => return ChangeSource { method: ChangeMethod::ChangeMaps, reason: covered.clone() },
        Err(no_maps) => no_maps,
    };
    let mut reasons = vec![no_maps.as_str()];
    let method = match (summaries, page_lsn) {
        (Some(Ok(())), _) => ChangeMethod::WalSummaries,
        (summaries, page_lsn) => {
            reasons.extend(summaries.and_then(|summaries| summaries.as_ref().err()).map(String::as_str));
            reasons.extend(page_lsn.as_ref().err().map(String::as_str));
            if page_lsn.is_ok() { ChangeMethod::PageLsn } else { ChangeMethod::FullCopy }
        }
    };
    ChangeSource { method, reason: reasons.join("; ") }
}

/// A backup that copies everything, and why.
pub fn full_copy(reason: impl Into<String>) -> ChangeSource {
    ChangeSource { method: ChangeMethod::FullCopy, reason: reason.into() }
}

/// Whether the LSN of a page has told of each of its changes since the parent's start; else why not.
///
/// Data checksums and `wal_log_hints` are switched on and off while a server is down only, so a server that was not
/// started since has not been without what is on at both ends. `started_unix` is when it was started, if that is known.
pub fn page_lsn_tells(parent: &Head, ours: &ControlFile, started_unix: Option<i64>) -> Result<(), String> {
    let both_off = "page LSNs do not tell every change, since neither data checksums nor wal_log_hints";
    if parent.checksum_version != 1 && !parent.wal_log_hints {
        return Err(format!("{both_off} was on when {} was taken", parent.backup));
    }
    if ours.checksum_version != 1 && !ours.wal_log_hints {
        return Err(format!("{both_off} is on"));
    }
    match started_unix {
        Some(started) if started <= parent.start_time.as_second() => Ok(()),
        Some(_) => Err(format!(
            "page LSNs may not tell every change, since the server was started after {} was taken, and data checksums \
             may have been off in between",
            parent.backup
        )),
        None => {
            Err("page LSNs may not tell every change, since it is not known when the server was started".to_owned())
        }
    }
}

/// When the server of a data directory was started, in seconds since 1970, from the text of its `postmaster.pid`
/// (`miscadmin.h`: process, data directory, start, port, …).
pub fn started_unix(postmaster_pid: &str) -> Option<i64> {
    postmaster_pid.lines().nth(2)?.trim().parse().ok()
}

/// The words for maps that cover a range.
pub fn covered(from: Lsn, to: Lsn, segments: u64) -> String {
    match segments {
        0 => format!("no WAL was written since {from}"),
        1 => format!("1 WAL segment from {from} to {to} tells every change"),
        _ => format!("{segments} WAL segments from {from} to {to} tell every change"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_better_is_taken_and_why_not_is_told() {
        let (no_maps, no_lsn) = (Err("WAL is missing".to_owned()), Err("nothing is on".to_owned()));
        let decided = |maps, lsn| {
            let source = decide(maps, None, lsn);
            (source.method, source.reason)
        };
        assert_eq!(covered(Lsn::new(0x28), Lsn::new(0x28), 0), "no WAL was written since 0/28");
        assert_eq!(covered(Lsn::new(0x28), Lsn::new(0x30), 1), "1 WAL segment from 0/28 to 0/30 tells every change");
        let covered = Ok(covered(Lsn::new(0x28), Lsn::new(0x3000028), 4));
        assert_eq!(
            decided(&covered, &no_lsn),
            (ChangeMethod::ChangeMaps, "4 WAL segments from 0/28 to 0/3000028 tell every change".to_owned())
        );
        assert_eq!(decided(&no_maps, &Ok(())), (ChangeMethod::PageLsn, "WAL is missing".to_owned()));
        assert_eq!(decided(&no_maps, &no_lsn), (ChangeMethod::FullCopy, "WAL is missing; nothing is on".to_owned()));
        let summarised = |maps, summaries, lsn| {
            let source = decide(maps, Some(&summaries), lsn);
            (source.method, source.reason)
        };
        let no_summaries = || Err("none covers 0/28".to_owned());
        let missing = "WAL is missing; none covers 0/28";
        assert_eq!(summarised(&no_maps, Ok(()), &Ok(())), (ChangeMethod::WalSummaries, "WAL is missing".to_owned()));
        assert_eq!(summarised(&no_maps, Ok(()), &no_lsn), (ChangeMethod::WalSummaries, "WAL is missing".to_owned()));
        assert_eq!(summarised(&no_maps, no_summaries(), &Ok(())), (ChangeMethod::PageLsn, missing.to_owned()));
        assert_eq!(
            summarised(&no_maps, no_summaries(), &no_lsn),
            (ChangeMethod::FullCopy, format!("{missing}; nothing is on"))
        );
        assert_eq!(summarised(&covered, no_summaries(), &no_lsn).0, ChangeMethod::ChangeMaps);
    }

    #[test]
    fn the_start_of_the_server_is_the_third_line() {
        assert_eq!(started_unix("4711\n/var/lib/data\n1795433678\n5432\n"), Some(1_795_433_678));
        assert_eq!(started_unix("4711\n"), None);
    }
}
