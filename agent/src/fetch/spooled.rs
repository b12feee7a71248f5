//! A fetched file in the spool, on its way into the data directory.
//!
//! Invariant: the file goes with its value, so that nothing stays in the spool that nobody will ask for.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::io::AsyncWriteExt;

/// Bytes copied at once.
const PIECE_BYTES: usize = 1 << 20;

/// A file in the spool that is removed when this value goes.
#[derive(Debug)]
pub(super) struct Spooled {
    path: PathBuf,
}

impl Spooled {
    /// The file that is, or will be, under a name that no other has.
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves it to where PostgreSQL wants it; copies when that is another file system. Dropping the future ends a copy
    /// half-way, and the file can be moved another time.
    ///
    /// # Errors
    /// When it is not of the size that PostgreSQL expects, or a file operation failed.
    pub(super) async fn move_to(&self, target: &Path, size_bytes: Option<u64>) -> io::Result<()> {
        let found = fs::metadata(&self.path)?.len();
        if size_bytes.is_some_and(|expected| expected != found) {
            return Err(io::Error::other(format!("the archived segment has {found} bytes")));
        }
        match fs::rename(&self.path, target) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => self.copy_to(target).await,
            result => result,
        }
    }

    async fn copy_to(&self, target: &Path) -> io::Result<()> {
        let from = tokio::fs::File::from_std(fs::File::open(&self.path)?);
        // Opened here and not by another thread, which could come to it after the next command has begun.
        let mut to = tokio::fs::File::from_std(crate::regular_file::create(target)?);
        to.set_max_buf_size(PIECE_BYTES);
        tokio::io::copy_buf(&mut tokio::io::BufReader::with_capacity(PIECE_BYTES, from), &mut to).await?;
        to.flush().await
    }
}

impl Drop for Spooled {
    fn drop(&mut self) {
        // Mostly it was moved. What cannot be removed goes at the next start.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_moved_or_copied_and_goes_with_its_value() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let content: Vec<u8> = (0..3 * PIECE_BYTES + 5).map(|at| (at % 251) as u8).collect();
        for copied in [false, true] {
            fs::write(path("spooled"), &content).unwrap();
            let file = Spooled::new(path("spooled"));
            assert!(file.move_to(&path("target"), Some(7)).await.is_err());
            match copied {
                true => file.copy_to(&path("target")).await.unwrap(),
                false => file.move_to(&path("target"), Some(content.len() as u64)).await.unwrap(),
            }
            assert!(fs::read(path("target")).unwrap() == content);
            assert_eq!(path("spooled").exists(), copied);
            drop(file);
            assert!(!path("spooled").exists());
        }
    }
}
