//! Packs that manifests list, and what a walk found out about them.
//!
//! Of each some 30 bytes are in memory, however many there are: 32 TB that do not compress take 2 million packs. Size and digest
//! lie in a file without a name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Bound;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::extents::PackName;
use super::finding::Proof;
use crate::name::BackupId;

/// Length of a proof in the file: size and SHA-256.
const PROOF_BYTES: usize = 40;

#[derive(Debug, Clone, Copy)]
struct Known {
    /// Which proof of the file is its.
    place: u32,
    present: bool,
    /// It is told already to be wrong.
    told: bool,
}

/// Packs by the backup they belong to, and number.
#[derive(Debug)]
pub(super) struct Listed {
    packs: BTreeMap<BackupId, BTreeMap<u32, Known>>,
    proofs: File,
    count: u32,
}

impl Listed {
    /// None yet. The file lies in `scratch`.
    pub(super) fn create_in(scratch: &Path) -> io::Result<Self> {
        Ok(Self { packs: BTreeMap::new(), proofs: tempfile::tempfile_in(scratch)?, count: 0 })
    }

    /// Notes that a manifest lists a pack so. Gives how the first one did.
    pub(super) fn list(&mut self, (owner, number): PackName, proof: Proof) -> io::Result<Proof> {
        if let Some(known) = self.known((owner, number)) {
            return self.read(known.place);
        }
        let place = self.count;
        self.count = place.checked_add(1).ok_or_else(|| io::Error::other("more packs than can be counted"))?;
        self.packs.entry(owner).or_default().insert(number, Known { place, present: false, told: false });
        let mut bytes = [0; PROOF_BYTES];
        bytes[..8].copy_from_slice(&proof.size.to_le_bytes());
        bytes[8..].copy_from_slice(&proof.sha256);
        self.proofs.write_all_at(&bytes, u64::from(place) * PROOF_BYTES as u64)?;
        Ok(proof)
    }

    /// What a pack must be; none if no manifest lists it.
    pub(super) fn proof(&self, pack: PackName) -> io::Result<Option<Proof>> {
        self.known(pack).map(|known| self.read(known.place)).transpose()
    }

    fn read(&self, place: u32) -> io::Result<Proof> {
        let mut bytes = [0; PROOF_BYTES];
        self.proofs.read_exact_at(&mut bytes, u64::from(place) * PROOF_BYTES as u64)?;
        let (size, sha256) = bytes.split_at(8);
        let size = u64::from_le_bytes(size.try_into().expect("eight bytes"));
        Ok(Proof { size, sha256: sha256.try_into().expect("the other 32 bytes") })
    }

    fn known(&self, (owner, number): PackName) -> Option<&Known> {
        self.packs.get(&owner)?.get(&number)
    }

    fn known_mut(&mut self, (owner, number): PackName) -> Option<&mut Known> {
        self.packs.get_mut(&owner)?.get_mut(&number)
    }

    /// Notes that a pack is there, if it is listed.
    pub(super) fn see(&mut self, pack: PackName) {
        if let Some(known) = self.known_mut(pack) {
            known.present = true;
        }
    }

    /// Notes that a pack is wrong. Answers whether it is listed and that was not known before.
    pub(super) fn tell(&mut self, pack: PackName) -> bool {
        self.known_mut(pack).is_some_and(|known| !std::mem::replace(&mut known.told, true))
    }

    /// Whether a pack is known to be wrong.
    pub(super) fn is_told(&self, pack: PackName) -> bool {
        self.known(pack).is_some_and(|known| known.told)
    }

    /// Backups whose packs are listed.
    pub(super) fn owners(&self) -> Vec<BackupId> {
        self.packs.keys().copied().collect()
    }

    /// Numbers of those that were not seen.
    pub(super) fn absent(&self, owner: &BackupId) -> Vec<u32> {
        let packs = self.packs.get(owner).into_iter().flatten();
        packs.filter(|(_, known)| !known.present).map(|(number, _)| *number).collect()
    }

    /// Numbers of those that were seen, behind one, so many at most.
    pub(super) fn present_after(&self, owner: &BackupId, after: Option<u32>, most: usize) -> Vec<u32> {
        let Some(packs) = self.packs.get(owner) else { return Vec::new() };
        let rest = packs.range((after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded));
        rest.filter(|(_, known)| known.present).map(|(number, _)| *number).take(most).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_are_known_as_they_were_listed_first() {
        let id = |random| BackupId::new(jiff::Timestamp::UNIX_EPOCH, random);
        let proof = |byte| Proof { size: u64::from(byte) << 33, sha256: [byte; 32] };
        let mut listed = Listed::create_in(&std::env::temp_dir()).unwrap();
        for (owner, number, byte) in [(2, 7, 1), (1, 9, 2), (1, 0, 3), (1, 4, 4)] {
            assert_eq!(listed.list((id(owner), number), proof(byte)).unwrap(), proof(byte));
        }
        assert_eq!(listed.list((id(1), 9), proof(5)).unwrap(), proof(2));
        assert_eq!(listed.proof((id(1), 0)).unwrap(), Some(proof(3)));
        assert_eq!(listed.proof((id(1), 7)).unwrap(), None);
        for number in [0, 9, 11] {
            listed.see((id(1), number));
        }
        assert_eq!(listed.absent(&id(1)), [4]);
        assert_eq!(listed.present_after(&id(1), None, 1), [0]);
        assert_eq!(listed.present_after(&id(1), Some(0), 5), [9]);
        assert!(listed.present_after(&id(1), Some(9), 5).is_empty());
        assert!(listed.tell((id(2), 7)) && !listed.tell((id(2), 7)) && !listed.tell((id(2), 8)));
        assert!(listed.is_told((id(2), 7)) && !listed.is_told((id(1), 0)));
        assert_eq!(listed.owners(), [id(1), id(2)]);
    }
}
