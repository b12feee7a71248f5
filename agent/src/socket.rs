//! The serving side of the local socket: one request a connection, answered by the room it belongs to.
//!
//! Invariants: at most [`CONNECTIONS_MAX`] connections; a caller that does not finish its request within [`REQUEST_TIMEOUT`] is
//! dropped. WAL requests from another data directory than ours are refused. A stale socket file is replaced, a living one never.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use process::exit::Exit;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::archive::{Archive, Pushed};
use crate::fetch::{Answer, Fetcher};
use crate::local::{FRAME_BYTES_MAX, FetchMode, LocalError, Request, Response, body_length};
use crate::node::DataDirectory;

/// Connections served at once.
pub const CONNECTIONS_MAX: usize = 64;
/// Time for a caller to say what it wants, and to take each answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an answer may take before the caller is told to wait.
const QUICK: Duration = Duration::from_millis(200);
/// Progress answers waiting to be sent.
const PROGRESS_MAX: usize = 16;
/// Pause after the system refused a connection (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another agent answers there.
    #[error("another agent answers on {}; give each agent a socket of its own", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// It cannot be made.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The last answer: exit code and one line, or JSON.
pub type Done = (Exit, String);

/// Requests that are not about WAL files; served by whoever connects the rooms.
#[async_trait::async_trait]
pub trait Desk: Send + Sync + 'static {
    /// Takes a base backup; `progress` takes JSON.
    async fn backup(&self, json: String, progress: mpsc::Sender<String>) -> Done;
    /// The report of `pgconvoy info`.
    async fn info(&self) -> Done;
    /// State of this agent as JSON.
    async fn status(&self) -> Done;
}

/// Everything a request may need.
pub struct Rooms {
    /// Archiving.
    pub archive: Arc<Archive>,
    /// Fetching.
    pub fetcher: Arc<Fetcher>,
    /// The data directory we belong to.
    pub data: Arc<DataDirectory>,
    /// The rest.
    pub desk: Arc<dyn Desk>,
    /// Longest wait of a push.
    pub push_wait: Duration,
}

/// Makes the socket, for the owner and the group of this process.
///
/// # Errors
/// When another agent answers there, or the file cannot be made.
pub fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |source| SocketError::Listen { path: path.to_owned(), source };
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(SocketError::Taken { path: path.to_owned() }),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(failed)?;
            }
        }
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(failed)?;
    Ok(listener)
}

/// Serves until `stop`, then lets requests under way end within their own deadlines.
pub async fn serve(listener: UnixListener, rooms: Arc<Rooms>, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connections = TaskTracker::new();
    loop {
        let place = tokio::select! {
            () = stop.cancelled() => break,
            place = Arc::clone(&places).acquire_owned() => place.expect("the semaphore is never closed"),
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (rooms, stop) = (Arc::clone(&rooms), stop.clone());
                connections.spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        result = serve_one(stream, &rooms) => {
                            if let Err(error) = result {
                                tracing::debug!(error = %crate::archive::ship::chain(&error), "a local request ended early");
                            }
                        }
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a local connection could not be taken");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    connections.close();
    connections.wait().await;
}

async fn serve_one(mut stream: UnixStream, rooms: &Arc<Rooms>) -> Result<(), LocalError> {
    let body =
        tokio::time::timeout(REQUEST_TIMEOUT, read_frame(&mut stream)).await.map_err(|_| LocalError::Deadline)??;
    let request = match Request::parse(&body) {
        Ok(request) => request,
        Err(error) => return send_done(&mut stream, (Exit::Usage, error.to_string())).await,
    };
    match request {
        Request::Push { cwd, path, wait } => {
            let limit = rooms.push_wait;
            let wait = if wait.is_zero() { limit } else { wait.min(limit) };
            let answer = push(rooms, cwd, path, wait);
            send_when_done(&mut stream, answer, wait).await
        }
        Request::Fetch { cwd, name, target, mode } => {
            let wait = rooms.fetcher.wait(mode);
            let answer = fetch(rooms, cwd, name, target, mode);
            send_when_done(&mut stream, answer, wait).await
        }
        Request::Backup { json } => backup(&mut stream, rooms, json).await,
        Request::Info => {
            let done = rooms.desk.info().await;
            send_done(&mut stream, done).await
        }
        Request::Status => {
            let done = rooms.desk.status().await;
            send_done(&mut stream, done).await
        }
    }
}

async fn push(rooms: &Arc<Rooms>, cwd: PathBuf, path: PathBuf, wait: Duration) -> Done {
    if !rooms.data.is_same(&cwd) {
        return (Exit::Negative, foreign(rooms, &cwd));
    }
    match rooms.archive.push(&cwd.join(path), wait).await {
        Pushed::Durable => (Exit::Ok, String::new()),
        Pushed::Not(reason) => (Exit::Negative, reason),
    }
}

async fn fetch(rooms: &Arc<Rooms>, cwd: PathBuf, name: String, target: PathBuf, mode: FetchMode) -> Done {
    if !rooms.data.is_same(&cwd) {
        return (Exit::Refused, foreign(rooms, &cwd));
    }
    match rooms.fetcher.fetch(&name, &cwd.join(target), mode).await {
        Answer::Written => (Exit::Ok, String::new()),
        Answer::No(reason) => (Exit::Negative, reason),
        Answer::Unknown(reason) | Answer::Refused(reason) => (Exit::Unknown, reason),
    }
}

fn foreign(rooms: &Arc<Rooms>, cwd: &Path) -> String {
    format!(
        "this agent belongs to {}, not to {}; name the right socket with --socket",
        rooms.data.path().display(),
        cwd.display()
    )
}

async fn backup(stream: &mut UnixStream, rooms: &Arc<Rooms>, json: String) -> Result<(), LocalError> {
    let (progress, mut steps) = mpsc::channel(PROGRESS_MAX);
    let work = rooms.desk.backup(json, progress);
    tokio::pin!(work);
    loop {
        tokio::select! {
            Some(step) = steps.recv() => send(stream, &Response::Progress(step)).await?,
            done = &mut work => {
                while let Ok(step) = steps.try_recv() {
                    send(stream, &Response::Progress(step)).await?;
                }
                return send_done(stream, done).await;
            }
        }
    }
}

/// Sends the answer; when it takes more than a moment, first tells the caller how long it may take.
async fn send_when_done(
    stream: &mut UnixStream,
    answer: impl Future<Output = Done>,
    wait: Duration,
) -> Result<(), LocalError> {
    tokio::pin!(answer);
    let done = match tokio::time::timeout(QUICK, &mut answer).await {
        Ok(done) => done,
        Err(_) => {
            send(stream, &Response::waiting(wait)).await?;
            answer.await
        }
    };
    send_done(stream, done).await
}

async fn send_done(stream: &mut UnixStream, (exit, message): Done) -> Result<(), LocalError> {
    send(stream, &Response::Done { code: exit.code(), message }).await
}

async fn send(stream: &mut UnixStream, response: &Response) -> Result<(), LocalError> {
    let frame = response.frame();
    match tokio::time::timeout(REQUEST_TIMEOUT, stream.write_all(&frame)).await {
        Ok(result) => result.map_err(LocalError::Broken),
        Err(_) => Err(LocalError::Deadline),
    }
}

async fn read_frame(stream: &mut UnixStream) -> Result<Vec<u8>, LocalError> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await.map_err(LocalError::Broken)?;
    let length = body_length(head)?;
    debug_assert!(length <= FRAME_BYTES_MAX);
    // Grows with what really comes, not with what is announced.
    let mut body = Vec::new();
    stream.take(length as u64).read_to_end(&mut body).await.map_err(LocalError::Broken)?;
    if body.len() < length { Err(LocalError::Broken(std::io::ErrorKind::UnexpectedEof.into())) } else { Ok(body) }
}
