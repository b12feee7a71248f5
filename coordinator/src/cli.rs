//! The commands of `pgconvoy-coordinator`.

mod places;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use process::exit::Exit;
use process::{clock, telemetry, tls};
use repository::backup::origin::BackupType;

use crate::config::{self, ClusterSchedule, Settings};
use crate::stores::chain;

/// The coordinator of a pgconvoy fleet: it owns the repository and runs backups through the agents.
#[derive(Debug, Parser)]
#[command(name = "pgconvoy-coordinator", version, disable_help_subcommand = true)]
pub struct Arguments {
    /// Configuration file.
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH, global = true)]
    config: PathBuf,
    /// Check the configuration file, say what it means, and stop.
    #[arg(long)]
    check_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the coordinator; this is the default.
    Run,
    /// Print the version.
    Version,
}

/// Runs what the command line asks for.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are errors to clap; printing them can only fail on a closed pipe.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { Exit::Ok.into() };
        }
    };
    match arguments.command {
        Some(Command::Version) => {
            println!("pgconvoy-coordinator {}", env!("CARGO_PKG_VERSION"));
            Exit::Ok.into()
        }
        Some(Command::Run) | None => with_settings(&arguments.config, arguments.check_config).into(),
    }
}

fn with_settings(path: &Path, check_only: bool) -> Exit {
    let settings = match config::load(path, clock::now()) {
        Ok(settings) => settings,
        Err(error) => return say(&error, Exit::Config),
    };
    if check_only {
        return check(path, &settings);
    }
    if let Err(error) = telemetry::init(settings.log) {
        return say(&error, Exit::Config);
    }
    tls::install_provider();
    match crate::run(settings) {
        Ok(()) => Exit::Ok,
        Err(error) => {
            tracing::error!(error = chain(&error), "the coordinator ends");
            error.exit()
        }
    }
}

/// What can be checked without speaking to anybody: certificates, secrets, directories.
fn check(path: &Path, settings: &Settings) -> Exit {
    if let Some(tls) = &settings.tls
        && let Err(error) = tls.load()
    {
        return say(&error, Exit::Config);
    }
    for store in &settings.stores {
        if let Err(error) = repository::config::open(store) {
            return say(&error, Exit::Config);
        }
    }
    let notes = match places::look(settings) {
        Ok(notes) => notes,
        Err(error) => return say(&error, error.exit()),
    };
    println!("{} is good", path.display());
    println!(
        "listen           {}{}",
        settings.listen,
        if settings.tls.is_some() { " with TLS" } else { ", loopback only" }
    );
    println!("state directory  {}", settings.state_directory.display());
    println!("acknowledgement  {:?}, patience {} s", settings.ack, settings.store_patience.as_secs());
    for store in &settings.stores {
        println!("store            {} ({})", store.name, config::kind(store).word());
    }
    for schedule in &settings.schedules {
        let (cluster, cron) = (&schedule.cluster, schedule.schedule.expression());
        let next = schedule.schedule.next_after(clock::now()).map_or("never".to_owned(), |next| next.to_string());
        println!("schedule         {cluster}: \"{cron}\" in {}, next {next}", schedule.schedule.zone());
    }
    for cluster in &settings.clusters {
        for store in &settings.stores {
            let policy = settings.retention.of(cluster, &store.name);
            println!("retention        {cluster} in {}: keeps {}", store.name, policy.summary());
            let taken =
                |schedule: &ClusterSchedule| schedule.cluster == *cluster && schedule.backup_type == BackupType::Full;
            if policy.full.is_some() && !settings.schedules.iter().any(taken) {
                println!(
                    "                 no schedule takes full backups: these must be taken by hand, or nothing goes"
                );
            }
        }
    }
    for note in notes {
        println!("note             {note}");
    }
    Exit::Ok
}

fn say(error: &dyn std::error::Error, exit: Exit) -> Exit {
    eprintln!("pgconvoy-coordinator: {}", chain(error));
    exit
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
        let parsed = Arguments::try_parse_from(["pgconvoy-coordinator", "run", "--config", "/x"]).unwrap();
        assert_eq!(parsed.config, Path::new("/x"));
        assert!(Arguments::try_parse_from(["pgconvoy-coordinator", "--check-config"]).unwrap().check_config);
    }
}
