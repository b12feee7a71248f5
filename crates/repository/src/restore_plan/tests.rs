//! Tests of restore plans: a table of requests and refusals, settings in their order, and properties.

mod forks;
mod lines;
mod transactions;
mod witnesses;

use std::collections::BTreeMap;

use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{SegmentNumber, SegmentSize, WalFileName};
use proptest::prelude::*;

use super::*;
use crate::coverage::{ArchivedWal, SegmentSpan};
use crate::wal_index::{CommitSample, WalConflict};

const MIB: u64 = 1 << 20;
const SYSTEM: SystemIdentifier = SystemIdentifier::new(7_300_000_000_000_000_001);

fn timeline(number: u32) -> Timeline {
    Timeline::new(number).unwrap()
}

fn lsn(mib: f64) -> Lsn {
    Lsn::new((mib * MIB as f64) as u64)
}

/// 2026-11-23 at this time of day, or another day before a `T`.
fn at(time: &str) -> Timestamp {
    let (day, time) = time.split_once('T').unwrap_or(("23", time));
    format!("2026-11-{day}T{time}Z").parse().unwrap()
}

fn name(store: &str) -> StoreName {
    store.parse().unwrap()
}

fn backup(random: u32, on: u32, start: f64, stop: f64, stopped: &str) -> RootBackup {
    RootBackup {
        backup: BackupId::new(at(stopped), random),
        backup_type: Default::default(),
        parent: None,
        changes: None,
        manifest_sha256: [7; 32],
        manifest_size: 1000,
        system_identifier: SYSTEM,
        postgres_major: 15,
        segment_size_bytes: MIB,
        start_timeline: timeline(on),
        start_lsn: lsn(start),
        start_time: at(stopped),
        stop_timeline: timeline(on),
        stop_lsn: lsn(stop),
        stop_time: at(stopped),
        min_recovery_point: None,
        start_next_xid: None,
        stop_next_xid: None,
        last_commit_time: None,
        node: "db2".parse().unwrap(),
        from_standby: true,
        primary: None,
        label: "nightly".to_owned(),
        files: 900,
        data_bytes: 30 << 20,
        stored_bytes: 9 << 20,
        inherited_bytes: 0,
        attempts: Vec::new(),
        packs: 1,
        page_errors: 0,
        wal_witnesses: Vec::new(),
        warnings: Vec::new(),
        unknown: BTreeMap::new(),
    }
}

fn index(spans: &[(u32, u64, u64)], histories: &[(u32, &str)], commits: &[(u32, f64, &str)]) -> WalIndex {
    let mut wal = ArchivedWal::new(SegmentSize::from_bytes(MIB).unwrap());
    for (number, first, last) in spans {
        let (first, last) = (SegmentNumber::new(*first), SegmentNumber::new(*last));
        wal.add_span(SegmentSpan { timeline: timeline(*number), first, last });
    }
    let mut parsed = BTreeMap::new();
    for (child, text) in histories {
        let history = TimelineHistory::parse(timeline(*child), text.as_bytes()).unwrap();
        wal.add_history(timeline(*child), history.clone());
        parsed.insert(timeline(*child), history);
    }
    let sample = |(number, before, time): &(u32, f64, &str)| CommitSample {
        timeline: timeline(*number),
        before: lsn(*before),
        time: at(time),
    };
    WalIndex {
        store: name("repo1"),
        wal: Some(wal),
        histories: parsed,
        conflicts: Vec::new(),
        incomplete: Vec::new(),
        commits: commits.iter().map(sample).collect(),
        ends: BTreeMap::new(),
        logs: BTreeMap::new(),
        decided: BTreeSet::new(),
        objects: 0,
        bytes: 0,
        problems: Vec::new(),
        kept: Vec::new(),
    }
}

fn holds(store: &str, backups: &[RootBackup], index: WalIndex) -> StoreView {
    let system = SystemView { wal: index, forks: Vec::new(), adoptions: BTreeMap::new() };
    StoreView::Holds { store: name(store), backups: backups.to_vec(), systems: vec![(SYSTEM, system)] }
}

/// Two backups of timeline 1, then a promotion within segment 9.
fn promoted() -> StoreView {
    let backups = [backup(1, 1, 2.1, 2.9, "01:00:00"), backup(2, 1, 5.1, 5.9, "02:00:00")];
    let history = [(2, "1\t0/980000\tno recovery target specified\n")];
    let commits = [(1, 9.0, "03:00:00"), (2, 13.0, "04:00:00")];
    holds("repo1", &backups, index(&[(1, 2, 8), (2, 9, 12)], &history, &commits))
}

fn request(target: Target) -> Request {
    Request { target, ..Request::latest("pgconvoy-wal fetch %f \"%p\"") }
}

fn planned(views: &[StoreView], request: &Request) -> Result<RestorePlan, Impossible> {
    plan(&"main".parse().unwrap(), views, request, &Testimonies::new(), at("05:00:00"))
}

#[track_caller]
fn refused(views: &[StoreView], request: &Request) -> String {
    let refusal = planned(views, request).unwrap_err();
    assert!(!refusal.hint.is_empty(), "{refusal}");
    format!("{}\n  hint: {}", refusal.reason, refusal.hint)
}

#[test]
fn the_newest_backup_that_can_reach_the_target() {
    let check = |target: Target, random: u32, end: f64| {
        let plan = planned(&[promoted()], &request(target.clone())).unwrap();
        assert!(plan.backup.backup.to_string().ends_with(&format!("{random:08x}")), "{target:?}: {plan}");
        assert_eq!(plan.wal.end, lsn(end), "{target:?}");
    };
    check(Target::Latest, 2, 13.0);
    check(Target::Time(at("02:30:00")), 2, 13.0);
    check(Target::Time(at("01:30:00")), 1, 13.0);
    check(Target::Lsn(lsn(7.0)), 2, 7.0);
    check(Target::Lsn(lsn(4.0)), 1, 4.0);
    check(Target::Immediate, 2, 5.9);
    check(Target::Name("before".parse().unwrap()), 2, 13.0);
}

#[test]
fn timelines() {
    let timeline_of = |choice: TimelineChoice, target: Target| {
        let plan = planned(&[promoted()], &Request { timeline: choice, ..request(target) }).unwrap();
        (plan.timeline, plan.wal.end)
    };
    let numbered = |number| TargetTimeline::Number(timeline(number));
    assert_eq!(timeline_of(TimelineChoice::Newest, Target::Latest), (numbered(2), lsn(13.0)));
    assert_eq!(timeline_of(TimelineChoice::Number(timeline(1)), Target::Latest), (numbered(1), lsn(9.0)));
    assert_eq!(timeline_of(TimelineChoice::Current, Target::Latest), (TargetTimeline::Current, lsn(9.0)));
    assert_eq!(timeline_of(TimelineChoice::Newest, Target::Immediate), (TargetTimeline::Current, lsn(5.9)));

    // A clone that forked off before the backup ended does not draw the restore onto its timeline.
    let history = [(2, "1\t0/400000\ttest restore\n")];
    let views = [holds("repo1", &[backup(1, 1, 5.1, 5.9, "02:00:00")], index(&[(1, 2, 8), (2, 4, 30)], &history, &[]))];
    let plan = planned(&views, &request(Target::Latest)).unwrap();
    assert_eq!((plan.timeline, plan.wal.end), (numbered(1), lsn(9.0)));
}

#[test]
fn a_store_left_out_fixes_the_end_of_the_archive() {
    let silent = StoreView::Unreachable { store: name("repo1"), reason: "no answer in 10 s".to_owned() };
    let StoreView::Holds { backups, systems, .. } = promoted() else { unreachable!() };
    let views = [silent, StoreView::Holds { store: name("s3"), backups, systems }];
    let mut without = request(Target::Latest);
    without.without_stores.insert(name("repo1"));
    let plan = planned(&views, &without).unwrap();
    assert_eq!(plan.archive_end, ArchiveEnd::Fixed { without_stores: vec![name("repo1")] });
    assert_eq!(plan.wal_stores, [name("s3")]);
    insta::assert_snapshot!(plan.to_string());
}

#[test]
fn stores_complete_each_other() {
    let backups = [backup(1, 1, 2.1, 2.9, "01:00:00")];
    let views = [
        holds("repo1", &backups, index(&[(1, 2, 4), (1, 7, 7)], &[], &[])),
        holds("s3", &[], index(&[(1, 5, 6)], &[], &[])),
    ];
    let plan = planned(&views, &request(Target::Latest)).unwrap();
    assert_eq!((plan.wal.end, plan.backup_stores), (lsn(8.0), vec![name("repo1")]));
    assert_eq!(plan.wal_stores, [name("repo1"), name("s3")]);
}

#[test]
fn refusals() {
    let only = [backup(1, 1, 2.1, 2.9, "01:00:00")];
    let gapped = || [holds("repo1", &only, index(&[(1, 2, 5), (1, 8, 9)], &[], &[(1, 6.0, "02:00:00")]))];
    let silent = StoreView::Unreachable { store: name("s3"), reason: "connection refused".to_owned() };
    let number = |number| Request { timeline: TimelineChoice::Number(timeline(number)), ..request(Target::Latest) };
    let mut unknown_store = request(Target::Latest);
    unknown_store.without_stores.insert(name("repo9"));
    let mut all_out = request(Target::Latest);
    all_out.without_stores.insert(name("repo1"));
    let named = Request { backup: Some(BackupId::new(at("00:00:00"), 9)), ..request(Target::Latest) };
    let standby = Request { role: Role::Standby, ..request(Target::Lsn(lsn(7.0))) };
    let mut conflicting = index(&[(1, 2, 9)], &[], &[]);
    let in_conflict: WalFileName = "000000010000000000000006".parse().unwrap();
    conflicting.conflicts.push(WalConflict { name: in_conflict, variants: Vec::new() });
    let conflict = [holds("repo1", &only, conflicting)];
    let mut undecided = index(&[(1, 2, 8), (2, 9, 12)], &[], &[]);
    undecided.conflicts.push(WalConflict { name: "00000002.history".parse().unwrap(), variants: Vec::new() });
    let undecided = [holds("repo1", &only, undecided)];
    assert_eq!(planned(&undecided, &number(1)).unwrap().timeline, TargetTimeline::Number(timeline(1)));
    let torn = [holds("repo1", &only, index(&[(1, 3, 9)], &[], &[]))];
    let cases: Vec<(&str, String)> = vec![
        ("no backup", refused(&[holds("repo1", &[], index(&[(1, 2, 5)], &[], &[]))], &request(Target::Latest))),
        ("unknown backup", refused(&[promoted()], &named)),
        ("silent store", refused(&[promoted(), silent], &request(Target::Latest))),
        ("unknown store", refused(&[promoted()], &unknown_store)),
        ("no store left", refused(&[promoted()], &all_out)),
        ("time before all backups", refused(&[promoted()], &request(Target::Time(at("00:30:00"))))),
        ("position before all backups", refused(&[promoted()], &request(Target::Lsn(lsn(1.0))))),
        ("time after the last commit", refused(&[promoted()], &request(Target::Time(at("04:00:01"))))),
        ("time of the last commit", refused(&[promoted()], &request(Target::Time(at("04:00:00"))))),
        ("position after the last WAL", refused(&[promoted()], &request(Target::Lsn(lsn(20.0))))),
        ("timeline without history", refused(&[promoted()], &number(7))),
        ("latest behind a gap", refused(&gapped(), &request(Target::Latest))),
        ("position behind a gap", refused(&gapped(), &request(Target::Lsn(lsn(9.0))))),
        ("time behind a gap", refused(&gapped(), &request(Target::Time(at("03:00:00"))))),
        ("conflict on the way", refused(&conflict, &request(Target::Latest))),
        ("history in conflict", refused(&undecided, &request(Target::Latest))),
        ("its timeline", refused(&undecided, &number(2))),
        ("backup lacks its own WAL", refused(&torn, &request(Target::Latest))),
        ("standby with a target", refused(&[promoted()], &standby)),
    ];
    let text: String = cases.iter().map(|(case, text)| format!("{case}: {text}\n")).collect();
    insta::assert_snapshot!(text);
}

#[test]
fn up_to_a_gap_if_the_operator_says_so() {
    let views = [holds("repo1", &[backup(1, 1, 2.1, 2.9, "01:00:00")], index(&[(1, 2, 5), (1, 8, 9)], &[], &[]))];
    let plan = planned(&views, &Request { at_gap: AtGap::StopBefore, ..request(Target::Latest) }).unwrap();
    assert_eq!(plan.wal.end, lsn(6.0));
    assert!(plan.warnings.iter().any(|warning| warning.contains("it follows a gap")), "{plan}");
}

#[test]
fn a_standby_backup_is_consistent_at_its_minimum_recovery_point() {
    let mut standby = backup(1, 1, 2.1, 2.9, "01:00:00");
    standby.min_recovery_point = Some(lsn(3.5));
    let views = [holds("repo1", &[standby], index(&[(1, 2, 9)], &[], &[]))];
    assert!(planned(&views, &request(Target::Lsn(lsn(3.2)))).is_err());
    assert!(planned(&views, &request(Target::Lsn(lsn(3.5)))).is_ok());
    assert_eq!(planned(&views, &request(Target::Immediate)).unwrap().wal.end, lsn(3.5));
}

/// Settings as they would be written.
fn settings_of(request: &Request) -> String {
    let plan = planned(&[promoted()], request).unwrap();
    let mut text = format!("{}\n", plan.recovery.signal.file_name());
    for setting in &plan.recovery.settings {
        text.push_str(&format!("{} = '{}'\n", setting.name, setting.value));
    }
    text
}

#[test]
fn settings() {
    let pause = Request { action: TargetAction::Pause, ..request(Target::Lsn(lsn(7.5))) };
    let time = request(Target::Time(at("02:30:00.5")));
    let exclusive = Request { bound: TargetBound::Exclusive, ..time };
    let standby = Request { role: Role::Standby, ..request(Target::Latest) };
    let adopted = Request { archive_mode: Some(ArchiveMode::Keep), ..request(Target::Latest) };
    let cases = [
        ("latest", request(Target::Latest)),
        ("time, exclusive", exclusive),
        ("position, pause", pause),
        ("immediate", request(Target::Immediate)),
        ("standby", standby),
        ("adopted", adopted),
    ];
    let text: String = cases.iter().map(|(case, request)| format!("-- {case}\n{}", settings_of(request))).collect();
    insta::assert_snapshot!(text);
}

#[test]
fn at_most_one_target_and_it_comes_last() {
    for target in [
        Target::Immediate,
        Target::Time(at("02:30:00")),
        Target::Lsn(lsn(7.0)),
        Target::Xid(4_294_968_000.try_into().unwrap()),
        Target::Name("a".parse().unwrap()),
    ] {
        let plan = planned(&[promoted()], &request(target)).unwrap();
        let is_target = |setting: &&Setting| {
            setting.name == "recovery_target"
                || ["time", "lsn", "xid", "name"].iter().any(|kind| setting.name == format!("recovery_target_{kind}"))
        };
        let targets: Vec<&Setting> = plan.recovery.settings.iter().filter(is_target).collect();
        assert_eq!(targets.len(), 5);
        assert!(targets[..4].iter().all(|setting| setting.value.is_empty()) && !targets[4].value.is_empty());
        for setting in &plan.recovery.settings {
            assert!(
                plan.recovery.removed_settings.contains(&setting.name),
                "{} is written and not removed",
                setting.name
            );
        }
    }
}

#[test]
fn plans_survive_json() {
    let plan = planned(&[promoted()], &request(Target::Time(at("02:30:00")))).unwrap();
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<RestorePlan>(&text).unwrap(), plan);
}

proptest! {
    #[test]
    fn a_plan_can_work(
        spans in prop::collection::vec((1u32..4, 1u64..20, 1u64..20), 1..6),
        forks in (MIB..18 * MIB, MIB..18 * MIB),
        starts in prop::collection::vec((1u32..4, MIB..15 * MIB, 1..4 * MIB), 1..4),
        target in prop::option::of(MIB..22 * MIB),
        up_to_gap in any::<bool>(),
    ) {
        let spans: Vec<_> = spans.into_iter().map(|(on, a, b)| (on, a.min(b), a.max(b))).collect();
        let (first, second) = (forks.0.min(forks.1), forks.0.max(forks.1));
        let two = format!("1\t{}\t\n", Lsn::new(first));
        let three = format!("{two}2\t{}\t\n", Lsn::new(second));
        let index = index(&spans, &[(2, &two), (3, &three)], &[]);
        let wal = index.wal.clone().unwrap();
        let to_mib = |bytes: u64| bytes as f64 / MIB as f64;
        let backups: Vec<RootBackup> = starts
            .iter()
            .enumerate()
            .map(|(n, (on, start, length))| {
                backup(n as u32, *on, to_mib(*start), to_mib(start + length), &format!("0{n}:00:00"))
            })
            .collect();
        let mut request = request(target.map_or(Target::Latest, |bytes| Target::Lsn(Lsn::new(bytes))));
        if up_to_gap && target.is_none() {
            request.at_gap = AtGap::StopBefore;
        }
        match planned(&[holds("repo1", &backups, index)], &request) {
            Err(refusal) => prop_assert!(!refusal.reason.is_empty() && !refusal.hint.is_empty()),
            Ok(plan) => {
                let on = match plan.timeline {
                    TargetTimeline::Number(number) => number,
                    _ => plan.backup.stop_timeline,
                };
                // What PostgreSQL would read in place of a missing segment lies behind the end.
                let stands_in = |stand: &crate::coverage::StandIn| stand.fork >= plan.wal.start && stand.begin < plan.wal.end;
                prop_assert!(!wal.stand_ins(on).iter().any(stands_in), "{}", plan);
                prop_assert!(wal.missing(on, plan.wal).is_empty(), "{}", plan);
                prop_assert!(wal.on_path(on, plan.backup.stop_timeline, plan.backup.stop_lsn) || on == plan.backup.stop_timeline);
                prop_assert!(plan.wal.start == plan.backup.start_lsn && plan.wal.end >= plan.backup.stop_lsn);
                if let Some(bytes) = target {
                    prop_assert_eq!(plan.wal.end, Lsn::new(bytes));
                } else if let Target::Lsn(fork) = plan.target {
                    prop_assert_eq!(plan.wal.end, fork);
                    prop_assert!(plan.recovery.settings.iter().any(|one| one.name == "recovery_target_inclusive" && one.value == "off"));
                } else if !up_to_gap {
                    prop_assert_eq!(Some(plan.wal.end), wal.ranges(on).last().map(|range| range.end));
                }
            }
        }
    }
}
