//! Made-up backups of very many files or very large ones: manifests that nobody's cluster can show us, with nothing behind
//! them. They tell what looking at a backup takes, in memory and time.

pub mod whole;

use std::collections::BTreeMap;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};
use repository::backup::manifest::{Directory, File, FileKind, Head, LAYERS, Layer, Line, ManifestWriter, Pack};
use repository::backup::pack::{Extent, FileNumber};
use repository::backup::{entry, put};
use repository::byte_text::RelativePath;
use repository::config::{StoreConfig, StoreKind};
use repository::identity::{self, RepositoryIdentity};
use repository::key;
use repository::name::{BackupId, ClusterName};
use repository::root::RootBackup;
use repository::store::{Body, ObjectStore};

/// Size of a page, in bytes.
const PAGE_BYTES: u64 = 8192;
/// Pages in a full file of a relation.
const SEGMENT_PAGES: u64 = 131_072;
/// Size of a pack, in bytes.
const PACK_BYTES: u64 = 16 << 20;
/// Length of one page in a pack, in bytes: it compresses to a third.
const STORED_PAGE_BYTES: u64 = PAGE_BYTES / 3;
/// Increments below a backup of large files.
const INCREMENTS: u64 = 30;
/// Pages of a large file that changed from one to the next: 1 %.
const CHANGED_PAGES: u64 = SEGMENT_PAGES / 100;

/// What a backup is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// So many files of one page each, all of them stored by this backup.
    Small(u32),
    /// So many files of 1 GiB each: stored whole by a first backup, with 1 % of the pages in each of 30 increments.
    Large(u32),
}

/// The cluster that it is of.
pub fn cluster() -> Result<ClusterName> {
    Ok("synthetic".parse()?)
}

/// A directory as a store.
pub fn store_at(directory: &Path) -> StoreConfig {
    let kind =
        StoreKind::Directory(repository::config::DirectoryConfig { path: directory.to_owned(), full_percent: 100 });
    StoreConfig { name: "repo1".parse().expect("a name of letters and a digit"), kind }
}

/// Writes the manifest of such a backup into an empty store and gives what a root would say of it.
pub async fn publish(store: &dyn ObjectStore, shape: Shape, scratch: &Path) -> Result<RootBackup> {
    let identity =
        r#"{"format":1,"repository":"0199c0de-0000-7000-8000-000000000001","created":"2026-11-23T01:02:03Z"}"#;
    let _ = identity::create(store, &RepositoryIdentity::from_bytes(identity.as_bytes())?).await?;
    let head = head(shape)?;
    let file = tempfile::NamedTempFile::new_in(scratch)?;
    let mut manifest = ManifestWriter::new(BufWriter::new(file), head.clone())?;
    for path in ["base", "base/5", "global", "pg_wal", "pg_wal/archive_status"] {
        manifest.add(&Line::Directory(Directory { path: relative(path)?, mode: 0o700 }))?;
    }
    for pack in packs(shape, &head.references) {
        manifest.add(&Line::Pack(pack))?;
    }
    match shape {
        Shape::Small(files) => {
            (0..files).try_for_each(|number| manifest.add(&Line::File(small(number)?)).context("a file"))?
        }
        Shape::Large(files) => {
            (0..files)
                .try_for_each(|number| manifest.add(&Line::File(large(number, &head.references)?)).context("a file"))?;
        }
    }
    let (Shape::Small(files) | Shape::Large(files)) = shape;
    manifest.add(&Line::File(control(files)?))?;
    let (out, summary) = manifest.finish()?;
    let file = out.into_inner()?;
    let entry = entry(&head, &summary);
    let body = Body::File { path: file.path().to_owned(), len: entry.manifest_size };
    put(store, &key::manifest(&cluster()?, &entry.backup), &body, &entry.manifest_sha256).await?;
    Ok(entry)
}

/// Puts something of the right size in the place of each pack that such a backup lists, into the directory that the store is.
pub fn make_packs(directory: &Path, shape: Shape) -> Result<()> {
    let head = head(shape)?;
    for pack in packs(shape, &head.references) {
        let owner = pack.backup.unwrap_or(head.backup);
        let path = directory.join(key::pack(&cluster()?, &owner, pack.number).as_str());
        std::fs::create_dir_all(path.parent().context("a key has folders")?)?;
        std::fs::File::create(path)?.set_len(pack.size)?;
    }
    Ok(())
}

fn relative(path: &str) -> Result<RelativePath> {
    Ok(RelativePath::new(path.as_bytes())?)
}

fn id(number: u64) -> BackupId {
    let text = format!("202611{:02}T010203Z-00000001", number % 28 + 1);
    let text = if number < 28 { text } else { text.replacen("202611", "202612", 1) };
    text.parse().expect("spelt as identifiers are")
}

fn head(shape: Shape) -> Result<Head> {
    let (references, critical) = match shape {
        Shape::Small(_) => (Vec::new(), Vec::new()),
        Shape::Large(_) => ((0..INCREMENTS).map(id).collect(), vec![LAYERS.to_owned()]),
    };
    let json = serde_json::json!({
        "format": Head::FORMAT, "tool": "synthetic", "backup": id(INCREMENTS), "cluster": cluster()?,
        "system_identifier": "7300000000000000001", "node": "db1", "from_standby": false, "postgres_major": 15,
        "control_version": 1300, "catalog_version": 202_209_061, "segment_size_bytes": 16 << 20, "block_size": PAGE_BYTES,
        "relation_segment_blocks": SEGMENT_PAGES, "checksum_version": 1, "start_timeline": 1, "start_lsn": "0/1000028",
        "start_time": "2026-12-30T01:02:03Z", "stop_timeline": 1, "stop_lsn": "0/1000100",
        "stop_time": "2026-12-30T02:02:03Z", "min_recovery_point": null, "label": "", "backup_label": "",
        "tablespace_map": "", "mode": 0o700, "owner": null, "group": null, "page_errors": 0,
    });
    let head: Head = serde_json::from_value(json)?;
    Ok(Head { references, critical, unknown: BTreeMap::new(), ..head })
}

/// Where so many stored bytes of a file lie, if every file has as many: packs are full of whole files one after the other.
fn place(number: u32, stored_bytes: u64) -> (u32, u64) {
    let in_pack = (PACK_BYTES - 1024) / stored_bytes;
    let (pack, at) = (u64::from(number) / in_pack, u64::from(number) % in_pack);
    (u32::try_from(pack).expect("few enough packs"), 8 + at * stored_bytes)
}

fn packs(shape: Shape, references: &[BackupId]) -> Vec<Pack> {
    let pack = |backup, number| Pack { backup, number, size: PACK_BYTES, sha256: [7; 32] };
    let up_to = |files: u32, stored_bytes| 0..=place(files, stored_bytes).0;
    match shape {
        Shape::Small(files) => up_to(files, STORED_PAGE_BYTES).map(|number| pack(None, number)).collect(),
        Shape::Large(files) => {
            let changed = || up_to(files, CHANGED_PAGES * STORED_PAGE_BYTES);
            let mut packs: Vec<Pack> = changed().map(|number| pack(None, number)).collect();
            let whole = 0..files * pieces() + 1;
            packs.extend(whole.map(|number| pack(Some(references[0]), number)));
            for backup in &references[1..] {
                packs.extend(changed().map(|number| pack(Some(*backup), number)));
            }
            packs
        }
    }
}

/// Packs that a whole large file takes.
fn pieces() -> u32 {
    u32::try_from((SEGMENT_PAGES * STORED_PAGE_BYTES).div_ceil(PACK_BYTES - 1024)).expect("some tens")
}

fn file(number: u32, size: u64, layers: Vec<Layer>) -> Result<File> {
    Ok(File {
        number: FileNumber(number),
        path: relative(&format!("base/5/{}", u64::from(number) + 16_384))?,
        kind: FileKind::Relation,
        mode: 0o600,
        mtime: 1_790_000_000,
        size,
        crc32c: (layers.len() == 1).then_some(number),
        layers,
    })
}

fn layer(backup: Option<BackupId>, extents: Vec<Extent>) -> Layer {
    Layer { backup, file: None, extents }
}

fn small(number: u32) -> Result<File> {
    let (pack, offset) = place(number, STORED_PAGE_BYTES);
    let extent = Extent { pack, offset, length: STORED_PAGE_BYTES, from: 0, to: PAGE_BYTES, pages: None };
    file(number, PAGE_BYTES, vec![layer(None, vec![extent])])
}

fn control(number: u32) -> Result<File> {
    Ok(File { path: relative("global/pg_control")?, kind: FileKind::Control, ..small(number)? })
}

fn large(number: u32, references: &[BackupId]) -> Result<File> {
    let size = SEGMENT_PAGES * PAGE_BYTES;
    let (pack, offset) = place(number, CHANGED_PAGES * STORED_PAGE_BYTES);
    let changed = Extent {
        pack,
        offset,
        length: CHANGED_PAGES * STORED_PAGE_BYTES,
        from: 0,
        to: size,
        pages: Some(u32::try_from(CHANGED_PAGES)?),
    };
    let newer = references[1..].iter().rev().map(|backup| layer(Some(*backup), vec![changed]));
    let mut layers: Vec<Layer> = std::iter::once(layer(None, vec![changed])).chain(newer).collect();
    let piece_bytes = (size / u64::from(pieces())).next_multiple_of(PAGE_BYTES);
    let piece = |piece: u32| {
        let from = u64::from(piece) * piece_bytes;
        let to = (from + piece_bytes).min(size);
        let length = (to - from) / PAGE_BYTES * STORED_PAGE_BYTES;
        Extent { pack: number * pieces() + piece, offset: 8, length, from, to, pages: None }
    };
    layers.push(layer(Some(references[0]), (0..pieces()).map(piece).collect()));
    file(number, size, layers)
}
