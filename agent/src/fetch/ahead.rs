//! Segments on their way into the spool: those that were asked for, and those fetched ahead of recovery.
//!
//! A standby is held for a short time only and asks again. So a fetch that has begun goes on when nobody waits for it any
//! more, and whoever asks next finds it here, under way or ready: a segment comes at last however slow the stores are.
//!
//! Invariants: ahead are at most the configured number, and at most [`AHEAD_BYTES_MAX`], ready or under way, [`AT_ONCE`] at a
//! time, in order. The first one that cannot be had ends the look ahead until the next segment is asked for. Of segments that
//! were asked for at most [`ASKED_MAX`] are here. Nothing is remembered of a fetch that brought no file, and that answer is
//! given to nobody who asked after it had begun. What goes from here ends its fetch and removes its file: when it was handed
//! over, when recovery has passed it, and when nobody has asked for it for [`KEPT_FOR`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use postgres_format::{SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline, WalFileName};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::spooled::Spooled;
use super::{Answer, Fetcher};
use crate::node::NodeFacts;

/// Bytes of segments ready or under way ahead of recovery.
const AHEAD_BYTES_MAX: u64 = 1 << 30;
/// Segments under way ahead at once.
const AT_ONCE: usize = 2;
/// How long fetching ahead waits while the next segment lies ready: the answer under way goes first, and the command that
/// brings it to PostgreSQL ends before the processors are busy again.
const ANSWER_FIRST: Duration = Duration::from_millis(15);
/// Segments that were asked for and not handed over yet: PostgreSQL asks for a segment on one timeline after the other.
const ASKED_MAX: usize = 2;
/// How long a segment lies ready that nobody asks for: the server streams now, or is gone.
const KEPT_FOR: Duration = Duration::from_secs(10 * 60);
/// Time for one fetch, besides what its size takes at [`SLOWEST_BYTES_A_SECOND`].
const FETCH_TIME: Duration = Duration::from_secs(120);
/// Slowest fetch that is not given up, in bytes a second.
const SLOWEST_BYTES_A_SECOND: u64 = 64 << 10;

#[derive(Clone, Debug)]
enum Stage {
    UnderWay,
    Ready(Arc<Spooled>),
    Failed(Answer),
}

/// A segment on its way.
#[derive(Debug)]
struct Entry {
    stage: watch::Sender<Stage>,
    asked: bool,
    /// When it was asked for or came near last.
    used: Instant,
    /// Ends the fetch with the entry.
    _fetch: DropGuard,
}

#[derive(Debug, Default)]
struct State {
    belongs: Option<SystemIdentifier>,
    segments: BTreeMap<SegmentName, Entry>,
    running: bool,
    wanted: Vec<SegmentName>,
}

impl State {
    fn begin(&mut self, segment: SegmentName, asked: bool) -> Begun {
        let (stage, end) = (watch::Sender::new(Stage::UnderWay), CancellationToken::new());
        let fetch = end.clone().drop_guard();
        self.segments.insert(segment, Entry { stage: stage.clone(), asked, used: Instant::now(), _fetch: fetch });
        Begun { segment, stage, end }
    }

    fn holds(&self, begun: &Begun) -> bool {
        self.segments.get(&begun.segment).is_some_and(|entry| entry.stage.same_channel(&begun.stage))
    }

    /// Makes room for one more that is asked for.
    fn drop_longest_unasked(&mut self) -> Option<Entry> {
        let asked = || self.segments.iter().filter(|(_, entry)| entry.asked);
        let oldest = asked().min_by_key(|(_, entry)| entry.used).map(|(segment, _)| *segment)?;
        if asked().count() < ASKED_MAX { None } else { self.segments.remove(&oldest) }
    }
}

/// A fetch to be made.
struct Begun {
    segment: SegmentName,
    stage: watch::Sender<Stage>,
    end: CancellationToken,
}

/// Segments on their way.
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
            drop(all);
        }
    }

    /// A segment was handed over, or is not to be.
    pub(super) fn forget(&self, segment: SegmentName) {
        let forgotten = self.state().segments.remove(&segment);
        drop(forgotten);
    }

    /// A newer timeline is being replayed; what the older ones have behind its beginning is of no use.
    pub(super) fn forget_older_timelines(&self, timeline: Timeline) {
        self.drop_all(|segment, _| segment.timeline() < timeline);
    }

    /// Drops what nobody has asked for in a long time.
    pub(super) fn expire(&self) {
        self.drop_all(|_, entry| matches!(*entry.stage.borrow(), Stage::Ready(_)) && entry.used.elapsed() >= KEPT_FOR);
    }

    fn drop_all(&self, goes: impl Fn(&SegmentName, &Entry) -> bool) {
        let gone: Vec<_> = self.state().segments.extract_if(.., |segment, entry| goes(segment, entry)).collect();
        drop(gone);
    }

    /// A segment that is ready or under way, now asked for.
    fn find(&self, segment: SegmentName) -> Option<watch::Receiver<Stage>> {
        let mut state = self.state();
        let entry = state.segments.get_mut(&segment)?;
        (entry.asked, entry.used) = (true, Instant::now());
        Some(entry.stage.subscribe())
    }
}

/// How a fetch ends.
async fn ended(mut stage: watch::Receiver<Stage>) -> Result<Arc<Spooled>, Answer> {
    let given_up = || Err(Answer::Unknown("its fetch was given up".to_owned()));
    match stage.wait_for(|stage| !matches!(stage, Stage::UnderWay)).await.map(|stage| stage.clone()) {
        Ok(Stage::Ready(file)) => Ok(file),
        Ok(Stage::Failed(answer)) => Err(answer),
        Ok(Stage::UnderWay) | Err(_) => given_up(),
    }
}

impl Fetcher {
    /// The file of a segment: one that is on its way, or fetched now. Dropping the future lets the fetch go on. It stays
    /// until [`Ahead::forget`].
    pub(super) async fn bring(
        self: &Arc<Self>,
        segment: SegmentName,
        facts: &NodeFacts,
    ) -> Result<Arc<Spooled>, Answer> {
        // It may have begun long ago: only the file counts.
        if let Some(stage) = self.ahead.find(segment)
            && let Ok(file) = ended(stage).await
        {
            return Ok(file);
        }
        ended(self.begin_asked(segment, facts)).await
    }

    fn begin_asked(self: &Arc<Self>, segment: SegmentName, facts: &NodeFacts) -> watch::Receiver<Stage> {
        // Another may have begun meanwhile, and then after this was asked for.
        if let Some(stage) = self.ahead.find(segment) {
            return stage;
        }
        let mut state = self.ahead.state();
        let dropped = state.drop_longest_unasked();
        let begun = state.begin(segment, true);
        drop(state);
        drop(dropped);
        let (stage, fetcher, facts) = (begun.stage.subscribe(), Arc::clone(self), facts.clone());
        tokio::spawn(async move { fetcher.fetch_one(begun, &facts).await });
        stage
    }

    /// Fetches what follows `segment`, in the background.
    pub(super) fn look_ahead(self: &Arc<Self>, segment: SegmentName, facts: &NodeFacts) {
        let size = facts.segment_size;
        let count = (self.settings.prefetch as u64).min(AHEAD_BYTES_MAX / size.bytes());
        let Ok(mut number) = segment.number(size) else { return };
        let mut state = self.ahead.state();
        state.wanted.clear();
        let following = SegmentName::new(segment.timeline(), number.next(), size);
        let is_ready = |entry: &Entry| matches!(*entry.stage.borrow(), Stage::Ready(_));
        let following_is_ready = state.segments.get(&following).is_some_and(is_ready);
        for _ in 0..count {
            number = number.next();
            let next = SegmentName::new(segment.timeline(), number, size);
            match state.segments.get_mut(&next) {
                Some(entry) => entry.used = Instant::now(),
                None => state.wanted.push(next),
            }
        }
        // What lies behind the one asked for was passed.
        let first = SegmentName::new(segment.timeline(), SegmentNumber::new(0), size);
        let passed: Vec<_> = state.segments.extract_if(first..segment, |_, _| true).collect();
        let start = !state.running && !state.wanted.is_empty();
        state.running |= start;
        drop(state);
        drop(passed);
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
            let fetches = stream::iter(std::iter::from_fn(move || next.begin_next())).map(|begun| {
                let (fetcher, facts) = (Arc::clone(self), facts.clone());
                async move { fetcher.fetch_one(begun, &facts).await }
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

    fn begin_next(&self) -> Option<Begun> {
        let mut state = self.ahead.state();
        while !state.wanted.is_empty() {
            let segment = state.wanted.remove(0);
            // One that was asked for meanwhile is on its way.
            if !state.segments.contains_key(&segment) {
                return Some(state.begin(segment, false));
            }
        }
        None
    }

    /// Fetches a segment; whether it came.
    async fn fetch_one(&self, begun: Begun, facts: &NodeFacts) -> bool {
        let mut unfinished = Unfinished { ahead: &self.ahead, begun: &begun, answer: None };
        let obtain = self.obtain(WalFileName::Segment(begun.segment), facts);
        let obtained = tokio::select! {
            biased;
            () = begun.end.cancelled() => Err(Answer::Unknown("its fetch was given up".to_owned())),
            obtained = tokio::time::timeout(fetch_time(facts.segment_size), obtain) => obtained.unwrap_or_else(|_| {
                Err(Answer::Unknown(format!("its fetch was slower than {SLOWEST_BYTES_A_SECOND} bytes a second")))
            }),
        };
        match obtained {
            Ok(file) => {
                std::mem::forget(unfinished);
                if let Some(entry) = self.ahead.state().segments.get_mut(&begun.segment) {
                    entry.used = Instant::now();
                }
                // Where the entry is gone, the file goes with the last who waits for it.
                begun.stage.send_replace(Stage::Ready(Arc::new(file)));
                true
            }
            Err(answer) => {
                unfinished.answer = Some(answer);
                false
            }
        }
    }
}

fn fetch_time(size: SegmentSize) -> Duration {
    FETCH_TIME + Duration::from_secs(size.bytes() / SLOWEST_BYTES_A_SECOND)
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

/// Takes a segment out again that did not come, and then says so.
struct Unfinished<'a> {
    ahead: &'a Ahead,
    begun: &'a Begun,
    answer: Option<Answer>,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let mut state = self.ahead.state();
        let entry = if state.holds(self.begun) { state.segments.remove(&self.begun.segment) } else { None };
        drop(state);
        drop(entry);
        let answer = self.answer.take().unwrap_or_else(|| Answer::Unknown("its fetch broke off".to_owned()));
        self.begun.stage.send_replace(Stage::Failed(answer));
    }
}
