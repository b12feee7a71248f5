//! The choice of backup and timeline, and the checks that it can work.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use postgres_format::{Lsn, SegmentName, SegmentSize, SystemIdentifier, Timeline, WalFileName};

use super::settings::{removed, settings, signal};
use super::{
    ArchiveEnd, ArchiveMode, AtGap, Impossible, Request, RestorePlan, Role, StoreView, Target, TargetAction,
    TargetBound, TargetTimeline, TimelineChoice, join, target_text,
};
use crate::coverage::{ArchivedWal, Fork, LsnRange, SegmentSpan};
use crate::name::{BackupId, ClusterName, StoreName};
use crate::root::RootBackup;
use crate::wal_index::CommitSample;

/// Most names or spans that one message lists.
const LISTED: usize = 5;

/// Plans a restore from what the stores hold, or says why it is impossible.
///
/// `stores` come in the order in which they are to be asked.
pub fn plan(
    cluster: &ClusterName,
    stores: &[StoreView],
    request: &Request,
    now: Timestamp,
) -> Result<RestorePlan, Impossible> {
    check_request(request)?;
    let held = Held::gather(stores, &request.without_stores)?;
    let candidates = held.candidates(request)?;
    let mut refusals = Vec::new();
    for offered in &candidates {
        match held.choose(offered, request) {
            Ok(choice) => return Ok(held.finish(cluster, offered, choice, request, now)),
            Err(refusal) => refusals.push(refusal),
        }
    }
    // The newest backup that the target does not lie before says most; if it lies before all, the oldest does.
    let telling = refusals.iter().position(|refusal| !refusal.before_backup).unwrap_or(refusals.len() - 1);
    let Refusal { reason, hint, .. } = refusals.swap_remove(telling);
    let hint = if hint.is_empty() { held.window(request) } else { hint };
    Err(Impossible { reason, hint })
}

fn check_request(request: &Request) -> Result<(), Impossible> {
    if request.role == Role::Standby && request.target != Target::Latest {
        return Err(Impossible {
            reason: "a standby follows the archive and cannot have a recovery target".to_owned(),
            hint: "leave out either the target or --standby".to_owned(),
        });
    }
    if request.at_gap == AtGap::StopBefore && request.target != Target::Latest {
        return Err(Impossible {
            reason: "stopping before a gap is for the latest target only".to_owned(),
            hint: "leave out the target".to_owned(),
        });
    }
    Ok(())
}

/// A backup and the stores that have it.
struct Offered {
    backup: RootBackup,
    stores: Vec<StoreName>,
}

/// What all stores together hold.
struct Held {
    stores: Vec<StoreName>,
    without_stores: Vec<StoreName>,
    /// Newest first.
    backups: Vec<Offered>,
    wal: BTreeMap<SystemIdentifier, ArchivedWal>,
    commits: Vec<CommitSample>,
    /// Segments with contents that exclude each other, in some store.
    conflicts: Vec<SegmentName>,
}

/// What a backup can be recovered with.
struct Choice {
    timeline: TargetTimeline,
    /// The timeline at the end of the path.
    on: Timeline,
    wal: LsnRange,
    last_commit_time: Option<Timestamp>,
    reasons: Vec<String>,
    warnings: Vec<String>,
}

/// Why one backup does not do.
struct Refusal {
    reason: String,
    /// Empty: tell what can be reached.
    hint: String,
    before_backup: bool,
}

fn refuse<T>(reason: String, hint: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason, hint: hint.into(), before_backup: false })
}

impl Held {
    fn gather(views: &[StoreView], without: &BTreeSet<StoreName>) -> Result<Self, Impossible> {
        let names: Vec<StoreName> = views.iter().map(|view| view.store().clone()).collect();
        if let Some(unknown) = without.iter().find(|name| !names.contains(name)) {
            return Err(Impossible {
                reason: format!("store {unknown} is to be left out, and there is no store of that name"),
                hint: format!("the configured stores are {}", join(&names)),
            });
        }
        let mut held = Self {
            stores: Vec::new(),
            without_stores: without.iter().cloned().collect(),
            backups: Vec::new(),
            wal: BTreeMap::new(),
            commits: Vec::new(),
            conflicts: Vec::new(),
        };
        let mut conflicts = Vec::new();
        for view in views.iter().filter(|view| !without.contains(view.store())) {
            match view {
                StoreView::Unreachable { store, reason } => {
                    return Err(Impossible {
                        reason: format!("store {store} does not answer, and may hold newer WAL: {reason}"),
                        hint: format!("--without-store {store} takes the other stores' end for the archive's end"),
                    });
                }
                StoreView::Holds { store, backups, wal } => {
                    held.stores.push(store.clone());
                    backups.iter().for_each(|backup| held.add_backup(store, backup));
                    for (system, index) in wal {
                        held.add_wal(*system, index.wal.as_ref());
                        held.commits.extend(&index.commits);
                        conflicts.extend(index.conflicts.iter().map(|conflict| (*system, conflict.name)));
                    }
                }
            }
        }
        if held.stores.is_empty() {
            return Err(Impossible {
                reason: "no store is left to restore from".to_owned(),
                hint: format!("the configured stores are {}", join(&names)),
            });
        }
        // What is in conflict in one store is served by none.
        for (system, name) in conflicts {
            if let (WalFileName::Segment(name), Some(wal)) = (name, held.wal.get_mut(&system)) {
                wal.remove(name);
                held.conflicts.push(name);
            }
        }
        held.backups.sort_by_key(|offered| std::cmp::Reverse((offered.backup.stop_time, offered.backup.backup)));
        Ok(held)
    }

    fn add_backup(&mut self, store: &StoreName, backup: &RootBackup) {
        match self.backups.iter_mut().find(|offered| offered.backup == *backup) {
            Some(offered) => offered.stores.push(store.clone()),
            None => self.backups.push(Offered { backup: backup.clone(), stores: vec![store.clone()] }),
        }
    }

    fn add_wal(&mut self, system: SystemIdentifier, wal: Option<&ArchivedWal>) {
        if let Some(wal) = wal {
            self.wal.entry(system).or_insert_with(|| ArchivedWal::new(wal.segment_size())).add_all(wal);
        }
    }

    fn candidates(&self, request: &Request) -> Result<Vec<&Offered>, Impossible> {
        let listed = || {
            let ids: Vec<BackupId> = self.backups.iter().map(|offered| offered.backup.backup).take(LISTED).collect();
            format!("the newest are {}", join(&ids))
        };
        if self.backups.is_empty() {
            return Err(Impossible {
                reason: format!(
                    "{} no backup of this cluster",
                    if self.stores.len() == 1 {
                        format!("store {} holds", self.stores[0])
                    } else {
                        format!("stores {} hold", join(&self.stores))
                    }
                ),
                hint: "take one with `pgconvoy backup`".to_owned(),
            });
        }
        let Some(wanted) = request.backup else {
            return Ok(self.backups.iter().collect());
        };
        let named: Vec<&Offered> = self.backups.iter().filter(|offered| offered.backup.backup == wanted).collect();
        match named.is_empty() {
            true => Err(Impossible { reason: format!("there is no backup {wanted}"), hint: listed() }),
            false => Ok(named),
        }
    }

    fn choose(&self, offered: &Offered, request: &Request) -> Result<Choice, Refusal> {
        let backup = &offered.backup;
        check_target_after(backup, request)?;
        let wal = self.wal_of(backup)?;
        let (timeline, on, mut reasons) = choose_timeline(backup, &wal, request)?;
        let own = LsnRange { start: backup.start_lsn, end: consistent(backup) };
        let missing = wal.missing(on, own);
        if !missing.is_empty() {
            let reason = format!("backup {} lacks WAL of its own: {}", backup.backup, self.spans_text(&missing, &wal));
            return refuse(reason, "another backup may do; `pgconvoy info` shows what each can reach");
        }
        let reach = wal.reach(on, backup.start_lsn).unwrap_or(own.end);
        let mut warnings = Vec::new();
        let end = self.check_target_reached(backup, &wal, on, reach, request, &mut warnings)?;
        if backup.page_errors > 0 {
            warnings.push(format!("backup {} holds {} corrupt pages", backup.backup, backup.page_errors));
        }
        for name in wal.fork_fallbacks(on) {
            warnings.push(format!("{name} of the parent timeline stands in for the child's up to the fork"));
        }
        let which = if request.backup.is_some() { "was asked for" } else { "is the newest that can reach the target" };
        reasons.insert(0, format!("backup {} {which}", backup.backup));
        let last_commit_time = self.last_commit(&wal, on, end);
        let wal = LsnRange { start: backup.start_lsn, end };
        Ok(Choice { timeline, on, wal, last_commit_time, reasons, warnings })
    }

    fn wal_of(&self, backup: &RootBackup) -> Result<ArchivedWal, Refusal> {
        if let Some(wal) = self.wal.get(&backup.system_identifier) {
            return Ok(wal.clone());
        }
        match SegmentSize::from_bytes(backup.segment_size_bytes) {
            Ok(size) => Ok(ArchivedWal::new(size)),
            Err(_) => {
                let (id, bytes) = (backup.backup, backup.segment_size_bytes);
                refuse(format!("backup {id} says that WAL segments have {bytes} bytes, which none have"), "")
            }
        }
    }

    /// Where the WAL that recovery reads ends.
    fn check_target_reached(
        &self,
        backup: &RootBackup,
        wal: &ArchivedWal,
        on: Timeline,
        reach: Lsn,
        request: &Request,
        warnings: &mut Vec<String>,
    ) -> Result<Lsn, Refusal> {
        let gap = wal.ranges(on).iter().map(|range| range.start).find(|start| *start > reach);
        let last_commit = self.last_commit(wal, on, reach);
        match &request.target {
            Target::Latest => match (gap, request.at_gap) {
                (None, _) => Ok(reach),
                (Some(after), AtGap::StopBefore) => {
                    warnings
                        .push(format!("WAL from {after} on is archived and will not be recovered: it follows a gap"));
                    Ok(reach)
                }
                (Some(after), AtGap::Refuse) => {
                    let lacking = LsnRange { start: reach, end: after };
                    let spans = self.spans_text(&wal.missing(on, lacking), wal);
                    let reason = format!("WAL from {lacking} is missing on the way to the latest: {spans}");
                    let until = last_commit.map(|time| format!(", the last commit before it is of {time}"));
                    let hint = format!(
                        "--stop-at-gap recovers up to {reach}{}; a backup taken after the gap would reach further",
                        until.unwrap_or_default()
                    );
                    refuse(reason, hint)
                }
            },
            Target::Immediate => Ok(consistent(backup)),
            // PostgreSQL stops at a record that begins there or later, and none does.
            Target::Lsn(lsn) if *lsn >= reach => {
                refuse(format!("WAL reaches only {reach} without a gap, and the target is {lsn}"), "")
            }
            Target::Lsn(lsn) => Ok(*lsn),
            Target::Time(time) => match last_commit {
                Some(last) if *time > last || (*time == last && request.bound == TargetBound::Inclusive) => {
                    let reason = format!(
                        "the last commit in the WAL that can be reached is of {last}: PostgreSQL would fail to find \
                         one after {time}"
                    );
                    refuse(reason, "recover to the latest, or to an earlier time")
                }
                Some(_) => Ok(reach),
                None => {
                    warnings.push("no commit time is known: whether the target is reached shows at the end".to_owned());
                    Ok(reach)
                }
            },
            Target::Xid(_) | Target::Name(_) => {
                let what = target_text(&request.target);
                warnings.push(format!("{what} is searched for while recovering, and may lie before this backup"));
                Ok(reach)
            }
        }
    }

    /// The last commit that is known to lie on the path and before a position.
    fn last_commit(&self, wal: &ArchivedWal, on: Timeline, reach: Lsn) -> Option<Timestamp> {
        let legs = wal.path(on);
        let on_path = |sample: &&CommitSample| {
            let leg = legs.iter().find(|leg| leg.timeline == sample.timeline);
            leg.is_some_and(|leg| leg.end.is_none_or(|end| sample.before <= end)) && sample.before <= reach
        };
        self.commits.iter().filter(on_path).map(|sample| sample.time).max()
    }

    fn finish(
        &self,
        cluster: &ClusterName,
        offered: &Offered,
        choice: Choice,
        request: &Request,
        now: Timestamp,
    ) -> RestorePlan {
        let backup = offered.backup.clone();
        let archive_mode = request.archive_mode.unwrap_or(match request.role {
            Role::Primary => ArchiveMode::Off,
            Role::Standby => ArchiveMode::Keep,
        });
        let settings = settings(request, choice.timeline, archive_mode);
        let path = self.wal.get(&backup.system_identifier).map(|wal| wal.path(choice.on)).unwrap_or_default();
        let later = path.windows(2).filter(|pair| pair[1].begin >= backup.start_lsn);
        let forks = later.map(|pair| Fork { timeline: pair[0].timeline, lsn: pair[1].begin }).collect();
        let archive_end = match self.without_stores.is_empty() {
            true => ArchiveEnd::Known,
            false => ArchiveEnd::Fixed { without_stores: self.without_stores.clone() },
        };
        let mut warnings = choice.warnings;
        if archive_mode == ArchiveMode::Keep && request.role == Role::Primary {
            warnings.push("the restored server archives under its origin's name: its origin must be gone".to_owned());
        }
        if request.action == TargetAction::Shutdown && request.target != Target::Latest {
            warnings.push("recovery.signal stays: the next start goes to the target and shuts down again".to_owned());
        }
        RestorePlan {
            format: 1,
            planned: now,
            cluster: cluster.clone(),
            system_identifier: backup.system_identifier,
            backup_stores: offered.stores.clone(),
            wal_stores: self.stores.clone(),
            archive_end,
            target: request.target.clone(),
            timeline: choice.timeline,
            forks,
            wal: choice.wal,
            last_commit_time: choice.last_commit_time,
            role: request.role,
            archive_mode,
            signal: signal(request.role),
            removed_settings: removed(&settings),
            settings,
            reasons: choice.reasons,
            warnings,
            backup,
        }
    }

    /// Segments that are missing, and which of them are there in contents that exclude each other.
    fn spans_text(&self, spans: &[SegmentSpan], wal: &ArchivedWal) -> String {
        let size = wal.segment_size();
        let mut texts: Vec<String> = Vec::new();
        for span in spans.iter().take(LISTED) {
            let (first, count) = (span.names(size).next(), span.count());
            if let Some(first) = first {
                let more = format!("{first} and {} more after it", count - 1);
                texts.push(if count == 1 { first.to_string() } else { more });
            }
        }
        if spans.len() > LISTED {
            texts.push("…".to_owned());
        }
        let inside = |name: &&SegmentName| {
            let number = name.number(size).ok();
            spans.iter().any(|span| {
                span.timeline == name.timeline() && number.is_some_and(|n| span.first <= n && n <= span.last)
            })
        };
        if let Some(name) = self.conflicts.iter().find(inside) {
            texts.push(format!(
                "of which {name} is stored with conflicting contents and waits for an operator's choice"
            ));
        }
        texts.join(", ")
    }

    /// What can be reached, for a hint.
    fn window(&self, request: &Request) -> String {
        let mut texts = Vec::new();
        for offered in self.backups.iter().rev() {
            let latest = Request {
                target: Target::Latest,
                role: Role::Primary,
                at_gap: AtGap::StopBefore,
                timeline: request.timeline,
                ..request.clone()
            };
            if let Ok(choice) = self.choose(offered, &latest) {
                let backup = &offered.backup;
                let until = choice.last_commit_time.map(|time| format!(" ({time})")).unwrap_or_default();
                let from = format!("{} ({})", consistent(backup), backup.stop_time);
                texts.push(format!("from {from} to {}{until} with backup {}", choice.wal.end, backup.backup));
            }
        }
        match texts.as_slice() {
            [] => "no backup can be restored now".to_owned(),
            [only] => format!("reachable is {only}"),
            [first, .., last] => format!("reachable is {first}, …, {last}"),
        }
    }
}

/// From where on the backup is consistent.
fn consistent(backup: &RootBackup) -> Lsn {
    backup.min_recovery_point.map_or(backup.stop_lsn, |point| point.max(backup.stop_lsn))
}

fn check_target_after(backup: &RootBackup, request: &Request) -> Result<(), Refusal> {
    let before = |reason| Err(Refusal { reason, hint: String::new(), before_backup: true });
    let id = backup.backup;
    match &request.target {
        Target::Time(time) if *time <= backup.stop_time => {
            let stop = backup.stop_time;
            before(format!("time {time} is before the end of backup {id} ({stop}), where it is first consistent"))
        }
        Target::Lsn(lsn) if *lsn < consistent(backup) => {
            let stop = consistent(backup);
            before(format!("position {lsn} is before the end of backup {id} ({stop}), where it is first consistent"))
        }
        _ => Ok(()),
    }
}

fn choose_timeline(
    backup: &RootBackup,
    wal: &ArchivedWal,
    request: &Request,
) -> Result<(TargetTimeline, Timeline, Vec<String>), Refusal> {
    let own = backup.stop_timeline;
    let on_path =
        |timeline| (wal.knows_history(timeline) && wal.on_path(timeline, own, consistent(backup))) || timeline == own;
    let newest = wal.timelines().into_iter().rev().find(|timeline| on_path(*timeline)).unwrap_or(own);
    match (request.timeline, request.role, &request.target) {
        (TimelineChoice::Number(wanted), ..) if !on_path(wanted) => {
            let known: Vec<Timeline> = wal.timelines().into_iter().filter(|timeline| on_path(*timeline)).collect();
            let reason = match wal.knows_history(wanted) {
                true => format!(
                    "timeline {wanted} did not come from timeline {own} at or after {}, where backup {} ends",
                    consistent(backup),
                    backup.backup
                ),
                false => format!("the history file of timeline {wanted} is not in the archive"),
            };
            let hint = if known.is_empty() { vec![own] } else { known };
            refuse(reason, format!("backup {} can be recovered along timeline {}", backup.backup, join(&hint)))
        }
        (TimelineChoice::Number(wanted), ..) => {
            Ok((TargetTimeline::Number(wanted), wanted, vec![format!("timeline {wanted} was asked for")]))
        }
        (TimelineChoice::Current, ..) => {
            Ok((TargetTimeline::Current, own, vec!["the backup's own timeline was asked for".to_owned()]))
        }
        (TimelineChoice::Newest, _, Target::Immediate) => {
            Ok((TargetTimeline::Current, own, vec!["an immediate target lies on the backup's own timeline".to_owned()]))
        }
        (TimelineChoice::Newest, Role::Standby, _) => {
            Ok((TargetTimeline::Latest, newest, vec!["a standby follows every promotion".to_owned()]))
        }
        (TimelineChoice::Newest, Role::Primary, _) => {
            let reason = format!("timeline {newest} is the newest that the backup is on");
            Ok((TargetTimeline::Number(newest), newest, vec![reason]))
        }
    }
}
