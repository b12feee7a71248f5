//! A timeline: one line of WAL history of a cluster, numbered from 1.
//!
//! The trap of this type is its two spellings: hexadecimal in file names, decimal in history files, SQL and logs. `Display` and `FromStr`
//! are the decimal one; [`Timeline::to_hex`] is the one for names. Which timeline descends from which is in `timeline_history`.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A timeline number; never zero. A number in serde formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timeline(NonZeroU32);

/// A text that is not a timeline number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a timeline, expected a decimal number from 1 to 4294967295")]
pub struct TimelineError;

impl Timeline {
    /// The timeline that `initdb` starts.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The timeline of this number, or `None` for zero.
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// Eight upper-case hexadecimal digits, as in file names.
    pub fn to_hex(self) -> String {
        format!("{:08X}", self.get())
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

impl FromStr for Timeline {
    type Err = TimelineError;

    /// Decimal digits only: no sign, no space, no `0x`. Leading zeros are accepted up to ten digits.
    fn from_str(text: &str) -> Result<Self, TimelineError> {
        if text.is_empty() || text.len() > 10 || !text.bytes().all(|digit| digit.is_ascii_digit()) {
            return Err(TimelineError);
        }
        text.parse().ok().and_then(Self::new).ok_or(TimelineError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_and_hexadecimal() {
        let timeline: Timeline = "26".parse().unwrap();
        assert_eq!((timeline.to_string().as_str(), timeline.to_hex().as_str()), ("26", "0000001A"));
        assert_eq!("4294967295".parse::<Timeline>().unwrap().to_hex(), "FFFFFFFF");
        for refused in ["", "0", "-1", "+1", "1A", "0x1", "4294967296", " 1", "1 ", "00000000001"] {
            assert!(refused.parse::<Timeline>().is_err(), "{refused}");
        }
    }
}
