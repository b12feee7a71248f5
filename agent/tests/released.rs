//! What a released agent left in its spool, this version goes on from: no answer is forgotten, no copy is lost.
//!
//! ```text
//! tests/released/VERSION/spool    a spool as that version left it: identities, two answers, two copies, a history file
//! ```
//!
//! Samples are never changed. `PGCONVOY_BLESS=1 cargo test -p agent --test released` writes that of this version where there
//! is none yet, which is done once, when it is released.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use agent::ledger::{Answer, FileStamp, Ledger};
use agent::road::Road;
use agent::spool::{Retention, Spool};
use jiff::Timestamp;
use postgres_format::{SystemIdentifier, Timeline};
use repository::wal::{EncodedWal, Sink, WalEncoder, WalFacts};
use uuid::Uuid;

const SYSTEM: SystemIdentifier = SystemIdentifier::new(7_300_000_000_000_000_001);
const REPOSITORY: Uuid = Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001);
const DATA: &str = "/var/lib/postgresql/15/main";
const SEGMENT: &str = "000000010000000000000003";
const HISTORY: &str = "00000002.history";
const HISTORY_TEXT: &[u8] = b"1\t0/4000000\tno recovery target specified\n";
const RETAINED_BYTES_MAX: u64 = 1 << 30;

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/released")
}

fn wal(name: &str, content: &[u8]) -> EncodedWal {
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    encoder.push(content).unwrap();
    let facts = WalFacts {
        cluster: "main".parse().unwrap(),
        system_identifier: SYSTEM,
        name: name.parse().unwrap(),
        node: "db1".parse().unwrap(),
        in_recovery: false,
        complete: true,
        logical_end: None,
        postgres_major: Some(15),
        first_commit_time: None,
        last_commit_time: None,
        written: Timestamp::UNIX_EPOCH,
    };
    encoder.finish(facts).unwrap()
}

fn segment() -> EncodedWal {
    let content: Vec<u8> = (0..1 << 20).map(|place: u32| (place / 77) as u8).collect();
    wal(SEGMENT, &content)
}

/// What was answered, by the road and for the repository it was answered for.
fn answers() -> [(EncodedWal, Answer); 2] {
    let answer = |wal: &EncodedWal, inode: u64, road: Road, repository: Option<Uuid>| Answer {
        stamp: FileStamp {
            system_identifier: SYSTEM,
            device: 65_025,
            inode,
            size_bytes: 1 << 20,
            modified_ns: 1_763_863_298_123_456_789,
            changed_ns: 1_763_863_299_000_000_001,
        },
        fingerprint: wal.fingerprint,
        road,
        repository,
    };
    let (first, second) = (segment(), wal(HISTORY, HISTORY_TEXT));
    let of_first = answer(&first, 11, Road::Coordinator, Some(REPOSITORY));
    let of_second = answer(&second, 12, Road::Direct, None);
    [(first, of_first), (second, of_second)]
}

/// Leaves a spool as an agent does that was killed.
fn write(directory: &Path) {
    let spool = Spool::open(directory, RETAINED_BYTES_MAX).unwrap();
    spool.belong_to(SYSTEM, Path::new(DATA)).unwrap();
    spool.home().told(REPOSITORY).unwrap();
    spool.keep_history(Timeline::new(2).unwrap(), HISTORY_TEXT).unwrap();
    let mut ledger = Ledger::open(&spool.ledger_path()).unwrap();
    for (wal, answer) in answers() {
        assert_eq!(spool.retain(&wal).unwrap(), Retention::Kept);
        ledger.record(wal.header.name, answer).unwrap();
    }
    for empty in ["lock", "overflow", "prefetch"].map(|name| directory.join(name)) {
        let _ = if empty.is_dir() { fs::remove_dir(empty) } else { fs::remove_file(empty) };
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, to) = entry.map(|entry| (entry.path(), to.join(entry.file_name()))).unwrap();
        if entry.is_dir() {
            copy(&entry, &to);
        } else {
            fs::copy(&entry, &to).unwrap();
        }
    }
}

#[tokio::test]
async fn a_released_spool_is_gone_on_from() {
    let own = samples().join(env!("CARGO_PKG_VERSION")).join("spool");
    if std::env::var_os("PGCONVOY_BLESS").is_some() && !own.exists() {
        fs::create_dir_all(&own).unwrap();
        write(&own);
    }
    let mut read_samples = 0;
    for entry in fs::read_dir(samples()).unwrap() {
        let (sample, place) = (entry.unwrap().path(), tempfile::tempdir().unwrap());
        copy(&sample.join("spool"), place.path());
        let named = fs::read_to_string(place.path().join("instance")).unwrap();
        let spool = Spool::open(place.path(), RETAINED_BYTES_MAX).unwrap();
        assert_eq!(spool.instance(), named.trim());
        // The cluster is the same: nothing is thrown away.
        assert!(!spool.belong_to(SYSTEM, Path::new(DATA)).unwrap());
        assert_eq!(spool.home().known(), Some(REPOSITORY));
        assert_eq!(spool.history(Timeline::new(2).unwrap()).as_deref(), Some(HISTORY_TEXT));
        let ledger = Ledger::open(&spool.ledger_path()).unwrap();
        assert_eq!(ledger.len(), 2);
        for (wal, answer) in answers() {
            let name = wal.header.name;
            assert_eq!(ledger.find(&name, &answer.stamp, answer.repository), Some(&answer), "{name}");
            let kept = spool.read_retained(&(name, wal.fingerprint)).await.unwrap().unwrap();
            assert_eq!((kept.header.name, kept.header.system_identifier), (name, SYSTEM));
        }
        assert_eq!(spool.retained_keys().len(), 2);
        read_samples += 1;
    }
    assert!(read_samples > 0, "there is no sample");
}
