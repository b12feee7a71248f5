//! The threads that read and compress, and the places for files ahead of PostgreSQL: as many as archiving needs now.
//!
//! The usual threads are always there. While archiving is behind, further ones stand beside them; they are started then
//! and end afterwards, so that they take no memory in good times.
//!
//! Invariants: a file that is being read is read to its end, whatever becomes of the number of threads. Places are taken
//! back as they become free, never from a file that is under way. Nobody who works with files waits for threads to end.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::ASKED_MAX;
use super::admit::{Admission, AdmitError, Admitted};
use super::readers::Readers;
use crate::pressure::{Effort, Efforts};

/// Files ahead of PostgreSQL that are under way, besides two for each reader.
const SLOTS_BESIDES: usize = 8;

/// Threads and places.
#[derive(Debug)]
pub(super) struct Crew {
    efforts: Efforts,
    usual: Arc<Pool>,
    slots: Arc<Semaphore>,
    now: Mutex<Now>,
}

/// As of the last change.
#[derive(Debug)]
struct Now {
    effort: Effort,
    /// Places there are, taken or free.
    slots: usize,
    further: Option<Arc<Pool>>,
}

/// Some threads, and how many files they have to read.
#[derive(Debug)]
struct Pool {
    /// Taken only when the pool is dropped.
    readers: Option<Readers>,
    count: usize,
    files: AtomicUsize,
}

impl Crew {
    /// The usual threads.
    ///
    /// # Errors
    /// When the system gives no more threads.
    pub(super) fn start(efforts: Efforts) -> io::Result<Self> {
        let waiting_max = slots(&efforts.strained) + ASKED_MAX;
        let effort = efforts.calm;
        let slots = slots(&effort);
        Ok(Self {
            usual: Arc::new(Pool::start(effort.readers, waiting_max)?),
            slots: Arc::new(Semaphore::new(slots)),
            now: Mutex::new(Now { effort, slots, further: None }),
            efforts,
        })
    }

    /// How hard it works now.
    pub(super) fn effort(&self) -> Effort {
        self.now().effort
    }

    /// Works this hard from the next file on. To be called again and again: what cannot be given back at once is then.
    ///
    /// # Errors
    /// When the system gives no more threads; those there are go on.
    pub(super) fn work_at(&self, effort: Effort) -> io::Result<()> {
        let unneeded = self.change_to(effort)?;
        // Not before the lock is given back.
        drop(unneeded);
        Ok(())
    }

    /// Answers the threads that are not needed any more.
    fn change_to(&self, effort: Effort) -> io::Result<Option<Arc<Pool>>> {
        let mut now = self.now();
        now.effort = effort;
        let wanted = slots(&effort);
        if wanted > now.slots {
            self.slots.add_permits(wanted - now.slots);
            now.slots = wanted;
        } else {
            now.slots -= self.slots.forget_permits(now.slots - wanted);
        }
        let further = effort.readers.saturating_sub(self.usual.count);
        if now.further.as_ref().map_or(0, |pool| pool.count) == further {
            return Ok(None);
        }
        let wanted = match further {
            0 => None,
            count => Some(Arc::new(Pool::start(count, slots(&self.efforts.strained) + ASKED_MAX)?)),
        };
        Ok(std::mem::replace(&mut now.further, wanted))
    }

    /// A place for a file ahead of PostgreSQL, if one is free.
    pub(super) fn slot(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.slots).try_acquire_owned().ok()
    }

    /// Reads one file on one of the threads.
    ///
    /// # Errors
    /// As [`Readers::read`].
    pub(super) async fn read(&self, admission: Admission) -> Result<Admitted, AdmitError> {
        let further = self.now().further.clone();
        let pool = further.filter(|pool| pool.is_freer_than(&self.usual)).unwrap_or_else(|| Arc::clone(&self.usual));
        pool.read(admission).await
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn slots(effort: &Effort) -> usize {
    2 * effort.readers + SLOTS_BESIDES
}

impl Pool {
    fn start(count: usize, waiting_max: usize) -> io::Result<Self> {
        let readers = Some(Readers::start(count, waiting_max)?);
        Ok(Self { readers, count, files: AtomicUsize::new(0) })
    }

    async fn read(&self, admission: Admission) -> Result<Admitted, AdmitError> {
        self.files.fetch_add(1, Ordering::Relaxed);
        let _leaves = Leaves(&self.files);
        let readers = self.readers.as_ref().expect("a pool that is dropped is used by nobody");
        readers.read(admission).await
    }

    /// Whether a file gets a thread sooner here, as far as can be told.
    fn is_freer_than(&self, other: &Self) -> bool {
        let (own, others) = (self.files.load(Ordering::Relaxed), other.files.load(Ordering::Relaxed));
        others >= other.count && own * other.count < others * self.count
    }
}

impl Drop for Pool {
    /// The threads are waited for, and a file may be under way: that is for a thread that may wait.
    fn drop(&mut self) {
        let readers = self.readers.take();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(readers))),
            Err(_) => drop(readers),
        }
    }
}

/// Counts a file out, however its reading ended.
struct Leaves<'a>(&'a AtomicUsize);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::EFFORTS;

    fn places(crew: &Crew) -> usize {
        let taken: Vec<_> = std::iter::from_fn(|| crew.slot()).collect();
        taken.len()
    }

    #[test]
    fn places_and_threads_come_and_go_with_the_effort() {
        let crew = Crew::start(EFFORTS).unwrap();
        assert_eq!(places(&crew), 12);
        for _ in 0..2 {
            crew.work_at(EFFORTS.strained).unwrap();
            assert_eq!(places(&crew), 16);
            assert_eq!(crew.now().further.as_ref().unwrap().count, 2);
        }
        crew.work_at(EFFORTS.calm).unwrap();
        assert_eq!(places(&crew), 12);
        assert!(crew.now().further.is_none());
    }

    #[tokio::test]
    async fn threads_that_are_let_go_keep_nobody_waiting() {
        let crew = Crew::start(EFFORTS).unwrap();
        crew.work_at(EFFORTS.strained).unwrap();
        // Whoever reads a file holds the threads, and is the last one to do so.
        let held = crew.now().further.clone();
        crew.work_at(EFFORTS.calm).unwrap();
        assert!(crew.now().further.is_none());
        let watched = Arc::downgrade(held.as_ref().unwrap());
        drop(held);
        assert_eq!(watched.strong_count(), 0);
        crew.work_at(EFFORTS.strained).unwrap();
        assert_eq!(crew.now().further.as_ref().unwrap().count, 2);
    }

    #[test]
    fn taken_places_are_given_back_when_they_become_free() {
        let crew = Crew::start(EFFORTS).unwrap();
        crew.work_at(EFFORTS.strained).unwrap();
        let mut taken: Vec<_> = std::iter::from_fn(|| crew.slot()).collect();
        crew.work_at(EFFORTS.calm).unwrap();
        taken.truncate(14);
        crew.work_at(EFFORTS.calm).unwrap();
        assert!(crew.slot().is_none());
        drop(taken);
        crew.work_at(EFFORTS.calm).unwrap();
        assert_eq!(places(&crew), 12);
    }

    #[test]
    fn the_further_threads_get_what_the_usual_ones_cannot_take_at_once() {
        let (usual, further) = (Pool::start(2, 4).unwrap(), Pool::start(2, 4).unwrap());
        let check = |files_usual: usize, files_further: usize, expected: bool| {
            usual.files.store(files_usual, Ordering::Relaxed);
            further.files.store(files_further, Ordering::Relaxed);
            assert_eq!(further.is_freer_than(&usual), expected, "{files_usual} and {files_further}");
        };
        check(0, 0, false);
        check(1, 0, false);
        check(2, 0, true);
        check(2, 2, false);
        check(3, 2, true);
    }
}
