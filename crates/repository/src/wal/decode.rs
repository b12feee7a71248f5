//! Decoding: the bytes of an object as they come, into the bytes of the file, every one of them checked.
//!
//! Nothing that was written may be used before [`WalDecoder::finish`] has said that all of the file was there. Memory:
//! one frame, whatever the object claims; a frame that needs more is refused. What the object tells of changes, behind its
//! frames, is passed over: a file is not lost because that is damaged.

use std::io::{self, Write};

use sha2::{Digest, Sha256};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};
use zstd::zstd_safe::DParameter;

use super::header::{Damage, Expected, WalHeader};

/// Decoded bytes handed on at a time.
const OUTPUT_BYTES: usize = 256 * 1024;
/// Largest window of a frame: 2 to this power in bytes, the content of one frame.
const WINDOW_LOG_MAX: u32 = 20;

/// Why an object could not be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The object is damaged.
    #[error("{0}")]
    Damaged(Damage),
    /// What it holds could not be written.
    #[error("writing decoded bytes failed")]
    Write(#[source] io::Error),
    /// There is no memory for a decompressor.
    #[error("there is no memory for a decompressor")]
    Memory(#[source] io::Error),
}

impl From<Damage> for DecodeError {
    fn from(damage: Damage) -> Self {
        Self::Damaged(damage)
    }
}

/// Reads one object.
pub struct WalDecoder {
    expected: Option<Expected>,
    /// Bytes of the header, until it is whole.
    start: Vec<u8>,
    header: Option<WalHeader>,
    decompressor: Decoder<'static>,
    /// Whether the last byte decompressed ended a frame.
    between_frames: bool,
    output: Vec<u8>,
    content: Sha256,
    frames: Sha256,
    size: u64,
    frames_size: u64,
    /// Bytes that came behind the frames.
    behind_size: u64,
    frame_start: u64,
}

impl WalDecoder {
    /// A decoder of an object that must be what was asked for, or of any if `expected` is `None`.
    pub fn new(expected: Option<Expected>) -> Result<Self, DecodeError> {
        let mut decompressor = Decoder::new().map_err(DecodeError::Memory)?;
        decompressor.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(DecodeError::Memory)?;
        Ok(Self {
            expected,
            start: Vec::new(),
            header: None,
            decompressor,
            between_frames: true,
            output: Vec::new(),
            content: Sha256::new(),
            frames: Sha256::new(),
            size: 0,
            frames_size: 0,
            behind_size: 0,
            frame_start: 0,
        })
    }

    /// Takes the next bytes of the object and writes what they decode to.
    pub fn push(&mut self, bytes: &[u8], out: &mut dyn Write) -> Result<(), DecodeError> {
        if self.header.is_some() {
            return self.push_rest(bytes, out);
        }
        self.start.extend_from_slice(bytes);
        let Some(length) = WalHeader::length(&self.start)?.filter(|length| *length <= self.start.len()) else {
            return Ok(());
        };
        let (header, _) = WalHeader::read(&self.start)?;
        if let Some(expected) = &self.expected {
            expected.check(&header)?;
        }
        self.header = Some(header);
        self.output.resize(OUTPUT_BYTES, 0);
        let start = std::mem::take(&mut self.start);
        self.push_rest(&start[length..], out)
    }

    /// Ends the object: says that all of the file was there and unchanged.
    pub fn finish(self) -> Result<WalHeader, DecodeError> {
        let Some(header) = self.header else {
            return Err(Damage::HeaderShort.into());
        };
        if self.frames_size < header.frames_size {
            return Err(Damage::Truncated { found: self.frames_size, expected: header.frames_size }.into());
        }
        if <[u8; 32]>::from(self.frames.finalize()) != header.frames_sha256 {
            return Err(Damage::FramesDigest.into());
        }
        if !self.between_frames {
            return Err(Damage::Frame { content_offset: self.frame_start }.into());
        }
        if self.size != header.size {
            return Err(Damage::ContentSize { found: self.size, expected: header.size }.into());
        }
        if <[u8; 32]>::from(self.content.finalize()) != header.sha256 {
            return Err(Damage::ContentDigest.into());
        }
        Ok(header)
    }

    /// Takes bytes that follow the header.
    fn push_rest(&mut self, bytes: &[u8], out: &mut dyn Write) -> Result<(), DecodeError> {
        let Some(header) = &self.header else { return Ok(()) };
        let (size, frames_left) = (header.size, header.frames_size.saturating_sub(self.frames_size));
        let frames = usize::try_from(frames_left).map_or(bytes.len(), |left| left.min(bytes.len()));
        let (frames, behind) = bytes.split_at(frames);
        self.behind_size += behind.len() as u64;
        if self.behind_size > header.changes_size() {
            let expected = header.frames_size.saturating_add(header.changes_size());
            return Err(Damage::Trailing { expected }.into());
        }
        if frames.is_empty() { Ok(()) } else { self.push_frames(frames, size, out) }
    }

    fn push_frames(&mut self, bytes: &[u8], size: u64, out: &mut dyn Write) -> Result<(), DecodeError> {
        self.frames_size += bytes.len() as u64;
        self.frames.update(bytes);
        let mut input = InBuffer::around(bytes);
        loop {
            let given = input.pos();
            let (decoded, hint) = {
                let mut output = OutBuffer::around(self.output.as_mut_slice());
                let hint = self.decompressor.run(&mut input, &mut output);
                (output.pos(), hint.map_err(|_| Damage::Frame { content_offset: self.frame_start })?)
            };
            self.size += decoded as u64;
            if self.size > size {
                return Err(Damage::ContentSize { found: self.size, expected: size }.into());
            }
            self.content.update(&self.output[..decoded]);
            out.write_all(&self.output[..decoded]).map_err(DecodeError::Write)?;
            if input.pos() > given || decoded > 0 {
                self.between_frames = hint == 0;
                self.frame_start = if hint == 0 { self.size } else { self.frame_start };
            }
            // With all input taken and room left in the output there is nothing more to come out.
            if input.pos() == bytes.len() && decoded < self.output.len() {
                return Ok(());
            }
        }
    }
}
