//! Encoding: a file is read once, and leaves as a whole WAL object.
//!
//! Each piece of at most 1 MiB becomes one Zstandard frame: independent, so that damage stays local and reading needs
//! little memory, and large enough to compress as well as the whole file does. Frames carry no checksum of their own,
//! because the header has the SHA-256 of all of them.
//!
//! What the WAL in a segment changed goes behind the frames, if whoever read the segment can tell; see `changes.rs`.
//!
//! Memory: one frame of content, one compressed frame and what the [`Sink`] allows, whatever the file's size; and what
//! its changes take.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;

use bytes::Bytes;
use jiff::Timestamp;
use postgres_format::wal_changes::SegmentChanges;
use postgres_format::{Lsn, PgTimestamp, SystemIdentifier, WalFileName};
use sha2::{Digest, Sha256};
use zstd::zstd_safe::{CParameter, Strategy};

use super::WalError;
use super::arrival::Arrived;
use super::changes::{self, Told, tell};
use super::header::{ChangesPart, Encoding, HEADER_BYTES, WalHeader};
use crate::fingerprint::Fingerprint;
use crate::key::ObjectKey;
use crate::name::{ClusterName, NodeName};
use crate::store::Body;

/// Content of one frame, in bytes; the last frame may have less.
pub const FRAME_BYTES: usize = 1 << 20;

/// The level that is made to suit WAL, which is the one normally used.
///
/// WAL repeats itself at short distances and in short pieces. One table of short matches, small enough to stay in a core's
/// cache beside the content and what PostgreSQL works on, finds nearly all that the level's own two tables find, in 60 to 80
/// hundredths of the time. Objects compared with the level's own, by what the WAL is of: JSON documents 10 % smaller, text and
/// index builds 1 to 2 % smaller, short transactions 1 % larger, whole pages after a checkpoint 4 % larger.
const TUNED_LEVEL: i32 = 3;
/// Entries of its table as a power of 2: 128 KiB.
const TUNED_TABLE_LOG: u32 = 15;
/// Its shortest match, in bytes. With more, the WAL of short transactions becomes a seventh larger.
const TUNED_MATCH_BYTES: u32 = 5;

/// Where the encoded object gathers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sink {
    /// In memory, whatever its size: for small files.
    Memory,
    /// In memory up to a limit; an object that outgrows it moves to a file as a whole.
    Bounded {
        /// Most bytes of one object kept in memory.
        memory_bytes: usize,
        /// The file it moves to: created or overwritten then, not flushed to disk, and left to the caller to remove.
        overflow: PathBuf,
    },
}

/// What is to stand in the header besides what encoding finds out.
#[derive(Debug, Clone)]
pub struct WalFacts {
    /// The cluster's name in the fleet.
    pub cluster: ClusterName,
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The file's name in `pg_wal`.
    pub name: WalFileName,
    /// The node that read it.
    pub node: NodeName,
    /// Whether that node was in recovery.
    pub in_recovery: bool,
    /// Whether the file is complete; true for files that are no segments.
    pub complete: bool,
    /// Where the WAL in it ends, if that is known.
    pub logical_end: Option<Lsn>,
    /// PostgreSQL's major version, if it is known.
    pub postgres_major: Option<u32>,
    /// Time of the first commit or abort in it.
    pub first_commit_time: Option<PgTimestamp>,
    /// Time of the last commit or abort in it.
    pub last_commit_time: Option<PgTimestamp>,
    /// Now.
    pub written: Timestamp,
}

/// Bytes of the longest object that a file of so many bytes can become.
pub fn longest_object(file_bytes: u64) -> u64 {
    let frames = file_bytes.div_ceil(FRAME_BYTES as u64);
    let frame = zstd::zstd_safe::compress_bound(FRAME_BYTES) as u64;
    (HEADER_BYTES + changes::longest_part(file_bytes)) as u64 + frames.saturating_mul(frame)
}

/// A whole WAL object, ready to be put into any store.
#[derive(Debug, Clone)]
pub struct EncodedWal {
    /// Its header.
    pub header: WalHeader,
    /// What tells its content from others of the same name.
    pub fingerprint: Fingerprint,
    /// The object: header, frames, changes.
    pub body: Body,
    /// SHA-256 of the bytes of its header, which has those of the rest: together they pin the object.
    pub header_sha256: [u8; 32],
}

impl EncodedWal {
    /// The object that another process encoded, of which `body` is what arrived.
    pub fn arrived(arrived: Arrived, body: Body) -> Self {
        let Arrived { header, header_sha256 } = arrived;
        Self { fingerprint: header.fingerprint(), header, body, header_sha256 }
    }

    /// The key under which it goes into a store.
    pub fn key(&self) -> ObjectKey {
        self.header.key()
    }
}

/// Makes WAL objects, one after the other; the compressor's memory is kept between them.
pub struct WalEncoder {
    compressor: zstd::bulk::Compressor<'static>,
    level: i32,
    /// Content that does not fill a frame yet.
    waiting: Vec<u8>,
    /// Room for one compressed frame.
    frame: Vec<u8>,
    content: Sha256,
    frames: Sha256,
    size: u64,
    frames_size: u64,
    output: Output,
}

/// What is encoded so far, with room for the header in front.
enum Output {
    Memory { object: Vec<u8>, limit: Option<(usize, PathBuf)> },
    File { file: File, path: PathBuf },
}

impl WalEncoder {
    /// An encoder that compresses with this Zstandard level (-7 to 19 make sense).
    pub fn new(level: i32, sink: Sink) -> Result<Self, WalError> {
        Ok(Self {
            compressor: compressor(level).map_err(WalError::Compress)?,
            level,
            waiting: Vec::new(),
            frame: Vec::new(),
            content: Sha256::new(),
            frames: Sha256::new(),
            size: 0,
            frames_size: 0,
            output: Output::new(sink),
        })
    }

    /// Forgets what was pushed and begins another file.
    pub fn restart(&mut self, level: i32, sink: Sink) -> Result<(), WalError> {
        if level != self.level {
            self.compressor = compressor(level).map_err(WalError::Compress)?;
            self.level = level;
        }
        self.waiting.clear();
        self.content = Sha256::new();
        self.frames = Sha256::new();
        (self.size, self.frames_size) = (0, 0);
        self.output = Output::new(sink);
        Ok(())
    }

    /// Takes the next bytes of the file. Pieces of exactly [`FRAME_BYTES`] are not copied.
    ///
    /// After an error the encoder must be restarted.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), WalError> {
        self.content.update(bytes);
        self.size += bytes.len() as u64;
        while !bytes.is_empty() {
            if self.waiting.is_empty() && bytes.len() >= FRAME_BYTES {
                let (piece, rest) = bytes.split_at(FRAME_BYTES);
                self.add_frame(piece)?;
                bytes = rest;
                continue;
            }
            let (piece, rest) = bytes.split_at(bytes.len().min(FRAME_BYTES - self.waiting.len()));
            self.waiting.extend_from_slice(piece);
            bytes = rest;
            if self.waiting.len() == FRAME_BYTES {
                self.add_waiting()?;
            }
        }
        Ok(())
    }

    /// Ends the file. The encoder can then be restarted.
    pub fn finish(&mut self, facts: WalFacts) -> Result<EncodedWal, WalError> {
        self.seal(facts, None)
    }

    /// Ends a segment of which it was also learnt what its WAL changed. The encoder can then be restarted.
    pub fn finish_with_changes(&mut self, facts: WalFacts, changes: &SegmentChanges) -> Result<EncodedWal, WalError> {
        let told = tell(changes, &mut self.compressor).map_err(WalError::Compress)?;
        self.seal(facts, Some(told))
    }

    fn seal(&mut self, facts: WalFacts, told: Option<Told>) -> Result<EncodedWal, WalError> {
        if !self.waiting.is_empty() {
            self.add_waiting()?;
        }
        let (part, changes_doubt) = match told {
            Some(Told::Part(part)) => (Some(part), None),
            Some(Told::Doubt(doubt)) => (None, Some(doubt)),
            None => (None, None),
        };
        let changes =
            part.as_ref().map(|part| ChangesPart { size: part.len() as u64, sha256: crate::digest::sha256(part) });
        if let Some(part) = part {
            self.output.add(&part)?;
        }
        let header = WalHeader {
            format: WalHeader::FORMAT,
            critical: Vec::new(),
            cluster: facts.cluster,
            system_identifier: facts.system_identifier,
            name: facts.name,
            node: facts.node,
            in_recovery: facts.in_recovery,
            complete: facts.complete,
            logical_end: facts.logical_end,
            size: self.size,
            sha256: std::mem::take(&mut self.content).finalize().into(),
            encoding: Encoding::Zstd,
            frames_size: self.frames_size,
            frames_sha256: std::mem::take(&mut self.frames).finalize().into(),
            changes,
            changes_doubt,
            postgres_major: facts.postgres_major,
            first_commit_time: facts.first_commit_time.and_then(timestamp),
            last_commit_time: facts.last_commit_time.and_then(timestamp),
            written: facts.written,
        };
        let output = std::mem::replace(&mut self.output, Output::new(Sink::Memory));
        let bytes = header.to_bytes();
        let body = output.finish(&bytes)?;
        let header_sha256 = crate::digest::sha256(&bytes);
        Ok(EncodedWal { fingerprint: header.fingerprint(), header, body, header_sha256 })
    }

    fn add_waiting(&mut self) -> Result<(), WalError> {
        let waiting = std::mem::take(&mut self.waiting);
        let added = self.add_frame(&waiting);
        self.waiting = waiting;
        self.waiting.clear();
        added
    }

    fn add_frame(&mut self, content: &[u8]) -> Result<(), WalError> {
        self.frame.clear();
        self.frame.reserve(zstd::zstd_safe::compress_bound(content.len()));
        self.compressor.compress_to_buffer(content, &mut self.frame).map_err(WalError::Compress)?;
        self.frames.update(&self.frame);
        self.frames_size += self.frame.len() as u64;
        self.output.add(&self.frame)
    }
}

fn compressor(level: i32) -> io::Result<zstd::bulk::Compressor<'static>> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    if level == TUNED_LEVEL {
        compressor.set_parameter(CParameter::Strategy(Strategy::ZSTD_fast))?;
        compressor.set_parameter(CParameter::HashLog(TUNED_TABLE_LOG))?;
        compressor.set_parameter(CParameter::MinMatch(TUNED_MATCH_BYTES))?;
    }
    Ok(compressor)
}

/// PostgreSQL's `infinity` and what lies beyond the years that are written with four digits is left out.
fn timestamp(time: PgTimestamp) -> Option<Timestamp> {
    Timestamp::from_microsecond(time.unix_micros()).ok()
}

impl Output {
    fn new(sink: Sink) -> Self {
        let limit = match sink {
            Sink::Memory => None,
            Sink::Bounded { memory_bytes, overflow } => Some((memory_bytes, overflow)),
        };
        Self::Memory { object: Vec::new(), limit }
    }

    fn add(&mut self, frame: &[u8]) -> Result<(), WalError> {
        match self {
            Self::File { file, path } => {
                file.write_all(frame).map_err(|source| WalError::Overflow { path: path.clone(), source })
            }
            Self::Memory { object, limit } => {
                if object.is_empty() {
                    // All of it at once: growing step by step would hold the old and the new room together. What stays
                    // unused costs address space alone.
                    object.reserve_exact(limit.as_ref().map_or(0, |(bytes, _)| *bytes));
                    object.resize(HEADER_BYTES, 0);
                }
                match limit {
                    Some((bytes, path)) if object.len() + frame.len() > *bytes => {
                        *self = move_to_file(object, frame, path)?;
                    }
                    _ => object.extend_from_slice(frame),
                }
                Ok(())
            }
        }
    }

    /// Writes the header into its room. Gives the object.
    fn finish(self, header: &[u8; HEADER_BYTES]) -> Result<Body, WalError> {
        match self {
            Self::Memory { mut object, .. } => {
                object.resize(object.len().max(HEADER_BYTES), 0);
                object[..HEADER_BYTES].copy_from_slice(header);
                object.shrink_to_fit();
                Ok(Body::Memory(Bytes::from(object)))
            }
            Self::File { mut file, path } => match finish_file(&mut file, header) {
                Ok(len) => Ok(Body::File { path, len }),
                Err(source) => Err(WalError::Overflow { path, source }),
            },
        }
    }
}

fn move_to_file(object: &[u8], frame: &[u8], path: &PathBuf) -> Result<Output, WalError> {
    let written = || {
        let mut file = File::options().write(true).create(true).truncate(true).open(path)?;
        file.write_all(object)?;
        file.write_all(frame)?;
        Ok(file)
    };
    match written() {
        Ok(file) => Ok(Output::File { file, path: path.clone() }),
        Err(source) => Err(WalError::Overflow { path: path.clone(), source }),
    }
}

/// Gives the length of the object.
fn finish_file(file: &mut File, header: &[u8; HEADER_BYTES]) -> io::Result<u64> {
    let len = file.stream_position()?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(header)?;
    Ok(len)
}
