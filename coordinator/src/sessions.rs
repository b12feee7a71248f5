//! The agents that are connected, what they last said, and the way to give them orders.
//!
//! An entry stays after its session ended, so that people see when a node was last heard. An order goes into a bounded
//! queue of its session; a full queue means a hung agent and is an error, not a wait.
//!
//! A node name belongs to the agent whose session lives. Another one under the same name, such as that of a cloned host,
//! has a spool of its own and is told by it; it gets no session and may not push until the first one has been gone for a
//! while, see [`hold`]. Pushing is judged by the archive service: who sent the newest WAL of a timeline may go on with it.

pub mod hold;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use postgres_format::Lsn;
use process::clock::Monotonic;
use proto::convert::{ServerIdentity, place};
use proto::fleet::{self, Hello, Order, OrderState, OrderUpdate, Report, SessionResponse, order, session_response};
use repository::name::{ClusterName, NodeName};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;

use crate::catalog::{Catalog, CatalogError, seats};
use crate::fleet as roles;
use crate::fleet::{Heard, NodeState};
use crate::operations::identifier;
use crate::refusal::Refusal;
use hold::{HOLD, Holder, Standing};

/// Messages that may wait for one agent.
const QUEUE_LIMIT: usize = 64;
/// Nodes remembered.
const NODES_LIMIT: usize = 10_000;
/// Orders that somebody waits for the end of.
const QUESTIONS_LIMIT: usize = 1024;
/// How long a node that has just connected may take for its first report.
pub const FIRST_REPORT_WAIT: Duration = Duration::from_secs(5);

/// Messages on their way to an agent.
pub type Outbox = mpsc::Receiver<Result<SessionResponse, Status>>;

/// What is known of one node.
#[derive(Debug, Clone)]
pub struct NodeView {
    /// Fleet name of its cluster.
    pub cluster: ClusterName,
    /// Its name.
    pub node: NodeName,
    /// What it said first.
    pub hello: Hello,
    /// What its server is.
    pub server: ServerIdentity,
    /// What it last reported.
    pub report: Option<Report>,
    /// How long ago it was heard.
    pub silence: Duration,
    /// When it was last heard.
    pub seen: Timestamp,
    /// Whether it is connected.
    pub connected: bool,
    /// When it said how it is.
    pub heard: Heard,
    /// How long ago another agent under its name was refused last.
    pub rival: Option<Duration>,
}

impl NodeView {
    /// The part that decides about roles.
    pub fn state(&self) -> NodeState {
        let report = self.report.clone().unwrap_or_default();
        let (timeline, lsn) = place(&report);
        NodeState {
            node: self.node.clone(),
            heard: self.heard,
            server_reachable: report.server_reachable,
            server_problem: report.server_problem,
            in_recovery: report.in_recovery,
            timeline,
            lsn,
            foreign_to: None,
            full_page_writes: report.full_page_writes,
            knows_hybrid: self.hello.knows_hybrid,
        }
    }
}

/// A session's place in the table; it is given back with [`Sessions::leave`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Seat {
    cluster: ClusterName,
    node: NodeName,
    number: u64,
}

impl Seat {
    /// Fleet name of the cluster.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// The node.
    pub fn node(&self) -> &NodeName {
        &self.node
    }
}

/// How a switch of WAL went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switched {
    /// The node that switched.
    pub node: NodeName,
    /// The last WAL file that must be archived.
    pub wal_file: String,
    /// WAL up to here is in it.
    pub lsn: Lsn,
}

struct Entry {
    hello: Hello,
    server: ServerIdentity,
    /// The last report and when it came.
    report: Option<(Report, Monotonic)>,
    entered: Monotonic,
    heard: Monotonic,
    seen: Timestamp,
    session: Option<(u64, mpsc::Sender<Result<SessionResponse, Status>>)>,
    /// When its session ended, or it was last heard of without one.
    left: Option<Monotonic>,
}

/// Another agent that came under a name that is not free.
struct Rival {
    instance: String,
    refused: Monotonic,
}

impl Entry {
    fn is_alive(&self) -> bool {
        self.session.as_ref().is_some_and(|(_, sender)| !sender.is_closed())
    }

    fn when_heard(&self) -> Heard {
        if !self.is_alive() {
            return Heard::Gone(self.heard.elapsed());
        }
        match &self.report {
            // What was said on an earlier session holds for as long as it would have held on that one.
            Some((_, came)) if *came >= self.entered || came.elapsed() <= roles::REPORT_AGE_MAX => {
                Heard::Ago(came.elapsed())
            }
            _ => Heard::NotYet,
        }
    }

    fn holder(&self) -> Holder {
        Holder {
            instance: self.hello.instance.clone(),
            data_directory: self.hello.data_directory.clone(),
            away_since: (!self.is_alive()).then(|| self.left.unwrap_or(self.heard)),
        }
    }
}

struct Table {
    nodes: BTreeMap<(ClusterName, NodeName), Entry>,
    /// Who had a name before the coordinator started, and has not come again.
    before: HashMap<(ClusterName, NodeName), Holder>,
    /// Other agents that came under a name and were refused.
    rivals: HashMap<(ClusterName, NodeName), Rival>,
    hold: Duration,
    /// Orders that somebody waits for the end of.
    questions: HashMap<String, oneshot::Sender<OrderUpdate>>,
    next_number: u64,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            nodes: BTreeMap::new(),
            before: HashMap::new(),
            rivals: HashMap::new(),
            hold: HOLD,
            questions: HashMap::new(),
            next_number: 0,
        }
    }
}

impl Table {
    fn holder(&self, place: &(ClusterName, NodeName)) -> Option<Holder> {
        self.nodes.get(place).map(Entry::holder).or_else(|| self.before.get(place).cloned())
    }

    fn standing(&self, place: &(ClusterName, NodeName), instance: &str) -> Standing {
        let holder = self.holder(place);
        holder.map_or(Standing::Free, |holder| holder.standing_of(instance, self.hold, Monotonic::now()))
    }

    /// Refuses another agent under a node's name, and says so once an agent.
    fn expect(&mut self, place: &(ClusterName, NodeName), instance: &str) -> Result<(), Refusal> {
        let Some(holder) = self.holder(place) else { return Ok(()) };
        let standing = holder.standing_of(instance, self.hold, Monotonic::now());
        if standing == Standing::Free {
            return Ok(());
        }
        let (cluster, node) = place;
        let rival = Rival { instance: instance.to_owned(), refused: Monotonic::now() };
        let earlier = self.rivals.insert(place.clone(), rival);
        let is_new = earlier.is_none_or(|rival| rival.instance != instance);
        let (node_name, data_directory) = (node.clone(), holder.data_directory);
        match standing {
            Standing::Kept(left) => {
                if is_new {
                    tracing::warn!(%cluster, %node, kept_for = holder.instance, refused = instance,
                        free_in_seconds = left.as_secs_f64().ceil(),
                        "an agent comes under a node name that is kept for another one, and gets in if that one stays away");
                }
                Err(Refusal::NodeKept { node: node_name, data_directory, left })
            }
            _ => {
                if is_new {
                    tracing::error!(%cluster, %node, connected = holder.instance, refused = instance,
                        "two agents come under one node name; the one that came later is refused");
                }
                Err(Refusal::NodeTaken { node: node_name, data_directory })
            }
        }
    }

    /// The name's holder is there, though without a session: the name is kept for it from now on.
    fn renew_hold(&mut self, place: &(ClusterName, NodeName), instance: &str) {
        let now = Some(Monotonic::now());
        match (self.nodes.get_mut(place), self.before.get_mut(place)) {
            (Some(entry), _) if entry.hello.instance == instance && !entry.is_alive() => entry.left = now,
            (None, Some(holder)) if holder.instance == instance => holder.away_since = now,
            _ => {}
        }
    }
}

/// All sessions. Clones share them.
#[derive(Clone, Default)]
pub struct Sessions {
    table: Arc<Mutex<Table>>,
    /// Counts what came and went, for those who wait.
    changes: Arc<watch::Sender<u64>>,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("nodes", &self.lock().nodes.len()).finish()
    }
}

impl Sessions {
    /// None yet, with the names that the catalog remembers; each is kept for `hold`.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn load(catalog: &Catalog, hold: Duration) -> Result<Self, CatalogError> {
        let rows = catalog.call(|connection| seats::all(connection)).await?;
        let sessions = Self::default();
        let mut table = sessions.lock();
        table.hold = hold;
        table.before = rows
            .into_iter()
            .take(NODES_LIMIT)
            .map(|row| {
                let (instance, data_directory) = (row.instance, row.data_directory);
                let holder = Holder { instance, data_directory, away_since: Some(Monotonic::now()) };
                ((row.cluster, row.node), holder)
            })
            .collect();
        drop(table);
        Ok(sessions)
    }

    /// Agents can come from now on, and remembered names are kept from now on.
    pub fn open(&self) {
        let now = Some(Monotonic::now());
        self.lock().before.values_mut().for_each(|holder| holder.away_since = now);
    }

    /// Seats a new session. One of the same spool is replaced.
    ///
    /// # Errors
    /// [`Refusal::NodeTaken`] when another agent is connected under the name, [`Refusal::NodeKept`] while the name is kept
    /// for another one.
    pub fn enter(
        &self,
        cluster: &ClusterName,
        node: &NodeName,
        hello: Hello,
        server: ServerIdentity,
        now: Timestamp,
    ) -> Result<(Seat, Outbox), Refusal> {
        let mut table = self.lock();
        let place = (cluster.clone(), node.clone());
        table.expect(&place, &hello.instance)?;
        if !table.nodes.contains_key(&place) && table.nodes.len() >= NODES_LIMIT {
            return Err(Refusal::Precondition(format!("more than {NODES_LIMIT} nodes are not supported")));
        }
        table.next_number += 1;
        let number = table.next_number;
        let (sender, outbox) = mpsc::channel(QUEUE_LIMIT);
        let report = table.nodes.remove(&place).and_then(|entry| entry.report);
        let (entered, session) = (Monotonic::now(), Some((number, sender)));
        let entry = Entry { hello, server, report, entered, heard: entered, seen: now, session, left: None };
        table.before.remove(&place);
        table.rivals.remove(&place);
        table.nodes.insert(place, entry);
        drop(table);
        self.changes.send_modify(|count| *count += 1);
        Ok((Seat { cluster: cluster.clone(), node: node.clone(), number }, outbox))
    }

    /// A session ended; a newer one of the same node stays.
    pub fn leave(&self, seat: &Seat) {
        self.with_entry(seat, |entry| {
            entry.session = None;
            entry.left = Some(Monotonic::now());
        });
        self.changes.send_modify(|count| *count += 1);
    }

    /// Whether what is sent under a node's name comes from another agent than the one the name belongs to, as far as the
    /// sender says which one it is.
    pub fn is_stranger(&self, cluster: &ClusterName, node: &NodeName, instance: &str) -> bool {
        let place = (cluster.clone(), node.clone());
        let mut table = self.lock();
        table.renew_hold(&place, instance);
        !instance.is_empty() && table.standing(&place, instance) != Standing::Free
    }

    /// Refuses what another agent sends under a node's name, as [`Sessions::is_stranger`] tells.
    ///
    /// # Errors
    /// As [`Sessions::enter`].
    pub fn expect_instance(&self, cluster: &ClusterName, node: &NodeName, instance: &str) -> Result<(), Refusal> {
        match instance {
            "" => Ok(()),
            _ => self.lock().expect(&(cluster.clone(), node.clone()), instance),
        }
    }

    /// Waits until every connected node of a cluster has reported; at most [`FIRST_REPORT_WAIT`].
    pub async fn settled(&self, cluster: &ClusterName) {
        let mut changes = self.changes.subscribe();
        let all_reported = async {
            while roles::awaits_report(&self.states(cluster)) {
                // The sender lives as long as `self`.
                let Ok(()) = changes.changed().await else { return };
            }
        };
        // Whoever has not reported by then is judged as one that has not.
        let _ = tokio::time::timeout(FIRST_REPORT_WAIT, all_reported).await;
    }

    /// Whether the session still has its seat.
    pub fn is_seated(&self, seat: &Seat) -> bool {
        self.with_entry(seat, |_| ()).is_some()
    }

    /// Takes a report.
    pub fn report(&self, seat: &Seat, report: Report, now: Timestamp) {
        self.with_entry(seat, |entry| {
            let came = Monotonic::now();
            entry.report = Some((report, came));
            entry.heard = came;
            entry.seen = now;
        });
        self.changes.send_modify(|count| *count += 1);
    }

    fn with_entry<T>(&self, seat: &Seat, change: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let mut table = self.lock();
        let entry = table.nodes.get_mut(&(seat.cluster.clone(), seat.node.clone()))?;
        let own = entry.session.as_ref().is_some_and(|(number, _)| *number == seat.number);
        own.then(|| change(entry))
    }

    /// All nodes, of one cluster or of all, by name.
    pub fn nodes(&self, cluster: Option<&ClusterName>) -> Vec<NodeView> {
        let table = self.lock();
        let wanted = table.nodes.iter().filter(|((name, _), _)| cluster.is_none_or(|cluster| cluster == name));
        wanted
            .map(|(place @ (cluster, node), entry)| NodeView {
                cluster: cluster.clone(),
                node: node.clone(),
                hello: entry.hello.clone(),
                server: entry.server,
                report: entry.report.as_ref().map(|(report, _)| report.clone()),
                silence: entry.heard.elapsed(),
                seen: entry.seen,
                connected: entry.is_alive(),
                heard: entry.when_heard(),
                rival: table.rivals.get(place).map(|rival| rival.refused.elapsed()),
            })
            .collect()
    }

    /// The states of a cluster's nodes.
    pub fn states(&self, cluster: &ClusterName) -> Vec<NodeState> {
        self.nodes(Some(cluster)).iter().map(NodeView::state).collect()
    }

    /// One node's state.
    pub fn state(&self, cluster: &ClusterName, node: &NodeName) -> Option<NodeState> {
        self.states(cluster).into_iter().find(|state| state.node == *node)
    }

    /// Sessions that are connected.
    pub fn connected(&self) -> usize {
        self.nodes(None).iter().filter(|node| node.connected).count()
    }

    /// Sends a message to a node.
    ///
    /// # Errors
    /// When it is not connected, or does not take its messages.
    pub fn send(
        &self,
        cluster: &ClusterName,
        node: &NodeName,
        message: session_response::Message,
    ) -> Result<(), Refusal> {
        let sender = {
            let table = self.lock();
            let entry = table.nodes.get(&(cluster.clone(), node.clone()));
            entry.and_then(|entry| entry.session.as_ref()).map(|(_, sender)| sender.clone())
        };
        let gone = |why: &str| Refusal::Precondition(format!("node {node} of cluster {cluster} {why}"));
        let sender = sender.ok_or_else(|| gone("is not connected"))?;
        sender.try_send(Ok(SessionResponse { message: Some(message) })).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => gone("does not take its messages"),
            mpsc::error::TrySendError::Closed(_) => gone("is not connected"),
        })
    }

    /// Gives a node an order.
    ///
    /// # Errors
    /// As [`Sessions::send`].
    pub fn order(
        &self,
        cluster: &ClusterName,
        node: &NodeName,
        operation: &str,
        what: order::What,
    ) -> Result<(), Refusal> {
        let order = Order { operation: operation.to_owned(), what: Some(what) };
        self.send(cluster, node, session_response::Message::Order(order))
    }

    /// Tells a cluster's nodes that WAL files are in every store now. A node that does not take it asks again by sending
    /// its copies anew.
    pub fn spread(&self, cluster: &ClusterName, objects: &[String]) {
        for node in self.nodes(Some(cluster)).iter().filter(|node| node.connected) {
            let spread = fleet::WalSpread { objects: objects.to_vec() };
            let _ = self.send(cluster, &node.node, session_response::Message::WalSpread(spread));
        }
    }

    /// Asks those of a cluster's nodes that know it for WAL files that are in no store any more. A node that does not take it
    /// is asked again.
    pub fn lost(&self, cluster: &ClusterName, objects: &[String]) {
        let asked = |node: &&NodeView| node.connected && node.hello.knows_lost_wal;
        for node in self.nodes(Some(cluster)).iter().filter(asked) {
            let lost = fleet::WalLost { objects: objects.to_vec() };
            let _ = self.send(cluster, &node.node, session_response::Message::WalLost(lost));
        }
    }

    /// Has the primary of a cluster switch WAL past an LSN, and waits for its answer.
    ///
    /// # Errors
    /// When no primary is connected, it does not answer in time, or it fails.
    pub async fn switch_wal(
        &self,
        cluster: &ClusterName,
        past: Lsn,
        longest: Duration,
        now: Timestamp,
    ) -> Result<Switched, Refusal> {
        self.settled(cluster).await;
        let states = self.states(cluster);
        let primary = roles::primary(&states).map(|state| state.node.clone());
        let node = primary.ok_or_else(|| {
            Refusal::Precondition(format!(
                "cluster {cluster} has no primary connected to switch WAL; start its agent, or look at: pgconvoy info {cluster}"
            ))
        })?;
        let switch = order::What::SwitchWal(fleet::SwitchWal { past_lsn: past.as_u64() });
        let update = self.ask(cluster, &node, switch, longest, now).await?;
        match update.state() {
            OrderState::Done => Ok(Switched { node, wal_file: update.wal_file, lsn: Lsn::new(update.lsn) }),
            _ => Err(Refusal::Precondition(format!("node {node} did not switch WAL: {}", update.error))),
        }
    }

    /// Gives a node an order that it ends at once, and waits for that end.
    ///
    /// # Errors
    /// When the node is not connected or does not answer in time.
    pub async fn ask(
        &self,
        cluster: &ClusterName,
        node: &NodeName,
        what: order::What,
        longest: Duration,
        now: Timestamp,
    ) -> Result<OrderUpdate, Refusal> {
        let operation = identifier(now);
        let (sender, answered) = oneshot::channel();
        {
            let mut table = self.lock();
            table.questions.retain(|_, waiting| !waiting.is_closed());
            if table.questions.len() >= QUESTIONS_LIMIT {
                return Err(Refusal::Precondition("too many questions to nodes are open".to_owned()));
            }
            table.questions.insert(operation.clone(), sender);
        }
        self.order(cluster, node, &operation, what)?;
        let failed = |why: String| Refusal::Precondition(format!("node {node} gave no answer: {why}"));
        tokio::time::timeout(longest, answered)
            .await
            .map_err(|_| failed(format!("{} s are over", longest.as_secs())))?
            .map_err(|_| failed("its session ended".to_owned()))
    }

    /// Gives an order's update to whoever asked; gives it back when nobody did.
    pub fn answer(&self, update: OrderUpdate) -> Option<OrderUpdate> {
        let mut table = self.lock();
        if !table.questions.contains_key(&update.operation) {
            return Some(update);
        }
        if matches!(update.state(), OrderState::Done | OrderState::Failed)
            && let Some(waiting) = table.questions.remove(&update.operation)
        {
            // Nobody waits any more when the time was over.
            let _ = waiting.send(update);
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
