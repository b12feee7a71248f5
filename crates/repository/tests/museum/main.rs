//! A museum of damaged repositories: each exhibit is a small sound repository of two stores in which something was changed,
//! cut off, exchanged or taken away, and its label is what the verifier says of it and what a restore would do.
//!
//! Everything is built in code, so exhibits follow the format. Labels are snapshots.

#![allow(clippy::unwrap_used)]

mod sound;

use std::sync::Arc;
use std::time::Duration;

use repository::key::{self, ObjectKey};
use repository::name::Generation;
use repository::observe::views;
use repository::restore_plan::{self, plan};
use repository::store::ObjectStore;
use repository::stores::memory::MemoryStore;
use repository::verify::repair::{self, Repaired};
use repository::verify::{Depth, Report, Request, Severity, Share, Watch, render_text, verify};

use sound::{
    Flaw, SYSTEM, Sound, bytes_of, cluster, full, increment, now, put_in_place, scratch, segment, segment_with_map,
};

/// Which object.
#[derive(Debug, Clone, Copy)]
enum Object {
    /// A pack of the full backup.
    Pack(u32),
    /// The increment's own pack.
    IncrementPack,
    /// The full backup's manifest.
    Manifest,
    /// The increment's.
    IncrementManifest,
    /// A root, by its generation; the third is the newest.
    Root(u64),
    /// A WAL file.
    Wal(&'static str),
    /// The history of the second timeline.
    History,
}

/// What happened to it.
#[derive(Debug, Clone, Copy)]
enum Mishap {
    /// A bit in the middle was flipped.
    Flipped,
    /// A bit of the last byte but this many was flipped.
    FlippedBeforeEnd(usize),
    /// It ends in the middle.
    Cut,
    /// Its last bytes are missing.
    Shortened(usize),
    /// It and another one lie under each other's key.
    Swapped(Object),
    /// What tells what it changed is of another segment.
    MapOf(u64),
    /// It is not there.
    Gone,
}

/// In which stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    One,
    Both,
}

impl Object {
    async fn key(self, store: &MemoryStore) -> ObjectKey {
        let cluster = cluster();
        match self {
            Self::Pack(number) => key::pack(&cluster, &full(), number),
            Self::IncrementPack => key::pack(&cluster, &increment(), 0),
            Self::Manifest => key::manifest(&cluster, &full()),
            Self::IncrementManifest => key::manifest(&cluster, &increment()),
            Self::Root(generation) => key::root(&cluster, Generation::new(generation).unwrap()),
            Self::Wal(name) => segment(store, name).await,
            Self::History => key::history(&cluster, SYSTEM, postgres_format::Timeline::new(2).unwrap()),
        }
    }
}

async fn damage(store: &MemoryStore, object: Object, mishap: Mishap) {
    let key = object.key(store).await;
    let mut bytes = bytes_of(store, &key).await;
    match mishap {
        Mishap::Flipped => {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        Mishap::FlippedBeforeEnd(count) => {
            let at = bytes.len() - 1 - count;
            bytes[at] ^= 1;
        }
        Mishap::Cut => bytes.truncate(bytes.len() / 2),
        Mishap::Shortened(count) => bytes.truncate(bytes.len() - count),
        Mishap::Swapped(other) => {
            let other = other.key(store).await;
            let others = bytes_of(store, &other).await;
            put_in_place(store, &other, bytes).await;
            bytes = others;
        }
        Mishap::MapOf(number) => {
            let others = segment_with_map(number).await;
            bytes.truncate(tail_of(&bytes));
            bytes.extend_from_slice(&others[tail_of(&others)..]);
        }
        Mishap::Gone => {
            let _ = store.delete(&key).await.unwrap();
            return;
        }
    }
    put_in_place(store, &key, bytes).await;
}

/// Where the change map of a WAL object begins, by its own header.
fn tail_of(object: &[u8]) -> usize {
    let length = u32::from_le_bytes(object[8..12].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&object[12..12 + length]).unwrap();
    16 + length + header["frames_size"].as_u64().unwrap() as usize
}

async fn exhibit(object: Object, mishap: Mishap, place: Where) -> Sound {
    let sound = Sound::build().await;
    let stores = if place == Where::One { 1 } else { 2 };
    for store in sound.stores.iter().take(stores) {
        damage(store, object, mishap).await;
    }
    sound
}

/// Nothing is on its way in a museum.
fn all(depth: Depth) -> Request {
    Request { second_look: Duration::ZERO, ..Request::all(depth) }
}

async fn look(stores: &[Arc<dyn ObjectStore>], depth: Depth) -> Report {
    verify(stores, &cluster(), &all(depth), &Watch::default(), scratch(), now()).await.unwrap()
}

/// What a restore to the latest would do.
async fn reaction(stores: &[Arc<dyn ObjectStore>]) -> String {
    let views = views(stores, &cluster()).await;
    match plan(&cluster(), &views, &restore_plan::Request::latest("fetch"), &Default::default(), now()) {
        Ok(plan) => {
            let names: Vec<&str> = plan.backup_stores.iter().map(AsRef::as_ref).collect();
            let mut text = format!("restore: {} from {}, WAL {}", plan.backup.backup, names.join(" or "), plan.wal);
            plan.warnings.iter().for_each(|warning| text.push_str(&format!("\n  warning: {warning}")));
            text
        }
        Err(impossible) => format!("restore: refused: {}\n  hint: {}", impossible.reason, impossible.hint),
    }
}

async fn label(sound: &Sound, depth: Depth) -> String {
    let stores = sound.all();
    let report = look(&stores, depth).await;
    format!("{}{}\n", render_text(&report), reaction(&stores).await)
}

/// What anybody may find in a museum, by the name on its label.
const EXHIBITS: &[(&str, Object, Mishap, Where)] = &[
    ("pack_flipped", Object::Pack(1), Mishap::Flipped, Where::One),
    ("pack_flipped_everywhere", Object::Pack(1), Mishap::Flipped, Where::Both),
    ("pack_table_flipped", Object::Pack(1), Mishap::FlippedBeforeEnd(100), Where::One),
    ("pack_cut", Object::Pack(1), Mishap::Cut, Where::One),
    ("packs_swapped", Object::Pack(0), Mishap::Swapped(Object::Pack(1)), Where::One),
    ("packs_of_two_backups_swapped", Object::Pack(0), Mishap::Swapped(Object::IncrementPack), Where::Both),
    ("pack_gone", Object::IncrementPack, Mishap::Gone, Where::One),
    ("pack_gone_everywhere", Object::IncrementPack, Mishap::Gone, Where::Both),
    ("manifest_flipped", Object::Manifest, Mishap::Flipped, Where::One),
    ("manifest_cut", Object::IncrementManifest, Mishap::Cut, Where::One),
    ("manifests_swapped", Object::Manifest, Mishap::Swapped(Object::IncrementManifest), Where::Both),
    ("manifest_gone_everywhere", Object::IncrementManifest, Mishap::Gone, Where::Both),
    ("root_flipped", Object::Root(3), Mishap::Flipped, Where::One),
    ("root_cut_everywhere", Object::Root(3), Mishap::Cut, Where::Both),
    ("roots_swapped", Object::Root(3), Mishap::Swapped(Object::Root(2)), Where::One),
    ("older_root_flipped", Object::Root(2), Mishap::Flipped, Where::One),
    ("older_root_gone", Object::Root(2), Mishap::Gone, Where::One),
    ("wal_flipped", Object::Wal("000000010000000000000004"), Mishap::Flipped, Where::One),
    ("wal_flipped_everywhere", Object::Wal("000000010000000000000004"), Mishap::Flipped, Where::Both),
    ("wal_frames_flipped", Object::Wal("000000010000000000000003"), Mishap::FlippedBeforeEnd(5), Where::One),
    ("wal_cut", Object::Wal("000000010000000000000003"), Mishap::Cut, Where::One),
    (
        "wal_swapped",
        Object::Wal("000000010000000000000003"),
        Mishap::Swapped(Object::Wal("000000010000000000000004")),
        Where::Both,
    ),
    ("wal_of_a_backup_gone", Object::Wal("000000010000000000000002"), Mishap::Gone, Where::One),
    ("wal_of_a_backup_gone_everywhere", Object::Wal("000000010000000000000002"), Mishap::Gone, Where::Both),
    ("wal_between_gone_everywhere", Object::Wal("000000010000000000000003"), Mishap::Gone, Where::Both),
    ("wal_behind_gone_everywhere", Object::Wal("000000020000000000000008"), Mishap::Gone, Where::Both),
    ("wal_behind_gone", Object::Wal("000000020000000000000008"), Mishap::Gone, Where::One),
    ("history_flipped", Object::History, Mishap::Flipped, Where::One),
    ("history_flipped_everywhere", Object::History, Mishap::Flipped, Where::Both),
    ("history_gone_everywhere", Object::History, Mishap::Gone, Where::Both),
    ("change_map_flipped", Object::Wal("000000010000000000000005"), Mishap::FlippedBeforeEnd(3), Where::One),
    ("change_maps_swapped", Object::Wal("000000010000000000000005"), Mishap::MapOf(4), Where::One),
    ("change_map_cut_off_everywhere", Object::Wal("000000010000000000000005"), Mishap::Shortened(10), Where::Both),
];

#[tokio::test]
async fn every_exhibit_has_its_label() {
    for (name, object, mishap, place) in EXHIBITS {
        let sound = exhibit(*object, *mishap, *place).await;
        insta::assert_snapshot!(*name, label(&sound, Depth::Digests).await);
    }
}

#[tokio::test]
async fn what_was_published_wrong_is_seen() {
    let extents = Sound::with(Flaw::Extents).await;
    insta::assert_snapshot!("published_with_wrong_extents", label(&extents, Depth::Digests).await);
    let page = Sound::with(Flaw::Page).await;
    assert!(look(&page.all(), Depth::Digests).await.sound, "digests are of what was stored");
    insta::assert_snapshot!("published_with_a_corrupt_page", label(&page, Depth::Full).await);
}

#[tokio::test]
async fn a_sound_repository_is_said_to_be_sound() {
    let sound = Sound::build().await;
    for depth in [Depth::Digests, Depth::Full] {
        let report = look(&sound.all(), depth).await;
        assert!(report.sound && report.complete, "{}", render_text(&report));
        assert!(report.backups.iter().all(|backup| backup.restorable));
    }
    insta::assert_snapshot!("sound", label(&sound, Depth::Full).await);
}

/// Both depths find the same damage; the shares of thirty nights find all that digests tell.
#[tokio::test]
async fn thirty_nights_find_what_one_walk_finds() {
    for (name, object, mishap, place) in EXHIBITS.iter().step_by(5) {
        let sound = exhibit(*object, *mishap, *place).await;
        let stores = sound.all();
        let whole = look(&stores, Depth::Digests).await;
        assert!(!whole.sound, "{name}");
        assert!(!look(&stores, Depth::Full).await.sound, "{name}");
        let mut found: Vec<String> = Vec::new();
        for night in 0..30 {
            let request = Request { share: Some(Share::on(night, 30)), ..all(Depth::Digests) };
            let report = verify(&stores, &cluster(), &request, &Watch::default(), scratch(), now()).await.unwrap();
            found.extend(report.findings.iter().filter_map(|finding| finding.object.clone()));
        }
        for finding in &whole.findings {
            let seen = finding.object.as_ref().is_none_or(|object| found.contains(object));
            assert!(seen, "{name}: no night found {:?}", finding.object);
        }
    }
}

#[tokio::test]
async fn what_another_store_has_is_put_right() {
    for (name, object, mishap, place) in EXHIBITS {
        let sound = exhibit(*object, *mishap, *place).await;
        let stores = sound.all();
        let before = look(&stores, Depth::Digests).await;
        let planned = repair::plan(&cluster(), &before.findings);
        let of_root = matches!(object, Object::Root(_));
        assert!(planned.steps.is_empty() || *place == Where::One && !of_root, "{name}: {planned:?}");
        for step in &planned.steps {
            let done = repair::apply(&stores, step, scratch()).await.unwrap();
            assert!(matches!(done, Repaired::PutRight { .. }), "{name}: {done:?}");
            let again = repair::apply(&stores, step, scratch()).await.unwrap();
            assert_eq!(again, Repaired::WasSound, "{name}");
        }
        let after = look(&stores, Depth::Full).await;
        // WAL that is missing in one store is copied by whoever compares the stores.
        assert_eq!(
            planned.compare_stores,
            matches!((object, mishap, place), (Object::Wal(_), Mishap::Gone, Where::One))
        );
        let expected = *place == Where::One && !of_root && !planned.compare_stores;
        assert_eq!(after.sound, expected, "{name}: {}", render_text(&after));
        if *place == Where::One {
            assert!(after.backups.iter().all(|backup| backup.restorable), "{name}");
            assert!(before.findings.iter().all(|finding| finding.severity == Severity::Damaged), "{name}");
        }
    }
}

#[tokio::test]
async fn nothing_is_put_in_the_place_of_what_nobody_has_sound() {
    let sound = exhibit(Object::Pack(1), Mishap::Flipped, Where::One).await;
    let stores = sound.all();
    let found = look(&stores, Depth::Digests).await;
    let planned = repair::plan(&cluster(), &found.findings);
    let [step] = planned.steps.as_slice() else { panic!("{planned:?}") };
    // The other copy is damaged after it was found to be sound.
    damage(&sound.stores[1], Object::Pack(1), Mishap::Cut).await;
    let before = bytes_of(&sound.stores[0], &step.key).await;
    let error = repair::apply(&stores, step, scratch()).await.unwrap_err();
    assert!(error.to_string().contains("no sound copy"), "{error}");
    assert_eq!(bytes_of(&sound.stores[0], &step.key).await, before);
}

#[tokio::test]
async fn one_backup_alone_is_looked_at_with_all_it_needs() {
    let only = |backup| Request { backup: Some(backup), ..all(Depth::Digests) };
    let check = async |sound: &Sound, backup, restorable: bool, is_sound: bool| {
        let stores = sound.all();
        let report = verify(&stores, &cluster(), &only(backup), &Watch::default(), scratch(), now()).await.unwrap();
        assert_eq!((report.backups.len(), report.sound), (1, is_sound), "{}", render_text(&report));
        assert_eq!(report.backups[0].restorable, restorable, "{}", render_text(&report));
    };
    let inherited = exhibit(Object::Pack(1), Mishap::Flipped, Where::Both).await;
    check(&inherited, increment(), false, false).await;
    let own = exhibit(Object::IncrementPack, Mishap::Flipped, Where::Both).await;
    check(&own, full(), true, true).await;
    check(&own, increment(), false, false).await;
    let wal = exhibit(Object::Wal("000000010000000000000004"), Mishap::Flipped, Where::Both).await;
    check(&wal, full(), true, true).await;
    check(&wal, increment(), false, false).await;
}
