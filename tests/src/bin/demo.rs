//! `make demo`: the repository host dies under load, and nobody notices.
//!
//! Plays the story unattended in one temporary directory on loopback. Each step is done, verified and then printed with
//! the time it took; the first one that does not hold ends the demo with exit code 1 and the reason.

use std::fs;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::account::Scratch;
use tests::fleet::{Operator, Store};
use tests::ledger::{self, Ledger, Moment};
use tests::postgres::{InitOptions, Server, tail};
use tests::program::{Running, read_log};
use tests::repository_check;
use tests::wait;
use tests::world::{BUCKET, CLUSTER, Node, NodePlan, Stores, World, start_restored};

/// Transactions of pgbench a second.
const LOAD_PER_SECOND: u32 = 300;
/// WAL besides, in mebibytes a second: about a segment every third second.
const WAL_MEBIBYTES_PER_SECOND: u32 = 5;
/// Commits of the ledger a second.
const LEDGER_PER_SECOND: u32 = 50;
/// Rows of pgbench: a hundred thousand times this.
const SCALE: u32 = 3;
/// Refused connections are taken this long before WAL goes to the bucket (the agent's default).
const FALLBACK: Duration = Duration::from_secs(2);
/// `.ready` files that may wait beyond what the fallback time explains.
const READY_SLACK: f64 = 8.0;
/// `.ready` files that may wait this long after the switch.
const READY_SETTLED: usize = 2;
/// When they must be down again.
const SETTLE: Duration = Duration::from_secs(30);
/// Longest wait for what the installation does by itself.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let start = Instant::now();
    let scratch = match Scratch::new("demo") {
        Ok(scratch) => scratch,
        Err(error) => {
            eprintln!("no temporary directory: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    println!("pgconvoy demo in {}", scratch.path().display());
    match play(&scratch) {
        Ok(()) => {
            println!("every step verified in {:.0} s", start.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("  ✘ {error:#}");
            show_logs(&scratch);
            ExitCode::FAILURE
        }
    }
}

/// Does one step and prints what was verified, with its time.
fn step<T>(what: &str, act: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
    let start = Instant::now();
    let (value, seen) = act().with_context(|| what.to_owned())?;
    let seen = if seen.is_empty() { String::new() } else { format!(": {seen}") };
    println!("  ✔ {:6.1} s  {what}{seen}", start.elapsed().as_secs_f64());
    Ok(value)
}

fn show_logs(scratch: &Scratch) {
    let Ok(entries) = fs::read_dir(scratch.path()) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|extension| extension == "log") {
            println!("---- {}\n{}", path.display(), tail(&read_log(&path), 25));
        }
    }
}

/// What plays along in every act.
struct Cast {
    world: World,
    primary: Node,
    standby: Node,
    ledger: Ledger,
    load: [Running; 2],
}

fn play(scratch: &Scratch) -> Result<()> {
    let mut cast = open(scratch)?;
    step("WAL flows through the coordinator into both stores", || {
        let said = cast.world.operator.ok(&["check", CLUSTER])?;
        cast.world.expect_whole(&[&cast.primary], 1)?;
        Ok(((), format!("check says {} lines, all good", said.lines().count())))
    })?;
    step("base backup from the standby, through the coordinator", || {
        let backup = cast.world.back_up(&["--node", "standby"])?.trim().to_owned();
        let bytes = cast.primary.segment_bytes()?;
        ensure!(cast.world.backups(bytes)?.contains(&backup), "{backup} is not in both stores");
        Ok(((), format!("{backup} in both stores")))
    })?;
    let early = cast.ledger.next()?;
    cast.ledger.advance(20)?;
    host_dies(&mut cast)?;
    while_it_is_gone(scratch, &mut cast)?;
    host_returns(&mut cast)?;
    step("restore to a point in time before all this, row sums compared", || {
        let restored = cast.world.restored(scratch, "past", &["--target-time", &early.time])?;
        ledger::expect_moment(&restored, &early)?;
        Ok(((), format!("{} commits, total {}, as at {}", early.commits, early.total, early.time)))
    })
}

fn open(scratch: &Scratch) -> Result<Cast> {
    let world = step("coordinator up with a directory and an S3 store", || {
        let world = World::started(scratch, Stores::Both)?;
        let address = world.coordinator.address().to_string();
        Ok((world, address))
    })?;
    // The road's patience is what the packages install.
    let plan = NodePlan { tables: String::new(), ..NodePlan::default() };
    let primary = step("PostgreSQL primary with an agent", || {
        let server = Server::init(scratch, "primary", InitOptions::default())?;
        let mut node = world.node(scratch, server, &plan)?;
        node.server.start()?;
        node.agent.start()?;
        // The system identifier is the one that the connected agent reports.
        wait::until("the cluster is created", PATIENCE, || {
            world.operator.ok(&["cluster", "create", CLUSTER])?;
            Ok(true)
        })?;
        let version = node.server.text("show server_version")?;
        Ok((node, format!("PostgreSQL {version}")))
    })?;
    let standby = step("streaming standby with an agent", || {
        let mut node = world.node(scratch, primary.server.standby(scratch, "standby")?, &plan)?;
        // The agent first: a standby that starts asks for WAL.
        node.agent.start()?;
        node.server.start()?;
        world.wait_reported("standby")?;
        Ok((node, String::new()))
    })?;
    let (ledger, load) = step("pgbench and a ledger of known sums write", || {
        ledger::create(&primary.server)?;
        primary.server.pgbench_init(SCALE)?;
        let ledger = Ledger::start(&primary.server, LEDGER_PER_SECOND)?;
        let load = [primary.server.pgbench(LOAD_PER_SECOND)?, primary.server.wal_load(WAL_MEBIBYTES_PER_SECOND)?];
        ledger.advance(50)?;
        primary.archive_now()?;
        let seen = format!("{LOAD_PER_SECOND} transactions and {WAL_MEBIBYTES_PER_SECOND} MiB of WAL a second");
        Ok(((ledger, load), seen))
    })?;
    Ok(Cast { world, primary, standby, ledger, load })
}

/// Looks at the primary's archiver from another thread until it is told to stop.
struct Watch {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<(Duration, usize)>>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(node: &Node) -> Result<Self> {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let directory = node.server.data().join("pg_wal/archive_status");
        let (stopped, noted, start) = (Arc::clone(&stop), Arc::clone(&seen), Instant::now());
        let look = move || {
            while !stopped.load(Ordering::Relaxed) {
                let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
                let ready = entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".ready")).count();
                if let Ok(mut noted) = noted.lock() {
                    noted.push((start.elapsed(), ready));
                }
                wait::pause(Duration::from_millis(50));
            }
        };
        Ok(Self { stop, seen, thread: Some(std::thread::Builder::new().spawn(look)?) })
    }

    fn seen(&self) -> Vec<(Duration, usize)> {
        self.seen.lock().map(|seen| seen.clone()).unwrap_or_default()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Segments finished a second, measured over `time`.
fn segments_per_second(node: &Node, time: Duration) -> Result<f64> {
    let position = || node.server.number("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint");
    let (start, before) = (Instant::now(), position()?);
    wait::pause(time);
    Ok((position()? - before) as f64 / node.segment_bytes()? as f64 / start.elapsed().as_secs_f64())
}

fn host_dies(cast: &mut Cast) -> Result<()> {
    let failed_before = cast.primary.server.failed_count()?;
    let rate = segments_per_second(&cast.primary, Duration::from_secs(3))?;
    let watch = Watch::start(&cast.primary)?;
    let died = Instant::now();
    step("kill -9 of the coordinator, its directory store gone, load going on", || {
        cast.world.coordinator.kill()?;
        let directory = cast.world.directory.clone().context("no directory")?;
        fs::rename(&directory, directory.with_extension("gone"))?;
        Ok(((), format!("{rate:.2} segments a second")))
    })?;
    step("WAL goes straight to S3", || {
        let before = cast.primary.server.archived_count()?;
        wait::until("files are archived without the host", PATIENCE, || {
            Ok(cast.primary.server.archived_count()? >= before + 2)
        })?;
        Ok(((), format!("two files acknowledged {:.1} s after the death", died.elapsed().as_secs_f64())))
    })?;
    step("archive_command never failed, the queue stayed short", || {
        wait::until("the queue has settled", SETTLE, || Ok(cast.primary.server.ready_files()?.len() <= READY_SETTLED))?;
        let most = watch.seen().into_iter().map(|(_, ready)| ready).max().unwrap_or(0);
        let bound = rate * FALLBACK.as_secs_f64() + READY_SLACK;
        ensure!(most as f64 <= bound, "{most} files waited; {bound:.1} are explained by the fallback time");
        ensure!(cast.primary.server.failed_count()? == failed_before, "archive_command failed");
        Ok(((), format!("at most {most} files waited, {bound:.1} allowed; failed_count {failed_before}")))
    })
}

fn while_it_is_gone(scratch: &Scratch, cast: &mut Cast) -> Result<()> {
    let address = cast.world.coordinator.address();
    let seat = Operator::set_up(scratch, "seat", Some(address), &[], Some(&cast.standby.agent))?;
    step("info without the host", || {
        let said = seat.ok(&["info", CLUSTER])?;
        ensure!(said.contains(CLUSTER), "{said}");
        Ok(((), format!("{} lines", said.lines().count())))
    })?;
    step("a base backup without the host, into S3", || {
        let said = seat.ok(&["backup", CLUSTER, "--here", "--start-fast"])?;
        let there = cast.world.look(BUCKET)?.undamaged()?.backups(cast.primary.segment_bytes()?)?;
        ensure!(there.len() == 2, "the bucket names {} backups", there.len());
        Ok(((), said.trim().to_owned()))
    })?;
    step("restore to the last acknowledged commit from S3 alone", || {
        let moment = cast.ledger.next()?;
        let segment = cast.primary.archive_now()?;
        let data = scratch.path().join("alone-data");
        let stores: Vec<_> = cast.world.stores.iter().filter(|store| store.name == BUCKET).cloned().collect();
        let alone = Operator::set_up(scratch, "alone", None, &stores, None)?;
        alone.alone(&["restore", CLUSTER, "--to", &data.display().to_string()])?.ok()?;
        let restored = start_restored(scratch, "alone", &data)?;
        let held = ledger::holding(&restored)?;
        ensure!(held.commits >= moment.commits, "{} commits, {} were acknowledged", held.commits, moment.commits);
        let known = cast.ledger.moments().into_iter().find(|one| one.commits == held.commits);
        let known: Moment = known.context("more commits than were made")?;
        ensure!(known.total == held.total, "total {} instead of {}", held.total, known.total);
        Ok(((), format!("{} commits, total {}, up to segment {segment}", held.commits, held.total)))
    })
}

fn host_returns(cast: &mut Cast) -> Result<()> {
    step("the host is back", || {
        let directory = cast.world.directory.clone().context("no directory")?;
        fs::rename(directory.with_extension("gone"), &directory)?;
        cast.world.coordinator.start()?;
        Ok(((), cast.world.coordinator.address().to_string()))
    })?;
    step("everything adopted: both stores whole, no gap, nothing twice", || {
        cast.ledger.advance(20)?;
        // The load ends here, so that both stores can be compared at rest.
        cast.load.iter_mut().try_for_each(Running::kill)?;
        cast.ledger.end();
        cast.primary.archive_now()?;
        wait::until("both stores list the same", PATIENCE, || {
            let of_each = |look: fn(&Store, &str) -> Result<Vec<String>>| -> Result<Vec<Vec<String>>> {
                cast.world.stores.iter().map(|store| look(store, CLUSTER)).collect()
            };
            let (keys, backups) =
                (of_each(repository_check::wal_and_backup_keys)?, of_each(repository_check::published)?);
            Ok(keys[0] == keys[1] && backups[0] == backups[1])
        })?;
        let holdings = cast.world.expect_whole(&[&cast.primary], 1)?;
        let (directory, bucket) = (&holdings[0], &holdings[1]);
        directory.same_wal_as(bucket)?;
        let bytes = cast.primary.segment_bytes()?;
        let backups = (directory.backups(bytes)?.len(), bucket.backups(bytes)?.len());
        ensure!(backups == (2, 2), "the stores name {backups:?} backups");
        Ok(((), format!("{} segments and 2 backups in each", directory.segments(1).len())))
    })
}
