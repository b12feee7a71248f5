//! The WAL objects of a store: segments, `.partial`, `.backup` and history files, and evidence of refused ones.

use std::ops::RangeInclusive;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use postgres_format::{SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, WalFileName};

use super::super::facts::{Broken, Stop};
use super::super::finding::{Depth, What};
use super::super::wal_objects;
use super::super::watch::Watch;
use super::{AT_ONCE, Looking};
use crate::key::{self, ObjectKey, ParsedKey};
use crate::root::RootBackup;
use crate::store::{LIST_LIMIT, ObjectEntry, ObjectStore, StoreError};
use crate::wal::WalError;

/// Segments without a sound content that are kept by name; a store that lacks more is not looked at further.
const LOST_MAX: usize = 100_000;

/// What became of reading an object.
enum Looked {
    /// It was not to be read.
    NotDue,
    /// It went away since it was listed.
    Gone,
    /// Its file is whole.
    Sound {
        /// Whether it serves as a segment.
        complete: bool,
        /// What is wrong with what lies beside the WAL.
        changes: Option<String>,
    },
    /// It is damaged.
    Damaged(String),
}

/// Segments that are to be read, of all timelines.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    size: SegmentSize,
    numbers: &'a RangeInclusive<SegmentNumber>,
}

impl Wanted<'_> {
    /// What is no segment is wanted.
    fn takes(&self, key: &ObjectKey) -> bool {
        let Ok(ParsedKey::Wal { name, .. }) = key.parsed() else { return true };
        let number = name.segment().and_then(|segment| segment.number(self.size).ok());
        number.is_none_or(|number| self.numbers.contains(&number))
    }
}

impl Looking<'_> {
    /// Reads the WAL objects of the share; of a single backup those that it needs.
    pub(super) async fn wal(&mut self, backups: &[RootBackup]) -> Result<(), Stop> {
        if self.request.backup.is_none() {
            let systems = self.facts.root.iter().flat_map(|root| &root.systems);
            for system in systems.map(|system| system.system_identifier).collect::<Vec<_>>() {
                self.system(system, None).await?;
            }
            return Ok(());
        }
        for backup in backups {
            let Ok(size) = SegmentSize::from_bytes(backup.segment_size_bytes) else { continue };
            let last = SegmentNumber::last_before(backup.consistent_lsn(), size);
            let numbers = SegmentNumber::containing(backup.start_lsn, size)..=last;
            self.system(backup.system_identifier, Some(Wanted { size, numbers: &numbers })).await?;
        }
        Ok(())
    }

    async fn system(&mut self, system: SystemIdentifier, wanted: Option<Wanted<'_>>) -> Result<(), Stop> {
        self.watch.step(format!("WAL of system {system} in {}", self.facts.store));
        self.wal_under(system, &key::history_prefix(self.cluster, system), wanted).await?;
        self.wal_under(system, &key::wal_prefix(self.cluster, system), wanted).await?;
        self.wal_under(system, &key::conflict_prefix(self.cluster, system), wanted).await
    }

    async fn wal_under(
        &mut self,
        system: SystemIdentifier,
        prefix: &str,
        wanted: Option<Wanted<'_>>,
    ) -> Result<(), Stop> {
        let mut after: Option<String> = None;
        let mut segment = OneSegment::default();
        loop {
            let page = self.store.list(prefix, after.as_deref(), LIST_LIMIT).await?;
            after = page.objects.last().map(|entry| entry.key.to_string());
            let (store, watch, request) = (self.store, self.watch, self.request);
            let checks = stream::iter(page.objects).map(|entry| async move {
                let due = request.takes(&entry.key) && wanted.is_none_or(|wanted| wanted.takes(&entry.key));
                let looked = match due {
                    true => look_at(store, &entry, request.depth, watch).await,
                    false => Ok(Looked::NotDue),
                };
                (entry, looked)
            });
            let mut checks = checks.buffered(if watch.is_paced() { 1 } else { AT_ONCE });
            while let Some((entry, looked)) = checks.next().await {
                let usable = self.judge_wal(&entry, looked?);
                let lost = segment.add(&entry.key, usable);
                self.lose(system, lost)?;
            }
            drop(checks);
            if !page.more {
                return self.lose(system, segment.end());
            }
        }
    }

    fn lose(&mut self, system: SystemIdentifier, name: Option<SegmentName>) -> Result<(), Stop> {
        let Some(name) = name else { return Ok(()) };
        let lost = self.facts.lost.entry(system).or_default();
        lost.insert(name);
        match lost.len() <= LOST_MAX {
            true => Ok(()),
            false => Err(Stop::Away(format!("more than {LOST_MAX} WAL segments are damaged"))),
        }
    }

    /// Notes what is wrong with an object. Answers whether it can serve as a whole segment, as far as was looked.
    fn judge_wal(&mut self, entry: &ObjectEntry, looked: Looked) -> bool {
        let what = match entry.key.parsed() {
            Ok(ParsedKey::Wal { .. }) => What::Wal,
            Ok(ParsedKey::History { .. }) => What::History,
            Ok(ParsedKey::Conflict { .. }) => What::Evidence,
            // What this version does not know is no damage.
            _ => return true,
        };
        match looked {
            Looked::NotDue => true,
            Looked::Gone => false,
            Looked::Sound { complete, changes } => {
                self.count(entry.size);
                if let Some(found) = changes {
                    self.note(Broken::new(entry.key.clone(), What::ChangeMap, found, "what its header tells of it"));
                }
                complete
            }
            Looked::Damaged(found) => {
                self.count(entry.size);
                let expected = "a whole object of that name, with the digests in its own header";
                self.note(Broken::new(entry.key.clone(), what, found, expected));
                false
            }
        }
    }
}

/// The contents of one segment, as they follow each other in a listing.
#[derive(Debug, Default)]
struct OneSegment {
    name: Option<SegmentName>,
    usable: bool,
}

impl OneSegment {
    /// Takes the next object; gives the segment before it if that has no usable content.
    fn add(&mut self, key: &ObjectKey, usable: bool) -> Option<SegmentName> {
        let Ok(ParsedKey::Wal { name: WalFileName::Segment(name), .. }) = key.parsed() else { return None };
        if self.name == Some(name) {
            self.usable |= usable;
            return None;
        }
        let before = self.end();
        (self.name, self.usable) = (Some(name), usable);
        before
    }

    fn end(&mut self) -> Option<SegmentName> {
        self.name.take().filter(|_| !self.usable)
    }
}

/// Reads an object.
async fn look_at(
    store: &Arc<dyn ObjectStore>,
    entry: &ObjectEntry,
    depth: Depth,
    watch: &Watch,
) -> Result<Looked, StoreError> {
    let read = match depth {
        Depth::Digests => {
            let read = wal_objects::by_digests(&**store, &entry.key, watch).await;
            read.map(|sound| (sound.header, sound.changes))
        }
        Depth::Full => wal_objects::decoded(store, &entry.key, entry.size, watch).await,
    };
    match read {
        Ok((header, changes)) => Ok(Looked::Sound { complete: header.complete, changes }),
        Err(WalError::Store(StoreError::NotFound { .. })) => Ok(Looked::Gone),
        Err(error) => wal_objects::about_object(error).map(Looked::Damaged),
    }
}
