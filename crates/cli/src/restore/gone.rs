//! What became of a backup that is asked for by its identifier and that no store names any more.

use repository::{
    departure::{Departure, departure},
    name::{BackupId, ClusterName},
};

use crate::stores::Opened;

/// Says of a backup in a line when each store let go of it; nothing if a store has it, or none tells.
pub(super) async fn told(opened: &Opened, cluster: &ClusterName, backup: Option<&BackupId>) -> Option<String> {
    let backup = backup?;
    let mut lines = Vec::new();
    for store in &opened.stores {
        // A store that cannot say is told of elsewhere.
        if let Ok(Some(Departure { generation, written, writer, existed })) =
            departure(store.as_ref(), cluster, backup).await
        {
            let what = if existed { "it expired" } else { "it was given up before it was finished" };
            let store = store.name();
            lines.push(format!("{what} at {written}, by root {generation} of store {store}, which {writer} committed"));
        }
    }
    (!lines.is_empty()).then(|| lines.join("; "))
}
