//! What a backup's time goes into, ours and the peer's, as far as each says what it is doing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::Value;

use super::figure::{Bound, Figure, median};
use super::stopwatch::Lap;

/// Characters of a WAL segment's name.
const SEGMENT_NAME: usize = 24;

/// Seconds of one backup.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Phases {
    /// Until the server is in backup mode: the checkpoint.
    pub start: f64,
    /// Until it is asked to leave it: finding out what to read, reading, sending.
    pub copy: f64,
    /// From then on until its last segment is archived.
    pub wal: f64,
    /// The rest: the manifest, the commit.
    pub publish: f64,
}

impl Phases {
    fn between(total: f64, started: f64, stopped: f64, waiting: f64, archived: f64) -> Self {
        let wal = (archived - waiting).max(0.0);
        Self { start: started, copy: stopped - started, wal, publish: total - stopped - wal }
    }

    /// Of ours, which began at `began`. `told` is what `info` says of the backup; the server's clock is this machine's.
    pub fn of_ours(lap: &Lap, began: Timestamp, told: &Value, data: &Path) -> Result<Self> {
        let second = |at: Timestamp| (at.as_nanosecond() - began.as_nanosecond()) as f64 / 1e9;
        let time = |key: &str| {
            let text = told[key].as_str().with_context(|| format!("no {key}: {told}"))?;
            Ok::<_, anyhow::Error>(second(text.parse()?))
        };
        let (started, stopped) = (time("start_time")?, time("stop_time")?);
        Ok(Self::between(lap.seconds, started, stopped, stopped, second(last_archived(data)?)))
    }

    /// Of the peer's, told to say what it does.
    pub fn of_pgbackrest(lap: &Lap) -> Result<Self> {
        let said = |words: &[&str]| lap.said(words).with_context(|| format!("pgbackrest never said {words:?}"));
        let copying = said(&["backup start archive"])?;
        let copied = said(&["pg_backup_stop", "backup stop"])?;
        let waiting = said(&["check archive for segment"])?;
        Ok(Self::between(lap.seconds, copying, copied, waiting, said(&["new backup label"])?))
    }
}

/// When PostgreSQL was last told that a segment is archived.
fn last_archived(data: &Path) -> Result<Timestamp> {
    let mut last = None;
    for entry in fs::read_dir(data.join("pg_wal/archive_status"))? {
        let entry = entry?;
        let name = entry.file_name();
        let is_segment = name.to_str().and_then(|name| name.strip_suffix(".done")).map(str::len) == Some(SEGMENT_NAME);
        // The server may take one away meanwhile. To become .done is a renaming, which only the change time tells.
        if is_segment && let Ok(found) = entry.metadata() {
            last = last.max(Some(Timestamp::new(found.ctime(), i32::try_from(found.ctime_nsec())?)?));
        }
    }
    last.context("no segment is archived")
}

/// A line for each phase, the medians of each.
pub fn figures(name: &str, ours: &[Phases], peer: &[Phases]) -> Vec<Figure> {
    let line = |what: &str, phase: fn(&Phases) -> f64| {
        let of = |all: &[Phases]| median(&all.iter().map(phase).collect::<Vec<_>>());
        Figure::against(format!("{name}, {what}, s"), of(ours), of(peer), Bound::None)
    };
    vec![
        line("start", |phases| phases.start),
        line("copy", |phases| phases.copy),
        line("WAL", |phases| phases.wal),
        line("publish", |phases| phases.publish),
    ]
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;
    use serde_json::json;

    use super::*;

    #[test]
    fn phases_make_up_the_whole() {
        let data = tempfile::tempdir().unwrap();
        let status = data.path().join("pg_wal/archive_status");
        fs::create_dir_all(&status).unwrap();
        fs::write(status.join("000000010000000000000007.done"), "").unwrap();
        let archived = last_archived(data.path()).unwrap();
        let check = |since_began_ms: i64, expected: Phases| {
            let began = archived - SignedDuration::from_millis(since_began_ms);
            let at = |ms: i64| (began + SignedDuration::from_millis(ms)).to_string();
            let told = json!({ "start_time": at(500), "stop_time": at(2000) });
            let lap = Lap { seconds: 3.0, ..Lap::default() };
            assert_eq!(Phases::of_ours(&lap, began, &told, data.path()).unwrap(), expected);
        };
        check(2500, Phases { start: 0.5, copy: 1.5, wal: 0.5, publish: 0.5 });
        check(1000, Phases { start: 0.5, copy: 1.5, wal: 0.0, publish: 1.0 });
    }

    #[test]
    fn the_peer_says_what_it_does() {
        let said = [
            (0.25, "P00   INFO: backup start archive = 000000010000000000000007, lsn = 0/7000028"),
            (1.0, "P00   INFO: execute non-exclusive backup stop and wait for all WAL segments to archive"),
            (1.25, "P00   INFO: check archive for segment(s) 000000010000000000000007:000000010000000000000007"),
            (1.75, "P00   INFO: new backup label = 20261123-120000F"),
        ];
        let lines = said.map(|(second, line)| (second, line.to_owned())).to_vec();
        let found = Phases::of_pgbackrest(&Lap { seconds: 2.0, lines, ..Lap::default() }).unwrap();
        assert_eq!(found, Phases { start: 0.25, copy: 0.75, wal: 0.5, publish: 0.5 });
    }
}
