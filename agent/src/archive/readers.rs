//! The threads that read and compress WAL, and the memory their results may take.
//!
//! Invariants: a fixed number of threads, each with one buffer and one compressor, whatever the backlog. Compressed bodies
//! together stay within one budget of bytes; a body that outgrows its share goes to a file in the spool, which is removed
//! with the last use of it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use repository::store::Body;
use repository::wal::{Sink, WalEncoder};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::admit::{Admission, AdmitError, Admitted, admit};

/// Unit of the budget, in bytes; permits are counted in 32 bits.
const BUDGET_UNIT_BYTES: u64 = 4096;
/// Smallest share of the budget a body starts with, in bytes.
const SHARE_BYTES_MIN: u64 = 1 << 20;

/// Threads that read and compress.
#[derive(Debug)]
pub struct Readers {
    queue: Option<SyncSender<Work>>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Work {
    admission: Admission,
    answer: oneshot::Sender<Result<Admitted, AdmitError>>,
}

impl Readers {
    /// Starts `count` threads; `waiting_max` files may wait for one.
    ///
    /// # Errors
    /// When the system gives no more threads.
    pub fn start(count: usize, waiting_max: usize) -> std::io::Result<Self> {
        let (queue, work) = sync_channel(waiting_max);
        let work = Arc::new(Mutex::new(work));
        let threads = (0..count)
            .map(|number| {
                let work = Arc::clone(&work);
                std::thread::Builder::new().name(format!("wal-reader-{number}")).spawn(move || read_all(&work))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { queue: Some(queue), threads })
    }

    /// Reads one file on one of the threads.
    ///
    /// # Errors
    /// As [`admit`]; [`AdmitError::Stopped`] when there are more files than were to wait, or the threads have ended.
    pub async fn read(&self, admission: Admission) -> Result<Admitted, AdmitError> {
        let (answer, result) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(AdmitError::Stopped)?;
        queue.try_send(Work { admission, answer }).map_err(|_| AdmitError::Stopped)?;
        result.await.unwrap_or(Err(AdmitError::Stopped))
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.queue = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

fn read_all(queue: &Mutex<Receiver<Work>>) {
    let mut buffer = Vec::new();
    let mut encoder = None;
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Work { admission, answer }) = next else { return };
        if answer.is_closed() {
            continue;
        }
        let result = match encoder.take().map_or_else(|| WalEncoder::new(admission.compression_level, Sink::Memory), Ok)
        {
            Ok(mut ready) => {
                let result = admit(&admission, &mut ready, &mut buffer);
                encoder = Some(ready);
                result
            }
            Err(source) => Err(AdmitError::Encode { name: admission.name, source: Box::new(source) }),
        };
        if let Err(Ok(Admitted { wal, .. })) = answer.send(result) {
            drop(OverflowFile::of(&wal.body));
        }
    }
}

/// The file that a body goes on to when it outgrows its share of memory; removed when dropped, however far it came.
#[derive(Debug)]
pub struct OverflowFile(Option<PathBuf>);

impl OverflowFile {
    /// Where a body may go on to.
    pub fn at(path: PathBuf) -> Self {
        Self(Some(path))
    }

    /// The file of this body, if it has one.
    fn of(body: &Body) -> Self {
        Self(match body {
            Body::File { path, .. } => Some(path.clone()),
            Body::Memory(_) => None,
        })
    }
}

impl Drop for OverflowFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Mostly there is none. Left over, it is removed at the next start.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The budget for compressed bodies.
#[derive(Debug)]
pub struct Budget {
    permits: Arc<Semaphore>,
    units: u64,
    share_max: u64,
    expected: AtomicU64,
}

/// Part of the budget, given back when dropped.
#[derive(Debug)]
pub struct Share {
    permit: OwnedSemaphorePermit,
}

impl Budget {
    /// A budget of so many bytes, of which `readers` bodies at once may be growing.
    pub fn new(bytes: u64, readers: usize) -> Self {
        let units = usize::try_from(bytes / BUDGET_UNIT_BYTES).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let share_max = (bytes / readers.max(1) as u64).max(SHARE_BYTES_MIN.min(bytes));
        let permits = Arc::new(Semaphore::new(units));
        Self { permits, units: units as u64, share_max, expected: AtomicU64::new(share_max) }
    }

    /// Waits for the share a body will probably need.
    pub async fn reserve(&self) -> Share {
        let expected = self.expected.load(Ordering::Relaxed);
        self.take(expected.clamp(SHARE_BYTES_MIN.min(self.share_max), self.share_max)).await
    }

    /// Waits for a share that holds a body of at most so many bytes, as far as the whole budget does.
    pub async fn take(&self, bytes: u64) -> Share {
        let units = u32::try_from(bytes.div_ceil(BUDGET_UNIT_BYTES).min(self.units).max(1)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.permits).acquire_many_owned(units).await.expect("the budget is never closed");
        Share { permit }
    }

    /// Notes how large a body became, and gives back what its share has too much.
    pub fn settle(&self, share: &mut Share, body: &Body) {
        let length = body.len();
        // A quarter more than lately: few bodies outgrow their share, and what waits for a store still has room beside them.
        let before = self.expected.load(Ordering::Relaxed);
        let expected = (length + length / 4).max(before - before / 8);
        self.expected.store(expected.min(self.share_max), Ordering::Relaxed);
        let kept = match body {
            Body::Memory(_) => usize::try_from(length.div_ceil(BUDGET_UNIT_BYTES)).unwrap_or(usize::MAX),
            Body::File { .. } => 0,
        };
        let excess = share.permit.num_permits().saturating_sub(kept);
        drop(share.permit.split(excess));
    }
}

impl Share {
    /// Bytes of this share.
    pub fn bytes(&self) -> usize {
        self.permit.num_permits().saturating_mul(BUDGET_UNIT_BYTES as usize)
    }
}
