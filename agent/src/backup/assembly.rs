//! From what the readers did with pieces to what the backup says about files. Pure, but that both lie on disk
//! ([`super::rows`]): files are put together one by one, in order.
//!
//! A file read in several pieces is whole only up to the first piece that ended early: what lies behind was cut off after
//! the start of the backup, and WAL replay cuts it off again. A file of which any piece found nothing is left out. A file
//! of which nothing was to be read is as it was in the parent, up to the size that was listed.

use std::io;
use std::path::Path;

use repository::backup::pack::Extent;
use serde::{Deserialize, Serialize};

use super::changes::Take;
use super::pages::PageFindings;
use super::plan::Planned;
use super::rows::{Merge, Runs, Sorted};

/// What became of one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PieceResult {
    /// Number of the file.
    pub file: u32,
    /// First byte of the piece.
    pub from: u64,
    /// How it ended.
    pub end: PieceEnd,
    /// What was found in its pages.
    pub pages: PageFindings,
}

/// How a piece ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PieceEnd {
    /// The file was not there.
    Vanished,
    /// It was read, as far as there was something to read.
    Copied {
        /// How far.
        reach: Reach,
        /// CRC-32C of all its bytes; none if only some were read.
        crc32c: Option<u32>,
        /// What the file system said when it was opened, if that is newer than the listing.
        metadata: Option<PieceMetadata>,
    },
}

/// How far a piece went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reach {
    /// To its end.
    All {
        /// Bytes of the file that it stands for.
        bytes: u64,
    },
    /// To where the file ended, before the planned end.
    Short {
        /// Bytes of the file that it stands for.
        bytes: u64,
    },
}

/// Attributes of a file when it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceMetadata {
    /// Permission bits.
    pub mode: u32,
    /// Modification time, Unix seconds.
    pub modified_unix: i64,
}

impl PieceResult {
    pub(super) fn vanished(file: u32, from: u64) -> Self {
        Self { file, from, end: PieceEnd::Vanished, pages: PageFindings::default() }
    }
}

/// A file as it is in the backup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopiedFile {
    /// Number of the file.
    pub file: u32,
    /// Its size in the backup.
    pub size: u64,
    /// CRC-32C of all its bytes; none if not all were read.
    pub crc32c: Option<u32>,
    /// Attributes, if newer than the listing's.
    pub metadata: Option<PieceMetadata>,
    /// Where the bytes lie that this backup holds itself, in file order.
    pub extents: Vec<Extent>,
    /// What was found in its pages.
    pub pages: PageFindings,
}

/// By file and first byte.
type At = (u32, u64);

/// What became of pieces, in any order.
#[derive(Debug)]
pub struct Results {
    runs: Runs<At, (PieceEnd, PageFindings)>,
}

impl Results {
    /// None yet, in an unnamed file of a directory.
    pub fn create_in(scratch: &Path) -> io::Result<Self> {
        Ok(Self { runs: Runs::create_in(scratch)? })
    }

    /// Adds one.
    pub fn push(&mut self, result: PieceResult) -> io::Result<()> {
        let PieceResult { file, from, end, pages } = result;
        let held_bytes = pages.held_bytes();
        self.runs.push((file, from), (end, pages), held_bytes)
    }
}

/// Where the bytes of files lie, in any order.
#[derive(Debug)]
pub struct Extents {
    runs: Runs<At, Extent>,
}

impl Extents {
    /// None yet, in an unnamed file of a directory.
    pub fn create_in(scratch: &Path) -> io::Result<Self> {
        Ok(Self { runs: Runs::create_in(scratch)? })
    }

    /// Adds one.
    pub fn push(&mut self, file: u32, extent: Extent) -> io::Result<()> {
        self.runs.push((file, extent.from), extent, 0)
    }
}

/// All that is known of the files that were copied, to be joined with those that were planned.
#[derive(Debug)]
pub struct Home {
    results: Sorted<At, (PieceEnd, PageFindings)>,
    extents: Sorted<At, Extent>,
}

impl Home {
    /// Once the last piece is read.
    pub fn new(results: Results, extents: Extents) -> io::Result<Self> {
        Ok(Self { results: results.runs.finish()?, extents: extents.runs.finish()? })
    }

    /// Joins pieces to files, and gives each its extents. `planned` come in order of their numbers; files that are gone are
    /// missing from what comes out.
    pub fn join<I>(&self, planned: I) -> io::Result<Joined<I>>
    where
        I: Iterator<Item = io::Result<Planned>>,
    {
        Ok(Joined { planned, results: self.results.iter()?, extents: self.extents.iter()? })
    }
}

/// One passage through all files that are in the backup.
#[derive(Debug)]
pub struct Joined<I> {
    planned: I,
    results: Merge<At, (PieceEnd, PageFindings)>,
    extents: Merge<At, Extent>,
}

impl<I: Iterator<Item = io::Result<Planned>>> Joined<I> {
    fn join(&mut self, planned: &Planned) -> io::Result<Option<CopiedFile>> {
        let number = planned.number;
        let mut pieces = Vec::new();
        while self.results.key().is_some_and(|(file, _)| *file == number) {
            let Some(((file, from), (end, pages))) = self.results.next().transpose()? else { break };
            pieces.push(PieceResult { file, from, end, pages });
        }
        let mut extents = Vec::new();
        while self.extents.key().is_some_and(|(file, _)| *file == number) {
            extents.extend(self.extents.next().transpose()?.map(|(_, extent)| extent));
        }
        if pieces.is_empty() && planned.take == Take::Nothing {
            return Ok(Some(CopiedFile { file: number, size: planned.listed.size, ..CopiedFile::default() }));
        }
        let joined = join_pieces(&pieces);
        Ok(joined.map(|file| {
            extents.retain(|extent| extent.from < file.size);
            CopiedFile { extents, ..file }
        }))
    }
}

impl<I: Iterator<Item = io::Result<Planned>>> Iterator for Joined<I> {
    type Item = io::Result<(Planned, CopiedFile)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let joined = match self.planned.next()? {
                Ok(planned) => self.join(&planned).map(|joined| joined.map(|file| (planned, file))),
                Err(error) => Err(error),
            };
            if let Some(joined) = joined.transpose() {
                return Some(joined);
            }
        }
    }
}

fn join_pieces(pieces: &[PieceResult]) -> Option<CopiedFile> {
    if pieces.iter().any(|piece| piece.end == PieceEnd::Vanished) {
        return None;
    }
    let mut file = CopiedFile { file: pieces.first()?.file, crc32c: Some(0), ..CopiedFile::default() };
    for piece in pieces {
        let PieceEnd::Copied { reach, crc32c, metadata } = piece.end else { continue };
        let (Reach::All { bytes } | Reach::Short { bytes }) = reach;
        file.crc32c = file.crc32c.zip(crc32c).map(|(before, piece)| match file.size {
            0 => piece,
            _ => crc32c::crc32c_combine(before, piece, usize::try_from(bytes).unwrap_or(usize::MAX)),
        });
        file.size += bytes;
        file.metadata = metadata;
        file.pages.merge(&piece.pages);
        if matches!(reach, Reach::Short { .. }) {
            break;
        }
    }
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::plan::tests::planned;

    fn piece(file: u32, from: u64, bytes: &[u8]) -> PieceResult {
        ended(file, from, Reach::All { bytes: bytes.len() as u64 }, Some(crc32c::crc32c(bytes)))
    }

    fn ended(file: u32, from: u64, reach: Reach, crc32c: Option<u32>) -> PieceResult {
        let end = PieceEnd::Copied { reach, crc32c, metadata: None };
        PieceResult { file, from, end, pages: PageFindings::default() }
    }

    fn extents(ranges: &[(u32, u64, u64)]) -> Vec<(u32, Extent)> {
        let extent = |from, to| Extent { pack: 0, offset: 8, length: 1, from, to, pages: None };
        ranges.iter().map(|(file, from, to)| (*file, extent(*from, *to))).collect()
    }

    /// Joins what became of four files, of which some were not to be read.
    fn join(results: Vec<PieceResult>, extents: Vec<(u32, Extent)>, untouched: &[u32]) -> Vec<CopiedFile> {
        let scratch = tempfile::tempdir().unwrap();
        let (mut all, mut at) =
            (Results::create_in(scratch.path()).unwrap(), Extents::create_in(scratch.path()).unwrap());
        results.into_iter().for_each(|result| all.push(result).unwrap());
        extents.into_iter().for_each(|(file, extent)| at.push(file, extent).unwrap());
        let plan = planned(&[("base/5/1", 16384), ("base/5/2", 8192), ("base/5/3", 8192), ("base/5/4", 1)]);
        let planned = plan.files().map(|planned| {
            let planned = planned?;
            let take = if untouched.contains(&planned.number) { Take::Nothing } else { Take::Whole };
            Ok(Planned { take, ..planned })
        });
        let home = Home::new(all, at).unwrap();
        home.join(planned).unwrap().map(|joined| joined.unwrap().1).collect()
    }

    #[test]
    fn pieces_in_any_order_give_the_checksum_of_the_whole() {
        let results = vec![piece(1, 4, b"efgh"), piece(0, 0, b""), piece(1, 8, b"ij"), piece(1, 0, b"abcd")];
        let files = join(results, extents(&[(1, 8, 10), (1, 0, 8)]), &[]);
        assert_eq!(files.len(), 2);
        assert_eq!((files[0].size, files[0].crc32c), (0, Some(0)));
        assert_eq!((files[1].size, files[1].crc32c), (10, Some(crc32c::crc32c(b"abcdefghij"))));
        assert_eq!(files[1].extents.iter().map(|extent| extent.from).collect::<Vec<_>>(), [0, 8]);
    }

    #[test]
    fn a_file_that_shrank_ends_at_its_first_short_piece() {
        let short = ended(0, 0, Reach::Short { bytes: 2 }, Some(crc32c::crc32c(b"ab")));
        let files = join(vec![short, piece(0, 4, b"efgh")], extents(&[(0, 0, 2), (0, 4, 8)]), &[]);
        assert_eq!((files[0].size, files[0].extents.len()), (2, 1));
        assert_eq!(files[0].crc32c, Some(crc32c::crc32c(b"ab")));
    }

    #[test]
    fn a_file_read_in_part_has_no_checksum_and_one_not_read_its_listed_size() {
        let part = ended(1, 0, Reach::All { bytes: 8192 }, None);
        let files = join(vec![piece(3, 0, b"x"), part], Vec::new(), &[0, 2]);
        let told: Vec<(u32, u64, bool)> =
            files.iter().map(|file| (file.file, file.size, file.crc32c.is_some())).collect();
        assert_eq!(told, [(0, 16384, false), (1, 8192, false), (2, 8192, false), (3, 1, true)]);
    }

    #[test]
    fn a_file_with_a_vanished_piece_is_left_out() {
        let results = vec![piece(0, 0, b"abcd"), PieceResult::vanished(0, 4), piece(1, 0, b"x")];
        let files = join(results, Vec::new(), &[]);
        assert_eq!(files.iter().map(|file| file.file).collect::<Vec<_>>(), [1]);
    }
}
