//! The stage a scenario is played on: its scratch directory, the logs of our processes, and the rule that a warning
//! nobody announced fails it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::account::{Scratch, environment};
use crate::postgres::tail;
use crate::program::read_log;

/// Scenarios played at once, if the test harness has as many threads; each holds several servers, and they mostly wait.
const AT_ONCE: usize = 4;
/// Lines of each log shown when a scenario fails.
const SHOWN_LINES: usize = 40;

static PLAYING: Mutex<usize> = Mutex::new(0);
static LEFT: Condvar = Condvar::new();

/// A place among the scenarios played at once.
struct Seat;

impl Seat {
    fn take() -> Self {
        let limit = environment("PGCONVOY_TEST_AT_ONCE").and_then(|text| text.parse().ok()).unwrap_or(AT_ONCE);
        let mut playing = PLAYING.lock().unwrap_or_else(PoisonError::into_inner);
        while *playing >= limit {
            playing = LEFT.wait(playing).unwrap_or_else(PoisonError::into_inner);
        }
        *playing += 1;
        Self
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        *PLAYING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        LEFT.notify_one();
    }
}

/// A warning or error that a scenario expects in the logs of our processes.
#[derive(Debug, Clone, Copy)]
pub struct Announced {
    /// Part of the line.
    pub part: &'static str,
    /// Why it is right that it is logged here.
    pub reason: &'static str,
}

/// What a scenario is given.
#[derive(Debug)]
pub struct Stage {
    /// Its scratch directory.
    pub scratch: Scratch,
    announced: Vec<Announced>,
}

impl Stage {
    /// From here on, and before, log lines of level WARN or ERROR with this part are right.
    pub fn announce(&mut self, part: &'static str, reason: &'static str) {
        self.announced.push(Announced { part, reason });
    }

    /// Says in one line of the run's output that this scenario is not played on this machine. Written past the capture
    /// of the test harness, which shows nothing of a test that passed.
    pub fn leave_out(&self, what: &str, needs: &str) {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "LEFT OUT: {what}: this machine does not give {needs}");
    }

    /// Every log in the scratch directory.
    fn logs(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.scratch.path()) else { return Vec::new() };
        let mut logs: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .collect();
        logs.sort();
        logs
    }

    /// Lines of level WARN or ERROR in the logs of our processes that nobody announced.
    fn unannounced(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for log in self.logs() {
            for line in read_log(&log).lines().filter(|line| is_alarm(line)) {
                if !self.announced.iter().any(|announced| line.contains(announced.part)) {
                    lines.push(format!("{}: {line}", file_name(&log)));
                }
            }
        }
        lines
    }

    fn shown_logs(&self) -> String {
        let shown = self.logs().into_iter().map(|log| {
            format!("---- {} (last {SHOWN_LINES} lines)\n{}\n", file_name(&log), tail(&read_log(&log), SHOWN_LINES))
        });
        shown.collect()
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Whether a line is one of ours of level WARN or ERROR: RFC 3339 time in UTC, then the level.
fn is_alarm(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let time = words.next().unwrap_or_default();
    let ours = time.len() > 20 && time.ends_with('Z') && time.as_bytes()[10] == b'T';
    ours && matches!(words.next(), Some("WARN" | "ERROR"))
}

/// Plays a scenario and panics with everything needed to understand it when it fails.
pub fn play(name: &str, body: impl FnOnce(&mut Stage) -> Result<()>) {
    let _seat = Seat::take();
    let start = Instant::now();
    if let Err(error) = perform(name, body) {
        let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
        panic!("{name} failed after {:.1} s: {}", start.elapsed().as_secs_f64(), chain.join("\n  because: "));
    }
    println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
}

fn perform(name: &str, body: impl FnOnce(&mut Stage) -> Result<()>) -> Result<()> {
    let mut stage = Stage { scratch: Scratch::new(name)?, announced: Vec::new() };
    body(&mut stage).map_err(|error| error.context(format!("logs:\n{}", stage.shown_logs())))?;
    let unannounced = stage.unannounced();
    if !unannounced.is_empty() {
        let shown: Vec<String> = unannounced.into_iter().take(SHOWN_LINES).collect();
        bail!("warnings that nobody announced:\n{}", shown.join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_warnings_are_alarms() {
        assert!(is_alarm("2026-11-23T03:41:38.123456Z  WARN agent::archive: not readable file=x"));
        assert!(is_alarm("2026-11-23T03:41:38.123456Z ERROR coordinator: lost"));
        assert!(!is_alarm("2026-11-23T03:41:38.123456Z  INFO coordinator: WARN is a word here"));
        assert!(!is_alarm("2026-11-23 03:41:38.123 UTC [77] WARNING:  archiving failed"));
        assert!(!is_alarm(""));
    }
}
