//! `--check-config`: what a configuration comes to here and now, and what is missing for it to work.
//!
//! The direct store is tried, not believed: a probe object is created, read and listed, and each right that lacks is named.
//! The probe object stays, because nothing of ours deletes.

use bytes::Bytes;
use repository::key;
use repository::store::{ByteRange, ObjectStore, StoreError};

use crate::archive::ship::chain;
use crate::config::Settings;
use crate::coordinator_link::{self, CoordinatorLink};
use crate::node::DataDirectory;
use crate::road::DirectRoad;
use crate::road_watch::RoadWatch;

/// Largest probe object read back, in bytes.
const PROBE_BYTES_MAX: u64 = 4096;

/// One line of the result.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether something must be changed.
    pub is_bad: bool,
    /// What was found.
    pub text: String,
}

fn good(text: impl Into<String>) -> Finding {
    Finding { is_bad: false, text: text.into() }
}

fn bad(text: impl Into<String>) -> Finding {
    Finding { is_bad: true, text: text.into() }
}

/// Checks what can be checked from here.
pub async fn check(settings: &Settings) -> Vec<Finding> {
    let mut findings = vec![data_directory(settings)];
    findings.push(coordinator(settings).await);
    match &settings.direct {
        None => findings.push(good("no direct road: WAL waits in pg_wal while the coordinator is away")),
        Some(config) => match repository::config::open(config) {
            Ok(store) => findings.extend(rights(store.as_ref()).await),
            Err(error) => findings.push(bad(chain(&error))),
        },
    }
    findings
}

fn data_directory(settings: &Settings) -> Finding {
    match DataDirectory::new(settings.data_directory.clone()).facts() {
        Ok(facts) => good(format!(
            "data directory {}: PostgreSQL {}, system identifier {}, WAL segments of {} bytes",
            settings.data_directory.display(),
            facts.postgres_major,
            facts.system_identifier,
            facts.segment_size.bytes()
        )),
        Err(error) => bad(chain(&error)),
    }
}

async fn coordinator(settings: &Settings) -> Finding {
    let Some(coordinator) = &settings.coordinator else {
        return good("no coordinator: WAL goes by the direct road only");
    };
    let channel = match coordinator_link::channel(coordinator) {
        Ok(channel) => channel,
        Err(error) => return bad(chain(&error)),
    };
    let watch = RoadWatch::new(settings.road, DirectRoad::Absent);
    let link = CoordinatorLink::new(channel, settings.cluster.clone(), settings.node.clone(), watch);
    match link.stores().await {
        Ok(stores) => {
            let names: Vec<String> = stores.into_iter().map(|store| store.name).collect();
            good(format!("coordinator {} has the stores {}", coordinator.address, names.join(", ")))
        }
        Err(error) => bad(format!("coordinator {}: {error}", coordinator.address)),
    }
}

/// Which rights a store gives us.
pub async fn rights(store: &dyn ObjectStore) -> Vec<Finding> {
    let name = format!("{}-{}", process::clock::now().as_millisecond(), uuid::Uuid::now_v7().simple());
    let key = key::probe(&name).expect("digits, letters and a dash make a key");
    let content = Bytes::from_static(b"pgconvoy-agent --check-config");
    let put = store.put_new(&key, content.clone().into()).await.map(|_| ());
    let get = match store.get(&key, ByteRange::All).await {
        Ok(stream) => repository::store::collect(stream, PROBE_BYTES_MAX).await.map(|_| ()),
        Err(error) => Err(error),
    };
    let list = store.list(&key::probe_prefix(), None, 1).await.map(|_| ());
    let line = |result: Result<(), StoreError>, right: &str, needed_for: &str| match result {
        Ok(()) => good(format!("store {}: {right}", store.name())),
        Err(StoreError::Denied { .. }) => {
            bad(format!("store {}: no right of {right}, needed for {needed_for}", store.name()))
        }
        // A put that was denied leaves nothing to get; that says nothing about the right.
        Err(StoreError::NotFound { .. }) => {
            good(format!("store {}: {right} (nothing was there to read)", store.name()))
        }
        Err(error) => bad(chain(&error)),
    };
    vec![
        line(put, "PutObject", "push"),
        line(get, "GetObject", "fetch, info, backup, and push of a file that is there already"),
        line(list, "ListBucket", "seeing conflicts at once, fetch, info and backup"),
    ]
}
