//! What our change maps say of WAL is what PostgreSQL's own tools say of it: after random work on a real server every
//! block that pg_waldump names is in the map, every limit and every reset, and nothing else. What agents write down while
//! they archive is held against the same tool.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use postgres_format::relation::{DatabaseDirectory, Fork, RelationFork, TablespaceVersion};
use postgres_format::timeline_history::TimelineHistory;
use postgres_format::wal_changes::{ChangeMap, ChangeScan, SegmentChanges, join};
use postgres_format::wal_segment::{Expected, PAGE_BYTES};
use postgres_format::wal_summary::{self, SummaryName, cover};
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline};
use repository::config::DirectoryConfig;
use repository::store::ObjectStore;
use repository::stores::directory::DirectoryStore;
use repository::wal::{ArchivedChanges, segments};
use tests::account::{self, Scratch};
use tests::postgres::{Checksums, InitOptions, Server};
use tests::runtime::block_on;
use tests::work::Work;
use tests::world::{CLUSTER, Stores, World};
use tests::{program, scenario, special, wait};

/// Statements of one run. More of them make the same kinds of records again.
const STEPS: usize = 130;
/// Longest run of pg_waldump over all of it.
const DUMP_PATIENCE: Duration = Duration::from_secs(120);
/// Relations of 12 bytes that a transaction's list has room for in what is kept of a record beyond a segment.
const SHORT_LIST_MAX: usize = 64;
/// How many segments pgbench fills at least.
const PGBENCH_SEGMENTS: u64 = 12;

#[test]
fn every_block_that_waldump_names_is_in_the_map() -> Result<()> {
    for (seed, checksums, settings) in [
        (1, Checksums::On, &[("wal_compression", "off")][..]),
        (2, Checksums::Off, &[("wal_compression", "pglz"), ("wal_log_hints", "on"), ("full_page_writes", "off")]),
        (3, Checksums::On, &[("wal_compression", "lz4"), ("wal_level", "logical")]),
        (
            4,
            Checksums::Off,
            &[("wal_compression", "off"), ("wal_log_hints", "off"), ("wal_consistency_checking", "'heap2, gist'")],
        ),
    ] {
        let run = Run::new(seed, checksums, settings).with_context(|| format!("seed {seed}"))?;
        run.compare().with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

#[test]
fn what_agents_write_down_beside_wal_is_what_waldump_names() {
    scenario::play("changes-archived", |stage| {
        let size = SegmentSize::MIN;
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let options = InitOptions { segment_mebibytes: 1, ..InitOptions::default() };
        let primary = world.primary(&stage.scratch, "db1", options)?;
        primary.server.sql("alter system set wal_keep_size = '4GB'")?;
        primary.server.sql("select pg_reload_conf()")?;
        primary.server.pgbench_init(1)?;
        primary.server.switch_wal()?;
        primary.server.sql("checkpoint")?;
        let first = SegmentNumber::containing(position(&primary.server)?, size);
        let load = primary.server.pgbench(0)?;
        wait::until("pgbench writes WAL", DUMP_PATIENCE, || {
            Ok(SegmentNumber::containing(position(&primary.server)?, size).as_u64() > first.as_u64() + PGBENCH_SEGMENTS)
        })?;
        drop(load);
        let last: SegmentName = primary.archive_now()?.parse()?;
        let range = first.start(size)..last.number(size)?.end(size);
        let path = world.directory.clone().context("no directory store")?;
        let store = DirectoryStore::new("repo1".parse()?, DirectoryConfig { path, full_percent: 100 })?;
        let (stores, cluster) = ([Arc::new(store) as Arc<dyn ObjectStore>], CLUSTER.parse()?);
        let system = SystemIdentifier::new(primary.server.system_identifier()?);
        let archived = ArchivedChanges::new(&stores, &cluster, system, size);
        let history = TimelineHistory::root(Timeline::FIRST);
        let gathered = block_on(archived.between(&history, range.clone(), 0))?;
        assert_eq!((gathered.told, gathered.read), (last.number(size)?.as_u64() - first.as_u64() + 1, 0));
        assert!(gathered.map.block_count() > 100, "{} blocks", gathered.map.block_count());
        let name = SegmentName::new(Timeline::FIRST, first, size).to_string();
        let expected = dumped(&primary.server, &primary.wal_path(&name), &primary.wal_path(&last.to_string()))?;
        if let Some(difference) = expected.and_then(|expected| expected.difference(&gathered.map)) {
            bail!("what was written down differs from what pg_waldump says:\n{difference}");
        }
        // The archived WAL itself tells the same.
        for name in segments(&history, size, &range) {
            let told = block_on(archived.told(name))?.with_context(|| format!("{name} tells nothing"))?;
            assert_eq!(told, block_on(archived.read(name))?, "{name}");
        }
        Ok(())
    });
}

#[test]
fn special_records_are_told_one_by_one() -> Result<()> {
    let (scratch, size) = (Scratch::new("special")?, SegmentSize::MIN);
    let mut server = Server::init(&scratch, "special", InitOptions { segment_mebibytes: 1, ..InitOptions::default() })?;
    server.configure(&[
        ("wal_keep_size", "'4GB'"),
        ("max_prepared_transactions", "10"),
        ("checkpoint_timeout", "'1h'"),
        ("autovacuum", "off"),
    ])?;
    server.start()?;
    for space in ["space0", "space1"] {
        server.sql(&format!("create tablespace {space} location '{}'", scratch.directory(space)?.display()))?;
    }
    let directory = scratch.directory("space2")?;
    special::known(&server).try_for_each(|special| special::play(&server, special.before, &directory))?;
    for special in special::known(&server) {
        server.switch_wal()?;
        let before = special::places(&server, special)?;
        let first = SegmentNumber::containing(position(&server)?, size);
        special::play(&server, special.act, &directory).context(special.name)?;
        let after = special::places(&server, special)?;
        server.switch_wal()?;
        let last = SegmentNumber::containing(position(&server)?, size).previous().context("the first segment")?;
        let map = join(first.start(size)..last.end(size), &scan(&server, first, last)?)?;
        special::expect(special, &map, &before, &after)?;
    }
    Ok(())
}

/// A server that did random work, and the WAL of it.
struct Run {
    scratch: Scratch,
    server: Server,
    first: SegmentNumber,
    last: SegmentNumber,
}

impl Run {
    fn new(seed: u64, checksums: Checksums, settings: &[(&str, &str)]) -> Result<Self> {
        let scratch = Scratch::new("changes")?;
        let options = InitOptions { segment_mebibytes: 1, checksums, ..InitOptions::default() };
        let mut server = Server::init(&scratch, "changes", options)?;
        server.configure(&[
            ("wal_keep_size", "'4GB'"),
            ("max_wal_size", "'64MB'"),
            ("max_prepared_transactions", "10"),
            ("checkpoint_timeout", "'30s'"),
            ("autovacuum_naptime", "'1s'"),
        ])?;
        for &(name, value) in settings {
            // 14 knows one way to compress.
            let value = if server.installation().major < 15 && value == "lz4" { "on" } else { value };
            let value = if server.installation().major < 15 && value == "pglz" { "on" } else { value };
            server.configure(&[(name, value)])?;
        }
        if server.installation().major >= 17 {
            server.configure(&[("summarize_wal", "on")])?;
        }
        server.start()?;
        let size = SegmentSize::MIN;
        let spaces = [scratch.directory("space0")?, scratch.directory("space1")?];
        let mut work = Work::new(seed, &server);
        work.prepare(&spaces)?;
        // What is compared are whole segments: one is begun at each end.
        server.switch_wal()?;
        server.sql("checkpoint")?;
        let first = SegmentNumber::containing(position(&server)?, size);
        work.play(STEPS)?;
        work.play_rare()?;
        server.sql("checkpoint")?;
        server.switch_wal()?;
        let last = SegmentNumber::containing(position(&server)?, size).previous().context("the first segment")?;
        Ok(Self { scratch, server, first, last })
    }

    fn compare(&self) -> Result<()> {
        let segments = scan(&self.server, self.first, self.last)?;
        let size = SegmentSize::MIN;
        let range = self.first.start(size)..self.last.end(size);
        let map = join(range.clone(), &segments)?;
        let crossing =
            segments.iter().filter(|segment| segment.tail != postgres_format::wal_changes::Tail::Closed).count();
        let encoded: usize = segments.iter().map(|segment| segment.encode().len()).sum();
        eprintln!(
            "{} segments, {crossing} of them with a record that goes on, {} forks, {} blocks, {} resets, {encoded} bytes encoded, {} of the union",
            segments.len(),
            map.forks().len(),
            map.block_count(),
            map.resets().len(),
            map.encode().len()
        );
        if let Some(difference) = self.dumped()?.and_then(|expected| expected.difference(&map)) {
            bail!("the map differs from what pg_waldump says:\n{difference}");
        }
        assert!(segments.len() > 20 && crossing > segments.len() / 2 && map.resets().len() >= 2);
        assert!(map.forks().filter(|(_, changes)| changes.limit_block().is_some()).count() > 20);
        assert!(map.block_count() > 1000, "{} blocks", map.block_count());
        self.compare_pages(&map, &range)?;
        self.compare_summaries(&map)
    }

    /// Every page that carries an LSN of the range is in the map: what the maps are for.
    fn compare_pages(&self, map: &ChangeMap, range: &Range<Lsn>) -> Result<()> {
        let version = tablespace_version(&self.server)?;
        let (mut pages, mut changed) = (0, 0);
        let mut directories = vec![PathBuf::from("global"), PathBuf::from("base"), PathBuf::from("pg_tblspc")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(self.server.data().join(&directory))? {
                let path = directory.join(entry?.file_name());
                if self.server.data().join(&path).is_dir() {
                    directories.push(path);
                    continue;
                }
                let Some((fork, segment)) = RelationFork::from_path(&path, version) else { continue };
                if fork.fork != Fork::Main {
                    continue;
                }
                for (block, page) in (segment * 131_072..).zip(fs::read(self.server.data().join(&path))?.chunks(8192)) {
                    let half = |at: usize| u64::from(u32::from_le_bytes(*page[at..].first_chunk().unwrap()));
                    pages += 1;
                    // The LSN of a page is where the record ends that changed it.
                    let lsn = Lsn::new(half(0) << 32 | half(4));
                    if range.start < lsn && lsn <= range.end {
                        changed += 1;
                        assert!(map.touches(&fork, block), "block {block} of {} is not in the map", path.display());
                    }
                }
            }
        }
        eprintln!("{changed} of {pages} pages changed");
        assert!(changed > 1000 && changed < pages);
        Ok(())
    }

    /// See [`dumped`].
    fn dumped(&self) -> Result<Option<Dumped>> {
        dumped(&self.server, &segment(&self.server, self.first).1, &segment(&self.server, self.last).1)
    }

    /// Servers from 17 on tell the same in their summaries, and they see nothing that we do not.
    fn compare_summaries(&self, map: &ChangeMap) -> Result<()> {
        if self.server.installation().major < 17 {
            return Ok(());
        }
        let size = SegmentSize::MIN;
        let (from, to) = (self.first.start(size), self.last.end(size));
        self.server.sql("checkpoint")?;
        wait::until("summaries reach the end of the run", DUMP_PATIENCE, || {
            Ok(summaries(&self.server)?.iter().any(|name| name.end >= to))
        })?;
        let within: Vec<SummaryName> =
            summaries(&self.server)?.into_iter().filter(|name| name.start >= from && name.end <= to).collect();
        let ends = within.iter().map(|name| name.start).min().zip(within.iter().map(|name| name.end).max());
        let (start, end) = ends.context("no summary lies within the run")?;
        let covering = cover(&TimelineHistory::root(Timeline::FIRST), &(start..end), &within)?;
        assert!(covering.len() > 1 && covering.len() == within.len(), "{within:?}");
        let mut summarised = ChangeMap::empty();
        for name in covering {
            let file = self.server.data().join("pg_wal/summaries").join(name.to_string());
            summarised.union(&wal_summary::parse(&fs::read(file)?)?);
        }
        let mut both = map.clone();
        both.union(&summarised);
        if both != *map {
            bail!("the summaries tell more:\n{}", difference(map, &both));
        }
        self.compare_pages(&summarised, &(start..end))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if account::environment("KEEP").is_some() {
            self.scratch.keep();
        }
    }
}

/// Names of the summaries that a server has written.
fn summaries(server: &Server) -> Result<Vec<SummaryName>> {
    let entries = fs::read_dir(server.data().join("pg_wal/summaries"))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Name and path of a segment in a server's `pg_wal`.
fn segment(server: &Server, number: SegmentNumber) -> (SegmentName, PathBuf) {
    let name = SegmentName::new(Timeline::FIRST, number, SegmentSize::MIN);
    (name, server.data().join("pg_wal").join(name.to_string()))
}

/// What each segment of a server's `pg_wal` tells, after a round through its encoding.
fn scan(server: &Server, first: SegmentNumber, last: SegmentNumber) -> Result<Vec<SegmentChanges>> {
    let system_identifier = SystemIdentifier::new(server.system_identifier()?);
    let numbers = (first.as_u64()..=last.as_u64()).map(SegmentNumber::new);
    numbers
        .map(|number| {
            let (name, path) = segment(server, number);
            let expected = Expected { name, size: SegmentSize::MIN, system_identifier, partial: false };
            let mut scan = ChangeScan::new(expected);
            for chunk in fs::read(path)?.chunks(PAGE_BYTES * 7) {
                scan.push(chunk)?;
            }
            let (report, changes) = scan.finish()?;
            assert!(report.end.is_complete(), "{name}: {report:?}");
            assert_eq!(changes.doubt, None, "{name}");
            let read = SegmentChanges::decode(&changes.encode())?;
            assert_eq!(read, changes);
            Ok(read)
        })
        .collect()
}

/// What pg_waldump says.
struct Dumped {
    map: ChangeMap,
    /// Relations of lists so long that they are not kept whole where they cross segments; see `wal_changes`.
    long_lists: ChangeMap,
}

impl Dumped {
    fn new() -> Self {
        Self { map: ChangeMap::empty(), long_lists: ChangeMap::empty() }
    }

    /// How our map differs from it.
    fn difference(&self, ours: &ChangeMap) -> Option<String> {
        let with_long_lists = |map: &ChangeMap| {
            let mut all = map.clone();
            all.union(&self.long_lists);
            all
        };
        (with_long_lists(ours) != with_long_lists(&self.map)).then(|| difference(ours, &self.map))
    }
}

/// The map that pg_waldump's text tells of some segments; `None` where the server came without it, since it reads its own
/// major only.
fn dumped(server: &Server, first: &Path, last: &Path) -> Result<Option<Dumped>> {
    let waldump = server.installation().bin.join("pg_waldump");
    if !waldump.exists() {
        return Ok(None);
    }
    let mut dump = account::command(waldump);
    dump.arg(first).arg(last);
    let text = program::run(dump, DUMP_PATIENCE)?.ok()?;
    let version = tablespace_version(server)?;
    let mut dumped = Dumped::new();
    for line in text.lines() {
        note_line(&mut dumped, line, version).with_context(|| line.to_owned())?;
    }
    Ok(Some(dumped))
}

fn tablespace_version(server: &Server) -> Result<TablespaceVersion> {
    let catalog_version = server.number("select catalog_version_no from pg_control_system()")?;
    Ok(TablespaceVersion {
        postgres_major: server.installation().major,
        catalog_version: u32::try_from(catalog_version)?,
    })
}

fn position(server: &Server) -> Result<Lsn> {
    Ok(server.text("select pg_current_wal_insert_lsn()")?.parse()?)
}

/// Notes what one line of pg_waldump says.
fn note_line(dumped: &mut Dumped, line: &str, version: TablespaceVersion) -> Result<()> {
    let Dumped { map, long_lists } = dumped;
    for reference in line.split(", blkref #").skip(1) {
        let words: Vec<&str> = reference.split_whitespace().collect();
        let (at, fork) = match words.as_slice() {
            [_, "rel", relation, "fork", fork, "blk", block, ..] => (format!("{relation} {block}"), *fork),
            [_, "rel", relation, "blk", block, ..] => (format!("{relation} {block}"), "main"),
            _ => bail!("a reference of an unknown form"),
        };
        let numbers = numbers(&at)?;
        let &[tablespace, database, relation, block] = numbers.as_slice() else { bail!("a reference has other parts") };
        let fork = match fork {
            "main" => Fork::Main,
            "fsm" => Fork::FreeSpaceMap,
            "vm" => Fork::VisibilityMap,
            "init" => Fork::Init,
            _ => bail!("an unknown fork"),
        };
        map.mark(RelationFork { tablespace, database, relation, fork }, block);
    }
    let manager = line.strip_prefix("rmgr: ").and_then(|rest| rest.split_whitespace().next()).unwrap_or_default();
    let Some((_, description)) = line.split_once(" desc: ") else { return Ok(()) };
    let (operation, rest) = description.split_once(' ').unwrap_or((description, ""));
    match (manager, operation) {
        ("Storage", "CREATE") => map.cut(fork_at(rest, version)?, 0),
        ("Storage", "TRUNCATE") => {
            let (path, rest) = rest.split_once(" to ").context("no length")?;
            let (blocks, flags) = rest.split_once(" blocks flags ").context("no flags")?;
            if flags.trim().parse::<u32>()? & 1 != 0 {
                map.cut(fork_at(path, version)?, blocks.parse()?);
            }
        }
        ("Database", "CREATE_FILE_COPY" | "CREATE") => reset(map, rest.split_once(" to ").context("no target")?.1)?,
        ("Database", "CREATE_WAL_LOG") => reset(map, rest.trim_start_matches("create dir "))?,
        ("Database", "DROP") => {
            for directory in rest.trim_start_matches("dir ").split_whitespace() {
                reset(map, directory)?;
            }
        }
        ("Transaction", "COMMIT" | "ABORT" | "COMMIT_PREPARED" | "ABORT_PREPARED") => {
            let dropped = rest.split("; ").find_map(|part| part.strip_prefix("rels: ")).unwrap_or_default();
            let is_long = dropped.split_whitespace().count() > SHORT_LIST_MAX;
            for path in dropped.split_whitespace() {
                let main = fork_at(path, version)?;
                for fork in [main, RelationFork { fork: Fork::Init, ..main }] {
                    map.cut(fork, 0);
                    if is_long {
                        long_lists.cut(fork, 0);
                    }
                }
            }
        }
        _ => {}
    }
    Ok(())
}

fn numbers(text: &str) -> Result<Vec<u32>> {
    text.split(|letter: char| !letter.is_ascii_digit())
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().with_context(|| text.to_owned()))
        .collect()
}

fn fork_at(path: &str, version: TablespaceVersion) -> Result<RelationFork> {
    let path = path.trim().trim_end_matches(';');
    let (fork, segment) =
        RelationFork::from_path(path.as_ref(), version).with_context(|| format!("{path} is no fork"))?;
    assert_eq!((segment, fork.to_path(version)), (0, PathBuf::from(path)));
    Ok(fork)
}

fn reset(map: &mut ChangeMap, directory: &str) -> Result<()> {
    match numbers(directory)?.as_slice() {
        // The dump's order has changed over time; tablespaces have small numbers or those of the test's own.
        &[tablespace, database] => map.reset(DatabaseDirectory { tablespace, database }),
        _ => bail!("{directory} is no directory"),
    }
    Ok(())
}

/// What one map has that the other has not, a few lines of it.
fn difference(ours: &ChangeMap, theirs: &ChangeMap) -> String {
    let mut text = String::new();
    let mut one_way = |what: &str, one: &ChangeMap, other: &ChangeMap| {
        for directory in one.resets().filter(|directory| !other.is_reset(**directory)) {
            writeln!(text, "{what}: reset of {directory:?}").unwrap();
        }
        for (fork, changes) in one.forks().filter(|(fork, changes)| other.fork(fork) != Some(changes)).take(20) {
            let listed = other.fork(fork).map(|other| changes.blocks() - other.blocks());
            let other = other.fork(fork).map(|other| other.limit_block());
            writeln!(
                text,
                "{what}: {fork:?} limit {:?}, there {other:?}, blocks not there {listed:?}",
                changes.limit_block()
            )
            .unwrap();
        }
    };
    one_way("ours alone", ours, theirs);
    one_way("theirs alone", theirs, ours);
    text
}
