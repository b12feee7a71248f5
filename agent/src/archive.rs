//! Archiving: every finished WAL file is made durable off this host, normally before PostgreSQL asks for it.
//!
//! ```text
//! archive_status ─ look ─▶ wanted names ─▶ job: read once ─▶ ship by the road ─▶ answer ─▶ ledger
//! archive_command ───────▶ ledger hit: 0 at once · job under way: wait for it · else: a job of its own
//! ```
//!
//! Promise 1: [`Archive::push`] says yes only when the very file that is asked about, by its stamp, is durable off this host.
//! Invariants: one job a name. Files ahead of PostgreSQL take a bounded number of slots, in its order of need; a file that
//! PostgreSQL asks for never waits for a slot. Nothing goes ahead past a file that the stores refused (see `agreement.rs`).
//! A node in recovery ships nothing ahead. Refusals are remembered for
//! [`REFUSAL_KEPT`] so that a hopeless file is not read again and again. The spool's ledger belongs to one system identifier
//! and one repository.
//! This room reads `archive_status` and never writes there.

pub mod admit;
mod again;
mod agreement;
mod crew;
pub mod readers;
pub mod ready;
pub mod resend;
pub mod ship;
pub mod watch;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use postgres_format::{SystemIdentifier, WalFileName};
use process::clock::Monotonic;
use repository::name::{ClusterName, NodeName};
use repository::wal::{Fingerprint, Sink, longest_object};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch as channel};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::config::ArchiveSettings;
use crate::ledger::{ANSWERS_MAX, Answer, FileStamp, Ledger};
use crate::metrics::ArchiveMetrics;
use crate::node::{DataDirectory, NodeFacts};
use crate::pressure::{Effort, Strain};
use crate::regular_file;
use crate::spool::HISTORY_BYTES_MAX;
use admit::{Admission, AdmitError, Admitted};
use agreement::Agreement;
use crew::Crew;
use readers::{Budget, OverflowFile};
use ship::{Roads, ShipError, Shipped, chain};

/// Names taken from one look at `archive_status`, as many as PostgreSQL's archiver takes.
const LOOK_NAMES: usize = 64;
/// Files that PostgreSQL asked for and that are under way.
const ASKED_MAX: usize = 16;
/// How long a refusal is remembered.
pub const REFUSAL_KEPT: Duration = Duration::from_secs(30);
/// How long a refusal is remembered that is not about the very file.
const REFUSAL_KEPT_SHORT: Duration = Duration::from_secs(2);
/// How long after its refusal a file is named as the one that holds the others up: PostgreSQL asks again at least once a
/// minute.
const HELD_UP_SHOWN: Duration = Duration::from_secs(150);
/// Refusals remembered.
const REFUSALS_MAX: usize = 1_024;
/// How often a file that changed while it was read, or that is another by now, is tried again.
const CHANGED_ATTEMPTS: usize = 3;
/// How long a file that PostgreSQL waits for waits for its share of memory before it goes by way of the spool.
const ASKED_MEMORY_WAIT: Duration = Duration::from_millis(500);

/// What archiving works with.
pub struct Parts {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// This node.
    pub node: NodeName,
    /// The data directory.
    pub data: Arc<DataDirectory>,
    /// Ways off this host.
    pub roads: Roads,
    /// Settings.
    pub settings: ArchiveSettings,
    /// Numbers for people.
    pub metrics: ArchiveMetrics,
}

/// The archiver.
pub struct Archive {
    parts: Parts,
    crew: Crew,
    budget: Budget,
    asked: Arc<Semaphore>,
    state: Mutex<State>,
    wake: Notify,
    jobs: TaskTracker,
    stop: CancellationToken,
}

#[derive(Default)]
struct State {
    belongs: Option<SystemIdentifier>,
    /// The repository whose answers are in the ledger.
    repository: Option<Uuid>,
    ledger: Option<Ledger>,
    jobs: HashMap<WalFileName, channel::Receiver<Option<Outcome>>>,
    refused: HashMap<WalFileName, Refusal>,
    agreement: Agreement,
    wanted: BTreeSet<WalFileName>,
    /// Files that are in no store any more.
    again: again::Waiting,
    /// The one that PostgreSQL wants first.
    first: Option<WalFileName>,
    last_acked: Option<WalFileName>,
}

struct Refusal {
    stamp: Option<FileStamp>,
    reason: Arc<str>,
    at: Monotonic,
}

impl Refusal {
    /// A refusal that is not about the very file is worth asking again soon.
    fn kept(&self) -> Duration {
        if self.stamp.is_some() { REFUSAL_KEPT } else { REFUSAL_KEPT_SHORT }
    }
}

#[derive(Clone, Debug)]
enum Outcome {
    Durable(FileStamp),
    Refused(Arc<str>),
}

/// Why a job runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// PostgreSQL waits for it.
    Asked,
    /// It is flagged, and PostgreSQL will ask.
    Ahead,
    /// It lost its flag; nobody may ask.
    Unflagged,
    /// It was archived and is in no store any more; this content of it.
    Again(Option<Fingerprint>),
}

/// How much memory a body gets before it goes on to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    /// As much as bodies took lately.
    AsExpected,
    /// All that it can take: the spool has no room for the file.
    AllOfIt,
}

/// The answer to PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// Durable off this host.
    Durable,
    /// Not, and why.
    Not(String),
}

impl Archive {
    /// An archiver whose threads run; [`Archive::run`] makes it look ahead.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn start(parts: Parts, stop: CancellationToken) -> std::io::Result<Arc<Self>> {
        let efforts = parts.settings.efforts;
        Ok(Arc::new(Self {
            crew: Crew::start(efforts)?,
            budget: Budget::new(parts.settings.memory_bytes, efforts.calm.readers),
            asked: Arc::new(Semaphore::new(ASKED_MAX)),
            state: Mutex::default(),
            wake: Notify::new(),
            jobs: TaskTracker::new(),
            parts,
            stop,
        }))
    }

    /// Works as hard as the strain asks for. To be told again and again.
    pub fn work_under(&self, strain: Strain) {
        let (before, effort) = (self.effort(), self.parts.settings.efforts.at(strain));
        if let Err(error) = self.crew.work_at(effort) {
            tracing::debug!(%error, "no further reader threads; it is tried again");
        }
        if effort != before {
            self.wake.notify_one();
        }
    }

    /// How hard it works.
    pub fn effort(&self) -> Effort {
        self.crew.effort()
    }

    /// The archiver's side of `archive_command`: waits at most `wait`.
    pub async fn push(self: &Arc<Self>, path: &Path, wait: Duration) -> Pushed {
        let start = Monotonic::now();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok()) else {
            return Pushed::Not("this is no name of a WAL file".to_owned());
        };
        let deadline = tokio::time::sleep(wait);
        tokio::pin!(deadline);
        let pushed = tokio::select! {
            pushed = self.push_named(name, path) => pushed,
            () = &mut deadline => Pushed::Not(self.why_it_waits(wait)),
        };
        self.parts.metrics.pushed(&pushed, start.elapsed());
        pushed
    }

    async fn push_named(self: &Arc<Self>, name: WalFileName, path: &Path) -> Pushed {
        for _ in 0..CHANGED_ATTEMPTS {
            let stamp = match self.stamp(path) {
                Ok(stamp) => stamp,
                Err(reason) => return Pushed::Not(reason),
            };
            let mut outcome = match self.join(name, path, &stamp) {
                Joined::Known(Outcome::Durable(_)) => return self.acknowledge(name),
                Joined::Known(Outcome::Refused(reason)) => return Pushed::Not(reason.to_string()),
                Joined::Job(outcome) => outcome,
                Joined::TooMany => return Pushed::Not("too many files are asked for at once".to_owned()),
            };
            let outcome = outcome.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
            match outcome {
                Some(Outcome::Durable(done)) if done == stamp => return self.acknowledge(name),
                // What was shipped is not what lies there now: look again.
                Some(Outcome::Durable(_)) => self.state().forget(&name),
                Some(Outcome::Refused(reason)) => return Pushed::Not(reason.to_string()),
                None => return Pushed::Not("the agent is stopping".to_owned()),
            }
        }
        Pushed::Not("it keeps changing".to_owned())
    }

    fn acknowledge(&self, name: WalFileName) -> Pushed {
        self.state().last_acked = Some(name);
        Pushed::Durable
    }

    fn why_it_waits(&self, wait: Duration) -> String {
        let view = self.parts.roads.watch.view();
        let seconds = wait.as_secs();
        if self.parts.roads.are_open() {
            format!("not durable off this host within {seconds} s (road: {}); it is still under way", view.road)
        } else {
            format!(
                "no way off this host for now (road: {}, {}), tried for {seconds} s",
                view.road,
                view.reason.as_str()
            )
        }
    }

    fn stamp(&self, path: &Path) -> Result<FileStamp, String> {
        let facts = self.facts()?;
        let metadata = std::fs::metadata(path).map_err(|error| format!("cannot be looked at: {error}"))?;
        regular_file::check(&metadata).map_err(|error| format!("is not archived: {error}"))?;
        Ok(FileStamp::of(&metadata, facts.system_identifier))
    }

    /// What is known of the data directory, after making sure that the ledger is about it.
    fn facts(&self) -> Result<NodeFacts, String> {
        let facts = self.parts.data.facts().map_err(|error| chain(&error))?;
        let mut state = self.state();
        let spool = &self.parts.roads.spool;
        if state.belongs != Some(facts.system_identifier) {
            let changed =
                spool.belong_to(facts.system_identifier, self.parts.data.path()).map_err(|error| chain(&error))?;
            let ledger =
                Ledger::open(&spool.ledger_path()).map_err(|error| format!("cannot open the ledger: {error}"))?;
            if changed {
                tracing::info!(system_identifier = %facts.system_identifier, "the data directory holds another cluster now");
            }
            state.ledger = Some(ledger);
            state.refused.clear();
            state.agreement.clear();
            state.wanted.clear();
            state.again.clear();
            state.belongs = Some(facts.system_identifier);
            state.repository = None;
        }
        let repository = spool.home().known();
        if state.repository != repository {
            let kept = state.ledger.as_mut().map_or(Ok(()), |ledger| ledger.keep_only(repository));
            kept.map_err(|error| format!("cannot write the ledger: {error}"))?;
            state.repository = repository;
        }
        Ok(facts)
    }

    fn join(self: &Arc<Self>, name: WalFileName, path: &Path, stamp: &FileStamp) -> Joined {
        let mut state = self.state();
        // While the coordinator has no repository, nobody knows what became of what was archived.
        let home = self.parts.roads.spool.home();
        let ledger = state.ledger.as_ref().filter(|_| !home.is_absent());
        if ledger.is_some_and(|ledger| ledger.find(&name, stamp, home.known()).is_some()) {
            return Joined::Known(Outcome::Durable(*stamp));
        }
        if let Some(outcome) = state.jobs.get(&name) {
            return Joined::Job(outcome.clone());
        }
        if let Some(refusal) = state.refused.get(&name)
            && refusal.stamp == Some(*stamp)
            && refusal.at.elapsed() < REFUSAL_KEPT
        {
            return Joined::Known(Outcome::Refused(Arc::clone(&refusal.reason)));
        }
        match Arc::clone(&self.asked).try_acquire_owned() {
            Ok(permit) => Joined::Job(self.spawn(&mut state, name, path.to_owned(), Origin::Asked, permit)),
            Err(_) => Joined::TooMany,
        }
    }

    fn spawn(
        self: &Arc<Self>,
        state: &mut State,
        name: WalFileName,
        path: PathBuf,
        origin: Origin,
        permit: OwnedSemaphorePermit,
    ) -> channel::Receiver<Option<Outcome>> {
        let (tell, outcome) = channel::channel(None);
        state.jobs.insert(name, outcome.clone());
        let archive = Arc::clone(self);
        self.jobs.spawn(async move {
            let job = UnderWay { archive, name };
            let result = job.archive.job(name, &path, origin).await;
            job.archive.end_job(name, origin, result, &tell);
            drop(permit);
            job.archive.wake.notify_one();
        });
        outcome
    }

    /// Reads and ships one file.
    async fn job(&self, name: WalFileName, path: &Path, origin: Origin) -> Result<Done, JobError> {
        let (mut attempt, mut memory) = (0, Memory::AsExpected);
        let (Admitted { wal, stamp }, mut share, _overflow) = loop {
            attempt += 1;
            match self.read(name, path, origin, memory).await {
                Err(AdmitError::Changed { .. }) if attempt < CHANGED_ATTEMPTS => {}
                Err(error) if error.is_spool_full() && memory == Memory::AsExpected => memory = Memory::AllOfIt,
                Err(error) => return Err(JobError::Admit(error)),
                Ok(read) => break read,
            }
        };
        if matches!(origin, Origin::Again(Some(lost)) if lost != wal.fingerprint) {
            return Err(JobError::OtherContent);
        }
        if let Some(share) = &mut share {
            self.budget.settle(share, &wal.body);
        }
        self.keep_history(name, path).await;
        let shipped = self.parts.roads.ship(&wal, &self.stop).await.map_err(JobError::Ship)?;
        self.parts.metrics.shipped(shipped.road, wal.header.size, wal.body.len());
        let Shipped { road, new, repository } = shipped;
        Ok(Done { answer: Answer { stamp, fingerprint: wal.fingerprint, road, repository }, new })
    }

    async fn read(
        &self,
        name: WalFileName,
        path: &Path,
        origin: Origin,
        memory: Memory,
    ) -> Result<(Admitted, Option<readers::Share>, Option<OverflowFile>), AdmitError> {
        let facts = self
            .parts
            .data
            .facts()
            .map_err(|error| AdmitError::Unreadable { name, source: std::io::Error::other(chain(&error)) })?;
        let (share, sink, overflow) = match (name.holds_wal(), memory) {
            (false, _) => (None, Sink::Memory, None),
            (true, Memory::AsExpected) => self.sink(self.share(origin).await),
            (true, Memory::AllOfIt) => {
                self.sink(Some(self.budget.take(longest_object(facts.segment_size.bytes())).await))
            }
        };
        let admission = Admission {
            name,
            path: path.to_owned(),
            facts,
            cluster: self.parts.cluster.clone(),
            node: self.parts.node.clone(),
            compression_level: self.crew.effort().compression_level,
            sink,
            now: process::clock::now(),
        };
        Ok((self.crew.read(admission).await?, share, overflow))
    }

    /// A share of memory for the encoded body; PostgreSQL's own file does not wait for it for long.
    async fn share(&self, origin: Origin) -> Option<readers::Share> {
        let reserve = self.budget.reserve();
        match origin {
            Origin::Asked => tokio::time::timeout(ASKED_MEMORY_WAIT, reserve).await.ok(),
            Origin::Ahead | Origin::Unflagged | Origin::Again(_) => Some(reserve.await),
        }
    }

    fn sink(&self, share: Option<readers::Share>) -> (Option<readers::Share>, Sink, Option<OverflowFile>) {
        let memory_bytes = share.as_ref().map_or(0, readers::Share::bytes);
        let overflow = self.parts.roads.spool.overflow_path();
        (share, Sink::Bounded { memory_bytes, overflow: overflow.clone() }, Some(OverflowFile::at(overflow)))
    }

    async fn keep_history(&self, name: WalFileName, path: &Path) {
        let WalFileName::History(timeline) = name else { return };
        let (spool, path) = (Arc::clone(&self.parts.roads.spool), path.to_owned());
        let kept = tokio::task::spawn_blocking(move || {
            let content = regular_file::read(&path, HISTORY_BYTES_MAX).map_err(|error| error.to_string())?;
            spool.keep_history(timeline, &content).map_err(|error| chain(&error))
        });
        if let Ok(Err(error)) = kept.await {
            tracing::warn!(file = %name, error, "a history file could not be kept in the spool");
        }
    }

    /// Answers whoever waits, then writes the answer down.
    fn end_job(
        &self,
        name: WalFileName,
        origin: Origin,
        result: Result<Done, JobError>,
        tell: &channel::Sender<Option<Outcome>>,
    ) {
        let mut state = self.state();
        state.jobs.remove(&name);
        match result {
            Ok(Done { answer, new }) => {
                state.refused.remove(&name);
                state.agreement.taken(&name, new);
                tell.send_replace(Some(Outcome::Durable(answer.stamp)));
                process::crash_point!("agent/after-answer-before-ledger");
                let recorded = state.ledger.as_mut().map(|ledger| ledger.record(name, answer));
                if let Some(Err(error)) = recorded {
                    tracing::warn!(file = %name, %error, "an answer could not be written to the ledger");
                }
            }
            Err(JobError::Ship(ShipError::Stopped) | JobError::Admit(AdmitError::Stopped)) => {}
            Err(error) => {
                if matches!(error, JobError::Ship(ShipError::Refused(_))) {
                    state.agreement.refused(&name);
                }
                let reason: Arc<str> = chain(&error).into();
                state.refuse(name, self.stamp_of_refused(&name), Arc::clone(&reason), &error, origin);
                tell.send_replace(Some(Outcome::Refused(reason)));
            }
        }
    }

    fn stamp_of_refused(&self, name: &WalFileName) -> Option<FileStamp> {
        let system = self.parts.data.facts().ok()?.system_identifier;
        let metadata = std::fs::metadata(self.parts.data.pg_wal().join(name.to_string())).ok()?;
        Some(FileStamp::of(&metadata, system))
    }

    /// Name of the last file acknowledged to PostgreSQL.
    pub fn last_acked(&self) -> Option<WalFileName> {
        self.state().last_acked
    }

    /// Which file is refused while PostgreSQL wants it archived before all others, and why.
    pub fn held_up_by(&self) -> Option<String> {
        let state = self.state();
        let (first, refusal) = state.first.and_then(|first| Some((first, state.refused.get(&first)?)))?;
        (refusal.at.elapsed() < HELD_UP_SHOWN).then(|| format!("{first}: {}", refusal.reason))
    }

    /// Number of answers known.
    pub fn answers(&self) -> usize {
        self.state().ledger.as_ref().map_or(0, Ledger::len)
    }

    /// Waits for all jobs to end after the stop token was cancelled.
    pub async fn finish(&self) {
        self.jobs.close();
        self.jobs.wait().await;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job. Its name is free again however it ends, by a panic too, so that PostgreSQL's next question starts another.
struct UnderWay {
    archive: Arc<Archive>,
    name: WalFileName,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        // After its end another job may have the name.
        if std::thread::panicking() {
            self.archive.state().jobs.remove(&self.name);
        }
    }
}

/// A file that is durable off this host.
struct Done {
    answer: Answer,
    /// Whether some store did not know it before.
    new: bool,
}

enum Joined {
    Known(Outcome),
    Job(channel::Receiver<Option<Outcome>>),
    TooMany,
}

#[derive(Debug, thiserror::Error)]
enum JobError {
    #[error(transparent)]
    Admit(AdmitError),
    #[error(transparent)]
    Ship(ShipError),
    /// Asked for again, and another one by now.
    #[error("it has another content than the one that was archived")]
    OtherContent,
}

impl State {
    /// Whether a file should be shipped ahead now.
    fn is_wanted(&self, name: &WalFileName) -> bool {
        self.is_open(name) && self.agreement.lets_ahead(name, self.jobs.keys())
    }

    /// No answer, no job, no fresh refusal.
    fn is_open(&self, name: &WalFileName) -> bool {
        let Some(ledger) = &self.ledger else { return false };
        ledger.len() < ANSWERS_MAX
            && !ledger.contains(name)
            && !self.jobs.contains_key(name)
            && self.refused.get(name).is_none_or(|refusal| refusal.at.elapsed() >= refusal.kept())
    }

    fn forget(&mut self, name: &WalFileName) {
        if let Some(ledger) = &mut self.ledger {
            ledger.forget(name);
        }
    }

    /// Forgets the answer for a content that is in no store any more.
    fn forget_content(&mut self, name: &WalFileName, content: Option<&Fingerprint>) {
        if let Some(ledger) = &mut self.ledger {
            ledger.forget_content(name, content);
        }
    }

    /// Remembers a refusal and says it once.
    fn refuse(
        &mut self,
        name: WalFileName,
        stamp: Option<FileStamp>,
        reason: Arc<str>,
        error: &JobError,
        origin: Origin,
    ) {
        let known = self.refused.get(&name).is_some_and(|refusal| refusal.reason == reason);
        let gone = matches!(error, JobError::Admit(AdmitError::Absent { .. }));
        if matches!(error, JobError::Ship(ShipError::ClusterUnknown(_))) {
            // One line for all files: they share the reason.
            if self.refused.values().all(|refusal| refusal.reason != reason) {
                tracing::info!(%reason, "the coordinator does not take this cluster's WAL yet");
            }
            self.remember(name, None, reason);
            return;
        }
        match (known || gone, origin) {
            (true, _) | (_, Origin::Unflagged | Origin::Again(_)) => {
                tracing::debug!(file = %name, %reason, "a WAL file is not archived")
            }
            (false, _) => tracing::error!(file = %name, %reason, "a WAL file is not archived"),
        }
        self.remember(name, stamp, reason);
    }

    fn remember(&mut self, name: WalFileName, stamp: Option<FileStamp>, reason: Arc<str>) {
        if self.refused.len() >= REFUSALS_MAX {
            self.refused.retain(|_, refusal| refusal.at.elapsed() < refusal.kept());
        }
        if self.refused.len() < REFUSALS_MAX {
            self.refused.insert(name, Refusal { stamp, reason, at: Monotonic::now() });
        }
    }
}

#[cfg(test)]
mod tests;
