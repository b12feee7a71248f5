//! Random work that writes every kind of WAL record there is: rows of all sizes in tables with all kinds of indexes,
//! rewrites, subtransactions, prepared transactions, databases and tables that come, move and go.

use std::path::PathBuf;

use anyhow::Result;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::postgres::Server;

/// Between statements that are sent one by one.
const ALONE: &str = ";;";
/// Tables that a run works on, each with another set of indexes.
const TABLES: u32 = 9;
/// As many of them are never rewritten.
const KEPT: u32 = 6;

/// Random work on one server, the same for the same seed.
#[derive(Debug)]
pub struct Work<'a> {
    random: StdRng,
    server: &'a Server,
    databases: Vec<String>,
    next: u32,
}

impl<'a> Work<'a> {
    /// None yet.
    pub fn new(seed: u64, server: &'a Server) -> Self {
        Self { random: StdRng::seed_from_u64(seed), server, databases: Vec::new(), next: 0 }
    }

    /// What is there before the work: two tablespaces, tables with indexes of every kind.
    pub fn prepare(&mut self, spaces: &[PathBuf; 2]) -> Result<()> {
        for (number, space) in spaces.iter().enumerate() {
            self.server.sql(&format!("create tablespace space{number} location '{}'", space.display()))?;
        }
        self.server.sql("create sequence numbers; create extension if not exists bloom")?;
        for table in 0..TABLES {
            self.make(table)?;
        }
        Ok(())
    }

    /// Plays so many statements, or a few more.
    pub fn play(&mut self, steps: usize) -> Result<()> {
        for _ in 0..steps {
            // Some statements must be alone in what is sent.
            for statement in self.statement().split(ALONE) {
                self.server.sql(statement)?;
            }
        }
        Ok(())
    }

    /// Each kind that a random run may miss; once a server.
    pub fn play_rare(&self) -> Result<()> {
        for statement in [
            &format!("create database logged {}", strategy(self.server, "wal_log")),
            &format!("create database copied {}", strategy(self.server, "file_copy")),
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

    /// One of several, which are not none.
    fn one_of<T: Copy>(&mut self, several: &[T]) -> T {
        several[self.random.random_range(0..several.len())]
    }

    fn random_rows(&mut self) -> String {
        let (from, count) = (self.random.random_range(0..100_000), self.one_of(&[1, 10, 300, 3000]));
        let width = self.one_of(&[10, 200, 3000]);
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
                let space = self.one_of(&["space0", "space1", "pg_default"]);
                format!("alter table t{rewritten} set tablespace {space}")
            }
            24 => format!(
                "create unlogged table u{next} as {rows}; alter table u{next} set logged; alter table u{next} set unlogged"
            ),
            25 => format!("cluster t6 using t6_6; analyze t{table}"),
            26 => {
                format!(
                    "begin; create table z{next} as {rows}; insert into t{table} {rows}; prepare transaction 'p{next}'"
                ) + &format!("{ALONE}{} prepared 'p{next}'", self.one_of(&["commit", "rollback"]))
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

    fn ending(&mut self) -> &'static str {
        self.one_of(&["commit", "rollback"])
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
                format!("create database {name} {}", strategy(self.server, way))
            }
        }
    }
}

/// The words that choose how a database is made; 14 knows one way, by copying files.
pub fn strategy(server: &Server, way: &str) -> String {
    if server.installation().major >= 15 { format!("strategy {way}") } else { String::new() }
}
