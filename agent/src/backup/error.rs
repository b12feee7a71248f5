//! Why there is no backup.

use std::io;
use std::path::{Path, PathBuf};

use postgres_format::backup_label::BackupLabelError;
use postgres_format::control_file::ControlError;
use postgres_format::{Lsn, SystemIdentifier};
use repository::backup::manifest::ManifestDamage;
use thiserror::Error;

use super::road::RoadError;
use crate::postgres::ServerError;

/// Why there is no backup.
#[derive(Debug, Error)]
pub enum BackupError {
    /// A backup of this node runs already.
    #[error("a backup of this node is running already")]
    Running,
    /// It was told to stop.
    #[error("the backup was cancelled")]
    Cancelled,
    /// The server refused or was lost.
    #[error("the server did not play its part in the backup")]
    Server(#[from] ServerError),
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file without which no server starts is gone.
    #[error("{path} vanished, a server cannot start without it")]
    Vanished {
        /// The file.
        path: PathBuf,
    },
    /// Directories are nested too deeply.
    #[error("{path} is nested too deeply: is there a loop of mounts?")]
    TooDeep {
        /// The directory.
        path: PathBuf,
    },
    /// Data lies behind a link that is no tablespace's.
    #[error(
        "{path} is a link to {target}, and data behind such a link is in no backup: move it back into the data directory, \
         or into a tablespace"
    )]
    LinkedData {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A tablespace has a link and no directory.
    #[error("tablespace {oid} lacks its directory {directory}: is its file system mounted?")]
    TablespaceAway {
        /// Its object identifier.
        oid: u32,
        /// The directory of this server version.
        directory: PathBuf,
    },
    /// A link leads to another link.
    #[error("link {path} leads to another link: let it lead to its end")]
    LinkToLink {
        /// The link.
        path: PathBuf,
    },
    /// `pg_control` makes no sense, or is of a version we do not know.
    #[error("pg_control cannot be interpreted, so no backup is taken")]
    Control(#[from] ControlError),
    /// `pg_control` and the server disagree.
    #[error("the data directory belongs to system {found}, the server says {expected}")]
    Foreign {
        /// From `pg_control`.
        found: SystemIdentifier,
        /// From the server.
        expected: SystemIdentifier,
    },
    /// WAL would never be archived.
    #[error(
        "archive_mode is off on this primary, so the WAL of a backup would never reach the repository: set it to on"
    )]
    ArchivingOff,
    /// A standby's copy would not be consistent.
    #[error("full_page_writes is off on the primary, so a standby's files cannot be backed up: set it to on")]
    NoFullPageWrites,
    /// The role or the timeline of the node changed.
    #[error("the node was promoted or changed its timeline during the backup")]
    Promoted,
    /// The node is not what the shape of the backup takes.
    #[error("this node is {found}, and its part in the backup is that of {wanted}")]
    Role {
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// A standby did not come to where its primary has started the backup.
    #[error("this standby did not come to the start of the backup at {start}: {reason}")]
    Behind {
        /// Where the backup begins.
        start: Lsn,
        /// Why not.
        reason: String,
    },
    /// The primary that holds the backup could not be asked.
    #[error("primary {primary}, which holds the backup, cannot be asked about it")]
    PrimaryAway {
        /// Its name.
        primary: String,
        /// The coordinator's answer.
        #[source]
        source: Box<tonic::Status>,
    },
    /// The primary does not hold the backup any more.
    #[error("primary {primary} has given the backup up: {reason}")]
    PrimaryGaveUp {
        /// Its name.
        primary: String,
        /// Why.
        reason: String,
    },
    /// Nobody asked about a backup that is held for a standby.
    #[error("the standby was silent for {seconds} s")]
    Unasked {
        /// For how long.
        seconds: u64,
    },
    /// What would be said of the primary's part is too long.
    #[error(
        "the files that must come from the primary are too many: their description has {bytes} bytes, of which {max} are          possible; take the backup of the primary or of the standby alone"
    )]
    PartTooLarge {
        /// Its size.
        bytes: u64,
        /// The most.
        max: usize,
    },
    /// The label that the server made makes no sense.
    #[error("the server's backup_label cannot be read")]
    Label(#[from] BackupLabelError),
    /// A pack could not be built.
    #[error("a pack could not be built")]
    Pack(#[source] repository::backup::pack::PackError),
    /// No store says which backups there are to build on.
    #[error("no store tells which backups it has, so it is not known what this one could build on: {reasons}")]
    Roots {
        /// Why, a part a store.
        reasons: String,
    },
    /// The parent's manifest could be read at first, and then not.
    #[error("the manifest of the backup to build on cannot be read")]
    Parent(#[source] ManifestDamage),
    /// The manifest could not be built.
    #[error("the manifest could not be built")]
    Manifest(#[source] io::Error),
    /// What must be remembered of files could not be written down, or not read again.
    #[error("the backup's own notes in the scratch directory failed")]
    Scratch(#[source] io::Error),
    /// An object did not get through.
    #[error("the backup could not be sent")]
    Road(#[from] RoadError),
    /// The repository failed while publishing on the direct road.
    #[error("the backup could not be published: {what}")]
    Publish {
        /// At which step.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// WAL did not arrive in time.
    #[error(
        "{missing} WAL files between {start} and {stop} are not in store {store} after {seconds} s, the first is {first}"
    )]
    WalMissing {
        /// The store.
        store: String,
        /// How many are missing.
        missing: usize,
        /// The first of them.
        first: String,
        /// Start of the backup.
        start: Lsn,
        /// Stop of the backup.
        stop: Lsn,
        /// How long we waited.
        seconds: u64,
    },
    /// This server's own WAL could not be read, so that nothing could prove which WAL belongs to its files.
    #[error("WAL up to {lsn} could not be read from the server's own pg_wal: {reason}")]
    Witness {
        /// Up to where.
        lsn: Lsn,
        /// Why not.
        reason: String,
    },
    /// The WAL of the backup is another server's.
    #[error(
        "WAL {name} in store {store} is another server's than this one's, so that the backup could not be recovered: do a \
         clone and its original write one timeline?"
    )]
    ForeignWal {
        /// The store.
        store: String,
        /// The file.
        name: String,
    },
    /// A reader ended in a way that is a mistake of ours.
    #[error("a reader of the backup ended unexpectedly")]
    Reader,
}

impl BackupError {
    /// With the directory named, if it is the scratch directory that failed.
    pub(super) fn in_scratch(self, directory: &Path) -> Self {
        match self {
            Self::Scratch(source) => {
                let text = format!("{}: {source}", directory.display());
                Self::Scratch(io::Error::new(source.kind(), text))
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn a_full_scratch_directory_is_named() {
        let full = BackupError::Scratch(io::ErrorKind::StorageFull.into());
        let told = full.in_scratch(Path::new("/var/lib/spool")).source().unwrap().to_string();
        assert_eq!(told, "/var/lib/spool: no storage space");
    }
}
