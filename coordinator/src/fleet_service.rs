//! `FleetService`: one session a node, reports up, orders down.
//!
//! A session is an owned task of the server's tracker; it ends with its stream, with the coordinator, or when a newer
//! session of the same spool took its seat. What it says is stored or passed on, decided elsewhere.
//!
//! A node that stays away may complete its backup by itself and is given time. One that comes and does not know what it was
//! given was restarted, or its last word was lost: the operation ends [`IN_HAND_GRACE`] later, so that an order on its way is
//! not taken for lost, and ends well if a store names its backup.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use postgres_format::Lsn;
use process::clock::{self, Monotonic};
use proto::convert::{ServerIdentity, parsed};
use proto::fleet::fleet_service_server::FleetService;
use proto::fleet::{
    AskPrimaryRequest, AskPrimaryResponse, Hello, OrderState, OrderUpdate, SessionRequest, SessionResponse, Welcome,
};
use proto::fleet::{session_request, session_response};
use repository::name::{ClusterName, NodeName};
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use crate::Coordinator;
use crate::catalog::seats::{self, SeatRow};
use crate::operations::{Operation, State};
use crate::peer::Peer;
use crate::refusal::Refusal;
use crate::sessions::{Outbox, Seat};

/// The first message must come within this time.
const HELLO_WAIT: Duration = Duration::from_secs(10);
/// A session silent for longer is ended; agents report every few seconds.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long an operation may still be heard of that an agent did not name when it connected.
const IN_HAND_GRACE: Duration = Duration::from_secs(5);
/// How long a primary may take to switch WAL for a standby.
const SWITCH_WAIT: Duration = Duration::from_secs(30);

/// The service on its coordinator.
#[derive(Debug, Clone)]
pub struct Fleet(pub Arc<Coordinator>);

#[tonic::async_trait]
impl FleetService for Fleet {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<SessionResponse, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let peer = Peer::of(&request)?;
        let mut stream = request.into_inner();
        let first = tokio::time::timeout(HELLO_WAIT, stream.message()).await;
        let first = first.map_err(|_| Refusal::Silence(HELLO_WAIT.as_secs()))?;
        let Some(session_request::Message::Hello(hello)) = first?.and_then(|message| message.message) else {
            return Err(Refusal::Protocol("the first message of Session must carry `hello`").into());
        };
        let in_hand = hello.in_hand.clone();
        let (instance, data_directory) = (hello.instance.clone(), hello.data_directory.clone());
        let (seat, outbox) = self.seat(&peer, hello)?;
        if let Some(in_hand) = in_hand {
            self.0.tracker.spawn(end_lost(Arc::clone(&self.0), seat.clone(), in_hand.operations));
        }
        let repository = self.0.stores.follow_repository();
        let greeting = SessionResponse { message: Some(welcome(&self.0, &seat)) };
        let greeting = futures_util::stream::iter([Ok(greeting)]);
        self.0.tracker.spawn(listen(Arc::clone(&self.0), seat.clone(), stream, repository));
        self.0.tracker.spawn(tell_spread(Arc::clone(&self.0), seat.cluster().clone()));
        let (cluster, node) = (seat.cluster().clone(), seat.node().clone());
        let row = SeatRow { cluster, node, instance, data_directory };
        self.0.catalog.note(move |connection| seats::put(connection, &row)).await;
        Ok(Response::new(greeting.chain(ReceiverStream::new(outbox)).boxed()))
    }

    async fn ask_primary(&self, request: Request<AskPrimaryRequest>) -> Result<Response<AskPrimaryResponse>, Status> {
        let peer = Peer::of(&request)?;
        Ok(Response::new(crate::hybrid::ask_primary(&self.0, &peer, request.into_inner()).await?))
    }
}

impl Fleet {
    fn seat(&self, peer: &Peer, hello: Hello) -> Result<(Seat, Outbox), Refusal> {
        let cluster: ClusterName = parsed("cluster", &hello.cluster)?;
        let node: NodeName = parsed("node", &hello.node)?;
        peer.expect(&node)?;
        let server = ServerIdentity::try_from(&hello)?;
        if !self.0.clusters.systems_of(&cluster).is_empty() {
            self.0.clusters.expect(&cluster, server.system_identifier)?;
        }
        let version = hello.agent_version.clone();
        let (seat, outbox) = self.0.sessions.enter(&cluster, &node, hello, server, clock::now())?;
        tracing::info!(%cluster, %node, version, "an agent connected");
        self.0.kick.notify_one();
        Ok((seat, outbox))
    }
}

fn welcome(coordinator: &Coordinator, seat: &Seat) -> session_response::Message {
    session_response::Message::Welcome(Welcome {
        coordinator_version: env!("CARGO_PKG_VERSION").to_owned(),
        cluster_known: !coordinator.clusters.systems_of(seat.cluster()).is_empty(),
        stores: coordinator.stores.names().iter().map(ToString::to_string).collect(),
        repository: Some(coordinator.stores.repository().map(|found| found.to_string()).unwrap_or_default()),
    })
}

/// Ends operations that were given to a node and that its agent does not know any more.
async fn end_lost(coordinator: Arc<Coordinator>, seat: Seat, in_hand: Vec<String>) {
    let connected = Monotonic::now();
    let given = coordinator.operations.given_to(seat.cluster(), seat.node());
    let lost: Vec<String> =
        given.into_iter().map(|operation| operation.id).filter(|id| !in_hand.contains(id)).collect();
    if lost.is_empty() {
        return;
    }
    tokio::select! {
        () = coordinator.stop.cancelled() => return,
        () = tokio::time::sleep(IN_HAND_GRACE) => {}
    }
    // Without its seat the node is away again; when it comes back it says anew what it has in hand.
    if !coordinator.sessions.is_seated(&seat) {
        return;
    }
    if let Err(error) = crate::reconcile::note_backups(&coordinator, seat.cluster()).await {
        tracing::error!(%error, cluster = %seat.cluster(), "the catalog did not take which backups there are");
    }
    crate::waiting::look_at(&coordinator, seat.cluster(), &lost).await;
    for id in lost {
        let why = format!("the agent of node {} was restarted and does not know the operation any more", seat.node());
        if coordinator.operations.fail_unless_heard(&id, connected, why, clock::now()).await {
            coordinator.metrics.count_ended("failed");
        }
    }
}

/// Tells a node that has just connected which files are in every store, so that it may drop its copies, and which are in none.
async fn tell_spread(coordinator: Arc<Coordinator>, cluster: ClusterName) {
    if let Err(error) = crate::reconcile::tell_newest_spread(&coordinator, &cluster).await {
        tracing::error!(%error, %cluster, "the catalog did not say which files are in every store");
    }
    crate::reconcile::lost::ask_agents(&coordinator, &cluster);
}

/// Reads a session until it ends.
async fn listen(
    coordinator: Arc<Coordinator>,
    seat: Seat,
    mut stream: Streaming<SessionRequest>,
    mut repository: watch::Receiver<Option<Uuid>>,
) {
    let why = loop {
        let next = tokio::select! {
            () = coordinator.stop.cancelled() => break "the coordinator is stopping",
            // The sender lives as long as the coordinator.
            Ok(()) = repository.changed() => {
                let again = welcome(&coordinator, &seat);
                if coordinator.sessions.send(seat.cluster(), seat.node(), again).is_err() {
                    break "the agent does not take its messages";
                }
                continue;
            }
            next = tokio::time::timeout(SILENCE_MAX, stream.message()) => next,
        };
        match next {
            Err(_) => break "the agent was silent",
            Ok(Err(_)) => break "the connection broke",
            Ok(Ok(None)) => break "the agent left",
            Ok(Ok(Some(_))) if !coordinator.sessions.is_seated(&seat) => break "a newer session took over",
            Ok(Ok(Some(message))) => take(&coordinator, &seat, message).await,
        }
    };
    coordinator.sessions.leave(&seat);
    tracing::info!(cluster = %seat.cluster(), node = %seat.node(), why, "an agent's session ended");
}

async fn take(coordinator: &Arc<Coordinator>, seat: &Seat, message: SessionRequest) {
    match message.message {
        Some(session_request::Message::Report(report)) => coordinator.sessions.report(seat, report, clock::now()),
        Some(session_request::Message::OrderUpdate(update)) => {
            if let Some(update) = coordinator.sessions.answer(update) {
                note_update(coordinator, update).await;
            }
        }
        Some(session_request::Message::SwitchWalAsked(asked)) => {
            let (coordinator_too, cluster) = (Arc::clone(coordinator), seat.cluster().clone());
            coordinator.tracker.spawn(forward_switch(coordinator_too, cluster, Lsn::new(asked.lsn)));
        }
        Some(session_request::Message::Hello(_)) | None => {
            tracing::debug!(node = %seat.node(), "a session message without meaning was left out");
        }
    }
}

/// A standby wants WAL up to an LSN archived: the primary is asked to switch.
async fn forward_switch(coordinator: Arc<Coordinator>, cluster: ClusterName, past: Lsn) {
    match coordinator.sessions.switch_wal(&cluster, past, SWITCH_WAIT, clock::now()).await {
        Ok(switched) => {
            tracing::info!(%cluster, node = %switched.node, lsn = %switched.lsn, "the primary switched WAL for a standby");
        }
        // The standby asks again until its backup has what it needs or gives up.
        Err(error) => tracing::info!(%cluster, %error, "the primary could not be asked to switch WAL"),
    }
}

/// What a backup builds on goes with the reason of its operation, once.
fn note_built_on(operation: &mut Operation, built_on: &str) {
    if !built_on.is_empty() && !operation.reason.ends_with(built_on) {
        operation.reason = format!("{}; {built_on}", operation.reason);
    }
}

/// PURE: how an operation that is done is shown. A comparison that found nothing to compare says why.
fn last_word(kind: &str, step: String) -> String {
    if kind == crate::comparison::KIND && !step.is_empty() { step } else { "done".to_owned() }
}

/// How an operation goes.
async fn note_update(coordinator: &Coordinator, update: OrderUpdate) {
    let id = update.operation.clone();
    let now = clock::now();
    let known = match update.state() {
        OrderState::Running | OrderState::Unspecified => {
            coordinator
                .operations
                .update(&id, |operation| {
                    if operation.state == State::Running {
                        note_built_on(operation, &update.built_on);
                        operation.step = update.step;
                        operation.bytes_done = update.bytes_done;
                        operation.bytes_total = update.bytes_total;
                    }
                })
                .await
        }
        OrderState::Done if !update.waiting_for.is_empty() => {
            let waits = coordinator
                .operations
                .update(&id, |operation| {
                    note_built_on(operation, &update.built_on);
                    operation.bytes_done = operation.bytes_done.max(update.bytes_done);
                    operation.bytes_total = operation.bytes_total.max(update.bytes_total);
                })
                .await;
            // Which WAL that is, and when it has come, is found in the stores.
            if let Some(operation) = &waits {
                crate::waiting::note(coordinator, operation, update.waiting_for, now).await;
            }
            waits
        }
        OrderState::Done if !update.report_json.is_empty() => {
            crate::comparison::conclude(coordinator, &id, update.report_json).await;
            return;
        }
        OrderState::Done => {
            let known = coordinator
                .operations
                .update(&id, |operation| {
                    note_built_on(operation, &update.built_on);
                    operation.bytes_done = operation.bytes_done.max(update.bytes_done);
                    operation.bytes_total = operation.bytes_total.max(update.bytes_total);
                })
                .await;
            coordinator.metrics.count_ended("done");
            let kind = known.map(|operation| operation.kind).unwrap_or_default();
            coordinator.operations.complete(&id, last_word(&kind, update.step), now).await
        }
        OrderState::Failed => {
            coordinator.metrics.count_ended("failed");
            let failed = coordinator.operations.fail(&id, update.error, now).await;
            let given_up = failed.as_ref().filter(|_| !update.kept);
            if let Some((cluster, backup)) = given_up.and_then(|failed| Some((&failed.cluster, failed.backup?))) {
                crate::pins::give_up(coordinator, cluster, backup).await;
            }
            failed
        }
    };
    if known.is_none() {
        tracing::debug!(operation = id, "an update about an operation that is not known was left out");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_comparison_ends_with_a_word_of_its_node() {
        let word = |kind, step: &str| last_word(kind, step.to_owned());
        assert_eq!(word(crate::comparison::KIND, "nothing to compare with"), "nothing to compare with");
        assert_eq!(word(crate::comparison::KIND, ""), "done");
        assert_eq!(word("backup", "publishing"), "done");
    }
}
