//! For tests: a data directory made of real servers' files, and a coordinator that does what it is told.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use proto::archive::archive_service_server::{ArchiveService, ArchiveServiceServer};
use proto::archive::{
    PinBackupRequest, PinBackupResponse, PublishBackupRequest, PublishBackupResponse, PushWalRequest, PushWalResponse,
    PutBackupObjectRequest, PutBackupObjectResponse, StoreOutcome, StoreState, push_wal_request,
};
use proto::store::store_service_server::{StoreService, StoreServiceServer};
use proto::store::{
    GetObjectRequest, GetObjectResponse, HeadObjectRequest, HeadObjectResponse, Health, ListObjectsRequest,
    ListObjectsResponse, ListStoresRequest, ListStoresResponse, ObjectEntry, Store,
};
use repository::key::ObjectKey;
use repository::store::{Body, ByteRange, ObjectStore};
use repository::stores::memory::MemoryStore;
use repository::wal::{EncodedWal, VariantCheck, WalArrival};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use crate::archive::ship::Roads;
use crate::archive::{Archive, Parts};
use crate::config::ArchiveSettings;
use crate::coordinator_link::CoordinatorChannel;
use crate::coordinator_link::CoordinatorLink;
use crate::metrics::ArchiveMetrics;
use crate::node::DataDirectory;
use crate::pressure::{Effort, Efforts};
use crate::road::{DirectRoad, Patience};
use crate::road_watch::RoadWatch;
use crate::spool::Spool;
use tokio_util::sync::CancellationToken;

/// A whole segment of 1 MiB.
pub(crate) const FULL: &str = "00000001000000000000000B";
/// A segment that ends with a switch.
pub(crate) const SWITCH: &str = "000000010000000000000014";
/// A segment that is not finished.
pub(crate) const INCOMPLETE: &str = "000000010000000000000015";
/// A file made ready for later.
pub(crate) const RECYCLED: &str = "00000001000000000000001A";
/// The history file of the samples.
pub(crate) const HISTORY: &str = "00000002.history";

/// What archiving does in tests.
pub(crate) const EFFORTS: Efforts = Efforts {
    calm: Effort { compression_level: 3, readers: 2 },
    strained: Effort { compression_level: 1, readers: 4 },
};

/// Content of a sample.
pub(crate) fn sample(name: &str) -> Vec<u8> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/postgres-format/samples");
    let path = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            let file = path.file_name().unwrap().to_string_lossy().into_owned();
            file.strip_prefix("15-").is_some_and(|rest| rest.trim_end_matches(".zst").ends_with(name))
                && !(name == "pg_control" && file.contains("standby"))
        })
        .unwrap_or_else(|| panic!("no sample {name}"));
    let bytes = std::fs::read(&path).unwrap();
    if path.extension().is_some_and(|extension| extension == "zst") {
        zstd::decode_all(bytes.as_slice()).unwrap()
    } else {
        bytes
    }
}

/// A data directory and a spool.
pub(crate) struct FakeNode {
    _folder: tempfile::TempDir,
    pub(crate) data: Arc<DataDirectory>,
    pub(crate) spool: Arc<Spool>,
}

impl FakeNode {
    pub(crate) fn new() -> Self {
        Self::with_control("pg_control")
    }

    /// A node whose control file says that it is in recovery.
    pub(crate) fn standby() -> Self {
        Self::with_control("standby-pg_control")
    }

    fn with_control(control: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        std::fs::create_dir_all(data.join("pg_wal/archive_status")).unwrap();
        std::fs::create_dir_all(data.join("global")).unwrap();
        std::fs::write(data.join("PG_VERSION"), "15\n").unwrap();
        std::fs::write(data.join("global/pg_control"), on_first_timeline(sample(control))).unwrap();
        let spool = Arc::new(Spool::open(&folder.path().join("spool"), 64 << 20).unwrap());
        Self { data: Arc::new(DataDirectory::new(data)), spool, _folder: folder }
    }

    /// Puts a sample into `pg_wal`.
    pub(crate) fn wal(&self, name: &str) -> PathBuf {
        let path = self.data.pg_wal().join(name);
        std::fs::write(&path, sample(name)).unwrap();
        path
    }

    /// Flags a file as PostgreSQL does.
    pub(crate) fn ready(&self, name: &str) {
        std::fs::write(self.data.pg_wal().join(format!("archive_status/{name}.ready")), b"").unwrap();
    }

    pub(crate) fn archive(&self, roads: Roads, stop: &CancellationToken) -> Arc<Archive> {
        let parts = Parts {
            cluster: "main".parse().unwrap(),
            node: "db1".parse().unwrap(),
            data: Arc::clone(&self.data),
            roads,
            settings: ArchiveSettings { push_wait: Duration::from_secs(60), efforts: EFFORTS, memory_bytes: 24 << 20 },
            metrics: metrics(),
        };
        Archive::start(parts, stop.clone()).unwrap()
    }
}

/// The sample's last checkpoint moved to timeline 1, where the samples of WAL are from.
fn on_first_timeline(mut control: Vec<u8>) -> Vec<u8> {
    control[48..52].copy_from_slice(&1_u32.to_le_bytes());
    let checksum = crc32c::crc32c(&control[..288]).to_le_bytes();
    control[288..292].copy_from_slice(&checksum);
    control
}

pub(crate) fn metrics() -> ArchiveMetrics {
    ArchiveMetrics::register(&process::telemetry::Metrics::new("test", "0"))
}

pub(crate) fn memory(name: &str) -> Arc<dyn ObjectStore> {
    Arc::new(MemoryStore::new(name.parse().unwrap()))
}

/// A quick road for tests.
pub(crate) const PATIENCE: Patience = Patience {
    connect: Duration::from_millis(400),
    silence: Duration::from_millis(1_500),
    return_after: Duration::from_millis(600),
};

/// What the coordinator does with the next upload.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Takes the bytes and never answers.
    Silence,
    /// Stores and then loses the answer.
    StoreAndLose,
    /// Says no.
    Refuse(Status),
}

/// A serving coordinator; dropping it kills it with all its connections.
pub(crate) struct Served(Option<tokio::runtime::Runtime>);

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A coordinator over memory stores that follows a script, and then simply works.
#[derive(Clone)]
pub(crate) struct Scripted {
    pub(crate) stores: Vec<Arc<dyn ObjectStore>>,
    pub(crate) lagging: Arc<Mutex<Vec<String>>>,
    pub(crate) script: Arc<Mutex<VecDeque<Step>>>,
    pub(crate) received: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    pub(crate) fn new(stores: Vec<Arc<dyn ObjectStore>>) -> Self {
        Self { stores, lagging: Arc::default(), script: Arc::default(), received: Arc::default() }
    }

    pub(crate) fn then(&self, step: Step) {
        self.script.lock().unwrap().push_back(step);
    }

    pub(crate) fn received(&self) -> Vec<String> {
        self.received.lock().unwrap().clone()
    }

    /// Serves on an address, on a runtime of its own so that killing it breaks its connections, too.
    pub(crate) async fn serve(&self, address: &str) -> (String, Served) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let wanted = address.to_owned();
        let bound = runtime.spawn(async move {
            loop {
                if let Ok(listener) = tokio::net::TcpListener::bind(&wanted).await {
                    return listener;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        let listener = bound.await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = Server::builder()
            .add_service(ArchiveServiceServer::new(self.clone()))
            .add_service(StoreServiceServer::new(self.clone()));
        runtime.spawn(async move {
            router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        (address, Served(Some(runtime)))
    }

    fn named(&self, name: &str) -> Result<&Arc<dyn ObjectStore>, Status> {
        self.stores.iter().find(|store| store.name().as_str() == name).ok_or_else(|| Status::not_found("no such store"))
    }
}

pub(crate) fn channel(address: &str) -> CoordinatorChannel {
    Endpoint::from_shared(format!("http://{address}"))
        .unwrap()
        .connect_timeout(Duration::from_millis(300))
        .connect_lazy()
        .into()
}

pub(crate) fn link(address: &str, watch: &Arc<RoadWatch>) -> CoordinatorLink {
    CoordinatorLink::new(channel(address), "main".parse().unwrap(), "db1".parse().unwrap(), Arc::clone(watch))
}

/// Roads over a coordinator and maybe a direct store, with the watch running.
pub(crate) fn roads(
    node: &FakeNode,
    address: &str,
    direct: Option<Arc<dyn ObjectStore>>,
    stop: &CancellationToken,
) -> Roads {
    let configured = if direct.is_some() { DirectRoad::Configured } else { DirectRoad::Absent };
    let watch = RoadWatch::new(PATIENCE, configured);
    tokio::spawn(Arc::clone(&watch).run(stop.clone()));
    Roads::new(Some(link(address, &watch)), direct, watch, Arc::clone(&node.spool))
}

/// Names of the WAL files in a store.
pub(crate) async fn names_in(store: &Arc<dyn ObjectStore>) -> Vec<String> {
    let page = store.list("c/", None, 1000).await.unwrap();
    page.objects
        .iter()
        .filter(|object| object.key.as_str().contains("/wal/") || object.key.as_str().contains("/history/"))
        .map(|object| {
            let last = object.key.as_str().rsplit('/').next().unwrap();
            last.rsplit_once(".s").map_or(last, |(name, _)| name).to_owned()
        })
        .collect()
}

/// Waits for a state, at most ten seconds.
pub(crate) async fn until<T>(mut state: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..500 {
        if let Some(reached) = state().await {
            return reached;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the state was not reached in time");
}

#[tonic::async_trait]
impl ArchiveService for Scripted {
    async fn push_wal(&self, request: Request<Streaming<PushWalRequest>>) -> Result<Response<PushWalResponse>, Status> {
        let mut stream = request.into_inner();
        let Some(push_wal_request::Part::Open(open)) = stream.message().await?.and_then(|message| message.part) else {
            return Err(Status::invalid_argument("no open"));
        };
        let mut body = BytesMut::new();
        while let Some(message) = stream.message().await? {
            match message.part {
                Some(push_wal_request::Part::Chunk(chunk)) => body.extend_from_slice(&chunk),
                _ => return Err(Status::invalid_argument("no chunk")),
            }
        }
        let step = self.script.lock().unwrap().pop_front();
        self.received.lock().unwrap().push(open.wal_file.clone());
        match &step {
            Some(Step::Refuse(status)) => return Err(status.clone()),
            Some(Step::Silence) => std::future::pending().await,
            Some(Step::StoreAndLose) | None => {}
        }
        let body: Bytes = body.freeze();
        assert_eq!(body.len() as u64, open.stored_size);
        let mut arrival = WalArrival::new();
        arrival.push(&body).unwrap();
        let wal = EncodedWal::arrived(arrival.finish().unwrap(), Body::Memory(body));
        assert_eq!(wal.header_sha256[..], open.header_sha256);
        let mut stores = Vec::new();
        for store in &self.stores {
            let name = store.name().to_string();
            let lagging = self.lagging.lock().unwrap().contains(&name);
            if !lagging {
                repository::wal::put(store.as_ref(), &wal, VariantCheck::List)
                    .await
                    .map_err(|error| Status::already_exists(error.to_string()))?;
            }
            let state = if lagging { StoreState::Lagging } else { StoreState::Stored };
            stores.push(StoreOutcome { store: name, state: state.into() });
        }
        if matches!(step, Some(Step::StoreAndLose)) {
            return Err(Status::unavailable("the answer was lost"));
        }
        Ok(Response::new(PushWalResponse { stores, already_stored: false, repository: String::new() }))
    }

    async fn put_backup_object(
        &self,
        _request: Request<Streaming<PutBackupObjectRequest>>,
    ) -> Result<Response<PutBackupObjectResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn pin_backup(&self, _request: Request<PinBackupRequest>) -> Result<Response<PinBackupResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn publish_backup(
        &self,
        _request: Request<PublishBackupRequest>,
    ) -> Result<Response<PublishBackupResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

#[tonic::async_trait]
impl StoreService for Scripted {
    async fn list_stores(&self, _request: Request<ListStoresRequest>) -> Result<Response<ListStoresResponse>, Status> {
        let stores = self
            .stores
            .iter()
            .map(|store| Store {
                name: store.name().to_string(),
                kind: "directory".to_owned(),
                health: Health::Healthy.into(),
                reason: String::new(),
            })
            .collect();
        Ok(Response::new(ListStoresResponse { stores }))
    }

    async fn list_objects(
        &self,
        request: Request<ListObjectsRequest>,
    ) -> Result<Response<ListObjectsResponse>, Status> {
        let request = request.into_inner();
        let after = Some(request.start_after.as_str()).filter(|after| !after.is_empty());
        let page = self.named(&request.store)?.list(&request.prefix, after, request.page_size as usize).await;
        let page = page.map_err(|error| Status::unavailable(error.to_string()))?;
        let objects = page
            .objects
            .into_iter()
            .map(|object| ObjectEntry { key: object.key.as_str().to_owned(), size: object.size })
            .collect();
        Ok(Response::new(ListObjectsResponse { objects, more: page.more }))
    }

    async fn head_object(&self, request: Request<HeadObjectRequest>) -> Result<Response<HeadObjectResponse>, Status> {
        let request = request.into_inner();
        let key = ObjectKey::parse(&request.key).map_err(|_| Status::invalid_argument("key"))?;
        match self.named(&request.store)?.head(&key).await {
            Ok(Some(size)) => Ok(Response::new(HeadObjectResponse { size })),
            Ok(None) => Err(Status::not_found("absent")),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    type GetObjectStream = Pin<Box<dyn Stream<Item = Result<GetObjectResponse, Status>> + Send>>;

    async fn get_object(&self, request: Request<GetObjectRequest>) -> Result<Response<Self::GetObjectStream>, Status> {
        let request = request.into_inner();
        let key = ObjectKey::parse(&request.key).map_err(|_| Status::invalid_argument("key"))?;
        let range = match request.length {
            0 => ByteRange::From { offset: request.offset },
            length => ByteRange::Slice { offset: request.offset, length },
        };
        let stream = self.named(&request.store)?.get(&key, range).await.map_err(|error| match error {
            repository::store::StoreError::NotFound { .. } => Status::not_found("absent"),
            error => Status::unavailable(error.to_string()),
        })?;
        let pieces = futures_util::StreamExt::map(stream, |piece| {
            piece.map(|chunk| GetObjectResponse { chunk }).map_err(|error| Status::unavailable(error.to_string()))
        });
        Ok(Response::new(Box::pin(pieces)))
    }
}
