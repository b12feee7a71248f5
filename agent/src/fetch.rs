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
//! system identifier are neither served nor kept. Files on their way are bounded in number and bytes, and none stays that nobody
//! asks for. A segment that takes longer than a standby is held goes on coming, and whoever asks again finds it.

mod ahead;
mod histories;
pub mod line;
mod sources;
mod spooled;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use postgres_format::{SegmentName, Timeline, WalFileName};
use repository::name::ClusterName;
use repository::wal::{Fetched, Silences};
use tokio::time::Instant;

use crate::config::FetchSettings;
use crate::local::FetchMode;
use crate::node::{DataDirectory, NodeFacts, Recovery};
use crate::regular_file;
use crate::spool::{HISTORY_BYTES_MAX, Spool};
use ahead::Ahead;
pub use sources::{Asked, Sources};
use spooled::Spooled;

/// Longest time a standby is held.
pub const HOLD_MAX: Duration = Duration::from_millis(4_500);
/// Longest time a standby is held while its last answer was silence: a promotion asks for several files in a row.
const HOLD_IN_SILENCE: Duration = Duration::from_millis(500);
/// How long silence is taken for lasting.
const SILENCE_LASTS: Duration = Duration::from_secs(30);
/// How long ago a store was heard that is slow and not silent.
const HEARD_LATELY: Duration = Duration::from_secs(5);
/// How long stores may take over a history file of which a copy is at hand.
const HISTORY_AT_HAND: Duration = Duration::from_millis(300);
/// First pause before an unknown answer is asked for again.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(5);

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
        if let Err(error) = regular_file::check_target(target) {
            return cannot_be_written(target, &error, mode);
        }
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
            let answer = answer.unwrap_or_else(|_| Answer::Unknown(self.late().to_owned()));
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

    /// Why there is no answer before the deadline.
    fn late(&self) -> &'static str {
        match self.silences.heard_within(HEARD_LATELY) {
            true => "it is on its way and comes slowly",
            false => "no store answered in time",
        }
    }

    /// Remembers that nobody was heard before the deadline, until somebody is. A history file may have come from the
    /// copy at hand, which says nothing about stores.
    fn heard(&self, answer: Option<&Answer>, name: &WalFileName) {
        let mut silent = self.silent_since.lock().unwrap_or_else(PoisonError::into_inner);
        match (answer, name) {
            (None, _) if self.silences.heard_within(HEARD_LATELY) => *silent = None,
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
                self.segment(segment, target, facts, mode).await
            }
            WalFileName::BackupHistory { .. } | WalFileName::Partial(_) => match self.obtain(name, facts).await {
                Ok(file) => self.hand_over(&file, target, None).await,
                Err(answer) => answer,
            },
        }
    }

    /// A segment stays on its way, or ready, until it was handed over: who has waited too long asks again.
    async fn segment(
        self: &Arc<Self>,
        segment: SegmentName,
        target: &Path,
        facts: &NodeFacts,
        mode: FetchMode,
    ) -> Answer {
        let brought = match mode {
            FetchMode::Other => self.bring(segment, facts).await,
            FetchMode::Recovery | FetchMode::Standby => {
                self.look_ahead(segment, facts);
                let bring = async {
                    let brought = self.bring(segment, facts).await;
                    if brought.is_ok() {
                        // It came from a store: whatever takes long from here on is not the silence of stores.
                        self.silences.hear();
                    }
                    brought
                };
                tokio::join!(bring, self.learn_lately(facts)).0
            }
        };
        let file = match self.on_line(segment, brought, facts, mode).await {
            Ok(file) => file,
            Err(answer) => return answer,
        };
        let answer = self.hand_over(&file, target, Some(facts.segment_size.bytes())).await;
        self.ahead.forget(segment);
        if answer == Answer::Written {
            self.ahead.forget_older_timelines(segment.timeline());
        }
        answer
    }

    /// What becomes of a segment, or of its absence, on the line that the server recovers along.
    async fn on_line(
        &self,
        segment: SegmentName,
        brought: Result<Arc<Spooled>, Answer>,
        facts: &NodeFacts,
        mode: FetchMode,
    ) -> Result<Arc<Spooled>, Answer> {
        match brought {
            Ok(file) if mode != FetchMode::Other => match self.past_fork(segment, facts) {
                None => Ok(file),
                Some(past) => {
                    self.ahead.forget(segment);
                    Err(line::held_back(&past, mode))
                }
            },
            Err(Answer::No(_)) if mode == FetchMode::Recovery => Err(self.is_end(segment, facts).await),
            brought => brought,
        }
    }

    /// Fetches one file into the spool. Dropping the future leaves nothing there.
    async fn obtain(&self, name: WalFileName, facts: &NodeFacts) -> Result<Spooled, Answer> {
        let asked = self.sources.ask_whom().await;
        let file = self.fresh_file(&name);
        let (stores, system) = (&asked.stores, facts.system_identifier);
        let fetched =
            repository::wal::fetch_remembering(&self.silences, stores, &self.cluster, system, &name, file.path()).await;
        match fetched {
            Fetched::Written { .. } => Ok(file),
            Fetched::Absent if asked.missing.is_empty() => Err(Answer::No(String::new())),
            Fetched::Absent => Err(Answer::Unknown(asked.missing.join("; "))),
            Fetched::Unknown { reasons } => {
                let all: Vec<String> = asked.missing.into_iter().chain(reasons).collect();
                Err(Answer::Unknown(all.join("; ")))
            }
        }
    }

    fn fresh_file(&self, name: &WalFileName) -> Spooled {
        let number = self.next_file.fetch_add(1, Ordering::Relaxed);
        Spooled::new(self.spool.prefetch_directory().join(format!("{name}.{number:x}")))
    }

    async fn hand_over(&self, file: &Spooled, target: &Path, size_bytes: Option<u64>) -> Answer {
        match file.move_to(target, size_bytes).await {
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
        let file = match obtained {
            Ok(file) => file,
            Err(answer) => return self.history_at_hand(timeline, target).await.unwrap_or(answer),
        };
        if let Ok(content) = std::fs::read(file.path())
            && content.len() as u64 <= HISTORY_BYTES_MAX
            && let Err(error) = self.spool.keep_history(timeline, &content)
        {
            tracing::warn!(error = %crate::archive::ship::chain(&error), "a history file could not be kept");
        }
        self.hand_over(&file, target, None).await
    }

    async fn history_at_hand(&self, timeline: Timeline, target: &Path) -> Option<Answer> {
        let content = self.spool.history(timeline)?;
        // By way of the spool: nothing but the target is written into the data directory.
        let file = self.fresh_file(&WalFileName::History(timeline));
        Some(match crate::durable::create(file.path(), &content, 0o600) {
            Ok(()) => self.hand_over(&file, target, None).await,
            Err(error) => Answer::Unknown(format!("cannot write in the spool: {error}")),
        })
    }
}

/// Nothing is put in the place of what is no file, however often it is asked for.
fn cannot_be_written(target: &Path, error: &std::io::Error, mode: FetchMode) -> Answer {
    let reason = format!("cannot write {}: {error}", target.display());
    match mode {
        FetchMode::Recovery => Answer::Refused(reason),
        FetchMode::Standby | FetchMode::Other => Answer::No(reason),
    }
}

#[cfg(test)]
mod tests;
