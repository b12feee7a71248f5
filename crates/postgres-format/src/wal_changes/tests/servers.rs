//! Segments of live servers.

use super::*;
use crate::samples::wal;

/// Every sample of WAL that is a segment, scanned.
#[test]
fn live_segments_are_understood() {
    for sample in [
        "15-full",
        "14-switch",
        "15-switch",
        "16-switch",
        "17-switch",
        "18-switch",
        "15-incomplete",
        "18-incomplete",
        "15-first",
    ] {
        let (expected, bytes) = wal(sample);
        let mut scan = ChangeScan::new(expected);
        scan.push(&bytes).unwrap();
        let (report, changes) = scan.finish().unwrap();
        assert_eq!((changes.doubt.clone(), Some(changes.postgres_major)), (None, report.postgres_major), "{sample}");
        assert_eq!((changes.end, changes.logical_end), (report.end, report.logical_end));
        assert!(changes.map.block_count() > 0, "{sample}");
        assert!(changes.map.forks().all(|(fork, _)| fork.relation > 0 && fork.tablespace > 1600), "{sample}");
        let bytes = changes.encode();
        assert!(bytes.len() < 4000, "{sample}: {} bytes", bytes.len());
        assert_eq!(SegmentChanges::decode(&bytes), Ok(changes));
    }
}
