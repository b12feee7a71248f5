//! The stores a verb reads: those of the configuration, or the coordinator's.
//!
//! A store is used only after it showed the repository's identity, so that an unmounted directory or a foreign bucket is
//! never taken for an empty archive. Stores that cannot be used are told with their reason; whether the verb goes on
//! without them is the verb's decision.

use std::{collections::BTreeSet, sync::Arc};

use agent::remote_store::RemoteStore;
use futures_util::future::join_all;
use process::exit::Exit;
use proto::store::{ListStoresRequest, store_service_client::StoreServiceClient};
use repository::{
    config::{StoreConfig, StoreKind},
    identity, key,
    name::{ClusterName, NameError, StoreName},
    store::ObjectStore,
};
use uuid::Uuid;

use crate::{
    config::Config,
    coordinator,
    error::{CliError, chain},
};

/// Largest message of a store's bytes; the wire allows chunks of 1 MiB.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Most keys asked for when the clusters of a store are counted.
const FIRST_ONLY: usize = 1;

/// What a coordinator calls a store that is near.
const NEAR_KIND: &str = "directory";

/// Which of the listed stores to read.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Selection<'a> {
    /// Only these; all when empty.
    pub(crate) only: &'a [StoreName],
    /// All but these.
    pub(crate) without: &'a [StoreName],
    /// Only stores of this repository; of the one that the first of them shows if absent.
    pub(crate) repository: Option<Uuid>,
}

/// Stores, near ones first, else in the order of their configuration.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    /// Those that can be read.
    pub(crate) stores: Vec<Arc<dyn ObjectStore>>,
    /// Those that cannot, with the reason.
    pub(crate) away: Vec<Away>,
    /// Those left out by name.
    pub(crate) left_out: Vec<StoreName>,
    /// The repository they belong to; `None` if none can be read.
    pub(crate) repository: Option<Uuid>,
}

/// A store that cannot be used now.
#[derive(Debug, Clone)]
pub(crate) struct Away {
    /// Which.
    pub(crate) store: StoreName,
    /// Why.
    pub(crate) reason: String,
}

impl Selection<'_> {
    fn takes(&self, name: &StoreName) -> bool {
        !self.without.contains(name) && (self.only.is_empty() || self.only.contains(name))
    }

    /// Every name given must be a listed store: a misspelt `--without-store` must not pass silently.
    fn check(&self, listed: &[&StoreName]) -> Result<(), CliError> {
        match self.only.iter().chain(self.without).find(|name| !listed.contains(name)) {
            None => Ok(()),
            Some(unknown) => {
                let listed: Vec<&str> = listed.iter().map(|name| name.as_ref()).collect();
                Err(CliError::new(
                    Exit::Usage,
                    format!("no store is called {unknown}; there are {}", listed.join(", ")),
                ))
            }
        }
    }
}

/// Opens the stores that the configuration lists, or else those of the coordinator.
pub(crate) async fn open(config: &Config, selection: Selection<'_>) -> Result<Opened, CliError> {
    let listed: Vec<Arc<dyn ObjectStore>> = if config.stores.is_empty() {
        by_coordinator(config).await?
    } else {
        return open_configured(&config.stores, selection).await;
    };
    let names: Vec<&StoreName> = listed.iter().map(|store| store.name()).collect();
    selection.check(&names)?;
    let (taken, left_out): (Vec<_>, Vec<_>) = listed.into_iter().partition(|store| selection.takes(store.name()));
    let left_out = left_out.iter().map(|store| store.name().clone()).collect();
    Ok(identified(taken, left_out, Vec::new(), selection.repository).await)
}

async fn open_configured(configs: &[StoreConfig], selection: Selection<'_>) -> Result<Opened, CliError> {
    let names: Vec<&StoreName> = configs.iter().map(|store| &store.name).collect();
    selection.check(&names)?;
    let mut configs: Vec<&StoreConfig> = configs.iter().collect();
    configs.sort_by_key(|store| !matches!(store.kind, StoreKind::Directory(_)));
    let mut taken = Vec::new();
    let mut left_out = Vec::new();
    let mut away = Vec::new();
    for config in configs {
        if !selection.takes(&config.name) {
            left_out.push(config.name.clone());
            continue;
        }
        match repository::config::open(config) {
            Ok(store) => taken.push(store),
            Err(error) => away.push(Away { store: config.name.clone(), reason: chain(&error) }),
        }
    }
    Ok(identified(taken, left_out, away, selection.repository).await)
}

/// Keeps the stores that show one repository's identity.
async fn identified(
    taken: Vec<Arc<dyn ObjectStore>>,
    left_out: Vec<StoreName>,
    mut away: Vec<Away>,
    expected: Option<Uuid>,
) -> Opened {
    let shown = join_all(taken.iter().map(|store| identity::read(store.as_ref()))).await;
    let mut stores: Vec<Arc<dyn ObjectStore>> = Vec::new();
    let mut repository = expected;
    for (store, identity) in taken.into_iter().zip(shown) {
        let reason = match identity {
            Ok(Some(identity)) => {
                let first = *repository.get_or_insert(identity.repository);
                if first == identity.repository {
                    stores.push(store);
                    continue;
                }
                let whose = if expected.is_some() { "expected" } else { "the stores before it belong to" };
                format!("belongs to repository {}, {whose} {first}", identity.repository)
            }
            Ok(None) => "holds no repo.json: it is empty, not mounted, or not a store of pgconvoy".to_owned(),
            Err(error) => chain(&error),
        };
        away.push(Away { store: store.name().clone(), reason });
    }
    let repository = repository.filter(|_| !stores.is_empty());
    Opened { stores, away, left_out, repository }
}

async fn by_coordinator(config: &Config) -> Result<Vec<Arc<dyn ObjectStore>>, CliError> {
    let channel = coordinator::connect(&config.coordinator).await.map_err(|error| {
        error.hint("or list the stores as [[store]] in the configuration or in the file given with --repository")
    })?;
    let mut client = StoreServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut listed = client.list_stores(ListStoresRequest {}).await?.into_inner();
    listed.stores.sort_by_key(|store| store.kind != NEAR_KIND);
    let mut stores: Vec<Arc<dyn ObjectStore>> = Vec::new();
    for store in listed.stores {
        let name: StoreName = store.name.parse().map_err(|source: NameError| {
            CliError::new(Exit::Refused, "the coordinator lists a store of an unusable name").caused_by(source)
        })?;
        stores.push(Arc::new(RemoteStore::new(name, client.clone())));
    }
    Ok(stores)
}

/// The only cluster of a repository.
pub(crate) async fn only_cluster(stores: &[Arc<dyn ObjectStore>]) -> Result<ClusterName, CliError> {
    let unknown = |what: String| CliError::new(Exit::Usage, what).hint("name the cluster with --cluster");
    let mut found = clusters(stores).await?;
    match (found.pop(), found.len()) {
        (Some(only), 0) => Ok(only),
        (Some(last), _) => Err(unknown(format!("the repository holds several clusters, {last} among them"))),
        (None, _) => Err(unknown("the repository holds no cluster".to_owned())),
    }
}

/// All clusters of a repository, in order of their names. One listing a cluster and store; objects are not walked.
pub(crate) async fn clusters(stores: &[Arc<dyn ObjectStore>]) -> Result<Vec<ClusterName>, CliError> {
    let prefix = key::clusters_prefix();
    let mut found = BTreeSet::new();
    for store in stores {
        let mut after: Option<String> = None;
        loop {
            let page = store.list(&prefix, after.as_deref(), FIRST_ONLY).await.map_err(|error| {
                CliError::new(Exit::Store, format!("cannot list the clusters of store {}", store.name()))
                    .caused_by(error)
            })?;
            let Some(entry) = page.objects.first() else { break };
            let Some(name) = entry.key.as_str().strip_prefix(&prefix).and_then(|rest| rest.split('/').next()) else {
                break;
            };
            let name: ClusterName = name.parse().map_err(|source: NameError| {
                CliError::new(Exit::Store, format!("key {} of store {} names no cluster", entry.key, store.name()))
                    .caused_by(source)
            })?;
            after = Some(key::skip(&key::cluster_prefix(&name)));
            found.insert(name);
        }
    }
    Ok(found.into_iter().collect())
}
