//! Records built to order for each rule, streams cut at every kind of place, and damage.

use proptest::prelude::*;

use super::*;
use crate::relation::{DatabaseDirectory, Fork, RelationFork};
use crate::segment::{SegmentName, SegmentNumber};
use crate::system_identifier::SystemIdentifier;
use crate::timeline::Timeline;
use crate::wal_segment::{Expected, PAGE_BYTES};

mod encoding;
mod joining;
mod records;
mod servers;
mod stream;

const MIB: u64 = 1 << 20;
const SPACE: u32 = 1663;

const fn main_fork(database: u32, relation: u32) -> RelationFork {
    RelationFork { tablespace: SPACE, database, relation, fork: Fork::Main }
}

/// Maps of any shape, over few enough relations that they meet.
fn maps() -> impl Strategy<Value = ChangeMap> {
    let fork = (0u32..3, 1u32..3, 1u32..5, prop_oneof![Just(Fork::Main), Just(Fork::Init)]).prop_map(
        |(tablespace, database, relation, fork)| RelationFork { tablespace, database, relation: relation * 1000, fork },
    );
    let block = prop_oneof![0u32..40, 65_500u32..65_600, Just(u32::MAX - 1), 0u32..1_000_000];
    let change = prop_oneof![
        8 => (fork.clone(), block.clone(), 1u32..200).prop_map(|(fork, block, length)| Change::Mark(fork, block, length)),
        1 => (fork, block).prop_map(|(fork, block)| Change::Cut(fork, block)),
        1 => (0u32..3, 1u32..3).prop_map(|(tablespace, database)| Change::Reset(DatabaseDirectory { tablespace, database })),
    ];
    proptest::collection::vec(change, 0..40).prop_map(|changes| {
        let mut map = ChangeMap::empty();
        for change in changes {
            match change {
                Change::Mark(fork, block, length) => {
                    for block in block..block.saturating_add(length) {
                        map.mark(fork, block);
                    }
                }
                Change::Cut(fork, block) => map.cut(fork, block),
                Change::Reset(directory) => map.reset(directory),
            }
        }
        map
    })
}

#[derive(Debug, Clone)]
enum Change {
    Mark(RelationFork, u32, u32),
    Cut(RelationFork, u32),
    Reset(DatabaseDirectory),
}

proptest! {
    #[test]
    fn the_order_of_stretches_does_not_matter(one in maps(), two in maps(), three in maps()) {
        let union = |maps: [&ChangeMap; 3]| {
            let mut union = ChangeMap::empty();
            maps.into_iter().for_each(|map| union.union(map));
            union
        };
        let all = union([&one, &two, &three]);
        prop_assert_eq!(&all, &union([&three, &one, &two]));
        prop_assert_eq!(&all, &union([&two, &three, &one]));
        prop_assert_eq!(&all, &union([&all, &two, &all]));
        for (fork, changes) in one.forks().chain(two.forks()).chain(three.forks()) {
            let limit = changes.limit_block();
            prop_assert!(changes.blocks().iter().chain(limit).all(|block| all.touches(fork, block)));
        }
    }
}

#[test]
fn what_a_map_says() {
    let mut map = ChangeMap::empty();
    map.mark(main_fork(5, 16384), 7);
    map.mark(main_fork(5, 16384), 90);
    map.cut(main_fork(5, 16384), 50);
    map.mark(main_fork(5, 16384), 60);
    map.mark(RelationFork { fork: Fork::VisibilityMap, ..main_fork(5, 16384) }, 1);
    map.mark(RelationFork { fork: Fork::FreeSpaceMap, ..main_fork(5, 16384) }, 1);
    map.cut(RelationFork { fork: Fork::VisibilityMap, ..main_fork(5, 16384) }, 1);
    let changes = map.fork(&main_fork(5, 16384)).unwrap();
    assert_eq!((changes.limit_block(), changes.blocks().iter().collect::<Vec<_>>()), (Some(50), vec![7]));
    assert_eq!((map.forks().len(), map.block_count()), (1, 1));
    let touched = |map: &ChangeMap, block| map.touches(&main_fork(5, 16384), block);
    assert!(touched(&map, 7) && touched(&map, 50) && touched(&map, u32::MAX - 1));
    assert!(!touched(&map, 6) && !touched(&map, 49));
    map.cut(main_fork(5, 16384), 70);
    assert_eq!(map.fork(&main_fork(5, 16384)).unwrap().limit_block(), Some(50));
    map.reset(DatabaseDirectory { tablespace: SPACE, database: 5 });
    map.mark(main_fork(5, 16384), 7);
    assert_eq!(map.forks().len(), 0);
    assert!(
        touched(&map, 6) && map.is_reset(main_fork(5, 1).directory()) && !map.is_reset(main_fork(6, 1).directory())
    );
}
