//! PURE: from what the readers did with pieces to what the backup says about files.
//!
//! A file read in several pieces is whole only up to the first piece that ended early: what lies behind was cut off after
//! the start of the backup, and WAL replay cuts it off again. A file of which any piece found nothing is left out. A file
//! of which nothing was to be read is as it was in the parent, up to the size that was listed.

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// CRC-32C of all its bytes; none if not all were read.
    pub crc32c: Option<u32>,
    /// Attributes, if newer than the listing's.
    pub metadata: Option<PieceMetadata>,
    /// Where the bytes lie that this backup holds itself, in file order.
    pub extents: Vec<Extent>,
    /// What was found in its pages.
    pub pages: PageFindings,
}

/// Joins pieces to files, in file order, and gives each its extents. Files that are gone are missing from the result.
///
/// `untouched` are files without pieces, with their sizes, in file order.
pub fn join(
    mut results: Vec<PieceResult>,
    mut extents: HashMap<u32, Vec<Extent>>,
    untouched: impl IntoIterator<Item = (u32, u64)>,
) -> Vec<CopiedFile> {
    results.sort_by_key(|result| (result.file, result.from));
    let read = results.chunk_by(|a, b| a.file == b.file).filter_map(|pieces| {
        let mut file = join_pieces(pieces)?;
        let mut found = extents.remove(&file.file).unwrap_or_default();
        found.sort_by_key(|extent| extent.from);
        found.retain(|extent| extent.from < file.size);
        file.extents = found;
        Some(file)
    });
    let untouched = untouched.into_iter().map(|(file, size)| CopiedFile { file, size, ..CopiedFile::default() });
    let mut files: Vec<CopiedFile> = read.chain(untouched).collect();
    files.sort_by_key(|file| file.file);
    files
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

    fn piece(file: u32, from: u64, bytes: &[u8]) -> PieceResult {
        ended(file, from, Reach::All { bytes: bytes.len() as u64 }, Some(crc32c::crc32c(bytes)))
    }

    fn ended(file: u32, from: u64, reach: Reach, crc32c: Option<u32>) -> PieceResult {
        let end = PieceEnd::Copied { reach, crc32c, metadata: None };
        PieceResult { file, from, end, pages: PageFindings::default() }
    }

    fn extents(ranges: &[(u32, u64, u64)]) -> HashMap<u32, Vec<Extent>> {
        let mut extents: HashMap<u32, Vec<Extent>> = HashMap::new();
        for (file, from, to) in ranges {
            let extent = Extent { pack: 0, offset: 8, length: 1, from: *from, to: *to, pages: None };
            extents.entry(*file).or_default().push(extent);
        }
        extents
    }

    #[test]
    fn pieces_in_any_order_give_the_checksum_of_the_whole() {
        let results = vec![piece(1, 4, b"efgh"), piece(0, 0, b""), piece(1, 8, b"ij"), piece(1, 0, b"abcd")];
        let files = join(results, extents(&[(1, 8, 10), (1, 0, 8)]), []);
        assert_eq!(files.len(), 2);
        assert_eq!((files[0].size, files[0].crc32c), (0, Some(0)));
        assert_eq!((files[1].size, files[1].crc32c), (10, Some(crc32c::crc32c(b"abcdefghij"))));
        assert_eq!(files[1].extents.iter().map(|extent| extent.from).collect::<Vec<_>>(), [0, 8]);
    }

    #[test]
    fn a_file_that_shrank_ends_at_its_first_short_piece() {
        let short = ended(0, 0, Reach::Short { bytes: 2 }, Some(crc32c::crc32c(b"ab")));
        let files = join(vec![short, piece(0, 4, b"efgh")], extents(&[(0, 0, 2), (0, 4, 8)]), []);
        assert_eq!((files[0].size, files[0].extents.len()), (2, 1));
        assert_eq!(files[0].crc32c, Some(crc32c::crc32c(b"ab")));
    }

    #[test]
    fn a_file_read_in_part_has_no_checksum_and_one_not_read_its_listed_size() {
        let part = ended(1, 0, Reach::All { bytes: 8192 }, None);
        let files = join(vec![piece(3, 0, b"x"), part], HashMap::new(), [(0, 16384), (2, 8192)]);
        let told: Vec<(u32, u64, bool)> =
            files.iter().map(|file| (file.file, file.size, file.crc32c.is_some())).collect();
        assert_eq!(told, [(0, 16384, false), (1, 8192, false), (2, 8192, false), (3, 1, true)]);
    }

    #[test]
    fn a_file_with_a_vanished_piece_is_left_out() {
        let results = vec![piece(0, 0, b"abcd"), PieceResult::vanished(0, 4), piece(1, 0, b"x")];
        let files = join(results, HashMap::new(), []);
        assert_eq!(files.iter().map(|file| file.file).collect::<Vec<_>>(), [1]);
    }
}
