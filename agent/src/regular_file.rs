//! Files that a caller names: a regular one is opened, anything else is refused by what it is.
//!
//! Invariant: nothing here waits for a writer, a reader or a device. Opening a FIFO would, and whoever may ask the agent may
//! name one. A symbolic link is followed; what counts is what it leads to.

use std::fs::{File, FileType, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// It is something else.
#[derive(Debug, thiserror::Error)]
#[error("it is {0}, not a regular file")]
struct NotRegular(&'static str);

/// Says no if this is no regular file.
///
/// # Errors
/// `InvalidInput`, with the kind of file that it is.
pub fn check(metadata: &Metadata) -> io::Result<()> {
    match metadata.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, NotRegular(kind(metadata.file_type())))),
    }
}

/// Says no if a file cannot be written there because something else has the name. A file that is not there can.
///
/// # Errors
/// As [`check`].
pub fn check_target(path: &Path) -> io::Result<()> {
    // What else is wrong with it is said by whoever writes.
    std::fs::metadata(path).map_or(Ok(()), |metadata| check(&metadata))
}

/// Opens a regular file for reading.
///
/// # Errors
/// As [`check`], and what the system says.
pub fn open(path: &Path) -> io::Result<File> {
    check(&std::fs::metadata(path)?)?;
    open_checked(path, OFlags::RDONLY)
}

/// Creates a regular file, or empties the one that is there.
///
/// # Errors
/// As [`open`].
pub fn create(path: &Path) -> io::Result<File> {
    check_target(path)?;
    open_checked(path, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)
}

/// Reads a regular file of at most `limit_bytes`.
///
/// # Errors
/// As [`open`]; `FileTooLarge` when it is longer.
pub fn read(path: &Path, limit_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(limit_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit_bytes { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
}

/// Looks again at what was opened, because the name may lead elsewhere by then.
fn open_checked(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::from_raw_mode(0o600))?);
    check(&file.metadata()?)?;
    Ok(file)
}

fn kind(file_type: FileType) -> &'static str {
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else if file_type.is_socket() {
        "a socket"
    } else if file_type.is_block_device() || file_type.is_char_device() {
        "a device"
    } else {
        "something else"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn only_regular_files_are_opened_and_nothing_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("file"), b"abc").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        for name in ["file", "link"] {
            assert_eq!(read(&path(name), 3).unwrap(), b"abc");
            assert_eq!(read(&path(name), 2).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        }
        std::fs::create_dir(path("folder")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), Mode::from_raw_mode(0o600)).unwrap();
        std::os::unix::fs::symlink("pipe", path("link to pipe")).unwrap();
        let _listener = UnixListener::bind(path("socket")).unwrap();
        let others = [
            (path("folder"), "a directory"),
            (path("pipe"), "a FIFO"),
            (path("link to pipe"), "a FIFO"),
            (path("socket"), "a socket"),
            ("/dev/null".into(), "a device"),
        ];
        for (path, kind) in others {
            let refused = format!("it is {kind}, not a regular file");
            assert_eq!(open(&path).unwrap_err().to_string(), refused);
            assert_eq!(create(&path).unwrap_err().to_string(), refused);
            assert_eq!(check_target(&path).unwrap_err().to_string(), refused);
        }
        assert_eq!(open(&path("nothing")).unwrap_err().kind(), io::ErrorKind::NotFound);
        check_target(&path("nothing")).unwrap();
        create(&path("new")).unwrap();
        create(&path("file")).unwrap();
        assert_eq!(std::fs::read(path("file")).unwrap(), b"");
    }
}
