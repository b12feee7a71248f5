//! `pgconvoy info`: the coordinator's report, else the repository's own, else what the local agent knows.
//!
//! All three give one schema. A store that cannot be read is shown as such, and so is which source answered when it is
//! not the coordinator; WAL that only an absent store holds is never counted as there.

use std::time::Duration;

use agent::local::Request;
use process::{clock, exit::Exit};
use proto::operator::GetInfoRequest;
use repository::info::{ClusterInfo, Info, StoreInfo, collect, render_text};
use repository::waiting::waiting;

use crate::{
    args::{InfoArgs, InfoOutput},
    config::{self, Config},
    coordinator::operator,
    error::CliError,
    local_agent, output, pgbackrest,
    stores::{self, Away, Opened, Selection},
};

/// Longest the local agent may take.
const AGENT_LONGEST: Duration = Duration::from_secs(60);

/// `pgconvoy info`
pub(crate) async fn info(config: &Config, arguments: &InfoArgs) -> Result<Exit, CliError> {
    if let Some(path) = &arguments.repository {
        return alone(&config::load_repository(path)?, arguments).await;
    }
    match operator(&config.coordinator).await {
        Ok(mut client) => {
            let cluster = arguments.cluster.as_ref().map(ToString::to_string).unwrap_or_default();
            let answer = client.get_info(GetInfoRequest { cluster }).await?.into_inner();
            print_json(&answer.info_json, arguments.output)?;
            Ok(Exit::Ok)
        }
        Err(error) if error.exit() != Exit::Unreachable => Err(error),
        Err(error) if !config.stores.is_empty() => {
            output::complain(&format!("pgconvoy: {error}; reading the stores instead"));
            alone(config, arguments).await
        }
        Err(error) if config.agent_socket.exists() => {
            output::complain(&format!("pgconvoy: {error}; asking the agent on this host instead"));
            by_agent(config, arguments).await
        }
        Err(error) => Err(error),
    }
}

async fn by_agent(config: &Config, arguments: &InfoArgs) -> Result<Exit, CliError> {
    let answer = local_agent::ask(&config.agent_socket, Request::Info, AGENT_LONGEST, |_| {}).await?;
    if answer.exit != Exit::Ok {
        return Err(CliError::new(answer.exit, format!("the agent cannot report: {}", answer.message)));
    }
    print_json(&answer.message, arguments.output)?;
    Ok(Exit::Ok)
}

/// From the stores, without coordinator or agent.
async fn alone(config: &Config, arguments: &InfoArgs) -> Result<Exit, CliError> {
    let opened = stores::open(config, Selection::default()).await?;
    if opened.stores.is_empty() {
        let reasons: Vec<String> = opened.away.iter().map(|away| format!("{}: {}", away.store, away.reason)).collect();
        return Err(CliError::new(Exit::Store, format!("no store can be read: {}", reasons.join("; "))));
    }
    let wanted = match &arguments.cluster {
        Some(cluster) => vec![cluster.clone()],
        None => stores::clusters(&opened.stores).await?,
    };
    let now = clock::now();
    let mut clusters = Vec::new();
    for cluster in wanted {
        let mut info = collect(&opened.stores, &cluster, now).await;
        let waiting = waiting(&opened.stores, &cluster, &std::env::temp_dir()).await;
        info.problems.extend(waiting.iter().map(ToString::to_string));
        clusters.push(with_away(info, &opened));
    }
    print(&Info::new(now, clusters), arguments.output)?;
    Ok(Exit::Ok)
}

/// Adds the stores that could not be used, and that they are not counted.
fn with_away(mut cluster: ClusterInfo, opened: &Opened) -> ClusterInfo {
    if opened.away.is_empty() {
        return cluster;
    }
    let unreachable = |away: &Away| StoreInfo::unreachable(away.store.clone(), away.reason.clone());
    cluster.stores.extend(opened.away.iter().map(unreachable));
    let names: Vec<&str> = opened.away.iter().map(|away| away.store.as_ref()).collect();
    let not_counted = format!("not counting what {} may hold", names.join(", "));
    cluster.recovery.reason = Some(match cluster.recovery.reason {
        Some(reason) => format!("{reason}; {not_counted}"),
        None => not_counted,
    });
    cluster
}

/// Prints a report that came as JSON. What this version does not know survives in JSON output.
fn print_json(json: &str, form: InfoOutput) -> Result<(), CliError> {
    let unreadable = |source: serde_json::Error| {
        CliError::new(Exit::Refused, "the report that came is not one this version can read").caused_by(source)
    };
    match form {
        InfoOutput::Json => output::json(&serde_json::from_str::<serde_json::Value>(json).map_err(unreadable)?),
        _ => print(&serde_json::from_str(json).map_err(unreadable)?, form),
    }
}

fn print(info: &Info, form: InfoOutput) -> Result<(), CliError> {
    match form {
        InfoOutput::Json => output::json(info),
        InfoOutput::PgbackrestJson => output::json(&pgbackrest::render(info)),
        InfoOutput::Text => output::text(&render_text(info)),
    }
}
