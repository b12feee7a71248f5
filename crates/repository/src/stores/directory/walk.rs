//! Listing a directory store in byte order of the keys, one directory at a time.
//!
//! A directory's name counts as if it ended in `/`, because that is how it stands in the keys: `a-b` before `a/b`.
//! Only directories that can hold wanted keys are read, and only as many as the page needs; memory is bounded by the
//! entries of the directories on one path.

use std::os::fd::BorrowedFd;

use rustix::fs::{self as at, AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::key::ObjectKey;
use crate::store::{ListPage, ObjectEntry};

/// A page of the keys that start with `prefix` and come after `after`.
pub(super) fn list(top: BorrowedFd<'_>, prefix: &str, after: Option<&str>, limit: usize) -> Result<ListPage, Errno> {
    let wanted = Wanted { prefix, after: after.unwrap_or_default() };
    let start = prefix.rsplit_once('/').map_or(String::new(), |(directory, _)| format!("{directory}/"));
    if !is_readable(&start) {
        return Ok(ListPage::default());
    }
    let mut page = ListPage::default();
    let mut levels = vec![wanted.entries_of(top, &start)?];
    while let Some(level) = levels.last_mut() {
        let Some(path) = level.next() else {
            levels.pop();
            continue;
        };
        if path.ends_with('/') {
            levels.push(wanted.entries_of(top, &path)?);
        } else if let Some(entry) = entry_of(top, &path)? {
            if page.objects.len() == limit {
                page.more = true;
                break;
            }
            page.objects.push(entry);
        }
    }
    Ok(page)
}

struct Wanted<'a> {
    prefix: &'a str,
    after: &'a str,
}

impl Wanted<'_> {
    /// The paths in a directory that are wanted or lead to such, in order; directories end in `/`.
    fn entries_of(&self, top: BorrowedFd<'_>, directory: &str) -> Result<std::vec::IntoIter<String>, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = if directory.is_empty() { "." } else { directory };
        let opened = match at::openat(top, path, flags, Mode::empty()) {
            Ok(opened) => opened,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new().into_iter()),
            Err(error) => return Err(error),
        };
        let mut paths = Vec::new();
        for entry in Dir::new(opened)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            let mut path = format!("{directory}{name}");
            if !is_readable(&path) {
                continue;
            }
            if is_directory(top, &path, entry.file_type())? {
                path.push('/');
            }
            if self.may_hold(&path) {
                paths.push(path);
            }
        }
        paths.sort_unstable();
        Ok(paths.into_iter())
    }

    fn may_hold(&self, path: &str) -> bool {
        let is_directory = path.ends_with('/');
        let in_prefix = path.starts_with(self.prefix) || is_directory && self.prefix.starts_with(path);
        let is_after = path > self.after || is_directory && self.after.starts_with(path);
        in_prefix && is_after
    }
}

fn is_directory(top: BorrowedFd<'_>, path: &str, kind: FileType) -> Result<bool, Errno> {
    match kind {
        FileType::Directory => Ok(true),
        FileType::RegularFile => Ok(false),
        // Not every file system says what an entry is, and a symbolic link may lead to a directory.
        _ => match at::statat(top, path, AtFlags::empty()) {
            Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory),
            Err(Errno::NOENT | Errno::LOOP) => Ok(false),
            Err(error) => Err(error),
        },
    }
}

fn entry_of(top: BorrowedFd<'_>, path: &str) -> Result<Option<ObjectEntry>, Errno> {
    let Ok(key) = ObjectKey::parse(path) else { return Ok(None) };
    match at::statat(top, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
            Ok(Some(ObjectEntry { key, size: stat.st_size as u64 }))
        }
        Ok(_) | Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a path, with or without a slash at its end, may be or lead to a key.
fn is_readable(path: &str) -> bool {
    path.is_empty() || ObjectKey::parse(path.strip_suffix('/').unwrap_or(path)).is_ok()
}
