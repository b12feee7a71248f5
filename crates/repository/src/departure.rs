//! When a backup went that is there no more, as the root history of a store tells.
//!
//! Roots are never removed, so the commit that let go of a backup can be found however long ago it was. A backup is in a row of
//! roots: pinned as it begins, named when it is published, and then in none again. Roots of the time of its identifier are looked
//! for first, and from one that has it its last one; that takes some tens of small reads of a history of any length. Clocks
//! need not agree: if the roots of that time do not have it, some others are tried.

use jiff::Timestamp;

use crate::name::{BackupId, ClusterName, Generation, NodeName};
use crate::root::{self, Root, RootError, read_generation};
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
        if history.at(number).await?.is_some_and(|root| has(&root, backup)) {
            present = Some(number);
            break;
        }
    }
    let Some(mut present) = present else { return Ok(None) };
    let mut absent = history.last;
    while absent - present > 1 {
        let middle = present + (absent - present) / 2;
        match history.at(middle).await? {
            Some(root) if has(&root, backup) => present = middle,
            _ => absent = middle,
        }
    }
    let (Some(last), Some(first)) = (history.at(present).await?, history.at(absent).await?) else { return Ok(None) };
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
    use crate::root::{Pin, commit};
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
