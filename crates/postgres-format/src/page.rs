//! Data pages: is this one new, whole, being written, or corrupt?
//!
//! A base backup reads pages while the server writes them. A torn page is harmless if its change is in the WAL from the backup's start on,
//! because recovery writes the whole page again; a page that is wrong and was *not* changed since then is corrupt. So a bad page is only
//! [`PageState::Suspect`] until it was read again: [`second_look`] then decides. Empty pages are looked for before the header is judged, since a
//! new page has none.
//!
//! ```text
//! 0 u32 LSN high   4 u32 LSN low   8 u16 checksum   10 u16 flags   12 u16 lower   14 u16 upper   16 u16 special   18 …
//! ```
//!
//! The checksum is that of `src/include/storage/checksum_impl.h` (FNV-like over 32 columns), over the page with its checksum field zero, and
//! depends on the block number *within the relation*, not within the file.

use crate::bytes::{u16_at, u32_at};
use crate::lsn::Lsn;

/// Whether the cluster keeps data checksums (`pg_control` says 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksums {
    /// Every page is verified.
    On,
    /// Only headers can be judged.
    Off,
}

/// What one look at a page tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// All zeros: allocated, never written.
    New,
    /// Its checksum is right, or with checksums off its header is sane.
    Whole,
    /// Changed since the backup began: the WAL holds it, whatever these bytes are. The caller keeps the highest of these LSNs; one beyond the
    /// backup's end is no change but garbage.
    Changed {
        /// The page's own LSN.
        lsn: Lsn,
    },
    /// Not a whole page, as at the end of a file that is being extended.
    Partial,
    /// Wrong, or torn by a write in progress: look again.
    Suspect(Suspicion),
}

/// What is wrong with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspicion {
    /// The stored checksum is not that of the bytes.
    Checksum {
        /// In the page.
        found: u16,
        /// Of the bytes.
        expected: u16,
    },
    /// Marked as new, but not empty.
    NotEmpty,
    /// Header fields that contradict each other.
    Header,
}

/// What a second look, some time after the first, decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Fine now, or gone with the end of the file.
    Fine(PageState),
    /// Still wrong, but other bytes: the server is writing it and recovery will repair it. Worth a bounded number of further looks.
    BeingWritten,
    /// The same wrong bytes.
    Corrupt(Suspicion),
}

/// Columns of the checksum, and bytes in one row of them.
const COLUMNS: usize = 32;
const ROW_BYTES: usize = COLUMNS * 4;
const PRIME: u32 = 16_777_619;
const HEADER_BYTES: usize = 24;
/// `PD_VALID_FLAG_BITS`.
const VALID_FLAGS: u16 = 0x0007;

/// Where each column of the checksum begins.
const OFFSETS: [u32; COLUMNS] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// The number of a block within its relation, from the file's segment (`…".3"` is 3) and the block's place in that file.
///
/// Relations have at most 2^32 blocks; what lies beyond wraps, and its pages will be found corrupt.
pub const fn block_number(file_segment: u32, relation_segment_blocks: u32, index_in_file: u32) -> u32 {
    file_segment.wrapping_mul(relation_segment_blocks).wrapping_add(index_in_file)
}

/// The checksum that a page of this content has as block `block` of its relation. The length must be a multiple of 128 bytes.
pub fn checksum(page: &[u8], block: u32) -> u16 {
    let mut columns = OFFSETS;
    let mut rows = page.chunks_exact(ROW_BYTES);
    if let Some(first) = rows.next() {
        let mut row = [0; ROW_BYTES];
        row.copy_from_slice(first);
        row[8..10].fill(0);
        mix(&mut columns, &row);
    }
    rows.for_each(|row| mix(&mut columns, row));
    mix(&mut columns, &[0; ROW_BYTES]);
    mix(&mut columns, &[0; ROW_BYTES]);
    let sum = columns.into_iter().fold(block, |sum, column| sum ^ column);
    u16::try_from(sum % 65535 + 1).expect("a remainder below 65535, and one, fit 16 bits")
}

#[inline(always)]
fn mix(columns: &mut [u32; COLUMNS], row: &[u8]) {
    for (column, field) in columns.iter_mut().zip(row.chunks_exact(4)) {
        let mixed = *column ^ u32_at(field, 0);
        *column = mixed.wrapping_mul(PRIME) ^ (mixed >> 17);
    }
}

/// The LSN of the last change of a page.
pub fn lsn(page: &[u8]) -> Lsn {
    Lsn::new(u64::from(u32_at(page, 0)) << 32 | u64::from(u32_at(page, 4)))
}

/// One look at block `block` of a relation, read during a backup that began at `start`. Bytes that cannot be a page are `Partial`.
pub fn inspect(page: &[u8], block: u32, start: Lsn, checksums: Checksums) -> PageState {
    if page.len() < 1024 || !page.len().is_power_of_two() {
        return PageState::Partial;
    }
    let upper = u16_at(page, 14);
    if upper == 0 {
        let empty = page.iter().fold(0, |any, byte| any | byte) == 0;
        return if empty { PageState::New } else { PageState::Suspect(Suspicion::NotEmpty) };
    }
    let lsn = lsn(page);
    if lsn >= start {
        return PageState::Changed { lsn };
    }
    match checksums {
        Checksums::On => {
            let (found, expected) = (u16_at(page, 8), checksum(page, block));
            if found == expected {
                PageState::Whole
            } else {
                PageState::Suspect(Suspicion::Checksum { found, expected })
            }
        }
        Checksums::Off if sane_header(page, upper) => PageState::Whole,
        Checksums::Off => PageState::Suspect(Suspicion::Header),
    }
}

/// Decides about a suspect page from a second read, some 10 to 100 ms after the first (fewer bytes if the file was cut meanwhile).
pub fn second_look(before: &[u8], again: &[u8], block: u32, start: Lsn, checksums: Checksums) -> Verdict {
    match inspect(again, block, start, checksums) {
        PageState::Suspect(suspicion) if before == again => Verdict::Corrupt(suspicion),
        PageState::Suspect(_) => Verdict::BeingWritten,
        state => Verdict::Fine(state),
    }
}

fn sane_header(page: &[u8], upper: u16) -> bool {
    let (flags, lower, special) = (u16_at(page, 10), u16_at(page, 12), u16_at(page, 16));
    flags & !VALID_FLAGS == 0
        && usize::from(lower) >= HEADER_BYTES
        && lower <= upper
        && upper <= special
        && usize::from(special) <= page.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    const BLOCK_BYTES: usize = 8192;
    const LATER: Lsn = Lsn::new(u64::MAX);

    fn live_pages() -> Vec<Vec<u8>> {
        samples::named("15-relation-pages").chunks_exact(BLOCK_BYTES).map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn live_checksums() {
        let pages = live_pages();
        assert_eq!(pages.len(), 8);
        for (block, page) in (0..).zip(&pages) {
            assert_eq!(checksum(page, block), u16_at(page, 8), "block {block}");
            assert_eq!(inspect(page, block, LATER, Checksums::On), PageState::Whole);
            assert_eq!(inspect(page, block, LATER, Checksums::Off), PageState::Whole);
            assert_eq!(inspect(page, block, lsn(page), Checksums::On), PageState::Changed { lsn: lsn(page) });
            assert!(matches!(
                inspect(page, block + 1, LATER, Checksums::On),
                PageState::Suspect(Suspicion::Checksum { .. })
            ));
        }
    }

    #[test]
    fn every_changed_byte_is_seen() {
        let page = &live_pages()[3];
        for at in 0..BLOCK_BYTES {
            let mut changed = page.clone();
            changed[at] ^= 0x40;
            let state = inspect(&changed, 3, LATER, Checksums::On);
            assert!(matches!(state, PageState::Suspect(_)), "a change at {at} gives {state:?}");
        }
    }

    #[test]
    fn blocks_go_on_over_files() {
        assert_eq!(block_number(0, 131_072, 5), 5);
        assert_eq!(block_number(3, 131_072, 5), 393_221);
        assert_eq!(block_number(u32::MAX, u32::MAX, u32::MAX), 0);
    }

    #[test]
    fn states() {
        let page = live_pages().remove(0);
        assert_eq!(inspect(&vec![0; BLOCK_BYTES], 0, Lsn::ZERO, Checksums::On), PageState::New);
        let mut garbage = vec![0; BLOCK_BYTES];
        garbage[8000] = 1;
        assert_eq!(inspect(&garbage, 0, Lsn::ZERO, Checksums::On), PageState::Suspect(Suspicion::NotEmpty));
        for partial in [&page[..0], &page[..100], &page[..8191], &page[..4097]] {
            assert_eq!(inspect(partial, 0, LATER, Checksums::On), PageState::Partial);
        }
        for (at, value) in [(10, 8u8), (12, 0xFF), (14, 0xFF), (16, 0xFF), (17, 0x40)] {
            let mut changed = page.clone();
            changed[at] = value;
            changed[at + 1] |= if at == 12 || at == 14 { 0xFF } else { 0 };
            assert_eq!(inspect(&changed, 0, LATER, Checksums::Off), PageState::Suspect(Suspicion::Header), "{at}");
        }
    }

    #[test]
    fn torn_or_corrupt() {
        let whole = live_pages().remove(2);
        let mut torn = whole.clone();
        torn[4096..].fill(0xAA);
        let mut torn_later = whole.clone();
        torn_later[6000..].fill(0xAA);
        let look = |again: &[u8]| second_look(&torn, again, 2, LATER, Checksums::On);
        assert!(matches!(look(&torn), Verdict::Corrupt(Suspicion::Checksum { .. })));
        assert_eq!(look(&torn_later), Verdict::BeingWritten);
        assert_eq!(look(&whole), Verdict::Fine(PageState::Whole));
        assert_eq!(look(&whole[..4000]), Verdict::Fine(PageState::Partial));
    }
}
