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
}

impl Default for RawScrub {
    fn default() -> Self {
        Self { cron: "30 0 * * *".to_owned(), zone: super::default_zone(), rate: Size::from_bytes(16 << 20) }
    }
}

impl RawScrub {
    /// Checked; none if the rate is 0.
    pub(super) fn resolve(self, now: Timestamp) -> Result<Option<Settings>, String> {
        let schedule = Schedule::new(&self.cron, &self.zone, now).map_err(|error| format!("[scrub]: {error}"))?;
        let bytes_per_second = self.rate.bytes();
        Ok((bytes_per_second > 0).then_some(Settings { schedule, bytes_per_second }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::read;

    #[test]
    fn the_scrub_is_on_unless_its_rate_is_nothing() {
        let base =
            "state_directory = \"/var/lib/pgconvoy\"\n[[store]]\nname = \"r\"\nkind = \"directory\"\npath = \"/r\"\n";
        let with = |table: &str| read(&format!("{base}{table}"));
        let scrub = with("").unwrap().scrub.unwrap();
        assert_eq!((scrub.bytes_per_second, scrub.schedule.expression()), (16 << 20, "30 0 * * *"));
        assert!(with("[scrub]\nrate = \"0\"\n").unwrap().scrub.is_none());
        assert_eq!(with("[scrub]\nrate = \"1MiB\"\n").unwrap().scrub.unwrap().bytes_per_second, 1 << 20);
        assert!(with("[scrub]\ncron = \"never\"\n").unwrap_err().contains("[scrub]"));
    }
}
