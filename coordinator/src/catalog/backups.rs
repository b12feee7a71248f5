//! Backups and schedule runs in the catalog.

use jiff::Timestamp;
use repository::name::{BackupId, ClusterName, StoreName};
use rusqlite::{Connection, OptionalExtension, params};

use super::CatalogResult;
use super::wal::damaged;

/// Writes a backup down and the stores whose root names it; `entry` is the root's entry as JSON.
pub fn put(
    connection: &Connection,
    cluster: &ClusterName,
    backup: BackupId,
    entry: &str,
    stores: &[StoreName],
) -> CatalogResult<()> {
    let text = backup.to_string();
    connection
        .prepare_cached("INSERT OR IGNORE INTO backup (cluster, backup, started_us, entry) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![cluster.as_str(), text, backup.time().as_microsecond(), entry])?;
    for store in stores {
        connection
            .prepare_cached("INSERT OR IGNORE INTO backup_store (cluster, backup, store) VALUES (?1, ?2, ?3)")?
            .execute(params![cluster.as_str(), text, store.as_str()])?;
    }
    Ok(())
}

/// Forgets of a store what its root does not name any more, and backups that no store has.
pub fn keep(
    connection: &Connection,
    cluster: &ClusterName,
    store: &StoreName,
    named: &[BackupId],
) -> CatalogResult<()> {
    let known: Vec<String> = connection
        .prepare_cached("SELECT backup FROM backup_store WHERE cluster = ?1 AND store = ?2")?
        .query_map(params![cluster.as_str(), store.as_str()], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    let named: std::collections::BTreeSet<String> = named.iter().map(ToString::to_string).collect();
    for gone in known.iter().filter(|known| !named.contains(*known)) {
        connection
            .prepare_cached("DELETE FROM backup_store WHERE cluster = ?1 AND backup = ?2 AND store = ?3")?
            .execute(params![cluster.as_str(), gone, store.as_str()])?;
        connection
            .prepare_cached(
                "DELETE FROM backup WHERE cluster = ?1 AND backup = ?2
                     AND NOT EXISTS (SELECT 1 FROM backup_store s WHERE s.cluster = ?1 AND s.backup = ?2)",
            )?
            .execute(params![cluster.as_str(), gone])?;
        connection
            .prepare_cached(
                "DELETE FROM backup_reference WHERE cluster = ?1 AND backup = ?2
                     AND NOT EXISTS (SELECT 1 FROM backup b WHERE b.cluster = ?1 AND b.backup = ?2)",
            )?
            .execute(params![cluster.as_str(), gone])?;
    }
    Ok(())
}

/// What a store had when its root was read last: entries of roots as JSON.
pub fn of_store(connection: &Connection, cluster: &ClusterName, store: &StoreName) -> CatalogResult<Vec<String>> {
    let mut statement = connection.prepare_cached(
        "SELECT b.entry FROM backup b JOIN backup_store s USING (cluster, backup) WHERE b.cluster = ?1 AND s.store = ?2
         ORDER BY b.backup",
    )?;
    let entries = statement.query_map(params![cluster.as_str(), store.as_str()], |row| row.get(0))?;
    Ok(entries.collect::<Result<_, _>>()?)
}

/// What a manifest refers to besides its own packs, as it was written down.
pub fn references(connection: &Connection, manifest: &str) -> CatalogResult<Option<String>> {
    let found = connection
        .prepare_cached("SELECT packs FROM backup_reference WHERE manifest = ?1")?
        .query_row([manifest], |row| row.get(0))
        .optional()?;
    Ok(found)
}

/// Writes that down, for good: a manifest never changes.
pub fn put_references(
    connection: &Connection,
    cluster: &ClusterName,
    backup: BackupId,
    manifest: &str,
    packs: &str,
) -> CatalogResult<()> {
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO backup_reference (manifest, cluster, backup, packs) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute(params![manifest, cluster.as_str(), backup.to_string(), packs])?;
    Ok(())
}

/// When the newest backup of a cluster was begun.
pub fn newest_start(connection: &Connection, cluster: &ClusterName) -> CatalogResult<Option<Timestamp>> {
    let newest: Option<i64> = connection
        .prepare_cached("SELECT max(started_us) FROM backup WHERE cluster = ?1")?
        .query_row([cluster.as_str()], |row| row.get(0))?;
    newest.map(timestamp).transpose()
}

/// The root's entry, as JSON, of the newest backup of a cluster.
pub fn newest_entry(connection: &Connection, cluster: &ClusterName) -> CatalogResult<Option<String>> {
    let newest = connection
        .prepare_cached("SELECT entry FROM backup WHERE cluster = ?1 ORDER BY started_us DESC, backup DESC LIMIT 1")?
        .query_row([cluster.as_str()], |row| row.get(0))
        .optional()?;
    Ok(newest)
}

/// What a store has of one type of a cluster's backups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewestBackup {
    /// Name of the cluster.
    pub cluster: String,
    /// Name of the store.
    pub store: String,
    /// `full`, `diff` or `incr`.
    pub backup_type: String,
    /// When the newest was stopped.
    pub newest: Timestamp,
    /// When the oldest was stopped.
    pub oldest: Timestamp,
    /// How many there are.
    pub count: u64,
}

/// What the stores have, by cluster, store and type. What cannot be understood is left out.
pub fn newest_by_type(connection: &Connection) -> CatalogResult<Vec<NewestBackup>> {
    let mut statement = connection.prepare_cached(
        "SELECT b.cluster, s.store, coalesce(json_extract(b.entry, '$.type'), 'full') AS type,
                max(json_extract(b.entry, '$.stop_time')), min(json_extract(b.entry, '$.stop_time')), count(*)
         FROM backup b JOIN backup_store s USING (cluster, backup)
         GROUP BY b.cluster, s.store, type ORDER BY b.cluster, s.store, type",
    )?;
    let rows = statement.query_map([], |row| {
        let time = |place: usize| row.get::<_, Option<String>>(place).map(|text| text?.parse::<Timestamp>().ok());
        let (Some(newest), Some(oldest)) = (time(3)?, time(4)?) else { return Ok(None) };
        let count: i64 = row.get(5)?;
        Ok(Some(NewestBackup {
            cluster: row.get(0)?,
            store: row.get(1)?,
            backup_type: row.get(2)?,
            newest,
            oldest,
            count: count.unsigned_abs(),
        }))
    })?;
    Ok(rows.filter_map(Result::transpose).collect::<Result<_, _>>()?)
}

/// Backups in the catalog.
pub fn count(connection: &Connection) -> CatalogResult<u64> {
    let count: i64 = connection.query_row("SELECT count(*) FROM backup", [], |row| row.get(0))?;
    Ok(count.unsigned_abs())
}

/// When a schedule last started a backup.
pub fn last_run(connection: &Connection, cluster: &ClusterName, expression: &str) -> CatalogResult<Option<Timestamp>> {
    let last: Option<i64> = connection
        .prepare_cached("SELECT started_us FROM schedule_run WHERE cluster = ?1 AND expression = ?2")?
        .query_row([cluster.as_str(), expression], |row| row.get(0))
        .optional()?;
    last.map(timestamp).transpose()
}

/// Remembers that a schedule started a backup.
pub fn put_run(
    connection: &Connection,
    cluster: &ClusterName,
    expression: &str,
    started: Timestamp,
) -> CatalogResult<()> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO schedule_run (cluster, expression, started_us) VALUES (?1, ?2, ?3)")?
        .execute(params![cluster.as_str(), expression, started.as_microsecond()])?;
    Ok(())
}

fn timestamp(microseconds: i64) -> CatalogResult<Timestamp> {
    Timestamp::from_microsecond(microseconds).map_err(|_| damaged("a time", "out of range"))
}

#[cfg(test)]
mod tests {
    use super::super::Catalog;
    use super::*;

    #[tokio::test]
    async fn ages_are_told_by_store_and_type() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let rows = catalog.call(|connection| {
            let cluster: ClusterName = "main".parse().unwrap();
            let stores: [StoreName; 2] = ["repo1".parse().unwrap(), "s3".parse().unwrap()];
            for (day, entry, stores) in [
                ("22", r#"{"stop_time":"2026-11-22T04:00:00Z"}"#, &stores[..]),
                ("23", r#"{"type":"incr","stop_time":"2026-11-23T04:00:00Z"}"#, &stores[..1]),
                ("24", r#"{"type":"incr","stop_time":"2026-11-24T04:00:00Z"}"#, &stores[..1]),
                ("25", "{}", &stores[..1]),
            ] {
                let backup = format!("202611{day}T034138Z-7f3a9c21").parse().unwrap();
                put(connection, &cluster, backup, entry, stores)?;
            }
            newest_by_type(connection)
        });
        let told: Vec<String> = rows
            .await
            .unwrap()
            .iter()
            .map(|row| {
                format!("{} {} {} {} {} {}", row.cluster, row.store, row.backup_type, row.count, row.newest, row.oldest)
            })
            .collect();
        assert_eq!(
            told,
            [
                "main repo1 full 2 2026-11-22T04:00:00Z 2026-11-22T04:00:00Z",
                "main repo1 incr 2 2026-11-24T04:00:00Z 2026-11-23T04:00:00Z",
                "main s3 full 1 2026-11-22T04:00:00Z 2026-11-22T04:00:00Z",
            ]
        );
    }

    #[tokio::test]
    async fn backups_and_runs_are_kept() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let cluster: ClusterName = "main".parse().unwrap();
        catalog
            .call(move |connection| {
                assert_eq!(newest_start(connection, &cluster)?, None);
                let first: BackupId = "20261123T034138Z-7f3a9c21".parse().unwrap();
                let second: BackupId = "20261124T034138Z-7f3a9c21".parse().unwrap();
                for backup in [second, first, second] {
                    put(connection, &cluster, backup, "{}", &["repo1".parse().unwrap()])?;
                }
                assert_eq!(count(connection)?, 2);
                assert_eq!(newest_start(connection, &cluster)?, Some(second.time()));
                let stores: [StoreName; 2] = ["repo1".parse().unwrap(), "s3".parse().unwrap()];
                put(connection, &cluster, second, "{}", &stores[1..])?;
                put_references(connection, &cluster, first, "07", "{}")?;
                assert_eq!(references(connection, "07")?.as_deref(), Some("{}"));
                keep(connection, &cluster, &stores[0], &[])?;
                assert_eq!((count(connection)?, of_store(connection, &cluster, &stores[1])?.len()), (1, 1));
                assert_eq!(
                    (of_store(connection, &cluster, &stores[0])?.len(), references(connection, "07")?),
                    (0, None)
                );
                assert_eq!(last_run(connection, &cluster, "@daily")?, None);
                put_run(connection, &cluster, "@daily", first.time())?;
                put_run(connection, &cluster, "@daily", second.time())?;
                assert_eq!(last_run(connection, &cluster, "@daily")?, Some(second.time()));
                Ok(())
            })
            .await
            .unwrap();
    }
}
