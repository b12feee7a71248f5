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
//! Whether a backup may be committed (all parts and all WAL durable in that store) is the caller's to prove.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;
use postgres_format::{FullTransactionId, Lsn, SystemIdentifier, Timeline};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::backup::origin::{BackupType, ChangeSource};
use crate::canonical::canonical_json;
use crate::key::{self, ObjectKey, ParsedKey};
use crate::name::{BackupId, ClusterName, Generation, NodeName, StoreName};
use crate::store::{self, LIST_LIMIT, ObjectStore, Put, Remedy, StoreError};

/// Longest root that is read, in bytes: tens of thousands of backups.
pub const ROOT_LIMIT_BYTES: u64 = 32 * 1024 * 1024;
/// How often a commit that lost to another writer starts again from the newer root.
const COMMIT_ATTEMPTS: u32 = 16;
/// How often a create of unknown outcome is repeated.
const CREATE_ATTEMPTS: u32 = 3;
/// The format that this version writes and reads.
const FORMAT: u32 = 1;
/// Names that may stand in `critical`.
const UNDERSTOOD: &[&str] = &[];

/// What exists in a store of one cluster, besides WAL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Root {
    /// Version of this object's layout; 1.
    pub format: u32,
    /// Names of fields without which the root must not be interpreted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub critical: Vec<String>,
    /// Its number, from 1, without gaps.
    pub generation: Generation,
    /// Digest of the root before it; none in the first.
    #[serde(with = "crate::digest::hex_option")]
    pub previous_sha256: Option<[u8; 32]>,
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
    /// What newer versions added; kept.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
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
    /// The node whose files were read.
    pub node: NodeName,
    /// Whether that node was a standby.
    pub from_standby: bool,
    /// The label that was asked for.
    pub label: String,
    /// How many files it has.
    pub files: u64,
    /// Bytes in those files.
    pub data_bytes: u64,
    /// Bytes of packs and manifest.
    pub stored_bytes: u64,
    /// How many packs it has.
    pub packs: u32,
    /// How many pages were found corrupt in the data directory.
    pub page_errors: u64,
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

    /// Reads what [`RootBackup::to_json`] wrote.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

/// Why a root could not be read or committed.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A store failed.
    #[error("a store failed")]
    Store(#[source] StoreError),
    /// A root is not what was committed.
    #[error("store {store}: object {key} is damaged: {reason}")]
    Damaged {
        /// Which store.
        store: StoreName,
        /// Which root.
        key: ObjectKey,
        /// What was found and what was expected.
        reason: String,
    },
    /// A newer version wrote it.
    #[error("store {store}: object {key} was written by a newer pgconvoy ({reason}): upgrade this one")]
    Newer {
        /// Which store.
        store: StoreName,
        /// Which root.
        key: ObjectKey,
        /// What is not understood.
        reason: String,
    },
    /// The sought change contradicts what exists.
    #[error("{reason}")]
    Refused {
        /// What exists, what was to be changed, and what to do.
        reason: String,
    },
    /// Other writers were always faster.
    #[error("store {store}: others committed to cluster {cluster} {COMMIT_ATTEMPTS} times in a row: try again")]
    Contended {
        /// Which store.
        store: StoreName,
        /// Which cluster.
        cluster: ClusterName,
    },
    /// The store did not say whether the commit happened. Committing the same change again is safe.
    #[error("store {store}: it is unknown whether root {generation} of cluster {cluster} was committed")]
    Unknown {
        /// Which store.
        store: StoreName,
        /// Which cluster.
        cluster: ClusterName,
        /// Which generation.
        generation: Generation,
        /// What the store said.
        source: Box<StoreError>,
    },
}

impl RootError {
    /// What helps.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Store(error) => error.remedy(),
            Self::Damaged { .. } => Remedy::Corrupt,
            Self::Newer { .. } => Remedy::Operator,
            Self::Refused { .. } => Remedy::Conflict,
            Self::Contended { .. } | Self::Unknown { .. } => Remedy::Retry,
        }
    }
}

impl From<StoreError> for RootError {
    fn from(error: StoreError) -> Self {
        // A store error says which store and which object; there is nothing to add.
        Self::Store(error)
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
            cluster,
            nonce: Uuid::nil(),
            writer,
            written: now,
            systems: Vec::new(),
            backups: Vec::new(),
            unknown: BTreeMap::new(),
        }
    }

    /// With one more backup. Unchanged if it is there already; refused if another one has its identifier.
    pub fn with_backup(&self, backup: RootBackup) -> Result<Self, RootError> {
        let mut root = self.clone();
        match root.backups.binary_search_by_key(&backup.backup, |existing| existing.backup) {
            Ok(index) if root.backups[index] == backup => {}
            Ok(_) => {
                let reason = format!("another backup is already published as {}: take a new one", backup.backup);
                return Err(RootError::Refused { reason });
            }
            Err(index) => root.backups.insert(index, backup),
        }
        Ok(root)
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

    /// A backup by its identifier.
    pub fn backup(&self, id: &BackupId) -> Option<&RootBackup> {
        self.backups.iter().find(|backup| backup.backup == *id)
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
        #[derive(Deserialize)]
        struct Versions {
            format: u32,
            #[serde(default)]
            critical: Vec<String>,
        }
        let malformed = |error: serde_json::Error| RootDamage::Text { reason: error.to_string() };
        let versions: Versions = serde_json::from_slice(text).map_err(malformed)?;
        if versions.format != FORMAT {
            return Err(RootDamage::Newer { what: format!("format {}", versions.format) });
        }
        if let Some(field) = versions.critical.iter().find(|field| !UNDERSTOOD.contains(&field.as_str())) {
            return Err(RootDamage::Newer { what: format!("field {field:?}") });
        }
        Ok((serde_json::from_slice(text).map_err(malformed)?, sha256))
    }
}

const PREFIX: &[u8] = b"{\"root\":";
const MIDDLE: &[u8] = b",\"sha256\":\"";
const SUFFIX: &[u8] = b"\"}\n";

/// What is wrong with the bytes of a root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RootDamage {
    /// It is cut off, or no root.
    #[error("it is not enclosed as roots are")]
    Frame,
    /// It was changed.
    #[error("it does not match its SHA-256")]
    Digest,
    /// It is whole, but no root of ours.
    #[error("it cannot be read: {reason}")]
    Text {
        /// What the JSON reader said.
        reason: String,
    },
    /// A newer version wrote it.
    #[error("{what} is not understood")]
    Newer {
        /// What is new.
        what: String,
    },
}

/// The newest root of a cluster; `None` if the store says that there is none.
pub async fn newest(store: &dyn ObjectStore, cluster: &ClusterName) -> Result<Option<Root>, RootError> {
    Ok(newest_committed(store, cluster).await?.map(|(root, _)| root))
}

/// Changes what exists, and gives the committed root. An edit that changes nothing commits nothing.
///
/// `edit` gets the newest root, or an empty one, and gives the changed one; it is called again whenever another writer
/// was faster. Generation, previous digest, nonce, writer and time are set here.
pub async fn commit(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    writer: &NodeName,
    now: Timestamp,
    edit: impl Fn(&Root) -> Result<Root, RootError>,
) -> Result<Root, RootError> {
    for _ in 0..COMMIT_ATTEMPTS {
        let newest = newest_committed(store, cluster).await?;
        let previous = newest.as_ref().map(|(root, sha256)| (root.generation, *sha256));
        let exists = newest.is_some();
        let base = newest.map_or_else(|| Root::empty(cluster.clone(), writer.clone(), now), |(root, _)| root);
        let edited = edit(&base)?;
        if exists && edited == base {
            return Ok(base);
        }
        let generation = match previous {
            None => Generation::FIRST,
            Some((generation, _)) => generation.next().ok_or_else(|| RootError::Refused {
                reason: format!("cluster {cluster} has used up all root generations"),
            })?,
        };
        let root = Root {
            generation,
            previous_sha256: previous.map(|(_, sha256)| sha256),
            cluster: cluster.clone(),
            nonce: Uuid::now_v7(),
            writer: writer.clone(),
            written: now,
            ..edited
        };
        if create(store, &root).await? == Created::Ours {
            return Ok(root);
        }
    }
    Err(RootError::Contended { store: store.name().clone(), cluster: cluster.clone() })
}

#[derive(PartialEq, Eq)]
enum Created {
    Ours,
    AnotherWriters,
}

/// Creates a generation and finds out who did if the answer does not say so.
async fn create(store: &dyn ObjectStore, root: &Root) -> Result<Created, RootError> {
    let key = key::root(&root.cluster, root.generation);
    let bytes = Bytes::from(root.to_bytes().0);
    let mut unknown = None;
    for _ in 0..CREATE_ATTEMPTS {
        match store.put_new(&key, bytes.clone().into()).await {
            Ok(Put::Created) => return Ok(Created::Ours),
            Ok(Put::Exists) => {}
            Err(error) if error.outcome_unknown() => unknown = Some(error),
            Err(error) => return Err(error.into()),
        }
        match read_generation(store, &root.cluster, root.generation).await {
            Ok(Some((there, _))) if there.nonce == root.nonce => return Ok(Created::Ours),
            Ok(Some(_)) => return Ok(Created::AnotherWriters),
            Ok(None) => {}
            Err(RootError::Store(error)) if error.is_outage() => unknown = Some(error),
            Err(error) => return Err(error),
        }
    }
    let source = unknown.unwrap_or_else(|| StoreError::NotFound { store: store.name().clone(), key });
    let (cluster, generation) = (root.cluster.clone(), root.generation);
    Err(RootError::Unknown { store: store.name().clone(), cluster, generation, source: Box::new(source) })
}

async fn newest_committed(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
) -> Result<Option<(Root, [u8; 32])>, RootError> {
    let Some(generation) = newest_generation(store, cluster).await? else {
        return Ok(None);
    };
    let found = read_generation(store, cluster, generation).await?;
    // It was just listed, and roots are never removed.
    found.map(Some).ok_or_else(|| {
        let key = key::root(cluster, generation);
        StoreError::NotFound { store: store.name().clone(), key }.into()
    })
}

/// The newest generation. Generations have no gaps, so a long history is searched by leaps, not listed.
async fn newest_generation(store: &dyn ObjectStore, cluster: &ClusterName) -> Result<Option<Generation>, RootError> {
    let (mut newest, more) = page_end(store, cluster, None, LIST_LIMIT).await?;
    let mut leap = if more { LIST_LIMIT as u64 } else { 0 };
    // A probe finds whether anything is newer than `newest + leap`; leaps double while it does, then halve.
    let mut growing = true;
    while leap > 0 {
        let at = newest.and_then(|newest| Generation::new(newest.get().saturating_add(leap)));
        let (found, _) = page_end(store, cluster, at, 1).await?;
        match found {
            Some(found) => {
                newest = Some(found);
                leap = if growing { leap.saturating_mul(2) } else { leap / 2 };
            }
            None => {
                growing = false;
                leap /= 2;
            }
        }
    }
    // The last leaps of one may stop short by the entries that came meanwhile or by rounding.
    while newest.is_some() && more {
        match page_end(store, cluster, newest, LIST_LIMIT).await? {
            (Some(found), again) => {
                newest = Some(found);
                if !again {
                    break;
                }
            }
            (None, _) => break,
        }
    }
    Ok(newest)
}

/// The last generation of the listing that starts after `after`, and whether there are more.
async fn page_end(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    after: Option<Generation>,
    limit: usize,
) -> Result<(Option<Generation>, bool), RootError> {
    let prefix = key::root_prefix(cluster);
    let after = after.map(|after| key::root(cluster, after));
    let page = store.list(&prefix, after.as_ref().map(ObjectKey::as_str), limit).await?;
    let Some(last) = page.objects.last() else {
        return Ok((None, false));
    };
    match last.key.parsed() {
        Ok(ParsedKey::Root { generation, .. }) => Ok((Some(generation), page.more)),
        _ => Err(RootError::Damaged {
            store: store.name().clone(),
            key: last.key.clone(),
            reason: "no root has such a key: something else writes into this repository".to_owned(),
        }),
    }
}

/// One root with its digest; `None` if the store says that it does not exist.
pub async fn read_generation(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    generation: Generation,
) -> Result<Option<(Root, [u8; 32])>, RootError> {
    let key = key::root(cluster, generation);
    let Some(bytes) = store::read(store, &key, ROOT_LIMIT_BYTES).await? else {
        return Ok(None);
    };
    let damaged = |reason: String| RootError::Damaged { store: store.name().clone(), key: key.clone(), reason };
    let (root, sha256) = match Root::from_bytes(&bytes) {
        Ok(read) => read,
        Err(RootDamage::Newer { what }) => {
            return Err(RootError::Newer { store: store.name().clone(), key: key.clone(), reason: what });
        }
        Err(damage) => return Err(damaged(damage.to_string())),
    };
    if root.cluster != *cluster || root.generation != generation {
        let found = format!("it says cluster {} and generation {}", root.cluster, root.generation);
        return Err(damaged(found));
    }
    Ok(Some((root, sha256)))
}

/// Reads the whole history and checks that no generation is missing and that each holds the digest of the one
/// before. Gives the newest.
pub async fn verify_history(store: &dyn ObjectStore, cluster: &ClusterName) -> Result<Option<Generation>, RootError> {
    let Some(newest) = newest_generation(store, cluster).await? else {
        return Ok(None);
    };
    let mut previous = None;
    let mut generation = Generation::FIRST;
    loop {
        let key = key::root(cluster, generation);
        let Some((root, sha256)) = read_generation(store, cluster, generation).await? else {
            return Err(StoreError::NotFound { store: store.name().clone(), key }.into());
        };
        if root.previous_sha256 != previous {
            let reason = "it does not hold the digest of the root before it".to_owned();
            return Err(RootError::Damaged { store: store.name().clone(), key, reason });
        }
        previous = Some(sha256);
        match generation.next().filter(|next| *next <= newest) {
            Some(next) => generation = next,
            None => return Ok(Some(newest)),
        }
    }
}

#[cfg(test)]
mod tests;
