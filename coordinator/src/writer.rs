//! Who may write a timeline.
//!
//! The writer of a timeline is the node of its newest object sent out of recovery; the catalog finds it, an operator's
//! adoption overrules it. Another node that is out of recovery *on that timeline* is refused, because two servers are
//! writing one history and only one of them can be continued. Accepted from anybody:
//! * what a node in recovery sends (a standby with `archive_mode = always`): identical content collapses, other content
//!   is a conflict by the WAL rule;
//! * content that is stored already;
//! * a `.partial`, and everything of an older timeline from a node that has moved on to a later one: after a promotion
//!   the archiver sends what was left of the old timeline, and is no writer of it.
//!
//! A promotion needs nothing: the first object of a new timeline makes its sender the writer.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use postgres_format::{SystemIdentifier, Timeline, WalFileName};
use repository::adoption::Numbered;
use repository::name::{ClusterName, NodeName, StoreName};

use crate::catalog::{Catalog, CatalogError, senders};

/// What is sent, as far as the rule asks.
#[derive(Debug, Clone, Copy)]
pub struct Sent<'a> {
    /// The sending node.
    pub node: &'a NodeName,
    /// The file.
    pub name: WalFileName,
    /// Whether the node was in recovery.
    pub in_recovery: bool,
    /// The node's current timeline, as far as known.
    pub node_timeline: Option<Timeline>,
}

/// What the rule says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may come, and its node writes the timeline from now on.
    AcceptAsWriter,
    /// It may come, and says nothing about who writes the timeline.
    Accept,
    /// It may come only if it is stored already.
    OnlyIfStored {
        /// The node that writes the timeline.
        writer: NodeName,
    },
}

/// Judges what is sent, given the timeline's writer. Pure.
pub fn judge(sent: Sent<'_>, writer: Option<&NodeName>) -> Verdict {
    if sent.in_recovery || matches!(sent.name, WalFileName::Partial(_)) {
        return Verdict::Accept;
    }
    match writer {
        Some(writer) if writer == sent.node => Verdict::AcceptAsWriter,
        _ if sent.node_timeline.is_some_and(|timeline| timeline > sent.name.timeline()) => Verdict::Accept,
        None => Verdict::AcceptAsWriter,
        Some(writer) => Verdict::OnlyIfStored { writer: writer.clone() },
    }
}

/// One timeline of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Line {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// Its system identifier.
    pub system: SystemIdentifier,
    /// The timeline.
    pub timeline: Timeline,
}

/// What operators decided about writers, as read from the stores.
#[derive(Debug, Clone, Default)]
pub struct Decided {
    /// The newest adoptions.
    pub adopted: HashMap<Line, Numbered>,
    /// Timelines about which every store answered.
    pub certain: HashSet<Line>,
}

/// Who writes a timeline, and how that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// It sent the newest object, or claimed a timeline that nobody had written.
    Sender(NodeName),
    /// An operator said so.
    Adopted(Numbered),
}

impl Known {
    fn node(&self) -> &NodeName {
        match self {
            Self::Sender(node) => node,
            Self::Adopted(numbered) => &numbered.adoption.node,
        }
    }

    /// Whether an operator's word changes this: it beats a sender, and an older word.
    fn yields_to(&self, word: &Numbered) -> bool {
        match self {
            Self::Sender(_) => true,
            Self::Adopted(numbered) => word.counts_over(numbered),
        }
    }
}

/// The writers found so far; the catalog is asked about the others.
#[derive(Debug, Clone)]
pub struct Writers {
    catalog: Catalog,
    known: Arc<Mutex<HashMap<Line, Known>>>,
    /// Stores whose adoptions of a system were taken up.
    heard: Arc<Mutex<HashSet<(ClusterName, SystemIdentifier, StoreName)>>>,
}

impl Writers {
    /// None found yet.
    pub fn new(catalog: Catalog) -> Self {
        Self { catalog, known: Arc::default(), heard: Arc::default() }
    }

    /// The writer of a timeline.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn of(&self, line: &Line) -> Result<Option<NodeName>, CatalogError> {
        if let Some(known) = self.lock().get(line) {
            return Ok(Some(known.node().clone()));
        }
        let asked = line.clone();
        let found = self
            .catalog
            .call(move |connection| senders::newest_writer(connection, &asked.cluster, asked.system, asked.timeline))
            .await?;
        // An operator may have decided meanwhile.
        Ok(found.map(|node| self.lock().entry(line.clone()).or_insert(Known::Sender(node)).node().clone()))
    }

    /// The writer of a timeline, which is `node` from now on if there was none. Of two that claim at the same moment
    /// one wins.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn claim(&self, line: &Line, node: &NodeName) -> Result<NodeName, CatalogError> {
        match self.of(line).await? {
            Some(writer) => Ok(writer),
            None => Ok(self.lock().entry(line.clone()).or_insert_with(|| Known::Sender(node.clone())).node().clone()),
        }
    }

    /// A claim came to nothing; the catalog is asked again next time. What an operator said meanwhile stays.
    pub fn release(&self, line: &Line) {
        let mut known = self.lock();
        if matches!(known.get(line), Some(Known::Sender(_))) {
            known.remove(line);
        }
    }

    /// An operator adopted a node.
    pub fn adopt(&self, line: Line, word: Numbered) {
        let mut known = self.lock();
        if known.get(&line).is_none_or(|known| known.yields_to(&word)) {
            known.insert(line, Known::Adopted(word));
        }
    }

    /// What an operator said last about a timeline, as far as known.
    pub fn adopted(&self, line: &Line) -> Option<Numbered> {
        match self.lock().get(line) {
            Some(Known::Adopted(word)) => Some(word.clone()),
            _ => None,
        }
    }

    /// Stores of these whose adoptions of a system were not taken up yet.
    pub fn unheard(
        &self,
        cluster: &ClusterName,
        system: SystemIdentifier,
        stores: impl IntoIterator<Item = StoreName>,
    ) -> Vec<StoreName> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = |store: &StoreName| !heard.contains(&(cluster.clone(), system, store.clone()));
        stores.into_iter().filter(is_new).collect()
    }

    /// Takes up what stores say of a system that were not heard before; it beats who was found by sending.
    pub fn hear(
        &self,
        cluster: &ClusterName,
        system: SystemIdentifier,
        newest: BTreeMap<Timeline, Numbered>,
        stores: impl IntoIterator<Item = StoreName>,
    ) {
        for (timeline, word) in newest {
            self.adopt(Line { cluster: cluster.clone(), system, timeline }, word);
        }
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.extend(stores.into_iter().map(|store| (cluster.clone(), system, store)));
    }

    /// The writers found so far.
    pub fn known(&self) -> HashMap<Line, Known> {
        self.lock().clone()
    }

    /// The catalog was made anew: what was found in the old one is forgotten, and what operators decided is as `decided`
    /// says. `before` is what was known before the decisions were read: what changed since then is newer than them and
    /// stays, as does what not every store was asked about. Claims of timelines that nobody has written yet stay, too.
    ///
    /// # Errors
    /// When the catalog fails; then everything stays as it was.
    pub async fn renew(&self, before: &HashMap<Line, Known>, decided: Decided) -> Result<(), CatalogError> {
        let Decided { adopted, certain } = decided;
        let asked: Vec<Line> = before.keys().filter(|line| certain.contains(line)).cloned().collect();
        let written = self.catalog.call(move |connection| {
            let mut written = HashSet::new();
            for line in asked {
                if senders::newest_writer(connection, &line.cluster, line.system, line.timeline)?.is_some() {
                    written.insert(line);
                }
            }
            Ok(written)
        });
        let written = written.await?;
        let mut known = self.lock();
        let changed: HashSet<Line> = known
            .iter()
            .filter(|(line, found)| before.get(line) != Some(found))
            .map(|(line, _)| line.clone())
            .collect();
        known.retain(|line, _| !written.contains(line) || changed.contains(line));
        for (line, word) in adopted {
            let all_said_so = certain.contains(&line) && !changed.contains(&line);
            if all_said_so || known.get(&line).is_none_or(|known| known.yields_to(&word)) {
                known.insert(line, Known::Adopted(word));
            }
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Line, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule() {
        let (a, b): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let check = |node, name: &str, in_recovery, on: u32, writer: Option<&NodeName>, expected: Verdict| {
            let sent = Sent { node, name: name.parse().unwrap(), in_recovery, node_timeline: Timeline::new(on) };
            assert_eq!(judge(sent, writer), expected, "{name} from {node} on {on}");
        };
        let segment = "000000010000000000000005";
        let foreign = || Verdict::OnlyIfStored { writer: a.clone() };
        check(&a, segment, false, 1, None, Verdict::AcceptAsWriter);
        check(&a, segment, false, 1, Some(&a), Verdict::AcceptAsWriter);
        check(&b, segment, false, 1, Some(&a), foreign());
        check(&b, segment, false, 0, Some(&a), foreign());
        // A standby that archives always.
        check(&b, segment, true, 1, Some(&a), Verdict::Accept);
        // After b's promotion to timeline 2.
        check(&b, "00000002.history", false, 2, None, Verdict::AcceptAsWriter);
        check(&b, "000000010000000000000006.partial", false, 2, Some(&a), Verdict::Accept);
        check(&b, segment, false, 2, Some(&a), Verdict::Accept);
        check(&b, segment, false, 2, None, Verdict::Accept);
        check(&b, "000000020000000000000006", false, 2, Some(&b), Verdict::AcceptAsWriter);
        // The old primary goes on beside it: timeline 1 is still its own.
        check(&a, "000000010000000000000007", false, 1, Some(&a), Verdict::AcceptAsWriter);
    }

    fn word(number: u32, node: &NodeName) -> Numbered {
        let written = jiff::Timestamp::from_second(1_795_400_000).unwrap();
        Numbered {
            number,
            adoption: repository::adoption::Adoption::new(node.clone(), written, std::collections::BTreeSet::new()),
        }
    }

    #[tokio::test]
    async fn of_two_claims_one_wins() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let writers = Writers::new(catalog);
        let line =
            Line { cluster: "main".parse().unwrap(), system: SystemIdentifier::new(7), timeline: Timeline::FIRST };
        let (a, b): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        assert_eq!(writers.claim(&line, &a).await.unwrap(), a);
        assert_eq!(writers.claim(&line, &b).await.unwrap(), a);
        writers.release(&line);
        assert_eq!(writers.of(&line).await.unwrap(), None);
        // An operator's word stays, whatever becomes of a push that claimed the timeline before.
        assert_eq!(writers.claim(&line, &a).await.unwrap(), a);
        writers.adopt(line.clone(), word(2, &b));
        writers.adopt(line.clone(), word(1, &a));
        writers.release(&line);
        assert_eq!(writers.of(&line).await.unwrap(), Some(b.clone()));
        // A catalog made anew knows nothing of this timeline: the claim stays, and a decision beats it.
        let decided = |adopted: &[(&Line, &NodeName)], certain: &[&Line]| Decided {
            adopted: adopted.iter().map(|(line, node)| ((*line).clone(), word(3, node))).collect(),
            certain: certain.iter().map(|line| (*line).clone()).collect(),
        };
        writers.renew(&writers.known(), decided(&[], &[&line])).await.unwrap();
        assert_eq!(writers.of(&line).await.unwrap(), Some(b));
        writers.renew(&writers.known(), decided(&[(&line, &a)], &[&line])).await.unwrap();
        assert_eq!(writers.of(&line).await.unwrap(), Some(a));
    }

    #[tokio::test]
    async fn an_adoption_that_a_renewal_did_not_see_stays() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let line = |timeline| Line {
            cluster: "main".parse().unwrap(),
            system: SystemIdentifier::new(7),
            timeline: Timeline::new(timeline).unwrap(),
        };
        let (a, b): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        // The catalog knows a as the writer of three timelines, and operators adopted b for two.
        let insert =
            "INSERT INTO wal (cluster, system_identifier, name, fingerprint, kind, timeline, position, size_bytes,
                          node, in_recovery, complete, written_us)
                      VALUES ('main', 7, ?1, '', 1, ?1, 1, 1, 'a', 0, 1, 1)";
        let written = catalog.call(move |connection| {
            (1..=3).try_for_each(|timeline: u32| connection.execute(insert, [timeline.to_string()]).map(|_| ()))?;
            Ok(())
        });
        written.await.unwrap();
        let writers = Writers::new(catalog);
        assert_eq!(writers.of(&line(1)).await.unwrap().as_ref(), Some(&a));
        writers.adopt(line(2), word(2, &b));
        writers.adopt(line(3), word(1, &b));
        let before = writers.known();
        // While the stores are asked, b is adopted for the first; for the second a store did not answer.
        writers.adopt(line(1), word(1, &b));
        let decided = Decided { adopted: HashMap::new(), certain: HashSet::from([line(1), line(3)]) };
        writers.renew(&before, decided).await.unwrap();
        assert_eq!(writers.of(&line(1)).await.unwrap().as_ref(), Some(&b));
        assert_eq!(writers.of(&line(2)).await.unwrap().as_ref(), Some(&b));
        assert_eq!(writers.of(&line(3)).await.unwrap().as_ref(), Some(&a), "no store knows of an adoption");
        // An older adoption from one store does not undo the newer one that another store has.
        let older = Decided {
            adopted: HashMap::from([(line(2), word(1, &a)), (line(3), word(1, &b))]),
            certain: HashSet::new(),
        };
        writers.renew(&writers.known(), older).await.unwrap();
        assert_eq!(writers.of(&line(2)).await.unwrap().as_ref(), Some(&b));
        assert_eq!(writers.of(&line(3)).await.unwrap(), Some(b), "a word of one store beats who sent last");
    }
}
