//! The catalog's tables, as an append-only list of migrations counted in `user_version`.
//!
//! A migration, once released, is never edited; the next one is added below it. Times are microseconds since 1970 in
//! UTC, system identifiers are stored as the signed number with the same 64 bits.

use std::path::Path;

use rusqlite::{Connection, Error, ErrorCode, TransactionBehavior};

use super::{CatalogError, CatalogResult};

const MIGRATIONS: [&str; 6] = [
    "
    -- Single facts, such as the identity of the repository this catalog is about.
    CREATE TABLE fact (name TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL) STRICT;

    -- Clusters as the stores' roots name them.
    CREATE TABLE cluster (
        name TEXT NOT NULL,
        system_identifier INTEGER NOT NULL,
        postgres_major INTEGER,
        segment_size_bytes INTEGER,
        since_us INTEGER NOT NULL,
        PRIMARY KEY (name, system_identifier)
    ) STRICT, WITHOUT ROWID;

    -- One row a WAL object. Columns from the object's header stay NULL until somebody has read it.
    CREATE TABLE wal (
        cluster TEXT NOT NULL,
        system_identifier INTEGER NOT NULL,
        name TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        kind INTEGER NOT NULL,
        timeline INTEGER NOT NULL,
        position INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL,
        node TEXT,
        in_recovery INTEGER,
        complete INTEGER,
        written_us INTEGER,
        PRIMARY KEY (cluster, system_identifier, name, fingerprint)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX wal_by_writer ON wal (cluster, system_identifier, timeline, position)
        WHERE in_recovery = 0 AND kind <> 2;

    -- What a store lacks of it. Normally empty.
    CREATE TABLE wal_missing (
        store TEXT NOT NULL,
        cluster TEXT NOT NULL,
        system_identifier INTEGER NOT NULL,
        kind INTEGER NOT NULL,
        timeline INTEGER NOT NULL,
        position INTEGER NOT NULL,
        name TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        PRIMARY KEY (store, cluster, system_identifier, kind, timeline, position, name, fingerprint)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX wal_missing_by_name ON wal_missing (cluster, system_identifier, name, fingerprint);

    -- Backups that some store's root names; `entry` is the root's entry as JSON.
    CREATE TABLE backup (
        cluster TEXT NOT NULL,
        backup TEXT NOT NULL,
        started_us INTEGER NOT NULL,
        entry TEXT NOT NULL,
        PRIMARY KEY (cluster, backup)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE backup_store (
        cluster TEXT NOT NULL,
        backup TEXT NOT NULL,
        store TEXT NOT NULL,
        PRIMARY KEY (cluster, backup, store)
    ) STRICT, WITHOUT ROWID;

    -- Long work, for people and scripts.
    CREATE TABLE operation (
        operation TEXT PRIMARY KEY NOT NULL,
        kind TEXT NOT NULL,
        cluster TEXT NOT NULL,
        node TEXT NOT NULL,
        state INTEGER NOT NULL,
        step TEXT NOT NULL,
        bytes_done INTEGER NOT NULL,
        bytes_total INTEGER NOT NULL,
        error TEXT NOT NULL,
        started_us INTEGER NOT NULL,
        ended_us INTEGER,
        backup TEXT NOT NULL,
        reason TEXT NOT NULL,
        request_id TEXT
    ) STRICT;
    CREATE INDEX operation_by_time ON operation (started_us);
    CREATE UNIQUE INDEX operation_by_request ON operation (request_id) WHERE request_id IS NOT NULL;

    -- When a schedule last started a backup.
    CREATE TABLE schedule_run (
        cluster TEXT NOT NULL,
        expression TEXT NOT NULL,
        started_us INTEGER NOT NULL,
        PRIMARY KEY (cluster, expression)
    ) STRICT, WITHOUT ROWID;
",
    "
    -- The agent that had a node's session last.
    CREATE TABLE seat (
        cluster TEXT NOT NULL,
        node TEXT NOT NULL,
        instance TEXT NOT NULL,
        data_directory TEXT NOT NULL,
        PRIMARY KEY (cluster, node)
    ) STRICT, WITHOUT ROWID;

    -- The agent that sent the newest WAL of a timeline out of recovery.
    CREATE TABLE sender (
        cluster TEXT NOT NULL,
        system_identifier INTEGER NOT NULL,
        timeline INTEGER NOT NULL,
        position INTEGER NOT NULL,
        node TEXT NOT NULL,
        instance TEXT NOT NULL,
        PRIMARY KEY (cluster, system_identifier, timeline)
    ) STRICT, WITHOUT ROWID;
",
    "
    -- 1: the store lacks it on purpose, because its retention condemned it.
    ALTER TABLE wal_missing ADD COLUMN expired INTEGER NOT NULL DEFAULT 0;

    -- The packs of other backups that a manifest, which never changes, refers to, as JSON.
    CREATE TABLE backup_reference (
        manifest TEXT PRIMARY KEY NOT NULL,
        cluster TEXT NOT NULL,
        backup TEXT NOT NULL,
        packs TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
",
    "
    -- What is known to be wrong in the stores, as JSON.
    CREATE TABLE soundness (
        cluster TEXT PRIMARY KEY NOT NULL,
        known TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
",
    "
    -- The newest root of a cluster that was seen in a store. 1: an operator accepted that it may be gone.
    CREATE TABLE root_mark (
        store TEXT NOT NULL,
        cluster TEXT NOT NULL,
        generation INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        forgone INTEGER NOT NULL,
        PRIMARY KEY (store, cluster)
    ) STRICT, WITHOUT ROWID;
",
    "
    -- Of a backup of the hybrid shape: the primary that starts and stops it; else empty.
    ALTER TABLE operation ADD COLUMN primary_node TEXT NOT NULL DEFAULT '';
",
];

/// Brings the connection's schema up to date. A migration that the tables do not take means that they are not what their
/// version says.
pub(super) fn migrate(connection: &mut Connection, path: &Path) -> CatalogResult<()> {
    let open = |source| CatalogError::Open { path: path.to_owned(), source };
    let unfit = |source: Error| match source {
        Error::SqlInputError { msg, .. } => CatalogError::Broken { path: path.to_owned(), detail: msg },
        Error::SqliteFailure(error, Some(text)) if error.code == ErrorCode::Unknown => {
            CatalogError::Broken { path: path.to_owned(), detail: text }
        }
        source => open(source),
    };
    let known = MIGRATIONS.len() as i64;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(open)?;
    let found: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(open)?;
    if found < 0 {
        return Err(CatalogError::Broken { path: path.to_owned(), detail: format!("its version is {found}") });
    }
    if found > known {
        return Err(CatalogError::Newer { path: path.to_owned(), found, known });
    }
    for migration in &MIGRATIONS[found as usize..] {
        transaction.execute_batch(migration).map_err(unfit)?;
    }
    transaction.pragma_update(None, "user_version", known).map_err(open)?;
    transaction.commit().map_err(open)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_is_strict_and_migrating_twice_changes_nothing() {
        let mut connection = Connection::open_in_memory().unwrap();
        let path = Path::new(":memory:");
        migrate(&mut connection, path).unwrap();
        migrate(&mut connection, path).unwrap();
        let loose: i64 = connection
            .query_row("SELECT count(*) FROM pragma_table_list WHERE schema = 'main' AND strict = 0 AND name NOT LIKE 'sqlite_%'", [], |row| {
                row.get(0)
            })
            .unwrap();
        assert_eq!(loose, 0);
    }
}
