//! What each listed store holds of the cluster, for the plan.

use repository::{name::ClusterName, observe, restore_plan::StoreView};

use crate::stores::Opened;

/// Looks at all stores at the same time; one that cannot be used, or is left out by name, counts as unreachable.
pub(super) async fn views(opened: &Opened, cluster: &ClusterName) -> Vec<StoreView> {
    let mut views = observe::views(&opened.stores, cluster).await;
    views.extend(
        opened
            .away
            .iter()
            .map(|away| StoreView::Unreachable { store: away.store.clone(), reason: away.reason.clone() }),
    );
    views.extend(
        opened
            .left_out
            .iter()
            .map(|store| StoreView::Unreachable { store: store.clone(), reason: "left out by name".to_owned() }),
    );
    views
}
