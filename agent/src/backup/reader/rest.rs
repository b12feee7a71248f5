//! Pieces of files of which attempts hold some pages: what is left to be sent, in contiguous frames where nobody else has
//! them so, in sparse ones elsewhere.

use super::{BUFFER_BYTES, Opened, Reader};
use crate::backup::BackupError;
use crate::backup::assembly::{PieceEnd, PieceResult, Reach};
use crate::backup::pages::PageFindings;
use crate::backup::plan::Piece;
use crate::backup::resume::Rest;

/// Adjacent blocks that are sent in frames of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    first: u32,
    blocks: u32,
    sparse: bool,
}

/// All blocks that are sent, in order, in stretches of at most `longest`.
fn stretches(rest: &Rest, longest: u32) -> Vec<Stretch> {
    let mut found: Vec<Stretch> = Vec::new();
    for first in &(&rest.sparse | &rest.solid) {
        let sparse = rest.sparse.contains(first);
        match found.last_mut() {
            Some(last) if last.first + last.blocks == first && last.sparse == sparse && last.blocks < longest => {
                last.blocks += 1;
            }
            _ => found.push(Stretch { first, blocks: 1, sparse }),
        }
    }
    found
}

/// A piece of which nothing is sent: the file is not even opened, and is as it was when it was listed.
pub(super) fn untouched(piece: &Piece) -> PieceResult {
    let reach = Reach::All { bytes: piece.to - piece.from };
    let end = PieceEnd::Copied { reach, crc32c: None, metadata: None };
    PieceResult { file: piece.file, from: piece.from, end, pages: PageFindings::default() }
}

impl Reader {
    /// Reads and packs what is left of a piece.
    pub(super) fn read_rest(&mut self, opened: &Opened<'_>, rest: &Rest) -> Result<PieceResult, BackupError> {
        let (piece, page_bytes) = (opened.piece, self.shared.check.page_bytes());
        let longest = u32::try_from(BUFFER_BYTES / page_bytes).unwrap_or(1).max(1);
        let mut pages = PageFindings::default();
        for stretch in stretches(rest, longest) {
            if self.shared.stopped() {
                break;
            }
            let at = u64::from(stretch.first) * page_bytes as u64;
            let wanted = stretch.blocks as usize * page_bytes;
            let (got, _) = self.read_checked(opened, at, wanted, &mut pages)?;
            let mut kept = got;
            if stretch.sparse {
                kept -= got % page_bytes;
                let buffer = std::mem::take(&mut self.buffer);
                let mut read = (stretch.first..).zip(buffer[..kept].chunks_exact(page_bytes));
                let gathered = read.try_for_each(|(block, bytes)| self.gather(piece.file, block, bytes));
                self.buffer = buffer;
                gathered?;
            } else {
                self.flush(piece.file)?;
                self.pack_buffer(piece.file, at, got)?;
            }
            if got < wanted {
                self.flush(piece.file)?;
                return Ok(opened.result(Reach::Short { bytes: at + kept as u64 - piece.from }, None, pages));
            }
        }
        self.flush(piece.file)?;
        Ok(opened.result(Reach::All { bytes: piece.to - piece.from }, None, pages))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_blocks_of_one_shape_are_read_at_once() {
        let rest =
            Rest { sparse: [3, 4, 9].into_iter().collect(), solid: [5, 6, 7, 8, 20].into_iter().collect(), stays: 0 };
        let found: Vec<_> = stretches(&rest, 3).into_iter().map(|one| (one.first, one.blocks, one.sparse)).collect();
        assert_eq!(found, [(3, 2, true), (5, 3, false), (8, 1, false), (9, 1, true), (20, 1, false)]);
    }
}
