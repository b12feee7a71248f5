//! Recovery settings by PostgreSQL's rules.
//!
//! At most one target may be set. Versions 14 to 18 evaluate settings in the order of the files and lines, and an
//! *empty* target after a real one is fatal, before it is fine; `postgresql.conf` may hold a forgotten target. So all
//! targets are written blank first and the wanted one last.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::{ArchiveMode, Request, Role, Setting, Signal, Target, TargetAction, TargetBound, TargetTimeline};

/// The settings of which at most one may have a value.
const TARGETS: [&str; 5] =
    ["recovery_target", "recovery_target_lsn", "recovery_target_name", "recovery_target_time", "recovery_target_xid"];

/// Settings of an earlier life that would change or stop recovery; a setting that a version does not know stops it, as
/// `promote_trigger_file` does 16 and newer.
const REMOVED: [&str; 12] = [
    "archive_cleanup_command",
    "primary_conninfo",
    "primary_slot_name",
    "recovery_end_command",
    "recovery_min_apply_delay",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_timeline",
    "restore_command",
    "archive_mode",
    "hot_standby",
    "promote_trigger_file",
];

/// What to take out of `postgresql.auto.conf`. `archive_mode` and `hot_standby` only if the plan sets them.
pub(super) fn removed(settings: &[Setting]) -> Vec<String> {
    let conditional = |name: &str| matches!(name, "archive_mode" | "hot_standby");
    let written = |name: &str| settings.iter().any(|setting| setting.name == name);
    let plain = REMOVED.into_iter().filter(|name| !conditional(name) || written(name));
    plain.chain(TARGETS).map(str::to_owned).collect()
}

/// The settings to write, in order.
pub(super) fn settings(request: &Request, timeline: TargetTimeline, archive_mode: ArchiveMode) -> Vec<Setting> {
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
        Target::Name(name) => Some(("recovery_target_name", name.clone())),
    }
}

/// With a numeric offset, because PostgreSQL would read a bare time in the server's zone.
pub(super) fn time_text(time: Timestamp) -> String {
    time.to_zoned(TimeZone::UTC).strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string()
}

/// One signal file only: with both, a leftover one sends a promoted server back into recovery (before 19).
pub(super) fn signal(role: Role) -> Signal {
    match role {
        Role::Primary => Signal::Recovery,
        Role::Standby => Signal::Standby,
    }
}
