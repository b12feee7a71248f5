//! PURE: from a manifest's lines to what must be read from which pack, in few large ranges.
//!
//! Extents that lie near one another in a pack are read with one request; a gap that is cheaper to read than to ask
//! around is read and thrown away.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use repository::backup::manifest::{Directory, File, FileKind, Head, Line, Link, Tablespace};
use repository::backup::pack::{Extent, FileNumber};
use repository::name::BackupId;

/// Most bytes read with one request.
pub const RANGE_BYTES_MAX: u64 = 8 << 20;
/// Largest gap between wanted extents that is read along.
const GAP_BYTES_MAX: u64 = 256 << 10;

/// Everything a manifest says, in memory.
#[derive(Debug, Clone)]
pub struct Contents {
    /// What holds for the whole.
    pub head: Head,
    /// Tablespaces.
    pub tablespaces: Vec<Tablespace>,
    /// Directories, parents first.
    pub directories: Vec<Directory>,
    /// Links other than tablespaces'.
    pub links: Vec<Link>,
    /// Files, by number.
    pub files: Vec<File>,
}

impl Contents {
    /// Gathers the lines after the head; stops at the first that cannot be read.
    pub fn gather<E>(head: Head, lines: impl Iterator<Item = Result<Line, E>>) -> Result<Self, E> {
        let mut contents =
            Self { head, tablespaces: Vec::new(), directories: Vec::new(), links: Vec::new(), files: Vec::new() };
        for line in lines {
            match line? {
                Line::Tablespace(tablespace) => contents.tablespaces.push(tablespace),
                Line::Directory(directory) => contents.directories.push(directory),
                Line::Link(link) => contents.links.push(link),
                Line::File(file) => contents.files.push(file),
                Line::Head(_) | Line::Pack(_) | Line::End(_) => {}
            }
        }
        Ok(contents)
    }

    /// A path that lies at or behind a link, whose end may be anywhere. No backup makes one, because links are not followed
    /// when files are listed.
    pub fn through_a_link(&self) -> Option<&Path> {
        let links = self.links.iter().map(|link| link.path.as_path());
        let directories = self.directories.iter().map(|directory| directory.path.as_path());
        behind_a_link(&links.collect(), directories.chain(self.files.iter().map(|file| file.path.as_path())))
    }

    /// Bytes of all files.
    pub fn data_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

fn behind_a_link<'a>(links: &BTreeSet<&'a Path>, mut written: impl Iterator<Item = &'a Path>) -> Option<&'a Path> {
    if links.is_empty() {
        return None;
    }
    let behind = |path: &Path, steps: usize| path.ancestors().skip(steps).any(|above| links.contains(above));
    let nested = || links.iter().copied().find(|link| behind(link, 1));
    written.find(|path| behind(path, 0)).or_else(nested)
}

/// One extent to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WantedExtent {
    /// Index in [`Contents::files`].
    pub file: usize,
    /// Index among all extents of the restore, by file and then by place in the file.
    pub number: usize,
    /// Number of the file in its frames.
    pub file_number: FileNumber,
    /// Where its frames lie and what they hold.
    pub extent: Extent,
}

/// One request to a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackRange {
    /// The backup that the pack belongs to.
    pub backup: BackupId,
    /// Number of the pack.
    pub pack: u32,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What is wanted of it, by offset.
    pub extents: Vec<WantedExtent>,
}

/// Which extents belong to which file, and the requests that read them all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// For each file, the number of its first extent.
    pub first_extents: Vec<usize>,
    /// How many extents there are.
    pub extents: usize,
    /// The requests, by pack and offset.
    pub ranges: Vec<PackRange>,
}

/// Lays out the reading of all files.
pub fn lay_out(backup: BackupId, files: &[File]) -> Layout {
    let mut by_pack: HashMap<(BackupId, u32), Vec<WantedExtent>> = HashMap::new();
    let (mut first_extents, mut number) = (Vec::with_capacity(files.len()), 0);
    for (index, file) in files.iter().enumerate() {
        first_extents.push(number);
        for layer in &file.layers {
            for extent in &layer.extents {
                let wanted = WantedExtent { file: index, number, file_number: file.number_in(layer), extent: *extent };
                by_pack.entry((layer.backup.unwrap_or(backup), extent.pack)).or_default().push(wanted);
                number += 1;
            }
        }
    }
    let mut packs: Vec<_> = by_pack.into_iter().collect();
    packs.sort_by_key(|(pack, _)| *pack);
    let ranges = packs.into_iter().flat_map(|((backup, pack), extents)| coalesce(backup, pack, extents)).collect();
    Layout { first_extents, extents: number, ranges }
}

fn coalesce(backup: BackupId, pack: u32, mut extents: Vec<WantedExtent>) -> Vec<PackRange> {
    extents.sort_by_key(|wanted| wanted.extent.offset);
    let mut ranges: Vec<PackRange> = Vec::new();
    for wanted in extents {
        let Extent { offset, length, .. } = wanted.extent;
        match ranges.last_mut() {
            Some(range)
                if offset.saturating_sub(range.offset + range.length) <= GAP_BYTES_MAX
                    && offset + length - range.offset <= RANGE_BYTES_MAX =>
            {
                range.length = range.length.max(offset + length - range.offset);
                range.extents.push(wanted);
            }
            _ => ranges.push(PackRange { backup, pack, offset, length, extents: vec![wanted] }),
        }
    }
    ranges
}

/// Whether a file is the one that is written last.
pub fn is_control(file: &File) -> bool {
    file.kind == FileKind::Control
}

#[cfg(test)]
mod tests {
    use repository::backup::manifest::Layer;
    use repository::byte_text::RelativePath;

    use super::*;

    fn backup() -> BackupId {
        "20261123T034138Z-7f3a9c21".parse().unwrap()
    }

    /// Files with extents (pack, offset, length).
    fn files(extents: &[&[(u32, u64, u64)]]) -> Vec<File> {
        let file = |(number, extents): (usize, &&[(u32, u64, u64)])| {
            let mut at = 0;
            let extents = extents.iter().map(|(pack, offset, length)| {
                at += length;
                Extent { pack: *pack, offset: *offset, length: *length, from: at - length, to: at, pages: None }
            });
            let extents: Vec<Extent> = extents.collect();
            let path = RelativePath::new(format!("f{number}").into_bytes()).unwrap();
            let number = FileNumber(u32::try_from(number).unwrap());
            File {
                number,
                path,
                kind: FileKind::Other,
                mode: 0,
                mtime: 0,
                size: at,
                crc32c: None,
                layers: vec![Layer { backup: None, file: None, extents }],
            }
        };
        extents.iter().enumerate().map(file).collect()
    }

    /// One line: extents in, (pack, offset, length, number of extents) out.
    fn check(extents: &[&[(u32, u64, u64)]], expected: &[(u32, u64, u64, usize)]) {
        let layout = lay_out(backup(), &files(extents));
        let got: Vec<_> =
            layout.ranges.iter().map(|range| (range.pack, range.offset, range.length, range.extents.len())).collect();
        assert_eq!(got, expected);
        assert_eq!(layout.extents, extents.iter().map(|file| file.len()).sum::<usize>());
    }

    #[test]
    fn near_extents_are_read_together() {
        const M: u64 = 1 << 20;
        check(&[], &[]);
        check(&[&[(0, 8, 100)], &[(0, 108, 100)], &[(1, 8, 5)]], &[(0, 8, 200, 2), (1, 8, 5, 1)]);
        check(&[&[(0, 8, 100)], &[(0, 8 + 100 + GAP_BYTES_MAX, 1)]], &[(0, 8, 101 + GAP_BYTES_MAX, 2)]);
        check(&[&[(0, 8, 100)], &[(0, 9 + 100 + GAP_BYTES_MAX, 1)]], &[(0, 8, 100, 1), (0, 109 + GAP_BYTES_MAX, 1, 1)]);
        check(&[&[(0, 8, 5 * M), (0, 8 + 5 * M, 5 * M)]], &[(0, 8, 5 * M, 1), (0, 8 + 5 * M, 5 * M, 1)]);
        check(&[&[(0, 8, 20 * M)]], &[(0, 8, 20 * M, 1)]);
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let check = |links: &[&'static str], written: &[&'static str], expected: Option<&str>| {
            let links = links.iter().map(Path::new).collect();
            assert_eq!(behind_a_link(&links, written.iter().map(Path::new)), expected.map(Path::new));
        };
        check(&[], &["a", "a/b"], None);
        check(&["log", "postgresql.conf"], &["log2", "base/1/2"], None);
        check(&["log"], &["base", "log/passwd"], Some("log/passwd"));
        check(&["log"], &["log"], Some("log"));
        check(&["log", "log/more"], &["base"], Some("log/more"));
    }
}
