//! Several contents under one WAL file name: which one is served, if any.
//!
//! Legitimate ones come from standbys that flagged the incomplete last segment they had received before the old
//! primary archived it whole: the complete one is canonical when both agree as far as the incomplete one has WAL.
//! `.partial` files may differ freely, one a promotion; the one that holds most is given. Everything else is a
//! conflict, in which nothing is served until an operator decides. A decision beats every rule.

use std::io::{self, Write};

use jiff::Timestamp;
use postgres_format::{SystemIdentifier, WalFileName};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::fetch::{read_header, read_to};
use super::header::{Damage, WalHeader};
use super::histories;
use super::{Fingerprint, WalError};
use crate::key::{self, ObjectKey, ParsedKey};
use crate::name::ClusterName;
use crate::store::{self, LIST_LIMIT, ObjectStore, Put, StoreError};

/// Most contents of one name that are compared; more are a conflict without further ado.
pub const VARIANT_LIMIT: usize = 32;
/// Longest decision that is read, in bytes.
pub const DECISION_LIMIT_BYTES: u64 = 64 * 1024;
/// Attempts to write a decision beside others who decide at the same moment.
const DECISION_ATTEMPTS: u32 = 8;

/// One content stored under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variant {
    /// Where.
    pub key: ObjectKey,
    /// Size of the object in bytes.
    pub size: u64,
    /// `None` for history files, whose keys have none, unless they were read; and for kinds that this version does not know.
    pub fingerprint: Option<Fingerprint>,
}

impl Variant {
    /// What tells it from the others: the last component of the key, and the fingerprint of a history where that is known.
    pub fn content_name(&self) -> String {
        let key = self.key.as_str();
        let last = key.rsplit('/').next().unwrap_or(key);
        match self.fingerprint {
            Some(fingerprint) if last.ends_with(".history") => format!("{last}.{fingerprint}"),
            _ => last.to_owned(),
        }
    }

    fn served(self) -> Located {
        Located::Object { key: self.key, fingerprint: self.fingerprint, size: self.size }
    }
}

/// One content of a name and the stores that hold it, in the order in which they are asked, with the object's size in each.
/// At least one does.
#[derive(Debug, Clone)]
pub(super) struct Held<'a> {
    pub(super) variant: Variant,
    pub(super) stores: Vec<(&'a dyn ObjectStore, u64)>,
}

impl<'a> Held<'a> {
    fn holders(&self) -> Vec<&'a dyn ObjectStore> {
        self.stores.iter().map(|(store, _)| *store).collect()
    }
}

/// Which of the contents under one name is to be served.
#[derive(Debug)]
pub(super) enum Choice {
    /// This one. A segment that had no rival was not read, and may turn out to be incomplete.
    Serve(Variant),
    /// The longest of incomplete ones that agree.
    Incomplete(Variant),
    /// There is none.
    Nothing,
    /// None: they exclude each other.
    Conflict(Vec<Variant>),
}

impl From<Choice> for Located {
    fn from(choice: Choice) -> Self {
        match choice {
            Choice::Serve(variant) => variant.served(),
            Choice::Incomplete(Variant { key, size, fingerprint }) => Self::Incomplete { key, fingerprint, size },
            Choice::Nothing => Self::Absent,
            Choice::Conflict(variants) => Self::Conflict { variants },
        }
    }
}

/// What a store has under a WAL file name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Located {
    /// This object is to be served.
    Object {
        /// Where.
        key: ObjectKey,
        /// As in [`Variant::fingerprint`].
        fingerprint: Option<Fingerprint>,
        /// Size of the object in bytes.
        size: u64,
    },
    /// The segment exists only as an incomplete one, this being the longest; a complete one may still come.
    Incomplete {
        /// Where.
        key: ObjectKey,
        /// As in [`Variant::fingerprint`].
        fingerprint: Option<Fingerprint>,
        /// Size of the object in bytes.
        size: u64,
    },
    /// The store itself says that nothing has the name.
    Absent,
    /// Contents that exclude each other; nothing is to be served.
    Conflict {
        /// All of them.
        variants: Vec<Variant>,
    },
}

/// An operator's choice among contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Version of this object's layout; 1.
    pub format: u32,
    /// The chosen content.
    pub fingerprint: Fingerprint,
    /// Why, in the operator's words.
    pub reason: String,
    /// When.
    pub written: Timestamp,
}

/// Which WAL file of which cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) cluster: &'a ClusterName,
    pub(super) system: SystemIdentifier,
    pub(super) name: &'a WalFileName,
}

/// Finds the object to serve for a WAL file name. Costs two listings at once, and one small read for a segment.
pub async fn locate(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
) -> Result<Located, WalError> {
    match locate_unread(store, Wanted { cluster, system, name }).await? {
        Located::Object { key, fingerprint, size } if matches!(name, WalFileName::Segment(_)) => {
            Ok(match read_header(store, &key, size).await?.complete {
                true => Located::Object { key, fingerprint, size },
                false => Located::Incomplete { key, fingerprint, size },
            })
        }
        located => Ok(located),
    }
}

/// As [`locate`], but the object may turn out to be an incomplete segment when it is read.
pub(super) async fn locate_unread(store: &dyn ObjectStore, wanted: Wanted<'_>) -> Result<Located, WalError> {
    let Wanted { cluster, system, name } = wanted;
    let (mut variants, decision) =
        futures_util::future::try_join(variants(store, cluster, system, name), newest_decision(store, wanted)).await?;
    let chosen = decision.map(|(_, decision)| decision.fingerprint);
    if matches!(name, WalFileName::History(_)) {
        return histories::located(store, wanted, variants.pop(), chosen).await;
    }
    let held = variants
        .into_iter()
        .map(|variant| {
            let stores = vec![(store, variant.size)];
            Held { variant, stores }
        })
        .collect();
    Ok(choose(name, held, chosen).await?.into())
}

/// All contents stored under a name, in order of their keys.
pub async fn variants(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
) -> Result<Vec<Variant>, WalError> {
    if let WalFileName::History(timeline) = name {
        let key = key::history(cluster, system, *timeline);
        let size = store.head(&key).await?;
        return Ok(size.map(|size| Variant { key, size, fingerprint: None }).into_iter().collect());
    }
    let prefix = key::wal_name_prefix(cluster, system, name);
    let mut found: Vec<Variant> = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.list(&prefix, after.as_deref(), LIST_LIMIT).await?;
        after = page.objects.last().map(|entry| entry.key.as_str().to_owned());
        for entry in page.objects {
            let fingerprint = match entry.key.parsed() {
                Ok(ParsedKey::Wal { name: found, fingerprint, .. }) if found == *name => Some(fingerprint),
                // A fingerprint of a kind this version does not know; the file of another name has another dot.
                Err(_) if !entry.key.as_str()[prefix.len()..].contains('.') => None,
                _ => continue,
            };
            found.push(Variant { key: entry.key, size: entry.size, fingerprint });
        }
        if !page.more || found.len() > VARIANT_LIMIT {
            return Ok(found);
        }
    }
}

/// Records an operator's choice in one store; the newest one counts.
pub async fn decide(
    store: &dyn ObjectStore,
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
    decision: &Decision,
) -> Result<(), WalError> {
    decide_in(&[store], cluster, system, name, decision).await
}

/// Records an operator's choice in several stores under one number, so that none of them says otherwise, whether it holds the
/// chosen content or not. The newest one counts.
pub async fn decide_in(
    stores: &[&dyn ObjectStore],
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
    decision: &Decision,
) -> Result<(), WalError> {
    let Some(first) = stores.first() else { return Ok(()) };
    let body = serde_json::to_vec(decision).expect("a decision has only text keys and plain values");
    let wanted = Wanted { cluster, system, name };
    'attempts: for _ in 0..DECISION_ATTEMPTS {
        let mut number = 1;
        for store in stores {
            let newest = newest_decision(*store, wanted).await?;
            number = newest.map_or(number, |(newest, _)| number.max(newest.saturating_add(1)));
        }
        let key = key::decision(cluster, system, name, number);
        for store in stores {
            match store.put_new(&key, bytes::Bytes::from(body.clone()).into()).await? {
                Put::Created => {}
                // Somebody else decides at this moment: what was written already is outdone by a higher number.
                Put::Exists => continue 'attempts,
            }
        }
        return Ok(());
    }
    let reason = format!("others decide about {name} all the time: look at what was decided and try again");
    Err(StoreError::Refused { store: first.name().clone(), reason }.into())
}

/// Which of the contents is to be served, whichever stores hold them. A single one is not read. `chosen` is what operators
/// chose last.
pub(super) async fn choose(
    name: &WalFileName,
    mut held: Vec<Held<'_>>,
    chosen: Option<Fingerprint>,
) -> Result<Choice, WalError> {
    if let Some(chosen) = chosen
        && !held.is_empty()
    {
        let wanted = held.iter().find(|content| content.variant.fingerprint == Some(chosen));
        // Without the chosen content here, the others are still not what the operator wants served.
        return Ok(wanted.map_or_else(|| excluding(&held), |content| Choice::Serve(content.variant.clone())));
    }
    if held.len() > VARIANT_LIMIT {
        return Ok(excluding(&held));
    }
    if held.len() <= 1 {
        return Ok(held.pop().map_or(Choice::Nothing, |only| Choice::Serve(only.variant)));
    }
    let mut contents = Vec::new();
    for content in &held {
        contents.push((content, header_of(content).await?));
    }
    // The best first: complete before incomplete, then the one with more WAL, then the older key.
    contents.sort_by_key(|(content, header)| {
        (!header.complete, std::cmp::Reverse(header.logical_end), content.variant.key.as_str().to_owned())
    });
    let (best, best_header) = &contents[0];
    if matches!(name, WalFileName::Partial(_)) {
        return Ok(Choice::Serve(best.variant.clone()));
    }
    for (other, header) in &contents[1..] {
        let (best_stores, other_stores) = (best.holders(), other.holders());
        let best = (&best_stores[..], &best.variant.key, best_header);
        if !includes(best, (&other_stores, &other.variant.key, header)).await? {
            return Ok(excluding(&held));
        }
    }
    Ok(match best_header.complete {
        true => Choice::Serve(best.variant.clone()),
        false => Choice::Incomplete(best.variant.clone()),
    })
}

fn excluding(held: &[Held<'_>]) -> Choice {
    Choice::Conflict(held.iter().map(|content| content.variant.clone()).collect())
}

/// The header of a content, from the first store whose copy of it is whole.
async fn header_of(content: &Held<'_>) -> Result<WalHeader, WalError> {
    let mut failed = None;
    for (store, size) in &content.stores {
        match read_header(*store, &content.variant.key, *size).await {
            Ok(header) => return Ok(header),
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.expect("a content is held by at least one store"))
}

/// A content that is compared: the stores that hold it, its key, its header.
pub(super) type Compared<'a> = (&'a [&'a dyn ObjectStore], &'a ObjectKey, &'a WalHeader);

/// Whether `best` holds all the WAL that `other` has.
pub(super) async fn includes(
    (best_stores, best, best_header): Compared<'_>,
    (other_stores, other, other_header): Compared<'_>,
) -> Result<bool, WalError> {
    if best_header.sha256 == other_header.sha256 {
        return Ok(true);
    }
    let (Some(bytes), Some(best_bytes)) = (other_header.wal_bytes(), best_header.wal_bytes()) else {
        return Ok(false);
    };
    if other_header.complete || bytes > best_bytes {
        return Ok(false);
    }
    Ok(prefix_sha256(best_stores, best, bytes).await? == prefix_sha256(other_stores, other, bytes).await?)
}

/// SHA-256 of the first bytes of the file in an object, all of which is read and verified; from the first store whose copy
/// is whole.
async fn prefix_sha256(stores: &[&dyn ObjectStore], key: &ObjectKey, bytes: u64) -> Result<[u8; 32], WalError> {
    let mut failed = None;
    for store in stores {
        let mut prefix = PrefixHash { left: bytes, hash: Sha256::new() };
        match read_to(*store, key, &mut prefix).await {
            Ok(_) => return Ok(prefix.hash.finalize().into()),
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.expect("a content is held by at least one store"))
}

struct PrefixHash {
    left: u64,
    hash: Sha256,
}

impl Write for PrefixHash {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.left.min(bytes.len() as u64);
        self.hash.update(&bytes[..taken as usize]);
        self.left -= taken;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The choice with the highest number in a store.
pub(super) async fn newest_decision(
    store: &dyn ObjectStore,
    wanted: Wanted<'_>,
) -> Result<Option<(u32, Decision)>, WalError> {
    let prefix = key::decision_prefix(wanted.cluster, wanted.system, wanted.name);
    let Some(newest) = store::list_all(store, &prefix, LIST_LIMIT).await?.pop() else {
        return Ok(None);
    };
    let damaged = |reason: String| WalError::Damaged {
        store: store.name().clone(),
        key: newest.key.clone(),
        damage: Damage::HeaderText { reason },
    };
    let Ok(ParsedKey::Decision { number, .. }) = newest.key.parsed() else {
        return Err(damaged("its key is no decision's".to_owned()));
    };
    let stream = store.get(&newest.key, store::ByteRange::All).await?;
    let bytes = store::collect(stream, DECISION_LIMIT_BYTES).await?;
    let decision: Decision = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    match decision.format {
        1 => Ok(Some((number, decision))),
        format => Err(damaged(format!("its format is {format}, and this version reads 1"))),
    }
}
