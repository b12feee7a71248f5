//! The page cache is the server's: what a reader brought into it goes out again, and what was there before stays.
//!
//! Before a piece is read, each [`STRETCH_BYTES`] of it is asked for one byte that must not cost a disk access (`preadv2` with
//! `RWF_NOWAIT`). Where none came, nobody had that stretch in the cache, and it is given up (`POSIX_FADV_DONTNEED`) once the piece is read.
//! Where the file system does not answer such a question nothing is given up. All of it is advice: nothing here fails a
//! backup.

use std::fs::File;
use std::io::IoSliceMut;
use std::num::NonZero;

use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// Bytes of which one answers for all.
const STRETCH_BYTES: u64 = 1 << 20;

/// Stretches of a file that are read for the first time.
#[derive(Debug)]
pub(super) struct Uncached<'a> {
    file: &'a File,
    /// First byte of each and the byte behind its last, the last one first.
    stretches: Vec<(u64, u64)>,
}

impl<'a> Uncached<'a> {
    /// Those between two bytes, asked before they are read.
    pub(super) fn before(file: &'a File, from: u64, to: u64) -> Self {
        let mut stretches: Vec<(u64, u64)> = Vec::new();
        // The last one first: a question may make the kernel read ahead, which must not answer the next one.
        for number in (0..to.saturating_sub(from).div_ceil(STRETCH_BYTES)).rev() {
            let start = from + number * STRETCH_BYTES;
            let end = (start + STRETCH_BYTES).min(to);
            // What lies at the edge may have been read with the neighbour.
            match is_cached(file, start + (end - start) / 2) {
                Some(true) => {}
                Some(false) => match stretches.last_mut() {
                    Some(last) if last.0 == end => last.0 = start,
                    _ => stretches.push((start, end)),
                },
                None => break,
            }
        }
        Self { file, stretches }
    }

    /// Gives them up, now that they are read.
    pub(super) fn give_up(self) {
        for (from, to) in self.stretches {
            if fadvise(self.file, from, NonZero::new(to - from), Advice::DontNeed).is_err() {
                return;
            }
        }
    }
}

/// Whether a byte lies in the page cache; `None` if that cannot be told.
fn is_cached(file: &File, at: u64) -> Option<bool> {
    let mut byte = [0; 1];
    match preadv2(file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT) {
        Ok(1..) => Some(true),
        Err(Errno::AGAIN) => Some(false),
        Ok(0) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_was_cached_stays_and_the_rest_goes() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let bytes = 8 * STRETCH_BYTES;
        file.write_all_at(&vec![7; bytes as usize], 0).unwrap();
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        fadvise(&file, 0, None, Advice::Random).unwrap();
        let middle = |stretch: u64| stretch * STRETCH_BYTES + STRETCH_BYTES / 2;
        // Not in the middle, which the question brings in.
        if is_cached(&file, 0) != Some(false) {
            eprintln!("this file system keeps what it is told to give up, or does not tell");
            return;
        }
        let read = |from: u64, to: u64| file.read_exact_at(&mut vec![0; (to - from) as usize], from).unwrap();
        read(2 * STRETCH_BYTES, 3 * STRETCH_BYTES);
        let uncached = Uncached::before(&file, 0, bytes);
        read(0, bytes);
        assert!((0..8).all(|stretch| is_cached(&file, middle(stretch)) == Some(true)));
        uncached.give_up();
        let cached: Vec<u64> = (0..8).filter(|stretch| is_cached(&file, middle(*stretch)) == Some(true)).collect();
        assert_eq!(cached, [2]);
    }
}
