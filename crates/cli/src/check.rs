//! `pgconvoy check`: a WAL segment forced through, one line a rule, exit 1 when a rule does not hold.
//!
//! The coordinator checks and says what to do about what it found; rules about limits that the caller gave are held against
//! its report by [`services`], and [`nagios`] prints for monitoring.

mod nagios;
mod services;

use std::time::Duration;

use process::{clock, exit::Exit};
use proto::operator::{CheckClusterRequest, CheckLine, CheckState, GetInfoRequest};
use repository::info::Info;
use serde::Serialize;
use tonic::Request;

use crate::{
    args::{CheckArgs, Output},
    config::Config,
    coordinator::operator,
    error::CliError,
    output,
};
use services::Figure;

pub(crate) use services::Limits;

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
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'static str>,
}

/// `pgconvoy check`
pub(crate) async fn check(config: &Config, arguments: &CheckArgs) -> Result<Exit, CliError> {
    let found = found(config, arguments).await;
    if arguments.nagios {
        let (line, state) = match &found {
            Ok((lines, figures)) => (nagios::line(arguments.cluster.as_ref(), lines, figures), nagios::state(lines)),
            Err(error) => (nagios::unknown(&error.to_string()), nagios::State::Unknown),
        };
        output::line(&line)?;
        return Ok(state.exit());
    }
    let (lines, _) = found?;
    match arguments.output {
        Output::Text => output::text(&render(&lines))?,
        Output::Json => output::json(&report(arguments.cluster.as_ref(), &lines))?,
    }
    Ok(if holds(&lines) { Exit::Ok } else { Exit::Negative })
}

/// The coordinator's lines and those about limits.
async fn found(config: &Config, arguments: &CheckArgs) -> Result<(Vec<CheckLine>, Vec<Figure>), CliError> {
    let wait = arguments.timeout.duration();
    let mut request = Request::new(CheckClusterRequest {
        cluster: arguments.cluster.to_string(),
        timeout_seconds: u32::try_from(wait.as_secs().max(1)).unwrap_or(u32::MAX),
    });
    request.set_timeout(wait + ANSWER_MARGIN);
    let mut client = operator(&config.coordinator).await?;
    let mut lines = client.check_cluster(request).await?.into_inner().lines;
    if arguments.limits.are_none() {
        return Ok((lines, Vec::new()));
    }
    let asked = GetInfoRequest { cluster: arguments.cluster.to_string() };
    let answer = client.get_info(asked).await?.into_inner();
    let unreadable = |source: serde_json::Error| {
        CliError::new(Exit::Refused, "the report that came is not one this version can read").caused_by(source)
    };
    let info: Info = serde_json::from_str(&answer.info_json).map_err(unreadable)?;
    let nothing = || CliError::new(Exit::Negative, format!("the report says nothing of {}", arguments.cluster));
    let cluster = info.clusters.iter().find(|one| one.cluster == arguments.cluster).ok_or_else(nothing)?;
    let (more, figures) = services::lines(cluster, &arguments.limits, clock::now());
    lines.extend(more);
    Ok((lines, figures))
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

/// Where to look when a rule does not hold; the rules that are not here say so themselves.
const HINTS: [(&str, &str); 12] = [
    ("identity", "pgconvoy info shows the nodes; one of another cluster needs another name in its configuration"),
    ("node ", "the agent's log on that host says more"),
    ("store ", "pgconvoy info shows the store, the coordinator's log what it answered"),
    ("contents", "pgconvoy verify"),
    ("retention in ", "pgconvoy expire shows what would be removed"),
    ("segment", "the agent's log on the primary's host, and pgconvoy info"),
    ("retention", "pgconvoy info lists the backups, pgconvoy expire why they go"),
    ("backup age", "pgconvoy operations says why the last one failed"),
    ("full backup age", "pgconvoy backup --type full takes one"),
    ("archives", "pgconvoy info lists the gaps; a backup makes a new beginning"),
    ("restorable", "pgconvoy info says why; a backup makes a new beginning"),
    ("archive age", "pgconvoy info shows which road each node takes"),
];

fn hint(line: &CheckLine) -> Option<&'static str> {
    let found = HINTS.iter().find(|(rule, _)| line.rule.starts_with(rule))?;
    (line.state() != CheckState::Ok).then_some(found.1)
}

fn render(lines: &[CheckLine]) -> String {
    let text = |line: &CheckLine| match hint(line) {
        Some(hint) => format!("{} [{hint}]", line.text),
        None => line.text.clone(),
    };
    let row = |line: &CheckLine| vec![word(line.state()).to_uppercase(), line.rule.clone(), text(line)];
    output::table(&lines.iter().map(row).collect::<Vec<Vec<String>>>())
}

fn report<'a>(cluster: &'a str, lines: &'a [CheckLine]) -> Report<'a> {
    let rules = lines.iter().map(|line| Rule {
        rule: &line.rule,
        state: word(line.state()),
        text: &line.text,
        hint: hint(line),
    });
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
        assert_eq!(
            render(&lines),
            "OK       agent        found\nWARNING  store repo1  found [pgconvoy info shows the store, the coordinator's log what it answered]\n"
        );
        assert!(!holds(&[line("agent", CheckState::Failed)]));
        assert!(!holds(&[line("agent", CheckState::Unspecified)]));
        assert!(!holds(&[]), "a check that checked nothing is no success");
    }
}
