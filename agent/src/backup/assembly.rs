//! PURE: from what the readers did with pieces to what the backup says about files.
//!
//! A file read in several pieces is whole only up to the first piece that ended early: what lies behind was cut off after
//! the start of the backup, and WAL replay cuts it off again. A file of which any piece found nothing is left out.

use std::collections::HashMap;

use repository::backup::pack::Extent;

use super::pages::PageFindings;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceEnd {
    /// The file was not there.
    Vanished,
    /// Bytes were read.
    Copied {
        /// How many.
        length: u64,
        /// Their CRC-32C.
        crc32c: u32,
        /// What the file system said when it was opened, if that is newer than the listing.
        metadata: Option<PieceMetadata>,
    },
}

/// Attributes of a file when it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// CRC-32C of all its bytes.
    pub crc32c: u32,
    /// Attributes, if newer than the listing's.
    pub metadata: Option<PieceMetadata>,
    /// Where its bytes lie, in file order.
    pub extents: Vec<Extent>,
    /// What was found in its pages.
    pub pages: PageFindings,
}

/// Joins pieces to files, in file order, and gives each its extents. Files that are gone are missing from the result.
///
/// `length_planned` tells the length of a piece of a file that was cut into several; none for a file's only piece.
pub fn join(
    mut results: Vec<PieceResult>,
    mut extents: HashMap<u32, Vec<Extent>>,
    length_planned: impl Fn(u32, u64) -> Option<u64>,
) -> Vec<CopiedFile> {
    results.sort_by_key(|result| (result.file, result.from));
    let files = results.chunk_by(|a, b| a.file == b.file).filter_map(|pieces| {
        let mut file = join_pieces(pieces, &length_planned)?;
        let mut found = extents.remove(&file.file).unwrap_or_default();
        found.sort_by_key(|extent| extent.from);
        found.retain(|extent| extent.from < file.size);
        file.extents = found;
        Some(file)
    });
    files.collect()
}

fn join_pieces(pieces: &[PieceResult], length_planned: impl Fn(u32, u64) -> Option<u64>) -> Option<CopiedFile> {
    if pieces.iter().any(|piece| piece.end == PieceEnd::Vanished) {
        return None;
    }
    let mut file = CopiedFile { file: pieces.first()?.file, ..CopiedFile::default() };
    for piece in pieces {
        let PieceEnd::Copied { length, crc32c, metadata } = piece.end else { continue };
        let combined = || crc32c::crc32c_combine(file.crc32c, crc32c, usize::try_from(length).unwrap_or(usize::MAX));
        file.crc32c = if file.size == 0 { crc32c } else { combined() };
        file.size += length;
        file.metadata = metadata;
        file.pages.merge(&piece.pages);
        if length_planned(piece.file, piece.from).is_some_and(|planned| length < planned) {
            break;
        }
    }
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(file: u32, from: u64, bytes: &[u8]) -> PieceResult {
        let end = PieceEnd::Copied { length: bytes.len() as u64, crc32c: crc32c::crc32c(bytes), metadata: None };
        PieceResult { file, from, end, pages: PageFindings::default() }
    }

    fn extents(ranges: &[(u32, u64, u64)]) -> HashMap<u32, Vec<Extent>> {
        let mut extents: HashMap<u32, Vec<Extent>> = HashMap::new();
        for (file, from, to) in ranges {
            extents.entry(*file).or_default().push(Extent { pack: 0, offset: 8, length: 1, from: *from, to: *to, pages: None });
        }
        extents
    }

    #[test]
    fn pieces_in_any_order_give_the_checksum_of_the_whole() {
        let results = vec![piece(1, 4, b"efgh"), piece(0, 0, b""), piece(1, 8, b"ij"), piece(1, 0, b"abcd")];
        let extents = extents(&[(1, 8, 10), (1, 0, 8)]);
        let files = join(results, extents, |file, from| (file == 1).then_some(if from == 8 { 2 } else { 4 }));
        assert_eq!(files.len(), 2);
        assert_eq!((files[0].size, files[0].crc32c), (0, 0));
        assert_eq!((files[1].size, files[1].crc32c), (10, crc32c::crc32c(b"abcdefghij")));
        assert_eq!(files[1].extents.iter().map(|extent| extent.from).collect::<Vec<_>>(), [0, 8]);
    }

    #[test]
    fn a_file_that_shrank_ends_at_its_first_short_piece() {
        let files =
            join(vec![piece(0, 0, b"ab"), piece(0, 4, b"efgh")], extents(&[(0, 0, 2), (0, 4, 8)]), |_, _| Some(4));
        assert_eq!((files[0].size, files[0].extents.len()), (2, 1));
        assert_eq!(files[0].crc32c, crc32c::crc32c(b"ab"));
    }

    #[test]
    fn a_file_with_a_vanished_piece_is_left_out() {
        let results = vec![piece(0, 0, b"abcd"), PieceResult::vanished(0, 4), piece(1, 0, b"x")];
        let files = join(results, HashMap::new(), |_, _| None);
        assert_eq!(files.iter().map(|file| file.file).collect::<Vec<_>>(), [1]);
    }
}
