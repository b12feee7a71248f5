//! Whether the extents of a manifest hold what it says, by the tables of the packs.
//!
//! A manifest alone proves that its extents hold every byte of every file; here each extent is held against the frames
//! that the pack's own table has in that range. Tables are kept for a while, because the extents of neighbouring files lie in
//! the same packs.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::backup::manifest::{File, Layer};
use crate::backup::pack::{Extent, FileNumber, TableFrame};
use crate::name::BackupId;

/// Frames of tables that are kept, of 48 bytes each.
pub(super) const FRAMES_KEPT: usize = 400_000;

/// What a table says of one frame, in short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    file: FileNumber,
    /// Where it lies in the pack.
    position: u64,
    length: u64,
    /// First byte of the file that it holds, and the one after the last.
    from: u64,
    to: u64,
    /// How many bytes it holds between them.
    held: u64,
}

impl From<&TableFrame> for Span {
    fn from(frame: &TableFrame) -> Self {
        Self {
            file: frame.file,
            position: frame.position,
            length: frame.length,
            from: frame.units.first().map_or(0, |unit| unit.from),
            to: frame.units.last().map_or(0, |unit| unit.to),
            held: frame.units.iter().map(|unit| unit.to.saturating_sub(unit.from)).sum(),
        }
    }
}

/// A table of which only what is compared is kept.
pub(super) type Table = Arc<[Span]>;

/// The number of a pack, and the backup that it belongs to.
pub(super) type PackName = (BackupId, u32);

/// Tables that were read last. `None` is kept for packs without a table that can be read.
#[derive(Debug, Default)]
pub(super) struct Tables {
    kept: HashMap<PackName, (Option<Table>, u64)>,
    /// The same packs by their last use.
    used: BTreeMap<u64, PackName>,
    frames: usize,
    uses: u64,
}

impl Tables {
    /// A table that is kept.
    pub(super) fn get(&mut self, pack: &PackName) -> Option<Option<Table>> {
        self.uses += 1;
        let (table, used) = self.kept.get_mut(pack)?;
        self.used.remove(&std::mem::replace(used, self.uses));
        self.used.insert(self.uses, *pack);
        Some(table.clone())
    }

    /// Keeps one that is not kept, and lets those go that were not asked for the longest.
    pub(super) fn keep(&mut self, pack: PackName, table: Option<Table>) {
        let frames = |table: &Option<Table>| table.as_ref().map_or(1, |table| table.len().max(1));
        self.frames += frames(&table);
        self.uses += 1;
        self.kept.insert(pack, (table, self.uses));
        self.used.insert(self.uses, pack);
        while self.frames > FRAMES_KEPT && self.kept.len() > 1 {
            let Some((_, oldest)) = self.used.pop_first() else { return };
            if let Some((table, _)) = self.kept.remove(&oldest) {
                self.frames -= frames(&table);
            }
        }
    }
}

/// Whether an extent of a layer is what the pack's table says. `Err` tells what is not so.
pub(super) fn check(
    file: &File,
    layer: &Layer,
    extent: &Extent,
    table: &[Span],
    block_size: u32,
) -> Result<(), String> {
    let number = file.number_in(layer);
    let first = table.partition_point(|span| span.position < extent.offset);
    let behind = table.partition_point(|span| span.position < extent.end());
    let spans = &table[first..behind];
    let (Some(start), Some(end)) = (spans.first(), spans.last()) else {
        return Err("no frame begins there".to_owned());
    };
    if start.position != extent.offset || end.position + end.length != extent.end() {
        return Err("it does not begin and end with frames".to_owned());
    }
    if let Some(other) = spans.iter().find(|span| span.file != number) {
        return Err(format!("it holds a frame of file {} instead of {}", other.file.0, number.0));
    }
    if (start.from, end.to) != (extent.from, extent.to) {
        return Err(format!("its frames hold bytes {} to {}", start.from, end.to));
    }
    let in_order = spans.windows(2).all(|pair| pair[0].to <= pair[1].from);
    let held: u64 = spans.iter().map(|span| span.held).sum();
    match in_order && held == extent.held_bytes(block_size) {
        true => Ok(()),
        false => Err(format!("its frames hold {held} bytes of them")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::manifest::FileKind;
    use crate::backup::pack::Unit;
    use crate::byte_text::RelativePath;

    /// A frame of whole pages of ten bytes.
    fn frame(file: u32, position: u64, pages: &[u64]) -> TableFrame {
        let unit = |page: &u64| Unit { from: page * 10, to: page * 10 + 10, sum: 0 };
        TableFrame { file: FileNumber(file), position, length: 5, units: pages.iter().map(unit).collect() }
    }

    #[test]
    fn an_extent_must_be_what_the_table_says() {
        let frames = [frame(1, 8, &[0, 1]), frame(1, 13, &[2]), frame(2, 18, &[4, 9]), frame(2, 23, &[10])];
        let table: Vec<Span> = frames.iter().map(Span::from).collect();
        let said = |file: u32, offset: u64, length: u64, from: u64, to: u64, pages: Option<u32>| {
            let extent = Extent { pack: 0, offset, length, from: from * 10, to: to * 10, pages };
            let layer = Layer { backup: None, file: None, extents: vec![extent] };
            let file = File {
                number: FileNumber(file),
                path: RelativePath::new("f").unwrap(),
                kind: FileKind::Relation,
                mode: 0,
                mtime: 0,
                size: 0,
                crc32c: None,
                layers: Vec::new(),
            };
            check(&file, &layer, &extent, &table, 10).err().unwrap_or_default()
        };
        assert_eq!(said(1, 8, 10, 0, 3, None), "");
        assert_eq!(said(1, 13, 5, 2, 3, None), "");
        assert_eq!(said(2, 18, 10, 4, 11, Some(3)), "");
        assert_eq!(said(2, 18, 10, 4, 11, None), "its frames hold 30 bytes of them");
        assert_eq!(said(2, 18, 10, 4, 11, Some(4)), "its frames hold 30 bytes of them");
        assert_eq!(said(1, 8, 10, 0, 4, None), "its frames hold bytes 0 to 30");
        assert_eq!(said(1, 8, 15, 0, 3, None), "it holds a frame of file 2 instead of 1");
        assert_eq!(said(1, 9, 9, 0, 3, None), "it does not begin and end with frames");
        assert_eq!(said(1, 8, 9, 0, 3, None), "it does not begin and end with frames");
        assert_eq!(said(1, 90, 9, 0, 3, None), "no frame begins there");
    }

    #[test]
    fn tables_are_kept_in_bounded_room() {
        let id = BackupId::new(jiff::Timestamp::UNIX_EPOCH, 1);
        let table: Table = vec![Span::from(&frame(1, 8, &[0])); FRAMES_KEPT / 4].into();
        let mut tables = Tables::default();
        for number in 0..4 {
            tables.keep((id, number), Some(table.clone()));
        }
        assert!(tables.get(&(id, 0)).is_some(), "it is asked for again");
        tables.keep((id, 4), None);
        assert!(tables.get(&(id, 1)).is_none() && tables.get(&(id, 0)).is_some());
        assert_eq!(tables.get(&(id, 4)), Some(None));
        assert!(tables.frames <= FRAMES_KEPT);
    }
}
