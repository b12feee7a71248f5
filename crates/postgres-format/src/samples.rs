//! Files taken from real servers, for tests (`samples/make.sh` makes them).

use std::path::PathBuf;

use crate::control_file::ControlFile;
use crate::segment::SegmentSize;
use crate::wal_name::WalFileName;
use crate::wal_segment::{Expected, SegmentError, SegmentReport, SegmentScan};

/// All samples by name, sorted, uncompressed.
pub(crate) fn all() -> Vec<(String, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("samples");
    let mut samples: Vec<(String, Vec<u8>)> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_none_or(|extension| extension != "sh"))
        .map(|path| {
            let bytes = std::fs::read(&path).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            match name.strip_suffix(".zst") {
                Some(name) => (name.to_owned(), zstd::decode_all(bytes.as_slice()).unwrap()),
                None => (name.to_owned(), bytes),
            }
        })
        .collect();
    samples.sort();
    assert!(samples.len() > 15, "the samples are missing");
    samples
}

/// The one sample whose name begins so.
#[track_caller]
pub(crate) fn named(prefix: &str) -> Vec<u8> {
    found(prefix).1
}

#[track_caller]
fn found(prefix: &str) -> (String, Vec<u8>) {
    let mut samples: Vec<_> = all().into_iter().filter(|(name, _)| name.starts_with(prefix)).collect();
    assert_eq!(samples.len(), 1, "samples that begin with {prefix}");
    samples.remove(0)
}

/// A sample of WAL, and what it must be in the cluster it is from.
#[track_caller]
pub(crate) fn wal(prefix: &str) -> (Expected, Vec<u8>) {
    let (sample, bytes) = found(prefix);
    let (major, rest) = sample.split_once('-').unwrap();
    let name: WalFileName = rest.rsplit('-').next().unwrap().parse().unwrap();
    let control = ControlFile::parse(&named(&format!("{major}-pg_control"))).unwrap();
    let expected = Expected {
        name: name.segment().unwrap(),
        size: SegmentSize::MIN,
        system_identifier: control.system_identifier,
        partial: matches!(name, WalFileName::Partial(_)),
    };
    (expected, bytes)
}

/// A scan of bytes in chunks of `chunk_bytes`.
pub(crate) fn scan(expected: Expected, bytes: &[u8], chunk_bytes: usize) -> Result<SegmentReport, SegmentError> {
    let mut scan = SegmentScan::new(expected);
    for chunk in bytes.chunks(chunk_bytes) {
        scan.push(chunk)?;
    }
    scan.finish()
}
