//! What people on this host ask of the agent: status, the repository's report, a base backup.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use process::exit::Exit;
use repository::name::ClusterName;
use serde_json::json;
use tokio::sync::mpsc;

use crate::errands::Errands;
use crate::fetch::Sources;
use crate::session::Greeting;
use crate::socket::{Desk, Done};
use crate::vitals::Vitals;

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
        let stores = self.sources.stores().await;
        if stores.is_empty() {
            return (Exit::Unreachable, "no store can be read from here now".to_owned());
        }
        self.status().await
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
