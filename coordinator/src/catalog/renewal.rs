//! Making the catalog anew while it is used.
//!
//! What the stores hold is gathered in a second file. Meanwhile everybody goes on with the catalog as it is, and triggers
//! write down which rows are new or changed. At the end one transaction replaces the old rows by the gathered ones; what
//! was written down stays as it is, because it is newer than what was gathered. So no reader ever sees a half of it, and a
//! crash leaves either the old rows or the new ones.
//!
//! That transaction holds the catalog's thread: its statements took 4 s of processor time for 2 million WAL objects. Pushes
//! do not wait for it, because they ask the catalog only about what is not in memory, unless more than the queue holds come.

use std::path::{Path, PathBuf};

use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};

use super::damage::remove;
use super::{Catalog, CatalogError, CatalogResult, CatalogThread};

/// Name of the second file; it is deleted at the start and at the end.
const FILE_NAME: &str = "catalog.renewed.sqlite";

/// Writes down the keys of rows that are new or changed from now on.
const BEGIN: &str = "
    CREATE TEMP TABLE noted_wal (
        cluster TEXT, system_identifier INTEGER, name TEXT, fingerprint TEXT,
        PRIMARY KEY (cluster, system_identifier, name, fingerprint)
    ) WITHOUT ROWID;
    CREATE TEMP TABLE noted_backup (cluster TEXT, backup TEXT, PRIMARY KEY (cluster, backup)) WITHOUT ROWID;
    CREATE TEMP TABLE noted_cluster (
        name TEXT, system_identifier INTEGER, PRIMARY KEY (name, system_identifier)
    ) WITHOUT ROWID;
    CREATE TEMP TRIGGER note_wal_new AFTER INSERT ON main.wal BEGIN
        INSERT OR IGNORE INTO noted_wal VALUES (new.cluster, new.system_identifier, new.name, new.fingerprint);
    END;
    CREATE TEMP TRIGGER note_wal_changed AFTER UPDATE ON main.wal BEGIN
        INSERT OR IGNORE INTO noted_wal VALUES (new.cluster, new.system_identifier, new.name, new.fingerprint);
    END;
    CREATE TEMP TRIGGER note_wal_lacking AFTER INSERT ON main.wal_missing BEGIN
        INSERT OR IGNORE INTO noted_wal VALUES (new.cluster, new.system_identifier, new.name, new.fingerprint);
    END;
    CREATE TEMP TRIGGER note_wal_present AFTER DELETE ON main.wal_missing BEGIN
        INSERT OR IGNORE INTO noted_wal VALUES (old.cluster, old.system_identifier, old.name, old.fingerprint);
    END;
    CREATE TEMP TRIGGER note_backup_new AFTER INSERT ON main.backup BEGIN
        INSERT OR IGNORE INTO noted_backup VALUES (new.cluster, new.backup);
    END;
    CREATE TEMP TRIGGER note_backup_store AFTER INSERT ON main.backup_store BEGIN
        INSERT OR IGNORE INTO noted_backup VALUES (new.cluster, new.backup);
    END;
    CREATE TEMP TRIGGER note_cluster_new AFTER INSERT ON main.cluster BEGIN
        INSERT OR IGNORE INTO noted_cluster VALUES (new.name, new.system_identifier);
    END;
    CREATE TEMP TRIGGER note_cluster_changed AFTER UPDATE ON main.cluster BEGIN
        INSERT OR IGNORE INTO noted_cluster VALUES (new.name, new.system_identifier);
    END;
";

/// From here on nothing is written down any more.
const STOP_NOTING: &str = "
    DROP TRIGGER IF EXISTS temp.note_wal_new;
    DROP TRIGGER IF EXISTS temp.note_wal_changed;
    DROP TRIGGER IF EXISTS temp.note_wal_lacking;
    DROP TRIGGER IF EXISTS temp.note_wal_present;
    DROP TRIGGER IF EXISTS temp.note_backup_new;
    DROP TRIGGER IF EXISTS temp.note_backup_store;
    DROP TRIGGER IF EXISTS temp.note_cluster_new;
    DROP TRIGGER IF EXISTS temp.note_cluster_changed;
";

const FORGET_NOTES: &str = "
    DROP TABLE IF EXISTS temp.noted_wal;
    DROP TABLE IF EXISTS temp.noted_backup;
    DROP TABLE IF EXISTS temp.noted_cluster;
    DROP TABLE IF EXISTS temp.kept_wal;
    DROP TABLE IF EXISTS temp.kept_missing;
";

/// Leaves only what was written down. A table of millions of rows is emptied at one blow, which needs a DELETE without a
/// condition; the few rows that stay are put aside for it.
const CLEAR: &str = "
    CREATE TEMP TABLE kept_wal AS
        SELECT wal.* FROM noted_wal CROSS JOIN wal USING (cluster, system_identifier, name, fingerprint);
    CREATE TEMP TABLE kept_missing AS
        SELECT wal_missing.* FROM noted_wal CROSS JOIN wal_missing USING (cluster, system_identifier, name, fingerprint);
    DELETE FROM wal;
    DELETE FROM wal_missing;
    INSERT INTO wal SELECT * FROM kept_wal;
    INSERT INTO wal_missing SELECT * FROM kept_missing;
    DELETE FROM backup WHERE (cluster, backup) NOT IN (SELECT * FROM noted_backup);
    DELETE FROM backup_store WHERE (cluster, backup) NOT IN (SELECT * FROM noted_backup);
    DELETE FROM cluster WHERE (name, system_identifier) NOT IN (SELECT * FROM noted_cluster);
";

/// What is taken over: the gathered rows, and how they are put in unless they were written down meanwhile.
const TAKE_OVER: [(&str, &str); 5] = [
    (
        "SELECT name, system_identifier, postgres_major, segment_size_bytes, since_us FROM cluster",
        "INSERT OR IGNORE INTO cluster (name, system_identifier, postgres_major, segment_size_bytes, since_us)
         VALUES (?1, ?2, ?3, ?4, ?5)",
    ),
    (
        "SELECT cluster, system_identifier, name, fingerprint, kind, timeline, position, size_bytes, node, in_recovery,
             complete, written_us FROM wal",
        "INSERT OR IGNORE INTO wal (cluster, system_identifier, name, fingerprint, kind, timeline, position, size_bytes,
             node, in_recovery, complete, written_us)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
    ),
    (
        "SELECT store, cluster, system_identifier, kind, timeline, position, name, fingerprint, expired FROM wal_missing",
        "INSERT OR IGNORE INTO wal_missing
             (store, cluster, system_identifier, kind, timeline, position, name, fingerprint, expired)
         SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9 WHERE (?2, ?3, ?7, ?8) NOT IN (SELECT * FROM noted_wal)",
    ),
    (
        "SELECT cluster, backup, started_us, entry FROM backup",
        "INSERT OR IGNORE INTO backup (cluster, backup, started_us, entry) VALUES (?1, ?2, ?3, ?4)",
    ),
    (
        "SELECT cluster, backup, store FROM backup_store",
        "INSERT OR IGNORE INTO backup_store (cluster, backup, store) VALUES (?1, ?2, ?3)",
    ),
];

/// A catalog that is being gathered beside the one in use.
#[derive(Debug)]
pub struct Renewal {
    gathered: Catalog,
    thread: CatalogThread,
    path: PathBuf,
}

impl Catalog {
    /// Begins to gather a new catalog in `directory`. One renewal at a time; it ends with [`Catalog::take_over`] or
    /// [`Catalog::abandon`].
    ///
    /// # Errors
    /// When the second file cannot be made.
    pub async fn begin_renewal(&self, directory: &Path) -> CatalogResult<Renewal> {
        let path = directory.join(FILE_NAME);
        self.call(move |connection| {
            connection.execute_batch(STOP_NOTING)?;
            connection.execute_batch(FORGET_NOTES)?;
            let aside = |source| CatalogError::Aside { path: path.clone(), source };
            remove(&path).map_err(aside)?;
            let (gathered, thread) = Self::gathering(&path)?;
            connection.execute_batch(BEGIN)?;
            Ok(Renewal { gathered, thread, path })
        })
        .await
    }

    /// Replaces what is in the catalog by what was gathered, in one transaction.
    ///
    /// # Errors
    /// When a statement fails; the catalog is then as before.
    pub async fn take_over(&self, renewal: Renewal) -> CatalogResult<()> {
        let Renewal { gathered, thread, path } = renewal;
        drop(gathered);
        let taken = self
            .call(move |connection| {
                thread.join();
                let source = Connection::open(&path)?;
                connection.execute_batch(STOP_NOTING)?;
                connection.execute_batch(CLEAR)?;
                for (select, insert) in TAKE_OVER {
                    copy(&source, connection, select, insert)?;
                }
                connection.execute_batch(FORGET_NOTES)?;
                drop(source);
                // The file is no harm; the next renewal deletes it as well.
                let _ = remove(&path);
                Ok(())
            })
            .await;
        if taken.is_err() {
            self.stop_noting().await;
        }
        taken
    }

    /// Gives a renewal up; the catalog stays as it is.
    pub async fn abandon(&self, renewal: Renewal) {
        drop(renewal);
        self.stop_noting().await;
    }

    async fn stop_noting(&self) {
        self.note(|connection| {
            connection.execute_batch(STOP_NOTING)?;
            connection.execute_batch(FORGET_NOTES)?;
            Ok(())
        })
        .await;
    }
}

impl Renewal {
    /// The catalog that is being gathered.
    pub fn gathered(&self) -> &Catalog {
        &self.gathered
    }
}

fn copy(source: &Connection, target: &Connection, select: &str, insert: &str) -> CatalogResult<()> {
    let mut select = source.prepare(select)?;
    let columns = select.column_count();
    let mut insert = target.prepare(insert)?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let values = (0..columns).map(|column| row.get(column)).collect::<Result<Vec<Value>, _>>()?;
        insert.execute(params_from_iter(values))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Freshness, backups, wal};
    use super::*;
    use crate::catalog::wal::{WalObject, WalRow};
    use postgres_format::SystemIdentifier;
    use repository::fingerprint::Fingerprint;
    use repository::name::StoreName;

    fn row(number: u8, size_bytes: u64) -> WalRow {
        let object = WalObject {
            cluster: "main".parse().unwrap(),
            system_identifier: SystemIdentifier::new(7),
            name: format!("0000000100000000000000{number:02X}").parse().unwrap(),
            fingerprint: Some(Fingerprint::of_sha256(&[number; 32])),
        };
        WalRow { object, size_bytes, facts: None }
    }

    async fn note(catalog: &Catalog, row: WalRow, present: &[StoreName], missing: &[StoreName]) {
        let (present, missing) = (present.to_vec(), missing.to_vec());
        catalog.call(move |connection| wal::note_stored(connection, &row, &present, &missing)).await.unwrap();
    }

    async fn missing(catalog: &Catalog) -> Vec<(String, u64)> {
        let counts = catalog.call(|connection| wal::missing_counts(connection)).await.unwrap();
        counts.into_iter().map(|(store, count)| (store.to_string(), count)).collect()
    }

    #[tokio::test]
    async fn the_gathered_rows_replace_the_old_ones_and_what_came_meanwhile_stays() {
        let directory = tempfile::tempdir().unwrap();
        let (catalog, _thread, freshness) = Catalog::open(directory.path()).unwrap();
        assert_eq!(freshness, Freshness::New);
        let (a, b): (StoreName, StoreName) = ("a".parse().unwrap(), "b".parse().unwrap());
        // 1 is gone from the stores, 2 is there, 3 was lacking in b and comes there meanwhile.
        for number in 1..=3 {
            note(&catalog, row(number, 10), std::slice::from_ref(&a), std::slice::from_ref(&b)).await;
        }
        let renewal = catalog.begin_renewal(directory.path()).await.unwrap();
        for number in 2..=3 {
            note(renewal.gathered(), row(number, 20), &[], std::slice::from_ref(&b)).await;
        }
        // Until the end everybody sees what was there.
        assert_eq!(catalog.call(|connection| wal::count(connection)).await.unwrap(), 3);
        assert_eq!(missing(&catalog).await, [("b".to_owned(), 3)]);
        let present = row(3, 10);
        catalog.call(move |connection| wal::mark_present(connection, &b, &present.object)).await.unwrap();
        note(&catalog, row(4, 10), &[], std::slice::from_ref(&a)).await;
        let id = "20261123T034138Z-7f3a9c21".parse().unwrap();
        let cluster = "main".parse().unwrap();
        let stores = vec![a.clone()];
        catalog.call(move |connection| backups::put(connection, &cluster, id, "{}", &stores)).await.unwrap();
        catalog.take_over(renewal).await.unwrap();
        assert_eq!(missing(&catalog).await, [("a".to_owned(), 1), ("b".to_owned(), 1)]);
        let sizes = catalog.call(|connection| {
            let mut statement = connection.prepare("SELECT size_bytes FROM wal ORDER BY name")?;
            Ok(statement.query_map([], |row| row.get(0))?.collect::<Result<Vec<i64>, _>>()?)
        });
        assert_eq!(sizes.await.unwrap(), [20, 10, 10]);
        assert_eq!(catalog.call(|connection| backups::count(connection)).await.unwrap(), 1);
        assert!(!directory.path().join(FILE_NAME).exists());
        // Another one, given up: nothing changes, and nothing is noted for ever.
        let renewal = catalog.begin_renewal(directory.path()).await.unwrap();
        catalog.abandon(renewal).await;
        let left = catalog.call(|connection| {
            Ok(connection.query_row("SELECT count(*) FROM temp.sqlite_schema", [], |row| row.get::<_, i64>(0))?)
        });
        assert_eq!(left.await.unwrap(), 0);
        assert_eq!(catalog.call(|connection| wal::count(connection)).await.unwrap(), 3);
    }
}
