//! The catalog: an index of the repository in SQLite, and the record of operations.
//!
//! The stores are the truth. Everything here can be deleted and comes back by listing them (`rebuild`), except the
//! history of operations, which agent had a node's name last, and which root of each store was the newest that was seen
//! ([`marks`]); nobody needs those for a restore. Therefore the journal runs with `synchronous = NORMAL`: a
//! power cut may lose the newest rows but never the file's integrity, and what is lost is found again by listing. That
//! keeps the disk's sync off the way of a pushed segment.
//!
//! Invariants:
//! * one operating system thread owns the connection; SQL is written only below this file;
//! * calls that wait in the queue share one transaction, each in a savepoint of its own, so a burst of segments costs one
//!   commit; a call is answered after the commit;
//! * migrations are append-only and counted in `user_version`; a catalog of a newer version is refused, not guessed;
//! * every table is `STRICT`;
//! * a damaged file is moved aside when it is opened, and whoever finds damage later ends the coordinator, because the
//!   next start makes it anew. What is acknowledged never depended on it. An odd value does that once an hour at most.

pub mod backups;
pub mod clusters;
mod damage;
pub mod expired;
pub mod lost;
pub mod marks;
pub mod operations;
mod renewal;
mod schema;
pub mod seats;
pub mod senders;
pub mod soundness;
pub mod wal;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use jiff::Timestamp;
use process::clock::{self, Monotonic};
use rusqlite::{Connection, Savepoint, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub use damage::set_aside;
pub use renewal::Renewal;

/// Calls that may wait for the catalog's thread; callers beyond wait their turn.
const QUEUE_LIMIT: usize = 1024;
/// Calls that share one transaction at most.
const BATCH_LIMIT: usize = 256;
/// How long the end of the thread is waited for.
const JOIN_WAIT: Duration = Duration::from_secs(5);
/// Prepared statements kept.
const STATEMENTS_KEPT: usize = 64;
/// Name of the file in the state directory.
pub const FILE_NAME: &str = "catalog.sqlite";

/// Why the catalog did not answer.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The file cannot be opened or is not a catalog of ours.
    #[error("cannot open the catalog {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rusqlite::Error,
    },
    /// The file was written by a newer version.
    #[error(
        "the catalog {} has schema {found}, this version knows up to {known}; upgrade, or delete it to have it rebuilt",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its `user_version`.
        found: i64,
        /// The newest version known here.
        known: i64,
    },
    /// The file is no catalog of ours any more.
    #[error("the catalog {} is damaged: {detail}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A file could not be moved or removed.
    #[error("cannot move or remove {}", path.display())]
    Aside {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A statement failed.
    #[error("the catalog did not take a statement")]
    Statement(#[from] rusqlite::Error),
    /// A stored value is not what was written.
    #[error("the catalog holds {value:?} as {what}")]
    Damaged {
        /// What the value should be.
        what: &'static str,
        /// What is there, cut to a printable length.
        value: String,
    },
    /// The thread has ended: the coordinator is on its way out.
    #[error("the catalog is closed")]
    Closed,
}

/// Result of a catalog call.
pub type CatalogResult<T> = Result<T, CatalogError>;

type Answer = Box<dyn FnOnce(Option<&CatalogError>) + Send>;
type Job = Box<dyn FnOnce(&mut Savepoint<'_>) -> Answer + Send>;

/// Handle on the catalog's thread. Clones share it.
#[derive(Clone)]
pub struct Catalog {
    jobs: mpsc::Sender<Job>,
    path: Option<PathBuf>,
    damage: Damage,
}

impl std::fmt::Debug for Catalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalog").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Owner of the thread; joined after all handles are gone.
#[derive(Debug)]
pub struct CatalogThread {
    thread: JoinHandle<()>,
    /// Disconnected when the thread has ended.
    ended: std::sync::mpsc::Receiver<()>,
}

impl CatalogThread {
    /// Waits until the last handle is dropped and the file is closed, [`JOIN_WAIT`] at the longest: SQLite keeps its file
    /// whole however the process ends. Blocks; call it after the runtime has ended.
    pub fn join(self) {
        let waited = self.ended.recv_timeout(JOIN_WAIT);
        if waited == Err(std::sync::mpsc::RecvTimeoutError::Disconnected) && self.thread.join().is_err() {
            tracing::error!("the catalog's thread panicked");
        }
    }
}

impl Catalog {
    /// As [`Catalog::open`]; a damaged catalog is moved aside and a new one is made.
    ///
    /// # Errors
    /// As [`Catalog::open`], and [`CatalogError::Aside`].
    pub fn open_or_set_aside(directory: &Path, now: Timestamp) -> CatalogResult<(Self, CatalogThread, Freshness)> {
        match Self::open(directory) {
            Err(error) if error.is_damage() => {
                let kept = set_aside(directory, now)?;
                tracing::warn!(error = crate::stores::chain(&error), kept_as = %kept.display(),
                    "the catalog is damaged and was moved aside; it is rebuilt from the stores");
                Self::open(directory)
            }
            opened => opened,
        }
    }

    /// Opens the catalog in `directory`, creating or migrating it. Answers whether it knows any cluster; if not, it must
    /// be rebuilt from the stores.
    ///
    /// # Errors
    /// [`CatalogError::Open`], [`CatalogError::Newer`], [`CatalogError::Broken`].
    pub fn open(directory: &Path) -> CatalogResult<(Self, CatalogThread, Freshness)> {
        let path = directory.join(FILE_NAME);
        let open = |source| CatalogError::Open { path: path.clone(), source };
        let connection = Connection::open(&path).map_err(open)?;
        connection.pragma_update(None, "journal_mode", "wal").map_err(open)?;
        connection.pragma_update(None, "synchronous", "normal").map_err(open)?;
        connection.pragma_update(None, "temp_store", "memory").map_err(open)?;
        damage::check_pages(&connection, &path)?;
        Self::start(connection, &path, Some(path.clone()))
    }

    /// A new catalog in a file of its own that need not outlive the process.
    fn gathering(path: &Path) -> CatalogResult<(Self, CatalogThread)> {
        let open = |source| CatalogError::Open { path: path.to_owned(), source };
        let connection = Connection::open(path).map_err(open)?;
        connection.pragma_update(None, "synchronous", "off").map_err(open)?;
        let (catalog, thread, _) = Self::start(connection, path, Some(path.to_owned()))?;
        Ok((catalog, thread))
    }

    /// A catalog in memory, for tests.
    ///
    /// # Errors
    /// As [`Catalog::open`].
    pub fn in_memory() -> CatalogResult<(Self, CatalogThread, Freshness)> {
        let path = Path::new(":memory:");
        let connection =
            Connection::open_in_memory().map_err(|source| CatalogError::Open { path: path.to_owned(), source })?;
        Self::start(connection, path, None)
    }

    fn start(
        mut connection: Connection,
        shown: &Path,
        path: Option<PathBuf>,
    ) -> CatalogResult<(Self, CatalogThread, Freshness)> {
        schema::migrate(&mut connection, shown)?;
        damage::check_tables(&connection, shown)?;
        let freshness = match clusters::all(&connection)?.is_empty() {
            true => Freshness::New,
            false => Freshness::Known,
        };
        connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
        let (jobs, queue) = mpsc::channel(QUEUE_LIMIT);
        let (ending, ended) = std::sync::mpsc::sync_channel(1);
        let damage = Damage::new(path.as_deref().and_then(Path::parent));
        let handle = damage.clone();
        let thread = std::thread::Builder::new()
            .name("catalog".to_owned())
            .spawn(move || {
                work(connection, queue, &damage);
                drop(ending);
            })
            .map_err(|error| CatalogError::Open {
                path: shown.to_owned(),
                source: rusqlite::Error::ToSqlConversionFailure(Box::new(error)),
            })?;
        Ok((Self { jobs, path, damage: handle }, CatalogThread { thread, ended }, freshness))
    }

    /// Runs `work` on the catalog's thread inside a savepoint and answers once it is committed.
    ///
    /// Dropping the future does not stop the work.
    ///
    /// # Errors
    /// What `work` returns, [`CatalogError::Statement`] when the commit fails, [`CatalogError::Closed`].
    pub async fn call<T, W>(&self, work: W) -> CatalogResult<T>
    where
        T: Send + 'static,
        W: FnOnce(&mut Savepoint<'_>) -> CatalogResult<T> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let damage = self.damage.clone();
        let job: Job = Box::new(move |savepoint| {
            let result = work(savepoint);
            if let Err(error) = &result {
                damage.look_at(error);
                // The savepoint holds a part of what was asked; none of it may be committed.
                let _ = savepoint.rollback();
            }
            Box::new(move |failed_commit| {
                let result = match failed_commit {
                    Some(error) => Err(lost_in_commit(error)),
                    None => result,
                };
                let _ = answer.send(result);
            })
        });
        self.jobs.send(job).await.map_err(|_| CatalogError::Closed)?;
        answered.await.map_err(|_| CatalogError::Closed)?
    }

    /// Hands `work` over without waiting for it; waits only for a place in the queue. A failure is logged.
    pub async fn note<W>(&self, work: W)
    where
        W: FnOnce(&mut Savepoint<'_>) -> CatalogResult<()> + Send + 'static,
    {
        let damage = self.damage.clone();
        let job: Job = Box::new(move |savepoint| {
            let result = work(savepoint);
            if let Err(error) = &result {
                let _ = savepoint.rollback();
                damage.look_at(error);
                tracing::error!(%error, "the catalog did not take a row; the next full listing brings it back");
            }
            Box::new(|_| ())
        });
        // A closed catalog means that the coordinator is ending; listing brings the row back.
        let _ = self.jobs.send(job).await;
    }

    /// Ends when somebody found the file damaged.
    pub async fn damaged(&self) {
        self.damage.found.cancelled().await;
    }

    /// Whether somebody found the file damaged.
    pub fn is_damaged(&self) -> bool {
        self.damage.found.is_cancelled()
    }

    /// Size of the catalog's files in bytes; 0 in memory.
    pub fn size_bytes(&self) -> u64 {
        let Some(path) = &self.path else { return 0 };
        let beside = path.with_extension("sqlite-wal");
        [path, &beside].iter().filter_map(|file| std::fs::metadata(file).ok()).map(|found| found.len()).sum()
    }
}

/// Whether the catalog knew anything when it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// It knows no cluster, because it is new or a rebuild did not come to its end: rebuild it from the stores.
    New,
    /// It has a past.
    Known,
}

/// Tells whoever runs the coordinator that the file is damaged.
#[derive(Clone)]
struct Damage {
    found: CancellationToken,
    /// Until then an odd value is told and believed to be our own mistake.
    doubt_until: Option<Monotonic>,
    told: Arc<AtomicBool>,
}

impl Damage {
    fn new(directory: Option<&Path>) -> Self {
        let last = directory.and_then(|directory| damage::last_aside(directory, clock::now()));
        let doubt = last.and_then(|ago| damage::DOUBT.checked_sub(ago));
        Self {
            found: CancellationToken::new(),
            doubt_until: doubt.map(|left| Monotonic::now() + left),
            told: Arc::default(),
        }
    }

    fn look_at(&self, error: &CatalogError) {
        if !error.is_damage() || self.found.is_cancelled() {
            return;
        }
        let doubted = self.doubt_until.is_some_and(|until| Monotonic::now() < until);
        if !error.is_certain_damage() && doubted {
            if !self.told.swap(true, Ordering::Relaxed) {
                tracing::error!(
                    error = crate::stores::chain(error),
                    "the catalog has a value that makes no sense, soon after it was made anew; it stays in use"
                );
            }
            return;
        }
        tracing::error!(error = crate::stores::chain(error), "the catalog is damaged");
        self.found.cancel();
    }
}

fn lost_in_commit(error: &CatalogError) -> CatalogError {
    tracing::error!(%error, "the catalog did not commit");
    CatalogError::Statement(rusqlite::Error::InvalidQuery)
}

/// The thread: one transaction for whatever waits, answers after its commit.
fn work(mut connection: Connection, mut queue: mpsc::Receiver<Job>, damage: &Damage) {
    while let Some(first) = queue.blocking_recv() {
        let mut jobs = vec![first];
        while jobs.len() < BATCH_LIMIT {
            let Ok(job) = queue.try_recv() else { break };
            jobs.push(job);
        }
        let mut answers = Vec::with_capacity(jobs.len());
        let committed = run_batch(&mut connection, jobs, &mut answers);
        if let Err(error) = &committed {
            damage.look_at(error);
            if answers.is_empty() {
                tracing::error!(error = crate::stores::chain(error), "the catalog did not begin a transaction");
            }
        }
        for answer in answers {
            answer(committed.as_ref().err());
        }
    }
}

fn run_batch(connection: &mut Connection, jobs: Vec<Job>, answers: &mut Vec<Answer>) -> CatalogResult<()> {
    let mut transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for job in jobs {
        let mut savepoint = transaction.savepoint()?;
        answers.push(job(&mut savepoint));
        savepoint.commit()?;
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failed_call_leaves_the_others_alone() {
        let (catalog, thread, freshness) = Catalog::in_memory().unwrap();
        assert_eq!(freshness, Freshness::New);
        let insert = "INSERT INTO schedule_run (cluster, expression, started_us) VALUES (?1, 'x', 1)";
        let good = catalog.call(move |sp| Ok(sp.execute(insert, ["a"])?));
        let bad = catalog.call(move |sp| {
            sp.execute(insert, ["b"])?;
            sp.execute("INSERT INTO nowhere VALUES (1)", [])?;
            Ok(())
        });
        let (good, bad) = tokio::join!(good, bad);
        assert_eq!(good.unwrap(), 1);
        assert!(bad.is_err());
        let rows: i64 = catalog
            .call(|sp| Ok(sp.query_row("SELECT count(*) FROM schedule_run", [], |row| row.get(0))?))
            .await
            .unwrap();
        assert_eq!(rows, 1);
        drop(catalog);
        thread.join();
    }

    #[tokio::test]
    async fn a_catalog_survives_closing_and_a_newer_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (catalog, thread, freshness) = Catalog::open(directory.path()).unwrap();
        assert_eq!(freshness, Freshness::New);
        assert!(catalog.size_bytes() > 0);
        drop(catalog);
        thread.join();
        // Without a cluster nothing was ever gathered from the stores, or a crash undid it.
        let (catalog, thread, freshness) = Catalog::open(directory.path()).unwrap();
        assert_eq!(freshness, Freshness::New);
        let cluster = "INSERT INTO cluster (name, system_identifier, since_us) VALUES ('main', 7, 1)";
        catalog.call(move |sp| Ok(sp.execute(cluster, [])?)).await.unwrap();
        drop(catalog);
        thread.join();
        let (catalog, thread, freshness) = Catalog::open(directory.path()).unwrap();
        assert_eq!(freshness, Freshness::Known);
        drop(catalog);
        thread.join();
        let connection = Connection::open(directory.path().join(FILE_NAME)).unwrap();
        connection.pragma_update(None, "user_version", 999).unwrap();
        drop(connection);
        assert!(matches!(Catalog::open(directory.path()), Err(CatalogError::Newer { found: 999, .. })));
    }
}
