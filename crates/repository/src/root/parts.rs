//! Parts of a root besides backups: what is under way, what is held, what was condemned, and what WAL is kept.

use std::collections::BTreeMap;

use jiff::Timestamp;
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::coverage::{ArchivedWal, SegmentSpan};
use crate::name::{BackupId, Generation, NodeName};

/// Most backups that are under way in a store at one time.
pub const PIN_LIMIT: usize = 64;
/// Most holds of a cluster.
pub const HOLD_LIMIT: usize = 1000;
/// Identifiers that are remembered one by one; older ones are remembered by their time.
pub(super) const GONE_LIMIT: usize = 1000;

/// Generations of roots, both ends included. A JSON array of two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(Generation, Generation)", into = "(Generation, Generation)")]
pub struct Lost {
    /// The first.
    pub first: Generation,
    /// The last.
    pub last: Generation,
}

impl Lost {
    /// Whether a generation is among them.
    pub fn holds(&self, generation: Generation) -> bool {
        (self.first..=self.last).contains(&generation)
    }
}

impl From<(Generation, Generation)> for Lost {
    fn from((first, last): (Generation, Generation)) -> Self {
        Self { first, last }
    }
}

impl From<Lost> for (Generation, Generation) {
    fn from(lost: Lost) -> Self {
        (lost.first, lost.last)
    }
}

/// A backup that is under way. Nothing under its identifier, and nothing it builds on, is removed while it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The identifier that the backup is to have.
    pub backup: BackupId,
    /// The backup it builds on: it may refer to what that one refers to. It exists as long as the pin stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// Other identifiers under which it may refer to packs: those of a copy from another store, or of an attempt that it
    /// goes on from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub protects: Vec<BackupId>,
    /// From where it needs WAL, if that is known already, as it is of a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal: Option<PinnedWal>,
    /// Who takes it, or copies it.
    pub node: NodeName,
    /// When it began.
    pub started: Timestamp,
    /// Tells two attempts under one identifier apart.
    pub nonce: Uuid,
    /// What newer versions added; kept.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

impl Pin {
    /// A backup that begins from nothing, or on a parent.
    pub fn new(backup: BackupId, parent: Option<BackupId>, node: NodeName, started: Timestamp) -> Self {
        let (protects, wal, nonce) = (Vec::new(), None, Uuid::now_v7());
        Self { backup, parent, protects, wal, node, started, nonce, unknown: BTreeMap::new() }
    }

    /// Whether it is of a copy from another store, which names in `protects` all identifiers it refers to.
    pub fn is_copy(&self) -> bool {
        self.wal.is_some()
    }

    /// Every identifier under which nothing may be removed while it stands.
    pub fn identifiers(&self) -> impl Iterator<Item = BackupId> + '_ {
        [Some(self.backup), self.parent].into_iter().flatten().chain(self.protects.iter().copied())
    }
}

/// WAL that a pin needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedWal {
    /// Of which system.
    pub system_identifier: SystemIdentifier,
    /// On which timeline it begins.
    pub timeline: Timeline,
    /// From where.
    pub start_lsn: Lsn,
}

/// What keeps a backup from being removed by retention.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Which backup.
    pub backup: BackupId,
    /// Why, in the operator's words.
    pub reason: String,
    /// Who said so.
    pub by: String,
    /// Since when.
    pub since: Timestamp,
    /// Until when; for good if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Whether it is a restore's, see [`super::Root::with_restore`]: then WAL from the backup's start on is kept as well. A
    /// backup has at most one of restores, and one of an operator.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restore: bool,
    /// What newer versions added; kept.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

impl Hold {
    /// An operator's hold, for good.
    pub fn new(backup: BackupId, reason: String, by: String, since: Timestamp) -> Self {
        Self { backup, reason, by, since, until: None, restore: false, unknown: BTreeMap::new() }
    }

    /// Whether it holds at a time.
    pub fn holds_at(&self, at: Timestamp) -> bool {
        self.until.is_none_or(|until| until > at)
    }
}

/// Objects that nobody refers to and that anybody may remove, at any time from the commit on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condemned {
    /// The root that condemned them.
    pub generation: Generation,
    /// By identifier, oldest first. None of them exists, is under way or is protected by a pin, except that kept packs of
    /// a protected one are no part of its ranges.
    pub backups: Vec<CondemnedBackup>,
}

/// What was condemned of the objects under one identifier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CondemnedBackup {
    /// Which identifier.
    pub backup: BackupId,
    /// Its manifest and these packs; absent: everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packs: Option<Vec<PackRange>>,
}

/// Numbers of packs, both ends included. A JSON array of two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "(u32, u32)", into = "(u32, u32)")]
pub struct PackRange {
    /// The first.
    pub first: u32,
    /// The last.
    pub last: u32,
}

impl From<(u32, u32)> for PackRange {
    fn from((first, last): (u32, u32)) -> Self {
        Self { first, last }
    }
}

impl From<PackRange> for (u32, u32) {
    fn from(range: PackRange) -> Self {
        (range.first, range.last)
    }
}

impl CondemnedBackup {
    /// Whether a pack of this identifier was condemned.
    pub fn holds(&self, pack: u32) -> bool {
        self.packs.as_ref().is_none_or(|packs| packs.iter().any(|range| (range.first..=range.last).contains(&pack)))
    }
}

/// Identifiers of which objects were condemned. The newest are remembered one by one, older ones by their time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    /// This identifier and all that sort before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<BackupId>,
    /// Single ones after that, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backups: Vec<BackupId>,
}

impl Gone {
    /// Whether nothing was ever condemned.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether an identifier is among them. One that exists or is under way is not gone all the same, see
    /// [`super::Root::is_gone`].
    pub fn holds(&self, id: &BackupId) -> bool {
        self.until.is_some_and(|until| *id <= until) || self.backups.binary_search(id).is_ok()
    }

    /// Adds one.
    pub(super) fn add(&mut self, id: BackupId) {
        if let Err(index) = self.backups.binary_search(&id) {
            self.backups.insert(index, id);
        }
        while self.backups.len() > GONE_LIMIT {
            self.until = self.until.max(Some(self.backups.remove(0)));
        }
    }
}

/// From where the WAL of a timeline is kept. Segments, `.partial` and `.backup` files before it are condemned, except in
/// the spans of older backups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalKept {
    /// The first segment that is kept with all that follow; tells the timeline.
    pub from: SegmentName,
    /// What is kept before that, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<WalSpan>,
}

/// Segments of one timeline, both ends included. A JSON array of two names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "(SegmentName, SegmentName)", into = "(SegmentName, SegmentName)")]
pub struct WalSpan {
    /// The first.
    pub first: SegmentName,
    /// The last.
    pub last: SegmentName,
}

impl From<(SegmentName, SegmentName)> for WalSpan {
    fn from((first, last): (SegmentName, SegmentName)) -> Self {
        Self { first, last }
    }
}

impl From<WalSpan> for (SegmentName, SegmentName) {
    fn from(span: WalSpan) -> Self {
        (span.first, span.last)
    }
}

impl WalKept {
    /// Its timeline.
    pub fn timeline(&self) -> Timeline {
        self.from.timeline()
    }

    /// Whether the files of a segment of this timeline are kept.
    pub fn keeps(&self, segment: SegmentName) -> bool {
        segment >= self.from || self.also.iter().any(|span| (span.first..=span.last).contains(&segment))
    }

    /// Whether the files of a segment are kept by all that is said of a system's timelines; of others nothing was condemned.
    pub fn all_keep(kept: &[Self], segment: SegmentName) -> bool {
        kept.iter().filter(|kept| kept.timeline() == segment.timeline()).all(|kept| kept.keeps(segment))
    }

    /// What of a span of this timeline is kept.
    pub fn part_of(&self, span: SegmentSpan, size: SegmentSize) -> Vec<SegmentSpan> {
        // With another size of segments than the names are of, nothing is known to be condemned.
        let Ok(from) = self.from.number(size) else { return vec![span] };
        let spans =
            self.also.iter().filter_map(|also| Some((also.first.number(size).ok()?, also.last.number(size).ok()?)));
        let kept = spans.chain([(from, SegmentNumber::new(u64::MAX))]);
        let parts =
            kept.map(|(first, last)| SegmentSpan { first: first.max(span.first), last: last.min(span.last), ..span });
        parts.filter(|part| part.first <= part.last).collect()
    }

    /// Takes out of an archive what is not kept of this timeline, whether it was removed already or not.
    pub fn trim(&self, wal: &mut ArchivedWal) {
        let size = wal.segment_size();
        wal.cut(self.timeline(), |span| self.part_of(span, size));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u32) -> BackupId {
        BackupId::new(Timestamp::UNIX_EPOCH, number)
    }

    #[test]
    fn what_is_gone_stays_gone_in_bounded_room() {
        let mut gone = Gone::default();
        assert!(gone.is_empty() && !gone.holds(&id(0)));
        for number in (1..=GONE_LIMIT as u32 + 10).rev() {
            gone.add(id(number * 2));
            gone.add(id(number * 2));
        }
        assert_eq!(gone.backups.len(), GONE_LIMIT);
        assert!((1..=GONE_LIMIT as u32 + 10).all(|number| gone.holds(&id(number * 2))));
        // What sorts among the oldest is taken for gone although it never was there.
        assert_eq!((gone.until, gone.holds(&id(3)), gone.holds(&id(101))), (Some(id(20)), true, false));
    }

    #[test]
    fn a_timeline_keeps_what_it_says() {
        let name = |text: &str| text.parse::<SegmentName>().unwrap();
        let kept: WalKept = serde_json::from_str(
            r#"{"from":"000000010000000000000042","also":[["000000010000000000000010","000000010000000000000012"]]}"#,
        )
        .unwrap();
        let check = |segment: &str, keeps| assert_eq!(kept.keeps(name(segment)), keeps, "{segment}");
        check("00000001000000000000000F", false);
        check("000000010000000000000010", true);
        check("000000010000000000000012", true);
        check("000000010000000000000013", false);
        check("000000010000000000000041", false);
        check("000000010000000000000042", true);
        check("000000010000000100000000", true);
        let size = SegmentSize::DEFAULT;
        let span = |first: u64, last: u64| {
            let (first, last) = (SegmentNumber::new(first), SegmentNumber::new(last));
            SegmentSpan { timeline: Timeline::FIRST, first, last }
        };
        assert_eq!(kept.part_of(span(1, 0x60), size), [span(0x10, 0x12), span(0x42, 0x60)]);
        assert_eq!(kept.part_of(span(0x11, 0x41), size), [span(0x11, 0x12)]);
        assert_eq!(kept.part_of(span(0x13, 0x41), size), []);
        let mut wal = ArchivedWal::new(size);
        wal.add_span(span(1, 0x60));
        kept.trim(&mut wal);
        assert_eq!(wal.spans().collect::<Vec<_>>(), [span(0x10, 0x12), span(0x42, 0x60)]);
    }
}
