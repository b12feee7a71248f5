//! The hybrid shape between two agents: what the standby that copies wants of the primary that holds the backup is passed
//! on, and the primary's answer brought back.
//!
//! Nothing is remembered here but what the operation says: each question tells all that the primary must know, and may be
//! asked again. So neither the coordinator's end nor a lost session ends a backup, as long as both agents find it again
//! within the patience of the standby and of the primary.

use std::time::Duration;

use process::clock;
use proto::convert::{FieldError, parsed};
use proto::fleet::{AskPrimaryRequest, AskPrimaryResponse, HoldBackup, HoldWish, OrderState, order};
use repository::name::{BackupId, ClusterName, NodeName};

use crate::Coordinator;
use crate::operations::Operation;
use crate::peer::Peer;
use crate::refusal::Refusal;

/// How long the primary's agent may take to say how the backup stands.
const ANSWER_WAIT: Duration = Duration::from_secs(15);

/// Passes a standby's question on.
///
/// # Errors
/// When the backup was not ordered so, the primary is not connected, or gives no answer.
pub async fn ask_primary(
    coordinator: &Coordinator,
    peer: &Peer,
    request: AskPrimaryRequest,
) -> Result<AskPrimaryResponse, Refusal> {
    let cluster: ClusterName = parsed("cluster", &request.cluster)?;
    let node: NodeName = parsed("node", &request.node)?;
    let primary: NodeName = parsed("primary", &request.primary)?;
    peer.expect(&node)?;
    let hold = request.hold.ok_or_else(|| FieldError::new("hold", "is missing"))?;
    let backup: BackupId = parsed("hold.backup", &hold.backup)?;
    let given = coordinator.operations.given_to(&cluster, &node);
    if !may_ask(&given, backup, &primary, &hold) {
        let text = format!("backup {backup} of node {node} is not under way with {primary} as its primary");
        return Err(Refusal::Precondition(text));
    }
    let asked = order::What::HoldBackup(HoldBackup { node: node.to_string(), ..hold });
    let update = coordinator.sessions.ask(&cluster, &primary, asked, ANSWER_WAIT, clock::now()).await?;
    match (update.state(), update.held) {
        (OrderState::Done, Some(held)) => Ok(AskPrimaryResponse { held: Some(held) }),
        _ => Err(Refusal::Precondition(format!("node {primary} cannot hold the backup: {}", update.error))),
    }
}

/// Whether somebody ordered that backup of this node with that primary. To be rid of it is always in order.
fn may_ask(given: &[Operation], backup: BackupId, primary: &NodeName, hold: &HoldBackup) -> bool {
    let ordered = |operation: &Operation| {
        operation.backup == Some(backup) && operation.primary.as_ref().is_some_and(|named| named == primary)
    };
    hold.wish() == HoldWish::Release || given.iter().any(ordered)
}
