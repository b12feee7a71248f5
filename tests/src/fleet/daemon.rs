//! A daemon of ours as a process: started with its configuration file and perhaps an armed crash point and shortened
//! patiences, awaited, killed, stopped. What it is to its callers is the business of [`super`].

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::account::{self, Program};
use crate::postgres;
use crate::program::{Farewell, Running};
use crate::wait;

/// Longest wait for a daemon to come up.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Longest wait for a daemon to end after SIGTERM.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// Where a started daemon crashes, if anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CrashPoint<'a> {
    /// Nowhere.
    None,
    /// At `NAME` or `NAME:N`.
    At(&'a str),
    /// It stops there until it is let go on.
    StopAt(&'a str),
}

/// A daemon that may be running.
#[derive(Debug)]
pub(super) struct Daemon {
    /// In messages.
    pub(super) name: String,
    /// Which one.
    pub(super) program: Program,
    /// Its configuration file.
    pub(super) config: PathBuf,
    /// Where its output goes.
    pub(super) log: PathBuf,
    /// What it waits for less long than installed ones do, `NAME=SECONDS`, separated by commas.
    pub(super) patience: String,
    /// By how many seconds its clock is ahead of the host's; below zero, behind.
    pub(super) clock_shift: i64,
    running: Option<Running>,
}

impl Daemon {
    /// One that was not started yet.
    pub(super) fn new(name: String, program: Program, config: PathBuf, log: PathBuf) -> Self {
        Self { name, program, config, log, patience: String::new(), clock_shift: 0, running: None }
    }

    /// The command that starts it.
    pub(super) fn command(&self) -> Result<std::process::Command> {
        let mut command = account::command(self.program.path()?);
        command.arg("--config").arg(&self.config);
        Ok(command)
    }

    /// Starts it and waits until it is up.
    pub(super) fn start(&mut self, crash: CrashPoint<'_>, mut up: impl FnMut() -> bool) -> Result<()> {
        let mut command = self.command()?;
        match crash {
            CrashPoint::None => {}
            CrashPoint::At(point) => drop(command.env("PGCONVOY_CRASH_AT", point)),
            CrashPoint::StopAt(point) => drop(command.env("PGCONVOY_STOP_AT", point)),
        }
        if self.clock_shift != 0 {
            command.env("PGCONVOY_CLOCK_SHIFT", self.clock_shift.to_string());
        }
        if !self.patience.is_empty() {
            command.env("PGCONVOY_PATIENCE", &self.patience);
        }
        let mut running = Running::start(&self.name, command, &self.log, Farewell::Kill)?;
        let waited = wait::value(&format!("{} is up", self.name), START_PATIENCE, || {
            let ended = running.ended()?;
            ensure!(ended.is_none(), "{} ended: {ended:?}", running.name());
            Ok(up().then_some(()))
        });
        waited.with_context(|| postgres::tail(&running.log(), 20))?;
        self.running = Some(running);
        Ok(())
    }

    /// The running process.
    pub(super) fn process(&mut self) -> Result<&mut Running> {
        self.running.as_mut().with_context(|| format!("{} was not started", self.name))
    }

    /// Whether it is there.
    pub(super) fn is_running(&mut self) -> bool {
        self.running.as_mut().is_some_and(Running::is_running)
    }

    /// kill -9.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.process()?.kill()?;
        self.running = None;
        Ok(())
    }

    /// SIGTERM and a clean end.
    pub(super) fn stop(&mut self) -> Result<()> {
        let status = self.process()?.stop(STOP_PATIENCE)?;
        self.running = None;
        ensure!(status.success(), "{} ended with {status} after SIGTERM", self.name);
        Ok(())
    }
}
