//! The process that plays PostgreSQL's part: it calls a command for one file after the other through `sh -c` in a data
//! directory, as archiver and startup process do, and reports how long each call and the whole took.
//!
//! It is a process of its own, run as the account, because starting a command is cheap only from a small process, and
//! because the kernel then adds up the CPU time of exactly what it started: what its children leave behind in the
//! background (pgbackrest's asynchronous process) is waited for and counted too.
//!
//! `.ready` files are made and become `.done` here as the archiver does it. This room measures and judges nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{WaitOptions, getpid, set_child_subreaper, wait};
use serde::{Deserialize, Serialize};

use crate::account::{self, Scratch};
use crate::{program, wait as patience};

/// First argument of the program that makes it this process.
pub const VERB: &str = "calls";
/// Clock ticks a second in `/proc/PID/stat`; fixed at 100 by the kernel's user interface on Linux.
const TICKS_PER_SECOND: f64 = 100.0;
/// How often one file is tried before the round is given up.
const ATTEMPTS: u32 = 20;
/// Pause after a call that failed.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Longest round.
const ROUND_PATIENCE: Duration = Duration::from_secs(600);

/// What a call is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// Any command; its files mean nothing.
    Plain,
    /// `archive_command`: all files are flagged first, and a file's flag changes when its call succeeded.
    Archiver,
    /// `restore_command`: the target of the last call is removed before the next.
    Startup,
}

/// Calls to be made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Calls {
    /// Where: the data directory.
    pub directory: PathBuf,
    /// The command, with `%p` and `%f`.
    pub command: String,
    /// A call for each, in order.
    pub files: Vec<String>,
    /// Whose part is played.
    pub part: Part,
    /// Pause after each call, in milliseconds: the time that a segment's replay takes.
    pub replay_ms: u64,
}

/// How they went.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Timing {
    /// Each successful call, in milliseconds.
    pub calls_ms: Vec<f64>,
    /// From before the first flag until after the last call, in seconds.
    pub wall_seconds: f64,
    /// CPU seconds of everything that was started here.
    pub cpu_seconds: f64,
    /// Calls that had to be repeated.
    pub failures: u32,
}

impl Calls {
    /// Starts the process that makes the calls, and waits for it.
    pub fn run(&self, scratch: &Scratch) -> Result<Timing> {
        let staged = stage(scratch)?;
        let mut command = account::command(staged);
        command.arg(VERB).arg(serde_json::to_string(self)?);
        let said = program::run(command, ROUND_PATIENCE)?.ok().with_context(|| self.command.clone())?;
        Ok(serde_json::from_str(&said)?)
    }

    /// Makes the calls in this process, and prints the timing.
    pub fn play(specification: &str) -> Result<()> {
        let calls: Self = serde_json::from_str(specification)?;
        set_child_subreaper(Some(getpid()))?;
        let start = Instant::now();
        let mut timing = Timing::default();
        if calls.part == Part::Archiver {
            for file in &calls.files {
                fs::write(calls.flag(file, "ready"), "")?;
            }
        }
        for file in &calls.files {
            calls.one(file, &mut timing)?;
        }
        timing.wall_seconds = start.elapsed().as_secs_f64();
        while wait(WaitOptions::empty()).is_ok() {}
        timing.cpu_seconds = children_cpu_seconds()?;
        println!("{}", serde_json::to_string(&timing)?);
        Ok(())
    }

    fn one(&self, file: &str, timing: &mut Timing) -> Result<()> {
        let target = match self.part {
            Part::Startup => "pg_wal/RECOVERYXLOG".to_owned(),
            Part::Archiver | Part::Plain => format!("pg_wal/{file}"),
        };
        if self.part == Part::Startup {
            let _ = fs::remove_file(self.directory.join(&target));
        }
        let line = self.command.replace("%p", &target).replace("%f", file);
        for _ in 0..ATTEMPTS {
            let start = Instant::now();
            let status = Command::new("/bin/sh")
                .args(["-c", &line])
                .current_dir(&self.directory)
                .stdin(Stdio::null())
                .status()?;
            let took = start.elapsed();
            if status.success() {
                timing.calls_ms.push(took.as_secs_f64() * 1e3);
                return self.after(file, &target);
            }
            timing.failures += 1;
            patience::pause(RETRY_PAUSE);
        }
        anyhow::bail!("{line} failed {ATTEMPTS} times")
    }

    fn after(&self, file: &str, target: &str) -> Result<()> {
        match self.part {
            Part::Plain => {}
            Part::Archiver => fs::rename(self.flag(file, "ready"), self.flag(file, "done"))?,
            Part::Startup => ensure!(self.directory.join(target).is_file(), "{file}: {target} was not written"),
        }
        if self.replay_ms > 0 {
            patience::pause(Duration::from_millis(self.replay_ms));
        }
        Ok(())
    }

    fn flag(&self, file: &str, state: &str) -> PathBuf {
        self.directory.join(format!("pg_wal/archive_status/{file}.{state}"))
    }
}

/// The running program where the account can run it.
fn stage(scratch: &Scratch) -> Result<PathBuf> {
    let staged = scratch.path().join("bench");
    if !staged.exists() {
        let running = Path::new("/proc/self/exe").canonicalize()?;
        fs::copy(&running, &staged).with_context(|| format!("cannot copy {}", running.display()))?;
        account::give(&staged)?;
    }
    Ok(staged)
}

/// CPU time of the children that were waited for: fields 16 and 17 of the line.
pub(super) fn children_cpu_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let after = stat.rsplit_once(')').context("no name in stat")?.1;
    let ticks: f64 = after.split_whitespace().skip(13).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS_PER_SECOND)
}
