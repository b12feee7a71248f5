//! What a manifest says besides its files, and what its files are in sum. This much is held in memory: it grows with the
//! number of databases, tablespaces and directories, not with that of files.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use repository::backup::manifest::{Directory, Head, Line, Link, Tablespace};

use super::RestoreError;
use super::layout::{self, database_of, is_left_out, shown};
use super::manifest::Manifest;
use super::paths::PathSet;

/// A manifest but for its files.
#[derive(Debug, Clone)]
pub(super) struct Outline {
    /// What holds for the whole.
    pub(super) head: Head,
    /// Tablespaces.
    pub(super) tablespaces: Vec<Tablespace>,
    /// Directories, parents first.
    pub(super) directories: Vec<Directory>,
    /// Links other than tablespaces'.
    pub(super) links: Vec<Link>,
    /// How many files there are.
    pub(super) files: u64,
    /// What all of them take.
    all: Share,
    /// What would be left out of each database that users made, by its identifier.
    left_out: BTreeMap<u32, Share>,
    /// The databases that files belong to.
    pub(super) databases: BTreeSet<u32>,
    /// Whether there is a `pg_control`.
    pub(super) has_control: bool,
}

/// What some files take, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Share {
    /// On the disk.
    pub(super) file_bytes: u64,
    /// In all their layers together: what is written if nothing is there.
    pub(super) layer_bytes: u64,
}

impl Share {
    fn add(&mut self, other: Self) {
        self.file_bytes = self.file_bytes.saturating_add(other.file_bytes);
        self.layer_bytes = self.layer_bytes.saturating_add(other.layer_bytes);
    }

    fn without(self, other: Self) -> Self {
        Self {
            file_bytes: self.file_bytes.saturating_sub(other.file_bytes),
            layer_bytes: self.layer_bytes.saturating_sub(other.layer_bytes),
        }
    }
}

impl Outline {
    /// Reads a manifest from its first line to its last, and puts the paths of its files into `paths`, if it is given.
    ///
    /// Refuses paths that lie at or behind a link, whose end may be anywhere. No backup makes one, because links are not
    /// followed when files are listed.
    pub(super) fn gather(manifest: &Manifest, mut paths: Option<&mut PathSet>) -> Result<Self, RestoreError> {
        let lines = manifest.lines()?;
        let mut outline = Self::empty(lines.head().clone());
        let mut links: Option<HashSet<PathBuf>> = None;
        for line in lines {
            match line.map_err(|damage| manifest.damaged(damage))? {
                Line::Tablespace(tablespace) => outline.tablespaces.push(tablespace),
                Line::Directory(directory) => outline.directories.push(directory),
                Line::Link(link) => outline.links.push(link),
                Line::Pack(_) | Line::Head(_) => {}
                // Files come after all links, and the end after all files.
                Line::End(_) => drop(outline.link_paths(&mut links)?),
                Line::File(file) => {
                    let links = outline.link_paths(&mut links)?;
                    if is_behind(links, file.path.as_path(), Steps::AtOrBehind) {
                        return Err(RestoreError::ThroughLink { path: file.path.as_path().to_owned() });
                    }
                    outline.count(&file);
                    if let Some(paths) = paths.as_deref_mut() {
                        paths.insert(file.path.as_path()).map_err(RestoreError::Scratch)?;
                    }
                }
            }
        }
        Ok(outline)
    }

    fn empty(head: Head) -> Self {
        Self {
            head,
            tablespaces: Vec::new(),
            directories: Vec::new(),
            links: Vec::new(),
            files: 0,
            all: Share::default(),
            left_out: BTreeMap::new(),
            databases: BTreeSet::new(),
            has_control: false,
        }
    }

    /// One that has links alone.
    #[cfg(test)]
    pub(super) fn of_links(links: Vec<Link>, wal_directory: Option<repository::byte_text::ByteText>) -> Self {
        let head = super::tests::head(0, &crate::testing::sample("pg_control"));
        Self { links, ..Self::empty(Head { wal_directory, ..head }) }
    }

    /// The paths of links, made once all links have come; refuses directories and links behind them.
    fn link_paths<'a>(&self, links: &'a mut Option<HashSet<PathBuf>>) -> Result<&'a HashSet<PathBuf>, RestoreError> {
        if links.is_none() {
            let made: HashSet<PathBuf> = self.links.iter().map(|link| link.path.as_path().to_owned()).collect();
            let directories = self.directories.iter().map(|directory| (directory.path.as_path(), Steps::AtOrBehind));
            let nested = self.links.iter().map(|link| (link.path.as_path(), Steps::Behind));
            if let Some((path, _)) = directories.chain(nested).find(|(path, steps)| is_behind(&made, path, *steps)) {
                return Err(RestoreError::ThroughLink { path: path.to_owned() });
            }
            *links = Some(made);
        }
        Ok(links.get_or_insert_default())
    }

    fn count(&mut self, file: &repository::backup::manifest::File) {
        let block_size = self.head.block_size;
        let layer_bytes = shown(file).map(|(_, extent)| extent.held_bytes(block_size)).fold(0, u64::saturating_add);
        let share = Share { file_bytes: file.size, layer_bytes };
        self.files += 1;
        self.all.add(share);
        self.has_control |= layout::is_control(file);
        let Some(database) = database_of(file.path.as_path()) else { return };
        self.databases.insert(database);
        if is_left_out(file, Some(&BTreeSet::new())) {
            self.left_out.entry(database).or_default().add(share);
        }
    }

    /// What the files take whose content is restored.
    pub(super) fn share(&self, databases: Option<&BTreeSet<u32>>) -> Share {
        let Some(wanted) = databases else { return self.all };
        let left_out = self.left_out.iter().filter(|(database, _)| !wanted.contains(database));
        left_out.fold(self.all, |share, (_, left_out)| share.without(*left_out))
    }
}

/// From where on a path counts as behind a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Steps {
    /// At the link, or below it.
    AtOrBehind,
    /// Below it.
    Behind,
}

fn is_behind(links: &HashSet<PathBuf>, path: &Path, steps: Steps) -> bool {
    let skipped = usize::from(steps == Steps::Behind);
    !links.is_empty() && path.ancestors().skip(skipped).any(|above| links.contains(above))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_at_or_behind_a_link_is_told() {
        let check = |links: &[&str], path: &str, steps, expected| {
            let links = links.iter().map(PathBuf::from).collect();
            assert_eq!(is_behind(&links, Path::new(path), steps), expected, "{path}");
        };
        check(&[], "a/b", Steps::AtOrBehind, false);
        check(&["log", "postgresql.conf"], "log2", Steps::AtOrBehind, false);
        check(&["log", "postgresql.conf"], "base/1/2", Steps::AtOrBehind, false);
        check(&["log"], "log/passwd", Steps::AtOrBehind, true);
        check(&["log"], "log", Steps::AtOrBehind, true);
        check(&["log"], "log", Steps::Behind, false);
        check(&["log", "log/more"], "log/more", Steps::Behind, true);
    }
}
