//! Where a recovery is to end, in values that PostgreSQL will accept.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use postgres_format::{FullTransactionId, Lsn};
use serde::{Deserialize, Serialize};

/// Where recovery is to end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// With the last WAL there is.
    Latest,
    /// As soon as the backup is consistent.
    Immediate,
    /// Before the first commit after this time.
    Time(Timestamp),
    /// At this position.
    Lsn(Lsn),
    /// With this transaction.
    Xid(TargetXid),
    /// At the restore point of this name.
    Name(RestorePointName),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("the last WAL there is"),
            Self::Immediate => f.write_str("as soon as the backup is consistent"),
            Self::Time(time) => write!(f, "time {}", time_text(*time)),
            Self::Lsn(lsn) => write!(f, "position {lsn}"),
            Self::Xid(xid) => write!(f, "transaction {xid}"),
            Self::Name(name) => write!(f, "restore point {:?}", name.as_ref()),
        }
    }
}

/// With a numeric offset, because PostgreSQL would read a bare time in the server's zone.
pub(super) fn time_text(time: Timestamp) -> String {
    time.to_zoned(TimeZone::UTC).strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string()
}

/// A transaction to end with, as an operator gives it.
///
/// From 2³² on it is the full id with its epoch, as `pg_current_xact_id()` and `txid_current()` tell it. Below it may
/// also be the short one of WAL and of `xmin`, and means the transaction of that short id nearest to the newest that the
/// backups know. PostgreSQL itself compares short ids only (`recoveryStopsAfter` in `xlogrecovery.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct TargetXid(FullTransactionId);

/// What is no transaction to end with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetXidError {
    /// Not a number.
    #[error("not a transaction id, expected a decimal number of 32 or, with its epoch, of 64 bits")]
    Number,
    /// The ids 0 to 2 of every epoch belong to no transaction.
    #[error("no transaction has this id: the short ids of an epoch begin with {}", FullTransactionId::FIRST_NORMAL)]
    Reserved,
}

impl TargetXid {
    /// The transaction that is meant, where the next one is known to have been `newest` at some time.
    pub fn near(self, newest: FullTransactionId) -> FullTransactionId {
        if self.0.epoch() == 0 { newest.nearest(self.0.xid()) } else { self.0 }
    }
}

impl TryFrom<u64> for TargetXid {
    type Error = TargetXidError;

    fn try_from(number: u64) -> Result<Self, TargetXidError> {
        let id = FullTransactionId::new(number);
        if id.is_normal() { Ok(Self(id)) } else { Err(TargetXidError::Reserved) }
    }
}

impl From<TargetXid> for u64 {
    fn from(xid: TargetXid) -> Self {
        xid.0.as_u64()
    }
}

impl FromStr for TargetXid {
    type Err = TargetXidError;

    fn from_str(text: &str) -> Result<Self, TargetXidError> {
        let id: FullTransactionId = text.parse().map_err(|_| TargetXidError::Number)?;
        id.as_u64().try_into()
    }
}

impl fmt::Display for TargetXid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A name that a restore point can have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RestorePointName(String);

/// What no restore point is called.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestorePointNameError {
    /// Empty.
    #[error("the name of a restore point is empty")]
    Empty,
    /// Longer than a server takes.
    #[error("the name has {bytes} bytes, a restore point's has at most {}", RestorePointName::LIMIT_BYTES)]
    Length {
        /// How many it has.
        bytes: usize,
    },
}

impl RestorePointName {
    /// Most bytes in a name: `MAXFNAMELEN` in `xlog_internal.h`, less the zero at the end.
    pub const LIMIT_BYTES: usize = 63;
}

impl TryFrom<String> for RestorePointName {
    type Error = RestorePointNameError;

    fn try_from(name: String) -> Result<Self, RestorePointNameError> {
        match name.len() {
            0 => Err(RestorePointNameError::Empty),
            bytes if bytes > Self::LIMIT_BYTES => Err(RestorePointNameError::Length { bytes }),
            _ => Ok(Self(name)),
        }
    }
}

impl FromStr for RestorePointName {
    type Err = RestorePointNameError;

    fn from_str(name: &str) -> Result<Self, RestorePointNameError> {
        name.to_owned().try_into()
    }
}

impl From<RestorePointName> for String {
    fn from(name: RestorePointName) -> Self {
        name.0
    }
}

impl AsRef<str> for RestorePointName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: u64 = 1 << 32;

    #[test]
    fn transaction_ids() {
        let check = |text: &str, expected: Result<u64, TargetXidError>| {
            assert_eq!(text.parse::<TargetXid>().map(u64::from), expected, "{text}");
        };
        check("3", Ok(3));
        check("4294967295", Ok(EPOCH - 1));
        check("4294968000", Ok(EPOCH + 704));
        for reserved in ["0", "1", "2", "4294967296", "8589934594"] {
            check(reserved, Err(TargetXidError::Reserved));
        }
        for refused in ["", "-3", "3.0", "0x10", "x", " 3", "99999999999999999999"] {
            check(refused, Err(TargetXidError::Number));
        }
    }

    #[test]
    fn a_short_id_is_read_near_the_newest_known() {
        let near =
            |xid: u64, newest: u64| TargetXid::try_from(xid).unwrap().near(FullTransactionId::new(newest)).as_u64();
        assert_eq!(near(900, 1000), 900);
        assert_eq!(near(5000, 1000), 5000);
        assert_eq!(near(900, 3 * EPOCH + 1000), 3 * EPOCH + 900);
        assert_eq!(near(EPOCH - 10, 3 * EPOCH + 1000), 3 * EPOCH - 10);
        // With its epoch it means itself.
        assert_eq!(near(EPOCH + 900, 3 * EPOCH + 1000), EPOCH + 900);
    }

    #[test]
    fn names_of_restore_points() {
        let parse = |name: &str| name.parse::<RestorePointName>();
        assert_eq!(parse(&"x".repeat(63)).unwrap().as_ref().len(), 63);
        assert_eq!(parse(""), Err(RestorePointNameError::Empty));
        assert_eq!(parse(&"é".repeat(32)), Err(RestorePointNameError::Length { bytes: 64 }));
        assert!(serde_json::from_str::<RestorePointName>("\"\"").is_err());
    }
}
