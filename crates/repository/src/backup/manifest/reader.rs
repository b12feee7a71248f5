//! Reads a manifest.

use std::io::{self, BufRead, BufReader, Read};

use serde::Deserialize;

use super::sequence::Sequence;
use super::{FORMAT, Head, LINE_LIMIT_BYTES, Line, MAGIC, ManifestDamage, UNDERSTOOD, WINDOW_LOG_MAX};
use crate::name::BackupId;

/// How the line of a file begins.
const FILE_PREFIX: &[u8] = b"{\"line\":\"file\",";

/// Reads a manifest line by line. After an error there is nothing more to read.
///
/// An iterator over all lines after the head; it ends after [`Line::End`] was checked, and never without.
pub struct ManifestReader<R: Read> {
    lines: BufReader<zstd::stream::read::Decoder<'static, BufReader<R>>>,
    head: Head,
    sequence: Sequence,
    line: u64,
    done: bool,
}

impl<R: Read> ManifestReader<R> {
    /// Reads the head.
    pub fn new(mut object: R) -> Result<Self, ManifestDamage> {
        let mut magic = [0; 8];
        object.read_exact(&mut magic).map_err(|_| ManifestDamage::Magic)?;
        if magic != *MAGIC {
            return Err(ManifestDamage::Magic);
        }
        let compression = |error: io::Error| ManifestDamage::Compression { line: 0, reason: error.to_string() };
        let mut frame = zstd::stream::read::Decoder::new(object).map_err(compression)?.single_frame();
        frame.window_log_max(WINDOW_LOG_MAX).map_err(compression)?;
        let mut lines = BufReader::new(frame);
        let text = next_line(&mut lines, 0)?;
        let head = read_head(&text)?;
        let sequence = Sequence::new(&head)?;
        Ok(Self { lines, head, sequence, line: 1, done: false })
    }

    /// What holds for the whole backup.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Size in bytes of a pack that was listed, by the backup it belongs to (none for this one) and its number.
    pub fn pack_bytes(&self, backup: Option<BackupId>, number: u32) -> Option<u64> {
        self.sequence.pack_bytes(backup, number)
    }

    fn read_line(&mut self) -> Result<Line, ManifestDamage> {
        let text = next_line(&mut self.lines, self.line)?;
        self.line += 1;
        let line =
            read_text(&text).map_err(|error| ManifestDamage::Line { line: self.line, reason: error.to_string() })?;
        self.sequence.admit(&line)?;
        if matches!(line, Line::End(_)) {
            self.check_end()?;
        }
        Ok(line)
    }

    /// Nothing may come after the last line, and reading on is what compares the frame's checksum.
    fn check_end(&mut self) -> Result<(), ManifestDamage> {
        let (line, mut rest) = (self.line, [0; 1]);
        match self.lines.read(&mut rest) {
            Ok(0) => Ok(()),
            Ok(_) => Err(ManifestDamage::Order { line: line + 1, reason: "the end was before" }),
            Err(error) => Err(ManifestDamage::Compression { line, reason: error.to_string() }),
        }
    }
}

impl<R: Read> Iterator for ManifestReader<R> {
    type Item = Result<Line, ManifestDamage>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let line = self.read_line();
        self.done = matches!(line, Err(_) | Ok(Line::End(_)));
        Some(line)
    }
}

/// Nearly all lines are of files, and their kind comes first as we write them: then nothing need be kept until it is known.
fn read_text(text: &[u8]) -> serde_json::Result<Line> {
    match text.starts_with(FILE_PREFIX) {
        true => serde_json::from_slice(text).map(Line::File),
        false => serde_json::from_slice(text),
    }
}

fn next_line(lines: &mut impl BufRead, before: u64) -> Result<Vec<u8>, ManifestDamage> {
    let mut text = Vec::new();
    let read = lines.take(LINE_LIMIT_BYTES).read_until(b'\n', &mut text);
    read.map_err(|error| ManifestDamage::Compression { line: before, reason: error.to_string() })?;
    match text.pop() {
        Some(b'\n') => Ok(text),
        None => Err(ManifestDamage::Order { line: before + 1, reason: "the end is missing" }),
        Some(_) => Err(ManifestDamage::Line { line: before + 1, reason: "it has no end".to_owned() }),
    }
}

fn read_head(text: &[u8]) -> Result<Head, ManifestDamage> {
    #[derive(Deserialize)]
    struct Versions {
        line: String,
        format: u32,
        #[serde(default)]
        critical: Vec<String>,
    }
    let malformed = |error: serde_json::Error| ManifestDamage::Line { line: 1, reason: error.to_string() };
    let versions: Versions = serde_json::from_slice(text).map_err(malformed)?;
    if versions.line != "head" {
        return Err(ManifestDamage::Order { line: 1, reason: "the head comes first" });
    }
    if versions.format != FORMAT {
        return Err(ManifestDamage::Newer { what: format!("format {}", versions.format) });
    }
    if let Some(field) = versions.critical.iter().find(|field| !UNDERSTOOD.contains(&field.as_str())) {
        return Err(ManifestDamage::Newer { what: format!("field {field:?}") });
    }
    match serde_json::from_slice(text).map_err(malformed)? {
        Line::Head(head) => Ok(*head),
        _ => Err(ManifestDamage::Order { line: 1, reason: "the head comes first" }),
    }
}
