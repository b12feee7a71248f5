//! Sending retained copies again: to the direct store when the coordinator is lost, to the coordinator when it is back.
//!
//! Invariants: in PostgreSQL's order of need, history files first; a copy goes from the spool only after a store took it. On
//! the direct road at most [`AT_ONCE`] copies are under way, and new files ahead of PostgreSQL wait until all copies are over,
//! so that a coordinator that never comes back leaves no hole. A copy that cannot be read is named and left where it is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use repository::store::ObjectStore;
use repository::wal::WalError;
use tokio_util::sync::CancellationToken;

use super::ship::{Roads, chain};
use crate::coordinator_link::{CoordinatorLink, PushError};
use crate::metrics::ArchiveMetrics;
use crate::road::Road;
use crate::road_watch::{turned_away, turned_to};
use crate::spool::RetainedKey;

/// Copies under way at once.
const AT_ONCE: usize = 4;
/// Pause after a copy could not be sent.
const PAUSE: Duration = Duration::from_secs(1);

/// What became of one copy.
enum Sent {
    /// A store that may keep it has it; the copy is gone.
    Yes,
    /// Not now.
    NotYet,
    /// Never; it stays.
    Never,
}

/// Sends all copies to the direct store whenever the road leads there, until `stop`.
pub async fn follow_road(roads: Roads, metrics: ArchiveMetrics, stop: CancellationToken) {
    let Some(direct) = roads.direct.clone() else { return };
    let mut changes = roads.watch.subscribe();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = turned_to(&mut changes, Road::Direct) => {}
        }
        let mut all_sent = false;
        while !all_sent && *changes.borrow_and_update() == Road::Direct {
            all_sent = tokio::select! {
                () = stop.cancelled() => return,
                _ = changes.changed() => false,
                () = to_direct(&roads, &direct, &metrics) => true,
            };
        }
        metrics.set_resend_pending(0);
        tokio::select! {
            () = stop.cancelled() => return,
            () = turned_away(&mut changes, Road::Direct) => {}
        }
    }
}

/// Sends until no copy is left that could be sent.
async fn to_direct(roads: &Roads, direct: &Arc<dyn ObjectStore>, metrics: &ArchiveMetrics) {
    let mut hopeless: BTreeSet<RetainedKey> = BTreeSet::new();
    let total = roads.spool.retained_keys().len();
    if total > 0 {
        tracing::info!(copies = total, "copies the direct store may lack are sent to it");
    }
    loop {
        let keys: Vec<_> = roads.spool.retained_keys().into_iter().filter(|key| !hopeless.contains(key)).collect();
        metrics.set_resend_pending(keys.len());
        if keys.is_empty() {
            break;
        }
        let mut sends = stream::iter(keys)
            .map(|key| async move { (key, one_to_direct(roads, direct, &key).await) })
            .buffered(AT_ONCE);
        let mut failed = false;
        while let Some((key, sent)) = sends.next().await {
            match sent {
                Sent::Yes => metrics.set_resend_pending(roads.spool.retained_keys().len()),
                Sent::NotYet => failed = true,
                Sent::Never => {
                    hopeless.insert(key);
                }
            }
        }
        if failed {
            tokio::time::sleep(PAUSE).await;
        }
    }
    if total > 0 {
        tracing::info!(copies = total, left = hopeless.len(), "the copies were sent to the direct store");
    }
}

async fn one_to_direct(roads: &Roads, direct: &Arc<dyn ObjectStore>, key: &RetainedKey) -> Sent {
    let wal = match roads.spool.read_retained(key).await {
        Ok(Some(wal)) => wal,
        Ok(None) => return Sent::Yes,
        Err(error) => {
            tracing::error!(file = %key.0, error = %chain(&error), "a retained copy cannot be sent");
            return Sent::Never;
        }
    };
    match roads.put_direct(direct, &wal).await {
        Ok(_) => {
            process::crash_point!("agent/during-resend");
            release(roads, key);
            Sent::Yes
        }
        Err(error @ (WalError::Conflict { .. } | WalError::Malformed(_) | WalError::Damaged { .. })) => {
            tracing::error!(file = %key.0, error = %chain(&error), "a retained copy is refused by the direct store");
            Sent::Never
        }
        Err(_) => Sent::NotYet,
    }
}

/// Offers all copies to a coordinator that has just come back: it may be a new one with empty stores. One after the other,
/// so that fresh WAL is not held up; ends early when the coordinator goes away again.
pub async fn offer_to_coordinator(roads: &Roads, link: &CoordinatorLink) {
    for key in roads.spool.retained_keys() {
        let wal = match roads.spool.read_retained(&key).await {
            Ok(Some(wal)) => wal,
            Ok(None) => continue,
            Err(error) => {
                tracing::error!(file = %key.0, error = %chain(&error), "a retained copy cannot be sent");
                continue;
            }
        };
        match link.push(&wal).await {
            Ok(spread) if !roads.copy_is_needed(&spread) => release(roads, &key),
            Ok(_) => {}
            // A refusal is about this copy alone; the others are still wanted.
            Err(error @ PushError::Refused { .. }) => {
                tracing::debug!(file = %key.0, %error, "the coordinator refuses a retained copy");
            }
            Err(error) => {
                tracing::debug!(file = %key.0, %error, "the coordinator did not take a retained copy");
                return;
            }
        }
    }
}

fn release(roads: &Roads, key: &RetainedKey) {
    if let Err(error) = roads.spool.release(key) {
        tracing::warn!(file = %key.0, error = %chain(&error), "a retained copy could not be removed");
    }
}
