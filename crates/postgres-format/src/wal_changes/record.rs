//! What one record says about blocks.
//!
//! ```text
//! header 24 | block header* | origin? | top-level transaction? | main data header? | data of the blocks | main data
//!
//! block header   u8 id (0 to 32, ascending)   u8 fork and flags   u16 bytes of data
//!                image header   if flag 0x10: u16 bytes, u16 start of the hole, u8 flags; u16 bytes of the hole if it has one and is compressed
//!                relation       unless flag 0x80 (the same as of the block header before): u32 tablespace, u32 database, u32 file node
//!                u32 block number
//! origin         u8 253  u16                  top-level transaction   u8 252  u32
//! main data      u8 255  u8 bytes      or     u8 254  u32 bytes
//! ```
//!
//! Only the first kilobyte of a record is needed for its references, so a record that lies on many pages is read from its beginning.
//! Sources: `DecodeXLogRecord` in `xlogreader.c`, `xlogrecord.h`, `ParseCommitRecord` in `xactdesc.c`, and the files named in the table of
//! [`super`].

use super::collect::Collector;
use crate::bytes::{u16_at, u32_at};
use crate::relation::{DatabaseDirectory, Fork, RelationFork};

const RECORD_HEADER_BYTES: usize = 24;
/// As many bytes of any record as its references can take: header, 33 block headers of 27 bytes, origin, transaction, main data header.
pub(super) const REFERENCE_BYTES_MAX: usize = RECORD_HEADER_BYTES + 33 * 27 + 3 + 5 + 5;
const _: () = assert!(REFERENCE_BYTES_MAX <= super::HEAD_BYTES && REFERENCE_BYTES_MAX <= super::LEAD_BYTES);

const BLOCK_ID_MAX: u8 = 32;
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const SAME_RELATION: u8 = 0x80;
const IMAGE_HAS_HOLE: u8 = 0x01;
/// `XLR_SPECIAL_REL_UPDATE`: the record changes relation files in ways that its block references do not tell.
const SPECIAL: u8 = 0x01;

/// Resource managers with records of their own kind; all below [`FIRST_ORDINARY_MANAGER`] (`rmgrlist.h`, the same in 14 to 19).
const WAL_MANAGER: u8 = 0;
const TRANSACTION_MANAGER: u8 = 1;
const STORAGE_MANAGER: u8 = 2;
const DATABASE_MANAGER: u8 = 4;
const FIRST_ORDINARY_MANAGER: u8 = 5;

/// What differs between major versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rules {
    /// Flags of an image header that say that the image is compressed.
    compressed: u8,
    /// `XLOG_DBASE_CREATE_WAL_LOG` exists, and `XLOG_DBASE_DROP` has moved to make room.
    creates_through_wal: bool,
    /// Checkpoints carry the WAL level.
    checkpoints_tell_level: bool,
}

impl Rules {
    pub(super) const fn of(postgres_major: u32) -> Self {
        Self {
            compressed: if postgres_major >= 15 { 0x1C } else { 0x02 },
            creates_through_wal: postgres_major >= 15,
            checkpoints_tell_level: postgres_major >= 17,
        }
    }
}

/// Why a record was not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unclear {
    /// What is needed lies behind the bytes at hand.
    Short,
    /// It says something that is not known, or makes no sense.
    Broken(&'static str),
}

use Unclear::{Broken, Short};

/// How many of a record's first bytes to keep while it goes on behind its page.
pub(super) fn head_bytes(header: &[u8]) -> usize {
    match header.get(17) {
        Some(&manager) if manager < FIRST_ORDINARY_MANAGER => super::SPECIAL_HEAD_BYTES,
        _ => super::HEAD_BYTES,
    }
}

/// Notes all that a record says, from its first bytes; `total_bytes` is its whole length.
#[inline]
pub(super) fn note(collector: &mut Collector, rules: Rules, head: &[u8], total_bytes: u32) -> Result<(), Unclear> {
    let total = total_bytes as usize;
    let Some(header) = head.get(..RECORD_HEADER_BYTES) else { return Err(Short) };
    let (info, manager) = (header[16], header[17]);
    let main_bytes = references(collector, rules, head, total)?;
    if manager < FIRST_ORDINARY_MANAGER || info & SPECIAL != 0 {
        let main = Main { bytes: head.get(total - main_bytes..).unwrap_or_default(), whole: head.len() >= total };
        return special(collector, rules, manager, info, &main);
    }
    Ok(())
}

/// Notes the references to blocks. Gives the length of the main data.
#[inline(always)]
fn references(collector: &mut Collector, rules: Rules, head: &[u8], total: usize) -> Result<usize, Unclear> {
    let (mut at, mut behind, mut main_bytes) = (RECORD_HEADER_BYTES, 0, 0);
    let mut relation = None;
    let mut least_id = 0;
    // What follows the headers is as long as they say; so the headers end where that much is left.
    while total > at + behind {
        let Some(&id) = head.get(at) else { return Err(Short) };
        match id {
            255 => {
                main_bytes = usize::from(*head.get(at + 1).ok_or(Short)?);
                (at, behind) = (at + 2, behind + main_bytes);
            }
            0..=BLOCK_ID_MAX if id >= least_id => {
                least_id = id + 1;
                let (bytes, data_bytes) = reference(collector, rules, &head[at..], &mut relation)?;
                (at, behind) = (at + bytes, behind + data_bytes);
            }
            254 => {
                main_bytes = u32_at(head.get(at + 1..at + 5).ok_or(Short)?, 0) as usize;
                (at, behind) = (at + 5, behind + main_bytes);
            }
            253 => at += 3,
            252 => at += 5,
            _ => return Err(Broken("it has a part of an unknown kind")),
        }
        if main_bytes > 0 {
            break;
        }
    }
    if at + behind == total { Ok(main_bytes) } else { Err(Broken("its parts are not as long as the record")) }
}

/// Notes one reference. Gives the length of the block header, and of the data that it announces.
#[inline(always)]
fn reference(
    collector: &mut Collector,
    rules: Rules,
    header: &[u8],
    relation: &mut Option<[u32; 3]>,
) -> Result<(usize, usize), Unclear> {
    let fixed = header.get(..4).ok_or(Short)?;
    let (flags, mut data_bytes) = (fixed[1], usize::from(u16_at(fixed, 2)));
    let mut at = 4;
    if (flags & HAS_DATA != 0) != (data_bytes > 0) {
        return Err(Broken("a block's data is not as announced"));
    }
    if flags & HAS_IMAGE != 0 {
        let image = header.get(at..at + 5).ok_or(Short)?;
        data_bytes += usize::from(u16_at(image, 0));
        at += 5;
        if image[4] & rules.compressed != 0 && image[4] & IMAGE_HAS_HOLE != 0 {
            at += 2;
        }
    }
    if flags & SAME_RELATION == 0 {
        let named = header.get(at..at + 12).ok_or(Short)?;
        *relation = Some([u32_at(named, 0), u32_at(named, 4), u32_at(named, 8)]);
        at += 12;
    }
    let block = u32_at(header.get(at..at + 4).ok_or(Short)?, 0);
    let Some(relation) = *relation else { return Err(Broken("a block is of no relation")) };
    let Some(fork) = Fork::from_number(flags & 0x0F) else { return Err(Broken("a block is of an unknown fork")) };
    if block == u32::MAX {
        return Err(Broken("a block has an impossible number"));
    }
    collector.mark(fork_of(relation, fork), block);
    Ok((at + 4, data_bytes))
}

const fn fork_of([tablespace, database, relation]: [u32; 3], fork: Fork) -> RelationFork {
    RelationFork { tablespace, database, relation, fork }
}

/// The main data of a record, as much of it as is at hand.
struct Main<'a> {
    bytes: &'a [u8],
    whole: bool,
}

impl Main<'_> {
    fn field(&self, at: usize) -> Result<u32, Unclear> {
        let field = self.bytes.get(at..).and_then(|rest| rest.get(..4));
        field.map(|field| u32_at(field, 0)).ok_or(if self.whole { Broken("its data is too short") } else { Short })
    }

    fn relation(&self, at: usize) -> Result<[u32; 3], Unclear> {
        Ok([self.field(at)?, self.field(at + 4)?, self.field(at + 8)?])
    }
}

/// Notes what records say that change relation files otherwise than by their references.
fn special(collector: &mut Collector, rules: Rules, manager: u8, info: u8, main: &Main<'_>) -> Result<(), Unclear> {
    let operation = info & 0xF0;
    match manager {
        WAL_MANAGER => level(rules, operation, main),
        TRANSACTION_MANAGER => match dropped(collector, info, main) {
            // The list of a transaction that dropped very many relations is not kept whole where it crosses pages. What is dropped is read by
            // nobody, and its number is given out again with a record of creation only: the rest of the list is not missed.
            Err(Short) => Ok(()),
            answer => answer,
        },
        STORAGE_MANAGER => storage(collector, operation, main),
        DATABASE_MANAGER => database(collector, rules, operation, main),
        _ if info & SPECIAL != 0 => Err(Broken("it changes relations in a way that is not known")),
        _ => Ok(()),
    }
}

/// Changes are left out of WAL while its level is minimal.
fn level(rules: Rules, operation: u8, main: &Main<'_>) -> Result<(), Unclear> {
    const CHECKPOINT_SHUTDOWN: u8 = 0x00;
    const PARAMETER_CHANGE: u8 = 0x60;
    const END_OF_RECOVERY: u8 = 0x90;
    const CHECKPOINT_REDO: u8 = 0xE0;
    let at = match operation {
        PARAMETER_CHANGE => 20,
        CHECKPOINT_SHUTDOWN if rules.checkpoints_tell_level => 20,
        END_OF_RECOVERY if rules.checkpoints_tell_level => 16,
        CHECKPOINT_REDO => 0,
        _ => return Ok(()),
    };
    match main.field(at)? {
        0 => Err(Broken("wal_level was minimal, which leaves changes out of WAL")),
        _ => Ok(()),
    }
}

/// Relations dropped by the end of a transaction.
fn dropped(collector: &mut Collector, info: u8, main: &Main<'_>) -> Result<(), Unclear> {
    /// Commit, abort, and both of prepared transactions.
    const ENDS: [u8; 4] = [0x00, 0x20, 0x30, 0x40];
    const HAS_INFO: u8 = 0x80;
    const HAS_DATABASE: u32 = 1;
    const HAS_SUBTRANSACTIONS: u32 = 2;
    const HAS_RELATIONS: u32 = 4;
    if !ENDS.contains(&(info & 0x70)) || info & HAS_INFO == 0 {
        return Ok(());
    }
    let parts = main.field(8)?;
    let mut at = 12usize;
    if parts & HAS_RELATIONS == 0 {
        return Ok(());
    }
    if parts & HAS_DATABASE != 0 {
        at += 8;
    }
    if parts & HAS_SUBTRANSACTIONS != 0 {
        at = at.saturating_add((main.field(at)? as usize).saturating_mul(4)).saturating_add(4);
    }
    let relations = main.field(at)?;
    for index in 0..relations as usize {
        let relation = main.relation(at.saturating_add(4).saturating_add(index.saturating_mul(12)))?;
        for fork in [Fork::Main, Fork::Init] {
            collector.cut(fork_of(relation, fork), 0);
        }
    }
    Ok(())
}

/// Forks made and cut off.
fn storage(collector: &mut Collector, operation: u8, main: &Main<'_>) -> Result<(), Unclear> {
    const CREATE: u8 = 0x10;
    const TRUNCATE: u8 = 0x20;
    const TRUNCATES_MAIN: u32 = 1;
    match operation {
        CREATE => {
            let number = u8::try_from(main.field(12)?).ok();
            let fork = number.and_then(Fork::from_number).ok_or(Broken("it makes an unknown fork"))?;
            collector.cut(fork_of(main.relation(0)?, fork), 0);
        }
        TRUNCATE if main.field(16)? & TRUNCATES_MAIN != 0 => {
            collector.cut(fork_of(main.relation(4)?, Fork::Main), main.field(0)?);
        }
        TRUNCATE => {}
        _ => return Err(Broken("it changes storage in a way that is not known")),
    }
    Ok(())
}

/// Databases made and dropped.
fn database(collector: &mut Collector, rules: Rules, operation: u8, main: &Main<'_>) -> Result<(), Unclear> {
    let database = main.field(0)?;
    match (operation, rules.creates_through_wal) {
        (0x00, _) | (0x10, true) => {
            collector.reset(DatabaseDirectory { tablespace: main.field(4)?, database });
        }
        (0x10, false) | (0x20, true) => {
            for index in 0..main.field(4)? as usize {
                let tablespace = main.field(index.saturating_mul(4).saturating_add(8))?;
                collector.reset(DatabaseDirectory { tablespace, database });
            }
        }
        _ => return Err(Broken("it changes databases in a way that is not known")),
    }
    Ok(())
}
