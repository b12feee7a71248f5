//! Pages that changed, of files that inherit the rest.

use postgres_format::page;
use repository::backup::pack::{FRAME_LIMIT_BYTES, FRAME_LIMIT_PAGES, FileNumber};

use super::{BUFFER_BYTES, Opened, Reader};
use crate::backup::BackupError;
use crate::backup::assembly::{PieceResult, Reach};
use crate::backup::changes::mostly;
use crate::backup::pages::PageFindings;

/// Pages of one file on their way into a sparse frame.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    blocks: Vec<u32>,
    bytes: Vec<u8>,
}

impl Gathered {
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

/// Stretches of adjacent blocks, ascending, each of at most `longest`.
fn stretches(blocks: &[u32], longest: usize) -> impl Iterator<Item = &[u32]> {
    blocks.chunk_by(|one, next| one + 1 == *next).flat_map(move |stretch| stretch.chunks(longest.max(1)))
}

impl Reader {
    /// Reads every page of a piece and takes those that changed, as their LSN tells.
    pub(super) fn read_newer(
        &mut self,
        opened: &Opened<'_>,
        inherited_blocks: u32,
    ) -> Result<PieceResult, BackupError> {
        let (piece, page_bytes) = (opened.piece, self.shared.check.page_bytes());
        let grown_from = u64::from(inherited_blocks) * page_bytes as u64;
        let (mut at, mut crc, mut pages) = (piece.from, 0, PageFindings::default());
        while at < piece.to && !self.shared.stopped() {
            let end = if at < grown_from { piece.to.min(grown_from) } else { piece.to };
            let wanted = usize::try_from(end - at).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
            let (got, doubtful) = self.read_checked(opened, at, wanted, &mut pages)?;
            crc = crc32c::crc32c_append(crc, &self.buffer[..got]);
            if at >= grown_from {
                self.flush(piece.file)?;
                self.pack_buffer(piece.file, at, got)?;
            } else {
                self.take_newer(piece.file, at, got, &doubtful)?;
            }
            at += got as u64;
            if got < wanted {
                break;
            }
        }
        self.flush(piece.file)?;
        Ok(opened.result(reach(piece.from, at, piece.to), Some(crc), pages))
    }

    /// Takes what changed of the first bytes of the buffer, which begin at byte `at` of a file.
    fn take_newer(&mut self, file: u32, at: u64, bytes: usize, doubtful: &[u32]) -> Result<(), BackupError> {
        let page_bytes = self.shared.check.page_bytes();
        let since = self.shared.since;
        let first = u32::try_from(at / page_bytes as u64).unwrap_or(u32::MAX);
        // Bytes that are no whole page are at the end of a file that is being cut short; then that is its new length.
        let whole = self.buffer[..bytes].chunks_exact(page_bytes);
        let changed = |block: u32, bytes: &[u8]| {
            let lsn = page::lsn(bytes);
            lsn.as_u64() == 0 || since.is_none_or(|since| lsn >= since) || doubtful.binary_search(&block).is_ok()
        };
        let taken: Vec<u32> =
            (first..).zip(whole).filter(|(block, bytes)| changed(*block, bytes)).map(|(block, _)| block).collect();
        if mostly(taken.len() as u64, (bytes / page_bytes) as u64) {
            self.flush(file)?;
            return self.pack_buffer(file, at, bytes - bytes % page_bytes);
        }
        let buffer = std::mem::take(&mut self.buffer);
        let gathered = taken.iter().try_for_each(|block| {
            let from = (block - first) as usize * page_bytes;
            self.gather(file, *block, &buffer[from..from + page_bytes])
        });
        self.buffer = buffer;
        gathered
    }

    /// Reads and takes the pages of a piece that the maps list, and all beyond the parent's length.
    pub(super) fn read_listed(
        &mut self,
        opened: &Opened<'_>,
        inherited_blocks: u32,
    ) -> Result<PieceResult, BackupError> {
        let (piece, page_bytes) = (opened.piece, self.shared.check.page_bytes() as u64);
        let block = |at: u64| u32::try_from(at / page_bytes).unwrap_or(u32::MAX);
        let grown_from = (u64::from(inherited_blocks) * page_bytes).clamp(piece.from, piece.to);
        let listed: Vec<u32> = opened.planned.changed.range(block(piece.from)..block(grown_from)).collect();
        let mut pages = PageFindings::default();
        for stretch in stretches(&listed, BUFFER_BYTES / page_bytes as usize) {
            if self.shared.stopped() {
                break;
            }
            let at = u64::from(stretch[0]) * page_bytes;
            let wanted = stretch.len() * page_bytes as usize;
            let (got, _) = self.read_checked(opened, at, wanted, &mut pages)?;
            let whole = got / page_bytes as usize;
            let buffer = std::mem::take(&mut self.buffer);
            let mut read = stretch.iter().zip(buffer.chunks_exact(page_bytes as usize)).take(whole);
            let gathered = read.try_for_each(|(block, bytes)| self.gather(piece.file, *block, bytes));
            self.buffer = buffer;
            gathered?;
            if whole < stretch.len() {
                self.flush(piece.file)?;
                let end = at + whole as u64 * page_bytes;
                return Ok(opened.result(Reach::Short { bytes: end - piece.from }, None, pages));
            }
        }
        self.flush(piece.file)?;
        let mut at = grown_from;
        while at < piece.to && !self.shared.stopped() {
            let wanted = usize::try_from(piece.to - at).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
            let (got, _) = self.read_checked(opened, at, wanted, &mut pages)?;
            self.pack_buffer(piece.file, at, got)?;
            at += got as u64;
            if got < wanted {
                break;
            }
        }
        Ok(opened.result(reach(piece.from, at, piece.to), None, pages))
    }

    /// Adds a page to the next sparse frame of its file.
    pub(super) fn gather(&mut self, file: u32, block: u32, page: &[u8]) -> Result<(), BackupError> {
        self.gathered.blocks.push(block);
        self.gathered.bytes.extend_from_slice(page);
        let full = self.gathered.blocks.len() == FRAME_LIMIT_PAGES
            || self.gathered.bytes.len() + page.len() > FRAME_LIMIT_BYTES;
        if full { self.flush(file) } else { Ok(()) }
    }

    /// Packs what was gathered.
    pub(super) fn flush(&mut self, file: u32) -> Result<(), BackupError> {
        if self.gathered.blocks.is_empty() {
            return Ok(());
        }
        self.hold_file();
        let Gathered { blocks, bytes } = &self.gathered;
        self.builder.add_pages(FileNumber(file), blocks, bytes).map_err(BackupError::Pack)?;
        self.gathered.blocks.clear();
        self.gathered.bytes.clear();
        if self.builder.is_full() { self.finish_pack() } else { Ok(()) }
    }
}

/// How far a piece from `from` to `to` reaches that was read up to `at`.
fn reach(from: u64, at: u64, to: u64) -> Reach {
    let bytes = at - from;
    if at < to { Reach::Short { bytes } } else { Reach::All { bytes } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_blocks_are_read_at_once() {
        let check = |blocks: &[u32], longest, expected: &[&[u32]]| {
            assert_eq!(stretches(blocks, longest).collect::<Vec<_>>(), expected);
        };
        check(&[], 4, &[]);
        check(&[3], 4, &[&[3]]);
        check(&[1, 2, 3, 5, 8, 9], 4, &[&[1, 2, 3], &[5], &[8, 9]]);
        check(&[1, 2, 3, 4, 5], 2, &[&[1, 2], &[3, 4], &[5]]);
    }
}
