//! The history file of a timeline: which timelines it descends from, and where each of them ended.
//!
//! ```text
//! 1<TAB>0/1973C78<TAB>no recovery target specified
//!
//! 2<TAB>0/3000000<TAB>before 2026-11-23 04:13:15+00
//! ```
//!
//! One line per ancestor, the oldest first, in decimal (`readTimeLineHistory` in `timeline.c`). The file of a timeline lists all its ancestors;
//! its own range begins where the last of them ended and is open. Blank lines and lines with `#` first are skipped; the reason in the third
//! column may itself hold a line break, so a line that begins with no digit right after an entry is more of its reason.

use crate::lsn::Lsn;
use crate::timeline::Timeline;

/// The longest history file that is read: thousands of promotions.
pub const MAX_BYTES: usize = 1 << 20;

/// An ancestor and where it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The ancestor.
    pub timeline: Timeline,
    /// The first position that is no longer on it.
    pub end: Lsn,
}

/// The ancestry of one timeline. Equal if the meaning is, whatever the reasons say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: Timeline,
    entries: Vec<Ended>,
}

/// Why a history file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// Too long to be a history file.
    #[error("the history file of timeline {timeline} has {bytes} bytes, more than any real one")]
    TooLong { timeline: Timeline, bytes: usize },
    /// A line that is no ancestor, comment or blank.
    #[error("line {line} of the history file of timeline {timeline} is not a timeline, a tab and an LSN")]
    Line { timeline: Timeline, line: usize },
    /// Ancestors out of order, or not older than the timeline itself.
    #[error("line {line} of the history file of timeline {timeline} names timeline {found} out of order")]
    Order { timeline: Timeline, line: usize, found: Timeline },
    /// An ancestor that ended before its own ancestor did.
    #[error(
        "line {line} of the history file of timeline {timeline} ends a timeline at {end}, before the one it came from"
    )]
    End { timeline: Timeline, line: usize, end: Lsn },
}

impl TimelineHistory {
    /// The history of a timeline without ancestors, which has no file: the first one.
    pub const fn root(timeline: Timeline) -> Self {
        Self { timeline, entries: Vec::new() }
    }

    /// Reads the content of a history file of at most [`MAX_BYTES`].
    pub fn parse(timeline: Timeline, file: &[u8]) -> Result<Self, HistoryError> {
        if file.len() > MAX_BYTES {
            return Err(HistoryError::TooLong { timeline, bytes: file.len() });
        }
        let mut entries: Vec<Ended> = Vec::new();
        for (index, text) in file.split(|&byte| byte == b'\n').enumerate() {
            let line = index + 1;
            let text = text.trim_ascii();
            if text.is_empty() || text.starts_with(b"#") {
                continue;
            }
            let Some(entry) = entry(text) else {
                if !entries.is_empty() && !text[0].is_ascii_digit() {
                    continue;
                }
                return Err(HistoryError::Line { timeline, line });
            };
            let last = entries.last();
            if entry.timeline >= timeline || last.is_some_and(|last| entry.timeline <= last.timeline) {
                return Err(HistoryError::Order { timeline, line, found: entry.timeline });
            }
            if last.is_some_and(|last| entry.end < last.end) {
                return Err(HistoryError::End { timeline, line, end: entry.end });
            }
            entries.push(entry);
        }
        Ok(Self { timeline, entries })
    }

    /// The timeline whose history this is.
    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    /// All ancestors, the oldest first.
    pub fn entries(&self) -> &[Ended] {
        &self.entries
    }

    /// The timeline it was promoted from.
    pub fn parent(&self) -> Option<Ended> {
        self.entries.last().copied()
    }

    /// Whether a position on `timeline` lies on this history: reached on the way to this timeline, or on this timeline itself.
    ///
    /// The end of an ancestor belongs to its successor, but a position that *ends* there (a backup's stop) is on both; this takes `lsn` as
    /// such an end and says yes.
    pub fn contains(&self, timeline: Timeline, lsn: Lsn) -> bool {
        match self.range_of(timeline) {
            Some((begin, end)) => begin <= lsn && end.is_none_or(|end| lsn <= end),
            None => false,
        }
    }

    /// Where an ancestor ended; `None` for this timeline itself and for strangers.
    pub fn end_of(&self, timeline: Timeline) -> Option<Lsn> {
        self.entries.iter().find(|entry| entry.timeline == timeline).map(|entry| entry.end)
    }

    /// Where a timeline of this history began (zero for the oldest); `None` for strangers.
    pub fn begin_of(&self, timeline: Timeline) -> Option<Lsn> {
        self.range_of(timeline).map(|(begin, _)| begin)
    }

    /// The timeline of the byte at `lsn` on the way to this timeline.
    pub fn timeline_at(&self, lsn: Lsn) -> Timeline {
        self.entries.iter().find(|entry| lsn < entry.end).map_or(self.timeline, |entry| entry.timeline)
    }

    /// The history file as PostgreSQL would read it back; the reasons of a file that was parsed are not kept.
    pub fn format(&self) -> Vec<u8> {
        let mut file = String::new();
        for entry in &self.entries {
            file.push_str(&format!("{}\t{}\tnot recorded\n", entry.timeline, entry.end));
        }
        file.into_bytes()
    }

    fn range_of(&self, timeline: Timeline) -> Option<(Lsn, Option<Lsn>)> {
        let index = self.entries.iter().position(|entry| entry.timeline == timeline);
        let index = match index {
            Some(index) => index,
            None if timeline == self.timeline => self.entries.len(),
            None => return None,
        };
        let begin = index.checked_sub(1).map_or(Lsn::ZERO, |before| self.entries[before].end);
        Some((begin, self.entries.get(index).map(|entry| entry.end)))
    }
}

/// Whether a history file says that its server recovered to a target which somebody had named, and gave up on purpose what lay
/// behind it; else it was promoted where its WAL ended, or the file does not tell (`getRecoveryStopReason` in
/// `xlogrecovery.c`).
pub fn names_target(file: &[u8]) -> bool {
    const TARGETS: [&[u8]; 4] = [b"before ", b"after ", b"at restore point ", b"reached consistency"];
    let mut lines = file.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).rev();
    let Some(last) = lines.find(|line| entry(line).is_some()) else { return false };
    let mut columns = last.splitn(3, |&byte| byte == b'\t');
    let reason = columns.nth(2).unwrap_or_default().trim_ascii_start();
    TARGETS.iter().any(|target| reason.starts_with(target))
}

/// One line: a decimal timeline, white space, an LSN, and a reason of any bytes.
fn entry(text: &[u8]) -> Option<Ended> {
    let mut columns = text.split(u8::is_ascii_whitespace).filter(|column| !column.is_empty());
    let mut column = || std::str::from_utf8(columns.next()?).ok();
    Some(Ended { timeline: column()?.parse().ok()?, end: column()?.parse().ok()? })
}

#[cfg(test)]
mod tests;
