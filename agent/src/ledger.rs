//! The ledger: which WAL files are durable off this host, so that PostgreSQL's question is answered without reading again.
//!
//! One line an answer, each with a CRC-32C in front:
//!
//! ```text
//! <crc> <wal file> <system identifier> <dev> <ino> <size> <mtime ns> <ctime ns> <fingerprint> <road> <repository or ->
//! ```
//!
//! Invariants: an answer counts only for the very file it was given for: same name, system identifier, device, inode,
//! size, modification and change time; and only as long as the repository is the one that took it. A line that is torn, damaged or of another form is skipped.
//! Nothing here is flushed to disk: a lost answer costs one more look at the file and one more "already stored" from the
//! stores, never a wrong acknowledgement. Where there is no room for the file, answers are in memory alone until there is some.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use postgres_format::{SystemIdentifier, WalFileName};
use repository::wal::Fingerprint;
use uuid::Uuid;

use crate::road::Road;

/// Most answers kept; more pause the look-ahead.
pub const ANSWERS_MAX: usize = 65_536;
/// Answers kept after PostgreSQL took them, in case it asks again after a crash.
const TAKEN_KEPT: u64 = 1_024;
/// Largest ledger read at start, in bytes; a longer one is started over.
const LEDGER_BYTES_MAX: u64 = 64 << 20;
/// Lines beyond twice the living answers after which the file is written anew.
const SLACK_LINES: usize = 1_024;
/// Stands for a repository that was not known.
const NO_REPOSITORY: &str = "-";

/// What identifies the very file an answer was given for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStamp {
    /// Cluster the data directory belonged to.
    pub system_identifier: SystemIdentifier,
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Modification time, nanoseconds since 1970.
    pub modified_ns: i128,
    /// Change time of the inode, nanoseconds since 1970.
    pub changed_ns: i128,
}

impl FileStamp {
    /// Takes the stamp off a file's metadata.
    pub fn of(metadata: &std::fs::Metadata, system_identifier: SystemIdentifier) -> Self {
        let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Self {
            system_identifier,
            device: metadata.dev(),
            inode: metadata.ino(),
            size_bytes: metadata.len(),
            modified_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// One answer: the file is durable off this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The file it was given for.
    pub stamp: FileStamp,
    /// Fingerprint of its content.
    pub fingerprint: Fingerprint,
    /// The road it went.
    pub road: Road,
    /// The repository that took it; absent while no coordinator had named it.
    pub repository: Option<Uuid>,
}

#[derive(Debug)]
struct Entry {
    answer: Answer,
    sequence: u64,
    scan: u64,
}

/// All answers, in memory and in one append-only file.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    /// `None` while there is no room for it.
    file: Option<File>,
    entries: HashMap<WalFileName, Entry>,
    lines: usize,
    sequence: u64,
    scan: u64,
}

impl Ledger {
    /// Opens the file, reading what is whole in it, and starts it over without the rest.
    ///
    /// # Errors
    /// When the file cannot be read or written, but for want of room.
    pub fn open(path: &Path) -> io::Result<Self> {
        let entries = match File::open(path) {
            Ok(file) if file.metadata()?.len() <= LEDGER_BYTES_MAX => read(file)?,
            Ok(_) => HashMap::new(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => HashMap::new(),
            Err(error) => return Err(error),
        };
        let sequence = entries.len() as u64;
        let mut ledger = Self { path: path.to_owned(), file: None, entries, lines: 0, sequence, scan: 0 };
        ledger.write_anew()?;
        Ok(ledger)
    }

    /// The answer for exactly this file and repository.
    pub fn find(&self, name: &WalFileName, stamp: &FileStamp, repository: Option<Uuid>) -> Option<&Answer> {
        let answer = self.entries.get(name).map(|entry| &entry.answer)?;
        (answer.stamp == *stamp && answer.repository == repository).then_some(answer)
    }

    /// Forgets the answers of other repositories.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep_only(&mut self, repository: Option<Uuid>) -> io::Result<()> {
        let before = self.entries.len();
        self.entries.retain(|_, entry| entry.answer.repository == repository);
        if self.entries.len() < before {
            self.write_anew()?;
        }
        Ok(())
    }

    /// Whether there is any answer under this name; what it is worth shows when PostgreSQL asks.
    pub fn contains(&self, name: &WalFileName) -> bool {
        self.entries.contains_key(name)
    }

    /// Number of answers.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes in an answer. It counts from now on, even if it could not be written.
    ///
    /// # Errors
    /// When the line could not be written; the answer is then lost with this process.
    pub fn record(&mut self, name: WalFileName, answer: Answer) -> io::Result<()> {
        self.sequence += 1;
        let entry = Entry { answer, sequence: self.sequence, scan: self.scan };
        self.entries.insert(name, entry);
        self.lines += 1;
        match &mut self.file {
            Some(file) => file.write_all(line(&name, &answer).as_bytes())?,
            None => self.write_anew()?,
        }
        if self.file.is_some() && self.lines > 2 * self.entries.len() + SLACK_LINES {
            self.write_anew()?;
        }
        if self.file.is_none() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    /// Forgets one answer that turned out to be for another file.
    pub fn forget(&mut self, name: &WalFileName) {
        self.entries.remove(name);
    }

    /// Forgets the answer for a content, or for a file whatever its content, that no store has any more.
    pub fn forget_content(&mut self, name: &WalFileName, content: Option<&Fingerprint>) {
        let answer = self.entries.get(name).map(|entry| entry.answer.fingerprint);
        if answer.is_some_and(|answer| content.is_none_or(|content| *content == answer)) {
            self.entries.remove(name);
        }
    }

    /// Begins a look at the files PostgreSQL still wants archived.
    pub fn begin_scan(&mut self) {
        self.scan += 1;
    }

    /// Says that PostgreSQL still wants this file archived.
    pub fn seen_ready(&mut self, name: &WalFileName) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.scan = self.scan;
        }
    }

    /// Ends the look: answers PostgreSQL has taken are dropped, but for the newest.
    pub fn end_scan(&mut self) {
        let (scan, oldest) = (self.scan, self.sequence.saturating_sub(TAKEN_KEPT));
        self.entries.retain(|_, entry| entry.scan >= scan || entry.sequence > oldest);
    }

    /// Forgets everything: another cluster lives in the data directory now.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn clear(&mut self) -> io::Result<()> {
        self.entries.clear();
        self.write_anew()
    }

    /// Writes the file anew, if there is room for it. What an older one says counts for no other file and repository.
    fn write_anew(&mut self) -> io::Result<()> {
        match written_anew(&self.path, &self.entries) {
            Ok(file) => (self.file, self.lines) = (Some(file), self.entries.len()),
            Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                self.file = None;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn read(file: File) -> io::Result<HashMap<WalFileName, Entry>> {
    let mut text = Vec::new();
    file.take(LEDGER_BYTES_MAX).read_to_end(&mut text)?;
    let mut entries = HashMap::new();
    for (number, line) in text.split(|byte| *byte == b'\n').enumerate() {
        if let Some((name, answer)) = parse(line) {
            entries.insert(name, Entry { answer, sequence: number as u64, scan: 0 });
        }
    }
    if entries.len() > ANSWERS_MAX {
        entries.clear();
    }
    Ok(entries)
}

fn written_anew(path: &Path, entries: &HashMap<WalFileName, Entry>) -> io::Result<File> {
    let temporary = crate::durable::temporary_name(path);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    let text: String = entries.iter().map(|(name, entry)| line(name, &entry.answer)).collect();
    file.write_all(text.as_bytes())?;
    std::fs::rename(&temporary, path)?;
    Ok(file)
}

fn line(name: &WalFileName, answer: &Answer) -> String {
    let FileStamp { system_identifier, device, inode, size_bytes, modified_ns, changed_ns } = answer.stamp;
    let repository = answer.repository.map_or_else(|| NO_REPOSITORY.to_owned(), |repository| repository.to_string());
    let fields = format!(
        "{name} {system_identifier} {device} {inode} {size_bytes} {modified_ns} {changed_ns} {} {} {repository}",
        answer.fingerprint, answer.road
    );
    let mut line = String::with_capacity(fields.len() + 10);
    let _ = writeln!(line, "{:08x} {fields}", crc32c::crc32c(fields.as_bytes()));
    line
}

fn parse(line: &[u8]) -> Option<(WalFileName, Answer)> {
    let (crc, fields) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    if u32::from_str_radix(crc, 16).ok()? != crc32c::crc32c(fields.as_bytes()) {
        return None;
    }
    let mut fields = fields.split(' ');
    let mut next = || fields.next();
    let name = next()?.parse().ok()?;
    let stamp = FileStamp {
        system_identifier: next()?.parse().ok()?,
        device: next()?.parse().ok()?,
        inode: next()?.parse().ok()?,
        size_bytes: next()?.parse().ok()?,
        modified_ns: next()?.parse().ok()?,
        changed_ns: next()?.parse().ok()?,
    };
    let fingerprint = next()?.parse().ok()?;
    let road = match next()? {
        "coordinator" => Road::Coordinator,
        "direct" => Road::Direct,
        _ => return None,
    };
    let repository = match next()? {
        NO_REPOSITORY => None,
        repository => Some(repository.parse().ok()?),
    };
    Some((name, Answer { stamp, fingerprint, road, repository }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Option<Uuid> = Some(Uuid::from_u128(7));

    fn name(number: u32) -> WalFileName {
        format!("0000000100000000{number:08X}").parse().unwrap()
    }

    fn answer(inode: u64) -> Answer {
        Answer {
            stamp: FileStamp {
                system_identifier: SystemIdentifier::new(7_123_456_789),
                device: 3,
                inode,
                size_bytes: 16 << 20,
                modified_ns: 1_700_000_000_123_456_789,
                changed_ns: 1_700_000_000_223_456_789,
            },
            fingerprint: Fingerprint::of_sha256(&[7; 32]),
            road: Road::Direct,
            repository: OURS,
        }
    }

    #[test]
    fn answers_survive_a_restart_and_count_only_for_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap();
        ledger.record(name(1), answer(10)).unwrap();
        ledger.record(name(2), answer(11)).unwrap();
        ledger.record(name(2), answer(12)).unwrap();
        drop(ledger);
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.len(), 2);
        assert_eq!(ledger.find(&name(1), &answer(10).stamp, OURS), Some(&answer(10)));
        assert_eq!(ledger.find(&name(2), &answer(12).stamp, OURS), Some(&answer(12)));
        for change in [
            |stamp: &mut FileStamp| stamp.device += 1,
            |stamp: &mut FileStamp| stamp.inode += 1,
            |stamp: &mut FileStamp| stamp.size_bytes += 1,
            |stamp: &mut FileStamp| stamp.modified_ns += 1,
            |stamp: &mut FileStamp| stamp.changed_ns += 1,
            |stamp: &mut FileStamp| stamp.system_identifier = SystemIdentifier::new(1),
        ] {
            let mut stamp = answer(10).stamp;
            change(&mut stamp);
            assert_eq!(ledger.find(&name(1), &stamp, OURS), None);
        }
    }

    #[test]
    fn answers_of_another_repository_do_not_count_and_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap();
        ledger.record(name(1), answer(10)).unwrap();
        ledger.record(name(2), Answer { repository: None, ..answer(11) }).unwrap();
        for other in [None, Some(Uuid::from_u128(8))] {
            assert_eq!(ledger.find(&name(1), &answer(10).stamp, other), None);
        }
        assert!(ledger.find(&name(2), &answer(11).stamp, None).is_some());
        ledger.keep_only(OURS).unwrap();
        let again = Ledger::open(&path).unwrap();
        assert!(again.contains(&name(1)) && !again.contains(&name(2)));
        ledger.keep_only(None).unwrap();
        assert!(ledger.is_empty() && Ledger::open(&path).unwrap().is_empty());
    }

    #[test]
    fn a_ledger_cut_or_changed_anywhere_gives_only_whole_answers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap();
        for number in 0..3 {
            ledger.record(name(number), answer(u64::from(number))).unwrap();
        }
        drop(ledger);
        let whole = std::fs::read(&path).unwrap();
        let all: Vec<_> = (0..3).map(|number| (name(number), answer(u64::from(number)))).collect();
        let check = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let ledger = Ledger::open(&path).unwrap();
            for (name, entry) in &ledger.entries {
                assert!(all.contains(&(*name, entry.answer)), "{name} made up from {bytes:?}");
            }
            ledger.len()
        };
        for cut in 0..whole.len() {
            assert!(check(&whole[..cut]) <= 3);
        }
        for place in 0..whole.len() {
            let mut changed = whole.clone();
            changed[place] ^= 1;
            assert!(check(&changed) >= 1, "byte {place}");
        }
        assert_eq!(check(&whole), 3);
    }

    #[test]
    fn answers_postgresql_has_taken_are_dropped_but_for_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(&folder.path().join("ledger")).unwrap();
        for number in 0..200_u32 {
            for low in 0..10_u32 {
                ledger.record(name(number * 10 + low), answer(1)).unwrap();
            }
        }
        ledger.begin_scan();
        ledger.seen_ready(&name(3));
        ledger.end_scan();
        assert!(ledger.contains(&name(3)) && ledger.contains(&name(1999)) && !ledger.contains(&name(4)));
        assert_eq!(ledger.len(), 1_025);
        ledger.clear().unwrap();
        assert!(ledger.is_empty());
    }
}
