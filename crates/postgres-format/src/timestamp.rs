//! Time as PostgreSQL stores it: microseconds since 2000-01-01 00:00:00 UTC (`TimestampTz`).

use serde::{Deserialize, Serialize};

/// Microseconds from the Unix epoch to PostgreSQL's.
const EPOCH_UNIX_MICROS: i64 = 946_684_800_000_000;

/// A moment in PostgreSQL's own reckoning. A number of microseconds in serde formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PgTimestamp(i64);

impl PgTimestamp {
    /// The moment `micros` microseconds after 2000-01-01 00:00:00 UTC (negative: before).
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// The moment `micros` microseconds after 1970-01-01 00:00:00 UTC, clamped to what PostgreSQL can hold.
    pub const fn from_unix_micros(micros: i64) -> Self {
        Self(micros.saturating_sub(EPOCH_UNIX_MICROS))
    }

    /// Microseconds since 2000-01-01 00:00:00 UTC.
    pub const fn as_micros(self) -> i64 {
        self.0
    }

    /// Microseconds since 1970-01-01 00:00:00 UTC, clamped to 64 bits (PostgreSQL's `infinity` is clamped).
    pub const fn unix_micros(self) -> i64 {
        self.0.saturating_add(EPOCH_UNIX_MICROS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs() {
        assert_eq!(PgTimestamp::from_micros(0).unix_micros(), 946_684_800_000_000);
        assert_eq!(PgTimestamp::from_unix_micros(0).as_micros(), -946_684_800_000_000);
        assert_eq!(PgTimestamp::from_micros(i64::MAX).unix_micros(), i64::MAX);
        assert_eq!(PgTimestamp::from_unix_micros(i64::MIN).as_micros(), i64::MIN);
    }
}
