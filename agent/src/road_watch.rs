//! The road as the rest of the agent sees it: feeds the state machine with what is seen and the time, and tells everybody
//! when the road changes.
//!
//! Invariants: a call under way is counted from [`RoadWatch::begin`] until its guard ends or is dropped, whatever happens to
//! the future that holds it. Changes are logged here and nowhere else.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use process::clock::Monotonic;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::road::{DirectRoad, Patience, Reason, Road, RoadState, Seen};

/// How often time alone is looked at.
const TICK: Duration = Duration::from_millis(200);

/// The road, shared.
#[derive(Debug)]
pub struct RoadWatch {
    state: Mutex<RoadState>,
    road: watch::Sender<Road>,
    connect_patience: Duration,
}

/// The road at one moment, for reports.
#[derive(Clone, Copy, Debug)]
pub struct RoadView {
    /// The road.
    pub road: Road,
    /// Why.
    pub reason: Reason,
    /// For how long nothing got through to the coordinator, if so.
    pub failing_for: Option<Duration>,
}

impl RoadWatch {
    /// Starts on the coordinator road.
    pub fn new(patience: Patience, direct: DirectRoad) -> Arc<Self> {
        let state = RoadState::new(patience, direct, Monotonic::now());
        Arc::new(Self {
            road: watch::Sender::new(state.road()),
            state: Mutex::new(state),
            connect_patience: patience.connect,
        })
    }

    /// Starts, and stays, on the direct road: there is no coordinator.
    pub fn direct_only(patience: Patience) -> Arc<Self> {
        let mut state = RoadState::new(patience, DirectRoad::Configured, Monotonic::now());
        state.see(Seen::Full, Monotonic::now());
        Arc::new(Self {
            road: watch::Sender::new(state.road()),
            state: Mutex::new(state),
            connect_patience: patience.connect,
        })
    }

    /// Takes in what was seen.
    pub fn see(&self, seen: Seen) {
        self.change(|state| state.see(seen, Monotonic::now()));
    }

    /// A call to the coordinator begins.
    pub fn begin(self: &Arc<Self>) -> UnderWay {
        self.see(Seen::Started);
        UnderWay { road: Arc::clone(self), ended: false }
    }

    /// How long refused connections are taken before anything is made of them.
    pub fn connect_patience(&self) -> Duration {
        self.connect_patience
    }

    /// The road now.
    pub fn road(&self) -> Road {
        *self.road.borrow()
    }

    /// The road, with changes.
    pub fn subscribe(&self) -> watch::Receiver<Road> {
        self.road.subscribe()
    }

    /// The road and why.
    pub fn view(&self) -> RoadView {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let failing_for = state.failing_since().map(Monotonic::elapsed);
        RoadView { road: state.road(), reason: state.reason(), failing_for }
    }

    /// Lets time pass until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => self.change(|state| state.at(Monotonic::now())),
            }
        }
    }

    fn change(&self, step: impl FnOnce(&mut RoadState) -> Road) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let road = step(&mut state);
        let reason = state.reason();
        self.road.send_if_modified(|current| {
            let changed = *current != road;
            if changed {
                tracing::info!(from = %*current, to = %road, reason = reason.as_str(), "the road has changed");
            }
            *current = road;
            changed
        });
    }
}

/// Waits until the road is another one than `road`. Gives nothing out that borrows the road: whoever drops an upload while
/// holding such a borrow would wait for itself.
pub async fn turned_away(changes: &mut watch::Receiver<Road>, road: Road) {
    if changes.wait_for(|now| *now != road).await.is_err() {
        // The watch lives as long as the agent; nothing will ever change again.
        std::future::pending::<()>().await;
    }
}

/// Waits until the road is `road`.
pub async fn turned_to(changes: &mut watch::Receiver<Road>, road: Road) {
    if changes.wait_for(|now| *now == road).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// One call under way; says that it was dropped unless it was ended.
#[derive(Debug)]
pub struct UnderWay {
    road: Arc<RoadWatch>,
    ended: bool,
}

impl UnderWay {
    /// The call ended.
    pub fn end(mut self, seen: Seen) {
        self.ended = true;
        self.road.see(seen);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if !self.ended {
            self.road.see(Seen::Dropped);
        }
    }
}
