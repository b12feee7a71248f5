//! Putting a WAL object into one store, by the rules at the head of `wal.rs`.

use postgres_format::WalFileName;
use postgres_format::timeline_history::MAX_BYTES;

use super::encode::EncodedWal;
use super::fetch::{read_header, read_history, read_to};
use super::header::{Expected, WalHeader};
use super::histories::same_ancestry;
use super::variants::{Located, Variant, Wanted, includes, locate_unread, newest_decision, variants};
use super::{DecodeError, WalDecoder, WalError};
use crate::key;
use crate::store::{ObjectStore, Put};

/// What a put found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// The content was not there and is now.
    New,
    /// The same content was there already; it was read and is whole.
    AlreadyStored,
}

/// Whether a put looks for other contents of the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VariantCheck {
    /// Look. Costs one listing.
    List,
    /// Do not: the caller knows what the store has under the name, or looks with [`check_rivals`].
    Skip,
}

/// Makes a WAL object durable in a store. Repeating it is harmless, and right after an unknown outcome.
///
/// [`WalError::Conflict`] if the name has another content: ours is kept beside it (a history file under
/// `conflict/`), nothing is lost, and the file must not count as archived.
pub async fn put(store: &dyn ObjectStore, wal: &EncodedWal, check: VariantCheck) -> Result<Stored, WalError> {
    if let WalFileName::History(timeline) = wal.header.name {
        return put_history(store, wal, timeline).await;
    }
    let key = wal.key();
    let stored = match store.put_new(&key, wal.body.clone()).await? {
        Put::Created => Stored::New,
        Put::Exists => {
            // The key has half of the digest; reading verifies the other half and that the object is whole.
            let header = read_to(store, &key, &mut std::io::sink()).await?;
            if header.sha256 != wal.header.sha256 {
                return Err(conflict(store, &wal.header, variants_of(store, &wal.header).await?));
            }
            Stored::AlreadyStored
        }
    };
    if check == VariantCheck::List {
        check_rivals(store, wal).await?;
    }
    Ok(stored)
}

async fn variants_of(store: &dyn ObjectStore, header: &WalHeader) -> Result<Vec<Variant>, WalError> {
    variants(store, &header.cluster, header.system_identifier, &header.name).await
}

/// Looks for other contents of the name of an object that is stored: [`WalError::Conflict`] if one excludes it. Costs one
/// listing; none for a history file or a `.partial`, which have no rivals.
pub async fn check_rivals(store: &dyn ObjectStore, wal: &EncodedWal) -> Result<(), WalError> {
    let header = &wal.header;
    if matches!(header.name, WalFileName::Partial(_) | WalFileName::History(_)) {
        return Ok(());
    }
    let all = variants_of(store, header).await?;
    if all.len() <= 1 {
        return Ok(());
    }
    let wanted = Wanted { cluster: &header.cluster, system: header.system_identifier, name: &header.name };
    match locate_unread(store, wanted).await? {
        Located::Object { fingerprint, .. } | Located::Incomplete { fingerprint, .. }
            if fingerprint == Some(wal.fingerprint) =>
        {
            Ok(())
        }
        // Without a decision the served one includes all others, ours too. With one it need not.
        Located::Object { key, size, .. } | Located::Incomplete { key, size, .. } => {
            let served = read_header(store, &key, size).await?;
            match includes((&[store], &key, &served), (&[store], &wal.key(), header)).await? {
                true => Ok(()),
                false => Err(conflict(store, header, all)),
            }
        }
        Located::Conflict { variants } => Err(conflict(store, header, variants)),
        Located::Absent => Ok(()),
    }
}

fn conflict(store: &dyn ObjectStore, header: &WalHeader, existing: Vec<Variant>) -> WalError {
    WalError::Conflict { store: store.name().clone(), name: header.name, existing }
}

/// A history file has one key. Equal ancestry is success, whatever the comments in the file say.
async fn put_history(
    store: &dyn ObjectStore,
    wal: &EncodedWal,
    timeline: postgres_format::Timeline,
) -> Result<Stored, WalError> {
    let header = &wal.header;
    let key = wal.key();
    if store.put_new(&key, wal.body.clone()).await? == Put::Created {
        return Ok(Stored::New);
    }
    let theirs = read_history(store, &key, MAX_BYTES).await?;
    let ours = decode_body(wal).await?;
    if same_ancestry(timeline, &theirs, &ours) {
        return Ok(Stored::AlreadyStored);
    }
    let evidence = key::conflict(&header.cluster, header.system_identifier, &header.name, &wal.fingerprint);
    // Existing evidence has the same fingerprint, and is served only if an operator chooses it.
    let (Put::Created | Put::Exists) = store.put_new(&evidence, wal.body.clone()).await?;
    let wanted = Wanted { cluster: &header.cluster, system: header.system_identifier, name: &header.name };
    // Who may not list sees no choice, and the conflict stands for it.
    let decided = newest_decision(store, wanted).await.ok().flatten();
    if decided.is_some_and(|(_, decision)| decision.fingerprint == wal.fingerprint) {
        return Ok(Stored::AlreadyStored);
    }
    let held = |key, size, fingerprint| Variant { key, size, fingerprint };
    let existing = vec![
        held(key.clone(), store.head(&key).await?.unwrap_or_default(), None),
        held(evidence, wal.body.len(), Some(wal.fingerprint)),
    ];
    Err(conflict(store, header, existing))
}

/// The file in an object that is not stored yet.
async fn decode_body(wal: &EncodedWal) -> Result<Vec<u8>, WalError> {
    use futures_util::TryStreamExt;

    let malformed = |error| match error {
        DecodeError::Damaged(damage) => WalError::Malformed(damage),
        DecodeError::Write(source) | DecodeError::Memory(source) => WalError::Write(source),
    };
    let expected = Expected {
        cluster: wal.header.cluster.clone(),
        system_identifier: wal.header.system_identifier,
        name: wal.header.name,
        fingerprint: Some(wal.fingerprint),
    };
    let mut decoder = WalDecoder::new(Some(expected)).map_err(malformed)?;
    let mut file = Vec::new();
    let mut chunks = wal.body.chunks();
    while let Some(chunk) = chunks.try_next().await.map_err(WalError::Body)? {
        decoder.push(&chunk, &mut file).map_err(malformed)?;
    }
    decoder.finish().map_err(malformed)?;
    Ok(file)
}
