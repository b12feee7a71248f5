//! What all stores together hold: backups, and for each system the WAL and the signs of who wrote it.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{
    FullTransactionId, Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline, WalFileName,
};

use super::beside::Beginning;
use super::{Impossible, Refusal, Request, StoreView, SystemView, Testimonies, join, refuse};
use crate::adoption::Numbered;
use crate::coverage::{ArchivedWal, LsnRange, SegmentSpan};
use crate::name::{BackupId, StoreName};
use crate::root::RootBackup;
use crate::wal_index::{COMMIT_SEARCH_LIMIT, CommitSample};
use crate::witness::Heard;

/// Most names or spans that one message lists.
const LISTED: usize = 5;

/// A backup and the stores that have it.
pub(super) struct Offered {
    pub(super) backup: RootBackup,
    pub(super) stores: Vec<StoreName>,
    /// What its witnesses were told.
    pub(super) heard: Heard,
}

/// What all stores together hold.
pub(super) struct Held {
    pub(super) stores: Vec<StoreName>,
    pub(super) without_stores: Vec<StoreName>,
    /// Newest first.
    pub(super) backups: Vec<Offered>,
    systems: BTreeMap<SystemIdentifier, SystemHeld>,
}

/// What they hold of one system.
#[derive(Clone)]
pub(super) struct SystemHeld {
    pub(super) wal: ArchivedWal,
    pub(super) commits: Vec<CommitSample>,
    /// When a parent's WAL behind a fork was sent whose commits, if it holds any, were not found: a long transaction.
    signs: Vec<CommitSample>,
    /// How timelines began, of those whose parent has WAL behind the fork.
    pub(super) begun: BTreeMap<Timeline, Beginning>,
    /// Before when timelines do not differ from their parents, of those whose parent has WAL behind the fork.
    pub(super) apart_from: BTreeMap<Timeline, Timestamp>,
    /// The newest adoption of each timeline.
    pub(super) adoptions: BTreeMap<Timeline, Numbered>,
    /// Segments with contents that exclude each other, in some store.
    conflicts: Vec<SegmentName>,
    /// Timelines of whose histories some store has several, or another than was chosen.
    unlike_histories: BTreeSet<Timeline>,
    /// Where the records end in last segments that are not full.
    ends: BTreeMap<SegmentName, Lsn>,
}

impl Held {
    pub(super) fn gather(views: &[StoreView], without: &BTreeSet<StoreName>) -> Result<Self, Impossible> {
        let names: Vec<StoreName> = views.iter().map(|view| view.store().clone()).collect();
        if let Some(unknown) = without.iter().find(|name| !names.contains(name)) {
            return Err(Impossible {
                reason: format!("store {unknown} is to be left out, and there is no store of that name"),
                hint: format!("the configured stores are {}", join(&names)),
            });
        }
        let mut held = Self {
            stores: Vec::new(),
            without_stores: without.iter().cloned().collect(),
            backups: Vec::new(),
            systems: BTreeMap::new(),
        };
        for view in views.iter().filter(|view| !without.contains(view.store())) {
            match view {
                StoreView::Unreachable { store, reason } => {
                    return Err(Impossible {
                        reason: format!("store {store} does not answer, and may hold newer WAL: {reason}"),
                        hint: format!("--without-store {store} takes the other stores' end for the archive's end"),
                    });
                }
                StoreView::Holds { store, backups, systems } => {
                    held.stores.push(store.clone());
                    backups.iter().for_each(|backup| held.add_backup(store, backup));
                    systems.iter().for_each(|(system, view)| held.add_system(*system, view));
                }
            }
        }
        if held.stores.is_empty() {
            return Err(Impossible {
                reason: "no store is left to restore from".to_owned(),
                hint: format!("the configured stores are {}", join(&names)),
            });
        }
        held.systems.values_mut().for_each(SystemHeld::drop_conflicts);
        held.backups.sort_by_key(|offered| std::cmp::Reverse((offered.backup.stop_time, offered.backup.backup)));
        Ok(held)
    }

    fn add_backup(&mut self, store: &StoreName, backup: &RootBackup) {
        match self.backups.iter_mut().find(|offered| offered.backup == *backup) {
            Some(offered) => offered.stores.push(store.clone()),
            None => {
                let (backup, stores) = (backup.clone(), vec![store.clone()]);
                self.backups.push(Offered { backup, stores, heard: Heard::default() });
            }
        }
    }

    fn add_system(&mut self, system: SystemIdentifier, view: &SystemView) {
        if let Some(wal) = &view.wal.wal {
            self.systems.entry(system).or_insert_with(|| SystemHeld::empty(wal.segment_size())).add(wal, view);
        }
    }

    /// Takes up what the stores that are not left out said to backups' witnesses.
    pub(super) fn hear(&mut self, testimonies: &Testimonies) {
        for offered in &mut self.backups {
            let heard = testimonies.get(&offered.backup.backup);
            offered.heard = heard.map(|heard| heard.of(&self.stores)).unwrap_or_default();
        }
    }

    /// The history along which a backup was taken; without the file, as if its last timeline had no ancestors.
    pub(super) fn history_of(&self, backup: &RootBackup) -> TimelineHistory {
        let system = self.systems.get(&backup.system_identifier);
        let known = system.and_then(|system| system.wal.histories().get(&backup.stop_timeline));
        known.cloned().unwrap_or_else(|| TimelineHistory::root(backup.stop_timeline))
    }

    /// The backups to consider, newest first.
    pub(super) fn candidates(&self, request: &Request) -> Result<Vec<&Offered>, Impossible> {
        let listed = || {
            let ids: Vec<BackupId> = self.backups.iter().map(|offered| offered.backup.backup).take(LISTED).collect();
            format!("the newest are {}", join(&ids))
        };
        if self.backups.is_empty() {
            return Err(Impossible {
                reason: format!(
                    "{} no backup of this cluster",
                    if self.stores.len() == 1 {
                        format!("store {} holds", self.stores[0])
                    } else {
                        format!("stores {} hold", join(&self.stores))
                    }
                ),
                hint: "take one with `pgconvoy backup`".to_owned(),
            });
        }
        let Some(wanted) = request.backup else {
            return Ok(self.backups.iter().collect());
        };
        let named: Vec<&Offered> = self.backups.iter().filter(|offered| offered.backup.backup == wanted).collect();
        match named.is_empty() {
            true => Err(Impossible { reason: format!("there is no backup {wanted}"), hint: listed() }),
            false => Ok(named),
        }
    }

    /// What is held of a backup's system; nothing but the backup if no WAL of it is there.
    pub(super) fn system_of(&self, backup: &RootBackup) -> Result<SystemHeld, Refusal> {
        if let Some(system) = self.systems.get(&backup.system_identifier) {
            return Ok(system.clone());
        }
        match SegmentSize::from_bytes(backup.segment_size_bytes) {
            Ok(size) => Ok(SystemHeld::empty(size)),
            Err(_) => {
                let (id, bytes) = (backup.backup, backup.segment_size_bytes);
                refuse(format!("backup {id} says that WAL segments have {bytes} bytes, which none have"), "")
            }
        }
    }

    /// The highest transaction id that backups of a system know.
    pub(super) fn newest_xid(&self, system: SystemIdentifier) -> Option<FullTransactionId> {
        let of_system = self.backups.iter().filter(|offered| offered.backup.system_identifier == system);
        of_system.filter_map(|offered| offered.backup.stop_next_xid.max(offered.backup.start_next_xid)).max()
    }
}

impl SystemHeld {
    pub(super) fn empty(size: SegmentSize) -> Self {
        Self {
            wal: ArchivedWal::new(size),
            commits: Vec::new(),
            signs: Vec::new(),
            begun: BTreeMap::new(),
            apart_from: BTreeMap::new(),
            adoptions: BTreeMap::new(),
            conflicts: Vec::new(),
            unlike_histories: BTreeSet::new(),
            ends: BTreeMap::new(),
        }
    }

    fn add(&mut self, wal: &ArchivedWal, view: &SystemView) {
        self.wal.add_all(wal);
        self.commits.extend(&view.wal.commits);
        for (name, end) in &view.wal.ends {
            let known = self.ends.entry(*name).or_insert(*end);
            *known = (*known).max(*end);
        }
        for facts in &view.forks {
            let found = Beginning { at: facts.begun, to_target: facts.to_target };
            let begun = self.begun.entry(facts.left.timeline).or_insert(found);
            *begun = Beginning { at: found.at.min(begun.at), to_target: found.to_target && begun.to_target };
            if let Some(time) = facts.apart_from {
                let apart_from = self.apart_from.entry(facts.left.timeline).or_insert(time);
                *apart_from = time.min(*apart_from);
            }
            let (end, fork) = (facts.left.end, facts.left.fork);
            let found = |sample: &CommitSample| sample.timeline == fork.timeline && sample.before > fork.lsn;
            if !view.wal.commits.iter().any(found) && self.is_searched_in_part(fork.lsn, end) {
                // What a server in recovery passes on may be of long ago.
                let time = if facts.in_recovery { facts.begun } else { facts.sent };
                self.signs.push(CommitSample { timeline: fork.timeline, before: end, time });
            }
        }
        for (timeline, adoption) in &view.adoptions {
            let newest = self.adoptions.entry(*timeline).or_insert_with(|| adoption.clone());
            if adoption.counts_over(newest) {
                *newest = adoption.clone();
            }
        }
        for conflict in &view.wal.conflicts {
            match conflict.name {
                WalFileName::Segment(name) => self.conflicts.push(name),
                WalFileName::History(timeline) => drop(self.unlike_histories.insert(timeline)),
                WalFileName::Partial(_) | WalFileName::BackupHistory { .. } => {}
            }
        }
    }

    /// Timelines whose ancestors nobody knows before an operator has chosen among several histories. Where one is served, the
    /// others are evidence.
    pub(super) fn undecided_histories(&self) -> impl Iterator<Item = Timeline> + '_ {
        self.unlike_histories.iter().copied().filter(|timeline| !self.wal.knows_history(*timeline))
    }

    /// What is in conflict in one store is served by none.
    fn drop_conflicts(&mut self) {
        for name in &self.conflicts {
            self.wal.remove(*name);
        }
    }

    /// The last commit that is known to lie on the path to a timeline and before a position.
    pub(super) fn last_commit(&self, on: Timeline, reach: Lsn) -> Option<Timestamp> {
        self.commits_on(on).filter(|sample| sample.before <= reach).map(|sample| sample.time).max()
    }

    /// As [`Self::last_commit`], of those that are not certain to lie before another position.
    pub(super) fn last_commit_after(&self, on: Timeline, from: Lsn, reach: Lsn) -> Option<Timestamp> {
        let within = self.commits_on(on).filter(|sample| from < sample.before && sample.before <= reach);
        within.map(|sample| sample.time).max()
    }

    /// Where the records end in the last segment before a position, if it is not full. Up to there one may begin.
    pub(super) fn records_end(&self, on: Timeline, reach: Lsn) -> Option<Lsn> {
        let last = self.segment_at(on, SegmentNumber::last_before(reach, self.wal.segment_size()))?;
        self.ends.get(&last).copied().filter(|end| *end < reach)
    }

    /// The segment that recovery asks for first on the path to a timeline.
    fn segment_at(&self, on: Timeline, number: SegmentNumber) -> Option<SegmentName> {
        let size = self.wal.segment_size();
        let range = LsnRange { start: number.start(size), end: number.end(size) };
        self.wal.needed(on, range).first().and_then(|span| span.names(size).next())
    }

    /// The segment at a position, if recovery could not go past it nor end before it: it is there, in contents that
    /// exclude each other.
    pub(super) fn conflict_at(&self, on: Timeline, at: Lsn) -> Option<SegmentName> {
        let number = SegmentNumber::containing(at, self.wal.segment_size());
        self.segment_at(on, number).filter(|name| self.conflicts.contains(name))
    }

    /// Whether there is more WAL between two positions than is searched for commits.
    pub(super) fn is_searched_in_part(&self, from: Lsn, to: Lsn) -> bool {
        let searched = self.wal.segment_size().bytes() * COMMIT_SEARCH_LIMIT as u64;
        to.bytes_since(from).is_some_and(|bytes| bytes > searched)
    }

    /// The commits that are known to lie on the path to a timeline, and what stands for them.
    pub(super) fn signs_on(&self, timeline: Timeline) -> impl Iterator<Item = &CommitSample> {
        self.on_path(&self.signs, timeline).chain(self.commits_on(timeline))
    }

    /// The commits that are known to lie on the path to a timeline.
    pub(super) fn commits_on(&self, timeline: Timeline) -> impl Iterator<Item = &CommitSample> {
        self.on_path(&self.commits, timeline)
    }

    fn on_path<'a>(
        &self,
        samples: &'a [CommitSample],
        timeline: Timeline,
    ) -> impl Iterator<Item = &'a CommitSample> + use<'a> {
        let legs = self.wal.path(timeline);
        samples.iter().filter(move |sample| {
            let leg = legs.iter().find(|leg| leg.timeline == sample.timeline);
            leg.is_some_and(|leg| leg.end.is_none_or(|end| sample.before <= end))
        })
    }

    /// Segments that are missing, and which of them are there in contents that exclude each other.
    pub(super) fn spans_text(&self, spans: &[SegmentSpan]) -> String {
        let size = self.wal.segment_size();
        let mut texts: Vec<String> = Vec::new();
        for span in spans.iter().take(LISTED) {
            let (first, count) = (span.names(size).next(), span.count());
            if let Some(first) = first {
                let more = format!("{first} and {} more after it", count - 1);
                texts.push(if count == 1 { first.to_string() } else { more });
            }
        }
        if spans.len() > LISTED {
            texts.push("…".to_owned());
        }
        let inside = |name: &&SegmentName| {
            let number = name.number(size).ok();
            spans.iter().any(|span| {
                span.timeline == name.timeline() && number.is_some_and(|n| span.first <= n && n <= span.last)
            })
        };
        if let Some(name) = self.conflicts.iter().find(inside) {
            texts.push(format!(
                "of which {name} is stored with conflicting contents and waits for an operator's choice"
            ));
        }
        texts.join(", ")
    }
}
