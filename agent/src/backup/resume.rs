//! PURE: what earlier attempts at a backup left in a store, and what of it stands for pages that need not be sent again.
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

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use postgres_format::Lsn;
use postgres_format::relation::RelationFork;
use postgres_format::wal_changes::{ChangeMap, ForkChanges};
use repository::backup::manifest::{Layer, Pack};
use repository::backup::note::Attempt;
use repository::backup::origin::BackupType;
use repository::backup::pack::{Extent, FileNumber};
use repository::name::BackupId;
use roaring::RoaringBitmap;

use super::changes::{Changes, Geometry, Take, main_fork};
use super::listing::ListedFile;
use super::plan::{CopyPlan, Piece};

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

/// What an attempt holds of one file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct HeldFile {
    /// Its number in the attempt's frames.
    pub(super) number: FileNumber,
    /// Where its pages lie, in order and apart from each other.
    pub(super) extents: Vec<Extent>,
    /// Blocks within the file that lie in sparse frames.
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

    fn sparse(&self, range: &Range<u32>) -> RoaringBitmap {
        self.sparse.range(range.clone()).collect()
    }
}

/// What one attempt left.
#[derive(Clone, Debug)]
pub(super) struct Left {
    /// What it was.
    pub(super) attempt: Attempt,
    /// Its packs, by number.
    pub(super) packs: BTreeMap<u32, Pack>,
    /// What it holds, by the file's place in this backup's plan.
    pub(super) files: HashMap<u32, HeldFile>,
    /// What WAL touched between its start and this backup's.
    pub(super) changes: ChangeMap,
}

/// What all attempts left, the newest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Resume {
    left: Vec<Left>,
}

/// How the blocks of a piece are sent that are sent at all.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Rest {
    /// Blocks within the file to be sent in sparse frames: somebody else holds them in contiguous ones.
    pub(super) sparse: RoaringBitmap,
    /// Blocks to be sent in contiguous frames.
    pub(super) solid: RoaringBitmap,
    /// How many need not be sent.
    pub(super) stays: u64,
}

impl Rest {
    /// Whether nothing is to be read.
    pub(super) fn is_empty(&self) -> bool {
        self.sparse.is_empty() && self.solid.is_empty()
    }
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

impl Resume {
    /// Of what attempts left, the newest first. Keeps only files in which something need not be sent again.
    pub(super) fn new(
        mut left: Vec<Left>,
        plan: &CopyPlan,
        changes: Option<&Changes>,
        geometry: &Geometry,
    ) -> (Self, Share) {
        left.sort_by_key(|left| std::cmp::Reverse((left.attempt.start_lsn, left.attempt.backup)));
        for left in &mut left {
            left.files.retain(|_, held| held.settle());
        }
        let (mut resume, mut share) = (Self { left }, Share { of_bytes: plan.bytes, ..Share::default() });
        let mut stays: HashMap<u32, u64> = HashMap::new();
        for piece in &plan.pieces {
            if let Some(rest) = resume.rest(plan, changes, geometry, piece) {
                *stays.entry(piece.file).or_default() += rest.stays;
                share.bytes += rest.stays * geometry.page_bytes;
            }
        }
        for left in &mut resume.left {
            left.files.retain(|file, _| stays.get(file).is_some_and(|stays| *stays > 0));
            left.files.shrink_to_fit();
            let used = left.files.values().flat_map(|held| &held.extents).map(|extent| extent.pack);
            let used: std::collections::BTreeSet<u32> = used.collect();
            left.packs.retain(|number, _| used.contains(number));
            share.packs += left.packs.len() as u64;
        }
        resume.left.retain(|left| !left.files.is_empty());
        (resume, share)
    }

    /// Whether nothing is referred to.
    pub(super) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// The attempts that are referred to, the newest first.
    pub(super) fn attempts(&self) -> impl DoubleEndedIterator<Item = BackupId> + '_ {
        self.left.iter().map(|left| left.attempt.backup)
    }

    /// All their packs.
    pub(super) fn packs(&self) -> impl Iterator<Item = &Pack> {
        self.left.iter().flat_map(|left| left.packs.values())
    }

    /// Layers of a file that attempts hold, the newest first; `number` is the file's in this backup.
    pub(super) fn layers(&self, number: FileNumber) -> impl Iterator<Item = Layer> + '_ {
        self.left.iter().filter_map(move |left| {
            let held = left.files.get(&number.0)?;
            Some(Layer {
                backup: Some(left.attempt.backup),
                file: Some(held.number).filter(|theirs| *theirs != number),
                extents: held.extents.clone(),
            })
        })
    }

    /// What of a piece is sent; `None` if no attempt holds any of its file, or pages do not tell what changed in it.
    pub(super) fn rest(
        &self,
        plan: &CopyPlan,
        changes: Option<&Changes>,
        geometry: &Geometry,
        piece: &Piece,
    ) -> Option<Rest> {
        if self.left.iter().all(|left| !left.files.contains_key(&piece.file)) {
            return None;
        }
        let file = plan.files.get(piece.file as usize)?;
        let (fork, first) = main_fork(file, geometry)?;
        if !file.size.is_multiple_of(geometry.page_bytes) {
            return None;
        }
        let block = |at: u64| u32::try_from(at / geometry.page_bytes).unwrap_or(u32::MAX);
        let range = block(piece.from)..block(piece.to);
        // What nobody else holds contiguously, and what the parent holds so.
        let (mut base, mut over) = (RoaringBitmap::new(), RoaringBitmap::new());
        match plan.takes.get(piece.file as usize)? {
            Take::Whole => drop(base.insert_range(range.clone())),
            Take::Listed { inherited_blocks } => {
                let grown_from = (*inherited_blocks).clamp(range.start, range.end);
                base.insert_range(grown_from..range.end);
                over.extend(listed(changes, file, geometry, range.start..grown_from));
            }
            Take::Nothing | Take::Newer { .. } => return None,
        }
        Some(self.subtract(piece.file, &fork, first, &range, geometry, base, over))
    }

    #[expect(clippy::too_many_arguments, reason = "one file, one range of it, and two sets of its blocks")]
    fn subtract(
        &self,
        file: u32,
        fork: &RelationFork,
        first: u32,
        range: &Range<u32>,
        geometry: &Geometry,
        mut base: RoaringBitmap,
        mut over: RoaringBitmap,
    ) -> Rest {
        let before = base.len() + over.len();
        let mut held_solid = RoaringBitmap::new();
        for left in &self.left {
            let Some(held) = left.files.get(&file) else { continue };
            let solid = held.solid(range, geometry.page_bytes);
            held_solid |= &solid;
            let unchanged = unchanged(solid, &left.changes, fork, first, range);
            base -= &unchanged;
            over -= &unchanged;
            over -= self::unchanged(held.sparse(range), &left.changes, fork, first, range);
        }
        let stays = before - base.len() - over.len();
        let mut sparse = &base & &held_solid;
        base -= &sparse;
        sparse |= over;
        Rest { sparse, solid: base, stays }
    }
}

fn listed(changes: Option<&Changes>, file: &ListedFile, geometry: &Geometry, range: Range<u32>) -> Vec<u32> {
    changes.map_or_else(Vec::new, |changes| changes.listed(file, geometry, range.start, range.end))
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
