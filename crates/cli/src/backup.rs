//! `pgconvoy backup`: started by the coordinator, or on this host while the coordinator is away.

use std::time::Duration;

use agent::local::Request;
use process::clock::Monotonic;
use process::exit::Exit;
use process::units::Size;
use proto::operator::{
    BackupShape, BackupSource, BackupType as WireType, Operation, OperationState, StartBackupRequest,
    WatchOperationRequest,
};
use serde::{Deserialize, Serialize};

use crate::{
    args::{BackupArgs, BackupType, Shape, Source},
    config::Config,
    coordinator::{Operator, operator},
    error::CliError,
    local_agent, output,
    progress::Progress,
};

/// Longest a backup on this host may take.
const HERE_LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);
/// How often the watch is taken up again after the coordinator went away.
const WATCH_TRIES: u32 = 60;
/// Pause between two tries.
const WATCH_PAUSE: Duration = Duration::from_secs(5);
/// How long a backup that lacks nothing but WAL is followed.
const WAL_PATIENCE: Duration = Duration::from_secs(15 * 60);
/// Longest label, in bytes.
const LABEL_BYTES_MAX: usize = 200;

/// What the local agent is told.
#[derive(Debug, Serialize)]
struct HereOptions<'a> {
    cluster: &'a str,
    r#type: &'a str,
    label: &'a str,
    start_fast: bool,
    parallel: u32,
    // An agent of an older version does not know it.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_per_second: Option<u64>,
}

/// What the local agent says on the way.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HereProgress {
    built_on: String,
    step: String,
    bytes_done: u64,
    bytes_total: u64,
}

/// `pgconvoy backup`
pub(crate) async fn backup(config: &Config, arguments: &BackupArgs) -> Result<Exit, CliError> {
    if arguments.label.len() > LABEL_BYTES_MAX {
        return Err(CliError::new(Exit::Usage, format!("the label is longer than {LABEL_BYTES_MAX} bytes")));
    }
    if arguments.here {
        return here(config, arguments).await;
    }
    match operator(&config.coordinator).await {
        Ok(client) => by_coordinator(client, arguments).await,
        Err(error) if may_go_here(config, arguments, &error) => {
            output::complain(&format!("pgconvoy: {error}; asking the agent on this host instead"));
            here(config, arguments).await
        }
        Err(error) => Err(error),
    }
}

/// Without the coordinator nobody can choose another node, so only an open choice falls back to this host.
fn may_go_here(config: &Config, arguments: &BackupArgs, error: &CliError) -> bool {
    error.exit() == Exit::Unreachable
        && arguments.node.is_none()
        && arguments.from.is_none()
        && arguments.shape.is_none()
        && !arguments.no_wait
        && config.agent_socket.exists()
}

async fn by_coordinator(mut client: Operator, arguments: &BackupArgs) -> Result<Exit, CliError> {
    let source = match arguments.from {
        None => BackupSource::Unspecified,
        Some(Source::Standby) => BackupSource::Standby,
        Some(Source::Primary) => BackupSource::Primary,
    };
    let request = StartBackupRequest {
        cluster: arguments.cluster.to_string(),
        node: arguments.node.as_ref().map(ToString::to_string).unwrap_or_default(),
        source: source.into(),
        start_fast: arguments.start_fast,
        label: arguments.label.clone(),
        request_id: String::new(),
        parallel: arguments.parallel.unwrap_or(0),
        bytes_per_second: arguments.rate.map(Size::bytes),
        r#type: match arguments.backup_type {
            BackupType::Full => WireType::Full,
            BackupType::Diff => WireType::Diff,
            BackupType::Incr => WireType::Incr,
        }
        .into(),
        shape: match arguments.shape {
            None => BackupShape::Unspecified,
            Some(Shape::Standby) => BackupShape::Standby,
            Some(Shape::Hybrid) => BackupShape::Hybrid,
        }
        .into(),
    };
    let started = client.start_backup(request).await?.into_inner().operation.unwrap_or_default();
    if arguments.no_wait {
        output::line(&started.operation)?;
        return Ok(Exit::Ok);
    }
    output::complain(&format!(
        "backup {} of {} from node {}: {}",
        started.backup, started.cluster, started.node, started.reason
    ));
    let ended = watch(&mut client, started).await?;
    conclude(&ended)
}

fn conclude(operation: &Operation) -> Result<Exit, CliError> {
    match operation.state() {
        OperationState::Done => {
            output::line(&operation.backup)?;
            Ok(Exit::Ok)
        }
        OperationState::Failed => Err(CliError::new(Exit::Negative, format!("the backup failed: {}", operation.error))),
        OperationState::WaitingForWal => Err(CliError::new(
            Exit::Timeout,
            format!("backup {} is {}, and exists as soon as that has come", operation.backup, operation.step),
        )
        .hint("look after archive_command on the primary; `pgconvoy operations` tells when it was published")),
        _ => Err(CliError::new(
            Exit::Timeout,
            "the coordinator stopped telling how the backup goes; its outcome is unknown",
        )
        .hint(format!(
            "ask again with: pgconvoy rpc OperatorService/GetOperation '{{\"operation\":\"{}\"}}'",
            operation.operation
        ))),
    }
}

/// Follows an operation to its end, over restarts of the coordinator.
pub(crate) async fn watch(client: &mut Operator, started: Operation) -> Result<Operation, CliError> {
    let mut progress = Progress::new();
    let mut last = started;
    let begun = last.reason.clone();
    let (mut tries, mut waits_since) = (0, None);
    while goes_on(&last, &mut waits_since) && tries < WATCH_TRIES {
        tries += 1;
        let request = WatchOperationRequest { operation: last.operation.clone() };
        match client.watch_operation(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                while let Ok(Ok(Some(update))) = tokio::time::timeout(WAL_PATIENCE, stream.message()).await {
                    let Some(operation) = update.operation else { continue };
                    if operation.reason != last.reason
                        && let Some(more) = operation.reason.strip_prefix(&begun)
                    {
                        output::complain(more.trim_start_matches([';', ' ']));
                    }
                    progress.show(&operation.step, operation.bytes_done, operation.bytes_total);
                    tries = 0;
                    last = operation;
                    if last.state() == OperationState::WaitingForWal {
                        break;
                    }
                }
            }
            Err(status) if status.code() == tonic::Code::NotFound => return Err(status.into()),
            Err(_) => progress.show("waiting for the coordinator to come back", 0, 0),
        }
        if matches!(last.state(), OperationState::Running | OperationState::WaitingForWal) {
            tokio::time::sleep(WATCH_PAUSE).await;
        }
    }
    progress.finish();
    Ok(last)
}

/// Whether an operation is worth following on.
fn goes_on(operation: &Operation, waits_since: &mut Option<Monotonic>) -> bool {
    match operation.state() {
        OperationState::Running => true,
        OperationState::WaitingForWal => waits_since.get_or_insert_with(Monotonic::now).elapsed() < WAL_PATIENCE,
        _ => false,
    }
}

async fn here(config: &Config, arguments: &BackupArgs) -> Result<Exit, CliError> {
    let options = HereOptions {
        cluster: arguments.cluster.as_ref(),
        r#type: match arguments.backup_type {
            BackupType::Full => "full",
            BackupType::Diff => "diff",
            BackupType::Incr => "incr",
        },
        label: &arguments.label,
        start_fast: arguments.start_fast,
        parallel: arguments.parallel.unwrap_or(0),
        bytes_per_second: arguments.rate.map(Size::bytes),
    };
    let json = serde_json::to_string(&options)
        .map_err(|source| CliError::new(Exit::Usage, "cannot put the options into words").caused_by(source))?;
    let (mut progress, mut told) = (Progress::new(), false);
    let show = move |text: &str| {
        if let Ok(state) = serde_json::from_str::<HereProgress>(text) {
            if !state.built_on.is_empty() && !told {
                told = true;
                output::complain(&state.built_on);
            }
            progress.show(&state.step, state.bytes_done, state.bytes_total);
        }
    };
    let answer = local_agent::ask(&config.agent_socket, Request::Backup { json }, HERE_LONGEST, show).await?;
    match answer.exit {
        Exit::Ok => {
            output::line(&answer.message)?;
            Ok(Exit::Ok)
        }
        Exit::Timeout => Err(CliError::new(Exit::Timeout, answer.message)),
        exit => Err(CliError::new(exit, format!("the backup failed: {}", answer.message))),
    }
}
