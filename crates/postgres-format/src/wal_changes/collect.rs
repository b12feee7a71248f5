//! Gathers what records say, quickly: most references are to a relation that was referred to just before.

use std::collections::{BTreeSet, HashMap};

use roaring::RoaringBitmap;

use super::FORKS_MAX;
use super::map::{ChangeMap, ForkChanges, is_mapped};
use crate::relation::{DatabaseDirectory, RelationFork};

/// Relations that are found without a search; a power of two.
const RECENT: usize = 64;
/// No block.
const NONE: u32 = u32::MAX;

/// A map in the making.
#[derive(Debug)]
pub(super) struct Collector {
    entries: Vec<Entry>,
    places: HashMap<RelationFork, u32>,
    /// Places in `entries` by a hash of the fork; a wrong one is found out by comparing.
    recent: Box<[u32; RECENT]>,
    resets: BTreeSet<DatabaseDirectory>,
    /// More forks than a map may have were met: it is worth nothing.
    overflowed: bool,
}

#[derive(Debug)]
struct Entry {
    fork: RelationFork,
    /// [`NONE`] if it was not cut.
    limit: u32,
    /// The block of the last reference: often also that of the next.
    last: u32,
    blocks: RoaringBitmap,
}

impl Collector {
    pub(super) fn new() -> Self {
        Self {
            entries: Vec::new(),
            places: HashMap::new(),
            recent: Box::new([0; RECENT]),
            resets: BTreeSet::new(),
            overflowed: false,
        }
    }

    /// Notes that a record refers to a block, which is not [`NONE`].
    #[inline(always)]
    pub(super) fn mark(&mut self, fork: RelationFork, block: u32) {
        if !is_mapped(fork.fork) {
            return;
        }
        let place = self.recent[slot(&fork)] as usize;
        match self.entries.get_mut(place) {
            Some(entry) if entry.fork == fork => entry.mark(block),
            _ => {
                if let Some(entry) = self.find(fork) {
                    entry.mark(block);
                }
            }
        }
    }

    /// Notes that a fork was cut off before this block.
    pub(super) fn cut(&mut self, fork: RelationFork, limit_block: u32) {
        if !is_mapped(fork.fork) {
            return;
        }
        if let Some(entry) = self.find(fork)
            && limit_block < entry.limit
        {
            entry.limit = limit_block;
            entry.blocks.remove_range(limit_block..);
            entry.last = NONE;
        }
    }

    /// Notes that a database's share of a tablespace was made or dropped as a whole.
    pub(super) fn reset(&mut self, directory: DatabaseDirectory) {
        self.overflowed |= self.resets.len() >= FORKS_MAX;
        if self.overflowed || !self.resets.insert(directory) {
            return;
        }
        for entry in self.entries.iter_mut().filter(|entry| entry.fork.directory() == directory) {
            entry.limit = 0;
            entry.blocks.clear();
        }
    }

    /// Whether there was more than fits.
    pub(super) const fn overflowed(&self) -> bool {
        self.overflowed
    }

    #[cold]
    fn find(&mut self, fork: RelationFork) -> Option<&mut Entry> {
        let new = self.entries.len();
        let place = match self.places.get(&fork) {
            Some(place) => *place as usize,
            None if new >= FORKS_MAX => {
                self.overflowed = true;
                return None;
            }
            None => {
                let limit = if self.resets.contains(&fork.directory()) { 0 } else { NONE };
                self.entries.push(Entry { fork, limit, last: NONE, blocks: RoaringBitmap::new() });
                self.places.insert(fork, new as u32);
                new
            }
        };
        self.recent[slot(&fork)] = place as u32;
        self.entries.get_mut(place)
    }

    /// What was gathered.
    pub(super) fn into_map(self) -> ChangeMap {
        let mut map = ChangeMap::empty();
        for directory in self.resets {
            map.reset(directory);
        }
        for entry in self.entries {
            let limit = (entry.limit != NONE).then_some(entry.limit);
            map.put(entry.fork, ForkChanges::new(limit, entry.blocks));
        }
        map
    }
}

impl Entry {
    #[inline(always)]
    fn mark(&mut self, block: u32) {
        if block != self.last && block < self.limit {
            self.last = block;
            self.blocks.insert(block);
        }
    }
}

/// Spreads relations that are numbered in a row over all slots.
#[inline(always)]
fn slot(fork: &RelationFork) -> usize {
    let mixed = fork.relation ^ fork.database.rotate_left(8) ^ fork.tablespace.rotate_left(16);
    let mixed = mixed ^ (u32::from(fork.fork.number()) << 5);
    (mixed.wrapping_mul(0x9E37_79B1) >> 26) as usize & (RECENT - 1)
}
