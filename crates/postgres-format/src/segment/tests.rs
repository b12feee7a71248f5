//! Segment arithmetic: a table of known answers, and properties over every segment size.

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn size(mib: u64) -> SegmentSize {
    SegmentSize::from_bytes(mib * MIB).unwrap()
}

#[track_caller]
fn check(timeline: u32, lsn: &str, mib: u64, name: &str) {
    let number = SegmentNumber::containing(lsn.parse().unwrap(), size(mib));
    let got = SegmentName::new(Timeline::new(timeline).unwrap(), number, size(mib));
    assert_eq!(got.to_string(), name);
    assert_eq!(got.number(size(mib)), Ok(number));
}

#[test]
fn names() {
    check(1, "0/1000000", 16, "000000010000000000000001");
    check(1, "0/1FFFFFF", 16, "000000010000000000000001");
    check(10, "16/B374D848", 16, "0000000A00000016000000B3");
    check(256, "1/0", 16, "000001000000000100000000");
    check(1, "0/FFFFFFFF", 16, "0000000100000000000000FF");
    check(1, "0/FFFFFFFF", 1, "000000010000000000000FFF");
    check(1, "2/C0000000", 1024, "000000010000000200000003");
    check(u32::MAX, "FFFFFFFF/FFFFFFFF", 64, "FFFFFFFFFFFFFFFF0000003F");
}

#[test]
fn sizes() {
    for mib in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024] {
        assert_eq!(size(mib).segments_per_log(), 4096 / mib);
    }
    for bytes in [0, 1, MIB - 1, MIB + 1, MIB / 2, 3 * MIB, 2048 * MIB, u64::MAX, 1 << 63] {
        assert_eq!(SegmentSize::from_bytes(bytes), Err(SegmentNameError::Size { bytes }));
    }
    assert_eq!(SegmentSize::DEFAULT.bytes(), 16_777_216);
}

#[test]
fn boundaries() {
    let s = SegmentSize::DEFAULT;
    let boundary = Lsn::new(2 * s.bytes());
    assert_eq!(SegmentNumber::containing(boundary, s).as_u64(), 2);
    assert_eq!(SegmentNumber::last_before(boundary, s).as_u64(), 1);
    assert_eq!(SegmentNumber::last_before(Lsn::new(2 * s.bytes() + 1), s).as_u64(), 2);
    assert_eq!(SegmentNumber::last_before(Lsn::ZERO, s).as_u64(), 0);
    assert_eq!(SegmentNumber::new(0).previous(), None);
    assert_eq!(SegmentNumber::new(u64::MAX).next().start(s), Lsn::new(u64::MAX));
    let beyond = SegmentName::new(Timeline::FIRST, SegmentNumber::new(u64::MAX), s);
    assert_eq!(beyond.to_string(), "00000001FFFFFFFF000000FF");
}

#[test]
fn names_refused() {
    for text in [
        "",
        "00000001000000000000000",
        "0000000100000000000000010",
        "00000001000000000000000a",
        "000000000000000000000001",
        "+00000010000000000000001",
        "00000001 000000000000001",
        "00000001000000000000000G",
        "0000000100000000000000é",
    ] {
        assert_eq!(text.parse::<SegmentName>(), Err(SegmentNameError::Name), "{text}");
    }
    let name: SegmentName = "000000010000000000000100".parse().unwrap();
    assert!(matches!(name.number(SegmentSize::DEFAULT), Err(SegmentNameError::BeyondLog { .. })));
    assert_eq!(name.number(size(1)).unwrap().as_u64(), 256);
}

fn any_size() -> impl Strategy<Value = SegmentSize> {
    (0u32..=10).prop_map(|power| size(1 << power))
}

proptest! {
    #[test]
    fn a_position_is_in_its_segment(lsn: u64, size in any_size()) {
        let lsn = Lsn::new(lsn);
        let number = SegmentNumber::containing(lsn, size);
        prop_assert!(number.start(size) <= lsn);
        prop_assert_eq!(number.start(size).as_u64() + size.offset_of(lsn), lsn.as_u64());
        prop_assert!(lsn < number.end(size) || number.end(size) == Lsn::new(u64::MAX));
        prop_assert_eq!(SegmentNumber::last_before(lsn, size), SegmentNumber::containing(Lsn::new(lsn.as_u64().saturating_sub(1)), size));
    }

    #[test]
    fn names_round_trip_and_order(timeline in 1u32.., a: u64, b: u64, size in any_size()) {
        let name = |lsn| SegmentName::new(Timeline::new(timeline).unwrap(), SegmentNumber::containing(Lsn::new(lsn), size), size);
        let (a, b) = (name(a), name(b));
        prop_assert_eq!(a.to_string().parse::<SegmentName>(), Ok(a));
        prop_assert_eq!(a.cmp(&b), a.to_string().cmp(&b.to_string()));
        prop_assert_eq!(a.cmp(&b), a.number(size).unwrap().cmp(&b.number(size).unwrap()));
    }

    #[test]
    fn any_text_is_answered(text in "\\PC{0,30}") {
        let _ = text.parse::<SegmentName>();
    }
}
