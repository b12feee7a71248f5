//! Small verbs that change the fleet: `cluster create`, `rebuild`, `conflict resolve`, `node adopt`.

use process::exit::Exit;
use proto::operator::{AdoptWriterRequest, CreateClusterRequest, RebuildCatalogRequest, ResolveConflictRequest};

use crate::{
    args::{ClusterArgs, ClusterVerb, ConflictArgs, ConflictVerb, NodeArgs, NodeVerb},
    config::Config,
    coordinator::operator,
    error::CliError,
    output,
};

/// `pgconvoy cluster …`
pub(crate) async fn cluster(config: &Config, arguments: &ClusterArgs) -> Result<Exit, CliError> {
    let ClusterVerb::Create { name, system_identifier } = &arguments.verb;
    let request = CreateClusterRequest { cluster: name.to_string(), system_identifier: system_identifier.unwrap_or(0) };
    let made = operator(&config.coordinator).await?.create_cluster(request).await?.into_inner();
    output::line(&format!("cluster {name}, system identifier {}", made.system_identifier))?;
    for store in &made.stores_initialised {
        output::line(&format!("store {store}: initialised"))?;
    }
    for store in &made.stores_known {
        output::line(&format!("store {store}: knew it already"))?;
    }
    Ok(Exit::Ok)
}

/// `pgconvoy rebuild`
pub(crate) async fn rebuild(config: &Config) -> Result<Exit, CliError> {
    let found = operator(&config.coordinator).await?.rebuild_catalog(RebuildCatalogRequest {}).await?.into_inner();
    output::line(&format!("catalog rebuilt: {} WAL objects, {} backups", found.wal_objects, found.backups))?;
    Ok(Exit::Ok)
}

/// `pgconvoy conflict …`
pub(crate) async fn conflict(config: &Config, arguments: &ConflictArgs) -> Result<Exit, CliError> {
    let ConflictVerb::Resolve { cluster, wal_file, fingerprint } = &arguments.verb;
    let request = ResolveConflictRequest {
        cluster: cluster.to_string(),
        wal_file: wal_file.clone(),
        fingerprint: fingerprint.clone(),
    };
    operator(&config.coordinator).await?.resolve_conflict(request).await?;
    output::line(&format!("{wal_file} of {cluster}: {fingerprint} is served from now on"))?;
    Ok(Exit::Ok)
}

/// `pgconvoy node …`
pub(crate) async fn node(config: &Config, arguments: &NodeArgs) -> Result<Exit, CliError> {
    let NodeVerb::Adopt { cluster, node, timeline } = &arguments.verb;
    let request = AdoptWriterRequest {
        cluster: cluster.to_string(),
        node: node.to_string(),
        timeline: timeline.unwrap_or_default(),
    };
    let adopted = operator(&config.coordinator).await?.adopt_writer(request).await?.into_inner();
    let timelines: Vec<String> = adopted.timelines.iter().map(u32::to_string).collect();
    output::line(&format!("{node} is the writer of {cluster} on timeline {}", timelines.join(", ")))?;
    match timeline {
        Some(named) if !adopted.timelines.contains(named) => {
            let told = format!("timeline {named} was named, and the coordinator adopted the node for another one");
            Err(CliError::new(Exit::Negative, told)
                .hint("it is of a version that takes no timeline: upgrade it, and repeat"))
        }
        _ => Ok(Exit::Ok),
    }
}
