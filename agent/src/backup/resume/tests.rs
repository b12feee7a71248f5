//! What is sent and what stays, block by block: tables, and a model with random attempts, changes and parents.

use jiff::Timestamp;
use postgres_format::relation::{DatabaseDirectory, Fork, TablespaceVersion};
use postgres_format::{SystemIdentifier, Timeline};

use super::*;
use crate::backup::plan;
use crate::backup::rows::Runs;

const PAGE: u64 = 8192;
const PATH: &str = "base/5/16384";
const FORK: RelationFork = RelationFork { tablespace: 1663, database: 5, relation: 16384, fork: Fork::Main };

fn geometry() -> Geometry {
    let version = TablespaceVersion { postgres_major: 15, catalog_version: 202_209_061 };
    Geometry { page_bytes: PAGE, segment_blocks: 131_072, version }
}

fn attempt(number: u32) -> Attempt {
    Attempt {
        backup: BackupId::new(Timestamp::UNIX_EPOCH, number),
        backup_type: BackupType::Full,
        cluster: "main".parse().unwrap(),
        node: "db1".parse().unwrap(),
        from_standby: false,
        system_identifier: SystemIdentifier::new(7),
        postgres_major: 15,
        control_version: 1300,
        catalog_version: 202_209_061,
        segment_size_bytes: 16 << 20,
        block_size: 8192,
        relation_segment_blocks: 131_072,
        checksum_version: 1,
        start_timeline: Timeline::FIRST,
        start_lsn: Lsn::new(1000 * u64::from(number)),
        start_time: Timestamp::UNIX_EPOCH,
    }
}

/// A plan of one file of so many pages.
fn planned(pages: u64) -> CopyPlan {
    plan::tests::planned(&[(PATH, pages * PAGE)])
}

/// The same, of which that is read.
fn taken(plan: CopyPlan, take: Take, changed: &[u32]) -> CopyPlan {
    let changed: RoaringBitmap = changed.iter().collect();
    plan.redrawn(PAGE, &std::env::temp_dir(), |planned| Ok(Planned { take, changed: changed.clone(), ..planned }))
        .unwrap()
}

/// What one attempt left of that file.
struct LeftOfFile {
    left: Left,
    held: HeldFile,
    packs: Vec<Pack>,
}

/// Contiguous pages `from` to `to` in a pack of their own.
fn solid(from: u64, to: u64) -> Extent {
    Extent { pack: from as u32, offset: 8, length: 100, from: from * PAGE, to: to * PAGE, pages: None }
}

fn left(number: u32, extents: &[Extent], sparse: &[u32], changes: ChangeMap) -> LeftOfFile {
    let sparse: RoaringBitmap = sparse.iter().collect();
    let held = HeldFile { number: FileNumber(40 + number), extents: extents.to_vec(), sparse };
    let attempt = attempt(number);
    let pack = |extent: &Extent| {
        let backup = Some(attempt.backup);
        Pack { backup, number: extent.pack, size: 500, sha256: [0; 32] }
    };
    LeftOfFile { packs: extents.iter().map(pack).collect(), held, left: Left { attempt, changes } }
}

fn touched(blocks: &[u32]) -> ChangeMap {
    let mut map = ChangeMap::empty();
    blocks.iter().for_each(|block| map.mark(FORK, *block));
    map
}

fn rest_of(left: Vec<LeftOfFile>, plan: &CopyPlan) -> (Laid, Option<Rest>) {
    let scratch = std::env::temp_dir();
    let mut held = Runs::create_in(&scratch).unwrap();
    let (mut attempts, mut packs) = (BTreeMap::new(), Vec::new());
    for (number, of) in (0..).zip(left) {
        held.push((InOrder(PATH.into()), number), of.held, 0).unwrap();
        packs.extend(of.packs);
        attempts.insert(number, of.left);
    }
    let left = AllLeft { attempts, packs, held: held.finish().unwrap() };
    let laid = lay(&left, plan.clone(), &geometry(), &scratch).unwrap();
    let rest = first(&laid).rest;
    (laid, rest)
}

fn first(laid: &Laid) -> Planned {
    laid.plan.files().next().unwrap().unwrap()
}

fn blocks(bitmap: &RoaringBitmap) -> Vec<u32> {
    bitmap.iter().collect()
}

#[test]
fn what_is_missing_or_changed_is_sent() {
    let plan = planned(10);
    let (laid, rest) = rest_of(vec![left(1, &[solid(2, 5), solid(7, 9)], &[], touched(&[3, 8, 9]))], &plan);
    let rest = rest.unwrap();
    // Blocks 3 and 8 lie under a contiguous frame of the attempt already, so that a sparse one may hold their new state.
    assert_eq!((blocks(&rest.sparse), blocks(&rest.solid)), (vec![3, 8], vec![0, 1, 5, 6, 9]));
    assert_eq!((rest.stays, laid.share), (3, Share { packs: 2, bytes: 3 * PAGE, of_bytes: 10 * PAGE }));
    let layers = first(&laid).under;
    assert_eq!((layers.len(), layers[0].backup, layers[0].file), (1, Some(attempt(1).backup), Some(FileNumber(41))));
    assert_eq!(
        described(attempt(1).backup, &laid.share),
        format!("resuming attempt {}: 2 packs, 24576 of 81920 bytes are there already", attempt(1).backup)
    );
}

#[test]
fn nothing_is_read_of_what_is_all_there() {
    let plan = planned(10);
    let (laid, rest) = rest_of(vec![left(1, &[solid(0, 10)], &[], ChangeMap::empty())], &plan);
    assert!(rest.unwrap().is_empty());
    assert_eq!(laid.share.bytes, 10 * PAGE);
}

#[test]
fn what_was_made_anew_or_cut_off_is_not_taken_over() {
    let plan = planned(10);
    let mut cut = ChangeMap::empty();
    cut.cut(FORK, 6);
    let (_, rest) = rest_of(vec![left(1, &[solid(4, 8)], &[], cut)], &plan);
    let rest = rest.unwrap();
    assert_eq!((blocks(&rest.sparse), blocks(&rest.solid)), (vec![6, 7], vec![0, 1, 2, 3, 8, 9]));
    let mut reset = ChangeMap::empty();
    reset.reset(DatabaseDirectory { tablespace: 1663, database: 5 });
    let (Laid { resume, share, .. }, rest) = rest_of(vec![left(1, &[solid(0, 10)], &[], reset)], &plan);
    assert!(rest.is_none() && resume.is_empty() && share.packs == 0, "nothing of it is referred to");
}

#[test]
fn the_newest_attempt_that_holds_a_block_unchanged_counts() {
    let plan = planned(10);
    let older = left(1, &[solid(0, 6)], &[], touched(&[1, 2, 5]));
    let newer = left(2, &[solid(2, 3), solid(8, 9)], &[], touched(&[5]));
    let (laid, rest) = rest_of(vec![older, newer], &plan);
    let rest = rest.unwrap();
    assert_eq!((blocks(&rest.sparse), blocks(&rest.solid)), (vec![1, 5], vec![6, 7, 9]));
    let layers: Vec<BackupId> = first(&laid).under.into_iter().filter_map(|layer| layer.backup).collect();
    assert_eq!(layers, [attempt(2).backup, attempt(1).backup]);
}

#[test]
fn pages_in_sparse_frames_serve_only_over_what_the_parent_has() {
    let sparse = Extent { pages: Some(2), ..solid(2, 6) };
    let (_, rest) = rest_of(vec![left(1, &[sparse], &[2, 5], ChangeMap::empty())], &planned(10));
    assert!(rest.is_none(), "nobody holds those pages contiguously");
    let listed = taken(planned(10), Take::Listed { inherited_blocks: 8 }, &[2, 3, 5]);
    let (_, rest) = rest_of(vec![left(1, &[sparse], &[2, 5], touched(&[5]))], &listed);
    let rest = rest.unwrap();
    assert_eq!((blocks(&rest.sparse), blocks(&rest.solid), rest.stays), (vec![3, 5], vec![8, 9], 1));
}

#[test]
fn pages_that_tell_by_their_lsn_are_read_as_ever() {
    let plan = taken(planned(10), Take::Newer { inherited_blocks: 10 }, &[]);
    let (laid, rest) = rest_of(vec![left(1, &[solid(0, 10)], &[], ChangeMap::empty())], &plan);
    assert!(rest.is_none() && laid.resume.is_empty());
}

#[test]
fn an_attempt_that_contradicts_itself_is_left_out() {
    let plan = planned(10);
    let (laid, _) = rest_of(vec![left(1, &[solid(0, 5), solid(4, 8)], &[], ChangeMap::empty())], &plan);
    assert!(laid.resume.is_empty());
}

#[test]
fn doubt_has_a_reason() {
    let ours = Ours { asked: BackupType::Incr, facts: attempt(2), parent_start: Some(Lsn::new(1000)) };
    let check = |attempt: Attempt, part: &str| {
        let reason = unfit(&attempt, &ours).unwrap_or_default();
        assert!(reason.contains(part) && (!reason.is_empty() || part.is_empty()), "{part:?} in {reason:?}");
    };
    check(attempt(1), "");
    assert_eq!(unfit(&attempt(1), &ours), None);
    check(Attempt { system_identifier: SystemIdentifier::new(8), ..attempt(1) }, "another system");
    check(Attempt { postgres_major: 16, ..attempt(1) }, "PostgreSQL version");
    check(Attempt { segment_size_bytes: 1 << 20, ..attempt(1) }, "WAL segment size");
    check(Attempt { block_size: 4096, ..attempt(1) }, "page size");
    check(Attempt { checksum_version: 0, ..attempt(1) }, "checksums");
    check(Attempt { start_timeline: Timeline::new(2).unwrap(), ..attempt(1) }, "began on timeline 2, and this is 1");
    check(Attempt { from_standby: true, ..attempt(1) }, "role");
    check(attempt(3), "after the start");
    check(Attempt { start_lsn: Lsn::new(999), ..attempt(1) }, "before what is built on");
    let full = Ours { asked: BackupType::Full, parent_start: None, ..ours.clone() };
    assert_eq!(unfit(&attempt(1), &full), None);
    let incr = Attempt { backup_type: BackupType::Incr, ..attempt(1) };
    assert!(unfit(&incr, &full).unwrap().contains("a full backup was asked for"));
}

/// A simple generator; the same again for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn some(&mut self, of: u32, percent: u64) -> Vec<u32> {
        (0..of).filter(|_| self.below(100) < percent).collect()
    }
}

/// Runs of contiguous pages out of a set.
fn runs(blocks: &[u32]) -> Vec<Extent> {
    let run = |run: &[u32]| solid(run[0].into(), u64::from(run[run.len() - 1]) + 1);
    blocks.chunk_by(|one, next| one + 1 == *next).map(run).collect()
}

/// What an attempt of the model stored.
struct Stored {
    extents: Vec<Extent>,
    sparse: Vec<u32>,
    /// The version of each page that it read.
    seen: Vec<Option<u32>>,
    /// Which changes come after its start.
    mark: usize,
}

/// In a model where each page has a version, which WAL raises: whatever attempts read and whatever changed since, laying this
/// backup over attempts and parent gives every page in its version at the start of this backup or later, and contiguous frames hold all.
#[test]
fn every_page_comes_out_in_its_newest_version() {
    const PAGES: u32 = 48;
    for seed in 0..3000 {
        let mut dice = Dice(seed);
        let mut versions = vec![0_u32; PAGES as usize];
        let mut since: Vec<Vec<u32>> = Vec::new();
        let write = |versions: &mut Vec<u32>, since: &mut Vec<Vec<u32>>, dice: &mut Dice| {
            let blocks = dice.some(PAGES, 15);
            blocks.iter().for_each(|block| versions[*block as usize] += 1);
            since.iter_mut().for_each(|touched| touched.extend(&blocks));
        };
        let with_parent = dice.below(2) == 0;
        let inherited = PAGES - dice.below(8) as u32;
        since.push(Vec::new());
        let parent: Vec<Option<u32>> =
            (0..PAGES).map(|block| (with_parent && block < inherited).then(|| versions[block as usize])).collect();
        let mut left_by: Vec<Stored> = Vec::new();
        for _ in 0..dice.below(4) {
            write(&mut versions, &mut since, &mut dice);
            since.push(Vec::new());
            let mark = since.len() - 1;
            let held = dice.some(PAGES, 70);
            // While it reads the server goes on.
            let (early, late) = held.split_at(held.len() / 2);
            let mut seen = vec![None; PAGES as usize];
            early.iter().for_each(|block| seen[*block as usize] = Some(versions[*block as usize]));
            write(&mut versions, &mut since, &mut dice);
            late.iter().for_each(|block| seen[*block as usize] = Some(versions[*block as usize]));
            let is_sparse = with_parent && dice.below(2) == 0;
            let sparse: Vec<u32> = if is_sparse { held.clone() } else { Vec::new() };
            let extents = match (is_sparse, held.first(), held.last()) {
                (true, Some(first), Some(last)) => {
                    let pages = Some(held.len() as u32);
                    vec![Extent { pages, ..solid((*first).into(), u64::from(*last) + 1) }]
                }
                (true, ..) => Vec::new(),
                _ => runs(&held),
            };
            left_by.push(Stored { extents, sparse, seen, mark });
        }
        write(&mut versions, &mut since, &mut dice);
        let mut plan = planned(PAGES.into());
        if with_parent {
            let changed: Vec<u32> = since[0].iter().copied().filter(|block| *block < inherited).collect();
            plan = taken(plan, Take::Listed { inherited_blocks: inherited }, &changed);
        }
        let left: Vec<LeftOfFile> = (1..)
            .zip(&left_by)
            .map(|(number, by)| left(number, &by.extents, &by.sparse, touched(&since[by.mark])))
            .collect();
        let (Laid { resume, .. }, rest) = rest_of(left, &plan);
        let all: RoaringBitmap = match with_parent {
            true => since[0].iter().copied().filter(|block| *block < inherited).chain(inherited..PAGES).collect(),
            false => (0..PAGES).collect(),
        };
        let referred: Vec<BackupId> = resume.attempts().collect();
        let rest = rest.unwrap_or_else(|| Rest { solid: all, ..Rest::default() });
        for block in 0..PAGES {
            let at = block as usize;
            let sent = rest.sparse.contains(block) || rest.solid.contains(block);
            let of_attempt =
                |(number, by): (u32, &Stored)| by.seen[at].filter(|_| referred.contains(&attempt(number).backup));
            let mut newest_first = left_by.iter().enumerate().rev().map(|(index, one)| (index as u32 + 1, one));
            let under = newest_first.find_map(of_attempt).or(parent[at]);
            let found = if sent { Some(versions[at]) } else { under };
            assert_eq!(found, Some(versions[at]), "seed {seed}, block {block}");
            let solid_elsewhere = parent[at].is_some()
                || (1..).zip(&left_by).any(|(number, by)| {
                    let holds = |extent: &&Extent| {
                        extent.pages.is_none() && (extent.from..extent.to).contains(&(u64::from(block) * PAGE))
                    };
                    referred.contains(&attempt(number).backup) && by.extents.iter().any(|extent| holds(&extent))
                });
            assert!(
                rest.solid.contains(block) || solid_elsewhere,
                "seed {seed}, block {block} has no contiguous frame"
            );
        }
    }
}
