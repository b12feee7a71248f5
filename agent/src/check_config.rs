//! `--check-config`: what a configuration comes to here and now, and what is missing for it to work.
//!
//! The direct store is tried, not believed: a probe object is created, read and listed, and each right that lacks is named.
//! The probe object stays, because nothing of ours deletes.

mod spool;

use std::path::Path;

use bytes::Bytes;
use repository::identity::{self, IdentityError};
use repository::key;
use repository::store::{ByteRange, ObjectStore, StoreError};
use uuid::Uuid;

use crate::archive::ship::chain;
use crate::config::{CoordinatorSettings, Settings};
use crate::coordinator_link::{self, CoordinatorLink, PushError};
use crate::node::DataDirectory;
use crate::postgres::libpq::Environment;
use crate::postgres::{LocalServer, Server, ServerError};
use crate::repository_home;
use crate::road::DirectRoad;
use crate::road_watch::RoadWatch;
use crate::spool::home_path;

/// Largest probe object read back, in bytes.
const PROBE_BYTES_MAX: u64 = 4096;

/// What a line of the result means for whoever reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// As it should be.
    Good,
    /// To be looked at: it may be meant so.
    Note,
    /// Something must be changed.
    Bad,
}

impl Weight {
    /// How a line begins.
    pub fn word(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Note => "note",
            Self::Bad => "missing",
        }
    }
}

/// One line of the result.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it means.
    pub weight: Weight,
    /// What was found.
    pub text: String,
}

fn good(text: impl Into<String>) -> Finding {
    Finding { weight: Weight::Good, text: text.into() }
}

fn note(text: impl Into<String>) -> Finding {
    Finding { weight: Weight::Note, text: text.into() }
}

fn bad(text: impl Into<String>) -> Finding {
    Finding { weight: Weight::Bad, text: text.into() }
}

/// Checks what can be checked from here.
pub async fn check(settings: &Settings) -> Vec<Finding> {
    let mut findings = Vec::new();
    if rustix::process::geteuid().is_root() {
        let text = "this is said to root; run it as the agent's user to be told of that one's rights and login";
        findings.push(note(text));
    }
    findings.extend([data_directory(settings), server(settings).await, spool::check(settings)]);
    findings.extend(certificate(settings));
    findings.extend(coordinator(settings).await);
    match &settings.direct {
        None => findings.push(good("no direct road: WAL waits in pg_wal while the coordinator is away")),
        Some(config) => match repository::config::open(config) {
            Ok(store) => {
                findings.extend(rights(store.as_ref()).await);
                let home = repository_home::remembered(&home_path(&settings.spool.directory)).ok().flatten();
                findings.extend(repository_of(store.as_ref(), home).await);
            }
            Err(error) => findings.push(bad(chain(&error))),
        },
    }
    findings
}

/// An agent may be there before its data directory, so one that is absent is not wrong yet.
fn data_directory(settings: &Settings) -> Finding {
    let path = &settings.data_directory;
    if !path.exists() && path.parent().is_some_and(Path::is_dir) {
        return note(format!(
            "data directory {} does not exist yet, and the agent waits for it; if it is elsewhere, correct data_directory",
            path.display()
        ));
    }
    match DataDirectory::new(path.clone()).facts() {
        Ok(facts) => good(format!(
            "data directory {}: PostgreSQL {}, system identifier {}, WAL segments of {} bytes",
            path.display(),
            facts.postgres_major,
            facts.system_identifier,
            facts.segment_size.bytes()
        )),
        Err(error) => bad(format!("data_directory is not one that PostgreSQL uses: {}", chain(&error))),
    }
}

/// A server that is down is no fault of the configuration; one that shuts us out, or another directory's, is.
async fn server(settings: &Settings) -> Finding {
    let server =
        LocalServer::new(settings.data_directory.clone(), settings.postgres.clone(), Environment::of_process());
    match server.identity().await {
        Ok(identity) => good(format!("PostgreSQL {} takes the agent's login", identity.major())),
        Err(error @ (ServerError::Unreachable { .. } | ServerError::Timeout { .. })) => {
            note(format!("PostgreSQL cannot be asked now: {}", chain(&error)))
        }
        Err(error @ ServerError::LoginRefused { .. }) if rustix::process::geteuid().is_root() => note(chain(&error)),
        Err(error) => bad(chain(&error)),
    }
}

/// The coordinator knows a node by its certificate.
fn certificate(settings: &Settings) -> Option<Finding> {
    let tls = settings.coordinator.as_ref()?.tls.as_ref()?;
    let (file, node) = (tls.certificate.display(), &settings.node);
    Some(match tls.names() {
        Ok(names) if names.iter().any(|name| name == node.as_str()) => good(format!("certificate {file} names {node}")),
        Ok(names) => bad(format!(
            "certificate {file} names {}, and the coordinator takes from it only what concerns a node of that name; expected \
             {node}, so make a certificate for {node}, or correct node",
            names.join(", ")
        )),
        Err(error) => bad(chain(&error)),
    })
}

async fn coordinator(settings: &Settings) -> Vec<Finding> {
    let Some(coordinator) = &settings.coordinator else {
        return vec![good("no coordinator: WAL goes by the direct road only")];
    };
    let channel = match coordinator_link::channel(coordinator) {
        Ok(channel) => channel,
        Err(error) => return vec![bad(chain(&error))],
    };
    let watch = RoadWatch::new(settings.road, DirectRoad::Absent);
    let link = CoordinatorLink::new(channel, settings.cluster.clone(), settings.node.clone(), watch);
    match link.stores().await {
        Ok(stores) => {
            let names: Vec<String> = stores.into_iter().map(|store| store.name).collect();
            let found = good(format!("coordinator {} has the stores {}", coordinator.address, names.join(", ")));
            std::iter::once(found).chain(direct_name(settings, &names)).collect()
        }
        Err(error) => vec![bad(unanswered(coordinator, &error))],
    }
}

/// Copies are kept and reconciled by the store's name, so both ends must call it the same.
fn direct_name(settings: &Settings, coordinators: &[String]) -> Option<Finding> {
    let direct = &settings.direct.as_ref()?.name;
    Some(match coordinators.iter().any(|name| name == direct.as_str()) {
        true => good(format!("the direct store {direct} is one of the coordinator's")),
        false => bad(format!(
            "the direct store is called {direct}, and the coordinator has no store of that name; expected one of {}, as in \
             its configuration",
            coordinators.join(", ")
        )),
    })
}

fn unanswered(coordinator: &CoordinatorSettings, error: &PushError) -> String {
    let explained = match error {
        PushError::Failed { status } => {
            coordinator.tls.as_ref().and_then(|tls| tls.explain(&coordinator.address, status.as_ref()))
        }
        _ => None,
    };
    match explained {
        Some(explained) => format!("coordinator {}: {explained}", coordinator.address),
        None => format!("coordinator {}: {error}", coordinator.address),
    }
}

/// Before the first `cluster create` no store belongs to a repository; later one that does not is the wrong one.
async fn repository_of(store: &dyn ObjectStore, home: Option<Uuid>) -> Option<Finding> {
    match (identity::read(store).await, home) {
        (Ok(Some(found)), Some(home)) if found.repository != home => Some(bad(format!(
            "store {} belongs to repository {}, and the coordinator had {home} when it was last heard; correct bucket and prefix",
            store.name(),
            found.repository
        ))),
        (Ok(Some(found)), _) => {
            Some(good(format!("store {} belongs to repository {}", store.name(), found.repository)))
        }
        (Ok(None), _) => Some(note(format!(
            "store {} holds no repo.json: run pgconvoy cluster create, or correct bucket and prefix if that was done",
            store.name()
        ))),
        // What is denied or silent stands in the lines about rights.
        (Err(IdentityError::Store(_)), _) => None,
        (Err(error), _) => Some(bad(chain(&error))),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(data: &Path, more: &str) -> Settings {
        let text = format!(
            "node = \"db1\"\ncluster = \"main\"\ndata_directory = \"{}\"\n[coordinator]\naddress = \
             \"http://127.0.0.1:1\"\n{more}",
            data.display()
        );
        crate::config::parse(Path::new("agent.toml"), &text).unwrap()
    }

    const DIRECT: &str = "[direct]\nname = \"s3\"\nbucket = \"b\"\nregion = \"r\"\naccess_key_id = \"a\"\n\
                          secret_access_key = \"s\"\n";

    #[test]
    fn an_absent_data_directory_may_come_and_a_wrong_one_not() {
        let folder = tempfile::tempdir().unwrap();
        let found = |path: &Path| data_directory(&settings(path, ""));
        assert_eq!(found(&folder.path().join("later")).weight, Weight::Note);
        let mistyped = found(&folder.path().join("nowhere/main"));
        assert_eq!(mistyped.weight, Weight::Bad);
        let other = found(folder.path());
        assert!(other.weight == Weight::Bad && other.text.contains("global/pg_control"), "{}", other.text);
    }

    #[test]
    fn the_direct_store_has_the_coordinators_name() {
        let settings = settings(Path::new("/data"), DIRECT);
        let found = |names: [&str; 2]| direct_name(&settings, &names.map(str::to_owned)).unwrap();
        assert_eq!(found(["repo1", "s3"]).weight, Weight::Good);
        let other = found(["repo1", "cloud"]);
        assert!(other.weight == Weight::Bad && other.text.contains("repo1, cloud"), "{}", other.text);
    }

    #[tokio::test]
    async fn a_store_of_another_repository_is_told_when_the_coordinators_is_known() {
        let store = repository::stores::memory::MemoryStore::new("s3".parse().unwrap());
        let found = async |home: Option<u128>| {
            repository_of(&store, home.map(Uuid::from_u128)).await.map(|finding| finding.weight)
        };
        assert_eq!(found(Some(7)).await, Some(Weight::Note));
        let identity = identity::RepositoryIdentity::new(Uuid::from_u128(7), process::clock::now());
        assert_eq!(identity::create(&store, &identity).await.unwrap(), repository::store::Put::Created);
        assert_eq!((found(None).await, found(Some(7)).await), (Some(Weight::Good), Some(Weight::Good)));
        assert_eq!(found(Some(8)).await, Some(Weight::Bad));
    }

    #[test]
    fn a_spool_that_cannot_be_made_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let found = |path: &Path| {
            spool::check(&settings(Path::new("/data"), &format!("[spool]\ndirectory = \"{}\"\n", path.display())))
        };
        let there = found(folder.path());
        assert!(there.weight != Weight::Bad && there.text.contains("exists, on the "), "{}", there.text);
        let later = found(&folder.path().join("a/b"));
        assert!(later.weight != Weight::Bad && later.text.contains("is made"), "{}", later.text);
        std::fs::write(folder.path().join("file"), "").unwrap();
        assert_eq!(found(&folder.path().join("file/spool")).weight, Weight::Bad);
    }
}
