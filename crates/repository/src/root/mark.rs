//! Marks: by the newest root that was seen in a store it is noticed that the store was set back to an older copy of itself.
//!
//! Roots are never changed or removed, so a root that was there once is there for ever; if it is not, the store lost what
//! came after some moment, root commits and whatever else. To build on what is left would give numbers of roots to other
//! contents, and bring back what later roots condemned. So nothing is committed then until an operator accepts the loss, and
//! the first root after that lies above everything that was seen and names the generations that are lost.
//!
//! A mark is what its owner remembers; it is not stored with the roots, for it would be set back with them.

use super::history::{first_behind, read_generation};
use super::{Root, RootError};
use crate::name::{ClusterName, Generation, StoreName};
use crate::store::ObjectStore;

/// A root that was seen in a store: its number and its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Its number.
    pub generation: Generation,
    /// SHA-256 of its text.
    pub sha256: [u8; 32],
}

/// What a writer remembers of a store's history of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Past {
    /// Nothing: whatever is there is built on.
    #[default]
    Unknown,
    /// This root was there, and has to be there.
    Seen(Mark),
    /// This root was there, and an operator accepted that it may be gone: the next root lies above it.
    Forgone(Mark),
}

/// A store was set back: a root that was there is not there any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "store {store} was set back to an older copy of itself: root {} of cluster {cluster} was seen there, and {}; nothing is \
     committed or removed there until this is accepted: pgconvoy store accept {store} --cluster {cluster}",
    seen.get(), self.instead()
)]
pub struct SetBack {
    /// Which store.
    pub store: StoreName,
    /// Whose roots.
    pub cluster: ClusterName,
    /// The newest root that was seen there.
    pub seen: Generation,
    /// The newest that is there now.
    pub found: Option<Generation>,
}

impl SetBack {
    /// What is there instead, for people.
    fn instead(&self) -> String {
        match self.found {
            None => "now there is none".to_owned(),
            Some(found) if found < self.seen => format!("now the newest is {}", found.get()),
            Some(found) => format!("now the newest is {}, in another history", found.get()),
        }
    }
}

impl Mark {
    /// The mark of a root.
    pub fn of(root: &Root, sha256: [u8; 32]) -> Self {
        Self { generation: root.generation, sha256 }
    }

    /// Whether the newest root of a history says by itself that the marked one is in it.
    fn is_beneath(&self, (newest, sha256): &(Root, [u8; 32])) -> bool {
        *self == Self::of(newest, *sha256) || newest.previous_sha256 == Some(self.sha256)
    }

    /// Whether the marked root is accounted for: `there` has its number, `behind` is the first root after that number. It
    /// must be the one that was seen, or be named as lost by the root that an operator had written over the loss; then an
    /// orphan may lie in its place.
    fn is_accounted_for(&self, there: Option<Self>, behind: Option<&Root>) -> bool {
        let is_lost = || behind.and_then(Root::lost_before).is_some_and(|lost| lost.holds(self.generation));
        there == Some(*self) || is_lost()
    }
}

/// Whether a root that was seen is gone, given the newest root of the store. Nothing is concluded from the listing that led
/// to that one: a store may list late.
///
/// # Errors
/// When the store fails.
pub async fn look_back(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    mark: &Mark,
    newest: Option<&(Root, [u8; 32])>,
) -> Result<Option<SetBack>, RootError> {
    if newest.is_some_and(|newest| mark.is_beneath(newest)) {
        return Ok(None);
    }
    let there = read_generation(store, cluster, mark.generation).await?;
    let there = there.map(|(root, sha256)| Mark::of(&root, sha256));
    let behind = match there {
        Some(there) if there == *mark => None,
        _ => first_behind(store, cluster, Some(mark.generation)).await?,
    };
    let set_back = || SetBack {
        store: store.name().clone(),
        cluster: cluster.clone(),
        seen: mark.generation,
        found: newest.map(|(root, _)| root.generation),
    };
    Ok((!mark.is_accounted_for(there, behind.as_ref().map(|(root, _)| root))).then(set_back))
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::Lost;
    use super::*;

    fn generation(number: u64) -> Generation {
        Generation::new(number).unwrap()
    }

    fn root(number: u64, lost: Option<(u64, u64)>) -> Root {
        let empty = Root::empty("main".parse().unwrap(), "coordinator".parse().unwrap(), Timestamp::UNIX_EPOCH);
        let lost = lost.map(|(first, last)| Lost { first: generation(first), last: generation(last) });
        Root { generation: generation(number), lost, ..empty }
    }

    fn mark(number: u64, digest: u8) -> Mark {
        Mark { generation: generation(number), sha256: [digest; 32] }
    }

    #[test]
    fn the_newest_root_often_says_enough() {
        let newest = (root(7, None), [7; 32]);
        assert!(mark(7, 7).is_beneath(&newest));
        assert!(!mark(7, 8).is_beneath(&newest) && !mark(6, 6).is_beneath(&newest));
        let newest = (Root { previous_sha256: Some([6; 32]), ..root(7, None) }, [7; 32]);
        assert!(mark(6, 6).is_beneath(&newest));
    }

    #[test]
    fn a_root_is_there_or_named_as_lost() {
        assert!(mark(5, 5).is_accounted_for(Some(mark(5, 5)), None));
        // Its number was given to another one, which is no orphan unless that is said.
        assert!(!mark(5, 5).is_accounted_for(Some(mark(5, 6)), Some(&root(6, None))));
        assert!(mark(5, 5).is_accounted_for(Some(mark(5, 6)), Some(&root(9, Some((4, 8))))));
        assert!(!mark(5, 5).is_accounted_for(None, None));
        assert!(!mark(5, 5).is_accounted_for(None, Some(&root(9, None))));
        assert!(mark(5, 5).is_accounted_for(None, Some(&root(9, Some((4, 8))))));
        assert!(!mark(5, 5).is_accounted_for(None, Some(&root(9, Some((6, 8))))));
        // A writer of an older version carries the field on, where it means nothing.
        assert!(!mark(5, 5).is_accounted_for(None, Some(&root(10, Some((4, 8))))));
    }

    #[test]
    fn what_is_said_names_store_cluster_and_both_roots() {
        let said = |found: Option<u64>| {
            let (store, cluster) = ("repo1".parse().unwrap(), "main".parse().unwrap());
            SetBack { store, cluster, seen: generation(9), found: found.map(generation) }.to_string()
        };
        assert!(said(Some(7)).contains("root 9 of cluster main was seen there, and now the newest is 7;"));
        assert!(said(None).contains("now there is none; nothing is committed or removed there"));
        assert!(said(Some(9)).contains("in another history"));
        assert!(said(None).ends_with("pgconvoy store accept repo1 --cluster main"));
    }
}
