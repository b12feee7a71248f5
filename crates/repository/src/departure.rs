//! When a backup went that is there no more, as the root history of a store tells.
//!
//! Roots are never removed, so the commit that let go of a backup can be found however long ago it was. A backup is in a row of
//! roots: pinned as it begins, named when it is published, and then in none again. Roots of the time of its identifier are looked
//! for first, and from one that has it its last one; that takes some tens of small reads of a history of any length. Clocks
//! need not agree: if the roots of that time do not have it, some others are tried. Orphans tell nothing.

use jiff::Timestamp;

use crate::name::{BackupId, ClusterName, Generation, NodeName};
use crate::root::{self, Mark, Root, RootError, counts, first_behind, read_generation};
use crate::store::ObjectStore;

/// Roots looked at from the time of the backup on, one by one.
const NEAR: u64 = 40;
/// Roots looked at over the whole history if none of those has it.
const SPREAD: u64 = 40;

/// How a backup went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departure {
    /// The first root without it.
    pub generation: Generation,
    /// When that was committed.
    pub written: Timestamp,
    /// By whom.
    pub writer: NodeName,
    /// Whether it existed; else it was given up before it did.
    pub existed: bool,
}

/// Finds out when a store let go of a backup. `None` if it has it, or never had it as far as can be found.
///
/// # Errors
/// When the store fails, or a root is damaged.
pub async fn departure(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    backup: &BackupId,
) -> Result<Option<Departure>, RootError> {
    let Some(newest) = root::newest(store, cluster).await? else { return Ok(None) };
    if has(&newest, backup) {
        return Ok(None);
    }
    let history = History { store, cluster, last: newest.generation.get() };
    let near = history.first_since(backup.time()).await?.saturating_sub(NEAR / 2).max(1);
    let one_by_one = near..=(near + NEAR).min(history.last);
    let stride = (history.last / SPREAD).max(1) as usize;
    let mut present = None;
    for number in one_by_one.chain((1..=history.last).step_by(stride)) {
        present = history.with(number, backup).await?;
        if present.is_some() {
            break;
        }
    }
    let Some(mut last) = present else { return Ok(None) };
    let mut absent = history.last;
    while absent - last.generation.get() > 1 {
        let middle = last.generation.get() + (absent - last.generation.get()) / 2;
        match history.with(middle, backup).await? {
            Some(root) => last = root,
            None => absent = middle,
        }
    }
    let Some(first) = history.behind(last.generation).await? else { return Ok(None) };
    let (written, writer, existed) = (first.written, first.writer, last.backup(backup).is_some());
    Ok(Some(Departure { generation: first.generation, written, writer, existed }))
}

fn has(root: &Root, backup: &BackupId) -> bool {
    root.backup(backup).is_some() || root.pins.iter().any(|pin| pin.backup == *backup)
}

/// The roots of a store by their numbers.
struct History<'a> {
    store: &'a dyn ObjectStore,
    cluster: &'a ClusterName,
    last: u64,
}

impl History<'_> {
    /// A root; none where the numbers have a gap.
    async fn at(&self, number: u64) -> Result<Option<Root>, RootError> {
        let Some(generation) = Generation::new(number) else { return Ok(None) };
        Ok(read_generation(self.store, self.cluster, generation).await?.map(|(root, _)| root))
    }

    /// A root that has a backup and is no orphan.
    async fn with(&self, number: u64, backup: &BackupId) -> Result<Option<Root>, RootError> {
        let Some(generation) = Generation::new(number) else { return Ok(None) };
        match read_generation(self.store, self.cluster, generation).await? {
            Some((root, sha256)) if has(&root, backup) => {
                let counts = counts(self.store, self.cluster, &Mark::of(&root, sha256)).await?;
                Ok(counts.then_some(root))
            }
            _ => Ok(None),
        }
    }

    /// The first root behind another one that is no orphan.
    async fn behind(&self, generation: Generation) -> Result<Option<Root>, RootError> {
        let mut after = generation;
        while let Some((root, sha256)) = first_behind(self.store, self.cluster, Some(after)).await? {
            if counts(self.store, self.cluster, &Mark::of(&root, sha256)).await? {
                return Ok(Some(root));
            }
            after = root.generation;
        }
        Ok(None)
    }

    /// The first root that was written at this time or later, as far as times ascend.
    async fn first_since(&self, time: Timestamp) -> Result<u64, RootError> {
        let (mut before, mut since) = (0, self.last);
        while since - before > 1 {
            let middle = before + (since - before) / 2;
            match self.at(middle).await? {
                Some(root) if root.written < time => before = middle,
                _ => since = middle,
            }
        }
        Ok(since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::{Lost, Pin, commit};
    use crate::stores::memory::MemoryStore;

    fn at(minute: i64) -> Timestamp {
        Timestamp::from_second(1_795_000_000 + minute * 60).unwrap()
    }

    fn id(minute: i64) -> BackupId {
        BackupId::new(at(minute), minute as u32)
    }

    /// A history in which a backup is begun every tenth minute and given up 50 minutes later.
    async fn history(store: &MemoryStore, minutes: i64) -> ClusterName {
        let cluster: ClusterName = "main".parse().unwrap();
        let writer: NodeName = "repo1".parse().unwrap();
        for minute in 0..minutes {
            let edit = |root: &Root| {
                let mut edited = root.clone();
                edited.pins.retain(|pin| pin.started > at(minute - 50));
                if minute % 10 == 0 {
                    edited.pins.push(Pin::new(id(minute), None, writer.clone(), at(minute)));
                }
                edited.critical = Vec::new();
                Ok(edited)
            };
            commit(store, &cluster, &writer, at(minute), edit).await.unwrap();
        }
        cluster
    }

    /// 1 ─ 3, which names 2 as lost; under 2 lies an orphan that named a backup.
    #[tokio::test]
    async fn what_only_an_orphan_named_never_was_there() {
        let store = MemoryStore::new("repo1".parse().unwrap());
        let cluster = history(&store, 1).await;
        let (first, sha256) = read_generation(&store, &cluster, Generation::FIRST).await.unwrap().expect("it is there");
        let numbered = |number: u64, root: &Root| Root {
            generation: Generation::new(number).unwrap(),
            previous_sha256: Some(sha256),
            nonce: uuid::Uuid::from_u128(number.into()),
            ..root.clone()
        };
        let pinned = first.with_pin(Pin::new(id(7), None, first.writer.clone(), at(7))).unwrap();
        let orphan = numbered(2, &pinned);
        let next = Generation::new(2).unwrap();
        let behind = Root { lost: Some(Lost { first: next, last: next }), ..numbered(3, &first.without_pin(&id(0))) };
        for root in [&orphan, &behind] {
            let bytes = bytes::Bytes::from(root.to_bytes().0);
            let _ = store.put_new(&crate::key::root(&cluster, root.generation), bytes.into()).await.unwrap();
        }
        assert_eq!(departure(&store, &cluster, &id(7)).await.unwrap(), None);
        let went = departure(&store, &cluster, &id(0)).await.unwrap().expect("it went");
        assert_eq!(went.generation, behind.generation, "the orphan let go of nothing");
    }

    #[tokio::test]
    async fn the_commit_that_let_go_is_found_in_a_long_history() {
        let store = MemoryStore::new("repo1".parse().unwrap());
        let cluster = history(&store, 500).await;
        for minute in [0, 10, 200, 400] {
            let went = departure(&store, &cluster, &id(minute)).await.unwrap().expect("it went");
            assert_eq!((went.written, went.existed), (at(minute + 50), false), "of minute {minute}");
        }
        assert_eq!(departure(&store, &cluster, &id(490)).await.unwrap(), None, "it is still there");
        assert_eq!(departure(&store, &cluster, &id(7)).await.unwrap(), None, "it never was there");
        let of_another_clock = BackupId::new(at(-100_000), 7);
        assert_eq!(departure(&store, &cluster, &of_another_clock).await.unwrap(), None);
    }
}
