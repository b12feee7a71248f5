//! `pgconvoy info`: the coordinator's report, else the repository's own, else what the local agent knows.

use std::time::Duration;

use agent::local::Request;
use process::exit::Exit;
use proto::operator::GetInfoRequest;

use crate::{
    args::{InfoArgs, Output},
    config::Config,
    coordinator::operator,
    error::CliError,
    local_agent, output,
};

/// Longest the local agent may take.
const AGENT_LONGEST: Duration = Duration::from_secs(30);

/// `pgconvoy info`
pub(crate) async fn info(config: &Config, arguments: &InfoArgs) -> Result<Exit, CliError> {
    let cluster = arguments.cluster.as_ref().map(ToString::to_string).unwrap_or_default();
    let json = match operator(&config.coordinator).await {
        Ok(mut client) => client.get_info(GetInfoRequest { cluster }).await?.into_inner().info_json,
        Err(_) => local_agent::ask(&config.agent_socket, Request::Info, AGENT_LONGEST, |_| {}).await?.message,
    };
    match arguments.output {
        Output::Text | Output::Json => output::line(&json)?,
    }
    Ok(Exit::Ok)
}
