//! PURE: from a listing to what is copied, in which order, by which pieces, and why the rest is not.
//!
//! Order: files by path, so that a database's and a relation's segments lie next to one another in the packs, and so that
//! the manifests of two backups can be walked side by side; `global/pg_control` is no piece at all, it is read last by the
//! conductor. Large files are cut into pieces so that several workers share a 1 GiB segment; a piece always starts on a
//! frame boundary. A file that is inherited as a whole has no piece.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use postgres_format::data_directory::FileKind;

use super::changes::{Changes, Geometry, Take};
use super::listing::{LinkEnd, ListedDirectory, ListedFile, ListedLink, ListedTablespace, Listing};

/// Bytes of one piece of work. Small enough that two workers end together, large enough that a piece is mostly one
/// stretch of a pack.
pub const PIECE_BYTES: u64 = 32 << 20;

/// One stretch of one file, read by one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index in [`CopyPlan::files`].
    pub file: u32,
    /// First byte.
    pub from: u64,
    /// Byte after the last, by the listing. A [`Share::Whole`] goes to the size found when the file is opened.
    pub to: u64,
    /// Which share of the file it is.
    pub share: Share,
}

/// Which share of a file a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// The only one.
    Whole,
    /// One of several.
    Part,
}

/// Why the backup needs a human's look although it is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remark {
    /// A linked directory's contents are not in the backup.
    LinkedDirectory(PathBuf),
    /// A link that leads nowhere.
    DeadLink(PathBuf),
    /// A pipe, socket or device.
    Special(PathBuf),
}

impl fmt::Display for Remark {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LinkedDirectory(path) => {
                write!(formatter, "{} links to a directory whose contents are not in the backup", path.display())
            }
            Self::DeadLink(path) => write!(formatter, "{} is a link that leads nowhere", path.display()),
            Self::Special(path) => {
                write!(formatter, "{} is neither file nor directory and was left out", path.display())
            }
        }
    }
}

/// What will be copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyPlan {
    /// Files in order; their indices are the file numbers inside the backup.
    pub files: Vec<ListedFile>,
    /// What of each file is read.
    pub takes: Vec<Take>,
    /// Work for the readers, in order.
    pub pieces: Vec<Piece>,
    /// Directories, parents first.
    pub directories: Vec<ListedDirectory>,
    /// Links, as written.
    pub links: Vec<ListedLink>,
    /// Tablespaces.
    pub tablespaces: Vec<ListedTablespace>,
    /// Index of `global/pg_control`, which has no piece.
    pub control_file: Option<u32>,
    /// Files left out because an `_init` fork says the relation is unlogged.
    pub unlogged: usize,
    /// Bytes to be read, by the listing.
    pub bytes: u64,
    /// What deserves a look.
    pub remarks: Vec<Remark>,
}

/// Orders a listing and cuts it into pieces.
pub fn plan(listing: Listing) -> CopyPlan {
    let unlogged = unlogged_relations(&listing.files);
    let before = listing.files.len();
    let mut files: Vec<ListedFile> =
        listing.files.into_iter().filter(|file| !is_unlogged_data(file, &unlogged)).collect();
    let unlogged = before - files.len();
    files.sort_by(|a, b| compare(&a.path, &b.path));
    let control_file = files.iter().position(|file| matches!(file.kind, FileKind::ControlFile)).map(index);
    let mut directories = listing.directories;
    directories.sort();
    directories.dedup();
    let linked = listing.links.iter().filter_map(|link| match link.leads_to {
        LinkEnd::File => None,
        LinkEnd::Directory => Some(Remark::LinkedDirectory(link.path.clone())),
        LinkEnd::Nothing => Some(Remark::DeadLink(link.path.clone())),
    });
    let remarks = linked.chain(listing.special.into_iter().map(Remark::Special)).collect();
    let takes = vec![Take::Whole; files.len()];
    let (pieces, bytes) = cut(&files, &takes, None);
    CopyPlan {
        files,
        takes,
        pieces,
        directories,
        links: listing.links,
        tablespaces: listing.tablespaces,
        control_file,
        unlogged,
        bytes,
        remarks,
    }
}

impl CopyPlan {
    /// The same files, of which only what changed is read; `takes` says what of each.
    #[must_use]
    pub fn with_changes(self, takes: Vec<Take>, changes: &Changes, geometry: &Geometry) -> Self {
        let (pieces, bytes) = cut(&self.files, &takes, Some((changes, geometry)));
        Self { takes, pieces, bytes, ..self }
    }
}

fn index(position: usize) -> u32 {
    u32::try_from(position).expect("a data directory holds fewer than 2^32 files")
}

/// Pieces of all files, and how many bytes their readers will read.
fn cut(files: &[ListedFile], takes: &[Take], changed: Option<(&Changes, &Geometry)>) -> (Vec<Piece>, u64) {
    let (mut pieces, mut bytes) = (Vec::with_capacity(files.len()), 0);
    for (position, (file, take)) in files.iter().zip(takes).enumerate() {
        let number = index(position);
        match (take, changed) {
            _ if matches!(file.kind, FileKind::ControlFile) => {}
            (Take::Nothing, _) => {}
            (Take::Listed { inherited_blocks }, Some((changes, geometry))) => {
                let listed = changes.listed(file, geometry, 0, *inherited_blocks);
                let grown_from = u64::from(*inherited_blocks) * geometry.page_bytes;
                bytes += listed.len() as u64 * geometry.page_bytes + file.size.saturating_sub(grown_from);
                cut_at(&mut pieces, number, file.size, &starts(&listed, grown_from, file.size, geometry.page_bytes));
            }
            (Take::Newer { .. }, _) => {
                bytes += file.size;
                cut_at(&mut pieces, number, file.size, &every_piece(0, file.size));
            }
            (Take::Whole | Take::Listed { .. }, _) => {
                bytes += file.size;
                if file.size <= PIECE_BYTES {
                    pieces.push(Piece { file: number, from: 0, to: file.size, share: Share::Whole });
                } else {
                    cut_at(&mut pieces, number, file.size, &every_piece(0, file.size));
                }
            }
        }
    }
    (pieces, bytes)
}

/// A piece from each start to the next, the last one to the end.
fn cut_at(pieces: &mut Vec<Piece>, file: u32, size: u64, starts: &[u64]) {
    let ends = starts.iter().skip(1).copied().chain([size]);
    pieces.extend(starts.iter().zip(ends).map(|(from, to)| Piece { file, from: *from, to, share: Share::Part }));
}

fn every_piece(from: u64, size: u64) -> Vec<u64> {
    let step = usize::try_from(PIECE_BYTES).expect("a piece fits memory");
    (from..size).step_by(step).collect()
}

/// Where pieces begin of which each reads about [`PIECE_BYTES`]: listed pages, then all from `grown_from` on.
fn starts(listed: &[u32], grown_from: u64, size: u64, page_bytes: u64) -> Vec<u64> {
    let step = usize::try_from(PIECE_BYTES / page_bytes).expect("a piece fits memory").max(1);
    let mut starts: Vec<u64> = listed.iter().step_by(step).map(|block| u64::from(*block) * page_bytes).collect();
    // A little growth is read with the last listed pages.
    if starts.is_empty() || size.saturating_sub(grown_from) > PIECE_BYTES / 2 {
        starts.extend(every_piece(grown_from, size));
    }
    if let Some(first) = starts.first_mut() {
        *first = 0;
    }
    starts
}

/// The order of files in plans and manifests.
pub fn compare(a: &Path, b: &Path) -> Ordering {
    order(a).cmp(&order(b)).then_with(|| a.cmp(b))
}

/// Directory, then relation number, then the rest of the name, so that `9999.10` follows `9999.9`.
fn order(path: &Path) -> (&Path, u64, &[u8], u64) {
    let directory = path.parent().unwrap_or(Path::new(""));
    let name = path.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
    let digits = name.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (stem, segment) = match name.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&name[..dot], number(&name[dot + 1..])),
        None => (name, 0),
    };
    (directory, number(&name[..digits]), &stem[digits.min(stem.len())..], segment)
}

fn number(digits: &[u8]) -> u64 {
    std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Directory and relation number of every `<number>_init` file.
fn unlogged_relations(files: &[ListedFile]) -> HashSet<(PathBuf, OsString)> {
    files
        .iter()
        .filter(|file| matches!(file.kind, FileKind::Relation(_)))
        .filter_map(|file| {
            let name = file.path.file_name()?.to_str()?;
            let (number, _) = name.split_once("_init")?;
            Some((file.path.parent()?.to_owned(), OsString::from(number)))
        })
        .collect()
}

/// Every fork but `_init` of an unlogged relation is made anew at the end of recovery (`ResetUnloggedRelations`).
fn is_unlogged_data(file: &ListedFile, unlogged: &HashSet<(PathBuf, OsString)>) -> bool {
    if unlogged.is_empty() || !matches!(file.kind, FileKind::Relation(_)) {
        return false;
    }
    let (Some(parent), Some(name)) = (file.path.parent(), file.path.file_name().and_then(|name| name.to_str())) else {
        return false;
    };
    let number: String = name.chars().take_while(char::is_ascii_digit).collect();
    !name.contains("_init") && unlogged.contains(&(parent.to_owned(), OsString::from(number)))
}

#[cfg(test)]
mod tests {
    use postgres_format::data_directory::{self, Entry};

    use super::*;

    fn file(path: &str, size: u64) -> ListedFile {
        let kind = match data_directory::classify(Path::new(path), false) {
            Entry::Copy(kind) => kind,
            other => panic!("{path}: {other:?}"),
        };
        ListedFile { path: path.into(), kind, size, mode: 0o600, modified_unix: 0 }
    }

    fn planned(files: &[(&str, u64)]) -> CopyPlan {
        plan(Listing { files: files.iter().map(|(path, size)| file(path, *size)).collect(), ..Listing::default() })
    }

    fn paths(plan: &CopyPlan) -> Vec<&str> {
        plan.files.iter().map(|file| file.path.to_str().unwrap()).collect()
    }

    #[test]
    fn segments_follow_in_number_order() {
        let plan = planned(&[
            ("base/5/10000", 1),
            ("base/5/9999.10", 1),
            ("base/5/9999_fsm", 1),
            ("base/5/9999.2", 1),
            ("base/5/9999", 1),
        ]);
        assert_eq!(paths(&plan), ["base/5/9999", "base/5/9999.2", "base/5/9999.10", "base/5/9999_fsm", "base/5/10000"]);
    }

    #[test]
    fn unlogged_relations_keep_their_init_fork_only() {
        let plan = planned(&[
            ("base/5/20", 1),
            ("base/5/20.1", 1),
            ("base/5/20_fsm", 1),
            ("base/5/20_init", 1),
            ("base/6/20", 1),
            ("base/5/2", 1),
        ]);
        assert_eq!(paths(&plan), ["base/5/2", "base/5/20_init", "base/6/20"]);
        assert_eq!(plan.unlogged, 3);
    }

    #[test]
    fn pieces_cover_every_file_once_and_not_the_control_file() {
        let plan = planned(&[
            ("base/5/20", 3 * PIECE_BYTES - 1),
            ("PG_VERSION", 3),
            ("base/5/21", 0),
            ("global/pg_control", 8192),
        ]);
        assert_eq!(
            plan.control_file.map(|at| plan.files[at as usize].path.to_str().unwrap()),
            Some("global/pg_control")
        );
        for (position, file) in plan.files.iter().enumerate() {
            let pieces: Vec<&Piece> = plan.pieces.iter().filter(|piece| piece.file as usize == position).collect();
            if Some(index(position)) == plan.control_file {
                assert!(pieces.is_empty());
                continue;
            }
            assert_eq!(pieces.first().map(|piece| piece.from), Some(0), "{}", file.path.display());
            assert_eq!(pieces.last().map(|piece| piece.to), Some(file.size));
            assert!(pieces.windows(2).all(|pair| pair[0].to == pair[1].from));
            assert!(pieces.iter().all(|piece| (piece.share == Share::Whole) == (pieces.len() == 1)));
        }
        assert_eq!(plan.bytes, 3 * PIECE_BYTES + 2);
    }

    #[test]
    fn what_is_read_of_a_changed_file_is_shared_out_evenly() {
        let page = 8192;
        let step = (PIECE_BYTES / page) as u32;
        let check = |listed: &[u32], grown_from: u64, size: u64, expected: &[u64]| {
            let found: Vec<u64> =
                starts(listed, grown_from * page, size * page, page).into_iter().map(|at| at / page).collect();
            assert_eq!(found, expected, "{} listed, {grown_from} to {size}", listed.len());
        };
        check(&[7, 9], 100, 100, &[0]);
        check(&[7, 9], 100, 101, &[0]);
        check(&[], 100, 101, &[0]);
        let every_third: Vec<u32> = (0..2 * step).map(|number| number * 3).collect();
        check(&every_third, 131_072, 131_072, &[0, u64::from(step) * 3]);
        check(&[7], 100, 100 + u64::from(step) + 1, &[0, 100, 100 + u64::from(step)]);
    }

    #[test]
    fn a_linked_directory_is_remarked() {
        let link = |leads_to| ListedLink { path: "log".into(), target: "/var/log".into(), leads_to };
        let remarks = |end| plan(Listing { links: vec![link(end)], ..Listing::default() }).remarks;
        assert_eq!(remarks(LinkEnd::Directory), [Remark::LinkedDirectory("log".into())]);
        assert_eq!(remarks(LinkEnd::File), []);
    }
}
