//! Pure edits of a root: each gives the changed root, or says why it must not be changed so.
//!
//! They keep the rules at the head of `root.rs` whatever they are given; a caller that repeats an edit which has
//! already happened gets the root unchanged.

use postgres_format::{SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline};
use uuid::Uuid;

use super::{
    Condemned, CondemnedBackup, HOLD_LIMIT, Hold, PIN_LIMIT, Pin, PinnedWal, Root, RootBackup, RootError, System,
    WalKept,
};
use crate::name::{BackupId, Generation};

/// Longest text of a hold, in bytes.
const HOLD_TEXT_LIMIT_BYTES: usize = 1000;

/// What a retention commit takes away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retired {
    /// The root that was looked at, and the only one upon which this may be committed.
    pub generation: Generation,
    /// The nonce of that root.
    pub nonce: Uuid,
    /// Backups that cease to exist.
    pub backups: Vec<BackupId>,
    /// Objects nobody refers to then; oldest first.
    pub condemned: Vec<CondemnedBackup>,
    /// From where WAL is kept. Timelines not named stay as they are.
    pub wal_kept: Vec<(SystemIdentifier, WalKept)>,
}

impl Retired {
    /// Whether nothing is taken away.
    pub fn is_empty(&self) -> bool {
        self.backups.is_empty() && self.condemned.is_empty() && self.wal_kept.is_empty()
    }
}

fn refused<T>(reason: String) -> Result<T, RootError> {
    Err(RootError::Refused { reason })
}

impl Root {
    /// With a backup that begins. Refused if its identifier was used before or its parent does not exist.
    pub fn with_pin(&self, pin: Pin) -> Result<Self, RootError> {
        let backup = pin.backup;
        if self.pin(&backup).is_some_and(|standing| standing.nonce == pin.nonce) {
            return Ok(self.clone());
        }
        if self.pin(&backup).is_some() || self.backup(&backup).is_some() || self.gone.holds(&backup) {
            return refused(format!("identifier {backup} was used before: take a new one"));
        }
        if let Some(parent) = pin.parent.filter(|parent| self.backup(parent).is_none()) {
            return refused(format!("backup {parent}, which {backup} builds on, does not exist: choose another"));
        }
        if let Some(gone) = pin.protects.iter().find(|id| self.is_gone(id)) {
            return refused(format!("packs of {gone}, which {backup} may refer to, were condemned here"));
        }
        if let Some(wal) = pin.wal {
            self.check_wal_is_kept(backup, wal.system_identifier, wal.timeline..=wal.timeline, wal.start_lsn, None)?;
        }
        if self.pins.len() >= PIN_LIMIT {
            return refused(format!("{PIN_LIMIT} backups are under way: wait for one to end"));
        }
        let mut root = self.clone();
        let at = root.pins.partition_point(|standing| standing.backup < backup);
        root.pins.insert(at, pin);
        Ok(root)
    }

    /// With more that a standing pin protects: a backup goes on as a copy from another store. Refused if any of that was
    /// condemned here, or if the parent, where one is given and the pin has none, does not exist here.
    pub fn with_pin_widened(
        &self,
        backup: &BackupId,
        parent: Option<BackupId>,
        protects: &[BackupId],
        wal: PinnedWal,
    ) -> Result<Self, RootError> {
        let Some(pin) = self.pin(backup) else { return Err(RootError::PinGone { backup: *backup }) };
        let mut widened = pin.clone();
        widened.parent = pin.parent.or(parent);
        widened.protects.extend(protects.iter().filter(|id| !pin.protects.contains(id)));
        widened.wal = pin.wal.or(Some(wal));
        let mut without = self.clone();
        without.pins.retain(|pin| pin.backup != *backup);
        without.with_pin(widened)
    }

    /// Without a backup that was under way: its owner gave up, or is known to be dead. It can never be published, even if
    /// its owner turns out to be alive. Unchanged if nothing of this identifier is under way.
    pub fn without_pin(&self, backup: &BackupId) -> Self {
        let mut root = self.clone();
        if self.pin(backup).is_some() {
            root.pins.retain(|pin| pin.backup != *backup);
            root.gone.add(*backup);
        }
        root
    }

    /// With a backup that was under way and now exists. [`RootError::PinGone`] if it is not under way any more.
    pub fn with_published(&self, entry: RootBackup) -> Result<Self, RootError> {
        if self.backup(&entry.backup).is_none() && self.pin(&entry.backup).is_none() {
            return Err(RootError::PinGone { backup: entry.backup });
        }
        self.with_backup(entry)
    }

    /// With one more backup, pinned or not. Unchanged if it is there already; refused if another one has its identifier,
    /// or if anything it needs may have been condemned here.
    ///
    /// It must refer to nothing but its own packs, what its parent refers to, and what its pin protects. Without a pin it
    /// is safe, but may be refused after all its objects were sent, because retention condemns what nothing refers to
    /// and what is under no pin. Who can pins first, and uses [`Root::with_published`].
    pub fn with_backup(&self, entry: RootBackup) -> Result<Self, RootError> {
        let mut root = self.clone();
        let index = match root.backups.binary_search_by_key(&entry.backup, |existing| existing.backup) {
            Ok(index) if root.backups[index] == entry => return Ok(root),
            Ok(_) => {
                return refused(format!("another backup is already published as {}: take a new one", entry.backup));
            }
            Err(index) => index,
        };
        let pin = self.pin(&entry.backup);
        if pin.is_none() && self.gone.holds(&entry.backup) {
            return Err(RootError::PinGone { backup: entry.backup });
        }
        // What an existing backup refers to was never condemned; of one that is gone, some of it may have been.
        let stands = |parent: &BackupId| {
            let pinned = |pin: &Pin| pin.is_copy() || pin.identifiers().any(|id| id == *parent);
            self.backup(parent).is_some() || pin.is_some_and(pinned)
        };
        if let Some(parent) = entry.parent.filter(|parent| !stands(parent)) {
            return refused(format!("backup {parent}, which {} builds on, does not exist here any more", entry.backup));
        }
        self.check_attempts(&entry)?;
        let timelines = entry.start_timeline..=entry.stop_timeline;
        let size = SegmentSize::from_bytes(entry.segment_size_bytes).ok();
        self.check_wal_is_kept(entry.backup, entry.system_identifier, timelines, entry.start_lsn, size)?;
        root.pins.retain(|pin| pin.backup != entry.backup);
        root.backups.insert(index, entry);
        Ok(root)
    }

    /// Whether a backup may come here, as far as it and its WAL are concerned: neither was condemned here.
    pub fn may_take(&self, entry: &RootBackup) -> bool {
        let timelines = entry.start_timeline..=entry.stop_timeline;
        let size = SegmentSize::from_bytes(entry.segment_size_bytes).ok();
        let wal = self.check_wal_is_kept(entry.backup, entry.system_identifier, timelines, entry.start_lsn, size);
        !self.is_gone(&entry.backup) && wal.is_ok()
    }

    /// With a hold on a backup that exists; it takes the place of an earlier one of its kind, an operator's or a restore's.
    pub fn with_hold(&self, hold: Hold) -> Result<Self, RootError> {
        if self.backup(&hold.backup).is_none() {
            return refused(format!("there is no backup {} to hold", hold.backup));
        }
        if hold.reason.len() > HOLD_TEXT_LIMIT_BYTES || hold.by.len() > HOLD_TEXT_LIMIT_BYTES {
            return refused(format!("the reason of a hold may have {HOLD_TEXT_LIMIT_BYTES} bytes"));
        }
        let mut root = self.clone();
        root.holds.retain(|standing| (standing.backup, standing.restore) != (hold.backup, hold.restore));
        if root.holds.len() >= HOLD_LIMIT {
            return refused(format!("{HOLD_LIMIT} backups are held: release one first"));
        }
        let at =
            root.holds.partition_point(|standing| (standing.backup, standing.restore) < (hold.backup, hold.restore));
        root.holds.insert(at, hold);
        Ok(root)
    }

    /// Without any hold on a backup. A restore that is under way holds it again.
    pub fn without_hold(&self, backup: &BackupId) -> Self {
        let mut root = self.clone();
        root.holds.retain(|hold| hold.backup != *backup);
        root
    }

    /// Without what retention takes away. [`RootError::Moved`] unless this is the very root that the plan was made from.
    pub fn with_retired(&self, retired: &Retired) -> Result<Self, RootError> {
        if (self.generation, self.nonce) != (retired.generation, retired.nonce) {
            return Err(RootError::Moved { planned: retired.generation, newest: self.generation });
        }
        let Some(next) = self.generation.next() else {
            return refused("the cluster has used up all root generations".to_owned());
        };
        let mut root = self.clone();
        for backup in &retired.backups {
            if let Some(pin) = self.pins.iter().find(|pin| pin.identifiers().any(|id| id == *backup)) {
                return refused(format!("backup {backup} cannot be removed while {} is under way", pin.backup));
            }
            root.gone.add(*backup);
        }
        root.backups.retain(|existing| !retired.backups.contains(&existing.backup));
        root.holds.retain(|hold| !retired.backups.contains(&hold.backup));
        for condemned in &retired.condemned {
            root.check_condemned(&condemned.backup)?;
            root.gone.add(condemned.backup);
        }
        for (system, kept) in &retired.wal_kept {
            root.keep_wal_from(*system, kept)?;
        }
        root.condemned =
            (!retired.condemned.is_empty()).then(|| Condemned { generation: next, backups: retired.condemned.clone() });
        Ok(root)
    }

    fn check_condemned(&self, backup: &BackupId) -> Result<(), RootError> {
        let pinned = self.pins.iter().any(|pin| pin.identifiers().any(|id| id == *backup));
        match self.backup(backup).is_some() || pinned {
            true => refused(format!("objects of {backup} cannot be condemned: it exists or is under way")),
            false => Ok(()),
        }
    }

    fn keep_wal_from(&mut self, system: SystemIdentifier, kept: &WalKept) -> Result<(), RootError> {
        let Some(system) = self.systems.iter_mut().find(|known| known.system_identifier == system) else {
            return refused(format!("system {system} is not known, and none of its WAL can be condemned"));
        };
        let timeline = kept.timeline();
        match system.wal_kept.iter_mut().find(|standing| standing.timeline() == timeline) {
            Some(standing) if standing.from > kept.from => {
                refused(format!("WAL of timeline {timeline} is kept from {} already", standing.from))
            }
            Some(standing) => {
                *standing = kept.clone();
                Ok(())
            }
            None => {
                let at = system.wal_kept.partition_point(|standing| standing.timeline() < timeline);
                system.wal_kept.insert(at, kept.clone());
                Ok(())
            }
        }
    }

    /// Whether WAL from a position on lies above everything that was condemned on these timelines.
    fn check_wal_is_kept(
        &self,
        backup: BackupId,
        system: SystemIdentifier,
        timelines: std::ops::RangeInclusive<Timeline>,
        start: postgres_format::Lsn,
        size: Option<SegmentSize>,
    ) -> Result<(), RootError> {
        let Some(system) = self.system(system) else { return Ok(()) };
        let known = system.segment_size_bytes.and_then(|bytes| SegmentSize::from_bytes(bytes).ok());
        let Some(size) = size.or(known) else { return Ok(()) };
        let on_them = system.wal_kept.iter().filter(|kept| timelines.contains(&kept.timeline()));
        for kept in on_them {
            let first = SegmentName::new(kept.timeline(), SegmentNumber::containing(start, size), size);
            if first < kept.from {
                return refused(format!("backup {backup} needs WAL from {first}, and {} on is kept", kept.from));
            }
        }
        Ok(())
    }

    /// With one more system identifier, or with what was not known about it yet.
    pub fn with_system(&self, system: System) -> Result<Self, RootError> {
        let mut root = self.clone();
        let known = root.systems.iter_mut().find(|known| known.system_identifier == system.system_identifier);
        let Some(known) = known else {
            root.systems.push(system);
            return Ok(root);
        };
        let size = (known.segment_size_bytes, system.segment_size_bytes);
        if let (Some(known_bytes), Some(bytes)) = size
            && known_bytes != bytes
        {
            let system = system.system_identifier;
            let reason = format!(
                "system {system} has WAL segments of {known_bytes} bytes, not of {bytes}: it cannot be archived here"
            );
            return Err(RootError::Refused { reason });
        }
        known.segment_size_bytes = known.segment_size_bytes.or(system.segment_size_bytes);
        known.postgres_major = system.postgres_major.or(known.postgres_major);
        Ok(root)
    }
}
