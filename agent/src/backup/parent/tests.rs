//! Which backup is chosen, and the words of each refusal.

use super::*;

const SYSTEM: SystemIdentifier = SystemIdentifier::new(7);

fn timeline(number: u32) -> Timeline {
    Timeline::new(number).unwrap()
}

/// Timeline 3, forked off 2 at 300, which forked off 1 at 100.
fn ours() -> Ours {
    let history = TimelineHistory::parse(timeline(3), b"1\t0/100\tx\n2\t0/300\tx\n").unwrap();
    Ours {
        system_identifier: SYSTEM,
        postgres_major: 15,
        segment_size_bytes: 16 << 20,
        start_lsn: Lsn::new(0x500),
        history,
    }
}

fn entry(number: u32, on: u32, start: u64, stop: u64) -> RootBackup {
    let json = format!(
        r#"{{"backup":"20261123T0102{number:02}Z-00000001","type":"full","manifest_sha256":"{}","manifest_size":1,
            "system_identifier":"7","postgres_major":15,"segment_size_bytes":{},"start_timeline":{on},"start_lsn":"{}",
            "start_time":"2026-11-23T01:02:03Z","stop_timeline":{on},"stop_lsn":"{}","stop_time":"2026-11-23T01:02:03Z",
            "min_recovery_point":null,"node":"a","from_standby":false,"label":"","files":1,"data_bytes":1,"stored_bytes":1,
            "packs":1,"page_errors":0}}"#,
        "00".repeat(32),
        16 << 20,
        Lsn::new(start),
        Lsn::new(stop)
    );
    RootBackup::from_json(&json).unwrap()
}

#[track_caller]
fn check(on: u32, start: u64, stop: u64, expected: Option<&str>) {
    let found = unfit(&entry(1, on, start, stop), &ours()).map(|why| why.to_string());
    assert_eq!(found.as_deref(), expected, "timeline {on}, {start:X} to {stop:X}");
}

#[test]
fn a_parent_begins_and_ends_on_the_way_to_our_timeline() {
    check(3, 0x400, 0x480, None);
    check(2, 0x150, 0x300, None);
    check(1, 0x50, 0x100, None);
    check(1, 0x50, 0x101, Some("0/101 on its timeline 1 is not on the way to timeline 3"));
    check(2, 0x280, 0x301, Some("0/301 on its timeline 2 is not on the way to timeline 3"));
    check(2, 0x300, 0x300, Some("0/300 on its timeline 2 is not on the way to timeline 3"));
    check(2, 0x90, 0x200, Some("0/90 on its timeline 2 is not on the way to timeline 3"));
    check(4, 0x400, 0x480, Some("0/400 on its timeline 4 is not on the way to timeline 3"));
}

#[test]
fn a_parent_ended_before_our_start() {
    check(3, 0x400, 0x500, None);
    check(3, 0x400, 0x501, Some("it ended at 0/501, after the start at 0/500"));
    check(3, 0x501, 0x501, Some("it ended at 0/501, after the start at 0/500"));
}

#[test]
fn another_system_version_or_segment_size_is_refused() {
    let refused = |change: fn(&mut RootBackup)| {
        let mut entry = entry(1, 3, 0x400, 0x480);
        change(&mut entry);
        unfit(&entry, &ours()).unwrap().to_string()
    };
    assert_eq!(refused(|entry| entry.system_identifier = SystemIdentifier::new(8)), "it is of another system, 8");
    assert_eq!(refused(|entry| entry.postgres_major = 14), "its PostgreSQL version is 14, and 15 here");
    assert_eq!(
        refused(|entry| entry.segment_size_bytes = 1 << 20),
        "its WAL segment size is 1048576, and 16777216 here"
    );
}

#[test]
fn the_newest_fit_one_wins_and_a_diff_takes_a_full_one() {
    let mut live = vec![entry(1, 3, 0x310, 0x320), entry(2, 3, 0x400, 0x480), entry(3, 3, 0x450, 0x600)];
    live[1].backup_type = BackupType::Incr;
    let chosen = |asked| {
        let candidates = candidates(asked, &live, &ours());
        let fit: Vec<BackupId> = candidates.fit.iter().map(|entry| entry.backup).collect();
        (fit, candidates.refused.len())
    };
    assert_eq!(chosen(BackupType::Incr), (vec![live[1].backup, live[0].backup], 1));
    assert_eq!(chosen(BackupType::Diff), (vec![live[0].backup], 1));
    assert_eq!(chosen(BackupType::Full), (Vec::new(), 0));
}

#[test]
fn a_reason_is_given_when_none_fits() {
    let live = vec![entry(1, 4, 0x400, 0x480), entry(2, 3, 0x450, 0x600)];
    let reason = |live: &[RootBackup], asked| none_reason(asked, &candidates(asked, live, &ours()).refused);
    assert_eq!(
        reason(&live, BackupType::Incr),
        "none of 2 backups is fit to build on; of 20261123T010202Z-00000001: it ended at 0/600, after the start at 0/500"
    );
    assert_eq!(
        reason(&live[..1], BackupType::Diff),
        "the only full backup, 20261123T010201Z-00000001, is not fit to build on: 0/400 on its timeline 4 is not on the \
         way to timeline 3"
    );
    assert_eq!(reason(&[], BackupType::Diff), "there is no full backup that it could build on");
}
