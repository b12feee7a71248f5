//! The `[scrub]` table: when a part of the repository is read each night, and how fast.

use jiff::Timestamp;
use process::units::Size;
use serde::Deserialize;

use crate::schedule::Schedule;
use crate::scrub::Settings;

/// The table as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawScrub {
    cron: String,
    zone: String,
    rate: Size,
    source_rate: Size,
}

impl Default for RawScrub {
    fn default() -> Self {
        let rate = Size::from_bytes(16 << 20);
        Self { cron: "30 0 * * *".to_owned(), zone: super::default_zone(), rate, source_rate: rate }
    }
}

impl RawScrub {
    /// Checked.
    pub(super) fn resolve(self, now: Timestamp) -> Result<Settings, String> {
        let schedule = Schedule::new(&self.cron, &self.zone, now).map_err(|error| format!("[scrub]: {error}"))?;
        Ok(Settings {
            schedule,
            bytes_per_second: self.rate.bytes(),
            source_bytes_per_second: self.source_rate.bytes(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::read;

    #[test]
    fn the_scrub_is_on_by_default_and_has_a_rate_for_each_side() {
        let base =
            "state_directory = \"/var/lib/pgconvoy\"\n[[store]]\nname = \"r\"\nkind = \"directory\"\npath = \"/r\"\n";
        let with = |table: &str| read(&format!("{base}{table}"));
        let scrub = with("").unwrap().scrub;
        assert_eq!((scrub.bytes_per_second, scrub.schedule.expression()), (16 << 20, "30 0 * * *"));
        assert_eq!(scrub.source_bytes_per_second, 16 << 20);
        let uneven = with("[scrub]\nrate = \"0\"\nsource_rate = \"1MiB\"\n").unwrap().scrub;
        assert_eq!((uneven.bytes_per_second, uneven.source_bytes_per_second), (0, 1 << 20));
        assert!(with("[scrub]\ncron = \"never\"\n").unwrap_err().contains("[scrub]"));
    }
}
