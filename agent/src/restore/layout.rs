//! PURE: from some files of a manifest to what must be read from which pack, in few large ranges.
//!
//! Files are restored in groups (see `groups.rs`), so that memory does not grow with their number, and so that what is read
//! back of a file for its checksum was written a moment ago. Within a group packs are read in passes: the layers of the
//! oldest backup first, the newest over them. What lies near one another in a pack is read with one request; a gap that is
//! cheaper to read than to ask around is read and thrown away.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use repository::backup::manifest::{File, FileKind, Head, Layer};
use repository::backup::pack::{Extent, FileNumber};
use repository::name::BackupId;

/// Most bytes read with one request.
pub(super) const RANGE_BYTES_MAX: u64 = 8 << 20;
/// Largest gap between wanted extents that is read along.
const GAP_BYTES_MAX: u64 = 256 << 10;
/// The first object identifier of databases that users make (`FirstNormalObjectId` in `transam.h`).
pub(super) const FIRST_OF_USERS: u32 = 16_384;

/// The backups whose packs are read: the oldest first, and the one restored last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ages(Vec<BackupId>);

impl Ages {
    /// As the head of a manifest tells.
    pub(super) fn of(head: &Head) -> Self {
        Self(head.references.iter().copied().chain([head.backup]).collect())
    }

    /// Age of the backup that a layer lies in: 0 is the oldest.
    pub(super) fn of_layer(&self, layer: &Layer) -> usize {
        let own = self.0.len() - 1;
        // A manifest that was read names every backup that its layers lie in.
        layer.backup.map_or(own, |backup| self.0.iter().position(|known| *known == backup).unwrap_or(own))
    }

    /// The backup of an age.
    pub(super) fn backup(&self, age: usize) -> BackupId {
        self.0[age]
    }

    /// The backup of an age as a manifest's lines name it: none for the one restored.
    pub(super) fn named(&self, age: usize) -> Option<BackupId> {
        self.0.get(age).copied().filter(|_| age + 1 < self.0.len())
    }
}

/// Part of what is wanted of a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Index in [`Layout::files`].
    pub(super) file: usize,
    /// Number of the file in its frames.
    pub(super) file_number: FileNumber,
    /// Where its frames begin in the pack, in bytes.
    pub(super) offset: u64,
    /// Their length in the pack, in bytes.
    pub(super) length: u64,
    /// What of them.
    pub(super) part: Part,
}

/// How much of some frames is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    /// All that an extent holds. `slot` is where the checksum of a contiguous extent is kept, among those of all files.
    Extent {
        /// What the frames hold.
        extent: Extent,
        /// Where its checksum goes.
        slot: Option<usize>,
    },
    /// Some units of frames that adjoin each other in the pack.
    Units(Vec<WantedFrame>),
}

/// Which units of a frame are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WantedFrame {
    /// Where the frame lies in the pack, in bytes.
    pub(super) position: u64,
    /// One bit a unit, the lowest for the first.
    pub(super) units: u8,
}

/// One request to a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PackRange {
    /// The backup that the pack belongs to.
    pub(super) backup: BackupId,
    /// Number of the pack.
    pub(super) pack: u32,
    /// First byte.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) length: u64,
    /// What is wanted of it, by offset.
    pub(super) wanted: Vec<Wanted>,
}

/// A pack, in the order in which layers must be applied: the oldest backup has age 0, and the one restored the highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct AgedPack {
    /// Age of its backup.
    pub(super) age: usize,
    /// Its number.
    pub(super) pack: u32,
}

/// Everything that is wanted of packs.
pub(super) type WantedByPack = BTreeMap<AgedPack, Vec<Wanted>>;

/// Some files that follow each other in a manifest, and where the checksums of their extents are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// The files.
    pub(super) files: Vec<File>,
    /// Those that get their length and no content, by index.
    pub(super) zeroed: BTreeSet<usize>,
    /// For each file, where the checksums of its extents begin.
    pub(super) first_slots: Vec<usize>,
    /// How many such checksums there are.
    pub(super) slots: usize,
}

impl Layout {
    /// Lays out the reading of some files. With `databases` others are zeroed.
    pub(super) fn new(files: Vec<File>, databases: Option<&BTreeSet<u32>>) -> Self {
        let left_out = |(index, file)| is_left_out(file, databases).then_some(index);
        let zeroed: BTreeSet<usize> = files.iter().enumerate().filter_map(left_out).collect();
        let (mut first_slots, mut slots) = (Vec::with_capacity(files.len()), 0);
        for (index, file) in files.iter().enumerate() {
            first_slots.push(slots);
            if is_plain(file) && !zeroed.contains(&index) {
                slots += file.layers.iter().map(|layer| layer.extents.len()).sum::<usize>();
            }
        }
        Self { files, zeroed, first_slots, slots }
    }

    /// Everything that some files are made of.
    pub(super) fn wanted(&self, ages: &Ages, files: impl Iterator<Item = usize>) -> WantedByPack {
        let mut wanted = WantedByPack::new();
        for index in files.filter(|index| !self.zeroed.contains(index)) {
            let file = &self.files[index];
            let mut slots = is_plain(file).then(|| self.first_slots[index]..);
            for (layer, extent) in shown(file) {
                let slot = slots.as_mut().and_then(Iterator::next);
                let part = Part::Extent { extent: *extent, slot };
                let (offset, length, file_number) = (extent.offset, extent.length, file.number_in(layer));
                let pack = AgedPack { age: ages.of_layer(layer), pack: extent.pack };
                wanted.entry(pack).or_default().push(Wanted { file: index, file_number, offset, length, part });
            }
        }
        wanted
    }

    /// The files that are made in parts, and so must be completed afterwards.
    pub(super) fn in_parts(&self) -> Vec<usize> {
        let in_parts = |index: &usize| self.zeroed.contains(index) || !is_plain(&self.files[*index]);
        (0..self.files.len()).filter(in_parts).collect()
    }
}

/// The requests that read all that is wanted: passes that must follow each other, the oldest backup's first.
pub(super) fn passes(ages: &Ages, wanted: WantedByPack) -> Vec<Vec<PackRange>> {
    let mut passes: Vec<(usize, Vec<PackRange>)> = Vec::new();
    for (AgedPack { age, pack }, wanted) in wanted {
        let ranges = coalesce(ages.backup(age), pack, wanted);
        match passes.last_mut() {
            Some((last, pass)) if *last == age => pass.extend(ranges),
            _ => passes.push((age, ranges)),
        }
    }
    passes.into_iter().map(|(_, pass)| pass).collect()
}

/// Whether a file's content is left out: that of a database which is not asked for and which not every cluster has, but for
/// its version.
///
/// The map of its system catalogs must be among what is left out: a server that finds zeros there refuses a connection
/// (`read_relmap_file` in `relmapper.c`), and one that finds only the catalogs' zeros panics (`load_critical_index` in
/// `relcache.c`), which autovacuum alone would bring about.
pub(super) fn is_left_out(file: &File, databases: Option<&BTreeSet<u32>>) -> bool {
    let Some(asked) = databases else { return false };
    let path = file.path.as_path();
    let database = database_of(path).filter(|database| *database >= FIRST_OF_USERS);
    database.is_some_and(|database| !asked.contains(&database)) && !path.ends_with("PG_VERSION")
}

/// The database that a file belongs to, by its path (`GetDatabasePath` in `relpath.c`).
pub(super) fn database_of(path: &Path) -> Option<u32> {
    let mut parts = path.iter();
    match parts.next()?.to_str()? {
        "base" => {}
        // pg_tblspc/<tablespace>/PG_<version>/<database>/…
        "pg_tblspc" => drop((parts.next()?, parts.next()?)),
        _ => return None,
    }
    let database = parts.next()?.to_str()?.parse().ok()?;
    parts.next().map(|_| database)
}

/// Whether a file's checksum follows from those of its extents: one layer that holds every byte once.
pub(super) fn is_plain(file: &File) -> bool {
    let mut at = 0;
    let mut follows = |extent: &Extent| {
        let adjoins = extent.pages.is_none() && extent.from == at;
        at = extent.to;
        adjoins
    };
    file.layers.len() <= 1 && file.layers.iter().flat_map(|layer| &layer.extents).all(&mut follows) && at == file.size
}

/// The extents of a file that do not lie behind its end, newest layer first.
pub(super) fn shown(file: &File) -> impl Iterator<Item = (&Layer, &Extent)> {
    let extents = file.layers.iter().flat_map(|layer| layer.extents.iter().map(move |extent| (layer, extent)));
    extents.filter(|(_, extent)| extent.from < file.size)
}

fn coalesce(backup: BackupId, pack: u32, mut wanted: Vec<Wanted>) -> Vec<PackRange> {
    wanted.sort_by_key(|wanted| wanted.offset);
    let mut ranges: Vec<PackRange> = Vec::new();
    for wanted in wanted {
        let (offset, end) = (wanted.offset, wanted.offset + wanted.length);
        match ranges.last_mut() {
            Some(range)
                if offset.saturating_sub(range.offset + range.length) <= GAP_BYTES_MAX
                    && end - range.offset <= RANGE_BYTES_MAX =>
            {
                range.length = range.length.max(end - range.offset);
                range.wanted.push(wanted);
            }
            _ => ranges.push(PackRange { backup, pack, offset, length: end - offset, wanted: vec![wanted] }),
        }
    }
    ranges
}

/// Whether a file is the one that is written last.
pub(super) fn is_control(file: &File) -> bool {
    file.kind == FileKind::Control
}

#[cfg(test)]
mod tests {
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

    fn read(ages: &Ages, files: Vec<File>) -> (Layout, Vec<Vec<PackRange>>) {
        let layout = Layout::new(files, None);
        let wanted = layout.wanted(ages, 0..layout.files.len());
        (layout, passes(ages, wanted))
    }

    /// One line: extents in, (pack, offset, length, number of extents) out.
    fn check(extents: &[&[(u32, u64, u64)]], expected: &[(u32, u64, u64, usize)]) {
        let (layout, passes) = read(&Ages(vec![backup()]), files(extents));
        let got: Vec<_> =
            passes.iter().flatten().map(|range| (range.pack, range.offset, range.length, range.wanted.len())).collect();
        assert_eq!(got, expected);
        assert_eq!(layout.slots, extents.iter().map(|file| file.len()).sum::<usize>());
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
    fn files_belong_to_databases_by_their_path() {
        let check = |path: &str, expected| assert_eq!(database_of(Path::new(path)), expected, "{path}");
        check("base/5/16384", Some(5));
        check("base/16390/2619_fsm", Some(16_390));
        check("pg_tblspc/16500/PG_15_202209061/16390/16400.1", Some(16_390));
        check("base/pgsql_tmp/x", None);
        check("base/5", None);
        check("global/1262", None);
        check("PG_VERSION", None);
        check("pg_tblspc/16500/PG_15_202209061", None);
    }

    #[test]
    fn layers_are_read_the_oldest_backup_first() {
        let older: BackupId = "20261124T034138Z-7f3a9c21".parse().unwrap();
        let mut layered = files(&[&[(0, 8, 16_384)], &[(0, 20_000, 8192)]]);
        let sparse = Extent { pack: 5, offset: 8, length: 100, from: 8192, to: 16_384, pages: Some(1) };
        let behind = Extent { pack: 5, offset: 108, length: 100, from: 16_384, to: 24_576, pages: Some(1) };
        layered[0].layers[0].backup = Some(older);
        layered[0].layers[0].file = Some(FileNumber(9));
        layered[0].layers.insert(0, Layer { backup: None, file: None, extents: vec![sparse, behind] });
        // The older one has the greater identifier: what counts is the head.
        let ages = Ages(vec![older, backup()]);
        assert_eq!((ages.named(0), ages.named(1)), (Some(older), None));
        let (layout, passes) = read(&ages, layered);
        let got: Vec<Vec<_>> = passes
            .iter()
            .map(|pass| pass.iter().map(|range| (range.backup, range.pack, range.wanted.len())).collect())
            .collect();
        assert_eq!(got, [vec![(older, 0, 1)], vec![(backup(), 0, 1), (backup(), 5, 1)]]);
        assert_eq!(passes[0][0].wanted[0].file_number, FileNumber(9));
        assert_eq!((layout.slots, layout.in_parts()), (1, vec![0]));
    }

    #[test]
    fn other_databases_are_left_out_but_for_their_version() {
        let check = |path: &str, kind, expected: bool| {
            let mut file = files(&[&[(0, 8, 100)]]).remove(0);
            (file.path, file.kind) = (RelativePath::new(path.as_bytes()).unwrap(), kind);
            assert_eq!(is_left_out(&file, Some(&[16_390].into())), expected, "{path}");
            assert!(!is_left_out(&file, None));
        };
        check("base/16391/16400", FileKind::Relation, true);
        check("base/16390/16400", FileKind::Relation, false);
        check("base/5/16400", FileKind::Relation, false);
        check("base/16391/PG_VERSION", FileKind::Other, false);
        check("base/16391/pg_filenode.map", FileKind::Other, true);
        check("pg_tblspc/16500/PG_15_1/16391/16400", FileKind::Relation, true);
        check("global/1262", FileKind::Relation, false);
    }
}
