//! Files of a manifest in groups: what is restored together, and all that is held of them meanwhile.
//!
//! A group is bounded by what its files take on the disk, so that what is read back of them was written a moment ago, and by
//! what its description takes in memory. A single file makes a group of its own if it is larger than that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use repository::backup::manifest::{File, Line, ManifestReader};
use repository::backup::pack::Extent;

use super::RestoreError;
use super::layout::{AgedPack, Ages, Layout, Wanted, shown};
use super::manifest::Manifest;
use crate::from_start::FromStart;

/// Size at which a group of files is full, in bytes.
const GROUP_BYTES: u64 = 512 << 20;
/// Size in memory at which it is, in bytes, about.
const GROUP_MEMORY_BYTES: usize = 6 << 20;
/// Memory that one allocation costs beside what it holds, in bytes, about.
const ALLOCATION_BYTES: usize = 16;
/// Marks a whole file's checksum as known; it is in the lower half.
const KNOWN: u64 = 1 << 32;

/// Files that are restored together.
#[derive(Debug)]
pub(super) struct Group {
    /// How many files of the manifest come before.
    pub(super) first: u64,
    pub(super) layout: Layout,
    /// Sizes of the packs that the files lie in, in bytes.
    pub(super) pack_bytes: BTreeMap<AgedPack, u64>,
    /// Checksum of each extent of a plain file that is written.
    slots: Vec<AtomicU32>,
    /// Checksum of each file that was read as a whole, with [`KNOWN`].
    whole: Vec<AtomicU64>,
}

impl Group {
    fn new(first: u64, layout: Layout, pack_bytes: BTreeMap<AgedPack, u64>) -> Self {
        let slots = (0..layout.slots).map(|_| AtomicU32::new(0)).collect();
        let whole = layout.files.iter().map(|_| AtomicU64::new(0)).collect();
        Self { first, layout, pack_bytes, slots, whole }
    }

    pub(super) fn file(&self, index: usize) -> &File {
        &self.layout.files[index]
    }

    pub(super) fn is_zeroed(&self, index: usize) -> bool {
        self.layout.zeroed.contains(&index)
    }

    /// Checksum of a whole file: as it was read, or from those of its extents.
    pub(super) fn checksum(&self, index: usize) -> u32 {
        let whole = self.whole[index].load(Ordering::Acquire);
        if whole & KNOWN != 0 {
            return whole as u32;
        }
        let extents = self.file(index).layers.iter().flat_map(|layer| &layer.extents);
        extents.zip(&self.slots[self.layout.first_slots[index]..]).fold(0, |whole, (extent, checksum)| {
            let length = usize::try_from(extent.to - extent.from).expect("an extent fits into memory's range");
            crc32c::crc32c_combine(whole, checksum.load(Ordering::Acquire), length)
        })
    }

    /// Keeps the checksum of a file that was read as a whole.
    pub(super) fn set_checksum(&self, index: usize, checksum: u32) {
        self.whole[index].store(KNOWN | u64::from(checksum), Ordering::Release);
    }

    /// Keeps the checksum of an extent.
    pub(super) fn set_slot(&self, slot: usize, checksum: u32) {
        self.slots[slot].store(checksum, Ordering::Release);
    }
}

/// Whether sizes of packs are of use: they tell where tables lie, which only comparing asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PackSizes {
    /// They are kept.
    Kept,
    /// They are not.
    LeftOut,
}

/// Reads one group after the other.
pub(super) struct Groups {
    manifest: Manifest,
    lines: ManifestReader<FromStart>,
    ages: Arc<Ages>,
    databases: Option<Arc<BTreeSet<u32>>>,
    sizes: PackSizes,
    /// Files before the next group.
    before: u64,
    ended: bool,
}

impl Groups {
    /// From the first file of a manifest on. With `databases` others are zeroed.
    pub(super) fn of(
        manifest: &Manifest,
        databases: Option<Arc<BTreeSet<u32>>>,
        sizes: PackSizes,
    ) -> Result<Self, RestoreError> {
        let lines = manifest.lines()?;
        let ages = Arc::new(Ages::of(lines.head()));
        Ok(Self { manifest: manifest.clone(), lines, ages, databases, sizes, before: 0, ended: false })
    }

    /// The backups that layers lie in.
    pub(super) fn ages(&self) -> Arc<Ages> {
        self.ages.clone()
    }

    /// The next group; none after the last one. Blocks.
    pub(super) fn next(&mut self) -> Result<Option<Group>, RestoreError> {
        let (mut files, mut bytes, mut memory) = (Vec::new(), 0_u64, 0);
        while !self.ended && bytes < GROUP_BYTES && memory < GROUP_MEMORY_BYTES {
            match self.lines.next() {
                Some(Ok(Line::File(mut file))) => {
                    shrink(&mut file);
                    bytes = bytes.saturating_add(file.size);
                    memory += memory_of(&file);
                    files.push(file);
                }
                Some(Ok(_)) => {}
                Some(Err(damage)) => return Err(self.manifest.damaged(damage)),
                None => self.ended = true,
            }
        }
        if files.is_empty() {
            return Ok(None);
        }
        files.shrink_to_fit();
        let pack_bytes = self.pack_bytes(&files);
        let first = self.before;
        self.before += files.len() as u64;
        Ok(Some(Group::new(first, Layout::new(files, self.databases.as_deref()), pack_bytes)))
    }

    fn pack_bytes(&self, files: &[File]) -> BTreeMap<AgedPack, u64> {
        let mut pack_bytes = BTreeMap::new();
        if self.sizes == PackSizes::LeftOut {
            return pack_bytes;
        }
        for (layer, extent) in files.iter().flat_map(shown) {
            let pack = AgedPack { age: self.ages.of_layer(layer), pack: extent.pack };
            let size = || self.lines.pack_bytes(self.ages.named(pack.age), pack.pack);
            pack_bytes
                .entry(pack)
                .or_insert_with(|| size().expect("a reader refuses files in packs that were not listed"));
        }
        pack_bytes
    }
}

/// What reading a line allocated and did not need.
fn shrink(file: &mut File) {
    file.layers.iter_mut().for_each(|layer| layer.extents.shrink_to_fit());
    file.layers.shrink_to_fit();
}

/// What a file takes in memory while it is restored, in bytes, about.
fn memory_of(file: &File) -> usize {
    let extents: usize = file.layers.iter().map(|layer| layer.extents.len()).sum();
    let lists = size_of_val(file.layers.as_slice()) + extents * size_of::<Extent>();
    let wanted = extents * (size_of::<Wanted>() + size_of::<u32>());
    let allocations = (2 + file.layers.len()) * ALLOCATION_BYTES;
    size_of::<File>() + file.path.as_bytes().len() + lists + wanted + allocations + size_of::<u64>() * 2
}
