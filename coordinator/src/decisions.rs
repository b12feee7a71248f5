//! What an operator decides: which content of a conflicting WAL file is served, and which node writes a timeline.
//!
//! A decision is a new object in every store that is there, under one number in all of them; reconciliation brings it to the
//! others. Nothing is removed. A store that has the chosen content nowhere serves nothing under the name from then on, except that
//! it is given a chosen history, which it keeps apart from the one that it has.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use postgres_format::timeline_history::MAX_BYTES as HISTORY_BYTES_MAX;
use postgres_format::{SystemIdentifier, Timeline, WalFileName};
use repository::adoption::{self, Adoption, Numbered};
use repository::fingerprint::Fingerprint;
use repository::key::{self, ObjectKey};
use repository::name::{ClusterName, NodeName};
use repository::store::{self, ObjectStore, Put};
use repository::wal::{self, Decision, Together, WalError};

use crate::Coordinator;
use crate::catalog::senders;
use crate::fleet::{self, NodeState, Role};
use crate::refusal::Refusal;
use crate::stores::{Slot, chain};
use crate::writer::Line;

/// Longest object that holds a history file, in bytes: its header and its frames besides the file.
const HISTORY_OBJECT_BYTES_MAX: u64 = HISTORY_BYTES_MAX as u64 + (1 << 20);

/// Chooses the content of a WAL file that is served from now on.
///
/// # Errors
/// When the file is in no conflict, no store has that content, or no store takes the decision.
pub async fn resolve(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    name: WalFileName,
    fingerprint: Fingerprint,
    now: Timestamp,
) -> Result<(), Refusal> {
    let system = newest_system(coordinator, cluster)?;
    let slots = coordinator.stores.healthy();
    let mut contents = BTreeSet::new();
    let (mut holders, mut lacking) = (Vec::new(), Vec::new());
    for slot in &slots {
        let variants = contents_in(slot, cluster, system, &name).await.map_err(|error| failed(slot, &error))?;
        match variants.iter().find(|variant| variant.fingerprint == Some(fingerprint)) {
            Some(chosen) => holders.push((slot, chosen.clone())),
            None => lacking.push(slot),
        }
        contents.extend(variants.iter().map(wal::Variant::content_name));
    }
    let Some((source, chosen)) = holders.first() else {
        return Err(Refusal::Precondition(format!("no store has {name} with fingerprint {fingerprint}")));
    };
    if !is_to_be_decided(&slots, cluster, system, &name, contents.len()).await? {
        let stores = slots.iter().map(|slot| slot.name().to_string()).collect();
        return Err(Refusal::NoConflict { cluster: cluster.clone(), name, stores });
    }
    if matches!(name, WalFileName::History(_)) {
        let key = key::conflict(cluster, system, &name, &fingerprint);
        bring_history(source, chosen, &lacking, &key).await?;
    }
    let decision = Decision { format: 1, fingerprint, reason: "chosen by ResolveConflict".to_owned(), written: now };
    let stores: Vec<&dyn ObjectStore> = slots.iter().map(|slot| &*slot.store).collect();
    let decided = wal::decide_in(&stores, cluster, system, &name, &decision).await;
    decided.map_err(|error| Refusal::NoStore(chain(&error)))?;
    tracing::info!(%cluster, %name, %fingerprint, "an operator chose the content that is served");
    Ok(())
}

/// What a store holds under a name, histories with the fingerprints that their keys do not have.
async fn contents_in(
    slot: &Slot,
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
) -> Result<Vec<wal::Variant>, WalError> {
    match name {
        WalFileName::History(timeline) => wal::history_contents(&*slot.store, cluster, system, *timeline).await,
        _ => wal::variants(&*slot.store, cluster, system, name).await,
    }
}

/// Puts a chosen history beside the one that other stores have: there is no place for it under the history's own key.
async fn bring_history(
    source: &Slot,
    chosen: &wal::Variant,
    lacking: &[&Arc<Slot>],
    key: &ObjectKey,
) -> Result<(), Refusal> {
    if lacking.is_empty() {
        return Ok(());
    }
    // Read and verified, before its bytes are taken as they are.
    let read = wal::read_history(&*source.store, &chosen.key, HISTORY_BYTES_MAX).await;
    read.map_err(|error| failed(source, &error))?;
    let bytes = store::read(&*source.store, &chosen.key, HISTORY_OBJECT_BYTES_MAX).await;
    let bytes = bytes.map_err(|error| failed(source, &error))?.unwrap_or_default();
    for slot in lacking {
        let put = slot.store.put_new(key, bytes.clone().into()).await;
        let (Put::Created | Put::Exists) = put.map_err(|error| failed(slot, &error))?;
    }
    Ok(())
}

/// Whether there is anything to choose: contents that exclude each other, or a choice made before that may be made anew.
/// A content that cannot be read may well be the other one, so it does not stand in the way of a choice.
async fn is_to_be_decided(
    slots: &[Arc<Slot>],
    cluster: &ClusterName,
    system: SystemIdentifier,
    name: &WalFileName,
    contents: usize,
) -> Result<bool, Refusal> {
    let stores: Vec<Arc<dyn ObjectStore>> = slots.iter().map(|slot| Arc::clone(&slot.store)).collect();
    match wal::together(&stores, cluster, system, name).await {
        Ok(Together::Conflict(_)) => return Ok(true),
        // What a store refused once, and keeps, may be the right one.
        Ok(Together::Served(_)) if matches!(name, WalFileName::History(_)) => return Ok(contents > 1),
        Ok(Together::Served(_) | Together::Nothing) => {}
        Ok(Together::Unknown(_)) | Err(_) => return Ok(contents > 1),
    }
    let prefix = key::decision_prefix(cluster, system, name);
    for slot in slots {
        let decisions = slot.store.list(&prefix, None, 1).await.map_err(|error| failed(slot, &error))?;
        if contents > 1 && !decisions.objects.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// PURE: the timeline that a node writes, as far as that is sure. Sure is what its server says now; if it cannot be asked, what
/// its agent last told together with the newest timeline of which the node `sent` WAL; else what the operator `named` and is
/// `known`. A server that was promoted while nobody could ask it is taken for one of its old timeline otherwise, and restores
/// would follow the line that it left.
fn written_by(
    state: Option<&NodeState>,
    sent: Option<Timeline>,
    named: Option<Timeline>,
    known: &BTreeSet<Timeline>,
) -> Result<Timeline, String> {
    let role = state.map_or(Role::Unknown, fleet::role);
    let told = state.filter(|state| !state.in_recovery).and_then(|state| state.timeline);
    if state.is_none() && sent.is_none() {
        return Err("no such node is known here: none of that name came, and none archived WAL".to_owned());
    }
    match (role, told, named) {
        (Role::Standby, ..) => Err("it is in recovery, so it writes no timeline".to_owned()),
        (Role::Primary, Some(told), Some(named)) if named != told => {
            Err(format!("it writes timeline {told}, not {named}"))
        }
        (Role::Primary, Some(told), None) if sent > Some(told) => Err(format!(
            "it writes timeline {told}, and it archived WAL of a newer one before; if it is to go on with the older one, repeat with --timeline {told}"
        )),
        (Role::Primary, Some(told), _) => Ok(told),
        (_, told, Some(named)) if known.contains(&named) || told.max(sent) == Some(named) => Ok(named),
        (_, _, Some(named)) => Err(format!("nothing is known of timeline {named}")),
        (_, Some(told), None) if sent == Some(told) => Ok(told),
        (_, told, None) => {
            let said = |timeline: Option<Timeline>| timeline.map_or("none".to_owned(), |timeline| timeline.to_string());
            Err(format!(
                "its server cannot be asked which timeline it writes: its agent last told {}, and the newest that it archived WAL of is {}; \
                 wait until `pgconvoy info` shows it as primary, or name the timeline with --timeline",
                said(told),
                said(sent)
            ))
        }
    }
}

/// Makes a node the writer of the timeline that it writes, or, while its server cannot be asked, of the one that was `named`.
///
/// # Errors
/// When it is not sure which timeline that is, or no store takes the decision.
pub async fn adopt_writer(
    coordinator: &Coordinator,
    cluster: &ClusterName,
    node: &NodeName,
    named: Option<Timeline>,
    now: Timestamp,
) -> Result<Vec<Timeline>, Refusal> {
    let system = newest_system(coordinator, cluster)?;
    let healthy = coordinator.stores.healthy();
    if healthy.is_empty() {
        return Err(Refusal::NoStore("no store is healthy".to_owned()));
    }
    // One number in all stores, above every one that is known of any timeline: of two the higher counts, wherever it lies.
    let (mut last, mut known) = (0, BTreeSet::new());
    for slot in &healthy {
        let number = adoption::last_number(&*slot.store, cluster, system).await;
        last = last.max(number.map_err(|error| failed(slot, &error))?);
        let timelines = adoption::known_timelines(&*slot.store, cluster, system).await;
        known.extend(timelines.map_err(|error| failed(slot, &error))?);
    }
    let asked = (cluster.clone(), node.clone());
    let sent = coordinator.catalog.call(move |connection| senders::newest_sent(connection, &asked.0, system, &asked.1));
    let sent = sent.await?;
    coordinator.sessions.settled(cluster).await;
    let state = coordinator.sessions.state(cluster, node);
    let timeline = written_by(state.as_ref(), sent, named, &known)
        .map_err(|why| Refusal::Precondition(format!("node {node} is not adopted: {why}")))?;
    known.insert(timeline);
    let line = Line { cluster: cluster.clone(), system, timeline };
    last = last.max(coordinator.writers.adopted(&line).map_or(0, |known| known.number));
    let number = last.saturating_add(1);
    let adoption = Adoption::new(node.clone(), now, known);
    let body = bytes::Bytes::from(adoption.to_bytes());
    let key = key::writer(cluster, system, timeline, number);
    for slot in &healthy {
        match slot.store.put_new(&key, body.clone().into()).await.map_err(|error| failed(slot, &error))? {
            Put::Created => {}
            Put::Exists => {
                return Err(Refusal::Precondition(
                    "another adoption was made at this moment; look and repeat".to_owned(),
                ));
            }
        }
    }
    coordinator.writers.adopt(line, Numbered { number, adoption });
    tracing::info!(%cluster, %node, %timeline, "an operator made the node the writer of its timeline");
    Ok(vec![timeline])
}

fn newest_system(coordinator: &Coordinator, cluster: &ClusterName) -> Result<SystemIdentifier, Refusal> {
    let systems = coordinator.clusters.systems_of(cluster);
    systems.last().map(|row| row.system_identifier).ok_or_else(|| Refusal::ClusterUnknown { cluster: cluster.clone() })
}

fn failed(slot: &Slot, error: &dyn std::error::Error) -> Refusal {
    Refusal::StoreFailed { store: slot.name().to_string(), detail: chain(error) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use fleet::Heard;
    use postgres_format::Lsn;

    use super::*;

    fn told(timeline: u32, server_reachable: bool, in_recovery: bool) -> NodeState {
        NodeState {
            node: "db2".parse().unwrap(),
            heard: Heard::Ago(Duration::from_secs(1)),
            server_reachable,
            server_problem: String::new(),
            in_recovery,
            timeline: Timeline::new(timeline),
            lsn: Lsn::ZERO,
            foreign_to: None,
            full_page_writes: None,
            knows_hybrid: true,
        }
    }

    /// What is adopted with timelines 1 and 2 known; 0 stands for nothing.
    fn adopted(state: Option<&NodeState>, sent: u32, named: u32) -> Result<u32, String> {
        let known = BTreeSet::from([1, 2].map(|timeline| Timeline::new(timeline).unwrap()));
        written_by(state, Timeline::new(sent), Timeline::new(named), &known).map(Timeline::get)
    }

    #[test]
    fn a_server_that_answers_is_believed() {
        assert_eq!(adopted(Some(&told(2, true, false)), 0, 0), Ok(2));
        assert_eq!(adopted(Some(&told(2, true, false)), 1, 2), Ok(2));
        assert!(adopted(Some(&told(2, true, false)), 2, 1).unwrap_err().contains("writes timeline 2, not 1"));
        assert!(adopted(Some(&told(1, true, true)), 1, 1).unwrap_err().contains("is in recovery"));
        // It archived a newer timeline than the one that it is on.
        let said = adopted(Some(&told(1, true, false)), 2, 0).unwrap_err();
        assert!(said.contains("archived WAL of a newer one") && said.contains("--timeline 1"), "{said}");
        assert_eq!(adopted(Some(&told(1, true, false)), 2, 1), Ok(1));
    }

    #[test]
    fn without_its_server_a_node_writes_what_its_files_and_its_newest_wal_agree_on() {
        let dead = |timeline| told(timeline, false, false);
        assert_eq!(adopted(Some(&dead(1)), 1, 0), Ok(1));
        let gone = NodeState { heard: Heard::Gone(Duration::from_secs(3600)), ..told(1, true, false) };
        assert_eq!(adopted(Some(&gone), 1, 0), Ok(1));
        // Freshly promoted, with `pg_control` as before.
        for (state, sent) in [(Some(&dead(1)), 2), (Some(&dead(1)), 0), (Some(&dead(2)), 1), (None, 2)] {
            let said = adopted(state, sent, 0).unwrap_err();
            assert!(said.contains("cannot be asked") && said.contains("--timeline"), "{said}");
            assert_eq!(adopted(state, sent, 2), Ok(2));
        }
        assert!(adopted(Some(&told(1, false, true)), 1, 0).is_err());
        // A name that nobody has, as from a slip of the pen.
        assert!(adopted(None, 0, 2).unwrap_err().contains("no such node"));
        assert!(adopted(Some(&dead(1)), 1, 3).unwrap_err().contains("nothing is known of timeline 3"));
    }
}
