//! What people on this host ask of the agent: status, the repository's report, a base backup.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use process::exit::Exit;
use repository::info::Info;
use repository::name::ClusterName;
use serde_json::json;
use tokio::sync::mpsc;

use crate::errands::Errands;
use crate::fetch::Sources;
use crate::session::Greeting;
use crate::socket::{Desk, Done};
use crate::vitals::Vitals;

/// Longest time the stores are given for a report; below what `pgconvoy info` waits.
const INFO_TIMEOUT: Duration = Duration::from_secs(25);

/// The desk of one agent.
pub struct LocalDesk {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// How the node is.
    pub vitals: Arc<Vitals>,
    /// Who takes backups.
    pub errands: Arc<Errands>,
    /// Which stores can be read.
    pub sources: Arc<Sources>,
    /// What the coordinator said last.
    pub greeting: Arc<Mutex<Option<Greeting>>>,
}

#[async_trait]
impl Desk for LocalDesk {
    async fn backup(&self, json: String, progress: mpsc::Sender<String>) -> Done {
        self.errands.backup_here(&json, progress).await
    }

    async fn info(&self) -> Done {
        let asked = self.sources.ask_whom().await;
        if asked.stores.is_empty() {
            return (Exit::Unreachable, format!("no store can be read from here now: {}", asked.missing.join("; ")));
        }
        let now = process::clock::now();
        let gathered = repository::info::collect(&asked.stores, &self.cluster, now);
        let Ok(mut cluster) = tokio::time::timeout(INFO_TIMEOUT, gathered).await else {
            return (Exit::Timeout, "the stores did not answer in time".to_owned());
        };
        cluster
            .problems
            .extend(asked.missing.iter().map(|reason| format!("the coordinator's stores were not asked: {reason}")));
        match serde_json::to_string(&Info::new(now, vec![cluster])) {
            Ok(json) => (Exit::Ok, json),
            Err(error) => (Exit::Negative, format!("the report cannot be written: {error}")),
        }
    }

    async fn status(&self) -> Done {
        let mut status = self.vitals.status();
        let greeting = self.greeting.lock().unwrap_or_else(PoisonError::into_inner).clone();
        status["coordinator"] = match greeting {
            None => json!({ "connected": false }),
            Some(greeting) => json!({
                "connected": true,
                "version": greeting.version,
                "cluster_known": greeting.cluster_known,
                "stores": greeting.stores,
            }),
        };
        status["cluster"] = json!(self.cluster.to_string());
        (Exit::Ok, status.to_string())
    }
}
