//! From what was copied, and what the parent has of it, to the manifest and the backup's entry in the root. Writes in the
//! scratch directory.
//!
//! Every layer of every file is written out, so that nobody who restores follows the parent.

mod heritage;

use std::io::{self, BufWriter};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use postgres_format::data_directory::FileKind as ListedKind;
use postgres_format::{Lsn, Timeline};
use repository::backup::entry;
use repository::backup::manifest::{
    Directory, File, FileKind, Head, LAYERS, Layer, Line, Link, ManifestWriter, PAGE_ERROR_LIMIT, PageError, Tablespace,
};
use repository::backup::origin::{BackupType, ChangeSource};
use repository::backup::pack::FileNumber;
use repository::byte_text::{ByteText, RelativePath};
use repository::name::{BackupId, ClusterName, NodeName};
use repository::root::{RootBackup, WARNING_LIMIT};
use repository::store::Body;
use repository::witness::WalWitness;
use tempfile::NamedTempFile;

use super::assembly::CopiedFile;
use super::copy::Copied;
use super::listing::LinkEnd;
use super::parent::find::Parent;
use super::part::PrimaryPart;
use super::plan::Planned;
use crate::postgres::{BackupStop, Identity};
use heritage::Heritage;

/// Directories of captured configuration are private: the files may hold passwords.
const CAPTURE_DIRECTORY_MODE: u32 = 0o700;

/// What holds for the whole backup.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) backup: BackupId,
    pub(super) backup_type: BackupType,
    pub(super) changes: ChangeSource,
    pub(super) cluster: ClusterName,
    pub(super) node: NodeName,
    pub(super) identity: Identity,
    pub(super) label_asked: String,
    pub(super) start_lsn: Lsn,
    pub(super) start_timeline: Timeline,
    pub(super) start_time: Timestamp,
    pub(super) stop: BackupStop,
    pub(super) stop_timeline: Timeline,
    pub(super) from_standby: bool,
    /// The primary that started and stopped it, if that was another node.
    pub(super) primary: Option<NodeName>,
    pub(super) min_recovery_point: Option<Lsn>,
    /// Where the checkpoint record lies from which recovery starts.
    pub(super) checkpoint: Lsn,
    pub(super) wal_witnesses: Vec<WalWitness>,
    /// What the backup could not take with it; one line each.
    pub(super) warnings: Vec<String>,
}

/// What was found in the pages of all files.
#[derive(Clone, Debug, Default)]
struct PageTroubles {
    /// Bad pages.
    count: u64,
    /// As many of them as are named.
    list: Vec<PageError>,
    /// A line for each file that has any, as far as they are kept.
    lines: Vec<String>,
    /// Files for which there is no line.
    more: usize,
}

/// A manifest on disk and the entry that names it.
#[derive(Debug)]
pub(super) struct Described {
    manifest: NamedTempFile,
    pub(super) entry: RootBackup,
    /// What deserves a human's look; one line each.
    pub(super) warnings: Vec<String>,
}

impl Described {
    /// The whole manifest.
    pub(super) fn read(&self) -> io::Result<Vec<u8>> {
        std::fs::read(self.manifest.path())
    }

    pub(super) fn body(&self) -> Body {
        Body::File { path: self.manifest.path().to_owned(), len: self.entry.manifest_size }
    }
}

/// Writes the manifest and makes the entry. The primary's part, if there is one, has the last packs and files.
pub(super) fn describe(
    facts: &Facts,
    copied: &Copied,
    parent: Option<&Parent>,
    part: Option<&PrimaryPart>,
    scratch: &Path,
) -> io::Result<Described> {
    let out = NamedTempFile::new_in(scratch)?;
    let inherits = parent.is_some() || !copied.shared.resume.is_empty();
    let heritage = inherits.then(|| Heritage::gather(copied, parent, scratch)).transpose()?;
    let troubles = PageTroubles::of(facts, copied)?;
    let warnings = troubles.warnings(&facts.warnings);
    let head = Head { warnings: bounded(&warnings), ..head(facts, copied, heritage.as_ref(), parent, &troubles)? };
    let mut writer = ManifestWriter::new(BufWriter::new(out), head.clone())?;
    let plan = &copied.shared.plan;
    for tablespace in &plan.tablespaces {
        let location = ByteText::new(tablespace.location.as_os_str().as_bytes());
        writer.add(&Line::Tablespace(Tablespace { oid: tablespace.oid, location, mode: tablespace.mode }))?;
    }
    for directory in plan.directories.iter().filter(|directory| !directory.path.as_os_str().is_empty()) {
        writer.add(&Line::Directory(Directory { path: relative(&directory.path)?, mode: directory.mode }))?;
    }
    for path in capture_directories(copied) {
        writer.add(&Line::Directory(Directory { path: relative(&path)?, mode: CAPTURE_DIRECTORY_MODE }))?;
    }
    for directory in part.into_iter().flat_map(|part| &part.directories) {
        writer.add(&Line::Directory(directory.clone()))?;
    }
    for link in part.into_iter().flat_map(|part| &part.links) {
        writer.add(&Line::Link(link.clone()))?;
    }
    for link in &plan.links {
        let target = ByteText::new(link.target.as_os_str().as_bytes());
        writer.add(&Line::Link(Link {
            path: relative(&link.path)?,
            target,
            directory: link.leads_to == LinkEnd::Directory,
        }))?;
    }
    for pack in copied.packs()? {
        writer.add(&Line::Pack(pack?))?;
    }
    for pack in part.into_iter().flat_map(|part| &part.packs) {
        writer.add(&Line::Pack(pack.clone()))?;
    }
    match heritage {
        Some(heritage) => heritage.append_to(&mut writer)?,
        None => {
            for joined in copied.files()? {
                let (planned, copied_file) = joined?;
                writer.add(&Line::File(file(&planned, copied_file)?))?;
            }
        }
    }
    for file in part.into_iter().flat_map(|part| &part.files) {
        writer.add(&Line::File(file.clone()))?;
    }
    let (out, summary) = writer.finish()?;
    let manifest = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(Described { manifest, entry: entry(&head, &summary), warnings })
}

fn head(
    facts: &Facts,
    copied: &Copied,
    heritage: Option<&Heritage>,
    parent: Option<&Parent>,
    troubles: &PageTroubles,
) -> io::Result<Head> {
    let control = &copied.control;
    let root = std::fs::metadata(&copied.shared.data_directory)?;
    let name_of = |file: &str, number: u32| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        text.lines().find_map(|line| name_in(line, number))
    };
    Ok(Head {
        format: Head::FORMAT,
        critical: heritage.filter(|heritage| heritage.layered).map(|_| LAYERS.to_owned()).into_iter().collect(),
        tool: concat!("pgconvoy ", env!("CARGO_PKG_VERSION")).to_owned(),
        backup: facts.backup,
        backup_type: facts.backup_type,
        parent: parent.map(|parent| parent.entry.backup),
        changes: Some(facts.changes.clone()),
        cluster: facts.cluster.clone(),
        system_identifier: facts.identity.system_identifier,
        node: facts.node.clone(),
        from_standby: facts.from_standby,
        primary: facts.primary.clone(),
        postgres_major: facts.identity.major(),
        control_version: control.version(),
        catalog_version: control.catalog_version,
        segment_size_bytes: facts.identity.segment_size.bytes(),
        block_size: control.block_size,
        relation_segment_blocks: control.relation_segment_blocks,
        checksum_version: control.checksum_version,
        wal_log_hints: control.wal_log_hints,
        start_timeline: facts.start_timeline,
        start_lsn: facts.start_lsn,
        start_time: facts.start_time,
        stop_timeline: facts.stop_timeline,
        stop_lsn: facts.stop.stop_lsn,
        stop_time: facts.stop.stopped,
        min_recovery_point: facts.min_recovery_point,
        start_next_xid: copied.start_next_xid,
        stop_next_xid: facts.stop.next_xid,
        last_commit_time: facts.stop.last_commit,
        label: facts.label_asked.clone(),
        backup_label: ByteText::new(facts.stop.backup_label.clone()),
        tablespace_map: ByteText::new(facts.stop.tablespace_map.clone()),
        mode: root.mode() & 0o7777,
        owner: name_of("/etc/passwd", root.uid()),
        group: name_of("/etc/group", root.gid()),
        references: heritage.map(|heritage| heritage.references.clone()).unwrap_or_default(),
        attempts: heritage.map(|heritage| heritage.attempts.clone()).unwrap_or_default(),
        page_errors: troubles.count,
        wal_witnesses: facts.wal_witnesses.clone(),
        warnings: Vec::new(),
        page_error_list: troubles.list.clone(),
        databases: facts.stop.databases.clone(),
        wal_directory: std::fs::read_link(copied.shared.data_directory.join("pg_wal"))
            .ok()
            .map(|led_to| ByteText::new(led_to.as_os_str().as_bytes())),
        unknown: Default::default(),
    })
}

/// As many warnings as an entry carries; the last line tells of more.
fn bounded(warnings: &[String]) -> Vec<String> {
    let mut bounded = warnings.to_vec();
    if warnings.len() > WARNING_LIMIT {
        bounded.truncate(WARNING_LIMIT - 1);
        bounded.push(format!("{} more, see the log of the agent", warnings.len() - bounded.len()));
    }
    bounded
}

/// `name:x:number:…` in both account files.
fn name_in(line: &str, number: u32) -> Option<String> {
    let mut fields = line.split(':');
    let (name, _, found) = (fields.next()?, fields.next()?, fields.next()?);
    (found.parse() == Ok(number)).then(|| name.to_owned())
}

impl PageTroubles {
    fn of(facts: &Facts, copied: &Copied) -> io::Result<Self> {
        let (mut troubles, stop) = (Self::default(), facts.stop.stop_lsn);
        for joined in copied.files()? {
            let (Planned { listed, .. }, CopiedFile { pages, .. }) = joined?;
            troubles.count += pages.count(stop);
            for (block, problem) in pages.problems(stop) {
                if troubles.list.len() < PAGE_ERROR_LIMIT {
                    troubles.list.push(PageError { path: relative(&listed.path)?, block, problem });
                }
            }
            match pages.trouble(stop) {
                Some(trouble) if troubles.lines.len() < WARNING_LIMIT => {
                    troubles.lines.push(format!("{}: {trouble}", listed.path.display()));
                }
                Some(_) => troubles.more += 1,
                None => {}
            }
        }
        Ok(troubles)
    }

    /// All warnings, after those of another kind.
    fn warnings(&self, others: &[String]) -> Vec<String> {
        let more = (self.more > 0).then(|| format!("{} more files have corrupt pages", self.more));
        others.iter().chain(&self.lines).cloned().chain(more).collect()
    }
}

fn file(planned: &Planned, copied: CopiedFile) -> io::Result<File> {
    let listed = &planned.listed;
    let kind = match listed.kind {
        ListedKind::Relation(_) => FileKind::Relation,
        ListedKind::ControlFile => FileKind::Control,
        ListedKind::VersionFile | ListedKind::FilenodeMap | ListedKind::Other => FileKind::Other,
    };
    let CopiedFile { size, crc32c, metadata, extents, .. } = copied;
    let layer = |extents| Layer { backup: None, file: None, extents };
    Ok(File {
        number: FileNumber(planned.number),
        path: relative(&listed.path)?,
        kind,
        mode: metadata.map_or(listed.mode, |found| found.mode),
        mtime: metadata.map_or(listed.modified_unix, |found| found.modified_unix),
        size,
        crc32c,
        layers: if extents.is_empty() { Vec::new() } else { vec![layer(extents)] },
    })
}

/// Every directory above a captured file, parents first.
fn capture_directories(copied: &Copied) -> Vec<PathBuf> {
    let above = |path: &Path| {
        path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()).map(Path::to_owned).collect::<Vec<_>>()
    };
    let mut directories: Vec<PathBuf> = copied.capture.files.iter().flat_map(|file| above(&file.path)).collect();
    directories.sort();
    directories.dedup();
    directories
}

fn relative(path: &Path) -> io::Result<RelativePath> {
    RelativePath::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}
