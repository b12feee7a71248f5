//! What a store can do now, and finding out.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use process::clock;
use repository::identity::{self, IdentityError, RepositoryIdentity};
use repository::name::StoreName;
use repository::store::StoreError;
use repository::{key, probe};
use tokio_util::sync::CancellationToken;

use super::{Kind, Slot, Stores, chain};

/// How often stores are looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(3);
/// A store that was full takes objects again when it is this many percent below its limit.
const FULL_HYSTERESIS_PERCENT: u8 = 1;

/// What a store can do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Nobody has asked it yet.
    Unknown,
    /// It is read and written.
    Healthy,
    /// It is silent or failing; reconciliation fills it when it is back.
    Lagging {
        /// Why, for people.
        reason: String,
    },
    /// It has no `repo.json`, and nothing else either; `cluster create` may start in it.
    Empty {
        /// Whether other stores belong to a repository: then this one is unmounted or its disk was replaced.
        expected: bool,
    },
    /// It is not the store we were promised.
    Refused {
        /// Why, for people.
        reason: String,
    },
    /// It is read, and takes nothing new.
    Full {
        /// Why, for people.
        reason: String,
    },
}

impl Health {
    /// Whether objects can be read from it.
    pub fn is_readable(&self) -> bool {
        matches!(self, Self::Healthy | Self::Full { .. })
    }

    /// Why it is not healthy, for people; empty when it is.
    pub fn reason(&self) -> String {
        match self {
            Self::Unknown => "not asked yet".to_owned(),
            Self::Healthy => String::new(),
            Self::Empty { expected: false } => "it is empty; run: pgconvoy cluster create CLUSTER".to_owned(),
            Self::Empty { expected: true } => {
                "it has no repo.json; mount it, or if its disk was replaced run: pgconvoy cluster create CLUSTER"
                    .to_owned()
            }
            Self::Lagging { reason } | Self::Refused { reason } | Self::Full { reason } => reason.clone(),
        }
    }

    /// The word for metrics and JSON.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Unknown | Self::Lagging { .. } => "lagging",
            Self::Healthy => "healthy",
            Self::Empty { .. } | Self::Refused { .. } => "refused",
            Self::Full { .. } => "full",
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason() {
            reason if reason.is_empty() => f.write_str(self.word()),
            reason => write!(f, "{} ({reason})", self.word()),
        }
    }
}

/// Says a change in the log.
pub(super) fn announce(store: &StoreName, health: &Health) {
    match health {
        Health::Unknown => {}
        Health::Healthy => tracing::info!(%store, "the store is healthy"),
        Health::Empty { expected: false } => {
            tracing::info!(%store, "the store is empty; `pgconvoy cluster create` gives it its identity");
        }
        Health::Empty { expected: true } => {
            tracing::error!(%store, reason = health.reason(), "the store is refused");
        }
        Health::Lagging { reason } => {
            tracing::warn!(%store, reason, "the store is lagging; it is filled when it is back");
        }
        Health::Refused { reason } => tracing::error!(%store, reason, "the store is refused"),
        Health::Full { reason } => tracing::error!(%store, reason, "the store is full and takes nothing new"),
    }
}

/// Finds out what one store can do and notes it.
pub(super) async fn check(stores: &Stores, slot: &Arc<Slot>) {
    let before = slot.health();
    let silent = || Health::Lagging { reason: format!("silent for {} s", stores.patience.as_secs()) };
    let mut found = match tokio::time::timeout(stores.patience, look(stores, slot, &before)).await {
        Ok(found) => found,
        Err(_) => silent(),
    };
    if found == Health::Healthy && !before.is_readable() {
        found = match slot.probed.load(Ordering::Relaxed) {
            // A probe is many requests and has a deadline of its own.
            false => try_promises(slot).await,
            true => tokio::time::timeout(stores.patience, try_write(slot)).await.unwrap_or_else(|_| silent()),
        };
    }
    // A write, or another look, may have judged the store meanwhile and knows better; the next round looks again.
    let now = slot.health();
    if now != before && (found == before || now == Health::Healthy) {
        return;
    }
    slot.set_health(found);
}

/// What the store says about itself, by reading alone.
async fn look(stores: &Stores, slot: &Arc<Slot>, before: &Health) -> Health {
    // A directory works on the first repository that it meets unless it is told which one is meant.
    stores.repository().into_iter().for_each(|expected| slot.store.expect_repository(expected));
    let identity = match identity_of(stores, slot).await {
        Ok(identity) => identity,
        Err(health) => {
            if !matches!(health, Health::Lagging { .. }) {
                slot.identified.store(false, Ordering::Relaxed);
            }
            return health;
        }
    };
    let expected = stores.repository();
    slot.identified.store(expected.is_none_or(|expected| expected == identity.repository), Ordering::Relaxed);
    match expected {
        None => stores.set_repository(identity.repository),
        Some(expected) if expected != identity.repository => {
            let found = identity.repository;
            return Health::Refused { reason: format!("it belongs to repository {found}, expected {expected}") };
        }
        Some(_) => {}
    }
    fullness(slot, before).await.unwrap_or(Health::Healthy)
}

/// The first time: what a store promises is tried before it is trusted.
async fn try_promises(slot: &Slot) -> Health {
    match probe::probe(&*slot.store, clock::now()).await {
        Ok(_) => {
            slot.probed.store(true, Ordering::Relaxed);
            Health::Healthy
        }
        Err(error) => failed(&error),
    }
}

/// Coming back: a store that reads but does not write would hold up every push again.
async fn try_write(slot: &Slot) -> Health {
    let name = format!("{}-{}-back", clock::now().as_millisecond(), uuid::Uuid::now_v7().simple());
    let key = key::probe(&name).expect("digits, letters and dashes make a key");
    match slot.store.put_new(&key, Bytes::from_static(b"back\n").into()).await {
        Ok(_) => Health::Healthy,
        Err(error) => failed(&error),
    }
}

/// Which repository the store belongs to, or what the store is without that.
async fn identity_of(stores: &Stores, slot: &Arc<Slot>) -> Result<RepositoryIdentity, Health> {
    if let Some(identity) = read_identity(slot).await? {
        return Ok(identity);
    }
    let without = without_identity(stores, slot).await;
    match without {
        // `cluster create` may have given it an identity, and then objects, between the two requests.
        Health::Refused { .. } => read_identity(slot).await?.ok_or(without),
        _ => Err(without),
    }
}

async fn read_identity(slot: &Slot) -> Result<Option<RepositoryIdentity>, Health> {
    identity::read(&*slot.store).await.map_err(|error| match error {
        IdentityError::Store(error) => failed(&error),
        error => Health::Refused { reason: chain(&error) },
    })
}

async fn without_identity(stores: &Stores, slot: &Arc<Slot>) -> Health {
    let expected = stores.repository().is_some();
    match holds_anything(slot).await {
        Ok(false) => Health::Empty { expected },
        // A directory lists nothing before it has its identity, and takes one only if nothing else is there.
        Err(StoreError::Refused { .. }) if matches!(slot.kind, Kind::Directory { .. }) => Health::Empty { expected },
        Ok(true) => Health::Refused {
            reason: "it has objects but no repo.json; check what is mounted or configured there".to_owned(),
        },
        Err(error) => failed(&error),
    }
}

/// Whether there is any object besides those of probes: an agent may have tried the store before it became a repository.
async fn holds_anything(slot: &Arc<Slot>) -> Result<bool, StoreError> {
    let Some(first) = slot.store.list("", None, 1).await?.objects.into_iter().next() else { return Ok(false) };
    if !first.key.as_str().starts_with(&key::probe_prefix()) {
        return Ok(true);
    }
    Ok(!slot.store.list("", Some(&key::behind_probes()), 1).await?.objects.is_empty())
}

async fn fullness(slot: &Arc<Slot>, before: &Health) -> Option<Health> {
    let Kind::Directory { full_percent } = slot.kind else { return None };
    let room = match slot.store.room().await {
        Ok(room) => room?,
        Err(error) => return Some(failed(&error)),
    };
    let used = room.used_percent();
    let limit = match before {
        Health::Full { .. } => full_percent.saturating_sub(FULL_HYSTERESIS_PERCENT),
        _ => full_percent,
    };
    // The number stays out of the reason, or each percent would be a change.
    (used >= limit).then(|| Health::Full { reason: format!("{full_percent} % of its file system are used") })
}

fn failed(error: &StoreError) -> Health {
    let reason = chain(error);
    match error {
        StoreError::Full { .. } => Health::Full { reason },
        StoreError::Refused { .. } | StoreError::Denied { .. } | StoreError::Unsupported { .. } => {
            Health::Refused { reason }
        }
        _ => Health::Lagging { reason },
    }
}

/// Looks at the stores again and again.
#[derive(Debug)]
pub struct HealthWatch {
    stores: Stores,
}

impl HealthWatch {
    /// A watch over the stores.
    pub fn new(stores: Stores) -> Self {
        Self { stores }
    }

    /// Runs until `stop`, every store in a loop of its own, so that a hung one delays no other.
    pub async fn run(self, stop: CancellationToken) {
        let rounds = self.stores.all().iter().map(|slot| async {
            loop {
                tokio::time::sleep(CHECK_INTERVAL).await;
                check(&self.stores, slot).await;
            }
        });
        tokio::select! {
            () = stop.cancelled() => {}
            _ = join_all(rounds) => {}
        }
    }
}
