//! Tests of coverage: tables after what real clusters do, and properties against a segment-by-segment model.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

pub(super) fn timeline(number: u32) -> Timeline {
    Timeline::new(number).unwrap()
}

fn small() -> SegmentSize {
    SegmentSize::from_bytes(MIB).unwrap()
}

/// An archive of 1 MiB segments from spans as (timeline, first, last) and forks as (child, text of its history).
pub(super) fn archive(spans: &[(u32, u64, u64)], histories: &[(u32, &str)]) -> ArchivedWal {
    let mut wal = ArchivedWal::new(small());
    for (number, first, last) in spans {
        wal.add_span(to_span(timeline(*number), (*first, *last)));
    }
    for (child, text) in histories {
        let history = TimelineHistory::parse(timeline(*child), text.as_bytes()).unwrap();
        wal.add_history(timeline(*child), history);
    }
    wal
}

pub(super) fn lsn(mib: f64) -> Lsn {
    Lsn::new((mib * MIB as f64) as u64)
}

fn range(start: f64, end: f64) -> LsnRange {
    LsnRange { start: lsn(start), end: lsn(end) }
}

fn spans(spans: &[SegmentSpan]) -> Vec<(u32, u64, u64)> {
    spans.iter().map(|span| (span.timeline.get(), span.first.as_u64(), span.last.as_u64())).collect()
}

#[test]
fn one_timeline() {
    let wal = archive(&[(1, 2, 5), (1, 7, 9)], &[]);
    let coverage = Coverage::of(&wal);
    let one = coverage.timeline(timeline(1)).unwrap();
    assert_eq!(one.ranges, [range(2.0, 6.0), range(7.0, 10.0)]);
    assert_eq!(one.own, one.ranges);
    assert_eq!(one.gaps.len(), 1);
    assert_eq!((one.gaps[0].range, spans(&one.gaps[0].segments)), (range(6.0, 7.0), vec![(1, 6, 6)]));
    assert_eq!((one.tip, one.parent, one.history_present), (Some(lsn(10.0)), None, true));
    assert_eq!(wal.reach(timeline(1), lsn(2.5)), Some(lsn(6.0)));
    assert_eq!(wal.reach(timeline(1), lsn(6.0)), None);
}

#[test]
fn what_a_dead_primary_never_archived_is_a_gap_of_the_child() {
    // Timeline 1 archived up to segment 4; the standby had received more and was promoted within segment 7.
    let history = [(2, "1\t0/780000\tno recovery target specified\n")];
    let wal = archive(&[(1, 1, 4), (2, 7, 9)], &history);
    let coverage = Coverage::of(&wal);
    let two = coverage.timeline(timeline(2)).unwrap();
    assert_eq!(two.ranges, [range(1.0, 5.0), range(7.0, 10.0)]);
    assert_eq!(spans(&two.gaps[0].segments), [(1, 5, 6)]);
    assert_eq!(two.own, [range(7.5, 10.0)]);
    assert_eq!(two.parent, Some(Fork { timeline: timeline(1), lsn: lsn(7.5) }));
    // For the parent itself it is no gap: nobody knows of more.
    assert!(coverage.timeline(timeline(1)).unwrap().gaps.is_empty());
}

#[test]
fn the_fork_segment_is_read_from_the_child() {
    let history = [(2, "1\t0/780000\t\n")];
    let check = |held: &[(u32, u64, u64)], expected: &[LsnRange], fallbacks: usize| {
        let wal = archive(held, &history);
        assert_eq!(wal.ranges(timeline(2)), expected, "{held:?}");
        assert_eq!(wal.stand_ins(timeline(2)).len(), fallbacks, "{held:?}");
    };
    check(&[(1, 1, 6), (2, 7, 8)], &[range(1.0, 9.0)], 0);
    check(&[(1, 1, 9), (2, 7, 8)], &[range(1.0, 9.0)], 0);
    // The parent's is good up to the fork, no further, and what it has beyond belongs to it alone.
    check(&[(1, 1, 9), (2, 8, 8)], &[range(1.0, 7.5), range(8.0, 9.0)], 1);
    check(&[(1, 1, 9)], &[range(1.0, 7.5)], 1);
    let wal = archive(&[(1, 1, 9), (2, 8, 8)], &history);
    assert_eq!(spans(&wal.missing(timeline(2), range(1.0, 9.0))), [(2, 7, 7)]);
}

#[test]
fn a_fork_on_a_boundary_needs_nothing_of_the_parents_next_segment() {
    let wal = archive(&[(1, 1, 9), (2, 7, 8)], &[(2, "1\t0/700000\t\n")]);
    assert_eq!(wal.ranges(timeline(2)), [range(1.0, 9.0)]);
    assert_eq!(spans(&wal.needed(timeline(2), range(6.0, 8.0))), [(1, 6, 6), (2, 7, 7)]);
    let wal = archive(&[(1, 1, 9)], &[(2, "1\t0/700000\t\n")]);
    assert_eq!(wal.ranges(timeline(2)), [range(1.0, 7.0)]);
    // Not needed, and read all the same.
    let name = |number| SegmentName::new(timeline(number), SegmentNumber::new(7), small());
    let expected = StandIn { segment: name(1), wanted: name(2), fork: lsn(7.0), begin: lsn(7.0) };
    assert_eq!(wal.stand_ins(timeline(2)), [expected]);
    assert_eq!(archive(&[(1, 1, 6)], &[(2, "1\t0/700000\t\n")]).stand_ins(timeline(2)), []);
}

#[test]
fn several_forks_in_one_segment() {
    let history = [(3, "1\t0/340000\t\n2\t0/380000\t\n")];
    let check = |held: &[(u32, u64, u64)], end: f64| {
        assert_eq!(archive(held, &history).ranges(timeline(3)), [range(1.0, end)], "{held:?}");
    };
    check(&[(1, 1, 3), (2, 3, 3), (3, 3, 4)], 5.0);
    check(&[(1, 1, 3), (2, 3, 3)], 3.5);
    check(&[(1, 1, 3)], 3.25);
    let wal = archive(&[(1, 1, 3), (2, 3, 3), (3, 3, 4)], &history);
    assert_eq!(spans(&wal.needed(timeline(3), range(2.0, 4.0))), [(1, 2, 2), (3, 3, 3)]);
    let stands_in = |held: &[(u32, u64, u64)]| -> Vec<(u32, Lsn)> {
        let wal = archive(held, &history);
        wal.stand_ins(timeline(3)).iter().map(|found| (found.segment.timeline().get(), found.fork)).collect()
    };
    // The newest copy is read, whichever others there are.
    assert_eq!(stands_in(&[(1, 1, 3), (3, 3, 4)]), []);
    assert_eq!(stands_in(&[(1, 1, 3), (2, 3, 3)]), [(2, lsn(3.5))]);
    assert_eq!(stands_in(&[(1, 1, 3)]), [(1, lsn(3.25))]);
}

#[test]
fn the_last_segment_of_a_range_that_ends_on_a_boundary_is_the_one_before() {
    let wal = archive(&[], &[]);
    let check = |start, end, expected: &[(u32, u64, u64)]| {
        assert_eq!(spans(&wal.needed(timeline(1), range(start, end))), expected, "{start} to {end}");
    };
    check(2.0, 3.0, &[(1, 2, 2)]);
    check(2.0, 3.1, &[(1, 2, 3)]);
    check(2.5, 2.6, &[(1, 2, 2)]);
    check(2.9, 3.0, &[(1, 2, 2)]);
    check(3.0, 3.0, &[]);
}

#[test]
fn a_missing_history_is_said() {
    let wal = archive(&[(1, 1, 6), (2, 7, 8)], &[]);
    let coverage = Coverage::of(&wal);
    let two = coverage.timeline(timeline(2)).unwrap();
    assert!(!two.history_present);
    assert_eq!(two.ranges, [range(7.0, 9.0)]);
    assert!(!wal.on_path(timeline(2), timeline(1), lsn(5.0)));
}

#[test]
fn a_timeline_without_wal_of_its_own_is_reported() {
    let wal = archive(&[(1, 1, 6)], &[(2, "1\t0/480000\t\n")]);
    let coverage = Coverage::of(&wal);
    let two = coverage.timeline(timeline(2)).unwrap();
    assert_eq!((two.tip, two.own.len()), (Some(lsn(4.5)), 0));
}

#[test]
fn what_one_store_lacks() {
    let all = archive(&[(1, 1, 9), (2, 3, 4)], &[]);
    let check = |held: &[(u32, u64, u64)], expected: &[(u32, u64, u64)]| {
        assert_eq!(spans(&all.without(&archive(held, &[]))), expected, "{held:?}");
    };
    check(&[(1, 1, 9), (2, 3, 4)], &[]);
    check(&[], &[(1, 1, 9), (2, 3, 4)]);
    check(&[(1, 1, 2), (1, 5, 5), (2, 4, 9)], &[(1, 3, 4), (1, 6, 9), (2, 3, 3)]);
}

const LAST: u64 = 24;

/// Timelines 1 to 4, each off one before it, at any position.
fn any_histories() -> impl Strategy<Value = Vec<(u32, Vec<(u32, u64)>)>> {
    let fork = (any::<prop::sample::Index>(), MIB..LAST * MIB, prop::bool::weighted(0.3));
    prop::collection::vec(fork, 0..4).prop_map(|forks| {
        let mut histories: Vec<(u32, Vec<(u32, u64)>)> = vec![(1, Vec::new())];
        for (parent, at, on_boundary) in forks {
            let child = histories.len() as u32 + 1;
            let (parent, mut entries) = histories[parent.index(histories.len())].clone();
            let at = if on_boundary { at / MIB * MIB } else { at };
            let at = at.max(entries.last().map_or(0, |(_, end)| *end));
            entries.push((parent, at));
            histories.push((child, entries));
        }
        histories
    })
}

fn any_archive() -> impl Strategy<Value = (ArchivedWal, BTreeSet<(u32, u64)>)> {
    let segments = prop::collection::vec((1u32..5, 1..=LAST, prop::bool::weighted(0.85)), 0..120);
    let runs = prop::collection::vec((1u32..5, 1..=LAST, 1..=LAST), 0..4);
    (any_histories(), segments, runs).prop_map(|(histories, segments, runs)| {
        let mut wal = ArchivedWal::new(small());
        let mut model = BTreeSet::new();
        for (number, first, last) in runs {
            let (first, last) = (first.min(last), first.max(last));
            wal.add_span(to_span(timeline(number), (first, last)));
            model.extend((first..=last).map(|segment| (number, segment)));
        }
        for (number, segment, add) in segments {
            let name = SegmentName::new(timeline(number), SegmentNumber::new(segment), small());
            if add {
                assert!(wal.add(name));
                model.insert((number, segment));
            } else {
                wal.remove(name);
                model.remove(&(number, segment));
            }
        }
        for (child, entries) in histories.into_iter().skip(1) {
            let lines = entries.iter().map(|(parent, at)| format!("{parent}\t{}\t\n", Lsn::new(*at)));
            let text: String = lines.collect();
            let history = TimelineHistory::parse(timeline(child), text.as_bytes()).unwrap();
            wal.add_history(timeline(child), history);
        }
        (wal, model)
    })
}

/// Whether some timeline on the path has the segment of a position and had not ended there.
fn covered(wal: &ArchivedWal, model: &BTreeSet<(u32, u64)>, target: Timeline, at: Lsn) -> bool {
    let number = at.as_u64() / MIB;
    wal.path(target).iter().any(|leg| {
        model.contains(&(leg.timeline.get(), number))
            && leg.begin.as_u64() / MIB <= number
            && leg.end.is_none_or(|end| at < end)
    })
}

proptest! {
    #[test]
    fn spans_are_the_set_of_segments((wal, model) in any_archive()) {
        let held: BTreeSet<(u32, u64)> = wal
            .spans()
            .flat_map(|span| (span.first.as_u64()..=span.last.as_u64()).map(move |n| (span.timeline.get(), n)))
            .collect();
        prop_assert_eq!(&held, &model);
        let listed: Vec<SegmentSpan> = wal.spans().collect();
        for pair in listed.windows(2).filter(|pair| pair[0].timeline == pair[1].timeline) {
            prop_assert!(pair[0].last.as_u64() + 1 < pair[1].first.as_u64(), "spans touch");
        }
        for number in 1..5 {
            for segment in 0..=LAST + 1 {
                let holds = wal.holds(timeline(number), SegmentNumber::new(segment));
                prop_assert_eq!(holds, model.contains(&(number, segment)));
            }
        }
    }

    #[test]
    fn a_position_is_in_a_range_exactly_if_a_segment_of_the_path_has_it((wal, model) in any_archive()) {
        for target in wal.timelines() {
            let ranges = wal.ranges(target);
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            let forks = wal.path(target).into_iter().flat_map(|leg| {
                [leg.begin.as_u64().saturating_sub(1), leg.begin.as_u64(), leg.begin.as_u64() + 1]
            });
            let samples = (0..LAST * 2 + 4).map(|half| half * MIB / 2).chain(forks);
            for at in samples.map(Lsn::new) {
                let inside = ranges.iter().any(|range| range.start <= at && at < range.end);
                prop_assert_eq!(inside, covered(&wal, &model, target, at), "timeline {} at {}", target, at);
            }
        }
    }

    #[test]
    fn missing_is_what_the_ranges_lack((wal, _) in any_archive(), start in 0..LAST * MIB, length in 1..8 * MIB) {
        let wanted = LsnRange { start: Lsn::new(start), end: Lsn::new(start + length) };
        for target in wal.timelines() {
            let missing = wal.missing(target, wanted);
            let whole = wal.ranges(target).iter().any(|range| range.includes(&wanted));
            prop_assert_eq!(missing.is_empty(), whole);
            let needed = wal.needed(target, wanted);
            for span in missing {
                for name in span.names(small()) {
                    let number = name.number(small()).unwrap();
                    prop_assert!(!wal.holds(name.timeline(), number), "{} is there", name);
                    prop_assert!(needed.iter().any(|need| need.timeline == span.timeline
                        && need.first <= number && number <= need.last), "{} is not needed", name);
                }
            }
            // One file a segment, in order, never an older timeline after a newer one.
            let numbers: Vec<u64> =
                needed.iter().flat_map(|span| span.first.as_u64()..=span.last.as_u64()).collect();
            let expected: Vec<u64> = (start / MIB..=(start + length - 1) / MIB).collect();
            prop_assert_eq!(numbers, expected);
            prop_assert!(needed.windows(2).all(|pair| pair[0].timeline < pair[1].timeline));
        }
    }

    #[test]
    fn gaps_and_ranges_tile_the_path((wal, _) in any_archive()) {
        for coverage in Coverage::of(&wal).timelines {
            prop_assert_eq!(coverage.gaps.len(), coverage.ranges.len().saturating_sub(1));
            for (gap, pair) in coverage.gaps.iter().zip(coverage.ranges.windows(2)) {
                prop_assert_eq!(gap.range, LsnRange { start: pair[0].end, end: pair[1].start });
                prop_assert!(!gap.segments.is_empty());
            }
        }
    }

    #[test]
    fn stores_together_hold_what_each_does((mut one, _) in any_archive(), (two, _) in any_archive()) {
        let before = one.clone();
        one.add_all(&two);
        prop_assert!(before.without(&one).is_empty() && two.without(&one).is_empty());
        for span in one.without(&before) {
            prop_assert!(span.names(small()).all(|name| two.holds(name.timeline(), name.number(small()).unwrap())));
        }
    }
}
