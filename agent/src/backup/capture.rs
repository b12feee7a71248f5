//! Configuration that lies outside the data directory (as Debian keeps it in `/etc/postgresql`) or behind links, captured
//! beside the data: a restored server without its `pg_hba.conf` and settings is none.
//!
//! Captured files get paths under [`FOLDER`] followed by their absolute path. A file we may not read is left out and
//! remarked; it never fails the backup.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use postgres_format::data_directory::FileKind;

use super::listing::{LinkEnd, ListedFile, ListedLink};
use super::plan::Planned;

/// Directory in a restored data directory that holds captured files. Left out of backups itself.
pub const FOLDER: &str = "pgconvoy_configuration";
/// Largest file captured, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most files captured.
const FILES_MAX: usize = 256;

/// A captured file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// Path in the backup, under [`FOLDER`].
    pub path: PathBuf,
    /// Its content.
    pub bytes: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, Unix seconds.
    pub modified_unix: i64,
}

/// What was captured and what was not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capture {
    /// The files.
    pub files: Vec<Captured>,
    /// Paths that could not be read or were too large.
    pub left_out: Vec<PathBuf>,
}

impl Capture {
    /// Its files as files of a plan, whose numbers follow those that the plan has.
    pub fn planned(&self, first: u32) -> impl Iterator<Item = Planned> + '_ {
        (first..).zip(&self.files).map(|(number, file)| {
            let (size, kind) = (file.bytes.len() as u64, FileKind::Other);
            let listed =
                ListedFile { path: file.path.clone(), kind, size, mode: file.mode, modified_unix: file.modified_unix };
            Planned::whole(number, listed)
        })
    }
}

/// Captures `configuration` files and files behind `links`, except what lies inside the data directory itself.
pub fn capture(data_directory: &Path, configuration: &[PathBuf], links: &[ListedLink]) -> Capture {
    let root = data_directory.canonicalize().unwrap_or_else(|_| data_directory.to_owned());
    let linked = links.iter().filter(|link| link.leads_to == LinkEnd::File).map(|link| data_directory.join(&link.path));
    let mut capture = Capture::default();
    let mut seen = BTreeSet::new();
    for path in configuration.iter().cloned().chain(linked) {
        let Ok(real) = path.canonicalize() else {
            capture.left_out.push(path);
            continue;
        };
        if real.starts_with(&root) || !seen.insert(real.clone()) {
            continue;
        }
        match read(&real).filter(|_| capture.files.len() < FILES_MAX) {
            Some(captured) => capture.files.push(captured),
            None => capture.left_out.push(path),
        }
    }
    capture
}

fn read(real: &Path) -> Option<Captured> {
    let metadata = fs::metadata(real).ok().filter(|found| found.is_file() && found.len() <= FILE_BYTES_MAX)?;
    let bytes = fs::read(real).ok()?;
    let path = Path::new(FOLDER).join(real.strip_prefix("/").ok()?);
    Some(Captured { path, bytes, mode: metadata.mode() & 0o7777, modified_unix: metadata.mtime() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_outside_is_captured_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().canonicalize().unwrap();
        let (data, etc) = (base.join("data"), base.join("etc"));
        fs::create_dir(&data).unwrap();
        fs::create_dir(&etc).unwrap();
        fs::write(data.join("pg_hba.conf"), "inside").unwrap();
        fs::write(etc.join("postgresql.conf"), "outside").unwrap();
        std::os::unix::fs::symlink(etc.join("postgresql.conf"), data.join("postgresql.conf")).unwrap();
        let link =
            ListedLink { path: "postgresql.conf".into(), target: etc.join("postgresql.conf"), leads_to: LinkEnd::File };
        let configuration = [data.join("pg_hba.conf"), etc.join("postgresql.conf"), etc.join("absent")];
        let capture = capture(&data, &configuration, &[link]);
        assert_eq!(capture.left_out, [etc.join("absent")]);
        let [file] = &capture.files[..] else { panic!("{capture:?}") };
        assert_eq!(file.bytes, b"outside");
        assert_eq!(Path::new("/").join(file.path.strip_prefix(FOLDER).unwrap()), etc.join("postgresql.conf"));
    }
}
