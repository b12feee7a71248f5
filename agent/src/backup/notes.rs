//! Notes of this backup about the packs it has stored, for a later attempt to go on from if this one comes to no end.
//!
//! A note follows its packs: what it tells of is durable. So of what was stored at most [`NOTE_PACKS`] packs, or those of
//! [`NOTE_EVERY`], are lost with the agent. Notes are a help, never a condition: where none is taken, as by a coordinator of
//! an older version, the backup goes on without.

use std::time::Duration;

use bytes::Bytes;
use repository::backup::note::{Attempt, Note, NotedFile, NotedPack};
use repository::digest;
use repository::key::{self, ObjectKey};
use tokio::time::Instant;

use super::reader::ReadPack;

/// Packs that one note tells of.
const NOTE_PACKS: usize = 4;
/// Files that one note tells of, at which it is due before.
const NOTE_FILES: usize = 20_000;
/// How long a pack waits for a note.
const NOTE_EVERY: Duration = Duration::from_secs(10);

/// Packs that no note tells of yet.
#[derive(Debug)]
pub(super) struct Notes {
    attempt: Attempt,
    pending: Vec<NotedPack>,
    since: Instant,
    next: u32,
    refused: bool,
}

/// A note to be stored.
#[derive(Clone, Debug)]
pub(super) struct NoteObject {
    pub(super) key: ObjectKey,
    pub(super) bytes: Bytes,
    pub(super) sha256: [u8; 32],
}

impl Notes {
    /// Of an attempt that begins.
    pub(super) fn new(attempt: Attempt) -> Self {
        Self { attempt, pending: Vec::new(), since: Instant::now(), next: 0, refused: false }
    }

    /// Takes note of a pack that is durable.
    pub(super) fn add(&mut self, pack: NotedPack) {
        if self.pending.is_empty() {
            self.since = Instant::now();
        }
        self.pending.push(pack);
    }

    /// Tells of no more packs: notes are not taken.
    pub(super) fn refuse(&mut self) {
        self.refused = true;
        self.pending.clear();
    }

    /// The next note, if one is due.
    pub(super) fn due(&mut self) -> Option<NoteObject> {
        let files: usize = self.pending.iter().map(|pack| pack.files.len()).sum();
        let due = self.pending.len() >= NOTE_PACKS || files >= NOTE_FILES || self.since.elapsed() >= NOTE_EVERY;
        if due { self.rest() } else { None }
    }

    /// A note of all packs that none tells of yet.
    pub(super) fn rest(&mut self) -> Option<NoteObject> {
        if self.refused || self.pending.is_empty() {
            return None;
        }
        let key = key::note(&self.attempt.cluster, &self.attempt.backup, self.next);
        self.next += 1;
        self.since = Instant::now();
        let bytes = Note::new(self.attempt.clone(), std::mem::take(&mut self.pending)).to_bytes();
        let sha256 = digest::sha256(&bytes);
        Some(NoteObject { key, bytes, sha256 })
    }
}

/// What a note tells of a pack; nothing if a page in it is corrupt, which must be found again, or if it has nothing that
/// could be referred to.
pub(super) fn noted(read: &ReadPack) -> Option<NotedPack> {
    if read.corrupt {
        return None;
    }
    let mut files: Vec<NotedFile> = Vec::new();
    for (number, extent) in &read.pack.extents {
        if let Some(last) = files.last_mut().filter(|last| last.number == *number) {
            last.extents.push(*extent);
            continue;
        }
        let Ok(place) = read.files.binary_search_by_key(&number.0, |(number, _)| *number) else { continue };
        let path = read.files[place].1.clone();
        files.push(NotedFile { path, number: *number, extents: vec![*extent] });
    }
    let pack = &read.pack;
    let (number, size, sha256, newest_lsn) = (pack.number, pack.size, pack.sha256, read.newest_lsn);
    (!files.is_empty()).then_some(NotedPack { number, size, sha256, newest_lsn, files })
}
