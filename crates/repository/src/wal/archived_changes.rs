//! What a range of archived WAL changed, as the stores together tell it.
//!
//! ```text
//! names of the range ─▶ one listing a log and store ─▶ what lies beside each segment, else the segment itself ─▶ join
//! ```
//!
//! Which content of a name counts is decided by the rules for fetching it. What a content tells of changes is the same in
//! whichever store it lies, so any copy will do; a copy that must not be believed is passed over, and the WAL is read in
//! the end. Both give the same map.
//!
//! Invariants: a map is complete, or there is none and the reason is told. Memory: the listing of [`LOGS_KEPT`] logs, the
//! changes of [`AT_ONCE`] segments, and the map. Every question to a store has a deadline.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::wal_changes::{ChangeMap, ChangeScan, Doubt, Joiner, SegmentChanges};
use postgres_format::wal_segment::{Expected, PAGE_BYTES};
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline, WalFileName};
use tokio::sync::OnceCell;

use super::WalError;
use super::changes::read_changes;
use super::fetch::read_to;
use super::union::{Silences, ask_all};
use super::variants::{Choice, Wanted};
use crate::key::{self, ObjectKey, ParsedKey};
use crate::name::ClusterName;
use crate::observe::chain;
use crate::store::{self, ObjectStore, StoreError};
use crate::wal_index::list_page_under;

/// Segments looked at at the same time.
const AT_ONCE: usize = 8;
/// Logs (of 4 GiB of WAL each) whose listing is kept.
const LOGS_KEPT: usize = 2;
/// How long a store may take to list a log, or all choices of operators.
const LIST_PATIENCE: Duration = Duration::from_secs(30);
/// How long a store may take to give what lies beside one segment.
const CHANGES_PATIENCE: Duration = Duration::from_secs(20);
/// How long a store may take to give one segment.
const SEGMENT_PATIENCE: Duration = Duration::from_secs(120);
/// Most choices of operators that are listed.
const DECISIONS_MAX: usize = 100_000;
/// Most contents in one log of one store: of the smallest segments, each in two contents.
const LOG_CONTENTS_MAX: usize = 8_192;
/// Bytes of the header of a segment's first page, in which no record begins.
const FIRST_HEADER_BYTES: u64 = 40;

/// Why it is not known what a range of WAL changed.
#[derive(Debug, thiserror::Error)]
pub enum Untold {
    /// A segment is archived nowhere.
    #[error("WAL {name} is in no store")]
    Absent {
        /// Which.
        name: SegmentName,
    },
    /// A segment may be archived, and could not be read.
    #[error("WAL {name} could not be read: {}", reasons.join("; "))]
    Unread {
        /// Which.
        name: SegmentName,
        /// A line each.
        reasons: Vec<String>,
    },
    /// Too many segments would have to be read that do not tell by themselves.
    #[error("WAL {name} and others would have to be read, more than {limit_bytes} bytes")]
    TooMuch {
        /// The first that was not read.
        name: SegmentName,
        /// How many bytes were to be read at most.
        limit_bytes: u64,
    },
    /// The WAL is there, and does not tell for sure.
    #[error("{0}")]
    Doubt(Doubt),
}

/// What a range of WAL changed, and how that was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Gathered {
    /// What changed.
    pub map: ChangeMap,
    /// Segments of which it lay beside the WAL.
    pub told: u64,
    /// Segments whose WAL was read.
    pub read: u64,
}

/// How it was found what one segment changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// It lay beside the WAL.
    Told,
    /// The WAL was read.
    Read,
}

/// The listing of one log, made once.
type LogCell = Arc<OnceCell<Arc<Log>>>;

/// The archived WAL of one system in several stores, as far as it tells of changes.
#[derive(Debug)]
pub struct ArchivedChanges<'a> {
    stores: &'a [Arc<dyn ObjectStore>],
    cluster: &'a ClusterName,
    system: SystemIdentifier,
    size: SegmentSize,
    /// Listings, of the logs looked at last.
    logs: Mutex<BTreeMap<(Timeline, u32), LogCell>>,
    /// Names that operators chose a content of.
    decided: OnceCell<BTreeSet<WalFileName>>,
    silences: Silences,
}

/// What the stores have of one log.
#[derive(Debug, Default)]
struct Log {
    contents: BTreeMap<SegmentName, Vec<Copies>>,
    /// Some key was not understood: then single names are asked about.
    odd: bool,
    /// Why stores did not say, a line each.
    reasons: Vec<String>,
}

/// One content: its key, and the places of the stores that have it, with the object's size there.
#[derive(Debug, Clone)]
struct Copies {
    key: ObjectKey,
    places: Vec<(usize, u64)>,
}

impl<'a> ArchivedChanges<'a> {
    /// Nothing is asked yet. Near stores first.
    pub fn new(
        stores: &'a [Arc<dyn ObjectStore>],
        cluster: &'a ClusterName,
        system: SystemIdentifier,
        size: SegmentSize,
    ) -> Self {
        let silences = Silences::default();
        Self { stores, cluster, system, size, logs: Mutex::default(), decided: OnceCell::new(), silences }
    }

    /// What WAL changed between two positions on the way to a timeline, `range.start` being the start of a backup and
    /// `range.end` that of a later one. At most `read_bytes_max` of WAL are read where nothing lies beside it.
    ///
    /// # Errors
    /// [`Untold`].
    pub async fn between(
        &self,
        history: &TimelineHistory,
        range: Range<Lsn>,
        read_bytes_max: u64,
    ) -> Result<Gathered, Untold> {
        let read_bytes = AtomicU64::new(0);
        let mut gathered = Gathered { map: ChangeMap::empty(), told: 0, read: 0 };
        let mut joiner = Joiner::new(range.clone());
        let found = segments(history, self.size, &range).into_iter().map(|name| {
            let read_bytes = &read_bytes;
            async move {
                if let Some(changes) = self.told(name).await? {
                    return Ok((changes, Source::Told));
                }
                if read_bytes.fetch_add(self.size.bytes(), Ordering::Relaxed) >= read_bytes_max {
                    return Err(Untold::TooMuch { name, limit_bytes: read_bytes_max });
                }
                Ok((self.read(name).await?, Source::Read))
            }
        });
        let mut found = futures_util::stream::iter(found).buffered(AT_ONCE);
        while let Some(found) = found.next().await {
            let (changes, source) = found?;
            match source {
                Source::Told => gathered.told += 1,
                Source::Read => gathered.read += 1,
            }
            joiner.push(&changes).map_err(Untold::Doubt)?;
        }
        gathered.map = joiner.finish().map_err(Untold::Doubt)?;
        Ok(gathered)
    }

    /// What lies beside the WAL of a segment; `None` if no store has anything that can be used.
    ///
    /// # Errors
    /// [`Untold::Absent`], [`Untold::Unread`] if the stores do not have the segment, or in conflict.
    pub async fn told(&self, name: SegmentName) -> Result<Option<SegmentChanges>, Untold> {
        let Copies { key, places } = self.copies(name).await?;
        for (place, size) in places {
            let store = &*self.stores[place];
            match self.in_time(store, CHANGES_PATIENCE, "read changes", read_changes(store, &key, size)).await {
                Ok(Some(changes)) => return Ok(Some(changes)),
                Ok(None) => {}
                Err(error @ WalError::Damaged { .. }) => {
                    tracing::warn!(error = %chain(&error), "what WAL changed is not known from beside it; the WAL is read");
                }
                Err(error) => tracing::debug!(error = %chain(&error), "a store does not tell what WAL changed"),
            }
        }
        Ok(None)
    }

    /// What a segment changed, from its WAL, all of which is read and verified. Dropping the future lets a decoder that
    /// runs come to its end.
    ///
    /// # Errors
    /// [`Untold::Absent`], [`Untold::Unread`].
    pub async fn read(&self, name: SegmentName) -> Result<SegmentChanges, Untold> {
        let Copies { key, places } = self.copies(name).await?;
        let expected = Expected { name, size: self.size, system_identifier: self.system, partial: false };
        let mut reasons = Vec::new();
        for (place, _) in places {
            let store = &self.stores[place];
            let scanned = scan(Arc::clone(store), key.clone(), expected);
            match self.in_time(&**store, SEGMENT_PATIENCE, "read a segment", scanned).await {
                Ok(changes) => return Ok(changes),
                Err(error) => reasons.push(chain(&error)),
            }
        }
        Err(Untold::Unread { name, reasons })
    }

    /// The content of a segment that counts, and who has it.
    async fn copies(&self, name: SegmentName) -> Result<Copies, Untold> {
        let log = self.log(name.timeline(), name.log()).await;
        let file = WalFileName::Segment(name);
        let decided = self.decided.get_or_init(|| self.list_decided()).await;
        match log.contents.get(&name).map(Vec::as_slice) {
            Some([only]) if !log.odd && !decided.contains(&file) => Ok(only.clone()),
            None if !log.odd && log.reasons.is_empty() && !self.stores.is_empty() => Err(Untold::Absent { name }),
            _ => self.chosen(name).await,
        }
    }

    /// As the rules for several contents choose.
    async fn chosen(&self, name: SegmentName) -> Result<Copies, Untold> {
        let file = WalFileName::Segment(name);
        let wanted = Wanted { cluster: self.cluster, system: self.system, name: &file };
        let said = ask_all(self.stores, wanted, &self.silences).await;
        let unread = |reasons| Err(Untold::Unread { name, reasons });
        match said.choose(&file).await {
            Ok(Choice::Serve(variant) | Choice::Incomplete(variant)) => {
                Ok(Copies { places: said.places(&variant), key: variant.key })
            }
            Ok(Choice::Nothing) if said.reasons.is_empty() && !self.stores.is_empty() => Err(Untold::Absent { name }),
            Ok(Choice::Nothing) => unread(said.reasons.clone()),
            Ok(Choice::Conflict(variants)) => unread(vec![format!("it is in conflict: {}", said.describe(&variants))]),
            Err(error) => unread(vec![chain(&error)]),
        }
    }

    async fn log(&self, timeline: Timeline, log: u32) -> Arc<Log> {
        let listed = {
            let mut logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
            if logs.len() >= LOGS_KEPT && !logs.contains_key(&(timeline, log)) {
                // Ranges are gone through upwards.
                logs.pop_first();
            }
            Arc::clone(logs.entry((timeline, log)).or_default())
        };
        let listed = listed.get_or_init(async || Arc::new(self.list_log(timeline, log).await)).await;
        Arc::clone(listed)
    }

    async fn list_log(&self, timeline: Timeline, log: u32) -> Log {
        let prefix = key::wal_log_prefix(self.cluster, self.system, timeline, log);
        let asked = self.stores.iter().map(|store| {
            let listing = list_contents(&**store, &prefix);
            self.in_time(&**store, LIST_PATIENCE, "list WAL", listing)
        });
        let mut all = Log::default();
        for (place, listed) in join_all(asked).await.into_iter().enumerate() {
            match listed {
                Ok(listed) => all.add(place, listed),
                Err(error) => all.reasons.push(chain(&error)),
            }
        }
        all
    }

    async fn list_decided(&self) -> BTreeSet<WalFileName> {
        let prefix = key::decisions_prefix(self.cluster, self.system);
        let asked = self.stores.iter().map(|store| {
            let listing = async { Ok(store::list_all(&**store, &prefix, DECISIONS_MAX).await?) };
            self.in_time(&**store, LIST_PATIENCE, "list choices", listing)
        });
        let listed = join_all(asked).await.into_iter().flatten().flatten();
        let named = listed.filter_map(|entry| match entry.key.parsed() {
            Ok(ParsedKey::Decision { name, .. }) => Some(name),
            _ => None,
        });
        named.collect()
    }

    /// Asks a store, unless it was silent lately.
    async fn in_time<T>(
        &self,
        store: &dyn ObjectStore,
        patience: Duration,
        operation: &'static str,
        asking: impl Future<Output = Result<T, WalError>>,
    ) -> Result<T, WalError> {
        let silent = || WalError::Store(StoreError::Timeout { store: store.name().clone(), operation });
        if self.silences.holds(store.name()) {
            return Err(silent());
        }
        let answer = tokio::time::timeout(patience, asking).await.unwrap_or_else(|_| Err(silent()));
        if matches!(answer, Err(WalError::Store(StoreError::Timeout { .. }))) {
            self.silences.note(store.name());
        }
        answer
    }
}

impl Log {
    fn add(&mut self, place: usize, (objects, odd): (Vec<Listed>, bool)) {
        self.odd |= odd;
        for Listed { name, key, size } in objects {
            let contents = self.contents.entry(name).or_default();
            match contents.iter_mut().find(|content| content.key == key) {
                Some(content) => content.places.push((place, size)),
                None => contents.push(Copies { key, places: vec![(place, size)] }),
            }
        }
    }
}

/// A segment's object in a listing.
struct Listed {
    name: SegmentName,
    key: ObjectKey,
    size: u64,
}

/// The segments' objects of one log in a store, and whether there are keys that are not understood.
async fn list_contents(store: &dyn ObjectStore, prefix: &str) -> Result<(Vec<Listed>, bool), WalError> {
    let (mut listed, mut odd, mut after) = (Vec::new(), false, None);
    loop {
        let page = list_page_under(store, prefix, after.as_deref()).await?;
        odd |= !page.unknown.is_empty();
        listed.extend(page.objects.into_iter().filter_map(|object| match object.name {
            WalFileName::Segment(name) => Some(Listed { name, key: object.key, size: object.size }),
            _ => None,
        }));
        if listed.len() > LOG_CONTENTS_MAX {
            return Err(StoreError::TooLong { limit_bytes: LOG_CONTENTS_MAX as u64 }.into());
        }
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok((listed, odd)),
        }
    }
}

/// The segments from the one that holds the start to the one that holds the last byte that is needed, each of the newest
/// timeline on the way that had begun by its end.
pub fn segments(history: &TimelineHistory, size: SegmentSize, range: &Range<Lsn>) -> Vec<SegmentName> {
    if range.start >= range.end {
        return Vec::new();
    }
    let first = SegmentNumber::containing(range.start, size).as_u64();
    let last = SegmentNumber::last_before(range.end, size);
    // Of a segment that has no more than a page header before the end nothing is needed, and perhaps it does not exist.
    let needed = range.end.as_u64().saturating_sub(last.start(size).as_u64()) > FIRST_HEADER_BYTES;
    let end = last.as_u64() + u64::from(needed);
    let name = |number| {
        let number = SegmentNumber::new(number);
        let last_byte = Lsn::new(number.start(size).as_u64() + (size.bytes() - 1));
        SegmentName::new(history.timeline_at(last_byte), number, size)
    };
    (first..end.max(first + 1)).map(name).collect()
}

/// Decodes a segment and scans it on the blocking pool.
async fn scan(store: Arc<dyn ObjectStore>, key: ObjectKey, expected: Expected) -> Result<SegmentChanges, WalError> {
    let runtime = tokio::runtime::Handle::current();
    let scanned = tokio::task::spawn_blocking(move || {
        let mut pages = Pages { scan: ChangeScan::new(expected), rest: Vec::new() };
        runtime.block_on(read_to(store.as_ref(), &key, &mut pages))?;
        let (_, changes) = pages.scan.finish().map_err(|error| WalError::Write(io::Error::other(error)))?;
        Ok(changes)
    });
    scanned.await.unwrap_or_else(|error| Err(WalError::Write(io::Error::other(error))))
}

/// Hands decoded bytes to a scan, which takes whole pages.
struct Pages {
    scan: ChangeScan,
    /// The beginning of a page.
    rest: Vec<u8>,
}

impl Write for Pages {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut left = bytes;
        if !self.rest.is_empty() {
            let (piece, others) = left.split_at(left.len().min(PAGE_BYTES - self.rest.len()));
            self.rest.extend_from_slice(piece);
            left = others;
            if self.rest.len() < PAGE_BYTES {
                return Ok(bytes.len());
            }
            self.scan.push(&self.rest).map_err(io::Error::other)?;
            self.rest.clear();
        }
        let (pages, rest) = left.split_at(left.len() - left.len() % PAGE_BYTES);
        self.scan.push(pages).map_err(io::Error::other)?;
        self.rest.extend_from_slice(rest);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
