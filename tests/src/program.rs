//! A running process with its log: started, signalled by its id, watched in `/proc`, ended on drop.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait;

/// Clock ticks a second in `/proc/PID/stat`; fixed at 100 by the kernel's user interface on Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// A process of ours or a server's postmaster.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    log: PathBuf,
    farewell: Farewell,
}

/// How a process is ended on drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    /// SIGKILL.
    Kill,
    /// SIGQUIT, so that a postmaster takes its children along, then SIGKILL after this long.
    QuitThenKill(Duration),
}

impl Running {
    /// Starts `command` with both outputs appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path, farewell: Farewell) -> Result<Self> {
        let out = OpenOptions::new().create(true).append(true).open(log)?;
        crate::account::give(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned(), farewell })
    }

    /// Its name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its log file.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        read_log(&self.log)
    }

    /// Whether it is still there.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Sends a signal; a process already gone is an error.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.process_id()?, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    fn process_id(&self) -> Result<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| anyhow!("{} has no id", self.name))
    }

    /// kill -9, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }

    /// Whether it is frozen, by itself or by somebody.
    pub fn is_frozen(&self) -> Result<bool> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The name in parentheses may hold spaces; the state follows it.
        let after = stat.rsplit_once(')').context("no name in stat")?.1;
        Ok(after.trim_start().starts_with('T'))
    }

    /// Freezes it.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// SIGTERM, and waits for it to end by itself.
    pub fn stop(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait_ended(deadline)
    }

    /// Waits until it has ended by itself.
    pub fn wait_ended(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("{} ends", self.name);
        let child = &mut self.child;
        wait::value(&what, deadline, || Ok(child.try_wait()?))
    }

    /// Largest resident memory so far, in bytes (`VmHWM`).
    pub fn memory_peak_bytes(&self) -> Result<u64> {
        peak_bytes_of(self.child.id())
    }

    /// CPU seconds used so far by it and by its children that it has waited for.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The name in parentheses may hold spaces; fields are counted after it. utime is field 14 of the line.
        let after = stat.rsplit_once(')').context("no name in stat")?.1;
        let ticks: u64 = after.split_whitespace().skip(11).take(4).map(|field| field.parse::<u64>().unwrap_or(0)).sum();
        Ok(ticks as f64 / TICKS_PER_SECOND)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_running() {
            return;
        }
        let _ = self.thaw();
        if let Farewell::QuitThenKill(patience) = self.farewell {
            let _ = self.signal(Signal::QUIT);
            if self.wait_ended(patience).is_ok() {
                return;
            }
        }
        let _ = self.kill();
    }
}

/// Largest resident memory of a process so far, in bytes (`VmHWM`).
pub fn peak_bytes_of(process: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kibibytes: u64 = line.split_whitespace().next().context("empty VmHWM")?.parse()?;
    Ok(kibibytes * 1024)
}

/// A log's text, with broken UTF-8 replaced; empty when there is none.
pub fn read_log(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// What a finished command said.
#[derive(Debug, Clone)]
pub struct Said {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
    /// How long it took.
    pub took: Duration,
}

impl Said {
    /// Its standard output when it exited 0; else an error with all it said.
    pub fn ok(self) -> Result<String> {
        if self.code == Some(0) {
            return Ok(self.out);
        }
        bail!("exit {:?}\n{}\n{}", self.code, self.out.trim_end(), self.err.trim_end())
    }

    /// Checks the exit code and gives everything it said.
    pub fn exits(self, code: i32) -> Result<String> {
        if self.code == Some(code) {
            return Ok(format!("{}\n{}", self.out, self.err));
        }
        bail!("exit {:?} instead of {code}\n{}\n{}", self.code, self.out.trim_end(), self.err.trim_end())
    }
}

/// Runs a command to its end; kills it and fails after `deadline`.
pub fn run(mut command: Command, deadline: Duration) -> Result<Said> {
    let shown = format!("{:?}", command.get_program());
    let start = Instant::now();
    // Files and not pipes: a grandchild that keeps a pipe open would hold the reader.
    let (out, err) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?)
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let status = wait::value(&format!("{shown} ends"), deadline, || Ok(child.try_wait()?));
    let took = start.elapsed();
    if status.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let (out, err) = (read_all(out)?, read_all(err)?);
    let status = status.with_context(|| format!("{command:?}\n{out}\n{err}"))?;
    Ok(Said { code: status.code(), out, err, took })
}

fn read_all(mut file: File) -> Result<String> {
    use std::io::{Read, Seek};
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_tells_code_and_output() {
        let mut command = crate::account::command("/bin/sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let said = run(command, Duration::from_secs(5)).unwrap();
        assert_eq!((said.code, said.out.as_str(), said.err.as_str()), (Some(3), "out\n", "err\n"));
    }

    #[test]
    fn a_command_that_hangs_is_killed() {
        let mut command = crate::account::command("/bin/sleep");
        command.arg("60");
        assert!(run(command, Duration::from_millis(200)).is_err());
    }
}
