//! Puts the changes of neighbouring segments together.

use std::ops::Range;

use super::collect::Collector;
use super::record::{Rules, Unclear, note};
use super::{ChangeMap, Lead, SegmentChanges, Tail};
use crate::lsn::Lsn;
use crate::wal_segment::PAGE_BYTES;

/// Bytes of the header of a segment's first page, and of every other page.
const LONG_HEADER_BYTES: u64 = 40;
const SHORT_HEADER_BYTES: u64 = 24;

/// The changes in a range cannot be told for sure. Another way to find them must be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("what changed is not certain from the WAL segment at {segment} on: {reason}")]
pub struct Doubt {
    /// Where the segment starts that the doubt is about: one that is there or, for a gap, the one that is missing.
    pub segment: Lsn,
    /// What is doubtful.
    pub reason: String,
}

/// Puts the changes of neighbouring segments together, one segment at a time.
#[derive(Debug)]
pub struct Joiner {
    range: Range<Lsn>,
    map: ChangeMap,
    /// Up to where the segments pushed so far tell, and whether that is the end of a segment.
    told: Option<(Lsn, Edge)>,
    postgres_major: u32,
    carry: Carry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Edge {
    OfSegment,
    WithinSegment,
}

/// The record that goes on behind the last segment.
#[derive(Debug)]
enum Carry {
    None,
    /// One that began in the range, or in its first segment.
    Record {
        start: Lsn,
        total_bytes: u32,
        seen_bytes: u32,
        head: Vec<u8>,
    },
    /// One that began before the first segment: it is not part of the range.
    Foreign {
        remaining_bytes: u32,
    },
}

/// The changes between two LSNs, from the segments that contain them, in order and without a gap.
///
/// The range goes from the start of a backup to the start of a later one (a redo point). The first segment is the one that contains
/// the start: a record that began before it began before the range, so its rest is not needed. The last is the one that contains the byte
/// before the end; it may be incomplete if its records reach the end. Of both segments all changes are taken, also those outside the range:
/// a map may say too much. Along a path of timelines, the segment that contains a fork is the later timeline's.
///
/// # Errors
/// [`Doubt`] if a segment is missing, incomplete, unclear or does not fit its neighbour.
pub fn join<'a>(range: Range<Lsn>, segments: impl IntoIterator<Item = &'a SegmentChanges>) -> Result<ChangeMap, Doubt> {
    let mut joiner = Joiner::new(range);
    for segment in segments {
        joiner.push(segment)?;
    }
    joiner.finish()
}

impl Joiner {
    /// Nothing yet of this range; see [`join`].
    pub fn new(range: Range<Lsn>) -> Self {
        Self { range, map: ChangeMap::empty(), told: None, postgres_major: 0, carry: Carry::None }
    }

    /// Takes the next segment.
    ///
    /// # Errors
    /// As [`join`]; after that the joiner is of no use.
    pub fn push(&mut self, segment: &SegmentChanges) -> Result<(), Doubt> {
        self.check_place(segment)?;
        if let Some(reason) = &segment.doubt {
            return Err(doubt(segment.start, reason.clone()));
        }
        match self.told {
            None => self.carry = first_carry(segment)?,
            Some(_) => self.take_lead(segment)?,
        }
        if let Tail::Open { start, total_bytes, seen_bytes, head } = &segment.tail {
            self.carry =
                Carry::Record { start: *start, total_bytes: *total_bytes, seen_bytes: *seen_bytes, head: head.clone() };
        }
        self.map.union(&segment.map);
        let edge = if segment.end.is_complete() { Edge::OfSegment } else { Edge::WithinSegment };
        self.told = Some((segment.told_until(), edge));
        Ok(())
    }

    /// What the segments pushed so far changed.
    pub fn map(&self) -> &ChangeMap {
        &self.map
    }

    /// What changed, once all segments were pushed.
    ///
    /// # Errors
    /// As [`join`].
    pub fn finish(self) -> Result<ChangeMap, Doubt> {
        let Range { start, end } = self.range;
        if start >= end {
            return Ok(self.map);
        }
        let Some((told, edge)) = self.told else {
            return Err(doubt(start, "there is nothing from it".to_owned()));
        };
        // A range that ends behind the first page header of a segment needs nothing of that segment.
        let header = if edge == Edge::OfSegment { LONG_HEADER_BYTES } else { 0 };
        if told.as_u64().saturating_add(header) < end.as_u64() {
            return Err(doubt(told, format!("its changes are needed up to {end}")));
        }
        match self.carry {
            Carry::Record { start, .. } if start < end => {
                Err(doubt(told, format!("it holds the rest of the record at {start}")))
            }
            _ => Ok(self.map),
        }
    }

    /// Whether the segment is the next, and the one before it was complete.
    fn check_place(&mut self, segment: &SegmentChanges) -> Result<(), Doubt> {
        let reason = match self.told {
            None => {
                self.postgres_major = segment.postgres_major;
                let end = segment.start.as_u64().saturating_add(segment.size.bytes());
                let inside = segment.start <= self.range.start && self.range.start.as_u64() < end;
                (!inside).then(|| format!("it does not contain {}, where the range starts", self.range.start))
            }
            Some((told, Edge::WithinSegment)) => Some(format!("the segment before it ends at {told}")),
            Some((told, Edge::OfSegment)) if told != segment.start => {
                return Err(doubt(told, format!("the next segment there is starts at {}", segment.start)));
            }
            Some(_) => (segment.postgres_major != self.postgres_major).then(|| {
                format!("it is of PostgreSQL {}, those before of {}", segment.postgres_major, self.postgres_major)
            }),
        };
        reason.map_or(Ok(()), |reason| Err(doubt(segment.start, reason)))
    }

    /// Goes on with the record that the segments before left open.
    fn take_lead(&mut self, segment: &SegmentChanges) -> Result<(), Doubt> {
        let unfit = |reason: &str| Err(doubt(segment.start, reason.to_owned()));
        let carry = std::mem::replace(&mut self.carry, Carry::None);
        let (open_bytes, lead) = match (&carry, &segment.lead) {
            (Carry::None, Lead::Fresh | Lead::GivenUp) | (_, Lead::GivenUp) => return Ok(()),
            (Carry::None, Lead::Rest { .. }) => {
                return unfit("it begins with the rest of a record that the segment before does not begin");
            }
            (_, Lead::Fresh) => return unfit("it does not go on with the record at the end of the segment before"),
            (Carry::Foreign { remaining_bytes }, Lead::Rest { .. }) => (*remaining_bytes, &segment.lead),
            (Carry::Record { total_bytes, seen_bytes, .. }, Lead::Rest { .. }) => {
                (total_bytes.saturating_sub(*seen_bytes), &segment.lead)
            }
        };
        let Lead::Rest { remaining_bytes, bytes } = lead else { return Ok(()) };
        if *remaining_bytes != open_bytes {
            return unfit("it goes on with another record than the one at the end of the segment before");
        }
        let here_bytes = bytes_here(segment, *remaining_bytes)?;
        match carry {
            Carry::None => {}
            Carry::Foreign { remaining_bytes } if segment.tail == Tail::Through => {
                self.carry = Carry::Foreign { remaining_bytes: remaining_bytes - here_bytes };
            }
            Carry::Foreign { .. } => {}
            Carry::Record { start, total_bytes, seen_bytes, mut head } => {
                if head.len() as u64 == u64::from(seen_bytes) {
                    head.extend_from_slice(bytes);
                }
                if segment.tail == Tail::Through {
                    let seen_bytes = seen_bytes + here_bytes;
                    self.carry = Carry::Record { start, total_bytes, seen_bytes, head };
                } else {
                    self.note(segment, start, &head, total_bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Notes a record that was put together.
    fn note(&mut self, segment: &SegmentChanges, start: Lsn, head: &[u8], total_bytes: u32) -> Result<(), Doubt> {
        let mut collector = Collector::new();
        let head = &head[..head.len().min(total_bytes as usize)];
        note(&mut collector, Rules::of(self.postgres_major), head, total_bytes).map_err(|unclear| {
            let reason = match unclear {
                Unclear::Broken(reason) => reason,
                Unclear::Short => "too little of it was kept",
            };
            doubt(segment.start, format!("the record at {start}, which goes on in it, is not understood: {reason}"))
        })?;
        self.map.union(&collector.into_map());
        Ok(())
    }
}

/// A record that goes through the whole first segment is not of the range.
fn first_carry(segment: &SegmentChanges) -> Result<Carry, Doubt> {
    match (&segment.lead, &segment.tail) {
        (Lead::Rest { remaining_bytes, .. }, Tail::Through) => {
            let here_bytes = bytes_here(segment, *remaining_bytes)?;
            Ok(Carry::Foreign { remaining_bytes: remaining_bytes - here_bytes })
        }
        _ => Ok(Carry::None),
    }
}

/// How many bytes of the rest of a record are in a segment: less than all only if it goes through.
fn bytes_here(segment: &SegmentChanges, remaining_bytes: u32) -> Result<u32, Doubt> {
    let pages = segment.size.bytes() / PAGE_BYTES as u64;
    let room = segment.size.bytes() - LONG_HEADER_BYTES - (pages - 1) * SHORT_HEADER_BYTES;
    let fits = u64::from(remaining_bytes) <= room;
    match (&segment.tail, u32::try_from(room)) {
        (Tail::Through, Ok(room)) if !fits => Ok(room),
        (Tail::Through, _) => Err(doubt(segment.start, "a record cannot go through it whose rest fits".to_owned())),
        _ if fits => Ok(remaining_bytes),
        _ => Err(doubt(segment.start, "the rest of a record cannot end in it that does not fit".to_owned())),
    }
}

fn doubt(segment: Lsn, reason: String) -> Doubt {
    Doubt { segment, reason }
}
