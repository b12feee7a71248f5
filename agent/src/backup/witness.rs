//! Takes the witnesses of a backup out of this server's own `pg_wal`, see [`repository::witness`].
//!
//! The first is taken right after the start, while its segment cannot have been recycled: up to the end of the checkpoint
//! record that `pg_control` names. The last is taken after the stop: up to the stop. What lies there is written and
//! flushed, and is never changed again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline};
use repository::witness::WalWitness;

use super::copy::read_control;
use super::describe::Facts;
use super::{BackupError, BackupNode};
use crate::postgres::Identity;

/// Longest record taken for a checkpoint's, in bytes; it has 114 of them in version 15.
const CHECKPOINT_RECORD_BYTES_MAX: u64 = 1024;
/// Shortest record: its header.
const RECORD_HEADER_BYTES: u64 = 24;
/// Header of a WAL page that does not begin a segment.
const PAGE_HEADER_BYTES: u64 = 24;
/// Header of a segment's first page.
const SEGMENT_HEADER_BYTES: usize = 40;
/// Size of a WAL page.
const PAGE_BYTES: u64 = 8192;
/// Attempts to find the checkpoint: another one may have come between.
const ATTEMPTS: u32 = 5;
/// Wait between them.
const ATTEMPT_WAIT: Duration = Duration::from_millis(200);

/// The WAL of one server.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnWal<'a> {
    /// Its data directory.
    pub(super) data_directory: &'a Path,
    /// Whose pages are looked for.
    pub(super) system_identifier: SystemIdentifier,
    /// Size of a segment.
    pub(super) segment_size: SegmentSize,
}

impl<'a> OwnWal<'a> {
    pub(super) fn of(node: &'a BackupNode, identity: &Identity) -> Self {
        let (system_identifier, segment_size) = (identity.system_identifier, identity.segment_size);
        Self { data_directory: &node.data_directory, system_identifier, segment_size }
    }

    /// All witnesses of a stopped backup, given the one that was taken when it began.
    pub(super) fn of_backup(self, first: WalWitness, facts: &Facts) -> Result<Vec<WalWitness>, BackupError> {
        let timelines = [facts.stop_timeline, facts.start_timeline];
        let mut witnesses = vec![first];
        // Another checkpoint may have come before the first one was taken; that of the label may be recycled by now.
        witnesses.extend(self.of_checkpoint(facts.checkpoint, &timelines).ok().filter(|witness| *witness != first));
        witnesses.push(self.until(facts.stop.stop_lsn, &timelines)?);
        Ok(witnesses)
    }
    /// The witness that ends with the newest checkpoint's record; `timeline` is that of the server.
    pub(super) async fn at_checkpoint(self, timeline: Timeline) -> Result<WalWitness, BackupError> {
        let mut attempt = 1;
        loop {
            let (control, _) = read_control(self.data_directory).await?;
            let taken = self.of_checkpoint(control.checkpoint, &[timeline, control.checkpoint_timeline]);
            match taken {
                Err(_) if attempt < ATTEMPTS => {
                    attempt += 1;
                    tokio::time::sleep(ATTEMPT_WAIT).await;
                }
                taken => return taken,
            }
        }
    }

    /// The witness that ends with the record of a checkpoint, or with the segment if that ends before.
    pub(super) fn of_checkpoint(self, checkpoint: Lsn, timelines: &[Timeline]) -> Result<WalWitness, BackupError> {
        let number = SegmentNumber::containing(checkpoint, self.segment_size);
        let mut length = [0; 4];
        self.read(number, timelines, checkpoint, &mut length)?;
        let length = u64::from(u32::from_le_bytes(length));
        if !(RECORD_HEADER_BYTES..=CHECKPOINT_RECORD_BYTES_MAX).contains(&length) {
            return Err(unreadable(checkpoint, format!("a record of {length} bytes is no checkpoint")));
        }
        let at = checkpoint.as_u64();
        let crosses = at / PAGE_BYTES != (at + length - 1) / PAGE_BYTES;
        let end = at + length + if crosses { PAGE_HEADER_BYTES } else { 0 };
        let segment_end = number.next().start(self.segment_size);
        self.until(Lsn::new(end).min(segment_end), timelines)
    }

    /// The witness that ends at `end`.
    pub(super) fn until(self, end: Lsn, timelines: &[Timeline]) -> Result<WalWitness, BackupError> {
        let stretch = WalWitness::stretch(end, self.segment_size);
        let mut bytes = vec![0; (stretch.end.as_u64() - stretch.start.as_u64()) as usize];
        let number = SegmentNumber::last_before(end, self.segment_size);
        self.read(number, timelines, stretch.start, &mut bytes)?;
        Ok(WalWitness::of(stretch, &bytes))
    }

    /// Reads from the first of the timelines whose file of the segment is there and holds that segment.
    fn read(
        self,
        number: SegmentNumber,
        timelines: &[Timeline],
        from: Lsn,
        bytes: &mut [u8],
    ) -> Result<(), BackupError> {
        let mut why = String::new();
        for timeline in timelines {
            let name = SegmentName::new(*timeline, number, self.segment_size);
            match self.read_file(name, number, from, bytes) {
                Ok(()) => return Ok(()),
                Err(error) => why = format!("{name}: {error}"),
            }
        }
        Err(unreadable(from, why))
    }

    fn read_file(self, name: SegmentName, number: SegmentNumber, from: Lsn, bytes: &mut [u8]) -> io::Result<()> {
        let begin = number.start(self.segment_size).as_u64();
        let file = File::open(self.data_directory.join("pg_wal").join(name.to_string()))?;
        file.read_exact_at(bytes, from.as_u64() - begin)?;
        // Looked at last: a file that is recycled meanwhile holds another segment by then.
        let mut header = [0; SEGMENT_HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let number_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| header[at + index]));
        if number_at(8) != begin || number_at(24) != self.system_identifier.as_u64() {
            return Err(io::Error::other("it holds another segment or another system's"));
        }
        Ok(())
    }
}

fn unreadable(lsn: Lsn, reason: String) -> BackupError {
    BackupError::Witness { lsn, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;
    const SYSTEM: SystemIdentifier = SystemIdentifier::new(7);

    /// Writes segment 3 of a timeline.
    fn segment(folder: &Path, timeline: u32, begin: u64, fill: u8) -> Vec<u8> {
        let mut content = vec![fill; SIZE.bytes() as usize];
        content[8..16].copy_from_slice(&begin.to_le_bytes());
        content[24..32].copy_from_slice(&SYSTEM.as_u64().to_le_bytes());
        std::fs::create_dir_all(folder.join("pg_wal")).unwrap();
        std::fs::write(folder.join(format!("pg_wal/{timeline:08X}0000000000000003")), &content).unwrap();
        content
    }

    #[test]
    fn a_witness_is_read_from_the_servers_own_segment() {
        let folder = tempfile::tempdir().unwrap();
        let wal = OwnWal { data_directory: folder.path(), system_identifier: SYSTEM, segment_size: SIZE };
        let begin = 3 << 24;
        let (one, two) = (Timeline::FIRST, Timeline::new(2).unwrap());
        let content = segment(folder.path(), 1, begin, 5);
        let end = Lsn::new(begin + 3000);
        let witness = wal.until(end, &[two, one]).unwrap();
        assert_eq!(witness, WalWitness::of(WalWitness::stretch(end, SIZE), &content[..3000]));
        // The newest timeline's file is read if it is that segment at all, and not one that is to be used later.
        segment(folder.path(), 2, begin - (1 << 24), 6);
        assert_eq!(wal.until(end, &[two, one]).unwrap(), witness);
        segment(folder.path(), 2, begin, 6);
        assert_ne!(wal.until(end, &[two, one]).unwrap(), witness);
        let gone = wal.until(Lsn::new(9 << 24), &[one]).unwrap_err();
        assert!(matches!(gone, BackupError::Witness { .. }));
    }

    #[test]
    fn a_checkpoints_witness_ends_with_its_record() {
        let folder = tempfile::tempdir().unwrap();
        let wal = OwnWal { data_directory: folder.path(), system_identifier: SYSTEM, segment_size: SIZE };
        let begin = 3u64 << 24;
        let mut content = segment(folder.path(), 1, begin, 0);
        let check = |content: &mut Vec<u8>, at: u64, length: u32, end: Option<u64>| {
            content[at as usize..at as usize + 4].copy_from_slice(&length.to_le_bytes());
            std::fs::write(folder.path().join("pg_wal/000000010000000000000003"), &*content).unwrap();
            let taken = wal.of_checkpoint(Lsn::new(begin + at), &[Timeline::FIRST]);
            assert_eq!(taken.ok().map(|witness| witness.to), end.map(|end| Lsn::new(begin + end)), "at {at}");
        };
        check(&mut content, 40, 114, Some(154));
        check(&mut content, PAGE_BYTES - 16, 114, Some(PAGE_BYTES + 98 + PAGE_HEADER_BYTES));
        check(&mut content, SIZE.bytes() - 16, 114, Some(SIZE.bytes()));
        check(&mut content, 4096, 5, None);
        check(&mut content, 4096, 0, None);
    }
}
