//! Clusters in the catalog, as the stores' roots name them.

use jiff::Timestamp;
use postgres_format::{SegmentSize, SystemIdentifier};
use repository::name::ClusterName;
use rusqlite::{Connection, OptionalExtension, params};
use uuid::Uuid;

use super::CatalogResult;
use super::wal::{damaged, parse};

/// One system identifier of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterRow {
    /// Fleet name.
    pub cluster: ClusterName,
    /// Its system identifier.
    pub system_identifier: SystemIdentifier,
    /// PostgreSQL's major version, once a node or a root said so.
    pub postgres_major: Option<u32>,
    /// Its WAL segment size, likewise.
    pub segment_size: Option<SegmentSize>,
    /// Since when it is known.
    pub since: Timestamp,
}

/// Writes a cluster down; facts known before stay when the new row lacks them.
pub fn put(connection: &Connection, row: &ClusterRow) -> CatalogResult<()> {
    connection
        .prepare_cached(
            "INSERT INTO cluster (name, system_identifier, postgres_major, segment_size_bytes, since_us)
             VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT DO UPDATE SET postgres_major = coalesce(excluded.postgres_major, postgres_major),
                 segment_size_bytes = coalesce(excluded.segment_size_bytes, segment_size_bytes)",
        )?
        .execute(params![
            row.cluster.as_str(),
            row.system_identifier.as_u64().cast_signed(),
            row.postgres_major,
            row.segment_size.map(|size| size.bytes().cast_signed()),
            row.since.as_microsecond(),
        ])?;
    Ok(())
}

/// All clusters, by name.
pub fn all(connection: &Connection) -> CatalogResult<Vec<ClusterRow>> {
    let mut statement = connection.prepare_cached(
        "SELECT name, system_identifier, postgres_major, segment_size_bytes, since_us FROM cluster ORDER BY 1, 2",
    )?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let name: String = row.get(0)?;
        let size: Option<i64> = row.get(3)?;
        found.push(ClusterRow {
            cluster: parse(&name, "a cluster name")?,
            system_identifier: SystemIdentifier::new(row.get::<_, i64>(1)?.cast_unsigned()),
            postgres_major: row.get(2)?,
            segment_size: size
                .map(|bytes| SegmentSize::from_bytes(bytes.cast_unsigned()))
                .transpose()
                .map_err(|_| damaged("a segment size", &format!("{size:?}")))?,
            since: Timestamp::from_microsecond(row.get(4)?).map_err(|_| damaged("a time", "out of range"))?,
        });
    }
    Ok(found)
}

const REPOSITORY: &str = "repository";

/// The identity of the repository this catalog is about, if it was ever written down.
pub fn repository(connection: &Connection) -> CatalogResult<Option<Uuid>> {
    let text: Option<String> = connection
        .prepare_cached("SELECT value FROM fact WHERE name = ?1")?
        .query_row([REPOSITORY], |row| row.get(0))
        .optional()?;
    text.map(|text| parse(&text, "a repository identity")).transpose()
}

/// Writes down the identity of the repository this catalog is about.
pub fn put_repository(connection: &Connection, repository: Uuid) -> CatalogResult<()> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO fact (name, value) VALUES (?1, ?2)")?
        .execute([REPOSITORY, &repository.to_string()])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Catalog;
    use super::*;

    #[tokio::test]
    async fn facts_are_added_and_never_lost() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let bare = ClusterRow {
            cluster: "main".parse().unwrap(),
            system_identifier: SystemIdentifier::new(u64::MAX),
            postgres_major: None,
            segment_size: None,
            since: Timestamp::from_second(5).unwrap(),
        };
        let full = ClusterRow { postgres_major: Some(15), segment_size: Some(SegmentSize::DEFAULT), ..bare.clone() };
        let expected = full.clone();
        let found = catalog
            .call(move |connection| {
                put(connection, &bare)?;
                put(connection, &full)?;
                put(connection, &bare)?;
                all(connection)
            })
            .await
            .unwrap();
        assert_eq!(found, [expected]);
    }
}
