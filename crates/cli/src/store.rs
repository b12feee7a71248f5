//! `pgconvoy store`: what a store lost that was set back to an older copy of itself, and accepting that.

use clap::{Args, Subcommand};
use process::exit::Exit;
use proto::operator::AcceptStoreRequest;
use repository::{
    acceptance::{Report, render},
    name::{ClusterName, StoreName},
};

use crate::{
    args::Output,
    config::Config,
    confirmed::{Reading, shown_before_done},
    coordinator::operator,
    error::CliError,
};

#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    #[command(subcommand)]
    pub(crate) verb: StoreVerb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StoreVerb {
    /// Show what a store lost that was set back to an older copy of itself, and with --confirm go on with what is there.
    Accept(AcceptArgs),
}

#[derive(Debug, Args)]
pub(crate) struct AcceptArgs {
    /// The store, as `info` names it.
    pub(crate) store: StoreName,
    /// Only this cluster [default: all of which it lost roots].
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: Option<ClusterName>,
    /// Accept what is shown; with a PLAN only if that is still what was lost, as a run without --confirm prints it.
    #[arg(long, value_name = "PLAN", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub(crate) confirm: Option<String>,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
}

/// `pgconvoy store …`
pub(crate) async fn store(config: &Config, arguments: &StoreArgs) -> Result<Exit, CliError> {
    let StoreVerb::Accept(arguments) = &arguments.verb;
    let mut client = operator(&config.coordinator).await?;
    let reading = Reading {
        plan: |report: &Report| &report.plan,
        acts: |report| !report.clusters.is_empty(),
        is_complete: Report::is_complete,
        render,
        next: &|report| next(report, arguments),
    };
    let ask = async |confirm| {
        let request = AcceptStoreRequest {
            store: arguments.store.to_string(),
            cluster: arguments.cluster.as_ref().map(ToString::to_string).unwrap_or_default(),
            confirm,
        };
        Ok(client.accept_store(request).await?.into_inner().report_json)
    };
    shown_before_done(arguments.confirm.as_deref(), arguments.output, &reading, ask).await
}

/// What it comes to, and what to do.
fn next(report: &Report, arguments: &AcceptArgs) -> String {
    let cluster = arguments.cluster.as_ref().map(|cluster| format!(" --cluster {cluster}")).unwrap_or_default();
    match (report.clusters.as_slice(), report.applied) {
        ([], _) => format!("store {} has every root that was seen there", report.store),
        (_, true) if report.is_complete() => "accepted; the other stores fill it up".to_owned(),
        (_, true) => "not all of it was accepted; where it was not, the store is set back as before, unless the outcome is unknown: ask again"
            .to_owned(),
        (_, false) => format!(
            "nothing was changed; if an older copy was put back by mistake, put the right one there; to go on with this one, \
             run: pgconvoy store accept {}{cluster} --confirm={}",
            report.store, report.plan
        ),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Arguments, Verb};

    fn arguments(line: &[&str]) -> AcceptArgs {
        let line = [&["pgconvoy", "store", "accept"], line].concat();
        let Verb::Store(StoreArgs { verb: StoreVerb::Accept(arguments) }) =
            Arguments::try_parse_from(&line).unwrap().verb
        else {
            panic!("{line:?} accepts nothing");
        };
        arguments
    }

    #[test]
    fn a_confirmation_may_name_what_was_shown() {
        assert_eq!(arguments(&["repo1"]).confirm, None);
        assert_eq!(arguments(&["--confirm", "repo1"]).confirm.as_deref(), Some(""));
        assert_eq!(arguments(&["repo1", "--confirm=0123"]).confirm.as_deref(), Some("0123"));
    }

    #[test]
    fn the_last_line_says_what_to_do() {
        let nothing = Report::new("repo1".parse().unwrap(), Vec::new());
        assert_eq!(next(&nothing, &arguments(&["repo1"])), "store repo1 has every root that was seen there");
    }
}
