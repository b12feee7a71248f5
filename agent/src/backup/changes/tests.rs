//! What is read of which file.

use postgres_format::data_directory::{self, Entry};
use repository::backup::manifest::Layer;
use repository::backup::pack::{Extent, FileNumber};
use repository::byte_text::RelativePath;

use super::*;

const PAGE: u64 = 8192;
const SEGMENT_BLOCKS: u32 = 131_072;
const GEOMETRY: Geometry = Geometry {
    page_bytes: PAGE,
    segment_blocks: SEGMENT_BLOCKS,
    version: TablespaceVersion { postgres_major: 15, catalog_version: 202_209_061 },
};
const TABLE: RelationFork = RelationFork { tablespace: 1663, database: 5, relation: 16384, fork: Fork::Main };

fn listed_file(path: &str, bytes: u64) -> ListedFile {
    let kind = match data_directory::classify(Path::new(path), false) {
        Entry::Copy(kind) => kind,
        other => panic!("{path}: {other:?}"),
    };
    ListedFile { path: path.into(), kind, size: bytes, mode: 0o600, modified_unix: 0 }
}

fn parent(path: &str, bytes: u64) -> File {
    let extent = Extent { pack: 0, offset: 8, length: 100_000, from: 0, to: bytes.max(1), pages: None };
    File {
        number: FileNumber(3),
        path: RelativePath::new(path).unwrap(),
        kind: ManifestKind::Relation,
        mode: 0o600,
        mtime: 0,
        size: bytes,
        crc32c: None,
        layers: vec![Layer { backup: None, file: None, extents: vec![extent] }],
    }
}

/// What is read of a file of so many pages, of which the parent has so many.
fn taken(changes: &Changes, path: &str, pages: u64, parents: u64) -> Take {
    changes.take(&listed_file(path, pages * PAGE), Some(&parent(path, parents * PAGE)), &GEOMETRY)
}

fn map(mark: &[u32], cut: Option<u32>) -> Changes {
    let mut map = ChangeMap::empty();
    mark.iter().for_each(|block| map.mark(TABLE, *block));
    cut.into_iter().for_each(|limit| map.cut(TABLE, limit));
    Changes::Maps(map)
}

fn newer() -> Changes {
    Changes::PageLsn { since: Lsn::new(0x100), made_since: HashSet::from([PathBuf::from("base/6")]) }
}

#[test]
fn maps_list_blocks_and_growth_is_read() {
    let table = "base/5/16384";
    let check = |mark: &[u32], cut, pages, parents, expected| {
        assert_eq!(taken(&map(mark, cut), table, pages, parents), expected, "{mark:?} {cut:?} {pages} {parents}");
    };
    let listed = |inherited_blocks| Take::Listed { inherited_blocks };
    check(&[], None, 100, 100, Take::Nothing);
    check(&[3], None, 100, 100, listed(100));
    check(&[], None, 101, 100, listed(100));
    check(&[], None, 90, 100, Take::Nothing);
    check(&[95], None, 90, 100, Take::Nothing);
    check(&[3, 4], Some(50), 100, 100, listed(50));
    check(&[3, 4], Some(50), 50, 100, listed(50));
    check(&[], Some(50), 50, 100, Take::Nothing);
    check(&[], Some(0), 100, 100, Take::Whole);
    check(&[], None, 100, 0, Take::Whole);
    check(&[], None, 0, 100, Take::Whole);
    let most: Vec<u32> = (0..90).collect();
    check(&most, None, 100, 100, listed(100));
    check(&[&most[..], &[95]].concat(), None, 100, 100, Take::Whole);
    check(&[], None, 1000, 100, listed(100));
    check(&[5], None, 1000, 100, Take::Whole);
}

#[test]
fn later_files_of_a_relation_count_their_blocks_from_their_first() {
    let second = "base/5/16384.1";
    let changes = map(&[3, SEGMENT_BLOCKS + 7, 2 * SEGMENT_BLOCKS], None);
    assert_eq!(taken(&changes, second, 100, 100), Take::Listed { inherited_blocks: 100 });
    let listed = |inherited_blocks| {
        changes.listed(&listed_file(second, 100 * PAGE), &GEOMETRY, Take::Listed { inherited_blocks })
    };
    assert_eq!(listed(100).iter().collect::<Vec<_>>(), [7]);
    assert!(listed(7).is_empty());
    assert_eq!(taken(&map(&[], Some(SEGMENT_BLOCKS)), second, 100, 100), Take::Whole);
    assert_eq!(taken(&map(&[], Some(SEGMENT_BLOCKS)), "base/5/16384", 100, 100), Take::Nothing);
    assert_eq!(taken(&map(&[], Some(SEGMENT_BLOCKS + 40)), second, 60, 100), Take::Listed { inherited_blocks: 40 });
}

#[test]
fn only_main_forks_that_the_parent_has_inherit() {
    for changes in [map(&[], None), newer()] {
        for path in ["base/5/16384_fsm", "base/5/16384_vm", "base/5/16384_init", "base/5/PG_VERSION", "pg_xact/0000"] {
            assert_eq!(taken(&changes, path, 10, 10), Take::Whole, "{path}");
        }
        let file = listed_file("base/5/16384", 10 * PAGE);
        assert_eq!(changes.take(&file, None, &GEOMETRY), Take::Whole);
        let odd = listed_file("base/5/16384", 10 * PAGE + 1);
        assert_eq!(changes.take(&odd, Some(&parent("base/5/16384", 10 * PAGE)), &GEOMETRY), Take::Whole);
        assert_eq!(changes.take(&file, Some(&parent("base/5/16384", 10 * PAGE + 1)), &GEOMETRY), Take::Whole);
        let mut other = parent("base/5/16384", 10 * PAGE);
        other.kind = ManifestKind::Other;
        assert_eq!(changes.take(&file, Some(&other), &GEOMETRY), Take::Whole);
        let mut deep = parent("base/5/16384", 10 * PAGE);
        deep.layers = vec![deep.layers[0].clone(); rebase::LAYERS_MAX];
        assert_eq!(changes.take(&file, Some(&deep), &GEOMETRY), Take::Whole);
    }
}

#[test]
fn a_database_that_was_made_since_is_copied() {
    let mut reset = ChangeMap::empty();
    reset.reset(TABLE.directory());
    assert_eq!(taken(&Changes::Maps(reset), "base/5/16384", 10, 10), Take::Whole);
    assert_eq!(taken(&newer(), "base/6/16384", 10, 10), Take::Whole);
    assert_eq!(taken(&newer(), "base/5/16384", 10, 8), Take::Newer { inherited_blocks: 8 });
    assert_eq!(taken(&newer(), "base/5/16384", 7, 8), Take::Newer { inherited_blocks: 7 });
    let mut versions = [listed_file("base/5/PG_VERSION", 3), listed_file("base/6/PG_VERSION", 3)];
    versions[1].modified_unix = 70;
    let versions = versions.into_iter().map(Ok::<_, std::convert::Infallible>);
    assert_eq!(made_since(versions, 70).unwrap(), HashSet::from([PathBuf::from("base/6")]));
}
