//! The number that `initdb` gives to a cluster and all its physical copies share.
//!
//! It is not an identity of a node: base backups, clones and restored instances carry the same one, and `pg_upgrade` makes a new one.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A cluster's system identifier, as in `pg_control` and in every long WAL page header.
///
/// In serde formats it is the decimal text, because JSON readers round numbers of this size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SystemIdentifier(u64);

/// A text that is not a system identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a system identifier, expected a decimal number of at most 64 bits")]
pub struct SystemIdentifierError;

impl SystemIdentifier {
    /// The identifier of this value.
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The value.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SystemIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for SystemIdentifier {
    type Err = SystemIdentifierError;

    /// Decimal digits in their one spelling: no sign, no space, no leading zero.
    fn from_str(text: &str) -> Result<Self, SystemIdentifierError> {
        let digits = text.bytes().all(|digit| digit.is_ascii_digit());
        if !digits || (text.starts_with('0') && text.len() > 1) {
            return Err(SystemIdentifierError);
        }
        text.parse().map(Self).map_err(|_| SystemIdentifierError)
    }
}

impl TryFrom<String> for SystemIdentifier {
    type Error = SystemIdentifierError;

    fn try_from(text: String) -> Result<Self, SystemIdentifierError> {
        text.parse()
    }
}

impl From<SystemIdentifier> for String {
    fn from(identifier: SystemIdentifier) -> Self {
        identifier.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms() {
        for value in [0, 7_300_000_000_000_000_001, u64::MAX] {
            let identifier = SystemIdentifier::new(value);
            assert_eq!(identifier.to_string().parse(), Ok(identifier));
        }
        for refused in ["", "+1", "-1", "01", " 1", "1 ", "18446744073709551616", "7F"] {
            assert_eq!(refused.parse::<SystemIdentifier>(), Err(SystemIdentifierError), "{refused}");
        }
    }
}
