//! What is known to be wrong in the stores and in the servers' pages, cluster by cluster: found by verifications, by the nightly
//! scrub, and by comparing servers with backups.
//!
//! It is kept in the catalog, so that a restart forgets nothing; a deleted catalog costs a look that finds it again. A finding
//! stays until the object is looked at again, or is put right. News is one line of the log.
//!
//! Reports of the newest verifications are kept in memory for who asked for them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use repository::name::{BackupId, ClusterName, NodeName, StoreName};
use repository::verify::source::{SourcePage, SourceReport};
use repository::verify::{Finding, Report, Severity, What};
use serde::{Deserialize, Serialize};

use crate::catalog::{Catalog, CatalogError, soundness as rows};
use crate::scrub::NIGHTS;

/// Findings of one cluster that are kept.
const FINDINGS_MAX: usize = 2000;
/// Reports that are kept in memory.
const REPORTS_KEPT: usize = 16;
/// Findings that `info` shows of a cluster.
const SHOWN: usize = 20;
/// Nights that may pass with nothing of a node compared before `info` says so: after a failover, say, none before the next backup.
const IDLE_MAX: SignedDuration = SignedDuration::from_hours(7 * 24);

/// What is known of one cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The worst first.
    pub findings: Vec<Finding>,
    /// Backups that cannot be restored.
    #[serde(default)]
    pub not_restorable: Vec<BackupId>,
    /// When everything was looked at last.
    #[serde(default)]
    pub verified: Option<Timestamp>,
    /// When the scrub was begun last.
    #[serde(default)]
    pub last_night: Option<Timestamp>,
    /// When each share was read last.
    #[serde(default)]
    pub shares: BTreeMap<u32, Timestamp>,
    /// What comparing nodes' pages with backups found.
    #[serde(default)]
    pub servers: BTreeMap<NodeName, OfServer>,
}

/// What is known of the pages of one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfServer {
    /// When a night was begun first.
    #[serde(default)]
    pub first_night: Option<Timestamp>,
    /// When a night was begun last.
    pub last_night: Option<Timestamp>,
    /// When each share was compared last.
    pub shares: BTreeMap<u32, Timestamp>,
    /// Pages that are wrong.
    pub pages: Vec<WrongPage>,
}

impl OfServer {
    /// PURE: takes up that a night was begun.
    pub fn note_night(&mut self, now: Timestamp) {
        self.first_night.get_or_insert(now);
        self.last_night = Some(now);
    }

    /// PURE: since when nothing was compared, if that is long ago and nights were begun all the while.
    fn idle_since(&self) -> Option<Timestamp> {
        let since = self.shares.values().copied().max().max(self.first_night)?;
        (self.last_night?.duration_since(since) > IDLE_MAX).then_some(since)
    }
}

/// A page of a node that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrongPage {
    /// The backup that it was compared with.
    pub backup: BackupId,
    /// The page.
    pub page: SourcePage,
}

/// What tells one finding from another.
type Identity = (What, Option<StoreName>, Option<String>, Vec<BackupId>);

fn identity(finding: &Finding) -> Identity {
    let backups = if finding.object.is_none() { finding.backups.clone() } else { Vec::new() };
    (finding.what, finding.store.clone(), finding.object.clone(), backups)
}

impl Known {
    /// PURE: takes up a report about all stores. Answers what is new.
    pub fn merge(&mut self, report: &Report, of_one_backup: bool) -> Vec<Finding> {
        let before: BTreeSet<Identity> = self.findings.iter().map(identity).collect();
        let looked_at =
            |store: &StoreName| report.stores.iter().any(|verdict| verdict.store == *store && verdict.failed.is_none());
        self.findings.retain(|finding| match (&finding.store, &finding.object) {
            _ if of_one_backup => true,
            (Some(store), _) if !looked_at(store) => true,
            (_, Some(object)) => report.share.is_some_and(|share| !share.takes(object)),
            (_, None) => !report.complete,
        });
        let found: BTreeSet<Identity> = report.findings.iter().map(identity).collect();
        self.findings.retain(|finding| !found.contains(&identity(finding)));
        self.findings.extend(report.findings.iter().cloned());
        self.findings.sort_by_key(|finding| finding.severity);
        self.findings.truncate(FINDINGS_MAX);
        let judged: BTreeSet<BackupId> = report.backups.iter().map(|backup| backup.backup).collect();
        if report.share.is_none() {
            self.not_restorable.retain(|backup| of_one_backup && !judged.contains(backup));
        }
        let lost = report.backups.iter().filter(|backup| !backup.restorable).map(|backup| backup.backup);
        self.not_restorable.extend(lost);
        self.not_restorable.sort_unstable();
        self.not_restorable.dedup();
        let still: BTreeSet<BackupId> = self.findings.iter().flat_map(|finding| finding.backups.clone()).collect();
        self.not_restorable.retain(|backup| still.contains(backup));
        if report.share.is_none() && report.complete && !of_one_backup {
            self.verified = Some(report.generated);
        }
        report.findings.iter().filter(|finding| !before.contains(&identity(finding))).cloned().collect()
    }

    /// PURE: takes up what comparing a node's pages found. Answers what is new.
    pub fn merge_source(&mut self, report: &SourceReport, now: Timestamp) -> Vec<SourcePage> {
        let of = self.servers.entry(report.node.clone()).or_default();
        let before = std::mem::take(&mut of.pages);
        let same = |one: &SourcePage, other: &SourcePage| {
            (&one.path, one.block, one.fault) == (&other.path, other.block, other.fault)
        };
        let known = |page: &&SourcePage| before.iter().any(|before| same(&before.page, page));
        let new = report.pages.iter().filter(|page| !known(page)).cloned().collect();
        let untouched = |page: &SourcePage| report.share.is_some_and(|share| !share.takes(&page.path));
        of.pages = before.iter().filter(|before| untouched(&before.page)).cloned().collect();
        of.pages.extend(report.pages.iter().map(|page| WrongPage { backup: report.backup, page: page.clone() }));
        of.pages.truncate(FINDINGS_MAX);
        match report.share {
            Some(share) if share.of == NIGHTS => drop(of.shares.insert(share.part, now)),
            Some(_) => {}
            None => of.shares.extend((0..NIGHTS).map(|part| (part, now))),
        }
        new
    }

    /// How many pages of servers are known to be wrong.
    pub fn wrong_pages(&self) -> usize {
        self.servers.values().map(|of| of.pages.len()).sum()
    }

    /// Lines for people.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self
            .not_restorable
            .iter()
            .map(|backup| format!("backup {backup} CANNOT BE RESTORED; pgconvoy verify tells why"))
            .collect();
        lines.extend(self.findings.iter().take(SHOWN).map(line));
        if self.findings.len() > SHOWN {
            lines.push(format!("{} more things are wrong; pgconvoy verify tells all", self.findings.len() - SHOWN));
        }
        let pages = self.servers.iter().flat_map(|(node, of)| of.pages.iter().map(move |wrong| (node, wrong)));
        lines.extend(pages.take(SHOWN).map(|(node, wrong)| wrong.page.line(node, &wrong.backup)));
        if self.wrong_pages() > SHOWN {
            lines.push(format!(
                "{} more pages are wrong; pgconvoy verify --source tells all",
                self.wrong_pages() - SHOWN
            ));
        }
        let idle = self.servers.iter().filter_map(|(node, of)| Some((node, of.idle_since()?)));
        lines.extend(idle.map(|(node, since)| {
            format!("no pages of node {node} were compared since {since}; pgconvoy operations, or the coordinator's log, tells why")
        }));
        lines
    }
}

/// A finding in one line.
pub fn line(finding: &Finding) -> String {
    let word = match finding.severity {
        Severity::NotRestorable => "not restorable",
        Severity::Lost => "lost",
        Severity::Damaged => "damaged",
    };
    let store = finding.store.as_ref().map_or("all stores".to_owned(), |store| format!("store {store}"));
    let object = finding.object.as_ref().map(|object| format!("{object}: ")).unwrap_or_default();
    let remedy = if finding.remedy.is_empty() { String::new() } else { format!("; {}", finding.remedy) };
    format!("{word}: {store}: {object}{}{remedy}", finding.found)
}

/// What is known of all clusters.
#[derive(Debug)]
pub struct Soundness {
    catalog: Catalog,
    known: Arc<Mutex<BTreeMap<ClusterName, Known>>>,
    /// By the operations that made them, the newest last.
    reports: Mutex<VecDeque<(String, String)>>,
}

impl Soundness {
    /// Takes up what the catalog knows.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn load(catalog: Catalog) -> Result<Self, CatalogError> {
        let rows = catalog.call(|connection| rows::all(connection)).await?;
        // What another version wrote is found again.
        let known = rows.into_iter().map(|(cluster, text)| (cluster, serde_json::from_str(&text).unwrap_or_default()));
        Ok(Self { known: Arc::new(Mutex::new(known.collect())), catalog, reports: Mutex::default() })
    }

    /// What is known of a cluster.
    pub fn of(&self, cluster: &ClusterName) -> Known {
        self.known().get(cluster).cloned().unwrap_or_default()
    }

    /// Takes up a report about all stores, and says what is new in one line of the log.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn take(&self, report: &Report, of_one_backup: bool) -> Result<(), CatalogError> {
        let (mut new, mut known) = (Vec::new(), Known::default());
        self.change(&report.cluster, |kept| {
            new = kept.merge(report, of_one_backup);
            known = kept.clone();
        })
        .await?;
        if let Some(first) = new.first() {
            tracing::error!(cluster = %report.cluster, new = new.len(), all = known.findings.len(),
                not_restorable = known.not_restorable.len(), first = line(first),
                "what the stores hold is not sound; see pgconvoy verify");
        }
        Ok(())
    }

    /// Takes up what comparing a node's pages found, and says what is new in one line of the log.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn take_source(&self, report: &SourceReport, now: Timestamp) -> Result<(), CatalogError> {
        let mut new = Vec::new();
        self.change(&report.cluster, |known| new = known.merge_source(report, now)).await?;
        if let Some(first) = new.first() {
            tracing::error!(cluster = %report.cluster, node = %report.node, new = new.len(), wrong = report.wrong,
                first = first.line(&report.node, &report.backup),
                "pages of a server and what is stored of them do not agree; see pgconvoy verify --source");
        }
        Ok(())
    }

    /// Changes what is known of a cluster. What is saved is what is known when it is saved, so that of changes beside each other none
    /// is saved over a newer one.
    ///
    /// # Errors
    /// When the catalog fails.
    pub async fn change(&self, cluster: &ClusterName, change: impl FnOnce(&mut Known)) -> Result<(), CatalogError> {
        change(self.known().entry(cluster.clone()).or_default());
        let (cluster, known) = (cluster.clone(), Arc::clone(&self.known));
        self.catalog
            .call(move |connection| {
                let text = {
                    let known = known.lock().unwrap_or_else(PoisonError::into_inner);
                    serde_json::to_string(&known.get(&cluster)).expect("it has only text keys and plain values")
                };
                rows::put(connection, &cluster, &text)
            })
            .await
    }

    /// Keeps a report for who asked for it.
    pub fn keep_report(&self, operation: &str, json: String) {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        while reports.len() >= REPORTS_KEPT {
            reports.pop_front();
        }
        reports.push_back((operation.to_owned(), json));
    }

    /// A report that is kept.
    pub fn report(&self, operation: &str) -> Option<String> {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports.iter().find(|(id, _)| id == operation).map(|(_, json)| json.clone())
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<ClusterName, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use postgres_format::Lsn;
    use repository::verify::source::{PageFault, SOURCE_SCHEMA};
    use repository::verify::{BackupVerdict, Depth, SCHEMA, Share, StoreVerdict};

    fn finding(store: &str, object: &str) -> Finding {
        Finding {
            severity: Severity::Damaged,
            what: What::Pack,
            store: Some(store.parse().unwrap()),
            object: Some(object.to_owned()),
            found: "torn".to_owned(),
            expected: "whole".to_owned(),
            backups: vec!["20261123T010100Z-00000001".parse().unwrap()],
            moments: None,
            sound_in: Vec::new(),
            remedy: String::new(),
            proof: None,
        }
    }

    #[tokio::test]
    async fn no_change_is_saved_over_a_newer_one() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let soundness = Soundness::load(catalog.clone()).await.unwrap();
        let cluster: ClusterName = "main".parse().unwrap();
        let noted = |part: u32| {
            soundness.change(&cluster, move |known| {
                known.shares.insert(part, Timestamp::UNIX_EPOCH);
            })
        };
        let (release, released) = std::sync::mpsc::channel::<()>();
        let busy = catalog.call(move |_| {
            let _ = released.recv();
            Ok(())
        });
        let saved = catalog.call(|connection| rows::all(connection));
        let second_then_release = futures_util::future::join(noted(2), async { release.send(()).unwrap() });
        // Polled in this order: the second change is made before the first is saved.
        let (_, _, saved, _) = futures_util::future::join4(busy, noted(1), saved, second_then_release).await;
        let saved: Known = serde_json::from_str(&saved.unwrap()[0].1).unwrap();
        assert_eq!(saved.shares.into_keys().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_node_of_which_nothing_is_compared_for_a_week_is_told_of() {
        let night = |number: i64| Timestamp::from_second(1_795_000_000 + number * 86_400).unwrap();
        let mut known = Known::default();
        let mut server = OfServer::default();
        (0..=7).for_each(|number| server.note_night(night(number)));
        assert_eq!(server.idle_since(), None);
        server.note_night(night(8));
        assert_eq!(server.idle_since(), Some(night(0)));
        server.shares.insert(3, night(8));
        server.note_night(night(15));
        assert_eq!(server.idle_since(), None);
        server.note_night(night(16));
        known.servers.insert("db1".parse().unwrap(), server);
        let line = format!(
            "no pages of node db1 were compared since {}; pgconvoy operations, or the coordinator's log, tells why",
            night(8)
        );
        assert_eq!(known.lines(), [line]);
    }

    #[test]
    fn wrong_pages_of_a_server_stay_until_their_file_is_compared_again() {
        let page = |path: &str| SourcePage {
            path: path.to_owned(),
            block: 3,
            fault: PageFault::ServerDamaged,
            server_lsn: Lsn::new(0x500),
            stored_lsn: None,
            object: None,
        };
        let report = |share, pages: Vec<SourcePage>| SourceReport {
            schema: SOURCE_SCHEMA.to_owned(),
            generated: "2026-11-23T05:00:00Z".parse().unwrap(),
            cluster: "main".parse().unwrap(),
            node: "db1".parse().unwrap(),
            backup: "20261123T010100Z-00000001".parse().unwrap(),
            share,
            sound: pages.is_empty(),
            bytes: 0,
            compared: 0,
            changed: 0,
            left_out: 0,
            wrong: pages.len() as u64,
            pages,
        };
        let (path, now) = ("base/5/16384", "2026-11-23T05:00:00Z".parse().unwrap());
        let its = (0..NIGHTS).map(|part| Share { part, of: NIGHTS }).find(|share| share.takes(path)).unwrap();
        let other = Share { part: (its.part + 1) % NIGHTS, of: NIGHTS };
        let mut known = Known::default();
        assert_eq!(known.merge_source(&report(None, vec![page(path)]), now).len(), 1);
        assert_eq!(known.servers[&"db1".parse::<NodeName>().unwrap()].shares.len(), NIGHTS as usize);
        assert!(known.merge_source(&report(None, vec![page(path)]), now).is_empty(), "it is no news");
        known.merge_source(&report(Some(other), Vec::new()), now);
        assert_eq!(known.wrong_pages(), 1, "its file was not looked at");
        assert!(known.lines()[0].contains("block 3 of base/5/16384 on node db1 is damaged"), "{:?}", known.lines());
        known.merge_source(&report(Some(its), Vec::new()), now);
        assert_eq!((known.wrong_pages(), known.lines().len()), (0, 0));
    }

    fn report(share: Option<Share>, findings: Vec<Finding>, failed: Option<&str>) -> Report {
        let verdict = |name: &str| StoreVerdict {
            store: name.parse().unwrap(),
            failed: failed.filter(|away| *away == name).map(str::to_owned),
            objects: 1,
            bytes: 1,
            left_out: 0,
        };
        Report {
            schema: SCHEMA.to_owned(),
            generated: "2026-11-23T05:00:00Z".parse().unwrap(),
            cluster: "main".parse().unwrap(),
            depth: Depth::Digests,
            share,
            sound: findings.is_empty(),
            complete: failed.is_none(),
            stores: vec![verdict("repo1"), verdict("s3")],
            backups: vec![BackupVerdict {
                backup: "20261123T010100Z-00000001".parse().unwrap(),
                restorable: findings.is_empty(),
                stores: Vec::new(),
                reaches: None,
                timeline: None,
                reasons: Vec::new(),
            }],
            findings,
        }
    }

    #[test]
    fn what_is_known_follows_what_was_looked_at() {
        let mut known = Known::default();
        let all = vec![finding("repo1", "c/a"), finding("repo1", "c/b"), finding("s3", "c/a")];
        assert_eq!(known.merge(&report(None, all.clone(), None), false).len(), 3);
        assert_eq!((known.merge(&report(None, all, None), false).len(), known.findings.len()), (0, 3));
        assert_eq!(known.not_restorable.len(), 1);
        // A store that was away says nothing about what is in it.
        known.merge(&report(None, Vec::new(), Some("s3")), false);
        assert_eq!(known.findings, [finding("s3", "c/a")]);
        assert_eq!(known.not_restorable, []);
        // A share says something about its own objects alone.
        let share = (0..30).map(|part| Share { part, of: 30 }).find(|share| share.takes("c/a")).unwrap();
        let other = Share { part: (share.part + 1) % 30, of: 30 };
        known.merge(&report(Some(other), Vec::new(), None), false);
        assert_eq!(known.findings.len(), 1);
        known.merge(&report(Some(share), Vec::new(), None), false);
        assert_eq!(known.findings.len(), 0);
        assert!(known.verified.is_some());
        // One backup adds, and takes nothing away.
        known.merge(&report(None, vec![finding("s3", "c/c")], None), true);
        known.merge(&report(None, Vec::new(), None), true);
        assert_eq!(known.findings.len(), 1);
        assert!(known.lines()[0].contains("damaged: store s3: c/c: torn"), "{:?}", known.lines());
    }
}
