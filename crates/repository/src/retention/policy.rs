//! What an operator wants kept.

use std::time::Duration;

use jiff::tz::TimeZone;

/// How much later than the newest commit the clock may be before it is not believed.
const CLOCK_AHEAD_DEFAULT: Duration = Duration::from_secs(36 * 3600);

/// Rules by which backups are kept; one that any rule keeps stays. Without any rule everything is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// So many of the newest full backups, and all that were taken since the oldest of them.
    pub full: Option<u32>,
    /// So many of the newest backups of any type.
    pub any: Option<u32>,
    /// All that are younger.
    pub age: Option<Duration>,
    /// The newest of so many days that have one.
    pub daily: u32,
    /// The newest of so many weeks, from Monday, that have one.
    pub weekly: u32,
    /// The newest of so many months that have one.
    pub monthly: u32,
    /// The newest of so many years that have one.
    pub yearly: u32,
    /// How far back recovery to any point in time is promised. Alone it keeps all backups that are younger; beside other
    /// rules it keeps those that it needs. Without it, WAL is kept from the oldest backup on.
    pub window: Option<Duration>,
    /// The zone in which days, weeks, months and years begin.
    pub zone: TimeZone,
    /// How much later than the newest commit of the store `now` may be; else nothing is removed.
    pub clock_ahead: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            full: None,
            any: None,
            age: None,
            daily: 0,
            weekly: 0,
            monthly: 0,
            yearly: 0,
            window: None,
            zone: TimeZone::UTC,
            clock_ahead: CLOCK_AHEAD_DEFAULT,
        }
    }
}

impl Policy {
    /// Whether no rule says that anything is ever removed.
    pub fn keeps_everything(&self) -> bool {
        self.has_no_choice() && self.window.is_none()
    }

    /// Whether no rule but the window chooses among backups.
    pub(super) fn has_no_choice(&self) -> bool {
        let periods = self.daily + self.weekly + self.monthly + self.yearly;
        self.full.is_none() && self.any.is_none() && self.age.is_none() && periods == 0
    }

    /// The age up to which all are kept.
    pub(super) fn age(&self) -> Option<Duration> {
        if self.has_no_choice() { self.window } else { self.age }
    }

    /// The rules in a few words; "everything" without any.
    pub fn summary(&self) -> String {
        if self.keeps_everything() {
            return "everything".to_owned();
        }
        let counted = |count: u32, what: &str| (count > 0).then(|| format!("{count} {what}"));
        let parts = [
            self.any.map(|count| format!("newest {count}")),
            self.full.map(|count| format!("newest {count} full and what was taken since")),
            self.age().map(|age| format!("younger than {}", span(age))),
            counted(self.daily, "daily"),
            counted(self.weekly, "weekly"),
            counted(self.monthly, "monthly"),
            counted(self.yearly, "yearly"),
            self.window.map(|window| format!("a window of {}", span(window))),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// A length of time in its largest whole unit.
pub(super) fn span(length: Duration) -> String {
    let seconds = length.as_secs();
    let units = [(86_400, "d"), (3600, "h"), (60, "min")];
    let whole = units.into_iter().find(|(unit, _)| seconds >= *unit && seconds.is_multiple_of(*unit));
    whole.map_or_else(|| format!("{seconds} s"), |(unit, name)| format!("{} {name}", seconds / unit))
}
