//! One small tokio runtime for what the harness does over sockets (SQL, proxies, the S3 server), so that scenarios can
//! be written as plain blocking code.

use std::future::Future;
use std::sync::OnceLock;

use tokio::runtime::{Builder, Runtime};

/// Threads of the shared runtime.
const THREADS: usize = 2;

/// The shared runtime; lives as long as the process.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("harness")
            .enable_all()
            .build()
            .expect("a runtime of two threads can be built")
    })
}

/// Runs a future to its end from blocking code.
pub fn block_on<F: Future>(future: F) -> F::Output {
    runtime().block_on(future)
}
