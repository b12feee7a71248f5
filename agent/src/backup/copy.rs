//! The copying part of a backup: readers on threads of their own, uploads of the packs they finish, the watch over the
//! server's session, and `pg_control` at the end.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use postgres_format::control_file::{ControlError, ControlFile};
use postgres_format::{FullTransactionId, Lsn};
use repository::backup::manifest::Pack;
use repository::backup::note::{Attempt, NotedPack};
use repository::key;
use repository::name::{BackupId, ClusterName};
use repository::store::Body;
use tokio::sync::mpsc;

use super::assembly::{CopiedFile, Extents, Home, Results};
use super::capture::Capture;
use super::changes::Geometry;
use super::holder::Holder;
use super::notes::{NoteObject, Notes, noted};
use super::pace::Wish;
use super::pages::PageCheck;
use super::part::Side;
use super::plan::{CopyPlan, Planned};
use super::reader::{ReadPack, Reader, Shared, What};
use super::resume::Resume;
use super::road::{BackupRoad, RoadError};
use super::rows::{Runs, Sorted};
use super::{BackupError, BackupLines, BackupNode, BackupRequest, PACKS_IN_MEMORY_BYTES, Step};
use crate::postgres::BackupStart;
use crate::postgres::live::BACKUP_PING;

/// Largest pack, in bytes.
const PACK_BYTES_MAX: u64 = 16 << 20;
/// Smallest pack worth an object, in bytes.
const PACK_BYTES_MIN: u64 = 2 << 20;
/// Packs sent at the same time.
const UPLOADS: usize = 2;
/// Most readers.
const READERS_MAX: usize = 32;
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// How long the last note of a copy that failed may take.
const LAST_NOTE_PATIENCE: Duration = Duration::from_secs(10);
/// Attempts to read a `pg_control` that the server is not writing at that moment.
const CONTROL_ATTEMPTS: u32 = 10;
/// Wait between those attempts.
const CONTROL_WAIT: Duration = Duration::from_millis(10);

/// What is to be copied.
pub(super) struct Work {
    pub(super) plan: CopyPlan,
    /// The LSN from which on a page counts as changed, where pages tell.
    pub(super) since: Option<Lsn>,
    /// Sizes by which pages are counted.
    pub(super) geometry: Geometry,
    /// What earlier attempts left, and how many bytes of the plan that is.
    pub(super) resume: (Resume, u64),
    pub(super) capture: Capture,
    /// As it was before the first file was read.
    pub(super) control: ControlFile,
}

/// Everything the readers brought home.
pub(super) struct Copied {
    pub(super) shared: Arc<Shared>,
    home: Home,
    pub(super) capture: Capture,
    /// As it was after all other files had been read.
    pub(super) control: ControlFile,
    /// The next transaction's id at the last checkpoint before the first file was read.
    pub(super) start_next_xid: Option<FullTransactionId>,
    packs: Sorted<u32, Pack>,
}

impl Copied {
    /// All files that are in the backup, in order of their numbers.
    pub(super) fn files(&self) -> io::Result<impl Iterator<Item = io::Result<(Planned, CopiedFile)>> + '_> {
        let captured = self.capture.planned(self.shared.plan.count);
        self.home.join(self.shared.plan.files().chain(captured.map(Ok)))
    }

    /// Its own packs, in order of their numbers.
    pub(super) fn packs(&self) -> io::Result<impl Iterator<Item = io::Result<Pack>> + use<>> {
        Ok(self.packs.iter()?.map(|row| row.map(|(_, pack)| pack)))
    }
}

/// Copies all files, then `pg_control`, into packs that are durable on return; their numbers begin at `first_pack`.
pub(super) async fn copy(
    node: &BackupNode,
    request: &BackupRequest,
    road: &BackupRoad,
    lines: &BackupLines<'_>,
    work: Work,
    (holder, start, first_pack): (&Holder<'_>, &BackupStart, u32),
    attempt: Attempt,
) -> Result<Copied, BackupError> {
    let Work { plan, since, geometry, resume: (resume, held_bytes), capture, control: at_start } = work;
    let readers = readers(request.parallel, node.parallel);
    let bytes_per_second = request.bytes_per_second.unwrap_or(node.bytes_per_second);
    // Some begin idle, so that more may read later on.
    let threads = readers.max(self::readers(0, 0));
    let most = Some(readers).filter(|readers| *readers < threads).unwrap_or(0);
    node.pace.change(Wish { bytes_per_second: Some(bytes_per_second), readers: Some(most) });
    let pack_bytes = (PACKS_IN_MEMORY_BYTES / (threads + UPLOADS + 1) as u64).clamp(PACK_BYTES_MIN, PACK_BYTES_MAX);
    let check = PageCheck::new(start.start_lsn, &at_start);
    let directory = node.data_directory.clone();
    let pace = Arc::clone(&node.pace);
    let what = What { plan, since, geometry, resume, first_pack, pace };
    let results = Results::create_in(&node.scratch).map_err(BackupError::Scratch)?;
    let shared = Arc::new(Shared::new(directory, what, check, node.compression_level, pack_bytes, results));
    let _stop = StopReaders(shared.clone());
    let (packs, incoming) = mpsc::channel(1);
    let threads = (0..threads)
        .map(|number| spawn_reader(number, Reader::new(number, shared.clone(), packs.clone())?))
        .collect::<Result<Vec<_>, _>>()?;
    drop(packs);
    let mut uploads = Uploads::new(road, node, &request.backup, attempt).map_err(BackupError::Scratch)?;
    let sent = conduct(lines, &shared, held_bytes, (holder, start), incoming, &mut uploads).await;
    if sent.is_err() {
        shared.stop();
        uploads.note_the_rest(lines).await;
    }
    let mut failed = None;
    for thread in threads {
        match thread.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failed = worse(failed, error),
            Err(_) => failed = Some(BackupError::Reader),
        }
    }
    // A reader that cannot send ends with "cancelled"; the reason is what ended the uploads.
    match (failed, sent) {
        (None | Some(BackupError::Cancelled), Err(error)) => return Err(error),
        (Some(error), _) => return Err(error),
        (None, Ok(())) => {}
    }
    copy_captured(&shared, &capture, &mut uploads).await?;
    let control = copy_control(node, holder.side(), &shared, &mut uploads).await?;
    let Uploads { packs, extents, .. } = uploads;
    let (read, scratch) = (shared.clone(), node.scratch.clone());
    let bring_home = move || Ok((Home::new(read.take_results(&scratch)?, extents)?, packs.finish()?));
    let brought = tokio::task::spawn_blocking(bring_home);
    let brought = async { brought.await.map_err(|_| BackupError::Reader)?.map_err(BackupError::Scratch) };
    let (home, packs) = holder.while_it_runs(start, brought).await?;
    let start_next_xid = at_start.next_xid;
    Ok(Copied { home, capture, control, start_next_xid, packs, shared })
}

/// Ends the readers when the copy ends, however it ends.
struct StopReaders(Arc<Shared>);

impl Drop for StopReaders {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn readers(asked: usize, setting: usize) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let wanted = [asked, setting].into_iter().find(|wanted| *wanted > 0).unwrap_or_else(cores);
    wanted.min(READERS_MAX)
}

type ReaderEnd = tokio::sync::oneshot::Receiver<Result<(), BackupError>>;

/// A reader on a thread of its own; the channel tells its end.
fn spawn_reader(number: usize, reader: Reader) -> Result<ReaderEnd, BackupError> {
    let (end, ended) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name(format!("backup-{number}"));
    let spawned = thread.spawn(move || {
        // The conductor may have given up; then nobody waits for the result.
        let _ = end.send(reader.run());
    });
    spawned.map_err(|source| BackupError::Read { path: PathBuf::from("a new thread"), source })?;
    Ok(ended)
}

/// The more telling of two errors: "cancelled" only says that another reader or an upload failed.
fn worse(before: Option<BackupError>, error: BackupError) -> Option<BackupError> {
    match before {
        Some(before) if !matches!(before, BackupError::Cancelled) => Some(before),
        _ => Some(error),
    }
}

/// Packs on their way into the repository, and what they hold.
struct Uploads<'a> {
    road: &'a BackupRoad,
    cluster: &'a ClusterName,
    backup: &'a BackupId,
    packs: Runs<u32, Pack>,
    extents: Extents,
    notes: Notes,
}

/// What has arrived.
enum Sent {
    /// A pack, and what a note may tell of it.
    Pack(Option<NotedPack>),
    /// A note; false if it was not taken.
    Note(bool),
}

impl<'a> Uploads<'a> {
    fn new(road: &'a BackupRoad, node: &'a BackupNode, backup: &'a BackupId, attempt: Attempt) -> io::Result<Self> {
        let (packs, extents) = (Runs::create_in(&node.scratch)?, Extents::create_in(&node.scratch)?);
        Ok(Self { road, cluster: &node.cluster, backup, packs, extents, notes: Notes::new(attempt) })
    }

    fn send(&mut self, read: ReadPack) -> io::Result<BoxFuture<'a, Result<Sent, RoadError>>> {
        let noted = noted(&read);
        let pack = read.pack;
        let told = Pack { backup: None, number: pack.number, size: pack.size, sha256: pack.sha256 };
        self.packs.push(pack.number, told, 0)?;
        pack.extents.into_iter().try_for_each(|(file, extent)| self.extents.push(file.0, extent))?;
        let (road, key) = (self.road, key::pack(self.cluster, self.backup, pack.number));
        let sending = async move {
            road.put(&key, &pack.body, &pack.sha256).await?;
            process::crash_point!("agent/after-pack-before-next");
            Ok(Sent::Pack(noted))
        };
        Ok(sending.boxed())
    }

    fn send_note(&self, note: NoteObject) -> BoxFuture<'a, Result<Sent, RoadError>> {
        let road = self.road;
        async move {
            let put = road.put(&note.key, &Body::Memory(note.bytes), &note.sha256).await;
            if let Err(error) = &put {
                tracing::info!(key = %note.key, error = crate::archive::ship::chain(error), "a note was not taken");
            }
            Ok(Sent::Note(put.is_ok()))
        }
        .boxed()
    }

    /// Takes account of what has arrived; gives the note that is due then.
    fn arrived(&mut self, sent: Sent, lines: &BackupLines<'_>) -> Option<BoxFuture<'a, Result<Sent, RoadError>>> {
        match sent {
            Sent::Pack(noted) => noted.into_iter().for_each(|pack| self.notes.add(pack)),
            Sent::Note(true) => lines.progress.send_modify(|progress| progress.kept = true),
            Sent::Note(false) => self.notes.refuse(),
        }
        let due = self.notes.due()?;
        Some(self.send_note(due))
    }

    /// After a failure: what is durable shall not be lost to the next attempt.
    async fn note_the_rest(&mut self, lines: &BackupLines<'_>) {
        let Some(note) = self.notes.rest() else { return };
        if let Ok(Ok(sent)) = tokio::time::timeout(LAST_NOTE_PATIENCE, self.send_note(note)).await {
            let _ = self.arrived(sent, lines);
        }
    }
}

/// Sends packs, tells progress and watches the server's session until the readers are done.
async fn conduct(
    lines: &BackupLines<'_>,
    shared: &Shared,
    held_bytes: u64,
    (holder, start): (&Holder<'_>, &BackupStart),
    mut incoming: mpsc::Receiver<ReadPack>,
    uploads: &mut Uploads<'_>,
) -> Result<(), BackupError> {
    let total = shared.plan.bytes;
    let mut progress = tokio::time::interval(PROGRESS_EVERY);
    let mut ping = tokio::time::interval(BACKUP_PING);
    let mut under_way = FuturesUnordered::new();
    let mut reading = true;
    while reading || !under_way.is_empty() {
        tokio::select! {
            pack = incoming.recv(), if reading && under_way.len() < UPLOADS => match pack {
                Some(pack) => under_way.push(uploads.send(pack).map_err(BackupError::Scratch)?),
                None => reading = false,
            },
            Some(sent) = under_way.next() => under_way.extend(uploads.arrived(sent?, lines)),
            _ = progress.tick() => {
                let bytes_done = (held_bytes + shared.bytes_done()).min(total);
                lines.tell(Step::Copying, bytes_done, total);
            }
            _ = ping.tick() => holder.check(start).await?,
        }
    }
    Ok(())
}

/// Sends what a reader packs from memory; its packs are few and small.
async fn pack_from_memory(
    shared: &Arc<Shared>,
    uploads: &mut Uploads<'_>,
    contents: Vec<(u32, Vec<u8>)>,
) -> Result<(), BackupError> {
    let (packs, mut incoming) = mpsc::channel(1);
    let reader = Reader::new(0, shared.clone(), packs)?;
    let packing = tokio::task::spawn_blocking(move || reader.run_memory(&contents));
    while let Some(pack) = incoming.recv().await {
        uploads.send(pack).map_err(BackupError::Scratch)?.await?;
    }
    packing.await.map_err(|_| BackupError::Reader)?
}

/// Captured configuration gets the file numbers after those of the plan.
async fn copy_captured(shared: &Arc<Shared>, capture: &Capture, uploads: &mut Uploads<'_>) -> Result<(), BackupError> {
    let first = shared.plan.count;
    let contents = (first..).zip(&capture.files).map(|(number, file)| (number, file.bytes.clone())).collect();
    pack_from_memory(shared, uploads, contents).await
}

/// Of a standby whose primary holds the backup it is only read.
async fn copy_control(
    node: &BackupNode,
    side: Side,
    shared: &Arc<Shared>,
    uploads: &mut Uploads<'_>,
) -> Result<ControlFile, BackupError> {
    let (control, bytes) = read_control(&node.data_directory).await?;
    if side == Side::Standby {
        return Ok(control);
    }
    let number = shared
        .plan
        .control_file
        .ok_or_else(|| BackupError::Vanished { path: node.data_directory.join("global/pg_control") })?;
    pack_from_memory(shared, uploads, vec![(number, bytes)]).await?;
    Ok(control)
}

/// Reads `pg_control` until its checksum is right: the server overwrites it in place.
pub(super) async fn read_control(data_directory: &Path) -> Result<(ControlFile, Vec<u8>), BackupError> {
    let path = data_directory.join("global/pg_control");
    let mut attempt = 1;
    loop {
        let bytes = tokio::fs::read(&path).await.map_err(|source| BackupError::Read { path: path.clone(), source })?;
        match ControlFile::parse(&bytes) {
            Ok(control) => return Ok((control, bytes)),
            Err(ControlError::Checksum { .. } | ControlError::Size { .. }) if attempt < CONTROL_ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(CONTROL_WAIT).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_are_asked_set_or_one_a_core() {
        assert_eq!(readers(3, 2), 3);
        assert_eq!(readers(0, 2), 2);
        assert!(readers(0, 0) >= 1);
        assert_eq!(readers(1000, 0), READERS_MAX);
    }
}
