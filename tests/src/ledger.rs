//! Load with known sums: one writer whose every commit leaves a known number of rows and a known total, with the LSN
//! and time at which exactly that many commits had happened. A restore to such a moment has one right answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::postgres::Server;
use crate::postgres::sql::Session;
use crate::wait;

/// Rows among which amounts are spread.
const ACCOUNTS: u64 = 200;
/// Bytes of filler a commit, so that the ledger itself moves WAL along.
const FILLER_BYTES: usize = 400;
/// Where a connection lost to a killed server is tried again.
const RECONNECT_EVERY: Duration = Duration::from_millis(100);

/// A moment between two commits of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// Commits so far.
    pub commits: u64,
    /// Sum over all accounts.
    pub total: i64,
    /// An LSN after that commit and before the next one.
    pub lsn: String,
    /// The server's clock, after that commit and before the next one, with numeric offset.
    pub time: String,
    /// Transaction id of that commit.
    pub xid: String,
}

/// A writer in the background.
#[derive(Debug)]
pub struct Ledger {
    moments: Arc<Mutex<Vec<Moment>>>,
    stop: Arc<AtomicBool>,
    writer: Option<JoinHandle<Result<()>>>,
}

/// Makes the ledger's tables.
pub fn create(server: &Server) -> Result<()> {
    server
        .sql(&format!(
            "create table ledger_account (id int primary key, balance bigint not null);
             create table ledger (n bigint primary key, total bigint not null, filler text);
             insert into ledger_account select i, 0 from generate_series(0, {}) i",
            ACCOUNTS - 1
        ))
        .map(|_| ())
}

/// What a server holds of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// Commits found.
    pub commits: u64,
    /// Sum over all accounts.
    pub total: i64,
}

/// Reads a server's ledger; fails when it contradicts itself.
pub fn holding(server: &Server) -> Result<Holding> {
    let rows = server.sql(
        "select count(*), coalesce(max(n), 0), coalesce((select total from ledger order by n desc limit 1), 0),
                (select coalesce(sum(balance), 0) from ledger_account) from ledger",
    )?;
    let numbers: Vec<i64> =
        rows.first().context("no row")?.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let [count, last, total, sum] = numbers[..] else { bail!("{numbers:?}") };
    ensure!(count == last, "{count} commits but the last is number {last}");
    ensure!(total == sum, "the last commit says {total}, the accounts sum to {sum}");
    Ok(Holding { commits: u64::try_from(count)?, total })
}

/// Checks that a restored server holds exactly what was there at `moment`.
pub fn expect_moment(server: &Server, moment: &Moment) -> Result<()> {
    let found = holding(server)?;
    let wanted = Holding { commits: moment.commits, total: moment.total };
    ensure!(found == wanted, "restored {found:?}, the moment had {wanted:?} (LSN {}, {})", moment.lsn, moment.time);
    Ok(())
}

impl Ledger {
    /// Starts writing about `per_second` commits a second, going on after what the server already holds.
    pub fn start(server: &Server, per_second: u32) -> Result<Self> {
        let moments = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let mut writer = Writer {
            held: holding(server)?,
            session: Session::open(server)?,
            moments: Arc::clone(&moments),
            stop: Arc::clone(&stop),
            pause: Duration::from_secs(1) / per_second.max(1),
        };
        let writer = std::thread::Builder::new().name("ledger".into()).spawn(move || writer.run())?;
        Ok(Self { moments, stop, writer: Some(writer) })
    }

    /// All moments so far, oldest first.
    pub fn moments(&self) -> Vec<Moment> {
        self.moments.lock().map(|moments| moments.clone()).unwrap_or_default()
    }

    /// The newest moment.
    pub fn last(&self) -> Option<Moment> {
        self.moments.lock().ok().and_then(|moments| moments.last().cloned())
    }

    /// Waits for a moment later than now, and gives it.
    pub fn next(&self) -> Result<Moment> {
        let before = self.last().map_or(0, |moment| moment.commits);
        wait::value("the ledger commits", Duration::from_secs(30), || {
            Ok(self.last().filter(|moment| moment.commits > before))
        })
    }

    /// Waits for `commits` more commits.
    pub fn advance(&self, commits: u64) -> Result<Moment> {
        let before = self.last().map_or(0, |moment| moment.commits);
        wait::value("the ledger commits", Duration::from_secs(120), || {
            Ok(self.last().filter(|moment| moment.commits >= before + commits))
        })
    }

    /// Stops writing and gives all moments. An error of the server that ended the writer is not one here.
    pub fn stop(mut self) -> Vec<Moment> {
        self.end();
        self.moments()
    }

    /// Stops writing; moments stay readable.
    pub fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.end();
    }
}

struct Writer {
    held: Holding,
    session: Session,
    moments: Arc<Mutex<Vec<Moment>>>,
    stop: Arc<AtomicBool>,
    pause: Duration,
}

impl Writer {
    fn run(&mut self) -> Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            let moment = self.commit()?;
            self.held = Holding { commits: moment.commits, total: moment.total };
            if let Ok(mut moments) = self.moments.lock() {
                moments.push(moment);
            }
            wait::pause(self.pause);
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<Moment> {
        let n = self.held.commits + 1;
        let amount = i64::try_from(n * 7919 % 1000)? - 300;
        let total = self.held.total + amount;
        let account = n * 31 % ACCOUNTS;
        // The filler differs from row to row, so that it does not compress to nothing.
        let xid = self.session.text(&format!(
            "begin;
             update ledger_account set balance = balance + {amount} where id = {account};
             insert into ledger select {n}, {total}, left(repeat(md5('{n}'), 20), {FILLER_BYTES});
             select txid_current();
             commit"
        ))?;
        let rows = self.session.rows(
            "select pg_current_wal_insert_lsn(), to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00'",
        )?;
        let [lsn, time] = rows.first().context("no row")?.as_slice() else { bail!("{rows:?}") };
        Ok(Moment { commits: n, total, lsn: lsn.clone(), time: time.clone(), xid })
    }
}

/// Waits until a killed server that is up again answers, for scenarios that go on with a new [`Ledger`].
pub fn wait_answers(server: &Server, deadline: Duration) -> Result<()> {
    wait::until(&format!("{} answers", server.name()), deadline, || {
        let answers = crate::postgres::sql::answers(server);
        if !answers {
            wait::pause(RECONNECT_EVERY);
        }
        Ok(answers)
    })
    .map(|_| ())
}
