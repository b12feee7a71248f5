//! Histories learned before they are needed: an agent looks now and then which timelines the stores know, and keeps their
//! history files, so that its standby never takes a used timeline for free when it is promoted while every store is away.
//!
//! A history file is small and never changes, so each is fetched once. Failing to look is no event: the stores may be away.

use std::sync::PoisonError;
use std::time::Duration;

use postgres_format::WalFileName;
use repository::key::{self, ParsedKey};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Fetcher;
use super::line::{HISTORIES_FRESH, HISTORIES_WAIT};
use crate::node::NodeFacts;
use crate::spool::HISTORY_BYTES_MAX;

/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Longest look; a store that hangs does not end looking for ever.
const LOOK_MAX: Duration = Duration::from_secs(30);
/// History files listed in one look; more timelines than any cluster has.
const LISTED_MAX: usize = 1000;

impl Fetcher {
    /// Keeps the history files that the stores have, until `stop`; and lets segments go that nobody asked for.
    pub async fn learn_histories(&self, stop: CancellationToken) {
        loop {
            self.ahead.expire();
            if let Ok(facts) = self.data.facts()
                && self.spool.belong_to(facts.system_identifier, self.data.path()).is_ok()
            {
                tokio::select! {
                    () = stop.cancelled() => return,
                    // A store that is away, or slow, is asked again at the next look.
                    _ = tokio::time::timeout(LOOK_MAX, self.learn_once(&facts)) => {}
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// Looks again if the last look was a while ago; what takes long goes on without.
    pub(super) async fn learn_lately(&self, facts: &NodeFacts) {
        let seen = *self.histories_seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.is_none_or(|at| at.elapsed() >= HISTORIES_FRESH) {
            let _ = tokio::time::timeout(HISTORIES_WAIT, self.learn_once(facts)).await;
        }
    }

    async fn learn_once(&self, facts: &NodeFacts) {
        // From its beginning: what comes while it lasts may be missed.
        *self.histories_seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        let prefix = key::history_prefix(&self.cluster, facts.system_identifier);
        for store in self.sources.ask_whom().await.stores {
            let Ok(page) = store.list(&prefix, None, LISTED_MAX).await else { continue };
            for object in page.objects {
                let Ok(ParsedKey::History { timeline, .. }) = object.key.parsed() else { continue };
                if self.spool.history(timeline).is_some() {
                    continue;
                }
                let Ok(file) = self.obtain(WalFileName::History(timeline), facts).await else { continue };
                let content = std::fs::read(file.path()).unwrap_or_default();
                if content.is_empty() || content.len() as u64 > HISTORY_BYTES_MAX {
                    continue;
                }
                if let Err(error) = self.spool.keep_history(timeline, &content) {
                    tracing::warn!(error = %crate::archive::ship::chain(&error), "a history file could not be kept");
                }
            }
        }
    }
}
