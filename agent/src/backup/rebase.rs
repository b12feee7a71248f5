//! PURE: when a file is stored anew although it could inherit from the parent.
//!
//! A restore reads a file's base once and then each overlay; both stay cheap as long as overlays are few and small. What is
//! stored anew drops all it inherited, and with time the packs that only it held on to.

use repository::backup::manifest::Layer;

/// Most layers of one file.
pub const LAYERS_MAX: usize = 32;

/// Why a file is stored anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rebase {
    /// Another layer would be one too many.
    Depth,
    /// Its overlays are more than half as large as its base, as stored.
    Overlay,
}

/// Whether the file that the parent describes by these layers, newest first, is to be stored anew.
pub fn due(layers: &[Layer]) -> Option<Rebase> {
    if layers.len() >= LAYERS_MAX {
        return Some(Rebase::Depth);
    }
    let (base, overlay) = stored_bytes(layers);
    (overlay > base / 2).then_some(Rebase::Overlay)
}

/// Stored bytes of what first held each byte of the file, and of all that came over it.
fn stored_bytes(layers: &[Layer]) -> (u64, u64) {
    let (mut base, mut overlay, mut covered) = (0_u64, 0_u64, 0);
    for extent in layers.iter().rev().flat_map(|layer| &layer.extents) {
        if extent.pages.is_none() && extent.from >= covered {
            base = base.saturating_add(extent.length);
            covered = extent.to;
        } else {
            overlay = overlay.saturating_add(extent.length);
        }
    }
    (base, overlay)
}

#[cfg(test)]
mod tests {
    use repository::backup::pack::Extent;

    use super::*;

    fn extent(from: u64, to: u64, length: u64, pages: Option<u32>) -> Extent {
        Extent { pack: 0, offset: 8, length, from, to, pages }
    }

    fn layer(extents: &[Extent]) -> Layer {
        Layer { backup: None, file: None, extents: extents.to_vec() }
    }

    #[test]
    fn half_of_the_base_is_too_much() {
        let base = layer(&[extent(0, 800, 100, None), extent(800, 1600, 100, None)]);
        let over = |bytes| layer(&[extent(16, 64, bytes, Some(3))]);
        assert_eq!(due(std::slice::from_ref(&base)), None);
        assert_eq!(due(&[over(100), base.clone()]), None);
        assert_eq!(due(&[over(101), base.clone()]), Some(Rebase::Overlay));
        assert_eq!(due(&[over(60), over(41), base.clone()]), Some(Rebase::Overlay));
        // Growth is base, whenever it came; what was contiguous before and came again is not.
        assert_eq!(due(&[layer(&[extent(1600, 2400, 100, None)]), over(100), base.clone()]), None);
        assert_eq!(due(&[layer(&[extent(0, 800, 101, None)]), base]), Some(Rebase::Overlay));
    }

    #[test]
    fn a_file_has_a_bounded_number_of_layers() {
        let base = layer(&[extent(0, 800, 1000, None)]);
        let layers = |count: usize| {
            let mut layers = vec![layer(&[extent(8, 16, 1, Some(1))]); count - 1];
            layers.push(base.clone());
            layers
        };
        assert_eq!(due(&layers(LAYERS_MAX - 1)), None);
        assert_eq!(due(&layers(LAYERS_MAX)), Some(Rebase::Depth));
        assert_eq!(due(&[]), None);
    }
}
