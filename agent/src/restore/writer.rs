//! Writes what is wanted of one range of a pack to its files, on a blocking thread, and keeps checksums.
//!
//! Frames come verified by their digest. That each extent is there whole and in order is checked here; that the layers of
//! a file make up the file is checked at the end of its group, by the checksum in the manifest. Bytes behind a file's end
//! are not written. What lies between the wanted parts of a range is not even decompressed.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use bytes::Bytes;
use repository::backup::manifest::File as ManifestFile;
use repository::backup::pack::{Extent, Frame, FrameReader, PackDamage};
use thiserror::Error;
use tokio::sync::mpsc;

use super::layout::{Contents, Layout, PackRange, Part, Wanted, WantedFrame, is_control};

/// Mode of a file until it gets its own.
const MODE_MEANWHILE: u32 = 0o600;
/// Bytes read back at once.
const BUFFER_BYTES: usize = 1 << 18;
/// Marks a whole file's checksum as known; it is in the lower half.
const KNOWN: u64 = 1 << 32;

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
    pub(super) contents: Contents,
    pub(super) layout: Layout,
    /// Checksum of each extent of a plain file that is written.
    slots: Vec<AtomicU32>,
    /// Checksum of each file that was read as a whole, with [`KNOWN`].
    whole: Vec<AtomicU64>,
    /// Content of `pg_control`, which is written last.
    control: Mutex<Vec<u8>>,
    bytes_done: AtomicU64,
    bytes_kept: AtomicU64,
}

impl Target {
    /// With `databases` the relations of others get their length alone.
    pub(super) fn new(data_directory: PathBuf, contents: Contents, databases: Option<&BTreeSet<u32>>) -> Self {
        let layout = Layout::new(&contents, databases);
        Self {
            data_directory,
            slots: (0..layout.slots).map(|_| AtomicU32::new(0)).collect(),
            whole: contents.files.iter().map(|_| AtomicU64::new(0)).collect(),
            contents,
            layout,
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

    pub(super) fn file(&self, index: usize) -> &ManifestFile {
        &self.contents.files[index]
    }

    pub(super) fn path(&self, index: usize) -> PathBuf {
        self.data_directory.join(self.file(index).path.as_path())
    }

    /// The bytes of `pg_control` as they were backed up.
    pub(super) fn control(&self) -> Vec<u8> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Checksum of a whole file: as it was read, or from those of its extents.
    pub(super) fn checksum(&self, index: usize) -> u32 {
        let whole = self.whole[index].load(Ordering::Acquire);
        if whole & KNOWN != 0 {
            return whole as u32;
        }
        let extents = self.file(index).layers.iter().flat_map(|layer| &layer.extents);
        extents.zip(&self.slots[self.layout.first_slots[index]..]).fold(0, |whole, (extent, checksum)| {
            let length = usize::try_from(extent.to - extent.from).expect("an extent fits into memory's range");
            crc32c::crc32c_combine(whole, checksum.load(Ordering::Acquire), length)
        })
    }

    /// Keeps the checksum of a file that was read as a whole.
    pub(super) fn set_checksum(&self, index: usize, checksum: u32) {
        self.whole[index].store(KNOWN | u64::from(checksum), Ordering::Release);
    }

    /// Gives a file that was written in parts its length, and reads it back for its checksum.
    pub(super) fn complete(&self, index: usize) -> Result<(), WriteError> {
        let path = self.path(index);
        let refused = |source| WriteError::Target { path: path.clone(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(MODE_MEANWHILE)
            .open(&path)
            .map_err(refused)?;
        let size = self.file(index).size;
        if self.layout.zeroed.contains(&index) {
            file.set_len(0).and_then(|()| file.set_len(size)).map_err(refused)?;
            self.set_checksum(index, checksum_of_zeros(size));
            return Ok(());
        }
        file.set_len(size).map_err(refused)?;
        self.set_checksum(index, checksum_of(&file).map_err(refused)?);
        Ok(())
    }

    /// Writes what a channel brings of one range.
    pub(super) fn write_range(&self, range: &PackRange, mut chunks: mpsc::Receiver<Bytes>) -> Result<(), WriteError> {
        let mut position = range.offset;
        let mut reader = FrameReader::new(position).map_err(|_| PackDamage::Frame { position })?;
        let mut wanted = range.wanted.iter();
        let mut writing = Writing { target: self, current: wanted.next().map(Current::new), open: None };
        while let Some(chunk) = chunks.blocking_recv() {
            let mut bytes = &chunk[..];
            while !bytes.is_empty() {
                let Some(current) = &writing.current else {
                    position += bytes.len() as u64;
                    break;
                };
                let (from, to) = (current.wanted.offset, current.wanted.offset + current.wanted.length);
                let until = if position < from { from } else { to };
                let here = usize::try_from(until - position).unwrap_or(usize::MAX).min(bytes.len());
                let (piece, rest) = bytes.split_at(here);
                if position >= from {
                    reader.push(piece, &mut |frame| writing.take(frame))?;
                }
                (bytes, position) = (rest, position + here as u64);
                if position == until {
                    reader.skip_to(position)?;
                }
                if position == to {
                    writing.next(wanted.next())?;
                }
            }
        }
        match &writing.current {
            None if position == range.offset + range.length => Ok(()),
            _ => Err(PackDamage::Truncated { position }.into()),
        }
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
    current: Option<Current<'a>>,
    open: Option<(usize, File)>,
}

impl<'a> Writing<'a> {
    fn take(&mut self, frame: Frame<'_>) -> Result<(), WriteError> {
        let Some(current) = &mut self.current else { return Ok(()) };
        let wanted = current.wanted;
        if frame.file != wanted.file_number {
            return Err(current.damage().into());
        }
        match &wanted.part {
            Part::Extent { extent, .. } => {
                if !current.continues(extent, &frame, self.target.contents.head.block_size as usize) {
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
        let file = self.target.file(index);
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
        let path = || self.target.path(index);
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
                self.target.slots[slot].store(current.checksum, Ordering::Release);
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
