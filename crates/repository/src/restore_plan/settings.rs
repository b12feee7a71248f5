//! Recovery settings by PostgreSQL's rules.
//!
//! At most one target may be set. Versions 14 to 18 evaluate settings in the order of the files and lines, and an
//! *empty* target after a real one is fatal, before it is fine; `postgresql.conf` may hold a forgotten target. So all
//! targets are written blank first and the wanted one last.

use postgres_format::auto_conf;
use serde::{Deserialize, Serialize};

use super::target::time_text;
use super::{ArchiveMode, Request, Role, Target, TargetAction, TargetBound, TargetTimeline};

/// The settings of which at most one may have a value.
const TARGETS: [&str; 5] =
    ["recovery_target", "recovery_target_lsn", "recovery_target_name", "recovery_target_time", "recovery_target_xid"];

/// Settings of an earlier life that would change or stop recovery, or tie the copy to its origin's place; a setting that a
/// version does not know stops it, as `promote_trigger_file` does 16 and newer.
const REMOVED: [&str; 15] = [
    "archive_cleanup_command",
    "data_directory",
    "external_pid_file",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "recovery_end_command",
    "recovery_min_apply_delay",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_timeline",
    "restore_command",
    "standby_mode",
    "synchronous_standby_names",
    "trigger_file",
];

/// Settings that an operator may add, each with the first major version that knows it: those about recovery and standby
/// servers (sections 20.5.3, 20.5.4 and 20.6.3 of PostgreSQL's manual), and those that a hot standby needs as large as its
/// primary has them (section 27.4.3). A setting that a server does not know keeps it from starting.
const OPTIONS: [(&str, u32); 22] = [
    ("archive_cleanup_command", 14),
    ("hot_standby", 14),
    ("hot_standby_feedback", 14),
    ("max_connections", 14),
    ("max_locks_per_transaction", 14),
    ("max_prepared_transactions", 14),
    ("max_standby_archive_delay", 14),
    ("max_standby_streaming_delay", 14),
    ("max_wal_senders", 14),
    ("max_worker_processes", 14),
    ("primary_conninfo", 14),
    ("primary_slot_name", 14),
    ("recovery_end_command", 14),
    ("recovery_min_apply_delay", 14),
    ("recovery_prefetch", 15),
    ("restore_command", 14),
    ("sync_replication_slots", 17),
    ("wal_decode_buffer_size", 15),
    ("wal_receiver_create_temp_slot", 14),
    ("wal_receiver_status_interval", 14),
    ("wal_receiver_timeout", 14),
    ("wal_retrieve_retry_interval", 14),
];

/// Names of the settings that a server of a major version takes as further recovery settings; of any without one.
pub fn recovery_options(postgres_major: Option<u32>) -> impl Iterator<Item = &'static str> {
    let known = OPTIONS.iter().filter(move |(_, since)| postgres_major.is_none_or(|major| *since <= major));
    known.map(|(name, _)| *name)
}

/// One setting for `postgresql.auto.conf`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// Its value, not quoted.
    pub value: String,
}

/// Which signal file to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Signal {
    /// `recovery.signal`
    #[serde(rename = "recovery.signal")]
    Recovery,
    /// `standby.signal`
    #[serde(rename = "standby.signal")]
    Standby,
}

impl Signal {
    /// The file's name.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Recovery => "recovery.signal",
            Self::Standby => "standby.signal",
        }
    }
}

/// What a restored server is told about its recovery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// Which signal file to write. One only: with both, a leftover one sends a promoted server back into recovery
    /// (before 19).
    pub signal: Signal,
    /// Settings to write, in this order and after everything else: a blank target after a real one stops PostgreSQL.
    pub settings: Vec<Setting>,
    /// Settings to remove from `postgresql.auto.conf` first.
    pub removed_settings: Vec<String>,
}

impl Recovery {
    /// What a request comes to on a timeline. `archive_mode` and `hot_standby` of the backup stay unless they must change.
    pub fn of(request: &Request, timeline: TargetTimeline, archive_mode: ArchiveMode) -> Self {
        let settings = settings(request, timeline, archive_mode);
        let written = settings.iter().map(|setting| setting.name.as_str());
        let mut removed: Vec<String> = REMOVED.into_iter().chain(TARGETS).chain(written).map(str::to_owned).collect();
        removed.sort_unstable();
        removed.dedup();
        let signal = match request.role {
            Role::Primary => Signal::Recovery,
            Role::Standby => Signal::Standby,
        };
        Self { signal, settings, removed_settings: removed }
    }

    /// With further settings of an operator, none of them a target. They win over those that are there.
    #[must_use]
    pub fn with_options(mut self, options: impl IntoIterator<Item = Setting>) -> Self {
        for option in options {
            self.removed_settings.push(option.name.clone());
            self.settings.push(option);
        }
        self
    }

    /// Has the server run this instead of what was asked for.
    pub fn set_restore_command(&mut self, command: &str) {
        for setting in self.settings.iter_mut().filter(|setting| setting.name == "restore_command") {
            command.clone_into(&mut setting.value);
        }
    }

    /// The new text of `postgresql.auto.conf`.
    pub fn auto_conf(&self, old: &str) -> String {
        let settings = self.settings.iter().map(|setting| (setting.name.as_str(), setting.value.as_str()));
        auto_conf::rewrite(old, &self.removed_settings, "Written by pgconvoy restore.", settings)
    }
}

/// The settings to write, in order.
fn settings(request: &Request, timeline: TargetTimeline, archive_mode: ArchiveMode) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut set = |name: &str, value: String| settings.push(Setting { name: name.to_owned(), value });
    if archive_mode == ArchiveMode::Off {
        set("archive_mode", "off".to_owned());
    }
    set("restore_command", request.restore_command.clone());
    let timeline = match timeline {
        TargetTimeline::Number(timeline) => timeline.to_string(),
        TargetTimeline::Current => "current".to_owned(),
        TargetTimeline::Latest => "latest".to_owned(),
    };
    set("recovery_target_timeline", timeline);
    let wanted = wanted(&request.target);
    if wanted.is_some() {
        let (action, needs_readers) = match request.action {
            TargetAction::Promote => ("promote", false),
            TargetAction::Pause => ("pause", true),
            TargetAction::Shutdown => ("shutdown", false),
        };
        set("recovery_target_action", action.to_owned());
        if needs_readers {
            // Without it a server that should pause shuts down.
            set("hot_standby", "on".to_owned());
        }
        let inclusive = if request.bound == TargetBound::Inclusive { "on" } else { "off" };
        set("recovery_target_inclusive", inclusive.to_owned());
    }
    for name in TARGETS.into_iter().filter(|name| Some(*name) != wanted.as_ref().map(|(name, _)| *name)) {
        set(name, String::new());
    }
    if let Some((name, value)) = wanted {
        set(name, value);
    }
    settings
}

fn wanted(target: &Target) -> Option<(&'static str, String)> {
    match target {
        Target::Latest => None,
        Target::Immediate => Some(("recovery_target", "immediate".to_owned())),
        Target::Time(time) => Some(("recovery_target_time", time_text(*time))),
        Target::Lsn(lsn) => Some(("recovery_target_lsn", lsn.to_string())),
        Target::Xid(xid) => Some(("recovery_target_xid", xid.to_string())),
        Target::Name(name) => Some(("recovery_target_name", name.as_ref().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_life_is_stripped_and_the_rest_kept() {
        let old = "# Do not edit this file manually!\nRecovery_Target_Time = 'x'\nwork_mem = '8MB'\nprimary_conninfo='host=a'\narchive_mode = 'on'\nhot_standby = 'off'\n  promote_trigger_file = '/t'\n";
        let recovery = |mode| Recovery::of(&Request::latest("fetch %f"), TargetTimeline::Current, mode);
        let text = recovery(ArchiveMode::Off).auto_conf(old);
        let kept = "# Do not edit this file manually!\nwork_mem = '8MB'\nhot_standby = 'off'\n# Written";
        assert!(text.starts_with(kept), "{text}");
        assert!(!text.contains("host=a") && !text.contains("'x'") && !text.contains("/t'"), "{text}");
        assert!(text.contains("archive_mode = 'off'"), "{text}");
        let text = recovery(ArchiveMode::Keep).auto_conf(old);
        assert!(text.contains("archive_mode = 'on'") && !text.contains("archive_mode = 'off'"), "{text}");
    }

    #[test]
    fn options_of_the_operator_take_the_place_of_what_was_there() {
        let option = |name: &str, value: &str| Setting { name: name.to_owned(), value: value.to_owned() };
        let standby = Request { role: Role::Standby, ..Request::latest("fetch %f") };
        let recovery = Recovery::of(&standby, TargetTimeline::Latest, ArchiveMode::Keep)
            .with_options([option("primary_conninfo", "host=db1"), option("hot_standby_feedback", "on")]);
        let text = recovery.auto_conf("Hot_Standby_Feedback = 'off'\nprimary_conninfo = 'host=old'\n");
        assert!(text.ends_with("primary_conninfo = 'host=db1'\nhot_standby_feedback = 'on'\n"), "{text}");
        assert!(!text.contains("off") && !text.contains("old"), "{text}");
    }

    #[test]
    fn options_are_those_that_a_version_knows() {
        let knows = |major, name: &str| recovery_options(major).any(|known| known == name);
        assert!(knows(None, "recovery_prefetch") && knows(Some(15), "recovery_prefetch"));
        assert!(!knows(Some(14), "recovery_prefetch") && !knows(Some(16), "sync_replication_slots"));
        assert!(!knows(None, "work_mem") && !knows(None, "recovery_target_time"));
    }
}
