//! Statements that change relation files otherwise than block by block, or in blocks of special pages: one by one, with
//! what a change map must say of each. They are played where maps are looked at, and where increments are restored.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use postgres_format::relation::{Fork, RelationFork};
use postgres_format::wal_changes::ChangeMap;

use crate::postgres::Server;
use crate::work::strategy;

/// Statements and what a map says of them.
#[derive(Debug, Clone, Copy)]
pub struct Special {
    /// What it is.
    pub name: &'static str,
    /// First major version that knows it.
    pub since_major: u32,
    /// Statements that make what is changed.
    pub before: &'static [&'static str],
    /// Statements that change it.
    pub act: &'static [&'static str],
    /// What a map of their WAL says, of relations and databases by name.
    pub told: &'static [Told],
}

/// What a map says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// The relation's file is a new one.
    Made(&'static str),
    /// The relation's init fork is a new one.
    MadeInit(&'static str),
    /// The file that the relation had before is gone.
    GivenUp(&'static str),
    /// The file was cut at the relation's length.
    Cut(&'static str),
    /// Blocks of the file changed, and it was not cut.
    Blocks(&'static str),
    /// Nothing of the relation's main fork.
    Untouched(&'static str),
    /// The database's directory, where it is now, is a new one.
    DatabaseMade(&'static str),
    /// The database's directory, where it was before, is gone.
    DatabaseGone(&'static str),
    /// No directory was made or dropped.
    NoDirectory,
}

use Told::{Blocks, Cut, DatabaseGone, DatabaseMade, GivenUp, Made, MadeInit, NoDirectory, Untouched};

/// Stands for a directory of the server's account that is empty.
const DIRECTORY: &str = "$DIRECTORY";
/// Rows for index pages of every kind.
const ROWS: &str = "$ROWS";
const ROWS_TEXT: &str = "select i, md5(i::text) m, array[i % 50, i] a, point(i % 313, i % 199) p";

/// What any major version of PostgreSQL writes, and a few that only some do. Two tablespaces, `space0` and `space1`, are
/// there before.
pub const ALL: &[Special] = &[
    Special {
        name: "smgr create",
        before: &[],
        act: &["create table sp_made as select i from generate_series(1, 1000) i"],
        told: &[Made("sp_made"), NoDirectory],
        ..NONE
    },
    Special {
        name: "smgr truncate",
        before: &[
            "create table sp_cut as select i, repeat('x', 100) t from generate_series(1, 3000) i",
            "vacuum sp_cut",
        ],
        act: &["delete from sp_cut where i > 500", "vacuum sp_cut"],
        told: &[Cut("sp_cut"), NoDirectory],
        ..NONE
    },
    Special {
        name: "smgr truncate of what the transaction made",
        before: &[],
        act: &["begin; create table sp_emptied (i int); insert into sp_emptied select generate_series(1, 5000);
                truncate sp_emptied; insert into sp_emptied select generate_series(1, 10); commit"],
        told: &[Made("sp_emptied")],
        ..NONE
    },
    Special {
        name: "drop",
        before: &["create table sp_dropped as select i from generate_series(1, 1000) i"],
        act: &["drop table sp_dropped"],
        told: &[GivenUp("sp_dropped"), NoDirectory],
        ..NONE
    },
    Special {
        name: "drop by a prepared transaction",
        before: &["create table sp_prepared as select i from generate_series(1, 1000) i"],
        act: &["begin; drop table sp_prepared; prepare transaction 'special'", "commit prepared 'special'"],
        told: &[GivenUp("sp_prepared")],
        ..NONE
    },
    Special {
        name: "new file: truncate",
        before: &["create table sp_truncated as select i from generate_series(1, 1000) i"],
        act: &["truncate sp_truncated", "insert into sp_truncated values (1)"],
        told: &[GivenUp("sp_truncated"), Made("sp_truncated"), NoDirectory],
        ..NONE
    },
    Special {
        name: "new file: vacuum full",
        before: &["create table sp_rewritten as select i, repeat('x', 90) t from generate_series(1, 3000) i"],
        act: &["delete from sp_rewritten where i % 3 = 0", "vacuum full sp_rewritten"],
        told: &[GivenUp("sp_rewritten"), Made("sp_rewritten")],
        ..NONE
    },
    Special {
        name: "new file: cluster",
        before: &[
            "create table sp_sorted as select i, md5(i::text) m from generate_series(1, 3000) i",
            "create index sp_sorted_m on sp_sorted (m)",
        ],
        act: &["cluster sp_sorted using sp_sorted_m"],
        told: &[GivenUp("sp_sorted"), Made("sp_sorted"), GivenUp("sp_sorted_m"), Made("sp_sorted_m")],
        ..NONE
    },
    Special {
        name: "new file: reindex",
        before: &[
            "create table sp_indexed (i int primary key)",
            "insert into sp_indexed select generate_series(1, 3000)",
        ],
        act: &["reindex table sp_indexed"],
        told: &[GivenUp("sp_indexed_pkey"), Made("sp_indexed_pkey")],
        ..NONE
    },
    Special {
        name: "new file: another tablespace",
        before: &["create table sp_moved as select i from generate_series(1, 3000) i"],
        act: &["alter table sp_moved set tablespace space0"],
        told: &[GivenUp("sp_moved"), Made("sp_moved"), NoDirectory],
        ..NONE
    },
    Special {
        name: "new file: set logged",
        before: &["create unlogged table sp_logged as select i from generate_series(1, 3000) i"],
        act: &["alter table sp_logged set logged"],
        told: &[GivenUp("sp_logged"), Made("sp_logged")],
        ..NONE
    },
    Special {
        name: "new file: set unlogged",
        before: &["create table sp_unlogged as select i from generate_series(1, 3000) i"],
        act: &["alter table sp_unlogged set unlogged"],
        told: &[GivenUp("sp_unlogged"), MadeInit("sp_unlogged")],
        ..NONE
    },
    Special {
        name: "new file: a mapped catalog",
        before: &[],
        act: &["vacuum full pg_class"],
        told: &[GivenUp("pg_class"), Made("pg_class")],
        ..NONE
    },
    Special {
        name: "unlogged table",
        before: &["create unlogged table sp_passing as select i from generate_series(1, 1000) i"],
        act: &["insert into sp_passing select generate_series(1, 5000)", "checkpoint"],
        told: &[Untouched("sp_passing"), NoDirectory],
        ..NONE
    },
    Special {
        name: "maps of free space and visibility",
        before: &[
            "create table sp_mapped as select i, repeat('x', 90) t from generate_series(1, 9000) i",
            "vacuum (freeze) sp_mapped",
        ],
        act: &["update sp_mapped set t = 'y' where i < 50", "vacuum sp_mapped", "delete from sp_mapped where i = 4000"],
        told: &[Blocks("sp_mapped")],
        ..NONE
    },
    Special {
        name: "sequence",
        before: &["create sequence sp_counter"],
        act: &["select count(nextval('sp_counter')) from generate_series(1, 50)"],
        told: &[Blocks("sp_counter")],
        ..NONE
    },
    Special {
        name: "hash index",
        before: &[
            "create table sp_hash as $ROWS from generate_series(1, 3000) i",
            "create index sp_hash_i on sp_hash using hash (m)",
        ],
        act: &[
            "insert into sp_hash $ROWS from generate_series(3001, 9000) i",
            "delete from sp_hash where i % 7 = 0",
            "vacuum sp_hash",
        ],
        told: &[Blocks("sp_hash_i"), Blocks("sp_hash")],
        ..NONE
    },
    Special {
        name: "gin index",
        before: &[
            "create table sp_gin as $ROWS from generate_series(1, 3000) i",
            "create index sp_gin_i on sp_gin using gin (a)",
        ],
        act: &[
            "insert into sp_gin $ROWS from generate_series(3001, 6000) i",
            "delete from sp_gin where i % 7 = 0",
            "vacuum sp_gin",
        ],
        told: &[Blocks("sp_gin_i")],
        ..NONE
    },
    Special {
        name: "gist index",
        before: &[
            "create table sp_gist as $ROWS from generate_series(1, 3000) i",
            "create index sp_gist_i on sp_gist using gist (p)",
        ],
        act: &[
            "insert into sp_gist $ROWS from generate_series(3001, 6000) i",
            "delete from sp_gist where i % 7 = 0",
            "vacuum sp_gist",
        ],
        told: &[Blocks("sp_gist_i")],
        ..NONE
    },
    Special {
        name: "brin index",
        before: &[
            "create table sp_brin as $ROWS from generate_series(1, 3000) i",
            "create index sp_brin_i on sp_brin using brin (i) with (pages_per_range = 2)",
        ],
        act: &[
            "insert into sp_brin $ROWS from generate_series(3001, 6000) i",
            "select brin_summarize_new_values('sp_brin_i')",
        ],
        told: &[Blocks("sp_brin_i")],
        ..NONE
    },
    Special {
        name: "spgist index",
        before: &[
            "create table sp_spgist as $ROWS from generate_series(1, 3000) i",
            "create index sp_spgist_i on sp_spgist using spgist (m)",
        ],
        act: &[
            "insert into sp_spgist $ROWS from generate_series(3001, 6000) i",
            "delete from sp_spgist where i % 7 = 0",
            "vacuum sp_spgist",
        ],
        told: &[Blocks("sp_spgist_i")],
        ..NONE
    },
    Special {
        name: "create database by copying files",
        before: &["create database sp_pattern"],
        act: &["create database sp_copied template sp_pattern $FILE_COPY"],
        told: &[DatabaseMade("sp_copied")],
        ..NONE
    },
    Special {
        name: "create database through WAL",
        since_major: 15,
        before: &[],
        act: &["create database sp_through strategy wal_log"],
        told: &[DatabaseMade("sp_through")],
    },
    Special {
        name: "drop database",
        before: &["create database sp_gone"],
        act: &["drop database sp_gone"],
        told: &[DatabaseGone("sp_gone")],
        ..NONE
    },
    Special {
        name: "another tablespace of a database",
        before: &["create database sp_mover"],
        act: &["alter database sp_mover set tablespace space1"],
        told: &[DatabaseGone("sp_mover"), DatabaseMade("sp_mover")],
        ..NONE
    },
    Special {
        name: "create and drop tablespace",
        before: &[],
        act: &[
            "create tablespace sp_space location '$DIRECTORY'",
            "create table sp_there tablespace sp_space as select i from generate_series(1, 100) i",
            "alter table sp_there set tablespace pg_default",
            "drop tablespace sp_space",
        ],
        told: &[Made("sp_there"), NoDirectory],
        ..NONE
    },
];

const NONE: Special = Special { name: "", since_major: 14, before: &[], act: &[], told: &[] };

/// Those that a server knows.
pub fn known(server: &Server) -> impl Iterator<Item = &'static Special> {
    let major = server.installation().major;
    ALL.iter().filter(move |special| special.since_major <= major)
}

/// Plays statements of one; `directory` is an empty one of the server's account.
pub fn play(server: &Server, statements: &[&str], directory: &Path) -> Result<()> {
    for statement in statements {
        let statement = statement
            .replace(ROWS, ROWS_TEXT)
            .replace("$FILE_COPY", &strategy(server, "file_copy"))
            .replace(DIRECTORY, &directory.display().to_string());
        server.sql(&statement)?;
    }
    Ok(())
}

/// Where what one names lies at a moment, in the order of what is told; `None` where there is no such thing.
pub fn places(server: &Server, special: &Special) -> Result<Vec<Option<Place>>> {
    special.told.iter().map(|told| place(server, *told)).collect()
}

/// Where a relation or a database lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    fork: RelationFork,
    blocks: u32,
}

fn place(server: &Server, told: Told) -> Result<Option<Place>> {
    let statement = match told {
        Made(name) | MadeInit(name) | GivenUp(name) | Cut(name) | Blocks(name) | Untouched(name) => format!(
            "select coalesce(nullif(c.reltablespace, 0), d.dattablespace), d.oid, pg_relation_filenode(c.oid),
                    pg_relation_size(c.oid) / 8192
             from pg_class c, pg_database d where c.relname = '{name}' and d.datname = current_database()"
        ),
        DatabaseMade(name) | DatabaseGone(name) => {
            format!("select dattablespace, oid, 1, 0 from pg_database where datname = '{name}'")
        }
        NoDirectory => return Ok(None),
    };
    let Some(row) = server.sql(&statement)?.into_iter().next() else { return Ok(None) };
    let numbers: Vec<u32> = row.iter().map(|text| text.parse()).collect::<Result<_, _>>().context("no numbers")?;
    let &[tablespace, database, relation, blocks] = numbers.as_slice() else { return Ok(None) };
    Ok(Some(Place { fork: RelationFork { tablespace, database, relation, fork: Fork::Main }, blocks }))
}

/// Fails unless a map says of one what it must, given where all lay before and lies after.
pub fn expect(special: &Special, map: &ChangeMap, before: &[Option<Place>], after: &[Option<Place>]) -> Result<()> {
    for (told, (before, after)) in special.told.iter().zip(before.iter().zip(after)) {
        let said = says(map, *told, *before, *after).with_context(|| format!("{}: {told:?}", special.name))?;
        ensure!(said, "{}: the map does not say {told:?}; before {before:?}, after {after:?}", special.name);
    }
    let strange = map.forks().find(|(fork, _)| !matches!(fork.fork, Fork::Main | Fork::Init));
    ensure!(strange.is_none(), "{}: the map tells of {strange:?}, which is read whole", special.name);
    Ok(())
}

fn says(map: &ChangeMap, told: Told, before: Option<Place>, after: Option<Place>) -> Result<bool> {
    let before_or = || before.context("it was not there before");
    let after_or = || after.context("it is not there");
    let limit = |fork: RelationFork| map.fork(&fork).and_then(|changes| changes.limit_block());
    Ok(match told {
        Made(_) => limit(after_or()?.fork) == Some(0),
        MadeInit(_) => limit(RelationFork { fork: Fork::Init, ..after_or()?.fork }) == Some(0),
        GivenUp(_) => {
            let fork = before_or()?.fork;
            limit(fork) == Some(0) && after.is_none_or(|after| after.fork != fork)
        }
        Cut(_) => {
            let (before, after) = (before_or()?, after_or()?);
            before.fork == after.fork && after.blocks < before.blocks && limit(after.fork) == Some(after.blocks)
        }
        Blocks(_) => {
            let (before, after) = (before_or()?, after_or()?);
            let listed = map.fork(&after.fork).is_some_and(|changes| !changes.blocks().is_empty());
            before.fork == after.fork && listed && limit(after.fork).is_none()
        }
        Untouched(_) => map.fork(&after_or()?.fork).is_none(),
        DatabaseMade(_) => map.is_reset(after_or()?.fork.directory()),
        DatabaseGone(_) => {
            let gone = before_or()?.fork.directory();
            map.is_reset(gone) && after.is_none_or(|after| after.fork.directory() != gone)
        }
        NoDirectory => map.resets().next().is_none(),
    })
}
