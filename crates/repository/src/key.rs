//! Object keys. This is the only file that spells them.
//!
//! ```text
//! repo.json                                                identity of the repository, the same in every store
//! coord/probe/<name>                                       what a probe of the store wrote
//! c/<cluster>/root/<generation>                            root commits
//! c/<cluster>/b/<backup>/p/<number>                        packs of a base backup
//! c/<cluster>/b/<backup>/n/<number>                        notes of an unfinished base backup about its packs
//! c/<cluster>/b/<backup>/manifest                          what a root commit names
//! c/<cluster>/<system>/wal/<TLI>/<LOG>/<file>.<fp>         segments, .partial and .backup files
//! c/<cluster>/<system>/history/<TLI>.history               no fingerprint: only one can exist
//! c/<cluster>/<system>/conflict/<file>.<fp>                evidence of a refused history file
//! c/<cluster>/<system>/decision/<file>/<number>            an operator's choice among conflicting contents
//! c/<cluster>/<system>/writer/<TLI>/<number>               an operator's adoption of a writing node
//! ```
//!
//! `<system>` is the system identifier in decimal, `<TLI>` and `<LOG>` are eight upper-case hex digits, `<fp>` is a
//! [`Fingerprint`]. Keys are plain ASCII in which byte order is the order of time within every directory, so that a
//! listing that starts after the last key seen yields what is new.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use postgres_format::{SystemIdentifier, Timeline, WalFileName};

use crate::fingerprint::Fingerprint;
use crate::name::{BackupId, ClusterName, Generation, lower_hex};

/// Longest key, in bytes; far below the 1024 of S3, so that a prefix in the bucket still fits.
pub const KEY_LIMIT_BYTES: usize = 512;

/// Longest component of a key, in bytes: what every file system takes as a file name.
pub const COMPONENT_LIMIT_BYTES: usize = 200;

/// The key of an object: components of `A-Z a-z 0-9 _ - .` joined by `/`, none empty, none starting with a dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey(String);

/// The text cannot be the key of an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an object key: {reason}")]
pub struct KeyError {
    /// What was given, cut to a printable length.
    pub text: String,
    /// Which rule it breaks.
    pub reason: &'static str,
}

impl KeyError {
    fn new(text: &str, reason: &'static str) -> Self {
        Self { text: text.chars().take(160).collect(), reason }
    }
}

impl ObjectKey {
    /// Checks that a text can be a key; it need not be one that [`ParsedKey`] knows.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        match broken_rule(text) {
            Some(reason) => Err(KeyError::new(text, reason)),
            None => Ok(Self(text.to_owned())),
        }
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the key says.
    pub fn parsed(&self) -> Result<ParsedKey, KeyError> {
        // Spelling the parts again refuses every second spelling of the same thing.
        match read_parts(&self.0) {
            Some(parsed) if parsed.key() == *self => Ok(parsed),
            _ => Err(KeyError::new(&self.0, "this version knows no such object")),
        }
    }
}

impl AsRef<str> for ObjectKey {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for ObjectKey {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for ObjectKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::parse(text)
    }
}

fn broken_rule(text: &str) -> Option<&'static str> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'/');
    if text.is_empty() {
        Some("it is empty")
    } else if text.len() > KEY_LIMIT_BYTES {
        Some("it is longer than 512 bytes")
    } else if !text.bytes().all(allowed) {
        Some("it has characters other than A-Z a-z 0-9 _ - . /")
    } else if text.split('/').any(str::is_empty) {
        Some("it has an empty component")
    } else if text.split('/').any(|component| component.starts_with('.')) {
        Some("a component starts with a dot")
    } else if text.split('/').any(|component| component.len() > COMPONENT_LIMIT_BYTES) {
        Some("a component is longer than 200 bytes")
    } else {
        None
    }
}

/// The identity of the repository. The only object of a store that is not about one cluster, besides probes.
pub fn repository_identity() -> ObjectKey {
    ObjectKey("repo.json".to_owned())
}

/// What a probe of the store writes. `name` is unique per probe and object.
pub fn probe(name: &str) -> Result<ObjectKey, KeyError> {
    ObjectKey::parse(&format!("coord/probe/{name}"))
}

/// All probe objects.
pub fn probe_prefix() -> String {
    "coord/probe/".to_owned()
}

/// Where a listing goes on behind all probe objects: greater than each of their keys, less than any other key after them.
pub fn behind_probes() -> String {
    // The character after the slash.
    "coord/probe0".to_owned()
}

/// Everything of all clusters. See [`skip`] for finding their names without listing their objects.
pub fn clusters_prefix() -> String {
    "c/".to_owned()
}

/// Everything of one cluster.
pub fn cluster_prefix(cluster: &ClusterName) -> String {
    format!("c/{cluster}/")
}

/// A place to start a listing after that leaves out everything under `prefix` and nothing behind it.
pub fn skip(prefix: &str) -> String {
    // No byte of a key is as great as a tilde.
    format!("{prefix}~")
}

/// A root commit.
pub fn root(cluster: &ClusterName, generation: Generation) -> ObjectKey {
    ObjectKey(format!("{}{generation}", root_prefix(cluster)))
}

/// All root commits of a cluster, oldest first.
pub fn root_prefix(cluster: &ClusterName) -> String {
    format!("c/{cluster}/root/")
}

/// A base backup's manifest.
pub fn manifest(cluster: &ClusterName, backup: &BackupId) -> ObjectKey {
    ObjectKey(format!("{}manifest", backup_prefix(cluster, backup)))
}

/// A pack of a base backup; `number` has at least six decimal digits in the key.
pub fn pack(cluster: &ClusterName, backup: &BackupId, number: u32) -> ObjectKey {
    ObjectKey(format!("{}p/{number:06}", backup_prefix(cluster, backup)))
}

/// A note of a base backup about packs it has stored; `number` as in a pack's key.
pub fn note(cluster: &ClusterName, backup: &BackupId, number: u32) -> ObjectKey {
    ObjectKey(format!("{}{number:06}", note_prefix(cluster, backup)))
}

/// All notes of a base backup.
pub fn note_prefix(cluster: &ClusterName, backup: &BackupId) -> String {
    format!("{}n/", backup_prefix(cluster, backup))
}

/// Everything of one base backup.
pub fn backup_prefix(cluster: &ClusterName, backup: &BackupId) -> String {
    format!("{}{backup}/", backups_prefix(cluster))
}

/// Everything of all base backups of a cluster, oldest backup first.
pub fn backups_prefix(cluster: &ClusterName) -> String {
    format!("c/{cluster}/b/")
}

/// Everything that one system identifier of a cluster archived.
pub fn system_prefix(cluster: &ClusterName, system: SystemIdentifier) -> String {
    format!("c/{cluster}/{system}/")
}

/// An archived WAL file with this content. A history file's key has no fingerprint, see [`history`].
pub fn wal(
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
    fingerprint: &Fingerprint,
) -> ObjectKey {
    match name {
        WalFileName::History(timeline) => history(cluster, system, *timeline),
        _ => ObjectKey(format!("{}{fingerprint}", wal_name_prefix(cluster, system, name))),
    }
}

/// All contents stored under one WAL file name.
///
/// The prefix of a segment also covers the `.partial` and `.backup` files of the same number, because fingerprints of
/// kinds yet unknown must be seen too: keep what [`ObjectKey::parsed`] says has the name.
pub fn wal_name_prefix(cluster: &ClusterName, system: SystemIdentifier, name: &WalFileName) -> String {
    match name.segment() {
        None => history(cluster, system, name.timeline()).0,
        Some(segment) => {
            format!("{}{name}.", wal_log_prefix(cluster, system, name.timeline(), segment.log()))
        }
    }
}

/// All WAL files of one timeline, in order.
pub fn wal_timeline_prefix(cluster: &ClusterName, system: SystemIdentifier, timeline: Timeline) -> String {
    format!("{}{}/", wal_prefix(cluster, system), timeline.to_hex())
}

/// All WAL files of a log, as PostgreSQL calls what the second eight digits of a segment's name say; without history files.
pub fn wal_log_prefix(cluster: &ClusterName, system: SystemIdentifier, timeline: Timeline, log: u32) -> String {
    format!("{}{log:08X}/", wal_timeline_prefix(cluster, system, timeline))
}

/// All WAL files of one system identifier, timeline after timeline; without history files.
pub fn wal_prefix(cluster: &ClusterName, system: SystemIdentifier) -> String {
    format!("{}wal/", system_prefix(cluster, system))
}

/// A timeline's history file.
pub fn history(cluster: &ClusterName, system: SystemIdentifier, timeline: Timeline) -> ObjectKey {
    ObjectKey(format!("{}{}", history_prefix(cluster, system), WalFileName::History(timeline)))
}

/// All history files of one system identifier, in order of their timelines.
pub fn history_prefix(cluster: &ClusterName, system: SystemIdentifier) -> String {
    format!("{}history/", system_prefix(cluster, system))
}

/// Evidence of a file that was refused because another content has its name.
pub fn conflict(
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
    fingerprint: &Fingerprint,
) -> ObjectKey {
    ObjectKey(format!("{}{name}.{fingerprint}", conflict_prefix(cluster, system)))
}

/// All such evidence.
pub fn conflict_prefix(cluster: &ClusterName, system: SystemIdentifier) -> String {
    format!("{}conflict/", system_prefix(cluster, system))
}

/// An operator's choice among the contents stored under one name; the highest number counts.
pub fn decision(cluster: &ClusterName, system: SystemIdentifier, name: &WalFileName, number: u32) -> ObjectKey {
    ObjectKey(format!("{}{number:08x}", decision_prefix(cluster, system, name)))
}

/// All choices about one name, oldest first.
pub fn decision_prefix(cluster: &ClusterName, system: SystemIdentifier, name: &WalFileName) -> String {
    format!("{}{name}/", decisions_prefix(cluster, system))
}

/// All choices about all names.
pub fn decisions_prefix(cluster: &ClusterName, system: SystemIdentifier) -> String {
    format!("{}decision/", system_prefix(cluster, system))
}

/// An operator's adoption of a node as the writer of a timeline; the highest number counts.
pub fn writer(cluster: &ClusterName, system: SystemIdentifier, timeline: Timeline, number: u32) -> ObjectKey {
    ObjectKey(format!("{}{number:08x}", writer_prefix(cluster, system, timeline)))
}

/// All adoptions for one timeline, oldest first.
pub fn writer_prefix(cluster: &ClusterName, system: SystemIdentifier, timeline: Timeline) -> String {
    format!("{}{}/", writers_prefix(cluster, system), timeline.to_hex())
}

/// All adoptions for all timelines, by timeline.
pub fn writers_prefix(cluster: &ClusterName, system: SystemIdentifier) -> String {
    format!("{}writer/", system_prefix(cluster, system))
}

/// What a key names. The inverse of the functions above.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ParsedKey {
    /// [`repository_identity`]
    RepositoryIdentity,
    /// [`probe`]
    Probe { name: String },
    /// [`root`]
    Root { cluster: ClusterName, generation: Generation },
    /// [`manifest`]
    Manifest { cluster: ClusterName, backup: BackupId },
    /// [`pack`]
    Pack { cluster: ClusterName, backup: BackupId, number: u32 },
    /// [`note`]
    Note { cluster: ClusterName, backup: BackupId, number: u32 },
    /// [`wal`]; never a history file
    Wal { cluster: ClusterName, system_identifier: SystemIdentifier, name: WalFileName, fingerprint: Fingerprint },
    /// [`history`]
    History { cluster: ClusterName, system_identifier: SystemIdentifier, timeline: Timeline },
    /// [`conflict`]
    Conflict { cluster: ClusterName, system_identifier: SystemIdentifier, name: WalFileName, fingerprint: Fingerprint },
    /// [`decision`]
    Decision { cluster: ClusterName, system_identifier: SystemIdentifier, name: WalFileName, number: u32 },
    /// [`writer`]
    Writer { cluster: ClusterName, system_identifier: SystemIdentifier, timeline: Timeline, number: u32 },
}

impl ParsedKey {
    /// The key that names this.
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::RepositoryIdentity => repository_identity(),
            Self::Probe { name } => ObjectKey(format!("{}{name}", probe_prefix())),
            Self::Root { cluster, generation } => root(cluster, *generation),
            Self::Manifest { cluster, backup } => manifest(cluster, backup),
            Self::Pack { cluster, backup, number } => pack(cluster, backup, *number),
            Self::Note { cluster, backup, number } => note(cluster, backup, *number),
            Self::Wal { cluster, system_identifier, name, fingerprint } => {
                wal(cluster, *system_identifier, name, fingerprint)
            }
            Self::History { cluster, system_identifier, timeline } => history(cluster, *system_identifier, *timeline),
            Self::Conflict { cluster, system_identifier, name, fingerprint } => {
                conflict(cluster, *system_identifier, name, fingerprint)
            }
            Self::Decision { cluster, system_identifier, name, number } => {
                decision(cluster, *system_identifier, name, *number)
            }
            Self::Writer { cluster, system_identifier, timeline, number } => {
                writer(cluster, *system_identifier, *timeline, *number)
            }
        }
    }
}

/// Reads the parts leniently; the caller spells them again and compares.
fn read_parts(text: &str) -> Option<ParsedKey> {
    let parts: Vec<&str> = text.split('/').collect();
    match parts.as_slice() {
        ["repo.json"] => Some(ParsedKey::RepositoryIdentity),
        ["coord", "probe", name] => Some(ParsedKey::Probe { name: (*name).to_owned() }),
        ["c", cluster, "root", generation] => {
            Some(ParsedKey::Root { cluster: cluster.parse().ok()?, generation: generation.parse().ok()? })
        }
        ["c", cluster, "b", backup, rest @ ..] => read_backup_part(cluster.parse().ok()?, backup.parse().ok()?, rest),
        ["c", cluster, system, rest @ ..] => read_system_part(cluster.parse().ok()?, system.parse().ok()?, rest),
        _ => None,
    }
}

fn read_backup_part(cluster: ClusterName, backup: BackupId, rest: &[&str]) -> Option<ParsedKey> {
    match rest {
        ["manifest"] => Some(ParsedKey::Manifest { cluster, backup }),
        ["p", number] => Some(ParsedKey::Pack { cluster, backup, number: number.parse().ok()? }),
        ["n", number] => Some(ParsedKey::Note { cluster, backup, number: number.parse().ok()? }),
        _ => None,
    }
}

fn read_system_part(cluster: ClusterName, system_identifier: SystemIdentifier, rest: &[&str]) -> Option<ParsedKey> {
    match rest {
        ["wal", _timeline, _log, file] => {
            let (name, fingerprint) = read_file_part(file)?;
            Some(ParsedKey::Wal { cluster, system_identifier, name, fingerprint })
        }
        ["history", file] => match file.parse().ok()? {
            WalFileName::History(timeline) => Some(ParsedKey::History { cluster, system_identifier, timeline }),
            _ => None,
        },
        ["conflict", file] => {
            let (name, fingerprint) = read_file_part(file)?;
            Some(ParsedKey::Conflict { cluster, system_identifier, name, fingerprint })
        }
        ["decision", name, number] => {
            let (name, number) = (name.parse().ok()?, read_number(number)?);
            Some(ParsedKey::Decision { cluster, system_identifier, name, number })
        }
        ["writer", timeline, number] => {
            // A timeline in hex is spelled by its history file's name.
            let timeline = format!("{timeline}.history").parse::<WalFileName>().ok()?.timeline();
            Some(ParsedKey::Writer { cluster, system_identifier, timeline, number: read_number(number)? })
        }
        _ => None,
    }
}

fn read_file_part(file: &str) -> Option<(WalFileName, Fingerprint)> {
    let (name, fingerprint) = file.rsplit_once('.')?;
    Some((name.parse().ok()?, fingerprint.parse().ok()?))
}

fn read_number(text: &str) -> Option<u32> {
    lower_hex::<8>(text).map(|number| number as u32)
}

#[cfg(test)]
mod tests;
