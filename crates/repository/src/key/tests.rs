//! Keys are spelled and read back; what is no key is refused.

use proptest::prelude::*;

use super::*;

const SEGMENT: &str = "0000000A0000000100000002";

fn cluster() -> ClusterName {
    "main.eu".parse().unwrap()
}

fn system() -> SystemIdentifier {
    SystemIdentifier::new(7_300_000_000_000_000_001)
}

fn fingerprint() -> Fingerprint {
    "s0123456789abcdef0123456789abcdef".parse().unwrap()
}

fn backup() -> BackupId {
    "20261123T034138Z-7f3a9c21".parse().unwrap()
}

fn file(name: &str) -> WalFileName {
    name.parse().unwrap()
}

#[test]
fn every_key_is_spelled_once_and_read_back() {
    let check = |key: ObjectKey, text: &str| {
        assert_eq!(key.as_str(), text);
        assert_eq!(ObjectKey::parse(text).unwrap(), key);
        assert_eq!(key.parsed().unwrap().key(), key, "{text}");
    };
    let (c, s, f, b) = (&cluster(), system(), &fingerprint(), &backup());
    let timeline = file(SEGMENT).timeline();
    let head = "c/main.eu/7300000000000000001";
    let fp = "s0123456789abcdef0123456789abcdef";
    check(repository_identity(), "repo.json");
    check(probe("1700000000000-a").unwrap(), "coord/probe/1700000000000-a");
    check(root(c, Generation::FIRST), "c/main.eu/root/0000000000000001");
    check(manifest(c, b), "c/main.eu/b/20261123T034138Z-7f3a9c21/manifest");
    check(pack(c, b, 7), "c/main.eu/b/20261123T034138Z-7f3a9c21/p/000007");
    check(note(c, b, 7), "c/main.eu/b/20261123T034138Z-7f3a9c21/n/000007");
    check(pack(c, b, 1_234_567), "c/main.eu/b/20261123T034138Z-7f3a9c21/p/1234567");
    check(wal(c, s, &file(SEGMENT), f), &format!("{head}/wal/0000000A/00000001/{SEGMENT}.{fp}"));
    let partial = format!("{SEGMENT}.partial");
    check(wal(c, s, &file(&partial), f), &format!("{head}/wal/0000000A/00000001/{partial}.{fp}"));
    let note = format!("{SEGMENT}.00000028.backup");
    check(wal(c, s, &file(&note), f), &format!("{head}/wal/0000000A/00000001/{note}.{fp}"));
    check(wal(c, s, &file("0000000A.history"), f), &format!("{head}/history/0000000A.history"));
    check(history(c, s, timeline), &format!("{head}/history/0000000A.history"));
    let refused = file("0000000A.history");
    check(conflict(c, s, &refused, f), &format!("{head}/conflict/0000000A.history.{fp}"));
    check(decision(c, s, &file(SEGMENT), 255), &format!("{head}/decision/{SEGMENT}/000000ff"));
    check(writer(c, s, timeline, 1), &format!("{head}/writer/0000000A/00000001"));
}

#[test]
fn a_key_is_strict() {
    for bad in
        ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", ".a", "a/.b", "a b", "a\\b", "a\n", "ä", "a%2Fb", "a~"]
    {
        assert!(ObjectKey::parse(bad).is_err(), "{bad:?}");
    }
    assert!(ObjectKey::parse(&"a".repeat(201)).is_err());
    assert!(ObjectKey::parse(&"a/".repeat(256)).is_err());
    assert!(ObjectKey::parse(&format!("{}a", "a/".repeat(255))).is_ok());
}

#[test]
fn other_spellings_are_not_read() {
    let head = "c/main/7300000000000000001";
    let fp = "s0123456789abcdef0123456789abcdef";
    for other in [
        "repo.toml".to_owned(),
        "coord/probe".to_owned(),
        "c/Main/root/0000000000000001".to_owned(),
        "c/main/root/0000000000000000".to_owned(),
        "c/main/b/20261123T034138Z-7f3a9c21/p/7".to_owned(),
        "c/main/b/20261123T034138Z-7f3a9c21/p/0000007".to_owned(),
        "c/main/b/20261123T034138Z-7f3a9c21".to_owned(),
        "c/main/007300000000000000001/history/00000001.history".to_owned(),
        format!("{head}/wal/00000001/00000001/{SEGMENT}.{fp}"),
        format!("{head}/wal/0000000A/00000002/{SEGMENT}.{fp}"),
        format!("{head}/wal/0000000a/00000001/{SEGMENT}.{fp}"),
        format!("{head}/wal/0000000A/00000001/{SEGMENT}"),
        format!("{head}/wal/0000000A/00000001/{SEGMENT}.x{}", &fp[1..]),
        format!("{head}/history/{SEGMENT}"),
        format!("{head}/writer/A/00000001"),
        format!("{head}/decision/{SEGMENT}/1"),
    ] {
        let key = ObjectKey::parse(&other).unwrap();
        assert!(key.parsed().is_err(), "{other}");
    }
}

#[test]
fn prefixes_cover_their_objects_and_no_others() {
    let (c, s, f) = (&cluster(), system(), &fingerprint());
    let segment = wal(c, s, &file(SEGMENT), f);
    let partial = wal(c, s, &file(&format!("{SEGMENT}.partial")), f);
    let note = wal(c, s, &file(&format!("{SEGMENT}.00000028.backup")), f);
    let prefix = wal_name_prefix(c, s, &file(SEGMENT));
    assert!([&segment, &partial, &note].iter().all(|key| key.as_str().starts_with(&prefix)));
    let next = wal(c, s, &file("0000000A0000000100000003"), f);
    assert!(!next.as_str().starts_with(&prefix));
    assert!(!segment.as_str().starts_with(&wal_name_prefix(c, s, &file(&format!("{SEGMENT}.partial")))));
    assert!(partial.as_str().starts_with(&wal_name_prefix(c, s, &file(&format!("{SEGMENT}.partial")))));
    for key in [&segment, &partial, &note] {
        assert!(key.as_str().starts_with(&wal_timeline_prefix(c, s, file(SEGMENT).timeline())));
        assert!(key.as_str() < skip(&wal_prefix(c, s)).as_str());
    }
    assert!(!"c/main.eu/root/0000000000000001".starts_with(&cluster_prefix(&"main".parse().unwrap())));
    assert!(skip("c/main/").as_str() > "c/main/zzzz");
    assert!(skip("c/main/").as_str() < "c/main0/");
}

proptest! {
    #[test]
    fn any_text_is_either_refused_or_read_back_alike(text in "[a-z0-9A-F./_-]{0,80}|\\PC{0,40}") {
        if let Ok(key) = ObjectKey::parse(&text) {
            prop_assert_eq!(key.as_str(), text.as_str());
            if let Ok(parsed) = key.parsed() {
                prop_assert_eq!(parsed.key(), key);
            }
        }
    }

    #[test]
    fn keys_of_later_generations_sort_later(a in 1u64.., b in 1u64..) {
        let key = |n| root(&cluster(), Generation::new(n).unwrap());
        prop_assert_eq!(key(a).cmp(&key(b)), a.cmp(&b));
    }
}
