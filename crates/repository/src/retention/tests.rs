//! Plans for made-up stores: what stays, what goes, and the reasons given.

use std::time::Duration;

use jiff::civil::date;
use jiff::tz::TimeZone;
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, Timeline};

use super::*;
use crate::coverage::SegmentSpan;
use crate::root::{Hold, Pin, PinnedWal, RootBackup, System};

const SYSTEM: SystemIdentifier = SystemIdentifier::new(7_300_000_000_000_000_001);
const MIB: u64 = 1 << 20;
const DAY: Duration = Duration::from_secs(86_400);

fn size() -> SegmentSize {
    SegmentSize::from_bytes(MIB).unwrap()
}

/// Noon of a day counted from 2026-11-01 as 1.
fn noon(day: i16) -> Timestamp {
    let first = date(2026, 10, 31).at(12, 0, 0, 0).to_zoned(TimeZone::UTC).unwrap().timestamp();
    first + jiff::SignedDuration::from_hours(24 * i64::from(day))
}

/// A backup taken at noon of a day. Each day has 10 segments of WAL; it starts in the day's first and ends in the third.
fn of_day(day: i16) -> RootBackup {
    on(day, 1, 10.0 * f64::from(day))
}

fn on(day: i16, timeline: u32, start_mib: f64) -> RootBackup {
    let lsn = |mib: f64| Lsn::new((mib * MIB as f64) as u64);
    let text = format!(
        r#"{{"backup":"{}","type":"{}","manifest_sha256":"{}","manifest_size":1000,"system_identifier":"{SYSTEM}",
        "postgres_major":15,"segment_size_bytes":{MIB},"start_timeline":{timeline},"start_lsn":"{}","start_time":"{at}",
        "stop_timeline":{timeline},"stop_lsn":"{}","stop_time":"{at}","min_recovery_point":null,"node":"db1",
        "from_standby":false,"label":"","files":1,"data_bytes":1,"stored_bytes":1,"packs":1,"page_errors":0}}"#,
        BackupId::new(noon(day), day.unsigned_abs().into()),
        if day % 7 == 1 { "full" } else { "incr" },
        "07".repeat(32),
        lsn(start_mib + 0.25),
        lsn(start_mib + 2.5),
        at = noon(day),
    );
    RootBackup::from_json(&text).unwrap()
}

fn id(day: i16) -> BackupId {
    of_day(day).backup
}

fn root(backups: impl IntoIterator<Item = RootBackup>, now: Timestamp) -> Root {
    let mut root = Root::empty("main".parse().unwrap(), "coordinator".parse().unwrap(), now);
    root = root.with_system(System::new(SYSTEM, Some(15), Some(MIB), now)).unwrap();
    backups.into_iter().fold(root, |root, backup| root.with_backup(backup).unwrap())
}

fn archive(spans: &[(u32, u64, u64)], histories: &[(u32, &str)]) -> ArchivedWal {
    let mut wal = ArchivedWal::new(size());
    for (timeline, first, last) in spans {
        let (first, last) = (SegmentNumber::new(*first), SegmentNumber::new(*last));
        wal.add_span(SegmentSpan { timeline: Timeline::new(*timeline).unwrap(), first, last });
    }
    for (timeline, text) in histories {
        let timeline = Timeline::new(*timeline).unwrap();
        wal.add_history(timeline, TimelineHistory::parse(timeline, text.as_bytes()).unwrap());
    }
    wal
}

/// What is known of a store: all references, none of them to others, and no leftovers.
fn facts(root: &Root, wal: ArchivedWal) -> Facts<'_> {
    static STORE: std::sync::LazyLock<StoreName> = std::sync::LazyLock::new(|| "repo1".parse().unwrap());
    Facts {
        store: &STORE,
        root,
        wal: BTreeMap::from([(SYSTEM, wal)]),
        last_commit: None,
        references: root.backups.iter().map(|backup| (backup.backup, References::new())).collect(),
        leftovers: BTreeSet::new(),
        running: BTreeSet::new(),
        held_back: None,
    }
}

/// The days whose backups a plan keeps, newest first.
fn kept(plan: &Plan) -> Vec<u32> {
    let kept = plan.backups.iter().filter(|line| line.verdict == Verdict::Keep);
    kept.map(|line| line.backup.to_string()[18..].to_owned())
        .map(|day| u32::from_str_radix(&day, 16).unwrap())
        .collect()
}

fn reasons(plan: &Plan, day: i16) -> String {
    plan.backups.iter().find(|line| line.backup == id(day)).unwrap().reasons.join("; ")
}

/// Days 1 to 21 with all their WAL, planned on the last of them.
fn three_weeks(policy: Policy) -> Plan {
    let root = root((1..=21).map(of_day), noon(21));
    plan(&facts(&root, archive(&[(1, 10, 220)], &[])), &policy, noon(21))
}

fn policy() -> Policy {
    Policy::default()
}

#[test]
fn rules_choose_and_any_of_them_is_enough() {
    let check =
        |policy: Policy, expected: &[u32]| assert_eq!(kept(&three_weeks(policy.clone())), expected, "{policy:?}");
    let all: Vec<u32> = (1..=21).rev().collect();
    check(policy(), &all);
    check(Policy { any: Some(3), ..policy() }, &[21, 20, 19]);
    check(Policy { any: Some(0), ..policy() }, &[21]);
    check(Policy { any: Some(100), ..policy() }, &all);
    // Days 1, 8 and 15 have full ones.
    check(Policy { full: Some(2), ..policy() }, &all[..14]);
    check(Policy { full: Some(1), any: Some(2), ..policy() }, &all[..7]);
    check(Policy { full: Some(4), ..policy() }, &all);
    check(Policy { age: Some(2 * DAY), ..policy() }, &[21, 20, 19]);
    check(Policy { age: Some(Duration::from_secs(1)), ..policy() }, &[21]);
    // 2026-11-01 is a Sunday.
    check(Policy { weekly: 3, ..policy() }, &[21, 15, 8]);
    check(Policy { weekly: 9, ..policy() }, &[21, 15, 8, 1]);
    check(Policy { daily: 2, monthly: 2, yearly: 1, ..policy() }, &[21, 20]);
    check(Policy { window: Some(3 * DAY), ..policy() }, &[21, 20, 19, 18]);
    // Beside other rules the window keeps what it needs: the backup it begins with.
    check(Policy { window: Some(3 * DAY), any: Some(1), ..policy() }, &[21, 18]);
    check(Policy { window: Some(100 * DAY), any: Some(1), ..policy() }, &[21, 1]);
}

#[test]
fn days_begin_in_the_policy_s_zone() {
    let at = |day: i16, hours: i64| {
        let stop_time = noon(day) + jiff::SignedDuration::from_hours(hours);
        RootBackup { stop_time, ..of_day(day) }
    };
    // 22:30 and 23:30 on the 3rd in UTC; the second is on the 4th in Vienna.
    let root = root([at(2, 0), at(3, 10), RootBackup { backup: id(4), ..at(3, 11) }], noon(4));
    let days = |zone: &str| {
        let policy = Policy { daily: 2, zone: TimeZone::get(zone).unwrap(), ..policy() };
        kept(&plan(&facts(&root, archive(&[(1, 10, 220)], &[])), &policy, noon(4)))
    };
    assert_eq!((days("UTC"), days("Europe/Vienna")), (vec![4, 2], vec![4, 3]));
}

#[test]
fn what_cannot_be_restored_does_not_count() {
    let root = root((1..=6).map(of_day), noon(6));
    let judge = |wal: ArchivedWal, any| plan(&facts(&root, wal), &Policy { any: Some(any), ..policy() }, noon(6));
    // Day 5 lacks its second segment.
    let plan = judge(archive(&[(1, 10, 50), (1, 52, 70)], &[]), 2);
    assert_eq!(kept(&plan), [6, 5, 4]);
    assert_eq!(
        reasons(&plan, 5),
        "000000010000000000000033 is missing, without which it cannot be restored; it is kept as long as older ones are"
    );
    // The newest has no WAL yet.
    let plan = judge(archive(&[(1, 10, 59)], &[]), 1);
    assert_eq!((kept(&plan), reasons(&plan, 5).contains("newest that can be restored")), (vec![6, 5], true));
    // None has any.
    let plan = judge(archive(&[(1, 80, 90)], &[]), 1);
    assert_eq!(kept(&plan), [6, 5, 4, 3, 2, 1]);
    assert!(plan.frozen.unwrap().contains("no backup in this store can be restored") && plan.wal.is_empty());
}

#[test]
fn the_window_needs_a_backup_behind_every_gap() {
    let root = root((1..=9).map(of_day), noon(9));
    let policy = Policy { window: Some(5 * DAY), any: Some(1), ..policy() };
    let plan = plan(&facts(&root, archive(&[(1, 10, 64), (1, 66, 100)], &[])), &policy, noon(9));
    assert_eq!(kept(&plan), [9, 7, 4]);
    assert!(reasons(&plan, 4).contains("begins with it") && reasons(&plan, 7).contains("no WAL without a gap leads"));
    let [line] = plan.wal.as_slice() else { panic!("{:?}", plan.wal) };
    assert_eq!((line.kept.from.to_string().as_str(), line.removed_segments), ("000000010000000000000028", 30));
}

#[test]
fn older_backups_keep_what_makes_them_consistent() {
    let policy = Policy { window: Some(2 * DAY), weekly: 3, ..policy() };
    let plan = three_weeks(policy.clone());
    assert_eq!(kept(&plan), [21, 19, 15, 8]);
    let [line] = plan.wal.as_slice() else { panic!("{:?}", plan.wal) };
    let name = |number: u64| SegmentName::new(Timeline::FIRST, SegmentNumber::new(number), size());
    assert_eq!(line.kept.from, name(190));
    let also: Vec<_> = line.kept.also.iter().map(|span| (span.first, span.last)).collect();
    assert_eq!(also, [(name(80), name(82)), (name(150), name(152))]);
    assert_eq!(line.removed_segments, 180 - 6);
    // Without a window it is kept from the oldest on.
    let plan = three_weeks(Policy { window: None, ..policy });
    assert_eq!((plan.wal[0].kept.from, plan.wal[0].kept.also.len()), (name(80), 0));
}

#[test]
fn nothing_is_taken_from_holds_and_from_what_is_under_way() {
    let mut root = root((1..=6).map(of_day), noon(6));
    let hold = |day: i16, until: Option<Timestamp>| Hold {
        until,
        ..Hold::new(id(day), "audit".to_owned(), "ann".to_owned(), noon(1))
    };
    root = root.with_hold(hold(1, None)).unwrap().with_hold(hold(2, Some(noon(7)))).unwrap();
    root = root.with_hold(hold(4, Some(noon(5)))).unwrap();
    let pin = |random: u32, parent| Pin::new(BackupId::new(noon(6), random), parent, "db1".parse().unwrap(), noon(6));
    root = root.with_pin(pin(100, Some(id(3)))).unwrap();
    let only_newest = Policy { any: Some(1), ..policy() };
    let of_root = |root: &Root| plan(&facts(root, archive(&[(1, 10, 70)], &[])), &only_newest, noon(6));
    let plan = of_root(&root);
    assert_eq!(kept(&plan), [6, 3, 2, 1]);
    assert_eq!(reasons(&plan, 1), "ann holds it: audit");
    assert!(reasons(&plan, 3).contains("which is under way, builds on it"));
    // A copy needs old WAL that nothing here needs otherwise.
    let root = root.without_hold(&id(1)).without_hold(&id(2));
    let wal = Some(PinnedWal { system_identifier: SYSTEM, timeline: Timeline::FIRST, start_lsn: Lsn::new(12 * MIB) });
    let copying = root.with_pin(Pin { wal, ..pin(101, None) }).unwrap();
    assert_eq!(of_root(&copying).wal[0].kept.from.to_string(), "00000001000000000000000C");
    assert_eq!(of_root(&root).wal[0].kept.from.to_string(), "00000001000000000000001E");
}

#[test]
fn what_is_restored_stays_with_all_wal_from_it_on_until_its_hold_runs_out() {
    let hour = |hour: i64| noon(6) + jiff::SignedDuration::from_hours(hour);
    let before = root((1..=6).map(of_day), noon(6));
    let held = before.with_restore(id(2), "root on db9", hour(0)).unwrap();
    let policy = Policy { any: Some(1), window: Some(DAY / 2), ..policy() };
    let at = |last_commit| {
        let facts = Facts { last_commit: Some(last_commit), ..facts(&held, archive(&[(1, 10, 70)], &[])) };
        plan(&facts, &policy, last_commit)
    };
    let plan = at(hour(23));
    assert_eq!((kept(&plan), plan.wal[0].kept.from.to_string()), (vec![6, 2], "000000010000000000000014".to_owned()));
    assert_eq!(reasons(&plan, 2), format!("root on db9 holds it until {}: restore", hour(24)));
    let over = at(hour(24));
    assert_eq!((kept(&over), over.wal[0].kept.from.to_string()), (vec![6], "00000001000000000000003C".to_owned()));
}

#[test]
fn a_clock_that_cannot_be_believed_removes_nothing() {
    let root = root((1..=9).map(of_day), noon(9));
    let wal = || archive(&[(1, 10, 100)], &[]);
    let policy = Policy { age: Some(4 * DAY), ..policy() };
    let at = |root: &Root, now| plan(&facts(root, wal()), &policy, now);
    let minutes = |minutes: i64| noon(9) + jiff::SignedDuration::from_mins(minutes);
    let sound = kept(&at(&root, noon(9)));
    assert_eq!(sound, [9, 8, 7, 6, 5]);
    assert_eq!(kept(&at(&root, minutes(-4))), sound);
    let behind = at(&root, minutes(-6));
    assert!(behind.frozen.unwrap().contains("a clock is wrong") && behind.condemned.is_empty());
    // A day ahead nothing ages: no server was heard of since.
    assert_eq!(kept(&at(&root, minutes(24 * 60))), sound);
    let ahead = at(&root, minutes(37 * 60));
    assert!(ahead.frozen.as_ref().unwrap().contains("more than 36 h after the newest commit"), "{ahead:?}");
    assert_eq!((kept(&ahead).len(), ahead.wal.len()), (9, 0));
    assert!(reasons(&ahead, 1).contains("more than 36 h"));
    // A writer whose clock is ahead commits with it: the servers' clocks count.
    let misled = Root { written: noon(12), ..root.clone() };
    let misled = at(&misled, noon(12));
    assert_eq!((kept(&misled), misled.as_of, misled.frozen), (sound, noon(9), None));
    // Commits in the WAL are signs too.
    let heard = Facts { last_commit: Some(noon(10)), ..facts(&root, wal()) };
    assert_eq!(kept(&plan(&heard, &policy, noon(10))), [9, 8, 7, 6]);
}

#[test]
fn what_a_backup_under_way_may_build_on_stays() {
    let root = root((6..=10).map(of_day), noon(10));
    let under_way = BackupId::new(noon(10), 100);
    let judge = |root: &Root, running: &[BackupId]| {
        let facts = Facts { running: running.iter().copied().collect(), ..facts(root, archive(&[(1, 10, 120)], &[])) };
        plan(&facts, &Policy { any: Some(1), ..policy() }, noon(10))
    };
    // Day 8 has the newest full one.
    for (root, running) in [
        (&root, vec![under_way]),
        (&root.with_pin(Pin::new(under_way, None, "db1".parse().unwrap(), noon(10))).unwrap(), vec![]),
    ] {
        let planned = judge(root, &running);
        assert_eq!(kept(&planned), [10, 8]);
        assert_eq!(reasons(&planned, 8), format!("{under_way}, which is under way, may build on it"));
    }
    // Once it is known what it builds on, that is all.
    let pinned = root.with_pin(Pin::new(under_way, Some(id(9)), "db1".parse().unwrap(), noon(10))).unwrap();
    assert_eq!(kept(&judge(&pinned, &[under_way])), [10, 9]);
    assert_eq!(kept(&judge(&root, &[])), [10]);
}

#[test]
fn a_caller_that_knows_more_holds_everything_back() {
    let root = root((1..=3).map(of_day), noon(3));
    let held_back = Some("another store has more".to_owned());
    let facts = Facts { held_back, ..facts(&root, archive(&[(1, 10, 40)], &[])) };
    let planned = plan(&facts, &Policy { any: Some(1), ..policy() }, noon(3));
    assert_eq!((kept(&planned).len(), planned.frozen.as_deref()), (3, Some("another store has more")));
    assert!(planned.retired().is_empty() && !planned.takes_anything(&root));
}

#[test]
fn a_digest_stands_for_what_is_taken_away_from_one_root() {
    let root = root((1..=6).map(of_day), noon(6));
    let wal = || archive(&[(1, 10, 70)], &[]);
    let of = |root: &Root, any, now| plan(&facts(root, wal()), &Policy { any: Some(any), ..policy() }, now);
    let later = noon(6) + jiff::SignedDuration::from_mins(5);
    let name = |plan: &Plan| digest([plan]);
    assert_eq!(name(&of(&root, 2, noon(6))), name(&of(&root, 2, later)));
    assert_ne!(name(&of(&root, 2, noon(6))), name(&of(&root, 3, noon(6))));
    let moved = Root { nonce: Uuid::max(), ..root.clone() };
    assert_ne!(name(&of(&root, 2, noon(6))), name(&of(&moved, 2, noon(6))));
    assert_ne!(digest([]), name(&of(&root, 2, noon(6))));
}

#[test]
fn packs_go_when_nobody_refers_to_them() {
    let pin = |backup: BackupId| Pin::new(backup, Some(id(9)), "db1".parse().unwrap(), noon(9));
    let root = root([1, 8, 9].map(of_day), noon(9)).with_pin(pin(BackupId::new(noon(9), 77)));
    let root = root.unwrap().with_pin(pin(BackupId::new(noon(8), 9)));
    let root = root.unwrap().without_pin(&BackupId::new(noon(2), 1));
    let mut facts = facts(&root, archive(&[(1, 10, 100)], &[]));
    let range = |first, last| PackRange { first, last };
    facts.references.get_mut(&id(9)).unwrap().insert(id(1), vec![range(2, 3), range(7, 7)]);
    facts.references.get_mut(&id(8)).unwrap().insert(id(1), vec![range(0, 0)]);
    facts.references.get_mut(&id(9)).unwrap().insert(id(4), vec![range(1, 1)]);
    let (dead, young) = (BackupId::new(noon(6), 5), BackupId::new(noon(8), 6));
    facts.leftovers = BTreeSet::from([dead, young, id(4), BackupId::new(noon(9), 77), BackupId::new(noon(8), 9)]);
    facts.running.insert(BackupId::new(noon(8), 9));
    let policy = Policy { any: Some(1), ..policy() };
    let planned = plan(&facts, &policy, noon(9));
    assert_eq!(kept(&planned), [9]);
    let condemned = |backup, packs: Option<&[(u32, u32)]>| CondemnedBackup {
        backup,
        packs: packs.map(|packs| packs.iter().copied().map(PackRange::from).collect()),
    };
    // Day 8 goes, so its reference to day 1 does not count.
    let expected = [
        condemned(id(1), Some(&[(0, 1), (4, 6), (8, u32::MAX)])),
        condemned(id(4), Some(&[(0, 0), (2, u32::MAX)])),
        condemned(dead, None),
        condemned(id(8), None),
    ];
    assert_eq!(planned.condemned, expected);
    let after = root.with_retired(&planned.retired()).unwrap();
    assert_eq!((after.backups.len(), after.is_gone(&id(1)), after.is_gone(&young)), (1, true, false));
    insta::assert_snapshot!(render(&planned));
    facts.references.remove(&id(9));
    let planned = plan(&facts, &policy, noon(9));
    assert!(planned.condemned.is_empty() && planned.packs_kept.unwrap().contains("refers to"));
    assert_eq!(planned.backups.iter().filter(|line| line.verdict == Verdict::Remove).count(), 2);
}

#[test]
fn each_timeline_keeps_what_can_be_recovered_along_it() {
    // Timeline 2 went on from 35 MiB; timeline 1 lived on until 60. Timeline 3 left 1 at 15 and was given up.
    let histories = [(2, "1\t0/2300000\tx\n"), (3, "1\t0/F00000\tx\n")];
    let wal = archive(&[(1, 10, 60), (2, 35, 90), (3, 15, 30)], &histories);
    let from = |backups: Vec<RootBackup>, any| {
        let root = root(backups, noon(9));
        let planned = plan(&facts(&root, wal.clone()), &Policy { any: Some(any), ..policy() }, noon(9));
        let froms = planned.wal.iter().map(|line| (line.kept.timeline().get(), line.kept.from.segment()));
        froms.collect::<Vec<_>>()
    };
    let line =
        |days: &[(i16, u32, f64)]| days.iter().map(|(day, tli, start)| on(*day, *tli, *start)).collect::<Vec<_>>();
    // The parent is needed from the backup on, and 2, which descends from there, has nothing before that.
    assert_eq!(from(line(&[(1, 1, 12.0), (2, 1, 20.0)]), 1), [(1, 20), (3, 20)]);
    // Only the child has a backup that stays: the parent ends before it.
    assert_eq!(from(line(&[(1, 1, 12.0), (6, 2, 50.0)]), 1), [(1, 50), (2, 50), (3, 50)]);
    // Both live on, each from its own backup.
    assert_eq!(from(line(&[(5, 1, 55.0), (6, 2, 40.0)]), 2), [(1, 55), (2, 40), (3, 40)]);
}

#[test]
fn wal_of_a_system_without_backups_is_kept_until_another_one_took_over() {
    const OLD: SystemIdentifier = SystemIdentifier::new(6);
    let mut root = Root::empty("main".parse().unwrap(), "coordinator".parse().unwrap(), noon(5));
    root = root.with_system(System::new(OLD, Some(14), Some(MIB), noon(1))).unwrap();
    let policy = Policy { any: Some(1), ..policy() };
    let of_root = |root: &Root| {
        let mut facts = facts(root, archive(&[(1, 10, 70)], &[]));
        facts.wal.insert(OLD, archive(&[(1, 1, 5)], &[]));
        plan(&facts, &policy, noon(5)).wal
    };
    assert_eq!(of_root(&root), []);
    root = root.with_system(System::new(SYSTEM, Some(15), Some(MIB), noon(5))).unwrap();
    assert_eq!(of_root(&root), []);
    root = root.with_backup(of_day(5)).unwrap();
    let lines = of_root(&root);
    assert_eq!((lines.len(), lines[0].system_identifier, lines[0].removed_segments), (2, OLD, 5));
    let pinned = root.with_pin(Pin::new(BackupId::new(noon(5), 9), None, "db1".parse().unwrap(), noon(5))).unwrap();
    assert_eq!(of_root(&pinned).len(), 1);
}

#[test]
fn what_was_done_is_not_done_again() {
    let root = root((1..=6).map(of_day), noon(6));
    let policy = Policy { any: Some(2), ..policy() };
    let wal = archive(&[(1, 10, 70)], &[]);
    let first = plan(&facts(&root, wal.clone()), &policy, noon(6));
    assert!(!first.changes_nothing(&root));
    let after = root.with_retired(&first.retired()).unwrap();
    let after = Root { generation: after.generation.next().unwrap(), ..after };
    // Not swept yet: packs are condemned again, WAL is as it was.
    let leftovers = first.removed().collect();
    let again = plan(&Facts { leftovers, ..facts(&after, wal) }, &policy, noon(6));
    assert!(again.changes_nothing(&after), "{again:?}");
    assert_eq!((again.wal[0].verdict, again.wal[0].removed_segments), (Verdict::Keep, 0));
    // Swept: nothing is left to condemn, which is worth a commit of its own no more than waiting is.
    let swept = plan(&facts(&after, archive(&[(1, 50, 70)], &[])), &policy, noon(6));
    assert_eq!((swept.condemned.len(), swept.removed().count()), (0, 0));
}
