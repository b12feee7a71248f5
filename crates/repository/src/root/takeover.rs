//! Pure: a backup takes over what unfinished attempts left, in one commit with the end of their pins.
//!
//! Whatever a pin covers was not condemned as long as it stands, so what a standing pin hands on to another in the same root
//! is never condemned in between. Once a pin is gone nobody can tell, and nothing under its identifier is referred to again.

use super::{Root, RootBackup, RootError};
use crate::name::BackupId;

impl Root {
    /// Whether a pin stands that covers an identifier: then nothing under it can be condemned.
    pub fn is_covered(&self, id: &BackupId) -> bool {
        self.pins.iter().any(|pin| pin.identifiers().any(|covered| covered == *id))
    }

    /// With the pins of `attempts` taken over by that of `backup`: it covers what they covered of attempts, and none of them
    /// can ever be a backup. An attempt that `backup` took over before is passed over.
    ///
    /// # Errors
    /// [`RootError::PinGone`] if a pin, its own or an attempt's, does not stand any more; refused for copies.
    pub fn with_taken_over(&self, backup: &BackupId, attempts: &[BackupId]) -> Result<Self, RootError> {
        let gone = |id: &BackupId| RootError::PinGone { backup: *id };
        let mut own = self.pin(backup).ok_or_else(|| gone(backup))?.clone();
        let mut root = self.clone();
        for id in attempts.iter().filter(|id| *id != backup) {
            let Some(attempt) = root.pin(id).cloned() else {
                match own.protects.contains(id) {
                    true => continue,
                    false => return Err(gone(id)),
                }
            };
            if attempt.is_copy() {
                let reason = format!("{id} is being copied from another store: it is no attempt to go on from");
                return Err(RootError::Refused { reason });
            }
            let handed_on: Vec<BackupId> = [*id].into_iter().chain(attempt.protects).collect();
            own.protects.extend(handed_on.into_iter().filter(|id| id != backup));
            own.protects.sort_unstable();
            own.protects.dedup();
            root = root.without_pin(id);
        }
        if let Some(pin) = root.pins.iter_mut().find(|pin| pin.backup == *backup) {
            *pin = own;
        }
        Ok(root)
    }

    /// Refuses a backup that refers to what attempts left, unless its pin covers all of that here.
    pub(super) fn check_attempts(&self, entry: &RootBackup) -> Result<(), RootError> {
        let pin = self.pin(&entry.backup);
        let covered = |id: &BackupId| pin.is_some_and(|pin| pin.identifiers().any(|covered| covered == *id));
        match entry.attempts.iter().find(|id| !covered(id)) {
            None => Ok(()),
            Some(attempt) => Err(RootError::Refused {
                reason: format!(
                    "packs of {attempt}, an unfinished backup that {} went on from, may have been condemned here",
                    entry.backup
                ),
            }),
        }
    }
}
