//! History files: a live one, texts with every oddity, and ancestry as properties.

use proptest::prelude::*;

use super::*;
use crate::samples;

fn timeline(number: u32) -> Timeline {
    Timeline::new(number).unwrap()
}

#[track_caller]
fn check(own: u32, file: &str, expected: Result<&[(u32, u64)], HistoryError>) {
    let got = TimelineHistory::parse(timeline(own), file.as_bytes());
    let got = got.map(|history| {
        history.entries().iter().map(|entry| (entry.timeline.get(), entry.end.as_u64())).collect::<Vec<_>>()
    });
    assert_eq!(got, expected.map(<[_]>::to_vec), "{file:?}");
}

#[test]
fn live_sample() {
    let history = TimelineHistory::parse(timeline(2), &samples::named("15-00000002.history")).unwrap();
    assert_eq!(history.entries().len(), 1);
    assert_eq!(history.parent().unwrap().timeline, Timeline::FIRST);
}

#[test]
fn texts() {
    let own = timeline(9);
    check(9, "", Ok(&[]));
    check(9, "1\t0/10\tno recovery target specified\n", Ok(&[(1, 16)]));
    check(9, "1\t0/10\tbefore 2000-01-01\n\n\n2\t0/00000020\tx\n", Ok(&[(1, 16), (2, 32)]));
    check(9, "# made by hand\n1 0/10\r\n", Ok(&[(1, 16)]));
    check(9, "1\t0/10\tat restore point \"a\nb\"\n2\t0/20\t\n", Ok(&[(1, 16), (2, 32)]));
    check(9, "1\t0/10\treason\n2\t0/10\treason", Ok(&[(1, 16), (2, 16)]));
    check(9, "nonsense\n", Err(HistoryError::Line { timeline: own, line: 1 }));
    check(9, "1\t0/10\tx\n2\tnonsense\n", Err(HistoryError::Line { timeline: own, line: 2 }));
    check(9, "0x1\t0/10\n", Err(HistoryError::Line { timeline: own, line: 1 }));
    check(9, "0\t0/10\n", Err(HistoryError::Line { timeline: own, line: 1 }));
    check(9, "1\n", Err(HistoryError::Line { timeline: own, line: 1 }));
    check(9, "2\t0/10\n1\t0/20\n", Err(HistoryError::Order { timeline: own, line: 2, found: timeline(1) }));
    check(9, "2\t0/10\n2\t0/20\n", Err(HistoryError::Order { timeline: own, line: 2, found: timeline(2) }));
    check(9, "9\t0/10\n", Err(HistoryError::Order { timeline: own, line: 1, found: own }));
    check(9, "1\t0/20\n2\t0/10\n", Err(HistoryError::End { timeline: own, line: 2, end: Lsn::new(16) }));
    let long = vec![b'#'; MAX_BYTES + 1];
    assert!(matches!(TimelineHistory::parse(own, &long), Err(HistoryError::TooLong { .. })));
}

#[test]
fn ancestry() {
    let history = TimelineHistory::parse(timeline(5), b"1\t0/100\n3\t0/200\n").unwrap();
    let lsn = Lsn::new;
    for (number, position, expected) in [
        (1, 0, true),
        (1, 0x100, true),
        (1, 0x101, false),
        (3, 0xFF, false),
        (3, 0x100, true),
        (3, 0x200, true),
        (3, 0x201, false),
        (5, 0x1FF, false),
        (5, 0x200, true),
        (5, u64::MAX, true),
        (2, 0x150, false),
        (6, 0x300, false),
    ] {
        assert_eq!(history.contains(timeline(number), lsn(position)), expected, "{number} {position:x}");
    }
    assert_eq!(history.end_of(timeline(3)), Some(lsn(0x200)));
    assert_eq!((history.end_of(timeline(5)), history.end_of(timeline(2))), (None, None));
    assert_eq!((history.begin_of(timeline(1)), history.begin_of(timeline(5))), (Some(Lsn::ZERO), Some(lsn(0x200))));
    for (position, expected) in [(0, 1), (0xFF, 1), (0x100, 3), (0x1FF, 3), (0x200, 5), (u64::MAX, 5)] {
        assert_eq!(history.timeline_at(lsn(position)), timeline(expected), "{position:x}");
    }
    let root = TimelineHistory::root(Timeline::FIRST);
    assert!(root.contains(Timeline::FIRST, lsn(7)) && !root.contains(timeline(2), lsn(7)));
    assert_eq!(root.timeline_at(lsn(7)), Timeline::FIRST);
}

fn any_history() -> impl Strategy<Value = TimelineHistory> {
    (proptest::collection::btree_set(1u32..1000, 0..20), proptest::collection::vec(any::<u64>(), 20)).prop_map(
        |(ancestors, mut ends)| {
            ends.sort_unstable();
            let entries = ancestors
                .into_iter()
                .zip(ends)
                .map(|(ancestor, end)| Ended { timeline: timeline(ancestor), end: Lsn::new(end) });
            TimelineHistory { timeline: timeline(1000), entries: entries.collect() }
        },
    )
}

proptest! {
    #[test]
    fn files_round_trip(history in any_history()) {
        prop_assert_eq!(TimelineHistory::parse(history.timeline(), &history.format()), Ok(history));
    }

    #[test]
    fn every_position_is_on_one_timeline_of_the_history(history in any_history(), position: u64) {
        let lsn = Lsn::new(position);
        let at = history.timeline_at(lsn);
        prop_assert!(history.contains(at, lsn));
        prop_assert!(history.begin_of(at).unwrap() <= lsn);
        prop_assert!(history.end_of(at).is_none_or(|end| lsn < end));
    }

    #[test]
    fn any_bytes_are_answered(file in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = TimelineHistory::parse(timeline(7), &file);
    }
}

#[test]
fn a_history_tells_whether_its_server_recovered_to_a_target() {
    let check = |file: &str, expected: bool| assert_eq!(names_target(file.as_bytes()), expected, "{file:?}");
    check("1\t0/1973C78\tno recovery target specified\n", false);
    check("1\t0/3000000\tbefore 2026-11-23 04:13:15+00\n\n", true);
    check("1\t0/3000000\tafter LSN 0/2FFFFD8\n", true);
    check("1\t0/3000000\tat restore point \"before the upgrade\"\n", true);
    check("1\t0/3000000\treached consistency\n", true);
    // The last one counts.
    check("1\t0/3000000\tbefore 2026-11-23 04:13:15+00\n\n2\t0/4000000\tno recovery target specified\n", false);
    check("1\t0/3000000\n", false);
    check("", false);
}
