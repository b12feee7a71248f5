//! Whether a backup was taken of the server whose WAL counts today.
//!
//! A clone and its original share names, numbers and timelines. When an operator decided for one of them, a backup of the
//! other may still be live, and what the decided WAL changed since its start says nothing about its files. So its witnesses
//! are asked again before anything is built on it.
//! WAL that is in no store any more decides nothing here: where it is missing, its changes are not known from it either.

use postgres_format::timeline_history::TimelineHistory;
use repository::root::RootBackup;
use repository::witness;

use super::Unfit;
use super::find::Library;

/// Why nothing may be built on a backup, if the WAL on the way to our timeline is not its server's.
pub(super) async fn contradicts(library: Library<'_>, entry: &RootBackup, history: &TimelineHistory) -> Option<Unfit> {
    let heard = witness::hear(library.stores, library.cluster, entry, history).await;
    if let Some((store, name)) = heard.contradiction().or(heard.contested()) {
        let reason = format!("WAL {name} in store {store} is not of the server that it was taken from");
        return Some(Unfit::Unusable { reason });
    }
    let reasons: Vec<String> = heard.unknown().map(|(store, why)| format!("store {store}: {why}")).collect();
    let unknown = !heard.agrees() && !reasons.is_empty();
    unknown.then(|| Unfit::Unusable { reason: format!("its WAL cannot be looked at: {}", reasons.join("; ")) })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use postgres_format::{Lsn, SegmentSize, SystemIdentifier, Timeline};
    use repository::store::ObjectStore;
    use repository::stores::memory::MemoryStore;
    use repository::wal::{Sink, VariantCheck, WalEncoder, WalFacts, put};
    use repository::witness::WalWitness;

    use super::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;
    /// Segment 3 begins here.
    const BEGIN: u64 = 3 * (16 << 20);

    fn segment(seed: u8) -> Vec<u8> {
        (0..16u32 << 20).map(|index| (index >> 12) as u8 ^ seed).collect()
    }

    fn entry(own_wal: &[u8]) -> RootBackup {
        let text = format!(
            r#"{{"backup":"20261123T010203Z-00000001","manifest_sha256":"{}","manifest_size":1000,
            "system_identifier":"7","postgres_major":15,"segment_size_bytes":16777216,
            "start_timeline":1,"start_lsn":"0/3000028","start_time":"2026-11-23T01:02:03Z",
            "stop_timeline":1,"stop_lsn":"0/3020000","stop_time":"2026-11-23T01:03:00Z","min_recovery_point":null,
            "node":"db2","from_standby":false,"label":"nightly","files":900,"data_bytes":31457280,
            "stored_bytes":9437184,"packs":1,"page_errors":0}}"#,
            "07".repeat(32)
        );
        let stretch = WalWitness::stretch(Lsn::new(BEGIN + 5000), SIZE);
        let within = |lsn: Lsn| (lsn.as_u64() - BEGIN) as usize;
        let witness = WalWitness::of(stretch, &own_wal[within(stretch.start)..within(stretch.end)]);
        RootBackup { wal_witnesses: vec![witness], ..RootBackup::from_json(&text).unwrap() }
    }

    async fn store(name: &str, contents: &[&[u8]]) -> Arc<dyn ObjectStore> {
        let store = MemoryStore::new(name.parse().unwrap());
        for content in contents {
            let mut encoder = WalEncoder::new(3, Sink::Memory).unwrap();
            encoder.push(content).unwrap();
            let facts = WalFacts {
                cluster: "main".parse().unwrap(),
                system_identifier: SystemIdentifier::new(7),
                name: "000000010000000000000003".parse().unwrap(),
                node: "db1".parse().unwrap(),
                in_recovery: false,
                complete: true,
                logical_end: None,
                postgres_major: Some(15),
                first_commit_time: None,
                last_commit_time: None,
                written: "2026-11-23T04:00:00Z".parse().unwrap(),
            };
            // A second content is a conflict, which is kept as one.
            let _ = put(&store, &encoder.finish(facts).unwrap(), VariantCheck::Skip).await;
        }
        Arc::new(store)
    }

    #[tokio::test]
    async fn nothing_is_built_on_what_the_wal_that_counts_contradicts() {
        let (ours, theirs) = (segment(1), segment(2));
        let root = TimelineHistory::root(Timeline::FIRST);
        let later = TimelineHistory::parse(Timeline::new(2).unwrap(), b"1\t0/5000000\tx\n").unwrap();
        let cases: [(&[&[&[u8]]], bool); 6] = [
            (&[&[&ours]], false),
            (&[&[]], false),
            (&[&[&ours], &[]], false),
            (&[&[&theirs]], true),
            (&[&[&ours, &theirs]], true),
            (&[&[], &[&theirs]], true),
        ];
        for (contents, refused) in cases {
            let mut stores = Vec::new();
            for (number, contents) in contents.iter().enumerate() {
                stores.push(store(&format!("repo{number}"), contents).await);
            }
            let cluster = "main".parse().unwrap();
            let library = Library { stores: &stores, cluster: &cluster, scratch: std::path::Path::new("/") };
            for history in [&root, &later] {
                let found = contradicts(library, &entry(&ours), history).await;
                assert_eq!(found.is_some(), refused, "{found:?}");
            }
        }
    }
}
