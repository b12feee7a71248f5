//! `pgconvoy-wal`: the tiny command that PostgreSQL starts for every WAL file. It asks the agent and passes the answer on.
//!
//! ```text
//! archive_command = 'pgconvoy-wal push %p'
//! restore_command = 'pgconvoy-wal fetch %f "%p"'
//! ```
//!
//! Invariants: `push` exits 0 or 1 whatever happens, because PostgreSQL's archiver dies on anything over 125 and on signals
//! (`shell_archive.c`). `fetch` in archive recovery exits 1 only when the agent said so; what is unknown is retried, then
//! 255, so that a server never promotes short. On a standby it never exits 255, which would shut the server down, and holds
//! it for at most five seconds. Every wait has a deadline. Nothing here is asynchronous, parses a configuration file or
//! speaks to the network: a call that the agent can answer at once costs one connect, one write and one read.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use agent::local::{Call, DEFAULT_SOCKET, FetchMode, LocalError, Request, Response, SOCKET_VARIABLE};

/// How long `push` waits for the agent's answer until the agent says that it needs longer.
const PUSH_WAIT: Duration = Duration::from_secs(60);
/// How long `fetch` in recovery waits until the agent says that it needs longer.
const FETCH_WAIT: Duration = Duration::from_secs(5 * 60);
/// Longest hold of a standby.
const STANDBY_WAIT: Duration = Duration::from_millis(4_800);
/// What the agent's own wait may be exceeded by before this command gives up on it.
const MARGIN: Duration = Duration::from_secs(10);
/// How long `push` tries to reach an agent that is not there (a restart).
const RESTART_WAIT: Duration = Duration::from_secs(10);
/// Pause between two attempts to connect.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

const OK: u8 = 0;
const NO: u8 = 1;
const USAGE: u8 = 2;
const UNKNOWN: u8 = 255;

const HELP: &str = "usage: pgconvoy-wal push PATH [--socket PATH] [--wait SECONDS]
       pgconvoy-wal fetch NAME TARGET [--socket PATH] [--wait SECONDS]

push asks the agent to make one WAL file durable off this host: exit 0 when it is, else 1.
fetch asks the agent for one WAL file: exit 0 when TARGET is written, 1 when the archive does not have it,
255 in archive recovery when that cannot be known now.
--wait bounds the agent's own wait (archive.push_wait, fetch.wait).
The socket is --socket, else $PGCONVOY_SOCKET, else /run/pgconvoy/agent.sock.
";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let verb = arguments.first().and_then(|verb| verb.to_str()).unwrap_or_default().to_owned();
    let on_panic = match verb.as_str() {
        "push" => NO,
        "fetch" => unknown(FetchMode::of_directory(Path::new("."))),
        _ => USAGE,
    };
    ExitCode::from(catch_unwind(|| run(&verb, arguments.get(1..).unwrap_or_default(), on_panic)).unwrap_or(on_panic))
}

/// Runs one verb. `unusable` is the code for arguments that make no sense: it must be harmless to PostgreSQL.
fn run(verb: &str, arguments: &[OsString], unusable: u8) -> u8 {
    match verb {
        "push" | "fetch" => {}
        "--help" | "-h" | "help" => return print(HELP),
        "--version" | "-V" | "version" => return print(concat!("pgconvoy-wal ", env!("CARGO_PKG_VERSION"), "\n")),
        _ => {
            complain("expected push or fetch; see pgconvoy-wal --help", "");
            return USAGE;
        }
    }
    let Some(options) = Options::parse(arguments) else {
        complain(verb, "arguments not understood; see pgconvoy-wal --help");
        return unusable;
    };
    let Ok(cwd) = std::env::current_dir() else {
        complain(verb, "the working directory does not exist");
        return unusable;
    };
    match (verb, options.files.as_slice()) {
        ("push", [path]) => push(&options, cwd, path),
        ("fetch", [name, target]) => match name.to_str() {
            Some(name) => fetch(&options, cwd, name, target),
            None => unusable,
        },
        _ => {
            complain(verb, "wrong number of arguments; see pgconvoy-wal --help");
            unusable
        }
    }
}

struct Options<'a> {
    socket: PathBuf,
    wait: Option<Duration>,
    files: Vec<&'a OsStr>,
}

impl<'a> Options<'a> {
    fn parse(arguments: &'a [OsString]) -> Option<Self> {
        let mut options = Self { socket: PathBuf::new(), wait: None, files: Vec::with_capacity(2) };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.to_str() {
                Some("--socket") => options.socket = PathBuf::from(rest.next()?),
                Some("--wait") => options.wait = Some(Duration::from_secs(rest.next()?.to_str()?.parse().ok()?)),
                Some(flag) if flag.starts_with("--") => return None,
                _ => options.files.push(argument),
            }
        }
        if options.socket.as_os_str().is_empty() {
            options.socket = std::env::var_os(SOCKET_VARIABLE).unwrap_or_else(|| DEFAULT_SOCKET.into()).into();
        }
        Some(options)
    }
}

fn push(options: &Options<'_>, cwd: PathBuf, path: &OsStr) -> u8 {
    let socket = &options.socket;
    let request = Request::Push { cwd, path: path.into(), wait: options.wait.unwrap_or_default() }.frame();
    let start = Instant::now();
    let patience = Patience {
        absent_until: start + RESTART_WAIT,
        deadline: start + options.wait.unwrap_or(PUSH_WAIT) + MARGIN,
        extendable: options.wait.is_none(),
    };
    let result = ask(socket, &request, patience);
    let file = Path::new(path).file_name().unwrap_or(path).to_string_lossy();
    match result {
        Ok((OK, _)) => OK,
        Ok((_, message)) => {
            complain(&file, &message);
            NO
        }
        Err(error) => {
            complain(&file, &error_text(&error, socket));
            NO
        }
    }
}

fn fetch(options: &Options<'_>, cwd: PathBuf, name: &str, target: &OsStr) -> u8 {
    let mode = FetchMode::of_directory(&cwd);
    let request = Request::Fetch { cwd, name: name.to_owned(), target: target.into(), mode }.frame();
    let start = Instant::now();
    let patience = match mode {
        FetchMode::Recovery => {
            let wait = options.wait.unwrap_or(FETCH_WAIT);
            Patience { absent_until: start + wait, deadline: start + wait + MARGIN, extendable: options.wait.is_none() }
        }
        FetchMode::Standby | FetchMode::Other => {
            let until = start + options.wait.map_or(STANDBY_WAIT, |wait| wait.min(STANDBY_WAIT));
            Patience { absent_until: until, deadline: until, extendable: false }
        }
    };
    match ask(&options.socket, &request, patience) {
        Ok((code @ (OK | NO), message)) => {
            if !message.is_empty() {
                complain(name, &message);
            }
            code
        }
        Ok((_, message)) => {
            complain(name, &message);
            unknown(mode)
        }
        Err(error) => {
            complain(name, &error_text(&error, &options.socket));
            unknown(mode)
        }
    }
}

/// What PostgreSQL is told when the answer is not known.
fn unknown(mode: FetchMode) -> u8 {
    match mode {
        FetchMode::Recovery => UNKNOWN,
        FetchMode::Standby | FetchMode::Other => NO,
    }
}

struct Patience {
    /// Until when an agent that is not there is tried again.
    absent_until: Instant,
    /// When to give up on an agent that is there.
    deadline: Instant,
    /// Whether the agent may move the deadline by saying how long it needs.
    extendable: bool,
}

/// Asks until there is an answer; an agent that is away or goes away is tried again while patience lasts.
fn ask(socket: &Path, request: &[u8], mut patience: Patience) -> Result<(u8, String), LocalError> {
    loop {
        let error = match ask_once(socket, request, &mut patience) {
            Err(error @ (LocalError::NoAgent(_) | LocalError::Broken(_))) => error,
            result => return result,
        };
        let now = Instant::now();
        let until = match error {
            LocalError::Broken(_) => patience.absent_until.max(now + RETRY_PAUSE).min(patience.deadline),
            _ => patience.absent_until,
        };
        if now + RETRY_PAUSE >= until {
            return Err(error);
        }
        std::thread::park_timeout(RETRY_PAUSE);
    }
}

fn ask_once(socket: &Path, request: &[u8], patience: &mut Patience) -> Result<(u8, String), LocalError> {
    let mut call = Call::start(socket, request, patience.deadline)?;
    // An agent that was reached once and then restarts gets its time again.
    patience.absent_until = patience.absent_until.max(Instant::now() + RESTART_WAIT).min(patience.deadline);
    loop {
        let response = call.next_response()?;
        if let Some(wait) = response.announced_wait().filter(|_| patience.extendable) {
            patience.deadline = patience.deadline.max(Instant::now() + wait + MARGIN);
            call.set_deadline(patience.deadline);
        }
        if let Response::Done { code, message } = response {
            return Ok((code, message));
        }
    }
}

fn error_text(error: &LocalError, socket: &Path) -> String {
    format!("{error} ({})", socket.display())
}

fn print(text: &str) -> u8 {
    if std::io::stdout().write_all(text.as_bytes()).is_ok() { OK } else { NO }
}

/// One line for PostgreSQL's log; a closed stderr is no reason to fail differently.
fn complain(about: &str, message: &str) {
    let line = format!("pgconvoy-wal: {about}: {}\n", message.trim_end().replace('\n', " "));
    let _ = std::io::stderr().write_all(line.as_bytes());
}
