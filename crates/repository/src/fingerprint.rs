//! The fingerprint of a WAL file: the part of its object key that tells contents apart.
//!
//! A kind letter and 128 bits. The only kind today is `s`: the first 128 bits of SHA-256 over the whole uncompressed
//! file. Fingerprints of unlike kinds say nothing about each other; such files are compared by content.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What tells two contents of one WAL file name apart, as in `s0f343b0931126a20f133d67c2b018a3b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; Self::BYTES]);

/// The text is not a fingerprint that this version knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a fingerprint: expected the letter s and 32 lower-case hex digits")]
pub struct FingerprintError {
    /// What was given, cut to a printable length.
    pub text: String,
}

impl Fingerprint {
    const BYTES: usize = 16;
    const KIND: char = 's';

    /// The fingerprint of a file, from the SHA-256 of its whole uncompressed content.
    pub fn of_sha256(sha256: &[u8; 32]) -> Self {
        let mut first = [0; Self::BYTES];
        first.copy_from_slice(&sha256[..Self::BYTES]);
        Self(first)
    }

    /// Whether this is the fingerprint of a file with that SHA-256.
    pub fn matches_sha256(&self, sha256: &[u8; 32]) -> bool {
        self.0 == sha256[..Self::BYTES]
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Self::KIND)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, FingerprintError> {
        let malformed = || FingerprintError { text: text.chars().take(80).collect() };
        let digits = text.strip_prefix(Self::KIND).ok_or_else(malformed)?;
        if digits.len() != 2 * Self::BYTES || !digits.is_ascii() {
            return Err(malformed());
        }
        let mut bytes = [0; Self::BYTES];
        for (index, byte) in bytes.iter_mut().enumerate() {
            let pair = crate::name::lower_hex::<2>(&digits[2 * index..2 * index + 2]).ok_or_else(malformed)?;
            *byte = pair as u8;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = FingerprintError;

    fn try_from(text: String) -> Result<Self, FingerprintError> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> String {
        fingerprint.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_writes() {
        let mut sha256 = [0xa5; 32];
        sha256[0] = 0x0f;
        let fingerprint = Fingerprint::of_sha256(&sha256);
        assert_eq!(fingerprint.to_string(), "s0fa5a5a5a5a5a5a5a5a5a5a5a5a5a5a5");
        assert_eq!(fingerprint.to_string().parse::<Fingerprint>().unwrap(), fingerprint);
        assert!(fingerprint.matches_sha256(&sha256));
        sha256[3] ^= 1;
        assert!(!fingerprint.matches_sha256(&sha256));
    }

    #[test]
    fn other_spellings_are_refused() {
        for bad in ["", "s", "s0f", "x0fa5a5a5a5a5a5a5a5a5a5a5a5a5a5a5", "s0FA5a5a5a5a5a5a5a5a5a5a5a5a5a5a5", "sä"] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad:?}");
        }
        assert!(format!("s{}", "ä".repeat(16)).parse::<Fingerprint>().is_err());
    }
}
