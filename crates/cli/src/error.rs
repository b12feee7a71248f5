//! The one error of the operator's command: a message, what caused it, a hint, and an exit code from the table.

use std::{error::Error, fmt};

use process::exit::Exit;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// How rustls begins what the other end said before it hung up.
const TLS_ALERT: &str = "received fatal alert";
/// What tonic says when a call's own time has run out.
const TIME_RAN_OUT: &str = "Timeout expired";
const CERTIFICATE_HINT: &str =
    "is the certificate in [coordinator] still valid, and signed by the authority of the coordinator's client_ca?";

/// What ended a verb early.
#[derive(Debug)]
pub(crate) struct CliError {
    exit: Exit,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl CliError {
    /// An error that ends the process with `exit`.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: None, source: None }
    }

    /// A wrong configuration.
    pub(crate) fn from_config(source: impl Error + Send + Sync + 'static) -> Self {
        let message = source.to_string();
        match source.source().map(chain) {
            Some(causes) => Self::new(Exit::Config, format!("{message}: {causes}")),
            None => Self::new(Exit::Config, message),
        }
    }

    /// Adds what the person at the keyboard can do.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the cause.
    pub(crate) fn caused_by(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// How the process ends.
    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    /// Prints message, causes and hint to standard error. `one_line` leaves the hint away, for PostgreSQL's log.
    pub(crate) fn report(&self, one_line: bool) -> Exit {
        let mut text = format!("pgconvoy: {self}");
        if let (false, Some(hint)) = (one_line, &self.hint) {
            text.push_str("\nhint: ");
            text.push_str(hint);
        }
        crate::output::complain(&text);
        self.exit
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.source {
            Some(source) => write!(f, ": {}", chain(source.as_ref())),
            None => Ok(()),
        }
    }
}

/// An error with its causes in one line, each said once.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        if let Some(cause) = broken_transport(&status) {
            let error = Self::new(exit_for(&status), "the connection to the coordinator broke").caused_by(cause);
            return if error.exit == Exit::Refused { error.hint(CERTIFICATE_HINT) } else { error };
        }
        let details = status.get_error_details();
        let reason = details.error_info().map(|info| info.reason.clone());
        let hint = hint_for(reason.as_deref());
        let message = match reason {
            Some(reason) => format!("{} ({reason})", status.message()),
            None if status.message().is_empty() => status.code().description().to_owned(),
            None => status.message().to_owned(),
        };
        Self { exit: exit_for(&status), message, hint: hint.map(str::to_owned), source: None }
    }
}

/// The exit code for an answer of the coordinator: its reason first, else its gRPC code.
pub(crate) fn exit_for(status: &Status) -> Exit {
    match status.get_error_details().error_info().map(|info| info.reason.as_str()) {
        Some("WAL_CONFLICT") => return Exit::Conflict,
        Some("STORE_FULL" | "BODY_DAMAGED") => return Exit::Store,
        _ => {}
    }
    if let Some(cause) = broken_transport(status) {
        return if cause.contains(TLS_ALERT) { Exit::Refused } else { Exit::Unreachable };
    }
    match status.code() {
        Code::Ok => Exit::Ok,
        Code::NotFound | Code::Unknown | Code::Internal => Exit::Negative,
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        Code::Unavailable => Exit::Unreachable,
        // A cancelled call is one of ours whose time ran out; in either case the outcome is unknown.
        Code::DeadlineExceeded | Code::Cancelled => Exit::Timeout,
        Code::DataLoss | Code::ResourceExhausted => Exit::Store,
        Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Unimplemented => Exit::Refused,
    }
}

/// Why the transport failed, when the status was made on this side of the wire and says no more than that: TLS 1.3 tells
/// a caller only after the handshake, in answer to its first request, that its certificate is refused.
fn broken_transport(status: &Status) -> Option<String> {
    match status.code() {
        // A request that a broken connection never took is cancelled, and so is one whose time has run out.
        Code::Unknown | Code::Unavailable | Code::Internal | Code::Cancelled if status.message() != TIME_RAN_OUT => {
            status.source().map(chain)
        }
        _ => None,
    }
}

fn hint_for(reason: Option<&str>) -> Option<&'static str> {
    Some(match reason? {
        "CLUSTER_UNKNOWN" => "run: pgconvoy cluster create NAME",
        "SYSTEM_IDENTIFIER_MISMATCH" => "another database cluster holds this name; give this one a name of its own",
        "FOREIGN_WRITER" => {
            "another node wrote this timeline; if it is gone for good, run: pgconvoy node adopt CLUSTER NODE"
        }
        "WAL_CONFLICT" => "compare both contents, then run: pgconvoy conflict resolve CLUSTER WAL_FILE FINGERPRINT",
        "NO_CONFLICT" => "see `pgconvoy info` for the WAL files that are in conflict, and their fingerprints",
        "STORE_FULL" => "make room in the store, or raise full_percent in the coordinator's configuration",
        "NO_FIT_NODE" => "see `pgconvoy info` for the nodes and why none is fit",
        "OPERATION_UNKNOWN" => "see `pgconvoy operations` for those that are known",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn reasons_and_codes_choose_the_exit() {
        let with_reason = |code, reason: &str| {
            Status::with_error_details(
                code,
                "no",
                ErrorDetails::with_error_info(reason, "pgconvoy", std::collections::HashMap::<String, String>::new()),
            )
        };
        assert_eq!(exit_for(&with_reason(Code::AlreadyExists, "WAL_CONFLICT")), Exit::Conflict);
        assert_eq!(exit_for(&with_reason(Code::ResourceExhausted, "STORE_FULL")), Exit::Store);
        assert_eq!(exit_for(&Status::unavailable("x")), Exit::Unreachable);
        assert_eq!(exit_for(&Status::deadline_exceeded("x")), Exit::Timeout);
        let error = CliError::from(with_reason(Code::FailedPrecondition, "CLUSTER_UNKNOWN"));
        assert_eq!(error.exit(), Exit::Refused);
        assert!(error.hint.unwrap().contains("cluster create"));
    }

    #[test]
    fn a_connection_that_broke_is_told_apart_from_an_answer() {
        let broken = |text: &str| Status::from_error(text.to_owned().into());
        let refused = CliError::from(broken("received fatal alert: UnknownCA"));
        assert_eq!((refused.exit(), refused.hint.is_some()), (Exit::Refused, true));
        assert!(refused.to_string().ends_with("broke: received fatal alert: UnknownCA"), "{refused}");
        assert_eq!(exit_for(&broken("connection reset by peer")), Exit::Unreachable);
        assert_eq!(exit_for(&Status::unknown("an answer")), Exit::Negative);
        assert_eq!(exit_for(&Status::cancelled(TIME_RAN_OUT)), Exit::Timeout);
    }

    #[test]
    fn causes_are_said_once() {
        let inner = std::io::Error::other("the disk is gone");
        let error = CliError::new(Exit::Store, "cannot read").caused_by(inner);
        assert_eq!(error.to_string(), "cannot read: the disk is gone");
    }
}
