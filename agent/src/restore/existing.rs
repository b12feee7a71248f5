//! A restore onto what is there already: whether that may be touched, and the removal of what the backup does not have.
//!
//! Invariants:
//! * a directory is touched only if it belongs to the same system identifier, by its `pg_control` or by the mark that an
//!   unfinished restore left, and if no server runs on it;
//! * `pg_control` goes first, durably, so that what an aborted restore leaves cannot be started; the mark stays until
//!   everything else is durable, so that it can be gone on with;
//! * links are removed or kept, never followed, but for `pg_wal` and the tablespaces of the backup. Below a tablespace's
//!   place nothing is touched but the directories that the backup has there.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use postgres_format::SystemIdentifier;
use postgres_format::control_file::ControlFile;
use repository::name::BackupId;
use serde::{Deserialize, Serialize};

use super::RestoreError;
use super::finish::Work;
use super::layout::Contents;
use super::target::{self, NOT_OCCUPYING, TablespaceTarget, TargetError};
use crate::durable;

/// File in the data directory while a restore goes on.
const MARK: &str = "pgconvoy.restore";
const CONTROL: &str = "global/pg_control";
const LINKS: &str = "pg_tblspc";
const WAL: &str = "pg_wal";

/// What a restore that goes on says about itself.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    system_identifier: SystemIdentifier,
    backup: BackupId,
}

/// Refuses a place that is neither free nor an idle data directory of this system.
pub(super) fn check(data_directory: &Path, system_identifier: SystemIdentifier) -> Result<(), TargetError> {
    let path = || data_directory.to_owned();
    match target::check_free(data_directory) {
        Err(TargetError::Occupied { .. }) => {}
        checked => return checked,
    }
    let found = match system_of(data_directory) {
        Ok(Some(found)) => found,
        Ok(None) => return Err(TargetError::NobodyKnows { path: path() }),
        Err(source) => return Err(TargetError::Io { action: "read the system identifier of", path: path(), source }),
    };
    match found == system_identifier {
        true => Ok(()),
        false => Err(TargetError::Foreign { path: path(), found, expected: system_identifier }),
    }
}

fn system_of(data_directory: &Path) -> io::Result<Option<SystemIdentifier>> {
    if let Some(bytes) = read(&data_directory.join(MARK))? {
        let mark: Mark = serde_json::from_slice(&bytes)?;
        return Ok(Some(mark.system_identifier));
    }
    let Some(bytes) = read(&data_directory.join(CONTROL))? else { return Ok(None) };
    ControlFile::parse(&bytes).map(|control| Some(control.system_identifier)).map_err(io::Error::other)
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Refuses a tablespace's place that holds something and is not the one that the directory's own link leads to.
pub(super) fn check_tablespace(data_directory: &Path, tablespace: &TablespaceTarget) -> Result<(), TargetError> {
    let link = data_directory.join(LINKS).join(tablespace.oid.to_string());
    match fs::read_link(link) {
        Ok(place) if place == tablespace.location => Ok(()),
        _ => target::check_free(&tablespace.location),
    }
}

/// Says that a restore goes on here.
pub(super) fn mark(data_directory: &Path, contents: &Contents) -> Result<(), RestoreError> {
    let path = data_directory.join(MARK);
    let mark = Mark { system_identifier: contents.head.system_identifier, backup: contents.head.backup };
    let text = serde_json::to_vec(&mark).expect("two plain values");
    durable::replace(&path, &text, 0o600).map_err(|source| RestoreError::Write { path, source })
}

/// Removes the mark.
pub(super) fn unmark(data_directory: &Path) -> Result<(), RestoreError> {
    remove_file(&data_directory.join(MARK))?;
    sync(data_directory)
}

fn sync(directory: &Path) -> Result<(), RestoreError> {
    durable::sync_directory(directory).map_err(|source| RestoreError::Write { path: directory.to_owned(), source })
}

fn remove_file(path: &Path) -> Result<(), RestoreError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RestoreError::Write { path: path.to_owned(), source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// What shall be where.
struct Expected<'a> {
    directories: HashSet<PathBuf>,
    files: HashSet<&'a Path>,
    links: HashMap<PathBuf, PathBuf>,
}

impl<'a> Expected<'a> {
    fn new(work: &Work, contents: &'a Contents) -> Self {
        let directories = contents.directories.iter().map(|directory| directory.path.as_path().to_owned());
        let required = [LINKS, WAL, "pg_wal/archive_status", "global"].map(PathBuf::from);
        let links = contents.links.iter().map(|link| {
            let to = std::os::unix::ffi::OsStrExt::from_bytes(link.target.as_bytes());
            (link.path.as_path().to_owned(), PathBuf::from(<std::ffi::OsStr>::to_os_string(to)))
        });
        let tablespaces = work.tablespaces.iter();
        let spaces = tablespaces
            .map(|tablespace| (Path::new(LINKS).join(tablespace.oid.to_string()), tablespace.location.clone()));
        Self {
            directories: directories.chain(required).collect(),
            files: contents.files.iter().map(|file| file.path.as_path()).collect(),
            links: links.chain(spaces).collect(),
        }
    }

    /// Directories of the backup right below a tablespace.
    fn below(&self, tablespace: &Path) -> Vec<PathBuf> {
        self.directories.iter().filter(|path| path.parent() == Some(tablespace)).cloned().collect()
    }

    /// Whether an entry may stay, and which directories are then to be looked into.
    fn keeps(&self, path: &Path, absolute: &Path, found: &fs::Metadata) -> Option<Vec<PathBuf>> {
        if let Some(to) = self.links.get(path) {
            let right = found.is_symlink() && fs::read_link(absolute).is_ok_and(|leads| leads == *to);
            return right.then(|| self.below(path));
        }
        if self.directories.contains(path) {
            let linked = found.is_symlink() && path == Path::new(WAL) && absolute.is_dir();
            return (found.is_dir() || linked).then(|| vec![path.to_owned()]);
        }
        let top = path.parent() == Some(Path::new(""));
        if top && (path == Path::new(MARK) || NOT_OCCUPYING.iter().any(|name| path == Path::new(name))) {
            return Some(Vec::new());
        }
        // One with another name elsewhere would be changed there too.
        let alone = found.is_file() && found.nlink() == 1;
        (alone && self.files.contains(path)).then(Vec::new)
    }
}

/// Makes a place that [`check`] allowed ready: without `pg_control`, marked, and with nothing that the backup does not have.
/// Gives the number of entries that were removed.
pub(super) fn clear(work: &Work, contents: &Contents) -> Result<u64, RestoreError> {
    let root = &work.options.target;
    mark(root, contents)?;
    if root.join("global").is_dir() {
        remove_file(&root.join(CONTROL))?;
        sync(&root.join("global"))?;
    }
    let expected = Expected::new(work, contents);
    let (mut removed, mut pending) = (0, vec![PathBuf::new()]);
    while let Some(directory) = pending.pop() {
        let above = root.join(&directory);
        let refused = |source| RestoreError::Write { path: above.clone(), source };
        let entries = match fs::read_dir(&above) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.map_err(refused)?,
        };
        for entry in entries {
            let entry = entry.map_err(refused)?;
            let (path, absolute) = (directory.join(entry.file_name()), entry.path());
            let found = fs::symlink_metadata(&absolute).map_err(refused)?;
            match expected.keeps(&path, &absolute, &found) {
                Some(deeper) => pending.extend(deeper),
                None => {
                    let gone = if found.is_dir() { fs::remove_dir_all(&absolute) } else { fs::remove_file(&absolute) };
                    gone.map_err(|source| RestoreError::Write { path: absolute.clone(), source })?;
                    removed += 1;
                }
            }
        }
    }
    Ok(removed)
}
