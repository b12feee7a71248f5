//! PURE: the layers of a file, alone: whether they make up its content, and which of them show.

use super::{File, Layer, ManifestDamage};
use crate::backup::covered::{Cover, Covered};
use crate::backup::pack::{Extent, FileNumber};

impl File {
    /// Whether the layers hold every byte. Fails with what they lack.
    ///
    /// Within a layer extents are in order and do not overlap; the contiguous extents of all layers together reach from
    /// the first byte to the last. Sparse extents hold whole pages of `block_size` bytes. What lies at or beyond the
    /// file's size is of no account: a base may be longer than a file that was cut short later.
    pub fn check_layers(&self, block_size: u32) -> Result<(), ManifestDamage> {
        let wrong = |what| Err(ManifestDamage::Layers { path: self.path.to_string(), what });
        for layer in &self.layers {
            if layer.extents.is_empty() {
                return wrong("a layer without content");
            }
            let mut at = 0;
            for extent in &layer.extents {
                if extent.from < at {
                    return wrong("extents that overlap or are out of order");
                }
                if let Err(what) = check_extent(extent, block_size) {
                    return wrong(what);
                }
                at = extent.to;
            }
        }
        let mut solid: Vec<&Extent> =
            self.layers.iter().flat_map(|layer| &layer.extents).filter(|extent| extent.pages.is_none()).collect();
        if self.layers.len() > 1 {
            solid.sort_by_key(|extent| extent.from);
        }
        let mut held = 0;
        for extent in solid {
            if extent.from > held {
                break;
            }
            held = held.max(extent.to);
        }
        match held >= self.size {
            true => Ok(()),
            false => Err(ManifestDamage::Extents { path: self.path.to_string(), at: held }),
        }
    }

    /// Whether it is more than contiguous extents of its own backup: a reader must know about layers.
    pub fn is_layered(&self) -> bool {
        let plain = |layer: &Layer| {
            layer.backup.is_none() && layer.file.is_none() && layer.extents.iter().all(|extent| extent.pages.is_none())
        };
        self.layers.len() > 1 || !self.layers.iter().all(plain)
    }

    /// Number of the file in the frames of one of its layers.
    pub fn number_in(&self, layer: &Layer) -> FileNumber {
        layer.file.unwrap_or(self.number)
    }

    /// Drops what cannot show: extents beyond the file's size, those under contiguous extents of newer layers, and layers
    /// that are left with none. An incremental backup does so, lest it keeps packs of older ones alive for nothing.
    pub fn drop_hidden(&mut self) {
        let mut covered = Covered::default();
        covered.add(&[(self.size, u64::MAX)]);
        for layer in &mut self.layers {
            layer.extents.retain(|extent| covered.cover(extent.from, extent.to) != Cover::Whole);
            let solid = layer.extents.iter().filter(|extent| extent.pages.is_none());
            let ranges: Vec<(u64, u64)> = solid.map(|extent| (extent.from, extent.to)).collect();
            covered.add(&ranges);
        }
        self.layers.retain(|layer| !layer.extents.is_empty());
    }
}

fn check_extent(extent: &Extent, block_size: u32) -> Result<(), &'static str> {
    if extent.to <= extent.from || extent.length == 0 || extent.offset.checked_add(extent.length).is_none() {
        return Err("an extent without content");
    }
    let Some(pages) = extent.pages else { return Ok(()) };
    let block = u64::from(block_size.max(1));
    let room = (extent.to - extent.from) / block;
    if !extent.from.is_multiple_of(block) || !extent.to.is_multiple_of(block) || pages == 0 || u64::from(pages) > room {
        return Err("a sparse extent that does not hold whole pages");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::manifest::FileKind;
    use crate::byte_text::RelativePath;

    /// A file of 10 pages with layers of extents (from, to, pages); 0 pages is contiguous. In pages of 10 bytes.
    fn file(layers: &[&[(u64, u64, u32)]]) -> File {
        let extent = |(from, to, pages): &(u64, u64, u32)| Extent {
            pack: 0,
            offset: 8,
            length: 1,
            from: from * 10,
            to: to * 10,
            pages: (*pages > 0).then_some(*pages),
        };
        let layer = |extents: &&[(u64, u64, u32)]| Layer {
            backup: None,
            file: None,
            extents: extents.iter().map(extent).collect(),
        };
        File {
            number: FileNumber(0),
            path: RelativePath::new("f").unwrap(),
            kind: FileKind::Relation,
            mode: 0o600,
            mtime: 0,
            size: 100,
            crc32c: None,
            layers: layers.iter().map(layer).collect(),
        }
    }

    #[test]
    fn layers_must_hold_every_byte() {
        let lacks = |at| Some(format!("file f has no content from byte {at}"));
        let has = |what: &str| Some(format!("file f has {what}"));
        let check = |layers: &[&[(u64, u64, u32)]], expected: Option<String>| {
            let found = file(layers).check_layers(10).err().map(|damage| damage.to_string());
            assert_eq!(found, expected, "{layers:?}");
        };
        check(&[&[(0, 10, 0)]], None);
        check(&[&[(0, 4, 0), (4, 12, 0)]], None);
        check(&[&[(3, 9, 2)], &[(0, 20, 0)]], None);
        check(&[&[(0, 3, 2), (7, 10, 0)], &[(0, 7, 0)]], None);
        check(&[&[(5, 10, 0)], &[(1, 2, 1)], &[(0, 6, 0)]], None);
        check(&[], lacks(0));
        check(&[&[(0, 9, 0)]], lacks(90));
        check(&[&[(0, 4, 0), (5, 10, 0)]], lacks(40));
        check(&[&[(0, 10, 10)]], lacks(0));
        check(&[&[(4, 6, 2)], &[(0, 4, 0), (6, 10, 0)]], lacks(40));
        check(&[&[]], has("a layer without content"));
        check(&[&[(0, 5, 0), (4, 10, 0)]], has("extents that overlap or are out of order"));
        check(&[&[(4, 6, 1), (5, 10, 0)], &[(0, 10, 0)]], has("extents that overlap or are out of order"));
        check(&[&[(0, 0, 0)], &[(0, 10, 0)]], has("an extent without content"));
        check(&[&[(0, 2, 3)], &[(0, 10, 0)]], has("a sparse extent that does not hold whole pages"));
        let uneven = file(&[&[(0, 2, 1)], &[(0, 10, 0)]]).check_layers(7).unwrap_err();
        assert_eq!(Some(uneven.to_string()), has("a sparse extent that does not hold whole pages"));
    }

    #[test]
    fn what_cannot_show_is_dropped() {
        let check = |layers: &[&[(u64, u64, u32)]], expected: &[&[(u64, u64, u32)]]| {
            let mut found = file(layers);
            found.drop_hidden();
            assert_eq!(found, file(expected), "{layers:?}");
        };
        check(&[&[(0, 10, 0)]], &[&[(0, 10, 0)]]);
        check(&[&[(0, 10, 0)], &[(2, 4, 1)], &[(0, 20, 0)]], &[&[(0, 10, 0)]]);
        check(&[&[(2, 4, 1), (10, 12, 0)], &[(0, 10, 0), (10, 20, 0)]], &[&[(2, 4, 1)], &[(0, 10, 0)]]);
        check(&[&[(5, 10, 0)], &[(1, 3, 1), (6, 8, 2)], &[(0, 7, 0)]], &[&[(5, 10, 0)], &[(1, 3, 1)], &[(0, 7, 0)]]);
        check(&[&[(2, 10, 9)], &[(0, 10, 0)]], &[&[(2, 10, 9)], &[(0, 10, 0)]]);
        check(&[&[(0, 4, 0)], &[(4, 10, 0)], &[(3, 5, 0), (6, 7, 1)]], &[&[(0, 4, 0)], &[(4, 10, 0)]]);
    }
}
