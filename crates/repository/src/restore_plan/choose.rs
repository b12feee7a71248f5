//! The choice of a backup, and the plan that comes of it.

use jiff::Timestamp;

use super::fork::{Course, course};
use super::held::{Held, Offered, SystemHeld};
use super::lines::{Followed, follow};
use super::reach::{check_after, check_commits, check_reached};
use super::{
    ArchiveEnd, ArchiveMode, AtGap, Impossible, Recovery, Refusal, RefusalKind, Request, RestorePlan, Role, StoreView,
    Target, TargetAction, consistent, refuse,
};
use crate::coverage::{Fork, LsnRange};
use crate::name::ClusterName;

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
    let mut refusals: Vec<Refusal> = Vec::new();
    for offered in &candidates {
        match held.choose(offered, request) {
            Ok(mut choice) => {
                let left = refusals.into_iter().filter(|refusal| refusal.kind == RefusalKind::LeftLine);
                choice.warnings.splice(0..0, left.map(|refusal| format!("passed over: {}", refusal.reason)));
                return Ok(held.finish(cluster, offered, choice, now));
            }
            Err(refusal) => refusals.push(refusal),
        }
    }
    // The newest backup that the target does not lie before says most; if it lies before all, the oldest does.
    let says_most = |refusal: &Refusal| refusal.kind != RefusalKind::BeforeBackup;
    let telling = refusals.iter().position(says_most).unwrap_or(refusals.len() - 1);
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

/// What a backup can be recovered with.
struct Choice {
    held: SystemHeld,
    followed: Followed,
    /// What was asked for, with the end that the plan had to set.
    request: Request,
    wal: LsnRange,
    last_commit_time: Option<Timestamp>,
    reasons: Vec<String>,
    warnings: Vec<String>,
}

impl Held {
    fn choose(&self, offered: &Offered, request: &Request) -> Result<Choice, Refusal> {
        let backup = &offered.backup;
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
