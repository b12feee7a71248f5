//! Stretches of time to any moment of which the cluster can be restored. Pure.
//!
//! ```text
//! WAL      ════════════════════       ═════════════════════
//! backups     A       B                   C          D           two windows: from the end of A to the first gap, and
//!             ├────────────────▶          ├────────────────▶     from the end of C to the end of the archive
//! ```
//!
//! Backups from which recovery gets to the same place, along the same timeline, share a window. A moment between two windows
//! cannot be restored to. Nothing is said about backups that a restore would pass over unless it is told to use them.

use std::collections::BTreeSet;

use jiff::Timestamp;
use postgres_format::{SystemIdentifier, Timeline};

use super::held::Held;
use super::{AtGap, Impossible, Request, Role, StoreView, Target, Testimonies, consistent};
use crate::coverage::LsnRange;
use crate::name::{BackupId, StoreName};

/// A stretch of time that can be restored to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// PostgreSQL's system identifier.
    pub system_identifier: SystemIdentifier,
    /// Along which timeline.
    pub timeline: Timeline,
    /// When its oldest backup ended: any moment from then on, as far as WAL goes.
    pub from: Timestamp,
    /// From where that one is consistent to where WAL ends, or has a gap.
    pub wal: LsnRange,
    /// Time of the last commit known to be in that WAL.
    pub last_commit: Option<Timestamp>,
    /// Its backups, oldest first.
    pub backups: Vec<BackupId>,
}

/// The windows of all stores together but those left out, in the order of their oldest backups.
///
/// # Errors
/// When a store that is not left out does not answer.
pub fn windows(
    stores: &[StoreView],
    without_stores: &BTreeSet<StoreName>,
    testimonies: &Testimonies,
) -> Result<Vec<Window>, Impossible> {
    let mut held = Held::gather(stores, without_stores)?;
    held.hear(testimonies);
    Ok(held.windows(&Request { without_stores: without_stores.clone(), ..Request::latest("") }))
}

impl Held {
    /// The windows along the timeline, and with the backup, that are asked for.
    fn windows(&self, request: &Request) -> Vec<Window> {
        let latest =
            Request { target: Target::Latest, role: Role::Primary, at_gap: AtGap::StopBefore, ..request.clone() };
        let mut windows: Vec<Window> = Vec::new();
        for offered in self.backups.iter().rev() {
            let Ok(choice) = self.choose(offered, &latest) else { continue };
            let backup = &offered.backup;
            let found = Window {
                system_identifier: backup.system_identifier,
                timeline: choice.followed.on,
                from: backup.stop_time,
                wal: LsnRange { start: consistent(backup), end: choice.wal.end },
                last_commit: choice.last_commit_time,
                backups: vec![backup.backup],
            };
            let place = |window: &Window| (window.system_identifier, window.timeline, window.wal.end);
            match windows.iter_mut().find(|window| place(window) == place(&found)) {
                Some(window) => window.backups.push(backup.backup),
                None => windows.push(found),
            }
        }
        windows
    }

    /// What can be reached, for a hint.
    pub(super) fn reachable(&self, request: &Request) -> String {
        let text = |window: &Window| {
            let until = window.last_commit.map(|time| format!(" ({time})")).unwrap_or_default();
            let which = if window.backups.len() == 1 { "with backup" } else { "with backups from" };
            let (LsnRange { start, end }, from) = (window.wal, window.from);
            format!("from {start} ({from}) to {end}{until} {which} {}", window.backups[0])
        };
        match self.windows(request).as_slice() {
            [] => "no backup can be restored now".to_owned(),
            [only] => format!("reachable is {}", text(only)),
            [one, other] => format!("reachable is {}, and {}", text(one), text(other)),
            [first, .., last] => format!("reachable is {}, …, {}", text(first), text(last)),
        }
    }
}
