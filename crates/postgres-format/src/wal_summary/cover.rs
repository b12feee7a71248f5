//! Which summaries cover a range of WAL without a gap, as their names tell.

use std::ops::Range;

use super::SummaryName;
use crate::lsn::Lsn;
use crate::timeline::Timeline;
use crate::timeline_history::TimelineHistory;

/// No summary begins at or before a position of the range and reaches beyond it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no WAL summary of timeline {timeline} covers {from}")]
pub struct Uncovered {
    /// The first position that is not covered.
    pub from: Lsn,
    /// Its timeline on the way to the range's end.
    pub timeline: Timeline,
    /// Whether it may be covered soon.
    pub outlook: Outlook,
}

/// Whether a position that no summary covers may be covered soon: summaries are written in the order of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outlook {
    /// There is no summary of what follows it.
    Awaited,
    /// There is one.
    Missed,
}

/// Summaries that cover a range on the way along a history to its timeline; no more of them than needed. Those of an older timeline may reach beyond
/// its end: what they tell then is more than what changed.
///
/// # Errors
/// [`Uncovered`] for the first gap.
pub fn cover(
    history: &TimelineHistory,
    range: &Range<Lsn>,
    known: &[SummaryName],
) -> Result<Vec<SummaryName>, Uncovered> {
    let ancestors = history.entries().iter().map(|ended| (ended.timeline, ended.end.min(range.end)));
    let mut covering = Vec::new();
    let mut at = range.start;
    for (timeline, end) in ancestors.chain([(history.timeline(), range.end)]) {
        while at < end {
            let reaching = known.iter().filter(|name| name.timeline == timeline && name.start <= at && name.end > at);
            let Some(longest) = reaching.max_by_key(|name| name.end) else {
                return Err(Uncovered { from: at, timeline, outlook: outlook(history, timeline, at, known) });
            };
            covering.push(*longest);
            at = longest.end.min(end);
        }
    }
    Ok(covering)
}

fn outlook(history: &TimelineHistory, timeline: Timeline, from: Lsn, known: &[SummaryName]) -> Outlook {
    let follows = |name: &&SummaryName| {
        let on_the_way = history.begin_of(name.timeline).is_some();
        on_the_way && (name.timeline > timeline || name.timeline == timeline && name.start > from)
    };
    if known.iter().any(|name| follows(&name)) { Outlook::Missed } else { Outlook::Awaited }
}
