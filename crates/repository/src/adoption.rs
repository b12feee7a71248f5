//! Adoptions: an operator's word that a node is the writer of a timeline.
//!
//! They lie in every store under `writer/<TLI>/<n>`, created and never changed; of several for one timeline the highest
//! number counts, and of equal numbers in several stores the one written last. A coordinator judges by them what may be
//! archived, and a restore's plan which of several lines that were written at the same time is the cluster's own. For that a
//! word is bound to what its speaker could know: it decides among the timelines that were known when it was said, whatever
//! clocks say, and no others. Of words about several timelines the one with the highest number counts, too. WAL is read
//! without regard to them.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use postgres_format::{SystemIdentifier, Timeline};
use serde::{Deserialize, Serialize};

use crate::key::{self, ParsedKey};
use crate::name::{ClusterName, NodeName};
use crate::store::{self, ObjectEntry, ObjectStore, StoreError};

/// Longest adoption that is read, in bytes.
const ADOPTION_LIMIT_BYTES: u64 = 64 << 10;
/// Most adoptions of one system.
const ADOPTION_LIMIT: usize = 10_000;
/// Most histories of one system.
const HISTORY_LIMIT: usize = 100_000;
/// Most timelines that one adoption knows.
const KNOWN_LIMIT: usize = 1000;
/// The format that this version writes and reads.
const FORMAT: u32 = 1;

/// An operator's adoption of a node as a timeline's writer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adoption {
    /// Version of this object's layout; 1.
    pub format: u32,
    /// The adopted node.
    pub node: NodeName,
    /// When.
    pub written: Timestamp,
    /// The timelines that were known then, the adopted one among them: it decides among lines of these alone. Absent in
    /// what versions before this one wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<BTreeSet<Timeline>>,
}

impl Adoption {
    /// An adoption made now, about timelines that are known.
    pub fn new(node: NodeName, now: Timestamp, known: BTreeSet<Timeline>) -> Self {
        Self { format: FORMAT, node, written: now, known: Some(known) }
    }

    /// The object's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("an adoption has only text keys and plain values")
    }
}

/// An adoption and its place among those of its timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numbered {
    /// The number in its key.
    pub number: u32,
    /// What was said.
    pub adoption: Adoption,
}

impl Numbered {
    /// Whether it counts, and another one of the same timeline does not, whichever stores they lie in. Numbers come before
    /// times, so that a clock that was set back undoes no operator's word.
    pub fn counts_over(&self, other: &Self) -> bool {
        (self.number, self.adoption.written) > (other.number, other.adoption.written)
    }
}

/// The timelines of a system that one store knows: the first, and those with a history. The newest, if they are very many.
///
/// # Errors
/// When the store fails.
pub async fn known_timelines(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
) -> Result<BTreeSet<Timeline>, StoreError> {
    let mut known = BTreeSet::from([Timeline::FIRST]);
    for entry in store::list_all(store, &key::history_prefix(cluster, system), HISTORY_LIMIT).await? {
        if let Ok(ParsedKey::History { timeline, .. }) = entry.key.parsed() {
            known.insert(timeline);
        }
    }
    while known.len() > KNOWN_LIMIT {
        known.pop_first();
    }
    Ok(known)
}

/// The highest number of an adoption of any timeline in one store; 0 without any.
///
/// # Errors
/// When the store fails.
pub async fn last_number(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
) -> Result<u32, StoreError> {
    let listed = store::list_all(store, &key::writers_prefix(cluster, system), ADOPTION_LIMIT).await?;
    let numbers = listed.into_iter().filter_map(|entry| match entry.key.parsed() {
        Ok(ParsedKey::Writer { number, .. }) => Some(number),
        _ => None,
    });
    Ok(numbers.max().unwrap_or_default())
}

/// The newest adoption of each timeline in one store.
///
/// # Errors
/// What the store says; an adoption that cannot be read is [`StoreError::Damaged`].
pub async fn newest_of_all(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
) -> Result<BTreeMap<Timeline, Numbered>, StoreError> {
    let (adoptions, damage) = newest_readable(store, cluster, system).await?;
    damage.into_iter().next().map_or(Ok(adoptions), Err)
}

/// The newest adoption of each timeline in one store, and what is wrong with those that cannot be read.
///
/// # Errors
/// When the store fails.
pub async fn newest_readable(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
) -> Result<(BTreeMap<Timeline, Numbered>, Vec<StoreError>), StoreError> {
    let mut newest: BTreeMap<Timeline, ObjectEntry> = BTreeMap::new();
    for entry in store::list_all(store, &key::writers_prefix(cluster, system), ADOPTION_LIMIT).await? {
        // Keys come in order of their numbers; a key of another kind is no adoption.
        if let Ok(ParsedKey::Writer { timeline, .. }) = entry.key.parsed() {
            newest.insert(timeline, entry);
        }
    }
    let (mut adoptions, mut damage) = (BTreeMap::new(), Vec::new());
    for entry in newest.values() {
        match read(store, entry).await {
            Ok((timeline, adoption)) => drop(adoptions.insert(timeline, adoption)),
            Err(error @ StoreError::Damaged { .. }) => damage.push(error),
            Err(error) => return Err(error),
        }
    }
    Ok((adoptions, damage))
}

async fn read(store: &dyn ObjectStore, entry: &ObjectEntry) -> Result<(Timeline, Numbered), StoreError> {
    let damaged = |reason: String| StoreError::Damaged { store: store.name().clone(), key: entry.key.clone(), reason };
    let Ok(ParsedKey::Writer { timeline, number, .. }) = entry.key.parsed() else {
        return Err(damaged("its key names no adoption".to_owned()));
    };
    let bytes = store::read(store, &entry.key, ADOPTION_LIMIT_BYTES).await?.unwrap_or_default();
    let adoption: Adoption = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if adoption.format != FORMAT {
        return Err(damaged(format!("its format is {}, this version reads {FORMAT}", adoption.format)));
    }
    Ok((timeline, Numbered { number, adoption }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::memory::MemoryStore;

    #[tokio::test]
    async fn the_highest_number_counts() {
        let store = MemoryStore::new("repo1".parse().unwrap());
        let (cluster, system): (ClusterName, _) = ("main".parse().unwrap(), SystemIdentifier::new(7));
        let on = |number| Timeline::new(number).unwrap();
        for (timeline, number, node) in [(1, 1, "a"), (1, 2, "b"), (1, 16, "c"), (2, 1, "d")] {
            let written = Timestamp::from_second(1_795_400_000 + i64::from(number)).unwrap();
            let adoption = Adoption::new(node.parse().unwrap(), written, BTreeSet::new());
            let key = key::writer(&cluster, system, on(timeline), number);
            let _ = store.put_new(&key, bytes::Bytes::from(adoption.to_bytes()).into()).await.unwrap();
        }
        assert_eq!(last_number(&store, &cluster, system).await.unwrap(), 16);
        assert_eq!(last_number(&store, &cluster, SystemIdentifier::new(8)).await.unwrap(), 0);
        let all = newest_of_all(&store, &cluster, system).await.unwrap();
        let nodes: Vec<_> =
            all.iter().map(|(timeline, newest)| (timeline.get(), newest.adoption.node.as_ref())).collect();
        assert_eq!(nodes, [(1, "c"), (2, "d")]);
        let damaged = key::writer(&cluster, system, on(2), 2);
        let _ = store.put_new(&damaged, bytes::Bytes::from_static(b"{}").into()).await.unwrap();
        let failed = newest_of_all(&store, &cluster, system).await;
        assert!(matches!(failed, Err(StoreError::Damaged { .. })), "{failed:?}");
        let (readable, damage) = newest_readable(&store, &cluster, system).await.unwrap();
        assert_eq!((readable.len(), damage.len()), (1, 1), "the others are read all the same");
    }

    #[test]
    fn a_higher_number_counts_over_a_later_time() {
        let numbered = |number, second: i64| {
            let written = Timestamp::from_second(1_795_400_000 + second).unwrap();
            Numbered { number, adoption: Adoption::new("a".parse().unwrap(), written, BTreeSet::new()) }
        };
        for (one, other, counts) in [
            (numbered(2, 0), numbered(1, 9), true),
            (numbered(1, 9), numbered(2, 0), false),
            (numbered(1, 9), numbered(1, 0), true),
            (numbered(1, 0), numbered(1, 0), false),
        ] {
            assert_eq!(one.counts_over(&other), counts, "{one:?} {other:?}");
        }
    }
}
