//! Looks at every page of relations while they are read, by the rules of [`postgres_format::page`]: a page that looks
//! wrong is read again after a pause, up to three times; what stays wrong and unchanged is corrupt and recorded. The
//! backup goes on and tells.
//!
//! A page that was read again replaces the first reading in the buffer, so that what is stored is what was judged.

use std::fmt;
use std::fs::File;
use std::io;
use std::time::Duration;

use postgres_format::Lsn;
use postgres_format::control_file::ControlFile;
use postgres_format::page::{self, Checksums, PageState, Suspicion, Verdict};
use serde::{Deserialize, Serialize};

use super::reader::read_at_most;

/// Pauses before each further look at suspect pages.
const LOOKS: [Duration; 3] = [Duration::from_millis(10), Duration::from_millis(30), Duration::from_millis(100)];
/// Most corrupt pages recorded of one piece; all are counted.
const RECORDED_MAX: usize = 200;

/// How pages are judged in one backup.
#[derive(Clone, Copy, Debug)]
pub struct PageCheck {
    start: Lsn,
    checksums: Checksums,
    page_bytes: usize,
    relation_segment_blocks: u32,
}

/// What was found in the pages of a piece or a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageFindings {
    corrupt: Vec<CorruptPage>,
    corrupt_count: u64,
    /// The page with the highest LSN among those not verified because WAL holds them.
    newest: Option<(Lsn, u32)>,
}

/// A corrupt page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CorruptPage {
    /// Its number within its file.
    pub block: u32,
    /// Its own LSN, as far as it can be believed.
    pub lsn: Lsn,
    /// What is wrong with it.
    #[serde(with = "SuspicionRow")]
    pub suspicion: Suspicion,
}

/// What is wrong with a page, as it is written down.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Suspicion")]
enum SuspicionRow {
    Checksum { found: u16, expected: u16 },
    NotEmpty,
    Header,
}

/// One line about the pages of a file.
#[derive(Clone, Copy, Debug)]
pub struct PageTrouble {
    count: u64,
    first: u32,
}

impl fmt::Display for PageTrouble {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} corrupt pages, the first is block {}", self.count, self.first)
    }
}

impl PageFindings {
    /// Takes over what was found in the next piece of the same file.
    pub fn merge(&mut self, other: &Self) {
        let room = RECORDED_MAX.saturating_sub(self.corrupt.len());
        self.corrupt.extend(other.corrupt.iter().take(room));
        self.corrupt_count += other.corrupt_count;
        self.newest = self.newest.max(other.newest);
    }

    /// Numbers of the corrupt pages within their file, as far as they are recorded.
    pub(super) fn corrupt_blocks(&self) -> impl Iterator<Item = u32> {
        self.corrupt.iter().map(|page| page.block)
    }

    /// Bytes that it holds besides itself.
    pub(super) fn held_bytes(&self) -> usize {
        self.corrupt.len() * size_of::<CorruptPage>()
    }

    /// Whether any page is corrupt.
    pub(super) fn has_corrupt(&self) -> bool {
        self.corrupt_count > 0
    }

    /// The highest LSN of a page that was not verified because WAL holds it.
    pub(super) fn newest_lsn(&self) -> Option<Lsn> {
        self.newest.map(|(lsn, _)| lsn)
    }

    /// How many pages are bad: corrupt ones, and one whose LSN lies beyond the end of the backup, which no server wrote.
    pub fn count(&self, stop: Lsn) -> u64 {
        self.corrupt_count + u64::from(self.beyond(stop).is_some())
    }

    /// Bad pages with what is wrong, for the manifest.
    pub fn problems(&self, stop: Lsn) -> Vec<(u32, String)> {
        let corrupt = self.corrupt.iter().map(|page| {
            let problem = match page.suspicion {
                Suspicion::Checksum { found, expected } => {
                    format!("checksum {found:04X}, expected {expected:04X}, page LSN {}", page.lsn)
                }
                Suspicion::NotEmpty => "marked as new, but not empty".to_owned(),
                Suspicion::Header => format!("impossible header, page LSN {}", page.lsn),
            };
            (page.block, problem)
        });
        let beyond = self
            .beyond(stop)
            .map(|(lsn, block)| (block, format!("page LSN {lsn} lies beyond the end of the backup {stop}")));
        corrupt.chain(beyond).collect()
    }

    /// One line for people; none if all is well.
    pub fn trouble(&self, stop: Lsn) -> Option<PageTrouble> {
        let first =
            self.corrupt.first().map(|page| page.block).or_else(|| self.beyond(stop).map(|(_, block)| block))?;
        Some(PageTrouble { count: self.count(stop), first })
    }

    fn beyond(&self, stop: Lsn) -> Option<(Lsn, u32)> {
        self.newest.filter(|(lsn, _)| *lsn > stop)
    }

    fn record(&mut self, page: CorruptPage) {
        self.corrupt_count += 1;
        if self.corrupt.len() < RECORDED_MAX {
            self.corrupt.push(page);
        }
    }
}

/// A page to be looked at again.
#[derive(Clone, Copy)]
struct Suspect {
    at: usize,
    block_in_file: u32,
    suspicion: Suspicion,
}

impl PageCheck {
    /// By the backup's start and what `pg_control` says of pages.
    pub fn new(start: Lsn, control: &ControlFile) -> Self {
        // While checksums are being switched (2 and 3, from PostgreSQL 19 on) pages without one are normal.
        let checksums = if control.checksum_version == 1 { Checksums::On } else { Checksums::Off };
        Self {
            start,
            checksums,
            page_bytes: control.block_size as usize,
            relation_segment_blocks: control.relation_segment_blocks,
        }
    }

    /// Bytes in a page.
    pub(super) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Looks at the pages of `buffer`, read from byte `at` of segment `segment` of a relation. `at` is a page boundary.
    /// Gives the numbers within the file, ascending, of those whose bytes cannot be believed: corrupt or being written.
    pub(super) fn inspect(
        &self,
        file: &File,
        segment: u32,
        at: u64,
        buffer: &mut [u8],
        findings: &mut PageFindings,
    ) -> io::Result<Vec<u32>> {
        let first = u32::try_from(at / self.page_bytes as u64).unwrap_or(u32::MAX);
        let mut suspects = Vec::new();
        for (index, page) in buffer.chunks(self.page_bytes).enumerate() {
            let block_in_file = first.wrapping_add(index as u32);
            match page::inspect(page, self.block(segment, block_in_file), self.start, self.checksums) {
                PageState::New | PageState::Whole => {}
                PageState::Partial => {}
                PageState::Changed { lsn } => findings.newest = findings.newest.max(Some((lsn, block_in_file))),
                PageState::Suspect(suspicion) => {
                    suspects.push(Suspect { at: index * self.page_bytes, block_in_file, suspicion })
                }
            }
        }
        match suspects.is_empty() {
            true => Ok(Vec::new()),
            false => self.look_again(file, segment, at, buffer, suspects, findings),
        }
    }

    fn look_again(
        &self,
        file: &File,
        segment: u32,
        at: u64,
        buffer: &mut [u8],
        mut suspects: Vec<Suspect>,
        findings: &mut PageFindings,
    ) -> io::Result<Vec<u32>> {
        let (mut again, mut doubtful) = (vec![0; self.page_bytes], Vec::new());
        // Once bytes were seen to change, the server is at work on that page, and recovery repairs it.
        for pause in LOOKS {
            pause_reader(pause);
            let mut remaining = Vec::new();
            for suspect in suspects {
                let got = read_at_most(file, &mut again, at + suspect.at as u64)?;
                let end = buffer.len().min(suspect.at + self.page_bytes);
                let before = &mut buffer[suspect.at..end];
                let block = self.block(segment, suspect.block_in_file);
                match page::second_look(before, &again[..got], block, self.start, self.checksums) {
                    Verdict::Corrupt(suspicion) => remaining.push(Suspect { suspicion, ..suspect }),
                    Verdict::Fine(state) => {
                        if let PageState::Changed { lsn } = state {
                            findings.newest = findings.newest.max(Some((lsn, suspect.block_in_file)));
                        }
                        if got == before.len() {
                            before.copy_from_slice(&again);
                        }
                    }
                    Verdict::BeingWritten => {
                        doubtful.push(suspect.block_in_file);
                        if got == before.len() {
                            before.copy_from_slice(&again);
                        }
                    }
                }
            }
            suspects = remaining;
            if suspects.is_empty() {
                break;
            }
        }
        for suspect in suspects {
            let lsn = page::lsn(&buffer[suspect.at..]);
            findings.record(CorruptPage { block: suspect.block_in_file, lsn, suspicion: suspect.suspicion });
            doubtful.push(suspect.block_in_file);
        }
        doubtful.sort_unstable();
        Ok(doubtful)
    }

    fn block(&self, segment: u32, block_in_file: u32) -> u32 {
        page::block_number(segment, self.relation_segment_blocks, block_in_file)
    }
}

/// A reader has a thread of its own; what it waits for, the end of the server's write, announces itself to nobody.
#[expect(clippy::disallowed_methods, reason = "nothing tells when a torn page has become whole; bounded by LOOKS")]
fn pause_reader(pause: Duration) {
    std::thread::sleep(pause);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const PAGE: usize = 8192;

    fn check() -> PageCheck {
        PageCheck {
            start: Lsn::new(1000),
            checksums: Checksums::On,
            page_bytes: PAGE,
            relation_segment_blocks: 131_072,
        }
    }

    /// A page as the server writes it: LSN, checksum for `block`, some content.
    fn page(lsn: u32, block: u32) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        page[4..8].copy_from_slice(&lsn.to_le_bytes());
        page[12..20].copy_from_slice(&[24, 0, 0, 32, 0, 32, 4, 32]);
        page[8000..8005].copy_from_slice(b"tuple");
        let checksum = page::checksum(&page, block);
        page[8..10].copy_from_slice(&checksum.to_le_bytes());
        page
    }

    fn inspect(segment: u32, pages: &[Vec<u8>]) -> PageFindings {
        let file = tempfile::tempfile().unwrap();
        let mut buffer = pages.concat();
        file.write_all_at(&buffer, 0).unwrap();
        let mut findings = PageFindings::default();
        check().inspect(&file, segment, 0, &mut buffer, &mut findings).unwrap();
        findings
    }

    #[test]
    fn whole_new_and_changed_pages_pass() {
        let mut torn = page(2000, 2);
        torn[8001] = b'!';
        let findings = inspect(0, &[page(1, 0), vec![0; PAGE], torn, page(5, 3)[..100].to_vec()]);
        assert_eq!(findings.count(Lsn::new(3000)), 0);
        assert_eq!(findings.count(Lsn::new(1500)), 1, "an LSN beyond the stop is garbage");
    }

    #[test]
    fn a_flipped_bit_is_recorded_with_its_block() {
        let mut bad = page(7, 1);
        bad[8001] ^= 1;
        let findings = inspect(0, &[page(1, 0), bad]);
        assert_eq!(findings.problems(Lsn::new(3000)).iter().map(|(block, _)| *block).collect::<Vec<_>>(), [1]);
        assert_eq!(findings.trouble(Lsn::new(3000)).unwrap().to_string(), "1 corrupt pages, the first is block 1");
    }

    #[test]
    fn block_numbers_go_on_in_later_segments() {
        assert_eq!(inspect(1, &[page(1, 131_072)]).count(Lsn::new(3000)), 0);
        assert_eq!(inspect(1, &[page(1, 0)]).count(Lsn::new(3000)), 1);
    }

    #[test]
    fn a_page_made_whole_meanwhile_replaces_the_torn_reading() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&page(9, 0), 0).unwrap();
        let mut buffer = page(9, 0);
        buffer[8001] ^= 1;
        let mut findings = PageFindings::default();
        check().inspect(&file, 0, 0, &mut buffer, &mut findings).unwrap();
        assert_eq!((findings.count(Lsn::new(3000)), buffer), (0, page(9, 0)));
    }
}
