//! Which objects among backups nobody refers to.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;

use super::clock::before;
use super::{Facts, LeftoverLine, Verdict};
use crate::name::BackupId;
use crate::root::{CondemnedBackup, PackRange};

/// Most ranges of packs that one root condemns; the rest follows with later ones.
const RANGE_LIMIT: usize = 50_000;
/// How long objects of an attempt that never was pinned are left alone: an older agent may be at work.
const UNPINNED_PATIENCE: Duration = Duration::from_secs(48 * 3600);

#[derive(Default)]
pub(super) struct Packs {
    pub(super) leftovers: Vec<LeftoverLine>,
    pub(super) kept_because: Option<String>,
    pub(super) condemned: Vec<CondemnedBackup>,
}

pub(super) fn condemn(facts: &Facts<'_>, removed: &BTreeSet<BackupId>, as_of: Timestamp) -> Packs {
    let root = facts.root;
    let pinned: BTreeSet<BackupId> = root.pins.iter().flat_map(|pin| pin.identifiers()).collect();
    let staying = || root.backups.iter().map(|backup| backup.backup).filter(|id| !removed.contains(id));
    if let Some(unknown) = staying().find(|id| !facts.references.contains_key(id)) {
        let reason = format!("it is not known which packs backup {unknown} refers to: no pack is removed");
        return Packs { kept_because: Some(reason), ..Packs::default() };
    }
    let mut referred: BTreeMap<BackupId, BTreeSet<PackRange>> = BTreeMap::new();
    for (to, ranges) in staying().filter_map(|id| facts.references.get(&id)).flatten() {
        referred.entry(*to).or_default().extend(ranges);
    }
    let mut packs = Packs::default();
    for id in facts.leftovers.iter().filter(|id| root.backup(id).is_none()) {
        let (verdict, reason) = judge_leftover(facts, *id, &pinned, referred.get(id), as_of);
        packs.leftovers.push(LeftoverLine { backup: *id, verdict, reason });
    }
    let leftovers = packs.leftovers.iter().filter(|line| line.verdict == Verdict::Remove).map(|line| line.backup);
    let candidates: BTreeSet<BackupId> = leftovers.chain(removed.iter().copied()).collect();
    let all = candidates.into_iter().map(|backup| (backup, unreferred(referred.get(&backup))));
    packs.condemned = bounded(all.collect(), root.generation.get());
    packs
}

fn judge_leftover(
    facts: &Facts<'_>,
    id: BackupId,
    pinned: &BTreeSet<BackupId>,
    referred: Option<&BTreeSet<PackRange>>,
    as_of: Timestamp,
) -> (Verdict, String) {
    if facts.root.pin(&id).is_some() || facts.running.contains(&id) {
        return (Verdict::Keep, "it is under way".to_owned());
    }
    if pinned.contains(&id) {
        return (Verdict::Keep, "a backup that is under way may refer to it".to_owned());
    }
    if !facts.root.is_gone(&id) && id.time() > before(as_of, UNPINNED_PATIENCE) {
        return (Verdict::Keep, "it was never pinned and may be under way all the same".to_owned());
    }
    let reason = match referred {
        None => "no backup refers to it",
        Some(_) => "no backup that exists, but others still refer to some of its packs, which stay",
    };
    (Verdict::Remove, reason.to_owned())
}

/// The packs between those that are referred to; `None` if none is.
fn unreferred(referred: Option<&BTreeSet<PackRange>>) -> Option<Vec<PackRange>> {
    let mut ranges = Vec::new();
    let mut next = Some(0);
    for range in referred? {
        if let Some(first) = next.filter(|next| *next < range.first) {
            ranges.push(PackRange { first, last: range.first - 1 });
        }
        next = next.and_then(|next| range.last.checked_add(1).map(|after| after.max(next)));
    }
    if let Some(first) = next {
        ranges.push(PackRange { first, last: u32::MAX });
    }
    Some(ranges)
}

/// At most as many ranges as a root may hold; which of them, changes with the generation.
fn bounded(all: Vec<(BackupId, Option<Vec<PackRange>>)>, generation: u64) -> Vec<CondemnedBackup> {
    let weight = |packs: &Option<Vec<PackRange>>| packs.as_ref().map_or(1, |ranges| ranges.len().max(1));
    let total: usize = all.iter().map(|(_, packs)| weight(packs)).sum();
    if total <= RANGE_LIMIT {
        return all.into_iter().map(|(backup, packs)| CondemnedBackup { backup, packs }).collect();
    }
    let skipped = (generation as usize).wrapping_mul(RANGE_LIMIT) % total;
    let mut at = 0;
    let mut chosen: Vec<CondemnedBackup> = Vec::new();
    for (backup, packs) in all {
        let here = at;
        at += weight(&packs);
        let inside = |index: usize| (index + total - skipped) % total < RANGE_LIMIT;
        let Some(ranges) = packs else {
            if inside(here) {
                chosen.push(CondemnedBackup { backup, packs: None });
            }
            continue;
        };
        let some: Vec<PackRange> =
            (here..).zip(ranges).filter(|(index, _)| inside(*index)).map(|(_, range)| range).collect();
        if !some.is_empty() {
            chosen.push(CondemnedBackup { backup, packs: Some(some) });
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u32, last: u32) -> PackRange {
        PackRange { first, last }
    }

    #[test]
    fn between_what_is_referred_to_lies_the_rest() {
        let check = |referred: &[(u32, u32)], expected: &[(u32, u32)]| {
            let referred: BTreeSet<PackRange> = referred.iter().map(|(first, last)| range(*first, *last)).collect();
            let expected: Vec<PackRange> = expected.iter().map(|(first, last)| range(*first, *last)).collect();
            assert_eq!(unreferred(Some(&referred)), Some(expected), "{referred:?}");
        };
        assert_eq!(unreferred(None), None);
        check(&[(0, 0)], &[(1, u32::MAX)]);
        check(&[(3, 5)], &[(0, 2), (6, u32::MAX)]);
        check(&[(0, 9), (2, 4), (12, 12)], &[(10, 11), (13, u32::MAX)]);
        check(&[(1, 2), (3, 3)], &[(0, 0), (4, u32::MAX)]);
        check(&[(7, u32::MAX)], &[(0, 6)]);
        check(&[(0, u32::MAX), (5, 5)], &[]);
    }

    #[test]
    fn a_root_holds_so_many_ranges_and_later_ones_the_rest() {
        let id = |random| BackupId::new(Timestamp::UNIX_EPOCH, random);
        let scattered: Vec<PackRange> = (0..70_000).map(|number| range(number * 2, number * 2)).collect();
        let all = vec![(id(1), None), (id(2), Some(scattered.clone())), (id(3), None), (id(4), Some(scattered))];
        let count = |chosen: &[CondemnedBackup]| chosen.iter().map(|one| one.packs.as_ref().map_or(1, Vec::len)).sum();
        let mut seen: BTreeSet<(BackupId, Option<PackRange>)> = BTreeSet::new();
        for generation in 1..=3 {
            let chosen = bounded(all.clone(), generation);
            let total: usize = count(&chosen);
            assert_eq!(total, RANGE_LIMIT);
            assert!(chosen.is_sorted_by_key(|one| one.backup));
            for one in &chosen {
                match &one.packs {
                    None => drop(seen.insert((one.backup, None))),
                    Some(ranges) => seen.extend(ranges.iter().map(|range| (one.backup, Some(*range)))),
                }
            }
        }
        assert_eq!(seen.len(), 140_002);
    }
}
