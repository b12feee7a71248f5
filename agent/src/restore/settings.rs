//! PURE: what a restored server is told about recovery: the new text of `postgresql.auto.conf` and the signal file.
//!
//! The server evaluates settings in file order and refuses two recovery targets, also when the second one is empty and
//! comes last (`src/backend/access/transam/xlogrecovery.c`, the assign hooks of `recovery_target*`). Therefore everything
//! an earlier restore may have left is stripped, then every kind of target is written empty (`postgresql.conf` may hold
//! one), and the wanted target comes last.

use std::fmt::Write;

use postgres_format::{Lsn, Timeline};

/// Settings of an earlier life that must not act on this one.
const STRIPPED: [&str; 20] = [
    "recovery_target",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
    "recovery_target_lsn",
    "recovery_target_inclusive",
    "recovery_target_timeline",
    "recovery_target_action",
    "recovery_min_apply_delay",
    "primary_conninfo",
    "primary_slot_name",
    "restore_command",
    "archive_cleanup_command",
    "recovery_end_command",
    "promote_trigger_file",
    "trigger_file",
    "standby_mode",
    "data_directory",
    "external_pid_file",
    "synchronous_standby_names",
];
/// Every kind of target, written empty before the wanted one.
const TARGETS: [&str; 5] =
    ["recovery_target", "recovery_target_name", "recovery_target_time", "recovery_target_xid", "recovery_target_lsn"];

/// Where recovery stops.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StopAt {
    /// At the end of the archive.
    #[default]
    End,
    /// As soon as the backup is consistent.
    Immediate,
    /// At a commit time, with a numeric offset from UTC.
    Time(jiff::Timestamp),
    /// At a WAL location.
    Lsn(Lsn),
    /// At a transaction.
    Xid(u64),
    /// At a named restore point.
    Name(String),
}

/// Whether recovery stops after or before the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Boundary {
    /// After it: the target is part of the result.
    #[default]
    Inclusive,
    /// Before it.
    Exclusive,
}

/// What the server does at the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetAction {
    /// Open for business on a new timeline.
    #[default]
    Promote,
    /// Wait, readable, for `pg_wal_replay_resume()`.
    Pause,
    /// Stop.
    Shutdown,
}

/// The life the restored server will lead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Purpose {
    /// Recover to the target, then follow [`TargetAction`].
    #[default]
    Recover,
    /// Stay a standby.
    Standby,
}

impl Purpose {
    /// The file whose presence tells the server.
    pub fn signal_file(self) -> &'static str {
        match self {
            Self::Recover => "recovery.signal",
            Self::Standby => "standby.signal",
        }
    }
}

/// What happens with `archive_mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Archiving {
    /// Off: a clone must never archive into the repository of its origin.
    #[default]
    Off,
    /// As the backup had it: the restored server takes over the cluster.
    Keep,
}

/// Which timeline to follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Follow {
    /// The newest there is.
    #[default]
    Newest,
    /// The backup's own.
    Current,
    /// This one.
    Number(Timeline),
}

/// All recovery settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoverySettings {
    /// The command that fetches WAL, such as `pgconvoy-wal fetch %f "%p"`.
    pub restore_command: String,
    /// Recover, or stay a standby.
    pub purpose: Purpose,
    /// Where to stop; a standby ignores it.
    pub stop_at: StopAt,
    /// Before or after the target.
    pub boundary: Boundary,
    /// What to do there.
    pub action: TargetAction,
    /// The timeline to follow; the newest is the backup's own for a target that needs no other.
    pub timeline: Follow,
    /// How a standby reaches its primary.
    pub primary_conninfo: Option<String>,
    /// Whether the restored server archives.
    pub archiving: Archiving,
    /// Further settings an operator asked for, name and value.
    pub more: Vec<(String, String)>,
}

/// The new text of `postgresql.auto.conf`.
pub fn rewrite(auto_conf: &str, settings: &RecoverySettings) -> String {
    let strip_archiving = settings.archiving == Archiving::Off;
    let mut text = String::with_capacity(auto_conf.len() + 1024);
    for line in auto_conf.lines() {
        let name = setting_name(line);
        let dropped = STRIPPED.contains(&name.as_str()) || (strip_archiving && name == "archive_mode");
        if !dropped {
            text.push_str(line);
            text.push('\n');
        }
    }
    text.push_str("# Written by pgconvoy restore.\n");
    for name in TARGETS {
        set(&mut text, name, "");
    }
    set(&mut text, "restore_command", &settings.restore_command);
    if let Some(conninfo) = &settings.primary_conninfo {
        set(&mut text, "primary_conninfo", conninfo);
    }
    if strip_archiving {
        set(&mut text, "archive_mode", "off");
    }
    for (name, value) in &settings.more {
        set(&mut text, name, value);
    }
    set_target(&mut text, settings);
    text
}

fn set_target(text: &mut String, settings: &RecoverySettings) {
    let immediate = settings.stop_at == StopAt::Immediate;
    let timeline = match settings.timeline {
        Follow::Current => "current".to_owned(),
        // A backup that is consistent needs no other timeline than its own.
        Follow::Newest if immediate => "current".to_owned(),
        Follow::Newest => "latest".to_owned(),
        Follow::Number(timeline) => timeline.to_string(),
    };
    set(text, "recovery_target_timeline", &timeline);
    if settings.purpose == Purpose::Standby {
        return;
    }
    let action = match settings.action {
        TargetAction::Promote => "promote",
        TargetAction::Pause => "pause",
        TargetAction::Shutdown => "shutdown",
    };
    set(text, "recovery_target_action", action);
    set(text, "recovery_target_inclusive", if settings.boundary == Boundary::Inclusive { "on" } else { "off" });
    match &settings.stop_at {
        StopAt::End => {}
        StopAt::Immediate => set(text, "recovery_target", "immediate"),
        StopAt::Time(time) => set(text, "recovery_target_time", &time.strftime("%Y-%m-%d %H:%M:%S.%6f+00").to_string()),
        StopAt::Lsn(lsn) => set(text, "recovery_target_lsn", &lsn.to_string()),
        StopAt::Xid(xid) => set(text, "recovery_target_xid", &xid.to_string()),
        StopAt::Name(name) => set(text, "recovery_target_name", name),
    }
}

/// One assignment; quotes and backslashes doubled as in `write_auto_conf_file` (`src/backend/utils/misc/guc.c`).
fn set(text: &mut String, name: &str, value: &str) {
    let quoted = value.replace('\\', "\\\\").replace('\'', "''");
    writeln!(text, "{name} = '{quoted}'").expect("writing to a string cannot fail");
}

/// The setting a line assigns, in lower case; empty for comments and blank lines.
fn setting_name(line: &str) -> String {
    let name =
        line.trim_start().split(|character: char| character == '=' || character == '#' || character.is_whitespace());
    name.into_iter().next().unwrap_or_default().to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets_of(stop_at: StopAt) -> Vec<String> {
        let settings = RecoverySettings { stop_at, ..RecoverySettings::default() };
        let text = rewrite("", &settings);
        text.lines().filter(|line| TARGETS.contains(&setting_name(line).as_str())).map(str::to_owned).collect()
    }

    #[test]
    fn the_wanted_target_comes_after_all_blanks() {
        let time: jiff::Timestamp = "2026-11-23T03:41:38.5Z".parse().unwrap();
        for (stop_at, expected) in [
            (StopAt::Immediate, "recovery_target = 'immediate'"),
            (StopAt::Time(time), "recovery_target_time = '2026-11-23 03:41:38.500000+00'"),
            (StopAt::Lsn(Lsn::new(0x1_0000_0028)), "recovery_target_lsn = '1/28'"),
            (StopAt::Xid(7), "recovery_target_xid = '7'"),
            (StopAt::Name("it's\\so".into()), "recovery_target_name = 'it''s\\\\so'"),
        ] {
            let lines = targets_of(stop_at);
            assert_eq!(lines.len(), TARGETS.len() + 1);
            assert!(lines[..TARGETS.len()].iter().all(|line| line.ends_with("= ''")));
            assert_eq!(lines.last().map(String::as_str), Some(expected));
        }
        assert_eq!(targets_of(StopAt::End).len(), TARGETS.len());
    }

    #[test]
    fn an_earlier_life_is_stripped_and_the_rest_kept() {
        let old = "# Do not edit this file manually!\nRecovery_Target_Time = 'x'\nwork_mem = '8MB'\nprimary_conninfo='host=a'\narchive_mode = 'on'\n  promote_trigger_file = '/t'\n";
        let text = rewrite(old, &RecoverySettings::default());
        assert!(text.starts_with("# Do not edit this file manually!\nwork_mem = '8MB'\n# Written"));
        assert!(!text.contains("host=a") && !text.contains("'x'") && !text.contains("/t'"));
        assert!(text.contains("archive_mode = 'off'"));
        let kept = rewrite(old, &RecoverySettings { archiving: Archiving::Keep, ..RecoverySettings::default() });
        assert!(kept.contains("archive_mode = 'on'") && !kept.contains("'off'"));
    }

    #[test]
    fn timelines_and_standby() {
        let text = |settings: RecoverySettings| rewrite("", &settings);
        let seventeen = Follow::Number(Timeline::new(17).unwrap());
        assert!(
            text(RecoverySettings { timeline: seventeen, ..Default::default() })
                .contains("recovery_target_timeline = '17'")
        );
        assert!(
            text(RecoverySettings { stop_at: StopAt::Immediate, ..Default::default() })
                .contains("timeline = 'current'")
        );
        let lsn = StopAt::Lsn(Lsn::new(40));
        assert!(
            text(RecoverySettings { stop_at: lsn, timeline: Follow::Current, ..Default::default() })
                .contains("timeline = 'current'")
        );
        let standby =
            text(RecoverySettings { purpose: Purpose::Standby, stop_at: StopAt::Xid(4), ..Default::default() });
        assert!(standby.contains("timeline = 'latest'") && !standby.contains("'4'"));
    }
}
