//! Which parts of files that are there already must be read from the repository.
//!
//! How sure is "equal"? A file is kept unread if its size, its time of modification and the CRC-32C of its content are
//! those of the backup: an error takes a change within the same second and a chance of 2⁻³². Anything else is compared by
//! the checksums of 8 KiB units in the tables of packs: 2⁻⁶⁴ for each unit that differs. Both are good against chance, and
//! that is what is met here; who suspects malice restores into an empty directory, where digests prove every byte. A
//! stronger digest of each file would cost every backup a second hash of all bytes, and would still not serve files whose
//! layers were never read as a whole.
//!
//! A table is some 0.3 % of its pack. An untouched directory of a full backup needs none of them; files in several layers
//! need those of the packs that they lie in.
//!
//! The newest layer is compared first: a unit that a newer layer holds does not matter in an older one. So each unit is
//! wanted of one layer only, and no order of passes is needed. Where units of two layers overlap in part, which takes pages
//! of less than 8 KiB, the file is read anew.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt};
use repository::backup::covered::{Cover, Covered};
use repository::backup::pack::{Extent, FileNumber, TableFrame, Unit, unit_sum};

use super::RestoreError;
use super::groups::Group;
use super::layout::{AgedPack, Part, Wanted, WantedByPack, WantedFrame, is_control, is_plain, shown};
use super::ranges::Reading;
use super::writer::{Target, WriteError, checksum_of};

/// What is known about a file that is compared.
#[derive(Debug, Default)]
struct Compared {
    covered: Covered,
    /// It cannot be compared unit by unit.
    anew: bool,
}

/// An extent whose units are compared.
#[derive(Debug, Clone, Copy)]
struct Asked {
    file: usize,
    file_number: FileNumber,
    extent: Extent,
}

type Asking = BTreeMap<AgedPack, Vec<Asked>>;

/// What becomes of the files of a group without looking at a pack.
#[derive(Debug, Default)]
struct Sorted {
    /// They are made from nothing.
    fresh: Vec<usize>,
    /// They are compared.
    compared: HashMap<usize, Compared>,
    /// They get their length alone.
    zeroed: Vec<usize>,
}

impl Reading<'_> {
    /// What must be read for the files of a group, and which of them must be completed afterwards.
    pub(super) async fn missing(&self, group: &Arc<Group>) -> Result<(WantedByPack, Vec<usize>), RestoreError> {
        let (target, sorted_group) = (self.target.clone(), group.clone());
        let sorting = super::blocking(move || sort(&target, &sorted_group).map_err(RestoreError::of_writing));
        let Sorted { fresh, mut compared, zeroed } = sorting.await?;
        let mut asking = self.asking(group, compared.keys().copied());
        let mut wanted = WantedByPack::new();
        // The newest backup first.
        while let Some((last, _)) = asking.last_key_value() {
            let newest = asking.split_off(&AgedPack { age: last.age, pack: 0 });
            let tables = self.tables(group, &newest).await?;
            let (target, compared_group) = (self.target.clone(), group.clone());
            let work = move || {
                let found = compare(&target, &compared_group, &newest, &tables, &mut compared);
                found.map(|found| (found, compared)).map_err(RestoreError::of_writing)
            };
            let found;
            (found, compared) = super::blocking(work).await?;
            found.into_iter().for_each(|(pack, parts)| wanted.entry(pack).or_default().extend(parts));
        }
        let anew = |index: &usize| compared.get(index).is_some_and(|compared| compared.anew);
        wanted.values_mut().for_each(|parts| parts.retain(|part| !anew(&part.file)));
        let mut completed: Vec<usize> = compared.keys().copied().chain(zeroed).collect();
        completed.sort_unstable();
        let whole = fresh.into_iter().chain(completed.iter().copied().filter(anew));
        for (pack, parts) in group.layout.wanted(&self.ages, whole) {
            wanted.entry(pack).or_default().extend(parts);
        }
        wanted.retain(|_, parts| !parts.is_empty());
        Ok((wanted, completed))
    }

    fn asking(&self, group: &Group, files: impl Iterator<Item = usize>) -> Asking {
        let mut asking = Asking::new();
        for index in files {
            let file = group.file(index);
            for (layer, extent) in shown(file) {
                let pack = AgedPack { age: self.ages.of_layer(layer), pack: extent.pack };
                let asked = Asked { file: index, file_number: file.number_in(layer), extent: *extent };
                asking.entry(pack).or_default().push(asked);
            }
        }
        asking
    }

    async fn tables(&self, group: &Group, asking: &Asking) -> Result<HashMap<AgedPack, Vec<TableFrame>>, RestoreError> {
        let reads = asking.iter().map(|(pack, asked)| self.asked_table(group, *pack, asked));
        futures_util::stream::iter(reads).buffer_unordered(self.parallel()).try_collect().await
    }

    /// What the table of a pack says of the extents asked for.
    async fn asked_table(
        &self,
        group: &Group,
        pack: AgedPack,
        asked: &[Asked],
    ) -> Result<(AgedPack, Vec<TableFrame>), RestoreError> {
        let bytes = group.pack_bytes.get(&pack).copied().expect("the sizes of all packs of a group were kept");
        let mut table = self.table(&self.ages.backup(pack.age), pack.pack, bytes).await?;
        // A pack of one group's share and a table of many: most of a table may be of no use here.
        let first = asked.iter().map(|asked| asked.extent.offset).min().unwrap_or(0);
        let last = asked.iter().map(|asked| asked.extent.end()).max().unwrap_or(0);
        table.retain(|frame| (first..last).contains(&frame.position));
        table.shrink_to_fit();
        Ok((pack, table))
    }
}

/// Looks at the files as they are. Keeps those that are as they were backed up.
fn sort(target: &Target, group: &Group) -> Result<Sorted, WriteError> {
    let mut sorted = Sorted::default();
    for (index, wanted) in group.layout.files.iter().enumerate() {
        if group.is_zeroed(index) {
            sorted.zeroed.push(index);
            continue;
        }
        if is_control(wanted) {
            sorted.fresh.push(index);
            continue;
        }
        if wanted.size == 0 {
            group.set_checksum(index, 0);
            continue;
        }
        let path = target.path(wanted);
        let refused = |source| WriteError::Target { path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound && is_plain(wanted) => {
                sorted.fresh.push(index);
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                sorted.compared.insert(index, Compared::default());
                continue;
            }
            Err(source) => return Err(refused(source)),
        };
        let found = file.metadata().map_err(refused)?;
        if let Some(expected) = wanted.crc32c
            && (found.len(), found.mtime()) == (wanted.size, wanted.mtime)
            && checksum_of(&file).map_err(refused)? == expected
        {
            group.set_checksum(index, expected);
            target.keep(wanted.size);
            continue;
        }
        sorted.compared.insert(index, Compared::default());
    }
    Ok(sorted)
}

/// Compares what packs of one backup hold with what lies on the disk, and gives what differs.
fn compare(
    target: &Target,
    group: &Group,
    asking: &Asking,
    tables: &HashMap<AgedPack, Vec<TableFrame>>,
    compared: &mut HashMap<usize, Compared>,
) -> Result<WantedByPack, WriteError> {
    let mut wanted = WantedByPack::new();
    let mut held: HashMap<usize, Vec<(u64, u64)>> = HashMap::new();
    let mut local = Local { target, group, open: None, buffer: Vec::new() };
    for (pack, extents) in asking {
        let table = &tables[pack];
        for asked in extents {
            let state = compared.entry(asked.file).or_default();
            let first = table.partition_point(|frame| frame.position < asked.extent.offset);
            let frames = table[first..].iter().take_while(|frame| frame.position < asked.extent.end());
            let mut run: Vec<(&TableFrame, u8)> = Vec::new();
            for frame in frames {
                state.anew |= frame.file != asked.file_number;
                let units = local.differing(asked.file, &frame.units, state)?;
                let adjoins = run.last().is_none_or(|(last, _)| last.position + last.length == frame.position);
                if units == 0 || !adjoins {
                    wanted.entry(*pack).or_default().extend(part(asked, &mut run));
                }
                if units != 0 {
                    run.push((frame, units));
                }
                held.entry(asked.file).or_default().extend(frame.units.iter().map(|unit| (unit.from, unit.to)));
            }
            wanted.entry(*pack).or_default().extend(part(asked, &mut run));
        }
    }
    for (file, ranges) in held {
        compared.entry(file).or_default().covered.add(&ranges);
    }
    Ok(wanted)
}

/// Frames that adjoin each other, as one part.
fn part(asked: &Asked, run: &mut Vec<(&TableFrame, u8)>) -> Option<Wanted> {
    let (first, last) = (run.first()?.0, run.last()?.0);
    let (offset, length) = (first.position, last.position + last.length - first.position);
    let frames = run.drain(..).map(|(frame, units)| WantedFrame { position: frame.position, units }).collect();
    let Asked { file, file_number, .. } = *asked;
    Some(Wanted { file, file_number, offset, length, part: Part::Units(frames) })
}

/// The files as they are.
struct Local<'a> {
    target: &'a Target,
    group: &'a Group,
    /// None inside: it is not there.
    open: Option<(usize, Option<File>)>,
    buffer: Vec<u8>,
}

impl Local<'_> {
    /// Which units of a frame show and are not on the disk, one bit each.
    fn differing(&mut self, index: usize, units: &[Unit], state: &mut Compared) -> Result<u8, WriteError> {
        let size = self.group.file(index).size;
        let mut wanted = 0;
        for (number, unit) in units.iter().enumerate().filter(|(_, unit)| unit.from < size) {
            match state.covered.cover(unit.from, unit.to) {
                Cover::Whole => continue,
                Cover::Part => state.anew = true,
                Cover::None if unit.to <= size && self.sum(index, unit)? == Some(unit.sum) => {
                    self.target.keep(unit.to - unit.from);
                }
                Cover::None => wanted |= 1 << number,
            }
        }
        Ok(wanted)
    }

    /// Checksum of what the file holds there; none if it does not reach so far.
    fn sum(&mut self, index: usize, unit: &Unit) -> Result<Option<u64>, WriteError> {
        let path = || self.target.path(self.group.file(index));
        let refused = |source| WriteError::Target { path: path(), source };
        if self.open.as_ref().is_none_or(|(open, _)| *open != index) {
            let file = match File::open(path()) {
                Ok(file) => Some(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(source) => return Err(refused(source)),
            };
            self.open = Some((index, file));
        }
        let Some((_, Some(file))) = &self.open else { return Ok(None) };
        self.buffer.resize(usize::try_from(unit.to - unit.from).unwrap_or(0), 0);
        match file.read_exact_at(&mut self.buffer, unit.from) {
            Ok(()) => Ok(Some(unit_sum(&self.buffer))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(source) => Err(refused(source)),
        }
    }
}
