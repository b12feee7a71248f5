//! Talking to the service manager (`sd_notify(3)`); every call is a no-op when nobody started us with `NOTIFY_SOCKET`.
//!
//! The watchdog is fed by what the daemon really does: [`Watchdog::run`] asks a closure for a number that grows with
//! progress or says that there is nothing to do, and stays silent when the daemon hangs.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

/// Says that the daemon serves now.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Says that the daemon is on its way out.
pub fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// One line for `systemctl status`.
pub fn status(status: &str) {
    send(&[NotifyState::Status(status)]);
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager does not take notifications");
    }
}

/// What the daemon says when the watchdog asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulse {
    /// Nothing to do, and the loop answered.
    Idle,
    /// Work under way; the number grows with every step done.
    Working(u64),
}

/// Feeds systemd's watchdog while the daemon makes progress.
#[derive(Debug)]
pub struct Watchdog {
    interval: Duration,
}

impl Watchdog {
    /// The watchdog systemd asked for (`WatchdogSec=`); `None` when it asked for none.
    pub fn from_service_manager() -> Option<Self> {
        sd_notify::watchdog_enabled().map(|limit| Self { interval: limit / 3 })
    }

    /// Pings until `stop`. A pulse of [`Pulse::Working`] that does not grow is not passed on.
    pub async fn run(self, stop: CancellationToken, pulse: impl Fn() -> Pulse) {
        let mut last = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.interval) => {}
            }
            let seen = pulse();
            if advances(last, seen) {
                send(&[NotifyState::Watchdog]);
            }
            last = Some(seen);
        }
    }
}

fn advances(last: Option<Pulse>, seen: Pulse) -> bool {
    match (last, seen) {
        (Some(Pulse::Working(before)), Pulse::Working(now)) => now > before,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_hangs_is_not_vouched_for() {
        assert!(advances(None, Pulse::Working(1)));
        assert!(advances(Some(Pulse::Working(1)), Pulse::Working(2)));
        assert!(!advances(Some(Pulse::Working(2)), Pulse::Working(2)));
        assert!(advances(Some(Pulse::Working(2)), Pulse::Idle));
    }
}
