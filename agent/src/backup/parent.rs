//! PURE: which backup a new one may build on, and why not on another.
//!
//! A page that WAL did not touch since the parent's start may be taken from the parent. That holds only where the parent's
//! files and ours tell one history: its start *and its end* must lie on the way to our timeline, and before our start. A
//! backup that began before a fork and ended behind it holds pages of a history that was given up, which neither WAL of
//! ours nor the LSN of our page shows.
//!
//! Invariants: everything refused has a reason; of several that fit the one with the latest start wins, for the least has
//! changed since. Whether its objects are whole in a store is not decided here, see [`find`].

pub mod find;
pub mod manifest;
mod testimony;

use std::fmt;

use postgres_format::control_file::ControlFile;
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{Lsn, SystemIdentifier, Timeline};
use repository::backup::manifest::Head;
use repository::backup::origin::BackupType;
use repository::name::BackupId;
use repository::root::RootBackup;

/// What a new backup says of itself as soon as it is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ours {
    /// Whose files they are.
    pub system_identifier: SystemIdentifier,
    /// The server's major version.
    pub postgres_major: u32,
    /// Size of a WAL segment in bytes.
    pub segment_size_bytes: u64,
    /// Where its recovery begins.
    pub start_lsn: Lsn,
    /// How the server's timeline came about.
    pub history: TimelineHistory,
}

/// Why a backup is no parent of this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It holds another cluster's files.
    System {
        /// Its system identifier.
        theirs: SystemIdentifier,
    },
    /// It was taken before an upgrade, or with other segments.
    Version {
        /// What differs.
        what: &'static str,
        /// There.
        theirs: u64,
        /// Here.
        ours: u64,
    },
    /// It is on no way to our timeline.
    OffHistory {
        /// Its timeline.
        timeline: Timeline,
        /// Its position there.
        lsn: Lsn,
        /// Our timeline.
        ours: Timeline,
    },
    /// It ended after our start.
    Later {
        /// Its end.
        stop: Lsn,
        /// Our start.
        start: Lsn,
    },
    /// Page checksums are being switched on or off, there or here.
    ChecksumsInTransit,
    /// It is not whole, or cannot be read.
    Unusable {
        /// What was found.
        reason: String,
    },
}

impl fmt::Display for Unfit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System { theirs } => write!(formatter, "it is of another system, {theirs}"),
            Self::Version { what, theirs, ours } => write!(formatter, "its {what} is {theirs}, and {ours} here"),
            Self::OffHistory { timeline, lsn, ours } => {
                write!(formatter, "{lsn} on its timeline {timeline} is not on the way to timeline {ours}")
            }
            Self::Later { stop, start } => write!(formatter, "it ended at {stop}, after the start at {start}"),
            Self::ChecksumsInTransit => formatter.write_str("page checksums are being switched on or off"),
            Self::Unusable { reason } => formatter.write_str(reason),
        }
    }
}

/// A backup that is no parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The backup.
    pub backup: BackupId,
    /// Why.
    pub why: Unfit,
}

/// What the roots tell of possible parents.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Candidates<'a> {
    /// Those that fit as far as a root tells, the best first.
    pub fit: Vec<&'a RootBackup>,
    /// Those that do not, the newest first.
    pub refused: Vec<Refused>,
}

/// Sorts live backups into possible parents and others. A backup of type diff builds on a full one only.
pub fn candidates<'a>(asked: BackupType, live: &'a [RootBackup], ours: &Ours) -> Candidates<'a> {
    let eligible = |entry: &&RootBackup| match asked {
        BackupType::Full => false,
        BackupType::Diff => entry.backup_type == BackupType::Full,
        BackupType::Incr => true,
    };
    let mut candidates = Candidates::default();
    let mut refused = Vec::new();
    for entry in live.iter().filter(eligible) {
        match unfit(entry, ours) {
            None => candidates.fit.push(entry),
            Some(why) => refused.push(Refused { backup: entry.backup, why }),
        }
    }
    candidates.fit.sort_by_key(|entry| std::cmp::Reverse((entry.start_lsn, entry.backup)));
    refused.sort_by_key(|refused| std::cmp::Reverse(refused.backup));
    Candidates { refused, ..candidates }
}

fn unfit(entry: &RootBackup, ours: &Ours) -> Option<Unfit> {
    let differs = |what, theirs: u64, ours: u64| (theirs != ours).then_some(Unfit::Version { what, theirs, ours });
    if entry.system_identifier != ours.system_identifier {
        return Some(Unfit::System { theirs: entry.system_identifier });
    }
    differs("PostgreSQL version", entry.postgres_major.into(), ours.postgres_major.into())
        .or_else(|| differs("WAL segment size", entry.segment_size_bytes, ours.segment_size_bytes))
        .or_else(|| off_history(entry, &ours.history))
        .or_else(|| {
            let (stop, start) = (entry.consistent_lsn(), ours.start_lsn);
            (stop > start || entry.start_lsn > start).then_some(Unfit::Later { stop, start })
        })
}

/// A start exactly where its timeline ended belongs to what was given up there; an end there does not.
fn off_history(entry: &RootBackup, history: &TimelineHistory) -> Option<Unfit> {
    let off = |timeline, lsn| Unfit::OffHistory { timeline, lsn, ours: history.timeline() };
    let (timeline, start) = (entry.start_timeline, entry.start_lsn);
    let begins = history.contains(timeline, start) && history.end_of(timeline).is_none_or(|end| start < end);
    if !begins {
        return Some(off(timeline, start));
    }
    let (timeline, stop) = (entry.stop_timeline, entry.consistent_lsn());
    (!history.contains(timeline, stop)).then(|| off(timeline, stop))
}

/// Why a backup whose manifest has this head is no parent of a data directory with this control file.
pub fn geometry_differs(head: &Head, control: &ControlFile) -> Option<Unfit> {
    let pairs = [
        ("catalog version", head.catalog_version, control.catalog_version),
        ("version of pg_control", head.control_version, control.version()),
        ("page size", head.block_size, control.block_size),
        ("relation segment size", head.relation_segment_blocks, control.relation_segment_blocks),
        ("version of page checksums", head.checksum_version, control.checksum_version),
    ];
    let differing = pairs.into_iter().find(|(_, theirs, ours)| theirs != ours);
    if let Some((what, theirs, ours)) = differing {
        return Some(Unfit::Version { what, theirs: theirs.into(), ours: ours.into() });
    }
    (control.checksum_version > 1).then_some(Unfit::ChecksumsInTransit)
}

/// Why everything is copied although a backup was asked for that builds on another.
pub fn none_reason(asked: BackupType, refused: &[Refused]) -> String {
    let which = if asked == BackupType::Diff { "full backup" } else { "backup" };
    match refused.first() {
        None => format!("there is no {which} that it could build on"),
        Some(first) if refused.len() == 1 => {
            format!("the only {which}, {}, is not fit to build on: {}", first.backup, first.why)
        }
        Some(first) => {
            let count = refused.len();
            format!("none of {count} {which}s is fit to build on; of {}: {}", first.backup, first.why)
        }
    }
}

#[cfg(test)]
mod tests;
