//! The checksums of all restored files, on disk: `backup_manifest` lists them in the order of the manifest, and files are
//! finished in any order.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of one checksum.
const SUM_BYTES: u64 = 4;

/// CRC-32C by number of the file, in a file without a name.
#[derive(Debug)]
pub(super) struct Checksums {
    sums: File,
}

impl Checksums {
    /// None yet. It takes 4 bytes a file in `scratch`.
    pub(super) fn create_in(scratch: &Path) -> io::Result<Self> {
        Ok(Self { sums: tempfile::tempfile_in(scratch)? })
    }

    /// Keeps those of files that follow each other, from the one that so many come before.
    pub(super) fn keep(&self, first: u64, checksums: impl Iterator<Item = u32>) -> io::Result<()> {
        let bytes: Vec<u8> = checksums.flat_map(u32::to_le_bytes).collect();
        self.sums.write_all_at(&bytes, first * SUM_BYTES)
    }

    /// All of them, from the first file's on.
    pub(super) fn in_order(&self) -> io::Result<impl FnMut() -> io::Result<u32> + use<>> {
        let mut sums = self.sums.try_clone()?;
        sums.seek(SeekFrom::Start(0))?;
        let mut sums = BufReader::new(sums);
        Ok(move || {
            let mut bytes = [0; SUM_BYTES as usize];
            sums.read_exact(&mut bytes)?;
            Ok(u32::from_le_bytes(bytes))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_come_back_in_the_order_of_files() {
        let sums = Checksums::create_in(&std::env::temp_dir()).unwrap();
        sums.keep(2, [30, u32::MAX].into_iter()).unwrap();
        sums.keep(0, [10, 20].into_iter()).unwrap();
        let mut next = sums.in_order().unwrap();
        assert_eq!([next().unwrap(), next().unwrap(), next().unwrap(), next().unwrap()], [10, 20, 30, u32::MAX]);
        assert!(next().is_err());
    }
}
