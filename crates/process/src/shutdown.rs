//! Stopping in order: a signal asks, holders finish, a grace period bounds the wait, and who still holds has a name.
//!
//! SIGTERM and SIGINT ask once; a second one ends the process at once with 128 + signal number. The process promises
//! nothing about work it was in the middle of: every durable effect survives an abort at any point.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Notify,
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Asks a process to stop and knows who still holds it. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
    holders: Arc<Holders>,
    _signals: Option<Arc<AbortOnDrop>>,
}

#[derive(Debug, Default)]
struct Holders {
    names: Mutex<BTreeMap<&'static str, usize>>,
    released: Notify,
}

#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Keeps the process alive, within the grace period, until dropped.
#[derive(Debug)]
pub struct Hold {
    name: &'static str,
    holders: Arc<Holders>,
}

/// The grace period passed while these were still holding.
#[derive(Debug, thiserror::Error)]
#[error("still held by {} when the grace period of {} s ended", names.join(", "), grace.as_secs())]
pub struct StillHeld {
    /// Names given to [`Shutdown::hold`].
    pub names: Vec<&'static str>,
    /// The period that passed.
    pub grace: Duration,
}

impl Shutdown {
    /// A shutdown that only [`Shutdown::request`] starts.
    pub fn new() -> Self {
        Self::default()
    }

    /// A shutdown started by SIGTERM or SIGINT. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the signal handlers cannot be installed.
    pub fn on_signals() -> io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let token = CancellationToken::new();
        let asked = token.clone();
        let task = tokio::spawn(async move {
            loop {
                let number = tokio::select! {
                    _ = terminate.recv() => SignalKind::terminate().as_raw_value(),
                    _ = interrupt.recv() => SignalKind::interrupt().as_raw_value(),
                };
                if asked.is_cancelled() {
                    std::process::exit(128 + number);
                }
                tracing::info!(signal = number, "stopping");
                asked.cancel();
            }
        });
        Ok(Self { token, holders: Arc::default(), _signals: Some(Arc::new(AbortOnDrop(task))) })
    }

    /// Asks the process to stop.
    pub fn request(&self) {
        self.token.cancel();
    }

    /// Whether a stop was asked for.
    pub fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Ready once a stop was asked for.
    pub fn requested(&self) -> WaitForCancellationFutureOwned {
        self.token.clone().cancelled_owned()
    }

    /// The token itself, for rooms that take one.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Registers work that should end before the process does.
    pub fn hold(&self, name: &'static str) -> Hold {
        *self.holders.lock().entry(name).or_insert(0) += 1;
        Hold { name, holders: Arc::clone(&self.holders) }
    }

    /// Names of all who hold now.
    pub fn holders(&self) -> Vec<&'static str> {
        self.holders.lock().keys().copied().collect()
    }

    /// Waits until nobody holds, at most `grace`.
    ///
    /// # Errors
    /// [`StillHeld`] when the grace period passed first.
    pub async fn wait_for_holders(&self, grace: Duration) -> Result<(), StillHeld> {
        let nobody_holds = async {
            loop {
                let released = self.holders.released.notified();
                tokio::pin!(released);
                released.as_mut().enable();
                if self.holders.lock().is_empty() {
                    return;
                }
                released.await;
            }
        };
        tokio::time::timeout(grace, nobody_holds).await.map_err(|_| StillHeld { names: self.holders(), grace })
    }
}

impl Holders {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, usize>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut names = self.holders.lock();
        if let Some(count) = names.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                names.remove(self.name);
            }
        }
        drop(names);
        self.holders.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn waiting_names_who_still_holds() {
        runtime().block_on(async {
            let shutdown = Shutdown::new();
            let first = shutdown.hold("uploads");
            let second = shutdown.hold("uploads");
            drop(first);
            let error = shutdown.wait_for_holders(Duration::from_millis(10)).await.unwrap_err();
            assert_eq!(error.names, ["uploads"]);
            let waiting = tokio::spawn({
                let shutdown = shutdown.clone();
                async move { shutdown.wait_for_holders(Duration::from_secs(10)).await }
            });
            tokio::task::yield_now().await;
            drop(second);
            waiting.await.unwrap().unwrap();
        });
    }

    #[test]
    fn a_signal_asks_once() {
        runtime().block_on(async {
            let shutdown = Shutdown::on_signals().unwrap();
            assert!(!shutdown.is_requested());
            let me = rustix::process::getpid();
            rustix::process::kill_process(me, rustix::process::Signal::TERM).unwrap();
            tokio::time::timeout(Duration::from_secs(10), shutdown.requested()).await.unwrap();
            assert!(shutdown.is_requested());
        });
    }
}
