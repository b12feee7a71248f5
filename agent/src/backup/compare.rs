//! Comparing this server's pages with the newest backup: finds what went bad in silence, here or there.
//!
//! ```text
//! newest backup that ended before our last checkpoint ─▶ its manifest, file after file ─▶ sums in tables of packs
//!                                            pages as they lie on this disk ──▶ differs? ─▶ the stored page itself ─▶ judge
//! ```
//!
//! What a difference means is decided in [`repository::verify::source`]. Nothing of a page travels as long as its sum is the
//! stored one; of a page that differs the frame is read, and the page here once more.
//!
//! Invariants: nothing is written but the manifest in the scratch directory; at most as many bytes a second are read here as
//! was said; memory holds one file's list of pages (some MiB for 1 GiB), a few tables, and what the manifest says of packs.
//! Main forks of relations alone are compared: others are copied whole by every backup, or change without WAL.

mod local;
mod order;
mod stored;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use postgres_format::Lsn;
use postgres_format::control_file::ControlFile;
use postgres_format::data_directory::{Entry, FileKind, classify};
use postgres_format::page::Checksums;
use postgres_format::relation::Fork;
use process::clock;
use repository::backup::BackupError as ObjectError;
use repository::backup::manifest::{File, Line, ManifestDamage};
use repository::backup::origin::BackupType;
use repository::backup::pack::{PackDamage, SUM_UNIT_BYTES};
use repository::store::ObjectStore;
use repository::verify::Share;
use repository::verify::source::{Hints, PAGES_TOLD, PageFault, Rules, SOURCE_SCHEMA, SourcePage, SourceReport, judge};
use thiserror::Error;
use tokio::sync::watch;

pub use order::ordered;

use super::copy::read_control;
use super::pages::PageCheck;
use super::parent::Ours;
use super::parent::find::{self, Found, Library, Parent};
use super::{BackupError, BackupNode};
use local::{CHUNK_BYTES, Local};
use stored::{FilePages, Stored};

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Which files; all if absent.
    pub share: Option<Share>,
    /// Bytes a second at most; 0 for no limit.
    pub bytes_per_second: u64,
}

/// How far it has come.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Bytes read here.
    pub bytes_done: u64,
    /// Bytes that are to be read, about.
    pub bytes_total: u64,
}

/// Why pages are not compared.
#[derive(Debug, Error)]
pub enum CompareError {
    /// The server or the stores do not say what is needed.
    #[error(transparent)]
    Node(#[from] BackupError),
    /// No backup can be compared with.
    #[error("there is nothing to compare with: {reason}")]
    Nothing {
        /// Why not.
        reason: String,
    },
    /// How the server's timeline came about is not known.
    #[error("{reason}")]
    History {
        /// Why not.
        reason: String,
    },
    /// Sums are of another unit.
    #[error("pages of {0} bytes cannot be compared")]
    PageSize(u32),
    /// The manifest, which was read before, is damaged.
    #[error("the backup's manifest cannot be read")]
    Manifest(#[from] ManifestDamage),
    /// A file here.
    #[error("{} cannot be read", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A pack, in no store.
    #[error("what the backup holds of {path} cannot be read")]
    Stored {
        /// Which file.
        path: String,
        /// Why not, in the last store.
        #[source]
        source: Box<ObjectError>,
    },
}

/// Compares the files of a share with the newest backup that is fit for it.
///
/// # Errors
/// See [`CompareError`].
pub async fn compare(
    node: &BackupNode,
    stores: &[Arc<dyn ObjectStore>],
    asked: Asked,
    told: &watch::Sender<Progress>,
) -> Result<SourceReport, CompareError> {
    let began = clock::now();
    let (parent, control) = newest(node, stores).await?;
    let parts = asked.share.map_or(1, |share| share.of.max(1));
    told.send_replace(Progress { bytes_done: 0, bytes_total: parent.entry.data_bytes / u64::from(parts) });
    let holders = stores.iter().filter(|store| parent.holders.contains(store.name().as_str())).cloned().collect();
    let mut comparing = Comparing {
        node,
        stored: Stored::new(holders, node.cluster.clone(), parent.entry.backup),
        check: PageCheck::new(Lsn::new(u64::MAX), &control),
        rules: rules(&parent, &control),
        same_node: parent.head.node == node.node,
        bytes_per_second: asked.bytes_per_second,
        segment_blocks: control.relation_segment_blocks,
        parent: &parent,
        report: empty(node, &parent, asked.share, began),
        told,
    };
    for line in parent.manifest.lines()? {
        match line? {
            Line::Pack(pack) => comparing.stored.lists(&pack),
            Line::File(file) if asked.share.is_none_or(|share| share.takes(&file.path.to_string())) => {
                comparing.file(&file).await?;
            }
            _ => {}
        }
    }
    let mut report = comparing.report;
    report.sound = report.wrong == 0;
    Ok(report)
}

/// The newest backup of this server's history that had ended when our last checkpoint began: what was changed before its start
/// is on the disk.
async fn newest(
    node: &BackupNode,
    stores: &[Arc<dyn ObjectStore>],
) -> Result<(Box<Parent>, ControlFile), CompareError> {
    let identity = node.server.identity().await.map_err(BackupError::from)?;
    let (control, _) = read_control(&node.data_directory).await?;
    if control.system_identifier != identity.system_identifier {
        let (found, expected) = (control.system_identifier, identity.system_identifier);
        return Err(BackupError::Foreign { found, expected }.into());
    }
    if control.block_size as usize != SUM_UNIT_BYTES {
        return Err(CompareError::PageSize(control.block_size));
    }
    let library = Library { stores, cluster: &node.cluster, scratch: &node.scratch };
    let system = identity.system_identifier;
    let history = find::history(library, &node.data_directory, system, control.checkpoint_timeline).await;
    let ours = Ours {
        system_identifier: system,
        postgres_major: identity.major(),
        segment_size_bytes: identity.segment_size.bytes(),
        start_lsn: control.checkpoint_redo,
        history: history.map_err(|reason| CompareError::History { reason })?,
    };
    match find::find(library, BackupType::Incr, &ours, &control).await? {
        Found::Parent(parent) => Ok((parent, control)),
        Found::None { reason } => {
            let reason = format!("{reason}; the server's last checkpoint began at {}", control.checkpoint_redo);
            Err(CompareError::Nothing { reason })
        }
    }
}

fn rules(parent: &Parent, control: &ControlFile) -> Rules {
    let checksums = if control.checksum_version == 1 { Checksums::On } else { Checksums::Off };
    let logged = parent.head.wal_log_hints && control.wal_log_hints;
    Rules { start: parent.head.start_lsn, checksums, hints: if logged { Hints::Logged } else { Hints::Free } }
}

fn empty(node: &BackupNode, parent: &Parent, share: Option<Share>, began: Timestamp) -> SourceReport {
    SourceReport {
        schema: SOURCE_SCHEMA.to_owned(),
        generated: began,
        cluster: node.cluster.clone(),
        node: node.node.clone(),
        backup: parent.entry.backup,
        share,
        sound: false,
        bytes: 0,
        compared: 0,
        changed: 0,
        left_out: 0,
        wrong: 0,
        pages: Vec::new(),
    }
}

struct Comparing<'a> {
    node: &'a BackupNode,
    parent: &'a Parent,
    stored: Stored,
    /// Verifies every page, whatever its LSN.
    check: PageCheck,
    rules: Rules,
    same_node: bool,
    bytes_per_second: u64,
    segment_blocks: u32,
    report: SourceReport,
    told: &'a watch::Sender<Progress>,
}

impl Comparing<'_> {
    async fn file(&mut self, file: &File) -> Result<(), CompareError> {
        let Entry::Copy(FileKind::Relation(relation)) = classify(file.path.as_path(), false) else { return Ok(()) };
        if relation.fork != Fork::Main {
            return Ok(());
        }
        let pages = match self.stored.pages_of(file).await {
            Ok(pages) => pages,
            // The scrub of the stores tells what is damaged there.
            Err(ObjectError::Pack { damage, .. }) => {
                self.leave_out(file, &damage);
                return Ok(());
            }
            Err(source) => return Err(CompareError::Stored { path: file.path.to_string(), source: Box::new(source) }),
        };
        let path = self.node.data_directory.join(file.path.as_path());
        let mut local = Local::new(path.clone(), relation.segment, self.check);
        let mut at = 0;
        loop {
            let (rules, expected) = (self.rules, pages.from(at));
            let looked = tokio::task::spawn_blocking(move || {
                let looked = local.look(at, &expected, &rules);
                (local, looked)
            });
            let (returned, looked) = looked_or_failed(looked.await, &path)?;
            local = returned;
            let looked = looked.map_err(|source| CompareError::Read { path: path.clone(), source })?;
            self.report.bytes += looked.bytes;
            self.report.compared += looked.compared;
            self.report.changed += looked.changed;
            for block in looked.differing {
                local = self.page(file, &pages, local, block).await?;
            }
            self.told.send_modify(|progress| progress.bytes_done = self.report.bytes);
            if looked.bytes < CHUNK_BYTES as u64 {
                return Ok(());
            }
            at += looked.bytes;
            self.rest(looked.bytes).await;
        }
    }

    /// A page that is not as it is stored, or wrong in itself: both are looked at once more.
    async fn page(
        &mut self,
        file: &File,
        pages: &FilePages,
        mut local: Local,
        block: u32,
    ) -> Result<Local, CompareError> {
        let stored = match self.stored.page(file, pages, block).await {
            Ok(stored) => stored,
            Err(ObjectError::Pack { damage, .. }) => {
                self.leave_out(file, &damage);
                return Ok(local);
            }
            Err(source) => return Err(CompareError::Stored { path: file.path.to_string(), source: Box::new(source) }),
        };
        let path = self.node.data_directory.join(file.path.as_path());
        let again = tokio::task::spawn_blocking(move || {
            let page = local.page(block);
            (local, page)
        });
        let (local, page) = looked_or_failed(again.await, &path)?;
        let Some(page) = page.map_err(|source| CompareError::Read { path, source })? else { return Ok(local) };
        let own = pages.is_own(block, &self.parent.entry.backup) && self.same_node;
        let rules = Rules { hints: if own { self.rules.hints } else { Hints::Free }, ..self.rules };
        let number = local.number(block, self.segment_blocks);
        let Some((fault, stored_lsn)) = judge(&page, stored.as_deref(), number, &rules) else { return Ok(local) };
        if fault == PageFault::StoredDamaged && self.is_told(file, block) {
            return Ok(local);
        }
        self.report.wrong += 1;
        if self.report.pages.len() < PAGES_TOLD {
            self.report.pages.push(SourcePage {
                path: file.path.to_string(),
                block,
                fault,
                server_lsn: postgres_format::page::lsn(&page),
                stored_lsn,
                object: pages.object(block, &self.node.cluster),
            });
        }
        Ok(local)
    }

    /// Whether the backup tells of itself that it holds a damaged page there.
    fn is_told(&self, file: &File, block: u32) -> bool {
        self.parent.head.page_error_list.iter().any(|error| error.path == file.path && error.block == block)
    }

    fn leave_out(&mut self, file: &File, damage: &PackDamage) {
        tracing::warn!(path = %file.path, %damage, "what a backup holds of a file cannot be read, so it is not compared");
        self.report.left_out += 1;
    }

    /// After each piece as long as it would take at the allowed rate, so that reading is never faster.
    async fn rest(&self, bytes: u64) {
        if self.bytes_per_second > 0 {
            tokio::time::sleep(Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64)).await;
        }
    }
}

/// A thread that panicked read nothing.
fn looked_or_failed<T>(joined: Result<T, tokio::task::JoinError>, path: &std::path::Path) -> Result<T, CompareError> {
    joined.map_err(|error| CompareError::Read { path: path.to_owned(), source: io::Error::other(error) })
}
