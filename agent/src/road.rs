//! Which way WAL goes: through the coordinator, or straight to the direct store. A pure state machine: what happened and
//! when goes in, the road comes out.
//!
//! ```text
//!              refused for connect_patience · silent for silence_patience · stores full
//!   coordinator ───────────────────────────────────────────────────────────────────────▶ direct
//!        ▲                                                                                  │
//!        └──────────── PROBES_TO_RETURN good probes in a row over the return delay ─────────┘
//! ```
//!
//! Invariants: without a direct road the answer is always the coordinator. The way back needs more evidence than the way
//! out, and each return that did not last doubles the return delay up to [`RETURN_DELAY_MAX`], so that a coordinator that
//! answers probes but takes no WAL does not make the road swing. A good probe takes back what bad probes said and nothing
//! else: uploads that fail are forgiven by an upload that was answered. Silence is measured from the last sign of life of
//! anything under way, so a slow upload that moves is no silence.
//! This room does not probe, send or wait; it is told.

use std::fmt;
use std::time::Duration;

use process::clock::Monotonic;

/// Good probes in a row before the coordinator is used again.
pub const PROBES_TO_RETURN: u32 = 2;
/// Longest return delay, however often a return did not last.
pub const RETURN_DELAY_MAX: Duration = Duration::from_secs(600);
/// A return that lasted this many return delays was a good one; the delay starts over.
const SETTLED_AFTER: u32 = 10;

/// A way out of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Road {
    /// Through the coordinator into every store.
    Coordinator,
    /// Straight into the direct store.
    Direct,
}

impl Road {
    /// The word used in reports and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Direct => "direct",
        }
    }
}

impl fmt::Display for Road {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether this node was given a store to write to by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectRoad {
    /// It was.
    Configured,
    /// It was not; the coordinator is the only road.
    Absent,
}

/// How patient the road is.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long refused connections are taken before diverting.
    pub connect: Duration,
    /// How long silence is taken before diverting.
    pub silence: Duration,
    /// How long the coordinator must look well before WAL goes back to it.
    pub return_after: Duration,
}

/// What was seen of the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A call began.
    Started,
    /// A call moved bytes.
    Moved,
    /// A call ended with an answer, good or refused on its merits; the coordinator lives.
    Answered,
    /// A call ended because it could not be delivered, or no store took it.
    Failed,
    /// A call ended because this side dropped it; says nothing.
    Dropped,
    /// A call ended with "stores are full".
    Full,
    /// A probe went well.
    ProbeGood,
    /// A probe was answered, but no store takes WAL now. Says nothing against the road WAL is on: an upload will tell.
    ProbeUnfit,
    /// A probe was not answered.
    ProbeBad,
}

/// Why the road is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nothing is wrong.
    Well,
    /// The coordinator cannot be reached.
    Unreachable,
    /// The coordinator takes calls and does not answer.
    Silent,
    /// The coordinator's stores are full.
    Full,
}

impl Reason {
    /// The word used in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Well => "well",
            Self::Unreachable => "unreachable",
            Self::Silent => "silent",
            Self::Full => "full",
        }
    }
}

/// The state.
#[derive(Clone, Debug)]
pub struct RoadState {
    patience: Patience,
    direct: DirectRoad,
    road: Road,
    reason: Reason,
    under_way: u32,
    last_sign: Monotonic,
    /// Since when uploads fail; an answered one ends it.
    upload_failing_since: Option<Monotonic>,
    /// Since when probes fail; a good one, or an answered upload, ends it.
    probe_failing_since: Option<Monotonic>,
    good_probes: u32,
    good_since: Option<Monotonic>,
    returned_at: Option<Monotonic>,
    return_delay: Duration,
}

impl RoadState {
    /// Starts on the coordinator road.
    pub fn new(patience: Patience, direct: DirectRoad, now: Monotonic) -> Self {
        Self {
            patience,
            direct,
            road: Road::Coordinator,
            reason: Reason::Well,
            under_way: 0,
            last_sign: now,
            upload_failing_since: None,
            probe_failing_since: None,
            good_probes: 0,
            good_since: None,
            returned_at: None,
            return_delay: patience.return_after,
        }
    }

    /// The road as of the last thing seen.
    pub fn road(&self) -> Road {
        self.road
    }

    /// Why.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// Since when nothing got through on the coordinator road, if so.
    pub fn failing_since(&self) -> Option<Monotonic> {
        [self.upload_failing_since, self.probe_failing_since].into_iter().flatten().min()
    }

    fn forgive(&mut self) {
        self.upload_failing_since = None;
        self.probe_failing_since = None;
    }

    /// Takes in one observation and returns the road from here.
    pub fn see(&mut self, seen: Seen, now: Monotonic) -> Road {
        match seen {
            Seen::Started => {
                if self.under_way == 0 {
                    self.last_sign = now;
                }
                self.under_way += 1;
            }
            Seen::Moved => self.last_sign = now,
            Seen::Answered => {
                self.ended(now);
                self.forgive();
                if self.road == Road::Coordinator {
                    self.reason = Reason::Well;
                }
            }
            Seen::Failed => {
                self.ended(now);
                self.upload_failing_since.get_or_insert(now);
            }
            Seen::Dropped => self.under_way = self.under_way.saturating_sub(1),
            Seen::Full => {
                self.ended(now);
                self.divert(Reason::Full, now);
            }
            Seen::ProbeGood => self.probe_went_well(now),
            Seen::ProbeUnfit => self.forget_good_probes(),
            Seen::ProbeBad => {
                self.forget_good_probes();
                self.probe_failing_since.get_or_insert(now);
            }
        }
        self.at(now)
    }

    /// The road at this moment when nothing happened; call it at least once a second.
    pub fn at(&mut self, now: Monotonic) -> Road {
        if self.road == Road::Coordinator {
            if self.failing_since().is_some_and(|since| now.since(since) >= self.patience.connect) {
                self.divert(Reason::Unreachable, now);
            } else if self.under_way > 0 && now.since(self.last_sign) >= self.patience.silence {
                self.divert(Reason::Silent, now);
            }
        }
        self.road
    }

    fn ended(&mut self, now: Monotonic) {
        self.under_way = self.under_way.saturating_sub(1);
        self.last_sign = now;
    }

    fn divert(&mut self, reason: Reason, now: Monotonic) {
        self.reason = reason;
        if self.direct == DirectRoad::Absent || self.road == Road::Direct {
            return;
        }
        let settled = self.patience.return_after.saturating_mul(SETTLED_AFTER);
        let unsettled = self.returned_at.is_some_and(|returned| now.since(returned) < settled);
        self.return_delay = if unsettled {
            self.return_delay.saturating_mul(2).min(RETURN_DELAY_MAX.max(self.patience.return_after))
        } else {
            self.patience.return_after
        };
        self.road = Road::Direct;
        self.forget_good_probes();
    }

    fn forget_good_probes(&mut self) {
        self.good_probes = 0;
        self.good_since = None;
    }

    fn probe_went_well(&mut self, now: Monotonic) {
        self.good_probes += 1;
        let since = *self.good_since.get_or_insert(now);
        match self.road {
            Road::Coordinator => self.probe_failing_since = None,
            Road::Direct if self.good_probes >= PROBES_TO_RETURN && now.since(since) >= self.return_delay => {
                self.road = Road::Coordinator;
                self.reason = Reason::Well;
                self.forgive();
                self.last_sign = now;
                self.returned_at = Some(now);
            }
            Road::Direct => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Road::{Coordinator, Direct};

    const PATIENCE: Patience = Patience {
        connect: Duration::from_secs(2),
        silence: Duration::from_secs(20),
        return_after: Duration::from_secs(10),
    };

    fn at(seconds: f64) -> Monotonic {
        Monotonic::from_origin(Duration::from_secs_f64(seconds))
    }

    /// Plays (second, what was seen, expected road); `None` only lets time pass.
    fn play(direct: DirectRoad, steps: &[(f64, Option<Seen>, Road)]) -> RoadState {
        let mut state = RoadState::new(PATIENCE, direct, at(0.0));
        for (second, seen, expected) in steps {
            let road = match seen {
                Some(seen) => state.see(*seen, at(*second)),
                None => state.at(at(*second)),
            };
            assert_eq!(road, *expected, "at {second} s after {seen:?}");
        }
        state
    }

    #[test]
    fn refused_connections_divert_after_connect_patience() {
        let state = play(
            DirectRoad::Configured,
            &[
                (0.0, Some(Seen::Started), Coordinator),
                (0.1, Some(Seen::Failed), Coordinator),
                (1.0, Some(Seen::Started), Coordinator),
                (1.1, Some(Seen::Failed), Coordinator),
                (2.0, None, Coordinator),
                (2.1, None, Direct),
            ],
        );
        assert_eq!(state.reason(), Reason::Unreachable);
    }

    #[test]
    fn an_answer_forgives_failures() {
        play(
            DirectRoad::Configured,
            &[
                (0.0, Some(Seen::Started), Coordinator),
                (0.1, Some(Seen::Failed), Coordinator),
                (1.0, Some(Seen::Started), Coordinator),
                (1.9, Some(Seen::Answered), Coordinator),
                (3.0, None, Coordinator),
                (100.0, None, Coordinator),
            ],
        );
    }

    #[test]
    fn good_probes_do_not_forgive_uploads_that_fail() {
        let state = play(
            DirectRoad::Configured,
            &[
                (0.0, Some(Seen::ProbeGood), Coordinator),
                (0.1, Some(Seen::Started), Coordinator),
                (0.2, Some(Seen::Failed), Coordinator),
                (1.0, Some(Seen::Started), Coordinator),
                (1.1, Some(Seen::Failed), Coordinator),
                (2.0, Some(Seen::ProbeGood), Coordinator),
                (2.2, None, Direct),
            ],
        );
        assert_eq!(state.reason(), Reason::Unreachable);
    }

    #[test]
    fn a_good_probe_forgives_a_bad_one() {
        play(
            DirectRoad::Configured,
            &[
                (0.0, Some(Seen::ProbeBad), Coordinator),
                (1.9, Some(Seen::ProbeGood), Coordinator),
                (100.0, None, Coordinator),
            ],
        );
    }

    #[test]
    fn silence_diverts_only_when_nothing_moves() {
        let state = play(
            DirectRoad::Configured,
            &[
                (0.0, Some(Seen::Started), Coordinator),
                (15.0, Some(Seen::Moved), Coordinator),
                (30.0, Some(Seen::Started), Coordinator),
                (34.9, None, Coordinator),
                (35.0, None, Direct),
            ],
        );
        assert_eq!(state.reason(), Reason::Silent);
    }

    #[test]
    fn an_idle_road_is_not_silent() {
        play(
            DirectRoad::Configured,
            &[
                (0.0, Some(Seen::Started), Coordinator),
                (1.0, Some(Seen::Answered), Coordinator),
                (500.0, None, Coordinator),
                (500.0, Some(Seen::Started), Coordinator),
                (519.0, None, Coordinator),
                (519.5, Some(Seen::Dropped), Coordinator),
                (600.0, None, Coordinator),
            ],
        );
    }

    #[test]
    fn full_stores_divert_at_once() {
        let state =
            play(DirectRoad::Configured, &[(0.0, Some(Seen::Started), Coordinator), (0.5, Some(Seen::Full), Direct)]);
        assert_eq!(state.reason(), Reason::Full);
    }

    #[test]
    fn without_a_direct_road_there_is_nowhere_to_divert_to() {
        let state = play(
            DirectRoad::Absent,
            &[
                (0.0, Some(Seen::Started), Coordinator),
                (0.1, Some(Seen::Failed), Coordinator),
                (99.0, None, Coordinator),
                (100.0, Some(Seen::Full), Coordinator),
            ],
        );
        assert_ne!(state.reason(), Reason::Well);
    }

    #[test]
    fn the_way_back_takes_good_probes_over_the_return_delay() {
        play(
            DirectRoad::Configured,
            &[
                (0.0, Some(Seen::Full), Direct),
                (1.0, Some(Seen::ProbeGood), Direct),
                (5.0, Some(Seen::ProbeGood), Direct),
                (6.0, Some(Seen::ProbeBad), Direct),
                (7.0, Some(Seen::ProbeGood), Direct),
                (12.0, Some(Seen::ProbeGood), Direct),
                (16.9, Some(Seen::ProbeGood), Direct),
                (17.0, Some(Seen::ProbeGood), Coordinator),
                (17.1, None, Coordinator),
            ],
        );
    }

    #[test]
    fn a_coordinator_without_a_fit_store_is_neither_left_nor_returned_to_by_probes() {
        play(
            DirectRoad::Configured,
            &[(0.0, Some(Seen::ProbeUnfit), Coordinator), (60.0, Some(Seen::ProbeUnfit), Coordinator)],
        );
        play(
            DirectRoad::Configured,
            &[
                (0.0, Some(Seen::Full), Direct),
                (1.0, Some(Seen::ProbeGood), Direct),
                (10.0, Some(Seen::ProbeUnfit), Direct),
                (12.0, Some(Seen::ProbeGood), Direct),
                (21.9, Some(Seen::ProbeGood), Direct),
                (22.0, Some(Seen::ProbeGood), Coordinator),
            ],
        );
    }

    #[test]
    fn one_good_probe_is_never_enough() {
        play(
            DirectRoad::Configured,
            &[(0.0, Some(Seen::Full), Direct), (60.0, Some(Seen::ProbeGood), Direct), (61.0, None, Direct)],
        );
    }

    #[test]
    fn a_return_that_did_not_last_doubles_the_delay() {
        play(
            DirectRoad::Configured,
            &[
                (0.0, Some(Seen::Full), Direct),
                (1.0, Some(Seen::ProbeGood), Direct),
                (11.0, Some(Seen::ProbeGood), Coordinator),
                (12.0, Some(Seen::Full), Direct),
                (13.0, Some(Seen::ProbeGood), Direct),
                (23.0, Some(Seen::ProbeGood), Direct),
                (33.0, Some(Seen::ProbeGood), Coordinator),
                // Settled for a long time: the delay starts over.
                (200.0, Some(Seen::Full), Direct),
                (201.0, Some(Seen::ProbeGood), Direct),
                (211.0, Some(Seen::ProbeGood), Coordinator),
            ],
        );
    }

    #[test]
    fn late_ends_of_old_calls_do_not_disturb_the_direct_road() {
        play(
            DirectRoad::Configured,
            &[
                (0.0, Some(Seen::Started), Coordinator),
                (0.0, Some(Seen::Started), Coordinator),
                (20.0, None, Direct),
                (20.1, Some(Seen::Dropped), Direct),
                (20.2, Some(Seen::Answered), Direct),
                (25.0, Some(Seen::ProbeGood), Direct),
                (35.0, Some(Seen::ProbeGood), Coordinator),
                (90.0, None, Coordinator),
            ],
        );
    }

    #[test]
    fn random_histories_keep_the_rules() {
        let mut seed: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        let all = [
            Seen::Started,
            Seen::Moved,
            Seen::Answered,
            Seen::Failed,
            Seen::Dropped,
            Seen::Full,
            Seen::ProbeGood,
            Seen::ProbeUnfit,
            Seen::ProbeBad,
        ];
        let mut state = RoadState::new(PATIENCE, DirectRoad::Configured, at(0.0));
        let mut now = 0.0;
        let mut diverted_at = 0.0;
        for _ in 0..100_000 {
            now += (random() % 4000) as f64 / 1000.0;
            let before = state.road();
            let seen = all[(random() % 9) as usize];
            let after = state.see(seen, at(now));
            match (before, after) {
                (Coordinator, Direct) => diverted_at = now,
                (Direct, Coordinator) => {
                    assert_eq!(seen, Seen::ProbeGood);
                    assert!(now - diverted_at >= 10.0, "back after {} s", now - diverted_at);
                }
                _ => {}
            }
        }
    }
}
