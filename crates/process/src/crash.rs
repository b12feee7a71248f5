//! Crash points: places between two durable effects where tests end the process as a power cut would.
//!
//! A point is named `room/after-x-before-y`. With the feature `crash-points`, the process aborts at the point that the
//! environment variable `PGCONVOY_CRASH_AT` names, as `NAME` or as `NAME:N` for the N-th passage (counted from 1). At the one
//! that `PGCONVOY_STOP_AT` names it stops itself with SIGSTOP, until a test lets it go on: a pause as a machine has that is
//! suspended.
//! Without the feature a point compiles to nothing.

/// Marks a crash point; aborts the process here when a test asked for it.
#[inline]
pub fn passage(name: &'static str) {
    #[cfg(feature = "crash-points")]
    armed::passage(name);
    #[cfg(not(feature = "crash-points"))]
    let _ = name;
}

/// Marks a crash point: `crash_point!("room/after-x-before-y")`.
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        $crate::crash::passage($name)
    };
}

/// `NAME` or `NAME:N` taken apart.
#[cfg(any(test, feature = "crash-points"))]
fn wanted(text: &str) -> (&str, u64) {
    match text.rsplit_once(':') {
        Some((name, number)) => number.parse().map_or((text, 1), |number| (name, number)),
        None => (text, 1),
    }
}

#[cfg(feature = "crash-points")]
mod armed {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    };

    /// A point that a variable of the environment names, and how often it was passed.
    struct Armed {
        variable: &'static str,
        wanted: OnceLock<Option<(String, u64)>>,
        passages: AtomicU64,
    }

    static CRASH: Armed = Armed::new("PGCONVOY_CRASH_AT");
    static STOP: Armed = Armed::new("PGCONVOY_STOP_AT");

    impl Armed {
        const fn new(variable: &'static str) -> Self {
            Self { variable, wanted: OnceLock::new(), passages: AtomicU64::new(0) }
        }

        fn is_reached(&self, name: &'static str) -> bool {
            let wanted = self.wanted.get_or_init(|| {
                let text = std::env::var_os(self.variable)?.into_string().ok()?;
                let (name, number) = super::wanted(&text);
                Some((name.to_owned(), number))
            });
            let Some((wanted_name, number)) = wanted else { return false };
            wanted_name == name && self.passages.fetch_add(1, Ordering::SeqCst) + 1 == *number
        }
    }

    pub(super) fn passage(name: &'static str) {
        if CRASH.is_reached(name) {
            tracing::info!(point = name, "crash point reached");
            std::process::abort();
        }
        if STOP.is_reached(name) {
            tracing::info!(point = name, "stopped until somebody lets it go on");
            // A stop that does not come is what the test waits for, and says.
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_an_optional_passage() {
        assert_eq!(wanted("archive/after-put-before-ack"), ("archive/after-put-before-ack", 1));
        assert_eq!(wanted("archive/after-put-before-ack:3"), ("archive/after-put-before-ack", 3));
        assert_eq!(wanted("odd:name"), ("odd:name", 1));
    }

    #[test]
    fn an_unnamed_point_does_nothing() {
        crate::crash_point!("tests/never");
        passage("tests/never");
    }
}
