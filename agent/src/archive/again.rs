//! Archiving again what was archived and is in no store any more, because stores were set back or damaged.
//!
//! The coordinator names the files. What the ledger says of them counts no longer, so that PostgreSQL, if it asks, is answered
//! by what is true now. What still lies in `pg_wal` with the same content, finished and kept by PostgreSQL for its own reasons,
//! is read and shipped once more; what does not, but has a copy in the spool, is shipped from there. What is in neither is
//! gone from this host.
//!
//! Invariants: only the named content goes, never another one of that name. The slots of files that go ahead are used, and
//! files that PostgreSQL waits for need none. Repeating it is harmless.

use std::collections::BTreeMap;
use std::sync::Arc;

use postgres_format::WalFileName;
use repository::wal::Fingerprint;

use super::ship::chain;
use super::{Archive, Origin};
use crate::spool::RetainedKey;

/// Files that wait to be archived again.
const WAITING_MAX: usize = 4096;

/// What waits, with the content that was lost; a history file has one content.
pub(super) type Waiting = BTreeMap<WalFileName, Option<Fingerprint>>;

/// A name as the coordinator spells it: `<wal file>.<fingerprint>`, or a history file's bare name.
fn parse(object: &str) -> Option<(WalFileName, Option<Fingerprint>)> {
    if let Ok(name @ WalFileName::History(_)) = object.parse() {
        return Some((name, None));
    }
    let (name, fingerprint) = object.rsplit_once('.')?;
    Some((name.parse().ok()?, Some(fingerprint.parse().ok()?)))
}

impl Archive {
    /// Takes up files that are in no store any more.
    pub fn archive_again(self: &Arc<Self>, objects: &[String]) {
        if self.facts().is_err() {
            return;
        }
        let lost: Waiting = objects.iter().filter_map(|object| parse(object)).take(WAITING_MAX).collect();
        let pg_wal = self.parts.data.pg_wal();
        let (here, elsewhere): (Waiting, Waiting) =
            lost.into_iter().partition(|(name, _)| pg_wal.join(name.to_string()).is_file());
        {
            let mut state = self.state();
            for (name, fingerprint) in here.iter().chain(&elsewhere) {
                state.forget_content(name, fingerprint.as_ref());
            }
            state.again.extend(here);
            while state.again.len() > WAITING_MAX {
                state.again.pop_last();
            }
        }
        let lost =
            |(name, own): &RetainedKey| elsewhere.get(name).is_some_and(|lost| lost.is_none_or(|lost| lost == *own));
        let copies: Vec<RetainedKey> = self.parts.roads.spool.retained_keys().into_iter().filter(lost).collect();
        if !copies.is_empty() {
            let archive = Arc::clone(self);
            self.jobs.spawn(async move { archive.ship_copies(copies).await });
        }
        self.wake.notify_one();
    }

    /// Ships copies from the spool, one after the other; they stay there until every store has them.
    async fn ship_copies(&self, keys: Vec<RetainedKey>) {
        for key in keys {
            let shipped = match self.parts.roads.spool.read_retained(&key).await {
                Ok(Some(wal)) => self.parts.roads.ship(&wal, &self.stop).await.map_err(|error| chain(&error)),
                Ok(None) => continue,
                Err(error) => Err(chain(&error)),
            };
            match shipped {
                Ok(_) => tracing::info!(file = %key.0, "a lost WAL file was archived again from its copy"),
                Err(error) => tracing::debug!(file = %key.0, error, "a lost WAL file was not archived again"),
            }
        }
    }

    /// Starts as many as there are slots.
    pub(super) fn start_again(self: &Arc<Self>) {
        let pg_wal = self.parts.data.pg_wal();
        loop {
            let mut state = self.state();
            let Some(name) = state.again.keys().next().copied() else { return };
            if state.jobs.contains_key(&name) {
                // It is under way already.
                state.again.remove(&name);
                continue;
            }
            let Some(permit) = self.crew.slot() else { return };
            let content = state.again.remove(&name).flatten();
            self.spawn(&mut state, name, pg_wal.join(name.to_string()), Origin::Again(content), permit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_the_coordinator_spells_them() {
        let fingerprint = Fingerprint::of_sha256(&[7; 32]);
        let check = |text: String, name: &str, fingerprint| {
            assert_eq!(parse(&text), Some((name.parse().unwrap(), fingerprint)), "{text}");
        };
        for name in
            ["000000010000000000000003", "000000010000000000000003.partial", "000000010000000000000003.00000028.backup"]
        {
            check(format!("{name}.{fingerprint}"), name, Some(fingerprint));
            assert_eq!(parse(name), None);
        }
        check("00000002.history".to_owned(), "00000002.history", None);
        assert_eq!(parse("nothing"), None);
    }
}
