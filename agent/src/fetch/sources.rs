//! Where fetched files come from: the coordinator's stores, and the one this node reaches by itself.
//!
//! Which stores the coordinator has is asked now and then. That it cannot be asked is remembered for a while, too: where its
//! host is gone without a word each attempt takes seconds, in which the other store could have answered.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use repository::name::StoreName;
use repository::store::ObjectStore;
use tokio::time::Instant;

use crate::coordinator_link::CoordinatorLink;
use crate::remote_store::RemoteStore;

/// How long the list of the coordinator's stores is believed.
const NAMES_FRESH: Duration = Duration::from_secs(10);
/// How long it is believed that the coordinator cannot be asked.
const FAILURE_FRESH: Duration = Duration::from_secs(5);
/// How long an attempt must have taken for that; one that fails at once is cheap to repeat.
const FAILURE_DEAR: Duration = Duration::from_millis(250);

/// Where files come from.
pub struct Sources {
    /// The store this node reaches by itself.
    pub direct: Option<Arc<dyn ObjectStore>>,
    /// The coordinator, whose stores are read through it.
    pub link: Option<CoordinatorLink>,
    known: Mutex<Option<Known>>,
}

/// What the coordinator said of its stores, or why it said nothing.
#[derive(Clone)]
struct Known {
    at: Instant,
    names: Result<Vec<StoreName>, String>,
}

impl Known {
    fn is_fresh(&self) -> bool {
        self.at.elapsed() < if self.names.is_ok() { NAMES_FRESH } else { FAILURE_FRESH }
    }
}

/// The stores to ask, and who should have been asked besides.
pub struct Asked {
    /// The coordinator's stores in its order, then the direct one.
    pub stores: Vec<Arc<dyn ObjectStore>>,
    /// Why others could not be asked.
    pub missing: Vec<String>,
}

impl Sources {
    /// Sources of one agent.
    pub fn new(direct: Option<Arc<dyn ObjectStore>>, link: Option<CoordinatorLink>) -> Self {
        Self { direct, link, known: Mutex::default() }
    }

    /// Who can be asked now.
    pub async fn ask_whom(&self) -> Asked {
        let mut asked = Asked { stores: Vec::new(), missing: Vec::new() };
        if let Some(link) = &self.link {
            match self.names(link).await {
                Ok(names) => {
                    let direct = self.direct.as_ref().map(|direct| direct.name());
                    for name in names.into_iter().filter(|name| Some(name) != direct) {
                        asked.stores.push(Arc::new(RemoteStore::new(name, link.store_service())));
                    }
                }
                Err(error) => asked.missing.push(error),
            }
        }
        asked.stores.extend(self.direct.clone());
        asked
    }

    async fn names(&self, link: &CoordinatorLink) -> Result<Vec<StoreName>, String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(known) = known.filter(Known::is_fresh) {
            return known.names;
        }
        let begun = Instant::now();
        let names = match link.stores().await {
            Ok(stores) => Ok(stores.iter().filter_map(|store| store.name.parse().ok()).collect::<Vec<_>>()),
            Err(error) => Err(error.to_string()),
        };
        let names = names.and_then(|names| match names.is_empty() {
            true => Err("the coordinator names no store".to_owned()),
            false => Ok(names),
        });
        if names.is_ok() || begun.elapsed() >= FAILURE_DEAR {
            let known = Known { at: Instant::now(), names: names.clone() };
            *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::road::DirectRoad;
    use crate::road_watch::RoadWatch;
    use crate::testing::{PATIENCE, link, memory};

    #[tokio::test]
    async fn a_coordinator_that_is_silent_is_not_waited_for_each_time() {
        // It takes connections and never says a word.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let watch = RoadWatch::new(PATIENCE, DirectRoad::Absent);
        let link = link(&silent.local_addr().unwrap().to_string(), &watch);
        let sources = Sources::new(Some(memory("s3")), Some(link));
        let first = sources.ask_whom().await;
        let begun = Instant::now();
        let second = sources.ask_whom().await;
        assert!(begun.elapsed() < FAILURE_DEAR, "{:?}", begun.elapsed());
        for asked in [first, second] {
            assert_eq!((asked.stores.len(), asked.missing.len()), (1, 1));
        }
    }
}
