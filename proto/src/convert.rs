//! Wire words to domain values and back. Anything the domain cannot hold is refused with the field's name.
//!
//! Names of clusters, nodes and stores belong to the repository, which this room does not see; [`parsed`] reads them
//! into whatever type the caller names, so that every refusal still carries the field.

use std::fmt;
use std::str::FromStr;

use postgres_format::{Lsn, SegmentSize, SystemIdentifier, Timeline, WalFileName};

use crate::archive::PushWalOpen;
use crate::fleet::{Hello, Report};

/// A field of a message holds what the domain cannot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct FieldError {
    /// Name of the field as the proto spells it.
    pub field: &'static str,
    /// What is wrong, and what was expected.
    pub problem: String,
}

impl FieldError {
    /// An error about a field.
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self { field, problem: problem.into() }
    }
}

/// Reads a text field.
///
/// # Errors
/// What the type's own parser says.
pub fn parsed<T>(field: &'static str, text: &str) -> Result<T, FieldError>
where
    T: FromStr,
    T::Err: fmt::Display,
{
    text.parse().map_err(|error: T::Err| FieldError::new(field, error.to_string()))
}

/// Reads a system identifier; 0 is none.
///
/// # Errors
/// When it is 0.
pub fn system_identifier(field: &'static str, value: u64) -> Result<SystemIdentifier, FieldError> {
    match value {
        0 => Err(FieldError::new(field, "must be PostgreSQL's system identifier, not 0")),
        value => Ok(SystemIdentifier::new(value)),
    }
}

/// Reads a segment size in bytes.
///
/// # Errors
/// When it is no power of two from 1 MiB to 1 GiB.
pub fn segment_size(field: &'static str, bytes: u64) -> Result<SegmentSize, FieldError> {
    SegmentSize::from_bytes(bytes).map_err(|error| FieldError::new(field, error.to_string()))
}

/// Reads a SHA-256.
///
/// # Errors
/// When it has not 32 bytes.
pub fn sha256(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], FieldError> {
    bytes.try_into().map_err(|_| FieldError::new(field, format!("must have 32 bytes, has {}", bytes.len())))
}

/// What a [`PushWalOpen`] announces, typed as far as this room knows the types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalUpload {
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The file's name in `pg_wal`.
    pub wal_file: WalFileName,
    /// Bytes of the whole object, at least 1.
    pub stored_size_bytes: u64,
    /// SHA-256 of the object's header.
    pub header_sha256: [u8; 32],
    /// Whether the sender was in recovery.
    pub in_recovery: bool,
    /// Whether the file is complete.
    pub complete: bool,
}

impl TryFrom<&PushWalOpen> for WalUpload {
    type Error = FieldError;

    fn try_from(open: &PushWalOpen) -> Result<Self, FieldError> {
        if open.stored_size == 0 {
            return Err(FieldError::new("stored_size", "must be the size of the object, not 0"));
        }
        Ok(Self {
            system_identifier: system_identifier("system_identifier", open.system_identifier)?,
            wal_file: parsed("wal_file", &open.wal_file)?,
            stored_size_bytes: open.stored_size,
            header_sha256: sha256("header_sha256", &open.header_sha256)?,
            in_recovery: open.in_recovery,
            complete: open.complete,
        })
    }
}

/// The facts of PostgreSQL in a [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerIdentity {
    /// Its system identifier.
    pub system_identifier: SystemIdentifier,
    /// Its major version; absent when the agent does not know it.
    pub postgres_major: Option<u32>,
    /// Its WAL segment size.
    pub segment_size: SegmentSize,
}

impl TryFrom<&Hello> for ServerIdentity {
    type Error = FieldError;

    fn try_from(hello: &Hello) -> Result<Self, FieldError> {
        Ok(Self {
            system_identifier: system_identifier("system_identifier", hello.system_identifier)?,
            postgres_major: (hello.postgres_major != 0).then_some(hello.postgres_major),
            segment_size: segment_size("segment_size_bytes", hello.segment_size_bytes)?,
        })
    }
}

/// Where a node is, from its [`Report`]. Timeline 0 means that the agent does not know it.
pub fn place(report: &Report) -> (Option<Timeline>, Lsn) {
    (Timeline::new(report.timeline), Lsn::new(report.lsn))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> PushWalOpen {
        PushWalOpen {
            cluster: "main".to_owned(),
            node: "a".to_owned(),
            system_identifier: 7,
            wal_file: "00000001000000000000002A".to_owned(),
            fingerprint: String::new(),
            stored_size: 10,
            header_sha256: vec![3; 32].into(),
            in_recovery: true,
            complete: true,
            instance: String::new(),
        }
    }

    #[test]
    fn an_upload_is_read_or_refused_with_the_field() {
        let upload = WalUpload::try_from(&open()).unwrap();
        assert_eq!(upload.wal_file.to_string(), "00000001000000000000002A");
        assert_eq!(upload.header_sha256, [3; 32]);
        let refused = |change: fn(&mut PushWalOpen)| {
            let mut open = open();
            change(&mut open);
            WalUpload::try_from(&open).unwrap_err().field
        };
        assert_eq!(refused(|open| open.system_identifier = 0), "system_identifier");
        assert_eq!(refused(|open| open.wal_file = "../../etc/passwd".to_owned()), "wal_file");
        assert_eq!(refused(|open| open.stored_size = 0), "stored_size");
        assert_eq!(refused(|open| open.header_sha256 = vec![0; 31].into()), "header_sha256");
    }

    #[test]
    fn a_hello_is_read_or_refused() {
        let hello = Hello { system_identifier: 7, segment_size_bytes: 1 << 24, ..Hello::default() };
        let identity = ServerIdentity::try_from(&hello).unwrap();
        assert_eq!((identity.postgres_major, identity.segment_size), (None, SegmentSize::DEFAULT));
        let odd = Hello { segment_size_bytes: 3, ..hello };
        assert_eq!(ServerIdentity::try_from(&odd).unwrap_err().field, "segment_size_bytes");
    }
}
