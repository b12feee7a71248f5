//! The clusters the repository knows, and making a new one.
//!
//! A cluster exists when a store's root says so; the catalog remembers it, so that archiving goes on while that store is
//! away. Creating one is the only thing that may start in an empty store: it writes `repo.json`, then the first root, and
//! repeating it after a crash at any point finishes the work. A new repository identity is made only when every store is
//! there and empty; otherwise empty stores join the repository that the others belong to.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use jiff::Timestamp;
use postgres_format::{SegmentSize, SystemIdentifier};
use repository::identity::{self, RepositoryIdentity};
use repository::key::{self, ParsedKey};
use repository::name::{ClusterName, NodeName};
use repository::root::{self, Root, System};
use repository::store::{ObjectStore, Put, StoreError};
use uuid::Uuid;

use crate::catalog::clusters::ClusterRow;
use crate::catalog::{Catalog, CatalogError, clusters as rows};
use crate::refusal::Refusal;
use crate::roots::Roots;
use crate::stores::{Health, Slot, Stores, chain};

/// Clusters of one store that are read.
const CLUSTERS_LIMIT: usize = 10_000;

/// The name under which the coordinator commits roots.
pub fn root_writer() -> NodeName {
    "coordinator".parse().expect("a lower-case word is a node name")
}

/// The clusters known here. Clones share them.
#[derive(Debug, Clone)]
pub struct Clusters {
    catalog: Catalog,
    roots: Roots,
    known: Arc<RwLock<BTreeMap<ClusterName, Vec<ClusterRow>>>>,
}

/// What creating a cluster did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedCluster {
    /// The cluster's system identifier.
    pub system_identifier: SystemIdentifier,
    /// Stores initialised by this call.
    pub stores_initialised: Vec<String>,
    /// Stores in which the cluster was known already.
    pub stores_known: Vec<String>,
}

/// What is to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCluster {
    /// Fleet name.
    pub cluster: ClusterName,
    /// System identifier.
    pub system_identifier: SystemIdentifier,
    /// PostgreSQL's major version, if a node said it.
    pub postgres_major: Option<u32>,
    /// WAL segment size, if a node said it.
    pub segment_size: Option<SegmentSize>,
}

impl Clusters {
    /// Takes up what the catalog knows.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn load(catalog: Catalog, roots: Roots) -> Result<Self, CatalogError> {
        let clusters = Self { catalog, roots, known: Arc::default() };
        clusters.reload().await?;
        Ok(clusters)
    }

    /// Takes up what the catalog knows now.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn reload(&self) -> Result<(), CatalogError> {
        let mut known: BTreeMap<ClusterName, Vec<ClusterRow>> = BTreeMap::new();
        for row in self.catalog.call(|connection| rows::all(connection)).await? {
            known.entry(row.cluster.clone()).or_default().push(row);
        }
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = known;
        Ok(())
    }

    /// All names.
    pub fn names(&self) -> Vec<ClusterName> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// All systems of all clusters.
    pub fn systems(&self) -> Vec<ClusterRow> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).values().flatten().cloned().collect()
    }

    /// The systems of one cluster; none when it is not known.
    pub fn systems_of(&self, cluster: &ClusterName) -> Vec<ClusterRow> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).get(cluster).cloned().unwrap_or_default()
    }

    /// Checks that a cluster exists and has this system identifier.
    ///
    /// # Errors
    /// [`Refusal::ClusterUnknown`] and [`Refusal::SystemIdentifierMismatch`].
    pub fn expect(&self, cluster: &ClusterName, found: SystemIdentifier) -> Result<(), Refusal> {
        let systems = self.systems_of(cluster);
        let Some(newest) = systems.last() else {
            return Err(Refusal::ClusterUnknown { cluster: cluster.clone() });
        };
        if systems.iter().any(|system| system.system_identifier == found) {
            return Ok(());
        }
        let expected = newest.system_identifier;
        Err(Refusal::SystemIdentifierMismatch { cluster: cluster.clone(), expected, found })
    }

    /// Reads the roots of the readable stores and adds what was not known.
    ///
    /// # Errors
    /// When the catalog fails; a store that fails is judged and left out.
    pub async fn refresh(&self, stores: &Stores) -> Result<(), CatalogError> {
        self.remember(named_by(stores).await.rows).await
    }

    async fn remember(&self, found: Vec<ClusterRow>) -> Result<(), CatalogError> {
        if found.is_empty() {
            return Ok(());
        }
        self.catalog.call(move |connection| found.iter().try_for_each(|row| rows::put(connection, row))).await?;
        self.reload().await
    }

    /// Gives a cluster its place in every store that is there.
    ///
    /// # Errors
    /// [`Refusal::NotCreated`] with the reason and what to do.
    pub async fn create(&self, stores: &Stores, new: NewCluster, now: Timestamp) -> Result<CreatedCluster, Refusal> {
        let refuse = |detail: String| Refusal::NotCreated { cluster: new.cluster.clone(), detail };
        if let Some(other) =
            self.systems_of(&new.cluster).iter().find(|row| row.system_identifier != new.system_identifier)
        {
            let expected = other.system_identifier;
            return Err(refuse(format!("it exists with system identifier {expected}; choose another cluster name")));
        }
        stores.check().await;
        let repository = repository_for(stores).map_err(refuse)?;
        let lost = |slot: &&Arc<Slot>| slot.health() == Health::Empty { expected: true };
        if let (Some(lost), Some(known), true) =
            (stores.all().iter().find(lost), self.names().first(), self.systems_of(&new.cluster).is_empty())
        {
            // What is most likely is a mount that is away. Replacing a disk is asked for by a cluster that was on it.
            return Err(refuse(format!(
                "store {} has no repo.json; mount it, or if its disk was replaced run first: pgconvoy cluster create {known}",
                lost.name()
            )));
        }
        let identity = RepositoryIdentity::new(repository, now);
        let mut created = CreatedCluster {
            system_identifier: new.system_identifier,
            stores_initialised: Vec::new(),
            stores_known: Vec::new(),
        };
        let usable = |slot: &&Arc<Slot>| matches!(slot.health(), Health::Empty { .. } | Health::Healthy);
        for slot in stores.all().iter().filter(usable) {
            let place = place_in(&self.roots, slot, &identity, &new, now);
            let placed = tokio::time::timeout(stores.patience(), place)
                .await
                .map_err(|_| refuse(format!("store {} is silent; repeat the command when it answers", slot.name())))?
                .map_err(|detail| refuse(format!("store {}: {detail}; repeat the command", slot.name())))?;
            match placed {
                Placed::Initialised => created.stores_initialised.push(slot.name().to_string()),
                Placed::Known => created.stores_known.push(slot.name().to_string()),
            }
        }
        stores.set_repository(repository);
        self.catalog.call(move |connection| rows::put_repository(connection, repository)).await?;
        self.remember(vec![ClusterRow {
            cluster: new.cluster.clone(),
            system_identifier: new.system_identifier,
            postgres_major: new.postgres_major,
            segment_size: new.segment_size,
            since: now,
        }])
        .await?;
        stores.check().await;
        Ok(created)
    }
}

/// The clusters that the roots of stores name.
pub struct Named {
    /// As the stores tell it; one that several name comes several times.
    pub rows: Vec<ClusterRow>,
    /// Whether some store could not be asked, which may know more.
    pub in_part: bool,
}

/// The clusters that the roots of the readable stores name. A store that fails is left out, a silent one is judged.
pub async fn named_by(stores: &Stores) -> Named {
    let readable = stores.readable();
    let mut named = Named { rows: Vec::new(), in_part: readable.len() < stores.all().len() };
    for slot in readable {
        match tokio::time::timeout(stores.patience(), clusters_in(&*slot.store)).await {
            Ok(Ok(rows)) => named.rows.extend(rows),
            Ok(Err(reason)) => {
                named.in_part = true;
                tracing::warn!(store = %slot.name(), reason, "a store's roots cannot be read");
            }
            Err(_) => {
                named.in_part = true;
                slot.judge(&silent(&slot));
            }
        }
    }
    named
}

/// The identity a new cluster's stores belong to: that of the stores, or a new one if all of them are there and empty.
fn repository_for(stores: &Stores) -> Result<Uuid, String> {
    let refused = stores.all().iter().find(|slot| matches!(slot.health(), Health::Refused { .. }));
    if let Some(slot) = refused {
        return Err(format!("store {} is {}", slot.name(), slot.health()));
    }
    if let Some(repository) = stores.repository() {
        return Ok(repository);
    }
    match stores.all().iter().find(|slot| !matches!(slot.health(), Health::Empty { .. })) {
        None => Ok(Uuid::now_v7()),
        Some(slot) => Err(format!(
            "store {} is {}, so nobody knows whether it holds a repository already; wait until it answers or take it out of \
             the configuration",
            slot.name(),
            slot.health()
        )),
    }
}

enum Placed {
    Initialised,
    Known,
}

/// Gives a cluster its place in one store; every step is repeated without harm.
async fn place_in(
    roots: &Roots,
    slot: &Slot,
    identity: &RepositoryIdentity,
    new: &NewCluster,
    now: Timestamp,
) -> Result<Placed, String> {
    // Both answers mean that the store has this identity now.
    match identity::create(&*slot.store, identity).await.map_err(|error| chain(&error))? {
        // It was empty, and this call begins it anew on purpose.
        Put::Created => roots.forgo_all(slot.name()).await.map_err(|error| chain(&error))?,
        Put::Exists => {}
    }
    process::crash_point!("coordinator/after-identity-before-root");
    let newest = roots.newest(&*slot.store, &new.cluster).await.map_err(|error| chain(&error))?;
    let known = newest
        .as_ref()
        .is_some_and(|root| root.systems.iter().any(|system| system.system_identifier == new.system_identifier));
    if newest.as_ref().is_some_and(|root| !root.systems.is_empty()) && !known {
        return Err("the cluster's root names another system identifier".to_owned());
    }
    commit_system(roots, &*slot.store, new, now).await?;
    Ok(if known { Placed::Known } else { Placed::Initialised })
}

/// Makes sure that a store's root of a cluster names its system.
///
/// # Errors
/// The reason, for people.
pub async fn commit_system(
    roots: &Roots,
    store: &dyn ObjectStore,
    new: &NewCluster,
    now: Timestamp,
) -> Result<Root, String> {
    let bytes = new.segment_size.map(SegmentSize::bytes);
    let system = System::new(new.system_identifier, new.postgres_major, bytes, now);
    let edit = move |root: &Root| root.with_system(system.clone());
    roots.commit(store, &new.cluster, now, edit).await.map_err(|error| chain(&error))
}

/// The clusters that a store's roots name.
async fn clusters_in(store: &dyn ObjectStore) -> Result<Vec<ClusterRow>, String> {
    let mut rows = Vec::new();
    for cluster in names_in(store).await.map_err(|error| chain(&error))? {
        let Some(root) = root::newest(store, &cluster).await.map_err(|error| chain(&error))? else { continue };
        rows.extend(root.systems.iter().map(|system| ClusterRow {
            cluster: cluster.clone(),
            system_identifier: system.system_identifier,
            postgres_major: system.postgres_major,
            segment_size: system.segment_size_bytes.and_then(|bytes| SegmentSize::from_bytes(bytes).ok()),
            since: system.since,
        }));
    }
    Ok(rows)
}

/// Names of clusters that have any object in a store, one listing each.
async fn names_in(store: &dyn ObjectStore) -> Result<Vec<ClusterName>, StoreError> {
    let prefix = key::clusters_prefix();
    let mut names: Vec<ClusterName> = Vec::new();
    let mut after = prefix.clone();
    while names.len() < CLUSTERS_LIMIT {
        let page = store.list(&prefix, Some(&after), 1).await?;
        let Some(first) = page.objects.first() else { break };
        let cluster = match first.key.parsed() {
            Ok(ParsedKey::Root { cluster, .. })
            | Ok(ParsedKey::Manifest { cluster, .. })
            | Ok(ParsedKey::Pack { cluster, .. })
            | Ok(ParsedKey::Note { cluster, .. })
            | Ok(ParsedKey::Wal { cluster, .. })
            | Ok(ParsedKey::History { cluster, .. })
            | Ok(ParsedKey::Conflict { cluster, .. })
            | Ok(ParsedKey::Decision { cluster, .. })
            | Ok(ParsedKey::Writer { cluster, .. }) => cluster,
            _ => {
                after = first.key.as_str().to_owned();
                continue;
            }
        };
        after = key::skip(&key::cluster_prefix(&cluster));
        names.push(cluster);
    }
    Ok(names)
}

/// The error of a store that did not answer in time.
pub fn silent(slot: &Slot) -> StoreError {
    StoreError::Timeout { store: slot.name().clone(), operation: "read" }
}
