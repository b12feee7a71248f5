//! Reads a file from its beginning, as often as wanted and by several readers at once: a manifest on disk is gone through
//! by a backup that builds on it, and more than once by a restore.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// One passage through a file, which moves nobody else's place in it.
#[derive(Debug)]
pub struct FromStart {
    file: Arc<File>,
    at: u64,
}

impl FromStart {
    /// A passage that begins with the first byte.
    pub fn of(file: &Arc<File>) -> Self {
        Self::at(file, 0)
    }

    /// A passage that begins with this byte.
    pub fn at(file: &Arc<File>, byte: u64) -> Self {
        Self { file: Arc::clone(file), at: byte }
    }
}

impl Read for FromStart {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read_at(buffer, self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}
