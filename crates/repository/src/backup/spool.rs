//! File lines on disk, while a backup runs: a manifest is written after the backup has stopped, and its files may be
//! too many to remember.

use std::fs::File as DiskFile;
use std::io::{self, BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use super::manifest::{File, Line, ManifestWriter};

/// File lines in the order they were added, in an unnamed file that goes away with this value.
pub struct EntrySpool {
    lines: BufWriter<DiskFile>,
}

impl EntrySpool {
    /// An empty spool on the file system of a directory.
    pub fn create_in(directory: &Path) -> io::Result<Self> {
        Ok(Self { lines: BufWriter::new(tempfile::tempfile_in(directory)?) })
    }

    /// Adds a file.
    pub fn push(&mut self, file: &File) -> io::Result<()> {
        serde_json::to_writer(&mut self.lines, file)?;
        self.lines.write_all(b"\n")
    }

    /// Adds all files to a manifest.
    pub fn append_to<W: Write>(self, manifest: &mut ManifestWriter<W>) -> io::Result<()> {
        let mut file = self.lines.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        for line in BufReader::new(file).lines() {
            manifest.add(&Line::File(serde_json::from_str(&line?)?))?;
        }
        Ok(())
    }
}
