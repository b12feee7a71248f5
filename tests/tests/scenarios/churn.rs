//! Files that vanish, shrink, grow and are made while a backup reads them, at a pace that is changed on the way.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::world::{CLUSTER, Stores, World};
use tests::{scenario, wait};

use crate::SMALL;
use crate::increment::{Taken, dump, expect, expect_restorable, expect_restorable_to, take};

/// Tables of each kind: wherever the readers are, some are read already and some are not.
const TABLES: u32 = 12;
const SLOW: &str = "3MiB";
const SLOW_BYTES: u64 = 3 << 20;
/// What may be read at once besides, twice: when the backup begins and when it was last told of.
const SLACK: Duration = Duration::from_secs(2);

/// The newest operation.
fn operation(world: &World) -> Result<Value> {
    let listed = world.operator.json(&["operations", CLUSTER])?;
    listed["operations"].get(0).cloned().context("no operation")
}

fn bytes_done(world: &World) -> Result<u64> {
    Ok(operation(world)?["bytes_done"].as_u64().unwrap_or(0))
}

/// One statement for each table of a kind.
fn of_each(verb: &str) -> String {
    let statements = (1..=TABLES).map(|number| verb.replace('#', &number.to_string()));
    statements.collect::<Vec<_>>().join("; ")
}

#[test]
fn files_that_vanish_shrink_and_grow_under_a_backup_come_back_as_they_became() {
    scenario::play("churn", |stage| {
        let world = World::started(&stage.scratch, Stores::Directory)?;
        let primary = world.primary(&stage.scratch, "db1", SMALL)?;
        let server = &primary.server;
        for kind in ["dropped", "truncated", "shrunken", "grown", "moved"] {
            let text = "as select i, md5(i::text) as text from generate_series(1, 6000) i";
            server.sql(&of_each(&format!("create table {kind}# {text}")))?;
            server.sql(&of_each(&format!("create index on {kind}# (i)")))?;
        }
        server.sql("vacuum (freeze, analyze)")?;
        let begun = ["backup", CLUSTER, "--start-fast", "--no-wait", "--rate", SLOW];
        let id = world.operator.ok(&begun)?.trim().to_owned();
        wait::until("files are read", Duration::from_secs(60), || Ok(bytes_done(&world)? > 0))?;
        let (since, before) = (Instant::now(), bytes_done(&world)?);
        let load = server.pgbench_init(1).and_then(|()| server.pgbench(50))?;
        server.sql(&of_each("drop table dropped#"))?;
        server.sql(&of_each("truncate truncated#"))?;
        server.sql(&of_each("delete from shrunken# where i > 100"))?;
        for number in 1..=TABLES {
            server.sql(&format!("vacuum shrunken{number}"))?;
        }
        server.sql(&of_each("insert into grown# select i, 'grown' from generate_series(6001, 14000) i"))?;
        server.sql(&of_each("cluster moved# using moved#_i_idx"))?;
        server.sql(&of_each("create table made# as select * from grown#"))?;
        server.sql("checkpoint")?;
        // As slowly as it was told to: what it says that it has read, over the time that it had for it.
        let told = operation(&world)?;
        let (after, had) = (told["bytes_done"].as_u64().context("no bytes")?, since.elapsed() + SLACK);
        ensure!(told["state"] == "running", "the backup did not last: {told}");
        ensure!(told["step"].to_string().contains(&format!("at most {SLOW_BYTES} bytes a second")), "{told}");
        let allowed = SLOW_BYTES as f64 * had.as_secs_f64();
        ensure!((after - before) as f64 <= allowed, "{} bytes in {had:?}", after - before);
        world.operator.ok(&["pace", &id, "--rate", "0"])?;
        wait::until("it goes on without a limit", Duration::from_secs(60), || {
            let told = operation(&world)?;
            ensure!(told["state"] != "failed", "{told}");
            Ok(told["state"] == "done")
        })?;
        let refused = world.operator.run(&["pace", &id, "--rate", "1MiB"])?.exits(5)?;
        ensure!(refused.contains("no backup that runs"), "{refused}");
        drop(load);
        let backup = operation(&world)?["backup"].as_str().context("no backup")?.to_owned();
        let taken = Taken { dump: dump(server)?, backup: backup.clone() };
        primary.archive_now()?;
        expect_restorable_to(&stage.scratch, &world, &taken, &["--latest"])?;
        // The next one builds on it: what it took half of, WAL tells.
        let taken = take(&world, &primary, &[])?;
        expect(&world, &taken.backup, "incr", Some(&backup), "change_maps")?;
        expect_restorable(&stage.scratch, &world, &taken)?;
        world.expect_whole(&[&primary], 1).map(|_| ())
    });
}
