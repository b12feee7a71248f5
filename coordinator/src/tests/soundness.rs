//! Verifications, the nightly scrub and repairs, over the wire and on stores in memory.

use bytes::Bytes;
use proto::operator::{
    GetVerificationRequest, Operation, OperationState, PlanRepairRequest, PlanRepairResponse, StartRepairRequest,
    StartVerificationRequest, WaitOperationRequest,
};
use repository::store::{self, Body};
use repository::verify::Report as Found;

use super::*;

async fn ended(rig: &Rig, operation: Option<Operation>) -> Operation {
    let request = WaitOperationRequest { operation: operation.unwrap().operation, timeout_seconds: 20 };
    rig.operator().await.wait_operation(request).await.unwrap().into_inner().operation.unwrap()
}

async fn verified(rig: &Rig, stores: &[&str]) -> Found {
    let request = StartVerificationRequest {
        cluster: "main".to_owned(),
        stores: stores.iter().map(ToString::to_string).collect(),
        ..StartVerificationRequest::default()
    };
    let started = rig.operator().await.start_verification(request).await.unwrap().into_inner();
    let done = ended(rig, started.operation).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    assert_eq!((done.kind.as_str(), done.node.as_str()), ("verify", "coordinator"));
    let request = GetVerificationRequest { operation: done.operation };
    let report = rig.operator().await.get_verification(request).await.unwrap().into_inner();
    serde_json::from_str(&report.report_json).unwrap()
}

async fn planned(rig: &Rig) -> PlanRepairResponse {
    let request = PlanRepairRequest { cluster: "main".to_owned() };
    rig.operator().await.plan_repair(request).await.unwrap().into_inner()
}

/// Flips a bit of a stored object; answers its bytes as they were.
async fn damage(store: &FaultyStore, key: &ObjectKey) -> Bytes {
    let sound = store::read(store, key, u64::MAX).await.unwrap().unwrap();
    let mut torn = sound.to_vec();
    let last = torn.len() - 1;
    torn[last] ^= 1;
    let _ = store.delete(key).await.unwrap();
    let _ = store.put_new(key, Body::Memory(torn.into())).await.unwrap();
    sound
}

#[tokio::test]
async fn damage_is_found_told_and_put_right() {
    let rig = Rig::with_cluster(Ack::All).await;
    for number in 1..=3 {
        rig.push(&wal(&segment(number), "a", "content")).await.unwrap();
    }
    let sound = verified(&rig, &[]).await;
    assert!(sound.sound && sound.complete && sound.stores.len() == 2, "{sound:?}");
    assert!(planned(&rig).await.steps.is_empty());

    let key = rig.wal_keys(0).await.remove(1);
    let before = damage(&rig.stores[0], &key).await;
    let found = verified(&rig, &[]).await;
    assert!(!found.sound && found.complete);
    assert_eq!(found.findings[0].object.as_deref(), Some(key.as_str()));
    assert_eq!(found.findings[0].sound_in.iter().map(AsRef::as_ref).collect::<Vec<&str>>(), ["s3"]);
    let info = rig.info().await;
    let problems = info["clusters"][0]["problems"].to_string();
    assert!(problems.contains(key.as_str()) && problems.contains("pgconvoy repair"), "{problems}");

    // A look at one store counts on nobody else, and is not what is known.
    let alone = verified(&rig, &["s3"]).await;
    assert!(alone.sound && alone.stores.len() == 1);
    let plan = planned(&rig).await;
    assert_eq!((plan.steps.len(), plan.steps[0].sources.as_slice()), (1, ["s3".to_owned()].as_slice()));
    assert!(!plan.looked.is_empty() && plan.beyond.is_empty());

    let request = StartRepairRequest { cluster: "main".to_owned(), request_id: "r1".to_owned() };
    let started = rig.operator().await.start_repair(request.clone()).await.unwrap().into_inner();
    let done = ended(&rig, started.operation).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    let again = rig.operator().await.start_repair(request).await.unwrap().into_inner();
    assert_eq!(again.operation.unwrap().operation, done.operation);
    assert_eq!(store::read(&*rig.stores[0], &key, u64::MAX).await.unwrap().unwrap(), before);
    assert!(planned(&rig).await.steps.is_empty());
    assert!(verified(&rig, &[]).await.sound);
    rig.end().await;
}

#[tokio::test]
async fn nights_find_damage_and_a_restart_forgets_nothing() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.push(&wal(&segment(1), "a", "content")).await.unwrap();
    let key = rig.wal_keys(1).await.remove(0);
    damage(&rig.stores[1], &key).await;
    let main = "main".parse().unwrap();
    let begun = process::clock::now();
    for night in 0..30 {
        let now = begun.checked_add(jiff::SignedDuration::from_hours(24 * night)).unwrap();
        crate::scrub::night(&rig.coordinator, &main, 1 << 30, now).await;
    }
    let known = rig.coordinator.soundness.of(&main);
    assert_eq!(known.shares.len(), 30);
    assert_eq!(known.findings.len(), 1, "{known:?}");
    assert_eq!(known.findings[0].object.as_deref(), Some(key.as_str()));
    let loaded = crate::soundness::Soundness::load(rig.coordinator.catalog.clone()).await.unwrap();
    assert_eq!(loaded.of(&main), known);
    assert!(rig.coordinator.metrics.scrub_read_bytes.get() > 0);
    rig.end().await;
}

#[tokio::test]
async fn what_cannot_be_looked_at_is_refused() {
    let rig = Rig::with_cluster(Ack::All).await;
    let start = async |cluster: &str, store: &str| {
        let request = StartVerificationRequest {
            cluster: cluster.to_owned(),
            stores: vec![store.to_owned()],
            ..StartVerificationRequest::default()
        };
        reason(&rig.operator().await.start_verification(request).await.unwrap_err())
    };
    assert_eq!(start("other", "s3").await, "CLUSTER_UNKNOWN");
    assert_eq!(start("main", "s4").await, "STORE_UNKNOWN");
    let request = GetVerificationRequest { operation: "nothing".to_owned() };
    assert_eq!(reason(&rig.operator().await.get_verification(request).await.unwrap_err()), "OPERATION_UNKNOWN");
    rig.end().await;
}
