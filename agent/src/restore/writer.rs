//! Writes what is wanted of one range of a pack to its files, on a blocking thread, and keeps checksums.
//!
//! Frames come verified by their digest. That each extent is there whole and in order is checked here; that the layers of
//! a file make up the file is checked at the end of its group, by the checksum in the manifest. Bytes behind a file's end
//! are not written. What lies between the wanted parts of a range is not even decompressed. A range that broke off may be
//! written again from its beginning, with bytes of another store.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use repository::backup::manifest::File as ManifestFile;
use repository::backup::pack::{Extent, Frame, FrameReader, PackDamage};
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::groups::Group;
use super::layout::{PackRange, Part, Wanted, WantedFrame, is_control};

/// Mode of a file until it gets its own.
const MODE_MEANWHILE: u32 = 0o600;
/// Bytes read back at once.
const BUFFER_BYTES: usize = 1 << 18;

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

/// Bytes of a range, with the room that they take among all that are in memory.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) bytes: Bytes,
    pub(super) _room: OwnedSemaphorePermit,
}

/// What all writers share.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) data_directory: PathBuf,
    block_bytes: usize,
    /// Content of `pg_control`, which is written last.
    control: Mutex<Vec<u8>>,
    bytes_done: AtomicU64,
    bytes_kept: AtomicU64,
}

impl Target {
    /// A data directory of pages of this size.
    pub(super) fn new(data_directory: PathBuf, block_size: u32) -> Self {
        Self {
            data_directory,
            block_bytes: block_size as usize,
            control: Mutex::default(),
            bytes_done: AtomicU64::new(0),
            bytes_kept: AtomicU64::new(0),
        }
    }

    pub(super) fn bytes_done(&self) -> u64 {
        self.bytes_done.load(Ordering::Relaxed)
    }

    /// Bytes that were there already.
    pub(super) fn bytes_kept(&self) -> u64 {
        self.bytes_kept.load(Ordering::Relaxed)
    }

    /// Counts bytes that are there already.
    pub(super) fn keep(&self, bytes: u64) {
        self.bytes_kept.fetch_add(bytes, Ordering::Relaxed);
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn path(&self, file: &ManifestFile) -> PathBuf {
        self.data_directory.join(file.path.as_path())
    }

    /// The bytes of `pg_control` as they were backed up.
    pub(super) fn control(&self) -> Vec<u8> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives a file that was written in parts its length, and reads it back for its checksum.
    pub(super) fn complete(&self, group: &Group, index: usize) -> Result<(), WriteError> {
        let path = self.path(group.file(index));
        let refused = |source| WriteError::Target { path: path.clone(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(MODE_MEANWHILE)
            .open(&path)
            .map_err(refused)?;
        let size = group.file(index).size;
        if group.is_zeroed(index) {
            file.set_len(0).and_then(|()| file.set_len(size)).map_err(refused)?;
            group.set_checksum(index, checksum_of_zeros(size));
            return Ok(());
        }
        file.set_len(size).map_err(refused)?;
        group.set_checksum(index, checksum_of(&file).map_err(refused)?);
        Ok(())
    }

    /// Writes what a channel brings of one range.
    pub(super) fn write_range(
        &self,
        group: &Group,
        range: &PackRange,
        pieces: mpsc::Receiver<Piece>,
    ) -> Result<(), WriteError> {
        let mut wanted = range.wanted.iter();
        let current = wanted.next().map(Current::new);
        let mut writing = Writing { target: self, group, current, open: None, counted_bytes: 0 };
        let written = writing.take_all(range, wanted, pieces);
        if written.is_err() {
            // It is written once more, or the restore fails.
            self.bytes_done.fetch_sub(writing.counted_bytes, Ordering::Relaxed);
        }
        written
    }
}

/// CRC-32C of a file from where it stands.
pub(super) fn checksum_of(mut file: &File) -> io::Result<u32> {
    use std::io::Read;

    let (mut buffer, mut checksum) = (vec![0; BUFFER_BYTES], 0);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(checksum),
            Ok(got) => checksum = crc32c::crc32c_append(checksum, &buffer[..got]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// CRC-32C of so many zeros, without making them.
fn checksum_of_zeros(mut length: u64) -> u32 {
    let (mut sum, mut power, mut bytes) = (0, crc32c::crc32c(&[0]), 1_usize);
    while length > 0 {
        if length & 1 == 1 {
            sum = crc32c::crc32c_combine(sum, power, bytes);
        }
        power = crc32c::crc32c_combine(power, power, bytes);
        (bytes, length) = (bytes.saturating_mul(2), length / 2);
    }
    sum
}

/// A part that is being written.
struct Current<'a> {
    wanted: &'a Wanted,
    /// The byte of the file after the last one that came.
    at: u64,
    /// Of an extent: pages that came. Of units: frames that came.
    count: usize,
    last_position: u64,
    checksum: u32,
}

impl<'a> Current<'a> {
    fn new(wanted: &'a Wanted) -> Self {
        let at = match &wanted.part {
            Part::Extent { extent, .. } => extent.from,
            Part::Units(_) => 0,
        };
        Self { wanted, at, count: 0, last_position: 0, checksum: 0 }
    }

    fn damage(&self) -> PackDamage {
        let (from, to) = match &self.wanted.part {
            Part::Extent { extent, .. } => (extent.from, extent.to),
            Part::Units(_) => (self.at, self.at),
        };
        PackDamage::Extent { position: self.wanted.offset, file: self.wanted.file_number, from, to }
    }

    /// Whether these bytes continue an extent.
    fn continues(&mut self, extent: &Extent, frame: &Frame<'_>, block_bytes: usize) -> bool {
        let length = frame.bytes.len() as u64;
        let fits = match extent.pages {
            None => !frame.sparse && frame.offset == self.at,
            Some(_) => {
                let pages = self.count;
                self.count += frame.bytes.len() / frame.unit_bytes;
                let placed = if pages == 0 { frame.offset == extent.from } else { frame.offset >= self.at };
                frame.sparse && frame.unit_bytes == block_bytes && placed
            }
        };
        self.at = frame.offset.saturating_add(length);
        self.checksum = crc32c::crc32c_append(self.checksum, frame.bytes);
        fits && self.at <= extent.to
    }

    /// The units of a frame that are wanted; none if it is another frame than expected.
    fn units(&mut self, frames: &[WantedFrame], frame: &Frame<'_>) -> Option<u8> {
        if self.count == 0 || frame.position != self.last_position {
            (self.count, self.last_position) = (self.count + 1, frame.position);
        }
        frames.get(self.count - 1).filter(|wanted| wanted.position == frame.position).map(|wanted| wanted.units)
    }

    fn is_complete(&self) -> bool {
        match &self.wanted.part {
            Part::Extent { extent, .. } => {
                self.at == extent.to && extent.pages.is_none_or(|pages| pages as usize == self.count)
            }
            Part::Units(frames) => frames.len() == self.count,
        }
    }
}

struct Writing<'a> {
    target: &'a Target,
    group: &'a Group,
    current: Option<Current<'a>>,
    open: Option<(usize, File)>,
    /// What it added to the progress.
    counted_bytes: u64,
}

impl<'a> Writing<'a> {
    fn take_all(
        &mut self,
        range: &PackRange,
        mut wanted: impl Iterator<Item = &'a Wanted>,
        mut pieces: mpsc::Receiver<Piece>,
    ) -> Result<(), WriteError> {
        let mut position = range.offset;
        let mut reader = FrameReader::new(position).map_err(|_| PackDamage::Frame { position })?;
        while let Some(piece) = pieces.blocking_recv() {
            let mut bytes = &piece.bytes[..];
            while !bytes.is_empty() {
                let Some(current) = &self.current else {
                    position += bytes.len() as u64;
                    break;
                };
                let (from, to) = (current.wanted.offset, current.wanted.offset + current.wanted.length);
                let until = if position < from { from } else { to };
                let here = usize::try_from(until - position).unwrap_or(usize::MAX).min(bytes.len());
                let (part, rest) = bytes.split_at(here);
                if position >= from {
                    reader.push(part, &mut |frame| self.take(frame))?;
                }
                (bytes, position) = (rest, position + here as u64);
                if position == until {
                    reader.skip_to(position)?;
                }
                if position == to {
                    self.next(wanted.next())?;
                }
            }
        }
        match &self.current {
            None if position == range.offset + range.length => Ok(()),
            _ => Err(PackDamage::Truncated { position }.into()),
        }
    }

    fn take(&mut self, frame: Frame<'_>) -> Result<(), WriteError> {
        let Some(current) = &mut self.current else { return Ok(()) };
        let wanted = current.wanted;
        if frame.file != wanted.file_number {
            return Err(current.damage().into());
        }
        match &wanted.part {
            Part::Extent { extent, .. } => {
                if !current.continues(extent, &frame, self.target.block_bytes) {
                    return Err(current.damage().into());
                }
                self.write(wanted.file, frame.offset, frame.bytes)
            }
            Part::Units(frames) => {
                let units = current.units(frames, &frame).ok_or_else(|| current.damage())?;
                self.write_units(wanted.file, units >> frame.first_unit.min(7), &frame)
            }
        }
    }

    /// Writes the units whose bit is set, adjoining ones together.
    fn write_units(&mut self, file: usize, units: u8, frame: &Frame<'_>) -> Result<(), WriteError> {
        let count = frame.bytes.len().div_ceil(frame.unit_bytes);
        let is_set = |unit: &usize| units.checked_shr(*unit as u32).unwrap_or(0) & 1 == 1;
        let set: Vec<usize> = (0..count).filter(is_set).collect();
        for run in set.chunk_by(|one, next| one + 1 == *next) {
            let from = run[0] * frame.unit_bytes;
            let to = ((run[0] + run.len()) * frame.unit_bytes).min(frame.bytes.len());
            self.write(file, frame.offset + from as u64, &frame.bytes[from..to])?;
        }
        Ok(())
    }

    fn write(&mut self, index: usize, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let file = self.group.file(index);
        self.counted_bytes += bytes.len() as u64;
        self.target.bytes_done.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let inside = usize::try_from(file.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        let bytes = &bytes[..inside];
        if bytes.is_empty() {
            return Ok(());
        }
        if is_control(file) {
            let mut control = self.target.control.lock().unwrap_or_else(PoisonError::into_inner);
            control.truncate(usize::try_from(offset).unwrap_or(usize::MAX));
            control.extend_from_slice(bytes);
            return Ok(());
        }
        let path = || self.target.path(file);
        let refused = |source| WriteError::Target { path: path(), source };
        if self.open.as_ref().is_none_or(|(open, _)| *open != index) {
            let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(MODE_MEANWHILE).open(path());
            self.open = Some((index, opened.map_err(refused)?));
        }
        let (_, open) = self.open.as_ref().expect("was opened above");
        open.write_all_at(bytes, offset).map_err(refused)
    }

    /// Ends the current part and goes on with the next one.
    fn next(&mut self, wanted: Option<&'a Wanted>) -> Result<(), WriteError> {
        if let Some(current) = &self.current {
            if !current.is_complete() {
                return Err(current.damage().into());
            }
            if let Part::Extent { slot: Some(slot), .. } = current.wanted.part {
                self.group.set_slot(slot, current.checksum);
            }
            if wanted.is_some_and(|next| next.offset < current.wanted.offset + current.wanted.length) {
                return Err(current.damage().into());
            }
        }
        self.current = wanted.map(Current::new);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_summed_without_being_read() {
        for length in [0_usize, 1, 2, 3, 8191, 8192, 100_000] {
            assert_eq!(checksum_of_zeros(length as u64), crc32c::crc32c(&vec![0; length]), "{length}");
        }
    }
}
