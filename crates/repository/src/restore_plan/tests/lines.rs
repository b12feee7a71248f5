//! Which timeline is followed, by what the archive tells of those that wrote.

use super::*;
use crate::adoption::{Adoption, Numbered};
use crate::coverage::forks::ForkFacts;

const FAILOVER: (u32, &str) = (2, "1\t0/980000\tx\n");

/// A store with WAL of several timelines, when each of them began, and what operators said.
#[derive(Default, Clone, Copy)]
struct Told<'a> {
    spans: &'a [(u32, u64, u64)],
    histories: &'a [(u32, &'a str)],
    commits: &'a [(u32, f64, &'a str)],
    begun: &'a [(u32, &'a str)],
    adopted: &'a [(u32, &'a str, &'a str)],
    /// The first commit behind each fork.
    apart: Option<&'a str>,
    /// Of the adoptions in this store; of db3 the next.
    number: u32,
    /// The timelines that their speakers knew.
    known: Option<&'a [u32]>,
    /// When parents sent their last segments, which hold no commit.
    sent: Option<&'a str>,
    /// Timelines whose servers recovered to a target.
    to_target: &'a [u32],
}

impl Told<'_> {
    fn held(&self, backups: &[RootBackup]) -> StoreView {
        self.held_by("repo1", backups)
    }

    fn held_by(&self, store: &str, backups: &[RootBackup]) -> StoreView {
        let mut wal = index(self.spans, self.histories, self.commits);
        let begun: BTreeMap<u32, &str> = self.begun.iter().copied().collect();
        let archived = wal.wal.get_or_insert_with(|| ArchivedWal::new(SegmentSize::MIN));
        let facts = archived.left_behind().into_iter().filter_map(|left| {
            let begun = at(begun.get(&left.timeline.get())?);
            let node = "db1".parse().unwrap();
            let sent = self.sent.map_or(begun, at);
            Some(ForkFacts {
                left,
                begun,
                to_target: self.to_target.contains(&left.timeline.get()),
                node,
                in_recovery: false,
                sent,
                last_commit: None,
                logical_end: None,
                apart_from: self.apart.map(at),
            })
        });
        let forks = facts.collect();
        let adopted = |(on, node, time): &(u32, &str, &str)| {
            let adoption = Adoption::new(node.parse().unwrap(), at(time), BTreeSet::new());
            let known = self.known.map(|known| known.iter().copied().map(timeline).collect());
            let number = self.number + u32::from(*node == "db3");
            (timeline(*on), Numbered { number, adoption: Adoption { known, ..adoption } })
        };
        let adoptions = self.adopted.iter().map(adopted).collect();
        let system = SystemView { wal, forks, adoptions };
        StoreView::Holds { store: name(store), backups: backups.to_vec(), systems: vec![(SYSTEM, system)] }
    }
}

fn early() -> RootBackup {
    backup(1, 1, 2.1, 2.9, "01:00:00")
}

/// What a plan follows, with its doubts; or why there is none.
fn followed(view: &StoreView, request: &Request) -> String {
    match planned(std::slice::from_ref(view), request) {
        Ok(plan) => {
            let timeline = match plan.timeline {
                TargetTimeline::Number(timeline) => timeline.to_string(),
                TargetTimeline::Current => "current".to_owned(),
                TargetTimeline::Latest => "latest".to_owned(),
            };
            let lines = plan.reasons[1..].iter().chain(&plan.warnings).map(|line| format!("\n  {line}"));
            format!("timeline {timeline} to {}{}", plan.wal.end, lines.collect::<String>())
        }
        Err(refusal) => format!("refused: {}\n  hint: {}", refusal.reason, refusal.hint),
    }
}

fn default_of(told: Told<'_>) -> String {
    followed(&told.held(&[early()]), &request(Target::Latest))
}

/// The old primary archived on, up to a time, and so did the new one.
fn both<'a>(commits: &'a [(u32, f64, &'a str)]) -> Told<'a> {
    let spans = &[(1, 2, 30), (2, 9, 12)];
    Told { spans, histories: &[FAILOVER], commits, begun: &[(2, "03:00:00")], ..Told::default() }
}

const ALIVE: &[(u32, f64, &str)] = &[(1, 31.0, "04:30:00"), (2, 13.0, "04:00:00")];

/// What the old primary wrote last went into the segment of the fork.
fn failed_over<'a>(commits: &'a [(u32, f64, &'a str)]) -> Told<'a> {
    Told { spans: &[(1, 2, 9), (2, 9, 12)], ..both(commits) }
}

const DEAD: &[(u32, f64, &str)] = &[(1, 10.0, "02:59:59"), (2, 13.0, "04:00:00")];

fn table(cases: &[(&str, String)]) -> String {
    cases.iter().map(|(case, text)| format!("{case}: {text}\n")).collect()
}

#[test]
fn the_line_that_goes_on_is_followed_and_of_several_none() {
    let plain = Told {
        spans: &[(1, 2, 8), (2, 9, 12)],
        histories: &[FAILOVER],
        commits: &[(1, 9.0, "02:59:00"), (2, 13.0, "04:00:00")],
        ..Told::default()
    };
    let behind = &[(1, 31.0, "01:30:00"), (2, 13.0, "04:00:00")];
    let chain = Told {
        spans: &[(1, 2, 9), (2, 9, 13), (3, 13, 20)],
        histories: &[FAILOVER, (3, "1\t0/980000\tx\n2\t0/D80000\tx\n")],
        commits: &[(1, 10.0, "02:59:59"), (2, 14.0, "03:29:00"), (3, 21.0, "04:00:00")],
        begun: &[(2, "03:00:00"), (3, "03:30:00")],
        ..Told::default()
    };
    let cases = [
        ("failover", default_of(plain)),
        ("failover that lost the end of a segment", default_of(failed_over(DEAD))),
        (
            "the same, of servers whose clocks are apart by seconds",
            default_of(failed_over(&[(1, 10.0, "03:00:04"), (2, 13.0, "04:00:00")])),
        ),
        (
            "an old primary that wrote no more than the end of a segment, later",
            default_of(failed_over(&[(1, 10.0, "03:05:00"), (2, 13.0, "04:00:00")])),
        ),
        ("failover that lost segments", default_of(both(&[(1, 31.0, "02:59:59"), (2, 13.0, "04:00:00")]))),
        ("both alive", default_of(both(ALIVE))),
        ("both alive, the old primary's clock far behind", default_of(both(behind))),
        ("both alive, the beginning unknown", default_of(Told { begun: &[], ..both(ALIVE) })),
        (
            "the old primary had been written the day before",
            default_of(both(&[(1, 31.0, "22T02:59:59"), (2, 13.0, "04:00:00")])),
        ),
        ("silent copy", default_of(both(&[(1, 31.0, "04:30:00")]))),
        ("silent copy, the primary's clock far behind", default_of(both(&[(1, 31.0, "01:30:00")]))),
        (
            "silent copy, its first segment has the parent's commit",
            default_of(both(&[(1, 31.0, "04:30:00"), (2, 10.0, "02:59:00")])),
        ),
        ("long transaction on the old primary", default_of(Told { sent: Some("04:30:00"), ..both(&ALIVE[1..]) })),
        (
            "long transactions on both",
            default_of(Told { spans: &[(1, 2, 40), (2, 9, 40)], sent: Some("04:30:00"), ..both(&[]) }),
        ),
        (
            "no commits on the old primary",
            default_of(Told { spans: &[(1, 2, 20), (2, 9, 12)], sent: Some("04:30:00"), ..both(&ALIVE[1..]) }),
        ),
        ("chain of three", default_of(chain)),
    ];
    insta::assert_snapshot!(table(&cases));
}

#[test]
fn a_third_line_takes_the_place_of_those_that_hold_nothing_beside_it() {
    let third = Told {
        spans: &[(1, 2, 18), (2, 9, 12), (3, 18, 25)],
        histories: &[FAILOVER, (3, "1\t0/1280000\tx\n")],
        begun: &[(2, "03:00:00"), (3, "04:00:00")],
        ..Told::default()
    };
    let ends = |one: &'static str, two: &'static str| [(1, 19.0, one), (2, 13.0, two), (3, 26.0, "04:30:00")];
    let dead_copy = ends("03:59:00", "03:10:00");
    let old_copy = ends("03:59:00", "21T03:10:00");
    let live_copy = ends("03:59:00", "04:20:00");
    let all_alive = [(1, 21.0, "04:40:00"), (2, 13.0, "04:20:00"), (3, 26.0, "04:30:00")];
    let alive = Told { spans: &[(1, 2, 20), (2, 9, 12), (3, 18, 25)], commits: &all_alive, ..third };
    let of_old_copy = Told { commits: &old_copy, begun: &[(2, "21T03:00:00"), (3, "04:00:00")], ..third };
    let cases = [
        (
            "a copy that wrote beside the origin before that failed over",
            default_of(Told { commits: &dead_copy, ..third }),
        ),
        ("a copy that had died two days before", default_of(of_old_copy)),
        ("a copy that goes on beside the next one", default_of(Told { commits: &live_copy, ..third })),
        ("three alive", default_of(alive)),
    ];
    insta::assert_snapshot!(table(&cases));
}

#[test]
fn what_was_given_up_for_a_target_is_no_line_of_its_own() {
    let given_up = |commits| Told { to_target: &[2], ..both(commits) };
    let second = Told {
        spans: &[(1, 2, 30), (2, 9, 12), (3, 18, 25)],
        histories: &[FAILOVER, (3, "1\t0/1280000\tx\n")],
        commits: &[(1, 31.0, "02:40:00"), (2, 13.0, "03:20:00"), (3, 26.0, "04:30:00")],
        begun: &[(2, "03:00:00"), (3, "03:30:00")],
        to_target: &[2, 3],
        ..Told::default()
    };
    let on_copy = backup(2, 2, 11.1, 11.9, "04:10:00");
    let of_copy = |told: Told<'_>| followed(&told.held(&[early(), on_copy.clone()]), &request(Target::Latest));
    let cases = [
        ("recovery to a point in time", default_of(given_up(&[(1, 31.0, "02:40:00"), (2, 13.0, "04:00:00")]))),
        ("the same, with a backup since", of_copy(given_up(&[(1, 31.0, "02:40:00"), (2, 13.0, "04:00:00")]))),
        ("a copy made so, while its origin went on", default_of(given_up(ALIVE))),
        ("a second one, from before the first", default_of(second)),
    ];
    insta::assert_snapshot!(table(&cases));
}

#[test]
fn an_adoption_settles_what_its_speaker_knew_of() {
    let adopted = |known, adopted| Told { known: Some(known), adopted, ..both(ALIVE) };
    let (old, new) = (&[(1, "db1", "04:00:00")][..], &[(1, "db1", "04:00:00"), (2, "db3", "04:10:00")][..]);
    // The clock of the first was a day ahead.
    let ahead = &[(1, "db1", "24T04:00:00")][..];
    let idle = Told { spans: &[(1, 2, 9), (2, 9, 12)], known: Some(&[1, 2]), adopted: old, ..both(&ALIVE[1..]) };
    let unwritten = Told { adopted: &[(2, "db3", "04:00:00")], known: Some(&[1, 2]), ..both(&ALIVE[..1]) };
    let third = Told {
        spans: &[(1, 2, 18), (2, 9, 12), (3, 18, 25)],
        histories: &[FAILOVER, (3, "1\t0/1280000\tx\n")],
        begun: &[(2, "03:00:00"), (3, "04:00:00")],
        commits: &[(1, 19.0, "03:59:00"), (2, 13.0, "04:20:00"), (3, 26.0, "04:30:00")],
        ..Told::default()
    };
    let inherited = Told { adopted: &[(1, "db1", "03:30:00")], known: Some(&[1, 2]), ..third };
    let of_the_left = Told { adopted: &[(2, "db3", "03:30:00")], known: Some(&[1, 2]), ..third };
    let unknowing = Told { adopted: &[(3, "db3", "04:30:00")], known: Some(&[1, 3]), ..third };
    let cases = [
        ("the old primary's node", default_of(adopted(&[1, 2], old))),
        ("the new one's after it", default_of(adopted(&[1, 2], new))),
        ("before they parted", default_of(adopted(&[1], old))),
        ("before they parted, by a clock that was ahead", default_of(adopted(&[1], ahead))),
        ("after they parted, by a clock that was behind", default_of(adopted(&[1, 2], &[(1, "db1", "01:00:00")]))),
        ("of a node that has written nothing since", default_of(idle)),
        ("of a copy that has written nothing yet", default_of(unwritten)),
        ("of a line that failed over since", default_of(inherited)),
        ("of the other line", default_of(of_the_left)),
        ("without knowing of a copy", default_of(unknowing)),
        ("by a version that does not tell", default_of(Told { adopted: old, ..both(ALIVE) })),
        ("by such a version, before", default_of(Told { adopted: &[(1, "db1", "02:00:00")], ..both(ALIVE) })),
    ];
    insta::assert_snapshot!(table(&cases));
}

#[test]
fn an_operator_may_say_which() {
    let view = both(ALIVE).held(&[early()]);
    let on = |choice| followed(&view, &Request { timeline: choice, ..request(Target::Latest) });
    assert!(on(TimelineChoice::Number(timeline(1))).starts_with("timeline 1 to 0/1F00000\n"));
    assert!(on(TimelineChoice::Number(timeline(2))).starts_with("timeline 2 to 0/D00000\n"));
    assert!(on(TimelineChoice::Current).starts_with("timeline current to 0/1F00000\n"));
    // Up to where they part the lines are one.
    let to = |position| followed(&view, &request(Target::Lsn(lsn(position))));
    assert!(to(9.5).starts_with("timeline 2 to 0/980000\n"), "{}", to(9.5));
    assert!(to(9.6).starts_with("refused: timelines 1, 2 were written side by side"), "{}", to(9.6));
    assert!(followed(&view, &request(Target::Immediate)).starts_with("timeline current"));
}

#[test]
fn a_time_before_the_parting_needs_no_choice() {
    let told = Told { apart: Some("03:01:00"), ..both(ALIVE) };
    let to = |told: Told<'_>, time| followed(&told.held(&[early()]), &request(Target::Time(at(time))));
    let before = to(told, "03:00:59");
    let expected = "timeline 1 to 0/1F00000\n  timelines 1, 2 hold the same up to 2026-11-23T03:00:59Z, and timeline 1 the most WAL";
    assert_eq!(before, expected);
    let gapped = Told { spans: &[(1, 2, 9), (1, 12, 30), (2, 9, 12)], ..told };
    assert!(to(gapped, "03:00:59").starts_with("timeline 2 to 0/D00000\n"), "{}", to(gapped, "03:00:59"));
    let after = to(told, "03:01:00");
    assert!(after.starts_with("refused: timelines 1, 2 were written side by side"), "{after}");
    assert!(after.contains("hint: before 2026-11-23T03:01:00Z they hold the same; --target-timeline N"), "{after}");
    let unknown = to(both(ALIVE), "03:00:59");
    assert!(unknown.contains("hint: --target-timeline N"), "{unknown}");
    let latest = followed(&told.held(&[early()]), &request(Target::Latest));
    assert!(latest.contains("hint: --target-timeline N"), "{latest}");
}

#[test]
fn of_two_stores_adoptions_the_higher_number_counts() {
    // The clock was set back between them.
    let first = Told { adopted: &[(1, "db1", "04:00:00")], number: 1, ..both(ALIVE) };
    let second = Told { adopted: &[(1, "db3", "03:50:00")], number: 2, ..both(ALIVE) };
    let views = [first.held_by("repo1", &[early()]), second.held_by("s3", &[early()])];
    for views in [views.clone(), [views[1].clone(), views[0].clone()]] {
        let plan = planned(&views, &request(Target::Latest)).unwrap();
        assert!(plan.reasons[1].starts_with("node db3 was adopted"), "{plan}");
    }
}

#[test]
fn a_backup_says_nothing_about_a_line_beside_its_own() {
    let late = |on, start, stopped| backup(2, on, start, start + 0.8, stopped);
    let newest = |told: Told<'_>, backups: &[RootBackup]| followed(&told.held(backups), &request(Target::Latest));
    let silent_since = both(&[(1, 31.0, "04:00:00"), (2, 13.0, "04:30:00")]);
    let long_silent = both(&[(1, 31.0, "22T03:00:00"), (2, 13.0, "04:30:00")]);
    let given_up = Told { to_target: &[2], ..both(&[(1, 31.0, "02:40:00"), (2, 13.0, "04:00:00")]) };
    let adopted = Told { adopted: &[(1, "db1", "04:00:00")], known: Some(&[1, 2]), ..both(ALIVE) };
    // Commits of a second before the promotion; of half a minute after it, seen less than clocks may be apart before the backup.
    let dead = Told { spans: &[(1, 2, 12), (2, 9, 12)], ..both(&[(1, 10.0, "02:59:59"), (2, 13.0, "04:00:58")]) };
    let beside = both(&[(1, 31.0, "03:00:30"), (2, 13.0, "04:00:58")]);
    let idle = both(&[(1, 31.0, "02:59:59")]);
    let idle_primary = RootBackup { from_standby: false, ..late(1, 12.1, "04:01:00") };
    let cases = [
        ("backup of the copy, the primary goes on", newest(both(ALIVE), &[early(), late(2, 11.1, "03:30:00")])),
        ("backup of the copy, the primary went silent", newest(silent_since, &[early(), late(2, 11.1, "04:10:00")])),
        ("the same, a day before", newest(long_silent, &[early(), late(2, 11.1, "04:10:00")])),
        ("backup of what was given up", newest(given_up, &[early(), late(1, 12.1, "02:30:00")])),
        ("backup of the copy, the primary adopted", newest(adopted, &[early(), late(2, 11.1, "03:30:00")])),
        ("backup of a standby that follows the dead line", newest(dead, &[early(), late(1, 12.1, "04:01:00")])),
        ("the same, with no other backup", newest(dead, &[late(1, 12.1, "04:01:00")])),
        (
            "backup of a standby that follows the dead line, which lived for a while",
            newest(beside, &[early(), late(1, 12.1, "04:01:00")]),
        ),
        ("backup of an idle primary with a copy beside it", newest(idle, &[early(), idle_primary])),
    ];
    let text: String = cases.iter().map(|(case, text)| format!("{case}: {text}\n")).collect();
    insta::assert_snapshot!(text);
    // Whoever names the backup has chosen, and is told what that means.
    let left = late(1, 12.1, "04:01:00");
    let named = Request { backup: Some(left.backup), ..request(Target::Latest) };
    let of_left = followed(&dead.held(&[early(), left]), &named);
    assert!(of_left.starts_with("timeline 1 to 0/D00000\n") && of_left.contains("had left at 0/980000"), "{of_left}");
    let copy = late(2, 11.1, "03:30:00");
    let named = Request { backup: Some(copy.backup), ..request(Target::Latest) };
    assert!(followed(&both(ALIVE).held(&[early(), copy]), &named).starts_with("timeline 2 to 0/D00000\n"));
}

#[test]
fn a_standby_is_not_led_to_another_line() {
    let standby = Request { role: Role::Standby, ..request(Target::Latest) };
    let followed = |told: Told<'_>| followed(&told.held(&[early()]), &standby);
    let failover = followed(failed_over(DEAD));
    assert!(failover.starts_with("timeline latest to 0/D00000\n"), "{failover}");
    let copy = followed(both(&[(1, 31.0, "04:30:00")]));
    assert!(copy.starts_with("timeline 1 to 0/1F00000\n"), "{copy}");
    assert!(copy.contains("the standby stays on timeline 1"), "{copy}");
    assert!(followed(both(ALIVE)).starts_with("refused: "));
}

#[test]
fn a_clock_that_is_behind_hides_no_commit_that_a_backup_holds() {
    let backups = [backup(1, 1, 2.1, 2.9, "01:00:00"), backup(2, 1, 5.1, 5.9, "02:00:00")];
    let commits = [(1, 5.0, "02:00:30"), (1, 9.0, "03:00:00")];
    let view = [holds("repo1", &backups, index(&[(1, 2, 8)], &[], &commits))];
    let from = |time: &str| planned(&view, &request(Target::Time(at(time)))).unwrap().backup.backup;
    assert_eq!(from("02:00:29"), backups[0].backup);
    assert_eq!(from("02:00:30"), backups[1].backup);
    let named = Request { backup: Some(backups[1].backup), ..request(Target::Time(at("02:00:20"))) };
    assert!(refused(&view, &named).contains("when a transaction ended that backup"));
    // The newest commit lies in the segment in which the backup ends, and the standby had replayed it.
    let standby = RootBackup { last_commit_time: Some(at("02:00:40")), ..backups[1].clone() };
    let view = [holds("repo1", &[backups[0].clone(), standby.clone()], index(&[(1, 2, 8)], &[], &commits))];
    let from = |time: &str| planned(&view, &request(Target::Time(at(time)))).unwrap().backup.backup;
    assert_eq!((from("02:00:39"), from("02:00:40")), (backups[0].backup, standby.backup));
}
