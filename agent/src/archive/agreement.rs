//! Whether the stores agree with this node about a timeline, which decides how far its WAL is shipped ahead of PostgreSQL.
//!
//! A server that must not write (a copy of the data directory that was started, the loser of two promotions) has its first
//! file refused as a conflict. Had the files behind it been shipped ahead, they would lie where those of the right server
//! belong: it would be refused in its turn, or the two histories would be mixed.
//!
//! Invariants: nothing behind a refused file of its timeline is shipped ahead until that file is taken or PostgreSQL no
//! longer wants it. Until a segment of a timeline was taken that no store knew, one file of the timeline is under way ahead
//! at a time: a segment that the stores have already may be of the time before two servers parted. Only names are held, of
//! at most [`TIMELINES_MAX`] timelines; beyond that files go one at a time. Files that PostgreSQL asks for are not held up.

use std::collections::{BTreeMap, BTreeSet};

use postgres_format::{Timeline, WalFileName};

/// Timelines remembered.
const TIMELINES_MAX: usize = 64;

/// What is known of each timeline since the agent's start.
#[derive(Debug, Default)]
pub(super) struct Agreement {
    agreed: BTreeSet<Timeline>,
    refused: BTreeMap<Timeline, WalFileName>,
}

impl Agreement {
    /// A file is durable; `new` says whether some store did not know it before.
    pub(super) fn taken(&mut self, name: &WalFileName, new: bool) {
        let timeline = name.timeline();
        if self.refused.get(&timeline).is_some_and(|refused| refused == name) {
            self.refused.remove(&timeline);
        }
        let agreed = new && matches!(name, WalFileName::Segment(_)) && !self.refused.contains_key(&timeline);
        if agreed && self.agreed.len() < TIMELINES_MAX {
            self.agreed.insert(timeline);
        }
    }

    /// The stores have refused a file on its merits.
    pub(super) fn refused(&mut self, name: &WalFileName) {
        self.agreed.remove(&name.timeline());
        if self.refused.len() < TIMELINES_MAX || self.refused.contains_key(&name.timeline()) {
            let first = self.refused.entry(name.timeline()).or_insert(*name);
            *first = (*first).min(*name);
        }
    }

    /// The first file that PostgreSQL wants; of what comes before it nothing is awaited any more.
    pub(super) fn wanted_from(&mut self, first: Option<WalFileName>) {
        self.refused.retain(|_, refused| first.is_some_and(|first| first <= *refused));
    }

    /// Whether a file may go ahead while `under_way` are being shipped.
    pub(super) fn lets_ahead<'a>(
        &self,
        name: &WalFileName,
        mut under_way: impl Iterator<Item = &'a WalFileName>,
    ) -> bool {
        let timeline = name.timeline();
        match self.refused.get(&timeline) {
            Some(refused) => name <= refused,
            None => self.agreed.contains(&timeline) || !under_way.any(|other| other.timeline() == timeline),
        }
    }

    /// Forgets everything: another cluster lives in the data directory now.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u32) -> WalFileName {
        format!("0000000200000000{number:08X}").parse().unwrap()
    }

    #[test]
    fn one_at_a_time_until_a_new_segment_is_taken() {
        let mut agreement = Agreement::default();
        let other: WalFileName = "000000010000000000000001".parse().unwrap();
        assert!(agreement.lets_ahead(&name(1), [other].iter()));
        assert!(!agreement.lets_ahead(&name(2), [name(1)].iter()));
        // Neither its history nor a segment that was there already says that this server's own WAL is welcome.
        agreement.taken(&"00000002.history".parse().unwrap(), true);
        agreement.taken(&name(1), false);
        assert!(!agreement.lets_ahead(&name(3), [name(2)].iter()));
        agreement.taken(&name(2), true);
        assert!(agreement.lets_ahead(&name(4), [name(3)].iter()));
    }

    #[test]
    fn nothing_goes_past_a_refused_file_while_it_is_wanted() {
        let mut agreement = Agreement::default();
        agreement.taken(&name(1), true);
        for number in [3, 2] {
            agreement.refused(&name(number));
        }
        // Under way when the refusal came.
        agreement.taken(&name(5), true);
        agreement.wanted_from(Some(name(2)));
        assert!(agreement.lets_ahead(&name(2), [].iter()) && !agreement.lets_ahead(&name(3), [].iter()));
        agreement.taken(&name(2), false);
        assert!(agreement.lets_ahead(&name(3), [].iter()));
        agreement.refused(&"00000002.history".parse().unwrap());
        assert!(!agreement.lets_ahead(&name(3), [].iter()));
        agreement.wanted_from(Some(name(3)));
        assert!(agreement.lets_ahead(&name(3), [].iter()));
    }
}
