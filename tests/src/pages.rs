//! Compares two data directories page by page, blanking what may differ between servers that replayed the same WAL.
//!
//! Every file of every relation below `base`, `global` and `pg_tblspc` counts, whichever of the two has it. A page that is
//! not there is taken for one of zeros, which is how relations grow. Of the forks that are maps:
//! * free space maps are left out: they are hints that are hardly logged;
//! * visibility maps that were replayed may lack bits that the server's own have, never the other way round: a database that
//!   is created through WAL gets its maps in images that leave their content out (`RelationCopyStorageUsingBuffer` says that
//!   they are standard pages). Whether a bit is set that must not be is for `pg_check_visible` to say.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use postgres_format::relation::{Fork, RelationFork, TablespaceVersion};

use crate::mask::{self, PAGE_BYTES, PageKind};

/// Pages in a full file of a relation.
const SEGMENT_BLOCKS: u32 = 131_072;
/// Bytes of a page's header.
const HEADER_BYTES: usize = 24;
/// Bytes looked at together.
const STRETCH_BYTES: u64 = 1 << 20;

/// What came of a comparison.
#[derive(Debug, Default)]
pub struct Compared {
    /// Files of relations.
    pub files: usize,
    /// Pages in them.
    pub pages: u64,
    /// Pages that were equal only once they were masked.
    pub masked: u64,
    /// Pages that differ.
    pub differing: Vec<Difference>,
}

/// A page that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The file, relative to both data directories.
    pub path: PathBuf,
    /// The page within the file.
    pub block: u32,
    /// What the two pages are of.
    pub kinds: [PageKind; 2],
    /// The first bytes that differ once masked, with both values.
    pub bytes: Vec<(usize, u8, u8)>,
}

impl fmt::Display for Difference {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} block {} {:?}:", self.path.display(), self.block, self.kinds)?;
        self.bytes.iter().try_for_each(|(at, one, other)| write!(out, " {at}: {one:02x}/{other:02x}"))
    }
}

/// Compares what was recovered from an older copy and from a newer one, both to the same position; no server runs on either.
pub fn compare(older: &Path, newer: &Path, version: TablespaceVersion) -> Result<Compared> {
    let mut paths = BTreeSet::new();
    for data in [older, newer] {
        for top in ["base", "global", "pg_tblspc"] {
            list(data, Path::new(top), version, &mut paths)?;
        }
    }
    let mut compared = Compared { files: paths.len(), ..Compared::default() };
    for path in paths {
        compare_file(&path, [older, newer], version, &mut compared)?;
    }
    Ok(compared)
}

fn list(data: &Path, path: &Path, version: TablespaceVersion, found: &mut BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(data.join(path)).with_context(|| path.display().to_string())? {
        let path = path.join(entry?.file_name());
        if data.join(&path).is_dir() {
            list(data, &path, version, found)?;
        } else if RelationFork::from_path(&path, version).is_some_and(|(fork, _)| fork.fork != Fork::FreeSpaceMap) {
            found.insert(path);
        }
    }
    Ok(())
}

fn compare_file(path: &Path, datas: [&Path; 2], version: TablespaceVersion, compared: &mut Compared) -> Result<()> {
    let (fork, segment) = RelationFork::from_path(path, version).context("not a file of a relation")?;
    let [one, other] = datas.map(|data| Stretches::open(&data.join(path)));
    let (mut one, mut other, mut block) = (one?, other?, 0);
    loop {
        let (ours, theirs) = (one.next()?, other.next()?);
        let pages = ours.len().max(theirs.len()).div_ceil(PAGE_BYTES);
        if pages == 0 {
            return Ok(());
        }
        compared.pages += pages as u64;
        if ours != theirs {
            for page in 0..pages {
                let pages = [page_of(ours, page), page_of(theirs, page)];
                let place = Place { path, fork, segment, block: block + u32::try_from(page)? };
                compare_page(&place, pages, compared);
            }
        }
        block += u32::try_from(pages)?;
    }
}

/// Where a page lies.
struct Place<'a> {
    path: &'a Path,
    fork: RelationFork,
    segment: u32,
    block: u32,
}

fn compare_page(place: &Place<'_>, [mut ours, mut theirs]: [Vec<u8>; 2], compared: &mut Compared) {
    if ours == theirs {
        return;
    }
    let number = place.segment * SEGMENT_BLOCKS + place.block;
    let kinds = [mask::kind(&ours, number), mask::kind(&theirs, number)];
    for page in [&mut ours, &mut theirs] {
        match place.fork.fork {
            Fork::VisibilityMap => mask::mask_head(page),
            _ => mask::mask(page, number),
        }
    }
    let lacks_bits =
        || ours[HEADER_BYTES..].iter().zip(&theirs[HEADER_BYTES..]).all(|(ours, theirs)| ours & !theirs == 0);
    if ours == theirs || place.fork.fork == Fork::VisibilityMap && lacks_bits() {
        compared.masked += 1;
        return;
    }
    let differing = (0..PAGE_BYTES).filter(|at| ours[*at] != theirs[*at]);
    let bytes = differing.map(|at| (at, ours[at], theirs[at])).take(12).collect();
    compared.differing.push(Difference { path: place.path.to_owned(), block: place.block, kinds, bytes });
}

/// One page of a stretch of a file, zeros where that ends.
fn page_of(stretch: &[u8], page: usize) -> Vec<u8> {
    let bytes = stretch.get(page * PAGE_BYTES..).unwrap_or_default();
    let mut page = bytes[..bytes.len().min(PAGE_BYTES)].to_vec();
    page.resize(PAGE_BYTES, 0);
    page
}

/// A file in stretches of [`STRETCH_BYTES`]; one that is not there is empty.
struct Stretches {
    file: Option<fs::File>,
    buffer: Vec<u8>,
}

impl Stretches {
    fn open(path: &Path) -> Result<Self> {
        let file = match fs::File::open(path) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        Ok(Self { file, buffer: Vec::new() })
    }

    fn next(&mut self) -> Result<&[u8]> {
        self.buffer.clear();
        if let Some(file) = &mut self.file {
            file.take(STRETCH_BYTES).read_to_end(&mut self.buffer)?;
        }
        Ok(&self.buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: TablespaceVersion = TablespaceVersion { postgres_major: 15, catalog_version: 202_209_061 };

    fn page(filler: u8) -> Vec<u8> {
        let mut page = vec![filler; PAGE_BYTES];
        // A header without items and without room.
        page[10..24].copy_from_slice(&[0, 0, 24, 0, 24, 0, 0, 0x20, 4, 0x20, 0, 0, 0, 0]);
        page
    }

    fn data(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let data = tempfile::tempdir().unwrap();
        for folder in ["base/5", "global", "pg_tblspc"] {
            fs::create_dir_all(data.path().join(folder)).unwrap();
        }
        for (path, content) in files {
            fs::write(data.path().join(path), content).unwrap();
        }
        data
    }

    #[test]
    fn pages_that_differ_are_named_and_others_are_not() {
        let mut later = page(1);
        later[..10].fill(9);
        let one = data(&[
            ("base/5/100", [page(1), page(2), page(3)].concat()),
            ("base/5/100_fsm", page(1)),
            ("base/5/100_vm", [page(3), page(1)].concat()),
            ("base/5/101", page(4)),
            ("base/5/PG_VERSION", b"15\n".to_vec()),
        ]);
        let other = data(&[
            ("base/5/100", [later, page(7), page(3), vec![0; PAGE_BYTES]].concat()),
            ("base/5/100_fsm", page(2)),
            ("base/5/100_vm", [page(1), page(3)].concat()),
            ("base/5/PG_VERSION", b"16\n".to_vec()),
        ]);
        let compared = compare(one.path(), other.path(), VERSION).unwrap();
        let named: Vec<(&str, u32)> =
            compared.differing.iter().map(|page| (page.path.to_str().unwrap(), page.block)).collect();
        assert_eq!(named, [("base/5/100", 1), ("base/5/100_vm", 0), ("base/5/101", 0)]);
        assert_eq!((compared.files, compared.pages, compared.masked), (3, 7, 2));
        assert_eq!(compare(one.path(), one.path(), VERSION).unwrap().differing, []);
    }
}
