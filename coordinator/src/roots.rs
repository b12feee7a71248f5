//! Root commits in the stores, by a coordinator that remembers what was there.
//!
//! Every root that the coordinator reads to build on, and every one that it commits, goes through here. The newest that was
//! seen of a cluster in a store is its mark, and the catalog keeps it. Invariants:
//! * where the marked root is gone, the store was *set back*, and nothing is committed there for that cluster: no pin, no
//!   backup, no retention; WAL goes there all the same, because WAL objects are only ever added;
//! * a mark is taken before the store is read and only ever goes forward, so two at work never accuse each other;
//! * that the root is there again, because the right disk was mounted, ends it; so does an operator's word, see
//!   [`crate::acceptance`]: the root that is committed upon it lies above the mark, and no number has two contents.
//!
//! The mark is the one thing in the catalog that the stores cannot tell: a new catalog learns what it finds.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use repository::name::{ClusterName, StoreName};
use repository::root::{self, Mark, Past, Root, RootError, SetBack};
use repository::store::ObjectStore;

use crate::catalog::{Catalog, CatalogResult, marks as rows};
use crate::clusters::root_writer;
use crate::refusal::Refusal;
use crate::stores::Stores;

type Place = (StoreName, ClusterName);

/// What is remembered of all stores. Clones share it.
#[derive(Debug, Clone)]
pub struct Roots {
    catalog: Catalog,
    known: Arc<Mutex<Known>>,
    /// Whether a store was found set back that was not before.
    news: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct Known {
    past: BTreeMap<Place, Past>,
    set_back: BTreeMap<Place, SetBack>,
}

impl Roots {
    /// What the catalog remembers.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn load(catalog: Catalog) -> CatalogResult<Self> {
        let rows = catalog.call(|connection| rows::all(connection)).await?;
        let past = rows.into_iter().map(|row| {
            let past = if row.forgone { Past::Forgone(row.mark) } else { Past::Seen(row.mark) };
            ((row.store, row.cluster), past)
        });
        let known = Known { past: past.collect(), set_back: BTreeMap::new() };
        Ok(Self { catalog, known: Arc::new(Mutex::new(known)), news: Arc::default() })
    }

    /// That a store was set back, as far as a cluster is concerned.
    pub fn set_back(&self, store: &StoreName, cluster: &ClusterName) -> Option<SetBack> {
        self.lock().set_back.get(&(store.clone(), cluster.clone())).cloned()
    }

    /// All of that.
    pub fn all_set_back(&self) -> Vec<SetBack> {
        self.lock().set_back.values().cloned().collect()
    }

    /// Refuses what would be committed nowhere: every store that is there was set back.
    ///
    /// # Errors
    /// [`Refusal::StoreSetBack`], with the first of them.
    pub fn expect_a_store(&self, stores: &Stores, cluster: &ClusterName) -> Result<(), Refusal> {
        let healthy = stores.healthy();
        let set_back: Option<Vec<SetBack>> = healthy.iter().map(|slot| self.set_back(slot.name(), cluster)).collect();
        match set_back.and_then(|all| all.into_iter().next()) {
            Some(first) => Err(first.into()),
            None => Ok(()),
        }
    }

    /// Whether a store was found set back since this was asked last: then it is to be listed as a whole.
    pub fn take_news(&self) -> bool {
        self.news.swap(false, Ordering::Relaxed)
    }

    /// The newest root of a cluster in a store; what is concluded from its mark is to be asked of [`Roots::set_back`].
    ///
    /// # Errors
    /// When the store fails or the root is damaged.
    pub async fn newest(&self, store: &dyn ObjectStore, cluster: &ClusterName) -> Result<Option<Root>, RootError> {
        let past = self.past(store.name(), cluster);
        let (newest, set_back) = root::newest_upon(store, cluster, past).await?;
        match set_back {
            Some(set_back) => self.note_set_back(past, set_back),
            None => self.note_sound(store.name(), cluster, newest.as_ref().map(|(_, mark)| *mark)).await,
        }
        Ok(newest.map(|(root, _)| root))
    }

    /// Commits to a cluster's history in a store, as [`root::commit`] does.
    ///
    /// # Errors
    /// As there, and [`RootError::SetBack`].
    pub async fn commit(
        &self,
        store: &dyn ObjectStore,
        cluster: &ClusterName,
        now: Timestamp,
        edit: impl Fn(&Root) -> Result<Root, RootError>,
    ) -> Result<Root, RootError> {
        self.commit_upon(store, cluster, now, self.past(store.name(), cluster), edit).await
    }

    /// Commits above what was seen there, though that is gone, as an operator accepted. Until it is committed the store is set
    /// back as before.
    ///
    /// # Errors
    /// As [`root::commit`].
    pub async fn commit_over_loss(
        &self,
        store: &dyn ObjectStore,
        cluster: &ClusterName,
        now: Timestamp,
        edit: impl Fn(&Root) -> Result<Root, RootError>,
    ) -> Result<Root, RootError> {
        let past = match self.past(store.name(), cluster) {
            Past::Seen(mark) => Past::Forgone(mark),
            past => past,
        };
        self.commit_upon(store, cluster, now, past, edit).await
    }

    async fn commit_upon(
        &self,
        store: &dyn ObjectStore,
        cluster: &ClusterName,
        now: Timestamp,
        past: Past,
        edit: impl Fn(&Root) -> Result<Root, RootError>,
    ) -> Result<Root, RootError> {
        match root::commit_upon(store, cluster, &root_writer(), now, past, edit).await {
            Ok((root, mark)) => {
                self.note_sound(store.name(), cluster, Some(mark)).await;
                Ok(root)
            }
            Err(RootError::SetBack(set_back)) => {
                self.note_set_back(past, set_back.clone());
                Err(set_back.into())
            }
            Err(error) => Err(error),
        }
    }

    /// A store was begun anew on purpose: whatever was seen under its name is forgone, and the next commit of each cluster
    /// goes above it.
    ///
    /// # Errors
    /// When the catalog fails; what was not forgone until then is not.
    pub async fn forgo_all(&self, store: &StoreName) -> CatalogResult<()> {
        let clusters: Vec<ClusterName> = {
            let known = self.lock();
            known.past.keys().filter(|(named, _)| named == store).map(|(_, cluster)| cluster.clone()).collect()
        };
        for cluster in clusters {
            self.forgo(store, &cluster).await?;
        }
        Ok(())
    }

    async fn forgo(&self, store: &StoreName, cluster: &ClusterName) -> CatalogResult<()> {
        let place = (store.clone(), cluster.clone());
        let (named, of) = place.clone();
        self.catalog.call(move |connection| rows::forgo(connection, &named, &of)).await?;
        let mut known = self.lock();
        if let Some(Past::Seen(mark) | Past::Forgone(mark)) = known.past.get(&place).copied() {
            known.past.insert(place.clone(), Past::Forgone(mark));
        }
        known.set_back.remove(&place);
        Ok(())
    }

    fn past(&self, store: &StoreName, cluster: &ClusterName) -> Past {
        self.lock().past.get(&(store.clone(), cluster.clone())).copied().unwrap_or_default()
    }

    /// A store has what was seen there, and perhaps more.
    async fn note_sound(&self, store: &StoreName, cluster: &ClusterName, newest: Option<Mark>) {
        let place = (store.clone(), cluster.clone());
        let news = {
            let mut known = self.lock();
            if known.set_back.remove(&place).is_some() {
                tracing::info!(%store, %cluster, "the store has again what was seen there");
            }
            let before = known.past.get(&place).copied().unwrap_or_default();
            let news = newest.filter(|newest| match before {
                Past::Unknown => true,
                Past::Seen(mark) | Past::Forgone(mark) => newest.generation > mark.generation,
            });
            if let Some(mark) = news {
                known.past.insert(place.clone(), Past::Seen(mark));
            }
            news
        };
        if let Some(mark) = news {
            let (store, cluster) = place;
            self.catalog.note(move |connection| rows::put(connection, &store, &cluster, &mark)).await;
        }
    }

    /// A store lost what was seen there, unless something else is remembered of it by now.
    fn note_set_back(&self, judged_by: Past, set_back: SetBack) {
        let place = (set_back.store.clone(), set_back.cluster.clone());
        let mut known = self.lock();
        let still = known.past.get(&place).copied().unwrap_or_default();
        if matches!(judged_by, Past::Forgone(_)) || still != judged_by {
            return;
        }
        let text = set_back.to_string();
        let (store, cluster) = place.clone();
        if known.set_back.insert(place, set_back).is_none() {
            drop(known);
            self.news.store(true, Ordering::Relaxed);
            tracing::error!(%store, %cluster, "{text}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
