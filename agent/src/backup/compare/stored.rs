//! What a backup holds of a file's pages: sums from the tables of its packs, and single pages from their frames.
//!
//! The stores that have the backup are asked one after the other. Tables are kept for the next files, which lie in the same
//! packs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use repository::backup::manifest::{File, Pack};
use repository::backup::pack::{SUM_UNIT_BYTES, TableFrame};
use repository::backup::{BackupError, fetch_table, read_frames};
use repository::key::{self, ObjectKey};
use repository::name::{BackupId, ClusterName};
use repository::store::{ObjectStore, StoreError};

use super::local::CHUNK_BYTES;

/// Tables that are kept.
const TABLES_KEPT: usize = 4;
/// How long a store may take for a table or a frame.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a frame lies.
#[derive(Debug, Clone, Copy)]
struct Place {
    backup: BackupId,
    pack: u32,
    position: u64,
    length: u64,
}

/// A page's sum and the frame that holds it.
#[derive(Debug, Clone, Copy)]
struct Held {
    sum: u64,
    place: u32,
}

/// What is stored of one file's pages.
#[derive(Debug, Default)]
pub(super) struct FilePages {
    pages: Vec<Option<Held>>,
    places: Vec<Place>,
}

impl FilePages {
    /// Sums of the pages of the chunk from byte `at`.
    pub(super) fn from(&self, at: u64) -> Vec<Option<u64>> {
        let first = usize::try_from(at / SUM_UNIT_BYTES as u64).unwrap_or(usize::MAX);
        let sums = self.pages.iter().skip(first).take(CHUNK_BYTES / SUM_UNIT_BYTES);
        sums.map(|held| held.map(|held| held.sum)).collect()
    }

    /// Whether a page was read for this backup itself.
    pub(super) fn is_own(&self, block: u32, backup: &BackupId) -> bool {
        self.place(block).is_some_and(|place| place.backup == *backup)
    }

    /// Key of the pack that a page lies in.
    pub(super) fn object(&self, block: u32, cluster: &ClusterName) -> Option<String> {
        self.place(block).map(|place| key::pack(cluster, &place.backup, place.pack).to_string())
    }

    fn place(&self, block: u32) -> Option<Place> {
        let held = self.pages.get(block as usize).copied().flatten()?;
        self.places.get(held.place as usize).copied()
    }
}

/// A pack by its backup and number.
type PackName = (BackupId, u32);
/// What the table of a pack says.
type Table = Arc<Vec<TableFrame>>;

/// The packs of a backup and of those it refers to.
pub(super) struct Stored {
    stores: Vec<Arc<dyn ObjectStore>>,
    cluster: ClusterName,
    backup: BackupId,
    pack_bytes: BTreeMap<PackName, u64>,
    tables: VecDeque<(PackName, Table)>,
}

impl Stored {
    pub(super) fn new(stores: Vec<Arc<dyn ObjectStore>>, cluster: ClusterName, backup: BackupId) -> Self {
        Self { stores, cluster, backup, pack_bytes: BTreeMap::new(), tables: VecDeque::new() }
    }

    /// Takes note of a pack that the manifest lists.
    pub(super) fn lists(&mut self, pack: &Pack) {
        self.pack_bytes.insert((pack.backup.unwrap_or(self.backup), pack.number), pack.size);
    }

    /// The pages of a file, each from the newest layer that holds it.
    pub(super) async fn pages_of(&mut self, file: &File) -> Result<FilePages, BackupError> {
        let blocks = usize::try_from(file.size / SUM_UNIT_BYTES as u64).unwrap_or(0);
        let mut found = FilePages { pages: vec![None; blocks], places: Vec::new() };
        for layer in &file.layers {
            let (backup, number) = (layer.backup.unwrap_or(self.backup), file.number_in(layer));
            for extent in layer.extents.iter().filter(|extent| extent.from < file.size) {
                let table = self.table(backup, extent.pack).await?;
                let first = table.partition_point(|frame| frame.position < extent.offset);
                let frames = table[first..].iter().take_while(|frame| frame.position < extent.end());
                frames.filter(|frame| frame.file == number).for_each(|frame| found.add(frame, backup, extent.pack));
            }
        }
        Ok(found)
    }

    /// A page as it is stored, proven by the digest of its frame; none if the backup does not hold it.
    pub(super) async fn page(
        &self,
        file: &File,
        pages: &FilePages,
        block: u32,
    ) -> Result<Option<Vec<u8>>, BackupError> {
        let Some(Place { backup, pack, position, length }) = pages.place(block) else { return Ok(None) };
        let key = key::pack(&self.cluster, &backup, pack);
        let (from, mut page) = (u64::from(block) * SUM_UNIT_BYTES as u64, None);
        debug_assert!(from < file.size, "a page lies in its file");
        let mut last = None;
        for store in &self.stores {
            let mut keep = |frame: repository::backup::pack::Frame<'_>| {
                let start = from.checked_sub(frame.offset).and_then(|start| usize::try_from(start).ok());
                if let Some(bytes) = start.and_then(|start| frame.bytes.get(start..start + SUM_UNIT_BYTES)) {
                    page = Some(bytes.to_vec());
                }
                Ok(())
            };
            let reading = read_frames(store.as_ref(), &key, position, length, &mut keep);
            match in_time(store, reading).await {
                Ok(()) => return Ok(page),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| nowhere(&key)))
    }

    async fn table(&mut self, backup: BackupId, pack: u32) -> Result<Table, BackupError> {
        let name = (backup, pack);
        if let Some((_, table)) = self.tables.iter().find(|(known, _)| *known == name) {
            return Ok(Arc::clone(table));
        }
        let (key, mut last) = (key::pack(&self.cluster, &backup, pack), None);
        let bytes = self.pack_bytes.get(&name).copied().unwrap_or(0);
        for store in &self.stores {
            match in_time(store, fetch_table(store.as_ref(), &key, bytes)).await {
                Ok(table) => {
                    let table = Arc::new(table);
                    self.tables.truncate(TABLES_KEPT - 1);
                    self.tables.push_front((name, Arc::clone(&table)));
                    return Ok(table);
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| nowhere(&key)))
    }
}

impl FilePages {
    /// Takes the whole pages of a frame that no newer layer holds.
    fn add(&mut self, frame: &TableFrame, backup: BackupId, pack: u32) {
        let place = self.places.len() as u32;
        self.places.push(Place { backup, pack, position: frame.position, length: frame.length });
        for unit in &frame.units {
            let whole = unit.to - unit.from == SUM_UNIT_BYTES as u64 && unit.from.is_multiple_of(SUM_UNIT_BYTES as u64);
            let block = usize::try_from(unit.from / SUM_UNIT_BYTES as u64).unwrap_or(usize::MAX);
            if let Some(slot @ None) = self.pages.get_mut(block).filter(|_| whole) {
                *slot = Some(Held { sum: unit.sum, place });
            }
        }
    }
}

async fn in_time<T>(
    store: &Arc<dyn ObjectStore>,
    reading: impl Future<Output = Result<T, BackupError>>,
) -> Result<T, BackupError> {
    let silent = || BackupError::Store(StoreError::Timeout { store: store.name().clone(), operation: "get" });
    tokio::time::timeout(PATIENCE, reading).await.map_err(|_| silent())?
}

fn nowhere(key: &ObjectKey) -> BackupError {
    BackupError::Local(std::io::Error::other(format!("no store holds {key}")))
}

#[cfg(test)]
mod tests {
    use repository::backup::pack::{FileNumber, Unit};

    use super::*;

    const PAGE: u64 = SUM_UNIT_BYTES as u64;

    fn frame(position: u64, units: &[(u64, u64, u64)]) -> TableFrame {
        let units = units.iter().map(|(from, to, sum)| Unit { from: *from, to: *to, sum: *sum }).collect();
        TableFrame { file: FileNumber(0), position, length: 100, units }
    }

    #[test]
    fn a_page_is_that_of_the_newest_layer_that_holds_it() {
        let (new, old) = ("20261123T010203Z-00000002".parse().unwrap(), "20261123T010203Z-00000001".parse().unwrap());
        let mut pages = FilePages { pages: vec![None; 4], places: Vec::new() };
        pages.add(&frame(8, &[(PAGE, 2 * PAGE, 20)]), new, 0);
        // The last unit is no whole page, and what lies behind the file's end is no part of it.
        let units = [(0, PAGE, 1), (PAGE, 2 * PAGE, 2), (2 * PAGE, 2 * PAGE + 100, 3), (9 * PAGE, 10 * PAGE, 4)];
        pages.add(&frame(8, &units), old, 7);
        assert_eq!(pages.from(0), [Some(1), Some(20), None, None]);
        assert_eq!(pages.from(CHUNK_BYTES as u64), []);
        assert!(pages.is_own(1, &new) && !pages.is_own(0, &new) && !pages.is_own(2, &new));
        let cluster = "main".parse().unwrap();
        assert_eq!(pages.object(0, &cluster).unwrap(), key::pack(&cluster, &old, 7).to_string());
        assert_eq!(pages.object(3, &cluster), None);
    }
}
