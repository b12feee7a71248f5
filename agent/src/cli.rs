//! Commands of the daemon: run, check the configuration, say the version.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use process::exit::Exit;
use process::shutdown::Shutdown;
use tokio::runtime::Runtime;

use crate::archive::ship::chain;
use crate::check_config::Weight;
use crate::config::{self, Settings};
use crate::{check_config, daemon};

/// Threads of the runtime; reading and compressing have threads of their own.
const RUNTIME_THREADS_MAX: usize = 4;
/// Files of ours are for our user alone, unless made otherwise on purpose.
const FILE_MASK: u32 = 0o077;

/// Archives WAL and takes base backups beside one PostgreSQL data directory.
#[derive(Debug, Parser)]
#[command(name = "pgconvoy-agent", version)]
pub struct Arguments {
    /// Configuration file.
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
    /// Read the configuration, say what it comes to and what is missing, and exit.
    #[arg(long)]
    check_config: bool,
}

/// The whole program.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let exit = if error.use_stderr() { Exit::Usage } else { Exit::Ok };
            // Nothing is left to be done about a closed terminal.
            let _ = error.print();
            return exit.into();
        }
    };
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(FILE_MASK));
    let settings = match config::load(&arguments.config) {
        Ok(settings) => settings,
        Err(error) => return complain(Exit::Config, &chain(&error)),
    };
    process::tls::install_provider();
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return complain(Exit::Config, &format!("the runtime cannot be started: {error}")),
    };
    if arguments.check_config { check(&runtime, &settings, &arguments.config) } else { run(&runtime, settings) }
}

fn runtime() -> std::io::Result<Runtime> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(RUNTIME_THREADS_MAX);
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads.max(2)).enable_all().build()
}

fn check(runtime: &Runtime, settings: &Settings, path: &Path) -> ExitCode {
    let findings = runtime.block_on(check_config::check(settings));
    let bad = findings.iter().any(|finding| finding.weight == Weight::Bad);
    let mut text = format!("{}: accepted\n", path.display());
    for finding in &findings {
        text.push_str(&format!("{}: {}\n", finding.weight.word(), finding.text));
    }
    // Nothing is left to be done about a closed terminal.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
    if bad { Exit::Config.into() } else { Exit::Ok.into() }
}

fn run(runtime: &Runtime, settings: Settings) -> ExitCode {
    if let Err(error) = process::telemetry::init(settings.log_format) {
        return complain(Exit::Config, &chain(&error));
    }
    let result = runtime.block_on(async {
        let shutdown = Shutdown::on_signals().map_err(|error| error.to_string())?;
        daemon::run(settings, shutdown).await.map_err(|error| chain(&error))
    });
    match result {
        Ok(()) => Exit::Ok.into(),
        Err(error) => complain(Exit::Config, &error),
    }
}

fn complain(exit: Exit, message: &str) -> ExitCode {
    let line = format!("pgconvoy-agent: {message}\n");
    // Nothing is left to be done about a closed stderr.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
    exit.into()
}
