//! What goes where: one database of several, `pg_wal` and other links, tablespaces.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn of_one_database_the_others_are_zeros() {
    let mut history = History::new();
    let database = |oid, name: &str| Database { oid, name: ByteText::new(name) };
    let other = "base/16390/16400";
    let mut now = tree(&[(ONE, 9 * PAGE), (other, 90 * PAGE), ("base/16391/16400", 5 * PAGE)]);
    history.back_up(now.clone()).await;
    history.said.databases = vec![database(5, "postgres"), database(16_390, "other"), database(16_391, "wanted")];
    change(&mut now, other, 1000, &[3]);
    history.back_up(now).await;
    let target = history.target("data");
    history.restore(0, &target, Place::Free).await.unwrap();
    for asked in ["16391", "wanted"] {
        history.databases = vec![asked.to_owned()];
        for (place, target) in [(Place::Existing, target.clone()), (Place::Free, history.target(asked))] {
            let restored = history.restore(1, &target, place).await.unwrap();
            assert!(
                restored.warnings.iter().any(|warning| warning.contains("databases other (16390) ")),
                "{restored:?}"
            );
            let zeros = fs::read(target.join(other)).unwrap();
            assert!(zeros.len() == 90 * PAGE && zeros.iter().all(|byte| *byte == 0));
            assert_eq!(fs::metadata(target.join(other)).unwrap().blocks(), 0);
            for whole in [ONE, "base/16391/16400"] {
                assert!(fs::read(target.join(whole)).unwrap() == history.made[1].tree[whole]);
            }
            // All files but those of zeros.
            let relations: usize = history.made[1].tree.values().map(Vec::len).sum();
            assert_eq!(restored.bytes, (relations - 90 * PAGE) as u64);
        }
    }
    // The older backup does not tell names.
    let refused = history.restore(0, &history.target("none"), Place::Free).await;
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::DatabaseUnnamed { .. }))), "{refused:?}");
    history.databases = vec!["4711".to_owned()];
    let refused = history.restore(1, &history.target("none"), Place::Free).await;
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::DatabaseUnknown { .. }))), "{refused:?}");
    assert!(!history.target("none").exists());
}

/// A history of one backup, of a server whose `pg_wal` and log lay elsewhere.
async fn with_links() -> History {
    let mut history = History::new();
    history.said.wal_directory = Some(ByteText::new(history.target("live-wal").display().to_string()));
    let target = ByteText::new(history.target("live-pglog").display().to_string());
    history.said.links = vec![Link { path: path("pglog"), target, directory: true }];
    history.back_up(tree(&[(ONE, 9 * PAGE)])).await;
    history
}

#[tokio::test(flavor = "multi_thread")]
async fn pg_wal_is_put_elsewhere_and_stays_there() {
    let mut history = with_links().await;
    let (target, wal) = (history.target("data"), history.target("fast/wal"));
    let restored = history.restore(0, &target, Place::Free).await.unwrap();
    assert!(target.join("pg_wal/archive_status").is_dir() && !target.join("pg_wal").is_symlink());
    assert!(restored.warnings.iter().any(|warning| warning.contains("pg_wal was a link to")), "{restored:?}");
    assert!(restored.warnings.iter().any(|warning| warning.contains("pglog was a link")), "{restored:?}");
    assert!(!target.join("pglog").exists());

    history.links.map = [(PathBuf::from("pg_wal"), wal.clone())].into();
    let linked = history.target("linked");
    history.restore(0, &linked, Place::Free).await.unwrap();
    assert_eq!(fs::read_link(linked.join("pg_wal")).unwrap(), wal);
    assert!(wal.join("archive_status").is_dir());
    // Onto what is there: what lies in it goes, the link stays, whether it is named or not.
    for map in [history.links.map.clone(), Default::default()] {
        fs::write(wal.join("000000010000000000000001"), "x").unwrap();
        history.links.map = map;
        let restored = history.restore(0, &linked, Place::Existing).await.unwrap();
        assert_eq!((restored.removed, fs::read_link(linked.join("pg_wal")).unwrap()), (5, wal.clone()));
        assert_eq!(fs::read_dir(&wal).unwrap().count(), 1);
    }
    // Another place would leave the old one behind; a taken one is taken.
    history.links.map = [(PathBuf::from("pg_wal"), history.target("other"))].into();
    let refused = history.restore(0, &linked, Place::Existing).await;
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::LeftBehind { .. }))), "{refused:?}");
    assert!(linked.join(CONTROL).exists(), "nothing was touched");
    history.links.map = [(PathBuf::from("pg_wal"), wal)].into();
    let refused = history.restore(0, &history.target("second"), Place::Free).await;
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::Occupied { .. }))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn links_are_made_where_they_were_or_where_they_are_wanted() {
    let mut history = with_links().await;
    history.links.others = OtherLinks::All;
    let target = history.target("all");
    let restored = history.restore(0, &target, Place::Free).await.unwrap();
    assert!(restored.warnings.is_empty(), "{restored:?}");
    for (link, end) in [("pg_wal", "live-wal"), ("pglog", "live-pglog")] {
        assert_eq!(fs::read_link(target.join(link)).unwrap(), history.target(end));
        assert!(history.target(end).is_dir());
    }
    history.expect_links_alone(&target);
    history.links =
        LinkChoice { map: [(PathBuf::from("pglog"), history.target("log"))].into(), ..LinkChoice::default() };
    let target = history.target("mapped");
    history.restore(0, &target, Place::Free).await.unwrap();
    assert_eq!(fs::read_link(target.join("pglog")).unwrap(), history.target("log"));
    assert!(history.target("log").is_dir() && !target.join("pg_wal").is_symlink());
    history.links.map = [(PathBuf::from("base"), history.target("log"))].into();
    let refused = history.restore(0, &history.target("none"), Place::Free).await;
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::LinkUnknown { .. }))), "{refused:?}");
}

impl History {
    /// The backup's own files are there, and a link that leads nowhere is as it was.
    fn expect_links_alone(&self, target: &Path) {
        assert!(fs::read(target.join(ONE)).unwrap() == self.made[0].tree[ONE]);
        assert_eq!(fs::read_link(target.join("log")).unwrap(), Path::new("/nonexistent/log"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_is_not_left_behind() {
    let mut history = History::new();
    let old = history.target("space");
    let location = ByteText::new(old.display().to_string());
    history.said.tablespaces = vec![Tablespace { oid: 16_500, location, mode: 0o700 }];
    let far = "pg_tblspc/16500/PG_15_1/16400";
    history.back_up(tree(&[(ONE, 9 * PAGE), (far, 3 * PAGE)])).await;
    let target = history.target("data");
    history.restore(0, &target, Place::Free).await.unwrap();
    assert!(old.join("PG_15_1/16400").is_file());
    let mut options = history.options(&target, Place::Existing);
    options.tablespace_map = [("16500".to_owned(), history.target("new"))].into();
    let source = history.source(0, vec![history.store.clone()]);
    match apply(&source, &options).await {
        Err(RestoreError::Target(TargetError::LeftBehind { what, .. })) => assert_eq!(what, "tablespace 16500"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(survey(&source, &options).await, Err(RestoreError::Target(TargetError::LeftBehind { .. }))));
    assert!(target.join(CONTROL).exists() && !history.target("new").exists());
    // The operator moves it, and lets the link lead there: nothing is read again.
    fs::rename(&old, history.target("new")).unwrap();
    fs::remove_file(target.join("pg_tblspc/16500")).unwrap();
    symlink(history.target("new"), target.join("pg_tblspc/16500")).unwrap();
    let restored = apply(&source, &options).await.unwrap();
    assert_eq!(restored.bytes_kept, restored.bytes - 8192);
}
