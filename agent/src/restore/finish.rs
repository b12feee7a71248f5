//! What comes before and after the bytes of a restore: directories and links first; then checksums, attributes,
//! `backup_label`, settings, `backup_manifest`, flushing, and `pg_control` as the very last file.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use postgres_format::Timeline;
use postgres_format::backup_manifest::{ManifestWriter, WalRange};
use postgres_format::control_file::{self, ControlError, ControlFile};
use repository::backup::manifest::{File, Head, Line};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use super::checksums::Checksums;
use super::existing;
use super::groups::Group;
use super::layout::is_control;
use super::links::{PlacedLinks, WAL};
use super::manifest::Manifest;
use super::outline::Outline;
use super::target::{self, Owner, TablespaceTarget};
use super::writer::{Target, checksum_of};
use super::{RestoreError, RestoreOptions, read_optional};
use crate::durable;

/// The only modes with which a server accepts its data directory (`checkDataDir` in `miscinit.c`).
const GROUP_READABLE: u32 = 0o750;
const PRIVATE: u32 = 0o700;

/// Where one restore goes, besides its files' content.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) options: RestoreOptions,
    pub(super) outline: Outline,
    pub(super) tablespaces: Vec<TablespaceTarget>,
    pub(super) links: PlacedLinks,
    pub(super) owner: Option<Owner>,
    /// Of the files that are finished.
    pub(super) checksums: Checksums,
}

fn directory_mode(head: &Head) -> u32 {
    if head.mode & 0o050 == 0o050 { GROUP_READABLE } else { PRIVATE }
}

fn file_mode(head: &Head) -> u32 {
    if directory_mode(head) == GROUP_READABLE { 0o640 } else { 0o600 }
}

/// Makes the data directory itself.
pub(super) fn make_root(work: &Work) -> Result<(), RestoreError> {
    Ok(target::make_directory(&work.options.target, directory_mode(&work.outline.head), work.owner)?)
}

/// Makes all directories and links. What is seen through a link comes after the link.
pub(super) fn make_directories(work: &Work) -> Result<(), RestoreError> {
    let (root, outline) = (&work.options.target, &work.outline);
    let links = root.join("pg_tblspc");
    if !work.tablespaces.is_empty() {
        target::make_directory(&links, PRIVATE, work.owner)?;
    }
    for (tablespace, recorded) in work.tablespaces.iter().zip(&outline.tablespaces) {
        target::make_directory(&tablespace.location, recorded.mode & 0o7777, work.owner)?;
        link(&tablespace.location, &links.join(tablespace.oid.to_string()), work.owner)?;
    }
    for directory in work.links.directories() {
        target::make_directory(directory, directory_mode(&outline.head), work.owner)?;
    }
    if let Some(wal) = work.links.wal() {
        link(&wal.target, &root.join(WAL), work.owner)?;
    }
    for directory in &outline.directories {
        target::make_directory(&root.join(directory.path.as_path()), directory.mode & 0o7777, work.owner)?;
    }
    for required in [WAL, "pg_wal/archive_status", "global"] {
        target::make_directory(&root.join(required), directory_mode(&outline.head), work.owner)?;
    }
    for made in work.links.made.iter().filter(|made| made.path != Path::new(WAL)) {
        link(&made.target, &root.join(&made.path), work.owner)?;
    }
    Ok(())
}

fn link(to: &Path, path: &Path, owner: Option<Owner>) -> Result<(), RestoreError> {
    // One that leads elsewhere was removed before.
    if fs::read_link(path).is_ok_and(|found| found == to) {
        return Ok(target::give(path, owner)?);
    }
    symlink(to, path).map_err(|source| RestoreError::Write { path: path.to_owned(), source })?;
    Ok(target::give(path, owner)?)
}

/// Checks the files of a group, gives them their attributes, and keeps their checksums. `pg_control` has no file yet.
pub(super) fn finish_group(work: &Work, written: &Target, group: &Group) -> Result<(), RestoreError> {
    for (index, file) in group.layout.files.iter().enumerate() {
        check_file(written, group, index)?;
        if !is_control(file) {
            set_attributes(&written.path(file), file, work.owner)?;
        }
    }
    let checksums = (0..group.layout.files.len()).map(|index| group.checksum(index));
    work.checksums.keep(group.first, checksums).map_err(RestoreError::Scratch)
}

fn check_file(written: &Target, group: &Group, index: usize) -> Result<(), RestoreError> {
    let (file, found) = (group.file(index), group.checksum(index));
    match file.crc32c.filter(|_| !group.is_zeroed(index)) {
        Some(expected) if found != expected => {
            Err(RestoreError::Checksum { path: written.path(file), found, expected })
        }
        _ => Ok(()),
    }
}

/// Completes what finished groups left, and makes it durable.
pub(super) fn finish(work: &Work, written: &Target, manifest: &Manifest) -> Result<(), RestoreError> {
    let root = &work.options.target;
    let control = poisoned(written.control())?;
    let head = &work.outline.head;
    let mode = file_mode(head);
    write_new(work, "backup_label", head.backup_label.as_bytes(), mode)?;
    let auto_conf = root.join("postgresql.auto.conf");
    let text = work.options.recovery.auto_conf(&read_optional(&auto_conf)?);
    replace(work, &auto_conf, text.as_bytes(), mode)?;
    write_new(work, work.options.recovery.signal.file_name(), b"", mode)?;
    let control_file = write_manifest(work, manifest, crc32c::crc32c(&control))?;
    let tablespaces = work.tablespaces.iter().map(|tablespace| tablespace.location.as_path());
    for place in tablespaces.chain(work.links.directories()).chain([root.join(WAL).as_path(), root.as_path()]) {
        durable::sync_file_system(place).map_err(|source| RestoreError::Write { path: place.to_owned(), source })?;
    }
    process::crash_point!("restore/after-files-before-control");
    write_control(work, &control_file, &control)?;
    // Last: without mark and pg_control nothing would tell whose directory this is, and nobody could go on.
    existing::unmark(root)
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

/// PostgreSQL's own manifest of what lies in the directory. Gives the line of `pg_control`.
fn write_manifest(work: &Work, manifest: &Manifest, control_crc32c: u32) -> Result<File, RestoreError> {
    let path = work.options.target.join("backup_manifest");
    let refused = |source| RestoreError::Write { path: path.clone(), source };
    let head = &work.outline.head;
    let out = OpenOptions::new().write(true).create_new(true).mode(file_mode(head)).open(&path).map_err(refused)?;
    let writer = ManifestWriter::new(BufWriter::new(out), head.postgres_major, head.system_identifier);
    let mut writer = writer.map_err(refused)?;
    let mut next = work.checksums.in_order().map_err(RestoreError::Scratch)?;
    let mut control = None;
    for line in manifest.lines()? {
        let Line::File(file) = line.map_err(|damage| manifest.damaged(damage))? else { continue };
        let found = next().map_err(RestoreError::Scratch)?;
        let crc32c = if is_control(&file) { control_crc32c } else { found };
        writer.file(file.path.as_bytes(), file.size, file.mtime, crc32c).map_err(refused)?;
        if is_control(&file) {
            control = Some(file);
        }
    }
    end_manifest(work, writer).map_err(refused)?;
    give(work, &path, file_mode(head))?;
    control.ok_or(RestoreError::NoControl)
}

fn end_manifest(work: &Work, mut writer: ManifestWriter<BufWriter<fs::File>>) -> io::Result<()> {
    let head = &work.outline.head;
    // pg_verifybackup follows links, and calls a file that is not listed extra.
    for made in &work.links.made {
        let end = work.options.target.join(&made.path);
        if let Some(found) = fs::metadata(&end).ok().filter(fs::Metadata::is_file) {
            let checksum = checksum_of(&fs::File::open(&end)?)?;
            writer.file(made.path.as_os_str().as_bytes(), found.len(), found.mtime(), checksum)?;
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
