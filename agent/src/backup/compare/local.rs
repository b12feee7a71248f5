//! The pages of one file as they lie on this disk.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use postgres_format::page;
use repository::backup::pack::{SUM_UNIT_BYTES, unit_sum};
use repository::verify::source::{Rules, Seen, look};

use crate::backup::pages::{PageCheck, PageFindings};
use crate::backup::reader::read_at_most;

/// Bytes looked at at once.
pub(super) const CHUNK_BYTES: usize = 1 << 20;

/// A file of a relation, opened when it is looked at first.
pub(super) struct Local {
    path: PathBuf,
    segment: u32,
    check: PageCheck,
    /// None inside: it is gone.
    open: Option<Option<File>>,
    buffer: Vec<u8>,
}

/// Bytes that were read and verified.
struct Verified {
    bytes: usize,
    /// Numbers within the file of pages that are wrong in themselves.
    corrupt: Vec<u32>,
    /// Of pages that are just being written.
    torn: Vec<u32>,
}

/// What a look at a chunk told.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// Bytes read; fewer than a chunk at the end of the file.
    pub(super) bytes: u64,
    /// Pages that were compared with their sums.
    pub(super) compared: u64,
    /// Pages that changed since the backup's start.
    pub(super) changed: u64,
    /// Numbers within the file of those that differ or are wrong in themselves.
    pub(super) differing: Vec<u32>,
}

impl Local {
    pub(super) fn new(path: PathBuf, segment: u32, check: PageCheck) -> Self {
        Self { path, segment, check, open: None, buffer: Vec::new() }
    }

    /// A page's number within its relation.
    pub(super) fn number(&self, block: u32, segment_blocks: u32) -> u32 {
        page::block_number(self.segment, segment_blocks, block)
    }

    /// Compares the chunk from byte `at` with the sums of its pages, as far as they are known.
    pub(super) fn look(&mut self, at: u64, sums: &[Option<u64>], rules: &Rules) -> io::Result<Looked> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(CHUNK_BYTES, 0);
        let Some(read) = self.read(at, &mut buffer)? else { return Ok(Looked::default()) };
        let Verified { bytes: got, corrupt, torn } = read;
        let first = (at / SUM_UNIT_BYTES as u64) as u32;
        let mut looked = Looked { bytes: got as u64, ..Looked::default() };
        for (index, page) in buffer[..got].chunks(SUM_UNIT_BYTES).enumerate() {
            let block = first + index as u32;
            if corrupt.contains(&block) {
                looked.differing.push(block);
                continue;
            }
            if torn.contains(&block) {
                looked.changed += 1;
                continue;
            }
            // The checksum was verified above.
            match look(page, 0, &Rules { checksums: page::Checksums::Off, ..*rules }) {
                Seen::Changed => looked.changed += 1,
                Seen::Silent => {}
                Seen::Settled { .. } | Seen::Wrong { .. } => {
                    let Some(sum) = sums.get(index).copied().flatten() else { continue };
                    looked.compared += 1;
                    if unit_sum(page) != sum {
                        looked.differing.push(block);
                    }
                }
            }
        }
        self.buffer = buffer;
        Ok(looked)
    }

    /// One page as it is now; none if it is gone or just being written.
    pub(super) fn page(&mut self, block: u32) -> io::Result<Option<Vec<u8>>> {
        let mut page = vec![0; SUM_UNIT_BYTES];
        let at = u64::from(block) * SUM_UNIT_BYTES as u64;
        let whole = self.read(at, &mut page)?.filter(|read| read.bytes == page.len() && read.torn.is_empty());
        Ok(whole.map(|_| page))
    }

    /// Reads and verifies; nothing if the file is gone.
    fn read(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<Option<Verified>> {
        if self.open.is_none() {
            self.open = match File::open(&self.path) {
                Ok(file) => Some(Some(file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Some(None),
                Err(error) => return Err(error),
            };
        }
        let Some(Some(file)) = &self.open else { return Ok(None) };
        let bytes = read_at_most(file, buffer, at)?;
        let mut findings = PageFindings::default();
        let mut torn = self.check.inspect(file, self.segment, at, &mut buffer[..bytes], &mut findings)?;
        let corrupt: Vec<u32> = findings.corrupt_blocks().collect();
        torn.retain(|block| !corrupt.contains(block));
        Ok(Some(Verified { bytes, corrupt, torn }))
    }
}
