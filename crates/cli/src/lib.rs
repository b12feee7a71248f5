//! `pgconvoy`, the operator's command: wiring from the command line to the verbs.
//!
//! One file a verb. Each verb returns what it has to say as values and an exit code from the one table; only [`output`]
//! writes to standard output, and only here errors become text. Verbs ask the coordinator; `info`, `restore` and
//! `fetch` also work from the repository alone, `info` and `backup` also through the local agent. Nothing is decided here
//! that the planning rooms below could decide.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod args;
mod backup;
mod check;
mod config;
mod confirmed;
mod coordinator;
mod error;
mod expire;
mod fetch;
mod fleet;
mod hold;
mod info;
mod local_agent;
mod operations;
mod output;
mod pace;
mod pages;
mod pgbackrest;
mod progress;
mod repair;
mod restore;
mod rpc;
mod store;
mod stores;
mod verify;

use std::ffi::OsString;

use clap::{CommandFactory, Parser};
use process::{
    exit::Exit,
    telemetry::{self, LogFormat},
};

use crate::{
    args::{Arguments, Verb},
    error::CliError,
};

/// Runs one command line and says how the process ends.
///
/// A `fetch` that ends in any unforeseen way, a panic or a misspelt option included, ends as [`fetch::unforeseen`] says:
/// PostgreSQL would take a small exit code for the end of the archive.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let fetches = verb_name(&arguments).as_deref() == Some("fetch");
    let ended = std::panic::catch_unwind(|| outcome(&arguments));
    match ended {
        Ok(Outcome::Ended(exit)) => exit,
        Ok(Outcome::Failed(error)) if fetches => {
            error.report(true);
            fetch::unforeseen()
        }
        Ok(Outcome::Failed(error)) => error.report(false),
        Ok(Outcome::NotUnderstood) | Err(_) if fetches => fetch::unforeseen(),
        Ok(Outcome::NotUnderstood) => Exit::Usage,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The verb of a command line, also of one that is not understood: its first word that is a verb.
fn verb_name(arguments: &[OsString]) -> Option<String> {
    let command = Arguments::command();
    let mut words = arguments.iter().skip(1).filter_map(|word| word.to_str());
    words.find(|word| command.find_subcommand(word).is_some()).map(str::to_owned)
}

enum Outcome {
    Ended(Exit),
    Failed(CliError),
    NotUnderstood,
}

fn outcome(arguments: &[OsString]) -> Outcome {
    match Arguments::try_parse_from(arguments) {
        Ok(arguments) => start(arguments).map_or_else(Outcome::Failed, Outcome::Ended),
        Err(error) => {
            // Help and version are answers, not errors; nobody is left to tell when printing them fails.
            let _ = error.print();
            if error.use_stderr() { Outcome::NotUnderstood } else { Outcome::Ended(Exit::Ok) }
        }
    }
}

fn start(arguments: Arguments) -> Result<Exit, CliError> {
    telemetry::init_with_default(LogFormat::Text, "warn").map_err(CliError::from_config)?;
    match &arguments.verb {
        Verb::Completions(shell) => return pages::completions(shell.shell),
        Verb::Man(pages) => return pages::man(&pages.directory, pages.descriptors.as_deref()),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| CliError::new(Exit::Negative, "cannot start the runtime").caused_by(source))?;
    let ended = runtime.block_on(verb(arguments));
    // A read that hangs in a dead mount must not hold up the answer.
    runtime.shutdown_background();
    ended
}

async fn verb(arguments: Arguments) -> Result<Exit, CliError> {
    let Arguments { global, verb } = arguments;
    match verb {
        Verb::Fetch(fetch) => fetch::fetch(&global, &fetch).await,
        Verb::Completions(_) | Verb::Man(_) => Ok(Exit::Ok),
        other => {
            let config = config::load(&global)?;
            match other {
                Verb::Cluster(cluster) => fleet::cluster(&config, &cluster).await,
                Verb::Check(check) => check::check(&config, &check).await,
                Verb::Info(info) => info::info(&config, &info).await,
                Verb::Backup(backup) => backup::backup(&config, &backup).await,
                Verb::Expire(expire) => expire::expire(&config, &expire).await,
                Verb::Hold(hold) => hold::hold(&config, &hold).await,
                Verb::Pace(pace) => pace::pace(&config, &pace).await,
                Verb::Operations(operations) => operations::operations(&config, &operations).await,
                Verb::Restore(restore) => restore::restore(&config, &restore).await,
                Verb::Rpc(rpc) => rpc::rpc(&config, &rpc).await,
                Verb::Rebuild => fleet::rebuild(&config).await,
                Verb::Verify(arguments) => verify::verify(&config, &arguments).await,
                Verb::Repair(arguments) => repair::repair(&config, &arguments).await,
                Verb::Store(arguments) => store::store(&config, &arguments).await,
                Verb::Conflict(conflict) => fleet::conflict(&config, &conflict).await,
                Verb::Node(node) => fleet::node(&config, &node).await,
                Verb::Fetch(_) | Verb::Completions(_) | Verb::Man(_) => Ok(Exit::Ok),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fetch_that_is_not_understood_is_no_usage_error_in_recovery() {
        // The tests' working directory holds no signal file, so unknown is 1 here; 2 would be the usage error.
        let line = |words: &[&str]| run(words.iter().map(OsString::from));
        assert_eq!(line(&["pgconvoy", "fetch", "--no-such-option"]), Exit::Negative);
        assert_eq!(line(&["pgconvoy", "info", "fetch", "--no-such-option"]), Exit::Usage);
        assert_eq!(line(&["pgconvoy", "--version"]), Exit::Ok);
    }
}
