//! What of a data directory belongs in a base backup, as the server's own `BASE_BACKUP` decides it (`basebackup.c`, `sendDir`).
//!
//! The rules look at names only. Two decisions need more than one name and stay with the caller: an unlogged relation (one with an `_init`
//! fork beside it, [`RelationFile::init_fork_name`]) is backed up as its init fork alone; and of a tablespace only the directory of the
//! running version is taken ([`tablespace_version_directory`]). Numbers alone do not make a relation: `pg_xact/0000` looks like one, so
//! the directory decides.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use crate::relation::Fork;

/// What to do with an entry of a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Back up this file.
    Copy(FileKind),
    /// Leave it out, with the reason.
    Skip(&'static str),
    /// Record the directory and go on within it.
    KeepDirectory,
    /// Record the directory, but nothing within it, even if it is a symbolic link.
    DirectoryWithoutContents,
}

/// Files that need more than copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A file of a relation: its pages can be verified.
    Relation(RelationFile),
    /// `global/pg_control`: read last, with its checksum, and restored last.
    ControlFile,
    /// A `PG_VERSION`; may not vanish.
    VersionFile,
    /// A `pg_filenode.map`; may not vanish while its database exists.
    FilenodeMap,
    /// Any other file.
    Other,
}

/// A file of a relation, from its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelationFile {
    /// The relation's file node.
    pub number: u32,
    /// Which fork.
    pub fork: Fork,
    /// Which file of the fork: 3 for a name that ends in `.3`, 0 for the first.
    pub segment: u32,
}

/// Entries that are left out at any depth, by name.
const SKIPPED: [(&str, &str); 9] = [
    (".DS_Store", "made by a desktop"),
    ("postgresql.auto.conf.tmp", "half written by the server"),
    ("current_logfiles.tmp", "half written by the server"),
    ("backup_label", "of another backup"),
    ("tablespace_map", "of another backup"),
    ("backup_manifest", "of another backup"),
    ("postmaster.pid", "of the running server"),
    ("postmaster.opts", "of the running server"),
    ("pgsql_tmp", "temporary files"),
];

/// Entries that are left out at any depth, by the beginning of their names.
const SKIPPED_PREFIXES: [(&str, &str); 2] =
    [("pgsql_tmp", "temporary files"), ("pg_internal.init", "a cache that the server builds anew")];

/// Files that are left out at the top: the server would copy them, but a restore must not find them.
const SKIPPED_AT_TOP: [(&str, &str); 5] = [
    ("backup_label.old", "of another backup"),
    ("tablespace_map.old", "of another backup"),
    ("backup_manifest.tmp", "of another backup"),
    ("recovery.signal", "the restore decides how recovery goes"),
    ("standby.signal", "the restore decides how recovery goes"),
];

/// Directories whose contents the server makes anew, at any depth.
const EMPTIED: [&str; 7] =
    ["pg_stat_tmp", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_subtrans"];

/// Directories in `pg_wal` that belong in a backup, empty.
const WITHIN_WAL: [&str; 2] = ["archive_status", "summaries"];

/// The directory of a running version within a tablespace's location: `PG_15_202209061`.
pub fn tablespace_version_directory(postgres_major: u32, catalog_version: u32) -> String {
    format!("PG_{postgres_major}_{catalog_version}")
}

/// What to do with an entry, by its path relative to the data directory; tablespaces are seen through their links, as
/// `pg_tblspc/16384/PG_15_202209061/…`. An empty path is the data directory itself.
pub fn classify(relative: &Path, is_directory: bool) -> Entry {
    let Some(names) = names(relative) else { return Entry::Skip("not inside the data directory") };
    let Some((name, parents)) = names.split_last() else { return Entry::KeepDirectory };
    if let Some(reason) = names.iter().find_map(|name| skipped(name)) {
        return Entry::Skip(reason);
    }
    if parents.first() == Some(&&b"pg_wal"[..]) {
        let kept = is_directory && parents.len() == 1 && WITHIN_WAL.iter().any(|kept| kept.as_bytes() == *name);
        return if kept { Entry::DirectoryWithoutContents } else { Entry::Skip("WAL is archived") };
    }
    if parents.iter().any(|parent| is_emptied(parent)) {
        return Entry::Skip("made anew by the server");
    }
    if is_emptied(name) || (parents.is_empty() && *name == b"pg_wal") {
        return Entry::DirectoryWithoutContents;
    }
    if parents.len() == 2 && parents[0] == b"pg_tblspc" && !name.starts_with(b"PG_") {
        return Entry::Skip("not of a tablespace");
    }
    if is_directory { Entry::KeepDirectory } else { file(parents, name) }
}

fn file(parents: &[&[u8]], name: &[u8]) -> Entry {
    if parents.is_empty()
        && let Some((_, reason)) = SKIPPED_AT_TOP.iter().find(|(skipped, _)| skipped.as_bytes() == name)
    {
        return Entry::Skip(reason);
    }
    let directory = relation_directory(parents);
    match name {
        b"pg_control" if parents == [b"global"] => Entry::Copy(FileKind::ControlFile),
        b"PG_VERSION" => Entry::Copy(FileKind::VersionFile),
        b"pg_filenode.map" if directory.is_some() => Entry::Copy(FileKind::FilenodeMap),
        _ => match directory {
            Some(RelationDirectory::Database) if is_temporary(name) => Entry::Skip("a temporary relation"),
            Some(_) => Entry::Copy(RelationFile::from_name(name).map_or(FileKind::Other, FileKind::Relation)),
            None => Entry::Copy(FileKind::Other),
        },
    }
}

/// The names of a relative path, or `None` if it leads elsewhere.
fn names(relative: &Path) -> Option<Vec<&[u8]>> {
    let named = |component| match component {
        Component::Normal(name) => Some(name.as_bytes()),
        _ => None,
    };
    relative.components().map(named).collect()
}

fn skipped(name: &[u8]) -> Option<&'static str> {
    let exact = SKIPPED.iter().find(|(skipped, _)| skipped.as_bytes() == name);
    let prefix = || SKIPPED_PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix.as_bytes()));
    exact.or_else(prefix).map(|(_, reason)| *reason)
}

fn is_emptied(name: &[u8]) -> bool {
    EMPTIED.iter().any(|emptied| emptied.as_bytes() == name)
}

/// Directories that hold relations.
#[derive(Clone, Copy)]
enum RelationDirectory {
    Global,
    Database,
}

fn relation_directory(parents: &[&[u8]]) -> Option<RelationDirectory> {
    match parents {
        [b"global"] => Some(RelationDirectory::Global),
        [b"base", database] if number(database).is_some() => Some(RelationDirectory::Database),
        [b"pg_tblspc", _, version, database] if version.starts_with(b"PG_") && number(database).is_some() => {
            Some(RelationDirectory::Database)
        }
        _ => None,
    }
}

impl RelationFile {
    /// The name of the file beside it whose presence makes the relation unlogged; then every file but the init fork's is left out.
    pub fn init_fork_name(&self) -> String {
        format!("{}_init", self.number)
    }

    /// Reads `NUMBER[_fsm|_vm|_init][.SEGMENT]` (`parse_filename_for_nontemp_relation` in `reinit.c`).
    pub(crate) fn from_name(name: &[u8]) -> Option<Self> {
        let (name, segment) = match name.iter().position(|&byte| byte == b'.') {
            Some(dot) => (&name[..dot], number(&name[dot + 1..])?),
            None => (name, 0),
        };
        let (digits, fork) = fork_of(name)?;
        Some(Self { number: number(digits)?, fork, segment })
    }
}

fn fork_of(name: &[u8]) -> Option<(&[u8], Fork)> {
    let Some(underscore) = name.iter().position(|&byte| byte == b'_') else { return Some((name, Fork::Main)) };
    let (digits, suffix) = name.split_at(underscore);
    Some((digits, Fork::from_suffix(suffix)?))
}

/// `tBACKEND_NUMBER[_fork][.SEGMENT]`.
fn is_temporary(name: &[u8]) -> bool {
    let digits = |text: &[u8]| !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let Some(rest) = name.strip_prefix(b"t") else { return false };
    let Some(underscore) = rest.iter().position(|&byte| byte == b'_') else { return false };
    let (backend, rest) = (&rest[..underscore], &rest[underscore + 1..]);
    let (rest, segment) = match rest.iter().position(|&byte| byte == b'.') {
        Some(dot) => (&rest[..dot], Some(&rest[dot + 1..])),
        None => (rest, None),
    };
    digits(backend) && segment.is_none_or(digits) && fork_of(rest).is_some_and(|(number, _)| digits(number))
}

/// A decimal number from 1 to 2^32 - 1 without leading zeros.
pub(crate) fn number(digits: &[u8]) -> Option<u32> {
    if digits.first().is_none_or(|&digit| digit == b'0') || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[track_caller]
    fn check(path: &str, expected: Entry) {
        let (path, is_directory) = path.strip_suffix('/').map_or((path, false), |path| (path, true));
        assert_eq!(classify(Path::new(path), is_directory), expected, "{path}");
    }

    #[track_caller]
    fn check_skipped(path: &str) {
        let (path, is_directory) = path.strip_suffix('/').map_or((path, false), |path| (path, true));
        let entry = classify(Path::new(path), is_directory);
        assert!(matches!(entry, Entry::Skip(_)), "{path}: {entry:?}");
    }

    fn relation(number: u32, fork: Fork, segment: u32) -> Entry {
        Entry::Copy(FileKind::Relation(RelationFile { number, fork, segment }))
    }

    #[test]
    fn relations() {
        check("base/5/16384", relation(16384, Fork::Main, 0));
        check("base/5/16384.3", relation(16384, Fork::Main, 3));
        check("base/5/16384_fsm", relation(16384, Fork::FreeSpaceMap, 0));
        check("base/5/16384_vm.1", relation(16384, Fork::VisibilityMap, 1));
        check("base/5/16384_init", relation(16384, Fork::Init, 0));
        check("global/1262", relation(1262, Fork::Main, 0));
        check("pg_tblspc/16500/PG_15_202209061/5/16384.1", relation(16384, Fork::Main, 1));
        for other in
            ["pg_xact/0000", "pg_xact/1234", "base/5/016384", "base/5/16384.0", "base/5/16384.01", "base/5/16384_x"]
        {
            check(other, Entry::Copy(FileKind::Other));
        }
        for other in
            ["base/16384", "base/x/16384", "base/5/x/16384", "base/5/99999999999", "base/5/16384.", "global/t3_16384"]
        {
            check(other, Entry::Copy(FileKind::Other));
        }
        assert_eq!(RelationFile { number: 7, fork: Fork::Main, segment: 2 }.init_fork_name(), "7_init");
    }

    #[test]
    fn special_files() {
        check("global/pg_control", Entry::Copy(FileKind::ControlFile));
        check("pg_control", Entry::Copy(FileKind::Other));
        check("PG_VERSION", Entry::Copy(FileKind::VersionFile));
        check("base/5/PG_VERSION", Entry::Copy(FileKind::VersionFile));
        check("base/5/pg_filenode.map", Entry::Copy(FileKind::FilenodeMap));
        check("global/pg_filenode.map", Entry::Copy(FileKind::FilenodeMap));
        check("postgresql.conf", Entry::Copy(FileKind::Other));
        check("log/postgresql.log", Entry::Copy(FileKind::Other));
        check("extension_state/backup_label.old", Entry::Copy(FileKind::Other));
    }

    #[test]
    fn left_out() {
        for path in [
            "base/pgsql_tmp/",
            "base/pgsql_tmp/pgsql_tmp1.0",
            "pgsql_tmp_x",
            "base/5/pg_internal.init.123",
            "global/pg_internal.init",
            ".DS_Store",
            "base/5/.DS_Store",
            "backup_label",
            "x/backup_label",
            "tablespace_map",
            "backup_manifest",
            "postmaster.pid",
            "postmaster.opts",
            "postgresql.auto.conf.tmp",
            "current_logfiles.tmp",
            "backup_label.old",
            "tablespace_map.old",
            "recovery.signal",
            "standby.signal",
            "backup_manifest.tmp",
            "base/5/t3_16384",
            "base/5/t3_16384_fsm",
            "base/5/t12_16384_vm.2",
            "pg_tblspc/16500/PG_15_202209061/5/t3_16384",
            "pg_tblspc/16500/lost+found/",
            "pg_tblspc/16500/notes.txt",
            "pg_wal/000000010000000000000001",
            "pg_wal/archive_status/x.ready",
            "pg_wal/elsewhere/",
            "pg_notify/0000",
            "x/pg_replslot/a/state",
            "../etc/passwd",
            "/etc/passwd",
            "base/../x",
        ] {
            check_skipped(path);
        }
    }

    #[test]
    fn directories() {
        for kept in ["base/", "base/5/", "global/", "pg_tblspc/", "pg_tblspc/16500/", "pg_twophase/", "x/pg_wal/"] {
            check(kept, Entry::KeepDirectory);
        }
        check("pg_tblspc/16500/PG_15_202209061/", Entry::KeepDirectory);
        assert_eq!(classify(Path::new(""), true), Entry::KeepDirectory);
        for emptied in [
            "pg_wal/",
            "pg_wal",
            "pg_wal/archive_status/",
            "pg_wal/summaries/",
            "pg_stat_tmp/",
            "pg_replslot",
            "x/pg_notify/",
        ] {
            check(emptied, Entry::DirectoryWithoutContents);
        }
        assert_eq!(tablespace_version_directory(15, 202_209_061), "PG_15_202209061");
    }

    #[test]
    fn names_of_any_bytes() {
        let name = OsStr::from_bytes(b"base/5/\xFF\xFE");
        assert_eq!(classify(Path::new(name), false), Entry::Copy(FileKind::Other));
    }
}
