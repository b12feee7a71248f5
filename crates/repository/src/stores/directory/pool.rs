//! The threads on which a directory store blocks, and the queue before them.
//!
//! Work whose caller has gone, by dropping the future or by its deadline, is thrown away with everything it holds if
//! it has not begun; work that has begun runs to its end. When every thread hangs in the kernel, callers get
//! [`StoreError::Timeout`] at their deadlines and the queue stays within its limit.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::name::StoreName;
use crate::store::StoreError;

/// Threads of one store. More do not help a disk, and a network mount has enough to do with these.
const THREADS: usize = 8;
/// Operations of one store that run or wait for a thread; further callers wait for one of these to end.
const QUEUE_LIMIT: usize = 256;

type Work = Box<dyn FnOnce() + Send>;

/// Some work in the queue, until a thread or its caller takes it out.
#[derive(Clone)]
struct Ticket(Arc<Mutex<Option<Work>>>);

impl Ticket {
    fn take(&self) -> Option<Work> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn is_taken(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

/// Takes the work out of the queue when its caller goes.
struct Caller(Ticket);

impl Drop for Caller {
    fn drop(&mut self) {
        drop(self.0.take());
    }
}

#[derive(Default)]
struct Queue {
    tickets: VecDeque<Ticket>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, ticket: Ticket) {
        let mut queue = self.queue();
        if queue.tickets.len() >= QUEUE_LIMIT {
            queue.tickets.retain(|ticket| !ticket.is_taken());
        }
        queue.tickets.push_back(ticket);
        self.arrived.notify_one();
    }

    fn next(&self) -> Option<Ticket> {
        let mut queue = self.queue();
        loop {
            if let Some(ticket) = queue.tickets.pop_front() {
                return Some(ticket);
            }
            if queue.closed {
                return None;
            }
            queue = self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn work(&self) {
        while let Some(ticket) = self.next() {
            if let Some(work) = ticket.take() {
                // A panic is answered by the dropped sender inside; the thread lives on for the next caller.
                let _ = catch_unwind(AssertUnwindSafe(work));
            }
        }
    }
}

/// See the head of this file.
pub(super) struct Pool {
    store: StoreName,
    shared: Arc<Shared>,
    places: Arc<Semaphore>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("free_places", &self.places.available_permits()).finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts the threads.
    pub(super) fn start(store: &StoreName) -> io::Result<Self> {
        let pool = Self { store: store.clone(), shared: Arc::default(), places: Arc::new(Semaphore::new(QUEUE_LIMIT)) };
        for _ in 0..THREADS {
            let shared = pool.shared.clone();
            // Not joined: a thread may hang in the kernel for as long as the mount does.
            std::thread::Builder::new().name(format!("store-{store}")).spawn(move || shared.work())?;
        }
        Ok(pool)
    }

    /// Runs `work` on one of the threads and waits for it until the deadline.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        deadline: Duration,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let waiting = async {
            let place = self.places.clone().acquire_owned().await.expect("the semaphore is never closed");
            let (sender, receiver) = oneshot::channel();
            let ticket = Ticket(Arc::new(Mutex::new(Some(work_of(place, sender, work)))));
            let _caller = Caller(ticket.clone());
            self.shared.push(ticket);
            match receiver.await {
                Ok(result) => result,
                Err(ended) => Err(StoreError::Unavailable { store: self.store.clone(), source: Box::new(ended) }),
            }
        };
        match tokio::time::timeout(deadline, waiting).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Timeout { store: self.store.clone(), operation }),
        }
    }
}

fn work_of<T: Send + 'static>(
    place: OwnedSemaphorePermit,
    sender: oneshot::Sender<Result<T, StoreError>>,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Work {
    Box::new(move || {
        let result = work();
        drop(place);
        // Nobody listening is a caller that has gone.
        let _ = sender.send(result);
    })
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.closed = true;
        self.shared.arrived.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn pool() -> Pool {
        Pool::start(&"repo1".parse().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn work_comes_back_and_a_panic_does_not_stay() {
        let pool = pool();
        for _ in 0..2 * THREADS {
            let panicked = pool.run::<()>("get", Duration::from_secs(60), || panic!("on purpose")).await;
            assert!(matches!(panicked, Err(StoreError::Unavailable { .. })));
        }
        assert_eq!(pool.run("get", Duration::from_secs(60), || Ok(7)).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn hung_threads_leave_the_queue_within_its_limit_and_its_work_unheld() {
        let pool = pool();
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let (begun, mut beginnings) = tokio::sync::mpsc::channel(THREADS);
        for _ in 0..THREADS {
            let (begun, held) = (begun.clone(), held.clone());
            let hung = pool.run("put", Duration::from_secs(60), move || {
                begun.blocking_send(()).unwrap();
                let _ = held.lock().unwrap().recv();
                Ok(())
            });
            tokio::select! {
                ended = hung => panic!("{ended:?}"),
                begun = beginnings.recv() => begun.unwrap(),
            }
        }
        let body = Arc::new(());
        for _ in 0..2 * QUEUE_LIMIT {
            let body = body.clone();
            let waiting = pool.run("put", Duration::from_micros(100), move || {
                drop(body);
                Ok(())
            });
            assert!(matches!(waiting.await, Err(StoreError::Timeout { operation: "put", .. })));
        }
        assert_eq!(Arc::strong_count(&body), 1);
        assert!(pool.shared.queue().tickets.len() <= QUEUE_LIMIT);
        drop(release);
        assert_eq!(pool.run("get", Duration::from_secs(60), || Ok(7)).await.unwrap(), 7);
    }
}
