//! What every store must do, as one suite for all of them. For tests.
//!
//! Each rule is a function that panics with the rule it saw broken. The suite writes under a cluster name of its own
//! and can be run any number of times against one store, which it gives an identity if it has none.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::identity::{self, RepositoryIdentity};
use crate::key::ObjectKey;
use crate::store::{self, Body, ByteRange, Deleted, ObjectStore, PIECE_LIMIT_BYTES, Put, StoreError, collect};

/// Writers of one race.
const RACERS: usize = 16;
/// Races.
const RACES: usize = 20;
/// The size of the large objects: not a multiple of any piece.
const LARGE_BYTES: usize = 33 * 1024 * 1024 + 7;

/// Runs every rule and says how many there were. Panics at the first that is broken.
pub async fn run(store: Arc<dyn ObjectStore>) -> usize {
    if identity::read(&*store).await.expect("the identity can be read").is_none() {
        let identity = RepositoryIdentity::new(Uuid::now_v7(), Timestamp::UNIX_EPOCH);
        let _ = identity::create(&*store, &identity).await.expect("an empty store takes an identity");
    }
    let suite = Suite { store, home: format!("c/conformance-{}", Uuid::now_v7().simple()) };
    suite.an_object_is_created_once().await;
    suite.of_racing_writers_one_wins().await;
    suite.racing_writers_of_large_files_leave_one_whole_content().await;
    suite.what_is_absent_is_said_to_be().await;
    suite.an_empty_object_is_an_object().await;
    suite.ranges_are_cut().await;
    suite.large_bodies_come_back_in_pieces().await;
    suite.a_file_that_is_too_short_makes_no_object().await;
    suite.listings_are_in_byte_order().await;
    suite.pages_go_on_where_they_ended().await;
    suite.prefixes_are_plain_text().await;
    suite.a_listing_shows_what_was_just_written().await;
    suite.what_is_deleted_is_absent().await;
    suite.room_is_plausible().await;
    14
}

struct Suite {
    store: Arc<dyn ObjectStore>,
    /// Prefix of this run, without a slash at its end.
    home: String,
}

impl Suite {
    fn key(&self, rest: &str) -> ObjectKey {
        ObjectKey::parse(&format!("{}/{rest}", self.home)).expect("the suite spells its keys right")
    }

    async fn put(&self, key: &ObjectKey, content: &'static str) -> Put {
        let put = self.store.put_new(key, Bytes::from_static(content.as_bytes()).into()).await;
        put.unwrap_or_else(|error| panic!("put {key}: {}", chain(&error)))
    }

    async fn read(&self, key: &ObjectKey, range: ByteRange) -> Bytes {
        let stream = self.store.get(key, range).await;
        let stream = stream.unwrap_or_else(|error| panic!("get {key}: {}", chain(&error)));
        let read = collect(stream, 2 * LARGE_BYTES as u64).await;
        read.unwrap_or_else(|error| panic!("reading {key}: {}", chain(&error)))
    }

    async fn head(&self, key: &ObjectKey) -> Option<u64> {
        self.store.head(key).await.unwrap_or_else(|error| panic!("head {key}: {}", chain(&error)))
    }

    async fn keys(&self, prefix: &str, after: Option<&str>, limit: usize) -> (Vec<String>, bool) {
        let after = after.map(|after| format!("{}/{after}", self.home));
        let page = self.store.list(&format!("{}/{prefix}", self.home), after.as_deref(), limit).await;
        let page = page.unwrap_or_else(|error| panic!("list {prefix}: {}", chain(&error)));
        let home = self.home.len() + 1;
        (page.objects.iter().map(|entry| entry.key.as_str()[home..].to_owned()).collect(), page.more)
    }

    async fn an_object_is_created_once(&self) {
        let key = self.key("once/object");
        assert_eq!(self.put(&key, "first").await, Put::Created);
        assert_eq!(self.put(&key, "first").await, Put::Exists, "equal content is not created again");
        assert_eq!(self.put(&key, "other, longer").await, Put::Exists, "other content does not overwrite");
        assert_eq!(self.read(&key, ByteRange::All).await, "first", "the first content stays");
        assert_eq!(self.head(&key).await, Some(5));
    }

    async fn of_racing_writers_one_wins(&self) {
        for race in 0..RACES {
            let key = self.key(&format!("race/{race}/object"));
            self.race(&key, |writer| Bytes::from(format!("writer {writer} of race {race}")).into()).await;
        }
    }

    async fn racing_writers_of_large_files_leave_one_whole_content(&self) {
        let files: Vec<Body> = (0..4).map(|writer| file_of(&pattern(LARGE_BYTES / 4, writer))).collect();
        self.race(&self.key("race/large"), |writer| files[writer % files.len()].clone()).await;
        files.iter().for_each(remove);
    }

    async fn race(&self, key: &ObjectKey, body: impl Fn(usize) -> Body) {
        let puts = (0..RACERS).map(|writer| {
            let (store, key, body) = (self.store.clone(), key.clone(), body(writer));
            async move {
                let put = store.put_new(&key, body).await;
                put.unwrap_or_else(|error| panic!("racing put {key}: {}", chain(&error)))
            }
        });
        let puts = future::join_all(puts).await;
        let winners: Vec<usize> = (0..RACERS).filter(|writer| puts[*writer] == Put::Created).collect();
        assert_eq!(winners.len(), 1, "of {RACERS} racing writers of {key} one wins, not {winners:?}");
        let expected = body(winners[0]).sha256().await.expect("the winner's body can be read");
        let found: [u8; 32] = Sha256::digest(self.read(key, ByteRange::All).await).into();
        assert_eq!(found, expected, "{key} holds the winner's content");
    }

    async fn what_is_absent_is_said_to_be(&self) {
        let present = self.key("absent/object");
        assert_eq!(self.put(&present, "x").await, Put::Created);
        for absent in ["absent/other", "absent", "absent/obj", "nowhere/at/all"] {
            let key = self.key(absent);
            assert_eq!(self.head(&key).await, None, "{key} is absent");
            match self.store.get(&key, ByteRange::All).await.err() {
                Some(StoreError::NotFound { key: named, .. }) => assert_eq!(named, key),
                other => panic!("getting absent {key} gives NotFound, not {other:?}"),
            }
            let empty = ByteRange::Slice { offset: 0, length: 0 };
            let error = self.store.get(&key, empty).await.err();
            assert!(matches!(error, Some(StoreError::NotFound { .. })), "an empty range of nothing is not found");
        }
        assert_eq!(self.keys("nowhere", None, 10).await, (vec![], false));
    }

    async fn an_empty_object_is_an_object(&self) {
        let key = self.key("empty/object");
        assert_eq!(self.put(&key, "").await, Put::Created);
        assert_eq!(self.put(&key, "not empty").await, Put::Exists);
        assert_eq!(self.head(&key).await, Some(0));
        for range in [ByteRange::All, ByteRange::From { offset: 0 }, ByteRange::Slice { offset: 0, length: 9 }] {
            assert_eq!(self.read(&key, range).await, "", "{range:?} of an empty object");
        }
    }

    async fn ranges_are_cut(&self) {
        let key = self.key("range/object");
        assert_eq!(self.put(&key, "0123456789").await, Put::Created);
        let slice = |offset, length| ByteRange::Slice { offset, length };
        let cases = [
            (ByteRange::All, "0123456789"),
            (ByteRange::From { offset: 0 }, "0123456789"),
            (ByteRange::From { offset: 7 }, "789"),
            (ByteRange::From { offset: 10 }, ""),
            (ByteRange::From { offset: u64::MAX }, ""),
            (slice(0, 1), "0"),
            (slice(3, 4), "3456"),
            (slice(9, 1), "9"),
            (slice(8, 100), "89"),
            (slice(8, u64::MAX), "89"),
            (slice(5, 0), ""),
            (slice(10, 1), ""),
            (slice(1000, 1), ""),
        ];
        for (range, expected) in cases {
            assert_eq!(self.read(&key, range).await, expected, "{range:?} of ten digits");
        }
    }

    async fn large_bodies_come_back_in_pieces(&self) {
        let content = pattern(LARGE_BYTES, 1);
        let file = file_of(&content);
        for (name, body) in [("memory", Body::from(Bytes::from(content.clone()))), ("file", file.clone())] {
            let key = self.key(&format!("large/{name}"));
            let put = self.store.put_new(&key, body).await;
            assert_eq!(put.unwrap_or_else(|error| panic!("{}", chain(&error))), Put::Created);
            assert_eq!(self.head(&key).await, Some(LARGE_BYTES as u64));
            let mut stream = self.store.get(&key, ByteRange::All).await.expect("a large object is there");
            let mut offset = 0;
            while let Some(piece) = stream.next().await {
                let piece = piece.unwrap_or_else(|error| panic!("reading {key}: {}", chain(&error)));
                assert!(piece.len() <= PIECE_LIMIT_BYTES, "a piece of {} bytes", piece.len());
                assert!(piece[..] == content[offset..offset + piece.len()], "{key} differs after byte {offset}");
                offset += piece.len();
            }
            assert_eq!(offset, LARGE_BYTES);
            let middle =
                ByteRange::Slice { offset: PIECE_LIMIT_BYTES as u64 - 3, length: 2 * PIECE_LIMIT_BYTES as u64 };
            let range = PIECE_LIMIT_BYTES - 3..3 * PIECE_LIMIT_BYTES - 3;
            assert!(self.read(&key, middle).await[..] == content[range], "a range across pieces");
        }
        remove(&file);
    }

    async fn a_file_that_is_too_short_makes_no_object(&self) {
        let Body::File { path, len } = file_of(b"short") else { unreachable!("file_of makes a file") };
        let key = self.key("short/object");
        let put = self.store.put_new(&key, Body::File { path: path.clone(), len: len + 1 }).await;
        assert!(put.is_err(), "a body shorter than announced is refused");
        let missing = Body::File { path: path.with_extension("gone"), len: 1 };
        assert!(self.store.put_new(&key, missing).await.is_err(), "a body that is not there is refused");
        assert_eq!(self.head(&key).await, None, "and nothing is stored");
        remove(&Body::File { path, len });
    }

    async fn listings_are_in_byte_order(&self) {
        // '-' and '.' sort before '/', digits and letters after it.
        let names = ["a-b", "a.b", "a/-", "a/0", "a/b/c", "a/b.c", "a0", "aa", "A", "_", "b/0000000A", "b/0000000B"];
        for name in names {
            assert_eq!(self.put(&self.key(&format!("order/{name}")), name).await, Put::Created, "{name}");
        }
        let mut expected: Vec<String> = names.iter().map(|name| format!("order/{name}")).collect();
        expected.sort();
        assert_eq!(self.keys("order/", None, 100).await, (expected.clone(), false));
        for after in &expected {
            let rest: Vec<String> = expected.iter().filter(|key| *key > after).cloned().collect();
            assert_eq!(self.keys("order/", Some(after), 100).await, (rest, false), "after {after}");
        }
        // Where to start need not be an object.
        let rest: Vec<String> = expected.iter().filter(|key| key.as_str() > "order/a/b").cloned().collect();
        assert_eq!(self.keys("order/", Some("order/a/b"), 100).await, (rest, false));
        assert_eq!(self.keys("order/", Some("order/a~"), 100).await.0, ["order/b/0000000A", "order/b/0000000B"]);
        assert_eq!(self.keys("order/", Some("zzz"), 100).await, (vec![], false));
        let sizes = self.store.list(&format!("{}/order/", self.home), None, 100).await.expect("listing works");
        assert!(
            sizes
                .objects
                .iter()
                .all(|entry| entry.size == entry.key.as_str().len() as u64 - self.home.len() as u64 - 7)
        );
    }

    async fn pages_go_on_where_they_ended(&self) {
        let all: Vec<String> = (0..23).map(|n| format!("page/{}/{n:03}", n / 5)).collect();
        let puts = all.iter().map(|name| async { self.put(&self.key(name), "x").await });
        assert!(future::join_all(puts).await.iter().all(|put| *put == Put::Created));
        for limit in [1, 2, 5, 22, 23, 24] {
            let mut seen: Vec<String> = Vec::new();
            loop {
                let (keys, more) = self.keys("page/", seen.last().map(String::as_str), limit).await;
                assert!(keys.len() <= limit, "at most {limit}");
                assert!(!keys.is_empty() || !more, "a page without objects is the last");
                seen.extend(keys);
                assert!(seen.len() <= all.len(), "a listing ends");
                if !more {
                    break;
                }
            }
            assert_eq!(seen, all, "pages of {limit}");
        }
        let (_, more) = self.keys("page/", None, 23).await;
        assert!(!more, "the last page says so");
        let listed = store::list_all(&*self.store, &format!("{}/page/", self.home), 23).await;
        assert_eq!(listed.expect("23 are not too many").len(), 23);
        assert!(store::list_all(&*self.store, &format!("{}/page/", self.home), 22).await.is_err());
    }

    async fn prefixes_are_plain_text(&self) {
        for name in ["prefix/0000000100000001.s1", "prefix/0000000100000001.s2", "prefix/0000000100000002.s1"] {
            assert_eq!(self.put(&self.key(name), "x").await, Put::Created);
        }
        let count = async |prefix: &str| self.keys(prefix, None, 10).await.0.len();
        assert_eq!(count("prefix/0000000100000001.").await, 2);
        assert_eq!(count("prefix/0000000100000001.s2").await, 1);
        assert_eq!(count("prefix/00000001").await, 3);
        assert_eq!(count("pref").await, 3);
        assert_eq!(count("prefix").await, 3);
        assert_eq!(count("prefix/0000000100000003").await, 0);
        assert_eq!(count("prefix/0000000100000001.s1/").await, 0, "an object is not a directory");
    }

    async fn a_listing_shows_what_was_just_written(&self) {
        let mut seen = BTreeMap::new();
        for n in 0..20 {
            let name = format!("fresh/{n:02}");
            assert_eq!(self.put(&self.key(&name), "x").await, Put::Created);
            seen.insert(name.clone(), ());
            assert_eq!(self.keys("fresh/", None, 100).await.0, seen.keys().cloned().collect::<Vec<_>>());
            let before = (n > 0).then(|| format!("fresh/{:02}", n - 1));
            assert_eq!(self.keys("fresh/", before.as_deref(), 100).await.0, [name], "after the last seen");
        }
    }

    async fn what_is_deleted_is_absent(&self) {
        let neighbours = ["delete/d/a", "delete/d/a.b", "delete/d/a0", "delete/e"];
        for name in neighbours {
            assert_eq!(self.put(&self.key(name), "neighbour").await, Put::Created);
        }
        let key = self.key("delete/d/ab");
        let absent = self.delete(&key).await;
        assert!(absent == Deleted::Absent || absent == Deleted::Removed, "{absent:?} of what was never there");
        assert_eq!(self.put(&key, "first").await, Put::Created);
        assert_eq!(self.delete(&key).await, Deleted::Removed);
        assert_eq!(self.head(&key).await, None, "{key} is deleted");
        let error = self.store.get(&key, ByteRange::All).await.err();
        assert!(matches!(error, Some(StoreError::NotFound { .. })), "{error:?}");
        assert_eq!(self.keys("delete/", None, 10).await, (neighbours.map(str::to_owned).to_vec(), false));
        let again = self.delete(&key).await;
        assert!(again == Deleted::Absent || again == Deleted::Removed, "{again:?} of what is deleted");
        // The last one of its directory, and a place that is used again.
        for name in neighbours {
            assert_eq!(self.delete(&self.key(name)).await, Deleted::Removed);
        }
        assert_eq!(self.keys("delete/", None, 10).await, (vec![], false));
        assert_eq!(self.put(&key, "second").await, Put::Created, "the place of what was deleted is free");
        assert_eq!(self.read(&key, ByteRange::All).await, "second");
        let other = self.key("delete/d/other");
        let (delete, put) = future::join(self.delete(&key), self.put(&other, "x")).await;
        assert_eq!((delete, put), (Deleted::Removed, Put::Created), "a put beside a delete");
        assert_eq!(self.head(&other).await, Some(1));
    }

    async fn delete(&self, key: &ObjectKey) -> Deleted {
        self.store.delete(key).await.unwrap_or_else(|error| panic!("delete {key}: {}", chain(&error)))
    }

    async fn room_is_plausible(&self) {
        if let Some(room) = self.store.room().await.expect("room can be asked for") {
            assert!(room.free_bytes <= room.total_bytes && room.total_bytes > 0, "{room:?}");
        }
    }
}

/// Bytes that do not repeat at any piece boundary and differ by `seed`.
fn pattern(length: usize, seed: usize) -> Vec<u8> {
    let mut state = seed as u64 + 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A body in a file of its own; [`remove`] it.
fn file_of(content: &[u8]) -> Body {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file can be made");
    file.write_all(content).expect("and written");
    let path = file.into_temp_path().keep().expect("and kept");
    Body::File { path, len: content.len() as u64 }
}

fn remove(body: &Body) {
    if let Body::File { path, .. } = body {
        std::fs::remove_file(path).expect("the suite's own file is still there");
    }
}

/// An error with everything behind it.
fn chain(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}
