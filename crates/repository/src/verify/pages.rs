//! Page checksums of what packs hold.
//!
//! Which pages a frame holds is told by the file's path; of each file of a backup only its place in the relation is kept, a
//! byte, and some more of files beyond the first 254 of their relation. A page that was changed while its backup ran may be torn: recovery writes it anew.

use std::collections::BTreeMap;

use postgres_format::Lsn;
use postgres_format::data_directory::{self, Entry};
use postgres_format::page::{self, Checksums, PageState};

use crate::backup::manifest::{File, FileKind, Head};
use crate::backup::pack::{FileNumber, Frame};

/// Of a file without pages.
const NO_PAGES: u8 = u8::MAX;
/// Of a file whose place in the relation is too far for a byte.
const FAR: u8 = u8::MAX - 1;

/// What is known of the files of one backup, by their numbers.
#[derive(Debug, Clone)]
pub(super) struct Files {
    segments: Vec<u8>,
    /// Places that are [`FAR`], by number of the file.
    far: BTreeMap<u32, u32>,
    block_size: u32,
    relation_segment_blocks: u32,
    checksums: Checksums,
    start: Lsn,
    /// Pages that the backup itself tells are corrupt.
    pub(super) told: u64,
}

impl Files {
    /// Nothing yet.
    pub(super) fn new(head: &Head) -> Self {
        Self {
            segments: Vec::new(),
            far: BTreeMap::new(),
            block_size: head.block_size,
            relation_segment_blocks: head.relation_segment_blocks,
            checksums: if head.checksum_version == 1 { Checksums::On } else { Checksums::Off },
            start: head.start_lsn,
            told: head.page_errors,
        }
    }

    /// Notes a file; they come in order of their numbers.
    pub(super) fn add(&mut self, file: &File) {
        let segment = match (file.kind, data_directory::classify(file.path.as_path(), false)) {
            (FileKind::Relation, Entry::Copy(data_directory::FileKind::Relation(relation))) => relation.segment,
            _ => return,
        };
        let number = file.number.0 as usize;
        if self.segments.len() <= number {
            self.segments.resize(number + 1, NO_PAGES);
        }
        self.segments[number] = u8::try_from(segment).unwrap_or(FAR).min(FAR);
        if self.segments[number] == FAR {
            self.far.insert(file.number.0, segment);
        }
    }

    /// Which file of its relation one is; none if it has no pages.
    fn segment(&self, file: FileNumber) -> Option<u32> {
        match self.segments.get(file.0 as usize)? {
            &NO_PAGES => None,
            &FAR => self.far.get(&file.0).copied(),
            near => Some(u32::from(*near)),
        }
    }

    /// How many pages of a frame are wrong, and the first of them, as block of its relation.
    pub(super) fn wrong_in(&self, frame: &Frame<'_>) -> (u64, Option<u32>) {
        let Some(segment) = self.segment(frame.file) else { return (0, None) };
        let size = self.block_size as usize;
        if size == 0 || !frame.offset.is_multiple_of(u64::from(self.block_size)) {
            return (0, None);
        }
        let (mut wrong, mut first) = (0, None);
        let begin = u32::try_from(frame.offset / u64::from(self.block_size)).unwrap_or(u32::MAX);
        for (index, bytes) in (0..).zip(frame.bytes.chunks(size)) {
            let block = page::block_number(segment, self.relation_segment_blocks, begin.wrapping_add(index));
            if let PageState::Suspect(_) = page::inspect(bytes, block, self.start, self.checksums) {
                wrong += 1;
                first.get_or_insert(block);
            }
        }
        (wrong, first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::byte_text::RelativePath;

    const PAGE: usize = 8192;

    fn page_of(block: u32) -> Vec<u8> {
        let mut bytes = vec![7; PAGE];
        bytes[..24].fill(0);
        bytes[12..14].copy_from_slice(&40u16.to_le_bytes());
        bytes[14..16].copy_from_slice(&8000u16.to_le_bytes());
        bytes[16..18].copy_from_slice(&8192u16.to_le_bytes());
        bytes[18..20].copy_from_slice(&8196u16.to_le_bytes());
        let sum = page::checksum(&bytes, block);
        bytes[8..10].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn pages_are_known_by_their_place_in_the_relation() {
        let mut files = Files {
            segments: Vec::new(),
            far: BTreeMap::new(),
            block_size: 8192,
            relation_segment_blocks: 131_072,
            checksums: Checksums::On,
            start: Lsn::new(100),
            told: 0,
        };
        let file = |number, path: &str, kind| File {
            number: FileNumber(number),
            path: RelativePath::new(path).unwrap(),
            kind,
            mode: 0o600,
            mtime: 0,
            size: 0,
            crc32c: None,
            layers: Vec::new(),
        };
        files.add(&file(2, "base/5/16384", FileKind::Relation));
        files.add(&file(3, "base/5/16384.2", FileKind::Relation));
        files.add(&file(4, "postgresql.conf", FileKind::Other));
        files.add(&file(5, "base/5/16384.253", FileKind::Relation));
        files.add(&file(6, "base/5/16384.254", FileKind::Relation));
        files.add(&file(7, "base/5/16384.300", FileKind::Relation));
        let check = |number, offset: u64, bytes: &[u8], expected| {
            let frame = Frame {
                file: FileNumber(number),
                offset,
                bytes,
                position: 8,
                first_unit: 0,
                unit_bytes: PAGE,
                sparse: false,
            };
            assert_eq!(files.wrong_in(&frame), expected, "file {number} at {offset}");
        };
        let two = [page_of(1), page_of(2)].concat();
        check(2, 8192, &two, (0, None));
        check(2, 0, &two, (2, Some(0)));
        check(3, 8192, &[page_of(262_145), page_of(1)].concat(), (1, Some(262_146)));
        check(4, 0, &two, (0, None));
        for (number, segment) in [(5, 253), (6, 254), (7, 300)] {
            let first = segment * 131_072;
            check(number, 0, &page_of(first), (0, None));
            check(number, 0, &page_of(1), (1, Some(first)));
        }
        check(9, 0, &two, (0, None));
        check(2, 8192, &vec![0; PAGE], (0, None));
        // One that was changed after the backup had begun may be torn.
        let mut torn = page_of(7);
        torn[4] = 200;
        check(2, 8192, &torn, (0, None));
    }
}
