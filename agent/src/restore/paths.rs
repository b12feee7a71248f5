//! The paths of a backup's files as a set on disk, so that a directory that is there can be compared with ten million of
//! them without holding one.
//!
//! A table of 64-bit hashes, at most half full, in a file without a name; probed one slot after the other. Hashes are keyed
//! anew each time, so nobody can choose a path that hits another's. By chance a path that is not in the set is taken for
//! one that is once in 10^11 times among ten million files; such a stray file stays where it is, and does no harm.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of one slot.
const SLOT_BYTES: u64 = 8;
/// Fewest slots.
const SLOTS_MIN: u64 = 1024;

/// Paths below a data directory.
#[derive(Debug)]
pub(super) struct PathSet {
    table: File,
    slots: u64,
    held: u64,
    hashes: RandomState,
}

impl PathSet {
    /// An empty set for so many paths. It takes up to 32 bytes a path in `scratch`.
    pub(super) fn create_in(scratch: &Path, paths: u64) -> io::Result<Self> {
        let too_many =
            || io::Error::new(io::ErrorKind::InvalidInput, "the root counts more files than a disk can hold");
        let slots = paths.checked_mul(2).and_then(u64::checked_next_power_of_two).ok_or_else(too_many)?.max(SLOTS_MIN);
        let table = tempfile::tempfile_in(scratch)?;
        table.set_len(slots.checked_mul(SLOT_BYTES).ok_or_else(too_many)?)?;
        Ok(Self { table, slots, held: 0, hashes: RandomState::new() })
    }

    /// Adds a path.
    ///
    /// # Errors
    /// When the disk fails, or when there are more paths than was said.
    pub(super) fn insert(&mut self, path: &Path) -> io::Result<()> {
        let hash = self.hash(path);
        let Some(slot) = self.find(hash)? else { return Ok(()) };
        if self.held >= self.slots / 2 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the manifest has more files than the root says"));
        }
        self.held += 1;
        self.table.write_all_at(&hash.to_le_bytes(), slot * SLOT_BYTES)
    }

    /// Whether a path was added.
    pub(super) fn contains(&self, path: &Path) -> io::Result<bool> {
        Ok(self.find(self.hash(path))?.is_none())
    }

    /// 0 is an empty slot.
    fn hash(&self, path: &Path) -> u64 {
        self.hashes.hash_one(path).max(1)
    }

    /// The free slot where a hash belongs; none if it is there.
    fn find(&self, hash: u64) -> io::Result<Option<u64>> {
        let mut slot = hash % self.slots;
        loop {
            let mut found = [0; SLOT_BYTES as usize];
            self.table.read_exact_at(&mut found, slot * SLOT_BYTES)?;
            match u64::from_le_bytes(found) {
                0 => return Ok(Some(slot)),
                there if there == hash => return Ok(None),
                // It is at most half full, so an empty slot comes.
                _ => slot = (slot + 1) % self.slots,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn what_was_added_is_there_and_nothing_else() {
        let mut set = PathSet::create_in(&std::env::temp_dir(), 3000).unwrap();
        let path = |number: u32| PathBuf::from(format!("base/5/{number}"));
        for number in 0..3000 {
            set.insert(&path(number)).unwrap();
        }
        set.insert(&path(7)).unwrap();
        for number in 0..3000 {
            assert!(set.contains(&path(number)).unwrap(), "{number}");
            assert!(!set.contains(&path(number + 3000)).unwrap(), "{number}");
        }
    }

    #[test]
    fn more_paths_than_were_announced_are_refused() {
        let mut set = PathSet::create_in(&std::env::temp_dir(), 0).unwrap();
        let added = (0..SLOTS_MIN).map(|number| set.insert(Path::new(&format!("f{number}"))));
        assert_eq!(added.filter(Result::is_ok).count() as u64, SLOTS_MIN / 2);
        assert!(PathSet::create_in(&std::env::temp_dir(), u64::MAX).is_err());
    }
}
