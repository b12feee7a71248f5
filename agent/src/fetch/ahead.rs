//! Segments fetched ahead of recovery.
//!
//! Invariants: at most the configured number, and at most [`AHEAD_BYTES_MAX`], lie ready or are under way, [`AT_ONCE`] at a
//! time, in order. The first one that cannot be had ends the look ahead until the next segment is asked for; nothing is
//! remembered of it. A segment is handed over once.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use postgres_format::{SegmentName, SystemIdentifier, Timeline, WalFileName};
use tokio::sync::watch;

use super::Fetcher;
use crate::node::NodeFacts;

/// Bytes of segments ready or under way.
const AHEAD_BYTES_MAX: u64 = 1 << 30;
/// Segments under way at once.
const AT_ONCE: usize = 2;
/// How long fetching ahead waits while the next segment lies ready: the answer under way goes first, and the command that
/// brings it to PostgreSQL ends before the processors are busy again.
const ANSWER_FIRST: Duration = Duration::from_millis(15);

#[derive(Clone, Debug)]
enum Stage {
    UnderWay,
    Ready(PathBuf),
    Gone,
}

#[derive(Debug, Default)]
struct State {
    belongs: Option<SystemIdentifier>,
    segments: BTreeMap<SegmentName, watch::Sender<Stage>>,
    running: bool,
    wanted: Vec<SegmentName>,
}

/// What was fetched ahead.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    state: Mutex<State>,
}

impl Ahead {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops everything of another cluster.
    pub(super) fn belong_to(&self, system: SystemIdentifier) {
        let mut state = self.state();
        if state.belongs != Some(system) {
            state.belongs = Some(system);
            let all = std::mem::take(&mut state.segments);
            drop(state);
            discard(all);
        }
    }

    /// The file of a segment that lies ready or is under way; it is the caller's then.
    pub(super) async fn take(&self, segment: SegmentName) -> Option<PathBuf> {
        let mut stage = self.state().segments.get(&segment)?.subscribe();
        let stage = stage.wait_for(|stage| !matches!(stage, Stage::UnderWay)).await.ok()?.clone();
        self.state().segments.remove(&segment);
        match stage {
            Stage::Ready(path) => Some(path),
            Stage::UnderWay | Stage::Gone => None,
        }
    }

    /// A newer timeline is being replayed; what the older ones have behind its beginning is of no use.
    pub(super) fn forget_older_timelines(&self, timeline: Timeline) {
        let mut state = self.state();
        let (older, kept) =
            std::mem::take(&mut state.segments).into_iter().partition(|(segment, _)| segment.timeline() < timeline);
        state.segments = kept;
        drop(state);
        discard(older);
    }
}

fn discard(segments: BTreeMap<SegmentName, watch::Sender<Stage>>) {
    for stage in segments.into_values() {
        if let Stage::Ready(path) = &*stage.borrow() {
            // Left over, it is removed at the next start.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Fetcher {
    /// Fetches what follows `segment`, in the background.
    pub(super) fn look_ahead(self: &Arc<Self>, segment: SegmentName, facts: &NodeFacts) {
        let size = facts.segment_size;
        let count = (self.settings.prefetch as u64).min(AHEAD_BYTES_MAX / size.bytes());
        let Ok(mut number) = segment.number(size) else { return };
        let mut state = self.ahead.state();
        state.wanted.clear();
        let following = SegmentName::new(segment.timeline(), number.next(), size);
        let is_ready = |stage: &watch::Sender<Stage>| matches!(*stage.borrow(), Stage::Ready(_));
        let following_is_ready = state.segments.get(&following).is_some_and(is_ready);
        for _ in 0..count {
            number = number.next();
            let next = SegmentName::new(segment.timeline(), number, size);
            if !state.segments.contains_key(&next) {
                state.wanted.push(next);
            }
        }
        // What lies ready behind the one asked for was skipped, and would stay for ever.
        let passed = state.segments.extract_if(..segment, |_, stage| matches!(*stage.borrow(), Stage::Ready(_)));
        let passed: BTreeMap<_, _> = passed.collect();
        let start = !state.running && !state.wanted.is_empty();
        state.running |= start;
        drop(state);
        discard(passed);
        if start {
            let (fetcher, facts) = (Arc::clone(self), facts.clone());
            tokio::spawn(async move {
                if following_is_ready {
                    tokio::time::sleep(ANSWER_FIRST).await;
                }
                fetcher.fetch_ahead(&facts).await;
            });
        }
    }

    async fn fetch_ahead(self: &Arc<Self>, facts: &NodeFacts) {
        let mut running = Running { ahead: &self.ahead, over: false };
        while !running.over {
            let next = Arc::clone(self);
            let fetches = stream::iter(std::iter::from_fn(move || next.begin_next())).map(|(segment, stage)| {
                let (fetcher, facts) = (Arc::clone(self), facts.clone());
                async move { fetcher.fetch_one(segment, &stage, &facts).await }
            });
            let mut fetches = std::pin::pin!(fetches.buffered(AT_ONCE));
            while let Some(had) = fetches.next().await {
                if !had {
                    self.ahead.state().wanted.clear();
                }
            }
            let mut state = self.ahead.state();
            running.over = state.wanted.is_empty();
            state.running = !running.over;
        }
    }

    fn begin_next(&self) -> Option<(SegmentName, watch::Sender<Stage>)> {
        let mut state = self.ahead.state();
        if state.wanted.is_empty() {
            return None;
        }
        let segment = state.wanted.remove(0);
        let stage = watch::Sender::new(Stage::UnderWay);
        state.segments.insert(segment, stage.clone());
        Some((segment, stage))
    }

    async fn fetch_one(&self, segment: SegmentName, stage: &watch::Sender<Stage>, facts: &NodeFacts) -> bool {
        let guard = Unfinished { fetcher: self, segment, stage };
        let obtained = self.obtain(WalFileName::Segment(segment), facts).await;
        let Ok(path) = obtained else { return false };
        let same_cluster = {
            let state = self.ahead.state();
            // A segment dropped meanwhile (another cluster, a newer timeline) is nobody's now.
            state.belongs == Some(facts.system_identifier)
                && state.segments.get(&segment).is_some_and(|current| current.same_channel(stage))
        };
        if same_cluster {
            stage.send_replace(Stage::Ready(path));
            std::mem::forget(guard);
        } else {
            let _ = std::fs::remove_file(path);
        }
        true
    }
}

/// Says that nobody fetches ahead any more when the task ends before its time.
struct Running<'a> {
    ahead: &'a Ahead,
    over: bool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.ahead.state().running = false;
        }
    }
}

/// Takes a segment out again that did not come.
struct Unfinished<'a> {
    fetcher: &'a Fetcher,
    segment: SegmentName,
    stage: &'a watch::Sender<Stage>,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let mut state = self.fetcher.ahead.state();
        if state.segments.get(&self.segment).is_some_and(|current| current.same_channel(self.stage)) {
            state.segments.remove(&self.segment);
        }
        drop(state);
        self.stage.send_replace(Stage::Gone);
    }
}
