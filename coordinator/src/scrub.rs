//! The nightly scrub: a part of what the stores hold is read whole each night, so that everything is within thirty.
//!
//! Which part is due follows from the date, so every night of a coordinator that is there reads another one, whatever was
//! restarted. A night that was missed is made up for: with the part of the day goes the one that was not read for the
//! longest, if that is more than thirty days ago or not known. A part that a restart interrupted is read from its beginning.
//!
//! It goes at a bounded rate, with the memory of a walk at digests, one cluster after the other, and finds what
//! [`crate::soundness`] keeps and tells.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use process::clock;
use repository::name::ClusterName;
use repository::verify::{Depth, Request, Share, Watch};

use crate::Coordinator;
use crate::schedule::{Due, Schedule};
use crate::verify;

/// Nights in which everything is read.
pub const NIGHTS: u32 = 30;
/// How often it is looked whether a night has begun.
const TICK: Duration = Duration::from_secs(30);
const DAY_SECONDS: i64 = 86_400;

/// When and how fast.
#[derive(Debug, Clone)]
pub struct Settings {
    /// When a night begins.
    pub schedule: Schedule,
    /// Bytes a second at most that are read of the stores; nothing is, with 0.
    pub bytes_per_second: u64,
    /// Bytes a second at most that each node reads of its server's pages, see [`crate::comparison`]; nothing is, with 0.
    pub source_bytes_per_second: u64,
}

/// PURE: the parts that are due at a moment, when each was read at these times.
pub fn due_parts(read: &BTreeMap<u32, Timestamp>, now: Timestamp) -> Vec<u32> {
    let today = Share::on(now.as_second().div_euclid(DAY_SECONDS), NIGHTS).part;
    let overdue = |part: u32| {
        let last = read.get(&part).map_or(i64::MIN, |last| last.as_second());
        // Of those not read for equally long the one whose own day is the furthest off.
        let wait = (part + NIGHTS - today) % NIGHTS;
        let limit = now.as_second().saturating_sub(i64::from(NIGHTS) * DAY_SECONDS);
        (last < limit).then_some((last, Reverse(wait), part))
    };
    let made_up = (0..NIGHTS).filter(|part| *part != today).filter_map(overdue).min();
    std::iter::once(today).chain(made_up.map(|(_, _, part)| part)).collect()
}

/// Scrubs until the coordinator stops.
pub async fn run(coordinator: Arc<Coordinator>, settings: Settings) {
    let since = clock::now();
    loop {
        tokio::select! {
            () = coordinator.stop.cancelled() => return,
            () = tokio::time::sleep(TICK) => {}
        }
        for cluster in coordinator.clusters.names() {
            let now = clock::now();
            let anchor = coordinator.soundness.of(&cluster).last_night.unwrap_or(since);
            if !matches!(settings.schedule.due(anchor, now), Due::Now { .. }) {
                continue;
            }
            tokio::select! {
                () = coordinator.stop.cancelled() => return,
                () = night(&coordinator, &cluster, settings.bytes_per_second, now) => {}
            }
        }
    }
}

/// Reads the parts that are due of one cluster.
pub async fn night(coordinator: &Coordinator, cluster: &ClusterName, bytes_per_second: u64, now: Timestamp) {
    let known = coordinator.soundness.of(cluster);
    for part in due_parts(&known.shares, now) {
        let request = Request { share: Some(Share { part, of: NIGHTS }), ..Request::all(Depth::Digests) };
        let watch = Watch::default().at_rate(bytes_per_second);
        let report = match verify::look(coordinator, cluster, &[], &request, &watch).await {
            Ok(report) => report,
            Err(error) => {
                tracing::error!(%cluster, error = crate::stores::chain(&error), "the scrub could not look");
                return;
            }
        };
        let bytes: u64 = report.stores.iter().map(|store| store.bytes).sum();
        coordinator.metrics.scrub_read_bytes.inc_by(bytes);
        let complete = report.complete;
        let noted = async {
            coordinator.soundness.take(&report, false).await?;
            let note = |known: &mut crate::soundness::Known| {
                known.last_night = Some(now);
                if complete {
                    known.shares.insert(part, now);
                }
            };
            coordinator.soundness.change(cluster, note).await
        };
        if let Err(error) = noted.await {
            tracing::error!(%error, %cluster, "the catalog did not take what the scrub found");
        }
        tracing::info!(%cluster, part, of = NIGHTS, bytes, complete, found = report.findings.len(),
            "a part of the repository was read");
    }
    coordinator.metrics.scrub_last_night.set(clock::now().as_second());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(number: i64) -> Timestamp {
        Timestamp::from_second(number * DAY_SECONDS + 9000).unwrap()
    }

    #[test]
    fn everything_is_read_within_thirty_nights_and_missed_ones_are_made_up_for() {
        let mut read: BTreeMap<u32, Timestamp> = BTreeMap::new();
        let night = |read: &mut BTreeMap<u32, Timestamp>, number| {
            let parts = due_parts(read, day(number));
            read.extend(parts.iter().map(|part| (*part, day(number))));
            parts.len()
        };
        // From nothing, two a night until all are known.
        for number in 0..15 {
            assert_eq!(night(&mut read, 20_000 + number), 2, "night {number}");
        }
        assert_eq!(read.len(), 30);
        for number in 15..60 {
            night(&mut read, 20_000 + number);
        }
        let steady: usize = (60..90).map(|number| night(&mut read, 20_000 + number)).sum();
        assert!(steady <= 32, "{steady} parts in thirty nights");
        // Ten nights without a coordinator.
        for number in 100..125 {
            night(&mut read, 20_000 + number);
        }
        let oldest = read.values().min().unwrap();
        assert!(*oldest >= day(20_000 + 125 - 32), "{oldest}");
    }
}
