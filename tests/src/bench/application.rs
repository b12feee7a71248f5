//! A cluster as applications have them: random keys, a document a row, indexes on the side. Its pages compress three to
//! one, pgbench's nineteen to one.

use anyhow::Result;

use crate::account::Scratch;
use crate::postgres::{InitOptions, Server};

/// Rows of its only table, about 700 MB with its indexes.
pub const DOCUMENTS: u32 = 500_000;

/// A running server that archives to nowhere.
pub fn start(scratch: &Scratch) -> Result<Server> {
    let mut server = Server::init(scratch, "app", InitOptions::default())?;
    server.configure(&[
        ("shared_buffers", "'512MB'"),
        ("max_wal_size", "'4GB'"),
        ("autovacuum", "off"),
        ("archive_mode", "on"),
        ("archive_command", "'/bin/true'"),
    ])?;
    server.start()?;
    server.sql(&format!(
        "create table documents (
             id uuid primary key default gen_random_uuid(), number int not null, owner uuid not null,
             changed timestamptz not null, body jsonb not null);
         insert into documents (number, owner, changed, body)
             select i, gen_random_uuid(), now(), jsonb_build_object('visits', i, 'name', md5(i::text),
                 'notes', (select jsonb_agg(md5(random()::text)) from generate_series(1, 20 + i % 2)))
             from generate_series(1, {DOCUMENTS}) i;
         create unique index on documents (number);
         create index on documents (owner);
         create index on documents (changed)"
    ))?;
    server.sql("vacuum (freeze, analyze) documents")?;
    Ok(server)
}
