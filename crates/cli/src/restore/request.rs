//! PURE: the command line as a request for a plan, and as further settings of the restored server.

use std::collections::BTreeSet;

use process::exit::Exit;
use repository::{
    name::StoreName,
    restore_plan::{
        ArchiveMode, AtGap, Request, Role, Setting, Target, TargetAction, TargetBound, TimelineChoice, recovery_options,
    },
};

use crate::{
    args::{self, RestoreArgs},
    error::CliError,
};

/// What is asked for.
pub(super) fn request(
    arguments: &RestoreArgs,
    without_stores: BTreeSet<StoreName>,
    restore_command: String,
) -> Result<Request, CliError> {
    if let Some((name, _)) = arguments.recovery_option.iter().find(|(name, _)| is_decided(name)) {
        return Err(CliError::new(
            Exit::Usage,
            format!("{name} is set by options of its own, not by --recovery-option"),
        ));
    }
    check_options(arguments, None)?;
    let chosen = option(arguments, "restore_command");
    Ok(Request {
        target: target(&arguments.target),
        bound: if arguments.exclusive { TargetBound::Exclusive } else { TargetBound::Inclusive },
        action: match arguments.target_action {
            None | Some(args::TargetAction::Promote) => TargetAction::Promote,
            Some(args::TargetAction::Pause) => TargetAction::Pause,
            Some(args::TargetAction::Shutdown) => TargetAction::Shutdown,
        },
        timeline: match arguments.target_timeline {
            None | Some(args::TargetTimeline::Latest) => TimelineChoice::Newest,
            Some(args::TargetTimeline::Current) => TimelineChoice::Current,
            Some(args::TargetTimeline::Number(timeline)) => TimelineChoice::Number(timeline),
        },
        backup: arguments.backup,
        role: if arguments.standby { Role::Standby } else { Role::Primary },
        archive_mode: arguments.archive_mode.map(|mode| match mode {
            args::ArchiveMode::Off => ArchiveMode::Off,
            args::ArchiveMode::Keep => ArchiveMode::Keep,
        }),
        at_gap: if arguments.stop_at_gap { AtGap::StopBefore } else { AtGap::Refuse },
        without_stores,
        restore_command: chosen.unwrap_or(restore_command),
    })
}

/// Refuses settings that are not about recovery, or that a server of a major version does not know and would not start with.
pub(super) fn check_options(arguments: &RestoreArgs, postgres_major: Option<u32>) -> Result<(), CliError> {
    let known: Vec<&str> = recovery_options(postgres_major).collect();
    let Some((name, _)) = arguments.recovery_option.iter().find(|(name, _)| !known.contains(&name.as_str())) else {
        return Ok(());
    };
    let of = postgres_major.map(|major| format!(" of PostgreSQL {major}")).unwrap_or_default();
    Err(CliError::new(Exit::Usage, format!("--recovery-option: {name} is no setting{of} for recovery"))
        .hint(format!("expected one of {}; others belong into postgresql.conf after the restore", known.join(", "))))
}

/// Whether the command line has its own words for a setting. Names come in lower case.
fn is_decided(name: &str) -> bool {
    name == "archive_mode" || name.starts_with("recovery_target")
}

/// Whether the server is given another `restore_command` than ours.
pub(super) fn has_own_command(arguments: &RestoreArgs) -> bool {
    option(arguments, "restore_command").is_some()
}

fn option(arguments: &RestoreArgs, name: &str) -> Option<String> {
    arguments.recovery_option.iter().rev().find(|(given, _)| given == name).map(|(_, value)| value.clone())
}

fn target(target: &args::TargetArgs) -> Target {
    if let Some(time) = target.target_time {
        Target::Time(time)
    } else if let Some(lsn) = target.target_lsn {
        Target::Lsn(lsn)
    } else if let Some(xid) = target.target_xid {
        Target::Xid(xid)
    } else if let Some(name) = &target.target_name {
        Target::Name(name.clone())
    } else if target.immediate {
        Target::Immediate
    } else {
        Target::Latest
    }
}

/// Further settings of the restored server. `restore_command` is part of what is asked for.
pub(super) fn options(arguments: &RestoreArgs) -> impl Iterator<Item = Setting> {
    let further = arguments.recovery_option.iter().filter(|(name, _)| name != "restore_command");
    further.map(|(name, value)| Setting { name: name.clone(), value: value.clone() })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Arguments, Verb};

    fn parsed(more: &[&str]) -> RestoreArgs {
        let line = [&["pgconvoy", "restore", "c1", "--to", "/x"], more].concat();
        let Verb::Restore(arguments) = Arguments::try_parse_from(line).unwrap().verb else {
            panic!("expected restore")
        };
        *arguments
    }

    fn read(more: &[&str]) -> Result<Request, CliError> {
        request(&parsed(more), BTreeSet::new(), "default %f".to_owned())
    }

    #[test]
    fn the_default_is_everything_and_off() {
        assert_eq!(read(&[]).unwrap(), Request::latest("default %f"));
    }

    #[test]
    fn options_become_the_request() {
        let request =
            read(&["--target-lsn", "0/3000028", "--exclusive", "--target-action", "pause", "--archive-mode", "keep"])
                .unwrap();
        assert_eq!(request.target, Target::Lsn("0/3000028".parse().unwrap()));
        assert_eq!((request.bound, request.action), (TargetBound::Exclusive, TargetAction::Pause));
        assert_eq!(request.archive_mode, Some(ArchiveMode::Keep));
        assert_eq!(read(&["--recovery-option", "restore_command=cp /a/%f %p"]).unwrap().restore_command, "cp /a/%f %p");
        assert!(read(&["--recovery-option", "recovery_target_xid=7"]).is_err());
        assert!(read(&["--recovery-option", "archive_mode=on"]).is_err());
    }

    #[test]
    fn names_of_settings_are_told_apart_as_postgresql_does() {
        for decided in ["Recovery_Target_Time=2026-11-23", "RECOVERY_TARGET=immediate", "Archive_Mode=on"] {
            assert!(read(&["--recovery-option", decided]).is_err(), "{decided}");
        }
        let more = ["--recovery-option", "Restore_Command=cp /a/%f %p", "--recovery-option", "Primary_Slot_Name=a"];
        assert_eq!(read(&more).unwrap().restore_command, "cp /a/%f %p");
        let further: Vec<String> = options(&parsed(&more)).map(|setting| setting.name).collect();
        assert_eq!(further, ["primary_slot_name"]);
    }

    #[test]
    fn a_setting_that_is_not_about_recovery_is_refused_with_the_known_ones() {
        let error = read(&["--recovery-option", "work_mem=8MB"]).unwrap_err();
        assert_eq!(error.exit(), Exit::Usage);
        assert!(error.to_string().contains("work_mem is no setting for recovery"), "{error}");
        let newer = parsed(&["--recovery-option", "recovery_prefetch=off"]);
        check_options(&newer, Some(15)).unwrap();
        assert!(check_options(&newer, Some(14)).unwrap_err().to_string().contains("PostgreSQL 14"));
    }
}
