//! The set of what may have changed.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use roaring::RoaringBitmap;

use crate::relation::{DatabaseDirectory, Fork, RelationFork};

/// Memory that a fork takes besides its blocks, with what is lost around it, in bytes.
const FORK_BYTES: usize = 160;
/// The same of every 65,536 blocks of it.
const CONTAINER_BYTES: u64 = 64;
/// Memory of so many blocks if one bit each tells of them, in bytes.
const BITMAP_BYTES: u64 = 8192;

/// What a stretch of WAL did to the blocks of relations.
///
/// Of a file that is in the map under its fork, the blocks listed and all from the limit on must be read; of a file in a directory that was
/// reset, all; of a file that is not in the map, none, if the base has that file. A block at or behind the end of the base's own copy must always
/// be read: relations grow by pages of zeros that no record tells of.
///
/// Main and init forks only. Free space maps and visibility maps are changed without WAL that names their blocks, so they are always read
/// whole. What is known by a limit or by a reset is not listed again: two maps that mean the same are equal, in whatever order they were
/// made.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChangeMap {
    resets: BTreeSet<DatabaseDirectory>,
    forks: BTreeMap<RelationFork, ForkChanges>,
}

/// What happened to one fork; never nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ForkChanges {
    /// Blocks from this one on were cut off or never were: nothing of the base may be used there, whatever they hold now.
    limit_block: Option<u32>,
    /// Blocks that records refer to, all below the limit.
    blocks: RoaringBitmap,
}

/// Whether maps tell of a fork: of the others nothing is known, they are read whole.
pub(crate) const fn is_mapped(fork: Fork) -> bool {
    matches!(fork, Fork::Main | Fork::Init)
}

impl ChangeMap {
    /// A map of no changes.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.forks.is_empty() && self.resets.is_empty()
    }

    /// Adds what another stretch of WAL did. The order of stretches does not matter.
    pub fn union(&mut self, other: &Self) {
        for directory in &other.resets {
            self.reset(*directory);
        }
        for (fork, changes) in &other.forks {
            if self.is_reset(fork.directory()) {
                continue;
            }
            match self.forks.entry(*fork) {
                Entry::Vacant(entry) => drop(entry.insert(changes.clone())),
                Entry::Occupied(mut entry) => entry.get_mut().union(changes),
            }
        }
    }

    /// Notes that a record refers to a block. References to forks that are not mapped are left out.
    pub fn mark(&mut self, fork: RelationFork, block: u32) {
        if is_mapped(fork.fork) && !self.is_reset(fork.directory()) {
            let changes = self.forks.entry(fork).or_default();
            if changes.limit_block.is_none_or(|limit| block < limit) {
                changes.blocks.insert(block);
            }
        }
    }

    /// Notes that records refer to these blocks.
    pub fn mark_all(&mut self, fork: RelationFork, blocks: &RoaringBitmap) {
        if is_mapped(fork.fork) && !blocks.is_empty() && !self.is_reset(fork.directory()) {
            let other = ForkChanges { limit_block: None, blocks: blocks.clone() };
            self.forks.entry(fork).or_default().union(&other);
        }
    }

    /// Notes that a fork was cut off before this block: 0 for one that was made or dropped.
    pub fn cut(&mut self, fork: RelationFork, limit_block: u32) {
        if is_mapped(fork.fork) && !self.is_reset(fork.directory()) {
            self.forks.entry(fork).or_default().cut(limit_block);
        }
    }

    /// Notes that a database's share of a tablespace was made or dropped as a whole.
    pub fn reset(&mut self, directory: DatabaseDirectory) {
        if self.resets.insert(directory) {
            self.forks.retain(|fork, _| fork.directory() != directory);
        }
    }

    /// The forks that changed, in order; none of a directory that was reset.
    pub fn forks(&self) -> impl ExactSizeIterator<Item = (&RelationFork, &ForkChanges)> {
        self.forks.iter()
    }

    /// What happened to a fork; also ask [`ChangeMap::is_reset`].
    pub fn fork(&self, fork: &RelationFork) -> Option<&ForkChanges> {
        self.forks.get(fork)
    }

    /// The directories that were made or dropped as a whole, in order.
    pub fn resets(&self) -> impl ExactSizeIterator<Item = &DatabaseDirectory> {
        self.resets.iter()
    }

    /// Whether nothing in this directory may be taken from the base.
    pub fn is_reset(&self, directory: DatabaseDirectory) -> bool {
        self.resets.contains(&directory)
    }

    /// Whether a block of a fork may differ from the base, as far as WAL tells.
    pub fn touches(&self, fork: &RelationFork, block: u32) -> bool {
        self.is_reset(fork.directory()) || self.forks.get(fork).is_some_and(|changes| changes.touches(block))
    }

    /// About how many bytes of memory it takes.
    pub fn memory_bytes(&self) -> usize {
        self.forks.values().map(|changes| FORK_BYTES + changes.memory_bytes()).sum()
    }

    /// Blocks listed in all forks.
    pub fn block_count(&self) -> u64 {
        self.forks.values().map(|changes| changes.blocks.len()).sum()
    }

    /// Puts changes in that were gathered or read elsewhere; left out if they say nothing or a reset says more.
    pub(super) fn put(&mut self, fork: RelationFork, changes: ForkChanges) {
        let something = changes.limit_block.is_some() || !changes.blocks.is_empty();
        if something && !self.is_reset(fork.directory()) {
            self.forks.insert(fork, changes);
        }
    }
}

impl ForkChanges {
    pub(super) fn new(limit_block: Option<u32>, mut blocks: RoaringBitmap) -> Self {
        if let Some(limit) = limit_block {
            blocks.remove_range(limit..);
        }
        Self { limit_block, blocks }
    }

    /// Blocks from this one on were cut off or never were: nothing of the base may be used there.
    pub const fn limit_block(&self) -> Option<u32> {
        self.limit_block
    }

    /// Blocks below the limit that records refer to.
    pub const fn blocks(&self) -> &RoaringBitmap {
        &self.blocks
    }

    /// Whether a block may differ from the base.
    pub fn touches(&self, block: u32) -> bool {
        self.limit_block.is_some_and(|limit| block >= limit) || self.blocks.contains(block)
    }

    fn memory_bytes(&self) -> usize {
        let told = self.blocks.statistics();
        let bitmaps = u64::from(told.n_bitset_containers) * BITMAP_BYTES;
        // Of arrays it says two bytes more than each number takes.
        let lists = told.n_bytes_array_containers / 2 + told.n_bytes_run_containers;
        let around = u64::from(told.n_containers) * CONTAINER_BYTES;
        usize::try_from(bitmaps + lists + around).unwrap_or(usize::MAX)
    }

    fn cut(&mut self, limit_block: u32) {
        let limit = self.limit_block.map_or(limit_block, |limit| limit.min(limit_block));
        self.blocks.remove_range(limit..);
        self.limit_block = Some(limit);
    }

    fn union(&mut self, other: &Self) {
        self.blocks |= &other.blocks;
        if let Some(limit) = other.limit_block.or(self.limit_block) {
            self.cut(limit);
        }
    }
}
