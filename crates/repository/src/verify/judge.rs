//! PURE: what the facts of all stores together cost, and what can be done. Facts in, a report out.
//!
//! A backup can be restored if everything it needs is sound in some store that names it, because a restore asks the next
//! store for what one does not have whole; and if its WAL is there from its start to its end, in whichever store.

use std::collections::BTreeMap;

use jiff::Timestamp;
use postgres_format::{SegmentName, SystemIdentifier, WalFileName};

use super::Request;
use super::continuity::{self, StoreWal, SystemWal, spans_text};
use super::facts::{Broken, StoreFacts};
use super::finding::{BackupVerdict, Finding, Report, SCHEMA, Severity, StoreBackup, StoreVerdict, What};
use crate::coverage::SegmentSpan;
use crate::key::ParsedKey;
use crate::name::{BackupId, ClusterName, StoreName};
use crate::root::{RootBackup, System};

/// A backup and the stores that name it.
struct Named<'a> {
    backup: &'a RootBackup,
    stores: Vec<&'a StoreFacts>,
    /// Segments that no store has and that it needs to be consistent.
    lacking: Vec<SegmentSpan>,
}

struct Judging<'a> {
    cluster: &'a ClusterName,
    facts: &'a [StoreFacts],
    wal: &'a [StoreWal],
    all: BTreeMap<SystemIdentifier, SystemWal>,
    backups: Vec<Named<'a>>,
    findings: Vec<Finding>,
}

/// Judges.
pub(super) fn judge(
    cluster: &ClusterName,
    request: &Request,
    facts: &[StoreFacts],
    wal: &[StoreWal],
    now: Timestamp,
) -> Report {
    let all = continuity::together(wal);
    let backups = named(facts, request.backup, &all);
    let mut judging = Judging { cluster, facts, wal, all, backups, findings: Vec::new() };
    for of in facts {
        of.broken.iter().for_each(|broken| judging.broken(of, broken));
    }
    judging.backup_wal();
    if request.backup.is_none() {
        judging.gaps();
        judging.holes();
        judging.histories();
    }
    let backups = judging.backups.iter().map(|named| judging.verdict(named)).collect();
    let stores: Vec<StoreVerdict> = facts.iter().zip(wal).map(|(facts, wal)| store_verdict(facts, wal)).collect();
    let mut findings = judging.findings;
    findings.sort_by(|one, other| {
        (one.severity, one.what, &one.store, &one.object).cmp(&(
            other.severity,
            other.what,
            &other.store,
            &other.object,
        ))
    });
    Report {
        schema: SCHEMA.to_owned(),
        generated: now,
        cluster: cluster.clone(),
        depth: request.depth,
        share: request.share,
        sound: findings.is_empty() && stores.iter().all(|store| store.left_out == 0),
        complete: stores.iter().all(|store| store.failed.is_none()),
        stores,
        backups,
        findings,
    }
}

/// Whether a report tells of WAL that is missing, which may have been on its way.
pub(super) fn misses_wal(report: &Report) -> bool {
    report.findings.iter().any(|finding| finding.object.is_none())
}

fn named<'a>(
    facts: &'a [StoreFacts],
    only: Option<BackupId>,
    all: &BTreeMap<SystemIdentifier, SystemWal>,
) -> Vec<Named<'a>> {
    let mut backups: BTreeMap<BackupId, Named<'a>> = BTreeMap::new();
    for of in facts {
        let listed = of.root.iter().flat_map(|root| &root.backups);
        for backup in listed.filter(|backup| only.is_none_or(|only| only == backup.backup)) {
            let named = backups.entry(backup.backup).or_insert_with(|| Named {
                backup,
                stores: Vec::new(),
                lacking: continuity::lacking(all.get(&backup.system_identifier), backup),
            });
            named.stores.push(of);
        }
    }
    backups.into_values().collect()
}

fn store_verdict(facts: &StoreFacts, wal: &StoreWal) -> StoreVerdict {
    // A root that cannot be read is told as a finding, and is why the WAL is not known.
    let root_broken = facts.broken.iter().any(|broken| broken.what == What::NewestRoot);
    let failed = facts.failed.clone().or_else(|| wal.failed.clone().filter(|_| !root_broken));
    StoreVerdict {
        store: facts.store.clone(),
        failed,
        objects: facts.objects,
        bytes: facts.bytes,
        left_out: facts.left_out,
    }
}

impl Judging<'_> {
    /// What breaks a backup, besides WAL: broken objects of which no store that names it has a sound copy.
    fn reasons(&self, named: &Named<'_>) -> Vec<String> {
        let id = named.backup.backup;
        let mut reasons = Vec::new();
        for of in &named.stores {
            for broken in of.broken.iter().filter(|broken| broken.backups.contains(&id)) {
                let text = format!("{}: {}", broken.key, broken.found);
                if broken.what != What::Pages && !has_copy(named, broken) && !reasons.contains(&text) {
                    reasons.push(text);
                }
            }
        }
        if !named.lacking.is_empty() {
            reasons.push(format!("WAL is missing: {}", self.spans(named.backup, &named.lacking)));
        }
        reasons
    }

    fn spans(&self, backup: &RootBackup, spans: &[SegmentSpan]) -> String {
        let size = self.all.get(&backup.system_identifier).map(|held| held.wal.segment_size());
        let own = postgres_format::SegmentSize::from_bytes(backup.segment_size_bytes).ok();
        size.or(own).map(|size| spans_text(spans, size)).unwrap_or_default()
    }

    fn verdict(&self, named: &Named<'_>) -> BackupVerdict {
        let backup = named.backup;
        let whole = |of: &&StoreFacts| {
            let wal = self.wal.iter().find(|wal| wal.store == of.store);
            let held = wal.and_then(|wal| wal.systems.get(&backup.system_identifier));
            let whole = !of.breaks(&backup.backup) && continuity::lacking(held, backup).is_empty();
            StoreBackup { store: of.store.clone(), whole }
        };
        let reasons = self.reasons(named);
        let held = self.all.get(&backup.system_identifier);
        let reach = held.and_then(|held| continuity::reach(&held.wal, backup));
        BackupVerdict {
            backup: backup.backup,
            restorable: reasons.is_empty(),
            stores: named.stores.iter().map(whole).collect(),
            reaches: reach.map(|(lsn, _)| lsn),
            timeline: reach.map(|(_, timeline)| timeline),
            reasons,
        }
    }

    fn broken(&mut self, of: &StoreFacts, broken: &Broken) {
        let mut finding = Finding {
            severity: Severity::Damaged,
            what: broken.what,
            store: Some(of.store.clone()),
            object: Some(broken.key.to_string()),
            found: broken.found.clone(),
            expected: broken.expected.clone(),
            backups: broken.backups.clone(),
            moments: None,
            sound_in: broken.sound_in.clone(),
            remedy: self.copied_from(&broken.sound_in),
            proof: broken.proof,
        };
        match broken.what {
            What::NewestRoot => self.newest_root(of, &mut finding),
            What::OlderRoot => {
                finding.remedy =
                    "nothing that exists depends on it: look at what else the store's device damaged".to_owned();
            }
            What::Manifest | What::Pack | What::Coverage => self.backup_object(broken, &mut finding),
            What::Pages => {
                finding.moments = Some("the rows in those pages".to_owned());
                finding.remedy = "the data directory had them when the backup was taken: check the server with \
                                  pg_amcheck, and take a new backup of a sound one"
                    .to_owned();
            }
            What::ChangeMap if broken.sound_in.is_empty() => {
                finding.remedy = "nothing is lost: an incremental backup reads the WAL instead".to_owned();
            }
            What::Wal | What::History => self.wal_object(broken, &mut finding),
            What::Evidence if broken.sound_in.is_empty() => {
                finding.remedy = "it was refused when it came and is served to nobody".to_owned();
            }
            _ => {}
        }
        self.findings.push(finding);
    }

    fn copied_from(&self, sound_in: &[StoreName]) -> String {
        match sound_in.first() {
            Some(store) => {
                format!(
                    "`pgconvoy repair {} --confirm` puts the sound copy of store {store} in its place",
                    self.cluster
                )
            }
            None => String::new(),
        }
    }

    fn newest_root(&self, of: &StoreFacts, finding: &mut Finding) {
        let others: Vec<&str> =
            self.facts.iter().filter(|other| other.root.is_some()).map(|other| other.store.as_str()).collect();
        finding.moments = Some(format!("everything in store {}: nobody knows any more what exists there", of.store));
        if others.is_empty() {
            finding.severity = Severity::NotRestorable;
            finding.remedy =
                "bring the object back from a version or a copy of the store; every store's history is its \
                              own, so no other has it"
                    .to_owned();
        } else {
            finding.remedy = format!(
                "restores work from {}; bring the object back from a version or a copy of this store, or put an empty \
                 store in its place, which the coordinator fills",
                others.join(", ")
            );
        }
    }

    fn backup_object(&self, broken: &Broken, finding: &mut Finding) {
        let concerned = self.backups.iter().filter(|named| broken.backups.contains(&named.backup.backup));
        let lost: Vec<String> =
            concerned.filter(|named| !has_copy(named, broken)).map(|named| named.backup.backup.to_string()).collect();
        if !lost.is_empty() {
            finding.severity = Severity::NotRestorable;
        }
        if broken.sound_in.is_empty() {
            finding.remedy = match lost.is_empty() {
                true => "the backups that need it are whole in another store".to_owned(),
                false => format!(
                    "no store has it: `pgconvoy backup {} --type full` takes one that does not need it",
                    self.cluster
                ),
            };
        }
    }

    /// A segment or history that is damaged costs what no other store serves.
    fn wal_object(&self, broken: &Broken, finding: &mut Finding) {
        let parsed = broken.key.parsed();
        if let Ok(ParsedKey::History { timeline, .. }) = parsed {
            if broken.sound_in.is_empty() {
                finding.severity = Severity::Lost;
                finding.moments = Some(format!("everything on timeline {timeline}: nobody knows where it forked off"));
                finding.remedy = "a server on that timeline has it in pg_wal: archive it again".to_owned();
            }
            return;
        }
        let Ok(ParsedKey::Wal { system_identifier, name: WalFileName::Segment(name), .. }) = parsed else { return };
        let Some(held) = self.all.get(&system_identifier) else { return };
        let number = name.number(held.wal.segment_size()).ok();
        let of_system = |named: &&Named<'_>| named.backup.system_identifier == system_identifier;
        let needing: Vec<&Named<'_>> = self
            .backups
            .iter()
            .filter(of_system)
            .filter(|named| continuity::needs(&held.wal, named.backup, name))
            .collect();
        finding.backups = needing.iter().map(|named| named.backup.backup).collect();
        if number.is_some_and(|number| held.wal.holds(name.timeline(), number)) {
            if broken.sound_in.is_empty() {
                finding.remedy = "another content of that name is served in its place".to_owned();
            }
            return;
        }
        finding.severity = match needing.iter().any(|named| !named.lacking.is_empty()) {
            true => Severity::NotRestorable,
            false => Severity::Lost,
        };
        finding.moments = number.map(|number| {
            let start = number.start(held.wal.segment_size());
            self.moments(held, name, start)
        });
        finding.remedy =
            "no store has it: if a server still has it in pg_wal, archive it again; else take a backup, from \
                          which later moments can be reached"
                .to_owned();
    }

    fn moments(&self, held: &SystemWal, name: SegmentName, start: postgres_format::Lsn) -> String {
        let after = match held.commit_before(name.timeline(), start) {
            Some(time) => format!(", after {time}"),
            None => String::new(),
        };
        format!("what was committed from {start} on timeline {} on{after}", name.timeline())
    }

    /// WAL from the start of each backup to its end, in all stores together and in each that names it.
    fn backup_wal(&mut self) {
        let mut found = Vec::new();
        for named in &self.backups {
            let backup = named.backup;
            let expected = format!("WAL from {} without a gap", continuity::own_range(backup));
            let finding = |severity, store, spans: &[SegmentSpan]| Finding {
                severity,
                what: What::BackupWal,
                store,
                object: None,
                found: format!("missing, damaged or in conflict: {}", self.spans(backup, spans)),
                expected: expected.clone(),
                backups: vec![backup.backup],
                moments: None,
                sound_in: Vec::new(),
                remedy: String::new(),
                proof: None,
            };
            if !named.lacking.is_empty() {
                let remedy =
                    "no store has it: if a server still has it in pg_wal, archive it again; else this backup is \
                              lost, and a new one should be taken now"
                        .to_owned();
                let moments = Some("all that only this backup can bring back".to_owned());
                found.push(Finding { remedy, moments, ..finding(Severity::NotRestorable, None, &named.lacking) });
                continue;
            }
            for of in named.stores.iter().filter(|of| of.failed.is_none()) {
                let held = self.wal.iter().find(|wal| wal.store == of.store && wal.failed.is_none());
                let Some(held) = held else { continue };
                let lacking = continuity::lacking(held.systems.get(&backup.system_identifier), backup);
                if !lacking.is_empty() && !self.all_lost(of, backup, &lacking) {
                    let store = of.store.clone();
                    let remedy = format!(
                        "other stores have it; `pgconvoy repair {} --confirm` has it copied, as the coordinator does by \
                         itself within a day",
                        self.cluster
                    );
                    found.push(Finding { remedy, ..finding(Severity::Damaged, Some(store), &lacking) });
                }
            }
        }
        self.findings.extend(found);
    }

    /// Whether segments are missing because their objects are damaged, which is told already.
    fn all_lost(&self, of: &StoreFacts, backup: &RootBackup, spans: &[SegmentSpan]) -> bool {
        let Some(held) = self.all.get(&backup.system_identifier) else { return false };
        let Some(lost) = of.lost.get(&backup.system_identifier) else { return false };
        spans.iter().all(|span| span.names(held.wal.segment_size()).all(|name| lost.contains(&name)))
    }

    fn systems_named(&self, system: SystemIdentifier) -> Vec<&System> {
        self.facts.iter().filter_map(|of| of.root.as_ref()?.system(system)).collect()
    }

    /// WAL that no store has, behind backups.
    fn gaps(&mut self) {
        let mut found = Vec::new();
        for (system, held) in &self.all {
            let size = held.wal.segment_size();
            let of_system = self.backups.iter().filter(|named| named.backup.system_identifier == *system);
            let backups: Vec<&RootBackup> = of_system.map(|named| named.backup).collect();
            for gap in continuity::gaps(&held.wal, &backups, &self.systems_named(*system)) {
                let next = backups.iter().filter(|backup| {
                    backup.start_lsn >= gap.range.end
                        && held.wal.on_path(gap.timeline, backup.stop_timeline, backup.consistent_lsn())
                });
                let next = next.min_by_key(|backup| backup.start_lsn);
                let after = held.commit_before(gap.timeline, gap.range.start);
                let moments = format!(
                    "what was committed on timeline {} {}{}",
                    gap.timeline,
                    after.map_or_else(|| format!("from {} on", gap.range.start), |time| format!("after {time}")),
                    next.map(|backup| format!(", until the end of backup {}, {}", backup.backup, backup.stop_time))
                        .unwrap_or_default()
                );
                let remedy = match next {
                    Some(_) => "if a server still has it in pg_wal, archive it again".to_owned(),
                    None => format!(
                        "if a server still has it in pg_wal, archive it again; `pgconvoy backup {}` now makes later \
                         moments reachable",
                        self.cluster
                    ),
                };
                found.push(Finding {
                    severity: Severity::Lost,
                    what: What::Gap,
                    store: None,
                    object: None,
                    found: format!("missing, damaged or in conflict: {}", spans_text(&gap.segments, size)),
                    expected: format!("WAL from {} without a gap", gap.range),
                    backups: gap.behind.iter().map(|place| backups[*place].backup).collect(),
                    moments: Some(moments),
                    sound_in: Vec::new(),
                    remedy,
                    proof: None,
                });
            }
        }
        self.findings.extend(found);
    }

    /// WAL that one store lacks between WAL that it has, and that others have.
    fn holes(&mut self) {
        let mut found = Vec::new();
        for (store, system, own) in
            self.wal.iter().flat_map(|store| store.systems.iter().map(move |(system, own)| (&store.store, system, own)))
        {
            let Some(all) = self.all.get(system) else { continue };
            let size = all.wal.segment_size();
            let facts = self.facts.iter().find(|of| of.store == *store);
            let kept = facts.and_then(|of| of.root.as_ref()).and_then(|root| root.system(*system));
            let damaged = facts.and_then(|of| of.lost.get(system));
            let mut holes = all.wal.without(&own.wal);
            holes.retain(|span| {
                let followed = own.wal.spans().any(|later| later.timeline == span.timeline && later.first > span.last);
                let name = SegmentName::new(span.timeline, span.last, size);
                let told = damaged.is_some_and(|lost| span.names(size).all(|name| lost.contains(&name)));
                followed && !told && kept.is_none_or(|kept| kept.keeps_wal(name))
            });
            let own_histories = own.wal.histories();
            let lacking = all.wal.histories().keys().find(|timeline| {
                let key = crate::key::history(self.cluster, *system, **timeline);
                let told = facts.is_some_and(|of| of.broken.iter().any(|broken| broken.key == key));
                !own_histories.contains_key(timeline) && !told
            });
            let missing = match (lacking, holes.as_slice()) {
                (None, []) => continue,
                (Some(timeline), _) => WalFileName::History(*timeline).to_string(),
                (None, holes) => spans_text(holes, size),
            };
            let others = self.wal.iter().filter(|other| other.store != *store && other.systems.contains_key(system));
            found.push(Finding {
                severity: Severity::Damaged,
                what: What::Gap,
                store: Some(store.clone()),
                object: None,
                found: format!("missing here: {missing}"),
                expected: "what other stores have".to_owned(),
                backups: Vec::new(),
                moments: None,
                sound_in: others.map(|other| other.store.clone()).collect(),
                remedy: format!(
                    "`pgconvoy repair {} --confirm` has it copied, as the coordinator does by itself within a day",
                    self.cluster
                ),
                proof: None,
            });
        }
        self.findings.extend(found);
    }

    /// Timelines whose history no store has.
    fn histories(&mut self) {
        let mut found = Vec::new();
        for (system, held) in &self.all {
            let unknown = held.wal.timelines().into_iter().filter(|timeline| !held.wal.knows_history(*timeline));
            for timeline in unknown {
                let damaged = self.findings.iter().any(|finding| {
                    finding.what == What::History
                        && finding.moments.is_some()
                        && finding
                            .object
                            .as_ref()
                            .is_some_and(|object| object.ends_with(&format!("{}", WalFileName::History(timeline))))
                });
                if damaged {
                    continue;
                }
                found.push(Finding {
                    severity: Severity::Lost,
                    what: What::History,
                    store: None,
                    object: None,
                    found: format!("no store has {} of system {system}", WalFileName::History(timeline)),
                    expected: "the history of every timeline that WAL is of".to_owned(),
                    backups: Vec::new(),
                    moments: Some(format!("everything on timeline {timeline}: nobody knows where it forked off")),
                    sound_in: Vec::new(),
                    remedy: "a server on that timeline has it in pg_wal: archive it again".to_owned(),
                    proof: None,
                });
            }
        }
        self.findings.extend(found);
    }
}

/// Whether a store that names a backup has a sound copy of an object that is broken in another one.
fn has_copy(named: &Named<'_>, broken: &Broken) -> bool {
    named.stores.iter().any(|of| broken.sound_in.contains(&of.store))
}
