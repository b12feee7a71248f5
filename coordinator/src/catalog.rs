//! The catalog: an index of the repository in SQLite, and the record of operations.
//!
//! The stores are the truth. Everything here can be deleted and comes back by listing them (`rebuild`), except the
//! history of operations, which nobody needs for a restore. Therefore the journal runs with `synchronous = NORMAL`: a
//! power cut may lose the newest rows but never the file's integrity, and what is lost is found again by listing. That
//! keeps the disk's sync off the way of a pushed segment.
//!
//! Invariants:
//! * one operating system thread owns the connection; SQL is written only below this file;
//! * calls that wait in the queue share one transaction, each in a savepoint of its own, so a burst of segments costs one
//!   commit; a call is answered after the commit;
//! * migrations are append-only and counted in `user_version`; a catalog of a newer version is refused, not guessed;
//! * every table is `STRICT`.

pub mod backups;
pub mod clusters;
pub mod operations;
mod schema;
pub mod wal;

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, Savepoint, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

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
    #[error("cannot open the catalog {}; it is an index and may be deleted, it is rebuilt from the stores", path.display())]
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
    /// A statement failed.
    #[error("the catalog did not take a statement")]
    Statement(#[from] rusqlite::Error),
    /// A stored value is not what was written.
    #[error("the catalog holds {value:?} as {what}; delete the file to have it rebuilt")]
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
    /// Opens the catalog in `directory`, creating or migrating it. Answers whether it was empty, that is, whether it
    /// must be rebuilt from the stores.
    ///
    /// # Errors
    /// [`CatalogError::Open`] and [`CatalogError::Newer`].
    pub fn open(directory: &Path) -> CatalogResult<(Self, CatalogThread, Freshness)> {
        let path = directory.join(FILE_NAME);
        let open = |source| CatalogError::Open { path: path.clone(), source };
        let connection = Connection::open(&path).map_err(open)?;
        connection.pragma_update(None, "journal_mode", "wal").map_err(open)?;
        connection.pragma_update(None, "synchronous", "normal").map_err(open)?;
        Self::start(connection, &path, Some(path.clone()))
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
        let freshness = schema::migrate(&mut connection, shown)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
        let (jobs, queue) = mpsc::channel(QUEUE_LIMIT);
        let (ending, ended) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("catalog".to_owned())
            .spawn(move || {
                work(connection, queue);
                drop(ending);
            })
            .map_err(|error| CatalogError::Open {
                path: shown.to_owned(),
                source: rusqlite::Error::ToSqlConversionFailure(Box::new(error)),
            })?;
        Ok((Self { jobs, path }, CatalogThread { thread, ended }, freshness))
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
        let job: Job = Box::new(move |savepoint| {
            let result = work(savepoint);
            if result.is_err() {
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
        let job: Job = Box::new(move |savepoint| {
            let result = work(savepoint);
            if let Err(error) = &result {
                let _ = savepoint.rollback();
                tracing::error!(%error, "the catalog did not take a row; the next full listing brings it back");
            }
            Box::new(|_| ())
        });
        // A closed catalog means that the coordinator is ending; listing brings the row back.
        let _ = self.jobs.send(job).await;
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
    /// Made just now: rebuild it from the stores.
    New,
    /// It has a past.
    Known,
}

fn lost_in_commit(error: &CatalogError) -> CatalogError {
    tracing::error!(%error, "the catalog did not commit");
    CatalogError::Statement(rusqlite::Error::InvalidQuery)
}

/// The thread: one transaction for whatever waits, answers after its commit.
fn work(mut connection: Connection, mut queue: mpsc::Receiver<Job>) {
    while let Some(first) = queue.blocking_recv() {
        let mut jobs = vec![first];
        while jobs.len() < BATCH_LIMIT {
            let Ok(job) = queue.try_recv() else { break };
            jobs.push(job);
        }
        let mut answers = Vec::with_capacity(jobs.len());
        let committed = run_batch(&mut connection, jobs, &mut answers);
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
