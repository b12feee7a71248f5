//! What a backup must remember of every file, on disk beside the spool: a cluster may have millions of them, and memory does
//! not grow with their number.
//!
//! Rows lie one a line in unnamed files of the scratch directory, which go away with the last value that reads them. Those
//! that come in order are read in it ([`Rows`]); those that do not are sorted in stretches of [`RUN_BYTES`] and merged as they
//! are read ([`Sorted`]). Either is read as often as wanted.
//!
//! Invariants: what is in memory is one stretch while rows are added, and a buffer a stretch while they are read; rows of one
//! key come out in the order in which they were added.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Take, Write};
use std::marker::PhantomData;
use std::mem;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::from_start::FromStart;

/// Bytes in memory at which rows are sorted and written.
const RUN_BYTES: usize = 2 << 20;
/// Bytes of each stretch that are read at once.
const BUFFER_BYTES: usize = 16 << 10;

/// Rows in the order in which they were added.
#[derive(Debug)]
pub struct Rows<T> {
    file: Arc<File>,
    /// Where they lie in the file, in bytes.
    range: Range<u64>,
    of: PhantomData<fn() -> T>,
}

impl<T> Clone for Rows<T> {
    fn clone(&self) -> Self {
        Self { file: Arc::clone(&self.file), range: self.range.clone(), of: PhantomData }
    }
}

impl<T: DeserializeOwned> Rows<T> {
    /// From the first one.
    pub fn iter(&self) -> RowReader<T> {
        let lines = FromStart::at(&self.file, self.range.start).take(self.range.end - self.range.start);
        RowReader { lines: BufReader::with_capacity(BUFFER_BYTES, lines), line: Vec::new(), of: PhantomData }
    }
}

/// One passage through rows. After an error there is nothing more to read.
#[derive(Debug)]
pub struct RowReader<T> {
    lines: BufReader<Take<FromStart>>,
    line: Vec<u8>,
    of: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Iterator for RowReader<T> {
    type Item = io::Result<T>;

    fn next(&mut self) -> Option<Self::Item> {
        self.line.clear();
        match self.lines.read_until(b'\n', &mut self.line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_slice(&self.line).map_err(io::Error::from)),
            Err(error) => Some(Err(error)),
        }
    }
}

/// Writes rows that come in order.
#[derive(Debug)]
pub struct RowWriter<T> {
    lines: Lines,
    of: PhantomData<fn(T)>,
}

impl<T: Serialize> RowWriter<T> {
    /// None yet, in an unnamed file of a directory.
    pub fn create_in(scratch: &Path) -> io::Result<Self> {
        Ok(Self { lines: Lines::create_in(scratch)?, of: PhantomData })
    }

    /// Adds one.
    pub fn push(&mut self, row: &T) -> io::Result<()> {
        self.lines.write(row)
    }

    /// All of them, to be read.
    pub fn finish(self) -> io::Result<Rows<T>> {
        let (file, bytes) = self.lines.finish()?;
        Ok(Rows { file, range: 0..bytes, of: PhantomData })
    }
}

/// Takes rows in any order.
#[derive(Debug)]
pub struct Runs<K, V> {
    pending: Vec<(K, V)>,
    pending_bytes: usize,
    lines: Lines,
    ends: Vec<u64>,
}

impl<K: Ord + Serialize, V: Serialize> Runs<K, V> {
    /// None yet, in an unnamed file of a directory.
    pub fn create_in(scratch: &Path) -> io::Result<Self> {
        Ok(Self { pending: Vec::new(), pending_bytes: 0, lines: Lines::create_in(scratch)?, ends: Vec::new() })
    }

    /// Adds one that holds so many bytes besides itself.
    pub fn push(&mut self, key: K, value: V, held_bytes: usize) -> io::Result<()> {
        self.pending.push((key, value));
        self.pending_bytes += mem::size_of::<(K, V)>() + held_bytes;
        if self.pending_bytes >= RUN_BYTES { self.write_run() } else { Ok(()) }
    }

    fn write_run(&mut self) -> io::Result<()> {
        self.pending.sort_by(|(one, _), (other, _)| one.cmp(other));
        for row in self.pending.drain(..) {
            self.lines.write(&row)?;
        }
        self.pending_bytes = 0;
        self.ends.push(self.lines.bytes);
        Ok(())
    }

    /// All of them, to be read in order of their keys.
    pub fn finish(mut self) -> io::Result<Sorted<K, V>> {
        if !self.pending.is_empty() {
            self.write_run()?;
        }
        let (file, _) = self.lines.finish()?;
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let run = |(start, end): (u64, &u64)| Rows { file: Arc::clone(&file), range: start..*end, of: PhantomData };
        Ok(Sorted { runs: starts.zip(&self.ends).map(run).collect() })
    }
}

/// Rows in order of their keys.
#[derive(Debug)]
pub struct Sorted<K, V> {
    runs: Vec<Rows<(K, V)>>,
}

impl<K: Ord + DeserializeOwned, V: DeserializeOwned> Sorted<K, V> {
    /// From the first one.
    pub fn iter(&self) -> io::Result<Merge<K, V>> {
        let mut merge = Merge { runs: self.runs.iter().map(Rows::iter).collect(), heads: BinaryHeap::new() };
        (0..merge.runs.len()).try_for_each(|run| merge.refill(run))?;
        Ok(merge)
    }
}

/// One passage through sorted rows. After an error there is nothing more to read.
#[derive(Debug)]
pub struct Merge<K, V> {
    runs: Vec<RowReader<(K, V)>>,
    heads: BinaryHeap<Head<K, V>>,
}

impl<K: Ord + DeserializeOwned, V: DeserializeOwned> Merge<K, V> {
    fn refill(&mut self, run: usize) -> io::Result<()> {
        if let Some((key, value)) = self.runs[run].next().transpose()? {
            self.heads.push(Head { key, value, run });
        }
        Ok(())
    }

    /// The key of the next row.
    pub fn key(&self) -> Option<&K> {
        self.heads.peek().map(|head| &head.key)
    }
}

impl<K: Ord + DeserializeOwned, V: DeserializeOwned> Iterator for Merge<K, V> {
    type Item = io::Result<(K, V)>;

    fn next(&mut self) -> Option<Self::Item> {
        let Head { key, value, run } = self.heads.pop()?;
        Some(self.refill(run).map(|()| (key, value)))
    }
}

/// The next row of a run. The greatest is the one that comes first.
#[derive(Debug)]
struct Head<K, V> {
    key: K,
    value: V,
    run: usize,
}

impl<K: Ord, V> Ord for Head<K, V> {
    fn cmp(&self, other: &Self) -> Ordering {
        other.key.cmp(&self.key).then(other.run.cmp(&self.run))
    }
}

impl<K: Ord, V> PartialOrd for Head<K, V> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<K: Ord, V> PartialEq for Head<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<K: Ord, V> Eq for Head<K, V> {}

/// An unnamed file of JSON, one value a line.
#[derive(Debug)]
struct Lines {
    file: BufWriter<File>,
    line: Vec<u8>,
    bytes: u64,
}

impl Lines {
    fn create_in(scratch: &Path) -> io::Result<Self> {
        let file = BufWriter::with_capacity(BUFFER_BYTES, tempfile::tempfile_in(scratch)?);
        Ok(Self { file, line: Vec::new(), bytes: 0 })
    }

    fn write(&mut self, row: &impl Serialize) -> io::Result<()> {
        self.line.clear();
        serde_json::to_writer(&mut self.line, row)?;
        self.line.push(b'\n');
        self.bytes += self.line.len() as u64;
        self.file.write_all(&self.line)
    }

    fn finish(self) -> io::Result<(Arc<File>, u64)> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok((Arc::new(file), self.bytes))
    }
}

/// Sets of blocks in rows: in turn how many blocks are not in the set, and how many are.
pub mod blocks {
    use roaring::RoaringBitmap;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    /// How a set is written down.
    pub fn serialize<S: Serializer>(blocks: &RoaringBitmap, serializer: S) -> Result<S::Ok, S::Error> {
        let (mut lengths, mut end) = (Vec::<u32>::new(), 0);
        for block in blocks {
            match lengths.last_mut() {
                Some(length) if block == end => *length += 1,
                _ => lengths.extend([block - end, 1]),
            }
            end = block + 1;
        }
        lengths.serialize(serializer)
    }

    /// How it is read again.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<RoaringBitmap, D::Error> {
        let (mut blocks, mut end) = (RoaringBitmap::new(), 0_u32);
        for pair in Vec::<u32>::deserialize(deserializer)?.chunks(2) {
            let beyond = || de::Error::custom("expected pairs of lengths within a file");
            let [absent, present] = pair else { return Err(beyond()) };
            let from = end.checked_add(*absent).ok_or_else(beyond)?;
            end = from.checked_add(*present).ok_or_else(beyond)?;
            blocks.insert_range(from..end);
        }
        Ok(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_in_order_whatever_the_number_of_runs() {
        let scratch = tempfile::tempdir().unwrap();
        for held_bytes in [0, RUN_BYTES / 3, RUN_BYTES] {
            let mut runs = Runs::create_in(scratch.path()).unwrap();
            for number in 0..100_u32 {
                runs.push(number * 37 % 50, number, held_bytes).unwrap();
            }
            let sorted = runs.finish().unwrap();
            let rows_of_a_run = RUN_BYTES.checked_div(held_bytes).unwrap_or(100);
            assert_eq!(sorted.runs.len(), 100_usize.div_ceil(rows_of_a_run));
            for _ in 0..2 {
                let found: Vec<(u32, u32)> = sorted.iter().unwrap().map(Result::unwrap).collect();
                let mut expected: Vec<(u32, u32)> = (0..100).map(|number| (number * 37 % 50, number)).collect();
                expected.sort_unstable();
                assert_eq!(found, expected);
            }
        }
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "nothing of it has a name");
    }

    #[test]
    fn sets_of_blocks_come_back() {
        #[derive(Serialize, serde::Deserialize)]
        struct Row(#[serde(with = "blocks")] roaring::RoaringBitmap);
        let check = |set: &[u32], json: &str| {
            let text = serde_json::to_string(&Row(set.iter().collect())).unwrap();
            assert_eq!(text, json);
            let Row(found) = serde_json::from_str(&text).unwrap();
            assert_eq!(found.iter().collect::<Vec<_>>(), set);
        };
        check(&[], "[]");
        check(&[0, 1, 2], "[0,3]");
        check(&[5, 8, 9, 131_071], "[5,1,2,2,131061,1]");
    }

    #[test]
    fn rows_in_order_are_read_as_often_as_wanted() {
        let scratch = tempfile::tempdir().unwrap();
        let mut rows = RowWriter::create_in(scratch.path()).unwrap();
        (0..3000_u32).for_each(|number| rows.push(&(number, "x".repeat(9))).unwrap());
        let rows = rows.finish().unwrap();
        let numbers = |rows: &Rows<(u32, String)>| rows.iter().map(|row| row.unwrap().0).collect::<Vec<_>>();
        assert_eq!(numbers(&rows), (0..3000).collect::<Vec<_>>());
        assert_eq!(numbers(&rows.clone()), numbers(&rows));
        assert_eq!(numbers(&RowWriter::create_in(scratch.path()).unwrap().finish().unwrap()), [0; 0]);
    }
}
