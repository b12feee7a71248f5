//! Which time it is, as far as removing things is concerned.
//!
//! A clock that runs ahead would make everything old. Ages are therefore counted from the newest sign of a database
//! server (the stop of a backup, a commit in the WAL) if that is earlier than our clock says: a cluster of which nothing
//! new comes does not grow older. The commits of the store's root bound our clock from both sides; outside of that nothing
//! is removed until somebody has looked.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::policy::span;
use super::{Facts, Policy};

/// How far our clock may be behind the newest commit: clocks of hosts that agree are not further apart.
const CLOCK_BEHIND_MAX: Duration = Duration::from_secs(5 * 60);

pub(super) struct Clock {
    pub(super) as_of: Timestamp,
    pub(super) frozen: Option<String>,
}

pub(super) fn look(facts: &Facts<'_>, policy: &Policy, now: Timestamp) -> Clock {
    let root = facts.root;
    let stopped = root.backups.iter().map(|backup| backup.stop_time).max();
    let heard = stopped.max(facts.last_commit);
    let as_of = heard.map_or(now, |heard| heard.min(now));
    let behind = root.written.duration_since(now);
    let ahead = now.duration_since(root.written);
    let frozen = if behind > signed(CLOCK_BEHIND_MAX) {
        Some(format!(
            "the clock says {now}, and root {} was committed at {}: a clock is wrong, nothing is removed",
            root.generation.get(),
            root.written
        ))
    } else if ahead > signed(policy.clock_ahead) {
        Some(format!(
            "the clock says {now}, more than {} after the newest commit at {}: nothing is removed until something newer \
             is committed",
            span(policy.clock_ahead),
            root.written
        ))
    } else {
        None
    };
    Clock { as_of, frozen }
}

fn signed(length: Duration) -> SignedDuration {
    SignedDuration::try_from(length).unwrap_or(SignedDuration::MAX)
}

/// The time so long before another; the earliest there is if that lies further back.
pub(super) fn before(at: Timestamp, length: Duration) -> Timestamp {
    at.checked_sub(signed(length)).unwrap_or(Timestamp::MIN)
}
