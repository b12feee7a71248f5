//! The choice of a backup, and the plan that comes of it.

use jiff::Timestamp;

use super::fork::{Course, course};
use super::held::{Held, Offered, SystemHeld};
use super::lines::{Followed, follow};
use super::reach::{check_after, check_commits, check_reached};
use super::{
    ArchiveEnd, ArchiveMode, AtGap, Impossible, Recovery, Refusal, RefusalKind, Request, RestorePlan, Role, StoreView,
    Target, TargetAction, Testimonies, consistent, contradicted, refuse,
};
use crate::coverage::{Fork, LsnRange};
use crate::name::ClusterName;
use crate::root::RootBackup;
use postgres_format::timeline_history::TimelineHistory;

/// What the making of a plan needs next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// To hear what the stores' WAL says to the witnesses of a backup, along this history.
    Ask(Box<RootBackup>, TimelineHistory),
    /// Nothing: this is the plan.
    Planned(Box<RestorePlan>),
}

/// As [`plan`], of a backup that was heard; asks for what has to be known for that. Whoever answers each question once comes
/// to an end.
///
/// # Errors
/// When the restore is impossible.
pub fn next_step(
    cluster: &ClusterName,
    stores: &[StoreView],
    request: &Request,
    testimonies: &Testimonies,
    now: Timestamp,
) -> Result<Step, Impossible> {
    let plan = plan(cluster, stores, request, testimonies, now)?;
    if testimonies.contains_key(&plan.backup.backup) {
        return Ok(Step::Planned(Box::new(plan)));
    }
    let history = Held::gather(stores, &request.without_stores)?.history_of(&plan.backup);
    Ok(Step::Ask(Box::new(plan.backup), history))
}

/// Plans a restore from what the stores hold, or says why it is impossible. Backups whose WAL is another server's, as far as
/// that was heard, are passed over.
///
/// `stores` come in the order in which they are to be asked.
///
/// # Errors
/// When it is impossible.
pub fn plan(
    cluster: &ClusterName,
    stores: &[StoreView],
    request: &Request,
    testimonies: &Testimonies,
    now: Timestamp,
) -> Result<RestorePlan, Impossible> {
    check_request(request)?;
    let mut held = Held::gather(stores, &request.without_stores)?;
    held.hear(testimonies);
    let candidates = held.candidates(request)?;
    let mut refusals: Vec<Refusal> = Vec::new();
    for offered in &candidates {
        match held.choose(offered, request) {
            Ok(mut choice) => {
                let passed = refusals.into_iter().filter(|refusal| refusal.kind == RefusalKind::PassedOver);
                choice.warnings.splice(0..0, passed.map(|refusal| format!("passed over: {}", refusal.reason)));
                return Ok(held.finish(cluster, offered, choice, now));
            }
            Err(refusal) => refusals.push(refusal),
        }
    }
    // The newest backup that the target does not lie before says most; if it lies before all, the oldest does.
    let says_most = |refusal: &Refusal| refusal.kind != RefusalKind::BeforeBackup;
    let telling = refusals.iter().position(says_most).unwrap_or(refusals.len() - 1);
    let Refusal { reason, hint, .. } = refusals.swap_remove(telling);
    let hint = if hint.is_empty() { held.reachable(request) } else { hint };
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

/// Refuses a backup whose segments are another server's: recovery would find no checkpoint, or end in a mixture.
fn check_witnesses(offered: &Offered) -> Result<(), Refusal> {
    let Some((store, name)) = offered.heard.contradiction() else { return Ok(()) };
    Err(Refusal {
        reason: contradicted(&offered.backup, store, name),
        hint: String::new(),
        kind: RefusalKind::PassedOver,
    })
}

/// What a backup can be recovered with.
pub(super) struct Choice {
    held: SystemHeld,
    pub(super) followed: Followed,
    /// What was asked for, with the end that the plan had to set.
    request: Request,
    pub(super) wal: LsnRange,
    pub(super) last_commit_time: Option<Timestamp>,
    reasons: Vec<String>,
    warnings: Vec<String>,
}

impl Held {
    pub(super) fn choose(&self, offered: &Offered, request: &Request) -> Result<Choice, Refusal> {
        let backup = &offered.backup;
        check_witnesses(offered)?;
        let mut warnings = check_after(backup, request, self.newest_xid(backup.system_identifier))?;
        let held = self.system_of(backup)?;
        let followed = follow(backup, &held, request)?;
        let Course { followed, request, limit } = course(backup, &held, followed, request)?;
        let on = followed.on;
        check_commits(backup, held.last_commit(on, consistent(backup)), &request)?;
        let own = LsnRange { start: backup.start_lsn, end: consistent(backup) };
        let missing = held.wal.missing(on, own);
        if !missing.is_empty() {
            let reason = format!("backup {} lacks WAL of its own: {}", backup.backup, held.spans_text(&missing));
            return refuse(reason, "another backup may do; `pgconvoy info` shows what each can reach");
        }
        let reach = held.wal.reach(on, backup.start_lsn).unwrap_or(own.end);
        let reach = limit.map_or(reach, |limit| limit.min(reach));
        let end = check_reached(backup, &held, on, reach, &request, &mut warnings)?;
        if backup.page_errors > 0 {
            warnings.push(format!("backup {} holds {} corrupt pages", backup.backup, backup.page_errors));
        }
        warnings.extend(followed.warnings.iter().cloned());
        warnings.extend(offered.heard.unknown().map(|(store, why)| {
            let id = backup.backup;
            format!("the WAL of backup {id} in store {store} could not be compared with its server's: {why}")
        }));
        let which = if request.backup.is_some() { "was asked for" } else { "is the newest that can reach the target" };
        let reasons = vec![format!("backup {} {which}", backup.backup), followed.reason.clone()];
        let last_commit_time = held.last_commit_after(on, consistent(backup), end);
        let wal = LsnRange { start: backup.start_lsn, end };
        Ok(Choice { held, followed, request, wal, last_commit_time, reasons, warnings })
    }

    fn finish(&self, cluster: &ClusterName, offered: &Offered, choice: Choice, now: Timestamp) -> RestorePlan {
        let request = &choice.request;
        let backup = offered.backup.clone();
        let archive_mode = request.archive_mode.unwrap_or(match request.role {
            Role::Primary => ArchiveMode::Off,
            Role::Standby => ArchiveMode::Keep,
        });
        let path = choice.held.wal.path(choice.followed.on);
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
            timeline: choice.followed.target,
            forks,
            wal: choice.wal,
            last_commit_time: choice.last_commit_time,
            role: request.role,
            archive_mode,
            recovery: Recovery::of(request, choice.followed.target, archive_mode),
            reasons: choice.reasons,
            warnings,
            backup,
        }
    }
}
