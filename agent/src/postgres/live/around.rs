//! What is asked of the server around backups besides their start and stop: what a manifest tells beyond that, and what a
//! standby must do before its files can be copied for a backup that its primary has started.

use std::time::Duration;

use postgres_format::FullTransactionId;
use repository::backup::manifest::{DATABASE_LIMIT, Database};
use repository::byte_text::ByteText;
use tokio_postgres::Row;

use super::{LocalServer, STATEMENT_DEADLINE, Session, ask, column, within};
use crate::postgres::ServerError;

/// Longest wait for a restartpoint; it writes what is dirty in the server's memory, as fast as the disks allow.
const RESTARTPOINT_DEADLINE: Duration = Duration::from_secs(3600);

/// See [`next_xid`].
const NEXT_XID: &str = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_snapshot_xmax(pg_current_snapshot()) ELSE pg_current_xact_id() END::text";

impl LocalServer {
    /// On a session of its own, so that nobody else's questions wait for it.
    pub(super) async fn make_restartpoint(&self) -> Result<(), ServerError> {
        let session = self.connect().await?;
        within(RESTARTPOINT_DEADLINE, "make a restartpoint", session.client.batch_execute("CHECKPOINT")).await
    }

    pub(super) async fn is_replay_paused(&self) -> Result<bool, ServerError> {
        let what = "tell whether replay is paused";
        let session = self.session().await?;
        let statement = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() ELSE false END";
        column(&ask(&session, what, statement, &[]).await?, 0, what)
    }
}

/// The id of a transaction that begins now. In a snapshot a transaction that waits for a synchronous standby has not ended
/// although its commit record is written (`RecordTransactionCommit` in `src/backend/access/transam/xact.c`), so a primary
/// gives a new id, which costs it a commit record that waits for nobody. A standby cannot, and tells its snapshot's end. A
/// statement of its own: the one that stops the backup begins before the stop. The backup is good without it, so a
/// failure says nothing.
pub(super) async fn next_xid(session: &Session) -> Option<FullTransactionId> {
    let (what, statement) = ("tell the next transaction id", NEXT_XID);
    let row = ask(session, what, statement, &[]).await.ok()?;
    column::<String>(&row, 0, what).ok()?.parse().ok()
}

/// The databases by identifier and name, in the bytes of the catalog: which encoding a name is in only its maker knows. The
/// backup is good without them, so a failure says nothing.
pub(super) async fn databases(session: &Session) -> Option<Vec<Database>> {
    let what = "list databases";
    let statement = "SELECT oid, convert_to(datname::text, getdatabaseencoding()) FROM pg_database ORDER BY oid";
    let rows = within(STATEMENT_DEADLINE, what, session.client.query(statement, &[])).await.ok()?;
    if rows.len() > DATABASE_LIMIT {
        return None;
    }
    let database = |row: &Row| {
        let (oid, name) = (column(row, 0, what).ok()?, column::<Vec<u8>>(row, 1, what).ok()?);
        Some(Database { oid, name: ByteText::new(name) })
    };
    rows.iter().map(database).collect()
}
