//! When a cluster's next base backup is due. Pure: `now` and the last run are arguments.
//!
//! A schedule is a cron expression with a time zone. A run that fell into an outage is caught up once: however many
//! occurrences were missed, one backup is due, because two full backups a minute apart help nobody. At a clock change
//! an occurrence inside the skipped hour runs right after it, one in the repeated hour runs once for a fixed hour.
//!
//! It starts nothing and knows no nodes; which node is fit is decided in [`crate::fleet`].

use std::str::FromStr;

use croner::Cron;
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// A cron expression in a time zone, checked.
#[derive(Debug, Clone)]
pub struct Schedule {
    cron: Cron,
    expression: String,
    zone: TimeZone,
}

/// Why a schedule was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// The expression is not cron syntax.
    #[error("\"{expression}\" is not a cron expression such as \"30 2 * * *\"")]
    Expression {
        /// What was written.
        expression: String,
        /// Why not.
        #[source]
        source: croner::errors::CronError,
    },
    /// The expression names no moment at all, such as 30 February.
    #[error("\"{expression}\" never comes")]
    Never {
        /// What was written.
        expression: String,
    },
    /// The zone is not in the time zone database.
    #[error("\"{zone}\" is not a time zone such as \"UTC\" or \"Europe/Berlin\"")]
    Zone {
        /// What was written.
        zone: String,
        /// Why not.
        #[source]
        source: jiff::Error,
    },
}

/// What a schedule says at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// A backup is due.
    Now {
        /// The occurrence that makes it due; the oldest one that has not run.
        occurrence: Timestamp,
        /// Why, for people.
        reason: String,
    },
    /// Nothing is due before this moment.
    At(Timestamp),
    /// No occurrence is left.
    Never,
}

/// An occurrence this many seconds late is called missed in the reason.
const LATE_SECONDS: i64 = 60;

impl Schedule {
    /// Reads a cron expression (five fields, or six with seconds first, or `@daily` and its like) and a zone.
    ///
    /// # Errors
    /// See [`ScheduleError`]. `now` is only used to find out that the expression comes at all.
    pub fn new(expression: &str, zone: &str, now: Timestamp) -> Result<Self, ScheduleError> {
        let cron = Cron::from_str(expression)
            .map_err(|source| ScheduleError::Expression { expression: expression.to_owned(), source })?;
        let zone = TimeZone::get(zone).map_err(|source| ScheduleError::Zone { zone: zone.to_owned(), source })?;
        let schedule = Self { cron, expression: expression.to_owned(), zone };
        match schedule.next_after(now) {
            Some(_) => Ok(schedule),
            None => Err(ScheduleError::Never { expression: expression.to_owned() }),
        }
    }

    /// The expression as it was written.
    pub fn expression(&self) -> &str {
        &self.expression
    }

    /// The zone's name.
    pub fn zone(&self) -> &str {
        self.zone.iana_name().unwrap_or("UTC")
    }

    /// The first occurrence after `moment`; `None` when there is none.
    pub fn next_after(&self, moment: Timestamp) -> Option<Timestamp> {
        let zoned = moment.to_zoned(self.zone.clone());
        self.cron.find_next_occurrence(&zoned, false).ok().map(|next| next.timestamp())
    }

    /// Whether a run is due at `now`, when the last one started (or the schedule began) at `anchor`.
    pub fn due(&self, anchor: Timestamp, now: Timestamp) -> Due {
        let Some(occurrence) = self.next_after(anchor) else { return Due::Never };
        if occurrence > now {
            return Due::At(occurrence);
        }
        let late_seconds = now.as_second().saturating_sub(occurrence.as_second());
        let reason = if late_seconds > LATE_SECONDS {
            format!("schedule \"{}\" missed its run of {occurrence} and catches up", self.expression)
        } else {
            format!("schedule \"{}\" at {occurrence}", self.expression)
        };
        Due::Now { occurrence, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn schedule(expression: &str, zone: &str) -> Schedule {
        Schedule::new(expression, zone, at("2026-01-01T00:00:00Z")).unwrap()
    }

    #[test]
    fn the_next_run_follows_the_zone_through_clock_changes() {
        let check = |expression: &str, zone: &str, after: &str, expected: &str| {
            let next = schedule(expression, zone).next_after(at(after)).unwrap();
            assert_eq!(next, at(expected), "{expression} in {zone} after {after}");
        };
        check("30 2 * * *", "UTC", "2026-11-23T02:29:59Z", "2026-11-23T02:30:00Z");
        check("30 2 * * *", "UTC", "2026-11-23T02:30:00Z", "2026-11-24T02:30:00Z");
        // Winter and summer in Berlin are one and two hours ahead of UTC.
        check("0 3 * * *", "Europe/Berlin", "2026-01-10T12:00:00Z", "2026-01-11T02:00:00Z");
        check("0 3 * * *", "Europe/Berlin", "2026-07-10T12:00:00Z", "2026-07-11T01:00:00Z");
        // 02:30 does not exist on 29 March 2026: it runs when the clock has jumped to 03:00.
        check("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", "2026-03-29T01:00:00Z");
        // 02:30 comes twice on 25 October 2026 and runs at the first.
        check("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", "2026-10-25T00:30:00Z");
        check("30 2 * * *", "Europe/Berlin", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z");
        check("0 4 * * SUN", "America/New_York", "2026-11-23T00:00:00Z", "2026-11-29T09:00:00Z");
        check("@daily", "UTC", "2026-11-23T00:00:00Z", "2026-11-24T00:00:00Z");
    }

    #[test]
    fn missed_runs_are_caught_up_once() {
        let nightly = schedule("0 2 * * *", "UTC");
        let anchor = at("2026-11-20T02:00:00Z");
        assert_eq!(nightly.due(anchor, at("2026-11-21T01:59:59Z")), Due::At(at("2026-11-21T02:00:00Z")));
        let Due::Now { occurrence, reason } = nightly.due(anchor, at("2026-11-21T02:00:05Z")) else { panic!() };
        assert_eq!(occurrence, at("2026-11-21T02:00:00Z"));
        assert!(!reason.contains("missed"), "{reason}");
        // Three nights passed: one run is due, and after it the next night's.
        let now = at("2026-11-23T09:00:00Z");
        let Due::Now { occurrence, reason } = nightly.due(anchor, now) else { panic!() };
        assert_eq!(occurrence, at("2026-11-21T02:00:00Z"));
        assert!(reason.contains("missed"), "{reason}");
        assert_eq!(nightly.due(now, now), Due::At(at("2026-11-24T02:00:00Z")));
    }

    #[test]
    fn nonsense_is_refused_with_what_was_written() {
        let check = |expression: &str, zone: &str, part: &str| {
            let error = Schedule::new(expression, zone, at("2026-01-01T00:00:00Z")).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        };
        check("every day", "UTC", "every day");
        check("61 * * * *", "UTC", "61 * * * *");
        check("0 2 * * *", "Europe/Atlantis", "Europe/Atlantis");
        check("0 0 30 2 *", "UTC", "never comes");
        check("", "UTC", "not a cron expression");
    }
}
