//! Names: clusters, nodes, stores, backups and generations, parsed at the door into values that cannot be wrong.
//!
//! A name is a path component of object keys, of directories and of metrics, so the alphabet is small and fixed:
//! lower-case letters, digits, `_` and `-`, and `.` for clusters and nodes (host names have dots). A name starts with
//! a letter or digit, which rules out `.`, `..` and anything that looks like an option.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

/// Longest cluster, node or store name, in bytes.
pub const NAME_LIMIT_BYTES: usize = 63;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text breaks the rule of cluster, node or store names.
    #[error(
        "{text:?} is not a {what} name: expected 1 to {NAME_LIMIT_BYTES} of {alphabet}, starting with a letter or digit"
    )]
    Malformed {
        /// What was expected: `cluster`, `node` or `store`.
        what: &'static str,
        /// The characters that are allowed.
        alphabet: &'static str,
        /// What was given, cut to a printable length.
        text: String,
    },
    /// The text is not a backup identifier.
    #[error("{text:?} is not a backup: expected a UTC second and eight hex digits, like 20261123T034138Z-7f3a9c21")]
    NotABackup {
        /// What was given, cut to a printable length.
        text: String,
    },
    /// The text is not a generation of a root.
    #[error("{text:?} is not a root generation: expected 16 lower-case hex digits, not all zero")]
    NotAGeneration {
        /// What was given, cut to a printable length.
        text: String,
    },
}

impl NameError {
    fn cut(text: &str) -> String {
        text.chars().take(80).collect()
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $extra:literal, $alphabet:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                if is_name(text, $extra) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(NameError::Malformed { what: $what, alphabet: $alphabet, text: NameError::cut(text) })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name!(
    /// The fleet name of a cluster: the data directories with one system identifier.
    ClusterName, "cluster", "_-.", "a-z 0-9 _ - ."
);
name!(
    /// The name of a node: one data directory with one agent.
    NodeName, "node", "_-.", "a-z 0-9 _ - ."
);
name!(
    /// The name of a store as the configuration gives it, such as `repo1`.
    StoreName, "store", "_-", "a-z 0-9 _ -"
);

fn is_name(text: &str, extra: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.len() <= NAME_LIMIT_BYTES
        && text.starts_with(alphanumeric)
        && text.chars().all(|c| alphanumeric(c) || extra.contains(c))
}

/// A base backup: the UTC second it was begun and 32 random bits, as in `20261123T034138Z-7f3a9c21`.
///
/// The text sorts by time, which is also the order of this type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackupId {
    second: i64,
    random: u32,
}

impl BackupId {
    const TEXT_BYTES: usize = 25;
    const SECOND_FORMAT: &str = "%Y%m%dT%H%M%SZ";

    /// Names the backup begun at `at` (its second counts); `random` keeps two backups of one second apart.
    ///
    /// Instants outside the years 0000 to 9999 are moved to the nearest second inside.
    pub fn new(at: Timestamp, random: u32) -> Self {
        // 0000-01-01T00:00:00Z and 9999-12-30T22:00:00Z (the last second jiff knows): four-digit years only.
        const FIRST: i64 = -62_167_219_200;
        Self { second: at.as_second().clamp(FIRST, Timestamp::MAX.as_second()), random }
    }

    /// The second the backup was begun at.
    pub fn time(&self) -> Timestamp {
        Timestamp::from_second(self.second).expect("a backup id is only made from a valid timestamp")
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let second = self.time().to_zoned(TimeZone::UTC).strftime(Self::SECOND_FORMAT);
        f.pad(&format!("{second}-{:08x}", self.random))
    }
}

impl FromStr for BackupId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let malformed = || NameError::NotABackup { text: NameError::cut(text) };
        let (second, random) = text.split_once('-').ok_or_else(malformed)?;
        let random = lower_hex::<8>(random).ok_or_else(malformed)?;
        let second = jiff::civil::DateTime::strptime(Self::SECOND_FORMAT, second).map_err(|_| malformed())?;
        let second = second.to_zoned(TimeZone::UTC).map_err(|_| malformed())?.timestamp();
        let id = Self::new(second, random as u32);
        // Writing it back rejects every other spelling that the date parser lets through.
        if text.len() == Self::TEXT_BYTES && id.to_string() == text { Ok(id) } else { Err(malformed()) }
    }
}

impl TryFrom<String> for BackupId {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<BackupId> for String {
    fn from(id: BackupId) -> String {
        id.to_string()
    }
}

/// The number of a root commit, from 1, spelled as 16 lower-case hex digits so that text order is number order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Generation(u64);

impl Generation {
    /// The first commit of a cluster in a store.
    pub const FIRST: Self = Self(1);

    /// The generation with this number; none is numbered zero.
    pub fn new(number: u64) -> Option<Self> {
        (number > 0).then_some(Self(number))
    }

    /// The number, from 1.
    pub fn get(self) -> u64 {
        self.0
    }

    /// The generation a commit on top of this one takes; nothing comes after the largest.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Generation {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        lower_hex::<16>(text)
            .and_then(Self::new)
            .ok_or_else(|| NameError::NotAGeneration { text: NameError::cut(text) })
    }
}

impl TryFrom<u64> for Generation {
    type Error = NameError;

    fn try_from(number: u64) -> Result<Self, NameError> {
        Self::new(number).ok_or_else(|| NameError::NotAGeneration { text: number.to_string() })
    }
}

impl From<Generation> for u64 {
    fn from(generation: Generation) -> u64 {
        generation.0
    }
}

/// Reads exactly `DIGITS` lower-case hex digits; no sign, no prefix, no blank.
pub(crate) fn lower_hex<const DIGITS: usize>(text: &str) -> Option<u64> {
    let strict = text.len() == DIGITS && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if strict { u64::from_str_radix(text, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule() {
        let check = |text: &str, cluster: bool, store: bool| {
            assert_eq!(text.parse::<ClusterName>().is_ok(), cluster, "cluster {text:?}");
            assert_eq!(text.parse::<NodeName>().is_ok(), cluster, "node {text:?}");
            assert_eq!(text.parse::<StoreName>().is_ok(), store, "store {text:?}");
        };
        check("main", true, true);
        check("pg15-main_2", true, true);
        check("db1.example.org", true, false);
        check("0", true, true);
        check(&"a".repeat(63), true, true);
        check(&"a".repeat(64), false, false);
        for bad in ["", ".", "..", "-a", "_a", "A", "aB", "a b", "a/b", "a\0", "ä", "aä", "a\n"] {
            check(bad, false, false);
        }
    }

    #[test]
    fn names_are_checked_when_deserialised() {
        assert_eq!(serde_json::from_str::<ClusterName>("\"main\"").unwrap().as_str(), "main");
        assert!(serde_json::from_str::<ClusterName>("\"../main\"").is_err());
        assert_eq!(serde_json::to_string(&"main".parse::<ClusterName>().unwrap()).unwrap(), "\"main\"");
    }

    #[test]
    fn backups_sort_by_time_and_read_back() {
        let at: Timestamp = "2026-11-23T03:41:38.9Z".parse().unwrap();
        let id = BackupId::new(at, 0x7f3a_9c21);
        assert_eq!(id.to_string(), "20261123T034138Z-7f3a9c21");
        assert_eq!("20261123T034138Z-7f3a9c21".parse::<BackupId>().unwrap(), id);
        assert_eq!(id.time().to_string(), "2026-11-23T03:41:38Z");
        assert!(BackupId::new("2026-11-23T03:41:39Z".parse().unwrap(), 0) > id);
        for at in [Timestamp::MIN, Timestamp::MAX, Timestamp::UNIX_EPOCH] {
            let id = BackupId::new(at, u32::MAX);
            assert_eq!(id.to_string().parse::<BackupId>().unwrap(), id);
        }
    }

    #[test]
    fn other_spellings_of_a_backup_are_refused() {
        for bad in [
            "",
            "20261123T034138Z",
            "20261123T034138Z-7F3A9C21",
            "20261123T034138Z-7f3a9c2",
            "20261123T034138Z-7f3a9c211",
            "20261323T034138Z-7f3a9c21",
            "20261123T034138-7f3a9c21",
            " 20261123T034138Z-7f3a9c21",
            "20261123T034160Z-7f3a9c21",
            "2026112T0034138Z-7f3a9c21",
            "20261123T034138Z-+f3a9c21",
        ] {
            assert!(bad.parse::<BackupId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn generations_count_from_one() {
        assert_eq!(Generation::FIRST.to_string(), "0000000000000001");
        assert_eq!("00000000000000ff".parse::<Generation>().unwrap().get(), 255);
        assert_eq!(Generation::new(u64::MAX).unwrap().next(), None);
        for bad in ["0000000000000000", "1", "00000000000000FF", "+000000000000001", ""] {
            assert!(bad.parse::<Generation>().is_err(), "{bad:?}");
        }
        assert!(serde_json::from_str::<Generation>("0").is_err());
    }
}
