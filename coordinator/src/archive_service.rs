//! `ArchiveService`: making WAL files and backup objects durable.
//!
//! A WAL file is acknowledged when the stores have it, by the rule of [`crate::stores`]; the catalog's row follows and is
//! found again by listing if it is lost. The pushed object is not decompressed here: its size and its header are checked
//! against the announcement, the rest against the header, and whoever reads it later verifies every byte. Only history files
//! are looked into ([`crate::texts`]).

use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use postgres_format::WalFileName;
use proto::archive::archive_service_server::ArchiveService;
use proto::archive::{
    PinBackupRequest, PinBackupResponse, PublishBackupRequest, PublishBackupResponse, PushWalOpen, PushWalRequest,
    PushWalResponse, PutBackupObjectOpen, PutBackupObjectRequest, PutBackupObjectResponse, StoreOutcome, StoreState,
    push_wal_request, put_backup_object_request,
};
use proto::convert::{FieldError, WalUpload, parsed, sha256};
use repository::backup::{self, BackupError};
use repository::fingerprint::Fingerprint;
use repository::key::{ObjectKey, ParsedKey};
use repository::name::{BackupId, ClusterName, NodeName, StoreName};
use repository::wal::{self, EncodedWal, Stored, VariantCheck, WalError, WalHeader};
use tonic::{Request, Response, Status, Streaming};

use crate::Coordinator;
use crate::catalog::wal::{self as rows, WalFacts, WalObject, WalRow};
use crate::catalog::{seats, senders};
use crate::intake::{Announced, Received};
use crate::peer::Peer;
use crate::refusal::Refusal;
use crate::stores::{Health, NotStored, Spread, chain};
use crate::texts;
use crate::writer::{Line, Sent, Verdict, judge};

/// The service on its coordinator.
#[derive(Debug, Clone)]
pub struct Archive(pub Arc<Coordinator>);

#[tonic::async_trait]
impl ArchiveService for Archive {
    async fn push_wal(&self, request: Request<Streaming<PushWalRequest>>) -> Result<Response<PushWalResponse>, Status> {
        let peer = Peer::of(&request)?;
        match self.push(&peer, request.into_inner()).await {
            Ok(response) => Ok(Response::new(response)),
            Err(refusal) => {
                self.0.metrics.wal_refused.inc();
                tracing::debug!(reason = refusal.reason(), error = %refusal, "a WAL file was refused");
                Err(refusal.into())
            }
        }
    }

    async fn put_backup_object(
        &self,
        request: Request<Streaming<PutBackupObjectRequest>>,
    ) -> Result<Response<PutBackupObjectResponse>, Status> {
        let peer = Peer::of(&request)?;
        Ok(Response::new(self.put_object(&peer, request.into_inner()).await?))
    }

    async fn publish_backup(
        &self,
        request: Request<PublishBackupRequest>,
    ) -> Result<Response<PublishBackupResponse>, Status> {
        let peer = Peer::of(&request)?;
        let request = request.into_inner();
        let node: NodeName = parsed("node", &request.node).map_err(Refusal::from)?;
        peer.expect(&node)?;
        Ok(Response::new(crate::publish::publish(&self.0, request).await?))
    }

    async fn pin_backup(&self, request: Request<PinBackupRequest>) -> Result<Response<PinBackupResponse>, Status> {
        let peer = Peer::of(&request)?;
        let request = request.into_inner();
        let node: NodeName = parsed("node", &request.node).map_err(Refusal::from)?;
        peer.expect(&node)?;
        let cluster: ClusterName = parsed("cluster", &request.cluster).map_err(Refusal::from)?;
        if self.0.clusters.systems_of(&cluster).is_empty() {
            return Err(Refusal::ClusterUnknown { cluster }.into());
        }
        let backup: BackupId = parsed("backup", &request.backup).map_err(Refusal::from)?;
        let attempts =
            request.attempts.iter().map(|attempt| parsed("attempts", attempt)).collect::<Result<Vec<_>, _>>();
        let attempts: Vec<BackupId> = attempts.map_err(Refusal::from)?;
        let stores = crate::pins::take_over(&self.0, &cluster, &node, backup, &attempts).await?;
        Ok(Response::new(PinBackupResponse { stores: stores.iter().map(ToString::to_string).collect() }))
    }
}

/// A WAL upload whose announcement has passed every check that needs no body.
struct Admitted {
    cluster: ClusterName,
    node: NodeName,
    /// Which agent sends it; empty from one of an older version.
    instance: String,
    fingerprint: Fingerprint,
    upload: WalUpload,
    line: Line,
    /// The timeline had no writer before; the claim is taken back if nothing comes of it.
    claimed: bool,
}

impl Archive {
    async fn push(&self, peer: &Peer, mut stream: Streaming<PushWalRequest>) -> Result<PushWalResponse, Refusal> {
        let first = stream.message().await.map_err(broken)?.and_then(|message| message.part);
        let Some(push_wal_request::Part::Open(open)) = first else {
            return Err(Refusal::Protocol("the first message of PushWal must carry `open`"));
        };
        let admitted = self.admit(peer, &open).await?;
        let (size_bytes, announced) =
            (admitted.upload.stored_size_bytes, Announced::Sha256(admitted.upload.header_sha256));
        let result = async {
            let (wal, received) = self.0.intake.receive_wal(size_bytes, announced, wal_chunks(stream)).await?;
            self.store(&admitted, wal, &received).await
        }
        .await;
        if result.is_err() && admitted.claimed {
            self.0.writers.release(&admitted.line);
        }
        result
    }

    /// Identity first: nothing of the body is read before sender, cluster, system identifier and writer are right.
    async fn admit(&self, peer: &Peer, open: &PushWalOpen) -> Result<Admitted, Refusal> {
        let cluster: ClusterName = parsed("cluster", &open.cluster)?;
        let node: NodeName = parsed("node", &open.node)?;
        let fingerprint: Fingerprint = parsed("fingerprint", &open.fingerprint)?;
        let upload = WalUpload::try_from(open)?;
        peer.expect(&node)?;
        let timeline = upload.wal_file.timeline();
        let line = Line { cluster: cluster.clone(), system: upload.system_identifier, timeline };
        self.expect_instance(&line, &node, &open.instance).await?;
        self.expect_cluster(&cluster, &upload)?;
        let instance = open.instance.clone();
        let mut admitted = Admitted { cluster, node, instance, fingerprint, upload, line, claimed: false };
        self.check_writer(&mut admitted).await?;
        Ok(admitted)
    }

    /// The name must be the agent's own, or the agent goes on with a timeline of which it sent the newest: it writes that,
    /// whoever came first after both were away.
    async fn expect_instance(&self, line: &Line, node: &NodeName, instance: &str) -> Result<(), Refusal> {
        if !self.0.sessions.is_stranger(&line.cluster, node, instance) {
            return Ok(());
        }
        let (asked, named, own) = (line.clone(), node.clone(), instance.to_owned());
        let is_writing =
            self.0.catalog.call(move |connection| seats::is_newest_sender(connection, &asked, &named, &own)).await?;
        if is_writing { Ok(()) } else { self.0.sessions.expect_instance(&line.cluster, node, instance) }
    }

    /// A cluster is unknown only if every store could say so; otherwise the node is to take the direct road meanwhile.
    fn expect_cluster(&self, cluster: &ClusterName, upload: &WalUpload) -> Result<(), Refusal> {
        let unread = |health: &Health| matches!(health, Health::Unknown | Health::Lagging { .. });
        let known = self.0.clusters.expect(cluster, upload.system_identifier);
        match (known, self.0.stores.all().iter().find(|slot| unread(&slot.health()))) {
            (Err(refusal @ Refusal::ClusterUnknown { .. }), Some(slot)) => {
                Err(Refusal::NoStore(format!("{refusal}, and store {} is {}", slot.name(), slot.health())))
            }
            (known, _) => known,
        }
    }

    async fn check_writer(&self, admitted: &mut Admitted) -> Result<(), Refusal> {
        let writers = &self.0.writers;
        let state = self.0.sessions.state(&admitted.cluster, &admitted.node);
        let sent = Sent {
            node: &admitted.node,
            name: admitted.upload.wal_file,
            in_recovery: admitted.upload.in_recovery,
            node_timeline: state.filter(|state| !state.in_recovery).and_then(|state| state.timeline),
        };
        let writer = writers.of(&admitted.line).await?;
        match judge(sent, writer.as_ref()) {
            Verdict::Accept => Ok(()),
            Verdict::AcceptAsWriter => {
                let winner = writers.claim(&admitted.line, &admitted.node).await?;
                admitted.claimed = writer.is_none();
                if winner == admitted.node { Ok(()) } else { Err(foreign(admitted, winner)) }
            }
            Verdict::OnlyIfStored { .. } if self.has_moved_on(admitted).await? => Ok(()),
            Verdict::OnlyIfStored { writer } => {
                if self.is_stored(admitted).await {
                    Ok(())
                } else {
                    Err(foreign(admitted, writer))
                }
            }
        }
    }

    /// Whether the node writes a later timeline already, though its report does not say so yet.
    async fn has_moved_on(&self, admitted: &Admitted) -> Result<bool, Refusal> {
        let (cluster, system) = (admitted.cluster.clone(), admitted.upload.system_identifier);
        let lines = self.0.catalog.call(move |connection| senders::openers(connection, &cluster, system)).await?;
        let own = admitted.upload.wal_file.timeline();
        Ok(lines.iter().any(|(timeline, node)| *timeline > own && *node == admitted.node))
    }

    /// Whether some store has exactly this content.
    async fn is_stored(&self, admitted: &Admitted) -> bool {
        let upload = &admitted.upload;
        let key =
            repository::key::wal(&admitted.cluster, upload.system_identifier, &upload.wal_file, &admitted.fingerprint);
        for slot in self.0.stores.readable() {
            let head = tokio::time::timeout(self.0.stores.patience(), slot.store.head(&key)).await;
            if matches!(head, Ok(Ok(Some(_)))) {
                return true;
            }
        }
        false
    }

    async fn store(
        &self,
        admitted: &Admitted,
        wal: EncodedWal,
        received: &Received,
    ) -> Result<PushWalResponse, Refusal> {
        check_header(admitted, &wal.header)?;
        texts::check(&wal).await?;
        let size_bytes = admitted.upload.stored_size_bytes;
        let row = row(&wal.header, size_bytes);
        let encoded = Arc::new(wal);
        let spread = self.0.stores.put_to_all(size_bytes, |store| {
            let (encoded, hold) = (Arc::clone(&encoded), received.keep());
            async move {
                let stored = wal::put(&*store, &encoded, VariantCheck::List).await;
                drop(hold);
                stored
            }
        });
        let spread: Spread<Stored> = spread.await.map_err(|error| self.not_stored(admitted, error))?;
        process::crash_point!("coordinator/after-store-before-catalog");
        self.note(admitted, row, &spread).await;
        Ok(PushWalResponse {
            stores: self.outcomes(&spread.stored.iter().map(|(store, _)| store).collect::<Vec<_>>()),
            already_stored: spread.stored.iter().all(|(_, stored)| *stored == Stored::AlreadyStored),
            repository: self.0.stores.repository().map(|repository| repository.to_string()).unwrap_or_default(),
        })
    }

    async fn note(&self, admitted: &Admitted, row: WalRow, spread: &Spread<Stored>) {
        let size_bytes = row.size_bytes;
        for (store, stored) in &spread.stored {
            if *stored == Stored::New {
                self.0.metrics.count_stored(store, size_bytes);
            }
        }
        let present: Vec<StoreName> = spread.stored.iter().map(|(store, _)| store.clone()).collect();
        let missing = spread.lagging.clone();
        let is_new = spread.stored.iter().any(|(_, stored)| *stored == Stored::New);
        let is_writing = !admitted.upload.in_recovery && !matches!(admitted.upload.wal_file, WalFileName::Partial(_));
        let sender = (is_new && is_writing && !admitted.instance.is_empty())
            .then(|| (admitted.node.clone(), admitted.instance.clone()));
        let noting = self.0.catalog.note(move |connection| {
            rows::note_stored(connection, &row, &present, &missing)?;
            match sender {
                Some((node, instance)) => seats::note_sender(connection, &row.object, &node, &instance),
                None => Ok(()),
            }
        });
        noting.await;
    }

    fn outcomes(&self, stored: &[&StoreName]) -> Vec<StoreOutcome> {
        let outcome = |store: StoreName| {
            let state = if stored.contains(&&store) { StoreState::Stored } else { StoreState::Lagging };
            StoreOutcome { store: store.to_string(), state: state.into() }
        };
        self.0.stores.names().into_iter().map(outcome).collect()
    }

    fn not_stored(&self, admitted: &Admitted, error: NotStored<WalError>) -> Refusal {
        match error {
            NotStored::Full(text) => Refusal::StoreFull(text),
            NotStored::NoStore(text) => Refusal::NoStore(text),
            NotStored::Damaged(text) => Refusal::StoredCopyDamaged(text),
            NotStored::Object(error @ WalError::Conflict { .. }) => {
                self.0.metrics.wal_conflicts.inc();
                let (cluster, name) = (admitted.cluster.clone(), admitted.upload.wal_file);
                tracing::error!(%cluster, %name, node = %admitted.node, error = %chain(&error),
                    "a WAL file came with other content than the stored one; both are kept");
                // The second content lies beside the first now; the catalog learns of it by listing.
                self.0.kick.notify_one();
                Refusal::WalConflict { cluster, name, detail: error.to_string() }
            }
            NotStored::Object(error @ WalError::Malformed(_)) => Refusal::BodyDamaged(chain(&error)),
            NotStored::Object(error) => Refusal::NoStore(chain(&error)),
        }
    }

    async fn put_object(
        &self,
        peer: &Peer,
        mut stream: Streaming<PutBackupObjectRequest>,
    ) -> Result<PutBackupObjectResponse, Refusal> {
        let first = stream.message().await.map_err(broken)?.and_then(|message| message.part);
        let Some(put_backup_object_request::Part::Open(open)) = first else {
            return Err(Refusal::Protocol("the first message of PutBackupObject must carry `open`"));
        };
        let (key, announced) = self.admit_object(peer, &open)?;
        let received = self.0.intake.receive_object(open.stored_size, announced, object_chunks(stream));
        let (sha256, received) = received.await?;
        let spread = self.0.stores.put_to_all(open.stored_size, |store| {
            let (key, received) = (key.clone(), received.clone());
            async move { backup::put(&*store, &key, &received.body(), &sha256).await }
        });
        let spread: Spread<Stored> = spread.await.map_err(|error| match error {
            NotStored::Full(text) => Refusal::StoreFull(text),
            NotStored::NoStore(text) => Refusal::NoStore(text),
            NotStored::Damaged(text) => Refusal::StoredCopyDamaged(text),
            NotStored::Object(BackupError::Conflict { .. }) => Refusal::ObjectConflict { key: key.to_string() },
            NotStored::Object(error) => Refusal::NoStore(chain(&error)),
        })?;
        let stored: Vec<&StoreName> = spread.stored.iter().map(|(store, _)| store).collect();
        Ok(PutBackupObjectResponse { stores: self.outcomes(&stored) })
    }

    fn admit_object(&self, peer: &Peer, open: &PutBackupObjectOpen) -> Result<(ObjectKey, Announced), Refusal> {
        let cluster: ClusterName = parsed("cluster", &open.cluster)?;
        let node: NodeName = parsed("node", &open.node)?;
        peer.expect(&node)?;
        if self.0.clusters.systems_of(&cluster).is_empty() {
            return Err(Refusal::ClusterUnknown { cluster });
        }
        let key: ObjectKey = parsed("key", &open.key)?;
        match key.parsed() {
            Ok(
                ParsedKey::Pack { cluster: named, .. }
                | ParsedKey::Manifest { cluster: named, .. }
                | ParsedKey::Note { cluster: named, .. },
            ) if named == cluster => {}
            _ => {
                return Err(FieldError::new("key", "must be a pack, note or manifest of this cluster's backups").into());
            }
        }
        Ok((key, Announced::Sha256(sha256("stored_sha256", &open.stored_sha256)?)))
    }
}

fn foreign(admitted: &Admitted, writer: NodeName) -> Refusal {
    let (cluster, timeline, node) = (admitted.cluster.clone(), admitted.line.timeline, admitted.node.clone());
    tracing::error!(%cluster, %timeline, %node, %writer, "two nodes write one timeline; the second is refused");
    Refusal::ForeignWriter { cluster, timeline, writer, node }
}

/// The object must say about itself what its sender announced.
fn check_header(admitted: &Admitted, header: &WalHeader) -> Result<(), Refusal> {
    let upload = &admitted.upload;
    let differs = if header.cluster != admitted.cluster {
        "cluster"
    } else if header.system_identifier != upload.system_identifier {
        "system identifier"
    } else if header.name != upload.wal_file {
        "name"
    } else if header.fingerprint() != admitted.fingerprint {
        "fingerprint"
    } else if header.complete != upload.complete {
        "completeness"
    } else {
        return Ok(());
    };
    Err(Refusal::BodyDamaged(format!("the {differs} in its header is not the announced one")))
}

/// The catalog's row of an object with this header.
pub(crate) fn row(header: &WalHeader, size_bytes: u64) -> WalRow {
    WalRow {
        object: WalObject {
            cluster: header.cluster.clone(),
            system_identifier: header.system_identifier,
            name: header.name,
            fingerprint: match header.name {
                WalFileName::History(_) => None,
                _ => Some(header.fingerprint()),
            },
        },
        size_bytes,
        facts: Some(WalFacts {
            node: header.node.clone(),
            in_recovery: header.in_recovery,
            complete: header.complete,
            written: header.written,
        }),
    }
}

fn broken(status: Status) -> Refusal {
    Refusal::Stream(status.message().to_owned())
}

fn wal_chunks(stream: Streaming<PushWalRequest>) -> impl Stream<Item = Result<bytes::Bytes, Refusal>> + Unpin {
    stream.map(|message| match message.map_err(broken)?.part {
        Some(push_wal_request::Part::Chunk(chunk)) => Ok(chunk),
        _ => Err(Refusal::Protocol("after `open`, PushWal takes only `chunk`")),
    })
}

fn object_chunks(
    stream: Streaming<PutBackupObjectRequest>,
) -> impl Stream<Item = Result<bytes::Bytes, Refusal>> + Unpin {
    stream.map(|message| match message.map_err(broken)?.part {
        Some(put_backup_object_request::Part::Chunk(chunk)) => Ok(chunk),
        _ => Err(Refusal::Protocol("after `open`, PutBackupObject takes only `chunk`")),
    })
}
