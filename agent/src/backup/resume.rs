//! What earlier attempts at a backup left in a store, and what of it stands for pages that need not be sent again. Pure, but
//! that what is held of files lies on disk ([`super::rows`]), and is laid beside the plan file by file.
//!
//! An attempt that came to no end is a parent with an incomplete map. A page that it stored may be referred to if WAL did
//! not touch it since the *attempt's* start: what this backup would read now is what lies there. All else is read as if
//! there had been no attempt: what is missing, what changed since, and whatever is no page of a relation's main fork.
//!
//! Invariants:
//! * of the blocks that a backup would send without attempts, those are left out that an attempt holds unchanged, and no
//!   others; so whatever an attempt holds that did change lies under a newer copy in this backup;
//! * attempts began after the parent did, so that their layers lie between the parent's and this backup's;
//! * each byte of a file has a contiguous frame in some layer: a block that nobody else holds so is sent so.

pub(super) mod find;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use postgres_format::Lsn;
use postgres_format::relation::RelationFork;
use postgres_format::wal_changes::{ChangeMap, ForkChanges};
use repository::backup::manifest::{Layer, Pack};
use repository::backup::note::Attempt;
use repository::backup::origin::BackupType;
use repository::backup::pack::{Extent, FileNumber};
use repository::name::BackupId;
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use super::BackupError;
use super::changes::{Geometry, Take, main_fork};
use super::plan::{CopyPlan, InOrder, Piece, Planned};
use super::rows::{Merge, RowWriter, Rows, Sorted, blocks};

/// What this backup is, as far as attempts must agree with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ours {
    /// What was asked for.
    pub(super) asked: BackupType,
    /// The facts that a note of this backup would tell.
    pub(super) facts: Attempt,
    /// Where the recovery of its parent begins, if it has one.
    pub(super) parent_start: Option<Lsn>,
}

/// Why nothing of an attempt is referred to; a line for people.
pub(super) fn unfit(attempt: &Attempt, ours: &Ours) -> Option<String> {
    let facts = &ours.facts;
    let differs = |what: &str, theirs: u64, ours: u64| {
        (theirs != ours).then(|| format!("its {what} is {theirs}, and {ours} here"))
    };
    let of_another = attempt.cluster != facts.cluster || attempt.system_identifier != facts.system_identifier;
    of_another
        .then(|| format!("it is of another system, {}", attempt.system_identifier))
        .or_else(|| differs("PostgreSQL version", attempt.postgres_major.into(), facts.postgres_major.into()))
        .or_else(|| differs("version of pg_control", attempt.control_version.into(), facts.control_version.into()))
        .or_else(|| differs("catalog version", attempt.catalog_version.into(), facts.catalog_version.into()))
        .or_else(|| differs("WAL segment size", attempt.segment_size_bytes, facts.segment_size_bytes))
        .or_else(|| differs("page size", attempt.block_size.into(), facts.block_size.into()))
        .or_else(|| {
            let (theirs, ours) = (attempt.relation_segment_blocks, facts.relation_segment_blocks);
            differs("relation segment size", theirs.into(), ours.into())
        })
        .or_else(|| {
            differs("version of page checksums", attempt.checksum_version.into(), facts.checksum_version.into())
        })
        .or_else(|| (facts.checksum_version > 1).then(|| "page checksums are being switched on or off".to_owned()))
        .or_else(|| {
            let (theirs, ours) = (attempt.start_timeline, facts.start_timeline);
            // Where it ended is not known, and so neither whether all it read lies before a fork.
            (theirs != ours).then(|| format!("it began on timeline {theirs}, and this is {ours}"))
        })
        .or_else(|| {
            (attempt.from_standby != facts.from_standby).then(|| "the node's role has changed since".to_owned())
        })
        .or_else(|| {
            let (theirs, ours) = (attempt.start_lsn, facts.start_lsn);
            (theirs > ours).then(|| format!("it began at {theirs}, after the start at {ours}"))
        })
        .or_else(|| {
            let read_anew = ours.asked == BackupType::Full && attempt.backup_type != BackupType::Full;
            read_anew.then(|| "a full backup was asked for, and it was none".to_owned())
        })
        .or_else(|| {
            let parent = ours.parent_start.filter(|parent| attempt.start_lsn < *parent)?;
            Some(format!("it began at {}, before what is built on at {parent}", attempt.start_lsn))
        })
}

/// What an attempt holds of one file, or what one of its packs does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct HeldFile {
    /// Its number in the attempt's frames.
    pub(super) number: FileNumber,
    /// Where its pages lie, in order and apart from each other.
    pub(super) extents: Vec<Extent>,
    /// Blocks within the file that lie in sparse frames.
    #[serde(with = "blocks")]
    pub(super) sparse: RoaringBitmap,
}

impl HeldFile {
    /// Sorts what came pack by pack; false if two extents overlap, which no attempt of ours leaves.
    fn settle(&mut self) -> bool {
        self.extents.sort_by_key(|extent| extent.from);
        self.extents.is_sorted_by(|one, next| one.to <= next.from)
    }

    /// Blocks of a range that lie in contiguous frames, each as a whole.
    fn solid(&self, range: &Range<u32>, page_bytes: u64) -> RoaringBitmap {
        let mut blocks = RoaringBitmap::new();
        for extent in self.extents.iter().filter(|extent| extent.pages.is_none()) {
            let clamp = |block: u64| u32::try_from(block).unwrap_or(u32::MAX).clamp(range.start, range.end);
            blocks.insert_range(clamp(extent.from.div_ceil(page_bytes))..clamp(extent.to / page_bytes));
        }
        blocks
    }

    fn layer(&self, attempt: &Attempt, number: FileNumber) -> Layer {
        let file = Some(self.number).filter(|theirs| *theirs != number);
        Layer { backup: Some(attempt.backup), file, extents: self.extents.clone() }
    }

    fn sparse(&self, range: &Range<u32>) -> RoaringBitmap {
        self.sparse.range(range.clone()).collect()
    }
}

/// Which file, and which of the attempts that were looked at.
pub(super) type HeldKey = (InOrder, u32);

/// What one attempt was.
#[derive(Clone, Debug)]
pub(super) struct Left {
    /// What it was.
    pub(super) attempt: Attempt,
    /// What WAL touched between its start and this backup's.
    pub(super) changes: ChangeMap,
}

/// What attempts left that may be gone on from.
#[derive(Debug)]
pub(super) struct AllLeft {
    /// By the number under which they were looked at.
    pub(super) attempts: BTreeMap<u32, Left>,
    /// Their packs.
    pub(super) packs: Vec<Pack>,
    /// What they hold, and maybe what others do.
    pub(super) held: Sorted<HeldKey, HeldFile>,
}

/// What of it is referred to, besides what a plan says of files.
#[derive(Clone, Debug, Default)]
pub(super) struct Resume {
    attempts: Vec<BackupId>,
    packs: Option<Rows<Pack>>,
}

/// How the blocks of a file, or of a piece of it, are sent that are sent at all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Rest {
    /// Blocks within the file to be sent in sparse frames: somebody else holds them in contiguous ones.
    #[serde(with = "blocks")]
    pub(super) sparse: RoaringBitmap,
    /// Blocks to be sent in contiguous frames.
    #[serde(with = "blocks")]
    pub(super) solid: RoaringBitmap,
    /// How many of the file need not be sent.
    pub(super) stays: u64,
}

impl Rest {
    /// Whether nothing is to be read.
    pub(super) fn is_empty(&self) -> bool {
        self.sparse.is_empty() && self.solid.is_empty()
    }

    /// What of it lies within a piece.
    pub(super) fn within(&self, piece: &Piece, page_bytes: u64) -> Self {
        let range = block(piece.from, page_bytes)..block(piece.to, page_bytes);
        let within = |blocks: &RoaringBitmap| blocks.range(range.clone()).collect();
        Self { sparse: within(&self.sparse), solid: within(&self.solid), stays: self.stays }
    }
}

fn block(at: u64, page_bytes: u64) -> u32 {
    u32::try_from(at / page_bytes).unwrap_or(u32::MAX)
}

/// What is there already, for people and for progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Share {
    /// Packs that are referred to.
    pub(super) packs: u64,
    /// Bytes that need not be read.
    pub(super) bytes: u64,
    /// Bytes to be read without attempts.
    pub(super) of_bytes: u64,
}

/// A plan that goes on from attempts.
#[derive(Debug)]
pub(super) struct Laid {
    /// The plan, with what of its files is left to be sent.
    pub(super) plan: CopyPlan,
    /// What is referred to.
    pub(super) resume: Resume,
    /// How much that is.
    pub(super) share: Share,
}

/// Lays what attempts left under a plan. Of what they hold only that of files counts in which something need not be sent
/// again. Writes in `scratch`.
pub(super) fn lay(left: &AllLeft, plan: CopyPlan, geometry: &Geometry, scratch: &Path) -> Result<Laid, BackupError> {
    let scratched = BackupError::Scratch;
    let mut newest_first: Vec<u32> = left.attempts.keys().copied().collect();
    newest_first.sort_by_key(|number| {
        let attempt = &left.attempts[number].attempt;
        std::cmp::Reverse((attempt.start_lsn, attempt.backup))
    });
    let mut share = Share { of_bytes: plan.bytes, ..Share::default() };
    let mut used: BTreeMap<u32, RoaringBitmap> = BTreeMap::new();
    let mut held = left.held.iter().map_err(scratched)?;
    let plan = plan.redrawn(geometry.page_bytes, scratch, |planned| {
        let of_file = of_file(&mut held, &planned, left).map_err(scratched)?;
        let holders: Vec<(u32, HeldFile)> =
            newest_first.iter().filter_map(|number| Some((*number, of_file.get(number)?.clone()))).collect();
        let Some(rest) = rest(&planned, &holders, left, geometry).filter(|rest| rest.stays > 0) else {
            return Ok(planned);
        };
        share.bytes += rest.stays * geometry.page_bytes;
        for (number, held) in &holders {
            used.entry(*number).or_default().extend(held.extents.iter().map(|extent| extent.pack));
        }
        let layer =
            |(number, held): &(u32, HeldFile)| held.layer(&left.attempts[number].attempt, FileNumber(planned.number));
        Ok(Planned { rest: Some(rest), under: holders.iter().map(layer).collect(), ..planned })
    })?;
    let mut packs = RowWriter::create_in(scratch).map_err(scratched)?;
    newest_first.retain(|number| used.contains_key(number));
    for number in &newest_first {
        let of = Some(left.attempts[number].attempt.backup);
        for pack in left.packs.iter().filter(|pack| pack.backup == of && used[number].contains(pack.number)) {
            share.packs += 1;
            packs.push(pack).map_err(scratched)?;
        }
    }
    let attempts = newest_first.iter().map(|number| left.attempts[number].attempt.backup).collect();
    let resume = Resume { attempts, packs: Some(packs.finish().map_err(scratched)?) };
    Ok(Laid { plan, resume, share })
}

/// What attempts hold of the next file of a plan, by their number. What is held of files that are in no plan is passed over.
fn of_file(
    held: &mut Merge<HeldKey, HeldFile>,
    planned: &Planned,
    left: &AllLeft,
) -> std::io::Result<BTreeMap<u32, HeldFile>> {
    let path = InOrder(planned.listed.path.clone());
    let mut of_file: BTreeMap<u32, HeldFile> = BTreeMap::new();
    while held.key().is_some_and(|(next, _)| *next <= path) {
        let Some(((of, attempt), part)) = held.next().transpose()? else { break };
        if of != path || !left.attempts.contains_key(&attempt) {
            continue;
        }
        match of_file.get_mut(&attempt) {
            None => drop(of_file.insert(attempt, part)),
            Some(whole) if whole.number == part.number => {
                whole.extents.extend(part.extents);
                whole.sparse |= part.sparse;
            }
            Some(_) => {}
        }
    }
    of_file.retain(|_, held| held.settle());
    Ok(of_file)
}

/// What of a file is sent; `None` if no attempt holds any of it, or pages do not tell what changed in it. Attempts come the
/// newest first.
fn rest(planned: &Planned, holders: &[(u32, HeldFile)], left: &AllLeft, geometry: &Geometry) -> Option<Rest> {
    if holders.is_empty() {
        return None;
    }
    let size = planned.listed.size;
    let (fork, first) = main_fork(&planned.listed, geometry)?;
    if !size.is_multiple_of(geometry.page_bytes) {
        return None;
    }
    let range = 0..block(size, geometry.page_bytes);
    // What nobody else holds contiguously, and what the parent holds so.
    let (mut base, mut over) = (RoaringBitmap::new(), RoaringBitmap::new());
    match planned.take {
        Take::Whole => drop(base.insert_range(range.clone())),
        Take::Listed { inherited_blocks } => {
            base.insert_range(inherited_blocks.min(range.end)..range.end);
            over |= &planned.changed;
        }
        Take::Nothing | Take::Newer { .. } => return None,
    }
    let before = base.len() + over.len();
    let mut held_solid = RoaringBitmap::new();
    for (number, held) in holders {
        let changes = &left.attempts[number].changes;
        let solid = held.solid(&range, geometry.page_bytes);
        held_solid |= &solid;
        let unchanged = unchanged(solid, changes, &fork, first, &range);
        base -= &unchanged;
        over -= &unchanged;
        over -= self::unchanged(held.sparse(&range), changes, &fork, first, &range);
    }
    let stays = before - base.len() - over.len();
    let mut sparse = &base & &held_solid;
    base -= &sparse;
    sparse |= over;
    Some(Rest { sparse, solid: base, stays })
}

impl Resume {
    /// Whether nothing is referred to.
    pub(super) fn is_empty(&self) -> bool {
        self.attempts.is_empty()
    }

    /// The attempts that are referred to, the newest first.
    pub(super) fn attempts(&self) -> impl DoubleEndedIterator<Item = BackupId> + '_ {
        self.attempts.iter().copied()
    }

    /// All their packs that are.
    pub(super) fn packs(&self) -> impl Iterator<Item = std::io::Result<Pack>> + '_ {
        self.packs.iter().flat_map(Rows::iter)
    }
}

/// Those blocks of a range of a file, which begins at block `first` of its fork, that WAL did not touch.
fn unchanged(
    mut blocks: RoaringBitmap,
    changes: &ChangeMap,
    fork: &RelationFork,
    first: u32,
    range: &Range<u32>,
) -> RoaringBitmap {
    if changes.is_reset(fork.directory()) {
        return RoaringBitmap::new();
    }
    let Some(touched) = changes.fork(fork) else { return blocks };
    if let Some(limit) = ForkChanges::limit_block(touched) {
        blocks.remove_range(limit.saturating_sub(first)..=u32::MAX);
    }
    let (from, to) = (first.saturating_add(range.start), first.saturating_add(range.end));
    for block in touched.blocks().range(from..to) {
        blocks.remove(block - first);
    }
    blocks
}

/// What is said of it: which attempt is the newest, and how much is there already.
pub(super) fn described(newest: BackupId, share: &Share) -> String {
    let Share { packs, bytes, of_bytes } = share;
    format!("resuming attempt {newest}: {packs} packs, {bytes} of {of_bytes} bytes are there already")
}

#[cfg(test)]
mod tests;
