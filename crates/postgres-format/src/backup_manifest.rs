//! PostgreSQL's own `backup_manifest`, so that `pg_verifybackup` and incremental backups of the server accept what we restore.
//!
//! Version 1 up to PostgreSQL 16; version 2, which adds the system identifier, from 17 on. The reader refuses keys that it does not know, so
//! nothing of ours is in it. Its last line is the SHA-256 of all lines before (`backup_manifest.c`, `parse_manifest.c`). Not listed by the
//! caller: the manifest itself, and what is under `pg_wal`.

use std::io::{self, Write};

use sha2::{Digest, Sha256};

use crate::lsn::Lsn;
use crate::system_identifier::SystemIdentifier;
use crate::timeline::Timeline;

/// Writes a manifest line by line; memory does not grow with the number of files.
#[derive(Debug)]
pub struct ManifestWriter<W: Write> {
    out: W,
    digest: Sha256,
    files: u64,
}

/// WAL that a backup needs on one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalRange {
    /// The timeline.
    pub timeline: Timeline,
    /// The first position needed.
    pub start: Lsn,
    /// The first position no longer needed.
    pub end: Lsn,
}

/// The first major version with version 2 of the format.
const FIRST_MAJOR_OF_2: u32 = 17;

impl<W: Write> ManifestWriter<W> {
    /// Begins the manifest of a backup of a server of this major version.
    pub fn new(out: W, postgres_major: u32, system_identifier: SystemIdentifier) -> io::Result<Self> {
        let mut writer = Self { out, digest: Sha256::new(), files: 0 };
        if postgres_major >= FIRST_MAJOR_OF_2 {
            writer.put("{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n")?;
            writer.put(&format!("\"System-Identifier\": {system_identifier},\n"))?;
        } else {
            writer.put("{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n")?;
        }
        writer.put("\"Files\": [")?;
        Ok(writer)
    }

    /// Adds a file: its path relative to the data directory (tablespaces as `pg_tblspc/OID/PG_…`) in the file system's own bytes, its size in
    /// bytes, its last change in seconds since 1970-01-01 UTC, and the CRC-32C of its content.
    pub fn file(&mut self, path: &[u8], size_bytes: u64, modified_unix_seconds: i64, crc32c: u32) -> io::Result<()> {
        let path = match std::str::from_utf8(path) {
            Ok(path) => format!("\"Path\": {}", quoted(path)),
            Err(_) => format!("\"Encoded-Path\": \"{}\"", hex(path)),
        };
        let lead = if self.files == 0 { "\n" } else { ",\n" };
        // Bytes as they lie in memory on a little-endian host: that is how the server writes them.
        let checksum = hex(&crc32c.to_le_bytes());
        let modified = gmt(modified_unix_seconds);
        self.files += 1;
        self.put(&format!(
            "{lead}{{ {path}, \"Size\": {size_bytes}, \"Last-Modified\": \"{modified}\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{checksum}\" }}"
        ))
    }

    /// Ends the manifest with the WAL that the backup needs, the newest timeline first, and gives the writer back.
    pub fn finish(mut self, wal_ranges: &[WalRange]) -> io::Result<W> {
        self.put("\n],\n\"WAL-Ranges\": [\n")?;
        for (index, range) in wal_ranges.iter().enumerate() {
            let lead = if index == 0 { "" } else { ",\n" };
            let WalRange { timeline, start, end } = range;
            self.put(&format!(
                "{lead}{{ \"Timeline\": {timeline}, \"Start-LSN\": \"{start}\", \"End-LSN\": \"{end}\" }}"
            ))?;
        }
        self.put("\n],\n")?;
        let digest = hex(&self.digest.finalize());
        self.out.write_all(format!("\"Manifest-Checksum\": \"{digest}\"}}\n").as_bytes())?;
        Ok(self.out)
    }

    fn put(&mut self, text: &str) -> io::Result<()> {
        self.digest.update(text.as_bytes());
        self.out.write_all(text.as_bytes())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A JSON string, as the server quotes it (`escape_json`).
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for character in text.chars() {
        match character {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{c}' => quoted.push_str("\\f"),
            control if control < ' ' => quoted.push_str(&format!("\\u{:04x}", u32::from(control))),
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

/// `2026-11-23 04:13:14 GMT`, clamped to the years that the format can hold.
fn gmt(unix_seconds: i64) -> String {
    const YEAR_10000: i64 = 253_402_300_800;
    const YEAR_1: i64 = -62_135_596_800;
    let seconds = unix_seconds.clamp(YEAR_1, YEAR_10000 - 1);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} GMT", second / 3600, second / 60 % 60, second % 60)
}

/// The Gregorian date of a day counted from 1970-01-01. Years are counted from March, so that the leap day is the last.
fn civil(days: i64) -> (i64, i64, i64) {
    let day = days + 719_468;
    let (era, day_of_era) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day_of_month)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    /// The text between two marks of a line.
    fn between<'a>(line: &'a str, from: &str, to: &str) -> &'a str {
        line.split_once(from).unwrap().1.split_once(to).unwrap().0
    }

    fn unix(text: &str) -> i64 {
        let field = |from: usize, to: usize| text[from..to].parse::<i64>().unwrap();
        let (year, month, day) = (field(0, 4), field(5, 7), field(8, 10));
        let day = (0..60_000).find(|&days| civil(days) == (year, month, day)).unwrap();
        day * 86_400 + field(11, 13) * 3600 + field(14, 16) * 60 + field(17, 19)
    }

    #[test]
    fn the_servers_own_manifest_is_written_byte_for_byte() {
        let live = String::from_utf8(samples::named("15-backup_manifest")).unwrap();
        let mut writer = ManifestWriter::new(Vec::new(), 15, SystemIdentifier::new(1)).unwrap();
        for line in live.lines().filter(|line| line.starts_with("{ \"Path\"")) {
            let checksum = u32::from_str_radix(between(line, "\"Checksum\": \"", "\""), 16).unwrap().swap_bytes();
            let size = between(line, "\"Size\": ", ",").parse().unwrap();
            let modified = unix(between(line, "\"Last-Modified\": \"", "\""));
            writer.file(between(line, "\"Path\": \"", "\"").as_bytes(), size, modified, checksum).unwrap();
        }
        let range = live.lines().find(|line| line.starts_with("{ \"Timeline\"")).unwrap();
        let range = WalRange {
            timeline: between(range, "\"Timeline\": ", ",").parse().unwrap(),
            start: between(range, "\"Start-LSN\": \"", "\"").parse().unwrap(),
            end: between(range, "\"End-LSN\": \"", "\"").parse().unwrap(),
        };
        let ours = String::from_utf8(writer.finish(&[range]).unwrap()).unwrap();
        assert!(ours == live, "the manifests differ: ours ends {:?}", &ours[ours.len() - 200..]);
    }

    #[test]
    fn version_2_and_odd_names() {
        let mut writer = ManifestWriter::new(Vec::new(), 17, SystemIdentifier::new(u64::MAX)).unwrap();
        writer.file(b"a\"b\\c\x01", 0, -1, 0x2247_748A).unwrap();
        writer.file(b"\xFF/x", 1, 951_782_400, 0).unwrap();
        let range = |timeline, start, end| WalRange {
            timeline: Timeline::new(timeline).unwrap(),
            start: Lsn::new(start),
            end: Lsn::new(end),
        };
        let text = String::from_utf8(writer.finish(&[range(2, 32, 48), range(1, 16, 32)]).unwrap()).unwrap();
        let expected = [
            "{ \"PostgreSQL-Backup-Manifest-Version\": 2,",
            "\"System-Identifier\": 18446744073709551615,",
            "\"Files\": [",
            "{ \"Path\": \"a\\\"b\\\\c\\u0001\", \"Size\": 0, \"Last-Modified\": \"1969-12-31 23:59:59 GMT\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"8a744722\" },",
            "{ \"Encoded-Path\": \"ff2f78\", \"Size\": 1, \"Last-Modified\": \"2000-02-29 00:00:00 GMT\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"00000000\" }",
            "],",
            "\"WAL-Ranges\": [",
            "{ \"Timeline\": 2, \"Start-LSN\": \"0/20\", \"End-LSN\": \"0/30\" },",
            "{ \"Timeline\": 1, \"Start-LSN\": \"0/10\", \"End-LSN\": \"0/20\" }",
            "],",
        ];
        assert_eq!(text.lines().take(expected.len()).collect::<Vec<_>>(), expected);
        assert!(text.lines().last().unwrap().starts_with("\"Manifest-Checksum\": \"") && text.ends_with("\"}\n"));
    }

    #[test]
    fn times_are_clamped() {
        assert_eq!(gmt(0), "1970-01-01 00:00:00 GMT");
        assert_eq!(gmt(1_795_407_194), "2026-11-23 04:13:14 GMT");
        assert_eq!(gmt(i64::MAX), "9999-12-31 23:59:59 GMT");
        assert_eq!(gmt(i64::MIN), "0001-01-01 00:00:00 GMT");
    }
}
