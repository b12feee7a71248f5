//! What changed in a data directory since a moment, found the dear way: every page of every relation is read and its LSN
//! compared. This is what an increment is measured against: nobody can send less than the pages that changed.
//!
//! Pages that changed without WAL (hint bits without checksums) are not seen, as by no tool that reads LSNs.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use postgres_format::Lsn;
use postgres_format::relation::{Fork, RelationFork, TablespaceVersion};

/// A page of every server that is measured.
const PAGE_BYTES: usize = 8192;
/// Pages that are compressed together.
const FRAME_PAGES: usize = 8;
/// Directories whose contents no backup holds.
const LEFT_OUT: [&str; 9] = [
    "pg_wal",
    "pg_stat_tmp",
    "pg_replslot",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_subtrans",
    "log",
];

/// What an increment cannot do without.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changed {
    /// Changed pages of main forks, in bytes.
    pub pages_bytes: u64,
    /// The same, gathered into frames of 64 KiB and compressed with zstd 3.
    pub pages_stored_bytes: u64,
    /// Maps of free space and visibility and every file that is no relation's, in bytes.
    pub whole_bytes: u64,
    /// The same, compressed alike.
    pub whole_stored_bytes: u64,
    /// Pages of main forks, changed or not, in bytes.
    pub all_bytes: u64,
}

impl Changed {
    /// Bytes that have to be read.
    pub fn read_bytes(&self) -> f64 {
        (self.pages_bytes + self.whole_bytes) as f64
    }

    /// Bytes that have to be stored.
    pub fn stored_bytes(&self) -> f64 {
        (self.pages_stored_bytes + self.whole_stored_bytes) as f64
    }
}

/// Looks at a data directory whose server wrote everything out and is at rest.
pub fn since(data: &Path, version: TablespaceVersion, lsn: Lsn) -> Result<Changed> {
    let mut changed = Changed::default();
    walk(data, Path::new(""), version, lsn, &mut changed)?;
    Ok(changed)
}

fn walk(data: &Path, below: &Path, version: TablespaceVersion, lsn: Lsn, changed: &mut Changed) -> Result<()> {
    for entry in fs::read_dir(data.join(below)).with_context(|| below.display().to_string())? {
        let path = below.join(entry?.file_name());
        let full = data.join(&path);
        if full.is_dir() {
            if !LEFT_OUT.iter().any(|name| path == Path::new(name)) {
                walk(data, &path, version, lsn, changed)?;
            }
        } else if full.is_file() {
            let content = fs::read(&full).with_context(|| full.display().to_string())?;
            match RelationFork::from_path(&path, version).map(|(fork, _)| fork.fork) {
                Some(Fork::Main) => gather(&content, lsn, changed)?,
                _ => {
                    changed.whole_bytes += content.len() as u64;
                    changed.whole_stored_bytes += stored_bytes(&content)?;
                }
            }
        }
    }
    Ok(())
}

fn gather(content: &[u8], lsn: Lsn, changed: &mut Changed) -> Result<()> {
    let pages: Vec<&[u8]> = content.chunks(PAGE_BYTES).filter(|page| page_lsn(page) >= lsn.as_u64()).collect();
    changed.all_bytes += content.len() as u64;
    let gathered = pages.concat();
    changed.pages_bytes += gathered.len() as u64;
    changed.pages_stored_bytes += stored_bytes(&gathered)?;
    Ok(())
}

/// The first eight bytes of a page: two native words, the high one first (`PageXLogRecPtr`, `bufpage.h`).
fn page_lsn(page: &[u8]) -> u64 {
    let word = |at: usize| page.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes);
    u64::from(word(0)) << 32 | u64::from(word(4))
}

fn stored_bytes(content: &[u8]) -> Result<u64> {
    let frames = content.chunks(FRAME_PAGES * PAGE_BYTES);
    frames.map(|frame| Ok(zstd::bulk::compress(frame, 3)?.len() as u64)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_counts_from_the_moment_on() {
        let page = |high: u32, low: u32| {
            let mut page = vec![7; PAGE_BYTES];
            page[..4].copy_from_slice(&high.to_ne_bytes());
            page[4..8].copy_from_slice(&low.to_ne_bytes());
            page
        };
        let content = [page(1, 4), page(1, 5), page(0, 9), page(2, 0)].concat();
        let mut changed = Changed::default();
        gather(&content, Lsn::new(1 << 32 | 5), &mut changed).unwrap();
        assert_eq!((changed.pages_bytes, changed.all_bytes), (2 * 8192, 4 * 8192));
        assert!(changed.pages_stored_bytes > 0 && changed.pages_stored_bytes < 8192);
    }
}
