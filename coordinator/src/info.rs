//! `GetInfo`.
use jiff::Timestamp;
use repository::name::ClusterName;

use crate::Coordinator;
use crate::refusal::Refusal;

/// Collects the report as JSON.
///
/// # Errors
/// When no store can be read.
pub async fn collect(
    _coordinator: &Coordinator,
    _cluster: Option<&ClusterName>,
    _now: Timestamp,
) -> Result<String, Refusal> {
    Ok("{\"schema\":\"pgconvoy.info/v1\"}".to_owned())
}
