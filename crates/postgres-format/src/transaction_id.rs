//! Transaction ids, with and without their epoch.
//!
//! PostgreSQL counts transactions in 64 bits (`FullTransactionId` in `src/include/access/transam.h`) and writes only the low 32 into WAL
//! records and pages; the high 32 are the epoch. The trap of this type is the short form: after four thousand million transactions the same
//! 32 bits come again, so a short id means one transaction only beside another one that is known to be near.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A transaction id with its epoch: epoch × 2³² + xid. A number in serde formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FullTransactionId(u64);

/// A text that is not a transaction id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a transaction id, expected a decimal number")]
pub struct FullTransactionIdError;

impl FullTransactionId {
    /// The lowest short id that a transaction can have; those below have meanings of their own (`FirstNormalTransactionId`).
    pub const FIRST_NORMAL: u32 = 3;

    /// The transaction of this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Epoch × 2³² + xid.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// How often the short ids have begun anew.
    pub const fn epoch(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The short id.
    pub const fn xid(self) -> u32 {
        self.0 as u32
    }

    /// Whether a transaction can have this id.
    pub const fn is_normal(self) -> bool {
        self.xid() >= Self::FIRST_NORMAL
    }

    /// The transaction with this short id that is nearest to this one: at most 2³¹ away, as PostgreSQL compares short ids
    /// (`TransactionIdPrecedes`). Never before the first epoch.
    pub fn nearest(self, xid: u32) -> Self {
        let away = i64::from(xid.wrapping_sub(self.xid()).cast_signed());
        Self(self.0.checked_add_signed(away).unwrap_or(u64::from(xid)))
    }
}

impl fmt::Display for FullTransactionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for FullTransactionId {
    type Err = FullTransactionIdError;

    /// Decimal digits only, as `txid_current()` and `pg_current_xact_id()` print it.
    fn from_str(text: &str) -> Result<Self, FullTransactionIdError> {
        if text.is_empty() || !text.bytes().all(|digit| digit.is_ascii_digit()) {
            return Err(FullTransactionIdError);
        }
        text.parse().map(Self).map_err(|_| FullTransactionIdError)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EPOCH: u64 = 1 << 32;

    #[test]
    fn a_short_id_means_the_nearest_transaction() {
        let check = |known: u64, xid: u32, expected: u64| {
            assert_eq!(
                FullTransactionId::new(known).nearest(xid),
                FullTransactionId::new(expected),
                "{xid} near {known}"
            );
        };
        check(1000, 900, 900);
        check(1000, 4000, 4000);
        check(EPOCH + 1000, 900, EPOCH + 900);
        check(EPOCH + 1000, u32::MAX, EPOCH - 1);
        check(2 * EPOCH - 10, 5, 2 * EPOCH + 5);
        // Nothing came before the first epoch.
        check(1000, u32::MAX, EPOCH - 1);
    }

    #[test]
    fn parts_and_text() {
        let id: FullTransactionId = "12884902630".parse().unwrap();
        assert_eq!((id.epoch(), id.xid(), id.to_string().as_str()), (3, 742, "12884902630"));
        assert!(id.is_normal() && !FullTransactionId::new(EPOCH + 2).is_normal());
        for refused in ["", "+1", "-1", "1 ", "0x10", "18446744073709551616"] {
            assert!(refused.parse::<FullTransactionId>().is_err(), "{refused}");
        }
    }

    proptest! {
        #[test]
        fn the_nearest_has_the_short_id_and_is_near(known: u64, xid: u32) {
            let near = FullTransactionId::new(known).nearest(xid);
            prop_assert_eq!(near.xid(), xid);
            let far = near.as_u64().abs_diff(known) > 1 << 31;
            prop_assert!(!far || near.epoch() == 0);
        }
    }
}
