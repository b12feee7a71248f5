//! `pgconvoy operations`: what runs and what ran.

use process::exit::Exit;
use proto::operator::{ListOperationsRequest, Operation, OperationState};
use serde::Serialize;

use crate::{
    args::{OperationsArgs, Output},
    config::Config,
    coordinator::operator,
    error::CliError,
    output,
};

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    operations: Vec<Row<'a>>,
}

/// One operation as printed.
#[derive(Debug, Serialize)]
pub(crate) struct Row<'a> {
    operation: &'a str,
    kind: &'a str,
    cluster: &'a str,
    node: &'a str,
    primary: &'a str,
    state: &'static str,
    step: &'a str,
    bytes_done: u64,
    bytes_total: u64,
    error: &'a str,
    started: &'a str,
    ended: &'a str,
    backup: &'a str,
    reason: &'a str,
}

/// `pgconvoy operations`
pub(crate) async fn operations(config: &Config, arguments: &OperationsArgs) -> Result<Exit, CliError> {
    let request = ListOperationsRequest {
        cluster: arguments.cluster.as_ref().map(ToString::to_string).unwrap_or_default(),
        page_size: arguments.limit,
    };
    let answer = operator(&config.coordinator).await?.list_operations(request).await?.into_inner();
    match arguments.output {
        Output::Text => output::text(&render(&answer.operations))?,
        Output::Json => output::json(&Report {
            schema: "pgconvoy.operations/v1",
            operations: answer.operations.iter().map(row).collect(),
        })?,
    }
    Ok(Exit::Ok)
}

/// The word for a state.
pub(crate) fn word(state: OperationState) -> &'static str {
    match state {
        OperationState::Running => "running",
        OperationState::Done => "done",
        OperationState::Failed => "failed",
        OperationState::WaitingForWal => "waiting for WAL",
        OperationState::Unspecified => "unknown",
    }
}

/// An operation as printed.
pub(crate) fn row(operation: &Operation) -> Row<'_> {
    Row {
        operation: &operation.operation,
        kind: &operation.kind,
        cluster: &operation.cluster,
        node: &operation.node,
        primary: &operation.primary,
        state: word(operation.state()),
        step: &operation.step,
        bytes_done: operation.bytes_done,
        bytes_total: operation.bytes_total,
        error: &operation.error,
        started: &operation.started,
        ended: &operation.ended,
        backup: &operation.backup,
        reason: &operation.reason,
    }
}

/// Who does it: of a hybrid backup the node whose files are copied, and the primary.
fn nodes(operation: &Operation) -> String {
    match operation.primary.as_str() {
        "" => operation.node.clone(),
        primary => format!("{} with {primary}", operation.node),
    }
}

fn render(operations: &[Operation]) -> String {
    if operations.is_empty() {
        return "no operations\n".to_owned();
    }
    let heading = ["STARTED", "STATE", "KIND", "CLUSTER", "NODE", "OPERATION", "WHAT"].map(str::to_owned).to_vec();
    let mut rows = vec![heading];
    rows.extend(operations.iter().map(|operation| {
        let what = match operation.state() {
            OperationState::Failed => &operation.error,
            OperationState::Done => &operation.backup,
            _ => &operation.step,
        };
        vec![
            operation.started.clone(),
            word(operation.state()).to_owned(),
            operation.kind.clone(),
            operation.cluster.clone(),
            nodes(operation),
            operation.operation.clone(),
            what.clone(),
        ]
    }));
    output::table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_says_what_matters_for_each_state() {
        let operation = |state: OperationState| Operation {
            state: state.into(),
            step: "copying".to_owned(),
            error: "no room".to_owned(),
            backup: "20261123T034138Z-7f3a9c21".to_owned(),
            ..Operation::default()
        };
        let text = render(&[OperationState::Running, OperationState::Done, OperationState::Failed].map(operation));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].ends_with("copying") && lines[2].ends_with("7f3a9c21") && lines[3].ends_with("no room"));
        assert_eq!(render(&[]), "no operations\n");
    }
}
