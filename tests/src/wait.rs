//! Waiting for a state with a deadline; the only file of the harness that sleeps.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Pause between two looks at a state.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// Lets time pass, for what has no state to look at (such as giving load time to run).
pub fn pause(time: Duration) {
    #[expect(clippy::disallowed_methods, reason = "this is the one place of the harness that sleeps")]
    std::thread::sleep(time);
}

/// Looks until `look` gives a value, and returns it; fails with `what` after `deadline`. An error of `look` ends the
/// wait at once.
pub fn value<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = look()? {
            return Ok(value);
        }
        if start.elapsed() >= deadline {
            bail!("after {:.1} s still waiting: {what}", deadline.as_secs_f64());
        }
        pause(LOOK_EVERY);
    }
}

/// Looks until `look` says true; errors count as "not yet" and the last one is told when the deadline passes.
pub fn until(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let seen = look();
        if matches!(seen, Ok(true)) {
            return Ok(start.elapsed());
        }
        if start.elapsed() >= deadline {
            match seen {
                Err(error) => return Err(error.context(format!("after {:.1} s: {what}", deadline.as_secs_f64()))),
                Ok(_) => bail!("after {:.1} s still not so: {what}", deadline.as_secs_f64()),
            }
        }
        pause(LOOK_EVERY);
    }
}

/// Looks for `time` and fails as soon as `look` says false.
pub fn holds(what: &str, time: Duration, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < time {
        if !look()? {
            bail!("held only {:.1} s: {what}", start.elapsed().as_secs_f64());
        }
        pause(LOOK_EVERY);
    }
    Ok(())
}
