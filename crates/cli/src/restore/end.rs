//! PURE: the end of a plan as words of its `restore_command`.

use repository::restore_plan::{AtGap, RestorePlan, Role};

/// The end of our own command.
const ARGUMENTS: &str = " %f \"%p\"";

/// Our `restore_command` with the end that the plan counts on. A standby has none: it follows the archive as it grows.
pub(super) fn with_end(command: &str, plan: &RestorePlan, at_gap: AtGap) -> String {
    match (plan.role, command.strip_suffix(ARGUMENTS)) {
        (Role::Primary, Some(words)) => {
            let stop = if at_gap == AtGap::StopBefore { " --stop-there" } else { "" };
            format!("{words} --until {}{stop}{ARGUMENTS}", plan.wal.end)
        }
        _ => command.to_owned(),
    }
}
