//! Choices that are written in several stores at once.

use super::*;

fn choice(of: &EncodedWal) -> Decision {
    Decision { format: 1, fingerprint: of.fingerprint, reason: "checked".to_owned(), written: now() }
}

#[tokio::test]
async fn a_choice_counts_in_stores_that_lack_the_chosen_content_and_the_next_one_outdoes_it_in_all() {
    let (first, second) = (encode(SEGMENT, &content(1, MIB)), encode(SEGMENT, &content(2, MIB)));
    let (repo1, s3) = (store("repo1"), store("s3"));
    put_one(&repo1, &first).await.unwrap();
    put_one(&s3, &second).await.unwrap();
    let name: WalFileName = SEGMENT.parse().unwrap();
    let stores: [&dyn ObjectStore; 2] = [repo1.as_ref(), s3.as_ref()];
    // Somebody chose before, in one of them.
    decide(repo1.as_ref(), &cluster(), SYSTEM, &name, &choice(&second)).await.unwrap();
    for (chosen, serves, lacks) in [(&first, &repo1, &s3), (&second, &s3, &repo1)] {
        decide_in(&stores, &cluster(), SYSTEM, &name, &choice(chosen)).await.unwrap();
        let located = locate_segment(serves).await;
        assert!(matches!(&located, Located::Object { key, .. } if *key == chosen.key()), "{located:?}");
        // The other one alone gives nothing, not what was rejected.
        assert!(matches!(locate_segment(lacks).await, Located::Conflict { .. }));
        let both: Vec<Arc<dyn ObjectStore>> = vec![repo1.clone(), s3.clone()];
        let served = together(&both, &cluster(), SYSTEM, &name).await.unwrap();
        assert!(matches!(&served, Together::Served(stores) if stores == &[serves.name().clone()]), "{served:?}");
    }
    let prefix = key::decision_prefix(&cluster(), SYSTEM, &name);
    let keys = async |store: &MemoryStore| store.list(&prefix, None, 10).await.unwrap().objects;
    let (one, other) = (keys(&repo1).await, keys(&s3).await);
    assert_eq!(one[1..], other[..], "the same numbers");
}
