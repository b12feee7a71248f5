//! From a listing to what is copied, in which order, by which pieces, and why the rest is not. Pure, but that the files of a
//! plan lie on disk ([`super::rows`]): they are gone through one by one.
//!
//! Order: files by path, so that a database's and a relation's segments lie next to one another in the packs, and so that
//! the manifests of two backups can be walked side by side; `global/pg_control` is no piece at all, it is read last by the
//! conductor. Large files are cut into pieces so that several workers share a 1 GiB segment; a piece always starts on a
//! frame boundary. A file that is inherited as a whole has no piece.

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use postgres_format::data_directory::FileKind;
use postgres_format::relation::Fork;
use repository::backup::manifest::Layer;
use repository::byte_text::ByteText;
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use super::BackupError;
use super::changes::Take;
use super::listing::{LinkEnd, ListedDirectory, ListedFile, ListedFiles, ListedLink, ListedTablespace, Listing};
use super::resume::Rest;
use super::rows::{RowReader, RowWriter, Rows, blocks};

/// Bytes of one piece of work. Small enough that two workers end together, large enough that a piece is mostly one
/// stretch of a pack.
pub const PIECE_BYTES: u64 = 32 << 20;

/// A file of a plan, and what of it is copied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// Its place in the plan: its number inside the backup.
    pub number: u32,
    /// The file.
    pub listed: ListedFile,
    /// What of it is read.
    pub take: Take,
    /// Blocks within the file that are read of a [`Take::Listed`].
    #[serde(with = "blocks", default, skip_serializing_if = "RoaringBitmap::is_empty")]
    pub changed: RoaringBitmap,
    /// What of it is left to be sent, if earlier attempts hold any of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) rest: Option<Rest>,
    /// What those hold, the newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) under: Vec<Layer>,
}

/// One stretch of one file, read by one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of the file.
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
#[derive(Clone, Debug)]
pub struct CopyPlan {
    files: Rows<Planned>,
    /// The numbers of its files inside the backup are below it.
    pub count: u32,
    /// Directories, parents first.
    pub directories: Vec<ListedDirectory>,
    /// Links, as written.
    pub links: Vec<ListedLink>,
    /// Tablespaces.
    pub tablespaces: Vec<ListedTablespace>,
    /// Number of `global/pg_control`, which has no piece.
    pub control_file: Option<u32>,
    /// Files left out because an `_init` fork says the relation is unlogged.
    pub unlogged: usize,
    /// Bytes to be read, by the listing.
    pub bytes: u64,
    /// What deserves a look.
    pub remarks: Vec<Remark>,
}

/// Plans to copy all that is listed. `first` is the first file's number; files of the plan are written down in `scratch`.
pub fn plan(listing: Listing, first: u32, scratch: &Path) -> Result<CopyPlan, BackupError> {
    let Listing { files, others } = listing;
    let mut directories = others.directories;
    directories.sort();
    directories.dedup();
    let linked = others.links.iter().filter_map(|link| match link.leads_to {
        LinkEnd::File => None,
        LinkEnd::Directory => Some(Remark::LinkedDirectory(link.path.clone())),
        LinkEnd::Nothing => Some(Remark::DeadLink(link.path.clone())),
    });
    let remarks = linked.chain(others.special.into_iter().map(Remark::Special)).collect();
    // Nothing is told by pages yet.
    let mut drawing = Drawing { count: first, ..Drawing::create_in(scratch, 0)? };
    let unlogged = drawing.add_logged(&files).map_err(BackupError::Scratch)?;
    let Drawing { rows, count, bytes, control_file, .. } = drawing;
    Ok(CopyPlan {
        files: rows.finish().map_err(BackupError::Scratch)?,
        count,
        directories,
        links: others.links,
        tablespaces: others.tablespaces,
        control_file,
        unlogged,
        bytes,
        remarks,
    })
}

impl CopyPlan {
    /// Its files in order; their numbers are those inside the backup.
    pub fn files(&self) -> RowReader<Planned> {
        self.files.iter()
    }

    /// The same files with another word on what of each is copied. `page_bytes` is the size of a page.
    pub fn redrawn(
        self,
        page_bytes: u64,
        scratch: &Path,
        mut redraw: impl FnMut(Planned) -> Result<Planned, BackupError>,
    ) -> Result<Self, BackupError> {
        let mut drawing = Drawing::create_in(scratch, page_bytes)?;
        for planned in self.files() {
            drawing.add(&redraw(planned.map_err(BackupError::Scratch)?)?).map_err(BackupError::Scratch)?;
        }
        let files = drawing.rows.finish().map_err(BackupError::Scratch)?;
        Ok(Self { files, bytes: drawing.bytes, ..self })
    }
}

/// A plan's files while they are written down.
struct Drawing {
    page_bytes: u64,
    rows: RowWriter<Planned>,
    count: u32,
    bytes: u64,
    control_file: Option<u32>,
}

impl Drawing {
    fn create_in(scratch: &Path, page_bytes: u64) -> Result<Self, BackupError> {
        let rows = RowWriter::create_in(scratch).map_err(BackupError::Scratch)?;
        Ok(Self { page_bytes, rows, count: 0, bytes: 0, control_file: None })
    }

    fn add(&mut self, planned: &Planned) -> io::Result<()> {
        self.bytes += planned.bytes(self.page_bytes);
        self.count += 1;
        self.rows.push(planned)
    }

    /// Adds what is copied of all that is listed; gives how many files of unlogged relations are not.
    fn add_logged(&mut self, files: &ListedFiles) -> io::Result<usize> {
        let (mut unlogged, mut relation) = (0, Vec::<ListedFile>::new());
        for row in files.iter()? {
            let (_, file) = row?;
            if relation.first().is_some_and(|first| !of_one_relation(first, &file)) {
                unlogged += self.add_relation(&mut relation)?;
            }
            relation.push(file);
        }
        Ok(unlogged + self.add_relation(&mut relation)?)
    }

    /// Every fork but `_init` of an unlogged relation is made anew at the end of recovery (`ResetUnloggedRelations`).
    fn add_relation(&mut self, files: &mut Vec<ListedFile>) -> io::Result<usize> {
        let is_init = |file: &ListedFile| matches!(&file.kind, FileKind::Relation(of) if of.fork == Fork::Init);
        let is_data = |file: &ListedFile| matches!(file.kind, FileKind::Relation(_)) && !is_init(file);
        let (before, unlogged) = (files.len(), files.iter().any(is_init));
        files.retain(|file| !(unlogged && is_data(file)));
        let left_out = before - files.len();
        for listed in files.drain(..) {
            let number = self.count;
            if matches!(listed.kind, FileKind::ControlFile) {
                self.control_file = Some(number);
            }
            self.add(&Planned::whole(number, listed))?;
        }
        Ok(left_out)
    }
}

/// Whether a file belongs to the relation of one before it. What is no relation has nothing behind it that it must wait for.
fn of_one_relation(one: &ListedFile, other: &ListedFile) -> bool {
    let number = |file: &ListedFile| name(split(&file.path).1).0;
    let same = || split(&one.path).0 == split(&other.path).0 && number(one) == number(other);
    matches!(one.kind, FileKind::Relation(_)) && same()
}

impl Planned {
    /// A file of which all is copied.
    pub fn whole(number: u32, listed: ListedFile) -> Self {
        let (changed, under) = (RoaringBitmap::new(), Vec::new());
        Self { number, listed, take: Take::Whole, changed, rest: None, under }
    }

    /// Work for the readers, in order. `page_bytes` is the size of a page.
    pub fn pieces(&self, page_bytes: u64) -> Vec<Piece> {
        let (number, size) = (self.number, self.listed.size);
        match self.take {
            _ if matches!(self.listed.kind, FileKind::ControlFile) => Vec::new(),
            Take::Nothing => Vec::new(),
            Take::Listed { inherited_blocks } => {
                let grown_from = u64::from(inherited_blocks) * page_bytes;
                cut_at(number, size, &starts(&self.changed, grown_from, size, page_bytes))
            }
            Take::Whole if size <= PIECE_BYTES => {
                vec![Piece { file: number, from: 0, to: size, share: Share::Whole }]
            }
            Take::Whole | Take::Newer { .. } => cut_at(number, size, &every_piece(0, size)),
        }
    }

    /// How many bytes of it are read.
    fn bytes(&self, page_bytes: u64) -> u64 {
        match self.take {
            _ if matches!(self.listed.kind, FileKind::ControlFile) => 0,
            Take::Nothing => 0,
            Take::Listed { inherited_blocks } => {
                let inherited_bytes = u64::from(inherited_blocks) * page_bytes;
                self.changed.len() * page_bytes + self.listed.size.saturating_sub(inherited_bytes)
            }
            Take::Whole | Take::Newer { .. } => self.listed.size,
        }
    }
}

/// A piece from each start to the next, the last one to the end.
fn cut_at(file: u32, size: u64, starts: &[u64]) -> Vec<Piece> {
    let ends = starts.iter().skip(1).copied().chain([size]);
    starts.iter().zip(ends).map(|(from, to)| Piece { file, from: *from, to, share: Share::Part }).collect()
}

fn every_piece(from: u64, size: u64) -> Vec<u64> {
    let step = usize::try_from(PIECE_BYTES).expect("a piece fits memory");
    (from..size).step_by(step).collect()
}

/// Where pieces begin of which each reads about [`PIECE_BYTES`]: listed pages, then all from `grown_from` on.
fn starts(listed: &RoaringBitmap, grown_from: u64, size: u64, page_bytes: u64) -> Vec<u64> {
    let step = usize::try_from(PIECE_BYTES / page_bytes).expect("a piece fits memory").max(1);
    let mut starts: Vec<u64> = listed.iter().step_by(step).map(|block| u64::from(block) * page_bytes).collect();
    // A little growth is read with the last listed pages.
    if starts.is_empty() || size.saturating_sub(grown_from) > PIECE_BYTES / 2 {
        starts.extend(every_piece(grown_from, size));
    }
    if let Some(first) = starts.first_mut() {
        *first = 0;
    }
    starts
}

/// The order of files in plans and manifests: directory, then relation number, then the rest of the name, so that `9999.10`
/// follows `9999.9`.
pub fn compare(a: &Path, b: &Path) -> Ordering {
    let ((of_a, name_a), (of_b, name_b)) = (split(a), split(b));
    // Nearly always it is the same, and paths are slow to take apart.
    let directories = if of_a == of_b { Ordering::Equal } else { path(of_a).cmp(path(of_b)) };
    directories.then_with(|| name(name_a).cmp(&name(name_b))).then_with(|| a.cmp(b))
}

fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// The directory, which may be empty, and the name of a file.
fn split(path: &Path) -> (&[u8], &[u8]) {
    let bytes = path.as_os_str().as_bytes();
    match bytes.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&bytes[..slash], &bytes[slash + 1..]),
        None => (&[], bytes),
    }
}

/// Number, the rest up to a dot, and the number behind that.
fn name(name: &[u8]) -> (u64, &[u8], u64) {
    let digits = name.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (stem, segment) = match name.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&name[..dot], number(&name[dot + 1..])),
        None => (name, 0),
    };
    (number(&name[..digits]), &stem[digits.min(stem.len())..], segment)
}

fn number(digits: &[u8]) -> u64 {
    std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// A path in the order of plans.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "ByteText", into = "ByteText")]
pub struct InOrder(pub PathBuf);

impl Ord for InOrder {
    fn cmp(&self, other: &Self) -> Ordering {
        compare(&self.0, &other.0)
    }
}

impl PartialOrd for InOrder {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl From<ByteText> for InOrder {
    fn from(text: ByteText) -> Self {
        Self(path(text.as_bytes()).to_owned())
    }
}

impl From<InOrder> for ByteText {
    fn from(InOrder(path): InOrder) -> Self {
        Self::new(path.into_os_string().into_vec())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use postgres_format::data_directory::{self, Entry};

    use super::*;
    use crate::backup::listing::Others;
    use crate::backup::rows::Runs;

    fn file(path: &str, size: u64) -> ListedFile {
        let kind = match data_directory::classify(Path::new(path), false) {
            Entry::Copy(kind) => kind,
            other => panic!("{path}: {other:?}"),
        };
        ListedFile { path: path.into(), kind, size, mode: 0o600, modified_unix: 0 }
    }

    /// A plan of all of these files.
    pub(in crate::backup) fn planned(files: &[(&str, u64)]) -> CopyPlan {
        of(files, Others::default())
    }

    fn of(files: &[(&str, u64)], others: Others) -> CopyPlan {
        let scratch = tempfile::tempdir().unwrap();
        let mut listed = Runs::create_in(scratch.path()).unwrap();
        files.iter().for_each(|(path, size)| listed.push(InOrder(path.into()), file(path, *size), 0).unwrap());
        plan(Listing { files: listed.finish().unwrap(), others }, 0, scratch.path()).unwrap()
    }

    fn files(plan: &CopyPlan) -> Vec<Planned> {
        plan.files().map(Result::unwrap).collect()
    }

    fn paths(plan: &CopyPlan) -> Vec<String> {
        files(plan).into_iter().map(|planned| planned.listed.path.display().to_string()).collect()
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
    fn only_files_of_one_relation_wait_for_each_other() {
        let check = |one: &str, other: &str, expected: bool| {
            assert_eq!(of_one_relation(&file(one, 1), &file(other, 1)), expected, "{one} {other}");
        };
        check("base/5/20", "base/5/20.1", true);
        check("base/5/20", "base/5/20_init", true);
        check("base/5/20", "base/5/21", false);
        check("base/5/20", "base/6/20", false);
        check("log/a.log", "log/b.log", false);
        check("log/2026-11-23.log", "log/2026-11-24.log", false);
        // What lies between forks parts nothing.
        check("base/5/20", "base/5/20-x", true);
    }

    #[test]
    fn pieces_cover_every_file_once_and_not_the_control_file() {
        let plan = planned(&[
            ("base/5/20", 3 * PIECE_BYTES - 1),
            ("PG_VERSION", 3),
            ("base/5/21", 0),
            ("global/pg_control", 8192),
        ]);
        let control = plan.control_file.map(|at| paths(&plan)[at as usize].clone());
        assert_eq!((plan.count, control.as_deref()), (4, Some("global/pg_control")));
        for (number, planned) in (0..).zip(files(&plan)) {
            let pieces = planned.pieces(8192);
            assert!(planned.number == number && pieces.iter().all(|piece| piece.file == number));
            if Some(number) == plan.control_file {
                assert!(pieces.is_empty());
                continue;
            }
            assert_eq!(pieces.first().map(|piece| piece.from), Some(0), "{}", planned.listed.path.display());
            assert_eq!(pieces.last().map(|piece| piece.to), Some(planned.listed.size));
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
            let found: Vec<u64> = starts(&listed.iter().collect(), grown_from * page, size * page, page)
                .into_iter()
                .map(|at| at / page)
                .collect();
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
        let remarks = |end| of(&[], Others { links: vec![link(end)], ..Others::default() }).remarks;
        assert_eq!(remarks(LinkEnd::Directory), [Remark::LinkedDirectory("log".into())]);
        assert_eq!(remarks(LinkEnd::File), []);
    }
}
