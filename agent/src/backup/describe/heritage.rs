//! What a backup inherits: the layers of attempts it went on from and those of the parent under its own, and the packs that
//! hold them.
//!
//! Plan and parent's manifest are walked side by side, and lines are written to disk as they are made, because which packs
//! are referred to is known only at the end and stands before the files. Memory grows with their packs alone, by some bytes each.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use repository::backup::EntrySpool;
use repository::backup::manifest::{File, Layer, Line, ManifestDamage, ManifestWriter, Pack};
use repository::name::BackupId;

use super::file;
use crate::backup::changes::Take;
use crate::backup::copy::Copied;
use crate::backup::parent::find::Parent;
use crate::backup::plan::Planned;
use crate::backup::rows::{Runs, Sorted};

/// All files of a backup with a parent, and what they refer to.
pub(super) struct Heritage {
    files: EntrySpool,
    packs: OlderPacks,
    /// Backups whose packs are referred to, the oldest first.
    pub(super) references: Vec<BackupId>,
    /// Those of them that are attempts, the oldest first.
    pub(super) attempts: Vec<BackupId>,
    /// Whether any file is more than its own contiguous extents.
    pub(super) layered: bool,
}

impl Heritage {
    /// Makes the lines of all files.
    pub(super) fn gather(copied: &Copied, parent: Option<&Parent>, scratch: &Path) -> io::Result<Self> {
        let (mut spool, mut layered) = (EntrySpool::create_in(scratch)?, false);
        let resume = &copied.shared.resume;
        let of_parent = |parent: &Parent| {
            Ok::<_, io::Error>(packs_of(parent.manifest.lines().map_err(damaged)?, parent.entry.backup))
        };
        let theirs = parent.map(of_parent).transpose()?;
        let mut packs = OlderPacks::gather(theirs.into_iter().flatten(), resume.packs(), scratch)?;
        let mut parents = parent.map(|parent| parent.manifest.files().map_err(damaged)).transpose()?;
        for joined in copied.files()? {
            let (planned, copied_file) = joined?;
            let mut line = file(&planned, copied_file)?;
            let Planned { mut under, take, listed, .. } = planned;
            let mut as_there = None;
            if let (Some(parents), Some(parent)) = (&mut parents, parent.filter(|_| take != Take::Whole)) {
                let gone = || io::Error::other(format!("{} is not in the parent any more", listed.path.display()));
                let theirs = parents.find(&listed.path).map_err(damaged)?.ok_or_else(gone)?;
                let untouched = line.layers.is_empty() && under.is_empty() && line.size == theirs.size;
                as_there = theirs.crc32c.filter(|_| untouched);
                under.extend(inherited(&line, &theirs, parent.entry.backup));
            }
            if !under.is_empty() {
                line = laid_over(line, under, as_there);
            }
            layered |= line.is_layered();
            line.layers.iter().try_for_each(|layer| packs.need(layer))?;
            spool.push(&line)?;
        }
        let referred = packs.referred();
        let attempts: Vec<BackupId> = resume.attempts().rev().filter(|attempt| referred.contains(attempt)).collect();
        let older =
            parent.into_iter().flat_map(|parent| parent.head.references.iter().copied().chain([parent.entry.backup]));
        let references = older.filter(|backup| referred.contains(backup)).chain(attempts.iter().copied()).collect();
        Ok(Self { files: spool, references, attempts, packs, layered })
    }

    /// Writes packs and files, after the backup's own packs.
    pub(super) fn append_to<W: io::Write>(self, writer: &mut ManifestWriter<W>) -> io::Result<()> {
        for pack in self.packs.needed()? {
            writer.add(&Line::Pack(pack?))?;
        }
        self.files.append_to(writer)
    }
}

/// The layers of a file that its parent `of` has.
fn inherited(line: &File, theirs: &File, of: BackupId) -> Vec<Layer> {
    let layer = |layer: &Layer| Layer {
        backup: Some(layer.backup.unwrap_or(of)),
        file: Some(theirs.number_in(layer)).filter(|number| *number != line.number),
        extents: layer.extents.clone(),
    };
    theirs.layers.iter().map(layer).collect()
}

/// A file's own layer over others, without what does not show. `as_there` is the checksum of all that lies under it, if that
/// is the whole file.
fn laid_over(mut line: File, under: Vec<Layer>, as_there: Option<u32>) -> File {
    let read = line.crc32c;
    line.layers.extend(under);
    line.drop_hidden();
    line.crc32c = if line.is_layered() { as_there } else { read };
    line
}

/// The packs that a parent refers to, its own among them, and those of attempts; and which of them are needed. What is said
/// of each lies on disk.
struct OlderPacks {
    packs: Sorted<(BackupId, u32), Pack>,
    /// In the same order: by backup and number.
    needed: Vec<(BackupId, u32, bool)>,
}

impl OlderPacks {
    fn gather(
        parents: impl Iterator<Item = io::Result<Pack>>,
        attempts: impl Iterator<Item = io::Result<Pack>>,
        scratch: &Path,
    ) -> io::Result<Self> {
        let (mut packs, mut needed) = (Runs::create_in(scratch)?, Vec::new());
        for pack in parents.chain(attempts) {
            let pack = pack?;
            let Some(backup) = pack.backup else { continue };
            needed.push((backup, pack.number, false));
            packs.push((backup, pack.number), pack, 0)?;
        }
        needed.sort_unstable();
        Ok(Self { packs: packs.finish()?, needed })
    }

    fn need(&mut self, layer: &Layer) -> io::Result<()> {
        let Some(backup) = layer.backup else { return Ok(()) };
        for extent in &layer.extents {
            let wanted = (backup, extent.pack);
            let place = self.needed.binary_search_by_key(&wanted, |(backup, number, _)| (*backup, *number));
            let missing =
                || io::Error::other(format!("pack {} of {backup} is in neither parent nor attempt", extent.pack));
            self.needed[place.map_err(|_| missing())?].2 = true;
        }
        Ok(())
    }

    /// Backups of which packs are needed.
    fn referred(&self) -> HashSet<BackupId> {
        self.needed.iter().filter(|(.., needed)| *needed).map(|(backup, ..)| *backup).collect()
    }

    /// Those that are needed, in order.
    fn needed(&self) -> io::Result<impl Iterator<Item = io::Result<Pack>> + '_> {
        let packs = self.packs.iter()?.zip(&self.needed);
        Ok(packs.filter(|(_, (.., needed))| *needed).map(|(row, _)| row.map(|(_, pack)| pack)))
    }
}

/// The packs of a manifest as those who build on the backup `of` refer to them.
fn packs_of(
    lines: impl Iterator<Item = Result<Line, ManifestDamage>>,
    of: BackupId,
) -> impl Iterator<Item = io::Result<Pack>> {
    let no_file = |line: &Result<Line, _>| !matches!(line, Ok(Line::File(_) | Line::End(_)));
    lines.take_while(no_file).filter_map(move |line| match line {
        Ok(Line::Pack(pack)) => Some(Ok(Pack { backup: Some(pack.backup.unwrap_or(of)), ..pack })),
        Ok(_) => None,
        Err(damage) => Some(Err(damaged(damage))),
    })
}

fn damaged(damage: ManifestDamage) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, damage)
}

#[cfg(test)]
mod tests {
    use repository::backup::manifest::FileKind;
    use repository::backup::pack::{Extent, FileNumber};
    use repository::byte_text::RelativePath;

    use super::*;

    const PAGE: u64 = 8192;

    fn id(number: u32) -> BackupId {
        format!("2026112{number}T010203Z-00000001").parse().unwrap()
    }

    fn extent(pack: u32, from: u64, to: u64, pages: Option<u32>) -> Extent {
        Extent { pack, offset: 8, length: 100, from: from * PAGE, to: to * PAGE, pages }
    }

    fn line(number: u32, pages: u64, crc32c: Option<u32>, layers: Vec<Layer>) -> File {
        File {
            number: FileNumber(number),
            path: RelativePath::new("base/5/16384").unwrap(),
            kind: FileKind::Relation,
            mode: 0o600,
            mtime: 0,
            size: pages * PAGE,
            crc32c,
            layers,
        }
    }

    fn own(extents: &[Extent]) -> Layer {
        Layer { backup: None, file: None, extents: extents.to_vec() }
    }

    #[test]
    fn own_pages_lie_over_all_that_the_parent_had() {
        let older = Layer { backup: Some(id(1)), file: Some(FileNumber(9)), extents: vec![extent(4, 0, 10, None)] };
        let theirs = line(7, 10, None, vec![own(&[extent(0, 2, 5, Some(2))]), older]);
        let ours = line(9, 12, None, vec![own(&[extent(0, 1, 2, Some(1)), extent(0, 10, 12, None)])]);
        let under = inherited(&ours, &theirs, id(2));
        let ours = laid_over(ours, under, None);
        ours.check_layers(8192).unwrap();
        let layers: Vec<_> = ours.layers.iter().map(|layer| (layer.backup, layer.file)).collect();
        assert_eq!(layers, [(None, None), (Some(id(2)), Some(FileNumber(7))), (Some(id(1)), None)]);
        assert_eq!(ours.crc32c, None);
    }

    #[test]
    fn what_is_all_there_keeps_its_checksum() {
        let there = || vec![Layer { backup: Some(id(2)), file: None, extents: vec![extent(3, 0, 10, None)] }];
        assert_eq!(laid_over(line(7, 10, Some(5), Vec::new()), there(), Some(77)).crc32c, Some(77));
        assert_eq!(laid_over(line(7, 9, None, Vec::new()), there(), None).crc32c, None);
        let anew = laid_over(line(7, 10, Some(5), vec![own(&[extent(0, 0, 10, None)])]), there(), None);
        assert_eq!((anew.crc32c, anew.layers.len()), (Some(5), 1));
        assert!(!anew.is_layered());
    }

    #[test]
    fn packs_are_kept_only_if_referred_to() {
        let pack = |backup, number| Ok(Line::Pack(Pack { backup, number, size: 9, sha256: [0; 32] }));
        let lines = [pack(None, 0), pack(None, 1), pack(Some(id(1)), 4), pack(Some(id(1)), 5)];
        let scratch = tempfile::tempdir().unwrap();
        let theirs = packs_of(lines.into_iter(), id(2));
        let mut packs = OlderPacks::gather(theirs, std::iter::empty(), scratch.path()).unwrap();
        let layer =
            |backup, number| Layer { backup: Some(backup), file: None, extents: vec![extent(number, 0, 1, None)] };
        packs.need(&layer(id(2), 1)).unwrap();
        packs.need(&layer(id(1), 4)).unwrap();
        packs.need(&own(&[extent(77, 0, 1, None)])).unwrap();
        assert!(packs.need(&layer(id(1), 6)).is_err());
        let needed: Vec<_> =
            packs.needed().unwrap().map(|pack| pack.map(|pack| (pack.backup, pack.number)).unwrap()).collect();
        assert_eq!(needed, [(Some(id(1)), 4), (Some(id(2)), 1)]);
    }
}
