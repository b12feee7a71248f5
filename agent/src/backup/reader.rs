//! The readers of a backup: threads that take piece after piece, check pages, and pack what they read.
//!
//! Files change while they are read; that is fine, WAL makes the copy consistent. The rules: a file that is gone is left
//! out, unless a server cannot start without it; a file that grew is copied up to the size it had when opened; one that
//! shrank is copied as far as it goes; a read that fails fails the backup, nothing is ever filled with zeros.
//!
//! Of a file that inherits, only what changed is packed: whole pages, gathered in sparse frames, and what lies beyond the
//! parent's length, contiguous. Every page that is read is checked, also one that is not taken.
//!
//! A reader holds one buffer and one open pack. Packs go through a bounded channel to the uploads, which makes slow
//! uploads slow the readers instead of growing memory. What became of pieces is written down on disk. Before it reads a reader
//! asks for its turn ([`super::pace`]), and what it brought into the page cache goes out again.

mod changed;
mod courtesy;
mod rest;

use std::collections::VecDeque;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use postgres_format::Lsn;
use postgres_format::data_directory::FileKind;
use repository::backup::pack::{FRAME_LIMIT_BYTES, FileNumber, FinishedPack, PackBuilder};
use repository::byte_text::RelativePath;
use tokio::sync::mpsc;

use super::BackupError;
use super::assembly::{PieceEnd, PieceMetadata, PieceResult, Reach, Results};
use super::changes::{Geometry, Take, main_fork};
use super::pace::Pace;
use super::pages::{PageCheck, PageFindings};
use super::plan::{CopyPlan, Piece, Planned, Share};
use super::resume::{Rest, Resume};
use super::rows::RowReader;
use changed::Gathered;
use courtesy::Uncached;

/// Bytes read at once.
const BUFFER_BYTES: usize = 1 << 20;

/// What all readers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) data_directory: PathBuf,
    pub(super) plan: CopyPlan,
    pub(super) check: PageCheck,
    /// The LSN from which on a page counts as changed, where pages tell.
    pub(super) since: Option<Lsn>,
    /// Sizes by which pages are counted.
    pub(super) geometry: Geometry,
    /// What earlier attempts left, which is not sent again.
    pub(super) resume: Resume,
    /// How fast they may read, and how many of them.
    pub(super) pace: Arc<Pace>,
    /// zstd level of the frames.
    pub(super) level: i32,
    /// A pack is sent once it has this many bytes.
    pub(super) pack_bytes: u64,
    pieces: Mutex<Pieces>,
    results: Mutex<Results>,
    next_pack: AtomicU32,
    /// Whether the last piece was taken.
    drained: AtomicBool,
    stop: AtomicBool,
    bytes_done: AtomicU64,
}

/// What is copied, and what of it is there already.
pub(super) struct What {
    pub(super) plan: CopyPlan,
    pub(super) since: Option<Lsn>,
    pub(super) geometry: Geometry,
    pub(super) resume: Resume,
    /// Number of the first pack.
    pub(super) first_pack: u32,
    pub(super) pace: Arc<Pace>,
}

/// The work that no reader has taken yet, in order.
#[derive(Debug)]
struct Pieces {
    files: RowReader<Planned>,
    ready: VecDeque<(Arc<Planned>, Piece)>,
    page_bytes: u64,
}

impl Pieces {
    fn next(&mut self) -> io::Result<Option<(Arc<Planned>, Piece)>> {
        while self.ready.is_empty() {
            let Some(planned) = self.files.next().transpose()? else { return Ok(None) };
            let planned = Arc::new(planned);
            let pieces = planned.pieces(self.page_bytes).into_iter();
            self.ready.extend(pieces.map(|piece| (Arc::clone(&planned), piece)));
        }
        Ok(self.ready.pop_front())
    }
}

/// A pack, and what was seen in its pages.
#[derive(Debug)]
pub(super) struct ReadPack {
    pub(super) pack: FinishedPack,
    /// Main forks of relations that it holds something of, with their numbers, in order.
    pub(super) files: Vec<(u32, RelativePath)>,
    /// Whether a corrupt page may be among them.
    pub(super) corrupt: bool,
    /// The highest LSN of a page that was not verified because WAL holds it.
    pub(super) newest_lsn: Option<Lsn>,
}

impl Shared {
    pub(super) fn new(
        data_directory: PathBuf,
        what: What,
        check: PageCheck,
        level: i32,
        pack_bytes: u64,
        results: Results,
    ) -> Self {
        let What { plan, since, geometry, resume, first_pack, pace } = what;
        let pieces = Pieces { files: plan.files(), ready: VecDeque::new(), page_bytes: geometry.page_bytes };
        Self {
            data_directory,
            plan,
            check,
            since,
            geometry,
            resume,
            pace,
            level,
            pack_bytes,
            pieces: Mutex::new(pieces),
            results: Mutex::new(results),
            next_pack: AtomicU32::new(first_pack),
            drained: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            bytes_done: AtomicU64::new(0),
        }
    }

    /// Makes all readers end after the buffer they are at.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Number of the next pack, which is the first free one when no reader is left.
    pub(super) fn free_pack(&self) -> u32 {
        self.next_pack.load(Ordering::Relaxed)
    }

    /// Bytes read so far.
    pub(super) fn bytes_done(&self) -> u64 {
        self.bytes_done.load(Ordering::Relaxed)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn take_piece(&self) -> Result<Option<(Arc<Planned>, Piece)>, BackupError> {
        if self.stopped() {
            return Ok(None);
        }
        let next = self.pieces.lock().unwrap_or_else(PoisonError::into_inner).next().map_err(BackupError::Scratch)?;
        self.drained.fetch_or(next.is_none(), Ordering::Relaxed);
        Ok(next)
    }

    /// Whether there is nothing more to wait for.
    fn ended(&self) -> bool {
        self.stopped() || self.drained.load(Ordering::Relaxed)
    }

    fn write_down(&self, result: PieceResult) -> Result<(), BackupError> {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        results.push(result).map_err(BackupError::Scratch)
    }

    /// What became of pieces, once no reader is left; the next time there is nothing of it.
    pub(super) fn take_results(&self, scratch: &Path) -> io::Result<Results> {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::replace(&mut *results, Results::create_in(scratch)?))
    }
}

/// One reader.
pub(super) struct Reader {
    number: usize,
    shared: Arc<Shared>,
    packs: mpsc::Sender<ReadPack>,
    builder: PackBuilder,
    buffer: Vec<u8>,
    gathered: Gathered,
    /// The file of the plan that is read.
    current: Option<Arc<Planned>>,
    /// Main forks of relations of which the open pack holds something.
    files: Vec<(u32, RelativePath)>,
    corrupt: bool,
    newest_lsn: Option<Lsn>,
}

/// A piece's file, opened.
struct Opened<'a> {
    piece: Piece,
    planned: &'a Planned,
    path: &'a Path,
    file: File,
    metadata: Metadata,
    /// Which file of a relation it is, if it is one.
    segment: Option<u32>,
}

impl Opened<'_> {
    fn refused(&self, source: io::Error) -> BackupError {
        BackupError::Read { path: self.path.to_owned(), source }
    }

    fn result(&self, reach: Reach, crc32c: Option<u32>, pages: PageFindings) -> PieceResult {
        let metadata = PieceMetadata { mode: self.metadata.mode() & 0o7777, modified_unix: self.metadata.mtime() };
        let end = PieceEnd::Copied { reach, crc32c, metadata: Some(metadata) };
        PieceResult { file: self.piece.file, from: self.piece.from, end, pages }
    }
}

impl Reader {
    /// One of several, numbered from 0.
    pub(super) fn new(number: usize, shared: Arc<Shared>, packs: mpsc::Sender<ReadPack>) -> Result<Self, BackupError> {
        let builder = PackBuilder::new(shared.level, shared.pack_bytes).map_err(BackupError::Pack)?;
        let (buffer, gathered) = (vec![0; BUFFER_BYTES], Gathered::default());
        Ok(Self {
            number,
            shared,
            packs,
            builder,
            buffer,
            gathered,
            current: None,
            files: Vec::new(),
            corrupt: false,
            newest_lsn: None,
        })
    }

    /// Reads pieces until none is left or all are told to stop.
    pub(super) fn run(mut self) -> Result<(), BackupError> {
        loop {
            self.await_turn()?;
            let Some((planned, piece)) = self.shared.take_piece()? else { break };
            let result = self.read_piece(&planned, piece)?;
            self.shared.write_down(result)?;
        }
        if self.shared.stopped() {
            return Err(BackupError::Cancelled);
        }
        self.finish_pack()
    }

    /// Waits while there are more readers than may read. What was packed is sent, lest others wait for it.
    fn await_turn(&mut self) -> Result<(), BackupError> {
        while !self.shared.pace.lets(self.number) && !self.shared.ended() {
            self.finish_pack()?;
            Pace::rest();
        }
        Ok(())
    }

    /// Packs contents that are in memory already, each as a whole file.
    pub(super) fn run_memory(mut self, contents: &[(u32, Vec<u8>)]) -> Result<(), BackupError> {
        for (file, bytes) in contents {
            self.pack(*file, 0, bytes)?;
            let reach = Reach::All { bytes: bytes.len() as u64 };
            let end = PieceEnd::Copied { reach, crc32c: Some(crc32c::crc32c(bytes)), metadata: None };
            self.shared.write_down(PieceResult { file: *file, from: 0, end, pages: PageFindings::default() })?;
        }
        self.finish_pack()
    }

    fn read_piece(&mut self, planned: &Arc<Planned>, piece: Piece) -> Result<PieceResult, BackupError> {
        let shared = Arc::clone(&self.shared);
        self.builder.part();
        let rest = planned.rest.as_ref().map(|rest| rest.within(&piece, shared.geometry.page_bytes));
        if rest.as_ref().is_some_and(Rest::is_empty) {
            return Ok(rest::untouched(&piece));
        }
        self.current = Some(Arc::clone(planned));
        let listed = &planned.listed;
        let path = shared.data_directory.join(&listed.path);
        let refused = |source| BackupError::Read { path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if matches!(listed.kind, FileKind::VersionFile | FileKind::FilenodeMap | FileKind::ControlFile)
                    && path.parent().is_some_and(Path::exists)
                {
                    return Err(BackupError::Vanished { path });
                }
                return Ok(PieceResult::vanished(piece.file, piece.from));
            }
            Err(source) => return Err(refused(source)),
        };
        let metadata = file.metadata().map_err(refused)?;
        let segment = match &listed.kind {
            FileKind::Relation(relation) => Some(relation.segment),
            _ => None,
        };
        let opened = Opened { piece, planned, path: &path, file, metadata, segment };
        let uncached = Uncached::before(&opened.file, piece.from, piece.to.min(opened.metadata.len()));
        let result = match (rest, planned.take) {
            (Some(rest), _) => self.read_rest(&opened, &rest),
            (None, Take::Newer { inherited_blocks }) => self.read_newer(&opened, inherited_blocks),
            (None, Take::Listed { inherited_blocks }) => self.read_listed(&opened, inherited_blocks),
            (None, Take::Whole | Take::Nothing) => self.read_through(&opened),
        };
        uncached.give_up();
        result
    }

    /// Packs all bytes of a piece.
    fn read_through(&mut self, opened: &Opened<'_>) -> Result<PieceResult, BackupError> {
        let piece = opened.piece;
        let end = match piece.share {
            Share::Whole => opened.metadata.len(),
            Share::Part => piece.to,
        };
        let (mut at, mut crc, mut pages) = (piece.from, 0, PageFindings::default());
        while at < end && !self.shared.stopped() {
            let wanted = usize::try_from(end - at).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
            let (got, _) = self.read_checked(opened, at, wanted, &mut pages)?;
            crc = crc32c::crc32c_append(crc, &self.buffer[..got]);
            self.pack_buffer(piece.file, at, got)?;
            at += got as u64;
            if got < wanted {
                break;
            }
        }
        let bytes = at - piece.from;
        let reach = if piece.share == Share::Part && at < end { Reach::Short { bytes } } else { Reach::All { bytes } };
        Ok(opened.result(reach, Some(crc), pages))
    }

    /// Reads into the buffer and checks pages of relations. Gives how much there was, and the blocks whose bytes cannot be
    /// believed.
    fn read_checked(
        &mut self,
        opened: &Opened<'_>,
        at: u64,
        wanted: usize,
        pages: &mut PageFindings,
    ) -> Result<(usize, Vec<u32>), BackupError> {
        if self.builder.has_no_frames() && self.gathered.is_empty() {
            (self.corrupt, self.newest_lsn) = (false, None);
        }
        self.shared.pace.wait(wanted as u64, || self.shared.stopped());
        let buffer = &mut self.buffer[..wanted];
        let got = read_at_most(&opened.file, buffer, at).map_err(|source| opened.refused(source))?;
        self.shared.bytes_done.fetch_add(got as u64, Ordering::Relaxed);
        let Some(segment) = opened.segment else { return Ok((got, Vec::new())) };
        let inspected = self.shared.check.inspect(&opened.file, segment, at, &mut buffer[..got], pages);
        let doubtful = inspected.map_err(|source| opened.refused(source))?;
        self.corrupt |= pages.has_corrupt();
        self.newest_lsn = self.newest_lsn.max(pages.newest_lsn());
        Ok((got, doubtful))
    }

    /// Packs the first bytes of the buffer, which were read from byte `at` of a file.
    fn pack_buffer(&mut self, file: u32, at: u64, bytes: usize) -> Result<(), BackupError> {
        let buffer = std::mem::take(&mut self.buffer);
        let packed = self.pack(file, at, &buffer[..bytes]);
        self.buffer = buffer;
        packed
    }

    /// Puts one buffer into frames, sending packs that have become full.
    fn pack(&mut self, file: u32, at: u64, bytes: &[u8]) -> Result<(), BackupError> {
        let mut at = at;
        for frame in bytes.chunks(FRAME_LIMIT_BYTES) {
            self.hold_file();
            self.builder.add(FileNumber(file), at, frame).map_err(BackupError::Pack)?;
            at += frame.len() as u64;
            if self.builder.is_full() {
                self.finish_pack()?;
            }
        }
        Ok(())
    }

    /// The open pack is about to hold something of the file that is read.
    fn hold_file(&mut self) {
        let Some(current) = &self.current else { return };
        let known = self.files.last().is_some_and(|(number, _)| *number == current.number);
        if !known && main_fork(&current.listed, &self.shared.geometry).is_some() {
            let path = RelativePath::new(current.listed.path.as_os_str().as_bytes()).ok();
            self.files.extend(path.map(|path| (current.number, path)));
        }
    }

    fn finish_pack(&mut self) -> Result<(), BackupError> {
        if self.builder.has_no_frames() {
            return Ok(());
        }
        let number = self.shared.next_pack.fetch_add(1, Ordering::Relaxed);
        // The uploads have ended only if one failed, and then they say why.
        let (pack, corrupt, newest_lsn) = (self.builder.finish(number), self.corrupt, self.newest_lsn);
        let files = std::mem::take(&mut self.files);
        self.packs.blocking_send(ReadPack { pack, files, corrupt, newest_lsn }).map_err(|_| BackupError::Cancelled)
    }
}

/// Reads until the buffer is full or the file ends.
pub(super) fn read_at_most(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], at + got as u64) {
            Ok(0) => break,
            Ok(count) => got += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}
