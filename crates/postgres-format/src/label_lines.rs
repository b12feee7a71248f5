//! The lines `KEY: value` that backup labels and backup history files are made of, in their fixed order.

use std::str::FromStr;

use crate::lsn::Lsn;
use crate::segment::SegmentName;

/// The lines not yet read, each with its line feed.
pub(crate) struct Lines<'a>(&'a [u8]);

/// A line that is not there, or not of its format.
pub(crate) struct NoLine(pub(crate) &'static str);

impl<'a> Lines<'a> {
    pub(crate) fn of(file: &'a [u8]) -> Self {
        Self(file)
    }

    pub(crate) fn are_read(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of the next line, which must have this key.
    pub(crate) fn take(&mut self, key: &'static str) -> Result<String, NoLine> {
        let end = self.0.iter().position(|&byte| byte == b'\n').ok_or(NoLine(key))?;
        self.take_until(key, end)
    }

    /// The value of a line that may itself hold line feeds: it ends where the line of key `next` begins for the last time.
    pub(crate) fn take_text(&mut self, key: &'static str, next: &'static str) -> Result<String, NoLine> {
        let begins = |at: &usize| {
            let line = &self.0[at + 1..];
            self.0[*at] == b'\n' && line.strip_prefix(next.as_bytes()).is_some_and(|rest| rest.starts_with(b": "))
        };
        let end = (0..self.0.len()).rev().find(begins).ok_or(NoLine(next))?;
        self.take_until(key, end)
    }

    pub(crate) fn value<T: FromStr>(&mut self, key: &'static str) -> Result<T, NoLine> {
        self.take(key)?.parse().map_err(|_| NoLine(key))
    }

    /// A position and the segment of it: `0/1600028 (file 000000010000000000000016)`.
    pub(crate) fn location(&mut self, key: &'static str) -> Result<(Lsn, SegmentName), NoLine> {
        let text = self.take(key)?;
        let read = || {
            let (lsn, rest) = text.split_once(' ')?;
            let segment = rest.strip_prefix("(file ")?.strip_suffix(')')?;
            Some((lsn.parse().ok()?, segment.parse().ok()?))
        };
        read().ok_or(NoLine(key))
    }

    fn take_until(&mut self, key: &'static str, end: usize) -> Result<String, NoLine> {
        let (text, rest) = (&self.0[..end], &self.0[end + 1..]);
        let value = text.strip_prefix(key.as_bytes()).and_then(|text| text.strip_prefix(b": ")).ok_or(NoLine(key))?;
        self.0 = rest;
        Ok(String::from_utf8_lossy(value).into_owned())
    }
}
