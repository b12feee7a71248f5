//! What operators decide, when stores hold unlike things or are away.

use postgres_format::Timeline;
use repository::adoption::Adoption;
use repository::key;
use repository::stores::faulty::Fault;

use super::*;

#[tokio::test]
async fn an_adoption_counts_as_soon_as_the_store_that_has_it_answers() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    let adoption = Adoption::new("b".parse().unwrap(), now());
    let key = key::writer(&"main".parse().unwrap(), SystemIdentifier::new(SYSTEM), Timeline::FIRST, 1);
    let _ = rig.stores[1].put_new(&key, bytes::Bytes::from(adoption.to_bytes()).into()).await.unwrap();
    // The only store that knows of it is away when the next coordinator starts.
    rig.stores[1].fail_everything(Fault::Fail);
    let rig = rig.reborn(Ack::All).await;
    let status = rig.push(&wal(&segment(2), "b", "two")).await.unwrap_err();
    assert_eq!(reason(&status), "FOREIGN_WRITER");
    rig.stores[1].heal();
    rig.coordinator.stores.check().await;
    crate::reconcile::take_up_adoptions(&rig.coordinator).await;
    rig.push(&wal(&segment(2), "b", "two")).await.unwrap();
    let status = rig.push(&wal(&segment(3), "a", "three")).await.unwrap_err();
    assert_eq!(reason(&status), "FOREIGN_WRITER");
    rig.end().await;
}
