//! What a directory store does to its files, blocking.
//!
//! Every operation opens the top directory anew and does the rest relative to that, so that one operation sees one
//! file system even if a mount comes or goes in its middle. Each looks at `repo.json` there: when that is another file than
//! before it is read again, and if it is another repository's, nothing is done.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use rustix::fs::{self as at, AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Stat, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use uuid::Uuid;

use super::walk;
use crate::config::DirectoryConfig;
use crate::identity::{LIMIT_BYTES as IDENTITY_BYTES_MAX, RepositoryIdentity};
use crate::key::{self, ObjectKey};
use crate::name::StoreName;
use crate::store::{Body, Deleted, ListPage, Put, Room, StoreError};

/// Where files are written before they get their keys. No key has a component that starts with a dot.
const TEMPORARY_DIRECTORY: &str = ".pgconvoy-tmp";
/// What such a file is called, around 32 hex digits.
const TEMPORARY_NAME: (&str, &str) = ("put-", ".tmp");
/// From this age, in seconds by the file system's own clock, a leftover is swept; no put takes so long.
const LEFTOVER_AGE_SECONDS: i64 = 24 * 60 * 60;
/// Most leftovers looked at in one sweep.
const SWEEP_LIMIT: usize = 10_000;
/// Directories remembered as durable before forgetting all and starting over.
const DURABLE_LIMIT: usize = 4096;

/// Objects are written once, and their files say so.
const FILE_MODE: Mode = Mode::from_raw_mode(0o440);
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o750);
const OPEN_DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Files {
    store: StoreName,
    config: DirectoryConfig,
    durable: Mutex<DurableDirectories>,
    shown: Mutex<Option<Shown>>,
    swept: AtomicBool,
}

/// The repository that this process was told to expect, else the one that it found in the directory first; it works on no
/// other one.
#[derive(Debug, Clone, Copy)]
struct Shown {
    repository: Uuid,
    /// Which file said so last; none if no file did yet.
    stamp: Option<Stamp>,
}

/// What tells one `repo.json` from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, u64),
    changed: (i64, u64),
}

impl From<&Stat> for Stamp {
    fn from(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// Directories that this process has made durable, with everything above them, under one top directory.
#[derive(Debug, Default)]
struct DurableDirectories {
    top: Option<(u64, u64)>,
    known: HashSet<String>,
}

/// An object opened for reading.
#[derive(Debug)]
pub(super) struct OpenObject {
    store: StoreName,
    key: ObjectKey,
    file: File,
    size: u64,
}

impl OpenObject {
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Exactly `length` bytes from `offset`.
    pub(super) fn read(&self, offset: u64, length: usize) -> Result<Bytes, StoreError> {
        let mut bytes = vec![0; length];
        match self.file.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes.into()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(StoreError::Damaged {
                store: self.store.clone(),
                key: self.key.clone(),
                reason: format!("expected {} bytes, and the file became shorter", self.size),
            }),
            Err(error) => Err(fault(&self.store, error)),
        }
    }
}

impl Files {
    pub(super) fn new(store: StoreName, config: DirectoryConfig) -> Self {
        Self { store, config, durable: Mutex::default(), shown: Mutex::default(), swept: AtomicBool::new(false) }
    }

    /// Works on this repository from now on, and on no other.
    pub(super) fn expect(&self, repository: Uuid) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.is_none_or(|shown| shown.repository != repository) {
            *shown = Some(Shown { repository, stamp: None });
        }
    }

    pub(super) fn put_new(&self, key: &ObjectKey, body: &Body) -> Result<Put, StoreError> {
        let top = self.top_for(key)?;
        if self.stat(top.as_fd(), key.as_str())?.is_some() {
            // Its writer may not have come to this yet, and our answer promises it.
            let parent = self.durable_parent(&top, key)?;
            self.sync_directory(parent.as_fd())?;
            return Ok(Put::Exists);
        }
        if *key == key::repository_identity() {
            self.refuse_occupied(&top)?;
        }
        self.refuse_full(&top, body.len())?;
        let temporary = self.write_temporary(&top, key, body)?;
        let mut parent = self.durable_parent(&top, key)?;
        let mut put = self.publish(&temporary, &parent, file_name(key));
        if put.is_err() && was_removed(&parent) {
            parent = self.durable_parent(&top, key)?;
            put = self.publish(&temporary, &parent, file_name(key));
        }
        let put = put?;
        self.sync_directory(parent.as_fd())?;
        Ok(put)
    }

    /// Removes an object, and the directories that are empty without it.
    pub(super) fn delete(&self, key: &ObjectKey) -> Result<Deleted, StoreError> {
        let top = self.top_for(key)?;
        if self.stat(top.as_fd(), key.as_str())?.is_none() {
            return Ok(Deleted::Absent);
        }
        let path = directory_of(key);
        let parent = at::openat(&top, if path.is_empty() { "." } else { path }, OPEN_DIRECTORY, Mode::empty());
        let parent = match parent {
            Ok(parent) => parent,
            Err(error) if is_absence(error) => return Ok(Deleted::Absent),
            Err(error) => return Err(fault(&self.store, error.into())),
        };
        match at::unlinkat(&parent, file_name(key), AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(Deleted::Absent),
            Err(Errno::PERM) if is_locked(&parent, file_name(key)) => return Ok(Deleted::Retained { until: None }),
            Err(error) => return Err(fault(&self.store, error.into())),
        }
        self.sync_directory(parent.as_fd())?;
        remove_empty(top.as_fd(), path);
        Ok(Deleted::Removed)
    }

    pub(super) fn open(&self, key: &ObjectKey) -> Result<OpenObject, StoreError> {
        let top = self.top_for(key)?;
        let absent = || StoreError::NotFound { store: self.store.clone(), key: key.clone() };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match at::openat(&top, key.as_str(), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(error) if is_absence(error) => return Err(absent()),
            Err(error) => return Err(fault(&self.store, error.into())),
        };
        let metadata = file.metadata().map_err(|error| fault(&self.store, error))?;
        if !metadata.is_file() {
            return Err(absent());
        }
        Ok(OpenObject { store: self.store.clone(), key: key.clone(), size: metadata.len(), file })
    }

    pub(super) fn head(&self, key: &ObjectKey) -> Result<Option<u64>, StoreError> {
        let top = self.top_for(key)?;
        Ok(self.stat(top.as_fd(), key.as_str())?.map(|stat| stat.st_size as u64))
    }

    pub(super) fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<ListPage, StoreError> {
        let top = self.repository()?;
        walk::list(top.as_fd(), prefix, after, limit).map_err(|error| fault(&self.store, error.into()))
    }

    pub(super) fn room(&self) -> Result<Room, StoreError> {
        self.room_of(&self.repository()?)
    }

    fn room_of(&self, top: &OwnedFd) -> Result<Room, StoreError> {
        let stat = at::fstatvfs(top).map_err(|error| fault(&self.store, error.into()))?;
        let reserved = stat.f_bfree.saturating_sub(stat.f_bavail);
        let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
        let total_bytes = stat.f_blocks.saturating_sub(reserved).saturating_mul(stat.f_frsize);
        Ok(Room { free_bytes, total_bytes })
    }

    /// The top directory, which must be there.
    fn top(&self) -> Result<OwnedFd, StoreError> {
        let path = &self.config.path;
        at::openat(CWD, path, OPEN_DIRECTORY, Mode::empty()).map_err(|error| match error {
            Errno::NOENT | Errno::NOTDIR => {
                self.refused(format!("{} is not a directory: mount it, or create it once by hand", path.display()))
            }
            other => fault(&self.store, other.into()),
        })
    }

    /// The top directory, which must hold the repository that it held before.
    fn repository(&self) -> Result<OwnedFd, StoreError> {
        let top = self.top()?;
        match self.stat(top.as_fd(), key::repository_identity().as_str())? {
            Some(stat) => self.expect_same(&top, (&stat).into()).map(|()| top),
            None => Err(self.refused(format!(
                "{} holds no repo.json: expected a store of the repository; is something not mounted?",
                self.config.path.display()
            ))),
        }
    }

    /// Refuses another repository than the expected or the first one. Two that are the first at once agree by the lock.
    fn expect_same(&self, top: &OwnedFd, stamp: Stamp) -> Result<(), StoreError> {
        let lock = || self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if lock().is_some_and(|shown| shown.stamp == Some(stamp)) {
            return Ok(());
        }
        let (repository, stamp) = self.read_identity(top)?;
        let mut shown = lock();
        if let Some(Shown { repository: expected, .. }) = shown.filter(|shown| shown.repository != repository) {
            return Err(self.refused(format!(
                "{} belongs to repository {repository} now, expected {expected}: is something else mounted there?",
                self.config.path.display()
            )));
        }
        *shown = Some(Shown { repository, stamp: Some(stamp) });
        Ok(())
    }

    fn read_identity(&self, top: &OwnedFd) -> Result<(Uuid, Stamp), StoreError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = at::openat(top, key::repository_identity().as_str(), flags, Mode::empty());
        let file = File::from(opened.map_err(|error| fault(&self.store, error.into()))?);
        let stat = at::fstat(&file).map_err(|error| fault(&self.store, error.into()))?;
        let mut text = Vec::new();
        let read = file.take(IDENTITY_BYTES_MAX).read_to_end(&mut text);
        read.map_err(|error| fault(&self.store, error))?;
        let identity = RepositoryIdentity::from_bytes(&text).map_err(|error| self.refused(error.to_string()))?;
        Ok((identity.repository, (&stat).into()))
    }

    /// The top directory for work on this key: only `repo.json` itself may be asked for where it is missing or another's.
    fn top_for(&self, key: &ObjectKey) -> Result<OwnedFd, StoreError> {
        if *key != key::repository_identity() {
            return self.repository();
        }
        let top = self.top()?;
        if let Some(stat) = self.stat(top.as_fd(), key.as_str())? {
            // Whoever reads it now relies on it from now on; what is wrong with it is told by its content.
            let _ = self.expect_same(&top, (&stat).into());
        }
        Ok(top)
    }

    fn stat(&self, top: BorrowedFd<'_>, path: &str) -> Result<Option<Stat>, StoreError> {
        match at::statat(top, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => Ok(Some(stat)),
            Ok(_) => Ok(None),
            Err(error) if is_absence(error) => Ok(None),
            Err(error) => Err(fault(&self.store, error.into())),
        }
    }

    /// A directory with something in it is not made a repository.
    fn refuse_occupied(&self, top: &OwnedFd) -> Result<(), StoreError> {
        let directory = at::Dir::read_from(top).map_err(|error| fault(&self.store, error.into()))?;
        for entry in directory {
            let entry = entry.map_err(|error| fault(&self.store, error.into()))?;
            let name = entry.file_name().to_bytes();
            if !name.starts_with(b".") && name != b"lost+found" && name != b"repo.json" {
                return Err(self.refused(format!(
                    "{} holds {} but no repo.json: expected an empty directory or a repository",
                    self.config.path.display(),
                    String::from_utf8_lossy(name)
                )));
            }
        }
        Ok(())
    }

    fn refuse_full(&self, top: &OwnedFd, body_bytes: u64) -> Result<(), StoreError> {
        let room = self.room_of(top)?;
        if room.used_percent() >= self.config.full_percent && self.config.full_percent < 100
            || room.free_bytes < body_bytes
        {
            return Err(StoreError::Full { store: self.store.clone() });
        }
        Ok(())
    }

    /// Writes the body to a file of its own and makes that durable.
    fn write_temporary(&self, top: &OwnedFd, key: &ObjectKey, body: &Body) -> Result<Temporary, StoreError> {
        let directory = self.temporary_directory(top)?;
        let name = format!("{}{}{}", TEMPORARY_NAME.0, Uuid::now_v7().simple(), TEMPORARY_NAME.1);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = at::openat(&directory, name.as_str(), flags, FILE_MODE);
        let file = File::from(file.map_err(|error| fault(&self.store, error.into()))?);
        let mut temporary = Temporary { directory, name, file };
        if !self.swept.swap(true, Ordering::Relaxed) {
            sweep(&temporary);
        }
        copy(body, &mut temporary.file).map_err(|error| match error {
            CopyError::Body(source) => StoreError::Body { key: key.clone(), source },
            CopyError::Store(error) => fault(&self.store, error),
        })?;
        temporary.file.sync_all().map_err(|error| fault(&self.store, error))?;
        Ok(temporary)
    }

    fn temporary_directory(&self, top: &OwnedFd) -> Result<OwnedFd, StoreError> {
        let open = || at::openat(top, TEMPORARY_DIRECTORY, OPEN_DIRECTORY | OFlags::NOFOLLOW, Mode::empty());
        let opened = open().or_else(|error| match error {
            Errno::NOENT => create_directory(top.as_fd(), TEMPORARY_DIRECTORY).and_then(|()| open()),
            other => Err(other),
        });
        opened.map_err(|error| fault(&self.store, error.into()))
    }

    /// Gives the temporary file its key if nothing has it.
    fn publish(&self, temporary: &Temporary, parent: &OwnedFd, name: &str) -> Result<Put, StoreError> {
        let from = temporary.name.as_str();
        match at::linkat(&temporary.directory, from, parent, name, AtFlags::empty()) {
            Ok(()) => Ok(Put::Created),
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK) => {
                self.publish_without_links(temporary, parent, name)
            }
            // Over NFS the reply to a link that happened may be lost, and its repetition finds itself.
            Err(error) => match at::fstat(&temporary.file) {
                Ok(stat) if stat.st_nlink == 2 => Ok(Put::Created),
                _ if error == Errno::EXIST => Ok(Put::Exists),
                _ if error == Errno::XDEV => Err(StoreError::Unsupported {
                    store: self.store.clone(),
                    reason: "it spans several file systems, expected one".to_owned(),
                }),
                _ => Err(fault(&self.store, error.into())),
            },
        }
    }

    fn publish_without_links(&self, from: &Temporary, parent: &OwnedFd, name: &str) -> Result<Put, StoreError> {
        let renamed = at::renameat_with(&from.directory, from.name.as_str(), parent, name, RenameFlags::NOREPLACE);
        match renamed {
            Ok(()) => Ok(Put::Created),
            Err(Errno::EXIST) => Ok(Put::Exists),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Err(StoreError::Unsupported {
                store: self.store.clone(),
                reason: "its file system has neither hard links nor renames that keep what is there".to_owned(),
            }),
            Err(error) => Err(fault(&self.store, error.into())),
        }
    }

    /// Opens the directory of a key after making it and every directory above it exist and durable. What it holds is
    /// the caller's to sync.
    fn durable_parent(&self, top: &OwnedFd, key: &ObjectKey) -> Result<OwnedFd, StoreError> {
        let path = directory_of(key);
        if self.is_durable(top, path)? {
            let shortcut = if path.is_empty() { "." } else { path };
            match at::openat(top, shortcut, OPEN_DIRECTORY, Mode::empty()) {
                Ok(directory) => return Ok(directory),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(fault(&self.store, error.into())),
            }
        }
        let mut directory = top.try_clone().map_err(|error| fault(&self.store, error))?;
        for component in path.split('/').filter(|component| !component.is_empty()) {
            create_directory(directory.as_fd(), component).map_err(|error| fault(&self.store, error.into()))?;
            // Also if it was there: who created it may have been killed before this.
            self.sync_directory(directory.as_fd())?;
            directory = at::openat(&directory, component, OPEN_DIRECTORY, Mode::empty())
                .map_err(|error| fault(&self.store, error.into()))?;
        }
        self.remember_durable(path);
        Ok(directory)
    }

    /// Whether this process made the directory durable, under the top directory that is there now.
    fn is_durable(&self, top: &OwnedFd, path: &str) -> Result<bool, StoreError> {
        let stat = at::fstat(top).map_err(|error| fault(&self.store, error.into()))?;
        let found = Some((stat.st_dev, stat.st_ino));
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        if durable.top != found {
            *durable = DurableDirectories { top: found, known: HashSet::new() };
        }
        Ok(path.is_empty() || durable.known.contains(path))
    }

    fn remember_durable(&self, path: &str) {
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        if durable.known.len() >= DURABLE_LIMIT {
            durable.known.clear();
        }
        durable.known.insert(path.to_owned());
    }

    fn sync_directory(&self, directory: BorrowedFd<'_>) -> Result<(), StoreError> {
        match at::fsync(directory) {
            // Some file systems cannot sync a directory and keep it durable by themselves; PostgreSQL thinks alike
            // (fsync_fname_ext in src/common/file_utils.c).
            Ok(()) | Err(Errno::INVAL | Errno::BADF) => Ok(()),
            Err(error) => Err(fault(&self.store, error.into())),
        }
    }

    fn refused(&self, reason: String) -> StoreError {
        StoreError::Refused { store: self.store.clone(), reason }
    }
}

/// A file that has no key yet; removed when dropped, which after linking leaves the other name.
struct Temporary {
    directory: OwnedFd,
    name: String,
    file: File,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // What cannot be removed now is swept later; after a rename there is nothing to remove.
        let _ = at::unlinkat(&self.directory, self.name.as_str(), AtFlags::empty());
    }
}

/// Removes what writers left behind that were killed long ago. `newest` tells the file system's time.
fn sweep(newest: &Temporary) {
    let Ok(now) = at::fstat(&newest.file) else { return };
    let Ok(directory) = at::Dir::read_from(&newest.directory) else { return };
    for entry in directory.take(SWEEP_LIMIT).flatten() {
        let name = entry.file_name();
        let ours = name.to_str().is_ok_and(is_temporary_name);
        let Ok(stat) = at::statat(&newest.directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        if ours && now.st_mtime.saturating_sub(stat.st_mtime) >= LEFTOVER_AGE_SECONDS {
            let _ = at::unlinkat(&newest.directory, name, AtFlags::empty());
        }
    }
}

fn is_temporary_name(name: &str) -> bool {
    let digits = name.strip_prefix(TEMPORARY_NAME.0).and_then(|rest| rest.strip_suffix(TEMPORARY_NAME.1));
    digits.is_some_and(|digits| digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn create_directory(parent: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    match at::mkdirat(parent, name, DIRECTORY_MODE) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

enum CopyError {
    Body(io::Error),
    Store(io::Error),
}

fn copy(body: &Body, target: &mut File) -> Result<(), CopyError> {
    match body {
        Body::Memory(bytes) => target.write_all(bytes).map_err(CopyError::Store),
        Body::File { path, len } => copy_file(path, *len, target),
    }
}

/// Copies by hand: whether the source or the target failed decides what the error means.
fn copy_file(path: &Path, len: u64, target: &mut File) -> Result<(), CopyError> {
    const BUFFER_BYTES: usize = 256 * 1024;
    let mut source = File::open(path).map_err(CopyError::Body)?;
    let mut buffer = vec![0; BUFFER_BYTES.min(len as usize)];
    let mut left = len;
    while left > 0 {
        let size = left.min(BUFFER_BYTES as u64) as usize;
        source.read_exact(&mut buffer[..size]).map_err(CopyError::Body)?;
        target.write_all(&buffer[..size]).map_err(CopyError::Store)?;
        left -= size as u64;
    }
    Ok(())
}

/// Removes a directory and those above it as far as they are empty. Whoever is about to put something there notices, and
/// makes them again.
fn remove_empty(top: BorrowedFd<'_>, path: &str) {
    let mut path = path;
    while !path.is_empty() && at::unlinkat(top, path, AtFlags::REMOVEDIR).is_ok() {
        path = path.rsplit_once('/').map_or("", |(above, _)| above);
    }
}

fn was_removed(directory: &OwnedFd) -> bool {
    at::fstat(directory).is_ok_and(|stat| stat.st_nlink == 0)
}

/// Whether the file system was told to let nobody remove the file: its attribute or its directory's, see chattr(1).
fn is_locked(parent: &OwnedFd, name: &str) -> bool {
    let locked = |name: &str, flags: AtFlags| {
        let found = at::statx(parent, name, flags, StatxFlags::BASIC_STATS);
        let lock = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
        found.is_ok_and(|stat| stat.stx_attributes.intersects(lock))
    };
    locked(name, AtFlags::SYMLINK_NOFOLLOW) || locked("", AtFlags::EMPTY_PATH)
}

fn directory_of(key: &ObjectKey) -> &str {
    key.as_str().rsplit_once('/').map_or("", |(directory, _)| directory)
}

fn file_name(key: &ObjectKey) -> &str {
    key.as_str().rsplit('/').next().unwrap_or(key.as_str())
}

/// Errors that mean that nothing has this name.
fn is_absence(error: Errno) -> bool {
    matches!(error, Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
}

fn fault(store: &StoreName, error: io::Error) -> StoreError {
    let store = store.clone();
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => StoreError::Full { store },
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => StoreError::Denied { store, source: Box::new(error) },
        _ => StoreError::Unavailable { store, source: Box::new(error) },
    }
}
