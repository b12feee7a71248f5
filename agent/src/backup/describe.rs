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
    pub(super) min_recovery_point: Option<Lsn>,
    /// Where the checkpoint record lies from which recovery starts.
    pub(super) checkpoint: Lsn,
    pub(super) wal_witnesses: Vec<WalWitness>,
    /// What the backup could not take with it; one line each.
    pub(super) warnings: Vec<String>,
}

/// A manifest on disk and the entry that names it.
#[derive(Debug)]
pub(super) struct Described {
    manifest: NamedTempFile,
    pub(super) entry: RootBackup,
}

impl Described {
    pub(super) fn body(&self) -> Body {
        Body::File { path: self.manifest.path().to_owned(), len: self.entry.manifest_size }
    }
}

/// Path of a file of the backup by its number.
pub(super) fn path_of(copied: &Copied, file: u32) -> &Path {
    let planned = &copied.shared.plan.files;
    let captured = || &copied.capture.files[file as usize - planned.len()].path;
    planned.get(file as usize).map_or_else(captured, |file| &file.path)
}

/// Writes the manifest and makes the entry.
pub(super) fn describe(
    facts: &Facts,
    copied: &Copied,
    parent: Option<&Parent>,
    scratch: &Path,
) -> io::Result<Described> {
    let out = NamedTempFile::new_in(scratch)?;
    let inherits = parent.is_some() || !copied.shared.resume.is_empty();
    let heritage = inherits.then(|| Heritage::gather(copied, parent, scratch)).transpose()?;
    let head = head(facts, copied, heritage.as_ref(), parent)?;
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
    for link in &plan.links {
        let target = ByteText::new(link.target.as_os_str().as_bytes());
        writer.add(&Line::Link(Link {
            path: relative(&link.path)?,
            target,
            directory: link.leads_to == LinkEnd::Directory,
        }))?;
    }
    let mut packs = copied.packs.clone();
    packs.sort_by_key(|pack| pack.number);
    for pack in &packs {
        writer.add(&Line::Pack(pack.clone()))?;
    }
    match heritage {
        Some(heritage) => heritage.append_to(&mut writer)?,
        None => {
            for copied_file in &copied.files {
                writer.add(&Line::File(file(copied, copied_file)?))?;
            }
        }
    }
    let (out, summary) = writer.finish()?;
    let manifest = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(Described { manifest, entry: entry(&head, &summary) })
}

fn head(facts: &Facts, copied: &Copied, heritage: Option<&Heritage>, parent: Option<&Parent>) -> io::Result<Head> {
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
        label: facts.label_asked.clone(),
        backup_label: ByteText::new(facts.stop.backup_label.clone()),
        tablespace_map: ByteText::new(facts.stop.tablespace_map.clone()),
        mode: root.mode() & 0o7777,
        owner: name_of("/etc/passwd", root.uid()),
        group: name_of("/etc/group", root.gid()),
        references: heritage.map(|heritage| heritage.references.clone()).unwrap_or_default(),
        attempts: heritage.map(|heritage| heritage.attempts.clone()).unwrap_or_default(),
        page_errors: page_errors(facts, copied),
        wal_witnesses: facts.wal_witnesses.clone(),
        warnings: bounded(&facts.warnings),
        page_error_list: page_error_list(facts, copied)?,
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

fn page_errors(facts: &Facts, copied: &Copied) -> u64 {
    copied.files.iter().map(|file| file.pages.count(facts.stop.stop_lsn)).sum()
}

fn page_error_list(facts: &Facts, copied: &Copied) -> io::Result<Vec<PageError>> {
    let mut list = Vec::new();
    for file in &copied.files {
        for (block, problem) in file.pages.problems(facts.stop.stop_lsn) {
            if list.len() == PAGE_ERROR_LIMIT {
                return Ok(list);
            }
            list.push(PageError { path: relative(path_of(copied, file.file))?, block, problem });
        }
    }
    Ok(list)
}

fn file(copied: &Copied, file: &CopiedFile) -> io::Result<File> {
    let plan = &copied.shared.plan;
    let (kind, mode, mtime) = match plan.files.get(file.file as usize) {
        Some(planned) => {
            let kind = match planned.kind {
                ListedKind::Relation(_) => FileKind::Relation,
                ListedKind::ControlFile => FileKind::Control,
                ListedKind::VersionFile | ListedKind::FilenodeMap | ListedKind::Other => FileKind::Other,
            };
            (kind, planned.mode, planned.modified_unix)
        }
        None => {
            let captured = &copied.capture.files[file.file as usize - plan.files.len()];
            (FileKind::Other, captured.mode, captured.modified_unix)
        }
    };
    let layer = Layer { backup: None, file: None, extents: file.extents.clone() };
    Ok(File {
        number: FileNumber(file.file),
        path: relative(path_of(copied, file.file))?,
        kind,
        mode: file.metadata.map_or(mode, |found| found.mode),
        mtime: file.metadata.map_or(mtime, |found| found.modified_unix),
        size: file.size,
        crc32c: file.crc32c,
        layers: if file.extents.is_empty() { Vec::new() } else { vec![layer] },
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
