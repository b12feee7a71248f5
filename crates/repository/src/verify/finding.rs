//! What was found, as values: JSON of the schema `pgconvoy.verify/v1`.
//!
//! Rules of the schema are those of `pgconvoy.info/v1`: fields are added, never changed or removed.

use jiff::Timestamp;
use postgres_format::{Lsn, Timeline};
use serde::{Deserialize, Serialize};

use crate::name::{BackupId, ClusterName, StoreName};

/// Name and version of the JSON.
pub const SCHEMA: &str = "pgconvoy.verify/v1";

/// How thoroughly to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Depth {
    /// Digests, extents against pack tables, and WAL without gaps. Nothing is decompressed.
    Digests,
    /// Also decodes packs and WAL, and verifies page checksums and change maps.
    Full,
}

/// A part of all objects, by their keys: the same whoever asks, and all parts together are everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Which part, from 0.
    pub part: u32,
    /// Of how many.
    pub of: u32,
}

impl Share {
    /// The part that is due on a day, of so many: each is due once in that many days.
    pub fn on(day: i64, of: u32) -> Self {
        let of = of.max(1);
        let part = u32::try_from(day.rem_euclid(i64::from(of))).expect("a remainder is less than its divisor");
        Self { part, of }
    }

    /// Whether an object belongs to it.
    pub fn takes(&self, key: &str) -> bool {
        crc32c::crc32c(key.as_bytes()) % self.of.max(1) == self.part
    }
}

/// How bad a finding is. In order, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Backups cannot be restored at all.
    NotRestorable,
    /// Some moments cannot be restored, or a timeline not followed.
    Lost,
    /// Something is damaged or missing, and everything can be restored from elsewhere or without it.
    Damaged,
}

/// What kind of thing is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// The newest root commit of a store: what exists there.
    NewestRoot,
    /// An older one.
    OlderRoot,
    /// A manifest.
    Manifest,
    /// A pack.
    Pack,
    /// A manifest says of a pack what the pack's own table does not.
    Coverage,
    /// Pages with wrong checksums of which the backup itself does not tell.
    Pages,
    /// A segment, `.partial` or `.backup` file.
    Wal,
    /// What lies beside a segment and tells what it changed.
    ChangeMap,
    /// A timeline's history.
    History,
    /// Evidence of a refused file.
    Evidence,
    /// WAL that is missing from the start of a backup to its end.
    BackupWal,
    /// WAL that is missing between WAL that is there.
    Gap,
}

/// What an object must be to be sound, where the object itself does not say so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Its size in bytes.
    pub size: u64,
    /// Its SHA-256.
    #[serde(with = "crate::digest::hex")]
    pub sha256: [u8; 32],
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What is concerned.
    pub what: What,
    /// In which store; absent if it is so in all of them together.
    pub store: Option<StoreName>,
    /// The object's key; absent if it is about several.
    pub object: Option<String>,
    /// What is there.
    pub found: String,
    /// What should be.
    pub expected: String,
    /// Backups that need it.
    pub backups: Vec<BackupId>,
    /// Which moments it costs, if it costs any.
    pub moments: Option<String>,
    /// Other stores that hold it sound.
    pub sound_in: Vec<StoreName>,
    /// What to do.
    pub remedy: String,
    /// By what a sound copy is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<Proof>,
}

/// A backup in one store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreBackup {
    /// Which store names it.
    pub store: StoreName,
    /// Whether all it needs was found sound there.
    pub whole: bool,
}

/// What holds of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupVerdict {
    /// Which.
    pub backup: BackupId,
    /// Whether it can be restored from all stores together.
    pub restorable: bool,
    /// Store by store.
    pub stores: Vec<StoreBackup>,
    /// How far WAL goes on from it without a gap; absent if not even to its end.
    pub reaches: Option<Lsn>,
    /// On which timeline that is.
    pub timeline: Option<Timeline>,
    /// Why it cannot be restored, a line each.
    pub reasons: Vec<String>,
}

/// What was looked at in one store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreVerdict {
    /// Which.
    pub store: StoreName,
    /// Why it was not looked at to the end; absent if it was.
    pub failed: Option<String>,
    /// Objects that were read.
    pub objects: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Findings about it that are not among the others, because there are too many.
    pub left_out: u64,
}

/// What a walk found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// When it was begun.
    pub generated: Timestamp,
    /// Of which cluster.
    pub cluster: ClusterName,
    /// How thoroughly.
    pub depth: Depth,
    /// Which part of the objects was read; absent if all.
    pub share: Option<Share>,
    /// Nothing is wrong in what was looked at.
    pub sound: bool,
    /// Every store was looked at to the end.
    pub complete: bool,
    /// The stores, in their configured order.
    pub stores: Vec<StoreVerdict>,
    /// The backups, oldest first.
    pub backups: Vec<BackupVerdict>,
    /// The worst first.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Backups that cannot be restored.
    pub fn not_restorable(&self) -> usize {
        self.backups.iter().filter(|backup| !backup.restorable).count()
    }

    /// Adds up in one line.
    pub fn summary(&self) -> String {
        let left_out: u64 = self.stores.iter().map(|store| store.left_out).sum();
        let findings = self.findings.len() as u64 + left_out;
        let failed: Vec<&str> =
            self.stores.iter().filter(|store| store.failed.is_some()).map(|store| store.store.as_str()).collect();
        let wrong = if findings == 1 { "1 thing is wrong".to_owned() } else { format!("{findings} things are wrong") };
        let unknown =
            self.backups.is_empty() && self.findings.iter().any(|one| one.severity == Severity::NotRestorable);
        let mut text = match (self.not_restorable(), findings) {
            (0, 0) if self.stores.iter().all(|store| store.objects == 0) => "nothing is there".to_owned(),
            (0, 0) if self.backups.is_empty() => "sound, but there is no backup".to_owned(),
            (0, 0) => "sound".to_owned(),
            (0, _) if unknown => format!("NOTHING CAN BE RESTORED; {wrong}"),
            (0, _) => format!("every backup can be restored, and {wrong}"),
            (lost, _) => format!("{lost} of {} backups CANNOT BE RESTORED; {wrong}", self.backups.len()),
        };
        if !failed.is_empty() {
            text.push_str(&format!("; not looked at to the end: {}", failed.join(", ")));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_due_once_in_thirty_days() {
        for key in ["repo.json", "c/main/b/20261123T010203Z-00000001/manifest", "c/main/root/0000000000000001"] {
            let due: Vec<i64> = (20_000..20_060).filter(|day| Share::on(*day, 30).takes(key)).collect();
            assert_eq!((due.len(), due[1] - due[0]), (2, 30), "{key}");
        }
        assert_eq!(Share::on(-1, 30), Share { part: 29, of: 30 });
        assert!(Share::on(7, 0).takes("x"));
    }
}
