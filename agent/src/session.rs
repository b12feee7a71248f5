//! The session with the coordinator: who we are, how we are, what we are asked to do.
//!
//! Invariants: one session at a time; a lost one is opened again after a pause that grows to a bound. Nothing waits for the
//! session: without one, WAL is archived all the same. Probes of the road run here, too, because they ask the same party, but
//! on calls of their own, so that a session that hangs does not look like health.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::fleet::{
    Hello, OperationsInHand, Report, SessionRequest, SessionResponse, SwitchWalAsked, Welcome, session_request,
    session_response,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::archive::resend::offer_to_coordinator;
use crate::archive::ship::{Roads, chain};
use crate::coordinator_link::CoordinatorLink;
use crate::orders::{Order, Seen, Told};
use crate::repository_home::take_word;

/// Time between two reports.
const REPORT_EVERY: Duration = Duration::from_secs(3);
/// Time between two probes.
const PROBE_EVERY: Duration = Duration::from_secs(2);
/// Time for the coordinator to welcome us.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages waiting to be sent.
const OUTBOX: usize = 16;
/// First pause before a lost session is opened again.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the data directory cannot be read yet")]
    NoIdentity,
    #[error("the coordinator cannot be reached or refuses the session: {}", .0.message())]
    Status(Box<tonic::Status>),
    #[error("the coordinator did not welcome us")]
    NotWelcome,
    #[error("the coordinator ended the session")]
    Closed,
}

impl From<tonic::Status> for Ended {
    fn from(status: tonic::Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// What the coordinator said when it welcomed us.
#[derive(Clone, Debug, Default)]
pub struct Greeting {
    /// Names of its stores, in its order.
    pub stores: Vec<String>,
    /// Whether it knows the cluster.
    pub cluster_known: bool,
    /// Its version.
    pub version: String,
}

/// Takes up files that are in no store any more, by their names.
pub type TakeLost = Box<dyn Fn(&[String]) + Send + Sync>;

/// What a session needs.
pub struct Session {
    /// The connection.
    pub link: CoordinatorLink,
    /// For copies that a coordinator may have come back without.
    pub roads: Roads,
    /// Says who we are, when that is known.
    pub hello: Box<dyn Fn() -> Option<Hello> + Send + Sync>,
    /// Says how we are.
    pub report: Box<dyn Fn() -> Report + Send + Sync>,
    /// Where files go that are in no store any more.
    pub lost: TakeLost,
    /// Where orders go.
    pub orders: mpsc::Sender<Order>,
    /// What is to be said.
    pub told: mpsc::Receiver<Told>,
    /// What the coordinator said last; shared with whoever asks.
    pub greeting: Arc<Mutex<Option<Greeting>>>,
}

/// Probes the coordinator until `stop`.
pub async fn probe(link: CoordinatorLink, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(PROBE_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = link.probe() => {}
        }
    }
}

impl Session {
    /// Keeps a session open until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut pause = PAUSE_MIN;
        let mut seen = Seen::default();
        let mut last_error = String::new();
        loop {
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.once(&mut seen, &mut pause) => ended,
            };
            let was_open = self.greeting.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            let error = ended.map_or_else(|error| chain(&error), |never| match never {});
            if was_open || error != last_error {
                tracing::info!(error, "no session with the coordinator");
            }
            if !was_open {
                last_error = error;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(PAUSE_MAX),
            }
        }
    }

    /// One session from hello to its end.
    async fn once(&mut self, seen: &mut Seen, pause: &mut Duration) -> Result<std::convert::Infallible, Ended> {
        *self.greeting.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let hello = (self.hello)().ok_or(Ended::NoIdentity)?;
        let in_hand = OperationsInHand { operations: seen.in_hand().cloned().collect() };
        let hello = Hello { in_hand: Some(in_hand), ..hello };
        let (outbox, requests) = mpsc::channel(OUTBOX);
        send(&outbox, session_request::Message::Hello(hello)).await?;
        let mut fleet = self.link.fleet();
        let call = fleet.session(ReceiverStream::new(requests));
        let opened = tokio::time::timeout(WELCOME_TIMEOUT, call).await.map_err(|_| Ended::NotWelcome)?;
        let mut inbox = opened?.into_inner();
        let welcome = tokio::time::timeout(WELCOME_TIMEOUT, welcome(&mut inbox)).await;
        let Welcome { coordinator_version, cluster_known, stores, repository } =
            welcome.map_err(|_| Ended::NotWelcome)??;
        if let Some(repository) = repository {
            take_word(self.roads.spool.home(), &repository);
        }
        tracing::info!(coordinator_version, cluster_known, ?stores, "session with the coordinator");
        let greeting = Greeting { stores, cluster_known, version: coordinator_version };
        *self.greeting.lock().unwrap_or_else(PoisonError::into_inner) = Some(greeting);
        *pause = PAUSE_MIN;
        self.exchange(&mut inbox, &outbox, seen).await
    }

    async fn exchange(
        &mut self,
        inbox: &mut Streaming<SessionResponse>,
        outbox: &mpsc::Sender<SessionRequest>,
        seen: &mut Seen,
    ) -> Result<std::convert::Infallible, Ended> {
        let mut ticks = tokio::time::interval(REPORT_EVERY);
        let offer = offer_to_coordinator(&self.roads, &self.link);
        tokio::pin!(offer);
        let mut offering = true;
        loop {
            tokio::select! {
                message = inbox.message() => {
                    let message = message?.ok_or(Ended::Closed)?.message.ok_or(Ended::Closed)?;
                    match message {
                        session_response::Message::WalLost(lost) => (self.lost)(&lost.objects),
                        message => take(message, seen, &self.orders, &self.roads, outbox).await?,
                    }
                }
                Some(told) = self.told.recv() => {
                    seen.told(&told);
                    send(outbox, wire(told)).await?;
                }
                _ = ticks.tick() => send(outbox, session_request::Message::Report((self.report)())).await?,
                () = &mut offer, if offering => offering = false,
            }
        }
    }
}

async fn welcome(inbox: &mut Streaming<SessionResponse>) -> Result<Welcome, Ended> {
    match inbox.message().await?.and_then(|response| response.message) {
        Some(session_response::Message::Welcome(welcome)) => Ok(welcome),
        Some(_) => Err(Ended::NotWelcome),
        None => Err(Ended::Closed),
    }
}

async fn take(
    message: session_response::Message,
    seen: &mut Seen,
    orders: &mpsc::Sender<Order>,
    roads: &Roads,
    outbox: &mpsc::Sender<SessionRequest>,
) -> Result<(), Ended> {
    match message {
        session_response::Message::Welcome(again) => {
            if let Some(repository) = again.repository {
                take_word(roads.spool.home(), &repository);
            }
            Ok(())
        }
        session_response::Message::WalSpread(spread) => {
            if let Err(error) = roads.spool.release_spread(&spread.objects) {
                tracing::warn!(error = %chain(&error), "a retained copy could not be removed");
            }
            Ok(())
        }
        session_response::Message::WalLost(_) => Ok(()),
        session_response::Message::Order(order) => {
            let Some(order) = seen.admit(order) else { return Ok(()) };
            let operation = order.operation.clone();
            match orders.try_send(order) {
                Ok(()) => Ok(()),
                Err(_) => {
                    let refused = Told::failed(&operation, "this node has too many orders already");
                    seen.told(&refused);
                    send(outbox, wire(refused)).await
                }
            }
        }
    }
}

fn wire(told: Told) -> session_request::Message {
    match told {
        Told::Update(update) => session_request::Message::OrderUpdate(*update),
        Told::SwitchWalAsked { lsn } => session_request::Message::SwitchWalAsked(SwitchWalAsked { lsn }),
    }
}

async fn send(outbox: &mpsc::Sender<SessionRequest>, message: session_request::Message) -> Result<(), Ended> {
    outbox.send(SessionRequest { message: Some(message) }).await.map_err(|_| Ended::Closed)
}
