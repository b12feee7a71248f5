//! The set of stores: what each can do now, and putting one object into all of them.
//!
//! Rules:
//! * every healthy store gets an object at the same time; `ack = "all"` waits for each of them, `ack = "one"` for the
//!   first, the others go on behind;
//! * a store that has not answered within its patience is *lagging*: everybody who waits for it goes on at once, nothing
//!   new is sent to it, and reconciliation fills it. Calls to one store never wait behind calls to another;
//! * a store without `repo.json`, or with another repository's, is *refused*; only [`crate::clusters`] may start in an
//!   empty one;
//! * a nearly full store is *full*: it is read, not written. While another store is healthy a full one merely lags, so
//!   archiving goes on; when every store that answers is full, the caller is told to use the direct road;
//! * a store whose own copy of an object is damaged lags for that object alone: the others answer for it, and a human is
//!   told once;
//! * what a store can do is probed before it is trusted, with new objects each time.
//!
//! Memory and files of a body are held by the task that writes it, so nothing outlives its budget.

mod complaints;
mod health;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use repository::backup::BackupError;
use repository::key::ObjectKey;
use repository::name::StoreName;
use repository::store::{ObjectStore, StoreError};
use repository::wal::WalError;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

pub use complaints::Complaints;
pub use health::{Health, HealthWatch};

/// Writes under way in one store at one time.
const WRITES_PER_STORE: usize = 32;
/// A store is given a second more for each of these many bytes.
const BYTES_PER_SECOND_MIN: u64 = 2 << 20;

/// When an object counts as archived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ack {
    /// When every healthy store has it.
    #[default]
    All,
    /// When the first store has it.
    One,
}

/// What kind of thing a store is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory that may become full at a share of its file system.
    Directory {
        /// From this share in percent on it takes nothing new.
        full_percent: u8,
    },
    /// A bucket.
    S3,
}

impl Kind {
    /// The word in the configuration.
    pub fn word(self) -> &'static str {
        match self {
            Self::Directory { .. } => "directory",
            Self::S3 => "s3",
        }
    }
}

/// One configured store.
#[derive(Debug)]
pub struct Slot {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// What it is.
    pub kind: Kind,
    health: watch::Sender<Health>,
    /// Whether it kept its promises once since the coordinator started.
    probed: AtomicBool,
    /// Whether it said, when it was asked last and answered, that it belongs to our repository.
    identified: AtomicBool,
    writes: Arc<Semaphore>,
}

impl Slot {
    /// Its name.
    pub fn name(&self) -> &StoreName {
        self.store.name()
    }

    /// What it can do now.
    pub fn health(&self) -> Health {
        self.health.borrow().clone()
    }

    /// Whether it is known to belong to our repository, whatever it can do now.
    pub fn is_identified(&self) -> bool {
        self.identified.load(Ordering::Relaxed)
    }

    /// Ends when it is not healthy any more, with what it is then.
    pub async fn no_longer_healthy(&self) -> String {
        match self.health.subscribe().wait_for(|health| *health != Health::Healthy).await {
            Ok(found) => found.to_string(),
            Err(_) => "gone".to_owned(),
        }
    }

    /// Notes what it can do, and says so in the log when that changed.
    fn set_health(&self, new: Health) {
        let changed = self.health.send_if_modified(|health| {
            let changed = *health != new;
            *health = new.clone();
            changed
        });
        if changed {
            health::announce(self.name(), &new);
        }
    }

    /// A write or read has failed: judges what that says about the store as a whole.
    pub fn judge(&self, error: &StoreError) {
        let reason = chain(error);
        match error {
            StoreError::Unavailable { .. } | StoreError::Timeout { .. } => self.set_health(Health::Lagging { reason }),
            StoreError::Full { .. } => self.set_health(Health::Full { reason }),
            StoreError::Refused { .. } | StoreError::Denied { .. } | StoreError::Unsupported { .. } => {
                self.set_health(Health::Refused { reason });
            }
            StoreError::NotFound { .. }
            | StoreError::Damaged { .. }
            | StoreError::Body { .. }
            | StoreError::TooLong { .. } => {}
        }
    }
}

/// An error that may be about a whole store.
pub trait AboutStore: fmt::Display {
    /// The store's own error, if it is one.
    fn store_error(&self) -> Option<&StoreError>;

    /// The object that the store holds and that is damaged there, if that is what is wrong.
    fn damaged_copy(&self) -> Option<&ObjectKey> {
        match self.store_error() {
            Some(StoreError::Damaged { key, .. }) => Some(key),
            _ => None,
        }
    }
}

impl AboutStore for StoreError {
    fn store_error(&self) -> Option<&StoreError> {
        Some(self)
    }
}

impl AboutStore for WalError {
    fn store_error(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            _ => None,
        }
    }

    fn damaged_copy(&self) -> Option<&ObjectKey> {
        match self {
            Self::Damaged { key, .. } | Self::Store(StoreError::Damaged { key, .. }) => Some(key),
            _ => None,
        }
    }
}

impl AboutStore for BackupError {
    fn store_error(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            _ => None,
        }
    }
}

/// What came of putting an object into all stores.
#[derive(Debug)]
pub struct Spread<T> {
    /// Stores that have it now, with what the write answered.
    pub stored: Vec<(StoreName, T)>,
    /// Stores that lack it for now.
    pub lagging: Vec<StoreName>,
}

/// Why an object is in no store.
#[derive(Debug)]
pub enum NotStored<E> {
    /// A store said no for a reason that lies in the object.
    Object(E),
    /// Its copy is damaged in every store that could be asked; the text says where.
    Damaged(String),
    /// No store took it; the text says why, store by store.
    NoStore(String),
    /// Every store that answers is full; the text says which.
    Full(String),
}

/// All configured stores, in the order of the configuration.
#[derive(Debug, Clone)]
pub struct Stores {
    slots: Arc<Vec<Arc<Slot>>>,
    ack: Ack,
    patience: Duration,
    tracker: TaskTracker,
    complaints: Arc<Complaints>,
    repository: Arc<watch::Sender<Option<Uuid>>>,
}

impl Stores {
    /// The set; nothing is asked of any store yet, and none is healthy before [`Stores::check`] found it so.
    pub fn new(stores: Vec<(Arc<dyn ObjectStore>, Kind)>, ack: Ack, patience: Duration) -> Self {
        let slot = |(store, kind)| {
            Arc::new(Slot {
                store,
                kind,
                health: watch::Sender::new(Health::Unknown),
                probed: AtomicBool::new(false),
                identified: AtomicBool::new(false),
                writes: Arc::new(Semaphore::new(WRITES_PER_STORE)),
            })
        };
        Self {
            slots: Arc::new(stores.into_iter().map(slot).collect()),
            ack,
            patience,
            tracker: TaskTracker::new(),
            complaints: Arc::default(),
            repository: Arc::new(watch::Sender::new(None)),
        }
    }

    /// All of them.
    pub fn all(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    /// All names.
    pub fn names(&self) -> Vec<StoreName> {
        self.slots.iter().map(|slot| slot.name().clone()).collect()
    }

    /// Those that are read and written.
    pub fn healthy(&self) -> Vec<Arc<Slot>> {
        self.slots.iter().filter(|slot| slot.health() == Health::Healthy).cloned().collect()
    }

    /// Those that are read: healthy and full ones.
    pub fn readable(&self) -> Vec<Arc<Slot>> {
        self.slots.iter().filter(|slot| slot.health().is_readable()).cloned().collect()
    }

    /// One by its name.
    pub fn get(&self, name: &str) -> Option<&Arc<Slot>> {
        self.slots.iter().find(|slot| slot.name().as_str() == name)
    }

    /// What was said of single objects.
    pub fn complaints(&self) -> &Complaints {
        &self.complaints
    }

    /// How long a store may be silent.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// The repository's identity, once a store told it.
    pub fn repository(&self) -> Option<Uuid> {
        *self.repository.borrow()
    }

    /// The same, and every change of it.
    pub fn follow_repository(&self) -> watch::Receiver<Option<Uuid>> {
        self.repository.subscribe()
    }

    /// Fixes the repository's identity; stores of another one are refused from now on.
    pub fn set_repository(&self, repository: Uuid) {
        self.repository.send_if_modified(|known| known.replace(repository) != Some(repository));
    }

    /// Finds the repository's identity when the coordinator starts: what the catalog remembers, else what most stores
    /// say, the first configured one breaking a tie. Stores that say otherwise are refused by the checks that follow.
    pub async fn settle(&self, remembered: Option<Uuid>) {
        let found = match remembered {
            Some(repository) => Some(repository),
            None => self.majority().await,
        };
        if let Some(repository) = found {
            self.set_repository(repository);
        }
        // A store that takes longer is looked at again by the watch; serving does not wait for it.
        let _ = tokio::time::timeout(self.patience, self.check()).await;
    }

    async fn majority(&self) -> Option<Uuid> {
        let reads = self.slots.iter().map(|slot| async {
            let read = repository::identity::read(&*slot.store);
            let identity = tokio::time::timeout(self.patience, read).await.ok()?.ok()??;
            Some(identity.repository)
        });
        let said: Vec<Uuid> = join_all(reads).await.into_iter().flatten().collect();
        let votes = |candidate: &Uuid| said.iter().filter(|other| *other == candidate).count();
        let most = said.iter().map(votes).max()?;
        said.iter().find(|candidate| votes(candidate) == most).copied()
    }

    /// Waits for what was still being written behind acknowledged calls.
    pub async fn drain(&self) {
        self.tracker.close();
        // Each task ends by itself within its store's patience.
        self.tracker.wait().await;
    }

    /// Puts one object into every healthy store at the same time, and answers when enough of them have it.
    ///
    /// `write` is called once a healthy store. An error that lies in the object (a conflict) in any store fails the whole,
    /// because no other store's yes can heal it. A damaged copy in one store says nothing about the object: that store
    /// lags, and only without any other store the object is not stored.
    ///
    /// # Errors
    /// See [`NotStored`].
    pub async fn put_to_all<T, E, W, F>(&self, size_bytes: u64, write: W) -> Result<Spread<T>, NotStored<E>>
    where
        W: Fn(Arc<dyn ObjectStore>) -> F,
        F: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: AboutStore + Send + 'static,
    {
        let healthy = self.healthy();
        if healthy.is_empty() {
            return Err(self.nobody());
        }
        let allowance = self.patience + Duration::from_secs(size_bytes / BYTES_PER_SECOND_MIN);
        let (answers, mut answered) = mpsc::channel(healthy.len());
        for (index, slot) in healthy.iter().enumerate() {
            let (slot, answers, writing) = (Arc::clone(slot), answers.clone(), write(Arc::clone(&slot.store)));
            self.tracker.spawn(async move {
                let answer = write_in_time(&slot, allowance, writing).await;
                // Nobody may be waiting any more; reconciliation finds what was written.
                let _ = answers.send((index, answer)).await;
            });
        }
        drop(answers);
        let mut stored = Vec::new();
        let (mut failures, mut damaged) = (Vec::new(), Vec::new());
        let mut waiting: Vec<bool> = vec![true; healthy.len()];
        while let Some((index, answer)) = next_answer(&healthy, &waiting, &mut answered).await {
            waiting[index] = false;
            let name = healthy[index].name().clone();
            match answer {
                Answer::Written(value) => {
                    stored.push((name, value));
                    process::crash_point!("coordinator/after-first-store-before-second");
                    if self.ack == Ack::One {
                        break;
                    }
                }
                Answer::StoreFailed(reason) => failures.push(format!("{name}: {reason}")),
                Answer::CopyDamaged(key, reason) => {
                    if self.complaints.is_new(&name, &key, &reason) {
                        tracing::error!(store = %name, %key, reason, "the stored copy of an object is damaged");
                    }
                    damaged.push(reason);
                }
                Answer::ObjectRefused(error) => return Err(NotStored::Object(error)),
            }
        }
        if stored.is_empty() && !damaged.is_empty() {
            damaged.append(&mut failures);
            return Err(NotStored::Damaged(damaged.join("; ")));
        }
        if stored.is_empty() {
            return Err(NotStored::NoStore(failures.join("; ")));
        }
        let has = |name: &StoreName| stored.iter().any(|(store, _)| store == name);
        let lagging = self.names().into_iter().filter(|name| !has(name)).collect();
        Ok(Spread { stored, lagging })
    }

    fn nobody<E>(&self) -> NotStored<E> {
        let text = |slot: &Arc<Slot>| format!("{} is {}", slot.name(), slot.health());
        let all: Vec<String> = self.slots.iter().map(text).collect();
        if self.slots.iter().any(|slot| matches!(slot.health(), Health::Full { .. })) {
            NotStored::Full(all.join("; "))
        } else {
            NotStored::NoStore(all.join("; "))
        }
    }

    /// Looks at every store at the same time and notes what each can do.
    pub async fn check(&self) {
        join_all(self.slots.iter().map(|slot| health::check(self, slot))).await;
    }
}

enum Answer<T, E> {
    Written(T),
    StoreFailed(String),
    CopyDamaged(ObjectKey, String),
    ObjectRefused(E),
}

async fn write_in_time<T, E: AboutStore>(
    slot: &Slot,
    allowance: Duration,
    writing: impl Future<Output = Result<T, E>>,
) -> Answer<T, E> {
    let timed = tokio::time::timeout(allowance, async {
        let _permit = slot.writes.acquire().await;
        writing.await
    });
    match timed.await {
        Ok(Ok(value)) => Answer::Written(value),
        Ok(Err(error)) => match error.store_error() {
            Some(about_store) if about_store.is_outage() => {
                slot.judge(about_store);
                Answer::StoreFailed(chain(about_store))
            }
            _ => match error.damaged_copy() {
                Some(key) => Answer::CopyDamaged(key.clone(), error.to_string()),
                None => Answer::ObjectRefused(error),
            },
        },
        Err(_) => {
            let reason = format!("silent for {} s", allowance.as_secs());
            slot.set_health(Health::Lagging { reason: reason.clone() });
            Answer::StoreFailed(reason)
        }
    }
}

/// The next answer of a store that is waited for; a store that others found to be away is not waited for any longer.
async fn next_answer<T, E>(
    healthy: &[Arc<Slot>],
    waiting: &[bool],
    answered: &mut mpsc::Receiver<(usize, Answer<T, E>)>,
) -> Option<(usize, Answer<T, E>)> {
    let away = healthy
        .iter()
        .enumerate()
        .filter(|(index, _)| waiting[*index])
        .map(|(index, slot)| Box::pin(async move { (index, Answer::StoreFailed(slot.no_longer_healthy().await)) }));
    let away: Vec<_> = away.collect();
    if away.is_empty() {
        return None;
    }
    tokio::select! {
        biased;
        answer = answered.recv() => answer,
        (given_up, _, _) = futures_util::future::select_all(away) => Some(given_up),
    }
}

/// An error with everything below it, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
