//! Progress of long work on standard error: a bar on a terminal, a line a step elsewhere.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output;

/// Shows how long work goes.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    last_step: String,
}

impl Progress {
    /// A bar when a person looks on, lines otherwise.
    pub(crate) fn new() -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, last_step: String::new() }
    }

    /// The state now; a total of 0 means that it is not known yet.
    pub(crate) fn show(&mut self, step: &str, done_bytes: u64, total_bytes: u64) {
        match &self.bar {
            Some(bar) if total_bytes > 0 => {
                if bar.length() != Some(total_bytes) {
                    bar.set_length(total_bytes);
                    bar.set_style(sized());
                }
                bar.set_position(done_bytes.min(total_bytes));
                bar.set_message(step.to_owned());
            }
            Some(bar) => bar.set_message(step.to_owned()),
            None if step != self.last_step && !step.is_empty() => {
                self.last_step = step.to_owned();
                output::complain(step);
            }
            None => {}
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn sized() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// Bytes as people read them.
pub(crate) fn bytes_for_people(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
