//! Root commits: the one linear history of what exists in a store.
//!
//! `root/<generation>` is created and never changed or removed; the newest says which backups exist. Creating the next
//! generation is the commit: of several writers exactly one wins, and the others read the new state and try again. A
//! writer recognises its own commit after a lost answer by its nonce.
//!
//! ```text
//! {"root":R,"sha256":"<SHA-256 of the bytes of R, hex>"}\n          R = canonical JSON of a Root
//! ```
//!
//! Each root holds the digest of the one before it. Fields that this version does not know are kept when it commits;
//! names in `critical` that it does not know are refused, by readers and writers alike. Each store has a history of
//! its own; no decision compares two.
//!
//! Besides the backups that exist it says which are under way (pins), which are held, and what was condemned to be
//! removed. Rules that make removing safe at any time, however late and by whomever:
//! * a backup is pinned before its first object is sent, and builds on one that exists; its publication turns the pin
//!   into a backup, and is refused when the pin is gone;
//! * what is condemned is referred to by no backup that exists or is under way, and lies under no pin; the commit that
//!   condemns it is valid only upon the very root that was looked at;
//! * what was condemned is never referred to again: an identifier of which anything was condemned is gone for good, and
//!   WAL positions that a timeline is kept from never go back.
//!
//! Whoever remembers a root that was there is told when it is gone, and commits nothing then, see `mark.rs`.
//!
//! Whether a backup may be committed (all parts and all WAL durable in that store) is the caller's to prove.

mod edits;
mod error;
mod history;
mod mark;
mod parts;
mod restoring;
mod takeover;

pub use edits::Retired;
pub use error::{RootDamage, RootError};
pub use history::{commit, commit_upon, newest, newest_upon, read_generation, verify_history};
pub(crate) use history::{counts, first_behind};
pub use mark::{Mark, Past, SetBack, look_back};
pub use parts::{
    Condemned, CondemnedBackup, Gone, HOLD_LIMIT, Hold, Lost, PIN_LIMIT, PackRange, Pin, PinnedWal, WalKept, WalSpan,
};
pub use restoring::{RESTORE_HOLD, RESTORE_REASON};

use std::collections::BTreeMap;

use jiff::Timestamp;
use postgres_format::{FullTransactionId, Lsn, SegmentName, SystemIdentifier, Timeline};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::backup::origin::{BackupType, ChangeSource};
use crate::canonical::canonical_json;
use crate::name::{BackupId, ClusterName, Generation, NodeName};
use crate::witness::WalWitness;

/// Longest root that is read, in bytes: tens of thousands of backups.
pub const ROOT_LIMIT_BYTES: u64 = 32 * 1024 * 1024;
/// The format that this version writes and reads.
const FORMAT: u32 = 1;

/// Most warnings that a backup carries.
pub const WARNING_LIMIT: usize = 20;
/// Names that may stand in `critical`, each if and only if the field is used: whoever does not know them must not
/// commit, because it would publish or remove what it may not.
const UNDERSTOOD: &[&str] = &["pins", "holds", "condemned", "gone", "wal_kept"];

/// What exists in a store of one cluster, besides WAL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Root {
    /// Version of this object's layout; 1.
    pub format: u32,
    /// Names of fields without which the root must not be interpreted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub critical: Vec<String>,
    /// Its number, from 1, without gaps but those that [`Root::lost`] tells of.
    pub generation: Generation,
    /// Digest of the root before it; none in the first that there is.
    #[serde(with = "crate::digest::hex_option")]
    pub previous_sha256: Option<[u8; 32]>,
    /// The generations right before this one that the store lost when it was set back, as an operator accepted. Without
    /// meaning unless they end right before this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<Lost>,
    /// The cluster's name in the fleet.
    pub cluster: ClusterName,
    /// Drawn anew for every commit.
    pub nonce: Uuid,
    /// The node or coordinator that committed it.
    pub writer: NodeName,
    /// When, by the writer's clock.
    pub written: Timestamp,
    /// The system identifiers that this cluster has had, oldest first. More than one after a major upgrade.
    pub systems: Vec<System>,
    /// The backups that exist, oldest first.
    pub backups: Vec<RootBackup>,
    /// The backups that are under way, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<Pin>,
    /// What operators keep from being removed, by backup.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<Hold>,
    /// What the last retention condemned to be removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condemned: Option<Condemned>,
    /// Identifiers that can never be backups here again.
    #[serde(default, skip_serializing_if = "Gone::is_empty")]
    pub gone: Gone,
    /// What newer versions added; kept.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

/// One life of a cluster: what `initdb` or `pg_upgrade` began.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct System {
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// PostgreSQL's major version, once it is known.
    pub postgres_major: Option<u32>,
    /// Size of a WAL segment in bytes, once it is known.
    pub segment_size_bytes: Option<u64>,
    /// When it was added here.
    pub since: Timestamp,
    /// From where WAL is kept, by timeline; what comes before was condemned. All of it where nothing is said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wal_kept: Vec<WalKept>,
    /// What newer versions added; kept.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

impl System {
    /// A system whose WAL is all kept.
    pub fn new(
        system_identifier: SystemIdentifier,
        postgres_major: Option<u32>,
        segment_size_bytes: Option<u64>,
        since: Timestamp,
    ) -> Self {
        let (wal_kept, unknown) = (Vec::new(), BTreeMap::new());
        Self { system_identifier, postgres_major, segment_size_bytes, since, wal_kept, unknown }
    }

    /// Whether the files of a segment of this system are kept.
    pub fn keeps_wal(&self, segment: SegmentName) -> bool {
        WalKept::all_keep(&self.wal_kept, segment)
    }
}

/// A backup that exists: enough to choose one without reading manifests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RootBackup {
    /// Its identifier.
    pub backup: BackupId,
    /// How much was read and stored anew.
    #[serde(rename = "type", default)]
    pub backup_type: BackupType,
    /// The backup it was built on. It need not exist any more: nothing is followed through it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// How it was found what had changed since the parent; absent of a full backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<ChangeSource>,
    /// SHA-256 of the manifest object.
    #[serde(with = "crate::digest::hex")]
    pub manifest_sha256: [u8; 32],
    /// Size of the manifest object in bytes.
    pub manifest_size: u64,
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// PostgreSQL's major version.
    pub postgres_major: u32,
    /// Size of a WAL segment in bytes.
    pub segment_size_bytes: u64,
    /// Timeline at the start.
    pub start_timeline: Timeline,
    /// Where recovery of the backup begins.
    pub start_lsn: Lsn,
    /// When it was started, by the server's clock.
    pub start_time: Timestamp,
    /// Timeline at the stop.
    pub stop_timeline: Timeline,
    /// Where recovery of the backup becomes consistent at the latest.
    pub stop_lsn: Lsn,
    /// When it was stopped, by the server's clock.
    pub stop_time: Timestamp,
    /// Of a backup from a standby: the `minRecoveryPoint` of its `pg_control`.
    pub min_recovery_point: Option<Lsn>,
    /// The id that the next transaction was to get at the start; absent if it was not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_next_xid: Option<FullTransactionId>,
    /// The same after the stop: a transaction with this id or a later one ended after the backup did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_next_xid: Option<FullTransactionId>,
    /// Of a backup from a standby: time of the newest commit or abort that it had replayed when it had ended, by the clock
    /// of the server that made it. None that the backup holds is known to be later; absent if it was not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_commit_time: Option<Timestamp>,
    /// The node whose files were read.
    pub node: NodeName,
    /// Whether that node was a standby that started and stopped the backup itself.
    pub from_standby: bool,
    /// Of a hybrid backup, for which nearly all of a standby's files were read: the primary that started and stopped it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<NodeName>,
    /// The label that was asked for.
    pub label: String,
    /// How many files it has.
    pub files: u64,
    /// Bytes in those files.
    pub data_bytes: u64,
    /// Bytes of packs and manifest.
    pub stored_bytes: u64,
    /// Bytes of older backups' packs that it refers to.
    #[serde(default)]
    pub inherited_bytes: u64,
    /// Unfinished backups that it went on from, whose packs are among those, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<BackupId>,
    /// How many packs it has.
    pub packs: u32,
    /// How many pages were found corrupt in the data directory.
    pub page_errors: u64,
    /// Stretches of WAL as the server has them whose files were read, see [`crate::witness`]. Without any, nothing proves
    /// that the WAL is its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wal_witnesses: Vec<WalWitness>,
    /// What deserves a look though the backup is good, a line each; at most [`WARNING_LIMIT`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// What newer versions added; kept.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

impl RootBackup {
    /// Canonical JSON, as it stands in the root and travels over the wire.
    pub fn to_json(&self) -> String {
        let text = canonical_json(self).expect("an entry has only text keys and plain values");
        String::from_utf8(text).expect("JSON is UTF-8")
    }

    /// What is said when it was taken, with its warnings.
    pub fn done(&self) -> String {
        match self.warnings.as_slice() {
            [] => "done".to_owned(),
            warnings => format!("done, and deserves a look: {}", warnings.join("; ")),
        }
    }

    /// The position at which recovery is consistent at the latest.
    pub fn consistent_lsn(&self) -> Lsn {
        self.min_recovery_point.map_or(self.stop_lsn, |point| point.max(self.stop_lsn))
    }

    /// Reads what [`RootBackup::to_json`] wrote.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

impl Root {
    /// What a cluster without any root starts from.
    pub fn empty(cluster: ClusterName, writer: NodeName, now: Timestamp) -> Self {
        Self {
            format: FORMAT,
            critical: Vec::new(),
            generation: Generation::FIRST,
            previous_sha256: None,
            lost: None,
            cluster,
            nonce: Uuid::nil(),
            writer,
            written: now,
            systems: Vec::new(),
            backups: Vec::new(),
            pins: Vec::new(),
            holds: Vec::new(),
            condemned: None,
            gone: Gone::default(),
            unknown: BTreeMap::new(),
        }
    }

    /// The generations right before this one that are lost.
    pub fn lost_before(&self) -> Option<Lost> {
        self.lost.filter(|lost| lost.last.next() == Some(self.generation))
    }

    /// A backup by its identifier.
    pub fn backup(&self, id: &BackupId) -> Option<&RootBackup> {
        self.backups.iter().find(|backup| backup.backup == *id)
    }

    /// A backup that is under way.
    pub fn pin(&self, id: &BackupId) -> Option<&Pin> {
        self.pins.iter().find(|pin| pin.backup == *id)
    }

    /// Whether an identifier can never be a backup here again, because its objects were condemned or may have been.
    pub fn is_gone(&self, id: &BackupId) -> bool {
        self.backup(id).is_none() && !self.is_covered(id) && self.gone.holds(id)
    }

    /// What is known of a system identifier.
    pub fn system(&self, identifier: SystemIdentifier) -> Option<&System> {
        self.systems.iter().find(|system| system.system_identifier == identifier)
    }

    /// The names of the fields in use without which nobody may commit.
    fn critical_names(&self) -> Vec<String> {
        let used = [
            ("pins", !self.pins.is_empty()),
            ("holds", !self.holds.is_empty()),
            ("condemned", self.condemned.is_some()),
            ("gone", !self.gone.is_empty()),
            ("wal_kept", self.systems.iter().any(|system| !system.wal_kept.is_empty())),
        ];
        used.into_iter().filter(|(_, used)| *used).map(|(name, _)| name.to_owned()).collect()
    }

    /// The object as it lies in a store, and its digest.
    pub fn to_bytes(&self) -> (Vec<u8>, [u8; 32]) {
        let text = canonical_json(self).expect("a root has only text keys and plain values");
        let sha256 = crate::digest::sha256(&text);
        let mut bytes = PREFIX.to_vec();
        bytes.extend_from_slice(&text);
        bytes.extend_from_slice(MIDDLE);
        bytes.extend_from_slice(crate::digest::to_hex(&sha256).as_bytes());
        bytes.extend_from_slice(SUFFIX);
        (bytes, sha256)
    }

    /// Reads a root object. Gives it and its digest.
    pub fn from_bytes(bytes: &[u8]) -> Result<(Self, [u8; 32]), RootDamage> {
        let inner = bytes.strip_prefix(PREFIX).and_then(|bytes| bytes.strip_suffix(SUFFIX));
        let inner = inner.ok_or(RootDamage::Frame)?;
        let (text, stored) = inner.split_at_checked(inner.len().saturating_sub(64)).ok_or(RootDamage::Frame)?;
        let text = text.strip_suffix(MIDDLE).ok_or(RootDamage::Frame)?;
        let sha256 = crate::digest::sha256(text);
        if crate::digest::to_hex(&sha256).as_bytes() != stored {
            return Err(RootDamage::Digest);
        }
        let malformed = |error: serde_json::Error| RootDamage::Text { reason: error.to_string() };
        let root = serde_json::from_slice::<Self>(text);
        // What a newer version wrote may not even have the fields of this one.
        let (format, critical) = match &root {
            Ok(root) => (root.format, root.critical.clone()),
            Err(_) => {
                let versions: Versions = serde_json::from_slice(text).map_err(malformed)?;
                (versions.format, versions.critical)
            }
        };
        if format != FORMAT {
            return Err(RootDamage::Newer { what: format!("format {format}") });
        }
        if let Some(field) = critical.iter().find(|field| !UNDERSTOOD.contains(&field.as_str())) {
            return Err(RootDamage::Newer { what: format!("field {field:?}") });
        }
        Ok((root.map_err(malformed)?, sha256))
    }
}

/// What is looked at in a root that cannot be read.
#[derive(Deserialize)]
struct Versions {
    format: u32,
    #[serde(default)]
    critical: Vec<String>,
}

const PREFIX: &[u8] = b"{\"root\":";
const MIDDLE: &[u8] = b",\"sha256\":\"";
const SUFFIX: &[u8] = b"\"}\n";

#[cfg(test)]
mod tests;
