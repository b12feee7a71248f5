//! The agent on this host, asked through its socket.
//!
//! The socket is a blocking one; calls run on tokio's blocking pool and end at their deadline.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use agent::local::{self, LocalError, Request};
use process::exit::Exit;

use crate::error::CliError;

/// What the agent said at the end.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Its exit code.
    pub(crate) exit: Exit,
    /// One line for people, or JSON.
    pub(crate) message: String,
}

/// Asks the agent, passing on its progress.
pub(crate) async fn ask(
    socket: &Path,
    request: Request,
    longest: Duration,
    progress: impl FnMut(&str) + Send + 'static,
) -> Result<Answer, CliError> {
    let path = socket.to_owned();
    let asked = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || local::ask(&path, &request, Instant::now() + longest, progress))
    };
    let (code, message) = asked
        .await
        .map_err(|source| CliError::new(Exit::Negative, "asking the agent was cut short").caused_by(source))?
        .map_err(|error| explain(path, error))?;
    Ok(Answer { exit: Exit::from_code(code).unwrap_or(Exit::Negative), message })
}

fn explain(socket: PathBuf, error: LocalError) -> CliError {
    let exit = match error {
        LocalError::Deadline => Exit::Timeout,
        LocalError::Denied(_) => Exit::Refused,
        _ => Exit::Unreachable,
    };
    let denied = matches!(error, LocalError::Denied(_));
    let told = CliError::new(exit, format!("cannot ask the agent at {}", socket.display())).caused_by(error);
    if denied {
        return told.hint("run it as the agent's user, usually postgres, or as a member of that one's group");
    }
    told.hint("is the agent running (systemctl status 'pgconvoy-agent@*'), and may you use its socket? Set agent_socket if it lies elsewhere")
}
