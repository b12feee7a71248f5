//! Which files of a backup of the hybrid shape come from which server, and what the primary tells of its part.
//!
//! ```text
//! the standby's:  base/ global/ pg_tblspc/ pg_xact/ pg_multixact/, but not global/pg_control
//! the primary's:  global/pg_control, and all else: configuration, PG_VERSION, pg_commit_ts, pg_logical, ...
//! ```
//!
//! What a restartpoint has written on the standby and WAL brings up to the stop may come from there; what no WAL tells of, or
//! belongs to the server that was asked for the backup, is the primary's.
//!
//! The primary describes its part as a manifest of its own, with the label and the stop of the backup in the head. It is
//! read here, checked against what was asked, and its lines become lines of the backup's manifest. It is no object of any
//! store.

use std::path::Path;

use postgres_format::{Lsn, SystemIdentifier, Timeline};
use repository::backup::manifest::{Directory, File, FileKind, Head, Line, Link, ManifestDamage, ManifestReader, Pack};
use repository::name::BackupId;
use repository::witness::WalWitness;

use super::describe::Facts;
use crate::postgres::BackupStop;

/// Largest description of the primary's part, in bytes; some hundred thousand files.
pub(super) const PART_BYTES_MAX: usize = 3 << 20;
/// Directories of which all but `pg_control` comes from the standby.
const OF_STANDBY: [&str; 5] = ["base", "global", "pg_tblspc", "pg_xact", "pg_multixact"];
/// The one file in them that does not.
const CONTROL_FILE: &str = "global/pg_control";

/// Whose files are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// All of one server.
    Whole,
    /// The standby's part.
    Standby,
    /// The primary's part.
    Primary,
}

impl Side {
    /// Whether a file belongs to it, or a directory may hold some that do.
    pub(super) fn keeps(self, path: &Path) -> bool {
        let first = path.iter().next().and_then(|first| first.to_str());
        let of_standby = first.is_some_and(|first| OF_STANDBY.contains(&first));
        let control = path == Path::new(CONTROL_FILE);
        match self {
            Self::Whole => true,
            Self::Standby => of_standby && !control,
            Self::Primary => !of_standby || control || path == Path::new("global"),
        }
    }
}

/// What the primary sent, and how it stopped the backup.
#[derive(Clone, Debug)]
pub(super) struct PrimaryPart {
    pub(super) head: Head,
    pub(super) directories: Vec<Directory>,
    pub(super) links: Vec<Link>,
    pub(super) packs: Vec<Pack>,
    pub(super) files: Vec<File>,
}

/// What is known of the backup before the primary's part came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected {
    pub(super) backup: BackupId,
    pub(super) system_identifier: SystemIdentifier,
    pub(super) start_lsn: Lsn,
    pub(super) start_timeline: Timeline,
    /// First number of a pack that is the primary's.
    pub(super) first_pack: u32,
    /// First number of a file that is the primary's.
    pub(super) first_file: u32,
}

impl PrimaryPart {
    /// Reads what the primary described. Fails with a line for people.
    pub(super) fn parse(bytes: &[u8], expected: &Expected) -> Result<Self, String> {
        let wrong = |damage: ManifestDamage| damage.to_string();
        let lines = ManifestReader::new(bytes).map_err(wrong)?;
        let head = lines.head().clone();
        let (directories, links, packs, files) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut part = Self { head, directories, links, packs, files };
        for line in lines {
            match line.map_err(wrong)? {
                Line::Head(_) | Line::End(_) => {}
                Line::Tablespace(_) => return Err("it has a tablespace".to_owned()),
                // The standby's has it.
                Line::Directory(directory) if Side::Standby.keeps(directory.path.as_path()) => {}
                Line::Directory(directory) => part.directories.push(directory),
                Line::Link(link) => part.links.push(link),
                Line::Pack(pack) => part.packs.push(pack),
                Line::File(file) => part.files.push(file),
            }
        }
        part.unexpected(expected).map_or(Ok(part), |what| Err(what.to_owned()))
    }

    fn unexpected(&self, expected: &Expected) -> Option<&'static str> {
        let head = &self.head;
        let foreign = |file: &File| file.number.0 < expected.first_file || !Side::Primary.keeps(file.path.as_path());
        let checks = [
            (head.backup != expected.backup, "it is of another backup"),
            (head.system_identifier != expected.system_identifier, "it is of another system"),
            (head.start_lsn != expected.start_lsn, "it began elsewhere"),
            (head.start_timeline != expected.start_timeline, "it began on another timeline"),
            (head.from_standby, "it is of a standby"),
            (!head.critical.is_empty(), "it refers to other backups"),
            (self.packs.iter().any(|pack| pack.number < expected.first_pack), "its packs have numbers that are taken"),
            (self.files.iter().any(foreign), "it has files that are the standby's, or their numbers"),
            (!self.files.iter().any(|file| file.kind == FileKind::Control), "it lacks pg_control"),
        ];
        checks.into_iter().find(|(wrong, _)| *wrong).map(|(_, what)| what)
    }

    /// What holds for both parts together. `own` is the standby's witness of its restartpoint: with it and the primary's it is
    /// proven that both servers' WAL is what is archived.
    pub(super) fn joined(&self, own: WalWitness, warnings: Vec<String>, facts: Facts) -> Facts {
        let mut wal_witnesses = self.head.wal_witnesses.clone();
        if !wal_witnesses.contains(&own) {
            wal_witnesses.insert(0, own);
        }
        let warnings = warnings.into_iter().chain(self.head.warnings.iter().cloned()).collect();
        Facts { wal_witnesses, warnings, ..facts }
    }

    /// How the backup was stopped.
    pub(super) fn stop(&self) -> BackupStop {
        let head = &self.head;
        BackupStop {
            stop_lsn: head.stop_lsn,
            backup_label: head.backup_label.as_bytes().to_vec(),
            tablespace_map: head.tablespace_map.as_bytes().to_vec(),
            stopped: head.stop_time,
            next_xid: head.stop_next_xid,
            last_commit: head.last_commit_time,
            databases: head.databases.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_is_of_one_side() {
        let check = |path: &str, standby: bool| {
            assert!(Side::Whole.keeps(Path::new(path)));
            assert_eq!(Side::Standby.keeps(Path::new(path)), standby, "{path}");
            assert_eq!(Side::Primary.keeps(Path::new(path)), !standby, "{path}");
        };
        for of_standby in [
            "base",
            "base/5",
            "base/5/16384",
            "base/5/PG_VERSION",
            "base/5/pg_filenode.map",
            "global/1262",
            "pg_tblspc/16385/PG_15_202209061/5/1",
            "pg_xact/0000",
            "pg_multixact/members/0000",
        ] {
            check(of_standby, true);
        }
        for of_primary in [
            "global/pg_control",
            "PG_VERSION",
            "postgresql.auto.conf",
            "pg_commit_ts/0000",
            "pg_logical/replorigin_checkpoint",
            "pg_stat/pgstat.stat",
            "log/base/x",
            "based",
        ] {
            check(of_primary, false);
        }
        assert!(Side::Primary.keeps(Path::new("global")) && Side::Standby.keeps(Path::new("global")));
    }
}
