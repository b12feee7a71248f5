//! PURE: from a manifest's lines to what must be read from which pack, in few large ranges.
//!
//! Files are restored in groups, so that what is read back of a file for its checksum was written a moment ago. Within a
//! group packs are read in passes: the layers of the oldest backup first, the newest over them. What lies near one another
//! in a pack is read with one request; a gap that is cheaper to read than to ask around is read and thrown away.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use repository::backup::manifest::{Directory, File, FileKind, Head, Layer, Line, Link, Pack, Tablespace};
use repository::backup::pack::{Extent, FileNumber};
use repository::name::BackupId;

/// Most bytes read with one request.
pub const RANGE_BYTES_MAX: u64 = 8 << 20;
/// Largest gap between wanted extents that is read along.
const GAP_BYTES_MAX: u64 = 256 << 10;
/// The first object identifier of databases that users make (`FirstNormalObjectId` in `transam.h`).
pub const FIRST_OF_USERS: u32 = 16_384;
/// Size at which a group of files is full, in bytes.
const GROUP_BYTES: u64 = 512 << 20;
/// Most files in a group.
const GROUP_FILES: usize = 1 << 16;

/// Everything a manifest says, in memory.
#[derive(Debug, Clone)]
pub struct Contents {
    /// What holds for the whole.
    pub head: Head,
    /// Tablespaces.
    pub tablespaces: Vec<Tablespace>,
    /// Directories, parents first.
    pub directories: Vec<Directory>,
    /// Links other than tablespaces'.
    pub links: Vec<Link>,
    /// Packs that files refer to, own ones first.
    pub packs: Vec<Pack>,
    /// Files, by number.
    pub files: Vec<File>,
}

impl Contents {
    /// Gathers the lines after the head; stops at the first that cannot be read.
    pub fn gather<E>(head: Head, lines: impl Iterator<Item = Result<Line, E>>) -> Result<Self, E> {
        let mut contents = Self {
            head,
            tablespaces: Vec::new(),
            directories: Vec::new(),
            links: Vec::new(),
            packs: Vec::new(),
            files: Vec::new(),
        };
        for line in lines {
            match line? {
                Line::Tablespace(tablespace) => contents.tablespaces.push(tablespace),
                Line::Directory(directory) => contents.directories.push(directory),
                Line::Link(link) => contents.links.push(link),
                Line::File(file) => contents.files.push(file),
                Line::Pack(pack) => contents.packs.push(pack),
                Line::Head(_) | Line::End(_) => {}
            }
        }
        Ok(contents)
    }

    /// A path that lies at or behind a link, whose end may be anywhere. No backup makes one, because links are not followed
    /// when files are listed.
    pub fn through_a_link(&self) -> Option<&Path> {
        let links = self.links.iter().map(|link| link.path.as_path());
        let directories = self.directories.iter().map(|directory| directory.path.as_path());
        behind_a_link(&links.collect(), directories.chain(self.files.iter().map(|file| file.path.as_path())))
    }

    /// Bytes of all files.
    pub fn data_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

fn behind_a_link<'a>(links: &BTreeSet<&'a Path>, mut written: impl Iterator<Item = &'a Path>) -> Option<&'a Path> {
    if links.is_empty() {
        return None;
    }
    let behind = |path: &Path, steps: usize| path.ancestors().skip(steps).any(|above| links.contains(above));
    let nested = || links.iter().copied().find(|link| behind(link, 1));
    written.find(|path| behind(path, 0)).or_else(nested)
}

/// Part of what is wanted of a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Index in [`Contents::files`].
    pub file: usize,
    /// Number of the file in its frames.
    pub file_number: FileNumber,
    /// Where its frames begin in the pack, in bytes.
    pub offset: u64,
    /// Their length in the pack, in bytes.
    pub length: u64,
    /// What of them.
    pub part: Part,
}

/// How much of some frames is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
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
pub struct WantedFrame {
    /// Where the frame lies in the pack, in bytes.
    pub position: u64,
    /// One bit a unit, the lowest for the first.
    pub units: u8,
}

/// One request to a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackRange {
    /// The backup that the pack belongs to.
    pub backup: BackupId,
    /// Number of the pack.
    pub pack: u32,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What is wanted of it, by offset.
    pub wanted: Vec<Wanted>,
}

/// A pack, in the order in which layers must be applied: the oldest backup has age 0, and the one restored the highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AgedPack {
    /// Age of its backup.
    pub age: usize,
    /// Its number.
    pub pack: u32,
}

/// Everything that is wanted of packs.
pub type WantedByPack = BTreeMap<AgedPack, Vec<Wanted>>;

/// How the files of a backup are read: in which groups, and where the checksums of their extents are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The backups whose packs are read, the oldest first and the one restored last.
    pub backups: Vec<BackupId>,
    /// For each file, where the checksums of its extents begin.
    pub first_slots: Vec<usize>,
    /// How many such checksums there are.
    pub slots: usize,
    /// Files that are restored together; one group does not depend on another.
    pub groups: Vec<Range<usize>>,
    /// Files that get their length and no content, by index.
    pub zeroed: BTreeSet<usize>,
    /// Bytes that all layers hold, without those of zeroed files.
    pub bytes: u64,
    /// Bytes of all files, without zeroed ones.
    pub file_bytes: u64,
}

impl Layout {
    /// Lays out the reading of a backup. With `databases` the relations of other databases are left out, but for those that
    /// every cluster has.
    pub fn new(contents: &Contents, databases: Option<&BTreeSet<u32>>) -> Self {
        let is_left_out = |file: &File| {
            let database = database_of(file.path.as_path()).filter(|database| *database >= FIRST_OF_USERS);
            let asked = databases.zip(database).is_none_or(|(asked, database)| asked.contains(&database));
            !asked && file.kind == FileKind::Relation
        };
        let files = contents.files.iter().enumerate();
        let zeroed: BTreeSet<usize> = files.filter(|(_, file)| is_left_out(file)).map(|(index, _)| index).collect();
        let (mut first_slots, mut slots, mut bytes) = (Vec::with_capacity(contents.files.len()), 0, 0);
        let mut file_bytes = 0;
        for (index, file) in contents.files.iter().enumerate() {
            first_slots.push(slots);
            if zeroed.contains(&index) {
                continue;
            }
            file_bytes += file.size;
            if is_plain(file) {
                slots += file.layers.iter().map(|layer| layer.extents.len()).sum::<usize>();
            }
            bytes += shown(file).map(|(_, extent)| extent.held_bytes(contents.head.block_size)).sum::<u64>();
        }
        let mut backups = contents.head.references.clone();
        backups.push(contents.head.backup);
        Self { backups, first_slots, slots, groups: group(&contents.files), zeroed, bytes, file_bytes }
    }

    /// Everything that some files are made of.
    pub fn wanted(&self, contents: &Contents, files: impl Iterator<Item = usize>) -> WantedByPack {
        let mut wanted = WantedByPack::new();
        for index in files.filter(|index| !self.zeroed.contains(index)) {
            let file = &contents.files[index];
            let mut slots = is_plain(file).then(|| self.first_slots[index]..);
            for (layer, extent) in shown(file) {
                let slot = slots.as_mut().and_then(Iterator::next);
                let part = Part::Extent { extent: *extent, slot };
                let (offset, length, file_number) = (extent.offset, extent.length, file.number_in(layer));
                let pack = AgedPack { age: self.age(layer), pack: extent.pack };
                wanted.entry(pack).or_default().push(Wanted { file: index, file_number, offset, length, part });
            }
        }
        wanted
    }

    /// Age of the backup that a layer lies in.
    pub fn age(&self, layer: &Layer) -> usize {
        let own = self.backups.len() - 1;
        // A manifest that was read names every backup that its layers lie in.
        layer.backup.map_or(own, |backup| self.backups.iter().position(|known| *known == backup).unwrap_or(own))
    }

    /// The requests that read all that is wanted: passes that must follow each other, the oldest backup's first.
    pub fn passes(&self, wanted: WantedByPack) -> Vec<Vec<PackRange>> {
        let mut passes: Vec<(usize, Vec<PackRange>)> = Vec::new();
        for (AgedPack { age, pack }, wanted) in wanted {
            let ranges = coalesce(self.backups[age], pack, wanted);
            match passes.last_mut() {
                Some((last, pass)) if *last == age => pass.extend(ranges),
                _ => passes.push((age, ranges)),
            }
        }
        passes.into_iter().map(|(_, pass)| pass).collect()
    }
}

/// The database that a file belongs to, by its path (`GetDatabasePath` in `relpath.c`).
pub fn database_of(path: &Path) -> Option<u32> {
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
pub fn is_plain(file: &File) -> bool {
    let mut at = 0;
    let mut follows = |extent: &Extent| {
        let adjoins = extent.pages.is_none() && extent.from == at;
        at = extent.to;
        adjoins
    };
    file.layers.len() <= 1 && file.layers.iter().flat_map(|layer| &layer.extents).all(&mut follows) && at == file.size
}

/// The extents of a file that do not lie behind its end, newest layer first.
pub fn shown(file: &File) -> impl Iterator<Item = (&Layer, &Extent)> {
    let extents = file.layers.iter().flat_map(|layer| layer.extents.iter().map(move |extent| (layer, extent)));
    extents.filter(|(_, extent)| extent.from < file.size)
}

fn group(files: &[File]) -> Vec<Range<usize>> {
    let (mut groups, mut first, mut bytes) = (Vec::new(), 0, 0);
    for (index, file) in files.iter().enumerate() {
        bytes += file.size;
        if bytes >= GROUP_BYTES || index - first + 1 >= GROUP_FILES {
            groups.push(first..index + 1);
            (first, bytes) = (index + 1, 0);
        }
    }
    if first < files.len() {
        groups.push(first..files.len());
    }
    groups
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
pub fn is_control(file: &File) -> bool {
    file.kind == FileKind::Control
}

#[cfg(test)]
mod tests {
    use repository::backup::manifest::Layer;
    use repository::byte_text::RelativePath;

    use super::*;

    fn backup() -> BackupId {
        "20261123T034138Z-7f3a9c21".parse().unwrap()
    }

    fn contents(files: Vec<File>) -> Contents {
        let json = r#"{"format":1,"tool":"t","backup":"20261123T034138Z-7f3a9c21","cluster":"c","system_identifier":"1",
            "node":"n","from_standby":false,"postgres_major":15,"control_version":1300,"catalog_version":1,
            "segment_size_bytes":16777216,"block_size":8192,"relation_segment_blocks":131072,"checksum_version":0,
            "start_timeline":1,"start_lsn":"0/1","start_time":"2026-11-23T01:02:03Z","stop_timeline":1,"stop_lsn":"0/2",
            "stop_time":"2026-11-23T01:02:03Z","min_recovery_point":null,"label":"","backup_label":"",
            "tablespace_map":"","mode":448,"owner":null,"group":null,"page_errors":0}"#;
        let head: Head = serde_json::from_str(json).unwrap();
        assert_eq!(head.backup, backup());
        let lines = files.into_iter().map(|file| Ok::<_, ()>(Line::File(file)));
        Contents::gather(head, lines).unwrap()
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

    /// One line: extents in, (pack, offset, length, number of extents) out.
    fn check(extents: &[&[(u32, u64, u64)]], expected: &[(u32, u64, u64, usize)]) {
        let contents = contents(files(extents));
        let layout = Layout::new(&contents, None);
        let passes = layout.passes(layout.wanted(&contents, 0..contents.files.len()));
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
        let mut contents = contents(layered);
        // The older one has the greater identifier: what counts is the head.
        contents.head.references = vec![older];
        let layout = Layout::new(&contents, None);
        let passes = layout.passes(layout.wanted(&contents, 0..2));
        let got: Vec<Vec<_>> = passes
            .iter()
            .map(|pass| pass.iter().map(|range| (range.backup, range.pack, range.wanted.len())).collect())
            .collect();
        assert_eq!(got, [vec![(older, 0, 1)], vec![(backup(), 0, 1), (backup(), 5, 1)]]);
        assert_eq!(passes[0][0].wanted[0].file_number, FileNumber(9));
        assert_eq!((layout.slots, layout.bytes), (1, 16_384 + 8192 + 8192));
        assert!(!is_plain(&contents.files[0]) && is_plain(&contents.files[1]));
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let check = |links: &[&'static str], written: &[&'static str], expected: Option<&str>| {
            let links = links.iter().map(Path::new).collect();
            assert_eq!(behind_a_link(&links, written.iter().map(Path::new)), expected.map(Path::new));
        };
        check(&[], &["a", "a/b"], None);
        check(&["log", "postgresql.conf"], &["log2", "base/1/2"], None);
        check(&["log"], &["base", "log/passwd"], Some("log/passwd"));
        check(&["log"], &["log"], Some("log"));
        check(&["log", "log/more"], &["base"], Some("log/more"));
    }
}
