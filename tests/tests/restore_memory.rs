//! What a restore holds in memory does not grow with the number of files, and neither does what a coordinator holds that looks
//! whether a backup may be published. Alone in its process, because peaks are the process's.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use agent::restore::{LinkChoice, Place, RestoreOptions, RestoreSource, Survey, survey};
use repository::backup::{self, VerifyDepth};
use repository::restore_plan::{ArchiveMode, Recovery, Request, TargetTimeline};
use tests::runtime::block_on;
use tests::synthetic::{self, Shape};

/// Files of the first look, and how many times as many the second has.
const FILES: u32 = 25_000;
const TIMES: u32 = 6;
/// What 125,000 files more may cost, in bytes: less than if each was remembered, which would take some 400, and more than what
/// the allocator keeps for every thread that happens to run beside others on a busy machine.
const GROWTH_MAX: u64 = 32 << 20;

fn look(shape: Shape) -> Survey {
    let scratch = tempfile::tempdir().unwrap();
    let store = repository::config::open(&synthetic::store_at(scratch.path())).unwrap();
    let backup = block_on(synthetic::publish(store.as_ref(), shape, scratch.path())).unwrap();
    let source = RestoreSource { cluster: synthetic::cluster().unwrap(), backup, stores: vec![store] };
    let options = RestoreOptions {
        target: "/nonexistent/data".into(),
        place: Place::Free,
        databases: Vec::new(),
        tablespace_map: Default::default(),
        links: LinkChoice::default(),
        recovery: Recovery::of(&Request::latest("false"), TargetTimeline::Latest, ArchiveMode::Off),
        owner: Some("root".to_owned()),
        parallel: 0,
        bytes_per_second: 0,
        scratch: scratch.path().to_owned(),
    };
    let files = look_before_publishing(&source, shape, scratch.path());
    let survey = block_on(survey(&source, &options)).unwrap();
    assert_eq!(survey.files, files);
    survey
}

/// As a coordinator does; gives the number of files.
fn look_before_publishing(source: &RestoreSource, shape: Shape, scratch: &Path) -> u64 {
    synthetic::make_packs(scratch, shape).unwrap();
    let (store, cluster) = (source.stores[0].as_ref(), &source.cluster);
    let looked = backup::verify(store, cluster, &source.backup, VerifyDepth::Presence, scratch);
    block_on(looked).unwrap().files
}

fn peak_bytes() -> u64 {
    tests::program::peak_bytes_of(std::process::id()).unwrap()
}

#[test]
fn memory_does_not_grow_with_the_number_of_files() {
    // Twice, so that what the first look leaves behind counts for both.
    look(Shape::Small(FILES));
    let first = look(Shape::Small(FILES));
    let before = peak_bytes();
    let second = look(Shape::Small(FILES * TIMES));
    let growth = peak_bytes() - before;
    assert_eq!((first.files, second.files), (u64::from(FILES) + 1, u64::from(FILES * TIMES) + 1));
    assert!(second.requests > first.requests, "{second:?}");
    assert!(growth < GROWTH_MAX, "{growth} bytes more for {} files more", FILES * (TIMES - 1));
    let large = look(Shape::Large(40));
    assert_eq!(large.file_bytes, (40 << 30) + 8192);
    let growth = peak_bytes() - before;
    assert!(growth < GROWTH_MAX, "{growth} bytes more for large files");
}
