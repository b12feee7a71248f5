//! Operations in the catalog: what was asked, how it ended.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::CatalogResult;
use super::wal::{damaged, parse};
use crate::operations::{Operation, State};

const COLUMNS: &str =
    "operation, kind, cluster, node, state, step, bytes_done, bytes_total, error, started_us, ended_us,
                       backup, reason, request_id, primary_node";

/// Operations kept; older ended ones are forgotten.
const KEPT: u32 = 1000;

/// Writes an operation down as it stands.
pub fn put(connection: &Connection, operation: &Operation) -> CatalogResult<()> {
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO operation (operation, kind, cluster, node, state, step, bytes_done, bytes_total,
                 error, started_us, ended_us, backup, reason, request_id, primary_node)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
        )?
        .execute(params![
            operation.id,
            operation.kind,
            operation.cluster.as_str(),
            operation.node.as_str(),
            match operation.state {
                State::Running => 1,
                State::Done => 2,
                State::Failed => 3,
                State::WaitingForWal => 4,
            },
            operation.step,
            operation.bytes_done.cast_signed(),
            operation.bytes_total.cast_signed(),
            operation.error,
            operation.started.as_microsecond(),
            operation.ended.map(Timestamp::as_microsecond),
            operation.backup.map(|backup| backup.to_string()).unwrap_or_default(),
            operation.reason,
            operation.request_id,
            operation.primary.as_ref().map(|primary| primary.as_str()).unwrap_or_default(),
        ])?;
    Ok(())
}

/// The newest operations first; of one cluster, or of all.
pub fn newest(connection: &Connection, cluster: Option<&str>, limit: u32) -> CatalogResult<Vec<Operation>> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM operation WHERE ?1 IS NULL OR cluster = ?1 ORDER BY started_us DESC, operation LIMIT ?2"
    ))?;
    let mut rows = statement.query(params![cluster, limit])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(operation(row)?);
    }
    Ok(found)
}

/// One operation.
pub fn get(connection: &Connection, id: &str) -> CatalogResult<Option<Operation>> {
    let mut statement = connection.prepare_cached(&format!("SELECT {COLUMNS} FROM operation WHERE operation = ?1"))?;
    statement.query_row([id], |row| Ok(operation(row))).optional()?.transpose()
}

/// The operation that a request started.
pub fn by_request(connection: &Connection, request: &str) -> CatalogResult<Option<Operation>> {
    let mut statement = connection.prepare_cached(&format!("SELECT {COLUMNS} FROM operation WHERE request_id = ?1"))?;
    statement.query_row([request], |row| Ok(operation(row))).optional()?.transpose()
}

/// Forgets the oldest ended operations beyond the limit.
pub fn prune(connection: &Connection) -> CatalogResult<()> {
    connection
        .prepare_cached(
            "DELETE FROM operation WHERE ended_us IS NOT NULL AND operation NOT IN
                 (SELECT operation FROM operation ORDER BY started_us DESC LIMIT ?1)",
        )?
        .execute([KEPT])?;
    Ok(())
}

fn operation(row: &Row<'_>) -> CatalogResult<Operation> {
    let state: i64 = row.get(4)?;
    let (backup, primary): (String, String) = (row.get(11)?, row.get(14)?);
    let time = |us| Timestamp::from_microsecond(us).map_err(|_| damaged("a time", "out of range"));
    Ok(Operation {
        id: row.get(0)?,
        kind: row.get(1)?,
        cluster: parse(&row.get::<_, String>(2)?, "a cluster name")?,
        node: parse(&row.get::<_, String>(3)?, "a node name")?,
        primary: if primary.is_empty() { None } else { Some(parse(&primary, "a node name")?) },
        state: match state {
            1 => State::Running,
            2 => State::Done,
            3 => State::Failed,
            4 => State::WaitingForWal,
            _ => return Err(damaged("a state", &state.to_string())),
        },
        step: row.get(5)?,
        bytes_done: row.get::<_, i64>(6)?.cast_unsigned(),
        bytes_total: row.get::<_, i64>(7)?.cast_unsigned(),
        error: row.get(8)?,
        started: time(row.get(9)?)?,
        ended: row.get::<_, Option<i64>>(10)?.map(time).transpose()?,
        backup: if backup.is_empty() { None } else { Some(parse(&backup, "a backup")?) },
        reason: row.get(12)?,
        request_id: row.get(13)?,
    })
}
