//! An object on its way from whoever encoded it: checked as it comes, without being decompressed.
//!
//! The header has the lengths and the SHA-256 of the frames and of what follows them, so together with its own digest it
//! pins every byte of the object. Who sent it tells that digest apart from it.
//!
//! What it does not do: it does not look into the frames. Whoever reads the file decodes them and checks the content.

use sha2::{Digest, Sha256};

use super::header::{Damage, HEADER_LIMIT_BYTES, WalHeader};

/// Takes one object in.
#[derive(Debug, Default)]
pub struct WalArrival {
    /// Bytes of the header, until it is whole.
    start: Vec<u8>,
    head: Option<Arrived>,
    frames: Sha256,
    frames_size: u64,
    changes: Sha256,
    changes_size: u64,
}

/// What came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrived {
    /// Its header.
    pub header: WalHeader,
    /// SHA-256 of the bytes of its header, from the first to the checksum's last.
    pub header_sha256: [u8; 32],
}

impl WalArrival {
    /// An object of which nothing has come yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes its next bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Damage> {
        if self.head.is_some() {
            return self.push_rest(bytes);
        }
        let (piece, rest) = bytes.split_at(bytes.len().min(HEADER_LIMIT_BYTES - self.start.len()));
        self.start.extend_from_slice(piece);
        let Some(length) = WalHeader::length(&self.start)?.filter(|length| *length <= self.start.len()) else {
            return Ok(());
        };
        let start = std::mem::take(&mut self.start);
        let (header, _) = WalHeader::read(&start)?;
        self.head = Some(Arrived { header, header_sha256: crate::digest::sha256(&start[..length]) });
        self.push_rest(&start[length..])?;
        self.push_rest(rest)
    }

    fn push_rest(&mut self, bytes: &[u8]) -> Result<(), Damage> {
        let Some(Arrived { header, .. }) = &self.head else { return Ok(()) };
        let frames_left = header.frames_size.saturating_sub(self.frames_size);
        let frames = usize::try_from(frames_left).map_or(bytes.len(), |left| left.min(bytes.len()));
        let (frames, changes) = bytes.split_at(frames);
        self.frames_size += frames.len() as u64;
        self.frames.update(frames);
        self.changes_size += changes.len() as u64;
        if self.changes_size > header.changes_size() {
            return Err(Damage::Trailing { expected: header.frames_size.saturating_add(header.changes_size()) });
        }
        self.changes.update(changes);
        Ok(())
    }

    /// Ends the object: says that all that its header promises came, unchanged.
    pub fn finish(self) -> Result<Arrived, Damage> {
        let intact = self.changes_are_intact();
        let arrived = self.finish_file()?;
        match intact {
            true => Ok(arrived),
            false => Err(Damage::Changes { reason: "they were changed or cut off".to_owned() }),
        }
    }

    /// Ends the object: says that the file in it came, unchanged. What it tells of changes may be damaged, as it may be
    /// where it lay; whoever reads that finds out, and reads the WAL instead.
    pub fn finish_file(self) -> Result<Arrived, Damage> {
        let arrived = self.head.ok_or(Damage::HeaderShort)?;
        if self.frames_size < arrived.header.frames_size {
            return Err(Damage::Truncated { found: self.frames_size, expected: arrived.header.frames_size });
        }
        match <[u8; 32]>::from(self.frames.finalize()) == arrived.header.frames_sha256 {
            true => Ok(arrived),
            false => Err(Damage::FramesDigest),
        }
    }

    fn changes_are_intact(&self) -> bool {
        let promised = self.head.as_ref().and_then(|head| head.header.changes);
        promised.is_none_or(|part| {
            self.changes_size == part.size && <[u8; 32]>::from(self.changes.clone().finalize()) == part.sha256
        })
    }
}
