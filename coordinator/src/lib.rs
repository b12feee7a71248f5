//! The coordinator: it owns the repository, takes WAL and backups from agents, runs backups through them, and brings what
//! came by the direct road into every store.
//!
//! This file wires the rooms together and holds no decisions: those are in `fleet`, `schedule`, `writer` and
//! `reconcile::plan`, which are pure. Invariants:
//! * the stores are the truth; the catalog is an index that `rebuild` recreates;
//! * nothing in a store is overwritten here, and nothing removed but what a root commit condemned, and bytes that a repair
//!   has proven not to be the object in whose place they lie;
//! * one coordinator uses a state directory at a time: it holds a lock there before it opens anything;
//! * every task is owned by the tracker or by [`run`] and ends with the stop signal.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod acceptance;
pub mod archive_service;
pub mod backups;
pub mod catalog;
pub mod check;
pub mod cli;
pub mod clusters;
pub mod comparison;
pub mod config;
pub mod decisions;
pub mod fleet;
pub mod fleet_service;
pub mod holds;
pub mod hybrid;
pub mod info;
pub mod intake;
pub mod kept;
pub mod lines;
pub mod metrics;
pub mod operations;
pub mod operator_service;
pub mod pace;
pub mod peer;
pub mod pins;
pub mod publish;
pub mod reconcile;
pub mod refusal;
pub mod repair;
pub mod retention;
pub mod roots;
pub mod schedule;
pub mod scrub;
pub mod server;
pub mod sessions;
pub mod soundness;
pub mod store_service;
pub mod stores;
pub mod texts;
pub mod verify;
pub mod waiting;
pub mod writer;

#[cfg(test)]
mod tests;

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use process::clock;
use process::exit::Exit;
use process::notify;
use process::shutdown::Shutdown;
use repository::store::{ObjectStore, StoreError};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::catalog::{Catalog, CatalogError, Freshness, set_aside};
use crate::clusters::Clusters;
use crate::config::{ClusterSchedule, Policies, Settings};
use crate::intake::Intake;
use crate::kept::KeptWal;
use crate::operations::Operations;
use crate::pace::Paces;
use crate::reconcile::lost::LostWal;
use crate::retention::Retention;
use crate::roots::Roots;
use crate::sessions::Sessions;
use crate::soundness::Soundness;
use crate::stores::{HealthWatch, Kind, Stores};
use crate::writer::Writers;

/// Name of the locked file in the state directory.
const LOCK_NAME: &str = "lock";
/// How long calls under way may take to end when the coordinator stops.
const GRACE: Duration = Duration::from_secs(20);
/// Threads that run calls; zstd and SQLite have their own places.
const WORKER_THREADS: usize = 2;
/// Threads for files of directory stores and temporary bodies.
const BLOCKING_THREADS: usize = 64;

/// The parts of a running coordinator.
#[derive(Debug)]
pub struct Coordinator {
    /// The stores.
    pub stores: Stores,
    /// The index.
    pub catalog: Catalog,
    /// Roots of the stores, and the newest that was seen of each.
    pub roots: Roots,
    /// Known clusters.
    pub clusters: Clusters,
    /// Who writes which timeline.
    pub writers: Writers,
    /// Connected agents.
    pub sessions: Sessions,
    /// Long work.
    pub operations: Operations,
    /// Bodies on their way.
    pub intake: Intake,
    /// What is counted.
    pub metrics: metrics::Metrics,
    /// What is known to be wrong in the stores.
    pub soundness: Soundness,
    /// Backup schedules.
    pub schedules: Vec<ClusterSchedule>,
    /// The pace that backups begin with.
    pub paces: Paces,
    /// What is kept, and what came of it.
    pub retention: Retention,
    /// From where each store keeps WAL.
    pub kept: KeptWal,
    /// WAL that is in no store any more.
    pub lost: LostWal,
    /// The roots that first told of finished backups.
    pub firsts: pins::Firsts,
    /// Wakes reconciliation.
    pub kick: Notify,
    /// The next pass lists everything: the catalog was made anew, perhaps while a store was away.
    pub list_all: AtomicBool,
    /// One pass over the stores at a time.
    pub pass: Semaphore,
    /// A directory for manifests being read.
    pub scratch: PathBuf,
    /// The stop signal.
    pub stop: CancellationToken,
    /// Owner of tasks that live as long as the coordinator.
    pub tracker: TaskTracker,
}

/// What a coordinator is made of, besides the catalog.
#[derive(Debug)]
pub struct Setup {
    /// The stores, opened but not spoken to.
    pub stores: Vec<(Arc<dyn ObjectStore>, Kind)>,
    /// When an object counts as archived.
    pub ack: stores::Ack,
    /// How long a store may be silent.
    pub store_patience: Duration,
    /// Where temporary files lie.
    pub state_directory: PathBuf,
    /// Backup schedules.
    pub schedules: Vec<ClusterSchedule>,
    /// The pace that backups begin with.
    pub paces: Paces,
    /// What is kept, by cluster and store.
    pub retention: Policies,
    /// For how long a node's name is kept for an agent that went away; see [`sessions::hold`].
    pub name_hold: Duration,
}

/// Why the coordinator does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The state directory cannot be used.
    #[error("the state directory {} cannot be used", path.display())]
    StateDirectory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another coordinator uses the state directory.
    #[error(
        "another coordinator uses the state directory {}; stop that one first, or give this one a state_directory of its own",
        path.display()
    )]
    StateDirectoryTaken {
        /// The directory.
        path: PathBuf,
    },
    /// The catalog cannot be used.
    #[error("the catalog cannot be used")]
    Catalog(#[source] CatalogError),
    /// The catalog was found damaged while it was used.
    #[error("the catalog is damaged; it was moved aside and the next start rebuilds it from the stores")]
    CatalogDamaged,
    /// A store cannot be opened.
    #[error("a store cannot be opened")]
    Store(#[source] StoreError),
    /// The runtime or the signals cannot be set up.
    #[error("the process cannot be set up")]
    Process(#[source] io::Error),
    /// The metrics cannot be served.
    #[error("metrics cannot be served")]
    Metrics(#[source] io::Error),
    /// The server does not run.
    #[error("the server does not run")]
    Server(#[source] server::ServerError),
}

impl RunError {
    /// The exit code.
    pub fn exit(&self) -> Exit {
        match self {
            Self::StateDirectory { .. } | Self::StateDirectoryTaken { .. } | Self::Catalog(_) | Self::Store(_) => {
                Exit::Config
            }
            Self::Process(_) | Self::CatalogDamaged => Exit::Negative,
            Self::Metrics(_) | Self::Server(_) => Exit::Config,
        }
    }
}

impl Coordinator {
    /// Puts the parts together and asks every store once.
    ///
    /// # Errors
    /// When the state directory or the catalog cannot be used.
    pub async fn assemble(
        setup: Setup,
        catalog: Catalog,
        freshness: Freshness,
        stop: CancellationToken,
    ) -> Result<Arc<Self>, RunError> {
        let path = setup.state_directory.clone();
        let intake = Intake::new(&path).map_err(|source| RunError::StateDirectory { path: path.clone(), source })?;
        let stores = Stores::new(setup.stores, setup.ack, setup.store_patience);
        let remembered = catalog.call(|connection| catalog::clusters::repository(connection)).await;
        stores.settle(remembered.map_err(RunError::Catalog)?).await;
        let names = stores.names();
        catalog
            .call(move |connection| catalog::wal::keep_stores(connection, &names))
            .await
            .map_err(RunError::Catalog)?;
        let roots = Roots::load(catalog.clone()).await.map_err(RunError::Catalog)?;
        let coordinator = Arc::new(Self {
            clusters: Clusters::load(catalog.clone(), roots.clone()).await.map_err(RunError::Catalog)?,
            roots,
            writers: Writers::new(catalog.clone()),
            sessions: Sessions::load(&catalog, setup.name_hold).await.map_err(RunError::Catalog)?,
            operations: Operations::load(catalog.clone()).await.map_err(RunError::Catalog)?,
            metrics: metrics::Metrics::default(),
            soundness: Soundness::load(catalog.clone()).await.map_err(RunError::Catalog)?,
            schedules: setup.schedules,
            paces: setup.paces,
            retention: Retention::new(setup.retention),
            kept: KeptWal::default(),
            lost: LostWal::default(),
            firsts: pins::Firsts::default(),
            kick: Notify::new(),
            list_all: AtomicBool::new(false),
            pass: Semaphore::new(1),
            scratch: path,
            tracker: TaskTracker::new(),
            stores,
            catalog,
            intake,
            stop,
        });
        if freshness == Freshness::New {
            reconcile::fill_new(&coordinator).await.map_err(RunError::Catalog)?;
        } else {
            coordinator.clusters.refresh(&coordinator.stores).await.map_err(RunError::Catalog)?;
            reconcile::take_up_adoptions(&coordinator).await;
        }
        Ok(coordinator)
    }

    /// Starts the loops that work without being called.
    pub fn start_loops(self: &Arc<Self>) {
        self.sessions.open();
        self.tracker.spawn(HealthWatch::new(self.stores.clone()).run(self.stop.clone()));
        self.tracker.spawn(reconcile::run(Arc::clone(self)));
        self.tracker.spawn(reconcile::follow_adoptions(Arc::clone(self)));
        self.tracker.spawn(backups::run(Arc::clone(self)));
        self.tracker.spawn(waiting::run(Arc::clone(self)));
        self.tracker.spawn(retention::run(Arc::clone(self)));
    }
}

/// Takes a state directory for this process. It is given back when the file is closed, also by the process's death.
///
/// # Errors
/// [`RunError::StateDirectoryTaken`] while another one has it, [`RunError::StateDirectory`].
pub fn lock_state_directory(path: &Path) -> Result<File, RunError> {
    let unusable = |source| RunError::StateDirectory { path: path.to_owned(), source };
    std::fs::create_dir_all(path).map_err(unusable)?;
    let lock = File::options().create(true).truncate(false).write(true).open(path.join(LOCK_NAME)).map_err(unusable)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(RunError::StateDirectoryTaken { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(unusable(source)),
    }
}

/// Runs the coordinator until it is told to stop. Blocks.
///
/// # Errors
/// See [`RunError`].
pub fn run(settings: Settings) -> Result<(), RunError> {
    let path = settings.state_directory.clone();
    let _lock = lock_state_directory(&path)?;
    let opened = Catalog::open_or_set_aside(&path, clock::now());
    let (catalog, thread, freshness) = opened.map_err(RunError::Catalog)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .map_err(RunError::Process)?;
    let handle = catalog.clone();
    let result = runtime.block_on(run_until_stopped(settings, catalog, freshness));
    // A store's hung file operation must not keep the process; what it was writing is no finished object.
    runtime.shutdown_background();
    let ended_by = match &result {
        Err(RunError::Catalog(error)) => Some(error),
        _ => None,
    };
    let damaged = handle.is_to_be_set_aside(ended_by);
    drop(handle);
    if result.is_ok() || damaged {
        thread.join();
    }
    if damaged {
        set_aside(&path, clock::now()).map_err(RunError::Catalog)?;
        return Err(RunError::CatalogDamaged);
    }
    result
}

async fn run_until_stopped(settings: Settings, catalog: Catalog, freshness: Freshness) -> Result<(), RunError> {
    let shutdown = Shutdown::on_signals().map_err(RunError::Process)?;
    let listener = server::bind(settings.listen, settings.tls.as_ref()).await.map_err(RunError::Server)?;
    let metrics_listener = match settings.metrics_listen {
        Some(address) => Some(TcpListener::bind(address).await.map_err(RunError::Metrics)?),
        None => None,
    };
    let mut stores = Vec::new();
    for store in &settings.stores {
        stores.push((repository::config::open(store).map_err(RunError::Store)?, config::kind(store)));
    }
    let setup = Setup {
        stores,
        ack: settings.ack,
        store_patience: settings.store_patience,
        state_directory: settings.state_directory.clone(),
        schedules: settings.schedules.clone(),
        paces: settings.paces.clone(),
        retention: settings.retention.clone(),
        name_hold: sessions::hold::HOLD,
    };
    let coordinator = Coordinator::assemble(setup, catalog.clone(), freshness, shutdown.token()).await?;
    if let Some(listener) = metrics_listener {
        let registry = process::telemetry::Metrics::new("pgconvoy-coordinator", env!("CARGO_PKG_VERSION"));
        registry.register(|registry| coordinator.metrics.register(registry));
        let stop = shutdown.token();
        coordinator.tracker.spawn(async move {
            if let Err(error) = registry.serve(listener, stop).await {
                tracing::error!(%error, "metrics are not served any more");
            }
        });
    }
    coordinator.start_loops();
    verify::end_orphans(&coordinator).await;
    let scrub::Settings { schedule, bytes_per_second, source_bytes_per_second } = settings.scrub.clone();
    if bytes_per_second > 0 {
        coordinator.tracker.spawn(scrub::run(Arc::clone(&coordinator), settings.scrub.clone()));
    }
    if source_bytes_per_second > 0 {
        coordinator.tracker.spawn(comparison::run(Arc::clone(&coordinator), schedule, source_bytes_per_second));
    }
    if let Some(watchdog) = notify::Watchdog::from_service_manager() {
        // What may hang, a store, hangs on threads of its own; that the runtime answers is what is vouched for.
        coordinator.tracker.spawn(watchdog.run(shutdown.token(), || notify::Pulse::Idle));
    }
    tracing::info!(listen = %settings.listen, tls = settings.tls.is_some(), version = env!("CARGO_PKG_VERSION"),
        "the coordinator serves");
    notify::ready("serving");
    let serving = server::serve(Arc::clone(&coordinator), listener, settings.tls.as_ref(), shutdown.token());
    let served = tokio::select! {
        served = serving => served,
        () = grace_over(&shutdown) => Ok(()),
        () = stop_when_damaged(&catalog, &shutdown) => Ok(()),
    };
    notify::stopping("draining");
    shutdown.request();
    drain(coordinator).await;
    tracing::info!("the coordinator has stopped");
    if catalog.is_damaged() {
        return Err(RunError::CatalogDamaged);
    }
    served.map_err(RunError::Server)
}

/// Ends the coordinator in order when its catalog turns out to be damaged. Never returns: serving ends by the stop signal.
async fn stop_when_damaged(catalog: &Catalog, shutdown: &Shutdown) {
    catalog.damaged().await;
    shutdown.request();
    std::future::pending().await
}

/// Ends when the coordinator was told to stop and the grace is over: a call that hangs does not keep it.
async fn grace_over(shutdown: &Shutdown) {
    shutdown.requested().await;
    tokio::time::sleep(GRACE).await;
}

async fn drain(coordinator: Arc<Coordinator>) {
    coordinator.tracker.close();
    let ended = async {
        coordinator.tracker.wait().await;
        coordinator.stores.drain().await;
    };
    if tokio::time::timeout(GRACE, ended).await.is_err() {
        tracing::warn!("some work did not end in time; it is no finished object and is done again");
    }
}
