//! How fast a cluster's backups may read: the policy that each begins with, and what an operator says while one runs.
//!
//! The agent keeps the pace; WAL is archived without it.

use std::collections::BTreeMap;

use proto::fleet::{ChangePace, order};
use proto::operator::ChangePaceRequest;
use repository::name::ClusterName;

use crate::Coordinator;
use crate::operations::{Operation, State};
use crate::refusal::Refusal;

/// The pace that a backup begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    /// Bytes read a second at most, 0 for no limit; absent for the agent's setting.
    pub bytes_per_second: Option<u64>,
    /// Workers that read and compress; 0 for the agent's setting.
    pub parallel: u32,
}

impl Pace {
    /// What was asked for, and else the policy.
    #[must_use]
    pub fn or(self, policy: Self) -> Self {
        let parallel = if self.parallel > 0 { self.parallel } else { policy.parallel };
        Self { bytes_per_second: self.bytes_per_second.or(policy.bytes_per_second), parallel }
    }
}

/// Policies by cluster.
pub type Paces = BTreeMap<ClusterName, Pace>;

/// Has a backup that runs go on at another pace.
///
/// # Errors
/// [`Refusal::OperationUnknown`], or [`Refusal::Precondition`] if it is no backup that runs or its node cannot be told.
pub async fn change(coordinator: &Coordinator, asked: ChangePaceRequest) -> Result<Operation, Refusal> {
    let refused = Refusal::Precondition;
    let operation = coordinator.operations.get(&asked.operation).await?;
    if operation.backup.is_none() || operation.state != State::Running {
        return Err(refused(format!("operation {} is no backup that runs", operation.id)));
    }
    if asked.bytes_per_second.is_none() && asked.parallel.is_none() {
        return Err(refused("neither a rate nor a number of workers is given".to_owned()));
    }
    let nodes = coordinator.sessions.nodes(Some(&operation.cluster));
    if nodes.iter().any(|view| view.node == operation.node && view.connected && !view.hello.changes_pace) {
        return Err(refused(format!("the agent of node {} is older and cannot change its pace", operation.node)));
    }
    let ChangePaceRequest { bytes_per_second, parallel, .. } = asked;
    let order = order::What::ChangePace(ChangePace { bytes_per_second, parallel });
    coordinator.sessions.order(&operation.cluster, &operation.node, &operation.id, order)?;
    tracing::info!(operation = operation.id, ?bytes_per_second, ?parallel, "the pace of a backup is changed");
    Ok(operation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_goes_before_the_policy() {
        let pace = |bytes_per_second, parallel| Pace { bytes_per_second, parallel };
        let policy = pace(Some(5), 2);
        assert_eq!(pace(None, 0).or(policy), policy);
        assert_eq!(pace(Some(0), 0).or(policy), pace(Some(0), 2));
        assert_eq!(pace(None, 1).or(policy), pace(Some(5), 1));
        assert_eq!(pace(None, 0).or(Pace::default()), Pace::default());
    }
}
