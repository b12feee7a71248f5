//! What comes before and after the bytes of a restore: directories and links first; then checksums, attributes,
//! `backup_label`, settings, `backup_manifest`, flushing, and `pg_control` as the very last file.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use postgres_format::Timeline;
use postgres_format::backup_manifest::{ManifestWriter, WalRange};
use postgres_format::control_file::{self, ControlError, ControlFile};
use repository::backup::manifest::{File, Head, Link, Tablespace};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use super::existing;
use super::layout::{Contents, is_control};
use super::target::{self, Owner, TablespaceTarget};
use super::writer::{Target, checksum_of};
use super::{RestoreError, RestoreOptions, read_optional};
use crate::durable;

/// The only modes with which a server accepts its data directory (`checkDataDir` in `miscinit.c`).
const GROUP_READABLE: u32 = 0o750;
const PRIVATE: u32 = 0o700;

/// Where one restore goes, besides its files.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) options: RestoreOptions,
    pub(super) tablespaces: Vec<TablespaceTarget>,
    pub(super) owner: Option<Owner>,
}

/// Where a tablespace lay.
pub(super) fn location(tablespace: &Tablespace) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(tablespace.location.as_bytes()))
}

fn directory_mode(head: &Head) -> u32 {
    if head.mode & 0o050 == 0o050 { GROUP_READABLE } else { PRIVATE }
}

fn file_mode(head: &Head) -> u32 {
    if directory_mode(head) == GROUP_READABLE { 0o640 } else { 0o600 }
}

/// Makes all directories and links. Tablespaces come before the directories that are seen through them.
pub(super) fn make_directories(work: &Work, contents: &Contents) -> Result<(), RestoreError> {
    let root = &work.options.target;
    target::make_directory(root, directory_mode(&contents.head), work.owner)?;
    let links = root.join("pg_tblspc");
    if !work.tablespaces.is_empty() {
        target::make_directory(&links, PRIVATE, work.owner)?;
    }
    for (tablespace, recorded) in work.tablespaces.iter().zip(&contents.tablespaces) {
        target::make_directory(&tablespace.location, recorded.mode & 0o7777, work.owner)?;
        link(&tablespace.location, &links.join(tablespace.oid.to_string()), work.owner)?;
    }
    for directory in &contents.directories {
        target::make_directory(&root.join(directory.path.as_path()), directory.mode & 0o7777, work.owner)?;
    }
    for required in ["pg_wal", "pg_wal/archive_status", "global"] {
        target::make_directory(&root.join(required), directory_mode(&contents.head), work.owner)?;
    }
    for recorded in &contents.links {
        link(&target_of(recorded), &root.join(recorded.path.as_path()), work.owner)?;
    }
    Ok(())
}

fn target_of(link: &Link) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(link.target.as_bytes()))
}

/// Takes out of the contents the links that led to directories elsewhere, or that lead to some here, and says so. A server
/// that writes through such a link writes into what may be another server's.
pub(super) fn leave_out_links(root: &Path, contents: &mut Contents) -> Vec<String> {
    // Onto what is there: the link is this server's own already.
    let is_there = |link: &Link| fs::read_link(root.join(link.path.as_path())).is_ok_and(|to| to == target_of(link));
    let left = |link: &Link| leads_away(root, link) && !is_there(link);
    let (left_out, kept) = std::mem::take(&mut contents.links).into_iter().partition(left);
    contents.links = kept;
    let left_out: Vec<Link> = left_out;
    let told = |link: &Link| {
        format!(
            "{} was a link to the directory {}, which may be another server's, and was not made: make a directory or a link \
             of your own there if the server needs it",
            link.path.as_path().display(),
            target_of(link).display()
        )
    };
    left_out.iter().map(told).collect()
}

fn leads_away(root: &Path, link: &Link) -> bool {
    let path = root.join(link.path.as_path());
    // By its text, because the restored directory may not be there yet.
    let target = plain(&path.parent().unwrap_or(root).join(target_of(link)));
    !target.starts_with(plain(root)) && (link.directory || target.is_dir())
}

/// The path without `.` and `..`, by its text alone.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(plain.pop()),
            other => plain.push(other),
        }
    }
    plain
}

fn link(to: &Path, path: &Path, owner: Option<Owner>) -> Result<(), RestoreError> {
    // One that leads elsewhere was removed before.
    if fs::read_link(path).is_ok_and(|found| found == to) {
        return Ok(target::give(path, owner)?);
    }
    symlink(to, path).map_err(|source| RestoreError::Write { path: path.to_owned(), source })?;
    Ok(target::give(path, owner)?)
}

/// Checks and completes what the writers left, and makes it durable.
pub(super) fn finish(work: &Work, written: &Target) -> Result<(), RestoreError> {
    let root = &work.options.target;
    let mut control = None;
    for (index, file) in written.contents.files.iter().enumerate() {
        check_file(written, index, file)?;
        if is_control(file) {
            control = Some(file);
        } else {
            set_attributes(&root.join(file.path.as_path()), file, work.owner)?;
        }
    }
    let control_file = control.ok_or(RestoreError::NoControl)?;
    let control = poisoned(written.control())?;
    let head = &written.contents.head;
    let mode = file_mode(head);
    write_new(work, "backup_label", head.backup_label.as_bytes(), mode)?;
    let auto_conf = root.join("postgresql.auto.conf");
    let text = work.options.recovery.auto_conf(&read_optional(&auto_conf)?);
    replace(work, &auto_conf, text.as_bytes(), mode)?;
    write_new(work, work.options.recovery.signal.file_name(), b"", mode)?;
    write_manifest(work, written, crc32c::crc32c(&control))?;
    let places = work.tablespaces.iter().map(|tablespace| tablespace.location.as_path()).chain([root.as_path()]);
    for place in places {
        durable::sync_file_system(place).map_err(|source| RestoreError::Write { path: place.to_owned(), source })?;
    }
    existing::unmark(root)?;
    write_control(work, control_file, &control)
}

fn check_file(written: &Target, index: usize, file: &File) -> Result<(), RestoreError> {
    let found = written.checksum(index);
    match file.crc32c.filter(|_| !written.layout.zeroed.contains(&index)) {
        Some(expected) if found != expected => {
            let path = written.data_directory.join(file.path.as_path());
            Err(RestoreError::Checksum { path, found, expected })
        }
        _ => Ok(()),
    }
}

fn set_attributes(path: &Path, file: &File, owner: Option<Owner>) -> Result<(), RestoreError> {
    let refused = |source| RestoreError::Write { path: path.to_owned(), source };
    if file.size == 0 {
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path).map_err(refused)?;
    }
    target::give(path, owner)?;
    fs::set_permissions(path, Permissions::from_mode(file.mode & 0o7777)).map_err(refused)?;
    let time = Timespec { tv_sec: file.mtime, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::empty()).map_err(|error| refused(error.into()))
}

/// With an impossible checkpoint, which `backup_label` overrides. A version we do not know is left as it is.
fn poisoned(mut control: Vec<u8>) -> Result<Vec<u8>, RestoreError> {
    match control_file::poison_checkpoint(&mut control) {
        Ok(()) | Err(ControlError::Version { .. }) => Ok(control),
        Err(error) => Err(RestoreError::Control(error)),
    }
}

fn write_new(work: &Work, name: &str, bytes: &[u8], mode: u32) -> Result<(), RestoreError> {
    let path = work.options.target.join(name);
    durable::create(&path, bytes, mode).map_err(|source| RestoreError::Write { path: path.clone(), source })?;
    give(work, &path, mode)
}

fn replace(work: &Work, path: &Path, bytes: &[u8], mode: u32) -> Result<(), RestoreError> {
    durable::replace(path, bytes, mode).map_err(|source| RestoreError::Write { path: path.to_owned(), source })?;
    give(work, path, mode)
}

/// Mode, whatever our umask, and owner.
fn give(work: &Work, path: &Path, mode: u32) -> Result<(), RestoreError> {
    let set = fs::set_permissions(path, Permissions::from_mode(mode));
    set.map_err(|source| RestoreError::Write { path: path.to_owned(), source })?;
    Ok(target::give(path, work.owner)?)
}

/// PostgreSQL's own manifest of what lies in the directory.
fn write_manifest(work: &Work, written: &Target, control_crc32c: u32) -> Result<(), RestoreError> {
    let path = work.options.target.join("backup_manifest");
    let done = manifest_to(work, written, &path, control_crc32c);
    done.map_err(|source| RestoreError::Write { path: path.clone(), source })?;
    give(work, &path, file_mode(&written.contents.head))
}

fn manifest_to(work: &Work, written: &Target, path: &Path, control_crc32c: u32) -> io::Result<()> {
    let head = &written.contents.head;
    let out = OpenOptions::new().write(true).create_new(true).mode(file_mode(head)).open(path)?;
    let mut writer = ManifestWriter::new(BufWriter::new(out), head.postgres_major, head.system_identifier)?;
    for (index, file) in written.contents.files.iter().enumerate() {
        let crc32c = if is_control(file) { control_crc32c } else { written.checksum(index) };
        writer.file(file.path.as_bytes(), file.size, file.mtime, crc32c)?;
    }
    // pg_verifybackup follows links, and calls a file that is not listed extra.
    for recorded in &written.contents.links {
        let end = work.options.target.join(recorded.path.as_path());
        if let Some(found) = fs::metadata(&end).ok().filter(fs::Metadata::is_file) {
            writer.file(recorded.path.as_bytes(), found.len(), found.mtime(), checksum_of(&fs::File::open(&end)?)?)?;
        }
    }
    let label = head.backup_label.as_bytes();
    let stopped = head.stop_time.as_second();
    writer.file(b"backup_label", label.len() as u64, stopped, crc32c::crc32c(label))?;
    let mut out = writer.finish(&wal_ranges(head))?;
    out.flush()
}

/// The WAL that the backup itself needs, the newest timeline first. Where a backup from a standby changed its timeline the
/// fork is not known here; both ranges are then given up to the stop.
fn wal_ranges(head: &Head) -> Vec<WalRange> {
    let range = |timeline: Timeline| WalRange { timeline, start: head.start_lsn, end: head.stop_lsn };
    if head.start_timeline == head.stop_timeline {
        vec![range(head.stop_timeline)]
    } else {
        vec![range(head.stop_timeline), range(head.start_timeline)]
    }
}

/// The last file. Everything before it is durable.
fn write_control(work: &Work, file: &File, bytes: &[u8]) -> Result<(), RestoreError> {
    let path = work.options.target.join(file.path.as_path());
    if let Err(error @ (ControlError::Size { .. } | ControlError::Checksum { .. })) = ControlFile::parse(bytes) {
        return Err(RestoreError::Control(error));
    }
    let refused = |source| RestoreError::Write { path: path.clone(), source };
    let temporary = durable::temporary_name(&path);
    durable::create(&temporary, bytes, file.mode & 0o7777).map_err(refused)?;
    give(work, &temporary, file.mode & 0o7777)?;
    fs::rename(&temporary, &path).map_err(refused)?;
    durable::sync_directory(path.parent().unwrap_or(Path::new("/"))).map_err(refused)
}

#[cfg(test)]
mod tests {
    use repository::byte_text::{ByteText, RelativePath};

    use super::*;

    #[test]
    fn a_link_to_a_directory_elsewhere_is_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("data");
        fs::create_dir_all(folder.path().join("live/log")).unwrap();
        fs::write(folder.path().join("live/file"), b"").unwrap();
        let live = folder.path().join("live").display().to_string();
        let check = |path: &str, target: &str, directory: bool, expected: bool| {
            let (path, target) = (RelativePath::new(path).unwrap(), ByteText::new(target));
            let away = leads_away(&root, &Link { path, target: target.clone(), directory });
            assert_eq!(away, expected, "{target:?}");
        };
        check("log", "/nonexistent/log", true, true);
        check("log", "/nonexistent/log", false, false);
        check("log", &format!("{live}/log"), false, true);
        check("log", "../live/log", false, true);
        check("log", "x/../../live/log", true, true);
        check("postgresql.conf", &format!("{live}/file"), false, false);
        check("log", "other", true, false);
        check("a/log", "../b", true, false);
        check("a/log", &format!("{}/b", root.display()), true, false);
    }
}
