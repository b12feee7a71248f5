//! Where the spool is, as far as that shows without opening it: whether it is there or can be made, on which file system,
//! and with how much room.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use process::units::Size;
use rustix::fs::Access;

use super::{Finding, bad, good, note};
use crate::config::Settings;

/// Largest table of mounts read, in bytes.
const MOUNTS_BYTES_MAX: usize = 4 << 20;
/// File systems that a restart of the host empties.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];

/// Checks the directory.
pub(super) fn check(settings: &Settings) -> Finding {
    let directory = &settings.spool.directory;
    let shown = directory.display();
    let Some(nearest) = directory.ancestors().find(|place| place.exists()) else {
        return bad(format!("spool {shown}: no part of the path exists"));
    };
    if !nearest.is_dir() {
        return bad(format!("spool {shown}: {} is not a directory", nearest.display()));
    }
    if let Err(error) = rustix::fs::access(nearest, Access::WRITE_OK | Access::EXEC_OK) {
        let what = if nearest == directory { "cannot be written to" } else { "does not exist and cannot be made" };
        return bad(format!(
            "spool {shown} {what} by this user ({}: {error}); give it to the agent's user",
            nearest.display()
        ));
    }
    let made = if nearest == directory { "exists" } else { "is made at the first start" };
    let mount = mount_of(nearest);
    let on = mount
        .as_ref()
        .map_or_else(String::new, |mount| format!(", on the {} file system at {}", mount.kind, mount.place.display()));
    let room = rustix::fs::statvfs(nearest).map(|found| found.f_bavail.saturating_mul(found.f_frsize)).ok();
    let free = room.map_or_else(String::new, |bytes| format!(", {} MiB free", bytes >> 20));
    let limit = Size::from_bytes(settings.spool.max_size_bytes);
    let text = format!("spool {shown} {made}{on}{free}, of which it takes at most {limit}");
    match mount {
        Some(mount) if IN_MEMORY.contains(&mount.kind.as_str()) => {
            note(format!("{text}; a restart of the host empties it, and with it the copies that not every store has"))
        }
        _ if room.is_some_and(|bytes| bytes < settings.spool.max_size_bytes) => {
            note(format!("{text}; that is less than spool.max_size"))
        }
        _ => good(text),
    }
}

/// A mounted file system.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    place: PathBuf,
    kind: String,
}

fn mount_of(path: &Path) -> Option<Mount> {
    let path = fs::canonicalize(path).ok()?;
    let table = fs::read("/proc/self/mountinfo").ok().filter(|table| table.len() <= MOUNTS_BYTES_MAX)?;
    innermost(&String::from_utf8_lossy(&table), &path)
}

/// The mount that a path lies in; of several at one place the last covers the others. The table is that of proc(5): the
/// fifth field is the place, and the one after a lone dash the kind.
fn innermost(table: &str, path: &Path) -> Option<Mount> {
    let mounts = table.lines().filter_map(|line| {
        let (about, source) = line.split_once(" - ")?;
        let place = unescaped(about.split(' ').nth(4)?);
        Some(Mount { place, kind: source.split(' ').next()?.to_owned() })
    });
    mounts.filter(|mount| path.starts_with(&mount.place)).max_by_key(|mount| mount.place.as_os_str().len())
}

/// Spaces and such are written as three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsStr::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_is_found() {
        let table = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                     30 21 8:2 / /var/lib rw,noatime shared:4 - xfs /dev/sdb1 rw\n\
                     31 21 0:9 / /var/lib/a\\040b rw - tmpfs tmpfs rw\n\
                     nonsense\n";
        let check = |path: &str, place: &str, kind: &str| {
            let expected = Mount { place: place.into(), kind: kind.to_owned() };
            assert_eq!(innermost(table, Path::new(path)), Some(expected), "{path}");
        };
        check("/var/lib/pgconvoy/agent", "/var/lib", "xfs");
        check("/var/library", "/", "ext4");
        check("/var/lib/a b/c", "/var/lib/a b", "tmpfs");
        assert_eq!(innermost("", Path::new("/")), None);
        assert!(mount_of(Path::new("/proc")).is_some_and(|mount| mount.kind == "proc"));
    }
}
