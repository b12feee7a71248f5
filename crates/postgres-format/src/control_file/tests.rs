//! Control files of live servers, and what is done to them.

use super::*;
use crate::samples;

/// A file of another layout, with the fields of a sample where that layout has them.
fn with_crc(mut file: Vec<u8>, crc_at: usize) -> Vec<u8> {
    let crc = crc32c::crc32c(&file[..crc_at]);
    file[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    file
}

#[track_caller]
fn check_sample(major: u32, version: u32, catalog_version: u32, state: ClusterState, timeline: u32, xid: u64) {
    let control = ControlFile::parse(&samples::named(&format!("{major}-pg_control"))).unwrap();
    assert_eq!(control.postgres_major(), Some(major));
    assert_eq!((control.version(), control.catalog_version), (version, catalog_version));
    assert_eq!((control.state, control.checkpoint_timeline.get()), (state, timeline));
    assert_eq!(control.wal_segment_size, SegmentSize::MIN);
    assert_eq!((control.block_size, control.relation_segment_blocks, control.wal_page_size), (8192, 131_072, 8192));
    assert_eq!((control.checksum_version, control.wal_level, control.full_page_writes), (1, 1, true));
    assert!(control.checksums_enabled());
    assert_eq!(control.checkpoint, control.checkpoint_redo, "a shutdown checkpoint is its own redo point");
    assert_eq!(control.checkpoint.as_u64() % (1 << 20), 0x28, "it is the first record of the last segment");
    assert_eq!((control.min_recovery_point, control.min_recovery_point_timeline), (Lsn::ZERO, None));
    assert_eq!(control.next_xid, Some(FullTransactionId::new(xid)));
    assert!(control.written_unix_seconds > 1_700_000_000);
}

#[test]
fn live_samples() {
    check_sample(14, 1300, 202_107_181, ClusterState::ShutDown, 1, 745);
    check_sample(15, 1300, 202_209_061, ClusterState::ShutDown, 2, 738);
    check_sample(16, 1300, 202_307_071, ClusterState::ShutDown, 1, 742);
    check_sample(17, 1700, 202_406_281, ClusterState::ShutDown, 1, 750);
    check_sample(18, 1800, 202_506_291, ClusterState::ShutDown, 1, 764);
}

#[test]
fn a_standby() {
    let control = ControlFile::parse(&samples::named("15-standby-pg_control")).unwrap();
    assert_eq!(control.state, ClusterState::ArchiveRecovery);
    assert!(control.state.is_in_recovery());
    assert!(control.min_recovery_point >= control.checkpoint_redo);
    assert_eq!(control.min_recovery_point_timeline, Some(Timeline::FIRST));
    assert_eq!(control.next_xid, Some(FullTransactionId::new(736)));
}

#[test]
fn versions_by_table_only() {
    // 14 has the layout of 15 and another catalog version; 13 shares both control version and layout but is not ours.
    let mut file = samples::named("15-pg_control");
    file[CATALOG_VERSION_AT..CATALOG_VERSION_AT + 4].copy_from_slice(&202_107_181u32.to_le_bytes());
    assert_eq!(ControlFile::parse(&with_crc(file.clone(), 288)).unwrap().postgres_major(), Some(14));
    file[CATALOG_VERSION_AT..CATALOG_VERSION_AT + 4].copy_from_slice(&202_007_201u32.to_le_bytes());
    assert_eq!(ControlFile::parse(&with_crc(file, 288)).unwrap().postgres_major(), None);
    // 19 moved what is behind the checkpoint copy by eight bytes, and more behind the relation segment size.
    let old = samples::named("18-pg_control");
    let mut new = old.clone();
    new[VERSION_AT..VERSION_AT + 4].copy_from_slice(&1902u32.to_le_bytes());
    new[144..264].fill(0);
    new[144..192].copy_from_slice(&old[136..184]);
    new[224..232].copy_from_slice(&old[216..224]);
    new[236..244].copy_from_slice(&old[224..232]);
    new[264..268].copy_from_slice(&old[252..256]);
    let control = ControlFile::parse(&with_crc(new, 304)).unwrap();
    let expected = ControlFile { version: 1902, next_xid: None, ..ControlFile::parse(&old).unwrap() };
    assert_eq!((control.postgres_major(), control), (Some(19), expected));
}

#[test]
fn refusals() {
    let good = samples::named("16-pg_control");
    let changed = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let error = |file: &[u8]| ControlFile::parse(file).unwrap_err();
    assert_eq!(error(&good[..8191]), ControlError::Size { bytes: 8191 });
    assert_eq!(error(&[]), ControlError::Size { bytes: 0 });
    assert_eq!(error(&changed(8, &1300u32.to_be_bytes())), ControlError::ByteOrder);
    assert!(matches!(error(&changed(8, &2000u32.to_le_bytes())), ControlError::Version { version: 2000, .. }));
    assert!(matches!(error(&changed(40, &[1])), ControlError::Checksum { .. }));
    let refused = |at, bytes: &[u8]| error(&with_crc(changed(at, bytes), 288));
    assert_eq!(refused(16, &[7]), ControlError::Value { what: "the state", value: 7 });
    assert_eq!(refused(48, &[0, 0, 0, 0]), ControlError::Value { what: "the timeline", value: 0 });
    assert_eq!(refused(216, &[1, 0, 0, 0]), ControlError::Value { what: "the block size", value: 1 });
    assert_eq!(refused(220, &[0, 0, 0, 0]), ControlError::Value { what: "the relation segment size", value: 0 });
    assert!(matches!(refused(228, &[1]), ControlError::Value { what: "the WAL segment size", .. }));
}

#[test]
fn poison() {
    for major in [15, 16, 17, 18] {
        let good = samples::named(&format!("{major}-pg_control"));
        let mut poisoned = good.clone();
        poison_checkpoint(&mut poisoned).unwrap();
        let expected = ControlFile { checkpoint: POISONED_CHECKPOINT, ..ControlFile::parse(&good).unwrap() };
        assert_eq!(ControlFile::parse(&poisoned).unwrap(), expected);
    }
    let mut torn = samples::named("15-pg_control");
    torn[100] ^= 1;
    let before = torn.clone();
    assert!(poison_checkpoint(&mut torn).is_err());
    assert_eq!(torn, before);
}

#[test]
fn an_unknown_version_tells_what_archiving_needs() {
    let sample = samples::named("18-pg_control");
    let known = ControlFile::parse(&sample).unwrap();
    let basics = ControlBasics::parse(&sample).unwrap();
    let mut newer = sample.clone();
    newer[VERSION_AT..VERSION_AT + 4].copy_from_slice(&2100_u32.to_le_bytes());
    let torn = newer.clone();
    for crc_at in [292, 320] {
        let newer = with_crc(newer.clone(), crc_at);
        assert!(matches!(ControlFile::parse(&newer), Err(ControlError::Version { version: 2100, .. })));
        assert_eq!(ControlBasics::parse(&newer), Ok(basics));
    }
    assert_eq!((basics.system_identifier, basics.state), (known.system_identifier, known.state));
    assert_eq!((basics.checkpoint, basics.checkpoint_timeline), (known.checkpoint, known.checkpoint_timeline));
    assert!(matches!(ControlBasics::parse(&torn), Err(ControlError::Version { .. })));
}
