//! WAL page headers and the versions that write them.
//!
//! ```text
//! short header, every page, 24 bytes        long header, page 0 of a segment, 40 bytes
//!  0 u16 magic      2 u16 info               0 the short header
//!  4 u32 timeline   8 u64 page address      24 u64 system identifier
//! 16 u32 remaining length   20 padding      32 u32 segment size   36 u32 page size
//! ```
//!
//! `remaining length` counts the bytes of a record begun on an earlier page (`XLogPageHeaderData` in `xlog_internal.h`).

use super::{Expected, PAGE_BYTES, SegmentError};
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::lsn::Lsn;
use crate::system_identifier::SystemIdentifier;
use crate::timeline::Timeline;

/// Bytes of the header of every page but the first.
pub(super) const SHORT_HEADER_BYTES: usize = 24;
/// Bytes of the header of the first page of a segment.
pub(super) const LONG_HEADER_BYTES: usize = 40;

/// `XLP_FIRST_IS_CONTRECORD`: the page begins with the rest of a record.
pub(super) const CONTINUES: u16 = 0x01;
/// `XLP_LONG_HEADER`.
const LONG_HEADER: u16 = 0x02;

/// The oldest major version whose WAL is understood.
pub const OLDEST_KNOWN_MAJOR: u32 = VERSIONS[0].major;
/// The newest major version whose WAL is understood.
pub const NEWEST_KNOWN_MAJOR: u32 = VERSIONS[VERSIONS.len() - 1].major;

/// What differs between versions in WAL pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) magic: u16,
    pub(super) major: u32,
    /// Info bits that may be set.
    info_mask: u16,
    /// The info bit for "the record that should go on here was given up" (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`).
    pub(super) given_up: u16,
}

/// `XLOG_PAGE_MAGIC` of each release; 14 to 18 were seen on live servers, 19 is from the sources.
const VERSIONS: [Version; 6] = [
    Version { magic: 0xD10D, major: 14, info_mask: 0x0F, given_up: 0x08 },
    Version { magic: 0xD110, major: 15, info_mask: 0x0F, given_up: 0x08 },
    Version { magic: 0xD113, major: 16, info_mask: 0x0F, given_up: 0x08 },
    Version { magic: 0xD116, major: 17, info_mask: 0x0F, given_up: 0x08 },
    Version { magic: 0xD118, major: 18, info_mask: 0x0F, given_up: 0x08 },
    Version { magic: 0xD120, major: 19, info_mask: 0x07, given_up: 0x04 },
];

/// Magic numbers above that of 18 that are not in the table are of unknown newer servers; all of them have begun with this byte.
const MAGIC_FAMILY: u16 = 0xD1;
const NEWEST_RELEASED_MAGIC: u16 = 0xD118;

/// A page header, of any page.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageHeader {
    pub(super) magic: u16,
    pub(super) info: u16,
    pub(super) timeline: u32,
    pub(super) address: u64,
    pub(super) remaining_bytes: u32,
}

/// The identity that the first page of a segment declares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FirstPage {
    /// The timeline that the page was written on.
    pub(super) timeline: Timeline,
    pub(super) version: Version,
}

impl PageHeader {
    /// Reads the short header of a whole page.
    #[inline]
    pub(super) fn read(page: &[u8]) -> Self {
        Self {
            magic: u16_at(page, 0),
            info: u16_at(page, 2),
            timeline: u32_at(page, 4),
            address: u64_at(page, 8),
            remaining_bytes: u32_at(page, 16),
        }
    }
}

impl Version {
    /// Whether the info bits are ones that this version sets on a page that is (`first`) or is not the first of a segment.
    #[inline]
    pub(super) fn allows(self, info: u16, first: bool) -> bool {
        info & !self.info_mask == 0 && (info & LONG_HEADER != 0) == first
    }
}

impl FirstPage {
    /// Checks the first page of a segment file against what it must be; `None` for a version newer than known.
    ///
    /// # Errors
    /// Any [`SegmentError`] but those of the chunk and of the file's size.
    pub(super) fn read(expected: &Expected, start: Lsn, page: &[u8]) -> Result<Option<Self>, SegmentError> {
        let name = expected.name;
        let header = PageHeader::read(page);
        let Some(version) = VERSIONS.into_iter().find(|version| version.magic == header.magic) else {
            return match header.magic {
                0 if page.iter().all(|&byte| byte == 0) => {
                    Err(SegmentError::Recycled { name, expected: start, found: None })
                }
                magic if magic >> 8 != MAGIC_FAMILY => Err(SegmentError::NotWal { name, magic }),
                magic if magic > NEWEST_RELEASED_MAGIC => Ok(None),
                magic => Err(SegmentError::Version { name, magic }),
            };
        };
        if !version.allows(header.info, true) {
            return Err(SegmentError::Header {
                name,
                reason: "its flags are not those of the first page of a segment",
            });
        }
        check_geometry(expected, page)?;
        if header.address != start.as_u64() {
            return Err(SegmentError::Recycled { name, expected: start, found: Some(Lsn::new(header.address)) });
        }
        match Timeline::new(header.timeline) {
            Some(timeline) if timeline <= name.timeline() => Ok(Some(Self { timeline, version })),
            _ => Err(SegmentError::Timeline { name, found: header.timeline }),
        }
    }
}

fn check_geometry(expected: &Expected, page: &[u8]) -> Result<(), SegmentError> {
    let name = expected.name;
    let found = SystemIdentifier::new(u64_at(page, 24));
    if found != expected.system_identifier {
        return Err(SegmentError::ForeignSystem { name, expected: expected.system_identifier, found });
    }
    let geometry = |what, found_bytes: u32, expected_bytes: u64| match u64::from(found_bytes) {
        found_bytes if found_bytes != expected_bytes => {
            Err(SegmentError::Geometry { name, what, expected_bytes, found_bytes })
        }
        _ => Ok(()),
    };
    geometry("segments", u32_at(page, 32), expected.size.bytes())?;
    geometry("pages", u32_at(page, 36), PAGE_BYTES as u64)
}
