//! `pgconvoy check`: a WAL segment forced through, one line a rule, exit 1 when a rule does not hold.

use std::time::Duration;

use process::exit::Exit;
use proto::operator::{CheckClusterRequest, CheckLine, CheckState};
use serde::Serialize;
use tonic::Request;

use crate::{
    args::{CheckArgs, Output},
    config::Config,
    coordinator::operator,
    error::CliError,
    output,
};

/// Time the coordinator gets beyond the wait that was asked for.
const ANSWER_MARGIN: Duration = Duration::from_secs(15);

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    cluster: &'a str,
    ok: bool,
    rules: Vec<Rule<'a>>,
}

#[derive(Debug, Serialize)]
struct Rule<'a> {
    rule: &'a str,
    state: &'static str,
    text: &'a str,
}

/// `pgconvoy check`
pub(crate) async fn check(config: &Config, arguments: &CheckArgs) -> Result<Exit, CliError> {
    let wait = arguments.timeout.duration();
    let mut request = Request::new(CheckClusterRequest {
        cluster: arguments.cluster.to_string(),
        timeout_seconds: u32::try_from(wait.as_secs().max(1)).unwrap_or(u32::MAX),
    });
    request.set_timeout(wait + ANSWER_MARGIN);
    let answer = operator(&config.coordinator).await?.check_cluster(request).await?.into_inner();
    match arguments.output {
        Output::Text => output::text(&render(&answer.lines))?,
        Output::Json => output::json(&report(arguments.cluster.as_ref(), &answer.lines))?,
    }
    Ok(if holds(&answer.lines) { Exit::Ok } else { Exit::Negative })
}

fn holds(lines: &[CheckLine]) -> bool {
    !lines.is_empty() && lines.iter().all(|line| matches!(line.state(), CheckState::Ok | CheckState::Warning))
}

fn word(state: CheckState) -> &'static str {
    match state {
        CheckState::Ok => "ok",
        CheckState::Warning => "warning",
        CheckState::Failed => "failed",
        CheckState::Unspecified => "unknown",
    }
}

fn render(lines: &[CheckLine]) -> String {
    let rows: Vec<Vec<String>> =
        lines.iter().map(|line| vec![word(line.state()).to_owned(), line.rule.clone(), line.text.clone()]).collect();
    output::table(&rows)
}

fn report<'a>(cluster: &'a str, lines: &'a [CheckLine]) -> Report<'a> {
    let rules = lines.iter().map(|line| Rule { rule: &line.rule, state: word(line.state()), text: &line.text });
    Report { schema: "pgconvoy.check/v1", cluster, ok: holds(lines), rules: rules.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(rule: &str, state: CheckState) -> CheckLine {
        CheckLine { rule: rule.to_owned(), state: state.into(), text: "found".to_owned() }
    }

    #[test]
    fn a_failed_rule_fails_the_check() {
        let lines = [line("agent", CheckState::Ok), line("store repo1", CheckState::Warning)];
        assert!(holds(&lines));
        assert_eq!(render(&lines), "ok       agent        found\nwarning  store repo1  found\n");
        assert!(!holds(&[line("agent", CheckState::Failed)]));
        assert!(!holds(&[line("agent", CheckState::Unspecified)]));
        assert!(!holds(&[]), "a check that checked nothing is no success");
    }
}
