//! `global/pg_control`: who a cluster is, of what geometry, and where its last checkpoint was.
//!
//! The file is one C struct of the host's byte order, padded with zeros to 8192 bytes, with a CRC-32C behind the last field. Nothing is
//! believed before the checksum matches; a server may be rewriting the file while it is read, so a mismatch is for the caller to retry.
//! Offsets per version are from `src/include/catalog/pg_control.h`; 14 to 18 were checked on live servers, 19 is by the
//! source of its beta. A newer version is refused by name: its layout is unknown.

use crate::bytes::{i64_at, u32_at, u64_at};
use crate::lsn::Lsn;
use crate::segment::SegmentSize;
use crate::system_identifier::SystemIdentifier;
use crate::timeline::Timeline;
use crate::transaction_id::FullTransactionId;

/// Bytes in the file, in every version (`PG_CONTROL_FILE_SIZE`).
pub const FILE_BYTES: usize = 8192;

/// The checkpoint that [`poison_checkpoint`] writes: within segment zero, where no server ever has WAL.
pub const POISONED_CHECKPOINT: Lsn = Lsn::new(0xDEAD);

/// Where a checksum is looked for in a file of unknown layout.
const CRC_PLACES: std::ops::Range<usize> = 256..508;

const VERSION_AT: usize = 8;
const CATALOG_VERSION_AT: usize = 12;
const STATE_AT: usize = 16;
const WRITTEN_AT: usize = 24;
const CHECKPOINT_AT: usize = 32;
const CHECKPOINT_REDO_AT: usize = 40;
const CHECKPOINT_TIMELINE_AT: usize = 48;
const FULL_PAGE_WRITES_AT: usize = 56;

/// Offsets of the fields that moved between versions; those before them never did.
struct Layout {
    /// `PG_CONTROL_VERSION`.
    versions: &'static [u32],
    /// `nextXid` of the checkpoint copy, where its place was seen on a live server.
    next_xid: Option<usize>,
    min_recovery_point: usize,
    backup_start: usize,
    wal_level: usize,
    block_size: usize,
    relation_segment_blocks: usize,
    wal_page_size: usize,
    wal_segment_size: usize,
    checksum_version: usize,
    crc: usize,
}

const LAYOUT_OF_14: Layout = Layout {
    versions: &[1300, 1700],
    next_xid: Some(64),
    min_recovery_point: 136,
    backup_start: 152,
    wal_level: 172,
    block_size: 216,
    relation_segment_blocks: 220,
    wal_page_size: 224,
    wal_segment_size: 228,
    checksum_version: 252,
    crc: 288,
};
const LAYOUTS: [Layout; 3] = [
    LAYOUT_OF_14,
    Layout { versions: &[1800], crc: 292, ..LAYOUT_OF_14 },
    Layout {
        versions: &[1902],
        // 19 added fields of eight bytes to the checkpoint copy, before or behind this one.
        next_xid: None,
        min_recovery_point: 144,
        backup_start: 160,
        wal_level: 180,
        block_size: 224,
        relation_segment_blocks: 228,
        wal_page_size: 236,
        wal_segment_size: 240,
        checksum_version: 264,
        crc: 304,
    },
];

/// Catalog versions of the releases that share control version 1300.
const MAJORS_OF_1300: [(u32, u32); 3] = [(202_107_181, 14), (202_209_061, 15), (202_307_071, 16)];

/// The facts of a control file whose checksum matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    version: u32,
    /// The cluster.
    pub system_identifier: SystemIdentifier,
    /// Names the layout of the catalogs, and so the tablespace directories (`PG_15_202209061`).
    pub catalog_version: u32,
    /// What the server was doing when it wrote the file.
    pub state: ClusterState,
    /// When it wrote the file, in seconds since 1970-01-01 UTC.
    pub written_unix_seconds: i64,
    /// The last checkpoint record.
    pub checkpoint: Lsn,
    /// Where recovery from that checkpoint begins.
    pub checkpoint_redo: Lsn,
    /// The timeline of that checkpoint.
    pub checkpoint_timeline: Timeline,
    /// `full_page_writes` at that checkpoint.
    pub full_page_writes: bool,
    /// The id that the first transaction after that checkpoint got or gets; `None` where its place in the file is not known for certain.
    pub next_xid: Option<FullTransactionId>,
    /// How far recovery must come before the data is consistent; zero outside recovery.
    pub min_recovery_point: Lsn,
    /// The timeline of that point; `None` outside recovery.
    pub min_recovery_point_timeline: Option<Timeline>,
    /// The start of the backup that is being recovered; zero if none is.
    pub backup_start: Lsn,
    /// `wal_level` as the server numbers it: 0 minimal, 1 replica, 2 logical.
    pub wal_level: u32,
    /// `wal_log_hints`: the first change of a page after a checkpoint is logged also if it is of hint bits alone.
    pub wal_log_hints: bool,
    /// Bytes in a data page.
    pub block_size: u32,
    /// Pages in one file of a relation (131072 unless the server was built otherwise).
    pub relation_segment_blocks: u32,
    /// Bytes in a WAL page.
    pub wal_page_size: u32,
    /// The WAL segment size.
    pub wal_segment_size: SegmentSize,
    /// 0 data checksums off, 1 on; from 19 also 2 and 3 while they are switched off and on.
    pub checksum_version: u32,
}

/// What has stood at the same place in every version so far: enough to archive the WAL of a server whose layout is not known, because
/// archiving must not stop on the day of an upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlBasics {
    /// Identity of the cluster.
    pub system_identifier: SystemIdentifier,
    /// What the server was doing.
    pub state: ClusterState,
    /// The last checkpoint record.
    pub checkpoint: Lsn,
    /// Timeline of the last checkpoint.
    pub checkpoint_timeline: Timeline,
}

/// What the server was doing when it wrote the control file (`DBState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Made by `initdb` or `pg_resetwal`, never started.
    Startup,
    /// Shut down cleanly.
    ShutDown,
    /// Shut down cleanly while in archive recovery.
    ShutDownInRecovery,
    /// Writing its shutdown checkpoint.
    ShuttingDown,
    /// Recovering from a crash, from its own WAL.
    CrashRecovery,
    /// Recovering from an archive or streaming: a standby, or a restore.
    ArchiveRecovery,
    /// Running, or crashed while running.
    Production,
}

/// Why a control file cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Not the size that every version writes: a torn read, or another file.
    #[error("pg_control has {bytes} bytes, expected 8192")]
    Size { bytes: usize },
    /// Written on a host of the other byte order.
    #[error("pg_control was written on a host of another byte order, it can only be read there")]
    ByteOrder,
    /// A layout that is not known. The identifier was at the same place in all versions so far, but is not verified.
    #[error("pg_control has the unknown version {version}, this program understands PostgreSQL 14 to 19")]
    Version { version: u32, unverified_system_identifier: SystemIdentifier },
    /// Torn by a concurrent write, or damaged: read it again, and give up if it stays.
    #[error("the checksum of pg_control is {found:08x}, expected {expected:08x}")]
    Checksum { found: u32, expected: u32 },
    /// A value that no server writes, under a good checksum.
    #[error("pg_control says {what} is {value}, which no server writes")]
    Value { what: &'static str, value: u64 },
}

impl ControlFile {
    /// Reads a whole control file.
    ///
    /// # Errors
    /// [`ControlError`]; a `Checksum` error is worth another read while a server runs.
    pub fn parse(file: &[u8]) -> Result<Self, ControlError> {
        let layout = verified_layout(file)?;
        let u32_of = |at| u32_at(file, at);
        let bad = |what, value: u32| ControlError::Value { what, value: u64::from(value) };
        let checkpoint_timeline = u32_of(CHECKPOINT_TIMELINE_AT);
        let segment_bytes = u32_of(layout.wal_segment_size);
        Ok(Self {
            version: u32_of(VERSION_AT),
            system_identifier: SystemIdentifier::new(u64_at(file, 0)),
            catalog_version: u32_of(CATALOG_VERSION_AT),
            state: ClusterState::from_number(u32_of(STATE_AT)).ok_or_else(|| bad("the state", u32_of(STATE_AT)))?,
            written_unix_seconds: i64_at(file, WRITTEN_AT),
            checkpoint: Lsn::new(u64_at(file, CHECKPOINT_AT)),
            checkpoint_redo: Lsn::new(u64_at(file, CHECKPOINT_REDO_AT)),
            checkpoint_timeline: Timeline::new(checkpoint_timeline).ok_or(bad("the timeline", 0))?,
            full_page_writes: file[FULL_PAGE_WRITES_AT] != 0,
            next_xid: layout.next_xid.map(|at| FullTransactionId::new(u64_at(file, at))),
            min_recovery_point: Lsn::new(u64_at(file, layout.min_recovery_point)),
            min_recovery_point_timeline: Timeline::new(u32_of(layout.min_recovery_point + 8)),
            backup_start: Lsn::new(u64_at(file, layout.backup_start)),
            wal_level: u32_of(layout.wal_level),
            // The field behind `wal_level` in every version.
            wal_log_hints: file[layout.wal_level + 4] != 0,
            block_size: page_size("the block size", u32_of(layout.block_size))?,
            relation_segment_blocks: match u32_of(layout.relation_segment_blocks) {
                0 => return Err(bad("the relation segment size", 0)),
                blocks => blocks,
            },
            wal_page_size: page_size("the WAL page size", u32_of(layout.wal_page_size))?,
            wal_segment_size: SegmentSize::from_bytes(u64::from(segment_bytes))
                .map_err(|_| bad("the WAL segment size", segment_bytes))?,
            checksum_version: u32_of(layout.checksum_version),
        })
    }

    /// `PG_CONTROL_VERSION` of the server that wrote the file.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The major version of the server, or `None` if the catalog version is of no known release.
    pub fn postgres_major(&self) -> Option<u32> {
        match self.version {
            1300 => {
                MAJORS_OF_1300.iter().find(|(catalog, _)| *catalog == self.catalog_version).map(|&(_, major)| major)
            }
            1700 => Some(17),
            1800 => Some(18),
            1902 => Some(19),
            _ => None,
        }
    }

    /// True while every data page carries a checksum that can be relied on.
    pub fn checksums_enabled(&self) -> bool {
        self.checksum_version == 1
    }
}

impl ControlBasics {
    /// Reads them, also from a file of a version newer than known. Such a file is believed if it has a good checksum at any place where a
    /// version could have put it.
    ///
    /// # Errors
    /// [`ControlError`], as [`ControlFile::parse`].
    pub fn parse(file: &[u8]) -> Result<Self, ControlError> {
        match verified_layout(file) {
            Ok(_) => {}
            Err(ControlError::Version { .. }) if has_checksum(file) => {}
            Err(error) => return Err(error),
        }
        let bad = |what, value: u32| ControlError::Value { what, value: u64::from(value) };
        let (state, timeline) = (u32_at(file, STATE_AT), u32_at(file, CHECKPOINT_TIMELINE_AT));
        Ok(Self {
            system_identifier: SystemIdentifier::new(u64_at(file, 0)),
            state: ClusterState::from_number(state).ok_or(bad("the state", state))?,
            checkpoint: Lsn::new(u64_at(file, CHECKPOINT_AT)),
            checkpoint_timeline: Timeline::new(timeline).ok_or(bad("the timeline", timeline))?,
        })
    }
}

fn has_checksum(file: &[u8]) -> bool {
    CRC_PLACES.step_by(4).any(|at| u32_at(file, at) == crc32c::crc32c(&file[..at]))
}

impl ClusterState {
    /// True in archive recovery, running or shut down: what a backup taken from a standby must show. Crash recovery is not meant, its
    /// server is a primary.
    pub const fn is_in_recovery(self) -> bool {
        matches!(self, Self::ShutDownInRecovery | Self::ArchiveRecovery)
    }

    fn from_number(number: u32) -> Option<Self> {
        const STATES: [ClusterState; 7] = [
            ClusterState::Startup,
            ClusterState::ShutDown,
            ClusterState::ShutDownInRecovery,
            ClusterState::ShuttingDown,
            ClusterState::CrashRecovery,
            ClusterState::ArchiveRecovery,
            ClusterState::Production,
        ];
        STATES.get(usize::try_from(number).ok()?).copied()
    }
}

/// Replaces the checkpoint by one that cannot exist and makes the checksum good again.
///
/// A restored cluster takes its checkpoint from `backup_label`. Should somebody remove that file, the server would begin recovery at the
/// checkpoint of `pg_control`, which is later than the backup's start, and be silently corrupt; with the poison it refuses to start.
///
/// # Errors
/// As [`ControlFile::parse`]; the bytes are then unchanged.
pub fn poison_checkpoint(file: &mut [u8]) -> Result<(), ControlError> {
    let crc_at = verified_layout(file)?.crc;
    file[CHECKPOINT_AT..CHECKPOINT_AT + 8].copy_from_slice(&POISONED_CHECKPOINT.as_u64().to_le_bytes());
    let crc = crc32c::crc32c(&file[..crc_at]);
    file[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    Ok(())
}

/// The layout of a file whose size, version and checksum are good.
fn verified_layout(file: &[u8]) -> Result<&'static Layout, ControlError> {
    if file.len() != FILE_BYTES {
        return Err(ControlError::Size { bytes: file.len() });
    }
    let version = u32_at(file, VERSION_AT);
    let Some(layout) = LAYOUTS.iter().find(|layout| layout.versions.contains(&version)) else {
        let known = |version| LAYOUTS.iter().any(|layout| layout.versions.contains(&version));
        if known(version.swap_bytes()) {
            return Err(ControlError::ByteOrder);
        }
        let unverified_system_identifier = SystemIdentifier::new(u64_at(file, 0));
        return Err(ControlError::Version { version, unverified_system_identifier });
    };
    let (found, expected) = (u32_at(file, layout.crc), crc32c::crc32c(&file[..layout.crc]));
    if found == expected { Ok(layout) } else { Err(ControlError::Checksum { found, expected }) }
}

fn page_size(what: &'static str, bytes: u32) -> Result<u32, ControlError> {
    if bytes.is_power_of_two() && (1024..=65536).contains(&bytes) {
        Ok(bytes)
    } else {
        Err(ControlError::Value { what, value: u64::from(bytes) })
    }
}

#[cfg(test)]
mod tests;
