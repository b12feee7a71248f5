//! Which blocks of which relations did WAL change? Learnt while a segment is archived, kept beside it, used by the next increment.
//!
//! Every record names the blocks that it changes in a form that is the same for all kinds of records, so one short reader understands them
//! all, also those of extensions. [`ChangeScan`] reads them in the pass that checks a segment ([`crate::wal_segment`]). What one segment
//! tells alone is its [`SegmentChanges`]: a map, the first bytes of a record that began before it, and the beginning of one that goes on behind
//! it. [`join`] puts those of a range together and either proves that nothing is missing or says what is ([`Doubt`]): then the caller falls back
//! to another way to find changes. A map is never silently incomplete.
//!
//! # What a map promises
//! For the range from the start of a backup to a later redo point: a block of a main fork that exists in both and is not in the map was not
//! changed by WAL in the range. Three kinds of change have no WAL that names a block, and the user of a map must know them:
//! * hint bits without checksums and `wal_log_hints`: both contents of the page are right;
//! * pages of zeros at the end of a relation, made in bulk: a block at or behind the end of the older copy must always be read;
//! * visibility maps, whose bits a change of the heap clears unnamed, and free space maps, which are hardly logged: always read whole, and
//!   not in the maps. Init forks are in the maps, but small and best read whole. Main forks of unlogged relations are in no backup.
//!
//! # Records that change relations otherwise than by naming a block
//! Read in 14 to 18 through `rmgrlist.h`; in the order of the managers' numbers. "limit n" means that nothing of the older copy may be used
//! from block n on.
//!
//! | manager, record | effect | read in |
//! |---|---|---|
//! | XLOG `FPI`, `FPI_FOR_HINT` | name their blocks | `xloginsert.c`, `bufmgr.c` |
//! | XLOG `PARAMETER_CHANGE` (all), `CHECKPOINT_SHUTDOWN`, `CHECKPOINT_REDO`, `END_OF_RECOVERY` (17 on) with `wal_level` minimal | doubt: bulk changes are not in WAL | `SummarizeXlogRecord`, `xlog.c`, `xlog_internal.h`, `pg_control.h` |
//! | XACT `COMMIT`, `ABORT`, both `_PREPARED` | limit 0 for main and init fork of each relation in the list of the dropped | `SummarizeXactRecord`, `xactdesc.c` |
//! | SMGR `CREATE` | limit 0 for that fork: covers rewrites (`CLUSTER`, `VACUUM FULL`, `TRUNCATE`, `SET TABLESPACE`, `SET LOGGED`), which all make a new file node | `SummarizeSmgrRecord`, `storage.c` |
//! | SMGR `TRUNCATE` | limit at the new length, if the flag of the main fork is set; the flags of the maps concern forks that are read whole | `SummarizeSmgrRecord`, `storage.c` |
//! | CLOG, MULTIXACT, COMMIT_TS | no relation files | `clog.c`, `multixact.c`, `commit_ts.c` |
//! | DBASE `CREATE` (14), `CREATE_FILE_COPY` | reset of the new directory: its files appear unnamed, and with old page LSNs | `SummarizeDbaseRecord`, `dbcommands.c` |
//! | DBASE `CREATE_WAL_LOG` (15 on) | reset, although every fork and block is named as well | the same |
//! | DBASE `DROP` (another number in 14) | reset of each directory; `ALTER DATABASE ... SET TABLESPACE` is a create and a drop | the same |
//! | TBLSPC `CREATE`, `DROP` | none: a tablespace is made empty and dropped only when empty, and what is put there is told by SMGR and DBASE | `tablespace.c` |
//! | RELMAP `UPDATE` | none: `pg_filenode.map` is no relation, and always read whole | `relmapper.c` |
//! | STANDBY, REPLORIGIN, LOGICALMSG | none | `standby.c`, `origin.c`, `message.c` |
//! | HEAP2 `REWRITE`, `NEW_CID`; HEAP `TRUNCATE` | none: for logical decoding only, `pg_logical/mappings` | `rewriteheap.c`, `heapam.c` |
//! | BTREE `REUSE_PAGE`, GIST `PAGE_REUSE` | none: a conflict for standbys | `nbtpage.c`, `gistxlog.c` |
//! | HEAP, HEAP2, BTREE, HASH, GIN, GIST, SEQ, SPGIST, BRIN, GENERIC otherwise | name their blocks. A growing hash index names only the last page of a batch; those before it are zeros behind the old end | `hashpage.c` and the redo functions |
//! | XLOG2 (19) and managers of extensions (128 on) | name their blocks | `xloginsert.c` |
//! | any record of another manager with `XLR_SPECIAL_REL_UPDATE` | doubt: it says itself that blocks do not tell all | `xlogrecord.h` |
//!
//! A transaction's list of dropped relations that does not fit into [`SPECIAL_HEAD_BYTES`] where it crosses pages is read as far as it is there:
//! what is dropped is read by nobody, and its number comes back with a record of creation only.

use crate::lsn::Lsn;
use crate::segment::SegmentSize;
use crate::wal_segment::SegmentEnd;

mod collect;
mod encoding;
mod join;
mod map;
mod record;
mod scan;

pub use encoding::{DecodeError, ENCODED_BYTES_MAX};
pub use join::{Doubt, Joiner, join};
pub(crate) use map::is_mapped;
pub use map::{ChangeMap, ForkChanges};
pub use scan::{ChangeScan, ChangeScanner};

/// Bytes kept of a record's beginning while it goes on behind its page: all of its references, always.
pub const HEAD_BYTES: usize = 1024;
/// Bytes kept of a record that tells of more than its references, such as a list of dropped relations.
pub const SPECIAL_HEAD_BYTES: usize = 8192;
/// Bytes kept of the rest of a record that began before the segment.
pub const LEAD_BYTES: usize = 1024;
/// Most forks, and most resets, in the map of one segment; there is a doubt where there are more.
pub const FORKS_MAX: usize = 1 << 18;
/// Longest text of a doubt, in bytes.
pub const DOUBT_BYTES_MAX: usize = 256;

/// What one segment tells, without its neighbours.
#[derive(Debug, Clone, PartialEq)]
pub struct SegmentChanges {
    /// Where the segment starts.
    pub start: Lsn,
    /// The cluster's segment size.
    pub size: SegmentSize,
    /// How its records end. Of an incomplete segment only what is before [`SegmentChanges::logical_end`] is told.
    pub end: SegmentEnd,
    /// Where its records end.
    pub logical_end: Lsn,
    /// The server's major version; 0 if it is newer than known (then there is a doubt).
    pub postgres_major: u32,
    /// What its own records changed: those that begin and end in it.
    pub map: ChangeMap,
    /// How it begins.
    pub lead: Lead,
    /// How it goes on.
    pub tail: Tail,
    /// Why the map may be incomplete; then the map is empty.
    pub doubt: Option<String>,
}

/// How a segment begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lead {
    /// With a record of its own.
    Fresh,
    /// With a record of its own, in place of all or of more of the rest of one that was given up in crash recovery.
    GivenUp,
    /// With the rest of a record that began before it.
    Rest {
        /// Length of that rest, here and in later segments.
        remaining_bytes: u32,
        /// Its first bytes, at most [`LEAD_BYTES`].
        bytes: Vec<u8>,
    },
}

/// How a segment goes on in the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tail {
    /// It does not: its last record is complete.
    Closed,
    /// Its last record is not complete.
    Open {
        /// Where that record starts.
        start: Lsn,
        /// The record's whole length.
        total_bytes: u32,
        /// How many bytes of it are in this segment.
        seen_bytes: u32,
        /// The first of those, at most [`HEAD_BYTES`] or, of some records, [`SPECIAL_HEAD_BYTES`].
        head: Vec<u8>,
    },
    /// All of the segment is the inside of one record.
    Through,
}

impl SegmentChanges {
    /// Up to where the segment is told: its end if it is complete, else where its records end.
    pub fn told_until(&self) -> Lsn {
        if self.end.is_complete() {
            Lsn::new(self.start.as_u64().saturating_add(self.size.bytes()))
        } else {
            self.logical_end
        }
    }
}

/// What one record changes, from its first bytes and its whole length; `None` if that is not clear. For targets and tests.
pub(crate) fn of_record(postgres_major: u32, head: &[u8], total_bytes: u32) -> Option<ChangeMap> {
    let mut collector = collect::Collector::new();
    let rules = record::Rules::of(postgres_major);
    record::note(&mut collector, rules, head, total_bytes).is_ok().then(|| collector.into_map())
}

#[cfg(test)]
mod tests;
