//! Forks whose first segment is missing, last segments that end early or are in conflict, backups of lines that were left.

use super::*;

/// Timeline 2 forked off within segment 9; of its own it has archived nothing but its history.
const HISTORY: (u32, &str) = (2, "1\t0/980000\tx\n");
const ON_BOUNDARY: (u32, &str) = (2, "1\t0/900000\tx\n");
const COMMITS: &[(u32, f64, &str)] = &[(1, 9.0, "02:50:00")];

fn early() -> RootBackup {
    backup(1, 1, 2.1, 2.9, "01:00:00")
}

fn view(spans: &[(u32, u64, u64)], history: (u32, &str)) -> StoreView {
    holds("repo1", &[early()], index(spans, &[history], COMMITS))
}

fn told(view: StoreView, request: &Request) -> String {
    match planned(&[view], request) {
        Ok(plan) => {
            let set = |name: &str| {
                let setting = plan.recovery.settings.iter().rfind(|setting| setting.name == name);
                setting.map_or_else(String::new, |setting| setting.value.clone())
            };
            let names = ["recovery_target_timeline", "recovery_target_lsn", "recovery_target_inclusive"];
            let settings: Vec<String> = names.iter().map(|name| format!("{name}={}", set(name))).collect();
            let lines = plan.reasons[1..].iter().chain(&plan.warnings).map(|line| format!("\n  {line}"));
            format!("to {}, {}{}", plan.wal.end, settings.join(" "), lines.collect::<String>())
        }
        Err(refusal) => format!("refused: {}\n  hint: {}", refusal.reason, refusal.hint),
    }
}

#[test]
fn without_the_first_segment_of_a_timeline_recovery_ends_at_the_fork() {
    let on = |number| Request { timeline: TimelineChoice::Number(timeline(number)), ..request(Target::Latest) };
    let exclusive = |position| Request { bound: TargetBound::Exclusive, ..request(Target::Lsn(lsn(position))) };
    let standby = |on| Request { role: Role::Standby, timeline: on, ..request(Target::Latest) };
    let to_gap = Request { at_gap: AtGap::StopBefore, ..on(2) };
    let parents = &[(1, 2, 9)][..];
    let beyond = &[(1, 2, 30)][..];
    let gap = &[(1, 2, 30), (2, 10, 12)][..];
    let cases = [
        ("the parent has that segment", told(view(parents, HISTORY), &request(Target::Latest))),
        ("the parent has much more", told(view(beyond, HISTORY), &on(2))),
        ("the fork lies on a boundary", told(view(parents, ON_BOUNDARY), &request(Target::Latest))),
        ("the parent has nothing of it", told(view(&[(1, 2, 8)], ON_BOUNDARY), &request(Target::Latest))),
        ("the child has more", told(view(gap, HISTORY), &on(2))),
        ("the child has more, up to the gap", told(view(gap, HISTORY), &to_gap)),
        ("the child has it", told(view(&[(1, 2, 30), (2, 9, 12)], HISTORY), &on(2))),
        ("the parent was asked for", told(view(beyond, HISTORY), &on(1))),
        (
            "a position behind the fork",
            told(view(beyond, HISTORY), &Request { target: Target::Lsn(lsn(9.6)), ..on(2) }),
        ),
        ("a position in the segment", told(view(parents, HISTORY), &request(Target::Lsn(lsn(9.3))))),
        ("the same, exclusive", told(view(parents, HISTORY), &exclusive(9.3))),
        ("a position before it", told(view(parents, HISTORY), &request(Target::Lsn(lsn(8.3))))),
        ("a time before it", told(view(parents, HISTORY), &request(Target::Time(at("02:00:00"))))),
        ("a later time", told(view(parents, HISTORY), &request(Target::Time(at("02:55:00"))))),
        ("a restore point", told(view(parents, HISTORY), &request(Target::Name("x".parse().unwrap())))),
        ("immediate", told(view(parents, HISTORY), &request(Target::Immediate))),
        ("a standby", told(view(parents, HISTORY), &standby(TimelineChoice::Newest))),
        ("a standby of the parent", told(view(parents, HISTORY), &standby(TimelineChoice::Current))),
    ];
    let text: String = cases.iter().map(|(case, text)| format!("{case}: {text}\n")).collect();
    insta::assert_snapshot!(text);
}

#[test]
fn a_position_behind_the_last_record_is_refused() {
    let mut index = index(&[(1, 2, 8)], &[], COMMITS);
    index.ends.insert("000000010000000000000008".parse().unwrap(), lsn(8.25));
    let views = [holds("repo1", &[early()], index)];
    let last_record = Lsn::new(lsn(8.25).as_u64() - 24);
    assert_eq!(planned(&views, &request(Target::Lsn(last_record))).unwrap().wal.end, last_record);
    // What pg_switch_wal() answers.
    let after = refused(&views, &request(Target::Lsn(lsn(8.25))));
    assert!(after.starts_with("no record begins at 0/840000 or behind it"), "{after}");
    assert!(refused(&views, &request(Target::Lsn(lsn(8.5)))).starts_with("no record begins"));
    assert!(refused(&views, &request(Target::Lsn(lsn(9.0)))).starts_with("WAL reaches only 0/900000"));
}

#[test]
fn a_conflict_behind_the_last_segment_lets_no_recovery_end() {
    let mut index = index(&[(1, 2, 8)], &[], COMMITS);
    let name: WalFileName = "000000010000000000000009".parse().unwrap();
    index.conflicts.push(WalConflict { name, variants: Vec::new() });
    let views = [holds("repo1", &[early()], index)];
    let latest = refused(&views, &request(Target::Latest));
    assert!(
        latest.starts_with("000000010000000000000009, which follows at 0/900000, is stored with contents"),
        "{latest}"
    );
    assert!(latest.contains("conflict resolve") && latest.contains("--stop-at-gap"), "{latest}");
    assert!(planned(&views, &request(Target::Lsn(lsn(8.3)))).is_ok());
    let up_to = planned(&views, &Request { at_gap: AtGap::StopBefore, ..request(Target::Latest) }).unwrap();
    assert_eq!(up_to.wal.end, lsn(9.0));
    let standby = planned(&views, &Request { role: Role::Standby, ..request(Target::Latest) }).unwrap();
    assert!(standby.warnings.iter().any(|warning| warning.contains("until it is resolved")), "{standby}");
}

#[test]
fn commits_of_before_the_backup_are_not_told() {
    let view = |commits| [holds("repo1", &[early()], index(&[(1, 1, 4)], &[], commits))];
    let last = |commits| planned(&view(commits), &request(Target::Latest)).unwrap().last_commit_time;
    assert_eq!(last(&[(1, 2.0, "00:50:00")]), None);
    assert_eq!(last(&[(1, 2.0, "00:50:00"), (1, 5.0, "01:30:00")]), Some(at("01:30:00")));
}
