//! The tiny command as PostgreSQL starts it: whatever the agent does, the exit code is one PostgreSQL can live with.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use agent::local::{Request, Response};

const COMMAND: &str = env!("CARGO_BIN_EXE_pgconvoy-wal");
const SEGMENT: &str = "pg_wal/000000010000000000000001";

struct Caller {
    folder: tempfile::TempDir,
}

impl Caller {
    fn new(signal: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("data")).unwrap();
        if let Some(signal) = signal {
            std::fs::write(folder.path().join("data").join(signal), b"").unwrap();
        }
        Self { folder }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    /// An agent that does this with each connection.
    fn agent(&self, serve: impl Fn(&mut std::os::unix::net::UnixStream) + Send + 'static) {
        let listener = UnixListener::bind(self.socket()).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&mut stream.unwrap());
            }
        });
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(COMMAND);
        command.args(arguments).current_dir(self.data()).env("PGCONVOY_SOCKET", self.socket());
        command
    }

    fn run(&self, arguments: &[&str]) -> (i32, String, Duration) {
        let start = Instant::now();
        let Output { status, stderr, .. } = self.command(arguments).output().unwrap();
        (status.code().unwrap(), String::from_utf8(stderr).unwrap(), start.elapsed())
    }
}

fn request(stream: &mut std::os::unix::net::UnixStream) -> Request {
    let mut head = [0; 4];
    stream.read_exact(&mut head).unwrap();
    let mut body = vec![0; u32::from_le_bytes(head) as usize];
    stream.read_exact(&mut body).unwrap();
    Request::parse(&body).unwrap()
}

fn answer(stream: &mut std::os::unix::net::UnixStream, response: &Response) {
    stream.write_all(&response.frame()).unwrap();
}

fn done(code: u8, message: &str) -> Response {
    Response::Done { code, message: message.to_owned() }
}

#[test]
fn an_answer_is_passed_on_and_the_working_directory_is_sent() {
    let caller = Caller::new(None);
    let data = caller.data().canonicalize().unwrap();
    caller.agent(move |stream| {
        let Request::Push { cwd, path, .. } = request(stream) else { panic!("a push") };
        assert_eq!((cwd, path.as_path()), (data.clone(), Path::new(SEGMENT)));
        answer(stream, &Response::waiting(Duration::from_secs(1)));
        answer(stream, &done(0, ""));
    });
    let (code, stderr, _) = caller.run(&["push", SEGMENT]);
    assert_eq!((code, stderr.as_str()), (0, ""));
}

#[test]
fn push_exits_0_or_1_whatever_the_agent_says() {
    for code in [1, 2, 5, 126, 127, 137, 255] {
        let caller = Caller::new(None);
        caller.agent(move |stream| {
            request(stream);
            answer(stream, &done(code, "no\nway"));
        });
        let (exit, stderr, _) = caller.run(&["push", SEGMENT]);
        assert_eq!((exit, stderr.as_str()), (1, "pgconvoy-wal: 000000010000000000000001: no way\n"), "{code}");
    }
}

#[test]
fn fetch_codes_follow_the_signal_files() {
    for (signal, said, expected) in [
        (None, 0, 0),
        (None, 1, 1),
        (None, 255, 1),
        (Some("standby.signal"), 255, 1),
        (Some("standby.signal"), 5, 1),
        (Some("recovery.signal"), 1, 1),
        (Some("recovery.signal"), 255, 255),
        (Some("recovery.signal"), 5, 255),
    ] {
        let caller = Caller::new(signal);
        caller.agent(move |stream| {
            request(stream);
            answer(stream, &done(said, ""));
        });
        let (exit, ..) = caller.run(&["fetch", "00000002.history", "pg_wal/RECOVERYHISTORY"]);
        assert_eq!(exit, expected, "{signal:?} {said}");
    }
}

#[test]
fn without_an_agent_every_wait_ends() {
    let check = |signal: Option<&str>, arguments: &[&str], expected: i32, longest: u64| {
        let caller = Caller::new(signal);
        let (exit, stderr, took) = caller.run(arguments);
        assert_eq!(exit, expected, "{arguments:?}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(took < Duration::from_secs(longest), "{took:?}");
    };
    check(None, &["push", SEGMENT], 1, 12);
    check(Some("standby.signal"), &["fetch", "00000002.history", "x"], 1, 6);
    check(Some("recovery.signal"), &["fetch", "00000002.history", "x", "--wait", "1"], 255, 3);
}

#[test]
fn an_agent_that_restarts_is_waited_for() {
    let caller = Caller::new(None);
    let (socket, started) = (caller.socket(), Instant::now());
    std::thread::spawn(move || {
        std::thread::park_timeout(Duration::from_secs(1));
        let listener = UnixListener::bind(socket).unwrap();
        // The first connection breaks, as if the agent had been killed once more.
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        request(&mut stream);
        answer(&mut stream, &done(0, ""));
    });
    assert_eq!(caller.run(&["push", SEGMENT]).0, 0);
    assert!(started.elapsed() >= Duration::from_millis(900));
}

#[test]
fn a_hung_agent_ends_at_the_deadline() {
    let caller = Caller::new(None);
    let listener = UnixListener::bind(caller.socket()).unwrap();
    let (exit, stderr, took) = caller.run(&["push", SEGMENT, "--wait", "0"]);
    assert_eq!(exit, 1, "{stderr}");
    assert!(took < Duration::from_secs(12) && stderr.contains("did not answer in time"), "{took:?} {stderr}");
    let standby = Caller::new(Some("standby.signal"));
    let (exit, _, took) = {
        let mut command = standby.command(&["fetch", "00000002.history", "x"]);
        command.env("PGCONVOY_SOCKET", caller.socket());
        let start = Instant::now();
        (command.output().unwrap().status.code().unwrap(), (), start.elapsed())
    };
    assert_eq!(exit, 1);
    assert!(took < Duration::from_secs(6), "{took:?}");
    drop(listener);
}

#[test]
fn a_closed_stderr_changes_nothing() {
    let caller = Caller::new(None);
    caller.agent(|stream| {
        request(stream);
        answer(stream, &done(1, "no"));
    });
    let mut child = caller.command(&["push", SEGMENT]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn nonsense_is_harmless_to_postgresql() {
    let (plain, recovery) = (Caller::new(None), Caller::new(Some("recovery.signal")));
    assert_eq!(plain.run(&["push"]).0, 1);
    assert_eq!(plain.run(&["push", "a", "b"]).0, 1);
    assert_eq!(plain.run(&["push", "--verbose", "a"]).0, 1);
    assert_eq!(plain.run(&["fetch", "a"]).0, 1);
    assert_eq!(recovery.run(&["fetch", "a"]).0, 255);
    assert_eq!(plain.run(&["pull"]).0, 2);
    assert_eq!(plain.run(&["--version"]).0, 0);
}

#[test]
fn a_socket_without_permission_is_told_apart_from_no_agent() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;

    let caller = Caller::new(None);
    let set = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    caller.agent(|stream| answer(stream, &Response::Done { code: 0, message: String::new() }));
    set(caller.folder.path(), 0o755);
    set(&caller.socket(), 0o000);
    // Nobody may be kept out of the directory that programs are built in. A process of its own copies: what another test starts
    // meanwhile would inherit the file opened for writing, and nothing runs a file that is.
    let program = caller.folder.path().join("pgconvoy-wal");
    assert!(Command::new("cp").arg(COMMAND).arg(&program).status().unwrap().success());
    set(&program, 0o755);
    let mut command = Command::new(&program);
    command.args(["push", SEGMENT]).current_dir(caller.data()).env("PGCONVOY_SOCKET", caller.socket());
    if rustix::process::geteuid().is_root() {
        // Nobody; root itself is let in everywhere.
        command.uid(65_534).gid(65_534);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("no permission on the agent's socket") && said.contains("agent.sock"), "{said}");
}

#[test]
fn an_agent_of_another_data_directory_refuses() {
    let (ours, theirs) = (Caller::new(None), Caller::new(Some("recovery.signal")));
    let config = ours.folder.path().join("agent.toml");
    let text = format!(
        "node = \"db1\"\ncluster = \"main\"\ndata_directory = \"{}\"\nsocket = \"{}\"\n\
         [coordinator]\naddress = \"http://127.0.0.1:9\"\n[spool]\ndirectory = \"{}\"\n",
        ours.data().display(),
        ours.socket().display(),
        ours.folder.path().join("spool").display()
    );
    std::fs::write(&config, text).unwrap();
    let mut agent = Command::new(env!("CARGO_BIN_EXE_pgconvoy-agent"))
        .arg("--config")
        .arg(&config)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let foreign = |arguments: &[&str]| {
        let output = theirs.command(arguments).env("PGCONVOY_SOCKET", ours.socket()).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (exit, stderr) = foreign(&["push", SEGMENT]);
    assert_eq!(exit, 1);
    assert!(stderr.contains("this agent belongs to"), "{stderr}");
    let (exit, stderr) = foreign(&["fetch", "00000002.history", "pg_wal/RECOVERYHISTORY"]);
    assert_eq!(exit, 255);
    assert!(stderr.contains("this agent belongs to"), "{stderr}");
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(i32::try_from(agent.id()).unwrap()).unwrap(),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    let status = agent.wait().unwrap();
    assert!(status.success(), "{status}");
}
