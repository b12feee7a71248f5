//! What all stores together serve under one name, for those who plan a fetch: by the same questions and the same rule.

use std::sync::Arc;

use postgres_format::{SystemIdentifier, WalFileName};

use super::WalError;
use super::fetch::read_header;
use super::union::{Silences, ask_all};
use super::variants::{Choice, Variant, Wanted};
use crate::name::{ClusterName, StoreName};
use crate::store::ObjectStore;

/// What all stores together serve under one name.
#[derive(Debug)]
pub enum Together {
    /// One content, which these stores hold.
    Served(Vec<StoreName>),
    /// Nothing yet: there is none, or only an incomplete one.
    Nothing,
    /// Nothing until an operator decides.
    Conflict(Vec<Variant>),
    /// A store did not say, a line each.
    Unknown(Vec<String>),
}

/// Asks all stores. Fetching the name at this moment would do the same.
pub async fn together(
    stores: &[Arc<dyn ObjectStore>],
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
) -> Result<Together, WalError> {
    let said = ask_all(stores, Wanted { cluster, system, name }, &Silences::default()).await;
    if !said.reasons.is_empty() {
        return Ok(Together::Unknown(said.reasons));
    }
    Ok(match said.choose(name).await? {
        Choice::Nothing | Choice::Incomplete(_) => Together::Nothing,
        Choice::Conflict(variants) => Together::Conflict(variants),
        Choice::Serve(variant) => {
            let holders = said.holders(&variant);
            let mut failed = None;
            for (place, size) in said.places(&variant) {
                match read_header(&*stores[place], &variant.key, size).await {
                    Ok(header) if header.complete || !matches!(name, WalFileName::Segment(_)) => {
                        return Ok(Together::Served(holders.iter().map(|store| store.name().clone()).collect()));
                    }
                    Ok(_) => return Ok(Together::Nothing),
                    Err(error) => failed = Some(error),
                }
            }
            return failed.map_or(Ok(Together::Nothing), Err);
        }
    })
}
