//! The WAL object: how one archived WAL file lies in a store, and the rules of putting and fetching it.
//!
//! One function encodes a WAL file on every road ([`encode::WalEncoder`]), so that bytes and conflict rule cannot
//! differ between the coordinator and a node that writes to S3 by itself.
//!
//! Promises kept here:
//! * no object is overwritten: the same name with the same content is success, with other content both are kept and
//!   the name is in conflict;
//! * *stored* is said only after the store created the object, or after the one that was there was read and verified;
//! * *absent* is said only when every store that was asked said so itself;
//! * no byte is handed on as verified before the whole object was: size, content digest, cluster, system identifier,
//!   file name;
//! * a name in unresolved conflict is served to nobody;
//! * what an object tells of changes is believed only as its sender wrote it, and what is wrong with that is wrong with
//!   nothing else: the file in the object is served all the same, and its content alone tells same from other.
//!
//! Which node may write a timeline, and when a file counts as durable in enough stores, is not decided here.

mod archived_changes;
mod arrival;
mod changes;
mod decode;
mod encode;
mod fetch;
mod header;
mod histories;
pub mod line;
mod put;
mod together;
mod union;
mod variants;

pub use crate::fingerprint::Fingerprint;
pub use archived_changes::{ArchivedChanges, Gathered, Untold, segments};
pub use arrival::{Arrived, WalArrival};
pub use changes::read_changes;
pub use decode::{DecodeError, WalDecoder};
pub use encode::{EncodedWal, FRAME_BYTES, Sink, WalEncoder, WalFacts, longest_object};
pub use fetch::{Fetched, fetch, fetch_remembering, read_header, read_history, read_to};
pub use header::{ChangesPart, Damage, Encoding, Expected, HEADER_BYTES, HEADER_LIMIT_BYTES, WalHeader};
pub use histories::{history_contents, history_text};
pub use put::{Stored, VariantCheck, check_rivals, put};
pub use together::{Together, together};
pub use union::Silences;
pub use variants::{
    DECISION_LIMIT_BYTES, Decision, Located, VARIANT_LIMIT, Variant, decide, decide_in, locate, variants,
};

use std::io;
use std::path::PathBuf;

use postgres_format::WalFileName;

use crate::key::ObjectKey;
use crate::name::StoreName;
use crate::store::{Remedy, StoreError};

/// Why a WAL object could not be made, stored or read.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// Another content has the name. Everything is kept; an operator must choose.
    #[error(
        "store {store}: {name} is stored with other content ({}); choose one with `pgconvoy conflict resolve`",
        list(existing)
    )]
    Conflict {
        /// Which store.
        store: StoreName,
        /// Which WAL file.
        name: WalFileName,
        /// All stored contents, ours among them.
        existing: Vec<Variant>,
    },
    /// What a store holds is not a whole and unchanged WAL object of this name.
    #[error("store {store}: object {key} is damaged: {damage}")]
    Damaged {
        /// Which store.
        store: StoreName,
        /// Which object.
        key: ObjectKey,
        /// What is wrong with it.
        damage: Damage,
    },
    /// A store failed.
    #[error("a store failed")]
    Store(#[source] StoreError),
    /// Compression failed, which only a lack of memory explains.
    #[error("compressing a WAL file failed")]
    Compress(#[source] io::Error),
    /// The compressed bytes outgrew their memory, and the file they go on to could not be written.
    #[error("writing compressed WAL to {path:?} failed")]
    Overflow {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The decoded bytes could not be written where they were asked for.
    #[error("writing a decoded WAL file failed")]
    Write(#[source] io::Error),
    /// The encoded bytes could not be read back.
    #[error("reading an encoded WAL file back failed")]
    Body(#[source] io::Error),
    /// What the caller gave is not what it says.
    #[error("this is no WAL object: {0}")]
    Malformed(Damage),
}

impl WalError {
    /// What helps.
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Conflict { .. } => Remedy::Conflict,
            Self::Damaged { .. } | Self::Malformed(_) => Remedy::Corrupt,
            Self::Store(error) => error.remedy(),
            Self::Overflow { .. } | Self::Write(_) => Remedy::Operator,
            Self::Body(_) | Self::Compress(_) => Remedy::Bug,
        }
    }
}

impl From<StoreError> for WalError {
    fn from(error: StoreError) -> Self {
        // A store error says which store and which object; there is nothing to add.
        Self::Store(error)
    }
}

fn list(variants: &[Variant]) -> String {
    let texts: Vec<String> = variants.iter().map(Variant::content_name).collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests;
