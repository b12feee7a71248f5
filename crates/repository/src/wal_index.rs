//! What WAL a store holds of one system, found by listing.
//!
//! A listing tells names, contents and sizes, not whether a segment is complete. Objects are therefore read where it
//! matters: all contents of a name that has several, and the last segment before each end of a range, which alone can
//! be an incomplete one that nothing follows. Memory grows with the number of ranges, logs and oddities, not of segments.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use jiff::Timestamp;
use postgres_format::timeline_history::{MAX_BYTES as HISTORY_LIMIT_BYTES, TimelineHistory};
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline, WalFileName};

use crate::coverage::ArchivedWal;
use crate::fingerprint::Fingerprint;
use crate::key::{self, ObjectKey, ParsedKey};
use crate::name::{ClusterName, NodeName, StoreName};
use crate::root::WalKept;
use crate::store::{self, LIST_LIMIT, ObjectStore, StoreError};
use crate::wal::{Located, Variant, WalError, WalHeader, locate, read_header, read_history, variants};

/// Most histories, refused histories or decisions of one system.
const HISTORY_LIMIT: usize = 100_000;
/// Most ends of ranges whose last segment is read, counted from the newest of each timeline.
const END_LIMIT: usize = 32;
/// How many segments are looked at, backwards from the end of a range, for the time of a commit.
pub(crate) const COMMIT_SEARCH_LIMIT: usize = 16;

/// An object of the WAL archive, as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalObject {
    /// Its key.
    pub key: ObjectKey,
    /// The file's name.
    pub name: WalFileName,
    /// Its content.
    pub fingerprint: Fingerprint,
    /// Size of the object in bytes.
    pub size: u64,
}

/// Part of a listing of the WAL archive.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WalPage {
    /// Objects in order of their keys.
    pub objects: Vec<WalObject>,
    /// Keys that this version does not understand.
    pub unknown: Vec<ObjectKey>,
    /// Where the next page starts after; `None` at the end.
    pub next: Option<String>,
}

/// Lists segments, `.partial` and `.backup` files of one system, a page at a time, in order of their keys.
pub async fn list_page(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
    after: Option<&str>,
) -> Result<WalPage, StoreError> {
    list_page_under(store, &key::wal_prefix(cluster, system), after).await
}

/// As [`list_page`], of the keys under a prefix.
pub(crate) async fn list_page_under(
    store: &dyn ObjectStore,
    prefix: &str,
    after: Option<&str>,
) -> Result<WalPage, StoreError> {
    let listed = store.list(prefix, after, LIST_LIMIT).await?;
    let mut page = WalPage::default();
    if listed.more {
        page.next = listed.objects.last().map(|entry| entry.key.to_string());
    }
    for entry in listed.objects {
        match entry.key.parsed() {
            Ok(ParsedKey::Wal { name, fingerprint, .. }) => {
                page.objects.push(WalObject { key: entry.key, name, fingerprint, size: entry.size });
            }
            _ => page.unknown.push(entry.key),
        }
    }
    Ok(page)
}

/// A name with contents that exclude each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalConflict {
    /// Which file.
    pub name: WalFileName,
    /// What it could be.
    pub variants: Vec<Variant>,
}

/// A segment of which only an incomplete content is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncompleteSegment {
    /// Which segment.
    pub name: SegmentName,
    /// How far its WAL goes.
    pub logical_end: Option<Lsn>,
    /// Who sent it.
    pub node: NodeName,
}

/// A commit known to lie before a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitSample {
    /// On which timeline.
    pub timeline: Timeline,
    /// The end of the segment whose last commit it is.
    pub before: Lsn,
    /// When it was made.
    pub time: Timestamp,
}

/// What WAL a store holds of one system.
#[derive(Debug, Clone, PartialEq)]
pub struct WalIndex {
    /// Which store.
    pub store: StoreName,
    /// Complete segments and histories; `None` if there is no segment to take the segment size from.
    pub wal: Option<ArchivedWal>,
    /// Histories, also without any segment.
    pub histories: BTreeMap<Timeline, TimelineHistory>,
    /// Names with contents that exclude each other, and refused history files.
    pub conflicts: Vec<WalConflict>,
    /// Segments that are not complete.
    pub incomplete: Vec<IncompleteSegment>,
    /// The last commits before ends of ranges.
    pub commits: Vec<CommitSample>,
    /// Where the records end in last segments of ranges that are not full.
    pub ends: BTreeMap<SegmentName, Lsn>,
    /// A digest of names and contents of the segments of each log: by these stores are compared.
    pub logs: BTreeMap<(Timeline, u32), u64>,
    /// Names an operator decided about.
    pub decided: BTreeSet<WalFileName>,
    /// Objects listed, histories not counted.
    pub objects: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// What could not be understood, a line each.
    pub problems: Vec<String>,
    /// From where the store keeps WAL, by timeline; nothing that was condemned is counted above.
    pub kept: Vec<WalKept>,
}

/// Lists what a store holds of one system, and reads what a listing cannot tell.
pub async fn load(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
) -> Result<WalIndex, WalError> {
    let mut loading = Loading { store, cluster, system, index: WalIndex::empty(store.name().clone()) };
    loading.read_histories().await?;
    let mut looked_at = loading.list_segments().await?;
    loading.read_conflicts().await?;
    loading.index.decided = loading.decided_names().await?;
    looked_at.extend(&loading.index.decided);
    for name in looked_at {
        loading.resolve(name).await?;
    }
    loading.read_ends().await?;
    let mut index = loading.index;
    if let Some(wal) = &mut index.wal {
        for (timeline, history) in &index.histories {
            wal.add_history(*timeline, history.clone());
        }
    }
    Ok(index)
}

impl WalIndex {
    /// Whether any content of a segment is there.
    pub(crate) fn holds_some(&self, name: SegmentName) -> bool {
        let complete =
            |wal: &ArchivedWal| name.number(wal.segment_size()).is_ok_and(|number| wal.holds(name.timeline(), number));
        self.wal.as_ref().is_some_and(complete)
            || self.incomplete.iter().any(|incomplete| incomplete.name == name)
            || self.conflicts.iter().any(|conflict| conflict.name == WalFileName::Segment(name))
    }

    /// Whether the store keeps a segment, if it has it.
    pub fn keeps(&self, name: SegmentName) -> bool {
        let kept = self.kept.iter().find(|kept| kept.timeline() == name.timeline());
        kept.is_none_or(|kept| kept.keeps(name))
    }

    /// Takes out what was condemned, as the store's root says: it may be removed at any time, so nobody can count on it.
    pub fn trim(&mut self, kept: &[WalKept]) {
        self.kept = kept.to_vec();
        if let Some(wal) = &mut self.wal {
            kept.iter().for_each(|kept| kept.trim(wal));
        }
        let keeps = |name: SegmentName| {
            let kept = kept.iter().find(|kept| kept.timeline() == name.timeline());
            kept.is_none_or(|kept| kept.keeps(name))
        };
        self.conflicts.retain(|conflict| conflict.name.segment().is_none_or(keeps));
        self.incomplete.retain(|incomplete| keeps(incomplete.name));
    }

    fn empty(store: StoreName) -> Self {
        Self {
            store,
            wal: None,
            histories: BTreeMap::new(),
            conflicts: Vec::new(),
            incomplete: Vec::new(),
            commits: Vec::new(),
            ends: BTreeMap::new(),
            logs: BTreeMap::new(),
            decided: BTreeSet::new(),
            objects: 0,
            bytes: 0,
            problems: Vec::new(),
            kept: Vec::new(),
        }
    }
}

/// Of an object's name and content; the same in every store that holds it.
fn digest(object: &WalObject) -> u64 {
    let mut hasher = DefaultHasher::new();
    (object.name, object.fingerprint).hash(&mut hasher);
    hasher.finish()
}

struct Loading<'a> {
    store: &'a dyn ObjectStore,
    cluster: &'a ClusterName,
    system: SystemIdentifier,
    index: WalIndex,
}

impl Loading<'_> {
    async fn read_histories(&mut self) -> Result<(), WalError> {
        let prefix = key::history_prefix(self.cluster, self.system);
        for entry in store::list_all(self.store, &prefix, HISTORY_LIMIT).await? {
            let Ok(ParsedKey::History { timeline, .. }) = entry.key.parsed() else {
                self.index.problems.push(format!("{} is no key of this version", entry.key));
                continue;
            };
            self.read_history(timeline, &entry.key).await?;
        }
        Ok(())
    }

    async fn read_history(&mut self, timeline: Timeline, key: &ObjectKey) -> Result<(), WalError> {
        let text = match read_history(self.store, key, HISTORY_LIMIT_BYTES).await {
            Ok(text) => text,
            Err(error @ (WalError::Damaged { .. } | WalError::Write(_))) => {
                self.index.problems.push(error.to_string());
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        match TimelineHistory::parse(timeline, &text) {
            Ok(history) => drop(self.index.histories.insert(timeline, history)),
            Err(error) => self.index.problems.push(format!("{key}: {error}")),
        }
        Ok(())
    }

    /// Gathers segments. Gives the names that have several contents.
    async fn list_segments(&mut self) -> Result<Vec<WalFileName>, WalError> {
        let mut several: Vec<WalFileName> = Vec::new();
        let mut last: Option<WalFileName> = None;
        let mut after = None;
        loop {
            let page = list_page(self.store, self.cluster, self.system, after.as_deref()).await?;
            let problem = |key: &ObjectKey| format!("{key} is no key of this version");
            self.index.problems.extend(page.unknown.iter().map(problem));
            for object in page.objects {
                self.index.objects += 1;
                self.index.bytes += object.size;
                if last == Some(object.name) && several.last() != Some(&object.name) {
                    several.push(object.name);
                }
                last = Some(object.name);
                if let WalFileName::Segment(name) = object.name {
                    let log = self.index.logs.entry((name.timeline(), name.log())).or_default();
                    *log ^= digest(&object);
                    self.add_segment(name, &object).await?;
                }
            }
            after = page.next;
            if after.is_none() {
                return Ok(several);
            }
        }
    }

    async fn add_segment(&mut self, name: SegmentName, object: &WalObject) -> Result<(), WalError> {
        if self.index.wal.is_none() {
            let size = match self.header(&object.key, object.size).await? {
                Some(header) => SegmentSize::from_bytes(header.size).ok(),
                None => None,
            };
            let Some(size) = size else {
                self.index.problems.push(format!("{} does not tell the segment size", object.key));
                return Ok(());
            };
            self.index.wal = Some(ArchivedWal::new(size));
        }
        let wal = self.index.wal.as_mut();
        if !wal.is_some_and(|wal| wal.add(name)) {
            self.index.problems.push(format!("{} does not fit the segment size", object.key));
        }
        Ok(())
    }

    /// History files that were refused lie apart.
    async fn read_conflicts(&mut self) -> Result<(), WalError> {
        let prefix = key::conflict_prefix(self.cluster, self.system);
        for entry in store::list_all(self.store, &prefix, HISTORY_LIMIT).await? {
            if let Ok(ParsedKey::Conflict { name, fingerprint, .. }) = entry.key.parsed() {
                let variant = Variant { key: entry.key, size: entry.size, fingerprint: Some(fingerprint) };
                self.index.conflicts.push(WalConflict { name, variants: vec![variant] });
            }
        }
        Ok(())
    }

    /// Names an operator decided about: what is there may not be what was chosen.
    async fn decided_names(&mut self) -> Result<BTreeSet<WalFileName>, WalError> {
        let prefix = key::decisions_prefix(self.cluster, self.system);
        let listed = store::list_all(self.store, &prefix, HISTORY_LIMIT).await?;
        let named = listed.into_iter().filter_map(|entry| match entry.key.parsed() {
            Ok(ParsedKey::Decision { name, .. }) => Some(name),
            _ => None,
        });
        Ok(named.collect())
    }

    /// What a name with several contents, or a decision, amounts to.
    async fn resolve(&mut self, name: WalFileName) -> Result<(), WalError> {
        let segment = match name {
            WalFileName::Segment(segment) => segment,
            WalFileName::History(timeline) => return self.resolve_history(timeline).await,
            WalFileName::Partial(_) | WalFileName::BackupHistory { .. } => return Ok(()),
        };
        let located = match locate(self.store, self.cluster, self.system, &name).await {
            Ok(located) => located,
            Err(error @ WalError::Damaged { .. }) => {
                self.index.problems.push(error.to_string());
                self.remove(segment);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        match located {
            Located::Object { .. } | Located::Absent => {}
            Located::Incomplete { key, size, .. } => {
                self.remove(segment);
                if let Some(header) = self.header(&key, size).await? {
                    self.add_incomplete(segment, header);
                }
            }
            Located::Conflict { variants } => {
                self.remove(segment);
                if !self.index.conflicts.iter().any(|conflict| conflict.name == name) {
                    self.index.conflicts.push(WalConflict { name, variants });
                }
            }
        }
        Ok(())
    }

    /// Which history counts after a decision: one that was refused once, the stored one, or none.
    async fn resolve_history(&mut self, timeline: Timeline) -> Result<(), WalError> {
        let name = WalFileName::History(timeline);
        let located = match locate(self.store, self.cluster, self.system, &name).await {
            Ok(located) => located,
            // Told of where histories are read.
            Err(WalError::Damaged { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        match located {
            Located::Object { key, .. } => {
                self.index.conflicts.retain(|conflict| conflict.name != name);
                self.read_history(timeline, &key).await?;
            }
            Located::Conflict { variants } => {
                self.index.histories.remove(&timeline);
                self.index.conflicts.push(WalConflict { name, variants });
            }
            Located::Incomplete { .. } | Located::Absent => {}
        }
        Ok(())
    }

    /// Reads the segments before the ends of ranges: whether they are complete, and when their last commit was.
    async fn read_ends(&mut self) -> Result<(), WalError> {
        let Some(wal) = &self.index.wal else {
            return Ok(());
        };
        let size = wal.segment_size();
        let mut spans: Vec<_> = wal.spans().collect();
        spans.reverse();
        let mut seen: BTreeMap<Timeline, usize> = BTreeMap::new();
        for span in spans {
            let seen = seen.entry(span.timeline).or_default();
            *seen += 1;
            if *seen > END_LIMIT {
                continue;
            }
            let mut number = Some(span.last);
            for _ in 0..COMMIT_SEARCH_LIMIT {
                let Some(at) = number.filter(|at| *at >= span.first) else {
                    break;
                };
                let name = SegmentName::new(span.timeline, at, size);
                let over = self.read_end(name, at, size).await?;
                if at != span.last {
                    self.index.ends.remove(&name);
                }
                if over {
                    break;
                }
                number = at.previous();
            }
        }
        Ok(())
    }

    /// Whether the search for a commit is over with this segment.
    async fn read_end(
        &mut self,
        name: SegmentName,
        number: SegmentNumber,
        size: SegmentSize,
    ) -> Result<bool, WalError> {
        let file = WalFileName::Segment(name);
        let all = variants(self.store, self.cluster, self.system, &file).await?;
        let [only] = all.as_slice() else {
            // Several contents were resolved already, and which of them has the commit is not worth the reading.
            return Ok(false);
        };
        let Some(header) = self.header(&only.key, only.size).await? else {
            return Ok(false);
        };
        if !header.complete {
            self.remove(name);
            self.add_incomplete(name, header);
            return Ok(false);
        }
        if let Some(end) = header.logical_end.filter(|end| *end < number.end(size)) {
            self.index.ends.insert(name, end);
        }
        if let Some(time) = header.last_commit_time {
            let sample = CommitSample { timeline: name.timeline(), before: number.end(size), time };
            self.index.commits.push(sample);
        }
        Ok(header.last_commit_time.is_some())
    }

    /// The header of an object; `None`, and a problem, if it is damaged.
    async fn header(&mut self, key: &ObjectKey, size: u64) -> Result<Option<WalHeader>, WalError> {
        match read_header(self.store, key, size).await {
            Ok(header) => Ok(Some(header)),
            Err(error @ WalError::Damaged { .. }) => {
                self.index.problems.push(error.to_string());
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn remove(&mut self, name: SegmentName) {
        if let Some(wal) = &mut self.index.wal {
            wal.remove(name);
        }
    }

    fn add_incomplete(&mut self, name: SegmentName, header: WalHeader) {
        let (logical_end, node) = (header.logical_end, header.node);
        self.index.incomplete.push(IncompleteSegment { name, logical_end, node });
    }
}
