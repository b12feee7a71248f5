//! One command to its end: how long it took, the CPU time of it and of all that it waited for, and when it said what.
//!
//! Its end is waited for and not looked for now and then: some measures take a fifth of a second.

use std::cell::RefCell;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

use super::calls::children_cpu_seconds;
use crate::runtime::block_on;

/// Longest command.
const PATIENCE: Duration = Duration::from_secs(300);

/// How one command went.
#[derive(Debug, Clone, Default)]
pub struct Lap {
    /// Seconds from its start to its end.
    pub seconds: f64,
    /// CPU seconds of it and of the children that it waited for.
    pub cpu_seconds: f64,
    /// Each line that it said, to whatever stream, with the second of the lap at which it came.
    pub lines: Vec<(f64, String)>,
    /// The last line of its standard output.
    pub answer: String,
}

impl Lap {
    /// The second at which it first said one of these words; none if it never did.
    pub fn said(&self, words: &[&str]) -> Option<f64> {
        let line = self.lines.iter().find(|(_, line)| words.iter().any(|word| line.contains(word)));
        line.map(|(second, _)| *second)
    }
}

/// Runs a command, which must succeed. Commands that others run at the same time would count into its CPU time.
pub fn lap(command: Command) -> Result<Lap> {
    let shown = format!("{command:?}");
    block_on(async { tokio::time::timeout(PATIENCE, run(command)).await.context("it takes too long")? })
        .with_context(|| shown)
}

async fn run(command: Command) -> Result<Lap> {
    let mut command = tokio::process::Command::from(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let (cpu_before, start) = (children_cpu_seconds()?, Instant::now());
    let mut child = command.spawn()?;
    let (out, err) = (child.stdout.take().context("no output")?, child.stderr.take().context("no errors")?);
    let lines = RefCell::new(Vec::new());
    let (out, err, status) = tokio::join!(hear(out, start, &lines), hear(err, start, &lines), child.wait());
    let seconds = start.elapsed().as_secs_f64();
    let (answer, _) = (out?, err?);
    let lap = Lap { seconds, cpu_seconds: children_cpu_seconds()? - cpu_before, lines: lines.into_inner(), answer };
    let status = status?;
    ensure!(status.success(), "{status}: {:#?}", lap.lines);
    Ok(lap)
}

/// Notes the lines of a stream; gives the last one.
async fn hear(stream: impl AsyncRead + Unpin, start: Instant, lines: &RefCell<Vec<(f64, String)>>) -> Result<String> {
    let (mut stream, mut last) = (BufReader::new(stream).lines(), String::new());
    while let Some(line) = stream.next_line().await? {
        last.clone_from(&line);
        lines.borrow_mut().push((start.elapsed().as_secs_f64(), line));
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = crate::account::command("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_lap_knows_what_was_said() {
        let lap = lap(shell("echo one; echo the three; echo two >&2")).unwrap();
        assert_eq!((lap.lines.len(), lap.said(&["four"]), lap.answer.as_str()), (3, None, "the three"));
        assert!(lap.said(&["four", "three"]) >= lap.said(&["one"]) && lap.seconds >= lap.said(&["two"]).unwrap());
    }

    #[test]
    fn a_command_that_fails_gives_no_lap() {
        assert!(format!("{:#}", lap(shell("echo why; exit 3")).unwrap_err()).contains("why"));
    }
}
