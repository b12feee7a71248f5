//! A restore onto what is there already: whether that may be touched, and the removal of what the backup does not have.
//!
//! Invariants:
//! * a directory is touched only if it belongs to the same system identifier, by its `pg_control` or by the mark that an
//!   unfinished restore left, if no server runs on it, and if no WAL in it is flagged for the archive;
//! * `pg_control` goes first, durably, so that what an aborted restore leaves cannot be started; the mark is there before
//!   anything is touched, and until everything is durable, so that it can be gone on with;
//! * links are removed or kept, never followed, but for `pg_wal` and the tablespaces of the backup. Below a tablespace's
//!   place nothing is touched but the directories that the backup has there.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use postgres_format::SystemIdentifier;
use postgres_format::control_file::ControlFile;
use repository::backup::manifest::Head;
use repository::name::BackupId;
use serde::{Deserialize, Serialize};

use super::RestoreError;
use super::finish::Work;
use super::links::WAL;
use super::paths::PathSet;
use super::target::{self, MARK, NOT_OCCUPYING, TablespaceTarget, TargetError};
use crate::durable;

const CONTROL: &str = "global/pg_control";
const LINKS: &str = "pg_tblspc";
const FLAGS: &str = "pg_wal/archive_status";

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
        Err(TargetError::Occupied { .. } | TargetError::Unfinished { .. }) => {}
        checked => return checked,
    }
    let found = match system_of(data_directory) {
        Ok(Some(found)) => found,
        Ok(None) => return Err(TargetError::NobodyKnows { path: path() }),
        Err(source) => return Err(TargetError::Io { action: "read the system identifier of", path: path(), source }),
    };
    match found == system_identifier {
        true => check_archived(data_directory),
        false => Err(TargetError::Foreign { path: path(), found, expected: system_identifier }),
    }
}

/// Refuses a directory with WAL that its server flagged for the archive and found no taker for: it would be removed here,
/// and may be nowhere else.
fn check_archived(data_directory: &Path) -> Result<(), TargetError> {
    let status = data_directory.join(FLAGS);
    let failed = |source| TargetError::Io { action: "read", path: status.clone(), source };
    let entries = match fs::read_dir(&status) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
        entries => entries.map_err(failed)?,
    };
    let (mut first, mut count): (Option<String>, usize) = (None, 0);
    for entry in entries {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        if let Some(name) = name.strip_suffix(".ready") {
            count += 1;
            first = Some(first.map_or_else(|| name.to_owned(), |first| first.min(name.to_owned())));
        }
    }
    match first {
        None => Ok(()),
        Some(first) => Err(TargetError::Unarchived { path: data_directory.to_owned(), first, count }),
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

/// Refuses a tablespace's place that holds something and is not the one that the directory's own link leads to, and one
/// beside it: what lies there now would neither be used nor removed.
pub(super) fn check_tablespace(data_directory: &Path, tablespace: &TablespaceTarget) -> Result<(), TargetError> {
    let link = data_directory.join(LINKS).join(tablespace.oid.to_string());
    match fs::read_link(&link) {
        Ok(old) if old == tablespace.location => Ok(()),
        Ok(old) if old.exists() => {
            let (what, new) = (format!("tablespace {}", tablespace.oid), tablespace.location.clone());
            Err(TargetError::LeftBehind { what, link, old, new })
        }
        _ => target::check_free(&tablespace.location),
    }
}

/// Says that a restore goes on here.
pub(super) fn mark(data_directory: &Path, head: &Head) -> Result<(), RestoreError> {
    let path = data_directory.join(MARK);
    let mark = Mark { system_identifier: head.system_identifier, backup: head.backup };
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
    files: &'a PathSet,
    links: HashMap<PathBuf, PathBuf>,
}

impl<'a> Expected<'a> {
    fn new(work: &Work, files: &'a PathSet) -> Self {
        let directories = work.outline.directories.iter().map(|directory| directory.path.as_path().to_owned());
        let required = [LINKS, WAL, FLAGS, "global"].map(PathBuf::from);
        let links = work.links.made.iter().map(|link| (link.path.clone(), link.target.clone()));
        let tablespaces = work.tablespaces.iter();
        let spaces = tablespaces
            .map(|tablespace| (Path::new(LINKS).join(tablespace.oid.to_string()), tablespace.location.clone()));
        Self { directories: directories.chain(required).collect(), files, links: links.chain(spaces).collect() }
    }

    /// Directories of the backup right below a tablespace; of `pg_wal` itself.
    fn behind(&self, link: &Path) -> Vec<PathBuf> {
        if link == Path::new(WAL) {
            return vec![link.to_owned()];
        }
        self.directories.iter().filter(|path| path.parent() == Some(link)).cloned().collect()
    }

    /// Whether an entry may stay, and which directories are then to be looked into.
    fn keeps(&self, path: &Path, absolute: &Path, found: &fs::Metadata) -> io::Result<Option<Vec<PathBuf>>> {
        if let Some(to) = self.links.get(path) {
            let right = found.is_symlink() && fs::read_link(absolute).is_ok_and(|leads| leads == *to);
            return Ok(right.then(|| self.behind(path)));
        }
        if self.directories.contains(path) {
            let linked = found.is_symlink() && path == Path::new(WAL) && absolute.is_dir();
            return Ok((found.is_dir() || linked).then(|| vec![path.to_owned()]));
        }
        let top = path.parent() == Some(Path::new(""));
        if top && (path == Path::new(MARK) || NOT_OCCUPYING.iter().any(|name| path == Path::new(name))) {
            return Ok(Some(Vec::new()));
        }
        // One with another name elsewhere would be changed there too.
        let alone = found.is_file() && found.nlink() == 1;
        Ok((alone && self.files.contains(path)?).then(Vec::new))
    }
}

/// Makes a place that [`check`] allowed and that bears the mark ready: without `pg_control`, and with nothing that the backup
/// does not have. Gives the number of entries that were removed.
pub(super) fn clear(work: &Work, files: &PathSet) -> Result<u64, RestoreError> {
    let root = &work.options.target;
    if root.join("global").is_dir() {
        remove_file(&root.join(CONTROL))?;
        sync(&root.join("global"))?;
    }
    process::crash_point!("restore/after-mark-before-clear");
    let expected = Expected::new(work, files);
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
            match expected.keeps(&path, &absolute, &found).map_err(RestoreError::Scratch)? {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wal_that_waits_for_the_archive_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let checked = || check_archived(folder.path());
        checked().unwrap();
        let flags = folder.path().join(FLAGS);
        fs::create_dir_all(&flags).unwrap();
        let flag = |name: &str| fs::write(flags.join(name), b"").unwrap();
        flag("000000010000000000000009.done");
        checked().unwrap();
        for name in ["00000002.history.ready", "00000001000000000000000B.ready", "00000001000000000000000A.ready"] {
            flag(name);
        }
        let refused = checked().unwrap_err();
        assert!(
            matches!(&refused, TargetError::Unarchived { first, count: 3, .. } if first == "00000001000000000000000A"),
            "{refused}"
        );
    }
}
