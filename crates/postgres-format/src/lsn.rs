//! A position in the write-ahead log.
//!
//! An LSN is a byte offset into the endless WAL stream; its text form is two hexadecimal halves with a slash between. PostgreSQL up to 18
//! prints `%X/%X`, 19 pads the low half to eight digits, so reading accepts one to eight digits on each side. Segment arithmetic is in
//! `segment`, because it needs the segment size of the cluster.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::hex;

/// A WAL position: a byte offset into the WAL stream of a cluster, on whatever timeline.
///
/// Zero is PostgreSQL's `InvalidXLogRecPtr`: no position. In JSON and other serde formats it is the text form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Lsn(u64);

/// A text that is not an LSN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an LSN, expected one to eight hexadecimal digits on each side of a slash, as in 16/B374D848")]
pub struct LsnError;

impl Lsn {
    /// No position (`InvalidXLogRecPtr`).
    pub const ZERO: Self = Self(0);

    /// The position that is `bytes` bytes into the WAL stream.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// Bytes into the WAL stream.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// True for the value that means "no position".
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The position `bytes` further on, or `None` past the end of the 64-bit space.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }

    /// The position `bytes` further back, or `None` before the beginning.
    pub fn checked_sub(self, bytes: u64) -> Option<Self> {
        self.0.checked_sub(bytes).map(Self)
    }

    /// Bytes from `earlier` to this position, or `None` if `earlier` is later.
    pub fn bytes_since(self, earlier: Self) -> Option<u64> {
        self.0.checked_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = LsnError;

    fn from_str(text: &str) -> Result<Self, LsnError> {
        let half = |digits: &str| if digits.len() <= 8 { hex::any_case(digits.as_bytes()) } else { None };
        let (high, low) = text.split_once('/').ok_or(LsnError)?;
        Ok(Self(half(high).ok_or(LsnError)? << 32 | half(low).ok_or(LsnError)?))
    }
}

impl TryFrom<String> for Lsn {
    type Error = LsnError;

    fn try_from(text: String) -> Result<Self, LsnError> {
        text.parse()
    }
}

impl From<Lsn> for String {
    fn from(lsn: Lsn) -> Self {
        lsn.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<u64>) {
        assert_eq!(text.parse::<Lsn>().ok().map(Lsn::as_u64), expected, "{text}");
    }

    #[test]
    fn text_forms() {
        check("0/0", Some(0));
        check("16/B374D848", Some(0x16_B374_D848));
        check("16/b374d848", Some(0x16_B374_D848));
        check("0/03000028", Some(0x300_0028));
        check("FFFFFFFF/FFFFFFFF", Some(u64::MAX));
        for refused in
            ["", "/", "0/", "/0", "0", "0/0/0", "0/000000000", "000000000/0", " 0/0", "0/0\n", "+1/0", "0/-1", "g/0"]
        {
            check(refused, None);
        }
        assert_eq!(Lsn::new(0x300_0028).to_string(), "0/3000028");
    }

    proptest! {
        #[test]
        fn text_round_trip(value: u64) {
            let lsn = Lsn::new(value);
            prop_assert_eq!(lsn.to_string().parse::<Lsn>(), Ok(lsn));
            let padded = format!("{:X}/{:08X}", value >> 32, value & 0xFFFF_FFFF);
            prop_assert_eq!(padded.parse::<Lsn>(), Ok(lsn));
        }

        #[test]
        fn any_text_is_answered(text in "\\PC*") {
            let _ = text.parse::<Lsn>();
        }
    }
}
