//! Reads frames out of a range of a pack.

use std::io;

use super::frame::{FrameEncoding, FrameHeader, Place, frame_digest};
use super::{DIGESTED_BYTES, FRAME_HEADER_BYTES, FRAME_LIMIT_BYTES, FileNumber, PackDamage};

/// Bytes of a verified frame that lie next to each other in their file: the whole of a contiguous frame, or a run of
/// adjoining pages of a sparse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Which file they belong to.
    pub file: FileNumber,
    /// Where they begin there, in bytes.
    pub offset: u64,
    /// What the file holds there.
    pub bytes: &'a [u8],
    /// Where the frame lies in the pack, in bytes.
    pub position: u64,
    /// How many units (see [`super::Unit`]) of the frame come before these bytes.
    pub first_unit: usize,
    /// Bytes of one unit.
    pub unit_bytes: usize,
    /// Whether the frame is sparse.
    pub sparse: bool,
}

/// Reads frames out of a range of a pack that begins with a frame and ends after one.
///
/// Memory: one frame. Every frame is verified before it is handed on.
pub struct FrameReader {
    decompressor: zstd::bulk::Decompressor<'static>,
    position: u64,
    /// The beginning of a frame that has not come whole.
    waiting: Vec<u8>,
    raw: Vec<u8>,
    last: Option<Place>,
}

impl FrameReader {
    /// A reader of a range that begins `position` bytes into its pack; the first frame of a pack is at byte 8.
    pub fn new(position: u64) -> io::Result<Self> {
        let decompressor = zstd::bulk::Decompressor::new()?;
        Ok(Self { decompressor, position, waiting: Vec::new(), raw: vec![0; FRAME_LIMIT_BYTES], last: None })
    }

    /// Takes the next bytes of the range and hands on the frames that are whole now. An error of `sink` ends it.
    pub fn push<E: From<PackDamage>>(
        &mut self,
        mut bytes: &[u8],
        sink: &mut impl FnMut(Frame<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            if self.waiting.is_empty() {
                match self.frame_length(bytes)? {
                    Some(length) if length <= bytes.len() => {
                        let (frame, rest) = bytes.split_at(length);
                        self.hand_on(frame, sink)?;
                        bytes = rest;
                    }
                    _ => {
                        self.waiting.extend_from_slice(bytes);
                        return Ok(());
                    }
                }
                continue;
            }
            let wanted = self.frame_length(&self.waiting)?.unwrap_or(FRAME_HEADER_BYTES) - self.waiting.len();
            let (piece, rest) = bytes.split_at(wanted.min(bytes.len()));
            self.waiting.extend_from_slice(piece);
            bytes = rest;
            if self.frame_length(&self.waiting)? == Some(self.waiting.len()) {
                let mut frame = std::mem::take(&mut self.waiting);
                self.hand_on(&frame, sink)?;
                frame.clear();
                self.waiting = frame;
            }
        }
        Ok(())
    }

    /// Goes on with a frame further behind in the pack; what lies between is not looked at. Fails within a frame.
    pub fn skip_to(&mut self, position: u64) -> Result<(), PackDamage> {
        self.check_between_frames()?;
        self.position = position;
        Ok(())
    }

    /// Ends the range.
    pub fn finish(self) -> Result<(), PackDamage> {
        self.check_between_frames()
    }

    fn check_between_frames(&self) -> Result<(), PackDamage> {
        match self.waiting.is_empty() {
            true => Ok(()),
            false => Err(PackDamage::Truncated { position: self.position }),
        }
    }

    pub(super) fn frame_length(&self, bytes: &[u8]) -> Result<Option<usize>, PackDamage> {
        if bytes.len() < FRAME_HEADER_BYTES {
            return Ok(None);
        }
        Ok(Some(FrameHeader::read(bytes, self.position)?.frame_bytes()))
    }

    fn hand_on<E: From<PackDamage>>(
        &mut self,
        frame: &[u8],
        sink: &mut impl FnMut(Frame<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let position = self.position;
        let header = FrameHeader::read(frame, position)?;
        let rest = &frame[FRAME_HEADER_BYTES..];
        if frame_digest(&frame[..DIGESTED_BYTES], rest) != frame[DIGESTED_BYTES..FRAME_HEADER_BYTES] {
            return Err(PackDamage::FrameDigest { position }.into());
        }
        let (list, stored) = rest.split_at(header.blocks_bytes());
        let blocks = header.blocks(list, position)?;
        let unit_bytes = header.unit_bytes();
        let to = match blocks.last() {
            Some(last) => (u64::from(*last) + 1) * unit_bytes as u64,
            None => header.offset + u64::from(header.raw),
        };
        let place = Place { file: header.file, sparse: header.is_sparse(), from: header.offset, to };
        if self.last.is_some_and(|last| !last.allows(&place)) {
            return Err(PackDamage::Order { position }.into());
        }
        let raw_bytes = header.raw as usize;
        let bytes = match header.encoding {
            FrameEncoding::Plain => stored,
            FrameEncoding::Zstd => match self.decompressor.decompress_to_buffer(stored, &mut self.raw[..raw_bytes]) {
                Ok(length) if length == raw_bytes => &self.raw[..length],
                _ => return Err(PackDamage::Frame { position }.into()),
            },
        };
        let (file, sparse) = (header.file, header.is_sparse());
        if sparse {
            let mut first_unit = 0;
            for run in blocks.chunk_by(|one, next| one + 1 == *next) {
                let after = first_unit + run.len();
                let bytes = &bytes[first_unit * unit_bytes..after * unit_bytes];
                let offset = u64::from(run[0]) * unit_bytes as u64;
                sink(Frame { file, offset, bytes, position, first_unit, unit_bytes, sparse })?;
                first_unit = after;
            }
        } else {
            sink(Frame { file, offset: header.offset, bytes, position, first_unit: 0, unit_bytes, sparse })?;
        }
        self.last = Some(place);
        self.position += frame.len() as u64;
        Ok(())
    }
}
