//! Which content of a timeline's history counts.
//!
//! Its key has no fingerprint. A store that is sent two ancestries keeps the second apart, under `conflict/`, and serves the
//! first; but two stores may have taken unlike ones, each by another road. Those exclude each other, as two contents of a
//! segment do. A choice made by an operator counts in every store: one that has the chosen content only under `conflict/`
//! serves it from there, and one that has it nowhere serves nothing.
//!
//! Equal ancestries are one content, whatever the comments in the files say.

use std::time::Duration;

use postgres_format::timeline_history::{MAX_BYTES, TimelineHistory};
use postgres_format::{SystemIdentifier, Timeline, WalFileName};

use super::fetch::read_history;
use super::variants::{Located, Variant, Wanted, locate_unread};
use super::{Fingerprint, WalError};
use crate::key::{self, ParsedKey};
use crate::name::ClusterName;
use crate::store::{self, LIST_LIMIT, ObjectStore, StoreError};

/// How long a store may take to read a history file that is compared.
const PATIENCE: Duration = Duration::from_secs(2);

/// A history file as a store holds it.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) fingerprint: Fingerprint,
    text: Vec<u8>,
}

impl Content {
    /// Reads and verifies it.
    pub(super) async fn read(store: &dyn ObjectStore, variant: &Variant) -> Result<Self, WalError> {
        let reading = read_history(store, &variant.key, MAX_BYTES);
        let silent = |_| StoreError::Timeout { store: store.name().clone(), operation: "get" };
        let text = tokio::time::timeout(PATIENCE, reading).await.map_err(silent)??;
        Ok(Self { fingerprint: Fingerprint::of_sha256(&crate::digest::sha256(&text)), text })
    }

    pub(super) fn is_same(&self, timeline: Timeline, other: &Self) -> bool {
        same_ancestry(timeline, &self.text, &other.text)
    }
}

/// Whether two history files of a timeline say the same of its ancestors.
pub(super) fn same_ancestry(timeline: Timeline, one: &[u8], other: &[u8]) -> bool {
    let parsed = |text: &[u8]| TimelineHistory::parse(timeline, text).ok();
    match (parsed(one), parsed(other)) {
        (Some(one), Some(other)) => one.entries() == other.entries(),
        _ => one == other,
    }
}

/// The history of a timeline that counts in a store: the one under its own key, or the one that was chosen, wherever the store
/// keeps it. `None` if it has none.
///
/// # Errors
/// When the store fails, what counts is damaged, or another one was chosen than the store has.
pub async fn history_text(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
    timeline: Timeline,
) -> Result<Option<Vec<u8>>, WalError> {
    let name = WalFileName::History(timeline);
    match locate_unread(store, Wanted { cluster, system, name: &name }).await? {
        Located::Object { key, .. } | Located::Incomplete { key, .. } => {
            read_history(store, &key, MAX_BYTES).await.map(Some)
        }
        Located::Absent => Ok(None),
        Located::Conflict { variants } => {
            Err(WalError::Conflict { store: store.name().clone(), name, existing: variants })
        }
    }
}

/// All contents of a timeline's history that a store holds, with their fingerprints, the one under the history's own key first.
///
/// # Errors
/// When the store fails, or the history under its own key is damaged.
pub async fn history_contents(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
    timeline: Timeline,
) -> Result<Vec<Variant>, WalError> {
    let name = WalFileName::History(timeline);
    let mut contents = super::variants(store, cluster, system, &name).await?;
    for own in &mut contents {
        own.fingerprint = Some(Content::read(store, own).await?.fingerprint);
    }
    let prefix = format!("{}{name}.", key::conflict_prefix(cluster, system));
    for entry in store::list_all(store, &prefix, LIST_LIMIT).await? {
        if let Ok(ParsedKey::Conflict { fingerprint, .. }) = entry.key.parsed()
            && contents.iter().all(|content| content.fingerprint != Some(fingerprint))
        {
            contents.push(Variant { key: entry.key, size: entry.size, fingerprint: Some(fingerprint) });
        }
    }
    Ok(contents)
}

/// What one store serves as a timeline's history, given what it holds under the history's own key and what was chosen.
pub(super) async fn located(
    store: &dyn ObjectStore,
    wanted: Wanted<'_>,
    own: Option<Variant>,
    chosen: Option<Fingerprint>,
) -> Result<Located, WalError> {
    let object = |Variant { key, size, fingerprint }| Located::Object { key, fingerprint, size };
    let Some(chosen) = chosen else { return Ok(own.map_or(Located::Absent, object)) };
    let own = match own {
        Some(mut own) => {
            own.fingerprint = Some(Content::read(store, &own).await?.fingerprint);
            Some(own)
        }
        None => None,
    };
    if let Some(own) = own.clone().filter(|own| own.fingerprint == Some(chosen)) {
        return Ok(object(own));
    }
    match kept_apart(store, wanted, chosen).await? {
        Some(variant) => Ok(object(variant)),
        None => Ok(own.map_or(Located::Absent, |own| Located::Conflict { variants: vec![own] })),
    }
}

/// A content that a store refused once, and kept.
pub(super) async fn kept_apart(
    store: &dyn ObjectStore,
    wanted: Wanted<'_>,
    fingerprint: Fingerprint,
) -> Result<Option<Variant>, WalError> {
    let key = key::conflict(wanted.cluster, wanted.system, wanted.name, &fingerprint);
    let size = store.head(&key).await?;
    Ok(size.map(|size| Variant { key, size, fingerprint: Some(fingerprint) }))
}
