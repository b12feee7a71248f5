//! Every reader as a function of bytes, for fuzzers and for the test that feeds them with samples and mutations.
//!
//! A target reads the bytes as the reader's input and, where there is one, checks what must hold for whatever was accepted: that it is
//! written back as it was read. It panics only if that does not hold.

use crate::backup_history::BackupHistory;
use crate::backup_label::BackupLabel;
use crate::control_file::{ControlFile, poison_checkpoint};
use crate::data_directory::classify;
use crate::lsn::Lsn;
use crate::page::{Checksums, inspect, second_look};
use crate::segment::{SegmentName, SegmentSize};
use crate::system_identifier::SystemIdentifier;
use crate::tablespace_map;
use crate::timeline::Timeline;
use crate::timeline_history::TimelineHistory;
use crate::wal_changes::{self as changes, ChangeMap, ChangeScan, SegmentChanges, join};
use crate::wal_name::WalFileName;
use crate::wal_segment::{Expected, PAGE_BYTES, SegmentScan};

/// A reader fed with bytes.
pub type Target = fn(&[u8]);

/// All targets, with the name of the room each of them tests.
pub const ALL: &[(&str, Target)] = &[
    ("names", names),
    ("wal_segment", wal_segment),
    ("wal_changes", wal_changes),
    ("wal_record", wal_record),
    ("wal_summary", wal_summary),
    ("timeline_history", timeline_history),
    ("control_file", control_file),
    ("backup_label", backup_label),
    ("backup_history", backup_history),
    ("tablespace_map", tablespace_map),
    ("page", page),
    ("data_directory", data_directory),
];

/// LSNs, timelines, identifiers and file names.
pub fn names(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(name) = text.parse::<WalFileName>() {
        assert_eq!(name.to_string(), text, "a file name has one spelling");
    }
    if let Ok(name) = text.parse::<SegmentName>() {
        assert_eq!(name.to_string(), text, "a segment name has one spelling");
    }
    if let Ok(identifier) = text.parse::<SystemIdentifier>() {
        assert_eq!(identifier.to_string(), text, "a system identifier has one spelling");
    }
    if let Ok(lsn) = text.parse::<Lsn>() {
        assert_eq!(lsn.to_string().parse(), Ok(lsn), "an LSN is read back");
    }
    let _ = text.parse::<Timeline>();
}

/// What a segment file must be, taken from its own first page, so that mutations get past the identity checks.
fn expected_of(bytes: &[u8]) -> Expected {
    let field = |at: usize| {
        bytes.get(at..at + 8).and_then(|field| field.first_chunk()).map_or(0, |field| u64::from_le_bytes(*field))
    };
    let size = SegmentSize::from_bytes(field(32) & 0xFFFF_FFFF).unwrap_or(SegmentSize::MIN);
    let number = crate::segment::SegmentNumber::containing(Lsn::new(field(8)), size);
    Expected {
        name: SegmentName::new(Timeline::FIRST, number, size),
        size,
        system_identifier: SystemIdentifier::new(field(24)),
        partial: false,
    }
}

/// A segment file.
pub fn wal_segment(bytes: &[u8]) {
    let expected = expected_of(bytes);
    let mut scan = SegmentScan::new(expected);
    for chunk in bytes.chunks(PAGE_BYTES * 3) {
        if scan.push(chunk).is_err() {
            break;
        }
    }
    if let Ok(report) = scan.finish() {
        let number = expected.name.number(expected.size).unwrap_or(crate::segment::SegmentNumber::new(0));
        let start = number.start(expected.size);
        assert!(
            (start..=number.end(expected.size)).contains(&report.logical_end),
            "the records end within the segment"
        );
        assert!(!report.end.is_complete() || report.damage.is_none(), "a complete segment is not damaged");
    }
}

/// Changes as bytes, and the changes of a segment file, alone and joined with themselves.
pub fn wal_changes(bytes: &[u8]) {
    if let Ok(map) = ChangeMap::decode(bytes) {
        assert_eq!(map.encode(), bytes, "a map has one encoding");
    }
    if let Ok(changes) = SegmentChanges::decode(bytes) {
        assert_eq!(changes.encode(), bytes, "changes have one encoding");
        let _ = join(changes.start..changes.told_until(), [&changes]);
    }
    let mut scan = ChangeScan::new(expected_of(bytes));
    for chunk in bytes.chunks(PAGE_BYTES * 3) {
        if scan.push(chunk).is_err() {
            break;
        }
    }
    if let Ok((_, changes)) = scan.finish() {
        let encoded = changes.encode();
        assert_eq!(SegmentChanges::decode(&encoded).as_ref(), Ok(&changes), "what a scan tells is read back");
        let _ = join(changes.start..changes.told_until(), [&changes]);
        let mut next = changes.clone();
        next.start = changes.told_until();
        let _ = join(changes.start..next.told_until(), [&changes, &next, &changes]);
    }
}

/// A record that passed its checksum, of each version, whole and as the beginning of a longer one.
pub fn wal_record(bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    for postgres_major in [14, 15, 18] {
        let whole = changes::of_record(postgres_major, bytes, length);
        // Of a longer one the same is told, or nothing; less only of a list of dropped relations.
        let _ = changes::of_record(postgres_major, bytes, length.saturating_add(5000));
        if let (Some(whole), Some(head)) = (whole, bytes.get(..bytes.len().min(changes::HEAD_BYTES))) {
            let is_ordinary = bytes.get(17).is_some_and(|&manager| manager > 4);
            let beginning = changes::of_record(postgres_major, head, length);
            assert!(!is_ordinary || beginning.is_some_and(|map| map == whole), "the beginning of a record tells all");
        }
    }
}

/// A WAL summary.
pub fn wal_summary(bytes: &[u8]) {
    if let Ok(map) = crate::wal_summary::parse(bytes) {
        assert_eq!(ChangeMap::decode(&map.encode()), Ok(map), "a summary's map is read back");
    }
}

/// A history file of the newest possible timeline.
pub fn timeline_history(bytes: &[u8]) {
    let Some(timeline) = Timeline::new(u32::MAX) else { return };
    if let Ok(history) = TimelineHistory::parse(timeline, bytes) {
        assert_eq!(TimelineHistory::parse(timeline, &history.format()), Ok(history), "a history is read back");
    }
}

/// A control file, and its poisoned copy.
pub fn control_file(bytes: &[u8]) {
    if ControlFile::parse(bytes).is_ok() {
        let mut copy = bytes.to_vec();
        assert!(
            poison_checkpoint(&mut copy).is_ok() && ControlFile::parse(&copy).is_ok(),
            "a poisoned file is read back"
        );
    }
}

/// A label file.
pub fn backup_label(bytes: &[u8]) {
    let _ = BackupLabel::parse(bytes);
}

/// A backup history file.
pub fn backup_history(bytes: &[u8]) {
    let Ok(WalFileName::BackupHistory { segment, offset }) = "000000010000000000000007.00000028.backup".parse() else {
        return;
    };
    let _ = BackupHistory::parse(segment, offset, bytes);
}

/// A tablespace map.
pub fn tablespace_map(bytes: &[u8]) {
    if let Ok(links) = tablespace_map::parse(bytes) {
        assert_eq!(tablespace_map::parse(&tablespace_map::format(&links)), Ok(links), "a map is read back");
    }
}

/// A data page, with and without checksums.
pub fn page(bytes: &[u8]) {
    for checksums in [Checksums::On, Checksums::Off] {
        let _ = inspect(bytes, 7, Lsn::new(u64::MAX), checksums);
        let _ = second_look(bytes, bytes, 7, Lsn::ZERO, checksums);
    }
}

/// A path within a data directory.
pub fn data_directory(bytes: &[u8]) {
    use std::os::unix::ffi::OsStrExt;
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(bytes));
    let _ = (classify(path, false), classify(path, true));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::samples;

    /// Mutations of each sample, for each target that reads it.
    const ROUNDS: u64 = 400;
    /// Generous for a debug build on a busy machine; an endless or quadratic reader exceeds it.
    const LONGEST: Duration = Duration::from_secs(5);

    /// SplitMix64: small, seeded, good enough to pick bytes.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            mixed ^ (mixed >> 31)
        }

        fn below(&mut self, bound: usize) -> usize {
            (self.next() % bound.max(1) as u64) as usize
        }
    }

    /// One to four changes: a byte, a field of extreme value, a cut, a doubled or removed stretch.
    fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len());
            match random.below(6) {
                0 | 1 if !bytes.is_empty() => bytes[at] = random.next() as u8,
                2 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
                3 => {
                    let extreme = [0, 1, 0x7FFF_FFFF, u32::MAX, 0x4000_0000, 23][random.below(6)].to_le_bytes();
                    let end = bytes.len().min(at + 4);
                    bytes[at..end].copy_from_slice(&extreme[..end - at]);
                }
                4 => bytes.truncate(at),
                _ => {
                    let stretch = bytes[at..bytes.len().min(at + 1 + random.below(64))].to_vec();
                    let to = random.below(bytes.len());
                    bytes.splice(to..to, stretch);
                }
            }
        }
    }

    fn run(name: &str, target: Target, sample: &str, seed: u64, bytes: &[u8]) {
        let started = std::time::Instant::now();
        let outcome = std::panic::catch_unwind(|| target(bytes));
        assert!(outcome.is_ok(), "target {name} panicked on {sample}, seed {seed}");
        assert!(started.elapsed() < LONGEST, "target {name} took {:?} on {sample}, seed {seed}", started.elapsed());
    }

    /// Texts that the file samples do not have.
    const TEXTS: [&str; 6] = [
        "0/1973C78",
        "000000010000000000000016.00000028.backup",
        "00000002.history",
        "16384 /srv/space\n16385 /srv/a\\\nb\n",
        "1\t0/10\tno recovery target specified\n2\t0/20\tbefore 2026-11-23 04:13:15+00\n\n",
        "pg_tblspc/16384/PG_15_202209061/5/16392_fsm.1",
    ];

    #[test]
    fn samples_and_their_mutations_are_answered() {
        let mut inputs = samples::all();
        inputs.extend(TEXTS.map(|text| (text.to_owned(), text.as_bytes().to_vec())));
        for (name, target) in ALL {
            for (sample, bytes) in &inputs {
                run(name, *target, sample, 0, bytes);
                // Whole segments are slow to copy; their readers get them, the others a few.
                let rounds = if bytes.len() > 100_000 && *name != "wal_segment" { 4 } else { ROUNDS };
                let rounds = if bytes.len() > 100_000 { rounds.min(60) } else { rounds };
                for seed in 1..=rounds {
                    let mut changed = bytes.clone();
                    mutate(&mut Random(seed), &mut changed);
                    run(name, *target, sample, seed, &changed);
                }
            }
        }
    }

    /// Puts the checksum at the end right, so that a mutation gets past it.
    fn reseal(bytes: &mut Vec<u8>) {
        bytes.truncate(bytes.len().saturating_sub(4));
        bytes.extend(crc32c::crc32c(bytes).to_le_bytes());
    }

    #[test]
    fn mutations_with_right_checksums() {
        let mut inputs = Vec::new();
        for sample in ["15-full", "15-switch", "18-incomplete"] {
            let (expected, bytes) = samples::wal(sample);
            let mut scan = ChangeScan::new(expected);
            scan.push(&bytes).unwrap();
            let (_, changes) = scan.finish().unwrap();
            inputs.push(("wal_changes", wal_changes as Target, changes.encode()));
            inputs.push(("wal_changes", wal_changes, changes.map.encode()));
        }
        for summary in samples::all().into_iter().filter(|(name, _)| name.ends_with(".summary")) {
            inputs.push(("wal_summary", wal_summary, summary.1));
        }
        for (name, target, bytes) in &inputs {
            for seed in 0..3000 {
                let mut changed = bytes.clone();
                mutate(&mut Random(seed), &mut changed);
                // Most changes would fall on the lists of blocks; the heads are where it is decided what they mean.
                changed.truncate(if seed % 2 == 0 { 300 } else { usize::MAX });
                reseal(&mut changed);
                run(name, *target, "encoded", seed, &changed);
            }
        }
    }

    #[test]
    fn mutated_records() {
        let (_, bytes) = samples::wal("15-full");
        let mut at = PAGE_BYTES + 24;
        let mut seen = 0;
        for seed in 0..20_000 {
            let length = crate::bytes::u32_at(&bytes, at) as usize;
            let fits = length >= 24 && at % PAGE_BYTES + length <= PAGE_BYTES;
            let record = if fits { bytes[at..at + length].to_vec() } else { vec![0; 24] };
            at = if fits { (at + length).next_multiple_of(8) } else { (at / PAGE_BYTES + 1) * PAGE_BYTES + 24 };
            at = if at + PAGE_BYTES > bytes.len() { PAGE_BYTES + 24 } else { at };
            seen += usize::from(fits);
            let mut random = Random(seed);
            let mut changed = record;
            changed.truncate(3000);
            mutate(&mut random, &mut changed);
            if let (Some(manager), true) = (changed.get_mut(17), seed % 4 == 0) {
                *manager = random.below(6) as u8;
            }
            run("wal_record", wal_record, "record", seed, &changed);
        }
        assert!(seen > 5000, "only {seen} records");
    }

    #[test]
    fn mutations_keep_whole_pages_too() {
        // A cut or a moved stretch ends a scan at once; changed bytes alone reach the walk.
        for sample in ["15-full", "15-switch", "15-incomplete", "15-first", "18-switch"] {
            let whole = samples::named(sample);
            for seed in 1..=150 {
                let mut random = Random(seed);
                let mut changed = whole.clone();
                for _ in 0..=random.below(3) {
                    let at = random.below(whole.len());
                    changed[at] = random.next() as u8;
                }
                run("wal_segment", wal_segment, sample, seed, &changed);
            }
        }
    }
}
