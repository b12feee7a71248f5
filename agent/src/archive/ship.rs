//! Getting one encoded WAL file off this host: by the road of the moment, and by the other when the road changes meanwhile.
//!
//! Promise 1: success is said only when the coordinator or the direct store said that the object is durable. Where a store
//! may still lack it, a copy is kept in the spool, flushed to disk, before the success is said.
//!
//! Invariants: an upload is given up as soon as the road turns away from it; sending again is safe because objects are
//! create-only and compared by content. Attempts end only with success, a refusal on the merits, or the stop of the agent;
//! between two attempts there is a pause that grows to a bound.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use repository::store::{ObjectStore, StoreError};
use repository::wal::{EncodedWal, Stored, VariantCheck, WalError};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::coordinator_link::{CoordinatorLink, PushError, Spread};
use crate::repository_home::take_word;
use crate::road::Road;
use crate::road_watch::{RoadWatch, turned_away};
use crate::spool::{Retention, Spool};

/// First pause after a failed attempt.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause between attempts.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What leads off this host.
#[derive(Clone)]
pub struct Roads {
    /// The coordinator, when there is one.
    pub link: Option<CoordinatorLink>,
    /// The direct store, when this node has one.
    pub direct: Option<Arc<dyn ObjectStore>>,
    /// Which to take.
    pub watch: Arc<RoadWatch>,
    /// Where copies are kept.
    pub spool: Arc<Spool>,
    /// Whether the direct road failed last.
    direct_failing: Arc<AtomicBool>,
    no_room: Arc<AtomicBool>,
    /// Whether it was said that the direct store does not let this node list.
    unlisted: Arc<AtomicBool>,
}

/// How a file got off this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shipped {
    /// The road it went.
    pub road: Road,
    /// Whether some store did not know it before.
    pub new: bool,
    /// The repository that took it; absent while no coordinator has named it.
    pub repository: Option<Uuid>,
}

/// Why a file will not get off this host as it is.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// Its content is refused; an operator must look.
    #[error("{0}")]
    Refused(String),
    /// The coordinator does not know the cluster yet; nothing is wrong with the file.
    #[error("{0}")]
    ClusterUnknown(String),
    /// The agent stops.
    #[error("the agent is stopping")]
    Stopped,
}

enum Attempt {
    Done(Shipped),
    Refused(ShipError),
    Again,
}

impl Roads {
    /// Roads of one agent.
    pub fn new(
        link: Option<CoordinatorLink>,
        direct: Option<Arc<dyn ObjectStore>>,
        watch: Arc<RoadWatch>,
        spool: Arc<Spool>,
    ) -> Self {
        Self {
            link,
            direct,
            watch,
            spool,
            direct_failing: Arc::default(),
            no_room: Arc::default(),
            unlisted: Arc::default(),
        }
    }

    /// Whether WAL can leave this host, as far as was seen lately. A coordinator that fails while there is a direct road is
    /// about to be left for it, which is no closed way.
    pub fn are_open(&self) -> bool {
        let view = self.watch.view();
        match view.road {
            Road::Coordinator => {
                self.direct.is_some() || view.failing_for.is_none_or(|failing| failing < self.watch.connect_patience())
            }
            Road::Direct => !self.direct_failing.load(Ordering::Relaxed),
        }
    }

    /// Makes one file durable off this host, however long it takes.
    ///
    /// # Errors
    /// [`ShipError::Refused`] when the content is refused, [`ShipError::Stopped`].
    pub async fn ship(&self, wal: &EncodedWal, stop: &CancellationToken) -> Result<Shipped, ShipError> {
        let mut changes = self.watch.subscribe();
        let mut pause = PAUSE_MIN;
        loop {
            let road = *changes.borrow_and_update();
            let attempt = tokio::select! {
                () = stop.cancelled() => return Err(ShipError::Stopped),
                () = turned_away(&mut changes, road) => continue,
                attempt = self.attempt(road, wal) => attempt,
            };
            match attempt {
                Attempt::Done(shipped) => return Ok(shipped),
                Attempt::Refused(error) => return Err(error),
                Attempt::Again => {}
            }
            tokio::select! {
                () = stop.cancelled() => return Err(ShipError::Stopped),
                () = turned_away(&mut changes, road) => pause = PAUSE_MIN,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(PAUSE_MAX),
            }
        }
    }

    async fn attempt(&self, road: Road, wal: &EncodedWal) -> Attempt {
        match (road, &self.link, &self.direct) {
            (Road::Coordinator, Some(link), _) => self.by_coordinator(link, wal).await,
            (_, _, Some(direct)) => match self.put_direct(direct, wal).await {
                Ok(stored) => Attempt::Done(Shipped {
                    road: Road::Direct,
                    new: stored == Stored::New,
                    repository: self.spool.home().known(),
                }),
                Err(error) => self.failed_direct(&error),
            },
            (Road::Direct, _, None) | (Road::Coordinator, None, None) => Attempt::Again,
        }
    }

    async fn by_coordinator(&self, link: &CoordinatorLink, wal: &EncodedWal) -> Attempt {
        match link.push(wal).await {
            Ok(spread) => {
                process::crash_point!("agent/after-store-before-answer");
                self.retain_if_needed(wal, &spread).await;
                let home = self.spool.home();
                if !spread.repository.is_empty() {
                    take_word(home, &spread.repository);
                }
                let repository = spread.repository.parse().ok().or(home.known());
                Attempt::Done(Shipped { road: Road::Coordinator, new: !spread.already_stored, repository })
            }
            Err(PushError::Refused { reason, message }) => Attempt::Refused(match reason.as_str() {
                "CLUSTER_UNKNOWN" => ShipError::ClusterUnknown(message),
                "" => ShipError::Refused(message),
                _ => ShipError::Refused(format!("{message} ({reason})")),
            }),
            Err(error @ (PushError::Failed { .. } | PushError::Full | PushError::Timeout)) => {
                tracing::debug!(file = %wal.header.name, %error, "the coordinator did not take a file");
                Attempt::Again
            }
        }
    }

    /// Puts one object into the direct store. Where the node may put and not list, another content of the name is left for
    /// the coordinator to find.
    ///
    /// # Errors
    /// As [`repository::wal::put`].
    pub async fn put_direct(&self, direct: &Arc<dyn ObjectStore>, wal: &EncodedWal) -> Result<Stored, WalError> {
        let result = self.put_and_look(direct.as_ref(), wal).await;
        match &result {
            Ok(_) | Err(WalError::Conflict { .. } | WalError::Damaged { .. }) => {
                self.direct_failing.store(false, Ordering::Relaxed)
            }
            Err(_) => self.direct_failing.store(true, Ordering::Relaxed),
        }
        process::crash_point!("agent/after-store-before-answer");
        result
    }

    async fn put_and_look(&self, direct: &dyn ObjectStore, wal: &EncodedWal) -> Result<Stored, WalError> {
        let stored = repository::wal::put(direct, wal, VariantCheck::Skip).await?;
        match repository::wal::check_rivals(direct, wal).await {
            Ok(()) => Ok(stored),
            Err(WalError::Store(StoreError::Denied { .. })) => {
                if !self.unlisted.swap(true, Ordering::Relaxed) {
                    tracing::info!(
                        store = %direct.name(),
                        "the direct store does not let this node list; conflicts there are found by the coordinator"
                    );
                }
                Ok(stored)
            }
            Err(error) => Err(error),
        }
    }

    fn failed_direct(&self, error: &WalError) -> Attempt {
        if let WalError::Damaged { key, .. } = error {
            let remedy = format!(
                "the copy under that key must not count as archived: keep it elsewhere for inspection and delete {key} from \
                 the store, then this file is archived by itself"
            );
            return Attempt::Refused(ShipError::Refused(format!("{}; {remedy}", chain(error))));
        }
        if matches!(error, WalError::Conflict { .. } | WalError::Malformed(_)) {
            return Attempt::Refused(ShipError::Refused(chain(error)));
        }
        tracing::debug!(error = %chain(error), "the direct store did not take a file");
        Attempt::Again
    }

    /// Whether the spool must keep a copy after the coordinator's answer.
    pub fn copy_is_needed(&self, spread: &Spread) -> bool {
        let direct_lacks =
            self.direct.as_ref().is_some_and(|direct| !spread.stored.iter().any(|name| name == direct.name().as_str()));
        direct_lacks || !spread.lagging.is_empty()
    }

    async fn retain_if_needed(&self, wal: &EncodedWal, spread: &Spread) {
        if !self.copy_is_needed(spread) {
            return;
        }
        let (spool, copy) = (Arc::clone(&self.spool), wal.clone());
        let kept = tokio::task::spawn_blocking(move || spool.retain(&copy)).await;
        process::crash_point!("agent/after-retain-before-ack");
        match kept {
            Ok(Ok(Retention::Kept)) => self.no_room.store(false, Ordering::Relaxed),
            Ok(Ok(Retention::NoRoom)) => {
                if !self.no_room.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        retained_bytes = self.spool.retained_bytes(),
                        "the spool is full of copies that a store still lacks; archiving goes on without further copies"
                    );
                }
            }
            Ok(Err(error)) => tracing::warn!(error = %chain(&error), "a copy could not be kept in the spool"),
            Err(error) => tracing::error!(%error, "the task that keeps copies ended"),
        }
    }
}

/// An error and what caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
