//! The look ahead: when to look at `archive_status`, and what to start then.
//!
//! Invariant: notifications of the kernel are a hint; a look every [`LOOK_EVERY`] is the truth, so that a lost or overflown
//! notification costs seconds, never a file.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use notify::{EventKind, RecursiveMode, Watcher};
use postgres_format::{Lsn, SegmentName, SegmentSize, WalFileName};
use process::clock::Monotonic;
use tokio_util::sync::CancellationToken;

use super::{Archive, LOOK_NAMES, Origin, State, ready};
use crate::node::Recovery;
use crate::road::Road;

/// How often `archive_status` is looked at without a notification.
pub const LOOK_EVERY: Duration = Duration::from_secs(3);
/// Shortest time between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// How often segments that lost their flag are looked for.
const UNFLAGGED_EVERY: Duration = Duration::from_secs(60);

/// What waits to be archived, as of the last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backlog {
    /// Number of `.ready` files.
    pub ready_files: u64,
    /// Age of the first of them in PostgreSQL's order.
    pub oldest_ready: Duration,
    /// The newest finished segment seen.
    pub newest: Option<SegmentName>,
    /// How far all finished WAL is durable off this host; unknown where no segment tells.
    pub settled: Settled,
}

/// How far all finished WAL is durable off this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Settled {
    /// No segment tells.
    #[default]
    Unknown,
    /// All before this segment is, and it is not.
    Before(SegmentName),
    /// All up to the end of this one is.
    Through(SegmentName),
}

impl Settled {
    fn of(first_open: Option<SegmentName>, newest_settled: Option<SegmentName>) -> Self {
        match (first_open, newest_settled) {
            (Some(open), _) => Self::Before(open),
            (None, Some(settled)) => Self::Through(settled),
            (None, None) => Self::Unknown,
        }
    }

    /// The same as a position, for segments of this size.
    pub fn lsn(self, size: SegmentSize) -> Option<Lsn> {
        match self {
            Self::Unknown => None,
            Self::Before(open) => Some(open.number(size).ok()?.start(size)),
            Self::Through(settled) => Some(settled.number(size).ok()?.end(size)),
        }
    }
}

impl Archive {
    /// Looks ahead until `stop`; each look is given to `seen`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken, seen: impl Fn(Backlog) + Send) {
        let mut watcher = None;
        let mut unflagged_at: Option<Monotonic> = None;
        loop {
            if watcher.is_none() {
                watcher = self.watcher();
            }
            match self.look().await {
                Some(backlog) => seen(backlog),
                None => watcher = None,
            }
            if unflagged_at.is_none_or(|at| at.elapsed() >= UNFLAGGED_EVERY) {
                // What is held back for now is looked for again with the next look.
                unflagged_at = self.look_for_unflagged().await.then(Monotonic::now);
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.wake.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    /// Asks the kernel for notifications; without them there are only the looks.
    fn watcher(self: &Arc<Self>) -> Option<notify::RecommendedWatcher> {
        let archive = Arc::clone(self);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let news = event.map_or(true, |event| {
                event.need_rescan() || matches!(event.kind, EventKind::Create(_) | EventKind::Modify(_))
            });
            if news {
                archive.wake.notify_one();
            }
        });
        let mut watcher = watcher.ok()?;
        watcher.watch(&self.archive_status(), RecursiveMode::NonRecursive).ok()?;
        Some(watcher)
    }

    fn archive_status(&self) -> std::path::PathBuf {
        self.parts.data.pg_wal().join("archive_status")
    }

    /// One look; `None` when there is nothing to look at yet.
    async fn look(self: &Arc<Self>) -> Option<Backlog> {
        let facts = self.facts().ok()?;
        let archive = Arc::clone(self);
        let found = tokio::task::spawn_blocking(move || archive.scan_ready());
        let backlog = found.await.ok()??;
        let resending = self.parts.roads.watch.road() == Road::Direct && self.parts.metrics.resend_pending() > 0;
        if facts.recovery == Recovery::Writing && !resending {
            self.start_ahead(Origin::Ahead);
        }
        if !resending {
            self.start_again();
        }
        Some(backlog)
    }

    fn scan_ready(&self) -> Option<Backlog> {
        let status = self.archive_status();
        if let Some(ledger) = &mut self.state().ledger {
            ledger.begin_scan();
        }
        let (mut first_open, mut newest_answered) = (None, None);
        let found = ready::scan(&status, LOOK_NAMES, |name: &WalFileName| {
            let mut state = self.state();
            let mut is_answered = false;
            if let Some(ledger) = &mut state.ledger {
                ledger.seen_ready(name);
                is_answered = ledger.contains(name);
            }
            match *name {
                WalFileName::Segment(segment) if is_answered => newest_answered = newest_answered.max(Some(segment)),
                WalFileName::Segment(segment) => {
                    first_open = Some(first_open.map_or(segment, |first: SegmentName| first.min(segment)));
                }
                _ => {}
            }
            state.is_wanted(name)
        });
        let found = found.ok()?;
        let mut state = self.state();
        if let Some(ledger) = &mut state.ledger {
            ledger.end_scan();
        }
        state.agreement.wanted_from(found.first);
        state.wanted = found.wanted;
        state.first = found.first;
        drop(state);
        let oldest_ready =
            found.first.map_or(Duration::ZERO, |first| ready::age(&status, &first, process::clock::now()));
        let settled = Settled::of(first_open, newest_answered.max(found.newest_done));
        Some(Backlog { ready_files: found.count, oldest_ready, newest: found.newest, settled })
    }

    /// Ships segments that a crash robbed of their flag; nothing is acknowledged for them. False when some are held back.
    async fn look_for_unflagged(self: &Arc<Self>) -> bool {
        let Ok(facts) = self.facts() else { return true };
        if facts.recovery != Recovery::Writing {
            return true;
        }
        let pg_wal = self.parts.data.pg_wal();
        let found = tokio::task::spawn_blocking(move || unflagged(&pg_wal)).await;
        let Ok(Some(found)) = found else { return true };
        let mut names: Vec<WalFileName> = found.into_iter().map(WalFileName::Segment).collect();
        let mut state = self.state();
        names.retain(|name| state.is_open(name));
        let started = names.iter().filter(|name| !state.is_held_back(name)).count();
        state.wanted.extend(names.iter().copied());
        drop(state);
        if started > 0 {
            tracing::info!(files = names.len(), "segments without a status file are shipped, too");
        }
        self.start_ahead(Origin::Unflagged);
        let state = self.state();
        !names.iter().any(|name| state.is_held_back(name))
    }

    /// Starts jobs ahead of PostgreSQL for as many of these names as there are slots; true when all were started.
    fn start_ahead(self: &Arc<Self>, origin: Origin) -> bool {
        let pg_wal = self.parts.data.pg_wal();
        loop {
            let mut state = self.state();
            let Some(name) = state.wanted.first().copied() else { return true };
            if !state.is_wanted(&name) {
                state.wanted.remove(&name);
                continue;
            }
            let Some(permit) = self.crew.slot() else { return false };
            state.wanted.remove(&name);
            self.spawn(&mut state, name, pg_wal.join(name.to_string()), origin, permit);
        }
    }
}

impl State {
    /// Whether a file should be shipped ahead as soon as the stores agree about its timeline.
    fn is_held_back(&self, name: &WalFileName) -> bool {
        self.is_open(name) && !self.agreement.lets_ahead(name, self.jobs.keys())
    }
}

fn unflagged(pg_wal: &Path) -> Option<std::collections::BTreeSet<SegmentName>> {
    ready::unflagged(pg_wal, LOOK_NAMES).ok()
}
