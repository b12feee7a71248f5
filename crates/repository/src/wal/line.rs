//! Whether a segment that lies in the stores belongs to the line that a server recovers along, and whether one that does
//! not is where the archive ends. What several stores say about one name ([`super::fetch()`]) tells neither.
//!
//! ```text
//! 1 ═══════╤═══╪═══▶       recovery along 2 asks for the fork's segment of 2 first, and takes that of 1 if it gets none;
//! 2        ╰───┴───▶       PostgreSQL replays what it gets without stopping at the fork
//!
//! 1 ═════╡  ╞═══╪══▶       a segment that is absent while later WAL is there is a gap: taken for the end, a server
//!        absent            would open without what is behind
//!
//! 1 ═════╡  ╞═╤            so it is where the line goes on with a newer timeline behind the hole: what a primary
//! 2      absent╰──▶        wrote last and nobody archived before another was promoted
//! ```
//!
//! * A server that follows a newer timeline, or will, is not given the older one's segment in which that forked off: as a
//!   standby it then waits, streams, or looks for a new timeline. Behind that segment PostgreSQL asks for an older timeline's
//!   only where it is already past the fork, so nothing is held back there.
//! * A server that follows the older timeline on purpose is given it.
//!
//! Whether there is a newer timeline is told by its history file alone, never by silence.

use std::sync::Arc;

use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline, WalFileName};

use super::{WalError, history_text};
use crate::key::{self, ParsedKey};
use crate::name::{ClusterName, StoreName};
use crate::observe::chain;
use crate::root;
use crate::store::{LIST_LIMIT, ObjectStore};

/// Most pages of one listing.
const PAGES_MAX: usize = 100;

/// Along which timeline a server recovers: `recovery_target_timeline`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Following {
    /// The newest there is, now or later.
    Latest,
    /// This one.
    Timeline(Timeline),
}

/// A segment that goes on past the place where the line to follow left its timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{segment} is not given to a server that follows timeline {newer}: it holds what timeline {} wrote past {fork}, where \
     timeline {newer}'s line left it, and {wanted} is not to be had; recovery_target_timeline = '{}' would follow the former",
    segment.timeline(),
    segment.timeline()
)]
pub struct PastFork {
    /// The segment.
    pub segment: SegmentName,
    /// The timeline to follow.
    pub newer: Timeline,
    /// Where its line left the segment's timeline.
    pub fork: Lsn,
    /// What belongs in the place of the segment.
    pub wanted: SegmentName,
}

/// PURE: whether a segment must be held back from a server. `newest` is the history of the timeline that it follows, or of
/// the newest there is.
pub fn past_fork(
    segment: SegmentName,
    size: SegmentSize,
    following: Following,
    newest: &TimelineHistory,
) -> Option<PastFork> {
    let newer = newest.timeline();
    if let Following::Timeline(followed) = following
        && followed != newer
    {
        return None;
    }
    let fork = newest.end_of(segment.timeline())?;
    let number = SegmentNumber::containing(fork, size);
    if segment.number(size).ok()? != number {
        return None;
    }
    // Of several that begin in this segment the newest has it.
    let begun = newest.entries().iter().rev().find(|ended| SegmentNumber::containing(ended.end, size) <= number)?;
    let wanted = SegmentName::new(newest.timeline_at(begun.end), number, size);
    Some(PastFork { segment, newer, fork, wanted })
}

/// The history of the timeline that a server follows, or of the newest that any store knows; none where it is the first.
/// The lines say which stores did not answer.
pub async fn followed_history(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    system: SystemIdentifier,
    following: Following,
) -> (Option<TimelineHistory>, Vec<String>) {
    let mut reasons = Vec::new();
    let mut found: Option<TimelineHistory> = None;
    let asked = stores.iter().map(|store| history_in(store.as_ref(), cluster, system, following));
    for answer in futures_util::future::join_all(asked).await {
        match answer {
            Ok(Some(history)) if found.as_ref().is_none_or(|known| known.timeline() < history.timeline()) => {
                found = Some(history);
            }
            Ok(_) => {}
            Err(error) => reasons.push(chain(&error)),
        }
    }
    (found, reasons)
}

async fn history_in(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
    following: Following,
) -> Result<Option<TimelineHistory>, WalError> {
    let timeline = match following {
        Following::Timeline(timeline) => Some(timeline),
        Following::Latest => newest_timeline(store, cluster, system).await?,
    };
    let Some(timeline) = timeline.filter(|timeline| *timeline != Timeline::FIRST) else { return Ok(None) };
    let Some(text) = history_text(store, cluster, system, timeline).await? else { return Ok(None) };
    // One that cannot be understood says nothing here, and PostgreSQL would not follow it either.
    Ok(TimelineHistory::parse(timeline, &text).ok())
}

async fn newest_timeline(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
) -> Result<Option<Timeline>, WalError> {
    let prefix = key::history_prefix(cluster, system);
    let mut newest = None;
    let mut after: Option<String> = None;
    for _ in 0..PAGES_MAX {
        let page = store.list(&prefix, after.as_deref(), LIST_LIMIT).await?;
        for entry in &page.objects {
            if let Ok(ParsedKey::History { timeline, .. }) = entry.key.parsed() {
                newest = newest.max(Some(timeline));
            }
        }
        after = page.objects.last().map(|entry| entry.key.as_str().to_owned());
        if !page.more {
            break;
        }
    }
    Ok(newest)
}

/// PURE: the timelines on which a line goes on behind a segment of an older one; none where it left that timeline before.
fn newer_behind(
    history: &TimelineHistory,
    name: SegmentName,
    number: SegmentNumber,
    size: SegmentSize,
) -> Vec<Timeline> {
    match history.end_of(name.timeline()) {
        Some(fork) if number <= SegmentNumber::containing(fork, size) => {
            let line = history.entries().iter().map(|ended| ended.timeline).chain([history.timeline()]);
            line.filter(|timeline| *timeline > name.timeline()).collect()
        }
        _ => Vec::new(),
    }
}

/// The first WAL behind `name` that any store holds in any content, on its timeline or on a newer one of the line that the
/// server follows. With one, `name` being absent is a gap and no end. Of a timeline that ended, the last piece may be there
/// as `.partial` only; that of the same number holds what `name` would, and recovery does not use it.
///
/// A segment before the beginning of its timeline is never the end: its ancestor is asked for next.
///
/// # Errors
/// A line for each store that did not answer, if the others hold none.
pub async fn later_wal(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: SegmentName,
    size: SegmentSize,
    following: Following,
) -> Result<Option<WalFileName>, Vec<String>> {
    let (history, mut reasons) = followed_history(stores, cluster, system, following).await;
    // One that is on no place of this segment size has nothing behind it.
    let Ok(number) = name.number(size) else { return Ok(None) };
    let mut timelines = vec![name.timeline()];
    if let Some(history) = history {
        let begin = history.begin_of(name.timeline()).unwrap_or(Lsn::ZERO);
        if number < SegmentNumber::containing(begin, size) {
            return Ok(None);
        }
        timelines.extend(newer_behind(&history, name, number, size));
    }
    for timeline in timelines {
        let same = SegmentName::new(timeline, number, size);
        let is_later = |found: &WalFileName| match *found {
            WalFileName::Segment(found) => found > same || (found == same && found != name),
            WalFileName::Partial(found) => found > same,
            WalFileName::History(_) | WalFileName::BackupHistory { .. } => false,
        };
        let prefix = key::wal_timeline_prefix(cluster, system, timeline);
        // The name without a fingerprint sorts right before all of its objects.
        let after = key::wal_name_prefix(cluster, system, &WalFileName::Segment(same));
        let asked = stores.iter().map(|store| store.list(&prefix, Some(&after), LIST_LIMIT));
        let mut first: Option<WalFileName> = None;
        for answer in futures_util::future::join_all(asked).await {
            match answer {
                Ok(page) => {
                    let names = page.objects.iter().filter_map(|entry| match entry.key.parsed() {
                        Ok(ParsedKey::Wal { name: found, .. }) if is_later(&found) => Some(found),
                        _ => None,
                    });
                    first = first.into_iter().chain(names).min();
                }
                Err(error) => reasons.push(chain(&error)),
            }
        }
        if first.is_some() {
            return Ok(first);
        }
    }
    if reasons.is_empty() { Ok(None) } else { Err(reasons) }
}

/// Why a segment is absent while later WAL is there: a gap, unless a store says that its retention removed it.
pub async fn absence(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: SegmentName,
    later: WalFileName,
) -> String {
    for store in stores {
        // Who cannot say it says nothing; the answer is the same but for its reason.
        let Ok(Some(root)) = root::newest(store.as_ref(), cluster).await else { continue };
        if root.system(system).is_some_and(|system| !system.keeps_wal(name)) {
            return expired(name, store.name());
        }
    }
    gap(name, later)
}

/// What is said of a segment that retention removed.
pub fn expired(name: SegmentName, store: &StoreName) -> String {
    format!(
        "{name} was removed by the retention of store {store}: WAL this old is kept only as far as a backup needs it to be \
         consistent; recovery goes on from a newer backup, see `pgconvoy info`"
    )
}

/// What is said of a segment that is absent while later WAL is there.
pub fn gap(name: SegmentName, later: WalFileName) -> String {
    format!(
        "{name} is in no store while {later} is: WAL has a gap, and recovery that ended here would lose what is behind it; \
         `pgconvoy restore` plans a recovery that ends before it"
    )
}

#[cfg(test)]
mod tests;
