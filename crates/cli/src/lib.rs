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
mod coordinator;
mod error;
mod fetch;
mod fleet;
mod info;
mod local_agent;
mod operations;
mod output;
mod pages;
mod progress;
mod restore;
mod rpc;
mod stores;

use std::ffi::OsString;

use clap::Parser;
use process::{
    exit::Exit,
    telemetry::{self, LogFormat},
};

use crate::{
    args::{Arguments, Verb},
    error::CliError,
};

/// Runs one command line and says how the process ends.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are answers, not errors; nobody is left to tell when printing them fails.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Ok };
        }
    };
    let quiet = matches!(arguments.verb, Verb::Fetch(_));
    match start(arguments) {
        Ok(exit) => exit,
        Err(error) => error.report(quiet),
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
    runtime.block_on(verb(arguments))
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
                Verb::Operations(operations) => operations::operations(&config, &operations).await,
                Verb::Restore(restore) => restore::restore(&config, &restore).await,
                Verb::Rpc(rpc) => rpc::rpc(&config, &rpc).await,
                Verb::Rebuild => fleet::rebuild(&config).await,
                Verb::Conflict(conflict) => fleet::conflict(&config, &conflict).await,
                Verb::Node(node) => fleet::node(&config, &node).await,
                Verb::Fetch(_) | Verb::Completions(_) | Verb::Man(_) => Ok(Exit::Ok),
            }
        }
    }
}
