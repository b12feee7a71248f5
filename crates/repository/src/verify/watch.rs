//! How far a walk has come, and how fast it may go.
//!
//! The pace needs no clock: after each piece the walk rests as long as the piece would take at the allowed rate, so it is
//! never faster, whatever else it waits for.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How far a walk has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing, for people.
    pub step: String,
    /// Bytes read of objects.
    pub bytes_done: u64,
    /// Bytes that are to be read, as far as is known.
    pub bytes_total: u64,
}

type Listener = Arc<dyn Fn(&Progress) + Send + Sync>;

/// Follows a walk and holds it back.
#[derive(Default)]
pub struct Watch {
    bytes_per_second: Option<u64>,
    listener: Option<Listener>,
    step: Mutex<String>,
    done: AtomicU64,
    total: AtomicU64,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("progress", &self.progress()).finish_non_exhaustive()
    }
}

impl Watch {
    /// One that reads at most so many bytes a second; 0 is none.
    #[must_use]
    pub fn at_rate(mut self, bytes_per_second: u64) -> Self {
        self.bytes_per_second = Some(bytes_per_second.max(1));
        self
    }

    /// One that tells of every step and piece.
    #[must_use]
    pub fn telling(mut self, listener: impl Fn(&Progress) + Send + Sync + 'static) -> Self {
        self.listener = Some(Arc::new(listener));
        self
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        let bytes_done = self.done.load(Ordering::Relaxed);
        let bytes_total = self.total.load(Ordering::Relaxed);
        let step = self.step.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Packs that outlived their backup are in no sum that is known beforehand.
        Progress { step, bytes_done, bytes_total: if bytes_total > 0 { bytes_total.max(bytes_done) } else { 0 } }
    }

    /// Whether a rate is kept.
    pub(super) fn is_paced(&self) -> bool {
        self.bytes_per_second.is_some()
    }

    pub(super) fn expect(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn step(&self, text: impl Into<String>) {
        *self.step.lock().unwrap_or_else(PoisonError::into_inner) = text.into();
        self.tell();
    }

    /// Bytes were read: tells, and rests if a rate is to be kept.
    pub(super) async fn took(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.tell();
        if let Some(rate) = self.bytes_per_second {
            let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(rate);
            tokio::time::sleep(Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))).await;
        }
    }

    fn tell(&self) {
        if let Some(listener) = &self.listener {
            listener(&self.progress());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pace_is_kept_and_told() {
        let told = Arc::new(AtomicU64::new(0));
        let listener = Arc::clone(&told);
        let watch =
            Watch::default().at_rate(100_000).telling(move |now| listener.store(now.bytes_done, Ordering::Relaxed));
        watch.expect(2000);
        watch.step("reading");
        let begun = std::time::Instant::now();
        watch.took(500).await;
        watch.took(2500).await;
        assert!(begun.elapsed() >= Duration::from_millis(30), "{:?}", begun.elapsed());
        assert_eq!(told.load(Ordering::Relaxed), 3000);
        let expected = Progress { step: "reading".to_owned(), bytes_done: 3000, bytes_total: 3000 };
        assert_eq!(watch.progress(), expected);
    }
}
