//! PURE: what of each file is read, given how it is found what changed since the parent.
//!
//! Four ways, in order of preference; which one is taken, and why, is decided in [`source`]:
//! * **change maps**: WAL from the parent's start to ours names every block it touched. Only those are read;
//! * **WAL summaries** of PostgreSQL 17 and later tell the same, where archived WAL has a gap ([`summaries`]);
//! * **page LSN**: every page is read, and taken if WAL touched it since the parent's start, as its LSN tells. Only
//!   where every change of a page sets its LSN: with data checksums or `wal_log_hints`, since the parent's start. Without
//!   them `PD_ALL_VISIBLE` is set under the old LSN, and a page without the flag beside a visibility map that has it makes
//!   index-only scans wrong;
//! * **full copy**.
//!
//! Whatever the way: only main forks of relations inherit. Free space and visibility maps change without WAL that names
//! their blocks, other files have no pages. What the parent does not have, and blocks at or beyond its length, are read.
//! A change of hint bits alone may be missed: they are hints.

pub mod source;
pub mod summaries;
pub mod wal;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use postgres_format::Lsn;
use postgres_format::data_directory::FileKind;
use postgres_format::relation::{Fork, RelationFork, TablespaceVersion};
use postgres_format::wal_changes::{ChangeMap, ForkChanges};
use repository::backup::manifest::{File, FileKind as ManifestKind};
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use super::listing::ListedFile;
use super::rebase;

/// A file of which more than this many hundredths of the pages changed is copied whole.
pub const WHOLE_ABOVE_PERCENT: u64 = 90;

/// Sizes by which pages and files of relations are counted, and the directory names of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes in a page.
    pub page_bytes: u64,
    /// Pages in a full file of a relation.
    pub segment_blocks: u32,
    /// Names directories within tablespaces.
    pub version: TablespaceVersion,
}

/// What changed since the parent.
#[derive(Debug)]
pub enum Changes {
    /// All that WAL touched, as our maps or the server's summaries tell.
    Maps(ChangeMap),
    /// What has an LSN at or above the parent's start.
    PageLsn {
        /// The parent's start.
        since: Lsn,
        /// Directories of databases that were made since, perhaps by copying files, with pages that keep their old LSNs.
        made_since: HashSet<PathBuf>,
    },
}

/// Memory for all change maps of one backup, in bytes: 1 % of the pages of 32 TB at random.
const MAP_BYTES_MAX: usize = 96 << 20;

/// How much memory change maps may still take.
#[derive(Clone, Copy, Debug)]
pub struct MapBytes(usize);

impl Default for MapBytes {
    fn default() -> Self {
        Self(MAP_BYTES_MAX)
    }
}

impl MapBytes {
    /// Whether a map that is still growing fits.
    ///
    /// # Errors
    /// That it does not; a line for people.
    pub fn admit(self, map: &ChangeMap) -> Result<(), String> {
        let fits = map.memory_bytes() <= self.0;
        let (forks, blocks) = (map.forks().len(), map.block_count());
        fits.then_some(())
            .ok_or_else(|| format!("{blocks} blocks of {forks} relations changed, more than are remembered"))
    }

    /// Counts a map that stays.
    pub fn take(&mut self, map: &ChangeMap) {
        self.0 = self.0.saturating_sub(map.memory_bytes());
    }
}

/// What of a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Take {
    /// All of it; nothing is inherited.
    Whole,
    /// Nothing: the parent has all of it.
    Nothing,
    /// The blocks that the maps name below `inherited_blocks`, and all from there on.
    Listed {
        /// Blocks below this one may be inherited.
        inherited_blocks: u32,
    },
    /// Every page; taken are those with a new LSN, and all from `inherited_blocks` on.
    Newer {
        /// Blocks below this one may be inherited.
        inherited_blocks: u32,
    },
}

/// The fork and the first block of a file of a relation's main fork; `None` for any other file.
pub fn main_fork(file: &ListedFile, geometry: &Geometry) -> Option<(RelationFork, u32)> {
    let FileKind::Relation(_) = file.kind else { return None };
    let (fork, segment) = RelationFork::from_path(&file.path, geometry.version)?;
    (fork.fork == Fork::Main).then(|| (fork, segment.wrapping_mul(geometry.segment_blocks)))
}

impl Changes {
    /// What of a file is read that the parent describes so, if it has it.
    pub fn take(&self, file: &ListedFile, parent: Option<&File>, geometry: &Geometry) -> Take {
        let Some((fork, first)) = main_fork(file, geometry) else { return Take::Whole };
        let Some(parent) = parent.filter(|parent| parent.kind == ManifestKind::Relation) else { return Take::Whole };
        let (Some(blocks), Some(parents)) = (blocks(file.size, geometry), blocks(parent.size, geometry)) else {
            return Take::Whole;
        };
        if blocks == 0 || rebase::due(&parent.layers).is_some() {
            return Take::Whole;
        }
        match self {
            Self::Maps(map) => listed(map, &fork, first, blocks, parents),
            Self::PageLsn { made_since, .. } => {
                let copied = file.path.parent().is_some_and(|directory| made_since.contains(directory));
                if copied { Take::Whole } else { Take::Newer { inherited_blocks: parents.min(blocks) } }
            }
        }
    }

    /// Blocks within a file of a relation that the maps name, of those that such a take inherits.
    pub fn listed(&self, file: &ListedFile, geometry: &Geometry, take: Take) -> RoaringBitmap {
        let (Self::Maps(map), Take::Listed { inherited_blocks }) = (self, take) else { return RoaringBitmap::new() };
        let Some((fork, first)) = main_fork(file, geometry) else { return RoaringBitmap::new() };
        let Some(changes) = map.fork(&fork) else { return RoaringBitmap::new() };
        let range = first..first.saturating_add(inherited_blocks);
        changes.blocks().range(range).map(|block| block - first).collect()
    }

    /// The LSN from which on a page counts as changed; none where pages are listed.
    pub fn since(&self) -> Option<Lsn> {
        match self {
            Self::PageLsn { since, .. } => Some(*since),
            Self::Maps(_) => None,
        }
    }
}

/// Whole pages of a file; `None` if it has others, or more than fit.
fn blocks(size: u64, geometry: &Geometry) -> Option<u32> {
    let blocks = u32::try_from(size / geometry.page_bytes).ok()?;
    (size.is_multiple_of(geometry.page_bytes) && blocks <= geometry.segment_blocks).then_some(blocks)
}

/// By the maps: a file that begins at block `first` of its fork, has `blocks` blocks, and `parents` in the parent.
fn listed(map: &ChangeMap, fork: &RelationFork, first: u32, blocks: u32, parents: u32) -> Take {
    if map.is_reset(fork.directory()) {
        return Take::Whole;
    }
    let changes = map.fork(fork);
    let limit = changes.and_then(ForkChanges::limit_block).map_or(u32::MAX, |limit| limit.saturating_sub(first));
    let inherited_blocks = parents.min(limit).min(blocks);
    if inherited_blocks == 0 {
        return Take::Whole;
    }
    let range = first..first.saturating_add(inherited_blocks);
    let touched = changes.map_or(0, |changes| changes.blocks().range_cardinality(range));
    let taken = touched + u64::from(blocks - inherited_blocks);
    match taken {
        0 => Take::Nothing,
        taken if mostly(taken, blocks.into()) => Take::Whole,
        _ => Take::Listed { inherited_blocks },
    }
}

/// Whether so many of so many pages are better taken all.
pub fn mostly(taken: u64, all: u64) -> bool {
    taken.saturating_mul(100) > all.saturating_mul(WHOLE_ABOVE_PERCENT)
}

/// Directories of databases whose `PG_VERSION` was written at or after a moment. `CREATE DATABASE` writes one, and so does
/// whatever else makes such a directory.
pub fn made_since<E>(
    files: impl IntoIterator<Item = Result<ListedFile, E>>,
    since_unix: i64,
) -> Result<HashSet<PathBuf>, E> {
    let mut made = HashSet::new();
    for file in files {
        let file = file?;
        if file.kind == FileKind::VersionFile && file.modified_unix >= since_unix {
            made.extend(file.path.parent().map(Path::to_owned));
        }
    }
    Ok(made)
}

#[cfg(test)]
mod tests;
