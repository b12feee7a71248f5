//! Histories that stores hold in unlike contents.

use super::*;

const NAME: &str = "00000002.history";

fn history(text: &str) -> EncodedWal {
    encode(NAME, text.as_bytes())
}

async fn fetched(stores: &[&Arc<MemoryStore>]) -> Result<String, String> {
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("RECOVERYHISTORY");
    let stores: Vec<Arc<dyn ObjectStore>> = stores.iter().map(|store| Arc::clone(store) as _).collect();
    match fetch(&stores, &cluster(), SYSTEM, &NAME.parse().unwrap(), &path).await {
        Fetched::Written { .. } => Ok(std::fs::read_to_string(&path).unwrap()),
        Fetched::Unknown { reasons } => Err(reasons.join("; ")),
        Fetched::Absent => Err("absent".to_owned()),
    }
}

async fn decide_for(store: &MemoryStore, chosen: &EncodedWal) {
    let decision =
        Decision { format: 1, fingerprint: chosen.fingerprint, reason: "checked".to_owned(), written: now() };
    decide(store, &cluster(), SYSTEM, &NAME.parse().unwrap(), &decision).await.unwrap();
}

#[tokio::test]
async fn histories_that_exclude_each_other_are_served_to_nobody_until_one_is_chosen() {
    let (ours, theirs) = ("1\t0/3000000\tno recovery target\n", "1\t0/4000000\tno recovery target\n");
    let (repo1, s3) = (store("repo1"), store("s3"));
    put_one(&repo1, &history(ours)).await.unwrap();
    put_one(&s3, &history(theirs)).await.unwrap();
    let conflict = fetched(&[&repo1, &s3]).await.unwrap_err();
    for (text, name) in [(ours, "repo1"), (theirs, "s3")] {
        let content = format!("{NAME}.{} in {name}", history(text).fingerprint);
        assert!(conflict.contains("in conflict") && conflict.contains(&content), "{conflict}");
    }
    // A choice in either store counts for both, and the last one.
    decide_for(&repo1, &history(theirs)).await;
    assert_eq!(fetched(&[&repo1, &s3]).await.unwrap(), theirs);
    assert!(fetched(&[&repo1]).await.unwrap_err().contains("in conflict"), "what was rejected is not served");
    decide_for(&repo1, &history(ours)).await;
    assert_eq!(fetched(&[&repo1, &s3]).await.unwrap(), ours);
    // A store that refused it once serves it, if it is the chosen one.
    assert!(put_one(&s3, &history(ours)).await.is_err());
    decide_for(&s3, &history(ours)).await;
    decide_for(&s3, &history(ours)).await;
    assert_eq!(fetched(&[&s3]).await.unwrap(), ours);
    assert_eq!(fetched(&[&s3, &repo1]).await.unwrap(), ours);
    assert_eq!(put_one(&s3, &history(ours)).await.unwrap(), Stored::AlreadyStored, "its sender goes on");
    let timeline = postgres_format::Timeline::new(2).unwrap();
    let contents = history_contents(s3.as_ref(), &cluster(), SYSTEM, timeline).await.unwrap();
    let contents: Vec<_> = contents.into_iter().filter_map(|content| content.fingerprint).collect();
    assert_eq!(contents, [history(theirs).fingerprint, history(ours).fingerprint]);
}

#[tokio::test]
async fn histories_of_one_ancestry_are_one_and_a_damaged_one_is_passed_over() {
    let (plain, commented) = ("1\t0/3000000\tno recovery target\n", "# why\n1\t0/3000000\tat a restore point\n");
    let (repo1, s3, third) = (store("repo1"), store("s3"), store("third"));
    put_one(&repo1, &history(plain)).await.unwrap();
    put_one(&s3, &history(commented)).await.unwrap();
    assert_eq!(fetched(&[&repo1, &s3]).await.unwrap(), plain);
    decide_for(&repo1, &history(commented)).await;
    assert_eq!(fetched(&[&repo1, &s3]).await.unwrap(), plain, "to choose between them chooses both");
    let mut damaged = object(&history(plain)).to_vec();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    let _ = third.put_new(&history(plain).key(), Bytes::from(damaged).into()).await.unwrap();
    assert_eq!(fetched(&[&third, &s3]).await.unwrap(), commented);
}
