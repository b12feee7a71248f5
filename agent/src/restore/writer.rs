//! Writes the frames of one range of a pack to their files, on a blocking thread, and keeps the checksum of every extent.
//!
//! Frames come verified by their digest. That each extent is there whole and in order is checked here; that the extents
//! of a file make up the file is checked at the end, by the checksum in the manifest.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use bytes::Bytes;
use repository::backup::manifest::File as ManifestFile;
use repository::backup::pack::{Frame, FrameReader, PackDamage};
use thiserror::Error;
use tokio::sync::mpsc;

use super::layout::{PackRange, WantedExtent, is_control};

/// Mode of a file until it gets its own.
const MODE_MEANWHILE: u32 = 0o600;

/// Why a range could not be written.
#[derive(Debug, Error)]
pub(super) enum WriteError {
    /// The bytes are not what was stored; another store may have them.
    #[error("the pack is damaged")]
    Damage(#[from] PackDamage),
    /// The target refused.
    #[error("cannot write {path}")]
    Target {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What all writers share.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) data_directory: PathBuf,
    pub(super) files: Vec<ManifestFile>,
    /// Checksum of each extent that is written.
    checksums: Vec<AtomicU32>,
    /// Content of `pg_control`, which is written last.
    control: Mutex<Vec<u8>>,
    bytes_done: AtomicU64,
}

impl Target {
    pub(super) fn new(data_directory: PathBuf, files: Vec<ManifestFile>, extents: usize) -> Self {
        let checksums = (0..extents).map(|_| AtomicU32::new(0)).collect();
        Self { data_directory, files, checksums, control: Mutex::default(), bytes_done: AtomicU64::new(0) }
    }

    pub(super) fn bytes_done(&self) -> u64 {
        self.bytes_done.load(Ordering::Relaxed)
    }

    /// The bytes of `pg_control` as they were backed up.
    pub(super) fn control(&self) -> Vec<u8> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Checksum of a whole file from those of its extents, in file order; `first` is the number of its first extent.
    pub(super) fn checksum(&self, file: usize, first: usize) -> u32 {
        let extents = self.files[file].layers.iter().flat_map(|layer| &layer.extents);
        extents.zip(&self.checksums[first..]).fold(0, |whole, (extent, checksum)| {
            let length = usize::try_from(extent.to - extent.from).expect("an extent fits into memory's range");
            crc32c::crc32c_combine(whole, checksum.load(Ordering::Acquire), length)
        })
    }

    /// Writes what a channel brings of one range.
    pub(super) fn write_range(&self, range: &PackRange, mut chunks: mpsc::Receiver<Bytes>) -> Result<(), WriteError> {
        let position = range.offset;
        let mut reader = FrameReader::new(position).map_err(|_| PackDamage::Frame { position })?;
        let mut writing = Writing { target: self, extents: range.extents.iter(), current: None, open: None };
        let mut received = 0;
        while let Some(chunk) = chunks.blocking_recv() {
            received += chunk.len() as u64;
            reader.push(&chunk, &mut |frame| writing.take(frame))?;
        }
        if received != range.length {
            return Err(PackDamage::Truncated { position: position + received }.into());
        }
        reader.finish()?;
        writing.finish()
    }
}

/// An extent that is being written.
struct Current {
    wanted: WantedExtent,
    at: u64,
    checksum: u32,
}

struct Writing<'a> {
    target: &'a Target,
    extents: std::slice::Iter<'a, WantedExtent>,
    current: Option<Current>,
    open: Option<(usize, File)>,
}

impl Writing<'_> {
    /// Frames between the wanted extents are passed over.
    fn take(&mut self, frame: Frame<'_>) -> Result<(), WriteError> {
        if self.current.is_none() {
            let next =
                self.extents.next().map(|wanted| Current { wanted: *wanted, at: wanted.extent.from, checksum: 0 });
            self.current = next;
        }
        let Some(current) = &mut self.current else { return Ok(()) };
        if frame.file != current.wanted.file_number || frame.offset != current.at {
            return if current.at == current.wanted.extent.from { Ok(()) } else { Err(incomplete(current).into()) };
        }
        let wanted = current.wanted;
        current.at += frame.bytes.len() as u64;
        current.checksum = crc32c::crc32c_append(current.checksum, frame.bytes);
        let (at, checksum) = (current.at, current.checksum);
        if at > wanted.extent.to {
            return Err(incomplete(current).into());
        }
        self.write(wanted.file, frame)?;
        if at == wanted.extent.to {
            self.target.checksums[wanted.number].store(checksum, Ordering::Release);
            self.current = None;
        }
        self.target.bytes_done.fetch_add(frame.bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn write(&mut self, index: usize, frame: Frame<'_>) -> Result<(), WriteError> {
        let file = &self.target.files[index];
        if is_control(file) {
            let mut control = self.target.control.lock().unwrap_or_else(PoisonError::into_inner);
            control.truncate(usize::try_from(frame.offset).unwrap_or(usize::MAX));
            control.extend_from_slice(frame.bytes);
            return Ok(());
        }
        let path = || self.target.data_directory.join(file.path.as_path());
        let refused = |source| WriteError::Target { path: path(), source };
        if self.open.as_ref().is_none_or(|(open, _)| *open != index) {
            let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(MODE_MEANWHILE).open(path());
            self.open = Some((index, opened.map_err(refused)?));
        }
        let (_, open) = self.open.as_ref().expect("was opened above");
        open.write_all_at(frame.bytes, frame.offset).map_err(refused)
    }

    fn finish(self) -> Result<(), WriteError> {
        if let Some(current) = &self.current {
            return Err(incomplete(current).into());
        }
        match self.extents.as_slice().first() {
            Some(wanted) => Err(incomplete(&Current { wanted: *wanted, at: wanted.extent.from, checksum: 0 }).into()),
            None => Ok(()),
        }
    }
}

fn incomplete(current: &Current) -> PackDamage {
    let extent = current.wanted.extent;
    PackDamage::Extent { position: extent.offset, file: current.wanted.file_number, from: extent.from, to: extent.to }
}
