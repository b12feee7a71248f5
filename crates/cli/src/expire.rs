//! `pgconvoy expire`: what retention would let go of and why; with `--confirm` exactly that is done.

use clap::Args;
use process::exit::Exit;
use proto::operator::ExpireRequest;
use repository::{
    name::{ClusterName, StoreName},
    retention::report::{Report, render_report},
};

use crate::{
    args::Output,
    config::Config,
    confirmed::{Reading, shown_before_done},
    coordinator::operator,
    error::CliError,
};

#[derive(Debug, Args)]
pub(crate) struct ExpireArgs {
    /// Fleet name of the cluster.
    pub(crate) cluster: ClusterName,
    /// Only this store [default: all].
    #[arg(long, value_name = "NAME")]
    pub(crate) store: Option<StoreName>,
    /// Remove what is shown; with a PLAN only if that is still the plan, as a run without --confirm prints it.
    #[arg(long, value_name = "PLAN", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub(crate) confirm: Option<String>,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
}

/// `pgconvoy expire`
pub(crate) async fn expire(config: &Config, arguments: &ExpireArgs) -> Result<Exit, CliError> {
    let mut client = operator(&config.coordinator).await?;
    let reading = Reading {
        plan: |report: &Report| &report.plan,
        acts: Report::removes_anything,
        is_complete: Report::is_complete,
        render: render_report,
        next: &|report| next(report, arguments),
    };
    let ask = async |confirm| {
        let request = ExpireRequest {
            cluster: arguments.cluster.to_string(),
            store: arguments.store.as_ref().map(ToString::to_string).unwrap_or_default(),
            confirm,
        };
        Ok(client.expire(request).await?.into_inner().report_json)
    };
    shown_before_done(arguments.confirm.as_deref(), arguments.output, &reading, ask).await
}

/// What it comes to, and what to do.
fn next(report: &Report, arguments: &ExpireArgs) -> String {
    let store = arguments.store.as_ref().map(|store| format!(" --store {store}")).unwrap_or_default();
    match (report.applied, report.removes_anything()) {
        (true, _) => "done".to_owned(),
        (false, false) => "nothing is to be removed".to_owned(),
        (false, true) => format!(
            "nothing was removed; to do exactly this, run: pgconvoy expire {}{store} --confirm={}",
            report.cluster, report.plan
        ),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Arguments, Verb};

    fn arguments(line: &[&str]) -> ExpireArgs {
        let Verb::Expire(arguments) = Arguments::try_parse_from([&["pgconvoy", "expire"], line].concat()).unwrap().verb
        else {
            panic!("{line:?} is no expire");
        };
        arguments
    }

    #[test]
    fn a_confirmation_may_name_the_plan() {
        assert_eq!(arguments(&["main"]).confirm, None);
        assert_eq!(arguments(&["--confirm", "main"]).confirm.as_deref(), Some(""));
        assert_eq!(arguments(&["main", "--confirm=0123"]).confirm.as_deref(), Some("0123"));
    }

    #[test]
    fn the_last_line_says_what_to_do() {
        let report = |applied| Report {
            schema: repository::retention::report::SCHEMA.to_owned(),
            cluster: "main".parse().unwrap(),
            plan: "0123".to_owned(),
            applied,
            stores: Vec::new(),
        };
        assert_eq!(next(&report(false), &arguments(&["main"])), "nothing is to be removed");
        assert_eq!(next(&report(true), &arguments(&["main"])), "done");
    }
}
