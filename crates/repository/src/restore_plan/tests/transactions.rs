//! Which backup a restore to a transaction takes.

use postgres_format::FullTransactionId;

use super::*;

const EPOCH: u64 = 1 << 32;

fn knowing(random: u32, stopped: &str, next: Option<(u64, u64)>) -> RootBackup {
    let (start, stop) = next.map(|(start, stop)| (FullTransactionId::new(start), FullTransactionId::new(stop))).unzip();
    let position = 2.0 + 3.0 * f64::from(random);
    let backup = backup(random, 1, position, position + 0.5, stopped);
    RootBackup { start_next_xid: start, stop_next_xid: stop, from_standby: false, ..backup }
}

fn held(first: Option<(u64, u64)>, second: Option<(u64, u64)>) -> [StoreView; 1] {
    let backups = [knowing(1, "01:00:00", first), knowing(2, "02:00:00", second)];
    [holds("repo1", &backups, index(&[(1, 2, 20)], &[], &[]))]
}

/// The chosen backup's number and the warnings, or the reason of the refusal.
fn chosen(views: &[StoreView], xid: u64, backup: Option<BackupId>) -> Result<(String, String), String> {
    let request = Request { backup, ..request(Target::Xid(xid.try_into().unwrap())) };
    let plan = planned(views, &request).map_err(|refusal| format!("{}; {}", refusal.reason, refusal.hint))?;
    Ok((plan.backup.backup.to_string()[17..].to_owned(), plan.warnings.join("; ")))
}

#[test]
fn the_newest_backup_that_certainly_lies_before_a_transaction() {
    let views = held(Some((700, 740)), Some((900, 950)));
    let check = |xid: u64, expected: Option<&str>| {
        let chosen = chosen(&views, xid, None);
        assert_eq!(chosen.as_ref().ok().map(|(backup, _)| backup.as_str()), expected, "{xid}: {chosen:?}");
    };
    check(100_000, Some("00000002"));
    check(950, Some("00000002"));
    // It may have ended while the second backup ran, or before it began.
    check(949, Some("00000001"));
    check(800, Some("00000001"));
    check(740, Some("00000001"));
    check(739, None);
    check(5, None);
}

#[test]
fn a_transaction_before_all_backups_is_refused_with_the_oldest_one_s_next() {
    let views = held(Some((700, 740)), Some((900, 950)));
    insta::assert_snapshot!(format!(
        "{}\n{}",
        chosen(&views, 739, None).unwrap_err(),
        chosen(&views, 600, None).unwrap_err()
    ));
    // It may have run for long, and ended behind the backup: the operator's to say.
    let named = BackupId::new(at("02:00:00"), 2);
    let (backup, warnings) = chosen(&views, 800, Some(named)).unwrap();
    assert_eq!(backup, "00000002");
    assert!(
        warnings.contains("may have ended before backup") && warnings.ends_with("PostgreSQL stops if it has"),
        "{warnings}"
    );
}

#[test]
fn backups_that_do_not_say_are_taken_with_a_warning() {
    let (backup, warnings) = chosen(&held(None, None), 5, None).unwrap();
    assert_eq!(backup, "00000002");
    assert_eq!(warnings, "transaction 5 is searched for while recovering, and may lie before this backup");
    let (backup, warnings) = chosen(&held(None, Some((900, 950))), 800, None).unwrap();
    assert_eq!(backup, "00000001");
    assert!(warnings.contains("may lie before this backup"), "{warnings}");
}

#[test]
fn a_backup_that_knows_only_one_of_its_ends_proves_no_more() {
    let only = |backup: RootBackup| [holds("repo1", &[backup], index(&[(1, 2, 20)], &[], &[]))];
    let whole = || knowing(1, "01:00:00", Some((700, 740)));
    let start = only(RootBackup { stop_next_xid: None, ..whole() });
    for xid in [720, 100_000] {
        let (_, warnings) = chosen(&start, xid, None).unwrap();
        assert!(warnings.ends_with("may lie before this backup"), "{xid}: {warnings}");
    }
    assert!(chosen(&start, 699, None).unwrap_err().contains("before backup"));
    // As of PostgreSQL 19.
    let stop = only(RootBackup { start_next_xid: None, ..whole() });
    assert!(chosen(&stop, 740, None).is_ok());
    let refused = chosen(&stop, 600, None).unwrap_err();
    assert!(refused.contains("whose next one at the end was 740"), "{refused}");
}

#[test]
fn a_backup_from_a_standby_does_not_prove_where_later_transactions_end() {
    let of_standby = RootBackup { from_standby: true, ..knowing(1, "01:00:00", Some((700, 740))) };
    let views = [holds("repo1", &[of_standby], index(&[(1, 2, 20)], &[], &[]))];
    for xid in [740, 100_000] {
        let (_, warnings) = chosen(&views, xid, None).unwrap();
        assert!(warnings.ends_with("may lie before this backup"), "{xid}: {warnings}");
    }
    assert!(chosen(&views, 720, None).unwrap_err().contains("whose next one at the end was 740"));
    assert!(chosen(&views, 600, None).unwrap_err().contains("before backup"));
    assert!(chosen(&views, 800 + EPOCH, None).unwrap_err().contains("low 32 bits"));
}

#[test]
fn short_ids_are_read_near_the_newest_backup_and_full_ones_as_they_are() {
    let views = held(Some((EPOCH - 2000, EPOCH - 1900)), Some((EPOCH + 900, EPOCH + 950)));
    let backup = |xid| chosen(&views, xid, None).map(|(backup, _)| backup);
    assert_eq!(backup(1000).as_deref(), Ok("00000002"));
    assert_eq!(backup(EPOCH + 1000).as_deref(), Ok("00000002"));
    assert_eq!(backup(940).as_deref(), Ok("00000001"));
    assert_eq!(backup(EPOCH - 10).as_deref(), Ok("00000001"));
    assert!(backup(EPOCH - 1950).is_err());
    let beyond = backup(2 * EPOCH + 2000).unwrap_err();
    assert!(beyond.contains("PostgreSQL compares the low 32 bits"), "{beyond}");
}
