//! `pgconvoy repair`: what another store has sound is put in the place of what is damaged; shown first.

use std::fmt::Write;

use process::exit::Exit;
use proto::operator::{OperationState, PlanRepairRequest, PlanRepairResponse, StartRepairRequest};
use serde::Serialize;

use crate::{
    args::{Output, RepairArgs},
    backup::watch,
    config::Config,
    coordinator::operator,
    error::CliError,
    output,
};

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    cluster: &'a str,
    looked: &'a str,
    steps: Vec<Step<'a>>,
    compare_stores: bool,
    beyond: &'a [String],
}

#[derive(Debug, Serialize)]
struct Step<'a> {
    store: &'a str,
    object: &'a str,
    found: &'a str,
    sources: &'a [String],
}

/// `pgconvoy repair`
pub(crate) async fn repair(config: &Config, arguments: &RepairArgs) -> Result<Exit, CliError> {
    let mut client = operator(&config.coordinator).await?;
    let cluster = arguments.cluster.to_string();
    let plan = client.plan_repair(PlanRepairRequest { cluster: cluster.clone() }).await?.into_inner();
    match arguments.output {
        Output::Text => output::text(&render(&cluster, &plan))?,
        Output::Json => output::json(&report(&cluster, &plan))?,
    }
    let nothing_to_do = plan.steps.is_empty() && !plan.compare_stores;
    if nothing_to_do {
        return Ok(if plan.beyond.is_empty() { Exit::Ok } else { Exit::Negative });
    }
    if !arguments.confirm {
        output::complain("nothing was changed: repeat this with --confirm");
        return Ok(Exit::Negative);
    }
    let request = StartRepairRequest { cluster, request_id: String::new() };
    let started = client.start_repair(request).await?.into_inner().operation.unwrap_or_default();
    let ended = watch(&mut client, started).await?;
    match ended.state() {
        OperationState::Done => {
            output::complain(&ended.step);
            Ok(if plan.beyond.is_empty() { Exit::Ok } else { Exit::Negative })
        }
        OperationState::Failed => {
            Err(CliError::new(Exit::Negative, format!("the repair is not complete: {}", ended.error)))
        }
        _ => Err(CliError::new(Exit::Timeout, "the coordinator stopped telling how the repair goes")),
    }
}

fn report<'a>(cluster: &'a str, plan: &'a PlanRepairResponse) -> Report<'a> {
    let steps = plan.steps.iter().map(|step| Step {
        store: &step.store,
        object: &step.object,
        found: &step.found,
        sources: &step.sources,
    });
    Report {
        schema: "pgconvoy.repair/v1",
        cluster,
        looked: &plan.looked,
        steps: steps.collect(),
        compare_stores: plan.compare_stores,
        beyond: &plan.beyond,
    }
}

fn render(cluster: &str, plan: &PlanRepairResponse) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = match plan.looked.as_str() {
        "" => writeln!(text, "cluster {cluster}: nobody has looked yet; pgconvoy verify {cluster} does"),
        looked => writeln!(text, "cluster {cluster}: last looked at {looked}"),
    };
    for step in &plan.steps {
        let _ = writeln!(text, "  put right   store {}: {}", step.store, step.object);
        let _ = writeln!(text, "              {}; from {}", step.found, step.sources.join(" or "));
    }
    if plan.compare_stores {
        let _ = writeln!(text, "  compare     the stores, so that each gets the WAL it lacks");
    }
    for beyond in &plan.beyond {
        let _ = writeln!(text, "  BEYOND US   {beyond}");
    }
    if plan.steps.is_empty() && !plan.compare_stores && plan.beyond.is_empty() {
        let _ = writeln!(text, "  nothing is known to be damaged");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::operator::RepairStep;

    #[test]
    fn a_plan_says_what_goes_where_and_what_is_beyond_us() {
        let plan = PlanRepairResponse {
            steps: vec![RepairStep {
                store: "repo1".to_owned(),
                object: "c/main/b/x/p/000001".to_owned(),
                found: "it is not there".to_owned(),
                sources: vec!["s3".to_owned()],
            }],
            compare_stores: true,
            beyond: vec!["store repo1: a root".to_owned()],
            looked: "2026-11-23T05:00:00Z".to_owned(),
        };
        assert_eq!(
            render("main", &plan),
            "cluster main: last looked at 2026-11-23T05:00:00Z\n  put right   store repo1: c/main/b/x/p/000001\n              \
             it is not there; from s3\n  compare     the stores, so that each gets the WAL it lacks\n  BEYOND US   store \
             repo1: a root\n"
        );
        let nothing = render("main", &PlanRepairResponse::default());
        assert!(nothing.contains("pgconvoy verify main") && nothing.contains("nothing is known"), "{nothing}");
    }
}
