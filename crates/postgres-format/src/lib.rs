//! What PostgreSQL's names and files mean: versions 14 to 18, with 19 tolerated where it is known.
//!
//! Pure: no I/O, no clock, no async. Every reader takes bytes, is strict, bounded in time and memory, and never panics on input. What is
//! newer than known is reported as unknown, never guessed: its bytes can still be archived, but not interpreted.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod archived_text;
pub mod auto_conf;
pub mod backup_history;
pub mod backup_label;
pub mod backup_manifest;
mod bytes;
pub mod control_file;
pub mod data_directory;
mod hex;
mod label_lines;
mod lsn;
pub mod page;
pub mod relation;
#[cfg(test)]
mod samples;
mod segment;
mod system_identifier;
pub mod tablespace_map;
pub mod targets;
mod timeline;
pub mod timeline_history;
mod timestamp;
mod transaction_id;
pub mod wal_changes;
mod wal_name;
pub mod wal_segment;
pub mod wal_summary;

pub use lsn::{Lsn, LsnError};
pub use segment::{SegmentName, SegmentNameError, SegmentNumber, SegmentSize};
pub use system_identifier::{SystemIdentifier, SystemIdentifierError};
pub use timeline::{Timeline, TimelineError};
pub use timestamp::PgTimestamp;
pub use transaction_id::{FullTransactionId, FullTransactionIdError};
pub use wal_name::{WalFileName, WalFileNameError};
