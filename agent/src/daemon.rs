//! Connects the rooms of a running agent, starts its tasks, and ends them in order. It decides nothing.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use process::notify::{Pulse, Watchdog};
use process::shutdown::Shutdown;
use process::telemetry::Metrics;
use proto::fleet::Hello;
use repository::store::{ObjectStore, StoreError};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::archive::ship::Roads;
use crate::archive::{Archive, Parts, resend};
use crate::backup::{BackupNode, Backups};
use crate::config::Settings;
use crate::coordinator_link::{self, CoordinatorLink, LinkError};
use crate::desk::LocalDesk;
use crate::direct_store::DirectStore;
use crate::errands::Errands;
use crate::fetch::{Fetcher, Sources};
use crate::metrics::ArchiveMetrics;
use crate::node::DataDirectory;
use crate::orders::{ORDERS_MAX, TOLD_MAX};
use crate::postgres::libpq::Environment;
use crate::postgres::{LocalServer, Server};
use crate::road::DirectRoad;
use crate::road_watch::RoadWatch;
use crate::session::{self, Session};
use crate::socket::{self, Rooms, SocketError};
use crate::spool::{Spool, SpoolError};
use crate::vitals::Vitals;

/// Time for tasks to end after a stop was asked for.
const GRACE: Duration = Duration::from_secs(20);

/// Why an agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The spool cannot be used.
    #[error("the spool cannot be used")]
    Spool(#[from] SpoolError),
    /// The direct store cannot be set up.
    #[error("the direct store cannot be set up")]
    Direct(#[from] StoreError),
    /// The coordinator's connection cannot be set up.
    #[error("the connection to the coordinator cannot be set up")]
    Link(#[from] LinkError),
    /// The socket cannot be served.
    #[error("the local socket cannot be served")]
    Socket(#[from] SocketError),
    /// The threads cannot be started.
    #[error("the reader threads cannot be started")]
    Threads(#[source] std::io::Error),
    /// The metrics endpoint cannot be served.
    #[error("metrics cannot be served on {listen}")]
    Metrics {
        /// Where.
        listen: std::net::SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Runs an agent until it is asked to stop.
///
/// # Errors
/// When it cannot start.
pub async fn run(settings: Settings, shutdown: Shutdown) -> Result<(), DaemonError> {
    let stop = shutdown.token();
    let mut tasks = JoinSet::new();
    let spool = Arc::new(Spool::open(&settings.spool.directory, settings.spool.max_size_bytes)?);
    let data = Arc::new(DataDirectory::new(settings.data_directory.clone()));
    let direct = settings.direct.as_ref().map(repository::config::open).transpose()?;
    let direct = direct.map(|store| Arc::new(DirectStore::new(store, Arc::clone(spool.home()))));
    if let Some(direct) = &direct {
        tasks.spawn(Arc::clone(direct).watch(stop.clone()));
    }
    let direct = direct.map(|direct| direct as Arc<dyn ObjectStore>);
    let channel = settings.coordinator.as_ref().map(coordinator_link::channel).transpose()?;
    let watch = match (&channel, &direct) {
        (None, _) => RoadWatch::direct_only(settings.road),
        (Some(_), Some(_)) => RoadWatch::new(settings.road, DirectRoad::Configured),
        (Some(_), None) => RoadWatch::new(settings.road, DirectRoad::Absent),
    };
    let link = channel.clone().map(|channel| {
        CoordinatorLink::new(channel, settings.cluster.clone(), settings.node.clone(), Arc::clone(&watch))
            .of_instance(spool.instance())
    });
    let roads = Roads::new(link.clone(), direct.clone(), Arc::clone(&watch), Arc::clone(&spool));
    let registry = Metrics::new("pgconvoy-agent", env!("CARGO_PKG_VERSION"));
    let metrics = ArchiveMetrics::register(&registry);
    if let Some(listen) = settings.metrics_listen {
        let listener = tokio::net::TcpListener::bind(listen).await;
        let listener = listener.map_err(|source| DaemonError::Metrics { listen, source })?;
        let stop = stop.clone();
        tasks.spawn(async move {
            if let Err(error) = registry.serve(listener, stop).await {
                tracing::error!(%error, "the metrics endpoint ended");
            }
        });
    }
    let parts = Parts {
        cluster: settings.cluster.clone(),
        node: settings.node.clone(),
        data: Arc::clone(&data),
        roads: roads.clone(),
        settings: settings.archive.clone(),
        metrics: metrics.clone(),
    };
    let archive = Archive::start(parts, stop.clone()).map_err(DaemonError::Threads)?;
    let sources = Arc::new(Sources::new(direct, link.clone()));
    let fetcher = Fetcher::new(
        settings.cluster.clone(),
        Arc::clone(&data),
        Arc::clone(&spool),
        Arc::clone(&sources),
        settings.fetch.clone(),
    );
    let vitals = Vitals::new(Arc::clone(&data), Arc::clone(&archive), roads.clone(), metrics.clone());
    let server: Arc<dyn Server> = Arc::new(LocalServer::new(
        settings.data_directory.clone(),
        settings.postgres.clone(),
        Environment::of_process(),
    ));
    let (told, to_tell) = mpsc::channel(TOLD_MAX);
    let (order, orders) = mpsc::channel(ORDERS_MAX);
    let errands = Arc::new(Errands {
        cluster: settings.cluster.clone(),
        backups: Arc::new(Backups::new(backup_node(&settings, &server))),
        server: Arc::clone(&server),
        data: Arc::clone(&data),
        roads: roads.clone(),
        sources: Arc::clone(&sources),
        channel,
        told,
        running: Mutex::default(),
    });
    let greeting = Arc::new(Mutex::new(None));
    let listener = socket::listen(&settings.socket)?;

    tasks.spawn(Arc::clone(&watch).run(stop.clone()));
    tasks.spawn({
        let vitals = Arc::clone(&vitals);
        Arc::clone(&archive).run(stop.clone(), move |backlog| vitals.set_backlog(backlog))
    });
    tasks.spawn(Arc::clone(&vitals).measure(stop.clone()));
    tasks.spawn(Arc::clone(&vitals).follow_server(Arc::clone(&server), stop.clone()));
    tasks.spawn(resend::follow_road(roads.clone(), metrics, stop.clone()));
    tasks.spawn(Arc::clone(&errands).follow(orders, stop.clone()));
    tasks.spawn({
        let (fetcher, stop) = (Arc::clone(&fetcher), stop.clone());
        async move { fetcher.learn_histories(stop).await }
    });
    if let Some(link) = link {
        tasks.spawn(session::probe(link.clone(), stop.clone()));
        let session = Session {
            hello: hello(&settings, &data, &spool),
            report: {
                let vitals = Arc::clone(&vitals);
                Box::new(move || vitals.report())
            },
            lost: {
                let archive = Arc::clone(&archive);
                Box::new(move |objects| archive.archive_again(objects))
            },
            link,
            roads,
            orders: order,
            told: to_tell,
            greeting: Arc::clone(&greeting),
        };
        tasks.spawn(session.run(stop.clone()));
    }
    let rooms = Arc::new(Rooms {
        archive: Arc::clone(&archive),
        fetcher,
        data,
        desk: Arc::new(LocalDesk { cluster: settings.cluster.clone(), vitals, errands, sources, greeting }),
        push_wait: settings.archive.push_wait,
    });
    tasks.spawn(socket::serve(listener, rooms, stop.clone()));
    if let Some(watchdog) = Watchdog::from_service_manager() {
        tasks.spawn(watchdog.run(stop.clone(), || Pulse::Idle));
    }
    tracing::info!(
        node = %settings.node,
        cluster = %settings.cluster,
        data_directory = %settings.data_directory.display(),
        version = env!("CARGO_PKG_VERSION"),
        "the agent runs"
    );
    process::notify::ready("archiving");
    shutdown.requested().await;
    process::notify::stopping("ending what is under way");
    end(tasks, &archive).await;
    // A socket file left over is replaced at the next start.
    let _ = std::fs::remove_file(&settings.socket);
    tracing::info!("the agent has stopped");
    Ok(())
}

fn backup_node(settings: &Settings, server: &Arc<dyn Server>) -> BackupNode {
    BackupNode {
        server: Arc::clone(server),
        cluster: settings.cluster.clone(),
        node: settings.node.clone(),
        data_directory: settings.data_directory.clone(),
        parallel: settings.backup_parallel,
        bytes_per_second: settings.backup_bytes_per_second,
        pace: Arc::default(),
        compression_level: settings.archive.efforts.calm.compression_level,
        scratch: settings.spool.directory.join("overflow"),
    }
}

/// Who we are, as soon as the data directory says it.
fn hello(
    settings: &Settings,
    data: &Arc<DataDirectory>,
    spool: &Arc<Spool>,
) -> Box<dyn Fn() -> Option<Hello> + Send + Sync> {
    let (data, spool) = (Arc::clone(data), Arc::clone(spool));
    let (cluster, node) = (settings.cluster.to_string(), settings.node.to_string());
    let direct_store = settings.direct.as_ref().map(|direct| direct.name.to_string()).unwrap_or_default();
    let data_directory = settings.data_directory.display().to_string();
    Box::new(move || {
        let facts = data.facts().ok()?;
        Some(Hello {
            knows_lost_wal: true,
            cluster: cluster.clone(),
            node: node.clone(),
            instance: spool.instance().to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            system_identifier: facts.system_identifier.as_u64(),
            postgres_major: facts.postgres_major,
            segment_size_bytes: facts.segment_size.bytes(),
            data_directory: data_directory.clone(),
            direct_store: direct_store.clone(),
            // The session knows.
            in_hand: None,
            compares_pages: true,
            knows_hybrid: true,
            changes_pace: true,
        })
    })
}

/// Waits for all tasks within the grace period; names what did not end.
async fn end(mut tasks: JoinSet<()>, archive: &Arc<Archive>) {
    let all = async {
        archive.finish().await;
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a task of the agent ended badly");
            }
        }
    };
    if tokio::time::timeout(GRACE, all).await.is_err() {
        tracing::warn!(left = tasks.len(), "not everything ended in time; it is left as a crash would leave it");
    }
}
