//! Which fork of which relation: as WAL names it by four numbers, and as a file of the data directory.
//!
//! ```text
//! global/RELATION                                            tablespace 1664 (pg_global), database 0
//! base/DATABASE/RELATION                                     tablespace 1663 (pg_default)
//! pg_tblspc/TABLESPACE/PG_MAJOR_CATALOG/DATABASE/RELATION    any other
//! RELATION = number[_fsm|_vm|_init][.segment]                segment 0 has no suffix
//! ```
//!
//! Every fork has one path and every accepted path is the only spelling of its fork, so that maps made from WAL and listings of a directory
//! meet. Temporary relations have names of their own (`t3_16384`) and are none here. Sources: `relpath.c`, `GetRelationPath`;
//! `relfilelocator.h`; `pg_tablespace.dat`.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::data_directory::{RelationFile, number, tablespace_version_directory};

/// The tablespace `pg_default`: `base/`.
pub const DEFAULT_TABLESPACE: u32 = 1663;
/// The tablespace `pg_global`: `global/`, relations that all databases share.
pub const GLOBAL_TABLESPACE: u32 = 1664;

/// A fork of a relation, in PostgreSQL's order (`ForkNumber` in `relpath.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fork {
    /// The data.
    Main,
    /// The free space map, never logged in WAL as such.
    FreeSpaceMap,
    /// The visibility map.
    VisibilityMap,
    /// What an unlogged relation is reset to.
    Init,
}

/// A database's share of a tablespace: one directory of relations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DatabaseDirectory {
    /// Object identifier of the tablespace.
    pub tablespace: u32,
    /// Object identifier of the database; 0 in [`GLOBAL_TABLESPACE`] only.
    pub database: u32,
}

/// One fork of one relation file node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationFork {
    /// Object identifier of the tablespace.
    pub tablespace: u32,
    /// Object identifier of the database; 0 in [`GLOBAL_TABLESPACE`] only.
    pub database: u32,
    /// The file node's number (`relfilenode`), not the relation's object identifier.
    pub relation: u32,
    /// Which fork.
    pub fork: Fork,
}

/// What names the directories of a running version within tablespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TablespaceVersion {
    /// The server's major version.
    pub postgres_major: u32,
    /// `CATALOG_VERSION_NO`, from the control file.
    pub catalog_version: u32,
}

impl Fork {
    /// All forks, in order.
    pub const ALL: [Self; 4] = [Self::Main, Self::FreeSpaceMap, Self::VisibilityMap, Self::Init];

    /// PostgreSQL's number of the fork.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The fork of that number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Main),
            1 => Some(Self::FreeSpaceMap),
            2 => Some(Self::VisibilityMap),
            3 => Some(Self::Init),
            _ => None,
        }
    }

    /// What follows the number in the names of its files.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Main => "",
            Self::FreeSpaceMap => "_fsm",
            Self::VisibilityMap => "_vm",
            Self::Init => "_init",
        }
    }

    /// The fork of a suffix that is not empty.
    pub(crate) fn from_suffix(suffix: &[u8]) -> Option<Self> {
        [Self::FreeSpaceMap, Self::VisibilityMap, Self::Init]
            .into_iter()
            .find(|fork| fork.suffix().as_bytes() == suffix)
    }
}

impl RelationFork {
    /// The directory that holds it.
    pub const fn directory(&self) -> DatabaseDirectory {
        DatabaseDirectory { tablespace: self.tablespace, database: self.database }
    }

    /// The path of its first file, relative to the data directory.
    pub fn to_path(&self, version: TablespaceVersion) -> PathBuf {
        self.segment_path(0, version)
    }

    /// The path of one of its files, relative to the data directory; `segment` counts from 0.
    pub fn segment_path(&self, segment: u32, version: TablespaceVersion) -> PathBuf {
        let mut path = self.directory().to_path(version);
        let suffix = self.fork.suffix();
        path.push(match segment {
            0 => format!("{}{suffix}", self.relation),
            _ => format!("{}{suffix}.{segment}", self.relation),
        });
        path
    }

    /// The fork that a file of a running version belongs to, and which file of it this is; `None` for any other path.
    pub fn from_path(relative: &Path, version: TablespaceVersion) -> Option<(Self, u32)> {
        let directory = DatabaseDirectory::from_path(relative.parent()?, version)?;
        let file = RelationFile::from_name(relative.file_name()?.as_bytes())?;
        let fork = Self {
            tablespace: directory.tablespace,
            database: directory.database,
            relation: file.number,
            fork: file.fork,
        };
        Some((fork, file.segment))
    }
}

impl DatabaseDirectory {
    /// Its path relative to the data directory.
    pub fn to_path(&self, version: TablespaceVersion) -> PathBuf {
        match self.tablespace {
            GLOBAL_TABLESPACE => PathBuf::from("global"),
            DEFAULT_TABLESPACE => PathBuf::from(format!("base/{}", self.database)),
            tablespace => {
                let within = tablespace_version_directory(version.postgres_major, version.catalog_version);
                PathBuf::from(format!("pg_tblspc/{tablespace}/{within}/{}", self.database))
            }
        }
    }

    /// The directory at a path; `None` if it holds no relations of a running version.
    pub fn from_path(relative: &Path, version: TablespaceVersion) -> Option<Self> {
        let named = |component| match component {
            Component::Normal(name) => Some(std::ffi::OsStr::as_bytes(name)),
            _ => None,
        };
        let names: Vec<&[u8]> = relative.components().map(named).collect::<Option<_>>()?;
        match names.as_slice() {
            [b"global"] => Some(Self { tablespace: GLOBAL_TABLESPACE, database: 0 }),
            [b"base", database] => Some(Self { tablespace: DEFAULT_TABLESPACE, database: number(database)? }),
            [b"pg_tblspc", tablespace, within, database] => {
                let running = tablespace_version_directory(version.postgres_major, version.catalog_version);
                let tablespace = number(tablespace)?;
                let own = !matches!(tablespace, DEFAULT_TABLESPACE | GLOBAL_TABLESPACE);
                (own && *within == running.as_bytes()).then_some(Self { tablespace, database: number(database)? })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: TablespaceVersion = TablespaceVersion { postgres_major: 15, catalog_version: 202_209_061 };

    #[track_caller]
    fn check(path: &str, expected: (u32, u32, u32, Fork, u32)) {
        let (tablespace, database, relation, fork, segment) = expected;
        let expected = RelationFork { tablespace, database, relation, fork };
        assert_eq!(RelationFork::from_path(Path::new(path), VERSION), Some((expected, segment)), "{path}");
        assert_eq!(expected.segment_path(segment, VERSION), Path::new(path));
    }

    #[test]
    fn both_ways() {
        check("global/1262", (1664, 0, 1262, Fork::Main, 0));
        check("global/1262_vm", (1664, 0, 1262, Fork::VisibilityMap, 0));
        check("base/5/16384", (1663, 5, 16384, Fork::Main, 0));
        check("base/5/16384.3", (1663, 5, 16384, Fork::Main, 3));
        check("base/5/16384_fsm.1", (1663, 5, 16384, Fork::FreeSpaceMap, 1));
        check("base/5/16384_init", (1663, 5, 16384, Fork::Init, 0));
        check("pg_tblspc/16500/PG_15_202209061/5/4294967295.2", (16500, 5, u32::MAX, Fork::Main, 2));
    }

    #[test]
    fn other_paths_are_no_forks() {
        for path in [
            "",
            "16384",
            "base/16384",
            "base/0/16384",
            "base/5/pg_filenode.map",
            "base/5/t3_16384",
            "base/5/016384",
            "base/5/16384.0",
            "base/5/16384_main",
            "global/pg_control",
            "global/5/1262",
            "pg_xact/0000",
            "pg_tblspc/16500/PG_14_202107181/5/16384",
            "pg_tblspc/1663/PG_15_202209061/5/16384",
            "pg_tblspc/16500/5/16384",
            "/base/5/16384",
            "base/../5/16384",
            "base/5/99999999999",
        ] {
            assert_eq!(RelationFork::from_path(Path::new(path), VERSION), None, "{path}");
        }
    }

    #[test]
    fn fork_numbers() {
        for fork in Fork::ALL {
            assert_eq!(Fork::from_number(fork.number()), Some(fork));
        }
        assert_eq!(Fork::from_number(4), None);
    }
}
