//! `pgconvoy fetch`: a `restore_command` for servers without an agent, from the repository alone.
//!
//! Exit codes decide whether PostgreSQL recovers on. In archive recovery 1 means "the archive ends here" and promotes,
//! so it is said only when every listed store said itself that it has no such file; anything unknown is asked again
//! until `--wait` has passed, then 255 stops the server. With `standby.signal`, and outside recovery (pg_rewind), 255
//! would end a server that could go on, so unknown becomes 1 after at most [`STANDBY_WAIT_MAX`] and is asked again by
//! PostgreSQL itself. Whether a file that is there may be given, and one that is absent is the end, is judged in `line.rs`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use agent::local::FetchMode;
use postgres_format::{SystemIdentifier, WalFileName, control_file::ControlBasics};
use process::{clock::Monotonic, exit::Exit};
use repository::wal::Fetched;

use crate::{
    args::{FetchArgs, Global},
    config,
    error::CliError,
    output,
    stores::{self, Opened, Selection},
};

pub(crate) mod line;

/// Longest a standby is kept waiting.
const STANDBY_WAIT_MAX: Duration = Duration::from_secs(5);
/// Pause between two tries while a store is away.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Where PostgreSQL keeps its identity, below the working directory of a `restore_command`.
const CONTROL_FILE: &str = "global/pg_control";

/// `pgconvoy fetch`
pub(crate) async fn fetch(global: &Global, arguments: &FetchArgs) -> Result<Exit, CliError> {
    let mode = FetchMode::of_directory(Path::new("."));
    let Ok(name) = arguments.name.parse::<WalFileName>() else {
        // Not a name the archive could hold, so this is a definite answer.
        output::complain(&format!("pgconvoy: \"{}\" is not the name of a WAL file", arguments.name));
        return Ok(Exit::Negative);
    };
    if let Err(error) = agent::regular_file::check_target(&arguments.target) {
        output::complain(&format!("pgconvoy: cannot write {}: {error}", arguments.target.display()));
        return Ok(unknown(mode));
    }
    let longest = match mode {
        FetchMode::Recovery => arguments.wait.duration(),
        FetchMode::Standby | FetchMode::Other => arguments.wait.duration().min(STANDBY_WAIT_MAX),
    };
    let wait = longest.max(RETRY_PAUSE);
    let started = Monotonic::now();
    loop {
        let remaining = wait.saturating_sub(started.elapsed());
        let reason = match tokio::time::timeout(remaining, attempt(global, arguments, &name, mode)).await {
            Ok(Ok(Outcome::Written)) => return Ok(Exit::Ok),
            Ok(Ok(Outcome::Absent)) => return Ok(Exit::Negative),
            Ok(Ok(Outcome::Refused(reason))) => {
                output::complain(&format!("pgconvoy: {reason}"));
                return Ok(unknown(mode));
            }
            Ok(Ok(Outcome::Unknown(reason))) => reason,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the stores did not answer in time".to_owned(),
        };
        if started.elapsed() + RETRY_PAUSE >= wait {
            output::complain(&format!("pgconvoy: cannot tell whether {name} is in the archive: {reason}"));
            return Ok(unknown(mode));
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// How a fetch ends that could not even be tried.
pub(crate) fn unforeseen() -> Exit {
    unknown(FetchMode::of_directory(Path::new(".")))
}

/// What an unknown answer becomes.
fn unknown(mode: FetchMode) -> Exit {
    match mode {
        FetchMode::Recovery => Exit::Unknown,
        FetchMode::Standby | FetchMode::Other => Exit::Negative,
    }
}

enum Outcome {
    Written,
    Absent,
    Unknown(String),
    /// The server must not go on with it, and recovery must not end there.
    Refused(String),
}

async fn attempt(
    global: &Global,
    arguments: &FetchArgs,
    name: &WalFileName,
    mode: FetchMode,
) -> Result<Outcome, CliError> {
    let config = match &arguments.repository {
        Some(path) => config::load_repository(path)?,
        None => config::load(global)?,
    };
    let (without, repository) = (arguments.without_store.as_slice(), arguments.expect_repository);
    let selection = Selection { without, repository, ..Selection::default() };
    let Opened { stores, away, .. } = stores::open(&config, selection).await?;
    let cluster = match &arguments.cluster {
        Some(cluster) => cluster.clone(),
        None => stores::only_cluster(&stores).await?,
    };
    let system = system_identifier(Path::new(CONTROL_FILE))?;
    let absent_elsewhere: Vec<String> =
        away.iter().map(|away| format!("store {}: {}", away.store, away.reason)).collect();
    let outcome = match repository::wal::fetch(&stores, &cluster, system, name, &arguments.target).await {
        Fetched::Written { .. } => Outcome::Written,
        Fetched::Absent if absent_elsewhere.is_empty() => Outcome::Absent,
        Fetched::Absent => Outcome::Unknown(absent_elsewhere.join("; ")),
        Fetched::Unknown { mut reasons } => {
            reasons.extend(absent_elsewhere);
            Outcome::Unknown(reasons.join("; "))
        }
    };
    let asked = line::Asked { stores: &stores, cluster: &cluster, system, name, target: &arguments.target };
    Ok(line::judge(outcome, asked, mode, arguments.end).await)
}

fn system_identifier(path: &Path) -> Result<SystemIdentifier, CliError> {
    let wrong = |path: PathBuf| format!("cannot read {} in the working directory", path.display());
    let bytes = std::fs::read(path)
        .map_err(|source| CliError::new(Exit::Postgres, wrong(path.to_owned())).caused_by(source))?;
    let control = ControlBasics::parse(&bytes)
        .map_err(|source| CliError::new(Exit::Postgres, wrong(path.to_owned())).caused_by(source))?;
    Ok(control.system_identifier)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_stops_recovery_but_never_a_standby() {
        assert_eq!(unknown(FetchMode::Recovery), Exit::Unknown);
        assert_eq!(unknown(FetchMode::Standby), Exit::Negative);
        assert_eq!(unknown(FetchMode::Other), Exit::Negative);
    }
}
