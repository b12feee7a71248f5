//! A pretended coordinator on a socket, and what a backup's road does when it goes away.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use proto::archive::archive_service_server::{ArchiveService, ArchiveServiceServer};
use proto::archive::{PinBackupResponse, PushWalRequest, PushWalResponse, PutBackupObjectResponse, StoreOutcome};
use repository::stores::memory::MemoryStore;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

use super::*;

/// Takes `left` more objects into its stores, then says what `then` says.
struct Pretended {
    stores: &'static [&'static str],
    left: AtomicUsize,
    then: Code,
    taken: Arc<Mutex<BTreeMap<String, usize>>>,
}

#[tonic::async_trait]
impl ArchiveService for Pretended {
    async fn push_wal(&self, _: Request<Streaming<PushWalRequest>>) -> Result<Response<PushWalResponse>, Status> {
        Err(Status::unimplemented("no WAL here"))
    }

    async fn put_backup_object(
        &self,
        request: Request<Streaming<PutBackupObjectRequest>>,
    ) -> Result<Response<PutBackupObjectResponse>, Status> {
        let mut stream = request.into_inner();
        let (mut key, mut size) = (String::new(), 0);
        while let Some(message) = stream.message().await? {
            match message.part {
                Some(Part::Open(open)) => key = open.key,
                Some(Part::Chunk(chunk)) => size += chunk.len(),
                None => return Err(Status::invalid_argument("an empty message")),
            }
        }
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        left.map_err(|_| Status::new(self.then, "enough"))?;
        self.taken.lock().unwrap().insert(key, size);
        let outcome = |store: &&str| StoreOutcome { store: (*store).to_owned(), state: StoreState::Stored.into() };
        Ok(Response::new(PutBackupObjectResponse { stores: self.stores.iter().map(outcome).collect() }))
    }

    async fn pin_backup(&self, _: Request<PinBackupRequest>) -> Result<Response<PinBackupResponse>, Status> {
        Err(Status::unimplemented("no pins here"))
    }

    async fn publish_backup(
        &self,
        _: Request<PublishBackupRequest>,
    ) -> Result<Response<PublishBackupResponse>, Status> {
        match self.left.load(Ordering::SeqCst) {
            0 => Err(Status::new(self.then, "enough")),
            _ => Ok(Response::new(PublishBackupResponse {
                stores: vec!["repo1".to_owned()],
                lagging: vec!["s3".to_owned()],
                waiting_for: String::new(),
            })),
        }
    }
}

struct Play {
    road: BackupRoad,
    direct: Arc<MemoryStore>,
    taken: Arc<Mutex<BTreeMap<String, usize>>>,
    served: tokio::task::JoinHandle<()>,
}

impl Drop for Play {
    fn drop(&mut self) {
        self.served.abort();
    }
}

async fn play(stores: &'static [&'static str], left: usize, then: Code) -> Play {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let taken = Arc::new(Mutex::new(BTreeMap::new()));
    let service = Pretended { stores, left: AtomicUsize::new(left), then, taken: taken.clone() };
    let server = tonic::transport::Server::builder().add_service(ArchiveServiceServer::new(service));
    let served =
        tokio::spawn(async move { server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() });
    let channel = tonic::transport::Endpoint::from_shared(address).unwrap().connect().await.unwrap();
    let direct = Arc::new(MemoryStore::new("s3".parse().unwrap()));
    let roads = Roads { coordinator: Some(channel.into()), direct: Some(direct.clone()), ..Roads::default() };
    let mut road = BackupRoad::new(roads, "shop".parse().unwrap(), "n1".parse().unwrap()).unwrap();
    road.patience = Duration::from_secs(1);
    Play { road, direct, taken, served }
}

fn backup() -> BackupId {
    "20261123T034138Z-7f3a9c21".parse().unwrap()
}

async fn put(play: &Play, number: u32, bytes: usize) -> Result<(), RoadError> {
    let content = vec![7; bytes];
    let sha256 = repository::digest::sha256(&content);
    let key = repository::key::pack(&"shop".parse().unwrap(), &backup(), number);
    play.road.put(&key, &Body::Memory(Bytes::from(content)), &sha256).await
}

async fn directly(play: &Play) -> usize {
    repository::store::list_all(play.direct.as_ref(), "", 100).await.unwrap().len()
}

#[tokio::test]
async fn objects_go_through_the_coordinator_whole() {
    let play = play(&["repo1", "s3"], 9, Code::Unavailable).await;
    put(&play, 0, 3 << 20).await.unwrap();
    put(&play, 1, 1).await.unwrap();
    assert_eq!(play.taken.lock().unwrap().values().copied().collect::<Vec<_>>(), [3 << 20, 1]);
    assert_eq!((play.road.road(), directly(&play).await), (Road::Coordinator, 0));
    let published = play.road.publish(&backup(), "{}".to_owned(), Duration::from_secs(1)).await.unwrap().unwrap();
    assert_eq!((published.stores.len(), published.lagging.len()), (1, 1));
}

#[tokio::test]
async fn a_coordinator_that_goes_away_is_left_if_the_direct_store_has_all() {
    let play = play(&["repo1", "s3"], 1, Code::Unavailable).await;
    put(&play, 0, 10).await.unwrap();
    put(&play, 1, 10).await.unwrap();
    assert_eq!((play.road.road(), directly(&play).await), (Road::Direct, 1));
    assert!(play.road.publish(&backup(), "{}".to_owned(), Duration::from_secs(1)).await.unwrap().is_none());
}

#[tokio::test]
async fn half_a_backup_in_each_of_two_places_is_none() {
    let play = play(&["repo1"], 1, Code::Unavailable).await;
    put(&play, 0, 10).await.unwrap();
    let error = put(&play, 1, 10).await.unwrap_err();
    assert!(matches!(error, RoadError::Split { .. }), "{error:?}");
}

#[tokio::test]
async fn a_full_repository_diverts_at_once_and_a_refusal_never() {
    let full = play(&["repo1"], 0, Code::ResourceExhausted).await;
    put(&full, 0, 10).await.unwrap();
    assert_eq!((full.road.road(), directly(&full).await), (Road::Direct, 1));
    let refused = play(&["repo1"], 0, Code::FailedPrecondition).await;
    assert!(matches!(put(&refused, 0, 10).await, Err(RoadError::Coordinator { .. })));
    assert_eq!((refused.road.road(), directly(&refused).await), (Road::Coordinator, 0));
}

#[test]
fn without_any_road_no_backup_starts() {
    let road = BackupRoad::new(Roads::default(), "shop".parse().unwrap(), "n1".parse().unwrap());
    assert!(matches!(road, Err(RoadError::NoRoad)));
}
