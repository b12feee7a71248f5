//! Fetching: the agent's side of `restore_command`, with segments fetched ahead of recovery.
//!
//! Promise 4: in archive recovery the answer is "no" only when every store said itself that it has no such file. What is
//! unknown is asked again for as long as configured, and is then [`Answer::Unknown`], which stops the server instead of letting
//! it promote short. On a standby, or for `pg_rewind`, nothing holds longer than [`HOLD_MAX`], and unknown is "no", to be asked
//! again. A segment that is absent while a later one is there is a gap and not known to be the end. A segment that goes on past
//! the place where the line of the server left its timeline is given to nobody who follows that line.
//!
//! Invariants: a file is handed over only after every byte was verified. A "no" is never remembered. Every history file seen is
//! kept in the spool and served when no store gives it, so that a used timeline is never taken for free. Files of another
//! system identifier are neither served nor kept. Files fetched ahead are bounded in number and bytes; those of an older
//! timeline go as soon as a newer one is served.

mod ahead;
mod histories;
pub mod line;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use postgres_format::{SegmentName, Timeline, WalFileName};
use repository::name::{ClusterName, StoreName};
use repository::store::ObjectStore;
use repository::wal::{Fetched, Silences};
use tokio::time::Instant;

use crate::config::FetchSettings;
use crate::coordinator_link::CoordinatorLink;
use crate::local::FetchMode;
use crate::node::{DataDirectory, NodeFacts, Recovery};
use crate::remote_store::RemoteStore;
use crate::spool::{HISTORY_BYTES_MAX, Spool};
use ahead::Ahead;

/// Longest time a standby is held.
pub const HOLD_MAX: Duration = Duration::from_millis(4_500);
/// Longest time a standby is held while its last answer was silence: a promotion asks for several files in a row.
const HOLD_IN_SILENCE: Duration = Duration::from_millis(500);
/// How long silence is taken for lasting.
const SILENCE_LASTS: Duration = Duration::from_secs(30);
/// How long stores may take over a history file of which a copy is at hand.
const HISTORY_AT_HAND: Duration = Duration::from_millis(300);
/// First pause before an unknown answer is asked for again.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How long the list of the coordinator's stores is believed.
const SOURCES_FRESH: Duration = Duration::from_secs(10);

/// The answer to PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The target holds the file.
    Written,
    /// There is no such file, or nothing that a standby should wait for; a reason, or empty when the archive has ended.
    No(String),
    /// It cannot be known now; never said to a standby.
    Unknown(String),
    /// Recovery must not go on here, and must not end either; never said to a standby.
    Refused(String),
}

/// Where files come from.
pub struct Sources {
    /// The store this node reaches by itself.
    pub direct: Option<Arc<dyn ObjectStore>>,
    /// The coordinator, whose stores are read through it.
    pub link: Option<CoordinatorLink>,
    known: Mutex<Option<(Instant, Vec<StoreName>)>>,
}

/// The stores to ask, and who should have been asked besides.
pub struct Asked {
    /// The coordinator's stores in its order, then the direct one.
    pub stores: Vec<Arc<dyn ObjectStore>>,
    /// Why others could not be asked.
    pub missing: Vec<String>,
}

impl Sources {
    /// Sources of one agent.
    pub fn new(direct: Option<Arc<dyn ObjectStore>>, link: Option<CoordinatorLink>) -> Self {
        Self { direct, link, known: Mutex::default() }
    }

    /// Who can be asked now.
    pub async fn ask_whom(&self) -> Asked {
        let mut asked = Asked { stores: Vec::new(), missing: Vec::new() };
        if let Some(link) = &self.link {
            match self.names(link).await {
                Ok(names) => {
                    let direct = self.direct.as_ref().map(|direct| direct.name());
                    for name in names.into_iter().filter(|name| Some(name) != direct) {
                        asked.stores.push(Arc::new(RemoteStore::new(name, link.store_service())));
                    }
                }
                Err(error) => asked.missing.push(error),
            }
        }
        asked.stores.extend(self.direct.clone());
        asked
    }

    async fn names(&self, link: &CoordinatorLink) -> Result<Vec<StoreName>, String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((at, names)) = known
            && at.elapsed() < SOURCES_FRESH
        {
            return Ok(names);
        }
        let stores = link.stores().await.map_err(|error| error.to_string())?;
        let names: Vec<StoreName> = stores.iter().filter_map(|store| store.name.parse().ok()).collect();
        if names.is_empty() {
            return Err("the coordinator names no store".to_owned());
        }
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), names.clone()));
        Ok(names)
    }
}

/// What fetching works with.
pub struct Fetcher {
    cluster: ClusterName,
    data: Arc<DataDirectory>,
    spool: Arc<Spool>,
    sources: Arc<Sources>,
    settings: FetchSettings,
    ahead: Ahead,
    was_recovering: AtomicBool,
    silent_since: Mutex<Option<Instant>>,
    silences: Silences,
    next_file: AtomicU64,
    histories_seen: Mutex<Option<Instant>>,
}

impl Fetcher {
    /// A fetcher with nothing fetched ahead.
    pub fn new(
        cluster: ClusterName,
        data: Arc<DataDirectory>,
        spool: Arc<Spool>,
        sources: Arc<Sources>,
        settings: FetchSettings,
    ) -> Arc<Self> {
        Arc::new(Self {
            cluster,
            data,
            spool,
            sources,
            settings,
            ahead: Ahead::default(),
            was_recovering: AtomicBool::new(false),
            silent_since: Mutex::default(),
            silences: Silences::default(),
            next_file: AtomicU64::new(0),
            histories_seen: Mutex::default(),
        })
    }

    /// How long one call may take, so that the caller can be told.
    pub fn wait(&self, mode: FetchMode) -> Duration {
        match mode {
            FetchMode::Recovery => self.settings.wait,
            FetchMode::Standby | FetchMode::Other => HOLD_MAX,
        }
    }

    /// Puts the WAL file `name` at `target`.
    pub async fn fetch(self: &Arc<Self>, name: &str, target: &Path, mode: FetchMode) -> Answer {
        let name: WalFileName = match name.parse() {
            Ok(WalFileName::Partial(_)) | Err(_) => return Answer::No(String::new()),
            Ok(name) => name,
        };
        // Timeline 1 has no history; PostgreSQL asks for one when it promotes off timeline 1.
        if name == WalFileName::History(Timeline::FIRST) {
            return Answer::No(String::new());
        }
        let facts = self.data.facts().map_err(|error| crate::archive::ship::chain(&error));
        let mode = facts.as_ref().map_or(mode, |facts| self.effective_mode(mode, facts));
        let deadline = Instant::now() + self.hold(mode);
        let mut pause = PAUSE_MIN;
        loop {
            let attempt = async {
                match &facts {
                    Ok(facts) => self.attempt(name, target, facts, mode).await,
                    Err(error) => Answer::Unknown(error.clone()),
                }
            };
            let answer = tokio::time::timeout_at(deadline, attempt).await;
            self.heard(answer.as_ref().ok(), &name);
            let answer = answer.unwrap_or_else(|_| Answer::Unknown("no store answered in time".to_owned()));
            match (answer, mode) {
                (Answer::Unknown(reason), FetchMode::Standby | FetchMode::Other) => {
                    return Answer::No(format!("not known whether it exists: {reason}"));
                }
                (Answer::Unknown(reason), FetchMode::Recovery) => {
                    if Instant::now() + pause >= deadline {
                        return Answer::Unknown(format!("not known whether it exists: {reason}"));
                    }
                    tracing::debug!(file = %name, reason, "asked again later");
                }
                (answer, _) => return answer,
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// How long this call may take; little on a standby whose stores were silent a moment ago.
    fn hold(&self, mode: FetchMode) -> Duration {
        let silent = *self.silent_since.lock().unwrap_or_else(PoisonError::into_inner);
        match mode {
            FetchMode::Recovery => self.settings.wait,
            _ if silent.is_some_and(|since| since.elapsed() < SILENCE_LASTS) => HOLD_IN_SILENCE,
            FetchMode::Standby | FetchMode::Other => HOLD_MAX,
        }
    }

    /// Remembers that nobody answered before the deadline, until somebody does. A history file may have come from the
    /// copy at hand, which says nothing about stores.
    fn heard(&self, answer: Option<&Answer>, name: &WalFileName) {
        let mut silent = self.silent_since.lock().unwrap_or_else(PoisonError::into_inner);
        match (answer, name) {
            (None, _) => *silent = Some(Instant::now()),
            (Some(Answer::Written | Answer::No(_)), WalFileName::Segment(_)) => *silent = None,
            (Some(_), _) => {}
        }
    }

    /// At the very end of recovery PostgreSQL removes the signal file and then still asks for its parent's history; the
    /// control file says that recovery is not over.
    fn effective_mode(&self, mode: FetchMode, facts: &NodeFacts) -> FetchMode {
        match (mode, facts.recovery) {
            (FetchMode::Recovery, _) => self.was_recovering.store(true, Ordering::Relaxed),
            (FetchMode::Standby, _) | (FetchMode::Other, Recovery::Writing) => {
                self.was_recovering.store(false, Ordering::Relaxed);
            }
            (FetchMode::Other, Recovery::Following) if self.was_recovering.load(Ordering::Relaxed) => {
                return FetchMode::Recovery;
            }
            (FetchMode::Other, Recovery::Following) => {}
        }
        mode
    }

    async fn attempt(self: &Arc<Self>, name: WalFileName, target: &Path, facts: &NodeFacts, mode: FetchMode) -> Answer {
        // Before anything is fetched: what lies in the spool about another cluster goes now.
        if let Err(error) = self.spool.belong_to(facts.system_identifier, self.data.path()) {
            return Answer::Unknown(crate::archive::ship::chain(&error));
        }
        match name {
            WalFileName::History(timeline) => self.history(timeline, target, facts).await,
            WalFileName::Segment(segment) => {
                self.ahead.belong_to(facts.system_identifier);
                let ready = self.ahead.take(segment).await;
                if mode != FetchMode::Other {
                    self.look_ahead(segment, facts);
                }
                let obtain = async {
                    match ready {
                        Some(path) => Ok(path),
                        None => self.obtain(name, facts).await,
                    }
                };
                let obtained = match mode {
                    FetchMode::Other => obtain.await,
                    FetchMode::Recovery | FetchMode::Standby => tokio::join!(obtain, self.learn_lately(facts)).0,
                };
                let obtained = self.on_line(segment, obtained, facts, mode).await;
                let answer = self.hand_over(obtained, target, Some(facts.segment_size.bytes())).await;
                if answer == Answer::Written {
                    self.ahead.forget_older_timelines(segment.timeline());
                }
                answer
            }
            WalFileName::BackupHistory { .. } | WalFileName::Partial(_) => {
                let obtained = self.obtain(name, facts).await;
                self.hand_over(obtained, target, None).await
            }
        }
    }

    /// What becomes of a segment, or of its absence, on the line that the server recovers along.
    async fn on_line(
        &self,
        segment: SegmentName,
        obtained: Result<PathBuf, Answer>,
        facts: &NodeFacts,
        mode: FetchMode,
    ) -> Result<PathBuf, Answer> {
        match obtained {
            Ok(path) if mode != FetchMode::Other => match self.past_fork(segment, facts) {
                None => Ok(path),
                Some(past) => {
                    // Left over, it is removed at the next start.
                    let _ = std::fs::remove_file(path);
                    Err(line::held_back(&past, mode))
                }
            },
            Err(Answer::No(_)) if mode == FetchMode::Recovery => Err(self.is_end(segment, facts).await),
            obtained => obtained,
        }
    }

    /// Fetches one file into the spool.
    async fn obtain(&self, name: WalFileName, facts: &NodeFacts) -> Result<PathBuf, Answer> {
        let asked = self.sources.ask_whom().await;
        let path = self.fresh_path(&name);
        let (stores, system) = (&asked.stores, facts.system_identifier);
        let fetched =
            repository::wal::fetch_remembering(&self.silences, stores, &self.cluster, system, &name, &path).await;
        match fetched {
            Fetched::Written { .. } => Ok(path),
            Fetched::Absent if asked.missing.is_empty() => Err(Answer::No(String::new())),
            Fetched::Absent => Err(Answer::Unknown(asked.missing.join("; "))),
            Fetched::Unknown { reasons } => {
                let all: Vec<String> = asked.missing.into_iter().chain(reasons).collect();
                Err(Answer::Unknown(all.join("; ")))
            }
        }
    }

    fn fresh_path(&self, name: &WalFileName) -> PathBuf {
        let number = self.next_file.fetch_add(1, Ordering::Relaxed);
        self.spool.prefetch_directory().join(format!("{name}.{number:x}"))
    }

    async fn hand_over(&self, obtained: Result<PathBuf, Answer>, target: &Path, size_bytes: Option<u64>) -> Answer {
        let path = match obtained {
            Ok(path) => path,
            Err(answer) => return answer,
        };
        let moved = move_file(&path, target, size_bytes);
        if moved.is_err() {
            let _ = std::fs::remove_file(&path);
        }
        match moved {
            Ok(()) => Answer::Written,
            Err(error) => Answer::Unknown(format!("cannot write {}: {error}", target.display())),
        }
    }

    async fn history(&self, timeline: Timeline, target: &Path, facts: &NodeFacts) -> Answer {
        let obtain = self.obtain(WalFileName::History(timeline), facts);
        let obtained = match self.spool.history(timeline) {
            // The copy is as good as a store's, so stores are only given the time to contradict it.
            Some(_) => tokio::time::timeout(HISTORY_AT_HAND, obtain)
                .await
                .unwrap_or_else(|_| Err(Answer::Unknown("no store answered in time".to_owned()))),
            None => obtain.await,
        };
        match &obtained {
            Ok(path) => {
                if let Ok(content) = std::fs::read(path)
                    && content.len() as u64 <= HISTORY_BYTES_MAX
                    && let Err(error) = self.spool.keep_history(timeline, &content)
                {
                    tracing::warn!(error = %crate::archive::ship::chain(&error), "a history file could not be kept");
                }
            }
            Err(_) => {
                if let Some(content) = self.spool.history(timeline) {
                    // By way of the spool: nothing but the target is written into the data directory.
                    let path = self.fresh_path(&WalFileName::History(timeline));
                    let copied = crate::durable::create(&path, &content, 0o600).map(|()| path);
                    let copied = copied.map_err(|error| Answer::Unknown(format!("cannot write in the spool: {error}")));
                    return self.hand_over(copied, target, None).await;
                }
            }
        }
        self.hand_over(obtained, target, None).await
    }
}

/// Moves a verified file to where PostgreSQL wants it; copies when that is another file system.
fn move_file(path: &Path, target: &Path, size_bytes: Option<u64>) -> std::io::Result<()> {
    let found = std::fs::metadata(path)?.len();
    if size_bytes.is_some_and(|expected| expected != found) {
        return Err(std::io::Error::other(format!("the archived segment has {found} bytes")));
    }
    match std::fs::rename(path, target) {
        Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => {
            std::fs::copy(path, target)?;
            std::fs::remove_file(path)
        }
        result => result,
    }
}

#[cfg(test)]
mod tests;
