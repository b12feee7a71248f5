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
use postgres_format::wal_summary::{self, SummaryName};
use postgres_format::{Lsn, SegmentName, SegmentNumber, SegmentSize, SystemIdentifier, Timeline};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use repository::config::DirectoryConfig;
use repository::store::ObjectStore;
use repository::stores::directory::DirectoryStore;
use repository::wal::{ArchivedChanges, segments};
use tests::account::{self, Scratch};
use tests::postgres::{Checksums, InitOptions, Server};
use tests::runtime::block_on;
use tests::world::{CLUSTER, Stores, World};
use tests::{program, scenario, wait};

/// Statements of one run. More of them make the same kinds of records again.
const STEPS: usize = 130;
/// Longest run of pg_waldump over all of it.
const DUMP_PATIENCE: Duration = Duration::from_secs(120);
/// Between statements that are sent one by one.
const ALONE: &str = ";;";
/// How many segments pgbench fills at least.
const PGBENCH_SEGMENTS: u64 = 12;
/// Tables that a run works on, each with another set of indexes.
const TABLES: u32 = 9;
/// As many of them are never rewritten.
const KEPT: u32 = 6;

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
        if let Some(expected) = expected.filter(|expected| *expected != gathered.map) {
            bail!("what was written down differs from what pg_waldump says:\n{}", difference(&gathered.map, &expected));
        }
        // The archived WAL itself tells the same.
        for name in segments(&history, size, &range) {
            let told = block_on(archived.told(name))?.with_context(|| format!("{name} tells nothing"))?;
            assert_eq!(told, block_on(archived.read(name))?, "{name}");
        }
        Ok(())
    });
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
        let mut work = Work { random: StdRng::seed_from_u64(seed), server: &server, databases: Vec::new(), next: 0 };
        work.prepare(&spaces)?;
        // What is compared are whole segments: one is begun at each end.
        server.switch_wal()?;
        server.sql("checkpoint")?;
        let first = SegmentNumber::containing(position(&server)?, size);
        work.play()?;
        server.sql("checkpoint")?;
        server.switch_wal()?;
        let last = SegmentNumber::containing(position(&server)?, size).previous().context("the first segment")?;
        Ok(Self { scratch, server, first, last })
    }

    fn compare(&self) -> Result<()> {
        let segments = self.scan()?;
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
        if let Some(expected) = self.dumped()?.filter(|expected| *expected != map) {
            bail!("the map differs from what pg_waldump says:\n{}", difference(&map, &expected));
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
                    if range.contains(&Lsn::new(half(0) << 32 | half(4))) {
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

    fn segment(&self, number: SegmentNumber) -> (SegmentName, PathBuf) {
        let name = SegmentName::new(Timeline::FIRST, number, SegmentSize::MIN);
        (name, self.server.data().join("pg_wal").join(name.to_string()))
    }

    fn numbers(&self) -> impl Iterator<Item = SegmentNumber> {
        (self.first.as_u64()..=self.last.as_u64()).map(SegmentNumber::new)
    }

    /// What each segment tells, after a round through its encoding.
    fn scan(&self) -> Result<Vec<SegmentChanges>> {
        let system_identifier = SystemIdentifier::new(self.server.system_identifier()?);
        self.numbers()
            .map(|number| {
                let (name, path) = self.segment(number);
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

    /// See [`dumped`].
    fn dumped(&self) -> Result<Option<ChangeMap>> {
        dumped(&self.server, &self.segment(self.first).1, &self.segment(self.last).1)
    }

    /// Servers from 17 on tell the same in their summaries, and they see nothing that we do not.
    fn compare_summaries(&self, map: &ChangeMap) -> Result<()> {
        if self.server.installation().major < 17 {
            return Ok(());
        }
        let size = SegmentSize::MIN;
        let (from, to) = (self.first.start(size), self.last.end(size));
        let directory = self.server.data().join("pg_wal/summaries");
        let names = || -> Result<Vec<SummaryName>> {
            let names = fs::read_dir(&directory)?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
            Ok(names.collect())
        };
        self.server.sql("checkpoint")?;
        wait::until("summaries reach the end of the run", DUMP_PATIENCE, || {
            Ok(names()?.iter().any(|name| name.end >= to))
        })?;
        let mut summarised = ChangeMap::empty();
        let mut ours = 0;
        for name in names()?.into_iter().filter(|name| name.start >= from && name.end <= to) {
            let file =
                format!("{:08X}{:016X}{:016X}.summary", name.timeline.get(), name.start.as_u64(), name.end.as_u64());
            summarised.union(&wal_summary::parse(&fs::read(directory.join(file))?)?);
            ours += 1;
        }
        assert!(ours > 1, "no summary lies within the run");
        let mut both = map.clone();
        both.union(&summarised);
        if both != *map {
            bail!("the summaries tell more:\n{}", difference(map, &both));
        }
        Ok(())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if account::environment("KEEP").is_some() {
            self.scratch.keep();
        }
    }
}

/// The map that pg_waldump's text tells of some segments; `None` where the server came without it, since it reads its own
/// major only.
fn dumped(server: &Server, first: &Path, last: &Path) -> Result<Option<ChangeMap>> {
    let waldump = server.installation().bin.join("pg_waldump");
    if !waldump.exists() {
        return Ok(None);
    }
    let mut dump = account::command(waldump);
    dump.arg(first).arg(last);
    let text = program::run(dump, DUMP_PATIENCE)?.ok()?;
    let version = tablespace_version(server)?;
    let mut map = ChangeMap::empty();
    for line in text.lines() {
        note_line(&mut map, line, version).with_context(|| line.to_owned())?;
    }
    Ok(Some(map))
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
fn note_line(map: &mut ChangeMap, line: &str, version: TablespaceVersion) -> Result<()> {
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
            let dropped = rest.split("; ").find_map(|part| part.strip_prefix("rels: "));
            for path in dropped.unwrap_or_default().split_whitespace() {
                let main = fork_at(path, version)?;
                map.cut(main, 0);
                map.cut(RelationFork { fork: Fork::Init, ..main }, 0);
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

/// Random work.
struct Work<'a> {
    random: StdRng,
    server: &'a Server,
    databases: Vec<String>,
    next: u32,
}

impl Work<'_> {
    /// What is there before the work that is compared.
    fn prepare(&mut self, spaces: &[PathBuf]) -> Result<()> {
        for (number, space) in spaces.iter().enumerate() {
            self.server.sql(&format!("create tablespace space{number} location '{}'", space.display()))?;
        }
        self.server.sql("create sequence numbers; create extension if not exists bloom")?;
        for table in 0..TABLES {
            self.make(table)?;
        }
        Ok(())
    }

    fn play(&mut self) -> Result<()> {
        for _ in 0..STEPS {
            // Some statements must be alone in what is sent.
            for statement in self.statement().split(ALONE) {
                self.server.sql(statement)?;
            }
        }
        // Each kind that a random run may miss.
        for statement in [
            &format!("create database logged {}", self.strategy("wal_log")),
            &format!("create database copied {}", self.strategy("file_copy")),
            "alter database copied set tablespace space1",
            "drop database logged",
            "select pg_logical_emit_message(false, 'test', repeat('x', 2500000))",
            "create table kept (n int) tablespace space0; insert into kept select generate_series(1, 9); alter table kept set tablespace space1",
        ] {
            self.server.sql(statement)?;
        }
        Ok(())
    }

    fn make(&mut self, table: u32) -> Result<()> {
        let text = format!(
            "create table t{table} (id int, n int, v text, w text, a int[], p point);
             create index t{table}_{} on t{table} using {};
             create index t{table}_{} on t{table} using {}",
            table,
            ["btree (id)", "btree (v, n)", "gist (p)", "brin (id)", "bloom (n, id)", "spgist (v)"][table as usize % 6],
            table + 100,
            [
                "gin (a)",
                "hash (n)",
                "hash (v)",
                "spgist (p)",
                "btree (left(w, 100))",
                "gin (a) with (fastupdate = off)"
            ][table as usize % 6],
        );
        self.server.sql(&text)?;
        self.server.sql(&format!("insert into t{table} {}", Self::rows(0, 5000, 100))).map(|_| ())
    }

    fn random_rows(&mut self) -> String {
        let (from, count) =
            (self.random.random_range(0..100_000), *[1, 10, 300, 3000].choose(&mut self.random).unwrap());
        let width = *[10, 200, 3000].choose(&mut self.random).unwrap();
        let count = if width > 1000 { count / 10 + 1 } else { count };
        Self::rows(from, count, width)
    }

    /// Rows for a table; md5 does not compress, so wide ones are stored apart.
    fn rows(from: u32, count: u32, width: u32) -> String {
        format!(
            "select i, i * 7 % 1000, md5(i::text), (select string_agg(md5((i * k)::text), '') from generate_series(1, {}) k),
             array[i % 50, i % 77, i], point(i % 313, i % 199) from generate_series({from}, {}) i",
            width / 32,
            from + count
        )
    }

    fn statement(&mut self) -> String {
        let table = self.random.random_range(0..TABLES);
        let part = self.random.random_range(2..40);
        // The first tables keep their files, so that there are blocks to be listed; the others are made anew now and then.
        let rewritten = self.random.random_range(KEPT..TABLES);
        let rows = self.random_rows();
        self.next += 1;
        let next = self.next;
        match self.random.random_range(0..34) {
            0..=6 => format!("insert into t{table} {rows}"),
            7..=9 => format!("update t{table} set n = n + 1, w = w || 'x' where id % {part} = 0"),
            10 => format!("update t{table} set a = a || 7, p = point(id % 7, n), v = v || 'y' where id % {part} = 1"),
            11 | 12 => format!("delete from t{table} where id % {part} = 2"),
            13 => format!("vacuum t{table}"),
            14 => format!("delete from t{table} where ctid > '({part},1)'; select 1"),
            15 => format!("vacuum (analyze, truncate) t{table}"),
            16 => format!("vacuum full t{rewritten}"),
            17 => "checkpoint".to_owned(),
            18 => format!("begin; insert into t{table} {rows}; rollback"),
            19 => format!(
                "begin; savepoint a; create table x{next} as {rows}; rollback to a; create table y{next} as {rows};
                 savepoint b; drop table y{next}; truncate t{table}; rollback to b; commit; drop table y{next}"
            ),
            20 => format!("begin; truncate t{rewritten}; insert into t{table} {rows}; {}", self.ending()),
            21 => format!("select count(nextval('numbers')) from generate_series(1, {})", part * 20),
            22 => format!("reindex table t{rewritten}"),
            23 => {
                let space = *["space0", "space1", "pg_default"].choose(&mut self.random).unwrap();
                format!("alter table t{rewritten} set tablespace {space}")
            }
            24 => format!(
                "create unlogged table u{next} as {rows}; alter table u{next} set logged; alter table u{next} set unlogged"
            ),
            25 => format!("cluster t6 using t6_6; analyze t{table}"),
            26 => {
                format!(
                    "begin; create table z{next} as {rows}; insert into t{table} {rows}; prepare transaction 'p{next}'"
                ) + &format!("{ALONE}{} prepared 'p{next}'", *["commit", "rollback"].choose(&mut self.random).unwrap())
            }
            27 => format!(
                "create schema s{next}; do $$ begin for i in 1..{part} loop
                 execute format('create table s{next}.t%s (a int primary key, b text)', i); end loop; end $$;
                 drop schema s{next} cascade"
            ),
            28 => format!(
                "do $$ begin for i in 1..{part} loop begin insert into t{table} values (i, i, 'sub', 'sub', null, null);
                 if i % 3 = 0 then raise exception 'x'; end if; exception when others then null; end; end loop; end $$"
            ),
            29 => self.database(),
            30 => format!("select pg_logical_emit_message({}, 'test', repeat('y', {}))", part % 2 == 0, part * 30_000),
            31 => format!(
                "create materialized view m{next} as {rows}; refresh materialized view m{next}; drop materialized view m{next}"
            ),
            32 => format!(
                "create table b{next} (n int) with (fillfactor = 20); insert into b{next} select generate_series(1, 5000); select pg_switch_wal()"
            ),
            _ => format!("select count(*), max(w) from t{table}"),
        }
    }

    /// 14 knows one way to make a database, by copying files.
    fn strategy(&self, way: &str) -> String {
        if self.server.installation().major >= 15 { format!("strategy {way}") } else { String::new() }
    }

    fn ending(&mut self) -> &'static str {
        ["commit", "rollback"].choose(&mut self.random).unwrap()
    }

    fn database(&mut self) -> String {
        match self.databases.pop() {
            Some(name) if self.random.random_bool(0.5) => format!("drop database {name}"),
            Some(name) => {
                self.databases.push(name.clone());
                format!("alter database {name} set tablespace {}", ["space0", "space1"][self.random.random_range(0..2)])
            }
            None => {
                let name = format!("d{}", self.next);
                self.databases.push(name.clone());
                let way = ["wal_log", "file_copy"][self.random.random_range(0..2)];
                format!("create database {name} {}", self.strategy(way))
            }
        }
    }
}
