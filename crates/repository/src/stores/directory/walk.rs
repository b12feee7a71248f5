//! Listing a directory store in byte order of the keys, one directory at a time.
//!
//! A directory's name counts as if it ended in `/`, because that is how it stands in the keys: `a-b` before `a/b`.
//! Only directories that can hold wanted keys are read, and only as many as the page needs. Of each directory on the path so
//! many entries are in memory at most; one with more is read again for the next ones.

use std::collections::BinaryHeap;
use std::os::fd::BorrowedFd;

use rustix::fs::{self as at, AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::key::ObjectKey;
use crate::store::{LONG_LIST_LIMIT, ListPage, ObjectEntry};

/// Entries of one directory that are remembered: those of a page, and whether there are more.
const ENTRIES_MAX: usize = LONG_LIST_LIMIT + 1;

/// A page of the keys that start with `prefix` and come after `after`.
pub(super) fn list(top: BorrowedFd<'_>, prefix: &str, after: Option<&str>, limit: usize) -> Result<ListPage, Errno> {
    let start = prefix.rsplit_once('/').map_or(String::new(), |(directory, _)| format!("{directory}/"));
    let walk = Walk { top, prefix, after: after.unwrap_or_default(), most: ENTRIES_MAX };
    if is_readable(&start) { walk.page(start, limit) } else { Ok(ListPage::default()) }
}

struct Walk<'a> {
    top: BorrowedFd<'a>,
    prefix: &'a str,
    after: &'a str,
    /// Entries of one directory that are remembered.
    most: usize,
}

/// A directory that is being walked through.
struct Level {
    directory: String,
    /// Paths of entries, the last one first; directories end in `/`.
    next: Vec<String>,
    /// Behind which entry it has more of them.
    more_behind: Option<String>,
}

impl Walk<'_> {
    fn page(&self, start: String, limit: usize) -> Result<ListPage, Errno> {
        let mut page = ListPage::default();
        let mut levels = vec![self.level(start, "")?];
        while let Some(level) = levels.last_mut() {
            let Some(path) = level.next.pop() else {
                let ended = levels.pop().and_then(|level| Some((level.directory, level.more_behind?)));
                if let Some((directory, behind)) = ended {
                    levels.push(self.level(directory, &behind)?);
                }
                continue;
            };
            if path.ends_with('/') {
                levels.push(self.level(path, "")?);
            } else if let Some(entry) = entry_of(self.top, &path)? {
                if page.objects.len() == limit {
                    page.more = true;
                    break;
                }
                page.objects.push(entry);
            }
        }
        Ok(page)
    }

    /// The first entries of a directory, behind one of them, that are wanted or lead to such.
    fn level(&self, directory: String, behind: &str) -> Result<Level, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = if directory.is_empty() { "." } else { &directory };
        let opened = match at::openat(self.top, path, flags, Mode::empty()) {
            Ok(opened) => opened,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Level { directory, next: Vec::new(), more_behind: None }),
            Err(error) => return Err(error),
        };
        let (mut first, mut more) = (BinaryHeap::new(), false);
        let mut path = directory.clone();
        for entry in Dir::new(opened)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            path.truncate(directory.len());
            path.push_str(name);
            if is_directory(self.top, &path, entry.file_type())? {
                path.push('/');
            }
            if path.as_str() <= behind || !self.may_hold(&path) || !is_readable(&path) {
                continue;
            }
            if first.len() < self.most {
                first.push(path.clone());
                continue;
            }
            more = true;
            if let Some(mut last) = first.peek_mut().filter(|last| path < **last) {
                last.clone_from(&path);
            }
        }
        let mut next = first.into_sorted_vec();
        let more_behind = next.last().filter(|_| more).cloned();
        next.reverse();
        Ok(Level { directory, next, more_behind })
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_directory_with_more_entries_than_are_remembered_is_listed_whole() {
        let place = tempfile::tempdir().unwrap();
        let mut expected: Vec<String> = (0..40).map(|number| format!("a/{number:02}")).collect();
        for number in (0..40).step_by(3) {
            expected[number].push_str("-x/y");
        }
        expected.extend(["a/07.z".to_owned(), "b".to_owned()]);
        for path in &expected {
            let path = place.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"1").unwrap();
        }
        // Leads to nothing, as many of them as are remembered.
        (0..8).for_each(|number| fs::create_dir(place.path().join(format!("a/0{number}~"))).unwrap());
        expected.sort();
        let top = fs::File::open(place.path()).unwrap();
        for (most, limit) in [(1, 1), (2, 50), (3, 4), (7, 41), (7, 42), (1000, 5)] {
            let (mut seen, mut more): (Vec<String>, bool) = (Vec::new(), true);
            while more {
                let after = seen.last().cloned().unwrap_or_default();
                let walk = Walk { top: top.as_fd(), prefix: "", after: &after, most };
                let page = walk.page(String::new(), limit).unwrap();
                more = page.more;
                assert!(page.objects.len() <= limit && (!page.objects.is_empty() || !more), "{most}, {limit}");
                seen.extend(page.objects.iter().map(|entry| entry.key.to_string()));
            }
            assert_eq!(seen, expected, "{most}, {limit}");
        }
    }
}
