//! A stream of WAL over several segments of 1 MiB, as a server would lay it out, and its scan.

use super::*;

/// Page magics by major version.
const MAGICS: [(u32, u16); 5] = [(14, 0xD10D), (15, 0xD110), (16, 0xD113), (17, 0xD116), (18, 0xD118)];

pub(super) struct Stream {
    pub(super) postgres_major: u32,
    first: SegmentNumber,
    start: u64,
    previous: u64,
    bytes: Vec<u8>,
}

/// A block reference and what comes with it.
#[derive(Debug, Clone)]
pub(super) struct Reference {
    pub(super) fork: RelationFork,
    pub(super) block: u32,
    pub(super) image_bytes: u16,
    pub(super) data_bytes: u16,
}

/// A record without its header.
#[derive(Debug, Clone)]
pub(super) struct Plain {
    pub(super) manager: u8,
    pub(super) info: u8,
    pub(super) body: Vec<u8>,
}

impl Stream {
    pub(super) fn new(postgres_major: u32) -> Self {
        let first = SegmentNumber::new(5);
        Self { postgres_major, first, start: 5 * MIB, previous: 0, bytes: Vec::new() }
    }

    pub(super) fn position(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn header(&mut self, remaining: usize, given_up: bool) {
        let magic = MAGICS.iter().find(|(major, _)| *major == self.postgres_major).unwrap().1;
        let long = (self.bytes.len() as u64).is_multiple_of(MIB);
        let info = u16::from(remaining > 0) | if long { 2 } else { 0 } | if given_up { 8 } else { 0 };
        let address = self.position();
        self.bytes.extend(magic.to_le_bytes());
        self.bytes.extend(info.to_le_bytes());
        self.bytes.extend(1u32.to_le_bytes());
        self.bytes.extend(address.to_le_bytes());
        self.bytes.extend((remaining as u64).to_le_bytes());
        if long {
            self.bytes.extend(99u64.to_le_bytes());
            self.bytes.extend((MIB as u32).to_le_bytes());
            self.bytes.extend((PAGE_BYTES as u32).to_le_bytes());
        }
    }

    /// Appends a record; gives where it starts.
    pub(super) fn push(&mut self, plain: &Plain) -> Lsn {
        if self.bytes.len().is_multiple_of(PAGE_BYTES) {
            self.header(0, false);
        }
        let start = self.position();
        let record = plain.record(self.previous);
        self.previous = start;
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            if self.bytes.len().is_multiple_of(PAGE_BYTES) {
                self.header(rest.len(), false);
            }
            let room = PAGE_BYTES - self.bytes.len() % PAGE_BYTES;
            let (here, behind) = rest.split_at(room.min(rest.len()));
            self.bytes.extend(here);
            rest = behind;
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        Lsn::new(start)
    }

    /// Fills up with plain records until so many bytes before the end of the segment that the stream is in.
    pub(super) fn fill_until(&mut self, before_end: usize) {
        let target = (self.bytes.len() + 1).next_multiple_of(MIB as usize) - before_end;
        while self.bytes.len() + 2200 < target {
            self.push(&Plain { manager: 21, info: 0, body: message(1000) });
        }
        while self.bytes.len() < target {
            let gap = target - self.bytes.len();
            assert!(gap >= 32, "no room for another record");
            let total = if gap > 250 { 200 } else { gap };
            self.push(&Plain { manager: 21, info: 0, body: message(total - 24 - 2) });
        }
        assert_eq!(self.bytes.len(), target);
    }

    /// Cuts the stream here, which must be the end of a page, and goes on with a page that gives the open record up.
    pub(super) fn give_up(&mut self, last: Lsn, pages: usize) {
        self.bytes.truncate(pages * PAGE_BYTES);
        self.header(0, true);
        self.previous = last.as_u64();
    }

    /// Zeros up to the end of the segment.
    pub(super) fn close_segment(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(MIB as usize), 0);
    }

    /// What each segment tells, after a round through its encoding.
    pub(super) fn changes(&self, chunk_pages: usize) -> Vec<SegmentChanges> {
        let whole = (self.bytes.len() as u64).next_multiple_of(MIB) as usize;
        let mut bytes = self.bytes.clone();
        bytes.resize(whole, 0);
        let mut number = self.first;
        bytes
            .chunks(MIB as usize)
            .map(|segment| {
                let expected = Expected {
                    name: SegmentName::new(Timeline::FIRST, number, SegmentSize::MIN),
                    size: SegmentSize::MIN,
                    system_identifier: SystemIdentifier::new(99),
                    partial: false,
                };
                number = number.next();
                let mut scan = ChangeScan::new(expected);
                segment.chunks(chunk_pages * PAGE_BYTES).for_each(|chunk| scan.push(chunk).unwrap());
                let (_, changes) = scan.finish().unwrap();
                assert_eq!(SegmentChanges::decode(&changes.encode()), Ok(changes.clone()));
                changes
            })
            .collect()
    }

    /// The joined map of the whole stream.
    pub(super) fn map(&self) -> Result<ChangeMap, Doubt> {
        join(Lsn::new(self.start)..Lsn::new(self.position()), &self.changes(16))
    }
}

impl Plain {
    pub(super) fn record(&self, previous: u64) -> Vec<u8> {
        let mut header = Vec::new();
        header.extend((24 + self.body.len() as u32).to_le_bytes());
        header.extend(777u32.to_le_bytes());
        header.extend(previous.to_le_bytes());
        header.extend([self.info, self.manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&self.body), &header);
        [&header[..], &crc.to_le_bytes(), &self.body].concat()
    }
}

/// A body of main data alone, of so many bytes.
fn message(bytes: usize) -> Vec<u8> {
    main_data(&vec![0xAB; bytes])
}

/// Main data with its header.
pub(super) fn main_data(data: &[u8]) -> Vec<u8> {
    match u8::try_from(data.len()) {
        Ok(0) => Vec::new(),
        Ok(bytes) => [&[255, bytes][..], data].concat(),
        Err(_) => [&[254][..], &(data.len() as u32).to_le_bytes(), data].concat(),
    }
}

/// The body of a record with references; what a server compresses is told by `compressed`, the flag of its version.
pub(super) fn body(references: &[Reference], compressed: Option<u8>, main: &[u8]) -> Vec<u8> {
    let (mut headers, mut data) = (Vec::new(), Vec::new());
    let mut previous = None;
    for (id, reference) in references.iter().enumerate() {
        let Reference { fork, block, image_bytes, data_bytes } = reference.clone();
        let same = previous == Some((fork.directory(), fork.relation));
        previous = Some((fork.directory(), fork.relation));
        let flags = fork.fork.number()
            | if image_bytes > 0 { 0x10 } else { 0 }
            | if data_bytes > 0 { 0x20 } else { 0 }
            | if same { 0x80 } else { 0 };
        headers.extend([id as u8, flags]);
        headers.extend(data_bytes.to_le_bytes());
        if image_bytes > 0 {
            headers.extend(image_bytes.to_le_bytes());
            headers.extend(100u16.to_le_bytes());
            headers.push(1 | compressed.unwrap_or(0));
            if compressed.is_some() {
                headers.extend(500u16.to_le_bytes());
            }
        }
        if !same {
            for part in [fork.tablespace, fork.database, fork.relation] {
                headers.extend(part.to_le_bytes());
            }
        }
        headers.extend(block.to_le_bytes());
        data.extend(vec![0xFE; usize::from(image_bytes) + usize::from(data_bytes)]);
    }
    let main_header = main_data(main);
    let main_header = &main_header[..main_header.len() - main.len()];
    [&headers[..], &[253, 1, 2, 252, 9, 9, 9, 9], main_header, &data, main].concat()
}
