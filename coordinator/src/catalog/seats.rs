//! Which agent had a node's name last, and which one sent the newest WAL of a timeline, in the catalog.
//!
//! Both outlive a rebuild, because the stores know nothing of them, and are gone with a deleted catalog.

use repository::name::{ClusterName, NodeName};
use rusqlite::{Connection, OptionalExtension, params};

use super::CatalogResult;
use super::wal::{WalObject, parse, position, system};
use crate::writer::Line;

/// The agent that had a node's session last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeatRow {
    /// Fleet name of the cluster.
    pub cluster: ClusterName,
    /// Its node name.
    pub node: NodeName,
    /// Identity of its spool.
    pub instance: String,
    /// Where it said that its data directory is.
    pub data_directory: String,
}

/// Writes down who has a node's session.
pub fn put(connection: &Connection, row: &SeatRow) -> CatalogResult<()> {
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO seat (cluster, node, instance, data_directory) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute(params![row.cluster.as_str(), row.node.as_str(), row.instance, row.data_directory])?;
    Ok(())
}

/// Everybody who had a session.
pub fn all(connection: &Connection) -> CatalogResult<Vec<SeatRow>> {
    let mut statement = connection.prepare_cached("SELECT cluster, node, instance, data_directory FROM seat")?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(SeatRow {
            cluster: parse(&row.get::<_, String>(0)?, "a cluster name")?,
            node: parse(&row.get::<_, String>(1)?, "a node name")?,
            instance: row.get(2)?,
            data_directory: row.get(3)?,
        });
    }
    Ok(found)
}

/// Notes which agent sent an object of a timeline, if none newer is noted.
pub fn note_sender(connection: &Connection, object: &WalObject, node: &NodeName, instance: &str) -> CatalogResult<()> {
    connection
        .prepare_cached(
            "INSERT INTO sender (cluster, system_identifier, timeline, position, node, instance)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT DO UPDATE SET position = excluded.position, node = excluded.node, instance = excluded.instance
                 WHERE excluded.position >= position",
        )?
        .execute(params![
            object.cluster.as_str(),
            system(object.system_identifier),
            object.name.timeline().get(),
            position(object.name),
            node.as_str(),
            instance,
        ])?;
    Ok(())
}

/// Whether an agent sent the newest WAL of a timeline that is known.
pub fn is_newest_sender(connection: &Connection, line: &Line, node: &NodeName, instance: &str) -> CatalogResult<bool> {
    let found: Option<bool> = connection
        .prepare_cached(
            "SELECT node = ?4 AND instance = ?5 FROM sender
             WHERE cluster = ?1 AND system_identifier = ?2 AND timeline = ?3",
        )?
        .query_row(
            params![line.cluster.as_str(), system(line.system), line.timeline.get(), node.as_str(), instance],
            |row| row.get(0),
        )
        .optional()?;
    Ok(found.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::Catalog;
    use super::*;
    use postgres_format::{SystemIdentifier, Timeline};

    #[tokio::test]
    async fn the_newest_sender_of_a_timeline_is_remembered() {
        let (catalog, _thread, _) = Catalog::in_memory().unwrap();
        let object = |number: u32| WalObject {
            cluster: "main".parse().unwrap(),
            system_identifier: SystemIdentifier::new(7),
            name: format!("0000000100000000{number:08X}").parse().unwrap(),
            fingerprint: None,
        };
        let line =
            Line { cluster: "main".parse().unwrap(), system: SystemIdentifier::new(7), timeline: Timeline::FIRST };
        let node: NodeName = "a".parse().unwrap();
        let seat = |instance: &str| SeatRow {
            cluster: "main".parse().unwrap(),
            node: "a".parse().unwrap(),
            instance: instance.to_owned(),
            data_directory: "/data".to_owned(),
        };
        let (first, second) = (seat("i1"), seat("i2"));
        catalog
            .call(move |connection| {
                assert!(!is_newest_sender(connection, &line, &node, "i1")?);
                note_sender(connection, &object(5), &node, "i1")?;
                note_sender(connection, &object(4), &node, "i2")?;
                assert!(is_newest_sender(connection, &line, &node, "i1")?);
                assert!(!is_newest_sender(connection, &line, &node, "i2")?);
                note_sender(connection, &object(6), &node, "i2")?;
                assert!(is_newest_sender(connection, &line, &node, "i2")?);
                let other = Line { timeline: Timeline::new(2).unwrap(), ..line };
                assert!(!is_newest_sender(connection, &other, &node, "i2")?);
                put(connection, &first)?;
                put(connection, &second)?;
                assert_eq!(all(connection)?, [second]);
                Ok(())
            })
            .await
            .unwrap();
    }
}
