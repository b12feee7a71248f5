//! What operators decide, when stores hold unlike things or are away.

use postgres_format::Timeline;
use proto::operator::ResolveConflictRequest;
use repository::adoption::Adoption;
use repository::key;
use repository::stores::faulty::Fault;
use repository::wal::{Fetched, Together};

use super::*;

impl Rig {
    async fn resolve(&self, chosen: &EncodedWal) -> Result<(), Status> {
        let request = ResolveConflictRequest {
            cluster: "main".to_owned(),
            wal_file: chosen.header.name.to_string(),
            fingerprint: chosen.fingerprint.to_string(),
        };
        self.operator().await.resolve_conflict(request).await.map(|_| ())
    }

    /// The stores that serve a file, asked together, or none.
    async fn serving(&self, stores: &[usize], name: &str) -> Vec<String> {
        let stores: Vec<Arc<dyn ObjectStore>> =
            stores.iter().map(|store| Arc::clone(&self.stores[*store]) as _).collect();
        let name = name.parse().unwrap();
        let found = wal::together(&stores, &"main".parse().unwrap(), SystemIdentifier::new(SYSTEM), &name).await;
        match found.unwrap() {
            Together::Served(stores) => stores.iter().map(ToString::to_string).collect(),
            _ => Vec::new(),
        }
    }
}

#[tokio::test]
async fn a_choice_is_written_in_stores_that_lack_what_was_chosen_and_may_be_changed_for_what_only_they_have() {
    let rig = Rig::with_cluster(Ack::All).await;
    let (one, two) = (wal(&segment(1), "a", "one"), wal(&segment(1), "a", "two"));
    put_directly(&rig.stores[0], &one).await;
    put_directly(&rig.stores[1], &two).await;
    assert!(rig.serving(&[0, 1], &segment(1)).await.is_empty());
    for (chosen, serves, lacks) in [(&one, 0, 1), (&two, 1, 0), (&one, 0, 1)] {
        rig.resolve(chosen).await.unwrap();
        assert_eq!(rig.serving(&[0, 1], &segment(1)).await, [rig.stores[serves].name().to_string()]);
        assert!(rig.serving(&[lacks], &segment(1)).await.is_empty(), "what was rejected is served");
    }
    rig.end().await;
}

#[tokio::test]
async fn of_two_histories_the_chosen_one_is_served_from_every_store() {
    let rig = Rig::with_cluster(Ack::All).await;
    let ours = history_at(2, "a", "0/3000000");
    let theirs = history_at(2, "b", "0/4000000");
    put_directly(&rig.stores[0], &ours).await;
    put_directly(&rig.stores[1], &theirs).await;
    crate::reconcile::pass(&rig.coordinator, crate::reconcile::plan::Scope::Everything).await.unwrap();
    assert_eq!(rig.coordinator.metrics.wal_conflicts.get(), 1, "nobody was told");
    let info = rig.info().await;
    assert_eq!(info["clusters"][0]["conflicts"].as_array().unwrap().len(), 2, "{info}");
    for chosen in [&theirs, &ours] {
        rig.resolve(chosen).await.unwrap();
        rig.pass().await;
        let info = rig.info().await;
        assert_eq!(info["clusters"][0]["conflicts"].as_array().unwrap().len(), 0, "{info}");
        for stores in [&[0][..], &[1], &[0, 1], &[1, 0]] {
            let asked: Vec<Arc<dyn ObjectStore>> =
                stores.iter().map(|store| Arc::clone(&rig.stores[*store]) as _).collect();
            let target = rig.directory.path().join("history");
            let (cluster, name) = ("main".parse().unwrap(), chosen.header.name);
            let fetched = wal::fetch(&asked, &cluster, SystemIdentifier::new(SYSTEM), &name, &target).await;
            let Fetched::Written { header, .. } = fetched else { panic!("{stores:?}: {fetched:?}") };
            assert_eq!(header.sha256, chosen.header.sha256, "{stores:?}");
        }
        for store in &rig.stores {
            let (cluster, timeline) = ("main".parse().unwrap(), chosen.header.name.timeline());
            let text = wal::history_text(&**store, &cluster, SystemIdentifier::new(SYSTEM), timeline).await.unwrap();
            assert_eq!(repository::digest::sha256(&text.unwrap()), chosen.header.sha256, "{}", store.name());
        }
    }
    rig.end().await;
}

fn history_at(timeline: u32, node: &str, fork: &str) -> EncodedWal {
    let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
    encoder.push(format!("1\t{fork}\tno recovery target specified\n").as_bytes()).unwrap();
    let header = history(timeline, node).header;
    let facts = WalFacts {
        cluster: header.cluster,
        system_identifier: header.system_identifier,
        name: header.name,
        node: header.node,
        in_recovery: false,
        complete: true,
        logical_end: None,
        postgres_major: None,
        first_commit_time: None,
        last_commit_time: None,
        written: now(),
    };
    encoder.finish(facts).unwrap()
}

#[tokio::test]
async fn an_adoption_counts_as_soon_as_the_store_that_has_it_answers() {
    let rig = Rig::with_cluster(Ack::All).await;
    rig.push(&wal(&segment(1), "a", "one")).await.unwrap();
    let adoption = Adoption::new("b".parse().unwrap(), now(), Default::default());
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
