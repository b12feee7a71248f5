//! Made-up backups that can be verified, copied and expired: their packs are there, and hold empty pages.

use std::fs;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use postgres_format::SystemIdentifier;
use repository::backup::manifest::{Directory, File, FileKind, LAYERS, Layer, Line, ManifestWriter, Pack};
use repository::backup::pack::{Extent, FileNumber, FinishedPack, PACK_TARGET_BYTES, PackBuilder};
use repository::backup::{entry, put};
use repository::key;
use repository::name::BackupId;
use repository::root::RootBackup;
use repository::store::{Body, ObjectStore};
use repository::wal::{self, Sink, VariantCheck, WalEncoder, WalFacts};

use super::{PAGE_BYTES, SEGMENT_PAGES, Shape, cluster, file, head, layer, relative};

/// Files of one page in a pack, as agents make them.
const PAGES_IN_PACK: u32 = 8192;
/// Packs of a large file whose pages do not compress.
const PIECES: u32 = 64;
/// Bytes of a large file in one of them, and in one frame.
const PIECE_BYTES: u64 = SEGMENT_PAGES * PAGE_BYTES / PIECES as u64;
const FRAME_BYTES: usize = 64 << 10;
/// Names of one file that a file system allows.
const NAMES_MAX: u32 = 60_000;

/// The system that made-up backups are of.
pub fn system() -> Result<SystemIdentifier> {
    Ok(head(Shape::Small(0))?.system_identifier)
}

/// The identifier of one of several backups, the oldest first.
pub fn id(number: u32) -> BackupId {
    let day = Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_hours(24 * (20_000 + i64::from(number)));
    BackupId::new(day, 1)
}

/// Writes such a backup into the store in a directory, packs and manifest, and gives what a root would say of it. A large
/// file is stored by a backup that does not exist any more.
pub async fn publish(
    store: &dyn ObjectStore,
    directory: &Path,
    backup: BackupId,
    shape: Shape,
    scratch: &Path,
) -> Result<RootBackup> {
    let older = id(0);
    ensure!(backup != older, "{older} is for what does not exist any more");
    let mut head = head(Shape::Small(0))?;
    (head.backup, head.start_time, head.stop_time) = (backup, backup.time(), backup.time());
    if let Shape::Large(_) = shape {
        (head.references, head.critical) = (vec![older], vec![LAYERS.to_owned()]);
    }
    let file = tempfile::NamedTempFile::new_in(scratch)?;
    let mut manifest = ManifestWriter::new(BufWriter::new(file), head.clone())?;
    for path in ["base", "base/5", "global", "pg_wal", "pg_wal/archive_status"] {
        manifest.add(&Line::Directory(Directory { path: relative(path)?, mode: 0o700 }))?;
    }
    match shape {
        Shape::Small(files) => small(&mut manifest, directory, backup, files)?,
        Shape::Large(files) => large(&mut manifest, directory, (backup, older), files)?,
    }
    let (out, summary) = manifest.finish()?;
    let file = out.into_inner()?;
    let entry = entry(&head, &summary);
    let body = Body::File { path: file.path().to_owned(), len: entry.manifest_size };
    put(store, &key::manifest(&cluster()?, &backup), &body, &entry.manifest_sha256).await?;
    Ok(entry)
}

/// Makes the WAL durable that such a backup needs: one empty segment.
pub async fn archive(store: &dyn ObjectStore) -> Result<()> {
    let mut encoder = WalEncoder::new(1, Sink::Memory)?;
    encoder.push(&vec![0; 16 << 20])?;
    let facts = WalFacts {
        cluster: cluster()?,
        system_identifier: system()?,
        name: "000000010000000000000001".parse()?,
        node: "db1".parse()?,
        in_recovery: false,
        complete: true,
        logical_end: None,
        postgres_major: Some(15),
        first_commit_time: None,
        last_commit_time: None,
        written: Timestamp::UNIX_EPOCH,
    };
    wal::put(store, &encoder.finish(facts)?, VariantCheck::List).await?;
    Ok(())
}

type Writer = ManifestWriter<BufWriter<tempfile::NamedTempFile>>;

/// Files of one page, and `pg_control` as the last one.
fn small(manifest: &mut Writer, directory: &Path, backup: BackupId, files: u32) -> Result<()> {
    let mut builder = PackBuilder::new(1, PACK_TARGET_BYTES)?;
    let mut length = 0;
    for number in 0..=files / PAGES_IN_PACK {
        let first = number * PAGES_IN_PACK;
        for file in first..=files.min(first + PAGES_IN_PACK - 1) {
            builder.add(FileNumber(file), 0, &[0; PAGE_BYTES as usize])?;
        }
        let pack = builder.finish(number);
        length = pack.extents.first().context("an empty pack")?.1.length;
        manifest.add(&Line::Pack(keep(directory, backup, &pack)?.listed(None)))?;
    }
    for number in 0..=files {
        let (pack, place) = (number / PAGES_IN_PACK, u64::from(number % PAGES_IN_PACK));
        let extent = Extent { pack, offset: 8 + place * length, length, from: 0, to: PAGE_BYTES, pages: None };
        let one = file(number, PAGE_BYTES, vec![layer(None, vec![extent])])?;
        manifest.add(&Line::File(if number == files { control(one)? } else { one }))?;
    }
    Ok(())
}

fn control(file: File) -> Result<File> {
    Ok(File { path: relative("global/pg_control")?, kind: FileKind::Control, ..file })
}

/// Files of 1 GiB that an older backup stored, all of them as it stored its first: packs of many names.
fn large(manifest: &mut Writer, directory: &Path, (backup, older): (BackupId, BackupId), files: u32) -> Result<()> {
    let mut builder = PackBuilder::new(1, PACK_TARGET_BYTES)?;
    builder.add(FileNumber(files), 0, &[0; PAGE_BYTES as usize])?;
    let own = builder.finish(0);
    manifest.add(&Line::Pack(keep(directory, backup, &own)?.listed(None)))?;
    let mut pieces = Vec::new();
    for piece in 0..PIECES {
        let from = u64::from(piece) * PIECE_BYTES;
        for offset in (from..from + PIECE_BYTES).step_by(FRAME_BYTES) {
            builder.add(FileNumber(0), offset, &[0; FRAME_BYTES])?;
        }
        pieces.push(builder.finish(piece));
    }
    for number in 0..files * PIECES {
        let pack = FinishedPack { number, ..pieces[(number % PIECES) as usize].clone() };
        let first = number % PIECES + number / PIECES / NAMES_MAX * NAMES_MAX * PIECES;
        let kept = match number == first {
            true => keep(directory, older, &pack)?,
            false => {
                let path = |number| directory.join(key::pack(&cluster().expect("a name"), &older, number).as_str());
                let to = path(number);
                fs::create_dir_all(to.parent().context("a key has folders")?)?;
                fs::hard_link(path(first), to)?;
                Kept { number, size: pack.size, sha256: pack.sha256 }
            }
        };
        manifest.add(&Line::Pack(kept.listed(Some(older))))?;
    }
    for number in 0..files {
        let extents = pieces.iter().map(|piece| {
            let (_, extent) = piece.extents[0];
            Extent { pack: number * PIECES + piece.number, ..extent }
        });
        let stored = Layer { file: Some(FileNumber(0)), ..layer(Some(older), extents.collect()) };
        manifest.add(&Line::File(file(number, SEGMENT_PAGES * PAGE_BYTES, vec![stored])?))?;
    }
    let (_, extent) = own.extents[0];
    manifest.add(&Line::File(control(file(files, PAGE_BYTES, vec![layer(None, vec![extent])])?)?))?;
    Ok(())
}

/// A pack that lies in the store.
struct Kept {
    number: u32,
    size: u64,
    sha256: [u8; 32],
}

impl Kept {
    fn listed(self, backup: Option<BackupId>) -> Pack {
        Pack { backup, number: self.number, size: self.size, sha256: self.sha256 }
    }
}

fn keep(directory: &Path, backup: BackupId, pack: &FinishedPack) -> Result<Kept> {
    let path = directory.join(key::pack(&cluster()?, &backup, pack.number).as_str());
    fs::create_dir_all(path.parent().context("a key has folders")?)?;
    let Body::Memory(bytes) = &pack.body else { anyhow::bail!("packs are in memory") };
    fs::write(&path, bytes)?;
    Ok(Kept { number: pack.number, size: pack.size, sha256: pack.sha256 })
}
