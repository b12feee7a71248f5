//! Reading the coordinator's stores from afar: what counts as absent.

use proto::store::HeadObjectRequest;
use proto::store::store_service_client::StoreServiceClient;
use repository::stores::faulty::{Fault, Operation};

use super::*;

impl Rig {
    async fn head(&self, store: &str) -> (Code, String) {
        let request = HeadObjectRequest { store: store.to_owned(), key: "c/main/nothing".to_owned() };
        let status = StoreServiceClient::new(self.channel().await).head_object(request).await.unwrap_err();
        (status.code(), reason(&status))
    }
}

fn said(code: Code, reason: &str) -> (Code, String) {
    (code, reason.to_owned())
}

#[tokio::test]
async fn nothing_is_absent_from_a_store_that_has_not_shown_whose_it_is() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.stores[1].fail_all(Operation::Get, Fault::Fail);
    let rig = rig.reborn(Ack::All).await;
    assert_eq!(rig.head("repo1").await, said(Code::NotFound, "OBJECT_ABSENT"));
    assert_eq!(rig.head("s3").await, said(Code::Unavailable, "STORE_FAILED"));
    // A store that was taken out of the configuration has not lost its objects.
    assert_eq!(rig.head("s4").await, said(Code::FailedPrecondition, "STORE_UNKNOWN"));
    rig.stores[1].heal();
    rig.coordinator.stores.check().await;
    assert_eq!(rig.head("s3").await, said(Code::NotFound, "OBJECT_ABSENT"));
    // Once it has, it is asked also while it lags.
    rig.stores[1].fail_all(Operation::Get, Fault::Fail);
    rig.coordinator.stores.check().await;
    assert!(!rig.health(1).is_readable());
    assert_eq!(rig.head("s3").await, said(Code::NotFound, "OBJECT_ABSENT"));
    rig.end().await;
}
