//! What everybody shares: two stores, time, and an observer who sees everything and knows what each backup needs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use futures_util::FutureExt;
use jiff::{SignedDuration, Timestamp};
use repository::key::{ObjectKey, ParsedKey};
use repository::name::{BackupId, ClusterName};
use repository::retention::{Policy, References};
use repository::root::{Root, RootBackup};
use repository::store::{ListPage, ObjectStore};
use repository::stores::memory::MemoryStore;

use crate::actors::Session;
use crate::random::Random;
use crate::restoring::{self, Restoring};
use crate::scheduled::{Fate, Scheduled};

/// Of a hundred requests, how many lose their answer.
const LOST_ANSWERS: u64 = 1;
/// Of a hundred listings, how many lag behind.
const STALE_LISTINGS: u64 = 4;
/// By how many steps.
const YOUNG: u64 = 12;
/// Of a thousand steps, in how many an outage begins.
const OUTAGES: u64 = 6;

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) stores: Vec<Arc<Scheduled>>,
    pub(crate) policy: Policy,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) random: Random,
    /// Whether every store answers every request.
    pub(crate) calm: bool,
    step: u64,
    away_until: [u64; 2],
    /// How far each coordinator's clock is off.
    skew: [SignedDuration; 2],
    pub(crate) next_id: u32,
    /// The next segment of WAL.
    pub(crate) wal: u64,
    /// Backups that were begun, with what each needs. Outlives every coordinator, as an agent's disk does.
    pub(crate) sessions: Vec<Session>,
    /// Roots that somebody read once, by store.
    pub(crate) old_roots: Vec<(usize, Root)>,
    /// What backups refer to; a manifest never changes.
    pub(crate) references: BTreeMap<BackupId, References>,
    /// When objects were put, for those who believe in grace.
    pub(crate) put_at: BTreeMap<ObjectKey, u64>,
    /// What restores read, by store and backup.
    pub(crate) restores: BTreeMap<(usize, BackupId), Restoring>,
    newest: [Option<Root>; 2],
    changed: bool,
    lost: Option<Lost>,
    counts: Counts,
    requests: Vec<(usize, &'static str, String)>,
}

/// What happened, so that a run in which nothing does is noticed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) published: u64,
    pub(crate) removed: u64,
    pub(crate) zombies: u64,
    /// Backups with packs of unfinished ones.
    pub(crate) gone_on: u64,
    /// Restores that held what they read.
    pub(crate) restored: u64,
}

/// What must never happen.
#[derive(Debug, Clone)]
pub(crate) enum Lost {
    Needed { store: usize, backup: BackupId, key: ObjectKey },
    Root { key: ObjectKey },
    NewestBackup { store: usize },
    Held { store: usize, backup: BackupId },
    Restored { store: usize, backup: BackupId, key: ObjectKey },
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Needed { store, backup, key } => write!(f, "store {store}: {backup} needs {key}, which is gone"),
            Self::Root { key } => write!(f, "{key} was removed"),
            Self::NewestBackup { store } => write!(f, "store {store}: no backup is left"),
            Self::Restored { store, backup, key } => {
                write!(f, "store {store}: {key} is gone while {backup} is restored")
            }
            Self::Held { store, backup } => write!(f, "store {store}: {backup} was held and is gone"),
        }
    }
}

pub(crate) fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

impl World {
    pub(crate) fn new(seed: u64) -> Arc<Self> {
        Self::made(seed, None)
    }

    fn made(seed: u64, policy: Option<Policy>) -> Arc<Self> {
        let mut random = Random::new(seed);
        let skews = [0, 0, 0, 0, 0, -3, 24 * 60, -24 * 60];
        let skew = [0, 1].map(|_| SignedDuration::from_mins(*random.choose(&skews).unwrap()));
        let minutes = |minutes: u64| std::time::Duration::from_secs(minutes * 60);
        let window = random.percent(50).then(|| minutes(50 + random.below(200)));
        let drawn = Policy { any: Some(1 + random.below(2) as u32), window, ..Policy::default() };
        let policy = policy.unwrap_or(drawn);
        Arc::new_cyclic(|world| {
            let store = |number: usize| {
                let inner = MemoryStore::new(format!("store{number}").parse().unwrap());
                Arc::new(Scheduled { inner, number, world: world.clone() })
            };
            let state = State {
                random,
                calm: false,
                step: 0,
                away_until: [0; 2],
                skew,
                next_id: 0,
                wal: 1,
                sessions: Vec::new(),
                old_roots: Vec::new(),
                references: BTreeMap::new(),
                put_at: BTreeMap::new(),
                restores: BTreeMap::new(),
                newest: [None, None],
                changed: false,
                lost: None,
                counts: Counts::default(),
                requests: Vec::new(),
            };
            Self { stores: vec![store(0), store(1)], policy, state: Mutex::new(state) }
        })
    }

    /// One in which nothing goes wrong but what a test does, and clocks are right.
    pub(crate) fn calm(policy: Policy) -> Arc<Self> {
        let world = Self::made(0, Some(policy));
        {
            let mut state = world.state();
            (state.calm, state.skew) = (true, [SignedDuration::ZERO; 2]);
        }
        world
    }

    /// Time goes on by minutes.
    pub(crate) fn pass(&self, minutes: u64) {
        self.state().step += minutes;
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Time goes on, and a store may go away.
    pub(crate) fn tick(&self, step: u64, dice: &mut Random) {
        let mut state = self.state();
        state.step = step;
        if dice.below(1000) < OUTAGES {
            let store = dice.below(2) as usize;
            state.away_until[store] = step + 5 + dice.below(60);
        }
    }

    /// What a coordinator's clock says: a step is a minute.
    pub(crate) fn now(&self, coordinator: usize) -> Timestamp {
        let state = self.state();
        state.time() + state.skew[coordinator]
    }

    /// What the database server's clock says.
    pub(crate) fn server_time(&self) -> Timestamp {
        self.state().time()
    }

    pub(crate) fn fate(&self, store: usize, operation: &'static str, key: &str) -> Fate {
        let mut state = self.state();
        state.requests.push((store, operation, key.to_owned()));
        if state.calm {
            Fate::Answered
        } else if state.away_until[store] > state.step {
            Fate::Away
        } else if state.random.percent(LOST_ANSWERS) {
            Fate::Unanswered
        } else {
            Fate::Answered
        }
    }

    pub(crate) fn note_put(&self, store: usize, key: &ObjectKey, bytes: &Bytes) {
        let mut state = self.state();
        let step = state.step;
        state.put_at.insert(key.clone(), step);
        if matches!(key.parsed(), Ok(ParsedKey::Root { .. })) {
            let (root, _) = Root::from_bytes(bytes).unwrap();
            restoring::note_root(&self.stores[store], &mut state, &root);
            state.note_root(store, root);
        }
    }

    pub(crate) fn note_delete(&self, _store: usize, key: &ObjectKey) {
        let mut state = self.state();
        state.changed = true;
        state.counts.removed += 1;
        let removable =
            matches!(key.parsed(), Ok(ParsedKey::Pack { .. } | ParsedKey::Manifest { .. } | ParsedKey::Wal { .. }));
        if !removable {
            state.lost = Some(Lost::Root { key: key.clone() });
        }
    }

    /// Some stores' listings lag behind: sometimes one does not show what is young.
    pub(crate) fn hide_young(&self, page: &mut ListPage) {
        let mut state = self.state();
        if state.calm || !state.random.percent(STALE_LISTINGS) {
            return;
        }
        let (step, put_at) = (state.step, &state.put_at);
        page.objects.retain(|entry| put_at.get(&entry.key).is_none_or(|at| at + YOUNG < step));
        page.more &= !page.objects.is_empty();
    }

    /// Remembers in which stores a session's backup is pinned.
    pub(crate) fn note_stores(&self, session: &Session) {
        let mut state = self.state();
        let known = state.sessions.iter_mut().find(|known| known.entry.backup == session.entry.backup);
        known.unwrap().stores = session.stores.clone();
    }

    /// The session as one that does not say which attempts it goes on from.
    pub(crate) fn forget_attempts(&self, mut session: Session) -> Session {
        session.entry.attempts.clear();
        let mut state = self.state();
        let known = state.sessions.iter_mut().find(|known| known.entry.backup == session.entry.backup);
        known.unwrap().entry.attempts.clear();
        session
    }

    pub(crate) fn note_zombie(&self) {
        self.state().counts.zombies += 1;
    }

    pub(crate) fn counts(&self) -> Counts {
        self.state().counts
    }

    pub(crate) fn requests(&self) -> usize {
        let state = self.state();
        // Nonces differ from run to run and are in no key.
        state.requests.iter().map(|(store, operation, key)| store + operation.len() + key.len()).sum()
    }

    /// Whether everything that the newest roots name is there.
    pub(crate) fn check(&self) -> Result<(), Lost> {
        let mut state = self.state();
        if let Some(lost) = state.lost.take() {
            return Err(lost);
        }
        if !std::mem::take(&mut state.changed) {
            return Ok(());
        }
        for (store, root) in state.newest.iter().enumerate() {
            for backup in root.iter().flat_map(|root| &root.backups) {
                let session = state.sessions.iter().find(|session| session.entry.backup == backup.backup).unwrap();
                for key in &session.needs {
                    let found = self.stores[store].inner.head(key).now_or_never().unwrap().unwrap();
                    if found.is_none() {
                        return Err(Lost::Needed { store, backup: backup.backup, key: key.clone() });
                    }
                }
            }
        }
        restoring::check(&self.stores, &state)
    }
}

impl State {
    pub(crate) fn step(&self) -> u64 {
        self.step
    }

    pub(crate) fn note_restored(&mut self) {
        self.counts.restored += 1;
    }

    pub(crate) fn time(&self) -> Timestamp {
        let begin: Timestamp = "2026-11-23T00:00:00Z".parse().unwrap();
        begin + SignedDuration::from_mins(self.step as i64)
    }

    fn note_root(&mut self, store: usize, root: Root) {
        self.changed = true;
        if let Some(before) = &self.newest[store] {
            let new = root.backups.iter().filter(|backup| before.backup(&backup.backup).is_none()).count();
            self.counts.published += new as u64;
            let gone_on = |backup: &&RootBackup| before.backup(&backup.backup).is_none() && !backup.attempts.is_empty();
            self.counts.gone_on += root.backups.iter().filter(gone_on).count() as u64;
            if !before.backups.is_empty() && root.backups.is_empty() {
                self.lost = Some(Lost::NewestBackup { store });
            }
            let held = before.holds.iter().filter(|hold| root.holds.contains(hold));
            if let Some(hold) = held.clone().find(|hold| root.backup(&hold.backup).is_none()) {
                self.lost = Some(Lost::Held { store, backup: hold.backup });
            }
        }
        self.newest[store] = Some(root);
    }
}
