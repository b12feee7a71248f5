//! Removing what a committed root condemned.
//!
//! Anybody may do it, any number of times, arbitrarily late, and several at the same time: what a root condemned is never
//! referred to again, whatever was committed since. A sweep therefore takes one root as it was read, and needs neither lease
//! nor clock. What it does not finish the next one does.
//!
//! That holds in the history of that root. A store that is set back to an older copy of itself may name again what the lost
//! root condemned; so before each few removals the root must still be there, else the sweep stops.
//!
//! It removes packs and manifests, and segments, `.partial` and `.backup` files of WAL; each key is read back into its parts
//! first, and what this version does not understand stays. It never touches roots, history files, decisions, adoptions,
//! evidence of conflicts or the repository's identity.

use futures_util::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;
use postgres_format::SystemIdentifier;
use serde::{Deserialize, Serialize};

use crate::key::{self, ObjectKey, ParsedKey};
use crate::name::ClusterName;
use crate::root::{self, CondemnedBackup, Root, RootError, SetBack, WalKept};
use crate::store::{Deleted, LONG_LIST_LIMIT, ObjectEntry, ObjectStore};

/// Objects that are removed at the same time.
const PARALLEL: usize = 8;
/// Objects that are removed before it is asked again whether the root is still there.
const REMOVED_AT_ONCE: usize = 64;
/// Most objects that one sweep looks at.
pub const SWEEP_LIMIT: u64 = 1_000_000;

/// What a sweep did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Swept {
    /// Objects that were removed.
    pub objects: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Objects that the store keeps by a lock of its own.
    pub retained: u64,
    /// Until when the last of them is kept, as far as the store says.
    pub retained_until: Option<Timestamp>,
    /// Whether the limit was reached before the end.
    pub more: bool,
}

/// Removes what a root condemned, at most `limit` objects looked at.
///
/// `root` must have been read from this store; an older one than the newest is as good.
///
/// # Errors
/// When the store fails, and [`RootError::SetBack`] when the root is not there any more; what was removed until then stays
/// removed.
pub async fn sweep(store: &dyn ObjectStore, root: &Root, limit: u64) -> Result<Swept, RootError> {
    walk(store, root, limit, Act::Remove).await
}

/// What a sweep by this root would remove, also by one that is not committed yet. Removes nothing.
///
/// # Errors
/// When the store fails.
pub async fn weigh(store: &dyn ObjectStore, root: &Root, limit: u64) -> Result<Swept, RootError> {
    walk(store, root, limit, Act::Count).await
}

/// What is done with a condemned object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Remove,
    Count,
}

async fn walk(store: &dyn ObjectStore, root: &Root, limit: u64, act: Act) -> Result<Swept, RootError> {
    let mut sweeping = Sweeping { store, root, act, swept: Swept::default(), looked_at: 0, limit };
    for condemned in root.condemned.iter().flat_map(|condemned| &condemned.backups) {
        sweeping.backup(condemned).await?;
    }
    for system in &root.systems {
        for kept in &system.wal_kept {
            sweeping.timeline(system.system_identifier, kept).await?;
        }
    }
    Ok(sweeping.swept)
}

struct Sweeping<'a> {
    store: &'a dyn ObjectStore,
    root: &'a Root,
    act: Act,
    swept: Swept,
    looked_at: u64,
    limit: u64,
}

impl Sweeping<'_> {
    fn cluster(&self) -> &ClusterName {
        &self.root.cluster
    }

    async fn backup(&mut self, condemned: &CondemnedBackup) -> Result<(), RootError> {
        let id = condemned.backup;
        // A root that condemns what it names as a backup, or pins, contradicts itself: better too much stays.
        if self.root.backup(&id).is_some() || self.root.pins.iter().any(|pin| pin.identifiers().any(|one| one == id)) {
            return Ok(());
        }
        let prefix = key::backup_prefix(self.cluster(), &id);
        let is_condemned = |key: &ObjectKey| match key.parsed() {
            Ok(ParsedKey::Manifest { backup, .. } | ParsedKey::Note { backup, .. }) => backup == id,
            Ok(ParsedKey::Pack { backup, number, .. }) => backup == id && condemned.holds(number),
            _ => false,
        };
        let mut after = None;
        while let Some(page) = self.page(&prefix, &mut after).await? {
            self.remove(page.into_iter().filter(|entry| is_condemned(&entry.key)).collect()).await?;
        }
        Ok(())
    }

    async fn timeline(&mut self, system: SystemIdentifier, kept: &WalKept) -> Result<(), RootError> {
        let prefix = key::wal_timeline_prefix(self.cluster(), system, kept.timeline());
        let mut after = None;
        while let Some(page) = self.page(&prefix, &mut after).await? {
            let mut condemned = Vec::new();
            for entry in page {
                let Ok(ParsedKey::Wal { name, .. }) = entry.key.parsed() else { continue };
                let Some(segment) = name.segment() else { continue };
                if segment >= kept.from {
                    after = None;
                    break;
                }
                if !kept.keeps(segment) {
                    condemned.push(entry);
                }
            }
            self.remove(condemned).await?;
            if after.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// The next page of a listing; `None` at its end or at the limit. `after` is where it goes on.
    async fn page(&mut self, prefix: &str, after: &mut Option<String>) -> Result<Option<Vec<ObjectEntry>>, RootError> {
        if self.looked_at >= self.limit {
            self.swept.more = true;
            return Ok(None);
        }
        let page = self.store.list(prefix, after.as_deref(), LONG_LIST_LIMIT).await?;
        let Some(last) = page.objects.last() else { return Ok(None) };
        self.looked_at += page.objects.len() as u64;
        *after = Some(last.key.to_string());
        Ok(Some(page.objects))
    }

    /// Fails unless the root is there as it was read.
    async fn expect_root(&self) -> Result<(), RootError> {
        let (store, cluster, seen) = (self.store, self.cluster(), self.root.generation);
        match root::read_generation(store, cluster, seen).await? {
            Some((there, _)) if there == *self.root => Ok(()),
            _ => {
                let found = root::newest(store, cluster).await?.map(|newest| newest.generation);
                Err(SetBack { store: store.name().clone(), cluster: cluster.clone(), seen, found }.into())
            }
        }
    }

    async fn remove(&mut self, mut condemned: Vec<ObjectEntry>) -> Result<(), RootError> {
        if self.act == Act::Count {
            self.swept.objects += condemned.len() as u64;
            self.swept.bytes += condemned.iter().map(|entry| entry.size).sum::<u64>();
            return Ok(());
        }
        while !condemned.is_empty() {
            let rest = condemned.split_off(condemned.len().min(REMOVED_AT_ONCE));
            self.expect_root().await?;
            self.remove_some(std::mem::replace(&mut condemned, rest)).await?;
        }
        Ok(())
    }

    async fn remove_some(&mut self, condemned: Vec<ObjectEntry>) -> Result<(), RootError> {
        let store = self.store;
        let removing = condemned
            .into_iter()
            .map(|entry| async move { store.delete(&entry.key).await.map(|deleted| (entry.size, deleted)) });
        let mut removing = stream::iter(removing).buffer_unordered(PARALLEL);
        while let Some((size, deleted)) = removing.try_next().await? {
            match deleted {
                Deleted::Removed => {
                    self.swept.objects += 1;
                    self.swept.bytes += size;
                }
                Deleted::Absent => {}
                Deleted::Retained { until } => {
                    self.swept.retained += 1;
                    self.swept.retained_until = self.swept.retained_until.max(until);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
