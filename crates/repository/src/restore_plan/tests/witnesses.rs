//! Backups whose WAL is another server's are passed over, as far as that was heard; stretches of time that can be restored to.

use super::*;
use crate::witness::Testimony;

fn segment() -> WalFileName {
    "000000010000000000000005".parse().unwrap()
}

fn heard(said: &[(&str, Result<Testimony, &str>)]) -> Heard {
    let mut heard = Heard::default();
    said.iter().for_each(|(store, said)| heard.add(name(store), said.clone().map_err(str::to_owned)));
    heard
}

fn id(random: u32) -> BackupId {
    let StoreView::Holds { backups, .. } = promoted() else { unreachable!() };
    backups[random as usize - 1].backup
}

fn told(request: &Request, testimonies: &Testimonies) -> Result<(BackupId, Vec<String>), String> {
    let planned = plan(&"main".parse().unwrap(), &[promoted()], request, testimonies, at("05:00:00"));
    planned.map(|plan| (plan.backup.backup, plan.warnings)).map_err(|refusal| refusal.reason)
}

#[test]
fn a_backup_whose_wal_was_decided_away_is_passed_over() {
    let differs = || heard(&[("repo1", Ok(Testimony::Differs(segment())))]);
    let latest = request(Target::Latest);
    let (backup, warnings) = told(&latest, &Testimonies::from([(id(2), differs())])).unwrap();
    assert_eq!(backup, id(1));
    let expected = "passed over: backup 20261123T020000Z-00000002 was taken of another server than the one whose WAL counts: \
                    WAL 000000010000000000000005 in store repo1 is not what its own server had";
    assert_eq!(warnings[0], expected);
    let named = Request { backup: Some(id(2)), ..latest.clone() };
    assert!(told(&named, &Testimonies::from([(id(2), differs())])).unwrap_err().contains("taken of another server"));
    // The newest one's reason says more than what the older ones lack.
    let all = Testimonies::from([(id(1), differs()), (id(2), differs())]);
    assert!(told(&latest, &all).unwrap_err().starts_with(&format!("backup {}", id(2))));
    // What a store says that is left out, or what is missing, is no contradiction; what is not known is told.
    for said in [
        heard(&[("s3", Ok(Testimony::Differs(segment())))]),
        heard(&[("repo1", Ok(Testimony::Missing(segment())))]),
        heard(&[("repo1", Ok(Testimony::Agrees))]),
    ] {
        assert_eq!(told(&latest, &Testimonies::from([(id(2), said)])).unwrap(), (id(2), Vec::new()));
    }
    let unknown = heard(&[("repo1", Err("no answer"))]);
    let (_, warnings) = told(&latest, &Testimonies::from([(id(2), unknown)])).unwrap();
    assert!(warnings[0].ends_with("could not be compared with its server's: no answer"), "{warnings:?}");
}

#[test]
fn a_plan_stands_once_its_backup_was_heard() {
    let mut testimonies = Testimonies::new();
    let mut asked = Vec::new();
    let plan = loop {
        let views = [promoted()];
        let step = next_step(&"main".parse().unwrap(), &views, &request(Target::Latest), &testimonies, at("05:00:00"));
        match step.unwrap() {
            Step::Planned(plan) => break plan,
            Step::Ask(backup, history) => {
                assert_eq!(history.timeline(), timeline(1));
                let said = if asked.is_empty() { Testimony::Differs(segment()) } else { Testimony::Silent };
                testimonies.insert(backup.backup, heard(&[("repo1", Ok(said))]));
                asked.push(backup.backup);
            }
        }
    };
    assert_eq!((asked, plan.backup.backup), (vec![id(2), id(1)], id(1)));
}

fn windows_of(view: StoreView, testimonies: &Testimonies) -> Vec<String> {
    let windows = windows(&[view], &BTreeSet::new(), testimonies).unwrap();
    let text = |window: Window| {
        let commit = window.last_commit.map_or_else(|| "-".to_owned(), |time| time.to_string());
        let count = window.backups.len();
        format!(
            "{} to {commit}, {} of timeline {}, {count} from {}",
            window.from, window.wal, window.timeline, window.backups[0]
        )
    };
    windows.into_iter().map(text).collect()
}

#[test]
fn a_window_ends_at_a_gap_and_another_begins_behind_it() {
    let backups = [
        backup(1, 1, 2.1, 2.9, "01:00:00"),
        backup(2, 1, 5.1, 5.9, "02:00:00"),
        backup(3, 1, 9.1, 9.9, "03:00:00"),
        backup(4, 1, 11.1, 11.9, "04:00:00"),
    ];
    let commits = [(1, 7.0, "02:30:00"), (1, 11.0, "03:30:00")];
    let view = || holds("repo1", &backups, index(&[(1, 2, 6), (1, 9, 12)], &[], &commits));
    let expected = [
        "2026-11-23T01:00:00Z to 2026-11-23T02:30:00Z, 0/2E6666 to 0/700000 of timeline 1, 2 from 20261123T010000Z-00000001",
        "2026-11-23T03:00:00Z to 2026-11-23T03:30:00Z, 0/9E6666 to 0/D00000 of timeline 1, 2 from 20261123T030000Z-00000003",
    ];
    assert_eq!(windows_of(view(), &Testimonies::new()), expected);
    // Nothing was committed since the newest backup, and yet since the oldest one.
    assert_eq!(planned(&[view()], &request(Target::Latest)).unwrap().last_commit_time, None);
    // One that a restore passes over begins no window.
    let other = heard(&[("repo1", Ok(Testimony::Differs(segment())))]);
    let told = windows_of(view(), &Testimonies::from([(backups[0].backup, other)]));
    assert!(told[0].starts_with("2026-11-23T02:00:00Z to 2026-11-23T02:30:00Z"), "{told:?}");
    // Along the path of timelines it is one stretch.
    let StoreView::Holds { backups, systems, .. } = promoted() else { unreachable!() };
    let promoted = windows_of(StoreView::Holds { store: name("repo1"), backups, systems }, &Testimonies::new());
    assert_eq!(promoted.len(), 1, "{promoted:?}");
}
