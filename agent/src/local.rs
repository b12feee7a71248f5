//! The protocol of the agent's local socket, and the blocking side of it.
//!
//! A unix stream socket carries frames: a little-endian `u32` length, then that many bytes of fields separated by NUL.
//!
//! ```text
//! request    push     1  cwd  path  wait_ms                  answer    progress  json      zero or more
//!            fetch    1  cwd  name  target  mode                       done      code  message-or-json
//!            backup   1  json
//!            info     1
//!            status   1
//! ```
//!
//! The second field is the version of the protocol. One connection carries one request.
//!
//! Invariants: only the standard library and one system-call wrapper are used here, because `pgconvoy-wal` is started once
//! a WAL segment and lives from nothing else; every read and write has a deadline; a frame is at most [`FRAME_BYTES_MAX`].
//! This room decides nothing about WAL: it says what was asked and what was answered.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

/// Largest frame either side accepts, in bytes.
pub const FRAME_BYTES_MAX: usize = 16 << 20;
/// Version of the protocol.
pub const PROTOCOL: &str = "1";
/// Where the agent listens unless configured otherwise.
pub const DEFAULT_SOCKET: &str = "/run/pgconvoy/agent.sock";
/// Environment variable naming the socket for the tiny command.
pub const SOCKET_VARIABLE: &str = "PGCONVOY_SOCKET";

/// Field of a progress answer that tells the caller how long the agent may still need, in milliseconds.
const WAIT_FIELD: &str = "\"wait_ms\":";
/// Bytes read at once; an ordinary answer fits.
const READ_BYTES: usize = 4096;

/// Why a frame was not understood or a call did not end.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The other side speaks another version or another language.
    #[error("the local request was not understood: {0}")]
    Malformed(&'static str),
    /// A frame over the limit.
    #[error("a local frame of {0} bytes is over the limit of 16 MiB")]
    TooLong(usize),
    /// No agent listens there (no socket file, or nobody behind it).
    #[error("no agent answers on the socket")]
    NoAgent(#[source] io::Error),
    /// An agent may listen there, and this user may not ask it.
    #[error("no permission on the agent's socket, which is for the agent's user and group; run this as one of them")]
    Denied(#[source] io::Error),
    /// The connection broke before the answer was complete.
    #[error("the agent closed the connection before it answered")]
    Broken(#[source] io::Error),
    /// The deadline passed.
    #[error("the agent did not answer in time")]
    Deadline,
}

/// In which kind of recovery a file is asked for; decides what an unknown answer becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchMode {
    /// `recovery.signal` is there: a wrong "no" would end recovery short.
    Recovery,
    /// `standby.signal` is there: a hard failure would shut the server down.
    Standby,
    /// Neither: `pg_rewind`, or somebody trying.
    Other,
}

impl FetchMode {
    /// Reads the mode off the signal files in a data directory; PostgreSQL lets `standby.signal` win.
    pub fn of_directory(directory: &Path) -> Self {
        if directory.join("standby.signal").exists() {
            Self::Standby
        } else if directory.join("recovery.signal").exists() {
            Self::Recovery
        } else {
            Self::Other
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Recovery => "recovery",
            Self::Standby => "standby",
            Self::Other => "other",
        }
    }

    fn parse(word: &[u8]) -> Result<Self, LocalError> {
        match word {
            b"recovery" => Ok(Self::Recovery),
            b"standby" => Ok(Self::Standby),
            b"other" => Ok(Self::Other),
            _ => Err(LocalError::Malformed("unknown recovery mode")),
        }
    }
}

/// What is asked of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Make one WAL file durable off this host.
    Push {
        /// Working directory of the caller: the data directory.
        cwd: PathBuf,
        /// `%p`, relative to `cwd` or absolute.
        path: PathBuf,
        /// Longest wait; zero leaves it to the agent's `push_wait`.
        wait: Duration,
    },
    /// Put one WAL file where PostgreSQL wants it.
    Fetch {
        /// Working directory of the caller: the data directory.
        cwd: PathBuf,
        /// `%f`.
        name: String,
        /// `%p`, relative to `cwd` or absolute.
        target: PathBuf,
        /// What an unknown answer becomes.
        mode: FetchMode,
    },
    /// Take a base backup of this node; the body says how.
    Backup {
        /// Options as JSON.
        json: String,
    },
    /// The report `pgconvoy info` prints.
    Info,
    /// State of this agent.
    Status,
}

impl Request {
    /// The whole frame, length included.
    pub fn frame(&self) -> Vec<u8> {
        match self {
            Self::Push { cwd, path, wait } => {
                let wait = wait.as_millis().to_string();
                frame(&[b"push", PROTOCOL.as_bytes(), bytes_of(cwd), bytes_of(path), wait.as_bytes()])
            }
            Self::Fetch { cwd, name, target, mode } => frame(&[
                b"fetch",
                PROTOCOL.as_bytes(),
                bytes_of(cwd),
                name.as_bytes(),
                bytes_of(target),
                mode.word().as_bytes(),
            ]),
            Self::Backup { json } => frame(&[b"backup", PROTOCOL.as_bytes(), json.as_bytes()]),
            Self::Info => frame(&[b"info", PROTOCOL.as_bytes()]),
            Self::Status => frame(&[b"status", PROTOCOL.as_bytes()]),
        }
    }

    /// Reads the body of a frame.
    ///
    /// # Errors
    /// [`LocalError::Malformed`] when the version, the verb or the number of fields is not known.
    pub fn parse(body: &[u8]) -> Result<Self, LocalError> {
        let fields: Vec<&[u8]> = body.split(|byte| *byte == 0).collect();
        let [verb, version, rest @ ..] = fields.as_slice() else {
            return Err(LocalError::Malformed("verb or version is missing"));
        };
        if *version != PROTOCOL.as_bytes() {
            return Err(LocalError::Malformed("this agent speaks version 1 of the local protocol"));
        }
        match (*verb, rest) {
            (b"push", [cwd, path, wait]) => {
                Ok(Self::Push { cwd: path_of(cwd), path: path_of(path), wait: Duration::from_millis(number(wait)?) })
            }
            (b"fetch", [cwd, name, target, mode]) => Ok(Self::Fetch {
                cwd: path_of(cwd),
                name: text(name)?,
                target: path_of(target),
                mode: FetchMode::parse(mode)?,
            }),
            (b"backup", [json]) => Ok(Self::Backup { json: text(json)? }),
            (b"info", []) => Ok(Self::Info),
            (b"status", []) => Ok(Self::Status),
            _ => Err(LocalError::Malformed("unknown verb, or wrong number of fields")),
        }
    }
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// Still working.
    Progress(String),
    /// The last frame.
    Done {
        /// Exit code for the caller.
        code: u8,
        /// One line for people, or JSON.
        message: String,
    },
}

impl Response {
    /// A progress answer that says how long the agent may still need.
    pub fn waiting(wait: Duration) -> Self {
        Self::Progress(format!("{{{WAIT_FIELD}{}}}", wait.as_millis()))
    }

    /// The whole frame, length included. NUL in a message becomes a space.
    pub fn frame(&self) -> Vec<u8> {
        match self {
            Self::Progress(json) => frame(&[b"progress", json.replace('\0', " ").as_bytes()]),
            Self::Done { code, message } => {
                frame(&[b"done", code.to_string().as_bytes(), message.replace('\0', " ").as_bytes()])
            }
        }
    }

    /// Reads the body of a frame.
    ///
    /// # Errors
    /// [`LocalError::Malformed`] when it is neither kind of answer.
    pub fn parse(body: &[u8]) -> Result<Self, LocalError> {
        let mut fields = body.splitn(3, |byte| *byte == 0);
        match (fields.next(), fields.next(), fields.next()) {
            (Some(b"progress"), Some(json), None) => Ok(Self::Progress(text(json)?)),
            (Some(b"done"), Some(code), Some(message)) => {
                let code = u8::try_from(number(code)?).map_err(|_| LocalError::Malformed("exit code is over 255"))?;
                Ok(Self::Done { code, message: String::from_utf8_lossy(message).into_owned() })
            }
            _ => Err(LocalError::Malformed("answer is neither progress nor done")),
        }
    }

    /// How long the agent may still need, when this is such an answer.
    pub fn announced_wait(&self) -> Option<Duration> {
        let Self::Progress(json) = self else { return None };
        let after = json.split_once(WAIT_FIELD)?.1;
        let digits = after.find(|letter: char| !letter.is_ascii_digit()).map_or(after, |end| &after[..end]);
        digits.parse().ok().map(Duration::from_millis)
    }
}

/// Length of a frame's body from its first four bytes.
///
/// # Errors
/// [`LocalError::TooLong`] over [`FRAME_BYTES_MAX`].
pub fn body_length(head: [u8; 4]) -> Result<usize, LocalError> {
    let length = u32::from_le_bytes(head) as usize;
    if length > FRAME_BYTES_MAX { Err(LocalError::TooLong(length)) } else { Ok(length) }
}

/// One connection to the agent, for one request.
#[derive(Debug)]
pub struct Call {
    stream: UnixStream,
    deadline: Instant,
    buffer: Vec<u8>,
}

impl Call {
    /// Connects and sends the request.
    ///
    /// The send timeout is set before connecting, because connecting to a stopped agent whose backlog is full would
    /// otherwise never return.
    ///
    /// # Errors
    /// [`LocalError::NoAgent`] when nobody listens, [`LocalError::Denied`], [`LocalError::Deadline`], [`LocalError::Broken`].
    pub fn start(socket: &Path, request: &[u8], deadline: Instant) -> Result<Self, LocalError> {
        let remaining = time_left(deadline)?;
        let none = |errno: rustix::io::Errno| LocalError::NoAgent(errno.into());
        let address = SocketAddrUnix::new(socket).map_err(none)?;
        let descriptor = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(none)?;
        sockopt::set_socket_timeout(&descriptor, sockopt::Timeout::Send, Some(remaining)).map_err(none)?;
        rustix::net::connect(&descriptor, &address).map_err(|errno| match errno {
            rustix::io::Errno::AGAIN => LocalError::Deadline,
            rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => LocalError::Denied(errno.into()),
            other => none(other),
        })?;
        let mut stream = UnixStream::from(descriptor);
        stream.write_all(request).map_err(broken)?;
        Ok(Self { stream, deadline, buffer: Vec::with_capacity(READ_BYTES) })
    }

    /// Moves the deadline, for callers that were told to wait.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// The next answer; after [`Response::Done`] there is none.
    ///
    /// # Errors
    /// [`LocalError::Deadline`], [`LocalError::Broken`], [`LocalError::Malformed`], [`LocalError::TooLong`].
    pub fn next_response(&mut self) -> Result<Response, LocalError> {
        loop {
            if let Some((head, rest)) = self.buffer.split_first_chunk::<4>() {
                let length = body_length(*head)?;
                if rest.len() >= length {
                    let response = Response::parse(&rest[..length])?;
                    self.buffer.drain(..4 + length);
                    return Ok(response);
                }
            }
            self.read_more()?;
        }
    }

    fn read_more(&mut self) -> Result<(), LocalError> {
        self.stream.set_read_timeout(Some(time_left(self.deadline)?)).map_err(LocalError::Broken)?;
        let mut piece = [0; READ_BYTES];
        match self.stream.read(&mut piece) {
            Ok(0) => Err(LocalError::Broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(read) => {
                self.buffer.extend_from_slice(&piece[..read]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(broken(error)),
        }
    }
}

/// Asks once and waits for the last answer, showing progress on the way. For people's commands; `pgconvoy-wal` has its own
/// loop.
///
/// # Errors
/// As [`Call::start`] and [`Call::next_response`].
pub fn ask(
    socket: &Path,
    request: &Request,
    deadline: Instant,
    mut progress: impl FnMut(&str),
) -> Result<(u8, String), LocalError> {
    let mut call = Call::start(socket, &request.frame(), deadline)?;
    loop {
        match call.next_response()? {
            Response::Progress(json) => progress(&json),
            Response::Done { code, message } => return Ok((code, message)),
        }
    }
}

fn time_left(deadline: Instant) -> Result<Duration, LocalError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(LocalError::Deadline) } else { Ok(left) }
}

fn broken(error: io::Error) -> LocalError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => LocalError::Deadline,
        _ => LocalError::Broken(error),
    }
}

fn frame(fields: &[&[u8]]) -> Vec<u8> {
    let length = fields.iter().map(|field| field.len() + 1).sum::<usize>().saturating_sub(1);
    let mut frame = Vec::with_capacity(4 + length);
    frame.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    for (index, field) in fields.iter().enumerate() {
        if index > 0 {
            frame.push(0);
        }
        frame.extend_from_slice(field);
    }
    frame
}

fn bytes_of(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

fn path_of(field: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(field))
}

fn text(field: &[u8]) -> Result<String, LocalError> {
    std::str::from_utf8(field).map(str::to_owned).map_err(|_| LocalError::Malformed("field is not UTF-8"))
}

fn number(field: &[u8]) -> Result<u64, LocalError> {
    std::str::from_utf8(field)
        .ok()
        .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()))
        .and_then(|digits| digits.parse().ok())
        .ok_or(LocalError::Malformed("field is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(frame: &[u8]) -> &[u8] {
        let (head, body) = frame.split_first_chunk::<4>().unwrap();
        assert_eq!(body_length(*head).unwrap(), body.len());
        body
    }

    #[test]
    fn every_request_survives_the_wire() {
        let requests = [
            Request::Push {
                cwd: "/data".into(),
                path: "pg_wal/000000010000000000000001".into(),
                wait: Duration::from_millis(60_000),
            },
            Request::Fetch {
                cwd: "/data".into(),
                name: "00000002.history".into(),
                target: "pg_wal/RECOVERYHISTORY".into(),
                mode: FetchMode::Recovery,
            },
            Request::Backup { json: "{\"label\":\"x\"}".into() },
            Request::Info,
            Request::Status,
        ];
        for request in requests {
            assert_eq!(Request::parse(body(&request.frame())).unwrap(), request);
        }
    }

    #[test]
    fn every_response_survives_the_wire() {
        let responses = [
            Response::Progress("{}".into()),
            Response::Done { code: 255, message: "storage is away".into() },
            Response::Done { code: 0, message: String::new() },
        ];
        for response in responses {
            assert_eq!(Response::parse(body(&response.frame())).unwrap(), response);
        }
    }

    #[test]
    fn strange_bodies_are_refused() {
        let refused: [&[u8]; 10] = [
            b"",
            b"push",
            b"push\x002\0/data\0x\x0060",
            b"push\x001\0/data\0x\0-1",
            b"push\x001\0/data\0x\0+1",
            b"push\x001\0/data\0x",
            b"fetch\x001\0/data\0name\0target\0sometimes",
            b"info\x001\0more",
            b"backup\x001\0\xff",
            b"drop\x001",
        ];
        for body in refused {
            assert!(Request::parse(body).is_err(), "{body:?}");
        }
        assert!(Response::parse(b"done\x00256\0x").is_err());
        assert!(Response::parse(b"done").is_err());
        assert!(body_length(u32::MAX.to_le_bytes()).is_err());
    }

    #[test]
    fn an_announced_wait_is_read() {
        let check = |response: Response, expected: Option<u64>| {
            assert_eq!(response.announced_wait(), expected.map(Duration::from_millis));
        };
        check(Response::waiting(Duration::from_secs(75)), Some(75_000));
        check(Response::Progress("{\"wait_ms\":12,\"x\":1}".into()), Some(12));
        check(Response::Progress("{\"wait_ms\":}".into()), None);
        check(Response::Progress("{}".into()), None);
        check(Response::Done { code: 0, message: "\"wait_ms\":3".into() }, None);
    }
}
