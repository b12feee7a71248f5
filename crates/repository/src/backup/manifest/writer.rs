//! Writes a manifest.

use std::io::{self, Write};

use sha2::{Digest, Sha256};

use super::sequence::Sequence;
use super::{End, Head, LEVEL, Line, MAGIC, ManifestDamage};

/// A manifest that is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestSummary {
    /// Size of the object in bytes.
    pub size: u64,
    /// SHA-256 of the object.
    pub sha256: [u8; 32],
    /// What it holds.
    pub counts: End,
}

/// Writes a manifest.
pub struct ManifestWriter<W: Write> {
    frame: zstd::stream::write::Encoder<'static, Hashed<W>>,
    sequence: Sequence,
}

impl<W: Write> ManifestWriter<W> {
    /// Begins a manifest.
    pub fn new(out: W, head: Head) -> io::Result<Self> {
        let sequence = Sequence::new(&head).map_err(refused)?;
        let mut out = Hashed { out, hash: Sha256::new(), size: 0 };
        out.write_all(MAGIC)?;
        let mut frame = zstd::stream::write::Encoder::new(out, LEVEL)?;
        frame.include_checksum(true)?;
        let mut writer = Self { frame, sequence };
        writer.write(&Line::Head(Box::new(head)))?;
        Ok(writer)
    }

    /// Adds a line. Kinds must come in the order of [`Line`]; head and end are written by `new` and `finish`. What a
    /// reader would refuse is refused here, as invalid input.
    pub fn add(&mut self, line: &Line) -> io::Result<()> {
        self.sequence.admit(line).map_err(refused)?;
        self.write(line)
    }

    fn write(&mut self, line: &Line) -> io::Result<()> {
        serde_json::to_writer(&mut self.frame, line)?;
        self.frame.write_all(b"\n")
    }

    /// Ends the manifest.
    pub fn finish(mut self) -> io::Result<(W, ManifestSummary)> {
        let counts = self.sequence.counts();
        self.add(&Line::End(counts))?;
        let Hashed { mut out, hash, size } = self.frame.finish()?;
        out.flush()?;
        Ok((out, ManifestSummary { size, sha256: hash.finalize().into(), counts }))
    }
}

fn refused(damage: ManifestDamage) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, damage)
}

struct Hashed<W> {
    out: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
