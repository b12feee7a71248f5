//! The spool: the directory of files that belong to this agent alone.
//!
//! ```text
//! instance            random identity of this spool, kept over restarts
//! identity            system identifier and data directory that ledger, histories and prefetched files are about
//! repository          identity of the repository that the coordinator has (see repository_home.rs)
//! ledger              answers (see ledger.rs)
//! retained/<object>   whole WAL objects that not every store is known to have
//! history/<file>      every timeline history file seen
//! overflow/           compressed bodies too large for memory; of one run only
//! prefetch/           segments fetched ahead of recovery; of one run only
//! lock                held while an agent runs
//! ```
//!
//! Invariants: a retained copy is flushed to disk, name included, before the file is acknowledged. It goes only when every
//! store or the direct store has it. The bound never stops archiving: when it is reached by copies that are still needed, the
//! next file is acknowledged without a copy and that is reported. Two agents never share a spool. Retained copies survive a
//! change of identity, because each names its cluster itself; everything else about the old one is removed.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use postgres_format::{SystemIdentifier, Timeline, WalFileName};
use repository::store::Body;
use repository::wal::{Arrived, Damage, EncodedWal, Fingerprint, WalArrival};

use crate::durable;
use crate::repository_home::RepositoryHome;

/// Largest history file kept, in bytes.
pub const HISTORY_BYTES_MAX: u64 = 1 << 20;
/// Largest identity file read, in bytes.
const IDENTITY_BYTES_MAX: usize = 8 << 10;
/// Bytes read at once from a copy.
const COPY_PIECE_BYTES: usize = 256 << 10;

/// Why the spool cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// A file operation failed.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Another agent uses it.
    #[error("spool {} is used by another running agent; give each agent a directory of its own", path.display())]
    Taken {
        /// The directory.
        path: PathBuf,
    },
    /// A retained copy is not what it was.
    #[error("retained copy {} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |source| SpoolError::File { what, path, source }
}

/// Names a retained copy: WAL file and content.
pub type RetainedKey = (WalFileName, Fingerprint);

/// Whether a copy was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retention {
    /// It is, durably.
    Kept,
    /// There was no room.
    NoRoom,
}

/// The spool of one agent.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    instance: String,
    home: Arc<RepositoryHome>,
    retained_bytes_max: u64,
    retained: Mutex<BTreeMap<RetainedKey, u64>>,
    refused: AtomicU64,
    next_overflow: AtomicU64,
    _lock: File,
}

impl Spool {
    /// Opens or creates a spool and removes what a crash left half done.
    ///
    /// # Errors
    /// [`SpoolError::Taken`] when another agent runs on it, or a failed file operation.
    pub fn open(directory: &Path, retained_bytes_max: u64) -> Result<Self, SpoolError> {
        for folder in ["", "retained", "history"] {
            create_directory(&directory.join(folder))?;
        }
        let lock = take_lock(directory)?;
        for folder in ["overflow", "prefetch"] {
            empty_directory(&directory.join(folder))?;
        }
        let spool = Self {
            instance: instance(&directory.join("instance"))?,
            home: repository_home(directory)?,
            retained: Mutex::new(retained_copies(&directory.join("retained"))?),
            directory: directory.to_owned(),
            retained_bytes_max,
            refused: AtomicU64::new(0),
            next_overflow: AtomicU64::new(0),
            _lock: lock,
        };
        Ok(spool)
    }

    /// Random identity of this spool.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// The repository that this node archives into.
    pub fn home(&self) -> &Arc<RepositoryHome> {
        &self.home
    }

    /// Where the ledger is.
    pub fn ledger_path(&self) -> PathBuf {
        self.directory.join("ledger")
    }

    /// Where prefetched segments are.
    pub fn prefetch_directory(&self) -> PathBuf {
        self.directory.join("prefetch")
    }

    /// A fresh name for a body that outgrows memory.
    pub fn overflow_path(&self) -> PathBuf {
        let number = self.next_overflow.fetch_add(1, Ordering::Relaxed);
        self.directory.join("overflow").join(format!("{number:016x}"))
    }

    /// Says whose answers, histories and prefetched files these are. True when they were another's and are gone now; the
    /// caller then clears its ledger.
    ///
    /// # Errors
    /// When a file operation failed; nothing of the old may then be used.
    pub fn belong_to(&self, system: SystemIdentifier, data_directory: &Path) -> Result<bool, SpoolError> {
        let path = self.directory.join("identity");
        let identity = format!("{system}\n{}\n", data_directory.display());
        let before = fs::read(&path).unwrap_or_default();
        if before.len() <= IDENTITY_BYTES_MAX && before == identity.as_bytes() {
            return Ok(false);
        }
        for folder in ["history", "prefetch"] {
            empty_directory(&self.directory.join(folder))?;
        }
        match fs::remove_file(self.ledger_path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file_error("remove", &self.ledger_path())(error));
            }
            _ => {}
        }
        durable::replace(&path, identity.as_bytes(), 0o600).map_err(file_error("write", &path))?;
        Ok(!before.is_empty())
    }

    /// Keeps a copy of a WAL object, durably on return.
    ///
    /// # Errors
    /// When it cannot be written; the file must then not be acknowledged on its strength.
    pub fn retain(&self, wal: &EncodedWal) -> Result<Retention, SpoolError> {
        let key = (wal.header.name, wal.fingerprint);
        let length = wal.body.len();
        {
            let mut retained = self.retained();
            if retained.contains_key(&key) {
                return Ok(Retention::Kept);
            }
            if retained.values().sum::<u64>().saturating_add(length) > self.retained_bytes_max {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return Ok(Retention::NoRoom);
            }
            // Counted before it is written, so that copies written at the same time keep the bound together.
            retained.insert(key, length);
        }
        let path = self.retained_path(&key);
        self.write_copy(&path, &wal.body).inspect_err(|_| {
            self.retained().remove(&key);
        })?;
        Ok(Retention::Kept)
    }

    fn write_copy(&self, path: &Path, body: &Body) -> Result<(), SpoolError> {
        let temporary = durable::temporary_name(path);
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            match body {
                Body::Memory(bytes) => file.write_all(bytes)?,
                Body::File { path, len } => {
                    let copied = io::copy(&mut io::Read::take(File::open(path)?, *len), &mut file)?;
                    if copied != *len {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
            file.sync_all()?;
            fs::rename(&temporary, path)?;
            durable::sync_directory(&self.directory.join("retained"))
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&temporary);
            file_error("keep a copy as", path)(source)
        })
    }

    /// Lets a copy go.
    ///
    /// # Errors
    /// When the file cannot be removed; it is then found again at the next start.
    pub fn release(&self, key: &RetainedKey) -> Result<(), SpoolError> {
        if self.retained().remove(key).is_none() {
            return Ok(());
        }
        let path = self.retained_path(key);
        match fs::remove_file(&path) {
            // Let go while it was still being written; what is left then is found at the next start.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(file_error("remove", &path)),
        }
    }

    /// Lets go what a coordinator says every store has: `<wal file>.<fingerprint>`, or a bare history file name.
    ///
    /// # Errors
    /// As [`Spool::release`]; the others are let go all the same.
    pub fn release_spread(&self, objects: &[String]) -> Result<(), SpoolError> {
        let keys: Vec<RetainedKey> = self.retained().keys().copied().collect();
        let spread = |(name, fingerprint): &RetainedKey| {
            let (bare, full) = (name.to_string(), format!("{name}.{fingerprint}"));
            objects.iter().any(|object| *object == full || (matches!(name, WalFileName::History(_)) && *object == bare))
        };
        let mut result = Ok(());
        for key in keys.iter().filter(|key| spread(key)) {
            if let Err(error) = self.release(key) {
                result = Err(error);
            }
        }
        result
    }

    /// All copies in PostgreSQL's order of need.
    pub fn retained_keys(&self) -> Vec<RetainedKey> {
        self.retained().keys().copied().collect()
    }

    /// Most bytes of copies that are kept.
    pub fn retained_bytes_max(&self) -> u64 {
        self.retained_bytes_max
    }

    /// Bytes of all copies.
    pub fn retained_bytes(&self) -> u64 {
        self.retained().values().sum()
    }

    /// Files acknowledged without a copy because there was no room, since start.
    pub fn refused_count(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Reads a copy's header and digest for sending it again; `None` when it went meanwhile.
    ///
    /// # Errors
    /// [`SpoolError::Damaged`] when it is no WAL object any more.
    pub async fn read_retained(&self, key: &RetainedKey) -> Result<Option<EncodedWal>, SpoolError> {
        let Some(len) = self.retained().get(key).copied() else { return Ok(None) };
        let path = self.retained_path(key);
        let damaged = || SpoolError::Damaged { path: path.clone() };
        let read = tokio::task::spawn_blocking({
            let path = path.clone();
            move || read_copy(&path, len)
        });
        let arrived = match read.await.map_err(|_| damaged())? {
            Ok(arrived) => arrived.map_err(|_| damaged())?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(file_error("read", &path)(error)),
        };
        let wal = EncodedWal::arrived(arrived, Body::File { path: path.clone(), len });
        if (wal.header.name, wal.fingerprint) == *key { Ok(Some(wal)) } else { Err(damaged()) }
    }

    /// Keeps a history file for times when no store answers.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep_history(&self, timeline: Timeline, content: &[u8]) -> Result<(), SpoolError> {
        let path = self.history_path(timeline);
        if fs::read(&path).is_ok_and(|before| before == content) {
            return Ok(());
        }
        durable::replace(&path, content, 0o600).map_err(file_error("write", &path))
    }

    /// A history file seen earlier.
    pub fn history(&self, timeline: Timeline) -> Option<Vec<u8>> {
        let file = File::open(self.history_path(timeline)).ok()?;
        let mut content = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, HISTORY_BYTES_MAX), &mut content).ok()?;
        Some(content)
    }

    /// The timelines of which a history file was seen.
    pub fn timelines(&self) -> Vec<Timeline> {
        let Ok(listed) = fs::read_dir(self.directory.join("history")) else { return Vec::new() };
        let named = listed.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<WalFileName>().ok());
        named.filter(|name| matches!(name, WalFileName::History(_))).map(|name| name.timeline()).collect()
    }

    fn history_path(&self, timeline: Timeline) -> PathBuf {
        self.directory.join("history").join(format!("{}.history", timeline.to_hex()))
    }

    fn retained_path(&self, (name, fingerprint): &RetainedKey) -> PathBuf {
        self.directory.join("retained").join(format!("{name}.{fingerprint}"))
    }

    fn retained(&self) -> std::sync::MutexGuard<'_, BTreeMap<RetainedKey, u64>> {
        self.retained.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn create_directory(path: &Path) -> Result<(), SpoolError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(file_error("create", path))
}

fn empty_directory(path: &Path) -> Result<(), SpoolError> {
    create_directory(path)?;
    for entry in fs::read_dir(path).map_err(file_error("list", path))? {
        let entry = entry.map_err(file_error("list", path))?.path();
        fs::remove_file(&entry).map_err(file_error("remove", &entry))?;
    }
    Ok(())
}

fn take_lock(directory: &Path) -> Result<File, SpoolError> {
    let path = directory.join("lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(file_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(SpoolError::Taken { path: directory.to_owned() }),
        Err(fs::TryLockError::Error(source)) => Err(file_error("lock", &path)(source)),
    }
}

fn instance(path: &Path) -> Result<String, SpoolError> {
    match fs::read_to_string(path) {
        Ok(text) if uuid::Uuid::parse_str(text.trim()).is_ok() => Ok(text.trim().to_owned()),
        Ok(_) => new_instance(path),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => {
            new_instance(path)
        }
        Err(error) => Err(file_error("read", path)(error)),
    }
}

/// Where a spool remembers the repository.
pub fn home_path(directory: &Path) -> PathBuf {
    directory.join("repository")
}

fn repository_home(directory: &Path) -> Result<Arc<RepositoryHome>, SpoolError> {
    let path = home_path(directory);
    RepositoryHome::open(&path).map(Arc::new).map_err(file_error("read", &path))
}

fn new_instance(path: &Path) -> Result<String, SpoolError> {
    let instance = uuid::Uuid::now_v7().to_string();
    durable::replace(path, instance.as_bytes(), 0o600).map_err(file_error("write", path))?;
    Ok(instance)
}

/// Copies left by an earlier run; what a crash left half written is removed.
fn retained_copies(directory: &Path) -> Result<BTreeMap<RetainedKey, u64>, SpoolError> {
    let mut copies = BTreeMap::new();
    for entry in fs::read_dir(directory).map_err(file_error("list", directory))? {
        let entry = entry.map_err(file_error("list", directory))?;
        let file_name = entry.file_name();
        match file_name.to_str().and_then(retained_key) {
            Some(key) => {
                let metadata = entry.metadata().map_err(file_error("look at", &entry.path()))?;
                copies.insert(key, metadata.len());
            }
            None if file_name.to_string_lossy().ends_with(durable::TEMPORARY_SUFFIX) => {
                fs::remove_file(entry.path()).map_err(file_error("remove", &entry.path()))?;
            }
            None => tracing::warn!(file = %entry.path().display(), "a file in the spool is not one of ours"),
        }
    }
    Ok(copies)
}

/// Reads an object of `len` bytes and checks it.
fn read_copy(path: &Path, len: u64) -> io::Result<Result<Arrived, Damage>> {
    let mut file = io::Read::take(File::open(path)?, len);
    let mut arrival = WalArrival::new();
    let mut piece = vec![0; COPY_PIECE_BYTES];
    loop {
        let read = io::Read::read(&mut file, &mut piece)?;
        if read == 0 {
            return Ok(arrival.finish());
        }
        if let Err(damage) = arrival.push(&piece[..read]) {
            return Ok(Err(damage));
        }
    }
}

fn retained_key(file_name: &str) -> Option<RetainedKey> {
    let (name, fingerprint) = file_name.rsplit_once('.')?;
    Some((name.parse().ok()?, fingerprint.parse().ok()?))
}

#[cfg(test)]
mod tests;
