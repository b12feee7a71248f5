//! The data directory of this node: whose it is, read from `pg_control`, without asking the server.
//!
//! Invariants: read-only. What is read is at most [`FRESH`] old, because a restore may put another cluster there while the
//! agent runs, and a promotion changes the role. A caller that names another working directory is recognised by device and
//! inode, so that symbolic links do not matter.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use postgres_format::control_file::{ClusterState, ControlBasics, ControlError, ControlFile, FILE_BYTES};
use postgres_format::{Lsn, SegmentSize, SystemIdentifier, Timeline, WalFileName};
use process::clock::Monotonic;

/// Age at which facts are read again.
const FRESH: Duration = Duration::from_millis(500);
/// Attempts to read `pg_control` between two writes of the server.
const READ_ATTEMPTS: u32 = 5;
/// Largest `PG_VERSION` read, in bytes.
const VERSION_BYTES_MAX: u64 = 64;

/// Why nothing is known of the data directory.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `pg_control` is not one, however often it is read.
    #[error("{} cannot be understood", path.display())]
    Control {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ControlError,
    },
    /// `PG_VERSION` holds no version.
    #[error("{} holds no version", path.display())]
    Version {
        /// The file.
        path: PathBuf,
    },
}

/// Whether the server follows WAL or writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// In archive recovery or a standby.
    Following,
    /// Out of recovery: the writer of its timeline.
    Writing,
}

/// What is known of the data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// The cluster it belongs to.
    pub system_identifier: SystemIdentifier,
    /// Size of its WAL segments.
    pub segment_size: SegmentSize,
    /// Major version of the server.
    pub postgres_major: u32,
    /// Whether it follows or writes.
    pub recovery: Recovery,
    /// The newest timeline that `pg_control` tells of; of a server newer than known that of its last checkpoint.
    pub timeline: Timeline,
    /// Position of the last checkpoint.
    pub checkpoint: Lsn,
}

/// The data directory.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    facts: Mutex<Option<(Monotonic, NodeFacts)>>,
}

impl DataDirectory {
    /// The data directory at this path; it need not exist yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, facts: Mutex::new(None) }
    }

    /// Its path as configured.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its WAL directory.
    pub fn pg_wal(&self) -> PathBuf {
        self.path.join("pg_wal")
    }

    /// Whether a caller's working directory is this directory.
    pub fn is_same(&self, other: &Path) -> bool {
        match (std::fs::metadata(&self.path), std::fs::metadata(other)) {
            (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
            _ => false,
        }
    }

    /// What is known now.
    ///
    /// # Errors
    /// When there is no data directory yet, or its files cannot be read.
    pub fn facts(&self) -> Result<NodeFacts, NodeError> {
        let mut cached = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, facts)) = cached.as_ref().filter(|(read_at, _)| read_at.elapsed() < FRESH) {
            return Ok(facts.clone());
        }
        *cached = None;
        let facts = self.read()?;
        *cached = Some((Monotonic::now(), facts.clone()));
        Ok(facts)
    }

    fn read(&self) -> Result<NodeFacts, NodeError> {
        let control = match self.control_file(ControlFile::parse) {
            Err(error @ NodeError::Control { source: ControlError::Version { .. }, .. }) => {
                return self.read_newer(error);
            }
            control => control?,
        };
        let postgres_major = match control.postgres_major() {
            Some(major) => major,
            None => self.version_file()?,
        };
        Ok(NodeFacts {
            system_identifier: control.system_identifier,
            segment_size: control.wal_segment_size,
            postgres_major,
            recovery: recovery_of(control.state),
            timeline: newest_timeline(&control),
            checkpoint: control.checkpoint,
        })
    }

    /// As [`DataDirectory::read`], of a server newer than known: its WAL is archived all the same, and nothing else is done.
    fn read_newer(&self, unknown: NodeError) -> Result<NodeFacts, NodeError> {
        let basics = self.control_file(ControlBasics::parse)?;
        Ok(NodeFacts {
            system_identifier: basics.system_identifier,
            segment_size: self.size_of_segments()?.ok_or(unknown)?,
            postgres_major: self.version_file()?,
            recovery: recovery_of(basics.state),
            timeline: basics.checkpoint_timeline,
            checkpoint: basics.checkpoint,
        })
    }

    /// The size of the first segment that lies in `pg_wal`; all have the same.
    fn size_of_segments(&self) -> Result<Option<SegmentSize>, NodeError> {
        let path = self.pg_wal();
        let unreadable = |source| NodeError::Unreadable { path: path.clone(), source };
        for entry in std::fs::read_dir(&path).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            if let Some(Ok(WalFileName::Segment(_))) = entry.file_name().to_str().map(str::parse) {
                return Ok(SegmentSize::from_bytes(entry.metadata().map_err(unreadable)?.len()).ok());
            }
        }
        Ok(None)
    }

    /// The control file; a torn read is repeated, because a server may be rewriting it.
    fn control_file<T>(&self, parse: impl Fn(&[u8]) -> Result<T, ControlError>) -> Result<T, NodeError> {
        let path = self.path.join("global/pg_control");
        let mut attempts = 0;
        loop {
            attempts += 1;
            let bytes = read_bounded(&path, FILE_BYTES as u64 + 1)?;
            match parse(&bytes) {
                Ok(control) => return Ok(control),
                Err(source) if attempts == READ_ATTEMPTS => return Err(NodeError::Control { path, source }),
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    fn version_file(&self) -> Result<u32, NodeError> {
        let path = self.path.join("PG_VERSION");
        let bytes = read_bounded(&path, VERSION_BYTES_MAX)?;
        let text = String::from_utf8_lossy(&bytes);
        text.trim().parse().map_err(|_| NodeError::Version { path })
    }
}

/// From a promotion until its checkpoint has ended only the minimum recovery point is on the new timeline; PostgreSQL takes the
/// later of both, too (`InitWalRecovery`).
fn newest_timeline(control: &ControlFile) -> Timeline {
    control
        .min_recovery_point_timeline
        .map_or(control.checkpoint_timeline, |least| least.max(control.checkpoint_timeline))
}

fn recovery_of(state: ClusterState) -> Recovery {
    if state.is_in_recovery() { Recovery::Following } else { Recovery::Writing }
}

fn read_bounded(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, NodeError> {
    let unreadable = |source| NodeError::Unreadable { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(limit_bytes).read_to_end(&mut bytes)).map_err(unreadable)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promotion_is_seen_before_its_checkpoint_has_ended() {
        let mut control = ControlFile::parse(&crate::testing::sample("pg_control")).unwrap();
        let mut newest = |checkpoint: u32, least: u32| {
            control.checkpoint_timeline = Timeline::new(checkpoint).unwrap();
            control.min_recovery_point_timeline = Timeline::new(least);
            newest_timeline(&control).get()
        };
        assert_eq!([newest(1, 0), newest(1, 2), newest(2, 1), newest(3, 3)], [1, 2, 2, 3]);
    }

    #[test]
    fn a_server_newer_than_known_is_archived() {
        let folder = tempfile::tempdir().unwrap();
        for directory in ["global", "pg_wal"] {
            std::fs::create_dir(folder.path().join(directory)).unwrap();
        }
        let mut control = crate::testing::sample("pg_control");
        std::fs::write(folder.path().join("global/pg_control"), &control).unwrap();
        let known = DataDirectory::new(folder.path().to_owned()).facts().unwrap();
        control[8..12].copy_from_slice(&2100_u32.to_le_bytes());
        let crc = crc32c::crc32c(&control[..296]);
        control[296..300].copy_from_slice(&crc.to_le_bytes());
        std::fs::write(folder.path().join("global/pg_control"), &control).unwrap();
        std::fs::write(folder.path().join("PG_VERSION"), "21\n").unwrap();
        let newer = DataDirectory::new(folder.path().to_owned());
        assert!(matches!(newer.facts(), Err(NodeError::Control { source: ControlError::Version { .. }, .. })));
        let segment = File::create(folder.path().join("pg_wal/000000010000000000000001")).unwrap();
        segment.set_len(known.segment_size.bytes()).unwrap();
        assert_eq!(newer.facts().unwrap(), NodeFacts { postgres_major: 21, ..known });
    }
}
