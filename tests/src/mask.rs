//! PURE: blanks out of a page what may differ between a server's own and what recovery makes of the same WAL.
//!
//! These are the rules by which PostgreSQL checks its own recovery (`wal_consistency_checking`): `bufmask.c`, and
//! `heap_mask`, `btree_mask`, `hash_mask`, `gin_mask`, `gist_mask`, `seq_mask`, `spg_mask`, `brin_mask` and
//! `generic_mask`. Beyond them, because pages are compared here whenever they were last written and not right after a
//! record: what a sequence has handed out of the numbers that WAL set aside (`nextval_internal`), and the pages that an
//! SP-GiST index remembers as roomy (`SpGistUpdateMetaPage`); neither is in WAL.
//!
//! Which access method a page is of shows in the page itself, at its end.

/// Bytes in a page.
pub const PAGE_BYTES: usize = 8192;

const HEADER_BYTES: usize = 24;
/// Places in the header of a page.
const CHECKSUM_AT: usize = 8;
const FLAGS_AT: usize = 10;
const LOWER_AT: usize = 12;
const UPPER_AT: usize = 14;
const SPECIAL_AT: usize = 16;
const PRUNE_AT: usize = 20;
/// `PD_HAS_FREE_LINES`, `PD_PAGE_FULL` and `PD_ALL_VISIBLE`: all that the header's flags hold.
const HEADER_HINTS: u16 = 0x0007;

/// Of a line pointer: 15 bits of offset, 2 of flags, 15 of length.
const NORMAL: u32 = 1;

/// What a page belongs to, as it tells itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageKind {
    /// All zeros.
    New,
    /// Of a table.
    Heap,
    /// The only page of a sequence.
    Sequence,
    /// Of an index of that kind.
    Btree,
    /// The same.
    Hash,
    /// The same.
    Gist,
    /// The same.
    Gin,
    /// The same.
    SpGist,
    /// The same.
    Brin,
    /// Of an index of an extension.
    Other,
}

/// Tells what a page of a main fork belongs to; `block` is its number within the fork.
pub fn kind(page: &[u8], block: u32) -> PageKind {
    let special = usize::from(half(page, SPECIAL_AT));
    if page.iter().all(|byte| *byte == 0) {
        return PageKind::New;
    }
    // Page identifiers lie in the last two bytes; a B-tree has a vacuum's number there, which is smaller.
    let last = half(page, PAGE_BYTES - 2);
    match PAGE_BYTES.saturating_sub(special) {
        16 => match last {
            0xFF80 => PageKind::Hash,
            0xFF81 => PageKind::Gist,
            _ => PageKind::Btree,
        },
        8 => match last {
            0xF091..=0xF093 => PageKind::Brin,
            0xFF82 => PageKind::SpGist,
            0xFF83.. => PageKind::Other,
            _ if block == 0 && word(page, special) == 0x1717 && last == 0 => PageKind::Sequence,
            _ => PageKind::Gin,
        },
        _ => PageKind::Heap,
    }
}

/// Blanks LSN and checksum: all that may differ of a page of a visibility map.
pub fn mask_head(page: &mut [u8]) {
    page[..CHECKSUM_AT + 2].fill(0);
}

/// Blanks a page of a main fork; `block` is its number within the fork. One whose header makes no sense is left as it is but
/// for LSN and checksum.
pub fn mask(page: &mut [u8], block: u32) {
    let kind = kind(page, block);
    mask_head(page);
    let (lower, upper, special) = bounds(page);
    if kind == PageKind::New || !(HEADER_BYTES <= lower && lower <= upper && upper <= special && special <= PAGE_BYTES)
    {
        return;
    }
    if !matches!(kind, PageKind::Sequence | PageKind::Other) {
        let flags = half(page, FLAGS_AT) & !HEADER_HINTS;
        set_half(page, FLAGS_AT, flags);
        page[PRUNE_AT..PRUNE_AT + 4].fill(0);
    }
    // Some pages of some indexes hold their content where others have room, and say so by an end of zero items.
    let may_be_full = matches!(kind, PageKind::Gin | PageKind::SpGist | PageKind::Brin);
    if lower > HEADER_BYTES || !may_be_full {
        page[lower..upper].fill(0);
    }
    match kind {
        PageKind::Heap => mask_heap(page, block),
        PageKind::Sequence => mask_sequence(page),
        PageKind::Btree => mask_btree(page),
        PageKind::Hash => mask_hash(page),
        PageKind::Gist => mask_gist(page),
        PageKind::Gin => mask_gin(page),
        PageKind::SpGist => mask_spgist(page),
        PageKind::Brin => mask_brin(page),
        PageKind::New | PageKind::Other => {}
    }
}

fn mask_heap(page: &mut [u8], block: u32) {
    const TUPLE_HEADER_BYTES: usize = 23;
    const CID_AT: usize = 8;
    const CTID_AT: usize = 12;
    const INFOMASK_AT: usize = 20;
    const XMIN_FROZEN: u16 = 0x0300;
    const XMAX_HINTS: u16 = 0x0C00;
    const TRANSACTIONS: u16 = 0xFFF0;
    const SPECULATIVE: u16 = 0xFFFE;
    for (number, line) in (1u16..).zip(lines(page)) {
        let (at, bytes) = (line.at, line.bytes);
        if at < HEADER_BYTES || at + bytes > PAGE_BYTES || bytes == 0 {
            continue;
        }
        if line.flags == NORMAL && bytes >= TUPLE_HEADER_BYTES {
            let infomask = half(page, at + INFOMASK_AT);
            let hints = if infomask & XMIN_FROZEN == XMIN_FROZEN { XMAX_HINTS } else { TRANSACTIONS };
            set_half(page, at + INFOMASK_AT, infomask & !hints);
            page[at + CID_AT..at + CID_AT + 4].fill(0);
            if half(page, at + CTID_AT + 4) == SPECULATIVE {
                set_half(page, at + CTID_AT, (block >> 16) as u16);
                set_half(page, at + CTID_AT + 2, block as u16);
                set_half(page, at + CTID_AT + 4, number);
            }
        }
        let end = (at + bytes).next_multiple_of(8).min(PAGE_BYTES);
        page[at + bytes..end].fill(0);
    }
}

/// `last_value`, `log_cnt` and `is_called` of the only row.
fn mask_sequence(page: &mut [u8]) {
    const ROW_BYTES: usize = 8 + 8 + 1;
    const ROW_HEADER_AT: usize = 22;
    let Some(line) = lines(page).into_iter().next() else { return };
    let from = line.at + usize::from(page.get(line.at + ROW_HEADER_AT).copied().unwrap_or_default());
    if let Some(row) = page.get_mut(from..from + ROW_BYTES) {
        row.fill(0);
    }
}

fn mask_btree(page: &mut [u8]) {
    const FLAGS_AT: usize = PAGE_BYTES - 4;
    const CYCLE_AT: usize = PAGE_BYTES - 2;
    const LEAF: u16 = 1;
    const SPLIT_END: u16 = 1 << 5;
    const HAS_GARBAGE: u16 = 1 << 6;
    let flags = half(page, FLAGS_AT);
    if flags & LEAF != 0 {
        mask_line_flags(page);
    }
    set_half(page, FLAGS_AT, flags & !(SPLIT_END | HAS_GARBAGE));
    set_half(page, CYCLE_AT, 0);
}

fn mask_hash(page: &mut [u8]) {
    const FLAGS_AT: usize = PAGE_BYTES - 4;
    const KINDS: u16 = 0b1111;
    const OVERFLOW_AND_BUCKET: u16 = 0b0011;
    const HAS_DEAD_TUPLES: u16 = 1 << 7;
    let flags = half(page, FLAGS_AT);
    set_half(page, FLAGS_AT, flags & !HAS_DEAD_TUPLES);
    match flags & KINDS {
        0 => mask_content(page),
        kind if kind & OVERFLOW_AND_BUCKET != 0 => mask_line_flags(page),
        _ => {}
    }
}

fn mask_gist(page: &mut [u8]) {
    const SEQUENCE_AT: usize = PAGE_BYTES - 16;
    const FLAGS_AT: usize = PAGE_BYTES - 4;
    const LEAF: u16 = 1;
    const FOLLOW_RIGHT: u16 = 1 << 3;
    const HAS_GARBAGE: u16 = 1 << 4;
    page[SEQUENCE_AT..SEQUENCE_AT + 8].fill(0);
    let flags = half(page, FLAGS_AT);
    if flags & LEAF != 0 {
        mask_line_flags(page);
    }
    set_half(page, FLAGS_AT, (flags | FOLLOW_RIGHT) & !HAS_GARBAGE);
}

fn mask_gin(page: &mut [u8]) {
    const FLAGS_AT: usize = PAGE_BYTES - 2;
    const DELETED: u16 = 1 << 2;
    if half(page, FLAGS_AT) & DELETED != 0 {
        mask_content(page);
    }
}

fn mask_spgist(page: &mut [u8]) {
    const FLAGS_AT: usize = PAGE_BYTES - 8;
    const META: u16 = 1;
    /// A magic number, then eight pages and their room.
    const REMEMBERED: std::ops::Range<usize> = HEADER_BYTES + 4..HEADER_BYTES + 4 + 8 * 8;
    if half(page, FLAGS_AT) & META != 0 {
        page[REMEMBERED].fill(0);
    }
}

fn mask_brin(page: &mut [u8]) {
    const FLAGS_AT: usize = PAGE_BYTES - 4;
    const EVACUATED: u16 = 1;
    let flags = half(page, FLAGS_AT);
    set_half(page, FLAGS_AT, flags & !EVACUATED);
}

/// Everything behind the header, and where items and room begin: of a page that waits for its next use.
fn mask_content(page: &mut [u8]) {
    page[HEADER_BYTES..].fill(0);
    page[LOWER_AT..LOWER_AT + 4].fill(0);
}

/// The flags of used line pointers, which are set without WAL when an index finds a dead row.
fn mask_line_flags(page: &mut [u8]) {
    let (lower, ..) = bounds(page);
    for at in (HEADER_BYTES..lower.saturating_sub(3)).step_by(4) {
        let line = word(page, at) & !(0b11 << 15);
        page[at..at + 4].copy_from_slice(&line.to_le_bytes());
    }
}

/// What a line pointer says.
struct Line {
    at: usize,
    flags: u32,
    bytes: usize,
}

fn lines(page: &[u8]) -> Vec<Line> {
    let (lower, ..) = bounds(page);
    let places = (HEADER_BYTES..lower.saturating_sub(3)).step_by(4);
    places
        .map(|at| {
            let line = word(page, at);
            Line { at: (line & 0x7FFF) as usize, flags: line >> 15 & 0b11, bytes: (line >> 17) as usize }
        })
        .collect()
}

fn bounds(page: &[u8]) -> (usize, usize, usize) {
    let bound = |at| usize::from(half(page, at));
    (bound(LOWER_AT), bound(UPPER_AT), bound(SPECIAL_AT))
}

fn half(page: &[u8], at: usize) -> u16 {
    page.get(at..at + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn set_half(page: &mut [u8], at: usize, value: u16) {
    page[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn word(page: &[u8], at: usize) -> u32 {
    u32::from(half(page, at)) | u32::from(half(page, at + 2)) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page with a special end and items of so many bytes.
    fn page(end: &[u8], items: &[&[u8]]) -> Vec<u8> {
        let mut page = vec![0; PAGE_BYTES];
        let special = PAGE_BYTES - end.len();
        page[special..].copy_from_slice(end);
        let mut upper = special;
        for (number, item) in items.iter().enumerate() {
            upper -= item.len().next_multiple_of(8);
            page[upper..upper + item.len()].copy_from_slice(item);
            let line = upper as u32 | NORMAL << 15 | (item.len() as u32) << 17;
            page[HEADER_BYTES + number * 4..][..4].copy_from_slice(&line.to_le_bytes());
        }
        for (at, value) in
            [(LOWER_AT, HEADER_BYTES + items.len() * 4), (UPPER_AT, upper), (SPECIAL_AT, special), (18, 0x2004)]
        {
            set_half(&mut page, at, value as u16);
        }
        page
    }

    /// A row whose header has this infomask.
    fn row(infomask: u16) -> Vec<u8> {
        let mut row = vec![0; 24 + 9];
        row[20..22].copy_from_slice(&infomask.to_le_bytes());
        row[22] = 24;
        row[24..].copy_from_slice(b"something");
        row
    }

    /// The end of a B-tree page with these flags.
    fn btree(flags: u16) -> [u8; 16] {
        let mut end = [0; 16];
        end[12..14].copy_from_slice(&flags.to_le_bytes());
        end
    }

    fn identified(bytes: usize, identifier: u16) -> Vec<u8> {
        let mut end = vec![0; bytes];
        end[bytes - 2..].copy_from_slice(&identifier.to_le_bytes());
        end
    }

    fn sequence() -> Vec<u8> {
        let mut end = vec![0; 8];
        end[..2].copy_from_slice(&0x1717u16.to_le_bytes());
        let mut row = row(0x0B00);
        row.resize(24 + 17, 0);
        page(&end, &[&row])
    }

    #[test]
    fn pages_tell_what_they_are_of() {
        let check = |page: &[u8], block, expected| assert_eq!(kind(page, block), expected);
        check(&[0; PAGE_BYTES], 0, PageKind::New);
        check(&page(&[], &[]), 0, PageKind::Heap);
        check(&page(&btree(1), &[]), 3, PageKind::Btree);
        check(&page(&identified(16, 0xFF80), &[]), 3, PageKind::Hash);
        check(&page(&identified(16, 0xFF81), &[]), 3, PageKind::Gist);
        check(&page(&identified(8, 0xFF82), &[]), 3, PageKind::SpGist);
        check(&page(&identified(8, 0xFF83), &[]), 3, PageKind::Other);
        check(&page(&identified(8, 0xF092), &[]), 1, PageKind::Brin);
        check(&page(&identified(8, 0x0002), &[]), 1, PageKind::Gin);
        check(&sequence(), 0, PageKind::Sequence);
        check(&sequence(), 1, PageKind::Gin);
    }

    /// Whether two pages are equal once both are masked.
    fn equal(one: &[u8], other: &[u8]) -> bool {
        let (mut one, mut other) = (one.to_vec(), other.to_vec());
        mask(&mut one, 7);
        mask(&mut other, 7);
        one == other
    }

    #[test]
    fn headers_and_room_do_not_count() {
        let row = row(0x0100);
        let heap = page(&[], &[&row]);
        for at in [0, 7, CHECKSUM_AT, FLAGS_AT, PRUNE_AT, HEADER_BYTES + 4, 4000, PAGE_BYTES - 40 + 33] {
            let mut other = heap.clone();
            other[at] ^= 1;
            assert!(equal(&heap, &other), "byte {at}");
        }
        let tuple = usize::from(half(&heap, UPPER_AT));
        for at in [LOWER_AT, 18, HEADER_BYTES, HEADER_BYTES + 3, tuple, tuple + 4, tuple + 12, tuple + 18, tuple + 24] {
            let mut other = heap.clone();
            other[at] ^= 1;
            assert!(!equal(&heap, &other), "byte {at}");
        }
    }

    #[test]
    fn hints_of_rows_count_only_where_wal_tells_them() {
        let check = |one, other, expected| {
            assert_eq!(equal(&page(&[], &[&row(one)]), &page(&[], &[&row(other)])), expected, "{one:x} {other:x}");
        };
        check(0x0000, 0x0100, true);
        check(0x0100, 0x0900, true);
        check(0x0100, 0x0101, false);
        check(0x0300, 0x0B00, true);
        check(0x0300, 0x0700, true);
        check(0x0300, 0x0100, false);
        check(0x0300, 0x1300, false);
        // The command's number, and the token of a row that was inserted on trial.
        let changed = |at: usize, bytes: &[u8]| {
            let mut row = row(0x0100);
            row[at..at + bytes.len()].copy_from_slice(bytes);
            page(&[], &[&row])
        };
        assert!(equal(&changed(8, &[5]), &changed(8, &[6])));
        assert!(equal(&changed(12, &[0, 0, 7, 0, 1, 0]), &changed(12, &[9, 9, 9, 9, 0xFE, 0xFF])));
        assert!(!equal(&changed(12, &[0, 0, 7, 0, 1, 0]), &changed(12, &[0, 0, 7, 0, 2, 0])));
    }

    #[test]
    fn ends_of_indexes() {
        let item = [7; 16];
        let dead = |end: &[u8]| {
            let mut page = page(end, &[&item]);
            let line = word(&page, HEADER_BYTES) | 0b11 << 15;
            page[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&line.to_le_bytes());
            page
        };
        let check = |one: &[u8], other: &[u8], expected| {
            let (one_page, other_page) = (page(one, &[&item]), page(other, &[&item]));
            assert_eq!(equal(&one_page, &other_page), expected, "{one:x?} {other:x?}");
        };
        check(&btree(1), &btree(1 | 1 << 5 | 1 << 6), true);
        check(&btree(1), &btree(1 | 1 << 7), false);
        assert!(equal(&page(&btree(1), &[&item]), &dead(&btree(1))));
        assert!(!equal(&page(&btree(0), &[&item]), &dead(&btree(0))));
        let flagged = |bytes, identifier, from_end: usize, flags: u16| {
            let mut end: Vec<u8> = identified(bytes, identifier);
            end[bytes - from_end..][..2].copy_from_slice(&flags.to_le_bytes());
            end
        };
        let hash = |flags| flagged(16, 0xFF80, 4, flags);
        check(&hash(2), &hash(2 | 1 << 7), true);
        check(&hash(2), &hash(2 | 1 << 6), false);
        assert!(equal(&page(&hash(2), &[&item]), &dead(&hash(2))));
        assert!(!equal(&page(&hash(4), &[&item]), &dead(&hash(4))));
        assert!(equal(&page(&hash(0), &[&item]), &page(&hash(0), &[])));
        let gist = |flags| flagged(16, 0xFF81, 4, flags);
        check(&gist(1), &gist(1 | 1 << 3 | 1 << 4), true);
        check(&gist(1), &gist(1 | 1 << 1), false);
        check(&gist(0), &[&[5; 8][..], &gist(0)[8..]].concat(), true);
        let gin = |flags| flagged(8, 0, 2, flags);
        check(&gin(2), &gin(3), false);
        assert!(equal(&page(&gin(4), &[&item]), &page(&gin(4), &[])));
        check(&flagged(8, 0xF093, 4, 0), &flagged(8, 0xF093, 4, 1), true);
        check(&flagged(8, 0xF093, 4, 0), &flagged(8, 0xF093, 4, 2), false);
        let (meta, data) = (flagged(8, 0xFF82, 8, 1), flagged(8, 0xFF82, 8, 4));
        for (end, expected) in [(meta, true), (data, false)] {
            let mut one = page(&end, &[]);
            set_half(&mut one, LOWER_AT, 100);
            let mut other = one.clone();
            other[40] = 3;
            assert_eq!(equal(&one, &other), expected);
        }
    }

    #[test]
    fn what_a_sequence_handed_out_does_not_count() {
        let one = sequence();
        let row = usize::from(half(&one, UPPER_AT));
        for (at, expected) in [(row + 24, true), (row + 32, true), (row + 40, true), (row + 2, false)] {
            let mut other = one.clone();
            other[at] ^= 1;
            let (mut one, mut other) = (one.clone(), other);
            mask(&mut one, 0);
            mask(&mut other, 0);
            assert_eq!(one == other, expected, "byte {at}");
        }
    }

    #[test]
    fn anything_can_be_masked() {
        let mut state = 7_u32;
        for _ in 0..300 {
            let mut page: Vec<u8> = (0..PAGE_BYTES)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) as u8
                })
                .collect();
            mask(&mut page, 3);
            let (lower, upper) = (HEADER_BYTES + (state % 1000) as usize, 7000);
            for (at, value) in
                [(LOWER_AT, lower), (UPPER_AT, upper), (SPECIAL_AT, PAGE_BYTES - (state % 3) as usize * 8)]
            {
                set_half(&mut page, at, value as u16);
            }
            mask(&mut page, 3);
        }
    }
}
