//! Walks a live data directory and writes down what lies there, by the rules of
//! [`postgres_format::data_directory`]. Files may vanish while it walks; a directory that vanished is left out. Files are
//! written down on disk, and come in the order of [`super::plan::compare`].
//!
//! Tablespaces are followed through `pg_tblspc/<oid>` into the one directory that belongs to this server version
//! (`PG_<major>_<catalog version>`); no other link is followed. Paths are relative to the data directory.
//!
//! A backup that leaves something out that a server needs is none. So a link where PostgreSQL makes none, and a tablespace
//! without its directory (a file system that is away), end it.

use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use postgres_format::data_directory::{self, Entry, FileKind};
use process::clock::Monotonic;
use serde::{Deserialize, Serialize};

use super::BackupError;
use super::capture::FOLDER;
use super::plan::InOrder;
use super::rows::{Runs, Sorted};

/// Deepest nesting of directories that is followed.
const DEPTH_MAX: usize = 64;
/// Directories in which PostgreSQL makes no links but those of tablespaces; a link at or below one hides data from a backup.
const WITHOUT_LINKS: [&str; 10] = [
    "base",
    "global",
    "pg_commit_ts",
    "pg_logical",
    "pg_multixact",
    "pg_stat",
    "pg_tblspc",
    "pg_twophase",
    "pg_xact",
    "PG_VERSION",
];
/// How long a tablespace that is being dropped may have a link and no directory any more.
const DROPPING: Duration = Duration::from_secs(2);
/// How often it is looked at meanwhile.
const DROPPING_POLL: Duration = Duration::from_millis(100);
/// Links that lead on to links are refused beyond this many steps; the kernel's own limit is 40.
const LINK_STEPS_MAX: usize = 2;

/// A regular file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "FileRow", into = "FileRow")]
pub struct ListedFile {
    /// Relative path.
    pub path: PathBuf,
    /// What PostgreSQL uses it for.
    pub kind: FileKind,
    /// Size when listed.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, Unix seconds.
    pub modified_unix: i64,
}

/// A file as it is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct FileRow(PathRow, u64, u32, i64);

/// A path as it is written down.
type PathRow = repository::byte_text::ByteText;

impl From<ListedFile> for FileRow {
    fn from(file: ListedFile) -> Self {
        Self(PathRow::new(file.path.as_os_str().as_bytes()), file.size, file.mode, file.modified_unix)
    }
}

impl TryFrom<FileRow> for ListedFile {
    type Error = String;

    fn try_from(FileRow(path, size, mode, modified_unix): FileRow) -> Result<Self, String> {
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(path.as_bytes()));
        match data_directory::classify(&path, false) {
            Entry::Copy(kind) => Ok(Self { path, kind, size, mode, modified_unix }),
            other => Err(format!("{} is no file that is copied, but {other:?}", path.display())),
        }
    }
}

/// A directory that must exist after a restore.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListedDirectory {
    /// Relative path; empty for the data directory itself.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
}

/// A symbolic link that is no tablespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedLink {
    /// Relative path.
    pub path: PathBuf,
    /// What it points to, as written.
    pub target: PathBuf,
    /// Whether it leads to a regular file, whose content is then captured as configuration.
    pub leads_to: LinkEnd,
}

/// Where a link leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEnd {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// Nothing that exists.
    Nothing,
}

/// A tablespace found by its link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedTablespace {
    /// Object identifier: the link's name.
    pub oid: u32,
    /// Where the link points.
    pub location: PathBuf,
    /// The directory within it that belongs to this server version.
    pub directory: PathBuf,
    /// Permission bits of that directory.
    pub mode: u32,
}

/// Regular files in the order in which they are copied.
pub type ListedFiles = Sorted<InOrder, ListedFile>;

/// Everything found in one data directory.
#[derive(Debug)]
pub struct Listing {
    /// Regular files.
    pub files: ListedFiles,
    /// What else there is.
    pub others: Others,
}

/// What is no regular file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// Directories.
    pub directories: Vec<ListedDirectory>,
    /// Links.
    pub links: Vec<ListedLink>,
    /// Tablespaces.
    pub tablespaces: Vec<ListedTablespace>,
    /// Entries that are neither file, directory nor link.
    pub special: Vec<PathBuf>,
}

/// Whether what lies at a relative path is listed; what lies in a directory that is not is not looked at.
pub type Keep<'a> = &'a dyn Fn(&Path) -> bool;

/// What was found so far.
struct Found<'a> {
    keep: Keep<'a>,
    files: Runs<InOrder, ListedFile>,
    others: Others,
}

impl Found<'_> {
    fn file(&mut self, file: ListedFile) -> Result<(), BackupError> {
        let path_bytes = file.path.as_os_str().len();
        self.files.push(InOrder(file.path.clone()), file, 2 * path_bytes).map_err(BackupError::Scratch)
    }
}

/// Lists what is to be kept of `data_directory`; `version_directory` is such as `PG_15_202209061`, and `scratch` where files
/// are written down.
pub fn list(
    data_directory: &Path,
    version_directory: &str,
    keep: Keep<'_>,
    scratch: &Path,
) -> Result<Listing, BackupError> {
    let files = Runs::create_in(scratch).map_err(BackupError::Scratch)?;
    let mut listing = Found { keep, files, others: Others::default() };
    let inside = tablespaces_inside(data_directory)?;
    let mut pending = vec![(PathBuf::new(), data_directory.to_owned())];
    while let Some((relative, absolute)) = pending.pop() {
        if relative.components().count() > DEPTH_MAX {
            return Err(BackupError::TooDeep { path: relative });
        }
        let Some(entries) = found(fs::read_dir(&absolute), &absolute)? else { continue };
        for entry in entries {
            let Some(entry) = found(entry, &absolute)? else { continue };
            let path = relative.join(entry.file_name());
            if !keep(&path) {
                continue;
            }
            let Some(metadata) = found(fs::symlink_metadata(entry.path()), &entry.path())? else { continue };
            if relative == Path::new("pg_tblspc") && metadata.is_symlink() {
                list_tablespace(&entry.path(), &path, version_directory, &mut listing, &mut pending)?;
            } else {
                list_entry(&entry.path(), path, &metadata, &inside, &mut listing, &mut pending)?;
            }
        }
    }
    let Some(root) = found(fs::metadata(data_directory), data_directory)? else {
        return Err(BackupError::Vanished { path: data_directory.to_owned() });
    };
    let Found { files, mut others, .. } = listing;
    others.directories.push(ListedDirectory { path: PathBuf::new(), mode: permissions(&root) });
    Ok(Listing { files: files.finish().map_err(BackupError::Scratch)?, others })
}

fn list_entry(
    absolute: &Path,
    path: PathBuf,
    metadata: &Metadata,
    inside: &HashSet<(u64, u64)>,
    listing: &mut Found<'_>,
    pending: &mut Vec<(PathBuf, PathBuf)>,
) -> Result<(), BackupError> {
    // A kept directory may be a link to one (pg_wal, pg_stat_tmp): what counts is that a directory stands there.
    let directory = metadata.is_dir() || (metadata.is_symlink() && absolute.is_dir());
    let entry = data_directory::classify(&path, directory);
    let mode = permissions(metadata);
    let others = &mut listing.others;
    match entry {
        _ if path == Path::new(FOLDER) => {}
        Entry::Skip(_) => {}
        Entry::DirectoryWithoutContents => {
            let mode = if metadata.is_symlink() { 0o700 } else { mode };
            others.directories.push(ListedDirectory { path, mode });
        }
        _ if metadata.is_symlink() && is_data(&path) => {
            let target = fs::read_link(absolute).unwrap_or_default();
            return Err(BackupError::LinkedData { path, target });
        }
        _ if metadata.is_symlink() => others.links.push(link(absolute, path)?),
        _ if metadata.is_dir() => {
            if !inside.contains(&(metadata.dev(), metadata.ino())) {
                pending.push((path.clone(), absolute.to_owned()));
            }
            others.directories.push(ListedDirectory { path, mode });
        }
        Entry::Copy(kind) if metadata.is_file() => {
            listing.file(ListedFile { path, kind, size: metadata.len(), mode, modified_unix: metadata.mtime() })?;
        }
        Entry::Copy(_) | Entry::KeepDirectory => others.special.push(path),
    }
    Ok(())
}

fn list_tablespace(
    absolute: &Path,
    path: &Path,
    version_directory: &str,
    listing: &mut Found<'_>,
    pending: &mut Vec<(PathBuf, PathBuf)>,
) -> Result<(), BackupError> {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
    let (Some(oid), Some(location)) = (name, found(fs::read_link(absolute), absolute)?) else { return Ok(()) };
    // The server makes absolute links; one made by hand may be relative, and then counts from where it lies.
    let location = if location.is_relative() { fs::canonicalize(absolute).unwrap_or(location) } else { location };
    let directory = location.join(version_directory);
    let Some(metadata) = present(absolute, oid, &directory)? else { return Ok(()) };
    let path = path.join(version_directory);
    if !(listing.keep)(&path) {
        return Ok(());
    }
    listing.others.directories.push(ListedDirectory { path: path.clone(), mode: permissions(&metadata) });
    pending.push((path, directory.clone()));
    let mode = fs::metadata(&location).map(|metadata| permissions(&metadata));
    let mode = mode.map_err(|source| BackupError::Read { path: location.clone(), source })?;
    listing.others.tablespaces.push(ListedTablespace { oid, location, directory, mode });
    Ok(())
}

/// A tablespace's directory. CREATE TABLESPACE makes it before the link and DROP TABLESPACE removes it right before that, so
/// that a link without it is a file system that is away; `None` when the link is gone, too.
#[expect(clippy::disallowed_methods, reason = "nothing tells when a DROP TABLESPACE is through; bounded by DROPPING")]
fn present(link: &Path, oid: u32, directory: &Path) -> Result<Option<Metadata>, BackupError> {
    let began = Monotonic::now();
    loop {
        if let Some(metadata) = found(fs::metadata(directory), directory)?.filter(Metadata::is_dir) {
            return Ok(Some(metadata));
        }
        if found(fs::symlink_metadata(link), link)?.is_none() {
            return Ok(None);
        }
        if began.elapsed() >= DROPPING {
            return Err(BackupError::TablespaceAway { oid, directory: directory.to_owned() });
        }
        std::thread::sleep(DROPPING_POLL);
    }
}

/// Says after the copy that no tablespace went away meanwhile: the files of one that did are not told from dropped ones.
pub fn confirm(data_directory: &Path, tablespaces: &[ListedTablespace]) -> Result<(), BackupError> {
    for ListedTablespace { oid, directory, .. } in tablespaces {
        present(&data_directory.join("pg_tblspc").join(oid.to_string()), *oid, directory)?;
    }
    Ok(())
}

/// Whether a server could not start, or would lack data, without what lies at this path.
fn is_data(path: &Path) -> bool {
    path.iter().next().and_then(|first| first.to_str()).is_some_and(|first| WITHOUT_LINKS.contains(&first))
}

fn link(absolute: &Path, path: PathBuf) -> Result<ListedLink, BackupError> {
    let unreadable = |source| BackupError::Read { path: absolute.to_owned(), source };
    let target = fs::read_link(absolute).map_err(unreadable)?;
    let leads_to = match fs::metadata(absolute) {
        Ok(end) if end.is_file() => LinkEnd::File,
        Ok(end) if end.is_dir() => LinkEnd::Directory,
        Ok(_) => LinkEnd::Nothing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => LinkEnd::Nothing,
        Err(error) => return Err(unreadable(error)),
    };
    let first = absolute.parent().unwrap_or(Path::new("/")).join(&target);
    if steps(&first) >= LINK_STEPS_MAX {
        return Err(BackupError::LinkToLink { path });
    }
    Ok(ListedLink { path, target, leads_to })
}

/// How many links follow one another, counting the one that led here.
fn steps(first: &Path) -> usize {
    1 + usize::from(fs::symlink_metadata(first).is_ok_and(|metadata| metadata.is_symlink()))
}

/// Device and inode of tablespaces that lie inside the data directory, which must not be copied twice.
fn tablespaces_inside(data_directory: &Path) -> Result<HashSet<(u64, u64)>, BackupError> {
    let folder = data_directory.join("pg_tblspc");
    let Some(entries) = found(fs::read_dir(&folder), &folder)? else { return Ok(HashSet::new()) };
    let mut inside = HashSet::new();
    for entry in entries {
        let Some(entry) = found(entry, &folder)? else { continue };
        if let (true, Some(metadata)) = (entry.path().is_symlink(), found(fs::metadata(entry.path()), &entry.path())?) {
            inside.insert((metadata.dev(), metadata.ino()));
        }
    }
    Ok(inside)
}

fn permissions(metadata: &Metadata) -> u32 {
    metadata.permissions().mode() & 0o7777
}

/// Absence is an answer; anything else that fails is an error.
fn found<T>(result: io::Result<T>, path: &Path) -> Result<Option<T>, BackupError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(BackupError::Read { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn listed(data: &Path) -> Result<Listing, BackupError> {
        list(data, "PG_15_1", &|_| true, &std::env::temp_dir())
    }

    #[test]
    fn tablespaces_behind_relative_links_are_listed_and_dead_ones_are_told() {
        let top = tempfile::tempdir().unwrap();
        let (data, space) = (top.path().join("data"), top.path().join("space"));
        for folder in [&data.join("pg_tblspc"), &data.join("global"), &space.join("PG_15_1/5")] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(space.join("PG_15_1/5/16384"), b"").unwrap();
        symlink("../../space", data.join("pg_tblspc/16385")).unwrap();
        let Listing { files, others: Others { tablespaces, .. } } = listed(&data).unwrap();
        assert_eq!(tablespaces.len(), 1);
        assert_eq!(tablespaces[0].location, space.canonicalize().unwrap());
        let paths: Vec<PathBuf> = files.iter().unwrap().map(|row| row.unwrap().1.path).collect();
        assert_eq!(paths, [Path::new("pg_tblspc/16385/PG_15_1/5/16384")]);
        confirm(&data, &tablespaces).unwrap();
        // The mount is lost: an empty directory, or none, and the link stays.
        fs::rename(space.join("PG_15_1"), top.path().join("away")).unwrap();
        for removed in [false, true] {
            if removed {
                fs::remove_dir(&space).unwrap();
            }
            for result in [listed(&data).map(drop), confirm(&data, &tablespaces)] {
                assert!(matches!(result, Err(BackupError::TablespaceAway { oid: 16385, .. })), "{result:?}");
            }
        }
        // Dropped: the link is gone, too.
        fs::remove_file(data.join("pg_tblspc/16385")).unwrap();
        assert!(listed(&data).unwrap().others.tablespaces.is_empty());
        confirm(&data, &tablespaces).unwrap();
    }

    #[test]
    fn links_where_data_lies_end_the_backup_and_others_are_listed() {
        let top = tempfile::tempdir().unwrap();
        let (data, elsewhere) = (top.path().join("data"), top.path().join("elsewhere"));
        for folder in ["base/5", "global", "pg_tblspc", "pg_xact"].map(|name| data.join(name)) {
            fs::create_dir_all(folder).unwrap();
        }
        fs::create_dir(&elsewhere).unwrap();
        fs::write(top.path().join("file"), b"").unwrap();
        let linked = |name: &str, target: &Path| {
            let path = data.join(name);
            symlink(target, &path).unwrap();
            let found = listed(&data);
            fs::remove_file(path).unwrap();
            found
        };
        for name in ["pg_wal", "log", "pg_stat_tmp", "pg_replslot"] {
            linked(name, &elsewhere).unwrap();
        }
        for name in ["base/16384", "base/5/sub", "pg_xact/sub", "pg_multixact", "pg_logical", "global/sub"] {
            let refused = linked(name, &elsewhere);
            assert!(matches!(refused, Err(BackupError::LinkedData { .. })), "{name}: {refused:?}");
        }
        let relation = linked("base/5/16390", &top.path().join("file"));
        assert!(matches!(relation, Err(BackupError::LinkedData { .. })), "{relation:?}");
        fs::rename(data.join("base"), top.path().join("base")).unwrap();
        assert!(matches!(linked("base", &top.path().join("base")), Err(BackupError::LinkedData { .. })));
    }
}
