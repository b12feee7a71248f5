//! Reading one WAL file, once: is it what its name says, what did its WAL change, and its encoded form, in the same pass.
//!
//! Invariants: a file that changed while it was read is never used; it is the same file before and after, by device, inode,
//! size, modification and change time. A recycled, foreign or damaged segment is refused with the reason. An incomplete
//! segment of the timeline that this node itself writes is refused; one from a standby, or of an older timeline, goes out
//! marked incomplete, because refusing it would stop PostgreSQL's archiver for good (it takes one file after the other).
//! What a segment changed never keeps it from being archived: where that is doubtful, the doubt is written down instead.
//! A history file of either kind must say what its name promises; the one that a power cut can leave blank is taken as it
//! is when PostgreSQL flagged it, for the same reason.
//! Everything here blocks, for as long as a disk does; it runs on the readers' threads.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use postgres_format::archived_text::{self, ArchivedTextError};
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::wal_changes::{ChangeScan, SegmentChanges};
use postgres_format::wal_segment::{Expected, SegmentError, SegmentReport};
use postgres_format::{Lsn, SegmentName, Timeline, WalFileName};
use repository::name::{ClusterName, NodeName};
use repository::wal::{EncodedWal, Sink, WalEncoder, WalError, WalFacts};

use crate::ledger::FileStamp;
use crate::node::{NodeFacts, Recovery};
use crate::regular_file;

/// Bytes read at once: one frame of the encoder, a whole number of WAL pages.
const PIECE_BYTES: usize = 1 << 20;
/// Largest history or backup history file, in bytes.
const TEXT_BYTES_MAX: u64 = archived_text::MAX_BYTES as u64;

/// One file to be read.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Its name.
    pub name: WalFileName,
    /// Where it is.
    pub path: PathBuf,
    /// Whose data directory this is.
    pub facts: NodeFacts,
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// This node.
    pub node: NodeName,
    /// zstd level.
    pub compression_level: i32,
    /// Where the encoded form gathers.
    pub sink: Sink,
    /// Now.
    pub now: Timestamp,
}

/// A file that was read.
#[derive(Debug)]
pub struct Admitted {
    /// Its encoded form.
    pub wal: EncodedWal,
    /// What was read.
    pub stamp: FileStamp,
}

/// Why a file is not archived.
#[derive(Debug, thiserror::Error)]
pub enum AdmitError {
    /// It is not there.
    #[error("{name} is not there")]
    Absent {
        /// The file.
        name: WalFileName,
    },
    /// It cannot be read.
    #[error("cannot read {name}")]
    Unreadable {
        /// The file.
        name: WalFileName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It changed while it was read; try again.
    #[error("{name} changed while it was read")]
    Changed {
        /// The file.
        name: WalFileName,
    },
    /// It is no segment of this cluster and name.
    #[error("not archived")]
    Segment(#[source] SegmentError),
    /// Its records break off with valid pages behind.
    #[error("{name} is damaged at {at}: {reason}; look at the disk, and at standbys for a good copy")]
    Damaged {
        /// The file.
        name: WalFileName,
        /// Where.
        at: Lsn,
        /// What.
        reason: &'static str,
    },
    /// It is not finished.
    #[error("{name} ends at {end}, before its last byte and without a switch; it is not finished")]
    Incomplete {
        /// The file.
        name: WalFileName,
        /// Where its records end.
        end: Lsn,
    },
    /// Its pages are of a timeline that does not lead to its own.
    #[error("{name} begins on timeline {found}, which is no ancestor of its own")]
    NotAncestor {
        /// The file.
        name: WalFileName,
        /// Timeline of its first page.
        found: Timeline,
    },
    /// It is no history file, or no backup history file, of its name.
    #[error("{name} is not what its name says")]
    Text {
        /// The file.
        name: WalFileName,
        /// Why.
        #[source]
        source: ArchivedTextError,
    },
    /// It is longer than such a file can be.
    #[error("{name} has {bytes} bytes, expected at most {TEXT_BYTES_MAX}")]
    TooLong {
        /// The file.
        name: WalFileName,
        /// Its size.
        bytes: u64,
    },
    /// It could not be encoded.
    #[error("{name} could not be encoded")]
    Encode {
        /// The file.
        name: WalFileName,
        /// Why.
        #[source]
        source: Box<WalError>,
    },
    /// The readers have stopped.
    #[error("the agent is stopping")]
    Stopped,
}

impl AdmitError {
    /// Whether the encoded form outgrew its share of memory, and the spool had no room for it.
    pub fn is_spool_full(&self) -> bool {
        let Self::Encode { source, .. } = self else { return false };
        let WalError::Overflow { source, .. } = &**source else { return false };
        matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Reads one file through the encoder.
///
/// # Errors
/// See [`AdmitError`]. The encoder is restarted by the next call.
pub fn admit(admission: &Admission, encoder: &mut WalEncoder, buffer: &mut Vec<u8>) -> Result<Admitted, AdmitError> {
    let name = admission.name;
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => AdmitError::Absent { name },
        _ => AdmitError::Unreadable { name, source },
    };
    let encode = |source| AdmitError::Encode { name, source: Box::new(source) };
    encoder.restart(admission.compression_level, admission.sink.clone()).map_err(encode)?;
    buffer.resize(PIECE_BYTES, 0);
    let mut file = regular_file::open(&admission.path).map_err(unreadable)?;
    let system_identifier = admission.facts.system_identifier;
    let stamp = FileStamp::of(&file.metadata().map_err(unreadable)?, system_identifier);
    let mut content = Content::begin(admission, stamp.size_bytes)?;
    loop {
        let read = read_full(&mut file, buffer).map_err(unreadable)?;
        content.push(&buffer[..read])?;
        encoder.push(&buffer[..read]).map_err(encode)?;
        if read < PIECE_BYTES {
            break;
        }
    }
    let (facts, changes) = content.finish(admission)?;
    let after_open = FileStamp::of(&file.metadata().map_err(unreadable)?, system_identifier);
    let after_path = FileStamp::of(&std::fs::metadata(&admission.path).map_err(unreadable)?, system_identifier);
    if after_open != stamp || after_path != stamp {
        return Err(AdmitError::Changed { name });
    }
    let wal = match changes {
        Some(changes) => encoder.finish_with_changes(facts, &changes),
        None => encoder.finish(facts),
    };
    let wal = wal.map_err(encode)?;
    Ok(Admitted { wal, stamp })
}

fn read_full(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// What is learnt about the content while it streams by.
enum Content {
    Wal(Box<ChangeScan>),
    Text(Vec<u8>),
}

impl Content {
    fn begin(admission: &Admission, size_bytes: u64) -> Result<Self, AdmitError> {
        let name = admission.name;
        match name {
            WalFileName::Segment(segment) | WalFileName::Partial(segment) => {
                let expected_bytes = admission.facts.segment_size.bytes();
                if size_bytes != expected_bytes {
                    let error = SegmentError::Size { name: segment, expected_bytes, found_bytes: size_bytes };
                    return Err(AdmitError::Segment(error));
                }
                Ok(Self::Wal(Box::new(ChangeScan::new(Expected {
                    name: segment,
                    size: admission.facts.segment_size,
                    system_identifier: admission.facts.system_identifier,
                    partial: matches!(name, WalFileName::Partial(_)),
                }))))
            }
            _ if size_bytes > TEXT_BYTES_MAX => Err(AdmitError::TooLong { name, bytes: size_bytes }),
            WalFileName::History(_) | WalFileName::BackupHistory { .. } => Ok(Self::Text(Vec::new())),
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), AdmitError> {
        match self {
            Self::Wal(scan) => scan.push(bytes).map_err(AdmitError::Segment),
            Self::Text(content) => {
                content.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// Gives what goes into the header, and what a segment changed.
    fn finish(self, admission: &Admission) -> Result<(WalFacts, Option<SegmentChanges>), AdmitError> {
        let name = admission.name;
        let mut facts = WalFacts {
            cluster: admission.cluster.clone(),
            system_identifier: admission.facts.system_identifier,
            name,
            node: admission.node.clone(),
            in_recovery: admission.facts.recovery == Recovery::Following,
            complete: true,
            logical_end: None,
            postgres_major: Some(admission.facts.postgres_major),
            first_commit_time: None,
            last_commit_time: None,
            written: admission.now,
        };
        let mut changed = None;
        match self {
            Self::Wal(scan) => {
                let (report, changes) = scan.finish().map_err(AdmitError::Segment)?;
                // A `.partial` is no part of any way to a timeline.
                changed = matches!(name, WalFileName::Segment(_)).then_some(changes);
                check_report(admission, &report)?;
                facts.complete = report.end.is_complete();
                facts.logical_end = report.postgres_major.map(|_| report.logical_end);
                facts.postgres_major = report.postgres_major.or(facts.postgres_major);
                facts.first_commit_time = report.first_commit_time;
                facts.last_commit_time = report.last_commit_time;
            }
            Self::Text(content) => check_text(admission, &content)?,
        }
        Ok((facts, changed))
    }
}

fn check_text(admission: &Admission, content: &[u8]) -> Result<(), AdmitError> {
    let name = admission.name;
    match archived_text::check(name, content) {
        Ok(()) => Ok(()),
        Err(error) if error.is_left_blank() && is_flagged(admission) => {
            tracing::warn!(file = %name, "{error}, as a power cut can leave it; it is archived so, and nothing needs it");
            Ok(())
        }
        Err(source) => Err(AdmitError::Text { name, source }),
    }
}

/// Whether PostgreSQL itself wants the file archived.
fn is_flagged(admission: &Admission) -> bool {
    let directory = admission.path.parent().unwrap_or(Path::new("."));
    directory.join("archive_status").join(format!("{}.ready", admission.name)).exists()
}

fn check_report(admission: &Admission, report: &SegmentReport) -> Result<(), AdmitError> {
    let name = admission.name;
    if let Some(damage) = report.damage {
        return Err(AdmitError::Damaged { name, at: damage.at, reason: damage.reason });
    }
    if report.first_page_timeline != name.timeline() && !is_ancestor(admission, report.first_page_timeline) {
        return Err(AdmitError::NotAncestor { name, found: report.first_page_timeline });
    }
    let own_tail = matches!(name, WalFileName::Segment(_))
        && admission.facts.recovery == Recovery::Writing
        && name.timeline() >= admission.facts.timeline;
    if own_tail && !report.end.is_complete() {
        return Err(AdmitError::Incomplete { name, end: report.logical_end });
    }
    Ok(())
}

/// By the file's own timeline history beside it; without one, an earlier timeline is taken for an ancestor.
fn is_ancestor(admission: &Admission, found: Timeline) -> bool {
    let timeline = admission.name.timeline();
    let directory = admission.path.parent().unwrap_or(Path::new("."));
    let content = regular_file::read(&directory.join(WalFileName::History(timeline).to_string()), TEXT_BYTES_MAX).ok();
    let history = content.and_then(|content| TimelineHistory::parse(timeline, &content).ok());
    let start = admission.name.segment().and_then(|segment: SegmentName| {
        Some(segment.number(admission.facts.segment_size).ok()?.start(admission.facts.segment_size))
    });
    match (history, start) {
        (Some(history), Some(start)) => history.contains(found, start),
        _ => found < timeline,
    }
}

#[cfg(test)]
mod tests;
