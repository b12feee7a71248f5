//! The coordinator on loopback with stores in memory that fail as told.

mod backups;
mod clusters;
mod decisions;
mod nodes;
mod pins;
mod pushes;
mod reading;
mod reconciling;
mod retention;
mod set_back;
mod soundness;
mod waiting;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use jiff::Timestamp;
use postgres_format::SystemIdentifier;
use process::clock::Monotonic;
use proto::archive::archive_service_client::ArchiveServiceClient;
use proto::archive::{PushWalOpen, PushWalRequest, PushWalResponse, StoreState, push_wal_request};
use proto::fleet::fleet_service_client::FleetServiceClient;
use proto::fleet::{Hello, Report, SessionRequest, SessionResponse, session_request, session_response};
use proto::operator::operator_service_client::OperatorServiceClient;
use proto::operator::{CreateClusterRequest, CreateClusterResponse, GetInfoRequest};
use repository::config::Secret;
use repository::key::ObjectKey;
use repository::store::{LIST_LIMIT, ObjectStore, list_all};
use repository::stores::faulty::FaultyStore;
use repository::stores::memory::MemoryStore;
use repository::wal::{self, EncodedWal, Sink, VariantCheck, WalEncoder, WalFacts};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use crate::catalog::{Catalog, CatalogThread};
use crate::config::Policies;
use crate::stores::{Ack, Health, Kind};
use crate::{Coordinator, Setup, server};

/// System identifier of the test cluster.
const SYSTEM: u64 = 7_123_456_789;
/// Patience with stores in tests.
const PATIENCE: Duration = Duration::from_millis(400);
/// States are waited for at most this long.
const DEADLINE: Duration = Duration::from_secs(20);

/// A running coordinator and its stores.
struct Rig {
    coordinator: Arc<Coordinator>,
    address: SocketAddr,
    stores: Vec<Arc<FaultyStore>>,
    server: JoinHandle<()>,
    thread: Option<CatalogThread>,
    directory: tempfile::TempDir,
}

/// Stores in memory with these names.
fn memory(names: &[&str]) -> Vec<Arc<FaultyStore>> {
    let store = |name: &&str| Arc::new(FaultyStore::new(Arc::new(MemoryStore::new(name.parse().unwrap()))));
    names.iter().map(store).collect()
}

impl Rig {
    async fn start(stores: Vec<Arc<FaultyStore>>, ack: Ack) -> Self {
        Self::start_keeping_names(stores, ack, crate::sessions::hold::HOLD).await
    }

    async fn start_keeping_names(stores: Vec<Arc<FaultyStore>>, ack: Ack, name_hold: Duration) -> Self {
        Self::start_with(stores, ack, name_hold, Policies::default()).await
    }

    async fn start_with(stores: Vec<Arc<FaultyStore>>, ack: Ack, name_hold: Duration, retention: Policies) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (catalog, thread, freshness) = Catalog::in_memory().unwrap();
        let setup = Setup {
            stores: stores.iter().map(|store| (Arc::clone(store) as Arc<dyn ObjectStore>, Kind::S3)).collect(),
            ack,
            store_patience: PATIENCE,
            state_directory: directory.path().to_owned(),
            schedules: Vec::new(),
            paces: Default::default(),
            retention,
            name_hold,
        };
        let stop = CancellationToken::new();
        let coordinator = Coordinator::assemble(setup, catalog, freshness, stop.clone()).await.unwrap();
        let listener = server::bind("127.0.0.1:0".parse().unwrap(), None).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = server::serve(Arc::clone(&coordinator), listener, None, stop);
        let server = tokio::spawn(async move { serving.await.unwrap() });
        Self { coordinator, address, stores, server, thread: Some(thread), directory }
    }

    /// A coordinator with two stores and the cluster `main`.
    async fn with_cluster(ack: Ack) -> Self {
        let rig = Self::start(memory(&["repo1", "s3"]), ack).await;
        rig.create("main").await.unwrap();
        rig
    }

    /// Another coordinator with an empty catalog on the same stores.
    async fn reborn(self, ack: Ack) -> Self {
        let stores = self.stores.clone();
        self.end().await;
        Self::start(stores, ack).await
    }

    async fn end(mut self) {
        self.coordinator.stop.cancel();
        self.server.await.unwrap();
        self.coordinator.tracker.close();
        tokio::time::timeout(DEADLINE, self.coordinator.tracker.wait()).await.unwrap();
        drop(self.coordinator);
        drop(self.thread.take());
        drop(self.directory);
    }

    async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    async fn operator(&self) -> OperatorServiceClient<Channel> {
        OperatorServiceClient::new(self.channel().await)
    }

    async fn create(&self, cluster: &str) -> Result<CreateClusterResponse, Status> {
        let request = CreateClusterRequest { cluster: cluster.to_owned(), system_identifier: SYSTEM };
        self.operator().await.create_cluster(request).await.map(tonic::Response::into_inner)
    }

    async fn push(&self, wal: &EncodedWal) -> Result<PushWalResponse, Status> {
        self.push_changed(wal, |_| ()).await
    }

    /// Pushes with an announcement changed at will.
    async fn push_changed(
        &self,
        wal: &EncodedWal,
        change: impl FnOnce(&mut PushWalOpen),
    ) -> Result<PushWalResponse, Status> {
        let mut open = PushWalOpen {
            cluster: wal.header.cluster.to_string(),
            node: wal.header.node.to_string(),
            system_identifier: wal.header.system_identifier.as_u64(),
            wal_file: wal.header.name.to_string(),
            fingerprint: wal.fingerprint.to_string(),
            stored_size: wal.body.len(),
            header_sha256: wal.header_sha256.to_vec().into(),
            in_recovery: wal.header.in_recovery,
            complete: wal.header.complete,
            instance: String::new(),
        };
        change(&mut open);
        let body = match &wal.body {
            repository::store::Body::Memory(bytes) => bytes.clone(),
            repository::store::Body::File { .. } => panic!("test objects are small"),
        };
        let mut messages = vec![push_wal_request::Part::Open(open)];
        messages.extend(body.chunks(700).map(|piece| push_wal_request::Part::Chunk(piece.to_vec().into())));
        let messages = messages.into_iter().map(|part| PushWalRequest { part: Some(part) });
        let mut client = ArchiveServiceClient::new(self.channel().await);
        client.push_wal(stream::iter(messages)).await.map(tonic::Response::into_inner)
    }

    /// The report without what depends on the moment and on connections.
    async fn info(&self) -> serde_json::Value {
        let request = GetInfoRequest { cluster: "main".to_owned() };
        let json = self.operator().await.get_info(request).await.unwrap().into_inner().info_json;
        let mut info: serde_json::Value = serde_json::from_str(&json).unwrap();
        info["generated"] = serde_json::Value::Null;
        info["clusters"][0]["fleet"] = serde_json::Value::Null;
        info
    }

    /// Keys of WAL objects and history files in a store.
    async fn wal_keys(&self, store: usize) -> Vec<ObjectKey> {
        let objects = list_all(&*self.stores[store], "c/main/", 10 * LIST_LIMIT).await.unwrap();
        let wal = |key: &ObjectKey| key.as_str().contains("/wal/") || key.as_str().contains("/history/");
        objects.into_iter().map(|entry| entry.key).filter(wal).collect()
    }

    async fn pass(&self) {
        crate::reconcile::pass(&self.coordinator, crate::reconcile::plan::Scope::Newest).await.unwrap();
    }

    /// What each store lacks by the catalog.
    async fn missing(&self) -> u64 {
        let counts = self.coordinator.catalog.call(|c| crate::catalog::wal::missing_counts(c)).await.unwrap();
        counts.into_iter().map(|(_, count)| count).sum()
    }

    fn health(&self, store: usize) -> Health {
        self.coordinator.stores.all()[store].health()
    }

    /// Connects as a node's agent; answers what it may say and what it hears.
    async fn connect(&self, node: &str, report: Report) -> Agent {
        let agent = self.say_hello(hello(node)).await.unwrap();
        agent.say(session_request::Message::Report(report)).await;
        let cluster = "main".parse().unwrap();
        let node_name = node.parse().unwrap();
        let reported = || self.coordinator.sessions.state(&cluster, &node_name).is_some_and(|s| s.server_reachable);
        wait_until("the report has arrived", async || reported()).await;
        agent
    }

    /// Connects and does not report.
    async fn say_hello(&self, hello: Hello) -> Result<Agent, Status> {
        let (sender, messages) = mpsc::channel(16);
        let hello = SessionRequest { message: Some(session_request::Message::Hello(hello)) };
        sender.send(hello).await.unwrap();
        let mut client = FleetServiceClient::new(self.channel().await);
        let mut heard = client.session(ReceiverStream::new(messages)).await?.into_inner();
        let Some(session_response::Message::Welcome(_)) = heard.message().await.unwrap().unwrap().message else {
            panic!("the first message is no welcome");
        };
        Ok(Agent { sender, heard })
    }
}

/// A scripted agent.
struct Agent {
    sender: mpsc::Sender<SessionRequest>,
    heard: Streaming<SessionResponse>,
}

impl Agent {
    async fn say(&self, message: session_request::Message) {
        self.sender.send(SessionRequest { message: Some(message) }).await.unwrap();
    }

    /// The next message that `wanted` recognises.
    async fn hear<T>(&mut self, wanted: impl Fn(session_response::Message) -> Option<T>) -> T {
        let hearing = async {
            loop {
                let message = self.heard.message().await.unwrap().expect("the session goes on");
                if let Some(found) = message.message.and_then(&wanted) {
                    return found;
                }
            }
        };
        tokio::time::timeout(DEADLINE, hearing).await.expect("the message comes in time")
    }
}

fn hello(node: &str) -> Hello {
    Hello {
        cluster: "main".to_owned(),
        node: node.to_owned(),
        instance: format!("instance of {node}"),
        system_identifier: SYSTEM,
        postgres_major: 15,
        segment_size_bytes: 16 << 20,
        ..Hello::default()
    }
}

fn primary(timeline: u32) -> Report {
    Report { timeline, lsn: 0x300_0000, server_reachable: true, road: "coordinator".to_owned(), ..Report::default() }
}

/// A WAL object as an agent makes it.
pub(crate) fn wal(name: &str, node: &str, content: &str) -> EncodedWal {
    wal_with(name, node, content, |_| ())
}

fn wal_with(name: &str, node: &str, content: &str, change: impl FnOnce(&mut WalFacts)) -> EncodedWal {
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    encoder.push(content.repeat(1000).as_bytes()).unwrap();
    let mut facts = WalFacts {
        cluster: "main".parse().unwrap(),
        system_identifier: SystemIdentifier::new(SYSTEM),
        name: name.parse().unwrap(),
        node: node.parse().unwrap(),
        in_recovery: false,
        complete: true,
        logical_end: None,
        postgres_major: Some(15),
        first_commit_time: None,
        last_commit_time: None,
        written: now(),
    };
    change(&mut facts);
    encoder.finish(facts).unwrap()
}

fn history(timeline: u32, node: &str) -> EncodedWal {
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    encoder.push(b"1\t0/3000000\tno recovery target specified\n").unwrap();
    let name = format!("{timeline:08X}.history");
    let facts = WalFacts {
        cluster: "main".parse().unwrap(),
        system_identifier: SystemIdentifier::new(SYSTEM),
        name: name.parse().unwrap(),
        node: node.parse().unwrap(),
        in_recovery: false,
        complete: true,
        logical_end: None,
        postgres_major: None,
        first_commit_time: None,
        last_commit_time: None,
        written: now(),
    };
    encoder.finish(facts).unwrap()
}

/// As a node does by the direct road.
async fn put_directly(store: &FaultyStore, wal: &EncodedWal) {
    wal::put(store, wal, VariantCheck::List).await.unwrap();
}

pub(crate) fn segment(number: u32) -> String {
    format!("0000000100000000{number:08X}")
}

fn now() -> Timestamp {
    "2026-11-23T03:41:38Z".parse().unwrap()
}

fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

/// The states of the stores in an answer, in order.
fn states(response: &PushWalResponse) -> Vec<StoreState> {
    response.stores.iter().map(|outcome| outcome.state()).collect()
}

async fn wait_until(what: &str, holds: impl AsyncFn() -> bool) {
    let begun = Monotonic::now();
    while !holds().await {
        assert!(begun.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn only_loopback_is_listened_on_without_certificates() {
    let error = server::bind("0.0.0.0:0".parse().unwrap(), None).await.unwrap_err();
    assert!(matches!(error, server::ServerError::Exposed { .. }));
    // The secrets of stores never show.
    assert!(!format!("{:?}", Secret::new("hidden")).contains("hidden"));
}

#[test]
fn of_two_coordinators_in_one_state_directory_the_second_is_refused_before_it_opens_anything() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let config = directory.path().join("coordinator.toml");
    let text = format!(
        "state_directory = \"{}\"\n[[store]]\nname = \"repo1\"\nkind = \"directory\"\npath = \"/srv/none\"\n",
        state.display()
    );
    std::fs::write(&config, text).unwrap();
    let first = crate::lock_state_directory(&state).unwrap();
    let error = crate::run(crate::config::load(&config, now()).unwrap()).unwrap_err();
    assert!(matches!(error, crate::RunError::StateDirectoryTaken { .. }), "{error}");
    assert!(error.to_string().contains(&state.display().to_string()));
    assert_eq!(error.exit(), process::exit::Exit::Config);
    assert!(!state.join(crate::catalog::FILE_NAME).exists());
    drop(first);
    crate::lock_state_directory(&state).unwrap();
}

#[tokio::test]
async fn with_certificates_a_node_speaks_for_itself_only() {
    process::tls::install_provider();
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    std::fs::write(file("ca"), ca.self_signed(&ca_key).unwrap().pem()).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    for name in ["localhost", "a"] {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        std::fs::write(file(name), parameters.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        std::fs::write(file(&format!("{name}.key")), key.serialize_pem()).unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(file(&format!("{name}.key")), private).unwrap();
    }
    let server_files =
        process::tls::ServerTls { certificate: file("localhost"), key: file("localhost.key"), client_ca: file("ca") };
    let client_files = process::tls::ClientTls { certificate: file("a"), key: file("a.key"), ca: file("ca") };
    let plain = Rig::with_cluster(Ack::All).await;
    let stop = CancellationToken::new();
    let listener = server::bind("127.0.0.1:0".parse().unwrap(), Some(&server_files)).await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let (coordinator, stopped) = (Arc::clone(&plain.coordinator), stop.clone());
    let server =
        tokio::spawn(async move { server::serve(coordinator, listener, Some(&server_files), stopped).await.unwrap() });
    let endpoint = Channel::from_shared(url).unwrap();
    let tls = client_files.load(None).unwrap();
    let channel = endpoint.clone().tls_config(tls).unwrap().connect().await.unwrap();
    let publish = |node: &str| proto::archive::PublishBackupRequest {
        cluster: "main".to_owned(),
        node: node.to_owned(),
        ..Default::default()
    };
    let mut client = ArchiveServiceClient::new(channel);
    // The own name passes and fails on the missing backup; another's does not pass.
    assert_eq!(reason(&client.publish_backup(publish("a")).await.unwrap_err()), "FIELD_INVALID");
    assert_eq!(reason(&client.publish_backup(publish("b")).await.unwrap_err()), "NODE_MISMATCH");
    // Without a certificate nobody is heard.
    let ca = tonic::transport::Certificate::from_pem(std::fs::read(file("ca")).unwrap());
    let nameless = tonic::transport::ClientTlsConfig::new().ca_certificate(ca);
    let refused = match endpoint.tls_config(nameless).unwrap().connect().await {
        Err(_) => true,
        Ok(channel) => ArchiveServiceClient::new(channel)
            .publish_backup(publish("a"))
            .await
            .is_err_and(|status| reason(&status).is_empty()),
    };
    assert!(refused);
    drop(client);
    stop.cancel();
    server.await.unwrap();
    plain.end().await;
}

#[tokio::test]
async fn health_and_both_reflections_are_served() {
    let rig = Rig::with_cluster(Ack::All).await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(rig.channel().await);
    let asked = |service: &str| tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
    for service in ["", "pgconvoy.archive.v1.ArchiveService"] {
        let mut found = 0;
        for _ in 0..50 {
            found = health.check(asked(service)).await.unwrap().into_inner().status;
            if found == 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(found, 1, "{service}");
    }
    use tonic_reflection::pb::{v1, v1alpha};
    let request = v1::ServerReflectionRequest {
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(rig.channel().await);
    let mut answers = client.server_reflection_info(stream::iter([request])).await.unwrap().into_inner();
    let text = format!("{:?}", answers.message().await.unwrap());
    assert!(text.contains("pgconvoy.operator.v1.OperatorService") && text.contains("grpc.health.v1.Health"), "{text}");
    let request = v1alpha::ServerReflectionRequest {
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(rig.channel().await);
    let mut answers = client.server_reflection_info(stream::iter([request])).await.unwrap().into_inner();
    assert!(format!("{:?}", answers.message().await.unwrap()).contains("OperatorService"));
    rig.end().await;
}
